//! State that outlives a crash of the worker: a snapshot in a memfd that the supervisor holds.
//!
//! Two slots, written in turn, each with a checksum: a kill at any instruction leaves at least one whole. A slot is
//! `magic u32, length u32, sequence u64, crc32 u32`, then JSON, all little-endian.

use std::{
    io,
    os::{fd::OwnedFd, unix::fs::FileExt},
};

const MAGIC: u32 = 0x6c62_0001;
const HEADER: usize = 20;

/// The snapshot file.
pub(crate) struct MemoryFile {
    file: std::fs::File,
    slot_size: usize,
    sequence: u64,
    warned: bool,
}

impl MemoryFile {
    /// Takes over the descriptor; its size stays as it is.
    pub(crate) fn new(file: OwnedFd) -> io::Result<Self> {
        let file = std::fs::File::from(file);
        let size = usize::try_from(file.metadata()?.len()).unwrap_or(0);
        Ok(Self {
            file,
            slot_size: size / 2,
            sequence: 0,
            warned: false,
        })
    }

    /// The newest whole snapshot.
    pub(crate) fn read(&mut self) -> Option<Vec<u8>> {
        let (sequence, bytes) = [0, 1]
            .into_iter()
            .filter_map(|slot| self.slot(slot))
            .max_by_key(|(sequence, _)| *sequence)?;
        self.sequence = sequence;
        Some(bytes)
    }

    /// A slot's number and content, if it is whole.
    fn slot(&self, slot: u64) -> Option<(u64, Vec<u8>)> {
        let start = slot * self.slot_size as u64;
        let mut header = [0u8; HEADER];
        self.file.read_exact_at(&mut header, start).ok()?;
        let word = |at: usize| {
            header
                .get(at..at + 4)
                .and_then(|b| b.try_into().ok())
                .map(u32::from_le_bytes)
        };
        let length = usize::try_from(word(4)?).ok()?;
        if word(0)? != MAGIC || length > self.slot_size.checked_sub(HEADER)? {
            return None;
        }
        let sequence = u64::from_le_bytes(header.get(8..16)?.try_into().ok()?);
        // Nobody has written that often, and the numbers must not run out.
        if sequence > u64::MAX / 2 {
            return None;
        }
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, start + HEADER as u64).ok()?;
        (checksum(sequence, &bytes) == word(16)?).then_some((sequence, bytes))
    }

    /// Writes `bytes` over the older slot.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        let result = self.try_write(bytes);
        if let Err(error) = result
            && !std::mem::replace(&mut self.warned, true)
        {
            tracing::warn!(%error, "health is not remembered over a crash of this worker");
        }
    }

    fn try_write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        if bytes.len() + HEADER > self.slot_size {
            return Err(io::Error::other(format!("the snapshot of {length} bytes does not fit")));
        }
        self.sequence += 1;
        let start = (self.sequence % 2) * self.slot_size as u64;
        let mut header = Vec::with_capacity(HEADER);
        header.extend(MAGIC.to_le_bytes());
        header.extend(length.to_le_bytes());
        header.extend(self.sequence.to_le_bytes());
        header.extend(checksum(self.sequence, bytes).to_le_bytes());
        self.file.write_all_at(bytes, start + HEADER as u64)?;
        self.file.write_all_at(&header, start)
    }
}

fn checksum(sequence: u64, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&sequence.to_le_bytes());
    hasher.update(bytes);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    fn memfd() -> OwnedFd {
        let fd = memfd_create("test", MemfdFlags::CLOEXEC).expect("a memfd");
        ftruncate(&fd, 8192).expect("its size");
        fd
    }

    #[test]
    fn the_newest_whole_snapshot_is_read_and_a_torn_one_falls_back() {
        let fd = memfd();
        let again = fd.try_clone().expect("a second descriptor");
        let mut file = MemoryFile::new(fd).expect("a file");
        assert_eq!(file.read(), None);
        for n in 1..=5u8 {
            file.write(&[n; 100]);
        }
        let raw = std::fs::File::from(again.try_clone().expect("a third"));
        assert_eq!(
            MemoryFile::new(again.try_clone().expect("one more"))
                .expect("a file")
                .read(),
            Some(vec![5; 100])
        );
        // Sequence 5 lies in the second slot; a byte of it changes as in a torn write.
        raw.write_all_at(&[0xff], 4096 + 50).expect("a write");
        let mut other = MemoryFile::new(again).expect("a file");
        assert_eq!(other.read(), Some(vec![4; 100]));
        other.write(b"six");
        assert_eq!(other.read(), Some(b"six".to_vec()));
    }

    #[test]
    fn a_number_that_nobody_can_have_counted_to_is_no_snapshot_and_does_not_stop_the_count() {
        let fd = memfd();
        let raw = std::fs::File::from(fd.try_clone().expect("a second descriptor"));
        let mut slot = Vec::new();
        slot.extend(MAGIC.to_le_bytes());
        slot.extend(2_u32.to_le_bytes());
        slot.extend(u64::MAX.to_le_bytes());
        slot.extend(checksum(u64::MAX, b"{}").to_le_bytes());
        slot.extend(b"{}");
        raw.write_all_at(&slot, 0).expect("a write");
        let mut file = MemoryFile::new(fd).expect("a file");
        assert_eq!(file.read(), None);
        file.write(b"one");
        assert_eq!(file.read(), Some(b"one".to_vec()));
    }

    #[test]
    fn junk_and_oversize_are_no_snapshot() {
        let fd = memfd();
        let raw = std::fs::File::from(fd.try_clone().expect("a second descriptor"));
        raw.write_all_at(&[0xab; 8192], 0).expect("junk");
        let mut file = MemoryFile::new(fd).expect("a file");
        assert_eq!(file.read(), None);
        file.write(&vec![1; 8192]);
        assert_eq!(file.read(), None);
    }
}
