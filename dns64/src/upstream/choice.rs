//! Which of several servers is asked, and for how long one waits for it: [`Choice`].
//!
//! The quickest that is up. What a server's latency is, answers say, and a question every ten seconds for one that is not
//! asked otherwise; a server that is silent is checked, and if it does not answer that either, it is down and costs no
//! client a moment until it answers a check, which it gets with growing intervals. Pure: `now` comes in.

use std::time::Duration;

use serde::Serialize;

use super::url::Transport;

/// What is assumed of a server that has not been heard yet.
const UNKNOWN: Duration = Duration::from_millis(400);
/// Bounds of how long one waits before asking again: an upstream that must ask others itself is not to be hurried.
const PATIENCE: (Duration, Duration) = (Duration::from_millis(150), Duration::from_millis(1500));
/// What a connection takes longer to answer than a datagram: its handshakes.
const HANDSHAKE: Duration = Duration::from_millis(350);
/// Silences in a row that make a server suspect.
const SUSPECT: u32 = 2;
/// Useless replies in a row after which others are asked first.
const LAME: u32 = 3;
/// After the first failed check; doubled each time up to the second.
const BACK_OFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(4));
/// A latency older than this is measured anew.
const STALE: Duration = Duration::from_secs(10);
/// How long a server that knows nothing of EDNS is asked without.
const NO_EDNS: Duration = Duration::from_secs(600);
/// What one retry costs; each question pays one back.
const RETRY: u32 = 4;
/// As much may be saved up.
const SAVED: u32 = 64 * RETRY;

/// The servers of one group.
#[derive(Clone, Debug)]
pub struct Choice {
    servers: Vec<Server>,
    /// For retries beyond the first of each question: an upstream that is overloaded gets a quarter more of them at most, and
    /// those of a burst.
    saved: u32,
}

/// Whether a server is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It is.
    Up,
    /// It is, and it is being checked whether it should be.
    Suspect,
    /// It is not.
    Down,
}

impl State {
    /// As in status and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Suspect => "suspect",
            Self::Down => "down",
        }
    }
}

/// What happened with one server, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Queries, each retry and each transport counted.
    pub queries: u64,
    /// Replies of use.
    pub good: u64,
    /// SERVFAIL, REFUSED and their like, referrals, what could not be parsed.
    pub lame: u64,
    /// Times that it did not answer within its usual time.
    pub silent: u64,
    /// Sockets and connections that failed.
    pub broken: u64,
    /// Replies cut off, asked for again by TCP.
    pub truncated: u64,
    /// Questions asked by TCP because too many datagrams pretended to be the reply.
    pub floods: u64,
    /// Questions asked by TCP because the reply had other letters' cases: a liar, or a server that needs `?case=fixed`.
    pub case_lost: u64,
    /// Times that it went down.
    pub outages: u64,
}

#[derive(Clone, Debug)]
struct Server {
    state: State,
    /// Smoothed latency and its mean deviation (RFC 6298 §2); `None` before the first answer.
    latency: Option<(Duration, Duration)>,
    /// When that was last measured.
    measured: Option<Duration>,
    /// When it was last named by [`Choice::due`].
    due: Option<Duration>,
    silent: u32,
    lame: u32,
    /// Failed checks in a row.
    failed_checks: u32,
    /// A check is under way or planned.
    checking: bool,
    no_edns_until: Duration,
    counts: Counts,
}

impl Choice {
    /// So many servers, of which nothing is known; the first is preferred while it does not matter.
    pub fn new(servers: usize) -> Self {
        Self {
            servers: vec![Server::new(); servers],
            saved: SAVED,
        }
    }

    /// The server to ask: the quickest that is up and that `except` does not name.
    pub fn pick(&self, except: impl Fn(usize) -> bool) -> Option<usize> {
        let open = self.servers.iter().enumerate();
        open.filter(|(index, server)| server.state != State::Down && !except(*index))
            .min_by_key(|(_, server)| server.cost())
            .map(|(index, _)| index)
    }

    /// Whether there is any to be asked.
    pub fn any_up(&self) -> bool {
        self.servers.iter().any(|server| server.state != State::Down)
    }

    /// How long to wait for its answer before someone is asked again.
    pub fn patience(&self, server: usize, over: Transport) -> Duration {
        let Some(at) = self.servers.get(server) else {
            return UNKNOWN;
        };
        let known = at.latency.map(|(mean, deviation)| mean.saturating_add(deviation * 4));
        let usual = known.unwrap_or(UNKNOWN).clamp(PATIENCE.0, PATIENCE.1);
        if over == Transport::Udp {
            usual
        } else {
            usual + HANDSHAKE
        }
    }

