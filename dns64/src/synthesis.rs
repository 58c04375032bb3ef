//! DNS64: AAAA records made of A records, for those who have IPv6 only (RFC 6147 §5.1).
//!
//! A question for AAAA goes through two types, one per answer that it takes: [`Synthesis`] waits for the AAAA answer,
//! [`WithoutAaaa`] for the A answer. Both may be asked at once (§5.1.8), yet nothing can be said before the AAAA answer is
//! there, since only [`Synthesis::on_aaaa`] leads on. All here is pure; who asks, and how long, is the caller's business.
//!
//! Nothing is validated here, so nothing may carry the AD bit. Synthesis takes place unless the asker sets both CD and DO,
//! which is how somebody who validates by himself asks for what there really is (§5.5); with DO alone he gets what is
//! synthesised, without the signatures that no longer fit it.

use std::net::{Ipv4Addr, Ipv6Addr};

use hickory_proto::{
    dnssec::rdata::DNSSECRData,
    op::ResponseCode,
    rr::{DNSClass, Name, RData, Record, RecordType, rdata::AAAA},
};
use ipnet::{Ipv4Net, Ipv6Net};

use crate::{Answer, Pref64, question::Question};

/// Seconds that a synthesised record lives at most if nobody says how long there is no AAAA (RFC 6147 §5.1.7).
pub const WITHOUT_SOA: u32 = 600;
/// Seconds that a failure may be remembered (RFC 9520 §3.2 asks for one at least).
pub const FAILURE: u32 = 5;
/// Seconds that anything may be remembered which rests on a failure (RFC 9520 §3.2).
const ON_FAILURE: u32 = 300;
/// Records that are synthesised for one answer. Thrice as many no longer fit a message.
const MOST: usize = 1024;

/// What is synthesised for whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// One AAAA per A and mapping, those of the first mapping first. Empty: no synthesis.
    pub mappings: Vec<Mapping>,
    /// AAAA records within these do not count and are not passed on (RFC 6147 §5.1.4). `::ffff:0:0/96` belongs here: no
    /// packet can have such a destination.
    pub exclude_aaaa: Vec<Ipv6Net>,
    /// At and below these names nothing is synthesised: whoever cannot be reached through the translator.
    pub exclude_names: Vec<Name>,
    /// At and below these names AAAA records do not count: whoever can be reached through the translator only.
    pub ignore_aaaa: Vec<Name>,
}

/// One prefix and the IPv4 addresses that appear under it (RFC 6147 §5.2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Where they appear.
    pub prefix: Pref64,
    /// Networks that do; empty: all.
    pub only: Vec<Ipv4Net>,
    /// Networks that do not, even if `only` has them.
    pub except: Vec<Ipv4Net>,
}

/// A question for AAAA whose AAAA answer is not known yet.
#[derive(Debug)]
pub struct Synthesis<'a> {
    rules: &'a Rules,
    name: Name,
}

/// What follows from the AAAA answer. `F` is why there is no answer at all, such as a timeout.
#[derive(Debug)]
pub enum Step<'a, F> {
    /// The A answer does not matter.
    Done(Outcome),
    /// Ask for A.
    AskA(WithoutAaaa<'a, F>),
}

/// A question for AAAA to which no AAAA record is an answer.
#[derive(Debug)]
pub struct WithoutAaaa<'a, F> {
    rules: &'a Rules,
    name: Name,
    missing: Missing,
    /// Seconds that AAAA is known to be missing.
    ttl: u32,
    /// What is answered if A does not help either.
    original: Result<Answer, F>,
}

/// What is answered, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The sections.
    pub answer: Answer,
    /// Seconds that it may be answered from a cache; none at all if 0. A negative answer without a SOA has 0 (RFC 2308 §5).
    pub ttl: u32,
    /// Why this.
    pub reason: Reason,
}

/// Why an answer is as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// There are AAAA records: they are the answer.
    Native,
    /// The same without those that are excluded.
    Filtered,
    /// The name, or the one that it is an alias of, does not exist (RFC 6147 §5.1.2).
    NoName,
    /// Made of A records.
    Synthesised(Missing),
    /// There is no A either.
    NoAddress(Missing),
    /// No prefix stands for any of the A records.
    NotMapped(Missing),
    /// The A answer is an error, and so is this one (RFC 6147 §5.1.6).
    Error(Missing),
}

