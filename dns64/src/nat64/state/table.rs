//! Bindings and sessions together: what a packet finds, makes and renews, and what ends when its time has come.

use std::{
    hash::Hasher,
    net::{Ipv4Addr, Ipv6Addr},
    sync::atomic::AtomicU64,
};

use siphasher::sip::SipHasher13;

use super::{
    Filtering, Fixed, Policy, Protocol,
    index::Index,
    ports::{Holding, NONE, Pool},
    records::{self, Binding, Records, Session},
    tcp::{self, Lifetime, Segment, Side, TcpState},
    wheel::Wheel,
};
use crate::nat64::{DropReason, Problem, Refusal};

/// Hosts that there are bindings of at once.
const HOSTS: usize = 1 << 16;

/// The state of a translator. Bindings and sessions lie in memory that outlives it; all else is made from them.
#[derive(Debug)]
pub struct Table {
    policy: Policy,
    records: Records,
    pool: Pool,
    /// What is private to this process about each binding that ever was.
    owners: Vec<Owner>,
    free_bindings: Numbers,
    by_v6: Index,
    /// For each address, protocol and port from the first of the pool on: the binding's number and one.
    by_v4: Box<[[Box<[u32]>; Protocol::COUNT]]>,
    /// Fixed bindings at ports outside the pool's ranges.
    outside: Vec<((Protocol, Ipv4Addr, u16), u32)>,
    free_sessions: Numbers,
    by_ends: Index,
    wheel: Wheel,
    /// Where it counts whom a binding has spoken to.
    remotes: Option<Remotes>,
    hosts: Hosts,
    random: Random,
    counts: Counts,
}

/// What there is, and what was refused for want of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Bindings that there are.
    pub bindings: u64,
    /// Sessions that there are.
    pub sessions: u64,
    /// Hosts that have ports, or had until a short while ago.
    pub hosts: u64,
    /// Bindings made since the start.
    pub bindings_made: u64,
    /// Sessions made since the start.
    pub sessions_made: u64,
}

/// A session as a user sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionView {
    /// Whose.
    pub binding: Binding,
    /// With whom.
    pub remote: (Ipv4Addr, u16),
    /// For TCP.
    pub state: Option<TcpState>,
    /// Milliseconds until it ends, if nothing comes.
    pub left: u64,
}

/// An established TCP session that nothing was heard of for two hours: its host is to be asked whether it still has it
/// (RFC 6146 §3.5.2.2, RFC 5382 REQ-5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The host.
    pub host: (Ipv6Addr, u16),
    /// With whom it spoke.
    pub remote: (Ipv4Addr, u16),
}

/// A packet that asks for a session, as the table sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub(super) protocol: Protocol,
    /// For TCP.
    pub(super) segment: Option<Segment>,
    /// Whether it may begin a session: no answer, nothing that comes in the middle of something.
    pub(super) begins: bool,
}

#[derive(Clone, Copy, Debug)]
struct Owner {
    host: u32,
    sessions: u32,
    /// Whether the binding stays without sessions, and lets everybody in.
    fixed: bool,
}

impl Owner {
    const NOBODY: Self = Self {
        host: NONE,
        sessions: 0,
        fixed: false,
    };
}

impl Table {
    /// Over `memory`, of at least [`Table::words`] words, which is zeros or what another process left; what of that the
    /// policy does not allow any more is forgotten. `seed` is secret: it decides which ports hosts get. `None` if the memory
    /// is too small.
    pub fn new(
        policy: Policy,
        memory: &'static [AtomicU64],
        bindings: usize,
        sessions: usize,
        seed: [u64; 2],
        now: u64,
    ) -> Option<Self> {
        let records = Records::new(memory, bindings, sessions)?;
        let pool = Pool::new(&policy.pool);
        let ports = |address: usize| {
            Protocol::ALL.map(|protocol| vec![0; pool.space(address, protocol).size()].into_boxed_slice())
        };
        let mut table = Self {
            by_v4: (0..pool.addresses().len()).map(ports).collect(),
            pool,
            outside: Vec::new(),
            remotes: (policy.filtering == Filtering::AddressDependent).then(|| Remotes::new(sessions)),
            policy,
            owners: Vec::with_capacity(bindings),
            free_bindings: Numbers::new(bindings),
            by_v6: Index::new(bindings),
            free_sessions: Numbers::new(sessions),
            by_ends: Index::new(sessions),
            wheel: Wheel::new(sessions, now),
            hosts: Hosts::new(HOSTS.min(bindings.max(1))),
            random: Random::new(seed),
            counts: Counts::default(),
            records,
        };
        table.recover(now);
        Some(table)
    }

