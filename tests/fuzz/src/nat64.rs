//! What comes from either side to be translated: what goes on is well-formed, of the other version and no longer than it may
//! be, its checksum is as right or wrong as before, and no error is sent that must not be.

use std::{net::Ipv6Addr, num::NonZeroU16};

use dns64::nat64::{
    Fate, FragmentLimits, Fragments, HEADROOM, Map, Maps, Offload, Packet, Ports, Settings, Stateless, Translator,
    Verdict,
};

const PREFIXES: [Option<&str>; 8] = [
    Some("2001:db8:100::/40"),
    Some("64:ff9b::/96"),
    Some("2001:db8::/32"),
    Some("2001:db8:122::/48"),
    Some("2001:db8:122:300::/56"),
    Some("2001:db8:122:344::/64"),
    Some("64:ff9b:1:fffe::/96"),
    None,
];
const MTUS_V4: [u16; 4] = [1500, 576, 1400, 65_535];
const MTUS_V6: [u16; 4] = [1500, 1280, 1400, 65_535];

/// `bytes` are settings, then packets: each behind the time since the one before, in 50 ms, and its length.
///
/// Settings are, bit by bit: traffic class, UDP checksums, segment sizes, answers, whether lengths and IPv4 header checksums
/// are put right before, whether transport checksums are, whether checksums are partial, whether there are segments; prefix
/// (3), MTU of IPv4 (2), of IPv6 (2), fragments of 1280 octets or more; octets of a segment (16).
pub fn run(bytes: &[u8]) {
    let Some(([flags, place, segment @ ..], mut rest)) = bytes.split_first_chunk::<4>() else {
        return;
    };
    let on = |bit: u32| flags >> bit & 1 == 1;
    let place = usize::from(*place);
    let case = Case {
        mtu_v4: MTUS_V4[place >> 3 & 3].into(),
        mtu_v6: MTUS_V6[place >> 5 & 3].into(),
        sums_udp: on(1),
        clamps: on(2),
        translator: Translator::new(
            Settings {
                address_v4: [203, 0, 113, 1].into(),
                address_v6: Ipv6Addr::from_bits(0x2001_0db8 << 96 | 0x64),
                mtu_v4: MTUS_V4[place >> 3 & 3],
                mtu_v6: MTUS_V6[place >> 5 & 3],
                lowest_ipv6_mtu: if place >> 7 == 1 { 1500 } else { 1280 },
                copy_class: on(0),
                sum_udp: on(1),
                clamp_mss: on(2),
                answer: on(3),
            },
            [1, 2],
        ),
        mapper: Stateless {
            prefix: PREFIXES[place & 7].map(|prefix| prefix.parse().expect("a prefix")),
            maps: Maps::new([Map::new(
                "198.51.100.0/24".parse().expect("a net"),
                "2001:db8:3::/120".parse().expect("a net"),
            )
            .expect("a map")])
            .expect("maps"),
            reporters_v4: vec![[203, 0, 113, 8].into(), [203, 0, 113, 9].into()],
            reporter_v6: Some(Ipv6Addr::from_bits(0x2001_0db8 << 96 | 0x6791)),
        },
    };
    let limits = FragmentLimits {
        octets: 4096,
        packets: 8,
    };
    let (mut fragments, mut now) = (Fragments::new(limits, [1, 2]), 0);
    let (mut held, mut buffer): (Vec<Vec<u8>>, _) = (Vec::new(), vec![0; 65_535]);
    while let Some(([delay, high, low], behind)) = rest.split_first_chunk::<3>() {
        now += u64::from(*delay) * 50;
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(behind.len());
        let (packet, behind) = behind.split_at(length);
        rest = behind;
        let mut packet = packet.to_vec();
        if on(4) {
            mend(&mut packet);
        }
        if on(5) {
            sum(&mut packet);
        }
        let offload = Offload {
            partial: on(6),
            segment: NonZeroU16::new(u16::from_be_bytes(*segment)).filter(|_| on(7)),
        };
        match fragments.seen(now, &packet) {
            Fate::Pass(ports) => {
                case.check(&packet, offload, ports);
                while let Some((length, ports)) = fragments.released(&mut buffer) {
                    let at = held.iter().position(|held| held[..] == buffer[..length]);
                    let packet = held.remove(at.expect("what is released was held"));
                    case.check(&packet, Offload::default(), ports);
                }
            }
            Fate::Held => held.push(packet),
            Fate::Refuse(_) => {}
        }
    }
}

