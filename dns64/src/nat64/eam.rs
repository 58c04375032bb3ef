//! Explicit address maps (RFC 7757): which IPv4 prefix stands for which IPv6 prefix, address by address.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    ops::Range,
};

use ipnet::{Ipv4Net, Ipv6Net};

/// One entry: each address of one prefix stands for that of the other with the same suffix (RFC 7757 §3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Map {
    v4: Ipv4Net,
    v6: Ipv6Net,
}

/// Why two prefixes make no [`Map`], or maps no [`Maps`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Bits are set beyond the length of a prefix.
    #[error("{given} has bits set beyond its length; write {prefix}")]
    HostBits {
        /// As written.
        given: String,
        /// The prefix it lies in.
        prefix: String,
    },
    /// The IPv6 prefix has less room than the IPv4 prefix has addresses (RFC 7757 §3.1).
    #[error("{v6} is too long for {v4}: it leaves {room} bits, and {needed} are needed")]
    Suffix {
        /// The IPv4 prefix.
        v4: Ipv4Net,
        /// The IPv6 prefix.
        v6: Ipv6Net,
        /// Bits behind the IPv6 prefix.
        room: u8,
        /// Bits behind the IPv4 prefix.
        needed: u8,
    },
    /// A prefix is in two maps, so that one of them would never be used.
    #[error("{0} is mapped twice; remove one of the two")]
    Twice(String),
}

impl Map {
    /// Of two prefixes without bits beyond their lengths, of which the IPv6 one leaves enough bits.
    ///
    /// # Errors
    ///
    /// See [`MapError`].
    pub fn new(v4: Ipv4Net, v6: Ipv6Net) -> Result<Self, MapError> {
        let host_bits = |given: String, prefix: String| MapError::HostBits { given, prefix };
        if v4.addr() != v4.network() {
            return Err(host_bits(v4.to_string(), v4.trunc().to_string()));
        }
        if v6.addr() != v6.network() {
            return Err(host_bits(v6.to_string(), v6.trunc().to_string()));
        }
        let (needed, room) = (32 - v4.prefix_len(), 128 - v6.prefix_len());
        if room < needed {
            return Err(MapError::Suffix { v4, v6, room, needed });
        }
        Ok(Self { v4, v6 })
    }

    /// Bits of the IPv6 address behind those that stand for the suffix.
    fn beyond(self) -> u32 {
        let used = u32::from(self.v6.prefix_len()) + 32 - u32::from(self.v4.prefix_len());
        128_u32.saturating_sub(used)
    }

    /// RFC 7757 §3.3.1: prefix, suffix, zeros.
    fn to_v6(self, address: Ipv4Addr) -> Ipv6Addr {
        let suffix = u128::from(address.to_bits() ^ self.v4.addr().to_bits());
        Ipv6Addr::from_bits(self.v6.addr().to_bits() | suffix.checked_shl(self.beyond()).unwrap_or(0))
    }

    /// RFC 7757 §3.3.2: what is behind the suffix is passed over.
    fn to_v4(self, address: Ipv6Addr) -> Ipv4Addr {
        let suffix = address.to_bits() ^ self.v6.addr().to_bits();
        let suffix = suffix.checked_shr(self.beyond()).unwrap_or(0);
        Ipv4Addr::from_bits(self.v4.addr().to_bits() | u32::try_from(suffix).unwrap_or(0))
    }
}

/// All explicit maps, the longest prefix first in either direction (RFC 7757 §3.2).
#[derive(Clone, Debug, Default)]
pub struct Maps {
    v4: Table<u32>,
    v6: Table<u128>,
}

/// Maps by prefix; those of one length are neighbours, in order.
#[derive(Clone, Debug, Default)]
struct Table<T> {
    lengths: Vec<(T, Range<usize>)>,
    entries: Vec<(T, Map)>,
}

