//! The backends of one frontend: who is in, who is out and why, and which one the next connection goes to.
//!
//! Everything that a frontend's threads share is in [`Pool`]; `io` keeps one behind a lock per frontend. It reads no
//! clock and opens no socket: outcomes come in with `now`, and what has to be done comes back as [`Action`]s.
//!
//! ```text
//! pick -> connected -> closed      an attempt that succeeds
//!      -> failed                   one that does not; then pick again, with it among the tried
//!      -> abandoned                the client left first
//! pick -> hedge                    no answer yet: a second attempt beside the first; both end as above, but
//!      -> slow                     the one that is overtaken
//! ```
//! Every pick and every hedge ends in exactly one of `connected`, `failed`, `abandoned` and `slow`, every `connected` in
//! one `closed`. Ids come from sessions on other threads: one that means nothing (any more) is ignored.
//!
//! A backend that comes back starts slowly: its weight grows from a tenth to all of it. Sessions that run do not move by
//! themselves: [`Pool::surplus`] says how many may be closed where, so that their clients go to a backend with fewer.
//!
//! A configured backend is an *entry*; each address it stands for is an *endpoint* with an id, a state and counters of
//! its own. An address has one endpoint; a name has one per address it resolves to, or a placeholder in
//! [`State::Unresolved`].

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use serde::{Deserialize, Serialize};

pub use crate::health::{CheckOutcome, Failure, Rounds};
use crate::{
    balance::{self, FULL, Random, Share},
    config::{self, Address, Balance, OnDown, Passive},
    health::{self, Checks, PROOF, Record, SavedRecord, Standing, Terms, Turn, Verdict},
    moment::Moment,
    status::{BackendStatus, Ejections, EventKind, Histogram, State},
};

/// Between two [`EventKind::FailOpen`] events of one backend.
const FAIL_OPEN_EVERY: Duration = Duration::from_secs(10);

/// Between two events of one backend about failures that nothing follows from (it is out already, it is the only one,
/// a veto): there may be thousands of them in a second.
const REPEAT_EVERY: Duration = Duration::from_secs(1);

/// The time in which at most [`SHED`] of the surplus is shed, and between two [`EventKind::Shed`] of one backend.
const MINUTE: Duration = Duration::from_secs(60);

/// The part of the surplus that is shed in a [`MINUTE`]; at least one session.
const SHED: f64 = 0.1;

/// Sessions are shed while a backend has fewer than its share divided by this.
const EVEN: f64 = 1.25;

/// With fewer sessions per backend than this nothing is shed.
const TRIVIAL: u64 = 2;

/// One endpoint. Stable for the life of the process, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendId(pub u32);

/// The rules of one pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How a backend is chosen.
    pub balance: Balance,
    /// When failed connects ban.
    pub passive: Passive,
    /// Time one connect may take; bounds how long a probe stays unanswered.
    pub connect_timeout: Duration,
    /// Whether a backend that goes down takes its sessions with it.
    pub on_down: OnDown,
    /// Streaks of the active check; `None` if there is no active check.
    pub rounds: Option<Rounds>,
    /// How long a backend that comes back takes to get its full share; `None` = no time.
    pub slow_start: Option<Duration>,
    /// Seed of [`Balance::RandomTwo`]'s draws.
    pub seed: u64,
}

/// The backend of one connection attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pick {
    /// To be named when the attempt ends.
    pub id: BackendId,
    /// Where to connect to.
    pub address: SocketAddr,
    /// This attempt finds out whether a banned backend is back.
    pub probe: bool,
    /// The backend counts as out, but nothing better is left.
    pub fail_open: bool,
}

/// What the caller does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Record that this happened.
    Event {
        /// To whom; [`Pool::name_of`] knows it at least until the next reconfiguration or resolution.
        id: BackendId,
        /// What.
        kind: EventKind,
        /// The fact it rests on, for people.
        reason: String,
    },
    /// Reset the established sessions of this backend.
    ResetSessions(BackendId),
}

/// The backends of one frontend.
#[derive(Debug)]
pub struct Pool {
    settings: Settings,
    /// In the order of the configuration.
    entries: Vec<Entry>,
    /// What connections may go to: in the order of the entries, never none for an entry.
    live: Vec<Endpoint>,
    /// No longer configured or no longer resolved to, with sessions that go on.
    retired: Vec<Endpoint>,
    next_id: u32,
    random: Random,
    /// When [`Pool::surplus`] was asked last.
    surplus_at: Option<Moment>,
    /// Sessions that may be shed; fractions add up.
    credit: f64,
}

/// One configured backend.
#[derive(Clone, Debug)]
struct Entry {
    backend: config::Backend,
    drained: bool,
}

/// One address of one entry.
#[derive(Debug)]
struct Endpoint {
    id: BackendId,
    /// The address of its entry.
    entry: Address,
    /// `None` only for the placeholder of a name.
    address: Option<SocketAddr>,
    weight: u16,
    backup: bool,
    drained: bool,
    /// Holds the number of sessions; connects in flight are `connecting` of them.
    share: Share,
    connecting: u64,
    class: Class,
    record: Record,
    checks: Checks,
    /// As of the last change.
    state: State,
    since: Moment,
    connected_at: Option<Moment>,
    repeated_at: Option<Moment>,
    vetoed_at: Option<Moment>,
    failed_open_at: Option<Moment>,
    slow_at: Option<Moment>,
    shed_at: Option<Moment>,
    /// Sessions shed since `shed_at`.
    shed_since: u64,
    /// It was banned, down or drained and has not been healthy since.
    away: bool,
    /// When it came back, until its slow start is over.
    returned: Option<Moment>,
    counters: Counters,
}

/// What an endpoint is to one pick, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// Healthy, or to be probed.
    Usable,
    /// Alive, but asks for no new sessions.
    NotReady,
    /// Banned, being probed, or down.
    Out,
    /// Tried, drained or unresolved.
    Shut,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Counters {
    connections: u64,
    connect_failures: u64,
    ejections: Ejections,
    vetoes: u64,
    hedges: u64,
    slow: u64,
    shed: u64,
    latency: Histogram,
}

impl Settings {
    /// The rules that `frontend` asks for.
    pub fn of(frontend: &config::Frontend, seed: u64) -> Self {
        Self {
            balance: frontend.balance,
            passive: frontend.health.passive(),
            connect_timeout: frontend.connect_timeout(),
            on_down: frontend.on_down(),
            rounds: frontend.health.active.as_ref().map(|active| Rounds {
                rise: active.rise(),
                fall: active.fall(),
            }),
            slow_start: frontend.health.slow_start(),
            seed,
        }
    }

    const fn terms(&self) -> Terms {
        Terms {
            rules: self.passive,
            connect_timeout: self.connect_timeout,
        }
    }
}

impl Pool {
    /// A pool in which every backend is presumed healthy; names wait for [`Pool::set_addresses`]. Of two backends with
    /// the same address the first counts.
    pub fn new(settings: Settings, backends: &[config::Backend], now: Moment) -> Self {
        let random = Random::new(settings.seed);
        let mut pool = Self {
            settings,
            entries: Vec::new(),
            live: Vec::new(),
            retired: Vec::new(),
            next_id: 0,
            random,
            surplus_at: None,
            credit: 0.0,
        };
        pool.arrange(backends, now);
        pool
    }

    /// Takes over another configuration.
    ///
    /// A backend is the same if its [`Address`] is the same: it keeps id, bans, windows, check verdicts, counters,
    /// drain and sessions. One that is gone gets no new sessions and lives on until its last session is closed; if it
    /// is configured again before, it is the same one again. Without active checks their verdicts are forgotten,
    /// without passive health its bans.
    pub fn reconfigure(&mut self, settings: Settings, backends: &[config::Backend], now: Moment) -> Vec<Action> {
        if settings.seed != self.settings.seed {
            self.random = Random::new(settings.seed);
        }
        self.settings = settings;
        self.arrange(backends, now);
        let Self {
            settings,
            live,
            retired,
            ..
        } = self;
        let mut actions = Vec::new();
        for endpoint in live.iter_mut() {
            let why = endpoint.fit(settings, now);
            actions.extend(why.map(|why| endpoint.event(EventKind::Up, why)));
        }
        for endpoint in retired {
            endpoint.fit(settings, now);
        }
        self.pardon_the_only_one(now, &mut actions);
        actions
    }

    /// What a name resolves to now; nothing = it does not.
    ///
    /// `name` is one of [`Pool::names`]. There is one endpoint for each different address; those that stay keep id and
    /// state, lost ones retire as in [`Pool::reconfigure`]. The order of `addresses` means nothing. Events tell of
    /// changes only; they are the endpoint's that came, or, for a lost address, that endpoint's.
    pub fn set_addresses(&mut self, name: &Address, addresses: &[SocketAddr], now: Moment) -> Vec<Action> {
        let is_name = matches!(name, Address::Name { .. });
        let Some(entry) = self
            .entries
            .iter()
            .find(|entry| is_name && entry.backend.address == *name)
            .cloned()
        else {
            return Vec::new();
        };
        let wanted: BTreeSet<SocketAddr> = addresses.iter().copied().collect();
        let has: BTreeSet<SocketAddr> = self.of(name).filter_map(|endpoint| endpoint.address).collect();
        if wanted == has {
            return Vec::new();
        }
        self.purge();
        let mut actions = Vec::new();
        let mut live = Vec::with_capacity(self.live.len() + wanted.len());
        for endpoint in std::mem::take(&mut self.live) {
            if endpoint.entry != *name || endpoint.address.is_some_and(|address| wanted.contains(&address)) {
                live.push(endpoint);
            } else if let Some(address) = endpoint.address {
                actions.push(endpoint.event(
                    EventKind::Resolve,
                    format!("{name} no longer resolves to {}", address.ip()),
                ));
                self.retired.push(endpoint);
            }
        }
        self.live = live;
        for address in wanted.difference(&has) {
            let endpoint = self.endpoint(&entry, Some(*address), now);
            actions.push(endpoint.event(EventKind::Resolve, format!("{name} resolves to {}", address.ip())));
            self.live.push(endpoint);
        }
        if wanted.is_empty() {
            let placeholder = self.endpoint(&entry, None, now);
            actions.push(placeholder.event(EventKind::Resolve, format!("{name} does not resolve")));
            self.live.push(placeholder);
        }
        self.sort();
        self.pardon_the_only_one(now, &mut actions);
        actions
    }

    /// The entries to resolve, in the order of the configuration.
    pub fn names(&self) -> Vec<Address> {
        let addresses = self.entries.iter().map(|entry| &entry.backend.address);
        addresses
            .filter(|address| matches!(address, Address::Name { .. }))
            .cloned()
            .collect()
    }

    /// Chooses the backend of one connection attempt and counts its session at once.
    ///
    /// `tried` are those that this client's connection has failed with. In this order: healthy primaries and those
    /// whose ban has run out, by the configured balance; backups likewise; then, in every profile (nginx gives up
    /// here), those that are alive but not ready, by balance; then those that are out, the one with the fewest connects
    /// under way and then with the oldest verdict first, so that not everybody waits for the same one. Drained,
    /// unresolved and retired ones never: then there is no pick.
    pub fn pick(&mut self, client: IpAddr, tried: &[BackendId], now: Moment) -> (Option<Pick>, Vec<Action>) {
        let Self {
            settings, live, random, ..
        } = self;
        let terms = settings.terms();
        let mut found = [false; 4];
        for endpoint in live.iter_mut() {
            endpoint.class = if tried.contains(&endpoint.id) {
                Class::Shut
            } else {
                endpoint.class(&terms, now)
            };
            endpoint.ramp(settings, now);
            let tier = match (endpoint.class, endpoint.backup) {
                (Class::Usable, false) => 0,
                (Class::Usable, true) => 1,
                (Class::NotReady, _) => 2,
                (Class::Out, _) => 3,
                (Class::Shut, _) => continue,
            };
            if let Some(found) = found.get_mut(tier) {
                *found = true;
            }
        }
        let [primary, backup, not_ready, out] = found;
        let class = match (primary || backup, not_ready, out) {
            (true, ..) => Class::Usable,
            (false, true, _) => Class::NotReady,
            (false, false, true) => Class::Out,
            (false, false, false) => return (None, Vec::new()),
        };
        let chosen = if class == Class::Out {
            let out = live
                .iter()
                .enumerate()
                .filter(|(_, endpoint)| endpoint.class == Class::Out);
            out.min_by_key(|(_, endpoint)| (endpoint.connecting, endpoint.out_since()))
                .map(|(index, _)| index)
        } else {
            for endpoint in live.iter_mut() {
                let tier = class == Class::NotReady || endpoint.backup != primary;
                endpoint.share.open = endpoint.class == class && tier;
            }
            balance::choose(settings.balance, live, client, random)
        };
        let Some(endpoint) = chosen.and_then(|index| live.get_mut(index)) else {
            return (None, Vec::new());
        };
        let Some(address) = endpoint.address else {
            return (None, Vec::new());
        };
        let mut actions = Vec::new();
        endpoint.begin_connect();
        let fail_open = class != Class::Usable;
        let probe = class != Class::Out && endpoint.record.picked(&terms, now);
        if probe {
            endpoint.settle(settings, now);
            actions.push(endpoint.event(EventKind::Probe, "the ban has run out; one connection is finding out"));
        }
        if fail_open && due(&mut endpoint.failed_open_at, FAIL_OPEN_EVERY, now) {
            let state = endpoint.state_at(&terms, now).name();
            actions.push(endpoint.event(
                EventKind::FailOpen,
                format!("tried although {state}: no backend is healthy"),
            ));
        }
        (
            Some(Pick {
                id: endpoint.id,
                address,
                probe,
                fail_open,
            }),
            actions,
        )
    }

    /// Chooses a second backend while a connect to one of `tried` is under way, and counts its session at once.
    ///
    /// Only a healthy one will do, a backup only if no primary is left: a hedge spares the client a wait, it is not
    /// there to find out about a backend that is out. Whichever connects first is `connected`, the other one `slow`.
    pub fn hedge(&mut self, client: IpAddr, tried: &[BackendId], now: Moment) -> (Option<Pick>, Vec<Action>) {
        let Self {
            settings, live, random, ..
        } = self;
        let terms = settings.terms();
        for endpoint in live.iter_mut() {
            endpoint.share.open = !tried.contains(&endpoint.id) && endpoint.state_at(&terms, now) == State::Healthy;
            endpoint.ramp(settings, now);
        }
        if live.iter().any(|endpoint| endpoint.share.open && !endpoint.backup) {
            for endpoint in live.iter_mut().filter(|endpoint| endpoint.backup) {
                endpoint.share.open = false;
            }
        }
        let chosen = balance::choose(settings.balance, live, client, random);
        let Some(endpoint) = chosen.and_then(|index| live.get_mut(index)) else {
            return (None, Vec::new());
        };
        let Some(address) = endpoint.address else {
            return (None, Vec::new());
        };
        endpoint.begin_connect();
        endpoint.record.picked(&terms, now);
        endpoint.counters.hedges = endpoint.counters.hedges.saturating_add(1);
        let pick = Pick {
            id: endpoint.id,
            address,
            probe: false,
            fail_open: false,
        };
        (Some(pick), Vec::new())
    }

