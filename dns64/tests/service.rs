//! The whole service on loopback; see [`rig`].

use std::{
    collections::BTreeSet,
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    thread,
    time::{Duration, Instant, SystemTime},
};

use dns64::{
    io::service::{Command, Opened},
    status::{Answer, Request, Status},
    zone::{Algorithm, Durable, Memory},
};
use hickory_proto::{
    op::{Edns, Message, OpCode, ResponseCode},
    rr::{
        DNSClass, Name, RecordType,
        rdata::opt::{EdnsCode, EdnsOption},
    },
};

mod rig;

use rig::{
    Disk, Dns, PREFIX, Reaction, SOON, Upstream, after, background, client, fail, keyed, no_name, nothing, question,
    read, received, say, shown, signed, signer_of, sockets, update, wait, with_edns, write,
};

fn now() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().expect("after 1970").as_secs()
}

const ZONE: &str = "[[zone]]\nname = \"fleet\"\nprefixes = [\"fd0d::/64\"]\naddresses = [\"fd0d::1\"]\n";

#[test]
fn aaaa_is_synthesised_where_there_is_none_and_only_there() {
    let upstream = Upstream::start(|name, kind| match (name, kind) {
        ("old.example.org" | "broken.example.org" | "gone.example.org", RecordType::A) => {
            say(&format!("{name} 300 A 198.51.100.1"))
        }
        ("new.example.org", RecordType::A) => say("new.example.org 300 A 198.51.100.2"),
        ("new.example.org", RecordType::AAAA) => say("new.example.org 300 AAAA 2001:db8::2"),
        ("mapped.example.org", RecordType::A) => say("mapped.example.org 300 A 198.51.100.3"),
        ("mapped.example.org", RecordType::AAAA) => say("mapped.example.org 300 AAAA ::ffff:198.51.100.3"),
        ("alias.example.org", RecordType::A) => {
            say("alias.example.org 300 CNAME old.example.org\nold.example.org 300 A 198.51.100.1")
        }
        ("alias.example.org", RecordType::AAAA) => {
            say("alias.example.org 300 CNAME old.example.org\nexample.org 300 SOA 300")
        }
        ("broken.example.org", RecordType::AAAA) => fail(),
        ("gone.example.org", _) => no_name(),
        _ => nothing(),
    });
    let dns = Dns::start(&format!("{PREFIX}\n{}", upstream.line()));
    for (asked, expected) in [
        (
            "old.example.org AAAA",
            "NOERROR old.example.org AAAA 2001:db8:64::c633:6401",
        ),
        ("old.example.org A", "NOERROR old.example.org A 198.51.100.1"),
        ("new.example.org AAAA", "NOERROR new.example.org AAAA 2001:db8::2"),
        (
            "mapped.example.org AAAA",
            "NOERROR mapped.example.org AAAA 2001:db8:64::c633:6403",
        ),
        (
            "alias.example.org AAAA",
            "NOERROR alias.example.org CNAME old.example.org old.example.org AAAA 2001:db8:64::c633:6401",
        ),
        (
            "broken.example.org AAAA",
            "NOERROR broken.example.org AAAA 2001:db8:64::c633:6401",
        ),
        ("gone.example.org AAAA", "NXDOMAIN"),
        ("empty.example.org AAAA", "NOERROR"),
    ] {
        assert_eq!(dns.shows(asked), expected, "{asked}");
        assert_eq!(dns.shows(asked), expected, "{asked}, known");
    }
    let reply = dns.ask("old.example.org AAAA").metadata;
    assert!(reply.recursion_available && !reply.authoritative && !reply.authentic_data);
    dns.wait("hits are counted", |status| status.udp.hits >= 9);
    let asked = upstream.asked();
    let unique: BTreeSet<&String> = asked.iter().collect();
    let broken = asked.iter().filter(|asked| asked.starts_with("broken")).count();
    assert!(
        asked.len() - unique.len() <= broken,
        "nothing known is asked again: {asked:?}"
    );
}

#[test]
fn a_and_aaaa_are_asked_for_at_once_and_nothing_is_said_before_aaaa_is_known() {
    let upstream = Upstream::start(|name, kind| match (name, kind) {
        (_, RecordType::A) => say(&format!("{name} 300 A 198.51.100.1")),
        ("new.example.org", _) => after(500, say("new.example.org 300 AAAA 2001:db8::2")),
        (".", _) => nothing(),
        _ => Reaction::Silence,
    });
    let dns = Dns::start(&format!("{PREFIX}\n{}", upstream.line()));
    let begun = Instant::now();
    assert_eq!(
        dns.shows("new.example.org AAAA"),
        "NOERROR new.example.org AAAA 2001:db8::2"
    );
    assert!(begun.elapsed() >= Duration::from_millis(500));
    let client = dns.client();
    let query = question("old.example.org AAAA").to_vec().expect("a query");
    let begun = Instant::now();
    client.send(&query).expect("sent");
    wait("both are asked for", || {
        let asked = upstream.asked();
        ["A", "AAAA"]
            .iter()
            .all(|kind| asked.contains(&format!("old.example.org {kind}")))
    });
    // An upstream has 4 s.
    assert!(
        begun.elapsed() < Duration::from_secs(3),
        "at once: {:?}",
        begun.elapsed()
    );
    client.set_nonblocking(true).expect("set");
    assert!(client.recv(&mut [0; 512]).is_err(), "no answer before AAAA is known");
    client.set_nonblocking(false).expect("set");
    // It is asked again before long.
    upstream.set(|name, kind| match kind {
        RecordType::A => say(&format!("{name} 300 A 198.51.100.1")),
        _ => nothing(),
    });
    let reply = Message::from_vec(&received(&client)).expect("a message");
    assert_eq!(shown(&reply), "NOERROR old.example.org AAAA 2001:db8:64::c633:6401");
}

#[test]
fn who_validates_gets_what_there_is() {
    let upstream = Upstream::start(|name, kind| match kind {
        RecordType::A => say(&format!("{name} 300 A 198.51.100.1")),
        _ => nothing(),
    });
    let dns = Dns::start(&format!("{PREFIX}\n{}", upstream.line()));
    let mut query = with_edns(question("old.example.org AAAA"), 1232);
    query.edns.as_mut().expect("EDNS").set_dnssec_ok(true);
    let made = "NOERROR old.example.org AAAA 2001:db8:64::c633:6401";
    assert_eq!(shown(&dns.exchange(&query)), made, "DO alone");
    query.metadata.checking_disabled = true;
    assert_eq!(shown(&dns.exchange(&query)), "NOERROR", "DO and CD");
}

#[test]
fn while_an_upstream_fails_stale_answers_do_and_when_it_is_back_fresh_ones_come() {
    let good = |name: &str, kind| match kind {
        RecordType::A => say(&format!("{name} 1 A 198.51.100.1")),
        _ => say("example.org 1 SOA 1"),
    };
    let mut upstream = Upstream::start(good);
    let dns = Dns::start(&format!("{PREFIX}\n{}", upstream.line()));
    let names = ["failing", "silent", "closed"].map(|name| format!("{name}.example.org AAAA"));
    let made = |asked: &str| {
        let name = asked.trim_end_matches(" AAAA");
        format!("NOERROR {name} AAAA 2001:db8:64::c633:6401")
    };
    for asked in &names {
        assert_eq!(dns.shows(asked), made(asked));
    }
    // The TTL is over after a second.
    thread::sleep(Duration::from_millis(1100));

    let [failing, silent, closed] = &names;
    upstream.set(|_, _| fail());
    let stale = dns.ask(failing);
    assert_eq!(shown(&stale), made(failing));
    assert_eq!(stale.answers[0].ttl, 30);

    upstream.set(|name, _| match name {
        // It is alive, as a check of it finds out.
        "." => nothing(),
        _ => Reaction::Silence,
    });
    // The quickest of some: nobody is to blame for what this machine is held up.
    let stale_soon = |asked: &str| {
        let took = (0..5).map(|_| {
            let begun = Instant::now();
            assert_eq!(dns.ask(asked).answers[0].ttl, 30);
            begun.elapsed()
        });
        let quickest = took.min().expect("some");
        assert!(quickest < Duration::from_millis(300), "{asked}: {quickest:?}");
    };
    let begun = Instant::now();
    assert_eq!(dns.shows(silent), made(silent));
    assert!(begun.elapsed() >= Duration::from_millis(1500), "{:?}", begun.elapsed());
    // Later ones do not wait.
    stale_soon(silent);
    upstream.set(good);
    wait("a fresh answer", || dns.ask(silent).answers[0].ttl <= 1);

    upstream.close();
    assert_eq!(dns.shows(closed), made(closed));
    stale_soon(closed);
    assert!(dns.status().cache.stale >= 3);
    assert_eq!(dns.shows("unknown.example.org AAAA"), "SERVFAIL");
}

