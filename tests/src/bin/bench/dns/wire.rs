//! What is asked and what the answer must be: queries, the upstream's answers, and the check of those that clients get.
//!
//! ```text
//! nK.v4.example.org    A 32.x.x.x            no AAAA: synthesised under 64:ff9b::/96     K below 10,000
//! nK.v6.example.org    A 32.x.x.x            AAAA 2001:db8::/32                          K below 10,000
//! xH.miss.example.org  A 33.x.x.x            no AAAA                                     any H of 16 hexadecimal digits
//! ```
//! The IPv4 addresses are global ones, because others may not be embedded in the well-known prefix (RFC 6052 §3.1); nothing is
//! ever sent there. Every address follows from its name, so no answer can pass for another's.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Names of each kind that caches hold.
pub(crate) const NAMES: u64 = 10_000;
/// Bytes that any query or answer here fits into.
pub(crate) const SIZE: usize = 512;

const TTL: u32 = 3600;
const A: u16 = 1;
const AAAA: u16 = 28;
const OPT: u16 = 41;
const ZONE: &[u8] = b"\x07example\x03org\0";
const HEADER: usize = 12;
/// The root's name, OPT, 1232 bytes, version 0, no options: what a node's stub resolver adds (RFC 6891).
const EDNS: &[u8] = &[0, 0, 41, 0x04, 0xd0, 0, 0, 0, 0, 0, 0];

/// What a query is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// A of a name that caches hold.
    A(u64),
    /// AAAA of a name that has none.
    Synthesised(u64),
    /// AAAA of a name that has one.
    Native(u64),
    /// A of a name never asked before.
    FreshA(u64),
    /// AAAA, to be synthesised, of a name never asked before.
    FreshSynthesised(u64),
}

impl Asked {
    /// Writes the query; returns its length.
    pub(crate) fn query(self, id: u16, out: &mut [u8; SIZE]) -> usize {
        out[..2].copy_from_slice(&id.to_be_bytes());
        // Recursion desired; one question, one additional record.
        out[2..HEADER].copy_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 1]);
        let end = HEADER + self.question(&mut out[HEADER..]);
        out[end..end + EDNS.len()].copy_from_slice(EDNS);
        end + EDNS.len()
    }

    /// Writes name, type and class; returns their length.
    fn question(self, out: &mut [u8]) -> usize {
        let mut label = [0; 20];
        let (text, below) = match self {
            Self::A(number) | Self::Synthesised(number) => (decimal(number, &mut label), b"\x02v4".as_slice()),
            Self::Native(number) => (decimal(number, &mut label), b"\x02v6".as_slice()),
            Self::FreshA(number) | Self::FreshSynthesised(number) => {
                (hexadecimal(number, &mut label), b"\x04miss".as_slice())
            }
        };
        let kind = match self {
            Self::A(_) | Self::FreshA(_) => A,
            _ => AAAA,
        };
        let mut end = 0;
        for part in [
            &[text.len() as u8],
            text,
            below,
            ZONE,
            &kind.to_be_bytes(),
            &1_u16.to_be_bytes(),
        ] {
            out[end..end + part.len()].copy_from_slice(part);
            end += part.len();
        }
        end
    }

    /// Whether `answer` is the one: this id, this question to the letter, no error, one record of this name, type and address.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub(crate) fn check(self, id: u16, answer: &[u8]) -> Result<(), &'static str> {
        let (header, rest) = answer.split_at_checked(HEADER).ok_or("an answer without a header")?;
        let number = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        if number(0) != id {
            return Err("an answer to another query");
        }
        // QR set, opcode 0, TC clear.
        if header[2] & 0b1111_1010 != 0b1000_0000 {
            return Err("no answer, or a truncated one");
        }
        match header[3] & 15 {
            0 => {}
            2 => return Err("SERVFAIL"),
            3 => return Err("NXDOMAIN"),
            5 => return Err("REFUSED"),
            _ => return Err("an error's code"),
        }
        let mut question = [0; 128];
        let length = self.question(&mut question);
        let question = &question[..length];
        let rest = rest
            .strip_prefix(question)
            .filter(|_| number(4) == 1)
            .ok_or("another question in an answer")?;
        if number(6) != 1 {
            return Err(if number(6) == 0 {
                "an empty answer"
            } else {
                "more than one record in an answer"
            });
        }
        let (name, kind) = question.split_at(length - 4);
        // A pointer to the question's name, or the name again.
        let record = rest
            .strip_prefix(&[0xc0, HEADER as u8])
            .or_else(|| {
                let (owner, record) = rest.split_at_checked(name.len())?;
                owner.eq_ignore_ascii_case(name).then_some(record)
            })
            .ok_or("a record of another name")?;
        let (kind_there, record) = record.split_at_checked(4).ok_or("half a record")?;
        if kind_there != kind {
            return Err("a record of another type");
        }
        let (ttl, record) = record.split_first_chunk().ok_or("half a record")?;
        if !(1..=TTL).contains(&u32::from_be_bytes(*ttl)) {
            return Err("a TTL that nobody gave");
        }
        let mut data = [0; 18];
        if record.starts_with(self.data(&mut data)) {
            Ok(())
        } else {
            Err("a wrong address")
        }
    }

    /// Length and address of the record.
    fn data(self, out: &mut [u8; 18]) -> &[u8] {
        let four = |out: &mut [u8; 18], v4: Ipv4Addr| {
            out[..2].copy_from_slice(&[0, 4]);
            out[2..6].copy_from_slice(&v4.octets());
            6
        };
        let six = |out: &mut [u8; 18], v6: Ipv6Addr| {
            out[..2].copy_from_slice(&[0, 16]);
            out[2..].copy_from_slice(&v6.octets());
            18
        };
        let length = match self {
            Self::A(number) => four(out, known(number)),
            Self::FreshA(number) => four(out, fresh(number)),
            Self::Synthesised(number) => six(out, synthesised(known(number))),
            Self::FreshSynthesised(number) => six(out, synthesised(fresh(number))),
            Self::Native(number) => six(out, native(number)),
        };
        &out[..length]
    }
}

