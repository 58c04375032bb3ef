//! The servers behind the balancers: a process of its own, two threads with a listener each on every address.
//!
//! Exchanges and held sessions run in the threads' epoll loops; bulk streams get a thread each, which blocks. A listener
//! for the PROXY protocol takes no connection without a header of its version that names the right client.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::fd::{AsRawFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::{
    buffer::spare_capacity,
    event::epoll::{self, CreateFlags, EventData, EventFlags},
    io::Errno,
    net::{SocketFlags, accept_with},
};
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    proxy::{self, Version},
    wire::{BLOCK, Checker, HEAD, Head, Kind, REPLY, Writer, hold_message, receipt, reply, source},
};

const THREADS: usize = 2;
/// Blocks per write of bulk data.
pub(crate) const BLOCKS: usize = 4;
/// A bulk stream that stands still for that long has failed.
pub(crate) const STALLED: Duration = Duration::from_secs(10);

/// Of plain connections; those of PROXY version 1 and 2 are the next two.
pub(crate) const PORT: u16 = 7000;

/// `bench lb-backend ADDRESS...`: serves on the three ports of each until it is killed; says "ready" once it listens.
pub(crate) fn main(args: &[String]) -> Result<()> {
    let addresses: Vec<Ipv4Addr> = args
        .iter()
        .map(|arg| arg.parse().with_context(|| format!("\"{arg}\" is no address")))
        .collect::<Result<_>>()?;
    let mut threads = Vec::new();
    for _ in 0..THREADS {
        let mut listeners = Vec::new();
        for address in &addresses {
            for (port, header) in [
                (PORT, None),
                (PORT + 1, Some(Version::V1)),
                (PORT + 2, Some(Version::V2)),
            ] {
                let socket = listen((*address, port).into())?;
                listeners.push(Listener { socket, header });
            }
        }
        threads.push(thread::spawn(move || Server::new(listeners)?.serve()));
    }
    println!("ready");
    for thread in threads {
        match thread.join() {
            Ok(result) => result?,
            Err(_) => bail!("a backend thread panicked"),
        }
    }
    Ok(())
}

/// A non-blocking listener that shares its address with other threads' (SO_REUSEPORT).
pub(crate) fn listen(address: SocketAddr) -> Result<OwnedFd> {
    let listen = || -> io::Result<Socket> {
        let socket = Socket::new(
            Domain::for_address(address),
            Type::STREAM.nonblocking(),
            Some(Protocol::TCP),
        )?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        // Inherited by the accepted.
        socket.set_tcp_nodelay(true)?;
        socket.bind(&address.into())?;
        socket.listen(4096)?;
        Ok(socket)
    };
    Ok(listen().with_context(|| format!("cannot listen on {address}"))?.into())
}

struct Listener {
    socket: OwnedFd,
    header: Option<Version>,
}

/// One thread's listeners and connections.
struct Server {
    epoll: OwnedFd,
    listeners: Vec<Listener>,
    /// By descriptor, which is also the event's token; listeners have none here.
    connections: Vec<Option<Connection>>,
}

struct Connection {
    socket: TcpStream,
    /// A PROXY header is still to come.
    header: Option<Version>,
    /// Whom it named.
    named: Option<Ipv4Addr>,
    got: usize,
    request: [u8; REPLY],
}

/// What becomes of a connection after it has been read.
enum Next {
    Wait(Connection),
    Bulk(TcpStream, Head),
    Close,
}

impl Server {
    fn new(listeners: Vec<Listener>) -> Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        for Listener { socket, .. } in &listeners {
            epoll::add(&epoll, socket, token(socket.as_raw_fd()), EventFlags::IN)?;
        }
        Ok(Self {
            epoll,
            listeners,
            connections: Vec::new(),
        })
    }

    fn serve(mut self) -> Result<()> {
        let mut events = Vec::with_capacity(256);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                let fd = usize::try_from({ event.data }.u64())?;
                if let Some(connection) = self.connections.get_mut(fd).and_then(Option::take) {
                    self.advance(connection, true)?;
                } else if let Some(listener) = self.listeners.iter().position(|l| l.socket.as_raw_fd() as usize == fd) {
                    self.accept(listener)?;
                }
            }
        }
    }

    fn accept(&mut self, listener: usize) -> Result<()> {
        loop {
            let Listener { socket, header } = &self.listeners[listener];
            let header = *header;
            match accept_with(socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(fd) => self.advance(
                    Connection {
                        socket: fd.into(),
                        header,
                        named: None,
                        got: 0,
                        request: [0; REPLY],
                    },
                    false,
                )?,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => return Err(error).context("cannot accept"),
            }
        }
    }

    /// Reads what is there and acts on it; `known` = epoll has it already.
    fn advance(&mut self, connection: Connection, known: bool) -> Result<()> {
        match connection.read() {
            Next::Close => {}
            Next::Wait(connection) => {
                let fd = connection.socket.as_raw_fd();
                if !known {
                    epoll::add(
                        &self.epoll,
                        &connection.socket,
                        token(fd),
                        EventFlags::IN | EventFlags::RDHUP,
                    )?;
                }
                let index = usize::try_from(fd)?;
                if self.connections.len() <= index {
                    self.connections.resize_with(index + 1, || None);
                }
                self.connections[index] = Some(connection);
            }
            Next::Bulk(socket, head) => {
                if known {
                    epoll::delete(&self.epoll, &socket)?;
                }
                thread::spawn(move || {
                    if let Err(error) = bulk(socket, head) {
                        eprintln!("stream {}: {error:#}", head.id);
                    }
                });
            }
        }
        Ok(())
    }
}

