//! The prefix under which IPv4 addresses appear in IPv6: [`Pref64`] embeds and extracts them (RFC 6052 §2).
//!
//! Values in, values out: DNS64 embeds, NAT64 extracts, router advertisements announce, and all mean the same prefix.

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// A NAT64 prefix: 32, 40, 48, 56, 64 or 96 bits long, without a bit set beyond its length or in bits 64 to 71.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pref64 {
    network: Ipv6Addr,
    length: u8,
}

/// Why a text is no [`Pref64`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrefixError {
    /// Not an IPv6 address, a slash and a number.
    #[error("\"{0}\" is no IPv6 prefix; write one such as \"64:ff9b::/96\"")]
    Form(String),
    /// A length that RFC 6052 §2.2 does not know.
    #[error("\"{text}\" has length {length}; RFC 6052 allows 32, 40, 48, 56, 64 or 96")]
    Length {
        /// As written.
        text: String,
        /// The length in it.
        length: u8,
    },
    /// Bits beyond the length.
    #[error("\"{text}\" has bits set beyond its length; write \"{prefix}\"")]
    HostBits {
        /// As written.
        text: String,
        /// The prefix it lies in.
        prefix: Pref64,
    },
    /// Bits 64 to 71, which stay zero for the sake of RFC 4291 interface identifiers (RFC 6052 §2.2).
    #[error("\"{0}\" sets bits 64 to 71, which RFC 6052 keeps zero; write 00 in the high half of the fifth group")]
    ReservedBits(String),
}

impl Pref64 {
    /// `64:ff9b::/96` (RFC 6052 §2.1).
    pub const WELL_KNOWN: Self = Self {
        network: Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0),
        length: 96,
    };

    /// The IPv6 address that stands for `address`; its suffix is zero (RFC 6052 §2.2).
    pub fn embed(self, address: Ipv4Addr) -> Ipv6Addr {
        let mut octets = self.network.octets();
        for (place, octet) in self.places().into_iter().zip(address.octets()) {
            octets[place] = octet;
        }
        octets.into()
    }

    /// The IPv4 address that `address` stands for; `None` outside the prefix. Bits 64 to 71 and the suffix are passed
    /// over, whatever they hold (RFC 6052 §2.3).
    pub fn extract(self, address: Ipv6Addr) -> Option<Ipv4Addr> {
        let octets = address.octets();
        self.contains(address)
            .then(|| self.places().map(|place| octets[place]).into())
    }

    /// Whether `address` lies under the prefix.
    pub fn contains(self, address: Ipv6Addr) -> bool {
        masked(address, self.length) == self.network
    }

    /// Whether `address` may appear under this prefix: the well-known one must not stand for an address without a
    /// meaning of its own on the whole internet (RFC 6052 §3.1); a network's own prefix may.
    pub fn may_embed(self, address: Ipv4Addr) -> bool {
        self != Self::WELL_KNOWN || is_global(address)
    }

    /// The leading bits that all its addresses have in common.
    pub const fn network(self) -> Ipv6Addr {
        self.network
    }

    /// Number of leading bits: 32, 40, 48, 56, 64 or 96.
    pub const fn length(self) -> u8 {
        self.length
    }

    /// Which octets of an IPv6 address hold the IPv4 address: those after the prefix, octet 8 left out.
    fn places(self) -> [usize; 4] {
        let first = usize::from(self.length / 8);
        [0, 1, 2, 3].map(|i| {
            if first <= 8 && first + i >= 8 {
                first + i + 1
            } else {
                first + i
            }
        })
    }
}

