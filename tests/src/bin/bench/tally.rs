//! What was measured, by peer and column: samples, errors, bars, and who used the cores. A metric with any error in any
//! round has no figure.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    fs,
    process::Command,
    thread,
};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use crate::stats::{figure, median, range, spread};

/// A peer or a metric.
pub(crate) trait Named: Copy + Ord {
    /// As written on the command line and in the tables.
    fn name(self) -> &'static str;
}

/// One column of a report.
pub(crate) trait Column: Copy + Ord {
    /// What is measured in one go, and fails as a whole.
    type Metric: Named;

    /// Where it comes from.
    fn metric(self) -> Self::Metric;

    /// Its name for programs.
    fn key(self) -> String;
}

/// Who used the cores during a measurement, in cores.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shares {
    /// The processes of what is measured.
    pub(crate) server: f64,
    /// The client.
    pub(crate) client: f64,
    /// What is behind the server.
    pub(crate) backend: f64,
    /// Anybody else on the machine.
    pub(crate) elsewhere: f64,
    /// Taken by the hypervisor.
    pub(crate) stolen: f64,
    /// Nobody.
    pub(crate) idle: f64,
}

impl Shares {
    /// What a reader has to know before comparing rates. CPU per unit holds in each of these cases, rates do not.
    fn remark(&self, cores: f64, measurement: &Measurement) -> String {
        let mut remarks = Vec::new();
        if measurement.one_client_thread && self.client > 0.95 {
            remarks.push("the client's one thread is the limit");
        }
        if measurement.at_the_limit && self.idle > 0.15 * cores {
            remarks.push("cores idle: waiting, not CPU, is the limit");
        }
        if self.elsewhere + self.stolen > 0.1 * cores {
            remarks.push("machine not quiet");
        }
        remarks.join("; ")
    }
}

/// A line of the table of [`Shares`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Measurement {
    /// For people.
    pub(crate) name: &'static str,
    /// The client cannot use more than a core.
    pub(crate) one_client_thread: bool,
    /// As much as goes, rather than a fixed rate.
    pub(crate) at_the_limit: bool,
}

/// What the figures were measured on.
pub(crate) struct Machine {
    /// Those that this process may use.
    pub(crate) cores: usize,
    /// As printed at the head.
    pub(crate) facts: Vec<(String, String)>,
}

impl Machine {
    /// Of this machine, whose cores are shared by `users`, and the versions of the peers.
    pub(crate) fn facts(users: &str, versions: impl IntoIterator<Item = (&'static str, String)>) -> Result<Self> {
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
            ("cores".into(), format!("{cores} ({model}), shared by {users}")),
            ("kernel".into(), format!("Linux {}", kernel.trim())),
        ];
        facts.extend(versions.into_iter().map(|(name, version)| (name.to_owned(), version)));
        Ok(Self { cores, facts })
    }
}

/// A promise and how it was kept.
pub(crate) struct Bar {
    /// For people.
    pub(crate) what: String,
    /// At most this.
    pub(crate) limit: f64,
    /// `None` without a figure.
    pub(crate) measured: Option<f64>,
}

impl Bar {
    /// In a word.
    pub(crate) fn verdict(&self) -> &'static str {
        match self.measured {
            None => "no figure",
            Some(measured) if measured <= self.limit => "met",
            Some(_) => "MISSED",
        }
    }
}

/// All samples and errors.
pub(crate) struct Tally<P, C: Column> {
    /// What it was measured on.
    pub(crate) machine: Machine,
    rounds: usize,
    quick: bool,
    /// By round; `None` where a round gave none.
    samples: BTreeMap<(P, C), Vec<Option<f64>>>,
    errors: BTreeMap<(P, C::Metric), Vec<String>>,
    /// In the order in which they were first made.
    measurements: Vec<Measurement>,
    shares: BTreeMap<(P, &'static str), Vec<Shares>>,
}

impl<P: Named, C: Column> Tally<P, C> {
    /// Nothing yet, of so many rounds.
    pub(crate) fn new(machine: Machine, rounds: usize, quick: bool) -> Self {
        let (samples, errors, measurements, shares) = Default::default();
        Self {
            machine,
            rounds,
            quick,
            samples,
            errors,
            measurements,
            shares,
        }
    }

