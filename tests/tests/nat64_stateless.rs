//! NAT64 without sessions between real peers: a machine without IPv4, and one without IPv6.
//!
//! ```text
//! client (fd00::2, no IPv4)    ─┐             ┌─ router (10.0.0.13) before the way of small packets
//!   seen as 192.0.2.17          ├─ one wire ──┤
//! edge (fd00::10, 10.0.0.10)   ─┘             └─ web (10.0.0.11, no IPv6): nginx
//!   edged, worker nat64
//! ```
//! Addresses of IPv4 lie under 2001:db8:64::/96.

use std::{
    fs,
    io::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use tests::{
    Edge, Lab, Node, Process,
    edge::{find, other_build, program, say},
    lab::need_tool,
    ping::{Echo, ping},
    process, wait_for, wait_until,
};

const PATIENCE: Duration = Duration::from_secs(10);
/// Octets of the file that is fetched.
const BULK: usize = 200 << 20;
const CONFIG: &str = r#"version = 1
[nat64]
mode = "stateless"
prefix = "2001:db8:64::/96"
maps = [{ ipv4 = "192.0.2.17", ipv6 = "fd00::2" }]
address_v4 = "192.0.2.64"
"#;
/// The client as IPv4 sees it.
const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 17);

struct Stage {
    client: Node,
    web: Node,
    router: Node,
    edge: Edge,
    _nginx: Process,
    file: std::path::PathBuf,
    _lab: Lab,
}

impl Stage {
    fn new() -> Result<Self> {
        let lab = Lab::new()?;
        let client = lab.node("client", 2)?;
        let node = lab.node("edge", 10)?;
        let web = lab.node("web", 11)?;
        let router = lab.node("router", 13)?;
        client
            .netns()
            .ip("addr del 10.0.0.2/24 dev eth0\nroute add default via fd00::10")?;
        web.netns()
            .ip("addr del fd00::11/64 dev eth0\nroute add 192.0.2.0/24 via 10.0.0.10")?;
        router.netns().ip("route add 192.0.2.0/24 via 10.0.0.10")?;
        for router in [&node, &router] {
            router.enter(|| -> Result<()> {
                for (key, value) in [
                    ("ipv4/ip_forward", "1"),
                    ("ipv6/conf/all/forwarding", "1"),
                    // All hang on one wire, and nobody is to find a shorter way.
                    ("ipv4/conf/all/send_redirects", "0"),
                    ("ipv4/conf/eth0/send_redirects", "0"),
                    ("ipv4/conf/all/accept_redirects", "0"),
                    ("ipv4/conf/eth0/accept_redirects", "0"),
                ] {
                    fs::write(format!("/proc/sys/net/{key}"), value).with_context(|| key.to_owned())?;
                }
                Ok(())
            })?;
        }
        let file = web.file("bulk");
        write_bulk(&file)?;
        let nginx = nginx(&web)?;
        let edge = Edge::start(&node, CONFIG)?;
        Ok(Self {
            client,
            web,
            router,
            edge,
            _nginx: nginx,
            file,
            _lab: lab,
        })
    }

    /// The web server as IPv6 sees it.
    fn target() -> Ipv6Addr {
        "2001:db8:64::a00:b".parse().expect("an address")
    }

    /// Fetches the file; its digest.
    fn fetch(&self) -> Result<String> {
        self.fetch_at("1G")
    }

    /// Fetches the file no faster than so many octets a second; its digest.
    fn fetch_at(&self, rate: &str) -> Result<String> {
        let mut curl = self.client.command("bash");
        curl.args([
            "-c",
            &format!(
                "set -o pipefail; curl -sS -g --max-time 120 --limit-rate {rate} 'http://[{}]/bulk' | md5sum",
                Self::target()
            ),
        ]);
        let said = say(&mut curl, Duration::from_secs(130))?;
        ensure!(said.code == Some(0), "{said}");
        Ok(said.out.split_whitespace().next().unwrap_or_default().to_owned())
    }

    fn count(&self, side: &str, key: &str) -> Result<u64> {
        let status = self.edge.json(&["nat64", "status"])?;
        let place = match side {
            "" => &status["nat64"],
            side => &status["nat64"][side],
        };
        find(place, key)
            .and_then(Value::as_u64)
            .with_context(|| format!("{side} {key} in {status}"))
    }

