//! The life of a Kubernetes cluster: from what is wanted and what is there to ordered steps, each safe to interrupt.
//!
//! [`quorum`] holds what every plan must keep: that etcd can still decide.

pub mod quorum;
