//! What a mapper is asked about: between whom a packet goes, and by which ports or identifier.

use super::{
    icmp,
    ip::{Fragment, protocol, set_word, word},
};

/// A packet as a mapper sees it. `A` is [`Ipv4Addr`](std::net::Ipv4Addr) or [`Ipv6Addr`](std::net::Ipv6Addr).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow<A> {
    /// Between whom it goes.
    pub ends: Ends<A>,
    /// Protocol number: 6 TCP, 17 UDP, 1 or 58 ICMP, others without ports.
    pub protocol: u8,
    /// The octet of TCP flags (RFC 9293 §3.1), 0 for other protocols and where it is not there.
    pub tcp_flags: u8,
    /// Set in what is only a part of a packet. Only the first has ports; others have those that the packet was given with
    /// [`Packet::with_ports`](super::Packet::with_ports).
    pub fragment: Option<Fragment>,
}

/// Source and destination, addresses and ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends<A> {
    /// Whence.
    pub source: A,
    /// Whither.
    pub destination: A,
    /// By which ports.
    pub ports: Ports,
}

/// What tells the flows of two addresses apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ports {
    /// Nothing: neither TCP, UDP nor an echo, or a fragment whose first is not known, or a quotation cut too short.
    None,
    /// The ports of TCP or UDP.
    Pair {
        /// Whence.
        source: u16,
        /// Whither.
        destination: u16,
    },
    /// The identifier of an ICMP echo (RFC 792): its client's, in requests and in replies.
    Echo {
        /// As the message has it.
        id: u16,
        /// Whether this is the answer, so that the client is the destination.
        reply: bool,
    },
}

impl<A> Flow<A> {
    /// Of a packet with this `transport` header and what follows; a type of ICMP is one of version 4 if `protocol` is.
    pub(super) fn of(source: A, destination: A, protocol: u8, fragment: Option<Fragment>, transport: &[u8]) -> Self {
        // One that is all of its packet is none, in spite of its header (RFC 6946).
        let fragment = fragment.filter(|fragment| !fragment.is_atomic());
        let first = fragment.is_none_or(|fragment| fragment.offset == 0);
        let tcp_flags = match transport.get(13) {
            Some(flags) if first && protocol == protocol::TCP => *flags,
            _ => 0,
        };
        let ports = if first { Ports::of(protocol, transport) } else { None };
        Self {
            ends: Ends {
                source,
                destination,
                ports: ports.unwrap_or(Ports::None),
            },
            protocol,
            tcp_flags,
            fragment,
        }
    }

    /// With the `ports` of its first fragment, if it is a later one.
    pub(super) fn with_ports(mut self, ports: Ports) -> Self {
        if self.fragment.is_some_and(|fragment| fragment.offset > 0) {
            self.ends.ports = ports;
        }
        self
    }
}

impl Ports {
    pub(super) fn of(protocol: u8, transport: &[u8]) -> Option<Self> {
        match protocol {
            protocol::TCP | protocol::UDP => Some(Self::Pair {
                source: word(transport, 0)?,
                destination: word(transport, 2)?,
            }),
            protocol::ICMP | protocol::ICMPV6 => {
                let kind = *transport.first()?;
                let reply = match (protocol, kind) {
                    (protocol::ICMP, icmp::v4::ECHO) | (protocol::ICMPV6, icmp::v6::ECHO) => false,
                    (protocol::ICMP, icmp::v4::ECHO_REPLY) | (protocol::ICMPV6, icmp::v6::ECHO_REPLY) => true,
                    _ => return None,
                };
                Some(Self::Echo {
                    id: word(transport, 4)?,
                    reply,
                })
            }
            _ => None,
        }
    }

    /// Writes them where [`Flow::of`] found them.
    pub(super) fn write(self, transport: &mut [u8]) {
        match self {
            Self::None => {}
            Self::Pair { source, destination } => {
                set_word(transport, 0, source);
                set_word(transport, 2, destination);
            }
            Self::Echo { id, .. } => {
                set_word(transport, 4, id);
            }
        }
    }
}
