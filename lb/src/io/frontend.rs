//! What the threads of a worker share about one frontend: the pool behind one lock, its journal, its counters.

use std::{
    collections::{BTreeMap, VecDeque},
    net::{IpAddr, SocketAddr},
    os::fd::RawFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::{clock, ingress, session::Phase, socket, threads::Threads};
use crate::{
    config::{self, AcceptProxy, ProxyVersion},
    limits::{Limits, Refused},
    moment::Moment,
    pool::{Action, BackendId, CheckOutcome, Failure, Pick, Pool, Settings, Snapshot},
    proxy::Reason,
    status::{BackendStatus, Event, EventKind, FrontendStatus, Refusals, State, Why},
};

/// Events kept per backend.
const JOURNAL: usize = 128;
/// Live sessions per backend whose descriptors can testify to its life.
const WITNESSES: usize = 8;

/// What a session needs to know of its frontend, replaced whole by a reload.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    pub(crate) connect_timeout: Duration,
    pub(crate) idle_timeout: Option<Duration>,
    pub(crate) half_close_timeout: Duration,
    /// Silence of a backend on a connect after which the next one is dialled as well.
    pub(crate) hedge: Option<Duration>,
    /// The header that backends get.
    pub(crate) proxy: Option<ProxyVersion>,
    /// Bytes that it takes at most.
    pub(crate) proxy_limit: usize,
    /// Who sends a header, and by when.
    accept_proxy: Option<AcceptProxy>,
    /// Sessions at the same time.
    sessions: Option<u64>,
    /// Surplus sessions move to a backend that has come back.
    shed: bool,
}

impl Rules {
    pub(crate) fn of(frontend: &config::Frontend) -> Self {
        Self {
            connect_timeout: frontend.connect_timeout(),
            idle_timeout: frontend.idle_timeout(),
            half_close_timeout: frontend.half_close_timeout(),
            hedge: frontend.hedge(),
            proxy: frontend.proxy_protocol.as_ref().map(|at| at.value),
            proxy_limit: frontend.proxy_header_limit().into(),
            accept_proxy: frontend.accept_proxy.as_ref().map(|at| at.value.clone()),
            sessions: frontend.limits.sessions.as_ref().map(|at| at.value.into()),
            shed: frontend.shed(),
        }
    }

    /// How long a PROXY header may take.
    pub(crate) fn header_timeout(&self) -> Duration {
        self.accept_proxy.as_ref().map_or(Duration::ZERO, AcceptProxy::timeout)
    }
}

/// Why a connection is closed at the door.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// A limit of the frontend or of the source.
    Limit(Refused),
    /// The peer is none of the proxies that may name clients.
    Untrusted,
    /// It ended before its PROXY header did.
    NoHeader,
    /// Its PROXY header is wrong.
    Header(Reason),
    /// Its PROXY header took too long.
    HeaderTimeout,
}

impl Refusal {
    /// As a label of a counter, and in status.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Limit(refused) => refused.name(),
            Self::Untrusted => "proxy-untrusted",
            Self::NoHeader | Self::Header(_) => "proxy-header",
            Self::HeaderTimeout => "proxy-timeout",
        }
    }
}

/// One frontend, shared by the data threads and the control task.
pub(crate) struct Frontend {
    pub(crate) name: String,
    pub(crate) rules: ArcSwap<Rules>,
    core: Mutex<Core>,
    pub(crate) accepted: AtomicU64,
    /// Sessions running now, those of removed backends included.
    pub(crate) sessions: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) retries: AtomicU64,
    pub(crate) local_errors: AtomicU64,
    /// Only asked while there is something to ask.
    limits: Mutex<Limits>,
    limited: AtomicBool,
    refused: Mutex<Turned>,
    next_id: AtomicU64,
    threads: Arc<Threads>,
    /// Rung when something worth keeping over a crash has happened.
    changed: Arc<Notify>,
}

