//! The way from a question that is not known to its answer.
//!
//! ```text
//! special names -> zones -> hosts -> reverse of a prefix -> locally served zones -> upstream
//!                  \---- AAAA: both it and A, and RFC 6147 makes one answer of them ----/
//! ```

use std::{
    collections::BTreeMap,
    net::IpAddr,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use hickory_proto::{
    op::ResponseCode,
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA, PTR},
    },
};

use super::upstream::Forwarder;
use crate::{
    Answer, Question,
    answer::code_name,
    chain::{Chain, Link},
    query,
    reverse::{self, Form, Reverse},
    special::{self, Local},
    synthesis::{self, Missing, Reason, Rules, Step},
    upstream::Failure,
    zone::Updates,
};

/// Seconds that an address of the configuration lives.
const HOSTS_TTL: u32 = 300;

/// Everything that answers come from. A reload makes another one.
pub(super) struct Resolver {
    pub(super) rules: Rules,
    pub(super) form: Form,
    pub(super) hosts: Hosts,
    pub(super) local: Local,
    /// By domain, the deepest first.
    pub(super) forwards: Vec<(Name, Forwarder)>,
    pub(super) upstreams: Option<Forwarder>,
    pub(super) updates: Arc<Mutex<Updates>>,
}

/// Addresses of single names, and names of these addresses.
#[derive(Default)]
pub(super) struct Hosts {
    addresses: BTreeMap<Name, Vec<IpAddr>>,
    names: BTreeMap<IpAddr, Name>,
}

/// An answer and what is known about it.
#[derive(Clone, Debug)]
pub(super) struct Resolution {
    pub(super) answer: Answer,
    /// Seconds that it may be kept; 0 = not at all.
    pub(super) ttl: u32,
    /// There may be a better one: AAAA failed, and A stands in.
    pub(super) stopgap: bool,
    /// Where it comes from, as in metrics.
    pub(super) source: &'static str,
}

/// What was done on the way, if somebody wants to know.
#[derive(Default)]
pub(super) struct Trace(Option<(Instant, Mutex<Steps>)>);

/// What was done, and how long after the beginning.
type Steps = Vec<(Duration, String)>;

impl Trace {
    /// One that keeps what it is told.
    pub(super) fn kept() -> Self {
        Self(Some((Instant::now(), Mutex::default())))
    }

    fn say(&self, what: impl FnOnce() -> String) {
        if let Some((began, steps)) = &self.0 {
            lock(steps).push((began.elapsed(), what()));
        }
    }

    /// What was told, with the time since the beginning.
    pub(super) fn steps(&self) -> Steps {
        self.0
            .as_ref()
            .map(|(_, steps)| lock(steps).clone())
            .unwrap_or_default()
    }
}

impl Resolver {
    /// The answer to `question`.
    ///
    /// # Errors
    ///
    /// No upstream gave one.
    pub(super) async fn resolve(&self, question: &Question, trace: &Trace) -> Result<Resolution, Failure> {
        let Question { name, kind, class, .. } = question;
        if *class != DNSClass::IN {
            return Ok(refused("class", trace, || format!("class {class} is not served")));
        }
        if matches!(*kind, RecordType::AXFR | RecordType::IXFR) {
            return Ok(refused("transfer", trace, || "zones are not transferred".into()));
        }
        if let Some(answer) = special::answer(&self.rules, question) {
            trace.say(|| format!("{name} is a special name, answered here: {}", told(&answer)));
            return Ok(plain(answer, question, "special"));
        }
        if *kind == RecordType::ANY && !self.is_own(name) {
            trace.say(|| "ANY gets one record that says so (RFC 8482)".into());
            return Ok(plain(query::minimal_any(name), question, "any"));
        }
        if !self.is_own(name)
            && let Some(found) = reverse::answer(&self.rules, self.form, question)
        {
            return self.reversed(found, question, trace).await;
        }
        if let Some(synthesis) = self.rules.synthesis(question) {
            return self.synthesised(synthesis, question, trace).await;
        }
        if *kind == RecordType::AAAA {
            trace.say(|| "nothing is synthesised for this question: excluded, or DNSSEC is checked by who asks".into());
        }
        let (answer, source) = self.follow(question, trace).await?;
        Ok(plain(answer, question, source))
    }

    async fn reversed(&self, found: Reverse, question: &Question, trace: &Trace) -> Result<Resolution, Failure> {
        match found {
            Reverse::Done(answer) => {
                trace.say(|| format!("{} lies under a NAT64 prefix: {}", question.name, told(&answer)));
                Ok(plain(answer, question, "reverse"))
            }
            Reverse::Ask(lookup) => {
                trace.say(|| {
                    let asked = &lookup.question().name;
                    format!(
                        "{} stands for an IPv4 address; its name is that of {asked}",
                        question.name
                    )
                });
                let (answer, _) = self.follow(lookup.question(), trace).await?;
                let (answer, ttl) = lookup.on_ptr(answer);
                Ok(Resolution {
                    answer,
                    ttl,
                    stopgap: false,
                    source: "reverse",
                })
            }
        }
    }

