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
    DropReason, HEADROOM, Limit, Mapper, Offload, Packet, Pieces, Translator, Verdict,
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
                buffer: vec![0; HEADROOM + LONGEST].into(),
                cut: vec![0; HEADROOM + LONGEST].into(),
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
    /// Ends all threads; their counts to the last. Packets that they have taken from the device are sent on.
    pub fn stop(self) -> Counts {
        self.shared.stop.store(true, Relaxed);
        // Its counter cannot be full: nobody else rings it.
        let _ = rustix::io::write(&self.shared.bell, &1_u64.to_ne_bytes());
        for thread in self.threads {
            // Had it panicked, its message would be in the log already.
            let _ = thread.join();
        }
        sum(&self.shared)
    }

    /// Whether none of them has ended.
    pub fn alive(&self) -> bool {
        !self.threads.iter().any(JoinHandle::is_finished)
    }

    /// Counts of all threads together.
    pub fn counts(&self) -> Counts {
        sum(&self.shared)
    }
}

fn sum(shared: &Shared) -> Counts {
    let mut sum = [0_u64; COUNTERS];
    for counters in &shared.counters {
        for (sum, counter) in sum.iter_mut().zip(&counters.0) {
            *sum = sum.wrapping_add(counter.load(Relaxed));
        }
    }
    Counts::from(sum)
}

/// One thread.
struct Worker {
    queue: Arc<OwnedFd>,
    shared: Arc<Shared>,
    index: usize,
    /// One packet, with room in front of it.
    buffer: Box<[u8]>,
    /// The same for what a super-packet is cut into.
    cut: Box<[u8]>,
    counts: Counts,
}

/// What a packet meets on its way.
struct Line<'a, M> {
    queue: &'a OwnedFd,
    shared: &'a Shared,
    counts: &'a mut Counts,
    translator: &'a Translator,
    mapper: &'a mut M,
}

