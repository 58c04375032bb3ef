//! Names that a resolver answers itself, since nobody else knows better: `ipv4only.arpa` (RFC 7050, RFC 8880), the
//! special-use names of RFC 6761 and its successors, and the zones of RFC 6303, which would leak to the root.
//!
//! [`answer`] comes before all else; [`Local`] comes last, for what neither a zone, nor hosts, nor a prefix knows, and what
//! is not forwarded by its own rule.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use hickory_proto::{
    op::ResponseCode,
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA, NS, PTR, SOA},
    },
};

use crate::{
    Answer,
    question::Question,
    reverse,
    synthesis::{self, Rules},
};

/// The addresses of `ipv4only.arpa` (RFC 7050 §2.2).
pub const IPV4ONLY: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 0, 0, 170), Ipv4Addr::new(192, 0, 0, 171)];
/// Seconds that what is said of them lives: whoever learns the prefix from it asks again after that (RFC 7050 §3), as after
/// the default lifetime of a prefix that a router announces.
const IPV4ONLY_TTL: u32 = 1800;
/// Seconds that a locally served zone lives (RFC 6303 §3).
const LOCAL_TTL: u32 = 10_800;

/// Labels of the longest name of a locally served zone, that of an IPv6 address.
const DEEPEST: usize = 34;

/// Answers the names that are special whatever the configuration says: `ipv4only.arpa`, what its addresses are called,
/// `localhost`, `invalid` and `onion`. `None` for all others.
pub fn answer(rules: &Rules, question: &Question) -> Option<Answer> {
    if question.class != DNSClass::IN {
        return None;
    }
    let labels: Vec<&[u8]> = question.name.iter().rev().take(2).collect();
    match labels.as_slice() {
        [b"arpa", b"ipv4only"] => ipv4only(rules, question),
        [b"arpa", b"in-addr" | b"ip6"] => ipv4only_reverse(rules, question),
        [b"localhost", ..] => Some(localhost(question)),
        [b"invalid" | b"onion", ..] => Some(denial(&question.name.trim_to(1), ResponseCode::NXDomain)),
        _ => None,
    }
}

/// RFC 8880 §7.1: never forwarded, never validated.
fn ipv4only(rules: &Rules, question: &Question) -> Option<Answer> {
    let apex = question.name.trim_to(2);
    if question.name != apex {
        return Some(denial(&apex, ResponseCode::NXDomain));
    }
    // Bypasses what a prefix may stand for: these two are not global, and are asked for under the well-known prefix, too.
    let answers: Vec<RData> = match question.kind {
        RecordType::A => IPV4ONLY.map(|v4| RData::A(A(v4))).into(),
        RecordType::AAAA if !synthesis::wants_raw(question) => rules
            .mappings
            .iter()
            .flat_map(|mapping| IPV4ONLY.map(|v4| RData::AAAA(AAAA(mapping.prefix.embed(v4)))))
            .collect(),
        _ => Vec::new(),
    };
    if answers.is_empty() {
        return at_apex(&apex, question.kind);
    }
    Some(positive(&question.name, IPV4ONLY_TTL, answers))
}

/// RFC 8880 §7.2: the two addresses, themselves and under each prefix, are called `ipv4only.arpa`.
fn ipv4only_reverse(rules: &Rules, question: &Question) -> Option<Answer> {
    let named = |name: &Name| positive(name, IPV4ONLY_TTL, vec![RData::PTR(PTR(of("ipv4only.arpa.")))]);
    if let Some(v6) = reverse::address(&question.name) {
        let stands_for = |v4: Ipv4Addr| IPV4ONLY.contains(&v4);
        let mut mappings = rules.mappings.iter();
        let prefix = mappings
            .find(|mapping| mapping.prefix.extract(v6).is_some_and(stands_for))?
            .prefix;
        return Some(match question.kind {
            RecordType::PTR => named(&question.name),
            _ => denial(&reverse::apex(prefix), ResponseCode::NoError),
        });
    }
    let apex = IPV4ONLY
        .map(Name::from)
        .into_iter()
        .find(|apex| apex.zone_of(&question.name))?;
    if question.name != apex {
        return Some(denial(&apex, ResponseCode::NXDomain));
    }
    match question.kind {
        RecordType::PTR => Some(named(&apex)),
        kind => at_apex(&apex, kind),
    }
}

