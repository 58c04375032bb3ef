//! The whole appliance in network namespaces: the [`Lab`], what runs in it, and what looks at it.
//!
//! ```text
//!            hub (a bridge in a namespace of its own; the nft rules of faults live here)
//!      ┌───────┬────┴──┬───────┐
//!    client   edge    cp1     cp2      nodes: one namespace, one eth0, fd00::N/64 and 10.0.0.N/24
//!     load    edged   etcd    etcd     processes and threads in it
//! ```
//! - [`lab`]: namespaces, links, addresses; all of it gone when the [`Lab`] is dropped. [`world`]: the usual nodes.
//! - [`process`]: processes in a namespace, with their logs.
//! - [`edge`]: `edged` and `edgectl` as a user has them.
//! - [`backend`]: servers that follow a script; [`load`]: clients that count what happens to them.
//! - [`capture`]: what was really on the wire; [`fault`]: black holes and loss.
//! - [`dns`]: dig, nsupdate, unbound, named, and queries at a rate.
//! - [`nameserver`]: a name server that follows a script, and a client that looks at its answers.
//! - [`ingress`]: nginx and HAProxy, which want a PROXY header.
//! - [`stall`]: what the machine itself adds to a time.
//! - [`tls`], [`http`], [`etcd`], [`kube`]: certificates, a small HTTP client, and the worlds that the demo runs.
//!
//! Nothing here waits for a time: [`wait_until`] waits for a condition, and says which one it waited for in vain.

pub mod backend;
pub mod capture;
pub mod dns;
pub mod edge;
pub mod etcd;
pub mod fault;
pub mod http;
pub mod ingress;
pub mod kube;
pub mod lab;
pub mod load;
pub mod nameserver;
pub mod netns;
pub mod packets;
pub mod ping;
pub mod process;
pub mod stall;
pub mod systemd_node;
pub mod tls;
pub mod world;

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

pub use edge::Edge;
pub use lab::{Lab, Node};
pub use process::Process;
pub use world::World;

/// Waits until `condition` holds, and says how long that took.
///
/// # Errors
///
/// If it does not hold within `within`; the message names `what` was waited for.
pub fn wait_until(what: &str, within: Duration, mut condition: impl FnMut() -> bool) -> Result<Duration> {
    let begin = Instant::now();
    wait_for(what, within, || condition().then_some(()))?;
    Ok(begin.elapsed())
}

/// Waits until `find` finds something, and returns it.
///
/// # Errors
///
/// If it finds nothing within `within`; the message names `what` was looked for.
pub fn wait_for<T>(what: &str, within: Duration, mut find: impl FnMut() -> Option<T>) -> Result<T> {
    let begin = Instant::now();
    loop {
        // Asked before the look: after a machine that stood still there is always one more.
        let last = begin.elapsed() > within;
        if let Some(found) = find() {
            return Ok(found);
        }
        if last {
            bail!("waited {:.1} s in vain: {what}", begin.elapsed().as_secs_f64());
        }
        // Short enough not to blur the times that are measured, long enough to leave the cores to those who work.
        thread::sleep(Duration::from_millis(2));
    }
}

/// Milliseconds, for messages.
pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
