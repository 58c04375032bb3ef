//! The server name that a TLS client asks for, read from the first bytes that it sends: nothing is decrypted, nothing
//! is answered, and whether the rest is proper TLS is the server's to judge.

/// What the first bytes of a connection tell of the server's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sni<'a> {
    /// This one: a DNS name of at most 253 bytes without a dot at the end, in the client's own upper and lower case.
    Name(&'a str),
    /// It begins like a ClientHello, and the name may still come.
    NeedMore,
    /// There is none: no TLS, a client that names no server, or a name that is none.
    None,
}

/// A ClientHello is two kilobytes at most in practice, with a key share of today's largest kind. The protocol would
/// allow one of 16 MiB, and whoever sends that is not waiting for a name.
const LONGEST_HELLO: usize = 1 << 16;

/// Looks for the name in `bytes`, which are the connection's from its first on. It allocates nothing.
///
/// The answer comes as soon as the last byte of the name is there; more bytes never change a name or a [`Sni::None`].
/// A name that continues in another TLS record is not found.
pub fn sni(bytes: &[u8]) -> Sni<'_> {
    let mut hello = Handshake {
        bytes,
        record: 0,
        message: 4,
    };
    match client_hello(&mut hello) {
        Ok(name) => Sni::Name(name),
        Err(Stop::Short) => Sni::NeedMore,
        Err(Stop::Nothing) => Sni::None,
    }
}

/// Why there is no name.
enum Stop {
    /// The bytes end.
    Short,
    /// It cannot come any more.
    Nothing,
}

/// RFC 8446, 4.1.2; older versions differ in nothing that matters here.
fn client_hello<'a>(hello: &mut Handshake<'a>) -> Result<&'a str, Stop> {
    const CLIENT_HELLO: usize = 1;
    const SERVER_NAME: usize = 0;
    let kind = hello.number(1)?;
    let length = hello.number(3)?;
    if kind != CLIENT_HELLO || length > LONGEST_HELLO {
        return Err(Stop::Nothing);
    }
    hello.message = length;
    // Version and random bytes.
    hello.skip(2 + 32)?;
    // Session id, cipher suites, compression methods.
    for size_of_length in [1, 2, 1] {
        let length = hello.number(size_of_length)?;
        hello.skip(length)?;
    }
    if hello.number(2)? != hello.message {
        return Err(Stop::Nothing);
    }
    while hello.message > 0 {
        let kind = hello.number(2)?;
        let length = hello.number(2)?;
        if kind == SERVER_NAME {
            return server_name(hello, length);
        }
        hello.skip(length)?;
    }
    Err(Stop::Nothing)
}

/// RFC 6066, section 3: a list, in which only one kind of name was ever defined, and only one of each kind may be.
fn server_name<'a>(hello: &mut Handshake<'a>, extension: usize) -> Result<&'a str, Stop> {
    const HOST_NAME: usize = 0;
    let list = hello.number(2)?;
    let kind = hello.number(1)?;
    let length = hello.number(2)?;
    if list + 2 != extension || kind != HOST_NAME || length == 0 || length + 3 > list {
        return Err(Stop::Nothing);
    }
    let name = hello.take(length)?;
    dns_name(name).ok_or(Stop::Nothing)
}

/// Letters, digits, `-` and `_`, which some use although host names have none; no IPv4 address (RFC 6066, section 3).
fn dns_name(bytes: &[u8]) -> Option<&str> {
    let name = str::from_utf8(bytes).ok().filter(|name| name.len() <= 253)?;
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let is_number = |label: &str| label.bytes().all(|byte| byte.is_ascii_digit());
    let numeric = name.rsplit('.').next().is_none_or(is_number);
    (!numeric && name.split('.').all(is_label)).then_some(name)
}

/// The bytes of one handshake message, across the records that carry it (RFC 8446, 5.1).
struct Handshake<'a> {
    /// What is left, records and their headers alike.
    bytes: &'a [u8],
    /// Bytes left in the record at hand.
    record: usize,
    /// Bytes left in the message.
    message: usize,
}

impl<'a> Handshake<'a> {
    /// The next `size` bytes, at most 3, as a number.
    fn number(&mut self, size: usize) -> Result<usize, Stop> {
        (0..size).try_fold(0, |number, _| {
            let byte = self.take(1)?.first().ok_or(Stop::Short)?;
            Ok(number << 8 | usize::from(*byte))
        })
    }

