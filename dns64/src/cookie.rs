//! DNS cookies (RFC 7873) in the form that servers share (RFC 9018): who sends ours back is where it says it is.
//!
//! A server cookie is version, three zeros, the time it was made, and SipHash-2-4 over the client's cookie, these eight
//! octets and the client's address. Nothing is remembered about a client.

use std::{hash::Hasher, net::IpAddr};

use siphasher::{
    sip::SipHasher24,
    sip128::{Hasher128, SipHasher24 as SipHasher128},
};

/// Seconds that a secret is used to make cookies: 26 h, the shortest that RFC 7873 §7.1 recommends. The one before is
/// good for checking.
const ROLLOVER: u64 = 26 * 3600;
/// Seconds that a cookie is good (RFC 9018 §4.3).
const GOOD: u32 = 3600;
/// Seconds of age from which on a client gets another one (RFC 9018 §4.3).
const RENEWED: u32 = 1800;
/// Seconds that a cookie may come from the future, where another server made it (RFC 9018 §4.3).
const AHEAD: u32 = 300;

/// Makes cookies and checks them.
#[derive(Clone, Debug)]
pub struct Cookies {
    master: [u8; 16],
    period: u64,
    /// Of this period and of the one before.
    secrets: [[u8; 16]; 2],
}

/// What the cookie of one query says about its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It knows nothing of cookies.
    None,
    /// It has none of ours, or one that is too old or was made for somebody else. This one is for it.
    Unknown([u8; 24]),
    /// It is where it says it is. This one is for it, the same or a newer one.
    Known([u8; 24]),
}

impl Verdict {
    /// What to send along.
    pub const fn reply(&self) -> Option<[u8; 24]> {
        match self {
            Self::None => None,
            Self::Unknown(cookie) | Self::Known(cookie) => Some(*cookie),
        }
    }
}

impl Cookies {
    /// The secrets follow from `master`, which is random and secret, and from the time: who has the same makes and takes
    /// the same cookies. `now` is in UNIX seconds.
    pub fn new(master: [u8; 16], now: u64) -> Self {
        let period = now / ROLLOVER;
        let secrets = [secret(master, period), secret(master, period.saturating_sub(1))];
        Self {
            master,
            period,
            secrets,
        }
    }

    /// The same with the secrets of `now`, in UNIX seconds.
    #[must_use]
    pub fn at(&self, now: u64) -> Self {
        if now / ROLLOVER == self.period {
            self.clone()
        } else {
            Self::new(self.master, now)
        }
    }

    /// What `cookie`, the COOKIE option of a query from `client`, says. `now` is in UNIX seconds.
    pub fn judge(&self, cookie: Option<&[u8]>, client: IpAddr, now: u64) -> Verdict {
        let Some((theirs, ours)) = cookie.and_then(<[u8]>::split_first_chunk::<8>) else {
            return Verdict::None;
        };
        // Seconds modulo 2^32, compared as serial numbers are (RFC 9018 §4.3, RFC 1982).
        let now = (now & u64::from(u32::MAX)) as u32;
        let fresh = || make(&self.secrets[0], *theirs, [1, 0, 0, 0], now, client);
        let Ok(ours) = <[u8; 16]>::try_from(ours) else {
            return Verdict::Unknown(fresh());
        };
        let [version, r0, r1, r2, t0, t1, t2, t3, ..] = ours;
        let made = u32::from_be_bytes([t0, t1, t2, t3]);
        let (age, ahead) = (now.wrapping_sub(made), made.wrapping_sub(now));
        if version != 1 || (age > GOOD && ahead > AHEAD) {
            return Verdict::Unknown(fresh());
        }
        let sent = joined(*theirs, ours);
        let of = |secret| equal(&make(secret, *theirs, [1, r0, r1, r2], made, client), &sent);
        match self.secrets.iter().position(of) {
            None => Verdict::Unknown(fresh()),
            // Reserved octets that are not zero go into the hash, but not into our next cookie.
            Some(0) if age < RENEWED => Verdict::Known(sent),
            Some(_) => Verdict::Known(fresh()),
        }
    }
}

fn secret(master: [u8; 16], period: u64) -> [u8; 16] {
    let mut hasher = SipHasher128::new_with_key(&master);
    hasher.write(&period.to_le_bytes());
    hasher.finish128().as_bytes()
}

/// Client and server cookie, RFC 9018 §4.4.
fn make(secret: &[u8; 16], theirs: [u8; 8], head: [u8; 4], made: u32, client: IpAddr) -> [u8; 24] {
    let mut ours = [0; 16];
    let [h0, h1, h2, h3] = head;
    let [t0, t1, t2, t3] = made.to_be_bytes();
    let start = [h0, h1, h2, h3, t0, t1, t2, t3];
    let mut hasher = SipHasher24::new_with_key(secret);
    hasher.write(&theirs);
    hasher.write(&start);
    match client.to_canonical() {
        IpAddr::V4(v4) => hasher.write(&v4.octets()),
        IpAddr::V6(v6) => hasher.write(&v6.octets()),
    }
    ours[..8].copy_from_slice(&start);
    ours[8..].copy_from_slice(&hasher.finish().to_le_bytes());
    joined(theirs, ours)
}

