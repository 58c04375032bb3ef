//! What supervisor and worker say to each other.

use std::{collections::BTreeMap, net::Ipv4Addr, path::PathBuf};

use lb::Drain;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::endpoint::Endpoint;

/// Of these messages and of the packets they travel in. A supervisor that takes over from another one goes on talking with
/// its workers, so whatever changes their meaning raises it.
pub const FORMAT: u32 = 2;

/// From the supervisor.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToWorker {
    /// The first message.
    Start(Box<Start>),
    /// Another configuration; [`FromWorker::Reloaded`] answers. Descriptors: those of the listeners that are new.
    Reload {
        /// Names the answer.
        id: u64,
        /// What is to run, with only the listeners that were not passed before.
        service: Box<Service>,
    },
    /// [`FromWorker::Pong`] answers, if all is well.
    Ping {
        /// Names the answer.
        id: u64,
    },
    /// A question to the service; [`FromWorker::Answer`] answers.
    Ask {
        /// Names the answer.
        id: u64,
        /// What is asked.
        question: Question,
    },
    /// Something became durable through another process of the same role.
    Learn {
        /// What.
        durable: Box<Durable>,
    },
    /// The predecessor has ended: what is durable may be changed from here on. To one that was started with
    /// [`Start::successor`].
    Own,
    /// Answers [`FromWorker::Commit`].
    Committed {
        /// Of the commit.
        id: u64,
        /// Done, or why not.
        result: Result<(), String>,
    },
    /// Answers [`FromWorker::Metrics`].
    Metrics {
        /// Of the question.
        id: u64,
        /// The page, or why there is none.
        result: Result<String, String>,
    },
    /// Hand everything over to a successor, as [`crate::handover`] has it; [`FromWorker::HandedOver`] answers, and only if
    /// it is done the worker exits. Descriptor: the old one's end of their socket pair.
    HandOver {
        /// Names the answer.
        id: u64,
    },
    /// Finish within `grace_ms` and exit.
    Stop {
        /// Milliseconds that sessions may go on.
        grace_ms: u64,
    },
}

/// From a worker. The supervisor believes none of it further than the role reaches.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromWorker {
    /// The service runs.
    Ready,
    /// Answers [`ToWorker::Ping`].
    Pong {
        /// Of the ping.
        id: u64,
    },
    /// Answers [`ToWorker::Ask`].
    Answer {
        /// Of the question.
        id: u64,
        /// What the service says.
        reply: Reply,
    },
    /// Answers [`ToWorker::Reload`].
    Reloaded {
        /// Of the reload.
        id: u64,
        /// In effect, or why not; then nothing was changed.
        result: Result<(), String>,
    },
    /// Answers [`ToWorker::HandOver`].
    HandedOver {
        /// Of the order.
        id: u64,
        /// The successor serves, or why not; then everything goes on here.
        result: Result<(), String>,
    },
    /// Something to be made durable; of the worker's own kind only.
    Commit {
        /// Names the answer.
        id: u64,
        /// What.
        durable: Box<Durable>,
    },
    /// The metrics page is wanted; from `web` only.
    Metrics {
        /// Names the answer.
        id: u64,
    },
}

impl FromWorker {
    /// What it is, for the log.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Pong { .. } => "pong",
            Self::Answer { .. } => "answer",
            Self::Reloaded { .. } => "reloaded",
            Self::HandedOver { .. } => "handed-over",
            Self::Commit { .. } => "commit",
            Self::Metrics { .. } => "metrics",
        }
    }
}

/// A question to the service of a role.
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Question {
    /// To the balancer.
    Lb(lb::status::Request),
    /// To the resolver.
    Dns64(dns64::status::Request),
    /// To the translator.
    Nat64(dns64::nat64::status::Request),
}

impl Question {
    /// Whether asking it twice is something else than asking it once.
    pub const fn is_once(&self) -> bool {
        matches!(self, Self::Dns64(dns64::status::Request::AddKey { .. }))
    }
}

/// The answer to a [`Question`], from the same role.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// From the balancer.
    Lb(Box<lb::status::Answer>),
    /// From the resolver.
    Dns64(Box<dns64::status::Answer>),
    /// From the translator.
    Nat64(Box<dns64::nat64::status::Answer>),
}

