//! Fragments one by one on a virtual clock, and against a model that is too simple to be wrong.

use std::collections::{BTreeMap, HashSet};

use super::*;
use crate::nat64::testing::{Random, fragment, icmp, tcp, udp, v4, v6, with};

const HOST: &str = "2001:db8:3::7";
const SERVER: &str = "2001:db8:1c0:2:21::";
/// Those of [`udp`] and [`tcp`].
const PORTS: Ports = Ports::Pair {
    source: 2000,
    destination: 4000,
};

#[test]
fn rfc6146_section_3_4_fragments_in_order_pass_with_the_ports_of_the_first() {
    for packets in [in_three(6, 1), in_three(17, 1), in_three_v4(1)] {
        let mut fragments = all();
        for packet in &packets {
            assert_eq!(fragments.seen(0, packet), Fate::Pass(PORTS));
            assert_eq!(released(&mut fragments), []);
        }
        // All of it came: nothing is remembered.
        assert_eq!(fragments.check(), [0, 0, 0]);
    }
}

#[test]
fn rfc6146_section_3_4_fragments_before_the_first_are_held_and_released_in_order_of_arrival() {
    for (before, after) in [(&[2, 1][..], &[][..]), (&[1, 2], &[]), (&[1], &[2]), (&[2], &[1])] {
        let mut fragments = all();
        let packets = in_three(17, 1);
        for place in before {
            assert_eq!(fragments.seen(0, &packets[*place]), Fate::Held);
            assert_eq!(released(&mut fragments), []);
        }
        assert_eq!(fragments.seen(0, &packets[0]), Fate::Pass(PORTS));
        let held: Vec<_> = before.iter().map(|place| (packets[*place].clone(), PORTS)).collect();
        assert_eq!(released(&mut fragments), held);
        for place in after {
            assert_eq!(fragments.seen(0, &packets[*place]), Fate::Pass(PORTS));
        }
        assert_eq!((fragments.check(), fragments.lost()), ([0, 0, 0], 0));
    }
}

#[test]
fn packets_between_the_same_ends_are_told_apart_by_number_protocol_and_version() {
    let mut fragments = all();
    let packets = [in_three(17, 1), in_three(17, 2), in_three(6, 1), in_three_v4(1)];
    for piece in [2, 1] {
        for packet in &packets {
            assert_eq!(fragments.seen(0, &packet[piece]), Fate::Held);
        }
    }
    for packet in packets {
        assert_eq!(fragments.seen(0, &packet[0]), Fate::Pass(PORTS));
        let expected = [2, 1].map(|piece| (packet[piece].clone(), PORTS));
        assert_eq!(released(&mut fragments), expected);
    }
    assert_eq!(fragments.check(), [0, 0, 0]);
}

#[test]
fn what_is_released_late_is_released_all_the_same() {
    let mut fragments = all();
    for id in [1, 2] {
        fragments.seen(0, &in_three(17, id)[1]);
        fragments.seen(0, &in_three(17, id)[0]);
    }
    assert_eq!(fragments.seen(0, &in_three(17, 1)[2]), Fate::Pass(PORTS));
    let expected = [1, 2].map(|id| (in_three(17, id)[1].clone(), PORTS));
    assert_eq!(released(&mut fragments), expected);
    // The first is complete, the other is not.
    assert_eq!(fragments.check(), [1, 2, 0]);
}

#[test]
fn what_has_no_room_where_it_is_released_to_is_lost() {
    let mut fragments = all();
    let packets = in_three(17, 1);
    for place in [1, 2, 0] {
        fragments.seen(0, &packets[place]);
    }
    let mut small = vec![0; packets[2].len()];
    assert!(packets[1].len() > small.len());
    assert_eq!(fragments.released(&mut small), Some((small.len(), PORTS)));
    assert_eq!(small, packets[2]);
    assert_eq!((fragments.released(&mut small), fragments.lost()), (None, 1));
    assert_eq!(fragments.check(), [0, 0, 0]);
}

