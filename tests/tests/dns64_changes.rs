//! Whatever is done to the daemon, questions are answered and names stay.
//!
//! ```text
//! client (fd00::2): 500 queries/s, dig, nsupdate ── edge (fd00::10): edged, worker dns64 ── cp1 (fd00::11): named
//! ```

use std::{
    collections::BTreeSet,
    fs,
    net::{Ipv6Addr, SocketAddr},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use tests::{
    Edge, World,
    dns::{self, Asked, Key, Named, Queries, Reply, dig, nsupdate, nsupdate_patient, summary},
    edge::{other_build, program},
    process, wait_for, wait_until,
};

const RATE: u32 = 500;
/// Names the message at which the new side of a hand-over dies; see appliance/src/handover.rs.
const DIE: &str = "EDGED_TEST_HANDOVER_DIE";
const PREFIXES: [&str; 2] = ["64:ff9b::/96", "fd64::/96"];
/// `8.8.4.4` under each of [`PREFIXES`].
const MAPPED: [&str; 2] = ["64:ff9b::808:404", "fd64::808:404"];

#[test]
fn reloads_under_load_lose_no_query_and_a_new_prefix_is_in_every_answer_from_then_on() -> Result<()> {
    let stage = Stage::set()?;
    let queries = stage.queries();
    for round in 1..=20 {
        queries.more(50)?;
        let said = stage.edge.apply(&stage.config(PREFIXES[round % 2]))?;
        ensure!(said.code == Some(0), "{round}: {said}");
        let reply = stage.dig(&["v4.example.org", "AAAA"])?;
        assert_eq!(reply.data("AAAA"), [MAPPED[round % 2]], "round {round}: {}", reply.text);
        let found = stage.dig(&["ipv4only.arpa", "AAAA"])?;
        assert!(
            found.data("AAAA")[0].starts_with(&MAPPED[round % 2][..4]),
            "round {round}: {}",
            found.text
        );
    }
    queries.more(100)?;
    let asked = queries.stop();
    println!("{}", summary(&asked));
    assert!(
        asked.iter().all(|asked| asked.outcome.is_ok() && asked.sent == 1),
        "{}",
        summary(&asked)
    );
    let addresses: BTreeSet<usize> = asked.iter().filter_map(|asked| asked.outcome.clone().ok()).collect();
    assert_eq!(addresses.len(), 2, "both prefixes were seen");
    Ok(())
}

#[test]
fn an_upgrade_leaves_no_query_unanswered_and_loses_no_update_that_was_acknowledged() -> Result<()> {
    const NODES: usize = 90;
    let stage = Stage::set()?;
    let keys: Vec<Key> = (1..=NODES)
        .map(|n| Key::add(&stage.edge, &format!("n{n}"), "hmac-sha256"))
        .collect::<Result<_>>()?;
    let programs = [
        program("edged")?,
        other_build(&program("edged")?, &stage.world.edge.file("edged-next"))?,
    ];
    let queries = stage.queries();
    let (acknowledged, failed) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let (done, next) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (again, taken_back) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let more = |count: usize| -> Result<()> {
        let so_far = || acknowledged.lock().map_or(0, |list| list.len());
        let before = so_far();
        wait_until("more updates", Duration::from_secs(20), || {
            so_far() >= NODES.min(before + count)
        })?;
        Ok(())
    };
    let update = || {
        while !done.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(key) = keys.get(index) else { break };
            let n = index + 1;
            let lines = format!("zone fleet\nupdate add n{n}.fleet 1800 AAAA fd00::4:{n:x}");
            let options: &[&str] = if n % 2 == 0 { &["-v"] } else { &[] };
            let mut said = nsupdate(&stage.world.client, stage.server, Some(key), options, &lines);
            if said.as_ref().is_ok_and(|said| said.err.contains("SERVFAIL")) {
                // A node tries again.
                again.fetch_add(1, Ordering::Relaxed);
                said = nsupdate_patient(&stage.world.client, stage.server, key, options, &lines);
            }
            match said {
                Ok(said) if said.code == Some(0) => {
                    acknowledged.lock().expect("no panic while it is held").push(n);
                }
                Ok(said) => failed.lock().expect("no panic while it is held").push(said.err),
                Err(error) => failed
                    .lock()
                    .expect("no panic while it is held")
                    .push(error.to_string()),
            }
        }
    };
    let outcome = thread::scope(|scope| -> Result<()> {
        let updaters: Vec<_> = (0..3).map(|_| scope.spawn(update)).collect();
        let upgraded = || -> Result<()> {
            let supervisor = stage.edge.pid();
            for next in [1, 0] {
                queries.more(100)?;
                more(2)?;
                let (worker, before) = (stage.edge.worker("dns64")?, stage.edge.builds()?);
                let mut said = stage.edge.upgrade(&programs[next])?;
                if said.err.contains("was not handed over") {
                    // A machine that holds a step up for long has it taken back, rightly.
                    taken_back.fetch_add(1, Ordering::Relaxed);
                    said = stage.edge.upgrade(&programs[next])?;
                }
                ensure!(said.code == Some(0), "{said}");
                let after = stage.edge.builds()?;
                ensure!(
                    after.iter().all(|(_, build)| *build == after[0].1),
                    "one build everywhere: {after:?}"
                );
                ensure!(after[0].1 != before[0].1 && stage.edge.pid() == supervisor, "{after:?}");
                ensure!(stage.edge.worker("dns64")? != worker, "another worker");
                queries.more(100)?;
                more(2)?;
            }
            Ok(())
        };
        let result = upgraded();
        done.store(true, Ordering::Relaxed);
        for updater in updaters {
            let _ = updater.join();
        }
        result
    });
    outcome?;
    let asked = queries.stop();
    let acknowledged = acknowledged.into_inner().expect("no panic while it was held");
    let failed = failed.into_inner().expect("no panic while it was held");
    println!(
        "{}; {} updates acknowledged, {} of them at the second try",
        summary(&asked),
        acknowledged.len(),
        again.load(Ordering::Relaxed)
    );
    assert!(failed.is_empty(), "one retry is enough: {failed:?}");
    assert!(
        again.into_inner() == 0 || taken_back.into_inner() > 0,
        "an update that comes while one process ends waits for the next"
    );
    assert!(asked.iter().all(|asked| asked.outcome.is_ok()), "{}", summary(&asked));
    for n in acknowledged {
        let address = format!("fd00::4:{n:x}");
        assert_eq!(
            stage.dig(&[&format!("n{n}.fleet"), "AAAA"])?.data("AAAA"),
            [address.as_str()]
        );
        assert_eq!(stage.dig(&["-x", &address])?.data("PTR"), [format!("n{n}.fleet.")]);
    }
    Ok(())
}

