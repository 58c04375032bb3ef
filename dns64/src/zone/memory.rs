//! What outlives the service: the store has it, and gives it to the next one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Change, Key, Keys, NodeRecord, Owner, State};

/// Octets for a name with what is said of it: 255 would be the longest, and those of nodes are short.
const NAME: usize = 128;
/// Octets for a key.
const KEY: usize = 384;

/// Everything that is durable.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// What nodes registered, by zone.
    pub zones: BTreeMap<Owner, State>,
    /// The keys of nodes.
    pub keys: Keys,
}

/// What must be on the disk before it is in force.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Durable {
    /// A node's records are others.
    Zone(Change),
    /// A node has a key.
    Key(Key),
    /// A key is no longer good; with a node's last one its records go.
    KeyRemoved {
        /// The key.
        name: Owner,
        /// The end of the node's records.
        change: Option<Change>,
    },
}

impl Memory {
    /// Keeps in mind what has been made durable.
    pub fn keep(&mut self, durable: Durable) {
        match durable {
            Durable::Zone(change) => self.change(change),
            // It was checked before it was stored.
            Durable::Key(key) => drop(self.keys.add(key)),
            Durable::KeyRemoved { name, change } => {
                let removed = self.keys.remove(&name);
                for state in self.zones.values_mut() {
                    state.signed.remove(&name);
                    // Also in zones that are not configured now: nobody could remove it there later.
                    if let Some(removed) = removed.as_ref().filter(|removed| removed.last) {
                        state.nodes.remove(&removed.node);
                    }
                }
                if let Some(change) = change {
                    self.change(change);
                }
            }
        }
    }

    /// Octets that all of it takes at most, in storage and in what an operator is shown of it, names of reverse zones included.
    pub fn weight(&self) -> usize {
        let nodes = self.zones.values().flat_map(|state| state.nodes.values());
        let signed = self.zones.values().flat_map(|state| state.signed.keys());
        nodes.map(|records| weight(records)).sum::<usize>()
            + signed.map(|_| NAME).sum::<usize>()
            + self.keys.iter().map(|_| KEY).sum::<usize>()
    }

    /// Octets by which `durable` adds to [`Memory::weight`]; 0 for what makes it less.
    pub fn growth(&self, durable: &Durable) -> usize {
        match durable {
            Durable::Zone(change) => {
                let before = self
                    .zones
                    .get(&change.zone)
                    .and_then(|state| state.nodes.get(&change.node));
                weight(&change.records).saturating_sub(before.map_or(0, |records| weight(records)))
            }
            Durable::Key(_) => KEY + NAME,
            Durable::KeyRemoved { .. } => 0,
        }
    }

    fn change(&mut self, change: Change) {
        self.zones.entry(change.zone.clone()).or_default().apply(change);
    }
}

/// Octets of one node's records at most.
fn weight(records: &[NodeRecord]) -> usize {
    records.iter().map(NodeRecord::weight).sum()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;
    use crate::zone::Algorithm;

    #[test]
    fn what_is_kept_weighs_more_than_its_text_and_grows_by_what_is_said() {
        let owner = |name: &str| name.parse::<Owner>().expect("a name");
        let mut memory = Memory::default();
        let mut grown = 0;
        for number in 0..100_u16 {
            let node = owner(&format!("node{number}.fleet."));
            let key = Key::mint(node.clone(), Algorithm::HmacSha512, node.clone(), &[7; 64]).expect("a key");
            let records = vec![
                NodeRecord::Aaaa {
                    ttl: 86_400,
                    address: Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, number),
                },
                NodeRecord::Txt {
                    ttl: 86_400,
                    text: vec!["\"".repeat(255)],
                },
                NodeRecord::Txt {
                    ttl: 86_400,
                    text: vec![String::new(); 256],
                },
                NodeRecord::Sshfp {
                    ttl: 86_400,
                    algorithm: 4,
                    fingerprint_type: 2,
                    fingerprint: "a".repeat(64),
                },
            ];
            let change = Change {
                zone: owner("fleet."),
                base: number.into(),
                node: node.clone(),
                records,
                serials: [(owner("fleet."), u32::from(number) + 1)].into(),
                signed: Some((node, 1_800_000_000)),
            };
            for durable in [Durable::Key(key), Durable::Zone(change.clone())] {
                grown += memory.growth(&durable);
                memory.keep(durable);
            }
            assert_eq!(memory.growth(&Durable::Zone(change)), 0, "the same again");
        }
        let text = serde_json::to_string(&memory).expect("text");
        assert!(memory.weight() >= text.len(), "{} {}", memory.weight(), text.len());
        assert_eq!(memory.weight(), grown);
        let removed = Durable::KeyRemoved {
            name: owner("node7.fleet."),
            change: None,
        };
        memory.keep(removed);
        assert!(memory.weight() < grown - 1000, "the records go with the last key");
    }
}
