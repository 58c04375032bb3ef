//! The life of a Kubernetes cluster: from what is wanted and what is there to ordered steps, each safe to interrupt.
//!
//! [`quorum`] holds what every plan must keep: that etcd can still decide.

pub mod quorum;

/// Runs the examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
