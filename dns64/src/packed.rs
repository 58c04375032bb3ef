//! Answers ready to send: what is the same for every client is on the wire already, the rest is written over it.
//!
//! [`Packed::write`] copies the message and puts in the client's id, flags, question in its own case, cookie, and TTLs
//! less by the answer's age. It allocates nothing.

use hickory_proto::{
    op::{Message, MessageType, OpCode, ResponseCode},
    rr::{Record, RecordType},
};

use crate::{
    Answer, Question,
    query::{Extra, Key, Query, Terms},
    wire::{self, HEADER, RecordAt},
};

/// Flags of our answers: QR and RA. AD is never among them, for nothing is validated here.
const FLAGS: u16 = 0x8080;
const AA: u16 = 0x0400;
const TC: u16 = 0x0200;
/// RD and CD, which a reply has as its query had them (RFC 1035 §4.1.1, RFC 4035 §3.2.2).
const ECHOED: u16 = 0x0110;
/// Seconds that clients may keep a stale answer (RFC 8767 §4).
const STALE: u32 = 30;

/// Bounds on how long answers are good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetimes {
    /// Seconds of any TTL at most.
    pub longest: u32,
    /// Seconds that something may be known not to exist at most (RFC 2308 §5: 1 h to 3 h is sensible).
    pub longest_negative: u32,
    /// Seconds that a failure is known (RFC 9520 §3.2: at least 1 s, at most 5 min).
    pub failure: u32,
}

impl Default for Lifetimes {
    /// One day, one hour, five seconds.
    fn default() -> Self {
        Self {
            longest: 86_400,
            longest_negative: 3600,
            failure: 5,
        }
    }
}

/// An answer on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// The message with its question in lower case and without OPT, then the place of each TTL in it, 16 bits each.
    octets: Box<[u8]>,
    /// Octets of the message.
    length: u16,
    /// All twelve bits.
    code: u16,
    dnssec_ok: bool,
    checking_disabled: bool,
    ages: bool,
    lifetime: u32,
}

/// How old an answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Age {
    /// Seconds since its TTLs were right.
    Fresh(u32),
    /// Its lifetime is over, and there is no better one (RFC 8767).
    Stale,
}

/// An answer has more octets than a message can have, or a record that has no form on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the answer does not fit a message")]
pub struct Unfit;

impl Packed {
    /// Packs `answer` to `question`.
    ///
    /// Owners come out in lower case: an upstream that was asked in random case answers so. The records of one set get
    /// the lowest TTL among them (RFC 2181 §5.2), the SOA of a negative answer that of RFC 2308 §5, and who did not ask
    /// for DNSSEC gets none of its records (RFC 4035 §3.2.1).
    ///
    /// # Errors
    ///
    /// [`Unfit`]: more than 65,535 octets.
    pub fn new(question: &Question, answer: &Answer, lifetimes: &Lifetimes) -> Result<Self, Unfit> {
        let mut message = Message::new(0, MessageType::Response, OpCode::Query);
        message.metadata.authoritative = answer.authoritative;
        message.metadata.recursion_available = true;
        message.add_query(question.with_name(&question.name).query());
        let section = |records: &[Record]| section(question, records, lifetimes);
        message.answers = section(&answer.answers);
        message.authorities = section(&answer.authorities);
        message.additionals = section(&answer.additionals);
        for record in &mut message.authorities {
            if let hickory_proto::rr::RData::SOA(soa) = &record.data {
                record.ttl = record.ttl.min(soa.minimum).min(lifetimes.longest_negative);
            }
        }
        let lifetime = lifetime(answer.code, &message, lifetimes);
        let mut octets = message.to_vec().map_err(|_| Unfit)?;
        let length = u16::try_from(octets.len()).map_err(|_| Unfit)?;
        let flags = wire::u16_at(&octets, 2).ok_or(Unfit)?;
        if flags & TC != 0 {
            // The encoder left records out.
            return Err(Unfit);
        }
        let code = u16::from(answer.code);
        let authoritative = if answer.authoritative { AA } else { 0 };
        wire::set_u16(&mut octets, 2, FLAGS | authoritative | code & 0xf).ok_or(Unfit)?;
        let ttls: Vec<usize> = Records::of(&octets).ok_or(Unfit)?.map(|at| at.ttl()).collect();
        let wanted = message.answers.len() + message.authorities.len() + message.additionals.len();
        if ttls.len() != wanted {
            return Err(Unfit);
        }
        for ttl in ttls {
            octets.extend_from_slice(&u16::try_from(ttl).map_err(|_| Unfit)?.to_ne_bytes());
        }
        Ok(Self {
            octets: octets.into(),
            length,
            code,
            dnssec_ok: question.dnssec_ok,
            checking_disabled: question.checking_disabled,
            ages: answer.ages || !answer.authoritative,
            lifetime,
        })
    }