struct Case {
    translator: Translator,
    mapper: Stateless,
    mtu_v4: usize,
    mtu_v6: usize,
    sums_udp: bool,
    clamps: bool,
}

/// What came of a packet.
enum Outcome {
    Dropped,
    Forwarded(Vec<Vec<u8>>, Offload),
    Replied(Vec<u8>, Offload),
}

impl Case {
    fn translate(&self, packet: &[u8], offload: Offload, ports: Ports) -> Outcome {
        let mut buffer = vec![0xa5; HEADROOM];
        buffer.extend(packet);
        let end = buffer.len();
        let packet = Packet::new(&mut buffer, HEADROOM..end, offload).expect("room");
        match self
            .translator
            .translate(&mut self.mapper.clone(), packet.with_ports(ports))
        {
            Verdict::Drop(_) => Outcome::Dropped,
            Verdict::Forward(mut pieces) => {
                let mut all = Vec::new();
                while let Some(piece) = pieces.next(0) {
                    all.push(piece.to_vec());
                }
                Outcome::Forwarded(all, pieces.offload())
            }
            Verdict::Reply(_, mut pieces) => {
                let reply = pieces.next(0).expect("a reply").to_vec();
                assert!(pieces.next(0).is_none(), "one reply");
                Outcome::Replied(reply, pieces.offload())
            }
        }
    }

    fn check(&self, sent: &[u8], offload: Offload, ports: Ports) {
        match self.translate(sent, offload, ports) {
            Outcome::Dropped => {}
            Outcome::Forwarded(all, left) => self.forwarded(sent, offload, &all, left),
            Outcome::Replied(reply, left) => {
                assert_eq!(left, Offload::default());
                replied(sent, &reply);
            }
        }
    }

    fn forwarded(&self, sent: &[u8], offload: Offload, all: &[Vec<u8>], left: Offload) {
        let before = Ip::of(sent);
        assert!(!all.is_empty());
        for piece in all {
            let after = Ip::of(piece);
            assert_well_formed(piece);
            let turned_back = before.is_v6 && after.is_v6;
            let header = after.header_of_segment();
            let limit = if after.is_v6 {
                self.mtu_v6
            } else {
                self.mtu_v4.max(1260)
            };
            match left.segment {
                Some(_) if turned_back => {}
                Some(segment) => {
                    let limit = if after.is_v6 { self.mtu_v6 } else { self.mtu_v4 };
                    assert!(after.at + header + usize::from(segment.get()) <= limit, "a segment");
                }
                None => assert!(turned_back || piece.len() <= limit, "{} octets", piece.len()),
            }
            if before.is_error() {
                assert!(piece.len() <= if after.is_v6 { 1280 } else { 576 } || turned_back);
                assert_eq!(
                    after.bytes[after.at + 8] >> 4,
                    if after.is_v6 { 6 } else { 4 },
                    "quoted"
                );
            }
        }
        let after = Ip::of(&all[0]);
        let whole = [
            &all[0][after.at..],
            &all[1..]
                .iter()
                .flat_map(|piece| &piece[48..])
                .copied()
                .collect::<Vec<_>>(),
        ]
        .concat();
        let whole = Ip {
            transport: &whole,
            ..after
        };
        if before.is_error() {
            if !offload.partial {
                assert_eq!(before.residue(), whole.residue(), "an error's checksum");
            }
            return;
        }
        assert_eq!(before.transport.len(), whole.transport.len());
        if before.is_later() {
            assert_eq!(before.transport, whole.transport);
        } else if let Some(field) = whole.field() {
            let of = |ip: &Ip<'_>| u16::from_be_bytes([ip.transport[field], ip.transport[field + 1]]);
            if offload.partial && left.partial {
                let wrong = |ip: &Ip<'_>| (u32::from(of(ip)) + 0xffff - u32::from(ip.pseudo_sum())) % 0xffff;
                assert_eq!(wrong(&before), wrong(&whole), "a checksum that is not finished");
            } else if !offload.partial && before.protocol == 17 && of(&before) == 0 {
                assert!(self.sums_udp && !before.is_v6);
                let length = usize::from(u16::from_be_bytes([whole.transport[4], whole.transport[5]]));
                let covered = Ip {
                    transport: &whole.transport[..length],
                    ..whole
                };
                assert_eq!((covered.residue(), of(&whole) == 0), (0, false), "a fresh checksum");
            } else if !offload.partial {
                assert_eq!(before.residue(), whole.residue(), "a checksum");
                assert!(whole.protocol != 17 || of(&whole) != 0, "no checksum");
            }
        }
        self.assert_same(&before, &whole);
        // And back, if it goes back: payload, ports and checksum are what they were.
        if let [one] = all
            && let Outcome::Forwarded(back, _) = self.translate(one, left, Ports::None)
            && let [back] = &back[..]
        {
            self.assert_same(&whole, &Ip::of(back));
        }
    }

