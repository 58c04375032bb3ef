//! Whose address stands for whose: the question a translator asks of a [`Mapper`], and the answer of one without state.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{
    DropReason,
    eam::Maps,
    error::{Problem, Refusal},
    flow::{Ends, Flow},
};
use crate::Pref64;

/// Addresses and ports of one side for those of the other. A table of sessions keeps state behind it, and the time, which it
/// is told before each packet.
///
/// The translator asks once per packet, after it has found nothing wrong with the packet itself, so that no session is made
/// or renewed by a packet that does not go on. If there is something wrong, it asks whether the packet is known here at all.
pub trait Mapper {
    /// Whether a packet from IPv4 is for an address and a port that stand for something in IPv6. Nothing changes by this.
    ///
    /// What is not known is dropped as [`DropReason::NotMapped`], whatever else is wrong with it, and nobody is told: on an
    /// address that the host has, too, it is the host's to judge. An ICMP error that quotes nothing that can be read, and a
    /// fragment whose first is not known, are asked about with [`Ports::None`](super::Ports::None).
    fn knows_v4(&self, flow: &Flow<Ipv4Addr>) -> bool {
        let _ = flow;
        true
    }

    /// Whether a packet from IPv6 is between a host that may be seen in IPv4 and an address that stands for one there. No
    /// session is needed for that.
    fn knows_v6(&self, flow: &Flow<Ipv6Addr>) -> bool {
        let _ = flow;
        true
    }

    /// It is `now`, in milliseconds of a clock that never goes back. Told before packets are translated, often enough for
    /// lifetimes of seconds; what has no state need not know.
    fn tick(&mut self, _now: u64) {}

    /// What a packet from IPv6 looks like on the side that it leaves to.
    ///
    /// # Errors
    ///
    /// Why it does not go on, and what its sender is told.
    fn to_v4(&mut self, flow: &Flow<Ipv6Addr>) -> Result<Exit<Ends<Ipv4Addr>, Ends<Ipv6Addr>>, Refusal>;

    /// What a packet from IPv4 looks like in IPv6.
    ///
    /// # Errors
    ///
    /// Why it does not go on, and what its sender is told.
    fn to_v6(&mut self, flow: &Flow<Ipv4Addr>) -> Result<Ends<Ipv6Addr>, Refusal>;

    /// What an ICMPv6 error from `source` to `destination` looks like on the side that it leaves to. It quotes `flow`, which
    /// went the other way, and neither makes nor renews a session (RFC 5508 §4).
    ///
    /// # Errors
    ///
    /// Why it does not go on. Nobody is told: no error is sent about an error.
    fn error_to_v4(
        &mut self,
        source: Ipv6Addr,
        destination: Ipv6Addr,
        flow: &Flow<Ipv6Addr>,
    ) -> Result<Exit<Quotation<Ipv4Addr>, Quotation<Ipv6Addr>>, Refusal>;

    /// The same for an ICMPv4 error.
    ///
    /// # Errors
    ///
    /// Why it does not go on.
    fn error_to_v6(
        &mut self,
        source: Ipv4Addr,
        destination: Ipv4Addr,
        flow: &Flow<Ipv4Addr>,
    ) -> Result<Quotation<Ipv6Addr>, Refusal>;
}

/// A mapper that is asked about one packet, and whether it has been.
pub(super) struct Asked<'a, M> {
    mapper: &'a mut M,
    been: bool,
}

impl<'a, M: Mapper> Asked<'a, M> {
    pub(super) fn new(mapper: &'a mut M) -> Self {
        Self { mapper, been: false }
    }

    pub(super) fn now(&mut self) -> &mut M {
        self.been = true;
        self.mapper
    }

    /// What becomes of a packet for which `refusal` was found: nothing but that if the mapper knows it, or has spoken already.
    pub(super) fn judge(&self, refusal: Refusal, knows: impl FnOnce(&M) -> bool) -> Refusal {
        match self.been || knows(self.mapper) {
            true => refusal,
            false => DropReason::NotMapped.into(),
        }
    }
}

/// On which side a packet from IPv6 leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit<V4, V6> {
    /// To IPv4, as nearly all.
    V4(V4),
    /// Back to IPv6, since its destination stands for an IPv4 address that stands for one of IPv6 (RFC 6146 §3.8,
    /// RFC 7757 §4): as if it had been to IPv4 and come back.
    V6(V6),
}

/// The addresses of an ICMP error, and the ends of the packet that it quotes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quotation<A> {
    /// Who reports.
    pub source: A,
    /// To whom: the sender of what is quoted.
    pub destination: A,
    /// Of what is quoted.
    pub quoted: Ends<A>,
}

/// Stateless mapping (RFC 7915 §6): explicit maps first (RFC 7757 §3.3), then a prefix (RFC 6052).
#[derive(Clone, Debug)]
pub struct Stateless {
    /// Under which all other IPv4 addresses lie.
    pub prefix: Option<Pref64>,
    /// Addresses that have one of their own.
    pub maps: Maps,
    /// Who reports an ICMPv6 error when its source has no IPv4 address (RFC 6791 §3): one of these, always the same for
    /// the same source. Without any, such errors are dropped.
    pub reporters_v4: Vec<Ipv4Addr>,
    /// Who reports an ICMPv4 error when its source has no IPv6 address. Without one, such errors are dropped.
    pub reporter_v6: Option<Ipv6Addr>,
}

/// By what an IPv4 address was found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Map,
    Prefix,
}

