//! Every rule as a vector, and what holds for all of them.

use super::*;
use crate::balance::Random;

const TCP4_LINE: &[u8] = b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\r\n";
const TCP4_LONGEST: &[u8] = b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n";
const TCP6_LONGEST: &[u8] = b"PROXY TCP6 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff \
    ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n";
const UNKNOWN_LONGEST: &[u8] = b"PROXY UNKNOWN ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff \
    ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n";

/// What a header says: command, addresses, transport, TLVs.
#[derive(Debug, PartialEq)]
struct Says {
    command: Command,
    pair: Option<(SocketAddr, SocketAddr)>,
    transport: Transport,
    tlvs: Vec<(u8, Vec<u8>)>,
}

/// A promise, the bytes, and what they are; the header is all of them.
type Vector = (&'static str, Vec<u8>, Result<Says, Reason>);

fn says(pair: Option<(&str, &str)>, transport: Transport, tlvs: &[(u8, &[u8])]) -> Result<Says, Reason> {
    Ok(Says {
        command: Command::Proxy,
        pair: pair.map(|(source, destination)| (address(source), address(destination))),
        transport,
        tlvs: tlvs.iter().map(|(kind, value)| (*kind, value.to_vec())).collect(),
    })
}

fn stream(source: &str, destination: &str) -> Result<Says, Reason> {
    says(Some((source, destination)), Transport::Stream, &[])
}

fn nobody() -> Result<Says, Reason> {
    says(None, Transport::Unspec, &[])
}

fn local() -> Result<Says, Reason> {
    nobody().map(|says| Says {
        command: Command::Local,
        ..says
    })
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// Version and command, family and transport, length as given, the rest.
fn raw(command: u8, kind: u8, length: usize, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(length).expect("a length").to_be_bytes();
    [b"\r\n\r\n\0\r\nQUIT\n", [command, kind].as_slice(), &length, body].concat()
}

fn v2(command: u8, kind: u8, body: &[u8]) -> Vec<u8> {
    raw(command, kind, body.len(), body)
}

/// 192.0.2.1:56324 to 198.51.100.2:443, then `tlvs`.
fn v2_tcp4(tlvs: &[u8]) -> Vec<u8> {
    v2(0x21, 0x11, &[V4_PAIR, tlvs].concat())
}

const V4_PAIR: &[u8] = &[192, 0, 2, 1, 198, 51, 100, 2, 0xdc, 0x04, 0x01, 0xbb];
/// [2001:db8::1]:56324 to [2001:db8::2]:443.
const V6_PAIR: &[u8] = &[
    0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, //
    0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, //
    0xdc, 0x04, 0x01, 0xbb,
];

fn tlv(kind: u8, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len()).expect("a length").to_be_bytes();
    [&[kind], length.as_slice(), value].concat()
}

/// A header of one NOOP, the checksum and one more NOOP.
fn summed(flip: Option<usize>) -> Vec<u8> {
    let mut bytes = v2_tcp4(&[tlv(NOOP, b"a"), tlv(CRC32C, &[0; 4]), tlv(NOOP, b"zz")].concat());
    let at = bytes.len() - 5 - 4;
    let sum = crc32c::crc32c(0, &bytes).to_be_bytes();
    bytes[at..at + 4].copy_from_slice(&sum);
    if let Some(flip) = flip {
        bytes[flip] ^= 1;
    }
    bytes
}

fn vectors() -> Vec<Vector> {
    let mut vectors = lines();
    vectors.extend(binary());
    vectors
}

fn lines() -> Vec<Vector> {
    let v4 = || stream("192.0.2.1:56324", "198.51.100.2:443");
    let line = |promise, text: &[u8], result| (promise, text.to_vec(), result);
    let word = Err(Reason::Protocol);
    let fields = Err(Reason::Fields);
    let no_address = Err(Reason::Address);
    let no_port = Err(Reason::Port);
    let line_end = Err(Reason::LineEnd);
    let junk = [b"PROXY UNKNOWN ".as_slice(), &[b'x'; 91], b"\r\n"].concat();
    let too_much = [b"PROXY UNKNOWN ".as_slice(), &[b'x'; 92], b"\r\n"].concat();
    vec![
        line("TCP4", TCP4_LINE, v4()),
        line(
            "the longest TCP4 line",
            TCP4_LONGEST,
            stream("255.255.255.255:65535", "255.255.255.255:65535"),
        ),
        line(
            "the shortest TCP4 line",
            b"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n",
            stream("0.0.0.0:0", "0.0.0.0:0"),
        ),
        line(
            "TCP6, its groups in either case and with leading zeros",
            b"PROXY TCP6 2001:DB8::1 2001:0db8:0:0:0:0:0:0002 56324 443\r\n",
            stream("[2001:db8::1]:56324", "[2001:db8::2]:443"),
        ),
        line("the longest TCP6 line", TCP6_LONGEST, {
            let all = "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535";
            stream(all, all)
        }),
        line(
            "the shortest TCP6 line",
            b"PROXY TCP6 :: :: 0 0\r\n",
            stream("[::]:0", "[::]:0"),
        ),
        line(
            "TCP6 as nginx writes an IPv4 client",
            b"PROXY TCP6 ::ffff:192.0.2.1 ::FFFF:198.51.100.2 1 2\r\n",
            stream("[::ffff:192.0.2.1]:1", "[::ffff:198.51.100.2]:2"),
        ),
        line("UNKNOWN", b"PROXY UNKNOWN\r\n", nobody()),
        line("UNKNOWN with addresses, which do not count", UNKNOWN_LONGEST, nobody()),
        line("UNKNOWN with junk", b"PROXY UNKNOWN \0\xff  \r \n PROXY\r\n", nobody()),
        line("UNKNOWN with a space", b"PROXY UNKNOWN \r\n", nobody()),
        line("107 bytes", &junk, nobody()),
        line("108 bytes", &too_much, Err(Reason::TooLong(107))),
        line(
            "an endless line",
            &[b"PROXY TCP6 ".as_slice(), &[b'1'; 4096]].concat(),
            Err(Reason::TooLong(104)),
        ),
        line("another protocol", b"GET / HTTP/1.1\r\n", Err(Reason::NoHeader)),
        line(
            "another protocol that begins alike",
            b"PROPFIND / HTTP/1.1\r\n",
            Err(Reason::NoHeader),
        ),
        line(
            "TLS",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            Err(Reason::NoHeader),
        ),
        line(
            "a space in front",
            b" PROXY TCP4 192.0.2.1 198.51.100.2 1 2\r\n",
            Err(Reason::NoHeader),
        ),
        line(
            "lower case",
            b"proxy TCP4 192.0.2.1 198.51.100.2 1 2\r\n",
            Err(Reason::NoHeader),
        ),
        line(
            "a tab",
            b"PROXY\tTCP4 192.0.2.1 198.51.100.2 1 2\r\n",
            Err(Reason::NoHeader),
        ),
        line("no protocol", b"PROXY \r\n", word),
        line(
            "lower case protocol",
            b"PROXY tcp4 192.0.2.1 198.51.100.2 1 2\r\n",
            Err(Reason::Protocol),
        ),
        line(
            "UDP",
            b"PROXY UDP4 192.0.2.1 198.51.100.2 1 2\r\n",
            Err(Reason::Protocol),
        ),
        line(
            "TCP",
            b"PROXY TCP 192.0.2.1 198.51.100.2 1 2\r\n",
            Err(Reason::Protocol),
        ),
        line(
            "TCP5",
            b"PROXY TCP5 192.0.2.1 198.51.100.2 1 2\r\n",
            Err(Reason::Protocol),
        ),
        line(
            "TCP46",
            b"PROXY TCP46 192.0.2.1 198.51.100.2 1 2\r\n",
            Err(Reason::Protocol),
        ),
        line(
            "UNKNOWN and more in one word",
            b"PROXY UNKNOWNS\r\n",
            Err(Reason::Protocol),
        ),
        line(
            "two spaces before the protocol",
            b"PROXY  TCP4 192.0.2.1 198.51.100.2 1 2\r\n",
            Err(Reason::Protocol),
        ),
        line("TCP4 alone", b"PROXY TCP4\r\n", Err(Reason::Protocol)),
        line("TCP4 and a space", b"PROXY TCP4 \r\n", fields),
        line(
            "two spaces before an address",
            b"PROXY TCP4  192.0.2.1 198.51.100.2 1 2\r\n",
            Err(Reason::Fields),
        ),
        line(
            "two spaces between addresses",
            b"PROXY TCP4 192.0.2.1  198.51.100.2 1 2\r\n",
            Err(Reason::Fields),
        ),
        line(
            "a space at the end",
            b"PROXY TCP4 192.0.2.1 198.51.100.2 1 2 \r\n",
            Err(Reason::Fields),
        ),
        line(
            "a fifth word",
            b"PROXY TCP4 192.0.2.1 198.51.100.2 1 2 3\r\n",
            Err(Reason::Fields),
        ),
        line(
            "one port",
            b"PROXY TCP4 192.0.2.1 198.51.100.2 1\r\n",
            Err(Reason::Fields),
        ),
        line(
            "no ports",
            b"PROXY TCP4 192.0.2.1 198.51.100.2\r\n",
            Err(Reason::Fields),
        ),
        line(
            "IPv6 in TCP4",
            b"PROXY TCP4 2001:db8::1 2001:db8::2 1 2\r\n",
            no_address,
        ),
        line(
            "IPv6 to IPv4 in TCP4",
            b"PROXY TCP4 2001:db8::1 192.0.2.1 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "a mapped address in TCP4",
            b"PROXY TCP4 ::ffff:192.0.2.1 192.0.2.1 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "IPv4 in TCP6",
            b"PROXY TCP6 192.0.2.1 198.51.100.2 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "IPv6 to IPv4 in TCP6",
            b"PROXY TCP6 2001:db8::1 192.0.2.1 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "IPv4 in any IPv6 but the mapped",
            b"PROXY TCP6 64:ff9b::192.0.2.1 :: 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "an old compatible address",
            b"PROXY TCP6 ::192.0.2.1 :: 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "leading zeros in a mapped address",
            b"PROXY TCP6 ::ffff:192.0.02.1 :: 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "brackets",
            b"PROXY TCP6 [2001:db8::1] [2001:db8::2] 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "a zone",
            b"PROXY TCP6 fe80::1%eth0 2001:db8::2 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "two double colons",
            b"PROXY TCP6 2001::db8::1 2001:db8::2 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "seven groups",
            b"PROXY TCP6 1:2:3:4:5:6:7 2001:db8::2 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "nine groups",
            b"PROXY TCP6 1:2:3:4:5:6:7:8:9 2001:db8::2 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "five digits in a group",
            b"PROXY TCP6 2001:0db80::1 2001:db8::2 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "256 in an address",
            b"PROXY TCP4 256.0.2.1 198.51.100.2 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "leading zeros in an address",
            b"PROXY TCP4 192.0.02.1 198.51.100.2 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "an octal-looking address",
            b"PROXY TCP4 0300.0.2.1 198.51.100.2 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "a hexadecimal address",
            b"PROXY TCP4 0xc0.0.2.1 198.51.100.2 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "three numbers",
            b"PROXY TCP4 192.0.513 198.51.100.2 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "a dot at the end",
            b"PROXY TCP4 192.0.2.1. 198.51.100.2 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "a name",
            b"PROXY TCP4 www.example.org 198.51.100.2 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "a signed address",
            b"PROXY TCP4 +192.0.2.1 198.51.100.2 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "no UTF-8",
            b"PROXY TCP4 192.0.2.\xb9 198.51.100.2 1 2\r\n",
            Err(Reason::Address),
        ),
        line(
            "a NUL",
            b"PROXY TCP4 192.0.2.1\0 198.51.100.2 1 2\r\n",
            Err(Reason::Address),
        ),
        line("port +443", b"PROXY TCP4 192.0.2.1 198.51.100.2 1 +443\r\n", no_port),
        line(
            "port -1",
            b"PROXY TCP4 192.0.2.1 198.51.100.2 -1 443\r\n",
            Err(Reason::Port),
        ),
        line(
            "port 0443",
            b"PROXY TCP4 192.0.2.1 198.51.100.2 1 0443\r\n",
            Err(Reason::Port),
        ),
        line(
            "port 00",
            b"PROXY TCP4 192.0.2.1 198.51.100.2 00 443\r\n",
            Err(Reason::Port),
        ),
        line(
            "port 65536",
            b"PROXY TCP4 192.0.2.1 198.51.100.2 1 65536\r\n",
            Err(Reason::Port),
        ),
        line(
            "port 4294967297",
            b"PROXY TCP4 192.0.2.1 198.51.100.2 1 4294967297\r\n",
            Err(Reason::Port),
        ),
        line(
            "port 0x1",
            b"PROXY TCP4 192.0.2.1 198.51.100.2 1 0x1\r\n",
            Err(Reason::Port),
        ),
        line(
            "port 1 in full-width digits",
            "PROXY TCP4 192.0.2.1 198.51.100.2 1 \u{ff11}\r\n".as_bytes(),
            Err(Reason::Port),
        ),
        line(
            "a line feed alone",
            b"PROXY TCP4 192.0.2.1 198.51.100.2 1 2\n",
            line_end,
        ),
        line(
            "a carriage return alone",
            b"PROXY TCP4 192.0.2.1 198.51.100.2 1 2\rx",
            Err(Reason::LineEnd),
        ),
        line(
            "two carriage returns",
            b"PROXY TCP4 192.0.2.1 198.51.100.2 1 2\r\r\n",
            Err(Reason::LineEnd),
        ),
        line(
            "a line feed within",
            b"PROXY TCP4 192.0.2.1\n198.51.100.2 1 2\r\n",
            Err(Reason::LineEnd),
        ),
        line(
            "UNKNOWN and a line feed alone",
            b"PROXY UNKNOWN\n",
            Err(Reason::Protocol),
        ),
        line(
            "UNKNOWN and a carriage return alone",
            b"PROXY UNKNOWN\rx\r\n",
            Err(Reason::LineEnd),
        ),
    ]
}

fn binary() -> Vec<Vector> {
    let v4 = |transport, tlvs: &[(u8, &[u8])]| says(Some(("192.0.2.1:56324", "198.51.100.2:443")), transport, tlvs);
    let plain = || v4(Transport::Stream, &[]);
    let v6 = |transport| says(Some(("[2001:db8::1]:56324", "[2001:db8::2]:443")), transport, &[]);
    let (full, over) = ([b'a'; 1024], [b'a'; 1025]);
    vec![
        ("TCP over IPv4", v2_tcp4(b""), plain()),
        ("UDP over IPv4", v2(0x21, 0x12, V4_PAIR), v4(Transport::Datagram, &[])),
        ("TCP over IPv6", v2(0x21, 0x21, V6_PAIR), v6(Transport::Stream)),
        ("UDP over IPv6", v2(0x21, 0x22, V6_PAIR), v6(Transport::Datagram)),
        (
            "a unix stream",
            v2(0x21, 0x31, &[b'/'; 216]),
            says(None, Transport::Stream, &[]),
        ),
        (
            "unix datagrams",
            v2(0x21, 0x32, &[0; 216]),
            says(None, Transport::Datagram, &[]),
        ),
        (
            "a unix stream with a TLV",
            v2(0x21, 0x31, &[&[0; 216], tlv(NOOP, b"x").as_slice()].concat()),
            says(None, Transport::Stream, &[(NOOP, b"x")]),
        ),
        (
            "a unix stream cut short",
            v2(0x21, 0x31, &[0; 215]),
            Err(Reason::AddressesCut),
        ),
        ("LOCAL", v2(0x20, 0x00, b""), local()),
        (
            "LOCAL with addresses, which do not count",
            v2(0x20, 0x11, V4_PAIR),
            local(),
        ),
        (
            "LOCAL with junk in place of addresses",
            v2(0x20, 0x21, &[0xff; 7]),
            local(),
        ),
        ("LOCAL of no known family", v2(0x20, 0xff, &[0xff; 40]), local()),
        (
            "LOCAL with TLVs that overrun",
            v2(0x20, 0x11, &[V4_PAIR, &[4, 0xff, 0xff]].concat()),
            local(),
        ),
        ("LOCAL at the limit", v2(0x20, 0x00, &[0; 520]), local()),
        (
            "LOCAL over the limit",
            v2(0x20, 0x00, &[0; 521]),
            Err(Reason::TooLong(536)),
        ),
        ("UNSPEC", v2(0x21, 0x00, b""), nobody()),
        ("UNSPEC with bytes to skip", v2(0x21, 0x00, &[0xff; 33]), nobody()),
        ("UNSPEC transport over IPv4", v2(0x21, 0x10, V4_PAIR), nobody()),
        ("TCP over UNSPEC", v2(0x21, 0x01, V4_PAIR), nobody()),
        (
            "version nibble 1",
            v2(0x11, 0x11, V4_PAIR),
            Err(Reason::VersionNibble(1)),
        ),
        (
            "version nibble 3",
            v2(0x31, 0x11, V4_PAIR),
            Err(Reason::VersionNibble(3)),
        ),
        (
            "version nibble 0",
            v2(0x01, 0x11, V4_PAIR),
            Err(Reason::VersionNibble(0)),
        ),
        ("command 2", v2(0x22, 0x11, V4_PAIR), Err(Reason::Command(2))),
        ("command 15", v2(0x2f, 0x11, V4_PAIR), Err(Reason::Command(15))),
        ("family 4", v2(0x21, 0x41, V6_PAIR), Err(Reason::Family(4))),
        ("family 15", v2(0x21, 0xf1, V6_PAIR), Err(Reason::Family(15))),
        ("transport 3", v2(0x21, 0x13, V4_PAIR), Err(Reason::Transport(3))),
        (
            "transport 3 over UNSPEC",
            v2(0x21, 0x03, b""),
            Err(Reason::Transport(3)),
        ),
        ("transport 15", v2(0x21, 0x2f, V6_PAIR), Err(Reason::Transport(15))),
        (
            "a byte of the signature is wrong",
            {
                let mut bytes = v2_tcp4(b"");
                bytes[11] = b'\r';
                bytes
            },
            Err(Reason::NoHeader),
        ),
        ("no addresses", v2(0x21, 0x11, b""), Err(Reason::AddressesCut)),
        (
            "IPv4 addresses cut short",
            v2(0x21, 0x11, &V4_PAIR[..11]),
            Err(Reason::AddressesCut),
        ),
        (
            "IPv6 addresses cut short",
            v2(0x21, 0x21, &V6_PAIR[..35]),
            Err(Reason::AddressesCut),
        ),
        (
            "IPv4 addresses for IPv6",
            v2(0x21, 0x21, V4_PAIR),
            Err(Reason::AddressesCut),
        ),
        ("IPv6 addresses for IPv4", v2(0x21, 0x11, V6_PAIR), Err(Reason::TlvCut)),
        (
            "length 65535",
            raw(0x21, 0x11, 65_535, V4_PAIR),
            Err(Reason::TooLong(536)),
        ),
        (
            "TLVs of all kinds",
            v2_tcp4(&[tlv(AUTHORITY, b"www.example.org"), tlv(ALPN, b"h2"), tlv(0xee, b"\0")].concat()),
            v4(
                Transport::Stream,
                &[(AUTHORITY, b"www.example.org"), (ALPN, b"h2"), (0xee, b"\0")],
            ),
        ),
        (
            "an empty TLV",
            v2_tcp4(&tlv(NOOP, b"")),
            v4(Transport::Stream, &[(NOOP, b"")]),
        ),
        (
            "the same TLV twice",
            v2_tcp4(&[tlv(0xe0, b"1"), tlv(0xe0, b"2")].concat()),
            v4(Transport::Stream, &[(0xe0, b"1"), (0xe0, b"2")]),
        ),
        ("a TLV of one byte", v2_tcp4(&[NOOP]), Err(Reason::TlvCut)),
        ("a TLV of two bytes", v2_tcp4(&[NOOP, 0]), Err(Reason::TlvCut)),
        (
            "a TLV that overruns by one",
            v2_tcp4(&[NOOP, 0, 2, 0]),
            Err(Reason::TlvCut),
        ),
        (
            "a stub behind a TLV",
            v2_tcp4(&[NOOP, 0, 1, 0, NOOP]),
            Err(Reason::TlvCut),
        ),
        (
            "a TLV of 65535 bytes",
            v2_tcp4(&[NOOP, 0xff, 0xff]),
            Err(Reason::TlvCut),
        ),
        (
            "an authority of 255 bytes",
            v2_tcp4(&tlv(AUTHORITY, &full[..255])),
            v4(Transport::Stream, &[(AUTHORITY, &full[..255])]),
        ),
        (
            "an authority of 256 bytes",
            v2_tcp4(&tlv(AUTHORITY, &full[..256])),
            Err(Reason::TlvTooLong(AUTHORITY)),
        ),
        (
            "a unique id of 128 bytes",
            v2_tcp4(&tlv(UNIQUE_ID, &full[..128])),
            v4(Transport::Stream, &[(UNIQUE_ID, &full[..128])]),
        ),
        (
            "a unique id of 129 bytes",
            v2_tcp4(&tlv(UNIQUE_ID, &full[..129])),
            Err(Reason::TlvTooLong(UNIQUE_ID)),
        ),
        (
            "a TLV of 1024 bytes is too long in all",
            v2_tcp4(&tlv(SSL, &full)),
            Err(Reason::TooLong(536)),
        ),
        (
            "a TLV of 1025 bytes likewise",
            v2_tcp4(&tlv(SSL, &over)),
            Err(Reason::TooLong(536)),
        ),
        (
            "exactly 536 bytes",
            v2_tcp4(&tlv(NOOP, &full[..505])),
            v4(Transport::Stream, &[(NOOP, &full[..505])]),
        ),
        (
            "537 bytes",
            v2_tcp4(&tlv(NOOP, &full[..506])),
            Err(Reason::TooLong(536)),
        ),
        ("a checksum among TLVs", summed(None), {
            let bytes = summed(None);
            v4(
                Transport::Stream,
                &[(NOOP, b"a"), (CRC32C, &bytes[35..39]), (NOOP, b"zz")],
            )
        }),
        ("a wrong checksum", summed(Some(38)), Err(Reason::Checksum)),
        (
            "a right checksum of another address",
            summed(Some(19)),
            Err(Reason::Checksum),
        ),
        (
            "a right checksum of other bytes before",
            summed(Some(31)),
            Err(Reason::Checksum),
        ),
        (
            "a right checksum of other bytes behind",
            summed(Some(43)),
            Err(Reason::Checksum),
        ),
        (
            "a checksum of three bytes",
            v2_tcp4(&tlv(CRC32C, &[0; 3])),
            Err(Reason::ChecksumForm),
        ),
        (
            "a checksum of five bytes",
            v2_tcp4(&tlv(CRC32C, &[0; 5])),
            Err(Reason::ChecksumForm),
        ),
        (
            "an empty checksum",
            v2_tcp4(&tlv(CRC32C, b"")),
            Err(Reason::ChecksumForm),
        ),
        (
            "two checksums",
            v2_tcp4(&[tlv(CRC32C, &[0; 4]), tlv(CRC32C, &[0; 4])].concat()),
            Err(Reason::ChecksumForm),
        ),
    ]
}

fn any(bytes: &[u8]) -> Parsed<'_> {
    parse(bytes, &Limits::default(), Versions::Any)
}

