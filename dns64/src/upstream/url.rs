//! Where an upstream is and how it is spoken to, as one writes it: [`Url`].

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// How queries travel to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Datagrams, and TCP to the same port where an answer does not fit one or cannot be trusted.
    Udp,
    /// TCP alone (RFC 7766).
    Tcp,
    /// TLS (RFC 7858), the server's name always verified.
    Tls,
}

/// One upstream: `udp://192.0.2.53`, `tcp://[2001:db8::53]:5353`, `tls://192.0.2.54#dns.example.org`.
///
/// `?case=fixed` says of a server by UDP that it does not repeat the letters of a question as they were asked, so that
/// none are drawn at random for it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Url {
    transport: Transport,
    address: SocketAddr,
    /// Lower case, without a final dot.
    name: Option<String>,
    keeps_case: bool,
}

/// Why a text is no [`Url`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Not a known scheme.
    #[error(
        "\"{0}\" is no upstream; write \"udp://\", \"tcp://\" or \"tls://\" and an address, such as \"udp://192.0.2.53\""
    )]
    Scheme(String),
    /// Neither an address nor an address and a port.
    #[error(
        "\"{0}\" has no IP address after \"//\"; write one such as \"udp://192.0.2.53\" or \"udp://[2001:db8::53]:5353\": a \
         name would need a resolver to be found"
    )]
    Address(String),
    /// An address that nobody can send to.
    #[error("\"{0}\" names no single server; write the address of one and a port other than 0")]
    Nowhere(String),
    /// A name without TLS.
    #[error("\"{0}\" gives a name to verify, which only \"tls://\" can; remove \"#\" and what follows it")]
    NameWithoutTls(String),
    /// Not a host name.
    #[error(
        "\"{0}\" has no host name after \"#\"; write the name in the server's certificate, such as \"#dns.example.org\""
    )]
    Name(String),
    /// An option that is not known, or not to this transport.
    #[error("\"{0}\" has an unknown option; the only one is \"?case=fixed\", with \"udp://\"")]
    Option(String),
}

impl Url {
    /// How queries travel.
    pub const fn transport(&self) -> Transport {
        self.transport
    }

    /// Where they go.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// The name that the server's certificate must hold; `None` means that it must hold the address.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Whether the server repeats a question's letters as they were asked.
    pub const fn keeps_case(&self) -> bool {
        self.keeps_case
    }
}

impl Transport {
    /// As in a URL and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
            Self::Tls => "tls",
        }
    }

    /// The port that is not written (RFC 1035 §4.2, RFC 7858 §3.1).
    const fn port(self) -> u16 {
        match self {
            Self::Udp | Self::Tcp => 53,
            Self::Tls => 853,
        }
    }
}

impl FromStr for Url {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let whole = || text.to_owned();
        let (scheme, rest) = text.split_once("://").ok_or_else(|| UrlError::Scheme(whole()))?;
        let transport = [Transport::Udp, Transport::Tcp, Transport::Tls]
            .into_iter()
            .find(|transport| transport.name() == scheme)
            .ok_or_else(|| UrlError::Scheme(whole()))?;
        let (rest, name) = rest
            .split_once('#')
            .map_or((rest, None), |(rest, name)| (rest, Some(name)));
        let (place, option) = rest
            .split_once('?')
            .map_or((rest, None), |(place, option)| (place, Some(option)));

        let address = address_of(place, transport.port()).ok_or_else(|| UrlError::Address(whole()))?;
        if address.ip().is_unspecified() || address.ip().is_multicast() || address.port() == 0 {
            return Err(UrlError::Nowhere(whole()));
        }
        let name = match name {
            None => None,
            Some(_) if transport != Transport::Tls => return Err(UrlError::NameWithoutTls(whole())),
            Some(name) => Some(host_name(name).ok_or_else(|| UrlError::Name(whole()))?),
        };
        let keeps_case = match option {
            None => true,
            Some("case=fixed") if transport == Transport::Udp => false,
            Some(_) => return Err(UrlError::Option(whole())),
        };
        Ok(Self {
            transport,
            address,
            name,
            keeps_case,
        })
    }
}

/// `192.0.2.53`, `192.0.2.53:5353`, `[2001:db8::53]`, `[2001:db8::53]:5353`, and `2001:db8::53`, which is clear enough.
fn address_of(place: &str, port: u16) -> Option<SocketAddr> {
    if let Ok(address) = place.parse::<SocketAddr>() {
        return Some(address);
    }
    let bare = place
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .filter(|inner| inner.contains(':'))
        .unwrap_or(place);
    bare.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, port))
}

