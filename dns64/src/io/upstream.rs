//! Asks upstreams: the sockets, the clock and the randomness of [`crate::upstream`].
//!
//! Makes connected sockets only: it neither binds nor listens, and reads no file.

use std::{
    collections::HashMap,
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use hickory_proto::rr::{Name, RecordType};
use rustls::{ClientConfig, pki_types::ServerName};
use serde::Serialize;
use socket2::{Domain, Socket, Type};
use tokio::{
    io::Interest,
    net::UdpSocket,
    sync::{oneshot, watch},
    time::{Instant, sleep, sleep_until, timeout},
};

pub use self::connection::roots;
use self::connection::{Connection, Target};
use crate::{
    Answer, Question,
    upstream::{
        Failure, Transport, Url,
        choice::{Choice, Counts, State, Why},
        inquiry::{Attempt, Inquiry, Outcome, Step},
        pending::Datagram,
        wire::{Entropy, Form, Mismatch, Sent},
    },
};

mod connection;

/// How long a check or a measurement may take.
const CHECK: Duration = Duration::from_millis(1500);
/// Datagrams that it takes.
const SENDS: u32 = 6;
/// For this machine to have again what it has run out of.
const SHORTAGE: Duration = Duration::from_secs(1);

/// A group of upstreams and how it is asked.
#[derive(Clone, Debug)]
pub struct Config {
    /// The servers, of which any is as good as the other; the first is asked first while nothing is known.
    pub servers: Vec<Url>,
    /// How long one question may take in all; 4 s.
    pub patience: Duration,
    /// How many questions may be under way, each with a socket or more; 4096.
    pub outstanding: usize,
    /// Connections to one server; 4.
    pub connections: usize,
    /// How long a connection is kept without a question; 10 s.
    pub idle: Duration,
}

/// What a group needs of files.
#[derive(Clone, Debug, Default)]
pub struct Opened {
    /// The authorities (PEM) of which one must vouch for a server by TLS; not looked at if there is none.
    pub roots: Vec<u8>,
}

/// Why there is no [`Forwarder`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The file with the authorities is of no use.
    #[error("upstreams by tls:// need the certificates of authorities; the file {0}")]
    Roots(String),
    /// TLS itself.
    #[error("TLS cannot be set up: {0}")]
    Tls(String),
}

/// Asks a group of upstreams. Clones are the same forwarder.
#[derive(Clone, Debug)]
pub struct Forwarder(Arc<Inner>);

/// What a group is doing.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// In the order of the configuration.
    pub servers: Vec<ServerStatus>,
    /// Questions under way now.
    pub outstanding: usize,
    /// Questions, those included that joined one under way.
    pub asked: u64,
    /// Questions that joined one under way.
    pub joined: u64,
    /// Questions turned away because too many were under way.
    pub busy: u64,
    /// Questions without an answer for any other reason.
    pub failed: u64,
}

/// What one server is doing.
#[derive(Clone, Debug, Serialize)]
pub struct ServerStatus {
    /// As configured.
    pub url: Url,
    /// Whether it is asked.
    pub state: State,
    /// Smoothed, in milliseconds; none before its first answer.
    pub latency_ms: Option<f64>,
    /// What happened with it.
    pub counts: Counts,
    /// Messages that came from its address and were no replies, by [`Mismatch::name`].
    pub mismatches: [(&'static str, u64); 4],
    /// Open connections.
    pub connections: usize,
    /// Why a connection to it failed last.
    pub last_error: Option<String>,
}

type Landed = Option<Result<Arc<Answer>, Failure>>;

#[derive(Debug)]
struct Inner {
    config: Config,
    transports: Vec<Transport>,
    servers: Vec<Server>,
    choice: Mutex<Choice>,
    /// Questions under way and where their answers will be.
    flights: Mutex<HashMap<Question, watch::Receiver<Landed>>>,
    began: Instant,
    asked: AtomicU64,
    joined: AtomicU64,
    busy: AtomicU64,
    failed: AtomicU64,
}

#[derive(Debug)]
struct Server {
    url: Url,
    target: Arc<Target>,
    connections: Mutex<Vec<Connection>>,
}

/// An attempt under way.
enum Running {
    Datagram(Arc<Ear>, Pin<Box<dyn Future<Output = Outcome> + Send>>),
    Connection(oneshot::Receiver<Outcome>),
}

/// A socket and the one query that waits at it.
#[derive(Debug)]
struct Ear {
    socket: UdpSocket,
    datagram: Mutex<Datagram>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            servers: Vec::new(),
            patience: Duration::from_secs(4),
            outstanding: 4096,
            connections: 4,
            idle: Duration::from_secs(10),
        }
    }
}