/// RFC 6761 §6.3: it and all names below it are this machine.
fn localhost(question: &Question) -> Answer {
    let address = match question.kind {
        RecordType::A => RData::A(A(Ipv4Addr::LOCALHOST)),
        RecordType::AAAA => RData::AAAA(AAAA(Ipv6Addr::LOCALHOST)),
        _ => return denial(&question.name.trim_to(1), ResponseCode::NoError),
    };
    positive(&question.name, LOCAL_TTL, vec![address])
}

/// The zones that are answered here rather than forwarded, unless somebody is known to have them.
#[derive(Clone, Debug)]
pub struct Local {
    zones: HashMap<Name, Kind>,
    elsewhere: Vec<Name>,
}

/// What a locally served zone has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// SOA and NS at its apex, and nothing below it (RFC 6303 §3).
    Empty,
    /// Not even an apex.
    Missing,
    /// The loopback address's reverse name, whose PTR is `localhost`.
    Loopback,
}

impl Local {
    /// Serves what is listed in the registries of locally served zones (RFC 6303 §4 and later) and of special-use names, save
    /// at and below the names `elsewhere`: the domains that are forwarded by their own rule, the origins of zones that are
    /// served here, and the apices of prefixes.
    pub fn new(elsewhere: Vec<Name>) -> Self {
        let mut zones: HashMap<Name, Kind> = EMPTY.iter().map(|name| (of(name), Kind::Empty)).collect();
        // Networks of a first octet and a range of second ones.
        for (first, seconds) in [(100_u8, 64..=127_u8), (172, 16..=31)] {
            zones.extend(seconds.map(|second| (of(&format!("{second}.{first}.in-addr.arpa.")), Kind::Empty)));
        }
        zones.extend(MISSING.iter().map(|name| (of(name), Kind::Missing)));
        zones.insert(Name::from(Ipv4Addr::LOCALHOST), Kind::Loopback);
        zones.insert(Name::from(Ipv6Addr::LOCALHOST), Kind::Loopback);
        Self { zones, elsewhere }
    }

    /// Answers `question` if its name lies in one of the zones; otherwise `None`.
    pub fn answer(&self, question: &Question) -> Option<Answer> {
        let last = question.name.iter().next_back()?;
        let special = matches!(last, b"arpa" | b"test" | b"local");
        if question.class != DNSClass::IN || !special || self.is_elsewhere(&question.name) {
            return None;
        }
        // The longest first: the loopback address within its network.
        let labels = question.name.iter().count().min(DEEPEST);
        let (apex, kind) = (1..=labels).rev().find_map(|labels| {
            let apex = question.name.trim_to(labels);
            self.zones.get(&apex).map(|kind| (apex, *kind))
        })?;
        let is_apex = apex == question.name;
        match kind {
            Kind::Missing => Some(self.negative(&apex, &question.name)),
            Kind::Loopback if is_apex && question.kind == RecordType::PTR => {
                Some(positive(&apex, LOCAL_TTL, vec![RData::PTR(PTR(of("localhost.")))]))
            }
            Kind::Empty | Kind::Loopback if is_apex => at_apex(&apex, question.kind),
            Kind::Empty | Kind::Loopback => Some(self.negative(&apex, &question.name)),
        }
    }

    fn is_elsewhere(&self, name: &Name) -> bool {
        let mut elsewhere = self.elsewhere.iter();
        elsewhere.any(|domain| !domain.is_root() && domain.zone_of(name))
    }

