//! The clients: one process per measurement, so that their CPU time and descriptors are apart from all others'.
//!
//! What they say to the benchmark and when is in `session.rs`.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, SocketAddrV4, TcpStream},
    os::fd::{AsRawFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::{
    buffer::spare_capacity,
    event::epoll::{self, CreateFlags, EventData, EventFlags},
    fs::Timespec,
    io::Errno,
};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    backend::{STALLED, receive, send},
    wire::{Checker, HEAD, Head, Kind, RECEIPT, REPLY, hold_message, receipt, reply, source},
};
use crate::{
    session::{Errors, ready, wait_for_line},
    stats::percentile,
};

/// A connection that takes longer has failed.
const SLOW: Duration = Duration::from_secs(5);
/// After that many failures there is nothing left to learn.
const ENOUGH: u64 = 100;

/// `bench lb-client exchange|bulk|hold TARGET ...`
pub(crate) fn main(args: &[String]) -> Result<()> {
    let Some((mode, rest)) = args.split_first() else {
        bail!("lb-client needs a mode")
    };
    let numbers: Vec<u64> = rest.iter().skip(1).filter_map(|arg| arg.parse().ok()).collect();
    let target: SocketAddr = rest.first().context("lb-client needs a target")?.parse()?;
    let result = match (mode.as_str(), &numbers[..]) {
        ("exchange", &[in_flight, millis, count]) => exchange(target, in_flight, millis, count)?,
        ("up", &[streams, bytes, millis]) => bulk(target, Kind::Up, streams, bytes, millis)?,
        ("down", &[streams, bytes, millis]) => bulk(target, Kind::Down, streams, bytes, millis)?,
        ("hold", &[sessions]) => hold(target, sessions)?,
        _ => bail!("lb-client: {mode} with {numbers:?} is no mode"),
    };
    println!("{result}");
    wait_for_line()
}

/// A socket bound to one of the source addresses; its port is chosen at connect, so that a port can serve many targets.
fn socket(id: u64, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, kind, Some(Protocol::TCP))?;
    let on: libc::c_int = 1;
    // SAFETY: the option takes an int; the pointer is to one, and its size is given.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    socket.bind(&SocketAddrV4::new(source(id), 0).into())?;
    Ok(socket)
}

/// New connections: `in_flight` at a time, each one request and one reply, until `millis` or `count` is reached.
fn exchange(target: SocketAddr, in_flight: u64, millis: u64, count: u64) -> Result<Value> {
    let mut exchanges = Exchanges::new(target, in_flight)?;
    exchanges.run(SLOW, in_flight * 4)?;
    let warm_up = std::mem::take(&mut exchanges.errors);
    ensure!(warm_up.count() == 0, "while warming up: {}", warm_up.list());
    exchanges.latencies.clear();
    ready()?;
    let start = Instant::now();
    exchanges.run(Duration::from_millis(millis), count)?;
    let seconds = start.elapsed().as_secs_f64();
    let mut latencies = exchanges.latencies;
    latencies.sort_unstable();
    Ok(json!({
        "connections": latencies.len(),
        "seconds": seconds,
        "p50_us": percentile(&latencies, 50),
        "p99_us": percentile(&latencies, 99),
        "max_us": latencies.last(),
        "errors": exchanges.errors.0,
    }))
}

struct Exchanges {
    target: socket2::SockAddr,
    epoll: OwnedFd,
    slots: Vec<Option<Exchange>>,
    next_id: u64,
    latencies: Vec<u32>,
    errors: Errors,
}

struct Exchange {
    socket: Socket,
    started: Instant,
    head: [u8; HEAD],
    sent: bool,
    got: usize,
    /// One byte more than a reply, to notice what is too much.
    reply: [u8; REPLY + 1],
}

impl Exchanges {
    fn new(target: SocketAddr, in_flight: u64) -> Result<Self> {
        Ok(Self {
            target: target.into(),
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            slots: (0..in_flight).map(|_| None).collect(),
            next_id: 0,
            latencies: Vec::with_capacity(1 << 18),
            errors: Errors::default(),
        })
    }

