//! ICMP errors, both ways: the message, and one level deep the packet that it quotes (RFC 7915 §4.2, §4.3, §5.2, §5.3).

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{
    DropReason, Mapper, Packet, Refusal, Translator,
    checksum::Sum,
    error::{LONGEST_V4, LONGEST_V6},
    flow::Flow,
    icmp::{self, Error, Rest},
    ip::{V4, V6, protocol, set_word},
    map::{Asked, Exit, Quotation},
    packet::Headers,
    quote::{Body, ICMP_HEADER, Kept},
    translate::{LONGEST_FRAGMENTABLE, may_pass_v4, protocol_v4, protocol_v6, readdress},
    transport::{self, Change},
};

/// Octets that a length in ICMPv4 and in ICMPv6 counts (RFC 4884 §4).
const UNIT_V4: usize = 4;
const UNIT_V6: usize = 8;

impl Translator {
    /// An ICMPv4 error, no fragment, as ICMPv6.
    pub(super) fn error_to_v6(
        &self,
        mapper: &mut Asked<'_, impl Mapper>,
        packet: &mut Packet<'_>,
        ip: &V4,
    ) -> Result<(), Refusal> {
        let message = packet.bytes().get(ip.header..).unwrap_or_default();
        let (icmp, body) = split(message)?;
        let [kind, code, _, _, pointer, words, mtu @ ..] = icmp;
        let error = icmp::error_to_v6(kind, code, pointer).ok_or(DropReason::IcmpType)?;
        let body_of = Body::of(body.len(), words, UNIT_V4);
        let (inner, quoted) = quoted_v4(body, body_of)?;
        let next = protocol_v6(inner.protocol).ok_or(DropReason::IcmpQuotation)?;
        let fragment = inner.fragment();
        let tail = body.get(inner.header..quoted).unwrap_or_default();
        let echo = quoted_kind(inner.protocol, inner.offset == 0, tail, icmp::echo_to_v6)?;
        let flow = Flow::of(inner.source, inner.destination, inner.protocol, fragment, tail);
        // Asked before anything else: only what is quoted tells for whom it is, and no session depends on it.
        let answer = mapper.now().error_to_v6(ip.source, ip.destination, &flow);
        let answer = answer.map_err(Refusal::untold)?;
        may_pass_v4(packet.bytes(), ip)?;

        let header = V6 {
            class: self.class(inner.class),
            payload: u16::try_from(inner.payload() + fragment.map_or(0, |_| 8))
                .map_err(|_| DropReason::IcmpQuotation)?,
            hop_limit: inner.ttl,
            source: answer.quoted.source,
            destination: answer.quoted.destination,
            fragment,
            protocol: next,
            header: 40,
            obstacle: None,
        };
        let header_octets = header.headers();
        let header_length = header_octets.as_slice().len();
        let extension = extension_of(error, body_of);
        let kept = Kept::of(header_length + tail.len(), extension, LONGEST_V6 - 48, UNIT_V6);
        let rest = match error.rest {
            Rest::Unused => [kept.words, 0, 0, 0],
            Rest::Pointer(pointer) => [0, 0, 0, pointer],
            Rest::Mtu => {
                let (mtu_v4, mtu_v6) = (self.settings.mtu_v4, self.settings.mtu_v6);
                u32::from(icmp::mtu_to_v6(u16::from_be_bytes(mtu), inner.total, mtu_v4, mtu_v6)).to_be_bytes()
            }
        };
        let length = ICMP_HEADER + kept.quoted + kept.padding + kept.extension;
        let outer = V6 {
            class: self.class(ip.class),
            payload: u16::try_from(length).map_err(|_| DropReason::Malformed)?,
            hop_limit: ip.ttl.saturating_sub(1),
            source: answer.source,
            destination: answer.destination,
            fragment: None,
            protocol: protocol::ICMPV6,
            header: 40,
            obstacle: None,
        };
        let change = Change {
            from: pseudo_v4(inner.source, inner.destination, inner.payload(), inner.protocol),
            to: Sum::pseudo_v6(header.source, header.destination, inner.payload(), next),
            kind: echo,
            ports: answer.quoted.ports,
        };
        let headers = outer
            .headers()
            .then(&[error.kind, error.code, 0, 0])
            .then(&rest)
            .then(header_octets.as_slice());
        let splice = Splice {
            headers,
            outer: 40,
            at: ip.header,
            from: ip.header + ICMP_HEADER + inner.header,
            kept: kept.quoted.saturating_sub(header_length),
            first: inner.offset == 0,
            protocol: next,
            padding: kept.padding,
            extension: kept.extension,
            change,
            pseudo_from: Sum::default(),
            pseudo_to: Sum::pseudo_v6(outer.source, outer.destination, length, protocol::ICMPV6),
        };
        splice.into_packet(packet).ok_or(DropReason::Malformed.into())
    }