    /// What it says, with the TTLs that it came with. `None` cannot be: it was packed from an answer.
    pub fn unpack(&self) -> Option<Answer> {
        let message = Message::from_vec(self.octets.get(..usize::from(self.length))?).ok()?;
        let authoritative = message.metadata.authoritative;
        let mut answer = Answer::of(message);
        answer.authoritative = authoritative;
        answer.ages = authoritative && self.ages;
        Some(answer)
    }

    /// Seconds that it is good; 0 if it must not be kept.
    pub const fn lifetime(&self) -> u32 {
        self.lifetime
    }

    /// All twelve bits of its code.
    pub fn code(&self) -> ResponseCode {
        let [high, low] = self.code.to_be_bytes();
        ResponseCode::from(high << 4 | low >> 4, low & 0xf)
    }

    /// Whether its TTLs count down: those of our zones are the same at any time.
    pub(crate) const fn ages(&self) -> bool {
        self.ages
    }

    /// Octets that it takes in memory beside itself.
    pub(crate) fn size(&self) -> usize {
        self.octets.len()
    }

    /// The question that it answers. Its name is in lower case.
    pub(crate) fn key(&self) -> Option<Key<'_>> {
        let message = self.message();
        let name_end = wire::plain_name_end(message, HEADER)?;
        Some(Key {
            name: message.get(HEADER..name_end)?,
            kind: wire::u16_at(message, name_end)?,
            class: wire::u16_at(message, name_end + 2)?,
            dnssec_ok: self.dnssec_ok,
            checking_disabled: self.checking_disabled,
        })
    }

    /// Whether it answers what `key` asks.
    pub(crate) fn answers(&self, key: &Key<'_>) -> bool {
        let name = self.octets.get(HEADER..HEADER + key.name.len());
        let rest = self.octets.get(HEADER + key.name.len()..).and_then(<[u8]>::first_chunk);
        let [k0, k1] = key.kind.to_be_bytes();
        let [c0, c1] = key.class.to_be_bytes();
        // A name has its end in itself, so that no longer one begins with it.
        rest == Some(&[k0, k1, c0, c1])
            && self.dnssec_ok == key.dnssec_ok
            && self.checking_disabled == key.checking_disabled
            && name.is_some_and(|name| name.eq_ignore_ascii_case(key.name))
    }

    /// Writes the answer for `query`, which asks what it answers. Returns its length; `None` if `out` has no room.
    ///
    /// What does not fit `terms.limit` is left out by whole record sets from the end; TC says so unless it was only
    /// additional records (RFC 2181 §9).
    pub fn write(&self, query: &Query<'_>, age: Age, terms: &Terms, out: &mut [u8]) -> Option<usize> {
        let (message, ttls) = self.octets.split_at_checked(self.length.into())?;
        let extra = match age {
            Age::Stale => Some(Extra::Stale),
            Age::Fresh(_) => None,
        };
        let room = terms.limit.min(out.len()).checked_sub(query.opt_length(extra, terms))?;
        let cut = (message.len() > room).then(|| cut(message, room));
        let length = cut.as_ref().map_or(message.len(), |cut| cut.length);
        let (body, rest) = out.split_at_mut_checked(length)?;
        body.copy_from_slice(message.get(..length)?);

        let (ttls, _) = ttls.as_chunks::<2>();
        for place in ttls {
            let place = usize::from(u16::from_ne_bytes(*place));
            // Beyond a cut there is none.
            let Some(ttl) = body.get_mut(place..).and_then(<[u8]>::first_chunk_mut) else {
                break;
            };
            let left = match age {
                Age::Fresh(seconds) => u32::from_be_bytes(*ttl).saturating_sub(seconds),
                Age::Stale => STALE,
            };
            *ttl = left.to_be_bytes();
        }

        let (head, sections) = body.split_first_chunk_mut::<HEADER>()?;
        if let Some(question) = sections.get_mut(..query.section().len()) {
            question.copy_from_slice(query.section());
        }
        let mut flags = u16::from_be_bytes([head[2], head[3]]) | query.flags() & ECHOED;
        let mut additionals = u16::from_be_bytes([head[10], head[11]]);
        if let Some(cut) = &cut {
            let [answers, authorities, kept] = cut.counts;
            wire::set_u16(head, 6, answers)?;
            wire::set_u16(head, 8, authorities)?;
            additionals = kept;
            flags |= if cut.told { TC } else { 0 };
        }
        additionals = additionals.saturating_add(u16::from(query.edns().is_some()));
        head[..2].copy_from_slice(&query.id().to_be_bytes());
        head[2..4].copy_from_slice(&flags.to_be_bytes());
        head[10..].copy_from_slice(&additionals.to_be_bytes());
        Some(length + query.write_opt(self.code, extra, terms, rest)?)
    }

    fn message(&self) -> &[u8] {
        self.octets.get(..self.length.into()).unwrap_or_default()
    }
}

