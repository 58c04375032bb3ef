//! What is known is answered without an allocation, and so is what is rejected, limited or not allowed to ask. Packets are
//! translated without one, whatever comes of them.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZeroU16,
    sync::Arc,
    time::Duration,
};

use dns64::{
    Answer, Question,
    access::Access,
    cache::Cache,
    cookie::Cookies,
    front::{Front, Reply, Transport, Verdict},
    nat64::{
        self, Fate, FragmentLimits, Fragments, HEADROOM, Map, Maps, Offload, Packet, Settings, Stateless, Translator,
    },
    packed::{Lifetimes, Packed},
    rate::{Limit, Rate},
};
use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::AAAA},
};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_hit_allocates_nothing() {
    let cache = Cache::new(1 << 24, Duration::from_secs(3600), [7; 16]);
    let queries: Vec<_> = (0..1000).map(|number| known(&cache, number)).collect();
    let network = "127.0.0.0/8".parse().expect("a network");
    let limit = Limit {
        same: 1_000,
        all: 1_000_000,
        burst: 1,
    };
    let front = Front {
        cache: Arc::new(cache),
        access: Access::new([&network]),
        cookies: Cookies::new([7; 16], 0),
        rate: Arc::new(Rate::new(limit, 7)),
    };
    let mut out = [0; 1232];
    let mut hits = 0;
    let mut others = 0;
    let before = ALLOCATIONS.get();
    for second in 0..10 {
        let turn = front.turn(Duration::from_secs(second), second);
        for query in &queries {
            for source in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
                for message in [&query[..], &query[..query.len() - 1]] {
                    match front.look(&turn, Transport::Udp, message, source, &mut out) {
                        Verdict::Reply {
                            why: Reply::Known { .. },
                            ..
                        } => hits += 1,
                        _ => others += 1,
                    }
                }
            }
        }
    }
    assert_eq!(ALLOCATIONS.get() - before, 0);
    assert_eq!((hits, others), (10_000, 30_000));
}

/// A host with an IPv4 address of its own, and a server under the prefix.
const HOST: (&str, &str) = ("198.51.100.7", "2001:db8:3::7");
const SERVER: (&str, &str) = ("192.0.2.33", "2001:db8:1c0:2:21::");

#[test]
fn a_packet_is_translated_without_an_allocation() {
    let translator = Translator::new(
        Settings {
            address_v4: Ipv4Addr::new(203, 0, 113, 1),
            address_v6: "2001:db8::64".parse().expect("an address"),
            mtu_v4: 1500,
            mtu_v6: 1500,
            lowest_ipv6_mtu: 1280,
            copy_class: true,
            sum_udp: true,
            clamp_mss: true,
            answer: true,
        },
        [1, 2],
    );
    let map = Map::new(
        "198.51.100.0/24".parse().expect("a net"),
        "2001:db8:3::/120".parse().expect("a net"),
    );
    let mut mapper = Stateless {
        prefix: Some("2001:db8:100::/40".parse().expect("a prefix")),
        maps: Maps::new([map.expect("a map")]).expect("maps"),
        reporters_v4: vec![Ipv4Addr::new(203, 0, 113, 8)],
        reporter_v6: None,
    };
    let packets = packets();
    let mut buffer = vec![0; HEADROOM + 65_535];
    let mut outcomes = [0; 4];
    let before = ALLOCATIONS.get();
    for _ in 0..100 {
        for (packet, offload) in &packets {
            let range = HEADROOM..HEADROOM + packet.len();
            buffer[range.clone()].copy_from_slice(packet);
            let packet = Packet::new(&mut buffer, range, *offload).expect("room");
            let (outcome, mut pieces) = match translator.translate(&mut mapper, packet) {
                nat64::Verdict::Drop(_) => {
                    outcomes[0] += 1;
                    continue;
                }
                nat64::Verdict::Reply(_, pieces) => (1, pieces),
                nat64::Verdict::Forward(pieces) => (2, pieces),
            };
            outcomes[outcome] += 1;
            while pieces.next(12).is_some() {
                outcomes[3] += 1;
            }
        }
    }
    assert_eq!(ALLOCATIONS.get() - before, 0);
    // Dropped, answered, sent on, and in how many pieces.
    assert_eq!(outcomes, [200, 700, 1700, 3400]);
}

