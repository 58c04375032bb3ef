//! Clients go to a backend that works, whatever happens to another.
//!
//! ```text
//! client ── hub ── edge: edged [::]:6443 ──┬── cp1 (fd00::11)   the one that fails
//!                                          ├── cp2 (fd00::12)
//!                                          └── cp3 (fd00::13)
//! ```
//! Only passive health is on: what is seen here, real connections have found out.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Result, ensure};
use tests::{
    Edge, World,
    backend::Script,
    capture::Trace,
    load::{End, Load, Session},
    stall::{Witness, again},
    wait_until,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// What scheduling may add to a time that the kernel's clock decides; what a machine adds that stands still comes on top.
const SLACK: Duration = Duration::from_millis(400);
const PATIENCE: Duration = Duration::from_secs(8);
/// Bans that do not grow, as the scenarios wait for several.
const KEYS: &str = "kind = \"api\"\nconnect_timeout = \"1s\"\n[lb.frontend.health]\nmax_fails = 2\nfail_timeout = \"4s\"\nmax_ban = \"4s\"\n";

#[test]
fn a_backend_that_refuses_costs_no_client_an_error() -> Result<()> {
    again(one_refuses)
}

fn one_refuses() -> Result<()> {
    let world = World::alone(3)?;
    let edge = Edge::start(&world.edge, &world.config(KEYS))?;
    let _others = [world.backend(1, Script::Echo)?, world.backend(2, Script::Echo)?];
    let witness = Witness::start()?;
    let load = Load::of_echoes(&world.client, world.front(), 100, PATIENCE);
    edge.wait_for_state(world.back(0), "banned", PATIENCE)?;
    wait_until("300 clients are done", PATIENCE, || load.so_far().attempts.len() > 300)?;
    let report = load.stop();
    println!("{}", report.summary());
    assert_eq!(report.failures().len(), 0, "{}", report.summary());
    let slowest = report.without_stalls(&witness).slowest();
    witness.ensure(slowest < SLACK, report.summary())
}

#[test]
fn a_backend_in_a_black_hole_costs_a_client_one_connect_timeout_at_most() -> Result<()> {
    again(one_in_a_hole)
}

fn one_in_a_hole() -> Result<()> {
    let world = World::alone(3)?;
    let edge = Edge::start(&world.edge, &world.config(KEYS))?;
    let _backends = world.echoes()?;
    let witness = Witness::start()?;
    let load = Load::of_echoes(&world.client, world.front(), 50, PATIENCE);
    wait_until("cp1 serves", PATIENCE, || load.so_far().served_by("cp1") > 0)?;
    let hole = world.edge.blackhole(&[world.cp[0].ip()])?;
    edge.wait_for_state(world.back(0), "banned", PATIENCE)?;
    let banned = Instant::now();
    let sent = load.so_far().attempts.len();
    wait_until("50 more are done", PATIENCE, || {
        load.so_far().attempts.len() > sent + 50
    })?;
    hole.heal();
    let served = load.so_far().served_by("cp1");
    wait_until("cp1 serves again", PATIENCE, || load.so_far().served_by("cp1") > served)?;
    let report = load.stop();
    println!("{}", report.summary());
    assert_eq!(report.failures().len(), 0, "{}", report.summary());
    let own = report.without_stalls(&witness);
    witness.ensure(own.slowest() < CONNECT_TIMEOUT + SLACK, report.summary())?;
    // Once it is banned nobody waits, the one probe of each ban excepted.
    let after = own.between(banned, banned + Duration::from_secs(1));
    witness.ensure(after.slowest() < SLACK, format!("while banned: {}", after.summary()))
}

#[test]
fn sessions_of_a_backend_that_goes_down_are_reset_within_a_second() -> Result<()> {
    again(one_goes_down)
}

fn one_goes_down() -> Result<()> {
    let world = World::alone(3)?;
    // Not by the fewest sessions: the backend that holds most of them would be asked for no other, and found out late.
    let edge = Edge::start(
        &world.edge,
        &world.config(&format!("balance = \"round-robin\"\n{KEYS}")),
    )?;
    let mut backends = world.echoes()?;
    let mut sessions = sessions_on(&world, "cp1", 10)?;
    let mut others = sessions_on(&world, "cp2", 3)?;
    // The server lives on but takes no connection: its sessions would stay for ever.
    backends[0].stop_listening();
    let load = Load::of_echoes(&world.client, world.front(), 50, PATIENCE);
    edge.wait_for_state(world.back(0), "banned", PATIENCE)?;
    let (witness, begin) = (Witness::start()?, Instant::now());
    for session in &mut sessions {
        let (_, reset) = session.cut(Duration::from_secs(5))?;
        assert!(reset, "an end without a reset could be taken for the server's own");
    }
    let took = begin.elapsed();
    println!("10 sessions reset within {took:?} of the ban");
    let limit = Duration::from_secs(1) + witness.held_up(begin, begin + took);
    witness.ensure(took < limit, format!("after {took:?}"))?;
    for session in &mut others {
        session.echo()?;
    }
    assert_eq!(load.stop().failures().len(), 0);
    Ok(())
}

#[test]
fn with_every_backend_refusing_the_client_is_reset_at_once() -> Result<()> {
    again(all_refuse)
}

fn all_refuse() -> Result<()> {
    let world = World::alone(3)?;
    let _edge = Edge::start(&world.edge, &world.config(KEYS))?;
    let witness = Witness::start()?;
    let report = until_done(Load::of_echoes(&world.client, world.front(), 20, PATIENCE), 20)?;
    assert_eq!(report.count(&End::Reset), report.attempts.len(), "{}", report.summary());
    let slowest = report.without_stalls(&witness).slowest();
    witness.ensure(slowest < SLACK, report.summary())?;
    // And as soon as one is back, it serves.
    let _back = world.backend(1, Script::Echo)?;
    let begin = Instant::now();
    let took = wait_until("cp2 serves", PATIENCE, || {
        Session::open(&world.client, world.front(), PATIENCE).is_ok()
    })?;
    let limit = Duration::from_secs(1) + witness.held_up(begin, begin + took);
    witness.ensure(took < limit, format!("after {took:?}"))
}

#[test]
fn with_every_backend_in_a_black_hole_the_client_is_reset_and_does_not_hang() -> Result<()> {
    again(all_in_a_hole)
}

fn all_in_a_hole() -> Result<()> {
    let world = World::alone(3)?;
    let _edge = Edge::start(&world.edge, &world.config(KEYS))?;
    let _backends = world.echoes()?;
    let _hole = world
        .edge
        .blackhole(&[world.cp[0].ip(), world.cp[1].ip(), world.cp[2].ip()])?;
    let witness = Witness::start()?;
    let report = until_done(Load::of_echoes(&world.client, world.front(), 10, PATIENCE), 30)?;
    println!("{}", report.summary());
    assert_eq!(report.count(&End::Reset), report.attempts.len(), "{}", report.summary());
    let slowest = report.without_stalls(&witness).slowest();
    witness.ensure(slowest < 3 * CONNECT_TIMEOUT + SLACK, report.summary())
}

#[test]
fn a_lone_backend_is_never_banned() -> Result<()> {
    let world = World::new(1)?;
    let edge = Edge::start(&world.edge, &world.config(KEYS))?;
    let report = until_done(Load::of_echoes(&world.client, world.front(), 50, PATIENCE), 20)?;
    assert_eq!(report.count(&End::Reset), report.attempts.len(), "{}", report.summary());
    assert_eq!(edge.state(world.back(0))?, "healthy");
    // No ban has to run out first: the very next connection is served.
    let _backend = world.backend(0, Script::Echo)?;
    Session::open(&world.client, world.front(), PATIENCE)?;
    Ok(())
}

#[test]
fn a_ban_comes_after_max_fails_and_ends_with_one_probe_at_a_time() -> Result<()> {
    let world = World::alone(3)?;
    let edge = Edge::start(&world.edge, &world.config(&KEYS.replace("4s", "2s")))?;
    let _others = [world.backend(1, Script::Echo)?, world.backend(2, Script::Echo)?];
    let mut capture = world.cp[0].capture("tcp port 6443")?;
    let connects = |trace: &Trace| trace.connects(world.edge.ip(), world.back(0));
    // One after the other, so that what is in flight together does not blur the count.
    let knock = || Session::open(&world.client, world.front(), PATIENCE);
    wait_until("it is banned", PATIENCE, || {
        knock().is_ok() && edge.state(world.back(0)).is_ok_and(|s| s == "banned")
    })?;
    let before = connects(&capture.so_far()?);
    assert_eq!(before.len(), 2, "max_fails is 2: {before:?}");
    // Many at once: still one probe when the ban has run out.
    let load = Load::of_echoes(&world.client, world.front(), 100, PATIENCE);
    let begin = SystemTime::now();
    wait_until("three probes were sent", Duration::from_secs(15), || {
        capture.so_far().is_ok_and(|trace| connects(&trace).len() >= 5)
    })?;
    let flows = connects(&capture.so_far()?);
    assert!(flows.iter().all(|flow| flow.syns == 1 && flow.refused()), "{flows:?}");
    for pair in flows[1..].windows(2) {
        let gap = pair[1].opened.duration_since(pair[0].opened)?;
        assert!(
            gap >= Duration::from_millis(1950),
            "a probe {gap:?} after the one before; begun {begin:?}"
        );
    }
    // And a probe that is answered brings it back.
    let back = world.backend(0, Script::Echo)?;
    edge.wait_for_state(world.back(0), "healthy", Duration::from_secs(5))?;
    wait_until("it serves its share", PATIENCE, || back.accepted().len() > 20)?;
    let report = load.stop();
    ensure!(report.failures().is_empty(), "{}", report.summary());
    Ok(())
}

/// Opens sessions until `count` of them are served by `server`; the others are closed again.
fn sessions_on(world: &World, server: &str, count: usize) -> Result<Vec<Session>> {
    let (mut wanted, mut others) = (Vec::new(), Vec::new());
    while wanted.len() < count {
        let session = Session::open(&world.client, world.front(), PATIENCE)?;
        if session.server == server {
            wanted.push(session)
        } else {
            others.push(session)
        }
        ensure!(others.len() < 50 * count, "{server} serves nobody");
    }
    Ok(wanted)
}

fn until_done(load: Load, count: usize) -> Result<tests::load::Report> {
    wait_until(&format!("{count} clients are done"), Duration::from_secs(15), || {
        load.so_far().attempts.len() >= count
    })?;
    Ok(load.stop())
}
