//! Fragments of packets that are translated by their ports: which ports, and what to do until they are known (RFC 6146 §3.4).
//!
//! Only the first fragment of a packet has its ports. [`Fragments`] remembers them for those that come after it, and keeps
//! copies of those that come before it. Nothing is put together: each fragment is translated as it is, and the receiver
//! does the rest (virtual reassembly, RFC 7915 §1.2). What no honest sender makes is refused, since it is made to have a
//! receiver see another packet than who watches it: fragments that overlap (RFC 5722), or too short for their ports.
//!
//! A packet is forgotten when all of it was seen, or 2 s after its first fragment came. Memory is taken once. When it is all
//! in use, what is oldest gives way: that of who has more than an eighth of it, as long as there is such a source.

mod memory;

use std::{
    hash::{Hash, Hasher},
    net::IpAddr,
};

use siphasher::sip::SipHasher13;

use super::{
    DropReason, Ports,
    ip::{Fragment, V6, checked_v4, checked_v6, protocol, word},
    transport,
};
use memory::{BLOCK, Blocks, Link, List, NOWHERE, Place, Slab};

/// Milliseconds for which an incomplete packet is remembered: what RFC 6146 §3.4 asks for at least.
const LIFETIME: u64 = 2000;
/// Fragments of one packet at most: 64 KiB over the 576 octets that every IPv4 link takes are 119.
const MOST_PIECES: usize = 128;
/// Sources are told apart by a keyed hash: two that share one share what is due to one, and nobody can choose with whom.
const SOURCES: usize = 1024;
/// The part of each kind of memory that a source has when others want it, too.
const SHARE: usize = 8;

/// Bounds of the memory of [`Fragments`], which is taken at its construction.
#[derive(Clone, Copy, Debug)]
pub struct FragmentLimits {
    /// Octets of fragments whose ports are not known yet; each counts up to the next 256.
    pub octets: usize,
    /// Incomplete packets; four times as many fragments of them are remembered.
    pub packets: usize,
}

impl Default for FragmentLimits {
    /// 256 KiB, 2048 packets; half a MiB in all.
    fn default() -> Self {
        Self {
            octets: 256 << 10,
            packets: 2048,
        }
    }
}

/// What to do with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Translate it, with these ports ([`Packet::with_ports`](super::Packet::with_ports)) if it is a later fragment; then
    /// what [`Fragments::released`] gives.
    Pass(Ports),
    /// Nothing now: there is a copy of it, which is released after the first fragment.
    Held,
    /// Count it and forget it.
    Refuse(DropReason),
}

/// The fragments of incomplete packets.
///
/// All packets pass [`seen`](Self::seen) before they are translated; those that are no fragments leave at once. Fragments
/// of other protocols than TCP and UDP do, too: ICMP ones are refused by the translator, others have no ports.
///
/// ```
/// use dns64::nat64::{Fragments, HEADROOM, FragmentLimits, Offload, Packet, Fate};
///
/// # fn read(_: &mut [u8]) -> Option<(u64, usize, Offload)> { None }
/// let mut fragments = Fragments::new(FragmentLimits::default(), [0x5ec2, 0xe7]);
/// let mut buffer = vec![0; HEADROOM + 65_535];
/// while let Some((now, length, mut offload)) = read(&mut buffer[HEADROOM..]) {
///     let mut next = match fragments.seen(now, &buffer[HEADROOM..HEADROOM + length]) {
///         Fate::Pass(ports) => Some((length, ports)),
///         Fate::Held => None,
///         Fate::Refuse(reason) => {
///             println!("dropped: {}", reason.as_str());
///             None
///         }
///     };
///     while let Some((length, ports)) = next {
///         let packet = Packet::new(&mut buffer, HEADROOM..HEADROOM + length, offload);
///         let packet = packet.expect("room in front").with_ports(ports);
///         // Translate it, and send what comes of it.
/// #       drop(packet);
///         offload = Offload::default();
///         next = fragments.released(&mut buffer[HEADROOM..]);
///     }
/// }
/// ```
pub struct Fragments {
    secret: [u64; 2],
    datagrams: Slab<Datagram>,
    pieces: Slab<Piece>,
    blocks: Blocks,
    /// Datagrams by the hash of their key, linked by `chain`.
    buckets: Box<[Place]>,
    /// All datagrams, the oldest first.
    ages: List,
    /// Those of which there are copies to release.
    ready: List,
    sources: Box<[Source]>,
    /// Sources that have more than their share of something: less than eight of each kind.
    greedy: Vec<usize>,
    /// What a source is due: the eighth part of each kind of memory.
    share: Used,
    lost: u64,
}

