//! What of a DNS message can be told without decoding it: where names and records begin and end (RFC 1035 §4.1).
//!
//! A compression pointer is passed over, or followed if it points back; so nothing can loop.

/// Length of a message's header.
pub(crate) const HEADER: usize = 12;
/// Octets that a name may take on the wire, its root label included (RFC 1035 §2.3.4).
pub(crate) const LONGEST_NAME: usize = 255;

/// Where one record lies in a message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RecordAt {
    /// First octet of its owner.
    pub(crate) start: usize,
    /// First octet after its owner.
    pub(crate) owner_end: usize,
    pub(crate) kind: u16,
    /// First octet of its RDATA.
    pub(crate) data: usize,
    /// First octet after it.
    pub(crate) end: usize,
}

impl RecordAt {
    /// First octet of its TTL.
    pub(crate) const fn ttl(&self) -> usize {
        self.owner_end + 4
    }
}

/// The 16 bits at `at`.
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Writes 16 bits at `at`, if there is room.
pub(crate) fn set_u16(bytes: &mut [u8], at: usize, value: u16) -> Option<()> {
    *bytes.get_mut(at..)?.first_chunk_mut()? = value.to_be_bytes();
    Some(())
}

/// The first octet after the uncompressed name that begins at `at`; `None` if it has a pointer, a label type that
/// nobody uses (RFC 6891 §5), more than 255 octets, or no end.
pub(crate) fn plain_name_end(bytes: &[u8], at: usize) -> Option<usize> {
    let mut end = at;
    loop {
        let label = usize::from(*bytes.get(end)?);
        if label > 63 {
            return None;
        }
        end += label + 1;
        if end - at > LONGEST_NAME {
            return None;
        }
        if label == 0 {
            return Some(end);
        }
    }
}

/// The record that begins at `at`, whatever its owner points to.
pub(crate) fn record_at(bytes: &[u8], at: usize) -> Option<RecordAt> {
    let mut owner_end = at;
    loop {
        let label = usize::from(*bytes.get(owner_end)?);
        match label {
            0 => {
                owner_end += 1;
                break;
            }
            1..64 => owner_end += label + 1,
            0xc0.. => {
                owner_end += 2;
                break;
            }
            _ => return None,
        }
        if owner_end - at > LONGEST_NAME {
            return None;
        }
    }
    let data = owner_end + 10;
    let end = data + usize::from(u16_at(bytes, owner_end + 8)?);
    (end <= bytes.len()).then_some(RecordAt {
        start: at,
        owner_end,
        kind: u16_at(bytes, owner_end)?,
        data,
        end,
    })
}

/// The labels of the name at `at`. They end where a pointer does not point before the name that it ends.
pub(crate) fn labels(message: &[u8], mut at: usize) -> impl Iterator<Item = &[u8]> {
    let mut bound = at;
    std::iter::from_fn(move || {
        loop {
            let length = *message.get(at)?;
            match length {
                0 => return None,
                1..64 => {
                    let label = message.get(at + 1..at + 1 + usize::from(length))?;
                    at += 1 + label.len();
                    return Some(label);
                }
                _ => {
                    let target = usize::from(u16_at(message, at)? & 0x3fff);
                    if length < 0xc0 || target >= bound {
                        return None;
                    }
                    (at, bound) = (target, target);
                }
            }
        }
    })
}

/// The octets of `name` eight at a time, in lower case; the last ones are padded with zeros. A label's length is below
/// 64 and so no letter: it comes out as it is.
pub(crate) fn lower_words(name: &[u8]) -> impl Iterator<Item = u64> {
    let (whole, rest) = name.as_chunks::<8>();
    let mut last = [0; 8];
    for (to, from) in last.iter_mut().zip(rest) {
        *to = *from;
    }
    let last = (!rest.is_empty()).then_some(last);
    whole
        .iter()
        .copied()
        .chain(last)
        .map(|word| lower(u64::from_le_bytes(word)))
}

/// Eight octets in lower case at once: ASCII letters lose their case, all else stays (RFC 4343 §3).
const fn lower(word: u64) -> u64 {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x80 * ONES;
    let low = word & !HIGH;
    let from_a = low + (0x80 - b'A' as u64) * ONES;
    let beyond_z = low + (0x7f - b'Z' as u64) * ONES;
    let upper = !word & (from_a ^ beyond_z) & HIGH;
    word | (upper >> 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_octet_is_lowered_as_ascii_is_wherever_it_stands() {
        for octet in 0..=255_u8 {
            for place in 0..8 {
                let mut word = [b'Q'; 8];
                word[place] = octet;
                let lowered = lower(u64::from_le_bytes(word)).to_le_bytes();
                assert_eq!(lowered, word.map(|o| o.to_ascii_lowercase()), "{octet} at {place}");
            }
        }
    }

    #[test]
    fn names_end_where_rfc1035_says_or_nowhere() {
        let long = |labels: &[usize]| {
            let mut name = Vec::new();
            for label in labels {
                name.push(u8::try_from(*label).expect("a label"));
                name.extend(std::iter::repeat_n(b'a', *label));
            }
            name.push(0);
            name
        };
        for (name, end) in [
            (b"\0".to_vec(), Some(1)),
            (b"\x03www\x07example\x03org\0".to_vec(), Some(17)),
            (long(&[63, 63, 63, 61]), Some(255)),
            (long(&[63, 63, 63, 62]), None),
            (long(&[64]), None),
            (b"\x03www".to_vec(), None),
            (b"\x03ww".to_vec(), None),
            (b"\xc0\x0c".to_vec(), None),
            (b"\x03www\xc0\x00".to_vec(), None),
            (b"\x41a\0".to_vec(), None),
            (b"\x80\0".to_vec(), None),
            (Vec::new(), None),
        ] {
            assert_eq!(plain_name_end(&name, 0), end, "{name:x?}");
        }
    }

    #[test]
    fn labels_follow_pointers_back_and_nowhere_else() {
        let message = b"\x01a\0\x01b\xc0\x00\x01c\xc0\x03\xc0\x0b\x01d\xc0\x0d\xc0\xff\x41";
        let at = |at| labels(message, at).map(|label| label[0]).collect::<Vec<_>>();
        assert_eq!(at(0), b"a");
        assert_eq!(at(3), b"ba");
        assert_eq!(at(7), b"cba");
        assert_eq!(at(11), b"", "to itself");
        assert_eq!(at(13), b"d", "round and round");
        assert_eq!(at(17), b"", "beyond the end");
        assert_eq!(at(19), b"", "an unused label type");
    }

    #[test]
    fn a_record_that_runs_over_the_end_is_none() {
        let record = b"\xc0\x0c\0\x01\0\x01\0\0\x0e\x10\0\x04\xc0\0\x02\x01";
        let at = record_at(record, 0).expect("a record");
        assert_eq!((at.owner_end, at.kind, at.ttl(), at.data, at.end), (2, 1, 6, 12, 16));
        for length in 0..record.len() {
            assert!(record_at(&record[..length], 0).is_none(), "{length} octets");
        }
        assert!(
            record_at(b"\x41a\0\0\x01\0\x01\0\0\0\0\0\0", 0).is_none(),
            "an unused label type"
        );
    }
}
