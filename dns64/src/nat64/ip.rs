//! Views of IPv4 and IPv6 headers that hold for any bytes, and the same headers written.
//!
//! A view is of numbers, not of the bytes they came from, so that these may be written over. It takes a packet that was cut
//! short, since ICMP errors quote such: what a header says of lengths is compared with reality by who knows that it should.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{DropReason, checksum::Sum, packet::Headers};

/// Protocol numbers that translation knows (IANA).
pub(super) mod protocol {
    pub(crate) const HOP_BY_HOP: u8 = 0;
    pub(crate) const ICMP: u8 = 1;
    pub(crate) const TCP: u8 = 6;
    pub(crate) const UDP: u8 = 17;
    pub(crate) const ROUTING: u8 = 43;
    pub(crate) const FRAGMENT: u8 = 44;
    pub(crate) const ICMPV6: u8 = 58;
    pub(crate) const DESTINATION: u8 = 60;
}

/// Extension headers that are skipped at most; a packet with more has another purpose than to arrive (RFC 8504 §5.3).
const MOST_EXTENSIONS: usize = 8;

/// An IPv4 header (RFC 791 §3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct V4 {
    pub(super) class: u8,
    /// Octets of the whole packet, as stated.
    pub(super) total: u16,
    pub(super) id: u16,
    pub(super) dont_fragment: bool,
    pub(super) more: bool,
    /// Octets; a multiple of 8.
    pub(super) offset: u16,
    pub(super) ttl: u8,
    pub(super) protocol: u8,
    pub(super) source: Ipv4Addr,
    pub(super) destination: Ipv4Addr,
    /// Octets of the header, options included.
    pub(super) header: usize,
}

impl V4 {
    /// `None` unless the whole header is there, and its lengths hold it.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let fixed = bytes.first_chunk::<20>()?;
        let header = usize::from(fixed[0] & 0x0f) * 4;
        let total = u16::from_be_bytes([fixed[2], fixed[3]]);
        if fixed[0] >> 4 != 4 || header < 20 || bytes.len() < header || usize::from(total) < header {
            return None;
        }
        let flags = u16::from_be_bytes([fixed[6], fixed[7]]);
        Some(Self {
            class: fixed[1],
            total,
            id: u16::from_be_bytes([fixed[4], fixed[5]]),
            dont_fragment: flags & 0x4000 != 0,
            more: flags & 0x2000 != 0,
            offset: (flags & 0x1fff) << 3,
            ttl: fixed[8],
            protocol: fixed[9],
            source: Ipv4Addr::new(fixed[12], fixed[13], fixed[14], fixed[15]),
            destination: Ipv4Addr::new(fixed[16], fixed[17], fixed[18], fixed[19]),
            header,
        })
    }

    /// The fragment that it is, if it is one.
    pub(super) fn fragment(&self) -> Option<Fragment> {
        (self.more || self.offset > 0).then_some(Fragment {
            id: self.id.into(),
            offset: self.offset,
            more: self.more,
        })
    }

    /// Octets behind the header, as stated.
    pub(super) fn payload(&self) -> usize {
        usize::from(self.total).saturating_sub(self.header)
    }

    /// Without options, with the right checksum.
    pub(super) fn octets(&self) -> [u8; 20] {
        let flags = u16::from(self.dont_fragment) << 14 | u16::from(self.more) << 13 | self.offset >> 3;
        let ([t0, t1], [i0, i1], [f0, f1]) = (self.total.to_be_bytes(), self.id.to_be_bytes(), flags.to_be_bytes());
        let [s0, s1, s2, s3] = self.source.octets();
        let [d0, d1, d2, d3] = self.destination.octets();
        let mut octets = [
            0x45,
            self.class,
            t0,
            t1,
            i0,
            i1,
            f0,
            f1,
            self.ttl,
            self.protocol,
            0,
            0,
            s0,
            s1,
            s2,
            s3,
            d0,
            d1,
            d2,
            d3,
        ];
        [octets[10], octets[11]] = Sum::of(&octets).checksum().to_be_bytes();
        octets
    }
}

