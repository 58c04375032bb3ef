//! The pages of the program itself: what only its start ran need not stay mapped.

use std::{fs, io, ops::Range, os::unix::fs::MetadataExt as _, ptr};

use rustix::mm::Advice;

/// Gives back the pages of this program's code and constants; those that are run again come back from the page cache, a
/// minor fault for each 64 KiB. Meant for a small process that runs alone, once it serves: parsing of arguments, of
/// configuration and of tables of relocations is most of what it has touched by then.
///
/// # Errors
/// /proc is not there, or the kernel refuses. Nothing is lost then but memory.
pub(crate) fn give_back() -> io::Result<()> {
    let program = fs::metadata("/proc/self/exe")?.ino();
    let maps = fs::read_to_string("/proc/self/maps")?;
    for range in maps.lines().filter_map(|line| clean(line, program)) {
        // SAFETY: the range is mapped from a file and was never written to (`clean`), so what a later access finds there is
        // what was there before.
        unsafe {
            rustix::mm::madvise(
                ptr::with_exposed_provenance_mut(range.start),
                range.len(),
                Advice::LinuxDontNeed,
            )
        }?;
    }
    Ok(())
}

/// The range of a line of /proc/self/maps, if it belongs to the file of that inode and no relocation was written to it: code,
/// and the constants that the file begins with. Constants behind the code hold addresses that the loader has put there.
fn clean(line: &str, program: u64) -> Option<Range<usize>> {
    let mut fields = line.split_ascii_whitespace();
    let (range, rights, offset, _device, inode) = (
        fields.next()?,
        fields.next()?,
        fields.next()?,
        fields.next()?,
        fields.next()?,
    );
    let code = rights == "r-xp";
    let head = rights == "r--p" && u64::from_str_radix(offset, 16) == Ok(0);
    if inode.parse() != Ok(program) || !(code || head) {
        return None;
    }
    let (begin, end) = range.split_once('-')?;
    let hex = |text| usize::from_str_radix(text, 16).ok();
    Some(hex(begin)?..hex(end)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_and_first_constants_are_clean_and_nothing_else() {
        let code = "556a1b5d1000-556a1b9e4000 r-xp 0041f000 fe:00 77                         /usr/bin/edged";
        assert_eq!(clean(code, 77), Some(0x556a_1b5d_1000..0x556a_1b9e_4000));
        assert_eq!(clean(code, 78), None, "another file");
        let head = "556a1b1b2000-556a1b5d1000 r--p 00000000 fe:00 77 /usr/bin/edged";
        assert!(clean(head, 77).is_some());
        for line in [
            "556a1b9e4000-556a1ba3e000 r--p 00831000 fe:00 77 /usr/bin/edged",
            "556a1ba3e000-556a1ba40000 rw-p 0088a000 fe:00 77 /usr/bin/edged",
            "7ffd2a5f3000-7ffd2a614000 rw-p 00000000 00:00 0 [stack]",
            "",
            "556a1b9e4000 r-xp 0 0 77",
        ] {
            assert_eq!(clean(line, 77), None, "{line}");
        }
    }

    #[test]
    fn the_program_runs_on_without_its_pages() {
        give_back().expect("given back");
        let text: Vec<_> = (0..100).map(|number| format!("{number:03}")).collect();
        assert_eq!(text.concat().len(), 300);
    }
}
