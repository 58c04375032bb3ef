//! The private side of the edge: the WireGuard network of admins and nodes, and who may reach what in it.
//!
//! [`plan`] says which node has which address.

pub mod plan;

/// Runs the examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