/// Why AAAA is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// The answer has none.
    Empty,
    /// All are in excluded networks, or the name is one whose AAAA records are ignored.
    Excluded,
    /// A failure other than NXDOMAIN, or no answer in time (RFC 6147 §5.1.2, §5.1.3).
    Failed,
}

impl Rules {
    /// Synthesis under `prefixes` for all names and addresses, with IPv4-mapped AAAA records excluded.
    pub fn new(prefixes: impl IntoIterator<Item = Pref64>) -> Self {
        const MAPPED: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96);
        Self {
            mappings: prefixes.into_iter().map(Mapping::from).collect(),
            exclude_aaaa: vec![MAPPED],
            exclude_names: Vec::new(),
            ignore_aaaa: Vec::new(),
        }
    }

    /// Begins to answer `question`; `None` if its answer is nothing but what there is.
    pub fn synthesis(&self, question: &Question) -> Option<Synthesis<'_>> {
        let applies = question.class == DNSClass::IN
            && question.kind == RecordType::AAAA
            && !wants_raw(question)
            && !self.mappings.is_empty()
            && !covers(&self.exclude_names, &question.name);
        applies.then(|| Synthesis {
            rules: self,
            name: question.name.clone(),
        })
    }

    /// The mapping whose prefix has `address`, the longest if several do, and what it stands for, if for anything.
    pub fn extract(&self, address: Ipv6Addr) -> Option<(&Mapping, Option<Ipv4Addr>)> {
        let within = self.mappings.iter().filter(|mapping| mapping.prefix.contains(address));
        let mapping = within.max_by_key(|mapping| mapping.prefix.length())?;
        let v4 = mapping.prefix.extract(address).filter(|v4| mapping.has(*v4));
        Some((mapping, v4))
    }

    /// The IPv6 addresses of `addresses`, those of the first mapping first.
    fn synthesise(&self, addresses: Vec<Ipv4Addr>) -> impl Iterator<Item = Ipv6Addr> {
        // As many of each prefix, so that none gives way to another.
        let most = MOST / self.mappings.len().clamp(1, MOST);
        self.mappings.iter().flat_map(move |mapping| {
            let mapped = addresses.iter().filter(|v4| mapping.has(**v4));
            let v6: Vec<Ipv6Addr> = mapped.take(most).map(|v4| mapping.prefix.embed(*v4)).collect();
            v6
        })
    }

    fn excludes(&self, record: &Record) -> bool {
        let RData::AAAA(AAAA(address)) = record.data else {
            return false;
        };
        self.exclude_aaaa.iter().any(|network| network.contains(&address))
    }
}

impl Mapping {
    /// Whether `address` appears under the prefix.
    pub fn has(&self, address: Ipv4Addr) -> bool {
        let within = |networks: &[Ipv4Net]| networks.iter().any(|network| network.contains(&address));
        self.prefix.may_embed(address) && (self.only.is_empty() || within(&self.only)) && !within(&self.except)
    }
}

impl From<Pref64> for Mapping {
    fn from(prefix: Pref64) -> Self {
        Self {
            prefix,
            only: Vec::new(),
            except: Vec::new(),
        }
    }
}

impl<'a> Synthesis<'a> {
    /// Goes on with the answer to the question itself. `Err` is no answer at all; a response with an error code is `Ok`.
    pub fn on_aaaa<F>(self, aaaa: Result<Answer, F>) -> Step<'a, F> {
        let Self { rules, name } = self;
        let (missing, ttl, original) = match aaaa {
            // Final, whatever may be known of A.
            Ok(aaaa) if aaaa.code == ResponseCode::NXDomain => {
                return Step::Done(Outcome::of(aaaa, &name, Reason::NoName));
            }
            Ok(aaaa) if aaaa.code == ResponseCode::NoError => {
                let ignored = covers(&rules.ignore_aaaa, &name);
                let (there, gone, aaaa) = without(aaaa, &name, |record| ignored || rules.excludes(record));
                match (there, gone) {
                    (true, None) => return Step::Done(Outcome::of(aaaa, &name, Reason::Native)),
                    (true, Some(_)) => return Step::Done(Outcome::of(aaaa, &name, Reason::Filtered)),
                    (false, None) => (
                        Missing::Empty,
                        aaaa.negative_ttl().map_or(WITHOUT_SOA, seconds),
                        Ok(aaaa),
                    ),
                    (false, Some(ttl)) => (Missing::Excluded, ttl.min(WITHOUT_SOA), Ok(aaaa)),
                }
            }
            failed => (Missing::Failed, WITHOUT_SOA, failed),
        };
        Step::AskA(WithoutAaaa {
            rules,
            name,
            missing,
            ttl,
            original,
        })
    }
}

