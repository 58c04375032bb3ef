//! Whole packets, both ways (RFC 7915 §4, §5); ICMP errors are next door.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    num::NonZeroU16,
};

use super::{
    DropReason, Mapper, Packet, Problem, Refusal, Settings, Verdict,
    checksum::Sum,
    error::{answer_v4, answer_v6, is_destination_v4, is_source_v4, is_source_v6},
    flow::{Ends, Flow},
    icmp::{self, IPV6_MINIMUM_MTU, LONGER},
    ident::Idents,
    ip::{Fragment, Obstacle, V4, V6, checked_v4, checked_v6, has_source_route, protocol},
    map::{Asked, Exit},
    packet::Split,
    transport::{self, Change},
};

/// Octets of the headers of an IPv6 fragment.
const FRAGMENT_HEADERS: usize = 48;
/// IPv4 packets up to this may be fragmented on their way: as IPv6 they were no longer than 1280 octets, and IPv6 senders do
/// not go below that (RFC 7915 §5.1).
pub(super) const LONGEST_FRAGMENTABLE: usize = 1260;

/// Translates packets. It has no state but the identifications that it gave, so that all threads share one.
#[derive(Debug)]
pub struct Translator {
    pub(super) settings: Settings,
    pub(super) idents: Idents,
}

impl Translator {
    /// With a secret `seed` (RFC 7739): whoever knew it could tell how much others send.
    pub fn new(settings: Settings, seed: [u64; 2]) -> Self {
        let settings = Settings {
            mtu_v4: settings.mtu_v4.max(68),
            mtu_v6: settings.mtu_v6.max(IPV6_MINIMUM_MTU),
            lowest_ipv6_mtu: settings.lowest_ipv6_mtu.max(IPV6_MINIMUM_MTU),
            ..settings
        };
        Self {
            settings,
            idents: Idents::new(seed),
        }
    }

