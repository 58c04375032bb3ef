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

/// Lowers the Maximum Segment Size that a SYN names to `most` octets, and keeps its checksum as right or wrong as it was; a
/// `partial` one covers none of this yet. Options that cannot be read stay as they are (RFC 9293 §3.2).
pub(super) fn clamp_mss(segment: &mut [u8], most: u16, partial: bool) {
    const SYN: u8 = 0x02;
    if segment.get(13).is_none_or(|flags| flags & SYN == 0) {
        return;
    }
    let Some(header) = header(protocol::TCP, segment) else {
        return;
    };
    let Some(at) = segment.get(..header).and_then(find_mss) else {
        return;
    };
    match word(segment, at) {
        Some(named) if named > most => {}
        _ => return,
    }
    // It may lie across two words of the sum: those of the whole header count.
    let head = |segment: &[u8]| Sum::of(segment.get(..header).unwrap_or_default());
    let before = head(segment);
    set_word(segment, at, most);
    let after = head(segment);
    if !partial && let Some(field) = word(segment, 16) {
        set_word(segment, 16, checksum::updated(field, before, after));
    }
}

/// Where the number of the option Maximum Segment Size begins; `None` if there is none, or the options before it are not
/// what they say.
fn find_mss(header: &[u8]) -> Option<usize> {
    let mut at = 20;
    loop {
        match *header.get(at..)? {
            [1, ..] => at += 1,
            [2, 4, _, _, ..] => return Some(at + 2),
            [0 | 2, ..] => return None,
            [_, length, ..] if length >= 2 => at += usize::from(length),
            _ => return None,
        }
    }
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

    /// SYN, with options in front of a payload, and any numbers and checksum.
    fn syn(options: &[u8], payload: usize, random: &mut Random) -> Vec<u8> {
        let mut segment = tcp(0);
        segment[13] = 0x02 | random.octet() & 0x10;
        segment.extend(options);
        segment.resize(segment.len().next_multiple_of(4), 0);
        segment[12] = (segment.len() as u8 / 4) << 4;
        segment[4..12].copy_from_slice(&random.bytes(8));
        segment[16..18].copy_from_slice(&random.bytes(2));
        segment.extend(random.bytes(payload));
        segment
    }

    #[test]
    fn rfc2923_section_2_1_a_segment_size_is_lowered_wherever_it_stands_and_never_raised() {
        let mut random = Random::new(6);
        for (options, at) in [
            (&[2, 4, 0x05, 0xb4][..], 22),
            (&[1, 2, 4, 0x05, 0xb4, 1, 1, 0], 23),
            (&[3, 3, 7, 2, 4, 0x05, 0xb4, 0], 25),
            (&[4, 2, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 2, 4, 0x05, 0xb4], 34),
        ] {
            for (most, expected) in [(1440, 1440), (1459, 1459), (1460, 1460), (9000, 1460), (28, 28)] {
                let sent = syn(options, 3, &mut random);
                let mut got = sent.clone();
                clamp_mss(&mut got, most, false);
                assert_eq!(word(&got, at), Some(expected));
                // As right or wrong as before, and nothing else is different.
                assert_eq!(reference_sum(&got) % 0xffff, reference_sum(&sent) % 0xffff);
                let mut rest = got.clone();
                rest[at..at + 2].copy_from_slice(&sent[at..at + 2]);
                rest[16..18].copy_from_slice(&sent[16..18]);
                assert_eq!(rest, sent);
                // The device sums up what it finds.
                let mut unfinished = sent.clone();
                clamp_mss(&mut unfinished, most, true);
                assert_eq!(unfinished[16..18], sent[16..18]);
                assert_eq!(unfinished[at..], got[at..]);
            }
        }
    }

    #[test]
    fn options_that_cannot_be_read_and_segments_without_syn_stay_as_they_are() {
        let mut random = Random::new(7);
        for options in [
            &[][..],
            &[0, 2, 4, 0xff, 0xff],
            &[2, 3, 0xff, 0xff],
            &[2, 5, 0xff, 0xff, 0xff],
            &[8, 0, 2, 4, 0xff, 0xff],
            &[8, 1, 2, 4, 0xff, 0xff],
            &[8, 200, 2, 4, 0xff, 0xff],
            &[1, 2, 4, 0xff],
            &[1, 1, 1, 2],
            &[1, 1, 1, 8],
        ] {
            let sent = syn(options, 0, &mut random);
            let mut got = sent.clone();
            clamp_mss(&mut got, 500, false);
            assert_eq!(got, sent, "{options:?}");
        }
        let mut established = syn(&[2, 4, 0xff, 0xff], 9, &mut random);
        established[13] = 0x10;
        let sent = established.clone();
        clamp_mss(&mut established, 500, false);
        assert_eq!(established, sent);
        for _ in 0..100_000 {
            let length = random.below(64);
            let mut bytes = random.bytes(length);
            let sent = bytes.clone();
            clamp_mss(&mut bytes, 500, false);
            assert_eq!(bytes.len(), length);
            // The header ends where its length says, which may be within the payload, but never further.
            let header = sent.get(12).map_or(0, |octet| usize::from(octet >> 4) * 4).min(length);
            assert_eq!(bytes[header..], sent[header..]);
        }
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
