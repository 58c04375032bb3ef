//! Promises of RFC 7915 and its kin, on whole packets.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{testing::*, *};

const PREFIX: &str = "2001:db8:100::/40";
/// An IPv6 host that is mapped, and the address that it has in IPv4.
const HOST_V6: &str = "2001:db8:3::7";
const HOST_V4: &str = "198.51.100.7";
/// An IPv4 host, and where it is under the prefix.
const SERVER_V4: &str = "192.0.2.33";
const SERVER_V6: &str = "2001:db8:1c0:2:21::";
const OWN_V4: &str = "203.0.113.1";
const OWN_V6: &str = "2001:db8::64";

#[test]
fn rfc7915_section_4_1_traffic_class_is_copied_or_else_only_ecn() {
    let sent = with(to_host(17, &udp(4)), 1, &[0b1011_1001]);
    let got = v4_in(&sent, |_| {}).forwarded();
    assert_eq!(got[..4], [0x6b, 0x90, 0, 0]);
    let got = v4_in(&sent, |settings| settings.copy_class = false).forwarded();
    assert_eq!(got[..4], [0x60, 0x10, 0, 0]);
    let sent = with(to_server(6, &tcp(4)), 0, &[0x6b, 0x9a, 0xbc, 0xde]);
    assert_eq!(v6_in(&sent, |_| {}).forwarded()[1], 0b1011_1001);
    let got = v6_in(&sent, |settings| settings.copy_class = false).forwarded();
    assert_eq!(got[1], 0b0000_0001);
}

#[test]
fn rfc7915_section_4_1_and_5_1_one_hop_is_taken_and_the_last_is_answered() {
    for (ttl, expected) in [(255, 254), (64, 63), (2, 1)] {
        assert_eq!(
            v4_in(&with(to_host(17, &udp(4)), 8, &[ttl]), |_| {}).forwarded()[7],
            expected
        );
        assert_eq!(
            v6_in(&with(to_server(6, &tcp(4)), 7, &[ttl]), |_| {}).forwarded()[8],
            expected
        );
    }
    for ttl in [0, 1] {
        let sent = with(to_host(17, &udp(4)), 8, &[ttl]);
        let got = v4_in(&sent, |_| {});
        assert!(matches!(got, Seen::Reply(DropReason::HopLimit, _)));
        assert_v4_error(&got.replied(), (11, 0, [0; 4]), &sent);
        let sent = with(to_server(6, &tcp(4)), 7, &[ttl]);
        assert_v6_error(&v6_in(&sent, |_| {}).replied(), (3, 0, [0; 4]), &sent);
    }
}

#[test]
fn rfc7915_section_4_1_options_are_left_out_and_a_source_route_underway_is_refused() {
    let optioned = |options: &[u8]| {
        let mut packet = to_host(17, &udp(4));
        packet.splice(20..20, options.iter().copied());
        packet[0] = 0x45 + options.len() as u8 / 4;
        let total = packet.len() as u16;
        packet[2..4].copy_from_slice(&total.to_be_bytes());
        summed(seal(packet))
    };
    let plain = v4_in(&optioned(&[]), |_| {}).forwarded();
    let expired = [131, 7, 8, 192, 0, 2, 1, 0];
    let record = [7, 7, 4, 0, 0, 0, 0, 0];
    for options in [expired, record] {
        assert_eq!(v4_in(&optioned(&options), |_| {}).forwarded(), plain);
    }
    for kind in [131, 137] {
        let sent = optioned(&[kind, 7, 4, 192, 0, 2, 1, 0]);
        assert_v4_error(&v4_in(&sent, |_| {}).replied(), (3, 5, [0; 4]), &sent);
    }
}

#[test]
fn rfc7915_section_4_what_may_be_fragmented_is_so_that_each_piece_fits() {
    for (lowest, mtu_v6, payload, pieces) in [
        (1280, 1500, 1232, &[1280][..]),
        (1280, 1500, 1233, &[1280, 57]),
        (1500, 1280, 1233, &[1280, 57]),
        (1402, 1500, 1355, &[1400, 59]),
        (1500, 9000, 1452, &[1500]),
        (1280, 9000, 5000, &[1280, 1280, 1280, 1280, 128]),
    ] {
        let sent = summed(with(to_host(17, &udp(payload)), 4, &[0xab, 0xcd, 0, 0]));
        let got = v4_in(&sent, |settings| {
            (settings.lowest_ipv6_mtu, settings.mtu_v6) = (lowest, mtu_v6);
        });
        let Seen::Forward(all) = got else { panic!("{got:?}") };
        let lengths: Vec<usize> = all.iter().map(Vec::len).collect();
        assert_eq!(lengths, pieces, "{payload}");
        let whole = reassembled(&all, 0xabcd);
        assert_eq!(whole.len(), 48 + payload);
        assert_eq!(transport_sum(&whole), 0xffff);
        assert_eq!(whole[48..], sent[28..]);
    }
}

#[test]
fn rfc7915_section_4_1_a_fragment_keeps_its_place_and_its_number() {
    for (flags, offset, more) in [(0x2000_u16, 0, true), (0x20b9, 1480, true), (0x00b9, 1480, false)] {
        // The first of them has a UDP header, the others anything.
        let body = udp(64);
        let sent = with(to_host(17, &body), 4, &[0x12, 0x34, (flags >> 8) as u8, flags as u8]);
        let sent = if offset == 0 { with(sent, 26, &[7, 7]) } else { sent };
        let got = v4_in(&sent, |_| {}).forwarded();
        assert_eq!(got[40..48], fragment(17, 0x1234, offset, more, &[]));
        assert_eq!(got[56..], body[8..]);
        if offset > 0 {
            assert_eq!(got[48..56], body[..8], "no ports and no checksum in here");
        }
    }
}

#[test]
fn rfc7915_section_4_1_a_fragment_that_is_too_long_is_fragmented_in_its_place() {
    let sent = with(to_host(6, &tcp(1228)), 4, &[0x12, 0x34, 0x20, 0x0a]);
    let Seen::Forward(all) = v4_in(&sent, |_| {}) else {
        panic!("not forwarded")
    };
    assert_eq!(all.iter().map(Vec::len).collect::<Vec<_>>(), [1280, 64]);
    assert_eq!(all[0][40..48], fragment(6, 0x1234, 80, true, &[]));
    assert_eq!(all[1][40..48], fragment(6, 0x1234, 1312, true, &[]));
}

#[test]
fn rfc7915_section_4_what_must_not_be_fragmented_is_refused_with_the_mtu() {
    let sent = to_host(6, &tcp(1221));
    assert_eq!(v4_in(&sent, |_| {}).forwarded().len(), 1281);
    let got = v4_in(&sent, |settings| settings.mtu_v6 = 1280);
    assert!(matches!(got, Seen::Reply(DropReason::TooBig, _)));
    let got = got.replied();
    assert_eq!(got.len(), 576);
    assert_v4_error(&got, (3, 4, [0, 0, 4, 0xec]), &sent[..548]);
}

