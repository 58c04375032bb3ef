//! What is kept of a zone on disk: what nodes have said of themselves, and how far serials and signatures are.
//!
//! It is made to be read: names, addresses and fingerprints are text.

use std::{collections::BTreeMap, fmt, net::Ipv6Addr, str::FromStr};

use hickory_proto::{
    ProtoError,
    rr::{
        Name, RData, RecordType,
        rdata::{AAAA, SSHFP, TXT},
    },
};
use serde::{Deserialize, Serialize};

use super::data::{Sets, insert};

/// A name, fully qualified and lower-case, that is text in storage.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Owner(Name);

/// All that updates have brought about in one zone and its reverse zones.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The serial of each zone, by its origin.
    #[serde(default)]
    pub serials: BTreeMap<Owner, u32>,
    /// What each node has; never empty.
    #[serde(default)]
    pub nodes: BTreeMap<Owner, Vec<NodeRecord>>,
    /// When the last update that changed something was signed, in UNIX seconds, by key. Older ones are replays.
    #[serde(default)]
    pub signed: BTreeMap<Owner, u64>,
}

/// What one update, or the removal of a node, changes. Meaningless to any zone but the one in just that state that it was
/// made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// The zone, by its origin.
    pub zone: Owner,
    /// Its serial before.
    pub base: u32,
    /// Whose name it is.
    pub node: Owner,
    /// All that the name has afterwards; nothing if it is no more.
    pub records: Vec<NodeRecord>,
    /// The serials that are raised, by origin; the zone's own is always among them.
    pub serials: BTreeMap<Owner, u32>,
    /// The key that signed it and when, in UNIX seconds; `None` for what the edge itself does.
    pub signed: Option<(Owner, u64)>,
}

/// A record that a node may have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "UPPERCASE", deny_unknown_fields)]
pub enum NodeRecord {
    /// An address.
    Aaaa {
        /// Seconds.
        ttl: u32,
        /// Inside the zone's prefixes, and nobody else's.
        address: Ipv6Addr,
    },
    /// The fingerprint of an SSH host key (RFC 4255).
    Sshfp {
        /// Seconds.
        ttl: u32,
        /// Of the key, by its number in RFC 4255 and its successors.
        algorithm: u8,
        /// 1 for SHA-1, 2 for SHA-256.
        fingerprint_type: u8,
        /// In hexadecimal.
        fingerprint: String,
    },
    /// Text.
    Txt {
        /// Seconds.
        ttl: u32,
        /// Printable ASCII.
        text: Vec<String>,
    },
}

impl Owner {
    /// `name`, lower-case and fully qualified.
    pub fn of(name: &Name) -> Self {
        let mut name = name.to_lowercase();
        name.set_fqdn(true);
        Self(name)
    }

    /// The name.
    pub const fn name(&self) -> &Name {
        &self.0
    }
}

impl State {
    /// Carries `change` out on what is stored.
    pub fn apply(&mut self, change: Change) {
        if change.records.is_empty() {
            self.nodes.remove(&change.node);
        } else {
            self.nodes.insert(change.node, change.records);
        }
        self.serials.extend(change.serials);
        self.signed.extend(change.signed);
    }
}

impl NodeRecord {
    /// The TTL in seconds and the data, as the zone has it; `None` for a fingerprint that is not hexadecimal.
    pub fn to_rdata(&self) -> Option<(u32, RData)> {
        Some(match self {
            Self::Aaaa { ttl, address } => (*ttl, RData::AAAA(AAAA(*address))),
            Self::Sshfp {
                ttl,
                algorithm,
                fingerprint_type,
                fingerprint,
            } => {
                let sshfp = SSHFP::new((*algorithm).into(), (*fingerprint_type).into(), from_hex(fingerprint)?);
                (*ttl, RData::SSHFP(sshfp))
            }
            Self::Txt { ttl, text } => (*ttl, RData::TXT(TXT::new(text.clone()))),
        })
    }

    /// Octets that it takes at most: see [`Memory::weight`](super::Memory::weight).
    pub(super) fn weight(&self) -> usize {
        match self {
            // A second time as the address's PTR.
            Self::Aaaa { .. } => 384,
            Self::Sshfp { fingerprint, .. } => 192 + fingerprint.len(),
            Self::Txt { text, .. } => 192 + text.iter().map(|text| 8 + 2 * text.len()).sum::<usize>(),
        }
    }

