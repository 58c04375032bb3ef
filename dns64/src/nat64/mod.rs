//! NAT64: one packet of one version in, the same of the other out (RFC 7915), by whatever maps the addresses.
//!
//! ```text
//! packet -> fragments (their ports) -> ip (headers) -> flow -> map (stateless, or a table of sessions) -> transport (ports, checksums) -> packet
//!                        \-> icmp, quote (an error, and the packet that it quotes) /
//!                        \-> error (what cannot go on, and what its sender is told)
//! ```
//! Each packet is translated in the buffer that it lies in; nothing is allocated, nothing panics on any bytes, and neither
//! clock nor device is known. What the device finishes, checksums and segments, is carried along: see [`Offload`].

mod checksum;
pub mod config;
mod eam;
mod error;
mod flow;
mod fragments;
mod icmp;
mod ident;
mod ip;
mod limit;
mod map;
mod packet;
#[cfg(test)]
mod properties;
mod quote;
#[cfg(test)]
mod rfc6052;
pub mod state;
pub mod status;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod translate;
mod translate_error;
mod transport;
pub mod vnet;

use std::net::{Ipv4Addr, Ipv6Addr};

pub use config::{Config, Mode};
pub use eam::{Map, MapError, Maps};
pub use error::{DropReason, Problem, Refusal};
pub use flow::{Ends, Flow, Ports};
pub use fragments::{Fate, FragmentLimits, Fragments, is_fragment};
pub use ip::Fragment;
pub use limit::Limit;
pub use map::{Exit, Mapper, Quotation, Stateless};
pub use packet::{HEADROOM, Offload, Packet, Pieces};
pub use translate::Translator;

/// What the caller does with the packet that it handed over.
#[derive(Debug)]
pub enum Verdict<'a> {
    /// Count it and forget it.
    Drop(DropReason),
    /// Send these on; their version nibble names the side.
    Forward(Pieces<'a>),
    /// Count it, and send this one packet, an ICMP error, back to the side that it came from, unless that has had enough
    /// of them (RFC 1812 §4.3.2.8, RFC 4443 §2.4 f): what a limit is, is the caller's to say.
    Reply(DropReason, Pieces<'a>),
}

/// What a translator does where RFC 7915 leaves a choice, and what it knows of its place.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Source of the ICMPv4 errors that it sends itself.
    pub address_v4: Ipv4Addr,
    /// Source of the ICMPv6 errors that it sends itself.
    pub address_v6: Ipv6Addr,
    /// MTU towards IPv4, in octets; at least 68.
    pub mtu_v4: u16,
    /// MTU towards IPv6, in octets; at least 1280.
    pub mtu_v6: u16,
    /// What all of the IPv6 network takes, in octets: longer packets that may be fragmented are (RFC 7915 §4). At least 1280.
    pub lowest_ipv6_mtu: u16,
    /// Whether the traffic class goes over with all its bits, as is the rule; else only the two of ECN do, which mark
    /// congestion in either version alike (RFC 7915 §4.1, §5.1, RFC 3168).
    pub copy_class: bool,
    /// Whether UDP over IPv4 without a checksum gets one (RFC 7915 §4.5); else it is refused. A fragment is, always.
    pub sum_udp: bool,
    /// Whether the Maximum Segment Size that a TCP SYN names, either way, is lowered to what the MTUs of both sides carry,
    /// `mtu_v4` - 40 or `mtu_v6` - 60 octets: no connection has to learn it from errors that somebody may drop
    /// (RFC 2923 §2.1).
    pub clamp_mss: bool,
    /// Whether senders are told of packets that do not go on.
    pub answer: bool,
}