#[test]
fn rfc7915_section_4_5_udp_without_a_checksum_gets_one_or_is_refused() {
    let sent = to_host(17, &udp(33));
    let got = v4_in(&sent, |_| {}).forwarded();
    assert_ne!(got[46..48], [0, 0]);
    assert_eq!(transport_sum(&got), 0xffff);
    let refused = v4_in(&sent, |settings| settings.sum_udp = false);
    assert_v4_error(&refused.replied(), (3, 13, [0; 4]), &sent);
    let first = with(sent, 6, &[0x20, 0]);
    assert_v4_error(&v4_in(&first, |_| {}).replied(), (3, 13, [0; 4]), &first);
    // Fragmented here it is summed up before it is cut.
    let long = with(to_host(17, &udp(3000)), 6, &[0, 0]);
    let Seen::Forward(all) = v4_in(&long, |_| {}) else {
        panic!("not forwarded")
    };
    assert_eq!(transport_sum(&reassembled(&all, 0)), 0xffff);
    // A length that is not there cannot be summed up, and one that leaves octets over covers its own.
    assert_eq!(
        v4_in(&with(to_host(17, &udp(4)), 24, &[0, 13]), |_| {}),
        Seen::Drop(DropReason::Malformed)
    );
    let got = v4_in(&with(to_host(17, &udp(4)), 24, &[0, 11]), |_| {}).forwarded();
    let mut shorter = got.clone();
    shorter.truncate(51);
    shorter[5] = 11;
    assert_eq!(transport_sum(&shorter), 0xffff);
}

#[test]
fn rfc8200_section_8_1_udp_over_ipv6_without_a_checksum_is_dropped() {
    assert_eq!(
        v6_in(&to_server(17, &udp(4)), |_| {}),
        Seen::Drop(DropReason::UdpChecksum)
    );
}

#[test]
fn rfc7915_section_4_5_other_protocols_are_forwarded_untouched() {
    let body: Vec<u8> = (0..200).collect();
    for protocol in (0..=255).filter(|protocol| ![0, 1, 6, 17, 43, 44, 58, 60].contains(protocol)) {
        let got = v4_in(&to_host(protocol, &body), |_| {}).forwarded();
        assert_eq!((got[6], &got[40..]), (protocol, &body[..]));
        let got = v6_in(&to_server(protocol, &body), |_| {}).forwarded();
        assert_eq!((got[9], &got[20..]), (protocol, &body[..]));
    }
    assert_eq!(v6_in(&to_server(59, &[]), |_| {}).forwarded().len(), 20);
}

#[test]
fn what_the_other_version_would_read_as_its_own_header_is_dropped() {
    for protocol in [0, 43, 44, 58, 60] {
        let sent = to_host(protocol, &[0; 64]);
        assert_eq!(v4_in(&sent, |_| {}), Seen::Drop(DropReason::Protocol), "{protocol}");
    }
    let sent = to_server(1, &icmp(8, 0, [0; 4], &[]));
    assert_eq!(v6_in(&sent, |_| {}), Seen::Drop(DropReason::Protocol));
}

#[test]
fn rfc7915_section_5_1_extension_headers_are_skipped_unless_segments_are_left() {
    let plain = v6_in(&summed(to_server(17, &udp(4))), |_| {}).forwarded();
    let datagram = summed(to_server(17, &udp(4)))[40..].to_vec();
    let routed = |left: u8| {
        let mut payload = vec![60, 0, 1, 4, 0, 0, 0, 0, 43, 0, 1, 4, 0, 0, 0, 0];
        payload.extend([17, 2, 4, left]);
        payload.extend([0; 20]);
        payload.extend(&datagram);
        to_server(0, &payload)
    };
    assert_eq!(v6_in(&routed(0), |_| {}).forwarded()[12..], plain[12..]);
    let sent = routed(1);
    let got = v6_in(&sent, |_| {});
    assert!(matches!(got, Seen::Reply(DropReason::RoutingHeader, _)));
    assert_v6_error(&got.replied(), (4, 0, [0, 0, 0, 59]), &sent);
}

#[test]
fn rfc7915_section_5_1_1_an_extension_header_behind_the_fragment_is_refused() {
    for next in [0, 43, 60, 44] {
        let mut payload = vec![17, 0, 0, 0, 0, 0, 0, 0];
        payload.extend(udp(4));
        let sent = to_server(44, &fragment(next, 9, 0, true, &payload));
        let got = v6_in(&sent, |_| {});
        assert!(
            matches!(got, Seen::Reply(DropReason::ExtensionHeader, _)),
            "{next} {got:?}"
        );
        assert_v6_error(&got.replied(), (1, 1, [0; 4]), &sent);
        let later = to_server(44, &fragment(next, 9, 8, true, &payload));
        assert_eq!(v6_in(&later, |_| {}), Seen::Drop(DropReason::ExtensionHeader));
    }
    // Whatever a fragment of a fragment is, it may be a later one of an error, about which nothing is said.
    let nested = fragment(58, 9, 8, false, &[0; 16]);
    let sent = to_server(44, &fragment(44, 9, 0, false, &nested));
    assert_eq!(v6_in(&sent, |_| {}), Seen::Drop(DropReason::ExtensionHeader));
}

#[test]
fn rfc7915_section_5_1_without_a_fragment_header_the_length_decides_about_df_and_each_has_its_number() {
    let translator = translator(|_| {});
    let mut numbers = std::collections::HashSet::new();
    for (payload, flags) in [(1240, 0x00), (1241, 0x40)] {
        for _ in 0..100 {
            let sent = to_server(6, &tcp(payload - 20));
            let got = run(&sent, |packet| translator.v6(&mut mapper(), packet)).forwarded();
            assert_eq!((got.len(), got[6], got[7]), (payload + 20, flags, 0));
            assert!(numbers.insert([got[4], got[5]]));
        }
    }
}

#[test]
fn rfc7915_section_5_1_1_a_fragment_keeps_its_place_and_half_its_number() {
    for (offset, more, flags) in [(0, true, [0x20, 0]), (1232, true, [0x20, 154]), (1232, false, [0, 154])] {
        let sent = to_server(44, &fragment(6, 0x8765_4321, offset, more, &tcp(1300)));
        let got = v6_in(&sent, |_| {}).forwarded();
        assert_eq!((&got[4..6], &got[6..8]), (&[0x43, 0x21][..], &flags[..]));
        assert_eq!(got.len(), 20 + 1320);
        assert_eq!(got[40..], sent[68..]);
        assert_eq!(got[20..40] == sent[48..68], offset > 0);
    }
    // One that is all of its packet is none, but keeps its number (RFC 6946).
    let sent = summed(to_server(44, &fragment(17, 0x8765_4321, 0, false, &udp(4))));
    let got = v6_in(&sent, |_| {}).forwarded();
    assert_eq!(got[4..8], [0x43, 0x21, 0, 0]);
    assert_eq!(transport_sum(&got), 0xffff);
}

#[test]
fn rfc7915_section_5_1_what_is_too_big_for_ipv4_is_refused_with_the_mtu_and_never_below_1280() {
    let small = |settings: &mut Settings| settings.mtu_v4 = 1400;
    let sent = to_server(6, &tcp(1361));
    let got = v6_in(&sent, small).replied();
    assert_eq!(got.len(), 1280);
    assert_v6_error(&got, (2, 0, [0, 0, 5, 0x8c]), &sent[..1232]);
    assert_eq!(v6_in(&to_server(6, &tcp(1360)), small).forwarded().len(), 1400);
    let sent = to_server(44, &fragment(6, 9, 0, true, &tcp(1361)));
    assert_v6_error(&v6_in(&sent, small).replied(), (2, 0, [0, 0, 5, 0x8c]), &sent[..1232]);
    // Below IPv6's least, routers of IPv4 fragment.
    let tiny = |settings: &mut Settings| settings.mtu_v4 = 576;
    let got = v6_in(&to_server(6, &tcp(1220)), tiny).forwarded();
    assert_eq!((got.len(), got[6]), (1260, 0));
    let sent = to_server(6, &tcp(1221));
    assert_v6_error(&v6_in(&sent, tiny).replied(), (2, 0, [0, 0, 5, 0]), &sent[..1232]);
}

