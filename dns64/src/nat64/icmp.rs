//! Types, codes, pointers and MTUs of ICMP in both versions, as functions of numbers (RFC 7915 §4.2, §4.4, §5.2, §5.4).

/// IPv6's smallest MTU, in octets (RFC 8200 §5).
pub(super) const IPV6_MINIMUM_MTU: u16 = 1280;
/// IPv4's smallest MTU, in octets (RFC 791 §3.1).
const IPV4_MINIMUM_MTU: u16 = 68;
/// How much longer an IPv6 header is than an IPv4 header without options.
pub(super) const LONGER: u16 = 20;

/// Types of ICMPv4 (RFC 792).
pub(super) mod v4 {
    pub(crate) const ECHO_REPLY: u8 = 0;
    pub(crate) const UNREACHABLE: u8 = 3;
    pub(crate) const ECHO: u8 = 8;
    pub(crate) const TIME_EXCEEDED: u8 = 11;
    pub(crate) const PARAMETER: u8 = 12;
}

/// Types of ICMPv6 (RFC 4443).
pub(super) mod v6 {
    pub(crate) const UNREACHABLE: u8 = 1;
    pub(crate) const TOO_BIG: u8 = 2;
    pub(crate) const TIME_EXCEEDED: u8 = 3;
    pub(crate) const PARAMETER: u8 = 4;
    pub(crate) const ECHO: u8 = 128;
    pub(crate) const ECHO_REPLY: u8 = 129;
}

/// An ICMP error of the other version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Error {
    pub(super) kind: u8,
    pub(super) code: u8,
    pub(super) rest: Rest,
}

/// What the second four octets of an ICMP error hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rest {
    /// Nothing but the length of what is quoted (RFC 4884 §4), in either version.
    Unused,
    /// The MTU that would have done. ICMPv4 has the length beside it, ICMPv6 has not.
    Mtu,
    /// The octet of the quoted packet that is at fault. ICMPv4 has the length beside it, ICMPv6 has not.
    Pointer(u8),
}

/// The type that an echo request or reply has over IPv6.
pub(super) const fn echo_to_v6(kind: u8) -> Option<u8> {
    match kind {
        v4::ECHO => Some(v6::ECHO),
        v4::ECHO_REPLY => Some(v6::ECHO_REPLY),
        _ => None,
    }
}

/// The type that an echo request or reply has over IPv4.
pub(super) const fn echo_to_v4(kind: u8) -> Option<u8> {
    match kind {
        v6::ECHO => Some(v4::ECHO),
        v6::ECHO_REPLY => Some(v4::ECHO_REPLY),
        _ => None,
    }
}

/// Whether an ICMPv4 message of this type quotes a packet (RFC 1122 §3.2.2), and so must never be answered by an error.
pub(super) const fn is_error_v4(kind: u8) -> bool {
    matches!(kind, 3 | 4 | 5 | 11 | 12)
}

/// The same for ICMPv6 (RFC 4443 §2.1), and for redirects, which must not be answered either (§2.4 e).
pub(super) const fn is_error_v6(kind: u8) -> bool {
    kind < 128 || kind == 137
}

/// An ICMPv4 error as ICMPv6 (RFC 7915 §4.2); `None` if there is no such. `pointer` is the fifth octet.
pub(super) fn error_to_v6(kind: u8, code: u8, pointer: u8) -> Option<Error> {
    let (kind, code, rest) = match (kind, code) {
        (v4::UNREACHABLE, 0 | 1 | 5..=8 | 11 | 12) => (v6::UNREACHABLE, 0, Rest::Unused),
        // Protocol unreachable: IPv6 says that the next header, octet 6, is not known.
        (v4::UNREACHABLE, 2) => (v6::PARAMETER, 1, Rest::Pointer(6)),
        (v4::UNREACHABLE, 3) => (v6::UNREACHABLE, 4, Rest::Unused),
        (v4::UNREACHABLE, 4) => (v6::TOO_BIG, 0, Rest::Mtu),
        (v4::UNREACHABLE, 9 | 10 | 13 | 15) => (v6::UNREACHABLE, 1, Rest::Unused),
        (v4::TIME_EXCEEDED, code) => (v6::TIME_EXCEEDED, code, Rest::Unused),
        (v4::PARAMETER, 0 | 2) => (v6::PARAMETER, 0, Rest::Pointer(pointer_to_v6(pointer)?)),
        _ => return None,
    };
    Some(Error { kind, code, rest })
}