#[test]
fn an_upstream_that_fails_is_servfail_and_not_asked_by_each_client() {
    let upstream = Upstream::start(|_, _| fail());
    let dns = Dns::start(&upstream.line());
    for _ in 0..5 {
        assert_eq!(dns.shows("www.example.org A"), "SERVFAIL");
    }
    assert!(upstream.asked().len() <= 2, "{:?}", upstream.asked());
}

#[test]
fn an_upstream_that_never_answers_is_servfail_in_the_end() {
    let upstream = Upstream::start(|_, _| Reaction::Silence);
    let dns = Dns::start(&upstream.line());
    assert_eq!(dns.shows("www.example.org A"), "SERVFAIL");
    let begun = Instant::now();
    assert_eq!(dns.shows("other.example.org A"), "SERVFAIL");
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
}

#[test]
fn many_clients_with_one_question_are_one_question_upstream() {
    let upstream = Upstream::start(|name, kind| match kind {
        RecordType::A => after(100, say(&format!("{name} 300 A 198.51.100.1"))),
        _ => after(100, nothing()),
    });
    let dns = Dns::start(&format!("{PREFIX}\n{}", upstream.line()));
    let clients: Vec<_> = (0..50).map(|_| dns.client()).collect();
    for client in &clients {
        let query = question("www.example.org AAAA").to_vec().expect("a query");
        client.send(&query).expect("sent");
    }
    for client in &clients {
        let reply = Message::from_vec(&received(client)).expect("a message");
        assert_eq!(shown(&reply), "NOERROR www.example.org AAAA 2001:db8:64::c633:6401");
    }
    assert_eq!(upstream.asked().len(), 2, "{:?}", upstream.asked());
}

#[test]
fn hosts_come_first_and_get_synthesis_and_names_of_their_addresses() {
    let upstream = Upstream::start(|name, _| say(&format!("{name} 300 A 203.0.113.9")));
    let dns = Dns::start(&format!(
        "{PREFIX}\n{}\n[hosts]\n\"nas.example.org\" = [\"198.51.100.7\"]\n\"six.example.org\" = [\"2001:db8::6\", \"198.51.100.6\"]",
        upstream.line()
    ));
    for (asked, expected) in [
        ("NAS.example.org A", "NOERROR NAS.example.org A 198.51.100.7"),
        (
            "nas.example.org AAAA",
            "NOERROR nas.example.org AAAA 2001:db8:64::c633:6407",
        ),
        ("six.example.org AAAA", "NOERROR six.example.org AAAA 2001:db8::6"),
        ("nas.example.org TXT", "NOERROR"),
        (
            "7.100.51.198.in-addr.arpa PTR",
            "NOERROR 7.100.51.198.in-addr.arpa PTR nas.example.org",
        ),
    ] {
        assert_eq!(dns.shows(asked).to_lowercase(), expected.to_lowercase(), "{asked}");
    }
    let reverse = Name::from(
        "2001:db8:64::198.51.100.7"
            .parse::<std::net::Ipv6Addr>()
            .expect("an address"),
    );
    let found = dns.shows(&format!("{reverse} PTR"));
    assert!(found.ends_with("PTR nas.example.org"), "{found}");
    assert!(upstream.asked().is_empty(), "{:?}", upstream.asked());
}

#[test]
fn a_domain_that_is_forwarded_never_reaches_other_upstreams() {
    let general = Upstream::start(|name, _| say(&format!("{name} 300 A 198.51.100.1")));
    let inner = Upstream::start(|name, _| say(&format!("{name} 300 A 198.51.100.2")));
    let deep = Upstream::start(|name, _| say(&format!("{name} 300 A 198.51.100.3")));
    let dns = Dns::start(&format!(
        "{}\n[forward]\n\"cluster.local\" = [\"udp://{}\"]\n\"deep.cluster.local\" = [\"udp://{}\"]",
        general.line(),
        inner.address,
        deep.address
    ));
    for (name, last) in [
        ("www.example.org", 1),
        ("cluster.local", 2),
        ("api.cluster.local", 2),
        ("notcluster.example", 1),
        ("xdeep.cluster.local", 2),
        ("deep.cluster.local", 3),
        ("x.deep.cluster.local", 3),
    ] {
        let expected = format!("NOERROR {name} A 198.51.100.{last}");
        assert_eq!(dns.shows(&format!("{name} A")), expected);
    }
    assert_eq!(general.asked(), ["www.example.org A", "notcluster.example A"]);
    let groups: Vec<String> = dns.status().upstreams.into_iter().map(|group| group.domain).collect();
    assert_eq!(groups, ["", "deep.cluster.local.", "cluster.local."]);
}

#[test]
fn an_alias_of_the_zone_to_an_outside_name_is_followed() {
    let upstream = Upstream::start(|name, kind| match kind {
        RecordType::A => say(&format!("{name} 300 A 198.51.100.1")),
        _ => nothing(),
    });
    let dns = Dns::start(&format!(
        "{PREFIX}\n{}\n{ZONE}aliases = {{ www = \"www.example.org.\", me = \"edge\" }}",
        upstream.line()
    ));
    assert_eq!(
        dns.shows("www.fleet AAAA"),
        "NOERROR www.fleet CNAME www.example.org www.example.org AAAA 2001:db8:64::c633:6401"
    );
    assert_eq!(
        dns.shows("me.fleet AAAA"),
        "NOERROR me.fleet CNAME edge.fleet edge.fleet AAAA fd0d::1"
    );
    assert!(dns.ask("me.fleet AAAA").metadata.authoritative);
}

#[test]
fn names_of_the_edge_itself_need_no_upstream() {
    let dns = Dns::start(&format!("{PREFIX}\nupstreams = [\"udp://127.0.0.1:9\"]\n{ZONE}"));
    assert_eq!(
        dns.shows("ipv4only.arpa AAAA"),
        "NOERROR ipv4only.arpa AAAA 2001:db8:64::c000:aa ipv4only.arpa AAAA 2001:db8:64::c000:ab"
    );
    let both = dns.shows("ipv4only.arpa A");
    assert_eq!(both, "NOERROR ipv4only.arpa A 192.0.0.170 ipv4only.arpa A 192.0.0.171");
    let reverse = Name::from(
        "2001:db8:64::192.0.0.170"
            .parse::<std::net::Ipv6Addr>()
            .expect("an address"),
    );
    assert!(dns.shows(&format!("{reverse} PTR")).ends_with("PTR ipv4only.arpa"));
    assert_eq!(dns.shows("x.ipv4only.arpa A"), "NXDOMAIN");
    assert_eq!(dns.shows("localhost AAAA"), "NOERROR localhost AAAA ::1");
    assert_eq!(dns.shows("1.1.168.192.in-addr.arpa PTR"), "NXDOMAIN");
    assert_eq!(dns.shows("edge.fleet AAAA"), "NOERROR edge.fleet AAAA fd0d::1");
    assert_eq!(dns.shows("nobody.fleet AAAA"), "NXDOMAIN");
    let reverse = Name::from("fd0d::1".parse::<std::net::Ipv6Addr>().expect("an address"));
    assert!(dns.shows(&format!("{reverse} PTR")).ends_with("PTR edge.fleet"));
}

