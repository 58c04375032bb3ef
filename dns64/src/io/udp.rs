//! The threads that answer over UDP: many datagrams in by one system call, their answers out by another.
//!
//! One thread per socket, and as many sockets with SO_REUSEPORT as there are cores. A thread under load blocks in
//! recvmmsg and nowhere else. Without load it waits for its socket or for the bell that ends it, whichever comes first.
//! What [`Front`] does not answer at once goes through a bounded queue to whoever looks further.

use std::{
    cell::UnsafeCell,
    io,
    mem::MaybeUninit,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use hickory_proto::op::ResponseCode;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    net::sockopt::{Timeout, set_socket_recv_buffer_size, set_socket_timeout},
    time::{ClockId, clock_gettime},
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::mpsc;

use crate::{
    Question,
    front::{Front, Reply, Silence, Transport, Verdict},
    packed::{Age, Packed},
    query::{MOST_UDP, Parsed, Query, Terms},
};

/// Datagrams per system call.
const BATCH: usize = 64;
/// Octets for one datagram. Not a multiple of the page size, so that the beginnings do not fight for the same cache lines.
const ROOM: usize = 1280;
/// Octets of ancillary data: one in6_pktinfo or one in_pktinfo.
const CONTROL: usize = 40;
/// A thread without a datagram for so long waits for the bell, too. It is also how long a busy one may take to hear it.
const IDLE: Duration = Duration::from_millis(50);
/// How long a full send buffer may hold a thread up.
const PATIENCE: Duration = Duration::from_millis(50);
/// Octets that the kernel should hold for us, if its limit allows.
const BACKLOG: usize = 4 << 20;

/// What the threads leave to others.
#[derive(Debug)]
pub enum Work {
    /// A message to look further into and to answer.
    Ask(Ask),
    /// An answer in use runs out; nobody waits for it.
    Refresh(Question),
}

/// A message that somebody waits to have answered. Dropped, it stays without an answer.
#[derive(Debug)]
pub struct Ask {
    message: Box<[u8]>,
    client: SocketAddr,
    terms: Terms,
    socket: Arc<UdpSocket>,
    name: libc::sockaddr_in6,
    name_length: libc::socklen_t,
    control: Control,
    control_length: usize,
}

/// The running threads. Dropped, they go on.
#[derive(Debug)]
pub struct Threads {
    threads: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
}

/// What happened since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Datagrams that came.
    pub received: u64,
    /// Answers that were known.
    pub hits: u64,
    /// Messages that others looked further into.
    pub misses: u64,
    /// Messages answered with a code alone.
    pub rejected: u64,
    /// Answers that said to come again, for there were too many.
    pub slipped: u64,
    /// Answers that were not given, for there were too many.
    pub limited: u64,
    /// Messages from who may not ask.
    pub denied: u64,
    /// Messages that were no queries.
    pub ignored: u64,
    /// Messages that found the queue full.
    pub dropped: u64,
    /// Answers in use that were asked for again.
    pub refreshed: u64,
    /// Answers that the kernel did not take.
    pub unsent: u64,
}

#[derive(Debug)]
struct Shared {
    front: Arc<ArcSwap<Front>>,
    work: mpsc::Sender<Work>,
    stop: AtomicBool,
    /// Rung once and never read: all threads hear it.
    bell: OwnedFd,
    counters: Box<[Counters]>,
}

/// Counts of one thread, which alone writes them.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Counters([AtomicU64; 11]);

#[derive(Clone, Copy, Debug)]
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

