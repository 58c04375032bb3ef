//! Who may connect and how much, and what is left for the others when thousands take all they can.
//!
//! ```text
//! client, c1 to c4 ── hub ── edge: edged [fd00::10]:6443 and 10.0.0.10:6443 ── cp1: an echo
//! ```

use std::{
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Resource, Rlimit, getrlimit, setrlimit},
    time::Timespec,
};
use socket2::{Domain, Socket, Type};
use tests::{
    Edge, Node, World,
    backend::{Script, is_reset},
    edge::find,
    load::{Load, Session},
    ms,
    process::{descriptors, processor_time},
    stall::{Witness, again},
    tls::{read_line, read_some},
    wait_for, wait_until,
    world::PORT,
};

const PATIENCE: Duration = Duration::from_secs(5);

#[test]
fn a_frontend_holds_as_many_sessions_as_its_limit_says_and_the_next_is_reset() -> Result<()> {
    let world = World::new(1)?;
    let backend = world.backend(0, Script::Echo)?;
    let edge = Edge::start(&world.edge, &world.config("[lb.frontend.limits]\nsessions = 50"))?;
    let mut sessions: Vec<Session> = (0..50)
        .map(|_| Session::open(&world.client, world.front(), PATIENCE))
        .collect::<io::Result<_>>()?;
    for front in [world.front(), world.edge.at4(PORT)] {
        let error = Session::open(&world.client, front, PATIENCE).expect_err("the 51st");
        assert!(is_reset(&error), "{front}: {error}");
    }
    assert_eq!(backend.accepted().len(), 50, "the backend hears nothing of those");
    for session in &mut sessions {
        session.echo()?;
    }
    assert!(turned_away(&edge, "sessions")? >= 2, "{}", edge.status()?);
    ensure!(edge.log().contains("reason=sessions"), "{}", edge.log());

    sessions.truncate(40);
    wait_until("ten sessions end", PATIENCE, || backend.live() == 40)?;
    for _ in 0..10 {
        sessions.push(opened(&world.client, world.front())?);
    }
    Session::open(&world.client, world.front(), PATIENCE).expect_err("the 51st again");

    // An operator raises the limit, and nobody who is served notices.
    let said = edge.apply(&world.config("[lb.frontend.limits]\nsessions = 60"))?;
    ensure!(said.code == Some(0), "{said}");
    for _ in 0..10 {
        sessions.push(Session::open(&world.client, world.front(), PATIENCE)?);
    }
    Session::open(&world.client, world.front(), PATIENCE).expect_err("the 61st");
    for session in &mut sessions {
        session.echo()?;
    }
    Ok(())
}

#[test]
fn a_source_over_its_rate_is_refused_and_its_neighbours_are_not() -> Result<()> {
    let world = World::new(1)?;
    let backend = world.backend(0, Script::Echo)?;
    let keys = "[lb.frontend.limits]\nsource_rate = 1\nsource_burst = 20";
    let edge = Edge::start(&world.edge, &world.config(keys))?;
    let neighbour = world.lab.node("neighbour", 3)?;
    // Two addresses of one /64 and one of another, which is a source of its own.
    for (node, net) in [(&world.client, 'a'), (&neighbour, 'b')] {
        let ip = node.ip();
        node.netns().ip(&format!(
            "addr add fd00:{net}::1/128 dev eth0 nodad\naddr add fd00:{net}::2/128 dev eth0 nodad"
        ))?;
        world.edge.netns().ip(&format!("route add fd00:{net}::/64 via {ip}"))?;
    }
    let address = |text: &str| text.parse::<IpAddr>().expect("an address");
    let (one, other) = (address("fd00:a::1"), address("fd00:a::2"));
    for (source, same, stranger) in [
        (
            (&world.client, one),
            (&world.client, other),
            (&neighbour, address("fd00:b::1")),
        ),
        (
            (&world.client, world.client.ip4()),
            (&world.client, world.client.ip4()),
            (&neighbour, neighbour.ip4()),
        ),
    ] {
        let front = if source.1.is_ipv4() {
            world.edge.at4(PORT)
        } else {
            world.front()
        };
        let before = backend.accepted().len();
        let begin = Instant::now();
        let mut served = (0..60).filter(|_| served_from(source, front).unwrap_or(false)).count();
        let accrued = begin.elapsed().as_secs_f64().ceil() as usize;
        println!("{}: {served} of 60 at once were served", source.1);
        assert!((20..=20 + accrued).contains(&served), "{}: {served} served", source.1);
        // Each second it may be one more, but not twenty.
        let at_most = served + 10;
        while served_from(same, front)? {
            served += 1;
            assert!(served < at_most, "{} shares its allowance", same.1);
        }
        assert!(served_from(stranger, front)?, "{} has one of its own", stranger.1);
        assert_eq!(
            backend.accepted().len(),
            before + served + 1,
            "the others never reached the backend"
        );
        // What is left alone is served again, at its rate.
        wait_until("the source is served again", PATIENCE, || {
            served_from(source, front).unwrap_or(false)
        })?;
    }
    assert!(turned_away(&edge, "rate")? >= 70, "{}", edge.status()?);
    ensure!(edge.log().contains("reason=rate"), "{}", edge.log());
    ensure!(
        edge.metrics()?.contains("edge_lb_refused_total{"),
        "{}",
        edge.metrics()?
    );
    Ok(())
}

