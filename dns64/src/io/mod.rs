//! Sockets, threads, clocks: the shell around the pure modules.

pub mod upstream;
