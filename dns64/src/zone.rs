//! The names of nodes: an authoritative zone and its reverse zones, which nodes themselves keep up to date.
//!
//! [`tsig`] says who sent an update, [`Replay`] whether it was there before, [`Zone::update`] what it would change, and
//! once that [`Change`] is stored, [`Zone::apply`] makes it so:
//!
//! ```text
//! bytes -> tsig::verify -> Replay::check -> Zone::update -> (store) -> Zone::apply -> Reply::finish -> bytes
//! ```
//!
//! [`Updates`] goes this way with all zones and keys, and makes the responses. A request that comes twice, be it that its
//! answer was lost or that somebody recorded it, is carried out once and answered twice with the same bytes; one signed
//! before another that was carried out is BADTIME. That holds across restarts, since the time of a change is stored with it.
//!
//! Queries may be signed as well, and `nsupdate` signs the query by which it looks for the zone: its response must be
//! signed too, else the update is never sent.
//!
//! # What a node may do
//!
//! - Its key is good for its own name only, and there for AAAA, SSHFP and TXT, so many as [`Limits`] says. It has no
//!   aliases, delegations, wildcards or names below its own. What it deletes at its own name is its business.
//! - An address lies inside the zone's prefixes and belongs to one name. Whoever comes first has it until it lets it go
//!   or is removed: of two nodes that want the same one, the second is refused, with no effect. To take one's own address
//!   again, and to delete and add it in one message, is no change.
//! - The edge's names are nobody's: the apex, `ns`, `api`, and all that has static records.
//! - TTLs are cut to between [`SHORTEST_TTL`](policy::SHORTEST_TTL) and [`LONGEST_TTL`](policy::LONGEST_TTL) seconds.
//! - The reverse zones follow: each address has one PTR, with the TTL of its AAAA. A node may ask there for what is so
//!   already, and delete what is not there; it is told NOERROR. All else there is refused.
//! - An update that changes nothing is NOERROR: it raises no serial, and there is nothing to store. So is an empty one.
//! - A node with two keys may use either; they are one node. With the last key its records go ([`Zone::remove`]).
//!
//! The order of checks is that of RFC 2136 §3: the zone, the prerequisites, the form of all updates, then what is
//! permitted. So a node that is refused may have learnt that a prerequisite holds, which a query would have told it too.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
};

use hickory_proto::{
    op::{Message, OpCode, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordData, RecordType,
        rdata::{A, AAAA, HINFO, NS, PTR, SOA},
    },
};
use ipnet::Ipv6Net;

pub mod data;
pub mod keys;
pub mod memory;
pub mod policy;
pub mod replay;
pub mod state;
pub mod tsig;
pub mod update;
pub mod updates;

pub use keys::{Algorithm, Key, KeyError, Keys};
pub use memory::{Durable, Memory};
pub use policy::{Limits, Refused};
pub use replay::{Replay, Seen};
pub use state::{Change, NodeRecord, Owner, State};
pub use tsig::{Signed, Verdict};
pub use updates::{Step, Updates, Why};

use data::{Data, RrSet, Sets, insert};

/// Links of a chain of CNAMEs that are followed.
const LINKS: usize = 8;

/// What a zone is made of before any node has spoken.
#[derive(Clone, Debug)]
pub struct Config {
    /// The name of its apex.
    pub origin: Name,
    /// Where nodes have their addresses, and whose reverse zones are ours too. None overlaps another.
    pub prefixes: Vec<Ipv6Net>,
    /// The name of the server: SOA MNAME and NS. Clients send updates there.
    pub name_server: Name,
    /// SOA RNAME.
    pub contact: Name,
    /// TTL of the zone's own records in seconds.
    pub ttl: u32,
    /// Seconds that others may keep "no such name": as long a node that comes up may stay unknown.
    pub negative_ttl: u32,
    /// The edge's own names and what else nodes may not change.
    pub records: Vec<Record>,
    /// Names that nodes may not have though they hold no record.
    pub reserved: Vec<Name>,
    /// What a node may have.
    pub limits: Limits,
}

