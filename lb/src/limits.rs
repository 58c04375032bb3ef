//! Who may connect to one frontend, and how much: networks, and per source rate and sessions. How many sessions there are in
//! all, the frontend itself knows.
//!
//! A source is an IPv4 address or an IPv6 /64, since one host has a whole /64 to itself. What is known of a source is
//! one slot in a table of fixed size, which takes no more than 1 MiB however many there are. Pure: `now` comes in.

use std::{net::IpAddr, time::Duration};

use crate::{
    balance::mix,
    config::{self, Cidr},
    moment::Moment,
};

/// Slots that one source can be in.
const WAYS: usize = 8;
/// Groups of slots: 32,768 sources at the same time.
const GROUPS: usize = 4096;

/// Why a connection is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// `deny` has it, or `allow` has it not.
    Denied,
    /// Its source connects more often than `source_rate`.
    Rate,
    /// As many sessions as `sessions` allows are running.
    Sessions,
    /// As many of its source as `source_sessions` allows are running.
    SourceSessions,
}

/// The limits of one frontend and what counts against them.
#[derive(Clone, Debug)]
pub struct Limits {
    allow: Vec<Cidr>,
    deny: Vec<Cidr>,
    most_per_source: Option<u32>,
    rate: Option<Rate>,
    /// Empty without limits per source.
    slots: Vec<Slot>,
    seed: u64,
}

/// A token bucket, written as the generic cell rate algorithm has it (ITU-T I.371): no token is ever counted, the moment
/// at which the bucket is full again says it all.
#[derive(Clone, Copy, Debug)]
struct Rate {
    /// Time that a token takes to come back.
    token: Duration,
    /// Time that an empty bucket takes to fill.
    bucket: Duration,
}

/// One source. A slot without sessions whose bucket is full is a free one: it says nothing that is not true of any
/// source.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    source: u64,
    /// When its bucket is full.
    full: Moment,
    sessions: u32,
}

impl Refused {
    /// As in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::Rate => "rate",
            Self::Sessions => "sessions",
            Self::SourceSessions => "source-sessions",
        }
    }
}

impl Limits {
    /// The limits that `config` asks for, with nothing counted yet. `seed` is secret: whoever knew it could find sources
    /// that push each other out of the table.
    pub fn of(config: &config::Limits, seed: u64) -> Self {
        let mut limits = Self {
            allow: Vec::new(),
            deny: Vec::new(),
            most_per_source: None,
            rate: None,
            slots: Vec::new(),
            seed,
        };
        limits.reconfigure(config);
        limits
    }

    /// Goes on with other limits; what was counted stays. Sessions above a lower limit go on.
    pub fn reconfigure(&mut self, config: &config::Limits) {
        self.allow = config.allow.iter().map(|at| at.value).collect();
        self.deny = config.deny.iter().map(|at| at.value).collect();
        self.most_per_source = config.source_sessions.as_ref().map(|at| at.value);
        self.rate = config.source_rate().map(|(rate, burst)| {
            let token = Duration::from_secs(1) / rate.max(1);
            Rate {
                token,
                bucket: token.saturating_mul(burst.max(1)),
            }
        });
        let wanted = if self.rate.is_some() || self.most_per_source.is_some() {
            WAYS * GROUPS
        } else {
            0
        };
        if self.slots.len() != wanted {
            self.slots = vec![Slot::default(); wanted];
        }
    }

    /// Whether `source` may open one more session. If so, it has one token less; [`Limits::admitted`] counts the session.
    ///
    /// A source that the table has no room for is not limited: to refuse it would let others lock it out.
    ///
    /// # Errors
    ///
    /// Why not. A refusal costs the source nothing.
    pub fn admit(&mut self, source: IpAddr, now: Moment) -> Result<(), Refused> {
        let within = |networks: &[Cidr]| networks.iter().any(|network| network.contains(source));
        if within(&self.deny) || !(self.allow.is_empty() || within(&self.allow)) {
            return Err(Refused::Denied);
        }
        let (rate, most) = (self.rate, self.most_per_source);
        let Some(slot) = self.slot(source) else {
            return Ok(());
        };
        if most.is_some_and(|most| slot.sessions >= most) {
            return Err(Refused::SourceSessions);
        }
        if let Some(rate) = rate {
            // What a larger bucket of another configuration left behind becomes an empty one.
            slot.full = slot.full.clamp(now, now + rate.bucket);
            if slot.full + rate.token - now > rate.bucket {
                return Err(Refused::Rate);
            }
            slot.full = slot.full + rate.token;
        }
        Ok(())
    }

    /// A session of `source` is running, whether it was asked for or comes from another process.
    pub fn admitted(&mut self, source: IpAddr) {
        if let Some(slot) = self.slot(source) {
            slot.sessions = slot.sessions.saturating_add(1);
        }
    }