/// Connections that were turned away.
#[derive(Default)]
struct Turned {
    counts: Refusals,
    /// When the log told last, by reason.
    told: BTreeMap<&'static str, Moment>,
}

/// Between two log lines about connections that were turned away for the same reason.
const TELL_EVERY: Duration = Duration::from_secs(10);

struct Core {
    pool: Pool,
    config: config::Frontend,
    backends: BTreeMap<BackendId, Beside>,
}

/// What stands beside a backend of the pool and is no business of the pure core.
struct Beside {
    traffic: Arc<Traffic>,
    /// Descriptors of live sessions. A session takes its own out, under this lock, before it closes it.
    witnesses: Vec<RawFd>,
    journal: VecDeque<Event>,
}

/// Live counters of one backend, written by the data threads without a lock.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) up: AtomicU64,
    pub(crate) down: AtomicU64,
    pub(crate) resets: AtomicU64,
    /// Milliseconds since boot of the last byte from the backend.
    pub(crate) last_byte: AtomicU64,
}

impl Beside {
    fn new() -> Self {
        Self {
            traffic: Arc::default(),
            witnesses: Vec::new(),
            journal: VecDeque::new(),
        }
    }

    /// Age of the freshest sign of life: a byte, or an acknowledgement of a live session.
    fn proof(&self, now: Moment, acks: bool) -> Option<Duration> {
        let last = self.traffic.last_byte.load(Relaxed);
        let byte = (last > 0).then(|| now - Moment::new(Duration::from_millis(last)));
        let ack = if acks {
            self.witnesses.iter().filter_map(|fd| socket::last_ack(*fd)).min()
        } else {
            None
        };
        byte.into_iter().chain(ack).min()
    }
}

/// What outlives the process that wrote it.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Memory {
    pool: Snapshot,
    counters: [u64; 4],
    refused: Refusals,
    backends: BTreeMap<String, BackendMemory>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct BackendMemory {
    up: u64,
    down: u64,
    resets: u64,
    journal: VecDeque<Event>,
}

impl Frontend {
    pub(crate) fn new(
        config: &config::Frontend,
        seed: u64,
        threads: Arc<Threads>,
        changed: Arc<Notify>,
        now: Moment,
    ) -> Self {
        let pool = Pool::new(Settings::of(config, seed), &plain(config), now);
        Self {
            name: config.name.value.clone(),
            rules: ArcSwap::from_pointee(Rules::of(config)),
            core: Mutex::new(Core {
                pool,
                config: config.clone(),
                backends: BTreeMap::new(),
            }),
            accepted: AtomicU64::new(0),
            sessions: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            retries: AtomicU64::new(0),
            local_errors: AtomicU64::new(0),
            limits: Mutex::new(Limits::of(&config.limits, seed)),
            limited: AtomicBool::new(config.limits.judge_clients()),
            refused: Mutex::default(),
            next_id: ingress::first_id(),
            threads,
            changed,
        }
    }

    /// How a connection from `peer` begins, or why it does not.
    pub(crate) fn door(&self, peer: SocketAddr) -> Result<Phase, Refusal> {
        let rules = self.rules.load();
        if rules.sessions.is_some_and(|most| self.sessions.load(Relaxed) >= most) {
            return Err(Refusal::Limit(Refused::Sessions));
        }
        match &rules.accept_proxy {
            Some(accept) if accept.trusts(peer.ip()) => Ok(Phase::Header),
            Some(_) => Err(Refusal::Untrusted),
            None => Ok(Phase::Dialling),
        }
    }

    /// Whether the client may go on; `true` if it is counted and has to be [`left`](Self::left) for.
    pub(crate) fn admit(&self, client: IpAddr, now: Moment) -> Result<bool, Refused> {
        if !self.limited.load(Relaxed) {
            return Ok(false);
        }
        let mut limits = lock(&self.limits);
        limits.admit(client, now)?;
        limits.admitted(client);
        Ok(true)
    }