#[test]
fn fragments_are_held_and_released_without_an_allocation() {
    let mut fragments = Fragments::new(FragmentLimits::default(), [1, 2]);
    let mut buffer = vec![0; 65_535];
    // Packets in three, which come last first, and of which some overlap, come twice, or never have a first.
    let body = udp(1300);
    let mut packets: Vec<Vec<u8>> = Vec::new();
    for id in 0..1000 {
        let piece = |from: usize, to: usize| {
            let payload = fragment(17, id, from as u16, to < body.len(), &body[from..to]);
            v6(HOST.1, SERVER.1, 44, &payload)
        };
        packets.extend([piece(1200, 1308), piece(800, 1200)]);
        match id % 4 {
            0 => {}
            1 => packets.push(piece(792, 808)),
            _ => packets.extend([piece(800, 1200), piece(0, 800)]),
        }
    }
    let mut outcomes = [0; 4];
    let before = ALLOCATIONS.get();
    for round in 0..20 {
        for (place, packet) in packets.iter().enumerate() {
            match fragments.seen(round * 1000 + place as u64 / 4, packet) {
                Fate::Pass(_) => outcomes[0] += 1,
                Fate::Held => outcomes[1] += 1,
                Fate::Refuse(_) => outcomes[2] += 1,
            }
            while fragments.released(&mut buffer).is_some() {
                outcomes[3] += 1;
            }
        }
    }
    assert_eq!(ALLOCATIONS.get() - before, 0);
    assert!(outcomes.iter().all(|outcome| *outcome > 1000), "{outcomes:?}");
    assert!(fragments.lost() > 1000);
}

/// Of every kind, both ways.
fn packets() -> Vec<(Vec<u8>, Offload)> {
    let (four, six) = (
        |protocol, body: &[u8]| v4(SERVER.0, HOST.0, protocol, 0x4000, body),
        |next, body: &[u8]| v6(HOST.1, SERVER.1, next, body),
    );
    let syn = [&[0x60, 0x02, 0x20, 0, 0, 0, 0, 0, 2, 4, 0x23, 0x28][..]].concat();
    let syn = [&[7, 0xd0, 15, 0xa0, 0, 0, 0, 1, 0, 0, 0, 2][..], &syn].concat();
    let segment = |length| [&syn[..12], &[0x50, 0x10, 0x20, 0, 0, 0, 0, 0], &vec![7; length]].concat();
    let with = |mut packet: Vec<u8>, at: usize, octet: u8| {
        packet[at] = octet;
        seal(packet)
    };
    let asked_v4 = v4(HOST.0, SERVER.0, 17, 0x4000, &udp(100));
    let asked_v6 = v6(SERVER.1, HOST.1, 17, &udp(80));
    let error = |kind, words: [u8; 4], quoted: &[u8]| {
        let extension = [0x20, 0, 0, 0, 0, 8, 1, 1, 0, 0, 0, 0];
        [&[kind, 0, 0, 0][..], &words, quoted, &extension].concat()
    };
    let plain = [
        // Sent on: 15, and two of several segments.
        four(17, &udp(9)),
        six(17, &udp(9)),
        four(6, &syn),
        six(6, &syn),
        four(132, &[0; 20]),
        four(1, &[8, 0, 0, 0, 0, 1, 0, 2]),
        six(58, &[128, 0, 0, 0, 0, 1, 0, 2]),
        v4(SERVER.0, HOST.0, 17, 0, &udp(13_000)),
        v4(SERVER.0, HOST.0, 17, 0x2001, &[7; 64]),
        six(44, &fragment(17, 9, 800, true, &[7; 64])),
        six(60, &[&[17, 0, 1, 4, 0, 0, 0, 0][..], &udp(9)].concat()),
        four(1, &error(11, [0, 32, 0, 0], &asked_v4)),
        six(58, &error(3, [16, 0, 0, 0], &asked_v6)),
        v6("2001:db8:ffff::1", SERVER.1, 58, &error(3, [0; 4], &asked_v6)),
        v6(HOST.1, "2001:db8:1c6:3364:9::", 17, &udp(9)),
        // Answered: 7.
        with(four(17, &udp(9)), 8, 1),
        with(six(17, &udp(9)), 7, 1),
        four(17, &udp(1500)),
        six(17, &udp(1500)),
        six(43, &[&[17, 0, 4, 1, 0, 0, 0, 0][..], &udp(9)].concat()),
        six(
            44,
            &fragment(60, 9, 0, true, &[&[17, 0, 0, 0, 0, 0, 0, 0][..], &udp(8)].concat()),
        ),
        v4(
            SERVER.0,
            HOST.0,
            17,
            0x2000,
            &udp(8)[..6].iter().chain(&[0; 10]).copied().collect::<Vec<_>>(),
        ),
        // Dropped: 2.
        v6("2001:db9::1", SERVER.1, 17, &udp(9)),
        four(1, &[13; 20]),
    ];
    let mut packets: Vec<_> = plain.into_iter().map(|packet| (packet, Offload::default())).collect();
    for (packet, size) in [(four(6, &segment(20_000)), 1448), (six(6, &segment(20_000)), 1428)] {
        let offload = Offload {
            partial: true,
            segment: NonZeroU16::new(size),
        };
        packets.push((packet, offload));
    }
    packets
}