#[test]
fn rfc6146_section_3_4_all_is_forgotten_two_seconds_after_the_first_that_came() {
    let packets = in_three(17, 1);
    let mut fragments = all();
    assert_eq!(fragments.seen(1000, &packets[2]), Fate::Held);
    assert_eq!(fragments.seen(2999, &packets[1]), Fate::Held);
    // Just in time, and too late.
    assert_eq!(fragments.seen(2999, &packets[0]), Fate::Pass(PORTS));
    assert_eq!(released(&mut fragments).len(), 2);
    assert_eq!(fragments.seen(4000, &packets[2]), Fate::Held);
    assert_eq!(fragments.seen(6000, &packets[0]), Fate::Pass(PORTS));
    assert_eq!((released(&mut fragments), fragments.lost()), (Vec::new(), 1));
    // The ports are forgotten, too.
    assert_eq!(fragments.seen(7999, &packets[1]), Fate::Pass(PORTS));
    assert_eq!(fragments.seen(8000, &packets[2]), Fate::Held);
    // A clock that goes back does no harm.
    assert_eq!(fragments.seen(0, &packets[1]), Fate::Held);
    fragments.seen(u64::MAX, &[]);
    assert_eq!(fragments.check(), [0, 0, 0]);
}

#[test]
fn rfc5722_section_4_fragments_that_overlap_condemn_their_packet_and_what_comes_later_of_it() {
    let body = udp(64);
    let piece = |id, from: usize, to: usize| {
        let more = to < body.len();
        v6(HOST, SERVER, 44, &fragment(17, id, from as u16, more, &body[from..to]))
    };
    // With 72 octets in all: what came, and what does not go with it.
    for (came, other) in [
        (0..24, 16..32),
        (16..32, 8..24),
        (16..32, 8..40),
        (16..40, 24..32),
        (16..32, 16..24),
        (16..24, 16..32),
        (0..24, 0..32),
        (16..72, 24..72),
    ] {
        let mut fragments = all();
        let first = fragments.seen(0, &piece(1, came.start, came.end));
        let expected = if came.start == 0 { Fate::Pass(PORTS) } else { Fate::Held };
        assert_eq!(first, expected);
        let refused = Fate::Refuse(DropReason::FragmentOverlap);
        assert_eq!(
            fragments.seen(0, &piece(1, other.start, other.end)),
            refused,
            "{came:?} {other:?}"
        );
        assert_eq!(fragments.check(), [1, 0, 0]);
        for (from, to) in [(0, 16), (40, 48), (48, 72)] {
            assert_eq!(fragments.seen(1999, &piece(1, from, to)), refused);
        }
        assert_eq!(released(&mut fragments), []);
        // Other packets are none the worse for it, nor is this one when it comes again later.
        assert_eq!(fragments.seen(1999, &piece(2, 0, 16)), Fate::Pass(PORTS));
        assert_eq!(fragments.seen(2000, &piece(1, 0, 16)), Fate::Pass(PORTS));
    }
}

#[test]
fn rfc8200_section_4_5_a_packet_ends_in_one_place() {
    let body = [7; 80];
    let piece = |from: u16, length: usize, more| v6(HOST, SERVER, 44, &fragment(17, 1, from, more, &body[..length]));
    for (one, other) in [
        (piece(64, 8, false), piece(72, 8, false)),
        (piece(64, 8, false), piece(72, 8, true)),
        (piece(64, 8, false), piece(32, 8, false)),
        (piece(64, 8, false), piece(64, 8, true)),
        (piece(64, 8, true), piece(64, 8, false)),
        (piece(64, 8, true), piece(32, 8, false)),
    ] {
        let mut fragments = all();
        assert_eq!(fragments.seen(0, &one), Fate::Held);
        assert_eq!(fragments.seen(0, &other), Fate::Refuse(DropReason::FragmentOverlap));
    }
}

