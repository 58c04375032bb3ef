//! A worker: the same binary under another name, which gives up its rights and then runs one service.
//!
//! ```text
//! exec -> sandbox -> Start (configuration, descriptors) -> Ready -> { Ping/Pong, Ask/Answer, Reload, Commit }* -> Stop
//! ```
//! Its standard input is the channel to the supervisor; nothing else is open but standard output and error.

mod dns64;
mod lb;
pub mod message;
mod nat64;
mod web;

use std::{
    fmt,
    os::fd::{AsFd, OwnedFd},
    process::ExitCode,
    str::FromStr,
    sync::Arc,
};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use self::message::{FromWorker, Service, Start, ToWorker};
use crate::{
    build,
    channel::{self, Channel},
    config,
    endpoint::Endpoint,
    log, sandbox,
};

/// The internal first argument that makes `edged` a worker.
pub const ARGUMENT: &str = "--worker";

/// What a worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The balancer.
    Lb,
    /// The resolver and the zones of nodes.
    Dns64,
    /// The translator of packets.
    Nat64,
    /// The metrics page.
    Web,
}

impl Role {
    /// All of them, in the order in which they are started.
    pub const ALL: [Self; 4] = [Self::Lb, Self::Dns64, Self::Nat64, Self::Web];

    /// As in `ps`, status and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lb => "lb",
            Self::Dns64 => "dns64",
            Self::Nat64 => "nat64",
            Self::Web => "web",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = ();
    fn from_str(name: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|role| role.name() == name).ok_or(())
    }
}