/// Numbers of datagrams, pieces and blocks.
type Used = [usize; 3];
const DATAGRAMS: usize = 0;
const PIECES: usize = 1;
const BLOCKS: usize = 2;

/// What one source has in memory.
#[derive(Clone, Copy, Debug, Default)]
struct Source {
    used: Used,
    datagrams: List,
    is_greedy: bool,
}

/// By what the fragments of a packet are known to be of one (RFC 791 §3.2, RFC 8200 §4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    id: u32,
}

/// A packet of which there was a fragment.
#[derive(Clone, Copy, Debug, Default)]
struct Datagram {
    key: Option<Key>,
    born: u64,
    chain: Place,
    age: Link,
    peers: Link,
    waiting: Link,
    is_ready: bool,
    /// Since the first fragment came.
    ports: Option<Ports>,
    /// Why all of it is refused.
    condemned: Option<DropReason>,
    /// Octets of the whole, since the last fragment came.
    end: Option<usize>,
    /// Octets that came.
    covered: usize,
    /// What came, by offset.
    pieces: Place,
    count: usize,
    /// What is held of it, in order of arrival.
    held: List,
}

/// A fragment that came.
#[derive(Clone, Copy, Debug, Default)]
struct Piece {
    offset: usize,
    end: usize,
    next: Place,
    /// Where its copy is, and the octets of it.
    copy: Place,
    length: usize,
    arrival: Link,
}

/// A fragment as it comes.
struct Part {
    key: Key,
    offset: usize,
    end: usize,
    more: bool,
    /// Of a first fragment.
    ports: Option<Ports>,
}

/// Where a piece belongs among others: behind this one, or at the head.
struct Spot(Place);

/// Whether a packet may be a fragment; all others have nothing to do with [`Fragments`]. IPv6 packets with extension headers,
/// which are few, count as such.
pub fn is_fragment(packet: &[u8]) -> bool {
    match packet.first().map(|first| first >> 4) {
        Some(4) => word(packet, 6).is_some_and(|flags| flags & 0x3fff != 0),
        Some(6) => packet.get(6).is_some_and(|next| {
            matches!(
                *next,
                protocol::HOP_BY_HOP | protocol::ROUTING | protocol::FRAGMENT | protocol::DESTINATION
            )
        }),
        _ => false,
    }
}

impl Fragments {
    /// With all of its memory. Whoever does not know the secret `seed` cannot aim at one source's share of it.
    pub fn new(limits: FragmentLimits, seed: [u64; 2]) -> Self {
        let (packets, blocks) = (limits.packets.max(1), limits.octets / BLOCK);
        Self {
            secret: seed,
            datagrams: Slab::new(packets),
            pieces: Slab::new(packets * 4),
            blocks: Blocks::new(blocks),
            buckets: vec![NOWHERE; packets * 2].into(),
            ages: List::default(),
            ready: List::default(),
            sources: vec![Source::default(); SOURCES].into(),
            greedy: Vec::with_capacity(3 * SHARE),
            share: [packets / SHARE, packets * 4 / SHARE, blocks / SHARE],
            lost: 0,
        }
    }

    /// What to do with `packet`, one whole IPv4 or IPv6 packet that came at `now`, in milliseconds of any clock that does not
    /// go back.
    pub fn seen(&mut self, now: u64, packet: &[u8]) -> Fate {
        self.forget_old(now);
        let taken = match Part::of(packet) {
            Ok(None) => Ok(Fate::Pass(Ports::None)),
            Ok(Some(part)) => self.take(now, &part, packet),
            Err(reason) => Err(reason),
        };
        taken.unwrap_or_else(Fate::Refuse)
    }

