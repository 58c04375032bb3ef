//! From nothing to a running house: lock, store, configuration, descriptors, workers, ready.

use std::{
    collections::BTreeMap,
    fs::{DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot};

use super::{
    Control, House, Options, Ready,
    change::Now,
    keeper::{Keeper, Links, Running},
    lock, memory,
    opening::{self, Adopted, Sockets, Spec, adopt, read_config},
    socket,
    tun::Tuns,
    vault::{Kept, Vault},
};
use crate::{
    api::Op,
    build,
    config::{self, Loaded},
    log,
    notify::{self, Environment, Notify},
    worker::Role,
};

/// Why the daemon does not start.
#[derive(Debug)]
pub(super) struct Failure {
    /// Cause, effect, next command.
    pub(super) message: String,
    /// The configuration is at fault: starting again cures nothing.
    pub(super) config: bool,
}

impl Failure {
    /// Something that is not the configuration's fault.
    pub(super) const fn not(message: String) -> Self {
        Self { message, config: false }
    }

    const fn config(message: String) -> Self {
        Self { message, config: true }
    }
}

/// What runs when the boot is done.
pub(super) struct Booted {
    pub(super) house: Arc<House>,
    pub(super) ready: Vec<Ready>,
}

/// The configuration to start with.
struct Chosen {
    loaded: Loaded,
    /// Its number in the store; `None` = not there yet.
    revision: Option<u64>,
    /// Why it is not the confirmed one.
    last_error: Option<String>,
}

/// Starts everything.
pub(super) async fn boot(
    options: &Options,
    environment: Environment,
    descriptors: Vec<(String, OwnedFd)>,
    ops: mpsc::Sender<Op>,
) -> Result<Booted, Failure> {
    let started = Instant::now();
    let notify = Notify::new(&environment);
    raise_descriptor_limit();
    let lock = take_lock(&options.state)?;
    let vault = Arc::new(Vault::open(&options.state));
    let chosen = choose(options, &vault).await?;
    let loaded = chosen.loaded;
    log::start("edged", &loaded.config.log);
    log::change(&loaded.config.log);
    for warning in &loaded.warnings {
        warning.lines().for_each(|line| tracing::warn!("{line}"));
    }
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        build = build::own().build,
        origin = loaded.origin,
        revision = chosen.revision,
        "starting"
    );
    let mut adopted = adopt(descriptors);
    let cores = std::thread::available_parallelism().map_or(1, |cores| u16::try_from(cores.get()).unwrap_or(u16::MAX));
    let threads = lb::threads(&loaded.config.lb, cores);
    let opened = opening::open(&loaded, threads, &adopted.sockets, &Tuns::new()).map_err(Failure::not)?;
    let path = loaded.config.control.socket.value.clone();
    let control = socket::bind(&path).and_then(|control| {
        let control = control.into_std().map(OwnedFd::from);
        control.map_err(|error| {
            (
                format!("the control socket cannot be served: {error}"),
                "start it again".to_owned(),
            )
        })
    });
    let control = control.map_err(|(message, help)| {
        let span = loaded.config.control.socket.span.clone();
        Failure::not(config::render(&loaded.text, &loaded.origin, span, &message, &help))
    })?;
    let state = state_memory(adopted.state.take());
    keep(&notify, &adopted, &opened.sockets(), state.as_deref());
    // What is not needed any more is closed with it.
    drop(adopted);
    let house = Arc::new(House {
        options: options.clone(),
        environment: Arc::new(environment),
        started,
        notify,
        vault,
        workers: Mutex::new(BTreeMap::new()),
        now: Mutex::new(Now {
            revision: chosen.revision.unwrap_or(0),
            confirmed: loaded.text.clone(),
            loaded,
            opened: Arc::new(opened),
            reverts: None,
            generation: 0,
            last_error: chosen.last_error,
        }),
        change: tokio::sync::Mutex::new(()),
        threads,
        ops,
        state,
        lock,
        control: Control::new(control, path),
        gate: tokio::sync::RwLock::default(),
        upgrade: Mutex::default(),
        upgrading: Arc::default(),
    });
    let unserved = |error| Failure::not(format!("the control socket cannot be served: {error}"));
    house.control.serve(&house.ops).map_err(unserved)?;
    let opened = Arc::clone(&super::lock(&house.now).opened);
    let mut ready = Vec::new();
    for role in Role::ALL {
        if let Some(spec) = opened.spec(role) {
            ready.push(house.start_worker(role, spec.clone()).await);
        }
    }
    Ok(Booted { house, ready })
}