#[test]
fn an_address_under_the_prefix_has_the_name_of_its_ipv4_address() {
    let upstream = Upstream::start(|name, kind| match (name, kind) {
        ("1.8.8.8.in-addr.arpa", RecordType::PTR) => say("1.8.8.8.in-addr.arpa 300 PTR dns.example.org"),
        _ => no_name(),
    });
    let dns = Dns::start(&format!("{PREFIX}\n{}", upstream.line()));
    let reverse = |address: &str| {
        let name = Name::from(address.parse::<std::net::Ipv6Addr>().expect("an address"));
        name.to_ascii()
    };
    let found = dns.shows(&format!("{} PTR", reverse("2001:db8:64::8.8.8.1")));
    assert!(
        found.starts_with("NOERROR") && found.ends_with("PTR dns.example.org"),
        "{found}"
    );
    assert_eq!(
        dns.shows(&format!("{} PTR", reverse("2001:db8:64::8.8.8.2"))),
        "NXDOMAIN"
    );
    let inner = reverse("2001:db8:64::8.8.8.1");
    let (_, above) = inner.split_once('.').expect("a name above");
    assert_eq!(dns.shows(&format!("{above} PTR")), "NOERROR", "an empty non-terminal");
}

#[test]
fn what_no_resolver_answers_is_refused() {
    let upstream = Upstream::start(|name, _| say(&format!("{name} 300 A 198.51.100.1")));
    let dns = Dns::start(&format!("{}\n{ZONE}", upstream.line()));
    let mut plain = question("www.example.org A");
    plain.metadata.recursion_desired = false;
    assert_eq!(
        shown(&dns.exchange(&plain)),
        "REFUSED",
        "not known, and not to be asked for"
    );
    let mut own = question("edge.fleet AAAA");
    own.metadata.recursion_desired = false;
    assert_eq!(shown(&dns.exchange(&own)), "NOERROR edge.fleet AAAA fd0d::1");
    assert_eq!(dns.shows("fleet AXFR"), "REFUSED");
    let mut incremental = question("fleet SOA");
    incremental.queries[0].set_query_type(RecordType::IXFR);
    assert_eq!(shown(&dns.exchange(&incremental)), "REFUSED");
    let mut chaos = question("version.bind TXT");
    chaos.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(shown(&dns.exchange(&chaos)), "REFUSED");
    let mut status = question("www.example.org A");
    status.metadata.op_code = OpCode::Status;
    let octets = dns.exchange_octets(&status.to_vec().expect("a query"));
    assert_eq!(octets[3] & 15, 4, "NOTIMP");
    assert!(upstream.asked().is_empty());
    for asked in ["www.example.org ANY", "edge.fleet ANY"] {
        let any = dns.ask(asked);
        let kinds: Vec<RecordType> = any.answers.iter().map(|record| record.record_type()).collect();
        assert_eq!(kinds, [RecordType::HINFO], "{asked}");
    }
}

#[test]
fn an_answer_is_never_answered() {
    let dns = Dns::start(ZONE);
    let client = dns.client();
    let mut answer = question("edge.fleet AAAA").to_vec().expect("a message");
    answer[2] |= 0x80;
    client.send(&answer).expect("sent");
    client.send(b"").expect("sent");
    client.send(b"short").expect("sent");
    let query = question("edge.fleet AAAA");
    client.send(&query.to_vec().expect("a query")).expect("sent");
    let reply = Message::from_vec(&received(&client)).expect("a message");
    assert_eq!(
        reply.metadata.id, query.metadata.id,
        "the first answer is that to the question"
    );
    dns.wait("the others are ignored", |status| status.udp.ignored == 3);
}

#[test]
fn queries_on_one_connection_are_answered_as_soon_as_each_is_known() {
    let upstream = Upstream::start(|name, _| match name {
        "." => nothing(),
        "slow.example.org" => Reaction::Silence,
        _ => say(&format!("{name} 300 A 198.51.100.2")),
    });
    let dns = Dns::start(&format!("{}\n{ZONE}", upstream.line()));
    let mut stream = dns.connect();
    let names = ["slow.example.org", "quick.example.org", "third.example.org"];
    let queries: Vec<Message> = names.iter().map(|name| question(&format!("{name} A"))).collect();
    write(&mut stream, &queries);
    let mut replies: Vec<Message> = (0..2).map(|_| read(&mut stream).expect("an answer")).collect();
    // It is asked for again before long, and comes last.
    upstream.set(|name, _| say(&format!("{name} 300 A 198.51.100.2")));
    replies.push(read(&mut stream).expect("an answer"));
    for reply in &replies {
        let query = queries.iter().find(|query| query.metadata.id == reply.metadata.id);
        assert_eq!(query.expect("one of ours").queries, reply.queries);
        assert_eq!(reply.answers.len(), 1);
    }
    // In pieces, and with the end of the client's side before the answer.
    let mut octets = Vec::new();
    let query = question("last.example.org A").to_vec().expect("a query");
    octets.extend(u16::try_from(query.len()).expect("short").to_be_bytes());
    octets.extend(query);
    for piece in octets.chunks(5) {
        stream.write_all(piece).expect("sent");
    }
    stream.shutdown(std::net::Shutdown::Write).expect("half-closed");
    assert_eq!(
        shown(&read(&mut stream).expect("an answer")),
        "NOERROR last.example.org A 198.51.100.2"
    );
    assert!(read(&mut stream).is_none(), "then it ends");
    dns.wait("the connection is gone", |status| status.tcp.open == 0);
}

#[test]
fn more_queries_than_one_connection_may_have_under_way_all_get_their_answers() {
    let upstream = Upstream::start(|name, _| after(20, say(&format!("{name} 300 A 198.51.100.1"))));
    let dns = Dns::start(&upstream.line());
    let mut stream = dns.connect();
    let queries: Vec<Message> = (0..300).map(|i| question(&format!("n{i}.example.org A"))).collect();
    write(&mut stream, &queries);
    let mut ids = BTreeSet::new();
    for _ in 0..300 {
        let reply = read(&mut stream).expect("an answer");
        assert_eq!(reply.answers.len(), 1, "{}", shown(&reply));
        ids.insert(reply.metadata.id);
    }
    assert_eq!(ids.len(), 300);
}

#[test]
fn connections_of_one_source_are_bounded_and_silent_ones_end() {
    let dns = Dns::start(ZONE);
    let mut streams: Vec<TcpStream> = (0..38).map(|_| dns.connect()).collect();
    dns.wait("six too many", |status| status.tcp.turned_away == 6);
    wait("and they have ended", || {
        let ended = streams.iter().filter(|stream| {
            stream.set_nonblocking(true).expect("set");
            let read = stream.peek(&mut [0]);
            stream.set_nonblocking(false).expect("set");
            read.ok() == Some(0)
        });
        ended.count() == 6
    });
    assert_eq!(dns.status().tcp.open, 32);
    drop(streams.split_off(1));
    dns.wait("their places are free", |status| status.tcp.open <= 1);
    let mut stream = dns.connect();
    write(&mut stream, &[question("edge.fleet AAAA")]);
    assert_eq!(
        shown(&read(&mut stream).expect("an answer")),
        "NOERROR edge.fleet AAAA fd0d::1"
    );
    // RFC 7766 §6.2.3: of the order of seconds.
    let mut silent = streams.remove(0);
    silent
        .set_read_timeout(Some(Duration::from_secs(40)))
        .expect("a timeout");
    let end = silent.read_exact(&mut [0]).expect_err("no octet");
    assert_eq!(end.kind(), ErrorKind::UnexpectedEof, "closed for its silence");
}

