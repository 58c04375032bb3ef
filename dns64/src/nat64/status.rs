//! What the translator tells about itself; the shapes that `edgectl --output json` prints.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What may be asked of a running translator.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "ask")]
pub enum Request {
    /// Device and counters: [`Answer::Status`].
    Status,
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "answer")]
pub enum Answer {
    /// To [`Request::Status`].
    Status(Box<Status>),
}

/// The translator at a glance. Counters begin at zero with each start of its worker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// `stateless`.
    pub mode: String,
    /// The prefix; `None` if there are maps only.
    pub prefix: Option<String>,
    /// Explicit maps.
    pub maps: u64,
    /// The TUN device.
    pub device: String,
    /// Its queues, with a thread each.
    pub queues: u64,
    /// What the device leaves to whoever sends the packet on.
    pub offloads: Offloads,
    /// From IPv4 and to it.
    pub ipv4: Side,
    /// From IPv6 and to it.
    pub ipv6: Side,
    /// Packets that stood for several segments, of those that came.
    pub super_packets: u64,
    /// Packets that the device did not take.
    pub unsent: u64,
    /// Packets that did not go on, by reason; every reason is there.
    pub dropped: BTreeMap<String, u64>,
}

/// One version's packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Side {
    /// Packets that came from it. A super-packet counts as one.
    pub received: u64,
    /// Their octets.
    pub received_octets: u64,
    /// Packets that were sent to it, ICMP errors included.
    pub sent: u64,
    /// Their octets.
    pub sent_octets: u64,
    /// ICMP errors that were sent to it.
    pub errors: u64,
    /// ICMP errors that were not, for there were too many.
    pub errors_limited: u64,
}

/// What a device leaves undone in packets that it hands over, and takes undone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offloads {
    /// Checksums of TCP and UDP.
    pub checksum: bool,
    /// The cut of TCP into segments.
    pub tcp: bool,
    /// The cut of UDP into datagrams (Linux 6.2).
    pub udp: bool,
}

impl Offloads {
    /// By name, with whether they are in effect.
    pub const fn by_name(self) -> [(&'static str, bool); 3] {
        [
            ("checksum", self.checksum),
            ("tcp-segmentation", self.tcp),
            ("udp-segmentation", self.udp),
        ]
    }
}
