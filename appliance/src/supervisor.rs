//! The supervisor: one process without any input from the network, which opens everything, starts the workers, and
//! answers on the control socket.
//!
//! ```text
//! main loop   signals, questions, watchdog; never waits for anything else
//!   change    one configuration at a time: load -> open -> workers -> store -> in effect   (change.rs, opening.rs)
//!   keepers   one per worker: start, talk, heartbeat, start again                            (keeper.rs)
//!   vault     the store, on a thread of its own                                              (vault.rs)
//!   upgrade   another program in the place of this one, and then of each worker              (upgrade.rs)
//! ```

mod boot;
mod change;
mod keeper;
mod memory;
mod netlink;
mod opening;
mod socket;
mod tun;
mod upgrade;
mod vault;

use std::{
    collections::BTreeMap,
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use dns64::nat64::status as nat64;
use tokio::{
    net::UnixListener,
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

pub use self::upgrade::{ARGUMENT, PROBE, answer_probe, take_over};
use self::{
    boot::{Booted, Failure},
    change::{Now, Origin},
    keeper::Keeper,
    vault::Vault,
};
use crate::{
    api::{Answer, Ask, Author, ConfigStatus, ConfigText, Op, Refusal, Status, Upgrade},
    build, config, control, log, metrics,
    notify::{Environment, Notify},
    signals::{Signals, Told},
    worker::{
        Role,
        message::{Question, Reply},
    },
};

/// How long sessions may go on when the daemon stops. Watches never end by themselves, and connections that come
/// meanwhile wait until the next start: short is kind.
const GRACE: Duration = Duration::from_secs(1);
/// For the balancer to say how it is.
const STATUS: Duration = Duration::from_secs(2);
/// Least time between two looks at the watchdog, whatever the manager wants.
const WATCHDOG: Duration = Duration::from_millis(10);

/// How `edged` was started.
#[derive(Clone, Debug)]
pub struct Options {
    /// The configuration file.
    pub config: PathBuf,
    /// Where the store and the lock are.
    pub state: PathBuf,
}

/// Everything that the tasks of the supervisor share.
struct House {
    options: Options,
    /// What the manager passed, for a program that takes this one's place.
    environment: Arc<Environment>,
    started: Instant,
    notify: Notify,
    vault: Arc<Vault>,
    workers: Mutex<BTreeMap<Role, Keeper>>,
    now: Mutex<Now>,
    /// Held while a configuration is put into effect: one at a time.
    change: tokio::sync::Mutex<()>,
    /// Threads of the balancer, as they were at start.
    threads: u16,
    ops: mpsc::Sender<Op>,
    state: Option<Arc<OwnedFd>>,
    /// Keeps a second instance out.
    lock: File,
    control: Control,
    /// Held for reading while a question is answered.
    gate: tokio::sync::RwLock<()>,
    /// The upgrade under way, or the last one.
    upgrade: Mutex<Option<Upgrade>>,
    /// Held while one is under way.
    upgrading: Arc<tokio::sync::Mutex<()>>,
}

/// The control socket, which is served in a task that can be stopped without closing it.
struct Control {
    listener: OwnedFd,
    path: PathBuf,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Control {
    const fn new(listener: OwnedFd, path: PathBuf) -> Self {
        Self {
            listener,
            path,
            task: Mutex::new(None),
        }
    }

    /// Accepts from now on.
    fn serve(&self, ops: &mpsc::Sender<Op>) -> std::io::Result<()> {
        let listener = std::os::unix::net::UnixListener::from(self.listener.try_clone()?);
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        *lock(&self.task) = Some(tokio::spawn(control::serve(listener, ops.clone())));
        Ok(())
    }

    /// Accepts no more; who connects waits. Connections that are there stay.
    fn pause(&self) {
        if let Some(task) = lock(&self.task).take() {
            task.abort();
        }
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// Runs the daemon to its end.
pub fn main(options: Options, environment: Environment) -> ExitCode {
    end_on_panic();
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!(
                "edged: it cannot start: {error}; see the limits of the unit: systemctl show edged -p LimitNOFILE"
            );
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(run(options, environment));
    boot::end_runtime(runtime);
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            log::error_lines(&failure.message);
            ExitCode::from(if failure.config { 2 } else { 1 })
        }
    }
}

/// One thread, the main one: workers and successors of this program depend on it.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// Checks the configuration file as a start would; prints what is wrong, or that nothing is.
pub fn check(options: &Options) -> ExitCode {
    let origin = options.config.display().to_string();
    let checked = opening::read_config(&options.config)
        .and_then(|text| config::load(&text, &origin).map_err(|faulty| faulty.to_string()))
        .and_then(|loaded| Ok((loaded.check_files().map_err(|faulty| faulty.to_string())?, loaded)));
    match checked {
        Ok((more, loaded)) => {
            for warning in loaded
                .warnings
                .iter()
                .cloned()
                .chain(more.iter().map(ToString::to_string))
            {
                eprintln!("{warning}\n");
            }
            println!("{origin}: good");
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("{message}");
            ExitCode::from(2)
        }
    }
}

async fn run(options: Options, mut environment: Environment) -> Result<(), Failure> {
    let signals = Signals::new().map_err(|error| Failure::not(format!("signals cannot be received: {error}")))?;
    let (ops, asked) = mpsc::channel(64);
    let descriptors = std::mem::take(&mut environment.descriptors);
    let Booted { house, ready } = boot::boot(&options, environment, descriptors, ops).await?;
    let first = tokio::spawn(boot::finish(Arc::clone(&house), ready));
    serve(house, asked, signals, first).await;
    Ok(())
}

/// The main loop, up to the end of the daemon. `first` is what is still to be done after the start.
async fn serve(house: Arc<House>, mut asked: mpsc::Receiver<Op>, mut signals: Signals, mut first: JoinHandle<()>) {
    let mut starting = true;
    let mut watchdog = tokio::time::interval(
        house
            .notify
            .watchdog()
            .map_or(Duration::from_secs(3600), |limit| (limit / 2).max(WATCHDOG)),
    );
    watchdog.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            Some(op) = asked.recv() => drop(tokio::spawn(answer(Arc::clone(&house), op))),
            _ = watchdog.tick() => if house.notify.watchdog().is_some() { house.notify.alive() },
            _ = &mut first, if starting => starting = false,
            why = signals.next() => match why {
                Told::Reload => drop(tokio::spawn(Arc::clone(&house).reload_file())),
                Told::Stop(name) => {
                    stop(&house, name, &mut signals).await;
                    return socket::remove(house.control.path());
                }
            },
        }
    }
}

/// Ends the workers; a second signal ends them now.
async fn stop(house: &Arc<House>, signal: &'static str, signals: &mut Signals) {
    tracing::info!(signal, "stopping");
    house.notify.stopping();
    let keepers: Vec<_> = lock(&house.workers).values().cloned().collect();
    let all = async {
        let stops: Vec<_> = keepers
            .into_iter()
            .map(|keeper| tokio::spawn(async move { keeper.stop(GRACE).await }))
            .collect();
        for stop in stops {
            let _ = stop.await;
        }
    };
    let mut all = std::pin::pin!(all);
    loop {
        tokio::select! {
            () = all.as_mut() => break,
            // Workers die with the supervisor.
            why = signals.next() => if let Told::Stop(_) = why { break },
        }
    }
    tracing::info!("stopped");
}

/// Does one thing that was asked, and answers.
async fn answer(house: Arc<House>, op: Op) {
    let Op { ask, author, reply } = op;
    // Who asked may have gone.
    if let Ask::Upgrade { binary, dry_run } = ask {
        let (result, ordered) = match house.consider(binary, dry_run, &author).await {
            Ok((upgrade, ordered)) => (Ok(Answer::Upgrade(Box::new(upgrade))), ordered),
            Err(refusal) => (Err(refusal), None),
        };
        let _ = reply.send(result);
        if let Some(ordered) = ordered {
            house.go(ordered).await;
        }
        return;
    }
    let _asking = house.gate.read().await;
    let result = house.answer(ask, &author).await;
    let _ = reply.send(result);
}

impl House {
    async fn answer(self: &Arc<Self>, ask: Ask, author: &Author) -> Result<Answer, Refusal> {
        match ask {
            Ask::Status => Ok(Answer::Status(Box::new(self.status().await))),
            Ask::Metrics => Ok(Answer::Metrics {
                text: metrics::render(&self.status().await),
            }),
            Ask::Lb { request } => {
                let changes = matches!(
                    request,
                    lb::status::Request::Drain { .. } | lb::status::Request::Undrain { .. }
                );
                if changes {
                    tracing::info!(author = name(author), ?request, "asked for");
                }
                // A balancer that is being handed over would keep it in one place and forget it in the other.
                let _one_at_a_time = if changes { Some(self.change.lock().await) } else { None };
                let keeper = lock(&self.workers).get(&Role::Lb).cloned();
                let reply = match keeper {
                    Some(keeper) => keeper.ask(Question::Lb(request)).await,
                    None => None,
                };
                match reply {
                    Some(Reply::Lb(answer)) => Ok(Answer::Lb(answer)),
                    _ => Err(could_not(
                        "the balancer does not answer: its worker is being started again; try again, or see edgectl status",
                    )),
                }
            }
            Ask::Dns { request } => self
                .dns(request, author)
                .await
                .map(|answer| Answer::Dns(Box::new(answer))),
            Ask::Nat64 { request } => {
                let keeper = lock(&self.workers).get(&Role::Nat64).cloned();
                let reply = match keeper {
                    Some(keeper) => keeper.ask(Question::Nat64(request)).await,
                    None => {
                        let message = "there is no translator: the configuration has no [nat64] section";
                        return Err(bad_request(message));
                    }
                };
                match reply {
                    Some(Reply::Nat64(answer)) => Ok(Answer::Nat64(answer)),
                    _ => Err(could_not(
                        "the translator does not answer: its worker is being started again; try again, or see edgectl status",
                    )),
                }
            }
            Ask::ConfigShow => {
                let now = lock(&self.now);
                Ok(Answer::Config(ConfigText {
                    revision: now.number(),
                    text: now.loaded.text.clone(),
                }))
            }
            Ask::ConfigHistory => {
                let running = lock(&self.now).number();
                let mut revisions = self.vault.call(|store| store.history()).await.map_err(could_not)?;
                for revision in &mut revisions {
                    revision.running = revision.revision == running;
                }
                Ok(Answer::History { revisions })
            }
            Ask::ConfigApply {
                text,
                origin,
                confirm_seconds,
            } => {
                let origin = Origin {
                    author: name(author),
                    origin,
                };
                self.apply(text, origin, confirm_seconds.map(Duration::from_secs))
                    .await
                    .map(Answer::Applied)
            }
            Ask::ConfigConfirm => self.confirm(&name(author)).await.map(Answer::Applied),
            Ask::Upgrade { .. } => Err(could_not("an upgrade is no question")),
            Ask::ConfigRollback { revision } => self.roll_back(revision, name(author)).await.map(Answer::Applied),
        }
    }

    async fn status(&self) -> Status {
        let keepers = lock(&self.workers).clone();
        let ask = async |role, question| {
            let keeper = keepers.get(&role)?;
            tokio::time::timeout(STATUS, keeper.ask(question)).await.ok()?
        };
        let (lb, dns, nat64) = tokio::join!(
            ask(Role::Lb, Question::Lb(lb::status::Request::Status)),
            ask(Role::Dns64, Question::Dns64(dns64::status::Request::Status)),
            ask(Role::Nat64, Question::Nat64(nat64::Request::Status)),
        );
        let lb = lb.and_then(|reply| match reply {
            Reply::Lb(answer) => match *answer {
                lb::status::Answer::Status(status) => Some(status),
                _ => None,
            },
            _ => None,
        });
        let dns = dns.and_then(|reply| match reply {
            Reply::Dns64(answer) => match *answer {
                dns64::status::Answer::Status(status) => Some(*status),
                _ => None,
            },
            _ => None,
        });
        let nat64 = nat64.and_then(|reply| match reply {
            Reply::Nat64(answer) => match *answer {
                nat64::Answer::Status(status) => Some(*status),
                nat64::Answer::Sessions { .. } => None,
            },
            _ => None,
        });
        let file = opening::read_config(&self.options.config).ok();
        let own = build::own();
        let upgrade = lock(&self.upgrade).clone();
        let now = lock(&self.now);
        Status {
            version: own.version,
            build: own.build,
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            config: ConfigStatus {
                revision: now.number(),
                reverts_in_seconds: now.reverts_in(),
                file: self.options.config.display().to_string(),
                file_differs: file.map(|file| file != now.loaded.text),
                last_error: now.last_error.clone(),
            },
            workers: keepers.iter().map(|(role, keeper)| keeper.status(*role)).collect(),
            lb,
            dns,
            nat64,
            upgrade,
        }
    }

    /// Asks the resolver.
    async fn dns(&self, request: dns64::status::Request, author: &Author) -> Result<dns64::status::Answer, Refusal> {
        let changes = request.changes();
        if changes {
            tracing::info!(author = name(author), ?request, "asked for");
        }
        // A resolver that is being replaced would have it in one place and not in the other.
        let _one_at_a_time = if changes { Some(self.change.lock().await) } else { None };
        let Some(keeper) = lock(&self.workers).get(&Role::Dns64).cloned() else {
            return Err(bad_request(
                "there is no resolver: the configuration has no [dns64] section; see docs/configuration.md for one",
            ));
        };
        match keeper.ask(Question::Dns64(request)).await {
            Some(Reply::Dns64(answer)) => Ok(*answer),
            _ => Err(could_not(
                "the resolver does not answer: its worker is being started again; try again, or see edgectl status",
            )),
        }
    }
}

/// Who asked, for the history and the log.
fn name(author: &Author) -> String {
    author.user.clone().unwrap_or_else(|| format!("uid {}", author.uid))
}

fn could_not(message: impl Into<String>) -> Refusal {
    Refusal {
        message: message.into(),
        bad_request: false,
    }
}

fn bad_request(message: impl Into<String>) -> Refusal {
    Refusal {
        message: message.into(),
        bad_request: true,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A panic here is a fault of ours; the manager starts the daemon again, and the sockets wait in its store. The store's
/// thread is spared: what it was doing is refused, and everything else goes on.
fn end_on_panic() {
    std::panic::set_hook(Box::new(|info| {
        tracing::error!("{info}; please report this line");
        if std::thread::current().name() != Some(vault::THREAD) {
            std::process::abort();
        }
    }));
}

/// Told when a worker runs for the first time.
type Ready = oneshot::Receiver<()>;
