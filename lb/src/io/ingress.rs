//! PROXY headers on the data path: read in front of a client's bytes where a trusted proxy stands before us, written in
//! front of them where the backend wants to know the client.

use std::{net::SocketAddr, sync::atomic::Ordering::Relaxed};

use rustix::{io::Errno, net::RecvFlags};

use super::{
    dial::plain,
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
pub(crate) const HEAD: usize = 16 + 36 + (3 + 255) + (3 + 32) + (3 + 4);

/// The header that a backend is to get in front of the client's first bytes.
#[derive(Debug)]
pub(crate) struct Head {
    version: ProxyVersion,
    source: SocketAddr,
    destination: SocketAddr,
    /// Names the connection in our log and the backend's.
    id: u128,
}

impl Head {
    /// Writes the header. `first` are the client's first bytes as far as they are there: the name in a TLS greeting
    /// becomes the authority.
    pub(crate) fn write(&self, first: &[u8], out: &mut Vec<u8>) {
        out.clear();
        match self.version {
            ProxyVersion::V1 => proxy::encode_v1(self.source, self.destination, out),
            ProxyVersion::V2 => {
                let id = format!("{:032x}", self.id);
                let mut tlvs = vec![Tlv {
                    kind: proxy::UNIQUE_ID,
                    value: id.as_bytes(),
                }];
                if let Sni::Name(name) = sni::sni(first) {
                    tlvs.push(Tlv {
                        kind: proxy::AUTHORITY,
                        value: name.as_bytes(),
                    });
                }
                proxy::encode_v2(self.source, self.destination, &tlvs, true, out);
            }
        }
    }
}

/// The header for the backend that has just accepted, if it is to get one.
pub(super) fn head(session: &Session) -> Option<Box<Head>> {
    let version = session.frontend.rules.load().proxy?;
    let destination = match session.header.as_deref() {
        Some(Told::Destination(destination)) => *destination,
        // Gone already: then nobody will read what the header says.
        _ => rustix::net::getsockname(&session.client)
            .ok()
            .and_then(|any| SocketAddr::try_from(any).ok())
            .map_or(session.source, plain),
    };
    let id = session.frontend.next_id();
    tracing::debug!(
        frontend = session.frontend.name,
        unique_id = format_args!("{id:032x}"),
        client = %session.source,
        "PROXY header"
    );
    Some(Box::new(Head {
        version,
        source: session.source,
        destination,
        id,
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
                session.source = plain(source);
                Told::Destination(plain(destination))
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

/// Counts from a random number on, so that the ids of two processes do not meet.
pub(crate) fn ids() -> (u64, std::sync::atomic::AtomicU64) {
    let mut seed = [0u8; 8];
    let _ = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty());
    (u64::from_ne_bytes(seed), 0.into())
}

/// The next of [`ids`].
pub(crate) fn next_id((instance, count): &(u64, std::sync::atomic::AtomicU64)) -> u128 {
    (u128::from(*instance) << 64) | u128::from(count.fetch_add(1, Relaxed))
}
