//! Backends by name: resolved again as their records expire. A name that does not resolve is a backend that is down.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use hickory_resolver::{Hosts, TokioResolver, config::ResolverConfig, net::runtime::TokioRuntimeProvider};
use tokio_util::sync::CancellationToken;

use super::{clock, frontend::Frontend};
use crate::config::Address;

/// However long a record may be kept, it is looked up again after this.
const LONGEST: Duration = Duration::from_secs(300);
/// However short its life, not before this.
const SHORTEST: Duration = Duration::from_secs(2);
/// After a failure; doubled up to the next constant.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_LONGEST: Duration = Duration::from_secs(30);
/// A name that once resolved keeps its addresses through failures this long: a resolver that is away must not take
/// down servers that are not.
const STALE: Duration = Duration::from_secs(3600);

/// A resolver for what /etc/resolv.conf and /etc/hosts said.
pub(crate) fn resolver(resolv_conf: &[u8], hosts: &[u8]) -> Result<TokioResolver, String> {
    let (config, mut options) = hickory_resolver::system_conf::parse_resolv_conf(resolv_conf).unwrap_or_else(|_| {
        (
            ResolverConfig::default(),
            hickory_resolver::config::ResolverOpts::default(),
        )
    });
    options.ip_strategy = hickory_resolver::config::LookupIpStrategy::Ipv4AndIpv6;
    // We decide how long to keep what; see LONGEST and STALE.
    options.cache_size = 0;
    let mut known = Hosts::default();
    known
        .read_hosts_conf(hosts)
        .map_err(|error| format!("/etc/hosts cannot be read: {error}"))?;
    let mut resolver = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
        .with_options(options)
        .build()
        .map_err(|error| error.to_string())?;
    resolver.set_hosts(Arc::new(known));
    Ok(resolver)
}

/// Keeps the addresses of one named backend up to date until `stop`.
pub(crate) async fn run(frontend: Arc<Frontend>, name: Address, resolver: Arc<TokioResolver>, stop: CancellationToken) {
    let Address::Name { host, port } = name.clone() else {
        return;
    };
    let mut retry = RETRY;
    let mut good_at = None;
    loop {
        let looked = tokio::select! {
            () = stop.cancelled() => return,
            looked = resolver.lookup_ip(format!("{host}.")) => looked,
        };
        let wait = match looked {
            Ok(found) => {
                let mut addresses: Vec<SocketAddr> = found.iter().map(|ip| SocketAddr::new(ip, port)).collect();
                addresses.sort();
                addresses.dedup();
                good_at = (!addresses.is_empty()).then(clock::now);
                frontend.resolved(&name, &addresses, clock::now());
                retry = RETRY;
                let life = found.valid_until().saturating_duration_since(std::time::Instant::now());
                life.clamp(SHORTEST, LONGEST)
            }
            Err(error) => {
                // "There is no such name" is an answer; anything else is silence, and silence keeps what was known.
                let denied = error.is_no_records_found();
                let stale = good_at.is_some_and(|at| clock::now() - at < STALE);
                tracing::debug!(frontend = frontend.name, backend = %name, %error, "the name does not resolve");
                if denied || !stale {
                    frontend.resolved(&name, &[], clock::now());
                }
                let wait = retry;
                retry = (retry * 2).min(RETRY_LONGEST);
                wait
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}
