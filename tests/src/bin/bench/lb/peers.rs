//! The balancers under test: how each is started as its users start it, and stopped.

use std::{
    env, fs,
    fs::File,
    io::Read,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    procs,
    sandbox::{self, FOLDER},
};

/// The backends, as every configuration in tests/peers/ has them: three, as a cluster has control planes.
pub(crate) const BACKENDS: [SocketAddr; 3] = [backend(11), backend(12), backend(13)];

const fn backend(last: u8) -> SocketAddr {
    SocketAddr::new(
        std::net::IpAddr::V4(Ipv4Addr::new(127, 0, 0, last)),
        super::backend::PORT,
    )
}

/// Debian's folder of nginx modules, which is also in nginx-stream.conf.
const NGINX_STREAM: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

/// What stands between clients and backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Peer {
    /// Ours.
    Edged,
    /// Debian's HAProxy, copying.
    HaproxyCopy,
    /// The same, splicing.
    HaproxySplice,
    /// The same, with pipes as large as ours.
    HaproxyPipes,
    /// Debian's nginx with its stream module.
    Nginx,
    /// tokio's `copy_bidirectional`, see `peer_tokio.rs`.
    Tokio,
    /// Ours, sending PROXY version 2.
    EdgedProxy,
    /// HAProxy, splicing and sending PROXY version 2.
    HaproxyProxy,
    /// nginx, sending PROXY version 1.
    NginxProxy,
    /// Ours on a cluster node: one process, one thread.
    EdgedNode,
    /// HAProxy with one thread and no master.
    HaproxyNode,
    /// Nothing: what clients and backends can do by themselves.
    Direct,
}

/// What a peer is used as; each has tables of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    /// Between clients and servers, on a machine of its own.
    Balancer,
    /// In front of an ingress that learns its clients by PROXY protocol.
    Ingress,
    /// On each node of a cluster, in front of the API servers.
    Node,
}

impl Group {
    /// All, in the order of the tables.
    pub(crate) const ALL: [Self; 3] = [Self::Balancer, Self::Ingress, Self::Node];

    /// As written on the command line.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Balancer => "balancer",
            Self::Ingress => "ingress",
            Self::Node => "node",
        }
    }
}

impl Peer {
    /// All, in the order of the tables.
    pub(crate) const ALL: [Self; 12] = [
        Self::Edged,
        Self::HaproxyCopy,
        Self::HaproxySplice,
        Self::HaproxyPipes,
        Self::Nginx,
        Self::Tokio,
        Self::Direct,
        Self::EdgedProxy,
        Self::HaproxyProxy,
        Self::NginxProxy,
        Self::EdgedNode,
        Self::HaproxyNode,
    ];

    /// Those that run only when asked for by name.
    pub(crate) const EXTRA: [Self; 2] = [Self::HaproxyPipes, Self::Tokio];

    /// What it is used as.
    pub(crate) const fn group(self) -> Group {
        match self {
            Self::EdgedProxy | Self::HaproxyProxy | Self::NginxProxy => Group::Ingress,
            Self::EdgedNode | Self::HaproxyNode => Group::Node,
            _ => Group::Balancer,
        }
    }