/// What `parsed` says of a header of `length` bytes.
fn told(parsed: &Parsed<'_>, length: usize) -> Option<Result<Says, Reason>> {
    match *parsed {
        Parsed::NeedMore { .. } => None,
        Parsed::Reject(reason) => Some(Err(reason)),
        Parsed::Header(header) => {
            assert_eq!(header.len, length, "{header:?}");
            assert_eq!(header.source.is_some(), header.destination.is_some());
            Some(Ok(Says {
                command: header.command,
                pair: header.source.zip(header.destination),
                transport: header.transport,
                tlvs: header.tlvs.map(|tlv| (tlv.kind, tlv.value.to_vec())).collect(),
            }))
        }
    }
}

#[test]
fn every_rule_of_the_specification_holds() {
    let vectors = vectors();
    assert!(vectors.len() > 100, "{}", vectors.len());
    for (promise, bytes, expected) in &vectors {
        assert_eq!(told(&any(bytes), bytes.len()).as_ref(), Some(expected), "{promise}");
    }
}

#[test]
fn a_header_cut_anywhere_needs_more_and_one_refused_stays_refused() {
    for (promise, bytes, expected) in vectors() {
        let mut refused = false;
        for cut in 0..bytes.len() {
            let parsed = any(&bytes[..cut]);
            match parsed {
                Parsed::NeedMore { at_least } => {
                    assert!(!refused, "{promise}, {cut}");
                    assert!(at_least > cut && at_least <= 536, "{promise}, {cut}: {at_least}");
                    if expected.is_ok() {
                        assert!(
                            at_least <= bytes.len(),
                            "{promise}, {cut}: {at_least} would wait for payload"
                        );
                    }
                }
                Parsed::Reject(reason) => {
                    refused = true;
                    assert_eq!(expected.as_ref().err(), Some(&reason), "{promise}, {cut}");
                }
                Parsed::Header(_) => panic!("{promise}, {cut}: {parsed:?}"),
            }
        }
    }
}

