//! PROXY headers: the answer does not depend on how the bytes arrive, and what is written is read back.

use std::net::SocketAddr;

use lb::proxy::{
    CRC32C, Header, Limits, Parsed, Tlv, Transport, Version, Versions, encode_v1, encode_v2, parse, unmap,
};

/// `bytes` are the beginning of a connection.
pub fn run(bytes: &[u8]) {
    let limits = Limits::default();
    let parsed = parse(bytes, &limits, Versions::Any);
    match parsed {
        Parsed::NeedMore { at_least } => {
            assert!(at_least > bytes.len() && at_least <= 536);
            cut_anywhere(bytes, 536, None);
        }
        Parsed::Reject(_) => cut_anywhere(bytes, 536, Some(parsed)),
        Parsed::Header(header) => {
            let (head, payload) = bytes.split_at(header.len);
            assert_eq!(parse(head, &limits, Versions::Any), parsed, "payload counts");
            cut_anywhere(&head[..header.len - 1], header.len, None);
            let longer = [head, &[0xff; 9], payload].concat();
            assert_eq!(parse(&longer, &limits, Versions::Any), parsed, "payload counts");
            told_again(&header, head);
        }
    }
    for version in [Version::V1, Version::V2] {
        let only = parse(bytes, &limits, Versions::Only(version));
        match (parsed, only) {
            (Parsed::Header(header), Parsed::Header(same)) => assert_eq!(header, same),
            (Parsed::Header(header), Parsed::Reject(_)) => assert_ne!(header.version, version),
            (Parsed::Header(_), Parsed::NeedMore { .. }) | (_, Parsed::Header(_)) => {
                panic!("{parsed:?}, then {only:?}")
            }
            _ => {}
        }
    }
    // More room never refuses what less allows.
    let roomy = parse(bytes, &Limits { v1: 1000, v2: 65_551 }, Versions::Any);
    assert!(roomy == parsed || matches!(parsed, Parsed::Reject(lb::proxy::Reason::TooLong(_))));
}

/// Every beginning of `bytes` needs more, at most `most`, or is refused as the whole is.
fn cut_anywhere(bytes: &[u8], most: usize, refused: Option<Parsed<'_>>) {
    let end = bytes.len().min(600);
    for cut in (0..end).step_by(1 + end / 48).chain([end]) {
        match parse(&bytes[..cut], &Limits::default(), Versions::Any) {
            Parsed::NeedMore { at_least } => assert!(at_least > cut && at_least <= most, "cut at {cut}: {at_least}"),
            parsed => assert_eq!(Some(parsed), refused, "cut at {cut}"),
        }
    }
}

/// Writing `header`, whose bytes are `head`, and reading that gives the same again.
fn told_again(header: &Header<'_>, head: &[u8]) {
    assert_eq!(header.source.is_some(), header.destination.is_some());
    let tlvs: Vec<Tlv<'_>> = header.tlvs.collect();
    let (Some(source), Some(destination)) = (header.source, header.destination) else {
        return;
    };
    assert_eq!(source.is_ipv4(), destination.is_ipv4());
    let pair = (unmap(source), unmap(destination));
    let read = |bytes: &[u8]| -> (Option<SocketAddr>, Option<SocketAddr>) {
        match parse(bytes, &Limits::default(), Versions::Any) {
            Parsed::Header(header) if header.len == bytes.len() => {
                (header.source.map(unmap), header.destination.map(unmap))
            }
            parsed => panic!("{bytes:?} was written, and read as {parsed:?}"),
        }
    };

    let mut line = Vec::new();
    encode_v1(source, destination, &mut line);
    let same_family = pair.0.is_ipv4() == pair.1.is_ipv4();
    let expected = if same_family {
        (Some(pair.0), Some(pair.1))
    } else {
        (None, None)
    };
    assert_eq!(read(&line), expected);

    let mut binary = Vec::new();
    let summed = header.tlvs.value(CRC32C).is_some();
    encode_v2(source, destination, &tlvs, summed, &mut binary);
    assert_eq!(read(&binary), (Some(pair.0), Some(pair.1)));
    // The checksum comes last, and an IPv4-mapped pair as IPv4; else the bytes are the same.
    let checksum_last = tlvs
        .iter()
        .position(|tlv| tlv.kind == CRC32C)
        .is_none_or(|at| at + 1 == tlvs.len());
    let plain = header.version == Version::V2 && header.transport == Transport::Stream && checksum_last;
    if plain && (source.is_ipv4() || !same_family || pair.0.is_ipv6()) {
        assert_eq!(binary, head);
    }
}
