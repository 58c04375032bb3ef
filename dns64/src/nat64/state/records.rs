//! What outlives the process: bindings and sessions as numbers in shared memory, valid whatever instruction was the last.
//!
//! A record's first word says that it is there, and is written last when it is made and first when it ends. All else about a
//! session is one word each, so that no half-written one is ever read. Indexes, timers and ports are not here: whoever takes
//! the memory over makes them anew from the records.
//!
//! ```text
//! word 0      what this is: version, how many bindings and sessions there is room for, each below 2^24
//! words 1, 2  how many of the bindings and of the sessions were ever in use
//! bindings    4 words each: LIVE, protocol, port in IPv6, port in IPv4 | IPv6 address | IPv4 address, when it was made
//! sessions    3 words each: LIVE, TCP state, remote port | remote address, binding | deadline
//! ```

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    sync::atomic::{
        AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
    },
};

use super::Protocol;

/// In the first two octets of word 0; another layout gets another number.
const VERSION: u64 = 0x6e01;
const HEADER: usize = 3;
const BINDING: usize = 4;
const SESSION: usize = 3;
/// In the first octet of a record that is there.
const LIVE: u64 = 0xa5;

/// The memory, and how it is dealt out.
#[derive(Debug)]
pub(super) struct Records {
    memory: &'static [AtomicU64],
    pub(super) bindings: usize,
    pub(super) sessions: usize,
}

/// Whose port is whose (RFC 6146 §3.1, an entry of a BIB).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Of what.
    pub protocol: Protocol,
    /// The host.
    pub v6: (Ipv6Addr, u16),
    /// What it is seen as; a port is an identifier for ICMP.
    pub v4: (Ipv4Addr, u16),
    /// When it was made, in seconds of the clock that the table is given.
    pub made: u32,
}

/// With whom the host of a binding speaks (RFC 6146 §3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Session {
    pub(super) binding: u32,
    pub(super) remote: (Ipv4Addr, u16),
    /// That of TCP, else 0.
    pub(super) state: u8,
    /// In milliseconds.
    pub(super) deadline: u64,
}

/// Words that so many bindings and sessions take.
pub(super) const fn words(bindings: usize, sessions: usize) -> usize {
    HEADER + bindings * BINDING + sessions * SESSION
}

impl Records {
    /// In `memory`, which has [`words`] words: zeros, or what another process left. What was laid out otherwise is forgotten.
    /// `None` if there is too little of it, or more than can be numbered.
    pub(super) fn new(memory: &'static [AtomicU64], bindings: usize, sessions: usize) -> Option<Self> {
        let most = 1 << 24;
        if memory.len() < words(bindings, sessions) || bindings >= most || sessions >= most {
            return None;
        }
        let what = VERSION << 48 | (bindings as u64) << 24 | sessions as u64;
        let found = memory[0].load(Acquire);
        if found != what {
            // Untouched memory is not touched: it would count as used from then on.
            let other = if found == 0 { &memory[..HEADER] } else { memory };
            other.iter().for_each(|word| word.store(0, Relaxed));
            memory[0].store(what, Release);
        }
        Some(Self {
            memory,
            bindings,
            sessions,
        })
    }

    /// How many bindings and sessions were ever in use: records from there on were never written to.
    pub(super) fn reached(&self) -> (u32, u32) {
        let reached = |at: usize, most: usize| self.memory[at].load(Acquire).min(most as u64) as u32;
        (reached(1, self.bindings), reached(2, self.sessions))
    }

    /// Says so, before the first of them is written.
    pub(super) fn reach_binding(&self, count: u32) {
        self.memory[1].store(count.into(), Release);
    }

    pub(super) fn reach_session(&self, count: u32) {
        self.memory[2].store(count.into(), Release);
    }

    /// Binding `number`, if it is there and makes sense.
    pub(super) fn binding(&self, number: u32) -> Option<Binding> {
        let [first, high, low, rest] = self.binding_words(number)?;
        let first = first.load(Acquire);
        if first >> 56 != LIVE {
            return None;
        }
        let rest = rest.load(Relaxed);
        Some(Binding {
            protocol: Protocol::numbered((first >> 48) as u8)?,
            v6: (
                Ipv6Addr::from_bits(u128::from(high.load(Relaxed)) << 64 | u128::from(low.load(Relaxed))),
                (first >> 16) as u16,
            ),
            v4: (Ipv4Addr::from_bits((rest >> 32) as u32), first as u16),
            made: rest as u32,
        })
    }

