//! The header that a TUN device has in front of each packet when it takes part of the work over (virtio 1.2 §5.1.6,
//! `IFF_VNET_HDR`): who finishes the checksum, and how long the segments of a super-packet are to be.
//!
//! ```text
//! device -> Header::parse -> arrive -> Offload -> translation -> depart -> octets -> device
//! ```

use std::num::NonZeroU16;

use super::{
    DropReason, Offload,
    checksum::Sum,
    ip::{V4, protocol, set_word},
};

/// Octets of the header.
pub const LENGTH: usize = 10;

const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// Set beside one of TCP: the congestion marks are spread over the segments as RFC 3168 wants it.
const GSO_ECN: u8 = 0x80;

/// Where the checksum lies in TCP, and in UDP.
const CSUM_TCP: u16 = 16;
const CSUM_UDP: u16 = 6;

/// As the kernel writes and reads it, in the order of octets of this machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    flags: u8,
    kind: u8,
    /// Octets of all headers together; a hint, which forwarded packets often have wrong.
    headers: u16,
    segment: u16,
    /// Where what the checksum covers begins, and how far behind it the checksum lies.
    csum_start: u16,
    csum_offset: u16,
}

impl Header {
    /// The header at the beginning of `octets`; `None` if they are fewer than [`LENGTH`].
    pub fn parse(octets: &[u8]) -> Option<Self> {
        let [flags, kind, rest @ ..] = octets.first_chunk::<LENGTH>()?;
        let (words, _) = rest.as_chunks::<2>();
        let word = |at: usize| words.get(at).map(|word| u16::from_ne_bytes(*word));
        Some(Self {
            flags: *flags,
            kind: *kind,
            headers: word(0)?,
            segment: word(1)?,
            csum_start: word(2)?,
            csum_offset: word(3)?,
        })
    }

    /// The header as the device reads it.
    pub fn octets(self) -> [u8; LENGTH] {
        let mut octets = [0; LENGTH];
        let words = [self.headers, self.segment, self.csum_start, self.csum_offset];
        let all = [self.flags, self.kind]
            .into_iter()
            .chain(words.into_iter().flat_map(u16::to_ne_bytes));
        for (place, octet) in octets.iter_mut().zip(all) {
            *place = octet;
        }
        octets
    }

    /// What is left to do for `packet`, which came with this header. A checksum that the translator would not know of, such
    /// as that of a packet within the packet, is finished here.
    ///
    /// # Errors
    ///
    /// [`DropReason::UnknownOffload`]: segments that only a later kernel knows how to cut.
    pub fn arrive(&self, packet: &mut [u8]) -> Result<Offload, DropReason> {
        let partial = self.flags & NEEDS_CSUM != 0;
        let version = packet.first().map_or(0, |first| first >> 4);
        match (self.kind & !GSO_ECN, version) {
            (0, _) => {
                let partial = partial && {
                    let expected = expected(packet) == Some((self.csum_start, self.csum_offset));
                    if !expected {
                        self.complete(packet).ok_or(DropReason::Malformed)?;
                    }
                    expected
                };
                Ok(Offload { partial, segment: None })
            }
            (GSO_TCPV4, 4) | (GSO_TCPV6, 6) | (GSO_UDP_L4, 4 | 6) if partial => Ok(Offload {
                partial,
                segment: Some(NonZeroU16::new(self.segment).ok_or(DropReason::Malformed)?),
            }),
            _ => Err(DropReason::UnknownOffload),
        }
    }

    /// The header for `packet`, which was made of the one that came with this header: its transport header begins at
    /// `transport`, and `offload` is left to do.
    pub fn depart(&self, packet: &[u8], transport: usize, offload: Offload) -> Self {
        if !offload.partial {
            return Self::default();
        }
        let whole = Self {
            flags: NEEDS_CSUM,
            csum_start: u16::try_from(transport).unwrap_or(u16::MAX),
            csum_offset: self.csum_offset,
            ..Self::default()
        };
        let Some(segment) = offload.segment else { return whole };
        let of_transport = match self.csum_offset {
            CSUM_TCP => packet
                .get(transport + 12)
                .map_or(20, |octet| usize::from(octet >> 4) * 4),
            _ => 8,
        };
        let kind = match (self.kind & !GSO_ECN, packet.first().map(|first| first >> 4)) {
            (GSO_UDP_L4, _) => GSO_UDP_L4,
            (_, Some(4)) => GSO_TCPV4,
            _ => GSO_TCPV6,
        };
        Self {
            kind: kind | self.kind & GSO_ECN,
            headers: u16::try_from(transport + of_transport).unwrap_or(u16::MAX),
            segment: segment.get(),
            ..whole
        }
    }

