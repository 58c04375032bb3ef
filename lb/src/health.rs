//! Health of one backend: what its failed connects ([`Record`]) and its active checks ([`Checks`]) say.
//!
//! Passive health counts failed connects, either in a true sliding window or exactly as nginx's stream module does,
//! and bans. A ban ends with one connection, the probe, that finds out for all; the next one in a row is twice as long.
//! Active health counts answers in a row.
//! A verdict that rests on timeouts alone asks for a proof of life first: silence is also what a lost packet or a busy
//! machine looks like. Pure: `now` comes in, verdicts go out.

use std::{collections::VecDeque, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{config::Passive as Rules, moment::Moment};

/// A sign of life at most this old outweighs a verdict that rests on timeouts alone.
pub const PROOF: Duration = Duration::from_secs(2);

/// A probe is answered by the connect timeout; one that is this much later will not be.
const LAPSE: Duration = Duration::from_secs(1);

/// Why a connect failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Answered with a reset: ECONNREFUSED.
    Refused,
    /// Reset while connecting: ECONNRESET.
    Reset,
    /// No way there: EHOSTUNREACH, ENETUNREACH.
    Unreachable,
    /// No answer within the connect timeout, or ETIMEDOUT.
    Timeout,
    /// This machine's own fault (descriptors, ports); never counted against the backend.
    Local,
}

impl Failure {
    /// For people.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Refused => "connect refused",
            Self::Reset => "connect reset",
            Self::Unreachable => "host unreachable",
            Self::Timeout => "connect timed out",
            Self::Local => "local error",
        }
    }

    /// As in a snapshot; what another version wrote and this one does not know is no timeout, which is the side on
    /// which no proof is asked for.
    fn from_text(text: &str) -> Self {
        let known = [Self::Refused, Self::Reset, Self::Unreachable, Self::Timeout];
        known
            .into_iter()
            .find(|failure| failure.text() == text)
            .unwrap_or(Self::Unreachable)
    }
}

/// The answer of one active check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CheckOutcome {
    /// A TCP connect, or 2xx, 401 or 403.
    Good,
    /// 5xx: alive, but asks for no new sessions. The text becomes the state's reason.
    NotReady(String),
    /// Refused, TLS failure, timeout and all else.
    Bad {
        /// The fact, for people: `connect refused`.
        reason: String,
        /// Nothing came back in time, which a proof of life outweighs.
        timeout: bool,
    },
}

/// How many answers of the active check in a row decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rounds {
    /// Good ones that bring a backend up; 0 is taken as 1.
    pub rise: u32,
    /// Bad ones that take a backend down; 0 is taken as 1.
    pub fall: u32,
}

/// The rules and the one timeout that passive health goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Window, ban and profile.
    pub rules: Rules,
    /// By when a probe is answered.
    pub connect_timeout: Duration,
}

/// What passive health says about new connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Not banned.
    In,
    /// Banned.
    Out,
    /// The ban has run out: the next connection is the probe.
    Due,
    /// The probe is under way.
    Probing,
}

/// What a failed connect led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// One more, not enough for a ban.
    Counted {
        /// How many there are, for people: `1 of 2 failures within 10 s`.
        tally: String,
    },
    /// Banned from now on.
    Banned {
        /// What it rests on, for people: `2 of 2 failures within 10 s`, `the probe failed`.
        tally: String,
        /// It was not in since the last ban: its probe failed.
        again: bool,
        /// For how long, for people: `10 s`, `20 s, the 2nd time in a row`.
        term: String,
    },
    /// There would be a ban, but there is a proof of life.
    Vetoed {
        /// What the ban would have rested on.
        tally: String,
    },
    /// It was banned already.
    AlreadyOut,
}

/// One backend's failed connects and what they led to.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    counter: Counter,
    /// Some = not in. In nginx's profile this goes hand in hand with `fails >= max_fails`.
    ban: Option<Ban>,
    /// Bans in a row, the one that runs included. In good standing it shrinks; see [`Record::row`].
    bans: u32,
    /// Since when it is in good standing; without meaning while there is a ban or none was before.
    good: Moment,
}

#[derive(Clone, Debug, PartialEq)]
enum Counter {
    /// Failures of the last `fail_timeout`, oldest first, at most `max_fails`.
    Sliding(VecDeque<Fault>),
    Nginx(Fails),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fault {
    at: Moment,
    failure: Failure,
}

/// nginx's own variables (ngx_stream_upstream_rr_peer_t); times in whole seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Fails {
    fails: u32,
    /// When the last failure was.
    accessed: u64,
    /// When the last failure was, or the first pick more than `fail_timeout` after it.
    checked: u64,
    /// All failures since the last zeroing were timeouts.
    timeouts: bool,
}

#[derive(Clone, Debug, PartialEq)]
struct Ban {
    /// When it was last in. A connect that began later and succeeded ends the ban; one that was under way says nothing
    /// that the window does not know.
    first: Moment,
    /// The latest verdict.
    since: Moment,
    cause: String,
    /// When the probe began.
    probe: Option<Moment>,
}

impl Record {
    /// No failures.
    pub fn new(rules: &Rules) -> Self {
        let counter = if rules.nginx {
            Counter::Nginx(Fails::default())
        } else {
            Counter::Sliding(VecDeque::new())
        };
        Self {
            counter,
            ban: None,
            bans: 0,
            good: Moment::default(),
        }
    }

