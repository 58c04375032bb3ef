//! What the balancer tells about itself; the shapes that `edgectl --output json` prints and that live in the state
//! snapshot. Durations are milliseconds unless said otherwise, wall-clock times RFC 3339 strings in UTC. What came later
//! has a default, so that `edgectl` understands an older `edged`.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::config::{Balance, Kind};

/// What may be asked of a running balancer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "ask")]
pub enum Request {
    /// Frontends, backends and their state: [`Answer::Status`].
    Status,
    /// The events of the backends that match: [`Answer::Why`].
    Why {
        /// `HOST:PORT`, or `FRONTEND/HOST:PORT`.
        backend: String,
    },
    /// No new sessions for the backend; running ones stay. Durable before it is answered: [`Answer::Done`].
    Drain {
        /// `HOST:PORT` (in every frontend that has it), or `FRONTEND/HOST:PORT`.
        backend: String,
    },
    /// Takes a drain back: [`Answer::Done`].
    Undrain {
        /// As for [`Request::Drain`].
        backend: String,
    },
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "answer")]
pub enum Answer {
    /// To [`Request::Status`].
    Status(Status),
    /// To [`Request::Why`]; one entry per frontend that has the backend.
    Why {
        /// What happened, per frontend.
        backends: Vec<Why>,
    },
    /// To [`Request::Drain`] and [`Request::Undrain`].
    Done {
        /// `FRONTEND/BACKEND` of each that was changed.
        changed: Vec<String>,
    },
    /// The request could not be served.
    Refused {
        /// Cause, effect, next command.
        message: String,
    },
}

/// The whole balancer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// In the order of the configuration.
    pub frontends: Vec<FrontendStatus>,
    /// 200 is what /healthz would answer now.
    pub healthz_ok: bool,
    /// Data threads.
    pub threads: u16,
}

/// One frontend.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FrontendStatus {
    /// Its name.
    pub name: String,
    /// What it balances.
    pub kind: Kind,
    /// How it chooses.
    pub balance: Balance,
    /// Where it accepts.
    pub listen: Vec<SocketAddr>,
    /// Sessions running now.
    pub sessions: u64,
    /// Connections accepted since start.
    pub connections_total: u64,
    /// Connections for which no backend answered; the client was reset.
    pub failed_total: u64,
    /// Times a connection went on to another backend.
    pub retries_total: u64,
    /// Failures of this machine's own (descriptors, ports), which no backend is blamed for.
    pub local_errors_total: u64,
    /// Connections that were refused before a backend was asked for, by reason.
    #[serde(default)]
    pub refused: Refusals,
    /// In the order of the configuration; a name that resolves to several addresses has one entry each.
    pub backends: Vec<BackendStatus>,
}

/// One backend of one frontend.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackendStatus {
    /// As configured: `HOST:PORT`.
    pub backend: String,
    /// The address in use; `None` while the name does not resolve.
    pub address: Option<SocketAddr>,
    /// One of the states, with precedence as in [`State`].
    pub state: State,
    /// Why it is in that state, for people.
    pub reason: String,
    /// Milliseconds in that state.
    pub since_ms: u64,
    /// Share of the connections.
    pub weight: u16,
    /// Used only while no other is healthy.
    pub backup: bool,
    /// Sessions running now, connects in flight included.
    pub sessions: u64,
    /// Sessions opened since start.
    pub connections_total: u64,
    /// Bytes from clients to the backend.
    pub bytes_up_total: u64,
    /// Bytes from the backend to clients.
    pub bytes_down_total: u64,
    /// Failed connects since start.
    pub connect_failures_total: u64,
    /// Times it was taken out, by reason.
    pub ejections: Ejections,
    /// Bans and check verdicts that a proof of life prevented.
    pub vetoes_total: u64,
    /// Sessions this balancer reset because the backend went down.
    pub sessions_reset_total: u64,
    /// Connect latency.
    pub connect_latency: Histogram,
    /// Seconds until it gets its full share of the connections; `None` = it does.
    #[serde(default)]
    pub slow_start_remaining: Option<u64>,
    /// Connects begun because another backend was slow to accept.
    #[serde(default)]
    pub hedges_total: u64,
    /// Connects that another backend overtook.
    #[serde(default)]
    pub slow_total: u64,
    /// Sessions closed so that their clients go to a backend with fewer.
    #[serde(default)]
    pub shed_total: u64,
}

/// Whether new sessions go to a backend; the first that applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Its name does not resolve.
    Unresolved,
    /// Drained by an operator.
    Drained,
    /// Active checks fail.
    Down,
    /// Banned after failed connects.
    Banned,
    /// The ban has run out and one connection is finding out.
    Probing,
    /// Alive but asks for no new sessions (its readiness check answers 5xx).
    NotReady,
    /// In use.
    Healthy,
}

