//! The resolver benchmark: what a query costs, for `edged` and its peers, each a DNS64 in front of the same upstream.
//!
//! ```text
//! for each round:  restart all, warm their caches -> for each kind and load: for each peer, in rotated order: measure
//! ```
//! Order within a measurement rotates by round, so that no peer always comes first or always follows the same one.

mod batch;
pub(crate) mod client;
mod peers;
mod report;
pub(crate) mod upstream;
mod wire;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::UdpSocket,
    os::fd::AsRawFd,
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use self::{
    peers::{Peer, UPSTREAM},
    report::{Figure, Report, What},
};
use crate::{
    options,
    running::Running,
    session::{Client, millis},
    tally::{Machine, Named},
};

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Cached A.
    A,
    /// Cached AAAA of names that have none.
    Synthesised,
    /// Cached AAAA of names that have one.
    Native,
    /// A third of each, but every tenth query is for a name that was never asked before.
    Mix,
}

impl Kind {
    /// All, in the order of the tables.
    pub(crate) const ALL: [Self; 4] = [Self::A, Self::Synthesised, Self::Native, Self::Mix];

    /// As written on the command line.
    const fn name(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::Synthesised => "synthesised",
            Self::Native => "native",
            Self::Mix => "mix",
        }
    }

    /// For people.
    const fn title(self) -> &'static str {
        match self {
            Self::A => "cached A",
            Self::Synthesised => "cached synthesised AAAA",
            Self::Native => "cached native AAAA",
            Self::Mix => "mix with 10 % misses",
        }
    }
}

/// How it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Load {
    /// At a fixed rate, whatever is answered.
    Rate,
    /// As fast as it is answered.
    Maximum,
}

impl Load {
    /// All, in order.
    pub(crate) const ALL: [Self; 2] = [Self::Rate, Self::Maximum];

    /// As written on the command line.
    const fn name(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Maximum => "maximum",
        }
    }

    /// For people.
    const fn title(self) -> &'static str {
        match self {
            Self::Rate => "at the rate",
            Self::Maximum => "at maximum",
        }
    }
}

/// What is measured in one go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Metric {
    /// What is asked.
    pub(crate) kind: Kind,
    /// How.
    pub(crate) load: Load,
}

impl Metric {
    /// All, in the order in which they are measured.
    pub(crate) fn all() -> Vec<Self> {
        Kind::ALL
            .into_iter()
            .flat_map(|kind| Load::ALL.map(|load| Self { kind, load }))
            .collect()
    }
}

impl Named for Metric {
    fn name(self) -> &'static str {
        match (self.kind, self.load) {
            (Kind::A, Load::Rate) => "a, rate",
            (Kind::A, Load::Maximum) => "a, maximum",
            (Kind::Synthesised, Load::Rate) => "synthesised, rate",
            (Kind::Synthesised, Load::Maximum) => "synthesised, maximum",
            (Kind::Native, Load::Rate) => "native, rate",
            (Kind::Native, Load::Maximum) => "native, maximum",
            (Kind::Mix, Load::Rate) => "mix, rate",
            (Kind::Mix, Load::Maximum) => "mix, maximum",
        }
    }
}

/// Queries per second that are offered, by kind: what each peer answers with half of two cores.
const RATES: [u64; 4] = [30_000, 30_000, 30_000, 8000];
/// Queries outstanding at maximum: enough to keep two threads busy, few enough for the smallest socket buffer.
const WINDOW: u64 = 128;
/// Length of a measurement.
const TIME: Duration = Duration::from_millis(2500);
/// The same of a quick run.
const QUICK: Duration = Duration::from_millis(700);
/// Percent of the queries that may be lost.
const LOSS: f64 = 0.1;

/// The command line of `bench dns`.
#[derive(Debug)]
pub(crate) struct Options {
    common: options::Common,
    metrics: BTreeSet<Metric>,
    peers: BTreeSet<Peer>,
}