    /// Words of memory for so many bindings and sessions, each less than 2^24.
    pub const fn words(bindings: usize, sessions: usize) -> usize {
        records::words(bindings, sessions)
    }

    /// How many sessions, and as many bindings, so many words are enough for.
    pub const fn fits(words: usize) -> usize {
        words.saturating_sub(Self::words(0, 0)) / (Self::words(1, 1) - Self::words(0, 0))
    }

    /// What there is.
    pub const fn counts(&self) -> Counts {
        self.counts
    }

    /// By what it decides.
    pub const fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Ports of a protocol that no host has, and how many there are.
    pub fn free_ports(&self, address: Ipv4Addr, protocol: Protocol) -> Option<(usize, usize)> {
        let space = self.pool.space(self.pool.find(address)?, protocol);
        Some((space.free(), space.size()))
    }

    /// Whether an address is of the pool.
    pub fn is_ours(&self, address: Ipv4Addr) -> bool {
        self.pool.find(address).is_some()
    }

    /// Whether a port of ours is some host's.
    pub(super) fn is_bound(&self, protocol: Protocol, ours: (Ipv4Addr, u16)) -> bool {
        self.binding_at(protocol, ours).is_some()
    }

    /// The addresses of the pool.
    pub fn addresses(&self) -> &[Ipv4Addr] {
        self.pool.addresses()
    }

    /// What a packet from a host is seen as (RFC 6146 §3.5.1 to §3.5.3), whose session it makes or renews.
    pub(super) fn outbound(
        &mut self,
        now: u64,
        asked: Asked,
        host: (Ipv6Addr, u16),
        remote: (Ipv4Addr, u16),
    ) -> Result<(Ipv4Addr, u16), Refusal> {
        let found = self.binding_of(asked.protocol, host);
        if let Some((number, binding)) = found {
            if let Some((session, record)) = self.session_of(number, remote) {
                self.renew(now, session, record, asked, Side::V6);
                return Ok(binding.v4);
            }
            if !asked.begins {
                // RFC 6146 §3.5.2.2, CLOSED: with a binding it goes on, and leaves nothing behind.
                return match self.policy.allows(remote.0) || self.is_ours(remote.0) {
                    true => Ok(binding.v4),
                    false => Err(Refusal::told(DropReason::Forbidden, Problem::Prohibited)),
                };
            }
        } else if !asked.begins {
            return Err(DropReason::NoSession.into());
        }
        if !self.policy.is_client(host.0) {
            return Err(DropReason::NotClient.into());
        }
        // RFC 6146 §3.5: such a packet would come back for ever.
        if self.policy.prefix.contains(host.0) {
            return Err(DropReason::Loop.into());
        }
        if !self.policy.allows(remote.0) && !self.is_ours(remote.0) {
            return Err(Refusal::told(DropReason::Forbidden, Problem::Prohibited));
        }
        let owner = match found {
            Some((number, _)) => self.owners[number as usize].host,
            None => self.host_of(now, host.0)?,
        };
        let allowed = self.may_begin(now, owner);
        if let Err(reason) = allowed {
            self.forget_host(owner);
            return Err(Refusal::told(reason, Problem::Prohibited));
        }
        let (number, binding) = match found {
            Some(found) => found,
            None => match self.bind(now, asked.protocol, host, owner) {
                Ok(made) => made,
                Err(reason) => {
                    self.forget_host(owner);
                    // RFC 6146 §3.5.1.1: the host may try elsewhere.
                    return Err(Refusal::told(reason, Problem::Address));
                }
            },
        };
        let state = asked.segment.map(|_| TcpState::V6Init);
        self.begin(now, number, remote, asked.protocol, state);
        Ok(binding.v4)
    }

