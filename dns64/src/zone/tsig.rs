//! Signed messages (RFC 8945): [`verify`] a request's bytes, then [`Reply::finish`] its response.
//!
//! All works on bytes as they came, since a MAC over a message that was taken apart and put together again may be one
//! over another message. What cannot be read to its end, or goes on after it, is malformed.

use std::sync::Arc;

use hickory_proto::{op::ResponseCode, rr::Name};

use super::{
    keys::{Key, Keys},
    state::Owner,
};

/// Seconds that a signature is good for, before and after it was made (RFC 8945 §10). A request may ask for less, not
/// for more.
pub const FUDGE: u16 = 300;

const TSIG: u16 = 250;
const CLASS_ANY: u16 = 255;
const HEADER: usize = 12;

/// What the signature of a request is worth.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// It has none.
    Unsigned,
    /// It cannot be read, or its TSIG is not the last record of it: FORMERR without a TSIG (RFC 8945 §5.2).
    Malformed,
    /// It is not good: NOTAUTH, and a TSIG that says why.
    Bad(Failure, Reply),
    /// Made with a key that is known, in time, and whole.
    Good(Signed, Reply),
}

/// Who signed a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signed {
    /// With this key.
    pub key: Owner,
    /// Whose it is.
    pub node: Owner,
    /// When, in UNIX seconds.
    pub time: u64,
    /// The MAC: no two requests have the same.
    pub mac: Vec<u8>,
}

/// Why a signature is not good (RFC 8945 §5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No such key, or not for this algorithm.
    Key,
    /// The MAC is not that of the message.
    Signature,
    /// Signed too long ago, in the future, or earlier than what the same key signed before.
    Time,
    /// Only a part of the MAC.
    Truncated,
}

/// What the response to a signed request needs to be signed too.
#[derive(Clone, Debug)]
pub struct Reply {
    owner: Vec<u8>,
    algorithm: Vec<u8>,
    id: u16,
    error: u16,
    /// The client's time: with that it can verify what says that its clock is wrong.
    time: Option<u64>,
    /// The key and the request's MAC; `None` if there is no key to sign with.
    signing: Option<(Arc<Key>, Vec<u8>)>,
}

/// A TSIG record as it came.
struct Record<'a> {
    /// Where it begins, and the signed message ends.
    start: usize,
    name: Name,
    /// In lower case.
    owner: Vec<u8>,
    /// In lower case.
    algorithm: Vec<u8>,
    time: u64,
    fudge: u16,
    mac: &'a [u8],
    id: u16,
    error: u16,
    other: &'a [u8],
}

/// What is wrong with a message that cannot be read.
struct Malformed;

/// What is left of a message, and the whole for the sake of compressed names.
#[derive(Clone)]
struct Cursor<'a> {
    message: &'a [u8],
    at: usize,
}

impl Failure {
    /// The code in the response's TSIG: BADSIG 16, BADKEY 17, BADTIME 18, BADTRUNC 22. Its header has NOTAUTH.
    pub const fn error(self) -> u16 {
        match self {
            Self::Signature => 16,
            Self::Key => 17,
            Self::Time => 18,
            Self::Truncated => 22,
        }
    }

    /// The response's code.
    pub const fn code(self) -> ResponseCode {
        ResponseCode::NotAuth
    }

    /// As in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Key => "key",
            Self::Signature => "signature",
            Self::Time => "time",
            Self::Truncated => "truncated",
        }
    }
}

