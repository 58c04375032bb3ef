//! Stateful NAT64 between real peers: hosts without IPv4, and a server without IPv6 that sees them all as one address.
//!
//! ```text
//! one (fd00::2, no IPv4)    ─┐
//! other (fd00::3, no IPv4)  ─┼─ one wire ── web (10.0.0.11, no IPv6): nginx
//! edge (fd00::10, 10.0.0.10) ─┘
//!   edged, worker nat64: both are seen as 192.0.2.7
//! ```
//! Addresses of IPv4 lie under 2001:db8:64::/96.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use tests::{
    Edge, Lab, Node, Process,
    edge::{Said, other_build, program, say},
    lab::need_tool,
    ping::{Echo, ping},
    process, wait_until,
};

const PATIENCE: Duration = Duration::from_secs(10);
/// Octets of the file that is fetched.
const BULK: usize = 100 << 20;
/// As what all hosts are seen.
const POOL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);
const CONFIG: &str = r#"version = 1
[nat64]
prefix = "2001:db8:64::/96"
pool = [{ address = "192.0.2.7", ports = "1024-65535" }]
clients = ["fd00::2/127"]
# What stands for the internet here is a private network.
allow_private = ["10.0.0.0/24"]
address_v4 = "192.0.2.7"
"#;

struct Stage {
    one: Node,
    other: Node,
    web: Node,
    edge: Edge,
    _nginx: Process,
    digest: String,
    _lab: Lab,
}

impl Stage {
    fn new() -> Result<Self> {
        Self::with(CONFIG)
    }

    fn with(config: &str) -> Result<Self> {
        let lab = Lab::new()?;
        let (one, other) = (lab.node("one", 2)?, lab.node("other", 3)?);
        let node = lab.node("edge", 10)?;
        let web = lab.node("web", 11)?;
        for (host, address) in [(&one, "10.0.0.2"), (&other, "10.0.0.3")] {
            host.netns().ip(&format!(
                "addr del {address}/24 dev eth0\nroute add default via fd00::10"
            ))?;
        }
        web.netns()
            .ip("addr del fd00::11/64 dev eth0\nroute add 192.0.2.0/24 via 10.0.0.10")?;
        node.enter(|| -> Result<()> {
            for (key, value) in [
                ("ipv4/ip_forward", "1"),
                ("ipv6/conf/all/forwarding", "1"),
                // All hang on one wire, and nobody is to find a shorter way.
                ("ipv4/conf/all/send_redirects", "0"),
                ("ipv4/conf/eth0/send_redirects", "0"),
            ] {
                fs::write(format!("/proc/sys/net/{key}"), value).with_context(|| key.to_owned())?;
            }
            Ok(())
        })?;
        let file = web.file("bulk");
        let octets: Vec<u8> = (0..BULK / 4)
            .flat_map(|word| (word as u32).wrapping_mul(0x9e37_79b9).to_ne_bytes())
            .collect();
        fs::write(&file, octets)?;
        let said = say(std::process::Command::new("md5sum").arg(&file), Duration::from_secs(30))?;
        let digest = said.out.split_whitespace().next().unwrap_or_default().to_owned();
        let nginx = nginx(&web)?;
        let edge = Edge::start(&node, config)?;
        Ok(Self {
            one,
            other,
            web,
            edge,
            _nginx: nginx,
            digest,
            _lab: lab,
        })
    }

    /// An IPv4 address as IPv6 sees it.
    fn under(address: Ipv4Addr) -> Ipv6Addr {
        let prefix: Ipv6Addr = "2001:db8:64::".parse().expect("an address");
        Ipv6Addr::from_bits(prefix.to_bits() | u128::from(address.to_bits()))
    }

    fn target() -> Ipv6Addr {
        Self::under([10, 0, 0, 11].into())
    }

    /// Fetches the file from `host`, no faster than so many octets a second, and compares its digest.
    fn fetch(&self, host: &Node, rate: &str) -> Result<()> {
        let mut curl = host.command("bash");
        curl.args([
            "-c",
            &format!(
                "set -o pipefail; curl -sS -g --max-time 120 --limit-rate {rate} 'http://[{}]/bulk' | md5sum",
                Self::target()
            ),
        ]);
        let said = say(&mut curl, Duration::from_secs(130))?;
        ensure!(said.code == Some(0) && said.out.starts_with(&self.digest), "{said}");
        Ok(())
    }

    fn curl(host: &Node, target: Ipv4Addr) -> Result<Said> {
        let mut curl = host.command("curl");
        let url = format!("http://[{}]/", Self::under(target));
        curl.args([
            "-sS",
            "-g",
            "--max-time",
            "5",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            &url,
        ]);
        say(&mut curl, Duration::from_secs(10))
    }