    /// The next packet that was held and may go now, written to the beginning of `into`: its length in octets, and its
    /// ports. It has nothing for a device to finish.
    ///
    /// What does not fit is lost: 65,535 octets always do.
    pub fn released(&mut self, into: &mut [u8]) -> Option<(usize, Ports)> {
        loop {
            let place = self.ready.first;
            if place == NOWHERE {
                return None;
            }
            let datagram = &mut self.datagrams[place];
            let (next, ports) = (datagram.held.first, datagram.ports.unwrap_or(Ports::None));
            datagram.held.remove(&mut self.pieces, next, |piece| &mut piece.arrival);
            let has_more = datagram.held.first != NOWHERE;
            let piece = &mut self.pieces[next];
            let (copy, length) = (std::mem::replace(&mut piece.copy, NOWHERE), piece.length);
            let source = self.source_of(place);
            self.count(source, BLOCKS, |used| used - length.div_ceil(BLOCK));
            let room = into.get_mut(..length);
            let fits = room.is_some();
            match room {
                Some(room) => self.blocks.give(copy, room),
                None => {
                    self.blocks.forget(copy);
                    self.lost += 1;
                }
            }
            if !has_more {
                self.unready(place);
                self.forget_complete(place);
            }
            if fits {
                return Some((length, ports));
            }
        }
    }

