//! Sockets, threads, clocks: the shell around the pure modules.

mod memory;
pub mod nat64;
mod resolver;
pub mod service;
mod tcp;
pub mod tun;
pub mod udp;
pub mod upstream;