/// Checks the signature of `request`, a whole message. `now` is UNIX seconds.
///
/// In the order of RFC 8945 §5.2: form, key, MAC, time, truncation. Only whole MACs are good here (§5.2.4 leaves that to
/// us), and whoever sends a shorter one learns so only if it is right.
pub fn verify(keys: &Keys, request: &[u8], now: u64) -> Verdict {
    let record = match find(request) {
        Ok(Some(record)) => record,
        Ok(None) => return Verdict::Unsigned,
        Err(Malformed) => return Verdict::Malformed,
    };
    let bad = |failure: Failure, signing: Option<(Arc<Key>, Vec<u8>)>| {
        let reply = Reply {
            owner: record.owner.clone(),
            algorithm: record.algorithm.clone(),
            id: record.id,
            error: failure.error(),
            time: (failure == Failure::Time).then_some(record.time),
            signing,
        };
        Verdict::Bad(failure, reply)
    };
    let named = keys.get(&record.name);
    let Some(key) = named.filter(|key| record.algorithm == wire_name(key.algorithm.name())) else {
        return bad(Failure::Key, None);
    };
    let size = key.algorithm.size();
    if record.mac.len() > size || record.mac.len() < size / 2 {
        // No MAC that any truncation leaves (§5.2.2.1; half of each of our three is more than its other bound of ten).
        return Verdict::Malformed;
    }
    if !key.has_signed(&record.signed_bytes(request), record.mac) {
        return bad(Failure::Signature, None);
    }
    let signing = Some((Arc::clone(key), record.mac.to_vec()));
    if now.abs_diff(record.time) > record.fudge.min(FUDGE).into() {
        return bad(Failure::Time, signing);
    }
    if record.mac.len() < size {
        return bad(Failure::Truncated, signing);
    }
    let signed = Signed {
        key: key.name.clone(),
        node: key.node.clone(),
        time: record.time,
        mac: record.mac.to_vec(),
    };
    let reply = Reply {
        id: record.id,
        owner: record.owner,
        algorithm: record.algorithm,
        error: 0,
        time: None,
        signing,
    };
    Verdict::Good(signed, reply)
}

impl Reply {
    /// Octets that [`Reply::finish`] adds: so much less of a response fits into a datagram.
    pub fn size(&self) -> usize {
        let mac = self.signing.as_ref().map_or(0, |(key, _)| key.algorithm.size());
        let other = if self.error == Failure::Time.error() { 6 } else { 0 };
        self.owner.len() + 10 + self.algorithm.len() + 16 + mac + other
    }

    /// The same for a request that is good but too late: signed earlier than another one ([`Replay`](super::Replay)).
    pub fn stale(self, signed: &Signed) -> Self {
        Self {
            error: Failure::Time.error(),
            time: Some(signed.time),
            ..self
        }
    }

    /// Puts the TSIG at the end of `response`, a whole message without one. `now` is UNIX seconds.
    ///
    /// Signed, unless the request was signed with a key that we do not know or not signed with the key it names
    /// (RFC 8945 §5.3.2).
    pub fn finish(&self, mut response: Vec<u8>, now: u64) -> Vec<u8> {
        let Some(&[high, low]) = response.get(10..HEADER) else {
            return response;
        };
        let time = self.time.unwrap_or(now);
        let other = if self.error == Failure::Time.error() {
            octets48(now).to_vec()
        } else {
            Vec::new()
        };
        let mac = match &self.signing {
            None => Vec::new(),
            Some((key, request_mac)) => {
                let mut data = length(request_mac).to_vec();
                data.extend(request_mac);
                // Who forwarded the request may have given it an id of its own; the client knows the original one.
                data.extend(self.id.to_be_bytes());
                data.extend(&response[2..]);
                extend_with_variables(&mut data, &self.owner, &self.algorithm, time, FUDGE, self.error, &other);
                key.mac(&data)
            }
        };
        let mut rdata = self.algorithm.clone();
        rdata.extend(octets48(time));
        rdata.extend(FUDGE.to_be_bytes());
        rdata.extend(length(&mac));
        rdata.extend(&mac);
        rdata.extend(self.id.to_be_bytes());
        rdata.extend(self.error.to_be_bytes());
        rdata.extend(length(&other));
        rdata.extend(&other);

        let additionals = u16::from_be_bytes([high, low]).saturating_add(1);
        response[10..HEADER].copy_from_slice(&additionals.to_be_bytes());
        response.extend(&self.owner);
        response.extend(TSIG.to_be_bytes());
        response.extend(CLASS_ANY.to_be_bytes());
        response.extend(0_u32.to_be_bytes());
        response.extend(length(&rdata));
        response.extend(&rdata);
        response
    }
}

