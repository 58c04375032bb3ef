//! The balancers under test: how each is started as its users start it, and stopped.

use std::{
    env,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::Path,
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    running::{Running, edged, file, first_line},
    sandbox::FOLDER,
    tally::Named,
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

impl Named for Peer {
    fn name(self) -> &'static str {
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
}

const INSTALL: &str = "a peer is missing; scripts/bench.sh installs it (Debian: haproxy, nginx, libnginx-mod-stream)";

/// Starts `peer` and waits until it accepts.
pub(crate) fn start(peer: Peer) -> Result<Running> {
    let mut running = Running::start(peer.name(), peer.command()?)?;
    running.wait_until(|| TcpStream::connect(peer.target()).is_ok())?;
    Ok(running)
}

/// Starts `bench lb-backend` on all of [`BACKENDS`] and waits until it accepts.
pub(crate) fn start_backend() -> Result<Running> {
    let mut command = Command::new(env::current_exe().context("cannot find this program's own file")?);
    command
        .arg("lb-backend")
        .args(BACKENDS.map(|backend| backend.ip().to_string()));
    let mut running = Running::start("backend", command)?;
    running.wait_until(|| BACKENDS.iter().all(|backend| TcpStream::connect(backend).is_ok()))?;
    Ok(running)
}
