//! What the resolver tells about itself; the shapes that `edgectl --output json` prints. What came later has a default, so
//! that `edgectl` understands an older `edged`.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::zone::Algorithm;

/// What may be asked of a running resolver.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "ask")]
pub enum Request {
    /// Counters, cache, upstreams, zones: [`Answer::Status`].
    Status,
    /// What a client would get, and with `trace` why: [`Answer::Query`].
    Query {
        /// The name; an address stands for its name below ip6.arpa or in-addr.arpa.
        name: String,
        /// The type, such as "AAAA".
        kind: String,
        /// Whether the steps are wanted, from scratch: the cache is not looked at.
        #[serde(default)]
        trace: bool,
    },
    /// Every record of the zones, or of one: [`Answer::Zones`].
    Zones {
        /// The zone; none: all.
        #[serde(default)]
        name: Option<String>,
    },
    /// The keys of nodes, without their secrets: [`Answer::Keys`].
    Keys,
    /// Makes a key for a node. Durable before it is answered: [`Answer::Key`].
    AddKey {
        /// The node's name, in full or below the first zone.
        node: String,
        /// How it signs.
        #[serde(default)]
        algorithm: Algorithm,
    },
    /// Takes a key back, and with a node's last one its records. Durable before it is answered: [`Answer::Removed`].
    RemoveKey {
        /// The key's name, as [`Request::Keys`] has it, in full or below the first zone.
        name: String,
    },
    /// Forgets answers: [`Answer::Flushed`].
    Flush {
        /// About this name; none: about all.
        #[serde(default)]
        name: Option<String>,
        /// And about all below it.
        #[serde(default)]
        below: bool,
    },
}

impl Request {
    /// Whether it changes anything but what is in the cache anyway.
    pub const fn changes(&self) -> bool {
        matches!(self, Self::AddKey { .. } | Self::RemoveKey { .. } | Self::Flush { .. })
    }
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "answer")]
pub enum Answer {
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// To [`Request::Query`].
    Query(Box<Resolved>),
    /// To [`Request::Zones`].
    Zones {
        /// In the order of the configuration.
        zones: Vec<ZoneRecords>,
    },
    /// To [`Request::Keys`].
    Keys {
        /// By name.
        keys: Vec<KeyStatus>,
    },
    /// To [`Request::AddKey`].
    Key {
        /// What it is.
        key: KeyStatus,
        /// A file for `nsupdate -k`: the only time that the secret is told.
        file: String,
    },
    /// To [`Request::RemoveKey`].
    Removed {
        /// The key.
        name: String,
        /// Whose it was.
        node: String,
        /// Whether the node's records went with it.
        records: bool,
    },
    /// To [`Request::Flush`].
    Flushed {
        /// Answers that were known.
        answers: u64,
    },
    /// The request could not be served.
    Refused {
        /// Cause, effect, next command.
        message: String,
        /// What was asked for can never be had.
        #[serde(default)]
        bad_request: bool,
    },
}

/// The whole resolver.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Where it answers.
    pub listen: Vec<SocketAddr>,
    /// NAT64 prefixes.
    pub prefixes: Vec<String>,
    /// Over UDP, since the start of the worker.
    pub udp: Udp,
    /// Over TCP, since the start of the worker.
    pub tcp: Tcp,
    /// What is known.
    pub cache: Cache,
    /// What became of questions that were not known, by reason.
    pub resolved: Vec<(String, u64)>,
    /// Dynamic updates, by what became of them.
    pub updates: Vec<(String, u64)>,
    /// Groups of upstreams: the general one first, with an empty domain.
    pub upstreams: Vec<Group>,
    /// Zones.
    pub zones: Vec<ZoneStatus>,
    /// Keys of nodes.
    pub keys: u64,
}

