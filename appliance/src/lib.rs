//! The appliance: `edged` (supervisor and workers) and `edgectl`.

pub mod api;
pub mod config;
pub mod control;
pub mod metrics;
pub mod store;
pub mod web;
pub mod client;
pub mod cli;
pub mod doctor;
pub mod channel;
pub mod log;
pub mod notify;
pub mod sandbox;
pub mod supervisor;
pub mod worker;
