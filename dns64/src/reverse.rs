//! The names of synthesised addresses (RFC 6147 §5.3.1): a question for PTR below a prefix is answered with what the IPv4
//! address is called.
//!
//! To its asker the tree below a prefix is a zone that is served here, as RFC 6303 §3 has them: its apex has SOA and NS, the
//! names between apex and address exist without data, and what is no address or stands for none does not exist. What an
//! address is called somebody else knows, though, so that [`Reverse::Ask`] comes first.

use std::net::Ipv6Addr;

use hickory_proto::{
    op::ResponseCode,
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{CNAME, PTR},
    },
};

use crate::{
    Answer, Pref64,
    question::Question,
    special,
    synthesis::{self, Rules},
};

/// Nibbles of an IPv6 address.
const NIBBLES: usize = 32;

/// How the name of an IPv4 address is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Form {
    /// PTR records at the name that was asked for.
    #[default]
    Ptr,
    /// A CNAME to the name below `in-addr.arpa`, and what is there. Where an alias is already (RFC 2317) it is
    /// [`Form::Ptr`], so that chains do not grow.
    Cname,
}

/// What is known of a question below a prefix.
#[derive(Debug)]
pub enum Reverse {
    /// The whole answer.
    Done(Answer),
    /// Ask [`Lookup::question`].
    Ask(Lookup),
}

/// A question for the name of an address under a prefix.
#[derive(Debug)]
pub struct Lookup {
    asked: Name,
    apex: Name,
    question: Question,
    form: Form,
}

/// Answers `question` if it lies below one of the prefixes of `rules`; otherwise, and if its asker wants nothing that is
/// synthesised, `None`.
pub fn answer(rules: &Rules, form: Form, question: &Question) -> Option<Reverse> {
    if question.class != DNSClass::IN || synthesis::wants_raw(question) {
        return None;
    }
    let place = place(&question.name)?;
    let within = rules
        .mappings
        .iter()
        .filter(|mapping| usize::from(mapping.prefix.length()) <= place.nibbles * 4)
        .filter(|mapping| mapping.prefix.contains(place.address));
    let prefix = within
        .map(|mapping| mapping.prefix)
        .max_by_key(|prefix| prefix.length())?;
    let apex = apex(prefix);
    if question.name == apex {
        return special::at_apex(&apex, question.kind).map(Reverse::Done);
    }
    if !place.whole {
        return Some(Reverse::Done(special::denial(&apex, ResponseCode::NXDomain)));
    }
    if place.nibbles < NIBBLES {
        return Some(Reverse::Done(special::denial(&apex, ResponseCode::NoError)));
    }
    let Some((_, Some(v4))) = rules.extract(place.address) else {
        return Some(Reverse::Done(special::denial(&apex, ResponseCode::NXDomain)));
    };
    Some(if question.kind == RecordType::PTR {
        Reverse::Ask(Lookup {
            asked: question.name.clone(),
            apex,
            question: question.with_name(&Name::from(v4)),
            form,
        })
    } else {
        Reverse::Done(special::denial(&apex, ResponseCode::NoError))
    })
}

/// The name below which the addresses of `prefix` have theirs.
pub fn apex(prefix: Pref64) -> Name {
    Name::from(prefix.network()).trim_to(usize::from(prefix.length() / 4) + 2)
}

/// The address that `name` below `ip6.arpa` is that of; `None` for all other names.
pub fn address(name: &Name) -> Option<Ipv6Addr> {
    place(name)
        .filter(|place| place.whole && place.nibbles == NIBBLES)
        .map(|place| place.address)
}

impl Lookup {
    /// What to ask: the name of the IPv4 address.
    pub fn question(&self) -> &Question {
        &self.question
    }