    /// A connect succeeded and its session is established. `took` is the time since its own pick, not the client's.
    pub fn connected(&mut self, id: BackendId, took: Duration, now: Moment) -> Vec<Action> {
        let Some(endpoint) = self.connecting(id) else {
            return Vec::new();
        };
        endpoint.connecting -= 1;
        endpoint.counters.connections = endpoint.counters.connections.saturating_add(1);
        self.answered(id, took, now).into_iter().collect()
    }

    /// A connect is not used, because another backend was faster, and its session is over.
    ///
    /// `took` as for [`Pool::connected`] if it succeeded in the end: for its health that is a success, as it did answer.
    /// `None` if nobody waited for its answer. One that failed in the end is [`Pool::failed`].
    pub fn slow(&mut self, id: BackendId, took: Option<Duration>, now: Moment) -> Vec<Action> {
        let Some(endpoint) = self.connecting(id) else {
            return Vec::new();
        };
        endpoint.release_connect();
        endpoint.counters.slow = endpoint.counters.slow.saturating_add(1);
        let told = due(&mut endpoint.slow_at, REPEAT_EVERY, now).then(|| {
            let reason = took.map_or_else(
                || "no answer yet; another backend was faster".to_owned(),
                |took| format!("connected after {}; another backend was faster", health::text(took)),
            );
            endpoint.event(EventKind::Slow, reason)
        });
        let mut actions: Vec<Action> = told.filter(|_| self.is_live(id)).into_iter().collect();
        match took {
            Some(took) => actions.extend(self.answered(id, took, now)),
            None => self.unanswered(id, now),
        }
        actions
    }

    /// A connect failed and its session is over.
    ///
    /// `proof` is the age of the freshest byte or TCP acknowledgement from that backend on any connection. It is asked
    /// only if a ban would rest on timeouts alone; at most [`PROOF`] prevents that ban, as does a connect that
    /// succeeded within that time. A lone backend is never banned: with nobody else to go to, that helps nobody.
    pub fn failed(
        &mut self,
        id: BackendId,
        failure: Failure,
        proof: impl FnOnce() -> Option<Duration>,
        now: Moment,
    ) -> Vec<Action> {
        let lone = self.is_lone();
        let is_live = self.is_live(id);
        let Self {
            settings,
            live,
            retired,
            ..
        } = self;
        let Some(endpoint) = find(live, retired, id).filter(|endpoint| endpoint.connecting > 0) else {
            return Vec::new();
        };
        endpoint.release_connect();
        let terms = settings.terms();
        if failure == Failure::Local || !is_live {
            endpoint.no_answer(settings, now);
            return Vec::new();
        }
        endpoint.counters.connect_failures = endpoint.counters.connect_failures.saturating_add(1);
        let text = failure.text();
        let down = endpoint.checks.down().is_some() && endpoint.record.standing(&terms, now) == Standing::In;
        let nothing_follows = match (settings.passive.max_fails, lone, down) {
            (0, ..) => Some("passive health is off"),
            (_, true, _) => Some("the only backend stays in use"),
            (_, _, true) => Some("active checks have taken it out already"),
            _ => None,
        };
        if let Some(why) = nothing_follows {
            return endpoint
                .repeated(EventKind::Failure, now, || format!("{text} ({why})"))
                .into_iter()
                .collect();
        }
        let connected_at = endpoint.connected_at;
        let verdict = endpoint
            .record
            .failed(&terms, failure, || is_alive(connected_at, proof, now), now);
        if settings.passive.nginx {
            endpoint.share.weaken(settings.passive.max_fails);
        }
        endpoint.settle(settings, now);
        match verdict {
            Verdict::Counted { tally } => vec![endpoint.event(EventKind::Failure, format!("{text} ({tally})"))],
            Verdict::AlreadyOut => endpoint
                .repeated(EventKind::Failure, now, || format!("{text} (banned already)"))
                .into_iter()
                .collect(),
            Verdict::Vetoed { tally } => {
                endpoint.counters.vetoes = endpoint.counters.vetoes.saturating_add(1);
                if !due(&mut endpoint.vetoed_at, REPEAT_EVERY, now) {
                    return Vec::new();
                }
                let veto = format!(
                    "{text}, {tally}; no ban, it has answered within {}",
                    health::text(PROOF)
                );
                let failed = endpoint.event(EventKind::Failure, format!("{text} ({tally})"));
                vec![failed, endpoint.event(EventKind::Veto, veto)]
            }
            Verdict::Banned { tally, again, term } => {
                endpoint.checks.restart();
                if !again {
                    endpoint.counters.eject(failure);
                }
                let ban = format!("{text}, {tally}; banned for {term}");
                let failed = endpoint.event(EventKind::Failure, format!("{text} ({tally})"));
                let mut actions = vec![failed, endpoint.event(EventKind::Ban, ban)];
                endpoint.reset_sessions(settings, &mut actions);
                actions
            }
        }
    }

    /// The client left while connecting, and the session is over. If it was the probe, the next pick probes instead.
    pub fn abandoned(&mut self, id: BackendId, now: Moment) {
        if let Some(endpoint) = self.connecting(id) {
            endpoint.release_connect();
            self.unanswered(id, now);
        }
    }

    /// An established session ended.
    pub fn closed(&mut self, id: BackendId, _now: Moment) {
        let Self { live, retired, .. } = self;
        if let Some(endpoint) = find(live, retired, id).filter(|endpoint| endpoint.share.sessions > endpoint.connecting)
        {
            endpoint.share.sessions -= 1;
        }
    }

    /// How many sessions each backend may lose now, so that their clients go to one that has fewer than its share; to be
    /// asked every few seconds, as each answer allows for the time since the one before.
    ///
    /// Shares are by weight, among the healthy backends whose slow start is over, backups only if there is no healthy
    /// primary. Nothing is to be shed unless one of them has less than its share / 1.25, nor with fewer than 2 sessions
    /// per backend. In a minute it is at most a tenth of the surplus (what is above the shares), but one session: few
    /// sessions, too, get even in the end. What cannot be closed at once is not owed: the next answer allows for it.
    pub fn surplus(&mut self, now: Moment) -> Vec<(BackendId, u32)> {
        let since = self.surplus_at.replace(now).map_or(Duration::ZERO, |at| now - at);
        let mut parts = self.parts(now);
        let sessions: u64 = parts.iter().map(|part| part.sessions).sum();
        let weights: f64 = parts.iter().map(|part| part.weight).sum();
        for part in &mut parts {
            part.surplus = part.sessions as f64 - sessions as f64 * part.weight / weights;
        }
        let lacks = |part: &Part| (part.sessions as f64) * EVEN < part.sessions as f64 - part.surplus;
        if sessions < TRIVIAL * parts.len() as u64 || !parts.iter().any(lacks) {
            self.credit = 0.0;
            return Vec::new();
        }
        let surplus: f64 = parts.iter().map(|part| part.surplus.max(0.0)).sum();
        let minutes = since.min(MINUTE).as_secs_f64() / MINUTE.as_secs_f64();
        self.credit += (surplus * SHED).max(1.0) * minutes;
        while self.credit >= 1.0 {
            let losers = parts
                .iter_mut()
                .filter(|part| part.surplus > 0.0 && u64::from(part.shed) < part.established);
            let Some(part) = losers.max_by(|a, b| a.surplus.total_cmp(&b.surplus)) else {
                break;
            };
            part.shed += 1;
            part.surplus -= 1.0;
            self.credit -= 1.0;
        }
        self.credit = self.credit.fract();
        let shed = parts.iter().filter(|part| part.shed > 0);
        shed.map(|part| (part.id, part.shed)).collect()
    }

    /// So many sessions of a backend were really closed for [`Pool::surplus`]; each is [`Pool::closed`] besides.
    pub fn shed(&mut self, id: BackendId, count: u32, now: Moment) -> Vec<Action> {
        let is_live = self.is_live(id);
        let Self { live, retired, .. } = self;
        let Some(endpoint) = find(live, retired, id).filter(|_| count > 0) else {
            return Vec::new();
        };
        endpoint.counters.shed = endpoint.counters.shed.saturating_add(u64::from(count));
        endpoint.shed_since = endpoint.shed_since.saturating_add(u64::from(count));
        if !is_live || !due(&mut endpoint.shed_at, MINUTE, now) {
            return Vec::new();
        }
        let reason = match std::mem::take(&mut endpoint.shed_since) {
            1 => "1 session closed, so that its client goes to a backend with fewer".to_owned(),
            count => format!("{count} sessions closed, so that their clients go to a backend with fewer"),
        };
        vec![endpoint.event(EventKind::Shed, reason)]
    }

    /// Takes over an established session from another process: it is counted as running, not as a connection. To be
    /// ended by [`Pool::closed`], also if its backend is configured or resolved to no more.
    pub fn adopt(&mut self, backend: &Address, address: SocketAddr, now: Moment) -> BackendId {
        let Self { live, retired, .. } = self;
        let is_same = |endpoint: &&mut Endpoint| endpoint.entry == *backend && endpoint.address == Some(address);
        if let Some(endpoint) = live.iter_mut().chain(retired).find(is_same) {
            endpoint.share.sessions = endpoint.share.sessions.saturating_add(1);
            return endpoint.id;
        }
        let known = self.entries.iter().find(|entry| entry.backend.address == *backend);
        let entry = known.cloned().unwrap_or_else(|| Entry {
            backend: config::Backend {
                address: backend.clone(),
                weight: 1,
                backup: false,
            },
            drained: false,
        });
        let mut endpoint = self.endpoint(&entry, Some(address), now);
        endpoint.share.sessions = 1;
        let id = endpoint.id;
        self.retired.push(endpoint);
        id
    }

    /// What [`Pool::adopt`] needs to know about a session of this backend.
    pub fn place_of(&self, id: BackendId) -> Option<(Address, SocketAddr)> {
        let mut all = self.live.iter().chain(&self.retired);
        let endpoint = all.find(|endpoint| endpoint.id == id)?;
        Some((endpoint.entry.clone(), endpoint.address?))
    }

    /// An active check answered; `proof` as for [`Pool::failed`].
    pub fn checked(
        &mut self,
        id: BackendId,
        outcome: CheckOutcome,
        proof: impl FnOnce() -> Option<Duration>,
        now: Moment,
    ) -> Vec<Action> {
        let Self { settings, live, .. } = self;
        let endpoint = live
            .iter_mut()
            .find(|endpoint| endpoint.id == id && endpoint.address.is_some());
        let (Some(endpoint), Some(rounds)) = (endpoint, settings.rounds) else {
            return Vec::new();
        };
        let turn = endpoint
            .checks
            .answered(rounds, outcome, || proof().is_some_and(|age| age <= PROOF), now);
        // Answers that came since the ban say as much as the probe would.
        let pardoned = endpoint.checks.risen(rounds) && endpoint.record.pardon(now);
        endpoint.settle(settings, now);
        let mut actions = Vec::new();
        match turn {
            Turn::Same => {}
            Turn::Changed(reason) => actions.push(endpoint.event(EventKind::Check, reason)),
            Turn::Up(reason) => return vec![endpoint.event(EventKind::Up, reason)],
            Turn::Down(reason) => {
                endpoint.counters.ejections.check = endpoint.counters.ejections.check.saturating_add(1);
                actions.push(endpoint.event(EventKind::Down, reason));
                endpoint.reset_sessions(settings, &mut actions);
            }
            Turn::Vetoed { first, reason } => {
                endpoint.counters.vetoes = endpoint.counters.vetoes.saturating_add(1);
                if first {
                    let reason = format!("{reason}; not down, it has answered within {}", health::text(PROOF));
                    actions.push(endpoint.event(EventKind::Veto, reason));
                }
            }
        }
        if pardoned {
            let reason = health::good_in_a_row(rounds.rise.max(1));
            actions.push(endpoint.event(EventKind::Up, format!("{reason}; the ban ends early")));
        }
        actions
    }

    /// Sets or takes back an operator's drain of all endpoints of an entry; `None`: no such entry. Running sessions
    /// stay.
    pub fn drain(&mut self, backend: &Address, set: bool, now: Moment) -> Option<Vec<Action>> {
        let Self {
            settings,
            entries,
            live,
            ..
        } = self;
        let entry = entries.iter_mut().find(|entry| entry.backend.address == *backend)?;
        entry.drained = set;
        let mut actions = Vec::new();
        for endpoint in live
            .iter_mut()
            .filter(|endpoint| endpoint.entry == *backend && endpoint.drained != set)
        {
            endpoint.drained = set;
            endpoint.settle(settings, now);
            actions.push(if set {
                endpoint.event(EventKind::Drain, "drained by an operator")
            } else {
                endpoint.event(EventKind::Undrain, "drain taken back by an operator")
            });
        }
        Some(actions)
    }

    /// What active checks should check: every resolved endpoint, drained ones included.
    pub fn targets(&self) -> Vec<(BackendId, Address, SocketAddr)> {
        let live = self.live.iter();
        live.filter_map(|endpoint| Some((endpoint.id, endpoint.entry.clone(), endpoint.address?)))
            .collect()
    }

    /// For /healthz: an endpoint is healthy, or its ban has run out and no connection has come to probe it. Without the
    /// latter, whoever sends traffic only where /healthz says 200 would never send the one connection that turns it.
    pub fn healthy(&self, now: Moment) -> bool {
        let terms = self.settings.terms();
        self.live
            .iter()
            .any(|endpoint| endpoint.class(&terms, now) == Class::Usable)
    }

    /// Every endpoint that is not retired, in the order of the configuration; bytes and sessions reset are the caller's
    /// to fill in.
    pub fn status(&self, now: Moment) -> Vec<BackendStatus> {
        let live = self.live.iter();
        live.map(|endpoint| endpoint.status(&self.settings, now)).collect()
    }

    /// The endpoints of one configured backend, none if there is no such.
    pub fn id_of(&self, backend: &Address) -> Vec<BackendId> {
        self.of(backend).map(|endpoint| endpoint.id).collect()
    }

    /// As shown in events: the configured `HOST:PORT`, for a resolved name followed by ` (ADDRESS)`.
    pub fn name_of(&self, id: BackendId) -> Option<String> {
        let mut all = self.live.iter().chain(&self.retired);
        all.find(|endpoint| endpoint.id == id)
            .map(|endpoint| match (&endpoint.entry, endpoint.address) {
                (name @ Address::Name { .. }, Some(address)) => format!("{name} ({address})"),
                (entry, _) => entry.to_string(),
            })
    }

