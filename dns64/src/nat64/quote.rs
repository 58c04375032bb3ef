//! How much of an ICMP error stays when headers in it become longer or shorter: quotation, padding, extension (RFC 4884).

/// Octets that a quotation has at least when an extension follows (RFC 4884 §5.1).
const LEAST: usize = 128;
/// Octets of an ICMP header.
pub(super) const ICMP_HEADER: usize = 8;

/// What an ICMP error holds behind its header, in octets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Body {
    /// The packet that it is about, as far as it is quoted, with padding.
    pub(super) quoted: usize,
    /// What else it says, behind that.
    pub(super) extension: usize,
}

impl Body {
    /// Of a body of `octets`, whose quotation is `words` of `unit` octets; 0 words say that there is no extension, and so
    /// does a length that leaves none.
    pub(super) fn of(octets: usize, words: u8, unit: usize) -> Self {
        match usize::from(words) * unit {
            quoted if (1..octets).contains(&quoted) => Self {
                quoted,
                extension: octets - quoted,
            },
            _ => Self {
                quoted: octets,
                extension: 0,
            },
        }
    }
}

/// What remains of an ICMP error, in octets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    /// Of the quoted packet, its header included.
    pub(super) quoted: usize,
    /// Zeros behind it.
    pub(super) padding: usize,
    /// Of the extension: all or nothing.
    pub(super) extension: usize,
    /// What the length field says.
    pub(super) words: u8,
}

impl Kept {
    /// Of a quotation that is `quoted` octets with its translated header, when there is `room` behind the ICMP header.
    ///
    /// The extension has precedence, if that leaves the quotation its 128 octets; then the quotation ends at a whole `unit`,
    /// 4 octets in ICMPv4 and 8 in ICMPv6 (RFC 4884 §4). It is cut there rather than padded: it is the end of a quotation
    /// that nobody promised to be complete.
    pub(super) fn of(quoted: usize, extension: usize, room: usize, unit: usize) -> Self {
        if extension > 0
            && let Some(room) = room.checked_sub(extension)
            && room >= LEAST
        {
            let all = quoted.min(room).max(LEAST) / unit * unit;
            if let Ok(words) = u8::try_from(all / unit) {
                return Self {
                    quoted: quoted.min(all),
                    padding: all.saturating_sub(quoted),
                    extension,
                    words,
                };
            }
        }
        Self {
            quoted: quoted.min(room),
            padding: 0,
            extension: 0,
            words: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc4884_section_4_lengths_count_words_of_either_size() {
        let body = |quoted, extension| Body { quoted, extension };
        assert_eq!(Body::of(172, 33, 4), body(132, 40));
        assert_eq!(Body::of(192, 19, 8), body(152, 40));
        assert_eq!(Body::of(192, 0, 8), body(192, 0));
        assert_eq!(Body::of(192, 24, 8), body(192, 0));
        assert_eq!(Body::of(192, 255, 8), body(192, 0));
        assert_eq!(Body::of(0, 1, 4), body(0, 0));
    }

    #[test]
    fn rfc4884_section_5_1_an_extension_is_kept_whole_or_not_at_all() {
        for (quoted, extension, room, unit, expected) in [
            // Nothing to keep.
            (148, 0, 1232, 8, (148, 0, 0, 0)),
            (1300, 0, 1232, 8, (1232, 0, 0, 0)),
            // It fits.
            (152, 40, 1232, 8, (152, 0, 40, 19)),
            (132, 20, 548, 4, (132, 0, 20, 33)),
            // It ends at a whole word.
            (148, 20, 1232, 8, (144, 0, 20, 18)),
            // It is padded to 128 octets.
            (48, 40, 1232, 8, (48, 80, 40, 16)),
            (28, 40, 548, 4, (28, 100, 40, 32)),
            // It gives way to the extension.
            (600, 640, 1232, 8, (592, 0, 640, 74)),
            (1040, 1104, 1232, 8, (128, 0, 1104, 16)),
            // There is no room for both.
            (1040, 1105, 1232, 8, (1040, 0, 0, 0)),
            (108, 421, 548, 4, (108, 0, 0, 0)),
            (600, 421, 548, 4, (548, 0, 0, 0)),
            (108, 4000, 548, 4, (108, 0, 0, 0)),
        ] {
            let kept = Kept::of(quoted, extension, room, unit);
            let told = (kept.quoted, kept.padding, kept.extension, kept.words);
            assert_eq!(told, expected, "{quoted} {extension} {room}");
        }
    }

    #[test]
    fn whatever_is_asked_for_it_fits_and_ends_at_a_word() {
        for (room, unit) in [(1232, 8), (548, 4)] {
            for quoted in 20..1400 {
                for extension in 0..1300 {
                    let kept = Kept::of(quoted, extension, room, unit);
                    let all = kept.quoted + kept.padding;
                    assert!(all + kept.extension <= room && kept.quoted <= quoted);
                    assert!(kept.extension == 0 || kept.extension == extension);
                    assert!(kept.extension > 0 || kept.words == 0);
                    if kept.extension > 0 {
                        assert!(all >= LEAST && all == usize::from(kept.words) * unit);
                    }
                }
            }
        }
    }
}