    /// Bans in a row, the next one not included: each `fail_timeout` in good standing takes one back, counted from the
    /// first one of the longest (the rule of Envoy's outlier detection).
    fn row(&self, rules: &Rules, now: Moment) -> u32 {
        if self.ban.is_some() {
            return self.bans;
        }
        let steps = (now - self.good).as_millis() / rules.fail_timeout.as_millis().max(1);
        if steps == 0 {
            return self.bans;
        }
        let longest = (1..=self.bans).find(|bans| length(rules, *bans) >= rules.max_ban);
        let steps = u32::try_from(steps).unwrap_or(u32::MAX);
        longest.unwrap_or(self.bans).saturating_sub(steps)
    }

    /// Whether new connections may go there.
    pub fn standing(&self, terms: &Terms, now: Moment) -> Standing {
        let Some(ban) = &self.ban else { return Standing::In };
        let over = match (&self.counter, ban.probe) {
            // A probe that is never answered lapses by the same rule, since its pick renewed `checked`.
            (Counter::Nginx(fails), _) => fails.stale(&terms.rules, now),
            (Counter::Sliding(_), None) => now - ban.since >= length(&terms.rules, self.bans),
            (Counter::Sliding(_), Some(at)) => now - at > terms.connect_timeout + LAPSE,
        };
        match (over, ban.probe) {
            (true, _) => Standing::Due,
            (false, None) => Standing::Out,
            (false, Some(_)) => Standing::Probing,
        }
    }

    /// A connection goes there in the ordinary choice; true if it is the probe.
    pub fn picked(&mut self, terms: &Terms, now: Moment) -> bool {
        let due = self.standing(terms, now) == Standing::Due;
        if let Counter::Nginx(fails) = &mut self.counter
            && fails.stale(&terms.rules, now)
        {
            fails.checked = now.as_secs();
        }
        if let Some(ban) = self.ban.as_mut().filter(|_| due) {
            ban.probe = Some(now);
        }
        due
    }

    /// The probe ended without an answer from the backend: the next connection probes instead.
    pub fn gave_up(&mut self) {
        if let Some(ban) = &mut self.ban
            && ban.probe.take().is_some()
            && let Counter::Nginx(fails) = &mut self.counter
        {
            // As it was before the probe's pick renewed it.
            fails.checked = ban.since.as_secs();
        }
    }

    /// The ban runs out now: the next connection is the probe. nginx's go on.
    pub fn hasten(&mut self, terms: &Terms, now: Moment) {
        if let (Counter::Sliding(_), Some(ban)) = (&self.counter, &mut self.ban) {
            let over = now.since_boot().saturating_sub(length(&terms.rules, self.bans));
            ban.since = ban.since.min(Moment::new(over));
        }
    }

    /// A connect that began at `began` succeeded; true if that ended a ban.
    ///
    /// Sliding: only a connect that began after the ban forgives, and it forgives all; otherwise the window stays as it
    /// is. nginx: `fails` is zeroed if the pick came more than `fail_timeout` after the last failure; a connection that
    /// began after the ban without being the probe (all were out, which nginx does not try) zeroes as well.
    pub fn succeeded(&mut self, began: Moment, now: Moment) -> bool {
        let answers = self.ban.as_ref().is_some_and(|ban| began >= ban.first);
        let forgives = match &self.counter {
            Counter::Sliding(_) => answers,
            Counter::Nginx(fails) => answers || fails.accessed < fails.checked,
        };
        forgives && self.pardon(now)
    }

    /// Forgets every failure; true if that ended a ban.
    pub fn pardon(&mut self, now: Moment) -> bool {
        match &mut self.counter {
            Counter::Sliding(window) => window.clear(),
            Counter::Nginx(fails) => fails.fails = 0,
        }
        let ended = self.ban.take().is_some();
        if ended {
            self.good = now;
        }
        ended
    }

    /// A connect failed, and not by this machine's fault. `alive` is asked only if a ban would rest on timeouts alone.
    ///
    /// Sliding: the failures in (`now` - `fail_timeout`, `now`] count; one that is exactly `fail_timeout` old does not.
    /// nginx: every failure counts until a success zeroes them, and one while banned prolongs the ban. `max_fails` is
    /// not 0 here: then nothing is to be counted.
    pub fn failed(&mut self, terms: &Terms, failure: Failure, alive: impl FnOnce() -> bool, now: Moment) -> Verdict {
        let standing = self.standing(terms, now);
        let most = terms.rules.max_fails;
        let (count, tally, timeouts) = match &mut self.counter {
            Counter::Sliding(_) if standing != Standing::In => (most, String::new(), failure == Failure::Timeout),
            Counter::Sliding(window) => {
                window.retain(|fault| now - fault.at < terms.rules.fail_timeout);
                while window.len() >= most.max(1) as usize {
                    window.pop_front();
                }
                window.push_back(Fault { at: now, failure });
                let count = u32::try_from(window.len()).unwrap_or(u32::MAX);
                let tally = format!("{count} of {most} failures within {}", text(terms.rules.fail_timeout));
                (
                    count,
                    tally,
                    window.iter().all(|fault| fault.failure == Failure::Timeout),
                )
            }
            Counter::Nginx(fails) => {
                fails.count(failure, now);
                (
                    fails.fails,
                    format!("{} of {most} failures", fails.fails),
                    fails.timeouts,
                )
            }
        };
        let tally = match standing {
            Standing::In if count < most => return Verdict::Counted { tally },
            Standing::In => tally,
            Standing::Due | Standing::Probing => "the probe failed".to_owned(),
            Standing::Out => {
                if let (Counter::Nginx(_), Some(ban)) = (&self.counter, &mut self.ban) {
                    ban.since = now;
                }
                return Verdict::AlreadyOut;
            }
        };
        if timeouts && alive() {
            self.veto();
            return Verdict::Vetoed { tally };
        }
        let again = standing != Standing::In;
        self.bans = self.row(&terms.rules, now).saturating_add(1);
        let first = self.ban.as_ref().map_or(now, |ban| ban.first);
        self.ban = Some(Ban {
            first,
            since: now,
            cause: format!("{}, {tally}", failure.text()),
            probe: None,
        });
        Verdict::Banned {
            tally,
            again,
            term: self.term(&terms.rules),
        }
    }