    /// Counts a client that was admitted by a predecessor.
    pub(crate) fn readmit(&self, client: IpAddr) -> bool {
        let limited = self.limited.load(Relaxed);
        if limited {
            lock(&self.limits).admitted(client);
        }
        limited
    }

    /// A client that was counted has ended.
    pub(crate) fn left(&self, client: IpAddr) {
        lock(&self.limits).left(client);
    }

    /// A connection was turned away.
    pub(crate) fn refuse(&self, refusal: Refusal, client: SocketAddr) {
        let now = clock::now();
        let mut turned = lock(&self.refused);
        let Turned { counts, told } = &mut *turned;
        let count = match refusal {
            Refusal::Limit(Refused::Denied) => &mut counts.denied,
            Refusal::Limit(Refused::Rate) => &mut counts.rate,
            Refusal::Limit(Refused::Sessions) => &mut counts.sessions,
            Refusal::Limit(Refused::SourceSessions) => &mut counts.source_sessions,
            Refusal::Untrusted => &mut counts.proxy_untrusted,
            Refusal::NoHeader | Refusal::Header(_) => &mut counts.proxy_header,
            Refusal::HeaderTimeout => &mut counts.proxy_timeout,
        };
        *count += 1;
        let count = *count;
        if told.get(refusal.name()).is_some_and(|told| now - *told < TELL_EVERY) {
            return;
        }
        told.insert(refusal.name(), now);
        drop(turned);
        let why = match refusal {
            Refusal::Limit(Refused::Denied) => "allow and deny keep it out".into(),
            Refusal::Limit(Refused::Rate) => "its source connects more often than source_rate".into(),
            Refusal::Limit(Refused::Sessions) => "as many sessions as limits.sessions allows are running".into(),
            Refusal::Limit(Refused::SourceSessions) => {
                "its source has as many sessions as source_sessions allows".into()
            }
            Refusal::Untrusted => "accept_proxy does not list it".into(),
            Refusal::NoHeader => "it ended before its PROXY header did".into(),
            Refusal::Header(reason) => reason.to_string(),
            Refusal::HeaderTimeout => "its PROXY header did not come in time".into(),
        };
        tracing::warn!(frontend = self.name, %client, reason = refusal.name(), count, "a connection was refused: {why}");
    }

