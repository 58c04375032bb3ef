//! What a section asks for before its service can run.

use std::{collections::BTreeSet, net::SocketAddr, ops::Range, path::PathBuf};

use ipnet::IpNet;

/// Something the supervisor opens before the worker exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// What to open.
    pub what: What,
    /// The key that asks for it, such as `lb.frontend.api.listen`.
    pub key: String,
    /// Its bytes in the configuration file.
    pub span: Range<usize>,
}

/// The kinds of [`Need`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A TCP listener with keepalive and TCP_USER_TIMEOUT.
    Listener {
        /// Where; unique within the configuration.
        address: SocketAddr,
        /// How many SO_REUSEPORT sockets: one per thread that accepts.
        copies: u16,
    },
    /// A bound UDP socket.
    Datagrams {
        /// Where; unique within the configuration.
        address: SocketAddr,
        /// How many SO_REUSEPORT sockets: one per thread that receives.
        copies: u16,
    },
    /// The content of a readable file that is no secret (a CA certificate).
    File(PathBuf),
    /// A TUN device that is up, without addresses, with super-packets.
    Tun {
        /// Its name; at most 15 octets.
        name: String,
        /// How many queues: one per thread that reads.
        queues: u16,
        /// What the machine sends into it.
        routes: BTreeSet<IpNet>,
        /// Octets of memory that are kept with it.
        memory: u64,
    },
}
