//! How long to wait before a worker is started again.

use std::time::Duration;

/// A worker that ends sooner than this after its start has ended quickly.
const QUICK: Duration = Duration::from_secs(1);
/// Quick ends in a row that cost nothing.
const FREE: u32 = 5;
const FIRST: Duration = Duration::from_millis(100);
const MOST: Duration = Duration::from_secs(5);

/// The quick ends in a row. One alone is an accident, and clients are waiting in the backlog; many are a fault that
/// will not go away, and starting it a hundred times a second helps nobody.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    quick: u32,
}

impl Backoff {
    /// The wait after a worker that lived for `lived`. `killed`: it had been ready, and somebody else's SIGKILL ended
    /// it, which says nothing against the worker.
    pub(super) fn after(&mut self, lived: Duration, killed: bool) -> Duration {
        if killed {
            return Duration::ZERO;
        }
        self.quick = if lived < QUICK { self.quick.saturating_add(1) } else { 0 };
        match self.quick.checked_sub(FREE) {
            None | Some(0) => Duration::ZERO,
            Some(more) => FIRST.saturating_mul(1 << (more - 1).min(16)).min(MOST),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_killed_from_outside_is_back_at_once_every_time() {
        let mut backoff = Backoff::default();
        for _ in 0..50 {
            assert_eq!(backoff.after(Duration::from_millis(30), true), Duration::ZERO);
        }
    }

    #[test]
    fn the_wait_grows_only_after_five_quick_ends_in_a_row() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..13)
            .map(|_| backoff.after(Duration::from_millis(20), false).as_millis())
            .collect();
        assert_eq!(waits, [0, 0, 0, 0, 0, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(backoff.after(Duration::from_secs(2), false), Duration::ZERO);
        assert_eq!(backoff.after(Duration::from_millis(20), false), Duration::ZERO);
    }
}
