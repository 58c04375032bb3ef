//! Keeps one worker running: starts it, talks with it, watches its heartbeat, starts it again.
//!
//! ```text
//! starting -> running -> (ended | silent for 5 s: killed) -> waiting 0 to 5 s -> starting
//! ```
//! The sockets stay open here, so that connections wait in the backlog while nobody accepts. A worker is believed
//! nothing beyond its role: what makes no sense ends it.

mod backoff;
mod process;

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use lb::{
    io::Drain,
    status::{Answer, Request},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::MissedTickBehavior,
};

use self::{
    backoff::Backoff,
    process::{Heard, Process},
};
use super::{opening::Spec, vault::Vault};
use crate::{
    api::{self, Author, Op, WorkerStatus},
    sandbox,
    worker::{
        Role,
        message::{FromWorker, Start, ToWorker},
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
/// Longest name of a frontend or backend, and most drains, that the store is asked to keep: far above what a
/// configuration holds, and low enough that a worker gone wrong cannot fill the disk.
const NAME: usize = 300;
const DRAINS: usize = 4096;
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
    /// Where drains are made durable.
    pub(super) vault: Arc<Vault>,
    /// Where the metrics page's questions go.
    pub(super) ops: mpsc::Sender<Op>,
    /// The balancer's state memory.
    pub(super) state: Option<Arc<OwnedFd>>,
    /// Drains in effect at start.
    pub(super) drains: BTreeSet<Drain>,
}

enum Message {
    Ask {
        request: Request,
        reply: oneshot::Sender<Answer>,
    },
    Reload {
        spec: Box<Spec>,
        reply: oneshot::Sender<Result<(), String>>,
    },
    Stop {
        grace: Duration,
        done: oneshot::Sender<()>,
    },
    /// Of the incarnation with this number only: a later one does not know the question.
    ToWorker {
        incarnation: u64,
        message: ToWorker,
    },
    Drained {
        drain: Drain,
        set: bool,
    },
    PageDone,
}

/// What others may see.
struct Seen {
    pid: Option<u32>,
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
    pages: usize,
    stopped: Option<oneshot::Sender<()>>,
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

impl Keeper {
    /// Starts a worker and keeps it running. `ready` is told once, when it runs for the first time.
    pub(super) fn start(role: Role, spec: Spec, links: Links, ready: oneshot::Sender<()>) -> Self {
        let (outbox, inbox) = mpsc::channel(64);
        let seen = Arc::new(Mutex::new(Seen {
            pid: None,
            state: "starting",
            since: Instant::now(),
            restarts: 0,
            last_end: None,
        }));
        let actor = Actor {
            role,
            spec: Box::new(spec),
            candidate: None,
            links,
            inbox,
            outbox: outbox.clone(),
            seen: Arc::clone(&seen),
            ready: Some(ready),
            incarnation: 0,
            pages: 0,
            stopped: None,
        };
        tokio::spawn(actor.run());
        Self { inbox: outbox, seen }
    }

    /// Asks the balancer; `None` = its worker does not answer now.
    pub(super) async fn ask(&self, request: Request) -> Option<Answer> {
        let (reply, replied) = oneshot::channel();
        self.inbox.send(Message::Ask { request, reply }).await.ok()?;
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

    /// The worker at a glance.
    pub(super) fn status(&self, role: Role) -> WorkerStatus {
        let seen = lock(&self.seen);
        WorkerStatus {
            role: role.name().into(),
            pid: seen.pid,
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
            let ended = self.live().await;
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
            if !delay.is_zero() && !self.wait(delay).await {
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

    /// Waits before the next start; `false` = there is to be none.
    async fn wait(&mut self, delay: Duration) -> bool {
        let until = tokio::time::Instant::now() + delay;
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => return true,
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
                    Message::Drained { drain, set } => self.drained(drain, set),
                    Message::PageDone => self.pages = self.pages.saturating_sub(1),
                    // Dropping the way back is the answer.
                    Message::Ask { .. } | Message::ToWorker { .. } => {}
                },
            }
        }
    }

    /// One process from start to end.
    async fn live(&mut self) -> Ended {
        self.incarnation += 1;
        self.look("starting", None);
        let spec = self.candidate.as_ref().map_or(&self.spec, |candidate| &candidate.spec);
        let (service, sockets) = spec.service(None);
        let state = self.links.state.clone().filter(|_| self.role == Role::Lb);
        let start = Start {
            service,
            threads: spec.threads,
            drains: self.links.drains.iter().cloned().collect(),
            state: state.is_some(),
            token: spec.token.clone(),
        };
        let descriptors = state.into_iter().chain(sockets).collect();
        let not_started = |error: std::io::Error| Ended {
            how: format!("could not be started: {error}"),
            ready: false,
            wanted: false,
            killed: false,
        };
        let (process, mut heard) = match Process::start(self.role) {
            Ok(started) => started,
            Err(error) => return not_started(error),
        };
        self.look("starting", Some(process.pid()));
        process.say(ToWorker::Start(Box::new(start)), descriptors);
        let mut life = Life::default();
        let why = self.converse(&process, &mut heard, &mut life).await;
        let (status, killed) = process.end().await;
        if let Some((_, reload)) = life.reload {
            let _ = reload.reply.send(Err(format!(
                "worker {} ended meanwhile ({})",
                self.role,
                why.as_deref().unwrap_or(&status)
            )));
        }
        Ended {
            how: why.unwrap_or(status),
            ready: life.ready,
            wanted: life.wanted,
            killed,
        }
    }

    /// Talks until the process has ended (`None`) or is to be ended, and why.
    async fn converse(
        &mut self,
        process: &Process,
        heard: &mut mpsc::Receiver<Heard>,
        life: &mut Life,
    ) -> Option<String> {
        let mut beat = tokio::time::interval(BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        beat.tick().await;
        let mut until = None;
        loop {
            tokio::select! {
                () = process.ended() => return None,
                said = heard.recv() => match said.unwrap_or(Ok(None)) {
                    // The channel closes a moment before the process ends; its status says more.
                    Ok(None) => { let _ = tokio::time::timeout(BEAT, process.ended()).await; return None }
                    Ok(Some(message)) => if let Err(why) = self.hear(message, process, life) { return Some(why) },
                    Err(error) => return Some(format!("said what makes no sense: {error}")),
                },
                Some(message) = self.inbox.recv() => match message {
                    Message::Stop { grace, done } => {
                        self.stopped = Some(done);
                        life.wanted = true;
                        process.say(ToWorker::Stop { grace_ms: u64::try_from(grace.as_millis()).unwrap_or(0) }, Vec::new());
                        until = Some(tokio::time::Instant::now() + grace + BEAT);
                        self.look("stopping", Some(process.pid()));
                    }
                    other => if let Err(why) = self.told(other, process, life) { return Some(why) },
                },
                _ = beat.tick() => if let Err(why) = self.beat(process, life) { return Some(why) },
                () = at(until) => return Some("did not stop in time".into()),
            }
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
        if life.wanted {
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
            Message::Ask { request, reply } if life.ready => {
                life.asked.retain(|_, reply| !reply.is_closed());
                life.next += 1;
                life.asked.insert(life.next, reply);
                process.say(ToWorker::Ask { id: life.next, request }, Vec::new());
            }
            Message::Reload { spec, reply } if life.ready && self.role == Role::Lb && spec != self.spec => {
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
            Message::ToWorker { incarnation, message } if incarnation == self.incarnation => {
                process.say(message, Vec::new())
            }
            Message::Drained { drain, set } => self.drained(drain, set),
            Message::PageDone => self.pages = self.pages.saturating_sub(1),
            Message::Ask { .. } | Message::ToWorker { .. } | Message::Stop { .. } => {}
        }
        Ok(())
    }

    /// What the worker says.
    fn hear(&mut self, message: FromWorker, process: &Process, life: &mut Life) -> Result<(), String> {
        match (message, self.role) {
            (FromWorker::Ready, _) if !life.ready => self.is_ready(process, life),
            (FromWorker::Pong { id }, _) if (1..=life.pings).contains(&id) => life.silent = 0,
            (FromWorker::Answer { id, answer }, Role::Lb) => {
                if let Some(reply) = life.asked.remove(&id) {
                    let _ = reply.send(*answer);
                }
            }
            (FromWorker::Reloaded { id, result }, Role::Lb) => match life.reload.take() {
                Some((asked, reload)) if asked == id => {
                    if result.is_ok() {
                        self.spec = reload.spec;
                    }
                    let _ = reload.reply.send(result);
                }
                _ => return Err("answered a configuration it was not given".into()),
            },
            (FromWorker::Commit { id, drain, set }, Role::Lb) => {
                if drain.frontend.len() > NAME || drain.backend.len() > NAME || self.links.drains.len() >= DRAINS && set
                {
                    return Err("wanted to keep what no operator could have asked for".into());
                }
                self.commit(id, drain, set);
            }
            (FromWorker::Metrics { id }, Role::Web) => self.page(id, process),
            (message, role) => {
                tracing::warn!(%role, ?message, "a worker said what is not for it to say");
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

    /// Makes a drain durable and says so.
    fn commit(&self, id: u64, drain: Drain, set: bool) {
        let (vault, outbox, incarnation) = (Arc::clone(&self.links.vault), self.outbox.clone(), self.incarnation);
        tokio::spawn(async move {
            let written = drain.clone();
            let result = vault.call(move |store| store.set_drain(&written, set)).await;
            if result.is_ok() {
                tracing::info!(frontend = drain.frontend, backend = drain.backend, set, "drain kept");
                let _ = outbox.send(Message::Drained { drain, set }).await;
            }
            let message = ToWorker::Committed { id, result };
            let _ = outbox.send(Message::ToWorker { incarnation, message }).await;
        });
    }

    fn drained(&mut self, drain: Drain, set: bool) {
        if set {
            self.links.drains.insert(drain);
        } else {
            self.links.drains.remove(&drain);
        }
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
    asked: BTreeMap<u64, oneshot::Sender<Answer>>,
    reload: Option<(u64, Reload)>,
    reload_since: Option<Instant>,
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
