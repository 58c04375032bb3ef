//! The mapper that keeps state: flows of the translator to questions of the table (RFC 6146 §3.4, §3.5).

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{
    Protocol,
    table::{Asked, Table},
    tcp::Segment,
};
use crate::nat64::{DropReason, Ends, Exit, Flow, Mapper, Ports, Problem, Quotation, Refusal, ip::protocol};

/// One thread's view of a table that all threads share, at a time.
#[derive(Clone, Debug)]
pub struct Stateful {
    table: Arc<Mutex<Table>>,
    /// In milliseconds, see [`super`].
    now: u64,
}

/// What a packet asks for, and by which port of the host, and of the other end.
#[derive(Clone, Copy, Debug)]
struct Question {
    asked: Asked,
    host: u16,
    remote: u16,
}

impl Stateful {
    /// Of that table, at the time `now`.
    pub const fn new(table: Arc<Mutex<Table>>, now: u64) -> Self {
        Self { table, now }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // A panic with the lock held ends the process.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Mapper for Stateful {
    fn tick(&mut self, now: u64) {
        self.now = now;
    }

    fn knows_v4(&self, flow: &Flow<Ipv4Addr>) -> bool {
        let ours = |question: Question| (flow.ends.destination, question.host);
        from_v4(flow).is_ok_and(|question| self.table().is_bound(question.asked.protocol, ours(question)))
    }

    fn knows_v6(&self, flow: &Flow<Ipv6Addr>) -> bool {
        let table = self.table();
        let policy = table.policy();
        policy.is_client(flow.ends.source) && policy.prefix.contains(flow.ends.destination)
    }

    fn to_v4(&mut self, flow: &Flow<Ipv6Addr>) -> Result<Exit<Ends<Ipv4Addr>, Ends<Ipv6Addr>>, Refusal> {
        let now = self.now;
        let mut table = self.table();
        let prefix = table.policy().prefix;
        let Some(destination) = prefix.extract(flow.ends.destination) else {
            return Err(DropReason::NotMapped.into());
        };
        let question = from_v6(flow)?;
        let remote = (destination, question.remote);
        let (address, port) = table.outbound(now, question.asked, (flow.ends.source, question.host), remote)?;
        if !table.is_ours(destination) {
            return Ok(Exit::V4(Ends {
                source: address,
                destination,
                ports: sent(flow.ends.ports, port),
            }));
        }
        // RFC 6146 §3.8: as if it had come back from IPv4, from what its sender is seen as. An identifier is that of who asks:
        // the host that is asked has no port of its own.
        let question = match question.asked.protocol {
            Protocol::Icmp => return Err(Refusal::told(DropReason::NoBinding, Problem::Port)),
            _ => question,
        };
        let ours = (destination, question.remote);
        let (host, host_port) = table.inbound(now, question.asked, ours, (address, port), true)?;
        Ok(Exit::V6(Ends {
            source: prefix.embed(address),
            destination: host,
            ports: Ports::Pair {
                source: port,
                destination: host_port,
            },
        }))
    }

    fn to_v6(&mut self, flow: &Flow<Ipv4Addr>) -> Result<Ends<Ipv6Addr>, Refusal> {
        let now = self.now;
        let mut table = self.table();
        if !table.is_ours(flow.ends.destination) {
            return Err(DropReason::NotMapped.into());
        }
        let question = from_v4(flow)?;
        let ours = (flow.ends.destination, question.host);
        let remote = (flow.ends.source, question.remote);
        let (host, port) = table.inbound(now, question.asked, ours, remote, false)?;
        Ok(Ends {
            source: table.policy().prefix.embed(flow.ends.source),
            destination: host,
            ports: received(flow.ends.ports, port),
        })
    }

    fn error_to_v4(
        &mut self,
        _source: Ipv6Addr,
        destination: Ipv6Addr,
        flow: &Flow<Ipv6Addr>,
    ) -> Result<Exit<Quotation<Ipv4Addr>, Quotation<Ipv6Addr>>, Refusal> {
        let table = self.table();
        let prefix = table.policy().prefix;
        let unknown = Refusal::from(DropReason::NoSession);
        // What is quoted came from IPv4: its source lies under the prefix, and it is who is told.
        let remote = prefix.extract(flow.ends.source).ok_or(unknown)?;
        if prefix.extract(destination) != Some(remote) {
            return Err(DropReason::IcmpQuotation.into());
        }
        let (protocol, host, port) = quoted(flow.protocol, flow.ends.ports)?;
        let host = (flow.ends.destination, host);
        let (address, ours) = table.seen_as(protocol, host, (remote, port)).ok_or(unknown)?;
        let ports = received(flow.ends.ports, ours);
        if !table.is_ours(remote) {
            // RFC 7915 §5.2, RFC 6791: a router on the way has no IPv4 address but ours.
            return Ok(Exit::V4(Quotation {
                source: address,
                destination: remote,
                quoted: Ends {
                    source: remote,
                    destination: address,
                    ports,
                },
            }));
        }
        // RFC 6146 §3.8 for errors: the sender is a host of ours, too.
        let (sender, sent_from) = table
            .host_at(protocol, (remote, port), (address, ours))
            .ok_or(unknown)?;
        Ok(Exit::V6(Quotation {
            source: prefix.embed(address),
            destination: sender,
            quoted: Ends {
                source: sender,
                destination: prefix.embed(address),
                ports: Ports::Pair {
                    source: sent_from,
                    destination: ours,
                },
            },
        }))
    }

    fn error_to_v6(
        &mut self,
        source: Ipv4Addr,
        destination: Ipv4Addr,
        flow: &Flow<Ipv4Addr>,
    ) -> Result<Quotation<Ipv6Addr>, Refusal> {
        let table = self.table();
        let prefix = table.policy().prefix;
        // What is quoted went out from here: its source is who is told, and an address of ours.
        if destination != flow.ends.source {
            return Err(DropReason::IcmpQuotation.into());
        }
        if !table.is_ours(destination) {
            return Err(DropReason::NotMapped.into());
        }
        let (protocol, port, remote) = quoted_sent(flow.protocol, flow.ends.ports)?;
        let remote = (flow.ends.destination, remote);
        let (host, host_port) = table
            .host_at(protocol, (destination, port), remote)
            .ok_or(DropReason::NoSession)?;
        Ok(Quotation {
            // RFC 7915 §4.3 has any router translated; the well-known prefix must not show a private one (RFC 6052 §3.1).
            source: match prefix.may_embed(source) {
                true => prefix.embed(source),
                false => table.policy().reporter_v6,
            },
            destination: host,
            quoted: Ends {
                source: host,
                destination: prefix.embed(flow.ends.destination),
                ports: sent(flow.ends.ports, host_port),
            },
        })
    }
}

/// What a packet from a host asks for. An echo is between the identifier and nothing (RFC 6146 §3.5.3).
fn from_v6(flow: &Flow<Ipv6Addr>) -> Result<Question, Refusal> {
    Ok(match (flow.protocol, flow.ends.ports) {
        (protocol::TCP | protocol::UDP, Ports::Pair { source, destination }) => Question {
            asked: asked(flow.protocol, flow.tcp_flags),
            host: source,
            remote: destination,
        },
        (protocol::ICMPV6, Ports::Echo { id, reply }) => echo(id, reply),
        _ => return Err(no_ports(flow.fragment.is_some())),
    })
}

/// The same for a packet to one.
fn from_v4(flow: &Flow<Ipv4Addr>) -> Result<Question, Refusal> {
    Ok(match (flow.protocol, flow.ends.ports) {
        (protocol::TCP | protocol::UDP, Ports::Pair { source, destination }) => Question {
            asked: asked(flow.protocol, flow.tcp_flags),
            host: destination,
            remote: source,
        },
        (protocol::ICMP, Ports::Echo { id, reply }) => echo(id, reply),
        _ => return Err(no_ports(flow.fragment.is_some()).untold()),
    })
}

fn asked(number: u8, tcp_flags: u8) -> Asked {
    let segment = (number == protocol::TCP).then(|| Segment::of(tcp_flags));
    // An answer to a SYN begins nothing (RFC 9293 §3.5).
    let begins = match segment {
        Some(segment) => segment == Segment::Syn && tcp_flags & 0x10 == 0,
        None => true,
    };
    Asked {
        protocol: match segment {
            Some(_) => Protocol::Tcp,
            None => Protocol::Udp,
        },
        segment,
        begins,
    }
}

const fn echo(id: u16, reply: bool) -> Question {
    Question {
        asked: Asked {
            protocol: Protocol::Icmp,
            segment: None,
            begins: !reply,
        },
        host: id,
        remote: 0,
    }
}

/// RFC 6146 §3.4: other protocols are not translated, and their senders may know.
const fn no_ports(fragment: bool) -> Refusal {
    match fragment {
        true => Refusal {
            reason: DropReason::NoPorts,
            problem: None,
        },
        false => Refusal::told(DropReason::NoPorts, Problem::Port),
    }
}

/// Protocol, port of the receiver and port of the sender of a quoted packet that a host got.
fn quoted(number: u8, ports: Ports) -> Result<(Protocol, u16, u16), Refusal> {
    match (number, ports) {
        (protocol::TCP, Ports::Pair { source, destination }) => Ok((Protocol::Tcp, destination, source)),
        (protocol::UDP, Ports::Pair { source, destination }) => Ok((Protocol::Udp, destination, source)),
        (protocol::ICMP | protocol::ICMPV6, Ports::Echo { id, .. }) => Ok((Protocol::Icmp, id, 0)),
        _ => Err(DropReason::NoPorts.into()),
    }
}

/// Protocol, port of the sender and port of the receiver of a quoted packet that a host sent.
fn quoted_sent(number: u8, ports: Ports) -> Result<(Protocol, u16, u16), Refusal> {
    let (protocol, receiver, sender) = quoted(number, ports)?;
    Ok(match protocol {
        Protocol::Icmp => (protocol, receiver, 0),
        _ => (protocol, sender, receiver),
    })
}

/// The ports of what a host sent, with another one for its own.
const fn sent(ports: Ports, port: u16) -> Ports {
    match ports {
        Ports::Pair { destination, .. } => Ports::Pair {
            source: port,
            destination,
        },
        Ports::Echo { reply, .. } => Ports::Echo { id: port, reply },
        Ports::None => Ports::None,
    }
}

/// The ports of what a host gets, with another one for its own.
const fn received(ports: Ports, port: u16) -> Ports {
    match ports {
        Ports::Pair { source, .. } => Ports::Pair {
            source,
            destination: port,
        },
        Ports::Echo { reply, .. } => Ports::Echo { id: port, reply },
        Ports::None => Ports::None,
    }
}
