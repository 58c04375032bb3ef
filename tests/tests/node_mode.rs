//! `edged --node`: kubelet's way to the API servers, as one small process on a cluster node.
//!
//! ```text
//! node (fd00::31): kubelet's place ── 127.0.0.1:16443, [::1]:16443 ── edged --node ──┬── cp1 (fd00::11)
//!                                                                                    ├── cp2 (fd00::12)
//!                                                                                    └── cp3 (fd00::13)
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Read,
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use tests::{
    Lab, Node, Process,
    backend::{Backend, Readyz, Script},
    edge::{program, say},
    etcd::{CLIENT_PORT, Etcd},
    http,
    lab::need_tool,
    load::{End, Load, Session},
    process::{ending, listeners, pss_kib, tail},
    systemd_node::{SystemdNode, suites},
    tls::{self, Ca},
    wait_for, wait_until,
    world::PORT,
};

const PATIENCE: Duration = Duration::from_secs(5);
/// How long the file may be behind what balances, which looks at it each second.
const LOOK: Duration = Duration::from_secs(10);
/// Issue: "at most 8 MiB PSS".
const MOST_KIB: u64 = 8 << 10;

/// Where kubelet looks for the API.
fn fronts() -> [SocketAddr; 2] {
    ["127.0.0.1:16443", "[::1]:16443"].map(|front| front.parse().expect("an address"))
}

#[test]
fn it_listens_on_the_two_loopback_addresses_alone_and_reaches_every_api_server_by_both() -> Result<()> {
    let world = World::new(3)?;
    let mut edged = world.start(&["--backends", &world.list(&[0, 1, 2])])?;
    let ss = say(world.node.command(need_tool("ss", "iproute2")?).arg("-Hlntu"), PATIENCE)?;
    let listening: BTreeSet<&str> = ss
        .out
        .lines()
        .filter_map(|line| line.split_whitespace().nth(4))
        .collect();
    assert_eq!(listening, BTreeSet::from(["127.0.0.1:16443", "[::1]:16443"]), "{ss}");
    for front in fronts() {
        let mut served = BTreeMap::<String, usize>::new();
        let sessions: Vec<Session> = (0..9)
            .map(|_| Session::open(&world.node, front, PATIENCE))
            .collect::<Result<_, _>>()?;
        for session in &sessions {
            *served.entry(session.server.clone()).or_default() += 1;
        }
        assert!(
            served.len() == 3 && served.values().all(|count| *count == 3),
            "{front}: {served:?}"
        );
    }
    // Another node has no way in.
    let other = world.lab.node("other", 32)?;
    for address in [world.node.at(16443), world.node.at4(16443)] {
        let error = Session::open(&other, address, PATIENCE).expect_err("nobody listens there");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{address}");
    }
    world.stop(&mut edged)
}

#[test]
fn etcd_with_tls_is_reached_through_it_and_a_killed_member_is_gone_round() -> Result<()> {
    let lab = Lab::new()?;
    let node = lab.node("node", 31)?;
    let mut etcd = Etcd::start(&lab, &fronts().map(|front| front.ip()))?;
    let list: Vec<String> = etcd
        .members
        .iter()
        .map(|member| member.node.at(CLIENT_PORT).to_string())
        .collect();
    let mut edged = start(&node, &["--backends", &list.join(",")], None)?;
    let ask = |etcd: &Etcd| -> Result<()> {
        for front in fronts().repeat(6) {
            let tcp = node.enter(|| TcpStream::connect_timeout(&front, PATIENCE))?;
            tcp.set_read_timeout(Some(PATIENCE))?;
            let stream = tls::handshake(tcp, front, &etcd.client).with_context(|| front.to_string())?;
            let mut answer = http::request(stream, "GET", "/version", "etcd", "")?;
            let text = answer.text()?;
            ensure!(
                answer.status == 200 && text.contains("etcdserver"),
                "{front}: {} {text}",
                answer.status
            );
        }
        Ok(())
    };
    ask(&etcd)?;
    etcd.members[0].kill();
    ask(&etcd).context("with a member killed")?;
    let status = edged.stop(PATIENCE)?;
    ensure!(status.success(), "{}", ending(status));
    Ok(())
}

