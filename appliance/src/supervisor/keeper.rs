//! Keeps one worker running: starts it, talks with it, watches its heartbeat, starts it again.
//!
//! ```text
//! starting -> running -> (ended | silent for 5 s: killed) -> waiting 0 to 5 s -> starting
//!               |   \-> replaced: a successor starts beside it and takes over, or is ended again    (successor.rs)
//!               \-> released: the process goes on without a keeper, until one adopts it
//! ```
//! The sockets stay open here, so that connections wait in the backlog while nobody accepts. A worker is believed
//! nothing beyond its role: what makes no sense ends it.

mod backoff;
mod process;
mod successor;

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, oneshot},
    time::MissedTickBehavior,
};

use self::{
    backoff::Backoff,
    process::{Heard, Process},
    successor::Successor,
};
use super::{
    opening::Spec,
    vault::{Kept, Vault},
};
use crate::{
    api::{self, Author, Op, WorkerStatus},
    build::{self, Build},
    channel::MAX_MESSAGE,
    sandbox,
    worker::{
        Role,
        message::{Durable, FromWorker, Question, Reply, Start, ToWorker},
    },
};

/// Time between two pings.
const BEAT: Duration = Duration::from_secs(1);
/// Pings without an answer after which a worker is hung. Counted, not timed: when the whole machine was paused, no
/// worker is to blame.
const SILENT: u32 = 5;
/// Beats within which a worker must be ready.
const START: u32 = 10;
/// For a worker to take over a configuration; less than `edgectl` waits.
const RELOAD: Duration = Duration::from_secs(6);
/// For what is on its way to the disk before a worker is let go.
const SETTLE: Duration = Duration::from_secs(2);
/// Longest name of a frontend or backend, and most drains, that the store is asked to keep: far above what a
/// configuration holds, and low enough that a worker gone wrong cannot fill the disk.
const NAME: usize = 300;
const DRAINS: usize = 4096;
/// Octets of names and keys of nodes in all ([`dns64::zone::Memory::weight`]), likewise: far more than Kubernetes is made for
/// (5,000 nodes), and little enough for one message, also with what is said of it to an operator.
const NODES: usize = MAX_MESSAGE / 2;
/// Questions of the metrics page that may be on their way.
const PAGES: usize = 8;

/// The way to a worker's keeper.
#[derive(Clone)]
pub(super) struct Keeper {
    inbox: mpsc::Sender<Message>,
    seen: Arc<Mutex<Seen>>,
}

/// What the keeper needs from the house.
pub(super) struct Links {
    /// Where things are made durable.
    pub(super) vault: Arc<Vault>,
    /// Where the metrics page's questions go.
    pub(super) ops: mpsc::Sender<Op>,
    /// The balancer's state memory.
    pub(super) state: Option<Arc<OwnedFd>>,
    /// What was kept before.
    pub(super) kept: Kept,
}

enum Message {
    Ask {
        question: Question,
        reply: oneshot::Sender<Reply>,
    },
    Reload {
        spec: Box<Spec>,
        reply: oneshot::Sender<Result<(), String>>,
    },
    Stop {
        grace: Duration,
        done: oneshot::Sender<()>,
    },
    /// Another process, of this program, in place of the one that runs.
    Replace {
        reply: oneshot::Sender<Result<(), String>>,
    },
    /// No more talk with it; it runs on.
    Release {
        reply: oneshot::Sender<Result<Running, String>>,
    },
    /// Of the incarnation with this number only: a later one does not know the question.
    ToWorker {
        incarnation: u64,
        message: ToWorker,
    },
    /// Something is durable that this incarnation wanted to be.
    Kept {
        incarnation: u64,
        durable: Box<Durable>,
    },
    PageDone,
}