    /// An ICMPv6 error, no fragment or all of one, as ICMPv4.
    pub(super) fn error_to_v4(
        &self,
        mapper: &mut Asked<'_, impl Mapper>,
        packet: &mut Packet<'_>,
        ip: &V6,
    ) -> Result<(), Refusal> {
        let message = packet.bytes().get(ip.header..).unwrap_or_default();
        let (icmp, body) = split(message)?;
        let [kind, code, _, _, rest @ ..] = icmp;
        let error = icmp::error_to_v4(kind, code, u32::from_be_bytes(rest)).ok_or(DropReason::IcmpType)?;
        // Packet Too Big and Parameter Problem have other things in the place of a length.
        let words = if error.rest == Rest::Unused && kind != icmp::v6::PARAMETER {
            rest[0]
        } else {
            0
        };
        let body_of = Body::of(body.len(), words, UNIT_V6);
        let (inner, quoted) = quoted_v6(body, body_of)?;
        let next = protocol_v4(inner.protocol).ok_or(DropReason::IcmpQuotation)?;
        let first = inner.fragment.is_none_or(|fragment| fragment.offset == 0);
        let tail = body.get(inner.header..quoted).unwrap_or_default();
        let echo = quoted_kind(inner.protocol, first, tail, icmp::echo_to_v4)?;
        let flow = Flow::of(inner.source, inner.destination, inner.protocol, inner.fragment, tail);
        let from = Sum::pseudo_v6(inner.source, inner.destination, inner.transport(), inner.protocol);
        let message_from = Sum::pseudo_v6(ip.source, ip.destination, message.len(), ip.protocol);
        let exit = mapper.now().error_to_v4(ip.source, ip.destination, &flow);
        let answer = match exit.map_err(Refusal::untold)? {
            Exit::V4(answer) => answer,
            Exit::V6(answer) => {
                let change = Change {
                    from,
                    to: Sum::pseudo_v6(
                        answer.quoted.source,
                        answer.quoted.destination,
                        inner.transport(),
                        inner.protocol,
                    ),
                    kind: None,
                    ports: answer.quoted.ports,
                };
                return turn_back(packet, ip, &inner, &answer, message_from, first.then_some(change))
                    .ok_or(DropReason::Malformed.into());
            }
        };

        let total = u16::try_from(inner.transport() + 20).map_err(|_| DropReason::IcmpQuotation)?;
        let header = V4 {
            class: self.class(inner.class),
            total,
            // What it was is not known any more, unless it was a fragment's.
            id: inner.fragment.map_or(0, |fragment| (fragment.id & 0xffff) as u16),
            dont_fragment: inner.fragment.is_none() && usize::from(total) > LONGEST_FRAGMENTABLE,
            more: inner.fragment.is_some_and(|fragment| fragment.more),
            offset: inner.fragment.map_or(0, |fragment| fragment.offset),
            ttl: inner.hop_limit,
            protocol: next,
            source: answer.quoted.source,
            destination: answer.quoted.destination,
            header: 20,
        };
        let extension = extension_of(error, body_of);
        let kept = Kept::of(20 + tail.len(), extension, LONGEST_V4 - 28, UNIT_V4);
        let rest = match error.rest {
            Rest::Unused => [0, kept.words, 0, 0],
            Rest::Pointer(pointer) => [pointer, kept.words, 0, 0],
            Rest::Mtu => {
                let (mtu_v4, mtu_v6) = (self.settings.mtu_v4, self.settings.mtu_v6);
                let [high, low] = icmp::mtu_to_v4(u32::from_be_bytes(rest), mtu_v4, mtu_v6).to_be_bytes();
                [0, kept.words, high, low]
            }
        };
        let length = ICMP_HEADER + kept.quoted + kept.padding + kept.extension;
        let (source, destination) = (answer.source, answer.destination);
        let outer = V4 {
            class: self.class(ip.class),
            total: u16::try_from(20 + length).map_err(|_| DropReason::Malformed)?,
            id: ip.fragment.map_or_else(
                || self.idents.take(source, destination, protocol::ICMP, 1),
                |fragment| (fragment.id & 0xffff) as u16,
            ),
            // Never longer than 576 octets.
            dont_fragment: false,
            more: false,
            offset: 0,
            ttl: ip.hop_limit.saturating_sub(1),
            protocol: protocol::ICMP,
            source,
            destination,
            header: 20,
        };
        let change = Change {
            from,
            to: pseudo_v4(header.source, header.destination, inner.transport(), next),
            kind: echo,
            ports: answer.quoted.ports,
        };
        let headers = Headers::new()
            .then(&outer.octets())
            .then(&[error.kind, error.code, 0, 0])
            .then(&rest)
            .then(&header.octets());
        let splice = Splice {
            headers,
            outer: 20,
            at: ip.header,
            from: ip.header + ICMP_HEADER + inner.header,
            kept: kept.quoted.saturating_sub(20),
            first,
            protocol: next,
            padding: kept.padding,
            extension: kept.extension,
            change,
            pseudo_from: message_from,
            pseudo_to: Sum::default(),
        };
        splice.into_packet(packet).ok_or(DropReason::Malformed.into())
    }
}