    /// Takes one figure of one round.
    pub(crate) fn add(&mut self, peer: P, column: C, round: usize, value: f64) {
        let rounds = self.rounds;
        let samples = self.samples.entry((peer, column)).or_insert_with(|| vec![None; rounds]);
        if let Some(sample) = samples.get_mut(round) {
            *sample = Some(value);
        }
    }

    /// Takes what went wrong; the metric has no figure any more for that peer.
    pub(crate) fn error(&mut self, peer: P, metric: C::Metric, error: String) {
        self.errors.entry((peer, metric)).or_default().push(error);
    }

    /// Takes who used the cores in one measurement.
    pub(crate) fn shares(&mut self, peer: P, measurement: Measurement, shares: Shares) {
        if !self.measurements.contains(&measurement) {
            self.measurements.push(measurement);
        }
        self.shares.entry((peer, measurement.name)).or_default().push(shares);
    }

    /// Anything went wrong anywhere.
    pub(crate) fn failed(&self) -> bool {
        !self.errors.is_empty()
    }

    /// Those with a figure or an error.
    pub(crate) fn peers(&self) -> BTreeSet<P> {
        let of_samples = self.samples.keys().map(|(peer, _)| *peer);
        of_samples.chain(self.errors.keys().map(|(peer, _)| *peer)).collect()
    }

    /// Values by round; nothing if there was any error.
    pub(crate) fn by_round(&self, peer: P, column: C) -> Option<&[Option<f64>]> {
        if self.errors.contains_key(&(peer, column.metric())) {
            return None;
        }
        self.samples.get(&(peer, column)).map(Vec::as_slice)
    }

    /// The values there are; none if there was any error.
    pub(crate) fn values(&self, peer: P, column: C) -> Vec<f64> {
        self.by_round(peer, column)
            .unwrap_or_default()
            .iter()
            .copied()
            .flatten()
            .collect()
    }

    /// Of all rounds.
    pub(crate) fn median(&self, peer: P, column: C) -> Option<f64> {
        median(&self.values(peer, column))
    }

    /// Median of the ratios of each round's two values.
    pub(crate) fn ratio(&self, (peer, column): (P, C), (other, its): (P, C)) -> Option<f64> {
        let (ours, theirs) = (self.by_round(peer, column)?, self.by_round(other, its)?);
        let ratios: Vec<f64> = ours
            .iter()
            .zip(theirs)
            .filter_map(|(ours, theirs)| Some((*ours)? / (*theirs)?))
            .collect();
        median(&ratios)
    }

    /// Whether there is a sample of any of `peers`.
    pub(crate) fn measured(&self, peers: &[P], column: C) -> bool {
        peers.iter().any(|peer| self.samples.contains_key(&(*peer, column)))
    }

    /// Whether it was tried.
    pub(crate) fn asked(&self, peer: P, column: C) -> bool {
        self.samples.contains_key(&(peer, column)) || self.errors.contains_key(&(peer, column.metric()))
    }

    /// Date, machine, versions.
    pub(crate) fn write_facts(&self, out: &mut String) -> std::fmt::Result {
        for (name, value) in &self.machine.facts {
            writeln!(out, "- {name}: {value}")?;
        }
        if self.quick {
            writeln!(
                out,
                "\n**A quick run: it shows that everything works. Its figures are not for quoting.**"
            )?;
        }
        Ok(())
    }

    /// `5 rounds`
    pub(crate) fn rounds(&self) -> String {
        if self.rounds == 1 {
            "1 round".to_owned()
        } else {
            format!("{} rounds", self.rounds)
        }
    }

