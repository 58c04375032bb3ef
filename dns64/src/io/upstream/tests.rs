//! Against servers in this process on loopback: honest, dead, slow, lossy, lying ones. Where time matters it stands still
//! until a test moves it on; so it does where queries are counted, which a machine that is held up would see sent again.

use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    str::FromStr,
    sync::{Arc, atomic::AtomicBool},
};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{RData, Record, rdata},
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{ServerConfig, pki_types::PrivateKeyDer};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpListener,
    sync::mpsc,
    task::JoinSet,
    time::advance,
};
use tokio_rustls::TlsAcceptor;

use super::*;

const HONEST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const FORGED: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 66);

#[tokio::test]
async fn an_answer_comes_by_every_transport() {
    let (fake, tls) = (Fake::start(honest), Fake::start_tls("dns.example.org", honest));
    for url in [
        fake.url("udp"),
        fake.url("tcp"),
        format!("{}#dns.example.org", tls.url("tls")),
    ] {
        let forwarder = forwarder_with(&[&url], &tls.root);
        let answer = forwarder.ask(&question("www.example.org.")).await.expect(&url);
        assert_eq!(address_in(&answer), Some(HONEST), "{url}");
        let status = forwarder.status();
        assert_eq!((status.asked, status.outstanding, status.failed), (1, 0, 0));
        assert_eq!(status.servers[0].counts.good, 1);
        assert!(status.servers[0].latency_ms.is_some());
    }
}

#[tokio::test(start_paused = true)]
async fn of_replies_from_the_right_source_and_port_with_all_other_ids_none_is_accepted() {
    let _still = stand_still();
    let mut fake = Fake::start(|heard| match heard.over {
        Transport::Udp => vec![],
        _ => honest(heard),
    });
    let forwarder = forwarder(&[fake.url("udp")]);
    let asking = tokio::spawn(ask(&forwarder, "www.example.org."));
    let heard = fake.next().await;
    let mut forged = reply(&heard, FORGED);
    for id in (0..=u16::MAX).filter(|id| *id != heard.message.id) {
        forged[..2].copy_from_slice(&id.to_be_bytes());
        fake.send(&forged, heard.from).await;
        if id % 64 == 0 {
            tokio::task::yield_now().await;
        }
    }
    let answer = asking.await.expect("no panic").expect("TCP has it");
    assert_eq!(address_in(&answer), Some(HONEST));
    assert_eq!(fake.next().await.over, Transport::Tcp);
    let server = &forwarder.status().servers[0];
    assert_eq!(server.counts.floods, 1);
    assert_eq!(server.mismatches[1], ("id", 101), "no more were looked at");
}

#[tokio::test(start_paused = true)]
async fn without_tcp_a_flood_is_no_answer_either() {
    let _still = stand_still();
    let mut fake = Fake::start_udp(|_| vec![]);
    let forwarder = forwarder(&[fake.url("udp")]);
    let asking = tokio::spawn(ask(&forwarder, "www.example.org."));
    let heard = fake.next().await;
    let mut forged = reply(&heard, FORGED);
    for id in (0..=u16::MAX).filter(|id| *id != heard.message.id) {
        forged[..2].copy_from_slice(&id.to_be_bytes());
        fake.send(&forged, heard.from).await;
        if id % 64 == 0 {
            tokio::task::yield_now().await;
        }
    }
    assert_eq!(asking.await.expect("no panic"), Err(Failure::Unreachable));
}

#[tokio::test(start_paused = true)]
async fn after_a_hundred_forgeries_the_honest_datagram_is_still_taken() {
    let _still = stand_still();
    let fake = Fake::start(|heard| {
        let mut replies: Vec<_> = (1..=100_u16)
            .map(|distance| {
                let mut forged = reply(heard, FORGED);
                forged[..2].copy_from_slice(&heard.message.id.wrapping_add(distance).to_be_bytes());
                forged
            })
            .collect();
        replies.extend(honest(heard));
        replies
    });
    let forwarder = forwarder(&[fake.url("udp")]);
    let answer = forwarder.ask(&question("www.example.org.")).await.expect("an answer");
    assert_eq!(address_in(&answer), Some(HONEST));
    let server = &forwarder.status().servers[0];
    assert_eq!((server.mismatches[1].1, server.counts.floods), (100, 0));
}

