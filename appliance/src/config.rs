//! The one configuration file: its sections, and the way from its text to a [`Config`] or to messages that point at
//! the words at fault.
//!
//! ```text
//! text -> toml -> Config -> check (each section, then across sections) -> Loaded
//!           \-> Faulty: every fault with file:line:column, the line, a caret and the remedy
//! ```
//! `edgectl config check`, `edged` at start and `config apply` all come through [`load`].

mod diff;
mod load;
mod report;
mod schema;
mod secret;

use std::{net::SocketAddr, path::PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use settings::At;

pub(crate) use self::load::nearest;
pub use self::{
    diff::{Change, ChangeKind, changes, unified},
    load::{Faulty, Loaded, Secrets, load},
    report::{Report, render},
    schema::schema,
    secret::{SecretError, secret_file},
};

/// Where the configuration file lies unless `edged --config` says otherwise.
pub const DEFAULT_FILE: &str = "/etc/edged/edged.toml";
/// Where the control socket lies unless `[control] socket` says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/edged/edged.sock";
/// Where metrics are served unless `[control] metrics` says otherwise.
pub const DEFAULT_METRICS: &str = "[::1]:9464";
/// The only value of `version` this build reads.
pub const VERSION: i64 = 1;

/// The configuration of the edge appliance.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Version of this file's format; 1 is the only one.
    #[schemars(extend("const" = 1))]
    pub version: u32,
    /// How `edged` is operated and watched.
    #[serde(default)]
    pub control: Control,
    /// What `edged` logs.
    #[serde(default)]
    pub log: Log,
    /// TCP load balancing: frontends, their backends, and the health endpoint.
    #[serde(default)]
    pub lb: lb::Config,
    /// DNS for nodes without IPv4. Default: none.
    #[serde(default)]
    pub dns64: Option<dns64::Config>,
    /// Packets between IPv6 and IPv4. Default: none.
    #[serde(default)]
    pub nat64: Option<dns64::nat64::Config>,
}

/// How `edged` is operated and watched.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Control {
    /// The unix socket that `edgectl` talks to. Default: "/run/edged/edged.sock".
    #[schemars(extend("default" = "/run/edged/edged.sock"))]
    pub socket: At<PathBuf>,
    /// Where `GET /metrics` is answered in the Prometheus text format; `[]` for nowhere. Default: ["[::1]:9464"].
    #[schemars(extend("default" = ["[::1]:9464"]))]
    pub metrics: Vec<At<SocketAddr>>,
    /// A file of mode 0600 with the bearer token that `GET /metrics` must then carry. Default: no token.
    pub metrics_token_file: Option<At<PathBuf>>,
}

/// What `edged` logs, to stderr.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// The least severe level that is logged. Default: "info".
    pub level: Level,
    /// One line of text or one JSON object per event. Default: "text".
    pub format: Format,
}

/// Severity of a log line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// What needs an operator.
    Error,
    /// What may need one.
    Warn,
    /// What changed.
    #[default]
    Info,
    /// What was decided, and on which grounds.
    Debug,
    /// Every step.
    Trace,
}

/// Shape of a log line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// For machines.
    Json,
}

impl Level {
    /// As written in the file; also what `tracing` calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

impl Default for Control {
    fn default() -> Self {
        let metrics = DEFAULT_METRICS.parse().into_iter().map(At::unwritten).collect();
        Self {
            socket: At::unwritten(PathBuf::from(DEFAULT_SOCKET)),
            metrics,
            metrics_token_file: None,
        }
    }
}