    fn status(&self) -> Result<Value> {
        Ok(self.edge.json(&["nat64", "status"])?["nat64"].clone())
    }

    fn dropped(&self, reason: &str) -> Result<u64> {
        let drops = self.edge.json(&["nat64", "drops"])?;
        drops["dropped"][reason]
            .as_u64()
            .with_context(|| format!("{reason} in {drops}"))
    }

    fn sessions(&self) -> Result<u64> {
        let status = self.status()?;
        status["state"]["sessions"].as_u64().with_context(|| status.to_string())
    }

    fn wait_for_octets(&self, least: u64) -> Result<()> {
        wait_until("the fetch is under way", PATIENCE, || {
            let octets = self
                .status()
                .ok()
                .and_then(|status| status["ipv4"]["received_octets"].as_u64());
            octets.is_some_and(|octets| octets > least)
        })?;
        Ok(())
    }
}

#[test]
fn hosts_without_ipv4_fetch_and_ping_and_are_seen_as_the_pool_address() -> Result<()> {
    let stage = Stage::new()?;
    std::thread::scope(|scope| -> Result<()> {
        let other = scope.spawn(|| stage.fetch(&stage.other, "1G"));
        stage.fetch(&stage.one, "1G")?;
        other.join().expect("no panic")
    })?;
    let log = fs::read_to_string(stage.web.file("access.log"))?;
    let clients: Vec<&str> = log.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(clients, [POOL.to_string(), POOL.to_string()], "{log}");
    let target: IpAddr = Stage::target().into();
    let answer = |kind, from| Some(Echo { from, kind, code: 0 });
    for host in [&stage.one, &stage.other] {
        assert_eq!(ping(host, target, 64, 56)?, answer(129, target));
    }
    // The edge's kernel, the translator, the edge's kernel again, which is no address of the internet.
    let translator: IpAddr = Stage::under(POOL).into();
    let kernel: IpAddr = Stage::under([10, 0, 0, 10].into()).into();
    for (hops, from) in [(1, "fd00::10".parse()?), (2, translator), (3, kernel)] {
        assert_eq!(ping(&stage.one, target, hops, 56)?, answer(3, from), "{hops} hops");
    }
    // What the tables say.
    let sessions = stage.edge.json(&["nat64", "sessions", "--host", "fd00::2"])?;
    let rows = sessions["sessions"].as_array().context("rows")?;
    let of = |protocol: &str| rows.iter().find(|row| row["protocol"] == protocol).cloned();
    let (tcp, icmp) = (of("tcp").context("tcp")?, of("icmp").context("icmp")?);
    assert_eq!(tcp["remote"], "10.0.0.11:80", "{sessions}");
    assert!(
        tcp["host"].as_str().is_some_and(|host| host.starts_with("[fd00::2]:")),
        "{sessions}"
    );
    for row in [&tcp, &icmp] {
        assert!(
            row["seen_as"]
                .as_str()
                .is_some_and(|seen| seen.starts_with("192.0.2.7:")),
            "{sessions}"
        );
    }
    assert_eq!(tcp["state"], "both-fin", "{sessions}");
    let bindings = stage.edge.json(&["nat64", "bib"])?;
    assert_eq!(bindings["bindings"].as_array().map(Vec::len), Some(4), "{bindings}");
    let pool = stage.edge.json(&["nat64", "pool"])?;
    assert_eq!(pool["pool"][0]["all"], 64_512, "{pool}");
    let plain = stage.edge.ctl(&["nat64", "sessions"])?;
    ensure!(plain.code == Some(0) && plain.out.contains("both-fin"), "{plain}");
    let metrics = stage.edge.metrics()?;
    for line in ["edge_nat64_sessions 4", "edge_nat64_bindings 4", "edge_nat64_hosts 2"] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    Ok(())
}

