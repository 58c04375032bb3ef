//! A drained backend finishes what it has and gets nothing else, until the operator says otherwise.
//!
//! ```text
//! client ── hub ── edge: edged [::]:6443 ──┬── cp1 (fd00::11)   drained
//!                                          ├── cp2 (fd00::12)
//!                                          └── cp3 (fd00::13)
//! ```

use std::time::Duration;

use anyhow::{Result, ensure};
use tests::{
    Edge, World,
    load::{Load, Session},
    wait_until,
};

const PATIENCE: Duration = Duration::from_secs(5);

#[test]
fn a_drained_backend_keeps_its_sessions_and_gets_no_others_even_after_a_restart() -> Result<()> {
    let world = World::new(3)?;
    let edge = Edge::start(&world.edge, &world.config("kind = \"api\""))?;
    let backends = world.echoes()?;
    let mut sessions: Vec<Session> = (0..9)
        .map(|_| Session::open(&world.client, world.front(), PATIENCE))
        .collect::<Result<_, _>>()?;
    assert_eq!(backends[0].live(), 3, "the fewest sessions: three each");
    let address = world.back(0).to_string();

    let drain = edge.ctl(&["lb", "drain", &address])?;
    ensure!(drain.code == Some(0), "{drain}");
    assert_eq!(edge.state(&address)?, "drained");
    let before = backends[0].accepted().len();
    no_errors(&world, 60)?;
    assert_eq!(
        backends[0].accepted().len(),
        before,
        "a drained backend gets no new session"
    );
    for session in &mut sessions {
        session.echo()?;
    }
    assert_eq!(backends[0].live(), 3, "a drained backend keeps its sessions");

    edge.restart()?;
    assert_eq!(edge.state(&address)?, "drained", "a drain survives a restart");
    no_errors(&world, 60)?;
    assert_eq!(backends[0].accepted().len(), before, "after the restart too");

    let undrain = edge.ctl(&["lb", "undrain", &address])?;
    ensure!(undrain.code == Some(0), "{undrain}");
    assert_eq!(edge.state(&address)?, "healthy");
    no_errors(&world, 60)?;
    assert!(
        backends[0].accepted().len() > before,
        "an undrained backend gets sessions again"
    );
    Ok(())
}

#[test]
fn draining_what_is_not_there_is_refused_with_what_is() -> Result<()> {
    let world = World::new(2)?;
    let edge = Edge::start(&world.edge, &world.config("kind = \"api\""))?;
    let said = edge.ctl(&["lb", "drain", "[fd00::99]:6443"])?;
    assert_eq!(said.code, Some(2), "{said}");
    assert!(said.err.contains("[fd00::99]:6443"), "{said}");
    let named = |index: usize| said.err.contains(&world.back(index).to_string());
    assert!(named(0) || named(1), "{said}");
    Ok(())
}

fn no_errors(world: &World, clients: usize) -> Result<()> {
    let load = Load::of_echoes(&world.client, world.front(), 100, PATIENCE);
    wait_until("the clients are done", PATIENCE, || {
        load.so_far().attempts.len() >= clients
    })?;
    let report = load.stop();
    ensure!(report.failures().is_empty(), "{}", report.summary());
    Ok(())
}
