//! A data thread: one epoll set, its own listener sockets, its own sessions.
//!
//! A session lives and dies on the thread that accepted it, as a plain struct in a slab; what threads share is the
//! frontend's pool (one short lock at pick, connect and close) and the backend's traffic counters.
//!
//! A short connection costs 13 system calls beside its share of epoll_wait: accept4, two epoll_ctl, socket, connect,
//! three recv, two send, shutdown, two close. What makes it so few: sockets are watched edge-triggered and never
//! unregistered, a short read is known to have emptied the socket, the end of the request is read off EPOLLRDHUP, and
//! the backend leg's options wait until a session has lived for a second.
//!
//! ```text
//! accept -> (header)? -> dial ... hedge -> relay -> end      dial.rs, ingress.rs, relay.rs
//!                                           \-> handed over to a successor          handover.rs
//! ```

use std::{
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, epoll},
    io::Errno,
    net::SocketFlags,
    time::Timespec,
};

use super::{
    clock,
    frontend::{Frontend, Refusal},
    relay::{self, Scratch, Turn},
    session::{End, GROWN_UP, HEAD_WAIT, Phase, Session},
    slab::{Content, GENERATIONS, Key, Slab},
    socket,
    threads::{Order, Threads, millis},
};
use crate::{
    moment::Moment,
    pool::BackendId,
    wheel::{Wheel, tick_of},
};

/// Events taken from the kernel at once.
const EVENTS: usize = 256;
/// Connections accepted per event of a listener; the kernel tells again if there are more.
const ACCEPTS: usize = 8;
/// How long a listener rests when this process is out of descriptors.
const REST: Duration = Duration::from_millis(100);
/// Between two log lines about that.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);
/// Sessions of a down backend are reset within this time, each at a random moment.
const JITTER: Duration = Duration::from_millis(300);
/// How long a side may take nothing before it is looked at, and again; a fraction of TCP_USER_TIMEOUT.
const STALL: Duration = Duration::from_secs(4);
/// Silence in both directions after which a session may be sent to another backend.
const QUIET: Duration = Duration::from_secs(2);

/// Whose event it is; packed into the 64 bits that epoll carries.
#[derive(Clone, Copy)]
pub(super) enum Whose {
    Bell,
    Listener(u32),
    Client(Key),
    /// The backend leg of a session, or an attempt.
    Backend(Key),
}

