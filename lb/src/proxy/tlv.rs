//! What a header of version 2 may tell besides the addresses: type, length, value (specification, 2.2).

use super::{Reason, crc32c::crc32c};

/// The application protocol, as in TLS's ALPN.
pub const ALPN: u8 = 0x01;
/// The host name that the client asked for, as in TLS's SNI; at most 255 bytes.
pub const AUTHORITY: u8 = 0x02;
/// CRC32C of the header, computed with this value zeroed, in network byte order.
pub const CRC32C: u8 = 0x03;
/// Padding.
pub const NOOP: u8 = 0x04;
/// Names the connection across proxies; at most 128 bytes.
pub const UNIQUE_ID: u8 = 0x05;
/// What the client's TLS was; holds TLVs of its own.
pub const SSL: u8 = 0x20;
/// The network namespace.
pub const NETNS: u8 = 0x30;

/// Bytes of a checksum's TLV.
pub(super) const CHECKSUM: usize = HEADER + 4;

/// Type and length.
const HEADER: usize = 3;

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tlv<'a> {
    /// Its type, such as [`AUTHORITY`].
    pub kind: u8,
    /// Its value; may be empty.
    pub value: &'a [u8],
}

impl Tlv<'_> {
    /// The longest value of `kind` that is accepted, in bytes: HAProxy's limits.
    const fn most(kind: u8) -> usize {
        match kind {
            AUTHORITY => 255,
            UNIQUE_ID => 128,
            _ => 1024,
        }
    }

    /// Its length in a header.
    pub(super) fn len(&self) -> usize {
        HEADER + self.value.len()
    }

    pub(super) fn may_be_sent(&self) -> bool {
        self.kind != CRC32C && self.value.len() <= Self::most(self.kind)
    }

    /// `value` is at most 65 535 bytes long.
    pub(super) fn append(&self, out: &mut Vec<u8>) {
        let length = u16::try_from(self.value.len()).expect("a value no longer than accepted");
        out.push(self.kind);
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(self.value);
    }
}

/// The TLVs of a header, in its order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tlvs<'a>(&'a [u8]);

impl<'a> Tlvs<'a> {
    /// The value of the first one of this type.
    pub fn value(self, kind: u8) -> Option<&'a [u8]> {
        self.into_iter().find(|tlv| tlv.kind == kind).map(|tlv| tlv.value)
    }
}

impl<'a> Iterator for Tlvs<'a> {
    type Item = Tlv<'a>;

    fn next(&mut self) -> Option<Tlv<'a>> {
        let (&[kind, high, low], rest) = self.0.split_first_chunk::<HEADER>()?;
        let (value, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes([high, low])))?;
        self.0 = rest;
        Some(Tlv { kind, value })
    }
}

/// Makes sure that `bytes`, the end of `header`, are whole TLVs of acceptable length, and that the checksum, if there is
/// one, is right.
pub(super) fn checked<'a>(bytes: &'a [u8], header: &[u8]) -> Result<Tlvs<'a>, Reason> {
    let mut rest = Tlvs(bytes);
    let mut sum: Option<(&[u8; 4], usize)> = None;
    while let Some(Tlv { kind, value }) = rest.next() {
        if value.len() > Tlv::most(kind) {
            return Err(Reason::TlvTooLong(kind));
        }
        if kind == CRC32C {
            let value = value.try_into().map_err(|_| Reason::ChecksumForm)?;
            // Of two, each would have to be computed with the other in place.
            if sum.replace((value, rest.0.len())).is_some() {
                return Err(Reason::ChecksumForm);
            }
        }
    }
    if !rest.0.is_empty() {
        return Err(Reason::TlvCut);
    }
    if let Some((sum, behind)) = sum {
        let tail = header.len() - behind;
        let (head, tail) = (header.get(..tail - sum.len()), header.get(tail..));
        let computed = crc32c(
            crc32c(crc32c(0, head.unwrap_or_default()), &[0; 4]),
            tail.unwrap_or_default(),
        );
        if computed != u32::from_be_bytes(*sum) {
            return Err(Reason::Checksum);
        }
    }
    Ok(Tlvs(bytes))
}