    /// Translates one packet, whichever version it is of.
    pub fn translate<'a>(&self, mapper: &mut impl Mapper, packet: Packet<'a>) -> Verdict<'a> {
        match packet.bytes().first().map(|first| first >> 4) {
            Some(4) => self.v4(mapper, packet),
            Some(6) => self.v6(mapper, packet),
            _ => Verdict::Drop(DropReason::Malformed),
        }
    }

    /// Translates one packet from IPv4 (RFC 7915 §4).
    ///
    /// A packet that may be fragmented and is too long becomes several [`Pieces`].
    pub fn v4<'a>(&self, mapper: &mut impl Mapper, mut packet: Packet<'a>) -> Verdict<'a> {
        let ip = match whole_v4(&mut packet) {
            Ok(ip) => ip,
            Err(reason) => return Verdict::Drop(reason),
        };
        let mut mapper = Asked::new(mapper);
        match self.to_v6(&mut mapper, &mut packet, &ip) {
            Ok(None) => Verdict::Forward(packet.whole()),
            Ok(Some(split)) => Verdict::Forward(packet.pieces(split)),
            Err(refusal) => {
                let refusal = mapper.judge(refusal, |mapper| mapper.knows_v4(&flow_v4(&packet, &ip)));
                self.refused(refusal, packet, |packet, problem| {
                    let own = self.settings.address_v4;
                    answer_v4(packet, &ip, problem, own, || {
                        self.idents.take(own, ip.source, protocol::ICMP, 1)
                    })
                })
            }
        }
    }

    /// Translates one packet from IPv6 (RFC 7915 §5).
    pub fn v6<'a>(&self, mapper: &mut impl Mapper, mut packet: Packet<'a>) -> Verdict<'a> {
        let ip = match whole_v6(&mut packet) {
            Ok(ip) => ip,
            Err(reason) => return Verdict::Drop(reason),
        };
        let mut mapper = Asked::new(mapper);
        match self.to_v4(&mut mapper, &mut packet, &ip) {
            Ok(()) => Verdict::Forward(packet.whole()),
            Err(refusal) => {
                let refusal = mapper.judge(refusal, |mapper| mapper.knows_v6(&flow_v6(&packet, &ip)));
                self.refused(refusal, packet, |packet, problem| {
                    answer_v6(packet, &ip, problem, self.settings.address_v6)
                })
            }
        }
    }

    /// A refusal comes before the packet is changed, so that it can be quoted as it came.
    fn refused<'a>(
        &self,
        refusal: Refusal,
        mut packet: Packet<'a>,
        answer: impl FnOnce(&mut Packet<'a>, Problem) -> Option<()>,
    ) -> Verdict<'a> {
        let problem = refusal.problem.filter(|_| self.settings.answer);
        match problem.and_then(|problem| answer(&mut packet, problem)) {
            Some(()) => Verdict::Reply(refusal.reason, packet.whole()),
            None => Verdict::Drop(refusal.reason),
        }
    }

    fn to_v6(
        &self,
        mapper: &mut Asked<'_, impl Mapper>,
        packet: &mut Packet<'_>,
        ip: &V4,
    ) -> Result<Option<Split>, Refusal> {
        let bytes = packet.bytes();
        let transport = bytes.get(ip.header..).unwrap_or_default();
        let fragment = ip.fragment();
        let first = ip.offset == 0;
        let is_icmp = ip.protocol == protocol::ICMP;
        let is_error = is_icmp && first && transport.first().is_some_and(|kind| icmp::is_error_v4(*kind));
        // RFC 7915 §4.1: an error from such a source is of use to who looks for the trouble.
        if !is_source_v4(ip.source) && !is_error {
            return Err(DropReason::Source.into());
        }
        if !is_destination_v4(ip.destination) {
            return Err(DropReason::Destination.into());
        }
        let next = protocol_v6(ip.protocol).ok_or(DropReason::Protocol)?;
        if is_icmp && fragment.is_some() {
            return Err(DropReason::IcmpFragment.into());
        }
        if is_error {
            return self.error_to_v6(mapper, packet, ip).map(|()| None);
        }
        may_pass_v4(bytes, ip)?;
        let mut kind = None;
        if first {
            transport::check(ip.protocol, transport)?;
            if is_icmp {
                let echo = transport.first().and_then(|kind| icmp::echo_to_v6(*kind));
                kind = Some(echo.ok_or(DropReason::IcmpType)?);
            }
        }
        let unsummed = first && !packet.offload.partial && transport::is_unsummed(ip.protocol, transport);
        if unsummed && (fragment.is_some() || !self.settings.sum_udp) {
            return Err(Refusal::told(DropReason::UdpChecksum, Problem::Prohibited));
        }
        if unsummed && !transport::is_whole_udp(transport) {
            return Err(DropReason::Malformed.into());
        }
        let flow = flow_v4(packet, ip);
        let length = transport.len();
        let shape = self.shape_v6(packet, ip)?;
        let ends = mapper.now().to_v6(&flow)?;

        let from = match is_icmp {
            true => Sum::default(),
            false => Sum::pseudo_v4(ip.source, ip.destination, length, ip.protocol),
        };
        let to = Sum::pseudo_v6(ends.source, ends.destination, length, next);
        let partial = packet.offload.partial;
        let transport = packet.bytes_mut().get_mut(ip.header..).unwrap_or_default();
        if first {
            let change = Change {
                from,
                to,
                kind,
                ports: ends.ports,
            };
            transport::rewrite(transport, next, &change, partial);
            self.clamp_mss(transport, next, partial);
            if unsummed {
                transport::sum_udp(transport, |length| {
                    Sum::pseudo_v6(ends.source, ends.destination, length, next)
                });
            } else if partial && matches!(shape, Shape::Split(_)) {
                // The device completes whole packets only.
                transport::complete(transport, next);
                packet.offload.partial = false;
            }
        }
        let fragment = match shape {
            Shape::Whole(_) => fragment,
            Shape::Split(_) => Some(fragment.unwrap_or(Fragment {
                id: ip.id.into(),
                offset: 0,
                more: false,
            })),
        };
        let header = V6 {
            class: self.class(ip.class),
            // A split packet has it written piece by piece.
            payload: u16::try_from(length + fragment.map_or(0, |_| 8)).map_err(|_| DropReason::TooBig)?,
            hop_limit: ip.ttl.saturating_sub(1),
            source: ends.source,
            destination: ends.destination,
            fragment,
            protocol: next,
            header: 40,
            obstacle: None,
        };
        let headers = header.headers();
        match shape {
            Shape::Whole(segment) => {
                packet.offload.segment = segment;
                packet.transport = headers.as_slice().len();
                packet
                    .rebuild(headers.as_slice(), ip.header..ip.header + length, 0, 0)
                    .ok_or(DropReason::Malformed)?;
                Ok(None)
            }
            Shape::Split(chunk) => {
                packet.transport = FRAGMENT_HEADERS;
                packet
                    .rebuild(&[], ip.header..ip.header + length, 0, 0)
                    .ok_or(DropReason::Malformed)?;
                let header = headers.as_slice().first_chunk().ok_or(DropReason::Malformed)?;
                Ok(Some(Split {
                    header: *header,
                    chunk,
                    offset: ip.offset,
                    more: ip.more,
                }))
            }
        }
    }

    /// As what an IPv4 packet goes on: whole, or in pieces of so many octets (RFC 7915 §4, §4.1).
    fn shape_v6(&self, packet: &Packet<'_>, ip: &V4) -> Result<Shape, Refusal> {
        let transport = packet.bytes().get(ip.header..).unwrap_or_default();
        let mtu = self.settings.mtu_v6;
        let limit = usize::from(match ip.dont_fragment {
            true => mtu,
            false => mtu.min(self.settings.lowest_ipv6_mtu),
        });
        let headers = if ip.fragment().is_some() { FRAGMENT_HEADERS } else { 40 };
        // RFC 7915 §4: so much less, also for a fragment, which grows by another 8 octets. It is the path's MTU that is told, and
        // that of most packets.
        let too_big = Refusal::told(DropReason::TooBig, Problem::TooBig(mtu.saturating_sub(LONGER)));
        if let Some(segment) = packet.offload.segment {
            let headers = 40 + transport::header(ip.protocol, transport).ok_or(DropReason::Malformed)?;
            return match lowered(segment, headers, limit) {
                // No header says that the segments were longer once.
                Some(lower) if lower == segment || ip.protocol == protocol::TCP => Ok(Shape::Whole(Some(lower))),
                _ if ip.dont_fragment => Err(too_big),
                _ => Err(DropReason::NeedsSegmentation.into()),
            };
        }
        if headers + transport.len() <= limit {
            Ok(Shape::Whole(None))
        } else if ip.dont_fragment {
            Err(too_big)
        } else {
            Ok(Shape::Split((limit - FRAGMENT_HEADERS) & !7))
        }
    }

    fn to_v4(&self, mapper: &mut Asked<'_, impl Mapper>, packet: &mut Packet<'_>, ip: &V6) -> Result<(), Refusal> {
        let transport = packet.bytes().get(ip.header..).unwrap_or_default();
        let first = ip.fragment.is_none_or(|fragment| fragment.offset == 0);
        let is_icmp = ip.protocol == protocol::ICMPV6;
        if !is_source_v6(ip.source) {
            return Err(DropReason::Source.into());
        }
        if !is_source_v6(ip.destination) {
            return Err(DropReason::Destination.into());
        }
        if ip.hop_limit <= 1 {
            return Err(Refusal::told(DropReason::HopLimit, Problem::HopLimit));
        }
        match ip.obstacle {
            None => {}
            Some(Obstacle::SegmentsLeft(pointer)) => {
                return Err(Refusal::told(DropReason::RoutingHeader, Problem::SegmentsLeft(pointer)));
            }
            Some(Obstacle::AfterFragment) => {
                return Err(Refusal::told(DropReason::ExtensionHeader, Problem::Prohibited));
            }
        }
        let next = protocol_v4(ip.protocol).ok_or(DropReason::Protocol)?;
        if is_icmp && ip.fragment.is_some_and(|fragment| !fragment.is_atomic()) {
            return Err(DropReason::IcmpFragment.into());
        }
        if is_icmp && transport.first().is_some_and(|kind| *kind < 128) {
            return self.error_to_v4(mapper, packet, ip);
        }
        let mut kind = None;
        if first {
            transport::check(ip.protocol, transport)?;
            if is_icmp {
                let echo = transport.first().and_then(|kind| icmp::echo_to_v4(*kind));
                kind = Some(echo.ok_or(DropReason::IcmpType)?);
            }
        }
        // RFC 8200 §8.1: no receiver would take it, and as IPv4 it would pass for one that nobody summed up.
        if first && !packet.offload.partial && transport::is_unsummed(ip.protocol, transport) {
            return Err(DropReason::UdpChecksum.into());
        }
        let flow = flow_v6(packet, ip);
        let length = transport.len();
        let shape = self.shape_v4(packet, ip)?;
        let from = Sum::pseudo_v6(ip.source, ip.destination, length, ip.protocol);
        let ends = match mapper.now().to_v4(&flow)? {
            Exit::V4(ends) => ends,
            Exit::V6(ends) => {
                turn_back(packet, ip, &ends, first.then_some(from));
                if first {
                    let partial = packet.offload.partial;
                    let transport = packet.bytes_mut().get_mut(ip.header..).unwrap_or_default();
                    self.clamp_mss(transport, ip.protocol, partial);
                }
                return Ok(());
            }
        };

        let to = match is_icmp {
            true => Sum::default(),
            false => Sum::pseudo_v4(ends.source, ends.destination, length, next),
        };
        let partial = packet.offload.partial;
        let transport = packet.bytes_mut().get_mut(ip.header..).unwrap_or_default();
        if first {
            let change = Change {
                from,
                to,
                kind,
                ports: ends.ports,
            };
            transport::rewrite(transport, next, &change, partial);
            self.clamp_mss(transport, next, partial);
        }
        let header = V4 {
            class: self.class(ip.class),
            total: u16::try_from(length + 20).map_err(|_| DropReason::TooBig)?,
            // RFC 7915 §5.1: only what is a fragment has an identification to keep, of which the low half fits.
            id: ip.fragment.map_or_else(
                || self.idents.take(ends.source, ends.destination, next, shape.packets),
                |fragment| (fragment.id & 0xffff) as u16,
            ),
            dont_fragment: shape.dont_fragment,
            more: ip.fragment.is_some_and(|fragment| fragment.more),
            offset: ip.fragment.map_or(0, |fragment| fragment.offset),
            ttl: ip.hop_limit.saturating_sub(1),
            protocol: next,
            source: ends.source,
            destination: ends.destination,
            header: 20,
        };
        packet.offload.segment = shape.segment;
        packet.transport = 20;
        packet
            .rebuild(&header.octets(), ip.header..ip.header + length, 0, 0)
            .ok_or(DropReason::Malformed.into())
    }

    /// As what an IPv6 packet goes on (RFC 7915 §5.1).
    fn shape_v4(&self, packet: &Packet<'_>, ip: &V6) -> Result<ShapeV4, Refusal> {
        let transport = packet.bytes().get(ip.header..).unwrap_or_default();
        let limit = usize::from(self.settings.mtu_v4);
        let told = self.settings.mtu_v4.saturating_add(LONGER).max(IPV6_MINIMUM_MTU);
        let too_big = Refusal::told(DropReason::TooBig, Problem::TooBig(told));
        let total = 20 + transport.len();
        if u16::try_from(total).is_err() {
            return Err(too_big);
        }
        // The packet that it is of would be longer than IPv4 can say.
        if total + ip.fragment.map_or(0, |fragment| usize::from(fragment.offset)) > usize::from(u16::MAX) {
            return Err(DropReason::FragmentEnd.into());
        }
        let (mut segment, mut size, mut packets) = (packet.offload.segment, total, 1);
        if let Some(wanted) = segment {
            let header = transport::header(ip.protocol, transport).ok_or(DropReason::Malformed)?;
            let lower = lowered(wanted, 20 + header, limit);
            let lower = match lower {
                Some(lower) if lower == wanted || ip.protocol == protocol::TCP => lower,
                _ => return Err(too_big),
            };
            let each = usize::from(lower.get());
            size = total.min(20 + header + each);
            packets = u16::try_from(transport.len().saturating_sub(header).div_ceil(each)).unwrap_or(u16::MAX);
            segment = Some(lower);
        } else if total > limit && packet.bytes().len() > usize::from(IPV6_MINIMUM_MTU) {
            return Err(too_big);
        }
        Ok(ShapeV4 {
            segment,
            packets: packets.max(1),
            dont_fragment: ip.fragment.is_none() && size > LONGEST_FRAGMENTABLE,
        })
    }

    /// In what turns back to IPv6, too: what would not fit IPv4 does not get that far.
    fn clamp_mss(&self, transport: &mut [u8], protocol: u8, partial: bool) {
        let Settings {
            mtu_v4,
            mtu_v6,
            clamp_mss,
            ..
        } = self.settings;
        if clamp_mss && protocol == protocol::TCP {
            let most = mtu_v4.saturating_sub(40).min(mtu_v6.saturating_sub(60));
            transport::clamp_mss(transport, most, partial);
        }
    }

    pub(super) fn class(&self, class: u8) -> u8 {
        if self.settings.copy_class { class } else { class & 0b11 }
    }
}