fn joined(theirs: [u8; 8], ours: [u8; 16]) -> [u8; 24] {
    let mut cookie = [0; 24];
    cookie[..8].copy_from_slice(&theirs);
    cookie[8..].copy_from_slice(&ours);
    cookie
}

/// Equality that takes the same time wherever the difference is.
fn equal(one: &[u8; 24], other: &[u8; 24]) -> bool {
    one.iter().zip(other).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 100));

    #[test]
    fn rfc9018_appendix_a_examples() {
        for (secret, client, theirs, head, made, server) in [
            (
                "e5e973e5a6b2a43f48e7dc849e37bfcf",
                "198.51.100.100",
                "2464c4abcf10c957",
                [1, 0, 0, 0],
                1_559_731_985,
                "010000005cf79f111f8130c3eee29480",
            ),
            (
                "e5e973e5a6b2a43f48e7dc849e37bfcf",
                "203.0.113.203",
                "fc93fc62807ddb86",
                [1, 0xab, 0xcd, 0xef],
                1_559_727_985,
                "01abcdef5cf78f71a314227b6679ebf5",
            ),
            (
                "e5e973e5a6b2a43f48e7dc849e37bfcf",
                "198.51.100.100",
                "2464c4abcf10c957",
                [1, 0, 0, 0],
                1_559_734_385,
                "010000005cf7a871d4a564a1442aca77",
            ),
            (
                "e5e973e5a6b2a43f48e7dc849e37bfcf",
                "203.0.113.203",
                "fc93fc62807ddb86",
                [1, 0, 0, 0],
                1_559_734_700,
                "010000005cf7a9acf73a7810aca2381e",
            ),
            (
                "dd3bdf9344b678b185a6f5cb60fca715",
                "2001:db8:220:1:59de:d0f4:8769:82b8",
                "22681ab97d52c298",
                [1, 0, 0, 0],
                1_559_741_817,
                "010000005cf7c57926556bd0934c72f8",
            ),
        ] {
            let secret = hex(secret).try_into().expect("16 octets");
            let theirs: [u8; 8] = hex(theirs).try_into().expect("8 octets");
            let client = client.parse().expect("an address");
            assert_eq!(make(&secret, theirs, head, made, client)[8..], hex(server), "{server}");
        }
    }

    #[test]
    fn who_sends_ours_back_is_known_for_an_hour_and_gets_another_after_half() {
        let cookies = Cookies::new([7; 16], T0);
        let first = reply(cookies.judge(Some(&[1; 8]), CLIENT, T0));
        for (later, known, same) in [
            (0, true, true),
            (1799, true, true),
            (1800, true, false),
            (3600, true, false),
            (3601, false, false),
            (1 << 31, false, false),
        ] {
            let verdict = cookies.judge(Some(&first), CLIENT, T0 + later);
            assert_eq!(matches!(verdict, Verdict::Known(_)), known, "after {later} s");
            assert_eq!(reply(verdict) == first, same, "after {later} s");
        }
        assert!(matches!(
            cookies.judge(Some(&first), CLIENT, T0 - 300),
            Verdict::Known(_)
        ));
        assert!(matches!(
            cookies.judge(Some(&first), CLIENT, T0 - 301),
            Verdict::Unknown(_)
        ));
    }

    #[test]
    fn anothers_cookie_a_changed_one_and_none_at_all_are_unknown() {
        let cookies = Cookies::new([7; 16], T0);
        let good = reply(cookies.judge(Some(&[1; 8]), CLIENT, T0));
        let other = "198.51.100.101".parse().expect("an address");
        assert!(matches!(cookies.judge(Some(&good), other, T0), Verdict::Unknown(_)));
        for at in 0..good.len() {
            let mut changed = good;
            changed[at] ^= 1;
            assert!(
                matches!(cookies.judge(Some(&changed), CLIENT, T0), Verdict::Unknown(_)),
                "{at}"
            );
        }
        assert!(matches!(
            cookies.judge(Some(&good[..16]), CLIENT, T0),
            Verdict::Unknown(_)
        ));
        assert!(matches!(cookies.judge(Some(&[1; 40]), CLIENT, T0), Verdict::Unknown(_)));
        assert_eq!(cookies.judge(None, CLIENT, T0), Verdict::None);
        let mapped = "::ffff:198.51.100.100".parse().expect("an address");
        assert!(
            matches!(cookies.judge(Some(&good), mapped, T0), Verdict::Known(_)),
            "the same client"
        );
    }

    #[test]
    fn a_rolled_secret_still_takes_the_cookies_of_the_one_before_and_renews_them() {
        let end = (T0 / ROLLOVER + 1) * ROLLOVER;
        let cookies = Cookies::new([7; 16], end - 1);
        let old = reply(cookies.judge(Some(&[1; 8]), CLIENT, end - 1));
        let before = cookies.secrets;
        assert_eq!(cookies.at(end - 1).secrets, before);
        let cookies = cookies.at(end);
        assert_eq!(cookies.secrets[1], before[0]);
        assert_ne!(cookies.secrets[0], before[0]);
        let verdict = cookies.judge(Some(&old), CLIENT, end + 1);
        assert!(matches!(verdict, Verdict::Known(_)));
        assert_ne!(reply(verdict), old);
    }

    const T0: u64 = 1_559_731_985;

    fn reply(verdict: Verdict) -> [u8; 24] {
        verdict.reply().expect("a cookie")
    }

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hex"))
            .collect()
    }
}