/// The runtime's end. A request to the disk that hangs must not keep the process.
pub(super) fn end_runtime(runtime: tokio::runtime::Runtime) {
    runtime.shutdown_timeout(Duration::from_millis(100));
}

/// Waits for the workers, keeps the configuration of a first start, and tells the manager that everything runs.
pub(super) async fn finish(house: Arc<House>, ready: Vec<Ready>) {
    for worker in ready {
        // An error is the end of the keeper, and with it of the daemon.
        let _ = worker.await;
    }
    let _one_at_a_time = house.change.lock().await;
    let (first, text, origin) = {
        let now = lock(&house.now);
        (now.revision == 0, now.loaded.text.clone(), now.loaded.origin.clone())
    };
    if first && house.vault.is_open() {
        match house
            .vault
            .call(move |store| store.confirm_config(&text, "first start", &origin))
            .await
        {
            Ok(revision) => {
                tracing::info!(
                    revision = revision.revision,
                    author = "first start",
                    "configuration confirmed"
                );
                lock(&house.now).revision = revision.revision;
            }
            Err(error) => {
                tracing::error!(
                    error,
                    "the configuration serves but could not be kept: the next start reads the file again"
                );
                lock(&house.now).last_error = Some(format!("the configuration could not be kept: {error}"));
            }
        }
    }
    house.notify.ready();
    house.tell_status();
    tracing::info!(took_ms = house.started.elapsed().as_millis(), "ready");
}

impl House {
    /// Starts a worker and its keeper.
    pub(super) async fn start_worker(&self, role: Role, spec: Spec) -> Ready {
        let (ready, is_ready) = oneshot::channel();
        let kept = if matches!(role, Role::Nat64 | Role::Web) {
            Kept::default()
        } else {
            self.vault.kept().await
        };
        let links = self.links(kept);
        let keeper = Keeper::start(role, spec, links, ready);
        lock(&self.workers).insert(role, keeper);
        is_ready
    }

    /// Goes on with a worker that runs on `spec`, without a keeper so far.
    pub(super) fn adopt_worker(&self, role: Role, spec: Spec, running: Running, kept: Kept) -> io::Result<()> {
        let keeper = Keeper::adopt(role, spec, self.links(kept), running)?;
        lock(&self.workers).insert(role, keeper);
        Ok(())
    }

    fn links(&self, kept: Kept) -> Links {
        Links {
            vault: Arc::clone(&self.vault),
            ops: self.ops.clone(),
            state: self.state.clone(),
            kept,
        }
    }

    /// The line of `systemctl status`.
    pub(super) fn tell_status(&self) {
        let now = lock(&self.now);
        let listeners = now.opened.sockets().len();
        let state = match (&now.last_error, now.reverts_in()) {
            (Some(_), _) => "; the last configuration was refused: edgectl status".to_owned(),
            (None, Some(seconds)) => format!("; to be confirmed within {seconds} s: edgectl config confirm"),
            (None, None) => String::new(),
        };
        self.notify.status(&format!(
            "serving {listeners} listeners, configuration {}{state}",
            now.number()
        ));
    }
}

