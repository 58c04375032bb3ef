//! Which ports of a pool address a host has: blocks of up to 64 neighbours, drawn at random (RFC 6056 §3.3.1), each for one
//! host (RFC 6888 REQ-14). An empty block stays its host's for two minutes, so that nobody else is taken for it (REQ-8).
//!
//! ICMP identifiers are given out as ports are.

use std::{collections::VecDeque, net::Ipv4Addr, ops::RangeInclusive};

use super::Protocol;

/// How long ports rest before another host gets them, in milliseconds (RFC 6888 REQ-8).
pub(super) const REST: u64 = 120_000;
/// Blocks that a pool is cut into at least, if it is large enough: that many hosts have ports at once.
const LEAST_BLOCKS: usize = 512;
/// No block, no host.
pub(super) const NONE: u32 = u32::MAX;

/// An address of the pool, and the ports of it that are ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolRange {
    /// The address.
    pub address: Ipv4Addr,
    /// The ports, also of ICMP identifiers.
    pub ports: RangeInclusive<u16>,
}

/// The ports of one protocol at one address.
#[derive(Debug)]
pub(super) struct Space {
    first: u16,
    last: u16,
    /// Ports in a block: a power of two up to 64.
    size: u16,
    blocks: Box<[Block]>,
    /// Blocks that nobody has, in no order.
    free: Vec<u32>,
    /// Blocks that became empty, each once, and when; some of them have been in use since.
    resting: VecDeque<(u32, u64)>,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    /// Ports in use.
    used: u64,
    /// Ports that there are: the first and last block may have fewer.
    mask: u64,
    owner: u32,
    /// When it became empty; meant only while it is.
    emptied: u64,
    /// Whether it stands in `resting`.
    resting: bool,
    /// Neighbours among the owner's blocks that have free ports; the first has `before` = [`NONE`].
    before: u32,
    after: u32,
}

/// What a host has of a space.
#[derive(Clone, Copy, Debug)]
pub(super) struct Holding {
    /// The first of its blocks that have free ports.
    open: u32,
    /// All of its blocks.
    pub(super) blocks: u32,
}

impl Default for Holding {
    fn default() -> Self {
        Self { open: NONE, blocks: 0 }
    }
}

impl Space {
    /// For one protocol; `size` comes from [`block_size`].
    pub(super) fn new(ports: &RangeInclusive<u16>, size: u16) -> Self {
        let (first, last) = (*ports.start(), *ports.end());
        let count = block_of(first, size, last) + 1;
        let blocks: Box<[Block]> = (0..count)
            .map(|block| {
                let start = u32::from(first / size) * u32::from(size) + block * u32::from(size);
                let inside = |bit: &u32| (u32::from(first)..=u32::from(last)).contains(&(start + bit));
                Block {
                    used: 0,
                    mask: (0..u32::from(size)).filter(inside).fold(0, |mask, bit| mask | 1 << bit),
                    owner: NONE,
                    emptied: 0,
                    resting: false,
                    before: NONE,
                    after: NONE,
                }
            })
            .collect();
        Self {
            first,
            last,
            size,
            free: (0..count).collect(),
            resting: VecDeque::with_capacity(blocks.len()),
            blocks,
        }
    }

    /// The first port.
    pub(super) const fn first(&self) -> u16 {
        self.first
    }

