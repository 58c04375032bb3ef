//! Another program for everything that runs, while it runs: the supervisor first, under its own process id, then each
//! worker.
//!
//! ```text
//! edgectl upgrade -> candidate: check, probe                                          nothing touched   candidate.rs
//!                 -> no questions, keepers let go, store closed -> state -> exec      back by itself    carried.rs, exec.rs
//!   new program   -> state, configuration, store, keepers adopt                       execs back        adopt.rs
//!                 -> each worker: successor beside it -> it takes over                the old one stays keeper/successor.rs
//! ```
//! No step has an effect that the one before cannot take back. Workers notice nothing of the first three: their channels,
//! and what is in them, wait.

mod adopt;
mod candidate;
mod carried;
mod exec;

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fs::OpenOptions,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::{sync::OwnedMutexGuard, time::timeout};

pub use self::{
    adopt::take_over,
    candidate::{PROBE, answer_probe},
    exec::ARGUMENT,
};
use self::{
    candidate::Candidate,
    carried::{Carried, ms_of, now_ms, raw},
};
use super::{House, could_not, keeper::Running, lock, name, opening, tun::Tuns};
use crate::{
    api::{Author, Refusal, Upgrade, UpgradeState},
    build,
    worker::Role,
};

/// For the answer to whoever asked to leave this process.
const ANSWER: Duration = Duration::from_millis(20);
/// For what is under way to end.
const PATIENCE: Duration = Duration::from_secs(5);

/// An upgrade that is to be done.
pub(super) struct Ordered {
    candidate: Candidate,
    began: Instant,
    /// Whether there is a store.
    store: bool,
    _one_at_a_time: OwnedMutexGuard<()>,
}

impl House {
    /// Finds out whether `binary` can take over; [`House::go`] then has it do so.
    pub(super) async fn consider(
        self: &Arc<Self>,
        binary: PathBuf,
        dry_run: bool,
        author: &Author,
    ) -> Result<(Upgrade, Option<Ordered>), Refusal> {
        let began = Instant::now();
        let guard = Arc::clone(&self.upgrading).try_lock_owned().map_err(|_| {
            could_not("an upgrade is under way already, so this one was not begun; see how far it is: edgectl status")
        })?;
        let author = name(author);
        let shown = binary.display().to_string();
        tracing::info!(author, binary = shown, dry_run, "upgrade asked for");
        let refused = |message: String| {
            tracing::error!(author, binary = shown, "upgrade refused; everything goes on");
            crate::log::error_lines(&message);
            Refusal {
                message,
                bad_request: true,
            }
        };
        let (loaded, held, tuns) = {
            let now = lock(&self.now);
            (now.loaded.clone(), now.opened.sockets(), now.opened.tuns())
        };
        let (path, text) = (binary.clone(), loaded.text.clone());
        let checked = tokio::task::spawn_blocking(move || Candidate::check(&path, &text)).await;
        let candidate = checked
            .map_err(|error| could_not(error.to_string()))?
            .map_err(refused)?;
        // What the next supervisor will do first; files may have gone since.
        opening::open(&loaded, self.threads, &held, &tuns).map_err(|message| {
            refused(format!(
                "the running configuration cannot be opened any more, so nothing was changed:\n{message}"
            ))
        })?;
        for (role, keeper) in lock(&self.workers).iter() {
            if !keeper.runs() {
                return Err(could_not(format!(
                    "worker {role} does not run, so there is nothing to hand over and nothing was changed; see why: edgectl status"
                )));
            }
        }
        let mut upgrade = Upgrade {
            number: lock(&self.upgrade).as_ref().map_or(0, |last| last.number) + 1,
            state: UpgradeState::Checked,
            at: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            author,
            binary: shown,
            from: build::own(),
            to: candidate.build.clone(),
            step: "checked".into(),
            message: None,
            took_ms: since(began),
        };
        if dry_run {
            return Ok((upgrade, None));
        }
        upgrade.state = UpgradeState::Running;
        *lock(&self.upgrade) = Some(upgrade.clone());
        let ordered = Ordered {
            candidate,
            began,
            store: self.vault.is_open(),
            _one_at_a_time: guard,
        };
        Ok((upgrade, Some(ordered)))
    }

