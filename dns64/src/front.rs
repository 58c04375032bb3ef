//! The first look at a message from a client: may it ask, what does it ask, is the answer known.
//!
//! Whatever can be said at once is written into a buffer; the rest is for whoever looks further. Nothing is allocated.

use std::{net::IpAddr, sync::Arc, time::Duration};

use hickory_proto::op::ResponseCode;

use crate::{
    access::Access,
    cache::{Cache, Found},
    cookie::{self, Cookies},
    query::{MOST_TCP, Parsed, Query, Terms},
    rate::{self, Rate},
};

/// What all messages that are decoded as a whole count as; codes that are answered alone count as themselves.
const WHOLE: u64 = 1 << 16;

/// What the first look needs. A reload makes another one, which may share cache and rate with the one before.
#[derive(Clone, Debug)]
pub struct Front {
    /// Known answers.
    pub cache: Arc<Cache>,
    /// Who may ask.
    pub access: Access,
    /// Makes and checks cookies.
    pub cookies: Cookies,
    /// What counts against networks that may be victims.
    pub rate: Arc<Rate>,
}

/// What is the same for all messages that came at once.
#[derive(Clone, Debug)]
pub struct Turn {
    cookies: Cookies,
    now: Duration,
    wall: u64,
}

/// How a message came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// From a source that may be a lie.
    Udp,
    /// From where it says.
    Tcp,
}

/// What to do with a message.
#[derive(Clone, Copy, Debug)]
pub enum Verdict {
    /// Send these octets of the buffer.
    Reply {
        /// Octets.
        length: usize,
        /// Which counter it belongs to.
        why: Reply,
    },
    /// Look further, and keep to these terms.
    Ask(Terms),
    /// Do not answer.
    Silence(Silence),
}

/// Why there is a reply at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It was known.
    Known {
        /// It runs out: ask for it again. Said once.
        refresh: bool,
    },
    /// What came is no proper question.
    Rejected,
    /// The network asks too much: come again over TCP or with a cookie.
    Slipped,
}

/// Why there is no reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Silence {
    /// The source may not ask.
    Denied,
    /// It is no query.
    Ignored,
    /// The network asks too much.
    Limited,
}

impl Front {
    /// What holds for messages that came at `now`, which is monotonic, and at `wall`, in UNIX seconds.
    pub fn turn(&self, now: Duration, wall: u64) -> Turn {
        Turn {
            cookies: self.cookies.at(wall),
            now,
            wall,
        }
    }

    /// Looks at one message from `source`. `out` has at least 1232 octets for UDP, 65,535 for TCP; less makes answers
    /// shorter.
    pub fn look(&self, turn: &Turn, transport: Transport, message: &[u8], source: IpAddr, out: &mut [u8]) -> Verdict {
        let allowed = self.access.allows(source);
        if !allowed && transport == Transport::Udp {
            return Verdict::Silence(Silence::Denied);
        }
        let (query, rejected) = match Parsed::of(message) {
            Parsed::Query(query) => (query, None),
            Parsed::Reject(query, code) => (query, Some(code)),
            Parsed::Whole if allowed => return self.whole(turn, transport, source),
            Parsed::Whole => return reply(refuse(message, out), Reply::Rejected),
            Parsed::Silence => return Verdict::Silence(Silence::Ignored),
        };
        let cookie = turn
            .cookies
            .judge(query.edns().and_then(|edns| edns.cookie), source, turn.wall);
        let terms = Terms {
            limit: match transport {
                Transport::Udp => query.udp_limit(),
                Transport::Tcp => MOST_TCP,
            },
            cookie: cookie.reply(),
        };
        let rejected = if allowed { rejected } else { Some(ResponseCode::Refused) };
        let hash = rejected.map_or_else(|| self.cache.hash(&query), |code| u16::from(code).into());
        let known = transport == Transport::Tcp || matches!(cookie, cookie::Verdict::Known(_));
        if !known {
            match self.rate.check(source, hash, turn.now) {
                rate::Verdict::Pass => {}
                rate::Verdict::Slip => return slip(&query, &terms, out),
                rate::Verdict::Drop => return Verdict::Silence(Silence::Limited),
            }
        }
        if let Some(code) = rejected {
            let length = query.write_code(code, false, &terms, out);
            return reply(length, Reply::Rejected);
        }
        match self.cache.answer(&query, hash, &terms, turn.now, out) {
            Found::Hit { length, refresh } => reply(Some(length), Reply::Known { refresh }),
            Found::Miss => Verdict::Ask(terms),
        }
    }

