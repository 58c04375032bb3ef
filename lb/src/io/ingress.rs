//! PROXY headers on the data path: read in front of a client's bytes where a trusted proxy stands before us, written in
//! front of them where the backend wants to know the client.

use std::{net::SocketAddr, sync::atomic::AtomicU64};

use rustix::{io::Errno, net::RecvFlags};

use super::{
    frontend::Refusal,
    reactor::Reactor,
    session::{End, Phase, Session, Told},
    slab::Key,
};
use crate::{
    config::ProxyVersion,
    proxy::{self, Parsed, Tlv, Versions},
    sni::{self, Sni},
};

/// Most bytes that a header of ours takes: 16 fixed, two IPv6 addresses and ports, three TLVs.
pub(crate) const HEAD: usize = 16 + 36 + (3 + 255) + (3 + 16) + (3 + 4);

/// The header that a backend is to get in front of the client's first bytes.
#[derive(Debug)]
pub(crate) struct Head {
    version: ProxyVersion,
    source: SocketAddr,
    destination: SocketAddr,
    /// Names the connection in our log and the backend's.
    id: u64,
    /// Longest header that the backend takes: the authority is left out where it would make it longer.
    most: usize,
}

impl Head {
    /// Writes the header. `first` are the client's first bytes as far as they are there: the name in a TLS greeting
    /// becomes the authority.
    pub(crate) fn write(&self, first: &[u8], out: &mut Vec<u8>) {
        out.clear();
        match self.version {
            ProxyVersion::V1 => proxy::encode_v1(self.source, self.destination, out),
            ProxyVersion::V2 => {
                let id = format!("{:016x}", self.id);
                let id = Tlv {
                    kind: proxy::UNIQUE_ID,
                    value: id.as_bytes(),
                };
                if let Sni::Name(name) = sni::sni(first) {
                    let authority = Tlv {
                        kind: proxy::AUTHORITY,
                        value: name.as_bytes(),
                    };
                    proxy::encode_v2(self.source, self.destination, &[id, authority], true, out);
                    if out.len() <= self.most {
                        return;
                    }
                    out.clear();
                }
                proxy::encode_v2(self.source, self.destination, &[id], true, out);
            }
        }
    }
}

/// The header for the backend that has just accepted, if it is to get one.
pub(super) fn head(session: &Session) -> Option<Box<Head>> {
    let (version, most) = {
        let rules = session.frontend.rules.load();
        (rules.proxy?, rules.proxy_limit)
    };
    let destination = match session.header.as_deref() {
        Some(Told::Destination(destination)) => *destination,
        // Gone already: then nobody will read what the header says.
        _ => rustix::net::getsockname(&session.client)
            .ok()
            .and_then(|any| SocketAddr::try_from(any).ok())
            .map_or(session.source, proxy::unmap),
    };
    let id = session.frontend.next_id();
    tracing::debug!(
        frontend = session.frontend.name,
        unique_id = format_args!("{id:016x}"),
        client = %session.source,
        "PROXY header"
    );
    Some(Box::new(Head {
        version,
        source: session.source,
        destination,
        id,
        most,
    }))
}

impl Reactor {
    /// Reads the PROXY header, once it is there as a whole, and not a byte more: the bytes wait in the kernel until
    /// then, so that thousands of slow headers hold no memory here.
    pub(super) fn read_header(&mut self, key: Key) {
        let limits = proxy::Limits::default();
        let most = limits.v2.max(limits.v1);
        let Self { slab, scratch, .. } = self;
        let Some(session) = slab.session(key) else { return };
        let buffer = &mut scratch.buffer()[..most];
        let peeked = match rustix::net::recv(&session.client, &mut *buffer, RecvFlags::PEEK) {
            Ok((_, peeked)) => peeked.min(most),
            Err(Errno::AGAIN | Errno::INTR) => return,
            Err(_) => {
                self.end(key, End::Reset);
                return;
            }
        };
        let (len, told) = match proxy::parse(&buffer[..peeked], &limits, Versions::Any) {
            Parsed::Header(header) => (header.len, header.source.zip(header.destination)),
            Parsed::NeedMore { .. } if session.up.fin || peeked == 0 => {
                session.frontend.refuse(Refusal::NoHeader, session.source);
                self.end(key, End::Done);
                return;
            }
            Parsed::NeedMore { .. } => return,
            Parsed::Reject(reason) => {
                session.frontend.refuse(Refusal::Header(reason), session.source);
                self.end(key, End::Reset);
                return;
            }
        };
        // What was peeked at is there to be taken.
        match rustix::net::recv(&session.client, &mut buffer[..len], RecvFlags::empty()) {
            Ok((_, taken)) if taken == len => {}
            _ => {
                self.end(key, End::Reset);
                return;
            }
        }
        session.up.readable = peeked > len || session.up.fin;
        session.header = Some(Box::new(match told {
            Some((source, destination)) => {
                session.source = proxy::unmap(source);
                Told::Destination(proxy::unmap(destination))
            }
            None => Told::Nothing,
        }));
        self.admit(key);
    }

