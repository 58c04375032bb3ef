//! The ingress behind the edge knows its clients: by the shipped example, from real peers' own logs.
//!
//! ```text
//! client ──┬─────────────────── edge: edged, packaging/examples/ingress.toml ──┬── w1 (fd00::21)  nginx
//!          └── front: HAProxy ──┘      80 and 443, IPv4 and IPv6               ├── w2 (fd00::22)  HAProxy
//!              (send-proxy)                                                    └── w3 (fd00::23)  nginx
//! ```
//! The workers have IPv6 only.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpStream},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use tests::{
    Edge, Lab, Node, World,
    backend::{Script, is_reset},
    http,
    ingress::{HTTP, HTTPS, Ingress, Kind, Seen, haproxy_in_front, ipv6_only},
    tls::{self, Ca, read_line, read_some},
    wait_until,
    world::PORT,
};

const PATIENCE: Duration = Duration::from_secs(5);
const NAME: &str = "shop.example.org";
const VERSIONS: [&str; 2] = ["v1", "v2"];
/// More than enough for each of three workers to get its share.
const MANY: usize = 60;
/// The edge waits 30 ms for the first bytes and then sends the header alone. A client that was held up for longer between
/// connecting and its first word tries again, this often at most.
const TRIES: usize = 5;

#[test]
fn every_ingress_logs_the_true_client_of_either_family_by_v1_and_by_v2() -> Result<()> {
    let site = Site::new()?;
    let edge = Edge::start(&site.edge, &shipped("v1")?)?;
    let mut ids = BTreeSet::new();
    for version in VERSIONS {
        configure(&edge, &shipped(version)?)?;
        for front in [site.edge.at(80), site.edge.at4(80)] {
            let mut served = BTreeMap::<String, usize>::new();
            for serial in 0..MANY {
                let path = format!("/{version}/{}/{serial}", family(front));
                let (by, client) = site.get(front, &path)?;
                let seen = site.worker(&by)?.seen(&path)?;
                ensure!(
                    is(&seen, client, front),
                    "{client} to {front} was seen as {seen:?} by {by}"
                );
                if version == "v1" {
                    assert_eq!(seen.unique_id, None, "v1 has no room for one");
                } else if let Some(id) = seen.unique_id {
                    assert!(ids.insert(id.clone()), "the unique id {id} came twice");
                }
                *served.entry(by).or_default() += 1;
                if served.len() == site.workers.len() && serial >= 9 {
                    break;
                }
            }
            assert_eq!(served.len(), site.workers.len(), "{version} to {front}: {served:?}");
        }
    }
    assert!(!ids.is_empty(), "HAProxy tells the unique ids of v2");
    site.nobody_complains()
}

#[test]
fn tls_passes_through_to_every_ingress_and_each_logs_the_true_client() -> Result<()> {
    let site = Site::new()?;
    let edge = Edge::start(&site.edge, &shipped("v1")?)?;
    for version in VERSIONS {
        configure(&edge, &shipped(version)?)?;
        for front in [site.edge.at(443), site.edge.at4(443)] {
            let mut served = BTreeSet::new();
            for serial in 0..MANY {
                let path = format!("/{version}/{}/{serial}", family(front));
                // The certificate is checked, so nobody between has ended the TLS.
                let (by, client) = site.get_tls(front, &path)?;
                let seen = site.worker(&by)?.seen(&path)?;
                ensure!(
                    is(&seen, client, front),
                    "{client} to {front} was seen as {seen:?} by {by}"
                );
                served.insert(by);
                if served.len() == site.workers.len() && serial >= 9 {
                    break;
                }
            }
            assert_eq!(served.len(), site.workers.len(), "{version} to {front}: {served:?}");
        }
    }
    site.nobody_complains()
}