/// Why a configuration makes no zone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The root is not ours to serve.
    #[error("the root is no zone of nodes; choose a name such as \"fleet\"")]
    Root,
    /// A record of another zone.
    #[error("\"{0}\" lies outside the zone")]
    Elsewhere(Name),
    /// A type that has no place here, or not at this name.
    #[error("\"{name}\" cannot have a static {kind} record")]
    Kind {
        /// Of the record.
        name: Name,
        /// Of the record.
        kind: RecordType,
    },
    /// An alias beside other records, or two of them.
    #[error("\"{0}\" has a CNAME and other records; an alias stands alone")]
    Alias(Name),
    /// Two prefixes of which one holds the other.
    #[error("the prefixes {0} and {1} overlap; leave the longer one out")]
    Overlap(Ipv6Net, Ipv6Net),
}

/// Why a name cannot be that of a node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// Another zone's.
    #[error("\"{0}\" lies outside the zone")]
    Elsewhere(Name),
    /// The edge's.
    #[error("\"{0}\" is the edge's own name or has static records")]
    Reserved(Name),
    /// Not letters, digits and hyphens.
    #[error("\"{0}\" is no host name; use letters, digits and hyphens within a label")]
    Form(Name),
}

/// A change that was made from another state of the zone than the one it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the zone is at serial {is}, the change was made from {made_from}")]
pub struct Stale {
    /// The zone's serial.
    pub is: u32,
    /// The change's.
    pub made_from: u32,
}

/// A zone of nodes and its reverse zones.
///
/// To carry out several updates in one go, clone it, update and apply one after the other on the clone, store all changes,
/// then let the clone take its place.
#[derive(Clone, Debug)]
pub struct Zone {
    forward: Data,
    reverse: Vec<Data>,
    prefixes: Vec<Ipv6Net>,
    reserved: BTreeSet<Name>,
    limits: Limits,
    negative_ttl: u32,
    /// Who has an address, static records among them.
    holders: BTreeMap<Ipv6Addr, Name>,
    state: State,
    left_out: Vec<(Owner, Refused)>,
}

impl Config {
    /// A zone without records: its server is `ns`, its contact `hostmaster`, TTLs are 1800 s and 60 s.
    pub fn new(origin: &Name, prefixes: Vec<Ipv6Net>) -> Self {
        let origin = Owner::of(origin).name().clone();
        // A label that makes the name too long leaves the apex, which is reserved too.
        let below = |label: &str| origin.prepend_label(label).unwrap_or_else(|_| origin.clone());
        Self {
            name_server: below("ns"),
            contact: below("hostmaster"),
            reserved: vec![below("ns"), below("api"), below("hostmaster")],
            ttl: 1800,
            negative_ttl: 60,
            records: Vec::new(),
            limits: Limits::default(),
            prefixes,
            origin,
        }
    }

    /// Adds the addresses of `name`. The PTR of an address points to the first name that gets it: give the edge's own name
    /// before `ns` and `api`.
    #[must_use]
    pub fn with_addresses(mut self, name: &Name, addresses: &[IpAddr]) -> Self {
        let ttl = self.ttl;
        self.records.extend(addresses.iter().map(|address| {
            let data = match address {
                IpAddr::V4(address) => RData::A(A(*address)),
                IpAddr::V6(address) => RData::AAAA(AAAA(*address)),
            };
            Record::from_rdata(name.clone(), ttl, data)
        }));
        self
    }
}

impl Zone {
    /// The zone of `config` with what nodes have said before. Records in `state` that `config` does not permit any more
    /// are kept but not served; [`Zone::left_out`] has them.
    ///
    /// # Errors
    ///
    /// [`ConfigError`].
    pub fn new(config: &Config, state: State) -> Result<Self, ConfigError> {
        let origin = Owner::of(&config.origin).name().clone();
        if origin.is_root() {
            return Err(ConfigError::Root);
        }
        for (i, one) in config.prefixes.iter().enumerate() {
            let overlaps = |other: &&Ipv6Net| one.contains(*other) || other.contains(one);
            if let Some(other) = config.prefixes[..i].iter().find(overlaps) {
                return Err(ConfigError::Overlap(*other, *one));
            }
        }
        let server = Owner::of(&config.name_server).name().clone();
        let apex = |origin: &Name| {
            let serial = state.serials.get(&Owner::of(origin)).copied().unwrap_or(1);
            let mut sets = Sets::new();
            insert(&mut sets, config.ttl, RData::SOA(config.soa(serial)));
            insert(&mut sets, config.ttl, RData::NS(NS(server.clone())));
            sets
        };
        let mut zone = Self {
            forward: Data::new(&origin, apex(&origin)),
            reverse: config
                .prefixes
                .iter()
                .flat_map(reverse_origins)
                .map(|origin| Data::new(&origin, apex(&origin)))
                .collect(),
            prefixes: config.prefixes.clone(),
            reserved: config
                .reserved
                .iter()
                .map(|name| Owner::of(name).name().clone())
                .collect(),
            limits: config.limits,
            negative_ttl: config.negative_ttl,
            holders: BTreeMap::new(),
            state: State::default(),
            left_out: Vec::new(),
        };
        zone.reserved.extend([origin, server]);
        config
            .records
            .iter()
            .try_for_each(|record| zone.insert_static(record))?;
        zone.load(state);
        Ok(zone)
    }

