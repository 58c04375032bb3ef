//! What `edgectl` asks `edged` over the control socket, and what it gets: HTTP/1.1 with JSON bodies on a unix socket.
//!
//! `control.rs` turns a request into one [`Op`] and hands it to the supervisor's loop; the reply goes back as JSON
//! with `schema_version` beside it. `edgectl` prints the same types.

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

/// Version of every JSON shape below; a change that breaks a reader raises it.
pub const SCHEMA_VERSION: u32 = 1;

/// Who asks, from SO_PEERCRED.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Author {
    /// Numeric user id.
    pub uid: u32,
    /// Its name, where the system knows one.
    pub user: Option<String>,
    /// The asking process.
    pub pid: i32,
}

/// One request to the supervisor, with the way back.
#[derive(Debug)]
pub struct Op {
    /// What is asked.
    pub ask: Ask,
    /// Who asks; every change is logged with it.
    pub author: Author,
    /// Where the answer goes.
    pub reply: oneshot::Sender<Result<Answer, Refusal>>,
}

/// What may be asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "ask")]
pub enum Ask {
    /// `GET /v1/status`
    Status,
    /// `POST /v1/lb` with an `lb::status::Request`; Drain and Undrain need the operate role.
    Lb {
        /// What to ask the balancer.
        request: lb::status::Request,
    },
    /// `GET /v1/config`: the running configuration.
    ConfigShow,
    /// `POST /v1/config/apply`: check, then put into effect.
    ConfigApply {
        /// The TOML text.
        text: String,
        /// Where it came from, for the history: a path or "stdin".
        origin: String,
        /// Go back by itself unless confirmed within this many seconds.
        confirm_seconds: Option<u64>,
    },
    /// `POST /v1/config/confirm`: keep what was applied with a deadline.
    ConfigConfirm,
    /// `GET /v1/config/history`: confirmed configurations, newest first.
    ConfigHistory,
    /// `POST /v1/config/rollback`: apply an earlier confirmed configuration.
    ConfigRollback {
        /// The revision to go back to; `None` = the one before the running one.
        revision: Option<u64>,
    },
    /// `GET /metrics`: Prometheus text (asked by the `web` worker too).
    Metrics,
}

/// What an [`Ask`] gets. It goes over the socket as the value inside, not as this enum: each route has one type.
#[derive(Clone, Debug)]
pub enum Answer {
    /// To [`Ask::Status`].
    Status(Box<Status>),
    /// To [`Ask::Lb`].
    Lb(Box<lb::status::Answer>),
    /// To [`Ask::ConfigShow`].
    Config(ConfigText),
    /// To [`Ask::ConfigApply`], [`Ask::ConfigConfirm`] and [`Ask::ConfigRollback`].
    Applied(Applied),
    /// To [`Ask::ConfigHistory`].
    History {
        /// Newest first.
        revisions: Vec<Revision>,
    },
    /// To [`Ask::Metrics`].
    Metrics {
        /// Prometheus text format 0.0.4.
        text: String,
    },
}

/// Why an [`Ask`] was not done.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Refusal {
    /// Cause, effect, next command; several lines for a configuration fault.
    pub message: String,
    /// `true`: the request was at fault (exit 2); `false`: the daemon could not (exit 1).
    pub bad_request: bool,
}

/// The appliance at a glance.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Process id of the supervisor.
    pub pid: u32,
    /// Seconds since the daemon started.
    pub uptime_seconds: u64,
    /// The configuration in effect.
    pub config: ConfigStatus,
    /// Every worker.
    pub workers: Vec<WorkerStatus>,
    /// The balancer; `None` while its worker does not answer.
    pub lb: Option<lb::status::Status>,
}

/// The configuration in effect.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConfigStatus {
    /// Its revision in the history.
    pub revision: u64,
    /// Whether it is confirmed; if not, seconds until it is taken back.
    pub reverts_in_seconds: Option<u64>,
    /// The configuration file.
    pub file: String,
    /// `None` while the file cannot be read.
    pub file_differs: Option<bool>,
    /// The last attempt to load one: `None` = good.
    pub last_error: Option<String>,
}

/// One worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// Its role: `lb`, `web`.
    pub role: String,
    /// Its process, while it runs.
    pub pid: Option<u32>,
    /// `starting`, `running`, `waiting` (to be started again).
    pub state: String,
    /// Seconds since it was last started.
    pub uptime_seconds: u64,
    /// Times it was started again.
    pub restarts: u64,
    /// How it ended last: `killed by signal 9`, `no heartbeat for 5 s`.
    pub last_end: Option<String>,
}

/// A configuration and where it came from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConfigText {
    /// Its revision.
    pub revision: u64,
    /// The TOML text.
    pub text: String,
}

/// A configuration was put into effect.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Applied {
    /// Its revision.
    pub revision: u64,
    /// Nothing was different.
    pub unchanged: bool,
    /// Seconds until it is taken back, if it is to be confirmed.
    pub reverts_in_seconds: Option<u64>,
    /// Warnings of the check, rendered.
    pub warnings: Vec<String>,
}

/// One confirmed configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Revision {
    /// Counts up from 1.
    pub revision: u64,
    /// When it was confirmed, RFC 3339, UTC.
    pub at: String,
    /// Who applied it: a user name or `uid N`, `SIGHUP`, `first start`.
    pub author: String,
    /// Where it came from.
    pub origin: String,
    /// Whether it is in effect.
    pub running: bool,
    /// The TOML text.
    pub text: String,
}