#[test]
fn the_name_in_a_tls_greeting_reaches_the_ingress_as_the_authority() -> Result<()> {
    let site = Site::new()?;
    // The one that tells what it was told.
    let haproxy = site.worker("w2")?;
    let only_haproxy = |version: &str| -> Result<String> {
        let lines = shipped(version)?;
        let others = ["[fd00::21]", "[fd00::23]"];
        let kept = lines
            .lines()
            .filter(|line| !others.iter().any(|other| line.contains(other)));
        Ok(kept.collect::<Vec<_>>().join("\n"))
    };
    let edge = Edge::start(&site.edge, &only_haproxy("v1")?)?;
    for version in VERSIONS {
        configure(&edge, &only_haproxy(version)?)?;
        for front in [site.edge.at(443), site.edge.at4(443)] {
            let expected = (version == "v2").then(|| NAME.to_owned());
            for serial in 0..20 {
                let mut told = Vec::new();
                while told.last() != Some(&expected) {
                    let path = format!("/{version}/{}/{serial}/{}", family(front), told.len());
                    let (_, client) = site.get_tls(front, &path)?;
                    let seen = haproxy.seen(&path)?;
                    ensure!(is(&seen, client, front), "{client} to {front} was seen as {seen:?}");
                    told.push(seen.authority);
                    assert!(told.len() <= TRIES, "{version} to {front}: {told:?}");
                    // Late, or not at all, but never another's.
                    assert!(
                        told.iter().flatten().all(|name| Some(name) == expected.as_ref()),
                        "{told:?}"
                    );
                }
            }
        }
    }
    site.nobody_complains()
}

#[test]
fn the_header_and_the_first_bytes_travel_in_one_segment() -> Result<()> {
    let site = Site::new()?;
    let worker = &site.workers[0];
    let back = worker.node.at(HTTP);
    let config = |version: &str| {
        format!(
            "version = 1\n[[lb.frontend]]\nname = \"http\"\nkind = \"ingress\"\nlisten = [\"[::]:80\", \"0.0.0.0:80\"]\n\
             backends = [\"{back}\"]\nproxy_protocol = \"{version}\"\nconnect_timeout = \"5s\"\n"
        )
    };
    let edge = Edge::start(&site.edge, &config("v1"))?;
    for version in VERSIONS {
        configure(&edge, &config(version))?;
        for front in [site.edge.at(80), site.edge.at4(80)] {
            let path = format!("/{version}/{}", family(front));
            let mut capture = worker.node.capture(&format!("tcp port {HTTP}"))?;
            let mut at_edge = site.edge.capture(&format!("tcp port {HTTP}"))?;
            // The backend answers only after the client's first bytes have come.
            let hole = worker.node.blackhole(&[site.edge.ip()])?;
            let mut stream = site.connect(front)?;
            let client = stream.local_addr()?;
            let request = format!("GET {path} HTTP/1.1\r\nhost: {NAME}\r\n\r\n");
            stream.write_all(request.as_bytes())?;
            wait_until("the edge dials", PATIENCE, || {
                at_edge.so_far().is_ok_and(|trace| !trace.flows().is_empty())
            })?;
            hole.heal();
            let mut answer = Vec::new();
            let status = read_line(&mut stream, &mut answer)?;
            ensure!(
                status.as_deref() == Some("HTTP/1.1 200 OK"),
                "{version} {front}: {status:?}"
            );
            ensure!(is(&worker.seen(&path)?, client, front), "{:?}", worker.seen(&path)?);

            let trace = capture.so_far()?;
            let flows = trace.connects(site.edge.ip(), back);
            let [flow] = &flows[..] else {
                bail!("one connection: {flows:?}")
            };
            let segments: Vec<usize> = trace
                .socket(flow.client, flow.server)
                .packets
                .iter()
                .filter(|packet| packet.from == flow.client && packet.payload > 0)
                .map(|packet| packet.payload)
                .collect();
            let [segment] = segments[..] else {
                bail!("{version} {front}: one segment, not {segments:?}")
            };
            // The exact line of version 1; version 2 has 16 bytes, the addresses (12 or 36) and the TLVs.
            let family = if front.is_ipv4() { "TCP4" } else { "TCP6" };
            let line = format!("PROXY {family} {} {} {} 80\r\n", client.ip(), front.ip(), client.port());
            let least = 16 + if front.is_ipv4() { 12 } else { 36 };
            let header = segment
                .checked_sub(request.len())
                .context("the whole request is in it")?;
            println!(
                "{version} to {front}: a header of {header} bytes before {} of the client",
                request.len()
            );
            let right = if version == "v1" {
                header == line.len()
            } else {
                header >= least
            };
            assert!(right, "{version} to {front}: {header} bytes of header");
        }
    }
    Ok(())
}