    /// How long the ban lasts, for people.
    fn term(&self, rules: &Rules) -> String {
        let length = text(length(rules, self.bans));
        match self.bans {
            0 | 1 => length,
            bans => format!("{length}, the {bans}{} time in a row", suffix(bans)),
        }
    }

    /// The failure stays on record, but nothing follows from it.
    fn veto(&mut self) {
        if let Counter::Nginx(fails) = &mut self.counter {
            // In nginx's profile this number alone decides about bans: a vetoed failure must not complete it.
            fails.fails = fails.fails.saturating_sub(1);
        }
        // A probe that is outweighed proves nothing either way: the next connection probes.
        if let Some(ban) = &mut self.ban {
            ban.probe = None;
            if let Counter::Nginx(fails) = &mut self.counter {
                fails.checked = ban.since.as_secs();
            }
        }
    }

    /// Goes on under other rules; true if that ended a ban.
    pub fn fit(&mut self, rules: &Rules) -> bool {
        if rules.max_fails == 0 {
            let ended = self.ban.is_some();
            *self = Self::new(rules);
            return ended;
        }
        match &mut self.counter {
            Counter::Sliding(window) if rules.nginx => {
                let last = self
                    .ban
                    .as_ref()
                    .map(|ban| ban.since)
                    .or(window.back().map(|fault| fault.at));
                let last = last.unwrap_or_default().as_secs();
                let probed = self
                    .ban
                    .as_ref()
                    .and_then(|ban| ban.probe)
                    .map_or(last, Moment::as_secs);
                let timeouts = window.iter().all(|fault| fault.failure == Failure::Timeout);
                let fails = if self.ban.is_some() {
                    rules.max_fails
                } else {
                    window.len().try_into().unwrap_or(u32::MAX)
                };
                self.counter = Counter::Nginx(Fails {
                    fails,
                    accessed: last,
                    checked: probed,
                    timeouts,
                });
            }
            Counter::Nginx(fails) if !rules.nginx => {
                let at = Moment::new(Duration::from_secs(fails.accessed));
                let failure = if fails.timeouts {
                    Failure::Timeout
                } else {
                    Failure::Unreachable
                };
                let count = fails.fails.min(rules.max_fails.saturating_sub(1)) as usize;
                self.counter = Counter::Sliding(std::iter::repeat_n(Fault { at, failure }, count).collect());
            }
            Counter::Sliding(_) | Counter::Nginx(_) => {}
        }
        let Counter::Nginx(fails) = &mut self.counter else {
            return false;
        };
        if fails.fails < rules.max_fails {
            self.bans = 0;
            return self.ban.take().is_some();
        }
        if self.ban.is_none() {
            // A lower `max_fails` bans from the next failure on: a change of rules alone takes nobody out.
            fails.fails = rules.max_fails.saturating_sub(1);
        }
        false
    }

    /// When the latest verdict took it out.
    pub fn out_since(&self) -> Option<Moment> {
        self.ban.as_ref().map(|ban| ban.since)
    }

    /// Why it is not in, for people: `connect refused, 2 of 2 failures within 10 s; probed again in 7 s`.
    pub fn reason(&self, terms: &Terms, now: Moment) -> Option<String> {
        let ban = self.ban.as_ref()?;
        let next = match self.standing(terms, now) {
            Standing::In => return None,
            Standing::Due => "the next connection probes it".to_owned(),
            Standing::Probing => "one connection is finding out".to_owned(),
            Standing::Out => {
                let left = match &self.counter {
                    Counter::Sliding(_) => length(&terms.rules, self.bans).saturating_sub(now - ban.since),
                    Counter::Nginx(fails) => {
                        let end = fails
                            .checked
                            .saturating_add(terms.rules.fail_timeout.as_secs())
                            .saturating_add(1);
                        Moment::new(Duration::from_secs(end)) - now
                    }
                };
                format!("probed again in {} s", left.as_millis().div_ceil(1000))
            }
        };
        let term = match self.bans {
            0 | 1 => String::new(),
            _ => format!("banned for {}; ", self.term(&terms.rules)),
        };
        Some(format!("{}; {term}{next}", ban.cause))
    }

    /// For a snapshot.
    pub fn save(&self) -> SavedRecord {
        let ban = self.ban.as_ref().map(|ban| SavedBan {
            first: ban.first,
            since: ban.since,
            cause: ban.cause.clone(),
        });
        let mut saved = SavedRecord {
            ban,
            bans: self.bans,
            good: self.good,
            ..SavedRecord::default()
        };
        match &self.counter {
            Counter::Sliding(window) => {
                let fault = |fault: &Fault| SavedFault {
                    at: fault.at,
                    failure: fault.failure.text().to_owned(),
                };
                saved.window = window.iter().map(fault).collect();
            }
            Counter::Nginx(fails) => {
                // The worker that reads this has no probe under way: its next connection is one.
                let checked = match &self.ban {
                    Some(Ban {
                        since, probe: Some(_), ..
                    }) => since.as_secs(),
                    _ => fails.checked,
                };
                saved.nginx = Some(Fails { checked, ..*fails });
            }
        }
        saved
    }

