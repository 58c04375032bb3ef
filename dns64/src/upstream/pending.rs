//! What waits for replies: [`Datagram`], one query at a socket of its own, and [`Pipeline`], many on one connection.

use std::{collections::BTreeMap, time::Duration};

use super::{
    inquiry::Outcome,
    wire::{self, Mismatch, Reply, Sent},
};

/// A query for which more datagrams than this pretended to be the reply goes on by TCP: an honest path makes none.
pub const FLOOD: u32 = 100;
/// A connection on which somebody waits and nothing comes for this long is dead.
pub const SILENCE: Duration = Duration::from_secs(5);
/// Nobody waits longer.
const FORGOTTEN: Duration = Duration::from_secs(5);
/// Octets in front of each message on a stream: its length (RFC 1035 §4.2.2).
const PREFIX: usize = 2;

/// Messages that were no replies, by the reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mismatches([u32; 4]);

impl Mismatches {
    /// How often `mismatch` was the reason.
    pub fn of(&self, mismatch: Mismatch) -> u32 {
        self.0.get(mismatch as usize).copied().unwrap_or(0)
    }

    /// All of them.
    pub fn total(&self) -> u32 {
        self.0.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    fn add(&mut self, mismatch: Mismatch) {
        if let Some(count) = self.0.get_mut(mismatch as usize) {
            *count = count.saturating_add(1);
        }
    }
}

/// One query at a socket of its own.
#[derive(Clone, Debug)]
pub struct Datagram {
    sent: Sent,
    mismatches: Mismatches,
}

impl Datagram {
    /// Waits for the reply to `sent`.
    pub const fn new(sent: Sent) -> Self {
        Self {
            sent,
            mismatches: Mismatches([0; 4]),
        }
    }

    /// What is sent, and sent again.
    pub fn bytes(&self) -> &[u8] {
        self.sent.bytes()
    }

    /// A datagram came in; `None` to go on waiting.
    pub fn hear(&mut self, datagram: &[u8]) -> Option<Outcome> {
        match self.sent.judge(datagram) {
            Reply::Mismatch(mismatch) => {
                self.mismatches.add(mismatch);
                if mismatch == Mismatch::Case {
                    // The server does not keep case, or somebody guessed all but that: TCP is the answer to both.
                    return Some(Outcome::CaseLost);
                }
                (self.mismatches.total() > FLOOD).then_some(Outcome::Flooded)
            }
            reply => Some(outcome(reply)),
        }
    }

    /// What came in and was no reply.
    pub const fn mismatches(&self) -> Mismatches {
        self.mismatches
    }
}

/// Queries on one connection, answered in any order (RFC 7766 §6.2.1.1). `T` is whoever waits for one.
#[derive(Debug)]
pub struct Pipeline<T> {
    waiting: BTreeMap<u16, Waiting<T>>,
    /// When the oldest were last forgotten.
    swept: Duration,
    /// When something came last, or when the first of those who wait began to.
    heard: Duration,
    /// Something has come at all.
    served: bool,
    mismatches: Mismatches,
}

#[derive(Debug)]
struct Waiting<T> {
    sent: Sent,
    since: Duration,
    back: T,
}

impl<T> Pipeline<T> {
    /// With nobody waiting.
    pub const fn new() -> Self {
        Self {
            waiting: BTreeMap::new(),
            swept: Duration::ZERO,
            heard: Duration::ZERO,
            served: false,
            mismatches: Mismatches([0; 4]),
        }
    }

    /// Appends the query to what is to be written, its length first. If its id is taken it gets another: on a stream ids
    /// only tell queries apart.
    ///
    /// # Errors
    ///
    /// `back` itself if there is no free id, or the query is too long for a stream.
    pub fn ask(&mut self, mut sent: Sent, back: T, out: &mut Vec<u8>, now: Duration) -> Result<(), T> {
        self.forget(now);
        let first = sent.id();
        let free = (0..=u16::MAX)
            .map(|distance| first.wrapping_add(distance))
            .find(|id| !self.waiting.contains_key(id));
        let (Some(id), Ok(length)) = (free, u16::try_from(sent.bytes().len())) else {
            return Err(back);
        };
        sent.set_id(id);
        out.extend(length.to_be_bytes());
        out.extend(sent.bytes());
        if self.waiting.is_empty() {
            self.heard = now;
        }
        self.waiting.insert(id, Waiting { sent, since: now, back });
        Ok(())
    }

    /// A message came in. Who waited for it, and how that ended; `None` if nobody does.
    pub fn hear(&mut self, message: &[u8], now: Duration) -> Option<(T, Outcome)> {
        self.heard = now;
        self.served = true;
        let entry = wire::id_of(message).and_then(|id| self.waiting.remove_entry(&id));
        let Some((id, waiting)) = entry else {
            self.mismatches.add(Mismatch::Id);
            return None;
        };
        match waiting.sent.judge(message) {
            Reply::Mismatch(mismatch) => {
                self.mismatches.add(mismatch);
                self.waiting.insert(id, waiting);
                None
            }
            reply => Some((waiting.back, outcome(reply))),
        }
    }