#[test]
fn outsiders_get_silence_over_udp_and_refused_over_tcp() {
    let dns = Dns::start(&format!("allow = [\"192.0.2.0/24\"]\n{ZONE}"));
    let client = dns.client();
    let query = question("edge.fleet AAAA").to_vec().expect("a query");
    client.send(&query).expect("sent");
    dns.wait("denied", |status| status.udp.denied == 1);
    client
        .set_read_timeout(Some(Duration::from_millis(100)))
        .expect("a timeout");
    assert!(client.recv(&mut [0; 512]).is_err());
    let mut stream = dns.connect();
    write(&mut stream, &[question("edge.fleet AAAA")]);
    assert_eq!(shown(&read(&mut stream).expect("an answer")), "REFUSED");
    assert!(read(&mut stream).is_none(), "then it ends");
    assert_eq!(dns.status().tcp.denied, 1);
    let mut stream = dns.connect();
    write(&mut stream, &[update("node1.fleet 300 AAAA fd0d::11")]);
    assert_eq!(shown(&read(&mut stream).expect("an answer")), "REFUSED");
    assert!(read(&mut stream).is_none(), "then it ends");
}

#[test]
fn who_brings_the_cookie_that_it_got_is_known() {
    let dns = Dns::start(&format!("{ZONE}\n[rate_limit]\nsame = 1\nall = 10\nburst = 1"));
    let with_cookie = |cookie: &[u8]| {
        let mut query = with_edns(question("edge.fleet AAAA"), 1232);
        let edns = query.edns.get_or_insert_with(Edns::new);
        edns.options_mut().insert(EdnsOption::Unknown(10, cookie.to_vec()));
        query
    };
    let cookie_of = |reply: &Message| {
        let option = reply
            .edns
            .as_ref()
            .and_then(|edns| edns.option(EdnsCode::Cookie).cloned());
        match option {
            Some(EdnsOption::Unknown(10, cookie)) => cookie,
            other => panic!("{other:?}"),
        }
    };
    let client = dns.client();
    let ask = |query: &Message| {
        client.send(&query.to_vec().expect("a query")).expect("sent");
        Message::from_vec(&received(&client)).expect("a message")
    };
    let first = ask(&with_cookie(b"12345678"));
    let cookie = cookie_of(&first);
    assert_eq!((&cookie[..8], cookie.len()), (b"12345678".as_slice(), 24));
    for _ in 0..50 {
        let reply = ask(&with_cookie(&cookie));
        assert_eq!(shown(&reply), "NOERROR edge.fleet AAAA fd0d::1");
    }
    for _ in 0..20 {
        let query = with_cookie(b"12345678").to_vec().expect("a query");
        client.send(&query).expect("sent");
    }
    dns.wait("those without are limited", |status| {
        status.udp.slipped >= 5 && status.udp.limited >= 5
    });
    let slipped = Message::from_vec(&received(&client)).expect("a message");
    assert!(matches!(
        slipped.metadata.response_code,
        ResponseCode::BADCOOKIE | ResponseCode::NoError
    ));
}

#[test]
fn a_signature_lifts_no_limit_of_a_network() {
    let mut memory = Memory::default();
    let node = keyed("node1", &mut memory);
    let limited = format!("{ZONE}\n[rate_limit]\nsame = 1\nall = 10\nburst = 1");
    let dns = Dns::start_with(&limited, memory);
    let client = dns.client();
    let (query, _) = signed(question("edge.fleet AAAA"), &node);
    for _ in 0..50 {
        client.send(&query.to_vec().expect("a query")).expect("sent");
    }
    dns.wait("all came", |status| status.udp.received == 50);
    dns.wait("most are not answered", |status| status.udp.limited >= 40);
    let mut stream = dns.connect();
    write(&mut stream, &[query]);
    assert_eq!(
        shown(&read(&mut stream).expect("an answer")),
        "NOERROR edge.fleet AAAA fd0d::1"
    );
}

#[test]
fn strangers_together_take_no_more_connections_than_one_who_may_ask() {
    let dns = Dns::start(&format!("allow = [\"127.0.0.1/32\"]\n{ZONE}"));
    let from = |source: &str| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        let source: std::net::SocketAddr = format!("{source}:0").parse().expect("an address");
        socket.bind(&source.into()).expect("bound");
        socket.connect(&dns.address.into()).expect("connected");
        TcpStream::from(socket)
    };
    let strangers: Vec<TcpStream> = (0..70).map(|i| from(&format!("127.0.1.{i}"))).collect();
    dns.wait("six too many", |status| status.tcp.turned_away == 6);
    let mut stream = dns.connect();
    write(&mut stream, &[question("edge.fleet AAAA")]);
    assert_eq!(
        shown(&read(&mut stream).expect("an answer")),
        "NOERROR edge.fleet AAAA fd0d::1"
    );
    drop(strangers);
}

#[test]
fn an_update_that_comes_again_after_a_reload_gets_the_same_answer() {
    let mut memory = Memory::default();
    let node = keyed("node1", &mut memory);
    let dns = Dns::start_with(ZONE, memory);
    let (message, _) = signed(update("node1.fleet 300 AAAA fd0d::11"), &node);
    let message = message.to_vec().expect("a message");
    let first = dns.exchange_octets(&message);
    dns.reload(&[dns.address], Opened::default(), ZONE).expect("good");
    assert_eq!(dns.exchange_octets(&message), first);
    assert_eq!(dns.kept().len(), 1);
    assert_eq!(
        shown(&dns.signed(update("node1.fleet 300 TXT x"), &node)),
        "NOERROR",
        "in the same second"
    );
}

#[test]
fn what_does_not_fit_a_datagram_comes_over_tcp() {
    let upstream = Upstream::start(|name, _| {
        let lines: Vec<String> = (1..=100).map(|i| format!("{name} 300 A 198.51.100.{i}")).collect();
        say(&lines.join("\n"))
    });
    let dns = Dns::start(&upstream.line());
    for (payload, limit) in [(None, 512), (Some(1232), 1232), (Some(4096), 1232)] {
        for known in [false, true] {
            let asked = format!("n{}.example.org A", payload.unwrap_or_default());
            let query = match payload {
                Some(payload) => with_edns(question(&asked), payload),
                None => question(&asked),
            };
            let octets = dns.exchange_octets(&query.to_vec().expect("a query"));
            assert!(octets.len() <= limit, "{payload:?}, {known}");
            let reply = Message::from_vec(&octets).expect("a message");
            assert!(reply.metadata.truncation, "{payload:?}, {known}");
        }
    }
    let mut stream = dns.connect();
    write(&mut stream, &[question("n0.example.org A")]);
    let whole = read(&mut stream).expect("an answer");
    assert!(!whole.metadata.truncation);
    assert_eq!(whole.answers.len(), 100);
}

