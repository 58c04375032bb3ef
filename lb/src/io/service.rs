//! The running service: data threads, and one task that reloads, answers, checks, resolves and remembers.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::{
    Command, Commit, Drain, Inheritance, Links, Opened, Part, check, clock,
    frontend::{Frontend, Memory},
    handover::{self, Freeze, FromThread, Said, Word},
    healthz,
    memory::MemoryFile,
    names, socket,
    threads::{self, Order, Threads},
};
use crate::{
    Config,
    config::{Address, At, CheckKind},
    moment::Moment,
    status::{Answer, Request, Status, Why},
};

/// Health and counters are written down at least this often, and at once when a backend's state changes.
const REMEMBER: Duration = Duration::from_secs(1);
/// ... but not more often than this.
const REMEMBER_LEAST: Duration = Duration::from_millis(20);
/// Between two looks at whether backends have more than their share.
const SHED: Duration = Duration::from_secs(6);
/// Descriptors that a successor expects; more cost it a moment each time their number doubles.
const INHERITED: u32 = 16_384;
/// Copies of descriptors on their way to a successor, and what a process has beside its sessions.
const COPIES: u32 = 6_000;

/// What ends the service; a restart may cure it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A data thread could not be set up.
    #[error("the data threads cannot be started")]
    Threads(#[source] std::io::Error),
    /// The first configuration could not be put into effect.
    #[error("the configuration cannot be put into effect: {0}")]
    Config(String),
    /// The predecessor did not hand over, or nobody committed; it goes on.
    #[error("nothing was taken over: {0}")]
    HandOver(String),
}

/// Whether `content` can serve as the file that `config` names at `path`; the supervisor asks before it passes it on.
///
/// # Errors
///
/// What is wrong with it, to be read behind the file's name: `holds no certificate`.
pub fn check_file(content: &[u8]) -> Result<(), String> {
    check::roots(content).map(drop)
}

/// Serves on what was opened until it is told to stop.
///
/// `drains` are those of the store, `state` a memfd that outlives this process, `threads` the number of data threads
/// (the `copies` of each listener). Runs on a current-thread runtime; the data threads are its own.
///
/// # Errors
///
/// [`Error`] if it cannot begin. Once it has begun it rides out what passes.
pub async fn run(
    config: Config,
    opened: Opened,
    drains: Vec<Drain>,
    state: Option<OwnedFd>,
    threads: u16,
    links: Links,
    inheritance: Option<Inheritance>,
) -> Result<(), Error> {
    let threads = Threads::new(threads.max(1)).map_err(Error::Threads)?;
    let mut service = Service::new(threads.clone(), links.commits, drains);
    let remember = || {
        state.and_then(|fd| {
            MemoryFile::new(fd)
                .inspect_err(|error| tracing::warn!(%error, "health is not remembered over a crash"))
                .ok()
        })
    };
    if let Some(inheritance) = inheritance {
        // What takes time comes first: from the first part on the predecessor stands still.
        service.apply(&config, opened).map_err(Error::Config)?;
        // Before there are threads it costs nothing.
        socket::make_room(INHERITED);
        threads.hold();
        threads::start(&threads).map_err(Error::Threads)?;
        if let Err(error) = service.inherit(inheritance).await {
            threads.tell_all(|| Order::Stop(clock::now()));
            return Err(error);
        }
        threads.release();
        // Only now: until the word came, the predecessor wrote there.
        service.memory = remember();
    } else {
        let mut memory = remember();
        service.remembered = memory.as_mut().map(remembered).unwrap_or_default();
        service.apply(&config, opened).map_err(Error::Config)?;
        service.memory = memory;
        // The threads start once their listeners are ordered, so that health is remembered before the first client is served.
        threads::start(&threads).map_err(Error::Threads)?;
    }
    service.serve(links.commands).await;
    Ok(())
}

