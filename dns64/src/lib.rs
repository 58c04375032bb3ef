//! DNS64 and NAT64: the two users of one IPv6 prefix, so that a machine with IPv6 only reaches one with IPv4 only.
//!
//! [`prefix`] is what both share: where in an IPv6 address the IPv4 address lies.

pub mod answer;
#[cfg(feature = "io")]
pub mod io;
pub mod prefix;
pub mod question;
pub mod upstream;

pub use answer::Answer;
pub use prefix::{Pref64, PrefixError};
pub use question::Question;

/// Runs the examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
