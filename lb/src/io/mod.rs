//! Sockets, threads, clocks: the shell around the pure modules.

mod check;
mod clock;
mod frontend;
mod healthz;
mod memory;
mod names;
mod reactor;
mod relay;
mod service;
pub mod socket;

pub use service::{Error, check_file, run};

use std::{collections::BTreeMap, net::SocketAddr, os::fd::OwnedFd, path::PathBuf, time::Duration};

use tokio::sync::{mpsc, oneshot};

use crate::{
    Config,
    status::{Answer, Request},
};

/// What the supervisor opened for this service.
#[derive(Debug, Default)]
pub struct Opened {
    /// Sockets of each listener of [`crate::needs`]. At a reload only those that were not passed before; the others
    /// are kept.
    pub listeners: Vec<(SocketAddr, Vec<OwnedFd>)>,
    /// Content of each file of [`crate::needs`].
    pub files: BTreeMap<PathBuf, Vec<u8>>,
    /// Content of /etc/resolv.conf; empty if there is none.
    pub resolv_conf: Vec<u8>,
    /// Content of /etc/hosts; empty if there is none.
    pub hosts: Vec<u8>,
}

/// A drain that an operator asked for and that outlives restarts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Drain {
    /// The frontend.
    pub frontend: String,
    /// The backend as configured, `HOST:PORT`.
    pub backend: String,
}

/// A change that must be durable before it takes effect.
#[derive(Debug)]
pub struct Commit {
    /// The drain in question.
    pub drain: Drain,
    /// Set or taken back.
    pub set: bool,
    /// Answered after fsync, or with the reason why not.
    pub done: oneshot::Sender<Result<(), String>>,
}

/// What the supervisor tells the running service.
#[derive(Debug)]
pub enum Command {
    /// Take over a checked configuration; unchanged listeners and live sessions are not touched.
    Reload {
        /// Parsed and checked.
        config: Box<Config>,
        /// What is needed and was not passed before.
        opened: Opened,
        /// Answered when it is in effect.
        done: oneshot::Sender<Result<(), String>>,
    },
    /// A question.
    Ask {
        /// What is asked.
        request: Request,
        /// Where the answer goes.
        reply: oneshot::Sender<Answer>,
    },
    /// Answered only while every data thread makes progress.
    Ping(oneshot::Sender<()>),
    /// Stop accepting, let sessions end for at most `grace`, return.
    Stop {
        /// How long sessions may go on.
        grace: Duration,
    },
}

/// The running service's links to the supervisor.
#[derive(Debug)]
pub struct Links {
    /// What the supervisor says.
    pub commands: mpsc::Receiver<Command>,
    /// Changes to be made durable.
    pub commits: mpsc::Sender<Commit>,
}
