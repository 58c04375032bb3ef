//! The course of one question through several servers and transports: [`Inquiry`].
//!
//! One datagram to the quickest server. Silence for longer than usual: the next server is asked as well, and where there
//! is none, the same one again with the same datagram, so that nobody ever waits at two ports for the same server. The
//! first answer ends it. Pure: the shell does what [`Inquiry::step`] says and tells what came of it.

use std::time::Duration;

use hickory_proto::op::ResponseCode;

use super::{choice::Choice, url::Transport};
use crate::{Answer, answer::code_name};

/// Attempts, whatever happens.
const ATTEMPTS: usize = 16;
/// Times that one datagram is sent.
const SENDS: u32 = 6;
/// The intervals between them double from the third on, up to this, or to a server's usual time if that is longer.
const INTERVAL: Duration = Duration::from_millis(800);

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// No reply of use in time.
    #[error("no upstream answered in time")]
    Timeout,
    /// Every server is known to be down, or there is none. Said at once.
    #[error("every upstream is down")]
    Down,
    /// The servers replied with this code; `NoError` stands for a referral, `FormErr` also for what cannot be parsed.
    #[error("upstreams answered {}", code_name(*.0))]
    Code(ResponseCode),
    /// The servers could not be reached, or hung up.
    #[error("no upstream could be reached")]
    Unreachable,
    /// As many questions are under way as may be, or this machine has run out of something.
    #[error("too many questions are under way")]
    Busy,
}

/// What is to be done next.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Ask, and tell [`Inquiry::ended`] how it went.
    Begin(Attempt),
    /// Send the datagram of this attempt once more.
    Again(usize),
    /// Wait for an attempt to end, at most until then.
    Wait(Duration),
    /// That was it; attempts that are under way are to be dropped.
    Done(Result<Answer, Failure>),
}

/// One query to one server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// Names it to [`Inquiry::ended`].
    pub number: usize,
    /// Index into the servers.
    pub server: usize,
    /// By datagram or by connection, which may be another than the server's own.
    pub over: Transport,
    /// With OPT.
    pub edns: bool,
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// NOERROR or NXDOMAIN.
    Good(Answer),
    /// Of no use; [`super::wire::Reply::Lame`].
    Lame(ResponseCode),
    /// Cut off.
    Truncated,
    /// FORMERR to EDNS.
    NoEdns,
    /// Too many datagrams pretended to be the reply.
    Flooded,
    /// The reply came with other letters' cases.
    CaseLost,
    /// Its socket or connection failed.
    Broken,
    /// A connection that had served before was closed before it answered, as any server may at any time (RFC 7766 §6.2.4).
    Closed,
    /// This machine has run out of something.
    Busy,
}

/// One question under way.
#[derive(Clone, Debug)]
pub struct Inquiry {
    /// When it fails at the latest.
    until: Duration,
    /// When somebody is asked in addition.
    next: Duration,
    attempts: Vec<Progress>,
    /// How often somebody was asked in addition.
    extra: u32,
    /// Attempts that follow from what an earlier one learnt.
    follow: Vec<Attempt>,
    /// What it fails with if nothing better comes.
    failure: Option<Failure>,
    done: Option<Result<Answer, Failure>>,
}

#[derive(Clone, Copy, Debug)]
struct Progress {
    attempt: Attempt,
    began: Duration,
    /// When its server counts as silent; `None` once it has been counted.
    overdue: Option<Duration>,
    sends: u32,
    live: bool,
}

impl Inquiry {
    /// A question that is asked `now` and has `patience` in all.
    pub fn new(patience: Duration, now: Duration) -> Self {
        Self {
            until: now + patience,
            next: now,
            attempts: Vec::new(),
            extra: 0,
            follow: Vec::new(),
            failure: None,
            done: None,
        }
    }