/// Counts of datagrams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Udp {
    /// Datagrams that came.
    pub received: u64,
    /// Answers that were known.
    pub hits: u64,
    /// Messages that were looked further into.
    pub misses: u64,
    /// Messages answered with a code alone.
    pub rejected: u64,
    /// Answers that said to come again by TCP or with a cookie, for there were too many.
    pub slipped: u64,
    /// Answers that were not given, for there were too many.
    pub limited: u64,
    /// Messages from who may not ask.
    pub denied: u64,
    /// Messages that were no queries.
    pub ignored: u64,
    /// Messages that found the queue full.
    pub dropped: u64,
    /// Answers in use that were renewed before they ran out.
    pub refreshed: u64,
    /// Answers that the kernel did not take.
    pub unsent: u64,
}

/// Counts of connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tcp {
    /// Connections that are open.
    pub open: u64,
    /// Connections that were accepted.
    pub accepted: u64,
    /// Connections that were closed at once: too many, or too many of one source.
    pub turned_away: u64,
    /// Messages that came.
    pub received: u64,
    /// Of these, answered with REFUSED because the source may not ask.
    pub denied: u64,
}

/// What is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cache {
    /// Answers.
    pub entries: u64,
    /// Octets that they take.
    pub octets: u64,
    /// Octets that they may take.
    pub limit: u64,
    /// Answers that came.
    pub inserted: u64,
    /// Answers that went for want of room while they were good.
    pub evicted: u64,
    /// Questions answered with what had run out.
    pub stale: u64,
}

/// Upstreams of one domain.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Group {
    /// The domain; empty for all that has no other.
    pub domain: String,
    /// In the order of the configuration.
    pub servers: Vec<Server>,
    /// Questions under way now.
    pub outstanding: u64,
    /// Questions.
    pub asked: u64,
    /// Of these, such as joined one under way.
    pub joined: u64,
    /// Questions turned away because too many were under way.
    pub busy: u64,
    /// Questions without an answer for any other reason.
    pub failed: u64,
}

/// One upstream.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Server {
    /// As configured.
    pub url: String,
    /// "up", "suspect" or "down".
    pub state: String,
    /// Smoothed, in milliseconds.
    pub latency_ms: Option<f64>,
    /// What happened with it, by name.
    pub counts: Vec<(String, u64)>,
    /// Messages from its address that were no replies, by what was wrong with them.
    pub mismatches: Vec<(String, u64)>,
    /// Open connections.
    pub connections: u64,
    /// Why a connection to it failed last.
    pub last_error: Option<String>,
}

/// One zone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ZoneStatus {
    /// Its name, and those of its reverse zones.
    pub names: Vec<String>,
    /// Of the zone itself.
    pub serial: u32,
    /// Nodes that are registered.
    pub nodes: u64,
    /// Nodes whose records the configuration does not permit any more, and why.
    pub left_out: Vec<(String, String)>,
}

/// The records of one zone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ZoneRecords {
    /// Its name.
    pub name: String,
    /// As in a zone file.
    pub records: Vec<RecordText>,
}

/// One record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RecordText {
    /// Whose it is, with a final dot.
    pub name: String,
    /// Seconds.
    pub ttl: u32,
    /// Such as "AAAA".
    pub kind: String,
    /// As in a zone file.
    pub data: String,
    /// Whether a node registered it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub dynamic: bool,
}

/// A key without its secret.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct KeyStatus {
    /// What messages call it.
    pub name: String,
    /// Whose name it may change.
    pub node: String,
    /// How it signs.
    pub algorithm: String,
    /// When it was last used for a change, in RFC 3339.
    pub last_used: Option<String>,
}

/// What a client would get.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resolved {
    /// What was asked for, with a final dot.
    pub name: String,
    /// Such as "AAAA".
    pub kind: String,
    /// Such as "NOERROR".
    pub code: String,
    /// The answer section.
    pub answers: Vec<RecordText>,
    /// The authority section.
    pub authorities: Vec<RecordText>,
    /// Where it comes from: "cache", "zone", "hosts", "synthesised", "upstream" and the like.
    pub source: String,
    /// Seconds that it may be kept.
    pub ttl: u32,
    /// How it came about, if that was asked for.
    pub steps: Vec<Step>,
    /// Milliseconds that it took.
    pub took_ms: f64,
}

/// One step on the way to an answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Step {
    /// Milliseconds since the question.
    pub at_ms: f64,
    /// What was done and found.
    pub text: String,
}
