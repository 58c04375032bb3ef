//! How many ICMP errors are sent (RFC 4443 §2.4 f, RFC 1812 §4.3.2.8): a token bucket that all threads share.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A bucket of [`Limit::BURST`] errors that fills at [`Limit::RATE`] a second.
///
/// Kept as the moment at which it would be full again, so that one word is all of it.
#[derive(Debug, Default)]
pub struct Limit(AtomicU64);

impl Limit {
    /// Errors per second, in the long run. A traceroute of everybody at once, or the path MTU of a thousand flows, is told.
    pub const RATE: u64 = 1000;
    /// Errors at once.
    pub const BURST: u64 = 200;
    /// Microseconds that one error takes.
    const EACH: u64 = 1_000_000 / Self::RATE;

    /// Takes one error from the bucket at `now`, microseconds of a clock that does not go back; `false` if it is empty.
    pub fn take(&self, now: u64) -> bool {
        let taken = self.0.fetch_update(Relaxed, Relaxed, |full| {
            let full = full.max(now) + Self::EACH;
            (full - now <= Self::BURST * Self::EACH).then_some(full)
        });
        taken.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_told_and_then_the_rate_is_kept() {
        let limit = Limit::default();
        let start = 5_000_000;
        let at_once = (0..10_000).filter(|_| limit.take(start)).count() as u64;
        assert_eq!(at_once, Limit::BURST);
        // A thousand tries in each millisecond of the next second.
        let later = (1..=1000).map(|ms| (0..1000).filter(|_| limit.take(start + ms * 1000)).count() as u64);
        assert_eq!(later.sum::<u64>(), Limit::RATE);
    }

    #[test]
    fn after_a_pause_there_is_one_burst_and_no_more() {
        let limit = Limit::default();
        assert!(limit.take(1));
        let hour = 3_600_000_000;
        assert_eq!((0..10_000).filter(|_| limit.take(hour)).count() as u64, Limit::BURST);
    }
}
