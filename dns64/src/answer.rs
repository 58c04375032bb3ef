//! What is known about one question, before it is packed for a client.

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{Name, RData, Record, RecordType},
};

/// The sections of a response without its header and without OPT: what an upstream said, what the zone holds, or what was
/// synthesised from both.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// NOERROR with records or without (NODATA), NXDOMAIN, or a failure.
    pub code: ResponseCode,
    /// Whether it comes from a zone of ours (the AA bit).
    pub authoritative: bool,
    /// Whether a part of it comes from elsewhere all the same, so that its TTLs count down: the end of an alias.
    pub ages: bool,
    /// The answer section, a chain of CNAMEs in its order first.
    pub answers: Vec<Record>,
    /// The authority section: the SOA of a negative answer among it.
    pub authorities: Vec<Record>,
    /// The additional section without OPT and TSIG.
    pub additionals: Vec<Record>,
}

/// A response code as the registry, dig and every log have it.
pub const fn code_name(code: ResponseCode) -> &'static str {
    match code {
        ResponseCode::NoError => "NOERROR",
        ResponseCode::FormErr => "FORMERR",
        ResponseCode::ServFail => "SERVFAIL",
        ResponseCode::NXDomain => "NXDOMAIN",
        ResponseCode::NotImp => "NOTIMP",
        ResponseCode::Refused => "REFUSED",
        ResponseCode::YXDomain => "YXDOMAIN",
        ResponseCode::YXRRSet => "YXRRSET",
        ResponseCode::NXRRSet => "NXRRSET",
        ResponseCode::NotAuth => "NOTAUTH",
        ResponseCode::NotZone => "NOTZONE",
        ResponseCode::BADVERS => "BADVERS",
        ResponseCode::BADCOOKIE => "BADCOOKIE",
        _ => "another code",
    }
}

impl Answer {
    /// An answer without a record.
    pub fn empty(code: ResponseCode) -> Self {
        Self {
            code,
            authoritative: false,
            ages: false,
            answers: Vec::new(),
            authorities: Vec::new(),
            additionals: Vec::new(),
        }
    }

    /// The sections of an upstream's response. Its header's flags are the upstream's business, not ours.
    pub fn of(message: Message) -> Self {
        Self {
            code: message.metadata.response_code,
            authoritative: false,
            ages: false,
            answers: message.answers,
            authorities: message.authorities,
            additionals: message.additionals,
        }
    }

    /// Seconds that it is known not to exist or not to have the type: the smaller of the SOA's TTL and its minimum
    /// (RFC 2308 §5); `None` without a SOA.
    pub fn negative_ttl(&self) -> Option<u32> {
        self.authorities.iter().find_map(|record| match &record.data {
            RData::SOA(soa) => Some(record.ttl.min(soa.minimum)),
            _ => None,
        })
    }

    /// Where the chain of CNAMEs that begins at `name` ends, at most 16 links away, and whether each link was there.
    pub fn end_of_chain<'a>(&'a self, name: &'a Name) -> &'a Name {
        let mut end = name;
        for _ in 0..16 {
            let link = self.answers.iter().find_map(|record| match &record.data {
                RData::CNAME(target) if record.name == *end => Some(&target.0),
                _ => None,
            });
            match link {
                Some(target) => end = target,
                None => break,
            }
        }
        end
    }

    /// Records of `kind` at `owner` in the answer section.
    pub fn records<'a>(&'a self, owner: &'a Name, kind: RecordType) -> impl Iterator<Item = &'a Record> {
        self.answers
            .iter()
            .filter(move |record| record.record_type() == kind && record.name == *owner)
    }
}