    /// All but the checksum, the type of ICMP, and what a SYN names.
    fn assert_same(&self, one: &Ip<'_>, other: &Ip<'_>) {
        let blank = |ip: &Ip<'_>| {
            let mut transport = ip.transport.to_vec();
            if ip.is_later() {
                return transport;
            }
            if let Some(field) = ip.field() {
                transport[field..field + 2].fill(0);
            }
            if matches!(ip.protocol, 1 | 58) {
                transport[0] = 0;
            }
            let header = ip.header_of_segment();
            if ip.protocol == 6 && self.clamps && transport[13] & 2 == 2 {
                transport[20..header].fill(0);
            }
            transport
        };
        assert!(blank(one) == blank(other), "the payload");
    }
}

fn replied(sent: &[u8], reply: &[u8]) {
    assert_well_formed(reply);
    let (before, after) = (Ip::of(sent), Ip::of(reply));
    assert_eq!(before.is_v6, after.is_v6);
    assert_eq!((after.residue(), after.is_error()), (0, true));
    assert!(!before.is_error(), "about an error");
    assert!(!before.is_later(), "about a later fragment");
    let quoted = &reply[after.at + 8..];
    assert_eq!(quoted, &sent[..quoted.len()]);
    let [source, destination] = [before.source(), after.destination()];
    assert_eq!(source, destination);
    let multicast = if before.is_v6 {
        source[0] == 0xff
    } else {
        source[0] >= 224
    };
    assert!(!multicast && source.iter().any(|octet| *octet != 0));
    assert!(reply.len() <= if after.is_v6 { 1280 } else { 576 });
}

fn assert_well_formed(packet: &[u8]) {
    match packet[0] >> 4 {
        4 => {
            assert_eq!(packet[0], 0x45);
            assert_eq!(packet[2..4], (packet.len() as u16).to_be_bytes());
            assert_eq!(add(0, &packet[..20]) % 0xffff, 0, "an IPv4 header");
            assert_ne!(packet[8], 0);
        }
        6 => {
            assert_eq!(packet[4..6], (packet.len() as u16 - 40).to_be_bytes());
            assert_ne!(packet[7], 0);
        }
        other => panic!("IP version {other}"),
    }
}

/// A packet that was found good, looked at once more by simpler means.
#[derive(Clone, Copy)]
struct Ip<'a> {
    bytes: &'a [u8],
    is_v6: bool,
    protocol: u8,
    offset: u16,
    /// Where the transport header begins.
    at: usize,
    transport: &'a [u8],
}

impl<'a> Ip<'a> {
    fn of(bytes: &'a [u8]) -> Self {
        if bytes[0] >> 4 == 4 {
            let at = usize::from(bytes[0] & 15) * 4;
            let total = usize::from(u16::from_be_bytes([bytes[2], bytes[3]]));
            return Self {
                bytes,
                is_v6: false,
                protocol: bytes[9],
                offset: u16::from_be_bytes([bytes[6], bytes[7]]) << 3,
                at,
                transport: &bytes[at..total],
            };
        }
        let end = 40 + usize::from(u16::from_be_bytes([bytes[4], bytes[5]]));
        let (mut protocol, mut at, mut offset) = (bytes[6], 40, 0);
        while matches!(protocol, 0 | 43 | 44 | 60) && offset == 0 {
            let octets = if protocol == 44 {
                offset = u16::from_be_bytes([bytes[at + 2], bytes[at + 3]]) & !7;
                8
            } else {
                8 + usize::from(bytes[at + 1]) * 8
            };
            (protocol, at) = (bytes[at], at + octets);
        }
        Self {
            bytes,
            is_v6: true,
            protocol,
            offset,
            at,
            transport: &bytes[at..end],
        }
    }