fn decimal(mut number: u64, out: &mut [u8; 20]) -> &[u8] {
    let mut at = out.len();
    loop {
        at -= 1;
        out[at] = b'0' + (number % 10) as u8;
        number /= 10;
        // A name has at most 5 digits.
        if number == 0 || at == 1 {
            break;
        }
    }
    out[at - 1] = b'n';
    &out[at - 1..]
}

fn hexadecimal(number: u64, out: &mut [u8; 20]) -> &[u8] {
    out[0] = b'x';
    for (i, digit) in out[1..17].iter_mut().enumerate() {
        *digit = b"0123456789abcdef"[(number >> (60 - 4 * i) & 15) as usize];
    }
    &out[..17]
}

fn known(number: u64) -> Ipv4Addr {
    let [.., a, b, c] = number.to_be_bytes();
    Ipv4Addr::new(32, a, b, c)
}

fn fresh(number: u64) -> Ipv4Addr {
    // The upper bits of a product with an odd number depend on all bits (Knuth, multiplicative hashing).
    let [a, b, c, ..] = number.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes();
    Ipv4Addr::new(33, a, b, c)
}

fn native(number: u64) -> Ipv6Addr {
    Ipv6Addr::from_bits((0x2001_0db8 << 96) | u128::from(number + 1))
}

fn synthesised(v4: Ipv4Addr) -> Ipv6Addr {
    Ipv6Addr::from_bits((0x0064_ff9b << 96) | u128::from(v4.to_bits()))
}