#[test]
fn what_needs_more_bytes_gets_on_with_as_many_as_it_asked_for() {
    for (promise, bytes, expected) in vectors() {
        let mut length = 0;
        let mut steps = 0;
        while let Parsed::NeedMore { at_least } = any(&bytes[..length]) {
            length = at_least.min(bytes.len());
            steps += 1;
            assert!(steps < 120, "{promise}");
        }
        assert_eq!(told(&any(&bytes[..length]), bytes.len()), Some(expected), "{promise}");
    }
}

#[test]
fn payload_behind_the_header_changes_nothing() {
    for (promise, bytes, _) in vectors().iter().filter(|(_, _, expected)| expected.is_ok()) {
        for payload in [b"\0".as_slice(), b"\r\n", b"PROXY UNKNOWN\r\n", &[0xff; 70_000]] {
            let all = [bytes.as_slice(), payload].concat();
            assert_eq!(any(&all), any(bytes), "{promise}");
        }
    }
}

#[test]
fn a_version_that_is_not_accepted_is_refused_and_named() {
    for (promise, bytes, expected) in vectors() {
        let first = if bytes.starts_with(b"PROXY ") {
            Version::V1
        } else {
            Version::V2
        };
        let other = if first == Version::V1 { Version::V2 } else { Version::V1 };
        let only = |version| parse(&bytes, &Limits::default(), Versions::Only(version));
        assert_eq!(told(&only(first), bytes.len()).as_ref(), Some(&expected), "{promise}");
        let reason = match expected {
            Err(Reason::NoHeader) => Reason::NoHeader,
            _ => Reason::VersionNotAccepted(first),
        };
        assert_eq!(only(other), Parsed::Reject(reason), "{promise}");
        for cut in 0..bytes.len() {
            match parse(&bytes[..cut], &Limits::default(), Versions::Only(other)) {
                Parsed::NeedMore { at_least } => assert!(at_least > cut && at_least <= 16, "{promise}, {cut}"),
                parsed => assert_eq!(parsed, Parsed::Reject(reason), "{promise}, {cut}"),
            }
        }
    }
}

