//! The keys that nodes sign their updates with: one for each node, two while it changes from one to the other.

use std::{collections::BTreeMap, fmt, str::FromStr, sync::Arc};

use hickory_proto::rr::{Name, rdata::tsig::TsigAlgorithm};
use serde::{Deserialize, Serialize};

use super::state::Owner;

/// Keys of one node at most.
const PER_NODE: usize = 2;

/// How a message is signed (RFC 8945 §6). SHA-1 and MD5 are not among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    /// The one that every implementation has.
    #[default]
    #[serde(rename = "hmac-sha256")]
    HmacSha256,
    /// HMAC with SHA-384.
    #[serde(rename = "hmac-sha384")]
    HmacSha384,
    /// HMAC with SHA-512.
    #[serde(rename = "hmac-sha512")]
    HmacSha512,
}

/// A secret that the edge and one node share. In storage it is base64; it is never part of a log.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Secret(Vec<u8>);

/// A node's key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// What messages call it.
    pub name: Owner,
    /// The only one that it is good for.
    pub algorithm: Algorithm,
    /// As long as the algorithm's output, if minted here.
    pub secret: Secret,
    /// The name that it may change.
    pub node: Owner,
}

/// All keys, by name. Storage has them as a list.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(try_from = "Vec<Key>", into = "Vec<Key>")]
pub struct Keys {
    keys: BTreeMap<Owner, Arc<Key>>,
}

/// Why there is no such key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Its name is taken.
    #[error("there is a key \"{0}\" already")]
    Taken(Owner),
    /// A node that has two.
    #[error("\"{0}\" has {PER_NODE} keys; remove the one that it does not use any more")]
    TooMany(Owner),
    /// Randomness was asked for and not given.
    #[error("a secret for {algorithm} needs {needed} random octets, got {got}")]
    Random {
        /// What the key is for.
        algorithm: Algorithm,
        /// Octets of its output.
        needed: usize,
        /// Octets given.
        got: usize,
    },
    /// Base64 of another kind, or none.
    #[error("a key's secret is not base64")]
    Base64,
    /// So short a secret could be guessed.
    #[error("a key's secret has {0} octets; 16 are the least")]
    Short(usize),
}

/// What [`Keys::remove`] took away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removed {
    /// Whose key it was.
    pub node: Owner,
    /// Whether the node has none left: then its records go too ([`Zone::remove`](super::Zone::remove)).
    pub last: bool,
}

impl Algorithm {
    /// Octets of its output.
    pub const fn size(self) -> usize {
        match self {
            Self::HmacSha256 => 32,
            Self::HmacSha384 => 48,
            Self::HmacSha512 => 64,
        }
    }

    /// As in messages and key files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::HmacSha256 => "hmac-sha256",
            Self::HmacSha384 => "hmac-sha384",
            Self::HmacSha512 => "hmac-sha512",
        }
    }

    const fn hickory(self) -> TsigAlgorithm {
        match self {
            Self::HmacSha256 => TsigAlgorithm::HmacSha256,
            Self::HmacSha384 => TsigAlgorithm::HmacSha384,
            Self::HmacSha512 => TsigAlgorithm::HmacSha512,
        }
    }
}

impl Key {
    /// A key for `node` called `name`, with the first octets of `random` as its secret.
    ///
    /// # Errors
    ///
    /// [`KeyError::Random`] if `random` is shorter than the algorithm's output.
    pub fn mint(name: Owner, algorithm: Algorithm, node: Owner, random: &[u8]) -> Result<Self, KeyError> {
        let secret = random.get(..algorithm.size()).ok_or(KeyError::Random {
            algorithm,
            needed: algorithm.size(),
            got: random.len(),
        })?;
        Ok(Self {
            name,
            algorithm,
            secret: Secret(secret.to_vec()),
            node,
        })
    }

    /// A file for `nsupdate -k` and `dig -k`.
    pub fn to_bind(&self) -> String {
        format!(
            "key \"{}\" {{\n\talgorithm {};\n\tsecret \"{}\";\n}};\n",
            self.name,
            self.algorithm,
            String::from(self.secret.clone())
        )
    }

    /// The whole MAC of `data`. Empty if the library cannot compute it, which it can for each of our algorithms.
    pub(super) fn mac(&self, data: &[u8]) -> Vec<u8> {
        let mac = self.algorithm.hickory().mac_data(&self.secret.0, data);
        mac.unwrap_or_default()
    }