    /// The name of the apex.
    pub fn origin(&self) -> &Name {
        self.forward.origin()
    }

    /// The zone itself, then its reverse zones: for show.
    pub fn zones(&self) -> impl Iterator<Item = &Data> {
        std::iter::once(&self.forward).chain(&self.reverse)
    }

    /// What is to be stored of it.
    pub const fn state(&self) -> &State {
        &self.state
    }

    /// Nodes of which records are stored that are not served, and why.
    pub fn left_out(&self) -> &[(Owner, Refused)] {
        &self.left_out
    }

    /// Whether `name` lies in it or in one of its reverse zones.
    pub fn contains(&self, name: &Name) -> bool {
        self.holding(name).is_some()
    }

    /// Whether `name` can be that of a node, that is, whether there can be a key for it.
    ///
    /// # Errors
    ///
    /// [`NodeError`].
    pub fn may_be_node(&self, name: &Name) -> Result<(), NodeError> {
        if !self.origin().zone_of(name) {
            return Err(NodeError::Elsewhere(name.clone()));
        }
        if self.reserved.contains(name) {
            return Err(NodeError::Reserved(name.clone()));
        }
        let is_label = |label: &[u8]| {
            label
                .iter()
                .all(|octet| octet.is_ascii_alphanumeric() || *octet == b'-')
                && label.first() != Some(&b'-')
                && label.last() != Some(&b'-')
        };
        if name.iter().all(is_label) {
            Ok(())
        } else {
            Err(NodeError::Form(name.clone()))
        }
    }

    /// The answer to a question of class IN; `None` if `name` lies in none of the zones.
    ///
    /// Chains of CNAMEs are followed while they stay in them. ANY gets one record that says nothing (RFC 8482 §4.2), AXFR
    /// and IXFR are refused.
    pub fn answer(&self, name: &Name, kind: RecordType) -> Option<crate::Answer> {
        let mut zone = self.holding(name)?;
        let mut answer = crate::Answer::empty(ResponseCode::NoError);
        if matches!(kind, RecordType::AXFR | RecordType::IXFR) {
            answer.code = ResponseCode::Refused;
            return Some(answer);
        }
        answer.authoritative = true;
        let mut name = name.clone();
        for _ in 0..=LINKS {
            let Some(sets) = zone.sets(&name) else {
                if !zone.has_below(&name) {
                    answer.code = ResponseCode::NXDomain;
                }
                answer.authorities.extend(self.negative(zone));
                return Some(answer);
            };
            if kind == RecordType::ANY {
                let data = RData::HINFO(HINFO::new("RFC8482".to_owned(), String::new()));
                answer.answers.push(Record::from_rdata(name, self.ttl(), data));
                return Some(answer);
            }
            if let Some(set) = sets.get(&kind) {
                answer.answers.extend(records(&name, set));
                answer.additionals.extend(self.addresses_of_servers(set));
                return Some(answer);
            }
            let Some(alias) = sets.get(&RecordType::CNAME) else {
                answer.authorities.extend(self.negative(zone));
                return Some(answer);
            };
            answer.answers.extend(records(&name, alias));
            let target = alias.data.iter().find_map(|data| match data {
                RData::CNAME(target) => Some(Owner::of(&target.0).name().clone()),
                _ => None,
            });
            match target.and_then(|target| Some((self.holding(&target)?, target))) {
                Some(next) => (zone, name) = next,
                None => return Some(answer),
            }
        }
        Some(answer)
    }