    /// Finishes the checksum as the device would have.
    fn complete(&self, packet: &mut [u8]) -> Option<()> {
        let covered = packet.get_mut(usize::from(self.csum_start)..)?;
        let sum = Sum::of(covered).checksum();
        let field = covered.get_mut(usize::from(self.csum_offset)..)?.first_chunk_mut()?;
        // In UDP zero would say that there is none (RFC 768).
        let sum = if sum == 0 && self.csum_offset == CSUM_UDP {
            0xffff
        } else {
            sum
        };
        *field = sum.to_be_bytes();
        Some(())
    }
}

/// Writes the datagram with this `number`, from 0, of a UDP super-packet over IPv4 to `out`, as a packet of its own that leaves
/// nothing to do; its length. `None` behind the last one, and of what is no such packet.
pub fn datagram(packet: &[u8], offload: Offload, number: usize, out: &mut [u8]) -> Option<usize> {
    let ip = V4::parse(packet)?;
    let (header, transport) = packet.split_at_checked(ip.header)?;
    let (ports, payload) = (transport.get(..4)?, transport.get(8..)?);
    if ip.protocol != protocol::UDP || ip.fragment().is_some() {
        return None;
    }
    let chunk = payload.chunks(offload.segment?.get().into()).nth(number)?;
    let udp = u16::try_from(8 + chunk.len()).ok()?;
    let length = ip.header + usize::from(udp);
    let (front, rest) = out.get_mut(..length)?.split_at_mut_checked(ip.header)?;
    front.copy_from_slice(header);
    set_word(front, 2, u16::try_from(length).ok()?)?;
    set_word(front, 4, ip.id.wrapping_add(u16::try_from(number).ok()?))?;
    set_word(front, 10, 0)?;
    set_word(front, 10, Sum::of(front).checksum())?;
    rest.get_mut(..4)?.copy_from_slice(ports);
    set_word(rest, 4, udp)?;
    set_word(rest, 6, 0)?;
    rest.get_mut(8..)?.copy_from_slice(chunk);
    let pseudo = Sum::pseudo_v4(ip.source, ip.destination, rest.len(), protocol::UDP);
    let sum = Sum::of(rest).plus(pseudo).checksum();
    set_word(rest, 6, if sum == 0 { 0xffff } else { sum })?;
    Some(length)
}