/// Whether the whole internet agrees on what `address` means: not listed in RFC 5735 §3 (which takes in RFC 1918) and
/// not shared address space (RFC 6598).
pub(crate) fn is_global(address: Ipv4Addr) -> bool {
    const ELSEWHERE: [(Ipv4Addr, u32); 15] = [
        (Ipv4Addr::new(0, 0, 0, 0), 8),
        (Ipv4Addr::new(10, 0, 0, 0), 8),
        (Ipv4Addr::new(100, 64, 0, 0), 10),
        (Ipv4Addr::new(127, 0, 0, 0), 8),
        (Ipv4Addr::new(169, 254, 0, 0), 16),
        (Ipv4Addr::new(172, 16, 0, 0), 12),
        (Ipv4Addr::new(192, 0, 0, 0), 24),
        (Ipv4Addr::new(192, 0, 2, 0), 24),
        (Ipv4Addr::new(192, 88, 99, 0), 24),
        (Ipv4Addr::new(192, 168, 0, 0), 16),
        (Ipv4Addr::new(198, 18, 0, 0), 15),
        (Ipv4Addr::new(198, 51, 100, 0), 24),
        (Ipv4Addr::new(203, 0, 113, 0), 24),
        (Ipv4Addr::new(224, 0, 0, 0), 4),
        (Ipv4Addr::new(240, 0, 0, 0), 4),
    ];
    !ELSEWHERE
        .iter()
        .any(|(network, length)| (network.to_bits() ^ address.to_bits()) >> (32 - length) == 0)
}

fn masked(address: Ipv6Addr, length: u8) -> Ipv6Addr {
    let beyond = u128::MAX.checked_shr(length.into()).unwrap_or(0);
    Ipv6Addr::from_bits(address.to_bits() & !beyond)
}

impl fmt::Display for Pref64 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.length)
    }
}

