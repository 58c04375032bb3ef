//! The clients of the demo's world. Each keeps a log of what happened to it, and nothing but that log is judged.

use std::{
    io::{self, BufRead, BufReader},
    net::SocketAddr,
    process::{Child, Stdio},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustls::{ClientConfig, pki_types::CertificateDer};
use tests::{
    Node, http, process,
    tls::{self, TlsStream},
};

use crate::servers::{Seen, Servers, Speech};

/// How long a client waits for an answer before it takes it for lost.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// Where clients connect to and what they show.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    pub(crate) node: Node,
    pub(crate) front: SocketAddr,
    pub(crate) tls: Arc<ClientConfig>,
    pub(crate) speech: Speech,
    /// Of each server, with its node's name.
    pub(crate) certificates: Arc<[(CertificateDer<'static>, String)]>,
}

impl Way {
    /// The node of the server that a stream leads to.
    pub(crate) fn server_of(&self, stream: &TlsStream) -> String {
        let seen = tls::peer(stream);
        let known = self
            .certificates
            .iter()
            .find(|(certificate, _)| Some(certificate) == seen.as_ref());
        known.map_or("an unknown server", |(_, name)| name).to_owned()
    }
}

/// Everything that keeps what it is about to log behind one lock.
type Log<T> = Arc<Mutex<T>>;

fn lock<T>(log: &Log<T>) -> MutexGuard<'_, T> {
    log.lock().expect("no panic while it is held")
}

/// Puts numbered keys, one after the other, each over a connection of its own, again until it is acknowledged.
#[derive(Debug)]
pub(crate) struct Writer {
    stop: Arc<AtomicBool>,
    log: Log<Vec<Put>>,
    thread: Option<thread::JoinHandle<()>>,
}

/// One attempt to put one key.
#[derive(Clone, Debug)]
pub(crate) struct Put {
    pub(crate) key: u64,
    pub(crate) at: Instant,
    pub(crate) took: Duration,
    /// Its number among all writes, or what went wrong.
    pub(crate) result: Result<u64, String>,
}

impl Writer {
    pub(crate) fn start(way: &Way, every: Duration) -> Self {
        let (stop, log) = (Arc::new(AtomicBool::new(false)), Log::<Vec<Put>>::default());
        let (stopped, writes, inner) = (Arc::clone(&stop), Arc::clone(&log), way.clone());
        let thread = way.node.enter(|| {
            thread::spawn(move || {
                let mut next = Instant::now();
                for key in 1.. {
                    while !stopped.load(Ordering::Relaxed) {
                        let at = Instant::now();
                        let result = inner.speech.put(&inner, key).map_err(|error| format!("{error:#}"));
                        let done = result.is_ok();
                        lock(&writes).push(Put {
                            key,
                            at,
                            took: at.elapsed(),
                            result,
                        });
                        if done {
                            break;
                        }
                    }
                    if stopped.load(Ordering::Relaxed) {
                        return;
                    }
                    next = (next + every).max(Instant::now());
                    thread::sleep(next.saturating_duration_since(Instant::now()));
                }
            })
        });
        Self {
            stop,
            log,
            thread: Some(thread),
        }
    }

    pub(crate) fn log(&self) -> Vec<Put> {
        lock(&self.log).clone()
    }

    /// The number of the newest acknowledged write.
    pub(crate) fn newest(&self) -> u64 {
        lock(&self.log)
            .iter()
            .filter_map(|put| put.result.as_ref().ok())
            .max()
            .copied()
            .unwrap_or(0)
    }

    pub(crate) fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A watch that sees nothing happen, as most do; begun again when it is cut.
#[derive(Debug)]
pub(crate) struct Idle {
    log: Log<IdleLog>,
}

#[derive(Debug, Default)]
struct IdleLog {
    stop: bool,
    socket: Option<std::net::TcpStream>,
    lives: Vec<Life>,
    failures: Vec<(Instant, String)>,
}

/// One connection of an [`Idle`].
#[derive(Clone, Debug)]
pub(crate) struct Life {
    /// The member that serves it.
    pub(crate) member: String,
    /// When the connect for it began.
    pub(crate) dialled: Instant,
    /// When the member confirmed the watch.
    pub(crate) from: Instant,
    /// When it ended, and how.
    pub(crate) until: Option<(Instant, String)>,
}

impl Idle {
    pub(crate) fn start(way: &Way) -> Self {
        let log: Log<IdleLog> = Log::default();
        let (lives, inner) = (Arc::clone(&log), way.clone());
        way.node.enter(|| {
            thread::spawn(move || {
                while !lock(&lives).stop {
                    if let Err(error) = live(&inner, &lives) {
                        lock(&lives).failures.push((Instant::now(), error.to_string()));
                    }
                    // As clients do: one that comes back in the same instant may meet a server that is still dying,
                    // its listener not closed yet.
                    thread::sleep(Duration::from_millis(50));
                }
            })
        });
        Self { log }
    }

    /// Its connections so far.
    pub(crate) fn lives(&self) -> Vec<Life> {
        lock(&self.log).lives.clone()
    }

    /// Attempts to begin again that came to nothing since `from`.
    pub(crate) fn failures(&self, from: Instant) -> Vec<String> {
        lock(&self.log)
            .failures
            .iter()
            .filter(|failure| failure.0 >= from)
            .map(|failure| failure.1.clone())
            .collect()
    }

    /// The member that serves it now.
    pub(crate) fn member(&self) -> Option<String> {
        lock(&self.log)
            .lives
            .last()
            .filter(|life| life.until.is_none())
            .map(|life| life.member.clone())
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        let mut log = lock(&self.log);
        log.stop = true;
        if let Some(socket) = log.socket.take() {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

/// One connection, from its first packet to its end.
fn live(way: &Way, log: &Log<IdleLog>) -> io::Result<()> {
    let dialled = Instant::now();
    let stream = tls::connect(way.front, &way.tls, PATIENCE)?;
    let (socket, member) = (stream.sock.try_clone()?, way.server_of(&stream));
    let (method, path, body) = way.speech.idle();
    let response = http::request(stream, method, path, &way.front.to_string(), &body)?;
    if response.status != 200 {
        return Err(io::Error::other(format!("a watch was answered {}", response.status)));
    }
    let mut response = BufReader::new(response);
    if way.speech.confirms_by_a_line() {
        response.read_line(&mut String::new())?;
    }
    // From here on silence is what is expected.
    socket.set_read_timeout(None)?;
    {
        let mut log = lock(log);
        log.socket = Some(socket);
        log.lives.push(Life {
            member,
            dialled,
            from: Instant::now(),
            until: None,
        });
    }
    let end = match tls::read_some(&mut response, &mut [0; 256]) {
        Ok(0) => "closed".to_owned(),
        Ok(_) => "an event on a key that nobody writes".to_owned(),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => "closed".to_owned(),
        Err(error) if tests::backend::is_reset(&error) => "reset".to_owned(),
        Err(error) => error.to_string(),
    };
    if let Some(life) = lock(log).lives.last_mut() {
        life.until = Some((Instant::now(), end));
    }
    Ok(())
}

/// A watching process on everything the [`Writer`] writes. Should it end, it is started again from where it was, as clients
/// of an API server do.
#[derive(Debug)]
pub(crate) struct Watch {
    stop: Arc<AtomicBool>,
    log: Log<WatchLog>,
    thread: Option<thread::JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct WatchLog {
    child: Option<Child>,
    starts: usize,
    seen: Vec<Seen>,
}

impl Watch {
    pub(crate) fn start(way: &Way, servers: &Arc<Mutex<Servers>>) -> Self {
        let (stop, log) = (Arc::new(AtomicBool::new(false)), Log::<WatchLog>::default());
        let (stopped, events, way, servers) = (Arc::clone(&stop), Arc::clone(&log), way.clone(), Arc::clone(servers));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let _ = watch(&way, &servers, &events);
            }
        });
        Self {
            stop,
            log,
            thread: Some(thread),
        }
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        lock(&self.log).seen.clone()
    }

    /// How often the process had to be started.
    pub(crate) fn starts(&self) -> usize {
        lock(&self.log).starts
    }

    /// Its socket's own end, while it is connected.
    pub(crate) fn socket(&self, front: SocketAddr) -> Option<SocketAddr> {
        let pid = lock(&self.log).child.as_ref()?.id();
        let found = process::connections(pid).ok()?;
        found
            .into_iter()
            .find(|(_, remote)| *remote == front)
            .map(|(local, _)| local)
    }

    pub(crate) fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(child) = &mut lock(&self.log).child {
            let _ = child.kill();
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop();
    }
}

/// One run of the watching process.
fn watch(way: &Way, servers: &Mutex<Servers>, log: &Log<WatchLog>) -> Result<()> {
    let last = lock(log).seen.last().map(|seen| seen.number);
    let mut command = servers.lock().expect("no panic while it is held").watch(way, last);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let lines = BufReader::new(child.stdout.take().context("piped above")?).lines();
    {
        let mut log = lock(log);
        log.starts += 1;
        log.child = Some(child);
    }
    for line in lines {
        for seen in way.speech.told(&line?)? {
            let mut log = lock(log);
            // One that had to list again is told again what it knows.
            if log.seen.last().is_none_or(|last| last.number < seen.number) {
                log.seen.push(seen);
            }
        }
    }
    if let Some(mut child) = lock(log).child.take() {
        let _ = child.kill();
        let _ = child.wait();
    }
    Ok(())
}
