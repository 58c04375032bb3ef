//! The appliance as a Debian runs it: installed by `packaging/install.sh`, under systemd, with the shipped unit.
//!
//! ```text
//!   client ──── edge ─────────── backend      three nodes of the lab around its bridge
//!   load,       Debian, systemd,  echo
//!   sessions    sshd, edged
//! ```

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use tests::{
    Lab, Node,
    backend::{Backend, Script},
    load::{End, Load, Session},
    systemd_node::{SystemdNode, suites},
    wait_until,
};

const PORT: u16 = 443;
/// Also of a client while systemd starts edged again, which on a busy machine takes some seconds.
const PATIENCE: Duration = Duration::from_secs(15);

#[test]
fn the_unit_starts_reloads_stops_and_is_removed_without_a_trace() -> Result<()> {
    for suite in suites()? {
        let world = World::boot(suite)?;
        let (debian, edge) = (&world.debian, &world.edge);
        debian
            .sh("/opt/edge/packaging/install.sh --from /opt/bin")
            .context("installing again")?;
        debian.sh("systemctl enable --now edged")?;
        let pids = world.pids()?;
        let mut session = Session::open(&world.client, edge.at(PORT), PATIENCE)?;

        debian.configure(&config(&[PORT, 8443], world.backend.address()))?;
        debian.sh("systemctl reload edged")?;
        wait_until("the reload opens a second listener", PATIENCE, || {
            Session::open(&world.client, edge.at(8443), PATIENCE).is_ok()
        })?;
        debian.configure("version = 1\n[[lb.frontend]]\nname = \"api\"\n")?;
        debian.sh("systemctl reload edged")?;
        wait_until("the faulty file is told", PATIENCE, || {
            debian.log().contains("edged.toml:2")
        })?;
        session.echo().context("a session across both reloads")?;
        Session::open(&world.client, edge.at(PORT), PATIENCE).context("after both reloads")?;
        assert_eq!(world.pids()?, pids, "{suite}: a reload is no restart");

        debian.sh("systemctl stop edged")?;
        assert_eq!(
            debian.sh("ps -o pid= -u edged || true")?,
            "",
            "{suite}: nothing of it runs"
        );
        assert_eq!(debian.property("Result")?, "success");
        let refused = Session::open(&world.client, edge.at(PORT), PATIENCE).expect_err("nobody listens");
        assert_eq!(
            refused.kind(),
            std::io::ErrorKind::ConnectionRefused,
            "{suite}: systemd holds no listener"
        );

        debian.sh("/opt/edge/packaging/install.sh uninstall")?;
        debian.sh("test -f /etc/edged/edged.toml && test -d /var/lib/edged && ! test -e /usr/bin/edged")?;
        debian.sh("/opt/edge/packaging/install.sh uninstall --purge")?;
        let left =
            debian.sh("find / -xdev -name '*edge[dc]*'; getent passwd edged; getent group edge edge-admin || true")?;
        assert_eq!(left, "", "{suite}");
    }
    Ok(())
}

#[test]
fn under_the_unit_the_translator_has_its_device_and_takes_it_along() -> Result<()> {
    for suite in suites()? {
        let world = World::boot(suite)?;
        let debian = &world.debian;
        let with_nat64 = format!(
            "{}[nat64]\nmode = \"stateless\"\nprefix = \"2001:db8:64::/96\"\nmaps = [{{ ipv4 = \"192.0.2.17\", ipv6 = \"fd00::2\" }}]\n",
            config(&[PORT], world.backend.address())
        );
        debian.configure(&with_nat64)?;
        debian.sh("systemctl start edged")?;
        let status = debian.sh("edgectl nat64 status")?;
        assert!(status.contains("tcp-segmentation"), "{suite}: {status}");
        let routes = debian.sh("ip route show dev nat64; ip -6 route show dev nat64")?;
        assert!(
            routes.contains("192.0.2.17") && routes.contains("2001:db8:64::/96"),
            "{suite}: {routes}"
        );
        debian.sh("systemctl stop edged")?;
        debian.sh("! ip link show nat64 2> /dev/null")?;
    }
    Ok(())
}

