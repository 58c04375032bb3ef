//! What strangers, spoofers and broken clients can make the resolver do, and what is left for the others meanwhile.
//!
//! ```text
//! client, flood, victim, stranger ── hub ── edge: edged [fd00::10]:53 ── cp1: the upstream [fd00::11]:53
//! ```
//! Octets are counted by nft in the edge's namespace, IP headers included.

use std::{
    fs,
    io::{self, Read},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Socket, Type};
use tests::{
    Edge, Node, World,
    edge::find,
    nameserver::{self, A, AAAA, Data, Nameserver, Query, TXT, query, with_edns},
    wait_until,
};

const PATIENCE: Duration = Duration::from_secs(5);
const DNS: u16 = 53;

#[test]
fn strangers_get_not_one_octet_by_udp_and_by_tcp_no_more_than_they_send() -> Result<()> {
    let rig = Rig::start("")?;
    // Beside everything that is allowed, the IPv4 network of the same nodes.
    let stranger = rig.world.lab.node("stranger", 66)?;
    let source: IpAddr = "fd00:0:0:100::66".parse()?;
    rig.lodge(&stranger, "fd00:0:0:100::/64")?;
    let counters = Counters::new(&rig.world.edge, source)?;
    let socket = nameserver::socket(&stranger, Some(source), rig.front())?;
    let update = {
        let mut bytes = query(9, "example.org", 6);
        bytes[2] = 5 << 3;
        bytes
    };
    let messages = [
        query(1, "big.example.org", TXT),
        query(2, "known.example.org", A),
        query(3, "known.example.org", 255),
        with_edns(query(4, "known.example.org", AAAA), &[7; 8]),
        with_edns(query(5, "known.example.org", A), &[7; 24]),
        query(6, ".", 252),
        signed(query(7, "big.example.org", TXT), 250),
        signed(query(8, "big.example.org", TXT), 24),
        update,
        vec![0; 12],
        vec![0xff; 1400],
        b"\x12\x34\x10\0\0\0\0\0\0\0\0\0".to_vec(),
    ];
    // One of them is no query, and is told apart before anybody looks who sent it.
    let seen = || -> Result<u64> { Ok(rig.udp("denied")? + rig.udp("ignored")?) };
    let (each, before) = (500, seen()?);
    let mut sent = 0;
    for _ in 0..each {
        for message in &messages {
            socket.send(message)?;
            sent += 1;
        }
        rig.drained()?;
    }
    wait_until("the resolver has seen all of them", PATIENCE, || {
        seen().is_ok_and(|seen| seen >= before + sent)
    })
    .with_context(|| {
        format!(
            "{sent} sent, octets {:?}, {:?}",
            counters.udp(),
            rig.edge.json(&["dns", "status"])
        )
    })?;
    let (received, replied) = counters.udp()?;
    println!("{sent} datagrams of a stranger, {received} octets: {replied} octets back");
    ensure!(replied == 0, "{replied} octets");
    ensure!(received > 0, "the counters count");

    let (mut refused, mut ended) = (0, 0);
    for _ in 0..20 {
        for message in &messages {
            let mut stream = connect(&stranger, source, rig.front())?;
            nameserver::write_message(&mut stream, message)?;
            let mut octets = Vec::new();
            // It ends by itself, one answer or none later.
            let _ = stream.read_to_end(&mut octets);
            match octets.get(2..).and_then(nameserver::Reply::of) {
                Some(reply) => {
                    ensure!(reply.code == 5 && reply.answers == 0, "{message:x?}: {reply:?}");
                    ensure!(octets.len() <= message.len() + 2 + 28, "{message:x?}: {octets:x?}");
                    refused += 1;
                }
                None => {
                    ensure!(octets.is_empty(), "{octets:x?}");
                    ended += 1;
                }
            }
        }
    }
    let (received, replied) = counters.tcp()?;
    println!(
        "{} connections of a stranger: {refused} REFUSED, {ended} ended without a word, {received} octets in, {replied} out",
        refused + ended
    );
    ensure!(refused >= 100, "{refused} were refused");
    ensure!(replied <= received, "{replied} octets for {received}");
    rig.is_well()
}

