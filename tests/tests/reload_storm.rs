//! A thousand reloads, half of them faulty, are not noticed by those who are connected or connect.
//!
//! ```text
//! client ── hub ── edge: edged [::]:6443 ──┬── cp1 (fd00::11)
//!   200 connections/s, 100 quiet sessions  ├── cp2 (fd00::12)
//!                                          └── cp3 (fd00::13)
//! ```

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::{
    Edge, World,
    load::{Load, Session},
    wait_until,
};

const PATIENCE: Duration = Duration::from_secs(5);
const RELOADS: usize = 1000;

#[test]
fn a_thousand_reloads_half_of_them_faulty_disturb_nobody_and_leave_nothing_behind() -> Result<()> {
    let world = World::alone(3)?;
    let good = |weight: usize| {
        let second = format!("\"{}\"", world.back(1));
        let weighted = format!("{{ address = {second}, weight = {weight} }}");
        let config = world.config(&format!("kind = \"api\"\nconnect_timeout = \"{}ms\"", 500 + weight));
        config.replacen(&second, &weighted, 1)
    };
    // Each faulty for another reason, at another stage.
    let faulty = [
        good(1).replace("[[lb.frontend]]", "[[lb.frontend]"),
        good(1).replace("kind = \"api\"", "kind = \"apu\""),
        good(1).replace("name =", "nmae ="),
        good(1).replace("backends = [", "backends = []\n#"),
        good(1).replace("500ms", "0ms").replace("501ms", "0ms"),
        // Bound by another: known only once it is tried.
        good(1).replace(&world.edge.at4(6443).to_string(), "127.0.0.1:7000"),
    ];
    let edge = Edge::start(&world.edge, &good(1))?;
    let _taken = world.edge.enter(|| std::net::TcpListener::bind("127.0.0.1:7000"))?;
    let _backends = world.echoes()?;
    let mut quiet: Vec<Session> = (0..100)
        .map(|_| Session::open(&world.client, world.front(), PATIENCE))
        .collect::<Result<_, _>>()?;
    let load = Load::of_echoes(&world.client, world.front(), 200, PATIENCE);
    let reload = |round: usize| -> Result<Duration> {
        let begin = Instant::now();
        let (text, code) = match round % 2 {
            0 => (good(2 + round % 200), 0),
            _ => (faulty[round / 2 % faulty.len()].clone(), 2),
        };
        let said = edge.apply(&text)?;
        ensure!(said.code == Some(code), "round {round}: {said}\n{text}");
        Ok(begin.elapsed())
    };
    // Every path has been taken once before memory is compared.
    for round in 0..2 * faulty.len() {
        reload(round)?;
    }
    wait_until("400 clients were served", PATIENCE, || load.so_far().served() >= 400)?;
    let (processes, memory) = (edge.processes(), edge.pss_kib()?);
    let begin = Instant::now();
    let mut slowest = Duration::ZERO;
    for round in 0..RELOADS {
        slowest = slowest.max(reload(round)?);
    }
    let took = begin.elapsed();
    let (after, memory_after) = (edge.processes(), edge.pss_kib()?);
    let report = load.stop();
    println!(
        "{RELOADS} reloads in {took:.1?}, slowest {slowest:?}; {}",
        report.summary()
    );
    println!(
        "{} processes before, {} after; {memory} KiB before, {memory_after} KiB after",
        processes.len(),
        after.len()
    );
    assert_eq!(report.failures().len(), 0, "{}", report.summary());
    assert_eq!(after, processes, "the same processes");
    assert!(
        memory_after <= memory + 5 * 1024,
        "{memory} KiB before, {memory_after} KiB after"
    );
    for (index, session) in quiet.iter_mut().enumerate() {
        session.echo().with_context(|| format!("quiet session {index}"))?;
    }
    Ok(())
}

#[test]
fn a_sighup_takes_effect_and_a_faulty_file_changes_nothing() -> Result<()> {
    let world = World::new(2)?;
    let edge = Edge::start(&world.edge, &world.config("kind = \"api\""))?;
    let _backends = world.echoes()?;
    let mut session = Session::open(&world.client, world.front(), PATIENCE)?;
    let revision = |edge: &Edge| -> Result<u64> {
        let status = edge.status()?;
        tests::edge::find(&status, "revision")
            .and_then(serde_json::Value::as_u64)
            .context("a revision")
    };
    let before = revision(&edge)?;
    edge.reload(&world.config("kind = \"api\"\nconnect_timeout = \"700ms\""))?;
    wait_until("the file is in effect", PATIENCE, || {
        revision(&edge).is_ok_and(|now| now > before)
    })?;
    let now = revision(&edge)?;
    edge.reload(&world.config("kind = \"api\"\nconnect_timeout = \"sevenhundred\""))?;
    wait_until("the fault is in the status", PATIENCE, || {
        edge.status().is_ok_and(|status| {
            tests::edge::find(&status, "last_error").is_some_and(|error| error.to_string().contains("sevenhundred"))
        })
    })?;
    assert_eq!(revision(&edge)?, now);
    session.echo()?;
    Session::open(&world.client, world.front(), PATIENCE)?;
    Ok(())
}