    /// Which host a packet to `ours` is for (RFC 6146 §3.5.1 to §3.5.3). `hairpin` if it comes from a host of ours.
    pub(super) fn inbound(
        &mut self,
        now: u64,
        asked: Asked,
        ours: (Ipv4Addr, u16),
        remote: (Ipv4Addr, u16),
        hairpin: bool,
    ) -> Result<(Ipv6Addr, u16), Refusal> {
        // Who says that he is us is not.
        if !hairpin && self.is_ours(remote.0) {
            return Err(DropReason::Spoofed.into());
        }
        let Some((number, binding)) = self.binding_at(asked.protocol, ours) else {
            return Err(Refusal::told(DropReason::NoBinding, Problem::Port));
        };
        if let Some((session, record)) = self.session_of(number, remote) {
            self.renew(now, session, record, asked, Side::V4);
            return Ok(binding.v6);
        }
        if !asked.begins {
            return Err(DropReason::NoSession.into());
        }
        if !hairpin && !self.policy.allows(remote.0) {
            return Err(DropReason::Forbidden.into());
        }
        let Owner { host: owner, fixed, .. } = self.owners[number as usize];
        if !fixed && !self.knows(number, remote.0) {
            // RFC 6146 §3.5.1.2, RFC 5508 REQ-3.
            return Err(Refusal::told(DropReason::Filtered, Problem::Prohibited));
        }
        if !fixed && !self.policy.inbound_new && asked.protocol != Protocol::Udp {
            return Err(DropReason::Unsolicited.into());
        }
        self.may_begin(now, owner)?;
        let state = asked.segment.map(|_| TcpState::V4Init);
        self.begin(now, number, remote, asked.protocol, state);
        Ok(binding.v6)
    }

    /// As what a host is seen by `remote`, if there is a session; nothing changes.
    pub(super) fn seen_as(
        &self,
        protocol: Protocol,
        host: (Ipv6Addr, u16),
        remote: (Ipv4Addr, u16),
    ) -> Option<(Ipv4Addr, u16)> {
        let (number, binding) = self.binding_of(protocol, host)?;
        self.session_of(number, remote).map(|_| binding.v4)
    }

    /// Which host `remote` speaks with at `ours`, if there is a session; nothing changes.
    pub(super) fn host_at(
        &self,
        protocol: Protocol,
        ours: (Ipv4Addr, u16),
        remote: (Ipv4Addr, u16),
    ) -> Option<(Ipv6Addr, u16)> {
        let (number, binding) = self.binding_at(protocol, ours)?;
        self.session_of(number, remote).map(|_| binding.v6)
    }

    /// Ends what has had its time by `now`, and frees ports that have rested: at most `most` sessions, so that no packet waits
    /// long for it. Established TCP sessions are given to `probe` and live on for 4 minutes. True if there is more to do.
    pub fn expire(&mut self, now: u64, most: usize, mut probe: impl FnMut(Probe)) -> bool {
        for _ in 0..most {
            let Some(number) = self.wheel.due(now) else {
                self.free_rested(now);
                return false;
            };
            let Some(mut session) = self.records.session(number) else {
                continue;
            };
            if session.deadline > now {
                self.wheel.insert(number, session.deadline);
                continue;
            }
            let idle = matches!(
                TcpState::of(session.state),
                Some(TcpState::Established | TcpState::V4Fin | TcpState::V6Fin)
            );
            if idle {
                session.state = TcpState::Transitory as u8;
                session.deadline = now.saturating_add(self.policy.lifetimes.tcp_transitory);
                self.records.renew_session(number, &session);
                self.wheel.insert(number, session.deadline);
                if let Some(binding) = self.records.binding(session.binding) {
                    probe(Probe {
                        host: binding.v6,
                        remote: session.remote,
                    });
                }
            } else {
                self.end(now, number, &session);
            }
        }
        true
    }

    /// Sessions from number `from` on, and the number to go on with; at most `most` numbers are looked at.
    pub fn sessions(&self, now: u64, from: u32, most: u32, mut each: impl FnMut(SessionView)) -> Option<u32> {
        let (_, reached) = self.records.reached();
        let end = reached.min(from.saturating_add(most));
        for number in from..end {
            let session = self.records.session(number);
            let view = session.and_then(|session| {
                let binding = self.records.binding(session.binding)?;
                Some(SessionView {
                    binding,
                    remote: session.remote,
                    state: TcpState::of(session.state),
                    left: session.deadline.saturating_sub(now),
                })
            });
            view.into_iter().for_each(&mut each);
        }
        (end < reached).then_some(end)
    }

