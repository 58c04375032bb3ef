//! One query on the wire and what may count as its reply (RFC 5452 §4): [`Sent`].
//!
//! Where a datagram came from, a connected socket and thus the kernel has judged; here it is the id, the question and the
//! case of its letters (draft-vixie-dnsext-dns0x20). Whatever fails is not an error but a mismatch: the reply may still
//! come.

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{DNSClass, RecordType},
    serialize::binary::{BinEncodable, BinEncoder, NameEncoding},
};

use crate::{Answer, Question};

/// What we tell a server that a datagram to us may hold: no fragment on any path (DNS flag day 2020).
pub const PAYLOAD: u16 = 1232;
/// Octets of a header (RFC 1035 §4.1.1).
const HEADER: usize = 12;

/// What must not be foreseen about one query, from a CSPRNG.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entropy {
    /// The message's id.
    pub id: u16,
    /// Which letters are in upper case: one bit for each octet of the name.
    pub case: [u64; 4],
}

/// How a query is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Form {
    /// With OPT (RFC 6891); without it for servers that answer FORMERR to it.
    pub edns: bool,
    /// Letters in random case, and only a reply in the same case counts.
    pub case: bool,
    /// As long as a multiple of 128 octets (RFC 8467 §4.1), where the transport hides what is in it.
    pub padded: bool,
}

/// A query as it was sent.
#[derive(Clone, Debug)]
pub struct Sent {
    bytes: Vec<u8>,
    /// Where the question ends in them.
    end: usize,
    kind: RecordType,
    class: DNSClass,
    form: Form,
}

/// What a message that came in is to a query.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// The reply: NOERROR or NXDOMAIN.
    Good(Answer),
    /// The reply is in TCP, this one is cut off.
    Truncated,
    /// The server knows nothing of EDNS: FORMERR or NOTIMP without OPT (RFC 6891 §7).
    NoEdns,
    /// The reply, and of no use: another server may know more. SERVFAIL, REFUSED and their like, a referral
    /// (`NoError`), and what cannot be parsed (`FormErr`).
    Lame(ResponseCode),
    /// Not the reply.
    Mismatch(Mismatch),
}

/// Why a message is no reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mismatch {
    /// Too short, or a query itself.
    Form,
    /// Another id.
    Id,
    /// Another question.
    Question,
    /// The question in another case.
    Case,
}

impl Mismatch {
    /// All there are.
    pub const ALL: [Self; 4] = [Self::Form, Self::Id, Self::Question, Self::Case];

    /// As in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Form => "form",
            Self::Id => "id",
            Self::Question => "question",
            Self::Case => "case",
        }
    }
}

impl Sent {
    /// The query for `question`, with RD; `None` if its name is too long for a message.
    pub fn new(question: &Question, form: Form, entropy: &Entropy) -> Option<Self> {
        let mut bytes = Vec::with_capacity(HEADER + 255 + 4 + 15);
        let checking_disabled = if question.checking_disabled { 0x10 } else { 0 };
        bytes.extend(entropy.id.to_be_bytes());
        bytes.extend([1, checking_disabled, 0, 1, 0, 0, 0, 0, 0, u8::from(form.edns)]);
        bytes.extend(name_of(question)?);
        if form.case {
            scatter_case(bytes.get_mut(HEADER..)?, &entropy.case);
        }
        bytes.extend(u16::from(question.kind).to_be_bytes());
        bytes.extend(u16::from(question.class).to_be_bytes());
        let end = bytes.len();
        if form.edns {
            write_opt(&mut bytes, question.dnssec_ok, form.padded);
        }
        Some(Self {
            bytes,
            end,
            kind: question.kind,
            class: question.class,
            form,
        })
    }

    /// The message.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Its id.
    pub fn id(&self) -> u16 {
        id_of(&self.bytes).unwrap_or(0)
    }

    /// The same query under another id, for a connection where its own is taken.
    pub fn set_id(&mut self, id: u16) {
        if let Some(place) = self.bytes.first_chunk_mut() {
            *place = id.to_be_bytes();
        }
    }

