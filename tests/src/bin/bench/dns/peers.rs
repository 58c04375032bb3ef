//! The resolvers under test: how each is started as its users start it.

use std::{
    env, fs,
    net::{Ipv6Addr, SocketAddr, UdpSocket},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};

use super::wire::{Asked, SIZE};
use crate::{
    running::{Running, edged, file, first_line},
    sandbox::FOLDER,
    tally::Named,
};

/// Where the upstream listens, as every configuration in tests/peers/ has it.
pub(crate) const UPSTREAM: SocketAddr = here(5300);

const fn here(port: u16) -> SocketAddr {
    SocketAddr::new(std::net::IpAddr::V6(Ipv6Addr::LOCALHOST), port)
}

/// A forwarding, caching DNS64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Peer {
    /// Ours.
    Edged,
    /// Debian's unbound.
    Unbound,
    /// Debian's BIND.
    Bind,
}

impl Named for Peer {
    fn name(self) -> &'static str {
        match self {
            Self::Edged => "edged",
            Self::Unbound => "unbound",
            Self::Bind => "named",
        }
    }
}

impl Peer {
    /// All, in the order of the tables.
    pub(crate) const ALL: [Self; 3] = [Self::Edged, Self::Unbound, Self::Bind];

    /// Where clients ask; the ports are those of the configurations in tests/peers/.
    pub(crate) const fn target(self) -> SocketAddr {
        here(match self {
            Self::Unbound => 5301,
            Self::Bind => 5302,
            Self::Edged => 5303,
        })
    }

    /// Its own statement of its version.
    ///
    /// # Errors
    ///
    /// It is not installed.
    pub(crate) fn version(self) -> Result<String> {
        match self {
            Self::Edged => first_line(Command::new(edged()?).arg("--version")),
            Self::Unbound => {
                let line = first_line(Command::new("unbound").arg("-V")).context(INSTALL)?;
                Ok(format!("unbound {}", line.trim_start_matches("Version ")))
            }
            Self::Bind => {
                let line = first_line(Command::new("named").arg("-v")).context(INSTALL)?;
                Ok(line.split(" (").next().unwrap_or(&line).to_owned())
            }
        }
    }

    /// How a user starts it, in the foreground.
    fn command(self) -> Result<Command> {
        Ok(match self {
            Self::Edged => {
                let config = file("edged-dns.toml", include_str!("../../../../peers/edged-dns.toml"))?;
                let mut command = Command::new(edged()?);
                command.args(["--config", &config, "--state", &format!("{FOLDER}/edged-dns-state")]);
                command
            }
            Self::Unbound => {
                let config = file("unbound.conf", include_str!("../../../../peers/unbound.conf"))?;
                let mut command = Command::new(unconfined("unbound")?);
                // In the foreground, without a PID file.
                command.args(["-d", "-p", "-c", &config]);
                command
            }
            Self::Bind => {
                let config = file("named.conf", include_str!("../../../../peers/named.conf"))?;
                let folder = format!("{FOLDER}/named.d");
                fs::create_dir_all(&folder).with_context(|| format!("cannot create {folder}"))?;
                // named insists on a working directory that its user may write to.
                fs::set_permissions(&folder, fs::Permissions::from_mode(0o1777))?;
                let mut command = Command::new(unconfined("named")?);
                // In the foreground, messages to stderr, two threads, Debian's user.
                command.args(["-g", "-n", "2", "-u", "bind", "-c", &config]);
                command
            }
        })
    }

    /// Whether it answers.
    fn serves(self) -> bool {
        let ask = || -> Result<bool> {
            let socket = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0))?;
            socket.set_read_timeout(Some(Duration::from_millis(200)))?;
            socket.connect(self.target())?;
            let (mut query, mut answer) = ([0; SIZE], [0; SIZE]);
            let length = Asked::A(0).query(1, &mut query);
            socket.send(&query[..length])?;
            let length = socket.recv(&mut answer)?;
            Ok(Asked::A(0).check(1, &answer[..length]).is_ok())
        };
        ask().unwrap_or(false)
    }
}

/// Starts `peer` and waits until it answers.
pub(crate) fn start(peer: Peer) -> Result<Running> {
    let mut running = Running::start(peer.name(), peer.command()?)?;
    running.wait_until(|| peer.serves())?;
    Ok(running)
}

/// Starts `bench dns-upstream` and waits until it answers.
pub(crate) fn start_upstream() -> Result<Running> {
    let mut command = Command::new(env::current_exe().context("cannot find this program's own file")?);
    command.args(["dns-upstream", &UPSTREAM.to_string()]);
    let mut running = Running::start("upstream", command)?;
    running.wait_until(|| super::upstream::queries(UPSTREAM).is_ok())?;
    Ok(running)
}

const INSTALL: &str = "a peer is missing; scripts/bench.sh installs it (Debian: unbound, bind9)";

/// The same program at a path for which Debian has no AppArmor profile: that of /usr/sbin allows no configuration elsewhere
/// than in /etc.
fn unconfined(program: &str) -> Result<String> {
    let folders = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&folders)
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
        .context(INSTALL)?;
    let copy = format!("{FOLDER}/{program}");
    if !Path::new(&copy).exists() {
        fs::copy(&found, &copy).with_context(|| format!("cannot copy {}", found.display()))?;
    }
    Ok(copy)
}
