//! What two configurations differ in: line by line, and by meaning.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use similar::TextDiff;
use toml::{Table, Value};

/// Keys that a reload cannot put into effect.
const RESTART: [&str; 2] = ["control.socket", "lb.threads"];

/// One difference by meaning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// Whether it came, went or changed.
    pub kind: ChangeKind,
    /// What: `frontend api`, `backend [fd00::11]:6443 of frontend api`, `balance of frontend api`, `log.level`.
    pub what: String,
    /// Its value in the first text; `None` = not there, so the default.
    pub before: Option<String>,
    /// Its value in the second text.
    pub after: Option<String>,
    /// Takes effect at once, without a restart and without touching running connections.
    pub live: bool,
}

/// The kinds of [`Change`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChangeKind {
    /// Only in the second text.
    Added,
    /// Only in the first.
    Removed,
    /// In both, with different values.
    Changed,
}

/// The differences by meaning; order, comments and spelling of the same thing are none. A text that does not parse
/// counts as empty: whoever asks has checked it.
pub fn changes(before: &str, after: &str) -> Vec<Change> {
    let (before, after) = (flat(before), flat(after));
    let mut found = Vec::new();
    for key in before.keys().chain(after.keys()).collect::<BTreeSet<_>>() {
        let (old, new) = (before.get(key), after.get(key));
        if old == new {
            continue;
        }
        // What belongs to a thing that came or went as a whole is not listed again.
        if key
            .parents()
            .any(|parent| before.contains_key(&parent) != after.contains_key(&parent))
        {
            continue;
        }
        let kind = match (old, new) {
            (None, _) => ChangeKind::Added,
            (_, None) => ChangeKind::Removed,
            _ => ChangeKind::Changed,
        };
        let live = !RESTART.contains(&key.0.join(".").as_str());
        let thing = key.is_thing();
        let value = |value: Option<&String>| value.filter(|_| !thing).cloned();
        // A setting that appears changes from its default; a thing that appears is added.
        let kind = if thing { kind } else { ChangeKind::Changed };
        found.push(Change {
            kind,
            what: key.what(),
            before: value(old),
            after: value(new),
            live,
        });
    }
    found
}

/// A unified diff with three lines of context; empty if the texts are equal.
pub fn unified(before: &str, after: &str, before_name: &str, after_name: &str) -> String {
    TextDiff::from_lines(before, after)
        .unified_diff()
        .context_radius(3)
        .header(before_name, after_name)
        .to_string()
}

/// A path in the configuration in which frontends go by name and backends by address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key(Vec<String>);

impl Key {
    /// A frontend or a backend, rather than a setting.
    fn is_thing(&self) -> bool {
        let path: Vec<&str> = self.0.iter().map(String::as_str).collect();
        matches!(path[..], ["lb", "frontend", _] | ["lb", "frontend", _, "backends", _])
    }

    fn parents(&self) -> impl Iterator<Item = Self> {
        (1..self.0.len())
            .map(|length| Self(self.0[..length].to_vec()))
            .filter(Self::is_thing)
    }

    fn what(&self) -> String {
        let path: Vec<&str> = self.0.iter().map(String::as_str).collect();
        match &path[..] {
            ["lb", "frontend", name] => format!("frontend {name}"),
            ["lb", "frontend", name, "backends", address] => format!("backend {address} of frontend {name}"),
            ["lb", "frontend", name, "backends", address, rest @ ..] => {
                format!("{} of backend {address} of frontend {name}", rest.join("."))
            }
            ["lb", "frontend", name, rest @ ..] => format!("{} of frontend {name}", rest.join(".")),
            path => path.join("."),
        }
    }
}

fn flat(text: &str) -> BTreeMap<Key, String> {
    let mut flat = BTreeMap::new();
    if let Ok(table) = text.parse::<Table>() {
        for (key, value) in table {
            flatten(&mut vec![key], &value, &mut flat);
        }
    }
    flat
}

fn flatten(path: &mut Vec<String>, value: &Value, flat: &mut BTreeMap<Key, String>) {
    let within = |path: &mut Vec<String>, name: String, value: &Value, flat: &mut BTreeMap<Key, String>| {
        path.push(name);
        flatten(path, value, flat);
        path.pop();
    };
    match (value, path.iter().map(String::as_str).collect::<Vec<_>>().as_slice()) {
        (Value::Array(frontends), ["lb", "frontend"]) => {
            for (index, frontend) in frontends.iter().enumerate() {
                let name = frontend
                    .get("name")
                    .and_then(Value::as_str)
                    .map_or_else(|| index.to_string(), str::to_owned);
                flat.insert(Key(vec!["lb".into(), "frontend".into(), name.clone()]), String::new());
                within(path, name, frontend, flat);
            }
        }
        (Value::Array(backends), ["lb", "frontend", _, "backends"]) => {
            for backend in backends {
                let address = backend
                    .get("address")
                    .unwrap_or(backend)
                    .as_str()
                    .unwrap_or_default()
                    .to_owned();
                path.push(address.clone());
                flat.insert(Key(path.clone()), String::new());
                path.pop();
                if backend.is_table() {
                    within(path, address, backend, flat);
                }
            }
        }
        // They are the names of what they stand in.
        (Value::String(_), ["lb", "frontend", _, "name"] | ["lb", "frontend", _, "backends", _, "address"]) => {}
        (Value::Table(table), _) => {
            for (key, value) in table {
                within(path, key.clone(), value, flat);
            }
        }
        (value, _) => {
            flat.insert(Key(path.clone()), value.to_string());
        }
    }
}