impl Whose {
    pub(super) fn pack(self) -> epoll::EventData {
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
    address: SocketAddr,
    resting_until: Option<Moment>,
}

pub(crate) struct Reactor {
    pub(super) threads: Arc<Threads>,
    pub(super) index: usize,
    pub(super) epoll: OwnedFd,
    listeners: Vec<Option<Listener>>,
    pub(super) slab: Slab,
    wheel: Wheel<Key>,
    pub(super) scratch: Scratch,
    /// Sessions whose turn was cut short to be fair.
    again: Vec<Key>,
    pub(super) now: Moment,
    random: u64,
    stop_at: Option<Moment>,
    /// A descriptor held back for the backend's socket of a client that took the last one. Without it nobody is accepted.
    pub(super) spare: Option<OwnedFd>,
    /// When the log last told of a shortage.
    complained_at: Option<Moment>,
    /// The sessions live on in a successor: nothing of them may be touched.
    pub(super) handed_over: bool,
}

pub(super) const READ: epoll::EventFlags = epoll::EventFlags::IN
    .union(epoll::EventFlags::RDHUP)
    .union(epoll::EventFlags::PRI)
    .union(epoll::EventFlags::ET);
pub(super) const READ_WRITE: epoll::EventFlags = READ.union(epoll::EventFlags::OUT);

impl Reactor {
    pub(super) fn new(threads: Arc<Threads>, index: usize) -> std::io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        if let Some(bell) = threads.bell(index) {
            epoll::add(&epoll, bell, Whose::Bell.pack(), epoll::EventFlags::IN)?;
        }
        let now = clock::now();
        threads.beat(index, now);
        let mut seed = [0u8; 8];
        let _ = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty());
        Ok(Self {
            threads,
            index,
            epoll,
            listeners: Vec::new(),
            slab: Slab::default(),
            wheel: Wheel::new(now),
            scratch: Scratch::new(),
            again: Vec::new(),
            now,
            random: u64::from_ne_bytes(seed) | 1,
            stop_at: None,
            spare: spare(),
            complained_at: None,
            handed_over: false,
        })
    }

    pub(super) fn run(mut self) {
        if !self.hold() {
            return;
        }
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
            self.threads.beat(self.index, self.now);
            for event in &events {
                self.event(Whose::unpack(event.data), event.flags);
                if self.handed_over {
                    return;
                }
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

    /// Takes what a predecessor hands over, and touches none of it until the word has come; `false` if it does not come.
    fn hold(&mut self) -> bool {
        while self.threads.are_held() {
            let threads = self.threads.clone();
            if let Some(bell) = threads.bell(self.index) {
                let mut bells = [PollFd::new(bell, PollFlags::IN)];
                let half_a_second = Timespec {
                    tv_sec: 0,
                    tv_nsec: 500_000_000,
                };
                // Not the epoll set: it tells each event once, and what sockets report now is not for us yet.
                let _ = rustix::event::poll(&mut bells, Some(&half_a_second));
            }
            self.now = clock::now();
            self.threads.beat(self.index, self.now);
            self.orders();
            if self.stop_at.is_some() {
                return false;
            }
        }
        self.now = clock::now();
        for key in self.slab.sessions_where(|session| session.phase == Phase::Dialling) {
            self.dial(key);
        }
        true
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
                let Some(session) = self.slab.session(key) else { return };
                session.up.readable |= lost || flags.intersects(F::IN | F::RDHUP);
                session.up.fin |= flags.contains(F::RDHUP);
                session.up.wary |= lost || flags.contains(F::PRI);
                session.down.writable |= lost || flags.contains(F::OUT);
                if flags.contains(F::ERR) && (session.up.ended || !session.relaying()) {
                    // The client has reset; whoever only closed its sending half still waits for an answer.
                    self.end(key, End::Reset);
                    return;
                }
                match session.phase {
                    Phase::Header => self.read_header(key),
                    Phase::Dialling => {}
                    Phase::Relaying => self.turn(key),
                }
            }
            Whose::Backend(key) => {
                let Some(session) = self.slab.session(key) else {
                    self.attempt_answered(key, flags);
                    return;
                };
                if !session.relaying() {
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

    fn orders(&mut self) {
        for order in self.threads.clone().orders(self.index) {
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
                Order::Shed(frontend, id, left) => self.shed(&frontend, id, &left),
                Order::Adopt(moved, answer) => {
                    let whole = moved.into_iter().all(|moved| self.adopt(moved));
                    // Whoever does not listen any more does not take over.
                    let _ = answer.send(whole);
                }
                Order::Freeze(freeze) => self.freeze(freeze),
                Order::Stop(at) => {
                    self.listeners.clear();
                    self.stop_at = Some(at);
                }
            }
            if self.handed_over {
                return;
            }
        }
    }

    fn listen(&mut self, frontend: Arc<Frontend>, socket: OwnedFd) {
        let address = rustix::net::getsockname(&socket)
            .ok()
            .and_then(|any| SocketAddr::try_from(any).ok());
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
            if self.spare.is_none() {
                self.rest(index);
                return;
            }
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
            if self.complained_at.is_none_or(|at| self.now - at >= COMPLAIN_EVERY) {
                self.complained_at = Some(self.now);
                tracing::warn!(
                    frontend = listener.frontend.name,
                    "out of descriptors or memory: new connections wait; raise LimitNOFILE"
                );
            }
            let whose = Whose::Listener(u32::try_from(index).unwrap_or(u32::MAX));
            let _ = epoll::modify(&self.epoll, &listener.socket, whose.pack(), epoll::EventFlags::empty());
            listener.resting_until = Some(until);
        }
    }

    fn wake_listeners(&mut self) {
        if self.spare.is_none() {
            self.spare = spare();
            if self.spare.is_none() {
                return;
            }
        }
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
    fn open(&mut self, frontend: Arc<Frontend>, client: OwnedFd, source: SocketAddr) {
        frontend.accepted.fetch_add(1, Relaxed);
        let phase = match frontend.door(source) {
            Ok(phase) => phase,
            Err(refusal) => {
                frontend.refuse(refusal, source);
                socket::reset(client);
                return;
            }
        };
        frontend.sessions.fetch_add(1, Relaxed);
        let session = Session::new(frontend, client, source, phase, self.now);
        let key = self.slab.put(Content::Session(Box::new(session)));
        let Self { epoll, slab, .. } = self;
        let watched = slab
            .session(key)
            .map(|session| epoll::add(epoll, &session.client, Whose::Client(key).pack(), READ));
        if !matches!(watched, Some(Ok(()))) {
            self.end(key, End::Reset);
            return;
        }
        match phase {
            // The header's event comes with its first byte.
            Phase::Header => self.arm(key),
            _ => self.admit(key),
        }
    }

    /// The client's true address is known: its limits, then its backend.
    pub(super) fn admit(&mut self, key: Key) {
        let now = self.now;
        let Some(session) = self.slab.session(key) else { return };
        match session.frontend.admit(session.source.ip(), now) {
            Ok(counted) => {
                session.admitted = counted;
                session.phase = Phase::Dialling;
                self.dial(key);
            }
            Err(refused) => {
                session.frontend.refuse(Refusal::Limit(refused), session.source);
                self.end(key, End::Reset);
            }
        }
    }

    /// Moves what can be moved in both directions.
    pub(super) fn turn(&mut self, key: Key) {
        let Self {
            epoll,
            slab,
            scratch,
            again,
            now,
            ..
        } = self;
        let Some(session) = slab.session(key) else { return };
        let relaying = session.relaying();
        let Some(leg) = session.backend.as_mut().filter(|_| relaying) else {
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
        let stalled = session.up.is_blocked() || session.down.is_blocked();
        let mut to_arm = false;
        if stalled && session.stall_at.is_none() {
            session.stall_at = Some(*now + STALL);
            to_arm = true;
        } else if !stalled && session.stall_at.is_some() {
            session.stall_at = None;
            if session.patient != [false; 2] {
                session.look_at_stalled();
            }
        }
        let Some(leg) = session.backend.as_ref() else { return };
        let (client, backend) = (session.client.as_fd(), leg.socket.as_fd());
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
        }
        if half_closed || to_arm {
            self.arm(key);
        }
    }

    /// Sets the session's timer if a deadline of its is earlier than what is set.
    pub(super) fn arm(&mut self, key: Key) {
        let Self { slab, wheel, .. } = self;
        let Some(session) = slab.session(key) else { return };
        let Some(deadline) = session.deadline() else { return };
        let tick = tick_of(deadline);
        if tick < session.armed {
            session.armed = wheel.set(tick, key);
        }
    }

    /// Sets the timer of an attempt.
    pub(super) fn arm_attempt(&mut self, key: Key, deadline: Moment) {
        self.wheel.set(tick_of(deadline), key);
    }

    fn timer(&mut self, tick: u64, key: Key) {
        let now = self.now;
        let Some(session) = self.slab.session(key) else {
            self.attempt_timer(key);
            return;
        };
        if session.armed != tick {
            return;
        }
        session.armed = u64::MAX;
        if session.reset_at.is_some_and(|at| at <= now) {
            self.end(key, End::Reset);
            return;
        }
        match session.phase {
            Phase::Header => self.header_timer(key),
            Phase::Dialling => self.dial_timer(key),
            Phase::Relaying => self.relay_timer(key),
        }
    }

    fn relay_timer(&mut self, key: Key) {
        let now = self.now;
        let Some(session) = self.slab.session(key) else { return };
        if let Some(leg) = session.backend.as_mut().filter(|leg| !leg.tuned)
            && session.accepted + GROWN_UP <= now
        {
            leg.tuned = true;
            if let Err(error) = socket::tune(leg.socket.as_fd()) {
                tracing::debug!(frontend = session.frontend.name, %error, "keepalive could not be set on a backend connection");
            }
        }
        if session.stall_at.is_some_and(|at| at <= now) {
            session.stall_at = Some(now + STALL);
            if !session.look_at_stalled() {
                tracing::debug!(frontend = session.frontend.name, "a side that took nothing has gone");
                self.end(key, End::Reset);
                return;
            }
        }
        if session.up.head.is_some() && now - session.last_byte >= HEAD_WAIT {
            session.up.head_due = true;
            self.turn(key);
        }
        let Some(session) = self.slab.session(key) else { return };
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

    fn reset_sessions(&mut self, frontend: &str, id: BackendId) {
        let hit = self.slab.sessions_where(|session| {
            session.relaying()
                && session.reset_at.is_none()
                && session.frontend.name == frontend
                && session.backend.as_ref().is_some_and(|leg| leg.id == id)
        });
        let mut frontend = None;
        for key in &hit {
            let spread = u64::try_from(JITTER.as_millis()).unwrap_or(0).max(1);
            let jitter = Duration::from_millis(self.draw() % spread);
            let at = self.now + jitter;
            if let Some(session) = self.slab.session(*key) {
                session.reset_at = Some(at);
                frontend = Some(session.frontend.clone());
            }
            self.arm(*key);
        }
        if let Some(frontend) = frontend {
            frontend.were_reset(id, hit.len() as u64);
        }
    }

    /// Closes sessions of a backend with more than its share, those that have been quiet longest first. Their clients
    /// connect again and are given to whoever has fewer.
    fn shed(&mut self, frontend: &Arc<Frontend>, id: BackendId, left: &AtomicU32) {
        let now = self.now;
        let mut quiet = self.slab.sessions_where(|session| {
            Arc::ptr_eq(&session.frontend, frontend)
                && session.backend.as_ref().is_some_and(|leg| leg.id == id)
                && session.quiet_for(QUIET, now)
        });
        quiet.sort_by_key(|key| self.slab.session(*key).map(|session| session.last_byte));
        let mut closed = 0;
        for key in quiet {
            if left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_err() {
                break;
            }
            self.end(key, End::Done);
            closed += 1;
        }
        if closed > 0 {
            frontend.were_shed(id, closed, now);
        }
    }

    /// xorshift64: spreads resets; nothing hangs on its quality.
    fn draw(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    pub(super) fn end(&mut self, key: Key, end: End) {
        match self.slab.take(key) {
            Content::Session(session) => session.close(end, &mut self.scratch, self.now),
            Content::Attempt(attempt) => attempt.frontend.abandoned(attempt.leg.id, self.now),
            Content::Empty => {}
        }
    }

    fn stopped(&mut self) -> bool {
        let Some(at) = self.stop_at else { return false };
        if self.slab.sessions() > 0 && self.now < at {
            return false;
        }
        for key in self.slab.keys(|content| !matches!(content, Content::Empty)) {
            self.end(key, End::Reset);
        }
        true
    }
}

/// Any descriptor will do.
fn spare() -> Option<OwnedFd> {
    rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).ok()
}