#[test]
fn an_update_is_durable_first_and_seen_at_once_whatever_was_known_before() {
    let mut memory = Memory::default();
    let node = keyed("node1", &mut memory);
    let dns = Dns::start_with(&format!("{PREFIX}\n{ZONE}"), memory);
    assert_eq!(dns.shows("node1.fleet AAAA"), "NXDOMAIN");
    assert_eq!(dns.shows("node1.fleet TXT"), "NXDOMAIN");
    let reverse = Name::from("fd0d::11".parse::<std::net::Ipv6Addr>().expect("an address"));
    assert_eq!(dns.shows(&format!("{reverse} PTR")), "NXDOMAIN");

    dns.set_disk(rig::Disk::Slow);
    let (message, mut verifier) = signed(update("node1.fleet 1800 AAAA fd0d::11"), &node);
    let client = client(dns.address);
    client.send(&message.to_vec().expect("a message")).expect("sent");
    wait("it is on its way to the disk", || dns.waiting() == 1);
    assert_eq!(dns.shows("node1.fleet AAAA"), "NXDOMAIN", "not before it is durable");
    client.set_nonblocking(true).expect("set");
    assert!(client.recv(&mut [0; 512]).is_err(), "no answer before it is durable");
    client.set_nonblocking(false).expect("set");
    dns.set_disk(Disk::Good);
    dns.disk_done();
    let octets = received(&client);
    verifier.verify(&octets).expect("it is signed");
    assert_eq!(shown(&Message::from_vec(&octets).expect("a message")), "NOERROR");
    assert_eq!(dns.shows("node1.fleet AAAA"), "NOERROR node1.fleet AAAA fd0d::11");
    assert_eq!(dns.ask("node1.fleet AAAA").answers[0].ttl, 1800);
    assert_eq!(dns.shows("node1.fleet TXT"), "NOERROR");
    assert!(dns.shows(&format!("{reverse} PTR")).ends_with("PTR node1.fleet"));

    dns.set_disk(Disk::Full);
    let refused = dns.signed(update("delete node1.fleet AAAA"), &node);
    assert_eq!(shown(&refused), "SERVFAIL");
    assert_eq!(dns.shows("node1.fleet AAAA"), "NOERROR node1.fleet AAAA fd0d::11");
    dns.set_disk(Disk::Good);
    let gone = dns.signed(update("delete node1.fleet AAAA"), &node);
    assert_eq!(shown(&gone), "NOERROR");
    assert_eq!(dns.shows("node1.fleet AAAA"), "NXDOMAIN");
    assert_eq!(dns.shows(&format!("{reverse} PTR")), "NXDOMAIN");
    let counts: Vec<(String, u64)> = dns.status().updates;
    assert_eq!(counts.iter().map(|(_, count)| count).sum::<u64>(), 3, "{counts:?}");
}

#[test]
fn an_update_is_seen_at_once_through_an_alias_from_outside() {
    let upstream = Upstream::start(|name, kind| match (name, kind) {
        ("www.example.org", _) => say("www.example.org 300 CNAME node1.fleet"),
        ("in.example.org", RecordType::AAAA) => say("in.example.org 300 CNAME node1.fleet"),
        _ => nothing(),
    });
    let mut memory = Memory::default();
    let node = keyed("node1", &mut memory);
    let dns = Dns::start_with(&format!("{PREFIX}\n{}\n{ZONE}", upstream.line()), memory);
    assert_eq!(
        dns.shows("www.example.org AAAA"),
        "NXDOMAIN www.example.org CNAME node1.fleet"
    );
    for address in ["fd0d::11", "fd0d::12"] {
        let updates = format!("delete node1.fleet AAAA\nnode1.fleet 1800 AAAA {address}");
        assert_eq!(shown(&dns.signed(update(&updates), &node)), "NOERROR");
        let expected = format!("NOERROR www.example.org CNAME node1.fleet node1.fleet AAAA {address}");
        assert_eq!(dns.shows("www.example.org AAAA"), expected);
    }
}

#[test]
fn a_node_registers_over_tcp_and_cannot_take_what_is_anothers() {
    let mut memory = Memory::default();
    let (one, two) = (keyed("node1", &mut memory), keyed("node2", &mut memory));
    let dns = Dns::start_with(ZONE, memory);
    let (message, mut verifier) = signed(update("node1.fleet 300 AAAA fd0d::11"), &one);
    let mut stream = dns.connect();
    let octets = message.to_vec().expect("a message");
    stream
        .write_all(&u16::try_from(octets.len()).expect("short").to_be_bytes())
        .expect("sent");
    stream.write_all(&octets).expect("sent");
    let mut length = [0; 2];
    stream.read_exact(&mut length).expect("an answer");
    let mut octets = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut octets).expect("an answer");
    verifier.verify(&octets).expect("it is signed");

    for (updates, what) in [
        ("node1.fleet 300 AAAA fd0d::12", "another's name"),
        ("node2.fleet 300 AAAA fd0d::11", "another's address"),
        ("node2.fleet 300 AAAA fd0d::1", "the edge's address"),
        ("node2.fleet 300 AAAA 2001:db8::1", "an address outside"),
        ("edge.fleet 300 AAAA fd0d::12", "the edge's name"),
        ("api.fleet 300 AAAA fd0d::12", "the API's name"),
    ] {
        assert_eq!(shown(&dns.signed(update(updates), &two)), "REFUSED", "{what}");
    }
    assert_eq!(
        shown(&dns.exchange(&update("node1.fleet 300 AAAA fd0d::12"))),
        "REFUSED",
        "unsigned"
    );
    let (message, _) = signed(
        update("node1.fleet 300 AAAA fd0d::12"),
        &rig::signer("node1.fleet", &[1; 32]),
    );
    assert_eq!(shown(&dns.exchange(&message)), "NOTAUTH", "a wrong key");
    assert_eq!(dns.kept().len(), 1);
    assert_eq!(dns.shows("node1.fleet AAAA"), "NOERROR node1.fleet AAAA fd0d::11");
}

#[test]
fn what_nodes_registered_outlives_the_service() {
    let mut memory = Memory::default();
    let node = keyed("node1", &mut memory);
    let first = Dns::start_with(ZONE, memory.clone());
    let soa = |dns: &Dns| dns.status().zones[0].serial;
    let (message, _) = signed(
        update("node1.fleet 300 AAAA fd0d::11\nnode1.fleet 300 TXT hello"),
        &node,
    );
    assert_eq!(shown(&first.exchange(&message)), "NOERROR");
    let serial = soa(&first);
    let kept = first.memory();
    first.stop().expect("a good end");
    let second = Dns::start_with(
        ZONE,
        Memory {
            keys: memory.keys,
            ..kept
        },
    );
    assert_eq!(second.shows("node1.fleet AAAA"), "NOERROR node1.fleet AAAA fd0d::11");
    assert_eq!(second.shows("node1.fleet TXT"), "NOERROR node1.fleet TXT hello");
    assert_eq!(soa(&second), serial);
    let mut older = update("delete node1.fleet AAAA");
    older.finalize(&node, now() - 60).expect("signed");
    assert_eq!(
        shown(&second.exchange(&older)),
        "NOTAUTH",
        "signed before what was carried out"
    );
    // After a restart one of the same second would be taken for the one that was carried out.
    let mut later = update("delete node1.fleet AAAA");
    later.finalize(&node, now() + 1).expect("signed");
    assert_eq!(shown(&second.exchange(&later)), "NOERROR");
    assert_eq!(second.shows("node1.fleet AAAA"), "NOERROR");
}

