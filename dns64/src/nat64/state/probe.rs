//! The packet that asks a host whether it still has a connection.

use super::Probe;
use crate::{
    Pref64,
    nat64::{
        checksum::Sum,
        ip::{V6, protocol, set_word},
    },
};

/// Octets of the packet: headers of IPv6 and TCP.
pub const LENGTH: usize = 60;
/// Hops that it may go.
const HOPS: u8 = 64;
const ACK: u8 = 0x10;

impl Probe {
    /// An acknowledgement without data, as the other end would keep the connection alive (RFC 9293 §3.8.4). Nobody knows its
    /// numbers here, so that it is out of order, and a host that has the connection answers with what it expects
    /// (RFC 9293 §3.10.7.4); one that has it not resets it.
    pub fn packet(&self, prefix: Pref64) -> [u8; LENGTH] {
        let source = prefix.embed(self.remote.0);
        let header = V6 {
            class: 0,
            payload: 20,
            hop_limit: HOPS,
            source,
            destination: self.host.0,
            fragment: None,
            protocol: protocol::TCP,
            header: 40,
            obstacle: None,
        };
        let mut segment = [0; 20];
        segment[12] = 5 << 4;
        segment[13] = ACK;
        set_word(&mut segment, 0, self.remote.1);
        set_word(&mut segment, 2, self.host.1);
        let pseudo = Sum::pseudo_v6(source, self.host.0, segment.len(), protocol::TCP);
        let checksum = Sum::of(&segment).plus(pseudo).checksum();
        set_word(&mut segment, 16, checksum);
        let mut packet = [0; LENGTH];
        let octets = header.headers();
        let all = octets.as_slice().iter().chain(&segment);
        packet.iter_mut().zip(all).for_each(|(place, octet)| *place = *octet);
        packet
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nat64::testing::{ip4, ip6, transport_sum};

    #[test]
    fn it_is_an_acknowledgement_from_the_other_end_with_a_right_checksum() {
        let probe = Probe {
            host: (ip6("2001:db8:1::10"), 40_000),
            remote: (ip4("198.51.100.80"), 443),
        };
        let packet = probe.packet("2001:db8:64::/96".parse().expect("a prefix"));
        assert_eq!(transport_sum(&packet), 0xffff);
        assert_eq!((packet[0] >> 4, packet[6], packet[7], packet[53]), (6, 6, 64, ACK));
        assert_eq!(packet[4..6], [0, 20]);
        assert_eq!(packet[8..24], ip6("2001:db8:64::198.51.100.80").octets());
        assert_eq!(packet[40..44], [1, 187, 0x9c, 0x40]);
    }
}
