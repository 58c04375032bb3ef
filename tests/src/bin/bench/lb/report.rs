//! What was measured, as tables and verdicts. A metric with any error in any round has no figure.

use std::{collections::BTreeMap, fmt::Write, fs, process::Command, thread};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{
    Metric, Options,
    peers::{Group, Peer},
};
use crate::stats::{figure, median, range, spread};

/// Direction and number of streams of a bulk measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Way {
    /// From client to backend.
    pub(crate) up: bool,
    /// At a time.
    pub(crate) streams: u64,
}

impl Way {
    /// All that are measured.
    pub(crate) const ALL: [Self; 4] = [
        Self { up: true, streams: 1 },
        Self { up: true, streams: 4 },
        Self { up: false, streams: 1 },
        Self { up: false, streams: 4 },
    ];

    /// For people.
    pub(crate) const fn name(self) -> &'static str {
        match (self.up, self.streams) {
            (true, 1) => "up, 1 stream",
            (true, _) => "up, 4 streams",
            (false, 1) => "down, 1 stream",
            (false, _) => "down, 4 streams",
        }
    }

    const fn key(self) -> &'static str {
        match (self.up, self.streams) {
            (true, 1) => "up_1",
            (true, _) => "up_4",
            (false, 1) => "down_1",
            (false, _) => "down_4",
        }
    }
}

/// One column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Figure {
    /// 1/s
    ConnectionsPerSecond,
    /// ms from connect to the reply's end
    P50,
    /// ms from connect to the reply's end
    P99,
    /// µs of the balancer's processes
    CpuPerConnection,
    /// Number per connection
    Syscalls,
    /// MiB per 10,000 sessions
    IdleMemory,
    /// MiB before the first of them: what is set aside at the start does not grow later
    RestMemory,
    /// Gbit/s
    Gbit(Way),
    /// s of the balancer's processes
    CpuPerGib(Way),
}

impl Figure {
    fn all() -> Vec<Self> {
        let mut all = vec![
            Self::ConnectionsPerSecond,
            Self::P50,
            Self::P99,
            Self::CpuPerConnection,
            Self::Syscalls,
            Self::IdleMemory,
            Self::RestMemory,
        ];
        all.extend(
            Way::ALL
                .into_iter()
                .flat_map(|way| [Self::Gbit(way), Self::CpuPerGib(way)]),
        );
        all
    }

    const fn metric(self) -> Metric {
        match self {
            Self::ConnectionsPerSecond | Self::P50 | Self::P99 | Self::CpuPerConnection => Metric::Connections,
            Self::Syscalls => Metric::Syscalls,
            Self::IdleMemory | Self::RestMemory => Metric::Memory,
            Self::Gbit(_) | Self::CpuPerGib(_) => Metric::Bulk,
        }
    }

    fn key(self) -> String {
        match self {
            Self::ConnectionsPerSecond => "connections_per_second".into(),
            Self::P50 => "p50_ms".into(),
            Self::P99 => "p99_ms".into(),
            Self::CpuPerConnection => "cpu_us_per_connection".into(),
            Self::Syscalls => "syscalls_per_connection".into(),
            Self::IdleMemory => "mib_per_10000_idle".into(),
            Self::RestMemory => "mib_at_rest".into(),
            Self::Gbit(way) => format!("gbit_per_second_{}", way.key()),
            Self::CpuPerGib(way) => format!("cpu_s_per_gib_{}", way.key()),
        }
    }
}

/// Who used the cores during a measurement, in cores.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shares {
    /// The balancer's processes.
    pub(crate) balancer: f64,
    /// The client: one thread for connections, one per stream for bulk.
    pub(crate) client: f64,
    /// The backend.
    pub(crate) backend: f64,
    /// Anybody else on the machine.
    pub(crate) elsewhere: f64,
    /// Taken by the hypervisor.
    pub(crate) stolen: f64,
    /// Nobody.
    pub(crate) idle: f64,
}