#[test]
fn an_upgrade_that_is_taken_back_leaves_the_zone_open_for_updates() -> Result<()> {
    let stage = Stage::with_hook("adopt")?;
    let next = other_build(&program("edged")?, &stage.world.edge.file("edged-next"))?;
    let keys: Vec<Key> = (1..=9)
        .map(|n| Key::add(&stage.edge, &format!("n{n}"), "hmac-sha256"))
        .collect::<Result<_>>()?;
    let add = |n: usize, address: usize| {
        let lines = format!("zone fleet\nupdate add n{n}.fleet 1800 AAAA fd00::{n}:{address:x}");
        nsupdate_patient(&stage.world.client, stage.server, &keys[n - 1], &[], &lines)
    };
    let done = AtomicBool::new(false);
    let outcome = thread::scope(|scope| -> Result<()> {
        for n in 1..=8 {
            let (add, done) = (&add, &done);
            scope.spawn(move || {
                // A node has eight addresses at most; the same one again changes nothing, and is answered all the same.
                let mut address = 0;
                while !done.load(Ordering::Relaxed) {
                    let _ = add(n, address % 8);
                    address += 1;
                }
            });
        }
        let refused = (0..3).try_for_each(|round| -> Result<()> {
            let said = stage.edge.upgrade(&next)?;
            ensure!(said.code == Some(1), "round {round}: {said}");
            Ok(())
        });
        done.store(true, Ordering::Relaxed);
        refused
    });
    outcome?;
    let said = add(9, 1)?;
    ensure!(said.code == Some(0), "{said}");
    assert_eq!(stage.dig(&["n9.fleet", "AAAA"])?.data("AAAA"), ["fd00::9:1"]);
    Ok(())
}

