//! The PROXY header as the benchmark's backends want it: version 1 or 2, TCP over IPv4, from one of the clients' addresses
//! to the balancer's. Written for itself: what checks `edged` shares no code with it.

use std::net::Ipv4Addr;

/// The version that a listener wants; it takes no other and no connection without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    /// A line of text.
    V1,
    /// Binary.
    V2,
}

/// Bytes to look at for a whole header: what the specification has a receiver provide for version 2.
pub(crate) const MOST: usize = 536;

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Where every balancer listens.
const BALANCER: Ipv4Addr = Ipv4Addr::LOCALHOST;
const CRC32C: u8 = 0x03;

/// The length of the header that `bytes` begin with, and the client it names; `None` while it is not whole.
///
/// # Errors
///
/// What is wrong with it.
pub(crate) fn parse(version: Version, bytes: &[u8]) -> Result<Option<(usize, Ipv4Addr)>, String> {
    match version {
        Version::V1 => v1(bytes),
        Version::V2 => v2(bytes),
    }
}

fn v1(bytes: &[u8]) -> Result<Option<(usize, Ipv4Addr)>, String> {
    let Some(end) = bytes.windows(2).position(|pair| pair == b"\r\n") else {
        return if bytes.len() < 107 {
            Ok(None)
        } else {
            Err("no end of line".into())
        };
    };
    let line = std::str::from_utf8(&bytes[..end]).map_err(|error| error.to_string())?;
    let wrong = || format!("\"{line}\" is no header of a client here");
    let fields: Vec<&str> = line.split(' ').collect();
    let ["PROXY", "TCP4", source, target, source_port, target_port] = fields[..] else {
        return Err(wrong());
    };
    let address = |text: &str| text.parse::<Ipv4Addr>().map_err(|_| wrong());
    let port = |text: &str| text.parse::<u16>().map_err(|_| wrong());
    let source = check(
        address(source)?,
        address(target)?,
        port(source_port)?,
        port(target_port)?,
    )?;
    Ok(Some((end + 2, source)))
}

fn v2(bytes: &[u8]) -> Result<Option<(usize, Ipv4Addr)>, String> {
    let (Some(head), Some(length)) = (bytes.get(..14), bytes.get(14..16)) else {
        return Ok(None);
    };
    // Version 2, command PROXY; IPv4, stream.
    if &head[..12] != SIGNATURE || head[12..] != [0x21, 0x11] {
        return Err(format!("{head:02x?} is no header of version 2 with an IPv4 client"));
    }
    let whole = 16 + usize::from(u16::from_be_bytes([length[0], length[1]]));
    let Some(header) = bytes.get(..whole) else {
        return if whole <= MOST {
            Ok(None)
        } else {
            Err(format!("a header of {whole} bytes"))
        };
    };
    let Some((addresses, mut tlvs)) = header[16..].split_at_checked(12) else {
        return Err("a header without addresses".into());
    };
    let address = |at: usize| Ipv4Addr::new(addresses[at], addresses[at + 1], addresses[at + 2], addresses[at + 3]);
    let port = |at: usize| u16::from_be_bytes([addresses[at], addresses[at + 1]]);
    let source = check(address(0), address(4), port(8), port(10))?;
    while let [kind, high, low, rest @ ..] = tlvs {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        let Some((value, next)) = rest.split_at_checked(length) else {
            return Err("a TLV longer than its header".into());
        };
        if *kind == CRC32C {
            let at = whole - rest.len();
            let mut zeroed = header.to_vec();
            zeroed.get_mut(at..at + 4).ok_or("a checksum that is cut off")?.fill(0);
            if value != crc32c(&zeroed).to_be_bytes() {
                return Err("a wrong checksum".into());
            }
        }
        tlvs = next;
    }
    if tlvs.is_empty() {
        Ok(Some((whole, source)))
    } else {
        Err("bytes behind the last TLV".into())
    }
}

fn check(source: Ipv4Addr, target: Ipv4Addr, source_port: u16, target_port: u16) -> Result<Ipv4Addr, String> {
    // The balancers' ports are those of tests/peers/.
    if target == BALANCER && (8000..8100).contains(&target_port) && source_port >= 1024 {
        Ok(source)
    } else {
        Err(format!(
            "{source}:{source_port} to {target}:{target_port}: nobody here connects so"
        ))
    }
}

/// CRC-32 of Castagnoli (RFC 3720, appendix B.4), bit by bit: headers are short.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn second(tlvs: &[u8]) -> Vec<u8> {
        let mut header = SIGNATURE.to_vec();
        header.extend([0x21, 0x11]);
        header.extend((12 + tlvs.len() as u16).to_be_bytes());
        header.extend([127, 0, 1, 5, 127, 0, 0, 1, 0x9c, 0x40, 0x1f, 0x47]);
        header.extend(tlvs);
        header
    }

    #[test]
    fn rfc_3720_checksum_of_32_zeroes() {
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn a_header_is_read_only_when_it_is_whole_and_the_payload_behind_it_is_left() {
        let line = b"PROXY TCP4 127.0.1.5 127.0.0.1 40000 8009\r\n".to_vec();
        for (version, header) in [(Version::V1, line), (Version::V2, second(&[5, 0, 2, 1, 2]))] {
            for length in 0..header.len() {
                assert_eq!(parse(version, &header[..length]), Ok(None), "{version:?} {length}");
            }
            let found = parse(version, &[&header[..], b"payload"].concat());
            assert_eq!(found, Ok(Some((header.len(), Ipv4Addr::new(127, 0, 1, 5)))));
        }
    }

    #[test]
    fn what_is_not_right_is_refused() {
        let mut summed = second(&[CRC32C, 0, 4, 0, 0, 0, 0]);
        let sum = crc32c(&summed);
        let at = summed.len() - 4;
        summed[at..].copy_from_slice(&sum.to_be_bytes());
        assert!(parse(Version::V2, &summed).is_ok());
        // All but the checksum's own kind: as another TLV it sums up nothing.
        for at in (12..summed.len()).filter(|at| *at != 28) {
            let mut changed = summed.clone();
            changed[at] ^= 1;
            assert!(
                !matches!(parse(Version::V2, &changed), Ok(Some(_))),
                "byte {at} changed"
            );
        }
        assert!(
            parse(Version::V2, &second(&[5, 0, 9, 1])).is_err(),
            "a TLV that overruns"
        );
        assert!(
            parse(Version::V1, b"PROXY TCP4 127.0.1.5 127.0.0.2 40000 8009\r\n").is_err(),
            "another target"
        );
        assert!(parse(Version::V1, b"PROXY UNKNOWN\r\n").is_err());
        assert!(parse(Version::V2, b"GET / HTTP/1.1\r\nhost: ").is_err(), "no header");
    }
}