/// What the figures were measured on.
pub(crate) struct Machine {
    cores: usize,
    facts: Vec<(String, String)>,
}

impl Machine {
    /// Of this machine and the peers of `options`.
    pub(crate) fn facts(options: &Options) -> Result<Self> {
        let cores = thread::available_parallelism().context("cannot count the cores")?.get();
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpu
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or("unknown", |(_, name)| name);
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let date = Command::new("date")
            .arg("+%F")
            .output()
            .map(|output| output.stdout)
            .unwrap_or_default();
        let mut facts = vec![
            ("date".to_owned(), String::from_utf8_lossy(&date).trim().to_owned()),
            (
                "cores".into(),
                format!("{cores} ({model}), shared by balancer, clients and backends"),
            ),
            ("kernel".into(), format!("Linux {}", kernel.trim())),
        ];
        for peer in options.balancers() {
            facts.push((peer.name().into(), peer.version()?));
        }
        Ok(Self { cores, facts })
    }
}

/// All samples and errors.
pub(crate) struct Report {
    machine: Machine,
    rounds: usize,
    quick: bool,
    /// By round; `None` where a round gave none.
    samples: BTreeMap<(Peer, Figure), Vec<Option<f64>>>,
    errors: BTreeMap<(Peer, Metric), Vec<String>>,
    shares: BTreeMap<(Peer, &'static str), Vec<Shares>>,
    calls: BTreeMap<Peer, BTreeMap<String, f64>>,
}

/// A promise and how it was kept.
struct Bar {
    what: String,
    limit: f64,
    measured: Option<f64>,
}

impl Bar {
    fn verdict(&self) -> &'static str {
        match self.measured {
            None => "no figure",
            Some(measured) if measured <= self.limit => "met",
            Some(_) => "MISSED",
        }
    }
}

/// Whose CPU time per connection is compared with whose; a library baseline is no competitor.
const COMPETITIONS: [(Peer, &[Peer]); 3] = [
    (Peer::Edged, &[Peer::HaproxyCopy, Peer::HaproxySplice, Peer::Nginx]),
    (Peer::EdgedProxy, &[Peer::HaproxyProxy, Peer::NginxProxy]),
    (Peer::EdgedNode, &[Peer::HaproxyNode]),
];
/// Of our CPU time per connection, against the better peer's.
const CPU_PER_CONNECTION: f64 = 0.91;
/// Of our CPU time per GiB, against HAProxy's in splice mode.
const CPU_PER_GIB: f64 = 0.85;
/// MiB per 10,000 idle sessions.
const IDLE_MEMORY: f64 = 22.0;
/// System calls per connection.
const SYSCALLS: f64 = 17.0;
/// MiB of node mode before the first of the sessions that are measured.
const NODE_MEMORY: f64 = 8.0;

impl Report {
    pub(crate) fn new(machine: Machine, rounds: usize, quick: bool) -> Self {
        let (samples, errors, shares, calls) = Default::default();
        Self {
            machine,
            rounds,
            quick,
            samples,
            errors,
            shares,
            calls,
        }
    }

    /// Takes one figure of one round.
    pub(crate) fn add(&mut self, peer: Peer, figure: Figure, round: usize, value: f64) {
        let rounds = self.rounds;
        let samples = self.samples.entry((peer, figure)).or_insert_with(|| vec![None; rounds]);
        if let Some(sample) = samples.get_mut(round) {
            *sample = Some(value);
        }
    }

    /// Takes what went wrong; the metric has no figure any more for that peer.
    pub(crate) fn error(&mut self, peer: Peer, metric: Metric, error: String) {
        self.errors.entry((peer, metric)).or_default().push(error);
    }

    /// Takes who used the cores in one measurement.
    pub(crate) fn shares(&mut self, peer: Peer, measurement: &'static str, shares: Shares) {
        self.shares.entry((peer, measurement)).or_default().push(shares);
    }

    /// Takes system calls per connection by name.
    pub(crate) fn calls(&mut self, peer: Peer, calls: BTreeMap<String, f64>) {
        self.calls.insert(peer, calls);
    }