impl Maps {
    /// All of `maps`.
    ///
    /// # Errors
    ///
    /// [`MapError::Twice`].
    pub fn new(maps: impl IntoIterator<Item = Map>) -> Result<Self, MapError> {
        let maps: Vec<Map> = maps.into_iter().collect();
        let v4 = Table::new(&maps, |map| (map.v4.netmask().to_bits(), map.v4.addr().to_bits()));
        let v6 = Table::new(&maps, |map| (map.v6.netmask().to_bits(), map.v6.addr().to_bits()));
        Ok(Self {
            v4: v4.map_err(|map| MapError::Twice(map.v4.to_string()))?,
            v6: v6.map_err(|map| MapError::Twice(map.v6.to_string()))?,
        })
    }

    /// The IPv6 address that stands for `address`.
    pub fn to_v6(&self, address: Ipv4Addr) -> Option<Ipv6Addr> {
        Some(self.v4.find(address.to_bits())?.to_v6(address))
    }

    /// The IPv4 address that stands for `address`.
    pub fn to_v4(&self, address: Ipv6Addr) -> Option<Ipv4Addr> {
        Some(self.v6.find(address.to_bits())?.to_v4(address))
    }
}

impl<T: Copy + Ord + std::ops::BitAnd<Output = T>> Table<T> {
    /// By what `ends` says: mask and prefix. An error is a map whose prefix another has, too.
    fn new(maps: &[Map], ends: impl Fn(&Map) -> (T, T)) -> Result<Self, Map> {
        let mut sorted: Vec<(T, T, Map)> = maps
            .iter()
            .map(|map| {
                let (mask, prefix) = ends(map);
                (mask, prefix, *map)
            })
            .collect();
        // Longer prefixes have greater masks.
        sorted.sort_by_key(|(mask, prefix, _)| (std::cmp::Reverse(*mask), *prefix));
        let key = |(mask, prefix, _): &(T, T, Map)| (*mask, *prefix);
        if let Some((_, same)) = sorted
            .iter()
            .zip(sorted.iter().skip(1))
            .find(|(one, next)| key(one) == key(next))
        {
            return Err(same.2);
        }
        let mut lengths: Vec<(T, Range<usize>)> = Vec::new();
        for (place, (mask, _, _)) in sorted.iter().enumerate() {
            match lengths.last_mut() {
                Some((last, range)) if last == mask => range.end = place + 1,
                _ => lengths.push((*mask, place..place + 1)),
            }
        }
        let entries = sorted.into_iter().map(|(_, prefix, map)| (prefix, map)).collect();
        Ok(Self { lengths, entries })
    }