impl State {
    /// Every state, for one-hot metrics.
    pub const ALL: [Self; 7] = [
        Self::Unresolved,
        Self::Drained,
        Self::Down,
        Self::Banned,
        Self::Probing,
        Self::NotReady,
        Self::Healthy,
    ];

    /// As in JSON and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unresolved => "unresolved",
            Self::Drained => "drained",
            Self::Down => "down",
            Self::Banned => "banned",
            Self::Probing => "probing",
            Self::NotReady => "not-ready",
            Self::Healthy => "healthy",
        }
    }
}

/// Connections that were refused before a backend was asked for, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Refusals {
    /// `allow` and `deny` keep the client out.
    pub denied: u64,
    /// Its source connects more often than `source_rate`.
    pub rate: u64,
    /// The frontend has as many sessions as `sessions` allows.
    pub sessions: u64,
    /// The source has as many as `source_sessions` allows.
    pub source_sessions: u64,
    /// It came from none of the proxies that `accept_proxy` names.
    pub proxy_untrusted: u64,
    /// Its PROXY header was missing or broken.
    pub proxy_header: u64,
    /// Its PROXY header took too long.
    pub proxy_timeout: u64,
}

impl Refusals {
    /// Every reason with its name in metrics and its count.
    pub const fn by_reason(&self) -> [(&'static str, u64); 7] {
        [
            ("denied", self.denied),
            ("rate", self.rate),
            ("sessions", self.sessions),
            ("source-sessions", self.source_sessions),
            ("proxy-untrusted", self.proxy_untrusted),
            ("proxy-header", self.proxy_header),
            ("proxy-timeout", self.proxy_timeout),
        ]
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.by_reason().iter().map(|(_, count)| count).sum()
    }
}

/// Times a backend was taken out, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ejections {
    /// The verdict rested on a refused or reset connect.
    pub refused: u64,
    /// On an unreachable host or network.
    pub unreachable: u64,
    /// On a connect timeout.
    pub timeout: u64,
    /// On failed active checks.
    pub check: u64,
}

/// Connect latency in fixed buckets.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// Connects per bucket of [`Histogram::BOUNDS_MS`], not cumulative; the last entry is what is above.
    pub buckets: [u64; 13],
    /// Sum of all latencies in microseconds.
    pub sum_us: u64,
}

impl Histogram {
    /// Upper bounds in milliseconds.
    pub const BOUNDS_MS: [f64; 12] = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 1000.0];

    /// Counts one connect.
    pub fn record(&mut self, took: std::time::Duration) {
        let ms = took.as_secs_f64() * 1e3;
        let bucket = Self::BOUNDS_MS
            .iter()
            .position(|bound| ms <= *bound)
            .unwrap_or(Self::BOUNDS_MS.len());
        self.buckets[bucket] += 1;
        self.sum_us = self
            .sum_us
            .saturating_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
    }

    /// Connects counted.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }
}

/// What happened to one backend of one frontend.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Why {
    /// The frontend.
    pub frontend: String,
    /// The backend as it is now.
    pub now: BackendStatus,
    /// Oldest first.
    pub events: Vec<Event>,
}

/// One thing that happened to a backend.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// When, wall clock, RFC 3339 with milliseconds.
    pub at: String,
    /// What: a name of [`EventKind`].
    pub kind: EventKind,
    /// The fact it rests on, for people: `connect timed out after 1 s (2 of 2 within 10 s)`.
    pub reason: String,
}

/// The kinds of [`Event`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// A connect failed and was counted.
    Failure,
    /// Taken out after failures.
    Ban,
    /// A ban or check verdict that a proof of life prevented.
    Veto,
    /// The ban ran out; one connection finds out.
    Probe,
    /// In use again.
    Up,
    /// Active checks took it out.
    Down,
    /// An active check's answer changed (failed, not ready, good again).
    Check,
    /// Drained by an operator.
    Drain,
    /// Drain taken back.
    Undrain,
    /// Its sessions were reset.
    Reset,
    /// Its name resolved differently, or stopped resolving.
    Resolve,
    /// Tried although it was out, because nothing else was left.
    FailOpen,
    /// Another backend was faster to accept.
    Slow,
    /// Sessions were closed so that their clients go to a backend with fewer.
    Shed,
}

impl EventKind {
    /// Whether every version understands it: a snapshot with another kind would mean nothing at all to the first one.
    pub const fn is_known_to_all(self) -> bool {
        !matches!(self, Self::Slow | Self::Shed)
    }
}