/// Queries of one spoofed flood, at least.
const FLOOD: u64 = 60_000;

#[test]
fn a_spoofed_flood_is_not_amplified_and_good_clients_with_cookie_or_tcp_get_999_of_1000_answers() -> Result<()> {
    let (same, all) = (100, 1000);
    let rig = Rig::start(&format!("rate_limit = {{ same = {same}, all = {all}, burst = 1 }}"))?;
    let (flood, victim) = (rig.world.lab.node("flood", 66)?, rig.world.lab.node("victim", 67)?);
    // The victim shares its /56 with the good clients: the worst case for them.
    let source: IpAddr = "fd00:0:0:7::67".parse()?;
    rig.lodge(&victim, "fd00:0:0:7::/64")?;
    may_lie(&flood, "fd00:0:0:7::/64")?;
    let cases = [
        (
            "one question, 1,100 octets of text",
            query(1, "big.example.org", TXT),
            false,
        ),
        (
            "the same with EDNS and a cookie that is not ours",
            with_edns(query(1, "big.example.org", TXT), &[9; 24]),
            false,
        ),
        (
            "a signature of a key that nobody knows",
            signed(query(1, "big.example.org", TXT), 250),
            false,
        ),
        (
            "a public-key signature",
            signed(query(1, "big.example.org", TXT), 24),
            false,
        ),
        ("a thousand questions", query(1, "big000.example.org", TXT), true),
    ];
    for (what, message, varied) in cases {
        let message = if message[11] == 0 {
            with_edns(message, &[])
        } else {
            message
        };
        let good = Good::start(&rig)?;
        let counters = Counters::new(&rig.world.edge, source)?;
        let begin = Instant::now();
        let sent = spoof(&rig, &flood, source, &message, varied)? as f64;
        let took = begin.elapsed();
        let (received, replied) = counters.udp()?;
        let report = good.stop()?;
        let seconds = took.as_secs_f64() + 1.0;
        println!(
            "{what}: {sent} spoofed queries in {:.1} s, {received} octets in, {replied} out ({:.2} for one); {report}",
            took.as_secs_f64(),
            replied as f64 / received as f64
        );
        // Those within the limit at full size; of the others every second is answered, no longer than the question with the
        // cookie that brings a real client back.
        let limit = f64::from(if varied { all } else { same }) * seconds * 1300.0;
        let slips = sent / 2.0 * (48.0 + message.len() as f64 + 28.0);
        let bound = if varied {
            limit.min(sent * 1300.0) + slips
        } else {
            limit + slips
        };
        ensure!(
            replied as f64 <= bound,
            "{what}: {replied} octets out, at most {bound:.0}"
        );
        report.check().with_context(|| what)?;
    }
    rig.is_well()
}

/// Lets `node` send from every address of `network`.
fn may_lie(node: &Node, network: &str) -> Result<()> {
    node.netns().ip(&format!("route add local {network} dev lo"))?;
    // The kernel hears for them now, but would not let a socket have one.
    node.enter(|| fs::write("/proc/sys/net/ipv6/ip_nonlocal_bind", "1"))?;
    Ok(())
}

/// Sends the flood, as fast as the resolver takes it and until it has taken [`FLOOD`] queries: what is dropped at its socket
/// proves nothing. How many were sent.
fn spoof(rig: &Rig, flood: &Node, source: IpAddr, message: &[u8], varied: bool) -> Result<u64> {
    let socket = nameserver::socket(flood, Some(source), rig.front())?;
    let before = rig.udp("received")?;
    let mut message = message.to_vec();
    let mut sent = 0;
    while sent < FLOOD || rig.udp("received")? < before + FLOOD {
        ensure!(sent < 2 * FLOOD, "the resolver takes too little of the flood");
        for _ in 0..200 {
            sent += 1;
            message[..2].copy_from_slice(&(sent as u16).to_be_bytes());
            if varied {
                message[16..19].copy_from_slice(format!("{:03}", sent % 1000).as_bytes());
            }
            // A full buffer is the kernel's to empty.
            let _ = socket.send(&message);
        }
        // At most 40,000 a second.
        thread::sleep(Duration::from_millis(5));
        rig.drained()?;
    }
    Ok(sent)
}