    /// As written on the command line and in the tables.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Edged => "edged",
            Self::HaproxyCopy => "haproxy-copy",
            Self::HaproxySplice => "haproxy-splice",
            Self::HaproxyPipes => "haproxy-pipes",
            Self::Nginx => "nginx",
            Self::Tokio => "tokio",
            Self::EdgedProxy => "edged-proxy",
            Self::HaproxyProxy => "haproxy-proxy",
            Self::NginxProxy => "nginx-proxy",
            Self::EdgedNode => "edged-node",
            Self::HaproxyNode => "haproxy-node",
            Self::Direct => "direct",
        }
    }

    /// Where clients connect to; the ports are those of the configurations in tests/peers/.
    pub(crate) fn target(self) -> SocketAddr {
        let port = match self {
            Self::Direct => return BACKENDS[0],
            Self::HaproxyCopy => 8001,
            Self::HaproxySplice => 8002,
            Self::Nginx => 8003,
            Self::Edged => 8004,
            Self::Tokio => 8005,
            Self::HaproxyPipes => 8006,
            Self::EdgedProxy => 8007,
            Self::HaproxyProxy => 8008,
            Self::NginxProxy => 8009,
            Self::HaproxyNode => 8010,
            // Node mode serves here alone.
            Self::EdgedNode => 16443,
        };
        (Ipv4Addr::LOCALHOST, port).into()
    }

    /// Its own statement of its version, or why there is none.
    ///
    /// # Errors
    ///
    /// It is not installed.
    pub(crate) fn version(self) -> Result<String> {
        Ok(match self {
            Self::Edged | Self::EdgedProxy | Self::EdgedNode => first_line(Command::new(edged()?).arg("--version"))?,
            Self::HaproxyCopy | Self::HaproxySplice | Self::HaproxyPipes | Self::HaproxyProxy | Self::HaproxyNode => {
                first_line(Command::new("haproxy").arg("-v")).context(INSTALL)?
            }
            Self::Nginx | Self::NginxProxy => {
                ensure!(
                    Path::new(NGINX_STREAM).exists(),
                    "{INSTALL}: there is no {NGINX_STREAM}"
                );
                first_line(Command::new("nginx").arg("-v")).context(INSTALL)?
            }
            Self::Tokio => "tokio copy_bidirectional, current-thread runtime per core".into(),
            Self::Direct => "no balancer".into(),
        })
    }

    /// How a user starts it, in the foreground.
    fn command(self) -> Result<Command> {
        let file = |name: &str, text: &str| -> Result<String> {
            let path = format!("{FOLDER}/{name}");
            fs::write(&path, text).with_context(|| format!("cannot write {path}"))?;
            Ok(path)
        };
        let haproxy = |file: &str| {
            let mut command = Command::new("haproxy");
            // Master and worker, as Debian's unit has it (-Ws), without its talk to systemd.
            command.args(["-W", "-db", "-f", file]);
            command
        };
        Ok(match self {
            Self::Edged => {
                let config = file("edged.toml", include_str!("../../../../peers/edged.toml"))?;
                let mut command = Command::new(edged()?);
                command.args(["--config", &config, "--state", &format!("{FOLDER}/edged-state")]);
                command
            }
            Self::HaproxyCopy => haproxy(&file(
                "haproxy-copy.cfg",
                include_str!("../../../../peers/haproxy-copy.cfg"),
            )?),
            Self::HaproxyPipes => haproxy(&file(
                "haproxy-pipes.cfg",
                include_str!("../../../../peers/haproxy-pipes.cfg"),
            )?),
            Self::HaproxySplice => haproxy(&file(
                "haproxy-splice.cfg",
                include_str!("../../../../peers/haproxy-splice.cfg"),
            )?),
            Self::Nginx => {
                let config = file("nginx-stream.conf", include_str!("../../../../peers/nginx-stream.conf"))?;
                let mut command = Command::new("nginx");
                command.args(["-p", FOLDER, "-e", "stderr", "-c", &config]);
                command
            }
            Self::EdgedProxy => {
                let config = file("edged-proxy.toml", include_str!("../../../../peers/edged-proxy.toml"))?;
                let mut command = Command::new(edged()?);
                command.args(["--config", &config, "--state", &format!("{FOLDER}/edged-proxy-state")]);
                command
            }
            Self::HaproxyProxy => haproxy(&file(
                "haproxy-proxy.cfg",
                include_str!("../../../../peers/haproxy-proxy.cfg"),
            )?),
            Self::NginxProxy => {
                let config = file("nginx-proxy.conf", include_str!("../../../../peers/nginx-proxy.conf"))?;
                let mut command = Command::new("nginx");
                command.args(["-p", FOLDER, "-e", "stderr", "-c", &config]);
                command
            }
            Self::EdgedNode => {
                let mut command = Command::new(edged()?);
                command.args([
                    "--node",
                    "--backends",
                    &BACKENDS.map(|backend| backend.to_string()).join(","),
                ]);
                command
            }
            Self::HaproxyNode => {
                let config = file("haproxy-node.cfg", include_str!("../../../../peers/haproxy-node.cfg"))?;
                let mut command = Command::new("haproxy");
                // Without a master, which would be a second process: cheaper, and nothing is reloaded.
                command.args(["-db", "-f", &config]);
                command
            }
            Self::Tokio => {
                let mut command = Command::new(env::current_exe().context("cannot find this program's own file")?);
                command.arg("lb-peer-tokio").arg(self.target().to_string());
                command.args(BACKENDS.map(|backend| backend.to_string()));
                command
            }
            Self::Direct => bail!("direct has no process"),
        })
    }
}

