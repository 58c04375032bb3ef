//! Stateful NAT64 (RFC 6146): bindings, sessions, and the mapper that the translator asks.
//!
//! ```text
//! flow -> mapper (may it, whose is it) -> table -> index (which record) -> records (shared memory)
//!                                            |-> tcp (what becomes of the session) -> wheel (until when)
//!                                            \-> ports (a new binding's)
//! ```
//! Nothing here reads a clock: `now` is in milliseconds of one that never goes back and that the next process reads alike.

mod index;
mod mapper;
mod ports;
pub mod probe;
mod records;
mod table;
mod tcp;
#[cfg(test)]
mod tests;
mod wheel;

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
pub use mapper::Stateful;
pub use ports::PoolRange;
pub use records::Binding;
pub use table::{Counts, Probe, SessionView, Table};
pub use tcp::TcpState;

use crate::Pref64;

/// What has ports, or an identifier in their place: each with a BIB of its own (RFC 6146 §3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Protocol {
    /// TCP.
    Tcp = 0,
    /// UDP.
    Udp = 1,
    /// Echoes of ICMP.
    Icmp = 2,
}

impl Protocol {
    /// How many there are.
    pub const COUNT: usize = 3;
    /// All of them, each at its number.
    pub const ALL: [Self; Self::COUNT] = [Self::Tcp, Self::Udp, Self::Icmp];

    const fn numbered(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Tcp),
            1 => Some(Self::Udp),
            2 => Some(Self::Icmp),
            _ => None,
        }
    }

    /// As a user reads it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        }
    }
}

/// Whom a binding lets in (RFC 4787 §5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Filtering {
    /// Everybody who knows the port.
    #[default]
    EndpointIndependent,
    /// Whom its host has spoken to, by address.
    AddressDependent,
}

/// A binding that is there without a session, open to everybody: a host's service as the IPv4 world sees it
/// (RFC 6146 §3.1, a statically configured entry).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fixed {
    /// Of what.
    pub protocol: Protocol,
    /// As what it is seen: an address of the pool, and any port, also outside the pool's range.
    pub v4: (Ipv4Addr, u16),
    /// The host, and its port.
    pub v6: (Ipv6Addr, u16),
}

/// What is allowed, and how much of it.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Under which the IPv4 world lies.
    pub prefix: Pref64,
    /// As what hosts are seen.
    pub pool: Vec<PoolRange>,
    /// Bindings that are always there. Of two for one port, or for one port of one host, the first counts.
    pub fixed: Vec<Fixed>,
    /// Who may use it; all others are dropped.
    pub clients: Vec<Ipv6Net>,
    /// Whom a binding lets in.
    pub filtering: Filtering,
    /// Whether TCP connections and pings may begin in IPv4, towards a binding that is not fixed.
    pub inbound_new: bool,
    /// Destinations that are refused besides all that is not global: the edge's own, mesh, VPN.
    pub denied: Vec<Ipv4Net>,
    /// Destinations that are allowed although they are not global. `denied` goes before.
    pub allow_private: Vec<Ipv4Net>,
    /// As whom errors are shown that come from an address which cannot be shown under the prefix.
    pub reporter_v6: Ipv6Addr,
    /// How many leading bits of an address make a host, for the limits below.
    pub host_bits: u8,
    /// Bindings of a host.
    pub bindings_per_host: u32,
    /// Sessions of a host.
    pub sessions_per_host: u32,
    /// Sessions that a host may begin per second; ten times as many at once after a rest.
    pub new_per_second: u32,
    /// How long sessions live without a packet.
    pub lifetimes: Lifetimes,
}

/// How long sessions live without a packet, in milliseconds (RFC 6146 §4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetimes {
    /// UDP_DEFAULT.
    pub udp: u64,
    /// TCP_EST.
    pub tcp_established: u64,
    /// TCP_TRANS.
    pub tcp_transitory: u64,
    /// ICMP_DEFAULT.
    pub icmp: u64,
}

impl Default for Lifetimes {
    /// 5 minutes (RFC 4787 REQ-5), 2 hours and 4 minutes, 4 minutes (RFC 5382 REQ-5), 60 seconds (RFC 5508 REQ-2).
    fn default() -> Self {
        Self {
            udp: 300_000,
            tcp_established: 7_440_000,
            tcp_transitory: 240_000,
            icmp: 60_000,
        }
    }
}

impl Policy {
    /// Whether an address may use the translator.
    fn is_client(&self, address: Ipv6Addr) -> bool {
        self.clients.iter().any(|net| net.contains(&address))
    }

    /// Whether hosts may speak to `address`.
    fn allows(&self, address: Ipv4Addr) -> bool {
        let within = |nets: &[Ipv4Net]| nets.iter().any(|net| net.contains(&address));
        !within(&self.denied)
            && self.prefix.may_embed(address)
            && (crate::prefix::is_global(address) || within(&self.allow_private))
    }
}