/// Runs the worker to its end. `role` is the argument after [`ARGUMENT`].
pub fn main(role: Option<&str>) -> ExitCode {
    let Some(role) = role.and_then(|name| name.parse::<Role>().ok()) else {
        eprintln!(
            "edged: {ARGUMENT} is how edged starts its own workers; to start the appliance: systemctl start edged"
        );
        return ExitCode::from(2);
    };
    match prepare(role).and_then(|(runtime, channel)| runtime.block_on(run(role, channel))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Started late, so that also what happened before the configuration came can be told.
            log::start(role.name(), &config::Log::default());
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Everything that takes rights, up to giving them up.
fn prepare(role: Role) -> anyhow::Result<(tokio::runtime::Runtime, OwnedFd)> {
    abort_on_panic(role.name());
    ignore_signals();
    // While there is a filesystem to read it from.
    let _ = build::own();
    // A descriptor above the standard ones: what is standard may be replaced by libraries.
    let channel = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("standard input is closed")?;
    let supervisor =
        channel::maker(&channel).context("standard input is no channel; only edged itself starts workers")?;
    if let Ok(null) = std::fs::File::open("/dev/null") {
        let _ = rustix::stdio::dup2_stdin(null);
    }
    if let Ok(name) = std::ffi::CString::new(format!("edged-{role}")) {
        let _ = rustix::thread::set_name(&name);
    }
    // Before the sandbox, because it makes a socket pair for signals.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("no runtime")?;
    let entered = sandbox::enter(role, supervisor)?;
    if entered.landlock == sandbox::Landlock::Missing {
        log::start(role.name(), &config::Log::default());
        tracing::warn!(
            "this kernel has no Landlock: only seccomp keeps this worker from files; use Linux 6.12 or later"
        );
    }
    Ok((runtime, channel))
}

/// Receives the service and runs it.
async fn run(role: Role, channel: OwnedFd) -> anyhow::Result<()> {
    let channel = Arc::new(Channel::new(channel, channel::MAX_DESCRIPTORS).context("the channel cannot be polled")?);
    let Some((message, descriptors)) = channel.receive::<ToWorker>().await? else {
        return Ok(());
    };
    let ToWorker::Start(start) = message else {
        bail!("the supervisor's first message is not Start")
    };
    let loaded = load(&start.service.text)?;
    log::start(role.name(), &loaded.config.log);
    log::change(&loaded.config.log);
    let (said, says) = mpsc::channel(64);
    let writer = tokio::spawn(write(Arc::clone(&channel), says));
    let ended = match role {
        Role::Lb => lb::run(*start, loaded.config.lb, descriptors, channel, said).await,
        Role::Dns64 => match loaded.config.dns64 {
            Some(config) => dns64::run(*start, config, descriptors, channel, said).await,
            None => Err(anyhow::anyhow!("the configuration has no [dns64] section")),
        },
        Role::Nat64 => match loaded.config.nat64 {
            Some(config) => nat64::run(*start, config, descriptors, channel, said).await,
            None => Err(anyhow::anyhow!("the configuration has no [nat64] section")),
        },
        Role::Web => web::run(*start, descriptors, channel, said).await,
    };
    // The last answers go out before the process ends.
    let _ = tokio::time::timeout(std::time::Duration::from_millis(200), writer).await;
    ended
}

/// The only sender on the channel, so that packets of two messages never mix. Ends when nobody can say anything more.
async fn write(channel: Arc<Channel>, mut says: mpsc::Receiver<FromWorker>) {
    while let Some(message) = says.recv().await {
        if let Err(error) = channel.send(&message, &[]).await {
            // Its own fault; the supervisor would otherwise wait for an answer that never comes.
            tracing::error!(%error, "a message to the supervisor could not be sent");
        }
    }
}

/// The supervisor has checked the text already; this is the same code in the same binary.
fn load(text: &str) -> anyhow::Result<config::Loaded> {
    config::load(text, "the configuration").map_err(|faulty| anyhow::anyhow!("{faulty}"))
}

/// A message and its descriptors, the end, or what makes no sense.
type Heard = Result<Option<(ToWorker, Vec<OwnedFd>)>, channel::Error>;

/// What the supervisor says, whole messages only; after an error or its end nothing more.
fn hear(channel: Arc<Channel>) -> mpsc::Receiver<Heard> {
    let (heard, hears) = mpsc::channel(16);
    // A task of its own, because a receive must not be cancelled half way.
    tokio::spawn(async move {
        loop {
            let received = channel.receive::<ToWorker>().await;
            let last = !matches!(received, Ok(Some(_)));
            if heard.send(received).await.is_err() || last {
                return;
            }
        }
    });
    hears
}

/// Gives the service a command and, when it answers, the supervisor the answer. Without an answer none is given: the
/// supervisor draws its own conclusions from silence.
async fn ask<C, T: Send + 'static>(
    commands: &mpsc::Sender<C>,
    command: impl FnOnce(oneshot::Sender<T>) -> C,
    said: mpsc::Sender<FromWorker>,
    answer: impl FnOnce(T) -> FromWorker + Send + 'static,
) {
    let (reply, replied) = oneshot::channel();
    let _ = commands.send(command(reply)).await;
    tokio::spawn(async move {
        if let Ok(value) = replied.await {
            let _ = said.send(answer(value)).await;
        }
    });
}

/// What came for one place, in the order of the list.
type Sockets = Vec<(Endpoint, Vec<OwnedFd>)>;

/// Deals `descriptors` out to the places of `service`; whatever `before` is first goes to the caller.
fn deal(service: &Service, descriptors: Vec<OwnedFd>, before: usize) -> anyhow::Result<(Vec<OwnedFd>, Sockets)> {
    let wanted = before
        + service
            .listeners
            .iter()
            .map(|(_, copies)| usize::from(*copies))
            .sum::<usize>();
    if descriptors.len() != wanted {
        bail!("the supervisor passed {} descriptors for {wanted}", descriptors.len());
    }
    let mut descriptors = descriptors.into_iter();
    let first = descriptors.by_ref().take(before).collect();
    let listeners = service
        .listeners
        .iter()
        .map(|(address, copies)| (*address, descriptors.by_ref().take(usize::from(*copies)).collect()));
    Ok((first, listeners.collect()))
}

/// A panic ends the process: half a service is worse than one that is started again.
pub(crate) fn abort_on_panic(role: &'static str) {
    std::panic::set_hook(Box::new(move |info| {
        log::start(role, &config::Log::default());
        tracing::error!("{info}; the process ends and is started again; please report this line");
        std::process::abort();
    }));
}

/// The service manager and the terminal signal every process of the unit; the supervisor alone decides, and tells.
fn ignore_signals() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGUSR1, libc::SIGUSR2] {
        // SAFETY: ignoring a signal runs no handler, and there is one thread.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}