/// A worker without a keeper: all that another keeper needs to go on with it.
#[derive(Debug)]
pub(super) struct Running {
    /// Its process, a child of this one.
    pub(super) pid: u32,
    /// The supervisor's end of its channel, between two messages in either direction.
    pub(super) channel: OwnedFd,
    /// Which program it is.
    pub(super) build: Build,
    /// Pings it was sent; it may still answer them.
    pub(super) pings: u64,
    /// Last number of a question.
    pub(super) next: u64,
    /// Since when it runs.
    pub(super) since: Instant,
    /// Times a worker of this role was started again.
    pub(super) restarts: u64,
    /// How the one before it ended.
    pub(super) last_end: Option<String>,
    /// Answers to what it wanted to be durable, by number, that it has not been given.
    pub(super) owed: Vec<(u64, Result<(), String>)>,
}

/// What others may see.
struct Seen {
    pid: Option<u32>,
    build: Option<Build>,
    state: &'static str,
    since: Instant,
    restarts: u64,
    last_end: Option<String>,
}

struct Actor {
    role: Role,
    spec: Box<Spec>,
    /// A configuration that takes over with the next start, if it gets ready.
    candidate: Option<Reload>,
    links: Links,
    inbox: mpsc::Receiver<Message>,
    outbox: mpsc::Sender<Message>,
    seen: Arc<Mutex<Seen>>,
    ready: Option<oneshot::Sender<()>>,
    incarnation: u64,
    /// Things that are on their way to the disk.
    committing: usize,
    pages: usize,
    stopped: Option<oneshot::Sender<()>>,
    /// The process to begin with, if it runs already.
    adopted: Option<(Process, mpsc::Receiver<Heard>, Life)>,
}

struct Reload {
    spec: Box<Spec>,
    reply: oneshot::Sender<Result<(), String>>,
}

/// How one incarnation ended.
struct Ended {
    how: String,
    /// It had been ready.
    ready: bool,
    /// The keeper wanted it.
    wanted: bool,
    /// Somebody else's SIGKILL, which says nothing against the worker.
    killed: bool,
}

/// Why a talk with a worker is over.
enum Over {
    /// Its process has ended.
    Ended,
    /// It is to be ended, and why.
    Because(String),
    /// It runs on.
    Released,
}

impl Keeper {
    /// Starts a worker and keeps it running. `ready` is told once, when it runs for the first time.
    pub(super) fn start(role: Role, spec: Spec, links: Links, ready: oneshot::Sender<()>) -> Self {
        let seen = Seen {
            pid: None,
            build: None,
            state: "starting",
            since: Instant::now(),
            restarts: 0,
            last_end: None,
        };
        Self::spawn(role, spec, links, seen, Some(ready), None)
    }

    /// Goes on with a worker that runs on `spec`, and keeps it running.
    ///
    /// # Errors
    ///
    /// What keeps this process from watching it or talking with it; nothing was said to it then.
    pub(super) fn adopt(role: Role, spec: Spec, links: Links, running: Running) -> std::io::Result<Self> {
        let (process, heard) = Process::adopt(running.pid, running.channel)?;
        for (id, result) in running.owed {
            process.say(ToWorker::Committed { id, result }, Vec::new());
        }
        let seen = Seen {
            pid: Some(running.pid),
            build: Some(running.build),
            state: "running",
            since: running.since,
            restarts: running.restarts,
            last_end: running.last_end,
        };
        let life = Life {
            ready: true,
            pings: running.pings,
            next: running.next,
            ..Life::default()
        };
        Ok(Self::spawn(role, spec, links, seen, None, Some((process, heard, life))))
    }

    fn spawn(
        role: Role,
        spec: Spec,
        links: Links,
        seen: Seen,
        ready: Option<oneshot::Sender<()>>,
        adopted: Option<(Process, mpsc::Receiver<Heard>, Life)>,
    ) -> Self {
        let (outbox, inbox) = mpsc::channel(64);
        let seen = Arc::new(Mutex::new(seen));
        let actor = Actor {
            role,
            spec: Box::new(spec),
            candidate: None,
            links,
            inbox,
            outbox: outbox.clone(),
            seen: Arc::clone(&seen),
            ready,
            incarnation: 0,
            committing: 0,
            pages: 0,
            stopped: None,
            adopted,
        };
        tokio::spawn(actor.run());
        Self { inbox: outbox, seen }
    }