    /// Takes over what the records hold.
    fn recover(&mut self, now: u64) {
        let (bindings, sessions) = self.records.reached();
        for number in 0..bindings {
            let Some(binding) = self.records.binding(number) else {
                self.free_bindings.was_used(number, false);
                continue;
            };
            let taken = self.take_over(now, number, &binding);
            self.free_bindings.was_used(number, taken);
            if !taken {
                self.records.end_binding(number);
            }
        }
        for number in 0..sessions {
            let Some(session) = self.records.session(number) else {
                self.free_sessions.was_used(number, false);
                continue;
            };
            let binding = self.records.binding(session.binding);
            let allowed = binding.is_some_and(|binding| {
                self.owners
                    .get(session.binding as usize)
                    .is_some_and(|owner| owner.host != NONE)
                    && (self.policy.allows(session.remote.0) || self.is_ours(session.remote.0))
                    && (binding.protocol == Protocol::Tcp) == TcpState::of(session.state).is_some()
                    && self.session_of(session.binding, session.remote).is_none()
            });
            self.free_sessions.was_used(number, allowed);
            if allowed {
                self.stand(number, &session);
            } else {
                self.records.end_session(number);
            }
        }
        // Only now: a session of what was not taken over must not find another binding under its number.
        for fixed in self.policy.fixed.clone() {
            self.fix(now, &fixed);
        }
        for number in 0..bindings {
            let unused = |owner: &Owner| owner.host != NONE && owner.sessions == 0 && !owner.fixed;
            if self.owners.get(number as usize).is_some_and(unused) {
                self.unbind(now, number);
            }
        }
    }

    /// Takes a binding over; false if it is not possible any more.
    fn take_over(&mut self, now: u64, number: u32, binding: &Binding) -> bool {
        let own = self
            .policy
            .fixed
            .iter()
            .find(|fixed| fixed.protocol == binding.protocol && (fixed.v4 == binding.v4 || fixed.v6 == binding.v6));
        let known = match own {
            // Another host's, or another port's: the fixed one goes before.
            Some(fixed) => (fixed.v4, fixed.v6) == (binding.v4, binding.v6),
            None => self.policy.is_client(binding.v6.0),
        };
        let known = known
            && self.binding_of(binding.protocol, binding.v6).is_none()
            && self.binding_at(binding.protocol, binding.v4).is_none();
        let own = own.is_some();
        let Some(address) = self.pool.find(binding.v4.0).filter(|_| known) else {
            return false;
        };
        let Ok(owner) = self.host_of(now, binding.v6.0) else {
            return false;
        };
        let space = self.pool.space_mut(address, binding.protocol);
        let host = &mut self.hosts.all[owner as usize];
        // What a host has comes from one address, but for what is fixed.
        if host.bindings == 0 {
            host.address = address as u32;
        }
        let holding = &mut host.holdings[binding.protocol as usize];
        let fits = match own {
            true => space.claim(binding.v4.1, owner, holding) || !space.contains(binding.v4.1),
            false => host.address == address as u32 && space.claim(binding.v4.1, owner, holding),
        };
        if !fits {
            self.forget_host(owner);
            return false;
        }
        self.known(number, binding, address, owner, own);
        true
    }

    /// Makes a fixed binding, unless there is one for that port.
    fn fix(&mut self, now: u64, fixed: &Fixed) {
        let taken =
            self.binding_of(fixed.protocol, fixed.v6).is_some() || self.binding_at(fixed.protocol, fixed.v4).is_some();
        let binding = Binding {
            protocol: fixed.protocol,
            v6: fixed.v6,
            v4: fixed.v4,
            made: (now / 1000) as u32,
        };
        let Some(number) = (!taken).then(|| self.free_bindings.take()).flatten() else {
            return;
        };
        if self.take_over(now, number, &binding) {
            self.records.reach_binding(self.free_bindings.reached);
            self.records.add_binding(number, &binding);
        } else {
            self.free_bindings.give(number);
        }
    }

