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
