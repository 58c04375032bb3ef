//! The resolver and the zones as one running service.
//!
//! ```text
//! udp threads --\                     /-> resolver -> cache -> reply
//! tcp tasks   ---> work (bounded) ---<
//!                                     \-> UPDATE, one after the other -> commit (durable) -> reply
//! ```
//! Everything but the udp threads runs on one thread. A reload that changes answers replaces what they come from and forgets
//! what was known; sockets that stay are not touched, and no question is lost.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, ResponseCode},
    rr::{Name, RData, Record, RecordType},
};
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::{
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{
    resolver::{Hosts, Resolution, Resolver, Trace},
    tcp,
    udp::{self, Threads, Work},
    upstream::{self, Forwarder},
};
use crate::{
    Config, Question,
    access::Access,
    answer::code_name,
    cache::{Cache, Found},
    cookie::Cookies,
    front::Front,
    packed::{Age, Lifetimes, Packed},
    query::{LEAST, MOST_TCP, MOST_UDP, Parsed, Query, Terms},
    rate::Rate,
    reverse,
    special::Local,
    status::{self, Answer, KeyStatus, RecordText, Request, Status, ZoneRecords, ZoneStatus},
    upstream::Failure,
    zone::{Algorithm, Change, Durable, Key, Memory, Owner, State, Step, Updates, Verdict, Why, Zone, tsig},
};

/// Messages that may wait for this thread; those that find the queue full stay without an answer.
const QUEUE: usize = 8192;
/// Questions under way that others must be asked, and how many of them one address may have: each takes up to two of the 4096
/// that a group of upstreams is asked at a time, and nobody is to keep the others from being answered.
const UNDER_WAY: usize = 16_384;
const OF_A_SOURCE: usize = 512;
/// Questions and updates under way that are answered here.
const OWN_UNDER_WAY: usize = 4096;
/// Questions that go on when their client has got a stale answer.
const LATE: usize = 1024;
/// Updates that may wait for the disk.
const UPDATES: usize = 1024;
/// How long a reload waits for an update that is on its way to the disk: less than the supervisor waits for a sign of life.
const FOR_THE_DISK: Duration = Duration::from_secs(2);
/// How long a client waits for a fresh answer while there is a stale one (RFC 8767 §5).
const CLIENT_PATIENCE: Duration = Duration::from_millis(1800);
/// How long a stale answer is given out before upstreams are asked again. RFC 8767 §5 recommends 30 s, to spare servers that
/// fail; these upstreams are the operator's own, and one that is down is checked on nobody's behalf, so that asking again
/// costs no client a moment.
const STALE_FOR: Duration = Duration::from_secs(5);
/// Between two log lines about updates that were refused for the same reason.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);
/// Log lines about updates that were refused, within that time.
const COMPLAINTS: usize = 64;
/// Longest name, key or record that an operator may write.
const LONGEST: usize = 1024;

/// What the supervisor opened.
#[derive(Debug, Default)]
pub struct Opened {
    /// UDP sockets by address, one for each thread.
    pub datagrams: Vec<(SocketAddr, Vec<OwnedFd>)>,
    /// TCP listeners by address.
    pub listeners: Vec<(SocketAddr, Vec<OwnedFd>)>,
    /// Content of the files that the configuration names.
    pub files: BTreeMap<PathBuf, Vec<u8>>,
}

/// What the service is told.
#[derive(Debug)]
pub enum Command {
    /// Answered if all is well.
    Ping(oneshot::Sender<()>),
    /// A question from the control socket.
    Ask {
        /// What is asked.
        request: Request,
        /// Where the answer goes.
        reply: oneshot::Sender<Answer>,
    },
    /// Another configuration.
    Reload {
        /// What is to run.
        config: Box<Config>,
        /// Sockets of addresses that are new, and all files.
        opened: Opened,
        /// Done, or why not; then nothing was changed.
        done: oneshot::Sender<Result<(), String>>,
    },
    /// Something that another process of this service made durable while this one was started.
    Learn(Box<Durable>),
    /// That process has ended: updates are for this one to take.
    Own,
    /// Answer what has come, for at most so long, and end.
    Stop {
        /// How long.
        grace: Duration,
    },
}

/// Something to be made durable.
#[derive(Debug)]
pub struct Commit {
    /// What.
    pub durable: Durable,
    /// It is, or why not.
    pub done: oneshot::Sender<Result<(), String>>,
}

/// The service's ways to the outside.
#[derive(Debug)]
pub struct Links {
    /// What it is told.
    pub commands: mpsc::Receiver<Command>,
    /// What it wants to be kept.
    pub commits: mpsc::Sender<Commit>,
    /// Whether another process of this service still takes updates: they wait until [`Command::Own`].
    pub successor: bool,
}

/// Why the service cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A socket that was passed is of no use.
    #[error("the socket of {address} cannot be used")]
    Socket {
        /// Which.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The configuration passed every check and still makes no resolver.
    #[error("{0}")]
    Config(String),
    /// No randomness, without which ids could be guessed.
    #[error("the kernel gives no random numbers")]
    Random(#[source] std::io::Error),
    /// A thread that answers has ended.
    #[error("a thread that answers over UDP has ended")]
    Thread,
}

/// Runs the service until it is told to stop, or nobody is left to tell it.
///
/// # Errors
///
/// [`Error`]: what a restart may cure.
pub async fn run(config: Box<Config>, opened: Opened, memory: Memory, links: Links) -> Result<(), Error> {
    let own = CancellationToken::new();
    if !links.successor {
        own.cancel();
    }
    let mut service = Service::new(config, opened, memory, links.commits, own.clone())?;
    let mut commands = links.commands;
    let mut look = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            command = commands.recv() => match command {
                Some(Command::Ping(reply)) => drop(reply.send(())),
                Some(Command::Ask { request, reply }) => {
                    let house = Arc::clone(&service.house);
                    let status = matches!(request, Request::Status).then(|| service.status());
                    tokio::spawn(async move {
                        let answer = match status {
                            Some(status) => Answer::Status(Box::new(status)),
                            None => house.answer(request).await.unwrap_or_else(Refusal::into),
                        };
                        let _ = reply.send(answer);
                    });
                }
                Some(Command::Reload { config, opened, done }) => {
                    let result = service.reload(config, opened).await;
                    let _ = done.send(result.map_err(|error| error.to_string()));
                }
                Some(Command::Learn(durable)) => service.house.learn(*durable).await,
                Some(Command::Own) => own.cancel(),
                Some(Command::Stop { grace }) => return service.stop(grace).await,
                None => return Ok(()),
            },
            _ = look.tick() => if !service.alive() { return Err(Error::Thread) },
        }
    }
}