impl Forwarder {
    /// A forwarder that has asked nobody yet.
    ///
    /// # Errors
    ///
    /// TLS without authorities.
    pub fn new(config: Config, opened: &Opened) -> Result<Self, Error> {
        let transports: Vec<_> = config.servers.iter().map(Url::transport).collect();
        let tls = if transports.contains(&Transport::Tls) {
            let roots = roots(&opened.roots).map_err(Error::Roots)?;
            Some(connection::tls(roots).map_err(Error::Tls)?)
        } else {
            None
        };
        let servers = config
            .servers
            .iter()
            .map(|url| Server::new(url, tls.as_ref(), &config))
            .collect();
        Ok(Self(Arc::new(Inner {
            choice: Mutex::new(Choice::new(transports.len())),
            transports,
            servers,
            config,
            flights: Mutex::default(),
            began: Instant::now(),
            asked: AtomicU64::new(0),
            joined: AtomicU64::new(0),
            busy: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        })))
    }

    /// The answer of an upstream: NOERROR or NXDOMAIN (or YXDOMAIN). Whoever asks what is already under way gets the same
    /// answer. The question goes on if this future is dropped.
    ///
    /// # Errors
    ///
    /// Why there is none. [`Failure::Down`] comes at once.
    pub async fn ask(&self, question: &Question) -> Result<Answer, Failure> {
        let inner = &self.0;
        inner.asked.fetch_add(1, Relaxed);
        let mut landing = inner.join(question)?;
        let landed = landing.wait_for(Option::is_some).await;
        match landed.as_deref() {
            Ok(Some(result)) => result.clone().map(Arc::unwrap_or_clone),
            // Its task is gone: the runtime is about to end.
            _ => Err(Failure::Busy),
        }
    }

    /// Whether it asks just these, in this order.
    pub fn asks<'a>(&self, servers: impl IntoIterator<Item = &'a Url>) -> bool {
        self.0.config.servers.iter().eq(servers)
    }

    /// What it is doing.
    pub fn status(&self) -> Status {
        let inner = &self.0;
        let choice = lock(&inner.choice).clone();
        let servers = inner.servers.iter().enumerate().filter_map(|(index, server)| {
            let (state, latency, counts) = choice.of(index)?;
            Some(ServerStatus {
                url: server.url.clone(),
                state,
                latency_ms: latency.map(|latency| latency.as_secs_f64() * 1e3),
                counts,
                mismatches: Mismatch::ALL.map(|mismatch| (mismatch.name(), server.target.mismatched(mismatch))),
                connections: lock(&server.connections)
                    .iter()
                    .filter(|connection| connection.is_open())
                    .count(),
                last_error: server.target.last_error(),
            })
        });
        Status {
            servers: servers.collect(),
            outstanding: lock(&inner.flights).len(),
            asked: inner.asked.load(Relaxed),
            joined: inner.joined.load(Relaxed),
            busy: inner.busy.load(Relaxed),
            failed: inner.failed.load(Relaxed),
        }
    }
}