    /// Has the program that was found good take this one's place. Returns only if that fails, and then all goes on.
    pub(super) async fn go(self: Arc<Self>, ordered: Ordered) {
        // Its answer must be out before its connection ends with this program.
        tokio::time::sleep(ANSWER).await;
        self.step("taking over");
        self.notify.reloading();
        self.notify
            .status(&format!("upgrading to edged {}", ordered.candidate.build));
        // What connects from here on waits for the next one to accept.
        self.control.pause();
        let Err(why) = self.leave(&ordered).await;
        if let Err(error) = self.control.serve(&self.ops) {
            tracing::error!(%error, "the control socket cannot be served any more; restart edged: systemctl restart edged");
        }
        self.upgraded(
            ordered.began,
            Err(format!(
                "the new program could not be started: {why}; nothing was changed"
            )),
        );
    }

    /// Everything quiet, everything carried over, exec.
    async fn leave(self: &Arc<Self>, ordered: &Ordered) -> Result<Infallible, String> {
        let busy = |_| "what is under way does not end; try again when edgectl status answers quickly".to_owned();
        let _no_questions = timeout(PATIENCE, self.gate.write()).await.map_err(busy)?;
        let _no_changes = timeout(PATIENCE, self.change.lock()).await.map_err(busy)?;
        let mut released = BTreeMap::new();
        let keepers = lock(&self.workers).clone();
        let mut result = Ok(());
        for (role, keeper) in keepers {
            match keeper.release().await {
                Ok(running) => drop(released.insert(role, running)),
                Err(why) => {
                    result = Err(format!("worker {role} cannot be taken over now: {why}"));
                    break;
                }
            }
        }
        if result.is_ok() {
            result = self
                .vault
                .close("edged is being upgraded; try again in a few seconds", PATIENCE)
                .await;
        }
        let why = match result {
            Ok(()) => match self.exec(ordered, &released) {
                Err(error) => error.to_string(),
            },
            Err(why) => why,
        };
        if ordered.store && !self.vault.is_open() {
            self.vault.reopen(&self.options.state);
        }
        self.keep_again(released).await;
        Err(why)
    }

    /// Writes down what there is, and runs the new program on it.
    fn exec(&self, ordered: &Ordered, released: &BTreeMap<Role, Running>) -> std::io::Result<Infallible> {
        // Also if its file was replaced or removed since.
        let old = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open("/proc/self/exe")
            .map(OwnedFd::from)?;
        let (sockets, tuns) = {
            let now = lock(&self.now);
            (now.opened.sockets(), now.opened.tuns())
        };
        let carried = self.carried(ordered, released, &sockets, &tuns);
        let state = carried.write()?;
        let listeners = sockets.values().flatten().map(|socket| socket.as_fd());
        let queues = tuns
            .values()
            .flat_map(|tun| tun.queues.iter().chain([&tun.memory]))
            .map(|queue| queue.as_fd());
        let workers = released.values().map(|running| running.channel.as_fd());
        let memory = self.state.as_ref().map(|memory| memory.as_fd());
        let kept: Vec<BorrowedFd<'_>> = [state.as_fd(), old.as_fd(), self.lock.as_fd(), self.control.as_fd()]
            .into_iter()
            .chain(memory)
            .chain(listeners)
            .chain(queues)
            .chain(workers)
            .collect();
        let numbers = [raw(&state), raw(&old)];
        Err(exec::exec(
            ordered.candidate.file.as_fd(),
            &numbers,
            &self.environment,
            &kept,
        ))
    }

    fn carried(
        &self,
        ordered: &Ordered,
        released: &BTreeMap<Role, Running>,
        sockets: &opening::Sockets,
        tuns: &Tuns,
    ) -> Carried {
        let now = lock(&self.now);
        Carried {
            format: carried::FORMAT,
            config_file: self.options.config.clone(),
            state_directory: self.options.state.clone(),
            started_ms: ms_of(self.started),
            threads: self.threads,
            lock: raw(&self.lock),
            control: raw(&self.control.as_fd()),
            control_path: self.control.path().to_owned(),
            // Closed by now, if it was open.
            store: ordered.store,
            memory: self.state.as_ref().map(|memory| raw(&memory.as_fd())),
            listeners: sockets
                .iter()
                .map(|(place, copies)| (*place, copies.iter().map(|copy| raw(&copy.as_fd())).collect()))
                .collect(),
            tuns: tuns
                .iter()
                .map(|(name, tun)| carried::Tun {
                    name: name.clone(),
                    queues: tun.queues.iter().map(|queue| raw(&queue.as_fd())).collect(),
                    offloads: tun.offloads,
                    routes: tun.routes.clone(),
                    memory: raw(&tun.memory.as_fd()),
                })
                .collect(),
            workers: released
                .iter()
                .map(|(role, running)| carried::Worker {
                    role: *role,
                    pid: running.pid,
                    channel: raw(&running.channel),
                    build: running.build.clone(),
                    pings: running.pings,
                    next: running.next,
                    since_ms: ms_of(running.since),
                    restarts: running.restarts,
                    last_end: running.last_end.clone(),
                    owed: running.owed.clone(),
                })
                .collect(),
            config: carried::Config {
                text: now.loaded.text.clone(),
                origin: now.loaded.origin.clone(),
                revision: now.revision,
                confirmed: now.confirmed.clone(),
                reverts_ms: now.reverts.map(ms_of),
                generation: now.generation,
                last_error: now.last_error.clone(),
            },
            upgrade: lock(&self.upgrade).clone().unwrap_or_else(|| Upgrade {
                number: 1,
                state: UpgradeState::Running,
                at: String::new(),
                author: String::new(),
                binary: ordered.candidate.path.display().to_string(),
                from: build::own(),
                to: ordered.candidate.build.clone(),
                step: String::new(),
                message: None,
                took_ms: 0,
            }),
            began_ms: now_ms().saturating_sub(since(ordered.began)),
        }
    }