/// Content of the files that the configuration names.
type Files = BTreeMap<PathBuf, Vec<u8>>;

struct Service {
    config: Box<Config>,
    files: Files,
    house: Arc<House>,
    udp: BTreeMap<SocketAddr, Threads>,
    tcp: BTreeMap<SocketAddr, CancellationToken>,
    tcp_shared: Arc<tcp::Shared>,
    work: mpsc::Sender<Work>,
    /// Takes up what comes until it is told that nothing more will.
    taking_up: JoinHandle<()>,
    ending: CancellationToken,
    /// Counts of threads that have been stopped.
    before: udp::Counts,
}

/// What the tasks share.
struct House {
    front: Arc<ArcSwap<Front>>,
    resolver: ArcSwap<Resolver>,
    /// Bounds on how long answers are kept.
    lifetimes: ArcSwap<Lifetimes>,
    updates: Arc<Mutex<Updates>>,
    /// What nodes registered in zones that are not configured now.
    aside: Mutex<BTreeMap<Owner, State>>,
    /// Held from the look at an update to its being in force, and while zones are replaced.
    one_at_a_time: tokio::sync::Mutex<()>,
    commits: mpsc::Sender<Commit>,
    update_queue: mpsc::Sender<Update>,
    under_way: Arc<Semaphore>,
    own_under_way: Arc<Semaphore>,
    sources: Sources,
    late: Semaphore,
    /// Raised whenever what is known becomes wrong.
    generation: AtomicU64,
    /// Raised whenever what is known of zones does.
    zone_generation: AtomicU64,
    stale: AtomicU64,
    resolved: Mutex<BTreeMap<&'static str, u64>>,
    updated: Mutex<BTreeMap<&'static str, u64>>,
    /// When the log last told of a refused update, by reason and client.
    complained: Mutex<BTreeMap<(&'static str, IpAddr), Instant>>,
}

/// A message with opcode UPDATE, and who sent it.
struct Update {
    message: Vec<u8>,
    back: Back,
    /// Among those under way, until it is answered.
    _place: Place,
}

/// Among those under way; dropping it gives it back.
struct Place {
    _permit: OwnedSemaphorePermit,
    source: Option<(IpAddr, Sources)>,
}

/// How many of those that are under way each address has.
type Sources = Arc<Mutex<HashMap<IpAddr, usize>>>;

impl Drop for Place {
    fn drop(&mut self) {
        let Some((source, sources)) = &self.source else { return };
        let mut sources = lock(sources);
        if let Some(count) = sources.get_mut(source) {
            *count -= 1;
            if *count == 0 {
                sources.remove(source);
            }
        }
    }
}

/// The way back to a client.
enum Back {
    Udp(udp::Ask),
    Tcp(tcp::Ask),
}

/// Why an operator gets no answer.
struct Refusal {
    message: String,
    /// What was asked for can never be had.
    bad_request: bool,
}

impl Refusal {
    fn bad<T: Into<String>>(message: T) -> Self {
        Self {
            message: message.into(),
            bad_request: true,
        }
    }
}

impl From<String> for Refusal {
    fn from(message: String) -> Self {
        Self {
            message,
            bad_request: false,
        }
    }
}

impl From<Refusal> for Answer {
    fn from(Refusal { message, bad_request }: Refusal) -> Self {
        Self::Refused { message, bad_request }
    }
}

impl Back {
    fn terms(&self) -> &Terms {
        match self {
            Self::Udp(ask) => ask.terms(),
            Self::Tcp(ask) => &ask.terms,
        }
    }

    const fn client(&self) -> SocketAddr {
        match self {
            Self::Udp(ask) => ask.client(),
            Self::Tcp(ask) => ask.client,
        }
    }

    fn message(&self) -> &[u8] {
        match self {
            Self::Udp(ask) => ask.message(),
            Self::Tcp(ask) => &ask.message,
        }
    }

    fn query(&self) -> Option<Query<'_>> {
        match Parsed::of(self.message()) {
            Parsed::Query(query) => Some(query),
            _ => None,
        }
    }

    const fn room(&self) -> usize {
        match self {
            Self::Udp(_) => MOST_UDP,
            Self::Tcp(_) => MOST_TCP,
        }
    }

    async fn send(self, octets: Vec<u8>) {
        match self {
            // What the kernel does not take is lost, as any datagram may be.
            Self::Udp(ask) => drop(ask.reply(&octets)),
            Self::Tcp(ask) => ask.reply(octets).await,
        }
    }
}

impl Service {
    fn new(
        config: Box<Config>,
        mut opened: Opened,
        memory: Memory,
        commits: mpsc::Sender<Commit>,
        own: CancellationToken,
    ) -> Result<Self, Error> {
        let Memory {
            zones: mut states,
            keys,
        } = memory;
        let updates = Arc::new(Mutex::new(Updates::new(zones(&config, &mut states)?, keys)));
        let resolver = resolver(&config, &opened.files, &updates, None)?;
        let front = Arc::new(ArcSwap::from_pointee(Front {
            cache: Arc::new(Cache::new(config.cache(), config.stale(), random()?)),
            access: Access::new(&config.allowed()),
            cookies: Cookies::new(random()?, udp::wall()),
            rate: Arc::new(Rate::new(config.rate_limit.value.into(), u64::from_ne_bytes(random()?))),
        }));
        let (work, asked) = mpsc::channel(QUEUE);
        let (tcp_work, tcp_asked) = mpsc::channel(QUEUE);
        let (update_queue, queued) = mpsc::channel(UPDATES);
        let house = Arc::new(House {
            front: Arc::clone(&front),
            resolver: ArcSwap::from_pointee(resolver),
            lifetimes: ArcSwap::from_pointee(config.lifetimes()),
            updates,
            aside: Mutex::new(states),
            one_at_a_time: tokio::sync::Mutex::default(),
            commits,
            update_queue,
            under_way: Arc::new(Semaphore::new(UNDER_WAY)),
            own_under_way: Arc::new(Semaphore::new(OWN_UNDER_WAY)),
            sources: Arc::default(),
            late: Semaphore::new(LATE),
            generation: AtomicU64::new(0),
            zone_generation: AtomicU64::new(0),
            stale: AtomicU64::new(0),
            resolved: Mutex::default(),
            updated: Mutex::default(),
            complained: Mutex::default(),
        });
        let ending = CancellationToken::new();
        let taking_up = tokio::spawn(Arc::clone(&house).take_up(asked, tcp_asked, ending.clone()));
        tokio::spawn(Arc::clone(&house).update(queued, own));
        let mut service = Self {
            config,
            files: std::mem::take(&mut opened.files),
            house,
            udp: BTreeMap::new(),
            tcp: BTreeMap::new(),
            tcp_shared: tcp::Shared::new(front, tcp_work),
            work,
            taking_up,
            ending,
            before: udp::Counts::default(),
        };
        service.open(opened)?;
        Ok(service)
    }