/// The TSIG of `message`; `None` without one.
fn find(message: &[u8]) -> Result<Option<Record<'_>>, Malformed> {
    let mut cursor = Cursor { message, at: 4 };
    let questions = cursor.u16()?;
    let others = u32::from(cursor.u16()?) + u32::from(cursor.u16()?);
    let additionals = cursor.u16()?;
    for _ in 0..questions {
        cursor.skip_name()?;
        cursor.take(4)?;
    }
    let last = others + u32::from(additionals);
    let mut found = None;
    for place in 1..=last {
        let start = cursor.at;
        cursor.skip_name()?;
        let kind = cursor.u16()?;
        let (class, ttl) = (cursor.u16()?, (cursor.u16()?, cursor.u16()?));
        let length = cursor.u16()?;
        let rdata = cursor.at;
        cursor.take(length.into())?;
        if kind != TSIG {
            continue;
        }
        if place != last || additionals == 0 || class != CLASS_ANY || ttl != (0, 0) {
            return Err(Malformed);
        }
        found = Some(Record::read(message, start, rdata)?);
    }
    if cursor.at == message.len() {
        Ok(found)
    } else {
        Err(Malformed)
    }
}

impl<'a> Record<'a> {
    /// The record that begins at `start`, its data at `rdata`, and ends with `message`.
    fn read(message: &'a [u8], start: usize, rdata: usize) -> Result<Self, Malformed> {
        let owner = Cursor { message, at: start }.name()?;
        let mut cursor = Cursor { message, at: rdata };
        let algorithm = cursor.plain_name()?;
        let time = cursor
            .take(6)?
            .iter()
            .fold(0, |time, octet| time << 8 | u64::from(*octet));
        let fudge = cursor.u16()?;
        let mac = cursor.u16()?;
        let mac = cursor.take(mac.into())?;
        let (id, error) = (cursor.u16()?, cursor.u16()?);
        let other = cursor.u16()?;
        let other = cursor.take(other.into())?;
        if cursor.at != message.len() {
            return Err(Malformed);
        }
        Ok(Self {
            start,
            name: name_of(&owner)?,
            owner,
            algorithm,
            time,
            fudge,
            mac,
            id,
            error,
            other,
        })
    }

    /// What was signed (RFC 8945 §4.3.3): the message as it was before the TSIG came to it, and what the TSIG says.
    fn signed_bytes(&self, message: &[u8]) -> Vec<u8> {
        let mut data = message.get(..self.start).unwrap_or_default().to_vec();
        if let Some(id) = data.get_mut(..2) {
            id.copy_from_slice(&self.id.to_be_bytes());
        }
        if let Some(count) = data.get_mut(10..HEADER) {
            let additionals = u16::from_be_bytes([count[0], count[1]]).saturating_sub(1);
            count.copy_from_slice(&additionals.to_be_bytes());
        }
        extend_with_variables(
            &mut data,
            &self.owner,
            &self.algorithm,
            self.time,
            self.fudge,
            self.error,
            self.other,
        );
        data
    }
}

