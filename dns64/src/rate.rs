//! How many answers a network gets whose clients cannot show that they are where they say they are.
//!
//! A victim of reflection sees many answers of one kind, or just many: both are limited, per IPv6 /56 and IPv4 /24. Half
//! of what is too much is answered so shortly that the real client comes again over TCP (slip), the rest not at all. The
//! table has a fixed size and no lock: a bucket is one 64-bit word, which holds whose it is and when it is full again
//! (the generic cell rate algorithm, ITU-T I.371).

use std::{
    net::IpAddr,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// Buckets that one network can be in, which is one cache line.
const WAYS: usize = 8;
/// 16,384 lines: 131,072 buckets, 1 MiB.
const LINES: usize = 1 << 14;
/// Low bits of a bucket: microseconds since the start at which it is full, twice what they count up to. The others say whose
/// it is.
const TIME_BITS: u32 = 40;
const TIME: u64 = (1 << TIME_BITS) - 1;
const TICKS_PER_SECOND: u64 = 1_000_000;
/// Every how many refused answers one is short instead of none.
const SLIP: u64 = 2;

/// How much is too much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Answers per second to the same question; 0 is without limit.
    pub same: u32,
    /// Answers per second altogether; 0 is without limit.
    pub all: u32,
    /// Seconds' worth that may come at once.
    pub burst: u32,
}

/// What to do with one question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Answer it.
    Pass,
    /// Answer that it should come again over TCP, or with a cookie.
    Slip,
    /// Do not answer.
    Drop,
}

/// What counts against the networks. All threads share it.
#[derive(Debug)]
pub struct Rate {
    same: Option<Bucket>,
    all: Option<Bucket>,
    /// Ticks that no bucket is further from being full.
    deepest: u64,
    lines: Box<[Line]>,
    refused: AtomicU64,
    seed: u64,
}

/// Ticks that a token takes to come back, and an empty bucket to fill.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    token: u64,
    depth: u64,
}

#[derive(Debug, Default)]
#[repr(align(64))]
struct Line([AtomicU64; WAYS]);

impl Rate {
    /// Nothing counted yet. `seed` is secret: whoever knew it could find networks that push each other out.
    pub fn new(limit: Limit, seed: u64) -> Self {
        let bucket = |rate: u32| {
            let token = TICKS_PER_SECOND.checked_div(rate.into())?.max(1);
            let tokens = u64::from(rate) * u64::from(limit.burst.max(1));
            Some(Bucket {
                token,
                depth: token.saturating_mul(tokens).min(TIME / 4),
            })
        };
        let (same, all) = (bucket(limit.same), bucket(limit.all));
        let lines = if same.is_some() || all.is_some() { LINES } else { 0 };
        Self {
            same,
            all,
            deepest: same
                .into_iter()
                .chain(all)
                .map(|bucket: Bucket| bucket.depth)
                .max()
                .unwrap_or(0),
            lines: (0..lines).map(|_| Line::default()).collect(),
            refused: AtomicU64::new(0),
            seed,
        }
    }

    /// Whether a client at `source`, of whom nothing is known, gets an answer to the question with this hash.
    pub fn check(&self, source: IpAddr, question: u64, now: Duration) -> Verdict {
        if self.lines.is_empty() {
            return Verdict::Pass;
        }
        let network = network(source) ^ self.seed;
        let now = ticks(now);
        let passes = |bucket: Option<Bucket>, hash: u64| bucket.is_none_or(|bucket| self.take(bucket, hash, now));
        // The total first: what it refuses does not count against the question.
        if passes(self.all, mix(network)) && passes(self.same, mix(mix(network) ^ question)) {
            return Verdict::Pass;
        }
        match self.refused.fetch_add(1, Relaxed) % SLIP {
            0 => Verdict::Slip,
            _ => Verdict::Drop,
        }
    }

    /// Takes a token out of the bucket of `hash`, if there is one. A bucket that the table has no room for pushes out the
    /// one that is nearest to being full, which loses least by it.
    fn take(&self, bucket: Bucket, hash: u64, now: u64) -> bool {
        let Some(Line(line)) = self.lines.get(hash as usize & (LINES - 1)) else {
            return true;
        };
        let owner = hash & !TIME;
        // Zero is full. So is a moment that no bucket reaches: the clock of the ticks has begun anew.
        let full = |word: u64| match word & TIME {
            full if full > now && full - now <= self.deepest => full,
            _ => 0,
        };
        let words = line.each_ref().map(|word| word.load(Relaxed));
        let own = words.iter().position(|word| word & !TIME == owner && full(*word) > 0);
        let place = own.or_else(|| (0..WAYS).min_by_key(|place| full(words[*place])));
        let Some(place) = place else { return true };
        let begun = if own.is_some() { full(words[place]) } else { now };
        let after = begun + bucket.token;
        if after - now > bucket.depth {
            return false;
        }
        // Whoever loses this race gets one answer more than it should.
        let _ = line[place].compare_exchange(words[place], owner | after & TIME, Relaxed, Relaxed);
        true
    }
}

fn ticks(now: Duration) -> u64 {
    let ticks = now
        .as_secs()
        .wrapping_mul(TICKS_PER_SECOND)
        .wrapping_add(u64::from(now.subsec_micros()));
    // Begins anew every six days.
    ticks & (TIME >> 1)
}

