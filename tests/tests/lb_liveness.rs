//! The dead are found although they say nothing, and the quiet are not taken for dead.
//!
//! ```text
//! client ── hub ── edge: edged [::]:6443 ──┬── cp1 (fd00::11)
//!                                          ├── cp2 (fd00::12)
//!                                          └── cp3 (fd00::13)
//! ```
//! `EDGED_TEST_KEEPALIVE=1,1,3` scales the keepalive of 10 s, 3 s, 3 probes; one test waits for the real one.

use std::{
    io::Write,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use tests::{
    Edge, World,
    backend::Script,
    load::{Load, Session},
    stall::{Witness, again},
    tls::read_some,
    wait_until,
};

const PATIENCE: Duration = Duration::from_secs(5);
const SCALED: [(&str, &str); 1] = [("EDGED_TEST_KEEPALIVE", "1,1,3")];
const SCALED_LIMIT: Duration = Duration::from_secs(1 + 3 + 1);
/// How late a cut is still seen, though it may be too late then.
const SEEN: Duration = Duration::from_secs(5);

#[test]
fn a_quiet_session_of_a_dead_host_is_cut_by_keepalive() -> Result<()> {
    again(|| {
        let world = World::new(1)?;
        let _edge = Edge::start_with(&world.edge, &world.config("kind = \"api\""), &SCALED)?;
        dead_backend(&world, Duration::from_secs(2), SCALED_LIMIT)
    })
}

#[test]
fn a_quiet_session_of_a_dead_host_is_cut_within_20_s_as_shipped() -> Result<()> {
    again(|| {
        let world = World::new(1)?;
        let _edge = Edge::start(&world.edge, &world.config("kind = \"api\""))?;
        dead_backend(&world, Duration::from_millis(1500), Duration::from_secs(10 + 3 * 3 + 1))
    })
}

#[test]
fn a_dead_client_does_not_hold_its_backend() -> Result<()> {
    let world = World::new(1)?;
    let _edge = Edge::start_with(&world.edge, &world.config("kind = \"api\""), &SCALED)?;
    let backend = world.backend(0, Script::Echo)?;
    let _session = Session::open(&world.client, world.front(), PATIENCE)?;
    let _hole = world.edge.blackhole(&[world.client.ip()])?;
    let took = wait_until("the backend's session ends", SCALED_LIMIT + SEEN, || {
        backend.live() == 0
    })?;
    println!("cut after {took:?}");
    Ok(())
}

#[test]
fn a_quiet_session_of_a_live_host_is_left_alone() -> Result<()> {
    let world = World::new(1)?;
    let _edge = Edge::start_with(&world.edge, &world.config("kind = \"api\""), &SCALED)?;
    let backend = world.backend(0, Script::Echo)?;
    let mut capture = world.edge.capture("tcp port 6443")?;
    let mut session = Session::open(&world.client, world.front(), PATIENCE)?;
    let begin = Instant::now();
    // Several rounds of keepalive on each leg, and not a byte of payload. A probe repeats the last sequence number, so
    // it is an empty packet of the edge after the last payload.
    let sent = capture.so_far()?.packets.len();
    wait_until("eight probes went by", Duration::from_secs(20), || {
        assert!(session.quiet(), "cut after {:?}", begin.elapsed());
        capture
            .so_far()
            .is_ok_and(|trace| trace.packets.len() >= sent + 2 * 2 * 8)
    })?;
    session.echo()?;
    assert_eq!(backend.accepted().len(), 1);
    Ok(())
}

#[test]
fn a_live_client_that_does_not_read_for_25_s_gets_every_byte_in_the_end() -> Result<()> {
    // A pager in front of a log: nobody is dead, somebody is slow. More than all buffers on the way, and as shipped.
    const BYTES: usize = 64 << 20;
    let world = World::new(1)?;
    let _edge = Edge::start(&world.edge, &world.config("kind = \"api\""))?;
    let _backend = world.backend(0, Script::Echo)?;
    let session = Session::open(&world.client, world.front(), PATIENCE)?;
    let (mut reads, mut writes) = (session.stream(), session.stream().try_clone()?);
    writes.set_write_timeout(None)?;
    reads.set_read_timeout(Some(PATIENCE))?;
    let writer = thread::spawn(move || {
        writes.write_all(&vec![7; BYTES])?;
        writes.shutdown(std::net::Shutdown::Write)
    });
    thread::sleep(Duration::from_secs(25));
    let mut got = 0;
    let mut buffer = vec![0; 1 << 20];
    let ended = loop {
        match read_some(&mut reads, &mut buffer) {
            Ok(0) => break Ok(()),
            Ok(count) => got += count,
            Err(error) => break Err(error),
        }
    };
    let sent = writer.join().expect("no panic");
    ensure!(
        ended.is_ok() && sent.is_ok() && got == BYTES,
        "{got} of {BYTES} bytes arrived; reading ended with {ended:?}, writing with {sent:?}"
    );
    Ok(())
}

#[test]
fn a_third_of_all_packets_lost_bans_nobody() -> Result<()> {
    // Alone: a machine without cores to spare loses time as well as packets.
    let world = World::alone(3)?;
    // A SYN is sent again after a second: with this timeout half of all connects fail.
    let keys =
        "kind = \"api\"\nconnect_timeout = \"300ms\"\n[lb.frontend.health]\nmax_fails = 2\nfail_timeout = \"10s\"\n";
    let edge = Edge::start(&world.edge, &world.config(keys))?;
    let _backends = world.echoes()?;
    let stop = AtomicBool::new(false);
    let addresses: Vec<_> = world.cp.iter().map(tests::Node::ip).collect();
    let loss = world.edge.lose(30, &addresses)?;
    thread::scope(|scope| -> Result<()> {
        // A few that stay and talk, so that every backend gives signs of life ...
        for _ in 0..12 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let Ok(mut session) = Session::open(&world.client, world.front(), PATIENCE) else {
                        continue;
                    };
                    while !stop.load(Ordering::Relaxed) && session.echo().is_ok() {
                        thread::sleep(Duration::from_millis(100));
                    }
                }
            });
        }
        // ... and many that come and go.
        let load = Load::of_echoes(&world.client, world.front(), 30, PATIENCE);
        let result = wait_until("300 clients are done", Duration::from_secs(40), || {
            load.so_far().attempts.len() >= 300
        });
        stop.store(true, Ordering::Relaxed);
        println!("{}", load.stop().summary());
        result.map(drop)
    })?;
    let mut failures = 0;
    for index in 0..3 {
        let backend = edge.backend(world.back(index))?;
        failures += backend["connect_failures_total"].as_u64().unwrap_or(0);
        let bans = edge
            .events(world.back(index))?
            .iter()
            .filter(|event| event["kind"] == "ban")
            .count();
        ensure!(bans == 0, "{backend:#}\n{:#?}", edge.events(world.back(index))?);
    }
    // Else this would have tested nothing.
    ensure!(failures >= 6, "only {failures} connects failed at 30 % loss");
    println!("{failures} failed connects, no ban");
    loss.heal();
    Session::open(&world.client, world.front(), PATIENCE)?;
    Ok(())
}

/// Opens a quiet session, waits until it has its keepalive, kills its host without a word, and waits for the cut.
fn dead_backend(world: &World, settle: Duration, limit: Duration) -> Result<()> {
    let _backend = world.backend(0, Script::Echo)?;
    let mut session = Session::open(&world.client, world.front(), PATIENCE)?;
    // A session that dies younger than this has no keepalive yet, and is short enough not to need one.
    ensure!(
        session
            .cut(settle)
            .is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
    );
    let _hole = world.edge.blackhole(&[world.cp[0].ip()])?;
    let witness = Witness::start()?;
    let dead = Instant::now();
    let (took, reset) = session.cut(limit + SEEN)?;
    println!("cut after {took:?}, by {}", if reset { "a reset" } else { "an end" });
    assert!(reset, "an end without a reset could be taken for the server's own");
    let held_up = witness.held_up(dead, dead + took);
    witness.ensure(took <= limit + held_up, format!("cut after {took:?}"))
}