/// As what an IPv4 packet goes on.
enum Shape {
    /// As one, or as segments with so many octets of payload.
    Whole(Option<NonZeroU16>),
    /// In fragments with so many octets of payload.
    Split(usize),
}

/// As what an IPv6 packet goes on.
struct ShapeV4 {
    segment: Option<NonZeroU16>,
    /// How many packets the device will make of it.
    packets: u16,
    dont_fragment: bool,
}

/// The octets of payload that a segment has room for behind `headers`, no more than `wanted`.
fn lowered(wanted: NonZeroU16, headers: usize, limit: usize) -> Option<NonZeroU16> {
    let room = u16::try_from(limit.checked_sub(headers)?).unwrap_or(u16::MAX);
    NonZeroU16::new(wanted.get().min(room))
}

/// Whether nothing in its header keeps a packet from going on (RFC 7915 §4.1).
pub(super) fn may_pass_v4(bytes: &[u8], ip: &V4) -> Result<(), Refusal> {
    if ip.ttl <= 1 {
        return Err(Refusal::told(DropReason::HopLimit, Problem::HopLimit));
    }
    if has_source_route(bytes, ip.header) {
        return Err(Refusal::told(DropReason::SourceRoute, Problem::SourceRoute));
    }
    Ok(())
}

/// What a mapper is asked about.
fn flow_v4(packet: &Packet<'_>, ip: &V4) -> Flow<Ipv4Addr> {
    let transport = packet.bytes().get(ip.header..).unwrap_or_default();
    Flow::of(ip.source, ip.destination, ip.protocol, ip.fragment(), transport).with_ports(packet.ports)
}