    /// A session of `source` that was [`Limits::admitted`] has ended.
    pub fn left(&mut self, source: IpAddr) {
        let source = key(source);
        let mut group = self.group(source).iter_mut();
        if let Some(slot) = group.find(|slot| slot.source == source && slot.sessions > 0) {
            slot.sessions -= 1;
        }
    }

    /// The slot of `source`: its own, else a free one, else that of the source which loses least by it, one without
    /// sessions; `None` if there is none.
    fn slot(&mut self, source: IpAddr) -> Option<&mut Slot> {
        let source = key(source);
        let group = self.group(source);
        let own = group.iter().position(|slot| slot.source == source);
        let index = own.or_else(|| {
            let idle = group.iter().enumerate().filter(|(_, slot)| slot.sessions == 0);
            idle.min_by_key(|(_, slot)| slot.full).map(|(index, _)| index)
        })?;
        let slot = group.get_mut(index)?;
        if own.is_none() {
            *slot = Slot {
                source,
                ..Slot::default()
            };
        }
        Some(slot)
    }

    /// The slots that `source` may be in; none without limits per source.
    fn group(&mut self, source: u64) -> &mut [Slot] {
        let hash = mix(mix(source ^ self.seed).wrapping_add(self.seed));
        let start = usize::try_from(hash % GROUPS as u64).unwrap_or(0) * WAYS;
        self.slots.get_mut(start..start + WAYS).unwrap_or_default()
    }
}

