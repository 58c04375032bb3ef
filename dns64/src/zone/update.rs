//! Dynamic updates to the letter of RFC 2136 §3, without a thought of who may do what.
//!
//! Nothing here changes a zone: [`outcome`] says what the names that differ afterwards would hold.

use std::collections::BTreeMap;

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{DNSClass, Name, RData, Record, RecordData, RecordType},
};

use super::data::{Data, RrSet, Sets, insert};

/// The serial after `serial` (RFC 1982 §3.1). Never 0, which some take for "no serial".
pub const fn next_serial(serial: u32) -> u32 {
    match serial.wrapping_add(1) {
        0 => 1,
        next => next,
    }
}

/// Whether serial `a` is greater than `b` (RFC 1982 §3.2). Of two that lie half the circle apart, neither is.
pub const fn is_later(a: u32, b: u32) -> bool {
    let distance = a.wrapping_sub(b);
    distance != 0 && distance < 1 << 31
}

/// The zone that `request` wants to change (RFC 2136 §3.1).
///
/// # Errors
///
/// FORMERR unless there is exactly one and it is asked for by its SOA; NOTAUTH for a class other than IN.
pub fn zone(request: &Message) -> Result<Name, ResponseCode> {
    let [zone] = request.queries.as_slice() else {
        return Err(ResponseCode::FormErr);
    };
    if zone.query_type() != RecordType::SOA {
        return Err(ResponseCode::FormErr);
    }
    if zone.query_class() != DNSClass::IN {
        return Err(ResponseCode::NotAuth);
    }
    Ok(zone.name().to_lowercase())
}

/// Whether all of `wanted` is so (RFC 2136 §3.2.5).
///
/// # Errors
///
/// The first that is not: NXDOMAIN, YXDOMAIN, NXRRSET or YXRRSET; NOTZONE for a name elsewhere, FORMERR for what is no
/// prerequisite.
pub fn prerequisites(data: &Data, wanted: &[Record]) -> Result<(), ResponseCode> {
    let mut sets: BTreeMap<(Name, RecordType), Vec<&RData>> = BTreeMap::new();
    for record in wanted {
        if record.ttl != 0 {
            return Err(ResponseCode::FormErr);
        }
        if !data.origin().zone_of(&record.name) {
            return Err(ResponseCode::NotZone);
        }
        let kind = record.record_type();
        let exists = match kind {
            RecordType::ANY => data.sets(&record.name).is_some(),
            _ => data.set(&record.name, kind).is_some(),
        };
        match record.dns_class {
            DNSClass::ANY | DNSClass::NONE if !record.data.is_update() => return Err(ResponseCode::FormErr),
            DNSClass::ANY | DNSClass::NONE if is_meta(kind) && kind != RecordType::ANY => {
                return Err(ResponseCode::FormErr);
            }
            DNSClass::ANY if !exists && kind == RecordType::ANY => return Err(ResponseCode::NXDomain),
            DNSClass::ANY if !exists => return Err(ResponseCode::NXRRSet),
            DNSClass::NONE if exists && kind == RecordType::ANY => return Err(ResponseCode::YXDomain),
            DNSClass::NONE if exists => return Err(ResponseCode::YXRRSet),
            DNSClass::ANY | DNSClass::NONE => {}
            DNSClass::IN if record.data.is_update() || is_meta(kind) => return Err(ResponseCode::FormErr),
            DNSClass::IN => sets
                .entry((record.name.to_lowercase(), kind))
                .or_default()
                .push(&record.data),
            _ => return Err(ResponseCode::FormErr),
        }
    }
    let met = |((name, kind), wanted): (&(Name, RecordType), &Vec<&RData>)| {
        data.set(name, *kind).is_some_and(|set| set.holds(wanted))
    };
    if sets.iter().all(met) {
        Ok(())
    } else {
        Err(ResponseCode::NXRRSet)
    }
}

