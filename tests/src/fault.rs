//! Faults between a node and others, made by nft rules in the hub at that node's port.
//!
//! The rules are not in the node itself: a packet that its own kernel drops on the way out is reported to its TCP as a
//! local error, while one dropped in the hub was really sent and really lost. Neighbour discovery and ARP pass, so that
//! nothing is told by "no route to host" and only a missing answer tells.

use std::{
    fmt::Write,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::Result;

use crate::{
    Node,
    lab::Hub,
    netns::{self},
};

/// A fault in effect; healed on drop.
#[derive(Debug)]
pub struct Fault {
    hub: Arc<Hub>,
    table: String,
}

impl Node {
    /// Drops every packet between this node and each of `addresses`, both ways; other nodes still reach them.
    ///
    /// # Errors
    ///
    /// If nft refuses the rules.
    pub fn blackhole(&self, addresses: &[IpAddr]) -> Result<Fault> {
        self.fault(addresses, "drop")
    }

    /// Drops `percent` of the packets between this node and each of `addresses`, at random, each way.
    ///
    /// # Errors
    ///
    /// If nft refuses the rules.
    pub fn lose(&self, percent: u8, addresses: &[IpAddr]) -> Result<Fault> {
        self.fault(addresses, &format!("numgen random mod 100 < {percent} drop"))
    }

    /// Drops every packet from `addresses` to this node and lets those from it pass: it is heard and hears nothing.
    ///
    /// # Errors
    ///
    /// If nft refuses the rules.
    pub fn lose_replies(&self, addresses: &[IpAddr]) -> Result<Fault> {
        self.fault_on(addresses, "drop", &[("oifname", "saddr")])
    }

    fn fault(&self, addresses: &[IpAddr], verdict: &str) -> Result<Fault> {
        self.fault_on(addresses, verdict, &[("iifname", "daddr"), ("oifname", "saddr")])
    }

    /// `ways`: as the bridge sees them, packets of this node come in and those to it go out.
    fn fault_on(&self, addresses: &[IpAddr], verdict: &str, ways: &[(&str, &str)]) -> Result<Fault> {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let table = format!("fault{}", SERIAL.fetch_add(1, Ordering::Relaxed));
        let port = self.name();
        let mut rules = String::new();
        for address in addresses {
            let family = if address.is_ipv4() { "ip" } else { "ip6" };
            for (side, end) in ways {
                let _ = writeln!(
                    rules,
                    "{side} \"{port}\" {family} {end} {address} meta l4proto != ipv6-icmp {verdict}"
                );
            }
        }
        let hub = Arc::clone(self.hub());
        hub.netns.nft(&format!(
            "table bridge {table} {{ chain forward {{ type filter hook forward priority 0; policy accept;\n{rules}}}\n}}\n"
        ))?;
        Ok(Fault { hub, table })
    }
}

impl Fault {
    /// Takes the fault away.
    pub fn heal(self) {}
}

impl Drop for Fault {
    fn drop(&mut self) {
        let mut nft = self.hub.netns.command("nft");
        // The hub may be gone already, and the rules with it.
        let _ = netns::run(nft.args(["delete", "table", "bridge", &self.table]));
    }
}