    /// What `message` is to this query, whatever it holds.
    pub fn judge(&self, message: &[u8]) -> Reply {
        let mismatch = Reply::Mismatch;
        let Some(header) = message.first_chunk::<HEADER>() else {
            return mismatch(Mismatch::Form);
        };
        let [_, _, flags, low, questions @ ..] = *header;
        if header.first_chunk() != self.bytes.first_chunk::<2>() {
            return mismatch(Mismatch::Id);
        }
        // QR, and the opcode of a query.
        if flags & 0xf8 != 0x80 {
            return mismatch(Mismatch::Form);
        }
        let code = low & 0x0f;
        let rejects_form = matches!(code, 1 | 4);
        if questions[..2] == [0, 0] {
            // Servers from before EDNS send a bare header. It can do no harm: the same question is asked once more.
            let bare = self.form.edns && rejects_form && message.len() == HEADER;
            return if bare {
                Reply::NoEdns
            } else {
                mismatch(Mismatch::Question)
            };
        }
        let asked = self.bytes.get(HEADER..self.end).unwrap_or_default();
        match message.get(HEADER..self.end) {
            Some(echoed) if questions[..2] == [0, 1] && echoed.eq_ignore_ascii_case(asked) => {
                // Type and class are no letters, but the bytes of a letter's two cases.
                let tail = asked.len().saturating_sub(4);
                if echoed.get(tail..) != asked.get(tail..) {
                    return mismatch(Mismatch::Question);
                }
                if self.form.case && echoed != asked {
                    return mismatch(Mismatch::Case);
                }
            }
            _ => return mismatch(Mismatch::Question),
        }
        if flags & 0x02 != 0 {
            return Reply::Truncated;
        }
        let Ok(parsed) = Message::from_vec(message) else {
            let plain = self.form.edns && rejects_form;
            return if plain {
                Reply::NoEdns
            } else {
                Reply::Lame(ResponseCode::FormErr)
            };
        };
        if self.form.edns && rejects_form && parsed.edns.is_none() {
            return Reply::NoEdns;
        }
        self.weigh(parsed)
    }

    /// What use a reply is.
    fn weigh(&self, message: Message) -> Reply {
        let code = message.metadata.response_code;
        // YXDOMAIN is what a DNAME says of a name that became too long (RFC 6672 §2.2).
        if !matches!(
            code,
            ResponseCode::NoError | ResponseCode::NXDomain | ResponseCode::YXDomain
        ) {
            return Reply::Lame(code);
        }
        let is_authority = message.metadata.authoritative || message.metadata.recursion_available;
        let mut answer = Answer::of(message);
        for section in [&mut answer.answers, &mut answer.authorities, &mut answer.additionals] {
            // A TTL with its top bit set is none (RFC 2181 §8).
            section.retain(|record| record.dns_class == self.class);
            for record in section {
                if record.ttl > i32::MAX.unsigned_abs() {
                    record.ttl = 0;
                }
            }
        }
        let of = |kind| answer.authorities.iter().any(|record| record.record_type() == kind);
        let is_referral = answer.answers.is_empty()
            && of(RecordType::NS)
            && !of(RecordType::SOA)
            && self.kind != RecordType::NS
            && !is_authority;
        if code == ResponseCode::NoError && is_referral {
            return Reply::Lame(code);
        }
        Reply::Good(answer)
    }
}

/// The id of a message, or what would be one.
pub fn id_of(message: &[u8]) -> Option<u16> {
    message.first_chunk().map(|id| u16::from_be_bytes(*id))
}

/// The name in wire format, uncompressed.
fn name_of(question: &Question) -> Option<Vec<u8>> {
    let mut name = Vec::with_capacity(255);
    let mut encoder = BinEncoder::new(&mut name);
    encoder.set_name_encoding(NameEncoding::UncompressedLowercase);
    question.name.emit(&mut encoder).ok()?;
    (name.len() <= 255).then_some(name)
}

