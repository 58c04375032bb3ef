//! A worker that dies is not noticed by those who connect.
//!
//! ```text
//! client ── hub ── edge: edged ─┬─ worker lb [::]:6443 ──┬── cp1 (fd00::11)
//!          500 connections/s    └─ worker web            ├── cp2 (fd00::12)
//!                                                        └── cp3 (fd00::13)
//! ```

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tests::{
    Edge, World,
    backend::Backend,
    load::{End, Load},
    process, wait_until,
};

const PATIENCE: Duration = Duration::from_secs(5);
const RATE: u32 = 500;

#[test]
fn killing_the_balancer_twenty_times_refuses_nobody() -> Result<()> {
    let (world, edge, _backends) = start()?;
    let load = Load::of_echoes(&world.client, world.front(), RATE, PATIENCE);
    let mut outages = Vec::new();
    let supervisor = edge.pid();
    for round in 0..20 {
        let served = load.so_far().served();
        wait_until("100 more were served", PATIENCE, || {
            load.so_far().served() >= served + 100
        })?;
        let before = edge.worker("lb")?;
        let begin = Instant::now();
        process::signal(before, Signal::KILL)?;
        edge.wait_for_new_worker("lb", before, PATIENCE)
            .with_context(|| format!("kill {round}"))?;
        outages.push(begin.elapsed());
    }
    let served = load.so_far().served();
    wait_until("100 more were served", PATIENCE, || {
        load.so_far().served() >= served + 100
    })?;
    let report = load.stop();
    outages.sort_unstable();
    println!("{}", report.summary());
    println!(
        "the worker was back after {:?} (median), {:?} (slowest)",
        outages[10], outages[19]
    );
    assert_eq!(edge.pid(), supervisor);
    assert_eq!(report.count(&End::Refused), 0, "{}", report.summary());
    assert_eq!(report.count(&End::TimedOut), 0, "{}", report.summary());
    // Only what was in flight in the dead process may end: a few per kill, since one is done within milliseconds.
    let cut = report.failures().len();
    ensure!(cut <= 20 * 25, "{cut} were cut by 20 kills: {}", report.summary());
    ensure!(report.slowest() < PATIENCE, "{}", report.summary());
    Ok(())
}

#[test]
fn killing_or_stopping_the_web_worker_disturbs_no_connection() -> Result<()> {
    let (world, edge, _backends) = start()?;
    let balancer = edge.worker("lb")?;
    let mut quiet: Vec<_> = (0..20)
        .map(|_| tests::load::Session::open(&world.client, world.front(), PATIENCE))
        .collect::<Result<_, _>>()?;
    let load = Load::of_echoes(&world.client, world.front(), RATE, PATIENCE);
    for signal in [Signal::KILL, Signal::STOP] {
        edge.metrics()?;
        let before = edge.worker("web")?;
        let begin = Instant::now();
        process::signal(before, signal)?;
        edge.wait_for_new_worker("web", before, Duration::from_secs(15))?;
        wait_until("metrics are served", PATIENCE, || edge.metrics().is_ok())?;
        println!("after {signal:?} the web worker was back within {:?}", begin.elapsed());
    }
    let report = load.stop();
    println!("{}", report.summary());
    assert_eq!(report.failures().len(), 0, "{}", report.summary());
    assert_eq!(edge.worker("lb")?, balancer);
    for session in &mut quiet {
        session.echo()?;
    }
    Ok(())
}

fn start() -> Result<(World, Edge, Vec<Backend>)> {
    let world = World::alone(3)?;
    let edge = Edge::start(&world.edge, &world.config("kind = \"api\""))?;
    let backends = world.echoes()?;
    Ok((world, edge, backends))
}
