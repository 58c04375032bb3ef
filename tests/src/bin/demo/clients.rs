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
use rustls::ClientConfig;
use serde_json::Value;
use tests::{
    Node,
    edge::find,
    etcd::{self, Etcd, base64, number},
    http, process,
    tls::{self, TlsStream},
};

/// Where clients connect to and what they show.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    pub(crate) node: Node,
    pub(crate) front: SocketAddr,
    pub(crate) tls: Arc<ClientConfig>,
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
    /// The revision it became, or what went wrong.
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
                        let result = put(&inner, key).map_err(|error| format!("{error:#}"));
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

    /// The newest acknowledged revision.
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

fn put(way: &Way, key: u64) -> Result<u64> {
    let body = format!(
        r#"{{"key":"{}","value":"{}"}}"#,
        base64(&format!("demo/{key:06}")),
        base64(&key.to_string())
    );
    let answer = etcd::call(&way.tls, way.front, "/v3/kv/put", &body)?;
    number(&answer, "revision")
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
    pub(crate) fn start(way: &Way, etcd: &Arc<Mutex<Etcd>>) -> Self {
        let log: Log<IdleLog> = Log::default();
        let (lives, inner, etcd) = (Arc::clone(&log), way.clone(), Arc::clone(etcd));
        way.node.enter(|| {
            thread::spawn(move || {
                while !lock(&lives).stop {
                    if let Err(error) = live(&inner, &etcd, &lives) {
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
fn live(way: &Way, etcd: &Mutex<Etcd>, log: &Log<IdleLog>) -> io::Result<()> {
    let dialled = Instant::now();
    let stream: TlsStream = tls::connect(way.front, &way.tls, Duration::from_secs(5))?;
    let socket = stream.sock.try_clone()?;
    let create = format!(r#"{{"create_request":{{"key":"{}"}}}}"#, base64("quiet"));
    let mut response = BufReader::new(http::request(
        stream,
        "POST",
        "/v3/watch",
        &way.front.to_string(),
        &create,
    )?);
    let mut line = String::new();
    response.read_line(&mut line)?;
    let answer: Value = serde_json::from_str(&line).map_err(io::Error::other)?;
    let member = etcd
        .lock()
        .expect("no panic while it is held")
        .by_answer(&answer)
        .unwrap_or("?")
        .to_owned();
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

/// `etcdctl watch` on everything the [`Writer`] writes. Should it end, it is started again from the next revision, as
/// clients of an API server do.
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

/// One event that the watch was told.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub(crate) revision: u64,
    /// The id of the member that told it.
    pub(crate) member: u64,
}

impl Watch {
    pub(crate) fn start(way: &Way, etcd: &Arc<Mutex<Etcd>>) -> Self {
        let (stop, log) = (Arc::new(AtomicBool::new(false)), Log::<WatchLog>::default());
        let (stopped, events, way, etcd) = (Arc::clone(&stop), Arc::clone(&log), way.clone(), Arc::clone(etcd));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let _ = watch(&way, &etcd, &events);
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

    /// How often `etcdctl` had to be started.
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

/// One run of `etcdctl watch`.
fn watch(way: &Way, etcd: &Mutex<Etcd>, log: &Log<WatchLog>) -> Result<()> {
    let next = lock(log).seen.last().map_or(1, |seen| seen.revision + 1);
    let mut command = etcd
        .lock()
        .expect("no panic while it is held")
        .etcdctl(&way.node, way.front);
    command.args(["watch", "--prefix", "demo/", "-w", "json", &format!("--rev={next}")]);
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
        let answer: Value = serde_json::from_str(&line?)?;
        let member = number(&answer, "member_id")?;
        for event in find(&answer, "Events").and_then(Value::as_array).into_iter().flatten() {
            let seen = Seen {
                revision: number(event, "mod_revision")?,
                member,
            };
            lock(log).seen.push(seen);
        }
    }
    if let Some(mut child) = lock(log).child.take() {
        let _ = child.kill();
        let _ = child.wait();
    }
    Ok(())
}
