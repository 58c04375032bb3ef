//! A name server that follows a script, down to lies, and a client that looks at every answer.
//!
//! What is on the wire is written and read here by hand, so that nothing of the resolver under test judges itself.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use socket2::SockRef;

use crate::Node;

/// Record types.
pub const A: u16 = 1;
/// As [`A`].
pub const TXT: u16 = 16;
/// As [`A`].
pub const AAAA: u16 = 28;
const SOA: u16 = 6;
const OPT: u16 = 41;
const COOKIE: u16 = 10;
const HEADER: usize = 12;

/// A query as it came.
#[derive(Clone, Debug)]
pub struct Query {
    /// The whole message.
    pub bytes: Vec<u8>,
    /// Its id.
    pub id: u16,
    /// In lower case, without a final dot.
    pub name: String,
    /// Its type.
    pub kind: u16,
    /// Where it came from.
    pub from: SocketAddr,
    /// By TCP.
    pub tcp: bool,
    end: usize,
}

/// What is in a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// An address.
    Ip(IpAddr),
    /// So many octets of text.
    Text(usize),
}

/// One datagram or message to send.
#[derive(Clone, Debug)]
pub struct Deed {
    /// The message.
    pub bytes: Vec<u8>,
    /// How long after the query.
    pub after: Duration,
    /// From another port than the query was sent to.
    pub elsewhere: bool,
}

/// What is to be done about a query, in this order.
pub type Script = dyn Fn(&Query) -> Vec<Deed> + Send + Sync;

/// A running server; ends on drop.
pub struct Nameserver {
    /// Where it answers, by UDP and TCP.
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    script: Mutex<Arc<Script>>,
    stop: AtomicBool,
    udp: AtomicU64,
    tcp: AtomicU64,
}

/// How often threads look whether they are to end.
const LOOK: Duration = Duration::from_millis(20);

impl Query {
    /// Reads a query; `None` if it is none.
    pub fn of(bytes: &[u8], from: SocketAddr, tcp: bool) -> Option<Self> {
        let mut name = String::new();
        let mut at = HEADER;
        loop {
            let length = usize::from(*bytes.get(at)?);
            let label = bytes.get(at + 1..at + 1 + length)?;
            at += 1 + length;
            if length == 0 {
                break;
            }
            if !name.is_empty() {
                name.push('.');
            }
            name.extend(label.iter().map(|octet| char::from(octet.to_ascii_lowercase())));
        }
        Some(Self {
            id: u16_at(bytes, 0)?,
            kind: u16_at(bytes, at)?,
            end: bytes.get(at + 4..).map(|_| at + 4)?,
            bytes: bytes.to_vec(),
            name,
            from,
            tcp,
        })
    }

    /// Its question as it was written.
    pub fn question(&self) -> &[u8] {
        &self.bytes[HEADER..self.end]
    }

    /// NOERROR with these records of the type asked for; with none, an SOA that says for how long.
    pub fn answer(&self, records: &[Data], ttl: u32) -> Vec<u8> {
        let mut message = self.head(0, [1, records.len() as u16, u16::from(records.is_empty()), 0]);
        message.extend_from_slice(self.question());
        for record in records {
            message.extend_from_slice(&[0xc0, HEADER as u8]);
            message.extend(self.kind.to_be_bytes());
            push_record(&mut message, ttl, &record.octets());
        }
        if records.is_empty() {
            message.push(0);
            message.extend(SOA.to_be_bytes());
            let mut soa = vec![0, 0];
            for number in [1, 3600, 600, 86_400, ttl] {
                soa.extend(u32::to_be_bytes(number));
            }
            push_record(&mut message, ttl, &soa);
        }
        message
    }

    /// A bare answer with this code.
    pub fn code(&self, code: u8) -> Vec<u8> {
        let mut message = self.head(code, [1, 0, 0, 0]);
        message.extend_from_slice(self.question());
        message
    }

    /// Header of an answer: recursion was desired and is available.
    fn head(&self, code: u8, counts: [u16; 4]) -> Vec<u8> {
        let mut message = self.id.to_be_bytes().to_vec();
        message.extend([0x81, 0x80 | code]);
        message.extend(counts.into_iter().flat_map(u16::to_be_bytes));
        message
    }
}

