//! DNS64 and NAT64: the two users of one IPv6 prefix, so that a machine with IPv6 only reaches one with IPv4 only.
//!
//! [`prefix`] is what both share: where in an IPv6 address the IPv4 address lies.

pub mod access;
pub mod answer;
pub mod chain;
pub mod cache;
pub mod cookie;
pub mod front;
#[cfg(feature = "io")]
pub mod io;
pub mod packed;
#[cfg(feature = "io")]
pub mod prefix;
pub mod query;
pub mod question;
pub mod reverse;
pub mod special;
pub mod synthesis;
#[cfg(test)]
mod testing;
pub mod rate;
mod wire;
pub mod zone;
pub mod upstream;

pub use answer::Answer;
pub use prefix::{Pref64, PrefixError};
pub use question::Question;

/// Runs the examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