/// The records of one section as they are packed.
fn section(question: &Question, records: &[Record], lifetimes: &Lifetimes) -> Vec<Record> {
    let wanted = |record: &&Record| {
        let kind = record.record_type();
        question.dnssec_ok
            || kind == question.kind
            || !matches!(kind, RecordType::RRSIG | RecordType::NSEC | RecordType::NSEC3)
    };
    let mut packed: Vec<Record> = records.iter().filter(wanted).cloned().collect();
    for record in &mut packed {
        record.name = record.name.to_lowercase();
        record.ttl = match record.ttl {
            // RFC 2181 §8: the sign bit makes it zero.
            0x8000_0000.. => 0,
            ttl => ttl.min(lifetimes.longest),
        };
    }
    let same = |a: &Record, b: &Record| a.record_type() == b.record_type() && a.name == b.name;
    for set in packed.chunk_by_mut(same) {
        // Signatures cover sets of their own, whose TTLs they follow.
        if set
            .first()
            .is_some_and(|first| first.record_type() == RecordType::RRSIG)
        {
            continue;
        }
        let lowest = set.iter().map(|record| record.ttl).min().unwrap_or(0);
        set.iter_mut().for_each(|record| record.ttl = lowest);
    }
    packed
}

fn lifetime(code: ResponseCode, message: &Message, lifetimes: &Lifetimes) -> u32 {
    let sections = [&message.answers, &message.authorities, &message.additionals];
    let lowest = sections.into_iter().flatten().map(|record| record.ttl).min();
    match code {
        ResponseCode::NoError | ResponseCode::NXDomain => {
            let denied = message.authorities.iter().any(|r| r.record_type() == RecordType::SOA);
            // RFC 2308 §5: without a SOA nobody says for how long there is nothing.
            let kept = denied || (code == ResponseCode::NoError && !message.answers.is_empty());
            lowest.filter(|_| kept).unwrap_or(0)
        }
        _ => lifetimes.failure,
    }
}

/// What is left of a message that must be shorter.
struct Cut {
    length: usize,
    counts: [u16; 3],
    /// Whether something that belongs to the answer is missing.
    told: bool,
}