    /// Takes the next message off the front of what was read; `None` until it is whole.
    pub fn next_message(&mut self, read: &mut Vec<u8>) -> Option<Vec<u8>> {
        let length = usize::from(u16::from_be_bytes(*read.first_chunk()?));
        let message = read.get(PREFIX..PREFIX + length)?.to_vec();
        read.drain(..PREFIX + length);
        Some(message)
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// When the connection is dead if nothing comes until then; `None` while nobody waits.
    pub fn dead_at(&self) -> Option<Duration> {
        (!self.is_empty()).then(|| self.heard + SILENCE)
    }

    /// Whether the other side sends what nobody asked for.
    pub fn is_flooded(&self) -> bool {
        self.mismatches.total() > FLOOD
    }

    /// What came in and was no reply.
    pub const fn mismatches(&self) -> Mismatches {
        self.mismatches
    }

    /// The connection is over: everybody who waited, and what that means to them.
    pub fn close(&mut self) -> impl Iterator<Item = (T, Outcome)> + use<T> {
        let outcome = if self.served { Outcome::Closed } else { Outcome::Broken };
        let waiting = std::mem::take(&mut self.waiting);
        waiting
            .into_values()
            .map(move |waiting| (waiting.back, outcome.clone()))
    }

    /// What has not been answered for so long that nobody can wait for it any more makes room.
    fn forget(&mut self, now: Duration) {
        if now.saturating_sub(self.swept) >= FORGOTTEN {
            self.swept = now;
            self.waiting
                .retain(|_, waiting| now.saturating_sub(waiting.since) < FORGOTTEN);
        }
    }
}

impl<T> Default for Pipeline<T> {
    fn default() -> Self {
        Self::new()
    }
}

fn outcome(reply: Reply) -> Outcome {
    match reply {
        Reply::Good(answer) => Outcome::Good(answer),
        Reply::Truncated => Outcome::Truncated,
        Reply::NoEdns => Outcome::NoEdns,
        Reply::Lame(code) => Outcome::Lame(code),
        // Taken care of by either caller.
        Reply::Mismatch(_) => Outcome::Broken,
    }
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use hickory_proto::rr::{Name, RecordType};

    use super::*;
    use crate::{
        Question,
        upstream::wire::{Entropy, Form},
    };

    #[test]
    fn a_hundred_mismatches_are_waited_out_and_the_next_one_moves_the_query_to_tcp() {
        let mut datagram = Datagram::new(sent("www.example.org.", 7));
        let mut forged = reply(&datagram.sent);
        for id in 100..200_u16 {
            forged[..2].copy_from_slice(&id.to_be_bytes());
            assert_eq!(datagram.hear(&forged), None);
        }
        assert!(matches!(
            datagram.clone().hear(&reply(&datagram.sent)),
            Some(Outcome::Good(_))
        ));
        assert_eq!(datagram.hear(&forged), Some(Outcome::Flooded));
        assert_eq!(datagram.mismatches().of(Mismatch::Id), 101);
    }

    #[test]
    fn with_all_other_ids_nothing_is_ever_accepted() {
        let mut datagram = Datagram::new(sent("www.example.org.", 7));
        let mut forged = reply(&datagram.sent);
        for id in (0..=u16::MAX).filter(|id| *id != 7) {
            forged[..2].copy_from_slice(&id.to_be_bytes());
            let heard = datagram.hear(&forged);
            assert!(heard.is_none() || heard == Some(Outcome::Flooded));
        }
        assert_eq!(datagram.mismatches().total(), 65_535);
    }

    #[test]
    fn a_reply_in_the_wrong_case_moves_the_query_to_tcp_at_once() {
        let mut datagram = Datagram::new(sent("www.example.org.", 7));
        let lower = reply(&datagram.sent).to_ascii_lowercase();
        assert_eq!(datagram.hear(&lower), Some(Outcome::CaseLost));
    }

    #[test]
    fn replies_on_a_connection_come_in_any_order_in_any_pieces() {
        let mut pipeline = Pipeline::new();
        let mut out = vec![];
        for number in 0..50 {
            let sent = sent(&format!("n{number}.example.org."), 9);
            assert_eq!(pipeline.ask(sent, number, &mut out, s(0)), Ok(()));
        }
        let mut asked = vec![];
        while let Some(query) = pipeline.next_message(&mut out) {
            asked.push(query);
        }
        assert_eq!((asked.len(), out.len()), (50, 0));
        let stream: Vec<u8> = asked
            .iter()
            .rev()
            .flat_map(|query| {
                let reply = answered(query);
                let length = u16::try_from(reply.len()).expect("short").to_be_bytes();
                length.into_iter().chain(reply)
            })
            .collect();
        let (mut read, mut heard) = (vec![], vec![]);
        for byte in stream {
            read.push(byte);
            while let Some(message) = pipeline.next_message(&mut read) {
                let (number, outcome) = pipeline.hear(&message, s(0)).expect("somebody waits");
                assert!(matches!(outcome, Outcome::Good(_)));
                heard.push(number);
            }
        }
        assert_eq!(heard, (0..50).rev().collect::<Vec<_>>());
        assert!(pipeline.is_empty());
    }

    #[test]
    fn all_ids_of_a_connection_can_be_in_use_and_no_more() {
        let mut pipeline = Pipeline::new();
        let mut out = vec![];
        for number in 0..=u16::MAX {
            // Nearly in order, or looking for a free one would take long.
            let sent = sent("a.example.org.", number & !1);
            assert_eq!(pipeline.ask(sent, number, &mut out, s(0)), Ok(()));
            out.clear();
        }
        assert_eq!(pipeline.ask(sent("a.example.org.", 0), 0, &mut out, s(0)), Err(0));
        assert!(out.is_empty());
    }

    #[test]
    fn a_reply_to_another_question_leaves_who_asked_waiting() {
        let mut pipeline = Pipeline::new();
        let mut out = vec![];
        assert_eq!(pipeline.ask(sent("www.example.org.", 9), (), &mut out, s(0)), Ok(()));
        let other = reply(&sent("www.example.net.", 9));
        assert_eq!(pipeline.hear(&other, s(0)), None);
        assert_eq!(pipeline.hear(&[], s(0)), None);
        assert_eq!(pipeline.len(), 1);
        assert_eq!(pipeline.mismatches().total(), 2);
        for _ in 0..100 {
            assert_eq!(pipeline.hear(&other, s(0)), None);
        }
        assert!(pipeline.is_flooded());
    }

    #[test]
    fn a_connection_is_dead_when_somebody_waits_and_nothing_comes_for_five_seconds() {
        let mut pipeline = Pipeline::new();
        let mut out = vec![];
        assert_eq!(pipeline.dead_at(), None);
        assert_eq!(pipeline.ask(sent("a.example.org.", 1), (), &mut out, s(100)), Ok(()));
        assert_eq!(pipeline.dead_at(), Some(s(105)));
        assert_eq!(pipeline.ask(sent("b.example.org.", 2), (), &mut out, s(103)), Ok(()));
        assert_eq!(pipeline.dead_at(), Some(s(105)), "asking is not hearing");
        assert!(pipeline.hear(&reply(&sent("b.example.org.", 2)), s(104)).is_some());
        assert_eq!(pipeline.dead_at(), Some(s(109)));
    }

    #[test]
    fn what_is_never_answered_is_forgotten() {
        let mut pipeline = Pipeline::new();
        let mut out = vec![];
        for (number, now) in [(1, 100), (2, 103), (3, 106)] {
            assert_eq!(
                pipeline.ask(sent("a.example.org.", number), number, &mut out, s(now)),
                Ok(())
            );
        }
        let left: Vec<_> = pipeline.close().map(|(number, _)| number).collect();
        assert_eq!(left, [2, 3]);
    }

    #[test]
    fn whether_a_connection_ever_served_tells_a_closed_one_from_one_that_never_worked() {
        let mut pipeline = Pipeline::new();
        let mut out = vec![];
        assert_eq!(pipeline.ask(sent("a.example.org.", 1), 1, &mut out, s(0)), Ok(()));
        assert_eq!(pipeline.close().collect::<Vec<_>>(), [(1, Outcome::Broken)]);
        assert_eq!(pipeline.ask(sent("a.example.org.", 1), 1, &mut out, s(0)), Ok(()));
        assert_eq!(pipeline.ask(sent("b.example.org.", 2), 2, &mut out, s(0)), Ok(()));
        assert!(pipeline.hear(&reply(&sent("a.example.org.", 1)), s(0)).is_some());
        assert_eq!(pipeline.close().collect::<Vec<_>>(), [(2, Outcome::Closed)]);
    }

    fn sent(name: &str, id: u16) -> Sent {
        let question = Question::new(&Name::from_str(name).expect("a name"), RecordType::AAAA);
        let form = Form {
            edns: true,
            case: true,
            padded: false,
        };
        Sent::new(
            &question,
            form,
            &Entropy {
                id,
                case: [0x3333_3333_3333_3333; 4],
            },
        )
        .expect("it fits")
    }

    fn reply(sent: &Sent) -> Vec<u8> {
        answered(sent.bytes())
    }

    /// NXDOMAIN.
    fn answered(query: &[u8]) -> Vec<u8> {
        let mut reply = query.to_vec();
        reply[2] |= 0x80;
        reply[3] |= 0x83;
        reply
    }

    const fn s(s: u64) -> Duration {
        Duration::from_secs(s)
    }
}