#[test]
fn limits_are_kept_below_and_above_the_defaults() {
    let big = v2_tcp4(&[tlv(SSL, &[0; 1024]), tlv(0xe0, &[0; 1024])].concat());
    let limits = |v1, v2| Limits { v1, v2 };
    for (bytes, limits, expected) in [
        (&big, limits(107, big.len()), None),
        (&big, limits(107, big.len() - 1), Some(Reason::TooLong(big.len() - 1))),
        (
            &v2_tcp4(&tlv(SSL, &[0; 1025])),
            limits(107, 65_551),
            Some(Reason::TlvTooLong(SSL)),
        ),
        (&v2_tcp4(b""), limits(107, 28), None),
        (&v2_tcp4(b""), limits(107, 27), Some(Reason::TooLong(27))),
        (&v2_tcp4(b""), limits(107, 0), Some(Reason::TooLong(0))),
        (&TCP4_LINE.to_vec(), limits(TCP4_LINE.len(), 536), None),
        (
            &TCP4_LINE.to_vec(),
            limits(TCP4_LINE.len() - 1, 536),
            Some(Reason::TooLong(TCP4_LINE.len() - 1)),
        ),
        (&b"PROXY UNKNOWN\r\n".to_vec(), limits(15, 536), None),
        (
            &b"PROXY UNKNOWN\r\n".to_vec(),
            limits(14, 536),
            Some(Reason::TooLong(14)),
        ),
        (&b"PROXY UNKNOWN\r\n".to_vec(), limits(0, 536), Some(Reason::TooLong(0))),
    ] {
        let refused = match parse(bytes, &limits, Versions::Any) {
            Parsed::Header(_) => None,
            Parsed::Reject(reason) => Some(reason),
            parsed @ Parsed::NeedMore { .. } => panic!("{parsed:?}"),
        };
        assert_eq!(refused, expected, "{limits:?}");
        for cut in 0..bytes.len() {
            let parsed = parse(&bytes[..cut], &limits, Versions::Any);
            if let Parsed::NeedMore { at_least } = parsed {
                assert!(
                    at_least > cut && at_least <= limits.v1.max(limits.v2),
                    "{limits:?}, {cut}: {at_least}"
                );
            }
        }
    }
}

