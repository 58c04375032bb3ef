//! Timer wheel for sessions: constant time to set and to fire, no allocation in the steady state.
//!
//! An entry is a hint, not a promise: whoever set it looks at its own deadlines when it fires and sets it again if
//! none is due. So a deadline that moves away costs nothing, and one beyond the horizon fires early.

use std::time::Duration;

use crate::moment::Moment;

/// Length of a tick; a timer fires at most this much late.
pub const TICK: Duration = Duration::from_millis(32);
const SLOTS: u64 = 1024;

/// Timers of type `T`, to the tick.
#[derive(Debug)]
pub struct Wheel<T> {
    slots: Vec<Vec<(u64, T)>>,
    occupied: [u64; (SLOTS / 64) as usize],
    /// Every tick up to and including this one has been fired.
    fired: u64,
}

/// The tick in which `moment` is past.
pub fn tick_of(moment: Moment) -> u64 {
    let ticks = moment.since_boot().as_nanos().div_ceil(TICK.as_nanos());
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

impl<T> Wheel<T> {
    /// An empty wheel at `now`.
    pub fn new(now: Moment) -> Self {
        let slots = (0..SLOTS).map(|_| Vec::new()).collect();
        Self {
            slots,
            occupied: [0; (SLOTS / 64) as usize],
            fired: tick_of(now).saturating_sub(1),
        }
    }

    /// Sets a timer for tick `tick` or the last one within the horizon (about 32 s), whichever is earlier, and never
    /// in the past. Returns the tick it was set for.
    pub fn set(&mut self, tick: u64, value: T) -> u64 {
        let tick = tick.clamp(self.fired + 1, self.fired + SLOTS - 1);
        let slot = tick % SLOTS;
        self.slots[slot as usize].push((tick, value));
        self.occupied[(slot / 64) as usize] |= 1 << (slot % 64);
        tick
    }

    /// Moves every timer that is due at `now` to `due`, with its tick.
    pub fn advance(&mut self, now: Moment, due: &mut Vec<(u64, T)>) {
        // A tick is past once `now` has reached its end.
        let target = u64::try_from(now.since_boot().as_nanos() / TICK.as_nanos()).unwrap_or(u64::MAX);
        if target <= self.fired {
            return;
        }
        let last = target.min(self.fired + SLOTS);
        for tick in self.fired + 1..=last {
            let slot = tick % SLOTS;
            let (word, bit) = ((slot / 64) as usize, 1 << (slot % 64));
            if self.occupied[word] & bit != 0 {
                self.occupied[word] &= !bit;
                due.append(&mut self.slots[slot as usize]);
                // A burst must not leave its memory in every slot.
                if self.slots[slot as usize].capacity() > 1024 {
                    self.slots[slot as usize] = Vec::new();
                }
            }
        }
        self.fired = target;
    }

    /// When the next timer is due.
    pub fn next(&self) -> Option<Moment> {
        const WORDS: u64 = SLOTS / 64;
        let start = self.fired + 1;
        let (first, bit) = ((start % SLOTS) / 64, start % 64);
        // The first word is looked at twice: its bits from `start` on now, those before `start` (a turn later) at the end.
        (0..=WORDS).find_map(|step| {
            let word = self.occupied[((first + step) % WORDS) as usize];
            let mask = match step {
                0 => u64::MAX << bit,
                WORDS => !(u64::MAX << bit),
                _ => u64::MAX,
            };
            let slot = (first + step) * 64 + u64::from((word & mask).trailing_zeros());
            let tick = start + (slot - (first * 64 + bit));
            (word & mask != 0).then(|| Moment::new(TICK * u32::try_from(tick).unwrap_or(u32::MAX)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Moment {
        Moment::new(Duration::from_millis(ms))
    }

    fn fired(wheel: &mut Wheel<&'static str>, ms: u64) -> Vec<&'static str> {
        let mut due = Vec::new();
        wheel.advance(at(ms), &mut due);
        due.into_iter().map(|(_, value)| value).collect()
    }

    #[test]
    fn a_timer_fires_once_not_early_and_at_most_a_tick_late() {
        let mut wheel = Wheel::new(at(1_000_000));
        wheel.set(tick_of(at(1_000_500)), "a");
        assert_eq!(fired(&mut wheel, 1_000_499), [""; 0]);
        assert_eq!(fired(&mut wheel, 1_000_500 + 32), ["a"]);
        assert_eq!(fired(&mut wheel, 1_100_000), [""; 0]);
    }

    #[test]
    fn the_past_fires_at_the_next_tick_and_the_far_future_at_the_horizon() {
        let mut wheel = Wheel::new(at(0));
        assert_eq!(fired(&mut wheel, 10_000), [""; 0]);
        wheel.set(0, "past");
        let horizon = wheel.set(u64::MAX, "far");
        assert_eq!(fired(&mut wheel, 10_064), ["past"]);
        assert_eq!(fired(&mut wheel, 10_000 + 30_000), [""; 0]);
        assert_eq!(horizon, 10_000 / 32 + SLOTS - 1);
        assert_eq!(fired(&mut wheel, 10_000 + 33_000), ["far"]);
    }

    #[test]
    fn next_names_the_earliest_and_a_long_sleep_loses_nothing() {
        let mut wheel = Wheel::new(at(0));
        assert_eq!(wheel.next(), None);
        for (ms, name) in [(900, "c"), (100, "a"), (500, "b")] {
            wheel.set(tick_of(at(ms)), name);
        }
        let next = wheel.next().expect("three are set");
        assert!(next >= at(100) && next <= at(132), "{next:?}");
        assert_eq!(fired(&mut wheel, 10_000_000).len(), 3);
        assert_eq!(wheel.next(), None);
    }
}