#[test]
fn ten_rounds_of_checks_leave_no_word_about_a_broken_header_in_any_ingress_log() -> Result<()> {
    let site = Site::new()?;
    // What the logs would say of a check without a header, to know that silence means something.
    for worker in &site.workers {
        for port in [HTTP, HTTPS] {
            let mut stream = site
                .edge
                .enter(|| TcpStream::connect_timeout(&worker.node.at(port), PATIENCE))?;
            stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")?;
            let _ = stream.read(&mut [0; 16]);
        }
        wait_until("the ingress complains", PATIENCE, || worker.complaints().len() >= 2)
            .with_context(|| format!("{:?}: {:?}", worker.kind, worker.complaints()))?;
    }
    let before: Vec<usize> = site.workers.iter().map(|worker| worker.complaints().len()).collect();
    let edge = Edge::start(&site.edge, &shipped("v1")?)?;
    for version in VERSIONS {
        configure(&edge, &shipped(version)?)?;
        let mut captures = Vec::new();
        for worker in &site.workers {
            captures.push(worker.node.capture(&format!("tcp port {HTTP} or tcp port {HTTPS}"))?);
        }
        wait_until("ten rounds of checks", Duration::from_secs(20), || {
            site.workers.iter().zip(&mut captures).all(|(worker, capture)| {
                let trace = capture.so_far().unwrap_or_default();
                let checks = |port| {
                    let flows = trace.connects(site.edge.ip(), worker.node.at(port));
                    flows.iter().filter(|flow| flow.ended.is_some()).count()
                };
                checks(HTTP) >= 10 && checks(HTTPS) >= 10
            })
        })?;
        // Behind the last check in each log, so that what it made the ingress say has been said.
        site.one_request_of_each(site.edge.at(80))?;
        for (worker, before) in site.workers.iter().zip(&before) {
            let said = &worker.complaints()[*before..];
            assert!(
                said.is_empty(),
                "{version}: {:?} on {}: {said:#?}",
                worker.kind,
                worker.node.name()
            );
            for port in [HTTP, HTTPS] {
                assert_eq!(edge.state(worker.node.at(port))?, "healthy", "{version}");
            }
        }
    }
    Ok(())
}

#[test]
fn behind_another_proxy_that_sends_a_header_the_ingress_still_logs_the_true_client() -> Result<()> {
    let site = Site::new()?;
    let front = site.lab.node("front", 3)?;
    let ways = [
        (8001, "v1", site.edge.at(80)),
        (8002, "v2", site.edge.at(80)),
        (8003, "v1", site.edge.at4(80)),
        (8004, "v2", site.edge.at4(80)),
    ];
    let _haproxy = haproxy_in_front(&front, &ways)?;
    let edge = Edge::start(&site.edge, &chained("v1", &[front.ip(), front.ip4()])?)?;
    for version in VERSIONS {
        configure(&edge, &chained(version, &[front.ip(), front.ip4()])?)?;
        for (port, received, to) in ways {
            for entrance in [front.at(port), front.at4(port)] {
                let path = format!("/{version}/{received}/{port}/{}", family(entrance));
                let (by, client) = site.get(entrance, &path)?;
                let seen = site.worker(&by)?.seen(&path)?;
                ensure!(
                    is(&seen, client, entrance),
                    "{client} to {entrance}, {received} to {to}, {version}: {seen:?} by {by}"
                );
            }
        }
    }
    site.nobody_complains()
}