/// A source as a number: the first half of an IPv6 address; for IPv4 one in 0:ffff::/32, from where nobody comes
/// (0000::/8 is reserved, RFC 4291 §2.4).
fn key(source: IpAddr) -> u64 {
    match source.to_canonical() {
        IpAddr::V4(v4) => 0xffff_0000_0000 | u64::from(v4.to_bits()),
        IpAddr::V6(v6) => u64::try_from(v6.to_bits() >> 64).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    #[test]
    fn deny_wins_over_allow_and_both_see_through_mapped_addresses() {
        let mut limits = limits("allow = ['192.0.2.0/24', '2001:db8::/32']\ndeny = ['192.0.2.9']");
        for (source, answer) in [
            ("192.0.2.1", Ok(())),
            ("::ffff:192.0.2.1", Ok(())),
            ("2001:db8::1", Ok(())),
            ("192.0.2.9", Err(Refused::Denied)),
            ("::ffff:192.0.2.9", Err(Refused::Denied)),
            ("198.51.100.1", Err(Refused::Denied)),
            ("fe80::1", Err(Refused::Denied)),
        ] {
            assert_eq!(limits.admit(ip(source), at(0.0)), answer, "{source}");
        }
        let mut limits = self::limits("deny = ['192.0.2.0/24']");
        assert_eq!(limits.admit(ip("198.51.100.1"), at(0.0)), Ok(()), "everyone else may");
    }

    #[test]
    fn a_source_gets_its_burst_at_once_and_then_its_rate() {
        let mut limits = limits("source_rate = 10");
        let admitted = |limits: &mut Limits, seconds: f64| {
            let all = (0..100).filter(|_| limits.admit(ip("192.0.2.1"), at(seconds)).is_ok());
            all.count()
        };
        assert_eq!(admitted(&mut limits, 0.0), 20, "twice the rate");
        assert_eq!(limits.admit(ip("192.0.2.1"), at(0.05)), Err(Refused::Rate));
        assert_eq!(admitted(&mut limits, 0.1), 1);
        assert_eq!(admitted(&mut limits, 1.1), 10);
        assert_eq!(limits.admit(ip("192.0.2.2"), at(1.1)), Ok(()), "others are not touched");
        assert_eq!(admitted(&mut limits, 1000.0), 20);
    }

    #[test]
    fn one_ipv6_network_of_64_bits_is_one_source() {
        let mut limits = limits("source_rate = 1\nsource_burst = 1");
        assert_eq!(limits.admit(ip("2001:db8::1"), at(0.0)), Ok(()));
        assert_eq!(limits.admit(ip("2001:db8::2"), at(0.0)), Err(Refused::Rate));
        assert_eq!(limits.admit(ip("2001:db8:0:1::1"), at(0.0)), Ok(()));
        assert_eq!(limits.admit(ip("192.0.2.1"), at(0.0)), Ok(()));
        assert_eq!(limits.admit(ip("::ffff:192.0.2.1"), at(0.0)), Err(Refused::Rate));
    }

    #[test]
    fn sessions_are_limited_per_source_until_they_leave() {
        let mut limits = limits("source_sessions = 2");
        let (one, two) = (ip("192.0.2.1"), ip("2001:db8::1"));
        let mut open = |source| {
            let answer = limits.admit(source, at(0.0));
            if answer.is_ok() {
                limits.admitted(source);
            }
            answer
        };
        assert_eq!([open(one), open(one)], [Ok(()), Ok(())]);
        assert_eq!(open(one), Err(Refused::SourceSessions));
        assert_eq!(open(two), Ok(()));
        limits.left(one);
        assert_eq!(limits.admit(one, at(0.0)), Ok(()));
        limits.left(two);
        limits.left(two);
        limits.left(two);
        for answer in [Ok(()), Ok(()), Err(Refused::SourceSessions)] {
            let open = limits.admit(two, at(0.0)).inspect(|()| limits.admitted(two));
            assert_eq!(open, answer, "one that never was is no debt");
        }
    }

    #[test]
    fn a_refusal_costs_nothing() {
        let mut limits = limits("source_rate = 1\nsource_burst = 2\nsource_sessions = 1");
        let source = ip("192.0.2.1");
        assert_eq!(limits.admit(source, at(0.0)), Ok(()));
        limits.admitted(source);
        for _ in 0..10 {
            assert_eq!(limits.admit(source, at(0.0)), Err(Refused::SourceSessions));
        }
        limits.left(source);
        assert_eq!(limits.admit(source, at(0.0)), Ok(()));
        assert_eq!(limits.admit(source, at(0.0)), Err(Refused::Rate));
    }

    #[test]
    fn a_million_sources_take_no_more_than_a_mebibyte_and_a_flood_is_still_found_among_them() {
        let mut limits = limits("source_rate = 1\nsource_burst = 5\nsource_sessions = 1000");
        let flood = ip("192.0.2.1");
        let mut passed = 0;
        for number in 0..1_000_000_u32 {
            // 100,000 sources per second, each once; a tenth of that is the flood's.
            let now = at(f64::from(number) / 1e5);
            let source = IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + number));
            assert_eq!(limits.admit(source, now), Ok(()));
            if number % 10 == 0 && limits.admit(flood, now).is_ok() {
                passed += 1;
            }
        }
        assert!(limits.slots.len() * size_of::<Slot>() <= 1 << 20);
        assert!((14..=15).contains(&passed), "{passed} of 100,000 in 10 s");
    }

    #[test]
    fn a_source_with_sessions_is_never_pushed_out() {
        let mut limits = limits("source_rate = 1\nsource_sessions = 1");
        let held = ip("192.0.2.1");
        limits.admitted(held);
        for number in 0..1_000_000_u128 {
            let source = IpAddr::V6(Ipv6Addr::from_bits((0x2001_0db8 << 96) + (number << 64)));
            assert_eq!(limits.admit(source, at(100.0)), Ok(()));
        }
        assert_eq!(limits.admit(held, at(100.0)), Err(Refused::SourceSessions));
    }

    #[test]
    fn a_source_that_the_table_has_no_room_for_is_not_limited() {
        let mut limits = limits("source_sessions = 1");
        let source = |number: u32| IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + number));
        for number in 0..500_000 {
            limits.admitted(source(number));
        }
        let admitted = (500_000..501_000).filter(|number| limits.admit(source(*number), at(0.0)).is_ok());
        assert_eq!(admitted.count(), 1000);
        (0..500_000).for_each(|number| limits.left(source(number)));
        assert!(limits.slots.iter().all(|slot| slot.sessions == 0));
    }

    #[test]
    fn a_reload_keeps_buckets_and_sessions() {
        let mut limits = limits("source_rate = 1\nsource_burst = 100\nsource_sessions = 10");
        let source = ip("192.0.2.1");
        for _ in 0..100 {
            assert_eq!(limits.admit(source, at(0.0)), Ok(()));
        }
        limits.admitted(source);
        limits.reconfigure(&config("source_rate = 2\nsource_burst = 2\nsource_sessions = 1"));
        assert_eq!(limits.admit(source, at(0.1)), Err(Refused::SourceSessions));
        limits.left(source);
        assert_eq!(limits.admit(source, at(0.1)), Err(Refused::Rate));
        assert_eq!(
            limits.admit(source, at(0.7)),
            Ok(()),
            "the smaller bucket fills in its own time"
        );
        limits.reconfigure(&config("allow = [\"192.0.2.0/24\"]"));
        assert!(limits.slots.is_empty());
        assert_eq!(limits.admit(source, at(0.7)), Ok(()));
    }

    #[test]
    fn every_reason_has_its_counter() {
        let names = crate::status::Refusals::default().by_reason().map(|(name, _)| name);
        for refused in [
            Refused::Denied,
            Refused::Rate,
            Refused::Sessions,
            Refused::SourceSessions,
        ] {
            assert!(names.contains(&refused.name()));
        }
    }

    fn config(text: &str) -> config::Limits {
        toml::from_str(text).expect("the example parses")
    }

    fn limits(text: &str) -> Limits {
        Limits::of(&config(text), 7)
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn at(seconds: f64) -> Moment {
        Moment::new(Duration::from_secs(1000) + Duration::from_secs_f64(seconds))
    }
}