/// An ICMPv6 error as ICMPv4 (RFC 7915 §5.2); `None` if there is no such. `pointer` is the second 32-bit word.
pub(super) fn error_to_v4(kind: u8, code: u8, pointer: u32) -> Option<Error> {
    let (kind, code, rest) = match (kind, code) {
        (v6::UNREACHABLE, 0 | 2 | 3) => (v4::UNREACHABLE, 1, Rest::Unused),
        (v6::UNREACHABLE, 1) => (v4::UNREACHABLE, 10, Rest::Unused),
        (v6::UNREACHABLE, 4) => (v4::UNREACHABLE, 3, Rest::Unused),
        (v6::TOO_BIG, _) => (v4::UNREACHABLE, 4, Rest::Mtu),
        (v6::TIME_EXCEEDED, code) => (v4::TIME_EXCEEDED, code, Rest::Unused),
        (v6::PARAMETER, 0) => (v4::PARAMETER, 0, Rest::Pointer(pointer_to_v4(pointer)?)),
        (v6::PARAMETER, 1) => (v4::UNREACHABLE, 2, Rest::Unused),
        _ => return None,
    };
    Some(Error { kind, code, rest })
}

/// Where in an IPv6 header the field is that begins at or holds octet `pointer` of an IPv4 one (RFC 7915 §4.2, figure 3).
const fn pointer_to_v6(pointer: u8) -> Option<u8> {
    match pointer {
        0 | 1 => Some(pointer),
        2 | 3 => Some(4),
        8 => Some(7),
        9 => Some(6),
        12..=15 => Some(8),
        16..=19 => Some(24),
        _ => None,
    }
}

/// Where in an IPv4 header the field is that begins at or holds octet `pointer` of an IPv6 one (RFC 7915 §5.2, figure 6).
fn pointer_to_v4(pointer: u32) -> Option<u8> {
    match pointer {
        0 => Some(0),
        1 => Some(1),
        4 | 5 => Some(2),
        6 => Some(9),
        7 => Some(8),
        8..=23 => Some(12),
        24..=39 => Some(16),
        _ => None,
    }
}

/// The MTU that an IPv6 host is told when an IPv4 router said `mtu` about a packet of `total` octets (RFC 7915 §4.2).
///
/// 0 is what routers say that do not know RFC 1191: then the next plateau below `total` is taken (RFC 1191 §7).
pub(super) fn mtu_to_v6(mtu: u16, total: u16, mtu_v4: u16, mtu_v6: u16) -> u16 {
    let mtu = if mtu == 0 { plateau_below(total) } else { mtu };
    mtu.saturating_add(LONGER)
        .min(mtu_v6)
        .min(mtu_v4.saturating_add(LONGER))
        .max(IPV6_MINIMUM_MTU)
}

/// The MTU that an IPv4 host is told when an IPv6 router said `mtu` (RFC 7915 §5.2).
pub(super) fn mtu_to_v4(mtu: u32, mtu_v4: u16, mtu_v6: u16) -> u16 {
    u16::try_from(mtu.saturating_sub(LONGER.into()))
        .unwrap_or(u16::MAX)
        .min(mtu_v4)
        .min(mtu_v6.saturating_sub(LONGER))
        .max(IPV4_MINIMUM_MTU)
}