#[test]
fn it_takes_at_most_8_mib_after_a_hundred_connections_with_and_without_checks() -> Result<()> {
    // Alone: what other processes of the same program share with it would not be counted.
    let world = World::of(Lab::alone()?, &[])?;
    let ca = Ca::new("cluster")?;
    let ca_file = world.lab.dir().join("ca.crt");
    ca.write(&ca_file)?;
    let identity = ca.issue(
        "kube-apiserver",
        None,
        &[world.cp[0].ip(), world.cp[1].ip(), world.cp[2].ip()],
        &[],
    )?;
    let ready = Readyz::new(200);
    let _backends: Vec<Backend> = world
        .cp
        .iter()
        .map(|cp| Backend::start(cp, PORT, Script::Https(identity.server()?, ready.clone())))
        .collect::<Result<_>>()?;
    let list = world.list(&[0, 1, 2]);
    for extra in [vec![], vec!["--ca-file".to_owned(), ca_file.display().to_string()]] {
        let mut arguments = vec!["--backends", &list];
        arguments.extend(extra.iter().map(String::as_str));
        let mut edged = world.start(&arguments)?;
        let mut sessions = Vec::new();
        for index in 0..100 {
            let target = fronts()[index % 2];
            let tcp = world.node.enter(|| TcpStream::connect_timeout(&target, PATIENCE))?;
            tcp.set_read_timeout(Some(PATIENCE))?;
            let tls = tls::handshake_with(tcp, "cp", &ca.client(None)?);
            // The certificate is for addresses; that the greeting was answered is what counts here.
            ensure!(
                tls.is_err_and(|error| error.to_string().contains("certificate")),
                "no answer through {target}"
            );
            sessions.push(world.node.enter(|| TcpStream::connect_timeout(&target, PATIENCE))?);
        }
        let open = pss_kib(edged.pid())?;
        drop(sessions);
        let after = pss_kib(edged.pid())?;
        println!("{extra:?}: {open} KiB with 100 connections open, {after} KiB after");
        assert!(open.max(after) <= MOST_KIB, "{extra:?}: {open} KiB, {after} KiB after");
        assert_eq!(children(edged.pid())?, Vec::<u32>::new(), "one process");
        world.stop(&mut edged)?;
    }
    Ok(())
}

#[test]
fn a_changed_file_takes_effect_and_a_bad_one_is_told_with_its_line_and_changes_nothing() -> Result<()> {
    let world = World::new(3)?;
    let file = world.lab.dir().join("node.backends");
    replace(&file, &format!("{}\n", world.cp[1].at(PORT)))?;
    let arguments = [
        "--backends",
        &world.list(&[0]),
        "--backends-file",
        &file.display().to_string(),
    ];
    let mut edged = world.start(&arguments)?;
    let mut old = Session::open(&world.node, fronts()[0], PATIENCE)?;
    assert_eq!(old.server, "cp2", "the file goes before the seeds");

    replace(&file, &format!("# another one\n\n{} # moved\n", world.cp[2].at(PORT)))?;
    let took = world.wait_for_server("cp3")?;
    println!("a new list takes effect within {took:?}");
    old.echo().context("a session of a backend that the list has lost")?;

    for (bad, told) in [
        (format!("{}\nhalf a li\n", world.cp[1].at(PORT)), "node.backends:2: "),
        ("# nobody\n".to_owned(), "node.backends: "),
        (format!("{}\n[fd00::12]\n", world.cp[1].at(PORT)), "node.backends:2: "),
    ] {
        let before = edged.log().len();
        replace(&file, &bad)?;
        wait_until("the fault is told", LOOK, || edged.log()[before..].contains(told))
            .with_context(|| format!("{bad:?} should be told as {told:?}:\n{}", tail(&edged.log(), 5)))?;
        for front in fronts() {
            assert_eq!(
                Session::open(&world.node, front, PATIENCE)?.server,
                "cp3",
                "after {bad:?}"
            );
        }
    }
    let before = edged.log().len();
    fs::remove_file(&file)?;
    wait_until("the loss is told", LOOK, || {
        edged.log()[before..].contains("node.backends")
    })?;
    assert_eq!(
        Session::open(&world.node, fronts()[0], PATIENCE)?.server,
        "cp3",
        "without a file"
    );
    replace(&file, &format!("{}\n", world.cp[1].at(PORT)))?;
    world.wait_for_server("cp2")?;
    // Its session is on a backend that two lists have lost.
    old.echo()?;
    world.stop(&mut edged)
}

