//! The PROXY protocol, versions 1 and 2: whom a connection is for, told in front of its first byte.
//!
//! [`parse`] looks at the first bytes of a connection, [`encode_v1`], [`encode_v2`] and [`encode_local`] write them. The
//! rules are those of HAProxy's `doc/proxy-protocol.txt` (the *specification* here), without its liberties: a header is
//! exactly right or refused, as early as its bytes tell, and nothing behind it is looked at.
//!
//! Whether a header is to be expected is never guessed from the bytes: whoever may invent one may invent an address
//! (specification, section 5). That is the caller's to know from its configuration and the peer's address, [`unmap`]ped.

mod crc32c;
mod tlv;
mod v1;
mod v2;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;

pub use tlv::{ALPN, AUTHORITY, CRC32C, NETNS, NOOP, SSL, Tlv, Tlvs, UNIQUE_ID};
pub use v1::encode as encode_v1;
pub use v2::encode as encode_v2;

/// Which of the two formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// A line of text.
    V1,
    /// Binary, with TLVs.
    V2,
}

/// The versions that a receiver takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Versions {
    /// Either.
    #[default]
    Any,
    /// This one only.
    Only(Version),
}

impl Versions {
    fn include(self, version: Version) -> bool {
        self == Self::Any || self == Self::Only(version)
    }
}

/// The longest headers that a receiver takes, in bytes from the first to the last of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Of version 1, CR and LF included. More than the default has no effect: no valid line is longer.
    pub v1: usize,
    /// Of version 2, its 16 fixed bytes included; at most 65 551 can be expressed.
    pub v2: usize,
}

/// 107 bytes, the longest valid line, and 536 bytes, the least that one TCP segment always holds (RFC 9293, 3.7.1).
impl Default for Limits {
    fn default() -> Self {
        Self { v1: 107, v2: 536 }
    }
}

/// What the first bytes of a connection are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed<'a> {
    /// The beginning of a header, or nothing yet.
    NeedMore {
        /// So many bytes from the first on are part of any header that begins like this: more than were given, and no
        /// more than the limit. A reader that waits for them never waits for payload.
        at_least: usize,
    },
    /// No header that can be accepted, whatever follows.
    Reject(Reason),
    /// A whole header.
    Header(Header<'a>),
}

/// A whole header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header<'a> {
    /// Its format.
    pub version: Version,
    /// Whether it speaks for somebody else.
    pub command: Command,
    /// The client, as written: an IPv4-mapped address stays one. `None` for [`Command::Local`], for version 1's UNKNOWN
    /// and version 2's UNSPEC, and for unix sockets; the addresses of the connection itself then stand.
    pub source: Option<SocketAddr>,
    /// What the client connected to; there if `source` is, and of the same family.
    pub destination: Option<SocketAddr>,
    /// What the client spoke.
    pub transport: Transport,
    /// Length of the header in bytes: the payload begins there.
    pub len: usize,
    /// Its TLVs, checked: none in version 1, and none where there is no telling where they begin (LOCAL, UNSPEC).
    pub tlvs: Tlvs<'a>,
}

/// On whose behalf the connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// The proxy's own, such as a health check.
    Local,
    /// A client's.
    Proxy,
}

/// What the client spoke to the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP, or a unix stream socket.
    Stream,
    /// UDP, or a unix datagram socket.
    Datagram,
    /// Not told.
    Unspec,
}