/// RFC 1191 §7.1.
fn plateau_below(total: u16) -> u16 {
    const PLATEAUS: [u16; 10] = [32_000, 17_914, 8166, 4352, 2002, 1492, 1006, 508, 296, 68];
    let lower = PLATEAUS.into_iter().find(|plateau| *plateau < total);
    lower.unwrap_or(IPV4_MINIMUM_MTU)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 7915 §4.2 as lines: type, codes, then type, code and what comes second; what is not here is dropped.
    const FROM_V4: &str = "
        3 0,1,5,6,7,8,11,12 1 0 unused
        3 2                 4 1 6
        3 3                 1 4 unused
        3 4                 2 0 mtu
        3 9,10,13,15        1 1 unused
        11 *                3 * unused
        12 0,2              4 0 pointer";
    /// RFC 7915 §5.2.
    const FROM_V6: &str = "
        1 0,2,3 3 1 unused
        1 1     3 10 unused
        1 4     3 3 unused
        2 *     3 4 mtu
        3 *     11 * unused
        4 0     12 0 pointer
        4 1     3 2 unused";
    /// Each octet of one header, and the other's that stands for it, `-` for none.
    const POINTERS_FROM_V4: &str = "0 1 4 4 - - - - 7 6 - - 8 8 8 8 24 24 24 24";
    const POINTERS_FROM_V6: &str = "0 1 - - 2 2 9 8 12 12 12 12 12 12 12 12 12 12 12 12 12 12 12 12 \
                                    16 16 16 16 16 16 16 16 16 16 16 16 16 16 16 16";

    #[test]
    fn rfc7915_section_4_2_every_type_code_and_pointer() {
        for kind in 0..=255 {
            for code in 0..=255 {
                // Only Parameter Problem has one.
                for pointer in (0..=255).filter(|pointer| kind == 12 || *pointer % 85 == 0) {
                    let expected = oracle(FROM_V4, POINTERS_FROM_V4, kind, code, pointer.into());
                    let got = error_to_v6(kind, code, pointer).map(told);
                    assert_eq!(got, expected, "{kind}/{code} {pointer}");
                }
            }
            let echo = [(8, 128), (0, 129)].into_iter().find(|(from, _)| *from == kind);
            assert_eq!(echo_to_v6(kind), echo.map(|(_, to)| to));
        }
    }

    #[test]
    fn rfc7915_section_5_2_every_type_code_and_pointer() {
        for kind in 0..=255 {
            for code in 0..=255 {
                let pointers = if kind == 4 { 0..=300 } else { 0..=0 };
                for pointer in pointers.chain([65_536, 1 << 24, u32::MAX]) {
                    let expected = oracle(FROM_V6, POINTERS_FROM_V6, kind, code, pointer);
                    let got = error_to_v4(kind, code, pointer).map(told);
                    assert_eq!(got, expected, "{kind}/{code} {pointer}");
                }
            }
            let echo = [(128, 8), (129, 0)].into_iter().find(|(from, _)| *from == kind);
            assert_eq!(echo_to_v4(kind), echo.map(|(_, to)| to));
        }
    }

    #[test]
    fn rfc7915_section_4_2_mtu_told_to_ipv6() {
        for (mtu, total, mtu_v4, mtu_v6, expected) in [
            (1400, 1500, 1500, 1500, 1420),
            (1260, 1500, 1500, 1500, 1280),
            (1261, 1500, 1500, 1500, 1281),
            (576, 1500, 1500, 1500, 1280),
            (1500, 1500, 1500, 1500, 1500),
            (1500, 1500, 1500, 1400, 1400),
            (9000, 9001, 1400, 9000, 1420),
            (u16::MAX, u16::MAX, u16::MAX, u16::MAX, u16::MAX),
            // Routers that say nothing: the plateau below the packet.
            (0, 1500, 9000, 9000, 1512),
            (0, 1492, 9000, 9000, 1280),
            (0, 1493, 9000, 9000, 1512),
            (0, 9000, 9000, 9000, 8186),
            (0, 68, 9000, 9000, 1280),
            (0, 0, 9000, 9000, 1280),
        ] {
            assert_eq!(
                mtu_to_v6(mtu, total, mtu_v4, mtu_v6),
                expected,
                "{mtu} {total} {mtu_v4} {mtu_v6}"
            );
        }
    }

    #[test]
    fn rfc7915_section_5_2_mtu_told_to_ipv4() {
        for (mtu, mtu_v4, mtu_v6, expected) in [
            (1280, 1500, 1500, 1260),
            (1420, 1500, 1500, 1400),
            (9000, 1500, 9000, 1500),
            (9000, 9000, 1500, 1480),
            (u32::MAX, u16::MAX, u16::MAX, 65_515),
            (0, 1500, 1500, 68),
        ] {
            assert_eq!(mtu_to_v4(mtu, mtu_v4, mtu_v6), expected, "{mtu} {mtu_v4} {mtu_v6}");
        }
    }

    #[test]
    fn rfc1191_section_7_1_plateaus_are_below_every_packet() {
        for total in 69..=u16::MAX {
            let plateaus = [68, 296, 508, 1006, 1492, 2002, 4352, 8166, 17_914, 32_000];
            let expected = plateaus.into_iter().filter(|plateau| *plateau < total).max();
            assert_eq!(Some(plateau_below(total)), expected, "{total}");
        }
    }

    fn oracle(table: &str, pointers: &str, kind: u8, code: u8, pointer: u32) -> Option<String> {
        let pointers: Vec<&str> = pointers.split_whitespace().collect();
        for line in table.lines().filter(|line| !line.trim().is_empty()) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let codes = fields[1] == "*" || fields[1].split(',').any(|one| one == code.to_string());
            if fields[0] != kind.to_string() || !codes {
                continue;
            }
            let rest = match fields[4] {
                "pointer" => match *pointers.get(usize::try_from(pointer).expect("a place"))? {
                    "-" => return None,
                    place => place,
                },
                rest => rest,
            };
            let code = fields[3].replace('*', &code.to_string());
            return Some(format!("{}/{code} {rest}", fields[2]));
        }
        None
    }

    fn told(error: Error) -> String {
        let rest = match error.rest {
            Rest::Unused => "unused".to_owned(),
            Rest::Mtu => "mtu".to_owned(),
            Rest::Pointer(pointer) => pointer.to_string(),
        };
        format!("{}/{} {rest}", error.kind, error.code)
    }
}