/// Whether `updates` are well-formed (RFC 2136 §3.4.1.3): checked as a whole before the first is carried out.
///
/// # Errors
///
/// NOTZONE for a name elsewhere, FORMERR for what is no update.
pub fn prescan(origin: &Name, updates: &[Record]) -> Result<(), ResponseCode> {
    for record in updates {
        if !origin.zone_of(&record.name) {
            return Err(ResponseCode::NotZone);
        }
        let kind = record.record_type();
        let empty = record.data.is_update();
        let well_formed = match record.dns_class {
            DNSClass::IN => !is_meta(kind) && !empty,
            DNSClass::ANY => record.ttl == 0 && empty && (kind == RecordType::ANY || !is_meta(kind)),
            DNSClass::NONE => record.ttl == 0 && !is_meta(kind),
            _ => false,
        };
        if !well_formed {
            return Err(ResponseCode::FormErr);
        }
    }
    Ok(())
}

/// What the names that `updates` change hold afterwards (RFC 2136 §3.4.2.7); a name left without a record is there and
/// empty. What ends as it began is not there.
///
/// `updates` have passed [`prescan`].
pub fn outcome(data: &Data, updates: &[Record]) -> BTreeMap<Name, Sets> {
    let mut drafts: BTreeMap<Name, Sets> = BTreeMap::new();
    for record in updates {
        let name = record.name.to_lowercase();
        let at_apex = name == *data.origin();
        let sets = drafts
            .entry(name)
            .or_insert_with_key(|name| data.sets(name).cloned().unwrap_or_default());
        match record.dns_class {
            DNSClass::ANY => delete_sets(sets, record.record_type(), at_apex),
            DNSClass::NONE => delete_record(sets, &record.data, at_apex),
            _ => add(sets, record, at_apex),
        }
    }
    drafts.retain(|name, sets| data.sets(name).map_or(!sets.is_empty(), |before| before != sets));
    drafts
}

/// Adds a record (RFC 2136 §3.4.2.2), or passes it over where a CNAME and others, or two SOAs, would come together.
fn add(sets: &mut Sets, record: &Record, at_apex: bool) {
    let kind = record.record_type();
    match &record.data {
        RData::CNAME(_) if sets.keys().any(|kind| *kind != RecordType::CNAME) => return,
        RData::CNAME(_) => {
            // One name has one alias: the later takes the place of the former.
            sets.remove(&kind);
        }
        RData::SOA(_) if !at_apex => return,
        RData::SOA(soa) => {
            let serial = sets.get(&kind).and_then(first_serial);
            if serial.is_some_and(|serial| !is_later(soa.serial, serial)) {
                return;
            }
            sets.remove(&kind);
        }
        _ if sets.contains_key(&RecordType::CNAME) => return,
        _ => {}
    }
    insert(sets, record.ttl, record.data.clone());
}

fn first_serial(set: &RrSet) -> Option<u32> {
    set.data.iter().find_map(|data| match data {
        RData::SOA(soa) => Some(soa.serial),
        _ => None,
    })
}

/// Deletes the records of one type or of all (RFC 2136 §3.4.2.3); SOA and NS of the apex stay.
fn delete_sets(sets: &mut Sets, kind: RecordType, at_apex: bool) {
    sets.retain(|present, _| {
        let named = kind == RecordType::ANY || kind == *present;
        !named || (at_apex && matches!(present, RecordType::SOA | RecordType::NS))
    });
}

/// Deletes one record (RFC 2136 §3.4.2.4); the SOA and the last NS of the apex stay.
fn delete_record(sets: &mut Sets, data: &RData, at_apex: bool) {
    let kind = data.record_type();
    let Some(set) = sets.get_mut(&kind) else { return };
    if kind == RecordType::SOA || (at_apex && kind == RecordType::NS && set.data.len() == 1) {
        return;
    }
    set.data.retain(|present| present != data);
    if set.data.is_empty() {
        sets.remove(&kind);
    }
}

/// Types that stand for no record of a zone: 128 to 255 (RFC 6895 §3.1), OPT, and the reserved 0.
fn is_meta(kind: RecordType) -> bool {
    matches!(u16::from(kind), 0 | 41 | 128..=255)
}