impl Options {
    /// Reads the arguments after `bench dns`.
    pub(crate) fn parse(args: &[String]) -> Result<Self> {
        let (mut kinds, mut loads, mut peers) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let mut only = |word: &str| -> Result<()> {
            if let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.name() == word) {
                kinds.insert(kind);
            } else if let Some(load) = Load::ALL.into_iter().find(|load| load.name() == word) {
                loads.insert(load);
            } else if let Some(peer) = Peer::ALL.into_iter().find(|peer| peer.name() == word) {
                peers.insert(peer);
            } else {
                bail!("\"{word}\" is no kind of query, no load and no peer; see bench help");
            }
            Ok(())
        };
        let common = options::parse(args, |key, value| {
            if key == "--only" {
                value.split(',').try_for_each(&mut only)?;
            }
            Ok(key == "--only")
        })?;
        if peers.is_empty() {
            peers.extend(Peer::ALL);
        }
        let chosen = |metric: &Metric| {
            (kinds.is_empty() || kinds.contains(&metric.kind)) && (loads.is_empty() || loads.contains(&metric.load))
        };
        Ok(Self {
            common,
            metrics: Metric::all().into_iter().filter(chosen).collect(),
            peers,
        })
    }

    /// Refuses to begin without the programs that will be needed.
    pub(crate) fn check_tools(&self) -> Result<()> {
        for peer in &self.peers {
            peer.version()?;
        }
        for tool in ["mount", "ip"] {
            // Whether it starts is all that is asked.
            Command::new(tool)
                .arg("-V")
                .stdin(Stdio::null())
                .output()
                .with_context(|| format!("cannot run {tool}; install it (Debian: apt-get install mount iproute2)"))?;
        }
        Ok(())
    }
}

/// Runs the whole benchmark and prints its report. Fails if anything went wrong anywhere; a bar that is missed is no failure.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let options::Common { rounds, quick, json } = options.common;
    let versions: Vec<_> = options
        .peers
        .iter()
        .map(|peer| Ok((peer.name(), peer.version()?)))
        .collect::<Result<_>>()?;
    let machine = Machine::facts("resolver, client and upstream", versions)?;
    let mut bench = Bench {
        options,
        time: if quick { QUICK } else { TIME },
        upstream: peers::start_upstream()?,
        running: BTreeMap::new(),
        report: Report::new(machine, rounds, quick, RATES, WINDOW),
    };
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        bench.restart()?;
        for metric in &options.metrics {
            bench.each(*metric, round);
        }
    }
    let report = &bench.report;
    println!("{}", if json { report.json()? } else { report.markdown() });
    let failed = report.tally.failed();
    if failed {
        for (peer, running) in &bench.running {
            eprintln!("--- the end of what {} said:\n{}", peer.name(), running.log());
        }
        eprintln!("--- the end of what the upstream said:\n{}", bench.upstream.log());
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

struct Bench<'a> {
    options: &'a Options,
    time: Duration,
    upstream: Running,
    running: BTreeMap<Peer, Running>,
    report: Report,
}