#[test]
fn a_worker_that_is_killed_is_back_within_a_second_with_every_name() -> Result<()> {
    let stage = Stage::set()?;
    let key = Key::add(&stage.edge, "n1", "hmac-sha256")?;
    let mut addresses: Vec<String> = Vec::new();
    let mut add = |address: &str| -> Result<Vec<String>> {
        let lines = format!("zone fleet\nupdate add n1.fleet 1800 AAAA {address}");
        let said = nsupdate_patient(&stage.world.client, stage.server, &key, &[], &lines)?;
        ensure!(said.code == Some(0), "the key is known: {said}");
        addresses.push(address.to_owned());
        Ok(addresses.clone())
    };
    let mut known = add("fd00::101")?;
    let queries = stage.queries();
    queries.more(100)?;
    let supervisor = stage.edge.pid();
    let (mut killed, mut backs) = (Instant::now(), Vec::new());
    for round in 2..5 {
        let before = stage.edge.worker("dns64")?;
        killed = Instant::now();
        process::signal(before, Signal::KILL)?;
        let dead = Instant::now();
        // What comes in meanwhile waits in sockets that the supervisor holds.
        let good_since = |asked: &&Asked| asked.at > dead && asked.outcome.is_ok() && asked.sent == 1;
        let back = wait_for("an answer after the kill", Duration::from_secs(10), || {
            let asked = queries.so_far();
            let good = asked.iter().filter(good_since);
            good.map(|asked| asked.at + asked.took - killed).min()
        })?;
        backs.push(back);
        stage
            .edge
            .wait_for_new_worker("dns64", before, Duration::from_secs(10))?;
        assert_eq!(stage.dig(&["n1.fleet", "AAAA"])?.data("AAAA"), known);
        for address in &known {
            assert_eq!(stage.dig(&["-x", address])?.data("PTR"), ["n1.fleet."]);
        }
        known = add(&format!("fd00::10{round}"))?;
        queries.more(500)?;
    }
    let asked = queries.stop();
    println!("the first answers {backs:.1?} after the kills; {}", summary(&asked));
    assert_eq!(stage.edge.pid(), supervisor);
    // One that was not held up by the machine is enough to show what the edge takes.
    assert!(backs.iter().min() < Some(&Duration::from_secs(1)), "{backs:?}");
    assert!(backs.iter().max() < Some(&Duration::from_secs(5)), "{backs:?}");
    assert!(asked.iter().all(|asked| asked.outcome.is_ok()), "{}", summary(&asked));
    let late = |asked: &&Asked| asked.at > killed + Duration::from_secs(1) && asked.sent > 1;
    assert_eq!(
        asked.iter().find(late).map(|asked| asked.at - killed),
        None,
        "asked twice, long after the kill"
    );
    Ok(())
}

/// An edge, the authority behind it, and who asks.
struct Stage {
    edge: Edge,
    server: SocketAddr,
    _named: Named,
    world: World,
}

impl Stage {
    /// With the machine for itself: at this rate a busy neighbour is seen.
    fn set() -> Result<Self> {
        Self::with_hook("nowhere")
    }

    /// In which the new side of a hand-over gives up at the message of that name.
    fn with_hook(message: &str) -> Result<Self> {
        let world = World::alone(1)?;
        let hook = world.edge.file("die");
        fs::write(&hook, message)?;
        let named = Named::start(&world.cp[0], &[("example.org", "", "v4 A 8.8.4.4\n*.wild A 8.8.4.4")])?;
        let server = world.edge.at(dns::PORT);
        let edge = Edge::start_with(
            &world.edge,
            &config(server, PREFIXES[0]),
            &[(DIE, &hook.display().to_string())],
        )?;
        Ok(Self {
            edge,
            server,
            _named: named,
            world,
        })
    }

    fn config(&self, prefix: &str) -> String {
        config(self.server, prefix)
    }

    fn dig(&self, arguments: &[&str]) -> Result<Reply> {
        dig(&self.world.client, self.server, arguments)
    }

    /// Known names and some that have to be asked for after every reload.
    fn queries(&self) -> Queries {
        let names: Vec<String> = (0..40)
            .map(|n| format!("w{n}.wild.example.org"))
            .chain(["v4.example.org".into()])
            .collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let expected: Vec<Ipv6Addr> = MAPPED.iter().filter_map(|address| address.parse().ok()).collect();
        Queries::start(&self.world.client, self.server, RATE, &names, &expected)
    }
}

fn config(server: SocketAddr, prefix: &str) -> String {
    format!(
        "version = 1\n\n[dns64]\nlisten = [\"{server}\"]\nprefixes = [\"{prefix}\"]\nupstreams = [\"udp://[fd00::11]\"]\n\n\
         [[dns64.zone]]\nname = \"fleet\"\nprefixes = [\"fd00::/64\"]\n"
    )
}