    /// Fragments that were held and never released: the first of their packet did not come within 2 s, it was refused as a
    /// whole, or others needed the room.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    fn take(&mut self, now: u64, part: &Part, packet: &[u8]) -> Result<Fate, DropReason> {
        let known = self.find(&part.key);
        let mut spot = Spot(NOWHERE);
        if let Some(place) = known {
            if let Some(reason) = self.datagrams[place].condemned {
                return Err(reason);
            }
            spot = match self.spot(place, part) {
                Ok(spot) => spot,
                Err(DropReason::FragmentOverlap) => return Err(self.condemn(place, DropReason::FragmentOverlap)),
                Err(reason) => return Err(reason),
            };
        }
        let ports = part.ports.or(known.and_then(|place| self.datagrams[place].ports));
        let blocks = match ports {
            Some(_) => 0,
            None => packet.len().div_ceil(BLOCK),
        };
        let wanted = [usize::from(known.is_none()), 1, blocks];
        let full = known.is_some_and(|place| self.datagrams[place].count >= MOST_PIECES);
        if full || !self.make_room(self.source(&part.key), wanted, known.unwrap_or(NOWHERE)) {
            // With a fragment missing, the others are of no use to anybody.
            return Err(match known {
                Some(place) => self.condemn(place, DropReason::FragmentsFull),
                None => DropReason::FragmentsFull,
            });
        }
        let place = known.or_else(|| self.open(now, part.key));
        let place = place.ok_or(DropReason::FragmentsFull)?;
        let copy = match ports {
            Some(_) => NOWHERE,
            None => self.blocks.keep(packet).ok_or(DropReason::FragmentsFull)?,
        };
        self.add(place, &spot, part, copy, packet.len());
        let datagram = &mut self.datagrams[place];
        datagram.ports = ports;
        let Some(ports) = ports else { return Ok(Fate::Held) };
        if datagram.held.first == NOWHERE {
            self.forget_complete(place);
        } else if !datagram.is_ready {
            datagram.is_ready = true;
            self.ready
                .push(&mut self.datagrams, place, |datagram| &mut datagram.waiting);
        }
        Ok(Fate::Pass(ports))
    }

    /// Where among the pieces of a datagram another belongs.
    fn spot(&self, place: Place, part: &Part) -> Result<Spot, DropReason> {
        let datagram = &self.datagrams[place];
        let (mut before, mut after) = (NOWHERE, datagram.pieces);
        while after != NOWHERE && self.pieces[after].offset < part.offset {
            (before, after) = (after, self.pieces[after].next);
        }
        let is_end = datagram.end == Some(part.end);
        if after != NOWHERE {
            let next = &self.pieces[after];
            if (next.offset, next.end) == (part.offset, part.end) && part.more != is_end {
                return Err(DropReason::FragmentDuplicate);
            }
        }
        let into_former = before != NOWHERE && self.pieces[before].end > part.offset;
        let into_next = after != NOWHERE && (self.pieces[after].offset < part.end || !part.more);
        let beyond = datagram.end.is_some_and(|end| part.end > end) || !part.more && datagram.end.is_some() && !is_end;
        if into_former || into_next || beyond {
            return Err(DropReason::FragmentOverlap);
        }
        Ok(Spot(before))
    }

    fn open(&mut self, now: u64, key: Key) -> Option<Place> {
        let bucket = self.bucket(&key);
        let place = self.datagrams.take(Datagram {
            key: Some(key),
            born: now,
            chain: self.buckets[bucket],
            pieces: NOWHERE,
            ..Datagram::default()
        })?;
        self.buckets[bucket] = place;
        self.ages.push(&mut self.datagrams, place, |datagram| &mut datagram.age);
        let source = self.source(&key);
        let peers = &mut self.sources[source].datagrams;
        peers.push(&mut self.datagrams, place, |datagram| &mut datagram.peers);
        self.count(source, DATAGRAMS, |used| used + 1);
        Some(place)
    }

    fn add(&mut self, place: Place, spot: &Spot, part: &Part, copy: Place, length: usize) {
        let datagram = &mut self.datagrams[place];
        let next = match spot.0 {
            NOWHERE => datagram.pieces,
            before => self.pieces[before].next,
        };
        let piece = self.pieces.take(Piece {
            offset: part.offset,
            end: part.end,
            next,
            copy,
            length,
            arrival: Link::default(),
        });
        let piece = piece.expect("there is room: make_room saw to it");
        match spot.0 {
            NOWHERE => datagram.pieces = piece,
            before => self.pieces[before].next = piece,
        }
        datagram.count += 1;
        datagram.covered += part.end - part.offset;
        if !part.more {
            datagram.end = Some(part.end);
        }
        let source = self.source(&part.key);
        self.count(source, PIECES, |used| used + 1);
        if copy != NOWHERE {
            let held = &mut self.datagrams[place].held;
            held.push(&mut self.pieces, piece, |piece| &mut piece.arrival);
            self.count(source, BLOCKS, |used| used + length.div_ceil(BLOCK));
        }
    }

    /// Has room for `wanted` more of `source`, by forgetting others, but never `current`. Whether there is.
    fn make_room(&mut self, source: usize, wanted: Used, current: Place) -> bool {
        loop {
            let free = [self.datagrams.free(), self.pieces.free(), self.blocks.free()];
            let Some(short) = (0..3).find(|kind| free[*kind] < wanted[*kind]) else {
                return true;
            };
            let greedy = |source: &usize| self.sources[*source].used[short] > self.share[short];
            let victim = if self.sources[source].used[short] + wanted[short] > self.share[short] {
                self.sources[source].datagrams.first
            } else if let Some(other) = self.greedy.iter().find(|source| greedy(source)) {
                self.sources[*other].datagrams.first
            } else {
                self.ages.first
            };
            if victim == NOWHERE || victim == current {
                return false;
            }
            self.forget(victim);
        }
    }

    fn forget_old(&mut self, now: u64) {
        while self.ages.first != NOWHERE {
            let oldest = self.ages.first;
            if now.saturating_sub(self.datagrams[oldest].born) < LIFETIME {
                break;
            }
            self.forget(oldest);
        }
    }

    /// When all of it has gone on: whoever uses its identification again means another packet.
    fn forget_complete(&mut self, place: Place) {
        let datagram = &self.datagrams[place];
        if datagram.end == Some(datagram.covered) {
            self.forget(place);
        }
    }

    fn forget(&mut self, place: Place) {
        self.empty(place);
        let Some(key) = self.datagrams[place].key else { return };
        let bucket = self.bucket(&key);
        let after = self.datagrams[place].chain;
        let mut at = self.buckets[bucket];
        if at == place {
            self.buckets[bucket] = after;
        }
        while at != NOWHERE {
            let next = self.datagrams[at].chain;
            if next == place {
                self.datagrams[at].chain = after;
            }
            at = next;
        }
        self.ages
            .remove(&mut self.datagrams, place, |datagram| &mut datagram.age);
        let source = self.source(&key);
        let peers = &mut self.sources[source].datagrams;
        peers.remove(&mut self.datagrams, place, |datagram| &mut datagram.peers);
        self.count(source, DATAGRAMS, |used| used - 1);
        self.datagrams.give(place);
    }

    /// Refuses what is left of a datagram, until its time is over; gives the reason back.
    fn condemn(&mut self, place: Place, reason: DropReason) -> DropReason {
        self.empty(place);
        self.datagrams[place].condemned = Some(reason);
        reason
    }

    /// Forgets what came of a datagram.
    fn empty(&mut self, place: Place) {
        self.unready(place);
        let source = self.source_of(place);
        let datagram = &mut self.datagrams[place];
        datagram.held = List::default();
        datagram.count = 0;
        let mut at = std::mem::replace(&mut datagram.pieces, NOWHERE);
        while at != NOWHERE {
            let Piece { next, copy, .. } = self.pieces[at];
            if copy != NOWHERE {
                let freed = self.blocks.forget(copy);
                self.count(source, BLOCKS, |used| used - freed);
                self.lost += 1;
            }
            self.pieces.give(at);
            self.count(source, PIECES, |used| used - 1);
            at = next;
        }
    }

    fn unready(&mut self, place: Place) {
        if std::mem::take(&mut self.datagrams[place].is_ready) {
            self.ready
                .remove(&mut self.datagrams, place, |datagram| &mut datagram.waiting);
        }
    }

    /// Changes what a source has, and whether that is more than its share.
    fn count(&mut self, source: usize, kind: usize, change: impl Fn(usize) -> usize) {
        let entry = &mut self.sources[source];
        entry.used[kind] = change(entry.used[kind]);
        let is_greedy = entry.used.iter().zip(self.share).any(|(used, share)| *used > share);
        if is_greedy == std::mem::replace(&mut entry.is_greedy, is_greedy) {
            return;
        }
        if is_greedy {
            self.greedy.push(source);
        } else {
            self.greedy.retain(|other| *other != source);
        }
    }

    fn find(&self, key: &Key) -> Option<Place> {
        let mut at = self.buckets[self.bucket(key)];
        while at != NOWHERE && self.datagrams[at].key.as_ref() != Some(key) {
            at = self.datagrams[at].chain;
        }
        (at != NOWHERE).then_some(at)
    }

    fn bucket(&self, key: &Key) -> usize {
        self.hash(key, self.buckets.len())
    }

    fn source(&self, key: &Key) -> usize {
        self.hash(&key.source, SOURCES)
    }

    fn source_of(&self, place: Place) -> usize {
        self.datagrams[place].key.map_or(0, |key| self.source(&key))
    }

    fn hash(&self, what: &impl Hash, below: usize) -> usize {
        let mut hasher = SipHasher13::new_with_keys(self.secret[0], self.secret[1]);
        what.hash(&mut hasher);
        (hasher.finish() % below as u64) as usize
    }
}