#[tokio::test]
async fn the_right_id_and_question_from_a_wrong_port_or_address_are_not_accepted() {
    let mut fake = Fake::start(|_| vec![]);
    let forwarder = forwarder(&[fake.url("udp")]);
    let asking = tokio::spawn(ask(&forwarder, "www.example.org."));
    let heard = fake.next().await;
    let forged = reply(&heard, FORGED);
    let elsewhere = ["127.0.0.1:0".to_owned(), format!("127.0.0.2:{}", fake.address.port())];
    for place in elsewhere {
        let other = UdpSocket::bind(place).await.expect("a port");
        for _ in 0..10 {
            other.send_to(&forged, heard.from).await.expect("loopback takes it");
        }
    }
    fake.send(&reply(&heard, HONEST), heard.from).await;
    let answer = asking.await.expect("no panic").expect("an answer");
    assert_eq!(address_in(&answer), Some(HONEST));
    let mismatches: u64 = forwarder.status().servers[0]
        .mismatches
        .iter()
        .map(|(_, count)| count)
        .sum();
    assert_eq!(mismatches, 0, "the kernel kept them away");
}

#[tokio::test(start_paused = true)]
async fn the_right_id_with_a_wrong_question_is_not_accepted() {
    let _still = stand_still();
    let fake = Fake::start(|heard| {
        let changed = |change: &dyn Fn(&mut Message)| {
            let mut message = Message::from_vec(&reply(heard, FORGED)).expect("it parses");
            change(&mut message);
            message.to_vec().expect("it encodes")
        };
        let other = Name::from_str("www.example.net.").expect("a name");
        let mut replies = vec![
            changed(&|message| message.queries[0].name = other.clone()),
            changed(&|message| message.queries[0].query_type = RecordType::AAAA),
            changed(&|message| message.queries[0].query_class = hickory_proto::rr::DNSClass::CH),
            changed(&|message| message.queries.clear()),
            changed(&|message| message.queries.push(message.queries[0].clone())),
            changed(&|message| message.metadata.message_type = hickory_proto::op::MessageType::Query),
            reply(heard, FORGED)[..11].to_vec(),
            vec![],
        ];
        replies.extend(honest(heard));
        replies
    });
    let forwarder = forwarder(&[fake.url("udp")]);
    let answer = forwarder.ask(&question("www.example.org.")).await.expect("an answer");
    assert_eq!(address_in(&answer), Some(HONEST));
    let server = &forwarder.status().servers[0];
    assert_eq!(
        server.mismatches,
        [("form", 3), ("id", 0), ("question", 5), ("case", 0)]
    );
}

#[tokio::test(start_paused = true)]
async fn ids_ports_and_cases_are_spread_over_ten_thousand_queries() {
    let _still = stand_still();
    let mut fake = Fake::start(honest);
    let forwarder = forwarder(&[fake.url("udp")]);
    let mut asking = JoinSet::<Result<Answer, Failure>>::new();
    for number in 0..10_000 {
        if asking.len() == 100 {
            asking
                .join_next()
                .await
                .expect("some")
                .expect("no panic")
                .expect("an answer");
        }
        asking.spawn(ask(
            &forwarder,
            &format!("a-name-with-many-letters-{number}.example.org."),
        ));
    }
    while let Some(asked) = asking.join_next().await {
        asked.expect("no panic").expect("an answer");
    }
    let (mut ids, mut ports, mut cases) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let (mut near, mut last) = (0, 0_u16);
    let mut bits = [0_u32; 16];
    for _ in 0..10_000 {
        let heard = fake.next().await;
        let id = heard.message.id;
        ids.insert(id);
        ports.insert(heard.from.port());
        let letters = heard.bytes[13..37]
            .iter()
            .fold(0_u32, |sum, byte| sum << 1 | u32::from(byte.is_ascii_uppercase()));
        cases.insert(letters);
        near += u32::from(id.abs_diff(last) < 16);
        last = id;
        for (bit, count) in bits.iter_mut().enumerate() {
            *count += u32::from(id >> bit & 1);
        }
    }
    println!(
        "10,000 queries: {} ids, {} ports, {} cases",
        ids.len(),
        ports.len(),
        cases.len()
    );
    // Drawn at random there would be 9,270; and of ports as many as the range of the kernel has, 8,400 of 28,232.
    assert!((9150..9400).contains(&ids.len()), "{}", ids.len());
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let range: Vec<f64> = range.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let width = if let [low, high] = range[..] {
        high - low + 1.0
    } else {
        28_232.0
    };
    let expected = width * (1.0 - (-10_000.0 / width).exp());
    assert!(ports.len() as f64 > 0.9 * expected, "{} of {expected}", ports.len());
    assert!(cases.len() > 9900, "{}", cases.len());
    assert!(near < 30, "{near} ids lie near the one before; chance makes 5");
    assert!(bits.iter().all(|count| (4700..5300).contains(count)), "{bits:?}");
}