#[test]
fn groups_decide_who_may_look_and_who_may_change() -> Result<()> {
    let world = World::boot("trixie")?;
    let debian = &world.debian;
    debian.sh("systemctl enable --now edged")?;
    let drain = format!("edgectl lb drain {}", world.backend.address());
    for (user, groups, look, change) in [
        ("looker", "-G edge", 0, 1),
        ("changer", "-G edge-admin", 0, 0),
        ("stranger", "", 1, 1),
    ] {
        debian.sh(&format!("useradd {groups} {user}"))?;
        for (command, code) in [("edgectl status", look), (drain.as_str(), change)] {
            let said = debian.run(&format!("runuser -u {user} -- {command}"))?;
            assert_eq!(said.code, Some(code), "{user}: {command}: {said}");
        }
    }
    assert!(
        debian.log().contains("changer"),
        "a change is logged with its author: {}",
        debian.log()
    );
    Ok(())
}

#[test]
fn nobody_is_refused_while_the_supervisor_is_killed_or_restarted() -> Result<()> {
    for suite in suites()? {
        let world = World::boot(suite)?;
        let debian = &world.debian;
        debian.sh("systemctl enable --now edged")?;
        let sockets = world.listeners()?;
        let load = Load::of_echoes(&world.client, world.edge.at(PORT), 200, PATIENCE);
        let mut calm = Instant::now();
        for kill in 0..6 {
            // Some connections between two ends, so that each is met by a running load.
            wait_until("the load is served again", PATIENCE, || {
                load.so_far().between(calm, Instant::now()).served() >= 100
            })?;
            if kill < 5 {
                debian.kill_supervisor()?
            } else {
                debian.sh("systemctl restart edged").map(drop)?
            }
            calm = Instant::now();
        }
        wait_until("the load is served after the last", PATIENCE, || {
            load.so_far().between(calm, Instant::now()).served() >= 100
        })?;
        let report = load.stop();
        println!(
            "{suite}, supervisor killed 5 times and restarted once: {}",
            report.summary()
        );
        let lost = report.failures();
        let unexpected: Vec<_> = lost
            .iter()
            .filter(|attempt| !matches!(attempt.end, End::Reset | End::Closed))
            .collect();
        assert!(unexpected.is_empty(), "{suite}: {unexpected:?}\n{}", debian.log());
        // Only who was being served at a kill; an exchange takes a few milliseconds, or as long as the machine stands still.
        assert!(lost.len() <= 6 * 50, "{suite}: {}", report.summary());
        assert_eq!(
            world.listeners()?,
            sockets,
            "{suite}: the same sockets, from systemd's store"
        );
        assert_eq!(
            debian.property("NRestarts")?,
            "0",
            "{suite}: counted from the restart on"
        );
    }
    Ok(())
}

