//! Networks as they are written.

use std::{fmt, net::IpAddr, str::FromStr};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, de};

/// A network in CIDR notation; a bare address is a network of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cidr(IpNet);

impl Cidr {
    /// Whether `address` is inside; an IPv4-mapped address is judged as the IPv4 address it is.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }

    /// The network, bits beyond its length cleared.
    pub fn net(&self) -> IpNet {
        self.0.trunc()
    }
}

impl FromStr for Cidr {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("\"{text}\" is no network; write \"fd00::/64\" or \"192.0.2.0/24\"");
        let network = if text.contains('/') {
            text.parse().map_err(|_| wrong())?
        } else {
            text.parse::<IpAddr>().map_err(|_| wrong())?.into()
        };
        Ok(Self(network))
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.net().fmt(f)
    }
}

impl<'de> Deserialize<'de> for Cidr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

crate::string_schema!(
    Cidr,
    "Cidr",
    "A network such as \"fd00::/64\" or \"192.0.2.0/24\".",
    r"^[0-9a-fA-F:.]+(/[0-9]+)?$"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_source_is_judged_as_the_ipv4_address_it_is() {
        let net: Cidr = "192.0.2.0/24".parse().expect("a network");
        assert!(net.contains("::ffff:192.0.2.7".parse().expect("an address")));
        assert!(!net.contains("192.0.3.7".parse().expect("an address")));
        let all: Cidr = "::/0".parse().expect("a network");
        assert!(all.contains("2001:db8::1".parse().expect("an address")));
        assert!(!all.contains("192.0.2.1".parse().expect("an address")));
        assert!("192.0.2.0/33".parse::<Cidr>().is_err());
    }

    #[test]
    fn a_bare_address_is_a_network_of_one_and_bits_beyond_the_length_do_not_count() {
        let one: Cidr = "2001:db8::1".parse().expect("a network");
        assert_eq!(one.to_string(), "2001:db8::1/128");
        let net: Cidr = "10.1.2.3/8".parse().expect("a network");
        assert_eq!(net.to_string(), "10.0.0.0/8");
        assert!(net.contains("10.9.9.9".parse().expect("an address")));
    }
}
