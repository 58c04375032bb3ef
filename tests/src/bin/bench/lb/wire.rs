//! What clients and backends say to each other, so that each notices every wrong, missing, doubled or foreign byte.
//!
//! ```text
//! exchange  head (100 bytes) -> reply (200 bytes), end by the backend
//! hold      head + half a reply (200 bytes) -> reply (200 bytes), any number of times, end by the client
//! up        head -> blocks ... last block -> receipt (16 bytes), end by the backend
//! down      head -> blocks ... last block, end by the backend
//! ```
//! None of them needs half-closed connections, which nginx ends by default.

use std::{net::Ipv4Addr, sync::OnceLock};

/// Bytes of a [`Head`].
pub(crate) const HEAD: usize = 100;
/// Bytes of a reply, and of what a held session sends.
pub(crate) const REPLY: usize = 200;
/// Bytes of a block of bulk data.
pub(crate) const BLOCK: usize = 64 * 1024;
/// Bytes of the count and the verdict that end an upload.
pub(crate) const RECEIPT: usize = 16;

const BLOCK_HEAD: usize = 16;
const MAGIC: &[u8; 4] = b"EDGB";
const OFFSETS: usize = 64 * 1024;

/// Source addresses of clients: 127.0.1.1 and up, each with all its ports.
const SOURCES: u64 = 16;

/// Where the client of connection `id` connects from.
pub(crate) fn source(id: u64) -> Ipv4Addr {
    Ipv4Addr::new(127, 0, 1, 1 + (id % SOURCES) as u8)
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One request, one reply.
    Exchange = 1,
    /// A session that stays.
    Hold,
    /// Bulk data from the client.
    Up,
    /// Bulk data to the client.
    Down,
}

/// The first 100 bytes of every connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// What it is for.
    pub(crate) kind: Kind,
    /// Tells connections apart; all that follows depends on it.
    pub(crate) id: u64,
    /// Bulk data ends after that many bytes ...
    pub(crate) bytes: u64,
    /// ... or after that long, whichever comes first.
    pub(crate) millis: u32,
}

impl Head {
    /// As sent: the fields, then noise that depends on the id.
    pub(crate) fn encode(&self) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        head[..4].copy_from_slice(MAGIC);
        head[4] = self.kind as u8;
        head[8..16].copy_from_slice(&self.id.to_le_bytes());
        head[16..24].copy_from_slice(&self.bytes.to_le_bytes());
        head[24..28].copy_from_slice(&self.millis.to_le_bytes());
        head[28..].copy_from_slice(noise(self.id, HEAD - 28));
        head
    }

    /// `None` if any byte is not as it was sent.
    pub(crate) fn decode(head: &[u8; HEAD]) -> Option<Self> {
        let kind = match head[4] {
            1 => Kind::Exchange,
            2 => Kind::Hold,
            3 => Kind::Up,
            4 => Kind::Down,
            _ => return None,
        };
        let id = u64::from_le_bytes(head[8..16].try_into().ok()?);
        let bytes = u64::from_le_bytes(head[16..24].try_into().ok()?);
        let millis = u32::from_le_bytes(head[24..28].try_into().ok()?);
        let decoded = Self {
            kind,
            id,
            bytes,
            millis,
        };
        (decoded.encode() == *head).then_some(decoded)
    }
}

/// The answer to `head`: it backwards, then its complement.
pub(crate) fn reply(head: &[u8; HEAD]) -> [u8; REPLY] {
    let mut reply = [0; REPLY];
    for (i, byte) in head.iter().enumerate() {
        reply[HEAD - 1 - i] = *byte;
        reply[HEAD + i] = !byte;
    }
    reply
}

/// What a held session sends: `head`, then it backwards.
pub(crate) fn hold_message(head: &[u8; HEAD]) -> [u8; REPLY] {
    let mut message = reply(head);
    message.copy_within(..HEAD, HEAD);
    message[..HEAD].copy_from_slice(head);
    message
}

/// The end of an upload: bytes received, and whether all were right.
pub(crate) fn receipt(bytes: u64, good: bool) -> [u8; RECEIPT] {
    let mut receipt = [0; RECEIPT];
    receipt[..8].copy_from_slice(&bytes.to_le_bytes());
    receipt[8..].copy_from_slice(if good { b"received" } else { b"garbled!" });
    receipt
}

/// `len` random bytes, the same for the same id. At most [`BLOCK`].
fn noise(id: u64, len: usize) -> &'static [u8] {
    static NOISE: OnceLock<Vec<u8>> = OnceLock::new();
    let noise = NOISE.get_or_init(|| {
        // xorshift64 (Marsaglia 2003): anything without a period near a block, a page or a segment does.
        let mut x = 0x9E37_79B9_7F4A_7C15_u64;
        (0..OFFSETS + BLOCK)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                x.to_le_bytes()[3]
            })
            .collect()
    });
    // An odd factor spreads neighbouring ids over all offsets.
    let offset = (id.wrapping_mul(40_503) % OFFSETS as u64) as usize;
    &noise[offset..offset + len]
}

/// Makes the blocks of one stream.
///
/// A block is the stream's id with a mark on the last one, its number, and noise that is the same in each block: a
/// writer fills its buffer once and then stamps 16 bytes per block, so that making data costs the generator nothing.
pub(crate) struct Writer {
    id: u64,
    next: u64,
}

/// Set in a block's first field if it is the last.
const LAST: u64 = 1 << 63;