/// The header of an IPv4 packet that is all there, whatever a link layer added behind it, and whose checksum is right.
pub(super) fn checked_v4(bytes: &[u8]) -> Result<V4, DropReason> {
    let ip = V4::parse(bytes).ok_or(DropReason::Malformed)?;
    let header = bytes.get(..ip.header).ok_or(DropReason::Malformed)?;
    if bytes.len() < usize::from(ip.total) {
        return Err(DropReason::Malformed);
    }
    // No packet is longer than its length can say (RFC 791 §3.1).
    if usize::from(ip.offset) + usize::from(ip.total) > usize::from(u16::MAX) {
        return Err(DropReason::FragmentEnd);
    }
    match Sum::of(header).folded() {
        0xffff => Ok(ip),
        _ => Err(DropReason::HeaderChecksum),
    }
}

/// The same for IPv6, which has no checksum of its own.
pub(super) fn checked_v6(bytes: &[u8]) -> Result<V6, DropReason> {
    let payload = word(bytes, 4).ok_or(DropReason::Malformed)?;
    let whole = bytes.get(..40 + usize::from(payload)).ok_or(DropReason::Malformed)?;
    let ip = V6::parse(whole).ok_or(DropReason::Malformed)?;
    let offset = ip.fragment.map_or(0, |fragment| usize::from(fragment.offset));
    match offset + ip.transport() > usize::from(u16::MAX) {
        true => Err(DropReason::FragmentEnd),
        false => Ok(ip),
    }
}

/// Whether the options in the first `header` octets of `bytes` hold a source route that has not come to its end: a loose or
/// a strict one whose pointer lies within it (RFC 791 §3.1).
pub(super) fn has_source_route(bytes: &[u8], header: usize) -> bool {
    let mut options = bytes.get(20..header).unwrap_or_default();
    while let [kind, rest @ ..] = options {
        match (kind, rest) {
            (0, _) => return false,
            (1, _) => options = rest,
            (131 | 137, [length, pointer, ..]) if pointer <= length => return true,
            (_, [length, ..]) if *length >= 2 => options = options.get(usize::from(*length)..).unwrap_or_default(),
            _ => return false,
        }
    }
    false
}

/// Where a fragment lies in its packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Identification: 16 bits of IPv4, 32 of IPv6.
    pub id: u32,
    /// Octets of the packet before it; a multiple of 8.
    pub offset: u16,
    /// Whether others follow.
    pub more: bool,
}

impl Fragment {
    /// Whether it is all of its packet after all, in spite of the header (RFC 6946).
    pub(super) fn is_atomic(&self) -> bool {
        self.offset == 0 && !self.more
    }
}

/// An IPv6 header, with what matters of its extension headers (RFC 8200 §3, §4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct V6 {
    pub(super) class: u8,
    /// Octets behind the fixed header, as stated.
    pub(super) payload: u16,
    pub(super) hop_limit: u8,
    pub(super) source: Ipv6Addr,
    pub(super) destination: Ipv6Addr,
    /// Of the Fragment header, if there is one.
    pub(super) fragment: Option<Fragment>,
    /// What follows the extension headers.
    pub(super) protocol: u8,
    /// Octets of all headers before that.
    pub(super) header: usize,
    /// Why it cannot be translated, if so.
    pub(super) obstacle: Option<Obstacle>,
}

/// An extension header that IPv4 has nothing for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Obstacle {
    /// A routing header that is not at its end; where its number of segments left lies, in octets from the first.
    SegmentsLeft(u16),
    /// An extension header behind the Fragment header.
    AfterFragment,
}