#[test]
fn rfc7915_section_4_2_and_5_2_echoes_are_translated_with_a_right_checksum() {
    for (v4_kind, v6_kind) in [(8, 128), (0, 129)] {
        let message = icmp(v4_kind, 0, [0x12, 0x34, 0, 9], b"abcdefg");
        let got = v4_in(&summed(to_host(1, &message)), |_| {}).forwarded();
        assert_eq!((got[6], got[40], &got[44..]), (58, v6_kind, &message[4..]));
        assert_eq!(transport_sum(&got), 0xffff);
        let message = icmp(v6_kind, 0, [0x12, 0x34, 0, 9], b"abcdefg");
        let got = v6_in(&summed(to_server(58, &message)), |_| {}).forwarded();
        assert_eq!((got[9], got[20], &got[24..]), (1, v4_kind, &message[4..]));
        assert_eq!(transport_sum(&got), 0xffff);
    }
}

#[test]
fn rfc7915_section_4_2_and_5_2_single_hop_and_obsolete_messages_are_dropped() {
    for kind in [4, 5, 6, 9, 10, 13, 14, 15, 16, 17, 18, 40, 253] {
        let sent = summed(to_host(1, &icmp(kind, 0, [0; 4], &[0; 40])));
        assert_eq!(v4_in(&sent, |_| {}), Seen::Drop(DropReason::IcmpType), "{kind}");
    }
    for kind in [0, 5, 100, 127, 130, 131, 132, 133, 134, 135, 136, 137, 143, 255] {
        let sent = summed(to_server(58, &icmp(kind, 0, [0; 4], &[0; 60])));
        assert_eq!(v6_in(&sent, |_| {}), Seen::Drop(DropReason::IcmpType), "{kind}");
    }
}

#[test]
fn rfc7915_section_1_2_fragments_of_icmp_are_dropped() {
    for flags in [[0x20, 0], [0, 1]] {
        let sent = with(to_host(1, &icmp(8, 0, [0; 4], &[0; 16])), 6, &flags);
        assert_eq!(v4_in(&sent, |_| {}), Seen::Drop(DropReason::IcmpFragment));
    }
    for (offset, more) in [(0, true), (8, false)] {
        let sent = to_server(44, &fragment(58, 1, offset, more, &icmp(128, 0, [0; 4], &[0; 16])));
        assert_eq!(v6_in(&sent, |_| {}), Seen::Drop(DropReason::IcmpFragment));
    }
}

#[test]
fn rfc7915_section_4_2_and_5_2_every_error_goes_over_as_its_table_says() {
    let host_sent = summed(v4(HOST_V4, SERVER_V4, 17, &udp(9)));
    for (kind, code, rest, expected) in [
        (3, 0, [0; 4], Some((1, 0, [0; 4]))),
        (3, 2, [0; 4], Some((4, 1, [0, 0, 0, 6]))),
        (3, 3, [0; 4], Some((1, 4, [0; 4]))),
        (3, 4, [0, 0, 5, 0x78], Some((2, 0, [0, 0, 5, 0x8c]))),
        (3, 13, [0; 4], Some((1, 1, [0; 4]))),
        (3, 14, [0; 4], None),
        (11, 0, [0; 4], Some((3, 0, [0; 4]))),
        (11, 1, [0; 4], Some((3, 1, [0; 4]))),
        (12, 0, [9, 0, 0, 0], Some((4, 0, [0, 0, 0, 6]))),
        (12, 0, [4, 0, 0, 0], None),
        (12, 1, [0; 4], None),
    ] {
        let sent = summed(to_host(1, &icmp(kind, code, rest, &host_sent)));
        let got = v4_in(&sent, |_| {});
        let Some((kind, code, rest)) = expected else {
            assert_eq!(got, Seen::Drop(DropReason::IcmpType));
            continue;
        };
        let got = got.forwarded();
        assert_eq!((got[40], got[41], &got[44..48]), (kind, code, &rest[..]));
        assert_eq!(transport_sum(&got), 0xffff);
    }
    let server_sent = summed(v6(SERVER_V6, HOST_V6, 17, &udp(9)));
    for (kind, code, rest, expected) in [
        (1, 0, [0; 4], Some((3, 1, [0; 4]))),
        (1, 1, [0; 4], Some((3, 10, [0; 4]))),
        (1, 4, [0; 4], Some((3, 3, [0; 4]))),
        (1, 5, [0; 4], None),
        (2, 0, [0, 0, 5, 0], Some((3, 4, [0, 0, 4, 0xec]))),
        (3, 0, [0; 4], Some((11, 0, [0; 4]))),
        (4, 0, [0, 0, 0, 7], Some((12, 0, [8, 0, 0, 0]))),
        (4, 0, [0, 0, 0, 40], None),
        (4, 1, [0, 0, 0, 6], Some((3, 2, [0; 4]))),
        (4, 2, [0, 0, 0, 40], None),
    ] {
        let sent = summed(to_server(58, &icmp(kind, code, rest, &server_sent)));
        let got = v6_in(&sent, |_| {});
        let Some((kind, code, rest)) = expected else {
            assert_eq!(got, Seen::Drop(DropReason::IcmpType));
            continue;
        };
        let got = got.forwarded();
        assert_eq!((got[20], got[21], &got[24..28]), (kind, code, &rest[..]));
        assert_eq!(transport_sum(&got), 0xffff);
    }
}

#[test]
fn rfc7915_section_4_2_a_router_that_names_no_mtu_means_the_next_plateau() {
    let quoted = v4(HOST_V4, SERVER_V4, 6, &tcp(1480));
    let sent = summed(to_host(1, &icmp(3, 4, [0; 4], &quoted[..28])));
    let got = v4_in(&sent, |settings| settings.mtu_v6 = 9000).forwarded();
    assert_eq!(got[44..48], 1512_u32.to_be_bytes());
}

#[test]
fn rfc7915_section_4_3_the_quoted_packet_is_translated_and_its_ttl_kept() {
    for (protocol, body) in [
        (17, udp(9)),
        (6, tcp(9)),
        (132, vec![1; 30]),
        (1, icmp(8, 0, [1, 2, 3, 4], &[5; 9])),
    ] {
        let quoted = v4(HOST_V4, SERVER_V4, protocol, &body);
        let quoted = if protocol == 132 { quoted } else { summed(quoted) };
        let got = v4_in(&summed(to_host(1, &icmp(3, 3, [0; 4], &with(quoted, 8, &[1])))), |_| {}).forwarded();
        // What the host had sent, but for its hop limit.
        let body = if protocol == 1 {
            icmp(128, 0, [1, 2, 3, 4], &[5; 9])
        } else {
            body
        };
        let next = if protocol == 1 { 58 } else { protocol };
        let expected = v6(HOST_V6, SERVER_V6, next, &body);
        let expected = if protocol == 132 { expected } else { summed(expected) };
        assert_eq!(got[48..], with(expected, 7, &[1]), "{protocol}");
        assert_eq!(
            (got.len(), &got[4..6]),
            (got.len(), &(got.len() as u16 - 40).to_be_bytes()[..])
        );
        assert_eq!(transport_sum(&got), 0xffff);
    }
}