/// A bound UDP socket at `address` with SO_REUSEPORT, so that each thread and each successor has its own queue; IPv6 only
/// where IPv6, and free to bind an address that does not exist yet (IP_FREEBIND).
///
/// # Errors
///
/// What bind(2) says.
pub fn bound(address: SocketAddr) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
        socket.set_freebind_v6(true)?;
    } else {
        socket.set_freebind_v4(true)?;
    }
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// Starts a thread for each of `sockets`, which are bound. `work` is bounded; what it has no room for stays without an
/// answer. Another `front` takes effect with the next datagram.
///
/// # Errors
///
/// A descriptor or a thread that the kernel does not give.
pub fn start(sockets: Vec<UdpSocket>, front: Arc<ArcSwap<Front>>, work: mpsc::Sender<Work>) -> io::Result<Threads> {
    let shared = Arc::new(Shared {
        front,
        work,
        stop: AtomicBool::new(false),
        bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        counters: sockets.iter().map(|_| Counters::default()).collect(),
    });
    let mut running = Threads {
        threads: Vec::new(),
        shared: shared.clone(),
    };
    for (index, socket) in sockets.into_iter().enumerate() {
        let server = prepare(&socket).map(|()| Server {
            socket: Arc::new(socket),
            shared: shared.clone(),
            index,
        });
        let thread = server.and_then(|server| {
            let builder = std::thread::Builder::new().name(format!("dns-{index}"));
            builder.stack_size(256 * 1024).spawn(move || server.run())
        });
        match thread {
            Ok(thread) => running.threads.push(thread),
            Err(error) => {
                running.stop();
                return Err(error);
            }
        }
    }
    Ok(running)
}

impl Threads {
    /// Ends all threads, within 50 ms. Datagrams that they have taken from the kernel are answered.
    pub fn stop(self) {
        self.shared.stop.store(true, Relaxed);
        // Its counter cannot be full: nobody else rings it.
        let _ = rustix::io::write(&self.shared.bell, &1_u64.to_ne_bytes());
        for thread in self.threads {
            // Had it panicked, its message would be in the log already.
            let _ = thread.join();
        }
    }

    /// Whether none of them has ended.
    pub fn alive(&self) -> bool {
        !self.threads.iter().any(JoinHandle::is_finished)
    }

    /// Counts of all threads together.
    pub fn counts(&self) -> Counts {
        let mut sum = [0_u64; 11];
        for counters in &self.shared.counters {
            for (sum, counter) in sum.iter_mut().zip(&counters.0) {
                *sum = sum.wrapping_add(counter.load(Relaxed));
            }
        }
        Counts::from(sum)
    }
}

impl Ask {
    /// The message as it came.
    pub fn message(&self) -> &[u8] {
        &self.message
    }

    /// Its query; `None` if it must be decoded as a whole.
    pub fn query(&self) -> Option<Query<'_>> {
        match Parsed::of(&self.message) {
            Parsed::Query(query) => Some(query),
            _ => None,
        }
    }

    /// Where it came from.
    pub const fn client(&self) -> SocketAddr {
        self.client
    }

    /// What an answer must keep to.
    pub const fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Sends an answer.
    ///
    /// # Errors
    ///
    /// That of sendmsg; the client will ask again.
    pub fn answer(&self, packed: &Packed, age: Age) -> io::Result<()> {
        let mut out = [0; MOST_UDP];
        let query = self.query();
        let length = query.and_then(|query| packed.write(&query, age, &self.terms, &mut out));
        self.reply(out.get(..length.unwrap_or(0)).unwrap_or_default())
    }

    /// Sends a code alone.
    ///
    /// # Errors
    ///
    /// That of sendmsg.
    pub fn refuse(&self, code: ResponseCode) -> io::Result<()> {
        let mut out = [0; MOST_UDP];
        let query = self.query();
        let length = query.and_then(|query| query.write_code(code, false, &self.terms, &mut out));
        self.reply(out.get(..length.unwrap_or(0)).unwrap_or_default())
    }

    /// Sends `octets`, a whole message, from where the query was sent to. An empty one is none.
    ///
    /// # Errors
    ///
    /// That of sendmsg.
    pub fn reply(&self, octets: &[u8]) -> io::Result<()> {
        if octets.is_empty() {
            return Ok(());
        }
        let (mut name, mut control) = (self.name, self.control);
        let mut part = libc::iovec {
            iov_base: octets.as_ptr().cast_mut().cast(),
            iov_len: octets.len(),
        };
        let mut header = empty_header();
        header.msg_name = (&raw mut name).cast();
        header.msg_namelen = self.name_length;
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        if self.control_length > 0 {
            header.msg_control = (&raw mut control).cast();
            header.msg_controllen = self.control_length;
        }
        // SAFETY: name, control, part and octets outlive the call; the kernel writes to none of them.
        let sent = unsafe { libc::sendmsg(self.socket.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT) };
        if sent < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

/// Has the socket block, but not for ever, and say where datagrams were sent to if it is not known.
fn prepare(socket: &UdpSocket) -> io::Result<()> {
    socket.set_nonblocking(false)?;
    set_socket_timeout(socket, Timeout::Recv, Some(IDLE))?;
    set_socket_timeout(socket, Timeout::Send, Some(PATIENCE))?;
    // The kernel gives as much as its limit allows.
    let _ = set_socket_recv_buffer_size(socket, BACKLOG);
    let address = socket.local_addr()?;
    // An ICMP message cannot make us send fragments (and on an IPv6 socket this is about mapped addresses).
    let _ = set_option(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_OMIT);
    match address.ip() {
        IpAddr::V4(v4) if v4.is_unspecified() => set_option(socket, libc::IPPROTO_IP, libc::IP_PKTINFO, 1),
        IpAddr::V6(v6) if v6.is_unspecified() => set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1),
        _ => Ok(()),
    }
}

