//! What `edgectl doctor` finds out about the translator.

use super::Findings;
use crate::{api::Status, worker::Role};

/// Packets that may be lost for want of room, in a thousand, before anyone is told.
const LOST: u64 = 1;

/// Looks at the translator that runs, and at whether the machine hands packets on.
pub(super) fn run(findings: &mut Findings, status: &Status) {
    findings.category = "nat64";
    let runs = status.workers.iter().any(|worker| worker.role == Role::Nat64.name());
    let Some(nat64) = &status.nat64 else {
        if runs {
            findings.problem(
                "the translator does not answer edged",
                "machines without IPv4 may reach no server that has nothing else",
                "journalctl -u edged -n 100",
            );
        }
        return;
    };
    findings.ok(format!("translates on {}", nat64.device));
    for (file, key) in [
        ("/proc/sys/net/ipv4/ip_forward", "net.ipv4.ip_forward"),
        ("/proc/sys/net/ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding"),
    ] {
        match super::number(file) {
            Some(0) => findings.problem(
                format!("{key} is 0, so this machine hands no packets on"),
                "what is translated for others goes nowhere",
                format!("sysctl -w {key}=1; and for the next boot: echo {key}=1 > /etc/sysctl.d/60-edged.conf"),
            ),
            Some(_) => {}
            None => findings.unknown(
                format!("{key} cannot be read"),
                "packets may go nowhere",
                format!("sysctl {key}"),
            ),
        }
    }
    if !nat64.offloads.tcp {
        findings.hint(
            format!("the device {} knows no super-packets", nat64.device),
            "every packet is cut and summed up by the kernel first, which costs most of the throughput",
            "uname -r; TUN devices know them from Linux 2.6.27 on: edgectl nat64 status",
        );
    }
    let sent = nat64.ipv4.sent + nat64.ipv6.sent;
    if nat64.unsent > sent / 1000 * LOST && nat64.unsent > 100 {
        findings.hint(
            format!("the device {} did not take {} packets", nat64.device, nat64.unsent),
            "they were lost; it is down, or memory is short",
            format!("ip -s link show {}", nat64.device),
        );
    }
}