impl Stateless {
    fn v4(&self, address: Ipv6Addr) -> Result<(Ipv4Addr, By), Refusal> {
        if let Some(v4) = self.maps.to_v4(address) {
            return Ok((v4, By::Map));
        }
        let prefix = self.prefix.ok_or(DropReason::NotMapped)?;
        let v4 = prefix.extract(address).ok_or(DropReason::NotMapped)?;
        if !prefix.may_embed(v4) {
            // RFC 6052 §3.1 asks for the drop; who meant the address learns why.
            return Err(Refusal::told(DropReason::NotGlobal, Problem::Prohibited));
        }
        Ok((v4, By::Prefix))
    }

    fn v6(&self, address: Ipv4Addr) -> Result<Ipv6Addr, Refusal> {
        self.maps.to_v6(address).map_or_else(|| self.embedded(address), Ok)
    }

    fn embedded(&self, address: Ipv4Addr) -> Result<Ipv6Addr, Refusal> {
        let prefix = self.prefix.ok_or(DropReason::NotMapped)?;
        if !prefix.may_embed(address) {
            return Err(DropReason::NotGlobal.into());
        }
        Ok(prefix.embed(address))
    }

    /// RFC 6791 §3: different routers look different in a traceroute, as far as there are addresses.
    fn reporter_v4(&self, source: Ipv6Addr) -> Option<Ipv4Addr> {
        let count = u128::try_from(self.reporters_v4.len()).ok()?;
        // 2^32 + 15 is prime, so that every bit of the source tells.
        let place = (source.to_bits() % 4_294_967_311).checked_rem(count)?;
        self.reporters_v4.get(usize::try_from(place).ok()?).copied()
    }
}

/// What is known but must not be used is refused for that, and not as unknown.
fn is_known<T>(found: Result<T, Refusal>) -> bool {
    found.map_or_else(|refusal| refusal.reason != DropReason::NotMapped, |_| true)
}

impl Mapper for Stateless {
    fn knows_v4(&self, flow: &Flow<Ipv4Addr>) -> bool {
        let ends = [flow.ends.source, flow.ends.destination];
        ends.into_iter().all(|address| is_known(self.v6(address)))
    }

    fn knows_v6(&self, flow: &Flow<Ipv6Addr>) -> bool {
        let ends = [flow.ends.source, flow.ends.destination];
        ends.into_iter().all(|address| is_known(self.v4(address)))
    }

    fn to_v4(&mut self, flow: &Flow<Ipv6Addr>) -> Result<Exit<Ends<Ipv4Addr>, Ends<Ipv6Addr>>, Refusal> {
        let (source, _) = self.v4(flow.ends.source).map_err(Refusal::untold)?;
        let (destination, by) = self.v4(flow.ends.destination)?;
        let ports = flow.ends.ports;
        // RFC 7757 §4: who reaches a mapped host by its address under the prefix is itself seen under the prefix, so that the
        // answer comes here, too.
        if by == By::Prefix
            && let Some(destination) = self.maps.to_v6(destination)
        {
            return Ok(Exit::V6(Ends {
                source: self.embedded(source)?,
                destination,
                ports,
            }));
        }
        Ok(Exit::V4(Ends {
            source,
            destination,
            ports,
        }))
    }

    fn to_v6(&mut self, flow: &Flow<Ipv4Addr>) -> Result<Ends<Ipv6Addr>, Refusal> {
        Ok(Ends {
            source: self.v6(flow.ends.source)?,
            destination: self.v6(flow.ends.destination)?,
            ports: flow.ends.ports,
        })
    }

    fn error_to_v4(
        &mut self,
        source: Ipv6Addr,
        destination: Ipv6Addr,
        flow: &Flow<Ipv6Addr>,
    ) -> Result<Exit<Quotation<Ipv4Addr>, Quotation<Ipv6Addr>>, Refusal> {
        let source = match self.v4(source) {
            Ok((source, _)) => source,
            Err(refusal) => self.reporter_v4(source).ok_or(refusal)?,
        };
        let (destination, by) = self.v4(destination)?;
        let (quoted_source, _) = self.v4(flow.ends.source)?;
        let (quoted_destination, _) = self.v4(flow.ends.destination)?;
        let ports = flow.ends.ports;
        // The quoted packet came back from here, too: its source is mapped, its destination was seen under the prefix.
        if by == By::Prefix
            && let Some(destination) = self.maps.to_v6(destination)
        {
            return Ok(Exit::V6(Quotation {
                source: self.embedded(source)?,
                destination,
                quoted: Ends {
                    source: self.v6(quoted_source)?,
                    destination: self.embedded(quoted_destination)?,
                    ports,
                },
            }));
        }
        Ok(Exit::V4(Quotation {
            source,
            destination,
            quoted: Ends {
                source: quoted_source,
                destination: quoted_destination,
                ports,
            },
        }))
    }

    fn error_to_v6(
        &mut self,
        source: Ipv4Addr,
        destination: Ipv4Addr,
        flow: &Flow<Ipv4Addr>,
    ) -> Result<Quotation<Ipv6Addr>, Refusal> {
        let source = match self.v6(source) {
            Ok(source) => source,
            Err(refusal) => self.reporter_v6.ok_or(refusal)?,
        };
        Ok(Quotation {
            source,
            destination: self.v6(destination)?,
            quoted: Ends {
                source: self.v6(flow.ends.source)?,
                destination: self.v6(flow.ends.destination)?,
                ports: flow.ends.ports,
            },
        })
    }
}