    /// Whether it is asked with EDNS.
    pub fn edns(&self, server: usize, now: Duration) -> bool {
        self.servers.get(server).is_none_or(|at| at.no_edns_until <= now)
    }

    /// It understands a question only without EDNS.
    pub fn without_edns(&mut self, server: usize, now: Duration) {
        self.change(server, |at| at.no_edns_until = now + NO_EDNS);
    }

    /// A question came in, so that a quarter of a retry has been earned.
    pub fn asked(&mut self) {
        self.saved = (self.saved + 1).min(SAVED);
    }

    /// Whether a question may be asked once more; if so, that is paid for.
    pub fn may_retry(&mut self) -> bool {
        let left = self.saved.checked_sub(RETRY);
        self.saved = left.unwrap_or(self.saved);
        left.is_some()
    }

    /// A query goes to `server`.
    pub fn sent(&mut self, server: usize) {
        self.change(server, |at| at.counts.queries += 1);
    }

    /// A reply of use, `latency` after the query; `None` where that would measure something else than the server.
    pub fn good(&mut self, server: usize, latency: Option<Duration>, now: Duration) {
        self.change(server, |at| {
            at.counts.good += 1;
            at.lame = 0;
            at.heard();
            if let Some(latency) = latency {
                at.measure(latency, now);
            }
        });
    }

    /// It replied, of which the others are to know only that it is there: truncated, or without EDNS.
    pub fn heard(&mut self, server: usize, count: impl FnOnce(&mut Counts)) {
        self.change(server, |at| {
            count(&mut at.counts);
            at.heard();
        });
    }

    /// Something happened that says nothing of whether it is there.
    pub fn count(&mut self, server: usize, count: impl FnOnce(&mut Counts)) {
        self.change(server, |at| count(&mut at.counts));
    }

    /// A reply of no use. A server is never down for that: it may be the question.
    pub fn lame(&mut self, server: usize) {
        self.change(server, |at| {
            at.counts.lame += 1;
            at.lame = at.lame.saturating_add(1);
            at.heard();
        });
    }

    /// No answer within its [`Choice::patience`].
    pub fn silent(&mut self, server: usize) {
        self.change(server, |at| {
            at.counts.silent += 1;
            at.missed();
        });
    }

    /// Its port is closed, or there is no way to it.
    pub fn broken(&mut self, server: usize) {
        self.change(server, |at| {
            at.counts.broken += 1;
            at.missed();
        });
    }

    /// A server that should be asked something now on nobody's behalf: because it is suspect, or because nobody has asked
    /// it for long. Each is named once, until [`Choice::checked`] or [`Choice::measured`] ends it.
    pub fn due(&mut self, now: Duration) -> Option<(usize, Why)> {
        let several = self.servers.len() > 1;
        self.servers.iter_mut().enumerate().find_map(|(index, at)| {
            let last = at.measured.max(at.due);
            let stale = last.is_none_or(|last| now.saturating_sub(last) >= STALE);
            let why = match at.state {
                _ if at.checking => return None,
                State::Suspect => Why::Check,
                State::Up if several && stale => Why::Measure,
                _ => return None,
            };
            at.checking = true;
            at.due = Some(now);
            Some((index, why))
        })
    }

    /// Of [`Choice::due`] only a server that is suspect.
    pub fn suspect(&mut self) -> Option<usize> {
        let mut servers = self.servers.iter_mut();
        let index = servers.position(|at| !at.checking && at.state == State::Suspect)?;
        self.change(index, |at| at.checking = true);
        Some(index)
    }

    /// How a check ended: whether the server said anything at all. If it must be checked again, after how long.
    pub fn checked(&mut self, server: usize, alive: bool) -> Option<Duration> {
        let at = self.servers.get_mut(server)?;
        if alive {
            at.checking = false;
            at.heard();
            return None;
        }
        if at.state == State::Up {
            // Somebody heard it meanwhile.
            at.checking = false;
            return None;
        }
        if at.state == State::Suspect {
            at.counts.outages += 1;
        }
        at.state = State::Down;
        let wait = BACK_OFF
            .0
            .saturating_mul(1_u32.checked_shl(at.failed_checks).unwrap_or(u32::MAX));
        at.failed_checks = (at.failed_checks + 1).min(16);
        Some(wait.min(BACK_OFF.1))
    }

    /// What was due as [`Why::Measure`] has ended; what came of it was told like any other answer.
    pub fn measured(&mut self, server: usize) {
        self.change(server, |at| at.checking = false);
    }

