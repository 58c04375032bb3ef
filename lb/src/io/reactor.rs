//! A data thread: one epoll set, its own listener sockets, its own sessions.
//!
//! A session lives and dies on the thread that accepted it, as a plain struct in a slab; what threads share is the
//! frontend's pool (one short lock at pick, connect and close) and the backend's traffic counters.
//!
//! A short connection costs 13 system calls beside its share of epoll_wait: accept4, two epoll_ctl, socket, connect,
//! three recv, two send, shutdown, two close. What makes it so few: sockets are watched edge-triggered and never
//! unregistered, a short read is known to have emptied the socket, the end of the request is read off EPOLLRDHUP, and
//! the backend leg's options wait until a session has lived for a second.

use std::{
    net::IpAddr,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use rustix::{
    event::{EventfdFlags, epoll, eventfd},
    io::Errno,
    net::SocketFlags,
    time::Timespec,
};

use super::{
    clock,
    frontend::{Frontend, Traffic},
    relay::{self, Direction, Scratch, Turn},
    socket,
};
use crate::{
    moment::Moment,
    pool::{BackendId, Failure},
    wheel::{Wheel, tick_of},
};

/// Events taken from the kernel at once.
const EVENTS: usize = 256;
/// Connections accepted per event of a listener; the kernel tells again if there are more.
const ACCEPTS: usize = 8;
/// How long a listener rests when this process is out of descriptors.
const REST: Duration = Duration::from_millis(100);
/// Sessions of a down backend are reset within this time, each at a random moment.
const JITTER: Duration = Duration::from_millis(300);
/// When a session gets the keepalive of its backend leg.
const GROWN_UP: Duration = Duration::from_secs(1);
/// All backends together may take this long to accept, or the connect timeout if that is longer.
const PATIENCE: Duration = Duration::from_secs(3);
/// A thread that has not turned for this long has hung.
const PULSE: Duration = Duration::from_secs(4);

/// What a data thread is told.
pub(crate) enum Order {
    /// Accept on this socket for this frontend.
    Listen(Arc<Frontend>, OwnedFd),
    /// Connections to this address belong to this frontend from now on.
    Assign(std::net::SocketAddr, Arc<Frontend>),
    /// Close the sockets of a listener address that is no longer wanted.
    Unlisten(std::net::SocketAddr),
    /// Sessions of a backend that went down.
    Reset(String, BackendId),
    /// Accept no more; end when the last session has, or at the moment given.
    Stop(Moment),
}

/// The way to each data thread.
pub(crate) struct Threads {
    boxes: Vec<Inbox>,
    alive: AtomicUsize,
}

struct Inbox {
    orders: Mutex<Vec<Order>>,
    bell: OnceLock<OwnedFd>,
    /// Milliseconds since boot of the thread's last turn.
    pulse: AtomicU64,
}

impl Threads {
    pub(crate) fn new(count: u16) -> std::io::Result<Arc<Self>> {
        let boxes = (0..count)
            .map(|_| {
                let bell = OnceLock::new();
                let _ = bell.set(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
                Ok(Inbox {
                    orders: Mutex::default(),
                    bell,
                    pulse: AtomicU64::new(0),
                })
            })
            .collect::<std::io::Result<Vec<_>>>()?;
        Ok(Arc::new(Self {
            alive: AtomicUsize::new(boxes.len()),
            boxes,
        }))
    }

    pub(crate) fn count(&self) -> u16 {
        u16::try_from(self.boxes.len()).unwrap_or(u16::MAX)
    }

    pub(crate) fn tell(&self, thread: usize, order: Order) {
        let Some(inbox) = self.boxes.get(thread) else { return };
        inbox.orders.lock().unwrap_or_else(PoisonError::into_inner).push(order);
        if let Some(bell) = inbox.bell.get() {
            // A full counter means the bell is ringing already.
            let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
        }
    }

    pub(crate) fn tell_all(&self, order: impl Fn() -> Order) {
        for thread in 0..self.boxes.len() {
            self.tell(thread, order());
        }
    }

    pub(crate) fn reset_sessions(&self, frontend: &str, id: BackendId) {
        self.tell_all(|| Order::Reset(frontend.to_owned(), id));
    }

    /// Every thread has turned lately.
    pub(crate) fn healthy(&self, now: Moment) -> bool {
        self.boxes
            .iter()
            .all(|inbox| now - Moment::new(Duration::from_millis(inbox.pulse.load(Relaxed))) < PULSE)
    }

    /// Threads that have not ended.
    pub(crate) fn alive(&self) -> usize {
        self.alive.load(Relaxed)
    }
}

/// Starts the data threads.
pub(crate) fn start(threads: &Arc<Threads>) -> std::io::Result<()> {
    for index in 0..threads.boxes.len() {
        let threads = threads.clone();
        let reactor = Reactor::new(threads.clone(), index)?;
        std::thread::Builder::new()
            .name(format!("lb-{index}"))
            .stack_size(512 * 1024)
            .spawn(move || {
                reactor.run();
                threads.alive.fetch_sub(1, Relaxed);
            })?;
    }
    Ok(())
}

/// Whose event it is; packed into the 64 bits that epoll carries.
#[derive(Clone, Copy)]
enum Whose {
    Bell,
    Listener(u32),
    Client(Key),
    Backend(Key),
}

/// A slot of the slab and the generation of its content, so that a late event finds nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    slot: u32,
    generation: u32,
}

const GENERATIONS: u32 = 1 << 30;

impl Whose {
    fn pack(self) -> epoll::EventData {
        let key = |kind: u64, key: Key| (kind << 62) | (u64::from(key.generation) << 32) | u64::from(key.slot);
        epoll::EventData::new_u64(match self {
            Self::Bell => 0,
            Self::Listener(index) => (1 << 62) | u64::from(index),
            Self::Client(k) => key(2, k),
            Self::Backend(k) => key(3, k),
        })
    }

    fn unpack(data: epoll::EventData) -> Self {
        let bits = data.u64();
        #[expect(clippy::cast_possible_truncation, reason = "the fields are packed at these widths")]
        let key = Key {
            slot: bits as u32,
            generation: ((bits >> 32) as u32) & (GENERATIONS - 1),
        };
        match bits >> 62 {
            0 => Self::Bell,
            1 => Self::Listener(key.slot),
            2 => Self::Client(key),
            _ => Self::Backend(key),
        }
    }
}

struct Listener {
    frontend: Arc<Frontend>,
    socket: OwnedFd,
    address: std::net::SocketAddr,
    resting_until: Option<Moment>,
}

/// One proxied connection.
struct Session {
    frontend: Arc<Frontend>,
    client: OwnedFd,
    source: IpAddr,
    /// The backend being connected or in use.
    backend: Option<Leg>,
    connected: bool,
    tried: Vec<BackendId>,
    accepted: Moment,
    /// When the connect in flight began.
    dialled: Moment,
    last_byte: Moment,
    /// Client to backend.
    up: Direction,
    /// Backend to client.
    down: Direction,
    client_nodelay: bool,
    /// The client socket is watched for writability (only once a write came up short).
    client_watched: bool,
    reset_at: Option<Moment>,
    /// The tick the earliest timer entry is set for.
    armed: u64,
}

struct Leg {
    id: BackendId,
    socket: OwnedFd,
    traffic: Arc<Traffic>,
    nodelay: bool,
    tuned: bool,
}

#[derive(Default)]
struct Slot {
    generation: u32,
    session: Option<Box<Session>>,
}

/// How a session ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// Both sides have said all: plain close.
    Done,
    /// Something broke: the other side is told by a reset.
    Reset,
}

