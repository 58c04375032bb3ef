//! What a client asks, read from the wire without an allocation, and short replies to it.
//!
//! RFC 1035 §4.1, with EDNS (RFC 6891), one question at most (RFC 9619) and cookies (RFC 7873). Whatever the octets are,
//! there is an answer: a [`Query`], a code to refuse it with, or silence.

use hickory_proto::{
    op::ResponseCode,
    rr::{DNSClass, Name, RData, Record, RecordType, rdata::HINFO},
    serialize::binary::{BinDecodable, BinDecoder},
};

use crate::{
    Answer,
    question::Question,
    wire::{self, HEADER},
};

/// Octets of a UDP message that every client takes (RFC 1035 §4.2.1).
pub const LEAST: usize = 512;
/// Octets of a UDP message that no path fragments, and what we announce: the smallest MTU of IPv6, 1280, less headers.
pub const MOST_UDP: usize = 1232;
/// Octets of a message over TCP (RFC 1035 §4.2.2).
pub const MOST_TCP: usize = 65_535;

const OPT: u16 = 41;
const SIG: u16 = 24;
const TSIG: u16 = 250;
/// EDNS options (RFC 7873 §4, RFC 8914 §2).
const COOKIE: u16 = 10;
const EXTENDED_ERROR: u16 = 15;
/// Fixed octets of an OPT record.
const OPT_HEAD: usize = 11;

/// What one message from a client is.
#[derive(Clone, Copy, Debug)]
pub enum Parsed<'a> {
    /// A question to look up.
    Query(Query<'a>),
    /// Must be decoded as a whole: an UPDATE, or a query that is signed.
    Whole,
    /// Is answered with this code and nothing else. What could be read of it is in the query.
    Reject(Query<'a>, ResponseCode),
    /// Is not answered: it is an answer itself, or shorter than a header.
    Silence,
}

/// One query as it came. Its octets stay where they are.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    id: u16,
    /// The first 16 bits of flags, from QR to RCODE.
    flags: u16,
    /// The question section as sent; empty if it was not understood or there is none.
    question: &'a [u8],
    kind: u16,
    class: u16,
    edns: Option<Edns<'a>>,
}

/// What the OPT record of a query says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edns<'a> {
    /// Octets that the client takes in one UDP message, as sent.
    pub size: u16,
    /// The DO bit.
    pub dnssec_ok: bool,
    /// The COOKIE option: 8 octets of the client, then none or 8 to 32 of the server.
    pub cookie: Option<&'a [u8]>,
}

/// What a reply must keep to, apart from the question.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Octets that it may have.
    pub limit: usize,
    /// The cookie to send along: the client's 8 octets and 16 of ours.
    pub cookie: Option<[u8; 24]>,
}

/// Extended DNS errors that we send (RFC 8914 §4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extra {
    /// "Stale Answer".
    Stale = 3,
}

impl<'a> Parsed<'a> {
    /// Reads one message.
    pub fn of(message: &'a [u8]) -> Self {
        let Some(header) = message.first_chunk::<HEADER>() else {
            return Self::Silence;
        };
        let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        let mut query = Query {
            id: word(0),
            flags: word(2),
            question: &[],
            kind: 0,
            class: 0,
            edns: None,
        };
        if query.flags & 0x8000 != 0 {
            // Two servers that answer each other's answers never stop.
            return Self::Silence;
        }
        match query.flags >> 11 & 0xf {
            0 => {}
            5 => return Self::Whole,
            _ => return Self::Reject(query, ResponseCode::NotImp),
        }
        match query.read(message, [word(4), word(6), word(8), word(10)]) {
            Ok(false) => Self::Query(query),
            Ok(true) => Self::Whole,
            Err(code) => Self::Reject(query, code),
        }
    }
}

impl<'a> Query<'a> {
    /// Reads what follows the header; whether the message is signed.
    fn read(&mut self, message: &'a [u8], counts: [u16; 4]) -> Result<bool, ResponseCode> {
        let [questions, answers, authorities, additionals] = counts;
        let mut at = HEADER;
        if questions > 1 {
            return Err(ResponseCode::FormErr);
        }
        if questions == 1 {
            at = self.read_question(message).ok_or(ResponseCode::FormErr)?;
        }
        let transfer = matches!(self.kind, 251 | 252);
        if !transfer && (answers != 0 || authorities != 0) {
            return Err(ResponseCode::FormErr);
        }
        let records = u32::from(answers) + u32::from(authorities);
        for _ in 0..records {
            at = wire::record_at(message, at).ok_or(ResponseCode::FormErr)?.end;
        }
        let signed = self.read_additionals(message, at, additionals)?;
        self.judge(questions)?;
        Ok(signed)
    }

