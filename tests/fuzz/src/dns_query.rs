//! What anybody sends to the resolver: there is an answer, a look further or silence, and nobody gets more than he sent by
//! sending nonsense.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, OnceLock},
    time::Duration,
};

use dns64::{
    Answer, Question,
    access::Access,
    cache::Cache,
    cookie::Cookies,
    front::{Front, Reply, Silence, Transport, Verdict},
    packed::{Age, Lifetimes, Packed},
    query::{MOST_TCP, MOST_UDP, Parsed, minimal_any},
    rate::{Limit, Rate},
};
use hickory_proto::{
    op::Message,
    rr::{Name, RData, Record, RecordType, rdata::A},
};

const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const STRANGER: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1));

/// `bytes` are one message.
pub fn run(bytes: &[u8]) {
    let front = front();
    let turn = front.turn(Duration::from_secs(1), 1_559_731_985);
    let mut out = vec![0; MOST_TCP];
    for (transport, source) in [
        (Transport::Udp, CLIENT),
        (Transport::Udp, STRANGER),
        (Transport::Tcp, CLIENT),
        (Transport::Tcp, STRANGER),
    ] {
        match front.look(&turn, transport, bytes, source, &mut out) {
            Verdict::Reply { length, why } => {
                assert!(source == CLIENT || transport == Transport::Tcp, "a stranger by UDP");
                let reply = &out[..length];
                assert!(transport == Transport::Tcp || length <= MOST_UDP);
                assert_eq!(reply[..2], bytes[..2], "the id");
                assert_ne!(reply[2] & 0x80, 0, "a reply");
                Message::from_vec(reply).expect("a reply that can be read");
                // A cookie of ours comes to one of the client.
                let room = bytes.len() + if cookie(bytes) { 16 } else { 0 };
                assert!(why != Reply::Rejected || length <= room, "{length} for {}", bytes.len());
            }
            Verdict::Ask(terms) => {
                assert_eq!(source, CLIENT, "a stranger's question");
                let Parsed::Query(query) = Parsed::of(bytes) else {
                    continue;
                };
                let question = query.question().expect("a question");
                let answer = minimal_any(&question.name);
                let packed = Packed::new(&question, &answer, &Lifetimes::default()).expect("a short answer");
                let length = packed.write(&query, Age::Fresh(7), &terms, &mut out).expect("room");
                assert!(length <= terms.limit);
                Message::from_vec(&out[..length]).expect("an answer that can be read");
            }
            Verdict::Silence(Silence::Denied) => assert_eq!(source, STRANGER),
            Verdict::Silence(_) => {}
        }
    }
}

fn cookie(bytes: &[u8]) -> bool {
    let (Parsed::Query(query) | Parsed::Reject(query, _)) = Parsed::of(bytes) else {
        return false;
    };
    query.edns().is_some_and(|edns| edns.cookie.is_some())
}

fn front() -> &'static Front {
    static FRONT: OnceLock<Front> = OnceLock::new();
    FRONT.get_or_init(|| {
        let cache = Cache::new(1 << 20, Duration::ZERO, [7; 16]);
        let name = Name::from_ascii("w.").expect("a name");
        let mut answer = Answer::empty(hickory_proto::op::ResponseCode::NoError);
        answer.answers = (0..200)
            .map(|i| Record::from_rdata(name.clone(), 3600, RData::A(A(Ipv4Addr::new(192, 0, 2, i)))))
            .collect();
        let question = Question::new(&name, RecordType::A);
        let packed = Packed::new(&question, &answer, &Lifetimes::default()).expect("an answer");
        cache.insert(packed, Duration::ZERO);
        Front {
            cache: Arc::new(cache),
            access: Access::new(&["127.0.0.0/8".parse().expect("a network")]),
            cookies: Cookies::new([7; 16], 1_559_731_985),
            rate: Arc::new(Rate::new(
                Limit {
                    same: 0,
                    all: 0,
                    burst: 1,
                },
                7,
            )),
        }
    })
}