    /// Takes sockets into service.
    fn open(&mut self, opened: Opened) -> Result<(), Error> {
        let mut udp = BTreeMap::new();
        for (address, sockets) in opened.datagrams {
            let sockets = sockets.into_iter().map(Into::into).collect();
            match udp::start(sockets, Arc::clone(&self.house.front), self.work.clone()) {
                Ok(threads) => drop(udp.insert(address, threads)),
                Err(source) => {
                    // All or nothing.
                    udp.into_values().for_each(Threads::stop);
                    return Err(Error::Socket { address, source });
                }
            }
        }
        self.udp.append(&mut udp);
        for (address, listeners) in opened.listeners {
            let stop = CancellationToken::new();
            for listener in listeners {
                let listener = std::net::TcpListener::from(listener);
                let listener = listener
                    .set_nonblocking(true)
                    .and_then(|()| TcpListener::from_std(listener))
                    .map_err(|source| Error::Socket { address, source })?;
                tokio::spawn(tcp::serve(listener, Arc::clone(&self.tcp_shared), stop.clone()));
            }
            self.tcp.insert(address, stop);
        }
        Ok(())
    }

    fn alive(&self) -> bool {
        self.udp.values().all(Threads::alive)
    }

    /// Other answers from here on: none that was given before is known any more.
    async fn replace_resolver(&mut self, config: &Config, files: &Files, opened: Opened) -> Result<(), Error> {
        let house = Arc::clone(&self.house);
        // No update may be on its way to the disk while its zone is replaced.
        let gate = timeout(FOR_THE_DISK, house.one_at_a_time.lock()).await;
        let gate = gate.map_err(|_| {
            Error::Config("a dynamic update waits for the disk; try again when the disk answers: dmesg | tail".into())
        })?;
        let mut states = lock(&house.aside).clone();
        states.extend(
            lock(&house.updates)
                .zones()
                .iter()
                .map(|zone| (Owner::of(zone.origin()), zone.state().clone())),
        );
        let zones = zones(config, &mut states)?;
        let resolver = resolver(
            config,
            files,
            &house.updates,
            Some((&house.resolver.load(), files == &self.files)),
        )?;
        self.open(opened)?;
        lock(&house.updates).replace_zones(zones);
        *lock(&house.aside) = states;
        drop(gate);
        house.resolver.store(Arc::new(resolver));
        house.lifetimes.store(Arc::new(config.lifetimes()));
        house.forget(|cache| cache.flush());
        Ok(())
    }

    async fn reload(&mut self, config: Box<Config>, mut opened: Opened) -> Result<(), Error> {
        let files = std::mem::take(&mut opened.files);
        // Most reloads are about the balancer: what is known stays known, and of upstreams what they are like.
        if files == self.files && config.answers_as(&self.config) {
            self.open(opened)?;
        } else {
            self.replace_resolver(&config, &files, opened).await?;
        }
        let house = Arc::clone(&self.house);
        let old = house.front.load();
        let mut front = Front::clone(&old);
        front.access = Access::new(&config.allowed());
        if config.rate_limit != self.config.rate_limit {
            front.rate = Arc::new(Rate::new(config.rate_limit.value.into(), u64::from_ne_bytes(random()?)));
        }
        if config.cache() != self.config.cache() || config.stale() != self.config.stale() {
            front.cache = Arc::new(Cache::new(config.cache(), config.stale(), random()?));
        }
        house.front.store(Arc::new(front));
        let wanted: BTreeSet<SocketAddr> = config.listen.iter().map(|at| at.value).collect();
        let gone: Vec<SocketAddr> = self
            .udp
            .keys()
            .filter(|address| !wanted.contains(address))
            .copied()
            .collect();
        for address in gone {
            if let Some(stop) = self.tcp.remove(&address) {
                stop.cancel();
            }
            if let Some(threads) = self.udp.remove(&address) {
                self.before = sum(self.before, threads.counts());
                // It waits for threads, which take no longer than 50 ms.
                let _ = tokio::task::spawn_blocking(move || threads.stop()).await;
            }
        }
        (self.config, self.files) = (config, files);
        Ok(())
    }

    async fn stop(self, grace: Duration) -> Result<(), Error> {
        let Self {
            house,
            udp,
            tcp,
            tcp_shared,
            taking_up,
            ending,
            ..
        } = self;
        let end = async {
            for stop in tcp.values() {
                stop.cancel();
            }
            let _ = tokio::task::spawn_blocking(move || udp.into_values().for_each(Threads::stop)).await;
            // What was taken from the kernel gets its answer.
            ending.cancel();
            let _ = taking_up.await;
            for (places, all) in [(&house.under_way, UNDER_WAY), (&house.own_under_way, OWN_UNDER_WAY)] {
                let _ = places.acquire_many(u32::try_from(all).unwrap_or(u32::MAX)).await;
            }
            tcp_shared.written().await;
        };
        let _ = timeout(grace, end).await;
        Ok(())
    }