impl V6 {
    /// `None` unless all headers are there, in a number that makes sense.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let fixed = bytes.first_chunk::<40>()?;
        if fixed[0] >> 4 != 6 {
            return None;
        }
        let mut ip = Self {
            class: fixed[0] << 4 | fixed[1] >> 4,
            payload: u16::from_be_bytes([fixed[4], fixed[5]]),
            hop_limit: fixed[7],
            source: address(fixed.get(8..24)?)?,
            destination: address(fixed.get(24..40)?)?,
            fragment: None,
            protocol: fixed[6],
            header: 40,
            obstacle: None,
        };
        for _ in 0..=MOST_EXTENSIONS {
            if !Self::is_extension(ip.protocol) {
                return (usize::from(ip.payload) + 40 >= ip.header).then_some(ip);
            }
            if ip.fragment.is_some() {
                ip.obstacle.get_or_insert(Obstacle::AfterFragment);
                // What it says of itself is of no use in a fragment other than the first.
                if ip.fragment.is_some_and(|fragment| fragment.offset > 0) {
                    return Some(ip);
                }
            }
            let extension = bytes.get(ip.header..)?;
            let [next, length, third, fourth, ..] = *extension.first_chunk::<8>()?;
            if ip.protocol == ROUTING && fourth != 0 {
                let pointer = u16::try_from(ip.header + 3).ok()?;
                ip.obstacle.get_or_insert(Obstacle::SegmentsLeft(pointer));
            }
            let octets = if ip.protocol == FRAGMENT {
                let flags = u16::from_be_bytes([third, fourth]);
                let fragment = Fragment {
                    id: u32::from_be_bytes(*extension.get(4..8)?.first_chunk()?),
                    offset: flags & !7,
                    more: flags & 1 != 0,
                };
                // Of a fragment of a fragment, nobody knows the end of which packet it may be.
                if ip.fragment.is_none() || fragment.offset > 0 {
                    ip.fragment = Some(fragment);
                }
                8
            } else {
                8 + usize::from(length) * 8
            };
            ip.header += octets;
            ip.protocol = next;
            if ip.header > bytes.len() {
                return None;
            }
        }
        None
    }

    /// Whether a header of this kind is an extension of IPv6's own, behind which there is another.
    pub(super) const fn is_extension(next: u8) -> bool {
        matches!(next, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION)
    }

    /// Octets behind all headers, as stated.
    pub(super) fn transport(&self) -> usize {
        (usize::from(self.payload) + 40).saturating_sub(self.header)
    }

    /// With a Fragment header if it has one, and no other; flow label 0 (RFC 7915 §4.1).
    pub(super) fn headers(&self) -> Headers {
        let next = self.fragment.map_or(self.protocol, |_| FRAGMENT);
        let [p0, p1] = self.payload.to_be_bytes();
        let fixed = [
            0x60 | self.class >> 4,
            self.class << 4,
            0,
            0,
            p0,
            p1,
            next,
            self.hop_limit,
        ];
        let headers = Headers::new()
            .then(&fixed)
            .then(&self.source.octets())
            .then(&self.destination.octets());
        let Some(fragment) = self.fragment else {
            return headers;
        };
        let [o0, o1] = (fragment.offset | u16::from(fragment.more)).to_be_bytes();
        headers
            .then(&[self.protocol, 0, o0, o1])
            .then(&fragment.id.to_be_bytes())
    }
}

use protocol::{DESTINATION, FRAGMENT, HOP_BY_HOP, ROUTING};

fn address(octets: &[u8]) -> Option<Ipv6Addr> {
    octets.first_chunk::<16>().map(|octets| Ipv6Addr::from(*octets))
}

/// The 16-bit number at `at`.
pub(super) fn word(bytes: &[u8], at: usize) -> Option<u16> {
    let octets = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_be_bytes(*octets))
}