/// The TSIG variables of RFC 8945 §4.3.3; both names are in lower case and not compressed.
fn extend_with_variables(
    data: &mut Vec<u8>,
    owner: &[u8],
    algorithm: &[u8],
    time: u64,
    fudge: u16,
    error: u16,
    other: &[u8],
) {
    data.extend(owner);
    data.extend(CLASS_ANY.to_be_bytes());
    data.extend(0_u32.to_be_bytes());
    data.extend(algorithm);
    data.extend(octets48(time));
    data.extend(fudge.to_be_bytes());
    data.extend(error.to_be_bytes());
    data.extend(length(other));
    data.extend(other);
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let taken = self.message.get(self.at..).and_then(|rest| rest.get(..count));
        let taken = taken.ok_or(Malformed)?;
        self.at += count;
        Ok(taken)
    }

    fn u8(&mut self) -> Result<u8, Malformed> {
        self.take(1).map(|octets| octets[0])
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        self.take(2).map(|octets| u16::from_be_bytes([octets[0], octets[1]]))
    }

    fn skip_name(&mut self) -> Result<(), Malformed> {
        loop {
            match self.u8()? {
                0 => return Ok(()),
                length @ 1..=63 => self.take(length.into())?,
                0xc0..=0xff => return self.u8().map(drop),
                _ => return Err(Malformed),
            };
        }
    }

    /// A name that may be compressed, in lower case and not compressed. A pointer goes back before what pointed to it, so
    /// that it ends.
    fn name(&mut self) -> Result<Vec<u8>, Malformed> {
        let mut name = Vec::new();
        let mut bound = self.at;
        loop {
            let length = self.u8()?;
            match length {
                0xc0..=0xff => {
                    let to = usize::from(length & 0x3f) << 8 | usize::from(self.u8()?);
                    if to >= bound {
                        return Err(Malformed);
                    }
                    (bound, self.at) = (to, to);
                    continue;
                }
                64.. => return Err(Malformed),
                _ => {}
            }
            name.push(length);
            name.extend(self.take(length.into())?.iter().map(u8::to_ascii_lowercase));
            if name.len() > Name::MAX_LENGTH {
                return Err(Malformed);
            }
            if length == 0 {
                return Ok(name);
            }
        }
    }

    /// A name that must not be compressed, in lower case.
    fn plain_name(&mut self) -> Result<Vec<u8>, Malformed> {
        let start = self.at;
        let name = self.name()?;
        if self.at.checked_sub(start) == Some(name.len()) {
            Ok(name)
        } else {
            Err(Malformed)
        }
    }
}

/// A name that is not compressed.
fn name_of(wire: &[u8]) -> Result<Name, Malformed> {
    let mut labels = Vec::new();
    let mut rest = wire;
    while let Some((&length, after)) = rest.split_first() {
        let (label, after) = after.split_at_checked(length.into()).ok_or(Malformed)?;
        if !label.is_empty() {
            labels.push(label);
        }
        rest = after;
    }
    Name::from_labels(labels).map_err(|_| Malformed)
}

/// One label as a name.
fn wire_name(label: &str) -> Vec<u8> {
    let mut name = vec![u8::try_from(label.len()).unwrap_or_default()];
    name.extend(label.bytes());
    name.push(0);
    name
}

fn octets48(time: u64) -> [u8; 6] {
    let [_, _, octets @ ..] = time.to_be_bytes();
    octets
}