    fn source(&self) -> &'a [u8] {
        if self.is_v6 {
            &self.bytes[8..24]
        } else {
            &self.bytes[12..16]
        }
    }

    fn destination(&self) -> &'a [u8] {
        if self.is_v6 {
            &self.bytes[24..40]
        } else {
            &self.bytes[16..20]
        }
    }

    fn is_later(&self) -> bool {
        self.offset > 0
    }

    fn is_error(&self) -> bool {
        let kind = self.transport.first().copied().unwrap_or(0);
        !self.is_later()
            && match (self.is_v6, self.protocol) {
                (false, 1) => matches!(kind, 3 | 4 | 5 | 11 | 12),
                (true, 58) => kind < 128 || kind == 137,
                _ => false,
            }
    }

    /// Where the checksum is.
    fn field(&self) -> Option<usize> {
        let at = match self.protocol {
            6 => 16,
            17 => 6,
            1 | 58 => 2,
            _ => return None,
        };
        (self.transport.len() >= at + 2).then_some(at)
    }

    fn header_of_segment(&self) -> usize {
        match self.protocol {
            6 if self.transport.len() > 12 => usize::from(self.transport[12] >> 4) * 4,
            17 => 8,
            _ => 0,
        }
    }

    /// RFC 1071, over the pseudo-header.
    fn pseudo_sum(&self) -> u16 {
        if self.protocol == 1 {
            return 0;
        }
        let ends = add(add(0, self.source()), self.destination());
        add(
            add(ends, &(self.transport.len() as u32).to_be_bytes()),
            &[0, self.protocol],
        )
    }

    /// 0 if the checksum is right, else by how much it is wrong.
    fn residue(&self) -> u16 {
        add(self.pseudo_sum(), self.transport) % 0xffff
    }
}

/// RFC 1071 word by word, with nothing clever.
fn add(sum: u16, bytes: &[u8]) -> u16 {
    bytes.chunks(2).fold(sum, |sum, pair| {
        let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
        let (sum, carry) = sum.overflowing_add(word);
        sum + u16::from(carry)
    })
}

/// Puts lengths and the IPv4 header checksum right, which no fuzzer finds.
fn mend(packet: &mut [u8]) {
    let length = packet.len();
    match packet.first().map(|first| first >> 4) {
        Some(4) if length >= 20 => {
            let header = (usize::from(packet[0] & 15) * 4).min(length);
            packet[2..4].copy_from_slice(&(length as u16).to_be_bytes());
            packet[10..12].fill(0);
            let sum = !add(0, &packet[..header]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        Some(6) if length >= 40 => packet[4..6].copy_from_slice(&(length as u16 - 40).to_be_bytes()),
        _ => {}
    }
}

/// Puts the transport checksum right, where it is easily found.
fn sum(packet: &mut [u8]) {
    let plain = match packet.first() {
        Some(0x45) => packet.len() >= 20 && usize::from(u16::from_be_bytes([packet[2], packet[3]])) == packet.len(),
        Some(first) if first >> 4 == 6 => packet.len() >= 40 && matches!(packet[6], 6 | 17 | 58),
        _ => false,
    };
    if !plain || packet[0] >> 4 == 6 && usize::from(u16::from_be_bytes([packet[4], packet[5]])) + 40 != packet.len() {
        return;
    }
    let ip = Ip::of(packet);
    let Some(field) = ip.field() else { return };
    let at = ip.at + field;
    packet[at..at + 2].fill(0);
    let ip = Ip::of(packet);
    let sum = match !add(ip.pseudo_sum(), ip.transport) {
        0 => 0xffff,
        sum => sum,
    };
    packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}
