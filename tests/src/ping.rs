//! One echo request and who answers it, as ping(8) and traceroute(8) do.

use std::{
    io::{self, Read},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};

use crate::Node;

/// What came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Echo {
    /// From whom.
    pub from: IpAddr,
    /// The ICMP type: 0 or 129 is the answer.
    pub kind: u8,
    /// The ICMP code.
    pub code: u8,
}

/// Sends an echo request with `size` octets of payload from `node` to `to`, which may go so many `hops`; what comes back
/// within a second, if anything does.
///
/// # Errors
///
/// If there is no raw socket, or no route.
pub fn ping(node: &Node, to: IpAddr, hops: u32, size: usize) -> Result<Option<Echo>> {
    node.enter(|| send(to, hops, size))
        .with_context(|| format!("an echo request from {} to {to}", node.name()))
}

fn send(to: IpAddr, hops: u32, size: usize) -> io::Result<Option<Echo>> {
    let (domain, protocol, request) = match to {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, 8),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, 128),
    };
    let mut socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    match to {
        IpAddr::V4(_) => socket.set_ttl_v4(hops)?,
        IpAddr::V6(_) => socket.set_unicast_hops_v6(hops)?,
    }
    let id = (std::process::id() as u16).to_be_bytes();
    let mut message = vec![request, 0, 0, 0, id[0], id[1], 0, 7];
    message.resize(8 + size, 0x5a);
    if to.is_ipv4() {
        // For IPv6 the kernel does it.
        let sum = checksum(&message).to_be_bytes();
        message[2..4].copy_from_slice(&sum);
    }
    socket.send_to(&message, &SocketAddr::new(to, 0).into())?;
    let until = Instant::now() + Duration::from_secs(1);
    let mut room = vec![0; 4096];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        socket.set_read_timeout(Some(left))?;
        // The source comes with the packet in IPv4, and with the call in IPv6.
        let (length, from) = match to {
            IpAddr::V4(_) => match socket.read(&mut room) {
                Ok(length) => (length, None),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            },
            IpAddr::V6(_) => {
                let datagram: std::net::UdpSocket = socket.try_clone()?.into();
                match datagram.recv_from(&mut room) {
                    Ok((length, from)) => (length, Some(from.ip())),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                    Err(error) => return Err(error),
                }
            }
        };
        let packet = &room[..length];
        let (from, message) = match from {
            Some(from) => (from, packet),
            None if packet.len() >= 20 => {
                let source = [packet[12], packet[13], packet[14], packet[15]];
                let header = usize::from(packet[0] & 15) * 4;
                (IpAddr::from(source), packet.get(header..).unwrap_or_default())
            }
            None => continue,
        };
        // The answer, or an error that quotes the request; not the request itself, nor neighbour discovery.
        let (Some(kind), Some(code)) = (message.first(), message.get(1)) else {
            continue;
        };
        let mine = match to {
            IpAddr::V4(_) => matches!(kind, 0) && message.get(4..6) == Some(&id) || matches!(kind, 3 | 11),
            IpAddr::V6(_) => matches!(kind, 129) && message.get(4..6) == Some(&id) || matches!(kind, 1..=4),
        };
        if mine {
            return Ok(Some(Echo {
                from,
                kind: *kind,
                code: *code,
            }));
        }
    }
}

fn checksum(message: &[u8]) -> u16 {
    let words = message.chunks(2).map(|pair| {
        let low = pair.get(1).copied().unwrap_or(0);
        u32::from(pair[0]) << 8 | u32::from(low)
    });
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}
