//! Promises of RFC 6052 about addresses, on whole packets.

use super::{testing::*, tests::translator, *};
use crate::Pref64;

/// RFC 6052 §2.4: 192.0.2.33 under a prefix of each length.
const TABLE: [(&str, &str); 6] = [
    ("2001:db8::/32", "2001:db8:c000:221::"),
    ("2001:db8:100::/40", "2001:db8:1c0:2:21::"),
    ("2001:db8:122::/48", "2001:db8:122:c000:2:2100::"),
    ("2001:db8:122:300::/56", "2001:db8:122:3c0:0:221::"),
    ("2001:db8:122:344::/64", "2001:db8:122:344:c0:2:2100::"),
    ("2001:db8:122:344::/96", "2001:db8:122:344::c000:221"),
];
/// A host with a map, outside of all these.
const HOST_V4: &str = "198.51.100.7";
const HOST_V6: &str = "2001:db9::7";

#[test]
fn rfc6052_section_2_2_prefixes_of_six_lengths_and_no_other() {
    for (prefix, address) in TABLE {
        let got = from_v4(prefix, "192.0.2.33", 6, &tcp(9)).forwarded();
        assert_eq!(got[8..24], ip6(address).octets(), "{prefix}");
        let got = to_v4(prefix, address).forwarded();
        assert_eq!(got[16..20], [192, 0, 2, 33], "{prefix}");
    }
    let lengths = (0..=128).filter(|length| format!("2001:db8::/{length}").parse::<Pref64>().is_ok());
    assert_eq!(lengths.collect::<Vec<_>>(), [32, 40, 48, 56, 64, 96]);
}

#[test]
fn rfc6052_section_2_2_bits_64_to_71_are_zero_and_no_prefix_sets_them() {
    let mut random = Random::new(31);
    for (prefix, _) in TABLE {
        for _ in 0..200 {
            let [a, b, c] = [random.octet(), random.octet(), random.octet()];
            let got = from_v4(prefix, &format!("{}.{a}.{b}.{c}", 1 + a % 100), 6, &tcp(9)).forwarded();
            assert_eq!(got[16], 0, "{prefix}");
        }
    }
    assert!("2001:db8:122:344:100::/96".parse::<Pref64>().is_err());
    assert!("2001:db8:122:344:1::/96".parse::<Pref64>().is_ok());
}

#[test]
fn rfc6052_section_2_2_and_2_3_a_suffix_is_sent_as_zero_and_passed_over_where_it_comes() {
    let mut random = Random::new(32);
    for (prefix, address) in TABLE {
        let length = prefix.parse::<Pref64>().expect("a prefix").length();
        let plain = to_v4(prefix, address).forwarded();
        // Octets behind prefix and address, and octet 8 unless the prefix reaches over it.
        let end = usize::from(length) / 8 + if length < 96 { 5 } else { 4 };
        for _ in 0..100 {
            let mut noisy = ip6(address).octets();
            for (place, octet) in noisy.iter_mut().enumerate() {
                if place >= end || place == 8 && length < 96 {
                    *octet = random.octet();
                }
            }
            let got = to_v4(prefix, &std::net::Ipv6Addr::from(noisy).to_string()).forwarded();
            assert_eq!(got[16..20], plain[16..20], "{prefix}");
        }
        let got = from_v4(prefix, "192.0.2.33", 6, &tcp(9)).forwarded();
        assert!(got[8 + end..24].iter().all(|octet| *octet == 0), "{prefix}");
    }
}

#[test]
fn rfc6052_section_3_1_every_block_that_is_not_global_stays_out_of_the_well_known_prefix() {
    for address in [
        "0.1.2.3",
        "10.0.0.1",
        "100.64.0.1",
        "127.0.0.2",
        "169.254.1.1",
        "172.16.0.1",
        "192.0.0.1",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
    ] {
        let there = to_v4("64:ff9b::/96", &format!("64:ff9b::{address}"));
        assert!(
            matches!(there, Seen::Reply(DropReason::NotGlobal, _)),
            "{address} {there:?}"
        );
        assert!(
            matches!(from_v4("64:ff9b::/96", address, 6, &tcp(9)), Seen::Drop(_)),
            "{address}"
        );
    }
    for address in ["1.1.1.1", "172.32.0.1", "100.128.0.1", "198.20.0.1"] {
        to_v4("64:ff9b::/96", &format!("64:ff9b::{address}")).forwarded();
        from_v4("64:ff9b::/96", address, 6, &tcp(9)).forwarded();
    }
}

#[test]
fn rfc8215_section_3_a_local_prefix_of_any_split_carries_private_addresses() {
    for prefix in [
        "64:ff9b:1::/48",
        "64:ff9b:1:100::/56",
        "64:ff9b:1:abcd::/64",
        "64:ff9b:1::/96",
        "64:ff9b:1:fffe:fe:1::/96",
    ] {
        let address = prefix
            .parse::<Pref64>()
            .expect("a prefix")
            .embed(ip4("10.1.2.3"))
            .to_string();
        assert_eq!(to_v4(prefix, &address).forwarded()[16..20], [10, 1, 2, 3], "{prefix}");
        let got = from_v4(prefix, "10.1.2.3", 6, &tcp(9)).forwarded();
        assert_eq!(got[8..24], ip6(&address).octets());
    }
}

#[test]
fn rfc6052_section_4_1_checksums_are_right_under_prefixes_that_are_neutral_and_that_are_not() {
    for prefix in TABLE.map(|(prefix, _)| prefix).into_iter().chain(["64:ff9b::/96"]) {
        for (protocol, next, body) in [
            (6, 6, tcp(9)),
            (17, 17, udp(9)),
            (1, 58, icmp(8, 0, [1, 2, 3, 4], b"abc")),
        ] {
            let got = from_v4(prefix, "9.8.7.6", protocol, &body).forwarded();
            assert_eq!((got[6], transport_sum(&got)), (next, 0xffff), "{prefix}");
        }
    }
}

/// What `source` sends to the host, as the host gets it.
fn from_v4(prefix: &str, source: &str, protocol: u8, body: &[u8]) -> Seen {
    let sent = summed(v4(source, HOST_V4, protocol, body));
    run(&sent, |packet| translator(|_| {}).v4(&mut mapper(prefix), packet))
}

/// What the host sends to `destination`.
fn to_v4(prefix: &str, destination: &str) -> Seen {
    let sent = summed(v6(HOST_V6, destination, 6, &tcp(9)));
    run(&sent, |packet| translator(|_| {}).v6(&mut mapper(prefix), packet))
}

fn mapper(prefix: &str) -> Stateless {
    let map = Map::new(
        format!("{HOST_V4}/32").parse().expect("a net"),
        format!("{HOST_V6}/128").parse().expect("a net"),
    );
    Stateless {
        prefix: Some(prefix.parse().expect("a prefix")),
        maps: Maps::new([map.expect("a map")]).expect("maps"),
        reporters_v4: Vec::new(),
        reporter_v6: None,
    }
}