#[test]
fn rfc7915_section_5_3_the_quoted_packet_is_translated_and_its_hop_limit_kept() {
    for (protocol, body) in [
        (17, udp(9)),
        (6, tcp(9)),
        (132, vec![1; 30]),
        (58, icmp(129, 0, [1, 2, 3, 4], &[5; 9])),
    ] {
        let quoted = v6(SERVER_V6, HOST_V6, protocol, &body);
        let quoted = if protocol == 132 { quoted } else { summed(quoted) };
        let got = v6_in(
            &summed(to_server(58, &icmp(1, 4, [0; 4], &with(quoted, 7, &[3])))),
            |_| {},
        )
        .forwarded();
        let body = if protocol == 58 {
            icmp(0, 0, [1, 2, 3, 4], &[5; 9])
        } else {
            body
        };
        let next = if protocol == 58 { 1 } else { protocol };
        let expected = v4(SERVER_V4, HOST_V4, next, &body);
        let expected = if protocol == 132 { expected } else { summed(expected) };
        let expected = with(with(expected, 6, &[0]), 8, &[3]);
        assert_eq!(got[28..], expected, "{protocol}");
        assert_eq!(transport_sum(&got), 0xffff);
    }
}

#[test]
fn rfc7915_section_4_3_and_5_3_a_quoted_fragment_stays_one() {
    let quoted = with(v4(HOST_V4, SERVER_V4, 17, &[9; 24]), 4, &[0x12, 0x34, 0x20, 0xb9]);
    let got = v4_in(&summed(to_host(1, &icmp(11, 1, [0; 4], &quoted))), |_| {}).forwarded();
    assert_eq!(got[88..], fragment(17, 0x1234, 1480, true, &[9; 24]));
    assert_eq!((got[54], &got[52..54]), (44, &[0, 32][..]));
    let quoted = v6(SERVER_V6, HOST_V6, 44, &fragment(17, 0x1234, 1480, true, &[9; 24]));
    let got = v6_in(&summed(to_server(58, &icmp(3, 1, [0; 4], &quoted))), |_| {}).forwarded();
    assert_eq!(got[28..36], [0x45, 0, 0, 44, 0x12, 0x34, 0x20, 0xb9]);
    assert_eq!(got[48..], [9; 24]);
}

#[test]
fn rfc7915_section_4_3_and_5_3_an_error_about_an_error_is_dropped() {
    let inner = summed(v4(
        HOST_V4,
        SERVER_V4,
        1,
        &icmp(3, 3, [0; 4], &v4(SERVER_V4, HOST_V4, 17, &udp(4))),
    ));
    let sent = summed(to_host(1, &icmp(3, 3, [0; 4], &inner)));
    assert_eq!(v4_in(&sent, |_| {}), Seen::Drop(DropReason::IcmpQuotation));
    let inner = summed(v6(
        SERVER_V6,
        HOST_V6,
        58,
        &icmp(1, 4, [0; 4], &v6(HOST_V6, SERVER_V6, 17, &udp(4))),
    ));
    let sent = summed(to_server(58, &icmp(1, 4, [0; 4], &inner)));
    assert_eq!(v6_in(&sent, |_| {}), Seen::Drop(DropReason::IcmpQuotation));
}

#[test]
fn rfc1812_section_4_3_2_3_and_rfc4443_section_2_4_translated_errors_end_at_576_and_1280_octets() {
    let quoted = summed(v4(HOST_V4, SERVER_V4, 17, &udp(1400)));
    let got = v4_in(&summed(to_host(1, &icmp(3, 3, [0; 4], &quoted))), |_| {}).forwarded();
    assert_eq!((got.len(), &got[4..6]), (1280, &1240_u16.to_be_bytes()[..]));
    assert_eq!(
        got[52..54],
        1408_u16.to_be_bytes(),
        "the quoted length stays that of the whole"
    );
    assert_eq!(transport_sum(&got), 0xffff);
    let quoted = summed(v6(SERVER_V6, HOST_V6, 17, &udp(1180)));
    let got = v6_in(&summed(to_server(58, &icmp(1, 4, [0; 4], &quoted))), |_| {}).forwarded();
    assert_eq!((got.len(), &got[2..4]), (576, &576_u16.to_be_bytes()[..]));
    assert_eq!(got[30..32], 1208_u16.to_be_bytes());
    assert_eq!(transport_sum(&got), 0xffff);
}

#[test]
fn rfc4884_section_4_and_5_lengths_are_rescaled_padding_renewed_and_extensions_kept_whole() {
    let extension: Vec<u8> = (100..140).collect();
    let body = |quoted: &[u8], padded: usize| {
        let mut body = quoted.to_vec();
        body.resize(padded, 0);
        body.extend(&extension);
        body
    };
    // Quoted octets of UDP, the length in words as it came, and the length in words as it goes.
    for (payload, padded, words, expected) in [(104, 132, 33, 19), (78, 128, 32, 16), (0, 28, 7, 16)] {
        let quoted = summed(v4(HOST_V4, SERVER_V4, 17, &udp(payload)));
        let message = icmp(3, 3, [0, words, 0, 0], &body(&quoted, padded));
        let got = v4_in(&summed(to_host(1, &message)), |_| {}).forwarded();
        assert_eq!(got[44..48], [expected, 0, 0, 0]);
        let end = 48 + usize::from(expected) * 8;
        assert_eq!(got[end..], extension);
        let (quotation, padding) = got[48..end].split_at(48 + payload);
        assert_eq!(
            quotation,
            with(summed(v6(HOST_V6, SERVER_V6, 17, &udp(payload))), 7, &[64])
        );
        assert!(padding.iter().all(|octet| *octet == 0));
        assert_eq!(transport_sum(&got), 0xffff);
    }
    for (payload, padded, words, expected) in [(104, 152, 19, 33), (74, 128, 16, 32), (0, 48, 6, 32)] {
        let quoted = summed(v6(SERVER_V6, HOST_V6, 17, &udp(payload)));
        let message = icmp(3, 0, [words, 0, 0, 0], &body(&quoted, padded));
        let got = v6_in(&summed(to_server(58, &message)), |_| {}).forwarded();
        assert_eq!(got[24..28], [0, expected, 0, 0]);
        let end = 28 + usize::from(expected) * 4;
        assert_eq!(got[end..], extension);
        assert!(got[56 + payload..end].iter().all(|octet| *octet == 0));
        assert_eq!(transport_sum(&got), 0xffff);
    }
    // Packet Too Big has no place for a length: what it quotes ends with the quotation.
    let quoted = summed(v4(HOST_V4, SERVER_V4, 17, &udp(104)));
    let message = icmp(3, 4, [0, 33, 5, 0x78], &body(&quoted, 132));
    let got = v4_in(&summed(to_host(1, &message)), |_| {}).forwarded();
    assert_eq!((got.len(), &got[44..48]), (48 + 152, &1420_u32.to_be_bytes()[..]));
}

#[test]
fn rfc4884_section_5_1_an_extension_without_room_is_left_out_whole() {
    let quoted = summed(v4(HOST_V4, SERVER_V4, 17, &udp(100)));
    for (extension, kept) in [(1104, true), (1105, false)] {
        let mut body = quoted.clone();
        body.extend(vec![7; extension]);
        let got = v4_in(&summed(to_host(1, &icmp(3, 3, [0, 32, 0, 0], &body))), |_| {}).forwarded();
        let expected = if kept { (1280, 16) } else { (48 + 148, 0) };
        assert_eq!((got.len(), got[44]), expected);
        assert_eq!(transport_sum(&got), 0xffff);
    }
}

#[test]
fn rfc1812_section_4_3_2_7_no_error_about_errors_later_fragments_multicast_or_nobody() {
    let silent = |sent: &[u8]| {
        assert!(
            matches!(v4_in(&with(sent.to_vec(), 8, &[1]), |_| {}), Seen::Drop(_)),
            "{sent:?}"
        );
    };
    silent(&summed(to_host(
        1,
        &icmp(3, 3, [0; 4], &v4(HOST_V4, SERVER_V4, 17, &udp(4))),
    )));
    silent(&with(to_host(17, &udp(4)), 6, &[0, 9]));
    for destination in ["224.0.0.5", "255.255.255.255", "127.0.0.1", "0.0.0.0"] {
        silent(&v4(SERVER_V4, destination, 17, &udp(4)));
    }
    for source in ["0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255"] {
        silent(&v4(source, HOST_V4, 17, &udp(4)));
    }
    silent(&v4(SERVER_V4, HOST_V4, 1, &[]));
}