    fn skip(&mut self, mut length: usize) -> Result<(), Stop> {
        if length > self.message {
            return Err(Stop::Nothing);
        }
        while length > 0 {
            self.open_record()?;
            let part = length.min(self.record);
            self.take(part)?;
            length -= part;
        }
        Ok(())
    }

    /// The next `length` bytes, at least one, which must lie in one record.
    fn take(&mut self, length: usize) -> Result<&'a [u8], Stop> {
        if length > self.message {
            return Err(Stop::Nothing);
        }
        self.open_record()?;
        if length > self.record {
            return Err(Stop::Nothing);
        }
        let (taken, bytes) = self.bytes.split_at_checked(length).ok_or(Stop::Short)?;
        self.bytes = bytes;
        self.record -= length;
        self.message -= length;
        Ok(taken)
    }

    /// Reads the header of the next record when one has ended.
    fn open_record(&mut self) -> Result<(), Stop> {
        const HANDSHAKE: u8 = 22;
        const MAJOR_VERSION: u8 = 3;
        const LONGEST: usize = 1 << 14;
        if self.record > 0 {
            return Ok(());
        }
        let begin = [HANDSHAKE, MAJOR_VERSION];
        if !self.bytes.iter().zip(&begin).all(|(byte, wanted)| byte == wanted) {
            return Err(Stop::Nothing);
        }
        let (&[_, _, _, high, low], bytes) = self.bytes.split_first_chunk().ok_or(Stop::Short)?;
        let length = usize::from(u16::from_be_bytes([high, low]));
        if length == 0 || length > LONGEST {
            return Err(Stop::Nothing);
        }
        self.bytes = bytes;
        self.record = length;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::Random;

    /// A ClientHello with these extensions.
    fn message(extensions: &[u8]) -> Vec<u8> {
        let length = u16::try_from(extensions.len()).expect("short").to_be_bytes();
        let suites = [0, 4, 0x13, 0x01, 0x13, 0x02, 1, 0];
        let body = [&[3, 3], [7; 32].as_slice(), &[2, 9, 9], &suites, &length, extensions].concat();
        let length = u32::try_from(body.len()).expect("short").to_be_bytes();
        [&[1], &length[1..], &body].concat()
    }

    fn record(fragment: &[u8]) -> Vec<u8> {
        let length = u16::try_from(fragment.len()).expect("short").to_be_bytes();
        [&[22, 3, 1], length.as_slice(), fragment].concat()
    }

    fn extension(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(value.len()).expect("short").to_be_bytes();
        [kind.to_be_bytes().as_slice(), &length, value].concat()
    }

    fn server_name(name: &[u8]) -> Vec<u8> {
        let length = u16::try_from(name.len()).expect("short");
        let list = [(length + 3).to_be_bytes().as_slice(), &[0], &length.to_be_bytes(), name].concat();
        extension(0, &list)
    }

    fn hello(name: &[u8]) -> Vec<u8> {
        let grease = extension(0x0a0a, b"");
        let versions = extension(43, &[2, 3, 4]);
        record(&message(&[grease, server_name(name), versions].concat()))
    }

    #[test]
    fn the_name_is_found_as_soon_as_its_last_byte_is_there() {
        let bytes = hello(b"www.Example.org");
        let behind = extension(43, &[2, 3, 4]).len();
        for cut in 0..=bytes.len() {
            let expected = if cut < bytes.len() - behind {
                Sni::NeedMore
            } else {
                Sni::Name("www.Example.org")
            };
            assert_eq!(sni(&bytes[..cut]), expected, "{cut}");
        }
        let more = [bytes.as_slice(), &[0xff; 100]].concat();
        assert_eq!(sni(&more), Sni::Name("www.Example.org"));
    }

    #[test]
    fn a_hello_in_several_records_is_read_unless_the_name_itself_is_split() {
        let message = message(&server_name(b"www.example.org"));
        let name = message.len() - b"www.example.org".len();
        for at in 1..message.len() {
            let (head, tail) = message.split_at(at);
            let bytes = [record(head), record(tail)].concat();
            let expected = if at <= name {
                Sni::Name("www.example.org")
            } else {
                Sni::None
            };
            assert_eq!(sni(&bytes), expected, "{at}");
            assert_eq!(
                sni(&bytes[..head.len() + 7]),
                if at <= name { Sni::NeedMore } else { Sni::None },
                "{at}"
            );
        }
        let header: Vec<u8> = message[..name].iter().flat_map(|byte| record(&[*byte])).collect();
        assert_eq!(
            sni(&[header, record(&message[name..])].concat()),
            Sni::Name("www.example.org")
        );
    }

    #[test]
    fn names_are_dns_names() {
        let label = "a".repeat(63);
        let longest = [label.as_str(), &label, &label, &label[..61]].join(".");
        for name in [
            "localhost",
            "a.b",
            "xn--bcher-kva.example.org",
            "_x.example.org",
            "1.example.org",
            "0a",
            &longest,
        ] {
            assert_eq!(sni(&hello(name.as_bytes())), Sni::Name(name));
        }
        let (long_label, too_long) = (format!("{label}a.org"), format!("{longest}a"));
        for name in [
            "",
            ".",
            "example.org.",
            ".example.org",
            "a..b",
            "-a.org",
            "a-.org",
            "a b",
            "a/b",
            "a\0b",
            "bücher.example",
            "192.0.2.1",
            "1",
            "2001:db8::1",
            "*.example.org",
            "a\r\nb",
            &long_label,
            &too_long,
        ] {
            assert_eq!(sni(&hello(name.as_bytes())), Sni::None, "{name}");
        }
        assert_eq!(sni(&hello(b"\xff\xfe")), Sni::None);
    }

    #[test]
    fn what_is_no_hello_with_a_name_is_told_at_its_first_wrong_byte() {
        let good = message(&server_name(b"www.example.org"));
        let changed = |at: usize, value: u8| {
            let mut message = good.clone();
            message[at] = value;
            record(&message)
        };
        let empty_record = [record(&good[..1]), record(b"")].concat();
        for (what, bytes) in [
            ("HTTP", b"GET /".to_vec()),
            ("the first byte of HTTP", b"G".to_vec()),
            ("an alert", vec![21]),
            ("SSL 2", vec![0x80, 0x2e, 1, 0, 2]),
            ("another major version", vec![22, 2]),
            ("an empty record", empty_record),
            ("a record of more than 2^14 bytes", vec![22, 3, 1, 0x40, 0x01]),
            ("a ServerHello", changed(0, 2)),
            ("a hello of 16 MiB", changed(1, 0xff)),
            ("a hello shorter than its parts", changed(3, 50)),
            ("a session id that overruns", changed(38, 0xff)),
            ("no extensions at all", record(&message(b""))),
            ("extensions, but no name", record(&message(&extension(43, &[2, 3, 4])))),
            ("extensions of another length", changed(50, good[50] + 1)),
            ("an extension that overruns", changed(54, good[54] + 1)),
            ("a list of another length", changed(56, good[56] + 1)),
            ("another kind of name", changed(57, 1)),
            ("a name that overruns its list", changed(59, good[59] + 1)),
            ("an empty list", record(&message(&extension(0, &[0, 0])))),
            ("an empty extension", record(&message(&extension(0, b"")))),
        ] {
            assert_eq!(sni(&bytes), Sni::None, "{what}");
        }
    }

    #[test]
    #[cfg(feature = "io")]
    fn the_hello_of_a_real_client_is_understood() {
        use std::sync::Arc;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        for versions in [&[&rustls::version::TLS13], &[&rustls::version::TLS12]] {
            let config = rustls::ClientConfig::builder_with_provider(provider.clone())
                .with_protocol_versions(versions)
                .expect("versions")
                .with_root_certificates(rustls::RootCertStore::empty())
                .with_no_client_auth();
            let config = Arc::new(config);
            for (name, expected) in [
                ("ingress.example.org", Sni::Name("ingress.example.org")),
                ("192.0.2.1", Sni::None),
            ] {
                let name = name.try_into().expect("a name");
                let mut client = rustls::ClientConnection::new(config.clone(), name).expect("a client");
                let mut bytes = Vec::new();
                client.write_tls(&mut bytes).expect("written");
                assert_eq!(sni(&bytes), expected);
                assert_eq!(sni(&bytes[..40]), Sni::NeedMore);
            }
        }
    }

    #[test]
    fn mutated_hellos_never_panic_and_an_answer_stays() {
        let mut random = Random::new(3);
        let mut below = |bound: usize| usize::try_from(random.below(bound as u64)).expect("below bound");
        let good = hello(b"www.example.org");
        for _ in 0..100_000 {
            let mut bytes = good.clone();
            for _ in 0..=below(3) {
                let at = below(bytes.len());
                bytes[at] = u8::try_from(below(256)).expect("a byte");
            }
            let whole = sni(&bytes);
            let cut = sni(&bytes[..below(bytes.len())]);
            assert!(
                cut == Sni::NeedMore || cut == whole,
                "{bytes:?}: {cut:?}, then {whole:?}"
            );
        }
    }
}