#[test]
fn a_header_in_single_bytes_and_one_that_speaks_for_nobody_are_understood() -> Result<()> {
    let site = Site::new()?;
    let front = site.lab.node("front", 3)?;
    let _edge = Edge::start(&site.edge, &chained("v2", &[front.ip(), front.ip4()])?)?;
    let (client, target): (SocketAddr, SocketAddr) = ("198.51.100.7:4711".parse()?, "203.0.113.80:80".parse()?);
    let (client6, target6): (SocketAddr, SocketAddr) = ("[2001:db8::7]:4711".parse()?, "[2001:db8::80]:80".parse()?);
    for to in [site.edge.at(80), site.edge.at4(80)] {
        // None: the connection speaks for itself.
        let headers = [
            ("v1-tcp4", line(client, target), Some((client, target))),
            ("v1-tcp6", line(client6, target6), Some((client6, target6))),
            ("v2-tcp4", binary(client, target), Some((client, target))),
            ("v2-tcp6", binary(client6, target6), Some((client6, target6))),
            ("v1-unknown", b"PROXY UNKNOWN\r\n".to_vec(), None),
            ("v2-local", [&SIGNATURE[..], &[0x20, 0, 0, 0]].concat(), None),
        ];
        for (name, header, told) in headers {
            for single in [false, true] {
                let path = format!("/{}/{name}/{single}", family(to));
                let mut stream = front.enter(|| TcpStream::connect_timeout(&to, PATIENCE))?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                let own = stream.local_addr()?;
                for piece in header.chunks(if single { 1 } else { header.len() }) {
                    stream.write_all(piece)?;
                    // What is sent a byte at a time is to arrive a byte at a time.
                    thread::sleep(Duration::from_millis(u64::from(single)));
                }
                let mut answer = http::request(stream, "GET", &path, NAME, "")?;
                let by = answer.text()?;
                let seen = site.worker(&by)?.seen(&path)?;
                let (source, destination) = told.unwrap_or((own, to));
                ensure!(is(&seen, source, destination), "{path}: {seen:?} by {by}");
            }
        }
    }
    site.nobody_complains()
}

