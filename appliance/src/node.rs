//! `edged --node`: the balancer on a cluster node, as one small process without a supervisor.
//!
//! ```text
//! kubelet -> 127.0.0.1:16443 or [::1]:16443 -> the API servers of --backends and --backends-file
//! ```
//! The file is read again when it changes. What it says last and well is kept over a bad or missing file and over a
//! restart; what `--backends` says is never forgotten: what the file leaves out of it stays as a backup.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use lb::{
    Config, What,
    config::{Active, Address, At, Backend, CheckKind, Frontend, Kind, Span},
    io::{Command, Links, Opened},
    status::{Answer, Request, State, Status},
};
use tokio::sync::{mpsc, oneshot};

use crate::{
    notify::{Environment, Notify},
    signals::{Signals, Told},
    worker::abort_on_panic,
};

/// Where kubelet and the rest of the node find the API.
pub const PORT: u16 = 16443;
/// How often the file is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Between two active checks: with a hundred nodes, an API server sees ten a second.
const CHECK: Duration = Duration::from_secs(10);
/// For running sessions when the process is stopped.
const GRACE: Duration = Duration::from_secs(1);
/// For the balancer to answer; with the next look, less than the unit's watchdog waits.
const ANSWER: Duration = Duration::from_secs(2);
/// Largest file of backends.
const MOST: u64 = 64 << 10;

/// The arguments of node mode.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Node mode")]
pub struct Options {
    /// Balance the API servers for this node alone, on 127.0.0.1:16443 and [::1]:16443; no configuration file, no root
    #[arg(long, conflicts_with_all = ["config", "state", "check"])]
    pub node: bool,
    /// The API servers to begin with, never forgotten: HOST:PORT,...
    #[arg(
        long,
        requires = "node",
        value_delimiter = ',',
        value_name = "HOST:PORT",
        required_if_eq("node", "true")
    )]
    pub backends: Vec<Address>,
    /// The API servers, a HOST:PORT on each line; read again when it changes
    #[arg(long, requires = "node", value_name = "FILE")]
    pub backends_file: Option<PathBuf>,
    /// The cluster's CA; with it, each API server is asked for /readyz as well
    #[arg(long, requires = "node", value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
    /// Answer GET /healthz here: 200 while --health says so, else 503
    #[arg(long, requires = "node", value_name = "ADDRESS")]
    pub healthz: Option<SocketAddr>,
    /// Whose health /healthz tells: any API server's, that of the one on this machine, or of the one named
    #[arg(long, requires = "node", value_name = "any|local|HOST:PORT", default_value = "any")]
    pub health: Health,
}

/// Whose health counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Health {
    /// One healthy API server is enough.
    #[default]
    Any,
    /// The one with an address of this machine.
    Local,
    /// This one.
    Of(Address),
}

impl std::str::FromStr for Health {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "any" => Ok(Self::Any),
            "local" => Ok(Self::Local),
            other => other.parse().map(Self::Of),
        }
    }
}

/// The list in effect.
#[derive(Clone, Debug, PartialEq, Eq)]
struct List {
    /// From the file, or the seeds where there is none.
    first: Vec<Address>,
    /// Seeds that the file does not have.
    spare: Vec<Address>,
}

impl List {
    fn new(file: Option<Vec<Address>>, seeds: &[Address]) -> Self {
        let first = file.unwrap_or_else(|| seeds.to_vec());
        let spare = seeds.iter().filter(|seed| !first.contains(seed)).cloned().collect();
        Self { first, spare }
    }

    fn backends(&self) -> Vec<At<Backend>> {
        let of = |address: &Address, backup| {
            At::unwritten(Backend {
                address: address.clone(),
                weight: 1,
                backup,
            })
        };
        let first = self.first.iter().map(|address| of(address, false));
        first
            .chain(self.spare.iter().map(|address| of(address, true)))
            .collect()
    }
}

/// Runs node mode to its end.
pub fn main(options: Options, environment: Environment) -> ExitCode {
    abort_on_panic("edged");
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("edged: it cannot start: {error}; see the limits of the unit");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(options, &environment)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            crate::log::error_lines(&error);
            ExitCode::FAILURE
        }
    }
}

