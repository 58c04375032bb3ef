//! The store on a thread of its own: a slow disk delays who waits for it, and nobody else.

use std::{
    collections::BTreeSet,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::mpsc::{SyncSender, TrySendError, sync_channel},
};

use lb::io::Drain;
use tokio::sync::oneshot;

use crate::{
    log,
    store::{RedbStore, Store, StoreError},
};

/// Requests that may wait for the disk.
const QUEUE: usize = 64;
/// The name of the thread, by which the panic hook knows it.
pub(super) const THREAD: &str = "store";

type Job = Box<dyn FnOnce(&dyn Store) + Send>;

/// The way to the store; without one every request is refused with the reason.
pub(super) struct Vault {
    jobs: Result<SyncSender<Job>, String>,
}

impl Vault {
    /// Opens the store of `dir`. One that cannot be opened is told in the log and by every later refusal, but keeps
    /// nothing from being served.
    pub(super) fn open(dir: &Path) -> Self {
        let store = RedbStore::open(dir).map_err(|error| log::chain(&error));
        let jobs = store.and_then(|store| {
            let (jobs, work) = sync_channel::<Job>(QUEUE);
            // A request that panics is refused, by dropping its way back; the next one is served.
            let one = move |job: Job| drop(catch_unwind(AssertUnwindSafe(|| job(&store))));
            let work = move || work.into_iter().for_each(one);
            let thread = std::thread::Builder::new().name(THREAD.into()).spawn(work);
            thread
                .map(|_| jobs)
                .map_err(|error| format!("the store's thread could not be started: {error}"))
        });
        if let Err(reason) = &jobs {
            log::error_lines(reason);
            tracing::error!(
                "serving goes on from the configuration file; drains and confirmed configurations are not known, and no change is kept"
            );
        }
        Self { jobs }
    }

    /// Whether there is a store.
    pub(super) fn is_open(&self) -> bool {
        self.jobs.is_ok()
    }

    /// Runs `work` on the store's thread and waits for it there.
    pub(super) async fn call<T, F>(&self, work: F) -> Result<T, String>
    where
        T: Send + 'static,
        F: FnOnce(&dyn Store) -> Result<T, StoreError> + Send + 'static,
    {
        let (reply, replied) = oneshot::channel();
        let job: Job = Box::new(move |store| drop(reply.send(work(store))));
        let jobs = self
            .jobs
            .as_ref()
            .map_err(|reason| format!("the store is not available: {reason}"))?;
        jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => {
                format!("{QUEUE} changes wait for the disk already; look for its trouble: dmesg | tail")
            }
            TrySendError::Disconnected(_) => {
                "the store's thread has ended; restart edged: systemctl restart edged".to_owned()
            }
        })?;
        let result = replied
            .await
            .map_err(|_| "the store failed while it was asked; see the log: journalctl -u edged".to_owned())?;
        result.map_err(|error| log::chain(&error))
    }

    /// The drains in effect; none, with a word in the log, if they cannot be read.
    pub(super) async fn drains(&self) -> BTreeSet<Drain> {
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
