//! Who may ask at all: networks, and nobody else.

use std::net::IpAddr;

use ipnet::IpNet;

/// A set of networks, kept as ranges that neither overlap nor touch, so that a look-up is one binary search.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    v4: Ranges,
    v6: Ranges,
}

/// First and last number of each range, in order.
type Ranges = Vec<(u128, u128)>;

impl Access {
    /// Everybody in one of `networks`; nobody if there are none. `::/0` lets nobody in who comes from IPv4.
    pub fn new<'a>(networks: impl IntoIterator<Item = &'a IpNet>) -> Self {
        let mut access = Self::default();
        for network in networks {
            match network {
                IpNet::V4(net) => access
                    .v4
                    .push((net.network().to_bits().into(), net.broadcast().to_bits().into())),
                IpNet::V6(net) => access.v6.push((net.network().to_bits(), net.broadcast().to_bits())),
            }
        }
        access.v4 = merged(access.v4);
        access.v6 = merged(access.v6);
        access
    }

    /// Whether `source` may ask.
    pub fn allows(&self, source: IpAddr) -> bool {
        let (ranges, number) = match source.to_canonical() {
            IpAddr::V4(v4) => (&self.v4, v4.to_bits().into()),
            IpAddr::V6(v6) => (&self.v6, v6.to_bits()),
        };
        let begun = ranges.partition_point(|(first, _)| *first <= number);
        let range = begun.checked_sub(1).and_then(|last| ranges.get(last));
        range.is_some_and(|(_, last)| number <= *last)
    }
}

fn merged(mut ranges: Ranges) -> Ranges {
    ranges.sort_unstable();
    let mut merged = Ranges::with_capacity(ranges.len());
    for (first, last) in ranges {
        match merged.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_is_in_a_network_may_ask() {
        let access = access(&["fd0d::/64", "192.0.2.0/25", "192.0.2.128/25", "192.0.2.7/32", "::1/128"]);
        for (source, allowed) in [
            ("fd0d::", true),
            ("fd0d::ffff:ffff:ffff:ffff", true),
            ("fd0d:0:0:1::", false),
            ("fd0c:ffff::1", false),
            ("192.0.2.0", true),
            ("192.0.2.127", true),
            ("192.0.2.128", true),
            ("192.0.2.255", true),
            ("192.0.3.0", false),
            ("192.0.1.255", false),
            ("::ffff:192.0.2.9", true),
            ("::ffff:198.51.100.9", false),
            ("::1", true),
            ("::", false),
            ("::2", false),
        ] {
            assert_eq!(access.allows(ip(source)), allowed, "{source}");
        }
        assert_eq!((access.v4.len(), access.v6.len()), (1, 2));
    }

    #[test]
    fn without_networks_nobody_may_and_one_family_does_not_stand_for_the_other() {
        assert!(!Access::default().allows(ip("::1")));
        assert!(!access(&["::/0"]).allows(ip("192.0.2.1")));
        assert!(!access(&["::/0"]).allows(ip("::ffff:192.0.2.1")));
        assert!(access(&["::/0", "fd0d::/64"]).allows(ip("ffff:ffff::1")));
        assert!(!access(&["0.0.0.0/0"]).allows(ip("2001:db8::1")));
        assert!(access(&["0.0.0.0/0"]).allows(ip("255.255.255.255")));
    }

    fn access(networks: &[&str]) -> Access {
        let networks: Vec<IpNet> = networks.iter().map(|net| net.parse().expect("a network")).collect();
        Access::new(&networks)
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }
}
