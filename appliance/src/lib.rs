//! The appliance: `edged` (supervisor and workers) and `edgectl`.

pub mod api;
pub mod build;
pub mod channel;
pub mod cli;
pub mod client;
mod code;
pub mod config;
pub mod control;
pub mod doctor;
pub mod endpoint;
pub mod handover;
pub mod log;
pub mod metrics;
pub mod node;
pub mod notify;
pub mod references;
pub mod sandbox;
mod signals;
pub mod store;
pub mod supervisor;
pub mod web;
pub mod worker;