#[test]
fn a_signed_query_gets_a_signed_answer() {
    let upstream = Upstream::start(|name, _| {
        let lines: Vec<String> = (1..=100).map(|i| format!("{name} 300 A 198.51.100.{i}")).collect();
        say(&lines.join("\n"))
    });
    let mut memory = Memory::default();
    let node = keyed("node1", &mut memory);
    let dns = Dns::start_with(&format!("{}\n{ZONE}", upstream.line()), memory);
    let reply = dns.signed(question("node1.fleet SOA"), &node);
    assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(reply.authorities.len(), 1, "by which nsupdate finds the zone");
    let reply = dns.signed(question("edge.fleet AAAA"), &node);
    assert_eq!(shown(&reply), "NOERROR edge.fleet AAAA fd0d::1");
    let stranger = rig::signer("node9.fleet", &[1; 32]);
    let (message, _) = signed(question("edge.fleet AAAA"), &stranger);
    assert_eq!(shown(&dns.exchange(&message)), "NOTAUTH");

    // A signature lifts no limit of a datagram.
    for (query, limit) in [
        (question("big.example.org A"), 512),
        (with_edns(question("big.example.org A"), 4096), 1232),
    ] {
        let (message, mut verifier) = signed(query, &node);
        let octets = dns.exchange_octets(&message.to_vec().expect("a message"));
        assert!(octets.len() <= limit, "{} octets", octets.len());
        verifier.verify(&octets).expect("it is signed");
        let reply = Message::from_vec(&octets).expect("a message");
        assert!(reply.metadata.truncation);
    }
    let (message, _) = signed(question("big.example.org A"), &node);
    let mut stream = dns.connect();
    write(&mut stream, &[message]);
    assert_eq!(read(&mut stream).expect("an answer").answers.len(), 100);
    let mut without_recursion = question("other.example.org A");
    without_recursion.metadata.recursion_desired = false;
    assert_eq!(shown(&dns.signed(without_recursion, &node)), "REFUSED");
}

#[test]
fn keys_are_made_used_and_taken_back() {
    let dns = Dns::start(&format!("{PREFIX}\n{ZONE}"));
    assert_eq!(dns.shows("node1.fleet AAAA"), "NXDOMAIN");
    let add = |node: &str| {
        dns.request(Request::AddKey {
            node: node.into(),
            algorithm: Algorithm::HmacSha256,
        })
    };
    dns.set_disk(Disk::Full);
    let Answer::Refused { message, .. } = add("node1") else {
        panic!("no disk, no key")
    };
    assert!(message.contains("no space left"), "{message}");
    dns.set_disk(Disk::Good);
    let Answer::Key { key, file } = add("node1") else {
        panic!("a key")
    };
    assert_eq!((key.name.as_str(), key.node.as_str()), ("node1.fleet.", "node1.fleet."));
    let signer = signer_of(&file);
    assert_eq!(
        shown(&dns.signed(update("node1.fleet 300 AAAA fd0d::11"), &signer)),
        "NOERROR"
    );
    assert_eq!(dns.shows("node1.fleet AAAA"), "NOERROR node1.fleet AAAA fd0d::11");
    let Answer::Keys { keys } = dns.request(Request::Keys) else {
        panic!("the keys")
    };
    assert_eq!(keys.len(), 1);
    assert!(keys[0].last_used.is_some());

    let Answer::Key { key: second, .. } = add("node1.fleet") else {
        panic!("a second key")
    };
    assert_ne!(second.name, key.name);
    for node in ["node1", "edge", "ns.fleet", "api", "fleet", "a_b", "x..y", ""] {
        assert!(matches!(add(node), Answer::Refused { .. }), "{node}");
    }
    let remove = |name: &str| dns.request(Request::RemoveKey { name: name.into() });
    let Answer::Removed { records, .. } = remove("node1") else {
        panic!("it is gone")
    };
    assert!(!records, "there is another key");
    assert_eq!(dns.shows("node1.fleet AAAA"), "NOERROR node1.fleet AAAA fd0d::11");
    let (message, _) = signed(update("delete node1.fleet AAAA"), &signer);
    assert_eq!(
        shown(&dns.exchange(&message)),
        "NOTAUTH",
        "what it signs is no longer good"
    );
    dns.set_disk(Disk::Full);
    assert!(matches!(remove(&second.name), Answer::Refused { .. }));
    assert_eq!(dns.status().keys, 1, "it stays in force");
    dns.set_disk(Disk::Good);
    let Answer::Removed { records, .. } = remove(&second.name) else {
        panic!("it is gone")
    };
    assert!(records, "the last key takes the records with it");
    assert_eq!(dns.shows("node1.fleet AAAA"), "NXDOMAIN");
    assert!(matches!(remove("node1"), Answer::Refused { .. }));
    let memory = dns.memory();
    assert!(memory.keys.iter().next().is_none());
    assert!(memory.zones.values().all(|state| state.nodes.is_empty()));
    assert!(matches!(
        dns.kept().as_slice(),
        [Durable::Key(_), Durable::Zone(_), Durable::Key(_), ..]
    ));
}

#[test]
fn an_operator_sees_why_an_answer_is_what_it_is() {
    let upstream = Upstream::start(|name, kind| match kind {
        RecordType::A => say(&format!("{name} 300 A 198.51.100.1")),
        RecordType::AAAA => nothing(),
        _ => fail(),
    });
    let dns = Dns::start(&format!("{PREFIX}\n{}\n{ZONE}", upstream.line()));
    let fresh = dns.query("www.example.org", "aaaa", false);
    assert_eq!((fresh.source.as_str(), fresh.answers.len()), ("synthesised", 1));
    dns.ask("www.example.org AAAA");
    let known = dns.query("WWW.example.org", "AAAA", false);
    assert_eq!(known.source, "cache");
    assert_eq!(known.answers[0].data, "2001:db8:64::c633:6401");
    let traced = dns.query("www.example.org", "AAAA", true);
    assert_eq!(traced.source, "synthesised");
    let steps: Vec<&str> = traced.steps.iter().map(|step| step.text.as_str()).collect();
    assert!(
        steps.iter().any(|step| step.contains("made of the A records")),
        "{steps:?}"
    );
    assert!(
        steps.iter().any(|step| step.starts_with("asking for www.example.org")),
        "{steps:?}"
    );
    let own = dns.query("fd0d::1", "AAAA", true);
    assert_eq!((own.source.as_str(), own.kind.as_str()), ("zone", "PTR"));
    assert_eq!(own.answers[0].data, "edge.fleet.");
    let failed = dns.query("www.example.org", "TXT", true);
    assert_eq!(failed.code, "SERVFAIL", "{failed:?}");
    let refused = |name: &str, kind: &str| {
        let request = Request::Query {
            name: name.into(),
            kind: kind.into(),
            trace: false,
        };
        matches!(dns.request(request), Answer::Refused { .. })
    };
    assert!(refused("www.example.org", "NONSENSE"));
    assert!(refused("a..b", "A"));
    assert!(refused("www.example.org", "TXT"));

    let flush = |name: Option<&str>, below| {
        let request = Request::Flush {
            name: name.map(Into::into),
            below,
        };
        match dns.request(request) {
            Answer::Flushed { answers } => answers,
            other => panic!("{other:?}"),
        }
    };
    dns.ask("a.example.org A");
    assert_eq!(flush(Some("example.org"), false), 0);
    assert_eq!(flush(Some("WWW.example.org."), false), 1);
    assert_eq!(flush(Some("example.org"), true), 1);
    dns.ask("a.example.org A");
    assert!(flush(None, false) >= 1);
    assert_eq!(dns.status().cache.entries, 0);
    let Answer::Zones { zones } = dns.request(Request::Zones { name: None }) else {
        panic!("the zones")
    };
    assert_eq!(
        zones.iter().map(|zone| zone.name.as_str()).collect::<Vec<_>>(),
        ["fleet.", "0.0.0.0.0.0.0.0.0.0.0.0.d.0.d.f.ip6.arpa."]
    );
    assert!(
        zones[0]
            .records
            .iter()
            .any(|record| record.name == "edge.fleet." && record.data == "fd0d::1")
    );
}