impl Data {
    fn octets(&self) -> Vec<u8> {
        match self {
            Self::Ip(IpAddr::V4(v4)) => v4.octets().to_vec(),
            Self::Ip(IpAddr::V6(v6)) => v6.octets().to_vec(),
            Self::Text(length) => {
                let text = vec![b'x'; *length];
                let strings = text.chunks(255);
                strings.flat_map(|part| [&[part.len() as u8], part].concat()).collect()
            }
        }
    }
}

impl From<Vec<u8>> for Deed {
    fn from(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            after: Duration::ZERO,
            elsewhere: false,
        }
    }
}

fn push_record(message: &mut Vec<u8>, ttl: u32, data: &[u8]) {
    message.extend([0, 1]);
    message.extend(ttl.to_be_bytes());
    message.extend((data.len() as u16).to_be_bytes());
    message.extend_from_slice(data);
}

impl Nameserver {
    /// Starts one on `node` at `port` of its IPv6 address.
    ///
    /// # Errors
    ///
    /// If the port is taken.
    pub fn start(node: &Node, port: u16, script: impl Fn(&Query) -> Vec<Deed> + Send + Sync + 'static) -> Result<Self> {
        let address = node.at(port);
        let (socket, other, listener) = node.enter(|| -> io::Result<_> {
            let sockets = (UdpSocket::bind(address)?, UdpSocket::bind((address.ip(), 0))?);
            Ok((sockets.0, sockets.1, TcpListener::bind(address)?))
        })?;
        // A stall of this process is not to be a loss.
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 8 << 20)?;
        socket.set_read_timeout(Some(LOOK))?;
        SockRef::from(&listener).set_read_timeout(Some(LOOK))?;
        let shared = Arc::new(Shared {
            script: Mutex::new(Arc::new(script)),
            stop: AtomicBool::new(false),
            udp: AtomicU64::new(0),
            tcp: AtomicU64::new(0),
        });
        let (later, due) = mpsc::channel();
        let socket = Arc::new(socket);
        thread::spawn({
            let socket = Arc::clone(&socket);
            move || delayed(&socket, &due)
        });
        thread::spawn({
            let shared = Arc::clone(&shared);
            move || by_datagram(&socket, &other, &shared, &later)
        });
        thread::spawn({
            let shared = Arc::clone(&shared);
            move || by_connection(&listener, &shared)
        });
        Ok(Self { address, shared })
    }

    /// From now on it does this.
    pub fn turn(&self, script: impl Fn(&Query) -> Vec<Deed> + Send + Sync + 'static) {
        *self.shared.script.lock().expect("no panic while it is held") = Arc::new(script);
    }

    /// Queries that came by UDP.
    pub fn udp(&self) -> u64 {
        self.shared.udp.load(Ordering::Relaxed)
    }

    /// Queries that came by TCP.
    pub fn tcp(&self) -> u64 {
        self.shared.tcp.load(Ordering::Relaxed)
    }
}

