//! Packets as tests write them, and sums as they check them: written apart from the code they test.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{Offload, Packet, Verdict, packet::HEADROOM};

/// Numbers that are the same in every run (xorshift, Marsaglia 2003).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 16) as usize % limit
    }

    pub(crate) fn octet(&mut self) -> u8 {
        (self.next() >> 24) as u8
    }

    pub(crate) fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.octet()).collect()
    }
}

/// RFC 1071 word by word, with nothing clever.
pub(crate) fn reference_sum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        if sum > 0xffff {
            sum -= 0xffff;
        }
    }
    sum as u16
}

/// The sum over pseudo-header and transport: ffff if the checksum is right.
pub(crate) fn transport_sum(packet: &[u8]) -> u16 {
    let (pseudo, transport) = match packet[0] >> 4 {
        4 => {
            let transport = &packet[usize::from(packet[0] & 15) * 4..];
            let mut pseudo = packet[12..20].to_vec();
            pseudo.extend([0, packet[9]]);
            pseudo.extend((transport.len() as u16).to_be_bytes());
            (if packet[9] == 1 { Vec::new() } else { pseudo }, transport)
        }
        6 => {
            let (protocol, transport) = match packet[6] {
                44 => (packet[40], &packet[48..]),
                protocol => (protocol, &packet[40..]),
            };
            let mut pseudo = packet[8..40].to_vec();
            pseudo.extend((transport.len() as u32).to_be_bytes());
            pseudo.extend([0, 0, 0, protocol]);
            (pseudo, transport)
        }
        other => panic!("IP version {other}"),
    };
    let mut all = pseudo;
    all.extend(transport);
    reference_sum(&all)
}

/// An IPv4 packet without options, DF set, TTL 64, identification 0.
pub(crate) fn v4(source: &str, destination: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend((20 + payload.len() as u16).to_be_bytes());
    packet.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    packet.extend(ip4(source).octets());
    packet.extend(ip4(destination).octets());
    packet.extend(payload);
    seal(packet)
}

/// An IPv6 packet, hop limit 64.
pub(crate) fn v6(source: &str, destination: &str, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next, 64]);
    packet.extend(ip6(source).octets());
    packet.extend(ip6(destination).octets());
    packet.extend(payload);
    packet
}

/// With the right IPv4 header checksum.
pub(crate) fn seal(mut packet: Vec<u8>) -> Vec<u8> {
    let header = usize::from(packet[0] & 15) * 4;
    packet[10..12].fill(0);
    let sum = !reference_sum(&packet[..header]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// With other octets at a place, sealed again if it is IPv4.
pub(crate) fn with(mut packet: Vec<u8>, at: usize, octets: &[u8]) -> Vec<u8> {
    packet[at..at + octets.len()].copy_from_slice(octets);
    if packet[0] >> 4 == 4 { seal(packet) } else { packet }
}

/// With the right transport checksum: TCP, UDP (never 0), ICMP; for whole packets and lone Fragment headers.
pub(crate) fn summed(mut packet: Vec<u8>) -> Vec<u8> {
    let (protocol, at) = match packet[0] >> 4 {
        4 => (packet[9], usize::from(packet[0] & 15) * 4),
        _ if packet[6] == 44 => (packet[40], 48),
        _ => (packet[6], 40),
    };
    let field = at
        + match protocol {
            6 => 16,
            17 => 6,
            _ => 2,
        };
    packet[field..field + 2].fill(0);
    let sum = match !transport_sum(&packet) {
        0 if protocol == 17 => 0xffff,
        sum => sum,
    };
    packet[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// UDP from port 2000 to 4000 with `length` octets of payload, checksum 0.
pub(crate) fn udp(length: usize) -> Vec<u8> {
    let mut datagram = vec![0x07, 0xd0, 0x0f, 0xa0];
    datagram.extend((8 + length as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend((0..length).map(|i| i as u8));
    datagram
}

/// A TCP segment from port 2000 to 4000 with ACK and `length` octets of payload, checksum 0.
pub(crate) fn tcp(length: usize) -> Vec<u8> {
    let mut segment = vec![
        0x07, 0xd0, 0x0f, 0xa0, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 0x20, 0, 0, 0, 0, 0,
    ];
    segment.extend((0..length).map(|i| i as u8));
    segment
}

/// An ICMP message with checksum 0.
pub(crate) fn icmp(kind: u8, code: u8, rest: [u8; 4], body: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, code, 0, 0];
    message.extend(rest);
    message.extend(body);
    message
}

/// A Fragment header in front of `payload`; `offset` counts octets.
pub(crate) fn fragment(protocol: u8, id: u32, offset: u16, more: bool, payload: &[u8]) -> Vec<u8> {
    let mut whole = vec![protocol, 0];
    whole.extend((offset | u16::from(more)).to_be_bytes());
    whole.extend(id.to_be_bytes());
    whole.extend(payload);
    whole
}

pub(crate) fn ip4(text: &str) -> Ipv4Addr {
    text.parse().expect("an address")
}

pub(crate) fn ip6(text: &str) -> Ipv6Addr {
    text.parse().expect("an address")
}

/// What came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Drop(super::DropReason),
    Forward(Vec<Vec<u8>>),
    Reply(super::DropReason, Vec<u8>),
}

impl Seen {
    pub(crate) fn forwarded(self) -> Vec<u8> {
        match self {
            Self::Forward(mut pieces) if pieces.len() == 1 => pieces.remove(0),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn replied(self) -> Vec<u8> {
        match self {
            Self::Reply(_, packet) => packet,
            other => panic!("{other:?}"),
        }
    }
}

/// Runs `packet`, placed as a device would place it, through `translate`.
pub(crate) fn run(packet: &[u8], translate: impl FnOnce(Packet<'_>) -> Verdict<'_>) -> Seen {
    run_offloaded(packet, Offload::default(), translate).0
}

/// The same, with what is left to the device, before and after.
pub(crate) fn run_offloaded(
    packet: &[u8],
    offload: Offload,
    translate: impl FnOnce(Packet<'_>) -> Verdict<'_>,
) -> (Seen, Offload) {
    let mut buffer = vec![0xa5; HEADROOM];
    buffer.extend(packet);
    let end = buffer.len();
    let packet = Packet::new(&mut buffer, HEADROOM..end, offload).expect("room");
    match translate(packet) {
        Verdict::Drop(reason) => (Seen::Drop(reason), offload),
        Verdict::Forward(mut pieces) => {
            let mut all = Vec::new();
            // As a device with a virtio header in front of each packet does.
            while let Some(piece) = pieces.next(12) {
                piece[..12].fill(0xee);
                all.push(piece[12..].to_vec());
            }
            (Seen::Forward(all), pieces.offload())
        }
        Verdict::Reply(reason, mut pieces) => {
            let reply = pieces.next(0).expect("a reply").to_vec();
            assert!(pieces.next(0).is_none());
            (Seen::Reply(reason, reply), pieces.offload())
        }
    }
}
