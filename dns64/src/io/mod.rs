//! Sockets, threads, clocks: the shell around the pure modules.

mod resolver;
pub mod service;
mod tcp;
pub mod udp;
pub mod upstream;