    /// Whether `mac` is the beginning of that of `data`, in a time that says nothing about where they differ. A MAC must
    /// not be empty.
    pub(super) fn has_signed(&self, data: &[u8], mac: &[u8]) -> bool {
        if mac.len() == self.algorithm.size() {
            return self.algorithm.hickory().verify_mac(&self.secret.0, data, mac).is_ok();
        }
        let whole = self.mac(data);
        let Some(expected) = whole.get(..mac.len()).filter(|expected| !expected.is_empty()) else {
            return false;
        };
        let differ = expected
            .iter()
            .zip(mac)
            .fold(0, |differ, (a, b)| std::hint::black_box(differ | (a ^ b)));
        differ == 0
    }
}

impl Keys {
    /// The key called `name`.
    pub fn get(&self, name: &Name) -> Option<&Arc<Key>> {
        self.keys.get(&Owner::of(name))
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Key>> {
        self.keys.values()
    }

    /// What the next key of `node` may be called: as the node itself, or one label below that.
    pub fn free_name(&self, node: &Owner) -> Owner {
        (2..=u32::MAX)
            .filter_map(|i| node.name().prepend_label(format!("key{i}").as_str()).ok())
            .map(|name| Owner::of(&name))
            .take(self.keys.len() + 1)
            .fold(None, |free, name| {
                free.or_else(|| (!self.keys.contains_key(&name)).then_some(name))
            })
            .filter(|_| self.keys.contains_key(node))
            .unwrap_or_else(|| node.clone())
    }

    /// Takes a key in.
    ///
    /// # Errors
    ///
    /// [`KeyError::Taken`], [`KeyError::TooMany`], [`KeyError::Short`]; all stays as it was.
    pub fn add(&mut self, key: Key) -> Result<(), KeyError> {
        if self.keys.contains_key(&key.name) {
            return Err(KeyError::Taken(key.name));
        }
        if self.of(&key.node) >= PER_NODE {
            return Err(KeyError::TooMany(key.node));
        }
        if key.secret.0.len() < 16 {
            return Err(KeyError::Short(key.secret.0.len()));
        }
        self.keys.insert(key.name.clone(), Arc::new(key));
        Ok(())
    }

    /// Forgets a key: what it signed from now on is not known. `None` if there is none of that name.
    pub fn remove(&mut self, name: &Owner) -> Option<Removed> {
        let node = self.keys.remove(name)?.node.clone();
        let last = self.of(&node) == 0;
        Some(Removed { node, last })
    }

    fn of(&self, node: &Owner) -> usize {
        self.keys.values().filter(|key| key.node == *node).count()
    }
}

impl TryFrom<Vec<Key>> for Keys {
    type Error = KeyError;