    /// That there is nothing at `name`; and nothing below it (RFC 8020), unless somebody has a name there.
    fn negative(&self, apex: &Name, name: &Name) -> Answer {
        let leads_on = self.elsewhere.iter().any(|domain| name.zone_of(domain));
        denial(
            apex,
            if leads_on {
                ResponseCode::NoError
            } else {
                ResponseCode::NXDomain
            },
        )
    }
}

/// Zones without content: RFC 6303 §4, RFC 6761 §6.1, RFC 7793 (above), RFC 8375, RFC 9462 §8.2, RFC 9665 §8.4.
const EMPTY: [&str; 20] = [
    "10.in-addr.arpa.",
    "168.192.in-addr.arpa.",
    "0.in-addr.arpa.",
    "127.in-addr.arpa.",
    "254.169.in-addr.arpa.",
    "2.0.192.in-addr.arpa.",
    "100.51.198.in-addr.arpa.",
    "113.0.203.in-addr.arpa.",
    "255.255.255.255.in-addr.arpa.",
    "0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.ip6.arpa.",
    "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.ip6.arpa.",
    "d.f.ip6.arpa.",
    "8.e.f.ip6.arpa.",
    "9.e.f.ip6.arpa.",
    "a.e.f.ip6.arpa.",
    "b.e.f.ip6.arpa.",
    "8.b.d.0.1.0.0.2.ip6.arpa.",
    "home.arpa.",
    "resolver.arpa.",
    "service.arpa.",
];

/// Domains that do not exist in the DNS: RFC 6761 §6.2, RFC 6762 §22.1, RFC 9031 §11, RFC 9140 §5.6.
const MISSING: [&str; 4] = ["test.", "local.", "6tisch.arpa.", "eap-noob.arpa."];

/// What the apex of a locally served zone has (RFC 6303 §3); `None` for DS, which is its parent's (RFC 4035 §3.1.4.1).
pub(crate) fn at_apex(apex: &Name, kind: RecordType) -> Option<Answer> {
    match kind {
        RecordType::DS => None,
        RecordType::SOA => Some(positive(apex, LOCAL_TTL, vec![soa(apex)])),
        RecordType::NS => Some(positive(apex, LOCAL_TTL, vec![RData::NS(NS(apex.clone()))])),
        _ => Some(denial(apex, ResponseCode::NoError)),
    }
}

/// That there is nothing of the kind, or nothing at all, in the zone at `apex`.
pub(crate) fn denial(apex: &Name, code: ResponseCode) -> Answer {
    let mut answer = Answer::empty(code);
    answer.authoritative = true;
    answer
        .authorities
        .push(Record::from_rdata(apex.clone(), LOCAL_TTL, soa(apex)));
    answer
}

fn positive(name: &Name, ttl: u32, data: Vec<RData>) -> Answer {
    let mut answer = Answer::empty(ResponseCode::NoError);
    answer.authoritative = true;
    answer.answers = data
        .into_iter()
        .map(|data| Record::from_rdata(name.clone(), ttl, data))
        .collect();
    answer
}

/// The SOA of RFC 6303 §3, whose times nobody uses.
fn soa(apex: &Name) -> RData {
    let minimum = LOCAL_TTL;
    RData::SOA(SOA::new(
        apex.clone(),
        of("nobody.invalid."),
        1,
        3600,
        1200,
        604_800,
        minimum,
    ))
}