/// The confirmed configuration, or the file where there is none.
async fn choose(options: &Options, vault: &Vault) -> Result<Chosen, Failure> {
    let origin = options.config.display().to_string();
    let file = read_config(&options.config);
    let (confirmed, store_error) = if vault.is_open() {
        match vault.call(|store| store.confirmed()).await {
            Ok(confirmed) => (confirmed, None),
            Err(error) => (None, Some(error)),
        }
    } else {
        (
            None,
            Some("the store could not be opened; see the log: journalctl -u edged".to_owned()),
        )
    };
    let mut last_error = store_error.map(|error| format!("the confirmed configuration is not known: {error}"));
    if let Some(confirmed) = confirmed {
        let same = file.as_ref().is_ok_and(|file| *file == confirmed.text);
        let name = if same {
            origin.clone()
        } else {
            format!("configuration {}", confirmed.revision)
        };
        match config::load(&confirmed.text, &name) {
            Ok(loaded) => {
                if !same {
                    tell_difference(&origin, confirmed.revision, &file);
                }
                return Ok(Chosen {
                    loaded,
                    revision: Some(confirmed.revision),
                    last_error,
                });
            }
            Err(faulty) if same => return Err(Failure::config(faulty.to_string())),
            Err(faulty) => {
                log::error_lines(&faulty.to_string());
                tracing::error!(
                    revision = confirmed.revision,
                    file = origin,
                    "this release cannot read the confirmed configuration; the file is tried"
                );
                last_error = Some(format!(
                    "the confirmed configuration {} cannot be read by this release",
                    confirmed.revision
                ));
            }
        }
    }
    let text = file.map_err(Failure::config)?;
    let loaded = config::load(&text, &origin).map_err(|faulty| Failure::config(faulty.to_string()))?;
    Ok(Chosen {
        loaded,
        revision: None,
        last_error,
    })
}

fn tell_difference(origin: &str, revision: u64, file: &Result<String, String>) {
    match file {
        Ok(_) => tracing::warn!(
            "{origin} differs from the confirmed configuration {revision}, which serves; \
             see how: edgectl config diff; put it into effect: edgectl config apply"
        ),
        Err(error) => {
            log::error_lines(error);
            tracing::warn!("the confirmed configuration {revision} serves");
        }
    }
}

/// Only one instance may own a state directory.
fn take_lock(state: &Path) -> Result<File, Failure> {
    let shown = state.display();
    let access = |error: io::Error| {
        Failure::not(format!(
            "the state directory {shown} cannot be used: {error}\n\
             it must belong to the user edged runs as; under systemd: StateDirectory=edged; look at: ls -ld {shown}"
        ))
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(state)
        .map_err(access)?;
    let path = state.join("edged.lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(access)?;
    if rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut owner = String::new();
        let _ = file.read_to_string(&mut owner);
        return Err(Failure::not(format!(
            "edged already runs on {shown}, as process {}; this one ends and changes nothing\n\
             to see it: systemctl status edged; to run a second one, give it its own --state and [control] socket",
            owner.trim()
        )));
    }
    let write = || {
        file.set_len(0)?;
        writeln!(&file, "{}", std::process::id())
    };
    write().map_err(access)?;
    Ok(file)
}

/// Thousands of sessions take two descriptors each.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    );
}

fn state_memory(adopted: Option<OwnedFd>) -> Option<Arc<OwnedFd>> {
    match adopted.map_or_else(memory::create, Ok) {
        Ok(state) => Some(Arc::new(state)),
        Err(error) => {
            tracing::warn!(%error, "no state memory: bans are forgotten when the balancer's worker ends");
            None
        }
    }
}

/// Has the manager keep exactly what is in use.
fn keep(notify: &Notify, adopted: &Adopted, sockets: &Sockets, state: Option<&OwnedFd>) {
    // First of all: a listener with more sockets than threads would lose connections.
    for name in adopted.stale(sockets) {
        notify.remove(&name);
    }
    for (place, copies) in sockets {
        let copies: Vec<_> = copies.iter().map(|copy| copy.as_fd()).collect();
        notify.store(&notify::name_of(*place), &copies);
    }
    if let Some(state) = state {
        notify.store(notify::STATE, &[state.as_fd()]);
    }
}
