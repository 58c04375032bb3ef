//! Identifications for the IPv4 packets that are made here: no two alike between the same ends for as long as 16 bits allow
//! (RFC 6864 §4.2), and none that says how much others send (RFC 7739 §3).

use std::{
    hash::BuildHasher,
    net::Ipv4Addr,
    sync::atomic::{AtomicU16, Ordering::Relaxed},
};

use siphasher::sip::SipHasher13;

/// 8 KiB. Ends that share a counter skip numbers, and repeat none earlier for it.
const COUNTERS: usize = 4096;

/// Counters that all threads share, without a lock.
pub(super) struct Idents {
    key: Key,
    counters: Box<[AtomicU16]>,
}

/// A secret, without which nobody tells which ends share a counter, nor where theirs begins.
#[derive(Clone, Copy)]
struct Key(u64, u64);

impl BuildHasher for Key {
    type Hasher = SipHasher13;

    fn build_hasher(&self) -> SipHasher13 {
        SipHasher13::new_with_keys(self.0, self.1)
    }
}

impl Idents {
    pub(super) fn new(seed: [u64; 2]) -> Self {
        Self {
            key: Key(seed[0], seed[1]),
            counters: (0..COUNTERS).map(|_| AtomicU16::new(0)).collect(),
        }
    }

    /// The first of `count` numbers, which follow each other, for packets from `source` to `destination`.
    pub(super) fn take(&self, source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, count: u16) -> u16 {
        let hash = self.key.hash_one((source.to_bits(), destination.to_bits(), protocol));
        let [a, b, c, d, ..] = hash.to_be_bytes();
        let counter = self.counters.get(usize::from(u16::from_be_bytes([a, b])) % COUNTERS);
        let taken = counter.map_or(0, |counter| counter.fetch_add(count, Relaxed));
        taken.wrapping_add(u16::from_be_bytes([c, d]))
    }
}

impl std::fmt::Debug for Idents {
    // Neither the secret nor 4096 numbers.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Idents").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::nat64::testing::ip4;

    const A: &str = "192.0.2.1";
    const B: &str = "198.51.100.2";

    #[test]
    fn rfc6864_section_4_2_no_identification_repeats_between_the_same_ends_before_all_were_used() {
        let idents = Idents::new([1, 2]);
        let seen: HashSet<u16> = (0..65_536).map(|_| idents.take(ip4(A), ip4(B), 17, 1)).collect();
        assert_eq!(seen.len(), 65_536);
        // The 70,000 packets of a busy half minute: the first 4464 come again, each after 65,536 others.
        assert!((65_536..70_000).all(|_| seen.contains(&idents.take(ip4(A), ip4(B), 17, 1))));
    }

    #[test]
    fn a_packet_of_many_segments_takes_a_number_for_each() {
        let idents = Idents::new([1, 2]);
        let first = idents.take(ip4(A), ip4(B), 6, 44);
        assert_eq!(idents.take(ip4(A), ip4(B), 6, 1), first.wrapping_add(44));
    }

    #[test]
    fn rfc7739_section_3_where_the_numbers_begin_depends_on_ends_and_secret() {
        let begins = |seed: u64, last: u8| {
            let idents = Idents::new([seed, 0]);
            idents.take(Ipv4Addr::new(192, 0, 2, last), ip4(B), 17, 1)
        };
        let by_end: HashSet<u16> = (0..200).map(|last| begins(1, last)).collect();
        let by_seed: HashSet<u16> = (0..200).map(|seed| begins(seed, 1)).collect();
        assert!(by_end.len() > 190 && by_seed.len() > 190);
    }
}