/// The header of an ICMP message, and what is behind.
fn split(message: &[u8]) -> Result<([u8; ICMP_HEADER], &[u8]), DropReason> {
    let (header, body) = message.split_first_chunk().ok_or(DropReason::Malformed)?;
    Ok((*header, body))
}

/// The quoted header, and how many octets of its packet are quoted.
fn quoted_v4(body: &[u8], parts: Body) -> Result<(V4, usize), DropReason> {
    let quoted = body.get(..parts.quoted).unwrap_or_default();
    let inner = V4::parse(quoted).ok_or(DropReason::IcmpQuotation)?;
    Ok((inner, without_padding(parts, inner.total.into())))
}

fn quoted_v6(body: &[u8], parts: Body) -> Result<(V6, usize), DropReason> {
    let quoted = body.get(..parts.quoted).unwrap_or_default();
    let inner = V6::parse(quoted).ok_or(DropReason::IcmpQuotation)?;
    // Nothing of the kind ever left here.
    if inner.obstacle.is_some() {
        return Err(DropReason::IcmpQuotation);
    }
    Ok((inner, without_padding(parts, 40 + usize::from(inner.payload))))
}

/// Only an extension is a reason to pad (RFC 4884 §5.1); otherwise a stated length is no reason to cut anything: some hosts
/// quote headers that they have already changed.
fn without_padding(parts: Body, stated: usize) -> usize {
    match parts.extension {
        0 => parts.quoted,
        _ => parts.quoted.min(stated),
    }
}

/// Only messages that have a length in both versions carry an extension over.
fn extension_of(error: Error, body: Body) -> usize {
    match error.rest {
        Rest::Unused => body.extension,
        _ => 0,
    }
}

/// The type of a quoted ICMP message, translated. What quotes a packet itself ends here (RFC 7915 §4.3).
fn quoted_kind(
    protocol: u8,
    first: bool,
    transport: &[u8],
    translated: impl Fn(u8) -> Option<u8>,
) -> Result<Option<u8>, DropReason> {
    if !first || !matches!(protocol, protocol::ICMP | protocol::ICMPV6) {
        return Ok(None);
    }
    let kind = transport.first().and_then(|kind| translated(*kind));
    kind.map(Some).ok_or(DropReason::IcmpQuotation)
}