    fn read_question(&mut self, message: &'a [u8]) -> Option<usize> {
        let name_end = wire::plain_name_end(message, HEADER)?;
        let end = name_end + 4;
        let question = message.get(HEADER..end)?;
        self.kind = wire::u16_at(message, name_end)?;
        self.class = wire::u16_at(message, name_end + 2)?;
        self.question = question;
        Some(end)
    }

    fn read_additionals(&mut self, message: &'a [u8], mut at: usize, count: u16) -> Result<bool, ResponseCode> {
        let mut signed = false;
        for _ in 0..count {
            let record = wire::record_at(message, at).ok_or(ResponseCode::FormErr)?;
            match record.kind {
                OPT => {
                    let root = record.owner_end - record.start == 1;
                    if !root || self.edns.is_some() {
                        // RFC 6891 §6.1.1: more than one.
                        return Err(ResponseCode::FormErr);
                    }
                    // What another version has for options is not known: it is answered first (RFC 6891 §6.1.3).
                    if !self.read_opt(message, record).ok_or(ResponseCode::FormErr)? {
                        return Err(ResponseCode::BADVERS);
                    }
                    self.read_options(message.get(record.data..record.end))
                        .ok_or(ResponseCode::FormErr)?;
                }
                TSIG | SIG => signed = true,
                _ => {}
            }
            at = record.end;
        }
        Ok(signed)
    }

    /// Reads an OPT record without its options; whether it is of a version that we know, which is 0.
    fn read_opt(&mut self, message: &'a [u8], record: wire::RecordAt) -> Option<bool> {
        self.edns = Some(Edns {
            size: wire::u16_at(message, record.owner_end + 2)?,
            dnssec_ok: wire::u16_at(message, record.ttl() + 2)? & 0x8000 != 0,
            cookie: None,
        });
        Some(message.get(record.ttl() + 1) == Some(&0))
    }

    fn read_options(&mut self, options: Option<&'a [u8]>) -> Option<()> {
        let mut options = options?;
        let edns = self.edns.as_mut()?;
        while !options.is_empty() {
            let code = wire::u16_at(options, 0)?;
            let (value, rest) = options.get(4..)?.split_at_checked(wire::u16_at(options, 2)?.into())?;
            // All but the first are passed over (RFC 7873 §5.2).
            if code == COOKIE && edns.cookie.is_none() {
                // RFC 7873 §5.2.2.
                if !matches!(value.len(), 8 | 16..=40) {
                    return None;
                }
                edns.cookie = Some(value);
            }
            options = rest;
        }
        Some(())
    }

    /// Whether this is a question that a resolver looks up.
    fn judge(&self, questions: u16) -> Result<(), ResponseCode> {
        if questions == 0 {
            // Asks for a cookie and nothing else (RFC 7873 §5.4).
            let cookie = self.edns.and_then(|edns| edns.cookie);
            return Err(cookie.map_or(ResponseCode::FormErr, |_| ResponseCode::NoError));
        }
        match (self.class, self.kind) {
            (_, 0 | OPT) | (0, _) => Err(ResponseCode::FormErr),
            // Zone transfers; and other classes, of which we hold nothing.
            (_, 251 | 252) => Err(ResponseCode::Refused),
            // TKEY, TSIG, MAILB, MAILA.
            (_, 249 | 250 | 253 | 254) => Err(ResponseCode::NotImp),
            (1, _) => Ok(()),
            _ => Err(ResponseCode::Refused),
        }
    }

    /// The message's id.
    pub const fn id(&self) -> u16 {
        self.id
    }

    /// QTYPE.
    pub fn kind(&self) -> RecordType {
        self.kind.into()
    }

