//! What is wrong with a value that parses, and where.

use std::{collections::BTreeMap, net::SocketAddr, ops::Range};

use crate::At;

/// What an operator has to know about a value that parses but cannot work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Bytes of the file that are at fault.
    pub span: Range<usize>,
    /// Cause and effect.
    pub message: String,
    /// What to write instead.
    pub help: String,
    /// A warning lets the configuration through.
    pub warning: bool,
}

/// Faults on their way to the operator.
#[derive(Clone, Debug, Default)]
pub struct Faults(Vec<Fault>);

impl Faults {
    /// The value cannot work.
    pub fn error<T>(&mut self, at: &At<T>, message: impl Into<String>, help: impl Into<String>) {
        self.push(at, message, help, false);
    }

    /// The value works, but maybe not as it was meant.
    pub fn warn<T>(&mut self, at: &At<T>, message: impl Into<String>, help: impl Into<String>) {
        self.push(at, message, help, true);
    }

    /// Checks an address to listen on; `seen` holds those of the section so far, with their owners.
    pub fn listener(&mut self, at: &At<SocketAddr>, owner: &str, seen: &mut BTreeMap<SocketAddr, String>) {
        if at.port() == 0 {
            self.error(
                at,
                "port 0 would listen somewhere nobody knows",
                "write the port that clients use",
            );
        }
        if let SocketAddr::V6(v6) = at.value
            && let Some(v4) = v6.ip().to_ipv4_mapped()
        {
            self.error(
                at,
                format!("{} is an IPv4 address in IPv6 clothes", at.value),
                format!("write {v4}:{}", v6.port()),
            );
        }
        if let Some(other) = seen.insert(at.value, owner.to_owned()) {
            self.error(
                at,
                format!("{} is already the listener of {other}", at.value),
                "give each listener an address and port of its own",
            );
        }
    }

    /// All of them, in the order of the file.
    pub fn sorted(mut self) -> Vec<Fault> {
        self.0.sort_by_key(|fault| fault.span.start);
        self.0
    }

    fn push<T>(&mut self, at: &At<T>, message: impl Into<String>, help: impl Into<String>, warning: bool) {
        self.0.push(Fault {
            span: at.span.clone(),
            message: message.into(),
            help: help.into(),
            warning,
        });
    }
}
