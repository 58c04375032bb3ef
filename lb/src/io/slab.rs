//! Where a data thread keeps its sessions: slots that are used again, each use under another key, so that a late event
//! finds nobody.

use super::session::{Attempt, Session};

/// A slot and the generation of its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) slot: u32,
    pub(crate) generation: u32,
}

/// Generations before they begin anew; what epoll carries has room for so many.
pub(crate) const GENERATIONS: u32 = 1 << 30;

/// What a slot holds.
#[derive(Default)]
pub(crate) enum Content {
    #[default]
    Empty,
    Session(Box<Session>),
    Attempt(Box<Attempt>),
}

#[derive(Default)]
struct Slot {
    generation: u32,
    content: Content,
}

/// The slots of one thread.
#[derive(Default)]
pub(crate) struct Slab {
    slots: Vec<Slot>,
    free: Vec<u32>,
    sessions: usize,
}

impl Slab {
    pub(crate) fn put(&mut self, content: Content) -> Key {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
        });
        self.sessions += usize::from(matches!(content, Content::Session(_)));
        let entry = &mut self.slots[slot as usize];
        entry.content = content;
        Key {
            slot,
            generation: entry.generation,
        }
    }

    fn content(&mut self, key: Key) -> Option<&mut Content> {
        let slot = self.slots.get_mut(key.slot as usize)?;
        (slot.generation == key.generation).then_some(&mut slot.content)
    }

    pub(crate) fn session(&mut self, key: Key) -> Option<&mut Session> {
        match self.content(key)? {
            Content::Session(session) => Some(session),
            _ => None,
        }
    }

    pub(crate) fn attempt(&mut self, key: Key) -> Option<&mut Attempt> {
        match self.content(key)? {
            Content::Attempt(attempt) => Some(attempt),
            _ => None,
        }
    }

    /// Empties the slot; its key is of no use from then on.
    pub(crate) fn take(&mut self, key: Key) -> Content {
        let Some(content) = self.content(key) else {
            return Content::Empty;
        };
        let content = std::mem::take(content);
        let slot = &mut self.slots[key.slot as usize];
        slot.generation = (slot.generation + 1) % GENERATIONS;
        if !matches!(content, Content::Empty) {
            self.free.push(key.slot);
        }
        self.sessions -= usize::from(matches!(content, Content::Session(_)));
        content
    }

    /// Sessions in it.
    pub(crate) fn sessions(&self) -> usize {
        self.sessions
    }

    /// The keys of everything that `wanted` picks.
    pub(crate) fn keys(&self, wanted: impl Fn(&Content) -> bool) -> Vec<Key> {
        let slots = self.slots.iter().enumerate();
        slots
            .filter(|(_, slot)| wanted(&slot.content))
            .map(|(number, slot)| Key {
                slot: u32::try_from(number).unwrap_or(u32::MAX),
                generation: slot.generation,
            })
            .collect()
    }

    /// The keys of the sessions that `wanted` picks.
    pub(crate) fn sessions_where(&self, wanted: impl Fn(&Session) -> bool) -> Vec<Key> {
        self.keys(|content| matches!(content, Content::Session(session) if wanted(session)))
    }
}