/// An IPv6 /56 or an IPv4 /24 as a number. IPv4 is in 0:ffff::/32, from where nobody comes (0000::/8 is reserved, RFC
/// 4291 §2.4).
fn network(source: IpAddr) -> u64 {
    match source.to_canonical() {
        IpAddr::V4(v4) => 0xffff_0000_0000 | u64::from(v4.to_bits() & 0xffff_ff00),
        IpAddr::V6(v6) => (v6.to_bits() >> 64) as u64 & !0xff,
    }
}

/// A permutation in which every bit depends on every other (the finalizer of MurmurHash3).
const fn mix(mut x: u64) -> u64 {
    x ^= x >> 33;
    x = x.wrapping_mul(0xff51_afd7_ed55_8ccd);
    x ^= x >> 33;
    x = x.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ x >> 33
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    #[test]
    fn a_network_gets_its_burst_at_once_and_then_its_rate() {
        let rate = rate(10, 0, 2);
        let passed = |second: f64| {
            (0..100)
                .filter(|_| check(&rate, "192.0.2.1", 1, second) == Verdict::Pass)
                .count()
        };
        assert_eq!(passed(0.0), 20);
        assert_eq!(passed(0.05), 0);
        assert_eq!(passed(0.1), 1);
        assert_eq!(passed(1.1), 10);
        assert_eq!(passed(1000.0), 20);
    }

    #[test]
    fn other_questions_and_other_networks_have_buckets_of_their_own() {
        let rate = rate(1, 0, 1);
        assert_eq!(check(&rate, "192.0.2.1", 1, 0.0), Verdict::Pass);
        assert_ne!(check(&rate, "192.0.2.255", 1, 0.0), Verdict::Pass, "the same /24");
        assert_ne!(check(&rate, "::ffff:192.0.2.3", 1, 0.0), Verdict::Pass, "mapped");
        assert_eq!(check(&rate, "192.0.3.1", 1, 0.0), Verdict::Pass);
        assert_eq!(check(&rate, "192.0.2.1", 2, 0.0), Verdict::Pass, "another question");
        assert_eq!(check(&rate, "2001:db8::1", 1, 0.0), Verdict::Pass);
        assert_ne!(check(&rate, "2001:db8:0:ff::1", 1, 0.0), Verdict::Pass, "the same /56");
        assert_eq!(check(&rate, "2001:db8:0:100::1", 1, 0.0), Verdict::Pass);
    }

    #[test]
    fn random_names_count_against_the_total() {
        let rate = rate(10, 100, 1);
        let passed = (0..10_000).filter(|name| check(&rate, "192.0.2.1", *name, 0.0) == Verdict::Pass);
        assert_eq!(passed.count(), 100);
    }

    #[test]
    fn every_second_refusal_is_a_short_answer() {
        let rate = rate(1, 0, 1);
        assert_eq!(check(&rate, "192.0.2.1", 1, 0.0), Verdict::Pass);
        let refused: Vec<_> = (0..4).map(|_| check(&rate, "192.0.2.1", 1, 0.0)).collect();
        assert_eq!(refused, [Verdict::Slip, Verdict::Drop, Verdict::Slip, Verdict::Drop]);
    }

    #[test]
    fn without_limits_nothing_is_counted_and_nothing_is_held() {
        let rate = rate(0, 0, 1);
        assert!(rate.lines.is_empty());
        assert!((0..10_000).all(|_| check(&rate, "192.0.2.1", 1, 0.0) == Verdict::Pass));
    }

    #[test]
    fn a_million_networks_take_a_mebibyte_and_a_flood_is_still_found_among_them() {
        let rate = rate(5, 0, 1);
        assert!(size_of_val(&*rate.lines) <= 1 << 20);
        let mut passed = 0;
        for number in 0..1_000_000_u32 {
            let now = Duration::from_secs_f64(f64::from(number) / 1e5);
            let source = Ipv6Addr::from_bits((0x2001_0db8 << 96) + (u128::from(number) << 72));
            assert_eq!(rate.check(source.into(), 1, now), Verdict::Pass, "{number}");
            let flood = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
            passed += u32::from(number % 10 == 0 && rate.check(flood, 1, now) == Verdict::Pass);
        }
        assert!((50..=60).contains(&passed), "{passed} of 100,000 in 10 s");
    }

    #[test]
    fn when_the_clock_begins_anew_nobody_is_locked_out() {
        let rate = rate(1, 0, 1);
        let source = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let turn = Duration::from_secs((TIME >> 1) / TICKS_PER_SECOND);
        assert_eq!(rate.check(source, 1, turn), Verdict::Pass);
        assert_ne!(rate.check(source, 1, turn), Verdict::Pass);
        assert_eq!(rate.check(source, 1, turn + Duration::from_secs(2)), Verdict::Pass);
    }

    #[test]
    fn any_moment_and_any_limit_is_fine() {
        for limit in [1, 999_999, 1_000_000, 1_000_001, u32::MAX] {
            let rate = rate(limit, limit, u32::MAX);
            for seconds in [0, 1, 1 << 26, 1 << 27, u64::MAX] {
                let now = Duration::new(seconds, 999_999_999);
                assert_eq!(rate.check(IpAddr::V4(Ipv4Addr::LOCALHOST), 1, now), Verdict::Pass);
            }
        }
    }

    fn rate(same: u32, all: u32, burst: u32) -> Rate {
        Rate::new(Limit { same, all, burst }, 7)
    }

    fn check(rate: &Rate, source: &str, question: u64, second: f64) -> Verdict {
        let source = source.parse().expect("an address");
        rate.check(source, question, Duration::from_secs_f64(second))
    }
}