#[test]
fn rfc4443_section_2_4_no_error_about_errors_redirects_later_fragments_multicast_or_nobody() {
    let silent = |sent: &[u8]| {
        assert!(
            matches!(v6_in(&with(sent.to_vec(), 7, &[1]), |_| {}), Seen::Drop(_)),
            "{sent:?}"
        );
    };
    for kind in [1, 2, 3, 4, 100, 127, 137] {
        silent(&to_server(
            58,
            &icmp(kind, 0, [0; 4], &v6(SERVER_V6, HOST_V6, 17, &udp(4))),
        ));
    }
    silent(&to_server(44, &fragment(17, 1, 64, false, &udp(4))));
    silent(&to_server(58, &[]));
    silent(&v6(HOST_V6, "ff02::1", 17, &udp(4)));
    for source in ["::", "::1", "ff02::1", "fe80::1"] {
        silent(&v6(source, SERVER_V6, 17, &udp(4)));
    }
    // Who asks is answered, though.
    let sent = with(summed(to_server(58, &icmp(128, 0, [0; 4], &[]))), 7, &[1]);
    assert_v6_error(&v6_in(&sent, |_| {}).replied(), (3, 0, [0; 4]), &sent);
}

#[test]
fn rfc1812_section_4_3_2_8_errors_are_not_sent_when_they_are_switched_off() {
    let off = |settings: &mut Settings| settings.answer = false;
    let sent = with(to_host(17, &udp(4)), 8, &[1]);
    assert_eq!(v4_in(&sent, off), Seen::Drop(DropReason::HopLimit));
    let sent = with(to_server(17, &udp(4)), 7, &[1]);
    assert_eq!(v6_in(&sent, off), Seen::Drop(DropReason::HopLimit));
}

#[test]
fn rfc6864_section_4_1_errors_that_are_made_here_have_a_number_each() {
    let translator = translator(|_| {});
    let sent = with(to_host(17, &udp(4)), 8, &[1]);
    let numbers: std::collections::HashSet<[u8; 2]> = (0..1000)
        .map(|_| {
            let got = run(&sent, |packet| translator.v4(&mut mapper(), packet)).replied();
            [got[4], got[5]]
        })
        .collect();
    assert_eq!(numbers.len(), 1000);
}

#[test]
fn rfc6791_section_3_a_router_without_an_address_in_ipv4_reports_from_the_pool() {
    let quoted = v6(SERVER_V6, HOST_V6, 17, &udp(9));
    let report = |router: &str, stateless: &mut Stateless| {
        let sent = summed(v6(router, SERVER_V6, 58, &icmp(3, 0, [0; 4], &quoted)));
        run(&sent, |packet| translator(|_| {}).v6(stateless, packet))
    };
    let mut pool = mapper();
    let mut seen = std::collections::BTreeSet::new();
    for router in 0..64 {
        let router = format!("2001:db8:ffff::{router:x}");
        let got = report(&router, &mut pool).forwarded();
        assert_eq!(got[16..20], ip4(SERVER_V4).octets());
        assert_eq!(transport_sum(&got), 0xffff);
        assert_eq!(report(&router, &mut pool).forwarded()[12..16], got[12..16]);
        seen.insert(<[u8; 4]>::try_from(&got[12..16]).expect("an address"));
    }
    let expected = pool.reporters_v4.iter().map(Ipv4Addr::octets);
    assert_eq!(seen, expected.collect());
    pool.reporters_v4.clear();
    assert_eq!(report("2001:db8:ffff::1", &mut pool), Seen::Drop(DropReason::NotMapped));
}

#[test]
fn rfc6791_section_3_a_router_without_an_address_in_ipv6_reports_from_the_one_it_is_given() {
    let mut maps_only = Stateless {
        prefix: None,
        maps: Maps::new([
            map("198.51.100.0/24", "2001:db8:3::/120"),
            map("192.0.2.0/24", "2001:db8:4::/120"),
        ])
        .expect("maps"),
        ..mapper()
    };
    let quoted = v4(HOST_V4, SERVER_V4, 17, &udp(9));
    let sent = summed(v4("203.0.113.99", HOST_V4, 1, &icmp(11, 0, [0; 4], &quoted)));
    let got = run(&sent, |packet| translator(|_| {}).v4(&mut maps_only, packet)).forwarded();
    assert_eq!(got[8..24], ip6("2001:db8::6791").octets());
    maps_only.reporter_v6 = None;
    let got = run(&sent, |packet| translator(|_| {}).v4(&mut maps_only, packet));
    assert_eq!(got, Seen::Drop(DropReason::NotMapped));
}

#[test]
fn rfc7915_section_4_1_illegal_sources_report_errors_and_nothing_else() {
    for source in ["127.0.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255"] {
        let quoted = v4(HOST_V4, SERVER_V4, 17, &udp(9));
        let sent = summed(v4(source, HOST_V4, 1, &icmp(3, 3, [0; 4], &quoted)));
        let got = v4_in(&sent, |_| {}).forwarded();
        let prefix: crate::Pref64 = PREFIX.parse().expect("a prefix");
        assert_eq!(got[8..24], prefix.embed(ip4(source)).octets());
        let sent = summed(v4(source, HOST_V4, 17, &udp(9)));
        assert_eq!(v4_in(&sent, |_| {}), Seen::Drop(DropReason::Source));
    }
}

#[test]
fn rfc6052_section_3_1_the_well_known_prefix_carries_no_address_that_is_not_global() {
    let mut known = Stateless {
        prefix: Some(crate::Pref64::WELL_KNOWN),
        ..mapper()
    };
    let translator = translator(|_| {});
    let sent = v6(HOST_V6, "64:ff9b::10.0.0.1", 6, &tcp(0));
    let got = run(&sent, |packet| translator.v6(&mut known, packet));
    assert!(matches!(got, Seen::Reply(DropReason::NotGlobal, _)));
    assert_v6_error(&got.replied(), (1, 1, [0; 4]), &sent);
    let sent = v6(HOST_V6, "64:ff9b::8.8.8.8", 6, &tcp(0));
    let got = run(&sent, |packet| translator.v6(&mut known, packet)).forwarded();
    assert_eq!(got[16..20], [8, 8, 8, 8]);
    let sent = v4("10.0.0.1", HOST_V4, 6, &tcp(0));
    let got = run(&sent, |packet| translator.v4(&mut known, packet));
    assert_eq!(got, Seen::Drop(DropReason::NotGlobal));
    // A router's private address does not hide its errors.
    let sent = summed(v4(
        "10.0.0.1",
        HOST_V4,
        1,
        &icmp(11, 0, [0; 4], &v4(HOST_V4, "8.8.8.8", 17, &udp(4))),
    ));
    let got = run(&sent, |packet| translator.v4(&mut known, packet)).forwarded();
    assert_eq!(got[8..24], ip6("2001:db8::6791").octets());
}