#[test]
fn the_lists_decide_who_may_connect_and_deny_has_the_last_word() -> Result<()> {
    let world = World::new(1)?;
    let backend = world.backend(0, Script::Echo)?;
    let (denied, stranger) = (world.lab.node("denied", 3)?, world.lab.node("stranger", 4)?);
    stranger
        .netns()
        .ip("addr add fd00:c::4/128 dev eth0 nodad\naddr add 192.0.2.4/32 dev eth0")?;
    world.edge.netns().ip(&format!(
        "route add fd00:c::/64 via {}\nroute add 192.0.2.4/32 via {}",
        stranger.ip(),
        stranger.ip4()
    ))?;
    let keys = format!(
        "[lb.frontend.limits]\nallow = [\"fd00::/64\", \"10.0.0.0/24\"]\ndeny = [\"{}\", \"{}\"]",
        denied.ip(),
        denied.ip4()
    );
    let edge = Edge::start(&world.edge, &world.config(&keys))?;
    let cases: [(&Node, IpAddr, bool); 6] = [
        (&world.client, world.client.ip(), true),
        (&world.client, world.client.ip4(), true),
        (&denied, denied.ip(), false),
        (&denied, denied.ip4(), false),
        (&stranger, "fd00:c::4".parse()?, false),
        (&stranger, "192.0.2.4".parse()?, false),
    ];
    for (node, source, may) in cases {
        let front = if source.is_ipv4() {
            world.edge.at4(PORT)
        } else {
            world.front()
        };
        assert_eq!(served_from((node, source), front)?, may, "{source}");
    }
    assert_eq!(backend.accepted().len(), 2);

    // Behind a proxy, the client whom the header names is judged.
    let proxied = format!(
        "accept_proxy = {{ from = [\"{}\"], mode = \"required\" }}\n{keys}",
        world.client.ip()
    );
    let said = edge.apply(&world.config(&proxied))?;
    ensure!(said.code == Some(0), "{said}");
    for (source, may) in [
        ("10.0.0.77", true),
        ("10.0.0.3", false),
        ("192.0.2.4", false),
        ("::ffff:10.0.0.3", false),
    ] {
        let family = if source.contains(':') { "TCP6" } else { "TCP4" };
        let target = if source.contains(':') {
            "::ffff:10.0.0.10"
        } else {
            "10.0.0.10"
        };
        let stream = world
            .client
            .enter(|| TcpStream::connect_timeout(&world.front(), PATIENCE))?;
        let header = format!("PROXY {family} {source} {target} 4711 6443\r\n");
        assert_eq!(answered(stream, header.as_bytes())?, may, "{source} by header");
    }
    Ok(())
}

