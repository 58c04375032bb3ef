//! What the translator tells about itself; the shapes that `edgectl --output json` prints.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddrV4, SocketAddrV6},
};

use serde::{Deserialize, Serialize};

use super::state::{Counts, SessionView};

/// What may be asked of a running translator.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "ask")]
pub enum Request {
    /// Device and counters: [`Answer::Status`].
    Status,
    /// Sessions from a number on: [`Answer::Sessions`].
    Sessions {
        /// 0, or what the answer before named.
        from: u32,
        /// Numbers to look at, at most 10,000.
        most: u32,
    },
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "answer")]
pub enum Answer {
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// To [`Request::Sessions`].
    Sessions {
        /// Those that there are.
        sessions: Vec<SessionStatus>,
        /// Where to go on, if there may be more.
        next: Option<u32>,
    },
}

/// The translator at a glance. Counters begin at zero with each start of its worker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// `stateful` or `stateless`.
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
    /// Bindings and sessions, with mode = "stateful".
    #[serde(default)]
    pub state: Option<StateStatus>,
    /// Ports that hosts can still get, by address and protocol.
    #[serde(default)]
    pub pool: Vec<PortStatus>,
    /// Packets that did not go on, by reason; every reason is there.
    pub dropped: BTreeMap<String, u64>,
}

/// Bindings and sessions in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateStatus {
    /// Bindings that there are.
    pub bindings: u64,
    /// Sessions that there are.
    pub sessions: u64,
    /// Hosts that have ports, or had until a short while ago.
    pub hosts: u64,
    /// Bindings made since the worker's start.
    pub bindings_made: u64,
    /// Sessions made since the worker's start.
    pub sessions_made: u64,
}

impl From<Counts> for StateStatus {
    fn from(counts: Counts) -> Self {
        let Counts {
            bindings,
            sessions,
            hosts,
            bindings_made,
            sessions_made,
        } = counts;
        Self {
            bindings,
            sessions,
            hosts,
            bindings_made,
            sessions_made,
        }
    }
}

/// Ports of a pool address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortStatus {
    /// The address.
    pub address: Ipv4Addr,
    /// `tcp`, `udp` or `icmp`.
    pub protocol: String,
    /// Ports in blocks that no host has.
    pub free: u64,
    /// Ports that there are.
    pub all: u64,
}

/// A session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// `tcp`, `udp` or `icmp`.
    pub protocol: String,
    /// The host; the port is an identifier for ICMP.
    pub host: SocketAddrV6,
    /// As what it is seen.
    pub seen_as: SocketAddrV4,
    /// With whom it speaks.
    pub remote: SocketAddrV4,
    /// For TCP.
    pub state: Option<String>,
    /// Seconds until it ends, if nothing comes.
    pub left: u64,
}

impl SessionStatus {
    /// Of a session.
    pub fn of(session: &SessionView) -> Self {
        let binding = &session.binding;
        Self {
            protocol: binding.protocol.as_str().into(),
            host: SocketAddrV6::new(binding.v6.0, binding.v6.1, 0, 0),
            seen_as: SocketAddrV4::new(binding.v4.0, binding.v4.1),
            remote: SocketAddrV4::new(session.remote.0, session.remote.1),
            state: session.state.map(|state| state.as_str().into()),
            left: session.left / 1000,
        }
    }
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