    /// A message that is decoded elsewhere. All of an address count as one question: whoever looks at them has more work than
    /// with any other, and nothing as short as itself would tell their sender to come again. Not those of a network, where
    /// one could keep all nodes from registering.
    fn whole(&self, turn: &Turn, transport: Transport, source: IpAddr) -> Verdict {
        let bits = match source.to_canonical() {
            IpAddr::V4(address) => address.to_bits().into(),
            IpAddr::V6(address) => address.to_bits(),
        };
        let question = WHOLE ^ (bits as u64) ^ ((bits >> 64) as u64).rotate_left(32);
        let passes = || matches!(self.rate.check(source, question, turn.now), rate::Verdict::Pass);
        if transport == Transport::Tcp || passes() {
            Verdict::Ask(Terms::bare(transport))
        } else {
            Verdict::Silence(Silence::Limited)
        }
    }
}

impl Terms {
    /// For a message that is not decoded yet.
    pub(crate) const fn bare(transport: Transport) -> Self {
        Self {
            limit: match transport {
                Transport::Udp => crate::query::LEAST,
                Transport::Tcp => MOST_TCP,
            },
            cookie: None,
        }
    }
}

/// REFUSED to a message that is not decoded: its header, and nothing else.
fn refuse(message: &[u8], out: &mut [u8]) -> Option<usize> {
    let (header, _) = out.split_first_chunk_mut::<12>()?;
    let &[high, low, flags, ..] = message else { return None };
    *header = [high, low, 0x80 | (flags & 0x78), 5, 0, 0, 0, 0, 0, 0, 0, 0];
    Some(header.len())
}

/// The shortest answer that the real client understands: BADCOOKIE, if it knows cookies and so can come again with the one
/// it gets here (RFC 7873 §5.2.3), else TC.
fn slip(query: &Query<'_>, terms: &Terms, out: &mut [u8]) -> Verdict {
    let length = match terms.cookie {
        Some(_) => query.write_code(ResponseCode::BADCOOKIE, false, terms, out),
        None => query.write_code(ResponseCode::NoError, true, terms, out),
    };
    reply(length, Reply::Slipped)
}

