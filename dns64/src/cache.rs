//! Answers ready to send, as many as fit a number of octets; see [`Packed`].
//!
//! A hit allocates nothing: one keyed hash over the name in lower case, one look-up in the shard that it falls into, and
//! the answer is written out under the shard's lock. What has to go is found by a hand that goes round (CLOCK with more
//! than one chance): answers that nobody asked for again go before those that were, which keeps a flood of random names
//! from pushing out what is in use.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hickory_proto::{
    rr::Name,
    serialize::binary::{BinEncodable, BinEncoder, NameEncoding},
};
use siphasher::sip::SipHasher13;

use crate::{
    Question,
    packed::{Age, Packed},
    query::{Key, Query, Terms},
    wire,
};

/// Octets that an answer takes beside its own: slot, index and allocator.
const OVERHEAD: usize = 128;
/// Rounds of the hand that an answer in use outlives.
const CHANCES: u8 = 3;
/// Octets below which a shard is not worth its own lock.
const LEAST_SHARD: usize = 1 << 20;
const MOST_SHARDS: usize = 64;

/// Known answers, shared by all threads.
#[derive(Debug)]
pub struct Cache {
    /// A power of two of them.
    shards: Box<[Shard]>,
    key: [u8; 16],
    stale: Duration,
}

/// What [`Cache::answer`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The answer stands in the buffer.
    Hit {
        /// Octets of it.
        length: usize,
        /// It is about to run out and in use: ask for it again. Said once.
        refresh: bool,
    },
    /// It is not known, or no longer good.
    Miss,
}

/// What is known about one question, for whoever looks in from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// The answer.
    pub packed: Packed,
    /// Time since it came.
    pub age: Duration,
    /// Time that it is still good; zero if it is stale.
    pub left: Duration,
}

/// Figures of the moment and since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Answers held.
    pub entries: u64,
    /// Octets that they take.
    pub octets: u64,
    /// Answers that came.
    pub inserted: u64,
    /// Answers that went for want of room while they were good.
    pub evicted: u64,
}

impl Cache {
    /// An empty cache of at most `octets`. Answers are kept for `stale` after they have run out. `key` is random and
    /// secret, lest somebody chooses names that all fall into one place.
    pub fn new(octets: usize, stale: Duration, key: [u8; 16]) -> Self {
        let shards = (octets / LEAST_SHARD).clamp(1, MOST_SHARDS);
        let shards = 1_usize << shards.ilog2();
        Self {
            shards: (0..shards).map(|_| Shard::new(octets / shards)).collect(),
            key,
            stale,
        }
    }

    /// The number under which an answer to `query` is known. Whoever limits answers per question needs it, too.
    pub fn hash(&self, query: &Query<'_>) -> u64 {
        self.hash_of(&query.key())
    }

    /// Writes the answer to `query` into `out` if it is known and good. `hash` is from [`Cache::hash`].
    pub fn answer(&self, query: &Query<'_>, hash: u64, terms: &Terms, now: Duration, out: &mut [u8]) -> Found {
        self.shard(hash).answer(query, hash, terms, millis(now), out)
    }

    /// Somebody asks anew for what `query` asks: nobody else need.
    pub fn refreshing(&self, query: &Query<'_>) {
        let hash = self.hash(query);
        if let Some(entry) = self.shard(hash).get(hash) {
            entry.refreshing = true;
        }
    }

    /// Keeps an answer that has just come, in place of an older one. One that must not be kept, or that takes more than
    /// there is room for, is not.
    pub fn insert(&self, packed: Packed, now: Duration) {
        let Some(hash) = packed.key().map(|key| self.hash_of(&key)) else {
            return;
        };
        let lifetime = u64::from(packed.lifetime()) * 1000;
        if lifetime == 0 {
            return;
        }
        let (born, stale) = (millis(now), millis(self.stale));
        // A failure is no answer to give when there is none.
        let failure = !matches!(u16::from(packed.code()), 0 | 3);
        let entry = Entry {
            hash,
            born,
            end: born.saturating_add(lifetime),
            gone: born
                .saturating_add(lifetime)
                .saturating_add(if failure { 0 } else { stale }),
            visits: 0,
            refreshing: false,
            packed,
        };
        let mut shard = self.shard(hash);
        // A failure to renew what can still be given out stale does not replace it (RFC 8767 §5).
        if failure && shard.get(hash).is_some_and(|old| old.gone > born && old.usable()) {
            return;
        }
        shard.insert(entry, born);
    }