fn token(fd: i32) -> EventData {
    EventData::new_u64(u64::from(fd.unsigned_abs()))
}

impl Connection {
    fn read(mut self) -> Next {
        match self.read_header() {
            Ok(true) => {}
            Ok(false) => return Next::Wait(self),
            Err(error) => {
                eprintln!("a connection began with a PROXY header that is none: {error}");
                return Next::Close;
            }
        }
        loop {
            // A bulk stream's head is 100 bytes, and not one more may be taken from it here.
            let want = if self.got < HEAD { HEAD } else { REPLY };
            match self.socket.read(&mut self.request[self.got..want]) {
                Ok(0) => return Next::Close,
                Ok(n) => self.got += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Next::Wait(self),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The client sees a missing reply and counts it.
                Err(_) => return Next::Close,
            }
            if self.got < HEAD {
                continue;
            }
            let (head, _) = self
                .request
                .split_first_chunk::<HEAD>()
                .expect("a request is longer than its head");
            let decoded = Head::decode(head);
            if let (Some(Head { id, .. }), Some(named)) = (&decoded, self.named)
                && named != source(*id)
            {
                eprintln!("the PROXY header names {named}, but the client is {}", source(*id));
                return Next::Close;
            }
            match decoded {
                None => {
                    eprintln!("a connection began with {} bytes that no client sends", self.got);
                    return Next::Close;
                }
                Some(Head {
                    kind: Kind::Exchange, ..
                }) => {
                    // 200 bytes always fit into an empty send buffer; if not, the client sees a short reply.
                    let _ = self.socket.write(&reply(head));
                    return Next::Close;
                }
                Some(
                    decoded @ Head {
                        kind: Kind::Up | Kind::Down,
                        ..
                    },
                ) => return Next::Bulk(self.socket, decoded),
                Some(Head { kind: Kind::Hold, .. }) if self.got < REPLY => {}
                Some(Head { kind: Kind::Hold, .. }) => {
                    if self.request != hold_message(head) || self.socket.write(&reply(head)).is_err() {
                        return Next::Close;
                    }
                    self.got = 0;
                }
            }
        }
    }
}

impl Connection {
    /// Takes the PROXY header off the stream, if one is due; `false` while it is not whole. Looked at before it is read,
    /// so that not one byte more is taken.
    fn read_header(&mut self) -> Result<bool, String> {
        let Some(version) = self.header else { return Ok(true) };
        let mut bytes = [0; proxy::MOST];
        let got = match self.socket.peek(&mut bytes) {
            Ok(0) => return Err("it ended".into()),
            Ok(got) => got,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(false);
            }
            Err(error) => return Err(error.to_string()),
        };
        let Some((length, named)) = proxy::parse(version, &bytes[..got])? else {
            return Ok(false);
        };
        self.socket
            .read_exact(&mut bytes[..length])
            .map_err(|error| error.to_string())?;
        (self.header, self.named) = (None, Some(named));
        Ok(true)
    }
}

fn bulk(mut socket: TcpStream, head: Head) -> Result<()> {
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(STALLED))?;
    socket.set_write_timeout(Some(STALLED))?;
    if head.kind == Kind::Down {
        send(&mut socket, &head).context("sending")?;
        return Ok(());
    }
    let mut checker = Checker::new(head.id);
    let outcome = receive(&mut socket, &mut checker);
    socket
        .write_all(&receipt(checker.bytes, outcome.is_ok()))
        .context("sending the receipt")?;
    outcome
}

/// Sends blocks until the head's bytes or time are over; returns how many bytes that were.
pub(crate) fn send(socket: &mut TcpStream, head: &Head) -> Result<u64> {
    let until = Instant::now() + Duration::from_millis(head.millis.into());
    let (mut writer, mut buffer) = Writer::new(head.id, BLOCKS);
    let mut sent = 0;
    loop {
        sent += buffer.len() as u64;
        let last = sent >= head.bytes || Instant::now() >= until;
        writer.stamp(&mut buffer, last);
        socket.write_all(&buffer)?;
        if last {
            return Ok(sent);
        }
    }
}

/// Receives and checks blocks up to the last one.
pub(crate) fn receive(socket: &mut TcpStream, checker: &mut Checker) -> Result<()> {
    let mut buffer = vec![0; 2 * BLOCK];
    while !checker.complete() {
        match socket.read(&mut buffer) {
            Ok(0) => bail!("it ended after {} bytes without a last block", checker.bytes),
            Ok(n) => checker.feed(&buffer[..n]).map_err(anyhow::Error::msg)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).with_context(|| format!("after {} bytes", checker.bytes)),
        }
    }
    Ok(())
}
