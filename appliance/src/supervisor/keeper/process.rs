//! One worker process and the channel to it.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
};

use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::mpsc,
    task::JoinHandle,
};

use crate::{
    channel::{self, Channel},
    worker::{
        self, Role,
        message::{FromWorker, ToWorker},
    },
};

/// Messages that may wait for a worker to read them. One that does not read gets no more pings either, and is ended.
const QUEUE: usize = 256;

/// What is said, with the descriptors that go along.
type Said = (ToWorker, Vec<Arc<OwnedFd>>);

/// What a worker says; `Ok(None)` when it has closed its end.
pub(super) type Heard = Result<Option<FromWorker>, channel::Error>;

/// A running worker.
pub(super) struct Process {
    child: Child,
    /// Readable when the process has ended; no number that could be given to another one.
    pidfd: AsyncFd<OwnedFd>,
    to_worker: mpsc::Sender<Said>,
    tasks: [JoinHandle<()>; 2],
}

impl Process {
    /// Starts this program again as a worker, with nothing open but the channel and standard output and error.
    ///
    /// What it says comes out of the receiver.
    ///
    /// The caller's thread must be the main one: the worker ends when the thread that started it does.
    pub(super) fn start(role: Role) -> io::Result<(Self, mpsc::Receiver<Heard>)> {
        let (ours, theirs) = channel::pair()?;
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0(format!("edged: {role}"))
            .arg(worker::ARGUMENT)
            .arg(role.name());
        command.env_clear().stdin(Stdio::from(theirs)).stdout(Stdio::null());
        // How to write the log, and the keepalive of a test: lb::io::socket::keepalive.
        for key in ["JOURNAL_STREAM", "EDGED_TEST_KEEPALIVE"] {
            if let Some(value) = std::env::var_os(key) {
                command.env(key, value);
            }
        }
        let mut child = command.spawn()?;
        // It still holds the worker's end, whose closing is how the worker's end is noticed.
        drop(command);
        let watched = watch(&child, ours);
        if watched.is_err() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let (pidfd, channel) = watched?;
        let channel = Arc::new(channel);
        let (to_worker, said) = mpsc::channel(QUEUE);
        let (heard, from_worker) = mpsc::channel(QUEUE);
        let tasks = [
            tokio::spawn(write(Arc::clone(&channel), said)),
            tokio::spawn(read(channel, heard)),
        ];
        Ok((
            Self {
                child,
                pidfd,
                to_worker,
                tasks,
            },
            from_worker,
        ))
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Says something; what a worker that does not read cannot take is dropped, and its heartbeat tells.
    pub(super) fn say(&self, message: ToWorker, descriptors: Vec<Arc<OwnedFd>>) {
        let _ = self.to_worker.try_send((message, descriptors));
    }

    /// Returns when the process has ended.
    pub(super) async fn ended(&self) {
        if self.pidfd.readable().await.is_err() {
            // The runtime ends, and this process with it.
            std::future::pending().await
        }
    }

    /// Ends the process if it still runs, and tells how it ended, and whether SIGKILL did it that was not ours.
    pub(super) async fn end(mut self) -> (String, bool) {
        let ours = !matches!(self.child.try_wait(), Ok(Some(_)));
        if ours {
            // The kernel knows it as ours until it is waited for; it can only have ended meanwhile.
            let _ = rustix::process::pidfd_send_signal(self.pidfd.as_fd(), Signal::KILL);
            self.ended().await;
        }
        for task in &self.tasks {
            task.abort();
        }
        match self.child.wait() {
            Ok(status) => (how(status), !ours && status.signal() == Some(libc::SIGKILL)),
            Err(error) => (format!("ended, nobody knows how: {error}"), false),
        }
    }
}

fn watch(child: &Child, ours: OwnedFd) -> io::Result<(AsyncFd<OwnedFd>, Channel)> {
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or(io::ErrorKind::InvalidData)?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK)?;
    // A worker passes no descriptors.
    Ok((channel::pollable(pidfd, Interest::READABLE)?, Channel::new(ours, 0)?))
}

/// How a process ended, for people.
fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with code {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "ended".into(),
    }
}

async fn write(channel: Arc<Channel>, mut said: mpsc::Receiver<Said>) {
    while let Some((message, descriptors)) = said.recv().await {
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        // Whatever is wrong also shows on the reading side, or in the heartbeat.
        if let Err(error) = channel.send(&message, &descriptors).await {
            tracing::debug!(%error, "a worker could not be told something");
            return;
        }
    }
}

async fn read(channel: Arc<Channel>, heard: mpsc::Sender<Heard>) {
    loop {
        let received = channel
            .receive()
            .await
            .map(|received| received.map(|(message, _)| message));
        let last = !matches!(received, Ok(Some(_)));
        if heard.send(received).await.is_err() || last {
            return;
        }
    }
}
