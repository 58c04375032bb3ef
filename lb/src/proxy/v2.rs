//! Version 2: 16 fixed bytes, addresses, TLVs (specification, 2.2).

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use super::{Command, Header, Parsed, Reason, Tlv, Tlvs, Transport, Version, crc32c::crc32c, need, tlv, unmap};

pub(super) const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version and command, family and transport, length of what follows.
pub(super) const FIXED: usize = 16;

const LOCAL: u8 = 0x20;
const PROXY: u8 = 0x21;
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;

/// `bytes` begin with the signature.
pub(super) fn parse(bytes: &[u8], most: usize) -> Parsed<'_> {
    match header(bytes, most) {
        Ok(parsed) => parsed,
        Err(reason) => Parsed::Reject(reason),
    }
}

fn header(bytes: &[u8], most: usize) -> Result<Parsed<'_>, Reason> {
    let Some((version, command)) = bytes.get(SIGNATURE.len()).map(nibbles) else {
        return Ok(need(FIXED, most));
    };
    if version != 2 {
        return Err(Reason::VersionNibble(version));
    }
    let command = match command {
        0 => Command::Local,
        1 => Command::Proxy,
        other => return Err(Reason::Command(other)),
    };
    let Some(kind) = bytes.get(SIGNATURE.len() + 1).map(nibbles) else {
        return Ok(need(FIXED, most));
    };
    let kind = match command {
        // A LOCAL header's family and addresses are to be ignored, whatever they are.
        Command::Local => None,
        Command::Proxy => kind_of(kind)?,
    };
    let Some((fixed, rest)) = bytes.split_first_chunk::<FIXED>() else {
        return Ok(need(FIXED, most));
    };
    let [.., high, low] = *fixed;
    let len = FIXED + usize::from(u16::from_be_bytes([high, low]));
    if len > most {
        return Err(Reason::TooLong(most));
    }
    if let Some((family, _)) = kind
        && len - FIXED < family.addresses()
    {
        return Err(Reason::AddressesCut);
    }
    let (Some(whole), Some(body)) = (bytes.get(..len), rest.get(..len - FIXED)) else {
        return Ok(Parsed::NeedMore { at_least: len });
    };
    let mut header = Header {
        version: Version::V2,
        command,
        source: None,
        destination: None,
        transport: Transport::Unspec,
        len,
        tlvs: Tlvs::default(),
    };
    if let Some((family, transport)) = kind {
        let (addresses, tlvs) = body.split_at_checked(family.addresses()).ok_or(Reason::AddressesCut)?;
        header.transport = transport;
        header.tlvs = tlv::checked(tlvs, whole)?;
        if let Some((source, destination)) = family.read(addresses) {
            header.source = Some(source);
            header.destination = Some(destination);
        }
    }
    Ok(Parsed::Header(header))
}

/// The high and the low one.
fn nibbles(byte: &u8) -> (u8, u8) {
    (byte >> 4, byte & 15)
}

#[derive(Clone, Copy)]
enum Family {
    Ipv4,
    Ipv6,
    Unix,
}

/// Family and transport of the two nibbles; `None` if either is UNSPEC: the addresses, if there are any, then say
/// nothing, and where they end is not told.
fn kind_of((family, transport): (u8, u8)) -> Result<Option<(Family, Transport)>, Reason> {
    let family = match family {
        0 => None,
        1 => Some(Family::Ipv4),
        2 => Some(Family::Ipv6),
        3 => Some(Family::Unix),
        other => return Err(Reason::Family(other)),
    };
    let transport = match transport {
        0 => None,
        1 => Some(Transport::Stream),
        2 => Some(Transport::Datagram),
        other => return Err(Reason::Transport(other)),
    };
    Ok(family.zip(transport))
}

impl Family {
    /// Bytes of its pair of addresses, ports included.
    fn addresses(self) -> usize {
        match self {
            Self::Ipv4 => 12,
            Self::Ipv6 => 36,
            Self::Unix => 216,
        }
    }

    fn read(self, bytes: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
        match self {
            Self::Ipv4 => pair::<4>(bytes),
            Self::Ipv6 => pair::<16>(bytes),
            Self::Unix => None,
        }
    }
}

/// Two addresses of `N` bytes, then two ports.
fn pair<const N: usize>(bytes: &[u8]) -> Option<(SocketAddr, SocketAddr)>
where
    IpAddr: From<[u8; N]>,
{
    let (source, bytes) = bytes.split_first_chunk::<N>()?;
    let (destination, bytes) = bytes.split_first_chunk::<N>()?;
    let (source_port, bytes) = bytes.split_first_chunk::<2>()?;
    let destination_port = bytes.first_chunk::<2>()?;
    let address = |ip: &[u8; N], port: &[u8; 2]| SocketAddr::new(IpAddr::from(*ip), u16::from_be_bytes(*port));
    Some((address(source, source_port), address(destination, destination_port)))
}

/// Appends the header for a client at `source` that connected to `destination` by TCP, with `tlvs`, and with a checksum
/// over all of it behind them if `checksum`.
///
/// IPv4-mapped addresses are [`unmap`]ped; of a pair of different families the IPv4 one is mapped again. Left out is a
/// TLV that receivers would refuse: one that is too long for its type or for the whole, and a checksum that the caller
/// brings.
pub fn encode(source: SocketAddr, destination: SocketAddr, tlvs: &[Tlv<'_>], checksum: bool, out: &mut Vec<u8>) {
    let begin = out.len();
    out.extend_from_slice(SIGNATURE);
    let (source, destination) = (unmap(source), unmap(destination));
    match (source.ip(), destination.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            out.extend_from_slice(&[PROXY, TCP4, 0, 0]);
            out.extend_from_slice(&from.octets());
            out.extend_from_slice(&to.octets());
        }
        (from, to) => {
            out.extend_from_slice(&[PROXY, TCP6, 0, 0]);
            out.extend_from_slice(&ipv6(from).octets());
            out.extend_from_slice(&ipv6(to).octets());
        }
    }
    out.extend_from_slice(&source.port().to_be_bytes());
    out.extend_from_slice(&destination.port().to_be_bytes());
    let body = begin + FIXED;
    let reserved = if checksum { tlv::CHECKSUM } else { 0 };
    for tlv in tlvs.iter().filter(|tlv| tlv.may_be_sent()) {
        if out.len() - body + tlv.len() + reserved <= usize::from(u16::MAX) {
            tlv.append(out);
        }
    }
    if checksum {
        Tlv {
            kind: tlv::CRC32C,
            value: &[0; 4],
        }
        .append(out);
    }
    let length = u16::try_from(out.len() - body).expect("no TLV was appended that does not fit");
    if let Some(field) = out.get_mut(body - 2..body) {
        field.copy_from_slice(&length.to_be_bytes());
    }
    if checksum {
        let sum = crc32c(0, out.get(begin..).unwrap_or_default());
        let end = out.len() - 4;
        out.truncate(end);
        out.extend_from_slice(&sum.to_be_bytes());
    }
}

pub(super) fn encode_local(out: &mut Vec<u8>) {
    out.extend_from_slice(SIGNATURE);
    out.extend_from_slice(&[LOCAL, 0, 0, 0]);
}

fn ipv6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}