/// Nodes with slow clients: a few addresses with very many connections each.
const SLOW_NODES: u16 = 4;
const SLOW_EACH: usize = 2000;
/// Long enough for all of them to come before the first has to go.
const DEADLINE: Duration = Duration::from_secs(10);

#[test]
fn eight_thousand_slow_headers_cost_good_clients_nothing_and_end_at_the_deadline() -> Result<()> {
    room_for_descriptors()?;
    let world = World::alone(1)?;
    let _backend = world.backend(0, Script::Echo)?;
    let nodes: Vec<Node> = (1..=SLOW_NODES)
        .map(|number| world.lab.node(&format!("c{number}"), 100 + number))
        .collect::<Result<_>>()?;
    // The slow ones come from a proxy that is trusted, or they would be gone at once.
    let keys = format!(
        "kind = \"ingress\"\naccept_proxy = {{ from = [\"fd00::/64\", \"10.0.0.0/24\"], mode = \"required\", timeout = \"{}s\" }}",
        DEADLINE.as_secs()
    );
    let edge = Edge::start(&world.edge, &world.config(&keys))?;
    let lb = edge.worker("lb")?;
    let header = "PROXY TCP6 2001:db8::7 2001:db8::80 4711 443\r\n";
    let load = Load::start(&world.client, world.front(), 200, PATIENCE, move |mut stream| {
        stream.write_all(header.as_bytes())?;
        let name = read_line(&mut stream, &mut Vec::new())?.ok_or(io::ErrorKind::UnexpectedEof)?;
        stream.write_all(b"word\n")?;
        let word = read_line(&mut stream, &mut Vec::new())?.ok_or(io::ErrorKind::UnexpectedEof)?;
        if word == "word" {
            Ok(name)
        } else {
            Err(io::Error::other(format!("{word:?} came back")))
        }
    });
    wait_until("good clients are served", PATIENCE, || load.so_far().served() >= 200)?;
    let (before, memory) = (descriptors(lb)?, edge.pss_kib()?);

    let slow = many_slow_headers(&nodes, &world)?;
    let held = wait_for("all are held at the same time", PATIENCE, || {
        descriptors(lb)
            .ok()
            .filter(|now| *now >= before + usize::from(SLOW_NODES) * SLOW_EACH - 50)
    })?;
    let peak = edge.pss_kib()?;
    let ends = ends(slow)?;
    let freed = wait_until("every descriptor is free again", PATIENCE, || {
        descriptors(lb).is_ok_and(|now| now <= before + 20)
    })?;
    // As many good ones after as before.
    let after = load.so_far().served();
    wait_until("good clients are served after", PATIENCE, || {
        load.so_far().served() >= after + 200
    })?;
    let report = load.stop();

    let (first, last) = (ends.iter().min().expect("many"), ends.iter().max().expect("many"));
    println!(
        "{} slow headers: {held} descriptors, +{} KiB (from {memory}), ended after {:.0} to {:.0} ms, free {:.0} ms later; \
         good clients: {}",
        ends.len(),
        peak.saturating_sub(memory),
        ms(*first),
        ms(*last),
        ms(freed),
        report.summary()
    );
    let lost = report.failures().len();
    assert!(
        lost * 1000 <= report.attempts.len(),
        "{}: {:?}",
        report.summary(),
        report.failures()
    );
    assert!(
        peak.saturating_sub(memory) <= 50 * 1024,
        "{memory} KiB before, {peak} KiB with them"
    );
    let early = DEADLINE - Duration::from_millis(500);
    assert!(*first >= early, "one was ended after {first:?}");
    assert!(*last <= DEADLINE + PATIENCE, "one was ended after {last:?}");
    assert_eq!(edge.worker("lb")?, lb, "the same worker");
    Ok(())
}

#[test]
fn a_worker_out_of_descriptors_rests_answers_the_operator_and_serves_within_a_second_of_relief() -> Result<()> {
    room_for_descriptors()?;
    // A session takes two: with one of these limits the last descriptor is taken by an accept, with the other there is
    // none left for it.
    for most in [256, 257] {
        again(|| out_of_descriptors(most))?;
    }
    Ok(())
}

