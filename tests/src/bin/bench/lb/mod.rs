//! The balancer benchmark: what a connection, a GiB and an idle session cost, for `edged` and its peers.
//!
//! ```text
//! for each round:  restart all -> for each measurement: for each peer, in rotated order: measure
//! at the end:      system calls under strace, which slows everything and so stays apart from all timing
//! ```
//! Order within a measurement rotates by round, so that no peer always comes first or always follows the same one.

pub(crate) mod backend;
pub(crate) mod client;
pub(crate) mod peer_tokio;
mod peers;
mod proxy;
mod report;
mod wire;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::Path,
    process::{Command, ExitCode, Stdio},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use self::{
    peers::{Group, Peer},
    report::{Figure, Report, Way},
};
use crate::{
    options,
    procs::{Strace, pss_kib},
    running::Running,
    session::{Client, Measured, millis},
    tally::{Machine, Named},
};

/// What is measured in one go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Metric {
    /// Idle sessions; first, on processes that have just been started.
    Memory,
    /// New connections: rate, latency, CPU.
    Connections,
    /// Bulk: rate, CPU; up and down, 1 and 4 streams.
    Bulk,
    /// System calls per connection.
    Syscalls,
}

impl Metric {
    const ALL: [Self; 4] = [Self::Memory, Self::Connections, Self::Bulk, Self::Syscalls];
}

impl Named for Metric {
    fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Connections => "connections",
            Self::Bulk => "bulk",
            Self::Syscalls => "syscalls",
        }
    }
}

/// How much of everything.
#[derive(Clone, Copy, Debug)]
struct Amount {
    /// Connections in flight at a time.
    in_flight: u64,
    /// Length of a measurement of new connections.
    exchange: Duration,
    /// A measurement of bulk data ends after so many bytes in all its streams ...
    bulk_bytes: u64,
    /// ... or after so long.
    bulk: Duration,
    /// Idle sessions held.
    sessions: u64,
    /// Connections counted by strace.
    traced: u64,
}

const FULL: Amount = Amount {
    in_flight: 64,
    exchange: Duration::from_secs(4),
    bulk_bytes: 3 << 30,
    bulk: Duration::from_millis(2500),
    sessions: 8000,
    traced: 2000,
};

const QUICK: Amount = Amount {
    exchange: Duration::from_secs(1),
    bulk_bytes: 1 << 30,
    bulk: Duration::from_millis(600),
    sessions: 2000,
    traced: 500,
    ..FULL
};

/// The command line of `bench lb`.
#[derive(Debug)]
pub(crate) struct Options {
    common: options::Common,
    metrics: BTreeSet<Metric>,
    peers: BTreeSet<Peer>,
}