    fn try_from(list: Vec<Key>) -> Result<Self, KeyError> {
        let mut keys = Self::default();
        list.into_iter().try_for_each(|key| keys.add(key))?;
        Ok(keys)
    }
}

impl From<Keys> for Vec<Key> {
    fn from(keys: Keys) -> Self {
        keys.keys.into_values().map(Arc::unwrap_or_clone).collect()
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

impl From<Secret> for String {
    fn from(secret: Secret) -> Self {
        let mut text = Self::new();
        for group in secret.0.chunks(3) {
            let bits = group
                .iter()
                .fold(0_usize, |bits, octet| bits << 8 | usize::from(*octet))
                << (8 * (3 - group.len()));
            for digit in 0..4 {
                if digit > group.len() {
                    text.push('=');
                } else {
                    text.push(char::from(BASE64[bits >> (18 - 6 * digit) & 63]));
                }
            }
        }
        text
    }
}

impl FromStr for Secret {
    type Err = KeyError;

    /// Base64 with its padding and nothing else (RFC 4648 §4).
    fn from_str(text: &str) -> Result<Self, KeyError> {
        let digits = text.trim_end_matches('=');
        let padding = text.len() - digits.len();
        if !text.len().is_multiple_of(4) || padding > 2 {
            return Err(KeyError::Base64);
        }
        let (mut octets, mut bits, mut count) = (Vec::new(), 0_u32, 0);
        for digit in digits.bytes() {
            let value = BASE64.iter().zip(0..).find(|(known, _)| **known == digit);
            let (_, value): (_, u32) = value.ok_or(KeyError::Base64)?;
            bits = bits << 6 | value;
            count += 6;
            if count >= 8 {
                count -= 8;
                octets.push((bits >> count) as u8);
                bits &= (1 << count) - 1;
            }
        }
        if bits == 0 {
            Ok(Self(octets))
        } else {
            Err(KeyError::Base64)
        }
    }
}

impl TryFrom<String> for Secret {
    type Error = KeyError;

    fn try_from(text: String) -> Result<Self, KeyError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc4648_section_10_examples_and_a_secret_is_read_as_it_is_written() {
        for (octets, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            let secret = Secret(octets.as_bytes().to_vec());
            assert_eq!(String::from(secret.clone()), text);
            assert_eq!(text.parse(), Ok(secret));
        }
        let all = Secret((0..=255).collect());
        assert_eq!(String::from(all.clone()).parse(), Ok(all));
        for bad in ["Zg", "Zg=", "Zh==", "Z===", "====", "Zm9v=", "Zm 9", "Zm-v", "ä=="] {
            assert_eq!(bad.parse::<Secret>(), Err(KeyError::Base64), "{bad}");
        }
    }

    #[test]
    fn rfc4231_test_case_2_for_each_algorithm() {
        let mut key = key("node1.fleet", "node1.fleet");
        key.secret = Secret(b"Jefe".to_vec());
        for (algorithm, mac) in [
            (
                Algorithm::HmacSha256,
                "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
            ),
            (
                Algorithm::HmacSha384,
                "af45d2e376484031617f78d2b58a6b1b9c7ef464f5a01b47e42ec3736322445e8e2240ca5e69e2c78b3239ecfab21649",
            ),
            (
                Algorithm::HmacSha512,
                "164b7a7bfcf819e2e395fbe73b56e0a387bd64222e831fd610270cd7ea2505549758bf75c05a994a6d034f65f8f0e6fdcaeab1a34d4a6b4b636e070a38bce737",
            ),
        ] {
            key.algorithm = algorithm;
            let data = b"what do ya want for nothing?";
            let whole = key.mac(data);
            let text: String = whole.iter().map(|octet| format!("{octet:02x}")).collect();
            assert_eq!(text, mac);
            assert_eq!(whole.len(), algorithm.size());
            assert!(key.has_signed(data, &whole) && key.has_signed(data, &whole[..16]));
            assert!(!key.has_signed(data, &[]) && !key.has_signed(data, &[whole.as_slice(), &[0]].concat()));
            for at in 0..whole.len() {
                let mut other = whole.clone();
                other[at] ^= 1;
                assert!(
                    !key.has_signed(data, &other) && !key.has_signed(data, &other[..=at]),
                    "{at}"
                );
            }
        }
    }

    #[test]
    fn a_node_may_have_two_keys_and_only_the_last_one_removed_takes_its_records_along() {
        let mut keys = Keys::default();
        let node: Owner = "node1.fleet".parse().expect("a name");
        for name in ["node1.fleet.", "key2.node1.fleet."] {
            let free = keys.free_name(&node);
            assert_eq!(free.to_string(), name);
            assert_eq!(keys.add(key(name, "node1.fleet")), Ok(()));
            assert_eq!(keys.add(key(name, "node2.fleet")), Err(KeyError::Taken(free)));
        }
        assert_eq!(keys.free_name(&node).to_string(), "key3.node1.fleet.");
        let third = keys.add(key("third", "NODE1.fleet")).expect_err("a third key");
        assert_eq!(
            third.to_string(),
            "\"node1.fleet.\" has 2 keys; remove the one that it does not use any more"
        );
        let text = serde_json::to_string(&keys).expect("text");
        let mut keys: Keys = serde_json::from_str(&text).expect("keys");
        let mut remove = |name: &str| keys.remove(&name.parse().expect("a name")).map(|removed| removed.last);
        assert_eq!(remove("node1.fleet"), Some(false));
        assert_eq!(remove("node1.fleet"), None);
        assert_eq!(remove("KEY2.node1.fleet"), Some(true));
    }

    #[test]
    fn a_key_is_minted_from_given_octets_and_printed_as_bind_reads_it() {
        let name: Owner = "node1.fleet".parse().expect("a name");
        let random: Vec<u8> = (0..40).collect();
        let mint = |algorithm| Key::mint(name.clone(), algorithm, name.clone(), &random);
        assert_eq!(
            mint(Algorithm::HmacSha256).expect("a key").to_bind(),
            "key \"node1.fleet.\" {\n\talgorithm hmac-sha256;\n\tsecret \"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\";\n};\n"
        );
        assert_eq!(
            mint(Algorithm::HmacSha384).expect_err("too few").to_string(),
            "a secret for hmac-sha384 needs 48 random octets, got 40"
        );
    }

    #[test]
    fn a_short_secret_is_refused_and_no_secret_is_printed_for_logs() {
        let mut short = key("node1.fleet", "node1.fleet");
        short.secret = "AAECAwQFBgcICQoLDA0O".parse().expect("base64");
        assert!(!format!("{short:?}").contains("AAEC"));
        assert_eq!(Keys::default().add(short), Err(KeyError::Short(15)));
    }

    fn key(name: &str, node: &str) -> Key {
        let owner = |text: &str| text.parse().expect("a name");
        Key::mint(owner(name), Algorithm::HmacSha256, owner(node), &[7; 32]).expect("a key")
    }
}