    /// Whether a port is ours.
    pub(super) fn contains(&self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// Ports that there are.
    pub(super) fn size(&self) -> usize {
        usize::from(self.last - self.first) + 1
    }

    /// Ports in blocks that no host has.
    pub(super) fn free(&self) -> usize {
        let free = self
            .free
            .iter()
            .map(|block| self.blocks[*block as usize].mask.count_ones() as usize);
        free.sum()
    }

    /// A port for a host, by the numbers that `random` gives; `most` is how many blocks it may have. `None` if it may have no
    /// more, or there are none.
    pub(super) fn take(
        &mut self,
        host: u32,
        holding: &mut Holding,
        most: u32,
        mut random: impl FnMut() -> u32,
    ) -> Option<u16> {
        if holding.open == NONE {
            if holding.blocks >= most {
                return None;
            }
            let free = u32::try_from(self.free.len()).ok()?;
            let place = below(random(), free);
            let block = match free {
                0 => return None,
                _ => self.free.swap_remove(place as usize),
            };
            self.blocks[block as usize].owner = host;
            holding.blocks += 1;
            self.open(block, holding);
        }
        let block = holding.open;
        let Block { used, mask, .. } = self.blocks[block as usize];
        let unused = mask & !used;
        let bit = nth_bit(unused, below(random(), unused.count_ones()));
        self.mark(block, bit, holding);
        Some(self.port(block, bit))
    }

    /// Gives a host that port, as it had it before; false if it is not ours, or another's.
    pub(super) fn claim(&mut self, port: u16, host: u32, holding: &mut Holding) -> bool {
        if !self.contains(port) {
            return false;
        }
        let (block, bit) = self.place(port);
        let found = &mut self.blocks[block as usize];
        if found.owner == NONE {
            found.owner = host;
            holding.blocks += 1;
            self.free.retain(|free| *free != block);
            self.open(block, holding);
        } else if found.owner != host || found.used & 1 << bit != 0 {
            return false;
        }
        self.mark(block, bit, holding);
        true
    }

    /// Takes a port back that a host was given.
    pub(super) fn give_back(&mut self, now: u64, port: u16, holding: &mut Holding) {
        let (block, bit) = self.place(port);
        let found = &mut self.blocks[block as usize];
        let was_full = found.used == found.mask;
        found.used &= !(1 << bit);
        if found.used == 0 {
            found.emptied = now;
            // One that stands there from before is as good: what counts is `emptied`.
            if !std::mem::replace(&mut found.resting, true) {
                self.resting.push_back((block, now));
            }
        }
        if was_full {
            self.open(block, holding);
        }
    }

    /// A block that has rested for long enough by `now`, and whose it was. It is free once [`Self::release`] is told.
    pub(super) fn rested(&mut self, now: u64) -> Option<(u32, u32)> {
        while let Some((block, since)) = self.resting.front().copied() {
            if now < since.saturating_add(REST) {
                return None;
            }
            self.resting.pop_front();
            let found = &mut self.blocks[block as usize];
            if found.used == 0 && now >= found.emptied.saturating_add(REST) {
                found.resting = false;
                return Some((block, found.owner));
            }
            found.resting = found.used == 0;
            if found.resting {
                self.resting.push_back((block, found.emptied));
            }
        }
        None
    }

    /// Frees a block of a host.
    pub(super) fn release(&mut self, block: u32, holding: &mut Holding) {
        self.close(block, holding);
        holding.blocks = holding.blocks.saturating_sub(1);
        self.blocks[block as usize].owner = NONE;
        self.free.push(block);
    }

    /// Marks a port as used.
    fn mark(&mut self, block: u32, bit: u32, holding: &mut Holding) {
        let found = &mut self.blocks[block as usize];
        found.used |= 1 << bit;
        if found.used == found.mask {
            self.close(block, holding);
        }
    }

    fn open(&mut self, block: u32, holding: &mut Holding) {
        let head = std::mem::replace(&mut holding.open, block);
        self.blocks[block as usize].before = NONE;
        self.blocks[block as usize].after = head;
        if head != NONE {
            self.blocks[head as usize].before = block;
        }
    }

    fn close(&mut self, block: u32, holding: &mut Holding) {
        let Block { before, after, .. } = self.blocks[block as usize];
        if before != NONE {
            self.blocks[before as usize].after = after;
        } else if holding.open == block {
            holding.open = after;
        }
        if after != NONE {
            self.blocks[after as usize].before = before;
        }
    }

    fn place(&self, port: u16) -> (u32, u32) {
        (block_of(self.first, self.size, port), u32::from(port % self.size))
    }

    fn port(&self, block: u32, bit: u32) -> u16 {
        let port = u32::from(self.first / self.size) * u32::from(self.size) + block * u32::from(self.size) + bit;
        port as u16
    }
}

/// A number below `limit`, of a random one.
const fn below(random: u32, limit: u32) -> u32 {
    ((random as u64 * limit as u64) >> 32) as u32
}

/// Ports in a block, for a pool of so many ports of each protocol.
pub(super) fn block_size(ports: usize) -> u16 {
    let fits = |size: &u16| ports / usize::from(*size) >= LEAST_BLOCKS;
    [64, 32, 16, 8, 4, 2].into_iter().find(fits).unwrap_or(1)
}

fn block_of(first: u16, size: u16, port: u16) -> u32 {
    u32::from(port / size) - u32::from(first / size)
}

/// The place of the `nth` bit that is set, counted from 0; 63 if there are fewer.
fn nth_bit(bits: u64, nth: u32) -> u32 {
    let mut bits = bits;
    for _ in 0..nth {
        bits &= bits.wrapping_sub(1);
    }
    bits.trailing_zeros().min(63)
}

/// What of the pool a packet may be about.
#[derive(Debug)]
pub(super) struct Pool {
    /// Sorted, each once.
    addresses: Box<[Ipv4Addr]>,
    /// For each address, one for each protocol.
    spaces: Box<[[Space; Protocol::COUNT]]>,
    /// Ports in a block.
    pub(super) block: u16,
}

impl Pool {
    /// Of all of `ranges`, one for each address; a later one for the same address is passed over.
    pub(super) fn new(ranges: &[PoolRange]) -> Self {
        let mut ranges: Vec<&PoolRange> = ranges.iter().filter(|range| !range.ports.is_empty()).collect();
        ranges.sort_by_key(|range| range.address);
        ranges.dedup_by_key(|range| range.address);
        let ports = ranges.iter().map(|range| range.ports.len()).sum();
        let block = block_size(ports);
        Self {
            addresses: ranges.iter().map(|range| range.address).collect(),
            spaces: ranges
                .iter()
                .map(|range| Protocol::ALL.map(|_| Space::new(&range.ports, block)))
                .collect(),
            block,
        }
    }

