//! What holds for all packets: drawn by a seeded generator, checked by sums that are written apart.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    num::NonZeroU16,
};

use super::{testing::*, tests::translator, *};
use crate::Pref64;

#[test]
fn rfc7915_section_4_from_ipv4_to_ipv6_and_back_under_any_prefix_payload_and_checksum_stay_right() {
    let (mut random, translator) = (Random::new(10), translator(|_| {}));
    for _ in 0..20_000 {
        let mut mapper = prefix_only(&mut random);
        let [source, destination] = [unicast(&mut random), unicast(&mut random)];
        let (protocol, body) = body(&mut random, true);
        let sent = sum_if_known(v4(&source.to_string(), &destination.to_string(), protocol, &body));
        let there = run(&sent, |packet| translator.translate(&mut mapper, packet)).forwarded();
        assert_right(&there);
        let back = run(&there, |packet| translator.translate(&mut mapper, packet)).forwarded();
        assert_right(&back);
        // All but identification, DF, hops and header checksum.
        assert_eq!(
            (&back[..4], &back[9..10], &back[12..]),
            (&sent[..4], &sent[9..10], &sent[12..])
        );
        assert_eq!(back[8], 62);
    }
}

#[test]
fn rfc7915_section_5_from_ipv6_to_ipv4_and_back_under_any_prefix_and_suffix_payload_and_checksum_stay_right() {
    let (mut random, translator) = (Random::new(11), translator(|_| {}));
    for _ in 0..20_000 {
        let mut mapper = prefix_only(&mut random);
        let prefix = mapper.prefix.expect("a prefix");
        let [source, destination] = [unicast(&mut random), unicast(&mut random)];
        let noisy = [source, destination].map(|v4| suffixed(prefix, v4, &mut random));
        let (protocol, body) = body(&mut random, false);
        let sent = sum_if_known(v6(&noisy[0].to_string(), &noisy[1].to_string(), protocol, &body));
        let there = run(&sent, |packet| translator.translate(&mut mapper, packet)).forwarded();
        assert_right(&there);
        assert_eq!(
            (&there[12..16], &there[16..20]),
            (&source.octets()[..], &destination.octets()[..])
        );
        let back = run(&there, |packet| translator.translate(&mut mapper, packet)).forwarded();
        let plain = [source, destination].map(|v4| prefix.embed(v4).to_string());
        // The suffix is gone, and with it what it added to the checksum.
        let expected = with(sum_if_known(v6(&plain[0], &plain[1], protocol, &body)), 7, &[62]);
        assert_eq!(back, expected);
    }
}

#[test]
fn rfc7915_section_4_5_and_5_5_a_wrong_checksum_comes_out_equally_wrong() {
    let (mut random, translator) = (Random::new(12), translator(|_| {}));
    for round in 0..20_000 {
        let mut mapper = prefix_only(&mut random);
        let prefix = mapper.prefix.expect("a prefix");
        let from_v4 = round % 2 == 0;
        let [source, destination] = [unicast(&mut random), unicast(&mut random)];
        let (protocol, body) = body(&mut random, from_v4);
        let right = if from_v4 {
            sum_if_known(v4(&source.to_string(), &destination.to_string(), protocol, &body))
        } else {
            let [source, destination] = [source, destination].map(|v4| prefix.embed(v4).to_string());
            sum_if_known(v6(&source, &destination, protocol, &body))
        };
        let header = if from_v4 { 20 } else { 40 };
        let field = match protocol {
            6 => 16,
            17 => 6,
            1 | 58 => 2,
            _ => continue,
        };
        let wrong = with(right, header + field, &(random.next() as u16 | 1).to_be_bytes());
        let got = run(&wrong, |packet| translator.translate(&mut mapper, packet)).forwarded();
        assert_eq!(transport_sum(&got) % 0xffff, transport_sum(&wrong) % 0xffff);
    }
}