/// Why bytes are no acceptable header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Reason {
    /// Neither signature.
    #[error("the connection does not begin with a PROXY header")]
    NoHeader,
    /// A version that [`Versions`] leaves out.
    #[error("the PROXY header is of version {}, which is not accepted here", match .0 { Version::V1 => 1, Version::V2 => 2 })]
    VersionNotAccepted(Version),
    /// Longer than [`Limits`] allow.
    #[error("the PROXY header is longer than the {0} bytes that are accepted")]
    TooLong(usize),
    /// Version 1: neither TCP4, TCP6 nor UNKNOWN.
    #[error("the PROXY line names a protocol other than TCP4, TCP6 and UNKNOWN")]
    Protocol,
    /// Version 1: CR without LF, or LF without CR.
    #[error("the PROXY line has a carriage return or a line feed on its own")]
    LineEnd,
    /// Version 1: more or fewer words, or more than a space between two.
    #[error("the PROXY line is not two addresses and two ports, with one space between each")]
    Fields,
    /// Version 1: no address, one of the other family, or one with leading zeros.
    #[error("the PROXY line has an address that is not one of the family it names")]
    Address,
    /// Version 1: no decimal number up to 65535, or one with a sign or leading zeros.
    #[error("the PROXY line has a port that is not a number from 0 to 65535")]
    Port,
    /// Version 2: the version nibble is not 2.
    #[error("the PROXY header has the version nibble {0}; only 2 is defined")]
    VersionNibble(u8),
    /// Version 2: neither LOCAL nor PROXY.
    #[error("the PROXY header has the command {0}; only 0 (LOCAL) and 1 (PROXY) are defined")]
    Command(u8),
    /// Version 2: an address family beyond unix.
    #[error("the PROXY header has the address family {0}; only 0 to 3 are defined")]
    Family(u8),
    /// Version 2: a transport beyond datagrams.
    #[error("the PROXY header has the transport {0}; only 0 to 2 are defined")]
    Transport(u8),
    /// Version 2: too short for the addresses of its family.
    #[error("the PROXY header is too short for the addresses of its family")]
    AddressesCut,
    /// Version 2: a TLV that does not end where the header does, or before.
    #[error("the PROXY header ends in the middle of a TLV")]
    TlvCut,
    /// Version 2: longer than a TLV of this type may be.
    #[error("the PROXY header has a TLV of type {0:#04x} that is longer than accepted")]
    TlvTooLong(u8),
    /// Version 2: a checksum that is not four bytes, or a second one.
    #[error("the PROXY header has a checksum that is not four bytes long, or more than one")]
    ChecksumForm,
    /// Version 2: the checksum is not that of the header.
    #[error("the PROXY header does not match its checksum")]
    Checksum,
}

impl Reason {
    /// Its name as a label of a counter.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoHeader => "no-header",
            Self::VersionNotAccepted(_) => "version-not-accepted",
            Self::TooLong(_) => "too-long",
            Self::Protocol => "protocol",
            Self::LineEnd => "line-end",
            Self::Fields => "fields",
            Self::Address => "address",
            Self::Port => "port",
            Self::VersionNibble(_) => "version-nibble",
            Self::Command(_) => "command",
            Self::Family(_) => "family",
            Self::Transport(_) => "transport",
            Self::AddressesCut => "addresses-cut",
            Self::TlvCut => "tlv-cut",
            Self::TlvTooLong(_) => "tlv-too-long",
            Self::ChecksumForm => "checksum-form",
            Self::Checksum => "checksum",
        }
    }
}

/// Reads the header at the beginning of `bytes`, which are the connection's from its first on. It allocates nothing and
/// looks at nothing behind the header.
///
/// More bytes never change a [`Parsed::Header`] or a [`Parsed::Reject`].
pub fn parse<'a>(bytes: &'a [u8], limits: &Limits, versions: Versions) -> Parsed<'a> {
    let (version, signature, least, most) = match bytes.first() {
        None => {
            let v1 = versions.include(Version::V1);
            let (least, most) = if v1 {
                (v1::LEAST, limits.v1)
            } else {
                (v2::FIXED, limits.v2)
            };
            return need(least, most);
        }
        Some(b'P') => (Version::V1, v1::SIGNATURE, v1::LEAST, limits.v1),
        Some(b'\r') => (Version::V2, v2::SIGNATURE, v2::FIXED, limits.v2),
        Some(_) => return Parsed::Reject(Reason::NoHeader),
    };
    if !bytes.iter().zip(signature).all(|(byte, wanted)| byte == wanted) {
        return Parsed::Reject(Reason::NoHeader);
    }
    let accepted = versions.include(version);
    if bytes.len() < signature.len() {
        // Which of two wrong things it is, is worth a few bytes to who has to find the fault.
        return need(if accepted { least } else { signature.len() }, most);
    }
    match version {
        _ if !accepted => Parsed::Reject(Reason::VersionNotAccepted(version)),
        Version::V1 => v1::parse(bytes, most),
        Version::V2 => v2::parse(bytes, most),
    }
}

/// Appends the header of a connection that is the proxy's own, such as a health check: a receiver that insists on a
/// header gets one, and goes by the addresses of the connection.
///
/// Some receivers of version 1 refuse its UNKNOWN (specification, 2.1): to these, a check sends [`encode_v1`] with the
/// two ends of its own connection.
pub fn encode_local(version: Version, out: &mut Vec<u8>) {
    match version {
        Version::V1 => v1::encode_unknown(out),
        Version::V2 => v2::encode_local(out),
    }
}

/// `address` without the IPv6 clothes that an IPv4 peer wears on an IPv6 socket (`::ffff:192.0.2.1`).
pub fn unmap(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn need(at_least: usize, most: usize) -> Parsed<'static> {
    if at_least > most {
        Parsed::Reject(Reason::TooLong(most))
    } else {
        Parsed::NeedMore { at_least }
    }
}