    /// Goes on with workers that were let go for nothing.
    async fn keep_again(self: &Arc<Self>, released: BTreeMap<Role, Running>) {
        let opened = Arc::clone(&lock(&self.now).opened);
        let kept = self.vault.kept().await;
        for (role, running) in released {
            let Some(spec) = opened.spec(role) else { continue };
            let pid = running.pid;
            if let Err(error) = self.adopt_worker(role, spec.clone(), running, kept.clone()) {
                tracing::error!(%role, %error, "the worker cannot be looked after any more and is started anew");
                if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
                    // A child that nobody has waited for: the number is still its own.
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
                drop(self.start_worker(role, spec.clone()).await);
            }
        }
    }

    /// Has every worker run this program. `came_back`: the new program gave up and this is the old one, which all run.
    async fn finish_upgrade(self: Arc<Self>, began: Instant, came_back: Option<String>) {
        let _one_at_a_time = self.upgrading.lock().await;
        let _no_changes = self.change.lock().await;
        if let Some(why) = came_back {
            let message = format!("the new program gave up: {why}\nthe old one goes on; nothing was changed");
            return self.upgraded(began, Err(message));
        }
        let own = build::own();
        let (mut faults, mut notes) = (Vec::new(), Vec::new());
        for role in Role::ALL {
            let Some(keeper) = lock(&self.workers).get(&role).cloned() else {
                continue;
            };
            self.step(&format!("handing {role} over"));
            let Err(why) = keeper.replace().await else { continue };
            let runs = keeper.build().unwrap_or_default();
            if runs == own || !keeper.runs() {
                // It ended meanwhile, by itself, and is started again as always.
                tracing::warn!(%role, why, "the worker was not handed over but started anew");
                notes.push(format!(
                    "worker {role} was not handed over but started anew, so its sessions were lost: {why}"
                ));
                continue;
            }
            faults.push(format!(
                "worker {role} was not handed over: {why}\nthe old one, {runs}, goes on, and nothing of it was touched"
            ));
        }
        let result = if faults.is_empty() {
            Ok((!notes.is_empty()).then(|| notes.join("\n")))
        } else {
            faults.extend(notes);
            Err(format!(
                "{}\nthe supervisor is {own}; see the lines of both in the log: journalctl -u edged; then try again: edgectl upgrade BINARY",
                faults.join("\n")
            ))
        };
        self.upgraded(began, result);
    }

    fn step(&self, step: &str) {
        if let Some(upgrade) = lock(&self.upgrade).as_mut() {
            step.clone_into(&mut upgrade.step);
        }
    }

    /// The end of an upgrade, told to all, with what is to be known of it.
    fn upgraded(&self, began: Instant, result: Result<Option<String>, String>) {
        if let Some(upgrade) = lock(&self.upgrade).as_mut() {
            upgrade.took_ms = since(began);
            (upgrade.state, upgrade.message) = match result {
                Ok(note) => {
                    tracing::info!(author = upgrade.author, build = %upgrade.to, took_ms = upgrade.took_ms, "upgraded");
                    (UpgradeState::Done, note)
                }
                Err(message) => {
                    tracing::error!(author = upgrade.author, build = %upgrade.to, "upgrade failed");
                    crate::log::error_lines(&message);
                    (UpgradeState::Failed, Some(message))
                }
            };
        }
        self.notify.ready();
        self.tell_status();
    }
}

fn since(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX)
}