    fn status(&self) -> Status {
        let counts = self.udp.values().map(Threads::counts).fold(self.before, sum);
        let front = self.house.front.load();
        let cache = front.cache.stats();
        let resolver = self.house.resolver.load();
        let groups = resolver.upstreams.iter().map(|forwarder| (String::new(), forwarder));
        let forwards = resolver
            .forwards
            .iter()
            .map(|(domain, forwarder)| (domain.to_string(), forwarder));
        let updates = lock(&self.house.updates);
        let count = |counts: &Mutex<BTreeMap<&'static str, u64>>| {
            lock(counts)
                .iter()
                .map(|(name, count)| ((*name).to_owned(), *count))
                .collect()
        };
        Status {
            listen: self.config.listen.iter().map(|at| at.value).collect(),
            prefixes: resolver
                .rules
                .mappings
                .iter()
                .map(|mapping| mapping.prefix.to_string())
                .collect(),
            udp: counts.into(),
            tcp: self.tcp_shared.counts(),
            cache: status::Cache {
                entries: cache.entries,
                octets: cache.octets,
                limit: self.config.cache() as u64,
                inserted: cache.inserted,
                evicted: cache.evicted,
                stale: self.house.stale.load(Relaxed),
            },
            resolved: count(&self.house.resolved),
            updates: count(&self.house.updated),
            upstreams: groups
                .chain(forwards)
                .map(|(domain, forwarder)| group(domain, &forwarder.status()))
                .collect(),
            zones: updates.zones().iter().map(zone_status).collect(),
            keys: updates.keys().iter().count() as u64,
        }
    }
}

impl House {
    /// Takes up what the front does not know, until `ending` and what has come by then.
    async fn take_up(
        self: Arc<Self>,
        mut udp: mpsc::Receiver<Work>,
        mut tcp: mpsc::Receiver<tcp::Ask>,
        ending: CancellationToken,
    ) {
        loop {
            let work = tokio::select! {
                Some(work) = udp.recv() => work,
                Some(ask) = tcp.recv() => {
                    self.begin(Back::Tcp(ask));
                    continue;
                }
                () = ending.cancelled(), if !udp.is_closed() => {
                    udp.close();
                    tcp.close();
                    continue;
                }
                else => return,
            };
            match work {
                Work::Ask(ask) => self.begin(Back::Udp(ask)),
                Work::Refresh(question) => {
                    let house = Arc::clone(&self);
                    let Ok(place) = Arc::clone(&self.under_way).try_acquire_owned() else {
                        continue;
                    };
                    tokio::spawn(async move {
                        let _ = house.renew(&question).await;
                        drop(place);
                    });
                }
            }
        }
    }

    /// Answers. Never waits for a place: whoever comes next may not need one.
    fn begin(self: &Arc<Self>, back: Back) {
        let query = back.query();
        let question = query
            .as_ref()
            .and_then(|query| query.question().map(|question| (question, query.recursion_desired())));
        let Some((question, recursion_desired)) = question else {
            let decoded = query.is_some();
            if let Some(place) = self.own_place() {
                let house = Arc::clone(self);
                tokio::spawn(async move {
                    if decoded {
                        let octets = code(&back, ResponseCode::FormErr);
                        back.send(octets).await;
                    } else {
                        house.serve_whole(back, place).await;
                    }
                });
            }
            return;
        };
        let known_here = self.resolver.load().knows(&question);
        let place = if known_here {
            self.own_place()
        } else {
            self.place(back.client().ip())
        };
        let house = Arc::clone(self);
        let Some(place) = place else {
            self.count("busy");
            tokio::spawn(async move {
                let known = house.keep_serving(&question).then(|| house.known_for(&back)).flatten();
                let octets = known.unwrap_or_else(|| code(&back, ResponseCode::ServFail));
                back.send(octets).await;
            });
            return;
        };
        // Without recursion only what is known here may be told (RFC 1035 §4.1.1); the front has looked at the cache.
        let refused = !recursion_desired && !known_here;
        tokio::spawn(async move {
            if refused {
                let octets = code(&back, ResponseCode::Refused);
                back.send(octets).await;
            } else {
                house.serve_question(back, question, place).await;
            }
        });
    }

    /// A place for what is answered here.
    fn own_place(&self) -> Option<Place> {
        let permit = Arc::clone(&self.own_under_way).try_acquire_owned().ok()?;
        Some(Place {
            _permit: permit,
            source: None,
        })
    }

    /// A place for a question of `source` that others must be asked.
    fn place(&self, source: IpAddr) -> Option<Place> {
        let permit = Arc::clone(&self.under_way).try_acquire_owned().ok()?;
        let mut sources = lock(&self.sources);
        let count = sources.entry(source).or_default();
        if *count >= OF_A_SOURCE {
            return None;
        }
        *count += 1;
        Some(Place {
            _permit: permit,
            source: Some((source, Arc::clone(&self.sources))),
        })
    }

    /// Answers; `place` is given back when that is done.
    async fn serve_question(&self, back: Back, question: Question, place: Place) {
        let mut renewing = std::pin::pin!(self.renew(&question));
        let (packed, too_late) = match timeout(CLIENT_PATIENCE, renewing.as_mut()).await {
            Ok(packed) => (packed, false),
            // Somebody waits too long: what is stale is better than nothing, and the question goes on.
            Err(_) if self.keep_serving(&question) => (None, true),
            Err(_) => (renewing.as_mut().await, false),
        };
        let octets = match &packed {
            Some(packed) => packed_for(&back, packed),
            None => match self.known_for(&back) {
                Some(octets) => {
                    self.stale.fetch_add(1, Relaxed);
                    octets
                }
                None => code(&back, ResponseCode::ServFail),
            },
        };
        back.send(octets).await;
        drop(place);
        if too_late && let Ok(_late) = self.late.try_acquire() {
            // Too late for this client, and in time for the next.
            let _ = timeout(Duration::from_secs(10), renewing).await;
        }
    }

    /// Asks, and keeps what comes; `None` if a stale answer has to do.
    async fn renew(&self, question: &Question) -> Option<Packed> {
        let zoned = self.is_zoned(&question.name);
        let generation = || {
            let zone = if zoned { self.zone_generation.load(Relaxed) } else { 0 };
            (self.generation.load(Relaxed), zone)
        };
        let before = generation();
        let resolver = self.resolver.load_full();
        let result = resolver.resolve(question, &Trace::default()).await;
        let mut lifetimes = **self.lifetimes.load();
        let (answer, kept) = match result {
            // What has run out says more than what stands in for it.
            Ok(Resolution {
                stopgap: true, source, ..
            }) if self.keep_serving(question) => {
                self.count(source);
                return None;
            }
            Ok(Resolution {
                answer, ttl, source, ..
            }) => {
                self.count(source);
                lifetimes.longest = lifetimes.longest.min(ttl);
                lifetimes.longest_negative = lifetimes.longest_negative.min(ttl);
                (answer, ttl > 0)
            }
            Err(failure) => {
                self.count(match failure {
                    Failure::Timeout => "timeout",
                    Failure::Down => "down",
                    Failure::Code(_) => "servfail",
                    Failure::Unreachable => "unreachable",
                    Failure::Busy => "busy",
                });
                if self.keep_serving(question) {
                    return None;
                }
                // What this machine could not do now it may do the next time.
                (crate::Answer::empty(ResponseCode::ServFail), failure != Failure::Busy)
            }
        };
        let packed = match Packed::new(question, &answer, &lifetimes) {
            Ok(packed) => packed,
            Err(error) => {
                tracing::debug!(name = %question.name, kind = %question.kind, ?error, "an answer cannot be sent");
                Packed::new(question, &crate::Answer::empty(ResponseCode::ServFail), &lifetimes).ok()?
            }
        };
        if kept && generation() == before {
            self.front.load().cache.insert(packed.clone(), udp::now());
        }
        Some(packed)
    }