/// ICMPv4 covers no pseudo-header.
fn pseudo_v4(source: Ipv4Addr, destination: Ipv4Addr, length: usize, protocol: u8) -> Sum {
    match protocol {
        protocol::ICMP => Sum::default(),
        protocol => Sum::pseudo_v4(source, destination, length, protocol),
    }
}

/// How an ICMP error is put together again.
struct Splice {
    /// All that comes before the transport header of what is quoted.
    headers: Headers,
    /// Octets of the outer one of them, then.
    outer: usize,
    /// Where the message begins, now.
    at: usize,
    /// Where the quoted transport header begins, now.
    from: usize,
    /// How many octets of it stay.
    kept: usize,
    /// Whether the quoted packet has a transport header, being no later fragment.
    first: bool,
    /// Of the quoted packet, then.
    protocol: u8,
    padding: usize,
    extension: usize,
    change: Change,
    /// The pseudo-header that the message covers, now and then.
    pseudo_from: Sum,
    pseudo_to: Sum,
}

impl Splice {
    /// `None` if there is no room, which [`HEADROOM`](super::HEADROOM) rules out.
    fn into_packet(self, packet: &mut Packet<'_>) -> Option<()> {
        let before = sum_of(packet, self.at, self.pseudo_from)?;
        if self.first {
            let quoted = packet.bytes_mut().get_mut(self.from..)?;
            // The extension may begin where the quoted header was cut off.
            let quoted = quoted.get_mut(..self.kept)?;
            transport::rewrite(quoted, self.protocol, &self.change, false);
        }
        let kept = self.from..self.from + self.kept;
        packet.rebuild(self.headers.as_slice(), kept, self.padding, self.extension)?;
        settle(packet, self.outer, self.pseudo_to, before)
    }
}

/// Sends an ICMPv6 error back to IPv6 with other ends, one hop further.
fn turn_back(
    packet: &mut Packet<'_>,
    ip: &V6,
    inner: &V6,
    answer: &Quotation<Ipv6Addr>,
    pseudo_from: Sum,
    change: Option<Change>,
) -> Option<()> {
    let before = sum_of(packet, ip.header, pseudo_from)?;
    let bytes = packet.bytes_mut();
    readdress(bytes, answer.source, answer.destination);
    *bytes.get_mut(7)? = ip.hop_limit.saturating_sub(1);
    let quoted = bytes.get_mut(ip.header + ICMP_HEADER..)?;
    readdress(quoted, answer.quoted.source, answer.quoted.destination);
    if let Some(change) = change {
        transport::rewrite(quoted.get_mut(inner.header..)?, inner.protocol, &change, false);
    }
    let length = packet.bytes().len().checked_sub(ip.header)?;
    let to = Sum::pseudo_v6(answer.source, answer.destination, length, ip.protocol);
    settle(packet, ip.header, to, before)
}

/// What the message that begins at `at` sums up to with its pseudo-header: ffff if its checksum is right.
fn sum_of(packet: &Packet<'_>, at: usize, pseudo: Sum) -> Option<u16> {
    // What the device was to complete is as good as right.
    if packet.offload.partial {
        return Some(0xffff);
    }
    Some(Sum::of(packet.bytes().get(at..)?).plus(pseudo).folded())
}

/// Gives the message that begins at `at` the checksum with which it sums up to `before` again: right if it was, else as wrong.
fn settle(packet: &mut Packet<'_>, at: usize, pseudo: Sum, before: u16) -> Option<()> {
    packet.offload = super::Offload::default();
    packet.transport = at;
    let message = packet.bytes_mut().get_mut(at..)?;
    set_word(message, 2, 0)?;
    let without = Sum::of(message).plus(pseudo).folded();
    set_word(message, 2, Sum::from(before).plus(Sum::from(!without)).folded())
}