#[test]
fn another_binary_takes_over_under_the_unit_and_systemd_sees_no_restart() -> Result<()> {
    for suite in suites()? {
        let world = World::boot(suite)?;
        let debian = &world.debian;
        debian.sh("systemctl enable --now edged")?;
        let (supervisor, sockets) = (debian.property("MainPID")?, world.listeners()?);
        let before = world.pids()?;
        let mut session = Session::open(&world.client, world.edge.at(PORT), PATIENCE)?;
        let load = Load::of_echoes(&world.client, world.edge.at(PORT), 200, PATIENCE);
        wait_until("the load is served", PATIENCE, || load.so_far().served() >= 100)?;
        // The same code with another build id, put where a package would put it.
        debian.sh(
            "perl -0777 -pe 's/(\\x04\\0\\0\\0\\x14\\0\\0\\0\\x03\\0\\0\\0GNU\\0)(.)/$1.chr(ord($2)^1)/se' \
             /usr/bin/edged > /usr/bin/edged.new && chmod 755 /usr/bin/edged.new && mv /usr/bin/edged.new /usr/bin/edged",
        )?;
        let mut said = debian.run("edgectl upgrade /usr/bin/edged")?;
        // As `Edge::upgraded`.
        if said.err.contains("was not handed over") {
            said = debian.run("edgectl upgrade /usr/bin/edged")?;
        }
        println!("{suite}: {said}");
        assert_eq!(said.code, Some(0), "{suite}: {said}");
        session.echo().context("a session across the upgrade")?;
        let served = load.so_far().served();
        wait_until("the load is served on", PATIENCE, || {
            load.so_far().served() >= served + 200
        })?;
        let report = load.stop();
        println!("{suite}, across an upgrade: {}", report.summary());
        assert!(
            report.failures().is_empty(),
            "{suite}: {}\n{}",
            report.summary(),
            debian.log()
        );
        assert_eq!(debian.property("MainPID")?, supervisor, "{suite}: the same process");
        assert_eq!(debian.property("NRestarts")?, "0", "{suite}");
        assert_eq!(world.listeners()?, sockets, "{suite}: the same sockets");
        let after = world.pids()?;
        assert_eq!(after.len(), before.len(), "{suite}: {before:?}, then {after:?}");
        assert!(
            after.keys().filter(|pid| before.contains_key(*pid)).eq([&supervisor]),
            "{suite}: every worker is another: {before:?}, then {after:?}"
        );
        // What systemd holds and what it is told still fit: a reload, and a kill that its descriptor store makes good.
        debian.sh("systemctl reload edged")?;
        debian.kill_supervisor()?;
        wait_until("it serves again", PATIENCE, || {
            Session::open(&world.client, world.edge.at(PORT), PATIENCE).is_ok()
        })?;
        assert_eq!(world.listeners()?, sockets, "{suite}: the same sockets after a kill");
    }
    Ok(())
}

#[test]
fn a_supervisor_that_hangs_is_replaced_and_nobody_is_refused() -> Result<()> {
    let world = World::boot("trixie")?;
    let debian = &world.debian;
    debian.sh("systemctl enable --now edged")?;
    let supervisor = debian.property("MainPID")?;
    let load = Load::of_echoes(&world.client, world.edge.at(PORT), 100, PATIENCE);
    debian.sh(&format!("kill -STOP {supervisor}"))?;
    // The unit's watchdog waits for ten seconds.
    wait_until("the watchdog replaces it", Duration::from_secs(30), || {
        debian
            .property("MainPID")
            .is_ok_and(|now| now != supervisor && now != "0")
    })?;
    wait_until("the load is served again", PATIENCE, || {
        load.so_far()
            .attempts
            .last()
            .is_some_and(|last| matches!(last.end, End::Served(_)))
    })?;
    let report = load.stop();
    println!("supervisor hung and replaced: {}", report.summary());
    assert!(
        report
            .failures()
            .iter()
            .all(|lost| matches!(lost.end, End::Reset | End::Closed)),
        "{}",
        report.summary()
    );
    assert!(
        report.failures().len() <= 50,
        "the balancer serves while the supervisor hangs: {}",
        report.summary()
    );
    Ok(())
}