    /// What is known about `question`, stale or not.
    pub fn known(&self, question: &Question, now: Duration) -> Option<Known> {
        let name = wire_name(&question.name)?;
        let key = key_of(question, &name);
        let hash = self.hash_of(&key);
        let now = millis(now);
        let mut shard = self.shard(hash);
        let entry = shard.get(hash)?;
        if !entry.packed.answers(&key) || entry.gone <= now {
            return None;
        }
        Some(Known {
            packed: entry.packed.clone(),
            age: Duration::from_millis(now.saturating_sub(entry.born)),
            left: Duration::from_millis(if entry.is_stale() {
                0
            } else {
                entry.end.saturating_sub(now)
            }),
        })
    }

    /// There is no better answer to `question` for now: what has run out is given out for `time` as stale, with a TTL of
    /// 30 s, before anybody is asked again (RFC 8767 §5). Whether there is such an answer.
    pub fn keep_serving(&self, question: &Question, time: Duration, now: Duration) -> bool {
        let Some(name) = wire_name(&question.name) else {
            return false;
        };
        let key = key_of(question, &name);
        let hash = self.hash_of(&key);
        let now = millis(now);
        let mut shard = self.shard(hash);
        match shard.get(hash) {
            Some(entry) if entry.packed.answers(&key) && entry.gone > now && entry.usable() => {
                if entry.end <= now {
                    entry.end = now.saturating_add(millis(time)).min(entry.gone);
                    entry.born = STALE;
                }
                true
            }
            _ => false,
        }
    }

    /// Forgets everything. Returns how many answers that were.
    pub fn flush(&self) -> usize {
        self.remove_if(|_| true)
    }

    /// Forgets every answer about `name`.
    pub fn flush_name(&self, name: &Name) -> usize {
        let Some(wanted) = wire_name(name) else { return 0 };
        self.remove_if(|name| name == wanted)
    }

    /// Forgets every answer about `name` and what is below it.
    pub fn flush_below(&self, name: &Name) -> usize {
        self.flush_below_all([name])
    }

    /// Forgets every answer about any of `names` and what is below them, in one pass.
    pub fn flush_below_all<'a>(&self, names: impl IntoIterator<Item = &'a Name>) -> usize {
        let wanted: Vec<Vec<u8>> = names.into_iter().filter_map(wire_name).collect();
        self.remove_if(|mut name| {
            loop {
                if wanted.iter().any(|wanted| name == wanted) {
                    return true;
                }
                let label = name.first().map_or(0, |length| usize::from(*length));
                match name.get(label + 1..) {
                    Some(parent) if label > 0 => name = parent,
                    _ => return false,
                }
            }
        })
    }

    /// Figures of all shards.
    pub fn stats(&self) -> Stats {
        let shards = self.shards.iter().map(Shard::lock);
        shards.fold(Stats::default(), |sum, shard| Stats {
            entries: sum.entries + shard.index.len() as u64,
            octets: sum.octets + shard.octets as u64,
            inserted: sum.inserted + shard.inserted,
            evicted: sum.evicted + shard.evicted,
        })
    }

    fn hash_of(&self, key: &Key<'_>) -> u64 {
        let mut hasher = SipHasher13::new_with_key(&self.key);
        for word in wire::lower_words(key.name) {
            hasher.write_u64(word);
        }
        let rest = u64::from(key.kind) << 32
            | u64::from(key.class) << 16
            | u64::from(key.dnssec_ok) << 1
            | u64::from(key.checking_disabled);
        hasher.write_u64(rest);
        hasher.finish()
    }

    /// The index takes the lowest and the highest bits; these are from between.
    fn shard(&self, hash: u64) -> MutexGuard<'_, Inner> {
        let index = (hash >> 40) as usize & (self.shards.len() - 1);
        self.shards[index].lock()
    }

    fn remove_if(&self, wanted: impl Fn(&[u8]) -> bool) -> usize {
        let mut removed = 0;
        for shard in &self.shards {
            removed += shard.lock().remove_if(&wanted);
        }
        removed
    }
}