    /// Asks the service; `None` = its worker does not answer now.
    pub(super) async fn ask(&self, question: Question) -> Option<Reply> {
        let (reply, replied) = oneshot::channel();
        self.inbox.send(Message::Ask { question, reply }).await.ok()?;
        replied.await.ok()
    }

    /// Has the worker take over `spec`; it is in effect, or nothing has changed.
    pub(super) async fn reload(&self, spec: Spec) -> Result<(), String> {
        let (reply, replied) = oneshot::channel();
        let gone = |_| "its keeper has ended".to_owned();
        self.inbox
            .send(Message::Reload {
                spec: Box::new(spec),
                reply,
            })
            .await
            .map_err(|_| gone(()))?;
        replied.await.map_err(|_| gone(()))?
    }

    /// Ends the worker for good, killing it after `grace` and a second.
    pub(super) async fn stop(&self, grace: Duration) {
        let (done, stopped) = oneshot::channel();
        if self.inbox.send(Message::Stop { grace, done }).await.is_ok() {
            let _ = stopped.await;
        }
    }

    /// Starts a process of this program beside the one that runs, and has it take over: from the balancer, with its
    /// sessions. With an error the one that ran goes on.
    pub(super) async fn replace(&self) -> Result<(), String> {
        let (reply, replied) = oneshot::channel();
        let gone = |_| "its keeper has ended".to_owned();
        self.inbox
            .send(Message::Replace { reply })
            .await
            .map_err(|_| gone(()))?;
        // Dropped while there is no process to ask.
        replied.await.map_err(|_| "it does not run".to_owned())?
    }

    /// Ends the keeper and leaves the process to whoever adopts it. With an error the keeper goes on.
    pub(super) async fn release(&self) -> Result<Running, String> {
        let (reply, replied) = oneshot::channel();
        let gone = |_| "its keeper has ended".to_owned();
        self.inbox
            .send(Message::Release { reply })
            .await
            .map_err(|_| gone(()))?;
        // Dropped while there is no process to ask.
        replied.await.map_err(|_| "it does not run".to_owned())?
    }

    /// Whether the worker runs and answers.
    pub(super) fn runs(&self) -> bool {
        lock(&self.seen).state == "running"
    }

    /// The program the worker runs.
    pub(super) fn build(&self) -> Option<Build> {
        lock(&self.seen).build.clone()
    }

    /// The worker at a glance.
    pub(super) fn status(&self, role: Role) -> WorkerStatus {
        let seen = lock(&self.seen);
        WorkerStatus {
            role: role.name().into(),
            pid: seen.pid,
            version: seen.build.as_ref().map(|build| build.version.clone()),
            build: seen.build.as_ref().map(|build| build.build.clone()),
            state: seen.state.into(),
            uptime_seconds: seen.since.elapsed().as_secs(),
            restarts: seen.restarts,
            last_end: seen.last_end.clone(),
        }
    }
}

impl Actor {
    async fn run(mut self) {
        let mut backoff = Backoff::default();
        loop {
            let started = Instant::now();
            // Released: whoever adopts the process looks after it from here on.
            let Some(ended) = self.live().await else { return };
            self.after(&ended);
            if self.stopped.is_some() {
                break;
            }
            if ended.wanted {
                continue;
            }
            let delay = backoff.after(started.elapsed(), ended.ready && ended.killed);
            lock(&self.seen).restarts += 1;
            tracing::warn!(role = %self.role, how = ended.how, again_in_ms = delay.as_millis(), "worker ended");
            if !self.wait(delay).await {
                break;
            }
        }
        self.look("stopped", None);
        if let Some(done) = self.stopped.take() {
            let _ = done.send(());
        }
    }

    fn after(&mut self, ended: &Ended) {
        {
            let mut seen = lock(&self.seen);
            seen.last_end = (!ended.wanted)
                .then(|| ended.how.clone())
                .or_else(|| seen.last_end.take());
        }
        self.look("waiting", None);
        if !ended.ready
            && !ended.wanted
            && let Some(candidate) = self.candidate.take()
        {
            let message = format!(
                "worker {} did not get ready with it ({}); see its lines in the log",
                self.role, ended.how
            );
            let _ = candidate.reply.send(Err(message));
        }
    }

