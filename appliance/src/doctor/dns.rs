//! The resolver: whether it answers, whether its upstreams do, and who else wants its port.

use std::{
    hash::{BuildHasher, RandomState},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use dns64::status::{Answer, Group, Request, Status as Dns};
use tokio::time::timeout;

use super::Findings;
use crate::{
    api::Status,
    cli::{dns::domain, status::DNS_ROLE},
    client::Client,
    config::Config,
};

/// For one answer from this machine itself.
const PATIENCE: Duration = Duration::from_secs(1);
/// A datagram may be lost.
const TRIES: usize = 2;
/// Where systemd-resolved listens.
const STUBS: [Ipv4Addr; 2] = [Ipv4Addr::new(127, 0, 0, 53), Ipv4Addr::new(127, 0, 0, 54)];

/// The name that every DNS64 has an answer to (RFC 7050), AAAA, class IN, RD; the id is put in front.
const QUESTION: &[u8] = b"\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x08ipv4only\x04arpa\x00\x00\x1c\x00\x01";

/// What became of a question.
#[derive(Debug)]
enum Probe {
    Answered,
    /// Answered, and not as it should be.
    Wrong(String),
    Silent,
    Failed(io::Error),
}

/// Looks at the resolver that runs. `config` is that of the file, which may be another.
pub(super) async fn run(findings: &mut Findings, client: &Client, status: &Status, config: Option<&Config>) {
    findings.category = "resolver";
    let wanted = config.and_then(|config| config.dns64.as_ref());
    if let Some(dns) = &status.dns {
        listeners(findings, client, dns).await;
        upstreams(findings, &dns.upstreams);
        zones(findings, dns);
    } else if status.workers.iter().any(|worker| worker.role == DNS_ROLE) {
        findings.problem(
            "the resolver does not answer edged",
            "nodes without IPv4 may find no name",
            "journalctl -u edged -n 100",
        );
    }
    let runs = |address: &SocketAddr| status.dns.as_ref().is_some_and(|dns| dns.listen.contains(address));
    let listen = wanted.iter().flat_map(|dns64| &dns64.listen).map(|at| at.value);
    findings.category = "ports";
    ports(findings, listen.filter(|address| !runs(address)));
}

async fn listeners(findings: &mut Findings, client: &Client, dns: &Dns) {
    let synthesises = !dns.prefixes.is_empty();
    let probes: Vec<_> = dns
        .listen
        .iter()
        .map(|address| (*address, tokio::spawn(probe(*address, synthesises))))
        .collect();
    let mut silent = Vec::new();
    for (address, probe) in probes {
        match probe.await {
            Ok(Probe::Answered) => findings.ok(format!("{address} answers")),
            Ok(Probe::Wrong(what)) => findings.problem(
                format!("{address} answers {what} to ipv4only.arpa AAAA"),
                "nodes without IPv4 cannot tell the NAT64 prefix, nor find what has IPv4 only",
                "edgectl dns trace ipv4only.arpa",
            ),
            Ok(Probe::Silent) => silent.push(address),
            Ok(Probe::Failed(error)) => findings.problem(
                format!("{address} cannot be asked: {error}"),
                "nodes may find no name",
                "ip address show; edgectl dns status",
            ),
            Err(_) => {}
        }
    }
    if silent.is_empty() {
        return;
    }
    // Who may not ask gets silence, too.
    let request = client.post("/v1/dns", &Request::Status).await;
    let now = request
        .ok()
        .and_then(|value| serde_json::from_value::<Answer>(value).ok());
    let denied = matches!(now, Some(Answer::Status(now)) if now.udp.denied > dns.udp.denied);
    for address in silent {
        if denied {
            findings.unknown(
                format!("{address} does not answer, and turned somebody away meanwhile"),
                "whether it answers nodes cannot be told from this machine if it may not ask",
                format!(
                    "on a node: dig @{} -p {} ipv4only.arpa AAAA; or name this machine in allow",
                    address.ip(),
                    address.port()
                ),
            );
        } else {
            findings.problem(
                format!("{address} does not answer"),
                "nodes that ask there find no name",
                "edgectl dns status; sudo nft list ruleset; journalctl -u edged -n 100",
            );
        }
    }
}

fn upstreams(findings: &mut Findings, groups: &[Group]) {
    for group in groups {
        let all = group.servers.len();
        let down: Vec<_> = group.servers.iter().filter(|server| server.state == "down").collect();
        let name = domain(group);
        let why = if down.len() == all {
            "nobody is left to ask: only what is known is answered, as long as it may be".to_owned()
        } else {
            format!("{} of {all} for {name} are left", all - down.len())
        };
        for server in &down {
            let error = server.last_error.as_ref().map(|error| format!(": {error}"));
            findings.problem(
                format!("upstream {} is down{}", server.url, error.unwrap_or_default()),
                &why,
                "edgectl dns status; whether this machine reaches it: ip route get ADDRESS; ping ADDRESS",
            );
        }
        if down.is_empty() && all > 0 {
            findings.ok(format!("{all}/{all} upstreams for {name}"));
        }
        let count = |name: &str| -> u64 {
            let counts = group.servers.iter().flat_map(|server| &server.counts);
            counts.filter(|(known, _)| known == name).map(|(_, times)| times).sum()
        };
        let floods = count("floods");
        if floods > 0 {
            findings.hint(
                format!("{floods} questions for {name} were flooded with false replies"),
                "somebody tries to guess replies; none was accepted, such questions went by TCP",
                "edgectl dns status; use tls:// upstreams",
            );
        }
    }
}

fn zones(findings: &mut Findings, dns: &Dns) {
    for zone in &dns.zones {
        for (node, why) in &zone.left_out {
            findings.problem(
                format!("{node} is registered and not served: {why}"),
                "the configuration was changed after the node had registered",
                "edgectl config diff; change the zone back, or let the node register anew",
            );
        }
    }
    if dns.udp.dropped > 0 {
        findings.hint(
            format!("{} questions found the queue full", dns.udp.dropped),
            "more came than upstreams answer, and such clients ask again",
            "edgectl dns status",
        );
    }
}

/// Whether anything else has what `listen` is to be. All of a port's sockets can be seen without rights.
pub(super) fn ports(findings: &mut Findings, listen: impl Iterator<Item = SocketAddr>) {
    let taken: Vec<SocketAddr> = ["udp", "udp6", "tcp", "tcp6"]
        .into_iter()
        .flat_map(|table| {
            let text = std::fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default();
            sockets(&text, table.starts_with("tcp"))
        })
        .collect();
    for address in listen {
        match conflict(address, &taken) {
            Some(other) if is_stub(other) => findings.problem(
                format!("systemd-resolved has {other}, which is part of {address}"),
                "edged cannot listen there",
                "listen on single addresses, or write DNSStubListener=no into /etc/systemd/resolved.conf and: \
                 sudo systemctl restart systemd-resolved",
            ),
            Some(other) => findings.problem(
                format!("{address} is in use: something else has {other}"),
                "edged cannot listen there",
                format!("see by whom: sudo ss -ltunp 'sport = :{}'", address.port()),
            ),
            None if is_nowhere(address.ip()) => findings.hint(
                format!("no interface has the address {}", address.ip()),
                "nobody reaches a listener there until one has it",
                "ip address show",
            ),
            None => findings.ok(format!("{address} is free")),
        }
    }
}

fn is_stub(address: SocketAddr) -> bool {
    STUBS.iter().any(|stub| address.ip() == IpAddr::V4(*stub))
}

/// Any port will do to find out, and needs no right.
fn is_nowhere(address: IpAddr) -> bool {
    UdpSocket::bind((address, 0)).is_err_and(|error| error.kind() == io::ErrorKind::AddrNotAvailable)
}

/// The first of `taken` that keeps others from `wanted`: the same port, and the same address or all of them on either
/// side. Listeners of edged for IPv6 leave IPv4 alone.
fn conflict(wanted: SocketAddr, taken: &[SocketAddr]) -> Option<SocketAddr> {
    let clashes = |other: &&SocketAddr| {
        let all = wanted.ip().is_unspecified() || other.ip().is_unspecified();
        other.port() == wanted.port() && other.is_ipv4() == wanted.is_ipv4() && (all || other.ip() == wanted.ip())
    };
    taken.iter().find(clashes).copied()
}

/// Local addresses in the text of a table in /proc/net (proc_net_tcp.rst): of listeners, or of sockets for datagrams.
fn sockets(text: &str, tcp: bool) -> Vec<SocketAddr> {
    let socket = |line: &str| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (address, port) = fields.next()?.split_once(':')?;
        let listens = fields.nth(1)? == "0A";
        let port = u16::from_str_radix(port, 16).ok()?;
        // Words as they are in memory, each printed as a number.
        let word = |at: usize| {
            let digits = address.get(at * 8..at * 8 + 8)?;
            Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
        };
        let ip = match address.len() {
            8 => IpAddr::from(word(0)?),
            32 => {
                let mut octets = [0; 16];
                for (at, part) in octets.chunks_exact_mut(4).enumerate() {
                    part.copy_from_slice(&word(at)?);
                }
                IpAddr::from(octets)
            }
            _ => return None,
        };
        (listens || !tcp).then_some(SocketAddr::new(ip, port))
    };
    text.lines().skip(1).filter_map(socket).collect()
}