impl Bench<'_> {
    /// Starts every resolver afresh and fills its cache.
    fn restart(&mut self) -> Result<()> {
        self.running.clear();
        for peer in self.options.peers.iter().copied() {
            self.running.insert(peer, peers::start(peer)?);
            let mut client = Client::start("dns-client", "warm", peer.target(), &[])?;
            client.go()?;
            let warm = client
                .result(Duration::from_secs(60))
                .with_context(|| format!("{} while its cache was filled", peer.name()))?;
            eprintln!(
                "  {:<10} warm: {} queries, {} lost",
                peer.name(),
                warm["sent"],
                warm["lost"]
            );
        }
        Ok(())
    }

    /// Measures one thing for every peer in turn; which one is first rotates by round.
    fn each(&mut self, metric: Metric, round: usize) {
        let mut peers: Vec<Peer> = self.options.peers.iter().copied().collect();
        let first = round % peers.len();
        peers.rotate_left(first);
        for peer in peers {
            if let Err(error) = self.measure(peer, metric, round) {
                eprintln!("  {:<10} {} failed: {error:#}", peer.name(), metric.name());
                self.report
                    .tally
                    .error(peer, metric, format!("round {}: {error:#}", round + 1));
            }
        }
    }

    fn measure(&mut self, peer: Peer, metric: Metric, round: usize) -> Result<()> {
        let number = metric.kind as u64;
        let amount = match metric.load {
            Load::Rate => RATES[metric.kind as usize],
            Load::Maximum => WINDOW,
        };
        let running = self.running.get(&peer).context("it is not running")?;
        let client = Client::start(
            "dns-client",
            metric.load.name(),
            peer.target(),
            &[number, amount, millis(self.time)],
        )?;
        let upstream = upstream::queries(UPSTREAM)?;
        let measured = client.watch(Some(running.pid()), self.upstream.pid(), self.time)?;
        let upstream = (upstream::queries(UPSTREAM)? - upstream) as f64;

        let (sent, answered) = (measured.number("sent")?, measured.number("answered")?);
        ensure!(answered > 0.0, "not one answer");
        let loss = measured.number("lost")? / sent * 100.0;
        ensure!(loss <= LOSS, "{loss:.2} % of the queries were lost; {LOSS} % may be");
        let misses = upstream / sent;
        match metric.kind {
            // A tenth, less what chance takes from it; each miss is a query to the upstream, or two.
            Kind::Mix => ensure!(misses > 0.09, "only {misses:.3} queries to the upstream per query"),
            _ => ensure!(misses < 0.001, "{misses:.3} queries to the upstream per cached query"),
        }
        let rate = answered / measured.number("seconds")?;
        let cpu = measured.server.context("it has no process")? * 1e6 / answered;
        for (what, value) in [
            (What::Rate, rate),
            (What::P50, measured.number("p50_us")?),
            (What::P99, measured.number("p99_us")?),
            (What::Cpu, cpu),
            (What::Loss, loss),
            (What::Upstream, misses),
            (What::Late, measured.number("late")? / sent * 100.0),
        ] {
            self.report.tally.add(peer, Figure(metric, what), round, value);
        }
        eprintln!(
            "  {:<10} {:<20} {rate:>7.0} queries/s, {cpu:>5.1} µs CPU each, p99 {:>6.0} µs",
            peer.name(),
            metric.name(),
            measured.number("p99_us")?
        );
        self.report.shares(peer, metric, measured.shares);
        Ok(())
    }
}

/// Sets an option of the socket that is a number.
fn set_option(socket: &UdpSocket, option: libc::c_int, value: libc::c_int) -> Result<()> {
    // SAFETY: the option takes an int; the pointer is to one, and its size is given.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    ensure!(
        set == 0,
        "cannot set option {option} of a socket: {}",
        io::Error::last_os_error()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(line: &str) -> Result<Options> {
        Options::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn everything_is_the_default() {
        let all = options("").expect("no arguments");
        assert_eq!((all.common.rounds, all.metrics.len(), all.peers.len()), (5, 8, 3));
    }

    #[test]
    fn only_takes_kinds_loads_and_peers_mixed() {
        let some = options("--only unbound,named --only=a,mix,rate --rounds 3").expect("words of all kinds");
        assert_eq!(some.peers, BTreeSet::from([Peer::Unbound, Peer::Bind]));
        let names: Vec<_> = some.metrics.iter().map(|metric| metric.name()).collect();
        assert_eq!(names, ["a, rate", "mix, rate"]);
    }

    #[test]
    fn what_is_no_option_is_refused() {
        for line in ["--only nothing", "--only", "--peer unbound", "--rounds 0", "fast"] {
            assert!(options(line).is_err(), "{line}");
        }
    }
}
