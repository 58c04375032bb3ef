//! Which record has a key: open addressing, one cache line in nearly all cases.
//!
//! A slot is half a hash and a record's number; the key itself lies in the record, which is looked at only when the half hash
//! agrees. At most every second slot is taken, so that a search looks at 1.5 slots in the mean (Knuth, TAOCP 6.4, linear
//! probing).

/// From hashes to the numbers of records. Its size is fixed: no record waits for all others to be moved.
#[derive(Debug)]
pub(super) struct Index {
    /// Hash in the upper half, number and one in the lower; 0 is empty.
    slots: Box<[u64]>,
    /// Bits of a hash that do not count for its first slot.
    shift: u32,
    used: usize,
}

impl Index {
    /// For up to `most` records, below 2^30. The memory counts as used only where something was put.
    pub(super) fn new(most: usize) -> Self {
        let slots = (most.max(1) * 2).next_power_of_two();
        Self {
            slots: vec![0; slots].into(),
            shift: 32 - slots.trailing_zeros(),
            used: 0,
        }
    }

    /// The record with that hash of which `is` says that it is the one.
    pub(super) fn find(&self, hash: u32, is: impl Fn(u32) -> bool) -> Option<u32> {
        let mut at = self.home(hash);
        loop {
            let slot = self.slots[at];
            if slot == 0 {
                return None;
            }
            if hash_of(slot) == hash && is(number_of(slot)) {
                return Some(number_of(slot));
            }
            at = self.after(at);
        }
    }

    /// Puts a record in that is not there. False if there is no room.
    pub(super) fn insert(&mut self, hash: u32, number: u32) -> bool {
        if self.used * 2 >= self.slots.len() {
            return false;
        }
        let mut at = self.home(hash);
        while self.slots[at] != 0 {
            at = self.after(at);
        }
        self.slots[at] = u64::from(hash) << 32 | (u64::from(number) + 1);
        self.used += 1;
        true
    }

    /// Takes a record out, if it is there.
    pub(super) fn remove(&mut self, hash: u32, number: u32) {
        let wanted = u64::from(hash) << 32 | (u64::from(number) + 1);
        let mut hole = self.home(hash);
        while self.slots[hole] != wanted {
            if self.slots[hole] == 0 {
                return;
            }
            hole = self.after(hole);
        }
        self.used -= 1;
        // What follows moves up, unless it is where it belongs: then no search ends too early (Knuth 6.4, algorithm R).
        let mut at = hole;
        loop {
            at = self.after(at);
            let slot = self.slots[at];
            if slot == 0 {
                break;
            }
            let home = self.home(hash_of(slot));
            if self.distance(home, at) >= self.distance(hole, at) {
                self.slots[hole] = slot;
                hole = at;
            }
        }
        self.slots[hole] = 0;
    }

    fn home(&self, hash: u32) -> usize {
        (hash >> self.shift) as usize
    }

    fn after(&self, at: usize) -> usize {
        (at + 1) & (self.slots.len() - 1)
    }

    fn distance(&self, from: usize, to: usize) -> usize {
        to.wrapping_sub(from) & (self.slots.len() - 1)
    }

    /// Slots that a search for every record looks at, together.
    #[cfg(test)]
    fn probes(&self) -> usize {
        let taken = self.slots.iter().enumerate().filter(|(_, slot)| **slot != 0);
        taken
            .map(|(at, slot)| self.distance(self.home(hash_of(*slot)), at) + 1)
            .sum()
    }
}

const fn hash_of(slot: u64) -> u32 {
    (slot >> 32) as u32
}

const fn number_of(slot: u64) -> u32 {
    ((slot & 0xffff_ffff) as u32).wrapping_sub(1)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::nat64::testing::Random;

    #[test]
    fn it_holds_what_a_map_holds_after_any_changes_also_when_all_hashes_collide() {
        for bits in [0, 1, 3, 32] {
            let mut random = Random::new(bits);
            let mask = u32::MAX.checked_shl(32 - bits as u32).unwrap_or(0);
            let hash = |number: u32| number.wrapping_mul(0x9e37_79b9) & mask;
            let mut index = Index::new(64);
            let mut map = HashMap::new();
            for _ in 0..20_000 {
                let number = random.below(100) as u32;
                if map.remove(&number).is_some() {
                    index.remove(hash(number), number);
                } else if index.insert(hash(number), number) {
                    map.insert(number, ());
                } else {
                    assert_eq!(map.len(), 64);
                }
                let other = random.below(100) as u32;
                let found = index.find(hash(other), |number| number == other);
                assert_eq!(found, map.contains_key(&other).then_some(other));
            }
        }
    }

    #[test]
    fn a_search_looks_at_no_more_than_one_and_a_half_slots_in_the_mean() {
        let mut random = Random::new(9);
        let mut index = Index::new(1 << 16);
        for number in 0..1 << 16 {
            assert!(index.insert(random.next() as u32, number));
        }
        assert!(!index.insert(1, 1), "full");
        let mean = index.probes() as f64 / f64::from(1 << 16);
        assert!(mean < 1.51, "{mean}");
    }

    #[test]
    fn removing_what_is_not_there_changes_nothing() {
        let mut index = Index::new(4);
        assert!(index.insert(7, 1));
        index.remove(7, 2);
        index.remove(8, 1);
        assert_eq!(index.find(7, |_| true), Some(1));
    }
}