    /// Makes entries and endpoints those of `backends`. Endpoints that stay keep everything but weight and backup.
    fn arrange(&mut self, backends: &[config::Backend], now: Moment) {
        self.purge();
        let mut entries: Vec<Entry> = Vec::with_capacity(backends.len());
        for backend in backends {
            let is_same = |entry: &&Entry| entry.backend.address == backend.address;
            if !entries.iter().any(|entry| is_same(&entry)) {
                // One that comes back before its last session has ended brings its drain along.
                let mut gone = self.retired.iter().filter(|endpoint| endpoint.entry == backend.address);
                let drained = match self.entries.iter().find(is_same) {
                    Some(entry) => entry.drained,
                    None => gone.any(|endpoint| endpoint.drained),
                };
                entries.push(Entry {
                    backend: backend.clone(),
                    drained,
                });
            }
        }
        for mut endpoint in std::mem::take(&mut self.live) {
            match entries.iter().find(|entry| entry.backend.address == endpoint.entry) {
                Some(entry) => {
                    endpoint.adopt(entry);
                    self.live.push(endpoint);
                }
                None => self.retired.push(endpoint),
            }
        }
        self.entries = entries;
        for entry in self.entries.clone() {
            if self.of(&entry.backend.address).next().is_some() {
                continue;
            }
            let address = match &entry.backend.address {
                Address::Ip(address) => Some(*address),
                Address::Name { .. } => None,
            };
            let endpoint = self.endpoint(&entry, address, now);
            self.live.push(endpoint);
        }
        self.sort();
    }

    /// The endpoint of an address of an entry: the retired one if it is still there, else a new one.
    fn endpoint(&mut self, entry: &Entry, address: Option<SocketAddr>, now: Moment) -> Endpoint {
        let is_same = |endpoint: &Endpoint| endpoint.entry == entry.backend.address && endpoint.address == address;
        let retired = self
            .retired
            .iter()
            .position(|endpoint| address.is_some() && is_same(endpoint));
        if let Some(index) = retired {
            let mut endpoint = self.retired.swap_remove(index);
            endpoint.adopt(entry);
            endpoint.settle(&self.settings, now);
            return endpoint;
        }
        let id = BackendId(self.next_id);
        self.next_id = self.next_id.saturating_add(1);
        let mut endpoint = Endpoint::new(id, entry, address, &self.settings, now);
        endpoint.settle(&self.settings, now);
        endpoint
    }

    /// Forgets retired endpoints without sessions. Not done when the last one closes: events about an endpoint that has
    /// just retired still need its name.
    fn purge(&mut self) {
        self.retired.retain(|endpoint| endpoint.share.sessions > 0);
    }

    /// Puts the endpoints in the order of the configuration, those of one name in the order of their addresses.
    fn sort(&mut self) {
        let Self { entries, live, .. } = self;
        let place = |endpoint: &Endpoint| entries.iter().position(|entry| entry.backend.address == endpoint.entry);
        live.sort_by_cached_key(|endpoint| (place(endpoint), endpoint.address));
    }

    fn is_live(&self, id: BackendId) -> bool {
        self.live.iter().any(|endpoint| endpoint.id == id)
    }

    /// The endpoint of a connect under way.
    fn connecting(&mut self, id: BackendId) -> Option<&mut Endpoint> {
        let Self { live, retired, .. } = self;
        find(live, retired, id).filter(|endpoint| endpoint.connecting > 0)
    }

    /// A connect that began `took` ago, and is counted as under way no more, succeeded.
    fn answered(&mut self, id: BackendId, took: Duration, now: Moment) -> Option<Action> {
        let Self {
            settings,
            live,
            retired,
            ..
        } = self;
        let terms = settings.terms();
        let is_live = live.iter().any(|endpoint| endpoint.id == id);
        let endpoint = find(live, retired, id)?;
        endpoint.connected_at = Some(now);
        endpoint.counters.latency.record(took);
        let began = Moment::new(now.since_boot().saturating_sub(took));
        if !endpoint.record.succeeded(began, now) {
            return None;
        }
        endpoint.settle(settings, now);
        let up = endpoint.event(EventKind::Up, format!("connected in {}", health::text(took)));
        if !is_live {
            return None;
        }
        let is_other = |endpoint: &&mut Endpoint| endpoint.id != id;
        if !live
            .iter_mut()
            .filter(is_other)
            .any(|other| other.state_at(&terms, now) == State::Healthy)
        {
            // Where all were out, the cause was most likely one for all. If the others' bans ran their course, the
            // first to come back would have all clients to itself until then.
            for other in live.iter_mut().filter(is_other) {
                other.record.hasten(&terms, now);
            }
        }
        Some(up)
    }

    /// A connect that is counted as under way no more ended without the backend's answer.
    fn unanswered(&mut self, id: BackendId, now: Moment) {
        let Self {
            settings,
            live,
            retired,
            ..
        } = self;
        if let Some(endpoint) = find(live, retired, id) {
            endpoint.no_answer(settings, now);
        }
    }

    /// Who takes part in the shedding.
    fn parts(&self, now: Moment) -> Vec<Part> {
        let terms = self.settings.terms();
        let healthy = || {
            let live = self.live.iter();
            live.filter(|endpoint| endpoint.state_at(&terms, now) == State::Healthy)
        };
        let primary = healthy().any(|endpoint| !endpoint.backup);
        let parts = healthy()
            .filter(|endpoint| endpoint.backup != primary && endpoint.slow_start_left(&self.settings, now).is_none());
        parts
            .map(|endpoint| Part {
                id: endpoint.id,
                sessions: endpoint.share.sessions,
                established: endpoint.share.sessions.saturating_sub(endpoint.connecting),
                weight: f64::from(endpoint.weight.max(1)),
                surplus: 0.0,
                shed: 0,
            })
            .collect()
    }

    fn of(&self, backend: &Address) -> impl Iterator<Item = &Endpoint> {
        self.live.iter().filter(move |endpoint| endpoint.entry == *backend)
    }

    /// Exactly one endpoint could be connected to if nothing were out or drained.
    fn is_lone(&self) -> bool {
        self.live
            .iter()
            .filter(|endpoint| endpoint.address.is_some())
            .take(2)
            .count()
            == 1
    }

    /// A backend that has just become the only one is not banned any more.
    fn pardon_the_only_one(&mut self, now: Moment, actions: &mut Vec<Action>) {
        if !self.is_lone() {
            return;
        }
        for endpoint in self.live.iter_mut().filter(|endpoint| endpoint.address.is_some()) {
            if endpoint.record.pardon(now) {
                actions.push(endpoint.event(EventKind::Up, "the only backend stays in use"));
                endpoint.settle(&self.settings, now);
            }
        }
    }
}

impl Endpoint {
    fn new(id: BackendId, entry: &Entry, address: Option<SocketAddr>, settings: &Settings, now: Moment) -> Self {
        let config::Backend {
            address: name,
            weight,
            backup,
        } = entry.backend.clone();
        Self {
            id,
            entry: name,
            address,
            weight,
            backup,
            drained: entry.drained,
            share: Share::new(weight, address),
            connecting: 0,
            class: Class::Shut,
            record: Record::new(&settings.passive),
            checks: Checks::default(),
            state: State::Healthy,
            since: now,
            connected_at: None,
            repeated_at: None,
            vetoed_at: None,
            failed_open_at: None,
            slow_at: None,
            shed_at: None,
            shed_since: 0,
            away: false,
            returned: None,
            counters: Counters::default(),
        }
    }

    /// Takes over what the configuration and the operator say now.
    fn adopt(&mut self, entry: &Entry) {
        self.weight = entry.backend.weight;
        self.backup = entry.backend.backup;
        self.drained = entry.drained;
        self.share.set_weight(entry.backend.weight);
    }

    /// Goes on under other rules; says why if they took a verdict back.
    fn fit(&mut self, settings: &Settings, now: Moment) -> Option<&'static str> {
        let mut why = self
            .record
            .fit(&settings.passive)
            .then_some("its ban ended with the rules it rested on");
        if settings.rounds.is_none() {
            let checks = std::mem::take(&mut self.checks);
            if checks.down().is_some() || checks.not_ready() {
                why = Some("there are no active checks, and their verdict is forgotten");
            }
        }
        self.settle(settings, now);
        why
    }

    fn class(&self, terms: &Terms, now: Moment) -> Class {
        if self.address.is_none() || self.drained {
            return Class::Shut;
        }
        if self.checks.down().is_some() {
            return Class::Out;
        }
        match (self.record.standing(terms, now), self.checks.not_ready()) {
            (Standing::In | Standing::Due, false) => Class::Usable,
            (Standing::In, true) => Class::NotReady,
            (Standing::Due, true) | (Standing::Out | Standing::Probing, _) => Class::Out,
        }
    }

    fn state_at(&self, terms: &Terms, now: Moment) -> State {
        if self.address.is_none() {
            return State::Unresolved;
        }
        if self.drained {
            return State::Drained;
        }
        if self.checks.down().is_some() {
            return State::Down;
        }
        match self.record.standing(terms, now) {
            Standing::Out | Standing::Due => State::Banned,
            Standing::Probing => State::Probing,
            Standing::In if self.checks.not_ready() => State::NotReady,
            Standing::In => State::Healthy,
        }
    }

    /// Notes since when the state is what it is; after everything that may change it.
    fn settle(&mut self, settings: &Settings, now: Moment) {
        let state = self.state_at(&settings.terms(), now);
        if state != self.state {
            match state {
                State::Healthy if std::mem::take(&mut self.away) => {
                    self.returned = settings.slow_start.map(|_| now);
                }
                State::Drained | State::Down | State::Banned | State::Probing => self.away = true,
                // On the way back, or a moment's wish: neither makes nor ends an absence.
                State::NotReady | State::Unresolved | State::Healthy => {}
            }
            self.state = state;
            self.since = now;
        }
    }

    /// Time until it has its full share.
    fn slow_start_left(&self, settings: &Settings, now: Moment) -> Option<Duration> {
        let left = settings.slow_start?.saturating_sub(now - self.returned?);
        (!left.is_zero()).then_some(left)
    }

    /// Makes as much of its weight count as slow start allows: a tenth at first, all of it in the end.
    fn ramp(&mut self, settings: &Settings, now: Moment) {
        if self.returned.is_none() {
            return;
        }
        let scale = match (self.slow_start_left(settings, now), settings.slow_start) {
            (Some(left), Some(whole)) => {
                let missing = f64::from(FULL) * 0.9 * left.div_duration_f64(whole);
                FULL.saturating_sub(missing as u32).max(1)
            }
            _ => {
                self.returned = None;
                FULL
            }
        };
        self.share.set_scale(scale);
    }

    /// When the verdict that keeps it out was given.
    fn out_since(&self) -> Option<Moment> {
        self.checks.down().or_else(|| self.record.out_since())
    }

    /// One connect in flight, and so one session, more.
    const fn begin_connect(&mut self) {
        self.connecting = self.connecting.saturating_add(1);
        self.share.sessions = self.share.sessions.saturating_add(1);
    }

    /// One connect in flight, and so one session, less.
    const fn release_connect(&mut self) {
        self.connecting = self.connecting.saturating_sub(1);
        self.share.sessions = self.share.sessions.saturating_sub(1);
    }

    /// A connect ended without the backend's answer. Others under way may include the probe: it is given up only if
    /// there are none, and lapses otherwise.
    fn no_answer(&mut self, settings: &Settings, now: Moment) {
        if self.connecting == 0 {
            self.record.gave_up();
            self.settle(settings, now);
        }
    }

    fn reset_sessions(&self, settings: &Settings, actions: &mut Vec<Action>) {
        if settings.on_down == OnDown::Reset {
            actions.push(Action::ResetSessions(self.id));
        }
    }

    fn event(&self, kind: EventKind, reason: impl Into<String>) -> Action {
        Action::Event {
            id: self.id,
            kind,
            reason: reason.into(),
        }
    }

    /// An event that may come thousands of times in a second.
    fn repeated(&mut self, kind: EventKind, now: Moment, reason: impl FnOnce() -> String) -> Option<Action> {
        due(&mut self.repeated_at, REPEAT_EVERY, now).then(|| self.event(kind, reason()))
    }

    fn status(&self, settings: &Settings, now: Moment) -> BackendStatus {
        let terms = settings.terms();
        let state = self.state_at(&terms, now);
        let left = self.slow_start_left(settings, now);
        let left = left.filter(|_| state == State::Healthy);
        let left = left.map(|left| left.as_secs() + u64::from(left.subsec_nanos() > 0));
        BackendStatus {
            backend: self.entry.to_string(),
            address: self.address,
            state,
            reason: self.reason(state, left, &terms, now),
            since_ms: u64::try_from((now - self.since).as_millis()).unwrap_or(u64::MAX),
            weight: self.weight,
            backup: self.backup,
            sessions: self.share.sessions,
            connections_total: self.counters.connections,
            bytes_up_total: 0,
            bytes_down_total: 0,
            connect_failures_total: self.counters.connect_failures,
            ejections: self.counters.ejections,
            vetoes_total: self.counters.vetoes,
            sessions_reset_total: 0,
            connect_latency: self.counters.latency.clone(),
            slow_start_remaining: left,
            hedges_total: self.counters.hedges,
            slow_total: self.counters.slow,
            shed_total: self.counters.shed,
        }
    }

    fn reason(&self, state: State, slow_start_left: Option<u64>, terms: &Terms, now: Moment) -> String {
        match state {
            State::Unresolved => "its name does not resolve".to_owned(),
            State::Drained => "drained by an operator".to_owned(),
            State::Down | State::NotReady => self.checks.reason().to_owned(),
            State::Banned | State::Probing => self.record.reason(terms, now).unwrap_or_default(),
            State::Healthy => {
                let mut reason = if self.backup {
                    "in use while no primary is healthy".to_owned()
                } else {
                    "in use".to_owned()
                };
                if let Some(left) = slow_start_left {
                    reason.push_str(&format!("; full share in {left} s"));
                }
                reason
            }
        }
    }
}

impl AsRef<Share> for Endpoint {
    fn as_ref(&self) -> &Share {
        &self.share
    }
}

impl AsMut<Share> for Endpoint {
    fn as_mut(&mut self) -> &mut Share {
        &mut self.share
    }
}

impl Counters {
    const fn eject(&mut self, failure: Failure) {
        let ejections = &mut self.ejections;
        let counter = match failure {
            Failure::Refused | Failure::Reset => &mut ejections.refused,
            Failure::Unreachable => &mut ejections.unreachable,
            Failure::Timeout => &mut ejections.timeout,
            Failure::Local => return,
        };
        *counter = counter.saturating_add(1);
    }
}