    fn keep_serving(&self, question: &Question) -> bool {
        self.front.load().cache.keep_serving(question, STALE_FOR, udp::now())
    }

    /// What the cache has for the client now.
    fn known_for(&self, back: &Back) -> Option<Vec<u8>> {
        let query = back.query()?;
        let front = self.front.load();
        let mut out = vec![0; back.room()];
        let hash = front.cache.hash(&query);
        match front.cache.answer(&query, hash, back.terms(), udp::now(), &mut out) {
            Found::Hit { length, .. } => {
                out.truncate(length);
                Some(out)
            }
            Found::Miss => None,
        }
    }

    /// A message that is more than a plain query: an UPDATE, or a query that is signed.
    async fn serve_whole(&self, back: Back, place: Place) {
        let message = back.message().to_vec();
        let opcode = message.get(2).map_or(0, |flags| (flags >> 3) & 15);
        if opcode == u8::from(OpCode::Update) {
            // One that finds the queue full comes again.
            let _ = self.update_queue.try_send(Update {
                message,
                back,
                _place: place,
            });
            return;
        }
        let octets = self.signed_query(&message, &back).await.unwrap_or_default();
        back.send(octets).await;
    }

    /// The answer to a signed query, signed too: `nsupdate` looks for its zone this way.
    async fn signed_query(&self, octets: &[u8], back: &Back) -> Option<Vec<u8>> {
        let now = udp::wall();
        let verdict = tsig::verify(lock(&self.updates).keys(), octets, now);
        let request = Message::from_vec(octets).ok()?;
        if request.metadata.message_type != MessageType::Query {
            return None;
        }
        let mut response = Message::response(request.metadata.id, request.metadata.op_code);
        response.metadata.recursion_desired = request.metadata.recursion_desired;
        response.metadata.recursion_available = true;
        response.add_queries(request.queries.iter().cloned());
        response.edns = request.edns.as_ref().map(|_| {
            let mut edns = Edns::new();
            edns.set_max_payload(MOST_UDP as u16);
            edns
        });
        let reply = match verdict {
            Verdict::Good(_, reply) => {
                self.answer_signed(&request, &mut response).await;
                Some(reply)
            }
            Verdict::Bad(failure, reply) => {
                response.metadata.response_code = failure.code();
                Some(reply)
            }
            // SIG(0): signed with what we know nothing of (RFC 2931).
            Verdict::Unsigned => {
                response.metadata.response_code = ResponseCode::NotImp;
                None
            }
            Verdict::Malformed => {
                response.metadata.response_code = ResponseCode::FormErr;
                None
            }
        };
        let payload = request.edns.as_ref().map_or(0, Edns::max_payload);
        let limit = match back {
            Back::Udp(_) => usize::from(payload).clamp(LEAST, MOST_UDP),
            Back::Tcp(_) => MOST_TCP,
        };
        let room = limit.saturating_sub(reply.as_ref().map_or(0, tsig::Reply::size));
        let mut octets = response.to_vec().ok()?;
        if octets.len() > room {
            response.metadata.truncation = true;
            response.answers.clear();
            response.authorities.clear();
            response.additionals.clear();
            octets = response.to_vec().ok()?;
        }
        Some(match reply {
            Some(reply) => reply.finish(octets, now),
            None => octets,
        })
    }

    /// Answers what a key of ours has signed.
    async fn answer_signed(&self, request: &Message, response: &mut Message) {
        let [query] = request.queries.as_slice() else {
            response.metadata.response_code = ResponseCode::FormErr;
            return;
        };
        let mut question = Question::new(query.name(), query.query_type());
        question.class = query.query_class();
        let resolver = self.resolver.load_full();
        if !request.metadata.recursion_desired && !resolver.knows(&question) {
            response.metadata.response_code = ResponseCode::Refused;
            return;
        }
        match resolver.resolve(&question, &Trace::default()).await {
            Ok(Resolution { answer, .. }) => {
                response.metadata.response_code = answer.code;
                response.metadata.authoritative = answer.authoritative;
                response.answers = answer.answers;
                response.authorities = answer.authorities;
                response.additionals = answer.additionals;
            }
            Err(_) => response.metadata.response_code = ResponseCode::ServFail,
        }
    }

    /// Whether one of the zones has `name`.
    fn is_zoned(&self, name: &Name) -> bool {
        lock(&self.updates).zones().iter().any(|zone| zone.contains(name))
    }

    /// Carries updates out, one after the other, once they are for this process to take.
    async fn update(self: Arc<Self>, mut queued: mpsc::Receiver<Update>, own: CancellationToken) {
        own.cancelled().await;
        while let Some(Update { message, back, _place }) = queued.recv().await {
            let gate = self.one_at_a_time.lock().await;
            let step = lock(&self.updates).receive(&message, udp::wall());
            let step = match step {
                Step::Store(change) => self.store(change).await,
                step => step,
            };
            drop(gate);
            if let Step::Answer { response, why } = step {
                *lock(&self.updated).entry(why.name()).or_default() += 1;
                if why.code() == ResponseCode::NoError {
                    tracing::debug!(client = %back.client(), "a dynamic update: {why}");
                } else {
                    self.complain(back.client(), &why);
                }
                back.send(response).await;
            }
        }
    }

