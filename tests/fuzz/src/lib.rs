//! What holds for bytes from anywhere, one function per parser. `src/bin` gives each to libFuzzer, `seeds` holds what it
//! begins with, and `scripts/fuzz.sh` builds and runs them.
//!
//! A panic is a finding. So is a broken promise: each function says which ones it puts to the test.

pub mod channel;
pub mod config;
pub mod dns_query;
pub mod dns_reply;
pub mod dns_update;
pub mod nat64;
pub mod proxy_parse;
pub mod snapshot;
pub mod sni;

/// The pure files of the appliance, which as a crate takes minutes to build.
#[path = "../../../appliance/src"]
#[allow(
    dead_code,
    unused_imports,
    reason = "not everything in these files is put to the test"
)]
mod appliance {
    pub(crate) mod config;
    pub(crate) mod channel {
        pub(crate) mod assembly;
    }
    pub(crate) mod worker {
        pub(crate) mod message;
    }
}

/// As the appliance's files name it.
#[path = "../../../appliance/src/endpoint.rs"]
#[allow(dead_code, reason = "messages hold such places, and no target makes one")]
mod endpoint;

/// The one file of the balancer's shell that reads what another process wrote.
#[path = "../../../lb/src/io"]
mod io {
    pub(crate) mod memory;
}