async fn run(options: Options, environment: &Environment) -> Result<(), String> {
    let notify = Notify::new(environment);
    let mut signals = Signals::new().map_err(|error| format!("signals cannot be received: {error}"))?;
    let mut source = Source::new(&options);
    let list = source.begin();
    let ca = read_ca(options.ca_file.as_deref())?;
    let config = balancer(&options, &list);
    let opened = open(&config, &ca)?;
    let (commands, to_balancer) = mpsc::channel(8);
    // Drains are made on an edge, not here: nobody asks for a commit.
    let (commits, _from_balancer) = mpsc::channel(1);
    let links = Links {
        commands: to_balancer,
        commits,
    };
    tracing::info!(version = env!("CARGO_PKG_VERSION"), backends = %list, "balancing on 127.0.0.1:{PORT} and [::1]:{PORT}");
    let mut serving = tokio::spawn(lb::io::run(config, opened, Vec::new(), None, 1, links, None));
    let mut running = list;
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut told = String::new();
    let mut ready = false;
    loop {
        tokio::select! {
            ended = &mut serving => return ended_by(ended),
            _ = look.tick() => {}
            why = signals.next() => match why {
                Told::Reload => source.seen = None,
                Told::Stop(_) => {
                    notify.stopping();
                    let _ = commands.send(Command::Stop { grace: GRACE }).await;
                    return ended_by(serving.await);
                }
            },
        }
        if let Some(list) = source.look().filter(|list| *list != running) {
            let config = Box::new(balancer(&options, &list));
            let (done, result) = oneshot::channel();
            let opened = Opened {
                files: ca.clone(),
                ..surroundings()
            };
            let reload = Command::Reload { config, opened, done };
            match tell(&commands, reload, result).await {
                Some(Ok(())) => {
                    tracing::info!(backends = %list, "another list of API servers");
                    running = list;
                }
                Some(Err(error)) => tracing::error!("the new list is not in effect, the last one serves on: {error}"),
                None => {
                    tracing::error!("the balancer does not answer: the new list is tried again");
                    source.seen = None;
                }
            }
        }
        let (reply, result) = oneshot::channel();
        let ask = Command::Ask {
            request: Request::Status,
            reply,
        };
        let Some(Answer::Status(status)) = tell(&commands, ask, result).await else {
            continue;
        };
        if !ready {
            ready = true;
            notify.ready();
            // On a node, memory is what the workload pays for.
            if let Err(error) = crate::code::give_back() {
                tracing::debug!(%error, "the code of the start stays in memory");
            }
        }
        let (pong, alive) = oneshot::channel();
        if notify.watchdog().is_some() && tell(&commands, Command::Ping(pong), alive).await.is_some() {
            notify.alive();
        }
        let line = summary(&status);
        if line != told {
            notify.status(&line);
            told = line;
        }
    }
}

/// The balancer's end, which is this process's.
fn ended_by(ended: Result<Result<(), lb::io::Error>, tokio::task::JoinError>) -> Result<(), String> {
    match ended {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(format!(
            "the balancer has ended: {error}\nnothing is balanced on this node; see the lines above"
        )),
        Err(error) => Err(format!("the balancer has ended: {error}; please report this line")),
    }
}

/// Gives the balancer a command and time to answer it; `None` if it does not. A machine that was paused or has no
/// processor to spare makes it late, and that is no reason to end.
async fn tell<T>(commands: &mpsc::Sender<Command>, command: Command, answer: oneshot::Receiver<T>) -> Option<T> {
    let asked = async {
        commands.send(command).await.ok()?;
        answer.await.ok()
    };
    tokio::time::timeout(ANSWER, asked).await.ok()?
}

/// The line of `systemctl status`.
fn summary(status: &Status) -> String {
    let mut line = String::new();
    for frontend in &status.frontends {
        let up = frontend.backends.iter().filter(|b| b.state == State::Healthy).count();
        let _ = write!(line, "{up} of {} API servers healthy", frontend.backends.len());
        for out in frontend.backends.iter().filter(|b| b.state != State::Healthy) {
            let _ = write!(line, "; {}: {}", out.backend, out.reason);
        }
    }
    line
}

impl std::fmt::Display for List {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<_> = self.first.iter().map(ToString::to_string).collect();
        f.write_str(&names.join(","))?;
        if !self.spare.is_empty() {
            let names: Vec<_> = self.spare.iter().map(ToString::to_string).collect();
            write!(f, " (else {})", names.join(","))?;
        }
        Ok(())
    }
}

fn balancer(options: &Options, list: &List) -> Config {
    let mut api = Frontend::bare("api");
    api.kind = Kind::Api;
    api.listen = [
        SocketAddr::from((Ipv4Addr::LOCALHOST, PORT)),
        SocketAddr::from((Ipv6Addr::LOCALHOST, PORT)),
    ]
    .map(At::unwritten)
    .into();
    api.backends = At::unwritten(list.backends());
    api.health.active = options.ca_file.as_ref().map(|file| {
        At::unwritten(Active {
            ca_file: Some(At::unwritten(file.clone())),
            interval: Some(At::unwritten(Span(CHECK))),
            ..Active::new(CheckKind::Https)
        })
    });
    Config {
        health: options.healthz.map(At::unwritten).into_iter().collect(),
        health_backend: judge(&options.health, list).map(At::unwritten),
        threads: Some(At::unwritten(1)),
        frontend: vec![At::unwritten(api)],
        ..Config::default()
    }
}

