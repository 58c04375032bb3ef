//! The internet checksum (RFC 1071) and its change by difference (RFC 1624), which keeps a wrong checksum equally wrong.
//!
//! A [`Sum`] is what the checksum field is the complement of: octets taken as 16-bit words and added in ones' complement.

use std::net::{Ipv4Addr, Ipv6Addr};

/// A ones' complement sum of 16-bit words. 64 bits hold that of half a gigabyte before anything is lost.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sum(u64);

impl Sum {
    /// Of `bytes`, as if a zero octet followed when their number is odd.
    pub(super) fn of(bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<4>();
        // A 32-bit word counts as its two halves: 2^16 is 1 in this arithmetic.
        let sum: u64 = words.iter().map(|word| u64::from(u32::from_be_bytes(*word))).sum();
        let mut last = [0; 4];
        for (place, octet) in last.iter_mut().zip(rest) {
            *place = *octet;
        }
        Self(sum).plus(Self(u32::from_be_bytes(last).into()))
    }

    /// Of the pseudo-header of `length` octets of TCP or UDP over IPv4 (RFC 9293 §3.1, RFC 768). ICMPv4 has none.
    pub(super) fn pseudo_v4(source: Ipv4Addr, destination: Ipv4Addr, length: usize, protocol: u8) -> Self {
        Self::of(&source.octets())
            .plus(Self::of(&destination.octets()))
            .plus(Self::upper(length, protocol))
    }

    /// Of the pseudo-header of `length` octets of any protocol over IPv6 (RFC 8200 §8.1).
    pub(super) fn pseudo_v6(source: Ipv6Addr, destination: Ipv6Addr, length: usize, protocol: u8) -> Self {
        Self::of(&source.octets())
            .plus(Self::of(&destination.octets()))
            .plus(Self::upper(length, protocol))
    }

    /// Packets are shorter than 2^32, so that one addition holds the 32-bit length of IPv6 and the 16-bit one of IPv4 alike.
    fn upper(length: usize, protocol: u8) -> Self {
        Self(u64::from(u32::try_from(length).unwrap_or(u32::MAX)) + u64::from(protocol))
    }

    /// Both together. The first must have had an even number of octets, or been the last.
    pub(super) const fn plus(self, other: Self) -> Self {
        Self(self.0.wrapping_add(other.0))
    }

    /// In 16 bits, end-around carries added.
    pub(super) fn folded(self) -> u16 {
        let mut sum = self.0;
        while let Some(carry) = std::num::NonZeroU64::new(sum >> 16) {
            sum = (sum & 0xffff) + carry.get();
        }
        u16::try_from(sum).unwrap_or(u16::MAX)
    }

    /// What to write into a zeroed field so that the whole sums up to ffff.
    pub(super) fn checksum(self) -> u16 {
        !self.folded()
    }
}

impl From<u16> for Sum {
    fn from(word: u16) -> Self {
        Self(word.into())
    }
}

/// The checksum that was `field` when what it covers summed up to `old`, now that it sums up to `new`: RFC 1624 §3,
/// equation 3.
pub(super) fn updated(field: u16, old: Sum, new: Sum) -> u16 {
    Sum::from(!field)
        .plus(Sum::from(!old.folded()))
        .plus(Sum::from(new.folded()))
        .checksum()
}

/// The same for a field that whoever sends the packet on will complete, which holds the sum of the pseudo-header itself
/// and not its complement (`VIRTIO_NET_HDR_F_NEEDS_CSUM`).
pub(super) fn updated_partial(field: u16, old: Sum, new: Sum) -> u16 {
    Sum::from(field)
        .plus(Sum::from(!old.folded()))
        .plus(Sum::from(new.folded()))
        .folded()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nat64::testing::{Random, reference_sum};

    #[test]
    fn rfc1071_section_3_example() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::of(&bytes).folded(), 0xddf2);
        assert_eq!(Sum::of(&bytes).checksum(), 0x220d);
    }

    #[test]
    fn rfc1624_section_4_example() {
        // A word went from 5555 to 3285 under checksum dd2f; equation 2 would have given ffff.
        assert_eq!(updated(0xdd2f, Sum::from(0x5555), Sum::from(0x3285)), 0x0000);
    }

    #[test]
    fn sums_agree_with_the_reference_at_every_length() {
        let mut random = Random::new(1);
        for length in 0..300 {
            let bytes = random.bytes(length);
            assert_eq!(Sum::of(&bytes).folded(), reference_sum(&bytes), "{length}");
        }
        assert_eq!(Sum::of(&[0xff; 65_535]).folded(), reference_sum(&[0xff; 65_535]));
    }

    #[test]
    fn a_difference_gives_what_a_whole_sum_gives() {
        let mut random = Random::new(2);
        for _ in 0..2000 {
            let mut bytes = random.bytes(64);
            let before = Sum::of(&bytes).checksum();
            let old = Sum::of(&bytes[8..24]);
            let fresh = random.bytes(16);
            bytes[8..24].copy_from_slice(&fresh);
            assert_eq!(updated(before, old, Sum::of(&fresh)), Sum::of(&bytes).checksum());
        }
    }

    #[test]
    fn an_unfinished_checksum_becomes_right_when_it_is_finished() {
        let mut random = Random::new(3);
        for _ in 0..2000 {
            let (old, new, payload) = (random.bytes(12), random.bytes(36), random.bytes(40));
            let field = updated_partial(Sum::of(&old).folded(), Sum::of(&old), Sum::of(&new));
            let finished = Sum::from(field).plus(Sum::of(&payload)).checksum();
            assert_eq!(finished, Sum::of(&new).plus(Sum::of(&payload)).checksum());
        }
    }
}
