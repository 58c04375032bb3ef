//! What each key signed lately, so that no update is carried out twice.
//!
//! A client whose answer was lost sends the same bytes again; so does an attacker who saw them. Both get what the first
//! got: the update is not carried out a second time.

use std::collections::{BTreeMap, VecDeque};

use super::{
    state::Owner,
    tsig::{FUDGE, Signed},
};

/// Updates remembered of each key.
const REMEMBERED: usize = 8;

/// The memory of all keys. Bounded: so many updates of each key that is known, and answers to updates are small.
#[derive(Clone, Debug, Default)]
pub struct Replay {
    keys: BTreeMap<Owner, Memory>,
}

/// How an update stands to those before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Not seen yet: carry it out, then say what was answered ([`Replay::answered`]).
    First,
    /// Seen and answered with this: answer the same.
    Again(Vec<u8>),
    /// Seen, and its answer is still to come: be silent.
    Pending,
    /// Signed before one that was carried out: BADTIME (RFC 8945 §5.2.3).
    Stale,
}

#[derive(Clone, Debug, Default)]
struct Memory {
    /// When the latest was signed.
    last: u64,
    /// Whether one signed at `last` may be one that is not remembered.
    forgetful: bool,
    lately: VecDeque<One>,
}

#[derive(Clone, Debug)]
struct One {
    time: u64,
    mac: Vec<u8>,
    answer: Option<Vec<u8>>,
}

impl Replay {
    /// What is known after a restart: the time of the last update of each key that changed something. One signed in that
    /// same second is taken for it.
    pub fn of(signed: &BTreeMap<Owner, u64>) -> Self {
        let memory = |last: u64| Memory {
            last,
            forgetful: true,
            lately: VecDeque::new(),
        };
        Self {
            keys: signed.iter().map(|(key, last)| (key.clone(), memory(*last))).collect(),
        }
    }

    /// Remembers that `key` signed a change at `time` that another process carried out; as after a restart, one signed in that
    /// same second is taken for it.
    pub fn learn(&mut self, key: &Owner, time: u64) {
        let memory = self.keys.entry(key.clone()).or_default();
        if time >= memory.last {
            (memory.last, memory.forgetful) = (time, true);
        }
    }

    /// Looks at one update that was verified, and remembers it.
    pub fn check(&mut self, signed: &Signed) -> Seen {
        let memory = self.keys.entry(signed.key.clone()).or_default();
        if let Some(one) = memory.lately.iter().find(|one| one.mac == signed.mac) {
            return one.answer.clone().map_or(Seen::Pending, Seen::Again);
        }
        if signed.time < memory.last || (signed.time == memory.last && memory.forgetful) {
            return Seen::Stale;
        }
        if signed.time > memory.last {
            (memory.last, memory.forgetful) = (signed.time, false);
        }
        if memory.lately.len() == REMEMBERED {
            let forgotten = memory.lately.pop_front();
            memory.forgetful |= forgotten.is_some_and(|one| one.time == memory.last);
        }
        memory.lately.push_back(One {
            time: signed.time,
            mac: signed.mac.clone(),
            answer: None,
        });
        Seen::First
    }

    /// Remembers what was answered.
    pub fn answered(&mut self, signed: &Signed, answer: &[u8]) {
        let memory = self.keys.get_mut(&signed.key);
        let one = memory.and_then(|memory| memory.lately.iter_mut().find(|one| one.mac == signed.mac));
        if let Some(one) = one {
            one.answer = Some(answer.to_vec());
        }
    }

    /// Forgets an update that could not be carried out though nothing was wrong with it, so that the client's next try
    /// counts.
    pub fn forget(&mut self, signed: &Signed) {
        if let Some(memory) = self.keys.get_mut(&signed.key) {
            memory.lately.retain(|one| one.mac != signed.mac);
        }
    }

    /// Forgets a key that was removed: another one may get its name.
    pub fn remove(&mut self, key: &Owner) {
        self.keys.remove(key);
    }