impl Writer {
    /// A stream of that id, and a buffer of `blocks` blocks for [`Writer::stamp`].
    pub(crate) fn new(id: u64, blocks: usize) -> (Self, Vec<u8>) {
        let mut block = vec![0; BLOCK_HEAD];
        block.extend_from_slice(noise(id, BLOCK - BLOCK_HEAD));
        (Self { id, next: 0 }, block.repeat(blocks))
    }

    /// Makes the buffer the next blocks of the stream; `last` ends it with them.
    pub(crate) fn stamp(&mut self, buffer: &mut [u8], last: bool) {
        let blocks = buffer.len() / BLOCK;
        for (i, block) in buffer.chunks_exact_mut(BLOCK).enumerate() {
            let mark = if last && i + 1 == blocks { LAST } else { 0 };
            block[..8].copy_from_slice(&(self.id | mark).to_le_bytes());
            block[8..BLOCK_HEAD].copy_from_slice(&self.next.to_le_bytes());
            self.next += 1;
        }
    }
}

/// Checks every byte of one stream.
pub(crate) struct Checker {
    id: u64,
    body: &'static [u8],
    head: [u8; BLOCK_HEAD],
    next: u64,
    at: usize,
    last: bool,
    /// Bytes seen so far.
    pub(crate) bytes: u64,
}

impl Checker {
    /// A stream of that id.
    pub(crate) fn new(id: u64) -> Self {
        let body = noise(id, BLOCK - BLOCK_HEAD);
        Self {
            id,
            body,
            head: [0; BLOCK_HEAD],
            next: 0,
            at: 0,
            last: false,
            bytes: 0,
        }
    }

    /// The last block has been seen, whole.
    pub(crate) fn complete(&self) -> bool {
        self.last && self.at == 0
    }

    /// Checks what has come in.
    ///
    /// # Errors
    ///
    /// The first byte that is not the stream's.
    pub(crate) fn feed(&mut self, mut data: &[u8]) -> Result<(), String> {
        while !data.is_empty() {
            if self.complete() {
                return Err(format!("{} bytes after the last block", data.len()));
            }
            let whole = if self.at < BLOCK_HEAD { BLOCK_HEAD } else { BLOCK };
            let (part, rest) = data.split_at(data.len().min(whole - self.at));
            if self.at < BLOCK_HEAD {
                self.head[self.at..self.at + part.len()].copy_from_slice(part);
                if self.at + part.len() == BLOCK_HEAD {
                    self.check_head()?;
                }
            } else if part != &self.body[self.at - BLOCK_HEAD..self.at - BLOCK_HEAD + part.len()] {
                return Err(format!(
                    "wrong byte in the {} after byte {} of stream {}",
                    part.len(),
                    self.bytes,
                    self.id
                ));
            }
            self.at = (self.at + part.len()) % BLOCK;
            self.bytes += part.len() as u64;
            data = rest;
        }
        Ok(())
    }

    fn check_head(&mut self) -> Result<(), String> {
        let (mark, number) = self.head.split_at(8);
        self.last = mark == (self.id | LAST).to_le_bytes();
        if !self.last && mark != self.id.to_le_bytes() || number != self.next.to_le_bytes() {
            return Err(format!(
                "block {} of stream {} is missing or another one",
                self.next, self.id
            ));
        }
        self.next += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_comes_back_and_a_changed_byte_is_noticed() {
        let head = Head {
            kind: Kind::Up,
            id: 77,
            bytes: 1 << 40,
            millis: 3000,
        };
        let encoded = head.encode();
        assert_eq!(Head::decode(&encoded), Some(head));
        for i in 0..HEAD {
            let mut changed = encoded;
            changed[i] ^= 0x40;
            assert_ne!(Head::decode(&changed), Some(head), "byte {i}");
        }
    }

    fn stream(id: u64, stamps: usize) -> Vec<u8> {
        let (mut writer, mut buffer) = Writer::new(id, 2);
        (0..stamps)
            .flat_map(|i| {
                writer.stamp(&mut buffer, i + 1 == stamps);
                buffer.clone()
            })
            .collect()
    }

    #[test]
    fn a_stream_is_accepted_in_pieces_of_any_size() {
        let data = stream(5, 3);
        for piece in [1, 7, 1448, BLOCK, data.len()] {
            let mut checker = Checker::new(5);
            data.chunks(piece)
                .for_each(|piece| checker.feed(piece).expect("the stream is whole"));
            assert!(checker.complete(), "pieces of {piece}");
            assert_eq!(checker.bytes, data.len() as u64);
        }
    }

    #[test]
    fn every_kind_of_damage_to_a_stream_is_noticed() {
        let data = stream(5, 2);
        let check = |data: &[u8]| {
            let mut checker = Checker::new(5);
            checker.feed(data).is_ok() && checker.complete()
        };
        assert!(check(&data));
        assert!(!check(&data[..data.len() - 1]), "truncated");
        assert!(!check(&[&data[..BLOCK], &data[2 * BLOCK..]].concat()), "a block lost");
        assert!(!check(&[&data[..BLOCK], &data[..]].concat()), "a block twice");
        assert!(!check(&[&data[..9000], &data[9001..], &[0]].concat()), "a byte lost");
        assert!(!check(&stream(6, 2)), "another stream");
        assert!(!check(&[&data[..], &[0]].concat()), "a byte too many");
        for i in [0, 8, 20, BLOCK + 3, 3 * BLOCK + 60_000] {
            let mut changed = data.clone();
            changed[i] ^= 1;
            assert!(!check(&changed), "byte {i} changed");
        }
    }
}