fn out_of_descriptors(most: u32) -> Result<()> {
    let world = World::alone(2)?;
    let _backends = world.echoes()?;
    let edge = Edge::start_limited(&world.edge, &world.config("kind = \"api\""), most)?;
    let lb = edge.worker("lb")?;

    // A thousand who come once and stay, however they are treated.
    let clients = crowd(&world.client, world.front(), 1000)?;
    wait_until("the worker has run out", PATIENCE, || {
        descriptors(lb).is_ok_and(|now| now >= 250)
    })?;
    let (from, used) = (Instant::now(), processor_time(lb)?);
    let mut answers = Vec::new();
    while from.elapsed() < Duration::from_secs(5) {
        let said = edge.ctl(&["status"])?;
        ensure!(said.code.is_some(), "{said}");
        answers.push(said.took);
        thread::sleep(Duration::from_millis(200));
    }
    let share = (processor_time(lb)? - used).as_secs_f64() / from.elapsed().as_secs_f64();
    let slowest = answers.iter().max().copied().unwrap_or_default();
    let (served, reset, waiting) = census(&clients);
    let held = descriptors(lb)?;
    drop(clients);
    let (witness, relief) = (Witness::start()?, Instant::now());
    let again = wait_until("somebody is served after they have left", PATIENCE, || {
        Session::open(&world.client, world.front(), Duration::from_secs(1)).is_ok()
    })?;
    println!(
        "{most} descriptors, 1000 clients: {served} served, {reset} reset, {waiting} wait; {held} descriptors, {:.1} % of a core, \
         status in at most {:.0} ms, served again {:.0} ms after they left",
        share * 100.0,
        ms(slowest),
        ms(again)
    );
    assert!(served >= 100, "{served} are served with {most} descriptors");
    assert!(share <= 0.1, "{:.1} % of a core", share * 100.0);
    assert!(slowest < PATIENCE, "edgectl status took {slowest:?}");
    let limit = Duration::from_secs(1) + witness.held_up(relief, relief + again);
    witness.ensure(again <= limit, format!("served again after {again:?}"))?;
    assert_eq!(edge.worker("lb")?, lb, "the same worker");
    for index in 0..2 {
        assert_eq!(
            edge.state(world.back(index))?,
            "healthy",
            "our own shortage is no backend's fault"
        );
    }
    // And it is really well again.
    let load = Load::of_echoes(&world.client, world.front(), 100, PATIENCE);
    wait_until("a hundred are served", PATIENCE, || load.so_far().served() >= 100)?;
    let report = load.stop();
    assert!(report.failures().is_empty(), "{}", report.summary());
    Ok(())
}

/// Opens a session as soon as there is room for it: an end takes a moment to be booked.
fn opened(node: &Node, front: SocketAddr) -> Result<Session> {
    wait_for("there is room for one more", PATIENCE, || {
        Session::open(node, front, PATIENCE).ok()
    })
}

/// How many connections the frontend has turned away for this reason, as `edgectl lb show` tells.
fn turned_away(edge: &Edge, reason: &str) -> Result<u64> {
    let shown = edge.json(&["lb", "show"])?;
    let refused = find(&shown, "refused").context("nothing is told of refusals")?;
    refused[reason]
        .as_u64()
        .with_context(|| format!("no {reason} in {refused}"))
}