fn set_option(socket: &UdpSocket, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel reads `length` octets at `value`, which is that large.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), length) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// One thread.
struct Server {
    socket: Arc<UdpSocket>,
    shared: Arc<Shared>,
    index: usize,
}

impl Server {
    fn run(self) {
        let mut batch = Batch::new();
        let mut counts = Counts::default();
        while !self.shared.stop.load(Relaxed) {
            match batch.receive(&self.socket) {
                Ok(count) => self.turn(&mut batch, count, &mut counts),
                Err(error) => self.wait(&error),
            }
            if let Some(counters) = self.shared.counters.get(self.index) {
                counters.store(&counts);
            }
        }
    }

    /// Answers what has come.
    fn turn(&self, batch: &mut Batch, count: usize, counts: &mut Counts) {
        let front = self.shared.front.load();
        let turn = front.turn(now(), wall());
        counts.received += count as u64;
        for index in 0..count {
            let Some((message, client, out)) = batch.datagram(index) else {
                counts.ignored += 1;
                continue;
            };
            match front.look(&turn, Transport::Udp, message, client.ip(), out) {
                Verdict::Reply { length, why } => {
                    match why {
                        Reply::Known { refresh } => {
                            counts.hits += 1;
                            if refresh {
                                counts.refreshed += u64::from(self.refresh(message));
                            }
                        }
                        Reply::Rejected => counts.rejected += 1,
                        Reply::Slipped => counts.slipped += 1,
                    }
                    batch.reply(index, length);
                }
                Verdict::Ask(terms) => {
                    counts.misses += 1;
                    counts.dropped += u64::from(!self.ask(batch, index, terms));
                }
                Verdict::Silence(Silence::Denied) => counts.denied += 1,
                Verdict::Silence(Silence::Ignored) => counts.ignored += 1,
                Verdict::Silence(Silence::Limited) => counts.limited += 1,
            }
        }
        counts.unsent += batch.send(&self.socket);
    }

    fn ask(&self, batch: &Batch, index: usize, terms: Terms) -> bool {
        // A flood that finds no room costs no allocation.
        let Ok(permit) = self.shared.work.try_reserve() else {
            return false;
        };
        let ask = batch.ask(index, terms, &self.socket);
        ask.map(|ask| permit.send(Work::Ask(ask))).is_some()
    }

    fn refresh(&self, message: &[u8]) -> bool {
        let Parsed::Query(query) = Parsed::of(message) else {
            return false;
        };
        let question = query.question();
        let sent = question.is_some_and(|question| self.shared.work.try_send(Work::Refresh(question)).is_ok());
        if sent {
            self.shared.front.load().cache.refreshing(&query);
        }
        sent
    }