    /// The answer and the seconds it may be remembered, now that the one to [`Lookup::question`] is known, which followed
    /// aliases to their end.
    pub fn on_ptr(self, answer: Answer) -> (Answer, u32) {
        let target = &self.question.name;
        let ttl = synthesis::lifetime(&answer, target, RecordType::PTR);
        let end = answer.end_of_chain(target);
        let names: Vec<&PTR> = answer
            .records(end, RecordType::PTR)
            .filter_map(|record| match &record.data {
                RData::PTR(name) => Some(name),
                _ => None,
            })
            .collect();
        match answer.code {
            ResponseCode::NoError if names.is_empty() => {}
            ResponseCode::NXDomain => {}
            ResponseCode::NoError if self.form == Form::Cname && end == target => {
                let alias = Record::from_rdata(self.asked, ttl, RData::CNAME(CNAME(target.clone())));
                let answers = [alias].into_iter().chain(answer.answers).collect();
                let answer = Answer {
                    answers,
                    authoritative: false,
                    ..answer
                };
                return (answer, ttl);
            }
            ResponseCode::NoError => {
                let mut named = Answer::empty(ResponseCode::NoError);
                let record = |name: &PTR| Record::from_rdata(self.asked.clone(), ttl, RData::PTR(name.clone()));
                named.answers = names.into_iter().map(record).collect();
                return (named, ttl);
            }
            code => return (Answer::empty(code), ttl),
        }
        // The SOA of another zone would deny nothing here; ours does it for as long as that one.
        let ttl = match answer.negative_ttl() {
            Some(_) => ttl,
            None => synthesis::WITHOUT_SOA,
        };
        let mut denial = special::denial(&self.apex, answer.code);
        for record in &mut denial.authorities {
            record.ttl = record.ttl.min(ttl);
        }
        denial.authoritative = false;
        (denial, ttl)
    }
}

/// Where a name lies below `ip6.arpa`.
struct Place {
    /// Its nibbles, and zeros.
    address: Ipv6Addr,
    /// How many nibbles it has.
    nibbles: usize,
    /// Whether it has nothing but nibbles.
    whole: bool,
}

