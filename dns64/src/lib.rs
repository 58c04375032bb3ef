//! DNS64 and NAT64: the two users of one IPv6 prefix, so that a machine with IPv6 only reaches one with IPv4 only.
//!
//! ```text
//! datagram -> front (may it ask, is it known) -> reply
//!               \-> special names | zone | hosts | reverse | synthesis over upstream -> packed -> cache -> reply
//! UPDATE   -> zone (signature, policy) -> store -> reply
//! packet   -> nat64 (whose address stands for whose) -> packet of the other version
//! ```
//! [`prefix`] is what DNS64 and NAT64 share: where in an IPv6 address the IPv4 address lies. Everything outside [`io`] is
//! pure: values and `now` in, values out.

pub mod access;
pub mod answer;
pub mod cache;
pub mod chain;
pub mod config;
pub mod cookie;
pub mod front;
#[cfg(feature = "io")]
pub mod io;
pub mod nat64;
pub mod packed;
pub mod prefix;
pub mod query;
pub mod question;
pub mod rate;
pub mod reverse;
pub mod special;
pub mod status;
pub mod synthesis;
#[cfg(test)]
mod testing;
pub mod upstream;
mod wire;
pub mod zone;

pub use answer::Answer;
pub use config::Config;
pub use prefix::{Pref64, PrefixError};
pub use question::Question;
pub use settings::{Need, What};

/// What `config` asks the supervisor to open, each with the config line it comes from. `threads` answer over UDP.
pub fn needs(config: &Config, threads: u16) -> Vec<Need> {
    let mut needs = Vec::new();
    for at in &config.listen {
        let address = at.value;
        for what in [
            What::Datagrams {
                address,
                copies: threads,
            },
            What::Listener { address, copies: 1 },
        ] {
            needs.push(Need {
                what,
                key: "dns64.listen".into(),
                span: at.span.clone(),
            });
        }
    }
    if config.uses_tls() {
        let at = config.ca_file();
        needs.push(Need {
            what: What::File(at.value),
            key: "dns64.ca_file".into(),
            span: at.span,
        });
    }
    needs
}

/// Runs the examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
