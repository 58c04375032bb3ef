//! Version 1: one line of text (specification, 2.1).

use std::{
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

use super::{Command, Header, Parsed, Reason, Tlvs, Transport, Version, need, unmap};

pub(super) const SIGNATURE: &[u8] = b"PROXY ";
/// Length of the shortest line, `PROXY UNKNOWN`.
pub(super) const LEAST: usize = 15;

/// What follows the signature.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Tcp4,
    Tcp6,
    Unknown,
}

impl Protocol {
    const ALL: [Self; 3] = [Self::Tcp4, Self::Tcp6, Self::Unknown];

    fn word(self) -> &'static [u8] {
        match self {
            Self::Tcp4 => b"TCP4",
            Self::Tcp6 => b"TCP6",
            Self::Unknown => b"UNKNOWN",
        }
    }

    /// Lengths of its shortest and its longest line.
    fn lengths(self) -> (usize, usize) {
        match self {
            Self::Tcp4 => (32, 56),
            Self::Tcp6 => (22, 104),
            Self::Unknown => (LEAST, 107),
        }
    }
}

/// `bytes` begin with the signature.
pub(super) fn parse(bytes: &[u8], most: usize) -> Parsed<'_> {
    let rest = bytes.get(SIGNATURE.len()..).unwrap_or_default();
    let Some(protocol) = Protocol::ALL.into_iter().find(|p| rest.starts_with(p.word())) else {
        let possible = Protocol::ALL.into_iter().filter(|p| p.word().starts_with(rest));
        let least = possible.map(|protocol| protocol.lengths().0).min();
        return least.map_or(Parsed::Reject(Reason::Protocol), |least| need(least, most));
    };
    let (least, longest) = protocol.lengths();
    let most = most.min(longest);
    let word_end = SIGNATURE.len() + protocol.word().len();
    match bytes.get(word_end) {
        None => return need(least, most),
        Some(b' ') => {}
        Some(b'\r') if protocol == Protocol::Unknown => {}
        Some(_) => return Parsed::Reject(Reason::Protocol),
    }
    let end = match line_end(bytes, word_end, protocol, most) {
        Ok(end) => end,
        Err(End::Missing(at_least)) => return need(at_least.max(least), most),
        Err(End::HalfThere) => return need(bytes.len().saturating_add(1), most),
        Err(End::Wrong) => return Parsed::Reject(Reason::LineEnd),
    };
    let line = bytes.get(word_end + 1..end).unwrap_or_default();
    let pair = match protocol {
        Protocol::Tcp4 => pair(line, |word| Some(Ipv4Addr::from_str(word).ok()?.into())),
        Protocol::Tcp6 => pair(line, |word| Some(ipv6(word)?.into())),
        Protocol::Unknown => Ok(None),
    };
    match pair {
        Ok(pair) => Parsed::Header(Header {
            version: Version::V1,
            command: Command::Proxy,
            source: pair.map(|(source, _)| source),
            destination: pair.map(|(_, destination)| destination),
            transport: if pair.is_some() {
                Transport::Stream
            } else {
                Transport::Unspec
            },
            len: end + 2,
            tlvs: Tlvs::default(),
        }),
        Err(reason) => Parsed::Reject(reason),
    }
}

/// Why a line has no end (yet).
enum End {
    /// It takes so many bytes in all, at least.
    Missing(usize),
    /// The CR is the last byte that is there.
    HalfThere,
    /// CR or LF on its own.
    Wrong,
}

/// Where the CR of the CRLF is, within `most` bytes.
fn line_end(bytes: &[u8], from: usize, protocol: Protocol, most: usize) -> Result<usize, End> {
    // A CR that is the last byte allowed is none: its LF would be one too many.
    let window = bytes.get(..most.saturating_sub(1)).unwrap_or(bytes);
    let mut at = from;
    while let Some(byte) = window.get(at) {
        match (byte, bytes.get(at + 1)) {
            (b'\r', Some(b'\n')) => return Ok(at),
            (b'\r', None) => return Err(End::HalfThere),
            // Behind "UNKNOWN " everything up to CRLF is to be ignored, and these are something.
            (b'\r' | b'\n', _) if protocol == Protocol::Unknown && at > from => {}
            (b'\r' | b'\n', _) => return Err(End::Wrong),
            _ => {}
        }
        at += 1;
    }
    Err(End::Missing(bytes.len().saturating_add(2)))
}

/// Reads `SOURCE DESTINATION SOURCE-PORT DESTINATION-PORT`.
fn pair(line: &[u8], address: impl Fn(&str) -> Option<IpAddr>) -> Result<Option<(SocketAddr, SocketAddr)>, Reason> {
    let mut words = line.split(|byte| *byte == b' ');
    let mut word = || words.next().filter(|word| !word.is_empty()).ok_or(Reason::Fields);
    let (source, destination, source_port, destination_port) = (word()?, word()?, word()?, word()?);
    if words.next().is_some() {
        return Err(Reason::Fields);
    }
    let address = |word| str::from_utf8(word).ok().and_then(&address).ok_or(Reason::Address);
    let (source, destination) = (address(source)?, address(destination)?);
    let port = |word| port(word).ok_or(Reason::Port);
    Ok(Some((
        SocketAddr::new(source, port(source_port)?),
        SocketAddr::new(destination, port(destination_port)?),
    )))
}

/// Groups of hexadecimal digits, and besides what nginx and HAProxy write for an IPv4 client of an IPv6 listener:
/// `::ffff:192.0.2.1`. No other address may end in dots.
fn ipv6(word: &str) -> Option<Ipv6Addr> {
    let address = Ipv6Addr::from_str(word).ok()?;
    (!word.contains('.') || address.to_ipv4_mapped().is_some()).then_some(address)
}

/// A decimal number without sign and leading zeros.
fn port(word: &[u8]) -> Option<u16> {
    let canonical = word == b"0" || (word.iter().all(u8::is_ascii_digit) && word.first() != Some(&b'0'));
    str::from_utf8(word).ok().filter(|_| canonical)?.parse().ok()
}

/// Appends the line for a client at `source` that connected to `destination`.
///
/// IPv4-mapped addresses are [`unmap`]ped. A pair of different families has no line but `PROXY UNKNOWN`: receivers
/// refuse `TCP6` with an IPv4 address.
pub fn encode(source: SocketAddr, destination: SocketAddr, out: &mut Vec<u8>) {
    let (source, destination) = (unmap(source), unmap(destination));
    let protocol = match (source, destination) {
        (SocketAddr::V4(_), SocketAddr::V4(_)) => "TCP4",
        (SocketAddr::V6(_), SocketAddr::V6(_)) => "TCP6",
        _ => return encode_unknown(out),
    };
    let (ports, source, destination) = ((source.port(), destination.port()), source.ip(), destination.ip());
    write!(
        out,
        "PROXY {protocol} {source} {destination} {} {}\r\n",
        ports.0, ports.1
    )
    .expect("writing to a Vec cannot fail");
}

pub(super) fn encode_unknown(out: &mut Vec<u8>) {
    out.extend_from_slice(b"PROXY UNKNOWN\r\n");
}