/// The upstream's answer to `query`; returns its length, or `None` if `query` deserves none.
pub(crate) fn answer(query: &[u8], out: &mut [u8; SIZE]) -> Option<usize> {
    let (header, rest) = query.split_at_checked(HEADER)?;
    // A standard query with one question.
    if header[2] & 0b1111_1000 != 0 || header[4..6] != [0, 1] {
        return None;
    }
    let mut end = 0;
    while let length @ 1..=63 = usize::from(*rest.get(end)?) {
        end += 1 + length;
    }
    // A compressed or overlong name.
    if rest[end] != 0 || end > 254 {
        return None;
    }
    let (name, rest) = rest.split_at(end + 1);
    let (kind, rest) = rest.split_first_chunk()?;
    let (class, rest) = rest.split_first_chunk::<2>()?;
    let edns = rest.starts_with(&[0, 0, OPT as u8]);

    let mut writer = Writer { out, at: HEADER };
    writer.put(&[name, kind, class]);
    let found = look_up(name, u16::from_be_bytes(*kind));
    let (code, answers, authorities) = match found {
        Found::V4(address) => {
            writer.record(*kind, &address.octets());
            (0, 1, 0)
        }
        Found::V6(address) => {
            writer.record(*kind, &address.octets());
            (0, 1, 0)
        }
        Found::NoData => (0, 0, 1),
        Found::NoName => (3, 0, 1),
        Found::NotOurs => (5, 0, 0),
    };
    if authorities == 1 {
        writer.soa();
    }
    if edns {
        writer.put(&[EDNS]);
    }
    let Writer { out, at } = writer;
    out[..2].copy_from_slice(&header[..2]);
    // An answer, with the query's "recursion desired", and recursion available: forwarders want a resolver.
    out[2..HEADER].copy_from_slice(&[
        0x80 | header[2] & 1,
        0x80 | code,
        0,
        1,
        0,
        answers,
        0,
        authorities,
        0,
        u8::from(edns),
    ]);
    Some(at)
}

enum Found {
    V4(Ipv4Addr),
    V6(Ipv6Addr),
    NoData,
    NoName,
    NotOurs,
}

fn look_up(name: &[u8], kind: u16) -> Found {
    let Some(inside) = strip_suffix(name, ZONE) else {
        return Found::NotOurs;
    };
    let of = |below: &[u8]| strip_suffix(inside, below);
    let number = |label: &[u8], first: u8, radix: u32| -> Option<u64> {
        let [length, letter, digits @ ..] = label else {
            return None;
        };
        let whole = usize::from(*length) + 1 == label.len() && letter.eq_ignore_ascii_case(&first);
        let text = std::str::from_utf8(digits).ok().filter(|_| whole)?;
        u64::from_str_radix(text, radix).ok()
    };
    let (v4, v6) = if let Some(label) = of(b"\x02v4") {
        (number(label, b'n', 10).map(known), None)
    } else if let Some(label) = of(b"\x02v6") {
        let number = number(label, b'n', 10);
        (number.map(known), number.map(native))
    } else if let Some(label) = of(b"\x04miss") {
        (number(label, b'x', 16).map(fresh), None)
    } else if inside.is_empty() {
        return Found::NoData;
    } else {
        return Found::NoName;
    };
    match (kind, v4, v6) {
        (_, None, None) => Found::NoName,
        (A, Some(address), _) => Found::V4(address),
        (AAAA, _, Some(address)) => Found::V6(address),
        _ => Found::NoData,
    }
}

fn strip_suffix<'a>(name: &'a [u8], suffix: &[u8]) -> Option<&'a [u8]> {
    let (rest, end) = name.split_at_checked(name.len().checked_sub(suffix.len())?)?;
    end.eq_ignore_ascii_case(suffix).then_some(rest)
}

struct Writer<'a> {
    out: &'a mut [u8; SIZE],
    at: usize,
}

