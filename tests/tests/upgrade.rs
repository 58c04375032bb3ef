//! Another program in the place of the running one, and nobody notices.
//!
//! ```text
//! client ── hub ── edge: edged ─┬─ worker lb [::]:6443 ──┬── cp1 (fd00::11)
//!          200 connections/s    └─ worker web            └── cp2 (fd00::12)
//!                  edgectl upgrade BINARY
//! ```
//! The other program is a copy of the first with another build id.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use tests::{
    Edge, World,
    backend::Backend,
    edge::{other_build, program},
    load::{End, Load},
    wait_until,
};

const PATIENCE: Duration = Duration::from_secs(5);
const RATE: u32 = 200;
/// Names the message at which the new side of a hand-over dies; see appliance/src/handover.rs.
const DIE: &str = "EDGED_TEST_HANDOVER_DIE";

#[test]
fn three_upgrades_refuse_nobody_and_keep_the_process() -> Result<()> {
    let stage = Stage::set(&[])?;
    let (edge, load) = (&stage.edge, stage.load());
    let supervisor = edge.pid();
    let mut before = edge.builds()?;
    for round in 0..3 {
        more_are_served(&load, 50)?;
        let (lb, web) = (edge.worker("lb")?, edge.worker("web")?);
        let next = &stage.programs[(round as usize + 1) % 2];
        let said = edge.upgraded(next).with_context(|| round.to_string())?;
        println!("round {round}: {}", said.out.lines().last().unwrap_or_default());
        let after = edge.builds()?;
        assert!(
            after.iter().all(|(_, build)| *build == after[0].1),
            "{round}: one build everywhere: {after:?}"
        );
        assert_ne!(after[0].1, before[0].1, "{round}: another build");
        assert_eq!(edge.pid(), supervisor);
        assert_eq!(edge.status()?["pid"], supervisor);
        assert_ne!(edge.worker("lb")?, lb);
        assert_ne!(edge.worker("web")?, web);
        let status = edge.status()?;
        assert_eq!(status["upgrade"]["state"], "done", "{status}");
        assert!(status["upgrade"]["number"].as_u64() > Some(round), "{status}");
        for worker in edge.workers()? {
            assert_eq!(worker["restarts"], 0, "{worker}");
        }
        wait_until("the old workers have ended", PATIENCE, || !alive(lb) && !alive(web))?;
        edge.metrics()?;
        before = after;
    }
    more_are_served(&load, 50)?;
    let report = load.stop();
    println!("{}", report.summary());
    assert_eq!(report.count(&End::Refused), 0, "{}", report.summary());
    assert_eq!(report.count(&End::TimedOut), 0, "{}", report.summary());
    Ok(())
}

#[test]
fn a_program_that_cannot_take_over_is_refused_and_changes_nothing() -> Result<()> {
    let stage = Stage::set(&[])?;
    let (edge, load) = (&stage.edge, stage.load());
    let before = edge.status()?["workers"].clone();
    let file = |name: &str, content: &[u8], mode: u32| -> Result<PathBuf> {
        let path = stage.world.edge.file(name);
        fs::write(&path, content)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        Ok(path)
    };
    let whole = fs::read(&stage.programs[1])?;
    let cases = [
        ("/bin/true".into(), "does not answer as edged does"),
        ("/nonexistent/edged".into(), "cannot be opened by edged"),
        (file("cut", &whole[..1 << 20], 0o755)?, ""),
        (file("plain", &whole, 0o644)?, "is not executable"),
        (file("open", &whole, 0o757)?, "can be written by others"),
        (file("script", b"#!/bin/sh\n", 0o755)?, "is no program for this machine"),
    ];
    for (binary, words) in cases {
        let said = edge.upgrade(&binary)?;
        assert_eq!(said.code, Some(2), "{said}");
        assert!(
            said.err.contains(words) && said.err.contains("nothing was changed"),
            "{said}"
        );
    }
    let said = edge.ctl(&["upgrade", "--dry-run", &stage.programs[1].display().to_string()])?;
    assert!(said.code == Some(0) && said.out.contains("can take over"), "{said}");
    let after = edge.status()?;
    for worker in 0..2 {
        assert_eq!(after["workers"][worker]["pid"], before[worker]["pid"], "{after}");
    }
    assert!(after["upgrade"].is_null(), "{after}");
    more_are_served(&load, 20)?;
    assert_eq!(load.stop().failures().len(), 0);
    Ok(())
}