    /// What an update that was verified would change; `None` if nothing. The zone stays as it is.
    ///
    /// # Errors
    ///
    /// [`Refused`], with the code to answer.
    pub fn update(&self, request: &Message, signed: &Signed) -> Result<Option<Change>, Refused> {
        if request.metadata.op_code != OpCode::Update {
            return Err(ResponseCode::NotImp.into());
        }
        let origin = update::zone(request)?;
        let zone = self.zones().find(|zone| *zone.origin() == origin);
        let zone = zone.ok_or(ResponseCode::NotAuth)?;
        update::prerequisites(zone, &request.answers)?;
        update::prescan(zone.origin(), &request.authorities)?;
        if request.authorities.len() > policy::LONGEST_UPDATE {
            return Err(Refused::TooLong);
        }
        let node = signed.node.name();
        if origin != *self.origin() {
            return self.reverse_update(zone, node, &request.authorities);
        }

        let mut updates = request.authorities.clone();
        for update in &mut updates {
            self.may(node, update)?;
            if update.dns_class == DNSClass::IN {
                update.ttl = policy::ttl(update.ttl);
            }
        }
        let mut outcome = update::outcome(zone, &updates);
        let left_out = || self.left_out.iter().any(|(owner, _)| *owner == signed.node);
        let sets = match outcome.remove(node) {
            Some(sets) => sets,
            // What is kept and not served goes: what is served is all that the node has.
            None if !updates.is_empty() && left_out() => zone.sets(node).cloned().unwrap_or_default(),
            None => return Ok(None),
        };
        policy::count(&sets, self.limits)?;
        Ok(Some(self.change(
            &signed.node,
            &sets,
            Some((signed.key.clone(), signed.time)),
        )))
    }

    /// The change by which a node's name vanishes; `None` if it has no records.
    pub fn remove(&self, node: &Owner) -> Option<Change> {
        let known = self.state.nodes.contains_key(node);
        known.then(|| self.change(node, &Sets::new(), None))
    }

    /// Carries out what is stored.
    ///
    /// # Errors
    ///
    /// [`Stale`] if another change came between; nothing is changed then.
    pub fn apply(&mut self, change: Change) -> Result<(), Stale> {
        let is = self.forward.serial();
        if change.base != is || change.zone.name() != self.origin() {
            return Err(Stale {
                is,
                made_from: change.base,
            });
        }
        let node = change.node.name();
        if self.left_out.iter().any(|(owner, _)| owner.name() == node) {
            self.holders.retain(|_, holder| holder != node);
        }
        self.left_out.retain(|(node, _)| *node != change.node);
        self.set_node(change.node.name(), state::to_sets(&change.records));
        for zone in std::iter::once(&mut self.forward).chain(&mut self.reverse) {
            if let Some(serial) = change.serials.get(&Owner::of(zone.origin())) {
                zone.set_serial(*serial);
            }
        }
        self.state.apply(change);
        Ok(())
    }

    /// Forgets when a key signed last. Once the key is removed nothing that it signed is good.
    pub fn forget_key(&mut self, key: &Owner) {
        self.state.signed.remove(key);
    }

    /// Whether `node` may ask for `update` in the forward zone.
    fn may(&self, node: &Name, update: &Record) -> Result<(), Refused> {
        if self.reserved.contains(&update.name) {
            return Err(Refused::Reserved(update.name.clone()));
        }
        if update.name != *node {
            return Err(Refused::OtherName(update.name.clone()));
        }
        policy::permit(update)?;
        match &update.data {
            RData::AAAA(address) if update.dns_class == DNSClass::IN => self.may_have(node, address.0),
            _ => Ok(()),
        }
    }

    fn may_have(&self, node: &Name, address: Ipv6Addr) -> Result<(), Refused> {
        // A prefix's first address is the anycast address of its routers (RFC 4291 §2.6.1).
        let inside =
            |prefix: &Ipv6Net| prefix.contains(&address) && (prefix.network() != address || prefix.prefix_len() >= 127);
        if !self.prefixes.iter().any(inside) {
            return Err(Refused::Outside(address));
        }
        match self.holders.get(&address) {
            Some(holder) if holder != node => Err(Refused::Held {
                address,
                holder: holder.clone(),
            }),
            _ => Ok(()),
        }
    }