impl Options {
    /// Reads the arguments after `bench lb`.
    pub(crate) fn parse(args: &[String]) -> Result<Self> {
        let mut chosen = (BTreeSet::new(), BTreeSet::new());
        let mut extra = BTreeSet::new();
        let common = options::parse(args, |key, value| {
            match key {
                "--only" => value.split(',').try_for_each(|word| only(word, &mut chosen))?,
                "--peer" => {
                    let peer = Peer::EXTRA.into_iter().find(|peer| peer.name() == value);
                    extra.insert(peer.with_context(|| format!("--peer adds haproxy-pipes or tokio, not \"{value}\""))?);
                }
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        let (metrics, peers) = chosen;
        let mut options = Self { common, metrics, peers };
        if options.metrics.is_empty() {
            options.metrics.extend(Metric::ALL);
        }
        if options.peers.is_empty() {
            options
                .peers
                .extend(Peer::ALL.into_iter().filter(|peer| !Peer::EXTRA.contains(peer)));
        }
        options.peers.append(&mut extra);
        Ok(options)
    }

    /// Refuses to begin without the programs that will be needed.
    pub(crate) fn check_tools(&self) -> Result<()> {
        for peer in &self.peers {
            peer.version()?;
        }
        let mut tools = vec!["mount", "ip"];
        if self.metrics.contains(&Metric::Syscalls) {
            tools.push("strace");
        }
        for tool in tools {
            // Whether it starts is all that is asked.
            Command::new(tool)
                .arg("-V")
                .stdin(Stdio::null())
                .output()
                .with_context(|| {
                    format!("cannot run {tool}; install it (Debian: apt-get install mount iproute2 strace)")
                })?;
        }
        ensure!(
            Path::new("/proc/self/smaps_rollup").exists(),
            "this kernel has no smaps_rollup; Linux 4.14 or later is needed"
        );
        Ok(())
    }

    /// Those with a process of their own.
    fn balancers(&self) -> impl Iterator<Item = Peer> + '_ {
        self.peers.iter().copied().filter(|peer| *peer != Peer::Direct)
    }
}

/// Adds what a word of `--only` means.
fn only(word: &str, (metrics, peers): &mut (BTreeSet<Metric>, BTreeSet<Peer>)) -> Result<()> {
    if let Some(metric) = Metric::ALL.into_iter().find(|metric| metric.name() == word) {
        metrics.insert(metric);
    } else if let Some(peer) = Peer::ALL.into_iter().find(|peer| peer.name() == word) {
        peers.insert(peer);
    } else if let Some(group) = Group::ALL.into_iter().find(|group| group.name() == word) {
        let of_group = |peer: &Peer| peer.group() == group && !Peer::EXTRA.contains(peer);
        peers.extend(Peer::ALL.into_iter().filter(of_group));
    } else {
        bail!("\"{word}\" is no metric, no peer and no group of peers; see bench help");
    }
    Ok(())
}

/// Runs the whole benchmark and prints its report. Fails if anything went wrong anywhere; a bar that is missed is no failure.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let options::Common { rounds, quick, json } = options.common;
    let versions: Vec<_> = options
        .balancers()
        .map(|peer| Ok((peer.name(), peer.version()?)))
        .collect::<Result<_>>()?;
    let machine = Machine::facts("balancer, clients and backends", versions)?;
    let mut bench = Bench {
        options,
        amount: if quick { QUICK } else { FULL },
        backend: peers::start_backend()?,
        running: BTreeMap::new(),
        report: Report::new(machine, rounds, quick),
    };
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        bench.restart()?;
        bench.each(Metric::Memory, round, |bench, peer| bench.memory(peer, round));
        bench.each(Metric::Connections, round, |bench, peer| bench.connections(peer, round));
        for way in Way::ALL {
            bench.each(Metric::Bulk, round, |bench, peer| {
                // What a header costs is over before the first byte of bulk data: one stream each way shows it.
                if peer.group() == Group::Ingress && way.streams > 1 {
                    return Ok(());
                }
                bench.bulk(peer, round, way)
            });
        }
    }
    bench.each(Metric::Syscalls, 0, Bench::syscalls);
    let report = &bench.report;
    println!("{}", if json { report.json()? } else { report.markdown() });
    if report.failed() {
        for (name, running) in &bench.running {
            eprintln!("--- the end of what {} said:\n{}", name.name(), running.log());
        }
        eprintln!("--- the end of what the backend said:\n{}", bench.backend.log());
    }
    Ok(if report.failed() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

struct Bench<'a> {
    options: &'a Options,
    amount: Amount,
    backend: Running,
    running: BTreeMap<Peer, Running>,
    report: Report,
}

impl Bench<'_> {
    /// Starts every balancer afresh: idle memory is growth from here, and no round inherits another one's state.
    fn restart(&mut self) -> Result<()> {
        self.running.clear();
        for peer in self.options.balancers() {
            self.running.insert(peer, peers::start(peer)?);
        }
        Ok(())
    }