    /// What its OPT record says, if it has one.
    pub const fn edns(&self) -> Option<Edns<'a>> {
        self.edns
    }

    /// The RD bit.
    pub const fn recursion_desired(&self) -> bool {
        self.flags & 0x0100 != 0
    }

    /// The CD bit.
    pub const fn checking_disabled(&self) -> bool {
        self.flags & 0x0010 != 0
    }

    /// The DO bit.
    pub fn dnssec_ok(&self) -> bool {
        self.edns.is_some_and(|edns| edns.dnssec_ok)
    }

    /// QNAME on the wire, in the case it was sent in; empty if there is no question.
    pub fn name(&self) -> &'a [u8] {
        let end = self.question.len().saturating_sub(4);
        self.question.get(..end).unwrap_or_default()
    }

    /// The question section as it was sent.
    pub const fn section(&self) -> &'a [u8] {
        self.question
    }

    pub(crate) fn key(&self) -> Key<'a> {
        Key {
            name: self.name(),
            kind: self.kind,
            class: self.class,
            dnssec_ok: self.dnssec_ok(),
            checking_disabled: self.checking_disabled(),
        }
    }

    /// The same as the slow path has it; `None` without a question.
    pub fn question(&self) -> Option<Question> {
        if self.question.is_empty() {
            return None;
        }
        let name = Name::read(&mut BinDecoder::new(self.name())).ok()?;
        Some(Question {
            name: name.to_lowercase(),
            kind: self.kind.into(),
            class: DNSClass::from(self.class),
            dnssec_ok: self.dnssec_ok(),
            checking_disabled: self.checking_disabled(),
            recursion_desired: self.recursion_desired(),
        })
    }

    /// Octets that the client takes over UDP: 512 without EDNS, else what it says between 512 and 1232 (RFC 6891
    /// §6.2.3).
    pub fn udp_limit(&self) -> usize {
        self.edns
            .map_or(LEAST, |edns| usize::from(edns.size).clamp(LEAST, MOST_UDP))
    }

    /// Writes a reply without a record: `code`, and whether to come again over TCP. Returns its length; `None` if
    /// `out` has no room.
    pub fn write_code(&self, code: ResponseCode, truncated: bool, terms: &Terms, out: &mut [u8]) -> Option<usize> {
        let code = u16::from(code);
        let (body, rest) = out.split_at_mut_checked(HEADER + self.question.len())?;
        let (head, section) = body.split_first_chunk_mut::<HEADER>()?;
        section.copy_from_slice(self.question);
        let truncated = if truncated { 0x0200 } else { 0 };
        // A server that does not know the opcode echoes it and says that it recurses nonetheless.
        let flags = 0x8080 | self.flags & 0x7910 | truncated | code & 0xf;
        let additionals = u16::from(self.edns.is_some());
        for (place, word) in [self.id, flags, u16::from(!self.question.is_empty()), 0, 0, additionals]
            .into_iter()
            .enumerate()
        {
            wire::set_u16(head, 2 * place, word)?;
        }
        let opt = self.write_opt(code, None, terms, rest)?;
        Some(HEADER + self.question.len() + opt)
    }

    pub(crate) const fn flags(&self) -> u16 {
        self.flags
    }

    /// Octets that [`Query::write_opt`] writes.
    pub(crate) fn opt_length(&self, extra: Option<Extra>, terms: &Terms) -> usize {
        match self.edns {
            None => 0,
            Some(_) => OPT_HEAD + terms.cookie.map_or(0, |cookie| 4 + cookie.len()) + extra.map_or(0, |_| 6),
        }
    }

    /// Writes the OPT record of a reply, if the client sent one (RFC 6891 §7); returns its length.
    pub(crate) fn write_opt(&self, code: u16, extra: Option<Extra>, terms: &Terms, out: &mut [u8]) -> Option<usize> {
        let Some(edns) = self.edns else { return Some(0) };
        let length = self.opt_length(extra, terms);
        let (head, options) = out.get_mut(..length)?.split_first_chunk_mut::<OPT_HEAD>()?;
        let [_, high, ..] = (u32::from(code) << 12).to_be_bytes();
        let dnssec_ok = if edns.dnssec_ok { 0x80 } else { 0 };
        let size = const { (MOST_UDP as u16).to_be_bytes() };
        let [length_high, length_low] = u16::try_from(length - OPT_HEAD).ok()?.to_be_bytes();
        *head = [
            0,
            0,
            OPT.to_be_bytes()[1],
            size[0],
            size[1],
            high,
            0,
            dnssec_ok,
            0,
            length_high,
            length_low,
        ];
        let mut at = 0;
        if let Some(cookie) = &terms.cookie {
            let option = options.first_chunk_mut::<28>()?;
            option[..4].copy_from_slice(&[0, COOKIE.to_be_bytes()[1], 0, 24]);
            option[4..].copy_from_slice(cookie);
            at = 28;
        }
        if let Some(extra) = extra {
            let option = options.get_mut(at..)?.first_chunk_mut::<6>()?;
            *option = [0, EXTENDED_ERROR.to_be_bytes()[1], 0, 2, 0, extra as u8];
        }
        Some(length)
    }
}