/// A name as answers have it: on the wire, in lower case.
fn wire_name(name: &Name) -> Option<Vec<u8>> {
    let mut octets = Vec::with_capacity(wire::LONGEST_NAME);
    let mut encoder = BinEncoder::new(&mut octets);
    encoder.set_name_encoding(NameEncoding::UncompressedLowercase);
    name.emit(&mut encoder).ok()?;
    Some(octets)
}

fn key_of<'a>(question: &Question, name: &'a [u8]) -> Key<'a> {
    Key {
        name,
        kind: question.kind.into(),
        class: question.class.into(),
        dnssec_ok: question.dnssec_ok,
        checking_disabled: question.checking_disabled,
    }
}

/// Milliseconds; 584 million years are enough for everybody.
fn millis(time: Duration) -> u64 {
    time.as_secs()
        .saturating_mul(1000)
        .saturating_add(time.subsec_millis().into())
}

/// One lock and what it guards, alone on its cache lines.
#[derive(Debug)]
#[repr(align(128))]
struct Shard(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    /// Which slot an answer is in, by hash. Two questions with one hash push each other out.
    index: HashMap<u64, u32, BuildHasherDefault<AsIs>>,
    slots: Vec<Option<Entry>>,
    free: Vec<u32>,
    hand: usize,
    octets: usize,
    most: usize,
    inserted: u64,
    evicted: u64,
}

/// One answer. Times are milliseconds.
#[derive(Debug)]
struct Entry {
    hash: u64,
    /// When its TTLs were right; [`STALE`] if they are over.
    born: u64,
    /// Until when it is given out.
    end: u64,
    /// Until when it may be given out as stale.
    gone: u64,
    visits: u8,
    /// Somebody was told to ask for it again.
    refreshing: bool,
    packed: Packed,
}

const STALE: u64 = u64::MAX;

impl Entry {
    const fn is_stale(&self) -> bool {
        self.born == STALE
    }

    /// Whether it is better than nothing.
    fn usable(&self) -> bool {
        matches!(u16::from(self.packed.code()), 0 | 3)
    }

    fn cost(&self) -> usize {
        self.packed.size() + OVERHEAD
    }

    fn age(&self, now: u64) -> Age {
        if self.is_stale() {
            return Age::Stale;
        }
        let seconds = if self.packed.ages() {
            now.saturating_sub(self.born) / 1000
        } else {
            0
        };
        Age::Fresh(u32::try_from(seconds).unwrap_or(u32::MAX))
    }

    /// Whether less than a tenth of its time is left and it is used.
    fn runs_out(&self, now: u64) -> bool {
        let left = self.end.saturating_sub(now);
        !self.is_stale() && self.visits > 1 && left.saturating_mul(10) < self.end.saturating_sub(self.born)
    }
}

