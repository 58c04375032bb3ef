//! What was measured of the resolvers, as tables and verdicts.

use std::fmt::Write;

use anyhow::Result;

use super::{Kind, Load, Metric, peers::Peer};
use crate::tally::{Bar, Column, Machine, Measurement, Named, Shares, Tally};

/// What is known of one metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum What {
    /// Queries answered per second.
    Rate,
    /// µs from when a query was due to its answer.
    P50,
    /// µs from when a query was due to its answer.
    P99,
    /// µs of the resolver's processes per answered query.
    Cpu,
    /// Percent of the queries without an answer within a second.
    Loss,
    /// Queries to the upstream per query of the clients: how many were misses.
    Upstream,
    /// Percent of the queries that were sent more than a millisecond after they were due.
    Late,
}

/// One column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Figure(pub(crate) Metric, pub(crate) What);

impl Column for Figure {
    type Metric = Metric;

    fn metric(self) -> Metric {
        self.0
    }

    fn key(self) -> String {
        let what = match self.1 {
            What::Rate => "queries_per_second",
            What::P50 => "p50_us",
            What::P99 => "p99_us",
            What::Cpu => "cpu_us_per_query",
            What::Loss => "loss_percent",
            What::Upstream => "upstream_per_query",
            What::Late => "late_percent",
        };
        format!("{}_{}_{what}", self.0.kind.name(), self.0.load.name())
    }
}

impl Figure {
    fn all() -> Vec<Self> {
        const WHATS: [What; 7] = [
            What::Rate,
            What::P50,
            What::P99,
            What::Cpu,
            What::Loss,
            What::Upstream,
            What::Late,
        ];
        Metric::all()
            .into_iter()
            .flat_map(|metric| WHATS.map(|what| Self(metric, what)))
            .collect()
    }
}

/// Of our CPU time per cached query, against unbound's.
const CPU_PER_QUERY: f64 = 0.67;
/// Of our CPU time per cached synthesised answer, against a cached native one.
const SYNTHESISED: f64 = 1.1;

/// All samples and errors.
pub(crate) struct Report {
    /// Where they are.
    pub(crate) tally: Tally<Peer, Figure>,
    rates: [u64; 4],
    window: u64,
}

impl Report {
    /// Nothing yet; `rates` are those offered, by kind, and `window` is what is outstanding at maximum.
    pub(crate) fn new(machine: Machine, rounds: usize, quick: bool, rates: [u64; 4], window: u64) -> Self {
        Self {
            tally: Tally::new(machine, rounds, quick),
            rates,
            window,
        }
    }

    /// Takes who used the cores in one measurement.
    pub(crate) fn shares(&mut self, peer: Peer, metric: Metric, shares: Shares) {
        let measurement = Measurement {
            name: metric.name(),
            one_client_thread: true,
            at_the_limit: metric.load == Load::Maximum,
        };
        self.tally.shares(peer, measurement, shares);
    }