fn flow_v6(packet: &Packet<'_>, ip: &V6) -> Flow<Ipv6Addr> {
    let transport = packet.bytes().get(ip.header..).unwrap_or_default();
    Flow::of(ip.source, ip.destination, ip.protocol, ip.fragment, transport).with_ports(packet.ports)
}

/// The packet without what a link layer added, and its header, if that is right.
fn whole_v4(packet: &mut Packet<'_>) -> Result<V4, DropReason> {
    let ip = checked_v4(packet.bytes())?;
    packet.cut(ip.total.into()).ok_or(DropReason::Malformed)?;
    Ok(ip)
}

fn whole_v6(packet: &mut Packet<'_>) -> Result<V6, DropReason> {
    let ip = checked_v6(packet.bytes())?;
    packet.cut(40 + usize::from(ip.payload)).ok_or(DropReason::Malformed)?;
    Ok(ip)
}

/// What follows the headers is named alike in both versions, but for ICMP. What IPv6 would read as a header of its own must
/// not become one.
pub(super) const fn protocol_v6(protocol: u8) -> Option<u8> {
    match protocol {
        protocol::ICMP => Some(protocol::ICMPV6),
        protocol::HOP_BY_HOP | protocol::ROUTING | protocol::FRAGMENT | protocol::ICMPV6 | protocol::DESTINATION => {
            None
        }
        protocol => Some(protocol),
    }
}