#[test]
fn rfc8200_section_4_5_a_fragment_that_came_before_is_dropped_and_does_no_harm() {
    let mut fragments = all();
    let packets = in_three(17, 1);
    let again = Fate::Refuse(DropReason::FragmentDuplicate);
    assert_eq!(fragments.seen(0, &packets[1]), Fate::Held);
    assert_eq!(fragments.seen(0, &packets[1]), again);
    assert_eq!(fragments.seen(0, &packets[0]), Fate::Pass(PORTS));
    // With other ports, too: nobody opens two flows with one packet.
    assert_eq!(fragments.seen(0, &with(packets[0].clone(), 48, &[9, 9])), again);
    assert_eq!(released(&mut fragments), [(packets[1].clone(), PORTS)]);
    assert_eq!(fragments.seen(0, &packets[2]), Fate::Pass(PORTS));
    assert_eq!(fragments.check(), [0, 0, 0]);
}

#[test]
fn rfc791_section_3_2_lengths_and_ends_that_no_fragment_has_are_refused() {
    let mut fragments = all();
    let six = |offset, more, length| v6(HOST, SERVER, 44, &fragment(17, 1, offset, more, &[7; 80][..length]));
    let four = |flags: u16, length| {
        with(
            v4("192.0.2.33", "198.51.100.7", 17, &[7; 80][..length]),
            6,
            &flags.to_be_bytes(),
        )
    };
    for (packet, reason) in [
        (six(0, true, 20), DropReason::FragmentLength),
        (six(80, true, 17), DropReason::FragmentLength),
        (six(80, false, 0), DropReason::FragmentLength),
        (six(80, true, 0), DropReason::FragmentLength),
        (four(0x200a, 20), DropReason::FragmentLength),
        (four(10, 0), DropReason::FragmentLength),
        (six(65_528, false, 8), DropReason::FragmentEnd),
        (six(65_528, true, 8), DropReason::FragmentEnd),
        (four(8191, 1), DropReason::FragmentEnd),
        // 65,512 octets, 20 of a header, and 4 too many.
        (four(8189, 8), DropReason::FragmentEnd),
    ] {
        assert_eq!(fragments.seen(0, &packet), Fate::Refuse(reason), "{packet:?}");
    }
    assert_eq!(fragments.check(), [0, 0, 0]);
    assert_eq!(fragments.seen(0, &six(65_528, false, 7)), Fate::Held);
    assert_eq!(fragments.seen(0, &four(8189, 3)), Fate::Held);
}

#[test]
fn rfc1858_section_3_a_first_fragment_without_its_whole_transport_header_is_refused() {
    let mut fragments = all();
    let optioned = with(tcp(20), 12, &[0x80]);
    for tiny in [tcp(4)[..8].to_vec(), tcp(4)[..16].to_vec(), optioned[..24].to_vec()] {
        let packet = v6(HOST, SERVER, 44, &fragment(6, 1, 0, true, &tiny));
        assert_eq!(fragments.seen(0, &packet), Fate::Refuse(DropReason::FragmentTiny));
    }
    assert_eq!(fragments.check(), [0, 0, 0]);
    let whole = [(6, tcp(4)), (6, optioned[..32].to_vec()), (17, udp(0))];
    for (id, (protocol, body)) in (2..).zip(whole) {
        let packet = v6(HOST, SERVER, 44, &fragment(protocol, id, 0, true, &body));
        assert_eq!(fragments.seen(0, &packet), Fate::Pass(PORTS));
    }
}