#[test]
fn rfc7757_section_4_mapped_hosts_reach_each_other_under_the_prefix() {
    // 198.51.100.9 under the prefix is the host 2001:db8:3::9.
    let (peer, peer_v6) = ("2001:db8:1c6:3364:9::", "2001:db8:3::9");
    let seen_as = "2001:db8:1c6:3364:7::";
    for (protocol, body) in [(17, udp(9)), (6, tcp(9)), (58, icmp(128, 0, [1, 2, 3, 4], &[5]))] {
        let sent = summed(v6(HOST_V6, peer, protocol, &body));
        let expected = with(summed(v6(seen_as, peer_v6, protocol, &body)), 7, &[63]);
        assert_eq!(v6_in(&sent, |_| {}).forwarded(), expected);
    }
    let quoted = summed(v6(seen_as, peer_v6, 17, &udp(9)));
    let sent = summed(v6(peer_v6, seen_as, 58, &icmp(1, 4, [0; 4], &quoted)));
    let quoted = summed(v6(HOST_V6, peer, 17, &udp(9)));
    let expected = with(summed(v6(peer, HOST_V6, 58, &icmp(1, 4, [0; 4], &quoted))), 7, &[63]);
    assert_eq!(v6_in(&sent, |_| {}).forwarded(), expected);
}

#[test]
fn rfc7915_section_6_addresses_that_nobody_knows_are_dropped_in_silence() {
    for sent in [
        v6("2001:db9::1", SERVER_V6, 6, &tcp(0)),
        v6(HOST_V6, "2001:db9::1", 6, &tcp(0)),
    ] {
        assert_eq!(v6_in(&sent, |_| {}), Seen::Drop(DropReason::NotMapped));
    }
}

/// A table of sessions on an address that it shares with a host: port 4000 is a session's, and all else the host's.
#[derive(Default)]
struct Shared {
    asked: u32,
}

impl Mapper for Shared {
    fn knows_v4(&self, flow: &Flow<Ipv4Addr>) -> bool {
        matches!(flow.ends.ports, Ports::Pair { destination: 4000, .. })
    }

    fn knows_v6(&self, flow: &Flow<Ipv6Addr>) -> bool {
        flow.ends.source == ip6(HOST_V6)
    }

    fn to_v4(&mut self, flow: &Flow<Ipv6Addr>) -> MappedV4 {
        self.asked += 1;
        mapper().to_v4(flow)
    }

    fn to_v6(&mut self, flow: &Flow<Ipv4Addr>) -> Result<Ends<Ipv6Addr>, Refusal> {
        self.asked += 1;
        match self.knows_v4(flow) {
            true => mapper().to_v6(flow),
            false => Err(DropReason::NotMapped.into()),
        }
    }

    fn error_to_v4(
        &mut self,
        source: Ipv6Addr,
        destination: Ipv6Addr,
        flow: &Flow<Ipv6Addr>,
    ) -> Result<Exit<Quotation<Ipv4Addr>, Quotation<Ipv6Addr>>, Refusal> {
        mapper().error_to_v4(source, destination, flow)
    }

    fn error_to_v6(
        &mut self,
        source: Ipv4Addr,
        destination: Ipv4Addr,
        flow: &Flow<Ipv4Addr>,
    ) -> Result<Quotation<Ipv6Addr>, Refusal> {
        match flow.ends.ports {
            Ports::Pair { source: 4000, .. } => mapper().error_to_v6(source, destination, flow),
            _ => Err(DropReason::NotMapped.into()),
        }
    }
}

type MappedV4 = Result<Exit<Ends<Ipv4Addr>, Ends<Ipv6Addr>>, Refusal>;

#[test]
fn what_is_wrong_with_a_packet_for_nobody_here_is_not_our_business() {
    let mut shared = Shared::default();
    let mut run_v4 = |packet: &[u8], ports| {
        run(packet, |packet| {
            translator(|_| {}).v4(&mut shared, packet.with_ports(ports))
        })
    };
    // To a port of the host's: what is wrong with it is for the host to see.
    let others = |protocol, body: Vec<u8>| to_host(protocol, &[&[9, 9, 9, 9][..], &body[4..]].concat());
    let source_route = {
        let mut packet = others(17, udp(4));
        packet.splice(20..20, [131, 7, 4, 192, 0, 2, 1, 0]);
        packet[0] = 0x47;
        let total = packet.len() as u16;
        with(packet, 2, &total.to_be_bytes())
    };
    let about_others = v4(HOST_V4, SERVER_V4, 17, &[&[9, 9, 9, 9][..], &udp(9)[4..]].concat());
    for sent in [
        with(others(17, udp(4)), 8, &[1]),
        others(6, tcp(3000)),
        source_route,
        // The first fragment of a datagram without a checksum, and a later one.
        with(others(17, udp(4)), 6, &[0x20, 0]),
        with(with(to_host(17, &udp(4)), 6, &[0, 9]), 8, &[1]),
        to_host(1, &icmp(13, 0, [0; 4], &[0; 12])),
        with(to_host(1, &icmp(8, 0, [0; 4], &[0; 12])), 6, &[0x20, 0]),
        to_host(44, &[0; 20]),
        to_host(1, &icmp(3, 3, [0; 4], &[0; 12])),
        with(to_host(1, &icmp(11, 0, [0; 4], &about_others)), 8, &[1]),
    ] {
        assert_eq!(
            run_v4(&sent, Ports::None),
            Seen::Drop(DropReason::NotMapped),
            "{sent:?}"
        );
    }
    // To one of ours it is ours, and told.
    let ours = Ports::Pair {
        source: 2000,
        destination: 4000,
    };
    let sent = with(to_host(17, &udp(4)), 8, &[1]);
    assert_v4_error(&run_v4(&sent, Ports::None).replied(), (11, 0, [0; 4]), &sent);
    let sent = with(with(to_host(17, &udp(4)), 6, &[0, 9]), 8, &[1]);
    assert_eq!(run_v4(&sent, ours), Seen::Drop(DropReason::HopLimit));
    let about_ours = v4(HOST_V4, SERVER_V4, 17, &[&[0x0f, 0xa0][..], &udp(9)[2..]].concat());
    let sent = to_host(1, &icmp(11, 0, [0; 4], &about_ours));
    run_v4(&sent, Ports::None).forwarded();
    assert_eq!(
        run_v4(&with(sent, 8, &[1]), Ports::None),
        Seen::Drop(DropReason::HopLimit)
    );
    let mut run_v6 = |packet: &[u8]| run(packet, |packet| translator(|_| {}).v6(&mut shared, packet));
    let sent = with(to_server(6, &tcp(4)), 7, &[1]);
    assert_v6_error(&run_v6(&sent).replied(), (3, 0, [0; 4]), &sent);
    let sent = with(v6("2001:db8:3::8", SERVER_V6, 6, &tcp(4)), 7, &[1]);
    assert_eq!(run_v6(&sent), Seen::Drop(DropReason::NotMapped));
    assert_eq!(
        shared.asked, 0,
        "no packet that does not go on makes or renews a session"
    );
}

#[test]
fn rfc6146_section_3_4_a_later_fragment_is_mapped_by_the_ports_that_it_is_given() {
    let ours = Ports::Pair {
        source: 2000,
        destination: 4000,
    };
    let mut shared = Shared::default();
    let sent = with(to_host(17, &udp(4)), 6, &[0, 9]);
    let mut seen = |packet: &[u8], ports| {
        run(packet, |packet| {
            translator(|_| {}).v4(&mut shared, packet.with_ports(ports))
        })
    };
    assert_eq!(seen(&sent, Ports::None), Seen::Drop(DropReason::NotMapped));
    assert_eq!(
        seen(&sent, ours).forwarded()[48..],
        sent[20..],
        "nothing is written into it"
    );
    // The ports in a packet are those in it.
    let other = summed(to_host(17, &[&[9, 9, 9, 9][..], &udp(9)[4..]].concat()));
    assert_eq!(seen(&other, ours), Seen::Drop(DropReason::NotMapped));
}

