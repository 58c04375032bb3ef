//! When records are due: a timer wheel of one-second slots, in which each record stands once.
//!
//! Whoever puts off a deadline tells nobody: when its slot comes, the record is put where its deadline is by then. So a packet
//! that renews a session writes one number and moves nothing.

/// Seconds that the wheel reaches ahead; a power of two beyond the longest lifetime, 7440 s.
const SLOTS: u32 = 8192;
const NONE: u32 = u32::MAX;
/// Places in a link: the record before this one, and the one after it.
const BEFORE: usize = 0;
const AFTER: usize = 1;
/// In `BEFORE`: there is no record before this one, but the slot with the number in the lower bits.
const SLOT: u32 = 1 << 31;

/// Records by the second in which they are to be looked at.
#[derive(Debug)]
pub(super) struct Wheel {
    heads: Box<[u32]>,
    /// Of each record. Arrays, since memory of those counts as used only where something was put.
    links: Box<[[u32; 2]]>,
    /// The second whose slot is looked at next.
    second: u64,
}

impl Wheel {
    /// For records 0 to `most` - 1, at the time `now`, in milliseconds.
    pub(super) fn new(most: usize, now: u64) -> Self {
        Self {
            heads: vec![NONE; SLOTS as usize].into(),
            links: vec![[0; 2]; most].into(),
            second: now / 1000,
        }
    }

    /// Stands a record that does not stand anywhere where it is due: no earlier than `deadline`, in milliseconds, if the
    /// wheel reaches that far.
    pub(super) fn insert(&mut self, record: u32, deadline: u64) {
        let ahead = deadline
            .div_ceil(1000)
            .saturating_sub(self.second)
            .min(u64::from(SLOTS) - 1);
        let slot = self.slot(self.second + ahead);
        let head = std::mem::replace(&mut self.heads[slot as usize], record);
        self.links[record as usize] = [SLOT | slot, head];
        if head != NONE {
            self.links[head as usize][BEFORE] = record;
        }
    }

    /// Takes a record out that stands somewhere.
    pub(super) fn remove(&mut self, record: u32) {
        let [before, after] = self.links[record as usize];
        if before & SLOT != 0 {
            self.heads[(before & !SLOT) as usize] = after;
        } else {
            self.links[before as usize][AFTER] = after;
        }
        if after != NONE {
            self.links[after as usize][BEFORE] = before;
        }
    }

    /// Takes one record out whose second has come by `now`; its deadline may have been put off since.
    pub(super) fn due(&mut self, now: u64) -> Option<u32> {
        let now = now / 1000;
        // Nothing stands further ahead than the wheel is round.
        self.second = self.second.max(now.saturating_sub(u64::from(SLOTS)));
        while self.second <= now {
            let head = self.heads[self.slot(self.second) as usize];
            if head != NONE {
                self.remove(head);
                return Some(head);
            }
            if self.second == now {
                break;
            }
            self.second += 1;
        }
        None
    }

    fn slot(&self, second: u64) -> u32 {
        (second % u64::from(SLOTS)) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nat64::testing::Random;

    #[test]
    fn a_record_is_due_in_the_second_after_its_deadline_and_never_before() {
        let mut wheel = Wheel::new(4, 10_400);
        wheel.insert(0, 10_500);
        wheel.insert(1, 12_000);
        wheel.insert(2, 12_001);
        wheel.insert(3, 0);
        assert_eq!(wheel.due(10_999), Some(3));
        assert_eq!(wheel.due(10_999), None);
        assert_eq!(wheel.due(11_000), Some(0));
        assert_eq!(wheel.due(11_999), None);
        assert_eq!(wheel.due(12_000), Some(1));
        assert_eq!(wheel.due(12_000), None);
        assert_eq!(wheel.due(20_000_000), Some(2));
        assert_eq!(wheel.due(20_000_000), None);
    }

    #[test]
    fn what_is_due_later_than_the_wheel_reaches_comes_early_and_is_put_back() {
        let mut wheel = Wheel::new(1, 0);
        let deadline = 20_000_000;
        wheel.insert(0, deadline);
        let mut now = 0;
        let mut turns = 0;
        while now < deadline {
            now += 1000;
            while let Some(record) = wheel.due(now) {
                turns += 1;
                if now < deadline {
                    wheel.insert(record, deadline);
                }
            }
        }
        assert_eq!(turns, 3);
    }

    #[test]
    fn any_order_of_changes_gives_each_record_once_and_in_time() {
        let mut random = Random::new(11);
        let mut wheel = Wheel::new(50, 0);
        let mut deadlines = [None; 50];
        let mut now = 0;
        for _ in 0..50_000 {
            now += random.below(700) as u64;
            let record = random.below(50);
            match deadlines[record].take() {
                Some(_) => wheel.remove(record as u32),
                None => {
                    let deadline = now + random.below(100_000) as u64;
                    deadlines[record] = Some(deadline);
                    wheel.insert(record as u32, deadline);
                }
            }
            while let Some(record) = wheel.due(now) {
                let deadline = deadlines[record as usize].take().expect("it stands there once");
                assert!(deadline <= now && now < deadline + 2000, "{deadline} at {now}");
            }
            assert!(deadlines.iter().flatten().all(|deadline| deadline + 1000 > now));
        }
    }
}
