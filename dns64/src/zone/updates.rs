//! All zones and keys together: what one UPDATE message leads to.
//!
//! One at a time: from [`Step::Store`] to [`Updates::stored`] or [`Updates::failed`] every other one is
//! [`Step::Busy`], so that what is stored is what is carried out, in the same order.

use std::fmt;

use hickory_proto::op::{Edns, Message, OpCode, ResponseCode};

use super::{
    Durable, Zone,
    keys::{Key, KeyError, Keys},
    policy::Refused,
    replay::{Replay, Seen},
    state::{Change, Owner},
    tsig::{self, Failure, Reply, Signed, Verdict},
};

/// Octets that our OPT record says we take in a datagram.
const PAYLOAD: u16 = 1232;

/// Zones, keys, and what came lately.
#[derive(Clone, Debug)]
pub struct Updates {
    zones: Vec<Zone>,
    keys: Keys,
    replay: Replay,
    pending: Option<Pending>,
}

/// What to do about a message.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Send this.
    Answer {
        /// A whole message.
        response: Vec<u8>,
        /// For the log.
        why: Why,
    },
    /// Send nothing: it is no request, or one that is being answered already.
    Silent,
    /// Store this, then say so.
    Store(Change),
    /// Another is being stored. The message was not looked at; come back with it.
    Busy,
}

/// Why an answer is what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// It changes nothing.
    Unchanged,
    /// It changes something, and that is stored.
    Changed,
    /// It could not be stored.
    NotStored,
    /// It was there before.
    Repeated,
    /// Its signature is not good.
    Signature(Failure),
    /// It is not permitted, or not well-formed.
    Refused(Refused),
}

/// What waits for its change to be stored.
#[derive(Clone, Debug)]
struct Pending {
    change: Change,
    signed: Signed,
    draft: Draft,
}

/// A response but for its code.
#[derive(Clone, Debug)]
struct Draft {
    message: Message,
    reply: Option<Reply>,
}

impl Updates {
    /// Zones as they were stored, with keys.
    pub fn new(zones: Vec<Zone>, keys: Keys) -> Self {
        let signed = zones.iter().flat_map(|zone| &zone.state().signed);
        let replay = Replay::of(&signed.map(|(key, time)| (key.clone(), *time)).collect());
        Self {
            zones,
            keys,
            replay,
            pending: None,
        }
    }

    /// Other zones take the place of those that are. Keys stay, and so does what each of them signed lately. Not while a
    /// change is being stored, which would have nowhere to go.
    pub fn replace_zones(&mut self, zones: Vec<Zone>) {
        self.zones = zones;
    }

    /// The zones as they are, for those who answer queries.
    pub fn zones(&self) -> &[Zone] {
        &self.zones
    }

    /// The keys: queries may be signed with them too.
    pub const fn keys(&self) -> &Keys {
        &self.keys
    }

    /// Looks at `request`, a whole message with opcode UPDATE. `now` is UNIX seconds.
    pub fn receive(&mut self, request: &[u8], now: u64) -> Step {
        if self.pending.is_some() {
            return Step::Busy;
        }
        let &[high, low, flags, _, _, _, _, _, _, _, _, _, ..] = request else {
            return Step::Silent;
        };
        if flags >> 7 == 1 {
            // Never answer an answer.
            return Step::Silent;
        }
        let mut draft = Draft {
            message: Message::response(u16::from_be_bytes([high, low]), OpCode::Update),
            reply: None,
        };
        let message = Message::from_vec(request).ok();
        if let Some(message) = &message {
            draft.message.edns = message.edns.as_ref().map(|_| {
                let mut edns = Edns::new();
                edns.set_max_payload(PAYLOAD);
                edns
            });
        }
        let form = Refused::Protocol(ResponseCode::FormErr);
        let (signed, message) = match (tsig::verify(&self.keys, request, now), message) {
            (Verdict::Malformed, _) | (Verdict::Unsigned, None) => return draft.answer(Why::Refused(form), now),
            (Verdict::Unsigned, Some(_)) => return draft.answer(Why::Refused(Refused::Unsigned), now),
            (Verdict::Bad(failure, reply), _) => {
                draft.reply = Some(reply);
                return draft.answer(Why::Signature(failure), now);
            }
            (Verdict::Good(_, reply), None) => {
                draft.reply = Some(reply);
                return draft.answer(Why::Refused(form), now);
            }
            (Verdict::Good(signed, reply), Some(message)) => {
                draft.reply = Some(reply);
                // Strangers get no zone section back: their answers are not longer than what they sent.
                if let [zone] = message.queries.as_slice() {
                    draft.message.add_query(zone.clone());
                }
                (signed, message)
            }
        };
        self.replay.expire(now);
        match self.replay.check(&signed) {
            Seen::First => {}
            Seen::Again(response) => {
                let why = Why::Repeated;
                return Step::Answer { response, why };
            }
            Seen::Pending => return Step::Silent,
            Seen::Stale => {
                draft.reply = draft.reply.map(|reply| reply.stale(&signed));
                return draft.answer(Why::Signature(Failure::Time), now);
            }
        }
        match self.consider(&message, &signed) {
            Ok(Some(change)) => {
                self.pending = Some(Pending {
                    change: change.clone(),
                    signed,
                    draft,
                });
                Step::Store(change)
            }
            Ok(None) => self.remember(&signed, draft.answer(Why::Unchanged, now)),
            Err(refused) => self.remember(&signed, draft.answer(Why::Refused(refused), now)),
        }
    }

