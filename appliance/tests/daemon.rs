//! `edged` as its unit starts it, with a manager of the test's own: notifications, descriptor store, signals.

use std::{
    collections::BTreeMap,
    io::{IoSliceMut, Read},
    mem::MaybeUninit,
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{net::UnixDatagram, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::{
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags},
    process::{Pid, Signal, kill_process},
};

#[test]
fn every_worker_is_confined() {
    let edge = Edge::start("confined");
    for (role, uid) in [("lb", "64810"), ("web", "64811")] {
        let status = edge.proc_status(edge.worker(role));
        for (line, wanted) in [
            ("CapEff", ""),
            ("CapPrm", ""),
            ("CapInh", ""),
            ("CapAmb", ""),
            ("NoNewPrivs", "1"),
            ("Seccomp", "2"),
        ] {
            assert_eq!(status[line].trim_start_matches('0'), wanted, "{role}: {line}");
        }
        if rustix::process::geteuid().is_root() {
            let uids: Vec<_> = status["Uid"].split_whitespace().collect();
            assert_eq!(uids, [uid; 4], "{role}");
            assert_eq!(status["Groups"].trim(), "", "{role}");
        } else {
            eprintln!("SKIPPED: not root, so workers keep the user");
        }
        let title = std::fs::read(format!("/proc/{}/cmdline", edge.worker(role))).expect("running");
        assert!(String::from_utf8_lossy(&title).starts_with(&format!("edged: {role}\0")));
    }
    edge.end();
}

#[test]
fn a_killed_worker_is_back_and_nobody_is_refused() {
    let edge = Edge::start("killed");
    let clients = Clients::start(edge.frontend);
    for _ in 0..20 {
        let before = edge.worker("lb");
        edge.signal(before, Signal::KILL);
        let killed = Instant::now();
        edge.until("the worker is back", || edge.running("lb").filter(|pid| *pid != before));
        assert!(killed.elapsed() < Duration::from_secs(10), "{:?}", killed.elapsed());
    }
    let (connected, refused) = clients.stop();
    assert!(connected > 20, "{connected}");
    assert_eq!(refused, 0);
    let lb = edge.worker_status("lb");
    assert_eq!(lb["restarts"], 20);
    assert_eq!(lb["last_end"], "killed by signal 9");
    assert_eq!(edge.worker_status("web")["restarts"], 0, "no other worker notices");
    edge.end();
}

#[test]
fn a_hung_worker_is_killed_and_started_again() {
    let edge = Edge::start("hung");
    let before = edge.worker("lb");
    edge.signal(before, Signal::STOP);
    edge.until("the worker is replaced", || {
        edge.running("lb").filter(|pid| *pid != before)
    });
    assert_eq!(edge.worker_status("lb")["last_end"], "no heartbeat for 5 s");
    edge.end();
}

#[test]
fn the_daemons_own_end_refuses_nobody() {
    let mut edge = Edge::start("supervisor");
    let clients = Clients::start(edge.frontend);
    for _ in 0..3 {
        let workers = [edge.worker("lb"), edge.worker("web")];
        edge.signal(edge.child.id(), Signal::KILL);
        edge.child.wait().expect("waited for");
        for worker in workers {
            edge.until("workers end with the supervisor", || {
                (!Path::new(&format!("/proc/{worker}/cmdline")).exists() || zombie(worker)).then_some(())
            });
        }
        edge.start_again();
    }
    let (connected, refused) = clients.stop();
    assert!(connected > 3, "{connected}");
    assert_eq!(refused, 0);
    assert_eq!(edge.manager.count("READY=1"), 4);
    edge.end();
}

#[test]
fn a_faulty_configuration_changes_nothing_and_says_where() {
    let edge = Edge::start("faulty");
    let theirs = TcpListener::bind("127.0.0.1:0").expect("bound");
    let taken = theirs.local_addr().expect("an address");
    let spare = free();
    for (text, place) in [
        ("version = 1\n[lb]\nthread = 1\n".to_owned(), "edged.toml:3:1"),
        (
            edge.text(&[edge.frontend, spare, taken]),
            &format!(
                "edged.toml:7:{}: {taken} is in use by another process",
                19 + edge.frontend.to_string().len() + spare.to_string().len()
            )[..],
        ),
    ] {
        let worker = edge.worker("lb");
        std::fs::write(&edge.file, text).expect("written");
        let reloads = edge.manager.count("RELOADING=1");
        edge.signal(edge.child.id(), Signal::HUP);
        edge.until("the reload is over", || {
            (edge.manager.count("RELOADING=1") > reloads && edge.manager.last_state() == "READY=1").then_some(())
        });
        let status = edge.status();
        let error = status["config"]["last_error"].as_str().expect("an error").to_owned();
        assert!(error.contains(place), "{place}: {error}");
        assert_eq!(status["config"]["revision"], 1);
        assert_eq!(edge.worker("lb"), worker, "the worker was left alone");
        assert!(accepts(edge.frontend));
        assert!(!accepts(spare), "what was opened for nothing is closed again");
    }
    edge.end();
}

#[test]
fn a_reload_opens_what_is_new_and_closes_what_is_gone() {
    let edge = Edge::start("reload");
    let (worker, web, more) = (edge.worker("lb"), edge.worker("web"), free());
    std::fs::write(&edge.file, edge.text(&[edge.frontend, more])).expect("written");
    edge.signal(edge.child.id(), Signal::HUP);
    edge.until("the listener is there", || accepts(more).then_some(()));
    edge.until("it is confirmed", || {
        (edge.status()["config"]["revision"] == 2).then_some(())
    });
    edge.until("the manager keeps as many of it", || {
        (edge.manager.stored(more) == edge.manager.stored(edge.frontend)).then_some(())
    });
    std::fs::write(&edge.file, edge.text(&[edge.frontend])).expect("written");
    edge.signal(edge.child.id(), Signal::HUP);
    edge.until("the listener is gone", || (!accepts(more)).then_some(()));
    edge.until("the manager has closed it", || {
        (edge.manager.stored(more) == 0).then_some(())
    });
    assert_eq!(
        (edge.worker("lb"), edge.worker("web")),
        (worker, web),
        "nobody was started again"
    );
    edge.end();
}

#[test]
fn an_unconfirmed_configuration_is_taken_back() {
    let edge = Edge::start("unconfirmed");
    let more = free();
    let file = edge.directory.join("trial.toml");
    std::fs::write(&file, edge.text(&[edge.frontend, more])).expect("written");
    let applied = edge.edgectl(&["config", "apply", &file.display().to_string(), "--confirm", "8s"]);
    assert!(applied.0.success(), "{}", applied.1);
    assert!(accepts(more));
    edge.until("it is taken back", || (!accepts(more)).then_some(()));
    let config = &edge.status()["config"];
    assert_eq!(
        (&config["revision"], &config["reverts_in_seconds"]),
        (&1.into(), &serde_json::Value::Null)
    );
    edge.end();
}

#[test]
fn an_upgrade_is_a_reload_to_the_manager_and_a_restart_to_nobody() {
    let edge = Edge::start("upgrade");
    let before = edge.status();
    let (stored, readies) = (edge.manager.stored(edge.frontend), edge.manager.count("READY=1"));
    let clients = Clients::start(edge.frontend);
    let upgrade = || edge.edgectl(&["upgrade", env!("CARGO_BIN_EXE_edged")]);
    let ((mut status, mut said), mut upgrades) = (upgrade(), 1);
    if said.contains("was not handed over") {
        // A machine that holds a step up for long has it taken back, rightly.
        ((status, said), upgrades) = (upgrade(), 2);
    }
    assert!(status.success(), "{said}");
    edge.until("the manager hears that it is over", || {
        (edge.manager.count("READY=1") > readies && edge.manager.last_state() == "READY=1").then_some(())
    });
    let (connected, refused) = clients.stop();
    assert!(connected > 0, "{connected}");
    assert_eq!(refused, 0);
    let after = edge.status();
    assert_eq!(after["pid"], before["pid"]);
    assert_eq!(after["upgrade"]["state"], "done", "{after}");
    assert_eq!(after["config"]["revision"], before["config"]["revision"]);
    assert_eq!(edge.manager.count("RELOADING=1"), upgrades);
    assert_eq!(edge.manager.stored(edge.frontend), stored, "nothing was stored twice");
    // The lock outlives it, too, and signals are still heard.
    let output = edge.command().output().expect("ran");
    assert_eq!(output.status.code(), Some(1), "a second instance");
    let signs = edge.manager.count("WATCHDOG=1");
    edge.until("it goes on showing signs of life", || {
        (edge.manager.count("WATCHDOG=1") > signs).then_some(())
    });
    edge.signal(edge.child.id(), Signal::HUP);
    edge.until("a reload is heard", || {
        (edge.manager.count("RELOADING=1") == upgrades + 1).then_some(())
    });
    edge.until("and done", || (edge.manager.last_state() == "READY=1").then_some(()));
    edge.end();
}

#[test]
fn a_second_instance_is_refused_and_disturbs_nothing() {
    let edge = Edge::start("second");
    let output = edge.command().output().expect("ran");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains(&format!(
            "already runs on {}, as process {}",
            edge.directory.join("state").display(),
            edge.child.id()
        )),
        "{said}"
    );
    assert!(edge.edgectl(&["status"]).0.success());
    edge.end();
}