    /// Forgets answers to what cannot be in time any more, but not when each key signed last: clocks are set back. `now` is
    /// UNIX seconds.
    pub fn expire(&mut self, now: u64) {
        let oldest = now.saturating_sub(u64::from(FUDGE));
        for memory in self.keys.values_mut() {
            memory.forgetful |= memory.last < oldest;
            memory.lately.retain(|one| one.time >= oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_bytes_again_get_the_same_answer_and_silence_until_there_is_one() {
        let mut replay = Replay::default();
        assert_eq!(replay.check(&signed("a", 100, 1)), Seen::First);
        assert_eq!(replay.check(&signed("a", 100, 1)), Seen::Pending);
        replay.answered(&signed("a", 100, 1), b"done");
        assert_eq!(replay.check(&signed("a", 100, 1)), Seen::Again(b"done".to_vec()));
    }

    #[test]
    fn what_was_signed_before_another_is_stale_and_keys_do_not_share_their_times() {
        let mut replay = Replay::default();
        assert_eq!(replay.check(&signed("a", 100, 1)), Seen::First);
        assert_eq!(replay.check(&signed("a", 99, 2)), Seen::Stale);
        assert_eq!(replay.check(&signed("b", 99, 2)), Seen::First);
        assert_eq!(replay.check(&signed("a", 100, 3)), Seen::First);
        assert_eq!(replay.check(&signed("a", 101, 4)), Seen::First);
        replay.answered(&signed("a", 100, 1), b"done");
        assert_eq!(replay.check(&signed("a", 100, 1)), Seen::Again(b"done".to_vec()));
    }

    #[test]
    fn more_than_is_remembered_within_one_second_is_stale_rather_than_carried_out_twice() {
        let mut replay = Replay::default();
        for mac in 0..=8 {
            assert_eq!(replay.check(&signed("a", 100, mac)), Seen::First);
        }
        assert_eq!(replay.check(&signed("a", 100, 0)), Seen::Stale);
        assert_eq!(replay.check(&signed("a", 100, 9)), Seen::Stale);
        assert_eq!(replay.check(&signed("a", 101, 10)), Seen::First);
        assert_eq!(replay.keys.values().map(|memory| memory.lately.len()).sum::<usize>(), 8);
    }

    #[test]
    fn after_a_restart_nothing_signed_until_the_last_change_is_carried_out_again() {
        let mut replay = Replay::of(&BTreeMap::from([(signed("a", 0, 0).key, 100)]));
        assert_eq!(replay.check(&signed("a", 100, 1)), Seen::Stale);
        assert_eq!(replay.check(&signed("a", 99, 2)), Seen::Stale);
        assert_eq!(replay.check(&signed("a", 101, 3)), Seen::First);
        assert_eq!(replay.check(&signed("a", 101, 4)), Seen::First);
        replay.expire(401);
        assert_eq!(replay.check(&signed("a", 101, 3)), Seen::Pending);
        replay.expire(402);
        assert_eq!(
            replay.check(&signed("a", 101, 3)),
            Seen::Stale,
            "though the clock went back"
        );
        replay.remove(&signed("a", 0, 0).key);
        assert_eq!(
            replay.check(&signed("a", 101, 3)),
            Seen::First,
            "another key of that name"
        );
    }

    #[test]
    fn what_another_process_carried_out_is_not_carried_out_again() {
        let mut replay = Replay::default();
        let key = signed("a", 0, 0).key;
        replay.learn(&key, 100);
        assert_eq!(replay.check(&signed("a", 100, 1)), Seen::Stale);
        assert_eq!(replay.check(&signed("a", 101, 2)), Seen::First);
        replay.learn(&key, 99);
        assert_eq!(replay.check(&signed("a", 101, 3)), Seen::First);
    }

    #[test]
    fn a_try_that_failed_through_no_fault_of_its_own_may_be_made_again() {
        let mut replay = Replay::default();
        assert_eq!(replay.check(&signed("a", 100, 1)), Seen::First);
        replay.forget(&signed("a", 100, 1));
        assert_eq!(replay.check(&signed("a", 100, 1)), Seen::First);
    }

    fn signed(key: &str, time: u64, mac: u8) -> Signed {
        let owner: Owner = key.parse().expect("a name");
        Signed {
            key: owner.clone(),
            node: owner,
            time,
            mac: vec![mac],
        }
    }
}