    fn wait_for_fetch(&self) -> Result<()> {
        wait_until("the fetch is under way", PATIENCE, || {
            let octets = self.count("ipv4", "received_octets");
            octets.is_ok_and(|octets| octets > 1 << 20)
        })?;
        Ok(())
    }

    fn digest(&self) -> Result<String> {
        let said = say(
            std::process::Command::new("md5sum").arg(&self.file),
            Duration::from_secs(30),
        )?;
        Ok(said.out.split_whitespace().next().unwrap_or_default().to_owned())
    }
}

#[test]
fn a_machine_without_ipv4_fetches_from_one_without_ipv6_by_super_packets() -> Result<()> {
    let stage = Stage::new()?;
    let digest = stage.digest()?;
    assert_eq!(stage.fetch()?, digest);
    let (packets, octets) = (
        stage.count("ipv4", "received")?,
        stage.count("ipv4", "received_octets")?,
    );
    let supers = stage.count("", "super_packets")?;
    println!("{octets} octets from IPv4 in {packets} packets; {supers} super-packets");
    assert!(octets >= BULK as u64, "{octets}");
    let status = stage.edge.json(&["nat64", "status"])?;
    assert_eq!(status["nat64"]["offloads"]["tcp"], true, "{status}");
    assert!(octets / packets > 1500, "no packet was longer than a link's: {status}");
    assert!(supers > packets / 2, "{status}");
    assert_eq!(status["nat64"]["unsent"], 0, "{status}");
    let metrics = stage.edge.metrics()?;
    for line in [
        "edge_nat64_offload{offload=\"tcp-segmentation\"} 1",
        "edge_nat64_dropped_total{reason=\"malformed\"} 0",
        "edge_worker_up{role=\"nat64\"} 1",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    Ok(())
}

#[test]
fn both_sides_ping_each_other_and_every_hop_tells_its_name() -> Result<()> {
    let stage = Stage::new()?;
    let target: IpAddr = Stage::target().into();
    let answer = |kind, from| Some(Echo { from, kind, code: 0 });
    assert_eq!(ping(&stage.client, target, 64, 56)?, answer(129, target));
    assert_eq!(ping(&stage.web, CLIENT.into(), 64, 56)?, answer(0, CLIENT.into()));
    // Nothing in it.
    assert_eq!(ping(&stage.client, target, 64, 0)?, answer(129, target));
    // The edge's kernel, the translator, the edge's kernel again.
    let translator: IpAddr = "2001:db8:64::c000:240".parse()?;
    let kernel: IpAddr = "2001:db8:64::a00:a".parse()?;
    for (hops, from) in [(1, "fd00::10".parse()?), (2, translator), (3, kernel)] {
        assert_eq!(ping(&stage.client, target, hops, 56)?, answer(3, from), "{hops} hops");
    }
    for (hops, from) in [(1, [10, 0, 0, 10].into()), (2, [192, 0, 2, 64].into())] {
        assert_eq!(
            ping(&stage.web, CLIENT.into(), hops, 56)?,
            answer(11, from),
            "{hops} hops"
        );
    }
    // Nobody's address does not come to the translator, and the kernel says so.
    assert_eq!(
        ping(&stage.web, [192, 0, 2, 18].into(), 64, 56)?,
        answer(3, [10, 0, 0, 10].into())
    );
    assert!(stage.count("dropped", "hop_limit")? >= 2);
    Ok(())
}

#[test]
fn a_datagram_in_fragments_goes_there_and_back() -> Result<()> {
    let stage = Stage::new()?;
    let server = stage.web.enter(|| UdpSocket::bind(("10.0.0.11", 7)))?;
    server.set_read_timeout(Some(PATIENCE))?;
    let client = stage.client.enter(|| UdpSocket::bind("[fd00::2]:0"))?;
    client.set_read_timeout(Some(Duration::from_millis(500)))?;
    for size in [1, 1232, 1452, 1453, 4000, 60_000] {
        let sent: Vec<u8> = (0..size).map(|octet: u32| (octet % 253) as u8).collect();
        client.send_to(&sent, (Stage::target(), 7))?;
        let mut room = vec![0; 65_536];
        let (length, from) = server
            .recv_from(&mut room)
            .with_context(|| format!("{size} octets there"))?;
        assert_eq!(from.ip(), IpAddr::from(CLIENT));
        assert!(room[..length] == sent, "{size} octets there");
        // The first that is longer than IPv6 takes is lost, and the server told of the path's MTU.
        let back = wait_for(&format!("{size} octets come back"), PATIENCE, || {
            server.send_to(&sent, from).ok()?;
            client.recv_from(&mut room).ok()
        });
        let (length, from) = back?;
        assert_eq!(from.ip(), IpAddr::from(Stage::target()));
        assert!(room[..length] == sent, "{size} octets back");
    }
    Ok(())
}

#[test]
fn a_path_with_a_small_mtu_is_found_in_either_direction() -> Result<()> {
    let stage = Stage::new()?;
    let digest = stage.digest()?;
    // Towards the client: the edge's own kernel tells the server, through the translator.
    stage
        .edge
        .node()
        .netns()
        .ip("route add fd00::2/128 dev eth0 mtu 1300")?;
    assert_eq!(stage.fetch()?, digest);
    let said = say(
        stage.web.command("ip").args(["route", "get", &CLIENT.to_string()]),
        PATIENCE,
    )?;
    ensure!(said.out.contains("mtu 1280"), "the server has not learnt it: {said}");
    // Forgotten again: the server would ask for short segments.
    stage
        .edge
        .node()
        .netns()
        .ip("route del fd00::2/128 dev eth0 mtu 1300")?;
    stage.web.netns().ip("route flush cache")?;
    // Towards the server: a router in between, which the client is told of.
    stage.edge.node().netns().ip("route add 10.0.0.11/32 via 10.0.0.13")?;
    stage.router.netns().ip("route add 10.0.0.11/32 dev eth0 mtu 1300")?;
    let mut curl = stage.client.command("curl");
    curl.args([
        "-sS",
        "-g",
        "--max-time",
        "60",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code} %{size_upload}",
        "-T",
    ])
    .arg(&stage.file)
    .arg(format!("http://[{}]/upload", Stage::target()));
    let said = say(&mut curl, Duration::from_secs(70))?;
    ensure!(said.code == Some(0) && said.out == format!("201 {BULK}"), "{said}");
    let said = say(
        stage
            .client
            .command("ip")
            .args(["-6", "route", "get", &Stage::target().to_string()]),
        PATIENCE,
    )?;
    ensure!(said.out.contains("mtu 1320"), "the client has not learnt it: {said}");
    Ok(())
}