/// Shortens `message` to at most `room` octets, whole record sets at a time.
fn cut(message: &[u8], room: usize) -> Cut {
    let mut cut = Cut {
        length: wire::plain_name_end(message, HEADER).map_or(HEADER, |end| end + 4),
        counts: [0; 3],
        told: false,
    };
    let Some(mut records) = Records::of(message).map(Iterator::peekable) else {
        return cut;
    };
    for section in 0..3 {
        let mut left = wire::u16_at(message, 6 + 2 * section).unwrap_or(0);
        while left > 0 {
            let Some(first) = records.next() else { return cut };
            let (mut end, mut members) = (first.end, 1);
            while members < left
                && let Some(next) = records.next_if(|next| same_set(message, &first, next))
            {
                end = next.end;
                members += 1;
            }
            if end > room {
                cut.told = section < 2;
                return cut;
            }
            cut.length = end;
            cut.counts[section] += members;
            left -= members;
        }
    }
    cut
}

/// Whether two records that follow each other belong together. Signatures go with what they follow.
fn same_set(message: &[u8], one: &RecordAt, other: &RecordAt) -> bool {
    const RRSIG: u16 = 46;
    (one.kind == other.kind || other.kind == RRSIG)
        && wire::labels(message, one.start).eq(wire::labels(message, other.start))
}

/// The records of a message with one question, in their order.
struct Records<'a> {
    message: &'a [u8],
    at: usize,
    left: u32,
}

impl<'a> Records<'a> {
    fn of(message: &'a [u8]) -> Option<Self> {
        let count = |at| wire::u16_at(message, at).map(u32::from);
        Some(Self {
            message,
            at: wire::plain_name_end(message, HEADER)? + 4,
            left: count(6)? + count(8)? + count(10)?,
        })
    }
}