    /// Asks for AAAA and A at the same time; the answer is never given before AAAA is known (RFC 6147 §5.1.8).
    async fn synthesised(
        &self,
        synthesis: synthesis::Synthesis<'_>,
        question: &Question,
        trace: &Trace,
    ) -> Result<Resolution, Failure> {
        let in_four = question.with_kind(RecordType::A);
        let mut six = pin!(self.follow(question, trace));
        let mut four = pin!(self.follow(&in_four, trace));
        let mut early = None;
        let six = loop {
            tokio::select! {
                biased;
                six = six.as_mut() => break six,
                four = four.as_mut(), if early.is_none() => early = Some(four),
            }
        };
        if let Err(Failure::Busy) = six {
            // Our own shortage is no failure of theirs, and would turn names that have IPv6 to NAT64.
            return Err(Failure::Busy);
        }
        let source = six.as_ref().map_or("upstream", |(_, source)| source);
        let outcome = match synthesis.on_aaaa(six.map(|(answer, _)| answer)) {
            Step::Done(outcome) => outcome,
            Step::AskA(waiting) => {
                let four = match early {
                    Some(four) => four,
                    None => four.await,
                };
                waiting.on_a(four.map(|(answer, _)| answer))
            }
        }?;
        trace.say(|| explained(outcome.reason).into());
        let made = matches!(outcome.reason, Reason::Synthesised(_));
        Ok(Resolution {
            answer: outcome.answer,
            ttl: outcome.ttl,
            stopgap: outcome.reason == Reason::Synthesised(Missing::Failed),
            source: if made { "synthesised" } else { source },
        })
    }

    /// The answer without synthesis, along a chain of aliases to its end.
    async fn follow(&self, question: &Question, trace: &Trace) -> Result<(Answer, &'static str), Failure> {
        let mut chain = Chain::new(question.clone());
        let (mut answer, source) = self.look_up(question, trace).await?;
        loop {
            match chain.on(answer) {
                Link::End(answer) => return Ok((answer, source)),
                Link::Ask(next, rest) => {
                    trace.say(|| format!("the alias leads to {}", next.name));
                    chain = rest;
                    let (mut part, from) = self.look_up(&next, trace).await?;
                    if from == "zone" && source != "zone" {
                        // The zone may change at any moment, and nobody would think of this answer then.
                        never_kept(&mut part);
                    }
                    answer = part;
                }
            }
        }
    }

    /// What the first that knows `question` says.
    async fn look_up(&self, question: &Question, trace: &Trace) -> Result<(Answer, &'static str), Failure> {
        let Question { name, kind, .. } = question;
        let found = self
            .zoned(question)
            .map(|answer| (answer, "zone"))
            .or_else(|| self.hosts.answer(question).map(|answer| (answer, "hosts")))
            .or_else(|| special::answer(&self.rules, question).map(|answer| (answer, "special")))
            .or_else(|| self.local.answer(question).map(|answer| (answer, "local")));
        if let Some((answer, source)) = found {
            trace.say(|| format!("{name} {kind} from {source}: {}", told(&answer)));
            return Ok((answer, source));
        }
        let (domain, forwarder) = match self.forwards.iter().find(|(domain, _)| domain.zone_of(name)) {
            Some((domain, forwarder)) => (Some(domain), Some(forwarder)),
            None => (None, self.upstreams.as_ref()),
        };
        let Some(forwarder) = forwarder else {
            trace.say(|| format!("{name} {kind}: there are no upstreams"));
            return Err(Failure::Down);
        };
        trace.say(|| match domain {
            Some(domain) => format!("asking for {name} {kind}: the servers of {domain}"),
            None => format!("asking for {name} {kind}: upstreams"),
        });
        let result = forwarder.ask(question).await;
        trace.say(|| match &result {
            Ok(answer) => format!("{name} {kind}: {}", told(answer)),
            Err(failure) => format!("{name} {kind}: {failure}"),
        });
        result.map(|answer| (answer, "upstream"))
    }

    /// Whom it asks.
    pub(super) fn groups(&self) -> impl Iterator<Item = &Forwarder> {
        self.upstreams
            .iter()
            .chain(self.forwards.iter().map(|(_, group)| group))
    }

