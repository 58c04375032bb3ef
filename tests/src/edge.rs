//! `edged` on a node, and `edgectl` beside it, as a user has them.

use std::{
    fs,
    io::Read,
    net::{SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::{Node, Process, http, lab::need_tool, process, wait_for, wait_until};

/// A running `edged` with its configuration file, its state and its control socket.
#[derive(Debug)]
pub struct Edge {
    node: Node,
    process: Mutex<Process>,
    config: PathBuf,
    state: PathBuf,
    socket: PathBuf,
    environment: Vec<(String, String)>,
    descriptors: Option<u32>,
}

/// What a command said and how it ended.
#[derive(Clone, Debug)]
pub struct Said {
    /// Exit status; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
    /// How long it ran.
    pub took: Duration,
}

/// The program `name` (`edged`, `edgectl`) of this build: in the directory that `EDGED_BIN_DIR` names, else beside the
/// directory of the running test.
///
/// # Errors
///
/// If it is not there; the message says how to build it.
pub fn program(name: &str) -> Result<PathBuf> {
    let directories: Vec<PathBuf> = match std::env::var_os("EDGED_BIN_DIR") {
        Some(directory) => vec![directory.into()],
        // A test's executable lies in target/PROFILE/deps, a demo's in target/PROFILE.
        None => std::env::current_exe()?
            .ancestors()
            .skip(1)
            .take(2)
            .map(Path::to_owned)
            .collect(),
    };
    let found = directories
        .iter()
        .map(|directory| directory.join(name))
        .find(|file| file.is_file());
    found.with_context(|| {
        format!(
            "{name} is not in {}; build it: cargo build --release --workspace",
            directories[0].display()
        )
    })
}

impl Edge {
    /// Starts `edged` on `node` with `config` (TOML, to which the control socket is added) and waits until it serves.
    ///
    /// # Errors
    ///
    /// If it does not come to serve; the message has its last words.
    pub fn start(node: &Node, config: &str) -> Result<Self> {
        Self::start_with(node, config, &[])
    }

    /// As [`Edge::start`], with more in the environment.
    ///
    /// # Errors
    ///
    /// As [`Edge::start`].
    pub fn start_with(node: &Node, config: &str, environment: &[(&str, &str)]) -> Result<Self> {
        Self::start_as(node, config, environment, None)
    }

    /// As [`Edge::start`], with no more than so many descriptors for each of its processes.
    ///
    /// # Errors
    ///
    /// As [`Edge::start`].
    pub fn start_limited(node: &Node, config: &str, descriptors: u32) -> Result<Self> {
        Self::start_as(node, config, &[], Some(descriptors))
    }

    fn start_as(node: &Node, config: &str, environment: &[(&str, &str)], descriptors: Option<u32>) -> Result<Self> {
        let (file, state, socket) = (node.file("edged.toml"), node.file("state"), node.file("edged.sock"));
        fs::create_dir_all(&state)?;
        fs::write(&file, with_socket(config, &socket))?;
        let environment: Vec<_> = environment
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        let process = launch(node, &file, &state, &environment, descriptors)?;
        let edge = Self {
            node: node.clone(),
            process: Mutex::new(process),
            config: file,
            state,
            socket,
            environment,
            descriptors,
        };
        edge.wait_until_serving()?;
        Ok(edge)
    }

    fn wait_until_serving(&self) -> Result<()> {
        wait_until("edged serves", Duration::from_secs(10), || {
            let running = self.process.lock().is_ok_and(|mut process| process.running());
            !running || self.serves().is_ok_and(|serves| serves)
        })
        .with_context(|| process::tail(&self.log(), 20))?;
        if !self.serves()? {
            bail!("edged ended at once:\n{}", process::tail(&self.log(), 20));
        }
        Ok(())
    }

    /// Whether every worker runs and the configuration is kept: what `edged` tells a service manager as "ready".
    fn serves(&self) -> Result<bool> {
        let status = self.status()?;
        let kept = find(&status, "revision")
            .and_then(Value::as_u64)
            .is_some_and(|revision| revision > 0);
        Ok(kept && self.workers()?.iter().all(|worker| worker["state"] == "running"))
    }

    /// What `edged` and its workers have logged.
    pub fn log(&self) -> String {
        self.process.lock().expect("no panic while it is held").log()
    }

    /// The supervisor's process id.
    pub fn pid(&self) -> u32 {
        self.process.lock().expect("no panic while it is held").pid()
    }

    /// Every process of the daemon: the supervisor and its descendants.
    pub fn processes(&self) -> Vec<u32> {
        let mut all = vec![self.pid()];
        let mut next = 0;
        while let Some(pid) = all.get(next) {
            let children = fs::read_dir(format!("/proc/{pid}/task"))
                .into_iter()
                .flatten()
                .filter_map(Result::ok);
            let lists = children.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
            let children: Vec<u32> = lists
                .flat_map(|list| list.split(' ').filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
                .collect();
            all.extend(children);
            next += 1;
        }
        all
    }

    /// Memory of the whole daemon in KiB, each shared page counted once among those who share it.
    ///
    /// # Errors
    ///
    /// If a process cannot be read.
    pub fn pss_kib(&self) -> Result<u64> {
        self.processes().iter().map(|pid| process::pss_kib(*pid)).sum()
    }

    /// Stops `edged` as a service manager does, and starts it again with the same configuration and state.
    ///
    /// # Errors
    ///
    /// If it does not stop or does not come to serve again.
    pub fn restart(&self) -> Result<()> {
        let mut process = self.process.lock().expect("no panic while it is held");
        let status = process.stop(Duration::from_secs(10))?;
        ensure!(status.success(), "edged stopped with {}", process::ending(status));
        *process = launch(
            &self.node,
            &self.config,
            &self.state,
            &self.environment,
            self.descriptors,
        )?;
        drop(process);
        self.wait_until_serving()
    }

    /// Kills the supervisor (signal 9), waits until its workers have ended with it, and starts it again with the same
    /// configuration and state.
    ///
    /// # Errors
    ///
    /// If a worker stays or it does not come to serve again.
    pub fn crash(&self) -> Result<()> {
        let orphans = self.processes();
        let mut process = self.process.lock().expect("no panic while it is held");
        process.kill();
        wait_until("the workers end with their supervisor", Duration::from_secs(10), || {
            // One that has ended may stay as a zombie for want of a parent that asks.
            let lives =
                |pid: &u32| fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
            !orphans.iter().any(lives)
        })?;
        *process = launch(
            &self.node,
            &self.config,
            &self.state,
            &self.environment,
            self.descriptors,
        )?;
        drop(process);
        self.wait_until_serving()
    }

    /// Replaces the configuration file and sends SIGHUP; the file takes effect some time later.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn reload(&self, config: &str) -> Result<()> {
        fs::write(&self.config, with_socket(config, &self.socket))?;
        self.process
            .lock()
            .expect("no panic while it is held")
            .signal(Signal::HUP)
    }

    /// `edgectl config apply` of a file with `config`.
    ///
    /// # Errors
    ///
    /// If `edgectl` cannot be run.
    pub fn apply(&self, config: &str) -> Result<Said> {
        let file = self.node.fresh_file("apply.toml");
        fs::write(&file, with_socket(config, &self.socket))?;
        self.ctl(&["config", "apply", &file.display().to_string()])
    }

    /// `edgectl` with `arguments`.
    ///
    /// # Errors
    ///
    /// If it cannot be run.
    pub fn ctl(&self, arguments: &[&str]) -> Result<Said> {
        let mut command = Command::new(program("edgectl")?);
        command.arg("--socket").arg(&self.socket).args(arguments);
        say(&mut command, Duration::from_secs(15))
    }

    /// `edgectl -o json` with `arguments`, its answer read.
    ///
    /// # Errors
    ///
    /// If it fails or its answer is no JSON.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let said = self.ctl(&[&["-o", "json"], arguments].concat())?;
        ensure!(said.code == Some(0), "edgectl {arguments:?}: {said}");
        serde_json::from_str(&said.out).with_context(|| format!("edgectl {arguments:?}: {said}"))
    }

    /// `edgectl upgrade` to `binary`.
    ///
    /// # Errors
    ///
    /// If `edgectl` cannot be run.
    pub fn upgrade(&self, binary: &Path) -> Result<Said> {
        self.ctl(&["upgrade", &binary.display().to_string()])
    }

    /// As [`Edge::upgrade`], for what must succeed. Twice if a worker was not handed over: a step of a hand-over has two
    /// seconds, and a machine that stands still for longer has it taken back, as it should be.
    ///
    /// # Errors
    ///
    /// If it does not succeed: what `edgectl` said, and the log's end.
    pub fn upgraded(&self, binary: &Path) -> Result<Said> {
        let mut said = self.upgrade(binary)?;
        if said.err.contains("was not handed over") {
            said = self.upgrade(binary)?;
        }
        ensure!(said.code == Some(0), "{said}\n{}", process::tail(&self.log(), 20));
        Ok(said)
    }

    /// The build that every process of the daemon runs, the supervisor first, and the workers by their role.
    ///
    /// # Errors
    ///
    /// As [`Edge::json`].
    pub fn builds(&self) -> Result<Vec<(String, String)>> {
        let status = self.status()?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let mut builds = vec![("edged".to_owned(), text(&status["build"]))];
        for worker in self.workers()? {
            builds.push((text(&worker["role"]), text(&worker["build"])));
        }
        Ok(builds)
    }

    /// `edgectl status`.
    ///
    /// # Errors
    ///
    /// As [`Edge::json`].
    pub fn status(&self) -> Result<Value> {
        self.json(&["status"])
    }

    /// Process id of the running worker `role`.
    ///
    /// # Errors
    ///
    /// If it does not run.
    pub fn worker(&self, role: &str) -> Result<u32> {
        let workers = self.workers()?;
        let worker = workers
            .iter()
            .find(|worker| worker["role"] == role && worker["state"] == "running");
        let pid = worker
            .and_then(|worker| worker["pid"].as_u64())
            .and_then(|pid| pid.try_into().ok());
        pid.with_context(|| format!("no worker {role} is running: {workers:?}"))
    }

    /// Every worker as `edgectl status` shows it.
    ///
    /// # Errors
    ///
    /// As [`Edge::json`].
    pub fn workers(&self) -> Result<Vec<Value>> {
        let status = self.status()?;
        let workers = find(&status, "workers").and_then(Value::as_array);
        workers.cloned().with_context(|| format!("no workers in {status}"))
    }

    /// Waits until the worker `role` is running as another process than `before`; returns its id.
    ///
    /// # Errors
    ///
    /// If that does not happen.
    pub fn wait_for_new_worker(&self, role: &str, before: u32, within: Duration) -> Result<u32> {
        wait_for(&format!("another worker {role} runs"), within, || {
            self.worker(role).ok().filter(|pid| *pid != before)
        })
    }

    /// A backend as `edgectl lb show` shows it, by its address.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn backend(&self, address: impl ToString) -> Result<Value> {
        let shown = self.json(&["lb", "show"])?;
        let wanted = address.to_string();
        let frontends = find(&shown, "frontends")
            .and_then(Value::as_array)
            .context("no frontends")?;
        let mut backends = frontends
            .iter()
            .filter_map(|frontend| frontend["backends"].as_array())
            .flatten();
        let found = backends.find(|backend| backend["backend"] == wanted.as_str());
        found
            .cloned()
            .with_context(|| format!("no backend {wanted} in {shown}"))
    }

    /// The state of a backend: `healthy`, `banned`, ...
    ///
    /// # Errors
    ///
    /// If there is no such backend.
    pub fn state(&self, address: impl ToString) -> Result<String> {
        Ok(self.backend(address)?["state"].as_str().unwrap_or_default().to_owned())
    }

    /// Waits until a backend is in `state`; says how long that took.
    ///
    /// # Errors
    ///
    /// If it does not come to it; the message has its state.
    pub fn wait_for_state(&self, address: impl ToString, state: &str, within: Duration) -> Result<Duration> {
        let address = address.to_string();
        wait_until(&format!("backend {address} is {state}"), within, || {
            self.state(&address).is_ok_and(|now| now == state)
        })
        .with_context(|| format!("{:#?}", self.backend(&address)))
    }

    /// The events of a backend as `edgectl lb why` tells them.
    ///
    /// # Errors
    ///
    /// As [`Edge::json`].
    pub fn events(&self, address: impl ToString) -> Result<Vec<Value>> {
        let why = self.json(&["lb", "why", &address.to_string()])?;
        let backends = find(&why, "backends")
            .and_then(Value::as_array)
            .context("no backends")?;
        Ok(backends
            .iter()
            .filter_map(|backend| backend["events"].as_array())
            .flatten()
            .cloned()
            .collect())
    }

    /// The metrics page, as a scraper on the same machine reads it; asked for twice, as a scraper does.
    ///
    /// # Errors
    ///
    /// If it is not served.
    pub fn metrics(&self) -> Result<String> {
        self.scrape().or_else(|_| self.scrape())
    }

    fn scrape(&self) -> Result<String> {
        let target = SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, 9464));
        let patience = Duration::from_secs(2);
        let stream = self.node.enter(|| TcpStream::connect_timeout(&target, patience))?;
        stream.set_read_timeout(Some(patience))?;
        let mut response = http::request(stream, "GET", "/metrics", "[::1]:9464", "")?;
        let text = response.text()?;
        ensure!(
            response.status == 200,
            "the metrics page was answered {}: {text}",
            response.status
        );
        Ok(text)
    }

    /// The node it runs on.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Its control socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        // Asked to stop first, so that it ends its workers itself.
        if let Ok(process) = self.process.get_mut() {
            let _ = process.stop(Duration::from_secs(3));
        }
    }
}