    /// Anything went wrong anywhere.
    pub(crate) fn failed(&self) -> bool {
        !self.errors.is_empty()
    }

    fn peers(&self) -> Vec<Peer> {
        Peer::ALL
            .into_iter()
            .filter(|peer| self.samples.keys().any(|(p, _)| p == peer) || self.errors.keys().any(|(p, _)| p == peer))
            .collect()
    }

    /// Values by round; nothing if there was any error.
    fn by_round(&self, peer: Peer, figure: Figure) -> Option<&[Option<f64>]> {
        if self.errors.contains_key(&(peer, figure.metric())) {
            return None;
        }
        self.samples.get(&(peer, figure)).map(Vec::as_slice)
    }

    fn values(&self, peer: Peer, figure: Figure) -> Vec<f64> {
        self.by_round(peer, figure)
            .unwrap_or_default()
            .iter()
            .copied()
            .flatten()
            .collect()
    }

    fn median(&self, peer: Peer, figure: Figure) -> Option<f64> {
        median(&self.values(peer, figure))
    }

    /// Median of the ratios of each round's two values.
    fn ratio(&self, ours: Peer, theirs: Peer, figure: Figure) -> Option<f64> {
        let (ours, theirs) = (self.by_round(ours, figure)?, self.by_round(theirs, figure)?);
        let ratios: Vec<f64> = ours
            .iter()
            .zip(theirs)
            .filter_map(|(ours, theirs)| Some((*ours)? / (*theirs)?))
            .collect();
        median(&ratios)
    }