const INSTALL: &str = "a peer is missing; scripts/bench.sh installs it (Debian: haproxy, nginx, libnginx-mod-stream)";

fn edged() -> Result<PathBuf> {
    let folder = match env::var_os("EDGED_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => env::current_exe()?
            .parent()
            .context("this program has no folder")?
            .to_owned(),
    };
    let edged = folder.join("edged");
    ensure!(
        edged.is_file(),
        "there is no {}; build it with cargo build --release --workspace, or set EDGED_BIN_DIR to its folder",
        edged.display()
    );
    Ok(edged)
}

fn first_line(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    // nginx says it on stderr.
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().next().unwrap_or("version unknown");
    Ok(line
        .trim_start_matches("nginx version: ")
        .split(" - https")
        .next()
        .unwrap_or(line)
        .trim()
        .to_owned())
}

/// A process with a log, started by this benchmark; stopped with all its descendants when dropped.
pub(crate) struct Running {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Running {
    /// Starts `peer` and waits until it accepts.
    pub(crate) fn peer(peer: Peer) -> Result<Self> {
        let mut running = Self::start(peer.name(), peer.command()?)?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(peer.target()).is_err() {
            running.check_alive()?;
            ensure!(
                Instant::now() < deadline,
                "{} accepts nothing on {} after 10 s\n{}",
                peer.name(),
                peer.target(),
                running.log()
            );
            sleep(Duration::from_millis(20));
        }
        Ok(running)
    }

    /// Starts `bench lb-backend` on all of [`BACKENDS`] and waits until it accepts.
    pub(crate) fn backend() -> Result<Self> {
        let mut command = Command::new(env::current_exe().context("cannot find this program's own file")?);
        command
            .arg("lb-backend")
            .args(BACKENDS.map(|backend| backend.ip().to_string()));
        let mut running = Self::start("backend", command)?;
        while !BACKENDS.iter().all(|backend| TcpStream::connect(backend).is_ok()) {
            running.check_alive()?;
            sleep(Duration::from_millis(20));
        }
        Ok(running)
    }

    fn start(name: &str, mut command: Command) -> Result<Self> {
        let log = Path::new(FOLDER).join(format!("{name}.log"));
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        // SAFETY: the closure makes one prctl call: no allocation, no lock.
        unsafe { command.pre_exec(sandbox::die_with_parent) };
        let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
        })
    }

    /// The process whose descendants are all of it.
    pub(crate) fn pid(&self) -> i32 {
        Pid::from_child(&self.child).as_raw_nonzero().get()
    }

    fn check_alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait().context("cannot wait for a child")? {
            bail!("{} ended ({status}) instead of serving\n{}", self.name, self.log());
        }
        Ok(())
    }

    /// The end of what it said.
    pub(crate) fn log(&self) -> String {
        let mut text = String::new();
        match File::open(&self.log).and_then(|mut file| file.read_to_string(&mut text)) {
            Err(error) => format!("(its log cannot be read: {error})"),
            Ok(0) => "(it said nothing)".into(),
            Ok(_) => {
                let lines: Vec<&str> = text.lines().collect();
                lines[lines.len().saturating_sub(20)..].join("\n")
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Listed before the end: afterwards nothing tells whose descendants they were.
        let pids = procs::tree(self.pid()).unwrap_or_default();
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let deadline = Instant::now() + Duration::from_secs(3);
        while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
            sleep(Duration::from_millis(10));
        }
        for pid in pids {
            // In a process namespace of its own and with a dozen processes, a number is not used again within 3 s.
            if let Some(pid) = Pid::from_raw(pid) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        let _ = self.child.wait();
    }
}