#[test]
fn a_new_balancer_that_dies_at_any_message_leaves_the_old_one_serving() -> Result<()> {
    let stage = Stage::with_hook()?;
    let (edge, load) = (&stage.edge, stage.load());
    let lb = edge.worker("lb")?;
    let first = edge.builds()?[0].1.clone();
    for message in ["welcome", "part", "end", "ready", "commit"] {
        fs::write(stage.hook(), message)?;
        let said = edge.upgrade(&stage.programs[1])?;
        assert_eq!(said.code, Some(1), "{message}: {said}");
        assert!(said.err.contains("worker lb was not handed over"), "{message}: {said}");
        assert_eq!(edge.worker("lb")?, lb, "{message}");
        assert!(edge.builds()?.contains(&("lb".into(), first.clone())), "{message}");
        more_are_served(&load, 20).with_context(|| message.to_owned())?;
    }
    fs::write(stage.hook(), "nowhere")?;
    edge.upgraded(&stage.programs[1]).context("a later try")?;
    assert_ne!(edge.worker("lb")?, lb);
    let report = load.stop();
    println!("{}", report.summary());
    assert_eq!(report.count(&End::Refused), 0, "{}", report.summary());
    Ok(())
}

#[test]
fn a_supervisor_that_cannot_take_over_goes_back_to_the_program_before() -> Result<()> {
    let stage = Stage::with_hook()?;
    let (edge, load) = (&stage.edge, stage.load());
    let (supervisor, before) = (edge.pid(), edge.builds()?);
    let workers = (edge.worker("lb")?, edge.worker("web")?);
    fs::write(stage.hook(), "adopt")?;
    let said = edge.upgrade(&stage.programs[1])?;
    assert_eq!(said.code, Some(1), "{said}");
    assert!(
        said.err.contains("the new program gave up: a test wants it to"),
        "{said}"
    );
    assert_eq!((edge.pid(), edge.builds()?), (supervisor, before));
    assert_eq!(
        (edge.worker("lb")?, edge.worker("web")?),
        workers,
        "they noticed nothing"
    );
    more_are_served(&load, 20)?;
    // What is asked of the workers and of the store is answered as ever.
    let drained = edge.ctl(&["lb", "drain", &stage.world.back(0).to_string()])?;
    ensure!(drained.code == Some(0), "{drained}");
    fs::write(stage.hook(), "nowhere")?;
    edge.upgraded(&stage.programs[1]).context("a later try")?;
    assert_eq!(edge.state(stage.world.back(0))?, "drained");
    assert_eq!(load.stop().count(&End::Refused), 0);
    Ok(())
}

/// An edge with two backends, and two builds of its program.
struct Stage {
    edge: Edge,
    programs: [PathBuf; 2],
    _backends: Vec<Backend>,
    world: World,
}

impl Stage {
    fn set(environment: &[(&str, &str)]) -> Result<Self> {
        let world = World::alone(2)?;
        Self::on(world, environment)
    }

    /// With the hook of [`DIE`] in a file.
    fn with_hook() -> Result<Self> {
        let world = World::alone(2)?;
        let hook = world.edge.file("die");
        fs::write(&hook, "nowhere")?;
        Self::on(world, &[(DIE, &hook.display().to_string())])
    }

    fn on(world: World, environment: &[(&str, &str)]) -> Result<Self> {
        let edge = Edge::start_with(&world.edge, &world.config("kind = \"api\""), environment)?;
        let first = program("edged")?;
        let second = other_build(&first, &world.edge.file("edged-next"))?;
        let backends = world.echoes()?;
        Ok(Self {
            edge,
            programs: [first, second],
            _backends: backends,
            world,
        })
    }

    fn hook(&self) -> PathBuf {
        self.world.edge.file("die")
    }

    fn load(&self) -> Load {
        Load::of_echoes(&self.world.client, self.world.front(), RATE, PATIENCE)
    }
}

fn more_are_served(load: &Load, count: usize) -> Result<()> {
    let served = load.so_far().served();
    wait_until(&format!("{count} more were served"), PATIENCE, || {
        load.so_far().served() >= served + count
    })?;
    Ok(())
}

fn alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}
