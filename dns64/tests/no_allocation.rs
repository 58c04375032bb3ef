//! What is known is answered without an allocation, and so is what is rejected, limited or not allowed to ask.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use dns64::{
    Answer, Question,
    access::Access,
    cache::Cache,
    cookie::Cookies,
    front::{Front, Reply, Transport, Verdict},
    packed::{Lifetimes, Packed},
    rate::{Limit, Rate},
};
use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::AAAA},
};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
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
fn a_hit_allocates_nothing() {
    let cache = Cache::new(1 << 24, Duration::from_secs(3600), [7; 16]);
    let queries: Vec<_> = (0..1000).map(|number| known(&cache, number)).collect();
    let network = "127.0.0.0/8".parse().expect("a network");
    let limit = Limit {
        same: 1_000,
        all: 1_000_000,
        burst: 1,
    };
    let front = Front {
        cache: Arc::new(cache),
        access: Access::new([&network]),
        cookies: Cookies::new([7; 16], 0),
        rate: Arc::new(Rate::new(limit, 7)),
    };
    let mut out = [0; 1232];
    let mut hits = 0;
    let mut others = 0;
    let before = ALLOCATIONS.get();
    for second in 0..10 {
        let turn = front.turn(Duration::from_secs(second), second);
        for query in &queries {
            for source in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
                for message in [&query[..], &query[..query.len() - 1]] {
                    match front.look(&turn, Transport::Udp, message, source, &mut out) {
                        Verdict::Reply {
                            why: Reply::Known { .. },
                            ..
                        } => hits += 1,
                        _ => others += 1,
                    }
                }
            }
        }
    }
    assert_eq!(ALLOCATIONS.get() - before, 0);
    assert_eq!((hits, others), (10_000, 30_000));
}

/// Has `cache` know one answer; the query for it.
fn known(cache: &Cache, number: u32) -> Vec<u8> {
    let name = Name::from_ascii(format!("host{number}.example.org.")).expect("a name");
    let question = Question::new(&name, RecordType::AAAA);
    let data = RData::AAAA(AAAA(Ipv6Addr::LOCALHOST));
    let answer = Answer {
        answers: vec![Record::from_rdata(name, 3600, data)],
        ..Answer::empty(ResponseCode::NoError)
    };
    let packed = Packed::new(&question, &answer, &Lifetimes::default()).expect("it fits");
    cache.insert(packed, Duration::ZERO);
    let mut query = Message::new(7, MessageType::Query, OpCode::Query);
    query.add_query(question.query());
    query.set_edns(Edns::new());
    query.to_vec().expect("a message")
}