    /// A header that has not come in time.
    pub(super) fn header_timer(&mut self, key: Key) {
        let now = self.now;
        let Some(session) = self.slab.session(key) else { return };
        if session.phase == Phase::Header && session.accepted + session.frontend.rules.load().header_timeout() <= now {
            session.frontend.refuse(Refusal::HeaderTimeout, session.source);
            self.end(key, End::Reset);
        } else {
            self.arm(key);
        }
    }
}

/// Ids are counted from a random number on, so that those of two processes do not meet.
pub(crate) fn first_id() -> AtomicU64 {
    let mut seed = [0u8; 8];
    let _ = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty());
    AtomicU64::new(u64::from_ne_bytes(seed))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A TLS greeting that asks for `name`.
    fn greeting(name: &str) -> Vec<u8> {
        let length = |bytes: &[u8]| u16::try_from(bytes.len()).expect("short").to_be_bytes();
        let mut list = vec![0];
        list.extend(length(name.as_bytes()));
        list.extend(name.as_bytes());
        let mut extension = length(&list).to_vec();
        extension.extend(&list);
        let mut extensions = vec![0, 0];
        extensions.extend(length(&extension));
        extensions.extend(&extension);
        let mut hello = vec![3, 3];
        hello.extend([7; 32]);
        hello.extend([0, 0, 2, 0x13, 1, 1, 0]);
        hello.extend(length(&extensions));
        hello.extend(&extensions);
        let mut handshake = vec![1, 0];
        handshake.extend(length(&hello));
        handshake.extend(&hello);
        let mut record = vec![22, 3, 1];
        record.extend(length(&handshake));
        record.extend(&handshake);
        record
    }

    #[test]
    fn the_authority_is_told_where_the_header_stays_within_what_the_backend_takes() {
        let head = |most| Head {
            version: ProxyVersion::V2,
            source: "[2001:db8::7]:4000".parse().expect("an address"),
            destination: "[2001:db8::1]:443".parse().expect("an address"),
            id: 7,
            most,
        };
        let long = format!("{}.example.org", "a".repeat(60));
        for (name, most, told) in [
            ("www.example.org", 107, true),
            (&long, 107, false),
            (&long, 536, true),
            ("", 107, false),
        ] {
            let mut out = Vec::new();
            head(most).write(&greeting(name), &mut out);
            assert!(out.len() <= most, "{name}: {}", out.len());
            let Parsed::Header(header) = proxy::parse(&out, &proxy::Limits::default(), Versions::Any) else {
                panic!("{name}: {out:?}");
            };
            assert_eq!(header.tlvs.value(proxy::AUTHORITY), told.then_some(name.as_bytes()));
            assert_eq!(header.tlvs.value(proxy::UNIQUE_ID), Some(&b"0000000000000007"[..]));
        }
    }

    #[test]
    fn the_longest_header_fits_the_room_that_is_left_for_it() {
        let name = format!("{0}.{0}.{0}.{1}", "a".repeat(63), "b".repeat(61));
        let mut out = Vec::new();
        let head = Head {
            version: ProxyVersion::V2,
            source: "[2001:db8::7]:4000".parse().expect("an address"),
            destination: "[2001:db8::1]:443".parse().expect("an address"),
            id: u64::MAX,
            most: 536,
        };
        head.write(&greeting(&name), &mut out);
        assert!(out.len() > 300 && out.len() <= HEAD, "{}", out.len());
    }
}