    /// What is to be done now.
    pub fn step(&mut self, transports: &[Transport], choice: &mut Choice, now: Duration) -> Step {
        if let Some(done) = &self.done {
            return Step::Done(done.clone());
        }
        self.count_silence(choice, now);
        if now >= self.until {
            return self.fail(Failure::Timeout);
        }
        if !choice.any_up() {
            return self.fail(Failure::Down);
        }
        while let Some(attempt) = self.follow.pop() {
            if self.attempts.len() < ATTEMPTS {
                return self.begin(attempt, choice, now);
            }
        }
        let live = self.attempts.iter().any(|progress| progress.live);
        if live && now < self.next {
            return Step::Wait(self.wake());
        }
        let first = self.attempts.is_empty();
        let best = choice.pick(|server| self.attempts.iter().any(|progress| progress.attempt.server == server));
        let best = best.filter(|_| self.attempts.len() < ATTEMPTS);
        let again = self.again();
        if !first && (best.is_some() || again.is_some()) {
            // One is every question's own: on a path with losses most need it, and what others need is no business of this one.
            if self.extra > 0 && !choice.may_retry() {
                return self.wait_or_fail(live, now);
            }
            self.extra += 1;
        }
        if let Some(server) = best {
            let attempt = Attempt {
                number: self.attempts.len(),
                server,
                over: transports.get(server).copied().unwrap_or(Transport::Udp),
                edns: choice.edns(server, now),
            };
            return self.begin(attempt, choice, now);
        }
        let Some(progress) = again.and_then(|index| self.attempts.get_mut(index)) else {
            return self.wait_or_fail(live, self.until);
        };
        let Attempt {
            number, server, over, ..
        } = progress.attempt;
        let usual = choice.patience(server, over);
        // The first repetition is worth as much as the datagram itself: on a path that loses three of ten, five get there
        // before a client is given something stale (1.8 s), and not just four.
        let patience = usual.saturating_mul(1 << (progress.sends - 1)).min(usual.max(INTERVAL));
        progress.sends += 1;
        progress.overdue = Some(now + patience);
        self.next = now + patience;
        choice.sent(server);
        Step::Again(number)
    }

    /// Attempt `number` has ended.
    pub fn ended(
        &mut self,
        number: usize,
        outcome: Outcome,
        transports: &[Transport],
        choice: &mut Choice,
        now: Duration,
    ) {
        let Some(progress) = self.attempts.get_mut(number).filter(|progress| progress.live) else {
            return;
        };
        progress.live = false;
        let Progress {
            attempt, began, sends, ..
        } = *progress;
        let Attempt { server, over, edns, .. } = attempt;
        match outcome {
            Outcome::Good(answer) => {
                // TCP in place of UDP says nothing of what a datagram takes, and neither does an answer to one of several
                // datagrams (Karn's rule, RFC 6298 §3): a path with losses would be taken for a slow server.
                let known = choice.of(server).is_some_and(|(_, latency, _)| latency.is_some());
                let own = transports.get(server) == Some(&over) && (sends == 1 || !known);
                choice.good(server, own.then(|| now.saturating_sub(began)), now);
                if !edns {
                    choice.without_edns(server, now);
                }
                self.done = Some(Ok(answer));
            }
            Outcome::Lame(code) => {
                choice.lame(server);
                self.blame(Failure::Code(code), now);
            }
            Outcome::Truncated => {
                choice.heard(server, |counts| counts.truncated += 1);
                self.follow_by_tcp(attempt, now);
            }
            Outcome::Flooded => {
                choice.count(server, |counts| counts.floods += 1);
                self.follow_by_tcp(attempt, now);
            }
            Outcome::CaseLost => {
                choice.count(server, |counts| counts.case_lost += 1);
                self.follow_by_tcp(attempt, now);
            }
            Outcome::NoEdns if edns => {
                choice.heard(server, |_| ());
                self.follow.push(Attempt { edns: false, ..attempt });
            }
            Outcome::NoEdns => {
                choice.lame(server);
                self.blame(Failure::Code(ResponseCode::FormErr), now);
            }
            // Sent at most twice by this way.
            Outcome::Closed if sends == 1 && !self.closed_before(attempt) => {
                self.follow.push(attempt);
            }
            Outcome::Broken | Outcome::Closed => {
                choice.broken(server);
                self.blame(Failure::Unreachable, now);
            }
            Outcome::Busy => self.blame(Failure::Busy, now),
        }
    }

    fn begin(&mut self, attempt: Attempt, choice: &mut Choice, now: Duration) -> Step {
        let patience = choice.patience(attempt.server, attempt.over);
        let attempt = Attempt {
            number: self.attempts.len(),
            ..attempt
        };
        self.attempts.push(Progress {
            attempt,
            began: now,
            overdue: Some(now + patience),
            sends: 1,
            live: true,
        });
        self.next = now + patience;
        choice.sent(attempt.server);
        Step::Begin(attempt)
    }

    /// A datagram that may be sent once more: the one that was sent least often.
    fn again(&self) -> Option<usize> {
        let open =
            self.attempts.iter().enumerate().filter(|(_, progress)| {
                progress.live && progress.attempt.over == Transport::Udp && progress.sends < SENDS
            });
        open.min_by_key(|(_, progress)| progress.sends).map(|(index, _)| index)
    }