    /// Nothing came: waits for whatever comes first, a datagram or the end.
    fn wait(&self, error: &io::Error) {
        let mut both = [
            PollFd::from_borrowed_fd(self.shared.bell.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN),
        ];
        // EINTR is as good a reason to look again as any.
        let _ = match error.kind() {
            io::ErrorKind::WouldBlock => poll(&mut both, None),
            io::ErrorKind::Interrupted => Ok(0),
            // Whatever it is, it must not keep a core busy.
            _ => poll(
                &mut both[..1],
                Some(&Timespec {
                    tv_sec: 0,
                    tv_nsec: 10_000_000,
                }),
            ),
        };
    }
}

/// Buffers for one system call each way. The kernel's views of them point into heap memory that is neither moved nor
/// freed before the batch is.
struct Batch {
    inputs: Box<[UnsafeCell<[u8; ROOM]>]>,
    outputs: Box<[UnsafeCell<[u8; ROOM]>]>,
    names: Box<[UnsafeCell<libc::sockaddr_in6>]>,
    controls: Box<[UnsafeCell<Control>]>,
    /// One for each input, then one for each output.
    parts: Box<[UnsafeCell<libc::iovec>]>,
    received: Vec<libc::mmsghdr>,
    /// How many of them the kernel has written to.
    used: usize,
    replies: Vec<libc::mmsghdr>,
}

impl Batch {
    fn new() -> Self {
        let inputs: Box<[_]> = (0..BATCH).map(|_| UnsafeCell::new([0; ROOM])).collect();
        let outputs: Box<[_]> = (0..BATCH).map(|_| UnsafeCell::new([0; ROOM])).collect();
        let names: Box<[_]> = (0..BATCH).map(|_| UnsafeCell::new(empty_name())).collect();
        let controls: Box<[_]> = (0..BATCH).map(|_| UnsafeCell::new(Control([0; CONTROL]))).collect();
        let parts: Box<[_]> = inputs
            .iter()
            .chain(&outputs)
            .map(|room| {
                UnsafeCell::new(libc::iovec {
                    iov_base: room.get().cast(),
                    iov_len: ROOM,
                })
            })
            .collect();
        let header = |index: usize| {
            let mut header = empty_header();
            header.msg_name = names[index].get().cast();
            header.msg_namelen = NAME;
            header.msg_iov = parts[index].get();
            header.msg_iovlen = 1;
            header.msg_control = controls[index].get().cast();
            header.msg_controllen = CONTROL;
            libc::mmsghdr {
                msg_hdr: header,
                msg_len: 0,
            }
        };
        let received = (0..BATCH).map(header).collect();
        Self {
            inputs,
            outputs,
            names,
            controls,
            parts,
            received,
            used: 0,
            replies: Vec::with_capacity(BATCH),
        }
    }

