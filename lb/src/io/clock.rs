//! The only place that reads clocks.

use std::time::{Duration, SystemTime};

use rustix::time::{ClockId, clock_gettime};

use crate::moment::Moment;

/// CLOCK_MONOTONIC now.
pub(crate) fn now() -> Moment {
    let time = clock_gettime(ClockId::Monotonic);
    // CLOCK_MONOTONIC is never negative, and its nanoseconds are below 1e9.
    Moment::new(Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    ))
}

/// Wall clock now, RFC 3339 in UTC with milliseconds.
pub(crate) fn wall() -> String {
    humantime::format_rfc3339_millis(SystemTime::now()).to_string()
}
