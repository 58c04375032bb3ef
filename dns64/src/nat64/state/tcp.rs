//! What packets make of a TCP session (RFC 6146 §3.5.2.2), as a function of numbers.

/// Where a TCP session is. CLOSED is having none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum TcpState {
    /// A SYN from IPv6 went out.
    V6Init = 1,
    /// A SYN from IPv4 went in.
    V4Init = 2,
    /// Both have sent one.
    Established = 3,
    /// The IPv4 side has sent its FIN.
    V4Fin = 4,
    /// The IPv6 side has sent its FIN.
    V6Fin = 5,
    /// Both have.
    BothFin = 6,
    /// Somebody sent a RST, or nobody anything for long.
    Transitory = 7,
}

impl TcpState {
    /// The state with that number.
    pub(super) const fn of(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::V6Init,
            2 => Self::V4Init,
            3 => Self::Established,
            4 => Self::V4Fin,
            5 => Self::V6Fin,
            6 => Self::BothFin,
            7 => Self::Transitory,
            _ => return None,
        })
    }

    /// As a user reads it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V6Init => "v6-init",
            Self::V4Init => "v4-init",
            Self::Established => "established",
            Self::V4Fin => "v4-fin",
            Self::V6Fin => "v6-fin",
            Self::BothFin => "both-fin",
            Self::Transitory => "transitory",
        }
    }
}

/// From which side a packet came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    V4,
    V6,
}

/// What a segment says of its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Segment {
    Syn,
    Fin,
    Rst,
    Data,
}

impl Segment {
    /// Of the octet of flags (RFC 9293 §3.1). A RST ends whatever else is said; a SYN with a FIN is none (RFC 9293 §3.10.7).
    pub(super) const fn of(flags: u8) -> Self {
        match (flags & 0x04 != 0, flags & 0x02 != 0, flags & 0x01 != 0) {
            (true, _, _) => Self::Rst,
            (false, true, _) => Self::Syn,
            (false, false, true) => Self::Fin,
            (false, false, false) => Self::Data,
        }
    }
}

/// How long a session lives from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lifetime {
    /// As long as it would have anyway.
    Keep,
    /// TCP_TRANS, 4 minutes.
    Transitory,
    /// TCP_EST, 2 hours and 4 minutes.
    Established,
}

/// What a segment from `side` makes of a session.
///
/// One thing differs from RFC 6146: a RST also ends what is closed on one side, as RFC 7857 §2.2 has it, since otherwise a
/// connection that a client resets after its FIN holds its port for two hours.
pub(super) const fn step(state: TcpState, side: Side, segment: Segment) -> (TcpState, Lifetime) {
    use {
        Lifetime::{Established as Long, Keep, Transitory as Short},
        Segment::{Fin, Rst, Syn},
        Side::{V4, V6},
        TcpState::{BothFin, Established, Transitory, V4Fin, V4Init, V6Fin, V6Init},
    };
    match (state, side, segment) {
        (V4Init, V6, Syn) | (V6Init, V4, Syn) => (Established, Long),
        (V6Init, V6, Syn) => (V6Init, Short),
        (V4Init | V6Init, _, _) => (state, Keep),
        (Established, V4, Fin) => (V4Fin, Keep),
        (Established, V6, Fin) => (V6Fin, Keep),
        (V4Fin, V6, Fin) | (V6Fin, V4, Fin) => (BothFin, Short),
        (Established | V4Fin | V6Fin, _, Rst) => (Transitory, Short),
        (Established | V4Fin | V6Fin, _, _) => (state, Long),
        (BothFin, _, _) | (Transitory, _, Rst) => (state, Keep),
        (Transitory, _, _) => (Established, Long),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 6146 §3.5.2.2, every line of it: state, side, segment, then state and lifetime.
    const MACHINE: &str = "
        V4Init      V6 Syn  Established Established
        V4Init      V6 Fin  V4Init      Keep
        V4Init      V6 Rst  V4Init      Keep
        V4Init      V6 Data V4Init      Keep
        V4Init      V4 *    V4Init      Keep
        V6Init      V4 Syn  Established Established
        V6Init      V4 Fin  V6Init      Keep
        V6Init      V4 Rst  V6Init      Keep
        V6Init      V4 Data V6Init      Keep
        V6Init      V6 Syn  V6Init      Transitory
        V6Init      V6 Fin  V6Init      Keep
        V6Init      V6 Rst  V6Init      Keep
        V6Init      V6 Data V6Init      Keep
        Established V4 Fin  V4Fin       Keep
        Established V6 Fin  V6Fin       Keep
        Established *  Rst  Transitory  Transitory
        Established *  Syn  Established Established
        Established *  Data Established Established
        V4Fin       V6 Fin  BothFin     Transitory
        V4Fin       V4 Fin  V4Fin       Established
        V4Fin       *  Rst  Transitory  Transitory
        V4Fin       *  Syn  V4Fin       Established
        V4Fin       *  Data V4Fin       Established
        V6Fin       V4 Fin  BothFin     Transitory
        V6Fin       V6 Fin  V6Fin       Established
        V6Fin       *  Rst  Transitory  Transitory
        V6Fin       *  Syn  V6Fin       Established
        V6Fin       *  Data V6Fin       Established
        BothFin     *  *    BothFin     Keep
        Transitory  *  Rst  Transitory  Keep
        Transitory  *  Syn  Established Established
        Transitory  *  Fin  Established Established
        Transitory  *  Data Established Established";

    #[test]
    fn rfc6146_section_3_5_2_2_every_state_side_and_segment() {
        let mut seen = 0;
        for number in 1..=7 {
            let state = TcpState::of(number).expect("a state");
            for side in [Side::V4, Side::V6] {
                for segment in [Segment::Syn, Segment::Fin, Segment::Rst, Segment::Data] {
                    let is = |pattern: &str, word: String| pattern == "*" || pattern == word;
                    let lines: Vec<Vec<&str>> = MACHINE
                        .lines()
                        .map(|line| line.split_whitespace().collect::<Vec<_>>())
                        .filter(|line| line.len() == 5)
                        .filter(|line| {
                            is(line[0], format!("{state:?}"))
                                && is(line[1], format!("{side:?}"))
                                && is(line[2], format!("{segment:?}"))
                        })
                        .collect();
                    assert_eq!(lines.len(), 1, "{state:?} {side:?} {segment:?}: {lines:?}");
                    let (next, lifetime) = step(state, side, segment);
                    assert_eq!(
                        (format!("{next:?}"), format!("{lifetime:?}")),
                        (lines[0][3].to_owned(), lines[0][4].to_owned()),
                        "{state:?} {side:?} {segment:?}"
                    );
                    seen += 1;
                }
            }
        }
        assert_eq!(seen, 7 * 2 * 4);
        assert_eq!(TcpState::of(0), None);
        assert_eq!(TcpState::of(8), None);
    }

    #[test]
    fn flags_say_what_a_segment_is() {
        for (flags, segment) in [
            (0x02, Segment::Syn),
            (0x12, Segment::Syn),
            (0x03, Segment::Syn),
            (0x11, Segment::Fin),
            (0x10, Segment::Data),
            (0x00, Segment::Data),
            (0x14, Segment::Rst),
            (0xff, Segment::Rst),
        ] {
            assert_eq!(Segment::of(flags), segment, "{flags:02x}");
        }
    }
}