    /// From a snapshot. What claims to have happened after `now` (another boot) happened now, so that no ban outlasts
    /// its length.
    pub fn restore(saved: &SavedRecord, rules: &Rules, now: Moment) -> Self {
        let counter = saved.nginx.map_or_else(
            || {
                let fault = |fault: &SavedFault| Fault {
                    at: fault.at.min(now),
                    failure: Failure::from_text(&fault.failure),
                };
                Counter::Sliding(saved.window.iter().map(fault).collect())
            },
            |fails| {
                let (accessed, checked) = (fails.accessed.min(now.as_secs()), fails.checked.min(now.as_secs()));
                Counter::Nginx(Fails {
                    accessed,
                    checked,
                    ..fails
                })
            },
        );
        let ban = saved.ban.as_ref().map(|ban| Ban {
            first: ban.first.min(now),
            since: ban.since.min(now),
            cause: ban.cause.clone(),
            probe: None,
        });
        let mut record = Self {
            counter,
            ban,
            // A version whose bans did not grow wrote no number.
            bans: saved.bans.max(u32::from(saved.ban.is_some())),
            good: saved.good.min(now),
        };
        record.fit(rules);
        record
    }
}

impl Fails {
    /// More than `fail_timeout` since `checked`, in whole seconds: 10 to 11 s for 10 s.
    fn stale(&self, rules: &Rules, now: Moment) -> bool {
        now.as_secs().saturating_sub(self.checked) > rules.fail_timeout.as_secs()
    }

    fn count(&mut self, failure: Failure, now: Moment) {
        self.timeouts = failure == Failure::Timeout && (self.fails == 0 || self.timeouts);
        self.fails = self.fails.saturating_add(1);
        self.accessed = now.as_secs();
        self.checked = now.as_secs();
    }
}

/// How long the `bans`th ban in a row lasts: twice as long as the one before, up to `max_ban`. nginx's are all alike.
fn length(rules: &Rules, bans: u32) -> Duration {
    if rules.nginx {
        return rules.fail_timeout;
    }
    let double = 2_u32.saturating_pow(bans.saturating_sub(1));
    let grown = rules.fail_timeout.saturating_mul(double);
    grown.min(rules.max_ban).max(rules.fail_timeout)
}

/// Of an ordinal number, for people: 2nd, 3rd, 11th.
const fn suffix(number: u32) -> &'static str {
    match (number % 100, number % 10) {
        (11..=13, _) => "th",
        (_, 1) => "st",
        (_, 2) => "nd",
        (_, 3) => "rd",
        _ => "th",
    }
}

/// What an active check's answer led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Nothing that was not known.
    Same,
    /// The answer is another than the last one; the text says which.
    Changed(String),
    /// Down from now on, and why.
    Down(String),
    /// Down no more, and why.
    Up(String),
    /// It would be down, but there is a proof of life; `first` of its kind in a row.
    Vetoed {
        /// Not said before.
        first: bool,
        /// What the verdict would have rested on.
        reason: String,
    },
}

/// One backend's active checks and what they led to. Never checked = presumed good.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Checks {
    /// Good or not-ready answers in a row.
    alive: u32,
    /// Bad ones in a row.
    bad: u32,
    /// The bad ones in a row are all timeouts.
    timeouts: bool,
    /// A veto of the bad ones in a row has been told.
    vetoed: bool,
    /// Asked for no new sessions and has not been good since.
    not_ready: bool,
    /// The last answer was the wish for no new sessions.
    unready: bool,
    /// Since when it is down.
    down: Option<Moment>,
    /// The last answer that was not good, for people.
    reason: String,
}

impl Checks {
    /// Since when it is down.
    pub const fn down(&self) -> Option<Moment> {
        self.down
    }

    /// It asks for no new sessions.
    pub const fn not_ready(&self) -> bool {
        self.not_ready
    }

    /// Why it is down or not ready, for people.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Enough answers in a row say that it is alive.
    pub fn risen(&self, rounds: Rounds) -> bool {
        self.alive >= rounds.rise.max(1)
    }

    /// Only later answers speak for it.
    pub const fn restart(&mut self) {
        self.alive = 0;
    }

    /// Takes over what a predecessor saw; nothing happened after `now`.
    pub fn restored(mut self, now: Moment) -> Self {
        self.down = self.down.map(|since| since.min(now));
        self
    }

    /// One more answer. `alive` is asked only if the verdict would rest on timeouts alone.
    pub fn answered(
        &mut self,
        rounds: Rounds,
        outcome: CheckOutcome,
        alive: impl FnOnce() -> bool,
        now: Moment,
    ) -> Turn {
        match outcome {
            CheckOutcome::Bad { reason, timeout } => self.answered_badly(rounds, reason, timeout, alive, now),
            CheckOutcome::Good => self.answered_alive(rounds, None),
            CheckOutcome::NotReady(reason) => self.answered_alive(rounds, Some(reason)),
        }
    }