    /// Names a connection across proxies.
    pub(crate) fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Relaxed)
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        // A panic under the lock aborts the worker, so poison is never seen; if it were, the state is still the best there is.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over a changed configuration; sessions and health stay.
    pub(crate) fn reconfigure(&self, config: &config::Frontend, seed: u64, now: Moment) {
        self.rules.store(Arc::new(Rules::of(config)));
        lock(&self.limits).reconfigure(&config.limits);
        self.limited.store(config.limits.judge_clients(), Relaxed);
        let mut core = self.core();
        let actions = core.pool.reconfigure(Settings::of(config, seed), &plain(config), now);
        core.config = config.clone();
        self.act(&mut core, actions);
        core.forget();
    }

    /// Chooses a backend for a client that has already tried `tried`.
    pub(crate) fn pick(&self, client: IpAddr, tried: &[BackendId], now: Moment) -> Option<(Pick, Arc<Traffic>)> {
        let mut core = self.core();
        let (pick, actions) = core.pool.pick(client, tried, now);
        let picked = pick.map(|pick| {
            let beside = core.backends.entry(pick.id).or_insert_with(Beside::new);
            (pick, beside.traffic.clone())
        });
        self.act(&mut core, actions);
        picked
    }

    /// Chooses a second backend for a client whose first one hesitates; `tried` are all it has been sent to.
    pub(crate) fn hedge(&self, client: IpAddr, tried: &[BackendId], now: Moment) -> Option<(Pick, Arc<Traffic>)> {
        let mut core = self.core();
        let (pick, actions) = core.pool.hedge(client, tried, now);
        let picked = pick.map(|pick| {
            let beside = core.backends.entry(pick.id).or_insert_with(Beside::new);
            (pick, beside.traffic.clone())
        });
        self.act(&mut core, actions);
        picked
    }

    /// A backend accepted when another one already had.
    pub(crate) fn slow(&self, id: BackendId, took: Duration, now: Moment) {
        let mut core = self.core();
        let actions = core.pool.slow(id, Some(took), now);
        self.act(&mut core, actions);
    }

    /// What each backend has too much of now.
    pub(crate) fn surplus(&self, now: Moment) -> Vec<(BackendId, u32)> {
        if !self.rules.load().shed {
            return Vec::new();
        }
        self.core().pool.surplus(now)
    }

    /// A thread has closed `count` sessions so that they go elsewhere.
    pub(crate) fn were_shed(&self, id: BackendId, count: u32, now: Moment) {
        let mut core = self.core();
        let actions = core.pool.shed(id, count, now);
        self.act(&mut core, actions);
    }

    /// Where a backend is, for a successor.
    pub(crate) fn place_of(&self, id: BackendId) -> Option<(config::Address, SocketAddr)> {
        self.core().pool.place_of(id)
    }

    /// Counts an established session that a predecessor handed over; `fd` is its backend's socket.
    pub(crate) fn adopt(
        &self,
        backend: &config::Address,
        address: SocketAddr,
        fd: RawFd,
        now: Moment,
    ) -> (BackendId, Arc<Traffic>) {
        let mut core = self.core();
        let id = core.pool.adopt(backend, address, now);
        let beside = core.backends.entry(id).or_insert_with(Beside::new);
        if beside.witnesses.len() < WITNESSES {
            beside.witnesses.push(fd);
        }
        (id, beside.traffic.clone())
    }

    /// The backend accepted; `fd` may testify to its life from now on.
    pub(crate) fn connected(&self, id: BackendId, fd: RawFd, took: Duration, now: Moment) {
        let mut core = self.core();
        if let Some(beside) = core.backends.get_mut(&id)
            && beside.witnesses.len() < WITNESSES
        {
            beside.witnesses.push(fd);
        }
        let actions = core.pool.connected(id, took, now);
        self.act(&mut core, actions);
    }

    /// The connect failed.
    pub(crate) fn connect_failed(&self, id: BackendId, failure: Failure, now: Moment) {
        if matches!(failure, Failure::Local) {
            self.local_errors.fetch_add(1, Relaxed);
        }
        let mut core = self.core();
        let Core { pool, backends, .. } = &mut *core;
        let actions = pool.failed(
            id,
            failure,
            || backends.get(&id).and_then(|beside| beside.proof(now, true)),
            now,
        );
        self.act(&mut core, actions);
    }

    /// The client left before the backend answered.
    pub(crate) fn abandoned(&self, id: BackendId, now: Moment) {
        self.core().pool.abandoned(id, now);
    }

    /// An established session is about to close `fd`.
    pub(crate) fn closed(&self, id: BackendId, fd: RawFd, now: Moment) {
        let mut core = self.core();
        if let Some(beside) = core.backends.get_mut(&id)
            && let Some(at) = beside.witnesses.iter().position(|witness| *witness == fd)
        {
            beside.witnesses.swap_remove(at);
        }
        core.pool.closed(id, now);
    }

    /// An active check has answered. Only bytes veto a check's timeout: the kernel of a stopped server still
    /// acknowledges.
    pub(crate) fn checked(&self, id: BackendId, outcome: CheckOutcome, now: Moment) {
        let mut core = self.core();
        let Core { pool, backends, .. } = &mut *core;
        let actions = pool.checked(
            id,
            outcome,
            || backends.get(&id).and_then(|beside| beside.proof(now, false)),
            now,
        );
        self.act(&mut core, actions);
    }

    /// A name has resolved to `addresses`, or to nothing.
    pub(crate) fn resolved(&self, name: &config::Address, addresses: &[SocketAddr], now: Moment) {
        let mut core = self.core();
        let actions = core.pool.set_addresses(name, addresses, now);
        self.act(&mut core, actions);
        core.forget();
    }

    /// Sets or takes back a drain; `false` if there is no such backend.
    pub(crate) fn drain(&self, backend: &config::Address, set: bool, now: Moment) -> bool {
        let mut core = self.core();
        let Some(actions) = core.pool.drain(backend, set, now) else {
            return false;
        };
        self.act(&mut core, actions);
        true
    }

    pub(crate) fn has(&self, backend: &config::Address) -> bool {
        !self.core().pool.id_of(backend).is_empty()
    }

    /// The names to resolve.
    pub(crate) fn names(&self) -> Vec<config::Address> {
        self.core().pool.names()
    }

    /// The configured backends as written.
    pub(crate) fn backends(&self) -> Vec<String> {
        self.core()
            .config
            .backends
            .iter()
            .map(|at| at.address.to_string())
            .collect()
    }

    /// What active checks look at, with the rules for it.
    pub(crate) fn targets(&self) -> (Option<config::Active>, Vec<(BackendId, config::Address, SocketAddr)>) {
        let core = self.core();
        (
            core.config.health.active.as_ref().map(|at| at.value.clone()),
            core.pool.targets(),
        )
    }

    pub(crate) fn healthy(&self, now: Moment) -> bool {
        self.core().pool.healthy(now)
    }

    /// `backend`, one of its addresses, is healthy.
    pub(crate) fn healthy_one(&self, backend: &config::Address, now: Moment) -> bool {
        let core = self.core();
        let ids = core.pool.id_of(backend);
        core.statuses(now)
            .iter()
            .any(|(id, status)| ids.contains(id) && status.state == State::Healthy)
    }

    pub(crate) fn kind(&self) -> config::Kind {
        self.core().config.kind
    }

    fn act(&self, core: &mut Core, actions: Vec<Action>) {
        if actions.is_empty() {
            return;
        }
        for action in actions {
            match action {
                Action::Event { id, kind, reason } => self.note(core, id, kind, reason),
                Action::ResetSessions(id) => self.threads.reset_sessions(&self.name, id),
            }
        }
        self.changed.notify_one();
    }

    fn note(&self, core: &mut Core, id: BackendId, kind: EventKind, reason: String) {
        let backend = core.pool.name_of(id).unwrap_or_else(|| format!("#{}", id.0));
        match kind {
            EventKind::Ban | EventKind::Down | EventKind::FailOpen => {
                tracing::warn!(frontend = self.name, backend, event = ?kind, "{reason}");
            }
            EventKind::Failure => tracing::debug!(frontend = self.name, backend, event = ?kind, "{reason}"),
            _ => tracing::info!(frontend = self.name, backend, event = ?kind, "{reason}"),
        }
        let journal = &mut core.backends.entry(id).or_insert_with(Beside::new).journal;
        if journal.len() == JOURNAL {
            journal.pop_front();
        }
        journal.push_back(Event {
            at: clock::wall(),
            kind,
            reason,
        });
    }

    /// A thread has reset `count` sessions of a backend that went down.
    pub(crate) fn were_reset(&self, id: BackendId, count: u64) {
        let mut core = self.core();
        if let Some(beside) = core.backends.get(&id) {
            beside.traffic.resets.fetch_add(count, Relaxed);
            let reason = format!(
                "{count} session{} reset because it went down",
                if count == 1 { "" } else { "s" }
            );
            self.note(&mut core, id, EventKind::Reset, reason);
        }
    }

    pub(crate) fn status(&self, now: Moment) -> FrontendStatus {
        let core = self.core();
        let backends = core
            .statuses(now)
            .into_iter()
            .map(|(_, status)| status)
            .collect::<Vec<_>>();
        FrontendStatus {
            name: self.name.clone(),
            kind: core.config.kind,
            balance: core.config.balance,
            listen: core.config.listen.iter().map(|at| at.value).collect(),
            sessions: self.sessions.load(Relaxed),
            connections_total: self.accepted.load(Relaxed),
            failed_total: self.failed.load(Relaxed),
            retries_total: self.retries.load(Relaxed),
            local_errors_total: self.local_errors.load(Relaxed),
            refused: lock(&self.refused).counts,
            backends,
        }
    }

    /// What happened to `backend`; one entry per address of a name.
    pub(crate) fn why(&self, backend: &config::Address, now: Moment) -> Vec<Why> {
        let core = self.core();
        let ids = core.pool.id_of(backend);
        core.statuses(now)
            .into_iter()
            .filter(|(id, _)| ids.contains(id))
            .map(|(id, status)| Why {
                frontend: self.name.clone(),
                now: status,
                events: core
                    .backends
                    .get(&id)
                    .map(|beside| beside.journal.iter().cloned().collect())
                    .unwrap_or_default(),
            })
            .collect()
    }

    pub(crate) fn memory(&self, now: Moment) -> Memory {
        let core = self.core();
        let backends = core
            .backends
            .iter()
            .filter_map(|(id, beside)| {
                let memory = BackendMemory {
                    up: beside.traffic.up.load(Relaxed),
                    down: beside.traffic.down.load(Relaxed),
                    resets: beside.traffic.resets.load(Relaxed),
                    journal: beside
                        .journal
                        .iter()
                        .filter(|event| event.kind.is_known_to_all())
                        .cloned()
                        .collect(),
                };
                Some((core.pool.name_of(*id)?, memory))
            })
            .collect();
        let counters =
            [&self.accepted, &self.failed, &self.retries, &self.local_errors].map(|counter| counter.load(Relaxed));
        Memory {
            pool: core.pool.snapshot(now),
            counters,
            refused: lock(&self.refused).counts,
            backends,
        }
    }

    /// Takes over what an earlier process of this boot left behind.
    pub(crate) fn remember(&self, memory: Memory, now: Moment) {
        let mut core = self.core();
        core.pool.restore(&memory.pool, now);
        let counters = [&self.accepted, &self.failed, &self.retries, &self.local_errors];
        for (counter, value) in counters.into_iter().zip(memory.counters) {
            counter.store(value, Relaxed);
        }
        lock(&self.refused).counts = memory.refused;
        for (id, status) in core.statuses(now) {
            let name = core.pool.name_of(id).unwrap_or(status.backend);
            if let Some(memory) = memory.backends.get(&name) {
                let beside = core.backends.entry(id).or_insert_with(Beside::new);
                beside.traffic.up.store(memory.up, Relaxed);
                beside.traffic.down.store(memory.down, Relaxed);
                beside.traffic.resets.store(memory.resets, Relaxed);
                beside.journal = memory.journal.clone();
            }
        }
    }
}

impl Core {
    /// Drops what stands beside backends that the pool has forgotten.
    fn forget(&mut self) {
        let Self { pool, backends, .. } = self;
        backends.retain(|id, _| pool.name_of(*id).is_some());
    }

    /// Status of each backend in the order of the configuration, traffic included.
    fn statuses(&self, now: Moment) -> Vec<(BackendId, BackendStatus)> {
        let ids = self.config.backends.iter().flat_map(|at| self.pool.id_of(&at.address));
        ids.zip(self.pool.status(now))
            .map(|(id, mut status)| {
                if let Some(beside) = self.backends.get(&id) {
                    status.bytes_up_total = beside.traffic.up.load(Relaxed);
                    status.bytes_down_total = beside.traffic.down.load(Relaxed);
                    status.sessions_reset_total = beside.traffic.resets.load(Relaxed);
                }
                (id, status)
            })
            .collect()
    }
}

fn plain(config: &config::Frontend) -> Vec<config::Backend> {
    config.backends.iter().map(|at| at.value.clone()).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // As for the core: what was written stands.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