/// Messages of the great flood.
const MUTATED: u64 = 1_000_000;
/// Threads that send them, each by UDP and TCP.
const MUTATORS: u64 = 2;
/// One in so many goes by TCP.
const BY_TCP: u64 = 10;

#[test]
fn a_million_mutated_messages_crash_nothing_and_good_queries_are_answered_meanwhile() -> Result<()> {
    let rig =
        Rig::start("cache_mib = 16\nrate_limit = { same = 0, all = 0 }\n[[dns64.zone]]\nprefixes = [\"fd00::/64\"]")?;
    let worker = rig.edge.worker("dns64")?;
    let good = Good::start(&rig)?;
    wait_until("good clients are answered", PATIENCE, || good.answered() >= 300)?;
    let before = rig.edge.pss_kib()?;
    let received = rig.udp("received")?;
    let begin = Instant::now();
    let replies = thread::scope(|scope| {
        let mutators: Vec<_> = (1..=MUTATORS)
            .map(|seed| {
                let rig = &rig;
                scope.spawn(move || mutate(rig, seed))
            })
            .collect();
        mutators
            .into_iter()
            .map(|mutator| mutator.join().expect("no panic"))
            .sum::<Result<u64>>()
    })?;
    let took = begin.elapsed();
    let seen = rig.udp("received")? - received;
    let report = good.stop()?;
    let after = rig.edge.pss_kib()?;
    println!(
        "{MUTATED} mutated messages in {:.1} s ({seen} datagrams seen, {replies} replies read); {report}; memory {before} KiB \
         before, {after} KiB after",
        took.as_secs_f64()
    );
    ensure!(rig.edge.worker("dns64")? == worker, "the same worker");
    report.check()?;
    // Most of those by UDP have really been looked at.
    ensure!(seen >= MUTATED * 8 / 10, "{seen} datagrams");
    // The cache's 16 MiB, and as much again for what is under way and what the allocator keeps.
    ensure!(after <= before + 40 * 1024, "{before} KiB before, {after} KiB after");
    rig.is_well()
}

/// The same sequence for the same seed, so that a finding can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    /// Below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        self.next() as usize % end
    }
}

/// Sends its share of mutated messages; how many replies came.
fn mutate(rig: &Rig, seed: u64) -> Result<u64> {
    let socket = nameserver::socket(&rig.world.client, None, rig.front())?;
    let good = [
        with_edns(query(1, "www.known.example.org", AAAA), &[7; 8]),
        with_edns(query(1, "known.example.org", A), &[]),
        query(1, "a.b.c.d.e.f.example.org", AAAA),
        query(1, "1.2.0.192.in-addr.arpa", 12),
        query(1, "ipv4only.arpa", AAAA),
        query(1, "edge.fleet", 255),
        signed(query(1, "fleet", 6), 250),
        update(),
        signed(update(), 250),
    ];
    let mut random = Random(seed);
    let mut stream = None;
    let mut replies = 0;
    let mut bytes = [0; 65_536];
    socket.set_nonblocking(true)?;
    for number in 0..MUTATED / MUTATORS {
        let mut message = good[random.below(good.len())].clone();
        for _ in 0..random.below(6) {
            let at = random.below(message.len());
            match random.below(4) {
                0 => message[at] = random.next() as u8,
                1 => message[at] ^= 1 << random.below(8),
                2 => message.insert(at, random.next() as u8),
                _ => drop(message.remove(at)),
            }
        }
        if random.below(8) == 0 {
            message.truncate(random.below(message.len() + 1));
        }
        if random.below(64) == 0 {
            message.resize(random.below(4000), 0xc0);
        }
        if number % BY_TCP == 0 {
            // Any message may end a connection.
            let way = match stream.take() {
                Some(way) => way,
                None => connect(&rig.world.client, rig.world.client.ip(), rig.front())?,
            };
            stream = by_tcp(way, &message, random.below(200) == 0);
        } else {
            let _ = socket.send(&message);
        }
        while socket.recv(&mut bytes).is_ok() {
            replies += 1;
        }
        if number % 64 == 0 {
            // The resolver's thread for this socket answers this one after it has looked at all before.
            step(rig, &socket, &mut bytes, &mut replies)?;
        }
    }
    Ok(replies)
}

