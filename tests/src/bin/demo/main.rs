//! Shows what the appliance does, live, in network namespaces: `demo [PART]`. Without PART: every part.
//!
//! A part builds a small world, runs `edged` in it as a user has it, breaks things, and judges by what clients and
//! captures have seen. Exit status 0: every claim held.

mod clients;
mod dns64;
mod lb;
mod nat64;
mod servers;

use std::{
    fmt::Display,
    io::Write,
    process::ExitCode,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Result;
use tests::Lab;

/// A part: its name, what it shows, how it is run.
type Part = (&'static str, &'static str, fn(&mut Story) -> Result<()>);

const PARTS: [Part; 3] = [
    (
        "lb",
        "the load balancer before a cluster of three servers, while they fail",
        lb::run,
    ),
    (
        "dns64",
        "names for nodes without IPv4: synthesised addresses, and a zone that nodes register in",
        dns64::run,
    ),
    (
        "nat64",
        "a node without IPv4 uses a server that has nothing else, by name",
        nat64::run,
    ),
];

fn main() -> ExitCode {
    Lab::clean_up_when_interrupted();
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let parts: Vec<&Part> = PARTS
        .iter()
        .filter(|part| wanted.is_empty() || wanted.iter().any(|name| name == part.0))
        .collect();
    if let Some(unknown) = wanted
        .iter()
        .find(|name| PARTS.iter().all(|part| part.0 != name.as_str()))
    {
        eprintln!("there is no part \"{unknown}\"; there is:");
        for (name, shows, _) in PARTS {
            eprintln!("  {name:<6} {shows}");
        }
        return ExitCode::from(2);
    }
    let mut story = Story::begin();
    for (name, shows, run) in parts {
        println!("── {name}: {shows}\n");
        if let Err(error) = run(&mut story) {
            story.claim(false, format!("part {name} came to its end: {error:#}"));
        }
    }
    story.end()
}

/// The timeline: what was done, what was seen, which claims held.
#[derive(Debug)]
pub(crate) struct Story {
    begin: Instant,
    held: usize,
    failed: Vec<String>,
}

/// A moment by both clocks: clients go by the one, captures by the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark {
    pub(crate) at: Instant,
    pub(crate) wall: SystemTime,
}

impl Mark {
    pub(crate) fn now() -> Self {
        Self {
            at: Instant::now(),
            wall: SystemTime::now(),
        }
    }
}

impl Story {
    fn begin() -> Self {
        Self {
            begin: Instant::now(),
            held: 0,
            failed: Vec::new(),
        }
    }

    /// Something is done to the world, now.
    pub(crate) fn event(&self, what: impl Display) -> Mark {
        println!("\n{:6.1} s  {what}", self.begin.elapsed().as_secs_f64());
        let _ = std::io::stdout().flush();
        Mark::now()
    }

    /// Something was seen.
    pub(crate) fn note(&self, what: impl Display) {
        for line in what.to_string().lines() {
            println!("          {line}");
        }
        let _ = std::io::stdout().flush();
    }

    /// A claim held or not, with its figure.
    pub(crate) fn claim(&mut self, holds: bool, what: impl Display) {
        println!("        {} {what}", if holds { '✔' } else { '✘' });
        let _ = std::io::stdout().flush();
        if holds {
            self.held += 1;
        } else {
            self.failed.push(what.to_string());
        }
    }

    fn end(self) -> ExitCode {
        let took = self.begin.elapsed();
        println!(
            "\n{:6.1} s  {} claims held, {} did not",
            took.as_secs_f64(),
            self.held,
            self.failed.len()
        );
        for what in &self.failed {
            println!("        ✘ {what}");
        }
        ExitCode::from(u8::from(!self.failed.is_empty()))
    }
}

/// `12 ms`, `1.25 s`.
pub(crate) fn human(duration: Duration) -> String {
    match duration.as_millis() {
        millis @ 0..1000 => format!("{millis} ms"),
        millis => format!("{:.2} s", millis as f64 / 1e3),
    }
}