    /// A binding of a host that has none for that port yet (RFC 6146 §3.5.1.1).
    fn bind(
        &mut self,
        now: u64,
        protocol: Protocol,
        host: (Ipv6Addr, u16),
        owner: u32,
    ) -> Result<(u32, Binding), DropReason> {
        if self.free_sessions.is_empty() {
            return Err(DropReason::Full);
        }
        let size = u32::from(self.pool.block);
        let most = self.policy.bindings_per_host.div_ceil(size);
        let (has, random) = (&mut self.hosts.all[owner as usize], &mut self.random);
        if has.bindings >= self.policy.bindings_per_host {
            return Err(DropReason::Quota);
        }
        let address = has.address as usize;
        let holding = &mut has.holdings[protocol as usize];
        if self.free_bindings.is_empty() {
            return Err(DropReason::Full);
        }
        let space = self.pool.space_mut(address, protocol);
        let Some(port) = space.take(owner, holding, most, || random.next()) else {
            return Err(if holding.blocks >= most {
                DropReason::Quota
            } else {
                DropReason::Exhausted
            });
        };
        let number = self.free_bindings.take().ok_or(DropReason::Full)?;
        let binding = Binding {
            protocol,
            v6: host,
            v4: (self.pool.addresses()[address], port),
            made: (now / 1000) as u32,
        };
        self.records.reach_binding(self.free_bindings.reached);
        self.records.add_binding(number, &binding);
        self.known(number, &binding, address, owner, false);
        self.counts.bindings_made += 1;
        Ok((number, binding))
    }

    fn known(&mut self, number: u32, binding: &Binding, address: usize, owner: u32, fixed: bool) {
        let place = number as usize;
        if self.owners.len() <= place {
            self.owners.resize(place + 1, Owner::NOBODY);
        }
        self.owners[place] = Owner {
            host: owner,
            sessions: 0,
            fixed,
        };
        self.by_v6
            .insert(self.random.of_host(binding.protocol, binding.v6), number);
        match self.place_of(address, binding) {
            Some(place) => *place = number + 1,
            None => self
                .outside
                .push(((binding.protocol, binding.v4.0, binding.v4.1), number)),
        }
        self.hosts.all[owner as usize].bindings += 1;
        self.counts.bindings += 1;
    }

    /// Where the number of a binding stands, unless its port is outside the pool's range.
    fn place_of(&mut self, address: usize, binding: &Binding) -> Option<&mut u32> {
        let first = self.pool.space(address, binding.protocol).first();
        let place = binding.v4.1.checked_sub(first)?;
        self.by_v4[address][binding.protocol as usize].get_mut(usize::from(place))
    }

    fn unbind(&mut self, now: u64, number: u32) {
        let Some(binding) = self.records.binding(number) else {
            return;
        };
        self.records.end_binding(number);
        self.by_v6
            .remove(self.random.of_host(binding.protocol, binding.v6), number);
        let owner = self.owners[number as usize].host;
        self.owners[number as usize].host = NONE;
        if let Some(address) = self.pool.find(binding.v4.0) {
            let space = self.pool.space_mut(address, binding.protocol);
            let host = &mut self.hosts.all[owner as usize];
            host.bindings -= 1;
            space.give_back(now, binding.v4.1, &mut host.holdings[binding.protocol as usize]);
            if let Some(place) = self.place_of(address, &binding) {
                *place = 0;
            }
        }
        self.free_bindings.give(number);
        self.counts.bindings -= 1;
    }

    /// Makes a session; there is room.
    fn begin(&mut self, now: u64, binding: u32, remote: (Ipv4Addr, u16), protocol: Protocol, state: Option<TcpState>) {
        let Some(number) = self.free_sessions.take() else {
            return;
        };
        let lifetimes = &self.policy.lifetimes;
        let lifetime = match protocol {
            Protocol::Tcp => lifetimes.tcp_transitory,
            Protocol::Udp => lifetimes.udp,
            Protocol::Icmp => lifetimes.icmp,
        };
        let session = Session {
            binding,
            remote,
            state: state.map_or(0, |state| state as u8),
            deadline: now.saturating_add(lifetime),
        };
        self.records.reach_session(self.free_sessions.reached);
        self.records.add_session(number, &session);
        self.stand(number, &session);
        self.counts.sessions_made += 1;
    }

