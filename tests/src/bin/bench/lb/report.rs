//! What was measured of the balancers, as tables and verdicts.

use std::{collections::BTreeMap, fmt::Write};

use anyhow::Result;
use serde_json::json;

use super::{
    Metric,
    peers::{Group, Peer},
};
use crate::tally::{Bar, Column, Machine, Measurement, Named, Shares, Tally};

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
}

impl Column for Figure {
    type Metric = Metric;

    fn metric(self) -> Metric {
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

/// All samples and errors, and system calls by name.
pub(crate) struct Report {
    tally: Tally<Peer, Figure>,
    calls: BTreeMap<Peer, BTreeMap<String, f64>>,
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
        Self {
            tally: Tally::new(machine, rounds, quick),
            calls: BTreeMap::new(),
        }
    }

    /// Takes one figure of one round.
    pub(crate) fn add(&mut self, peer: Peer, figure: Figure, round: usize, value: f64) {
        self.tally.add(peer, figure, round, value);
    }

    /// Takes what went wrong; the metric has no figure any more for that peer.
    pub(crate) fn error(&mut self, peer: Peer, metric: Metric, error: String) {
        self.tally.error(peer, metric, error);
    }

    /// Takes who used the cores in one measurement.
    pub(crate) fn shares(&mut self, peer: Peer, measurement: &'static str, one_client_thread: bool, shares: Shares) {
        let measurement = Measurement {
            name: measurement,
            one_client_thread,
            at_the_limit: true,
        };
        self.tally.shares(peer, measurement, shares);
    }

    /// Takes system calls per connection by name.
    pub(crate) fn calls(&mut self, peer: Peer, calls: BTreeMap<String, f64>) {
        self.calls.insert(peer, calls);
    }

    /// Anything went wrong anywhere.
    pub(crate) fn failed(&self) -> bool {
        self.tally.failed()
    }

    fn ratio(&self, ours: Peer, theirs: Peer, figure: Figure) -> Option<f64> {
        self.tally.ratio((ours, figure), (theirs, figure))
    }

    /// Those whose metric was asked for.
    fn bars(&self) -> Vec<Bar> {
        let mut bars = Vec::new();
        let mut bar = |peer: Peer, of: Figure, what: String, limit: f64, measured: Option<f64>| {
            if self.tally.asked(peer, of) {
                bars.push(Bar { what, limit, measured });
            }
        };
        for (own, competitors) in COMPETITIONS {
            let figures = competitors
                .iter()
                .filter_map(|peer| Some((self.tally.median(*peer, Figure::CpuPerConnection)?, *peer)));
            let better = figures.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, peer)| peer);
            let against = better.map_or("the better peer", Named::name);
            let what = match own.group() {
                Group::Balancer => format!("CPU per connection, against {against}"),
                group => format!("{}: CPU per connection, against {against}", group.name()),
            };
            let ratio = better.and_then(|peer| self.ratio(own, peer, Figure::CpuPerConnection));
            bar(own, Figure::CpuPerConnection, what, CPU_PER_CONNECTION, ratio);
        }
        let mut bar = |of, what, limit, measured| bar(Peer::Edged, of, what, limit, measured);
        let pipes = self
            .tally
            .peers()
            .into_iter()
            .filter(|peer| *peer == Peer::HaproxyPipes);
        for peer in [Peer::HaproxySplice].into_iter().chain(pipes) {
            for way in Way::ALL {
                let of = Figure::CpuPerGib(way);
                let what = format!("CPU per GiB {}, against {}", way.name(), peer.name());
                bar(of, what, CPU_PER_GIB, self.ratio(Peer::Edged, peer, of));
            }
        }
        let alone = |of| self.tally.median(Peer::Edged, of);
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
        if self.tally.asked(Peer::EdgedNode, Figure::RestMemory) {
            bars.push(Bar {
                what: "node: MiB at rest".into(),
                limit: NODE_MEMORY,
                measured: self.tally.median(Peer::EdgedNode, Figure::RestMemory),
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
        self.tally.write_facts(out)?;
        let rounds = self.tally.rounds();
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
        self.tally.write_shares(out, ["balancer", "backend"])?;
        Tally::<Peer, Figure>::write_bars(out, &self.bars())?;
        self.tally.write_errors(out)
    }

    /// A table of the peers of `group`, of those `columns` that were asked of any of them.
    fn table(&self, out: &mut String, group: Group, title: &str, columns: &[(&str, Figure)]) -> std::fmt::Result {
        let peers: Vec<Peer> = self
            .tally
            .peers()
            .into_iter()
            .filter(|peer| peer.group() == group)
            .collect();
        let asked = |figure: Figure| peers.iter().any(|peer| self.tally.asked(*peer, figure));
        // The balancers' tables keep their shape, whatever was left out.
        let whole = group == Group::Balancer && columns.iter().any(|(_, figure)| asked(*figure));
        let columns: Vec<(&str, Figure)> = columns
            .iter()
            .copied()
            .filter(|(_, figure)| whole || self.tally.measured(&peers, *figure))
            .collect();
        if columns.is_empty() {
            return Ok(());
        }
        self.tally.table(out, title, &peers, &columns)
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

    /// The same for programs.
    pub(crate) fn json(&self) -> Result<String> {
        self.tally.json(&Figure::all(), &self.bars(), |peer, object| {
            object.insert("syscalls".into(), json!(self.calls.get(&peer)));
        })
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