/// Waits until the resolver has seen what this socket sent.
fn step(rig: &Rig, socket: &UdpSocket, bytes: &mut [u8], replies: &mut u64) -> Result<()> {
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    // A name in which the answer is recognised, and which no mutation can be.
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed) % 1000;
    let message = query(0xabcd, &format!("step-{serial}.known.example.org"), A);
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    'sends: for _ in 0..5 {
        socket.send(&message)?;
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(1) {
            let Ok(length) = socket.recv(bytes) else {
                continue 'sends;
            };
            *replies += 1;
            if bytes[..length].get(12..message.len()) == Some(&message[12..]) {
                socket.set_nonblocking(true)?;
                return Ok(());
            }
        }
    }
    anyhow::bail!("no answer in five seconds: {}", rig.edge.log())
}

/// Sends one message by TCP, and hands the connection back unless it is to end.
fn by_tcp(mut stream: TcpStream, message: &[u8], end: bool) -> Option<TcpStream> {
    nameserver::write_message(&mut stream, message).ok()?;
    // What has come so far: who does not read is cut off, which is not what is tried here.
    stream.set_nonblocking(true).ok()?;
    let mut bytes = [0; 65_536];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return None,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(_) => return None,
        }
    }
    stream.set_nonblocking(false).ok()?;
    (!end).then_some(stream)
}

/// An UPDATE of `fleet` that adds an address.
fn update() -> Vec<u8> {
    let mut message = query(1, "fleet", 6);
    message[2] = 5 << 3;
    message[9] = 1;
    message.extend(b"\x04node\xc0\x0c\0\x1c\0\x01\0\0\x07\x08\0\x10");
    message.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x77]);
    message
}

/// The message with a record of this type, TSIG or SIG, that makes it look signed.
fn signed(mut message: Vec<u8>, kind: u8) -> Vec<u8> {
    message[11] += 1;
    message.extend(b"\x03key\0");
    message.extend([0, kind, 0, 255, 0, 0, 0, 0]);
    let mut data = b"\x0bhmac-sha256\0".to_vec();
    data.extend([0, 0, 0x68, 0, 0, 0, 1, 44, 0, 32]);
    data.extend([5; 32]);
    data.extend([0, 1, 0, 0, 0, 0]);
    message.extend((data.len() as u16).to_be_bytes());
    message.extend(data);
    message
}

