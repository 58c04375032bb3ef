//! The records of one zone, by name and type.

use std::{collections::BTreeMap, ops::Bound};

use hickory_proto::rr::{Name, RData, RecordType, rdata::SOA};

/// All records at one name.
pub type Sets = BTreeMap<RecordType, RrSet>;

/// Records of one name and type. They share a TTL (RFC 2181 §5.2) and are a set: their order means nothing.
#[derive(Clone, Debug)]
pub struct RrSet {
    /// Seconds.
    pub ttl: u32,
    /// At least one, each once.
    pub data: Vec<RData>,
}

/// What one zone holds. Names are lower-case and in canonical order (RFC 4034 §6.1): what lies below a name follows it.
#[derive(Clone, Debug)]
pub struct Data {
    origin: Name,
    names: BTreeMap<Name, Sets>,
}

impl RrSet {
    /// Whether it has a record with just this data.
    pub fn has(&self, data: &RData) -> bool {
        self.data.contains(data)
    }

    /// Whether it has these records and no others, in any order (RFC 2136 §1.1.1: TTLs do not matter).
    pub fn holds(&self, data: &[&RData]) -> bool {
        data.iter().all(|one| self.has(one)) && self.data.iter().all(|one| data.contains(&one))
    }
}

impl PartialEq for RrSet {
    fn eq(&self, other: &Self) -> bool {
        self.ttl == other.ttl && self.data.len() == other.data.len() && self.data.iter().all(|record| other.has(record))
    }
}

/// Adds a record to those of a name. One with equal data is replaced, and the whole set takes its TTL.
pub fn insert(sets: &mut Sets, ttl: u32, data: RData) {
    let set = sets
        .entry(data.record_type())
        .or_insert_with(|| RrSet { ttl, data: Vec::new() });
    set.ttl = ttl;
    match set.data.iter_mut().find(|old| **old == data) {
        Some(old) => *old = data,
        None => set.data.push(data),
    }
}

impl Data {
    /// A zone whose apex has these records.
    pub fn new(origin: &Name, apex: Sets) -> Self {
        let origin = origin.to_lowercase();
        Self {
            names: BTreeMap::from([(origin.clone(), apex)]),
            origin,
        }
    }

    /// The name of its apex.
    pub fn origin(&self) -> &Name {
        &self.origin
    }

    /// The records at `name`; `None` if there is not one.
    pub fn sets(&self, name: &Name) -> Option<&Sets> {
        self.names.get(name)
    }

    /// Those of one type.
    pub fn set(&self, name: &Name, kind: RecordType) -> Option<&RrSet> {
        self.sets(name)?.get(&kind)
    }

    /// Whether a name below `name` has records: then `name` exists, be it empty (RFC 8020 §2).
    pub fn has_below(&self, name: &Name) -> bool {
        self.names
            .range((Bound::Excluded(name), Bound::Unbounded))
            .next()
            .is_some_and(|(next, _)| name.zone_of(next))
    }

    /// All names that have records, in canonical order.
    pub fn names(&self) -> impl Iterator<Item = (&Name, &Sets)> {
        self.names.iter()
    }

    /// Puts one more record at `name`.
    pub fn insert(&mut self, name: &Name, ttl: u32, data: RData) {
        insert(self.names.entry(name.to_lowercase()).or_default(), ttl, data);
    }

    /// Makes `sets` all that `name` has.
    pub fn replace(&mut self, name: &Name, sets: Sets) {
        if sets.is_empty() {
            self.names.remove(name);
        } else {
            self.names.insert(name.to_lowercase(), sets);
        }
    }

    /// The SOA and its TTL.
    pub fn soa(&self) -> Option<(&SOA, u32)> {
        let set = self.set(&self.origin, RecordType::SOA)?;
        set.data.iter().find_map(|data| match data {
            RData::SOA(soa) => Some((soa, set.ttl)),
            _ => None,
        })
    }

    /// The SOA's serial; 0, which no zone of ours has, if it has no SOA.
    pub fn serial(&self) -> u32 {
        self.soa().map_or(0, |(soa, _)| soa.serial)
    }

    /// Gives the SOA another serial.
    pub fn set_serial(&mut self, serial: u32) {
        let set = self
            .names
            .get_mut(&self.origin)
            .and_then(|sets| sets.get_mut(&RecordType::SOA));
        if let Some(RData::SOA(soa)) = set.and_then(|set| set.data.first_mut()) {
            soa.serial = serial;
        }
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::rdata::{A, TXT};

    use super::*;

    #[test]
    fn a_name_exists_while_a_name_below_it_has_records() {
        let mut data = Data::new(&name("fleet."), Sets::new());
        data.insert(&name("x.B.fleet."), 60, RData::A(A::new(192, 0, 2, 1)));
        data.insert(&name("bb.fleet."), 60, RData::A(A::new(192, 0, 2, 1)));
        assert!(data.has_below(&name("fleet.")));
        assert!(data.has_below(&name("b.fleet.")) && data.sets(&name("b.fleet.")).is_none());
        assert!(data.has_below(&name("B.fleet.")));
        assert!(!data.has_below(&name("x.b.fleet.")));
        assert!(!data.has_below(&name("a.fleet.")) && !data.has_below(&name("bb.fleet.")));
        data.replace(&name("X.b.fleet."), Sets::new());
        assert!(!data.has_below(&name("b.fleet.")));
    }

    #[test]
    fn records_of_one_type_are_a_set_with_one_ttl() {
        let text = |text: &str| RData::TXT(TXT::new(vec![text.to_owned()]));
        let (mut one, mut other) = (Sets::new(), Sets::new());
        insert(&mut one, 60, text("a"));
        insert(&mut one, 60, text("b"));
        insert(&mut one, 90, text("a"));
        insert(&mut other, 90, text("b"));
        insert(&mut other, 90, text("a"));
        assert_eq!(one, other);
        let set = &one[&RecordType::TXT];
        assert_eq!((set.ttl, set.data.len()), (90, 2));
        assert!(set.holds(&[&text("b"), &text("a"), &text("a")]));
        assert!(!set.holds(&[&text("b")]) && !set.holds(&[&text("a"), &text("b"), &text("c")]));
    }

    fn name(text: &str) -> Name {
        Name::from_ascii(text).expect("a name")
    }
}