/// What [`Pool::surplus`] knows of one backend.
struct Part {
    id: BackendId,
    sessions: u64,
    established: u64,
    weight: f64,
    /// Sessions above its share.
    surplus: f64,
    /// How many of them it may lose now.
    shed: u32,
}

fn find<'a>(live: &'a mut [Endpoint], retired: &'a mut [Endpoint], id: BackendId) -> Option<&'a mut Endpoint> {
    live.iter_mut().chain(retired).find(|endpoint| endpoint.id == id)
}

/// Whether `every` has passed since the last time this said so.
fn due(last: &mut Option<Moment>, every: Duration, now: Moment) -> bool {
    let due = last.is_none_or(|last| now - last >= every);
    if due {
        *last = Some(now);
    }
    due
}

/// The backend has shown life within [`PROOF`]: by a connect, or by what only `proof` knows.
fn is_alive(connected_at: Option<Moment>, proof: impl FnOnce() -> Option<Duration>, now: Moment) -> bool {
    connected_at.is_some_and(|at| now - at <= PROOF) || proof().is_some_and(|age| age <= PROOF)
}

/// What outlives a worker: bans, windows, check verdicts and counters; sessions ended with it. Every key may be missing
/// and unknown ones are ignored, so that another version can read it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Snapshot {
    backends: Vec<Saved>,
}

/// One endpoint; the key is `backend` and `address`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Saved {
    backend: String,
    address: Option<SocketAddr>,
    state: String,
    since: Moment,
    record: SavedRecord,
    checks: Checks,
    connections_total: u64,
    connect_failures_total: u64,
    ejections_refused: u64,
    ejections_unreachable: u64,
    ejections_timeout: u64,
    ejections_check: u64,
    vetoes_total: u64,
    hedges_total: u64,
    slow_total: u64,
    shed_total: u64,
    returned: Option<Moment>,
    /// Ignored unless it has as many buckets as [`Histogram`].
    latency_buckets: Vec<u64>,
    latency_sum_us: u64,
}

impl Pool {
    /// What outlives this worker.
    pub fn snapshot(&self, now: Moment) -> Snapshot {
        let terms = self.settings.terms();
        let live = self.live.iter().filter(|endpoint| endpoint.address.is_some());
        Snapshot {
            backends: live
                .map(|endpoint| Saved::of(endpoint, endpoint.state_at(&terms, now)))
                .collect(),
        }
    }

    /// Takes over what a predecessor left; for a pool that nothing has happened to.
    ///
    /// A probe that was under way is a ban that has run out. Names that are not resolved yet stand for the addresses
    /// they had, so that a worker can start while DNS is away; [`Pool::set_addresses`] then says what is true.
    pub fn restore(&mut self, snapshot: &Snapshot, now: Moment) {
        for name in self.names() {
            let text = name.to_string();
            let saved = snapshot.backends.iter().filter(|saved| saved.backend == text);
            let addresses: Vec<SocketAddr> = saved.filter_map(|saved| saved.address).collect();
            if !addresses.is_empty() && self.of(&name).all(|endpoint| endpoint.address.is_none()) {
                self.set_addresses(&name, &addresses, now);
            }
        }
        let Self { settings, live, .. } = self;
        for endpoint in live.iter_mut().filter(|endpoint| endpoint.address.is_some()) {
            let name = endpoint.entry.to_string();
            let mut all = snapshot.backends.iter();
            if let Some(saved) = all.find(|saved| saved.backend == name && saved.address == endpoint.address) {
                saved.restore(endpoint, settings, now);
            }
        }
        self.pardon_the_only_one(now, &mut Vec::new());
    }
}

impl Saved {
    fn of(endpoint: &Endpoint, state: State) -> Self {
        let Counters {
            connections,
            connect_failures,
            ejections,
            vetoes,
            hedges,
            slow,
            shed,
            latency,
        } = &endpoint.counters;
        Self {
            backend: endpoint.entry.to_string(),
            address: endpoint.address,
            state: state.name().to_owned(),
            since: endpoint.since,
            record: endpoint.record.save(),
            checks: endpoint.checks.clone(),
            connections_total: *connections,
            connect_failures_total: *connect_failures,
            ejections_refused: ejections.refused,
            ejections_unreachable: ejections.unreachable,
            ejections_timeout: ejections.timeout,
            ejections_check: ejections.check,
            vetoes_total: *vetoes,
            hedges_total: *hedges,
            slow_total: *slow,
            shed_total: *shed,
            returned: endpoint.returned,
            latency_buckets: latency.buckets.to_vec(),
            latency_sum_us: latency.sum_us,
        }
    }