/// Turns letters to upper case where the bits say so. The octets that give lengths are below any letter.
fn scatter_case(name: &mut [u8], bits: &[u64; 4]) {
    for (place, octet) in name.iter_mut().enumerate() {
        let bit = bits.get(place / 64).is_some_and(|word| word >> (place % 64) & 1 == 1);
        if bit {
            octet.make_ascii_uppercase();
        }
    }
}

/// OPT (RFC 6891 §6.1.2), with padding (RFC 7830) as its only option.
fn write_opt(bytes: &mut Vec<u8>, dnssec_ok: bool, padded: bool) {
    let [high, low] = PAYLOAD.to_be_bytes();
    let dnssec_ok = if dnssec_ok { 0x80 } else { 0 };
    bytes.extend([0, 0, 41, high, low, 0, 0, dnssec_ok, 0]);
    if padded {
        // Length of the data, then code and length of the option.
        let padding = (bytes.len() + 6).next_multiple_of(128) - bytes.len() - 6;
        let [a, b] = u16::try_from(padding + 4).unwrap_or(4).to_be_bytes();
        let [c, d] = u16::try_from(padding).unwrap_or(0).to_be_bytes();
        bytes.extend([a, b, 0, 12, c, d]);
        bytes.resize(bytes.len() + padding, 0);
    } else {
        bytes.extend([0, 0]);
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, str::FromStr};

    use hickory_proto::{
        op::{Edns, MessageType, OpCode, Query},
        rr::{Name, RData, Record, rdata},
    };

    use super::*;

    const ENTROPY: Entropy = Entropy {
        id: 0x1234,
        case: [0x5555_5555_5555_5555; 4],
    };

    #[test]
    fn a_query_is_what_a_server_expects() {
        let mut asked = question("www.example.org.");
        asked.dnssec_ok = true;
        asked.checking_disabled = true;
        let sent = Sent::new(&asked, form(), &ENTROPY).expect("it fits");
        let message = Message::from_vec(sent.bytes()).expect("it parses");
        assert_eq!((message.id, sent.id()), (0x1234, 0x1234));
        assert!(message.metadata.recursion_desired && message.metadata.checking_disabled);
        assert_eq!(message.metadata.message_type, MessageType::Query);
        assert_eq!(message.queries, [Query::query(asked.name.clone(), asked.kind)]);
        let edns = message.edns.expect("OPT");
        assert_eq!(
            (edns.max_payload(), edns.version(), edns.flags().dnssec_ok),
            (1232, 0, true)
        );
        assert!(!message.queries[0].name.eq_case(&asked.name), "its letters are mixed");

        let plain = Sent::new(&asked, Form::default(), &ENTROPY).expect("it fits");
        let message = Message::from_vec(plain.bytes()).expect("it parses");
        assert!(message.edns.is_none() && message.queries[0].name.eq_case(&asked.name));
    }

    #[test]
    fn what_travels_hidden_is_a_multiple_of_128_octets_long() {
        let form = Form { padded: true, ..form() };
        for labels in 1..120 {
            let name = "a.".repeat(labels);
            let sent = Sent::new(&question(&name), form, &ENTROPY).expect("it fits");
            assert_eq!(sent.bytes().len() % 128, 0);
            assert!(Message::from_vec(sent.bytes()).is_ok_and(|message| message.edns.is_some()));
        }
    }

    #[test]
    fn every_letter_of_a_name_can_be_in_either_case_and_nothing_else_changes() {
        let name = format!("{0}.{0}.{0}.x1-_.", "q".repeat(63));
        let of = |case| Sent::new(&question(&name), form(), &Entropy { id: 1, case }).expect("it fits");
        let (low, high) = (of([0; 4]), of([u64::MAX; 4]));
        let differing = low.bytes().iter().zip(high.bytes()).filter(|(a, b)| a != b);
        assert_eq!(differing.count(), 190);
        assert!(low.bytes().eq_ignore_ascii_case(high.bytes()));
    }

    #[test]
    fn the_reply_is_taken() {
        let sent = sent();
        let Reply::Good(answer) = sent.judge(&reply(&sent)) else {
            panic!("it is the reply");
        };
        assert_eq!(answer.code, ResponseCode::NoError);
        assert_eq!(answer.answers.len(), 1);
    }

    #[test]
    fn of_all_65536_ids_only_the_right_one_is_taken() {
        let sent = sent();
        let mut message = reply(&sent);
        for id in 0..=u16::MAX {
            message[..2].copy_from_slice(&id.to_be_bytes());
            match sent.judge(&message) {
                Reply::Good(_) => assert_eq!(id, 0x1234),
                other => assert_eq!(other, Reply::Mismatch(Mismatch::Id), "{id}"),
            }
        }
    }

    #[test]
    fn another_question_is_no_reply() {
        let sent = sent();
        let changed = |change: &dyn Fn(&mut Message)| {
            let mut message = Message::from_vec(&reply(&sent)).expect("it parses");
            change(&mut message);
            sent.judge(&message.to_vec().expect("it encodes"))
        };
        let question = Reply::Mismatch(Mismatch::Question);
        let other = Name::from_str("www.example.net.").expect("a name");
        assert_eq!(changed(&|message| message.queries[0].name = other.clone()), question);
        assert_eq!(
            changed(&|message| message.queries[0].query_type = RecordType::A),
            question
        );
        assert_eq!(
            changed(&|message| message.queries[0].query_class = DNSClass::CH),
            question
        );
        assert_eq!(changed(&|message| message.queries.clear()), question);
        assert_eq!(
            changed(&|message| message.queries.push(message.queries[0].clone())),
            question
        );
        assert_eq!(
            changed(&|message| message.queries[0].name = message.queries[0].name.to_lowercase()),
            Reply::Mismatch(Mismatch::Case)
        );
        let form = Reply::Mismatch(Mismatch::Form);
        assert_eq!(
            changed(&|message| message.metadata.message_type = MessageType::Query),
            form
        );
        assert_eq!(changed(&|message| message.metadata.op_code = OpCode::Notify), form);
    }

    #[test]
    fn a_type_that_differs_like_the_cases_of_a_letter_is_another_question() {
        // 65 and 97, "A" and "a", are types, too: HTTPS and one that nobody has yet.
        let mut asked = question("www.example.org.");
        asked.kind = RecordType::HTTPS;
        let sent = Sent::new(&asked, Form::default(), &ENTROPY).expect("it fits");
        let mut message = sent.bytes().to_vec();
        message[2] = 0x80;
        assert!(matches!(sent.judge(&message), Reply::Good(_)));
        let kind = message.len() - 3;
        assert_eq!(message[kind], 65);
        message[kind] = 97;
        assert_eq!(sent.judge(&message), Reply::Mismatch(Mismatch::Question));
    }

    #[test]
    fn a_server_that_does_not_keep_case_is_understood_if_one_says_so() {
        let form = Form { case: false, ..form() };
        let sent = Sent::new(&question("www.example.org."), form, &ENTROPY).expect("it fits");
        let upper: Vec<u8> = reply(&sent).iter().map(u8::to_ascii_uppercase).collect();
        // The answer's own bytes are spoilt by this, but not its question.
        assert!(!matches!(sent.judge(&upper), Reply::Mismatch(_)));
    }

    #[test]
    fn failures_referrals_and_rubbish_are_lame() {
        let sent = sent();
        let with = |code, change: &dyn Fn(&mut Message)| {
            let mut message = Message::from_vec(&reply(&sent)).expect("it parses");
            message.metadata.response_code = code;
            message.set_edns(Edns::new());
            change(&mut message);
            sent.judge(&message.to_vec().expect("it encodes"))
        };
        for code in [
            ResponseCode::ServFail,
            ResponseCode::Refused,
            ResponseCode::NotImp,
            ResponseCode::FormErr,
            ResponseCode::NotAuth,
            ResponseCode::BADCOOKIE,
        ] {
            assert_eq!(with(code, &|_| {}), Reply::Lame(code));
        }
        let referral = |message: &mut Message| {
            message.answers.clear();
            let server = Name::from_str("ns.example.org.").expect("a name");
            let data = RData::NS(rdata::NS(server.clone()));
            message.add_authority(Record::from_rdata(server, 60, data));
            message.metadata.recursion_available = false;
        };
        assert_eq!(
            with(ResponseCode::NoError, &referral),
            Reply::Lame(ResponseCode::NoError)
        );
        let mut cut = reply(&sent);
        cut.truncate(cut.len() - 3);
        assert_eq!(sent.judge(&cut), Reply::Lame(ResponseCode::FormErr));
    }

    #[test]
    fn a_server_from_before_edns_is_known_by_its_formerr() {
        let sent = sent();
        for code in [ResponseCode::FormErr, ResponseCode::NotImp] {
            let mut message = Message::from_vec(&reply(&sent)).expect("it parses");
            message.metadata.response_code = code;
            assert_eq!(sent.judge(&message.to_vec().expect("it encodes")), Reply::NoEdns);
            let mut bare = reply(&sent)[..12].to_vec();
            bare[2..].copy_from_slice(&[0x81, 0x80 | code.low(), 0, 0, 0, 0, 0, 0, 0, 0]);
            assert_eq!(sent.judge(&bare), Reply::NoEdns);
        }
        let plain = Sent::new(&question("www.example.org."), Form::default(), &ENTROPY).expect("it fits");
        let mut bare = plain.bytes()[..12].to_vec();
        bare[2..].copy_from_slice(&[0x81, 0x81, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(
            plain.judge(&bare),
            Reply::Mismatch(Mismatch::Question),
            "asked without EDNS"
        );
    }

    #[test]
    fn a_truncated_reply_need_not_parse() {
        let sent = sent();
        let mut message = reply(&sent);
        message[2] |= 2;
        message.truncate(sent.end + 3);
        assert_eq!(sent.judge(&message), Reply::Truncated);
    }

    #[test]
    fn records_of_another_class_are_dropped_and_a_ttl_with_its_top_bit_set_is_zero() {
        let sent = sent();
        let mut message = Message::from_vec(&reply(&sent)).expect("it parses");
        let mut foreign = message.answers[0].clone();
        foreign.dns_class = DNSClass::CH;
        message.add_answer(foreign);
        message.answers[0].ttl = 1 << 31;
        let Reply::Good(answer) = sent.judge(&message.to_vec().expect("it encodes")) else {
            panic!("it is the reply");
        };
        assert_eq!(answer.answers.iter().map(|record| record.ttl).collect::<Vec<_>>(), [0]);
    }

    #[test]
    fn no_message_makes_it_panic() {
        let sent = sent();
        let good = reply(&sent);
        let mut state = 1_u64;
        let mut draw = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(state >> 40).expect("24 bits")
        };
        for _ in 0..200_000 {
            let mut message = good.clone();
            for _ in 0..draw() % 6 {
                let place = draw() % message.len();
                message[place] = draw().to_le_bytes()[0];
            }
            message.truncate(draw() % (good.len() + 40));
            let _ = sent.judge(&message);
        }
    }

    fn form() -> Form {
        Form {
            edns: true,
            case: true,
            padded: false,
        }
    }

    fn question(name: &str) -> Question {
        Question::new(&Name::from_str(name).expect("a name"), RecordType::AAAA)
    }

    fn sent() -> Sent {
        Sent::new(&question("www.example.org."), form(), &ENTROPY).expect("it fits")
    }

    /// An honest server's reply, without OPT.
    fn reply(sent: &Sent) -> Vec<u8> {
        let mut message = Message::from_vec(sent.bytes()).expect("it parses").into_response();
        message.metadata.recursion_available = true;
        message.edns = None;
        let name = message.queries[0].name.clone();
        let data = RData::A(rdata::A(Ipv4Addr::new(192, 0, 2, 1)));
        message.add_answer(Record::from_rdata(name, 60, data));
        message.to_vec().expect("it encodes")
    }
}