fn place(name: &Name) -> Option<Place> {
    let mut labels = name.iter().rev();
    let is = |label: Option<&[u8]>, text: &[u8]| label.is_some_and(|label| label.eq_ignore_ascii_case(text));
    if !(is(labels.next(), b"arpa") && is(labels.next(), b"ip6")) {
        return None;
    }
    let mut bits = 0_u128;
    let mut nibbles = 0;
    for label in labels {
        let nibble = match label {
            [digit] => char::from(*digit).to_digit(16),
            _ => None,
        };
        let Some(nibble) = nibble.filter(|_| nibbles < NIBBLES) else {
            return Some(Place {
                address: bits.into(),
                nibbles,
                whole: false,
            });
        };
        nibbles += 1;
        bits |= u128::from(nibble) << (128 - 4 * nibbles);
    }
    Some(Place {
        address: bits.into(),
        nibbles,
        whole: true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{answer as response, lines, name, noerror, question};

    const LENGTHS: [&str; 6] = [
        "2001:db8::/32",
        "2001:db8:100::/40",
        "2001:db8:122::/48",
        "2001:db8:122:300::/56",
        "2001:db8:122:344::/64",
        "2001:db8:122:344::/96",
    ];

    #[test]
    fn the_name_of_an_address_is_asked_for_below_in_addr_arpa_for_all_lengths() {
        for prefix in LENGTHS {
            let lookup = lookup(&rules(&[prefix]), Form::Ptr, &ptr(prefix, "192.0.2.33"));
            assert_eq!(lookup.question(), &question("33.2.0.192.in-addr.arpa PTR"), "{prefix}");
        }
    }

    #[test]
    fn an_address_answers_with_the_ptr_records_of_its_ipv4_address_at_the_name_asked_for() {
        let asked = ptr("64:ff9b::/96", "8.8.8.8");
        let (answer, ttl) = lookup(&well_known(), Form::Ptr, &asked).on_ptr(noerror(
            "8.8.8.8.in-addr.arpa 300 PTR dns.example.org
             8.8.8.8.in-addr.arpa 300 PTR dns2.example.org
             8.8.8.8.in-addr.arpa 300 RRSIG PTR",
            "8.8.8.in-addr.arpa 600 NS ns.example.org",
        ));
        assert_eq!(
            lines(&answer.answers),
            [
                format!("{} 300 PTR dns.example.org.", asked.name),
                format!("{} 300 PTR dns2.example.org.", asked.name)
            ]
        );
        assert_eq!(
            (answer.code, answer.authoritative, ttl),
            (ResponseCode::NoError, false, 300)
        );
        assert!(answer.authorities.is_empty());
    }

    #[test]
    fn a_cname_to_in_addr_arpa_lives_as_long_as_what_it_leads_to() {
        let asked = ptr("64:ff9b::/96", "8.8.8.8");
        let (answer, ttl) = lookup(&well_known(), Form::Cname, &asked)
            .on_ptr(noerror("8.8.8.8.in-addr.arpa 300 PTR dns.example.org", ""));
        assert_eq!(
            lines(&answer.answers),
            [
                format!("{} 300 CNAME 8.8.8.8.in-addr.arpa.", asked.name),
                "8.8.8.8.in-addr.arpa. 300 PTR dns.example.org.".to_owned()
            ]
        );
        assert_eq!(ttl, 300);
    }

    #[test]
    fn no_cname_leads_to_another_one_or_to_nothing() {
        let asked = ptr("64:ff9b::/96", "8.8.8.8");
        for form in [Form::Ptr, Form::Cname] {
            // RFC 2317.
            let (answer, ttl) = lookup(&well_known(), form, &asked).on_ptr(noerror(
                "8.8.8.8.in-addr.arpa 60 CNAME 8.0-15.8.8.8.in-addr.arpa
                 8.0-15.8.8.8.in-addr.arpa 300 PTR dns.example.org",
                "",
            ));
            assert_eq!(
                lines(&answer.answers),
                [format!("{} 60 PTR dns.example.org.", asked.name)]
            );
            assert_eq!(ttl, 60);
            let (answer, _) = lookup(&well_known(), form, &asked).on_ptr(noerror("", "8.in-addr.arpa 60 SOA 60"));
            assert_eq!((answer.code, answer.answers.len()), (ResponseCode::NoError, 0));
        }
    }

    #[test]
    fn an_address_without_a_name_is_denied_by_our_soa_for_as_long_as_by_theirs() {
        for code in [ResponseCode::NXDomain, ResponseCode::NoError] {
            let lookup = lookup(&well_known(), Form::Ptr, &ptr("64:ff9b::/96", "8.8.8.8"));
            let (answer, ttl) = lookup.on_ptr(response(code, "", "8.in-addr.arpa 900 SOA 240"));
            assert_eq!((answer.code, ttl), (code, 240));
            assert_eq!(
                lines(&answer.authorities),
                ["0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.b.9.f.f.4.6.0.0.ip6.arpa. 240 SOA 10800"]
            );
        }
    }

    #[test]
    fn a_failure_to_find_the_name_is_passed_on() {
        let lookup = lookup(&well_known(), Form::Cname, &ptr("64:ff9b::/96", "8.8.8.8"));
        let (answer, ttl) = lookup.on_ptr(response(ResponseCode::ServFail, "", ""));
        assert_eq!(answer, Answer::empty(ResponseCode::ServFail));
        assert_eq!(ttl, synthesis::FAILURE);
    }

    #[test]
    fn names_between_apex_and_address_exist_and_are_empty() {
        for prefix in LENGTHS {
            let rules = rules(&[prefix]);
            let asked = ptr(prefix, "192.0.2.33");
            let apex = apex(prefix.parse().expect("a prefix"));
            let labels = asked.name.iter().count();
            for depth in apex.iter().count()..labels {
                let at = asked.with_name(&asked.name.trim_to(depth));
                let answer = done(answer(&rules, Form::Ptr, &at));
                assert_eq!(answer.code, ResponseCode::NoError, "{}", at.name);
                assert!(answer.answers.is_empty() && answer.authoritative, "{}", at.name);
                assert_eq!(answer.negative_ttl(), Some(10_800), "{}", at.name);
            }
            // Above it is somebody else's.
            let above = asked.with_name(&apex.base_name());
            assert!(answer(&rules, Form::Ptr, &above).is_none(), "{}", above.name);
        }
    }

    #[test]
    fn an_apex_has_soa_and_ns_and_leaves_ds_to_its_parent() {
        let of = |kind| {
            answer(
                &well_known(),
                Form::Ptr,
                &Question::new(&apex(Pref64::WELL_KNOWN), kind),
            )
        };
        assert_eq!(done(of(RecordType::SOA)).answers.len(), 1);
        assert_eq!(done(of(RecordType::NS)).answers.len(), 1);
        assert!(of(RecordType::DS).is_none());
    }

    #[test]
    fn an_address_has_no_other_records() {
        let asked = ptr("64:ff9b::/96", "8.8.8.8").with_kind(RecordType::TXT);
        let answer = done(answer(&well_known(), Form::Cname, &asked));
        assert_eq!((answer.code, answer.answers.len()), (ResponseCode::NoError, 0));
        assert_eq!(answer.negative_ttl(), Some(10_800));
    }

    #[test]
    fn what_is_no_address_or_stands_for_none_does_not_exist() {
        let address = Name::from(Pref64::WELL_KNOWN.embed([8, 8, 8, 8].into()));
        let below = |label: &str, above: &Name| above.prepend_label(label).expect("a name");
        for name in [
            below("1", &address),
            below("xy", &apex(Pref64::WELL_KNOWN)),
            below("g", &apex(Pref64::WELL_KNOWN)),
            below("_tcp", &apex(Pref64::WELL_KNOWN)),
            below("1", &below("g", &apex(Pref64::WELL_KNOWN))),
            // RFC 6052 §3.1: not under the well-known prefix.
            ptr("64:ff9b::/96", "10.0.0.1").name,
        ] {
            let answer = done(answer(&well_known(), Form::Ptr, &Question::new(&name, RecordType::PTR)));
            assert_eq!(answer.code, ResponseCode::NXDomain, "{name}");
            assert_eq!(answer.negative_ttl(), Some(10_800), "{name}");
        }
        let mut some = rules(&["2001:db8::/96"]);
        some.mappings[0].except = vec!["192.0.2.0/24".parse().expect("a network")];
        let answer = done(answer(&some, Form::Ptr, &ptr("2001:db8::/96", "192.0.2.33")));
        assert_eq!(answer.code, ResponseCode::NXDomain);
    }

    #[test]
    fn suffix_and_reserved_bits_of_an_address_are_passed_over() {
        let v6: Ipv6Addr = "2001:db8:c000:221:ff12:3456:789a:bcde".parse().expect("an address");
        let asked = Question::new(&Name::from(v6), RecordType::PTR);
        let lookup = lookup(&rules(&["2001:db8::/32"]), Form::Ptr, &asked);
        assert_eq!(lookup.question().name, name("33.2.0.192.in-addr.arpa"));
    }

    #[test]
    fn the_longest_of_prefixes_within_each_other_counts() {
        let rules = rules(&["2001:db8::/32", "2001:db8:0:0:1::/96"]);
        let lookup = lookup(&rules, Form::Ptr, &ptr("2001:db8:0:0:1::/96", "192.0.2.33"));
        assert_eq!(lookup.question().name, name("33.2.0.192.in-addr.arpa"));
        assert_eq!(lookup.apex, apex("2001:db8:0:0:1::/96".parse().expect("a prefix")));
    }

    #[test]
    fn other_names_and_classes_and_those_who_validate_are_not_answered() {
        let asked = ptr("64:ff9b::/96", "8.8.8.8");
        let chaos = Question {
            class: DNSClass::CH,
            ..asked.clone()
        };
        let validating = Question {
            dnssec_ok: true,
            checking_disabled: true,
            ..asked
        };
        for asked in [
            chaos,
            validating,
            ptr("2001:db8::/96", "8.8.8.8"),
            question("8.8.8.8.in-addr.arpa PTR"),
            question("ip6.arpa PTR"),
            question("arpa PTR"),
            question(". PTR"),
            question("www.example.org PTR"),
        ] {
            assert!(answer(&well_known(), Form::Ptr, &asked).is_none(), "{asked:?}");
        }
    }

    fn rules(prefixes: &[&str]) -> Rules {
        Rules::new(prefixes.iter().map(|prefix| prefix.parse().expect("a prefix")))
    }

    fn well_known() -> Rules {
        Rules::new([Pref64::WELL_KNOWN])
    }

    fn ptr(prefix: &str, v4: &str) -> Question {
        let prefix: Pref64 = prefix.parse().expect("a prefix");
        let v6 = prefix.embed(v4.parse().expect("an address"));
        Question::new(&Name::from(v6), RecordType::PTR)
    }

    fn lookup(rules: &Rules, form: Form, question: &Question) -> Lookup {
        match answer(rules, form, question) {
            Some(Reverse::Ask(lookup)) => lookup,
            other => panic!("{} gives {other:?}", question.name),
        }
    }

    fn done(reverse: Option<Reverse>) -> Answer {
        match reverse {
            Some(Reverse::Done(answer)) => answer,
            other => panic!("no answer but {other:?}"),
        }
    }
}