    fn restore(&self, endpoint: &mut Endpoint, settings: &Settings, now: Moment) {
        endpoint.record = Record::restore(&self.record, &settings.passive, now);
        if settings.rounds.is_some() {
            endpoint.checks = self.checks.clone().restored(now);
        }
        let latency = self.latency_buckets.as_slice().try_into();
        endpoint.counters = Counters {
            connections: self.connections_total,
            connect_failures: self.connect_failures_total,
            ejections: Ejections {
                refused: self.ejections_refused,
                unreachable: self.ejections_unreachable,
                timeout: self.ejections_timeout,
                check: self.ejections_check,
            },
            vetoes: self.vetoes_total,
            hedges: self.hedges_total,
            slow: self.slow_total,
            shed: self.shed_total,
            latency: latency.map_or_else(
                |_| Histogram::default(),
                |buckets| Histogram {
                    buckets,
                    sum_us: self.latency_sum_us,
                },
            ),
        };
        endpoint.settle(settings, now);
        if endpoint.state.name() == self.state {
            endpoint.since = self.since.min(now);
            endpoint.returned = self.returned.map(|at| at.min(now));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    #[test]
    fn failures_at_0_and_9_s_ban_and_failures_at_0_and_11_s_do_not() {
        for (second, state) in [(9.0, State::Banned), (11.0, State::Healthy)] {
            let mut lab = Lab::new(3);
            lab.fail(0, Failure::Refused, 0.0);
            lab.fail(0, Failure::Refused, second);
            assert_eq!(lab.state(0, second), state);
        }
    }

    #[test]
    fn a_ban_says_what_it_rests_on_and_takes_the_sessions_along_only_if_asked_to() {
        for on_down in [OnDown::Reset, OnDown::Keep] {
            let mut lab = Lab::with(3, Settings { on_down, ..SETTINGS });
            let first = lab.fail(0, Failure::Refused, 0.0);
            assert_eq!(
                first,
                [event(
                    0,
                    EventKind::Failure,
                    "connect refused (1 of 2 failures within 10 s)"
                )]
            );
            let mut wanted = vec![
                event(0, EventKind::Failure, "connect refused (2 of 2 failures within 10 s)"),
                event(
                    0,
                    EventKind::Ban,
                    "connect refused, 2 of 2 failures within 10 s; banned for 10 s",
                ),
            ];
            if on_down == OnDown::Reset {
                wanted.push(Action::ResetSessions(BackendId(0)));
            }
            assert_eq!(lab.fail(0, Failure::Refused, 4.0), wanted);
            let status = lab.status(0, 7.0);
            assert_eq!(
                status.reason,
                "connect refused, 2 of 2 failures within 10 s; probed again in 7 s"
            );
            assert_eq!(
                (status.since_ms, status.connect_failures_total, status.ejections.refused),
                (3000, 2, 1)
            );
        }
    }

    #[test]
    fn a_banned_backend_gets_no_connection_for_fail_timeout() {
        let mut lab = Lab::new(3);
        lab.ban(0, 0.0);
        for tenth in 0..100 {
            assert_ne!(lab.pick(f64::from(tenth) / 10.0).id, BackendId(0));
        }
        let picks: Vec<BackendId> = (0..3).map(|_| lab.pick(10.0).id).collect();
        assert!(picks.contains(&BackendId(0)));
    }

    #[test]
    fn after_a_ban_exactly_one_connection_is_the_probe() {
        let mut lab = Lab::new(2);
        lab.ban(0, 0.0);
        let (pick, actions) = lab.attempt(0, 10.0);
        assert!(pick.probe && !pick.fail_open);
        assert_eq!(kinds(&actions), [EventKind::Probe]);
        assert_eq!(lab.state(0, 10.0), State::Probing);
        for _ in 0..100 {
            assert_eq!(lab.pick(10.5).id, BackendId(1), "everyone else skips it");
        }
        let actions = lab.pool.connected(BackendId(0), MS, at(10.6));
        assert_eq!(kinds(&actions), [EventKind::Up]);
        assert_eq!(lab.state(0, 10.6), State::Healthy);
        lab.fail(0, Failure::Refused, 10.7);
        assert_eq!(lab.state(0, 10.7), State::Healthy, "the window was emptied");
    }

    #[test]
    fn a_lost_probe_bans_again_at_once_and_for_as_long() {
        let mut lab = Lab::new(2);
        lab.ban(0, 0.0);
        lab.attempt(0, 12.0);
        let actions = lab.pool.failed(BackendId(0), Failure::Refused, never, at(12.5));
        let reason = "connect refused, the probe failed; banned for 10 s, the 2nd time in a row";
        assert_eq!(actions[1], event(0, EventKind::Ban, reason));
        assert_eq!(lab.state(0, 22.4), State::Banned);
        assert_eq!(lab.status(0, 22.4).ejections.refused, 1, "it was not in since");
        assert!(!lab.pick_of(0, 22.4).is_some_and(|pick| pick.probe));
        assert!(lab.attempt(0, 22.5).0.probe);
    }

    #[test]
    fn a_probe_that_is_never_answered_blocks_no_longer_than_the_connect_timeout_and_a_second() {
        let mut lab = Lab::new(2);
        lab.ban(0, 0.0);
        assert!(lab.attempt(0, 10.0).0.probe);
        assert!(lab.attempt(0, 12.0).0.fail_open);
        assert!(lab.attempt(0, 12.1).0.probe);
    }

    #[test]
    fn a_probe_whose_client_left_or_that_failed_locally_is_followed_by_another() {
        let mut lab = Lab::new(2);
        lab.ban(0, 0.0);
        assert!(lab.attempt(0, 10.0).0.probe);
        lab.pool.abandoned(BackendId(0), at(10.1));
        assert_eq!(lab.state(0, 10.1), State::Banned);
        assert!(lab.attempt(0, 10.2).0.probe);
        assert_eq!(lab.pool.failed(BackendId(0), Failure::Local, never, at(10.3)), []);
        assert!(lab.attempt(0, 10.4).0.probe);
    }

    #[test]
    fn another_connection_that_gives_up_does_not_take_the_probe_along() {
        let mut lab = Lab::new(2);
        lab.ban(0, 0.0);
        assert!(lab.attempt(0, 9.9).0.fail_open);
        assert!(lab.attempt(0, 10.0).0.probe);
        lab.pool.abandoned(BackendId(0), at(10.1));
        assert_eq!(lab.state(0, 10.1), State::Probing);
        lab.pool.abandoned(BackendId(0), at(10.2));
        assert_eq!(lab.state(0, 10.2), State::Banned, "now it was the probe for sure");
    }

    #[test]
    fn local_errors_are_never_counted_against_a_backend() {
        let mut lab = Lab::new(2);
        for _ in 0..100 {
            assert_eq!(lab.fail(0, Failure::Local, 0.0), []);
        }
        let status = lab.status(0, 0.0);
        assert_eq!(
            (status.state, status.connect_failures_total, status.sessions),
            (State::Healthy, 0, 0)
        );
    }

    #[test]
    fn a_lone_backend_is_never_banned() {
        for nginx in [false, true] {
            let passive = Passive {
                nginx,
                ..SETTINGS.passive
            };
            let mut lab = Lab::with(1, Settings { passive, ..SETTINGS });
            for second in 0..10 {
                let actions = lab.fail(0, Failure::Refused, f64::from(second));
                assert_eq!(
                    actions,
                    [event(
                        0,
                        EventKind::Failure,
                        "connect refused (the only backend stays in use)"
                    )]
                );
                assert!(!lab.attempt(0, f64::from(second)).0.fail_open);
            }
            assert_eq!(lab.status(0, 10.0).connect_failures_total, 10);
        }
    }

    #[test]
    fn a_backend_that_becomes_the_only_one_is_not_banned_any_more() {
        let mut lab = Lab::new(2);
        lab.ban(0, 0.0);
        let actions = lab.pool.reconfigure(SETTINGS, &backends(1), at(1.0));
        assert_eq!(actions, [event(0, EventKind::Up, "the only backend stays in use")]);
        assert_eq!(lab.state(0, 1.0), State::Healthy);
    }

    #[test]
    fn max_fails_0_switches_passive_health_off() {
        let mut lab = Lab::new(2);
        lab.ban(0, 0.0);
        let off = Settings {
            passive: Passive {
                max_fails: 0,
                ..SETTINGS.passive
            },
            ..SETTINGS
        };
        assert_eq!(
            kinds(&lab.pool.reconfigure(off, &backends(2), at(1.0))),
            [EventKind::Up]
        );
        for _ in 0..10 {
            lab.fail(0, Failure::Refused, 1.0);
        }
        assert_eq!(lab.state(0, 1.0), State::Healthy);
    }

    #[test]
    fn when_all_are_out_the_one_with_the_oldest_ban_is_tried_first() {
        let mut lab = Lab::new(3);
        for (index, second) in [(1, 0.0), (2, 1.0), (0, 2.0)] {
            lab.ban(index, second);
        }
        let mut tried = Vec::new();
        for _ in 0..3 {
            let (pick, actions) = lab.pool.pick(CLIENT, &tried, at(3.0));
            let pick = pick.expect("fail open");
            assert!(pick.fail_open && !pick.probe);
            assert_eq!(kinds(&actions), [EventKind::FailOpen]);
            tried.push(pick.id);
        }
        assert_eq!(tried, [BackendId(1), BackendId(2), BackendId(0)]);
        assert_eq!(lab.pool.pick(CLIENT, &tried, at(3.0)).0, None);
    }

    #[test]
    fn failing_open_is_told_once_in_10_s_for_each_backend() {
        let mut lab = Lab::new(2);
        lab.ban(0, 0.0);
        lab.ban(1, 0.0);
        assert_eq!(kinds(&lab.attempt(0, 1.0).1), [EventKind::FailOpen]);
        assert_eq!(kinds(&lab.attempt(1, 1.0).1), [EventKind::FailOpen]);
        assert_eq!(lab.attempt(0, 9.9).1, []);
        let forever = Passive {
            fail_timeout: Duration::from_secs(3600),
            ..SETTINGS.passive
        };
        lab.pool.reconfigure(
            Settings {
                passive: forever,
                ..SETTINGS
            },
            &backends(2),
            at(9.9),
        );
        assert_eq!(kinds(&lab.attempt(0, 11.0).1), [EventKind::FailOpen]);
    }

    #[test]
    fn a_connection_that_failed_open_and_succeeded_ends_the_ban() {
        for nginx in [false, true] {
            let passive = Passive {
                nginx,
                ..SETTINGS.passive
            };
            let mut lab = Lab::with(2, Settings { passive, ..SETTINGS });
            lab.ban(0, 0.0);
            lab.ban(1, 0.0);
            assert!(lab.attempt(1, 3.0).0.fail_open);
            assert_eq!(kinds(&lab.pool.connected(BackendId(1), MS, at(3.1))), [EventKind::Up]);
            assert_eq!(lab.state(1, 3.1), State::Healthy);
            let next = lab.pick(3.2);
            let wanted = if nginx {
                (BackendId(1), false)
            } else {
                (BackendId(0), true)
            };
            assert_eq!(
                (next.id, next.probe),
                wanted,
                "the others are tried at once, but not by nginx"
            );
        }
    }

    #[test]
    fn a_failure_that_fails_open_neither_prolongs_the_ban_nor_floods_the_journal() {
        let mut lab = Lab::new(2);
        lab.ban(0, 0.0);
        lab.ban(1, 0.0);
        let told = (0..1000)
            .map(|n| lab.fail(0, Failure::Refused, 1.0 + f64::from(n) / 1000.0).len())
            .sum::<usize>();
        assert!(told <= 2, "{told} events in a second");
        assert!(lab.attempt(0, 10.0).0.probe);
    }

    #[test]
    fn not_ready_backends_are_alive_and_tried_before_those_that_are_out() {
        let mut lab = Lab::new(3);
        lab.ban(0, 0.0);
        lab.check(1, CheckOutcome::NotReady("answers 500".into()), 0.0);
        lab.check(2, CheckOutcome::NotReady("answers 500".into()), 0.0);
        let ids: Vec<BackendId> = (0..4).map(|_| lab.pick(1.0).id).collect();
        assert_eq!(ids, [1, 2, 1, 2].map(BackendId), "by balance among themselves");
    }

    #[test]
    fn a_proof_of_life_within_2_s_outweighs_timeouts() {
        for (age, banned) in [(0, false), (2000, false), (2001, true)] {
            let mut lab = Lab::new(2);
            lab.fail(0, Failure::Timeout, 0.0);
            lab.attempt(0, 1.0);
            let proof = || Some(Duration::from_millis(age));
            let actions = lab.pool.failed(BackendId(0), Failure::Timeout, proof, at(1.0));
            assert_eq!(kinds(&actions).contains(&EventKind::Veto), !banned);
            assert_eq!(lab.state(0, 1.0) == State::Banned, banned);
            assert_eq!(lab.status(0, 1.0).vetoes_total, u64::from(!banned));
        }
    }

    #[test]
    fn a_veto_keeps_the_window_so_that_the_next_timeout_asks_again() {
        let mut lab = Lab::new(2);
        lab.fail(0, Failure::Timeout, 0.0);
        lab.attempt(0, 1.0);
        lab.pool
            .failed(BackendId(0), Failure::Timeout, || Some(Duration::ZERO), at(1.0));
        lab.attempt(0, 9.5);
        let actions = lab.pool.failed(BackendId(0), Failure::Timeout, || None, at(9.5));
        assert!(kinds(&actions).contains(&EventKind::Ban));
    }

    #[test]
    fn a_connect_that_succeeded_within_2_s_outweighs_timeouts_without_further_proof() {
        for (second, banned) in [(3.0, false), (3.1, true)] {
            let mut lab = Lab::new(2);
            lab.connect(0, 1.0);
            lab.fail(0, Failure::Timeout, 2.0);
            lab.attempt(0, second);
            lab.pool.failed(BackendId(0), Failure::Timeout, || None, at(second));
            assert_eq!(lab.state(0, second) == State::Banned, banned);
        }
    }

    #[test]
    fn one_refusal_in_the_window_defeats_the_proof_of_life() {
        for failure in [Failure::Refused, Failure::Reset, Failure::Unreachable] {
            let mut lab = Lab::new(2);
            lab.fail(0, failure, 0.0);
            lab.attempt(0, 1.0);
            let actions = lab.pool.failed(BackendId(0), Failure::Timeout, never, at(1.0));
            assert!(kinds(&actions).contains(&EventKind::Ban));
            assert_eq!(
                lab.status(0, 1.0).ejections,
                Ejections {
                    timeout: 1,
                    ..Ejections::default()
                }
            );
        }
    }

    #[test]
    fn a_drained_backend_keeps_its_sessions_and_gets_none_even_when_all_else_fails() {
        let mut lab = Lab::new(2);
        lab.connect(0, 0.0);
        let drained = lab.pool.drain(&address(0), true, at(1.0));
        assert_eq!(
            drained,
            Some(vec![event(0, EventKind::Drain, "drained by an operator")])
        );
        assert_eq!(
            lab.pool.drain(&address(0), true, at(1.5)),
            Some(vec![]),
            "no change, no event"
        );
        assert_eq!(lab.pool.drain(&address(7), true, at(1.5)), None);
        for _ in 0..10 {
            assert_eq!(lab.pick(2.0).id, BackendId(1));
        }
        lab.ban(1, 2.0);
        assert_eq!(lab.pool.pick(CLIENT, &[BackendId(1)], at(2.0)).0, None);
        let status = lab.status(0, 3.0);
        assert_eq!(
            (status.state, status.sessions, status.since_ms),
            (State::Drained, 1, 2000)
        );
        assert_eq!(
            kinds(&lab.pool.drain(&address(0), false, at(4.0)).expect("known")),
            [EventKind::Undrain]
        );
        assert_eq!(lab.pick(4.0).id, BackendId(0));
    }

    #[test]
    fn backups_are_used_only_while_no_primary_is() {
        let mut backends = backends(3);
        backends[1].backup = true;
        backends[2].backup = true;
        let mut lab = Lab {
            pool: Pool::new(SETTINGS, &backends, at(0.0)),
        };
        for _ in 0..10 {
            assert_eq!(lab.pick(0.0).id, BackendId(0));
        }
        let tried = [BackendId(0)];
        let (pick, _) = lab.pool.pick(CLIENT, &tried, at(0.0));
        assert_eq!(pick.map(|pick| (pick.id, pick.fail_open)), Some((BackendId(1), false)));
        lab.ban(0, 1.0);
        assert_eq!(
            [lab.pick(2.0).id, lab.pick(2.0).id],
            [2, 1].map(BackendId),
            "they take turns as well"
        );
        assert!(
            (0..3).any(|_| lab.pick(11.0).probe),
            "a primary whose ban has run out comes before backups"
        );
    }

    #[test]
    fn weights_5_1_1_give_the_smooth_sequence() {
        let mut backends = backends(3);
        backends[0].weight = 5;
        let mut lab = Lab {
            pool: Pool::new(SETTINGS, &backends, at(0.0)),
        };
        let sequence: Vec<u32> = (0..7).map(|_| lab.pick(0.0).id.0).collect();
        assert_eq!(sequence, [0, 0, 1, 0, 2, 0, 0]);
    }

    #[test]
    fn connects_in_flight_count_as_sessions() {
        let mut lab = Lab::with(
            3,
            Settings {
                balance: Balance::LeastConnections,
                ..SETTINGS
            },
        );
        for round in 1..=2 {
            let ids: BTreeSet<BackendId> = (0..3).map(|_| lab.pick(0.0).id).collect();
            assert_eq!(ids.len(), 3, "round {round}");
        }
        lab.pool.connected(BackendId(1), MS, at(0.1));
        lab.pool.connected(BackendId(1), MS, at(0.1));
        lab.pool.closed(BackendId(1), at(0.2));
        assert_eq!(lab.pick(0.3).id, BackendId(1));
        assert_eq!(
            (0..3).map(|index| lab.status(index, 0.3).sessions).collect::<Vec<_>>(),
            [2, 2, 2]
        );
        assert_eq!(lab.status(1, 0.3).connections_total, 2);
        assert_eq!(lab.status(1, 0.3).connect_latency.count(), 2);
    }

    #[test]
    fn a_lost_backend_moves_only_its_own_clients() {
        let source = Settings {
            balance: Balance::Source,
            ..SETTINGS
        };
        let mut lab = Lab::with(5, source.clone());
        let clients: Vec<IpAddr> = (0..200).map(|n| IpAddr::from([198, 51, 100, n])).collect();
        let of = |lab: &mut Lab, client| lab.pool.pick(client, &[], at(1.0)).0.expect("a pick").id;
        let before: Vec<BackendId> = clients.iter().map(|client| of(&mut lab, *client)).collect();
        lab.ban(2, 1.0);
        for (client, before) in clients.iter().zip(&before) {
            assert_eq!(of(&mut lab, *client) == *before, *before != BackendId(2));
        }
        let mut other = Lab::with(5, source);
        for (client, before) in clients.iter().zip(&before) {
            assert_eq!(of(&mut other, *client), *before, "the same in every process");
        }
    }

    #[test]
    fn nginx_passive_health_fails_open_where_nginx_gives_up() {
        let mut lab = Lab::with(
            2,
            Settings {
                passive: NGINX,
                ..SETTINGS
            },
        );
        lab.fail(0, Failure::Refused, 0.0);
        lab.fail(1, Failure::Refused, 1.0);
        let pick = lab.pick(2.0);
        assert_eq!((pick.id, pick.fail_open), (BackendId(0), true));
    }

    #[test]
    fn nginx_failures_cost_turns_until_they_are_regained() {
        let passive = Passive { max_fails: 2, ..NGINX };
        let mut backends = backends(2);
        backends.iter_mut().for_each(|backend| backend.weight = 4);
        let mut lab = Lab {
            pool: Pool::new(Settings { passive, ..SETTINGS }, &backends, at(0.0)),
        };
        for _ in 0..2 {
            lab.pick(0.0);
        }
        lab.pool.failed(BackendId(0), Failure::Refused, never, at(0.0));
        let ids: Vec<u32> = (0..6).map(|_| lab.pick(1.0).id.0).collect();
        assert_eq!(ids, [1, 0, 1, 0, 1, 0]);
        assert_eq!(lab.fail(0, Failure::Refused, 2.0).len(), 3);
        assert_eq!(lab.state(0, 12.9), State::Banned);
        assert!(lab.attempt(0, 13.0).0.probe, "more than 10 whole seconds");
    }

    #[test]
    fn a_reload_keeps_ids_bans_sessions_and_counters_and_changes_weights_in_place() {
        let mut lab = Lab::new(3);
        lab.connect(1, 0.0);
        lab.fail(2, Failure::Refused, 0.0);
        lab.ban(0, 0.0);
        let mut backends = backends(3);
        backends.reverse();
        backends[0].weight = 7;
        backends[2].backup = true;
        assert_eq!(lab.pool.reconfigure(SETTINGS, &backends, at(1.0)), []);
        let status = lab.pool.status(at(1.0));
        assert_eq!(
            status.iter().map(|status| status.backend.as_str()).collect::<Vec<_>>(),
            ["[2001:db8::2]:6443", "[2001:db8::1]:6443", "[2001:db8::]:6443"]
        );
        assert_eq!(
            (status[0].weight, status[2].backup, status[2].state),
            (7, true, State::Banned)
        );
        assert_eq!((status[1].sessions, status[1].connections_total), (1, 1));
        assert_eq!(lab.pool.id_of(&address(2)), [BackendId(2)]);
        lab.fail(2, Failure::Refused, 2.0);
        assert_eq!(lab.state(2, 2.0), State::Banned, "the window was kept");
    }

    #[test]
    fn a_removed_backend_lives_on_until_its_last_session_closes() {
        let mut lab = Lab::new(3);
        lab.connect(2, 0.0);
        lab.ban(2, 0.0);
        lab.pool.drain(&address(2), true, at(0.0));
        lab.pool.reconfigure(SETTINGS, &backends(2), at(1.0));
        assert!((0..10).all(|_| lab.pick(20.0).id != BackendId(2)));
        assert_eq!((lab.pool.status(at(1.0)).len(), lab.pool.targets().len()), (2, 2));
        assert_eq!(lab.pool.id_of(&address(2)), []);
        assert_eq!(lab.pool.name_of(BackendId(2)), Some("[2001:db8::2]:6443".into()));

        lab.pool.reconfigure(SETTINGS, &backends(3), at(2.0));
        let again = lab.status(2, 2.0);
        assert_eq!((again.state, again.sessions), (State::Drained, 1), "the same one again");
        assert_eq!(lab.pool.id_of(&address(2)), [BackendId(2)]);
        assert_eq!(
            kinds(&lab.pool.drain(&address(2), false, at(2.0)).expect("known")),
            [EventKind::Undrain]
        );
        assert_eq!(lab.state(2, 2.0), State::Banned);

        lab.pool.reconfigure(SETTINGS, &backends(2), at(3.0));
        lab.pool.closed(BackendId(2), at(3.0));
        lab.pool.reconfigure(SETTINGS, &backends(3), at(4.0));
        assert_eq!(lab.pool.id_of(&address(2)), [BackendId(3)], "ids are not used again");
        assert_eq!(lab.state(2, 4.0), State::Healthy);
    }

    #[test]
    fn a_connect_in_flight_to_a_removed_backend_ends_without_a_trace() {
        let mut lab = Lab::new(3);
        for _ in 0..4 {
            lab.attempt(2, 0.0);
        }
        lab.pool.reconfigure(SETTINGS, &backends(2), at(1.0));
        assert_eq!(lab.pool.failed(BackendId(2), Failure::Refused, never, at(1.0)), []);
        assert_eq!(lab.pool.failed(BackendId(2), Failure::Refused, never, at(1.0)), []);
        assert_eq!(lab.pool.connected(BackendId(2), MS, at(1.0)), []);
        lab.pool.abandoned(BackendId(2), at(1.0));
        lab.pool.closed(BackendId(2), at(1.0));
        assert_eq!(
            lab.pool
                .retired
                .iter()
                .map(|endpoint| endpoint.share.sessions)
                .collect::<Vec<_>>(),
            [0]
        );
    }

    #[test]
    fn a_name_stands_for_one_backend_per_address() {
        let mut lab = named();
        let unresolved = lab.pool.status(at(0.0));
        assert_eq!((unresolved[1].state, unresolved[1].address), (State::Unresolved, None));
        assert_eq!(unresolved[1].reason, "its name does not resolve");
        assert_eq!((lab.pool.names(), lab.pool.targets().len()), (vec![name()], 1));
        assert!((0..4).all(|_| lab.pick(0.0).id == BackendId(0)));

        let actions = lab.resolve(&[2, 1, 2], 1.0);
        assert_eq!(
            actions,
            [
                event(2, EventKind::Resolve, "cp.fleet:6443 resolves to 192.0.2.1"),
                event(3, EventKind::Resolve, "cp.fleet:6443 resolves to 192.0.2.2"),
            ]
        );
        assert_eq!(lab.resolve(&[1, 2], 2.0), [], "another order is no change");
        assert_eq!(lab.pool.id_of(&name()), [2, 3].map(BackendId));
        assert_eq!(
            lab.pool.name_of(BackendId(3)),
            Some("cp.fleet:6443 (192.0.2.2:6443)".into())
        );
        assert_eq!(
            lab.pool
                .status(at(2.0))
                .iter()
                .map(|status| status.weight)
                .collect::<Vec<_>>(),
            [1, 3, 3]
        );
    }

    #[test]
    fn addresses_that_stay_keep_their_state_and_lost_ones_retire() {
        let mut lab = named();
        lab.resolve(&[1, 2], 0.0);
        lab.connect_id(BackendId(2), 0.0);
        lab.connect_id(BackendId(3), 0.0);
        lab.pool.drain(&name(), true, at(0.0));
        let actions = lab.resolve(&[2, 3], 1.0);
        assert_eq!(kinds(&actions), [EventKind::Resolve, EventKind::Resolve]);
        assert_eq!(
            actions[0],
            event(2, EventKind::Resolve, "cp.fleet:6443 no longer resolves to 192.0.2.1")
        );
        assert_eq!(
            lab.pool.name_of(BackendId(2)),
            Some("cp.fleet:6443 (192.0.2.1:6443)".into())
        );
        let status = lab.pool.status(at(1.0));
        assert_eq!(
            status[1..]
                .iter()
                .map(|status| (status.state, status.sessions))
                .collect::<Vec<_>>(),
            [(State::Drained, 1), (State::Drained, 0)]
        );

        lab.pool.drain(&name(), false, at(1.0));
        let actions = lab.resolve(&[], 2.0);
        assert_eq!(kinds(&actions), [EventKind::Resolve; 3]);
        assert_eq!(lab.pool.status(at(2.0))[1].state, State::Unresolved);
        lab.resolve(&[1, 2, 3], 3.0);
        let ids = lab.pool.id_of(&name());
        assert_eq!(ids[..2], [2, 3].map(BackendId), "they still had sessions");
        assert!(ids[2] > BackendId(5));
        assert!(
            lab.pool
                .status(at(3.0))
                .iter()
                .all(|status| status.state == State::Healthy)
        );
    }

    #[test]
    fn resolving_what_is_no_name_changes_nothing() {
        let mut lab = named();
        assert_eq!(lab.pool.set_addresses(&address(0), &[socket(1)], at(0.0)), []);
        let other = Address::Name {
            host: "other.fleet".into(),
            port: 6443,
        };
        assert_eq!(lab.pool.set_addresses(&other, &[socket(1)], at(0.0)), []);
        assert_eq!(lab.pool.status(at(0.0)).len(), 2);
    }

    #[test]
    fn checks_take_a_backend_down_with_its_sessions_and_bring_it_up() {
        let mut lab = Lab::new(2);
        assert_eq!(kinds(&lab.check(0, refused(), 0.0)), [EventKind::Check]);
        assert_eq!(lab.check(0, refused(), 2.0), []);
        let actions = lab.check(0, refused(), 4.0);
        assert_eq!(
            actions,
            [
                event(0, EventKind::Down, "3 checks failed in a row: connect refused"),
                Action::ResetSessions(BackendId(0))
            ]
        );
        let status = lab.status(0, 5.0);
        assert_eq!(
            (status.state, status.since_ms, status.ejections.check),
            (State::Down, 1000, 1)
        );
        assert_eq!(status.reason, "3 checks failed in a row: connect refused");
        assert!((0..4).all(|_| lab.pick(5.0).id == BackendId(1)));
        assert_eq!(lab.pool.targets().len(), 2, "checks go on");
        assert_eq!(kinds(&lab.check(0, CheckOutcome::Good, 6.0)), [EventKind::Check]);
        assert_eq!(kinds(&lab.check(0, CheckOutcome::Good, 8.0)), [EventKind::Up]);
        assert_eq!(lab.state(0, 8.0), State::Healthy);
    }

    #[test]
    fn a_check_that_timed_out_needs_silence_on_the_connections_too() {
        let mut lab = Lab::new(2);
        for second in [0.0, 2.0] {
            lab.check(0, timed_out(), second);
        }
        let proof = || Some(Duration::from_secs(1));
        let actions = lab.pool.checked(BackendId(0), timed_out(), proof, at(4.0));
        assert_eq!(kinds(&actions), [EventKind::Veto], "it sent something a second ago");
        assert_eq!(
            (lab.state(0, 4.0), lab.status(0, 4.0).vetoes_total),
            (State::Healthy, 1)
        );
        assert_eq!(lab.pool.checked(BackendId(0), timed_out(), proof, at(6.0)), []);
        assert_eq!(lab.status(0, 6.0).vetoes_total, 2);
        // A connect proves nothing here: the kernel of a stopped server still accepts.
        lab.connect(0, 7.0);
        assert_eq!(kinds(&lab.check(0, timed_out(), 8.0)), [EventKind::Down]);
    }

    #[test]
    fn a_backend_that_is_not_ready_keeps_its_sessions_and_gets_no_new_ones() {
        let mut lab = Lab::new(2);
        lab.connect(0, 0.0);
        let actions = lab.check(0, CheckOutcome::NotReady("readiness check answers 500".into()), 1.0);
        assert_eq!(actions, [event(0, EventKind::Check, "readiness check answers 500")]);
        assert!((0..4).all(|_| lab.pick(1.0).id == BackendId(1)));
        let status = lab.status(0, 1.0);
        assert_eq!((status.state, status.sessions), (State::NotReady, 1));
        assert_eq!(status.reason, "readiness check answers 500");
        assert_eq!(kinds(&lab.check(0, CheckOutcome::Good, 2.0)), [EventKind::Check]);
        assert_eq!(lab.state(0, 2.0), State::Healthy);
    }

    #[test]
    fn good_checks_since_the_ban_end_it_early() {
        let mut lab = Lab::new(2);
        for second in [0.0, 1.0, 2.0] {
            lab.check(0, CheckOutcome::Good, second);
        }
        lab.ban(0, 2.0);
        assert_eq!(
            lab.check(0, CheckOutcome::Good, 3.0),
            [],
            "those before the ban say nothing"
        );
        let up = event(0, EventKind::Up, "2 checks good in a row; the ban ends early");
        assert_eq!(lab.check(0, CheckOutcome::Good, 4.0), [up]);
        assert_eq!(lab.state(0, 4.0), State::Healthy);
    }

    #[test]
    fn verdicts_are_forgotten_with_the_checks_that_gave_them() {
        let mut lab = Lab::new(3);
        lab.down(0, 0.0);
        lab.check(1, CheckOutcome::NotReady("answers 500".into()), 0.0);
        let off = Settings {
            rounds: None,
            ..SETTINGS
        };
        assert_eq!(
            kinds(&lab.pool.reconfigure(off.clone(), &backends(3), at(1.0))),
            [EventKind::Up; 2]
        );
        assert!(
            lab.pool
                .status(at(1.0))
                .iter()
                .all(|status| status.state == State::Healthy)
        );
        assert_eq!(lab.pool.reconfigure(off, &backends(3), at(2.0)), []);
        assert_eq!(lab.check(0, refused(), 2.0), [], "an answer that was under way");
    }

    #[test]
    fn failed_connects_to_a_backend_that_is_down_are_no_news() {
        let mut lab = Lab::new(2);
        lab.down(0, 0.0);
        lab.down(1, 0.0);
        for _ in 0..10 {
            lab.fail(0, Failure::Refused, 1.0);
        }
        let status = lab.status(0, 1.0);
        assert_eq!(
            (status.state, status.ejections.refused, status.connect_failures_total),
            (State::Down, 0, 10)
        );
    }

    #[test]
    fn states_take_precedence_in_their_order() {
        let mut lab = Lab::new(2);
        lab.check(0, CheckOutcome::NotReady("answers 500".into()), 0.0);
        assert_eq!(lab.state(0, 0.0), State::NotReady);
        lab.ban(0, 0.0);
        assert_eq!(lab.state(0, 0.0), State::Banned);
        for _ in 0..3 {
            lab.check(0, refused(), 0.0);
        }
        assert_eq!(lab.state(0, 0.0), State::Down);
        lab.pool.drain(&address(0), true, at(0.0));
        assert_eq!(lab.state(0, 0.0), State::Drained);
    }

    #[test]
    fn healthy_is_one_healthy_backend_or_one_whose_ban_has_run_out_unprobed() {
        let mut lab = Lab::new(2);
        assert!(lab.pool.healthy(at(0.0)));
        lab.ban(0, 0.0);
        assert!(lab.pool.healthy(at(0.0)));
        lab.pool.drain(&address(1), true, at(0.0));
        assert!(!lab.pool.healthy(at(9.9)));
        assert!(lab.pool.healthy(at(10.0)));
        lab.attempt(0, 10.0);
        assert!(!lab.pool.healthy(at(10.0)));
    }

    #[test]
    fn ids_that_mean_nothing_are_ignored() {
        let mut lab = Lab::new(2);
        for id in [BackendId(0), BackendId(99)] {
            assert_eq!(lab.pool.connected(id, MS, at(0.0)), []);
            assert_eq!(lab.pool.failed(id, Failure::Refused, never, at(0.0)), []);
            lab.pool.abandoned(id, at(0.0));
            lab.pool.closed(id, at(0.0));
        }
        assert_eq!(lab.pool.checked(BackendId(99), refused(), never, at(0.0)), []);
        assert_eq!(lab.pool.name_of(BackendId(99)), None);
        assert_eq!(lab.status(0, 0.0).sessions, 0);
    }

    #[test]
    fn a_backend_listed_twice_counts_once() {
        let mut backends = backends(2);
        backends.extend(self::backends(2));
        assert_eq!(Pool::new(SETTINGS, &backends, at(0.0)).status(at(0.0)).len(), 2);
    }

    #[test]
    fn a_snapshot_brings_back_everything_but_sessions() {
        for passive in [SETTINGS.passive, NGINX] {
            let settings = Settings { passive, ..SETTINGS };
            let mut lab = Lab::with(4, settings.clone());
            lab.connect(0, 0.0);
            lab.ban(0, 1.0);
            lab.down(1, 1.0);
            lab.check(2, CheckOutcome::NotReady("answers 500".into()), 1.0);
            let mut heir = Lab::with(4, settings);
            heir.pool.restore(&through_json(&lab.pool.snapshot(at(2.0))), at(3.0));
            let mut wanted = lab.pool.status(at(3.0));
            wanted[0].sessions = 0;
            assert_eq!(heir.pool.status(at(3.0)), wanted);
            assert!(heir.attempt(0, 12.0).0.probe, "the ban ends when it would have");
        }
    }

    #[test]
    fn a_window_survives_a_restart() {
        let mut lab = Lab::new(2);
        lab.fail(0, Failure::Refused, 0.0);
        let mut heir = Lab::new(2);
        heir.pool.restore(&through_json(&lab.pool.snapshot(at(1.0))), at(1.0));
        heir.attempt(0, 9.0);
        let actions = heir.pool.failed(BackendId(0), Failure::Timeout, never, at(9.0));
        assert!(
            kinds(&actions).contains(&EventKind::Ban),
            "and knows that it holds a refusal"
        );
    }

    #[test]
    fn a_probe_under_way_comes_back_as_a_ban_that_has_run_out() {
        for passive in [SETTINGS.passive, NGINX] {
            let settings = Settings { passive, ..SETTINGS };
            let mut lab = Lab::with(2, settings.clone());
            lab.ban(0, 0.0);
            assert!(lab.attempt(0, 11.0).0.probe);
            let mut heir = Lab::with(2, settings);
            heir.pool.restore(&through_json(&lab.pool.snapshot(at(11.5))), at(11.5));
            assert_eq!(heir.state(0, 11.5), State::Banned);
            assert!(heir.attempt(0, 11.5).0.probe);
        }
    }

    #[test]
    fn names_are_known_again_before_dns_answers() {
        let mut lab = named();
        lab.resolve(&[1, 2], 0.0);
        lab.ban_id(BackendId(3), 0.0);
        let mut heir = named();
        heir.pool.restore(&through_json(&lab.pool.snapshot(at(1.0))), at(1.0));
        let states: Vec<State> = heir.pool.status(at(1.0)).iter().map(|status| status.state).collect();
        assert_eq!(states, [State::Healthy, State::Healthy, State::Banned]);
        assert_eq!(heir.resolve(&[1, 2], 2.0), [], "no change");
    }

    #[test]
    fn a_snapshot_of_another_version_and_of_other_backends_is_read_as_far_as_it_goes() {
        let text = r#"{ "novelty": 1, "backends": [
            { "backend": "[2001:db8::]:6443", "address": "[2001:db8::]:6443", "connections_total": 5, "novelty": {},
              "latency_buckets": [1, 2], "record": { "ban": { "cause": "connect refused", "novelty": [] } } },
            { "backend": "gone:1", "address": "192.0.2.9:1" },
            {}
        ] }"#;
        let snapshot: Snapshot = serde_json::from_str(text).expect("it reads");
        let mut lab = Lab::new(2);
        lab.pool.restore(&snapshot, at(0.0));
        let status = lab.status(0, 0.0);
        assert_eq!((status.connections_total, status.state), (5, State::Banned));
        assert_eq!(status.connect_latency, Histogram::default());
        assert_eq!(
            serde_json::from_str::<Snapshot>("{}").expect("it reads"),
            Snapshot::default()
        );
    }