/// Clients that do as they should: one that keeps its cookie, and asks once more as every resolver does, and one by TCP. Each
/// asks every few milliseconds.
struct Good {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    threads: Vec<(&'static str, thread::JoinHandle<Result<Tally>>)>,
}

#[derive(Debug, Default)]
struct Tally {
    asked: u64,
    answered: u64,
    /// The slowest answer.
    slowest: Duration,
}

#[derive(Debug)]
struct Tallies(Vec<(&'static str, Tally)>);

impl Good {
    fn start(rig: &Rig) -> Result<Self> {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (front, client) = (rig.front(), rig.world.client.clone());
        let socket = nameserver::socket(&client, None, front)?;
        // A client that has been here before: no flood is on, so the first answer brings the cookie.
        let mut cookie = vec![3; 8];
        for _ in 0..100 {
            let asked = with_edns(query(1, "known.example.org", A), &cookie);
            if let Ok((reply, _)) = nameserver::ask(&socket, &asked, Duration::from_millis(100))
                && reply.cookie.len() == 24
            {
                cookie = reply.cookie;
                break;
            }
        }
        ensure!(cookie.len() == 24, "no cookie: {cookie:?}");
        let with_cookie = {
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            thread::spawn(move || {
                asking(&stop, &answered, |id| {
                    let asked = with_edns(query(id, "known.example.org", AAAA), &cookie);
                    let ask = || nameserver::ask(&socket, &asked, Duration::from_secs(2));
                    ask().or_else(|_| ask()).map(|(reply, _)| reply)
                })
            })
        };
        let mut stream = None;
        let by_tcp = {
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            thread::spawn(move || {
                asking(&stop, &answered, |id| {
                    // As many on one connection as a node may have to ask at once.
                    let mut way = match stream.take() {
                        Some(way) if id % 20 != 0 => way,
                        _ => connect(&client, client.ip(), front)?,
                    };
                    nameserver::write_message(&mut way, &query(id, "known.example.org", AAAA))?;
                    let reply = nameserver::Reply::of(&nameserver::read_message(&mut way)?);
                    stream = Some(way);
                    reply.ok_or_else(|| io::ErrorKind::InvalidData.into())
                })
            })
        };
        Ok(Self {
            stop,
            answered,
            threads: vec![("with cookie", with_cookie), ("by TCP", by_tcp)],
        })
    }

    fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Ends them, at the earliest after as many questions as make one in a thousand visible.
    fn stop(self) -> Result<Tallies> {
        wait_until("4000 good questions were answered", Duration::from_secs(60), || {
            self.answered() >= 4000 || self.threads.iter().any(|(_, thread)| thread.is_finished())
        })?;
        self.stop.store(true, Ordering::Relaxed);
        let mut tallies = Vec::new();
        for (what, thread) in self.threads {
            tallies.push((what, thread.join().expect("no panic").with_context(|| what)?));
        }
        Ok(Tallies(tallies))
    }
}

fn asking(
    stop: &AtomicBool,
    answered: &AtomicU64,
    mut ask: impl FnMut(u16) -> io::Result<nameserver::Reply>,
) -> Result<Tally> {
    let mut tally = Tally::default();
    let known: IpAddr = KNOWN_6.parse()?;
    while !stop.load(Ordering::Relaxed) {
        tally.asked += 1;
        let begin = Instant::now();
        if let Ok(reply) = ask(tally.asked as u16)
            && reply.addresses == [known]
        {
            tally.answered += 1;
            answered.fetch_add(1, Ordering::Relaxed);
            tally.slowest = tally.slowest.max(begin.elapsed());
        }
        // A pace and no wait for anything.
        thread::sleep(Duration::from_millis(1));
    }
    Ok(tally)
}

impl Tallies {
    fn check(&self) -> Result<()> {
        for (what, tally) in &self.0 {
            ensure!(
                (tally.asked - tally.answered) * 1000 <= tally.asked,
                "{what}: {} of {} answered",
                tally.answered,
                tally.asked
            );
        }
        Ok(())
    }
}

impl std::fmt::Display for Tallies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "good")?;
        for (what, tally) in &self.0 {
            let Tally {
                asked,
                answered,
                slowest,
            } = tally;
            write!(
                f,
                ", {what}: {answered} of {asked}, slowest {:.1} ms",
                tests::ms(*slowest)
            )?;
        }
        Ok(())
    }
}

struct Rig {
    socket: UdpSocket,
    edge: Edge,
    _upstream: Nameserver,
    world: World,
}

const KNOWN: &str = "192.0.2.1";
const KNOWN_6: &str = "2001:db8:64::c000:201";

impl Rig {
    fn start(keys: &str) -> Result<Self> {
        let world = World::alone(1)?;
        let upstream = Nameserver::start(&world.cp[0], DNS, |query| vec![answer(query).into()])?;
        let config = format!(
            "version = 1\n[dns64]\nlisten = [\"{}\"]\nprefixes = [\"2001:db8:64::/96\"]\nallow = [\"fd00::/59\"]\n\
             upstreams = [\"udp://{}\"]\n{keys}\n",
            world.edge.at(DNS),
            upstream.address
        );
        let edge = Edge::start(&world.edge, &config)?;
        let socket = nameserver::socket(&world.client, None, world.edge.at(DNS))?;
        let rig = Self {
            socket,
            edge,
            _upstream: upstream,
            world,
        };
        rig.is_well()?;
        Ok(rig)
    }

    fn front(&self) -> SocketAddr {
        self.world.edge.at(DNS)
    }

    /// Gives `node` a network of its own and the edge the way to it.
    fn lodge(&self, node: &Node, network: &str) -> Result<()> {
        may_lie(node, network)?;
        self.world
            .edge
            .netns()
            .ip(&format!("route add {network} via {}", node.ip()))
    }