    fn answered_badly(
        &mut self,
        rounds: Rounds,
        reason: String,
        timeout: bool,
        alive: impl FnOnce() -> bool,
        now: Moment,
    ) -> Turn {
        let fall = rounds.fall.max(1);
        let first = self.bad == 0;
        self.timeouts = timeout && (first || self.timeouts);
        self.alive = 0;
        self.bad = self.bad.saturating_add(1);
        self.unready = false;
        if self.down.is_some() {
            self.reason = failed_in_a_row(self.bad, &reason);
            // While down, an answer is told only if one of the other kind came in between.
            return if first {
                Turn::Changed(format!("check failed: {reason}"))
            } else {
                Turn::Same
            };
        }
        if self.bad < fall {
            return if first {
                Turn::Changed(format!("check failed: {reason} (1 of {fall})"))
            } else {
                Turn::Same
            };
        }
        let verdict = failed_in_a_row(self.bad, &reason);
        if self.timeouts && alive() {
            let first = !std::mem::replace(&mut self.vetoed, true);
            return Turn::Vetoed { first, reason: verdict };
        }
        self.down = Some(now);
        self.reason.clone_from(&verdict);
        Turn::Down(verdict)
    }

    /// `not_ready`: the wish for no new sessions that came with the answer.
    fn answered_alive(&mut self, rounds: Rounds, not_ready: Option<String>) -> Turn {
        let after_bad = self.bad > 0;
        let wish_before = std::mem::replace(&mut self.unready, not_ready.is_some());
        self.alive = self.alive.saturating_add(1);
        (self.bad, self.vetoed) = (0, false);
        let told = match &not_ready {
            Some(reason) if after_bad || !wish_before => Some(reason.clone()),
            None if after_bad || wish_before => Some("check good again".to_owned()),
            _ => None,
        };
        let rises = self.down.is_some() && self.risen(rounds);
        if self.down.is_some() && !rises {
            return told.map_or(Turn::Same, |told| {
                Turn::Changed(format!("{told} ({} of {})", self.alive, rounds.rise))
            });
        }
        self.down = None;
        self.not_ready = not_ready.is_some();
        if let Some(reason) = not_ready {
            self.reason = reason;
        }
        if rises && !self.not_ready {
            return Turn::Up(good_in_a_row(self.alive));
        }
        if rises {
            return Turn::Changed(format!("alive again, but not ready: {}", self.reason));
        }
        told.map_or(Turn::Same, Turn::Changed)
    }
}

/// For people.
pub fn good_in_a_row(count: u32) -> String {
    if count == 1 {
        "1 check good".to_owned()
    } else {
        format!("{count} checks good in a row")
    }
}

fn failed_in_a_row(count: u32, reason: &str) -> String {
    if count == 1 {
        format!("1 check failed: {reason}")
    } else {
        format!("{count} checks failed in a row: {reason}")
    }
}