    /// Waits for a datagram and takes all that are there; how many.
    fn receive(&mut self, socket: &UdpSocket) -> io::Result<usize> {
        for received in self.received.iter_mut().take(self.used) {
            received.msg_hdr.msg_namelen = NAME;
            received.msg_hdr.msg_controllen = CONTROL;
        }
        self.used = 0;
        // SAFETY: each header points to memory of this batch, as large as it says, to which there is no reference now.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.received.as_mut_ptr(),
                BATCH as libc::c_uint,
                libc::MSG_WAITFORONE,
                ptr::null_mut(),
            )
        };
        self.used = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        Ok(self.used)
    }

    /// Datagram `index`, its source, and room for its answer; `None` if it is larger than what we announce, or from
    /// nowhere.
    fn datagram(&mut self, index: usize) -> Option<(&[u8], SocketAddr, &mut [u8])> {
        let received = self.received.get(index)?;
        let client = address(&self.name(index)?)?;
        // SAFETY: the only reference to it while `self` is borrowed mutably; the kernel uses it during calls alone.
        let output: &mut [u8] = unsafe { &mut *self.outputs.get(index)?.get() };
        if received.msg_hdr.msg_flags & libc::MSG_TRUNC != 0 {
            return None;
        }
        Some((self.input(index)?, client, output.get_mut(..MOST_UDP)?))
    }

    fn input(&self, index: usize) -> Option<&[u8]> {
        // SAFETY: only the kernel writes to it, and that with `self` borrowed mutably.
        let input: &[u8] = unsafe { &*self.inputs.get(index)?.get() };
        input.get(..self.received.get(index)?.msg_len as usize)
    }

    fn name(&self, index: usize) -> Option<libc::sockaddr_in6> {
        // SAFETY: as for an input; it is plain old data and was zeroed before the kernel wrote to it.
        Some(unsafe { *self.names.get(index)?.get() })
    }

    /// Has `length` octets of the room for the answer to datagram `index` sent.
    fn reply(&mut self, index: usize, length: usize) {
        let (Some(received), Some(part), Some(control)) = (
            self.received.get(index),
            self.parts.get(BATCH + index),
            self.controls.get(index),
        ) else {
            return;
        };
        let mut reply = *received;
        reply.msg_hdr.msg_iov = part.get();
        reply.msg_hdr.msg_flags = 0;
        // SAFETY: no reference to it while `self` is borrowed mutably.
        unsafe { (*part.get()).iov_len = length };
        // SAFETY: the same.
        let control = unsafe { &mut *control.get() };
        reply.msg_hdr.msg_controllen = control.turned(reply.msg_hdr.msg_controllen);
        if reply.msg_hdr.msg_controllen == 0 {
            reply.msg_hdr.msg_control = ptr::null_mut();
        }
        self.replies.push(reply);
    }

    /// Sends what there is to send; how many the kernel did not take.
    fn send(&mut self, socket: &UdpSocket) -> u64 {
        let (mut sent, mut unsent) = (0, 0);
        while let Some(rest) = self.replies.get_mut(sent..).filter(|rest| !rest.is_empty()) {
            // SAFETY: each header points to memory of this batch, as large as it says; the kernel only reads it.
            let count = unsafe { libc::sendmmsg(socket.as_raw_fd(), rest.as_mut_ptr(), rest.len() as libc::c_uint, 0) };
            match usize::try_from(count) {
                Ok(count) if count > 0 => sent += count,
                _ if io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock => {
                    // The path has been full for a while; later answers are worth more than these.
                    unsent += rest.len() as u64;
                    break;
                }
                _ => {
                    // This one cannot go out; the next may.
                    sent += 1;
                    unsent += 1;
                }
            }
        }
        self.replies.clear();
        unsent
    }

    fn ask(&self, index: usize, terms: Terms, socket: &Arc<UdpSocket>) -> Option<Ask> {
        let header = self.received.get(index)?.msg_hdr;
        let name = self.name(index)?;
        // SAFETY: as for an input.
        let mut control = unsafe { *self.controls.get(index)?.get() };
        let control_length = control.turned(header.msg_controllen);
        Some(Ask {
            message: self.input(index)?.into(),
            client: address(&name)?,
            terms,
            socket: socket.clone(),
            name,
            name_length: header.msg_namelen,
            control,
            control_length,
        })
    }
}

impl Control {
    /// Turns where a datagram was sent to into where its answer comes from; the length, zero if there is nothing to say.
    /// The route decides on the interface, unless the address means something on one link only.
    fn turned(&mut self, length: usize) -> usize {
        const HEAD: usize = size_of::<libc::cmsghdr>();
        let word = |at: usize| {
            self.0
                .get(at..)
                .and_then(<[u8]>::first_chunk)
                .map(|word| i32::from_ne_bytes(*word))
        };
        let level = word(size_of::<usize>());
        let kind = word(size_of::<usize>() + 4);
        let link_local = self
            .0
            .get(HEAD..HEAD + 2)
            .is_some_and(|start| start[0] == 0xfe && start[1] & 0xc0 == 0x80);
        // `ipi_ifindex` comes first, `ipi6_ifindex` after the address.
        let interface = match (level, kind) {
            _ if length < HEAD => return 0,
            (Some(libc::IPPROTO_IP), Some(libc::IP_PKTINFO)) => HEAD,
            (Some(libc::IPPROTO_IPV6), Some(libc::IPV6_PKTINFO)) if link_local => return length,
            (Some(libc::IPPROTO_IPV6), Some(libc::IPV6_PKTINFO)) => HEAD + 16,
            _ => return 0,
        };
        if let Some(interface) = self.0.get_mut(interface..interface + 4) {
            interface.fill(0);
        }
        length
    }
}

