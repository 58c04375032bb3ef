//! A packet that is translated where it lies: [`Packet`] in, [`Pieces`] out, over one buffer.
//!
//! IPv6 headers are longer than IPv4 ones, so the buffer has [`HEADROOM`] octets in front of the packet, and the payload, up
//! to 64 KiB of it, is not copied. What must be fragmented goes out piece by piece: the headers of each overwrite the end of
//! the one before, which has gone by then.

use std::{num::NonZeroU16, ops::Range};

use super::Ports;

/// Octets that a buffer has free in front of a packet. An ICMPv4 error whose extension is kept grows most, by 128: a longer
/// header, and 20 quoted octets that become 128 (RFC 4884 §5.1); up to 64 more are for the caller, see [`Pieces::next`].
pub const HEADROOM: usize = 192;

/// What the device finishes (virtio 1.2 §5.1.6): the checksum, and the cut into segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// Whether the TCP or UDP checksum field holds the sum of the pseudo-header only (`VIRTIO_NET_HDR_F_NEEDS_CSUM`).
    pub partial: bool,
    /// Octets of TCP or UDP payload in each segment that the packet is to be cut into (`gso_size`).
    pub segment: Option<NonZeroU16>,
}

/// One whole IPv4 or IPv6 packet, or what is to become several segments of one, in a buffer with room in front.
#[derive(Debug)]
pub struct Packet<'a> {
    buffer: &'a mut [u8],
    start: usize,
    end: usize,
    pub(super) offload: Offload,
    /// Those of the packet of which it is a later fragment.
    pub(super) ports: Ports,
    /// Where its transport header begins, from `start`.
    pub(super) transport: usize,
}

impl<'a> Packet<'a> {
    /// The packet in `range` of `buffer`; `None` if that lies outside, or has less than [`HEADROOM`] octets before it.
    pub fn new(buffer: &'a mut [u8], range: Range<usize>, offload: Offload) -> Option<Self> {
        buffer.get(range.clone())?;
        (range.start >= HEADROOM).then_some(Self {
            buffer,
            start: range.start,
            end: range.end,
            offload,
            ports: Ports::None,
            transport: 0,
        })
    }

    /// With the ports of the first fragment, for a mapper that goes by them, if it is a later one: see
    /// [`Fragments`](super::Fragments). They are of no account in other packets.
    #[must_use]
    pub fn with_ports(self, ports: Ports) -> Self {
        Self { ports, ..self }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        self.buffer.get_mut(self.start..self.end).unwrap_or_default()
    }

    /// Forgets what a link layer added at the end; `None` if the packet is shorter than it says.
    pub(super) fn cut(&mut self, length: usize) -> Option<()> {
        let end = self.start.checked_add(length)?;
        (end <= self.end).then(|| self.end = end)
    }

    /// Leaves `header`, then `kept` of what there is now, then `padding` zeros, then the last `tail` octets of what there
    /// is now. Neither `kept` nor `tail` moves unless both are there. `None` if this does not fit.
    pub(super) fn rebuild(&mut self, header: &[u8], kept: Range<usize>, padding: usize, tail: usize) -> Option<()> {
        let from = self.start.checked_add(kept.start)?;
        let length = kept.end.checked_sub(kept.start)?;
        let end = if tail == 0 && padding == 0 {
            from.checked_add(length)?
        } else {
            self.end
        };
        let to = end.checked_sub(tail)?.checked_sub(padding)?.checked_sub(length)?;
        let start = to.checked_sub(header.len())?;
        if end > self.end || from.checked_add(length)? > self.end {
            return None;
        }
        self.buffer.get(start..end)?;
        if to != from {
            self.buffer.copy_within(from..from + length, to);
        }
        self.buffer.get_mut(to + length..to + length + padding)?.fill(0);
        self.buffer.get_mut(start..to)?.copy_from_slice(header);
        (self.start, self.end) = (start, end);
        Some(())
    }

    /// The packet as it is.
    pub(super) fn whole(self) -> Pieces<'a> {
        Pieces {
            packet: self,
            split: None,
            done: false,
        }
    }

    /// What follows `header` octets of the packet in pieces, each behind `split`.
    pub(super) fn pieces(self, split: Split) -> Pieces<'a> {
        Pieces {
            packet: self,
            split: Some(split),
            done: false,
        }
    }
}

/// How an IPv4 packet becomes fragments of an IPv6 one (RFC 7915 §4.1).
#[derive(Clone, Debug)]
pub(super) struct Split {
    /// Headers of the first piece, whose lengths and flags are right for the whole: IPv6 and Fragment.
    pub(super) header: [u8; 48],
    /// Octets of payload in each piece but the last; a multiple of 8 that is no less than the headers and 64.
    pub(super) chunk: usize,
    /// Where the payload of the first piece lies in the packet that it came in, in octets; a multiple of 8.
    pub(super) offset: u16,
    /// Whether fragments follow the last piece.
    pub(super) more: bool,
}