#[test]
fn what_is_no_fragment_or_has_no_ports_passes_and_leaves_no_trace() {
    let mut fragments = all();
    let atomic = fragment(17, 1, 0, false, &udp(9));
    let behind = fragment(60, 1, 0, true, &[&[17, 0, 0, 0, 0, 0, 0, 0], &udp(8)[..]].concat());
    for packet in [
        v6(HOST, SERVER, 17, &udp(9)),
        v6(HOST, SERVER, 44, &atomic),
        v6(HOST, SERVER, 44, &behind),
        v6(HOST, SERVER, 44, &fragment(58, 1, 0, true, &icmp(128, 0, [0; 4], &[]))),
        v6(HOST, SERVER, 44, &fragment(132, 1, 8, false, &[0; 9])),
        v4("192.0.2.33", "198.51.100.7", 17, &udp(9)),
        with(v4("192.0.2.33", "198.51.100.7", 1, &[0; 8]), 6, &[0, 9]),
        Vec::new(),
        vec![0x45],
        vec![0x60; 7],
        vec![0xff; 100],
    ] {
        assert_eq!(fragments.seen(0, &packet), Fate::Pass(Ports::None), "{packet:?}");
    }
    assert_eq!(fragments.check(), [0, 0, 0]);
    // What a link layer added is not part of it.
    let mut trailed = in_three(17, 1)[2].clone();
    trailed.extend([0; 9]);
    assert_eq!(fragments.seen(0, &trailed), Fate::Held);
    assert_eq!(
        fragments.seen(0, &in_three(17, 1)[2]),
        Fate::Refuse(DropReason::FragmentDuplicate)
    );
    // And one that is not all there is none.
    let cut = &in_three(17, 2)[1];
    assert_eq!(
        fragments.seen(0, &cut[..cut.len() - 1]),
        Fate::Refuse(DropReason::Malformed)
    );
    let mut wrong = in_three_v4(2)[1].clone();
    wrong[10] ^= 1;
    assert_eq!(fragments.seen(0, &wrong), Fate::Refuse(DropReason::HeaderChecksum));
}

#[test]
fn fragments_behind_extension_headers_are_found() {
    let mut fragments = all();
    let mut payload = vec![44, 0, 1, 4, 0, 0, 0, 0];
    payload.extend(fragment(17, 5, 0, true, &udp(8)));
    assert_eq!(fragments.seen(0, &v6(HOST, SERVER, 0, &payload)), Fate::Pass(PORTS));
    let later = fragment(17, 5, 16, false, &[1; 9]);
    assert_eq!(fragments.seen(0, &v6(HOST, SERVER, 44, &later)), Fate::Pass(PORTS));
    assert_eq!(fragments.check(), [0, 0, 0]);
}

#[test]
fn a_packet_in_more_fragments_than_anybody_needs_is_refused() {
    let mut fragments = all();
    let piece = |place: u16| v6(HOST, SERVER, 44, &fragment(17, 1, place * 8, true, &[0; 8]));
    for place in (0..MOST_PIECES as u16).rev() {
        // With a gap, so that all of them wait.
        assert_eq!(fragments.seen(0, &piece(place + 1)), Fate::Held);
    }
    let refused = Fate::Refuse(DropReason::FragmentsFull);
    assert_eq!(fragments.seen(0, &piece(500)), refused);
    assert_eq!(fragments.check(), [1, 0, 0]);
    assert_eq!(
        fragments.seen(0, &v6(HOST, SERVER, 44, &fragment(17, 1, 0, true, &udp(0)))),
        refused
    );
}

#[test]
fn the_longest_packet_in_the_shortest_fragments_of_any_link_waits_for_its_first() {
    let mut fragments = all();
    let mut body = udp(65_400);
    body[4..6].fill(0);
    let pieces: Vec<_> = body.chunks(552).enumerate().collect();
    for (place, piece) in pieces.iter().rev() {
        let more = place + 1 < pieces.len();
        let packet = v6(HOST, SERVER, 44, &fragment(17, 1, *place as u16 * 552, more, piece));
        let expected = if *place == 0 { Fate::Pass(PORTS) } else { Fate::Held };
        assert_eq!(fragments.seen(0, &packet), expected);
    }
    assert_eq!(released(&mut fragments).len(), 118);
    assert_eq!((fragments.check(), fragments.lost()), ([0, 0, 0], 0));
}