    fn find(&self, address: T) -> Option<Map> {
        self.lengths.iter().find_map(|(mask, range)| {
            let entries = self.entries.get(range.clone())?;
            let place = entries.binary_search_by_key(&(address & *mask), |(prefix, _)| *prefix);
            entries.get(place.ok()?).map(|(_, map)| *map)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nat64::testing::{ip4, ip6};

    #[test]
    fn rfc7757_section_3_1_examples_and_other_lengths_map_both_ways() {
        for (v4, v6, one, other) in [
            ("192.0.2.1/32", "2001:db8:aaaa::/128", "192.0.2.1", "2001:db8:aaaa::"),
            ("192.0.2.2/32", "2001:db8:bbbb::b/128", "192.0.2.2", "2001:db8:bbbb::b"),
            ("192.0.2.16/28", "2001:db8:cccc::/124", "192.0.2.21", "2001:db8:cccc::5"),
            (
                "192.0.2.128/26",
                "2001:db8:dddd::/64",
                "192.0.2.131",
                "2001:db8:dddd:0:c00::",
            ),
            (
                "192.0.2.192/29",
                "2001:db8:eeee:8::/62",
                "192.0.2.195",
                "2001:db8:eeee:9:8000::",
            ),
            ("192.0.2.224/31", "64:ff9b::/127", "192.0.2.225", "64:ff9b::1"),
            ("0.0.0.0/0", "2001:db8::/96", "198.51.100.7", "2001:db8::198.51.100.7"),
            ("0.0.0.0/0", "::/0", "198.51.100.7", "c633:6407::"),
        ] {
            let maps = maps(&[(v4, v6)]);
            assert_eq!(maps.to_v6(ip4(one)), Some(ip6(other)), "{v4} {v6}");
            assert_eq!(maps.to_v4(ip6(other)), Some(ip4(one)), "{v4} {v6}");
        }
    }

    #[test]
    fn rfc7757_section_3_2_the_longest_prefix_decides_in_either_direction() {
        let maps = maps(&[
            ("192.0.2.0/24", "2001:db8:1::/120"),
            ("192.0.2.8/32", "2001:db8:2::8/128"),
            ("198.51.100.0/24", "2001:db8:1::/64"),
        ]);
        assert_eq!(maps.to_v6(ip4("192.0.2.7")), Some(ip6("2001:db8:1::7")));
        assert_eq!(maps.to_v6(ip4("192.0.2.8")), Some(ip6("2001:db8:2::8")));
        assert_eq!(maps.to_v6(ip4("192.0.3.8")), None);
        assert_eq!(maps.to_v4(ip6("2001:db8:1::7")), Some(ip4("192.0.2.7")));
        assert_eq!(maps.to_v4(ip6("2001:db8:1:0:700::")), Some(ip4("198.51.100.7")));
        assert_eq!(maps.to_v4(ip6("2001:db8:2::9")), None);
        assert_eq!(Maps::default().to_v6(ip4("192.0.2.7")), None);
    }

    #[test]
    fn rfc7757_section_3_3_2_bits_behind_the_suffix_are_passed_over() {
        let maps = maps(&[("192.0.2.0/24", "2001:db8::/72")]);
        assert_eq!(maps.to_v4(ip6("2001:db8:0:0:7:ffff:ffff:ffff")), Some(ip4("192.0.2.7")));
    }

    #[test]
    fn bad_maps_are_refused_with_the_remedy() {
        let refused = |v4: &str, v6: &str| {
            let refused = Map::new(v4.parse().expect("a net"), v6.parse().expect("a net"));
            refused.expect_err("a bad map").to_string()
        };
        assert_eq!(
            refused("192.0.2.1/24", "2001:db8::/120"),
            "192.0.2.1/24 has bits set beyond its length; write 192.0.2.0/24"
        );
        assert_eq!(
            refused("192.0.2.0/24", "2001:db8::1/120"),
            "2001:db8::1/120 has bits set beyond its length; write 2001:db8::/120"
        );
        assert_eq!(
            refused("192.0.2.0/24", "2001:db8::/121"),
            "2001:db8::/121 is too long for 192.0.2.0/24: it leaves 7 bits, and 8 are needed"
        );
        let twice = |maps: &[(&str, &str)]| {
            let maps = maps.iter().map(|(v4, v6)| map(v4, v6));
            Maps::new(maps).expect_err("mapped twice").to_string()
        };
        assert_eq!(
            twice(&[("192.0.2.0/24", "2001:db8::/120"), ("192.0.2.0/24", "2001:db8:1::/120")]),
            "192.0.2.0/24 is mapped twice; remove one of the two"
        );
        assert_eq!(
            twice(&[("192.0.2.0/24", "2001:db8::/120"), ("192.0.3.0/24", "2001:db8::/120")]),
            "2001:db8::/120 is mapped twice; remove one of the two"
        );
    }

    fn map(v4: &str, v6: &str) -> Map {
        Map::new(v4.parse().expect("a net"), v6.parse().expect("a net")).expect("a map")
    }

    fn maps(maps: &[(&str, &str)]) -> Maps {
        Maps::new(maps.iter().map(|(v4, v6)| map(v4, v6))).expect("maps")
    }
}
