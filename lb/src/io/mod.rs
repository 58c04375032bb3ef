//! Sockets, threads, clocks: the shell around the pure modules.

mod check;
mod clock;
mod dial;
mod frontend;
mod handover;
mod healthz;
mod ingress;
mod memory;
mod names;
mod reactor;
mod relay;
mod service;
mod session;
mod slab;
pub mod socket;
mod threads;

pub use service::{Error, check_file, run};

pub use crate::Drain;

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
    /// Hand everything over to a successor: sessions, pools, listeners are frozen meanwhile.
    HandOver {
        /// Where the pieces go, one at a time (capacity 1). The sender is dropped when all are out; the last part says in
        /// its own body that it is the last.
        parts: mpsc::Sender<Part>,
        /// Sent: the successor serves, and the service ends its `run` with `Ok` without touching a connection.
        /// Dropped: it goes on as if nothing had been.
        commit: oneshot::Receiver<()>,
    },
    /// Stop accepting, let sessions end for at most `grace`, return.
    Stop {
        /// How long sessions may go on.
        grace: Duration,
    },
}

/// One piece of what a service hands to its successor: a body only the service itself understands, and descriptors.
#[derive(Debug)]
pub struct Part {
    /// In the service's own format, which carries its own version.
    pub body: Vec<u8>,
    /// What the body refers to, in its order.
    pub descriptors: Vec<OwnedFd>,
}

/// What a service that takes over from a running predecessor is given.
///
/// If `parts` ends without the last part, or `committed` is dropped, `run` ends with an error and touches nothing. The
/// first [`Command::Ping`] is answered only when it serves.
#[derive(Debug)]
pub struct Inheritance {
    /// The pieces, in the order they were sent.
    pub parts: mpsc::Receiver<Part>,
    /// To be sent when every part is taken in and nothing has been started.
    pub ready: oneshot::Sender<()>,
    /// Sent: start serving.
    pub committed: oneshot::Receiver<()>,
}

/// The running service's links to the supervisor.
#[derive(Debug)]
pub struct Links {
    /// What the supervisor says.
    pub commands: mpsc::Receiver<Command>,
    /// Changes to be made durable.
    pub commits: mpsc::Sender<Commit>,
}
