//! Sockets, threads, clocks: the shell around the pure modules.

<<<<<<< HEAD
pub mod udp;
=======
pub mod upstream;
>>>>>>> dns-upstream