    /// Tells of an update that was refused; of each reason and client once in a while, lest a node that tries for ever fills
    /// the log.
    fn complain(&self, client: SocketAddr, why: &Why) {
        let mut complained = lock(&self.complained);
        complained.retain(|_, last| last.elapsed() < COMPLAIN_EVERY);
        let what = (why.name(), client.ip());
        if complained.len() < COMPLAINTS && !complained.contains_key(&what) {
            complained.insert(what, Instant::now());
            tracing::warn!(%client, reason = why.name(), "a dynamic update was refused: {why}");
        }
    }

    /// Makes a change durable and then carries it out.
    async fn store(&self, change: Change) -> Step {
        let node = change.node.clone();
        let kept = self.commit(Durable::Zone(change)).await;
        let now = udp::wall();
        match kept {
            Ok(()) => {
                let step = lock(&self.updates).stored(now);
                self.forget_zones();
                step
            }
            Err(error) => {
                tracing::error!(%node, error, "a dynamic update could not be kept, so it was refused");
                lock(&self.updates).failed(now)
            }
        }
    }

    async fn commit(&self, durable: Durable) -> Result<(), String> {
        let (done, is_done) = oneshot::channel();
        let gone = || "the supervisor does not answer".to_owned();
        self.commits.send(Commit { durable, done }).await.map_err(|_| gone())?;
        is_done.await.map_err(|_| gone())?
    }

    async fn learn(&self, durable: Durable) {
        let _gate = self.one_at_a_time.lock().await;
        if let Durable::KeyRemoved { name, .. } = &durable {
            self.forget_aside(name);
        }
        lock(&self.updates).learn(durable);
        self.forget_zones();
    }

    /// Forgets, in zones that are not configured now, a key that is being removed, and with its node's last one the node.
    /// Whether that had records there.
    fn forget_aside(&self, key: &Owner) -> bool {
        let updates = lock(&self.updates);
        let Some(node) = updates.keys().get(key.name()).map(|key| key.node.clone()) else {
            return false;
        };
        let last = updates.keys().iter().filter(|key| key.node == node).count() == 1;
        let mut had = false;
        for state in lock(&self.aside).values_mut() {
            state.signed.remove(key);
            had |= last && state.nodes.remove(&node).is_some();
        }
        had
    }

    /// Forgets what was known of the zones.
    fn forget_zones(&self) {
        let origins: Vec<Name> = {
            let updates = lock(&self.updates);
            let zones = updates.zones().iter().flat_map(Zone::zones);
            zones.map(|zone| zone.origin().clone()).collect()
        };
        // Aliases that lead into a zone from elsewhere are never kept, so that others need not be forgotten.
        self.zone_generation.fetch_add(1, Relaxed);
        self.front.load().cache.flush_below_all(&origins);
    }

    /// Answers that are being looked for are not kept either.
    fn forget(&self, which: impl FnOnce(&Cache) -> usize) -> usize {
        self.generation.fetch_add(1, Relaxed);
        which(&self.front.load().cache)
    }

    fn count(&self, what: &'static str) {
        *lock(&self.resolved).entry(what).or_default() += 1;
    }

    /// Answers a question from the control socket.
    async fn answer(&self, request: Request) -> Result<Answer, Refusal> {
        match request {
            Request::Status => Err("the status is asked for elsewhere".to_owned().into()),
            Request::Query { name, kind, trace } => self.query(&name, &kind, trace).await,
            Request::Zones { name } => self.zone_records(name.as_deref()),
            Request::Keys => Ok(Answer::Keys { keys: self.keys() }),
            Request::AddKey { node, algorithm } => self.add_key(&node, algorithm).await,
            Request::RemoveKey { name } => self.remove_key(&name).await,
            Request::Flush { name: None, .. } => Ok(Answer::Flushed {
                answers: self.forget(Cache::flush) as u64,
            }),
            Request::Flush {
                name: Some(name),
                below,
            } => {
                let name = parse(&name)?;
                let answers = self.forget(|cache| {
                    if below {
                        cache.flush_below(&name)
                    } else {
                        cache.flush_name(&name)
                    }
                });
                Ok(Answer::Flushed {
                    answers: answers as u64,
                })
            }
        }
    }

    async fn query(&self, name: &str, kind: &str, wants_trace: bool) -> Result<Answer, Refusal> {
        let kind: RecordType = kind.to_ascii_uppercase().parse().map_err(|_| {
            Refusal::bad(format!(
                "\"{kind}\" is no record type; write one such as AAAA, A, PTR, TXT"
            ))
        })?;
        let address = name.parse::<IpAddr>().ok();
        let (name, kind) = match address {
            Some(address) => (Name::from(address), RecordType::PTR),
            None => (parse(name)?, kind),
        };
        let question = Question::new(&name, kind);
        let began = Instant::now();
        if !wants_trace && let Some(known) = self.front.load().cache.known(&question, udp::now()) {
            let answer = known.packed.unpack();
            let answer = answer.ok_or_else(|| "the answer that is known cannot be read".to_owned())?;
            let ttl = u32::try_from(known.left.as_secs()).unwrap_or(u32::MAX);
            let resolved = resolved(&question, &answer, "cache", ttl, began);
            return Ok(Answer::Query(Box::new(resolved)));
        }
        let trace = if wants_trace { Trace::kept() } else { Trace::default() };
        let resolver = self.resolver.load_full();
        let resolution = resolver.resolve(&question, &trace).await;
        let mut answer = match resolution {
            Ok(Resolution {
                answer, ttl, source, ..
            }) => resolved(&question, &answer, source, ttl, began),
            Err(failure) if wants_trace => {
                let empty = crate::Answer::empty(ResponseCode::ServFail);
                let mut answer = resolved(&question, &empty, "failure", 0, began);
                answer.steps.push(status::Step {
                    at_ms: began.elapsed().as_secs_f64() * 1e3,
                    text: failure.to_string(),
                });
                answer
            }
            Err(failure) => {
                let message = format!(
                    "{name} {kind} has no answer: {failure}; see what was tried: edgectl dns trace {name} {kind}"
                );
                return Err(message.into());
            }
        };
        let steps = trace.steps().into_iter().map(|(at, text)| status::Step {
            at_ms: at.as_secs_f64() * 1e3,
            text,
        });
        answer.steps.splice(0..0, steps);
        Ok(Answer::Query(Box::new(answer)))
    }