/// A name that is written in this file.
fn of(text: &str) -> Name {
    Name::from_ascii(text).expect("a name in the source is one")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Pref64,
        testing::{lines, name, question},
    };

    // RFC 7050 §2.2, RFC 8880 §7.1.
    #[test]
    fn ipv4only_has_its_two_addresses_under_every_prefix_the_well_known_one_too() {
        let a = of_ipv4only(&["64:ff9b::/96"], "A");
        assert_eq!(
            lines(&a.answers),
            ["ipv4only.arpa. 1800 A 192.0.0.170", "ipv4only.arpa. 1800 A 192.0.0.171"]
        );
        let aaaa = of_ipv4only(&["64:ff9b::/96", "2001:db8::/32"], "AAAA");
        assert_eq!(
            lines(&aaaa.answers),
            [
                "ipv4only.arpa. 1800 AAAA 64:ff9b::c000:aa",
                "ipv4only.arpa. 1800 AAAA 64:ff9b::c000:ab",
                "ipv4only.arpa. 1800 AAAA 2001:db8:c000:aa::",
                "ipv4only.arpa. 1800 AAAA 2001:db8:c000:ab::"
            ]
        );
        assert!(a.authoritative && aaaa.authoritative);
    }

    #[test]
    fn without_a_prefix_ipv4only_has_no_aaaa() {
        let answer = of_ipv4only(&[], "AAAA");
        assert_eq!((answer.code, answer.answers.len()), (ResponseCode::NoError, 0));
        assert_eq!(answer.negative_ttl(), Some(10_800));
        assert_eq!(of_ipv4only(&[], "A").answers.len(), 2);
    }

    // RFC 7050 §3 has who looks for the prefix clear CD for that.
    #[test]
    fn whoever_validates_gets_no_aaaa_of_ipv4only() {
        let asked = Question {
            dnssec_ok: true,
            checking_disabled: true,
            ..question("ipv4only.arpa AAAA")
        };
        let answer = answer(&well_known(), &asked).expect("an answer");
        assert_eq!((answer.code, answer.answers.len()), (ResponseCode::NoError, 0));
    }

    #[test]
    fn ipv4only_has_no_other_types_and_no_names_below_it() {
        for kind in ["TXT", "MX", "CNAME", "HTTPS", "PTR"] {
            let answer = of_ipv4only(&["64:ff9b::/96"], kind);
            assert_eq!(
                (answer.code, answer.answers.len()),
                (ResponseCode::NoError, 0),
                "{kind}"
            );
            assert_eq!(lines(&answer.authorities), ["ipv4only.arpa. 10800 SOA 10800"], "{kind}");
        }
        assert_eq!(of_ipv4only(&[], "SOA").answers.len(), 1);
        assert_eq!(of_ipv4only(&[], "NS").answers.len(), 1);
        for kind in ["A", "AAAA", "TXT", "DS"] {
            let below = answer(&well_known(), &question(&format!("www.ipv4only.arpa {kind}"))).expect("an answer");
            assert_eq!(below.code, ResponseCode::NXDomain, "{kind}");
        }
        assert!(
            answer(&well_known(), &question("ipv4only.arpa DS")).is_none(),
            "arpa has it"
        );
    }

    // RFC 8880 §7.2.
    #[test]
    fn the_reverse_names_of_ipv4only_lead_back_to_it() {
        let rules = rules(&["64:ff9b::/96", "2001:db8::/32"]);
        for v4 in IPV4ONLY {
            let mut names = vec![Name::from(v4)];
            names.extend(
                rules
                    .mappings
                    .iter()
                    .map(|mapping| Name::from(mapping.prefix.embed(v4))),
            );
            for name in names {
                let named = answer(&rules, &Question::new(&name, RecordType::PTR)).expect("an answer");
                assert_eq!(lines(&named.answers), [format!("{name} 1800 PTR ipv4only.arpa.")]);
                let other = answer(&rules, &Question::new(&name, RecordType::A)).expect("an answer");
                assert_eq!((other.code, other.answers.len()), (ResponseCode::NoError, 0), "{name}");
                assert_eq!(other.authorities.len(), 1, "{name}");
            }
        }
        let below = answer(&rules, &question("1.170.0.0.192.in-addr.arpa PTR")).expect("an answer");
        assert_eq!(below.code, ResponseCode::NXDomain);
        for other in [
            Name::from(Pref64::WELL_KNOWN.embed([192, 0, 0, 172].into())),
            name("172.0.0.192.in-addr.arpa"),
            name("0.0.192.in-addr.arpa"),
            name("in-addr.arpa"),
            name("ip6.arpa"),
        ] {
            assert!(
                answer(&rules, &Question::new(&other, RecordType::PTR)).is_none(),
                "{other}"
            );
        }
    }

    // RFC 6761 §6.3.
    #[test]
    fn localhost_is_the_loopback_address_and_so_is_all_below_it() {
        for name in ["localhost", "www.localhost", "a.b.localhost"] {
            let of = |kind: &str| answer(&well_known(), &question(&format!("{name} {kind}"))).expect("an answer");
            assert_eq!(lines(&of("A").answers), [format!("{name}. 10800 A 127.0.0.1")]);
            assert_eq!(lines(&of("AAAA").answers), [format!("{name}. 10800 AAAA ::1")]);
            assert_eq!((of("MX").code, of("MX").answers.len()), (ResponseCode::NoError, 0));
        }
        assert!(answer(&well_known(), &question("localhost.example.org A")).is_none());
    }

    // RFC 6761 §6.4, RFC 7686 §2.
    #[test]
    fn invalid_and_onion_do_not_exist() {
        for name in ["invalid", "www.invalid", "onion", "x.y.onion"] {
            let answer = answer(&well_known(), &question(&format!("{name} AAAA"))).expect("an answer");
            assert_eq!(
                (answer.code, answer.negative_ttl()),
                (ResponseCode::NXDomain, Some(10_800)),
                "{name}"
            );
        }
    }

    // RFC 6761 §6.5 has resolvers treat them like all others.
    #[test]
    fn ordinary_names_and_example_names_are_not_special() {
        let local = Local::new(Vec::new());
        for asked in [
            ". NS",
            "example AAAA",
            "www.example AAAA",
            "www.example.org AAAA",
            "arpa SOA",
            "in-addr.arpa SOA",
            "8.8.8.8.in-addr.arpa PTR",
            "172.in-addr.arpa PTR",
            "15.172.in-addr.arpa PTR",
            "32.172.in-addr.arpa PTR",
            "63.100.in-addr.arpa PTR",
            "128.100.in-addr.arpa PTR",
            "f.ip6.arpa PTR",
            "c.f.ip6.arpa PTR",
            "0.2.ip6.arpa PTR",
            "localdomain A",
            "internal A",
            "alt A",
        ] {
            assert!(answer(&well_known(), &question(asked)).is_none(), "{asked}");
            assert!(local.answer(&question(asked)).is_none(), "{asked}");
        }
    }

    #[test]
    fn other_classes_are_not_answered() {
        for asked in [
            "localhost A",
            "ipv4only.arpa A",
            "170.0.0.192.in-addr.arpa PTR",
            "10.in-addr.arpa SOA",
            "test A",
        ] {
            let asked = Question {
                class: DNSClass::CH,
                ..question(asked)
            };
            assert!(answer(&well_known(), &asked).is_none(), "{asked:?}");
            assert!(Local::new(Vec::new()).answer(&asked).is_none(), "{asked:?}");
        }
    }

    // RFC 6303 §3, §4.
    #[test]
    fn private_reverse_zones_are_served_here_with_soa_and_ns_and_nothing_else() {
        let local = Local::new(Vec::new());
        let apices = [
            "10.in-addr.arpa",
            "16.172.in-addr.arpa",
            "31.172.in-addr.arpa",
            "168.192.in-addr.arpa",
            "64.100.in-addr.arpa",
            "127.100.in-addr.arpa",
            "0.in-addr.arpa",
            "127.in-addr.arpa",
            "254.169.in-addr.arpa",
            "2.0.192.in-addr.arpa",
            "100.51.198.in-addr.arpa",
            "113.0.203.in-addr.arpa",
            "255.255.255.255.in-addr.arpa",
            "d.f.ip6.arpa",
            "8.e.f.ip6.arpa",
            "9.e.f.ip6.arpa",
            "a.e.f.ip6.arpa",
            "b.e.f.ip6.arpa",
            "8.b.d.0.1.0.0.2.ip6.arpa",
            "home.arpa",
            "resolver.arpa",
            "service.arpa",
        ];
        for apex in apices {
            let of = |name: &str, kind: &str| local.answer(&question(&format!("{name} {kind}")));
            let soa = of(apex, "SOA").expect("an answer");
            assert_eq!(lines(&soa.answers), [format!("{apex}. 10800 SOA 10800")]);
            assert_eq!(
                lines(&of(apex, "NS").expect("an answer").answers),
                [format!("{apex}. 10800 NS {apex}.")]
            );
            assert!(of(apex, "DS").is_none(), "{apex}: DS is its parent's");
            let nothing = of(apex, "PTR").expect("an answer");
            assert_eq!(
                (nothing.code, nothing.answers.len()),
                (ResponseCode::NoError, 0),
                "{apex}"
            );
            for kind in ["PTR", "SOA", "DS", "ANY"] {
                let below = of(&format!("7.{apex}"), kind).expect("an answer");
                assert_eq!(
                    (below.code, below.negative_ttl()),
                    (ResponseCode::NXDomain, Some(10_800)),
                    "{apex}"
                );
                assert_eq!(lines(&below.authorities), [format!("{apex}. 10800 SOA 10800")]);
                assert!(below.authoritative, "{apex}");
            }
        }
    }

    // RFC 9462 §8.2: no resolver but this one may be found that way.
    #[test]
    fn designated_resolvers_are_not_looked_for_elsewhere() {
        let answer = Local::new(Vec::new())
            .answer(&question("_dns.resolver.arpa SVCB"))
            .expect("an answer");
        assert!(answer.answers.is_empty());
    }

    #[test]
    fn loopback_addresses_are_called_localhost() {
        let local = Local::new(Vec::new());
        for address in [Name::from(Ipv4Addr::LOCALHOST), Name::from(Ipv6Addr::LOCALHOST)] {
            let answer = local
                .answer(&Question::new(&address, RecordType::PTR))
                .expect("an answer");
            assert_eq!(lines(&answer.answers), [format!("{address} 10800 PTR localhost.")]);
        }
        let other = local
            .answer(&question("2.0.0.127.in-addr.arpa PTR"))
            .expect("an answer");
        assert_eq!(other.code, ResponseCode::NXDomain);
        assert_eq!(lines(&other.authorities), ["127.in-addr.arpa. 10800 SOA 10800"]);
    }

    // RFC 6761 §6.2, RFC 6762 §22.1.
    #[test]
    fn test_and_local_do_not_exist() {
        let local = Local::new(Vec::new());
        for name in [
            "test",
            "www.test",
            "local",
            "printer.local",
            "6tisch.arpa",
            "x.eap-noob.arpa",
        ] {
            let answer = local.answer(&question(&format!("{name} A"))).expect("an answer");
            assert_eq!(
                (answer.code, answer.negative_ttl()),
                (ResponseCode::NXDomain, Some(10_800)),
                "{name}"
            );
        }
    }

    #[test]
    fn what_is_forwarded_or_served_is_not_denied_nor_is_the_way_to_it() {
        let elsewhere = [
            "cluster.local",
            "1.168.192.in-addr.arpa",
            "0.0.0.0.0.0.0.0.d.0.d.f.ip6.arpa",
            "10.in-addr.arpa",
            ".",
        ];
        let local = Local::new(elsewhere.iter().map(|domain| name(domain)).collect());
        let code = |asked: &str| local.answer(&question(asked)).map(|answer| answer.code);
        for asked in [
            "cluster.local SOA",
            "api.cluster.local A",
            "7.1.168.192.in-addr.arpa PTR",
            "1.0.0.0.0.0.0.0.0.d.0.d.f.ip6.arpa PTR",
            "10.in-addr.arpa SOA",
            "1.0.0.10.in-addr.arpa PTR",
        ] {
            assert_eq!(code(asked), None, "{asked}");
        }
        for asked in [
            "local A",
            "0.0.d.0.d.f.ip6.arpa PTR",
            "d.f.ip6.arpa PTR",
            "168.192.in-addr.arpa PTR",
        ] {
            assert_eq!(code(asked), Some(ResponseCode::NoError), "{asked}");
        }
        for asked in [
            "printer.local A",
            "2.168.192.in-addr.arpa PTR",
            "1.0.d.0.d.f.ip6.arpa PTR",
        ] {
            assert_eq!(code(asked), Some(ResponseCode::NXDomain), "{asked}");
        }
    }

    #[test]
    fn whatever_is_asked_a_denial_comes_from_a_zone_that_the_name_is_in() {
        let mut seed = 0x6303_u64;
        let mut below = |bound: usize| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            usize::try_from(seed % 0xffff_ffff).expect("small") % bound
        };
        let ends = [
            "arpa",
            "ip6.arpa",
            "in-addr.arpa",
            "ipv4only.arpa",
            "localhost",
            "local",
            "test",
            "onion",
            "10.in-addr.arpa",
            "0.0.192.in-addr.arpa",
            "d.f.ip6.arpa",
            "0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.b.9.f.f.4.6.0.0.ip6.arpa",
            "8.b.d.0.1.0.0.2.ip6.arpa",
            ".",
        ];
        let labels: [&[u8]; 9] = [b"0", b"a", b"170", b"*", b"xn--", b"\0", b"\xff.", b"_tcp", &[b'x'; 63]];
        let kinds = [
            RecordType::PTR,
            RecordType::A,
            RecordType::SOA,
            RecordType::DS,
            RecordType::ANY,
            RecordType::Unknown(65_000),
        ];
        let (rules, local) = (
            rules(&["64:ff9b::/96", "2001:db8::/32"]),
            Local::new(vec![name("f.d.f.ip6.arpa")]),
        );
        let mut answered = 0;
        for _ in 0..10_000 {
            let mut asked = name(ends[below(ends.len())]);
            for _ in 0..below(40) {
                // Mostly nibbles, and until the name is as long as a name can be.
                let label = labels[if below(12) == 0 { below(labels.len()) } else { below(2) }];
                let longer = Name::from_labels([label].into_iter().chain(asked.iter()));
                asked = longer.unwrap_or(asked);
            }
            let question = Question::new(&asked, kinds[below(kinds.len())]);
            let by_prefix = match reverse::answer(&rules, reverse::Form::Ptr, &question) {
                Some(reverse::Reverse::Done(answer)) => Some(answer),
                Some(reverse::Reverse::Ask(lookup)) => Some(lookup.on_ptr(Answer::empty(ResponseCode::NXDomain)).0),
                None => None,
            };
            for answer in [answer(&rules, &question), local.answer(&question), by_prefix]
                .into_iter()
                .flatten()
            {
                answered += 1;
                assert_ne!(answer.answers.is_empty(), answer.authorities.is_empty(), "{question:?}");
                assert!(
                    answer.authorities.iter().all(|soa| soa.name.zone_of(&asked)),
                    "{question:?}"
                );
                assert!(answer.answers.iter().all(|record| record.name == asked), "{question:?}");
            }
        }
        assert!(answered > 4_000, "{answered}");
    }

    fn rules(prefixes: &[&str]) -> Rules {
        Rules::new(prefixes.iter().map(|prefix| prefix.parse().expect("a prefix")))
    }

    fn well_known() -> Rules {
        Rules::new([Pref64::WELL_KNOWN])
    }

    fn of_ipv4only(prefixes: &[&str], kind: &str) -> Answer {
        answer(&rules(prefixes), &question(&format!("ipv4only.arpa {kind}"))).expect("an answer")
    }
}