    /// The state of one server, its latency and what was counted.
    pub fn of(&self, server: usize) -> Option<(State, Option<Duration>, Counts)> {
        let at = self.servers.get(server)?;
        Some((at.state, at.latency.map(|(mean, _)| mean), at.counts))
    }

    fn change(&mut self, server: usize, change: impl FnOnce(&mut Server)) {
        if let Some(at) = self.servers.get_mut(server) {
            change(at);
        }
    }
}

/// Why a server is asked on nobody's behalf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// To learn whether it is there.
    Check,
    /// To learn how long it takes, with a question that others were just asked.
    Measure,
}

impl Server {
    fn new() -> Self {
        Self {
            state: State::Up,
            latency: None,
            measured: None,
            due: Some(Duration::ZERO),
            silent: 0,
            lame: 0,
            failed_checks: 0,
            checking: false,
            no_edns_until: Duration::ZERO,
            counts: Counts::default(),
        }
    }

    /// What a question is expected to take here. One that has never been heard comes first, and so is heard.
    fn cost(&self) -> Duration {
        let usual = self.latency.map_or(Duration::ZERO, |(mean, _)| mean);
        let silence = UNKNOWN.saturating_mul(self.silent.min(10));
        let lame = if self.lame >= LAME {
            Duration::from_secs(10)
        } else {
            Duration::ZERO
        };
        usual + silence + lame
    }

    /// It is there.
    fn heard(&mut self) {
        self.silent = 0;
        self.failed_checks = 0;
        self.state = State::Up;
    }

    fn missed(&mut self) {
        self.silent = self.silent.saturating_add(1);
        if self.silent >= SUSPECT && self.state == State::Up {
            self.state = State::Suspect;
        }
    }