#[test]
fn what_is_written_is_what_the_specification_says() {
    let written = |source, destination| {
        let mut both = (b"before".to_vec(), Vec::new());
        encode_v1(address(source), address(destination), &mut both.0);
        encode_v2(address(source), address(destination), &[], false, &mut both.1);
        (both.0[6..].to_vec(), both.1)
    };
    let v4 = (TCP4_LINE.to_vec(), v2_tcp4(b""));
    assert_eq!(written("192.0.2.1:56324", "198.51.100.2:443"), v4);
    assert_eq!(
        written("[2001:db8::1]:56324", "[2001:db8::2]:443"),
        (
            b"PROXY TCP6 2001:db8::1 2001:db8::2 56324 443\r\n".to_vec(),
            v2(0x21, 0x21, V6_PAIR)
        )
    );
    let mut out = Vec::new();
    encode_local(Version::V1, &mut out);
    encode_local(Version::V2, &mut out);
    assert_eq!(out, [b"PROXY UNKNOWN\r\n", v2(0x20, 0, b"").as_slice()].concat());
}

#[test]
fn ipv4_on_an_ipv6_listener_is_told_as_ipv4() {
    for (source, destination) in [
        ("[::ffff:192.0.2.1]:56324", "[::ffff:198.51.100.2]:443"),
        ("[::ffff:192.0.2.1]:56324", "198.51.100.2:443"),
        ("192.0.2.1:56324", "[::ffff:198.51.100.2]:443"),
    ] {
        let (mut line, mut binary) = (Vec::new(), Vec::new());
        encode_v1(address(source), address(destination), &mut line);
        encode_v2(address(source), address(destination), &[], false, &mut binary);
        assert_eq!((line.as_slice(), binary), (TCP4_LINE, v2_tcp4(b"")));
    }
}

