//! The memory of [`Fragments`](super::Fragments), all of it taken at once: things by number, octets in blocks, lists through
//! things.

use std::ops::{Index, IndexMut};

/// Where in a [`Slab`] something lies.
pub(super) type Place = u32;
/// No place.
pub(super) const NOWHERE: Place = Place::MAX;
/// Octets that are kept together; half of this is lost with each packet on average.
pub(super) const BLOCK: usize = 256;

/// Things of one kind, of which there may be so many.
#[derive(Debug)]
pub(super) struct Slab<T> {
    things: Box<[T]>,
    free: Vec<Place>,
}

impl<T: Copy + Default> Slab<T> {
    pub(super) fn new(count: usize) -> Self {
        let count = Place::try_from(count).unwrap_or(NOWHERE - 1);
        Self {
            things: (0..count).map(|_| T::default()).collect(),
            free: (0..count).rev().collect(),
        }
    }

    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    pub(super) fn take(&mut self, thing: T) -> Option<Place> {
        let place = self.free.pop()?;
        self[place] = thing;
        Some(place)
    }

    pub(super) fn give(&mut self, place: Place) {
        self.free.push(place);
    }
}

impl<T> Index<Place> for Slab<T> {
    type Output = T;

    fn index(&self, place: Place) -> &T {
        &self.things[place as usize]
    }
}

impl<T> IndexMut<Place> for Slab<T> {
    fn index_mut(&mut self, place: Place) -> &mut T {
        &mut self.things[place as usize]
    }
}

/// Octets of packets, in blocks that are linked.
#[derive(Debug)]
pub(super) struct Blocks(Slab<Block>);

#[derive(Clone, Copy, Debug)]
struct Block {
    octets: [u8; BLOCK],
    next: Place,
}

impl Default for Block {
    fn default() -> Self {
        Self {
            octets: [0; BLOCK],
            next: NOWHERE,
        }
    }
}

impl Blocks {
    pub(super) fn new(count: usize) -> Self {
        Self(Slab::new(count))
    }

    pub(super) fn free(&self) -> usize {
        self.0.free()
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.0.things.len()
    }

    /// Where the copy of `bytes` begins that is kept; `None` if there is no room.
    pub(super) fn keep(&mut self, bytes: &[u8]) -> Option<Place> {
        if bytes.len().div_ceil(BLOCK) > self.free() {
            return None;
        }
        let mut first = NOWHERE;
        // From the end, so that each knows its next.
        for chunk in bytes.chunks(BLOCK).rev() {
            first = self.0.take(Block {
                next: first,
                ..Block::default()
            })?;
            self.0[first].octets[..chunk.len()].copy_from_slice(chunk);
        }
        Some(first)
    }

    /// Fills `into` with what was kept at `first`, and keeps it no more.
    pub(super) fn give(&mut self, first: Place, into: &mut [u8]) {
        let mut place = first;
        for chunk in into.chunks_mut(BLOCK) {
            if place != NOWHERE {
                let block = &self.0[place];
                chunk.copy_from_slice(&block.octets[..chunk.len()]);
                place = block.next;
            }
        }
        self.forget(first);
    }

    /// How many blocks were freed.
    pub(super) fn forget(&mut self, first: Place) -> usize {
        let (mut place, mut count) = (first, 0);
        while place != NOWHERE {
            let next = self.0[place].next;
            self.0.give(place);
            (place, count) = (next, count + 1);
        }
        count
    }
}

/// The ends of a list through things of a [`Slab`], in the order in which they were added.
#[derive(Clone, Copy, Debug)]
pub(super) struct List {
    pub(super) first: Place,
    last: Place,
}

/// A thing's neighbours in a list.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    before: Place,
    after: Place,
}

impl Default for List {
    fn default() -> Self {
        Self {
            first: NOWHERE,
            last: NOWHERE,
        }
    }
}

impl Default for Link {
    fn default() -> Self {
        Self {
            before: NOWHERE,
            after: NOWHERE,
        }
    }
}

impl List {
    /// Adds what lies at `place`, at the end. `link` finds the neighbours that things have in this list.
    pub(super) fn push<T>(&mut self, things: &mut Slab<T>, place: Place, link: impl Fn(&mut T) -> &mut Link) {
        *link(&mut things[place]) = Link {
            before: self.last,
            after: NOWHERE,
        };
        match self.last {
            NOWHERE => self.first = place,
            last => link(&mut things[last]).after = place,
        }
        self.last = place;
    }

    /// Takes out what lies at `place`, which is in this list.
    pub(super) fn remove<T>(&mut self, things: &mut Slab<T>, place: Place, link: impl Fn(&mut T) -> &mut Link) {
        let Link { before, after } = *link(&mut things[place]);
        match before {
            NOWHERE => self.first = after,
            before => link(&mut things[before]).after = after,
        }
        match after {
            NOWHERE => self.last = before,
            after => link(&mut things[after]).before = before,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octets_come_back_as_they_were_and_their_blocks_are_free_again() {
        let mut blocks = Blocks::new(8);
        for length in [1, 255, 256, 257, 1500, 8 * BLOCK] {
            let bytes: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
            let first = blocks.keep(&bytes).expect("room");
            assert_eq!(blocks.free(), 8 - length.div_ceil(BLOCK));
            let mut back = vec![0xee; length];
            blocks.give(first, &mut back);
            assert_eq!((back, blocks.free()), (bytes, 8));
        }
        assert_eq!(blocks.keep(&[0; 8 * BLOCK + 1]), None);
        assert_eq!(blocks.free(), 8);
    }

    #[test]
    fn a_list_keeps_its_order_whichever_is_taken_out() {
        for out in 0..4 {
            let mut things: Slab<Link> = Slab::new(4);
            let mut list = List::default();
            for _ in 0..4 {
                let place = things.take(Link::default()).expect("room");
                list.push(&mut things, place, |link| link);
            }
            list.remove(&mut things, out, |link| link);
            list.push(&mut things, out, |link| link);
            let (mut place, mut seen) = (list.first, Vec::new());
            while place != NOWHERE {
                seen.push(place);
                place = things[place].after;
            }
            let expected: Vec<Place> = (0..4).filter(|place| *place != out).chain([out]).collect();
            assert_eq!(seen, expected);
        }
    }
}