    /// Those whose metric was asked for.
    fn bars(&self) -> Vec<Bar> {
        let mut bars = Vec::new();
        let mut bar = |peer: Peer, of: Figure, what: String, limit: f64, measured: Option<f64>| {
            if self.asked(peer, of) {
                bars.push(Bar { what, limit, measured });
            }
        };
        for (own, competitors) in COMPETITIONS {
            let figures = competitors
                .iter()
                .filter_map(|peer| Some((self.median(*peer, Figure::CpuPerConnection)?, *peer)));
            let better = figures.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, peer)| peer);
            let against = better.map_or("the better peer", Peer::name);
            let what = match own.group() {
                Group::Balancer => format!("CPU per connection, against {against}"),
                group => format!("{}: CPU per connection, against {against}", group.name()),
            };
            let ratio = better.and_then(|peer| self.ratio(own, peer, Figure::CpuPerConnection));
            bar(own, Figure::CpuPerConnection, what, CPU_PER_CONNECTION, ratio);
        }
        let mut bar = |of, what, limit, measured| bar(Peer::Edged, of, what, limit, measured);
        let pipes = self.peers().into_iter().filter(|peer| *peer == Peer::HaproxyPipes);
        for peer in [Peer::HaproxySplice].into_iter().chain(pipes) {
            for way in Way::ALL {
                let of = Figure::CpuPerGib(way);
                let what = format!("CPU per GiB {}, against {}", way.name(), peer.name());
                bar(of, what, CPU_PER_GIB, self.ratio(Peer::Edged, peer, of));
            }
        }
        let alone = |of| self.median(Peer::Edged, of);
        bar(
            Figure::IdleMemory,
            "MiB per 10,000 idle sessions".into(),
            IDLE_MEMORY,
            alone(Figure::IdleMemory),
        );
        bar(
            Figure::Syscalls,
            "system calls per connection".into(),
            SYSCALLS,
            alone(Figure::Syscalls),
        );
        if self.asked(Peer::EdgedNode, Figure::RestMemory) {
            bars.push(Bar {
                what: "node: MiB at rest".into(),
                limit: NODE_MEMORY,
                measured: self.median(Peer::EdgedNode, Figure::RestMemory),
            });
        }
        bars
    }

    /// As printed and as pasted into docs/benchmarks.md.
    pub(crate) fn markdown(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.write_markdown(&mut text);
        text
    }

    fn write_markdown(&self, out: &mut String) -> std::fmt::Result {
        for (name, value) in &self.machine.facts {
            writeln!(out, "- {name}: {value}")?;
        }
        if self.quick {
            writeln!(
                out,
                "\n**A quick run: it shows that everything works. Its figures are not for quoting.**"
            )?;
        }
        let rounds = if self.rounds == 1 {
            "1 round".to_owned()
        } else {
            format!("{} rounds", self.rounds)
        };
        writeln!(
            out,
            "\nMedian of {rounds}, ingress and node of every other (smallest–largest). CPU is that of the balancer's processes.\n"
        )?;
        for group in Group::ALL {
            let title = match group {
                Group::Balancer => "",
                Group::Ingress => "ingress (PROXY v2, nginx v1): ",
                Group::Node => "node mode, one thread: ",
            };
            self.table(
                out,
                group,
                &format!("{title}new connections, 64 in flight"),
                &[
                    ("connections/s", Figure::ConnectionsPerSecond),
                    ("p50 ms", Figure::P50),
                    ("p99 ms", Figure::P99),
                    ("CPU µs/connection", Figure::CpuPerConnection),
                    ("system calls/connection", Figure::Syscalls),
                    ("MiB/10,000 idle", Figure::IdleMemory),
                    ("MiB at rest", Figure::RestMemory),
                ],
            )?;
            for (what, column) in [
                ("bulk, Gbit/s", Figure::Gbit as fn(Way) -> Figure),
                ("bulk, CPU s/GiB", Figure::CpuPerGib as fn(Way) -> Figure),
            ] {
                let columns = Way::ALL.map(|way| (way.name(), column(way)));
                self.table(out, group, &format!("{title}{what}"), &columns)?;
            }
        }
        self.write_calls(out)?;
        self.write_shares(out)?;
        self.write_bars(out)?;
        self.write_errors(out)
    }

    /// A table of the peers of `group`, of those `columns` that were asked of any of them.
    fn table(&self, out: &mut String, group: Group, title: &str, columns: &[(&str, Figure)]) -> std::fmt::Result {
        let peers: Vec<Peer> = self.peers().into_iter().filter(|peer| peer.group() == group).collect();
        let asked = |figure: Figure| peers.iter().any(|peer| self.asked(*peer, figure));
        // The balancers' tables keep their shape, whatever was left out.
        let whole = group == Group::Balancer && columns.iter().any(|(_, figure)| asked(*figure));
        let columns: Vec<(&str, Figure)> = columns
            .iter()
            .copied()
            .filter(|(_, figure)| whole || self.measured(&peers, *figure))
            .collect();
        if columns.is_empty() {
            return Ok(());
        }
        let names: Vec<&str> = columns.iter().map(|(name, _)| *name).collect();
        writeln!(out, "| {title} | {} | errors |", names.join(" | "))?;
        writeln!(out, "|---|{}---:|", "---:|".repeat(columns.len()))?;
        for peer in peers {
            let cells: Vec<String> = columns.iter().map(|(_, figure)| self.cell(peer, *figure)).collect();
            let errors: usize = columns
                .iter()
                .map(|(_, figure)| figure.metric())
                .collect::<std::collections::BTreeSet<_>>()
                .into_iter()
                .map(|metric| self.errors.get(&(peer, metric)).map_or(0, Vec::len))
                .sum();
            writeln!(out, "| {} | {} | {errors} |", peer.name(), cells.join(" | "))?;
        }
        writeln!(out)
    }

    fn measured(&self, peers: &[Peer], figure: Figure) -> bool {
        peers.iter().any(|peer| self.samples.contains_key(&(*peer, figure)))
    }

    fn asked(&self, peer: Peer, figure: Figure) -> bool {
        self.samples.contains_key(&(peer, figure)) || self.errors.contains_key(&(peer, figure.metric()))
    }

    fn cell(&self, peer: Peer, figure: Figure) -> String {
        if self.errors.contains_key(&(peer, figure.metric())) {
            return "no figure".into();
        }
        spread(&self.values(peer, figure)).unwrap_or_else(|| "–".into())
    }

    fn write_calls(&self, out: &mut String) -> std::fmt::Result {
        if self.calls.is_empty() {
            return Ok(());
        }
        writeln!(out, "System calls per connection, the most frequent:\n")?;
        for (peer, calls) in &self.calls {
            let mut calls: Vec<(&String, &f64)> = calls.iter().collect();
            calls.sort_by(|a, b| b.1.total_cmp(a.1));
            let list: Vec<String> = calls
                .iter()
                .take(12)
                .map(|(name, n)| format!("{name} {n:.2}"))
                .collect();
            writeln!(out, "- {}: {}", peer.name(), list.join(", "))?;
        }
        writeln!(out)
    }

    fn write_shares(&self, out: &mut String) -> std::fmt::Result {
        if self.shares.is_empty() {
            return Ok(());
        }
        writeln!(out, "Who used the {} cores (medians, in cores):\n", self.machine.cores)?;
        writeln!(
            out,
            "| measurement | peer | balancer | client | backend | elsewhere | stolen | idle | remark |"
        )?;
        writeln!(out, "|---|---|---:|---:|---:|---:|---:|---:|---|")?;
        let ways = Way::ALL.map(Way::name);
        for measurement in ["connections"].iter().chain(&ways) {
            for peer in self.peers() {
                let Some(all) = self.shares.get(&(peer, *measurement)) else {
                    continue;
                };
                let middle = |of: fn(&Shares) -> f64| median(&all.iter().map(of).collect::<Vec<_>>()).unwrap_or(0.0);
                let shares = Shares {
                    balancer: middle(|s| s.balancer),
                    client: middle(|s| s.client),
                    backend: middle(|s| s.backend),
                    elsewhere: middle(|s| s.elsewhere),
                    stolen: middle(|s| s.stolen),
                    idle: middle(|s| s.idle),
                };
                writeln!(
                    out,
                    "| {measurement} | {} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {} |",
                    peer.name(),
                    shares.balancer,
                    shares.client,
                    shares.backend,
                    shares.elsewhere,
                    shares.stolen,
                    shares.idle,
                    shares.remark(
                        self.machine.cores as f64,
                        *measurement == "connections" || measurement.contains("1 s")
                    )
                )?;
            }
        }
        writeln!(out)
    }

    fn write_bars(&self, out: &mut String) -> std::fmt::Result {
        let bars = self.bars();
        if bars.is_empty() {
            return Ok(());
        }
        writeln!(out, "| edged | limit | measured | verdict |")?;
        writeln!(out, "|---|---:|---:|---|")?;
        for bar in bars {
            let measured = bar.measured.map_or_else(|| "–".into(), figure);
            writeln!(
                out,
                "| {} | ≤ {} | {measured} | {} |",
                bar.what,
                bar.limit,
                bar.verdict()
            )?;
        }
        Ok(())
    }

    fn write_errors(&self, out: &mut String) -> std::fmt::Result {
        if self.failed() {
            writeln!(out, "\nErrors; what they belong to has no figure:\n")?;
        }
        for ((peer, metric), errors) in &self.errors {
            for error in errors {
                writeln!(out, "- {} {}: {error}", peer.name(), metric.name())?;
            }
        }
        Ok(())
    }

    /// The same for programs.
    pub(crate) fn json(&self) -> Result<String> {
        let peer = |peer: Peer| -> Value {
            let mut object = serde_json::Map::new();
            for figure in Figure::all() {
                let values = self.values(peer, figure);
                if let (Some(median), Some((low, high))) = (median(&values), range(&values)) {
                    object.insert(
                        figure.key(),
                        json!({ "median": median, "min": low, "max": high, "rounds": self.by_round(peer, figure) }),
                    );
                }
            }
            object.insert("syscalls".into(), json!(self.calls.get(&peer)));
            let errors: BTreeMap<&str, &Vec<String>> = self
                .errors
                .iter()
                .filter(|((p, _), _)| *p == peer)
                .map(|((_, metric), errors)| (metric.name(), errors))
                .collect();
            object.insert("errors".into(), json!(errors));
            Value::Object(object)
        };
        let bars: Vec<Value> = self
            .bars()
            .iter()
            .map(|bar| json!({ "bar": bar.what, "limit": bar.limit, "measured": bar.measured, "verdict": bar.verdict().to_lowercase() }))
            .collect();
        let report = json!({
            "machine": self.machine.facts.iter().cloned().collect::<BTreeMap<_, _>>(),
            "rounds": self.rounds,
            "quick": self.quick,
            "peers": self.peers().into_iter().map(|p| (p.name(), peer(p))).collect::<BTreeMap<_, _>>(),
            "bars": bars,
        });
        serde_json::to_string_pretty(&report).context("cannot write JSON")
    }
}

