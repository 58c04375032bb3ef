//! Servers that follow a script, each on a node: what the balancer's backends do in the scenarios.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU16, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use socket2::SockRef;

use crate::{Node, tls::read_line, wait_for};

/// What a [`Backend`] does with a connection.
#[derive(Clone, Debug)]
pub enum Script {
    /// Sends its node's name and a newline, then sends back what it gets until the client is done.
    Echo,
    /// Accepts and neither reads nor writes.
    Silent,
    /// Reads until the client is done, then sends back everything, then closes.
    AnswerAtEnd,
    /// Reads until the client is done, and never says anything.
    Mute,
    /// A web server over TLS with an answer to `/readyz` that can be changed; any other path is answered with the
    /// node's name.
    Https(Arc<ServerConfig>, Readyz),
}

/// What a [`Script::Https`] answers to `/readyz`; shared by its clones.
#[derive(Clone, Debug)]
pub struct Readyz(Arc<AtomicU16>);

impl Readyz {
    /// Accepts the connection and never answers the handshake.
    pub const HANG: u16 = 0;
    /// Shakes hands, reads the request and never answers it.
    pub const HANG_AFTER_HANDSHAKE: u16 = 1;

    /// Answers `status`, or hangs.
    pub fn new(status: u16) -> Self {
        Self(Arc::new(AtomicU16::new(status)))
    }

    /// From now on answers `status`, or hangs.
    pub fn set(&self, status: u16) {
        self.0.store(status, Ordering::Relaxed);
    }

    fn get(&self) -> u16 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A server on a node; ends like a killed process when it is dropped.
#[derive(Debug)]
pub struct Backend {
    address: SocketAddr,
    listener: TcpListener,
    shared: Arc<Shared>,
    accepting: Option<thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    script: Script,
    stop: AtomicBool,
    sessions: Mutex<Sessions>,
}

#[derive(Debug, Default)]
struct Sessions {
    live: BTreeMap<u64, TcpStream>,
    accepted: Vec<Accepted>,
}

/// A connection that a [`Backend`] accepted.
#[derive(Clone, Copy, Debug)]
pub struct Accepted {
    /// The other end.
    pub from: SocketAddr,
    /// When.
    pub at: Instant,
    /// When it ended, and whether by a reset.
    pub ended: Option<(Instant, bool)>,
}

impl Backend {
    /// Starts to follow `script` on `port` of `node`'s IPv6 address.
    ///
    /// # Errors
    ///
    /// If the port is taken.
    pub fn start(node: &Node, port: u16, script: Script) -> Result<Self> {
        Self::start_at(node, node.at(port), script)
    }

    /// Starts to follow `script` on one of `node`'s addresses.
    ///
    /// # Errors
    ///
    /// If the port is taken.
    pub fn start_at(node: &Node, address: SocketAddr, script: Script) -> Result<Self> {
        node.enter(|| Self::start_here(node.name(), address, script))
    }