    /// The change is stored: carries it out and answers. [`Step::Silent`] if there was none.
    pub fn stored(&mut self, now: u64) -> Step {
        let Some(pending) = self.pending.take() else {
            return Step::Silent;
        };
        // Nothing comes between a change and its being carried out, so it applies.
        let why = if self.apply(pending.change) {
            Why::Changed
        } else {
            Why::NotStored
        };
        self.remember(&pending.signed, pending.draft.answer(why, now))
    }

    /// The change could not be stored: SERVFAIL, all stays as it was, and the client may try the same again.
    /// [`Step::Silent`] if there was none.
    pub fn failed(&mut self, now: u64) -> Step {
        let Some(pending) = self.pending.take() else {
            return Step::Silent;
        };
        self.replay.forget(&pending.signed);
        pending.draft.answer(Why::NotStored, now)
    }

    /// Takes a key in that is stored.
    ///
    /// # Errors
    ///
    /// [`KeyError`].
    pub fn add_key(&mut self, key: Key) -> Result<(), KeyError> {
        self.keys.add(key)
    }

    /// What has to be stored along with the removal of a key: the end of its node's records, if it is the node's last one.
    /// When the key signed last ([`State::signed`](super::State)) need not be kept then.
    pub fn removal(&self, key: &Owner) -> Option<Change> {
        let mut keys = self.keys.clone();
        let removed = keys.remove(key).filter(|removed| removed.last)?;
        self.zones.iter().find_map(|zone| zone.remove(&removed.node))
    }

    /// Forgets a key, and with its node's last one its records ([`Updates::removal`]). `false`, and nothing happens, while a
    /// change is being stored or if there is no such key.
    pub fn remove_key(&mut self, key: &Owner) -> bool {
        if self.pending.is_some() {
            return false;
        }
        let change = self.removal(key);
        let removed = self.keys.remove(key).is_some();
        if removed {
            self.forget_key(key);
        }
        removed && change.is_none_or(|change| self.apply(change))
    }

    /// Takes in what is stored already, because another process of the same service did it.
    pub fn learn(&mut self, durable: Durable) {
        match durable {
            Durable::Zone(change) => {
                if let Some((key, time)) = &change.signed {
                    self.replay.learn(key, *time);
                }
                // One that was there at the start is not new.
                let _ = self.apply(change);
            }
            Durable::Key(key) => drop(self.keys.add(key)),
            Durable::KeyRemoved { name, change } => {
                self.keys.remove(&name);
                self.forget_key(&name);
                if let Some(change) = change {
                    let _ = self.apply(change);
                }
            }
        }
    }

    fn forget_key(&mut self, key: &Owner) {
        self.replay.remove(key);
        self.zones.iter_mut().for_each(|zone| zone.forget_key(key));
    }

    fn consider(&self, request: &Message, signed: &Signed) -> Result<Option<Change>, Refused> {
        let origin = super::update::zone(request)?;
        let zone = self
            .zones
            .iter()
            .find(|zone| zone.zones().any(|zone| *zone.origin() == origin));
        zone.ok_or(ResponseCode::NotAuth)?.update(request, signed)
    }

    fn apply(&mut self, change: Change) -> bool {
        let zone = self.zones.iter_mut().find(|zone| zone.origin() == change.zone.name());
        zone.is_some_and(|zone| zone.apply(change).is_ok())
    }