    fn zone_records(&self, wanted: Option<&str>) -> Result<Answer, Refusal> {
        let wanted = wanted.map(parse).transpose()?;
        let updates = lock(&self.updates);
        let zones: Vec<ZoneRecords> = updates
            .zones()
            .iter()
            .flat_map(|zone| zone.zones().map(move |data| (zone, data)))
            .filter(|(_, data)| wanted.as_ref().is_none_or(|wanted| data.origin() == wanted))
            .map(|(zone, data)| ZoneRecords {
                name: data.origin().to_string(),
                records: data
                    .names()
                    .flat_map(|(name, sets)| {
                        let nodes = &zone.state().nodes;
                        sets.iter().flat_map(move |(kind, set)| {
                            set.data.iter().map(move |data| RecordText {
                                name: name.to_string(),
                                ttl: set.ttl,
                                kind: kind.to_string(),
                                data: data.to_string(),
                                dynamic: match data {
                                    RData::PTR(node) => nodes.contains_key(&Owner::of(&node.0)),
                                    _ => nodes.contains_key(&Owner::of(name)),
                                },
                            })
                        })
                    })
                    .collect(),
            })
            .collect();
        match wanted {
            Some(wanted) if zones.is_empty() => {
                Err(format!("{wanted} is no zone of the configuration; see them: edgectl dns zone show").into())
            }
            _ => Ok(Answer::Zones { zones }),
        }
    }

    fn keys(&self) -> Vec<KeyStatus> {
        let updates = lock(&self.updates);
        let used = |key: &Owner| {
            let times = updates.zones().iter().filter_map(|zone| zone.state().signed.get(key));
            times.max().copied()
        };
        updates
            .keys()
            .iter()
            .map(|key| key_status(key, used(&key.name)))
            .collect()
    }

    /// The name that an operator wrote, below the first zone unless it lies in one already.
    fn in_zone(&self, name: &str) -> Result<Name, Refusal> {
        let name = parse(name)?;
        let updates = lock(&self.updates);
        let Some(first) = updates.zones().first() else {
            return Err(Refusal::from(
                "there is no zone, so no node can have a name; write [[dns64.zone]] into the configuration".to_owned(),
            ));
        };
        if updates.zones().iter().any(|zone| zone.origin().zone_of(&name)) {
            return Ok(name);
        }
        let mut relative = name;
        relative.set_fqdn(false);
        relative
            .append_domain(first.origin())
            .map_err(|_| Refusal::bad("the name is too long for the zone"))
    }

    async fn add_key(&self, node: &str, algorithm: Algorithm) -> Result<Answer, Refusal> {
        let node = self.in_zone(node)?;
        let _gate = self.one_at_a_time.lock().await;
        let key = {
            let updates = lock(&self.updates);
            let zone = updates.zones().iter().find(|zone| zone.origin().zone_of(&node));
            let zone = zone.ok_or_else(|| format!("{node} lies in no zone"))?;
            zone.may_be_node(&node)
                .map_err(|error| Refusal::bad(error.to_string()))?;
            let owner = Owner::of(&node);
            let name = updates.keys().free_name(&owner);
            let secret: [u8; 64] = random().map_err(|error| error.to_string())?;
            let key = Key::mint(name, algorithm, owner, &secret).map_err(|error| error.to_string())?;
            updates
                .keys()
                .clone()
                .add(key.clone())
                .map_err(|error| error.to_string())?;
            key
        };
        self.commit(Durable::Key(key.clone()))
            .await
            .map_err(|error| format!("the key could not be kept, so it is not in force: {error}"))?;
        let answer = Answer::Key {
            key: key_status(&key, None),
            file: key.to_bind(),
        };
        lock(&self.updates).add_key(key).map_err(|error| error.to_string())?;
        Ok(answer)
    }

    async fn remove_key(&self, name: &str) -> Result<Answer, Refusal> {
        // One of a zone that is not configured now is good again when the zone is.
        let exact = Owner::of(&parse(name)?);
        let is_known = lock(&self.updates).keys().get(exact.name()).is_some();
        let name = if is_known {
            exact
        } else {
            Owner::of(&self.in_zone(name)?)
        };
        let _gate = self.one_at_a_time.lock().await;
        let (node, change) = {
            let updates = lock(&self.updates);
            let key = updates
                .keys()
                .get(name.name())
                .ok_or_else(|| format!("there is no key {name}; see them: edgectl dns key list"))?;
            (key.node.clone(), updates.removal(&name))
        };
        let ends = change.is_some();
        let durable = Durable::KeyRemoved {
            name: name.clone(),
            change,
        };
        self.commit(durable)
            .await
            .map_err(|error| format!("the removal could not be kept, so the key stays in force: {error}"))?;
        let records = self.forget_aside(&name) || ends;
        lock(&self.updates).remove_key(&name);
        self.forget_zones();
        Ok(Answer::Removed {
            name: name.to_string(),
            node: node.to_string(),
            records,
        })
    }
}

/// The zones of `config` with their `states`, of which those remain that belong to no zone.
fn zones(config: &Config, states: &mut BTreeMap<Owner, State>) -> Result<Vec<Zone>, Error> {
    let mut made = Vec::new();
    for config in config.zones() {
        let state = states.remove(&Owner::of(&config.origin)).unwrap_or_default();
        let zone = Zone::new(&config, state).map_err(|error| Error::Config(error.to_string()))?;
        for (node, why) in zone.left_out() {
            tracing::warn!(%node, "records of a node are kept but not served: {why}");
        }
        made.push(zone);
    }
    Ok(made)
}

