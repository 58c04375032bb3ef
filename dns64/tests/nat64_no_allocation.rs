//! A packet is translated without an allocation, and so is one that is dropped or answered with an error.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    os::unix::net::UnixDatagram,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use dns64::{
    io::tun::{self, Way},
    nat64::{Maps, Settings, Stateless, Translator, vnet},
};

/// Of all threads.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

struct Counting;

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_thread_that_translates_allocates_nothing() {
    let prefix: dns64::Pref64 = "2001:db8:64::/96".parse().expect("a prefix");
    let (device, queue) = UnixDatagram::pair().expect("a pair");
    queue.set_nonblocking(true).expect("set");
    device.set_read_timeout(Some(Duration::from_secs(5))).expect("set");
    let settings = Settings {
        address_v4: [192, 0, 2, 64].into(),
        address_v6: "2001:db8::64".parse().expect("an address"),
        mtu_v4: 1500,
        mtu_v6: 1500,
        lowest_ipv6_mtu: 1280,
        copy_class: true,
        sum_udp: true,
        clamp_mss: true,
        answer: true,
    };
    let mapper = Stateless {
        prefix: Some(prefix),
        maps: Maps::default(),
        reporters_v4: Vec::new(),
        reporter_v6: None,
    };
    let way = Way {
        translator: Translator::new(settings, [1, 2]),
        mapper: Box::new(move |_| mapper.clone()),
        fragments: None,
    };
    let way = Arc::new(ArcSwap::from_pointee(way));
    let threads = tun::start(vec![Arc::new(queue.into())], &way).expect("started");
    // IPv6 without a checksum of its own: to be translated, to be answered (hop limit), to be dropped (its source).
    let packet = |hops: u8, source: u8| {
        let mut packet = vec![0; vnet::LENGTH];
        packet.extend([0x60, 0, 0, 0, 0, 8, 253, hops, source]);
        packet.extend(&prefix.embed([192, 0, 2, 1].into()).octets()[1..]);
        packet.extend(prefix.embed([192, 0, 2, 2].into()).octets());
        packet.extend(*b"whatever");
        packet
    };
    let (good, late, foreign) = (packet(64, 0x20), packet(1, 0x20), packet(64, 0x30));
    let mut room = [0; 2000];
    let mut round = |count: u32| {
        for _ in 0..count {
            for (packet, answered) in [(&good, true), (&late, true), (&foreign, false)] {
                device.send(packet).expect("sent");
                if answered {
                    device.recv(&mut room).expect("an answer");
                }
            }
        }
    };
    round(10);
    let before = ALLOCATIONS.load(Relaxed);
    round(100);
    assert_eq!(ALLOCATIONS.load(Relaxed) - before, 0);
    // The last of them has no answer by which to know that it was seen.
    while threads.counts().dropped.iter().sum::<u64>() < 220 {
        std::thread::yield_now();
    }
    let counts = threads.stop();
    assert_eq!((counts.ipv4.sent, counts.ipv6.errors), (110, 110));
    assert_eq!(counts.dropped.iter().sum::<u64>(), 220);
}