#[test]
fn rfc7915_section_4_2_and_5_2_errors_about_any_packet_have_right_checksums_or_equally_wrong_ones() {
    let (mut random, translator) = (Random::new(13), translator(|_| {}));
    for round in 0..20_000 {
        let mut mapper = prefix_only(&mut random);
        let prefix = mapper.prefix.expect("a prefix");
        let from_v4 = round % 2 == 0;
        let ends = [unicast(&mut random), unicast(&mut random)];
        let ends = ends.map(|v4| {
            if from_v4 {
                v4.to_string()
            } else {
                prefix.embed(v4).to_string()
            }
        });
        let (protocol, body) = body(&mut random, from_v4);
        let mut quoted = if from_v4 {
            sum_if_known(v4(&ends[1], &ends[0], protocol, &body))
        } else {
            sum_if_known(v6(&ends[1], &ends[0], protocol, &body))
        };
        let header = if from_v4 { 20 } else { 40 };
        quoted.truncate(header + 8 + random.below(1200));
        let mut words = 0;
        if random.below(2) == 0 {
            // With an extension, and padding up to it.
            let unit = if from_v4 { 4 } else { 8 };
            quoted.resize(quoted.len().max(128).next_multiple_of(unit).min(255 * unit), 0);
            words = (quoted.len() / unit) as u8;
            let extension = 4 + random.below(300);
            quoted.extend(random.bytes(extension));
        }
        let sent = summed(if from_v4 {
            v4(&ends[0], &ends[1], 1, &icmp(11, 0, [0, words, 0, 0], &quoted))
        } else {
            v6(&ends[0], &ends[1], 58, &icmp(3, 0, [words, 0, 0, 0], &quoted))
        });
        let got = run(&sent, |packet| translator.translate(&mut mapper, packet)).forwarded();
        assert_right(&got);
        assert!(got.len() <= if from_v4 { 1280 } else { 576 });
        let wrong = with(sent, header + 2, &(random.next() as u16).to_be_bytes());
        let got = run(&wrong, |packet| translator.translate(&mut mapper, packet)).forwarded();
        assert_eq!(transport_sum(&got) % 0xffff, transport_sum(&wrong) % 0xffff);
    }
}

#[test]
fn any_bytes_are_translated_or_dropped_and_what_comes_out_is_well_formed() {
    let mut random = Random::new(14);
    let seeds = seeds();
    for round in 0..200_000 {
        let translator = translator(|settings| {
            settings.mtu_v4 = [0, 576, 1400, 1500, 65_535][round % 5];
            settings.mtu_v6 = [0, 1280, 1400, 1500, 65_535][round / 5 % 5];
            settings.sum_udp = round % 2 == 0;
        });
        let packet = if round % 8 == 0 {
            let length = random.below(200);
            random.bytes(length)
        } else {
            mutated(&seeds[random.below(seeds.len())], &mut random)
        };
        let offload = Offload {
            partial: random.below(4) == 0,
            segment: match random.below(4) {
                0 => NonZeroU16::new(random.next() as u16),
                _ => None,
            },
        };
        let mut mapper = super::tests::mapper();
        let (seen, _) = run_offloaded(&packet, offload, |packet| translator.translate(&mut mapper, packet));
        match seen {
            Seen::Drop(_) => {}
            Seen::Forward(pieces) => {
                assert!(!pieces.is_empty());
                for piece in pieces {
                    assert_well_formed(&piece);
                }
            }
            Seen::Reply(_, reply) => {
                assert_well_formed(&reply);
                assert_eq!(transport_sum(&reply), 0xffff);
                assert!(reply.len() <= if reply[0] >> 4 == 4 { 576 } else { 1280 });
                assert_eq!(reply[0] >> 4, packet[0] >> 4);
            }
        }
    }
}

/// Packets of every kind, to be spoilt.
fn seeds() -> Vec<Vec<u8>> {
    let (host_v4, server_v4) = ("198.51.100.7", "192.0.2.33");
    let (host_v6, server_v6) = ("2001:db8:3::7", "2001:db8:1c0:2:21::");
    let mut seeds = Vec::new();
    for (protocol, body) in [(6, tcp(30)), (17, udp(1400)), (17, udp(3)), (132, vec![0; 20])] {
        seeds.push(with(v4(server_v4, host_v4, protocol, &body), 6, &[0, 0]));
        seeds.push(v4(server_v4, host_v4, protocol, &body));
        seeds.push(v6(host_v6, server_v6, protocol, &body));
        seeds.push(v6(host_v6, server_v6, 44, &fragment(protocol, 1, 0, true, &body)));
        seeds.push(v6(
            host_v6,
            server_v6,
            60,
            &[&[protocol, 0, 0, 0, 0, 0, 0, 0], &body[..]].concat(),
        ));
        for words in [0, 8, 32] {
            let quoted = [&v4(host_v4, server_v4, protocol, &body)[..], &[0; 160]].concat();
            for kind in [3, 11, 12] {
                seeds.push(v4(server_v4, host_v4, 1, &icmp(kind, 0, [0, words, 0, 0], &quoted)));
            }
            let quoted = [&v6(server_v6, host_v6, protocol, &body)[..], &[0; 160]].concat();
            for kind in [1, 2, 3, 4] {
                seeds.push(v6(
                    host_v6,
                    server_v6,
                    58,
                    &icmp(kind, 0, [words / 2, 0, 0, 0], &quoted),
                ));
            }
        }
    }
    seeds.push(v4(server_v4, host_v4, 1, &icmp(8, 0, [0; 4], &[0; 20])));
    seeds.push(v6(host_v6, server_v6, 58, &icmp(128, 0, [0; 4], &[0; 20])));
    // Between two mapped hosts.
    seeds.push(v6(host_v6, "2001:db8:1c6:3364:9::", 17, &udp(9)));
    let quoted = v6("2001:db8:1c6:3364:7::", "2001:db8:3::9", 17, &udp(9));
    seeds.push(v6(
        "2001:db8:3::9",
        "2001:db8:1c6:3364:7::",
        58,
        &icmp(1, 4, [0; 4], &quoted),
    ));
    seeds
}

