//! Part `nat64`: a node without IPv4 uses a server that has nothing else, by name.
//!
//! ```text
//! node (fd00::21): no IPv4 ── edge (fd00::10, 10.0.0.10): edged ── shop (8.8.4.4): nginx, HTTP and HTTPS, no IPv6
//!   curl, ping                  DNS64 and NAT64, seen as 203.0.113.7    upstream (fd00::12): named, example.org
//! ```

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::process::Signal;
use tests::{
    Edge, Lab, Node, Process,
    dns::{self, Named, with_resolver},
    edge::{Said, say},
    lab::need_tool,
    ping::ping,
    process, tls, wait_until,
};

use crate::{Story, human};

/// An address that is in nobody's documentation: those the well-known prefix must not stand for (RFC 6052 §3.1).
const SHOP: Ipv4Addr = Ipv4Addr::new(8, 8, 4, 4);
const POOL: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);
const PATIENCE: Duration = Duration::from_secs(10);
/// Octets of the large file.
const BULK: u64 = 1 << 30;

pub(crate) fn run(story: &mut Story) -> Result<()> {
    let stage = Stage::build(story)?;
    stage.fetch(story)?;
    stage.probe(story)?;
    stage.narrow(story)?;
    stage.bulk(story)
}

struct Stage {
    edge: Edge,
    resolver: SocketAddr,
    node: Node,
    shop: Node,
    ca: std::path::PathBuf,
    _nginx: Process,
    _named: Named,
    _lab: Lab,
}

