//! The pure modules' only clock: an argument.

use std::{
    ops::{Add, Sub},
    time::Duration,
};

use serde::{Deserialize, Serialize};

/// A reading of CLOCK_MONOTONIC. It never goes back, and it means the same in every process of this boot, so that
/// it can be written down by one worker and understood by the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Moment(Duration);

impl Moment {
    /// The moment `since_boot` after the clock's zero.
    pub const fn new(since_boot: Duration) -> Self {
        Self(since_boot)
    }

    /// Time since the clock's zero.
    pub const fn since_boot(self) -> Duration {
        self.0
    }

    /// Whole seconds since the clock's zero.
    pub const fn as_secs(self) -> u64 {
        self.0.as_secs()
    }
}

impl Add<Duration> for Moment {
    type Output = Self;
    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }
}

/// Zero if `earlier` is later: two threads may read the clock in one order and take a lock in the other.
impl Sub for Moment {
    type Output = Duration;
    fn sub(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}