    fn remember(&mut self, signed: &Signed, step: Step) -> Step {
        if let Step::Answer { response, .. } = &step {
            self.replay.answered(signed, response);
        }
        step
    }
}

impl Why {
    /// The response's code.
    pub const fn code(&self) -> ResponseCode {
        match self {
            Self::Unchanged | Self::Changed | Self::Repeated => ResponseCode::NoError,
            Self::NotStored => ResponseCode::ServFail,
            Self::Signature(failure) => failure.code(),
            Self::Refused(refused) => refused.code(),
        }
    }

    /// As in metrics.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Unchanged => "unchanged",
            Self::Changed => "changed",
            Self::NotStored => "not-stored",
            Self::Repeated => "repeated",
            Self::Signature(failure) => failure.name(),
            Self::Refused(refused) => refused.name(),
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unchanged => write!(f, "it changes nothing"),
            Self::Changed => write!(f, "it is stored and in force"),
            Self::NotStored => write!(f, "it could not be stored"),
            Self::Repeated => write!(f, "it was answered before"),
            Self::Signature(Failure::Key) => write!(f, "it is signed with a key that is not known"),
            Self::Signature(Failure::Signature) => write!(f, "its signature is not that of its key"),
            Self::Signature(Failure::Time) => {
                write!(f, "it was signed at another time than now, or before another one")
            }
            Self::Signature(Failure::Truncated) => write!(f, "its signature is not whole"),
            Self::Refused(refused) => refused.fmt(f),
        }
    }
}