    /// Starts to follow `script` as `name` in the namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// If the port is taken.
    pub fn start_here(name: &str, address: SocketAddr, script: Script) -> Result<Self> {
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            script,
            stop: AtomicBool::new(false),
            sessions: Mutex::default(),
        });
        let listener = TcpListener::bind(address).with_context(|| format!("{address} on {name}"))?;
        // std listens with a backlog of 128, less than a burst of a test's clients.
        SockRef::from(&listener).listen(4096)?;
        let (accept, accepts) = (listener.try_clone()?, Arc::clone(&shared));
        Ok(Self {
            address,
            listener,
            shared,
            accepting: Some(thread::spawn(move || accepts.accept(&accept))),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The connections accepted so far.
    pub fn accepted(&self) -> Vec<Accepted> {
        self.shared.sessions().accepted.clone()
    }

    /// Connections that have not ended.
    pub fn live(&self) -> usize {
        self.shared.sessions().live.len()
    }

    /// Closes the listener, as a server does that is about to end: new connections are refused, sessions go on.
    pub fn stop_listening(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Wakes the accepting thread and takes the socket out of the listening state at once.
        let _ = SockRef::from(&self.listener).shutdown(std::net::Shutdown::Both);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }

    /// Resets every connection; new ones are accepted.
    pub fn reset(&self) {
        for stream in self.shared.sessions().live.values() {
            // Dissolving the association sends an RST, as closing with unread bytes does; the serving thread wakes up.
            let _ = rustix::net::connect_unspec(stream);
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stop_listening();
        self.reset();
        let _ = wait_for("the serving threads end", Duration::from_secs(2), || {
            (self.live() == 0).then_some(())
        });
    }
}

impl Shared {
    fn sessions(&self) -> std::sync::MutexGuard<'_, Sessions> {
        self.sessions.lock().expect("no panic while it is held")
    }

    fn accept(self: Arc<Self>, listener: &TcpListener) {
        loop {
            let accepted = listener.accept();
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            // A connection that was reset before it was accepted.
            let Ok((stream, from)) = accepted else { continue };
            let Ok(clone) = stream.try_clone() else { continue };
            let mut sessions = self.sessions();
            let id = sessions.accepted.len();
            sessions.accepted.push(Accepted {
                from,
                at: Instant::now(),
                ended: None,
            });
            sessions.live.insert(id as u64, clone);
            drop(sessions);
            let shared = Arc::clone(&self);
            let serve = move || {
                let result = shared.serve(&stream);
                let mut sessions = shared.sessions();
                sessions.accepted[id].ended = Some((Instant::now(), result.is_err_and(|error| is_reset(&error))));
                sessions.live.remove(&(id as u64));
            };
            // A thousand of these may be about.
            let _ = thread::Builder::new().stack_size(192 * 1024).spawn(serve);
        }
    }

    fn serve(&self, mut stream: &TcpStream) -> io::Result<()> {
        match &self.script {
            Script::Echo => {
                stream.set_nodelay(true)?;
                stream.write_all(format!("{}\n", self.name).as_bytes())?;
                io::copy(&mut &*stream, &mut stream).map(drop)
            }
            Script::Silent => hold(stream, PollFlags::RDHUP),
            Script::AnswerAtEnd => {
                let mut all = Vec::new();
                stream.read_to_end(&mut all)?;
                stream.write_all(&all)
            }
            Script::Mute => {
                io::copy(&mut stream, &mut io::sink())?;
                hold(stream, PollFlags::empty())
            }
            Script::Https(config, readyz) => self.https(stream, config, readyz),
        }
    }

    fn https(&self, stream: &TcpStream, config: &Arc<ServerConfig>, readyz: &Readyz) -> io::Result<()> {
        if readyz.get() == Readyz::HANG {
            return hold(stream, PollFlags::RDHUP);
        }
        stream.set_nodelay(true)?;
        let connection = ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
        let mut tls = StreamOwned::new(connection, stream);
        let mut buffer = Vec::new();
        loop {
            let Some(first) = read_line(&mut tls, &mut buffer)? else {
                return Ok(());
            };
            while read_line(&mut tls, &mut buffer)?.is_some_and(|line| !line.is_empty()) {}
            let (status, body) = match readyz.get() {
                _ if !first.contains(" /readyz") => (200, self.name.as_str()),
                Readyz::HANG | Readyz::HANG_AFTER_HANDSHAKE => return hold(stream, PollFlags::RDHUP),
                status => (status, "[+]ping ok"),
            };
            let length = body.len();
            write!(
                tls,
                "HTTP/1.1 {status} Scripted\r\ncontent-type: text/plain\r\ncontent-length: {length}\r\n\r\n{body}"
            )?;
            tls.flush()?;
        }
    }
}

/// Waits, without reading, until the connection is reset or ended in both directions, or until one of `events`.
fn hold(stream: &TcpStream, events: PollFlags) -> io::Result<()> {
    poll(&mut [PollFd::new(stream, events)], None)?;
    stream.take_error()?.map_or(Ok(()), Err)
}

/// Whether a failure means that the other side reset the connection.
pub fn is_reset(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionAborted
    )
}
