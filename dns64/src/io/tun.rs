//! The threads that translate: a packet in by one system call, what became of it out by another, in one buffer.
//!
//! ```text
//! read -> vnet::Header::arrive -> Translator (with a Mapper of the thread's own) -> Header::depart -> write
//! ```
//! One thread per queue of the TUN device; the kernel keeps a flow on the queue that it was last written to. A packet may be a
//! super-packet of up to 64 KiB, which costs no more than a short one. A thread under load reads and writes and asks for
//! nothing else; without load it waits for its queue or for the bell that ends it, whichever comes first.

use std::{
    fmt, io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
};

use arc_swap::ArcSwap;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    io::Errno,
    time::{ClockId, clock_gettime},
};

use crate::nat64::{
    DropReason, HEADROOM, Limit, Mapper, Packet, Pieces, Translator, Verdict,
    status::{Offloads, Side},
    vnet::{self, Header},
};

/// Packets between two looks at the clock, the configuration and the wish to stop.
const BATCH: usize = 64;
/// Octets of the longest packet that a device hands over, IPv6 header included.
const LONGEST: usize = 65_535 + 40;
/// Where the header of the device is read to, so that the packet begins behind the room that it may grow into.
const START: usize = HEADROOM - vnet::LENGTH;
/// Octets of stack: nothing large lives there.
const STACK: usize = 256 * 1024;

/// A TUN device as its queues.
#[derive(Debug)]
pub struct Device {
    /// One for each thread.
    pub queues: Vec<OwnedFd>,
    /// What it leaves undone.
    pub offloads: Offloads,
}

/// By what packets are translated. Replaced as a whole.
pub struct Way<M> {
    /// What RFC 7915 leaves a choice in.
    pub translator: Translator,
    /// Makes the mapper of a thread, by its number.
    pub mapper: Box<dyn Fn(usize) -> M + Send + Sync>,
}

/// The running threads. Dropped, they go on.
#[derive(Debug)]
pub struct Threads {
    threads: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
}

/// What happened since the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// From IPv4 and to it.
    pub ipv4: Side,
    /// From IPv6 and to it.
    pub ipv6: Side,
    /// Packets that stood for several segments.
    pub super_packets: u64,
    /// Packets that the device did not take.
    pub unsent: u64,
    /// Packets that did not go on, in the order of [`DropReason::ALL`].
    pub dropped: [u64; REASONS],
}

const REASONS: usize = DropReason::ALL.len();
/// Counters of one thread.
const COUNTERS: usize = 14 + REASONS;

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    /// Rung once and never read: all threads hear it.
    bell: OwnedFd,
    counters: Box<[Counters]>,
    /// ICMP errors to IPv4, and to IPv6.
    limits: [Limit; 2],
}

/// Counts of one thread, which alone writes them.
#[derive(Debug)]
#[repr(align(128))]
struct Counters([AtomicU64; COUNTERS]);

impl<M> fmt::Debug for Way<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Way")
            .field("translator", &self.translator)
            .finish_non_exhaustive()
    }
}

/// Makes the TUN device `name` with so many queues. It is gone when the last of them is closed.
///
/// # Errors
///
/// What the kernel says: `AlreadyExists` or `ResourceBusy` if there is an interface of that name, `NotFound` if it has no TUN
/// devices, `PermissionDenied` without CAP_NET_ADMIN.
pub fn open(name: &str, queues: u16) -> io::Result<Device> {
    let mut opened = Vec::new();
    for number in 0..queues.max(1) {
        // The first one makes it, and must not find another one's.
        let only_new = if number == 0 { libc::IFF_TUN_EXCL } else { 0 };
        opened.push(queue(name, only_new)?);
    }
    let offloads = opened.first().map(offloads).unwrap_or_default();
    Ok(Device {
        queues: opened,
        offloads,
    })
}

fn queue(name: &str, flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: a path that ends with a zero, and flags that take no mode.
    let raw = unsafe {
        libc::open(
            c"/dev/net/tun".as_ptr(),
            libc::O_RDWR | libc::O_CLOEXEC | libc::O_NONBLOCK,
        )
    };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just opened, and nobody else's.
    let queue = unsafe { OwnedFd::from_raw_fd(raw) };
    let flags = flags | libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    // SAFETY: plain old data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (place, octet) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = libc::c_char::from_ne_bytes([octet]);
    }
    // The kernel looks at the 16 bits alone.
    request.ifr_ifru.ifru_flags = (flags & 0xffff) as libc::c_short;
    // SAFETY: the request is an ifreq, as the call wants it, and outlives it.
    let result = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(queue)
    }
}

/// Has the device leave undone as much as it knows how to.
fn offloads(queue: &OwnedFd) -> Offloads {
    let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
    let udp = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    let set = |features: libc::c_uint| {
        // SAFETY: this request takes a number, no pointer.
        unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(features)) == 0 }
    };
    let all = Offloads {
        checksum: true,
        tcp: true,
        udp: true,
    };
    // The kernel takes all that is asked for or nothing.
    if set(tcp | udp) {
        all
    } else if set(tcp) {
        Offloads { udp: false, ..all }
    } else {
        set(0);
        Offloads::default()
    }
}