    fn stand(&mut self, number: u32, session: &Session) {
        self.by_ends
            .insert(self.random.of_ends(session.binding, session.remote), number);
        self.wheel.insert(number, session.deadline);
        if let Some(remotes) = &mut self.remotes {
            let hash = self.random.of_ends(session.binding, (session.remote.0, 0));
            remotes.add(hash, session.binding, session.remote.0);
        }
        let owner = &mut self.owners[session.binding as usize];
        owner.sessions += 1;
        self.hosts.all[owner.host as usize].sessions += 1;
        self.counts.sessions += 1;
    }

    /// Ends a session that the wheel does not hold, and its binding if that was its last.
    fn end(&mut self, now: u64, number: u32, session: &Session) {
        self.records.end_session(number);
        self.by_ends
            .remove(self.random.of_ends(session.binding, session.remote), number);
        self.free_sessions.give(number);
        if let Some(remotes) = &mut self.remotes {
            let hash = self.random.of_ends(session.binding, (session.remote.0, 0));
            remotes.remove(hash, session.binding, session.remote.0);
        }
        self.counts.sessions -= 1;
        let owner = &mut self.owners[session.binding as usize];
        owner.sessions -= 1;
        let last = owner.sessions == 0 && !owner.fixed;
        self.hosts.all[owner.host as usize].sessions -= 1;
        if last {
            self.unbind(now, session.binding);
        }
    }

    /// What a packet does to a session that there is.
    fn renew(&mut self, now: u64, number: u32, mut session: Session, asked: Asked, side: Side) {
        let lifetimes = &self.policy.lifetimes;
        let lifetime = match (asked.protocol, asked.segment, TcpState::of(session.state)) {
            (Protocol::Tcp, Some(segment), Some(state)) => {
                let (next, lifetime) = tcp::step(state, side, segment);
                session.state = next as u8;
                match lifetime {
                    Lifetime::Keep => None,
                    Lifetime::Transitory => Some(lifetimes.tcp_transitory),
                    Lifetime::Established => Some(lifetimes.tcp_established),
                }
            }
            (Protocol::Udp, ..) => Some(lifetimes.udp),
            (Protocol::Icmp, ..) => Some(lifetimes.icmp),
            (Protocol::Tcp, ..) => None,
        };
        let deadline = lifetime.map_or(session.deadline, |lifetime| now.saturating_add(lifetime));
        let sooner = deadline < session.deadline;
        session.deadline = deadline;
        self.records.renew_session(number, &session);
        // Later, the wheel finds out by itself.
        if sooner {
            self.wheel.remove(number);
            self.wheel.insert(number, deadline);
        }
    }

    fn free_rested(&mut self, now: u64) {
        for address in 0..self.pool.addresses().len() {
            for protocol in Protocol::ALL {
                while let Some((block, owner)) = self.pool.space_mut(address, protocol).rested(now) {
                    let host = &mut self.hosts.all[owner as usize];
                    let holding = &mut host.holdings[protocol as usize];
                    self.pool.space_mut(address, protocol).release(block, holding);
                    self.forget_host(owner);
                }
            }
        }
    }

    fn binding_of(&self, protocol: Protocol, host: (Ipv6Addr, u16)) -> Option<(u32, Binding)> {
        let hash = self.random.of_host(protocol, host);
        let is = |binding: &Binding| binding.protocol == protocol && binding.v6 == host;
        let number = self
            .by_v6
            .find(hash, |number| self.records.binding(number).as_ref().is_some_and(is))?;
        Some((number, self.records.binding(number)?))
    }

    fn binding_at(&self, protocol: Protocol, ours: (Ipv4Addr, u16)) -> Option<(u32, Binding)> {
        let address = self.pool.find(ours.0)?;
        let place = ours.1.checked_sub(self.pool.space(address, protocol).first());
        let inside = place.and_then(|place| self.by_v4[address][protocol as usize].get(usize::from(place)));
        let number = match inside {
            Some(number) => number.checked_sub(1)?,
            None => {
                let wanted = (protocol, ours.0, ours.1);
                self.outside.iter().find(|(ends, _)| *ends == wanted)?.1
            }
        };
        Some((number, self.records.binding(number)?))
    }

