//! What outlives the service: the store has it, and gives it to the next one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Change, Key, Keys, Owner, State};

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
                self.keys.remove(&name);
                for state in self.zones.values_mut() {
                    state.signed.remove(&name);
                }
                if let Some(change) = change {
                    self.change(change);
                }
            }
        }
    }

    fn change(&mut self, change: Change) {
        self.zones.entry(change.zone.clone()).or_default().apply(change);
    }
}