/// A [`Record`] as it is written down.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SavedRecord {
    window: Vec<SavedFault>,
    nginx: Option<Fails>,
    ban: Option<SavedBan>,
    bans: u32,
    good: Moment,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct SavedFault {
    at: Moment,
    failure: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct SavedBan {
    first: Moment,
    since: Moment,
    cause: String,
}

/// A duration for people: `10 s`, `1.5 s`, `250 ms`, `90 µs`.
pub fn text(duration: Duration) -> String {
    match (duration.as_secs(), duration.subsec_millis()) {
        (0, 0) => format!("{} µs", duration.subsec_micros()),
        (0, millis) => format!("{millis} ms"),
        (seconds, 0) => format!("{seconds} s"),
        _ => format!("{:.1} s", duration.as_secs_f64()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_at_0_and_9_s_ban_and_failures_at_0_and_11_s_do_not() {
        let bans = |second: f64| {
            let mut record = Record::new(&SLIDING.rules);
            refuse(&mut record, &SLIDING, 0.0);
            banned(&refuse(&mut record, &SLIDING, second))
        };
        assert!(bans(9.0));
        assert!(bans(9.999));
        assert!(
            !bans(10.0),
            "the window is open on the left: exactly fail_timeout ago is gone"
        );
        assert!(!bans(11.0));
    }

    #[test]
    fn a_success_does_not_empty_the_sliding_window() {
        let mut record = Record::new(&SLIDING.rules);
        refuse(&mut record, &SLIDING, 0.0);
        assert!(!record.succeeded(at(5.0), at(5.0)));
        assert!(banned(&refuse(&mut record, &SLIDING, 9.0)));
    }

    #[test]
    fn the_sliding_window_holds_no_more_than_max_fails() {
        let mut record = Record::new(&SLIDING.rules);
        for _ in 0..1000 {
            record.failed(&SLIDING, Failure::Timeout, || true, at(1.0));
        }
        let Counter::Sliding(window) = &record.counter else {
            panic!("sliding")
        };
        assert_eq!(window.len(), 2);
    }

    #[test]
    fn a_success_that_was_under_way_before_the_ban_does_not_end_it() {
        let mut record = Record::new(&SLIDING.rules);
        refuse(&mut record, &SLIDING, 1.0);
        refuse(&mut record, &SLIDING, 1.0);
        assert!(!record.succeeded(at(0.9), at(0.9)));
        assert_eq!(record.standing(&SLIDING, at(1.0)), Standing::Out);
        assert!(
            record.succeeded(at(1.1), at(1.1)),
            "a later one shows that it is back, whoever made it"
        );
        assert_eq!(record.standing(&SLIDING, at(1.1)), Standing::In);
    }

    #[test]
    fn nginx_fact_a_a_success_between_two_failures_does_not_prevent_the_ban() {
        let terms = nginx(2);
        let mut record = Record::new(&terms.rules);
        refuse(&mut record, &terms, 0.0);
        connect(&mut record, &terms, 5.0);
        assert!(banned(&refuse(&mut record, &terms, 9.0)));
    }

    #[test]
    fn nginx_fact_b_failures_at_0_9_and_18_s_ban_though_18_s_apart() {
        let terms = nginx(3);
        let mut record = Record::new(&terms.rules);
        refuse(&mut record, &terms, 0.0);
        refuse(&mut record, &terms, 9.0);
        assert!(banned(&refuse(&mut record, &terms, 18.0)));
    }

    #[test]
    fn nginx_fact_c_a_success_inside_the_window_does_not_forgive_and_one_after_it_does() {
        let terms = nginx(2);
        let fails_after_success_at = |seconds: f64| {
            let mut record = Record::new(&terms.rules);
            refuse(&mut record, &terms, 0.0);
            connect(&mut record, &terms, seconds);
            let Counter::Nginx(fails) = record.counter else {
                panic!("nginx")
            };
            fails.fails
        };
        assert_eq!(fails_after_success_at(1.0), 1);
        assert_eq!(fails_after_success_at(10.9), 1, "10.9 s are 10 whole seconds");
        assert_eq!(fails_after_success_at(11.0), 0);
    }

    #[test]
    fn nginx_counts_in_whole_seconds_so_a_ban_of_10_s_lasts_10_to_11_s() {
        let terms = nginx(1);
        for (failed, still, over) in [(0.0, 10.999, 11.0), (0.9, 10.999, 11.0)] {
            let mut record = Record::new(&terms.rules);
            refuse(&mut record, &terms, failed);
            assert_eq!(record.standing(&terms, at(still)), Standing::Out);
            assert_eq!(record.standing(&terms, at(over)), Standing::Due);
        }
    }

    #[test]
    fn nginx_lets_one_connection_probe_and_everyone_else_skip_until_it_answers() {
        let terms = nginx(1);
        let mut record = Record::new(&terms.rules);
        refuse(&mut record, &terms, 0.0);
        assert!(record.picked(&terms, at(11.0)));
        assert_eq!(record.standing(&terms, at(11.0)), Standing::Probing);
        assert_eq!(record.standing(&terms, at(21.0)), Standing::Probing);
        assert_eq!(
            record.standing(&terms, at(22.0)),
            Standing::Due,
            "never answered: the same rule again"
        );
        assert!(record.succeeded(at(11.0), at(11.0)));
        assert_eq!(record.standing(&terms, at(22.0)), Standing::In);
    }

    #[test]
    fn an_nginx_probe_that_gives_up_leaves_the_next_connection_to_probe() {
        let terms = nginx(1);
        let mut record = Record::new(&terms.rules);
        refuse(&mut record, &terms, 0.0);
        assert!(record.picked(&terms, at(11.0)));
        record.gave_up();
        assert_eq!(record.standing(&terms, at(11.0)), Standing::Due);
        assert!(record.picked(&terms, at(11.0)));
    }

    #[test]
    fn an_nginx_failure_while_banned_prolongs_the_ban() {
        let terms = nginx(1);
        let mut record = Record::new(&terms.rules);
        refuse(&mut record, &terms, 0.0);
        assert_eq!(refuse(&mut record, &terms, 5.0), Verdict::AlreadyOut);
        assert_eq!(record.standing(&terms, at(15.0)), Standing::Out);
        assert_eq!(record.standing(&terms, at(16.0)), Standing::Due);
    }

    #[test]
    fn an_nginx_veto_leaves_the_counter_one_short_of_a_ban() {
        let terms = nginx(2);
        let mut record = Record::new(&terms.rules);
        let mut timeout = |alive: bool, seconds: f64| record.failed(&terms, Failure::Timeout, || alive, at(seconds));
        assert!(matches!(timeout(true, 0.0), Verdict::Counted { .. }));
        for seconds in [1.0, 2.0, 3.0] {
            assert!(matches!(timeout(true, seconds), Verdict::Vetoed { .. }));
        }
        assert!(banned(&timeout(false, 4.0)));
        assert!(record.picked(&terms, at(15.0)));
        assert!(matches!(
            record.failed(&terms, Failure::Timeout, || true, at(15.5)),
            Verdict::Vetoed { .. }
        ));
        assert_eq!(
            record.standing(&terms, at(15.5)),
            Standing::Due,
            "an outweighed probe proves nothing"
        );
    }

    #[test]
    fn an_nginx_refusal_since_the_last_zeroing_defeats_the_veto() {
        let terms = nginx(2);
        let mut record = Record::new(&terms.rules);
        refuse(&mut record, &terms, 0.0);
        assert!(banned(&record.failed(&terms, Failure::Timeout, || true, at(30.0))));
    }

    #[test]
    fn a_ban_survives_a_change_of_profile_and_ends_with_passive_health() {
        for (from, to) in [(SLIDING, nginx(2)), (nginx(2), SLIDING)] {
            let mut record = Record::new(&from.rules);
            refuse(&mut record, &from, 0.0);
            refuse(&mut record, &from, 0.0);
            assert!(!record.fit(&to.rules));
            assert_eq!(record.standing(&to, at(9.0)), Standing::Out);
            assert_eq!(record.standing(&to, at(11.0)), Standing::Due);
            assert!(record.fit(&Rules {
                max_fails: 0,
                ..to.rules
            }));
            assert_eq!(record.standing(&to, at(9.0)), Standing::In);
        }
    }

    #[test]
    fn failures_survive_a_change_of_profile() {
        for (from, to) in [(SLIDING, nginx(2)), (nginx(2), SLIDING)] {
            let mut record = Record::new(&from.rules);
            refuse(&mut record, &from, 0.0);
            record.fit(&to.rules);
            assert!(banned(&refuse(&mut record, &to, 5.0)));
        }
    }

    #[test]
    fn a_lower_max_fails_bans_from_the_next_failure_on() {
        for from in [
            nginx(5),
            Terms {
                rules: Rules {
                    max_fails: 5,
                    ..SLIDING.rules
                },
                ..SLIDING
            },
        ] {
            let mut record = Record::new(&from.rules);
            for _ in 0..4 {
                refuse(&mut record, &from, 0.0);
            }
            let to = Terms {
                rules: Rules {
                    max_fails: 2,
                    ..from.rules
                },
                ..from
            };
            record.fit(&to.rules);
            assert_eq!(record.standing(&to, at(0.0)), Standing::In);
            assert!(banned(&refuse(&mut record, &to, 1.0)));
        }
    }

    #[test]
    fn a_record_from_the_future_of_another_boot_bans_no_longer_than_fail_timeout() {
        for terms in [SLIDING, nginx(1)] {
            let mut record = Record::new(&terms.rules);
            refuse(&mut record, &terms, 1_000_000.0);
            refuse(&mut record, &terms, 1_000_000.0);
            let record = Record::restore(&record.save(), &terms.rules, at(0.0));
            assert_eq!(record.standing(&terms, at(9.9)), Standing::Out);
            assert_eq!(record.standing(&terms, at(11.0)), Standing::Due);
        }
    }

    #[test]
    fn bans_in_a_row_last_10_20_40_and_then_60_s() {
        let mut record = Record::new(&GROWING.rules);
        refuse(&mut record, &GROWING, 0.0);
        let mut now = 0.0;
        for (length, term) in [
            (10.0, "10 s"),
            (20.0, "20 s, the 2nd time in a row"),
            (40.0, "40 s, the 3rd time in a row"),
            (60.0, "60 s, the 4th time in a row"),
            (60.0, "60 s, the 5th time in a row"),
        ] {
            let Verdict::Banned { term: said, .. } = refuse(&mut record, &GROWING, now) else {
                panic!("banned")
            };
            assert_eq!(said, term);
            assert_eq!(record.standing(&GROWING, at(now + length - 0.1)), Standing::Out);
            now += length;
            assert_eq!(record.standing(&GROWING, at(now)), Standing::Due);
        }
    }

    #[test]
    fn each_fail_timeout_in_good_standing_takes_one_step_back_from_the_longest_ban() {
        // Seven bans in a row, then good since 0.
        for (good_for, term) in [
            (9.9, "60 s, the 8th time in a row"),
            (10.0, "60 s, the 4th time in a row"),
            (20.0, "40 s, the 3rd time in a row"),
            (30.0, "20 s, the 2nd time in a row"),
            (40.0, "10 s"),
            (4000.0, "10 s"),
        ] {
            let mut record = seven_bans();
            refuse(&mut record, &GROWING, good_for);
            let verdict = refuse(&mut record, &GROWING, good_for);
            assert!(
                matches!(&verdict, Verdict::Banned { term: said, again: false, .. } if said == term),
                "after {good_for} s: {verdict:?}"
            );
        }
    }

    #[test]
    fn how_often_it_was_banned_outlives_the_worker_and_a_reload() {
        let record = seven_bans();
        let saved = serde_json::to_string(&record.save()).expect("it serializes");
        let saved: SavedRecord = serde_json::from_str(&saved).expect("it reads");
        let mut heir = Record::restore(&saved, &GROWING.rules, at(1.0));
        assert_eq!(heir, record);
        heir.fit(&GROWING.rules);
        assert_eq!(heir, record);
        // A version whose bans did not grow wrote the ban alone.
        let old =
            r#"{"ban":{"first":{"secs":1000,"nanos":0},"since":{"secs":1000,"nanos":0},"cause":"connect refused"}}"#;
        let saved: SavedRecord = serde_json::from_str(old).expect("it reads");
        let mut heir = Record::restore(&saved, &GROWING.rules, at(1.0));
        assert_eq!(heir.standing(&GROWING, at(9.9)), Standing::Out);
        let verdict = refuse(&mut heir, &GROWING, 10.0);
        assert!(
            matches!(&verdict, Verdict::Banned { term, .. } if term == "20 s, the 2nd time in a row"),
            "{verdict:?}"
        );
    }

    #[test]
    fn nginx_bans_do_not_grow() {
        let mut terms = nginx(1);
        terms.rules.max_ban = Duration::from_secs(60);
        let mut record = Record::new(&terms.rules);
        for round in 0..5 {
            let now = f64::from(round) * 11.0;
            assert!(banned(&refuse(&mut record, &terms, now)));
            assert_eq!(record.standing(&terms, at(now + 10.9)), Standing::Out);
            assert_eq!(record.standing(&terms, at(now + 11.0)), Standing::Due);
        }
    }

    #[test]
    fn a_hastened_ban_is_probed_by_the_next_connection() {
        let mut record = Record::new(&GROWING.rules);
        refuse(&mut record, &GROWING, 0.0);
        refuse(&mut record, &GROWING, 0.0);
        record.hasten(&GROWING, at(1.0));
        assert!(record.picked(&GROWING, at(1.0)));
    }

    #[test]
    fn checks_take_a_backend_down_after_fall_bad_answers_in_a_row() {
        let mut checks = Checks::default();
        assert_eq!(
            bad(&mut checks, false),
            Turn::Changed("check failed: connect refused (1 of 3)".into())
        );
        assert_eq!(bad(&mut checks, false), Turn::Same);
        assert_eq!(good(&mut checks), Turn::Changed("check good again".into()));
        bad(&mut checks, false);
        bad(&mut checks, false);
        assert_eq!(
            bad(&mut checks, false),
            Turn::Down("3 checks failed in a row: connect refused".into())
        );
        assert_eq!(bad(&mut checks, false), Turn::Same);
    }

    #[test]
    fn checks_bring_a_backend_up_after_rise_good_answers_in_a_row() {
        let mut checks = down();
        good(&mut checks);
        bad(&mut checks, false);
        good(&mut checks);
        assert!(checks.down().is_some());
        assert_eq!(good(&mut checks), Turn::Up("2 checks good in a row".into()));
        assert_eq!((checks.down(), good(&mut checks)), (None, Turn::Same));
    }

    #[test]
    fn not_ready_acts_at_once_and_one_good_answer_ends_it() {
        let mut checks = Checks::default();
        assert_eq!(not_ready(&mut checks), Turn::Changed("answers 500".into()));
        assert_eq!((checks.not_ready(), not_ready(&mut checks)), (true, Turn::Same));
        bad(&mut checks, false);
        assert!(checks.not_ready(), "a bad answer is no sign of readiness");
        assert_eq!(good(&mut checks), Turn::Changed("check good again".into()));
        assert!(!checks.not_ready());
    }

    #[test]
    fn not_ready_counts_as_alive_on_the_way_up() {
        let mut checks = down();
        assert_eq!(not_ready(&mut checks), Turn::Changed("answers 500 (1 of 2)".into()));
        assert!(checks.down().is_some());
        assert_eq!(
            not_ready(&mut checks),
            Turn::Changed("alive again, but not ready: answers 500".into())
        );
        assert_eq!((checks.down(), checks.not_ready()), (None, true));

        let mut checks = down();
        not_ready(&mut checks);
        assert_eq!(good(&mut checks), Turn::Up("2 checks good in a row".into()));
    }

    #[test]
    fn a_proof_of_life_keeps_timeouts_alone_from_taking_a_backend_down() {
        let mut checks = Checks::default();
        let mut timeout = |alive: bool| checks.answered(ROUNDS, timed_out(), || alive, at(0.0));
        timeout(false);
        timeout(false);
        assert!(matches!(timeout(true), Turn::Vetoed { first: true, .. }));
        assert!(matches!(timeout(true), Turn::Vetoed { first: false, .. }));
        assert!(matches!(timeout(false), Turn::Down(_)));
    }

    #[test]
    fn one_refusal_among_the_bad_answers_defeats_the_proof_of_life() {
        let mut checks = Checks::default();
        let never = || -> bool { panic!("no proof is asked for") };
        for outcome in [timed_out(), refused()] {
            checks.answered(ROUNDS, outcome, never, at(0.0));
        }
        assert!(matches!(
            checks.answered(ROUNDS, timed_out(), never, at(0.0)),
            Turn::Down(_)
        ));
    }

    const SLIDING: Terms = Terms {
        rules: Rules {
            max_fails: 2,
            fail_timeout: Duration::from_secs(10),
            max_ban: Duration::from_secs(10),
            nginx: false,
        },
        connect_timeout: Duration::from_secs(1),
    };
    /// As configured by default.
    const GROWING: Terms = Terms {
        rules: Rules {
            max_ban: Duration::from_secs(60),
            ..SLIDING.rules
        },
        ..SLIDING
    };
    const ROUNDS: Rounds = Rounds { rise: 2, fall: 3 };

    /// Its last ban ended at 0.
    fn seven_bans() -> Record {
        Record {
            bans: 7,
            good: at(0.0),
            ..Record::new(&GROWING.rules)
        }
    }

    fn nginx(max_fails: u32) -> Terms {
        Terms {
            rules: Rules {
                max_fails,
                nginx: true,
                ..SLIDING.rules
            },
            ..SLIDING
        }
    }

    /// `seconds` after t0, which is a whole second after boot.
    fn at(seconds: f64) -> Moment {
        Moment::new(Duration::from_secs(1000) + Duration::from_secs_f64(seconds))
    }

    fn banned(verdict: &Verdict) -> bool {
        matches!(verdict, Verdict::Banned { .. })
    }

    fn refuse(record: &mut Record, terms: &Terms, seconds: f64) -> Verdict {
        record.picked(terms, at(seconds));
        record.failed(terms, Failure::Refused, || panic!("no proof is asked for"), at(seconds))
    }

    fn connect(record: &mut Record, terms: &Terms, seconds: f64) {
        record.picked(terms, at(seconds));
        record.succeeded(at(seconds), at(seconds));
    }

    fn refused() -> CheckOutcome {
        CheckOutcome::Bad {
            reason: "connect refused".into(),
            timeout: false,
        }
    }

    fn timed_out() -> CheckOutcome {
        CheckOutcome::Bad {
            reason: "no answer within 1 s".into(),
            timeout: true,
        }
    }

    fn bad(checks: &mut Checks, alive: bool) -> Turn {
        checks.answered(ROUNDS, refused(), || alive, at(0.0))
    }

    fn good(checks: &mut Checks) -> Turn {
        checks.answered(ROUNDS, CheckOutcome::Good, || false, at(0.0))
    }

    fn not_ready(checks: &mut Checks) -> Turn {
        checks.answered(ROUNDS, CheckOutcome::NotReady("answers 500".into()), || false, at(0.0))
    }

    fn down() -> Checks {
        let mut checks = Checks::default();
        for _ in 0..3 {
            bad(&mut checks, false);
        }
        assert!(checks.down().is_some());
        checks
    }
}