/// What tells one cached answer from another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key<'a> {
    /// On the wire, in any case.
    pub(crate) name: &'a [u8],
    pub(crate) kind: u16,
    pub(crate) class: u16,
    pub(crate) dnssec_ok: bool,
    pub(crate) checking_disabled: bool,
}

/// What anybody who asks for ANY gets: one small record that says so (RFC 8482 §4.2).
pub fn minimal_any(name: &Name) -> Answer {
    let hinfo = HINFO::new("RFC8482".to_owned(), String::new());
    Answer {
        answers: vec![Record::from_rdata(name.clone(), 3600, RData::HINFO(hinfo))],
        ..Answer::empty(ResponseCode::NoError)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use hickory_proto::op::Message;

    use super::*;

    const TERMS: Terms = Terms {
        limit: MOST_UDP,
        cookie: None,
    };

    #[test]
    fn a_query_is_read_as_it_was_sent() {
        let message = with_opt(&plain("\x03wWw\x07Example\x03org\0", 28), 4096, 0, 0x8000, &[]);
        let query = query(&message);
        assert_eq!(query.id(), 0x1234);
        assert_eq!(query.name(), b"\x03wWw\x07Example\x03org\0");
        assert_eq!(query.kind(), RecordType::AAAA);
        assert!(query.recursion_desired() && !query.checking_disabled() && query.dnssec_ok());
        assert_eq!(query.udp_limit(), 1232);
        let question = query.question().expect("a question");
        assert_eq!(question.name.to_string(), "www.example.org.");
        assert_eq!(question.query().to_string(), "www.example.org. IN AAAA");
        assert!(question.dnssec_ok && question.recursion_desired);
    }

    #[test]
    fn sizes_stay_between_512_and_1232() {
        let plain = plain("\0", 2);
        assert_eq!(query(&plain).udp_limit(), 512, "without EDNS");
        for (announced, limit) in [
            (0, 512),
            (511, 512),
            (513, 513),
            (1232, 1232),
            (1233, 1232),
            (65535, 1232),
        ] {
            assert_eq!(query(&with_opt(&plain, announced, 0, 0, &[])).udp_limit(), limit);
        }
    }

    #[test]
    fn answers_and_fragments_of_headers_get_silence() {
        let mut answer = plain("\0", 2);
        answer[2] |= 0x80;
        assert!(matches!(Parsed::of(&answer), Parsed::Silence));
        for length in 0..HEADER {
            assert!(matches!(Parsed::of(&answer[..length]), Parsed::Silence));
        }
    }

    #[test]
    fn what_is_no_proper_question_gets_its_code() {
        let good = plain("\x01a\0", 1);
        let changed = |at: usize, octets: &[u8]| {
            let mut message = good.clone();
            message[at..at + octets.len()].copy_from_slice(octets);
            message
        };
        let opt = with_opt(&good, 1232, 0, 0, &[]);
        let pointer = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\xc0\x0c\0\x01\0\x01";
        let two_opts = {
            let mut message = opt.clone();
            message.extend_from_slice(&opt[good.len()..]);
            message[11] = 2;
            message
        };
        let named_opt = {
            let mut message = good.clone();
            message[11] = 1;
            message.extend_from_slice(b"\xc0\x0c\0\x29\x04\xd0\0\0\0\0\0\0");
            message
        };
        for (what, message, code) in [
            ("opcode STATUS", changed(2, &[0x10]), ResponseCode::NotImp),
            ("opcode NOTIFY", changed(2, &[0x20]), ResponseCode::NotImp),
            ("opcode 15", changed(2, &[0x78]), ResponseCode::NotImp),
            ("no question", changed(4, &[0, 0]), ResponseCode::FormErr),
            ("two questions", changed(4, &[0, 2]), ResponseCode::FormErr),
            ("65535 questions", changed(4, &[255, 255]), ResponseCode::FormErr),
            ("an answer", changed(6, &[0, 1]), ResponseCode::FormErr),
            ("an authority", changed(8, &[0, 1]), ResponseCode::FormErr),
            (
                "an additional that is not there",
                changed(10, &[0, 1]),
                ResponseCode::FormErr,
            ),
            ("a pointer to itself", pointer.to_vec(), ResponseCode::FormErr),
            ("a cut question", good[..good.len() - 1].to_vec(), ResponseCode::FormErr),
            ("type 0", plain("\x01a\0", 0), ResponseCode::FormErr),
            ("type OPT", plain("\x01a\0", 41), ResponseCode::FormErr),
            ("type AXFR", plain("\x01a\0", 252), ResponseCode::Refused),
            ("type IXFR", plain("\x01a\0", 251), ResponseCode::Refused),
            ("type MAILA", plain("\x01a\0", 254), ResponseCode::NotImp),
            ("class CH", changed(good.len() - 2, &[0, 3]), ResponseCode::Refused),
            ("class ANY", changed(good.len() - 2, &[0, 255]), ResponseCode::Refused),
            ("class 0", changed(good.len() - 2, &[0, 0]), ResponseCode::FormErr),
            (
                "EDNS version 1",
                with_opt(&good, 1232, 1, 0, &[]),
                ResponseCode::BADVERS,
            ),
            (
                "EDNS version 1 with its own options",
                with_opt(&good, 1232, 1, 0, &[0, 10, 0]),
                ResponseCode::BADVERS,
            ),
            ("two OPT", two_opts, ResponseCode::FormErr),
            ("an OPT with a name", named_opt, ResponseCode::FormErr),
            (
                "a cut option",
                with_opt(&good, 1232, 0, 0, &[0, 10, 0, 9, 1]),
                ResponseCode::FormErr,
            ),
            (
                "a cookie of 9",
                with_opt(&good, 1232, 0, 0, &[0, 10, 0, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
                ResponseCode::FormErr,
            ),
        ] {
            match Parsed::of(&message) {
                Parsed::Reject(query, found) => {
                    assert_eq!(found, code, "{what}");
                    let mut out = [0; 512];
                    let length = query.write_code(found, false, &TERMS, &mut out).expect("room");
                    let reply = Message::from_vec(&out[..length]).expect("a message");
                    // 16 is BADSIG, too.
                    assert_eq!(u16::from(reply.metadata.response_code), u16::from(code), "{what}");
                    assert_eq!(reply.metadata.id, 0x1234, "{what}");
                    assert!(length <= message.len().max(28), "{what}: no longer than the question");
                }
                other => panic!("{what}: {other:?}"),
            }
        }
    }

    #[test]
    fn updates_and_signed_queries_are_left_to_who_decodes_them() {
        let mut update = plain("\x01a\0", 6);
        update[2] = 5 << 3;
        assert!(matches!(Parsed::of(&update), Parsed::Whole));
        let mut signed = plain("\x01a\0", 6);
        signed[11] = 1;
        signed.extend_from_slice(b"\x01k\0\0\xfa\0\xff\0\0\0\0\0\0");
        assert!(matches!(Parsed::of(&signed), Parsed::Whole));
    }

    #[test]
    fn a_cookie_alone_may_be_asked_for() {
        let cookie = [0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8];
        let mut message = vec![0x12, 0x34, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        message = with_opt(&message, 1232, 0, 0, &cookie);
        let Parsed::Reject(query, ResponseCode::NoError) = Parsed::of(&message) else {
            panic!("RFC 7873 §5.4");
        };
        assert_eq!(query.edns().and_then(|edns| edns.cookie), Some(&cookie[4..]));
    }

    #[test]
    fn only_the_first_cookie_counts_and_unknown_options_are_passed_over() {
        let mut options = vec![0, 8, 0, 4, 0, 1, 0, 0];
        options.extend_from_slice(&[0, 10, 0, 8, 1, 1, 1, 1, 1, 1, 1, 1]);
        options.extend_from_slice(&[0, 10, 0, 8, 2, 2, 2, 2, 2, 2, 2, 2]);
        let message = with_opt(&plain("\0", 2), 1232, 0, 0, &options);
        assert_eq!(query(&message).edns().and_then(|edns| edns.cookie), Some(&[1; 8][..]));
    }

    #[test]
    fn replies_carry_opt_only_for_those_who_sent_one() {
        let plain = plain("\x01A\0", 28);
        let mut out = [0; 512];
        let length = query(&plain)
            .write_code(ResponseCode::ServFail, true, &TERMS, &mut out)
            .expect("room");
        assert_eq!(&out[..length], b"\x12\x34\x83\x82\0\x01\0\0\0\0\0\0\x01A\0\0\x1c\0\x01");
        let edns = with_opt(&plain, 1232, 0, 0x8000, &[]);
        let terms = Terms {
            cookie: Some([7; 24]),
            ..TERMS
        };
        let length = query(&edns)
            .write_code(ResponseCode::BADCOOKIE, false, &terms, &mut out)
            .expect("room");
        let reply = Message::from_vec(&out[..length]).expect("a message");
        assert_eq!(reply.metadata.response_code, ResponseCode::BADCOOKIE);
        let edns = reply.edns.expect("EDNS");
        assert_eq!(
            (edns.max_payload(), edns.version(), edns.flags().dnssec_ok),
            (1232, 0, true)
        );
        assert_eq!(out[length - 28..length][..6], [0, 10, 0, 24, 7, 7]);
    }

    #[test]
    fn no_octets_whatsoever_cause_a_panic() {
        let good = with_opt(
            &plain("\x03www\x07example\x03org\0", 28),
            1232,
            0,
            0,
            &[0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8],
        );
        let mut random = 1_u64;
        let mut out = [0; 1232];
        for _ in 0..200_000 {
            let mut message = good.clone();
            for _ in 0..4 {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let at = usize::try_from(random >> 33).expect("small") % message.len();
                message[at] = random.to_be_bytes()[1];
            }
            let length = usize::try_from(random >> 40).expect("small") % (message.len() + 1);
            for message in [&message[..], &message[..length]] {
                if let Parsed::Query(query) | Parsed::Reject(query, _) = Parsed::of(message) {
                    let _ = query.question();
                    assert!(
                        query
                            .write_code(ResponseCode::FormErr, false, &TERMS, &mut out)
                            .is_some()
                    );
                    assert!(
                        query
                            .write_code(ResponseCode::FormErr, false, &TERMS, &mut [])
                            .is_none()
                    );
                }
            }
        }
    }

    #[test]
    fn any_gets_one_small_record() {
        let name = Name::from_ascii("www.example.org.").expect("a name");
        assert_eq!(minimal_any(&name).answers.len(), 1);
        assert_eq!(minimal_any(&name).answers[0].record_type(), RecordType::HINFO);
    }

    pub(crate) fn query(message: &[u8]) -> Query<'_> {
        match Parsed::of(message) {
            Parsed::Query(query) => query,
            other => panic!("{other:?}"),
        }
    }

    /// A query with RD and id 0x1234; `name` is on the wire.
    pub(crate) fn plain(name: &str, kind: u16) -> Vec<u8> {
        let mut message = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        message.extend_from_slice(name.as_bytes());
        message.extend_from_slice(&kind.to_be_bytes());
        message.extend_from_slice(&[0, 1]);
        message
    }

    pub(crate) fn with_opt(message: &[u8], size: u16, version: u8, flags: u16, options: &[u8]) -> Vec<u8> {
        let mut message = message.to_vec();
        message[11] += 1;
        message.extend_from_slice(&[0, 0, 41]);
        message.extend_from_slice(&size.to_be_bytes());
        message.extend_from_slice(&[0, version]);
        message.extend_from_slice(&flags.to_be_bytes());
        message.extend_from_slice(&u16::try_from(options.len()).expect("short").to_be_bytes());
        message.extend_from_slice(options);
        message
    }
}