impl Shard {
    fn new(most: usize) -> Self {
        Self(Mutex::new(Inner {
            index: HashMap::default(),
            slots: Vec::new(),
            free: Vec::new(),
            hand: 0,
            octets: 0,
            most,
            inserted: 0,
            evicted: 0,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn get(&mut self, hash: u64) -> Option<&mut Entry> {
        let slot = *self.index.get(&hash)?;
        self.slots.get_mut(slot as usize)?.as_mut()
    }

    fn answer(&mut self, query: &Query<'_>, hash: u64, terms: &Terms, now: u64, out: &mut [u8]) -> Found {
        let Some(entry) = self.get(hash) else {
            return Found::Miss;
        };
        if entry.end <= now || !entry.packed.answers(&query.key()) {
            return Found::Miss;
        }
        let Some(length) = entry.packed.write(query, entry.age(now), terms, out) else {
            return Found::Miss;
        };
        entry.visits = entry.visits.saturating_add(1).min(CHANCES);
        let refresh = !entry.refreshing && entry.runs_out(now);
        Found::Hit { length, refresh }
    }

    fn insert(&mut self, entry: Entry, now: u64) {
        let visits = self.remove(entry.hash).map_or(0, |old| old.visits);
        if entry.cost() > self.most {
            return;
        }
        while self.octets + entry.cost() > self.most {
            self.evict(now);
        }
        self.octets += entry.cost();
        self.inserted += 1;
        let hash = entry.hash;
        // What is renewed is still in use.
        let entry = Some(Entry { visits, ..entry });
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                self.slots.push(None);
                // A slot takes more than one octet, and there are not as many as 2^32 of them.
                u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
            }
        };
        if let Some(place) = self.slots.get_mut(slot as usize) {
            *place = entry;
            self.index.insert(hash, slot);
        }
    }

    fn remove(&mut self, hash: u64) -> Option<Entry> {
        let slot = self.index.remove(&hash)?;
        let entry = self.slots.get_mut(slot as usize)?.take()?;
        self.free.push(slot);
        self.octets -= entry.cost();
        Some(entry)
    }

    /// Takes one answer out: what is gone or was not used since the hand last came by. Ends after as many rounds as
    /// there are chances. The caller knows that there is one.
    fn evict(&mut self, now: u64) {
        loop {
            self.hand = if self.hand < self.slots.len() { self.hand } else { 0 };
            let slot = self.slots.get_mut(self.hand).and_then(Option::as_mut);
            self.hand += 1;
            let Some(entry) = slot else { continue };
            if entry.gone > now && entry.visits > 0 {
                entry.visits -= 1;
                continue;
            }
            let (hash, good) = (entry.hash, entry.end > now);
            self.evicted += u64::from(good);
            self.remove(hash);
            return;
        }
    }

    fn remove_if(&mut self, wanted: impl Fn(&[u8]) -> bool) -> usize {
        let hashes: Vec<u64> = self
            .slots
            .iter()
            .flatten()
            .filter(|entry| entry.packed.key().is_some_and(|key| wanted(key.name)))
            .map(|entry| entry.hash)
            .collect();
        hashes.iter().filter(|hash| self.remove(**hash).is_some()).count()
    }
}

/// A keyed hash needs no other.
#[derive(Default)]
struct AsIs(u64);

impl Hasher for AsIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }

    /// Never called: the keys are `u64`.
    fn write(&mut self, octets: &[u8]) {
        for octet in octets {
            self.0 = self.0.rotate_left(8) ^ u64::from(*octet);
        }
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::{
        op::{Message, ResponseCode},
        rr::RecordType,
    };

    use super::*;
    use crate::{
        Answer,
        packed::{
            Lifetimes,
            tests::{a, name, pack, question},
        },
        query::tests::{plain, query, with_opt},
    };

    #[test]
    fn what_was_put_in_is_found_in_any_case_and_nothing_else_is() {
        let cache = cache(1 << 20);
        cache.insert(pack("www.example.org.", vec![a("www.example.org.", 60, 1)]), at(0));
        let www = "\x03www\x07example\x03org\0";
        assert!(hit(&cache, &plain(www, 1), 0));
        assert!(hit(&cache, &plain("\x03wWW\x07eXAMple\x03Org\0", 1), 59));
        assert!(!hit(&cache, &plain(www, 1), 60), "its time is over");
        assert!(!hit(&cache, &plain(www, 28), 0), "another type");
        assert!(
            !hit(&cache, &plain("\x03wwx\x07example\x03org\0", 1), 0),
            "another name"
        );
        assert!(!hit(&cache, &plain("\x07example\x03org\0", 1), 0), "the name above");
        assert!(hit(&cache, &with_opt(&plain(www, 1), 1232, 0, 0, &[]), 0), "with EDNS");
        assert!(
            !hit(&cache, &with_opt(&plain(www, 1), 1232, 0, 0x8000, &[]), 0),
            "with DO"
        );
        let mut unchecked = plain(www, 1);
        unchecked[3] = 0x10;
        assert!(!hit(&cache, &unchecked, 0), "with CD");
    }

    #[test]
    fn labels_of_any_octets_are_found_again() {
        let cache = cache(1 << 20);
        for octet in 0..=255_u8 {
            let mut asked = plain("\x03a?c\x01?\0", 1);
            asked[14] = octet;
            asked[17] = octet;
            let question = query(&asked).question().expect("a question");
            let answer = Answer {
                answers: vec![a("w.", 60, octet)],
                ..Answer::empty(ResponseCode::NoError)
            };
            cache.insert(
                Packed::new(&question, &answer, &Lifetimes::default()).expect("packed"),
                at(0),
            );
            let (out, _) = self::answer(&cache, &asked, 0).expect("a hit");
            assert_eq!((&out[12..23], out.last()), (&asked[12..23], Some(&octet)));
            assert!(cache.known(&question, at(0)).is_some());
        }
        assert_eq!(cache.stats().entries, 256 - 26, "letters are one in either case");
    }

    #[test]
    fn a_newer_answer_replaces_the_older_and_one_without_ttl_is_not_kept() {
        let cache = cache(1 << 20);
        for last in 1..100 {
            cache.insert(pack("w.", vec![a("w.", 60, last)]), at(0));
        }
        cache.insert(pack("v.", vec![a("v.", 0, 1)]), at(0));
        let stats = cache.stats();
        assert_eq!((stats.entries, stats.inserted, stats.evicted), (1, 99, 0));
        let out = answer(&cache, &plain("\x01w\0", 1), 0).expect("a hit").0;
        assert_eq!(out.last(), Some(&99));
    }

    #[test]
    fn it_never_takes_more_octets_than_it_may() {
        let cache = cache(100_000);
        for number in 0..10_000 {
            let owner = format!("n{number}.example.org.");
            cache.insert(pack(&owner, vec![a(&owner, 60, 1)]), at(0));
            assert!(cache.stats().octets <= 100_000);
        }
        let stats = cache.stats();
        assert!(
            stats.entries > 300 && stats.entries + stats.evicted == 10_000,
            "{stats:?}"
        );
        let shard = cache.shards[0].lock();
        assert!(shard.slots.len() < 1_000, "slots are used again");
        drop(shard);
        let large = (0..3_000).map(|_| a("w.", 60, 1)).collect();
        let small = Cache::new(10_000, Duration::ZERO, [1; 16]);
        small.insert(pack("w.", large), at(0));
        assert_eq!(small.stats(), Stats::default(), "larger than all there is");
    }

    #[test]
    fn a_flood_of_random_names_does_not_push_out_what_is_in_use() {
        let cache = cache(100_000);
        let used: Vec<_> = (0..100).map(|number| format!("u{number}.")).collect();
        for owner in &used {
            cache.insert(pack(owner, vec![a(owner, 6_000, 1)]), at(0));
        }
        let ask = |owner: &String| {
            let label = owner.trim_end_matches('.');
            let wire = format!("{}{label}\0", char::from(u8::try_from(label.len()).expect("short")));
            hit(&cache, &plain(&wire, 1), 1)
        };
        let mut lost = 0;
        for number in 0..50_000 {
            if number % 2 == 0 {
                lost += u32::from(!ask(&used[number / 2 % 100]));
            }
            let owner = format!("r{number}.");
            cache.insert(pack(&owner, vec![a(&owner, 6_000, 1)]), at(1));
        }
        assert_eq!(lost, 0);
    }

    #[test]
    fn what_runs_out_and_is_used_asks_for_its_successor_once() {
        let cache = cache(1 << 20);
        cache.insert(pack("w.", vec![a("w.", 100, 1)]), at(0));
        let asked = plain("\x01w\0", 1);
        let refresh = |second| answer(&cache, &asked, second).expect("a hit").1;
        assert!(!refresh(1) && !refresh(50) && !refresh(90));
        assert!(refresh(91) && refresh(91), "until somebody does ask");
        let crate::query::Parsed::Query(query) = crate::query::Parsed::of(&asked) else {
            panic!("a query")
        };
        cache.refreshing(&query);
        assert!(!refresh(92) && !refresh(99));
        cache.insert(pack("w.", vec![a("w.", 100, 1)]), at(99));
        assert!(
            !refresh(100) && refresh(190) | refresh(191),
            "and so does the successor"
        );
        cache.insert(pack("x.", vec![a("x.", 100, 1)]), at(0));
        let once = answer(&cache, &plain("\x01x\0", 1), 95).expect("a hit");
        assert!(!once.1, "asked for once is not in use");
    }

    #[test]
    fn a_stale_answer_is_given_out_when_there_is_no_better_and_for_as_long_as_was_said() {
        let cache = cache(1 << 20);
        let w = question("w.");
        cache.insert(pack("w.", vec![a("w.", 100, 1)]), at(0));
        let asked = plain("\x01w\0", 1);
        assert!(!hit(&cache, &asked, 101));
        let known = cache.known(&w, at(101)).expect("stale");
        assert_eq!((known.age, known.left), (at(101), at(0)));
        assert!(cache.keep_serving(&w, at(30), at(101)));
        let (out, refresh) = answer(&cache, &asked, 130).expect("a hit");
        let reply = Message::from_vec(&out).expect("a message");
        assert_eq!((reply.answers[0].ttl, refresh), (30, false));
        assert!(!hit(&cache, &asked, 131));
        assert!(cache.keep_serving(&w, at(30), at(131)), "again");
        assert!(!cache.keep_serving(&w, at(30), at(100 + 3600)), "too old");
        assert!(cache.known(&w, at(100 + 3600)).is_none());
        assert!(!cache.keep_serving(&question("x."), at(30), at(0)), "never known");
    }

    #[test]
    fn a_failure_neither_replaces_what_is_stale_nor_becomes_stale_itself() {
        let cache = cache(1 << 20);
        let failure = |owner: &str| {
            let answer = Answer::empty(ResponseCode::ServFail);
            Packed::new(&question(owner), &answer, &Lifetimes::default()).expect("packed")
        };
        cache.insert(pack("w.", vec![a("w.", 100, 1)]), at(0));
        cache.insert(failure("w."), at(101));
        assert!(cache.keep_serving(&question("w."), at(30), at(101)));
        assert_eq!(answer(&cache, &plain("\x01w\0", 1), 102).expect("a hit").0[3] & 0xf, 0);
        cache.insert(failure("x."), at(0));
        assert!(hit(&cache, &plain("\x01x\0", 1), 4));
        assert!(!hit(&cache, &plain("\x01x\0", 1), 5));
        assert!(!cache.keep_serving(&question("x."), at(30), at(5)));
    }

    #[test]
    fn the_ttls_of_our_own_zones_do_not_grow_old() {
        let cache = cache(1 << 20);
        let answer = Answer {
            answers: vec![a("w.", 100, 1)],
            authoritative: true,
            ..Answer::empty(ResponseCode::NoError)
        };
        cache.insert(
            Packed::new(&question("w."), &answer, &Lifetimes::default()).expect("packed"),
            at(0),
        );
        let reply =
            Message::from_vec(&self::answer(&cache, &plain("\x01w\0", 1), 99).expect("a hit").0).expect("a message");
        assert!(reply.metadata.authoritative);
        assert_eq!(reply.answers[0].ttl, 100);
    }

    #[test]
    fn a_flush_takes_all_one_name_or_a_name_and_what_is_below() {
        let cache = cache(1 << 20);
        let fill = || {
            for owner in [
                "example.org.",
                "a.example.org.",
                "b.a.example.org.",
                "anexample.org.",
                "org.",
            ] {
                cache.insert(pack(owner, vec![a(owner, 60, 1)]), at(0));
            }
            let six = question("a.example.org.").with_kind(RecordType::AAAA);
            let answer = Answer::empty(ResponseCode::ServFail);
            cache.insert(
                Packed::new(&six, &answer, &Lifetimes::default()).expect("packed"),
                at(0),
            );
        };
        fill();
        assert_eq!(cache.flush_name(&name("A.example.org.")), 2);
        assert_eq!(cache.stats().entries, 4);
        fill();
        assert_eq!(cache.flush_below(&name("Example.ORG.")), 4);
        assert!(hit(&cache, &plain("\x09anexample\x03org\0", 1), 0));
        fill();
        assert_eq!(cache.flush_below(&Name::root()), 6);
        fill();
        assert_eq!(cache.flush(), 6);
        assert_eq!((cache.stats().entries, cache.stats().octets), (0, 0));
    }

    fn cache(octets: usize) -> Cache {
        Cache::new(octets, Duration::from_secs(3600), [7; 16])
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn hit(cache: &Cache, asked: &[u8], second: u64) -> bool {
        answer(cache, asked, second).is_some()
    }

    fn answer(cache: &Cache, asked: &[u8], second: u64) -> Option<(Vec<u8>, bool)> {
        let query = query(asked);
        let terms = Terms {
            limit: query.udp_limit(),
            cookie: None,
        };
        let mut out = vec![0; 1232];
        match cache.answer(&query, cache.hash(&query), &terms, at(second), &mut out) {
            Found::Hit { length, refresh } => {
                out.truncate(length);
                Some((out, refresh))
            }
            Found::Miss => None,
        }
    }
}