    #[test]
    fn bans_in_a_row_grow_and_say_so_and_shrink_in_good_standing() {
        let mut lab = Lab::with(2, growing());
        lab.ban(0, 0.0);
        lab.attempt(0, 10.0);
        let actions = lab.pool.failed(BackendId(0), Failure::Refused, never, at(10.0));
        let reason = "connect refused, the probe failed; banned for 20 s, the 2nd time in a row";
        assert_eq!(actions[1], event(0, EventKind::Ban, reason));
        assert_eq!(lab.status(0, 13.0).reason, format!("{reason}; probed again in 17 s"));
        let mut heir = Lab::with(2, growing());
        heir.pool.restore(&through_json(&lab.pool.snapshot(at(13.0))), at(13.0));
        heir.pool.reconfigure(growing(), &backends(2), at(13.0));
        assert_eq!(heir.status(0, 13.0).reason, format!("{reason}; probed again in 17 s"));
        assert!(heir.attempt(0, 30.0).0.probe);
        heir.pool.connected(BackendId(0), MS, at(30.0));
        heir.ban(0, 35.0);
        assert!(heir.status(0, 35.0).reason.contains("40 s, the 3rd time in a row"));
        heir.connect(0, 80.0);
        heir.ban(0, 150.0);
        assert!(
            heir.status(0, 150.0)
                .reason
                .ends_with("within 10 s; probed again in 10 s")
        );
    }