    fn look(&self, state: &'static str, pid: Option<u32>) {
        let mut seen = lock(&self.seen);
        (seen.state, seen.pid) = (state, pid);
        if state == "starting" {
            seen.since = Instant::now();
        }
    }

    /// Waits before the next start, and for what is on its way to the disk, with which it is to start; `false` = there is
    /// to be no start.
    async fn wait(&mut self, delay: Duration) -> bool {
        let until = tokio::time::Instant::now() + delay;
        loop {
            let settled = until + if self.committing > 0 { SETTLE } else { Duration::ZERO };
            if settled <= tokio::time::Instant::now() {
                return true;
            }
            tokio::select! {
                () = tokio::time::sleep_until(settled) => return true,
                Some(message) = self.inbox.recv() => match message {
                    // Perhaps it cures what keeps the worker from running.
                    Message::Reload { spec, reply } => {
                        self.candidate = Some(Reload { spec, reply });
                        return true;
                    }
                    Message::Stop { done, .. } => {
                        self.stopped = Some(done);
                        return false;
                    }
                    Message::Kept { durable, .. } => self.links.kept.keep(*durable),
                    Message::PageDone => self.pages = self.pages.saturating_sub(1),
                    Message::ToWorker { message, .. } => self.settled(&message),
                    // Dropping the way back is the answer.
                    Message::Ask { .. } | Message::Replace { .. } | Message::Release { .. } => {}
                },
            }
        }
    }

    /// One process from start to end, with those that take over from it; `None` if it was released.
    async fn live(&mut self) -> Option<Ended> {
        let (mut process, mut heard, mut life) = match self.adopted.take() {
            Some(adopted) => adopted,
            None => match self.begin() {
                Ok((process, heard)) => (process, heard, Life::default()),
                Err(error) => {
                    return Some(Ended {
                        how: format!("could not be started: {error}"),
                        ready: false,
                        wanted: false,
                        killed: false,
                    });
                }
            },
        };
        let over = self.converse(&mut process, &mut heard, &mut life).await;
        let why = match over {
            Over::Released => {
                process.leave();
                return None;
            }
            Over::Because(why) => Some(why),
            Over::Ended => None,
        };
        let (status, killed) = process.end().await;
        let how = why.as_deref().unwrap_or(&status).to_owned();
        if let Some((_, reload)) = life.reload {
            let _ = reload
                .reply
                .send(Err(format!("worker {} ended meanwhile ({how})", self.role)));
        }
        if let Some(successor) = life.successor {
            successor.fail(format!(
                "the old one ended meanwhile ({how}), and both are started again"
            ));
        }
        Some(Ended {
            how,
            ready: life.ready,
            wanted: life.wanted,
            killed,
        })
    }

    /// Starts a process on what is wanted now.
    fn begin(&mut self) -> std::io::Result<(Process, mpsc::Receiver<Heard>)> {
        self.incarnation += 1;
        self.look("starting", None);
        lock(&self.seen).build = Some(build::own());
        let (process, heard) = Process::start(self.role)?;
        self.look("starting", Some(process.pid()));
        let (start, descriptors) = self.start_message(None, false);
        process.say(start, descriptors);
        Ok((process, heard))
    }

    /// What a process is started with: a successor beside one that still runs, or not; `inherit` leads to that one.
    fn start_message(&self, inherit: Option<OwnedFd>, successor: bool) -> (ToWorker, Vec<Arc<OwnedFd>>) {
        let spec = self.candidate.as_ref().map_or(&self.spec, |candidate| &candidate.spec);
        let (service, sockets) = spec.service(None);
        let state = self.links.state.clone().filter(|_| self.role == Role::Lb);
        let start = Start {
            service,
            threads: spec.threads,
            drains: self.links.kept.drains.iter().cloned().collect(),
            dns64: self.links.kept.dns64.clone(),
            state: state.is_some(),
            inherit: inherit.is_some(),
            successor,
            token: spec.token.clone(),
        };
        let descriptors = state.into_iter().chain(inherit.map(Arc::new)).chain(sockets).collect();
        (ToWorker::Start(Box::new(start)), descriptors)
    }