/// What a worker may have kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Durable {
    /// A drain; from `lb` only.
    Drain {
        /// Which.
        drain: Drain,
        /// Set or taken back.
        set: bool,
    },
    /// A node's records or key; from `dns64` only.
    Dns64(Box<dns64::zone::Durable>),
}

/// Everything a worker runs on. Descriptors: the state memory if `state`, the end of a socket pair if `inherit`, then those
/// of the listeners.
#[derive(Serialize, Deserialize)]
pub struct Start {
    /// Configuration, listeners, files.
    pub service: Service,
    /// Data threads.
    pub threads: u16,
    /// Drains in effect.
    pub drains: Vec<Drain>,
    /// What nodes registered, and their keys.
    #[serde(default)]
    pub dns64: dns64::zone::Memory,
    /// Whether the first descriptor is the state memory.
    pub state: bool,
    /// Whether to take over from a running predecessor, to which the next descriptor leads.
    #[serde(default)]
    pub inherit: bool,
    /// Whether a predecessor still changes what is durable: nothing is, until [`ToWorker::Own`].
    #[serde(default)]
    pub successor: bool,
    /// The bearer token of the metrics page.
    pub token: Option<Bytes>,
}

/// What one configuration gives a worker.
#[derive(Clone, Serialize, Deserialize)]
pub struct Service {
    /// The TOML text, which the worker reads with the code that checked it.
    pub text: String,
    /// Sockets and how many descriptors each has, in the order of the descriptors.
    pub listeners: Vec<(Endpoint, u16)>,
    /// Content of the files that the configuration names.
    pub files: BTreeMap<PathBuf, Bytes>,
    /// Content of /etc/resolv.conf.
    pub resolv_conf: Bytes,
    /// Content of /etc/hosts.
    pub hosts: Bytes,
    /// The TUN device, whose queues and then memory are the last descriptors; in a reload only if it is another one.
    #[serde(default)]
    pub tun: Option<Tun>,
    /// IPv4 addresses of this machine, for the translator.
    #[serde(default)]
    pub addresses: Vec<Ipv4Addr>,
}

/// A TUN device.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct Tun {
    /// How many descriptors it has.
    pub queues: u16,
    /// What it leaves undone.
    pub offloads: dns64::nat64::status::Offloads,
}

/// Bytes, in JSON as hexadecimal digits: an array of numbers would be four times as long.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let digit = |nibble: u8| char::from_digit(u32::from(nibble), 16).unwrap_or('0');
        let text: String = self
            .0
            .iter()
            .flat_map(|byte| [digit(byte >> 4), digit(byte & 15)])
            .collect();
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let nibble = |digit: u8| {
            char::from(digit)
                .to_digit(16)
                .and_then(|value| u8::try_from(value).ok())
        };
        let (pairs, []) = text.as_bytes().as_chunks::<2>() else {
            return Err(D::Error::custom("an odd number of hexadecimal digits"));
        };
        let bytes = pairs
            .iter()
            .map(|[high, low]| Some(nibble(*high)? << 4 | nibble(*low)?))
            .collect::<Option<_>>();
        bytes.map(Self).ok_or_else(|| D::Error::custom("no hexadecimal digits"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_as_they_went() {
        let bytes = Bytes((0..=255).collect());
        let json = serde_json::to_string(&bytes).expect("json");
        assert_eq!(json.len(), 2 + 512);
        assert!(serde_json::from_str::<Bytes>(&json).expect("bytes") == bytes);
        for wrong in ["\"0\"", "\"0g\"", "\"+1\"", "\"é\"", "[1]"] {
            assert!(serde_json::from_str::<Bytes>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_message_of_junk_is_an_error() {
        for junk in [
            "{}",
            "\"ready \"",
            "{\"pong\":{}}",
            "{\"pong\":{\"id\":-1}}",
            "{\"commit\":{\"id\":1,\"drain\":{},\"set\":1}}",
        ] {
            assert!(serde_json::from_str::<FromWorker>(junk).is_err(), "{junk}");
        }
        assert!(serde_json::from_str::<FromWorker>("\"ready\"").is_ok());
    }
}