    /// Whether the answer is known here, without asking anybody.
    pub(super) fn knows(&self, question: &Question) -> bool {
        let Question { name, .. } = question;
        self.is_own(name)
            || special::answer(&self.rules, question).is_some()
            || self.local.answer(question).is_some()
            || matches!(
                reverse::answer(&self.rules, self.form, question),
                Some(Reverse::Done(_))
            )
    }

    fn zoned(&self, question: &Question) -> Option<Answer> {
        let updates = lock(&self.updates);
        updates
            .zones()
            .iter()
            .find_map(|zone| zone.answer(&question.name, question.kind))
    }

    /// Whether a zone or the configuration has the last word on `name`.
    fn is_own(&self, name: &Name) -> bool {
        lock(&self.updates).zones().iter().any(|zone| zone.contains(name)) || self.hosts.knows(name)
    }
}

impl Hosts {
    pub(super) fn new(addresses: impl IntoIterator<Item = (Name, Vec<IpAddr>)>) -> Self {
        let addresses: BTreeMap<Name, Vec<IpAddr>> = addresses.into_iter().collect();
        let mut names = BTreeMap::new();
        for (name, addresses) in &addresses {
            for address in addresses {
                names.entry(*address).or_insert_with(|| name.clone());
            }
        }
        Self { addresses, names }
    }

    fn knows(&self, name: &Name) -> bool {
        self.addresses.contains_key(name) || self.name_of(name).is_some()
    }

    fn name_of(&self, name: &Name) -> Option<&Name> {
        let net = name.parse_arpa_name().ok()?;
        self.names
            .get(&net.addr())
            .filter(|_| net.prefix_len() == net.max_prefix_len())
    }

    fn answer(&self, question: &Question) -> Option<Answer> {
        let name = &question.name;
        let mut data = Vec::new();
        match (self.addresses.get(name), self.name_of(name)) {
            (Some(addresses), _) => {
                data.extend(addresses.iter().filter_map(|address| match (address, question.kind) {
                    (IpAddr::V4(v4), RecordType::A | RecordType::ANY) => Some(RData::A(A(*v4))),
                    (IpAddr::V6(v6), RecordType::AAAA | RecordType::ANY) => Some(RData::AAAA(AAAA(*v6))),
                    _ => None,
                }));
            }
            (None, Some(host)) if matches!(question.kind, RecordType::PTR | RecordType::ANY) => {
                data.push(RData::PTR(PTR(host.clone())));
            }
            (None, Some(_)) => {}
            (None, None) => return None,
        }
        if data.is_empty() {
            return Some(special::denial(name, ResponseCode::NoError));
        }
        let record = |data| Record::from_rdata(name.clone(), HOSTS_TTL, data);
        Some(Answer {
            answers: data.into_iter().map(record).collect(),
            ..Answer::empty(ResponseCode::NoError)
        })
    }
}

/// Nobody keeps what has no TTL, neither we nor the client.
fn never_kept(answer: &mut Answer) {
    let sections = [&mut answer.answers, &mut answer.authorities];
    sections.into_iter().flatten().for_each(|record| record.ttl = 0);
}

fn plain(answer: Answer, question: &Question, source: &'static str) -> Resolution {
    let ttl = synthesis::lifetime(&answer, &question.name, question.kind);
    Resolution {
        answer,
        ttl,
        stopgap: false,
        source,
    }
}

fn refused(source: &'static str, trace: &Trace, why: impl FnOnce() -> String) -> Resolution {
    trace.say(why);
    Resolution {
        answer: Answer::empty(ResponseCode::Refused),
        ttl: 0,
        stopgap: false,
        source,
    }
}

/// What RFC 6147 made of both answers, for people.
const fn explained(reason: Reason) -> &'static str {
    match reason {
        Reason::Native => "there are AAAA records, and they are the answer",
        Reason::Filtered => "the AAAA records that are not excluded are the answer",
        Reason::NoName => "the name does not exist, which is the answer",
        Reason::Synthesised(Missing::Empty) => "there is no AAAA record: made of the A records",
        Reason::Synthesised(Missing::Excluded) => "all AAAA records are excluded: made of the A records",
        Reason::Synthesised(Missing::Failed) => "AAAA failed: made of the A records",
        Reason::NoAddress(_) => "there is no A record either",
        Reason::NotMapped(_) => "no prefix may stand for these A records",
        Reason::Error(_) => "A failed, too",
    }
}

/// An answer in a few words.
fn told(answer: &Answer) -> String {
    match (answer.code, answer.answers.len()) {
        (ResponseCode::NoError, 0) => "no such record".into(),
        (ResponseCode::NoError, 1) => "1 record".into(),
        (ResponseCode::NoError, count) => format!("{count} records"),
        (ResponseCode::NXDomain, _) => "no such name".into(),
        (code, _) => code_name(code).into(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