/// Where the checksum of a TCP or UDP packet without extension headers lies.
fn expected(packet: &[u8]) -> Option<(u16, u16)> {
    let first = *packet.first()?;
    let (start, next) = match first >> 4 {
        4 => (u16::from(first & 15) * 4, *packet.get(9)?),
        _ => (40, *packet.get(6)?),
    };
    match next {
        protocol::TCP => Some((start, CSUM_TCP)),
        protocol::UDP => Some((start, CSUM_UDP)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(flags: u8, kind: u8, segment: u16, csum_start: u16, csum_offset: u16) -> Header {
        Header {
            flags,
            kind,
            headers: 0,
            segment,
            csum_start,
            csum_offset,
        }
    }

    /// The first octets of an IPv4 or IPv6 header, then 40 octets of transport with a data offset of 8 words.
    fn packet(version: u8, protocol: u8) -> Vec<u8> {
        let (mut packet, start) = match version {
            4 => (vec![0; 60], 20),
            _ => (vec![0; 80], 40),
        };
        packet[0] = if version == 4 { 0x45 } else { 0x60 };
        packet[if version == 4 { 9 } else { 6 }] = protocol;
        packet[start + 12] = 0x80;
        packet
    }

    #[test]
    fn a_header_comes_back_as_it_went() {
        let octets = [1, 0x81, 1, 2, 3, 4, 5, 6, 7, 8];
        let parsed = Header::parse(&octets).expect("long enough");
        assert_eq!(parsed.octets(), octets);
        assert_eq!(parsed.segment, u16::from_ne_bytes([3, 4]));
        assert_eq!(Header::parse(&octets[..9]), None);
        assert_eq!(Header::default().octets(), [0; LENGTH]);
    }

    #[test]
    fn super_packets_change_their_kind_with_their_version_and_keep_the_mark_of_ecn() {
        for (version, protocol, kind, offset, other, expected_kind, headers) in [
            (6, 6, GSO_TCPV6, CSUM_TCP, 4, GSO_TCPV4, 52),
            (4, 6, GSO_TCPV4, CSUM_TCP, 6, GSO_TCPV6, 72),
            (6, 6, GSO_TCPV6 | GSO_ECN, CSUM_TCP, 4, GSO_TCPV4 | GSO_ECN, 52),
            (4, 6, GSO_TCPV4 | GSO_ECN, CSUM_TCP, 6, GSO_TCPV6 | GSO_ECN, 72),
            (6, 17, GSO_UDP_L4, CSUM_UDP, 4, GSO_UDP_L4, 28),
            (4, 17, GSO_UDP_L4, CSUM_UDP, 6, GSO_UDP_L4, 48),
            // Back to where it came from.
            (6, 6, GSO_TCPV6, CSUM_TCP, 6, GSO_TCPV6, 72),
        ] {
            let start = if version == 4 { 20 } else { 40 };
            let came = header(NEEDS_CSUM, kind, 1400, start, offset);
            let offload = came.arrive(&mut packet(version, protocol)).expect("known");
            assert_eq!(offload.segment, NonZeroU16::new(1400));
            assert!(offload.partial);
            let lower = Offload {
                segment: NonZeroU16::new(1380),
                ..offload
            };
            let transport = if other == 4 { 20 } else { 40 };
            let goes = came.depart(&packet(other, protocol), usize::from(transport), lower);
            let mut wanted = header(NEEDS_CSUM, expected_kind, 1380, transport, offset);
            wanted.headers = headers;
            assert_eq!(goes, wanted, "{kind} from {version} to {other}");
        }
    }

    #[test]
    fn what_is_whole_needs_no_header() {
        let came = header(NEEDS_CSUM, 0, 0, 40, CSUM_UDP);
        assert_eq!(came.depart(&packet(4, 17), 20, Offload::default()), Header::default());
        let offload = came.arrive(&mut packet(6, 17)).expect("known");
        assert_eq!(
            offload,
            Offload {
                partial: true,
                segment: None
            }
        );
        assert_eq!(
            came.depart(&packet(4, 17), 20, offload),
            header(NEEDS_CSUM, 0, 0, 20, CSUM_UDP)
        );
        let summed = header(0, 0, 0, 0, 0);
        assert_eq!(summed.arrive(&mut packet(4, 6)), Ok(Offload::default()));
    }

    #[test]
    fn segments_that_nobody_here_can_cut_are_refused() {
        for (version, flags, kind) in [
            // UDP fragmentation, tunnels, the wrong version, and segments without a checksum to be finished.
            (4, NEEDS_CSUM, 3),
            (4, NEEDS_CSUM, 0x41),
            (4, NEEDS_CSUM, GSO_TCPV6),
            (6, NEEDS_CSUM, GSO_TCPV4),
            (0, NEEDS_CSUM, GSO_UDP_L4),
            (6, 0, GSO_TCPV6),
        ] {
            let came = header(flags, kind, 1400, 40, CSUM_TCP);
            let mut packet = packet(if version == 4 { 4 } else { 6 }, 6);
            packet[0] = version << 4 | packet[0] & 15;
            assert_eq!(came.arrive(&mut packet), Err(DropReason::UnknownOffload), "{kind}");
        }
        let endless = header(NEEDS_CSUM, GSO_TCPV6, 0, 40, CSUM_TCP);
        assert_eq!(endless.arrive(&mut packet(6, 6)), Err(DropReason::Malformed));
    }

    #[test]
    fn a_checksum_within_a_tunnel_is_finished_here() {
        // UDP over IPv4 within IPv6: the pseudo-header's sum lies in the inner checksum field.
        let mut tunnelled = packet(6, 4);
        let inner = header(NEEDS_CSUM, 0, 0, 60, CSUM_UDP);
        tunnelled[66..68].copy_from_slice(&[0x12, 0x34]);
        tunnelled[70] = 0x55;
        let offload = inner.arrive(&mut tunnelled).expect("finished");
        assert_eq!(offload, Offload::default());
        // 0x1234 and 0x5500, complemented.
        assert_eq!(tunnelled[66..68], [0x98, 0xcb]);
        let outside = header(NEEDS_CSUM, 0, 0, 80, CSUM_UDP);
        assert_eq!(outside.arrive(&mut tunnelled), Err(DropReason::Malformed));
    }
}