impl<F> WithoutAaaa<'_, F> {
    /// Ends with the answer to the same question for A.
    ///
    /// # Errors
    ///
    /// There is no answer for A, or there was none for AAAA and A does not help: that there is no AAAA is then not known,
    /// so it is not said.
    pub fn on_a(self, a: Result<Answer, F>) -> Result<Outcome, F> {
        let a = a?;
        match a.code {
            ResponseCode::NoError => {}
            ResponseCode::NXDomain => return Ok(Outcome::of(without_a(a), &self.name, Reason::NoName)),
            _ => return Ok(Outcome::of(without_a(a), &self.name, Reason::Error(self.missing))),
        }
        let end = a.end_of_chain(&self.name).clone();
        let addresses: Vec<(Ipv4Addr, u32)> = a
            .records(&end, RecordType::A)
            .filter_map(|record| match record.data {
                RData::A(v4) => Some((v4.0, seconds(record.ttl))),
                _ => None,
            })
            .collect();
        // The records of a set should not differ in this, but do; the set lives as long as the first to go (RFC 2181 §5.2).
        let Some(ttl) = addresses.iter().map(|(_, ttl)| *ttl).min() else {
            return self.without_address(a);
        };
        let ttl = ttl.min(self.ttl);
        let synthesised: Vec<Record> = self
            .rules
            .synthesise(addresses.into_iter().map(|(v4, _)| v4).collect())
            .map(|v6| Record::from_rdata(end.clone(), ttl, RData::AAAA(AAAA(v6))))
            .collect();
        if synthesised.is_empty() {
            return self.unmapped(ttl);
        }
        let answer = replace_a(a, &end, synthesised);
        let outcome = Outcome::of(answer, &self.name, Reason::Synthesised(self.missing));
        Ok(match self.missing {
            Missing::Failed => outcome.at_most(ON_FAILURE),
            Missing::Empty | Missing::Excluded => outcome,
        })
    }

    /// Neither AAAA nor A: what was answered first, for as long as both are missing.
    fn without_address(self, a: Answer) -> Result<Outcome, F> {
        let reason = Reason::NoAddress(self.missing);
        if self.missing == Missing::Excluded {
            // A SOA is with the A answer only.
            return Ok(Outcome::of(without_a(a), &self.name, reason).at_most(self.ttl));
        }
        let no_a = a.negative_ttl().map_or(u32::MAX, seconds);
        Ok(Outcome::of(self.original?, &self.name, reason).at_most(no_a))
    }

    /// No AAAA, and no prefix for any A, all of which is known for `ttl` seconds: what was answered first.
    fn unmapped(self, ttl: u32) -> Result<Outcome, F> {
        let mut outcome = Outcome::of(self.original?, &self.name, Reason::NotMapped(self.missing));
        if self.missing == Missing::Excluded {
            // There never was a SOA that could say how long.
            outcome.ttl = chain_ttl(&outcome.answer);
        }
        Ok(outcome.at_most(ttl))
    }
}

impl Outcome {
    /// `answer` to a question for AAAA at `name`, for as long as it may be remembered.
    fn of(answer: Answer, name: &Name, reason: Reason) -> Self {
        let ttl = lifetime(&answer, name, RecordType::AAAA);
        Self { answer, ttl, reason }
    }

    fn at_most(mut self, ttl: u32) -> Self {
        self.ttl = self.ttl.min(ttl);
        self
    }
}