struct Service {
    threads: Arc<Threads>,
    changed: Arc<Notify>,
    frontends: BTreeMap<String, Arc<Frontend>>,
    /// Names in the order of the configuration.
    order: Vec<String>,
    listeners: BTreeSet<SocketAddr>,
    health: BTreeMap<SocketAddr, CancellationToken>,
    view: Arc<ArcSwap<healthz::View>>,
    /// Ends the checks and look-ups of the configuration in effect.
    tasks: CancellationToken,
    drains: Arc<std::sync::Mutex<BTreeSet<Drain>>>,
    commits: mpsc::Sender<Commit>,
    memory: Option<MemoryFile>,
    remembered: BTreeMap<String, Memory>,
    seed: u64,
}

#[derive(Serialize, Deserialize)]
struct Snapshot {
    version: u32,
    #[serde(default)]
    frontends: BTreeMap<String, Memory>,
}

const SNAPSHOT_VERSION: u32 = 1;

/// What an earlier process of this boot has written down.
fn remembered(memory: &mut MemoryFile) -> BTreeMap<String, Memory> {
    match memory.read().map(|bytes| serde_json::from_slice::<Snapshot>(&bytes)) {
        Some(Ok(snapshot)) if snapshot.version == SNAPSHOT_VERSION => snapshot.frontends,
        Some(Ok(_) | Err(_)) => {
            tracing::info!("health written down by another version is not understood; every backend starts healthy");
            BTreeMap::new()
        }
        None => BTreeMap::new(),
    }
}