    fn session_of(&self, binding: u32, remote: (Ipv4Addr, u16)) -> Option<(u32, Session)> {
        let hash = self.random.of_ends(binding, remote);
        let is = |session: &Session| session.binding == binding && session.remote == remote;
        let number = self
            .by_ends
            .find(hash, |number| self.records.session(number).as_ref().is_some_and(is))?;
        Some((number, self.records.session(number)?))
    }

    /// Whether a binding lets `remote` in, whatever its port.
    fn knows(&self, binding: u32, remote: Ipv4Addr) -> bool {
        let hash = self.random.of_ends(binding, (remote, 0));
        self.remotes
            .as_ref()
            .is_none_or(|remotes| remotes.find(hash, binding, remote).is_some())
    }

    /// Whether a host may begin one more session.
    fn may_begin(&mut self, now: u64, owner: u32) -> Result<(), DropReason> {
        if self.free_sessions.is_empty() {
            return Err(DropReason::Full);
        }
        let host = &mut self.hosts.all[owner as usize];
        if host.sessions >= self.policy.sessions_per_host {
            return Err(DropReason::Quota);
        }
        // A token is 1000 parts, of which `rate` come each millisecond.
        let rate = u64::from(self.policy.new_per_second);
        let came = now.saturating_sub(host.filled).saturating_mul(rate);
        host.parts = host.parts.saturating_add(came).min(rate.max(1) * 10_000);
        host.filled = now;
        match host.parts.checked_sub(1000) {
            Some(rest) => host.parts = rest,
            None => return Err(DropReason::Rate),
        }
        Ok(())
    }

    /// The host of an address, made if there is none.
    fn host_of(&mut self, now: u64, address: Ipv6Addr) -> Result<u32, Refusal> {
        let key = self.policy.host_key(address);
        let hash = self.random.of_key(key);
        if let Some(number) = self.hosts.find(hash, key) {
            return Ok(number);
        }
        let none = |reason| Refusal::told(reason, Problem::Address);
        let address = self.pool.roomiest().ok_or(none(DropReason::Exhausted))?;
        let host = Host {
            key,
            address: address as u32,
            bindings: 0,
            sessions: 0,
            holdings: Default::default(),
            parts: u64::from(self.policy.new_per_second.max(1)) * 10_000,
            filled: now,
        };
        let number = self.hosts.add(hash, host).ok_or(none(DropReason::Full))?;
        self.counts.hosts += 1;
        Ok(number)
    }

    /// Forgets a host that has nothing.
    fn forget_host(&mut self, number: u32) {
        let host = &self.hosts.all[number as usize];
        if host.bindings == 0 && host.holdings.iter().all(|holding| holding.blocks == 0) {
            let key = host.key;
            self.hosts.remove(self.random.of_key(key), number);
            self.counts.hosts -= 1;
        }
    }
}

impl Policy {
    fn host_key(&self, address: Ipv6Addr) -> u128 {
        let beyond = u128::MAX.checked_shr(self.host_bits.into()).unwrap_or(0);
        address.to_bits() & !beyond
    }
}

/// All that have ports.
#[derive(Debug)]
struct Hosts {
    all: Vec<Host>,
    index: Index,
    free: Numbers,
}

#[derive(Clone, Copy, Debug)]
struct Host {
    /// The bits of the address that make it one.
    key: u128,
    /// Of the pool, the one as which it is seen.
    address: u32,
    bindings: u32,
    sessions: u32,
    holdings: [Holding; Protocol::COUNT],
    /// Thousandths of sessions that it may begin now.
    parts: u64,
    /// When those were counted.
    filled: u64,
}

impl Hosts {
    fn new(most: usize) -> Self {
        Self {
            all: Vec::with_capacity(most),
            index: Index::new(most),
            free: Numbers::new(most),
        }
    }

    fn find(&self, hash: u32, key: u128) -> Option<u32> {
        self.index.find(hash, |number| self.all[number as usize].key == key)
    }

    fn add(&mut self, hash: u32, host: Host) -> Option<u32> {
        let number = self.free.take()?;
        match self.all.get_mut(number as usize) {
            Some(place) => *place = host,
            None => self.all.push(host),
        }
        self.index.insert(hash, number);
        Some(number)
    }

    fn remove(&mut self, hash: u32, number: u32) {
        self.index.remove(hash, number);
        self.free.give(number);
    }
}