#[cfg(test)]
mod tests {
    use hickory_proto::{
        op::{MessageType, OpCode, Query},
        rr::rdata::{A, CNAME, NS, SOA, TXT},
    };

    use super::*;

    #[test]
    fn rfc1982_serials_go_round_and_pass_zero_over() {
        for (serial, next) in [
            (0, 1),
            (1, 2),
            (0x7fff_ffff, 0x8000_0000),
            (u32::MAX - 1, u32::MAX),
            (u32::MAX, 1),
        ] {
            assert_eq!(next_serial(serial), next);
            assert!(is_later(next, serial) && !is_later(serial, next), "{serial}");
        }
        assert!(!is_later(7, 7));
        assert!(is_later(0x7fff_ffff, 0) && !is_later(0x8000_0001, 0) && is_later(44, u32::MAX));
        assert!(
            !is_later(0x8000_0000, 0) && !is_later(0, 0x8000_0000),
            "half the circle apart: undefined"
        );
    }

    #[test]
    fn rfc2136_3_1_the_zone_section_is_one_soa_of_class_in() {
        let soa = Query::query(name("FLEET."), RecordType::SOA);
        let mut chaos = soa.clone();
        chaos.set_query_class(DNSClass::CH);
        for (queries, expected) in [
            (vec![soa.clone()], Ok(name("fleet."))),
            (vec![], Err(ResponseCode::FormErr)),
            (vec![soa.clone(), soa], Err(ResponseCode::FormErr)),
            (
                vec![Query::query(name("fleet."), RecordType::A)],
                Err(ResponseCode::FormErr),
            ),
            (vec![chaos], Err(ResponseCode::NotAuth)),
        ] {
            let mut message = Message::new(1, MessageType::Query, OpCode::Update);
            message.add_queries(queries);
            assert_eq!(zone(&message), expected);
        }
    }

    #[test]
    fn rfc2136_3_2_each_prerequisite_is_met_or_says_why_not() {
        use ResponseCode::{FormErr, NXDomain, NXRRSet, NotZone, YXDomain, YXRRSet};
        let data = data();
        let any = |owner, kind| any(owner, kind);
        let none = |owner, kind| in_class(DNSClass::NONE, any(owner, kind));
        let with_ttl = |mut record: Record| {
            record.ttl = 1;
            record
        };
        for (what, record, expected) in [
            ("§2.4.4 name is in use", any("n1.fleet.", RecordType::ANY), Ok(())),
            ("it is not", any("n9.fleet.", RecordType::ANY), Err(NXDomain)),
            (
                "an empty non-terminal is not in use",
                any("b.fleet.", RecordType::ANY),
                Err(NXDomain),
            ),
            ("§2.4.5 name is not in use", none("n9.fleet.", RecordType::ANY), Ok(())),
            (
                "an empty non-terminal is not",
                none("b.fleet.", RecordType::ANY),
                Ok(()),
            ),
            ("it is", none("N1.fleet.", RecordType::ANY), Err(YXDomain)),
            ("§2.4.1 set exists", any("n1.fleet.", RecordType::A), Ok(())),
            ("it does not", any("n1.fleet.", RecordType::AAAA), Err(NXRRSet)),
            ("nor does the name", any("n9.fleet.", RecordType::A), Err(NXRRSet)),
            ("§2.4.3 set does not exist", none("n1.fleet.", RecordType::AAAA), Ok(())),
            ("it does", none("n1.fleet.", RecordType::A), Err(YXRRSet)),
            ("another zone's name", any("n1.example.", RecordType::A), Err(NotZone)),
            ("a TTL", with_ttl(any("n1.fleet.", RecordType::A)), Err(FormErr)),
            ("a TTL of a value", with_ttl(add("n1.fleet.", 0, a(1))), Err(FormErr)),
            (
                "class ANY with data",
                in_class(DNSClass::ANY, add("n1.fleet.", 0, a(1))),
                Err(FormErr),
            ),
            (
                "class NONE with data",
                in_class(DNSClass::NONE, add("n1.fleet.", 0, a(1))),
                Err(FormErr),
            ),
            (
                "class IN without",
                in_class(DNSClass::IN, any("n1.fleet.", RecordType::A)),
                Err(FormErr),
            ),
            (
                "class CH",
                in_class(DNSClass::CH, add("n1.fleet.", 0, a(1))),
                Err(FormErr),
            ),
            ("a type that is none", any("n1.fleet.", RecordType::AXFR), Err(FormErr)),
        ] {
            assert_eq!(prerequisites(&data, &[record]), expected, "{what}");
        }
    }

