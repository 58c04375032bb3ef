//! DNS64: AAAA records made of A records, for those who have IPv6 only (RFC 6147 §5.1).
//!
//! A question for AAAA goes through two types, one per answer that it takes: [`Synthesis`] waits for the AAAA answer,
//! [`WithoutAaaa`] for the A answer. Both may be asked at once (§5.1.8), yet nothing can be said before the AAAA answer is
//! there, since only [`Synthesis::on_aaaa`] leads on. All here is pure; who asks, and how long, is the caller's business.
//!
//! Nothing is validated here, so nothing may carry the AD bit. Synthesis takes place unless the asker sets both CD and DO,
//! which is how somebody who validates by himself asks for what there really is (§5.5); with DO alone he gets what is
//! synthesised, without the signatures that no longer fit it.
//!
//! ```
//! use dns64::{Answer, Question, synthesis::{Outcome, Rules, Step}};
//! use hickory_proto::rr::RecordType;
//!
//! fn aaaa<F>(rules: &Rules, question: &Question, ask: impl Fn(Question) -> Result<Answer, F>) -> Option<Result<Outcome, F>> {
//!     Some(match rules.synthesis(question)?.on_aaaa(ask(question.clone())) {
//!         Step::Done(outcome) => outcome,
//!         Step::AskA(without) => without.on_a(ask(question.with_kind(RecordType::A))),
//!     })
//! }
//! ```

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
    /// Whether a failure of AAAA other than NXDOMAIN counts as an answer without AAAA, as RFC 6147 §5.1.2 and §5.1.3 have it.
    /// Otherwise the failure is the answer: a lost packet then never leads through the translator to whoever has IPv6.
    pub despite_failure: bool,
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
    /// The A answer does not matter. `Err`: there is no answer for AAAA, and [`Rules::despite_failure`] is not set.
    Done(Result<Outcome, F>),
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
    /// The A answer is an error, or the AAAA answer if that is enough, and so is this one (RFC 6147 §5.1.6).
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
            despite_failure: true,
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
                return Step::Done(Ok(Outcome::of(aaaa, &name, Reason::NoName)));
            }
            Ok(aaaa) if aaaa.code == ResponseCode::NoError => {
                let ignored = covers(&rules.ignore_aaaa, &name);
                let (there, gone, aaaa) = without(aaaa, &name, |record| ignored || rules.excludes(record));
                match (there, gone) {
                    (true, None) => return Step::Done(Ok(Outcome::of(aaaa, &name, Reason::Native))),
                    (true, Some(_)) => return Step::Done(Ok(Outcome::of(aaaa, &name, Reason::Filtered))),
                    (false, None) => (
                        Missing::Empty,
                        aaaa.negative_ttl().map_or(WITHOUT_SOA, seconds),
                        Ok(aaaa),
                    ),
                    (false, Some(ttl)) => (Missing::Excluded, ttl.min(WITHOUT_SOA), Ok(aaaa)),
                }
            }
            failed if !rules.despite_failure => {
                let reason = Reason::Error(Missing::Failed);
                return Step::Done(failed.map(|aaaa| Outcome::of(aaaa, &name, reason)));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{answer, lines, name, noerror, question, record};

    const SOA: &str = "example.org 3600 SOA 1200";

    // RFC 6147 §5.1.1, the first thing that is looked at.
    #[test]
    fn aaaa_records_are_the_answer_and_a_is_not_asked() {
        let aaaa = noerror(
            "www.example.org 300 AAAA 2001:db8::1",
            "example.org 60 NS ns.example.org",
        );
        let outcome = without_asking_a(&rules(), "www.example.org AAAA", aaaa.clone());
        assert_eq!(outcome.answer, aaaa);
        assert_eq!((outcome.reason, outcome.ttl), (Reason::Native, 300));
    }

    #[test]
    fn only_aaaa_of_class_in_is_synthesised() {
        for kind in ["A", "ANY", "MX", "PTR", "HTTPS", "SVCB", "TXT", "CNAME", "SOA", "DS"] {
            let asked = question(&format!("www.example.org {kind}"));
            assert!(rules().synthesis(&asked).is_none(), "{kind}");
        }
        for class in [DNSClass::CH, DNSClass::HS, DNSClass::ANY, DNSClass::NONE] {
            let asked = Question {
                class,
                ..question("www.example.org AAAA")
            };
            assert!(rules().synthesis(&asked).is_none(), "{class}");
        }
        assert!(rules().synthesis(&question("www.example.org AAAA")).is_some());
    }

    #[test]
    fn without_a_prefix_nothing_is_synthesised() {
        assert!(Rules::new([]).synthesis(&question("www.example.org AAAA")).is_none());
    }

    #[test]
    fn nxdomain_is_final_with_and_without_a_chain() {
        for answers in ["", "www.example.org 300 CNAME gone.example.org"] {
            let aaaa = answer(ResponseCode::NXDomain, answers, SOA);
            let outcome = without_asking_a(&rules(), "www.example.org AAAA", aaaa.clone());
            assert_eq!(outcome.answer, aaaa);
            assert_eq!(outcome.reason, Reason::NoName);
            assert_eq!(outcome.ttl, if answers.is_empty() { 1200 } else { 300 });
        }
    }

    // RFC 6147 §5.1.2 and §5.1.3.
    #[test]
    fn any_other_failure_of_aaaa_and_a_timeout_ask_a() {
        let mut failures: Vec<Result<Answer, &str>> = vec![Err("timeout")];
        for code in [
            ResponseCode::FormErr,
            ResponseCode::ServFail,
            ResponseCode::NotImp,
            ResponseCode::Refused,
            ResponseCode::YXDomain,
            ResponseCode::NotAuth,
            ResponseCode::Unknown(3841),
        ] {
            // What a failure has for records does not count.
            failures.push(Ok(answer(code, "www.example.org 9 AAAA 2001:db8::1", SOA)));
        }
        for failure in failures {
            let a = noerror("www.example.org 3600 A 192.0.2.1", "");
            let outcome = run(&rules(), failure, Ok(a)).expect("an answer");
            assert_eq!(outcome.answer.code, ResponseCode::NoError);
            assert_eq!(
                lines(&outcome.answer.answers),
                ["www.example.org. 600 AAAA 2001:db8:64::c000:201"]
            );
            assert_eq!(outcome.reason, Reason::Synthesised(Missing::Failed));
            assert_eq!(
                outcome.ttl, 300,
                "a failure is not remembered longer than RFC 9520 allows"
            );
        }
    }

    #[test]
    fn if_aaaa_failed_and_a_does_not_help_the_failure_is_the_answer_and_no_denial() {
        let refused = answer(ResponseCode::Refused, "", "");
        for a in [
            noerror("", SOA),
            noerror("www.example.org 60 A 10.0.0.1", ""),
            noerror("www.example.org 60 CNAME other.example.org", SOA),
        ] {
            let rules = well_known();
            assert_eq!(run(&rules, Err("timeout"), Ok(a.clone())), Err("timeout"));
            let outcome = run(&rules, Ok(refused.clone()), Ok(a)).expect("an answer");
            assert_eq!(outcome.answer, refused);
            assert_eq!(outcome.ttl, FAILURE);
        }
        // That the name does not exist holds for all types.
        let outcome = run(&rules(), Err("timeout"), Ok(answer(ResponseCode::NXDomain, "", SOA))).expect("an answer");
        assert_eq!(
            (outcome.answer.code, outcome.reason),
            (ResponseCode::NXDomain, Reason::NoName)
        );
    }

    #[test]
    fn a_failure_of_aaaa_is_the_answer_if_that_is_chosen() {
        let mut rules = rules();
        rules.despite_failure = false;
        let refused = answer(ResponseCode::Refused, "", "");
        let outcome = without_asking_a(&rules, "www.example.org AAAA", refused.clone());
        assert_eq!((outcome.answer, outcome.ttl), (refused, FAILURE));
        assert_eq!(outcome.reason, Reason::Error(Missing::Failed));
        let a = noerror("www.example.org 60 A 192.0.2.1", "");
        assert_eq!(run(&rules, Err("timeout"), Ok(a.clone())), Err("timeout"));
        let outcome = run(&rules, Ok(noerror("", SOA)), Ok(a)).expect("an answer");
        assert_eq!(outcome.reason, Reason::Synthesised(Missing::Empty));
    }

    // RFC 6147 §5.1.4.
    #[test]
    fn ipv4_mapped_aaaa_records_are_excluded_by_default() {
        let aaaa = noerror("www.example.org 3600 AAAA ::ffff:192.0.2.9", "");
        let a = noerror("www.example.org 3600 A 192.0.2.1", "");
        let outcome = run(&rules(), Ok(aaaa), Ok(a)).expect("an answer");
        assert_eq!(
            lines(&outcome.answer.answers),
            ["www.example.org. 600 AAAA 2001:db8:64::c000:201"]
        );
        assert_eq!(outcome.reason, Reason::Synthesised(Missing::Excluded));
        let near = noerror("www.example.org 3600 AAAA ::fffe:192.0.2.9", "");
        assert_eq!(
            without_asking_a(&rules(), "www.example.org AAAA", near.clone()).answer,
            near
        );
    }

    #[test]
    fn of_a_mixed_set_only_the_good_records_are_answered_and_no_signature_over_the_rest() {
        let aaaa = noerror(
            "www.example.org 300 CNAME host.example.org
             www.example.org 300 RRSIG CNAME
             host.example.org 60 AAAA ::ffff:192.0.2.9
             host.example.org 60 AAAA 2001:db8::1
             host.example.org 60 AAAA ::ffff:192.0.2.10
             host.example.org 60 RRSIG AAAA",
            "",
        );
        let outcome = without_asking_a(&rules(), "www.example.org AAAA", aaaa);
        assert_eq!(
            lines(&outcome.answer.answers),
            [
                "www.example.org. 300 CNAME host.example.org.",
                "www.example.org. 300 RRSIG",
                "host.example.org. 60 AAAA 2001:db8::1"
            ]
        );
        assert_eq!((outcome.reason, outcome.ttl), (Reason::Filtered, 60));
    }

    #[test]
    fn excluded_records_do_not_leak_if_there_is_nothing_else() {
        let aaaa = noerror(
            "www.example.org 300 AAAA ::ffff:192.0.2.9
             www.example.org 300 RRSIG AAAA",
            "example.org 60 NS ns.example.org",
        );
        // Neither A: the A answer has the SOA.
        let outcome = run(&rules(), Ok(aaaa.clone()), Ok(noerror("", SOA))).expect("an answer");
        assert_eq!(outcome.answer, noerror("", SOA));
        assert_eq!(
            (outcome.reason, outcome.ttl),
            (Reason::NoAddress(Missing::Excluded), 300)
        );
        // Nor one that may be mapped: nobody sent a SOA, so that only we know for how long.
        let a = noerror("www.example.org 90 A 10.0.0.1", "");
        let outcome = run(&well_known(), Ok(aaaa), Ok(a)).expect("an answer");
        assert_eq!(outcome.answer, noerror("", "example.org 60 NS ns.example.org"));
        assert_eq!(
            (outcome.reason, outcome.ttl),
            (Reason::NotMapped(Missing::Excluded), 90)
        );
    }

    #[test]
    fn what_replaces_excluded_records_lives_no_longer_than_they_do() {
        let aaaa = noerror("www.example.org 30 AAAA ::ffff:192.0.2.9", "");
        let a = noerror("www.example.org 3600 A 192.0.2.1", "");
        let outcome = run(&rules(), Ok(aaaa), Ok(a)).expect("an answer");
        assert_eq!(
            lines(&outcome.answer.answers),
            ["www.example.org. 30 AAAA 2001:db8:64::c000:201"]
        );
    }

    #[test]
    fn excluded_names_get_what_there_is() {
        let mut rules = rules();
        rules.exclude_names = vec![name("example.org")];
        for (asked, synthesised) in [
            ("example.org AAAA", false),
            ("www.example.org AAAA", false),
            ("notexample.org AAAA", true),
            ("org AAAA", true),
        ] {
            assert_eq!(rules.synthesis(&question(asked)).is_some(), synthesised, "{asked}");
        }
    }

    #[test]
    fn at_names_whose_aaaa_is_ignored_there_is_none() {
        let mut rules = rules();
        rules.ignore_aaaa = vec![name("example.org")];
        let aaaa = noerror("www.example.org 300 AAAA 2001:db8::1", "");
        let a = noerror("www.example.org 3600 A 192.0.2.1", "");
        let outcome = run(&rules, Ok(aaaa.clone()), Ok(a)).expect("an answer");
        assert_eq!(
            lines(&outcome.answer.answers),
            ["www.example.org. 300 AAAA 2001:db8:64::c000:201"]
        );
        let outcome = run(&rules, Ok(aaaa), Ok(noerror("", SOA))).expect("an answer");
        assert_eq!(outcome.answer, noerror("", SOA));
    }

    // RFC 6147 §5.1.5.
    #[test]
    fn a_chain_of_cname_and_dname_is_included_and_synthesis_is_at_its_end() {
        let chain = "www.example.org 300 CNAME www.old.example.net
             old.example.net 300 DNAME new.example.net
             www.old.example.net 300 CNAME www.new.example.net";
        let a = noerror(
            &format!("{chain}\nwww.new.example.net 60 A 192.0.2.1\nwww.new.example.net 60 A 192.0.2.2"),
            "",
        );
        let outcome = run(&rules(), Ok(noerror(chain, SOA)), Ok(a)).expect("an answer");
        assert_eq!(
            lines(&outcome.answer.answers),
            [
                "www.example.org. 300 CNAME www.old.example.net.",
                "old.example.net. 300 DNAME",
                "www.old.example.net. 300 CNAME www.new.example.net.",
                "www.new.example.net. 60 AAAA 2001:db8:64::c000:201",
                "www.new.example.net. 60 AAAA 2001:db8:64::c000:202"
            ]
        );
        assert_eq!(outcome.ttl, 60);
    }

    #[test]
    fn an_aaaa_at_the_end_of_a_chain_is_native_however_its_records_are_ordered_and_written() {
        let aaaa = noerror(
            "HOST.example.org 60 AAAA 2001:db8::1
             alias.Example.org 300 CNAME host.example.org
             www.example.org 30 CNAME Alias.example.org",
            "",
        );
        let outcome = without_asking_a(&rules(), "www.example.org AAAA", aaaa.clone());
        assert_eq!((outcome.answer, outcome.ttl), (aaaa, 30));
    }

    #[test]
    fn if_the_a_answer_has_another_chain_that_one_is_answered() {
        let aaaa = noerror("www.example.org 5 CNAME a.example.net", SOA);
        let a = noerror(
            "www.example.org 5 CNAME b.example.net\nb.example.net 60 A 192.0.2.1",
            "",
        );
        let outcome = run(&rules(), Ok(aaaa), Ok(a)).expect("an answer");
        assert_eq!(
            lines(&outcome.answer.answers),
            [
                "www.example.org. 5 CNAME b.example.net.",
                "b.example.net. 60 AAAA 2001:db8:64::c000:201"
            ]
        );
        assert_eq!(outcome.ttl, 5, "as long as the first to go");
    }

    #[test]
    fn an_a_chain_that_ends_in_nxdomain_is_the_answer_with_its_chain() {
        let a = answer(
            ResponseCode::NXDomain,
            "www.example.org 300 CNAME gone.example.org",
            SOA,
        );
        let outcome = run(&rules(), Ok(noerror("", SOA)), Ok(a.clone())).expect("an answer");
        assert_eq!((outcome.answer, outcome.reason, outcome.ttl), (a, Reason::NoName, 300));
    }

    #[test]
    fn chains_in_a_circle_and_longer_than_any_end_without_synthesis() {
        let circle = "www.example.org 300 CNAME b.example.org\nb.example.org 300 CNAME www.example.org";
        let outcome = run(&rules(), Ok(noerror(circle, "")), Ok(noerror(circle, ""))).expect("an answer");
        assert_eq!((outcome.answer, outcome.ttl), (noerror(circle, ""), 0));

        let long: Vec<String> = (0..40)
            .map(|i| format!("{i}.example.org 300 CNAME {}.example.org", i + 1))
            .collect();
        let long = long.join("\n").replacen("0.example.org", "www.example.org", 1);
        let (aaaa, a) = (
            noerror(&format!("{long}\n40.example.org 300 AAAA 2001:db8::1"), ""),
            noerror(&format!("{long}\n40.example.org 300 A 192.0.2.1"), ""),
        );
        let outcome = run(&rules(), Ok(aaaa.clone()), Ok(a)).expect("an answer");
        assert_eq!(outcome.answer, aaaa, "nothing better than what there is");
    }

    // RFC 6147 §5.1.6.
    #[test]
    fn an_error_of_a_is_the_answer() {
        for code in [ResponseCode::ServFail, ResponseCode::Refused, ResponseCode::NXDomain] {
            let a = answer(code, "www.example.org 9 A 192.0.2.1", "");
            let outcome = run(&rules(), Ok(noerror("", SOA)), Ok(a)).expect("an answer");
            assert_eq!(outcome.answer, Answer::empty(code));
        }
        assert_eq!(run(&rules(), Ok(noerror("", SOA)), Err("timeout")), Err("timeout"));
    }

    #[test]
    fn without_a_the_aaaa_answer_is_the_answer_for_as_long_as_both_are_missing() {
        let aaaa = noerror("www.example.org 1000 CNAME host.example.org", SOA);
        for (a, ttl) in [
            (noerror("", "example.org 3600 SOA 1200"), 1000),
            (noerror("", "example.org 40 SOA 1200"), 40),
            (noerror("", ""), 1000),
        ] {
            let outcome = run(&rules(), Ok(aaaa.clone()), Ok(a)).expect("an answer");
            assert_eq!((outcome.answer, outcome.ttl), (aaaa.clone(), ttl));
            assert_eq!(outcome.reason, Reason::NoAddress(Missing::Empty));
        }
    }

    #[test]
    fn a_denial_without_a_soa_is_not_remembered() {
        let outcome = run(&rules(), Ok(noerror("", "")), Ok(noerror("", ""))).expect("an answer");
        assert_eq!((outcome.answer, outcome.ttl), (noerror("", ""), 0));
    }

    // RFC 6147 §5.1.7; the four cases of BIND's suite, then more.
    #[test]
    fn ttl_is_the_smaller_of_a_and_the_negative_ttl_or_600_seconds_without_a_soa() {
        for (soa, a, ttl) in [
            ("", 500, 500),
            ("", 700, 600),
            (SOA, 1100, 1100),
            (SOA, 1300, 1200),
            ("example.org 70 SOA 86400", 5000, 70),
            ("example.org 0 SOA 86400", 5000, 0),
            (SOA, 0, 0),
            // RFC 2181 §8.
            (SOA, 0x8000_0000_u32, 0),
            (SOA, 0x7fff_ffff, 1200),
            ("example.org 4294967295 SOA 4294967295", 5000, 0),
        ] {
            let a = noerror(&format!("www.example.org {a} A 192.0.2.1"), "");
            let outcome = run(&rules(), Ok(noerror("", soa)), Ok(a)).expect("an answer");
            assert_eq!(
                lines(&outcome.answer.answers),
                [format!("www.example.org. {ttl} AAAA 2001:db8:64::c000:201")]
            );
            assert_eq!(outcome.ttl, ttl);
        }
    }

    #[test]
    fn a_synthesised_set_has_one_ttl_and_lives_no_longer_than_its_chain() {
        let a = noerror(
            "www.example.org 20 CNAME host.example.org
             host.example.org 60 A 192.0.2.1
             host.example.org 50 A 192.0.2.2",
            "",
        );
        let outcome = run(&rules(), Ok(noerror("", SOA)), Ok(a)).expect("an answer");
        assert_eq!(
            lines(&outcome.answer.answers),
            [
                "www.example.org. 20 CNAME host.example.org.",
                "host.example.org. 50 AAAA 2001:db8:64::c000:201",
                "host.example.org. 50 AAAA 2001:db8:64::c000:202"
            ]
        );
        assert_eq!(outcome.ttl, 20);
    }

    // RFC 6147 §5.2.
    #[test]
    fn several_prefixes_give_one_record_each_those_of_the_first_prefix_first() {
        let rules = rules_of(&[
            "2001:db8::/32",
            "2001:db8:100::/40",
            "2001:db8:122::/48",
            "2001:db8:122:300::/56",
            "2001:db8:122:344::/64",
            "2001:db8:122:344::/96",
        ]);
        let a = noerror("www.example.org 60 A 192.0.2.33\nwww.example.org 60 A 198.51.100.1", "");
        let outcome = run(&rules, Ok(noerror("", SOA)), Ok(a)).expect("an answer");
        let addresses: Vec<String> = outcome
            .answer
            .answers
            .iter()
            .map(|record| record.data.to_string())
            .collect();
        assert_eq!(
            addresses,
            [
                "2001:db8:c000:221::",
                "2001:db8:c633:6401::",
                "2001:db8:1c0:2:21::",
                "2001:db8:1c6:3364:1::",
                "2001:db8:122:c000:2:2100::",
                "2001:db8:122:c633:64:100::",
                "2001:db8:122:3c0:0:221::",
                "2001:db8:122:3c6:33:6401::",
                "2001:db8:122:344:c0:2:2100:0",
                "2001:db8:122:344:c6:3364:100:0",
                "2001:db8:122:344::c000:221",
                "2001:db8:122:344::c633:6401"
            ]
        );
    }

    #[test]
    fn under_the_well_known_prefix_only_global_addresses_are_synthesised() {
        let rules = rules_of(&["64:ff9b::/96", "2001:db8:64::/96"]);
        let a = noerror("www.example.org 60 A 10.0.0.1\nwww.example.org 60 A 8.8.8.8", "");
        let outcome = run(&rules, Ok(noerror("", SOA)), Ok(a)).expect("an answer");
        assert_eq!(
            lines(&outcome.answer.answers),
            [
                "www.example.org. 60 AAAA 64:ff9b::808:808",
                "www.example.org. 60 AAAA 2001:db8:64::a00:1",
                "www.example.org. 60 AAAA 2001:db8:64::808:808"
            ]
        );
    }

    #[test]
    fn if_no_address_may_be_mapped_there_is_no_data_with_the_soa_of_the_aaaa_answer() {
        let aaaa = noerror("", SOA);
        let a = noerror("www.example.org 60 A 10.0.0.1\nwww.example.org 60 A 127.0.0.1", "");
        let outcome = run(&well_known(), Ok(aaaa.clone()), Ok(a)).expect("an answer");
        assert_eq!((outcome.answer, outcome.ttl), (aaaa, 60));
        assert_eq!(outcome.reason, Reason::NotMapped(Missing::Empty));
    }

    #[test]
    fn a_mapping_has_what_only_names_and_except_does_not() {
        let mut rules = rules_of(&["2001:db8:1::/96", "2001:db8:2::/96"]);
        rules.mappings[0].only = vec!["192.0.2.0/24".parse().expect("a network")];
        rules.mappings[0].except = vec!["192.0.2.128/25".parse().expect("a network")];
        rules.mappings[1].except = vec!["192.0.2.0/25".parse().expect("a network")];
        let a = noerror(
            "www.example.org 60 A 192.0.2.1
             www.example.org 60 A 192.0.2.129
             www.example.org 60 A 198.51.100.1",
            "",
        );
        let outcome = run(&rules, Ok(noerror("", SOA)), Ok(a)).expect("an answer");
        let addresses: Vec<String> = outcome
            .answer
            .answers
            .iter()
            .map(|record| record.data.to_string())
            .collect();
        assert_eq!(
            addresses,
            ["2001:db8:1::c000:201", "2001:db8:2::c000:281", "2001:db8:2::c633:6401"]
        );
    }

    #[test]
    fn an_answer_never_grows_beyond_a_thousand_records_and_each_prefix_has_its_share() {
        let many: Vec<String> = (0..3000_u32)
            .map(|i| format!("www.example.org 60 A 198.51.{}.{}", i >> 8, i & 255))
            .collect();
        let rules = rules_of(&["2001:db8:1::/96", "2001:db8:2::/96"]);
        let outcome = run(&rules, Ok(noerror("", SOA)), Ok(noerror(&many.join("\n"), ""))).expect("an answer");
        let of = |prefix: &str| {
            let all = lines(&outcome.answer.answers);
            all.iter().filter(|line| line.contains(prefix)).count()
        };
        assert_eq!((of("2001:db8:1::"), of("2001:db8:2::")), (512, 512));
    }

    // RFC 6147 §5.3.2, §5.3.3, §5.4.
    #[test]
    fn authorities_and_additionals_are_those_of_the_a_answer_and_untouched() {
        let mut a = noerror("www.example.org 60 A 192.0.2.1", "example.org 60 NS ns.example.org");
        a.additionals = vec![
            record("ns.example.org 60 A 192.0.2.53"),
            record("ns.example.org 60 AAAA ::ffff:192.0.2.53"),
        ];
        a.authoritative = true;
        let outcome = run(&rules(), Ok(noerror("", SOA)), Ok(a.clone())).expect("an answer");
        assert_eq!(outcome.answer.authorities, a.authorities);
        assert_eq!(outcome.answer.additionals, a.additionals);
        assert!(!outcome.answer.authoritative, "it is no zone's data");

        let mut aaaa = noerror("www.example.org 60 AAAA 2001:db8::1", "");
        aaaa.additionals = a.additionals;
        assert_eq!(
            without_asking_a(&rules(), "www.example.org AAAA", aaaa.clone()).answer,
            aaaa
        );
    }

    #[test]
    fn a_records_and_their_signatures_go_and_other_signatures_stay() {
        let a = noerror(
            "www.example.org 300 CNAME host.example.org
             www.example.org 300 RRSIG CNAME
             host.example.org 60 A 192.0.2.1
             host.example.org 60 RRSIG A
             other.example.org 60 A 192.0.2.7",
            "",
        );
        let outcome = run(&rules(), Ok(noerror("", SOA)), Ok(a)).expect("an answer");
        assert_eq!(
            lines(&outcome.answer.answers),
            [
                "www.example.org. 300 CNAME host.example.org.",
                "www.example.org. 300 RRSIG",
                "host.example.org. 60 AAAA 2001:db8:64::c000:201"
            ]
        );
    }

    // RFC 6147 §5.5.
    #[test]
    fn whoever_sets_both_cd_and_do_gets_what_there_is() {
        for (dnssec_ok, checking_disabled, synthesised) in [
            (false, false, true),
            (true, false, true),
            (false, true, true),
            (true, true, false),
        ] {
            let asked = Question {
                dnssec_ok,
                checking_disabled,
                ..question("www.example.org AAAA")
            };
            assert_eq!(
                rules().synthesis(&asked).is_some(),
                synthesised,
                "DO {dnssec_ok} CD {checking_disabled}"
            );
        }
    }

    // RFC 6147 §5.1.8: that A may arrive first is the caller's business; it cannot be used before AAAA.
    #[test]
    fn an_a_answer_that_is_there_already_does_not_hide_a_late_aaaa() {
        let a = noerror("www.example.org 60 A 192.0.2.1", "");
        let aaaa = noerror("www.example.org 60 AAAA 2001:db8::1", "");
        let outcome = run(&rules(), Ok(aaaa.clone()), Ok(a)).expect("an answer");
        assert_eq!(outcome.answer, aaaa);
    }

    #[test]
    fn the_cases_of_binds_suite() {
        let mut rules = rules_of(&["2001:aaaa::/96"]);
        rules.mappings[0].except = vec!["10.0.0.0/8".parse().expect("a network")];
        rules.exclude_aaaa.push("2001:eeee::/32".parse().expect("a network"));
        let mapped = "2001:aaaa::102:304";
        for (case, aaaa, a, expected) in [
            ("excluded-good-a", "2001:eeee::1", "1.2.3.4", mapped),
            ("excluded-bad-a", "2001:eeee::2", "10.0.0.1", ""),
            ("excluded-only", "2001:eeee::3", "", ""),
            (
                "partially-excluded-good-a",
                "2001:eeee::1 2001::1",
                "1.2.3.4",
                "2001::1",
            ),
            (
                "partially-excluded-bad-a",
                "2001:eeee::2 2001::2",
                "10.0.0.1",
                "2001::2",
            ),
            ("partially-excluded-only", "2001:eeee::3 2001::3", "", "2001::3"),
            ("a-only", "", "1.2.3.4", mapped),
            ("a-and-aaaa", "2001::1", "1.2.3.6", "2001::1"),
            ("aaaa-only", "2001::2", "", "2001::2"),
            ("a-not-mapped", "", "10.0.0.2", ""),
            ("mx-only", "", "", ""),
            ("a-and-mapped", "::ffff:1.2.3.4", "1.2.3.4", mapped),
            (
                "a-and-aaaa-and-mapped",
                "2001:eeee::4 ::ffff:1.2.3.4 2001::4",
                "1.2.3.4",
                "2001::4",
            ),
        ] {
            for (chain, owner) in [
                ("", "www.example.org"),
                ("www.example.org 60 CNAME host.example.org\n", "host.example.org"),
            ] {
                let sections = |kind: &str, data: &str| {
                    let records: Vec<String> = data
                        .split(' ')
                        .filter(|data| !data.is_empty())
                        .map(|data| format!("{owner} 60 {kind} {data}"))
                        .collect();
                    noerror(
                        &format!("{chain}{}", records.join("\n")),
                        if records.is_empty() { SOA } else { "" },
                    )
                };
                let outcome = run(&rules, Ok(sections("AAAA", aaaa)), Ok(sections("A", a))).expect("an answer");
                assert_eq!(outcome.answer.code, ResponseCode::NoError, "{case}");
                let owner = name(owner);
                let found = outcome.answer.records(&owner, RecordType::AAAA);
                let found: Vec<String> = found.map(|record| record.data.to_string()).collect();
                assert_eq!(found.join(" "), expected, "{case}");
                let aliases = outcome.answer.answers.len() - found.len();
                assert_eq!(
                    aliases,
                    usize::from(!chain.is_empty()),
                    "{case}: the chain and nothing else"
                );
            }
        }
    }

    #[test]
    fn the_cases_of_corednss_suite() {
        let rules = well_known();
        let a = "www.example.org 60 A 8.8.8.42\nwww.example.org 5000 A 8.8.8.43";
        for (case, aaaa, expected) in [
            (
                "standard flow",
                noerror("", "example.org 70 SOA 86400"),
                [
                    "www.example.org. 60 AAAA 64:ff9b::808:82a",
                    "www.example.org. 60 AAAA 64:ff9b::808:82b",
                ],
            ),
            (
                "non-nxdomain error",
                answer(ResponseCode::Refused, "", ""),
                [
                    "www.example.org. 60 AAAA 64:ff9b::808:82a",
                    "www.example.org. 60 AAAA 64:ff9b::808:82b",
                ],
            ),
            (
                "AAAA record",
                noerror("www.example.org 60 AAAA ::1\nwww.example.org 5000 AAAA ::2", ""),
                ["www.example.org. 60 AAAA ::1", "www.example.org. 5000 AAAA ::2"],
            ),
        ] {
            let outcome = run(&rules, Ok(aaaa), Ok(noerror(a, ""))).expect("an answer");
            assert_eq!(lines(&outcome.answer.answers), expected, "{case}");
        }
        let empty = noerror("", SOA);
        let outcome = run(&rules, Ok(empty.clone()), Ok(empty.clone())).expect("an answer");
        assert_eq!(outcome.answer, empty, "a empty");
        let gone = answer(ResponseCode::NXDomain, "", SOA);
        assert_eq!(
            without_asking_a(&rules, "www.example.org AAAA", gone.clone()).answer,
            gone,
            "nxdomain"
        );
    }

    #[test]
    fn whatever_is_answered_the_rules_hold() {
        let mut random = Random(0x6147);
        let mut rules = rules_of(&["64:ff9b::/96", "2001:db8:64::/96", "2001:db8::/32"]);
        rules.mappings[1].except = vec!["0.0.0.0/1".parse().expect("a network")];
        rules.mappings[2].only = vec!["192.0.2.0/24".parse().expect("a network")];
        let mut seen = [0_u32; 7];
        for round in 0..30_000 {
            let (aaaa, a) = (random.answer("AAAA"), random.answer("A"));
            let asked = question("n0.example.org AAAA");
            let aaaa_result = if random.below(10) == 0 {
                Err("timeout")
            } else {
                Ok(aaaa.clone())
            };
            let a_result = if random.below(10) == 0 {
                Err("timeout")
            } else {
                Ok(a.clone())
            };
            let good: Vec<&Record> = aaaa
                .records(aaaa.end_of_chain(&asked.name), RecordType::AAAA)
                .filter(|record| !rules.excludes(record))
                .collect();
            let native = aaaa_result.is_ok() && aaaa.code == ResponseCode::NoError && !good.is_empty();
            let no_name = aaaa_result.is_ok() && aaaa.code == ResponseCode::NXDomain;
            let context = || format!("round {round}: {aaaa:?} {a:?}");
            let synthesis = rules.synthesis(&asked).expect("a question that it is for");
            let outcome = match synthesis.on_aaaa(aaaa_result) {
                Step::Done(outcome) => {
                    assert!(native || no_name, "{}", context());
                    outcome.expect("an answer")
                }
                Step::AskA(without) => {
                    assert!(!native && !no_name, "{}", context());
                    match without.on_a(a_result) {
                        Ok(outcome) => outcome,
                        Err(_) => continue,
                    }
                }
            };
            let answers = &outcome.answer.answers;
            if native {
                let kept: Vec<&Record> = answers.iter().filter(|record| good.contains(record)).collect();
                assert_eq!(kept, good, "{}", context());
            }
            if outcome.answer.code == ResponseCode::NoError {
                assert!(!answers.iter().any(|record| rules.excludes(record)), "{}", context());
            }
            if !answers.is_empty() && outcome.answer.code == ResponseCode::NoError {
                assert!(outcome.ttl <= chain_ttl(&outcome.answer), "{}", context());
            }
            let (index, synthesised) = match outcome.reason {
                Reason::Native => (0, false),
                Reason::Filtered => (1, false),
                Reason::NoName => (2, false),
                Reason::Synthesised(_) => (3, true),
                Reason::NoAddress(_) => (4, false),
                Reason::NotMapped(_) => (5, false),
                Reason::Error(_) => (6, false),
            };
            seen[index] += 1;
            if !synthesised {
                continue;
            }
            let end = a.end_of_chain(&asked.name);
            let v4: Vec<(Ipv4Addr, u32)> = a
                .records(end, RecordType::A)
                .filter_map(|record| match record.data {
                    RData::A(v4) => Some((v4.0, record.ttl)),
                    _ => None,
                })
                .collect();
            let known = match outcome.reason {
                Reason::Synthesised(Missing::Empty) => aaaa.negative_ttl().unwrap_or(600),
                _ => 600,
            };
            let wanted: usize = rules
                .mappings
                .iter()
                .map(|mapping| v4.iter().filter(|(v4, _)| mapping.has(*v4)).count())
                .sum();
            let made: Vec<&Record> = outcome
                .answer
                .records(end, RecordType::AAAA)
                .filter(|made| !a.answers.contains(made))
                .collect();
            assert_eq!(made.len(), wanted, "{}", context());
            for made in made {
                let RData::AAAA(AAAA(v6)) = made.data else {
                    panic!("{}", context());
                };
                let stands_for = |mapping: &Mapping| mapping.prefix.extract(v6);
                assert!(
                    rules
                        .mappings
                        .iter()
                        .filter_map(stands_for)
                        .any(|one| v4.iter().any(|(v4, _)| *v4 == one)),
                    "{}",
                    context()
                );
                assert!(v4.iter().all(|(_, ttl)| made.ttl <= *ttl), "{}", context());
                assert!(made.ttl <= known, "{}", context());
            }
            assert!(
                answers.iter().all(|record| record.record_type() != RecordType::A),
                "{}",
                context()
            );
            assert_eq!(outcome.answer.additionals, a.additionals, "{}", context());
        }
        assert!(seen.iter().all(|count| *count > 100), "each way was taken: {seen:?}");
    }

    /// Answers about five names that refer to each other at random: xorshift64.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % bound
        }

        fn answer(&mut self, kind: &str) -> Answer {
            let codes = [
                ResponseCode::NoError,
                ResponseCode::NXDomain,
                ResponseCode::ServFail,
                ResponseCode::Refused,
            ];
            let code = match self.below(12) {
                code @ 0..=3 => codes[usize::try_from(code).expect("small")],
                _ => ResponseCode::NoError,
            };
            let addresses: &[&str] = match kind {
                "A" => &["8.8.8.8", "10.0.0.1", "192.0.2.1", "198.51.100.7", "127.0.0.1"],
                _ => &["2001:db8:1::1", "::ffff:192.0.2.1", "::ffff:8.8.8.8", "2a00::1"],
            };
            let mut answer = Answer::empty(code);
            for _ in 0..self.below(6) {
                let owner = [0, 0, 1, 2, 3][usize::try_from(self.below(5)).expect("small")];
                let ttl = [0, 5, 300, 700, 5000][usize::try_from(self.below(5)).expect("small")];
                let (kind, data) = match self.below(8) {
                    0..=2 => ("CNAME", format!("n{}.example.org", self.below(4))),
                    3 => ("RRSIG", kind.to_owned()),
                    4 => ("MX", "mail.example.org".to_owned()),
                    other => {
                        let count = u64::try_from(addresses.len()).expect("small");
                        let address = addresses[usize::try_from(self.below(count)).expect("small")];
                        // Now and then the other type strays in.
                        match (other, self.below(9)) {
                            (7, 0) if kind == "AAAA" => ("A", "8.8.4.4".to_owned()),
                            _ => (kind, address.to_owned()),
                        }
                    }
                };
                answer
                    .answers
                    .push(record(&format!("n{owner}.example.org {ttl} {kind} {data}")));
            }
            if self.below(2) == 0 {
                answer
                    .authorities
                    .push(record(&format!("example.org {} SOA 1200", self.below(4000))));
            }
            if self.below(3) == 0 {
                answer.additionals.push(record("ns.example.org 60 A 192.0.2.53"));
            }
            answer
        }
    }

    fn rules_of(prefixes: &[&str]) -> Rules {
        Rules::new(prefixes.iter().map(|prefix| prefix.parse().expect("a prefix")))
    }

    /// A network's own prefix, under which all addresses may appear.
    fn rules() -> Rules {
        rules_of(&["2001:db8:64::/96"])
    }

    fn well_known() -> Rules {
        Rules::new([Pref64::WELL_KNOWN])
    }

    /// What `www.example.org AAAA` comes to.
    fn run(
        rules: &Rules,
        aaaa: Result<Answer, &'static str>,
        a: Result<Answer, &'static str>,
    ) -> Result<Outcome, &'static str> {
        let asked = question("www.example.org AAAA");
        match rules
            .synthesis(&asked)
            .expect("a question that it is for")
            .on_aaaa(aaaa)
        {
            Step::Done(outcome) => outcome,
            Step::AskA(without) => without.on_a(a),
        }
    }

    fn without_asking_a(rules: &Rules, asked: &str, aaaa: Answer) -> Outcome {
        match rules
            .synthesis(&question(asked))
            .expect("a question that it is for")
            .on_aaaa(Ok::<_, ()>(aaaa))
        {
            Step::Done(outcome) => outcome.expect("an answer"),
            Step::AskA(without) => panic!("asks for A: {without:?}"),
        }
    }
}