#[test]
fn no_more_is_held_than_there_is_memory_for_and_the_oldest_gives_way() {
    let mut fragments = all();
    // From a source each, so that none has more than its share.
    let held = |number: u32| {
        (
            source(number),
            v6(&source(number), SERVER, 44, &fragment(17, 1, 800, false, &[0; 1400])),
        )
    };
    let fits = (256 << 10) / 1536;
    for number in 0..400 {
        assert_eq!(fragments.seen(0, &held(number).1), Fate::Held);
        let [_, _, blocks] = fragments.check();
        assert!(blocks * BLOCK <= 256 << 10);
    }
    assert_eq!(fragments.lost(), 400 - fits);
    let release = |fragments: &mut Fragments, number| {
        let first = v6(&held(number).0, SERVER, 44, &fragment(17, 1, 0, true, &udp(8)));
        assert_eq!(fragments.seen(0, &first), Fate::Pass(PORTS));
        released(fragments).len()
    };
    assert_eq!(release(&mut fragments, 399), 1);
    assert_eq!(release(&mut fragments, 399 - fits as u32 + 1), 1);
    assert_eq!(release(&mut fragments, 399 - fits as u32), 0);
}

#[test]
fn a_source_that_takes_all_is_the_one_that_gives_way() {
    let mut fragments = all();
    let piece = |from: &str, id| v6(from, SERVER, 44, &fragment(17, id, 800, false, &[0; 1400]));
    let first = |from: &str, id| v6(from, SERVER, 44, &fragment(17, id, 0, true, &udp(0)));
    // Alone it may have everything, octets and packets.
    for id in 0..170 {
        assert_eq!(fragments.seen(0, &piece(HOST, id)), Fate::Held);
    }
    assert_eq!((fragments.lost(), fragments.check()[2]), (0, 1020));
    for id in 1000..2878 {
        assert_eq!(fragments.seen(0, &first(HOST, id)), Fate::Pass(PORTS));
    }
    assert_eq!((fragments.lost(), fragments.check()[0]), (0, 2048));
    // Others get theirs whatever it does meanwhile: an eighth of the octets, and of the packets.
    for id in 0..21 {
        assert_eq!(fragments.seen(1, &piece(&source(1), id)), Fate::Held);
        for other in 0..100 {
            fragments.seen(1, &piece(HOST, 10_000 + id * 100 + other));
        }
    }
    for id in 0..200 {
        assert_eq!(fragments.seen(1, &first(&source(2), id)), Fate::Pass(PORTS));
        for other in 0..20 {
            fragments.seen(1, &first(HOST, 20_000 + id * 100 + other));
        }
    }
    fragments.check();
    for id in 0..21 {
        assert_eq!(fragments.seen(2, &first(&source(1), id)), Fate::Pass(PORTS));
        assert_eq!(released(&mut fragments), [(piece(&source(1), id), PORTS)], "{id}");
    }
    for id in 0..200 {
        assert_eq!(fragments.seen(2, &piece(&source(2), id)), Fate::Pass(PORTS), "{id}");
    }
}

#[test]
fn a_source_that_wants_more_than_there_is_loses_its_own() {
    let mut fragments = Fragments::new(
        FragmentLimits {
            octets: 4096,
            packets: 64,
        },
        [1, 2],
    );
    let piece = |id, place: u16| v6(HOST, SERVER, 44, &fragment(17, id, place * 1000, true, &[0; 1000]));
    let other = v6(&source(1), SERVER, 44, &fragment(17, 1, 800, false, &[0; 100]));
    assert_eq!(fragments.seen(0, &other), Fate::Held);
    for place in 1..=3 {
        assert_eq!(fragments.seen(0, &piece(1, place)), Fate::Held);
    }
    // One packet is all that it has: it cannot come through whole.
    assert_eq!(fragments.seen(0, &piece(1, 4)), Fate::Refuse(DropReason::FragmentsFull));
    assert_eq!(fragments.seen(0, &piece(1, 5)), Fate::Refuse(DropReason::FragmentsFull));
    assert_eq!(fragments.lost(), 3);
    let first = v6(&source(1), SERVER, 44, &fragment(17, 1, 0, true, &udp(0)));
    assert_eq!(fragments.seen(0, &first), Fate::Pass(PORTS));
    assert_eq!(released(&mut fragments), [(other, PORTS)]);
}

