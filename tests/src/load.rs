//! Clients by the thousand: an open-loop load of short connections that tells apart what went wrong with each, and
//! [`Session`]s, which stay.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use socket2::SockRef;

use crate::{
    Node,
    backend::is_reset,
    stall::Witness,
    tls::{read_line, read_some},
};

/// What one client does once it is connected; returns who served it.
pub type Exchange = dyn Fn(TcpStream) -> io::Result<String> + Send + Sync;

/// New connections at a steady rate, each on a thread of its own, until stopped. Open loop: a slow answer does not slow
/// the next client down.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    in_flight: Arc<AtomicUsize>,
    attempts: Arc<Mutex<Vec<Attempt>>>,
    thread: Option<thread::JoinHandle<()>>,
}

/// One connection.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// When it began.
    pub at: Instant,
    /// Until it was connected, as far as the client's kernel knows.
    pub connected: Option<Duration>,
    /// Until it was over.
    pub took: Duration,
    /// How it ended.
    pub end: End,
    /// The client's end, if it was connected.
    pub local: Option<SocketAddr>,
}

/// How a connection ended for its client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Well: by whom it was served.
    Served(String),
    /// The connect was refused.
    Refused,
    /// Reset after it was connected.
    Reset,
    /// Closed by the other side before the answer.
    Closed,
    /// No answer in time.
    TimedOut,
    /// Anything else, in words.
    Other(String),
}

/// What became of a [`Load`].
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Every connection, in the order of their ends.
    pub attempts: Vec<Attempt>,
}

impl Load {
    /// Starts `per_second` connections from `node` to `target`; each has `patience` for each step of `exchange`.
    pub fn start(
        node: &Node,
        target: SocketAddr,
        per_second: u32,
        patience: Duration,
        exchange: impl Fn(TcpStream) -> io::Result<String> + Send + Sync + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let in_flight = Arc::new(AtomicUsize::new(0));
        let attempts = Arc::new(Mutex::new(Vec::new()));
        let exchange: Arc<Exchange> = Arc::new(exchange);
        let pace = Pace {
            stop: Arc::clone(&stop),
            in_flight: Arc::clone(&in_flight),
            attempts: Arc::clone(&attempts),
            client: Client {
                target,
                patience,
                exchange,
            },
            gap: Duration::from_secs(1) / per_second,
        };
        let thread = node.enter(|| thread::spawn(move || pace.run()));
        Self {
            stop,
            in_flight,
            attempts,
            thread: Some(thread),
        }
    }

    /// A load of clients of [`crate::backend::Script::Echo`]: each reads the server's name, says a word and reads it
    /// again.
    pub fn of_echoes(node: &Node, target: SocketAddr, per_second: u32, patience: Duration) -> Self {
        Self::start(node, target, per_second, patience, |stream| {
            Ok(Session::on(stream)?.server)
        })
    }

    /// What has ended so far.
    pub fn so_far(&self) -> Report {
        Report {
            attempts: self.attempts.lock().expect("no panic while it is held").clone(),
        }
    }

    /// Stops, waits for those in flight, and reports.
    pub fn stop(mut self) -> Report {
        self.end();
        self.so_far()
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        while self.in_flight.load(Ordering::Acquire) > 0 {
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}

struct Pace {
    stop: Arc<AtomicBool>,
    in_flight: Arc<AtomicUsize>,
    attempts: Arc<Mutex<Vec<Attempt>>>,
    client: Client,
    gap: Duration,
}

#[derive(Clone)]
struct Client {
    target: SocketAddr,
    patience: Duration,
    exchange: Arc<Exchange>,
}

impl Pace {
    fn run(self) {
        let mut next = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            let (client, attempts, in_flight) = (
                self.client.clone(),
                Arc::clone(&self.attempts),
                Arc::clone(&self.in_flight),
            );
            in_flight.fetch_add(1, Ordering::AcqRel);
            let one = move || {
                let attempt = client.attempt();
                attempts.lock().expect("no panic while it is held").push(attempt);
                in_flight.fetch_sub(1, Ordering::AcqRel);
            };
            thread::Builder::new()
                .stack_size(256 * 1024)
                .spawn(one)
                .expect("threads for a few hundred clients");
            next += self.gap;
            // A rate is a promise about time, so this is the one place that sleeps for a time; after a stall it
            // catches up at once.
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    }
}

impl Client {
    fn attempt(&self) -> Attempt {
        let at = Instant::now();
        let mut attempt = Attempt {
            at,
            connected: None,
            took: Duration::ZERO,
            end: End::Refused,
            local: None,
        };
        let result = TcpStream::connect_timeout(&self.target, self.patience).and_then(|stream| {
            attempt.connected = Some(at.elapsed());
            attempt.local = stream.local_addr().ok();
            patient(&stream, self.patience)?;
            (self.exchange)(stream)
        });
        attempt.took = at.elapsed();
        attempt.end = result.map_or_else(|error| End::of(&error), End::Served);
        attempt
    }
}

impl End {
    fn of(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused,
            _ if is_reset(error) => Self::Reset,
            io::ErrorKind::UnexpectedEof => Self::Closed,
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Self::TimedOut,
            _ => Self::Other(error.to_string()),
        }
    }
}

impl Report {
    /// How many ended well.
    pub fn served(&self) -> usize {
        self.attempts
            .iter()
            .filter(|attempt| matches!(attempt.end, End::Served(_)))
            .count()
    }

