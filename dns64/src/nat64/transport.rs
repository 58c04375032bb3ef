//! Ports, types and checksums of TCP, UDP and ICMP echo, changed where they lie (RFC 7915 §4.5, §5.5).

use super::{
    DropReason,
    checksum::{self, Sum},
    flow::Ports,
    ip::{protocol, set_word, word},
};

/// Octets of a UDP header.
const UDP_HEADER: usize = 8;

/// What becomes different in a transport header when its packet changes sides.
#[derive(Clone, Copy, Debug)]
pub(super) struct Change {
    /// The pseudo-header that the checksum covers now; nothing for ICMPv4.
    pub(super) from: Sum,
    /// The one that it is to cover.
    pub(super) to: Sum,
    /// The type of ICMP, if it is that.
    pub(super) kind: Option<u8>,
    /// Ports or identifier.
    pub(super) ports: Ports,
}

/// Makes `change` in `transport`, which may be cut short if it is quoted, and its checksum right if it was, else equally
/// wrong. A `partial` checksum is one that the device completes. UDP without a checksum stays so.
pub(super) fn rewrite(transport: &mut [u8], protocol: u8, change: &Change, partial: bool) {
    // All that changes lies in here; the checksum field does, too, or not, but is the same in both sums.
    let head = |transport: &[u8]| Sum::of(transport.get(..8).unwrap_or(transport));
    let before = head(transport);
    if let (Some(kind), Some(first)) = (change.kind, transport.first_mut()) {
        *first = kind;
    }
    change.ports.write(transport);
    let after = head(transport);
    let Some(at) = checksum_at(protocol) else { return };
    let Some(field) = word(transport, at) else { return };
    let field = if partial {
        checksum::updated_partial(field, change.from, change.to)
    } else if protocol == protocol::UDP {
        match field {
            0 => 0,
            field => never_zero(checksum::updated(
                field,
                before.plus(change.from),
                after.plus(change.to),
            )),
        }
    } else {
        match checksum::updated(field, before.plus(change.from), after.plus(change.to)) {
            // Both zeros are one number in this arithmetic, and the difference cannot tell them apart. An echo reply of zeros,
            // which in IPv4 has no pseudo-header, sums up to nothing, of which the complement is ffff (RFC 1071 §4.1).
            0 if protocol == protocol::ICMP && is_all_zero_but(transport, at) => 0xffff,
            field => field,
        }
    };
    set_word(transport, at, field);
}

fn is_all_zero_but(transport: &[u8], checksum: usize) -> bool {
    let counts = |place: usize| !(checksum..checksum + 2).contains(&place);
    transport
        .iter()
        .enumerate()
        .all(|(place, octet)| *octet == 0 || !counts(place))
}

/// Gives a UDP datagram the checksum that it had not, over the pseudo-header that `pseudo` gives for its length. That is its
/// own one: what follows it in the packet is none of its business (RFC 768).
pub(super) fn sum_udp(transport: &mut [u8], pseudo: impl FnOnce(usize) -> Sum) {
    let length = word(transport, 4).map_or(0, usize::from);
    if let Some(datagram) = transport.get_mut(..length) {
        set_word(datagram, 6, 0);
        let checksum = never_zero(Sum::of(datagram).plus(pseudo(length)).checksum());
        set_word(datagram, 6, checksum);
    }
}

/// Completes a partial checksum, as the device would have.
pub(super) fn complete(transport: &mut [u8], protocol: u8) {
    if let Some(at) = checksum_at(protocol) {
        let checksum = match Sum::of(transport).checksum() {
            checksum if protocol == protocol::UDP => never_zero(checksum),
            checksum => checksum,
        };
        set_word(transport, at, checksum);
    }
}

/// Whether the header is whole, as it must be in a packet or its first fragment; ICMP is eight octets whatever its type.
pub(super) fn check(protocol: u8, transport: &[u8]) -> Result<(), DropReason> {
    let whole = match protocol {
        protocol::TCP => header(protocol, transport).is_some_and(|header| (20..=transport.len()).contains(&header)),
        protocol::UDP | protocol::ICMP | protocol::ICMPV6 => transport.len() >= UDP_HEADER,
        _ => true,
    };
    whole.then_some(()).ok_or(DropReason::Malformed)
}