    fn of(ttl: u32, data: &RData) -> Option<Self> {
        Some(match data {
            RData::AAAA(address) => Self::Aaaa {
                ttl,
                address: address.0,
            },
            RData::SSHFP(sshfp) => Self::Sshfp {
                ttl,
                algorithm: sshfp.algorithm.into(),
                fingerprint_type: sshfp.fingerprint_type.into(),
                fingerprint: hex(&sshfp.fingerprint),
            },
            RData::TXT(txt) => Self::Txt {
                ttl,
                text: txt
                    .txt_data
                    .iter()
                    .map(|text| String::from_utf8_lossy(text).into_owned())
                    .collect(),
            },
            _ => return None,
        })
    }
}

/// What `sets` are in storage. Types that no node has are left out; the policy lets none in.
pub(super) fn to_records(sets: &Sets) -> Vec<NodeRecord> {
    sets.values()
        .flat_map(|set| set.data.iter().filter_map(|data| NodeRecord::of(set.ttl, data)))
        .collect()
}

/// What `records` are in a zone.
pub(super) fn to_sets(records: &[NodeRecord]) -> Sets {
    let mut sets = Sets::new();
    for (ttl, data) in records.iter().filter_map(NodeRecord::to_rdata) {
        insert(&mut sets, ttl, data);
    }
    sets
}

/// The addresses among `sets`.
pub(super) fn addresses(sets: &Sets) -> impl Iterator<Item = Ipv6Addr> {
    sets.get(&RecordType::AAAA)
        .into_iter()
        .flat_map(|set| &set.data)
        .filter_map(|data| match data {
            RData::AAAA(address) => Some(address.0),
            _ => None,
        })
}

fn hex(octets: &[u8]) -> String {
    octets.iter().map(|octet| format!("{octet:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.bytes().all(|octet| octet.is_ascii_hexdigit()) || !text.len().is_multiple_of(2) {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok())
        .collect()
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.to_ascii())
    }
}

impl FromStr for Owner {
    type Err = ProtoError;

    fn from_str(text: &str) -> Result<Self, ProtoError> {
        Name::from_ascii(text).map(|name| Self::of(&name))
    }
}

impl TryFrom<String> for Owner {
    type Error = ProtoError;

    fn try_from(text: String) -> Result<Self, ProtoError> {
        text.parse()
    }
}

impl From<Owner> for String {
    fn from(owner: Owner) -> Self {
        owner.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_is_read_back_as_it_was_written_and_can_be_read_by_people() {
        let text = r#"{
  "serials": {
    "fleet.": 4294967295
  },
  "nodes": {
    "node1.fleet.": [
      {
        "type": "AAAA",
        "ttl": 1800,
        "address": "fd0d::11"
      },
      {
        "type": "SSHFP",
        "ttl": 300,
        "algorithm": 4,
        "fingerprint_type": 2,
        "fingerprint": "00ff"
      },
      {
        "type": "TXT",
        "ttl": 300,
        "text": [
          "rack 7",
          "slot \"2\""
        ]
      }
    ]
  },
  "signed": {
    "node1.fleet.": 1795284575
  }
}"#;
        let state: State = serde_json::from_str(text).expect("state");
        assert_eq!(serde_json::to_string_pretty(&state).expect("text"), text);
        let records = &state.nodes[&"NODE1.fleet".parse::<Owner>().expect("a name")];
        assert_eq!(to_records(&to_sets(records)).len(), 3);
        assert!(
            records
                .iter()
                .all(|record| to_records(&to_sets(records)).contains(record))
        );
    }

    #[test]
    fn a_fingerprint_that_is_not_hexadecimal_is_left_out_and_harms_nothing() {
        for fingerprint in ["0", "0g", "ä0", "+1", "é"] {
            let record = NodeRecord::Sshfp {
                ttl: 60,
                algorithm: 4,
                fingerprint_type: 2,
                fingerprint: fingerprint.to_owned(),
            };
            assert!(to_sets(&[record]).is_empty(), "{fingerprint}");
        }
    }
}