impl Reason {
    /// As in metrics and in what is printed.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Filtered => "filtered",
            Self::NoName => "no-name",
            Self::Synthesised(_) => "synthesised",
            Self::NoAddress(_) => "no-address",
            Self::NotMapped(_) => "not-mapped",
            Self::Error(_) => "error",
        }
    }

    /// Why there is no AAAA record of its owner's in the answer; `None` if there is, or nothing at all.
    pub const fn missing(self) -> Option<Missing> {
        match self {
            Self::Native | Self::Filtered | Self::NoName => None,
            Self::Synthesised(missing) | Self::NoAddress(missing) | Self::NotMapped(missing) | Self::Error(missing) => {
                Some(missing)
            }
        }
    }
}

impl Missing {
    /// As in metrics and in what is printed.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Excluded => "excluded",
            Self::Failed => "failed",
        }
    }
}

/// Whether nothing may be synthesised for `question`: its asker validates by himself (RFC 6147 §5.5).
pub fn wants_raw(question: &Question) -> bool {
    question.checking_disabled && question.dnssec_ok
}

/// Seconds that `answer` to a question for `kind` at `name` may be remembered: as the first of its records to go; if it is
/// negative, as its chain and its SOA (RFC 2308 §5), not at all without a SOA; [`FAILURE`] if it is one.
pub fn lifetime(answer: &Answer, name: &Name, kind: RecordType) -> u32 {
    let there = match kind {
        RecordType::CNAME | RecordType::ANY => !answer.answers.is_empty(),
        _ => answer.records(answer.end_of_chain(name), kind).next().is_some(),
    };
    match answer.code {
        ResponseCode::NoError if there => chain_ttl(answer),
        ResponseCode::NoError | ResponseCode::NXDomain => {
            answer.negative_ttl().map_or(0, seconds).min(chain_ttl(answer))
        }
        _ => FAILURE,
    }
}

/// A TTL as it is meant: one with the uppermost bit set is 0 (RFC 2181 §8).
fn seconds(ttl: u32) -> u32 {
    if ttl > u32::MAX >> 1 { 0 } else { ttl }
}

fn chain_ttl(answer: &Answer) -> u32 {
    let ttls = answer.answers.iter().map(|record| seconds(record.ttl));
    ttls.min().unwrap_or(u32::MAX)
}

/// Whether `name` is one of `names` or below one.
fn covers(names: &[Name], name: &Name) -> bool {
    names.iter().any(|above| above.zone_of(name))
}

/// `answer` without the AAAA records that are `bad`, nor the signatures over a set that is no longer whole; whether an AAAA
/// record is left at the end of the chain, and the smallest TTL of those that went from there.
fn without(mut answer: Answer, name: &Name, bad: impl Fn(&Record) -> bool) -> (bool, Option<u32>, Answer) {
    let end = answer.end_of_chain(name).clone();
    let is_bad = |record: &Record| record.record_type() == RecordType::AAAA && bad(record);
    let there = answer.records(&end, RecordType::AAAA).any(|record| !is_bad(record));
    let gone = answer
        .records(&end, RecordType::AAAA)
        .filter(|record| is_bad(record))
        .map(|record| seconds(record.ttl))
        .min();
    if answer.answers.iter().any(is_bad) {
        answer
            .answers
            .retain(|record| !is_bad(record) && !signs(record, RecordType::AAAA));
    }
    (there, gone, answer)
}

/// The A answer as one to the question for AAAA: there is no A record in it.
fn without_a(answer: Answer) -> Answer {
    replace_a(answer, &Name::root(), Vec::new())
}

/// `answer` with `records` where the first A record at `end` is and without any A record or its signature. What else there
/// is stays as it is, the additional section whole (RFC 6147 §5.3.2, §5.4).
fn replace_a(mut answer: Answer, end: &Name, records: Vec<Record>) -> Answer {
    let mut records = Some(records);
    let mut answers = Vec::new();
    for record in answer.answers {
        if record.record_type() == RecordType::A {
            if record.name == *end {
                answers.extend(records.take().unwrap_or_default());
            }
        } else if !signs(&record, RecordType::A) {
            answers.push(record);
        }
    }
    answer.answers = answers;
    // What is made here is no zone's data.
    answer.authoritative = false;
    answer
}

/// Whether `record` is a signature over a set of `kind`.
fn signs(record: &Record, kind: RecordType) -> bool {
    match &record.data {
        RData::DNSSEC(DNSSECRData::RRSIG(signature)) => signature.input().type_covered == kind,
        _ => false,
    }
}