#[test]
fn what_is_the_edges_own_or_private_is_refused_at_once_and_strangers_get_nothing() -> Result<()> {
    let stage = Stage::new()?;
    assert_eq!(Stage::curl(&stage.one, [10, 0, 0, 11].into())?.out, "404");
    for forbidden in [[10, 0, 0, 10], [192, 168, 1, 1], [127, 0, 0, 1]] {
        let begin = Instant::now();
        let said = Stage::curl(&stage.one, forbidden.into())?;
        ensure!(said.code == Some(7), "not refused: {said}");
        ensure!(
            begin.elapsed() < Duration::from_secs(4),
            "the host was not told: {said}"
        );
    }
    assert!(stage.dropped("forbidden")? >= 3);
    // From IPv4 nothing begins.
    let status = stage.status()?;
    let seen = stage.edge.json(&["nat64", "bib"])?["bindings"][0]["seen_as"].clone();
    let seen: SocketAddr = seen.as_str().context("a binding")?.parse()?;
    let refused = stage
        .web
        .enter(|| std::net::TcpStream::connect_timeout(&seen, Duration::from_secs(1)));
    ensure!(refused.is_err(), "{status}");
    assert!(stage.dropped("unsolicited")? >= 1);
    // Who is no client is not heard.
    stage
        .other
        .netns()
        .ip("addr add fd00::77/64 dev eth0 nodad\nroute replace default via fd00::10 src fd00::77")?;
    let stranger = stage.other.enter(|| UdpSocket::bind("[fd00::77]:0"))?;
    stranger.send_to(b"hello", (Stage::target(), 9))?;
    wait_until("the stranger is counted", PATIENCE, || {
        stage.dropped("not_client").is_ok_and(|count| count == 1)
    })?;
    Ok(())
}

#[test]
fn datagrams_in_fragments_go_there_and_back_by_their_ports() -> Result<()> {
    let stage = Stage::new()?;
    let server = stage.web.enter(|| UdpSocket::bind(("10.0.0.11", 7)))?;
    server.set_read_timeout(Some(PATIENCE))?;
    let clients: Vec<UdpSocket> = [(&stage.one, "[fd00::2]:0"), (&stage.other, "[fd00::3]:0")]
        .into_iter()
        .map(|(host, address)| host.enter(|| UdpSocket::bind(address)))
        .collect::<Result<_, _>>()?;
    for client in &clients {
        client.set_read_timeout(Some(Duration::from_millis(500)))?;
        for size in [1_u32, 1452, 1453, 4000, 60_000] {
            let sent: Vec<u8> = (0..size).map(|octet| (octet % 253) as u8).collect();
            client.send_to(&sent, (Stage::target(), 7))?;
            let mut room = vec![0; 65_536];
            let (length, from) = server
                .recv_from(&mut room)
                .with_context(|| format!("{size} octets there"))?;
            assert_eq!(from.ip(), IpAddr::from(POOL));
            assert!(room[..length] == sent, "{size} octets there");
            // The first that is longer than IPv6 takes is lost, and the server told of the path's MTU.
            let mut back = None;
            wait_until(&format!("{size} octets come back"), PATIENCE, || {
                back = server
                    .send_to(&sent, from)
                    .ok()
                    .and_then(|_| client.recv_from(&mut room).ok());
                back.is_some()
            })?;
            let (length, from) = back.context("an answer")?;
            assert_eq!(from.ip(), IpAddr::from(Stage::target()));
            assert!(room[..length] == sent, "{size} octets back");
        }
    }
    Ok(())
}

#[test]
fn ten_thousand_flows_go_on_when_the_worker_is_killed() -> Result<()> {
    const SOURCES: usize = 100;
    const SERVERS: u16 = 100;
    let stage = Stage::with(&CONFIG.replace("[nat64]", "[nat64]\nnew_sessions_per_second = 100000"))?;
    let servers: Vec<UdpSocket> = (0..SERVERS)
        .map(|number| stage.web.enter(|| UdpSocket::bind(("10.0.0.11", 7000 + number))))
        .collect::<Result<_, _>>()?;
    let sources: Vec<UdpSocket> = (0..SOURCES)
        .map(|_| stage.one.enter(|| UdpSocket::bind("[fd00::2]:0")))
        .collect::<Result<_, _>>()?;
    for socket in servers.iter().chain(&sources) {
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    }
    // Each flow says its number, again if it is not heard; as what the server sees it.
    let begin = |flows: &mut BTreeMap<(usize, usize), SocketAddr>| -> Result<()> {
        for (at, server) in servers.iter().enumerate() {
            for (number, source) in sources.iter().enumerate() {
                let mut room = [0; 8];
                for _ in 0..5 {
                    source.send_to(&[number as u8], (Stage::target(), 7000 + at as u16))?;
                    // One that came late is told twice.
                    while let Ok((_, from)) = server.recv_from(&mut room) {
                        flows.insert((at, usize::from(room[0])), from);
                        if usize::from(room[0]) == number {
                            break;
                        }
                    }
                    if flows.contains_key(&(at, number)) {
                        break;
                    }
                }
            }
        }
        Ok(())
    };
    let mut before = BTreeMap::new();
    begin(&mut before)?;
    assert_eq!(before.len(), SOURCES * usize::from(SERVERS));
    assert_eq!(stage.sessions()?, 10_000);
    let worker = stage.edge.worker("nat64")?;
    process::signal(worker, Signal::KILL)?;
    stage.edge.wait_for_new_worker("nat64", worker, PATIENCE)?;
    wait_until("it has the sessions", PATIENCE, || {
        stage.sessions().is_ok_and(|count| count == 10_000)
    })?;
    // The servers speak first: only who knows the sessions brings this to the hosts.
    let mut reached = 0;
    for ((at, number), seen) in &before {
        servers[*at].send_to(&[*number as u8], seen)?;
        let mut room = [0; 8];
        let from = sources[*number].recv_from(&mut room);
        reached += usize::from(from.is_ok_and(|(_, from)| from == (Stage::target(), 7000 + *at as u16).into()));
    }
    println!("{reached} of {} flows go on", before.len());
    assert!(reached * 100 >= before.len() * 99, "{reached} of {}", before.len());
    let mut after = BTreeMap::new();
    begin(&mut after)?;
    assert_eq!(after, before, "all are seen as before");
    Ok(())
}