    /// How many were served by `server`.
    pub fn served_by(&self, server: &str) -> usize {
        self.count(&End::Served(server.to_owned()))
    }

    /// How many ended so.
    pub fn count(&self, end: &End) -> usize {
        self.attempts.iter().filter(|attempt| attempt.end == *end).count()
    }

    /// Those that did not end well.
    pub fn failures(&self) -> Vec<&Attempt> {
        self.attempts
            .iter()
            .filter(|attempt| !matches!(attempt.end, End::Served(_)))
            .collect()
    }

    /// Those that began from `from` until before `until`.
    #[must_use]
    pub fn between(&self, from: Instant, until: Instant) -> Self {
        let chosen = self
            .attempts
            .iter()
            .filter(|attempt| attempt.at >= from && attempt.at < until);
        Self {
            attempts: chosen.cloned().collect(),
        }
    }

    /// The same connections with the times that they would have taken had the machine not held them up.
    #[must_use]
    pub fn without_stalls(&self, witness: &Witness) -> Self {
        let mut report = self.clone();
        for attempt in &mut report.attempts {
            let held_up = witness.held_up(attempt.at, attempt.at + attempt.took);
            attempt.took = attempt.took.saturating_sub(held_up);
        }
        report
    }

    /// The longest that one took.
    pub fn slowest(&self) -> Duration {
        self.attempts
            .iter()
            .map(|attempt| attempt.took)
            .max()
            .unwrap_or_default()
    }

    /// The time that `share` (0 to 1) of them stayed within.
    pub fn quantile(&self, share: f64) -> Duration {
        let mut times: Vec<Duration> = self.attempts.iter().map(|attempt| attempt.took).collect();
        times.sort_unstable();
        let index = (times.len() as f64 * share) as usize;
        times
            .get(index.min(times.len().saturating_sub(1)))
            .copied()
            .unwrap_or_default()
    }

    /// One line: how many, how they ended, how long they took.
    pub fn summary(&self) -> String {
        let mut kinds = std::collections::BTreeMap::<String, usize>::new();
        for attempt in self.failures() {
            *kinds.entry(format!("{:?}", attempt.end).to_lowercase()).or_default() += 1;
        }
        let failures: String = kinds.iter().map(|(kind, count)| format!(", {count} {kind}")).collect();
        format!(
            "{} connections: {} served{failures}; median {:.1} ms, slowest {:.0} ms",
            self.attempts.len(),
            self.served(),
            crate::ms(self.quantile(0.5)),
            crate::ms(self.slowest())
        )
    }
}

/// A client of [`crate::backend::Script::Echo`] that stays.
#[derive(Debug)]
pub struct Session {
    /// Who serves it.
    pub server: String,
    stream: TcpStream,
    serial: u32,
}

impl Session {
    /// Connects from `node` to `target` and waits, at most `patience`, until it is served.
    ///
    /// # Errors
    ///
    /// What the socket says.
    pub fn open(node: &Node, target: SocketAddr, patience: Duration) -> io::Result<Self> {
        let stream = node.enter(|| TcpStream::connect_timeout(&target, patience))?;
        patient(&stream, patience)?;
        Self::on(stream)
    }

    /// A session on a connected stream, served once this returns.
    ///
    /// # Errors
    ///
    /// What the socket says.
    pub fn on(mut stream: TcpStream) -> io::Result<Self> {
        let mut buffer = Vec::new();
        let server = read_line(&mut stream, &mut buffer)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let mut session = Self {
            server,
            stream,
            serial: 0,
        };
        session.echo()?;
        Ok(session)
    }

    /// Says something and reads it again.
    ///
    /// # Errors
    ///
    /// What the socket says; `InvalidData` if something else comes back.
    pub fn echo(&mut self) -> io::Result<()> {
        self.serial += 1;
        let word = format!("word {}\n", self.serial);
        self.stream.write_all(word.as_bytes())?;
        let mut answer = vec![0; word.len()];
        self.stream.read_exact(&mut answer)?;
        if answer == word.as_bytes() {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidData.into())
        }
    }

    /// The client's end.
    ///
    /// # Errors
    ///
    /// If the socket has none any more.
    pub fn local(&self) -> io::Result<SocketAddr> {
        self.stream.local_addr()
    }

    /// Whether nothing has come from the other side, in particular no end.
    pub fn quiet(&self) -> bool {
        let mut byte = [std::mem::MaybeUninit::uninit()];
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        let peeked = SockRef::from(&self.stream).recv_with_flags(&mut byte, flags);
        peeked.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Waits until the other side ends it; says after how long, and whether by a reset.
    ///
    /// # Errors
    ///
    /// If it is not ended within `within`, or something is said.
    pub fn cut(&mut self, within: Duration) -> io::Result<(Duration, bool)> {
        let begin = Instant::now();
        self.stream.set_read_timeout(Some(within))?;
        match read_some(&mut self.stream, &mut [0; 64]) {
            Ok(0) => Ok((begin.elapsed(), false)),
            Ok(_) => Err(io::Error::other("the server said something instead")),
            Err(error) if is_reset(&error) => Ok((begin.elapsed(), true)),
            Err(error) => Err(error),
        }
    }

    /// The socket itself.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }
}

/// Sends all of `bytes`, closes the sending side, and reads until the other side is done.
///
/// # Errors
///
/// What the socket says.
pub fn send_and_finish(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<Vec<u8>> {
    stream.write_all(bytes)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

fn patient(stream: &TcpStream, patience: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))
}