#[tokio::test(start_paused = true)]
async fn a_question_is_under_way_once_however_many_ask_it() {
    let _still = stand_still();
    let mut fake = Fake::start(|_| vec![]);
    let forwarder = forwarder(&[fake.url("udp")]);
    let mut asking = JoinSet::new();
    for number in 0..1000 {
        let name = if number % 2 == 0 {
            "www.example.org."
        } else {
            "WWW.Example.ORG."
        };
        asking.spawn(ask(&forwarder, name));
    }
    let heard = fake.next().await;
    while forwarder.status().joined < 999 {
        tokio::task::yield_now().await;
    }
    fake.send(&reply(&heard, HONEST), heard.from).await;
    while let Some(asked) = asking.join_next().await {
        assert_eq!(address_in(&asked.expect("no panic").expect("an answer")), Some(HONEST));
    }
    assert!(fake.queries.try_recv().is_err(), "one query");
    let status = forwarder.status();
    assert_eq!(
        (status.asked, status.outstanding, status.servers[0].counts.queries),
        (1000, 0, 1)
    );
}

#[tokio::test]
async fn a_question_goes_on_when_who_asked_it_has_left() {
    let mut fake = Fake::start(|_| vec![]);
    let forwarder = forwarder(&[fake.url("udp")]);
    let leaving = tokio::spawn(ask(&forwarder, "www.example.org."));
    let heard = fake.next().await;
    leaving.abort();
    let staying = tokio::spawn(ask(&forwarder, "www.example.org."));
    while forwarder.status().joined < 1 {
        tokio::task::yield_now().await;
    }
    fake.send(&reply(&heard, HONEST), heard.from).await;
    assert!(staying.await.expect("no panic").is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_lost_datagram_is_sent_again_from_the_same_port_with_the_same_id() {
    let _still = stand_still();
    let mut fake = Fake::start(|_| vec![]);
    let forwarder = forwarder(&[fake.url("udp")]);
    let asking = tokio::spawn(ask(&forwarder, "www.example.org."));
    let first = fake.next().await;
    advance(Duration::from_millis(400)).await;
    let second = fake.next_of("www.example.org.").await;
    assert_eq!((&first.bytes, first.from), (&second.bytes, second.from));
    fake.send(&reply(&first, HONEST), first.from).await;
    assert!(asking.await.expect("no panic").is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_dead_upstream_costs_moments_once_then_nothing_until_it_is_back() {
    let _still = stand_still();
    let alive = Arc::new(AtomicBool::new(false));
    let answers = alive.clone();
    let mut fake = Fake::start(move |heard| if answers.load(Relaxed) { honest(heard) } else { vec![] });
    let forwarder = forwarder(&[fake.url("udp")]);
    let began = Instant::now();
    let asking = tokio::spawn(ask(&forwarder, "www.example.org."));
    fake.next().await;
    while !asking.is_finished() {
        advance(Duration::from_millis(50)).await;
        settle().await;
    }
    assert_eq!(asking.await.expect("no panic"), Err(Failure::Down));
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    assert_eq!(forwarder.status().servers[0].state, State::Down);

    let began = Instant::now();
    for number in 0..100 {
        let name = format!("n{number}.example.org.");
        assert_eq!(ask(&forwarder, &name).await, Err(Failure::Down));
    }
    assert_eq!(began.elapsed(), Duration::ZERO, "stale answers need not wait");
    while fake.queries.try_recv().is_ok() {}

    alive.store(true, Relaxed);
    let began = Instant::now();
    while forwarder.status().servers[0].state != State::Up {
        advance(Duration::from_millis(50)).await;
        settle().await;
    }
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert!(ask(&forwarder, "www.example.org.").await.is_ok());
    assert_eq!(forwarder.status().servers[0].counts.outages, 1);
}

#[tokio::test(start_paused = true)]
async fn a_closed_port_is_known_at_once_and_the_next_server_answers() {
    let _still = stand_still();
    let closed = {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
        format!("udp://{}", socket.local_addr().expect("an address"))
    };
    let fake = Fake::start(honest);
    let began = Instant::now();
    let alone = forwarder(std::slice::from_ref(&closed));
    assert_eq!(ask(&alone, "www.example.org.").await, Err(Failure::Unreachable));
    let both = forwarder(&[closed, fake.url("udp")]);
    assert!(ask(&both, "www.example.org.").await.is_ok());
    assert_eq!(began.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn of_two_thousand_questions_to_a_slow_upstream_none_is_lost_or_waits_for_another() {
    let _still = stand_still();
    for scheme in ["udp", "tcp"] {
        let mut fake = Fake::start_slow(Duration::from_millis(200));
        let forwarder = forwarder(&[fake.url(scheme)]);
        let began = Instant::now();
        let mut asking = JoinSet::new();
        for number in 0..2000 {
            asking.spawn(ask(&forwarder, &format!("n{number}.example.org.")));
        }
        for _ in 0..2000 {
            fake.next().await;
        }
        advance(Duration::from_millis(200)).await;
        while let Some(asked) = asking.join_next().await {
            assert_eq!(address_in(&asked.expect("no panic").expect("an answer")), Some(HONEST));
        }
        assert!(began.elapsed() <= Duration::from_millis(210), "{:?}", began.elapsed());
        let server = &forwarder.status().servers[0];
        assert_eq!((server.counts.queries, server.counts.good), (2000, 2000));
        assert!(server.connections <= 4);
    }
}

#[tokio::test(start_paused = true)]
async fn an_upstream_that_loses_a_twentieth_of_all_datagrams_answers_every_question() {
    let _still = stand_still();
    let mut state = 9_u64;
    let fake = Fake::start(move |heard| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        if heard.over == Transport::Udp && state >> 56 < 13 {
            vec![]
        } else {
            honest(heard)
        }
    });
    let forwarder = forwarder(&[fake.url("udp")]);
    let mut asking = JoinSet::new();
    for number in 0..300 {
        asking.spawn(ask(&forwarder, &format!("n{number}.example.org.")));
    }
    let mut answers = vec![];
    while !asking.is_empty() {
        settle().await;
        while let Some(asked) = asking.try_join_next() {
            answers.push(asked.expect("no panic"));
        }
        advance(Duration::from_millis(50)).await;
    }
    let counts = forwarder.status().servers[0].counts;
    let failures: Vec<_> = answers.iter().filter_map(|asked| asked.as_ref().err()).collect();
    assert!(failures.is_empty(), "{failures:?} {counts:?}");
    assert!(counts.queries < 300 + 300 / 4 + 64, "{counts:?}");
}

#[tokio::test]
async fn servfail_refused_and_nonsense_are_taken_to_the_next_server() {
    for code in [ResponseCode::ServFail, ResponseCode::Refused, ResponseCode::NotAuth] {
        let lame = Fake::start(move |heard| vec![with_code(heard, code)]);
        let alone = forwarder(&[lame.url("udp")]);
        assert_eq!(ask(&alone, "www.example.org.").await, Err(Failure::Code(code)));
        let fake = Fake::start(honest);
        let both = forwarder(&[lame.url("udp"), fake.url("udp")]);
        let answer = ask(&both, "www.example.org.").await.expect("an answer");
        assert_eq!(address_in(&answer), Some(HONEST));
        assert_eq!(
            both.status()
                .servers
                .iter()
                .map(|server| server.state)
                .collect::<Vec<_>>(),
            [State::Up; 2]
        );
    }
}

#[tokio::test]
async fn nxdomain_is_an_answer() {
    let fake = Fake::start(|heard| vec![with_code(heard, ResponseCode::NXDomain)]);
    let forwarder = forwarder(&[fake.url("udp")]);
    let answer = ask(&forwarder, "www.example.org.").await.expect("an answer");
    assert_eq!(answer.code, ResponseCode::NXDomain);
}

#[tokio::test]
async fn a_truncated_answer_is_fetched_by_tcp() {
    let fake = Fake::start(|heard| {
        let mut message = Message::from_vec(&reply(heard, HONEST)).expect("it parses");
        if heard.over == Transport::Udp {
            message.answers.clear();
            message.metadata.truncation = true;
        } else {
            let one = message.answers[0].clone();
            message.add_answers(std::iter::repeat_n(one, 1000));
        }
        vec![message.to_vec().expect("it encodes")]
    });
    let forwarder = forwarder(&[fake.url("udp")]);
    let answer = ask(&forwarder, "www.example.org.").await.expect("an answer");
    assert_eq!(answer.answers.len(), 1001);
    assert_eq!(forwarder.status().servers[0].counts.truncated, 1);
}

#[tokio::test(start_paused = true)]
async fn a_server_from_before_edns_is_asked_without_from_then_on() {
    let _still = stand_still();
    let mut fake = Fake::start(|heard| {
        if heard.message.edns.is_some() {
            let mut bare = heard.bytes[..12].to_vec();
            bare[2..].copy_from_slice(&[0x81, 0x81, 0, 0, 0, 0, 0, 0, 0, 0]);
            vec![bare]
        } else {
            honest(heard)
        }
    });
    let forwarder = forwarder(&[fake.url("udp")]);
    assert!(ask(&forwarder, "a.example.org.").await.is_ok());
    assert!(ask(&forwarder, "b.example.org.").await.is_ok());
    let edns = [fake.next().await, fake.next().await, fake.next().await].map(|heard| heard.message.edns.is_some());
    assert_eq!(edns, [true, false, false]);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_does_not_keep_case_is_asked_by_tcp_unless_one_says_that_it_is_so() {
    let _still = stand_still();
    let lower = |heard: &Heard| {
        let mut message = Message::from_vec(&reply(heard, HONEST)).expect("it parses");
        message.queries[0].name = message.queries[0].name.to_lowercase();
        vec![message.to_vec().expect("it encodes")]
    };
    let mut fake = Fake::start(lower);
    let strict = forwarder(&[fake.url("udp")]);
    assert!(ask(&strict, "a-name-with-many-letters.example.org.").await.is_ok());
    assert_eq!(
        [fake.next().await.over, fake.next().await.over],
        [Transport::Udp, Transport::Tcp]
    );
    assert_eq!(strict.status().servers[0].counts.case_lost, 1);
    let told = forwarder(&[format!("{}?case=fixed", fake.url("udp"))]);
    assert!(ask(&told, "a-name-with-many-letters.example.org.").await.is_ok());
    assert_eq!(fake.next().await.over, Transport::Udp);
    assert!(fake.queries.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn connections_are_shared_answered_in_any_order_and_closed_when_idle() {
    let _still = stand_still();
    let mut fake = Fake::start(|_| vec![]);
    let forwarder = forwarder(&[fake.url("tcp")]);
    let mut asking = JoinSet::new();
    for number in 0..50 {
        asking.spawn(ask(&forwarder, &format!("n{number}.example.org.")));
    }
    let mut heard = vec![];
    for _ in 0..50 {
        heard.push(fake.next().await);
    }
    assert_eq!(
        heard.iter().map(|heard| heard.from).collect::<BTreeSet<_>>().len(),
        1,
        "one connection"
    );
    for heard in heard.iter().rev() {
        heard.back.send(reply(heard, HONEST)).expect("it is open");
    }
    let answers = asking.join_all().await;
    assert!(answers.iter().all(Result::is_ok));
    assert_eq!(forwarder.status().servers[0].connections, 1);
    advance(Duration::from_secs(11)).await;
    while forwarder.status().servers[0].connections > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(forwarder.status().servers[0].last_error, None);
}

#[tokio::test]
async fn a_connection_that_the_server_closes_between_questions_costs_no_answer() {
    let hangs_up = |heard: &Heard| {
        let mut replies = honest(heard);
        // Nothing but a length of zero tells the server to hang up.
        replies.push(vec![]);
        replies
    };
    let fake = Fake::start(hangs_up);
    let forwarder = forwarder(&[fake.url("tcp")]);
    for number in 0..50 {
        let answer = ask(&forwarder, &format!("n{number}.example.org.")).await;
        assert!(answer.is_ok(), "{number}: {answer:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_certificate_must_hold_the_name_and_come_from_an_authority_that_is_trusted() {
    let _still = stand_still();
    let fake = Fake::start_tls("dns.example.org", honest);
    let stranger = Fake::start_tls("dns.example.org", honest);
    let good = format!("{}#dns.example.org", fake.url("tls"));
    for (url, root) in [
        (format!("{}#other.example.org", fake.url("tls")), &fake.root),
        (fake.url("tls"), &fake.root),
        (good.clone(), &stranger.root),
    ] {
        let forwarder = forwarder_with(&[&url], root);
        assert_eq!(
            ask(&forwarder, "www.example.org.").await,
            Err(Failure::Unreachable),
            "{url}"
        );
        let error = forwarder.status().servers[0].last_error.clone().unwrap_or_default();
        assert!(error.contains("certificate"), "{error}");
    }
    let by_address = Fake::start_tls("127.0.0.1", honest);
    let forwarder = forwarder_with(&[&by_address.url("tls")], &by_address.root);
    assert!(ask(&forwarder, "www.example.org.").await.is_ok());
    let forwarder = forwarder_with(&[&good], &fake.root);
    assert!(ask(&forwarder, "www.example.org.").await.is_ok());
}

#[tokio::test]
async fn what_travels_by_tls_is_padded_and_its_session_is_resumed() {
    let mut fake = Fake::start_tls("dns.example.org", |heard| {
        let mut replies = honest(heard);
        replies.push(vec![]);
        replies
    });
    let forwarder = forwarder_with(&[&format!("{}#dns.example.org", fake.url("tls"))], &fake.root);
    for number in 0..5 {
        assert!(ask(&forwarder, &format!("n{number}.example.org.")).await.is_ok());
        let heard = fake.next().await;
        assert_eq!(heard.bytes.len() % 128, 0);
        // Each one is a connection of its own, since this server hangs up after each answer.
        while forwarder.status().servers[0].connections > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(heard.resumed, number > 0, "{number}");
    }
}

#[test]
fn tls_without_authorities_is_refused_at_the_start() {
    let config = Config {
        servers: vec!["tls://192.0.2.54".parse().expect("a URL")],
        ..Config::default()
    };
    for (roots, reason) in [
        (&b""[..], "holds no certificate"),
        (b"-----BEGIN CERTIFICATE-----\n!", "PEM"),
    ] {
        let opened = Opened { roots: roots.to_vec() };
        let error = Forwarder::new(config.clone(), &opened)
            .expect_err("no roots")
            .to_string();
        assert!(error.contains(reason), "{error}");
    }
}

#[tokio::test]
async fn more_questions_than_allowed_are_turned_away_at_once() {
    let fake = Fake::start(|_| vec![]);
    let config = Config {
        servers: vec![fake.url("udp").parse().expect("a URL")],
        outstanding: 10,
        ..Config::default()
    };
    let forwarder = Forwarder::new(config, &Opened::default()).expect("no TLS");
    let mut asking = JoinSet::new();
    for number in 0..10 {
        asking.spawn(ask(&forwarder, &format!("n{number}.example.org.")));
    }
    while forwarder.status().outstanding < 10 {
        tokio::task::yield_now().await;
    }
    assert_eq!(ask(&forwarder, "one.more.example.org.").await, Err(Failure::Busy));
    assert_eq!(forwarder.status().busy, 1);
}

#[tokio::test]
async fn rubbish_before_every_answer_changes_nothing() {
    let mut state = 3_u64;
    let fake = Fake::start(move |heard| {
        let mut draw = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(state >> 40).expect("24 bits")
        };
        let good = reply(heard, FORGED);
        let mut replies: Vec<_> = (0..40)
            .map(|_| {
                let mut rubbish = good.clone();
                // Its id is wrong in one bit, and anything else may be wrong.
                rubbish[draw() % 2] ^= 1 << (draw() % 8);
                for _ in 0..draw() % 5 {
                    let place = 2 + draw() % (rubbish.len() - 2);
                    rubbish[place] = draw().to_le_bytes()[0];
                }
                rubbish.truncate(draw() % (good.len() + 20));
                rubbish
            })
            .collect();
        replies.extend(honest(heard));
        replies
    });
    let forwarder = forwarder(&[fake.url("udp")]);
    for number in 0..500 {
        let answer = ask(&forwarder, &format!("n{number}.example.org."))
            .await
            .expect("an answer");
        assert_eq!(address_in(&answer), Some(HONEST));
    }
}

#[tokio::test]
async fn the_quicker_of_two_servers_gets_the_questions() {
    let (mut slow, quick) = (Fake::start_slow(Duration::from_millis(60)), Fake::start(honest));
    let forwarder = forwarder(&[slow.url("udp"), quick.url("udp")]);
    for number in 0..100 {
        assert!(ask(&forwarder, &format!("n{number}.example.org.")).await.is_ok());
    }
    let mut asked = 0;
    while slow.queries.try_recv().is_ok() {
        asked += 1;
    }
    assert!(asked < 10, "{asked} of 100");
}

/// A query as a fake server got it.
struct Heard {
    bytes: Vec<u8>,
    message: Message,
    from: SocketAddr,
    over: Transport,
    /// The TLS session was resumed.
    resumed: bool,
    /// Sends on the connection that it came by; an empty message closes it.
    back: mpsc::UnboundedSender<Vec<u8>>,
}

/// A server of this process.
struct Fake {
    address: SocketAddr,
    socket: Option<Arc<UdpSocket>>,
    queries: mpsc::UnboundedReceiver<Heard>,
    /// The authority of its certificate (PEM).
    root: Vec<u8>,
    _tasks: JoinSet<()>,
}

/// What it does with a query: the messages that it sends.
type Behaviour = Arc<Mutex<dyn FnMut(&Heard) -> Vec<Vec<u8>> + Send>>;

impl Fake {
    /// By UDP and TCP at one port.
    fn start(behaviour: impl FnMut(&Heard) -> Vec<Vec<u8>> + Send + 'static) -> Self {
        let behaviour: Behaviour = Arc::new(Mutex::new(behaviour));
        let (tcp, udp) = (0..100)
            .find_map(|_| {
                let tcp = std::net::TcpListener::bind("127.0.0.1:0").ok()?;
                let udp = std::net::UdpSocket::bind(tcp.local_addr().ok()?).ok()?;
                Some((tcp, udp))
            })
            .expect("a port that is free twice");
        let mut fake = Self::of(udp, &behaviour, None);
        let (queries, receiver) = mpsc::unbounded_channel();
        // Both ways end in one queue.
        let mut datagrams = std::mem::replace(&mut fake.queries, receiver);
        let forward = queries.clone();
        fake._tasks.spawn(async move {
            while let Some(heard) = datagrams.recv().await {
                let _ = forward.send(heard);
            }
        });
        fake._tasks.spawn(accept(listener(tcp), None, behaviour, queries));
        fake
    }

    fn start_udp(behaviour: impl FnMut(&Heard) -> Vec<Vec<u8>> + Send + 'static) -> Self {
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
        Self::of(udp, &(Arc::new(Mutex::new(behaviour)) as Behaviour), None)
    }

    /// Answers honestly after `delay`.
    fn start_slow(delay: Duration) -> Self {
        let socket = Arc::new(Mutex::new(None::<Arc<UdpSocket>>));
        let slot = socket.clone();
        let fake = Self::start(move |heard| {
            let (answer, from, back) = (reply(heard, HONEST), heard.from, heard.back.clone());
            let socket = lock(&slot).clone().filter(|_| heard.over == Transport::Udp);
            let at = Instant::now() + delay;
            tokio::spawn(async move {
                sleep_until(at).await;
                match socket {
                    Some(socket) => drop(socket.send_to(&answer, from).await),
                    None => drop(back.send(answer)),
                }
            });
            vec![]
        });
        *lock(&socket) = fake.socket.clone();
        fake
    }

    fn of(udp: std::net::UdpSocket, behaviour: &Behaviour, root: Option<Vec<u8>>) -> Self {
        udp.set_nonblocking(true).expect("it can be set");
        let address = udp.local_addr().expect("it is bound");
        let _ = socket2::SockRef::from(&udp).set_recv_buffer_size(4 << 20);
        let socket = Arc::new(UdpSocket::from_std(udp).expect("a runtime"));
        let (sender, queries) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        let (server, behaviour) = (socket.clone(), behaviour.clone());
        tasks.spawn(async move {
            let mut buffer = [0; 2048];
            loop {
                // What comes of a port that was closed meanwhile is no matter here.
                let Ok((length, from)) = server.recv_from(&mut buffer).await else {
                    continue;
                };
                let (back, _) = mpsc::unbounded_channel();
                let heard = Heard::new(&buffer[..length], from, Transport::Udp, false, back);
                let replies = lock(&behaviour)(&heard);
                for reply in replies {
                    let _ = server.send_to(&reply, from).await;
                }
                let _ = sender.send(heard);
            }
        });
        Self {
            address,
            socket: Some(socket),
            queries,
            root: root.unwrap_or_default(),
            _tasks: tasks,
        }
    }

    /// By TLS, with a certificate for `name` and an authority of its own.
    fn start_tls(name: &str, behaviour: impl FnMut(&Heard) -> Vec<Vec<u8>> + Send + 'static) -> Self {
        let mut authority = CertificateParams::new([]).expect("no names");
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().expect("a key")).expect("a root");
        let key = KeyPair::generate().expect("a key");
        let leaf = CertificateParams::new([name.to_owned()]).expect("a name");
        let leaf = leaf.signed_by(&key, &authority).expect("a certificate");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("they exist")
            .with_no_client_auth()
            .with_single_cert(
                vec![leaf.der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).expect("a key"),
            )
            .expect("they fit");
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = tcp.local_addr().expect("it is bound");
        let (sender, queries) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        tasks.spawn(accept(
            listener(tcp),
            Some(acceptor),
            Arc::new(Mutex::new(behaviour)),
            sender,
        ));
        Self {
            address,
            socket: None,
            queries,
            root: authority.pem().into_bytes(),
            _tasks: tasks,
        }
    }

    fn url(&self, scheme: &str) -> String {
        format!("{scheme}://{}", self.address)
    }

    async fn next(&mut self) -> Heard {
        self.queries.recv().await.expect("it runs")
    }

    /// The next one for that name.
    async fn next_of(&mut self, name: &str) -> Heard {
        loop {
            let heard = self.next().await;
            if heard.message.queries[0].name.to_lowercase().to_string() == name {
                return heard;
            }
        }
    }

    async fn send(&self, datagram: &[u8], to: SocketAddr) {
        let socket = self.socket.as_ref().expect("it has one");
        // A port that is closed meanwhile answers with an error that is of no interest.
        let _ = socket.send_to(datagram, to).await;
    }
}

impl Heard {
    fn new(
        bytes: &[u8],
        from: SocketAddr,
        over: Transport,
        resumed: bool,
        back: mpsc::UnboundedSender<Vec<u8>>,
    ) -> Self {
        Self {
            bytes: bytes.to_vec(),
            message: Message::from_vec(bytes).expect("we send what parses"),
            from,
            over,
            resumed,
            back,
        }
    }
}

fn listener(tcp: std::net::TcpListener) -> TcpListener {
    tcp.set_nonblocking(true).expect("it can be set");
    TcpListener::from_std(tcp).expect("a runtime")
}

async fn accept(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    behaviour: Behaviour,
    queries: mpsc::UnboundedSender<Heard>,
) {
    let mut connections = JoinSet::new();
    while let Ok((stream, from)) = listener.accept().await {
        let (tls, behaviour, queries) = (tls.clone(), behaviour.clone(), queries.clone());
        connections.spawn(async move {
            match tls {
                None => converse(stream, from, false, &behaviour, &queries).await,
                Some(tls) => {
                    let Ok(stream) = tls.accept(stream).await else { return };
                    let resumed = stream.get_ref().1.handshake_kind() == Some(rustls::HandshakeKind::Resumed);
                    converse(stream, from, resumed, &behaviour, &queries).await;
                }
            }
        });
    }
}

async fn converse(
    stream: impl AsyncRead + AsyncWrite,
    from: SocketAddr,
    resumed: bool,
    behaviour: &Behaviour,
    queries: &mpsc::UnboundedSender<Heard>,
) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (back, mut replies) = mpsc::unbounded_channel::<Vec<u8>>();
    let read = async {
        while let Ok(length) = reader.read_u16().await {
            let mut query = vec![0; length.into()];
            if reader.read_exact(&mut query).await.is_err() {
                break;
            }
            let heard = Heard::new(&query, from, Transport::Tcp, resumed, back.clone());
            let replies = lock(behaviour)(&heard);
            for reply in replies {
                let _ = back.send(reply);
            }
            let _ = queries.send(heard);
        }
    };
    let write = async {
        while let Some(reply) = replies.recv().await.filter(|reply| !reply.is_empty()) {
            let mut framed = u16::try_from(reply.len()).expect("it is short").to_be_bytes().to_vec();
            framed.extend(reply);
            if writer.write_all(&framed).await.is_err() || writer.flush().await.is_err() {
                break;
            }
        }
        let _ = writer.shutdown().await;
    };
    tokio::select! {
        () = read => {}
        () = write => {}
    }
}

/// An honest reply: the question as it came, and one address.
fn honest(heard: &Heard) -> Vec<Vec<u8>> {
    vec![reply(heard, HONEST)]
}

fn reply(heard: &Heard, address: Ipv4Addr) -> Vec<u8> {
    let mut message = heard.message.clone().into_response();
    message.metadata.recursion_available = true;
    // Padding is the query's.
    if let Some(edns) = &mut message.edns {
        *edns = hickory_proto::op::Edns::new();
    }
    let name = message.queries[0].name.clone();
    message.add_answer(Record::from_rdata(name, 60, RData::A(rdata::A(address))));
    message.to_vec().expect("it encodes")
}

fn with_code(heard: &Heard, code: ResponseCode) -> Vec<u8> {
    let mut message = heard.message.clone().into_response();
    message.metadata.recursion_available = true;
    message.metadata.response_code = code;
    message.to_vec().expect("it encodes")
}

fn forwarder(urls: &[String]) -> Forwarder {
    let urls: Vec<_> = urls.iter().map(String::as_str).collect();
    forwarder_with(&urls, b"")
}

fn forwarder_with(urls: &[&str], roots: &[u8]) -> Forwarder {
    let config = Config {
        servers: urls.iter().map(|url| url.parse().expect("a URL")).collect(),
        ..Config::default()
    };
    Forwarder::new(config, &Opened { roots: roots.to_vec() }).expect("the roots are good")
}

fn question(name: &str) -> Question {
    Question::new(&Name::from_str(name).expect("a name"), RecordType::A)
}

fn ask(forwarder: &Forwarder, name: &str) -> impl Future<Output = Result<Answer, Failure>> + Send + 'static {
    let (forwarder, question) = (forwarder.clone(), question(name));
    async move { forwarder.ask(&question).await }
}

fn address_in(answer: &Answer) -> Option<Ipv4Addr> {
    answer.answers.iter().find_map(|record| match record.data {
        RData::A(address) => Some(address.0),
        _ => None,
    })
}

/// Keeps the paused clock where it is until what is returned is dropped: it would go on by itself whenever all wait for
/// sockets.
fn stand_still() -> std::sync::mpsc::Sender<()> {
    let (held, hold) = std::sync::mpsc::channel();
    tokio::task::spawn_blocking(move || hold.recv());
    held
}

/// Lets all that is under way on loopback arrive.
async fn settle() {
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
}