    pub(super) fn add_binding(&self, number: u32, binding: &Binding) {
        let Some([first, high, low, rest]) = self.binding_words(number) else {
            return;
        };
        let address = binding.v6.0.to_bits();
        high.store((address >> 64) as u64, Relaxed);
        low.store(address as u64, Relaxed);
        rest.store(
            u64::from(binding.v4.0.to_bits()) << 32 | u64::from(binding.made),
            Relaxed,
        );
        let ports = u64::from(binding.v6.1) << 16 | u64::from(binding.v4.1);
        first.store(LIVE << 56 | (binding.protocol as u64) << 48 | ports, Release);
    }

    pub(super) fn end_binding(&self, number: u32) {
        if let Some([first, ..]) = self.binding_words(number) {
            first.store(0, Release);
        }
    }

    /// Session `number`, if it is there.
    pub(super) fn session(&self, number: u32) -> Option<Session> {
        let [first, ends, deadline] = self.session_words(number)?;
        let first = first.load(Acquire);
        let ends = ends.load(Relaxed);
        (first >> 56 == LIVE).then(|| Session {
            binding: ends as u32,
            remote: (Ipv4Addr::from_bits((ends >> 32) as u32), first as u16),
            state: (first >> 48) as u8,
            deadline: deadline.load(Relaxed),
        })
    }

    pub(super) fn add_session(&self, number: u32, session: &Session) {
        let Some([first, ends, deadline]) = self.session_words(number) else {
            return;
        };
        deadline.store(session.deadline, Relaxed);
        let remote = u64::from(session.remote.0.to_bits());
        ends.store(remote << 32 | u64::from(session.binding), Relaxed);
        first.store(first_of(session.state, session.remote.1), Release);
    }

    /// Writes what packets change.
    pub(super) fn renew_session(&self, number: u32, session: &Session) {
        if let Some([first, _, deadline]) = self.session_words(number) {
            first.store(first_of(session.state, session.remote.1), Relaxed);
            deadline.store(session.deadline, Relaxed);
        }
    }

    pub(super) fn end_session(&self, number: u32) {
        if let Some([first, ..]) = self.session_words(number) {
            first.store(0, Release);
        }
    }

    fn binding_words(&self, number: u32) -> Option<&[AtomicU64; BINDING]> {
        let number = number as usize;
        let at = HEADER + number * BINDING;
        (number < self.bindings)
            .then(|| self.memory.get(at..)?.first_chunk())
            .flatten()
    }

    fn session_words(&self, number: u32) -> Option<&[AtomicU64; SESSION]> {
        let number = number as usize;
        let at = HEADER + self.bindings * BINDING + number * SESSION;
        (number < self.sessions)
            .then(|| self.memory.get(at..)?.first_chunk())
            .flatten()
    }
}

fn first_of(state: u8, port: u16) -> u64 {
    LIVE << 56 | u64::from(state) << 48 | u64::from(port)
}

#[cfg(test)]
pub(super) fn zeros(words: usize) -> &'static [AtomicU64] {
    Box::leak((0..words).map(|_| AtomicU64::new(0)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nat64::testing::{ip4, ip6};

    fn binding() -> Binding {
        Binding {
            protocol: Protocol::Udp,
            v6: (ip6("2001:db8::1:2"), 40_000),
            v4: (ip4("192.0.2.1"), 65_001),
            made: 77,
        }
    }

    #[test]
    fn what_was_written_is_read_also_by_who_comes_later() {
        let memory = zeros(words(3, 5));
        let session = Session {
            binding: 2,
            remote: (ip4("198.51.100.7"), 443),
            state: 3,
            deadline: u64::MAX - 1,
        };
        {
            let records = Records::new(memory, 3, 5).expect("room");
            assert_eq!(records.binding(2), None);
            records.add_binding(2, &binding());
            records.add_session(4, &session);
            records.add_session(0, &session);
            records.end_session(0);
        }
        let records = Records::new(memory, 3, 5).expect("room");
        assert_eq!(records.binding(2), Some(binding()));
        assert_eq!(records.session(4), Some(session));
        assert_eq!(records.session(0), None);
        let renewed = Session {
            state: 7,
            deadline: 9,
            ..session
        };
        records.renew_session(4, &renewed);
        assert_eq!(records.session(4), Some(renewed));
        records.end_binding(2);
        assert_eq!(records.binding(2), None);
    }

    #[test]
    fn memory_of_another_shape_is_begun_anew_and_too_little_is_refused() {
        let memory = zeros(words(4, 4));
        let records = Records::new(memory, 4, 4).expect("room");
        records.add_binding(0, &binding());
        let records = Records::new(memory, 3, 4).expect("room");
        assert!((0..3).all(|number| records.binding(number).is_none()));
        assert!(Records::new(memory, 5, 4).is_none());
        assert_eq!((records.binding(3), records.session(4)), (None, None), "beyond the end");
    }
}