fn reply(length: Option<usize>, why: Reply) -> Verdict {
    length.map_or(Verdict::Silence(Silence::Ignored), |length| Verdict::Reply {
        length,
        why,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use hickory_proto::op::Message;

    use super::*;
    use crate::{
        packed::tests::{a, pack},
        query::tests::{plain, with_opt},
        rate::Limit,
    };

    #[test]
    fn outsiders_get_silence_over_udp_and_refused_over_tcp() {
        let front = front(Limit {
            same: 0,
            all: 0,
            burst: 1,
        });
        let asked = plain("\x01w\0", 1);
        assert!(matches!(
            look(&front, Transport::Udp, &asked, OUTSIDER).0,
            Verdict::Silence(Silence::Denied)
        ));
        let (_, out) = look(&front, Transport::Tcp, &asked, OUTSIDER);
        let reply = Message::from_vec(&out).expect("a message");
        assert_eq!(reply.metadata.response_code, ResponseCode::Refused);
        let mut update = asked;
        update[2] = 5 << 3;
        let (_, out) = look(&front, Transport::Tcp, &update, OUTSIDER);
        assert_eq!(out[..4], [update[0], update[1], 0x80 | 5 << 3, 5], "REFUSED");
        assert_eq!(out[4..], [0; 8]);
        assert!(matches!(
            look(&front, Transport::Tcp, &update, CLIENT).0,
            Verdict::Ask(_)
        ));
    }

    #[test]
    fn what_is_known_is_answered_and_what_is_not_is_asked() {
        let front = front(Limit {
            same: 0,
            all: 0,
            burst: 1,
        });
        let (verdict, out) = look(&front, Transport::Udp, &plain("\x01w\0", 1), CLIENT);
        assert!(matches!(
            verdict,
            Verdict::Reply {
                why: Reply::Known { .. },
                ..
            }
        ));
        assert_eq!(Message::from_vec(&out).expect("a message").answers.len(), 1);
        let other = with_opt(&plain("\x01v\0", 1), 800, 0, 0, &[]);
        let Verdict::Ask(terms) = look(&front, Transport::Udp, &other, CLIENT).0 else {
            panic!("it is not known");
        };
        assert_eq!(terms.limit, 800);
        let Verdict::Ask(terms) = look(&front, Transport::Tcp, &other, CLIENT).0 else {
            panic!("it is not known");
        };
        assert_eq!(terms.limit, 65_535);
    }

    #[test]
    fn an_answer_is_never_answered() {
        let front = front(Limit {
            same: 0,
            all: 0,
            burst: 1,
        });
        let (_, mut out) = look(&front, Transport::Udp, &plain("\x01w\0", 1), CLIENT);
        for transport in [Transport::Udp, Transport::Tcp] {
            for flags in 0x80..=0xff {
                out[2] = flags;
                let verdict = look(&front, transport, &out, CLIENT).0;
                assert!(matches!(verdict, Verdict::Silence(Silence::Ignored)));
            }
        }
    }

    #[test]
    fn too_much_without_a_cookie_gets_tc_or_silence_and_with_ours_an_answer() {
        let front = front(Limit {
            same: 1,
            all: 0,
            burst: 1,
        });
        let asked = plain("\x01w\0", 1);
        let ask = |message: &[u8]| look(&front, Transport::Udp, message, CLIENT);
        assert!(matches!(
            ask(&asked).0,
            Verdict::Reply {
                why: Reply::Known { .. },
                ..
            }
        ));
        let (verdict, out) = ask(&asked);
        assert!(matches!(
            verdict,
            Verdict::Reply {
                why: Reply::Slipped,
                ..
            }
        ));
        assert!(Message::from_vec(&out).expect("a message").metadata.truncation);
        assert!(out.len() <= asked.len());
        assert!(matches!(ask(&asked).0, Verdict::Silence(Silence::Limited)));

        let first = with_opt(&asked, 1232, 0, 0, &[0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8]);
        let (verdict, out) = ask(&first);
        assert!(matches!(
            verdict,
            Verdict::Reply {
                why: Reply::Slipped,
                ..
            }
        ));
        let code = Message::from_vec(&out).expect("a message").metadata.response_code;
        assert_eq!(code, ResponseCode::BADCOOKIE);
        let again = with_opt(&asked, 1232, 0, 0, &out[out.len() - 28..]);
        for _ in 0..100 {
            let (verdict, out) = ask(&again);
            assert!(matches!(
                verdict,
                Verdict::Reply {
                    why: Reply::Known { .. },
                    ..
                }
            ));
            assert_eq!(out[out.len() - 28..], again[again.len() - 28..]);
        }
        let (verdict, _) = look(&front, Transport::Tcp, &asked, CLIENT);
        assert!(
            matches!(
                verdict,
                Verdict::Reply {
                    why: Reply::Known { .. },
                    ..
                }
            ),
            "over TCP"
        );
    }

    #[test]
    fn what_an_unknown_source_gets_for_a_malformed_message_is_never_longer_than_it() {
        let front = front(Limit {
            same: 0,
            all: 0,
            burst: 1,
        });
        let good = with_opt(&plain("\x03www\x07example\x03org\0", 28), 1232, 0, 0, &[]);
        let mut random = 1_u64;
        for _ in 0..100_000 {
            let mut message = good.clone();
            for _ in 0..3 {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let at = usize::try_from(random >> 33).expect("small") % message.len();
                message[at] = random.to_be_bytes()[1];
            }
            let (verdict, out) = look(&front, Transport::Udp, &message, CLIENT);
            if let Verdict::Reply {
                why: Reply::Rejected, ..
            } = verdict
            {
                assert!(out.len() <= message.len(), "{message:x?}");
            }
        }
    }

    pub(crate) const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 0, 1));
    const OUTSIDER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 1));

    /// Knows w. A 192.0.2.1 and lets loopback in.
    pub(crate) fn front(limit: Limit) -> Front {
        let cache = Cache::new(1 << 20, Duration::ZERO, [7; 16]);
        cache.insert(pack("w.", vec![a("w.", 3600, 1)]), Duration::ZERO);
        let networks = ["127.0.0.0/8", "::1/128"].map(|net| net.parse().expect("a network"));
        Front {
            cache: Arc::new(cache),
            access: Access::new(&networks),
            cookies: Cookies::new([7; 16], 1_559_731_985),
            rate: Arc::new(Rate::new(limit, 7)),
        }
    }

    fn look(front: &Front, transport: Transport, message: &[u8], source: IpAddr) -> (Verdict, Vec<u8>) {
        let turn = front.turn(Duration::from_secs(1), 1_559_731_985);
        let mut out = vec![0; MOST_TCP];
        let verdict = front.look(&turn, transport, message, source, &mut out);
        if let Verdict::Reply { length, .. } = verdict {
            out.truncate(length);
        }
        (verdict, out)
    }
}