const NAME: libc::socklen_t = size_of::<libc::sockaddr_in6>() as libc::socklen_t;

const fn empty_name() -> libc::sockaddr_in6 {
    libc::sockaddr_in6 {
        sin6_family: libc::AF_UNSPEC as libc::sa_family_t,
        sin6_port: 0,
        sin6_flowinfo: 0,
        sin6_addr: libc::in6_addr { s6_addr: [0; 16] },
        sin6_scope_id: 0,
    }
}

fn empty_header() -> libc::msghdr {
    // SAFETY: plain old data, for which null pointers and zero lengths are valid.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

/// A source of either family. `sockaddr_in` is shorter; its address lies where the flow label of the other does.
fn address(name: &libc::sockaddr_in6) -> Option<SocketAddr> {
    let port = u16::from_be(name.sin6_port);
    match libc::c_int::from(name.sin6_family) {
        libc::AF_INET => {
            let address = Ipv4Addr::from(name.sin6_flowinfo.to_ne_bytes());
            Some(SocketAddrV4::new(address, port).into())
        }
        libc::AF_INET6 => {
            let address = Ipv6Addr::from(name.sin6_addr.s6_addr);
            Some(SocketAddrV6::new(address, port, 0, name.sin6_scope_id).into())
        }
        _ => None,
    }
}

impl Counters {
    fn store(&self, counts: &Counts) {
        for (counter, count) in self.0.iter().zip(counts.each()) {
            counter.store(count, Relaxed);
        }
    }
}

impl Counts {
    const fn each(&self) -> [u64; 11] {
        [
            self.received,
            self.hits,
            self.misses,
            self.rejected,
            self.slipped,
            self.limited,
            self.denied,
            self.ignored,
            self.dropped,
            self.refreshed,
            self.unsent,
        ]
    }
}

impl From<[u64; 11]> for Counts {
    fn from(counts: [u64; 11]) -> Self {
        let [
            received,
            hits,
            misses,
            rejected,
            slipped,
            limited,
            denied,
            ignored,
            dropped,
            refreshed,
            unsent,
        ] = counts;
        Self {
            received,
            hits,
            misses,
            rejected,
            slipped,
            limited,
            denied,
            ignored,
            dropped,
            refreshed,
            unsent,
        }
    }
}

/// CLOCK_MONOTONIC now, as everything that looks into the cache counts time.
pub fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    // Never negative, and the nanoseconds are below 1e9.
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

/// UNIX seconds now.
pub fn wall() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::Message;

    use super::*;
    use crate::{
        front::tests::front,
        packed::tests::{a, pack},
        query::tests::plain,
        rate::Limit,
    };

    #[test]
    fn known_answers_come_at_once_and_others_from_who_looked_further() {
        for bound in ["127.0.0.1:0", "[::1]:0"] {
            let (threads, mut work, address) = run(bound, 8);
            let client = client(address);
            client.send(&plain("\x01w\0", 1)).expect("sent");
            assert_eq!(received(&client).answers.len(), 1);

            client.send(&plain("\x01V\0", 1)).expect("sent");
            let Some(Work::Ask(ask)) = work.blocking_recv() else {
                panic!("no work");
            };
            assert_eq!(ask.client(), client.local_addr().expect("an address"));
            let packed = pack("v.", vec![a("v.", 60, 2), a("v.", 60, 3)]);
            ask.answer(&packed, Age::Fresh(0)).expect("sent");
            let reply = received(&client);
            assert_eq!(
                (reply.answers.len(), reply.queries[0].name().to_string()),
                (2, "V.".to_owned())
            );

            client.send(&plain("\x01v\0", 252)).expect("sent");
            assert_eq!(received(&client).metadata.response_code, ResponseCode::Refused);
            let counts = counts_when(&threads, |counts| counts.rejected == 1);
            assert_eq!((counts.received, counts.hits, counts.misses), (3, 1, 1));
            threads.stop();
        }
    }

    #[test]
    fn an_answer_comes_from_the_address_that_was_asked() {
        for (bound, asked) in [("0.0.0.0:0", "127.0.0.2"), ("[::]:0", "::1"), ("[::]:0", "127.0.0.3")] {
            let (threads, mut work, address) = run(bound, 8);
            let asked = SocketAddr::new(asked.parse().expect("an address"), address.port());
            // Connected, it takes datagrams from there and nowhere else.
            let client = client(asked);
            client.send(&plain("\x01w\0", 1)).expect("sent");
            assert_eq!(received(&client).answers.len(), 1, "{bound} {asked}");
            client.send(&plain("\x01v\0", 1)).expect("sent");
            let Some(Work::Ask(ask)) = work.blocking_recv() else {
                panic!("no work");
            };
            ask.refuse(ResponseCode::ServFail).expect("sent");
            assert_eq!(received(&client).metadata.response_code, ResponseCode::ServFail);
            threads.stop();
        }
    }

    #[test]
    fn many_datagrams_are_answered_each_with_its_own_id() {
        let (threads, _work, address) = run("127.0.0.1:0", 8);
        let client = client(address);
        for round in 0..20_u8 {
            for id in 0..100_u8 {
                let mut asked = plain("\x01w\0", 1);
                asked[..2].copy_from_slice(&[round, id]);
                client.send(&asked).expect("sent");
            }
            for id in 0..100_u8 {
                assert_eq!(received(&client).metadata.id, u16::from_be_bytes([round, id]));
            }
        }
        threads.stop();
    }

    #[test]
    fn what_finds_the_queue_full_and_what_is_too_large_is_counted_and_not_answered() {
        let (threads, _work, address) = run("127.0.0.1:0", 1);
        let client = client(address);
        for _ in 0..3 {
            client.send(&plain("\x01v\0", 1)).expect("sent");
        }
        let mut large = plain("\x01w\0", 1);
        large.resize(2000, 0);
        client.send(&large).expect("sent");
        client.send(&plain("\x01w\0", 1)).expect("sent");
        assert_eq!(received(&client).answers.len(), 1);
        let counts = counts_when(&threads, |counts| counts.hits == 1);
        assert_eq!((counts.misses, counts.dropped, counts.ignored), (3, 2, 1));
        threads.stop();
    }

    #[test]
    fn a_stop_ends_idle_threads_and_busy_ones() {
        let (idle, _work, _) = run("127.0.0.1:0", 1);
        assert!(idle.alive());
        idle.stop();
        let (busy, _work, address) = run("127.0.0.1:0", 1);
        let client = client(address);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Relaxed) {
                    // After the stop nobody listens.
                    let _ = client.send(&plain("\x01w\0", 1));
                }
            });
            counts_when(&busy, |counts| counts.hits > 1_000);
            let begin = now();
            busy.stop();
            stop.store(true, Relaxed);
            assert!(now() - begin < Duration::from_secs(2));
        });
    }

    fn run(bound: &str, queue: usize) -> (Threads, mpsc::Receiver<Work>, SocketAddr) {
        let socket = UdpSocket::bind(bound).expect("a socket");
        let address = socket.local_addr().expect("an address");
        let front = front(Limit {
            same: 0,
            all: 0,
            burst: 1,
        });
        front.cache.insert(pack("w.", vec![a("w.", 3600, 1)]), now());
        let (sender, receiver) = mpsc::channel(queue);
        let threads = start(vec![socket], Arc::new(ArcSwap::from_pointee(front)), sender).expect("threads");
        (threads, receiver, address)
    }

    fn client(server: SocketAddr) -> UdpSocket {
        let any = if server.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" };
        let client = UdpSocket::bind(any).expect("a socket");
        client.connect(server).expect("connected");
        client.set_read_timeout(Some(Duration::from_secs(10))).expect("set");
        client
    }

    fn received(client: &UdpSocket) -> Message {
        let mut buffer = [0; 2000];
        let length = client.recv(&mut buffer).expect("an answer");
        Message::from_vec(&buffer[..length]).expect("a message")
    }

    /// Counts are stored after the answers have gone out.
    fn counts_when(threads: &Threads, enough: impl Fn(&Counts) -> bool) -> Counts {
        loop {
            let counts = threads.counts();
            if enough(&counts) {
                return counts;
            }
            std::thread::yield_now();
        }
    }
}
