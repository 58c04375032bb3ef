//! What `edgectl` asks `edged` over the control socket, and what it gets: HTTP/1.1 with JSON bodies on a unix socket.
//!
//! `control.rs` turns a request into one [`Op`] and hands it to the supervisor's loop; the reply goes back as JSON
//! with `schema_version` beside it. `edgectl` prints the same types.

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::build::Build;

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
    /// `POST /v1/dns` with a `dns64::status::Request`; what [changes](dns64::status::Request::changes) anything needs the
    /// operate role.
    Dns {
        /// What to ask the resolver.
        request: dns64::status::Request,
    },
    /// `POST /v1/nat64` with a `dns64::nat64::status::Request`.
    Nat64 {
        /// What to ask the translator.
        request: dns64::nat64::status::Request,
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
    /// `POST /v1/upgrade`: go on with another program; answered when it was found good, before anything is done.
    Upgrade {
        /// The program.
        binary: std::path::PathBuf,
        /// Only find out whether it could.
        dry_run: bool,
    },
}

/// What an [`Ask`] gets. It goes over the socket as the value inside, not as this enum: each route has one type.
#[derive(Clone, Debug)]
pub enum Answer {
    /// To [`Ask::Status`].
    Status(Box<Status>),
    /// To [`Ask::Lb`].
    Lb(Box<lb::status::Answer>),
    /// To [`Ask::Dns`].
    Dns(Box<dns64::status::Answer>),
    /// To [`Ask::Nat64`].
    Nat64(Box<dns64::nat64::status::Answer>),
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
    /// To [`Ask::Upgrade`].
    Upgrade(Box<Upgrade>),
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
    /// First digits of its build id.
    #[serde(default)]
    pub build: String,
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
    /// The resolver; `None` if there is none, or while its worker does not answer.
    #[serde(default)]
    pub dns: Option<dns64::status::Status>,
    /// The translator; `None` if there is none, or while its worker does not answer.
    #[serde(default)]
    pub nat64: Option<dns64::nat64::status::Status>,
    /// The upgrade that is under way, or the last one since the daemon started.
    #[serde(default)]
    pub upgrade: Option<Upgrade>,
}

/// An upgrade: what was wanted, how far it is, how it ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Upgrade {
    /// Counts up from 1 since the daemon started.
    pub number: u64,
    /// How far it is.
    pub state: UpgradeState,
    /// When it began, RFC 3339, UTC.
    pub at: String,
    /// Who wanted it: a user name or `uid N`.
    pub author: String,
    /// The program.
    pub binary: String,
    /// What ran before.
    pub from: Build,
    /// What was to run.
    pub to: Build,
    /// What is being done, or was done last: `checked`, `taking over`, `handing lb over`.
    pub step: String,
    /// Why it failed, what goes on, and what to do; or what was lost although it was done.
    pub message: Option<String>,
    /// Milliseconds from the check to the end, or until now.
    pub took_ms: u64,
}

/// How far an upgrade is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UpgradeState {
    /// The program can take over; that was all that was asked.
    Checked,
    /// Under way.
    Running,
    /// Every process runs the new program.
    Done,
    /// Not every process does, and `message` says which.
    Failed,
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
    /// Version of the program it runs.
    #[serde(default)]
    pub version: Option<String>,
    /// First digits of that program's build id.
    #[serde(default)]
    pub build: Option<String>,
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