impl Inner {
    /// Where the answer will be; the question sets out if it is not under way.
    fn join(self: &Arc<Self>, question: &Question) -> Result<watch::Receiver<Landed>, Failure> {
        // Upstreams are always asked to recurse.
        let question = Question {
            recursion_desired: true,
            ..question.clone()
        };
        let mut flights = lock(&self.flights);
        if let Some(landing) = flights.get(&question) {
            self.joined.fetch_add(1, Relaxed);
            return Ok(landing.clone());
        }
        if flights.len() >= self.config.outstanding {
            self.busy.fetch_add(1, Relaxed);
            return Err(Failure::Busy);
        }
        let (land, landing) = watch::channel(None);
        flights.insert(question.clone(), landing.clone());
        drop(flights);
        lock(&self.choice).asked();
        let flight = Flight {
            inner: self.clone(),
            question,
        };
        tokio::spawn(flight.fly(land));
        Ok(landing)
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Begins an attempt.
    fn begin(&self, question: &Question, attempt: Attempt) -> Result<Running, Outcome> {
        let server = self.servers.get(attempt.server).ok_or(Outcome::Broken)?;
        let form = Form {
            edns: attempt.edns,
            case: attempt.over == Transport::Udp && server.url.keeps_case(),
            padded: attempt.over == Transport::Tls,
        };
        let entropy = entropy().map_err(|_| Outcome::Busy)?;
        let sent = Sent::new(question, form, &entropy).ok_or(Outcome::Broken)?;
        if attempt.over != Transport::Udp {
            return server.by_connection(sent, attempt.over, self.config.connections);
        }
        let socket = send_from_anew(server.url.address(), sent.bytes()).map_err(|error| failed(&error))?;
        let ear = Arc::new(Ear {
            socket,
            datagram: Mutex::new(Datagram::new(sent)),
        });
        Ok(Running::Datagram(ear.clone(), Box::pin(ear.listen())))
    }

    /// Sends the checks and measurements that are due. `question` is under way no more.
    fn look_after(self: &Arc<Self>, question: &Question) {
        loop {
            let due = lock(&self.choice).due(self.now());
            let Some((server, why)) = due else { return };
            match why {
                Why::Check => drop(tokio::spawn(check(Arc::downgrade(self), server))),
                Why::Measure => drop(tokio::spawn(measure(self.clone(), server, question.clone()))),
            }
        }
    }

    /// One attempt on nobody's behalf, sent six times if it is a datagram: a path that loses three of
    /// ten makes one in 1400 of those that are there look dead. With how often it was sent.
    async fn try_once(&self, question: &Question, server: usize) -> Option<(Outcome, u32)> {
        let attempt = Attempt {
            number: 0,
            server,
            over: self.transports.get(server).copied()?,
            edns: lock(&self.choice).edns(server, self.now()),
        };
        let mut running = match self.begin(question, attempt) {
            Ok(running) => running,
            Err(outcome) => return Some((outcome, 1)),
        };
        for sends in 1..=SENDS {
            if let Ok(outcome) = timeout(CHECK / SENDS, poll_fn(|context| running.poll(context))).await {
                return Some((outcome, sends));
            }
            if sends < SENDS {
                running.send_again();
            }
        }
        None
    }
}

/// Whether a server says anything; repeated with growing intervals until it does.
async fn check(inner: Weak<Inner>, server: usize) {
    let root = Question::new(&Name::root(), RecordType::NS);
    loop {
        let Some(inner) = inner.upgrade() else { return };
        let outcome = inner.try_once(&root, server).await.map(|(outcome, _)| outcome);
        if outcome == Some(Outcome::Busy) {
            // That says nothing of the server.
            drop(inner);
            sleep(SHORTAGE).await;
            continue;
        }
        let alive = !matches!(outcome, None | Some(Outcome::Broken | Outcome::Closed));
        let (before, wait) = {
            let mut choice = lock(&inner.choice);
            let before = choice.of(server).map(|(state, ..)| state);
            (before, choice.checked(server, alive))
        };
        let url = inner.servers.get(server).map(|server| server.url.to_string());
        match (before, wait) {
            (Some(State::Suspect), Some(_)) => tracing::warn!(upstream = url, "the upstream is down"),
            (Some(State::Down), None) => tracing::info!(upstream = url, "the upstream is up again"),
            _ => {}
        }
        drop(inner);
        let Some(wait) = wait else { return };
        // Apart from the other daemons that ask the same server: between nine tenths and eleven tenths.
        let spread = entropy().map_or(0.5, |entropy| f64::from(entropy.id) / 65_536.0);
        sleep(wait.mul_f64(0.9 + 0.2 * spread)).await;
    }
}

/// How long a server takes that is not asked otherwise. Its answer is not used.
async fn measure(inner: Arc<Inner>, server: usize, question: Question) {
    let began = inner.now();
    lock(&inner.choice).sent(server);
    let outcome = inner.try_once(&question, server).await;
    let now = inner.now();
    let mut choice = lock(&inner.choice);
    match outcome {
        // An answer to one of several datagrams does not tell which (Karn's rule, RFC 6298 §3).
        Some((Outcome::Good(_), sends)) => {
            choice.good(server, (sends == 1).then(|| now.saturating_sub(began)), now);
        }
        Some((Outcome::Lame(_) | Outcome::NoEdns, _)) => choice.lame(server),
        Some((Outcome::Broken | Outcome::Closed, _)) => choice.broken(server),
        Some((Outcome::Truncated, _)) => choice.heard(server, |counts| counts.truncated += 1),
        Some((Outcome::Flooded | Outcome::CaseLost | Outcome::Busy, _)) => {}
        None => choice.silent(server),
    }
    choice.measured(server);
}

/// A question under way.
struct Flight {
    inner: Arc<Inner>,
    question: Question,
}

impl Flight {
    async fn fly(self, land: watch::Sender<Landed>) {
        let result = self.course().await;
        if result.is_err() {
            self.inner.failed.fetch_add(1, Relaxed);
        }
        let (inner, question) = (self.inner.clone(), self.question.clone());
        // Those who ask from now on set out anew.
        drop(self);
        land.send_replace(Some(result.map(Arc::new)));
        inner.look_after(&question);
    }