fn v4(source: &str, destination: &str, protocol: u8, flags: u16, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend((20 + body.len() as u16).to_be_bytes());
    packet.extend([0, 9]);
    packet.extend(flags.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    for address in [source, destination] {
        packet.extend(address.parse::<Ipv4Addr>().expect("an address").octets());
    }
    packet.extend(body);
    seal(packet)
}

/// With the right IPv4 header checksum, if it has one.
fn seal(mut packet: Vec<u8>) -> Vec<u8> {
    if packet[0] == 0x45 {
        packet[10..12].fill(0);
        let sum: u32 = packet[..20]
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
            .sum();
        let sum = !(((sum >> 16) + (sum & 0xffff)) as u16);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

fn v6(source: &str, destination: &str, next: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((body.len() as u16).to_be_bytes());
    packet.extend([next, 64]);
    for address in [source, destination] {
        packet.extend(address.parse::<Ipv6Addr>().expect("an address").octets());
    }
    packet.extend(body);
    packet
}

fn fragment(next: u8, id: u32, offset: u16, more: bool, body: &[u8]) -> Vec<u8> {
    let mut payload = vec![next, 0];
    payload.extend((offset | u16::from(more)).to_be_bytes());
    payload.extend(id.to_be_bytes());
    payload.extend(body);
    payload
}

/// UDP from port 2000 to 4000 with any checksum.
fn udp(length: usize) -> Vec<u8> {
    let mut datagram = vec![0x07, 0xd0, 0x0f, 0xa0];
    datagram.extend((8 + length as u16).to_be_bytes());
    datagram.extend([0x12, 0x34]);
    datagram.extend((0..length).map(|i| i as u8));
    datagram
}

/// Has `cache` know one answer; the query for it.
fn known(cache: &Cache, number: u32) -> Vec<u8> {
    let name = Name::from_ascii(format!("host{number}.example.org.")).expect("a name");
    let question = Question::new(&name, RecordType::AAAA);
    let data = RData::AAAA(AAAA(Ipv6Addr::LOCALHOST));
    let answer = Answer {
        answers: vec![Record::from_rdata(name, 3600, data)],
        ..Answer::empty(ResponseCode::NoError)
    };
    let packed = Packed::new(&question, &answer, &Lifetimes::default()).expect("it fits");
    cache.insert(packed, Duration::ZERO);
    let mut query = Message::new(7, MessageType::Query, OpCode::Query);
    query.add_query(question.query());
    query.set_edns(Edns::new());
    query.to_vec().expect("a message")
}