#[test]
fn what_has_no_right_or_no_whole_header_is_refused_and_nothing_of_it_reaches_a_backend() -> Result<()> {
    let world = World::new(1)?;
    let front = world.lab.node("front", 3)?;
    let backend = world.backend(0, Script::Echo)?;
    let keys = format!(
        "kind = \"ingress\"\naccept_proxy = {{ from = [\"{}\", \"{}/32\"], mode = \"required\", timeout = \"8s\" }}",
        front.ip(),
        front.ip4()
    );
    let _edge = Edge::start(&world.edge, &world.config(&keys))?;
    let mut capture = world.cp[0].capture(&format!("tcp port {PORT}"))?;
    let (client, target): (SocketAddr, SocketAddr) = ("198.51.100.7:4711".parse()?, "203.0.113.80:443".parse()?);
    let good = [line(client, target), binary(client, target)];
    let get = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec();
    let soon = Duration::from_secs(5);

    for to in [world.front(), world.edge.at4(PORT)] {
        // From outside `from`: whatever it sends, even the name of a client that would be let in.
        let outside = [("silence", Vec::new()), ("no header", get.clone())]
            .into_iter()
            .chain([
                ("a forged v1 header", [&good[0][..], &get].concat()),
                ("a forged v2 header", [&good[1][..], &get].concat()),
            ]);
        for (what, bytes) in outside {
            let took = refused(&world.client, to, &bytes, Then::Wait).with_context(|| format!("outside: {what}"))?;
            assert!(took < soon, "outside, {what}: after {took:?}");
        }
        for (what, bytes) in malformed(client, target) {
            let took = refused(&front, to, &bytes, Then::Wait).with_context(|| what.clone())?;
            assert!(took < soon, "{what}: after {took:?}");
        }
        for header in &good {
            for cut in [1, 5, 12, 15, 16, 20, header.len() - 1] {
                let half = &header[..cut];
                let took =
                    refused(&front, to, half, Then::Finish).with_context(|| format!("{cut} bytes, then the end"))?;
                assert!(took < soon, "{cut} bytes and the end: after {took:?}");
            }
        }
    }
    // Cut off and then silent: until the deadline, all at the same time.
    thread::scope(|scope| {
        let waiting: Vec<_> = good
            .iter()
            .flat_map(|header| [0, 1, 14, header.len() - 1].map(|cut| &header[..cut]))
            .map(|half| {
                (
                    half.len(),
                    scope.spawn(|| refused(&front, world.front(), half, Then::Wait)),
                )
            })
            .collect();
        for (cut, waited) in waiting {
            let took = waited
                .join()
                .expect("no panic")
                .with_context(|| format!("{cut} bytes, then silence"))?;
            let right = Duration::from_millis(7500)..Duration::from_secs(15);
            ensure!(right.contains(&took), "{cut} bytes, then silence: after {took:?}");
        }
        Ok(())
    })?;
    let trace = capture.so_far()?;
    assert!(trace.packets.is_empty(), "the backend saw {:?}", trace.packets);
    assert!(backend.accepted().is_empty());

    // The same door is open to whom it is meant for.
    for header in &good {
        let mut stream = front.enter(|| TcpStream::connect_timeout(&world.front(), PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(header)?;
        assert_eq!(read_line(&mut stream, &mut Vec::new())?.as_deref(), Some("cp1"));
    }
    assert_eq!(backend.accepted().len(), 2);
    Ok(())
}

/// A client, the edge, three workers with IPv6 only and an ingress each.
struct Site {
    workers: Vec<Ingress>,
    client: Node,
    edge: Node,
    ca: Ca,
    lab: Lab,
}

impl Site {
    fn new() -> Result<Self> {
        let lab = Lab::new()?;
        let (client, edge) = (lab.node("client", 2)?, lab.node("edge", 10)?);
        let ca = Ca::new("site")?;
        let files = ca.issue(NAME, None, &[], &[NAME])?.write(&lab.dir().join("site"))?;
        let mut workers = Vec::new();
        for (number, kind) in [(1, Kind::Nginx), (2, Kind::Haproxy), (3, Kind::Nginx)] {
            let node = lab.node(&format!("w{number}"), 20 + number)?;
            ipv6_only(&node)?;
            workers.push(Ingress::start(&node, kind, &files, edge.ip())?);
        }
        Ok(Self {
            workers,
            client,
            edge,
            ca,
            lab,
        })
    }

    fn worker(&self, name: &str) -> Result<&Ingress> {
        let found = self.workers.iter().find(|worker| worker.node.name() == name);
        found.with_context(|| format!("served by {name:?}, which is no worker"))
    }

    fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let stream = self.client.enter(|| TcpStream::connect_timeout(&to, PATIENCE))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// Asks for `path`; says who answered and from where it was asked.
    fn get(&self, to: SocketAddr, path: &str) -> Result<(String, SocketAddr)> {
        let stream = self.connect(to)?;
        let own = stream.local_addr()?;
        let mut answer = http::request(stream, "GET", path, NAME, "").with_context(|| format!("{path} of {to}"))?;
        ensure!(answer.status == 200, "{path} of {to}: {}", answer.status);
        Ok((answer.text()?, own))
    }

    /// As [`Site::get`], over TLS.
    fn get_tls(&self, to: SocketAddr, path: &str) -> Result<(String, SocketAddr)> {
        // Made first: it takes time, and whoever has connected should speak soon.
        let config = self.ca.client(None)?;
        let stream = self.connect(to)?;
        let own = stream.local_addr()?;
        let stream = tls::handshake_with(stream, NAME, &config).with_context(|| format!("TLS, {path} of {to}"))?;
        let mut answer = http::request(stream, "GET", path, NAME, "").with_context(|| format!("{path} of {to}"))?;
        ensure!(answer.status == 200, "{path} of {to}: {}", answer.status);
        Ok((answer.text()?, own))
    }

    /// Requests until every worker has answered one.
    fn one_request_of_each(&self, front: SocketAddr) -> Result<()> {
        let mut served = BTreeSet::new();
        for serial in 0..MANY {
            let path = format!("/each/{serial}");
            let (by, _) = self.get(front, &path)?;
            self.worker(&by)?.seen(&path)?;
            served.insert(by);
            if served.len() == self.workers.len() {
                return Ok(());
            }
        }
        bail!("{MANY} requests were answered by {served:?} alone")
    }

    fn nobody_complains(&self) -> Result<()> {
        for worker in &self.workers {
            let said = worker.complaints();
            ensure!(
                said.is_empty(),
                "{:?} on {}: {said:#?}",
                worker.kind,
                worker.node.name()
            );
        }
        Ok(())
    }
}

/// Whether the ingress takes `client`, which went to `destination`, for its client.
fn is(seen: &Seen, client: SocketAddr, destination: SocketAddr) -> bool {
    seen.client == client.ip() && seen.source == client && seen.destination == destination
}

fn family(address: SocketAddr) -> &'static str {
    if address.is_ipv4() { "ipv4" } else { "ipv6" }
}

/// The shipped example, with the lab's addresses, a version of the PROXY protocol, and checks that do not take long.
fn shipped(version: &str) -> Result<String> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/examples/ingress.toml");
    let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let mut adapted = text.clone();
    for (shipped, ours) in [
        ("[2001:db8:0:1::", "[fd00::".to_owned()),
        ("proxy_protocol = \"v2\"", format!("proxy_protocol = \"{version}\"")),
        (
            "{ kind = \"tcp\" }",
            "{ kind = \"tcp\", interval = \"200ms\" }".to_owned(),
        ),
    ] {
        ensure!(adapted.contains(shipped), "{shipped} is not in {}", file.display());
        adapted = adapted.replace(shipped, &ours);
    }
    Ok(adapted)
}