#[test]
fn a_pair_of_different_families_is_unknown_in_v1_and_mapped_in_v2() {
    for (source, destination, mapped) in [
        (
            "192.0.2.1:1",
            "[2001:db8::2]:2",
            ("[::ffff:192.0.2.1]:1", "[2001:db8::2]:2"),
        ),
        (
            "[2001:db8::1]:1",
            "198.51.100.2:2",
            ("[2001:db8::1]:1", "[::ffff:198.51.100.2]:2"),
        ),
        (
            "[::ffff:192.0.2.1]:1",
            "[2001:db8::2]:2",
            ("[::ffff:192.0.2.1]:1", "[2001:db8::2]:2"),
        ),
    ] {
        let (mut line, mut binary) = (Vec::new(), Vec::new());
        encode_v1(address(source), address(destination), &mut line);
        assert_eq!(line, b"PROXY UNKNOWN\r\n");
        encode_v2(address(source), address(destination), &[], true, &mut binary);
        let Parsed::Header(header) = any(&binary) else {
            panic!("{:?}", any(&binary))
        };
        assert_eq!(
            header.source.zip(header.destination),
            Some((address(mapped.0), address(mapped.1)))
        );
    }
}

#[test]
fn a_tlv_that_receivers_refuse_is_left_out() {
    let long = [b'a'; 1025];
    let too_long = [
        Tlv {
            kind: AUTHORITY,
            value: &long[..256],
        },
        Tlv {
            kind: UNIQUE_ID,
            value: &long[..129],
        },
        Tlv {
            kind: SSL,
            value: &long,
        },
        Tlv {
            kind: CRC32C,
            value: &[0; 4],
        },
    ];
    let mut out = Vec::new();
    encode_v2(
        address("192.0.2.1:56324"),
        address("198.51.100.2:443"),
        &too_long,
        false,
        &mut out,
    );
    assert_eq!(out, v2_tcp4(b""));
    out.clear();
    let many = [Tlv {
        kind: SSL,
        value: &long[..1024],
    }; 100];
    encode_v2(
        address("192.0.2.1:56324"),
        address("198.51.100.2:443"),
        &many,
        true,
        &mut out,
    );
    let limits = Limits {
        v2: 65_551,
        ..Limits::default()
    };
    let Parsed::Header(header) = parse(&out, &limits, Versions::Any) else {
        panic!("a header")
    };
    assert_eq!((header.len, header.tlvs.count()), (out.len(), 64));
}

