//! Memory that outlives the process: a memfd as words.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    ptr,
    sync::atomic::AtomicU64,
};

use rustix::{
    fs::{SealFlags, fcntl_get_seals, fstat},
    mm::{MapFlags, ProtFlags, mmap},
};

/// The words of `memory`, for as long as this process lives. It must be sealed against a change of its size, else an access
/// could kill this process.
///
/// # Errors
///
/// It is not, or it is empty, or the kernel has no room for it.
pub(super) fn words(memory: OwnedFd) -> io::Result<&'static [AtomicU64]> {
    let fixed = SealFlags::SHRINK | SealFlags::GROW;
    if !fcntl_get_seals(memory.as_fd())?.contains(fixed) {
        return Err(io::Error::other("the memory for sessions may change its size"));
    }
    let words = usize::try_from(fstat(&memory)?.st_size).unwrap_or(0) / size_of::<AtomicU64>();
    if words == 0 {
        return Err(io::Error::other("the memory for sessions is empty"));
    }
    // SAFETY: a new mapping, which nobody else has.
    let address = unsafe {
        mmap(
            ptr::null_mut(),
            words * size_of::<AtomicU64>(),
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
            &memory,
            0,
        )
    }?;
    // SAFETY: as many words lie there, on a page boundary, for ever: the size is sealed, and nobody unmaps them. Whoever else has
    // the memory changes words as a whole, too.
    Ok(unsafe { std::slice::from_raw_parts(address.cast::<AtomicU64>(), words) })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};

    use super::*;

    fn memfd(size: u64) -> OwnedFd {
        let memory = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("memory");
        ftruncate(&memory, size).expect("a size");
        memory
    }

    #[test]
    fn two_views_are_of_the_same_words_and_begin_with_zeros() {
        let memory = memfd(8192);
        fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW).expect("sealed");
        let one = words(memory.try_clone().expect("a copy")).expect("words");
        let other = words(memory).expect("words");
        assert_eq!((one.len(), other[1023].load(Relaxed)), (1024, 0));
        one[1023].store(7, Relaxed);
        assert_eq!(other[1023].load(Relaxed), 7);
    }

    #[test]
    fn what_may_change_its_size_or_has_none_is_refused() {
        assert!(words(memfd(8192)).is_err());
        let empty = memfd(0);
        fcntl_add_seals(&empty, SealFlags::SHRINK | SealFlags::GROW).expect("sealed");
        assert!(words(empty).is_err());
    }
}