/// One or several packets to send, in order, each valid until the next is asked for.
#[derive(Debug)]
pub struct Pieces<'a> {
    packet: Packet<'a>,
    split: Option<Split>,
    done: bool,
}

impl Pieces<'_> {
    /// The next packet, behind `before` octets that are the caller's to fill, at most 64; `None` if that was all.
    ///
    /// Without fragmentation there is exactly one.
    // No `Iterator`: its items would outlive each other, and these lie in one another's place.
    pub fn next(&mut self, before: usize) -> Option<&mut [u8]> {
        if self.done {
            return None;
        }
        let packet = &mut self.packet;
        let mut end = packet.end;
        if let Some(split) = &mut self.split {
            // `start` is where the payload of this piece begins.
            let length = split.chunk.min(packet.end.checked_sub(packet.start)?);
            end = packet.start.checked_add(length)?;
            let last = end == packet.end;
            let start = packet.start.checked_sub(split.header.len())?;
            let lengths = u16::try_from(length.checked_add(8)?).ok()?;
            let flags = split.offset | u16::from(split.more || !last);
            split.header.get_mut(4..6)?.copy_from_slice(&lengths.to_be_bytes());
            split.header.get_mut(42..44)?.copy_from_slice(&flags.to_be_bytes());
            packet
                .buffer
                .get_mut(start..packet.start)?
                .copy_from_slice(&split.header);
            split.offset = split.offset.saturating_add(u16::try_from(length).ok()?);
            packet.start = end;
            self.done = last;
            return packet.buffer.get_mut(start.checked_sub(before)?..end);
        }
        self.done = true;
        packet.buffer.get_mut(packet.start.checked_sub(before)?..end)
    }

    /// What the device has to finish of each.
    pub fn offload(&self) -> Offload {
        self.packet.offload
    }

    /// Where in the packet the transport header begins, in octets from its first, which is what `csum_start` says. Of use
    /// only for a packet of one piece.
    pub fn transport(&self) -> usize {
        self.packet.transport
    }
}

/// Headers put together in front of a payload: at most an IPv6 one, that of ICMP, and a quoted IPv6 one with a Fragment
/// header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Headers {
    octets: [u8; 104],
    length: usize,
}

impl Headers {
    pub(super) const fn new() -> Self {
        Self {
            octets: [0; 104],
            length: 0,
        }
    }

    /// With `more` behind what there is, if there is room.
    pub(super) fn then(mut self, more: &[u8]) -> Self {
        let end = self.length.saturating_add(more.len());
        if let Some(place) = self.octets.get_mut(self.length..end) {
            place.copy_from_slice(more);
            self.length = end;
        }
        self
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        self.octets.get(..self.length).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_needs_room_in_front_and_lies_in_its_buffer() {
        let mut buffer = [0; HEADROOM + 20];
        let mut fits = |range| Packet::new(&mut buffer, range, Offload::default()).is_some();
        assert!(fits(HEADROOM..HEADROOM + 20));
        assert!(!fits(HEADROOM - 1..HEADROOM + 20));
        assert!(!fits(HEADROOM..HEADROOM + 21));
    }

    #[test]
    fn what_is_kept_stays_behind_its_header_and_before_its_tail() {
        for (kept, padding, tail, expected) in [
            (4..10, 0, 0, "ABefghij"),
            (4..8, 0, 2, "ABefghij"),
            (4..6, 0, 2, "ABefij"),
            (4..6, 3, 2, "ABef\0\0\0ij"),
            (0..10, 0, 0, "ABabcdefghij"),
        ] {
            let mut buffer = vec![b'.'; HEADROOM];
            buffer.extend(b"abcdefghij");
            let mut packet = Packet::new(&mut buffer, HEADROOM..HEADROOM + 10, Offload::default()).expect("room");
            packet.rebuild(b"AB", kept, padding, tail).expect("room");
            assert_eq!(packet.bytes(), expected.as_bytes());
        }
    }

    #[test]
    fn what_does_not_fit_leaves_the_packet_as_it_was() {
        let mut buffer = [7; HEADROOM + 10];
        let mut packet = Packet::new(&mut buffer, HEADROOM..HEADROOM + 10, Offload::default()).expect("room");
        assert_eq!(packet.rebuild(&[0; HEADROOM + 1], 0..10, 0, 0), None);
        assert_eq!(packet.rebuild(&[], 0..11, 0, 0), None);
        assert_eq!(packet.rebuild(&[], 0..4, 1000, 2), None);
        assert_eq!(packet.bytes(), [7; 10]);
    }
}
