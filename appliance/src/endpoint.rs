//! Where a socket is bound, and for which transport: what the supervisor knows its sockets by.

use std::{fmt, net::SocketAddr, str::FromStr};

use serde::{Deserialize, Serialize};

/// A bound socket's place. As text a TCP address alone, `[::1]:53`, and a UDP one as `udp:[::1]:53`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Endpoint {
    /// By what clients reach it.
    pub transport: Transport,
    /// Where.
    pub address: SocketAddr,
}

/// TCP or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    /// A listener.
    Tcp,
    /// A socket that receives datagrams.
    Udp,
}

impl Endpoint {
    /// A TCP listener's.
    pub const fn tcp(address: SocketAddr) -> Self {
        Self {
            transport: Transport::Tcp,
            address,
        }
    }

    /// A UDP socket's.
    pub const fn udp(address: SocketAddr) -> Self {
        Self {
            transport: Transport::Udp,
            address,
        }
    }
}

impl Transport {
    /// In lower case.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.transport {
            Transport::Tcp => self.address.fmt(f),
            Transport::Udp => write!(f, "udp:{}", self.address),
        }
    }
}

impl FromStr for Endpoint {
    type Err = std::net::AddrParseError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("udp:") {
            Some(address) => address.parse().map(Self::udp),
            None => text.parse().map(Self::tcp),
        }
    }
}

impl TryFrom<String> for Endpoint {
    type Error = std::net::AddrParseError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Endpoint> for String {
    fn from(endpoint: Endpoint) -> Self {
        endpoint.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_transports_of_one_address_are_two_places_and_come_back_from_their_text() {
        let address = "[fd0d::1]:53".parse().expect("an address");
        for endpoint in [Endpoint::tcp(address), Endpoint::udp(address)] {
            assert_eq!(endpoint.to_string().parse(), Ok(endpoint));
        }
        assert_ne!(Endpoint::tcp(address), Endpoint::udp(address));
        assert!("udp:nowhere".parse::<Endpoint>().is_err());
    }
}