    /// Medians of `columns`, a line per peer.
    pub(crate) fn table(&self, out: &mut String, title: &str, peers: &[P], columns: &[(&str, C)]) -> std::fmt::Result {
        let names: Vec<&str> = columns.iter().map(|(name, _)| *name).collect();
        writeln!(out, "| {title} | {} | errors |", names.join(" | "))?;
        writeln!(out, "|---|{}---:|", "---:|".repeat(columns.len()))?;
        for peer in peers {
            let cells: Vec<String> = columns.iter().map(|(_, column)| self.cell(*peer, *column)).collect();
            let metrics: BTreeSet<C::Metric> = columns.iter().map(|(_, column)| column.metric()).collect();
            let errors: usize = metrics
                .into_iter()
                .map(|metric| self.errors.get(&(*peer, metric)).map_or(0, Vec::len))
                .sum();
            writeln!(out, "| {} | {} | {errors} |", peer.name(), cells.join(" | "))?;
        }
        writeln!(out)
    }

    fn cell(&self, peer: P, column: C) -> String {
        if self.errors.contains_key(&(peer, column.metric())) {
            return "no figure".into();
        }
        spread(&self.values(peer, column)).unwrap_or_else(|| "–".into())
    }

    /// Who used the cores; `roles` are the names of server and backend.
    pub(crate) fn write_shares(&self, out: &mut String, roles: [&str; 2]) -> std::fmt::Result {
        if self.shares.is_empty() {
            return Ok(());
        }
        let [server, backend] = roles;
        writeln!(out, "Who used the {} cores (medians, in cores):\n", self.machine.cores)?;
        writeln!(
            out,
            "| measurement | peer | {server} | client | {backend} | elsewhere | stolen | idle | remark |"
        )?;
        writeln!(out, "|---|---|---:|---:|---:|---:|---:|---:|---|")?;
        for measurement in &self.measurements {
            let name = measurement.name;
            for peer in self.peers() {
                let Some(all) = self.shares.get(&(peer, name)) else {
                    continue;
                };
                let middle = |of: fn(&Shares) -> f64| median(&all.iter().map(of).collect::<Vec<_>>()).unwrap_or(0.0);
                let shares = Shares {
                    server: middle(|s| s.server),
                    client: middle(|s| s.client),
                    backend: middle(|s| s.backend),
                    elsewhere: middle(|s| s.elsewhere),
                    stolen: middle(|s| s.stolen),
                    idle: middle(|s| s.idle),
                };
                writeln!(
                    out,
                    "| {name} | {} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {} |",
                    peer.name(),
                    shares.server,
                    shares.client,
                    shares.backend,
                    shares.elsewhere,
                    shares.stolen,
                    shares.idle,
                    shares.remark(self.machine.cores as f64, measurement)
                )?;
            }
        }
        writeln!(out)
    }

    /// Promises and verdicts.
    pub(crate) fn write_bars(out: &mut String, bars: &[Bar]) -> std::fmt::Result {
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

    /// What went wrong.
    pub(crate) fn write_errors(&self, out: &mut String) -> std::fmt::Result {
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

    /// All of it for programs; `more` adds to what is said of a peer.
    pub(crate) fn json(
        &self,
        columns: &[C],
        bars: &[Bar],
        more: impl Fn(P, &mut Map<String, Value>),
    ) -> Result<String> {
        let peer = |peer: P| -> Value {
            let mut object = Map::new();
            for column in columns {
                let values = self.values(peer, *column);
                if let (Some(median), Some((low, high))) = (median(&values), range(&values)) {
                    object.insert(
                        column.key(),
                        json!({ "median": median, "min": low, "max": high, "rounds": self.by_round(peer, *column) }),
                    );
                }
            }
            more(peer, &mut object);
            let errors: BTreeMap<&str, &Vec<String>> = self
                .errors
                .iter()
                .filter(|((p, _), _)| *p == peer)
                .map(|((_, metric), errors)| (metric.name(), errors))
                .collect();
            object.insert("errors".into(), json!(errors));
            Value::Object(object)
        };
        let bars: Vec<Value> = bars
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