    pub(super) fn addresses(&self) -> &[Ipv4Addr] {
        &self.addresses
    }

    /// The number of an address of ours.
    pub(super) fn find(&self, address: Ipv4Addr) -> Option<usize> {
        self.addresses.binary_search(&address).ok()
    }

    pub(super) fn space(&self, address: usize, protocol: Protocol) -> &Space {
        &self.spaces[address][protocol as usize]
    }

    pub(super) fn space_mut(&mut self, address: usize, protocol: Protocol) -> &mut Space {
        &mut self.spaces[address][protocol as usize]
    }

    /// The address with most room for one more host (RFC 4787 REQ-2: all that a host sends comes from one address).
    pub(super) fn roomiest(&self) -> Option<usize> {
        let room = |address: &usize| {
            Protocol::ALL
                .map(|protocol| self.space(*address, protocol).free.len())
                .into_iter()
                .min()
        };
        (0..self.addresses.len()).rev().max_by_key(room)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::nat64::testing::Random;

    #[test]
    fn blocks_are_as_large_as_leaves_512_hosts_room() {
        for (ports, size) in [
            (4535, 8),
            (64_512, 64),
            (1_000_000, 64),
            (512, 1),
            (1024, 2),
            (10, 1),
            (28_232, 32),
        ] {
            assert_eq!(block_size(ports), size, "{ports}");
        }
    }

    #[test]
    fn every_port_of_the_range_is_given_once_and_none_beside_it() {
        for (first, last, size) in [
            (61_001, 65_535, 8),
            (1024, 65_535, 64),
            (7, 7, 1),
            (0, 65_535, 64),
            (63, 65, 64),
        ] {
            let mut space = Space::new(&(first..=last), size);
            assert_eq!(space.free(), space.size());
            let mut random = Random::new(1);
            let mut holding = Holding::default();
            let mut given = BTreeSet::new();
            while let Some(port) = space.take(0, &mut holding, u32::MAX, || random.next() as u32) {
                assert!(given.insert(port), "{port} twice");
            }
            assert_eq!(given, (first..=last).collect());
            assert_eq!(space.free(), 0);
        }
    }

    #[test]
    fn rfc6888_req_8_a_port_rests_two_minutes_unless_its_host_wants_it_again() {
        let mut space = Space::new(&(1024..=1039), 8);
        let (mut one, mut other) = (Holding::default(), Holding::default());
        let mut random = Random::new(2);
        let mut draw = || random.next() as u32;
        let ports: Vec<u16> = std::iter::from_fn(|| space.take(1, &mut one, 2, &mut draw)).collect();
        assert_eq!(ports.len(), 16);
        assert_eq!(space.take(2, &mut other, 2, &mut draw), None);
        for port in &ports {
            space.give_back(5000, *port, &mut one);
        }
        assert_eq!(space.take(2, &mut other, 2, &mut draw), None, "they rest");
        let again = space.take(1, &mut one, 2, &mut draw).expect("its own");
        assert!(ports.contains(&again));
        assert_eq!(space.rested(5000 + REST - 1), None);
        let (block, owner) = space.rested(5000 + REST).expect("the block that was not used again");
        assert_eq!(owner, 1);
        space.release(block, &mut one);
        assert_eq!(space.rested(5000 + REST), None, "the other is in use");
        let taken: Vec<u16> = std::iter::from_fn(|| space.take(2, &mut other, 2, &mut draw)).collect();
        assert_eq!(taken.len(), 8);
        assert!(!taken.contains(&again));
        space.give_back(6000, again, &mut one);
        let (block, _) = space.rested(6000 + REST).expect("it has rested, too");
        space.release(block, &mut one);
        assert_eq!(one.blocks, 0);
    }

    #[test]
    fn a_host_has_no_more_blocks_than_it_may() {
        let mut space = Space::new(&(1024..=2047), 8);
        let mut holding = Holding::default();
        let mut random = Random::new(3);
        let given = std::iter::from_fn(|| space.take(1, &mut holding, 3, || random.next() as u32)).count();
        assert_eq!((given, holding.blocks), (24, 3));
    }

    #[test]
    fn what_hosts_have_is_theirs_alone_after_any_changes() {
        let mut random = Random::new(4);
        let mut space = Space::new(&(2000..=2300), 16);
        let mut holdings = [Holding::default(); 8];
        let mut given: BTreeMap<u16, usize> = BTreeMap::new();
        let mut now = 0;
        for _ in 0..100_000 {
            now += random.below(400) as u64;
            let host = random.below(8);
            if random.below(5) < 3 {
                let mut draw = random.next();
                let taken = space.take(host as u32, &mut holdings[host], 6, || {
                    draw = draw.rotate_left(17).wrapping_mul(5);
                    draw as u32
                });
                if let Some(port) = taken {
                    assert!(given.insert(port, host).is_none());
                }
            } else if !given.is_empty() {
                let (port, host) = given
                    .iter()
                    .nth(random.below(given.len()))
                    .map(|(p, h)| (*p, *h))
                    .expect("one");
                given.remove(&port);
                space.give_back(now, port, &mut holdings[host]);
            }
            while let Some((block, owner)) = space.rested(now) {
                space.release(block, &mut holdings[owner as usize]);
            }
            let owned: u32 = holdings.iter().map(|holding| holding.blocks).sum();
            assert_eq!(owned as usize + space.free.len(), space.blocks.len());
        }
        for (port, host) in given {
            space.give_back(now, port, &mut holdings[host]);
        }
        while let Some((block, owner)) = space.rested(now + REST) {
            space.release(block, &mut holdings[owner as usize]);
        }
        assert_eq!(space.free(), 301, "all come back");
    }

    #[test]
    fn rfc6056_section_3_3_1_ports_are_spread_evenly() {
        let mut random = Random::new(5);
        let mut counts = [0_u32; 16];
        for _ in 0..4000 {
            let mut space = Space::new(&(1024..=65_535), 64);
            let port = space.take(0, &mut Holding::default(), 9, || {
                random.next() as u32 ^ (random.next() >> 32) as u32
            });
            counts[usize::from(port.expect("a port") / 4096)] += 1;
        }
        // The first has 3072 ports, the others 4096, of 64,512.
        let chi: f64 = counts
            .iter()
            .enumerate()
            .map(|(place, count)| {
                let expected = 4000.0 * if place == 0 { 3072.0 } else { 4096.0 } / 64_512.0;
                (f64::from(*count) - expected).powi(2) / expected
            })
            .sum();
        // 15 degrees of freedom, 0.1 %.
        assert!(chi < 37.7, "{chi}");
    }

    #[test]
    fn a_claimed_port_is_its_hosts_and_no_other_gets_its_block() {
        let mut space = Space::new(&(1024..=1039), 8);
        let (mut one, mut other) = (Holding::default(), Holding::default());
        assert!(space.claim(1030, 1, &mut one));
        assert!(!space.claim(1030, 1, &mut one), "it has it");
        assert!(!space.claim(1031, 2, &mut other), "another's block");
        assert!(!space.claim(1023, 1, &mut one), "not ours");
        assert!(space.claim(1031, 1, &mut one));
        let mut random = Random::new(6);
        let given: BTreeSet<u16> =
            std::iter::from_fn(|| space.take(2, &mut other, 9, || random.next() as u32)).collect();
        assert_eq!(given, (1032..=1039).collect());
    }

    #[test]
    fn a_host_gets_the_address_with_most_room() {
        let range = |last: u8, ports| PoolRange {
            address: Ipv4Addr::new(192, 0, 2, last),
            ports,
        };
        let pool = Pool::new(&[range(9, 1024..=2000), range(7, 1024..=9000), range(9, 1..=2)]);
        assert_eq!(pool.addresses().len(), 2);
        assert_eq!(pool.roomiest(), pool.find(Ipv4Addr::new(192, 0, 2, 7)));
        assert_eq!(pool.find(Ipv4Addr::new(192, 0, 2, 8)), None);
        assert_eq!(Pool::new(&[]).roomiest(), None);
    }
}