    /// Those whose metric was asked for.
    fn bars(&self) -> Vec<Bar> {
        let mut bars = Vec::new();
        let cpu = |kind: Kind, load: Load| Figure(Metric { kind, load }, What::Cpu);
        for load in Load::ALL {
            for kind in [Kind::A, Kind::Synthesised] {
                let of = cpu(kind, load);
                if self.tally.asked(Peer::Edged, of) {
                    bars.push(Bar {
                        what: format!("CPU per query, {}, {}, against unbound", kind.title(), load.title()),
                        limit: CPU_PER_QUERY,
                        measured: self.tally.ratio((Peer::Edged, of), (Peer::Unbound, of)),
                    });
                }
            }
            let (ours, native) = (cpu(Kind::Synthesised, load), cpu(Kind::Native, load));
            if self.tally.asked(Peer::Edged, ours) {
                bars.push(Bar {
                    what: format!("CPU per query, cached, {}: synthesised against native", load.title()),
                    limit: SYNTHESISED,
                    measured: self.tally.ratio((Peer::Edged, ours), (Peer::Edged, native)),
                });
            }
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
        writeln!(
            out,
            "\nMedian of {} (smallest–largest). CPU is that of the resolver's processes. At maximum, {} queries are \
             outstanding.\n",
            self.tally.rounds(),
            self.window
        )?;
        let peers: Vec<Peer> = self.tally.peers().into_iter().collect();
        for (kind, rate) in Kind::ALL.into_iter().zip(self.rates) {
            let columns: Vec<(&str, Figure)> = [
                ("p50 µs", Load::Rate, What::P50),
                ("p99 µs", Load::Rate, What::P99),
                ("CPU µs/query", Load::Rate, What::Cpu),
                ("lost %", Load::Rate, What::Loss),
                ("sent late %", Load::Rate, What::Late),
                ("upstream/query", Load::Rate, What::Upstream),
                ("max queries/s", Load::Maximum, What::Rate),
                ("CPU µs/query at max", Load::Maximum, What::Cpu),
                ("p99 µs at max", Load::Maximum, What::P99),
                ("lost % at max", Load::Maximum, What::Loss),
            ]
            .map(|(name, load, what)| (name, Figure(Metric { kind, load }, what)))
            .into_iter()
            .filter(|(_, figure)| peers.iter().any(|peer| self.tally.asked(*peer, *figure)))
            .collect();
            if !columns.is_empty() {
                let title = format!("{}, {rate} queries/s", kind.title());
                self.tally.table(out, &title, &peers, &columns)?;
            }
        }
        self.tally.write_shares(out, ["resolver", "upstream"])?;
        Tally::<Peer, Figure>::write_bars(out, &self.bars())?;
        self.tally.write_errors(out)
    }

    /// The same for programs.
    pub(crate) fn json(&self) -> Result<String> {
        self.tally.json(&Figure::all(), &self.bars(), |_, _| {})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let machine = Machine {
            cores: 2,
            facts: vec![("cores".into(), "2".into())],
        };
        Report::new(machine, 3, false, [1000; 4], 128)
    }

    fn fill(report: &mut Report, peer: Peer, kind: Kind, values: [f64; 3]) {
        let figure = Figure(Metric { kind, load: Load::Rate }, What::Cpu);
        values
            .into_iter()
            .enumerate()
            .for_each(|(round, value)| report.tally.add(peer, figure, round, value));
    }

    fn verdict(report: &Report, word: &str) -> (Option<f64>, &'static str) {
        let bars = report.bars();
        let bar = bars.iter().find(|bar| bar.what.contains(word)).expect("a bar");
        (bar.measured, bar.verdict())
    }

    #[test]
    fn cached_queries_are_compared_with_unbound_round_by_round() {
        let mut report = report();
        fill(&mut report, Peer::Edged, Kind::A, [4.0, 5.0, 9.0]);
        fill(&mut report, Peer::Unbound, Kind::A, [8.0, 10.0, 10.0]);
        fill(&mut report, Peer::Bind, Kind::A, [1.0, 1.0, 1.0]);
        assert_eq!(
            verdict(&report, "cached A, at the rate, against unbound"),
            (Some(0.5), "met")
        );
    }

    #[test]
    fn synthesised_answers_are_compared_with_our_own_native_ones() {
        let mut report = report();
        fill(&mut report, Peer::Edged, Kind::Synthesised, [6.0; 3]);
        fill(&mut report, Peer::Edged, Kind::Native, [5.0; 3]);
        assert_eq!(verdict(&report, "synthesised against native"), (Some(1.2), "MISSED"));
        assert_eq!(
            verdict(&report, "synthesised AAAA, at the rate, against unbound"),
            (None, "no figure")
        );
    }

    #[test]
    fn peers_alone_have_no_bars() {
        let mut report = report();
        fill(&mut report, Peer::Unbound, Kind::A, [8.0; 3]);
        assert!(report.bars().is_empty());
        assert!(
            report.markdown().contains("| unbound | 8.00 (8.00–8.00) | 0 |"),
            "{}",
            report.markdown()
        );
    }
}