#[test]
fn a_worker_that_is_killed_costs_a_moment_and_no_connection() -> Result<()> {
    let stage = Stage::new()?;
    let digest = stage.digest()?;
    let target: IpAddr = Stage::target().into();
    let before = stage.edge.worker("nat64")?;
    let fetched = std::thread::scope(|scope| -> Result<String> {
        let fetch = scope.spawn(|| stage.fetch_at("60M"));
        stage.wait_for_fetch()?;
        process::signal(before, Signal::KILL)?;
        stage.edge.wait_for_new_worker("nat64", before, PATIENCE)?;
        fetch.join().expect("no panic")
    })?;
    assert_eq!(fetched, digest);
    assert!(ping(&stage.client, target, 64, 56)?.is_some_and(|echo| echo.kind == 129));
    // A reload that is about something else, and one of the maps.
    let other = CONFIG.replace("192.0.2.17", "192.0.2.99");
    let said = stage.edge.apply(&other)?;
    ensure!(said.code == Some(0), "{said}");
    assert!(ping(&stage.web, [192, 0, 2, 99].into(), 64, 56)?.is_some_and(|echo| echo.kind == 0));
    assert!(ping(&stage.web, CLIENT.into(), 64, 56)?.is_some_and(|echo| echo.kind == 3));
    let routes = || -> Result<String> {
        let mut ip = stage.edge.node().command("ip");
        Ok(say(ip.args(["route", "show", "dev", "nat64"]), PATIENCE)?.out)
    };
    assert_eq!(routes()?.trim(), "192.0.2.99 proto static scope link");
    // One that is refused leaves everything as it was.
    let taken = CONFIG
        .replace("192.0.2.17\"", "10.0.0.0/24\"")
        .replace("fd00::2\"", "fd01::/120\"");
    let said = stage.edge.apply(&taken)?;
    ensure!(
        said.code == Some(2) && said.err.contains("go elsewhere already"),
        "{said}"
    );
    assert_eq!(routes()?.trim(), "192.0.2.99 proto static scope link");
    // Another device, and none.
    let said = stage
        .edge
        .apply(&CONFIG.replace("[nat64]", "[nat64]\ndevice = \"siit\""))?;
    ensure!(said.code == Some(0), "{said}");
    assert!(ping(&stage.client, target, 64, 56)?.is_some_and(|echo| echo.kind == 129));
    assert!(routes().is_err() || routes()?.is_empty());
    let said = stage.edge.apply("version = 1\n")?;
    ensure!(said.code == Some(0), "{said}");
    let links = say(stage.edge.node().command("ip").args(["-brief", "link"]), PATIENCE)?;
    assert!(!links.out.contains("siit") && !links.out.contains("nat64"), "{links}");
    Ok(())
}

