//! The memory in which the balancer's worker leaves what its successor must know: bans above all.
//!
//! A sealed memfd: it keeps its size whatever a worker does, so that a successor that maps it never faults.

use std::{io, os::fd::OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};

/// Bytes; the format is the balancer's own.
const SIZE: u64 = 4 << 20;

fn seals() -> SealFlags {
    SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL
}

/// Makes it, all zeros.
pub(super) fn create() -> io::Result<OwnedFd> {
    sealed("edged-lb-state", SIZE)
}

/// Memory of a size that stays, all zeros; what is not written to takes no room.
pub(super) fn sealed(name: &str, size: u64) -> io::Result<OwnedFd> {
    let memory = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&memory, size)?;
    rustix::fs::fcntl_add_seals(&memory, seals())?;
    Ok(memory)
}

/// Whether `descriptor` is what [`create`] made.
pub(super) fn is_ours(descriptor: &OwnedFd) -> bool {
    let size = rustix::fs::fstat(descriptor).map(|stat| stat.st_size);
    let sealed = rustix::fs::fcntl_get_seals(descriptor);
    size.is_ok_and(|size| u64::try_from(size) == Ok(SIZE)) && sealed.is_ok_and(|found| found == seals())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_can_change_its_size() {
        let memory = create().expect("memory");
        assert!(is_ours(&memory));
        assert!(rustix::fs::ftruncate(&memory, 1).is_err());
        assert!(rustix::fs::ftruncate(&memory, SIZE + 1).is_err());
        assert_eq!(rustix::io::pwrite(&memory, b"ban", 0), Ok(3));
    }
}