/// A copy of the program `from` at `to` that is another build: the same code with other bytes in its GNU build id.
///
/// # Errors
///
/// If it has no build id or the copy cannot be written.
pub fn other_build(from: &Path, to: &Path) -> Result<PathBuf> {
    // The head of the note (elf(5)): length of the name, length of the content, NT_GNU_BUILD_ID, name.
    const HEAD: &[u8] = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0";
    let mut program = fs::read(from).with_context(|| from.display().to_string())?;
    let head = program.windows(HEAD.len()).position(|bytes| bytes == HEAD);
    let id = head.context("the program has no build id")? + HEAD.len();
    program[id] = program[id].wrapping_add(1);
    fs::write(to, program)?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755))?;
    Ok(to.to_owned())
}

/// `edged` with `config`, which it is expected to refuse: what it said and how it ended.
///
/// # Errors
///
/// If it cannot be run or does not end.
pub fn refused_start(node: &Node, config: &str) -> Result<Said> {
    let (file, state) = (node.fresh_file("refused.toml"), node.fresh_file("state"));
    fs::create_dir_all(&state)?;
    fs::write(&file, with_socket(config, &node.fresh_file("refused.sock")))?;
    let mut command = node.command(program("edged")?);
    command.arg("--config").arg(&file).arg("--state").arg(&state);
    say(&mut command, Duration::from_secs(10))
}

