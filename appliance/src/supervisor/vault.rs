//! The store on a thread of its own: a slow disk delays who waits for it, and nobody else.

use std::{
    collections::BTreeSet,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{
        Mutex, PoisonError,
        mpsc::{SyncSender, TrySendError, sync_channel},
    },
    time::Duration,
};

use dns64::zone::Memory;
use lb::io::Drain;
use tokio::sync::oneshot;

use crate::{
    log,
    store::{RedbStore, Store, StoreError},
    worker::message::Durable,
};

/// Requests that may wait for the disk.
const QUEUE: usize = 64;
/// The name of the thread, by which the panic hook knows it.
pub(super) const THREAD: &str = "store";

/// What workers have had kept, and are started with.
#[derive(Clone, Default)]
pub(super) struct Kept {
    /// Drains in effect.
    pub(super) drains: BTreeSet<Drain>,
    /// What nodes registered, and their keys.
    pub(super) dns64: Memory,
    /// That could not be read, and why: what is written must not take the place of what is there.
    pub(super) unread: Option<String>,
}

impl Kept {
    /// Keeps in mind what has been made durable.
    pub(super) fn keep(&mut self, durable: Durable) {
        match durable {
            Durable::Drain { drain, set: true } => drop(self.drains.insert(drain)),
            Durable::Drain { drain, set: false } => drop(self.drains.remove(&drain)),
            Durable::Dns64(durable) => self.dns64.keep(*durable),
        }
    }
}

type Job = Box<dyn FnOnce(&dyn Store) + Send>;

/// The way to the store; without one every request is refused with the reason.
pub(super) struct Vault {
    jobs: Mutex<Result<Jobs, String>>,
}

/// The thread's work, and its end.
struct Jobs {
    sender: SyncSender<Job>,
    closed: oneshot::Receiver<()>,
}

impl Vault {
    /// Opens the store of `dir`. One that cannot be opened is told in the log and by every later refusal, but keeps
    /// nothing from being served.
    pub(super) fn open(dir: &Path) -> Self {
        let jobs = start(dir);
        if let Err(reason) = &jobs {
            tell(reason);
        }
        Self { jobs: Mutex::new(jobs) }
    }

    /// As [`Vault::open`], but a store that cannot be opened is an error.
    ///
    /// # Errors
    ///
    /// Why not.
    pub(super) fn open_or_fail(dir: &Path) -> Result<Self, String> {
        start(dir).map(|jobs| Self {
            jobs: Mutex::new(Ok(jobs)),
        })
    }

    /// Whether there is a store.
    pub(super) fn is_open(&self) -> bool {
        self.jobs().is_ok()
    }

    /// Closes the store when all before it is done, so that another process can open it; `reason` refuses what comes
    /// meanwhile. A store that is not open stays as it is.
    ///
    /// # Errors
    ///
    /// It did not close within `limit`: the disk hangs. It closes when it can, and everything is refused.
    pub(super) async fn close(&self, reason: &str, limit: Duration) -> Result<(), String> {
        let jobs = {
            let mut jobs = self.jobs();
            if jobs.is_err() {
                return Ok(());
            }
            std::mem::replace(&mut *jobs, Err(reason.to_owned()))
        };
        let Ok(Jobs { sender, closed }) = jobs else {
            return Ok(());
        };
        drop(sender);
        match tokio::time::timeout(limit, closed).await {
            Ok(_) => Ok(()),
            Err(_) => Err(format!(
                "the store does not close within {} s; look for the disk's trouble: dmesg | tail",
                limit.as_secs()
            )),
        }
    }

    /// Opens it again after [`Vault::close`].
    pub(super) fn reopen(&self, dir: &Path) {
        let jobs = start(dir);
        if let Err(reason) = &jobs {
            tell(reason);
        }
        *self.jobs() = jobs;
    }

    fn jobs(&self) -> std::sync::MutexGuard<'_, Result<Jobs, String>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` on the store's thread and waits for it there.
    pub(super) async fn call<T, F>(&self, work: F) -> Result<T, String>
    where
        T: Send + 'static,
        F: FnOnce(&dyn Store) -> Result<T, StoreError> + Send + 'static,
    {
        let (reply, replied) = oneshot::channel();
        let job: Job = Box::new(move |store| drop(reply.send(work(store))));
        let jobs = match &*self.jobs() {
            Ok(jobs) => jobs.sender.clone(),
            Err(reason) => return Err(format!("the store is not available: {reason}")),
        };
        jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => {
                format!("{QUEUE} changes wait for the disk already; look for its trouble: dmesg | tail")
            }
            TrySendError::Disconnected(_) => {
                "the store's thread has ended; restart edged: systemctl restart edged".to_owned()
            }
        })?;
        drop(jobs);
        let result = replied
            .await
            .map_err(|_| "the store failed while it was asked; see the log: journalctl -u edged".to_owned())?;
        result.map_err(|error| log::chain(&error))
    }

    /// What workers have had kept.
    pub(super) async fn kept(&self) -> Kept {
        let (dns64, unread) = match self.dns64().await {
            Ok(memory) => (memory, None),
            Err(error) => (Memory::default(), Some(error)),
        };
        Kept {
            drains: self.drains().await,
            dns64,
            unread,
        }
    }

    /// What nodes registered, or a word in the log and why it cannot be read. Nothing, while there is no store.
    async fn dns64(&self) -> Result<Memory, String> {
        if !self.is_open() {
            return Ok(Memory::default());
        }
        let read = self.call(|store| store.dns64()).await;
        if let Err(error) = &read {
            tracing::error!(
                error,
                "the names of nodes and their keys cannot be read: nodes are unknown, and none can register"
            );
        }
        read
    }

    /// Makes something durable.
    pub(super) async fn keep(&self, durable: Durable) -> Result<(), String> {
        self.call(move |store| match &durable {
            Durable::Drain { drain, set } => store.set_drain(drain, *set),
            Durable::Dns64(durable) => store.keep_dns64(durable),
        })
        .await
    }

    /// The drains in effect; none, with a word in the log, if they cannot be read.
    async fn drains(&self) -> BTreeSet<Drain> {
        if !self.is_open() {
            return BTreeSet::new();
        }
        match self.call(|store| store.drains()).await {
            Ok(drains) => drains.into_iter().collect(),
            Err(error) => {
                tracing::error!(
                    error,
                    "the drains cannot be read: backends that were drained get sessions again"
                );
                BTreeSet::new()
            }
        }
    }
}

fn start(dir: &Path) -> Result<Jobs, String> {
    let store = RedbStore::open(dir).map_err(|error| log::chain(&error))?;
    let (sender, work) = sync_channel::<Job>(QUEUE);
    let (done, closed) = oneshot::channel();
    let work = move || {
        for job in work {
            // A request that panics is refused, by dropping its way back; the next one is served.
            drop(catch_unwind(AssertUnwindSafe(|| job(&store))));
        }
        drop(store);
        let _ = done.send(());
    };
    let thread = std::thread::Builder::new().name(THREAD.into()).spawn(work);
    thread
        .map(|_| Jobs { sender, closed })
        .map_err(|error| format!("the store's thread could not be started: {error}"))
}

fn tell(reason: &str) {
    log::error_lines(reason);
    tracing::error!(
        "serving goes on from the configuration file; drains and confirmed configurations are not known, and no change is kept"
    );
}