/// With some octets changed, most of them in headers, and sometimes cut short; a wrong IPv4 header checksum, which would
/// end it at once, is put right mostly.
fn mutated(seed: &[u8], random: &mut Random) -> Vec<u8> {
    let mut packet = seed.to_vec();
    for _ in 0..random.below(6) {
        let reach = [packet.len(), 100][random.below(2)].min(packet.len());
        let place = random.below(reach);
        packet[place] = [random.octet(), 0, 0xff, packet[place] ^ 1 << random.below(8)][random.below(4)];
    }
    if random.below(4) == 0 {
        packet.truncate(random.below(packet.len() + 1).max(1));
    }
    if random.below(4) > 0 {
        let stated = packet.len() as u16;
        match packet[0] >> 4 {
            4 if packet.len() >= usize::from(packet[0] & 15) * 4 && packet.len() >= 20 => {
                packet[2..4].copy_from_slice(&stated.to_be_bytes());
                packet = seal(packet);
            }
            6 if packet.len() >= 40 => packet[4..6].copy_from_slice(&(stated - 40).to_be_bytes()),
            _ => {}
        }
    }
    packet
}

fn assert_well_formed(packet: &[u8]) {
    match packet[0] >> 4 {
        4 => {
            assert_eq!(packet[0], 0x45);
            assert_eq!(reference_sum(&packet[..20]), 0xffff);
            assert_eq!(packet[2..4], (packet.len() as u16).to_be_bytes());
            assert_ne!(packet[8], 0);
        }
        6 => {
            assert_eq!(packet[4..6], (packet.len() as u16 - 40).to_be_bytes());
            assert_ne!(packet[7], 0);
        }
        other => panic!("IP version {other}"),
    }
}

/// Well-formed, and with a right checksum if its protocol has one that is known here.
fn assert_right(packet: &[u8]) {
    assert_well_formed(packet);
    let protocol = if packet[0] >> 4 == 4 { packet[9] } else { packet[6] };
    if matches!(protocol, 1 | 6 | 17 | 58) {
        assert_eq!(transport_sum(packet), 0xffff);
    }
}

fn sum_if_known(packet: Vec<u8>) -> Vec<u8> {
    let protocol = if packet[0] >> 4 == 4 { packet[9] } else { packet[6] };
    if matches!(protocol, 1 | 6 | 17 | 58) {
        summed(packet)
    } else {
        packet
    }
}

/// TCP, UDP, an echo, or SCTP, of any length that fits.
fn body(random: &mut Random, is_v4: bool) -> (u8, Vec<u8>) {
    let length = random.below(1200);
    let (protocol, header) = match random.below(4) {
        0 => (6, tcp(0)),
        1 => (17, udp(length)[..8].to_vec()),
        2 if is_v4 => (1, icmp([0, 8][random.below(2)], 0, [0; 4], &[])),
        2 => (58, icmp([128, 129][random.below(2)], 0, [0; 4], &[])),
        _ => (132, Vec::new()),
    };
    (protocol, [header, random.bytes(length)].concat())
}

fn unicast(random: &mut Random) -> Ipv4Addr {
    loop {
        let address = Ipv4Addr::from_bits(random.next() as u32);
        if !matches!(address.octets()[0], 0 | 127 | 224..) {
            return address;
        }
    }
}

/// A prefix of any of the six lengths, under which everything is translated.
fn prefix_only(random: &mut Random) -> Stateless {
    let length = [32, 40, 48, 56, 64, 96][random.below(6)];
    let bits = (u128::from(random.next()) << 64 | u128::from(random.next())) & !(0xff << 56);
    // Global unicast, 2000::/3.
    let bits = bits >> 3 & !(0b111 << 125) | 1 << 125;
    let network = Ipv6Addr::from_bits(bits & !(u128::MAX >> length) & !(0xff << 56));
    Stateless {
        prefix: Some(format!("{network}/{length}").parse().expect("a prefix")),
        maps: Maps::default(),
        reporters_v4: Vec::new(),
        reporter_v6: None,
    }
}

/// An address under `prefix`, with anything in its suffix and bits 64 to 71.
fn suffixed(prefix: Pref64, address: Ipv4Addr, random: &mut Random) -> Ipv6Addr {
    let noise = u128::from(random.next()) << 64 | u128::from(random.next());
    // Where neither prefix nor address is: behind both, and in octet 8 unless the prefix reaches over it.
    let end = u32::from(prefix.length()) + if prefix.length() < 96 { 40 } else { 32 };
    let behind = u128::MAX.checked_shr(end).unwrap_or(0);
    let octet_8 = if prefix.length() < 96 { 0xff << 56 } else { 0 };
    Ipv6Addr::from_bits(prefix.embed(address).to_bits() | noise & (behind | octet_8))
}