/// What answers come from. Groups of upstreams that `previous` has too stay as they are, if files are the same: what is known
/// of them, and their connections.
fn resolver(
    config: &Config,
    files: &Files,
    updates: &Arc<Mutex<Updates>>,
    previous: Option<(&Resolver, bool)>,
) -> Result<Resolver, Error> {
    let roots = upstream::Opened {
        roots: files.get(&config.ca_file().value).cloned().unwrap_or_default(),
    };
    let before = previous
        .filter(|(_, same_files)| *same_files)
        .map(|(resolver, _)| resolver);
    let forwarder = |servers: &[settings::At<crate::upstream::Url>]| {
        let groups = before.into_iter().flat_map(Resolver::groups);
        if let Some(same) = groups
            .into_iter()
            .find(|group| group.asks(servers.iter().map(|at| &at.value)))
        {
            return Ok(same.clone());
        }
        let config = upstream::Config {
            servers: servers.iter().map(|at| at.value.clone()).collect(),
            ..upstream::Config::default()
        };
        Forwarder::new(config, &roots).map_err(|error| Error::Config(error.to_string()))
    };
    let mut forwards = Vec::new();
    for (domain, servers) in &config.forward {
        forwards.push((domain.0.clone(), forwarder(servers)?));
    }
    forwards.sort_by_key(|(domain, _)| std::cmp::Reverse(domain.num_labels()));
    let rules = config.rules();
    let mut elsewhere: Vec<Name> = forwards.iter().map(|(domain, _)| domain.clone()).collect();
    elsewhere.extend(config.zones().iter().map(|zone| zone.origin.clone()));
    elsewhere.extend(rules.mappings.iter().map(|mapping| reverse::apex(mapping.prefix)));
    Ok(Resolver {
        form: config.form(),
        hosts: Hosts::new(
            config
                .hosts
                .iter()
                .map(|(name, addresses)| (name.0.clone(), addresses.clone())),
        ),
        local: Local::new(elsewhere),
        upstreams: if config.upstreams.is_empty() {
            None
        } else {
            Some(forwarder(&config.upstreams)?)
        },
        forwards,
        rules,
        updates: Arc::clone(updates),
    })
}

/// An answer as the client can take it.
fn packed_for(back: &Back, packed: &Packed) -> Vec<u8> {
    let mut out = vec![0; back.room()];
    let length = back
        .query()
        .and_then(|query| packed.write(&query, Age::Fresh(0), back.terms(), &mut out));
    out.truncate(length.unwrap_or(0));
    out
}

/// A code alone.
fn code(back: &Back, code: ResponseCode) -> Vec<u8> {
    let mut out = vec![0; MOST_UDP];
    let length = back
        .query()
        .and_then(|query| query.write_code(code, false, back.terms(), &mut out));
    out.truncate(length.unwrap_or(0));
    out
}

fn resolved(question: &Question, answer: &crate::Answer, source: &str, ttl: u32, began: Instant) -> status::Resolved {
    let texts = |records: &[Record]| records.iter().map(text).collect();
    status::Resolved {
        name: question.name.to_string(),
        kind: question.kind.to_string(),
        code: code_name(answer.code).to_owned(),
        answers: texts(&answer.answers),
        authorities: texts(&answer.authorities),
        source: source.to_owned(),
        ttl,
        steps: Vec::new(),
        took_ms: began.elapsed().as_secs_f64() * 1e3,
    }
}

fn text(record: &Record) -> RecordText {
    RecordText {
        name: record.name.to_string(),
        ttl: record.ttl,
        kind: record.record_type().to_string(),
        data: record.data.to_string(),
        dynamic: false,
    }
}

fn key_status(key: &Key, used: Option<u64>) -> KeyStatus {
    let time = |seconds| humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + Duration::from_secs(seconds));
    KeyStatus {
        name: key.name.to_string(),
        node: key.node.to_string(),
        algorithm: key.algorithm.name().to_owned(),
        last_used: used.map(|seconds| time(seconds).to_string()),
    }
}

fn zone_status(zone: &Zone) -> ZoneStatus {
    ZoneStatus {
        names: zone.zones().map(|data| data.origin().to_string()).collect(),
        serial: zone.zones().next().map_or(0, |data| data.serial()),
        nodes: zone.state().nodes.len() as u64,
        left_out: zone
            .left_out()
            .iter()
            .map(|(node, why)| (node.to_string(), why.to_string()))
            .collect(),
    }
}

fn group(domain: String, status: &upstream::Status) -> status::Group {
    let number = |count: usize| count as u64;
    status::Group {
        domain,
        servers: status.servers.iter().map(server).collect(),
        outstanding: number(status.outstanding),
        asked: status.asked,
        joined: status.joined,
        busy: status.busy,
        failed: status.failed,
    }
}

fn server(server: &upstream::ServerStatus) -> status::Server {
    let counts = &server.counts;
    let counts = [
        ("queries", counts.queries),
        ("good", counts.good),
        ("lame", counts.lame),
        ("silent", counts.silent),
        ("broken", counts.broken),
        ("truncated", counts.truncated),
        ("floods", counts.floods),
        ("case-lost", counts.case_lost),
        ("outages", counts.outages),
    ];
    let owned = |counts: &[(&'static str, u64)]| {
        counts
            .iter()
            .map(|(name, count)| ((*name).to_owned(), *count))
            .collect()
    };
    status::Server {
        url: server.url.to_string(),
        state: server.state.name().to_owned(),
        latency_ms: server.latency_ms,
        counts: owned(&counts),
        mismatches: owned(&server.mismatches),
        connections: server.connections as u64,
        last_error: server.last_error.clone(),
    }
}

impl From<udp::Counts> for status::Udp {
    fn from(counts: udp::Counts) -> Self {
        Self {
            received: counts.received,
            hits: counts.hits,
            misses: counts.misses,
            rejected: counts.rejected,
            slipped: counts.slipped,
            limited: counts.limited,
            denied: counts.denied,
            ignored: counts.ignored,
            dropped: counts.dropped,
            refreshed: counts.refreshed,
            unsent: counts.unsent,
        }
    }
}

fn sum(a: udp::Counts, b: udp::Counts) -> udp::Counts {
    udp::Counts {
        received: a.received + b.received,
        hits: a.hits + b.hits,
        misses: a.misses + b.misses,
        rejected: a.rejected + b.rejected,
        slipped: a.slipped + b.slipped,
        limited: a.limited + b.limited,
        denied: a.denied + b.denied,
        ignored: a.ignored + b.ignored,
        dropped: a.dropped + b.dropped,
        refreshed: a.refreshed + b.refreshed,
        unsent: a.unsent + b.unsent,
    }
}

/// A name as an operator writes it; absolute.
fn parse(name: &str) -> Result<Name, Refusal> {
    if name.len() > LONGEST {
        return Err(Refusal::bad("a name of that length cannot exist"));
    }
    let crate::config::Domain(name) = name.parse().map_err(Refusal::bad::<String>)?;
    Ok(name)
}

fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut octets = [0; N];
    match getrandom(&mut octets, GetRandomFlags::empty()) {
        Ok(got) if got == N => Ok(octets),
        Ok(_) => Err(Error::Random(std::io::ErrorKind::UnexpectedEof.into())),
        Err(error) => Err(Error::Random(error.into())),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What was written stands; a panic elsewhere ends the process anyway.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