    #[test]
    fn a_backend_that_comes_back_gets_its_share_bit_by_bit() {
        for balance in [Balance::RoundRobin, Balance::LeastConnections, Balance::RandomTwo] {
            for way in ["ban", "down", "drain"] {
                let mut lab = Lab::with(3, Settings { balance, ..growing() });
                lab.leave_and_return(way, 100.0);
                assert_eq!(lab.status(0, 100.0).slow_start_remaining, Some(30), "{way}");
                assert_eq!(lab.status(0, 112.5).reason, "in use; full share in 18 s");
                let shares = [100.0, 115.0, 130.0].map(|second| lab.share_of_1000(0, second));
                // Its weight is 0.1, 0.55 and 1 of those of the other two.
                for (share, fair) in shares.into_iter().zip([48_u64, 216, 333]) {
                    assert!(share.abs_diff(fair) <= 40, "{balance:?}, {way}: {shares:?}");
                }
                assert_eq!(lab.status(0, 130.0).slow_start_remaining, None);
                assert_eq!(lab.status(0, 130.0).reason, "in use");
            }
        }
    }

    #[test]
    fn nothing_starts_slowly_that_has_not_been_away() {
        let mut lab = Lab::with(2, growing());
        assert_eq!(lab.status(0, 0.0).slow_start_remaining, None);
        lab.pool.reconfigure(growing(), &backends(3), at(1.0));
        assert_eq!(lab.status(2, 1.0).slow_start_remaining, None);
        lab.connect(2, 1.0);
        lab.check(2, CheckOutcome::Good, 1.0);
        assert_eq!(lab.status(2, 1.0).slow_start_remaining, None);
        // It was alive all the time, and kept its sessions.
        lab.check(2, CheckOutcome::NotReady("answers 500".into()), 1.0);
        lab.check(2, CheckOutcome::Good, 2.0);
        assert_eq!(lab.status(2, 2.0).slow_start_remaining, None);
        let mut heir = Lab::with(3, growing());
        heir.pool.restore(&lab.pool.snapshot(at(2.0)), at(2.0));
        assert_eq!(heir.status(2, 2.0).slow_start_remaining, None);
    }

    #[test]
    fn a_server_that_was_down_and_is_not_ready_at_first_starts_slowly_when_it_is() {
        let mut lab = Lab::with(2, growing());
        lab.down(0, 0.0);
        for second in [10.0, 12.0] {
            lab.check(0, CheckOutcome::NotReady("answers 500".into()), second);
        }
        assert_eq!(
            (lab.state(0, 12.0), lab.status(0, 12.0).slow_start_remaining),
            (State::NotReady, None)
        );
        lab.check(0, CheckOutcome::Good, 14.0);
        assert_eq!(lab.status(0, 14.0).slow_start_remaining, Some(30));
    }

    #[test]
    fn a_slow_start_survives_reload_and_hand_over_and_ends_with_its_key() {
        let mut lab = Lab::with(3, growing());
        lab.leave_and_return("ban", 100.0);
        lab.pool.reconfigure(growing(), &backends(3), at(110.0));
        assert_eq!(lab.status(0, 110.0).slow_start_remaining, Some(20));
        let mut heir = Lab::with(3, growing());
        heir.pool
            .restore(&through_json(&lab.pool.snapshot(at(110.0))), at(110.0));
        assert_eq!(heir.status(0, 110.0).slow_start_remaining, Some(20));
        let none = Settings {
            slow_start: None,
            ..growing()
        };
        heir.pool.reconfigure(none, &backends(3), at(110.0));
        assert_eq!(heir.status(0, 110.0).slow_start_remaining, None);
        assert!(heir.share_of_1000(0, 110.0) > 300);
    }

    #[test]
    fn a_hedge_goes_to_a_healthy_backend_that_was_not_tried_and_never_probes() {
        let mut lab = Lab::new(4);
        let first = lab.pick(0.0).id;
        for _ in 0..10 {
            let pick = lab.hedge(&[first], 0.25).expect("three are healthy");
            assert!(pick.id != first && !pick.probe && !pick.fail_open);
        }
        lab.ban(1, 1.0);
        lab.down(2, 1.0);
        lab.check(3, CheckOutcome::NotReady("answers 500".into()), 1.0);
        let tried = [lab.id(0)];
        assert_eq!(lab.hedge(&tried, 5.0), None);
        assert_eq!(
            lab.hedge(&tried, 11.0),
            None,
            "the ban has run out, but a hedge is no probe"
        );
        assert_eq!(lab.hedge(&[], 11.0).map(|pick| pick.id), Some(lab.id(0)));
        lab.pool.drain(&address(0), true, at(11.0));
        assert_eq!(lab.hedge(&[], 11.0), None);
    }

    #[test]
    fn a_hedge_goes_to_a_backup_only_if_no_primary_is_left() {
        let mut backends = backends(3);
        backends[2].backup = true;
        let mut lab = Lab {
            pool: Pool::new(SETTINGS, &backends, at(0.0)),
        };
        for _ in 0..5 {
            assert_eq!(lab.hedge(&[BackendId(0)], 0.0).map(|pick| pick.id), Some(BackendId(1)));
        }
        let pick = lab.hedge(&[BackendId(0), BackendId(1)], 0.0);
        assert_eq!(pick.map(|pick| pick.id), Some(BackendId(2)));
    }

    #[test]
    fn the_loser_of_a_hedge_is_slow_and_not_failed() {
        let mut lab = Lab::new(2);
        let first = lab.pick(0.0).id;
        let second = lab.hedge(&[first], 0.25).expect("another one").id;
        assert_eq!((lab.status(0, 0.3).sessions, lab.status(1, 0.3).sessions), (1, 1));
        assert_eq!(lab.pool.connected(second, 10 * MS, at(0.26)), []);
        let actions = lab.pool.slow(first, Some(400 * MS), at(0.4));
        let reason = "connected after 400 ms; another backend was faster";
        assert_eq!(actions, [event(first.0, EventKind::Slow, reason)]);
        let (loser, winner) = (lab.status(0, 0.5), lab.status(1, 0.5));
        assert_eq!(
            (loser.sessions, loser.slow_total, loser.connect_failures_total),
            (0, 1, 0)
        );
        assert_eq!((loser.connections_total, loser.connect_latency.count()), (0, 1));
        assert_eq!(
            (winner.sessions, winner.hedges_total, winner.connections_total),
            (1, 1, 1)
        );
        assert_eq!(lab.pool.slow(first, None, at(0.5)), [], "it has no connect under way");
    }

    #[test]
    fn slowness_is_told_once_in_a_second() {
        let mut lab = Lab::new(2);
        let mut told = 0;
        for tenth in 0..20 {
            let seconds = f64::from(tenth) / 10.0;
            let id = lab.attempt(0, seconds).0.id;
            let took = (tenth % 2 == 0).then_some(400 * MS);
            told += lab.pool.slow(id, took, at(seconds)).len();
        }
        assert_eq!(
            (told, lab.status(0, 2.0).slow_total, lab.status(0, 2.0).sessions),
            (2, 20, 0)
        );
    }

    #[test]
    fn a_probe_that_another_backend_overtook_still_ends_the_ban() {
        let mut lab = Lab::new(2);
        lab.ban(0, 0.0);
        assert!(lab.attempt(0, 10.0).0.probe);
        lab.hedge(&[BackendId(0)], 10.25).expect("the other one");
        let actions = lab.pool.slow(BackendId(0), Some(300 * MS), at(10.3));
        assert_eq!(kinds(&actions), [EventKind::Slow, EventKind::Up]);
        assert_eq!(lab.state(0, 10.3), State::Healthy);
        lab.ban(0, 20.0);
        assert!(lab.attempt(0, 30.0).0.probe);
        assert_eq!(kinds(&lab.pool.slow(BackendId(0), None, at(30.3))), [EventKind::Slow]);
        assert!(
            lab.attempt(0, 30.4).0.probe,
            "nobody waited for its answer: the next one probes"
        );
    }

    #[test]
    fn surplus_sessions_move_at_a_tenth_per_minute_until_all_are_within_1_25_of_their_share() {
        let mut lab = Lab::with(3, least());
        lab.open(0, 300);
        lab.open(1, 300);
        let mut minutes: Vec<u64> = Vec::new();
        let mut second = 0.0;
        while second < 3600.0 {
            let before: u64 = (0..2).map(|index| lab.sessions(index)).sum();
            // A minute, asked every 6 s; each client that is cut connects again.
            for _ in 0..10 {
                lab.shed_and_reconnect(second);
                second += 6.0;
            }
            let after: u64 = (0..2).map(|index| lab.sessions(index)).sum();
            let surplus = before - 400;
            assert!(
                before - after <= surplus / 10 + 1,
                "{before} to {after}: more than a tenth"
            );
            minutes.push(before - after);
        }
        let sessions = [0, 1, 2].map(|index| lab.sessions(index));
        assert_eq!(sessions.iter().sum::<u64>(), 600);
        assert!(
            (160..=165).contains(&sessions[2]),
            "{sessions:?}: within 200 / 1.25, and no further"
        );
        let still = minutes.iter().filter(|moved| **moved > 0).count();
        assert!((10..=20).contains(&still), "{minutes:?}");
        assert_eq!(
            lab.status(0, second).shed_total + lab.status(1, second).shed_total,
            sessions[2]
        );
    }

    #[test]
    fn few_sessions_move_too_one_in_a_minute() {
        let mut lab = Lab::with(3, least());
        lab.open(0, 5);
        lab.open(1, 4);
        let moved: Vec<u32> = (0..40).map(|n| lab.shed_and_reconnect(f64::from(n) * 6.0)).collect();
        assert_eq!(moved.iter().sum::<u32>(), 3, "{moved:?}");
        let first = moved.iter().position(|count| *count > 0);
        assert!(first.is_some_and(|asked| (10..=11).contains(&asked)), "{moved:?}");
        assert_eq!([0, 1, 2].map(|index| lab.sessions(index)), [3, 3, 3]);
    }

    #[test]
    fn shares_are_by_weight_and_only_healthy_backends_that_started_count() {
        // 10:1 is fair with these weights.
        let mut uneven = backends(2);
        uneven[0].weight = 10;
        let mut lab = Lab {
            pool: Pool::new(least(), &uneven, at(0.0)),
        };
        lab.open(0, 100);
        lab.open(1, 10);
        assert_eq!(lab.surplus_of_a_minute(0.0), []);
        lab.pool.reconfigure(least(), &backends(2), at(60.0));
        assert_eq!(lab.surplus_of_a_minute(60.0), [(BackendId(0), 4)]);
        // Nobody to move to: out, drained, not ready, or just back.
        lab.ban(1, 130.0);
        assert_eq!(lab.surplus_of_a_minute(130.0), []);
        lab.connect(1, 190.0);
        lab.pool.closed(BackendId(1), at(190.0));
        assert_eq!(
            lab.surplus_of_a_minute(190.0),
            [(BackendId(0), 4)],
            "no slow start here"
        );
        lab.check(1, CheckOutcome::NotReady("answers 500".into()), 250.0);
        assert_eq!(lab.surplus_of_a_minute(250.0), []);
        lab.check(1, CheckOutcome::Good, 310.0);
        lab.pool.drain(&address(1), true, at(310.0));
        assert_eq!(lab.surplus_of_a_minute(310.0), []);
        let slowly = Settings {
            slow_start: Some(Duration::from_secs(30)),
            ..least()
        };
        lab.pool.reconfigure(slowly, &backends(2), at(370.0));
        lab.pool.drain(&address(1), false, at(370.0));
        for second in [370.0, 380.0, 399.0] {
            assert_eq!(lab.pool.surplus(at(second)), []);
        }
        assert_eq!(lab.pool.surplus(at(400.0)), []);
        assert_eq!(
            lab.pool.surplus(at(430.0)),
            [(BackendId(0), 2)],
            "half a minute after its end"
        );
    }

    #[test]
    fn nothing_is_shed_over_trifles_or_small_differences() {
        for (sessions, moves) in [([3, 0], false), ([4, 0], true), ([110, 90], false), ([130, 70], true)] {
            let mut lab = Lab::with(2, least());
            lab.open(0, sessions[0]);
            lab.open(1, sessions[1]);
            assert_eq!(!lab.surplus_of_a_minute(0.0).is_empty(), moves, "{sessions:?}");
        }
    }

    #[test]
    fn shed_sessions_are_counted_and_told_once_in_a_minute() {
        let mut lab = Lab::new(2);
        let one = "1 session closed, so that its client goes to a backend with fewer";
        let more = "5 sessions closed, so that their clients go to a backend with fewer";
        assert_eq!(lab.pool.shed(BackendId(0), 0, at(0.0)), []);
        assert_eq!(
            lab.pool.shed(BackendId(0), 1, at(0.0)),
            [event(0, EventKind::Shed, one)]
        );
        assert_eq!(lab.pool.shed(BackendId(0), 2, at(6.0)), []);
        assert_eq!(
            lab.pool.shed(BackendId(0), 3, at(60.0)),
            [event(0, EventKind::Shed, more)]
        );
        assert_eq!(lab.pool.shed(BackendId(9), 3, at(60.0)), []);
        assert_eq!(lab.status(0, 60.0).shed_total, 6);
        let mut heir = Lab::new(2);
        heir.pool.restore(&through_json(&lab.pool.snapshot(at(60.0))), at(60.0));
        assert_eq!(heir.status(0, 60.0).shed_total, 6);
    }