impl Service {
    fn new(threads: Arc<Threads>, commits: mpsc::Sender<Commit>, drains: Vec<Drain>) -> Self {
        let mut seed = [0u8; 8];
        let _ = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty());
        Self {
            threads,
            changed: Arc::default(),
            frontends: BTreeMap::new(),
            order: Vec::new(),
            listeners: BTreeSet::new(),
            health: BTreeMap::new(),
            view: Arc::default(),
            tasks: CancellationToken::new(),
            drains: Arc::new(std::sync::Mutex::new(drains.into_iter().collect())),
            commits,
            memory: None,
            remembered: BTreeMap::new(),
            seed: u64::from_ne_bytes(seed),
        }
    }

    async fn serve(&mut self, mut commands: mpsc::Receiver<Command>) {
        let mut remember = tokio::time::interval(REMEMBER);
        remember.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut shed = tokio::time::interval(SHED);
        shed.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let changed = self.changed.clone();
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Stop { grace }) => return self.stop(grace).await,
                    // The supervisor is gone, and with it whoever could start a successor: end as it would want.
                    None => return self.stop(Duration::ZERO).await,
                    Some(Command::HandOver { parts, commit }) => match self.hand_over(parts, commit).await {
                        Ok(()) => return,
                        Err(error) => tracing::warn!("the sessions stay with this process: {error}"),
                    },
                    Some(command) => self.command(command),
                },
                _ = remember.tick() => self.remember(),
                _ = shed.tick() => self.shed(),
                () = changed.notified() => {
                    self.remember();
                    tokio::time::sleep(REMEMBER_LEAST).await;
                }
            }
        }
    }

    /// Has surplus sessions of backends move to those with fewer.
    fn shed(&self) {
        let now = clock::now();
        for frontend in self.frontends.values() {
            for (id, count) in frontend.surplus(now) {
                let left = Arc::new(AtomicU32::new(count));
                self.threads
                    .tell_all(|| Order::Shed(frontend.clone(), id, left.clone()));
            }
        }
    }

    /// Hands everything to a successor. `Ok`: it has it all, and nothing here may be touched any more. On an error
    /// everything goes on here, a few milliseconds later.
    async fn hand_over(&self, parts: mpsc::Sender<Part>, commit: oneshot::Receiver<()>) -> Result<(), String> {
        let cut = || "the successor does not take the sessions".to_owned();
        let sessions: u64 = self
            .frontends
            .values()
            .map(|frontend| frontend.sessions.load(Relaxed))
            .sum();
        socket::make_room(u32::try_from(2 * sessions).unwrap_or(u32::MAX).saturating_add(COPIES));
        let (to, mut from) = mpsc::channel(1);
        let mut words = Vec::new();
        for thread in 0..usize::from(self.threads.count()) {
            let (say, hears) = std::sync::mpsc::channel();
            words.push(say);
            self.threads.tell(
                thread,
                Order::Freeze(Freeze {
                    to: to.clone(),
                    words: hears,
                }),
            );
        }
        drop(to);
        // From here on an error drops `words`, and with them everything thaws.
        for _ in &words {
            match from.recv().await {
                Some(FromThread::Frozen) => {}
                _ => return Err("a data thread does not stand still".into()),
            }
        }
        let first = handover::first(self.memories(clock::now()))?;
        parts.send(first).await.map_err(|_| cut())?;
        for word in &words {
            let _ = word.send(Word::Send);
        }
        let mut running = words.len();
        while running > 0 {
            match from.recv().await {
                Some(FromThread::Part(part)) => parts.send(part).await.map_err(|_| cut())?,
                Some(FromThread::Finished) => running -= 1,
                _ => return Err("a data thread could not hand its sessions over".into()),
            }
        }
        parts.send(handover::last()?).await.map_err(|_| cut())?;
        drop(parts);
        commit.await.map_err(|_| "nobody has committed".to_owned())?;
        for word in &words {
            let _ = word.send(Word::Gone);
        }
        while self.threads.alive() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// Takes everything over from a predecessor, and waits for the word.
    async fn inherit(&mut self, inheritance: Inheritance) -> Result<(), Error> {
        let Inheritance {
            mut parts,
            ready,
            committed,
        } = inheritance;
        let mut begun = false;
        let mut thread = 0;
        let (adopted, mut adoptions) = mpsc::unbounded_channel();
        let mut orphans: BTreeMap<String, Arc<Frontend>> = BTreeMap::new();
        loop {
            let part = parts
                .recv()
                .await
                .ok_or_else(|| Error::HandOver("the predecessor stopped half way".into()))?;
            match (handover::read(part).map_err(Error::HandOver)?, begun) {
                (Said::Frontends(frontends), false) => {
                    begun = true;
                    self.take_over(frontends);
                }
                (Said::Sessions(sessions), true) => {
                    let mut moved: Vec<Vec<_>> = (0..self.threads.count()).map(|_| Vec::new()).collect();
                    let count = moved.len();
                    for session in sessions {
                        let frontend = self.frontends.get(session.frontend()).cloned().unwrap_or_else(|| {
                            orphans
                                .entry(session.frontend().to_owned())
                                .or_insert_with(|| self.orphan(session.frontend()))
                                .clone()
                        });
                        if let Some(dealt) = moved.get_mut(thread % count) {
                            dealt.push(session.of(frontend));
                        }
                        thread += 1;
                    }
                    for (thread, sessions) in moved.into_iter().enumerate().filter(|(_, some)| !some.is_empty()) {
                        self.threads.tell(thread, Order::Adopt(sessions, adopted.clone()));
                    }
                }
                (Said::End, true) => break,
                _ => return Err(Error::HandOver("the predecessor's parts are out of order".into())),
            }
        }
        drop(adopted);
        while let Some(whole) = adoptions.recv().await {
            if !whole {
                return Err(Error::HandOver("not every session could be taken in".into()));
            }
        }
        tracing::info!(sessions = thread, "taken over");
        let _ = ready.send(());
        committed
            .await
            .map_err(|_| Error::HandOver("the predecessor did not commit".into()))
    }

    /// Health and counters, as the predecessor left them.
    fn take_over(&mut self, frontends: BTreeMap<String, Memory>) {
        let now = clock::now();
        for (name, memory) in frontends {
            match self.frontends.get(&name) {
                Some(frontend) => frontend.remember(memory, now),
                None => drop(self.remembered.insert(name, memory)),
            }
        }
        self.drain_as_stored(now);
    }

    /// A frontend that is not configured any more and whose sessions go on.
    fn orphan(&self, name: &str) -> Arc<Frontend> {
        let config = crate::config::Frontend::bare(name);
        Arc::new(Frontend::new(
            &config,
            self.seed,
            self.threads.clone(),
            self.changed.clone(),
            clock::now(),
        ))
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Reload { config, opened, done } => {
                // An asker that is gone has no use for the answer.
                let _ = done.send(self.apply(&config, opened));
            }
            Command::Ask { request, reply } => self.ask(request, reply),
            Command::Ping(reply) => {
                if self.threads.healthy(clock::now()) && self.threads.alive() == usize::from(self.threads.count()) {
                    let _ = reply.send(());
                }
            }
            Command::HandOver { .. } | Command::Stop { .. } => {}
        }
    }

    /// Puts `config` into effect, or changes nothing and says why.
    fn apply(&mut self, config: &Config, opened: Opened) -> Result<(), String> {
        self.refuse(config, &opened)?;
        let now = clock::now();

        let mut frontends = BTreeMap::new();
        for frontend in &config.frontend {
            let name = frontend.name.value.clone();
            let kept = self.frontends.get(&name).cloned();
            let shared = if let Some(shared) = kept {
                shared.reconfigure(frontend, self.seed, now);
                shared
            } else {
                let shared = Arc::new(Frontend::new(
                    frontend,
                    self.seed,
                    self.threads.clone(),
                    self.changed.clone(),
                    now,
                ));
                if let Some(memory) = self.remembered.remove(&name) {
                    shared.remember(memory, now);
                }
                shared
            };
            frontends.insert(name, shared);
        }
        self.order = config
            .frontend
            .iter()
            .map(|frontend| frontend.name.value.clone())
            .collect();
        self.frontends = frontends;
        self.drain_as_stored(now);
        let mut sockets: BTreeMap<SocketAddr, Vec<OwnedFd>> = opened.listeners.into_iter().collect();
        self.listen(config, &mut sockets);
        self.healthz(config, &mut sockets);
        self.watch(opened.files, &opened.resolv_conf, &opened.hosts);
        Ok(())
    }

    fn drain_as_stored(&self, now: Moment) {
        let drains = self.drains.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for drain in drains.iter() {
            if let (Some(frontend), Ok(backend)) = (self.frontends.get(&drain.frontend), drain.backend.parse()) {
                frontend.drain(&backend, true, now);
            }
        }
    }

    /// Everything that could go wrong, before anything is changed.
    fn refuse(&self, config: &Config, opened: &Opened) -> Result<(), String> {
        // Threads stay as they are until the next start, whatever the key says by then.
        let threads = self.threads.count();
        let passed = |address: &SocketAddr, copies: u16| {
            opened
                .listeners
                .iter()
                .any(|(at, sockets)| at == address && sockets.len() >= usize::from(copies))
        };
        for (at, copies) in config.health.iter().map(|at| (at, 1)).chain(
            config
                .frontend
                .iter()
                .flat_map(|f| f.listen.iter().map(|at| (at, threads))),
        ) {
            let held = self.listeners.contains(&at.value) || self.health.contains_key(&at.value);
            if !held && !passed(&at.value, copies) {
                return Err(format!("the listener {} was not passed", at.value));
            }
        }
        for frontend in &config.frontend {
            if let Some(active) = &frontend.health.active
                && active.kind == CheckKind::Https
                && let Some(file) = &active.ca_file
            {
                let content = opened
                    .files
                    .get(&file.value)
                    .ok_or_else(|| format!("{} was not passed", file.value.display()))?;
                check_file(content).map_err(|error| format!("{} {error}", file.value.display()))?;
            }
        }
        Ok(())
    }

    /// Listeners of frontends: those that stay are told whom they serve now, the rest come or go.
    fn listen(&mut self, config: &Config, sockets: &mut BTreeMap<SocketAddr, Vec<OwnedFd>>) {
        let mut wanted = BTreeSet::new();
        for frontend in &config.frontend {
            let Some(shared) = self.frontends.get(&frontend.name.value) else {
                continue;
            };
            for at in &frontend.listen {
                wanted.insert(at.value);
                if self.listeners.contains(&at.value) {
                    self.threads.tell_all(|| Order::Assign(at.value, shared.clone()));
                } else {
                    for (thread, socket) in sockets.remove(&at.value).unwrap_or_default().into_iter().enumerate() {
                        self.threads.tell(thread, Order::Listen(shared.clone(), socket));
                    }
                }
            }
        }
        for gone in self.listeners.difference(&wanted) {
            self.threads.tell_all(|| Order::Unlisten(*gone));
        }
        self.listeners = wanted;
    }

    fn healthz(&mut self, config: &Config, sockets: &mut BTreeMap<SocketAddr, Vec<OwnedFd>>) {
        let frontends = self
            .order
            .iter()
            .filter_map(|name| self.frontends.get(name).cloned())
            .collect();
        let allow = config.health_allow.iter().map(|at| at.value).collect();
        let backend = config.health_backend.as_ref().map(|at| at.value.clone());
        self.view.store(Arc::new(healthz::View {
            frontends,
            allow,
            backend,
        }));
        self.health.retain(|address, token| {
            let wanted = config.health.iter().any(|at| at.value == *address);
            if !wanted {
                token.cancel();
            }
            wanted
        });
        for At { value: address, .. } in &config.health {
            let Some(socket) = sockets.remove(address).and_then(|mut sockets| sockets.pop()) else {
                continue;
            };
            let token = CancellationToken::new();
            match tokio::net::TcpListener::from_std(std::net::TcpListener::from(socket)) {
                Ok(listener) => {
                    tokio::spawn(healthz::run(listener, self.view.clone(), token.clone()));
                    self.health.insert(*address, token);
                }
                Err(error) => tracing::error!(%address, %error, "the health endpoint cannot be served"),
            }
        }
    }

    /// Starts checks and look-ups anew; verdicts and addresses live in the pools and stay.
    fn watch(&mut self, files: BTreeMap<PathBuf, Vec<u8>>, resolv_conf: &[u8], hosts: &[u8]) {
        self.tasks.cancel();
        self.tasks = CancellationToken::new();
        let files = Arc::new(files);
        let mut resolver = None;
        for frontend in self.frontends.values() {
            tokio::spawn(check::run(frontend.clone(), files.clone(), self.tasks.clone()));
            for name in frontend.names() {
                if resolver.is_none() {
                    resolver = match names::resolver(resolv_conf, hosts) {
                        Ok(resolver) => Some(Arc::new(resolver)),
                        Err(error) => {
                            tracing::error!("backends by name stay down: {error}");
                            break;
                        }
                    };
                }
                if let Some(resolver) = &resolver {
                    tokio::spawn(names::run(frontend.clone(), name, resolver.clone(), self.tasks.clone()));
                }
            }
        }
    }

    fn ask(&self, request: Request, reply: oneshot::Sender<Answer>) {
        match request {
            Request::Status => {
                let now = clock::now();
                let frontends = self.in_order().map(|frontend| frontend.status(now)).collect();
                let status = Status {
                    frontends,
                    healthz_ok: self.view.load().healthy(),
                    threads: self.threads.count(),
                };
                let _ = reply.send(Answer::Status(status));
            }
            Request::Why { backend } => {
                let now = clock::now();
                let _ = reply.send(match self.find(&backend) {
                    Ok((address, found)) => {
                        let backends: Vec<Why> =
                            found.iter().flat_map(|frontend| frontend.why(&address, now)).collect();
                        Answer::Why { backends }
                    }
                    Err(message) => Answer::Refused { message },
                });
            }
            Request::Drain { backend } => self.drain(&backend, true, reply),
            Request::Undrain { backend } => self.drain(&backend, false, reply),
        }
    }

    /// Durable first, then in effect, then answered.
    fn drain(&self, backend: &str, set: bool, reply: oneshot::Sender<Answer>) {
        let (address, found) = match self.find(backend) {
            Ok(found) => found,
            Err(message) => {
                let _ = reply.send(Answer::Refused { message });
                return;
            }
        };
        let (commits, drains) = (self.commits.clone(), self.drains.clone());
        tokio::spawn(async move {
            let mut changed = Vec::new();
            for frontend in found {
                let drain = Drain {
                    frontend: frontend.name.clone(),
                    backend: address.to_string(),
                };
                if let Err(error) = commit(&commits, &drain, set).await {
                    let message = format!("{}/{} stays as it is: {error}", drain.frontend, drain.backend);
                    let _ = reply.send(Answer::Refused { message });
                    return;
                }
                frontend.drain(&address, set, clock::now());
                changed.push(format!("{}/{}", drain.frontend, drain.backend));
                let mut drains = drains.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                if set {
                    drains.insert(drain);
                } else {
                    drains.remove(&drain);
                }
            }
            let _ = reply.send(Answer::Done { changed });
        });
    }

    /// The frontends that have the backend `HOST:PORT` or `FRONTEND/HOST:PORT`.
    fn find(&self, backend: &str) -> Result<(Address, Vec<Arc<Frontend>>), String> {
        let (only, address) = backend
            .split_once('/')
            .map_or((None, backend), |(frontend, rest)| (Some(frontend), rest));
        let parsed: Result<Address, String> = address.parse();
        let found: Vec<_> = match &parsed {
            Ok(parsed) => self
                .in_order()
                .filter(|frontend| only.is_none_or(|only| only == frontend.name) && frontend.has(parsed))
                .cloned()
                .collect(),
            Err(_) => Vec::new(),
        };
        match parsed {
            Ok(parsed) if !found.is_empty() => Ok((parsed, found)),
            _ => {
                let known: Vec<String> = self
                    .in_order()
                    .flat_map(|frontend| {
                        frontend
                            .backends()
                            .into_iter()
                            .map(|backend| format!("{}/{backend}", frontend.name))
                    })
                    .collect();
                let known = if known.is_empty() {
                    "there are no backends".into()
                } else {
                    format!("there are {}", known.join(", "))
                };
                Err(format!("no backend is named \"{}\"; {known}", backend.escape_debug()))
            }
        }
    }

    fn in_order(&self) -> impl Iterator<Item = &Arc<Frontend>> {
        self.order.iter().filter_map(|name| self.frontends.get(name))
    }

    fn memories(&self, now: Moment) -> BTreeMap<String, Memory> {
        self.frontends
            .iter()
            .map(|(name, frontend)| (name.clone(), frontend.memory(now)))
            .collect()
    }

    fn remember(&mut self) {
        let frontends = self.memories(clock::now());
        let Some(file) = &mut self.memory else { return };
        match serde_json::to_vec(&Snapshot {
            version: SNAPSHOT_VERSION,
            frontends,
        }) {
            Ok(bytes) => file.write(&bytes),
            Err(error) => tracing::error!(%error, "health cannot be written down"),
        }
    }

    async fn stop(&mut self, grace: Duration) {
        let until = clock::now() + grace;
        self.threads.tell_all(|| Order::Stop(until));
        self.tasks.cancel();
        for token in self.health.values() {
            token.cancel();
        }
        while self.threads.alive() > 0 && clock::now() < until + Duration::from_secs(1) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.remember();
    }
}

async fn commit(commits: &mpsc::Sender<Commit>, drain: &Drain, set: bool) -> Result<(), String> {
    let (done, acknowledged) = oneshot::channel();
    let gone = || "the supervisor does not answer".to_owned();
    commits
        .send(Commit {
            drain: drain.clone(),
            set,
            done,
        })
        .await
        .map_err(|_| gone())?;
    acknowledged.await.map_err(|_| gone())?
}