struct Reactor {
    threads: Arc<Threads>,
    index: usize,
    epoll: OwnedFd,
    listeners: Vec<Option<Listener>>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    live: usize,
    wheel: Wheel<Key>,
    scratch: Scratch,
    /// Sessions whose turn was cut short to be fair.
    again: Vec<Key>,
    now: Moment,
    random: u64,
    stop_at: Option<Moment>,
}

const READ: epoll::EventFlags = epoll::EventFlags::IN
    .union(epoll::EventFlags::RDHUP)
    .union(epoll::EventFlags::PRI)
    .union(epoll::EventFlags::ET);
const READ_WRITE: epoll::EventFlags = READ.union(epoll::EventFlags::OUT);

impl Reactor {
    fn new(threads: Arc<Threads>, index: usize) -> std::io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        if let Some(bell) = threads.boxes[index].bell.get() {
            epoll::add(&epoll, bell, Whose::Bell.pack(), epoll::EventFlags::IN)?;
        }
        let now = clock::now();
        threads.boxes[index].pulse.store(millis(now), Relaxed);
        let mut seed = [0u8; 8];
        let _ = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty());
        Ok(Self {
            threads,
            index,
            epoll,
            listeners: Vec::new(),
            slots: Vec::new(),
            free: Vec::new(),
            live: 0,
            wheel: Wheel::new(now),
            scratch: Scratch::new(),
            again: Vec::new(),
            now,
            random: u64::from_ne_bytes(seed) | 1,
            stop_at: None,
        })
    }

    fn run(mut self) {
        let mut events = Vec::with_capacity(EVENTS);
        let mut due = Vec::new();
        loop {
            events.clear();
            let timeout = self.timeout();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                // The epoll descriptor is ours and valid, so this cannot pass by itself; the supervisor starts afresh.
                Err(error) => panic!("epoll_wait on a valid descriptor: {error}"),
            }
            self.now = clock::now();
            self.threads.boxes[self.index].pulse.store(millis(self.now), Relaxed);
            for event in &events {
                self.event(Whose::unpack(event.data), event.flags);
            }
            for key in std::mem::take(&mut self.again) {
                self.turn(key);
            }
            self.wheel.advance(self.now, &mut due);
            for (tick, key) in due.drain(..) {
                self.timer(tick, key);
            }
            self.wake_listeners();
            if self.stopped() {
                return;
            }
        }
    }

    fn timeout(&self) -> Timespec {
        if !self.again.is_empty() {
            return Timespec { tv_sec: 0, tv_nsec: 0 };
        }
        let mut wait = Duration::from_secs(1);
        if let Some(next) = self.wheel.next() {
            wait = wait.min(next - self.now + Duration::from_millis(1));
        }
        if self
            .listeners
            .iter()
            .flatten()
            .any(|listener| listener.resting_until.is_some())
            || self.stop_at.is_some()
        {
            wait = wait.min(Duration::from_millis(50));
        }
        Timespec {
            tv_sec: wait.as_secs().try_into().unwrap_or(1),
            tv_nsec: wait.subsec_nanos().into(),
        }
    }

    fn event(&mut self, whose: Whose, flags: epoll::EventFlags) {
        use epoll::EventFlags as F;
        let lost = flags.intersects(F::ERR | F::HUP);
        match whose {
            Whose::Bell => self.orders(),
            Whose::Listener(index) => self.accept(index as usize),
            Whose::Client(key) => {
                let Some(session) = self.session(key) else { return };
                session.up.readable |= lost || flags.intersects(F::IN | F::RDHUP);
                session.up.fin |= flags.contains(F::RDHUP);
                session.up.wary |= lost || flags.contains(F::PRI);
                session.down.writable |= lost || flags.contains(F::OUT);
                if flags.contains(F::ERR) && (session.up.ended || !session.connected) {
                    // The client has reset; whoever only closed its sending half still waits for an answer.
                    self.end(key, End::Reset);
                } else if session.connected {
                    self.turn(key);
                }
            }
            Whose::Backend(key) => {
                let Some(session) = self.session(key) else { return };
                if !session.connected {
                    self.dialled(key, flags);
                    return;
                }
                session.down.readable |= lost || flags.intersects(F::IN | F::RDHUP);
                session.down.fin |= flags.contains(F::RDHUP);
                session.down.wary |= lost || flags.contains(F::PRI);
                session.up.writable |= lost || flags.contains(F::OUT);
                if flags.contains(F::ERR) && session.down.ended {
                    self.end(key, End::Reset);
                } else {
                    self.turn(key);
                }
            }
        }
    }

    fn session(&mut self, key: Key) -> Option<&mut Session> {
        let slot = self.slots.get_mut(key.slot as usize)?;
        if slot.generation != key.generation {
            return None;
        }
        slot.session.as_deref_mut()
    }

    fn orders(&mut self) {
        let inbox = &self.threads.boxes[self.index];
        if let Some(bell) = inbox.bell.get() {
            let mut count = [0u8; 8];
            let _ = rustix::io::read(bell, &mut count);
        }
        let orders = std::mem::take(&mut *inbox.orders.lock().unwrap_or_else(PoisonError::into_inner));
        for order in orders {
            match order {
                Order::Listen(frontend, socket) => self.listen(frontend, socket),
                Order::Unlisten(address) => {
                    for listener in &mut self.listeners {
                        if listener.as_ref().is_some_and(|listener| listener.address == address) {
                            *listener = None;
                        }
                    }
                }
                Order::Assign(address, frontend) => {
                    for listener in self
                        .listeners
                        .iter_mut()
                        .flatten()
                        .filter(|listener| listener.address == address)
                    {
                        listener.frontend = frontend.clone();
                    }
                }
                Order::Reset(frontend, id) => self.reset_sessions(&frontend, id),
                Order::Stop(at) => {
                    self.listeners.clear();
                    self.stop_at = Some(at);
                }
            }
        }
    }

    fn listen(&mut self, frontend: Arc<Frontend>, socket: OwnedFd) {
        let address = rustix::net::getsockname(&socket)
            .ok()
            .and_then(|any| std::net::SocketAddr::try_from(any).ok());
        let Some(address) = address else {
            tracing::error!(
                frontend = frontend.name,
                "a listener without an address was passed; it is ignored"
            );
            return;
        };
        let index = self
            .listeners
            .iter()
            .position(Option::is_none)
            .unwrap_or(self.listeners.len());
        let whose = Whose::Listener(u32::try_from(index).unwrap_or(u32::MAX));
        // Level-triggered: what is left in the queue is told again, so no accept has to end in EAGAIN.
        if let Err(error) = epoll::add(&self.epoll, &socket, whose.pack(), epoll::EventFlags::IN) {
            tracing::error!(frontend = frontend.name, %address, %error, "the listener cannot be watched; connections to it wait for a restart");
            return;
        }
        let listener = Some(Listener {
            frontend,
            socket,
            address,
            resting_until: None,
        });
        match self.listeners.get_mut(index) {
            Some(place) => *place = listener,
            None => self.listeners.push(listener),
        }
    }

    fn accept(&mut self, index: usize) {
        for _ in 0..ACCEPTS {
            let Some(Some(listener)) = self.listeners.get(index) else {
                return;
            };
            let frontend = listener.frontend.clone();
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            match rustix::net::acceptfrom_with(&listener.socket, flags) {
                Ok((client, address)) => self.open(frontend, client, socket::source(address)),
                Err(Errno::AGAIN) => return,
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    frontend.local_errors.fetch_add(1, Relaxed);
                    self.rest(index);
                    return;
                }
                // The client has left the queue (ECONNABORTED and what else accept(2) passes on from the network).
                Err(_) => {}
            }
        }
    }

    /// Out of descriptors: asking again at once would only burn the processor the running sessions need.
    fn rest(&mut self, index: usize) {
        let until = self.now + REST;
        if let Some(Some(listener)) = self.listeners.get_mut(index) {
            tracing::warn!(
                frontend = listener.frontend.name,
                "out of descriptors or memory: new connections wait; raise LimitNOFILE"
            );
            let whose = Whose::Listener(u32::try_from(index).unwrap_or(u32::MAX));
            let _ = epoll::modify(&self.epoll, &listener.socket, whose.pack(), epoll::EventFlags::empty());
            listener.resting_until = Some(until);
        }
    }

    fn wake_listeners(&mut self) {
        for (index, listener) in self.listeners.iter_mut().enumerate() {
            if let Some(listener) = listener
                && listener.resting_until.is_some_and(|until| until <= self.now)
            {
                listener.resting_until = None;
                let whose = Whose::Listener(u32::try_from(index).unwrap_or(u32::MAX));
                let _ = epoll::modify(&self.epoll, &listener.socket, whose.pack(), epoll::EventFlags::IN);
            }
        }
    }

    /// A client has connected.
    fn open(&mut self, frontend: Arc<Frontend>, client: OwnedFd, source: IpAddr) {
        frontend.accepted.fetch_add(1, Relaxed);
        frontend.sessions.fetch_add(1, Relaxed);
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
        });
        let now = self.now;
        let entry = &mut self.slots[slot as usize];
        let key = Key {
            slot,
            generation: entry.generation,
        };
        entry.session = Some(Box::new(Session {
            frontend,
            client,
            source,
            backend: None,
            connected: false,
            tried: Vec::new(),
            accepted: now,
            dialled: now,
            last_byte: now,
            up: Direction::default(),
            // A fresh socket takes a first answer; what does not fit shows in the write.
            down: Direction::into_fresh_socket(),
            // Inherited from the listener.
            client_nodelay: true,
            client_watched: false,
            reset_at: None,
            armed: u64::MAX,
        }));
        self.live += 1;
        let Self { epoll, slots, .. } = self;
        let watched = slots[slot as usize]
            .session
            .as_ref()
            .map(|s| epoll::add(epoll, &s.client, Whose::Client(key).pack(), READ));
        if !matches!(watched, Some(Ok(()))) {
            self.end(key, End::Reset);
            return;
        }
        self.dial(key);
    }

    /// Connects to the next backend; without one the client is reset.
    fn dial(&mut self, key: Key) {
        let now = self.now;
        loop {
            let Some(session) = self.session(key) else { return };
            let frontend = session.frontend.clone();
            let patience = PATIENCE.max(frontend.rules.load().connect_timeout);
            let picked = if now - session.accepted > patience {
                None
            } else {
                frontend.pick(session.source, &session.tried, now)
            };
            let Some((pick, traffic)) = picked else {
                frontend.failed.fetch_add(1, Relaxed);
                self.end(key, End::Reset);
                return;
            };
            if !session.tried.is_empty() {
                frontend.retries.fetch_add(1, Relaxed);
            }
            let socket = match socket::connect(pick.address) {
                Ok(socket) => socket,
                Err(error) => {
                    let failure = socket::failure_of(error);
                    frontend.connect_failed(pick.id, failure, now);
                    session.tried.push(pick.id);
                    if matches!(error, Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) {
                        // No other backend can help this machine's own shortage.
                        frontend.failed.fetch_add(1, Relaxed);
                        self.end(key, End::Reset);
                        return;
                    }
                    continue;
                }
            };
            let Self { epoll, slots, .. } = self;
            let Some(session) = slots[key.slot as usize].session.as_deref_mut() else {
                return;
            };
            if epoll::add(epoll, &socket, Whose::Backend(key).pack(), READ_WRITE).is_err() {
                frontend.connect_failed(pick.id, Failure::Local, now);
                self.end(key, End::Reset);
                return;
            }
            session.backend = Some(Leg {
                id: pick.id,
                socket,
                traffic,
                nodelay: false,
                tuned: false,
            });
            session.dialled = now;
            self.arm(key);
            return;
        }
    }

    /// The connect in flight has an answer.
    fn dialled(&mut self, key: Key, flags: epoll::EventFlags) {
        use epoll::EventFlags as F;
        let now = self.now;
        let Some(session) = self.session(key) else { return };
        let Some(leg) = &session.backend else { return };
        if flags.intersects(F::ERR | F::HUP) {
            let error = match rustix::net::sockopt::socket_error(&leg.socket) {
                Ok(Err(error)) | Err(error) => error,
                // Closed right after the handshake, before we looked.
                Ok(Ok(())) => Errno::CONNRESET,
            };
            self.next_backend(key, socket::failure_of(error));
            return;
        }
        if !flags.contains(F::OUT) {
            return;
        }
        session.connected = true;
        session.last_byte = now;
        session.up.writable = true;
        session.down.readable |= flags.intersects(F::IN | F::RDHUP);
        session.down.fin |= flags.contains(F::RDHUP);
        session.down.wary |= flags.contains(F::PRI);
        session.tried = Vec::new();
        let took = now - session.dialled;
        session
            .frontend
            .connected(leg.id, socket::number(&leg.socket), took, now);
        let due = session.up.readable || session.down.readable;
        // The connect's timer serves as the session's first one where it is early enough.
        self.arm(key);
        if due {
            self.turn(key);
        }
    }

    /// The backend being dialled did not answer: the same client goes on to the next one.
    fn next_backend(&mut self, key: Key, failure: Failure) {
        let now = self.now;
        let Some(session) = self.session(key) else { return };
        if let Some(leg) = session.backend.take() {
            session.tried.push(leg.id);
            session.frontend.connect_failed(leg.id, failure, now);
        }
        self.dial(key);
    }

    /// Moves what can be moved in both directions.
    fn turn(&mut self, key: Key) {
        let Self {
            epoll,
            slots,
            scratch,
            again,
            now,
            ..
        } = self;
        let Some(slot) = slots
            .get_mut(key.slot as usize)
            .filter(|slot| slot.generation == key.generation)
        else {
            return;
        };
        let Some(session) = slot.session.as_deref_mut() else {
            return;
        };
        let Some(leg) = session.backend.as_mut().filter(|_| session.connected) else {
            return;
        };
        let (client, backend) = (session.client.as_fd(), leg.socket.as_fd());

        let mut sent = 0;
        let up = session.up.turn(client, backend, &mut leg.nodelay, scratch, &mut sent);
        let mut got = 0;
        let down = session
            .down
            .turn(backend, client, &mut session.client_nodelay, scratch, &mut got);

        if sent + got > 0 {
            session.last_byte = *now;
            if sent > 0 {
                leg.traffic.up.fetch_add(sent as u64, Relaxed);
            }
            if got > 0 {
                leg.traffic.down.fetch_add(got as u64, Relaxed);
                leg.traffic.last_byte.store(millis(*now), Relaxed);
            }
        }
        if !session.down.writable && !session.client_watched {
            session.client_watched = true;
            if epoll::modify(&*epoll, client, Whose::Client(key).pack(), READ_WRITE).is_err() {
                self.end(key, End::Reset);
                return;
            }
        }
        if up == Turn::Broken || down == Turn::Broken {
            self.end(key, End::Reset);
            return;
        }
        if up == Turn::Ended && down == Turn::Ended {
            // close(2) sends what FIN is still owed.
            self.end(key, End::Done);
            return;
        }
        let mut half_closed = false;
        for (turn, direction, sink) in [(up, &mut session.up, backend), (down, &mut session.down, client)] {
            if turn == Turn::Ended && !direction.told {
                direction.told = true;
                half_closed = true;
                relay::finish(sink);
            }
        }
        if up == Turn::More || down == Turn::More {
            again.push(key);
        }
        if half_closed {
            // The other side's silence counts from here, not from the last byte.
            session.last_byte = *now;
            self.arm(key);
        }
    }

    /// Sets the session's timer if a deadline of its is earlier than what is set.
    fn arm(&mut self, key: Key) {
        let Self { slots, wheel, .. } = self;
        let Some(session) = slots
            .get_mut(key.slot as usize)
            .and_then(|slot| slot.session.as_deref_mut())
        else {
            return;
        };
        let Some(deadline) = session.deadline() else { return };
        let tick = tick_of(deadline);
        if tick < session.armed {
            session.armed = wheel.set(tick, key);
        }
    }

    fn timer(&mut self, tick: u64, key: Key) {
        let now = self.now;
        let Some(session) = self.session(key) else { return };
        if session.armed != tick {
            return;
        }
        session.armed = u64::MAX;
        if session.reset_at.is_some_and(|at| at <= now) {
            self.end(key, End::Reset);
            return;
        }
        if !session.connected {
            if session.dialled + session.frontend.rules.load().connect_timeout <= now {
                self.next_backend(key, Failure::Timeout);
            } else {
                self.arm(key);
            }
            return;
        }
        if let Some(leg) = session.backend.as_mut().filter(|leg| !leg.tuned)
            && session.accepted + GROWN_UP <= now
        {
            leg.tuned = true;
            if let Err(error) = socket::tune(leg.socket.as_fd()) {
                tracing::debug!(frontend = session.frontend.name, %error, "keepalive could not be set on a backend connection");
            }
        }
        let rules = session.frontend.rules.load();
        let quiet = now - session.last_byte;
        if session.half_closed() && quiet >= rules.half_close_timeout {
            drop(rules);
            self.end(key, End::Reset);
        } else if rules.idle_timeout.is_some_and(|idle| quiet >= idle) {
            drop(rules);
            self.end(key, End::Done);
        } else {
            drop(rules);
            self.arm(key);
        }
    }

    /// Sessions of a backend that went down are reset, spread over [`JITTER`] so that their clients do not all come
    /// back in the same millisecond. Those that do not need a backend any more are left alone.
    fn reset_sessions(&mut self, frontend: &str, id: BackendId) {
        let mut hit: Vec<Key> = Vec::new();
        for (slot, entry) in self.slots.iter().enumerate() {
            if let Some(session) = &entry.session
                && session.connected
                && session.reset_at.is_none()
                && session.frontend.name == frontend
                && session.backend.as_ref().is_some_and(|leg| leg.id == id)
            {
                hit.push(Key {
                    slot: u32::try_from(slot).unwrap_or(u32::MAX),
                    generation: entry.generation,
                });
            }
        }
        let mut frontend = None;
        for key in &hit {
            let spread = u64::try_from(JITTER.as_millis()).unwrap_or(0).max(1);
            let jitter = Duration::from_millis(self.draw() % spread);
            let at = self.now + jitter;
            if let Some(session) = self.session(*key) {
                session.reset_at = Some(at);
                frontend = Some(session.frontend.clone());
            }
            self.arm(*key);
        }
        if let Some(frontend) = frontend {
            frontend.were_reset(id, hit.len() as u64);
        }
    }

    /// xorshift64: spreads resets; nothing hangs on its quality.
    fn draw(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn end(&mut self, key: Key, end: End) {
        let now = self.now;
        let Self {
            slots,
            free,
            scratch,
            live,
            ..
        } = self;
        let Some(slot) = slots
            .get_mut(key.slot as usize)
            .filter(|slot| slot.generation == key.generation)
        else {
            return;
        };
        let Some(mut session) = slot.session.take() else { return };
        slot.generation = (slot.generation + 1) % GENERATIONS;
        free.push(key.slot);
        *live -= 1;
        session.frontend.sessions.fetch_sub(1, Relaxed);
        session.up.close(scratch);
        session.down.close(scratch);
        if let Some(leg) = session.backend {
            if session.connected {
                session.frontend.closed(leg.id, leg.socket.as_raw_fd(), now);
            } else {
                session.frontend.abandoned(leg.id, now);
            }
            close(leg.socket, end);
        }
        close(session.client, end);
    }

    fn stopped(&mut self) -> bool {
        let Some(at) = self.stop_at else { return false };
        if self.live > 0 && self.now < at {
            return false;
        }
        let keys: Vec<Key> = self
            .slots
            .iter()
            .enumerate()
            .filter(|(_, slot)| slot.session.is_some())
            .map(|(slot, entry)| Key {
                slot: u32::try_from(slot).unwrap_or(u32::MAX),
                generation: entry.generation,
            })
            .collect();
        for key in keys {
            self.end(key, End::Reset);
        }
        true
    }
}

impl Session {
    fn half_closed(&self) -> bool {
        self.up.told != self.down.told
    }

    /// The earliest moment at which something has to be looked at.
    fn deadline(&self) -> Option<Moment> {
        let rules = self.frontend.rules.load();
        let mut earliest = self.reset_at;
        let mut consider = |moment: Moment| earliest = Some(earliest.map_or(moment, |at: Moment| at.min(moment)));
        if !self.connected {
            consider(self.dialled + rules.connect_timeout);
            return earliest;
        }
        if self.backend.as_ref().is_some_and(|leg| !leg.tuned) {
            consider(self.accepted + GROWN_UP);
        }
        if self.half_closed() {
            consider(self.last_byte + rules.half_close_timeout);
        }
        if let Some(idle) = rules.idle_timeout {
            consider(self.last_byte + idle);
        }
        earliest
    }
}

fn close(socket: OwnedFd, end: End) {
    match end {
        End::Done => drop(socket),
        End::Reset => socket::reset(socket),
    }
}

fn millis(moment: Moment) -> u64 {
    u64::try_from(moment.since_boot().as_millis()).unwrap_or(u64::MAX)
}