/// The backend that /healthz follows; `None` = any.
fn judge(health: &Health, list: &List) -> Option<Address> {
    match health {
        Health::Any => None,
        Health::Of(address) => Some(address.clone()),
        Health::Local => {
            let local = list.first.iter().chain(&list.spare).find(|address| match address {
                // Only an address of this machine can be bound.
                Address::Ip(address) => UdpSocket::bind((address.ip(), 0)).is_ok(),
                Address::Name { .. } => false,
            });
            if local.is_none() {
                tracing::warn!("no API server of the list has an address of this machine: /healthz tells of any");
            }
            local.cloned()
        }
    }
}

fn read_ca(path: Option<&Path>) -> Result<BTreeMap<PathBuf, Vec<u8>>, String> {
    let Some(path) = path else {
        return Ok(BTreeMap::new());
    };
    let content = std::fs::read(path).map_err(|error| {
        format!(
            "--ca-file {}: {error}\nwithout it no API server can be asked for /readyz; on a kubeadm node it is /etc/kubernetes/pki/ca.crt",
            path.display()
        )
    })?;
    lb::io::check_file(&content).map_err(|error| format!("--ca-file {} {error}", path.display()))?;
    Ok([(path.to_owned(), content)].into())
}

fn surroundings() -> Opened {
    Opened {
        resolv_conf: std::fs::read("/etc/resolv.conf").unwrap_or_default(),
        hosts: std::fs::read("/etc/hosts").unwrap_or_default(),
        ..Opened::default()
    }
}

/// Opens what [`lb::needs`] names. A loopback family that the machine lacks is done without, the other one is not.
fn open(config: &Config, ca: &BTreeMap<PathBuf, Vec<u8>>) -> Result<Opened, String> {
    let mut opened = Opened {
        files: ca.clone(),
        ..surroundings()
    };
    for need in lb::needs(config, 1) {
        let What::Listener { address, .. } = need.what else {
            continue;
        };
        // The balancer's own sockets share their port with those of a successor; a second node mode is none.
        let alone = std::net::TcpListener::bind(address).map(drop);
        let socket = alone
            .and_then(|()| lb::io::socket::listener(address))
            .map_err(|error| {
                let hint = match error.kind() {
                    io::ErrorKind::AddrInUse => format!("see who has it: ss -ltnp 'sport = :{}'", address.port()),
                    _ => "see the addresses of this machine: ip address".into(),
                };
                format!("{address} cannot be listened on: {error}\nnothing is balanced on this node; {hint}")
            })?;
        opened.listeners.push((address, vec![socket]));
    }
    Ok(opened)
}

/// Where the list comes from.
struct Source {
    seeds: Vec<Address>,
    file: Option<PathBuf>,
    /// The last good list of the file is kept here.
    kept: Option<PathBuf>,
    /// What the file looked like when it was read last.
    seen: Option<Look>,
    /// The last good list.
    good: Option<Vec<Address>>,
}

/// Enough of a file to see that it is another one.
#[derive(PartialEq, Eq)]
struct Look(Result<(u64, u64, i64, i64), io::ErrorKind>);

impl Look {
    fn at(path: &Path) -> Self {
        use std::os::unix::fs::MetadataExt;
        let look = std::fs::metadata(path).map(|file| (file.ino(), file.size(), file.mtime(), file.mtime_nsec()));
        Self(look.map_err(|error| error.kind()))
    }
}

impl Source {
    fn new(options: &Options) -> Self {
        let state = std::env::var("STATE_DIRECTORY").ok();
        let state = state
            .as_deref()
            .and_then(|all| all.split(':').next())
            .filter(|s| !s.is_empty());
        Self {
            seeds: options.backends.clone(),
            file: options.backends_file.clone(),
            kept: state.map(|directory| Path::new(directory).join("backends")),
            seen: None,
            good: None,
        }
    }

    /// The list to begin with.
    fn begin(&mut self) -> List {
        if let Some(list) = self.look() {
            return list;
        }
        if let (Some(_), Some(kept)) = (&self.file, &self.kept)
            && let Ok(list) = read(kept)
        {
            tracing::warn!(file = %kept.display(), "the last good list is used");
            self.good = Some(list);
        }
        List::new(self.good.clone(), &self.seeds)
    }