#[test]
fn a_restart_without_the_file_uses_the_kept_list_and_seeds_stand_by() -> Result<()> {
    let mut world = World::new(3)?;
    let file = world.lab.dir().join("node.backends");
    let state = world.lab.dir().join("node-state");
    fs::create_dir_all(&state)?;
    replace(&file, &format!("{}\n", world.cp[2].at(PORT)))?;
    let arguments = [
        "--backends",
        &world.list(&[0]),
        "--backends-file",
        &file.display().to_string(),
    ];
    let mut edged = start(&world.node, &arguments, Some(&state))?;
    assert_eq!(Session::open(&world.node, fronts()[0], PATIENCE)?.server, "cp3");
    world.stop(&mut edged)?;
    for content in [None, Some("half a li")] {
        match content {
            None => fs::remove_file(&file)?,
            Some(content) => replace(&file, content)?,
        }
        let mut edged = start(&world.node, &arguments, Some(&state))?;
        for front in fronts() {
            let server = Session::open(&world.node, front, PATIENCE)?.server;
            assert_eq!(server, "cp3", "restarted with {content:?}: {}", tail(&edged.log(), 5));
        }
        // Killed, not stopped: what is kept does not depend on a good end.
        edged.kill();
    }
    // The list's only server is gone: the seed, which the list does not have, stands in.
    let mut edged = start(&world.node, &arguments, Some(&state))?;
    assert_eq!(Session::open(&world.node, fronts()[0], PATIENCE)?.server, "cp3");
    world.backends[2] = None;
    for front in fronts() {
        for _ in 0..5 {
            assert_eq!(
                Session::open(&world.node, front, PATIENCE)?.server,
                "cp1",
                "{}",
                tail(&edged.log(), 5)
            );
        }
    }
    world.stop(&mut edged)?;
    // Without anything kept, the seeds are what there is.
    let mut edged = start(&world.node, &arguments, None)?;
    assert_eq!(Session::open(&world.node, fronts()[0], PATIENCE)?.server, "cp1");
    world.stop(&mut edged)
}