    /// Whether the same was asked of the same server by a connection before.
    fn closed_before(&self, attempt: Attempt) -> bool {
        let same =
            |other: Attempt| (other.server, other.over, other.edns) == (attempt.server, attempt.over, attempt.edns);
        let mut earlier = self
            .attempts
            .iter()
            .filter(|progress| progress.attempt.number != attempt.number);
        earlier.any(|progress| same(progress.attempt))
    }

    fn follow_by_tcp(&mut self, attempt: Attempt, now: Duration) {
        if attempt.over == Transport::Udp {
            self.follow.push(Attempt {
                over: Transport::Tcp,
                ..attempt
            });
        } else {
            // A stream cannot be cut off.
            self.blame(Failure::Code(ResponseCode::FormErr), now);
        }
    }

    /// An attempt was in vain: somebody else is asked at once.
    fn blame(&mut self, failure: Failure, now: Duration) {
        self.next = now;
        // What a server said is worth more than that it said nothing, and SERVFAIL more than a refusal.
        let rank = |failure: &Failure| match failure {
            Failure::Code(ResponseCode::ServFail) => 4,
            Failure::Code(_) => 3,
            Failure::Busy => 2,
            Failure::Unreachable => 1,
            Failure::Timeout | Failure::Down => 0,
        };
        if self.failure.as_ref().is_none_or(|known| rank(known) < rank(&failure)) {
            self.failure = Some(failure);
        }
    }

    fn count_silence(&mut self, choice: &mut Choice, now: Duration) {
        for progress in &mut self.attempts {
            if progress.live && progress.overdue.is_some_and(|overdue| overdue <= now) {
                progress.overdue = None;
                choice.silent(progress.attempt.server);
            }
        }
    }

    /// When there is something to do even if no attempt ends.
    fn wake(&self) -> Duration {
        let live = self.attempts.iter().filter(|progress| progress.live);
        let overdue = live.filter_map(|progress| progress.overdue).min();
        overdue
            .map_or(self.until, |overdue| overdue.min(self.until))
            .min(self.next)
    }

    /// Waits for what is under way; somebody may be asked in addition a while after `now`.
    fn wait_or_fail(&mut self, live: bool, now: Duration) -> Step {
        if live {
            self.next = (now + INTERVAL).min(self.until);
            return Step::Wait(self.wake());
        }
        self.fail(Failure::Unreachable)
    }