impl Stage {
    fn build(story: &mut Story) -> Result<Self> {
        let lab = Lab::alone()?;
        let (shop, upstream) = (lab.node("shop", 11)?, lab.node("upstream", 12)?);
        let (edge, node) = (lab.node("edge", 10)?, lab.node("node", 21)?);
        let named = Named::start(&upstream, &[("example.org", "", "shop A 8.8.4.4")])?;
        story.event("nginx starts on shop, which has the address 8.8.4.4 and no IPv6");
        shop.netns()
            .ip("addr add 8.8.4.4/32 dev lo\naddr del fd00::11/64 dev eth0\nroute add 203.0.113.0/24 via 10.0.0.10")?;
        let ca = tls::Ca::new("demo")?;
        let ca_file = node.file("ca.crt");
        ca.write(&ca_file)?;
        let files = ca
            .issue("shop.example.org", None, &[], &["shop.example.org"])?
            .write(&shop.file("shop"))?;
        let nginx = nginx(&shop, &files)?;
        story.event("node loses its IPv4 addresses, that of the loopback included, and sends everything to edge");
        node.netns()
            .ip("addr del 10.0.0.21/24 dev eth0\naddr del 127.0.0.1/8 dev lo\nroute add default via fd00::10")?;
        edge.netns().ip("route add 8.8.4.4/32 via 10.0.0.11")?;
        edge.enter(|| -> Result<()> {
            for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                fs::write(format!("/proc/sys/net/{key}"), "1").with_context(|| key.to_owned())?;
            }
            Ok(())
        })?;
        let resolver = edge.at(dns::PORT);
        story.event(format!("edged starts: DNS64 on {resolver}, NAT64 as 203.0.113.7"));
        let config = format!(
            "version = 1\n\n[dns64]\nlisten = [\"{resolver}\"]\nupstreams = [\"udp://{}\"]\nallow = [\"fd00::/64\"]\n\n\
             [nat64]\npool = [{{ address = \"203.0.113.7\", ports = \"1024-65535\" }}]\nclients = [\"fd00::/64\"]\n",
            upstream.at(dns::PORT)
        );
        let edge = Edge::start(&edge, &config)?;
        Ok(Self {
            edge,
            resolver,
            node,
            shop,
            ca: ca_file,
            _nginx: nginx,
            _named: named,
            _lab: lab,
        })
    }

    /// The shop as IPv6 sees it.
    fn target() -> Ipv6Addr {
        "64:ff9b::808:404".parse().expect("an address")
    }

    fn curl(&self, arguments: &[&str]) -> Result<Said> {
        let ca = self.ca.display().to_string();
        let command = [&["curl", "-sS", "--max-time", "60", "--cacert", &ca], arguments].concat();
        say(
            &mut with_resolver(&self.node, self.resolver, &command)?,
            Duration::from_secs(70),
        )
    }

    fn fetch(&self, story: &mut Story) -> Result<()> {
        story.event("(a) node fetches from shop.example.org, which has IPv4 only");
        for url in ["http://shop.example.org/", "https://shop.example.org/"] {
            let said = self.curl(&["-w", " from %{remote_ip}", url])?;
            story.claim(
                said.code == Some(0) && said.out.contains("welcome") && said.out.contains("64:ff9b::808:404"),
                format!("curl {url}: {}", said.out.replace('\n', "")),
            );
        }
        let log = fs::read_to_string(self.shop.file("access.log"))?;
        let seen: Vec<&str> = log.lines().filter_map(|line| line.split_whitespace().next()).collect();
        story.claim(
            seen == [POOL.to_string(), POOL.to_string()],
            format!("the shop has seen {}", seen.join(" and ")),
        );
        let sessions = self.edge.ctl(&["nat64", "sessions"])?;
        story.event("edgectl nat64 sessions");
        story.note(&sessions.out);
        story.claim(
            sessions.code == Some(0) && sessions.out.contains("8.8.4.4:443"),
            "the operator sees who speaks with whom",
        );
        let refused = self.curl(&["--max-time", "5", "-g", "http://[64:ff9b::0a00:000a]/"])?;
        story.claim(
            refused.code == Some(7),
            format!(
                "the edge itself, by its IPv4 address, is refused at once: {}",
                refused.err.trim()
            ),
        );
        Ok(())
    }

    fn probe(&self, story: &mut Story) -> Result<()> {
        story.event("(b) node pings shop, and asks every hop for its name");
        let target: IpAddr = Self::target().into();
        let echo = ping(&self.node, target, 64, 56)?;
        story.claim(
            echo.is_some_and(|echo| echo.kind == 129 && echo.from == target),
            format!("ping {target}: an answer"),
        );
        let mut hops = Vec::new();
        for number in 1..=4 {
            let Some(echo) = ping(&self.node, target, number, 56)? else {
                break;
            };
            hops.push(echo.from.to_string());
            if echo.kind == 129 {
                break;
            }
        }
        story.note(hops.join(" → "));
        story.claim(
            hops.len() == 4 && hops.last().is_some_and(|last| *last == target.to_string()),
            "the way has four hops: the edge, the translator, the edge again, the shop",
        );
        Ok(())
    }

    fn narrow(&self, story: &mut Story) -> Result<()> {
        story.event("(c) the way behind the edge takes 1300 octets at once");
        let netns = self.edge.node().netns();
        netns.ip("route replace 8.8.4.4/32 via 10.0.0.11 mtu lock 1300")?;
        let file = self.node.file("upload");
        fs::write(&file, vec![7; 20 << 20])?;
        let said = self.curl(&[
            "-o",
            "/dev/null",
            "-w",
            "%{http_code} %{size_upload}",
            "-T",
            &file.display().to_string(),
            "http://shop.example.org/upload",
        ])?;
        story.claim(
            said.code == Some(0) && (said.out == "201 20971520" || said.out == "204 20971520"),
            format!("20 MiB are uploaded all the same: {}", said.out),
        );
        let mut route = self.node.command("ip");
        route.args(["-6", "route", "get", &Self::target().to_string()]);
        let route = say(&mut route, PATIENCE)?;
        story.claim(
            route.out.contains("mtu 1320"),
            "node has been told: its path to the shop takes 1320 octets of IPv6",
        );
        netns.ip("route replace 8.8.4.4/32 via 10.0.0.11")?;
        Ok(())
    }

    fn bulk(&self, story: &mut Story) -> Result<()> {
        story.event("(d) node fetches 1 GiB, and the translator is killed on the way");
        let expected = digest(&mut {
            let mut command = std::process::Command::new("md5sum");
            command.arg(self.shop.file("bulk"));
            command
        })?;
        let worker = self.edge.worker("nat64")?;
        let begin = Instant::now();
        let (fetched, took) = std::thread::scope(|scope| -> Result<(String, Duration)> {
            let fetch = scope.spawn(|| -> Result<(String, Duration)> {
                let pipe = "set -o pipefail; curl -sS --max-time 120 http://shop.example.org/bulk | md5sum";
                let mut command = with_resolver(&self.node, self.resolver, &["bash", "-c", pipe])?;
                Ok((digest(&mut command)?, begin.elapsed()))
            });
            wait_until("it is under way", PATIENCE, || {
                let status = self.edge.json(&["nat64", "status"]).ok();
                let octets = status.and_then(|status| status["nat64"]["ipv4"]["received_octets"].as_u64());
                octets.is_some_and(|octets| octets > BULK / 20)
            })?;
            process::signal(worker, Signal::KILL)?;
            fetch.join().expect("no panic")
        })?;
        let rate = BULK as f64 * 8.0 / took.as_secs_f64() / 1e9;
        story.note(format!("{} for 1 GiB with a kill, {rate:.1} Gbit/s", human(took)));
        story.claim(fetched == expected, format!("every octet is right: md5 {fetched}"));
        let now = self.edge.wait_for_new_worker("nat64", worker, PATIENCE)?;
        story.claim(now != worker, "by another worker, which went on with the connection");
        Ok(())
    }
}