    #[test]
    fn rfc2136_2_4_2_a_set_is_compared_as_a_whole_and_without_ttls() {
        let data = data();
        let set = |numbers: &[u8]| -> Vec<Record> { numbers.iter().map(|n| add("N1.fleet.", 0, a(*n))).collect() };
        assert_eq!(prerequisites(&data, &set(&[1, 2])), Ok(()));
        assert_eq!(prerequisites(&data, &set(&[2, 1, 2])), Ok(()));
        for other in [&[1][..], &[1, 2, 3], &[1, 3]] {
            assert_eq!(
                prerequisites(&data, &set(other)),
                Err(ResponseCode::NXRRSet),
                "{other:?}"
            );
        }
        let elsewhere = [add("n9.fleet.", 0, a(1))];
        assert_eq!(prerequisites(&data, &elsewhere), Err(ResponseCode::NXRRSet));
    }

    #[test]
    fn rfc2136_3_4_1_updates_are_all_checked_before_one_is_carried_out() {
        use ResponseCode::{FormErr, NotZone};
        let good = add("n1.fleet.", 60, a(1));
        let with_ttl = |mut record: Record| {
            record.ttl = 1;
            record
        };
        for (what, record, expected) in [
            ("an addition", good.clone(), Ok(())),
            ("a set's deletion", any("n1.fleet.", RecordType::A), Ok(())),
            ("a name's deletion", any("n1.fleet.", RecordType::ANY), Ok(())),
            (
                "a record's deletion",
                in_class(DNSClass::NONE, add("n1.fleet.", 0, a(1))),
                Ok(()),
            ),
            ("another zone's name", add("n1.example.", 60, a(1)), Err(NotZone)),
            (
                "an addition without data",
                in_class(DNSClass::IN, any("n1.fleet.", RecordType::A)),
                Err(FormErr),
            ),
            (
                "an addition of ANY",
                in_class(DNSClass::IN, any("n1.fleet.", RecordType::ANY)),
                Err(FormErr),
            ),
            ("a deletion of AXFR", any("n1.fleet.", RecordType::AXFR), Err(FormErr)),
            (
                "a deletion of MAILB",
                any("n1.fleet.", RecordType::from(253)),
                Err(FormErr),
            ),
            (
                "a deletion with a TTL",
                with_ttl(any("n1.fleet.", RecordType::A)),
                Err(FormErr),
            ),
            (
                "a set's deletion with data",
                in_class(DNSClass::ANY, add("n1.fleet.", 0, a(1))),
                Err(FormErr),
            ),
            (
                "a record's deletion with a TTL",
                in_class(DNSClass::NONE, add("n1.fleet.", 9, a(1))),
                Err(FormErr),
            ),
            (
                "a record's deletion of ANY",
                in_class(DNSClass::NONE, any("n1.fleet.", RecordType::ANY)),
                Err(FormErr),
            ),
            (
                "class CH",
                in_class(DNSClass::CH, add("n1.fleet.", 60, a(1))),
                Err(FormErr),
            ),
        ] {
            let scan = |records: &[Record]| prescan(&name("fleet."), records);
            assert_eq!(scan(&[good.clone(), record]), expected, "{what}");
        }
    }

