//! Which build a program is: the GNU build id that the linker wrote into it.
//!
//! The version says what was meant, the build id what it really is: two builds of one version differ in it.

use std::{fs::File, os::unix::fs::FileExt, path::Path, sync::OnceLock};

use serde::{Deserialize, Serialize};

/// What a program without a build id is called.
const UNKNOWN: &str = "unknown";
/// Digits that are shown; enough to tell builds apart.
const DIGITS: usize = 12;
/// Most bytes of a table of segments or of notes that are looked at; real ones have a few hundred.
const MOST: u64 = 64 << 10;

/// A program, as people and JSON name it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Build {
    /// Its version.
    pub version: String,
    /// First digits of its build id; "unknown" if it has none.
    pub build: String,
}

impl std::fmt::Display for Build {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (build {})", self.version, self.build)
    }
}

/// This program. To be called once while /proc can be read: a worker's sandbox takes it away.
pub fn own() -> Build {
    static OWN: OnceLock<String> = OnceLock::new();
    let build = OWN.get_or_init(|| of_file(Path::new("/proc/self/exe")));
    Build {
        version: env!("CARGO_PKG_VERSION").into(),
        build: build.clone(),
    }
}

fn of_file(path: &Path) -> String {
    let id = File::open(path).ok().and_then(|file| of(&file));
    id.unwrap_or_else(|| UNKNOWN.to_owned())
}

/// The first digits of the build id of an ELF program; `None` if it has none or is no such program.
pub fn of(file: &File) -> Option<String> {
    find(|offset, length| {
        let mut bytes = vec![0; usize::try_from(length).ok()?];
        file.read_exact_at(&mut bytes, offset).ok()?;
        Some(bytes)
    })
}

/// Whether a file begins as an ELF program for 64-bit little-endian machines.
pub fn is_program(file: &File) -> bool {
    let mut head = [0; 6];
    file.read_exact_at(&mut head, 0).is_ok() && head == *b"\x7fELF\x02\x01"
}

/// Looks for the build id (elf(5), `NT_GNU_BUILD_ID`) in a 64-bit little-endian ELF file. `read` gives so many bytes from
/// an offset, or nothing if the file does not have them.
fn find(read: impl Fn(u64, u64) -> Option<Vec<u8>>) -> Option<String> {
    const PT_NOTE: u64 = 4;
    let head = read(0, 64)?;
    if !head.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (table, size, count) = (number(&head, 32, 8)?, number(&head, 54, 2)?, number(&head, 56, 2)?);
    if size < 56 || size.checked_mul(count)? > MOST {
        return None;
    }
    let segments = read(table, size * count)?;
    let segments = segments.chunks_exact(usize::try_from(size).ok()?);
    segments
        .filter(|segment| number(segment, 0, 4) == Some(PT_NOTE))
        .find_map(|segment| {
            let (offset, length) = (number(segment, 8, 8)?, number(segment, 32, 8)?);
            note(&read(offset, length.min(MOST))?)
        })
}

/// The build id among the notes of one segment.
fn note(mut notes: &[u8]) -> Option<String> {
    const NT_GNU_BUILD_ID: u64 = 3;
    while notes.len() >= 12 {
        let length = |at| number(notes, at, 4).and_then(|length| usize::try_from(length).ok());
        let (name, content, kind) = (length(0)?, length(4)?, number(notes, 8, 4)?);
        // Name and content are padded to four bytes each.
        let begin = 12_usize.checked_add(name.checked_next_multiple_of(4)?)?;
        let end = begin.checked_add(content)?;
        if kind == NT_GNU_BUILD_ID && notes.get(12..12 + name.min(4)) == Some(b"GNU\0") {
            let digits: String = notes
                .get(begin..end)?
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            return digits.get(..DIGITS).map(str::to_owned);
        }
        notes = notes.get(begin.checked_add(content.checked_next_multiple_of(4)?)?..)?;
    }
    None
}

/// A little-endian number of `length` bytes at `at`.
fn number(bytes: &[u8], at: usize, length: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(length)?)?;
    Some(
        bytes
            .iter()
            .rev()
            .fold(0, |number, byte| number << 8 | u64::from(*byte)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program of one segment with `notes`, after the head and the table.
    fn elf(notes: &[u8]) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01".to_vec();
        file.resize(64, 0);
        file[32] = 64;
        file[54] = 56;
        file[56] = 1;
        let mut segment = vec![0; 56];
        segment[0] = 4;
        segment[8] = 120;
        segment[32..40].copy_from_slice(&(notes.len() as u64).to_le_bytes());
        [file, segment, notes.to_vec()].concat()
    }

    fn entry(kind: u8, name: &[u8], content: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        for number in [name.len(), content.len(), usize::from(kind)] {
            note.extend(u32::try_from(number).expect("short").to_le_bytes());
        }
        for part in [name, content] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    fn found(file: &[u8]) -> Option<String> {
        find(|offset, length| {
            let offset = usize::try_from(offset).ok()?;
            file.get(offset..offset.checked_add(usize::try_from(length).ok()?)?)
                .map(<[u8]>::to_vec)
        })
    }

    #[test]
    fn the_build_id_is_found_among_other_notes() {
        let id: Vec<u8> = (0xa0..0xb4).collect();
        let notes = [
            entry(1, b"GNU\0", &[0; 16]),
            entry(3, b"Go\0", &[1; 20]),
            entry(3, b"GNU\0", &id),
        ]
        .concat();
        assert_eq!(found(&elf(&notes)).as_deref(), Some("a0a1a2a3a4a5"));
    }

    #[test]
    fn a_program_cut_at_any_byte_or_with_any_byte_flipped_is_no_panic() {
        let whole = elf(&entry(3, b"GNU\0", &[7; 20]));
        assert!(found(&whole).is_some());
        for length in 0..whole.len() {
            assert_eq!(found(&whole[..length]), None, "{length}");
        }
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 0xff;
            let _ = found(&flipped);
        }
    }

    #[test]
    fn what_is_no_program_has_no_build_id() {
        assert_eq!(found(b""), None);
        assert_eq!(found(&[b"#!/bin/sh\n".as_slice(), &[0; 200]].concat()), None);
        assert_eq!(found(&elf(&entry(3, b"GNU\0", &[1; 4]))), None);
    }

    #[test]
    fn the_linker_gives_this_program_a_build_id() {
        let own = own();
        assert_eq!(own.build.len(), DIGITS, "{own}");
        assert!(own.build.chars().all(|digit| digit.is_ascii_hexdigit()), "{own}");
    }
}