#[test]
fn rfc6946_section_4_a_fragment_that_is_all_of_its_packet_is_mapped_as_none() {
    struct Whole;
    impl Mapper for Whole {
        fn to_v4(&mut self, flow: &Flow<Ipv6Addr>) -> MappedV4 {
            assert_eq!(flow.fragment, None);
            assert_ne!(flow.ends.ports, Ports::None);
            mapper().to_v4(flow)
        }

        fn to_v6(&mut self, flow: &Flow<Ipv4Addr>) -> Result<Ends<Ipv6Addr>, Refusal> {
            mapper().to_v6(flow)
        }

        fn error_to_v4(
            &mut self,
            source: Ipv6Addr,
            destination: Ipv6Addr,
            flow: &Flow<Ipv6Addr>,
        ) -> Result<Exit<Quotation<Ipv4Addr>, Quotation<Ipv6Addr>>, Refusal> {
            mapper().error_to_v4(source, destination, flow)
        }

        fn error_to_v6(
            &mut self,
            source: Ipv4Addr,
            destination: Ipv4Addr,
            flow: &Flow<Ipv4Addr>,
        ) -> Result<Quotation<Ipv6Addr>, Refusal> {
            mapper().error_to_v6(source, destination, flow)
        }
    }
    for (protocol, body) in [(17, udp(4)), (58, icmp(128, 0, [0; 4], &[]))] {
        let sent = summed(to_server(44, &fragment(protocol, 7, 0, false, &body)));
        run(&sent, |packet| translator(|_| {}).v6(&mut Whole, packet)).forwarded();
    }
}

#[test]
fn rfc7915_section_4_and_5_packets_of_a_flow_leave_in_the_order_in_which_they_came() {
    let (mut random, translator) = (Random::new(41), translator(|_| {}));
    let (mut there, mut back) = (Vec::new(), Vec::new());
    for number in 0..5000_u16 {
        // Long ones in several pieces, which nothing comes between.
        let datagram = [&udp(2)[..], &vec![0; random.below(3000)]].concat();
        let sent = with(with(to_host(17, &datagram), 4, &number.to_be_bytes()), 6, &[0, 0]);
        let sent = with(with(sent, 26, &[1, 1]), 28, &number.to_be_bytes());
        let Seen::Forward(pieces) = run(&sent, |packet| translator.v4(&mut mapper(), packet)) else {
            panic!("not forwarded")
        };
        let whole = reassembled(&pieces, number.into());
        there.push([whole[48], whole[49]]);
        let sent = with(to_server(17, &udp(2)), 48, &number.to_be_bytes());
        let got = run(&with(sent, 46, &[1, 1]), |packet| translator.v6(&mut mapper(), packet)).forwarded();
        back.push([got[28], got[29]]);
    }
    let expected: Vec<_> = (0..5000).map(u16::to_be_bytes).collect();
    assert!(there == expected && back == expected);
}

#[test]
fn rfc7915_section_4_a_fragment_with_df_is_told_the_mtu_of_the_path() {
    let sent = with(to_host(17, &[7; 1480]), 6, &[0x40, 185]);
    let got = v4_in(&with(sent, 6, &[0x60, 0]), |_| {});
    let Seen::Reply(DropReason::TooBig, got) = got else {
        panic!("{got:?}")
    };
    assert_eq!(got[26..28], 1480_u16.to_be_bytes());
    let sent = with(to_host(17, &[7; 1452]), 6, &[0x60, 0]);
    assert_eq!(v4_in(&sent, |_| {}).forwarded().len(), 1500);
}

#[test]
fn rfc791_section_3_2_no_fragment_reaches_beyond_the_longest_packet_of_either_version() {
    let sent = with(to_host(17, &[7; 8]), 6, &8189_u16.to_be_bytes());
    assert_eq!(v4_in(&sent, |_| {}), Seen::Drop(DropReason::FragmentEnd));
    let sent = with(to_host(17, &[7; 3]), 6, &8189_u16.to_be_bytes());
    assert_eq!(v4_in(&sent, |_| {}).forwarded().len(), 51);
    for (offset, length) in [(65_528, 8), (65_512, 4)] {
        let sent = to_server(44, &fragment(17, 1, offset, false, &[7; 8][..length]));
        assert_eq!(v6_in(&sent, |_| {}), Seen::Drop(DropReason::FragmentEnd));
    }
    let sent = to_server(44, &fragment(17, 1, 65_512, false, &[7; 3]));
    assert_eq!(v6_in(&sent, |_| {}).forwarded().len(), 23);
}

#[test]
fn packets_that_are_not_whole_are_dropped_and_what_follows_them_is_cut_off() {
    let translator = translator(|_| {});
    for whole in [summed(to_host(6, &tcp(40))), summed(to_server(6, &tcp(40)))] {
        let translate = |bytes: &[u8]| run(bytes, |packet| translator.translate(&mut mapper(), packet));
        for length in 0..whole.len() {
            assert_eq!(
                translate(&whole[..length]),
                Seen::Drop(DropReason::Malformed),
                "{length}"
            );
        }
        let plain = translate(&whole).forwarded();
        let mut trailed = whole.clone();
        trailed.extend([0; 6]);
        assert_eq!(translate(&trailed).forwarded()[12..], plain[12..]);
    }
    let mut wrong = to_host(6, &tcp(0));
    wrong[10] ^= 1;
    assert_eq!(v4_in(&wrong, |_| {}), Seen::Drop(DropReason::HeaderChecksum));
}

#[test]
fn virtio_section_5_1_6_an_unfinished_checksum_and_long_segments_stay_the_devices_work() {
    let gso = |size| Offload {
        partial: true,
        segment: std::num::NonZeroU16::new(size),
    };
    let translator = translator(|settings| settings.mtu_v6 = 1400);
    // Only the sum of the pseudo-header stands in the field.
    let unfinished = |packet: Vec<u8>, at: usize| {
        let mut zeroed = packet.clone();
        zeroed[at..].fill(0);
        with(packet, at + 16, &transport_sum(&zeroed).to_be_bytes())
    };
    let finished = |mut packet: Vec<u8>, at: usize| {
        let sum = !reference_sum(&packet[at..]);
        packet[at + 16..at + 18].copy_from_slice(&sum.to_be_bytes());
        transport_sum(&packet)
    };
    let sent = unfinished(to_host(6, &tcp(20_000)), 20);
    let (got, left) = run_offloaded(&sent, gso(1448), |packet| translator.v4(&mut mapper(), packet));
    // Shorter segments rather than a refusal: 1400 less the headers.
    assert_eq!(left, gso(1340));
    let got = got.forwarded();
    assert_eq!((got.len(), finished(got, 40)), (20_060, 0xffff));
    let sent = unfinished(to_server(6, &tcp(20_000)), 40);
    let (got, left) = run_offloaded(&sent, gso(1220), |packet| translator.v6(&mut mapper(), packet));
    assert_eq!(left, gso(1220));
    let got = got.forwarded();
    assert_eq!((got.len(), got[6], finished(got, 20)), (20_040, 0, 0xffff));
    let (got, _) = run_offloaded(&sent, gso(1221), |packet| translator.v6(&mut mapper(), packet));
    assert_eq!(got.forwarded()[6], 0x40);
    // Datagrams cannot be made shorter.
    let sent = to_host(17, &udp(6000));
    let (got, _) = run_offloaded(&sent, gso(1400), |packet| translator.v4(&mut mapper(), packet));
    assert!(matches!(got, Seen::Reply(DropReason::TooBig, _)));
    let (got, _) = run_offloaded(&with(sent, 6, &[0, 0]), gso(1400), |packet| {
        translator.v4(&mut mapper(), packet)
    });
    assert_eq!(got, Seen::Drop(DropReason::NeedsSegmentation));
}