impl FromStr for Pref64 {
    type Err = PrefixError;

    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let form = || PrefixError::Form(text.to_owned());
        let (address, length) = text.split_once('/').ok_or_else(form)?;
        let address: Ipv6Addr = address.parse().map_err(|_| form())?;
        let length: u8 = length.parse().map_err(|_| form())?;
        if !matches!(length, 32 | 40 | 48 | 56 | 64 | 96) {
            return Err(PrefixError::Length {
                text: text.to_owned(),
                length,
            });
        }
        let prefix = Self {
            network: masked(address, length),
            length,
        };
        if prefix.network.octets()[8] != 0 {
            return Err(PrefixError::ReservedBits(text.to_owned()));
        }
        if prefix.network != address {
            return Err(PrefixError::HostBits {
                text: text.to_owned(),
                prefix,
            });
        }
        Ok(prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc6052_section_2_4_examples() {
        let documentation = Ipv4Addr::new(192, 0, 2, 33);
        for (prefix, address) in [
            ("2001:db8::/32", "2001:db8:c000:221::"),
            ("2001:db8:100::/40", "2001:db8:1c0:2:21::"),
            ("2001:db8:122::/48", "2001:db8:122:c000:2:2100::"),
            ("2001:db8:122:300::/56", "2001:db8:122:3c0:0:221::"),
            ("2001:db8:122:344::/64", "2001:db8:122:344:c0:2:2100::"),
            ("2001:db8:122:344::/96", "2001:db8:122:344::192.0.2.33"),
            ("64:ff9b::/96", "64:ff9b::192.0.2.33"),
        ] {
            let (prefix, address) = (pref64(prefix), address.parse::<Ipv6Addr>().expect("an address"));
            assert_eq!(prefix.embed(documentation), address, "{prefix}");
            assert_eq!(prefix.extract(address), Some(documentation), "{prefix}");
        }
    }

    #[test]
    fn what_was_embedded_is_extracted_and_bits_64_to_71_stay_zero() {
        for prefix in [
            "2001:db8::/32",
            "2001:db8:ff00::/40",
            "2001:db8:ffff::/48",
            "2001:db8:ffff:ff00::/56",
            "2001:db8::/64",
            "2001:db8::/96",
        ] {
            let prefix = pref64(prefix);
            // Multiplying by an odd number visits every kind of octet without repeating an address.
            for address in (0..4096_u32)
                .map(|i| Ipv4Addr::from_bits(i.wrapping_mul(0x9e37_79b1)))
                .chain([Ipv4Addr::BROADCAST])
            {
                let embedded = prefix.embed(address);
                assert_eq!(prefix.extract(embedded), Some(address), "{prefix}");
                assert_eq!(embedded.octets()[8], 0, "{prefix} {address}");
                assert!(prefix.contains(embedded), "{prefix}");
            }
        }
    }

    #[test]
    fn extraction_passes_over_reserved_bits_and_suffix_and_refuses_other_prefixes() {
        let prefix = pref64("2001:db8::/32");
        let noisy = "2001:db8:c000:221:ff12:3456:789a:bcde".parse().expect("an address");
        assert_eq!(prefix.extract(noisy), Some(Ipv4Addr::new(192, 0, 2, 33)));
        assert_eq!(prefix.extract("2001:db9:c000:221::".parse().expect("an address")), None);
        assert_eq!(
            Pref64::WELL_KNOWN.extract("64:ff9b:1::c000:221".parse().expect("an address")),
            None
        );
    }

    #[test]
    fn the_well_known_prefix_stands_for_global_addresses_only() {
        let own = pref64("2001:db8:122:344::/96");
        for (address, global) in [
            ("8.8.8.8", true),
            ("1.1.1.1", true),
            ("100.63.255.255", true),
            ("100.128.0.0", true),
            ("172.15.255.255", true),
            ("172.32.0.0", true),
            ("223.255.255.255", true),
            ("0.0.0.0", false),
            ("10.0.1.11", false),
            ("100.64.0.1", false),
            ("127.0.0.1", false),
            ("169.254.169.254", false),
            ("172.16.0.1", false),
            ("172.31.255.255", false),
            ("192.0.0.170", false),
            ("192.0.2.33", false),
            ("192.168.1.1", false),
            ("198.19.255.255", false),
            ("203.0.113.9", false),
            ("224.0.0.1", false),
            ("255.255.255.255", false),
        ] {
            let address = address.parse().expect("an address");
            assert_eq!(Pref64::WELL_KNOWN.may_embed(address), global, "{address}");
            assert!(own.may_embed(address), "{address}");
        }
    }

    #[test]
    fn a_bad_prefix_is_refused_with_the_remedy() {
        for (text, message) in [
            (
                "64:ff9b::/80",
                "\"64:ff9b::/80\" has length 80; RFC 6052 allows 32, 40, 48, 56, 64 or 96",
            ),
            (
                "64:ff9b::1/96",
                "\"64:ff9b::1/96\" has bits set beyond its length; write \"64:ff9b::/96\"",
            ),
            (
                "64:ff9b::",
                "\"64:ff9b::\" is no IPv6 prefix; write one such as \"64:ff9b::/96\"",
            ),
            (
                "10.0.0.0/96",
                "\"10.0.0.0/96\" is no IPv6 prefix; write one such as \"64:ff9b::/96\"",
            ),
            (
                "64:ff9b::/ninety",
                "\"64:ff9b::/ninety\" is no IPv6 prefix; write one such as \"64:ff9b::/96\"",
            ),
            (
                "2001:db8:0:0:ff00::/96",
                "\"2001:db8:0:0:ff00::/96\" sets bits 64 to 71, which RFC 6052 keeps zero; write 00 in the high half of the fifth group",
            ),
        ] {
            assert_eq!(text.parse::<Pref64>().expect_err(text).to_string(), message);
        }
    }

    #[test]
    fn a_prefix_is_written_as_it_is_read() {
        assert_eq!(Pref64::WELL_KNOWN.to_string(), "64:ff9b::/96");
        assert_eq!(pref64("64:ff9b::/96"), Pref64::WELL_KNOWN);
        assert_eq!(
            (
                pref64("2001:db8:100::/40").network(),
                pref64("2001:db8:100::/40").length()
            ),
            ("2001:db8:100::".parse().expect("an address"), 40)
        );
    }

    fn pref64(text: &str) -> Pref64 {
        text.parse().expect("a prefix")
    }
}