    #[test]
    fn rfc2136_2_5_records_are_added_and_sets_names_and_single_records_deleted() {
        for (what, updates, expected) in [
            (
                "an addition",
                vec![add("N1.fleet.", 60, a(3))],
                vec!["A 1", "A 2", "A 3", "TXT x"],
            ),
            ("a set", vec![any("n1.fleet.", RecordType::A)], vec!["TXT x"]),
            ("a name", vec![any("n1.fleet.", RecordType::ANY)], vec![]),
            ("a record", vec![none("n1.fleet.", a(2))], vec!["A 1", "TXT x"]),
            (
                "the last of a set",
                vec![none("n1.fleet.", a(1)), none("n1.fleet.", a(2))],
                vec!["TXT x"],
            ),
            (
                "in the order of the message",
                vec![
                    any("n1.fleet.", RecordType::ANY),
                    add("n1.fleet.", 60, a(9)),
                    add("n1.fleet.", 60, a(8)),
                ],
                vec!["A 8", "A 9"],
            ),
            (
                "an addition that is taken back",
                vec![add("n1.fleet.", 60, a(9)), any("n1.fleet.", RecordType::ANY)],
                vec![],
            ),
        ] {
            let outcome = outcome(&data(), &updates);
            assert_eq!(outcome.len(), 1, "{what}");
            assert_eq!(shown(&outcome[&name("n1.fleet.")]), expected, "{what}");
        }
    }

    #[test]
    fn what_ends_as_it_began_is_no_change() {
        for (what, updates) in [
            ("nothing", vec![]),
            ("what is there", vec![add("n1.fleet.", 60, a(1))]),
            (
                "what is not there",
                vec![any("n9.fleet.", RecordType::ANY), none("n1.fleet.", a(9))],
            ),
            (
                "deleted and added in another order",
                vec![
                    any("n1.fleet.", RecordType::A),
                    add("n1.fleet.", 60, a(2)),
                    add("n1.fleet.", 60, a(1)),
                ],
            ),
            (
                "added and deleted",
                vec![add("n9.fleet.", 60, a(1)), any("n9.fleet.", RecordType::A)],
            ),
            (
                "data that no record has",
                vec![in_class(DNSClass::NONE, any("n1.fleet.", RecordType::A))],
            ),
        ] {
            assert!(outcome(&data(), &updates).is_empty(), "{what}");
        }
    }

    #[test]
    fn another_ttl_is_a_change_and_one_for_the_whole_set() {
        let outcome = outcome(&data(), &[add("n1.fleet.", 90, a(1))]);
        let set = &outcome[&name("n1.fleet.")][&RecordType::A];
        assert_eq!((set.ttl, set.data.len()), (90, 2));
    }

    #[test]
    fn rfc2136_3_4_2_2_an_alias_and_other_records_do_not_meet() {
        for (what, updates) in [
            ("an alias beside records", vec![add("n1.fleet.", 60, alias("x.fleet."))]),
            ("a record beside an alias", vec![add("alias.fleet.", 60, a(1))]),
        ] {
            assert!(outcome(&data(), &updates).is_empty(), "{what}");
        }
        let replaced = outcome(&data(), &[add("alias.fleet.", 60, alias("n2.fleet."))]);
        assert_eq!(shown(&replaced[&name("alias.fleet.")]), ["CNAME n2.fleet."]);
        let instead = [any("alias.fleet.", RecordType::CNAME), add("alias.fleet.", 60, a(1))];
        assert_eq!(shown(&outcome(&data(), &instead)[&name("alias.fleet.")]), ["A 1"]);
    }

    #[test]
    fn rfc2136_3_4_2_2_a_soa_is_replaced_by_a_later_one_at_the_apex_only() {
        let soa = |serial| RData::SOA(SOA::new(name("m."), name("r."), serial, 1, 1, 1, 1));
        for serial in [7, 6, 7_u32.wrapping_add(1 << 31)] {
            assert!(
                outcome(&data(), &[add("fleet.", 60, soa(serial))]).is_empty(),
                "{serial}"
            );
        }
        assert!(outcome(&data(), &[add("n9.fleet.", 60, soa(8))]).is_empty());
        let later = outcome(&data(), &[add("fleet.", 60, soa(8))]);
        let set = &later[&name("fleet.")][&RecordType::SOA];
        assert_eq!(set.data, [soa(8)]);
    }