/// Starts a thread for each of `queues`, which do not block. Another `way` takes effect with the next batch.
///
/// # Errors
///
/// A descriptor or a thread that the kernel does not give.
pub fn start<M>(queues: Vec<Arc<OwnedFd>>, way: &Arc<ArcSwap<Way<M>>>) -> io::Result<Threads>
where
    M: Mapper + 'static,
{
    let shared = Arc::new(Shared {
        stop: AtomicBool::new(false),
        bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        counters: queues.iter().map(|_| Counters::default()).collect(),
        limits: Default::default(),
    });
    let mut running = Threads {
        threads: Vec::new(),
        shared: Arc::clone(&shared),
    };
    for (index, queue) in queues.into_iter().enumerate() {
        let (way, shared) = (Arc::clone(way), Arc::clone(&shared));
        let builder = std::thread::Builder::new().name(format!("nat64-{index}"));
        let thread = builder.stack_size(STACK).spawn(move || {
            let mut worker = Worker {
                queue,
                shared,
                index,
                buffer: vec![0; START + vnet::LENGTH + LONGEST].into(),
                counts: Counts::default(),
            };
            worker.run(&way);
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
    /// Ends all threads. Packets that they have taken from the device are sent on.
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
        let mut sum = [0_u64; COUNTERS];
        for counters in &self.shared.counters {
            for (sum, counter) in sum.iter_mut().zip(&counters.0) {
                *sum = sum.wrapping_add(counter.load(Relaxed));
            }
        }
        Counts::from(sum)
    }
}

/// One thread.
struct Worker {
    queue: Arc<OwnedFd>,
    shared: Arc<Shared>,
    index: usize,
    /// One packet, with room in front of it.
    buffer: Box<[u8]>,
    counts: Counts,
}

impl Worker {
    fn run<M: Mapper>(&mut self, ways: &ArcSwap<Way<M>>) {
        let mut way = ways.load_full();
        let mut mapper = (way.mapper)(self.index);
        while !self.shared.stop.load(Relaxed) {
            let now = ways.load();
            if !Arc::ptr_eq(&now, &way) {
                way = Arc::clone(&now);
                mapper = (way.mapper)(self.index);
            }
            drop(now);
            mapper.tick(milliseconds());
            let waits = self.batch(&way.translator, &mut mapper);
            if let Some(counters) = self.shared.counters.get(self.index) {
                counters.store(&self.counts);
            }
            match waits {
                None => {}
                Some(Errno::AGAIN) => self.wait(),
                Some(Errno::BADFD) => {
                    tracing::error!(
                        "the TUN device is gone, somebody has removed it; to have it made again: systemctl restart edged"
                    );
                    return;
                }
                // Whatever it is, it must not keep a core busy.
                Some(_) => self.pause(),
            }
        }
    }

    /// Translates what is there, up to [`BATCH`] packets; if it was not that many, why not.
    fn batch<M: Mapper>(&mut self, translator: &Translator, mapper: &mut M) -> Option<Errno> {
        for _ in 0..BATCH {
            let room = self.buffer.get_mut(START..).unwrap_or_default();
            match rustix::io::read(&*self.queue, room) {
                Ok(length) => self.packet(translator, mapper, START + length),
                Err(Errno::INTR) => {}
                Err(error) => return Some(error),
            }
        }
        None
    }

    /// Translates the packet that was read, which ends at `end`.
    fn packet<M: Mapper>(&mut self, translator: &Translator, mapper: &mut M, end: usize) {
        let Self {
            queue,
            shared,
            buffer,
            counts,
            ..
        } = self;
        let header = buffer.get(START..end).and_then(Header::parse);
        let (Some(header), Some(bytes)) = (header, buffer.get_mut(HEADROOM..end)) else {
            return counts.drop(DropReason::Malformed);
        };
        let from = counts.side(bytes);
        from.received += 1;
        from.received_octets += bytes.len() as u64;
        let offload = match header.arrive(bytes) {
            Ok(offload) => offload,
            Err(reason) => return counts.drop(reason),
        };
        counts.super_packets += u64::from(offload.segment.is_some());
        let Some(packet) = Packet::new(buffer, HEADROOM..end, offload) else {
            return counts.drop(DropReason::Malformed);
        };
        match translator.translate(mapper, packet) {
            Verdict::Forward(pieces) => send(queue, &header, pieces, counts),
            Verdict::Drop(reason) => counts.drop(reason),
            Verdict::Reply(reason, pieces) => {
                counts.drop(reason);
                answer(queue, shared, pieces, counts);
            }
        }
    }

    /// Waits for whatever comes first, a packet or the end.
    fn wait(&self) {
        let mut both = [
            PollFd::from_borrowed_fd(self.shared.bell.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.queue.as_fd(), PollFlags::IN),
        ];
        // EINTR is as good a reason to look again as any.
        let _ = poll(&mut both, None);
        // A device that is down, or gone, is readable for nobody and yet wakes up.
        let trouble = both[1].revents().intersects(PollFlags::ERR | PollFlags::HUP);
        if trouble && !both[1].revents().contains(PollFlags::IN) {
            self.pause();
        }
    }

    fn pause(&self) {
        let mut bell = [PollFd::from_borrowed_fd(self.shared.bell.as_fd(), PollFlags::IN)];
        let _ = poll(
            &mut bell,
            Some(&Timespec {
                tv_sec: 0,
                tv_nsec: 10_000_000,
            }),
        );
    }
}

/// Sends what became of a packet that came with `header`.
fn send(queue: &OwnedFd, header: &Header, mut pieces: Pieces<'_>, counts: &mut Counts) {
    let (offload, transport) = (pieces.offload(), pieces.transport());
    while let Some(octets) = pieces.next(vnet::LENGTH) {
        let Some((front, packet)) = octets.split_first_chunk_mut::<{ vnet::LENGTH }>() else {
            return;
        };
        *front = header.depart(packet, transport, offload).octets();
        write(queue, octets, counts);
    }
}

/// Sends an ICMP error, unless there were too many.
fn answer(queue: &OwnedFd, shared: &Shared, mut pieces: Pieces<'_>, counts: &mut Counts) {
    let Some(octets) = pieces.next(vnet::LENGTH) else {
        return;
    };
    let Some((front, packet)) = octets.split_first_chunk_mut::<{ vnet::LENGTH }>() else {
        return;
    };
    let [v4, v6] = &shared.limits;
    let limit = if packet.first().is_some_and(|first| first >> 4 == 4) {
        v4
    } else {
        v6
    };
    let side = counts.side(packet);
    if !limit.take(microseconds()) {
        side.errors_limited += 1;
        return;
    }
    side.errors += 1;
    *front = Header::default().octets();
    write(queue, octets, counts);
}

/// Gives the device a packet behind its header.
fn write(queue: &OwnedFd, octets: &[u8], counts: &mut Counts) {
    let written = loop {
        match rustix::io::write(queue, octets) {
            Err(Errno::INTR) => {}
            other => break other,
        }
    };
    let packet = octets.get(vnet::LENGTH..).unwrap_or_default();
    if written.is_err() {
        counts.unsent += 1;
        return;
    }
    let side = counts.side(packet);
    side.sent += 1;
    side.sent_octets += packet.len() as u64;
}

impl Counts {
    /// Of the version of `packet`; what has none counts as IPv6, the network that the device is for.
    fn side(&mut self, packet: &[u8]) -> &mut Side {
        match packet.first().map(|first| first >> 4) {
            Some(4) => &mut self.ipv4,
            _ => &mut self.ipv6,
        }
    }

    fn drop(&mut self, reason: DropReason) {
        if let Some(count) = self.dropped.get_mut(reason as usize) {
            *count += 1;
        }
    }

    fn values(&self) -> impl Iterator<Item = u64> {
        let side = |side: &Side| {
            [
                side.received,
                side.received_octets,
                side.sent,
                side.sent_octets,
                side.errors,
                side.errors_limited,
            ]
        };
        let sides = [side(&self.ipv4), side(&self.ipv6)].into_iter().flatten();
        sides.chain([self.super_packets, self.unsent]).chain(self.dropped)
    }

    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        let mut sum = [0; COUNTERS];
        for (sum, (one, another)) in sum.iter_mut().zip(self.values().zip(other.values())) {
            *sum = one.wrapping_add(another);
        }
        Self::from(sum)
    }
}

impl From<[u64; COUNTERS]> for Counts {
    fn from(values: [u64; COUNTERS]) -> Self {
        let mut values = values.into_iter();
        let mut next = || values.next().unwrap_or(0);
        let mut side = || Side {
            received: next(),
            received_octets: next(),
            sent: next(),
            sent_octets: next(),
            errors: next(),
            errors_limited: next(),
        };
        let (ipv4, ipv6) = (side(), side());
        Self {
            ipv4,
            ipv6,
            super_packets: next(),
            unsent: next(),
            dropped: std::array::from_fn(|_| next()),
        }
    }
}

impl Default for Counts {
    fn default() -> Self {
        Self::from([0; COUNTERS])
    }
}

impl Default for Counters {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Counters {
    fn store(&self, counts: &Counts) {
        for (place, value) in self.0.iter().zip(counts.values()) {
            place.store(value, Relaxed);
        }
    }
}

/// Of a clock that never goes back.
fn milliseconds() -> u64 {
    microseconds() / 1000
}

fn microseconds() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_come_back_as_they_were_stored_and_add_up() {
        let values: [u64; COUNTERS] = std::array::from_fn(|place| place as u64 + 1);
        let counts = Counts::from(values);
        assert!(counts.values().eq(values));
        let counters = Counters::default();
        counters.store(&counts);
        let stored: Vec<u64> = counters.0.iter().map(|counter| counter.load(Relaxed)).collect();
        assert_eq!(stored, values);
        assert!(counts.plus(counts).values().eq(values.map(|value| value * 2)));
        let mut counts = Counts::default();
        for (number, reason) in DropReason::ALL.into_iter().enumerate() {
            counts.drop(reason);
            assert_eq!(counts.dropped[number], 1, "{} has its own number", reason.as_str());
        }
    }
}