impl Draft {
    fn answer(mut self, why: Why, now: u64) -> Step {
        self.message.metadata.response_code = why.code();
        let Ok(response) = self.message.to_vec() else {
            // Only a message that could be read is echoed; were it not so, silence is the safe answer.
            return Step::Silent;
        };
        let response = match &self.reply {
            Some(reply) => reply.finish(response, now),
            None => response,
        };
        Step::Answer { response, why }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::zone::{
        Algorithm, Config, State,
        vectors::{EMPTY, OTHER, REGISTER, SIGNED, UNSIGNED, bytes},
    };

    #[test]
    fn nothing_is_in_force_or_answered_before_it_is_stored() {
        let mut updates = updates(State::default());
        let Step::Store(change) = updates.receive(&bytes(REGISTER), SIGNED) else {
            panic!("a change");
        };
        assert!(updates.zones()[0].state().nodes.is_empty());
        assert_eq!(updates.receive(&bytes(REGISTER), SIGNED), Step::Busy);
        assert_eq!(updates.receive(&bytes(EMPTY), SIGNED), Step::Busy);
        assert!(!updates.remove_key(&owner("node1.fleet")));
        let (response, why) = answer(updates.stored(SIGNED));
        assert_eq!((code(&response), why), (ResponseCode::NoError, Why::Changed));
        assert_eq!(updates.zones()[0].state().nodes[&change.node], change.records);
        assert_eq!(updates.stored(SIGNED), Step::Silent);
    }

    #[test]
    fn the_same_request_again_is_answered_with_the_same_bytes_and_not_carried_out_again() {
        let mut updates = updates(State::default());
        updates.receive(&bytes(REGISTER), SIGNED);
        let (first, _) = answer(updates.stored(SIGNED));
        let state = updates.zones()[0].state().clone();
        for now in [SIGNED, SIGNED + 300] {
            let again = answer(updates.receive(&bytes(REGISTER), now));
            assert_eq!(again, (first.clone(), Why::Repeated));
        }
        assert_eq!(
            answer(updates.receive(&bytes(REGISTER), SIGNED + 301)).1,
            Why::Signature(Failure::Time)
        );
        assert_eq!(updates.zones()[0].state(), &state);
    }

    #[test]
    fn a_request_recorded_before_a_restart_is_badtime_after_it() {
        let mut before = updates(State::default());
        before.receive(&bytes(REGISTER), SIGNED);
        before.stored(SIGNED);
        let mut after = updates(before.zones()[0].state().clone());
        let (response, why) = answer(after.receive(&bytes(REGISTER), SIGNED + 1));
        assert_eq!(why, Why::Signature(Failure::Time));
        assert_eq!(code(&response), ResponseCode::NotAuth);
        assert_eq!(response[response.len() - 10..][..4], [0, 18, 0, 6]);
        assert_eq!(answer(after.receive(&bytes(EMPTY), SIGNED + 1)).1, Why::Unchanged);
    }

    #[test]
    fn what_cannot_be_stored_is_servfail_and_may_be_tried_again() {
        let mut updates = updates(State::default());
        updates.receive(&bytes(REGISTER), SIGNED);
        let (response, why) = answer(updates.failed(SIGNED));
        assert_eq!((code(&response), why), (ResponseCode::ServFail, Why::NotStored));
        assert!(updates.zones()[0].state().nodes.is_empty());
        assert!(matches!(updates.receive(&bytes(REGISTER), SIGNED), Step::Store(_)));
        assert_eq!(answer(updates.stored(SIGNED)).1, Why::Changed);
        assert_eq!(updates.failed(SIGNED), Step::Silent);
    }

    #[test]
    fn what_is_not_signed_is_refused_and_an_answer_is_never_answered() {
        let mut updates = updates(State::default());
        let (response, why) = answer(updates.receive(&bytes(UNSIGNED), SIGNED));
        assert_eq!(
            (code(&response), why),
            (ResponseCode::Refused, Why::Refused(Refused::Unsigned))
        );
        assert_eq!(response.len(), 12);
        let (response, why) = answer(updates.receive(&bytes(OTHER), SIGNED));
        assert_eq!(
            (code(&response), why),
            (ResponseCode::NotAuth, Why::Signature(Failure::Key))
        );
        assert!(response.len() < bytes(OTHER).len());
        let mut response = bytes(REGISTER);
        response[2] |= 0x80;
        assert_eq!(updates.receive(&response, SIGNED), Step::Silent);
        let request = bytes(UNSIGNED);
        for end in 0..request.len() {
            match updates.receive(&request[..end], SIGNED) {
                Step::Silent => assert!(end < 12, "{end}"),
                step => {
                    let (response, _) = answer(step);
                    assert_eq!((code(&response), response.len()), (ResponseCode::FormErr, 12), "{end}");
                }
            }
        }
    }

    #[test]
    fn with_the_last_key_of_a_node_its_records_go() {
        let mut updates = updates(State::default());
        let (first, second) = (owner("node1.fleet"), owner("key2.node1.fleet"));
        updates.add_key(key(&second)).expect("its place");
        updates.receive(&bytes(REGISTER), SIGNED);
        updates.stored(SIGNED);
        assert_eq!(updates.removal(&first), None);
        assert!(updates.remove_key(&first) && !updates.remove_key(&first));
        assert_eq!(updates.zones()[0].state().nodes.len(), 1);
        assert_eq!(
            answer(updates.receive(&bytes(EMPTY), SIGNED)).1,
            Why::Signature(Failure::Key)
        );
        assert!(updates.removal(&second).is_some());
        assert!(updates.remove_key(&second));
        assert!(updates.zones()[0].state().nodes.is_empty());
    }

    #[test]
    fn the_key_of_a_node_in_one_zone_changes_nothing_in_another() {
        let mut updates = updates(State::default());
        let other = owner("node1.other");
        let mut key = key(&owner("node1.fleet"));
        updates.remove_key(&key.name);
        key.node = other;
        updates.add_key(key).expect("its place");
        let (_, why) = answer(updates.receive(&bytes(REGISTER), SIGNED));
        assert_eq!(why.name(), "other-name");
    }

    fn updates(state: State) -> Updates {
        let zone = |origin: &str, prefix: &str, state| {
            let prefixes = vec![prefix.parse().expect("a prefix")];
            Zone::new(&Config::new(owner(origin).name(), prefixes), state).expect("a zone")
        };
        let zones = vec![
            zone("fleet", "fd0d::/64", state),
            zone("other", "fd0e::/64", State::default()),
        ];
        let mut updates = Updates::new(zones, Keys::default());
        updates.add_key(key(&owner("node1.fleet"))).expect("its place");
        updates
    }

    /// A key of node1: octets 0, 1, 2 and so on.
    fn key(name: &Owner) -> Key {
        let random: Vec<u8> = (0..32).collect();
        Key::mint(name.clone(), Algorithm::HmacSha256, owner("node1.fleet"), &random).expect("a key")
    }

    fn answer(step: Step) -> (Vec<u8>, Why) {
        match step {
            Step::Answer { response, why } => (response, why),
            other => panic!("{other:?}"),
        }
    }

    fn code(response: &[u8]) -> ResponseCode {
        ResponseCode::from_low(response[3] & 15)
    }

    fn owner(text: &str) -> Owner {
        text.parse().expect("a name")
    }
}