#[test]
fn connections_live_through_an_upgrade_and_through_another_configuration() -> Result<()> {
    let stage = Stage::new()?;
    let other = other_build(&program("edged")?, &stage.edge.node().file("other"))?;
    std::thread::scope(|scope| -> Result<()> {
        let fetch = scope.spawn(|| stage.fetch(&stage.one, "20M"));
        stage.wait_for_octets(1 << 20)?;
        stage.edge.upgraded(&other)?;
        let said = stage
            .edge
            .apply(&CONFIG.replace("clients", "new_sessions_per_second = 10\nclients"))?;
        ensure!(said.code == Some(0), "{said}");
        let worker = stage.edge.worker("nat64")?;
        process::signal(worker, Signal::KILL)?;
        stage.edge.wait_for_new_worker("nat64", worker, PATIENCE)?;
        fetch.join().expect("no panic")
    })?;
    assert_eq!(
        stage.edge.json(&["nat64", "bib"])?["bindings"].as_array().map(Vec::len),
        Some(1)
    );
    Ok(())
}

#[test]
fn a_pool_that_cannot_work_is_refused_with_what_to_write() -> Result<()> {
    let stage = Stage::new()?;
    for (from, to, says) in [
        (
            "192.0.2.7\", ports",
            "10.0.0.10\", ports",
            "is an address of this machine itself",
        ),
        (
            "clients = [\"fd00::2/127\"]",
            "",
            "without clients nobody may open a session",
        ),
        ("allow_private = [", "allow_privat = [", "allow_private"),
        ("2001:db8:64::/96", "64:ff9b::/96", "must not appear under 64:ff9b::/96"),
        ("1024-65535", "65535-1024", "is no range of ports"),
    ] {
        let said = stage.edge.apply(&CONFIG.replacen(from, to, 1))?;
        ensure!(said.code == Some(2) && said.err.contains(says), "{says}: {said}");
    }
    assert_eq!(
        Stage::curl(&stage.one, [10, 0, 0, 11].into())?.out,
        "404",
        "it goes on as before"
    );
    Ok(())
}

/// nginx on port 80 of IPv4, which gives the file out and writes down who came.
fn nginx(node: &Node) -> Result<Process> {
    let temp = |kind: &str| format!("{kind}_temp_path {};", node.file(&format!("nginx-{kind}")).display());
    let config = format!(
        "daemon off; user root; worker_processes 1; pid {}; error_log {};\n\
         events {{}}\n\
         http {{ access_log {}; sendfile on; {} {} {} {} {}\n\
         server {{ listen 80; location = /bulk {{ alias {}; }} location / {{ return 404; }} }} }}\n",
        node.file("nginx.pid").display(),
        node.file("nginx-errors.log").display(),
        node.file("access.log").display(),
        temp("client_body"),
        temp("proxy"),
        temp("fastcgi"),
        temp("uwsgi"),
        temp("scgi"),
        node.file("bulk").display(),
    );
    let file = node.file("nginx.conf");
    fs::write(&file, config)?;
    let mut command = node.command(need_tool("nginx", "nginx")?);
    command.arg("-c").arg(&file);
    let nginx = node.spawn("nginx", command)?;
    wait_until("nginx serves", PATIENCE, || {
        node.enter(|| std::net::TcpStream::connect((node.ip4(), 80)).is_ok())
    })?;
    Ok(nginx)
}