/// Whether a client at one of `node`'s addresses is served by the echo; `false` if it was reset.
fn served_from((node, source): (&Node, IpAddr), front: SocketAddr) -> Result<bool> {
    let stream = node.enter(|| -> io::Result<TcpStream> {
        let domain = if source.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let socket = Socket::new(domain, Type::STREAM, None)?;
        socket.bind(&SocketAddr::from((source, 0)).into())?;
        socket.connect_timeout(&front.into(), PATIENCE)?;
        Ok(socket.into())
    });
    match stream {
        Ok(stream) => answered(stream, b""),
        // So soon that it was not yet known to have been accepted.
        Err(error) if is_reset(&error) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether an echo answers behind `header`; `false` if the connection is reset.
fn answered(mut stream: TcpStream, header: &[u8]) -> Result<bool> {
    stream.set_read_timeout(Some(PATIENCE))?;
    match stream
        .write_all(header)
        .and_then(|()| read_line(&mut stream, &mut Vec::new()))
    {
        Ok(Some(_)) => Ok(true),
        Ok(None) => anyhow::bail!("closed instead of reset"),
        Err(error) if is_reset(&error) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Thousands of descriptors for this process and for the daemons it starts.
fn room_for_descriptors() -> Result<()> {
    let most = getrlimit(Resource::Nofile).maximum;
    ensure!(
        most.is_none_or(|most| most >= 18000),
        "8,000 clients take 8,000 descriptors here and 16,000 with what they make the daemon open; raise the hard limit of \
         {most:?}: ulimit -Hn 65536"
    );
    let limit = Rlimit {
        current: most,
        maximum: most,
    };
    Ok(setrlimit(Resource::Nofile, limit)?)
}

/// Opens all the slow ones, from all nodes and over both families at once: each sends one byte of a header and no more.
fn many_slow_headers(nodes: &[Node], world: &World) -> Result<Vec<(Instant, TcpStream)>> {
    let fronts = [world.front(), world.edge.at4(PORT)];
    let open = |node: &Node| -> io::Result<Vec<(Instant, TcpStream)>> {
        node.enter(|| {
            (0..SLOW_EACH)
                .map(|index| {
                    let begin = Instant::now();
                    let mut stream = TcpStream::connect_timeout(&fronts[index % 2], PATIENCE)?;
                    stream.write_all(if index % 4 < 2 { b"P" } else { b"\r" })?;
                    Ok((begin, stream))
                })
                .collect()
        })
    };
    thread::scope(|scope| {
        let threads: Vec<_> = nodes.iter().map(|node| scope.spawn(move || open(node))).collect();
        let mut all = Vec::new();
        for thread in threads {
            all.extend(thread.join().expect("no panic")?);
        }
        Ok(all)
    })
}

/// Waits until the other side has ended each of them; says how long after it was begun.
fn ends(streams: Vec<(Instant, TcpStream)>) -> Result<Vec<Duration>> {
    let (begin, count) = (Instant::now(), streams.len());
    let (mut left, mut ends) = (streams, Vec::new());
    while !left.is_empty() {
        ensure!(
            begin.elapsed() < 3 * DEADLINE,
            "{} of {count} were never ended",
            left.len()
        );
        let mut polled: Vec<PollFd<'_>> = left
            .iter()
            .map(|(_, stream)| PollFd::new(stream, PollFlags::IN))
            .collect();
        let wait = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        poll(&mut polled, Some(&wait))?;
        let now = Instant::now();
        let over: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(polled);
        let mut over = over.into_iter();
        left.retain_mut(|(opened, stream)| {
            if over.next() != Some(true) {
                return true;
            }
            // An end, not an answer.
            let ended = !matches!(read_some(stream, &mut [0; 16]), Ok(1..));
            assert!(ended, "a connection without a header was answered");
            ends.push(now - *opened);
            false
        });
    }
    Ok(ends)
}

/// As many connections at once; `None` for one that was reset before it was known to be accepted.
fn crowd(node: &Node, front: SocketAddr, count: usize) -> Result<Vec<Option<TcpStream>>> {
    let open = || match TcpStream::connect_timeout(&front, PATIENCE) {
        Ok(stream) => stream.set_nonblocking(true).map(|()| Some(stream)),
        Err(error) if is_reset(&error) => Ok(None),
        Err(error) => Err(error),
    };
    Ok(node.enter(|| (0..count).map(|_| open()).collect::<io::Result<_>>())?)
}

/// How many of them were served, were reset, and wait.
fn census(clients: &[Option<TcpStream>]) -> (usize, usize, usize) {
    let mut counts = (0, 0, 0);
    for client in clients {
        match client.as_ref().map(|mut client| client.read(&mut [0; 64])) {
            Some(Ok(1..)) => counts.0 += 1,
            Some(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => counts.2 += 1,
            None | Some(Ok(0) | Err(_)) => counts.1 += 1,
        }
    }
    counts
}