    /// Measures one thing for every peer in turn; which one is first rotates by round.
    fn each(&mut self, metric: Metric, round: usize, measure: impl Fn(&mut Self, Peer) -> Result<()>) {
        if !self.options.metrics.contains(&metric) {
            return;
        }
        let mut peers: Vec<Peer> = self.options.peers.iter().copied().collect();
        let first = round % peers.len();
        peers.rotate_left(first);
        // Without a balancer there is none to look into; and once is enough to know what the generator can do alone.
        let looks_inside = matches!(metric, Metric::Memory | Metric::Syscalls);
        peers.retain(|peer| *peer != Peer::Direct || round == 0 && !looks_inside);
        peers.retain(|peer| match peer.group() {
            Group::Balancer => true,
            // Every other round is enough, and keeps the whole within ten minutes.
            Group::Ingress => round.is_multiple_of(2) && metric != Metric::Memory,
            Group::Node => round.is_multiple_of(2) && metric != Metric::Bulk,
        });
        for peer in peers {
            if let Err(error) = measure(self, peer) {
                eprintln!("  {:<15} {} failed: {error:#}", peer.name(), metric.name());
                self.report
                    .error(peer, metric, format!("round {}: {error:#}", round + 1));
            }
        }
    }

    fn connections(&mut self, peer: Peer, round: usize) -> Result<()> {
        let Amount {
            in_flight, exchange, ..
        } = self.amount;
        let client = exchanges(peer.target(), in_flight, exchange, u64::MAX)?;
        let measured = self.watch(peer, client, exchange)?;
        let connections = measured.number("connections")?;
        ensure!(connections > 0.0, "not one connection");
        self.report.add(
            peer,
            Figure::ConnectionsPerSecond,
            round,
            connections / measured.number("seconds")?,
        );
        self.report
            .add(peer, Figure::P50, round, measured.number("p50_us")? / 1000.0);
        self.report
            .add(peer, Figure::P99, round, measured.number("p99_us")? / 1000.0);
        if let Some(cpu) = measured.server {
            self.report
                .add(peer, Figure::CpuPerConnection, round, cpu * 1e6 / connections);
        }
        eprintln!(
            "  {:<15} {:>6.0} connections/s, p99 {:.1} ms",
            peer.name(),
            connections / measured.number("seconds")?,
            measured.number("p99_us")? / 1000.0
        );
        self.report.shares(peer, "connections", true, measured.shares);
        Ok(())
    }

    fn bulk(&mut self, peer: Peer, round: usize, way: Way) -> Result<()> {
        let client = bulk(peer.target(), way, self.amount.bulk_bytes, self.amount.bulk)?;
        let measured = self.watch(peer, client, self.amount.bulk).with_context(|| way.name())?;
        let (bytes, seconds) = (measured.number("bytes")?, measured.number("seconds")?);
        ensure!(bytes > 0.0, "{}: not one byte", way.name());
        self.report
            .add(peer, Figure::Gbit(way), round, bytes * 8.0 / seconds / 1e9);
        if let Some(cpu) = measured.server {
            self.report
                .add(peer, Figure::CpuPerGib(way), round, cpu / (bytes / f64::from(1 << 30)));
        }
        eprintln!(
            "  {:<15} {:>6.1} Gbit/s {}",
            peer.name(),
            bytes * 8.0 / seconds / 1e9,
            way.name()
        );
        self.report.shares(peer, way.name(), way.streams == 1, measured.shares);
        Ok(())
    }

    /// Lets the client work and looks at everybody's CPU time before and after.
    fn watch(&self, peer: Peer, client: Client, length: Duration) -> Result<Measured> {
        client.watch(self.running.get(&peer).map(Running::pid), self.backend.pid(), length)
    }

    fn memory(&mut self, peer: Peer, round: usize) -> Result<()> {
        let pid = self.pid(peer)?;
        let sessions = self.amount.sessions;
        let mut client = hold(peer.target(), sessions)?;
        sleep(Duration::from_millis(300));
        let before = pss_kib(pid)?;
        client.go()?;
        client.ready(Duration::from_secs(60))?;
        // Whatever is given back when a session falls silent has been given back after that.
        sleep(Duration::from_secs(1));
        let after = pss_kib(pid)?;
        client.go()?;
        client.result(Duration::from_secs(60))?;
        let mib = (after as f64 - before as f64) / 1024.0 * 10_000.0 / sessions as f64;
        eprintln!("  {:<15} {mib:>6.1} MiB per 10,000 idle sessions", peer.name());
        self.report.add(peer, Figure::IdleMemory, round, mib);
        self.report.add(peer, Figure::RestMemory, round, before as f64 / 1024.0);
        Ok(())
    }