fn length(octets: &[u8]) -> [u8; 2] {
    // Everything that is measured here came from, or goes into, one message.
    u16::try_from(octets.len()).unwrap_or(u16::MAX).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use hickory_proto::{
        op::{Message, MessageType, OpCode},
        rr::TSigner,
    };

    use super::*;
    use crate::zone::{
        keys::Algorithm,
        vectors::{OTHER, QUERY_SHA256, QUERY_SHA384, QUERY_SHA512, REGISTER, SIGNED, UNSIGNED, bytes},
    };

    #[test]
    fn what_nsupdate_signs_is_good_with_each_algorithm() {
        for (request, algorithm) in [
            (QUERY_SHA256, Algorithm::HmacSha256),
            (QUERY_SHA384, Algorithm::HmacSha384),
            (QUERY_SHA512, Algorithm::HmacSha512),
            (REGISTER, Algorithm::HmacSha256),
        ] {
            let signed = good(&keys(algorithm), &bytes(request), SIGNED);
            assert_eq!(signed.key.to_string(), "node1.fleet.");
            assert_eq!((signed.time, signed.mac.len()), (SIGNED, algorithm.size()));
        }
    }

    #[test]
    fn a_request_without_a_signature_is_no_error_here() {
        let verdict = verify(&keys(Algorithm::HmacSha256), &bytes(UNSIGNED), SIGNED);
        assert!(matches!(verdict, Verdict::Unsigned));
    }

    #[test]
    fn rfc8945_5_2_1_an_unknown_key_and_a_known_one_of_another_algorithm_are_badkey_in_an_unsigned_answer() {
        for (request, algorithm) in [(OTHER, Algorithm::HmacSha256), (REGISTER, Algorithm::HmacSha384)] {
            let (failure, reply) = bad(&keys(algorithm), &bytes(request), SIGNED);
            assert_eq!((failure, failure.error()), (Failure::Key, 17));
            assert_unsigned(&reply, failure);
        }
    }

    #[test]
    fn rfc8945_5_2_2_not_one_bit_of_a_signed_message_may_differ() {
        let keys = keys(Algorithm::HmacSha256);
        let request = bytes(REGISTER);
        let start = request.len() - (13 + 10 + 0x3d);
        for at in 0..request.len() * 8 {
            let mut other = request.clone();
            other[at / 8] ^= 0x80 >> (at % 8);
            match verify(&keys, &other, SIGNED) {
                Verdict::Good(signed, _) => {
                    // The id is not signed, but the one in the TSIG is; the case of its names does not matter.
                    let id = at / 8 < 2;
                    let case = (start..start + 12).contains(&(at / 8)) || (start + 23..start + 35).contains(&(at / 8));
                    assert!(id || case && at % 8 == 2, "bit {at}");
                    assert_eq!(signed.mac, good(&keys, &request, SIGNED).mac);
                }
                Verdict::Bad(Failure::Signature, reply) => assert_unsigned(&reply, Failure::Signature),
                Verdict::Bad(Failure::Key, reply) => assert_unsigned(&reply, Failure::Key),
                Verdict::Bad(failure, _) => panic!("bit {at}: {failure:?}"),
                Verdict::Malformed | Verdict::Unsigned => {}
            }
        }
    }

    #[test]
    fn rfc8945_5_2_3_a_signature_is_good_within_its_fudge_and_ours() {
        let keys = keys(Algorithm::HmacSha256);
        let request = bytes(REGISTER);
        for now in [SIGNED - 300, SIGNED, SIGNED + 300] {
            good(&keys, &request, now);
        }
        for now in [0, SIGNED - 301, SIGNED + 301, u64::MAX] {
            assert_eq!(bad(&keys, &request, now).0, Failure::Time);
        }
        // A time or a fudge at its very end.
        for (time, fudge, now, expected) in [
            (SIGNED, 10, SIGNED + 10, None),
            (SIGNED, 10, SIGNED + 11, Some(Failure::Time)),
            (SIGNED, u16::MAX, SIGNED + 300, None),
            (SIGNED, u16::MAX, SIGNED + 301, Some(Failure::Time)),
            (0, u16::MAX, 0, None),
            ((1 << 48) - 1, u16::MAX, SIGNED, Some(Failure::Time)),
        ] {
            let request = sign(&bytes(UNSIGNED), time, fudge, 32);
            let failure = match verify(&keys, &request, now) {
                Verdict::Bad(failure, _) => Some(failure),
                Verdict::Good(..) => None,
                other => panic!("{other:?}"),
            };
            assert_eq!(failure, expected, "{time} {fudge} {now}");
        }
    }

    #[test]
    fn rfc8945_5_2_3_badtime_is_signed_with_the_clients_time_and_carries_ours() {
        let keys = keys(Algorithm::HmacSha256);
        let (failure, reply) = bad(&keys, &bytes(REGISTER), SIGNED + 301);
        let response = reply.finish(response(), SIGNED + 301);
        let record = read(&response);
        assert_eq!((failure.error(), record.error, record.time), (18, 18, SIGNED));
        assert_eq!(record.other, octets48(SIGNED + 301));
        assert!(is_signed(&keys, &bytes(REGISTER), &response));
    }

    #[test]
    fn rfc8945_5_2_2_1_and_5_2_4_part_of_a_mac_is_badtrunc_if_right_and_malformed_if_too_short_or_too_long() {
        let keys = keys(Algorithm::HmacSha256);
        for size in 16..32 {
            let request = sign(&bytes(UNSIGNED), SIGNED, 300, size);
            let (failure, reply) = bad(&keys, &request, SIGNED);
            assert_eq!((failure, failure.error()), (Failure::Truncated, 22));
            assert!(is_signed(&keys, &request, &reply.finish(response(), SIGNED)));
            assert_eq!(
                bad(&keys, &request, SIGNED + 301).0,
                Failure::Time,
                "time comes before truncation"
            );
            let mut wrong = request;
            let last = wrong.len() - 7;
            wrong[last] ^= 1;
            assert_eq!(bad(&keys, &wrong, SIGNED).0, Failure::Signature);
        }
        for size in [0, 1, 10, 15, 33, 64] {
            let request = sign(&bytes(UNSIGNED), SIGNED, 300, size);
            assert!(matches!(verify(&keys, &request, SIGNED), Verdict::Malformed), "{size}");
        }
    }

    #[test]
    fn rfc8945_5_1_a_tsig_that_is_not_the_last_record_or_not_the_only_one_is_malformed() {
        let keys = keys(Algorithm::HmacSha256);
        let signed = bytes(REGISTER);
        let tsig = signed[signed.len() - (13 + 10 + 0x3d)..].to_vec();
        let changed = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut message = signed.clone();
            change(&mut message);
            matches!(verify(&keys, &message, SIGNED), Verdict::Malformed)
        };
        let class = signed.len() - (10 + 0x3d) + 2;
        assert!(changed(&|message| {
            message.extend(&tsig);
            message[11] = 2;
        }));
        assert!(changed(&|message| message[11] = 0), "octets beyond the last record");
        assert!(changed(&|message| message.push(0)));
        assert!(
            changed(&|message| (message[9], message[11]) = (3, 0)),
            "in another section"
        );
        assert!(changed(&|message| message[class + 1] = 1), "of another class than ANY");
        assert!(changed(&|message| message[class + 5] = 1), "with a TTL");
    }

    #[test]
    fn a_name_that_points_to_itself_or_ahead_ends_and_a_compressed_algorithm_is_malformed() {
        let keys = keys(Algorithm::HmacSha256);
        let header = [0, 1, 0x28, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        for owner in [
            &[0xc0, 12][..],
            &[0xc0, 14],
            &[0xc0, 0xff],
            &[1, b'a', 0xc0, 12],
            &[0x40],
            &[0xc0],
        ] {
            let mut message = header.to_vec();
            message.extend(owner);
            message.extend([0, 250, 0, 255, 0, 0, 0, 0, 0, 16]);
            message.extend([0; 16]);
            assert!(matches!(verify(&keys, &message, 0), Verdict::Malformed), "{owner:x?}");
        }
        let mut message = header.to_vec();
        message.extend(b"\x05node1\x05fleet\0\0\xfa\0\xff\0\0\0\0\0\x12\xc0\x0c");
        message.extend([0; 16]);
        assert!(matches!(verify(&keys, &message, 0), Verdict::Malformed));
    }

    #[test]
    fn every_beginning_of_a_request_is_malformed_and_nothing_panics() {
        let keys = keys(Algorithm::HmacSha256);
        let request = bytes(REGISTER);
        for end in 0..request.len() {
            assert!(
                matches!(verify(&keys, &request[..end], SIGNED), Verdict::Malformed),
                "{end}"
            );
        }
        // As the fuzzer would: octets changed at places that a simple generator chooses.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..100_000 {
            let mut message = request.clone();
            for _ in 0..3 {
                state = state
                    .wrapping_mul(0x5851_f42d_4c95_7f2d)
                    .wrapping_add(0x1405_7b7e_f767_814f);
                let at = (state >> 33) as usize % message.len();
                message[at] = (state >> 24) as u8;
            }
            match verify(&keys, &message, SIGNED) {
                Verdict::Bad(_, reply) | Verdict::Good(_, reply) => drop(reply.finish(response(), SIGNED)),
                Verdict::Unsigned | Verdict::Malformed => {}
            }
        }
    }

    #[test]
    fn an_answer_is_signed_as_another_implementation_verifies_it() {
        let keys = keys(Algorithm::HmacSha256);
        let key = keys.iter().next().expect("a key");
        let signer = TSigner::new(
            (0..32).collect(),
            hickory_proto::rr::rdata::tsig::TsigAlgorithm::HmacSha256,
            key.name.name().clone(),
            300,
        )
        .expect("a signer");
        let request = bytes(REGISTER);
        let Verdict::Good(signed, reply) = verify(&keys, &request, SIGNED) else {
            panic!("it is good");
        };
        let response = reply.finish(response(), SIGNED);
        assert_eq!(response.len(), self::response().len() + reply.size());
        let verified = signer.verify_message_byte(&response, Some(&signed.mac), true);
        let (_, time, _) = verified.expect("a good signature");
        assert_eq!(time, SIGNED);
        assert!(is_signed(&keys, &request, &response));
        assert!(Message::from_vec(&response).expect("a message").signature.is_some());
    }

    #[test]
    fn a_stale_update_is_told_our_time() {
        let keys = keys(Algorithm::HmacSha256);
        let Verdict::Good(signed, reply) = verify(&keys, &bytes(REGISTER), SIGNED) else {
            panic!("it is good");
        };
        let stale = reply.stale(&signed);
        let response = stale.finish(response(), SIGNED + 5);
        let record = read(&response);
        assert_eq!(
            (record.error, record.time, record.other),
            (18, SIGNED, &octets48(SIGNED + 5)[..])
        );
        assert_eq!(response.len(), self::response().len() + stale.size());
    }

    fn good(keys: &Keys, request: &[u8], now: u64) -> Signed {
        match verify(keys, request, now) {
            Verdict::Good(signed, _) => signed,
            other => panic!("{other:?}"),
        }
    }

    fn bad(keys: &Keys, request: &[u8], now: u64) -> (Failure, Reply) {
        match verify(keys, request, now) {
            Verdict::Bad(failure, reply) => (failure, reply),
            other => panic!("{other:?}"),
        }
    }

    /// RFC 8945 §5.3.2: an empty MAC, our time, and the error.
    fn assert_unsigned(reply: &Reply, failure: Failure) {
        let response = reply.finish(response(), SIGNED + 7);
        let record = read(&response);
        assert_eq!((record.mac, record.error), (&[][..], failure.error()));
        assert_eq!((record.time, record.other), (SIGNED + 7, &[][..]));
        assert_eq!(response.len(), self::response().len() + reply.size());
    }

    /// Whether `response` has the MAC that RFC 8945 §5.3 asks for.
    fn is_signed(keys: &Keys, request: &[u8], response: &[u8]) -> bool {
        let (asked, answered) = (read(request), read(response));
        let mut data = length(asked.mac).to_vec();
        data.extend(asked.mac);
        data.extend(answered.signed_bytes(response));
        let key = keys.get(&answered.name).expect("the key");
        answered.mac.len() == key.algorithm.size() && key.has_signed(&data, answered.mac)
    }

    fn read(message: &[u8]) -> super::Record<'_> {
        match find(message) {
            Ok(Some(record)) => record,
            _ => panic!("a TSIG"),
        }
    }

    /// `message` with a TSIG of node1's key whose MAC is `size` octets of the right one, then zeros.
    fn sign(message: &[u8], time: u64, fudge: u16, size: usize) -> Vec<u8> {
        let keys = keys(Algorithm::HmacSha256);
        let key = keys.iter().next().expect("a key");
        let (owner, algorithm) = (b"\x05node1\x05fleet\0", wire_name("hmac-sha256"));
        let mut data = message.to_vec();
        extend_with_variables(&mut data, owner, &algorithm, time, fudge, 0, &[]);
        let mut mac = key.mac(&data);
        mac.resize(size, 0);
        let mut signed = message.to_vec();
        signed[11] += 1;
        signed.extend(owner);
        signed.extend([0, 250, 0, 255, 0, 0, 0, 0]);
        signed.extend((algorithm.len() as u16 + 16 + size as u16).to_be_bytes());
        signed.extend(&algorithm);
        signed.extend(octets48(time));
        signed.extend(fudge.to_be_bytes());
        signed.extend(length(&mac));
        signed.extend(&mac);
        signed.extend(&message[..2]);
        signed.extend([0; 4]);
        signed
    }

    fn response() -> Vec<u8> {
        Message::new(0x4b19, MessageType::Response, OpCode::Update)
            .to_vec()
            .expect("a response")
    }

    /// node1's key: octets 0, 1, 2 and so on.
    fn keys(algorithm: Algorithm) -> Keys {
        let node: Owner = "node1.fleet".parse().expect("a name");
        let random: Vec<u8> = (0..64).collect();
        let key = Key::mint(node.clone(), algorithm, node, &random).expect("a key");
        let mut keys = Keys::default();
        keys.add(key).expect("its place");
        keys
    }
}
