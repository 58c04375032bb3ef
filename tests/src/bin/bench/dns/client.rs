//! The load generator: one thread, many sockets, every answer checked.
//!
//! ```text
//! warm     each name of each kind until it was answered, twice
//! rate     open loop: every TICK the queries that are due, in pairs, whatever has been answered
//! maximum  closed loop: each answer is followed by a query, so that a fixed number is outstanding
//! ```
//! Time is taken from the moment a query was due, not from when it could be sent, to the kernel's stamp on the answer: neither
//! a late generator nor a late reader flatters. What it says to the benchmark and when is in `session.rs`.

use std::{
    collections::VecDeque,
    net::{Ipv6Addr, SocketAddr, UdpSocket},
    ops::Range,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::{
    buffer::spare_capacity,
    event::epoll::{self, CreateFlags, EventData, EventFlags},
    fs::Timespec,
    io::Errno,
};
use serde_json::{Value, json};

use super::{
    Kind,
    batch::{MOST, Outgoing, Received, nanos},
    wire::{Asked, NAMES},
};
use crate::{
    session::{Errors, ready, wait_for_line},
    stats::percentile,
};

/// Each with a port of its own, so that a server's threads all get their share.
const SOCKETS: usize = 32;
/// Below those that the kernel gives (`sandbox`): one of ours taken for a query to the upstream would be a resolver's trouble
/// that no client on another machine causes.
const PORTS: Range<u16> = 5400..10_240;
/// Ids of a socket in use at a time; an answer that comes later than so many others is lost.
const SLOTS: usize = 1024;
const TICK: Duration = Duration::from_micros(250);
/// Queries sent to one socket at a time: A and AAAA, as a stub resolver does.
const PAIR: u64 = 2;
/// What has not come by then is lost.
const LOST: Duration = Duration::from_secs(1);
/// A query sent that long after it was due was sent late.
const LATE: Duration = Duration::from_millis(1);
/// One in so many of a mix is for a name never asked before.
const FRESH: u64 = 10;

/// `bench dns-client warm|rate|maximum TARGET ...`
pub(crate) fn main(args: &[String]) -> Result<()> {
    let Some((mode, rest)) = args.split_first() else {
        bail!("dns-client needs a mode")
    };
    let numbers: Vec<u64> = rest.iter().skip(1).filter_map(|arg| arg.parse().ok()).collect();
    let target: SocketAddr = rest.first().context("dns-client needs a target")?.parse()?;
    let kind = |number: u64| {
        let kind = Kind::ALL.get(usize::try_from(number)?);
        kind.copied().context("dns-client: no such kind")
    };
    let mut generator = Generator::new(target)?;
    match (mode.as_str(), &numbers[..]) {
        ("warm", &[]) => {
            ready()?;
            generator.warm()?;
        }
        ("rate", &[number, rate, millis]) => {
            generator.source = Source::Random(kind(number)?);
            ready()?;
            generator.at_rate(rate, Duration::from_millis(millis))?;
        }
        ("maximum", &[number, window, millis]) => {
            generator.source = Source::Random(kind(number)?);
            ready()?;
            generator.at_maximum(window, Duration::from_millis(millis))?;
        }
        _ => bail!("dns-client: {mode} with {numbers:?} is no mode"),
    }
    println!("{}", generator.result());
    wait_for_line()
}

/// Where the next query comes from.
enum Source {
    /// A list, in which lost ones are put again.
    List(VecDeque<Asked>),
    /// Names in random order.
    Random(Kind),
}

struct Generator {
    sockets: Vec<Lane>,
    epoll: OwnedFd,
    received: Received,
    outgoing: Outgoing,
    source: Source,
    random: Random,
    /// The next fresh name's number: the time in ns when this process began, and up.
    fresh: u64,
    sent: u64,
    late: u64,
    lost: u64,
    /// Answers to nothing that is outstanding: late ones, and what nobody asked for.
    strays: u64,
    latencies: Vec<u32>,
    seconds: f64,
    errors: Errors,
}

/// A socket and what is outstanding on it.
struct Lane {
    socket: UdpSocket,
    next: u16,
    slots: Vec<Option<Pending>>,
}

struct Pending {
    id: u16,
    asked: Asked,
    /// ns since 1970
    due: u64,
}

impl Generator {
    fn new(target: SocketAddr) -> Result<Self> {
        // Without it every sleep is up to 50 µs too long.
        // SAFETY: the option takes a number and changes nothing but this thread's timers.
        unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let begin = now();
        let mut random = Random(begin | 1);
        // Others each time: which thread of a server gets which port, its kernel decides by a hash.
        let first = PORTS.start + random.below(u64::from(PORTS.end - PORTS.start)) as u16;
        let mut ports = (first..PORTS.end).chain(PORTS);
        let mut sockets = Vec::new();
        for number in 0..SOCKETS as u64 {
            let bound = ports.find_map(|port| UdpSocket::bind((Ipv6Addr::LOCALHOST, port)).ok());
            let socket = bound.context("no port is free")?;
            socket.connect(target)?;
            socket.set_nonblocking(true)?;
            super::set_option(&socket, libc::SO_RCVBUFFORCE, 4 << 20)?;
            super::set_option(&socket, libc::SO_TIMESTAMPNS, 1)?;
            epoll::add(&epoll, &socket, EventData::new_u64(number), EventFlags::IN)?;
            sockets.push(Lane {
                socket,
                next: 0,
                slots: (0..SLOTS).map(|_| None).collect(),
            });
        }
        Ok(Self {
            sockets,
            epoll,
            received: Received::new(),
            outgoing: Outgoing::new(),
            source: Source::List(VecDeque::new()),
            random,
            fresh: begin,
            sent: 0,
            late: 0,
            lost: 0,
            strays: 0,
            latencies: Vec::with_capacity(1 << 20),
            seconds: 0.0,
            errors: Errors::default(),
        })
    }

    fn result(&mut self) -> Value {
        // An answer that was lost may still come; more of them were asked for by nobody.
        if self.strays > self.lost {
            self.errors.add("answers to queries that were not asked");
        }
        self.latencies.sort_unstable();
        let micros = |nanos: Option<u32>| nanos.map(|nanos| f64::from(nanos) / 1000.0);
        json!({
            "sent": self.sent,
            "answered": self.latencies.len(),
            "lost": self.lost,
            "late": self.late,
            "seconds": self.seconds,
            "p50_us": micros(percentile(&self.latencies, 50)),
            "p99_us": micros(percentile(&self.latencies, 99)),
            "max_us": micros(self.latencies.last().copied()),
            "errors": self.errors.0,
        })
    }

    /// Has everything cached. Twice: what a server keeps ready for answers that are asked again, it then has.
    fn warm(&mut self) -> Result<()> {
        for _ in 0..2 {
            let kinds = [Asked::A, Asked::Synthesised, Asked::Native];
            let mut list: Vec<Asked> = (0..NAMES).flat_map(|number| kinds.map(|kind| kind(number))).collect();
            // Fisher and Yates.
            for i in (1..list.len()).rev() {
                list.swap(i, self.random.below(i as u64 + 1) as usize);
            }
            let before = self.latencies.len();
            self.source = Source::List(list.into());
            self.closed_loop(64, Duration::from_secs(20))?;
            ensure!(
                self.errors.count() > 0 || self.latencies.len() - before == 3 * NAMES as usize,
                "{} of {} names were answered within 20 s while warming up",
                self.latencies.len() - before,
                3 * NAMES
            );
        }
        Ok(())
    }

    fn at_rate(&mut self, rate: u64, time: Duration) -> Result<()> {
        let tick = TICK.as_nanos() as u64;
        let ticks = time.as_nanos() as u64 / tick;
        let begin = now() + tick;
        let mut lane = 0;
        for number in 0..ticks {
            let due = begin + number * tick;
            sleep_until(due);
            let target = u64::try_from(u128::from(number + 1) * u128::from(rate) * u128::from(tick) / 1_000_000_000)?;
            while self.sent < target {
                let count = PAIR.min(target - self.sent);
                if now().saturating_sub(due) > LATE.as_nanos() as u64 {
                    self.late += count;
                }
                self.send(lane, count, Some(due))?;
                lane = (lane + 1) % SOCKETS;
            }
            self.receive_ready(Duration::ZERO, None)?;
        }
        self.seconds = (now() - begin) as f64 / 1e9;
        self.drain()
    }

    fn at_maximum(&mut self, window: u64, time: Duration) -> Result<()> {
        self.closed_loop(window, time)
    }

    /// Keeps `window` queries outstanding until `time` is over or there are no more.
    fn closed_loop(&mut self, window: u64, time: Duration) -> Result<()> {
        let begin = now();
        let end = begin + time.as_nanos() as u64;
        for lane in 0..SOCKETS {
            self.send(lane, window / SOCKETS as u64, None)?;
        }
        let mut swept = begin;
        loop {
            self.receive_ready(Duration::from_millis(100), Some(end))?;
            let now = now();
            if now - swept > LOST.as_nanos() as u64 / 10 {
                swept = now;
                for lane in 0..SOCKETS {
                    let lost = self.give_up(lane, now.saturating_sub(LOST.as_nanos() as u64));
                    self.send(lane, lost, None)?;
                }
            }
            if now >= end || self.outstanding() == 0 {
                break;
            }
        }
        self.seconds = (now() - begin) as f64 / 1e9;
        self.drain()
    }

    /// Waits for what is outstanding; what does not come is lost.
    fn drain(&mut self) -> Result<()> {
        let end = now() + LOST.as_nanos() as u64;
        while self.outstanding() > 0 && now() < end {
            self.receive_ready(Duration::from_millis(20), None)?;
        }
        for lane in 0..SOCKETS {
            self.give_up(lane, u64::MAX);
        }
        Ok(())
    }

    fn outstanding(&self) -> usize {
        self.sockets
            .iter()
            .map(|lane| lane.slots.iter().flatten().count())
            .sum()
    }

    /// Sends `count` queries, or as many as there are, on one socket.
    fn send(&mut self, lane: usize, count: u64, due: Option<u64>) -> Result<()> {
        let mut left = count;
        while left > 0 {
            let batch = left.min(MOST as u64);
            for _ in 0..batch {
                let Some(asked) = self.next() else {
                    left = 0;
                    break;
                };
                let id = self.take_id(lane, asked, due.unwrap_or_else(now));
                self.outgoing.push(None, |out| asked.query(id, out));
                self.sent += 1;
            }
            self.outgoing
                .send(self.sockets[lane].socket.as_fd())
                .context("sending a query")?;
            left = left.saturating_sub(batch);
        }
        Ok(())
    }

    fn take_id(&mut self, lane: usize, asked: Asked, due: u64) -> u16 {
        let high = (self.random.below(64) as u16) << 10;
        let lane = &mut self.sockets[lane];
        let slot = usize::from(lane.next) % SLOTS;
        lane.next = lane.next.wrapping_add(1);
        let id = high | slot as u16;
        if lane.slots[slot].replace(Pending { id, asked, due }).is_some() {
            self.lost += 1;
        }
        id
    }

    /// Counts as lost what was due before `before`; returns how many.
    fn give_up(&mut self, lane: usize, before: u64) -> u64 {
        let mut count = 0;
        for slot in &mut self.sockets[lane].slots {
            if let Some(pending) = slot.take_if(|pending| pending.due < before) {
                if let Source::List(list) = &mut self.source {
                    list.push_back(pending.asked);
                }
                count += 1;
            }
        }
        self.lost += count;
        count
    }

    fn next(&mut self) -> Option<Asked> {
        let kind = match &mut self.source {
            Source::List(list) => return list.pop_front(),
            Source::Random(kind) => *kind,
        };
        let name = self.random.below(NAMES);
        Some(match kind {
            Kind::A => Asked::A(name),
            Kind::Synthesised => Asked::Synthesised(name),
            Kind::Native => Asked::Native(name),
            Kind::Mix if self.random.below(FRESH) == 0 => {
                self.fresh += 1;
                if self.random.below(2) == 0 {
                    Asked::FreshA(self.fresh)
                } else {
                    Asked::FreshSynthesised(self.fresh)
                }
            }
            Kind::Mix => match self.random.below(3) {
                0 => Asked::A(name),
                1 => Asked::Synthesised(name),
                _ => Asked::Native(name),
            },
        })
    }

    /// Takes all answers that are there, after waiting for the first for at most `wait`. Before `refill` each is followed by
    /// a query on the same socket.
    fn receive_ready(&mut self, wait: Duration, refill: Option<u64>) -> Result<()> {
        let mut events = Vec::with_capacity(SOCKETS);
        let wait = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(wait.subsec_nanos()),
        };
        match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&wait)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in &events {
            let lane = usize::try_from({ event.data }.u64())?;
            let count = match self.received.receive(self.sockets[lane].socket.as_fd()) {
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => 0,
                Err(error) => return Err(error).context("receiving an answer"),
            };
            let mut answered = 0;
            for i in 0..count {
                answered += self.take_answer(lane, i);
            }
            if refill.is_some_and(|end| now() < end) {
                self.send(lane, answered, None)?;
            }
        }
        Ok(())
    }

    /// Checks the `i`-th datagram; returns the number of queries that it ends.
    fn take_answer(&mut self, lane: usize, i: usize) -> u64 {
        let answer = self.received.datagram(i);
        let id = answer.first_chunk().map_or(0, |id| u16::from_be_bytes(*id));
        let slot = &mut self.sockets[lane].slots[usize::from(id) % SLOTS];
        let Some(pending) = slot.take_if(|pending| pending.id == id) else {
            self.strays += 1;
            return 0;
        };
        let latency = self.received.stamp(i).unwrap_or_else(now).saturating_sub(pending.due);
        match pending.asked.check(id, answer) {
            Err(error) => self.errors.add(error),
            // While warming up all that counts is that it is cached now.
            Ok(()) if latency > LOST.as_nanos() as u64 && matches!(self.source, Source::Random(_)) => self.lost += 1,
            Ok(()) => self.latencies.push(u32::try_from(latency).unwrap_or(u32::MAX)),
        }
        1
    }
}

/// xorshift64* (Vigna 2016): fast, and good enough for an order of names.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let upper = self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32;
        (upper * limit) >> 32
    }
}

/// In ns since 1970, as the kernel stamps what arrives.
fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live local of the type that the call writes.
    unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &mut time) };
    nanos(time)
}

/// Returns at once if that is over.
fn sleep_until(moment: u64) {
    let time = libc::timespec {
        tv_sec: (moment / 1_000_000_000) as libc::time_t,
        tv_nsec: (moment % 1_000_000_000) as libc::c_long,
    };
    // SAFETY: the pointer is to a live local; no remaining time is asked for.
    unsafe { libc::clock_nanosleep(libc::CLOCK_REALTIME, libc::TIMER_ABSTIME, &time, std::ptr::null_mut()) };
}