impl Writer<'_> {
    /// At most 255 + 100 bytes are ever put, [`SIZE`] is more.
    fn put(&mut self, parts: &[&[u8]]) {
        for part in parts {
            self.out[self.at..self.at + part.len()].copy_from_slice(part);
            self.at += part.len();
        }
    }

    fn record(&mut self, kind: [u8; 2], data: &[u8]) {
        self.put(&[&[0xc0, HEADER as u8], &kind, &[0, 1], &TTL.to_be_bytes()]);
        self.put(&[&[0, data.len() as u8], data]);
    }

    fn soa(&mut self) {
        self.put(&[ZONE, &[0, 6, 0, 1], &TTL.to_be_bytes()]);
        let length = 2 * (3 + ZONE.len()) + 20;
        self.put(&[&[0, length as u8], b"\x02ns", ZONE, b"\x02hm", ZONE]);
        // Serial, refresh, retry, expire, TTL of what is not there.
        for number in [1, 86_400, 7200, 3_600_000, TTL] {
            self.put(&[&number.to_be_bytes()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Asked; 6] = [
        Asked::A(0),
        Asked::A(9999),
        Asked::Native(1234),
        Asked::Synthesised(77),
        Asked::FreshA(0x0123_4567_89ab_cdef),
        Asked::FreshSynthesised(u64::MAX),
    ];

    /// What the upstream says; for AAAA that it does not have, what a DNS64 makes of it.
    fn good(asked: Asked, id: u16) -> Vec<u8> {
        let (mut query, mut out) = ([0; SIZE], [0; SIZE]);
        let length = asked.query(id, &mut query);
        let length = answer(&query[..length], &mut out).expect("a good query");
        let mut whole = out[..length].to_vec();
        if matches!(asked, Asked::Synthesised(_) | Asked::FreshSynthesised(_)) {
            assert_eq!(whole[6..10], [0, 0, 0, 1], "NODATA with SOA");
            whole.truncate(HEADER + asked.question(&mut [0; 128]));
            whole[6..12].copy_from_slice(&[0, 1, 0, 0, 0, 0]);
            whole.extend([0xc0, 12, 0, 28, 0, 1, 0, 0, 0, 60]);
            whole.extend(asked.data(&mut [0; 18]));
        }
        whole
    }

    #[test]
    fn right_answers_pass() {
        for asked in ALL {
            assert_eq!(asked.check(500, &good(asked, 500)), Ok(()), "{asked:?}");
        }
    }

    #[test]
    fn a_synthesised_address_is_the_prefix_and_the_name_s_own_ipv4() {
        assert_eq!(
            synthesised(known(77)),
            "64:ff9b::32.0.0.77".parse::<Ipv6Addr>().expect("one")
        );
    }

    #[test]
    fn every_other_answer_is_noticed() {
        for asked in ALL {
            let right = good(asked, 500);
            assert!(asked.check(501, &right).is_err(), "another id");
            for other in ALL.into_iter().filter(|other| *other != asked) {
                assert!(other.check(500, &right).is_err(), "{asked:?} for {other:?}");
            }
            let end = HEADER
                + asked.question(&mut [0; 128])
                + 12
                + if matches!(asked, Asked::A(_) | Asked::FreshA(_)) {
                    4
                } else {
                    16
                };
            // What may differ: AA and RD, RA and other flags of that byte, counts of what follows the answer, a TTL.
            for at in (0..end).filter(|at| !matches!(at, 2 | 3 | 8..=11) && !(end - 22..end - 4).contains(at)) {
                let mut changed = right.clone();
                changed[at] ^= 1;
                assert!(asked.check(500, &changed).is_err(), "{asked:?}: byte {at} changed");
            }
            for length in 0..end {
                assert!(asked.check(500, &right[..length]).is_err(), "{asked:?}: {length} bytes");
            }
        }
    }

    #[test]
    fn the_upstream_knows_its_names_in_any_case_and_no_others() {
        let ask = |name: &[u8], kind: u16| {
            let query = [
                &[0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0],
                name,
                &kind.to_be_bytes(),
                &[0, 1],
            ]
            .concat();
            let mut out = [0; SIZE];
            let length = answer(&query, &mut out).expect("a good query");
            assert_eq!(&out[HEADER..HEADER + name.len()], name, "the name as it was asked");
            assert!(length > HEADER);
            (out[3] & 15, out[7], out[9])
        };
        assert_eq!(ask(b"\x02N7\x02V4\x07eXample\x03ORG\0", A), (0, 1, 0));
        assert_eq!(ask(b"\x02n7\x02v4\x07example\x03org\0", AAAA), (0, 0, 1));
        assert_eq!(ask(b"\x02n7\x02v6\x07example\x03org\0", AAAA), (0, 1, 0));
        assert_eq!(ask(b"\x02m7\x02v6\x07example\x03org\0", AAAA), (3, 0, 1));
        assert_eq!(ask(b"\x07example\x03org\0", 2), (0, 0, 1));
        assert_eq!(ask(b"\0", 2), (5, 0, 0));
    }

    #[test]
    fn what_is_no_query_gets_no_answer() {
        let mut query = [0; SIZE];
        let length = Asked::A(1).query(1, &mut query);
        let mut out = [0; SIZE];
        for cut in 0..length - EDNS.len() {
            assert_eq!(answer(&query[..cut], &mut out), None, "{cut} bytes");
        }
        query[2] |= 0x80;
        assert_eq!(answer(&query[..length], &mut out), None, "an answer");
    }
}