/// The shipped example behind proxies.
fn chained(version: &str, proxies: &[IpAddr]) -> Result<String> {
    let from: Vec<String> = proxies.iter().map(|proxy| format!("\"{proxy}\"")).collect();
    let key = format!(
        "\naccept_proxy = {{ from = [{}], mode = \"required\" }}\nproxy_protocol = ",
        from.join(", ")
    );
    Ok(shipped(version)?.replace("\nproxy_protocol = ", &key))
}

/// `edgectl config apply`, which has to succeed.
fn configure(edge: &Edge, config: &str) -> Result<()> {
    let said = edge.apply(config)?;
    ensure!(said.code == Some(0), "{said}");
    Ok(())
}

/// What a client does after its last byte.
#[derive(Clone, Copy)]
enum Then {
    Finish,
    Wait,
}

/// Sends `bytes` and waits until the other side ends the connection without a word; says how long after the connect.
fn refused(node: &Node, to: SocketAddr, bytes: &[u8], then: Then) -> Result<Duration> {
    let begin = Instant::now();
    let mut stream = match node.enter(|| TcpStream::connect_timeout(&to, PATIENCE)) {
        // So soon that it was not yet known to have been accepted.
        Err(error) if is_reset(&error) => return Ok(begin.elapsed()),
        connected => connected?,
    };
    stream.set_read_timeout(Some(4 * PATIENCE))?;
    // It may have been refused already.
    let sent = stream.write_all(bytes).and_then(|()| match then {
        Then::Finish => stream.shutdown(Shutdown::Write),
        Then::Wait => Ok(()),
    });
    if let Err(error) = sent {
        ensure!(is_reset(&error) || error.kind() == ErrorKind::NotConnected, "{error}");
    }
    let mut answer = [0; 64];
    match read_some(&mut stream, &mut answer) {
        Ok(0) => Ok(begin.elapsed()),
        Err(error) if is_reset(&error) => Ok(begin.elapsed()),
        Ok(count) => bail!("it was answered: {:?}", String::from_utf8_lossy(&answer[..count])),
        Err(error) => bail!("it was left open for {:?}: {error}", begin.elapsed()),
    }
}