#[test]
fn whatever_comes_the_memory_stays_whole() {
    let mut random = Random::new(21);
    for (octets, packets) in [(0, 1), (1024, 3), (4096, 9), (16_384, 64)] {
        let mut fragments = Fragments::new(FragmentLimits { octets, packets }, [3, 4]);
        let mut now = 0;
        for _ in 0..20_000 {
            now += random.below(60) as u64;
            let (_, packet) = drawn(&mut random, 12, 6);
            fragments.seen(now, &packet);
            fragments.check();
            if random.below(3) == 0 {
                fragments.released(&mut [0; 2000]);
                fragments.check();
            }
        }
        while fragments.released(&mut [0; 2000]).is_some() {}
        fragments.seen(now + LIFETIME, &[]);
        assert_eq!(fragments.check(), [0, 0, 0]);
    }
}

#[test]
fn it_does_what_a_simple_model_does() {
    let mut random = Random::new(22);
    let (mut outcomes, mut releases) = (HashSet::new(), 0);
    for _ in 0..200 {
        let mut fragments = all();
        let mut model = Model::default();
        let mut now = 0;
        for _ in 0..500 {
            now += random.below(100) as u64;
            let (drawn, packet) = drawn(&mut random, 3, 4);
            let (expected, released_by_model) = model.seen(now, drawn, &packet);
            assert_eq!(fragments.seen(now, &packet), expected, "{drawn:?}");
            assert_eq!(released(&mut fragments), released_by_model);
            releases += released_by_model.len();
            outcomes.insert(format!("{expected:?}"));
        }
        fragments.check();
    }
    assert_eq!(outcomes.len(), 4, "{outcomes:?}");
    assert!(releases > 1000, "{releases}");
}

/// A fragment as it is drawn: source, identification, offset, octets, more.
type Drawn = (u32, u32, usize, usize, bool);

/// One of few packets, whose places are few, too, so that they meet.
fn drawn(random: &mut Random, sources: usize, ids: usize) -> (Drawn, Vec<u8>) {
    let body = udp(400);
    let (number, id) = (random.below(sources) as u32, random.below(ids) as u32);
    let (from, more, length) = match random.below(16) {
        // Out of place.
        0 => {
            let from = random.below(6) * 8;
            // One that is all of its packet would be none.
            (from, from == 0 || random.below(2) == 0, 8 + random.below(8) * 8)
        }
        // In one of four places.
        _ => {
            let place = random.below(4);
            (place * 96, place < 3, 96)
        }
    };
    let packet = fragment(17, id, from as u16, more, &body[from..from + length]);
    (
        (number, id, from, length, more),
        v6(&source(number), SERVER, 44, &packet),
    )
}

/// What it should do, as long as there is memory.
#[derive(Default)]
struct Model {
    packets: BTreeMap<(u32, u32), ModelPacket>,
}

#[derive(Default)]
struct ModelPacket {
    born: u64,
    condemned: bool,
    pieces: Vec<(usize, usize, bool)>,
    held: Vec<Vec<u8>>,
}

impl Model {
    fn seen(&mut self, now: u64, drawn: Drawn, packet: &[u8]) -> (Fate, Vec<(Vec<u8>, Ports)>) {
        self.packets.retain(|_, packet| now - packet.born < 2000);
        let (number, id, from, length, more) = drawn;
        let entry = self.packets.entry((number, id)).or_insert(ModelPacket {
            born: now,
            ..ModelPacket::default()
        });
        let to = from + length;
        let clash = |(other, until, last): &(usize, usize, bool)| {
            from < *until && *other < to || !more && *until > to || !last && to > *until || !more && !last
        };
        if entry.condemned {
            return (Fate::Refuse(DropReason::FragmentOverlap), Vec::new());
        }
        if entry.pieces.contains(&(from, to, more)) {
            return (Fate::Refuse(DropReason::FragmentDuplicate), Vec::new());
        }
        if entry.pieces.iter().any(clash) {
            (entry.condemned, entry.held) = (true, Vec::new());
            return (Fate::Refuse(DropReason::FragmentOverlap), Vec::new());
        }
        entry.pieces.push((from, to, more));
        if !entry.pieces.iter().any(|(from, ..)| *from == 0) {
            entry.held.push(packet.to_vec());
            return (Fate::Held, Vec::new());
        }
        let released = entry.held.drain(..).map(|packet| (packet, PORTS)).collect();
        let octets: usize = entry.pieces.iter().map(|(from, to, _)| to - from).sum();
        if entry.pieces.iter().any(|(_, to, more)| !more && *to == octets) {
            self.packets.remove(&(number, id));
        }
        (Fate::Pass(PORTS), released)
    }
}

