//! One worker process and the channel to it.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{
    channel::{self, Channel},
    handover,
    worker::{
        self, Role,
        message::{FromWorker, ToWorker},
    },
};

/// Messages that may wait for a worker to read them. One that does not read gets no more pings either, and is ended.
const QUEUE: usize = 256;
/// For what was said to be written, and for a message that has begun to be read.
const FLUSH: Duration = Duration::from_secs(1);

/// What is said, with the descriptors that go along.
enum Said {
    Message(ToWorker, Vec<Arc<OwnedFd>>),
    /// Answered when all before it is written.
    Flush(oneshot::Sender<()>),
}

/// What a worker says; `Ok(None)` when it has closed its end.
pub(super) type Heard = Result<Option<FromWorker>, channel::Error>;

/// A running worker.
pub(super) struct Process {
    pid: Pid,
    /// Readable when the process has ended; no number that could be given to another one.
    pidfd: AsyncFd<OwnedFd>,
    channel: Arc<Channel>,
    to_worker: mpsc::Sender<Said>,
    writer: JoinHandle<()>,
    reader: JoinHandle<()>,
    /// Has the reader stop between two messages.
    stop: CancellationToken,
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
        if let Some(value) = handover::test_die() {
            command.env(handover::TEST_DIE, value);
        }
        let mut child = command.spawn()?;
        // It still holds the worker's end, whose closing is how the worker's end is noticed.
        drop(command);
        let adopted = Self::adopt(child.id(), ours);
        if adopted.is_err() {
            let _ = child.kill();
            let _ = child.wait();
        }
        adopted
    }

    /// Goes on with a child of this process that was started before, on the supervisor's end of its channel.
    pub(super) fn adopt(pid: u32, ours: OwnedFd) -> io::Result<(Self, mpsc::Receiver<Heard>)> {
        let pid = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or(io::ErrorKind::InvalidData)?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK)?;
        let pidfd = channel::pollable(pidfd, Interest::READABLE)?;
        // A worker passes no descriptors.
        let channel = Arc::new(Channel::new(ours, 0)?);
        let (to_worker, said) = mpsc::channel(QUEUE);
        let (heard, from_worker) = mpsc::channel(QUEUE);
        let stop = CancellationToken::new();
        let writer = tokio::spawn(write(Arc::clone(&channel), said));
        let reader = tokio::spawn(read(Arc::clone(&channel), heard, stop.clone()));
        let process = Self {
            pid,
            pidfd,
            channel,
            to_worker,
            writer,
            reader,
            stop,
        };
        Ok((process, from_worker))
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Says something; what a worker that does not read cannot take is dropped, and its heartbeat tells.
    pub(super) fn say(&self, message: ToWorker, descriptors: Vec<Arc<OwnedFd>>) {
        let _ = self.to_worker.try_send(Said::Message(message, descriptors));
    }

    /// Stops between two messages in either direction. What was heard by then is in the receiver.
    ///
    /// # Errors
    ///
    /// The worker does not read or write. It goes on being talked to, but is not heard any more in the second case.
    pub(super) async fn pause(&mut self) -> Result<OwnedFd, String> {
        let (flushed, is_flushed) = oneshot::channel();
        let _ = self.to_worker.try_send(Said::Flush(flushed));
        if !matches!(timeout(FLUSH, is_flushed).await, Ok(Ok(()))) {
            return Err("it does not read what it is told".into());
        }
        let ours = self.channel.socket().try_clone_to_owned();
        let ours = ours.map_err(|error| format!("its channel cannot be passed on: {error}"))?;
        self.stop.cancel();
        if timeout(FLUSH, &mut self.reader).await.is_err() {
            return Err("it stopped in the middle of a message".into());
        }
        Ok(ours)
    }

    /// Ends the tasks, not the process.
    pub(super) fn leave(self) {
        self.writer.abort();
        self.reader.abort();
    }

    /// Returns when the process has ended.
    pub(super) async fn ended(&self) {
        if self.pidfd.readable().await.is_err() {
            // The runtime ends, and this process with it.
            std::future::pending().await
        }
    }

    /// Ends the process if it still runs, and tells how it ended, and whether SIGKILL did it that was not ours.
    pub(super) async fn end(self) -> (String, bool) {
        let wait =
            |options| rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED | options);
        let mut status = wait(WaitIdOptions::NOHANG);
        let ours = !matches!(status, Ok(Some(_)));
        if ours {
            // The kernel knows it as ours until it is waited for; it can only have ended meanwhile.
            let _ = rustix::process::pidfd_send_signal(self.pidfd.as_fd(), Signal::KILL);
            self.ended().await;
            status = wait(WaitIdOptions::empty());
        }
        self.writer.abort();
        self.reader.abort();
        match status {
            Ok(Some(status)) => (
                how(&status),
                !ours && status.terminating_signal() == Some(libc::SIGKILL),
            ),
            Ok(None) => ("ended".into(), false),
            Err(error) => (format!("ended, nobody knows how: {error}"), false),
        }
    }
}

/// How a process ended, for people.
fn how(status: &WaitIdStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("exited with code {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "ended".into(),
    }
}

async fn write(channel: Arc<Channel>, mut said: mpsc::Receiver<Said>) {
    while let Some(said) = said.recv().await {
        match said {
            Said::Message(message, descriptors) => {
                let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
                // Whatever is wrong also shows on the reading side, or in the heartbeat.
                if let Err(error) = channel.send(&message, &descriptors).await {
                    tracing::debug!(%error, "a worker could not be told something");
                    return;
                }
            }
            Said::Flush(done) => drop(done.send(())),
        }
    }
}

async fn read(channel: Arc<Channel>, heard: mpsc::Sender<Heard>, stop: CancellationToken) {
    loop {
        let received = match channel.receive_unless(stop.cancelled()).await {
            Ok(None) => return,
            Ok(Some(received)) => Ok(received.map(|(message, _)| message)),
            Err(error) => Err(error),
        };
        let last = !matches!(received, Ok(Some(_)));
        if heard.send(received).await.is_err() || last {
            return;
        }
    }
}