/// A host name as certificates hold it (RFC 1123 §2.1), in lower case; underscores are let through, some have them.
fn host_name(text: &str) -> Option<String> {
    let name = text.strip_suffix('.').unwrap_or(text);
    let good = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    let all_digits = name.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    (name.len() <= 253 && !all_digits && name.split('.').all(good)).then(|| name.to_ascii_lowercase())
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://", self.transport.name())?;
        match self.address {
            address if address.port() != self.transport.port() => write!(f, "{address}")?,
            SocketAddr::V4(address) => write!(f, "{}", address.ip())?,
            SocketAddr::V6(address) if address.scope_id() != 0 => write!(f, "{address}")?,
            SocketAddr::V6(address) => write!(f, "[{}]", address.ip())?,
        }
        if !self.keeps_case {
            f.write_str("?case=fixed")?;
        }
        self.name.iter().try_for_each(|name| write!(f, "#{name}"))
    }
}

impl TryFrom<String> for Url {
    type Error = UrlError;
    fn try_from(text: String) -> Result<Self, UrlError> {
        text.parse()
    }
}

impl From<Url> for String {
    fn from(url: Url) -> Self {
        url.to_string()
    }
}

impl JsonSchema for Url {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Url".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "A server such as \"udp://192.0.2.53\", \"tcp://[2001:db8::53]:5353\" or \"tls://192.0.2.54#dns.example.org\".",
            "pattern": "^(udp|tcp|tls)://[^#?]+(\\?case=fixed)?(#.+)?$"
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_written_has_the_value_of_the_protocol() {
        for (text, transport, address, name) in [
            ("udp://192.0.2.53", Transport::Udp, "192.0.2.53:53", None),
            ("udp://[::1]:5353", Transport::Udp, "[::1]:5353", None),
            ("tcp://2001:db8::53", Transport::Tcp, "[2001:db8::53]:53", None),
            ("tls://192.0.2.54", Transport::Tls, "192.0.2.54:853", None),
            (
                "tls://[2001:db8::54]#dns.example.org",
                Transport::Tls,
                "[2001:db8::54]:853",
                Some("dns.example.org"),
            ),
            (
                "tls://192.0.2.54:8853#DNS.Example.org.",
                Transport::Tls,
                "192.0.2.54:8853",
                Some("dns.example.org"),
            ),
        ] {
            let url = url(text);
            assert_eq!(url.transport(), transport, "{text}");
            assert_eq!(url.address().to_string(), address, "{text}");
            assert_eq!(url.name(), name, "{text}");
            assert!(url.keeps_case());
        }
        assert!(!url("udp://192.0.2.53?case=fixed").keeps_case());
    }

    #[test]
    fn what_is_printed_is_what_was_meant() {
        for (text, printed) in [
            ("udp://192.0.2.53:53", "udp://192.0.2.53"),
            ("udp://192.0.2.53:853?case=fixed", "udp://192.0.2.53:853?case=fixed"),
            ("tcp://2001:db8::53", "tcp://[2001:db8::53]"),
            ("udp://[fe80::1%3]", "udp://[fe80::1%3]:53"),
            (
                "tls://192.0.2.54:853#Dns.Example.Org",
                "tls://192.0.2.54#dns.example.org",
            ),
        ] {
            if text.contains('%') && text.parse::<Url>().is_err() {
                // A zone needs the port to be written.
                continue;
            }
            assert_eq!(url(text).to_string(), printed);
            assert_eq!(url(printed), url(text));
        }
        let json = serde_json::to_string(&url("tls://192.0.2.54#dns.example.org")).expect("a string");
        assert_eq!(json, "\"tls://192.0.2.54#dns.example.org\"");
        assert_eq!(
            serde_json::from_str::<Url>(&json).expect("a URL"),
            url("tls://192.0.2.54#dns.example.org")
        );
    }

    #[test]
    fn what_is_wrong_is_said_with_the_remedy() {
        for (text, remedy) in [
            ("192.0.2.53", "write \"udp://\""),
            ("https://192.0.2.53", "write \"udp://\""),
            ("UDP://192.0.2.53", "write \"udp://\""),
            ("udp://dns.example.org", "a name would need a resolver"),
            ("udp://", "has no IP address"),
            ("udp://192.0.2.53:", "has no IP address"),
            ("udp://[192.0.2.53]", "has no IP address"),
            ("udp://192.0.2.53:65536", "has no IP address"),
            ("udp://192.0.2.53/path", "has no IP address"),
            ("udp://0.0.0.0", "names no single server"),
            ("udp://[ff02::fb]:5353", "names no single server"),
            ("udp://192.0.2.53:0", "names no single server"),
            ("udp://192.0.2.53#dns.example.org", "remove \"#\""),
            ("tls://192.0.2.54#", "write the name"),
            ("tls://192.0.2.54#-x.example.org", "write the name"),
            ("tls://192.0.2.54#a..example.org", "write the name"),
            ("tls://192.0.2.54#192.0.2.54", "write the name"),
            ("udp://192.0.2.53?case=random", "the only one"),
            ("tls://192.0.2.53?case=fixed", "the only one"),
        ] {
            let error = text.parse::<Url>().expect_err(text).to_string();
            assert!(error.contains(remedy) && error.contains(text), "{error}");
        }
    }

    fn url(text: &str) -> Url {
        text.parse().expect(text)
    }
}