#[test]
fn a_reload_takes_effect_at_once_and_loses_no_question() {
    let upstream = Upstream::start(|name, kind| match kind {
        RecordType::A => after(30, say(&format!("{name} 300 A 198.51.100.1"))),
        _ => after(30, nothing()),
    });
    let mut memory = Memory::default();
    let node = keyed("node1", &mut memory);
    let text = |prefix: &str| format!("prefixes = [\"{prefix}\"]\n{}\n{ZONE}", upstream.line());
    let dns = Dns::start_with(&text("2001:db8:64::/96"), memory);
    assert_eq!(
        shown(&dns.signed(update("node1.fleet 300 AAAA fd0d::11"), &node)),
        "NOERROR"
    );
    assert_eq!(
        dns.shows("www.example.org AAAA"),
        "NOERROR www.example.org AAAA 2001:db8:64::c633:6401"
    );
    let address = dns.address;
    let asking = background(move || {
        let client = client(address);
        let mut stream = TcpStream::connect(address).expect("a connection");
        stream.set_read_timeout(Some(SOON)).expect("a timeout");
        for i in 0..60 {
            let query = question(&format!("n{i}.example.org AAAA"));
            client.send(&query.to_vec().expect("a query")).expect("sent");
            write(&mut stream, &[question(&format!("t{i}.example.org AAAA"))]);
            let reply = Message::from_vec(&received(&client)).expect("a message");
            assert_eq!(reply.metadata.id, query.metadata.id);
            assert_eq!(reply.answers.len(), 1, "{}", shown(&reply));
            assert_eq!(read(&mut stream).expect("an answer").answers.len(), 1);
        }
    });
    for round in 1..=10 {
        let prefix = format!("2001:db8:{round}::/96");
        dns.reload(&[dns.address], Opened::default(), &text(&prefix))
            .expect("good");
        let expected = format!("NOERROR www.example.org AAAA 2001:db8:{round}::c633:6401");
        assert_eq!(dns.shows("www.example.org AAAA"), expected);
        assert_eq!(dns.shows("node1.fleet AAAA"), "NOERROR node1.fleet AAAA fd0d::11");
    }
    asking.recv_timeout(SOON * 3).expect("every question has its answer");

    let (added, opened) = sockets();
    dns.reload(&[dns.address, added], opened, &text("2001:db8:64::/96"))
        .expect("good");
    let on = client(added);
    on.send(&question("edge.fleet AAAA").to_vec().expect("a query"))
        .expect("sent");
    assert_eq!(
        shown(&Message::from_vec(&received(&on)).expect("a message")),
        "NOERROR edge.fleet AAAA fd0d::1"
    );
    let mut stream = TcpStream::connect(added).expect("a connection");
    write(&mut stream, &[question("edge.fleet AAAA")]);
    assert!(read(&mut stream).is_some());
    let before = dns.status().udp.received;
    dns.reload(&[dns.address], Opened::default(), &text("2001:db8:64::/96"))
        .expect("good");
    wait("the removed listener refuses", || TcpStream::connect(added).is_err());
    assert!(read(&mut stream).is_none(), "what it accepted ends");
    wait("so does its UDP socket", || std::net::UdpSocket::bind(added).is_ok());
    assert!(dns.status().udp.received >= before, "counts stay");
    assert_eq!(dns.shows("edge.fleet AAAA"), "NOERROR edge.fleet AAAA fd0d::1");
}

#[test]
fn a_reload_that_cannot_be_changes_nothing() {
    let upstream = Upstream::start(|name, _| say(&format!("{name} 300 A 198.51.100.1")));
    let dns = Dns::start(&format!("{}\n{ZONE}", upstream.line()));
    let bad = "upstreams = [\"tls://127.0.0.1#dns.example.org\"]\nca_file = \"/nowhere\"";
    let why = dns
        .reload(&[dns.address], Opened::default(), bad)
        .expect_err("no certificates");
    assert!(!why.is_empty());
    assert_eq!(dns.shows("www.example.org A"), "NOERROR www.example.org A 198.51.100.1");
    assert_eq!(dns.shows("edge.fleet AAAA"), "NOERROR edge.fleet AAAA fd0d::1");
}

#[test]
fn a_zone_that_goes_and_comes_back_has_its_nodes_and_its_serial() {
    let mut memory = Memory::default();
    let node = keyed("node1", &mut memory);
    let dns = Dns::start_with(ZONE, memory);
    assert_eq!(
        shown(&dns.signed(update("node1.fleet 300 AAAA fd0d::11"), &node)),
        "NOERROR"
    );
    let serial = dns.status().zones[0].serial;
    let other = ZONE.replace("fleet", "other").replace("fd0d:", "fd0e:");
    dns.reload(&[dns.address], Opened::default(), &other).expect("good");
    assert_ne!(dns.shows("node1.fleet AAAA"), "NOERROR node1.fleet AAAA fd0d::11");
    dns.reload(&[dns.address], Opened::default(), ZONE).expect("good");
    assert_eq!(dns.shows("node1.fleet AAAA"), "NOERROR node1.fleet AAAA fd0d::11");
    assert_eq!(dns.status().zones[0].serial, serial);
}

#[test]
fn before_it_ends_it_answers_what_it_took() {
    let upstream = Upstream::start(|name, _| after(300, say(&format!("{name} 300 A 198.51.100.1"))));
    let mut memory = Memory::default();
    let node = keyed("node1", &mut memory);
    let dns = Dns::start_with(&format!("{}\n{ZONE}", upstream.line()), memory);
    let clients: Vec<_> = (0..200).map(|_| dns.client()).collect();
    for (i, client) in clients.iter().enumerate() {
        let query = question(&format!("n{i}.example.org A")).to_vec().expect("a query");
        client.send(&query).expect("sent");
    }
    let mut streams: Vec<TcpStream> = (0..20).map(|_| dns.connect()).collect();
    for (i, stream) in streams.iter_mut().enumerate() {
        write(stream, &[question(&format!("t{i}.example.org A"))]);
    }
    dns.set_disk(Disk::Slow);
    let updating: Vec<_> = (11..15).map(|_| dns.client()).collect();
    for (i, client) in updating.iter().enumerate() {
        let (message, _) = signed(update(&format!("node1.fleet 300 AAAA fd0d::1{i}")), &node);
        client.send(&message.to_vec().expect("a message")).expect("sent");
    }
    dns.wait("all is taken", |status| {
        status.udp.received == 204 && status.tcp.received == 20
    });
    wait("the first update is on its way to the disk", || dns.waiting() == 1);
    dns.tell(Command::Stop { grace: SOON });
    for client in clients {
        let reply = Message::from_vec(&received(&client)).expect("a message");
        assert_eq!(reply.answers.len(), 1);
    }
    for mut stream in streams {
        assert_eq!(read(&mut stream).expect("an answer").answers.len(), 1);
        assert!(read(&mut stream).is_none(), "then it ends");
    }
    dns.set_disk(Disk::Good);
    dns.disk_done();
    for client in updating {
        let reply = Message::from_vec(&received(&client)).expect("a message");
        assert_eq!(shown(&reply), "NOERROR");
    }
    assert_eq!(dns.kept().len(), 4);
}