impl std::fmt::Debug for Fragments {
    // Neither the secret nor half a MiB.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fragments").finish_non_exhaustive()
    }
}

impl Part {
    /// `None` if `packet` is none, or of a protocol without ports, or nothing that a translator takes.
    fn of(packet: &[u8]) -> Result<Option<Self>, DropReason> {
        let (source, destination, protocol, header, fragment): (IpAddr, IpAddr, _, _, _);
        let end;
        match packet.first().map(|first| first >> 4) {
            // Most are no fragments, which one look tells.
            Some(4) if word(packet, 6).is_some_and(|flags| flags & 0x3fff != 0) => {
                let ip = checked_v4(packet)?;
                (source, destination) = (ip.source.into(), ip.destination.into());
                (protocol, header, fragment) = (ip.protocol, ip.header, ip.fragment());
                end = ip.total.into();
            }
            Some(6) if packet.get(6).is_some_and(|next| V6::is_extension(*next)) => {
                let ip = checked_v6(packet)?;
                if ip.obstacle.is_some() {
                    return Ok(None);
                }
                (source, destination) = (ip.source.into(), ip.destination.into());
                (protocol, header) = (ip.protocol, ip.header);
                fragment = ip.fragment.filter(|fragment| !fragment.is_atomic());
                end = 40 + usize::from(ip.payload);
            }
            _ => return Ok(None),
        }
        let Some(fragment) = fragment else { return Ok(None) };
        let (protocol::TCP | protocol::UDP) = protocol else {
            return Ok(None);
        };
        let Fragment { id, offset, more } = fragment;
        let transport = packet.get(header..end).unwrap_or_default();
        // RFC 791 §3.2, RFC 8200 §4.5; one of nothing has no place among others.
        if transport.is_empty() || more && transport.len() % 8 != 0 {
            return Err(DropReason::FragmentLength);
        }
        let mut ports = None;
        if offset == 0 {
            transport::check(protocol, transport).map_err(|_| DropReason::FragmentTiny)?;
            ports = Some(Ports::of(protocol, transport).unwrap_or(Ports::None));
        }
        Ok(Some(Self {
            key: Key {
                source,
                destination,
                protocol,
                id,
            },
            offset: offset.into(),
            end: usize::from(offset) + transport.len(),
            more,
            ports,
        }))
    }
}

#[cfg(test)]
mod tests;