    /// A count of datagrams.
    fn udp(&self, name: &str) -> Result<u64> {
        let status = self.edge.json(&["dns", "status"])?;
        let udp = find(&status, "udp").with_context(|| format!("{status}"))?;
        udp[name].as_u64().with_context(|| format!("no {name} in {udp}"))
    }

    /// Waits until nothing is left in the resolver's UDP sockets.
    fn drained(&self) -> Result<()> {
        let empty = || -> Option<bool> {
            let table = fs::read_to_string("/proc/thread-self/net/udp6").ok()?;
            // Columns two and five: the socket's address, and the octets that wait to be sent and to be read, in hexadecimal.
            let mut sockets = table.lines().filter_map(|line| {
                let mut fields = line.split_whitespace().skip(1);
                Some((fields.next()?, fields.nth(2)?))
            });
            Some(sockets.all(|(address, waiting)| !address.ends_with(":0035") || waiting.ends_with(":00000000")))
        };
        let edge = &self.world.edge;
        wait_until("the resolver takes what was sent", PATIENCE, || {
            edge.enter(empty) == Some(true)
        })?;
        Ok(())
    }

    fn is_well(&self) -> Result<()> {
        wait_until("a question is answered", PATIENCE, || {
            let asked = query(1, "known.example.org", AAAA);
            nameserver::ask(&self.socket, &asked, Duration::from_millis(500))
                .is_ok_and(|(reply, _)| reply.addresses == [KNOWN_6.parse::<IpAddr>().expect("an address")])
        })?;
        Ok(())
    }
}

fn answer(query: &Query) -> Vec<u8> {
    match query.kind {
        A => query.answer(&[Data::Ip(KNOWN.parse().expect("an address"))], 3600),
        TXT => query.answer(&[Data::Text(1100)], 3600),
        _ => query.answer(&[], 3600),
    }
}

fn connect(node: &Node, source: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let stream: TcpStream = node.enter(|| -> io::Result<TcpStream> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.bind(&SocketAddr::from((source, 0)).into())?;
        socket.connect_timeout(&to.into(), PATIENCE)?;
        Ok(socket.into())
    })?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Octets between the edge and one address, from the first packet of the counters' life.
struct Counters<'a> {
    edge: &'a Node,
    table: String,
}

impl<'a> Counters<'a> {
    fn new(edge: &'a Node, address: IpAddr) -> Result<Self> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let table = format!("octets{}", SERIAL.fetch_add(1, Ordering::Relaxed));
        let rule = |end: &str, protocol: &str, name: &str| {
            format!("ip6 {end} {address} meta l4proto {protocol} counter name {name}\n")
        };
        edge.netns().nft(&format!(
            "table inet {table} {{\ncounter udp_in {{}}\ncounter udp_out {{}}\ncounter tcp_in {{}}\ncounter tcp_out {{}}\n\
             chain in {{ type filter hook input priority 0; policy accept;\n{}{}}}\n\
             chain out {{ type filter hook output priority 0; policy accept;\n{}{}}}\n}}\n",
            rule("saddr", "udp", "udp_in"),
            rule("saddr", "tcp", "tcp_in"),
            rule("daddr", "udp", "udp_out"),
            rule("daddr", "tcp", "tcp_out"),
        ))?;
        Ok(Self { edge, table })
    }

    /// Octets in and out.
    fn udp(&self) -> Result<(u64, u64)> {
        Ok((self.read("udp_in")?, self.read("udp_out")?))
    }

    /// As [`Self::udp`].
    fn tcp(&self) -> Result<(u64, u64)> {
        Ok((self.read("tcp_in")?, self.read("tcp_out")?))
    }

    fn read(&self, name: &str) -> Result<u64> {
        let mut nft = self.edge.command("nft");
        nft.args(["-j", "list", "counter", "inet", &self.table, name]);
        let said = tests::edge::say(&mut nft, PATIENCE)?;
        let shown: serde_json::Value = serde_json::from_str(&said.out).with_context(|| format!("{said}"))?;
        find(&shown, "bytes")
            .and_then(serde_json::Value::as_u64)
            .with_context(|| format!("{said}"))
    }
}