impl Shares {
    /// What a reader has to know before comparing rates. CPU per unit holds in each of these cases, rates do not.
    fn remark(&self, cores: f64, one_client_thread: bool) -> String {
        let mut remarks = Vec::new();
        if one_client_thread && self.client > 0.95 {
            remarks.push("the client's one thread is the limit");
        }
        if self.idle > 0.15 * cores {
            remarks.push("cores idle: waiting, not CPU, is the limit");
        }
        if self.elsewhere + self.stolen > 0.1 * cores {
            remarks.push("machine not quiet");
        }
        remarks.join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report::new(
            Machine {
                cores: 2,
                facts: vec![("cores".into(), "2".into())],
            },
            3,
            false,
        )
    }

    fn fill(report: &mut Report, peer: Peer, figure: Figure, values: [f64; 3]) {
        values
            .into_iter()
            .enumerate()
            .for_each(|(round, value)| report.add(peer, figure, round, value));
    }

    fn verdict(report: &Report, word: &str) -> (Option<f64>, &'static str) {
        let bars = report.bars();
        let bar = bars.iter().find(|bar| bar.what.contains(word)).expect("a bar");
        (bar.measured, bar.verdict())
    }

    #[test]
    fn a_ratio_is_the_median_of_the_rounds_against_the_better_peer() {
        let mut report = report();
        fill(&mut report, Peer::Edged, Figure::CpuPerConnection, [45.0, 50.0, 90.0]);
        fill(&mut report, Peer::Nginx, Figure::CpuPerConnection, [50.0, 50.0, 100.0]);
        fill(
            &mut report,
            Peer::HaproxyCopy,
            Figure::CpuPerConnection,
            [80.0, 80.0, 80.0],
        );
        assert_eq!(verdict(&report, "per connection, against nginx"), (Some(0.9), "met"));
    }