#[test]
fn healthz_tells_of_any_of_the_local_or_of_a_named_api_server() -> Result<()> {
    let mut world = World::new(2)?;
    let list = world.list(&[0, 1]);
    // "local" needs one of the list's addresses: this one runs on cp1.
    let (first, second) = (world.cp[0].clone(), world.cp[1].at(PORT).to_string());
    let on_first = |health: &str, port: u16| -> Result<(Process, SocketAddr)> {
        let healthz: SocketAddr = first.at(port);
        let arguments = [
            "--backends",
            &list,
            "--healthz",
            &healthz.to_string(),
            "--health",
            health,
        ];
        Ok((start(&first, &arguments, None)?, healthz))
    };
    let ask = |healthz: SocketAddr| -> Result<u16> {
        let stream = world.node.enter(|| TcpStream::connect_timeout(&healthz, PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(http::request(stream, "GET", "/healthz", "node", "")?.status)
    };
    // One after the other: all listen on the same port. The verdict on cp1, then on both, is passed by failed connects.
    let cases = [
        ("any", [200, 200, 503]),
        ("local", [200, 503, 503]),
        (&second, [200, 200, 503]),
    ];
    for (index, (health, expected)) in cases.into_iter().enumerate() {
        let (mut edged, healthz) = on_first(health, 6080 + u16::try_from(index)?)?;
        for (down, expected) in expected.into_iter().enumerate() {
            if down > 0 {
                world.backends[down - 1] = None;
            }
            wait_until(
                &format!("--health {health} with {down} down says {expected}"),
                PATIENCE,
                || {
                    // Clients are what finds a dead backend without checks.
                    let _ = Session::open(&first, fronts()[0], PATIENCE);
                    ask(healthz).is_ok_and(|status| status == expected)
                },
            )
            .with_context(|| format!("{:?}\n{}", ask(healthz), tail(&edged.log(), 5)))?;
        }
        let status = edged.stop(PATIENCE)?;
        ensure!(status.success(), "{}", ending(status));
        for down in 0..2 {
            world.backends[down] = Some(Backend::start(&world.cp[down], PORT, Script::Echo)?);
        }
    }
    Ok(())
}

#[test]
fn clients_go_on_when_an_api_server_is_killed_and_sigterm_is_a_good_end() -> Result<()> {
    let mut world = World::new(3)?;
    let mut edged = world.start(&["--backends", &world.list(&[0, 1, 2])])?;
    let load = Load::of_echoes(&world.node, fronts()[1], 100, PATIENCE);
    wait_until("clients are served by all", PATIENCE, || {
        let so_far = load.so_far();
        ["cp1", "cp2", "cp3"].iter().all(|cp| so_far.served_by(cp) >= 20)
    })?;
    world.backends[1] = None;
    let before = load.so_far().served();
    wait_until("clients are served after", PATIENCE, || {
        load.so_far().served() >= before + 300
    })?;
    let report = load.stop();
    println!("an API server killed under load: {}", report.summary());
    let unexpected: Vec<_> = report
        .failures()
        .into_iter()
        .filter(|attempt| !matches!(attempt.end, End::Reset | End::Closed))
        .collect();
    assert!(unexpected.is_empty(), "{unexpected:?}");
    // Those that cp2 was serving at its end.
    assert!(report.failures().len() <= 30, "{}", report.summary());

    // One that is idle, one that is busy: neither keeps it from ending well.
    let (_idle, mut busy) = (
        Session::open(&world.node, fronts()[0], PATIENCE)?,
        Session::open(&world.node, fronts()[1], PATIENCE)?,
    );
    busy.echo()?;
    world.stop(&mut edged)
}

#[test]
fn what_cannot_be_started_says_why_and_what_to_type() -> Result<()> {
    let world = World::new(1)?;
    let list = world.list(&[0]);
    let run = |arguments: &[&str]| {
        let mut command = world.node.command(program("edged")?);
        command.arg("--node").args(arguments).env_remove("STATE_DIRECTORY");
        say(&mut command, PATIENCE)
    };
    let missing = world.lab.dir().join("missing.crt").display().to_string();
    let taken = world.node.enter(|| TcpListener::bind(fronts()[1]))?;
    for (arguments, code, words) in [
        (vec!["--backends", &list], 1, vec!["16443", "in use", "ss -ltnp"]),
        (
            vec!["--backends", &list, "--ca-file", &missing],
            1,
            vec!["missing.crt", "/etc/kubernetes/pki/ca.crt"],
        ),
        (vec![], 2, vec!["--backends"]),
        (vec!["--backends", "fd00::11"], 2, vec!["fd00::11", "port"]),
    ] {
        let said = run(&arguments)?;
        assert_eq!(said.code, Some(code), "{arguments:?}: {said}");
        for word in words {
            assert!(
                said.to_string().contains(word),
                "{arguments:?} does not say {word:?}: {said}"
            );
        }
    }
    drop(taken);
    Ok(())
}

#[test]
fn the_shipped_unit_runs_it_small_and_without_rights_and_is_removed_without_a_trace() -> Result<()> {
    for suite in suites()? {
        let world = World::new(2)?;
        let debian = SystemdNode::boot(&world.node, suite)?;
        debian.install()?;
        let unit = |property: &str| debian.sh(&format!("systemctl show --value --property {property} edged-node"));
        assert_eq!(
            unit("UnitFileState")?,
            "disabled",
            "{suite}: only an operator enables it"
        );
        assert_eq!(unit("ActiveState")?, "inactive", "{suite}");
        let example = fs::read_to_string(debian.root().join("etc/edged/node.env"))?;
        assert!(example.contains("EDGED_NODE_BACKENDS="), "{suite}: {example}");
        fs::write(
            debian.root().join("etc/edged/node.env"),
            format!("EDGED_NODE_BACKENDS={}\n", world.list(&[0])),
        )?;
        // Whatever an operator has written there stays when the package is installed again.
        debian.install()?;
        debian.sh(&format!("grep -F '{}' /etc/edged/node.env", world.list(&[0])))?;
        // Type=notify: it serves when this returns.
        debian.sh("systemctl enable --now edged-node")?;
        for front in fronts() {
            assert_eq!(Session::open(&world.node, front, PATIENCE)?.server, "cp1", "{suite}");
        }

        let pid = unit("MainPID")?;
        let status = debian.sh(&format!("cat /proc/{pid}/status"))?;
        let line = |key: &str| -> Vec<String> {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
            line.unwrap_or_default().split_whitespace().map(str::to_owned).collect()
        };
        assert!(line("Uid").iter().all(|uid| uid != "0"), "{suite}: {status}");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(line(set).concat().trim_start_matches('0'), "", "{suite}: {set}");
        }
        assert_eq!(
            (line("NoNewPrivs").concat(), line("Seccomp").concat()),
            ("1".into(), "2".into()),
            "{suite}"
        );
        let score = debian.sh("systemd-analyze security --no-pager edged-node | tail -n 1")?;
        debian.sh("systemd-analyze security --threshold=22 --no-pager edged-node > /dev/null")?;
        let pss = debian.sh(&format!("sed -n 's/^Pss: *//p' /proc/{pid}/smaps_rollup"))?;
        println!("{suite}: {pss}; {score}; {}", unit("StatusText")?);
        let kib: u64 = pss.trim_end_matches(" kB").parse()?;
        assert!(kib <= MOST_KIB, "{suite}: {pss}");
        assert!(
            unit("StatusText")?.contains("1 of 1"),
            "{suite}: {}",
            unit("StatusText")?
        );

        // The provisioner writes the file; killed, the unit comes back with what the file said, even without the file.
        let file = debian.root().join("etc/edged/node.backends");
        replace(&file, &format!("{}\n", world.cp[1].at(PORT)))?;
        world.wait_for_server("cp2").with_context(|| log(&debian))?;
        fs::remove_file(&file)?;
        debian.sh(&format!("kill -KILL {pid}"))?;
        wait_until("systemd starts it again", PATIENCE, || {
            unit("MainPID").is_ok_and(|now| now != pid && now != "0")
        })?;
        wait_until("the kept list is served", PATIENCE, || {
            Session::open(&world.node, fronts()[1], PATIENCE).is_ok_and(|session| session.server == "cp2")
        })
        .with_context(|| log(&debian))?;

        debian.sh("systemctl stop edged-node")?;
        assert_eq!(unit("Result")?, "success", "{suite}");
        assert_eq!(unit("ExecMainStatus")?, "0", "{suite}");
        debian.sh("systemctl start edged-node")?;
        debian.sh("/opt/edge/packaging/install.sh uninstall --purge")?;
        let left = debian.sh("find / -xdev -name '*edge[dc]*'; ls /etc/edged 2>/dev/null || true")?;
        assert_eq!(left, "", "{suite}");
        let error = Session::open(&world.node, fronts()[0], PATIENCE).expect_err("removed");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{suite}");
    }
    Ok(())
}

/// A cluster node and control planes, an echo on each.
struct World {
    backends: Vec<Option<Backend>>,
    cp: Vec<Node>,
    node: Node,
    lab: Lab,
}

impl World {
    fn new(control_planes: u16) -> Result<Self> {
        let numbers: Vec<u16> = (1..=control_planes).collect();
        Self::of(Lab::new()?, &numbers)
    }

    /// Three control planes, an echo on those with these numbers.
    fn of(lab: Lab, echoes: &[u16]) -> Result<Self> {
        let node = lab.node("node", 31)?;
        let count = echoes.iter().copied().max().unwrap_or(3);
        let cp: Vec<Node> = (1..=count)
            .map(|number| lab.node(&format!("cp{number}"), 10 + number))
            .collect::<Result<_>>()?;
        let backends = echoes
            .iter()
            .map(|number| Backend::start(&cp[usize::from(*number) - 1], PORT, Script::Echo).map(Some))
            .collect::<Result<_>>()?;
        Ok(Self {
            backends,
            cp,
            node,
            lab,
        })
    }

    /// Control planes by their index, as `--backends` wants them.
    fn list(&self, indices: &[usize]) -> String {
        let addresses: Vec<String> = indices
            .iter()
            .map(|index| self.cp[*index].at(PORT).to_string())
            .collect();
        addresses.join(",")
    }

    fn start(&self, arguments: &[&str]) -> Result<Process> {
        start(&self.node, arguments, None)
    }

    /// Ends it as a service manager does.
    fn stop(&self, edged: &mut Process) -> Result<()> {
        let status = edged.stop(Duration::from_secs(10))?;
        ensure!(
            status.code() == Some(0),
            "{}\n{}",
            ending(status),
            tail(&edged.log(), 10)
        );
        Ok(())
    }

    fn wait_for_server(&self, name: &str) -> Result<Duration> {
        wait_until(&format!("{name} serves"), LOOK, || {
            Session::open(&self.node, fronts()[0], PATIENCE).is_ok_and(|session| session.server == name)
        })
    }
}

/// Starts node mode and waits until it listens; `state` is what a unit's StateDirectory= would be.
fn start(node: &Node, arguments: &[&str], state: Option<&Path>) -> Result<Process> {
    let mut command = node.command(program("edged")?);
    command.arg("--node").args(arguments).env_remove("STATE_DIRECTORY");
    if let Some(state) = state {
        command.env("STATE_DIRECTORY", state);
    }
    let mut edged = node.spawn("edged-node", command)?;
    wait_for("node mode listens", PATIENCE, || {
        let open = listeners(edged.pid()).unwrap_or_default();
        (fronts().iter().all(|front| open.contains(front)) || !edged.running()).then_some(())
    })?;
    ensure!(edged.running(), "it ended: {}", tail(&edged.log(), 10));
    Ok(edged)
}

/// Writes beside and renames into place, as whoever keeps the list does.
fn replace(file: &Path, content: &str) -> Result<()> {
    let beside: PathBuf = file.with_extension("part");
    fs::write(&beside, content)?;
    fs::rename(&beside, file).with_context(|| file.display().to_string())
}

fn children(pid: u32) -> Result<Vec<u32>> {
    let mut all = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let mut list = String::new();
        fs::File::open(task?.path().join("children"))?.read_to_string(&mut list)?;
        all.extend(list.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    Ok(all)
}

fn log(debian: &SystemdNode) -> String {
    debian
        .run("journalctl --no-pager --output cat --unit edged-node | tail -n 20")
        .map(|said| said.out)
        .unwrap_or_default()
}