    /// An update of a reverse zone: good if it leaves all as it is and touches no other node's address.
    fn reverse_update(&self, zone: &Data, node: &Name, updates: &[Record]) -> Result<Option<Change>, Refused> {
        let mut updates = updates.to_vec();
        for update in &mut updates {
            if update.name == *zone.origin() {
                return Err(Refused::Reserved(update.name.clone()));
            }
            let present = zone.set(&update.name, RecordType::PTR);
            let own = RData::PTR(PTR(node.clone()));
            if present.is_some_and(|set| !set.has(&own)) {
                return Err(Refused::OtherName(update.name.clone()));
            }
            if let Some(set) = present
                && update.dns_class == DNSClass::IN
            {
                update.ttl = set.ttl;
            }
        }
        match update::outcome(zone, &updates).pop_first() {
            Some((name, _)) => Err(Refused::Reverse(name)),
            None => Ok(None),
        }
    }

    /// The change by which `sets` become all that `node` has.
    fn change(&self, node: &Owner, sets: &Sets, signed: Option<(Owner, u64)>) -> Change {
        let pointers = |sets: &Sets| -> BTreeSet<(Ipv6Addr, u32)> {
            let ttl = sets.get(&RecordType::AAAA).map_or(0, |set| set.ttl);
            state::addresses(sets).map(|address| (address, ttl)).collect()
        };
        let before = self.forward.sets(node.name()).map(&pointers).unwrap_or_default();
        let after = pointers(sets);
        let touched = |zone: &&Data| {
            let differs = |(address, _): &(Ipv6Addr, u32)| zone.origin().zone_of(&Name::from(*address));
            zone.origin() == self.origin() || before.symmetric_difference(&after).any(differs)
        };
        Change {
            zone: Owner::of(self.origin()),
            base: self.forward.serial(),
            node: node.clone(),
            records: state::to_records(sets),
            serials: self
                .zones()
                .filter(touched)
                .map(|zone| (Owner::of(zone.origin()), update::next_serial(zone.serial())))
                .collect(),
            signed,
        }
    }

    /// Makes `sets` all that `node` has, PTRs included.
    fn set_node(&mut self, node: &Name, sets: Sets) {
        let before: Vec<_> = self.forward.sets(node).into_iter().flat_map(state::addresses).collect();
        for address in before {
            self.holders.remove(&address);
            self.set_pointer(address, Sets::new());
        }
        let ttl = sets.get(&RecordType::AAAA).map_or(0, |set| set.ttl);
        for address in state::addresses(&sets) {
            self.holders.insert(address, node.clone());
            let mut pointer = Sets::new();
            insert(&mut pointer, ttl, RData::PTR(PTR(node.clone())));
            self.set_pointer(address, pointer);
        }
        self.forward.replace(node, sets);
    }

    fn set_pointer(&mut self, address: Ipv6Addr, mut sets: Sets) {
        let name = Name::from(address);
        for zone in &mut self.reverse {
            if zone.origin().zone_of(&name) {
                // A zone for one address only has its PTR at the apex.
                let apex = zone.sets(&name).into_iter().flatten();
                let apex = apex.filter(|(kind, _)| **kind != RecordType::PTR);
                sets.extend(apex.map(|(kind, set)| (*kind, set.clone())));
                zone.replace(&name, sets);
                return;
            }
        }
    }

    /// Serves what is stored, as far as it is still permitted. Two nodes cannot both have an address, but a static record
    /// may have taken it since.
    fn load(&mut self, state: State) {
        for (node, records) in &state.nodes {
            let refused = match self.may_be_node(node.name()) {
                Ok(()) => None,
                Err(NodeError::Reserved(name)) => Some(Refused::Reserved(name)),
                Err(NodeError::Elsewhere(name) | NodeError::Form(name)) => Some(Refused::OtherName(name)),
            };
            if let Some(refused) = refused {
                self.left_out.push((node.clone(), refused));
                // They stay its own: nobody may get them who would have to give them back.
                for address in state::addresses(&state::to_sets(records)) {
                    if self.may_have(node.name(), address).is_ok() {
                        self.holders.insert(address, node.name().clone());
                    }
                }
                continue;
            }
            let mut sets = state::to_sets(records);
            if let Some(set) = sets.get_mut(&RecordType::AAAA) {
                set.data.retain(|data| {
                    let RData::AAAA(address) = data else { return false };
                    let refused = self.may_have(node.name(), address.0).err();
                    self.left_out
                        .extend(refused.clone().map(|refused| (node.clone(), refused)));
                    refused.is_none()
                });
            }
            sets.retain(|_, set| !set.data.is_empty());
            self.set_node(node.name(), sets);
        }
        self.state = state;
    }