#[test]
fn an_upgrade_keeps_the_device_and_every_connection_over_it() -> Result<()> {
    let stage = Stage::new()?;
    let digest = stage.digest()?;
    let node = stage.edge.node();
    let index = || -> Result<String> {
        let shown = say(
            node.command("ip").args(["-o", "link", "show", "dev", "nat64"]),
            PATIENCE,
        )?;
        Ok(shown.out.split(':').next().unwrap_or_default().to_owned())
    };
    let other = other_build(&program("edged")?, &node.file("other"))?;
    let (device, worker) = (index()?, stage.edge.worker("nat64")?);
    let fetched = std::thread::scope(|scope| -> Result<String> {
        let fetch = scope.spawn(|| stage.fetch_at("60M"));
        stage.wait_for_fetch()?;
        stage.edge.upgraded(&other)?;
        fetch.join().expect("no panic")
    })?;
    assert_eq!(fetched, digest);
    assert_ne!(stage.edge.worker("nat64")?, worker);
    assert_eq!(index()?, device, "the same device");
    let builds = stage.edge.builds()?;
    assert!(builds.iter().all(|(_, build)| *build == builds[0].1), "{builds:?}");
    // The next supervisor knows it as its own: it can be changed, and goes when it is not wanted.
    let said = stage.edge.apply(&CONFIG.replace("192.0.2.17", "192.0.2.99"))?;
    ensure!(said.code == Some(0), "{said}");
    assert!(ping(&stage.web, [192, 0, 2, 99].into(), 64, 56)?.is_some_and(|echo| echo.kind == 0));
    let said = stage.edge.apply("version = 1\n")?;
    ensure!(said.code == Some(0), "{said}");
    assert!(index()?.is_empty());
    Ok(())
}

/// Octets that do not repeat where a packet ends.
fn write_bulk(file: &std::path::Path) -> Result<()> {
    let mut out = std::io::BufWriter::new(fs::File::create(file)?);
    let mut word = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..BULK / 8 {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        out.write_all(&word.to_ne_bytes())?;
    }
    Ok(out.flush()?)
}

/// nginx on port 80 of IPv4, which gives the file out and takes others.
fn nginx(node: &Node) -> Result<Process> {
    let folder = node.file("bulk").with_file_name("");
    let temp = |kind: &str| format!("{kind}_temp_path {};", node.file(&format!("nginx-{kind}")).display());
    let config = format!(
        "daemon off; user root; worker_processes 1; pid {}; error_log {};\n\
         events {{}}\n\
         http {{ access_log off; sendfile on; client_max_body_size 0; {} {} {} {} {}\n\
         server {{ listen 80; root {}; location = /bulk {{ alias {}; }}\n\
         location = /upload {{ dav_methods PUT; alias {}; }} }} }}\n",
        node.file("nginx.pid").display(),
        node.file("nginx-errors.log").display(),
        temp("client_body"),
        temp("proxy"),
        temp("fastcgi"),
        temp("uwsgi"),
        temp("scgi"),
        folder.display(),
        node.file("bulk").display(),
        node.file("uploaded").display(),
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