/// Version 1 of the header, by the specification's words.
fn line(client: SocketAddr, target: SocketAddr) -> Vec<u8> {
    let family = if client.is_ipv4() { "TCP4" } else { "TCP6" };
    let (from, to) = (client.ip(), target.ip());
    format!("PROXY {family} {from} {to} {} {}\r\n", client.port(), target.port()).into_bytes()
}

/// How version 2 begins.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Version 2 of the header, with a TLV that nobody needs to know.
fn binary(client: SocketAddr, target: SocketAddr) -> Vec<u8> {
    let mut block = Vec::new();
    for address in [client, target] {
        match address.ip() {
            IpAddr::V4(ip) => block.extend(ip.octets()),
            IpAddr::V6(ip) => block.extend(ip.octets()),
        }
    }
    block.extend([client.port().to_be_bytes(), target.port().to_be_bytes()].concat());
    block.extend([0xe0, 0, 3, 1, 2, 3]);
    let family = if client.is_ipv4() { 0x11 } else { 0x21 };
    let length = u16::try_from(block.len()).expect("a short header");
    [&SIGNATURE[..], &[0x21, family], &length.to_be_bytes(), &block].concat()
}

/// What a trusted proxy could send by mistake, each followed by a request.
fn malformed(client: SocketAddr, target: SocketAddr) -> Vec<(String, Vec<u8>)> {
    let v2 = binary(client, target);
    let changed = |at: usize, value: u8| {
        let mut header = v2.clone();
        header[at] = value;
        header
    };
    let mut wrong_sum = v2[..16 + 12].to_vec();
    wrong_sum.extend([3, 0, 4, 1, 2, 3, 4]);
    wrong_sum[15] = 12 + 7;
    let cases = [
        ("no header", Vec::new()),
        (
            "a port of 65536",
            b"PROXY TCP4 198.51.100.7 203.0.113.80 65536 443\r\n".to_vec(),
        ),
        (
            "a family that lies",
            b"PROXY TCP4 2001:db8::7 2001:db8::80 1 443\r\n".to_vec(),
        ),
        (
            "a lower-case word",
            b"proxy TCP4 198.51.100.7 203.0.113.80 1 443\r\n".to_vec(),
        ),
        (
            "two spaces",
            b"PROXY  TCP4 198.51.100.7 203.0.113.80 1 443\r\n".to_vec(),
        ),
        (
            "no carriage return",
            b"PROXY TCP4 198.51.100.7 203.0.113.80 1 443\n".to_vec(),
        ),
        ("a line without an end", [&b"PROXY UNKNOWN "[..], &[b'x'; 200]].concat()),
        ("half a signature", SIGNATURE[..8].to_vec()),
        ("version 3", changed(12, 0x31)),
        ("an unknown command", changed(12, 0x22)),
        ("a block too short for its family", changed(15, 4)),
        ("a length beyond every bound", changed(14, 0xff)),
        ("a TLV that goes on behind the block", changed(16 + 12 + 2, 200)),
        ("a wrong checksum", wrong_sum),
    ];
    let get = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n";
    cases
        .into_iter()
        .map(|(what, header)| (what.to_owned(), [&header[..], get].concat()))
        .collect()
}
