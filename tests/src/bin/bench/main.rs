//! Benchmarks of the appliance beside its peers, in one run on one machine.
//!
//! ```text
//! bench lb|dns -> sandbox (own network, processes, /run) -> peers + backend + clients -> rounds -> report
//! ```
//! `lb/` measures the balancer, `dns/` the resolver. What is beside them serves both: [`sandbox`] to be alone, [`running`] for
//! peers, [`session`] for a client and everybody's CPU time, [`tally`] for figures. docs/benchmarks.md has the method.

mod dns;
mod lb;
mod options;
mod procs;
mod running;
mod sandbox;
mod session;
mod stats;
mod tally;

use std::process::ExitCode;

use anyhow::{Result, bail};

const USAGE: &str = "\
Usage: bench lb [OPTIONS]        new connections, bulk, idle memory and system calls of edged and its peers: as a
                                 balancer, as an ingress that sends the PROXY protocol, and on a cluster's node
       bench dns [OPTIONS]       queries per second, latency and CPU per query of edged and its peers as DNS64

  --rounds N       rounds; the table shows medians [default: 5]
  --quick          one short round, to see that everything works; no figures to quote
  --output json    JSON instead of Markdown

of lb:
  --only A,B       only these metrics (connections, bulk, memory, syscalls), peers (edged, haproxy-copy,
                   haproxy-splice, haproxy-pipes, nginx, tokio, direct, edged-proxy, haproxy-proxy, nginx-proxy,
                   edged-node, haproxy-node) and groups of peers (balancer, ingress, node)
  --peer NAME      beside the others: haproxy-pipes, HAProxy splicing through pipes as large as edged's;
                   or tokio, a per-core copy_bidirectional proxy: what own code buys. May be repeated

of dns:
  --only A,B       only these kinds of query (a, synthesised, native, mix), loads (rate, maximum) and peers (edged,
                   unbound, named)

Needs root (network namespace, strace) and iproute2; lb: haproxy, nginx with its stream module, strace; dns: unbound, named;
scripts/bench.sh installs them. EDGED_BIN_DIR is the folder of edged [default: beside bench].";

fn main() -> ExitCode {
    match dispatch() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some((command, rest)) = args.split_first() else {
        bail!("nothing to do\n\n{USAGE}")
    };
    match command.as_str() {
        "lb" => {
            // Looked at here too, so that a typing error shows before anything starts.
            lb::Options::parse(rest)?.check_tools()?;
            sandbox::enter("lb-inside", rest)
        }
        "dns" => {
            dns::Options::parse(rest)?.check_tools()?;
            sandbox::enter("dns-inside", rest)
        }
        "help" | "--help" | "-h" => {
            println!("{USAGE}");
            Ok(ExitCode::SUCCESS)
        }
        // Below: what bench starts itself as.
        "lb-inside" => {
            sandbox::furnish()?;
            lb::run(&lb::Options::parse(rest)?)
        }
        "lb-backend" => lb::backend::main(rest).map(|()| ExitCode::SUCCESS),
        "lb-client" => lb::client::main(rest).map(|()| ExitCode::SUCCESS),
        "lb-peer-tokio" => lb::peer_tokio::main(rest).map(|()| ExitCode::SUCCESS),
        "dns-inside" => {
            sandbox::furnish()?;
            dns::run(&dns::Options::parse(rest)?)
        }
        "dns-upstream" => dns::upstream::main(rest).map(|()| ExitCode::SUCCESS),
        "dns-client" => dns::client::main(rest).map(|()| ExitCode::SUCCESS),
        _ => bail!("\"{command}\" is no benchmark\n\n{USAGE}"),
    }
}