impl<M: Mapper> Line<'_, M> {
    /// Translates the packet at [`HEADROOM`] of `buffer` and sends what became of it; `true` if it has to be cut first.
    fn translate(&mut self, buffer: &mut [u8], end: usize, header: &Header, offload: Offload) -> bool {
        let Some(packet) = Packet::new(buffer, HEADROOM..end, offload) else {
            self.counts.drop(DropReason::Malformed);
            return false;
        };
        match self.translator.translate(self.mapper, packet) {
            Verdict::Forward(pieces) => send(self.queue, header, pieces, self.counts),
            Verdict::Drop(DropReason::NeedsSegmentation) => return true,
            Verdict::Drop(reason) => self.counts.drop(reason),
            Verdict::Reply(reason, pieces) => {
                self.counts.drop(reason);
                answer(self.queue, self.shared, pieces, self.counts);
            }
        }
        false
    }
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
            cut,
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
        let mut line = Line {
            queue,
            shared,
            counts,
            translator,
            mapper,
        };
        if !line.translate(buffer, end, &header, offload) {
            return;
        }
        // Datagram by datagram: each is to be fragmented by itself.
        let whole = buffer.get(HEADROOM..end).unwrap_or_default();
        for number in 0.. {
            let room = cut.get_mut(HEADROOM..).unwrap_or_default();
            let Some(length) = vnet::datagram(whole, offload, number, room) else {
                if number == 0 {
                    line.counts.drop(DropReason::NeedsSegmentation);
                }
                return;
            };
            line.translate(cut, HEADROOM + length, &Header::default(), Offload::default());
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
    use std::{
        os::unix::net::UnixDatagram,
        time::{Duration, Instant},
    };

    use super::*;
    use crate::nat64::{Settings, Stateless};

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

    const PREFIX: &str = "2001:db8:64::/96";

    fn way(hops_matter: bool) -> Way<Stateless> {
        let settings = Settings {
            address_v4: [192, 0, 2, 64].into(),
            address_v6: "2001:db8::64".parse().expect("an address"),
            mtu_v4: 1500,
            mtu_v6: 1500,
            lowest_ipv6_mtu: 1280,
            copy_class: true,
            sum_udp: true,
            answer: hops_matter,
        };
        let mapper = Stateless {
            prefix: Some(PREFIX.parse().expect("a prefix")),
            maps: crate::nat64::Maps::default(),
            reporters_v4: Vec::new(),
            reporter_v6: None,
        };
        Way {
            translator: Translator::new(settings, [1, 2]),
            mapper: Box::new(move |_| mapper.clone()),
        }
    }

    /// A device without a kernel: what is written to the one end is read from the other, packet by packet.
    fn stage(way: Way<Stateless>) -> (UnixDatagram, Threads, Arc<ArcSwap<Way<Stateless>>>) {
        let (ours, theirs) = UnixDatagram::pair().expect("a pair");
        theirs.set_nonblocking(true).expect("set");
        ours.set_read_timeout(Some(Duration::from_secs(5))).expect("set");
        let way = Arc::new(ArcSwap::from_pointee(way));
        let threads = start(vec![Arc::new(theirs.into())], &way).expect("started");
        (ours, threads, way)
    }

    /// IPv6 without anything that has a checksum, from one address under the prefix to another, behind an empty header.
    fn packet(hops: u8) -> Vec<u8> {
        let mut packet = vec![0; vnet::LENGTH];
        packet.extend([0x60, 0, 0, 0, 0, 8, 253, hops]);
        for last in [1, 2] {
            let prefix: crate::Pref64 = PREFIX.parse().expect("a prefix");
            packet.extend(prefix.embed([192, 0, 2, last].into()).octets());
        }
        packet.extend(*b"whatever");
        packet
    }

    fn receive(socket: &UnixDatagram) -> Vec<u8> {
        let mut room = vec![0; 70_000];
        let length = socket.recv(&mut room).expect("a packet");
        room.truncate(length);
        room
    }

    fn until(what: &str, mut is: impl FnMut() -> bool) {
        let late = Instant::now() + Duration::from_secs(5);
        while !is() {
            assert!(Instant::now() < late, "waited in vain: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_packet_becomes_one_of_the_other_version_and_is_counted() {
        let (device, threads, _) = stage(way(true));
        device.send(&packet(64)).expect("sent");
        let got = receive(&device);
        assert_eq!(got.len(), vnet::LENGTH + 28);
        assert_eq!(got[..vnet::LENGTH], [0; vnet::LENGTH]);
        let v4 = &got[vnet::LENGTH..];
        assert_eq!(
            (v4[0], v4[8], v4[9], &v4[12..20]),
            (0x45, 63, 253, &[192, 0, 2, 1, 192, 0, 2, 2][..])
        );
        until("it is counted", || threads.counts().ipv4.sent == 1);
        let counts = threads.counts();
        assert_eq!((counts.ipv6.received, counts.ipv6.received_octets), (1, 48));
        assert_eq!(counts.ipv4.sent_octets, 28);
        assert!(threads.alive());
        let begin = Instant::now();
        let _ = threads.stop();
        assert!(
            begin.elapsed() < Duration::from_secs(1),
            "an idle thread hears the bell"
        );
    }

    #[test]
    fn errors_are_sent_up_to_the_limit_and_the_others_counted() {
        let (device, threads, _) = stage(way(true));
        let all = 3 * Limit::BURST;
        std::thread::scope(|scope| {
            let answers = scope.spawn(|| {
                device.set_read_timeout(Some(Duration::from_millis(500))).expect("set");
                let mut room = [0; 2000];
                let mut answers = 0;
                while let Ok(length) = device.recv(&mut room) {
                    // Time Exceeded in IPv6, from the translator itself.
                    assert_eq!(
                        (room[vnet::LENGTH] >> 4, room[vnet::LENGTH + 40], length > 58),
                        (6, 3, true)
                    );
                    answers += 1;
                }
                answers
            });
            for _ in 0..all {
                device.send(&packet(1)).expect("sent");
            }
            until("all are counted", || threads.counts().ipv6.received == all);
            let answers: u64 = answers.join().expect("no panic");
            let counts = threads.counts();
            assert_eq!(counts.ipv6.errors, answers);
            assert_eq!(counts.ipv6.errors + counts.ipv6.errors_limited, all);
            assert!(
                counts.ipv6.errors >= Limit::BURST && counts.ipv6.errors_limited > 0,
                "{counts:?}"
            );
            assert_eq!(counts.dropped[DropReason::HopLimit as usize], all);
        });
        let _ = threads.stop();
    }

    #[test]
    fn another_way_is_taken_from_the_next_batch_on() {
        let (device, threads, ways) = stage(way(true));
        device.send(&packet(1)).expect("sent");
        receive(&device);
        ways.store(Arc::new(way(false)));
        // One batch may have begun before.
        for _ in 0..2 {
            device.send(&packet(1)).expect("sent");
            until("it is counted", || threads.counts().ipv6.received >= 2);
        }
        until("all are counted", || threads.counts().ipv6.received == 3);
        assert!(threads.counts().ipv6.errors <= 2);
        let _ = threads.stop();
    }

    #[test]
    fn datagrams_in_one_packet_that_have_to_be_fragmented_are_cut_first() {
        let (device, threads, _) = stage(way(true));
        let payload: Vec<u8> = (0..3000).map(|n: u32| (n % 251) as u8).collect();
        // Two datagrams of 1400 octets and one of 200, over IPv4 that may be fragmented, checksum to be finished.
        let mut super_packet = vec![1, 5];
        for word in [28_u16, 1400, 20, 6] {
            super_packet.extend(word.to_ne_bytes());
        }
        let total = u16::try_from(28 + payload.len()).expect("short");
        let mut header = vec![0x45, 0];
        header.extend(total.to_be_bytes());
        header.extend([0, 7, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
        let sum: u32 = header
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
            .sum();
        let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
        header[10..12].copy_from_slice(&checksum.to_be_bytes());
        super_packet.extend(header);
        super_packet.extend([0x12, 0x34, 0, 53]);
        super_packet.extend((total - 20).to_be_bytes());
        super_packet.extend([0, 0]);
        super_packet.extend(&payload);
        device.send(&super_packet).expect("sent");
        let mut seen: Vec<u8> = Vec::new();
        let mut lengths = Vec::new();
        for _ in 0..5 {
            let got = receive(&device);
            let v6 = &got[vnet::LENGTH..];
            assert_eq!((v6[0] >> 4, &got[..vnet::LENGTH]), (6, &[0; vnet::LENGTH][..]));
            lengths.push(v6.len());
            let fragment = v6[6] == 44;
            let first = !fragment || v6[42..44] == [0, 1];
            let at = if fragment { 48 } else { 40 };
            seen.extend(&v6[if first { at + 8 } else { at }..]);
        }
        assert!(seen == payload, "nothing is lost and nothing comes twice");
        assert_eq!(lengths, [1280, 224, 1280, 224, 248]);
        until("they are counted", || threads.counts().ipv6.sent == 5);
        let counts = threads.counts();
        assert_eq!((counts.super_packets, counts.ipv4.received), (1, 1));
        assert_eq!(counts.dropped, [0; REASONS]);
        let _ = threads.stop();
    }
}