impl Iterator for Records<'_> {
    type Item = RecordAt;

    fn next(&mut self) -> Option<RecordAt> {
        self.left = self.left.checked_sub(1)?;
        let record = wire::record_at(self.message, self.at)?;
        self.at = record.end;
        Some(record)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::Ipv4Addr;

    use hickory_proto::rr::{
        Name, RData,
        rdata::{A, CNAME, SOA, TXT},
    };

    use super::*;
    use crate::query::{
        MOST_TCP, MOST_UDP,
        tests::{plain, query, with_opt},
    };

    const UDP: Terms = Terms {
        limit: 512,
        cookie: None,
    };

    #[test]
    fn a_client_gets_its_id_its_flags_and_its_question_in_its_own_case() {
        let packed = pack("www.example.org.", vec![a("www.example.org.", 300, 1)]);
        let mut asked = plain("\x03wWw\x07eXample\x03ORG\0", 1);
        asked[3] = 0x10;
        let reply = write(&packed, &asked, Age::Fresh(0), &UDP);
        assert_eq!(reply[..2], [0x12, 0x34]);
        assert_eq!(reply[12..33], asked[12..33]);
        let message = Message::from_vec(&reply).expect("a message");
        let metadata = message.metadata;
        assert!(metadata.recursion_desired && metadata.recursion_available && metadata.checking_disabled);
        assert!(!metadata.authoritative && !metadata.truncation && !metadata.authentic_data);
        assert!(message.edns.is_none());
        assert_eq!(
            message.answers[0].name.to_string(),
            "wWw.eXample.ORG.",
            "points to the question"
        );
        assert_eq!(message.answers[0].data, RData::A(A(Ipv4Addr::new(192, 0, 2, 1))));
    }

    #[test]
    fn ttls_grow_old_in_place_and_end_at_zero() {
        let records = vec![
            Record::from_rdata(
                name("www.example.org."),
                60,
                RData::CNAME(CNAME(name("a.example.org."))),
            ),
            a("a.example.org.", 300, 1),
        ];
        let packed = pack("www.example.org.", records);
        assert_eq!(packed.lifetime(), 60);
        let asked = plain("\x03www\x07example\x03org\0", 1);
        for (age, ttls) in [
            (Age::Fresh(0), [60, 300]),
            (Age::Fresh(59), [1, 241]),
            (Age::Fresh(100), [0, 200]),
            (Age::Fresh(u32::MAX), [0, 0]),
            (Age::Stale, [30, 30]),
        ] {
            let message = Message::from_vec(&write(&packed, &asked, age, &UDP)).expect("a message");
            let found: Vec<u32> = message.answers.iter().map(|record| record.ttl).collect();
            assert_eq!(found, ttls, "{age:?}");
        }
    }

    #[test]
    fn edns_is_answered_with_edns_cookie_and_what_is_stale_says_so() {
        let packed = pack("www.example.org.", vec![a("www.example.org.", 300, 1)]);
        let asked = with_opt(&plain("\x03www\x07example\x03org\0", 1), 4096, 0, 0, &[]);
        let terms = Terms {
            cookie: Some([9; 24]),
            ..UDP
        };
        let reply = write(&packed, &asked, Age::Stale, &terms);
        assert!(reply.ends_with(&[0, 15, 0, 2, 0, 3]));
        let message = Message::from_vec(&reply).expect("a message");
        let edns = message.edns.expect("EDNS");
        assert_eq!((edns.max_payload(), edns.version()), (1232, 0));
        assert_eq!(edns.options().as_ref().len(), 2);
        assert_eq!(message.answers.len(), 1);
    }

    #[test]
    fn what_does_not_fit_is_cut_between_record_sets_and_tc_is_set() {
        let texts = |owner: &str, count: usize| {
            let text = |i: usize| RData::TXT(TXT::new(vec![format!("{i:0>99}")]));
            (0..count)
                .map(|i| Record::from_rdata(name(owner), 60, text(i)))
                .collect::<Vec<_>>()
        };
        let mut records = texts("a.example.org.", 3);
        records.extend(texts("b.example.org.", 3));
        let packed = pack("a.example.org.", records);
        let asked = plain("\x01a\x07example\x03org\0", 1);
        for (limit, answers, truncated) in [
            (65_535, 6, false),
            (packed.length.into(), 6, false),
            (usize::from(packed.length) - 1, 3, true),
            (512, 3, true),
            (300, 0, true),
            (33, 0, true),
        ] {
            let terms = Terms { limit, cookie: None };
            let reply = write(&packed, &asked, Age::Fresh(1), &terms);
            assert!(reply.len() <= limit.max(31));
            let message = Message::from_vec(&reply).expect("a message");
            assert_eq!(message.answers.len(), answers, "{limit}");
            assert_eq!(message.metadata.truncation, truncated, "{limit}");
            assert!(message.answers.iter().all(|record| record.ttl == 59));
        }
        let edns = with_opt(&asked, 1232, 0, 0, &[]);
        let terms = Terms {
            limit: packed.length.into(),
            cookie: Some([1; 24]),
        };
        let message = Message::from_vec(&write(&packed, &edns, Age::Fresh(0), &terms)).expect("a message");
        assert!(
            message.edns.is_some() && message.metadata.truncation,
            "OPT is never what is cut"
        );
    }

    #[test]
    fn additional_records_are_left_out_without_tc() {
        let answer = Answer {
            answers: vec![a("www.example.org.", 300, 1)],
            additionals: (0..100).map(|i| a(&format!("ns{i}.example.org."), 300, 1)).collect(),
            ..Answer::empty(ResponseCode::NoError)
        };
        let packed = Packed::new(&question("www.example.org."), &answer, &Lifetimes::default()).expect("packed");
        let asked = plain("\x03www\x07example\x03org\0", 1);
        let message = Message::from_vec(&write(&packed, &asked, Age::Fresh(0), &UDP)).expect("a message");
        assert!(!message.metadata.truncation);
        assert_eq!(message.answers.len(), 1);
        assert!((10..100).contains(&message.additionals.len()));
    }

    #[test]
    fn a_negative_answer_lasts_as_long_as_its_soa_says() {
        let soa = |ttl, minimum| {
            let soa = SOA::new(name("ns.example.org."), name("root.example.org."), 1, 2, 3, 4, minimum);
            Record::from_rdata(name("Example.org."), ttl, RData::SOA(soa))
        };
        for (code, authorities, lifetime) in [
            (ResponseCode::NXDomain, vec![soa(600, 60)], 60),
            (ResponseCode::NXDomain, vec![soa(60, 600)], 60),
            (ResponseCode::NoError, vec![soa(9_000, 8_000)], 3600),
            (ResponseCode::NoError, vec![], 0),
            (ResponseCode::NXDomain, vec![], 0),
            (ResponseCode::ServFail, vec![], 5),
        ] {
            let answer = Answer {
                authorities,
                ..Answer::empty(code)
            };
            let packed = Packed::new(&question("x.example.org."), &answer, &Lifetimes::default()).expect("packed");
            assert_eq!(packed.lifetime(), lifetime, "{code}");
            assert_eq!(packed.code(), code);
        }
    }

    #[test]
    fn a_set_has_one_ttl_and_strange_ones_are_none() {
        let packed = pack("w.", vec![a("w.", 300, 1), a("W.", 200, 2), a("w.", 400, 3)]);
        let message = Message::from_vec(&write(&packed, &plain("\x01w\0", 1), Age::Fresh(0), &UDP)).expect("a message");
        assert!(message.answers.iter().all(|record| record.ttl == 200));
        assert_eq!(pack("w.", vec![a("w.", 0x8000_0000, 1)]).lifetime(), 0);
        assert_eq!(pack("w.", vec![a("w.", 0x7fff_ffff, 1)]).lifetime(), 86_400);
    }

    #[test]
    fn owners_in_the_random_case_of_an_upstream_query_do_not_reach_clients() {
        let packed = pack("www.example.org.", vec![a("wWW.exAMPLE.oRg.", 300, 1)]);
        let reply = write(&packed, &plain("\x03www\x07example\x03org\0", 1), Age::Fresh(0), &UDP);
        assert!(!reply.windows(3).any(|octets| octets == b"wWW"));
        assert_eq!(reply[33..35], [0xc0, 0x0c]);
    }

    #[test]
    fn an_answer_beyond_a_message_is_refused_and_one_of_its_size_is_not() {
        let records = |count: u32| (0..count).map(|_| a("w.", 60, 1)).collect::<Vec<_>>();
        let answer = |count| Answer {
            answers: records(count),
            ..Answer::empty(ResponseCode::NoError)
        };
        let packed = Packed::new(&question("w."), &answer(3_800), &Lifetimes::default()).expect("packed");
        let terms = Terms {
            limit: MOST_TCP,
            cookie: None,
        };
        let reply = write(&packed, &plain("\x01w\0", 1), Age::Fresh(7), &terms);
        let message = Message::from_vec(&reply).expect("a message");
        assert_eq!(message.answers.len(), 3_800);
        assert!(message.answers.iter().all(|record| record.ttl == 53));
        assert_eq!(
            Packed::new(&question("w."), &answer(5_000), &Lifetimes::default()),
            Err(Unfit)
        );
    }

    #[test]
    fn without_room_nothing_is_written() {
        let packed = pack("w.", vec![a("w.", 60, 1)]);
        let asked = plain("\x01w\0", 1);
        for room in 0..19 {
            assert_eq!(
                packed.write(&query(&asked), Age::Fresh(0), &UDP, &mut vec![0; room]),
                None,
                "{room}"
            );
        }
    }

    pub(crate) fn name(text: &str) -> Name {
        Name::from_ascii(text).expect("a name")
    }

    pub(crate) fn question(text: &str) -> Question {
        Question::new(&name(text), RecordType::A)
    }

    pub(crate) fn a(owner: &str, ttl: u32, last: u8) -> Record {
        Record::from_rdata(name(owner), ttl, RData::A(A(Ipv4Addr::new(192, 0, 2, last))))
    }

    pub(crate) fn pack(asked: &str, answers: Vec<Record>) -> Packed {
        let answer = Answer {
            answers,
            ..Answer::empty(ResponseCode::NoError)
        };
        Packed::new(&question(asked), &answer, &Lifetimes::default()).expect("packed")
    }

    fn write(packed: &Packed, asked: &[u8], age: Age, terms: &Terms) -> Vec<u8> {
        let mut out = vec![0; MOST_TCP.max(MOST_UDP)];
        let length = packed.write(&query(asked), age, terms, &mut out).expect("room");
        out.truncate(length);
        out
    }
}