/// Writes a 16-bit number at `at`, if there is room.
pub(super) fn set_word(bytes: &mut [u8], at: usize, word: u16) -> Option<()> {
    *bytes.get_mut(at..)?.first_chunk_mut()? = word.to_be_bytes();
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nat64::testing::{Random, fragment, udp, v4, v6};

    const A: &str = "2001:db8::1";
    const B: &str = "2001:db8::2";

    #[test]
    fn an_ipv4_header_is_read_as_it_is_written() {
        let packet = v4("192.0.2.1", "198.51.100.2", 17, &udp(5));
        let ip = V4::parse(&packet).expect("a header");
        assert_eq!((ip.total, ip.header, ip.protocol, ip.dont_fragment), (33, 20, 17, true));
        assert_eq!(ip.octets(), packet[..20]);
        let ip = V4 {
            class: 0xb9,
            id: 0x1234,
            dont_fragment: false,
            more: true,
            offset: 65_528,
            ..ip
        };
        assert_eq!(V4::parse(&ip.octets()), Some(ip), "a quotation may end with the header");
    }

    #[test]
    fn an_ipv4_header_that_is_not_whole_is_none() {
        let packet = v4("192.0.2.1", "198.51.100.2", 17, &udp(5));
        for length in 0..20 {
            assert_eq!(V4::parse(&packet[..length]), None);
        }
        for (at, octet) in [(0, 0x44), (0, 0x4f), (0, 0x65), (3, 19)] {
            let mut packet = packet.clone();
            packet[at] = octet;
            assert_eq!(V4::parse(&packet), None, "{at} {octet:x}");
        }
    }

    #[test]
    fn a_source_route_counts_until_its_pointer_is_past_its_end() {
        for (options, expected) in [
            (&[131_u8, 7, 4, 192, 0, 2, 1, 0][..], true),
            (&[137, 7, 4, 192, 0, 2, 1, 0], true),
            (&[131, 7, 8, 192, 0, 2, 1, 0], false),
            (&[1, 1, 1, 137, 7, 4, 192, 0, 2, 1, 0, 0], true),
            (&[68, 4, 5, 0, 131, 7, 4, 192, 0, 2, 1, 0], true),
            (&[0, 131, 7, 4, 192, 0, 2, 1], false),
            (&[7, 0, 131, 7, 4, 0, 0, 0], false),
            (&[7, 200, 131, 7], false),
            (&[131], false),
        ] {
            let mut packet = vec![0; 20];
            packet.extend(options);
            assert_eq!(has_source_route(&packet, packet.len()), expected, "{options:?}");
        }
    }

    #[test]
    fn extension_headers_before_the_fragment_are_skipped() {
        let mut payload = vec![60, 0, 0, 0, 0, 0, 0, 0];
        payload.extend([43, 1, 1, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        payload.extend([44, 0, 0, 0, 0, 0, 0, 0]);
        payload.extend(fragment(17, 0x0102_0304, 1480, true, &udp(4)));
        let packet = v6(A, B, 0, &payload);
        let ip = V6::parse(&packet).expect("headers");
        assert_eq!(
            (ip.protocol, ip.header, ip.transport(), ip.obstacle),
            (17, 80, 12, None)
        );
        assert_eq!(
            ip.fragment,
            Some(Fragment {
                id: 0x0102_0304,
                offset: 1480,
                more: true
            })
        );
        assert_eq!(
            ip.headers().as_slice()[40..],
            fragment(17, 0x0102_0304, 1480, true, &[])
        );
    }

    #[test]
    fn what_cannot_be_skipped_is_an_obstacle_and_its_place_is_known() {
        let mut payload = vec![43, 0, 0, 0, 0, 0, 0, 0];
        payload.extend([17, 0, 0, 2, 0, 0, 0, 0]);
        payload.extend(udp(0));
        let ip = V6::parse(&v6(A, B, 60, &payload)).expect("headers");
        assert_eq!((ip.obstacle, ip.protocol), (Some(Obstacle::SegmentsLeft(51)), 17));

        let late = fragment(60, 1, 0, true, &[17, 0, 0, 0, 0, 0, 0, 0, 1, 2]);
        let ip = V6::parse(&v6(A, B, 44, &late)).expect("headers");
        assert_eq!((ip.obstacle, ip.protocol), (Some(Obstacle::AfterFragment), 17));
    }

    #[test]
    fn headers_that_are_cut_short_or_too_many_are_none() {
        let payload: Vec<u8> = [60, 0, 0, 0, 0, 0, 0, 0].repeat(MOST_EXTENSIONS);
        let mut few = payload.clone();
        few[8 * (MOST_EXTENSIONS - 1)] = 17;
        few.extend(udp(0));
        assert!(V6::parse(&v6(A, B, 60, &few)).is_some());
        let mut many = [60, 0, 0, 0, 0, 0, 0, 0].to_vec();
        many.extend(&few);
        assert_eq!(V6::parse(&v6(A, B, 60, &many)), None);
        let packet = v6(A, B, 60, &few);
        for length in 0..40 + 8 * MOST_EXTENSIONS {
            assert_eq!(V6::parse(&packet[..length]), None, "{length}");
        }
    }

    #[test]
    fn any_bytes_are_a_header_or_none() {
        let mut random = Random::new(4);
        for _ in 0..100_000 {
            let length = random.below(120);
            let mut bytes = random.bytes(length);
            for version in [0x40, 0x60] {
                if let Some(first) = bytes.first_mut() {
                    *first = version | *first & 0x0f;
                }
                if let Some(ip) = V4::parse(&bytes) {
                    has_source_route(&bytes, ip.header);
                    assert!(ip.header <= bytes.len());
                }
                if let Some(place) = bytes.get_mut(6) {
                    *place = [0, 43, 44, 60, 17][usize::from(*place) % 5];
                }
                if let Some(ip) = V6::parse(&bytes) {
                    assert!(ip.header <= bytes.len());
                }
            }
        }
    }
}