    async fn course(&self) -> Result<Answer, Failure> {
        let inner = &self.inner;
        let mut inquiry = Inquiry::new(inner.config.patience, inner.now());
        let mut running = Attempts {
            inner,
            attempts: Vec::new(),
        };
        loop {
            let step = inquiry.step(&inner.transports, &mut lock(&inner.choice), inner.now());
            let (number, outcome) = match step {
                Step::Done(result) => return result,
                Step::Begin(attempt) => match inner.begin(&self.question, attempt) {
                    Ok(begun) => {
                        running.attempts.push((attempt, begun));
                        continue;
                    }
                    Err(outcome) => (attempt.number, outcome),
                },
                Step::Again(number) => {
                    running.send_again(number);
                    continue;
                }
                Step::Wait(until) => {
                    // A server that is suspect is checked while the question waits for it.
                    inner.check_suspects();
                    tokio::select! {
                        ended = running.next() => ended,
                        () = sleep_until(inner.began + until) => continue,
                    }
                }
            };
            let now = inner.now();
            inquiry.ended(number, outcome, &inner.transports, &mut lock(&inner.choice), now);
        }
    }
}

impl Inner {
    /// Starts the checks that are due, and no measurements.
    fn check_suspects(self: &Arc<Self>) {
        loop {
            let suspect = lock(&self.choice).suspect();
            let Some(server) = suspect else { return };
            tokio::spawn(check(Arc::downgrade(self), server));
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        lock(&self.inner.flights).remove(&self.question);
    }
}

/// The attempts of one question.
struct Attempts<'a> {
    inner: &'a Inner,
    attempts: Vec<(Attempt, Running)>,
}

impl Attempts<'_> {
    /// The next one to end, which is then gone.
    async fn next(&mut self) -> (usize, Outcome) {
        let (index, outcome) = poll_fn(|context| {
            for (index, (_, running)) in self.attempts.iter_mut().enumerate() {
                if let Poll::Ready(outcome) = running.poll(context) {
                    return Poll::Ready((index, outcome));
                }
            }
            Poll::Pending
        })
        .await;
        let (attempt, running) = self.attempts.remove(index);
        self.inner.book(attempt.server, &running);
        (attempt.number, outcome)
    }

    fn send_again(&self, number: usize) {
        let mut attempts = self.attempts.iter();
        if let Some((_, running)) = attempts.find(|(attempt, _)| attempt.number == number) {
            running.send_again();
        }
    }
}

impl Drop for Attempts<'_> {
    fn drop(&mut self) {
        for (attempt, running) in &self.attempts {
            self.inner.book(attempt.server, running);
        }
    }
}

impl Inner {
    /// Books what a datagram's socket heard that was no reply.
    fn book(&self, server: usize, running: &Running) {
        if let (Some(server), Running::Datagram(ear, _)) = (self.servers.get(server), running) {
            server.target.book(lock(&ear.datagram).mismatches());
        }
    }
}