#[test]
fn what_is_missing_is_said_with_its_exit_code() {
    let directory = fresh("missing");
    let run = |text: Option<&str>, arguments: &[&str]| {
        let file = directory.join("edged.toml");
        let _ = std::fs::remove_file(&file);
        if let Some(text) = text {
            std::fs::write(&file, text).expect("written");
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_edged"));
        command
            .arg("--config")
            .arg(&file)
            .arg("--state")
            .arg(directory.join("state"))
            .args(arguments);
        let output = command.output().expect("ran");
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let (code, said) = run(None, &[]);
    assert_eq!(code, Some(2), "{said}");
    assert!(
        said.contains("does not exist") && said.contains("edgectl config check"),
        "{said}"
    );
    let (code, said) = run(Some("version = 1\nfoo = 1\n"), &[]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("edged.toml:2:1"), "{said}");
    let (code, said) = run(Some("version = 1\nfoo = 1\n"), &["--check"]);
    assert_eq!(code, Some(2), "{said}");
    let (code, said) = run(Some("version = 1\n[control]\nmetrics = [\"192.0.2.7:9464\"]\n"), &[]);
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("edged.toml:3:12: 192.0.2.7 is no address of this machine"),
        "{said}"
    );
    let (code, said) = run(Some("version = 1\n"), &["--check"]);
    assert_eq!(code, Some(0), "{said}");
    let _ = std::fs::remove_dir_all(directory);
}

/// A running daemon and its manager.
struct Edge {
    directory: PathBuf,
    file: PathBuf,
    frontend: SocketAddr,
    metrics: SocketAddr,
    manager: Manager,
    child: Child,
}

impl Edge {
    fn start(name: &str) -> Self {
        let directory = fresh(name);
        let file = directory.join("edged.toml");
        let manager = Manager::start(directory.join("notify"));
        let child = Command::new("true").spawn().expect("a placeholder");
        let mut edge = Self {
            directory,
            file,
            frontend: free(),
            metrics: free(),
            manager,
            child,
        };
        std::fs::write(&edge.file, edge.text(&[edge.frontend])).expect("written");
        edge.start_again();
        edge
    }

    /// A configuration whose frontend listens on `listen`; the list is on line 7.
    fn text(&self, listen: &[SocketAddr]) -> String {
        let socket = self.directory.join("run/edged.sock");
        let (socket, listen) = (
            socket.display(),
            listen
                .iter()
                .map(|address| format!("\"{address}\""))
                .collect::<Vec<_>>()
                .join(", "),
        );
        format!(
            "version = 1\n[control]\nsocket = \"{socket}\"\nmetrics = [\"{}\"]\n[[lb.frontend]]\nname = \"api\"\nlisten = [{listen}]\nbackends = [\"127.0.0.1:1\"]\n",
            self.metrics
        )
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_edged"));
        command
            .arg("--config")
            .arg(&self.file)
            .arg("--state")
            .arg(self.directory.join("state"));
        command
    }

    /// Starts the daemon as a manager does: with what it keeps, at 3 and up, and its own process id in the environment.
    fn start_again(&mut self) {
        let ready = self.manager.count("READY=1");
        let store = self.manager.store.lock().expect("not poisoned").clone();
        let mut command = Command::new("/bin/sh");
        command.args([
            "-c",
            "export LISTEN_PID=$$; exec \"$@\"",
            "sh",
            env!("CARGO_BIN_EXE_edged"),
            "--config",
        ]);
        command.arg(&self.file).arg("--state").arg(self.directory.join("state"));
        command
            .env("NOTIFY_SOCKET", &self.manager.path)
            .env("WATCHDOG_USEC", "10000000");
        command.env("LISTEN_FDS", store.len().to_string());
        command.env(
            "LISTEN_FDNAMES",
            store
                .iter()
                .map(|(name, _)| name.as_str())
                .collect::<Vec<_>>()
                .join(":"),
        );
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.directory.join("log"))
            .expect("opened");
        command.stdin(Stdio::null()).stderr(log);
        let descriptors: Vec<_> = store.iter().map(|(_, descriptor)| descriptor.as_raw_fd()).collect();
        // SAFETY: dup2(2) and fcntl(2) only, between fork and exec. Out of the way first, so that none overwrites another.
        unsafe {
            command.pre_exec(move || {
                let high = |index: usize| 500 + i32::try_from(index).unwrap_or(0);
                for (index, descriptor) in descriptors.iter().enumerate() {
                    libc::dup2(*descriptor, high(index));
                }
                for index in 0..descriptors.len() {
                    libc::dup2(high(index), high(index) - 497);
                    libc::close(high(index));
                }
                Ok(())
            });
        }
        self.child = command.spawn().expect("started");
        self.until("the daemon is ready", || {
            (self.manager.count("READY=1") > ready).then_some(())
        });
    }

    fn status(&self) -> serde_json::Value {
        let (status, output) = self.edgectl(&["--output", "json", "status"]);
        serde_json::from_str(&output).unwrap_or_else(|error| panic!("{status}, {error}: {output}"))
    }

    fn worker_status(&self, role: &str) -> serde_json::Value {
        let status = self.status();
        let workers = status["workers"].as_array().expect("workers");
        workers
            .iter()
            .find(|worker| worker["role"] == role)
            .expect("the role")
            .clone()
    }

    fn running(&self, role: &str) -> Option<u32> {
        let worker = self.worker_status(role);
        (worker["state"] == "running")
            .then(|| u32::try_from(worker["pid"].as_u64().expect("a process")).expect("a process"))
    }

    fn worker(&self, role: &str) -> u32 {
        self.until("the worker runs", || self.running(role))
    }

    fn edgectl(&self, arguments: &[&str]) -> (ExitStatus, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_edgectl"));
        command
            .arg("--socket")
            .arg(self.directory.join("run/edged.sock"))
            .args(arguments);
        let output = command.output().expect("ran");
        (
            output.status,
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr),
        )
    }

    fn proc_status(&self, pid: u32) -> BTreeMap<String, String> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("running");
        text.lines()
            .filter_map(|line| line.split_once(":\t"))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    fn signal(&self, pid: u32, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(pid).expect("a process")).expect("a process");
        kill_process(pid, signal).expect("sent");
    }

    fn until<T>(&self, what: &str, look: impl Fn() -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            if let Some(found) = look() {
                return found;
            }
            if begun.elapsed() > Duration::from_secs(30) {
                panic!(
                    "{what}: not within 30 s; the log:\n{}",
                    std::fs::read_to_string(self.directory.join("log")).unwrap_or_default()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// SIGTERM, and everything that is to be after it.
    fn end(mut self) {
        let workers = [self.worker("lb"), self.worker("web")];
        self.signal(self.child.id(), Signal::TERM);
        assert!(self.child.wait().expect("waited for").success());
        self.until("the manager hears of it", || {
            (self.manager.count("STOPPING=1") > 0).then_some(())
        });
        assert_eq!(self.manager.count("STOPPING=1"), 1);
        for worker in workers {
            assert!(
                !Path::new(&format!("/proc/{worker}")).exists(),
                "worker {worker} is still there"
            );
        }
        assert!(!self.directory.join("run/edged.sock").exists());
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Descriptors by the name they were stored under.
type Kept = Arc<Mutex<Vec<(String, Arc<OwnedFd>)>>>;

/// What a service manager does: reads notifications, keeps descriptors.
struct Manager {
    path: PathBuf,
    said: Arc<Mutex<Vec<String>>>,
    store: Kept,
}

impl Manager {
    fn start(path: PathBuf) -> Self {
        let socket = UnixDatagram::bind(&path).expect("bound");
        let (said, store) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
        let manager = Self {
            path,
            said: Arc::clone(&said),
            store: Arc::clone(&store),
        };
        // Ends with the test's process.
        std::thread::spawn(move || {
            loop {
                let mut buffer = [0; 4096];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                let mut parts = [IoSliceMut::new(&mut buffer)];
                let received =
                    rustix::net::recvmsg(&socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC).expect("received");
                let mut descriptors = Vec::new();
                for message in control.drain() {
                    if let RecvAncillaryMessage::ScmRights(rights) = message {
                        descriptors.extend(rights);
                    }
                }
                let text = String::from_utf8_lossy(&buffer[..received.bytes]).into_owned();
                let name = text
                    .lines()
                    .find_map(|line| line.strip_prefix("FDNAME="))
                    .unwrap_or_default()
                    .to_owned();
                let mut store: std::sync::MutexGuard<'_, Vec<(String, Arc<OwnedFd>)>> =
                    store.lock().expect("not poisoned");
                if text.starts_with("FDSTORE=1") {
                    for descriptor in descriptors {
                        // As systemd does: what is kept already is not kept twice.
                        let inode = |fd: &OwnedFd| rustix::fs::fstat(fd.as_fd()).expect("open").st_ino;
                        if !store.iter().any(|(_, kept)| inode(kept) == inode(&descriptor)) {
                            store.push((name.clone(), Arc::new(descriptor)));
                        }
                    }
                } else if text.starts_with("FDSTOREREMOVE=1") {
                    store.retain(|(kept, _)| *kept != name);
                }
                said.lock().expect("not poisoned").push(text);
            }
        });
        manager
    }

    fn count(&self, line: &str) -> usize {
        self.said
            .lock()
            .expect("not poisoned")
            .iter()
            .filter(|text| text.lines().any(|found| found == line))
            .count()
    }

    /// The last of READY, RELOADING, STOPPING.
    fn last_state(&self) -> String {
        let said = self.said.lock().expect("not poisoned");
        let states = ["READY=1", "RELOADING=1", "STOPPING=1"];
        said.iter()
            .rev()
            .find_map(|text| states.iter().find(|state| text.starts_with(**state)))
            .copied()
            .unwrap_or_default()
            .to_owned()
    }

    /// How many sockets are kept for `address`.
    fn stored(&self, address: SocketAddr) -> usize {
        let name = appliance::notify::name_of(appliance::endpoint::Endpoint::tcp(address));
        self.store
            .lock()
            .expect("not poisoned")
            .iter()
            .filter(|(kept, _)| *kept == name)
            .count()
    }
}

/// Connects again and again.
struct Clients {
    stop: Arc<AtomicBool>,
    connected: Arc<AtomicU64>,
    refused: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Clients {
    fn start(address: SocketAddr) -> Self {
        let (stop, connected, refused) = (
            Arc::<AtomicBool>::default(),
            Arc::<AtomicU64>::default(),
            Arc::<AtomicU64>::default(),
        );
        let thread = std::thread::spawn({
            let (stop, connected, refused) = (Arc::clone(&stop), Arc::clone(&connected), Arc::clone(&refused));
            move || {
                while !stop.load(Ordering::Relaxed) {
                    match TcpStream::connect(address) {
                        Ok(mut stream) => {
                            connected.fetch_add(1, Ordering::Relaxed);
                            // Whatever comes: a session of a worker that was killed is reset, and its backend is nobody.
                            let _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
                            let _ = stream.read(&mut [0; 16]);
                        }
                        // Accepted by a worker that ended before this thread ran on: a session that was reset, as above.
                        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
                        Err(error) => {
                            eprintln!("not accepted: {error}");
                            refused.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        });
        Self {
            stop,
            connected,
            refused,
            thread,
        }
    }

    fn stop(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("no panic");
        (
            self.connected.load(Ordering::Relaxed),
            self.refused.load(Ordering::Relaxed),
        )
    }
}

/// Whether somebody listens there; a session that is over at once may be reset before connecting returns.
fn accepts(address: SocketAddr) -> bool {
    !TcpStream::connect(address).is_err_and(|error| error.kind() != std::io::ErrorKind::ConnectionReset)
}

fn zombie(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| stat.rsplit(')').next().is_some_and(|rest| rest.trim().starts_with('Z')))
}

/// An address that nobody listens on, outside the range that connections get theirs from.
fn free() -> SocketAddr {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        let offset = (u64::from(std::process::id()) * 37 + NEXT.fetch_add(1, Ordering::Relaxed)) % 9000;
        let address = SocketAddr::from(([127, 0, 0, 1], 20_000 + u16::try_from(offset).expect("small")));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

fn fresh(name: &str) -> PathBuf {
    let directory = std::env::temp_dir().join(format!("edged-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&directory);
    std::fs::create_dir_all(&directory).expect("made");
    directory
}