#[test]
fn a_worker_holds_no_right_and_its_memory_is_closed_to_its_own_user() -> Result<()> {
    for suite in suites()? {
        let world = World::boot(suite)?;
        let debian = &world.debian;
        debian.sh("systemctl enable --now edged")?;
        let pids = world.pids()?;
        assert!(pids.len() > 1, "a supervisor and workers: {pids:?}");
        let edged = debian.sh("id --user edged")?;
        let supervisor = debian.property("MainPID")?;
        for (pid, name) in &pids {
            let status = debian.sh(&format!("cat /proc/{pid}/status"))?;
            let line = |key: &str| {
                let line = status
                    .lines()
                    .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
                line.unwrap_or_default()
                    .split_whitespace()
                    .collect::<Vec<_>>()
                    .join(" ")
            };
            assert_eq!(line("Uid"), [edged.as_str(); 4].join(" "), "{suite} {name}");
            assert_eq!(
                (line("NoNewPrivs"), line("Seccomp")),
                ("1".into(), "2".into()),
                "{suite} {name}"
            );
            // NET_BIND_SERVICE is bit 10, NET_ADMIN 12, NET_RAW 13.
            let three = "0000000000003400";
            let effective = if *pid == supervisor { three } else { "0000000000000000" };
            assert_eq!(
                (line("CapEff"), line("CapPrm")),
                (effective.into(), effective.into()),
                "{suite} {name}"
            );
            assert_eq!(line("CapBnd"), three, "{suite} {name}: no way to more");
            for file in ["mem", "environ", "maps", "fd/0", "exe"] {
                let said = debian.run(&as_edged(&format!("cat /proc/{pid}/{file}")))?;
                assert!(
                    said.code != Some(0) && said.err.contains("Permission denied"),
                    "{suite} {name} {file}: {said}"
                );
            }
        }
        // The same attempt on a process that is not protected, to know that it would have succeeded.
        debian.sh(&as_edged(
            "sleep 60 & cat /proc/$!/environ /proc/$!/maps > /dev/null && dd if=/proc/$!/mem count=0; kill $!",
        ))?;
        let score = debian.sh("systemd-analyze security --no-pager edged | tail -n 1")?;
        println!("{suite}: {score}");
        debian.sh("systemd-analyze security --threshold=22 --no-pager edged > /dev/null")?;
    }
    Ok(())
}

/// Three nodes, Debian with edged installed and configured but not started on one of them.
struct World {
    // Dropped in this order: Debian before the namespaces it is in.
    debian: SystemdNode,
    backend: Backend,
    client: Node,
    edge: Node,
    _lab: Lab,
}

impl World {
    fn boot(suite: &str) -> Result<Self> {
        let lab = Lab::new()?;
        let (client, edge, node) = (lab.node("client", 1)?, lab.node("edge", 2)?, lab.node("backend", 3)?);
        let backend = Backend::start(&node, 7000, Script::Echo)?;
        let debian = SystemdNode::boot(&edge, suite)?;
        debian.install()?;
        let shipped = debian.sh("edgectl config check /etc/edged/edged.toml")?;
        assert!(
            !shipped.contains("warning"),
            "the example configuration is clean: {shipped}"
        );
        debian.configure(&config(&[PORT], backend.address()))?;
        Ok(Self {
            debian,
            backend,
            client,
            edge,
            _lab: lab,
        })
    }

    /// Every process of the unit, with its name.
    fn pids(&self) -> Result<BTreeMap<String, String>> {
        let lines = self.debian.sh("ps -o pid=,comm= -u edged")?;
        Ok(lines
            .lines()
            .filter_map(|line| line.trim().split_once(' '))
            .map(|(pid, name)| (pid.into(), name.into()))
            .collect())
    }

    /// The listening sockets on [`PORT`], by inode: another socket on the same port would have another.
    fn listeners(&self) -> Result<Vec<String>> {
        let table = self.debian.sh("cat /proc/net/tcp6")?;
        let port = format!(":{PORT:04X}");
        let mut inodes: Vec<String> = table
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .filter(|fields| fields.get(1).is_some_and(|local| local.ends_with(&port)) && fields.get(3) == Some(&"0A"))
            .filter_map(|fields| fields.get(9).map(|inode| (*inode).to_owned()))
            .collect();
        inodes.sort();
        Ok(inodes)
    }
}

fn config(ports: &[u16], backend: std::net::SocketAddr) -> String {
    let frontends = ports.iter().map(|port| {
        format!("[[lb.frontend]]\nname = \"port-{port}\"\nlisten = [\"[::]:{port}\"]\nbackends = [\"{backend}\"]\n")
    });
    format!("version = 1\n{}", frontends.collect::<String>())
}

/// `command` as the daemon's user, without a capability to its name.
fn as_edged(command: &str) -> String {
    format!("setpriv --reuid edged --regid edged --clear-groups --inh-caps=-all --bounding-set=-all sh -c '{command}'")
}