    #[test]
    fn rfc2136_3_4_2_3_soa_and_the_last_name_server_of_the_apex_stay() {
        let ns = |server: &str| RData::NS(NS(name(server)));
        let soa = data().sets(&name("fleet.")).expect("the apex")[&RecordType::SOA].data[0].clone();
        for (what, updates) in [
            ("SOA", vec![any("fleet.", RecordType::SOA)]),
            ("one SOA", vec![none("fleet.", soa)]),
            ("NS", vec![any("fleet.", RecordType::NS)]),
            (
                "the last NS",
                vec![none("fleet.", ns("ns1.fleet.")), none("fleet.", ns("ns2.fleet."))],
            ),
            ("all", vec![any("fleet.", RecordType::ANY)]),
        ] {
            let outcome = outcome(&data(), &updates);
            let after = outcome.get(&name("fleet.")).cloned();
            let after = after.unwrap_or_else(|| data().sets(&name("fleet.")).expect("the apex").clone());
            assert!(
                after.contains_key(&RecordType::SOA) && after.contains_key(&RecordType::NS),
                "{what}"
            );
            assert_eq!(after.contains_key(&RecordType::TXT), what != "all", "{what}");
        }
        let one = outcome(&data(), &[none("fleet.", ns("NS1.fleet."))]);
        assert_eq!(one[&name("fleet.")][&RecordType::NS].data, [ns("ns2.fleet.")]);
        let below = outcome(&data(), &[add("n1.fleet.", 60, ns("x.")), none("n1.fleet.", ns("x."))]);
        assert!(below.is_empty(), "only those of the apex stay");
    }

    /// Apex with two name servers and a TXT; n1 with A 1, A 2 (60 s) and a TXT; an alias; x.b.
    fn data() -> Data {
        let mut data = Data::new(&name("fleet."), Sets::new());
        let soa = SOA::new(name("ns1.fleet."), name("h.fleet."), 7, 1, 1, 1, 1);
        data.insert(&name("fleet."), 60, RData::SOA(soa));
        for server in ["ns1.fleet.", "ns2.fleet."] {
            data.insert(&name("fleet."), 60, RData::NS(NS(name(server))));
        }
        for owner in ["fleet.", "n1.fleet."] {
            data.insert(&name(owner), 60, RData::TXT(TXT::new(vec!["x".to_owned()])));
        }
        data.insert(&name("n1.fleet."), 60, a(1));
        data.insert(&name("n1.fleet."), 60, a(2));
        data.insert(&name("alias.fleet."), 60, alias("n1.fleet."));
        data.insert(&name("x.b.fleet."), 60, a(1));
        data
    }

    fn shown(sets: &Sets) -> Vec<String> {
        let records = sets.values().flat_map(|set| &set.data);
        let mut shown: Vec<_> = records
            .map(|data| match data {
                RData::A(address) => format!("A {}", address.octets()[3]),
                other => format!("{} {other}", other.record_type()),
            })
            .collect();
        shown.sort();
        shown
    }

    fn a(last: u8) -> RData {
        RData::A(A::new(192, 0, 2, last))
    }

    fn alias(target: &str) -> RData {
        RData::CNAME(CNAME(name(target)))
    }

    fn add(owner: &str, ttl: u32, data: RData) -> Record {
        Record::from_rdata(name(owner), ttl, data)
    }

    fn any(owner: &str, kind: RecordType) -> Record {
        in_class(DNSClass::ANY, Record::update0(name(owner), 0, kind))
    }

    fn none(owner: &str, data: RData) -> Record {
        in_class(DNSClass::NONE, add(owner, 0, data))
    }

    fn in_class(class: DNSClass, mut record: Record) -> Record {
        record.dns_class = class;
        record
    }

    fn name(text: &str) -> Name {
        Name::from_ascii(text).expect("a name")
    }
}