/// Octets of a TCP header with its options, or of a UDP header: what each segment of a longer packet begins with.
pub(super) fn header(protocol: u8, transport: &[u8]) -> Option<usize> {
    match protocol {
        protocol::TCP => Some(usize::from(transport.get(12)? >> 4) * 4),
        protocol::UDP => Some(UDP_HEADER),
        _ => None,
    }
}

/// Whether it is UDP without a checksum.
pub(super) fn is_unsummed(protocol: u8, transport: &[u8]) -> bool {
    protocol == protocol::UDP && word(transport, 6) == Some(0)
}

/// Whether a UDP datagram is all there, as it must be to be summed up.
pub(super) fn is_whole_udp(transport: &[u8]) -> bool {
    word(transport, 4).is_some_and(|length| (UDP_HEADER..=transport.len()).contains(&length.into()))
}

fn checksum_at(protocol: u8) -> Option<usize> {
    match protocol {
        protocol::TCP => Some(16),
        protocol::UDP => Some(6),
        protocol::ICMP | protocol::ICMPV6 => Some(2),
        _ => None,
    }
}

/// In UDP, 0 says that there is no checksum; ffff is the same number (RFC 768).
const fn never_zero(checksum: u16) -> u16 {
    match checksum {
        0 => 0xffff,
        checksum => checksum,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nat64::testing::{Random, reference_sum, tcp, udp};

    #[test]
    fn rfc768_a_computed_zero_is_sent_as_ffff() {
        let mut random = Random::new(5);
        let mut met = 0;
        // A payload of two octets takes every value, so that some sums come to zero.
        for word in 0..=u16::MAX {
            let mut datagram = udp(2);
            datagram[8..].copy_from_slice(&word.to_be_bytes());
            datagram[6..8].copy_from_slice(&(random.next() as u16 | 1).to_be_bytes());
            let from = Sum::of(&datagram).folded();
            let mut summed = datagram.clone();
            sum_udp(&mut summed, |length| {
                assert_eq!(length, 10);
                Sum::default()
            });
            assert_eq!(reference_sum(&summed), 0xffff);
            met += u32::from(summed[6..8] == [0xff, 0xff]);
            let change = Change {
                from: Sum::from(from),
                to: Sum::from(random.next() as u16),
                kind: None,
                ports: Ports::None,
            };
            rewrite(&mut datagram, protocol::UDP, &change, false);
            assert_ne!(datagram[6..8], [0, 0]);
        }
        assert!(met > 0);
    }

    #[test]
    fn a_quotation_cut_anywhere_is_changed_as_far_as_it_goes() {
        let change = Change {
            from: Sum::from(1),
            to: Sum::from(2),
            kind: None,
            ports: Ports::Pair {
                source: 7,
                destination: 9,
            },
        };
        for length in 0..30 {
            let mut segment = tcp(10)[..length].to_vec();
            rewrite(&mut segment, protocol::TCP, &change, false);
            assert_eq!(segment.len(), length);
            if length >= 4 {
                assert_eq!(segment[..4], [0, 7, 0, 9]);
            }
            assert_eq!(length >= 18, segment.get(16..18).is_some_and(|field| field != [0, 0]));
        }
    }

    #[test]
    fn headers_that_are_not_whole_are_malformed() {
        assert_eq!(check(protocol::TCP, &tcp(0)), Ok(()));
        assert_eq!(check(protocol::TCP, &tcp(0)[..19]), Err(DropReason::Malformed));
        let mut segment = tcp(0);
        segment[12] = 0x60;
        assert_eq!(check(protocol::TCP, &segment), Err(DropReason::Malformed));
        segment[12] = 0x40;
        assert_eq!(check(protocol::TCP, &segment), Err(DropReason::Malformed));
        assert_eq!(check(protocol::UDP, &[0; 7]), Err(DropReason::Malformed));
        assert_eq!(check(protocol::ICMPV6, &[0; 8]), Ok(()));
        assert_eq!(check(132, &[]), Ok(()));
    }
}