    /// Talks until the process has ended, is to be ended, or is left to another keeper. A successor that takes over takes
    /// the place of all three arguments.
    async fn converse(&mut self, process: &mut Process, heard: &mut mpsc::Receiver<Heard>, life: &mut Life) -> Over {
        let mut beat = tokio::time::interval(BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        beat.tick().await;
        let mut until = None;
        loop {
            let deadline = life.successor.as_ref().map(|successor| successor.until);
            tokio::select! {
                () = process.ended() => if !self.outlived(process, heard, life).await { return Over::Ended },
                said = heard.recv() => match said.unwrap_or(Ok(None)) {
                    // The channel closes a moment before the process ends; its status says more.
                    Ok(None) => {
                        let _ = tokio::time::timeout(BEAT, process.ended()).await;
                        if !self.outlived(process, heard, life).await { return Over::Ended }
                    }
                    Ok(Some(message)) => if let Err(why) = self.hear(message, process, life) { return Over::Because(why) },
                    Err(error) => return Over::Because(format!("said what makes no sense: {error}")),
                },
                said = successor::says(&mut life.successor) => self.hear_successor(said, process, heard, life),
                () = at(deadline) => if let Err(why) = self.too_late(process, heard, life) { return Over::Because(why) },
                Some(message) = self.inbox.recv() => match message {
                    Message::Stop { grace, done } => {
                        self.stopped = Some(done);
                        life.wanted = true;
                        if let Some(successor) = life.successor.take() {
                            successor.fail("edged stops".into());
                        }
                        process.say(ToWorker::Stop { grace_ms: u64::try_from(grace.as_millis()).unwrap_or(0) }, Vec::new());
                        until = Some(tokio::time::Instant::now() + grace + BEAT);
                        self.look("stopping", Some(process.pid()));
                    }
                    Message::Replace { reply } => self.succeed(reply, process, life),
                    Message::Release { reply } => match self.let_go(process, heard, life).await {
                        Ok(running) => {
                            let _ = reply.send(Ok(running));
                            return Over::Released;
                        }
                        Err(why) => drop(reply.send(Err(why))),
                    },
                    other => if let Err(why) = self.told(other, process, life) { return Over::Because(why) },
                },
                _ = beat.tick() => if let Err(why) = self.beat(process, life) { return Over::Because(why) },
                () = at(until) => return Over::Because("did not stop in time".into()),
            }
        }
    }

    /// Brings the talk to a point at which another keeper can go on.
    async fn let_go(
        &mut self,
        process: &mut Process,
        heard: &mut mpsc::Receiver<Heard>,
        life: &mut Life,
    ) -> Result<Running, String> {
        if !life.ready || life.wanted || life.reload.is_some() || life.successor.is_some() || life.heir {
            return Err("it is being started, changed or stopped".into());
        }
        let channel = process.pause().await?;
        while let Ok(said) = heard.try_recv() {
            match said {
                Ok(Some(message)) => self.hear(message, process, life)?,
                Ok(None) => return Err("it ended".into()),
                Err(error) => return Err(format!("it said what makes no sense: {error}")),
            }
        }
        let owed = self.settle().await?;
        let seen = lock(&self.seen);
        Ok(Running {
            owed,
            pid: process.pid(),
            channel,
            build: seen.build.clone().unwrap_or_default(),
            pings: life.pings,
            next: life.next,
            since: seen.since,
            restarts: seen.restarts,
            last_end: seen.last_end.clone(),
        })
    }

    /// Waits for what is on its way to the disk; the answers, which the worker cannot be told now.
    async fn settle(&mut self) -> Result<Vec<(u64, Result<(), String>)>, String> {
        let (mut owed, mut later) = (Vec::new(), Vec::new());
        let until = tokio::time::Instant::now() + SETTLE;
        while self.committing > 0 {
            let Ok(Some(message)) = tokio::time::timeout_at(until, self.inbox.recv()).await else {
                break;
            };
            match message {
                Message::Kept { durable, .. } => self.links.kept.keep(*durable),
                Message::ToWorker {
                    incarnation,
                    message: message @ ToWorker::Committed { .. },
                } => {
                    self.settled(&message);
                    if let ToWorker::Committed { id, result } = message
                        && incarnation == self.incarnation
                    {
                        owed.push((id, result));
                    }
                }
                other => later.push(other),
            }
        }
        let changes = |message: &Message| matches!(message, Message::Stop { .. } | Message::Reload { .. });
        let why = if self.committing > 0 {
            "the disk keeps it waiting"
        } else if later.iter().any(changes) {
            "it is being changed or stopped"
        } else {
            // Questions: dropping the way back is an answer.
            return Ok(owed);
        };
        let outbox = self.outbox.clone();
        tokio::spawn(async move {
            for message in later {
                let _ = outbox.send(message).await;
            }
        });
        Err(why.into())
    }

    /// Gives what is durable to a successor to change, when the disk has answered its predecessor.
    fn give(&self, process: &Process, life: &mut Life) {
        if self.committing == 0 && std::mem::take(&mut life.heir) {
            process.say(ToWorker::Own, Vec::new());
        }
    }

    /// Counts an answer from the disk.
    fn settled(&mut self, message: &ToWorker) {
        if matches!(message, ToWorker::Committed { .. }) {
            self.committing = self.committing.saturating_sub(1);
        }
    }

    fn beat(&self, process: &Process, life: &mut Life) -> Result<(), String> {
        if let Some((_, reload)) = &life.reload
            && life.reload_since.is_some_and(|since| since.elapsed() > RELOAD)
        {
            // It may have done half of it; a start with the old configuration is a known state.
            tracing::warn!(role = %self.role, listeners = reload.spec.sockets.0.len(), "no answer to a new configuration");
            return Err(format!(
                "no answer to a new configuration within {} s",
                RELOAD.as_secs()
            ));
        }
        // Nobody answers while a balancer is handed over, which has a deadline of its own.
        if life.wanted || life.successor.is_some() {
            return Ok(());
        }
        life.silent += 1;
        if !life.ready {
            return if life.silent > START {
                Err(format!("not ready within {START} s"))
            } else {
                Ok(())
            };
        }
        if life.silent > SILENT {
            return Err(format!("no heartbeat for {SILENT} s"));
        }
        life.pings += 1;
        process.say(ToWorker::Ping { id: life.pings }, Vec::new());
        Ok(())
    }

    /// What the house says to a running worker.
    fn told(&mut self, message: Message, process: &Process, life: &mut Life) -> Result<(), String> {
        match message {
            Message::Ask { question, reply } if life.ready => {
                life.asked.retain(|_, (_, reply)| !reply.is_closed());
                life.next += 1;
                life.asked.insert(life.next, (question.clone(), reply));
                let id = life.next;
                process.say(ToWorker::Ask { id, question }, Vec::new());
            }
            Message::Reload { reply, .. } if life.successor.is_some() => {
                drop(reply.send(Err(format!(
                    "worker {} is being replaced; try again in a few seconds",
                    self.role
                ))));
            }
            Message::Reload { spec, reply } if life.ready && self.role != Role::Web && spec != self.spec => {
                life.next += 1;
                let (service, sockets) = spec.service(Some(&self.spec));
                process.say(
                    ToWorker::Reload {
                        id: life.next,
                        service: Box::new(service),
                    },
                    sockets,
                );
                life.reload_since = Some(Instant::now());
                life.reload = Some((life.next, Reload { spec, reply }));
            }
            // Back to what it runs on, or is about to.
            Message::Reload { spec, reply } if spec == self.spec && self.candidate.is_none() => {
                drop(reply.send(Ok(())))
            }
            // A worker without sessions, or one that does not run, simply starts with it.
            Message::Reload { spec, reply } => {
                self.candidate = Some(Reload { spec, reply });
                life.wanted = true;
                return Err("started again for another configuration".into());
            }
            Message::ToWorker { incarnation, message } => {
                self.settled(&message);
                if incarnation == self.incarnation {
                    process.say(message, Vec::new());
                }
                self.give(process, life);
            }
            Message::Kept { incarnation, durable } => self.kept(incarnation, *durable, process, life),
            Message::PageDone => self.pages = self.pages.saturating_sub(1),
            Message::Ask { .. } | Message::Stop { .. } | Message::Replace { .. } | Message::Release { .. } => {}
        }
        Ok(())
    }

    /// What the worker says.
    fn hear(&mut self, message: FromWorker, process: &Process, life: &mut Life) -> Result<(), String> {
        match (message, self.role) {
            (FromWorker::Ready, _) if !life.ready => self.is_ready(process, life),
            (FromWorker::Pong { id }, _) if (1..=life.pings).contains(&id) => life.silent = 0,
            (
                FromWorker::Answer {
                    id,
                    reply: answer @ Reply::Lb(_),
                },
                Role::Lb,
            )
            | (
                FromWorker::Answer {
                    id,
                    reply: answer @ Reply::Dns64(_),
                },
                Role::Dns64,
            )
            | (
                FromWorker::Answer {
                    id,
                    reply: answer @ Reply::Nat64(_),
                },
                Role::Nat64,
            ) => {
                if let Some((_, reply)) = life.asked.remove(&id) {
                    let _ = reply.send(answer);
                }
            }
            (FromWorker::Reloaded { id, result }, Role::Lb | Role::Dns64 | Role::Nat64) => match life.reload.take() {
                Some((asked, reload)) if asked == id => {
                    if result.is_ok() {
                        self.spec = reload.spec;
                    }
                    let _ = reload.reply.send(result);
                }
                _ => return Err("answered a configuration it was not given".into()),
            },
            (FromWorker::Commit { id, durable }, role) if may_keep(role, &durable) => match self.room_for(&durable) {
                Ok(()) => self.commit(id, *durable),
                Err(why) => process.say(ToWorker::Committed { id, result: Err(why) }, Vec::new()),
            },
            (FromWorker::HandedOver { id, result }, Role::Lb) => return Self::handed_over(id, result, life),
            (FromWorker::Metrics { id }, Role::Web) => self.page(id, process),
            (message, role) => {
                // Its kind only: a key may be in it.
                tracing::warn!(%role, said = message.kind(), "a worker said what is not for it to say");
                return Err("said what is not for it to say".into());
            }
        }
        Ok(())
    }

    fn is_ready(&mut self, process: &Process, life: &mut Life) {
        life.ready = true;
        life.silent = 0;
        self.look("running", Some(process.pid()));
        tracing::info!(role = %self.role, pid = process.pid(), took_ms = lock(&self.seen).since.elapsed().as_millis(), "worker runs");
        if let Some(candidate) = self.candidate.take() {
            self.spec = candidate.spec;
            let _ = candidate.reply.send(Ok(()));
        }
        if let Some(ready) = self.ready.take() {
            let _ = ready.send(());
        }
    }

    /// Whether there is not more of what `durable` is than anybody could want.
    fn room_for(&self, durable: &Durable) -> Result<(), String> {
        let Kept { drains, dns64, unread } = &self.links.kept;
        match durable {
            Durable::Dns64(_) if let Some(why) = unread => Err(format!(
                "what is kept of nodes could not be read at the start, and nothing is written over it: {why}; put a copy of the state directory back, or move it aside and make the keys anew"
            )),
            Durable::Drain { set: true, .. } if drains.len() >= DRAINS => Err(format!(
                "{DRAINS} drains are kept already, which is the limit; take some back"
            )),
            Durable::Dns64(durable) if dns64.growth(durable) > NODES.saturating_sub(dns64.weight()) => Err(format!(
                "names and keys of nodes take {} of {} MiB; remove keys of nodes that are gone: edgectl dns key rm",
                dns64.weight() >> 20,
                NODES >> 20
            )),
            _ => Ok(()),
        }
    }

    /// Makes something durable and says so.
    fn commit(&mut self, id: u64, durable: Durable) {
        self.committing += 1;
        let (vault, outbox, incarnation) = (Arc::clone(&self.links.vault), self.outbox.clone(), self.incarnation);
        tokio::spawn(async move {
            let result = vault.keep(durable.clone()).await;
            if result.is_ok() {
                tell(&durable);
                let durable = Box::new(durable);
                let _ = outbox.send(Message::Kept { incarnation, durable }).await;
            }
            let message = ToWorker::Committed { id, result };
            let _ = outbox.send(Message::ToWorker { incarnation, message }).await;
        });
    }

    /// Something that the incarnation of that number wanted is durable. Another one, and one that is being started, was given
    /// what was kept before.
    fn kept(&mut self, incarnation: u64, durable: Durable, process: &Process, life: &Life) {
        if let Durable::Dns64(_) = &durable {
            let learn = || ToWorker::Learn {
                durable: Box::new(durable.clone()),
            };
            if incarnation != self.incarnation {
                process.say(learn(), Vec::new());
            }
            if let Some(successor) = &life.successor {
                successor.learn(learn());
            }
        }
        self.links.kept.keep(durable);
    }

    /// Gets the metrics page, the only thing the web worker may ask for.
    fn page(&mut self, id: u64, process: &Process) {
        if self.pages >= PAGES {
            return process.say(
                ToWorker::Metrics {
                    id,
                    result: Err("too many questions at a time".into()),
                },
                Vec::new(),
            );
        }
        self.pages += 1;
        let (ops, outbox, incarnation) = (self.links.ops.clone(), self.outbox.clone(), self.incarnation);
        let author = Author {
            uid: sandbox::id(self.role),
            user: None,
            pid: i32::try_from(process.pid()).unwrap_or(0),
        };
        tokio::spawn(async move {
            let (reply, replied) = oneshot::channel();
            let _ = ops
                .send(Op {
                    ask: api::Ask::Metrics,
                    author,
                    reply,
                })
                .await;
            let result = match replied.await {
                Ok(Ok(api::Answer::Metrics { text })) => Ok(text),
                Ok(Ok(_)) => Err("the supervisor answered something else".into()),
                Ok(Err(refusal)) => Err(refusal.message),
                Err(_) => Err("the supervisor ends".into()),
            };
            let _ = outbox.send(Message::PageDone).await;
            let _ = outbox
                .send(Message::ToWorker {
                    incarnation,
                    message: ToWorker::Metrics { id, result },
                })
                .await;
        });
    }
}

/// What is known about one process.
#[derive(Default)]
struct Life {
    ready: bool,
    wanted: bool,
    silent: u32,
    pings: u64,
    next: u64,
    asked: BTreeMap<u64, (Question, oneshot::Sender<Reply>)>,
    reload: Option<(u64, Reload)>,
    reload_since: Option<Instant>,
    successor: Option<Successor>,
    /// It has not been told yet that what is durable is its own to change.
    heir: bool,
}

/// Whether it is for a worker of `role` to have `durable` kept.
fn may_keep(role: Role, durable: &Durable) -> bool {
    match (role, durable) {
        (Role::Lb, Durable::Drain { drain, .. }) => drain.frontend.len() <= NAME && drain.backend.len() <= NAME,
        (Role::Dns64, Durable::Dns64(_)) => true,
        _ => false,
    }
}

/// What has been kept, for the log.
fn tell(durable: &Durable) {
    use dns64::zone::Durable as Dns64;
    match durable {
        Durable::Drain { drain, set } => {
            tracing::info!(frontend = drain.frontend, backend = drain.backend, set, "drain kept");
        }
        Durable::Dns64(durable) => match &**durable {
            Dns64::Zone(change) => {
                tracing::info!(node = %change.node, records = change.records.len(), "names of a node kept");
            }
            Dns64::Key(key) => tracing::info!(key = %key.name, node = %key.node, "a node's key kept"),
            Dns64::KeyRemoved { name, .. } => tracing::info!(key = %name, "a node's key removed"),
        },
    }
}

async fn at(until: Option<tokio::time::Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