impl Fragments {
    /// Numbers of datagrams, pieces and blocks in use, once all ways to count them agree.
    fn check(&self) -> Used {
        let mut all = [0; 3];
        let mut by_source: BTreeMap<usize, Used> = BTreeMap::new();
        for bucket in &self.buckets {
            let mut at = *bucket;
            while at != NOWHERE {
                let datagram = &self.datagrams[at];
                let mut used = [1, 0, 0];
                let mut piece = datagram.pieces;
                let mut end = 0;
                while piece != NOWHERE {
                    let here = &self.pieces[piece];
                    assert!(here.offset >= end && here.end > here.offset);
                    end = here.end;
                    used[PIECES] += 1;
                    if here.copy != NOWHERE {
                        used[BLOCKS] += here.length.div_ceil(BLOCK);
                    }
                    piece = here.next;
                }
                assert_eq!(datagram.count, used[PIECES]);
                let entry = by_source.entry(self.source_of(at)).or_default();
                for kind in 0..3 {
                    all[kind] += used[kind];
                    entry[kind] += used[kind];
                }
                at = datagram.chain;
            }
        }
        let free = [self.datagrams.free(), self.pieces.free(), self.blocks.free()];
        let packets = self.buckets.len() / 2;
        let empty = [packets, packets * 4, self.blocks.count()];
        for kind in 0..3 {
            assert_eq!(all[kind] + free[kind], empty[kind]);
        }
        for (place, source) in self.sources.iter().enumerate() {
            assert_eq!(source.used, by_source.get(&place).copied().unwrap_or_default());
            let greedy = (0..3).any(|kind| source.used[kind] > self.share[kind]);
            assert_eq!((source.is_greedy, self.greedy.contains(&place)), (greedy, greedy));
        }
        assert!(self.greedy.len() <= 3 * SHARE);
        all
    }
}

fn all() -> Fragments {
    Fragments::new(FragmentLimits::default(), [1, 2])
}

fn released(fragments: &mut Fragments) -> Vec<(Vec<u8>, Ports)> {
    let (mut buffer, mut all) = (vec![0xee; 65_535], Vec::new());
    while let Some((length, ports)) = fragments.released(&mut buffer) {
        all.push((buffer[..length].to_vec(), ports));
    }
    all
}

/// One of many hosts.
fn source(number: u32) -> String {
    format!("2001:db8:7::{number:x}")
}

/// A packet from host to server in three fragments, the last of them shorter.
fn in_three(protocol: u8, id: u32) -> [Vec<u8>; 3] {
    let body = if protocol == 6 { tcp(1288) } else { udp(1300) };
    [0..800, 800..1200, 1200..1308].map(|range| {
        let more = range.end < 1308;
        let payload = fragment(protocol, id, range.start as u16, more, &body[range]);
        v6(HOST, SERVER, 44, &payload)
    })
}

fn in_three_v4(id: u16) -> [Vec<u8>; 3] {
    let body = udp(1300);
    [0..800, 800..1200, 1200..1308].map(|range| {
        let flags = (range.start as u16 / 8) | if range.end < 1308 { 0x2000 } else { 0 };
        let packet = v4("192.0.2.33", "198.51.100.7", 17, &body[range]);
        with(with(packet, 4, &id.to_be_bytes()), 6, &flags.to_be_bytes())
    })
}