/// Asks as a node does.
async fn probe(address: SocketAddr, synthesises: bool) -> Probe {
    exchange(address, synthesises)
        .await
        .unwrap_or_else(|error| match error.kind() {
            // Nobody is there, says the kernel.
            io::ErrorKind::ConnectionRefused => Probe::Silent,
            _ => Probe::Failed(error),
        })
}

async fn exchange(address: SocketAddr, synthesises: bool) -> io::Result<Probe> {
    let here: IpAddr = match address.ip() {
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    let any: IpAddr = match address.ip() {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let mut target = address;
    if address.ip().is_unspecified() {
        target.set_ip(here);
    }
    let socket = tokio::net::UdpSocket::bind((any, 0)).await?;
    socket.connect(target).await?;
    let [a, b, ..] = RandomState::new().hash_one(address).to_ne_bytes();
    let query = [&[a, b], QUESTION].concat();
    for _ in 0..TRIES {
        socket.send(&query).await?;
        let heard = async {
            let mut reply = [0; 1232];
            loop {
                let length = socket.recv(&mut reply).await?;
                let reply = reply.get(..length).unwrap_or_default();
                if let Some(probe) = judge([a, b], reply, synthesises) {
                    return Ok(probe);
                }
            }
        };
        if let Ok(probe) = timeout(PATIENCE, heard).await {
            return probe;
        }
    }
    Ok(Probe::Silent)
}

/// `None` if `reply` is none to the question with this id.
fn judge(id: [u8; 2], reply: &[u8], synthesises: bool) -> Option<Probe> {
    let (head, _) = reply.split_at_checked(12)?;
    if !head.starts_with(&id) || head[2] & 0x80 == 0 {
        return None;
    }
    let answers = u16::from_be_bytes([head[6], head[7]]);
    Some(match head[3] & 15 {
        0 if answers > 0 || !synthesises => Probe::Answered,
        0 => Probe::Wrong("without a record".into()),
        2 => Probe::Wrong("SERVFAIL".into()),
        3 => Probe::Wrong("NXDOMAIN".into()),
        5 => Probe::Wrong("REFUSED".into()),
        code => Probe::Wrong(format!("with code {code}")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_read_as_the_kernel_prints_them() {
        if cfg!(target_endian = "big") {
            return;
        }
        let tcp = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
                   0: 3500007F:0035 00000000:0000 0A 00000000:00000000 00:00000000 00000000   101        0 20\n   \
                   1: 0100007F:0035 0100007F:C350 01 00000000:00000000 00:00000000 00000000   101        0 21\n";
        assert_eq!(sockets(tcp, true), ["127.0.0.53:53".parse().expect("good")]);
        let udp6 = "  sl  local_address                         remote_address                        st\n  \
                    7: 0D000DFD000000000000000001000000:0035 00000000000000000000000000000000:0000 07\n  8: junk\n";
        assert_eq!(sockets(udp6, false), ["[fd0d:d::1]:53".parse().expect("good")]);
    }

    #[test]
    fn the_stub_of_systemd_is_in_nobodys_way_but_in_that_of_all_addresses() {
        let socket = |text: &str| text.parse::<SocketAddr>().expect("good");
        let taken = ["127.0.0.53:53", "127.0.0.54:53", "[::1]:5353"].map(socket);
        for free in ["127.0.0.1:53", "[::1]:53", "[fd0d::1]:53", "[::]:53", "0.0.0.0:5353"] {
            assert_eq!(conflict(socket(free), &taken), None, "{free}");
        }
        assert_eq!(conflict(socket("0.0.0.0:53"), &taken), Some(taken[0]));
        assert_eq!(conflict(socket("[::]:5353"), &taken), Some(taken[2]));
        assert_eq!(
            conflict(socket("[fd0d::1]:53"), &[socket("[::]:53")]),
            Some(socket("[::]:53"))
        );
        assert!(is_stub(taken[1]) && !is_stub(taken[2]));
    }

    #[tokio::test]
    async fn a_listener_is_asked_as_a_node_asks_and_false_replies_are_passed_over() {
        let server = tokio::net::UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        let address = server.local_addr().expect("an address");
        let serve = async {
            let mut query = [0; 512];
            let (length, client) = server.recv_from(&mut query).await.expect("asked");
            assert_eq!(&query[2..length], QUESTION);
            let mut reply = query[..length].to_vec();
            (reply[2], reply[7]) = (0x81, 2);
            let mut false_reply = reply.clone();
            false_reply[0] ^= 1;
            for reply in [&query[..length], &false_reply, &reply] {
                server.send_to(reply, client).await.expect("sent");
            }
        };
        let (probe, ()) = tokio::join!(probe(address, true), serve);
        assert!(matches!(probe, Probe::Answered), "{probe:?}");
        drop(server);
        assert!(
            matches!(super::probe(address, true).await, Probe::Silent),
            "nobody is there"
        );
    }

    #[test]
    fn a_reply_counts_only_with_its_id_and_its_records() {
        let reply = |flags: u8, code: u8, answers: u8| [7, 9, flags, code, 0, 1, 0, answers, 0, 0, 0, 0];
        let judged = |reply: &[u8]| judge([7, 9], reply, true);
        assert!(matches!(judged(&reply(0x81, 0x80, 2)), Some(Probe::Answered)));
        assert!(matches!(judged(&reply(0x81, 0x80, 0)), Some(Probe::Wrong(_))));
        assert!(matches!(
            judge([7, 9], &reply(0x81, 0x80, 0), false),
            Some(Probe::Answered)
        ));
        assert!(matches!(judged(&reply(0x81, 0x82, 0)), Some(Probe::Wrong(code)) if code == "SERVFAIL"));
        assert!(judged(&reply(0x01, 0, 2)).is_none(), "a question is no answer");
        assert!(judge([7, 8], &reply(0x81, 0x80, 2), true).is_none());
        assert!(judged(&[7, 9, 0x81]).is_none());
    }
}