#[test]
fn rfc2923_section_2_1_syn_names_a_segment_size_that_both_sides_carry_if_asked_to() {
    let mut segment = tcp(0);
    (segment[12], segment[13]) = (0x60, 0x02);
    segment.extend([2, 4, 0x23, 0x28]);
    for (mtu_v4, mtu_v6, on, expected) in [
        (1500, 1500, false, 9000),
        (1500, 1500, true, 1440),
        (1400, 1500, true, 1360),
        (1500, 1280, true, 1220),
        (1480, 1500, true, 1440),
        (65_535, 65_535, true, 9000),
    ] {
        let set = |settings: &mut Settings| {
            (settings.mtu_v4, settings.mtu_v6, settings.clamp_mss) = (mtu_v4, mtu_v6, on);
        };
        let got = v4_in(&summed(to_host(6, &segment)), set).forwarded();
        assert_eq!(got[62..64], u16::to_be_bytes(expected));
        assert_eq!(transport_sum(&got), 0xffff);
        let got = v6_in(&summed(to_server(6, &segment)), set).forwarded();
        assert_eq!(got[42..44], u16::to_be_bytes(expected));
        assert_eq!(transport_sum(&got), 0xffff);
        // What turns back to IPv6 is no longer than what IPv4 takes, either.
        let got = v6_in(&summed(v6(HOST_V6, "2001:db8:1c6:3364:9::", 6, &segment)), set).forwarded();
        assert_eq!(got[62..64], u16::to_be_bytes(expected));
        assert_eq!((got[6], transport_sum(&got)), (6, 0xffff));
        // Wrong it stays, and as wrong.
        let wrong = with(to_server(6, &segment), 56, &[0x12, 0x34]);
        let got = v6_in(&wrong, set).forwarded();
        assert_eq!(transport_sum(&got), transport_sum(&wrong));
        // What a device is to finish is finished right.
        let partial = Offload {
            partial: true,
            segment: None,
        };
        let mut pseudo = to_server(6, &segment);
        pseudo[40..].fill(0);
        let sent = with(to_server(6, &segment), 56, &transport_sum(&pseudo).to_be_bytes());
        let (got, left) = run_offloaded(&sent, partial, |packet| translator(set).v6(&mut mapper(), packet));
        let mut got = got.forwarded();
        let sum = !reference_sum(&got[20..]);
        got[36..38].copy_from_slice(&sum.to_be_bytes());
        assert_eq!((transport_sum(&got), left), (0xffff, partial));
    }
}

#[test]
fn what_is_fragmented_here_has_its_checksum_finished_before() {
    let sent = with(to_host(17, &udp(3000)), 6, &[0, 0]);
    let mut zeroed = sent.clone();
    zeroed[20..].fill(0);
    let sent = with(sent, 26, &transport_sum(&zeroed).to_be_bytes());
    let partial = Offload {
        partial: true,
        segment: None,
    };
    let (got, left) = run_offloaded(&sent, partial, |packet| translator(|_| {}).v4(&mut mapper(), packet));
    let Seen::Forward(all) = got else { panic!("{got:?}") };
    assert_eq!(transport_sum(&reassembled(&all, 0)), 0xffff);
    assert_eq!(left, Offload::default());
}

fn v4_in(packet: &[u8], change: impl FnOnce(&mut Settings)) -> Seen {
    run(packet, |packet| translator(change).v4(&mut mapper(), packet))
}

fn v6_in(packet: &[u8], change: impl FnOnce(&mut Settings)) -> Seen {
    run(packet, |packet| translator(change).v6(&mut mapper(), packet))
}

pub(super) fn translator(change: impl FnOnce(&mut Settings)) -> Translator {
    let mut settings = Settings {
        address_v4: ip4(OWN_V4),
        address_v6: ip6(OWN_V6),
        mtu_v4: 1500,
        mtu_v6: 1500,
        lowest_ipv6_mtu: 1280,
        copy_class: true,
        sum_udp: true,
        clamp_mss: false,
        answer: true,
    };
    change(&mut settings);
    Translator::new(settings, [1, 2])
}

pub(super) fn mapper() -> Stateless {
    Stateless {
        prefix: Some(PREFIX.parse().expect("a prefix")),
        maps: Maps::new([map("198.51.100.0/24", "2001:db8:3::/120")]).expect("maps"),
        reporters_v4: vec![ip4("203.0.113.8"), ip4("203.0.113.9"), ip4("203.0.113.10")],
        reporter_v6: Some(ip6("2001:db8::6791")),
    }
}

fn map(v4: &str, v6: &str) -> Map {
    Map::new(v4.parse().expect("a net"), v6.parse().expect("a net")).expect("a map")
}

/// From the server to the host.
fn to_host(protocol: u8, payload: &[u8]) -> Vec<u8> {
    v4(SERVER_V4, HOST_V4, protocol, payload)
}

/// From the host to the server.
fn to_server(protocol: u8, payload: &[u8]) -> Vec<u8> {
    v6(HOST_V6, SERVER_V6, protocol, payload)
}

fn assert_v4_error(got: &[u8], (kind, code, rest): (u8, u8, [u8; 4]), quoted: &[u8]) {
    assert_eq!(got[..2], [0x45, 0xc0]);
    assert_eq!(got[2..4], (got.len() as u16).to_be_bytes());
    assert_eq!((&got[6..8], got[8], got[9]), (&[0, 0][..], 64, 1));
    assert_eq!(
        (&got[12..16], &got[16..20]),
        (&ip4(OWN_V4).octets()[..], &quoted[12..16])
    );
    assert_eq!((got[20], got[21], &got[24..28]), (kind, code, &rest[..]));
    assert_eq!(&got[28..], quoted);
    assert_eq!((reference_sum(&got[..20]), transport_sum(got)), (0xffff, 0xffff));
}

fn assert_v6_error(got: &[u8], (kind, code, rest): (u8, u8, [u8; 4]), quoted: &[u8]) {
    assert_eq!(got[..4], [0x60, 0, 0, 0]);
    assert_eq!(got[4..6], (got.len() as u16 - 40).to_be_bytes());
    assert_eq!((got[6], got[7]), (58, 64));
    assert_eq!((&got[8..24], &got[24..40]), (&ip6(OWN_V6).octets()[..], &quoted[8..24]));
    assert_eq!((got[40], got[41], &got[44..48]), (kind, code, &rest[..]));
    assert_eq!(&got[48..], quoted);
    assert_eq!(transport_sum(got), 0xffff);
}

/// The IPv6 packet that these are in order, which must have this identification if they are several.
fn reassembled(pieces: &[Vec<u8>], id: u32) -> Vec<u8> {
    let [first, ..] = pieces else { panic!("no pieces") };
    if pieces.len() == 1 {
        return first.clone();
    }
    let (mut whole, mut payload) = (first[..40].to_vec(), Vec::<u8>::new());
    whole[6] = first[40];
    for (place, piece) in pieces.iter().enumerate() {
        let more = place + 1 < pieces.len();
        assert_eq!(piece[4..6], (piece.len() as u16 - 40).to_be_bytes());
        assert_eq!(piece[40..48], fragment(first[40], id, payload.len() as u16, more, &[]));
        assert!(!more || piece.len() % 8 == 0);
        payload.extend(&piece[48..]);
    }
    whole[4..6].copy_from_slice(&(payload.len() as u16).to_be_bytes());
    whole.extend(payload);
    whole
}