    /// The list, if the file has changed and is good.
    fn look(&mut self) -> Option<List> {
        let Some(file) = &self.file else {
            return self.seen.is_none().then(|| {
                self.seen = Some(Look(Err(io::ErrorKind::NotFound)));
                List::new(None, &self.seeds)
            });
        };
        let seen = Look::at(file);
        if self.seen.as_ref() == Some(&seen) {
            return None;
        }
        self.seen = Some(seen);
        match read(file) {
            Ok(list) => {
                self.keep(&list);
                self.good = Some(list.clone());
                Some(List::new(Some(list), &self.seeds))
            }
            Err(_) if self.seen == Some(Look(Err(io::ErrorKind::NotFound))) => {
                tracing::info!(file = %file.display(), "there is no list of API servers yet");
                None
            }
            Err(error) => {
                tracing::error!("{error}\nthe last good list serves on");
                None
            }
        }
    }

    /// Keeps the list over a restart.
    fn keep(&self, list: &[Address]) {
        let Some(path) = &self.kept else { return };
        let text: String = list.iter().map(|address| format!("{address}\n")).collect();
        let new = path.with_extension("new");
        if let Err(error) = std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, path)) {
            tracing::warn!(%error, file = %path.display(), "the list is not kept over a restart");
        }
    }
}

/// Reads a file of backends.
fn read(path: &Path) -> Result<Vec<Address>, String> {
    use std::io::Read as _;
    let shown = path.display();
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MOST + 1).read_to_string(&mut text))
        .map_err(|error| format!("the list of API servers {shown} cannot be read: {error}"))?;
    if text.len() as u64 > MOST {
        return Err(format!(
            "the list of API servers {shown} is larger than {} KiB",
            MOST >> 10
        ));
    }
    parse(&text).map_err(|(line, error)| match line {
        Some(line) => format!("{shown}:{line}: {error}"),
        None => format!("{shown}: {error}"),
    })
}

/// A `HOST:PORT` on each line; `#` begins a comment. The error has its line, counted from 1.
fn parse(text: &str) -> Result<Vec<Address>, (Option<usize>, String)> {
    let mut list = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let address: Address = line.parse().map_err(|error| (Some(number + 1), error))?;
        if !list.contains(&address) {
            list.push(address);
        }
    }
    if list.is_empty() {
        return Err((None, "it lists no API server; write a HOST:PORT on each line".into()));
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(text: &str) -> Vec<Address> {
        parse(text).expect("a good list")
    }

    #[test]
    fn a_list_is_an_address_on_each_line_with_comments_and_without_doubles() {
        let list = addresses("# control plane\n[fd00::11]:6443\n\n cp2.fleet:6443 # spare\n[fd00::11]:6443\n");
        let shown: Vec<_> = list.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["[fd00::11]:6443", "cp2.fleet:6443"]);
        assert_eq!(parse("[::1]:1\nnot an address\n").expect_err("bad").0, Some(2));
        assert!(parse("# nothing\n").expect_err("empty").1.contains("no API server"));
    }

    #[test]
    fn a_seed_that_the_file_leaves_out_stays_as_a_backup() {
        let seeds = addresses("[fd00::1]:6443\n[fd00::2]:6443");
        let list = List::new(Some(addresses("[fd00::2]:6443\n[fd00::3]:6443")), &seeds);
        let backends: Vec<_> = list
            .backends()
            .iter()
            .map(|at| (at.address.to_string(), at.backup))
            .collect();
        assert_eq!(
            backends,
            [
                ("[fd00::2]:6443".into(), false),
                ("[fd00::3]:6443".into(), false),
                ("[fd00::1]:6443".into(), true),
            ]
        );
    }

    #[test]
    fn a_bad_file_leaves_the_last_good_list_in_effect_also_over_a_restart() {
        let folder = std::env::temp_dir().join(format!("edged-node-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let file = folder.join("list");
        std::fs::write(&file, "[fd00::7]:6443\n").expect("written");
        let source = || Source {
            seeds: addresses("[fd00::1]:6443"),
            file: Some(file.clone()),
            kept: Some(folder.join("backends")),
            seen: None,
            good: None,
        };
        let mut first = source();
        let good = first.begin();
        assert_eq!(good.to_string(), "[fd00::7]:6443 (else [fd00::1]:6443)");
        assert_eq!(first.look(), None, "nothing has changed");
        std::fs::write(&file, "half a li").expect("written");
        assert_eq!(first.look(), None);
        assert_eq!(source().begin(), good, "from the kept copy");
        std::fs::remove_file(&file).expect("removed");
        assert_eq!(source().begin(), good);
        std::fs::remove_file(folder.join("backends")).expect("removed");
        assert_eq!(source().begin().to_string(), "[fd00::1]:6443", "the seeds");
        let _ = std::fs::remove_dir_all(&folder);
    }
}
