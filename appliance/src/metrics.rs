//! The appliance's state in the Prometheus text format.

use std::{collections::BTreeMap, fmt::Write};

use dns64::{
    nat64::status::{Side, Status as Nat64},
    status::{Cache, Group, Server, Status as Dns, Tcp, Udp, ZoneStatus},
};
use lb::status::{Ejections, FrontendStatus, Histogram, State};

use crate::{api::Status, cli::dns::domain};

/// What `GET /metrics` says it answers.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// `status` in the Prometheus text format 0.0.4.
///
/// Label values are what the configuration names, never what a client sends, so their number is bounded by it. A
/// backend whose name resolves to several addresses is one series in everything but its state and sessions.
pub fn render(status: &Status) -> String {
    let mut page = Page(String::with_capacity(16 * 1024));
    page.family(
        "edge_build_info",
        "gauge",
        "Constant 1, labelled with the version of edged.",
    );
    page.sample("edge_build_info", &[("version", &status.version)], 1_u64);
    page.family("edge_uptime_seconds", "gauge", "Seconds since edged started.");
    page.sample("edge_uptime_seconds", &[], status.uptime_seconds);
    page.family(
        "edge_config_revision",
        "gauge",
        "Revision of the configuration in effect.",
    );
    page.sample("edge_config_revision", &[], status.config.revision);
    page.family(
        "edge_config_last_reload_success",
        "gauge",
        "1 if the last attempt to load a configuration succeeded, else 0.",
    );
    page.sample(
        "edge_config_last_reload_success",
        &[],
        u64::from(status.config.last_error.is_none()),
    );
    page.family("edge_worker_up", "gauge", "1 while the worker process runs, else 0.");
    for worker in &status.workers {
        page.sample(
            "edge_worker_up",
            &[("role", &worker.role)],
            u64::from(worker.state == "running"),
        );
    }
    page.family(
        "edge_worker_restarts_total",
        "counter",
        "Times the worker was started again after it ended.",
    );
    for worker in &status.workers {
        page.sample("edge_worker_restarts_total", &[("role", &worker.role)], worker.restarts);
    }
    if let Some(lb) = &status.lb {
        page.balancer(&lb.frontends);
    }
    if let Some(dns) = &status.dns {
        page.resolver(dns);
    }
    if let Some(nat64) = &status.nat64 {
        page.translator(nat64);
    }
    page.0
}

/// The counters of one backend, its addresses added up.
#[derive(Default)]
struct Sums {
    connections: u64,
    up: u64,
    down: u64,
    failures: u64,
    ejections: Ejections,
    vetoes: u64,
    hedges: u64,
    slow: u64,
    shed: u64,
    resets: u64,
    latency: Histogram,
}

/// Name, help text, and where the value comes from.
type Counter<T> = (&'static str, &'static str, fn(&T) -> u64);

struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.0.push_str(name);
        for (index, (label, text)) in labels.iter().enumerate() {
            let before = if index == 0 { '{' } else { ',' };
            let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.0, "{before}{label}=\"{text}\"");
        }
        let after = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.0, "{after} {value}");
    }

    fn balancer(&mut self, frontends: &[FrontendStatus]) {
        self.states(frontends);
        self.per_frontend(frontends);
        let mut sums: BTreeMap<(&str, &str), Sums> = BTreeMap::new();
        for (frontend, backend) in frontends.iter().flat_map(|f| f.backends.iter().map(move |b| (f, b))) {
            let sum = sums.entry((&frontend.name, &backend.backend)).or_default();
            sum.connections += backend.connections_total;
            sum.up += backend.bytes_up_total;
            sum.down += backend.bytes_down_total;
            sum.failures += backend.connect_failures_total;
            sum.ejections.refused += backend.ejections.refused;
            sum.ejections.unreachable += backend.ejections.unreachable;
            sum.ejections.timeout += backend.ejections.timeout;
            sum.ejections.check += backend.ejections.check;
            sum.vetoes += backend.vetoes_total;
            sum.hedges += backend.hedges_total;
            sum.slow += backend.slow_total;
            sum.shed += backend.shed_total;
            sum.resets += backend.sessions_reset_total;
            for (total, bucket) in sum.latency.buckets.iter_mut().zip(backend.connect_latency.buckets) {
                *total += bucket;
            }
            sum.latency.sum_us += backend.connect_latency.sum_us;
        }
        self.per_backend(&sums);
    }

    fn states(&mut self, frontends: &[FrontendStatus]) {
        self.family(
            "edge_lb_backend_state",
            "gauge",
            "1 for the state the backend is in, 0 for the others.",
        );
        for (frontend, backend) in frontends.iter().flat_map(|f| f.backends.iter().map(move |b| (f, b))) {
            let address = backend.address.map(|address| address.to_string()).unwrap_or_default();
            let role = if backend.backup { "backup" } else { "active" };
            for state in State::ALL {
                let labels = [
                    ("frontend", &*frontend.name),
                    ("backend", &backend.backend),
                    ("addr", &address),
                    ("role", role),
                    ("state", state.name()),
                ];
                self.sample("edge_lb_backend_state", &labels, u64::from(backend.state == state));
            }
        }
        self.family(
            "edge_lb_backend_sessions",
            "gauge",
            "Sessions running on the backend, connects in flight included.",
        );
        for (frontend, backend) in frontends.iter().flat_map(|f| f.backends.iter().map(move |b| (f, b))) {
            let address = backend.address.map(|address| address.to_string()).unwrap_or_default();
            self.sample(
                "edge_lb_backend_sessions",
                &[
                    ("frontend", &frontend.name),
                    ("backend", &backend.backend),
                    ("addr", &address),
                ],
                backend.sessions,
            );
        }
        self.family(
            "edge_lb_backend_slow_start_seconds",
            "gauge",
            "Seconds until the backend gets its full share of the connections; 0 = it does.",
        );
        for (frontend, backend) in frontends.iter().flat_map(|f| f.backends.iter().map(move |b| (f, b))) {
            let address = backend.address.map(|address| address.to_string()).unwrap_or_default();
            self.sample(
                "edge_lb_backend_slow_start_seconds",
                &[
                    ("frontend", &frontend.name),
                    ("backend", &backend.backend),
                    ("addr", &address),
                ],
                backend.slow_start_remaining.unwrap_or(0),
            );
        }
    }

    fn per_frontend(&mut self, frontends: &[FrontendStatus]) {
        self.family(
            "edge_lb_frontend_connections_total",
            "counter",
            "Connections accepted by the frontend.",
        );
        for frontend in frontends {
            let mode = match frontend.kind {
                lb::config::Kind::Api => "api",
                lb::config::Kind::Ingress => "ingress",
                lb::config::Kind::Tcp => "tcp",
            };
            self.sample(
                "edge_lb_frontend_connections_total",
                &[("frontend", &frontend.name), ("mode", mode)],
                frontend.connections_total,
            );
        }
        let counters: [Counter<FrontendStatus>; 3] = [
            (
                "edge_lb_retries_total",
                "Times a connection went on to another backend.",
                |f| f.retries_total,
            ),
            (
                "edge_lb_failed_total",
                "Connections for which no backend answered.",
                |f| f.failed_total,
            ),
            (
                "edge_lb_local_errors_total",
                "Failures of this machine's own, which no backend is blamed for.",
                |f| f.local_errors_total,
            ),
        ];
        for (name, help, value) in counters {
            self.family(name, "counter", help);
            for frontend in frontends {
                self.sample(name, &[("frontend", &frontend.name)], value(frontend));
            }
        }
        self.family(
            "edge_lb_refused_total",
            "counter",
            "Connections refused before a backend was asked for, by reason.",
        );
        for frontend in frontends {
            for (reason, count) in frontend.refused.by_reason() {
                let labels = [("frontend", &*frontend.name), ("reason", reason)];
                self.sample("edge_lb_refused_total", &labels, count);
            }
        }
    }

    fn per_backend(&mut self, sums: &BTreeMap<(&str, &str), Sums>) {
        let counters: [Counter<Sums>; 7] = [
            ("edge_lb_connections_total", "Sessions opened to the backend.", |s| {
                s.connections
            }),
            (
                "edge_lb_connect_failures_total",
                "Failed connects to the backend.",
                |s| s.failures,
            ),
            (
                "edge_lb_vetoes_total",
                "Bans and check verdicts that a proof of life prevented.",
                |s| s.vetoes,
            ),
            (
                "edge_lb_hedges_total",
                "Connects to the backend begun because another one was slow to accept.",
                |s| s.hedges,
            ),
            (
                "edge_lb_slow_total",
                "Connects to the backend that another one overtook.",
                |s| s.slow,
            ),
            (
                "edge_lb_shed_total",
                "Sessions closed so that their clients go to a backend with fewer.",
                |s| s.shed,
            ),
            (
                "edge_lb_sessions_reset_total",
                "Sessions that were reset because the backend went down.",
                |s| s.resets,
            ),
        ];
        for (name, help, value) in counters {
            self.family(name, "counter", help);
            for ((frontend, backend), sum) in sums {
                self.sample(name, &[("frontend", frontend), ("backend", backend)], value(sum));
            }
        }
        self.family(
            "edge_lb_bytes_total",
            "counter",
            "Bytes passed on: up = to the backend, down = to the client.",
        );
        for ((frontend, backend), sum) in sums {
            for (dir, bytes) in [("up", sum.up), ("down", sum.down)] {
                self.sample(
                    "edge_lb_bytes_total",
                    &[("frontend", frontend), ("backend", backend), ("dir", dir)],
                    bytes,
                );
            }
        }
        self.family(
            "edge_lb_ejections_total",
            "counter",
            "Times the backend was taken out, by the reason of the verdict.",
        );
        for ((frontend, backend), sum) in sums {
            let Ejections {
                refused,
                unreachable,
                timeout,
                check,
            } = sum.ejections;
            for (reason, count) in [
                ("refused", refused),
                ("unreachable", unreachable),
                ("timeout", timeout),
                ("check", check),
            ] {
                self.sample(
                    "edge_lb_ejections_total",
                    &[("frontend", frontend), ("backend", backend), ("reason", reason)],
                    count,
                );
            }
        }
        self.family(
            "edge_lb_connect_duration_seconds",
            "histogram",
            "Time a connect to the backend took.",
        );
        for ((frontend, backend), sum) in sums {
            let labels = [("frontend", *frontend), ("backend", *backend)];
            let mut below = 0;
            let bounds = Histogram::BOUNDS_MS
                .iter()
                .map(|ms| (ms / 1e3).to_string())
                .chain(["+Inf".to_owned()]);
            for (bound, count) in bounds.zip(sum.latency.buckets) {
                below += count;
                self.sample(
                    "edge_lb_connect_duration_seconds_bucket",
                    &[labels[0], labels[1], ("le", &bound)],
                    below,
                );
            }
            #[allow(
                clippy::cast_precision_loss,
                reason = "a sum above 2^53 microseconds is 285 years of connecting"
            )]
            let seconds = sum.latency.sum_us as f64 / 1e6;
            self.sample("edge_lb_connect_duration_seconds_sum", &labels, seconds);
            self.sample("edge_lb_connect_duration_seconds_count", &labels, below);
        }
    }

    fn resolver(&mut self, dns: &Dns) {
        self.messages(&dns.udp, &dns.tcp);
        self.cache(&dns.cache);
        self.by_name(
            "edge_dns_resolved_total",
            "Questions that were not known, by what became of them.",
            "result",
            &dns.resolved,
        );
        self.by_name(
            "edge_dns_updates_total",
            "Dynamic updates, by what became of them.",
            "result",
            &dns.updates,
        );
        self.per_domain(&dns.upstreams);
        self.per_upstream(&dns.upstreams);
        self.per_zone(&dns.zones);
        self.family("edge_dns_keys", "gauge", "Keys of nodes.");
        self.sample("edge_dns_keys", &[], dns.keys);
    }

    fn translator(&mut self, nat64: &Nat64) {
        self.family(
            "edge_nat64_offload",
            "gauge",
            "1 if the TUN device leaves this to whoever sends the packet on, else 0.",
        );
        for (name, is) in nat64.offloads.by_name() {
            self.sample("edge_nat64_offload", &[("offload", name)], u64::from(is));
        }
        let gauges = [
            ("edge_nat64_queues", "Queues of the TUN device.", nat64.queues),
            ("edge_nat64_maps", "Explicit maps.", nat64.maps),
        ];
        for (name, help, value) in gauges {
            self.family(name, "gauge", help);
            self.sample(name, &[], value);
        }
        if let Some(state) = &nat64.state {
            for (name, kind, help, value) in [
                (
                    "edge_nat64_sessions",
                    "gauge",
                    "Sessions that there are.",
                    state.sessions,
                ),
                (
                    "edge_nat64_bindings",
                    "gauge",
                    "Bindings that there are.",
                    state.bindings,
                ),
                (
                    "edge_nat64_hosts",
                    "gauge",
                    "Hosts that have ports, or had until a short while ago.",
                    state.hosts,
                ),
                (
                    "edge_nat64_sessions_made_total",
                    "counter",
                    "Sessions made since the worker's start.",
                    state.sessions_made,
                ),
                (
                    "edge_nat64_bindings_made_total",
                    "counter",
                    "Bindings made since the worker's start.",
                    state.bindings_made,
                ),
            ] {
                self.family(name, kind, help);
                self.sample(name, &[], value);
            }
            for (name, help) in [
                ("edge_nat64_pool_ports", "Ports of the pool."),
                (
                    "edge_nat64_pool_free_ports",
                    "Ports of the pool in blocks that no host has.",
                ),
            ] {
                self.family(name, "gauge", help);
                for ports in &nat64.pool {
                    let address = ports.address.to_string();
                    let labels = [("address", address.as_str()), ("protocol", ports.protocol.as_str())];
                    let free = name == "edge_nat64_pool_free_ports";
                    self.sample(name, &labels, if free { ports.free } else { ports.all });
                }
            }
        }
        let counters: [Counter<Side>; 6] = [
            (
                "edge_nat64_received_packets_total",
                "Packets that came; a super-packet counts as one.",
                |s| s.received,
            ),
            ("edge_nat64_received_bytes_total", "Bytes of packets that came.", |s| {
                s.received_octets
            }),
            (
                "edge_nat64_sent_packets_total",
                "Packets that were sent, ICMP errors included.",
                |s| s.sent,
            ),
            ("edge_nat64_sent_bytes_total", "Bytes of packets that were sent.", |s| {
                s.sent_octets
            }),
            (
                "edge_nat64_errors_total",
                "ICMP errors that the translator sent itself.",
                |s| s.errors,
            ),
            (
                "edge_nat64_errors_limited_total",
                "ICMP errors that were not sent, for there were too many.",
                |s| s.errors_limited,
            ),
        ];
        for (name, help, value) in counters {
            self.family(name, "counter", help);
            for (family, side) in [("ipv4", &nat64.ipv4), ("ipv6", &nat64.ipv6)] {
                self.sample(name, &[("family", family)], value(side));
            }
        }
        let counters = [
            (
                "edge_nat64_super_packets_total",
                "Packets that came and stood for several segments.",
                nat64.super_packets,
            ),
            (
                "edge_nat64_unsent_total",
                "Packets that the TUN device did not take.",
                nat64.unsent,
            ),
        ];
        for (name, help, value) in counters {
            self.family(name, "counter", help);
            self.sample(name, &[], value);
        }
        self.family(
            "edge_nat64_dropped_total",
            "counter",
            "Packets that did not go on, by reason.",
        );
        for (reason, count) in &nat64.dropped {
            self.sample("edge_nat64_dropped_total", &[("reason", reason)], count);
        }
    }

    fn messages(&mut self, udp: &Udp, tcp: &Tcp) {
        self.family("edge_dns_received_total", "counter", "Messages that came.");
        for (transport, count) in [("udp", udp.received), ("tcp", tcp.received)] {
            self.sample("edge_dns_received_total", &[("transport", transport)], count);
        }
        self.family(
            "edge_dns_denied_total",
            "counter",
            "Messages from who may not ask: silence by UDP, REFUSED by TCP.",
        );
        for (transport, count) in [("udp", udp.denied), ("tcp", tcp.denied)] {
            self.sample("edge_dns_denied_total", &[("transport", transport)], count);
        }
        let counters: [Counter<Udp>; 9] = [
            (
                "edge_dns_udp_hits_total",
                "Datagrams answered with what was known.",
                |u| u.hits,
            ),
            (
                "edge_dns_udp_misses_total",
                "Datagrams that were looked further into.",
                |u| u.misses,
            ),
            (
                "edge_dns_udp_rejected_total",
                "Datagrams answered with a code alone.",
                |u| u.rejected,
            ),
            (
                "edge_dns_udp_slipped_total",
                "Answers above the rate limit that said to come again by TCP or with a cookie.",
                |u| u.slipped,
            ),
            (
                "edge_dns_udp_limited_total",
                "Answers above the rate limit that were not given.",
                |u| u.limited,
            ),
            ("edge_dns_udp_ignored_total", "Datagrams that were no queries.", |u| {
                u.ignored
            }),
            (
                "edge_dns_udp_dropped_total",
                "Datagrams that found the queue of questions full.",
                |u| u.dropped,
            ),
            (
                "edge_dns_udp_refreshed_total",
                "Answers in use that were renewed before they ran out.",
                |u| u.refreshed,
            ),
            (
                "edge_dns_udp_unsent_total",
                "Answers that the kernel did not take.",
                |u| u.unsent,
            ),
        ];
        for (name, help, value) in counters {
            self.family(name, "counter", help);
            self.sample(name, &[], value(udp));
        }
        self.family("edge_dns_tcp_connections", "gauge", "Connections that are open.");
        self.sample("edge_dns_tcp_connections", &[], tcp.open);
        self.family(
            "edge_dns_tcp_accepted_total",
            "counter",
            "Connections that were accepted.",
        );
        self.sample("edge_dns_tcp_accepted_total", &[], tcp.accepted);
        self.family(
            "edge_dns_tcp_turned_away_total",
            "counter",
            "Connections closed at once: too many, or too many of one source.",
        );
        self.sample("edge_dns_tcp_turned_away_total", &[], tcp.turned_away);
    }

    fn cache(&mut self, cache: &Cache) {
        let families: [(&str, &str, &str, u64); 6] = [
            (
                "edge_dns_cache_entries",
                "gauge",
                "Answers that are known.",
                cache.entries,
            ),
            ("edge_dns_cache_bytes", "gauge", "Memory that they take.", cache.octets),
            (
                "edge_dns_cache_limit_bytes",
                "gauge",
                "Memory that they may take.",
                cache.limit,
            ),
            (
                "edge_dns_cache_inserted_total",
                "counter",
                "Answers that came to be known.",
                cache.inserted,
            ),
            (
                "edge_dns_cache_evicted_total",
                "counter",
                "Answers that were forgotten for want of room while they were good.",
                cache.evicted,
            ),
            (
                "edge_dns_stale_total",
                "counter",
                "Questions answered with what had run out, because no upstream answered.",
                cache.stale,
            ),
        ];
        for (name, kind, help, value) in families {
            self.family(name, kind, help);
            self.sample(name, &[], value);
        }
    }

    /// One series for each of `counts`, whose names are a fixed set.
    fn by_name(&mut self, name: &str, help: &str, label: &str, counts: &[(String, u64)]) {
        self.family(name, "counter", help);
        for (what, count) in counts {
            self.sample(name, &[(label, what)], count);
        }
    }

    fn per_domain(&mut self, groups: &[Group]) {
        self.family(
            "edge_dns_upstream_outstanding",
            "gauge",
            "Questions under way to the upstreams of a domain; \".\" has what no other has.",
        );
        for group in groups {
            let labels = [("domain", domain(group))];
            self.sample("edge_dns_upstream_outstanding", &labels, group.outstanding);
        }
        let counters: [Counter<Group>; 4] = [
            (
                "edge_dns_upstream_asked_total",
                "Questions to the upstreams of a domain.",
                |g| g.asked,
            ),
            (
                "edge_dns_upstream_joined_total",
                "Of these, such as joined one under way.",
                |g| g.joined,
            ),
            (
                "edge_dns_upstream_busy_total",
                "Questions turned away because too many were under way.",
                |g| g.busy,
            ),
            (
                "edge_dns_upstream_failed_total",
                "Questions without an answer for any other reason.",
                |g| g.failed,
            ),
        ];
        for (name, help, value) in counters {
            self.family(name, "counter", help);
            for group in groups {
                self.sample(name, &[("domain", domain(group))], value(group));
            }
        }
    }

    fn per_upstream(&mut self, groups: &[Group]) {
        let mut servers: BTreeMap<(&str, &str), Vec<&Server>> = BTreeMap::new();
        for (group, server) in groups.iter().flat_map(|g| g.servers.iter().map(move |s| (g, s))) {
            servers.entry((domain(group), &server.url)).or_default().push(server);
        }
        self.family(
            "edge_dns_upstream_state",
            "gauge",
            "1 for the state the upstream is in, 0 for the others.",
        );
        for ((domain, url), same) in &servers {
            for state in ["up", "suspect", "down"] {
                let labels = [("domain", *domain), ("upstream", url), ("state", state)];
                let is = same.iter().any(|server| server.state == state);
                self.sample("edge_dns_upstream_state", &labels, u64::from(is));
            }
        }
        self.family(
            "edge_dns_upstream_latency_seconds",
            "gauge",
            "Smoothed latency of the upstream; none before its first answer.",
        );
        for ((domain, url), same) in &servers {
            if let Some(ms) = same.iter().find_map(|server| server.latency_ms) {
                let labels = [("domain", *domain), ("upstream", url)];
                self.sample("edge_dns_upstream_latency_seconds", &labels, ms / 1e3);
            }
        }
        self.family(
            "edge_dns_upstream_connections",
            "gauge",
            "Open connections to the upstream.",
        );
        for ((domain, url), same) in &servers {
            let labels = [("domain", *domain), ("upstream", url)];
            let open: u64 = same.iter().map(|server| server.connections).sum();
            self.sample("edge_dns_upstream_connections", &labels, open);
        }
        type Counts = fn(&Server) -> &[(String, u64)];
        let families: [(&str, &str, &str, Counts); 2] = [
            (
                "edge_dns_upstream_events_total",
                "What happened with the upstream: queries, good replies and the others.",
                "event",
                |s| &s.counts,
            ),
            (
                "edge_dns_upstream_mismatches_total",
                "Messages from the upstream's address that were no replies, by what was wrong with them.",
                "reason",
                |s| &s.mismatches,
            ),
        ];
        for (name, help, label, counts) in families {
            self.family(name, "counter", help);
            for ((domain, url), same) in &servers {
                let mut sums: BTreeMap<&str, u64> = BTreeMap::new();
                for (what, count) in same.iter().flat_map(|server| counts(server)) {
                    *sums.entry(what).or_default() += count;
                }
                for (what, count) in sums {
                    self.sample(name, &[("domain", domain), ("upstream", url), (label, what)], count);
                }
            }
        }
    }

    fn per_zone(&mut self, zones: &[ZoneStatus]) {
        let gauges: [Counter<ZoneStatus>; 3] = [
            ("edge_dns_zone_serial", "Serial number of the zone.", |z| {
                z.serial.into()
            }),
            ("edge_dns_zone_nodes", "Nodes that are registered in the zone.", |z| {
                z.nodes
            }),
            (
                "edge_dns_zone_nodes_left_out",
                "Nodes whose records the configuration does not permit any more.",
                |z| z.left_out.len() as u64,
            ),
        ];
        for (name, help, value) in gauges {
            self.family(name, "gauge", help);
            for zone in zones {
                let zone_name = zone.names.first().map_or("", String::as_str);
                self.sample(name, &[("zone", zone_name)], value(zone));
            }
        }
    }
}
