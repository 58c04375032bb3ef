//! Who may change what: a node its own name, with addresses of the zone that are free or its own.

use std::{fmt, net::Ipv6Addr};

use hickory_proto::{
    op::ResponseCode,
    rr::{DNSClass, Name, RData, Record, RecordType, rdata::sshfp::FingerprintType},
};

use super::data::Sets;

/// Seconds that others may keep a node's records at most. A longer TTL is cut to it: a node that is gone should be
/// forgotten within a day.
pub const LONGEST_TTL: u32 = 86_400;
/// Seconds at least: a TTL of 0 would send every lookup in the cluster here.
pub const SHORTEST_TTL: u32 = 30;

/// Updates in one message at most: some for each record that a node may have. A message of 64 KiB has room for thousands.
pub const LONGEST_UPDATE: usize = 128;

/// How many records of each type a node may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Addresses; 8 unless configured.
    pub addresses: usize,
    /// Fingerprints of SSH host keys: 8, two for each of the four kinds in use.
    pub fingerprints: usize,
    /// TXT records; 4, of at most 256 octets each, lengths of strings included.
    pub texts: usize,
}

/// Why an update is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// RFC 2136 itself says so: a prerequisite that is not met, a malformed message, a zone that is not ours.
    Protocol(ResponseCode),
    /// It is not signed.
    Unsigned,
    /// The name is not that of the key's node.
    OtherName(Name),
    /// The name is the edge's own: the apex, the name server, `api`, or one of a static record.
    Reserved(Name),
    /// A node's name has no records of this type.
    Kind(RecordType),
    /// The address lies in none of the zone's prefixes, or is the anycast address of one.
    Outside(Ipv6Addr),
    /// Another name has the address.
    Held {
        /// The address.
        address: Ipv6Addr,
        /// Who has it.
        holder: Name,
    },
    /// More records than a node may have.
    TooMany {
        /// Of this type.
        kind: RecordType,
        /// So many it may have.
        most: usize,
    },
    /// More updates in one message than [`LONGEST_UPDATE`].
    TooLong,
    /// A fingerprint whose length does not fit its type.
    Fingerprint,
    /// Text beyond 256 octets, lengths of strings included, or with octets other than printable ASCII.
    Text,
    /// The reverse zone would not match the node's addresses any more.
    Reverse(Name),
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            addresses: 8,
            fingerprints: 8,
            texts: 4,
        }
    }
}

impl Refused {
    /// The answer's code.
    pub const fn code(&self) -> ResponseCode {
        match self {
            Self::Protocol(code) => *code,
            _ => ResponseCode::Refused,
        }
    }

    /// As in metrics.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Protocol(ResponseCode::FormErr) => "form",
            Self::Protocol(ResponseCode::NotAuth) => "not-our-zone",
            Self::Protocol(ResponseCode::NotZone) => "not-in-zone",
            Self::Protocol(_) => "prerequisite",
            Self::Unsigned => "unsigned",
            Self::OtherName(_) => "other-name",
            Self::Reserved(_) => "reserved",
            Self::Kind(_) => "type",
            Self::Outside(_) => "outside",
            Self::Held { .. } => "held",
            Self::TooMany { .. } => "too-many",
            Self::TooLong => "too-long",
            Self::Fingerprint => "fingerprint",
            Self::Text => "text",
            Self::Reverse(_) => "reverse",
        }
    }
}

impl From<ResponseCode> for Refused {
    fn from(code: ResponseCode) -> Self {
        Self::Protocol(code)
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Protocol(code) => write!(f, "{code}"),
            Self::Unsigned => write!(f, "the update is not signed"),
            Self::OtherName(name) => write!(f, "{name} is not the name of the key's node"),
            Self::Reserved(name) => write!(f, "{name} is the edge's own"),
            Self::Kind(kind) => write!(f, "a node has no {kind} records; it may have AAAA, SSHFP and TXT"),
            Self::Outside(address) => write!(f, "{address} is no address of a node in this zone"),
            Self::Held { address, holder } => write!(f, "{holder} has {address}"),
            Self::TooMany { kind, most } => write!(f, "a node may have {most} {kind} records"),
            Self::TooLong => write!(f, "a message holds at most {LONGEST_UPDATE} updates"),
            Self::Fingerprint => write!(f, "an SSHFP fingerprint is 20 (SHA-1) or 32 octets (SHA-256) long"),
            Self::Text => write!(
                f,
                "a TXT record holds at most 256 octets, one of them for the length of each string, all printable ASCII"
            ),
            Self::Reverse(name) => write!(f, "the PTR at {name} follows the AAAA; change that"),
        }
    }
}

impl std::error::Error for Refused {}

/// Whether a node may ask for `update` at its own name. What an address says to other names is the zone's to check.
///
/// Deletions are free: at its own name there is nothing but its own, and scripts delete A before they add AAAA.
pub(super) fn permit(update: &Record) -> Result<(), Refused> {
    if update.dns_class != DNSClass::IN {
        return Ok(());
    }
    match &update.data {
        RData::AAAA(_) => Ok(()),
        RData::SSHFP(sshfp) => {
            let length = match sshfp.fingerprint_type {
                FingerprintType::SHA1 => 20,
                FingerprintType::SHA256 => 32,
                _ => return Err(Refused::Fingerprint),
            };
            if sshfp.fingerprint.len() == length {
                Ok(())
            } else {
                Err(Refused::Fingerprint)
            }
        }
        RData::TXT(txt) => {
            // Empty strings take room too: an octet each for their length.
            let size: usize = txt.txt_data.iter().map(|string| 1 + string.len()).sum();
            let mut octets = txt.txt_data.iter().flatten();
            if size <= 256 && octets.all(|octet| matches!(octet, b' '..=b'~')) {
                Ok(())
            } else {
                Err(Refused::Text)
            }
        }
        other => Err(Refused::Kind(other.record_type())),
    }
}

/// Whether a node may have all of `sets`.
pub(super) fn count(sets: &Sets, limits: Limits) -> Result<(), Refused> {
    for (kind, set) in sets {
        let most = match kind {
            RecordType::AAAA => limits.addresses,
            RecordType::SSHFP => limits.fingerprints,
            RecordType::TXT => limits.texts,
            _ => return Err(Refused::Kind(*kind)),
        };
        if set.data.len() > most {
            return Err(Refused::TooMany { kind: *kind, most });
        }
    }
    Ok(())
}

/// The TTL that a node's records get when it asks for `ttl`; one with the highest bit set means 0 (RFC 2181 §8).
pub(super) fn ttl(ttl: u32) -> u32 {
    let ttl = if ttl >> 31 == 0 { ttl } else { 0 };
    ttl.clamp(SHORTEST_TTL, LONGEST_TTL)
}