    fn fail(&mut self, failure: Failure) -> Step {
        let failure = self.failure.unwrap_or(failure);
        self.done = Some(Err(failure));
        Step::Done(Err(failure))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: [Transport; 2] = [Transport::Udp; 2];

    #[test]
    fn the_first_answer_ends_it() {
        let mut world = World::new(&TWO);
        assert_eq!(world.step(0), begin(0, 0, Transport::Udp));
        assert_eq!(world.step(0), Step::Wait(ms(400)));
        world.ended(0, good(), 30);
        assert_eq!(world.step(30), Step::Done(Ok(answer())));
        assert_eq!(world.choice.of(0).and_then(|(_, latency, _)| latency), Some(ms(30)));
    }

    #[test]
    fn silence_asks_the_next_server_and_the_first_one_may_still_answer() {
        let mut world = World::new(&TWO);
        assert_eq!(world.step(0), begin(0, 0, Transport::Udp));
        assert_eq!(world.step(400), begin(1, 1, Transport::Udp));
        assert_eq!(world.step(400), Step::Wait(ms(800)));
        world.ended(0, good(), 700);
        assert_eq!(world.step(700), Step::Done(Ok(answer())));
        let of = |server| world.choice.of(server).map(|(.., counts)| (counts.silent, counts.good));
        assert_eq!((of(0), of(1)), (Some((1, 1)), Some((0, 0))));
    }

    #[test]
    fn a_single_server_gets_the_same_datagram_again_with_growing_patience() {
        let mut world = World::new(&TWO[..1]);
        assert_eq!(world.step(0), begin(0, 0, Transport::Udp));
        let mut sent = vec![];
        let mut now = 0;
        let end = loop {
            match world.step(now) {
                Step::Again(0) => sent.push(now),
                Step::Wait(until) => now = u64::try_from(until.as_millis()).expect("it is short"),
                other => break other,
            }
        };
        assert_eq!(sent, [400, 800, 1600, 2400, 3200]);
        assert_eq!((now, end), (4000, Step::Done(Err(Failure::Timeout))));
    }

    #[test]
    fn an_answer_to_a_repeated_datagram_does_not_make_its_server_slow() {
        let mut world = World::new(&TWO[..1]);
        let mut ask = |times: &[u64], answered: u64| {
            world.inquiry = Inquiry::new(Duration::from_secs(4), ms(0));
            for now in times {
                world.step(*now);
            }
            world.ended(0, good(), answered);
            world.choice.of(0).and_then(|(_, latency, _)| latency)
        };
        assert_eq!(ask(&[0], 20), Some(ms(20)));
        assert_eq!(ask(&[0, 0, 150], 170), Some(ms(20)), "which of both was answered?");
    }

    #[test]
    fn a_useless_reply_goes_to_the_next_server_at_once() {
        for outcome in [Outcome::Lame(ResponseCode::ServFail), Outcome::Broken] {
            let mut world = World::new(&TWO);
            assert_eq!(world.step(0), begin(0, 0, Transport::Udp));
            world.ended(0, outcome, 5);
            assert_eq!(world.step(5), begin(1, 1, Transport::Udp));
            world.ended(1, good(), 9);
            assert_eq!(world.step(9), Step::Done(Ok(answer())));
        }
    }

    #[test]
    fn what_all_servers_say_is_what_it_fails_with() {
        for (first, second, failure) in [
            (ResponseCode::Refused, ResponseCode::ServFail, ResponseCode::ServFail),
            (ResponseCode::ServFail, ResponseCode::Refused, ResponseCode::ServFail),
            (ResponseCode::Refused, ResponseCode::NotImp, ResponseCode::Refused),
        ] {
            let mut world = World::new(&TWO);
            world.step(0);
            world.ended(0, Outcome::Lame(first), 1);
            world.step(1);
            world.ended(1, Outcome::Lame(second), 2);
            assert_eq!(world.step(2), Step::Done(Err(Failure::Code(failure))));
        }
        let mut world = World::new(&TWO);
        world.step(0);
        world.ended(0, Outcome::Broken, 1);
        world.step(1);
        world.ended(1, Outcome::Broken, 2);
        assert_eq!(world.step(2), Step::Done(Err(Failure::Unreachable)));
    }

    #[test]
    fn truncation_floods_and_lost_case_go_to_tcp_of_the_same_server() {
        for outcome in [Outcome::Truncated, Outcome::Flooded, Outcome::CaseLost] {
            let mut world = World::new(&TWO);
            world.step(0);
            world.ended(0, outcome, 5);
            assert_eq!(world.step(5), begin(1, 0, Transport::Tcp));
            world.ended(1, good(), 30);
            assert_eq!(world.step(30), Step::Done(Ok(answer())));
            assert_eq!(
                world.choice.of(0).and_then(|(_, latency, _)| latency),
                None,
                "not what a datagram takes"
            );
        }
    }

    #[test]
    fn a_server_without_edns_is_asked_without_and_that_is_remembered() {
        let mut world = World::new(&TWO);
        world.step(0);
        world.ended(0, Outcome::NoEdns, 5);
        let Step::Begin(attempt) = world.step(5) else {
            panic!("it asks again");
        };
        assert_eq!((attempt.server, attempt.edns), (0, false));
        assert!(world.choice.edns(0, ms(5)), "not before it answered");
        world.ended(1, good(), 9);
        assert!(!world.choice.edns(0, ms(9)));
        assert!(world.choice.edns(1, ms(9)));
    }

    #[test]
    fn formerr_even_without_edns_is_lame() {
        let mut world = World::new(&TWO[..1]);
        world.step(0);
        world.ended(0, Outcome::NoEdns, 5);
        world.step(5);
        world.ended(1, Outcome::NoEdns, 6);
        assert_eq!(world.step(6), Step::Done(Err(Failure::Code(ResponseCode::FormErr))));
    }

    #[test]
    fn a_connection_closed_under_a_question_is_opened_once_more() {
        let mut world = World::new(&[Transport::Tls]);
        assert_eq!(world.step(0), begin(0, 0, Transport::Tls));
        world.ended(0, Outcome::Closed, 5);
        assert_eq!(world.step(5), begin(1, 0, Transport::Tls));
        world.ended(1, Outcome::Closed, 6);
        assert_eq!(world.step(6), Step::Done(Err(Failure::Unreachable)));
    }

    #[test]
    fn servers_that_are_down_fail_a_question_at_once() {
        let mut world = World::new(&TWO);
        let down = |world: &mut World, server| {
            world.choice.silent(server);
            world.choice.silent(server);
            while world.choice.due(ms(0)).is_some() {}
            assert!(world.choice.checked(server, false).is_some());
        };
        down(&mut world, 0);
        assert_eq!(
            world.step(0),
            begin(0, 1, Transport::Udp),
            "the other one is asked first"
        );
        down(&mut world, 1);
        assert_eq!(world.step(1), Step::Done(Err(Failure::Down)), "what is under way, too");
        assert_eq!(World::new(&[]).step(0), Step::Done(Err(Failure::Down)));
    }

    #[test]
    fn without_budget_there_is_no_retry_but_an_answer_still_counts() {
        let mut world = World::new(&TWO);
        while world.choice.may_retry() {}
        world.step(0);
        assert_eq!(world.step(400), begin(1, 1, Transport::Udp), "one is its own");
        assert!(matches!(world.step(800), Step::Wait(until) if until < ms(4000)));
        world.choice.asked();
        world.choice.asked();
        world.choice.asked();
        world.choice.asked();
        assert_eq!(world.step(3000), Step::Again(0), "others have paid for it");
        world.ended(0, good(), 3000);
        assert_eq!(world.step(3000), Step::Done(Ok(answer())));

        let mut world = World::new(&[Transport::Udp; 3]);
        while world.choice.may_retry() {}
        world.step(0);
        world.ended(0, Outcome::Lame(ResponseCode::Refused), 1);
        assert_eq!(world.step(1), begin(1, 1, Transport::Udp));
        world.ended(1, Outcome::Lame(ResponseCode::Refused), 2);
        assert_eq!(world.step(2), Step::Done(Err(Failure::Code(ResponseCode::Refused))));
    }

    #[test]
    fn whatever_servers_do_it_ends_within_its_patience_and_a_bounded_number_of_attempts() {
        let mut state = 7_u64;
        let mut draw = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for _ in 0..20_000 {
            let servers: Vec<_> = (0..1 + draw(4))
                .map(|_| [Transport::Udp, Transport::Tcp, Transport::Tls][usize::try_from(draw(3)).expect("small")])
                .collect();
            let mut world = World::new(&servers);
            let (mut now, mut attempts) = (0, 0);
            let mut turns = 0;
            loop {
                turns += 1;
                assert!(turns < 200, "it makes progress");
                match world.step(now) {
                    Step::Begin(attempt) => {
                        assert_eq!(attempt.number, attempts);
                        attempts += 1;
                    }
                    Step::Again(number) => assert!(number < attempts),
                    Step::Wait(until) => {
                        assert!(until > ms(now), "it never spins");
                        if draw(2) == 0 {
                            now = u64::try_from(until.as_millis()).expect("short") + 1;
                            continue;
                        }
                        now += draw(50);
                        let outcome = [
                            Outcome::Lame(ResponseCode::ServFail),
                            Outcome::Truncated,
                            Outcome::NoEdns,
                            Outcome::Flooded,
                            Outcome::CaseLost,
                            Outcome::Broken,
                            Outcome::Closed,
                            Outcome::Busy,
                        ][usize::try_from(draw(8)).expect("small")]
                        .clone();
                        let number = usize::try_from(draw(20)).expect("small");
                        world.ended(number, outcome, now);
                    }
                    Step::Done(result) => {
                        assert!(result.is_err());
                        break;
                    }
                }
            }
            assert!(now <= 4100 && attempts <= ATTEMPTS, "{now} {attempts}");
        }
    }

    struct World {
        transports: Vec<Transport>,
        choice: Choice,
        inquiry: Inquiry,
    }

    impl World {
        fn new(transports: &[Transport]) -> Self {
            Self {
                transports: transports.to_vec(),
                choice: Choice::new(transports.len()),
                inquiry: Inquiry::new(Duration::from_secs(4), Duration::ZERO),
            }
        }

        fn step(&mut self, now: u64) -> Step {
            self.inquiry.step(&self.transports, &mut self.choice, ms(now))
        }

        fn ended(&mut self, number: usize, outcome: Outcome, now: u64) {
            let Self {
                transports,
                choice,
                inquiry,
            } = self;
            inquiry.ended(number, outcome, transports, choice, ms(now));
        }
    }

    fn begin(number: usize, server: usize, over: Transport) -> Step {
        Step::Begin(Attempt {
            number,
            server,
            over,
            edns: true,
        })
    }

    fn answer() -> Answer {
        Answer::empty(ResponseCode::NXDomain)
    }

    fn good() -> Outcome {
        Outcome::Good(answer())
    }

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }
}