#[test]
fn a_thread_of_mutated_messages_does_not_harm_it() {
    let upstream = Upstream::start(|name, kind| match kind {
        RecordType::A if name == "www.example.org" => say("www.example.org 300 A 198.51.100.1"),
        _ => nothing(),
    });
    let mut memory = Memory::default();
    let node = keyed("node1", &mut memory);
    let dns = Dns::start_with(
        &format!("{PREFIX}\n{}\n{ZONE}\n[rate_limit]\nsame = 0\nall = 0", upstream.line()),
        memory,
    );
    let (registration, _) = signed(update("node1.fleet 300 AAAA fd0d::11"), &node);
    let (asked, _) = signed(question("edge.fleet AAAA"), &node);
    let seeds: Vec<Vec<u8>> = [with_edns(question("www.example.org AAAA"), 1232), registration, asked]
        .iter()
        .map(|message| message.to_vec().expect("a message"))
        .collect();
    let noise = dns.client();
    let mut random = 1_u64;
    let mut next = || {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(random >> 33).expect("small")
    };
    for round in 0..20_000 {
        let mut message = seeds[round % seeds.len()].clone();
        for _ in 0..1 + next() % 4 {
            let at = next() % message.len();
            message[at] = u8::try_from(next() & 0xff).expect("an octet");
        }
        message.truncate(message.len() - if next() % 4 == 0 { next() % message.len() } else { 0 });
        let _ = noise.send(&message);
        if round % 500 == 0 {
            // Behind so much noise it may find the socket full, and is asked again, as a client does.
            let good = dns.client();
            good.set_read_timeout(Some(SOON / 5)).expect("a timeout");
            let mut octets = [0; 4096];
            let answer = (0..5).find_map(|_| {
                good.send(&question("www.example.org AAAA").to_vec().expect("a query"))
                    .expect("sent");
                good.recv(&mut octets).ok()
            });
            let answer = Message::from_vec(&octets[..answer.expect("an answer")]).expect("a message");
            let expected = "NOERROR www.example.org AAAA 2001:db8:64::c633:6401";
            assert_eq!(shown(&answer), expected);
        }
    }
    // A mutation may be none, or one of the id, which is not signed.
    for kept in dns.kept() {
        let Durable::Zone(change) = kept else {
            panic!("{kept:?}")
        };
        assert_eq!(
            (change.node.to_string().as_str(), change.records.len()),
            ("node1.fleet.", 1)
        );
    }
    assert!(dns.kept().len() <= 1);
}

#[test]
fn a_reload_about_something_else_keeps_what_is_known_and_whom_upstreams_are() {
    let upstream = Upstream::start(|name, _| say(&format!("{name} 300 A 198.51.100.1")));
    let text = |more: &str| format!("{}\n{more}", upstream.line());
    let dns = Dns::start(&text(""));
    assert_eq!(dns.shows("www.example.org A"), "NOERROR www.example.org A 198.51.100.1");
    let of = |counts: &[(String, u64)], name: &str| {
        let found = counts.iter().find(|(counted, _)| counted == name);
        found.map_or(0, |(_, count)| *count)
    };
    let count = |status: &Status| of(&status.upstreams[0].servers[0].counts, "good");
    let (asked, good) = (upstream.asked().len(), count(&dns.status()));
    for more in ["", "stale = \"2d\"", "rate_limit = { same = 0 }", ""] {
        dns.reload(&[dns.address], Opened::default(), &text(more))
            .expect("good");
        // Another `stale` is another cache; the upstream is the same.
        assert!(count(&dns.status()) >= good, "{more}");
    }
    let after = upstream.asked().len();
    assert_eq!(after, asked, "{:?}", upstream.asked());
    assert_eq!(dns.shows("www.example.org A"), "NOERROR www.example.org A 198.51.100.1");
    let known = upstream.asked().len();
    dns.reload(&[dns.address], Opened::default(), &text("rate_limit = { same = 7 }"))
        .expect("good");
    assert_eq!(dns.shows("www.example.org A"), "NOERROR www.example.org A 198.51.100.1");
    assert_eq!(upstream.asked().len(), known, "it is known still");
    dns.reload(
        &[dns.address],
        Opened::default(),
        &text("exclude_a = [\"203.0.113.0/24\"]"),
    )
    .expect("good");
    assert_eq!(dns.shows("www.example.org A"), "NOERROR www.example.org A 198.51.100.1");
    assert!(upstream.asked().len() > known, "answers may be others");
    assert!(count(&dns.status()) > good, "and the upstream is still the same");
}

#[test]
fn who_asks_for_dead_names_without_end_keeps_nobody_else_from_being_answered() {
    let upstream = Upstream::start(|name, _| {
        if name.ends_with("dead.example.org") {
            Reaction::Silence
        } else {
            say(&format!("{name} 300 A 198.51.100.1"))
        }
    });
    let dns = Dns::start(&format!("{}\n{ZONE}", upstream.line()));
    let greedy = dns.client();
    for number in 0..600 {
        let query = question(&format!("n{number}.dead.example.org A"));
        greedy.send(&query.to_vec().expect("a query")).expect("sent");
        if number % 50 == 49 {
            dns.wait("they came", |status| status.udp.misses + status.udp.dropped > number);
        }
    }
    let refused = Message::from_vec(&received(&greedy)).expect("a message");
    assert_eq!(refused.metadata.response_code, ResponseCode::ServFail);
    dns.wait("it is told so", |status| {
        status.resolved.iter().any(|(name, _)| name == "busy")
    });
    // What is answered here takes none of its places, and other addresses have their own.
    let query = question("edge.fleet AAAA").to_vec().expect("a query");
    let other = std::net::UdpSocket::bind("127.0.0.2:0").expect("bound");
    other.connect(dns.address).expect("connected");
    other.set_read_timeout(Some(SOON)).expect("a timeout");
    other.send(&query).expect("sent");
    let reply = Message::from_vec(&received(&other)).expect("a message");
    assert_eq!(shown(&reply), "NOERROR edge.fleet AAAA fd0d::1");
}

#[test]
fn the_end_of_an_alias_grows_old_though_the_alias_is_ours() {
    let upstream = Upstream::start(|name, _| say(&format!("{name} 300 A 198.51.100.1")));
    let dns = Dns::start(&format!(
        "{}\n{ZONE}\naliases = {{ www = \"cdn.example.net.\" }}",
        upstream.line()
    ));
    let ttl = || dns.ask("www.fleet A").answers.last().expect("an address").ttl;
    assert_eq!(ttl(), 300);
    wait("its TTL counts down", || ttl() < 300);
    assert_eq!(dns.ask("edge.fleet AAAA").answers[0].ttl, 1800);
}

#[test]
fn when_few_places_are_left_idle_connections_end_at_once() {
    let dns = Dns::start(ZONE);
    let connect = |last: u8| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        let source = std::net::SocketAddr::from(([127, 0, 0, last], 0));
        socket.bind(&source.into()).expect("bound");
        socket.connect(&dns.address.into()).expect("connected");
        socket
    };
    let streams: Vec<_> = (2..15).flat_map(|last| [last; 30]).map(connect).collect();
    dns.wait("some have ended, long before their time", |status| {
        status.tcp.accepted >= streams.len() as u64 && status.tcp.open <= 384
    });
    assert_eq!(dns.status().tcp.turned_away, 0);
}

#[test]
fn a_key_of_a_zone_that_is_gone_can_be_removed_and_its_records_do_not_come_back() {
    let mut memory = Memory::default();
    let node = keyed("node1", &mut memory);
    let dns = Dns::start_with(ZONE, memory);
    let said = dns.signed(update("node1.fleet 300 AAAA fd0d::11"), &node);
    assert_eq!(shown(&said), "NOERROR");
    let other = ZONE.replace("fleet", "other").replace("fd0d:", "fd0e:");
    dns.reload(&[dns.address], Opened::default(), &other).expect("good");
    let name = match dns.request(Request::Keys) {
        Answer::Keys { keys } => keys[0].name.clone(),
        other => panic!("{other:?}"),
    };
    let Answer::Removed { records, node, .. } = dns.request(Request::RemoveKey { name }) else {
        panic!("it is removed")
    };
    assert_eq!((records, node.as_str()), (true, "node1.fleet."));
    dns.reload(&[dns.address], Opened::default(), ZONE).expect("good");
    assert_eq!(dns.shows("node1.fleet AAAA"), "NXDOMAIN");
}