    fn syscalls(&mut self, peer: Peer) -> Result<()> {
        let pid = self.pid(peer)?;
        let Amount { in_flight, traced, .. } = self.amount;
        // Time does not end it; connections do.
        let mut client = exchanges(peer.target(), in_flight, Duration::from_secs(60), traced)?;
        let strace = Strace::attach(pid)?;
        client.go()?;
        let result = client.result(Duration::from_secs(70))?;
        // What a balancer does after the client has seen the end belongs to the connection too.
        sleep(Duration::from_millis(100));
        let calls = strace.finish()?;
        let connections = result["connections"]
            .as_f64()
            .context("the client counted no connections")?;
        ensure!(
            connections == traced as f64,
            "{connections} of {traced} connections were made"
        );
        let total = calls.values().sum::<u64>() as f64 / connections;
        eprintln!("  {:<15} {total:>6.1} system calls per connection", peer.name());
        self.report.add(peer, Figure::Syscalls, 0, total);
        self.report.calls(
            peer,
            calls
                .into_iter()
                .map(|(name, n)| (name, n as f64 / connections))
                .collect(),
        );
        Ok(())
    }

    fn pid(&self, peer: Peer) -> Result<i32> {
        self.running
            .get(&peer)
            .map(Running::pid)
            .with_context(|| format!("{} is not running", peer.name()))
    }
}

/// A client of new connections until `time` is over or `count` were made.
fn exchanges(target: SocketAddr, in_flight: u64, time: Duration, count: u64) -> Result<Client> {
    Client::start("lb-client", "exchange", target, &[in_flight, millis(time), count])
}

/// A client of bulk data until together `bytes` have gone or `time` is over.
fn bulk(target: SocketAddr, way: Way, bytes: u64, time: Duration) -> Result<Client> {
    let mode = if way.up { "up" } else { "down" };
    Client::start("lb-client", mode, target, &[way.streams, bytes, millis(time)])
}

/// A client of idle sessions: ready, go, ready once all are open, go, result.
fn hold(target: SocketAddr, sessions: u64) -> Result<Client> {
    Client::start("lb-client", "hold", target, &[sessions])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(line: &str) -> Result<Options> {
        Options::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn everything_but_the_extra_peers_is_the_default() {
        let all = options("").expect("no arguments");
        assert_eq!((all.common.rounds, all.metrics.len(), all.peers.len()), (5, 4, 10));
        assert!(!all.peers.contains(&Peer::Tokio));
        assert!(options("--peer tokio").expect("a peer").peers.contains(&Peer::Tokio));
    }

    #[test]
    fn only_takes_metrics_and_peers_mixed() {
        let some = options("--only bulk,nginx --only=edged --rounds 3").expect("words of both kinds");
        assert_eq!(some.metrics, BTreeSet::from([Metric::Bulk]));
        assert_eq!(some.peers, BTreeSet::from([Peer::Edged, Peer::Nginx]));
        assert_eq!(some.common.rounds, 3);
    }

    #[test]
    fn only_takes_groups_of_peers_without_the_extra_ones() {
        let peers = |line| options(line).expect("a group").peers;
        let node = BTreeSet::from([Peer::EdgedNode, Peer::HaproxyNode]);
        assert_eq!(peers("--only node,memory"), node);
        assert_eq!(peers("--only ingress").len(), 3);
        assert_eq!(peers("--only balancer").len(), 5);
    }

    #[test]
    fn what_is_no_option_is_refused() {
        for line in [
            "--only nothing",
            "--rounds",
            "--rounds 0",
            "--output xml",
            "--peer envoy",
            "fast",
        ] {
            assert!(options(line).is_err(), "{line}");
        }
    }
}
