//! The data threads as the rest of the service sees them: an inbox each, and whether they make progress.

use std::{
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use rustix::event::{EventfdFlags, eventfd};
use tokio::sync::mpsc;

use super::{
    frontend::Frontend,
    handover::{Freeze, Moved},
    reactor::Reactor,
};
use crate::{moment::Moment, pool::BackendId};

/// A thread that has not turned for this long has hung.
const PULSE: Duration = Duration::from_secs(4);

/// What a data thread is told.
pub(crate) enum Order {
    /// Accept on this socket for this frontend.
    Listen(Arc<Frontend>, OwnedFd),
    /// Connections to this address belong to this frontend from now on.
    Assign(SocketAddr, Arc<Frontend>),
    /// Close the sockets of a listener address that is no longer wanted.
    Unlisten(SocketAddr),
    /// Sessions of a backend that went down.
    Reset(String, BackendId),
    /// Close quiet sessions of a backend that has more than its share; all threads together as many as the counter
    /// says.
    Shed(Arc<Frontend>, BackendId, Arc<AtomicU32>),
    /// Sessions that a predecessor has handed over; the answer says whether all could be taken in.
    Adopt(Vec<Moved>, mpsc::UnboundedSender<bool>),
    /// Stand still and hand every session over.
    Freeze(Freeze),
    /// Accept no more; end when the last session has, or at the moment given.
    Stop(Moment),
}

/// The way to each data thread.
pub(crate) struct Threads {
    boxes: Vec<Inbox>,
    alive: AtomicUsize,
    /// They take orders and touch no connection: a predecessor may still serve.
    held: AtomicBool,
}

struct Inbox {
    orders: Mutex<Vec<Order>>,
    bell: OnceLock<OwnedFd>,
    /// Milliseconds since boot of the thread's last turn.
    pulse: AtomicU64,
}

impl Threads {
    pub(crate) fn new(count: u16) -> std::io::Result<Arc<Self>> {
        let boxes = (0..count)
            .map(|_| {
                let bell = OnceLock::new();
                let _ = bell.set(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
                Ok(Inbox {
                    orders: Mutex::default(),
                    bell,
                    pulse: AtomicU64::new(0),
                })
            })
            .collect::<std::io::Result<Vec<_>>>()?;
        Ok(Arc::new(Self {
            alive: AtomicUsize::new(boxes.len()),
            held: AtomicBool::new(false),
            boxes,
        }))
    }

    pub(crate) fn count(&self) -> u16 {
        u16::try_from(self.boxes.len()).unwrap_or(u16::MAX)
    }

    pub(crate) fn tell(&self, thread: usize, order: Order) {
        let Some(inbox) = self.boxes.get(thread) else { return };
        inbox.orders.lock().unwrap_or_else(PoisonError::into_inner).push(order);
        if let Some(bell) = inbox.bell.get() {
            // A full counter means the bell is ringing already.
            let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
        }
    }

    pub(crate) fn tell_all(&self, order: impl Fn() -> Order) {
        for thread in 0..self.boxes.len() {
            self.tell(thread, order());
        }
    }

    pub(crate) fn reset_sessions(&self, frontend: &str, id: BackendId) {
        self.tell_all(|| Order::Reset(frontend.to_owned(), id));
    }

    /// What thread `index` has been told since it last asked.
    pub(crate) fn orders(&self, index: usize) -> Vec<Order> {
        let inbox = &self.boxes[index];
        if let Some(bell) = inbox.bell.get() {
            let mut count = [0u8; 8];
            let _ = rustix::io::read(bell, &mut count);
        }
        std::mem::take(&mut *inbox.orders.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What rings when thread `index` is told something.
    pub(crate) fn bell(&self, index: usize) -> Option<&OwnedFd> {
        self.boxes.get(index)?.bell.get()
    }

    /// Thread `index` makes progress.
    pub(crate) fn beat(&self, index: usize, now: Moment) {
        self.boxes[index].pulse.store(millis(now), Relaxed);
    }

    /// Has threads that start from now on wait for [`Threads::release`] before they touch a connection.
    pub(crate) fn hold(&self) {
        self.held.store(true, Relaxed);
    }

    /// Everything is theirs.
    pub(crate) fn release(&self) {
        self.held.store(false, Relaxed);
        for inbox in &self.boxes {
            if let Some(bell) = inbox.bell.get() {
                let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
            }
        }
    }

    pub(crate) fn are_held(&self) -> bool {
        self.held.load(Relaxed)
    }

    /// Every thread has turned lately.
    pub(crate) fn healthy(&self, now: Moment) -> bool {
        self.boxes
            .iter()
            .all(|inbox| now - Moment::new(Duration::from_millis(inbox.pulse.load(Relaxed))) < PULSE)
    }

    /// Threads that have not ended.
    pub(crate) fn alive(&self) -> usize {
        self.alive.load(Relaxed)
    }
}

/// Starts the data threads.
pub(crate) fn start(threads: &Arc<Threads>) -> std::io::Result<()> {
    for index in 0..threads.boxes.len() {
        let threads = threads.clone();
        let reactor = Reactor::new(threads.clone(), index)?;
        std::thread::Builder::new()
            .name(format!("lb-{index}"))
            .stack_size(512 * 1024)
            .spawn(move || {
                reactor.run();
                threads.alive.fetch_sub(1, Relaxed);
            })?;
    }
    Ok(())
}

pub(crate) fn millis(moment: Moment) -> u64 {
    u64::try_from(moment.since_boot().as_millis()).unwrap_or(u64::MAX)
}
