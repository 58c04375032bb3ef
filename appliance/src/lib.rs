//! The appliance: `edged` (supervisor and workers) and `edgectl`.

pub mod api;
pub mod config;
pub mod control;
pub mod metrics;
pub mod store;
pub mod web;
pub mod cli;
pub mod client;
pub mod doctor;
