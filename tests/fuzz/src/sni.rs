//! The beginning of a TLS connection: the answer does not depend on how the bytes arrive, and a name is one.

use lb::sni::{Sni, sni};

/// `bytes` are the beginning of a connection.
pub fn run(bytes: &[u8]) {
    let whole = sni(bytes);
    for cut in (0..bytes.len()).step_by(1 + bytes.len() / 48) {
        let part = sni(&bytes[..cut]);
        assert!(
            part == Sni::NeedMore || part == whole,
            "cut at {cut}: {part:?}, then {whole:?}"
        );
    }
    if let Sni::Name(name) = whole {
        assert!((1..=253).contains(&name.len()) && name.is_ascii() && !name.ends_with('.'));
        assert!(bytes.as_ptr_range().contains(&name.as_ptr()), "a name from elsewhere");
        assert!(name.parse::<std::net::IpAddr>().is_err());
    }
    if whole == Sni::NeedMore {
        assert!(bytes.len() < 1 << 20, "more, for ever");
    }
}