#[test]
fn what_went_in_comes_back() {
    let mut random = Random::new(42);
    let mut out = Vec::new();
    for round in 0..20_000 {
        let (source, destination) = (any_address(&mut random), any_address(&mut random));
        let values: Vec<(u8, Vec<u8>)> = (0..random.below(4))
            .map(|_| {
                let kind = [ALPN, AUTHORITY, NOOP, UNIQUE_ID, SSL, NETNS, 0xe5][draw(&mut random, 7)];
                let length = draw(&mut random, 100);
                (kind, (0..length).map(|_| byte(&mut random)).collect())
            })
            .collect();
        let tlvs: Vec<Tlv<'_>> = values.iter().map(|(kind, value)| Tlv { kind: *kind, value }).collect();
        let same = unmap(source).is_ipv4() == unmap(destination).is_ipv4();

        out.clear();
        encode_v1(source, destination, &mut out);
        let Parsed::Header(header) = any(&out) else {
            panic!("round {round}: {:?}", any(&out))
        };
        let pair = same.then(|| (unmap(source), unmap(destination)));
        assert_eq!(header.source.zip(header.destination), pair, "round {round}");
        assert_eq!((header.version, header.len), (Version::V1, out.len()));

        out.clear();
        let checksum = random.below(2) == 0;
        encode_v2(source, destination, &tlvs, checksum, &mut out);
        let Parsed::Header(header) = any(&out) else {
            panic!("round {round}: {:?}", any(&out))
        };
        assert_eq!((header.version, header.len), (Version::V2, out.len()));
        let unmapped = (header.source.map(unmap), header.destination.map(unmap));
        assert_eq!(
            unmapped,
            (Some(unmap(source)), Some(unmap(destination))),
            "round {round}"
        );
        let told: Vec<Tlv<'_>> = header.tlvs.filter(|tlv| tlv.kind != CRC32C).collect();
        assert_eq!(told, tlvs, "round {round}");
        assert_eq!(header.tlvs.value(CRC32C).is_some(), checksum);
    }
}