    fn insert_static(&mut self, record: &Record) -> Result<(), ConfigError> {
        let (name, kind) = (Owner::of(&record.name).name().clone(), record.record_type());
        if !self.origin().zone_of(&name) {
            return Err(ConfigError::Elsewhere(name));
        }
        let misplaced = matches!(kind, RecordType::SOA | RecordType::NS | RecordType::DNAME)
            || record.data.is_update()
            || name.is_wildcard();
        if misplaced {
            return Err(ConfigError::Kind { name, kind });
        }
        let present = self.forward.sets(&name);
        let alias = present.is_some_and(|sets| kind == RecordType::CNAME || sets.contains_key(&RecordType::CNAME));
        if alias {
            return Err(ConfigError::Alias(name));
        }
        if let RData::AAAA(address) = &record.data
            && !self.holders.contains_key(&address.0)
        {
            let mut pointer = Sets::new();
            insert(&mut pointer, record.ttl, RData::PTR(PTR(name.clone())));
            self.set_pointer(address.0, pointer);
            self.holders.insert(address.0, name.clone());
        }
        self.forward.insert(&name, record.ttl, record.data.clone());
        self.reserved.insert(name);
        Ok(())
    }

    /// The zone that `name` lies in. The reverse zones lie beside each other, and the forward zone holds none of them
    /// unless somebody names it `arpa`.
    fn holding(&self, name: &Name) -> Option<&Data> {
        self.zones()
            .filter(|zone| zone.origin().zone_of(name))
            .max_by_key(|zone| zone.origin().num_labels())
    }

    /// The SOA of a negative answer, with the TTL that the answer is good for (RFC 2308 §3).
    fn negative(&self, zone: &Data) -> Option<Record> {
        let (soa, ttl) = zone.soa()?;
        let data = RData::SOA(soa.clone());
        Some(Record::from_rdata(
            zone.origin().clone(),
            ttl.min(self.negative_ttl),
            data,
        ))
    }

    fn addresses_of_servers(&self, set: &RrSet) -> Vec<Record> {
        let servers = set.data.iter().filter_map(|data| match data {
            RData::NS(server) => Some(&server.0),
            _ => None,
        });
        let mut addresses = Vec::new();
        for server in servers {
            for kind in [RecordType::A, RecordType::AAAA] {
                addresses.extend(
                    self.forward
                        .set(server, kind)
                        .into_iter()
                        .flat_map(|set| records(server, set)),
                );
            }
        }
        addresses
    }

    fn ttl(&self) -> u32 {
        self.forward.soa().map_or(self.negative_ttl, |(_, ttl)| ttl)
    }
}

impl Config {
    fn soa(&self, serial: u32) -> SOA {
        // There are no secondaries that would read the times; these are what resolvers and checkers hold for sane.
        SOA::new(
            Owner::of(&self.name_server).name().clone(),
            Owner::of(&self.contact).name().clone(),
            serial,
            3600,
            600,
            604_800,
            self.negative_ttl,
        )
    }
}

/// The reverse zones of `prefix`: one, or as many as it takes if its length is no multiple of four bits.
fn reverse_origins(prefix: &Ipv6Net) -> Vec<Name> {
    let length = prefix.prefix_len().div_ceil(4) * 4;
    let parts = prefix.subnets(length).into_iter().flatten();
    parts
        .map(|part| Name::from(part.network()).trim_to(usize::from(length / 4) + 2))
        .collect()
}

fn records(name: &Name, set: &RrSet) -> impl Iterator<Item = Record> {
    set.data
        .iter()
        .map(move |data| Record::from_rdata(name.clone(), set.ttl, data.clone()))
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod vectors;
