//! A worker that is taken over from the network has nothing in its hands.
//!
//! ```text
//! edge: edged (supervisor) ─┬─ worker lb    no capabilities, another user, seccomp, not dumpable
//!                           ├─ worker web   likewise
//!                           ├─ worker dns64 likewise
//!                           └─ worker nat64 likewise, and a TUN device
//! ```

use std::{collections::BTreeMap, fs, io::ErrorKind, os::unix::fs::MetadataExt, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use tests::{Edge, World, edge::say, lab::need_tool};

const ROLES: [&str; 4] = ["lb", "web", "dns64", "nat64"];

#[test]
fn every_worker_is_confined_and_runs_as_a_user_of_its_own() -> Result<()> {
    let world = World::new(1)?;
    let edge = Edge::start(&world.edge, &config(&world))?;
    let mut users = BTreeMap::new();
    for role in ROLES {
        let pid = edge.worker(role)?;
        let status = Status::of(pid)?;
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status.get(set)?.trim_start_matches('0'), "", "{role}: {set}");
        }
        assert_eq!(status.get("NoNewPrivs")?, "1", "{role}");
        assert_eq!(status.get("Seccomp")?, "2", "{role}");
        let uids: Vec<&str> = status.get("Uid")?.split_whitespace().collect();
        let gids: Vec<&str> = status.get("Gid")?.split_whitespace().collect();
        assert!(
            uids.iter().all(|uid| *uid == uids[0] && *uid != "0"),
            "{role}: {uids:?}"
        );
        assert!(
            gids.iter().all(|gid| *gid == gids[0] && *gid != "0"),
            "{role}: {gids:?}"
        );
        assert_eq!(
            status
                .get("Groups")?
                .split_whitespace()
                .filter(|group| *group == "0")
                .count(),
            0,
            "{role}"
        );
        if let Some(other) = users.insert(uids[0].to_owned(), role) {
            panic!("{role} and {other} share a user and could signal each other");
        }
    }
    Ok(())
}

#[test]
fn no_worker_can_be_read_or_traced_by_its_own_user() -> Result<()> {
    need_tool("setpriv", "util-linux")?;
    let world = World::new(1)?;
    let edge = Edge::start(&world.edge, &config(&world))?;
    for role in ROLES {
        let pid = edge.worker(role)?;
        let status = Status::of(pid)?;
        let uid = status
            .get("Uid")?
            .split_whitespace()
            .next()
            .context("a uid")?
            .to_owned();
        // The kernel gives what belongs to a process that is not dumpable to root (proc(5)).
        assert_eq!(
            fs::metadata(format!("/proc/{pid}/environ"))?.uid(),
            0,
            "{role} is dumpable"
        );
        for file in ["mem", "environ", "maps"] {
            let mut cat = Command::new("setpriv");
            cat.args([
                "--reuid",
                &uid,
                "--regid",
                &uid,
                "--clear-groups",
                "head",
                "-c",
                "1",
                &format!("/proc/{pid}/{file}"),
            ]);
            let said = say(&mut cat, Duration::from_secs(5))?;
            ensure!(said.code != Some(0), "{role}: its user can read {file}");
            ensure!(said.err.contains("Permission denied"), "{role}: {said}");
        }
    }
    Ok(())
}

#[test]
fn no_worker_holds_a_descriptor_it_does_not_need() -> Result<()> {
    let world = World::new(1)?;
    let edge = Edge::start(&world.edge, &config(&world))?;
    for role in ROLES {
        let pid = edge.worker(role)?;
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let target = match fs::read_link(entry?.path()) {
                // Closed meanwhile.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                target => target?.display().to_string(),
            };
            let kind = target.split(':').next().unwrap_or_default();
            let harmless = ["socket", "anon_inode", "pipe", "/dev/null", "/dev/net/tun"].contains(&kind)
                || target.starts_with("/memfd:");
            // Its log is the supervisor's standard error, here a file of the lab.
            let log = target.ends_with("edged.log");
            assert!(harmless || log, "{role} holds {target}");
        }
    }
    Ok(())
}

/// Something for every kind of worker to do.
fn config(world: &World) -> String {
    format!(
        "{}\n[dns64]\nlisten = [\"{}\"]\nupstreams = [\"udp://{}\"]\n[nat64]\nmode = \"stateless\"\n",
        world.config("kind = \"api\""),
        world.edge.at(53),
        world.cp[0].at(53)
    )
}

/// `/proc/PID/status`.
struct Status(String);

impl Status {
    fn of(pid: u32) -> Result<Self> {
        Ok(Self(fs::read_to_string(format!("/proc/{pid}/status"))?))
    }

    fn get(&self, key: &str) -> Result<&str> {
        let found = self
            .0
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        found.map(str::trim).with_context(|| format!("no {key} in {}", self.0))
    }
}