fn launch(
    node: &Node,
    config: &Path,
    state: &Path,
    environment: &[(String, String)],
    descriptors: Option<u32>,
) -> Result<Process> {
    let mut command = match descriptors {
        None => node.command(program("edged")?),
        Some(most) => {
            // It sets the limit and then becomes the program: the process is the same.
            let mut command = node.command(need_tool("prlimit", "util-linux")?);
            command.arg(format!("--nofile={most}")).arg(program("edged")?);
            command
        }
    };
    command
        .arg("--config")
        .arg(config)
        .arg("--state")
        .arg(state)
        .envs(environment.iter().cloned());
    node.spawn("edged", command)
}

/// Adds the control socket to a configuration, at its end so that no line moves; a `[control]` of its own has to be its
/// last table.
fn with_socket(config: &str, socket: &Path) -> String {
    let table = if config.contains("\n[control]\n") {
        ""
    } else {
        "[control]\n"
    };
    format!("{config}\n{table}socket = \"{}\"\n", socket.display())
}

/// Runs a command to its end, which has to come within `within`.
///
/// # Errors
///
/// If it cannot be run, or was killed because it did not end.
pub fn say(command: &mut Command, within: Duration) -> Result<Said> {
    let begin = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{command:?}"))?;
    let (mut out, mut err) = (
        child.stdout.take().expect("piped above"),
        child.stderr.take().expect("piped above"),
    );
    let read = |from: &mut dyn Read| {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    };
    std::thread::scope(|scope| {
        let err = scope.spawn(move || read(&mut err));
        let out = scope.spawn(move || read(&mut out));
        let ended = wait_for(&format!("{command:?} ends"), within, || child.try_wait().ok().flatten());
        let took = begin.elapsed();
        if ended.is_err() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let text = |thread: std::thread::ScopedJoinHandle<'_, String>| thread.join().unwrap_or_default();
        let (out, err) = (text(out), text(err));
        let status = ended.with_context(|| format!("{out}{err}"))?;
        Ok(Said {
            code: status.code(),
            out,
            err,
            took,
        })
    })
}

/// The value of `key`, wherever in `value` it is.
pub fn find<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    match value {
        Value::Object(map) => map.get(key).or_else(|| map.values().find_map(|inner| find(inner, key))),
        Value::Array(list) => list.iter().find_map(|inner| find(inner, key)),
        _ => None,
    }
}

impl std::fmt::Display for Said {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let code = self
            .code
            .map_or_else(|| "a signal".to_owned(), |code| format!("exit status {code}"));
        write!(f, "{code}\n{}{}", self.out, self.err)
    }
}