    #[test]
    fn an_adopted_session_counts_until_it_is_closed_whoever_has_its_backend_now() {
        let mut old = named();
        old.resolve(&[1, 2], 0.0);
        let ids: Vec<BackendId> = old.pool.targets().into_iter().map(|(id, ..)| id).collect();
        let places = ids.iter().map(|id| old.pool.place_of(*id).expect("an address"));
        let places: Vec<(Address, SocketAddr)> = places.collect();
        assert_eq!(old.pool.place_of(BackendId(99)), None);

        let mut heir = named();
        heir.resolve(&[2, 3], 0.0);
        let adopted: Vec<BackendId> = places
            .iter()
            .map(|(name, at_)| heir.pool.adopt(name, *at_, at(1.0)))
            .collect();
        let again = heir.pool.adopt(&places[1].0, places[1].1, at(1.0));
        assert_eq!(again, adopted[1], "the same backend, also if it is retired");
        for (id, place) in adopted.iter().zip(&places) {
            assert_eq!(heir.pool.place_of(*id).as_ref(), Some(place));
        }
        let live: Vec<(u64, u64)> = heir
            .pool
            .status(at(1.0))
            .iter()
            .map(|status| (status.sessions, status.connections_total))
            .collect();
        assert_eq!(
            live,
            [(1, 0), (1, 0), (0, 0)],
            "the fixed one, .2 and .3; .1 is retired"
        );
        // It resolves to .1 again: the same endpoint, with both sessions.
        heir.resolve(&[1], 2.0);
        assert_eq!(heir.pool.status(at(2.0))[1].sessions, 2);
        for id in adopted.iter().chain([&again]) {
            heir.pool.closed(*id, at(3.0));
        }
        assert!(heir.pool.status(at(3.0)).iter().all(|status| status.sessions == 0));
        heir.resolve(&[1], 4.0);
        let gone: Address = "192.0.2.77:6443".parse().expect("an address");
        let id = heir
            .pool
            .adopt(&gone, "192.0.2.77:6443".parse().expect("an address"), at(4.0));
        assert_eq!(heir.pool.name_of(id).as_deref(), Some("192.0.2.77:6443"));
        heir.pool.closed(id, at(5.0));
        heir.pool.reconfigure(SETTINGS, &backends(1), at(5.0));
        assert_eq!(heir.pool.name_of(id), None);
    }

    #[test]
    fn a_flapping_backend_costs_few_clients_a_failure_and_is_never_hit_by_all() {
        let mut lab = Lab::with(
            3,
            Settings {
                balance: Balance::LeastConnections,
                ..growing()
            },
        );
        // 10 clients per second for 100 s; the first backend is there every other second; sessions last 5 s.
        let mut running: VecDeque<(f64, BackendId)> = VecDeque::new();
        let (mut failures, mut in_second) = (0, Vec::new());
        for number in 0..1000 {
            let now = f64::from(number) / 10.0;
            while let Some((_, id)) = running.front().copied().filter(|(end, _)| *end <= now) {
                lab.pool.closed(id, at(now));
                running.pop_front();
            }
            if number % 10 == 0 {
                in_second.push(0);
            }
            let mut tried = Vec::new();
            loop {
                let pick = lab.pool.pick(CLIENT, &tried, at(now)).0.expect("two are always there");
                if pick.id == BackendId(0) {
                    *in_second.last_mut().expect("pushed above") += 1;
                }
                if pick.id == BackendId(0) && now as u64 % 2 == 1 {
                    lab.pool.failed(pick.id, Failure::Refused, || None, at(now));
                    tried.push(pick.id);
                    failures += 1;
                } else {
                    lab.pool.connected(pick.id, MS, at(now));
                    running.push_back((now + 5.0, pick.id));
                    break;
                }
            }
        }
        assert!(
            (1..=20).contains(&failures),
            "{failures} of 1000 clients had to try twice"
        );
        // Before its first failure it has an equal share.
        let most = in_second.iter().skip(2).max();
        assert!(
            most.is_some_and(|most| *most <= 4),
            "of 10 clients in a second: {in_second:?}"
        );
    }

    #[test]
    fn when_all_were_down_and_come_back_the_first_is_not_hit_by_everybody_at_once() {
        for balance in [
            Balance::LeastConnections,
            Balance::RoundRobin,
            Balance::RandomTwo,
            Balance::Source,
        ] {
            let mut lab = Lab::with(3, Settings { balance, ..growing() });
            for round in 0..5 {
                for index in 0..3 {
                    lab.ban(index, f64::from(round) * 70.0);
                }
            }
            // All are there again at 290. 1000 clients come at once, and nobody has answered yet.
            let mut picks = Vec::new();
            for number in 0..1000_u32 {
                let client = IpAddr::from([198, 51, (number / 250) as u8, (number % 250) as u8]);
                picks.push(lab.pool.pick(client, &[], at(290.0)).0.expect("one").id);
            }
            for index in 0..3 {
                let share = picks.iter().filter(|id| **id == lab.id(index)).count();
                assert!((300..=370).contains(&share), "{balance:?}: {share} of 1000 at once");
            }
            picks.into_iter().for_each(|id| {
                lab.pool.connected(id, MS, at(290.1));
            });
            for index in 0..3 {
                assert_eq!(lab.state(index, 290.1), State::Healthy);
            }
        }
    }

    #[test]
    fn when_all_were_down_and_one_comes_back_the_others_are_tried_at_once() {
        let mut lab = Lab::with(
            3,
            Settings {
                balance: Balance::LeastConnections,
                ..growing()
            },
        );
        for round in 0..5 {
            for index in 0..3 {
                lab.ban(index, f64::from(round) * 70.0);
            }
        }
        // 1000 clients one after the other, 10 in a second; the bans would last until 340.
        for number in 0..1000_u32 {
            let now = 290.0 + f64::from(number) / 10.0;
            let pick = lab.pool.pick(CLIENT, &[], at(now)).0.expect("one");
            lab.pool.connected(pick.id, MS, at(now));
            if number == 2 {
                assert!((0..3).all(|index| lab.state(index, now) == State::Healthy));
            }
            if number >= 99 {
                let sessions = [0, 1, 2].map(|index| lab.sessions(index));
                let most = sessions.iter().max().copied().unwrap_or_default();
                assert!(most <= u64::from(number / 2), "client {number}: {sessions:?}");
            }
        }
        let shares = [0, 1, 2].map(|index| lab.sessions(index));
        assert!(shares.iter().all(|share| (330..=337).contains(share)), "{shares:?}");
    }

    const SETTINGS: Settings = Settings {
        balance: Balance::RoundRobin,
        passive: Passive {
            max_fails: 2,
            fail_timeout: Duration::from_secs(10),
            max_ban: Duration::from_secs(10),
            nginx: false,
        },
        connect_timeout: Duration::from_secs(1),
        on_down: OnDown::Reset,
        rounds: Some(Rounds { rise: 2, fall: 3 }),
        slow_start: None,
        seed: 1,
    };
    const NGINX: Passive = Passive {
        max_fails: 1,
        fail_timeout: Duration::from_secs(10),
        max_ban: Duration::from_secs(10),
        nginx: true,
    };
    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 1));
    const MS: Duration = Duration::from_millis(1);

    /// As configured by default.
    fn growing() -> Settings {
        Settings {
            passive: Passive {
                max_ban: Duration::from_secs(60),
                ..SETTINGS.passive
            },
            slow_start: Some(Duration::from_secs(30)),
            ..SETTINGS
        }
    }

    fn least() -> Settings {
        Settings {
            balance: Balance::LeastConnections,
            ..SETTINGS
        }
    }

    /// `seconds` after t0, which is a whole second after boot.
    fn at(seconds: f64) -> Moment {
        Moment::new(Duration::from_secs(1000) + Duration::from_secs_f64(seconds))
    }

    /// A proof that nobody may ask for.
    fn never() -> Option<Duration> {
        panic!("no proof is asked for")
    }

    /// `[2001:db8::INDEX]:6443`.
    fn address(index: u16) -> Address {
        format!("[2001:db8::{index:x}]:6443").parse().expect("an address")
    }

    fn backends(count: u16) -> Vec<config::Backend> {
        (0..count)
            .map(|index| config::Backend {
                address: address(index),
                weight: 1,
                backup: false,
            })
            .collect()
    }

    fn name() -> Address {
        "cp.fleet:6443".parse().expect("a name")
    }

    fn socket(last: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, last], 6443))
    }

    /// A fixed backend and a name of weight 3 that does not resolve yet.
    fn named() -> Lab {
        let mut backends = backends(1);
        backends.push(config::Backend {
            address: name(),
            weight: 3,
            backup: false,
        });
        Lab {
            pool: Pool::new(SETTINGS, &backends, at(0.0)),
        }
    }

    fn event(id: u32, kind: EventKind, reason: &str) -> Action {
        Action::Event {
            id: BackendId(id),
            kind,
            reason: reason.into(),
        }
    }

    fn kinds(actions: &[Action]) -> Vec<EventKind> {
        let kind = |action: &Action| match action {
            Action::Event { kind, .. } => Some(*kind),
            Action::ResetSessions(_) => None,
        };
        actions.iter().filter_map(kind).collect()
    }

    fn refused() -> CheckOutcome {
        CheckOutcome::Bad {
            reason: "connect refused".into(),
            timeout: false,
        }
    }

    fn timed_out() -> CheckOutcome {
        CheckOutcome::Bad {
            reason: "no answer within 1 s".into(),
            timeout: true,
        }
    }

    fn through_json(snapshot: &Snapshot) -> Snapshot {
        let text = serde_json::to_string(snapshot).expect("it serializes");
        let read = serde_json::from_str(&text).expect("it reads");
        assert_eq!(*snapshot, read);
        read
    }

    /// A pool and short words for what happens to it. Indices are those of [`backends`].
    struct Lab {
        pool: Pool,
    }

    impl Lab {
        fn new(count: u16) -> Self {
            Self::with(count, SETTINGS)
        }

        fn with(count: u16, settings: Settings) -> Self {
            Self {
                pool: Pool::new(settings, &backends(count), at(0.0)),
            }
        }

        fn id(&self, index: u16) -> BackendId {
            self.pool.id_of(&address(index))[0]
        }

        fn pick(&mut self, seconds: f64) -> Pick {
            self.pool.pick(CLIENT, &[], at(seconds)).0.expect("a pick")
        }

        /// A connection that has tried all others.
        fn attempt(&mut self, index: u16, seconds: f64) -> (Pick, Vec<Action>) {
            let id = self.id(index);
            let (pick, actions) = self.attempt_id(id, seconds);
            (pick.expect("a pick"), actions)
        }

        fn attempt_id(&mut self, id: BackendId, seconds: f64) -> (Option<Pick>, Vec<Action>) {
            let ids = self.pool.targets().into_iter().map(|(id, ..)| id);
            let tried: Vec<BackendId> = ids.filter(|other| *other != id).collect();
            self.pool.pick(CLIENT, &tried, at(seconds))
        }

        /// The same for a moment in which the pick may be missing; its session is released at once.
        fn pick_of(&mut self, index: u16, seconds: f64) -> Option<Pick> {
            let id = self.id(index);
            let pick = self.attempt_id(id, seconds).0;
            self.pool.abandoned(id, at(seconds));
            pick
        }

        fn fail(&mut self, index: u16, failure: Failure, seconds: f64) -> Vec<Action> {
            let (pick, _) = self.attempt(index, seconds);
            self.pool.failed(pick.id, failure, || None, at(seconds))
        }

        fn ban(&mut self, index: u16, seconds: f64) {
            let id = self.id(index);
            self.ban_id(id, seconds);
        }

        fn ban_id(&mut self, id: BackendId, seconds: f64) {
            for _ in 0..2 {
                self.attempt_id(id, seconds);
                self.pool.failed(id, Failure::Refused, || None, at(seconds));
            }
        }

        fn connect(&mut self, index: u16, seconds: f64) {
            let id = self.id(index);
            self.connect_id(id, seconds);
        }

        fn connect_id(&mut self, id: BackendId, seconds: f64) {
            self.attempt_id(id, seconds);
            self.pool.connected(id, MS, at(seconds));
        }

        fn check(&mut self, index: u16, outcome: CheckOutcome, seconds: f64) -> Vec<Action> {
            let id = self.id(index);
            self.pool.checked(id, outcome, || None, at(seconds))
        }

        fn down(&mut self, index: u16, seconds: f64) {
            for _ in 0..3 {
                self.check(index, refused(), seconds);
            }
        }

        fn hedge(&mut self, tried: &[BackendId], seconds: f64) -> Option<Pick> {
            self.pool.hedge(CLIENT, tried, at(seconds)).0
        }

        /// The first backend goes out somehow and is back at `seconds`.
        fn leave_and_return(&mut self, way: &str, seconds: f64) {
            match way {
                "ban" => {
                    self.ban(0, seconds - 20.0);
                    self.connect(0, seconds);
                    self.pool.closed(BackendId(0), at(seconds));
                }
                "down" => {
                    self.down(0, seconds - 20.0);
                    self.check(0, CheckOutcome::Good, seconds - 1.0);
                    self.check(0, CheckOutcome::Good, seconds);
                }
                _ => {
                    self.pool.drain(&address(0), true, at(seconds - 20.0));
                    self.pool.drain(&address(0), false, at(seconds));
                }
            }
            assert_eq!(self.state(0, seconds), State::Healthy);
        }

        /// How many of 1000 sessions that begin at once go to a backend; all end again.
        fn share_of_1000(&mut self, index: u16, seconds: f64) -> u64 {
            let picks: Vec<BackendId> = (0..1000).map(|_| self.pick(seconds).id).collect();
            picks.iter().for_each(|id| self.pool.abandoned(*id, at(seconds)));
            let id = self.id(index);
            picks.iter().filter(|other| **other == id).count() as u64
        }

        /// `count` sessions to one backend.
        fn open(&mut self, index: u16, count: u32) {
            (0..count).for_each(|_| self.connect(index, 0.0));
        }

        fn sessions(&self, index: u16) -> u64 {
            self.status(index, 0.0).sessions
        }

        /// What may be shed in the minute that begins at `seconds`.
        fn surplus_of_a_minute(&mut self, seconds: f64) -> Vec<(BackendId, u32)> {
            self.pool.surplus(at(seconds));
            self.pool.surplus(at(seconds + 60.0))
        }

        /// Closes what may be shed; the clients connect again.
        fn shed_and_reconnect(&mut self, seconds: f64) -> u32 {
            let surplus = self.pool.surplus(at(seconds));
            for (id, count) in &surplus {
                (0..*count).for_each(|_| self.pool.closed(*id, at(seconds)));
                self.pool.shed(*id, *count, at(seconds));
            }
            let count = surplus.iter().map(|(_, count)| count).sum();
            for _ in 0..count {
                let id = self.pick(seconds).id;
                self.pool.connected(id, MS, at(seconds));
            }
            count
        }

        fn resolve(&mut self, last: &[u8], seconds: f64) -> Vec<Action> {
            let addresses: Vec<SocketAddr> = last.iter().map(|last| socket(*last)).collect();
            self.pool.set_addresses(&name(), &addresses, at(seconds))
        }

        fn status(&self, index: u16, seconds: f64) -> BackendStatus {
            let text = address(index).to_string();
            let mut all = self.pool.status(at(seconds)).into_iter();
            all.find(|status| status.backend == text).expect("it is configured")
        }

        fn state(&self, index: u16, seconds: f64) -> State {
            self.status(index, seconds).state
        }
    }
}