    /// Keeps all slots busy until `time` is over or `count` were begun, then lets the begun ones end.
    fn run(&mut self, time: Duration, count: u64) -> Result<()> {
        let begin = Instant::now();
        let last_id = self.next_id.saturating_add(count);
        let mut events = Vec::with_capacity(256);
        let mut swept = begin;
        for slot in 0..self.slots.len() {
            self.fill(slot, last_id);
        }
        while self.slots.iter().any(Option::is_some) {
            events.clear();
            match epoll::wait(
                &self.epoll,
                spare_capacity(&mut events),
                Some(&Timespec {
                    tv_sec: 0,
                    tv_nsec: 100_000_000,
                }),
            ) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let now = Instant::now();
            let go_on = now.duration_since(begin) < time;
            for event in &events {
                let slot = usize::try_from({ event.data }.u64())?;
                self.advance(slot);
                if go_on {
                    self.fill(slot, last_id);
                }
            }
            if now.duration_since(swept) > Duration::from_millis(500) {
                swept = now;
                for slot in 0..self.slots.len() {
                    if self.slots[slot]
                        .as_ref()
                        .is_some_and(|x| now.duration_since(x.started) > SLOW)
                    {
                        self.errors.add(format!("no end within {} s", SLOW.as_secs()));
                        self.slots[slot] = None;
                        if go_on {
                            self.fill(slot, last_id);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Begins exchanges until the slot holds one, that is one that did not end at once.
    fn fill(&mut self, slot: usize, last_id: u64) {
        while self.slots[slot].is_none() && self.next_id < last_id && self.errors.count() < ENOUGH {
            let id = self.next_id;
            self.next_id += 1;
            match self.connect(slot, id) {
                Ok(exchange) => {
                    self.slots[slot] = Some(exchange);
                    // On loopback the handshake is mostly over when connect returns: one wait less.
                    self.advance(slot);
                }
                Err(error) => self.errors.add(format!("connect: {error}")),
            }
        }
    }

    fn connect(&self, slot: usize, id: u64) -> io::Result<Exchange> {
        let started = Instant::now();
        let socket = socket(id, Type::STREAM.nonblocking())?;
        match socket.connect(&self.target) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
            _ => {}
        }
        let token = EventData::new_u64(slot as u64);
        epoll::add(
            &self.epoll,
            &socket,
            token,
            EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET,
        )?;
        let head = Head {
            kind: Kind::Exchange,
            id,
            bytes: 0,
            millis: 0,
        }
        .encode();
        Ok(Exchange {
            socket,
            started,
            head,
            sent: false,
            got: 0,
            reply: [0; REPLY + 1],
        })
    }

    fn advance(&mut self, slot: usize) {
        let Some(exchange) = &mut self.slots[slot] else { return };
        match exchange.advance() {
            Ok(false) => return,
            Ok(true) => {
                let micros = exchange.started.elapsed().as_micros();
                self.latencies.push(u32::try_from(micros).unwrap_or(u32::MAX));
            }
            Err(error) => self.errors.add(error),
        }
        self.slots[slot] = None;
    }
}

impl Exchange {
    /// Sends and receives what can be; true once the reply has come, whole, right, and with its end.
    fn advance(&mut self) -> Result<bool, String> {
        if !self.sent {
            match self.socket.send(&self.head) {
                Ok(HEAD) => self.sent = true,
                Ok(n) => return Err(format!("only {n} of {HEAD} bytes could be sent")),
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN)) => return Ok(false),
                Err(error) => return Err(format!("send: {error}")),
            }
        }
        loop {
            match (&self.socket).read(&mut self.reply[self.got..]) {
                Ok(0) if self.got == REPLY && self.reply[..REPLY] == reply(&self.head) => return Ok(true),
                Ok(0) if self.got == REPLY => return Err("wrong bytes in a reply".into()),
                Ok(0) => return Err(format!("end after {} of {REPLY} bytes", self.got)),
                Ok(n) => self.got += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(format!("receive: {error}")),
            }
        }
    }
}

/// Bulk data over `streams` connections, until together `bytes` have gone or `millis` are over.
fn bulk(target: SocketAddr, kind: Kind, streams: u64, bytes: u64, millis: u64) -> Result<Value> {
    ready()?;
    let start = Instant::now();
    let threads: Vec<_> = (0..streams)
        .map(|stream| {
            let head = Head {
                kind,
                id: 1000 + stream,
                bytes: bytes / streams,
                millis: millis as u32,
            };
            thread::spawn(move || transfer(target, head))
        })
        .collect();
    let (mut total, mut errors) = (0, Errors::default());
    for thread in threads {
        match thread.join() {
            Ok(Ok(bytes)) => total += bytes,
            Ok(Err(error)) => errors.add(format!("{error:#}")),
            Err(_) => errors.add("a client thread panicked"),
        }
    }
    Ok(json!({ "bytes": total, "seconds": start.elapsed().as_secs_f64(), "errors": errors.0 }))
}

/// One stream from connect to end; its bytes, all of which were right.
fn transfer(target: SocketAddr, head: Head) -> Result<u64> {
    let mut stream = blocking(target, head.id)?;
    stream.write_all(&head.encode()).context("sending the head")?;
    let bytes = match head.kind {
        Kind::Down => {
            let mut checker = Checker::new(head.id);
            receive(&mut stream, &mut checker).context("receiving")?;
            checker.bytes
        }
        _ => {
            let sent = send(&mut stream, &head).context("sending")?;
            let mut end = [0; RECEIPT];
            stream.read_exact(&mut end).context("waiting for the receipt")?;
            ensure!(
                end == receipt(sent, true),
                "{sent} bytes were sent, but the backend did not receive just these"
            );
            sent
        }
    };
    let more = stream.read(&mut [0]).context("waiting for the end")?;
    ensure!(more == 0, "bytes after the end");
    Ok(bytes)
}

fn blocking(target: SocketAddr, id: u64) -> Result<TcpStream> {
    let connect = || -> io::Result<TcpStream> {
        let socket = socket(id, Type::STREAM)?;
        socket.set_tcp_nodelay(true)?;
        socket.set_read_timeout(Some(STALLED))?;
        socket.set_write_timeout(Some(STALLED))?;
        socket.connect_timeout(&target.into(), SLOW)?;
        Ok(socket.into())
    };
    connect().with_context(|| format!("connecting to {target}"))
}

/// Sessions that have said something once and then stay: opened, left alone until a line comes, asked once more.
fn hold(target: SocketAddr, sessions: u64) -> Result<Value> {
    // Everything that grows once (threads, first buffers) has grown before the first figure is taken.
    for id in 0..64 {
        talk(&mut blocking(target, id)?, id).context("while warming up")?;
    }
    ready()?;
    let start = Instant::now();
    let mut held = Vec::new();
    for id in 0..sessions {
        let mut stream = blocking(target, id)?;
        talk(&mut stream, id).with_context(|| format!("session {id}"))?;
        held.push(stream);
    }
    let seconds = start.elapsed().as_secs_f64();
    ready()?;
    let mut errors = Errors::default();
    for (id, stream) in (0..).zip(&mut held) {
        if let Err(error) = talk(stream, id) {
            errors.add(format!("a session did not live: {error:#}"));
        }
    }
    Ok(json!({ "sessions": held.len(), "seconds": seconds, "errors": errors.0 }))
}

/// 200 bytes each way.
fn talk(stream: &mut TcpStream, id: u64) -> Result<()> {
    let head = Head {
        kind: Kind::Hold,
        id,
        bytes: 0,
        millis: 0,
    }
    .encode();
    stream.write_all(&hold_message(&head))?;
    let mut answer = [0; REPLY];
    stream.read_exact(&mut answer)?;
    ensure!(answer == reply(&head), "wrong bytes in a reply");
    Ok(())
}