impl Drop for Nameserver {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn running(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn deeds(&self, query: &Query) -> Vec<Deed> {
        let script = Arc::clone(&self.script.lock().expect("no panic while it is held"));
        let count = if query.tcp { &self.tcp } else { &self.udp };
        count.fetch_add(1, Ordering::Relaxed);
        script(query)
    }
}

/// When, in which order, to whom, what.
type Later = (Instant, u64, SocketAddr, Vec<u8>);

fn by_datagram(socket: &UdpSocket, other: &UdpSocket, shared: &Shared, later: &mpsc::Sender<Later>) {
    let mut serial = 0;
    let mut bytes = [0; 4096];
    while shared.running() {
        let Ok((length, from)) = socket.recv_from(&mut bytes) else {
            continue;
        };
        let came = Instant::now();
        let Some(query) = Query::of(&bytes[..length], from, false) else {
            continue;
        };
        for deed in shared.deeds(&query) {
            if deed.after > Duration::ZERO {
                serial += 1;
                let _ = later.send((came + deed.after, serial, from, deed.bytes));
            } else {
                let way = if deed.elsewhere { other } else { socket };
                // Who asked may be gone.
                let _ = way.send_to(&deed.bytes, from);
            }
        }
    }
}

/// Sends what is due later; ends with who fills the queue.
fn delayed(socket: &UdpSocket, queue: &mpsc::Receiver<Later>) {
    let mut waiting: BinaryHeap<Reverse<Later>> = BinaryHeap::new();
    loop {
        let next = waiting.peek().map(|Reverse((at, ..))| *at);
        let wait = next.map_or(Duration::from_secs(1), |at| {
            at.saturating_duration_since(Instant::now())
        });
        match queue.recv_timeout(wait) {
            Ok(one) => waiting.push(Reverse(one)),
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
            Err(mpsc::RecvTimeoutError::Timeout) => {}
        }
        while waiting.peek().is_some_and(|Reverse((at, ..))| *at <= Instant::now()) {
            if let Some(Reverse((_, _, to, bytes))) = waiting.pop() {
                let _ = socket.send_to(&bytes, to);
            }
        }
    }
}

fn by_connection(listener: &TcpListener, shared: &Arc<Shared>) {
    while shared.running() {
        if let Ok((stream, from)) = listener.accept() {
            let shared = Arc::clone(shared);
            // Ends with the connection.
            thread::spawn(move || converse(stream, from, &shared));
        }
    }
}

fn converse(mut stream: TcpStream, from: SocketAddr, shared: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    while shared.running() {
        let bytes = read_message(&mut stream)?;
        let Some(query) = Query::of(&bytes, from, true) else {
            return Ok(());
        };
        for deed in shared.deeds(&query) {
            thread::sleep(deed.after);
            write_message(&mut stream, &deed.bytes)?;
        }
    }
    Ok(())
}

/// Reads one message from a stream.
///
/// # Errors
///
/// As reading.
pub fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut bytes = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Writes one message to a stream, its length first.
///
/// # Errors
///
/// As writing.
pub fn write_message(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    let length = (bytes.len() as u16).to_be_bytes();
    stream.write_all(&[&length, bytes].concat())
}

/// A query with RD for `name`, which has no final dot.
pub fn query(id: u16, name: &str, kind: u16) -> Vec<u8> {
    let mut message = id.to_be_bytes().to_vec();
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    message.extend(name_octets(name));
    message.extend(kind.to_be_bytes());
    message.extend([0, 1]);
    message
}

/// The same with OPT for 1232 octets and, if there are any, with the octets of a cookie (RFC 7873 §4).
pub fn with_edns(mut query: Vec<u8>, cookie: &[u8]) -> Vec<u8> {
    query[HEADER - 1] += 1;
    query.extend([0, 0, 41, 0x04, 0xd0, 0, 0, 0, 0]);
    let length = if cookie.is_empty() { 0 } else { 4 + cookie.len() };
    query.extend((length as u16).to_be_bytes());
    if !cookie.is_empty() {
        query.extend(COOKIE.to_be_bytes());
        query.extend((cookie.len() as u16).to_be_bytes());
        query.extend_from_slice(cookie);
    }
    query
}

/// A name on the wire.
pub fn name_octets(name: &str) -> Vec<u8> {
    let labels = name.split('.').filter(|label| !label.is_empty());
    let mut octets: Vec<u8> = labels
        .flat_map(|label| [&[label.len() as u8], label.as_bytes()].concat())
        .collect();
    octets.push(0);
    octets
}

/// An answer as a client sees it.
#[derive(Clone, Debug, Default)]
pub struct Reply {
    /// Of the message.
    pub id: u16,
    /// The code of the header.
    pub code: u8,
    /// Come again by TCP.
    pub truncated: bool,
    /// The addresses in the answer section, in their order.
    pub addresses: Vec<IpAddr>,
    /// The lowest TTL of the answer section.
    pub ttl: Option<u32>,
    /// Records in the answer section.
    pub answers: u16,
    /// The whole cookie.
    pub cookie: Vec<u8>,
}

impl Reply {
    /// Reads an answer; `None` if it is none or is broken.
    pub fn of(bytes: &[u8]) -> Option<Self> {
        let [flags, low] = *bytes.get(2..4)?.first_chunk()?;
        if flags & 0x80 == 0 {
            return None;
        }
        let mut at = HEADER;
        for _ in 0..u16_at(bytes, 4)? {
            at = skip_name(bytes, at)? + 4;
        }
        let mut reply = Self {
            id: u16_at(bytes, 0)?,
            code: low & 15,
            truncated: flags & 2 != 0,
            answers: u16_at(bytes, 6)?,
            ..Self::default()
        };
        let others = u16_at(bytes, 8)?.checked_add(u16_at(bytes, 10)?)?;
        for index in 0..reply.answers.checked_add(others)? {
            at = skip_name(bytes, at)?;
            let kind = u16_at(bytes, at)?;
            let ttl = u32::from_be_bytes(*bytes.get(at + 4..)?.first_chunk()?);
            let length = usize::from(u16_at(bytes, at + 8)?);
            let data = bytes.get(at + 10..at + 10 + length)?;
            at += 10 + length;
            if index < reply.answers {
                reply.ttl = Some(reply.ttl.map_or(ttl, |lowest| lowest.min(ttl)));
                match kind {
                    A => reply.addresses.push(Ipv4Addr::from(*data.first_chunk::<4>()?).into()),
                    AAAA => reply.addresses.push(Ipv6Addr::from(*data.first_chunk::<16>()?).into()),
                    _ => {}
                }
            } else if kind == OPT && u16_at(data, 0) == Some(COOKIE) {
                let length = usize::from(u16_at(data, 2)?);
                reply.cookie = data.get(4..4 + length)?.to_vec();
            }
        }
        (at == bytes.len()).then_some(reply)
    }
}

fn skip_name(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *bytes.get(at)? {
            0 => return Some(at + 1),
            pointer if pointer >= 0xc0 => return Some(at + 2),
            length => at += 1 + usize::from(length),
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// A socket on `node` that hears only `server`; from `source` if there is one.
///
/// # Errors
///
/// If the address is not the node's.
pub fn socket(node: &Node, source: Option<IpAddr>, server: SocketAddr) -> Result<UdpSocket> {
    let any = if server.is_ipv6() {
        IpAddr::from(Ipv6Addr::UNSPECIFIED)
    } else {
        Ipv4Addr::UNSPECIFIED.into()
    };
    let source = source.unwrap_or(any);
    let socket = node.enter(|| -> io::Result<UdpSocket> {
        let socket = UdpSocket::bind((source, 0))?;
        socket.connect(server)?;
        Ok(socket)
    });
    socket.with_context(|| format!("a socket from {source} to {server}"))
}

/// Sends a query and waits for the answer with its id: the answer, and how long it took.
///
/// # Errors
///
/// If none comes within `patience`.
pub fn ask(socket: &UdpSocket, query: &[u8], patience: Duration) -> io::Result<(Reply, Duration)> {
    let begin = Instant::now();
    socket.send(query)?;
    let mut bytes = [0; 4096];
    loop {
        let left = patience.saturating_sub(begin.elapsed());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left))?;
        let length = match socket.recv(&mut bytes) {
            Ok(length) => length,
            // With a time limit the kernel does not begin again by itself when a child's end interrupts it (signal(7)).
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        match Reply::of(&bytes[..length]) {
            Some(reply) if Some(reply.id) == u16_at(query, 0) => return Ok((reply, begin.elapsed())),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_as_it_was_written() {
        let bytes = with_edns(query(7, "wWw.example.org", A), &[1; 8]);
        let query = Query::of(&bytes, "[::1]:9".parse().unwrap(), false).unwrap();
        assert_eq!((query.id, query.name.as_str(), query.kind), (7, "www.example.org", A));
        let address: IpAddr = "192.0.2.1".parse().unwrap();
        let reply = Reply::of(&query.answer(&[Data::Ip(address)], 9)).unwrap();
        assert_eq!(
            (reply.id, reply.code, reply.addresses, reply.ttl),
            (7, 0, vec![address], Some(9))
        );
        assert_eq!(Reply::of(&query.answer(&[], 9)).unwrap().answers, 0);
        assert_eq!(Reply::of(&query.code(2)).unwrap().code, 2);
        assert!(Reply::of(&bytes).is_none(), "a query");
    }
}