fn digest(command: &mut std::process::Command) -> Result<String> {
    let said = say(command, Duration::from_secs(130))?;
    Ok(said.out.split_whitespace().next().unwrap_or(&said.err).to_owned())
}

/// nginx for HTTP and HTTPS, with a page, a large file, and a place for uploads.
fn nginx(node: &Node, files: &tls::Files) -> Result<Process> {
    let bulk = node.file("bulk");
    let mut made = std::process::Command::new("dd");
    made.args([
        "if=/dev/urandom",
        "bs=1M",
        "count=1024",
        "iflag=fullblock",
        "status=none",
    ])
    .arg(format!("of={}", bulk.display()));
    say(&mut made, Duration::from_secs(60))?;
    let temp = |kind: &str| format!("{kind}_temp_path {};", node.file(&format!("nginx-{kind}")).display());
    let config = format!(
        "daemon off; user root; worker_processes 1; pid {}; error_log {};\n\
         events {{}}\n\
         http {{ access_log {}; sendfile on; client_max_body_size 0; {} {} {} {} {}\n\
         server {{ listen 80; listen 443 ssl; ssl_certificate {}; ssl_certificate_key {};\n\
         location / {{ return 200 \"welcome\\n\"; }}\n\
         location = /bulk {{ alias {}; }}\n\
         location = /upload {{ dav_methods PUT; alias {}; }} }} }}\n",
        node.file("nginx.pid").display(),
        node.file("nginx-errors.log").display(),
        node.file("access.log").display(),
        temp("client_body"),
        temp("proxy"),
        temp("fastcgi"),
        temp("uwsgi"),
        temp("scgi"),
        files.cert.display(),
        files.key.display(),
        bulk.display(),
        node.file("uploaded").display(),
    );
    let file = node.file("nginx.conf");
    fs::write(&file, config)?;
    let mut command = node.command(need_tool("nginx", "nginx")?);
    command.arg("-c").arg(&file);
    let nginx = node.spawn("nginx", command)?;
    wait_until("nginx serves", PATIENCE, || {
        node.enter(|| std::net::TcpStream::connect((SHOP, 80)).is_ok())
    })?;
    Ok(nginx)
}