/// The same the other way.
pub(super) const fn protocol_v4(protocol: u8) -> Option<u8> {
    match protocol {
        protocol::ICMPV6 => Some(protocol::ICMP),
        protocol::ICMP => None,
        protocol => Some(protocol),
    }
}

/// Sends a packet back to IPv6 with other ends, one hop further. `from` is the pseudo-header that its checksum covers, if it
/// has one.
fn turn_back(packet: &mut Packet<'_>, ip: &V6, ends: &Ends<Ipv6Addr>, from: Option<Sum>) {
    let partial = packet.offload.partial;
    packet.transport = ip.header;
    let bytes = packet.bytes_mut();
    readdress(bytes, ends.source, ends.destination);
    if let Some(hop_limit) = bytes.get_mut(7) {
        *hop_limit = ip.hop_limit.saturating_sub(1);
    }
    let transport = bytes.get_mut(ip.header..).unwrap_or_default();
    if let Some(from) = from {
        let to = Sum::pseudo_v6(ends.source, ends.destination, transport.len(), ip.protocol);
        let change = Change {
            from,
            to,
            kind: None,
            ports: ends.ports,
        };
        transport::rewrite(transport, ip.protocol, &change, partial);
    }
}

/// Writes other addresses into an IPv6 header.
pub(super) fn readdress(header: &mut [u8], source: Ipv6Addr, destination: Ipv6Addr) {
    for (at, address) in [(8, source), (24, destination)] {
        if let Some(place) = header.get_mut(at..).and_then(<[u8]>::first_chunk_mut) {
            *place = address.octets();
        }
    }
}