    #[test]
    fn a_missed_bar_is_said_aloud_and_a_missing_figure_is_not_met() {
        let mut report = report();
        fill(&mut report, Peer::Edged, Figure::IdleMemory, [22.5, 23.0, 21.0]);
        report.error(Peer::Edged, Metric::Syscalls, "strace could not attach".into());
        assert_eq!(verdict(&report, "idle"), (Some(22.5), "MISSED"));
        assert_eq!(verdict(&report, "system calls"), (None, "no figure"));
    }

    #[test]
    fn one_error_takes_all_figures_of_its_metric() {
        let mut report = report();
        fill(&mut report, Peer::Edged, Figure::IdleMemory, [20.0; 3]);
        fill(&mut report, Peer::Edged, Figure::P99, [9.0; 3]);
        report.error(Peer::Edged, Metric::Memory, "round 2: a session did not live".into());
        assert_eq!(verdict(&report, "idle"), (None, "no figure"));
        let text = report.markdown();
        assert!(
            text.contains("| – | – | 9.00 (9.00–9.00) | – | – | no figure | no figure | 1 |"),
            "{text}"
        );
        assert!(
            text.contains("- edged memory: round 2: a session did not live"),
            "{text}"
        );
        assert!(report.failed());
        assert!(!report.json().expect("JSON").contains("mib_per_10000_idle"));
    }
}