    /// RFC 6298 §2; a measurement after a long time counts for half.
    fn measure(&mut self, latency: Duration, now: Duration) {
        // Nobody waits longer, and so no answer is measured that took longer; except by a clock that jumped.
        let latency = latency.min(Duration::from_secs(10));
        let fresh = self
            .measured
            .is_some_and(|measured| now.saturating_sub(measured) < STALE);
        let weight = if fresh { 8 } else { 2 };
        self.latency = Some(match self.latency {
            None => (latency, latency / 2),
            Some((mean, deviation)) => (
                (mean * (weight - 1) + latency) / weight,
                (deviation * 3 + mean.abs_diff(latency)) / 4,
            ),
        });
        self.measured = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quickest_is_asked_and_those_that_nobody_heard_yet_first() {
        let mut choice = Choice::new(3);
        assert_eq!(choice.pick(|_| false), Some(0));
        choice.good(0, Some(ms(30)), s(0));
        assert_eq!(choice.pick(|_| false), Some(1));
        choice.good(1, Some(ms(10)), s(0));
        choice.good(2, Some(ms(20)), s(0));
        assert_eq!(choice.pick(|_| false), Some(1));
        assert_eq!(choice.pick(|index| index == 1), Some(2));
        assert_eq!(choice.pick(|_| true), None);
        for _ in 0..20 {
            choice.good(1, Some(ms(100)), s(1));
        }
        assert_eq!(choice.pick(|_| false), Some(2), "it has become slow");
    }

    #[test]
    fn patience_follows_latency_within_its_bounds() {
        let mut choice = Choice::new(1);
        assert_eq!(choice.patience(0, Transport::Udp), ms(400));
        assert_eq!(choice.patience(0, Transport::Tls), ms(750));
        for _ in 0..50 {
            choice.good(0, Some(ms(1)), s(0));
        }
        assert_eq!(choice.patience(0, Transport::Udp), ms(150));
        for _ in 0..50 {
            choice.good(0, Some(ms(300)), s(0));
        }
        let patience = choice.patience(0, Transport::Udp);
        assert!((ms(300)..ms(350)).contains(&patience), "{patience:?}");
        choice.good(0, Some(s(60)), s(0));
        assert_eq!(choice.patience(0, Transport::Udp), ms(1500));
    }

    #[test]
    fn a_server_goes_down_only_when_it_does_not_answer_a_check_either() {
        let mut choice = Choice::new(1);
        choice.silent(0);
        assert_eq!(choice.due(s(0)), None, "anything can be lost once");
        choice.silent(0);
        assert_eq!(choice.due(s(0)), Some((0, Why::Check)));
        assert_eq!(choice.due(s(0)), None, "one check at a time");
        assert!(choice.any_up(), "a suspect is still asked");
        assert_eq!(choice.checked(0, true), None);
        assert_eq!(choice.of(0).map(|(state, ..)| state), Some(State::Up));

        choice.broken(0);
        choice.broken(0);
        assert_eq!(choice.due(s(0)), Some((0, Why::Check)));
        assert_eq!(choice.checked(0, false), Some(s(1)));
        assert!(!choice.any_up());
        assert_eq!(choice.pick(|_| false), None);
        assert_eq!(choice.due(s(100)), None, "the check goes on by itself");
    }

    #[test]
    fn checks_back_off_to_four_seconds_and_one_answer_ends_the_outage() {
        let mut choice = Choice::new(1);
        choice.silent(0);
        choice.silent(0);
        assert_eq!(choice.due(s(0)), Some((0, Why::Check)));
        let waits: Vec<_> = (0..40).filter_map(|_| choice.checked(0, false)).collect();
        assert_eq!(waits.len(), 40);
        assert_eq!(waits[..4], [s(1), s(2), s(4), s(4)]);
        assert_eq!(waits[39], s(4));
        assert_eq!(choice.of(0).map(|(.., counts)| counts.outages), Some(1));
        assert_eq!(choice.checked(0, true), None);
        assert!(choice.any_up());
        choice.silent(0);
        choice.silent(0);
        assert_eq!(choice.due(s(0)), Some((0, Why::Check)));
        assert_eq!(choice.checked(0, false), Some(s(1)), "from the beginning");
    }

    #[test]
    fn a_server_heard_during_its_check_stays_up() {
        let mut choice = Choice::new(1);
        choice.silent(0);
        choice.silent(0);
        assert_eq!(choice.due(s(0)), Some((0, Why::Check)));
        choice.good(0, None, s(0));
        assert_eq!(choice.checked(0, false), None);
        assert!(choice.any_up());
    }

    #[test]
    fn useless_replies_put_a_server_last_but_never_down() {
        let mut choice = Choice::new(2);
        choice.good(0, Some(ms(1)), s(0));
        choice.good(1, Some(ms(900)), s(0));
        (0..2).for_each(|_| choice.lame(0));
        assert_eq!(choice.pick(|_| false), Some(0));
        (0..1000).for_each(|_| choice.lame(0));
        assert_eq!(choice.pick(|_| false), Some(1));
        assert_eq!(choice.pick(|index| index == 1), Some(0));
        assert_eq!(choice.due(s(1)), None);
        choice.good(0, None, s(1));
        assert_eq!(choice.pick(|_| false), Some(0));
    }

    #[test]
    fn a_server_that_nobody_asks_is_measured_every_ten_seconds() {
        let mut choice = Choice::new(2);
        choice.good(0, Some(ms(1)), s(0));
        choice.good(1, Some(ms(100)), s(0));
        assert_eq!(choice.due(s(9)), None);
        choice.good(0, Some(ms(1)), s(9));
        assert_eq!(choice.due(s(10)), Some((1, Why::Measure)));
        assert_eq!(choice.due(s(10)), None);
        choice.good(1, Some(ms(10)), s(10));
        choice.measured(1);
        assert_eq!(choice.due(s(11)), None);
        let mut alone = Choice::new(1);
        assert_eq!(alone.due(s(100)), None, "there is nothing to choose");
    }

    #[test]
    fn an_old_latency_counts_less_against_a_fresh_one() {
        let of = |later| {
            let mut choice = Choice::new(1);
            choice.good(0, Some(ms(800)), s(0));
            choice.good(0, Some(ms(0)), later);
            choice.of(0).and_then(|(_, latency, _)| latency)
        };
        assert_eq!(of(s(1)), Some(ms(700)));
        assert_eq!(of(s(30)), Some(ms(400)));
    }

    #[test]
    fn retries_are_a_quarter_of_the_questions_after_the_first_burst() {
        let mut choice = Choice::new(1);
        assert_eq!((0..1000).filter(|_| choice.may_retry()).count(), 64);
        let retries = (0..1000).filter(|_| {
            choice.asked();
            choice.may_retry()
        });
        assert_eq!(retries.count(), 250);
    }

    #[test]
    fn edns_is_tried_again_after_ten_minutes() {
        let mut choice = Choice::new(1);
        assert!(choice.edns(0, s(0)));
        choice.without_edns(0, s(0));
        assert!(!choice.edns(0, s(599)));
        assert!(choice.edns(0, s(600)));
    }

    #[test]
    fn a_server_that_is_not_there_changes_nothing() {
        let mut choice = Choice::new(0);
        choice.good(7, Some(s(1)), s(0));
        choice.silent(7);
        assert_eq!(choice.checked(7, false), None);
        assert!(!choice.any_up() && choice.pick(|_| false).is_none() && choice.due(s(99)).is_none());
    }

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    const fn s(s: u64) -> Duration {
        Duration::from_secs(s)
    }
}