#[test]
fn a_flipped_bit_of_a_summed_header_is_never_accepted_as_another_header() {
    let good = summed(None);
    for bit in 0..good.len() * 8 {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        // Bits that say LOCAL, UNSPEC or a type other than the checksum's take the checksum out of force; a shorter
        // length cuts it.
        if let Parsed::Header(header) = any(&bytes) {
            assert!(
                header.source.is_none() || header.tlvs.value(CRC32C).is_none(),
                "bit {bit}: {header:?}"
            );
        }
    }
}

#[test]
fn mutated_headers_never_panic_and_keep_every_promise() {
    let mut random = Random::new(7);
    let vectors = vectors();
    for _ in 0..200_000 {
        let (promise, bytes, _) = &vectors[draw(&mut random, vectors.len())];
        let mut bytes = bytes.clone();
        for _ in 0..=random.below(4) {
            let at = draw(&mut random, bytes.len());
            match random.below(4) {
                0 => bytes[at] = byte(&mut random),
                1 => bytes.insert(at, byte(&mut random)),
                2 if bytes.len() > 1 => drop(bytes.remove(at)),
                _ => bytes[at] ^= 1 << random.below(8),
            }
        }
        let parsed = any(&bytes);
        let cut = draw(&mut random, bytes.len());
        match (any(&bytes[..cut]), parsed) {
            (Parsed::NeedMore { at_least }, Parsed::Header(header)) => {
                assert!(at_least > cut && at_least <= header.len, "{promise}: {bytes:?}");
            }
            (Parsed::NeedMore { at_least }, _) => assert!(at_least > cut && at_least <= 536, "{promise}: {bytes:?}"),
            (early, late) => assert_eq!(early, late, "{promise}: {bytes:?} cut at {cut}"),
        }
    }
}

fn draw(random: &mut Random, bound: usize) -> usize {
    usize::try_from(random.below(bound as u64)).expect("below bound")
}

fn byte(random: &mut Random) -> u8 {
    u8::try_from(random.below(256)).expect("below 256")
}

/// IPv4, IPv6 or IPv4-mapped.
fn any_address(random: &mut Random) -> SocketAddr {
    let mut bytes = [0; 16];
    bytes.fill_with(|| if random.below(3) == 0 { 0 } else { byte(random) });
    let port = u16::from_be_bytes([byte(random), byte(random)]);
    let ipv4 = std::net::Ipv4Addr::from([bytes[0], bytes[1], bytes[2], bytes[3]]);
    match random.below(3) {
        0 => SocketAddr::new(ipv4.into(), port),
        1 => SocketAddr::new(ipv4.to_ipv6_mapped().into(), port),
        _ => SocketAddr::new(bytes.into(), port),
    }
}