impl Running {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Outcome> {
        match self {
            // A connection whose task is gone.
            Self::Connection(back) => Pin::new(back).poll(context).map(|back| back.unwrap_or(Outcome::Closed)),
            Self::Datagram(_, listening) => listening.as_mut().poll(context),
        }
    }

    fn send_again(&self) {
        if let Self::Datagram(ear, _) = self {
            // If it cannot be sent it is lost like any other.
            let _ = ear.socket.try_send(lock(&ear.datagram).bytes());
        }
    }
}

impl Ear {
    async fn listen(self: Arc<Self>) -> Outcome {
        // More than was asked for is cut off and does not parse.
        let mut bytes = [0; 4096];
        loop {
            match self.socket.ready(Interest::READABLE | Interest::ERROR).await {
                Err(error) => return failed(&error),
                // A closed port is no datagram: it would not wake who waits for one.
                Ok(ready) if ready.is_error() => {
                    let error = self.socket.try_io(Interest::ERROR, || match self.socket.take_error() {
                        Ok(Some(error)) | Err(error) => Ok(error),
                        Ok(None) => Err(io::ErrorKind::WouldBlock.into()),
                    });
                    if let Ok(error) = error {
                        return failed(&error);
                    }
                }
                Ok(_) => match self.socket.try_recv(&mut bytes) {
                    Ok(length) => {
                        let heard = lock(&self.datagram).hear(bytes.get(..length).unwrap_or_default());
                        if let Some(outcome) = heard {
                            return outcome;
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return failed(&error),
                },
            }
        }
    }
}

impl Server {
    fn new(url: &Url, tls: Option<&Arc<ClientConfig>>, config: &Config) -> Self {
        let name = url.name().and_then(|name| ServerName::try_from(name.to_owned()).ok());
        let name = name.unwrap_or_else(|| ServerName::IpAddress(url.address().ip().into()));
        Self {
            url: url.clone(),
            target: Arc::new(Target::new(
                url.address(),
                tls.cloned().map(|tls| (tls, name)),
                config.idle,
            )),
            connections: Mutex::default(),
        }
    }

    /// Hands a query to a connection, which is opened if all there are have much to do.
    fn by_connection(&self, sent: Sent, over: Transport, most: usize) -> Result<Running, Outcome> {
        let (back, answer) = oneshot::channel();
        let mut connections = lock(&self.connections);
        connections.retain(Connection::is_open);
        let least = connections.iter().min_by_key(|connection| connection.load());
        let load = least.map(Connection::load);
        let room = connections.len() < most.max(1);
        if load.is_none_or(|load| load >= connection::BUSY && room) {
            connections.push(Connection::open(self.target.clone(), over == Transport::Tls));
        }
        let least = connections
            .iter()
            .min_by_key(|connection| connection.load())
            .ok_or(Outcome::Busy)?;
        if least.load() >= connection::FULL {
            return Err(Outcome::Busy);
        }
        least.ask(sent, back).map_err(|()| Outcome::Closed)?;
        Ok(Running::Connection(answer))
    }
}

/// Sends from a socket that hears only `address` and whose port nobody can foresee: the kernel draws it from
/// ip_local_port_range without those in ip_local_reserved_ports.
fn send_from_anew(address: SocketAddr, datagram: &[u8]) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&address.into())?;
    // Before it is watched, since nobody knows of a watched one whether it can send until it has been waited for.
    match socket.send(datagram) {
        // What the kernel has no room for is lost like any other: it is sent again.
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
        _ => {}
    }
    UdpSocket::from_std(socket.into())
}

/// What an error at a socket means: this machine's own shortage is no fault of a server.
fn failed(error: &io::Error) -> Outcome {
    match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM | libc::EAGAIN) => Outcome::Busy,
        _ => Outcome::Broken,
    }
}

/// From the kernel's CSPRNG.
fn entropy() -> io::Result<Entropy> {
    let mut bytes = [0_u8; 40];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let (words, _) = bytes.as_chunks::<8>();
    let mut words = words.iter().map(|word| u64::from_le_bytes(*word));
    let mut next = || words.next().unwrap_or(0);
    let [low, high, ..] = next().to_le_bytes();
    Ok(Entropy {
        id: u16::from_le_bytes([low, high]),
        case: [next(), next(), next(), next()],
    })
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing is left half done under a lock.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