/// With whom each binding has sessions, and how many (RFC 6146 §3.5.1.2: by address alone).
#[derive(Debug)]
struct Remotes {
    all: Vec<(u32, Ipv4Addr, u32)>,
    index: Index,
    free: Numbers,
}

impl Remotes {
    fn new(most: usize) -> Self {
        Self {
            all: Vec::with_capacity(most),
            index: Index::new(most),
            free: Numbers::new(most),
        }
    }

    fn find(&self, hash: u32, binding: u32, remote: Ipv4Addr) -> Option<u32> {
        let is = |number: u32| {
            let (of, address, _) = self.all[number as usize];
            (of, address) == (binding, remote)
        };
        self.index.find(hash, is)
    }

    fn add(&mut self, hash: u32, binding: u32, remote: Ipv4Addr) {
        if let Some(number) = self.find(hash, binding, remote) {
            self.all[number as usize].2 += 1;
            return;
        }
        // There are no more of them than sessions.
        let Some(number) = self.free.take() else { return };
        match self.all.get_mut(number as usize) {
            Some(place) => *place = (binding, remote, 1),
            None => self.all.push((binding, remote, 1)),
        }
        self.index.insert(hash, number);
    }

    fn remove(&mut self, hash: u32, binding: u32, remote: Ipv4Addr) {
        let Some(number) = self.find(hash, binding, remote) else {
            return;
        };
        let count = &mut self.all[number as usize].2;
        *count -= 1;
        if *count == 0 {
            self.index.remove(hash, number);
            self.free.give(number);
        }
    }
}

/// Which numbers from 0 on are free. Those that were used last are used first, so that little memory is touched.
#[derive(Debug)]
struct Numbers {
    free: Vec<u32>,
    /// From there on none was ever used.
    reached: u32,
    most: u32,
}

impl Numbers {
    fn new(most: usize) -> Self {
        Self {
            free: Vec::with_capacity(most),
            reached: 0,
            most: u32::try_from(most).unwrap_or(u32::MAX),
        }
    }

    fn is_empty(&self) -> bool {
        self.free.is_empty() && self.reached == self.most
    }

    fn take(&mut self) -> Option<u32> {
        self.free.pop().or_else(|| {
            let fresh = self.reached;
            (fresh < self.most).then(|| {
                self.reached += 1;
                fresh
            })
        })
    }

    fn give(&mut self, number: u32) {
        self.free.push(number);
    }

    /// Says of the next number whether it is in use.
    fn was_used(&mut self, number: u32, used: bool) {
        self.reached = number + 1;
        if !used {
            self.free.push(number);
        }
    }
}

/// Secret hashes and numbers.
#[derive(Debug)]
struct Random {
    seed: [u64; 2],
    drawn: u64,
}

impl Random {
    const fn new(seed: [u64; 2]) -> Self {
        Self { seed, drawn: 0 }
    }

    fn hasher(&self) -> SipHasher13 {
        SipHasher13::new_with_keys(self.seed[0], self.seed[1])
    }

    /// A number that nobody guesses who does not know the seed (RFC 6056 §3.3).
    fn next(&mut self) -> u32 {
        self.drawn += 1;
        let mut hasher = SipHasher13::new_with_keys(self.seed[1], self.seed[0]);
        hasher.write_u64(self.drawn);
        (hasher.finish() >> 32) as u32
    }

    fn of_host(&self, protocol: Protocol, host: (Ipv6Addr, u16)) -> u32 {
        let mut hasher = self.hasher();
        hasher.write_u128(host.0.to_bits());
        hasher.write_u32(u32::from(host.1) << 8 | protocol as u32);
        (hasher.finish() >> 32) as u32
    }

    fn of_ends(&self, binding: u32, remote: (Ipv4Addr, u16)) -> u32 {
        let mut hasher = self.hasher();
        hasher.write_u64(u64::from(remote.0.to_bits()) << 32 | u64::from(binding));
        hasher.write_u16(remote.1);
        (hasher.finish() >> 32) as u32
    }

    fn of_key(&self, key: u128) -> u32 {
        let mut hasher = self.hasher();
        hasher.write_u128(key);
        (hasher.finish() >> 32) as u32
    }
}
