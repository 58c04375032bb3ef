//! What several tests look at: a status with something of everything.

use appliance::api::Status;
use serde_json::json;

/// An appliance with one backend out, one drained, and one whose name has two addresses.
pub(crate) fn status() -> Status {
    let backend = |name: &str, address: Option<&str>, state: &str, reason: &str| {
        json!({
            "backend": name, "address": address, "state": state, "reason": reason, "since_ms": 4200, "weight": 1, "backup": false,
            "sessions": 3, "connections_total": 120, "bytes_up_total": 2048, "bytes_down_total": 1_048_576,
            "connect_failures_total": 2, "ejections": { "refused": 1, "unreachable": 0, "timeout": 0, "check": 0 },
            "vetoes_total": 0, "sessions_reset_total": 5,
            "connect_latency": { "buckets": [1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], "sum_us": 2_501_500 },
        })
    };
    // The others are as an edged wrote them that knew nothing of this.
    let mut back = backend("[fd00::11]:6443", Some("[fd00::11]:6443"), "healthy", "");
    for (key, value) in [
        ("slow_start_remaining", 12),
        ("hedges_total", 7),
        ("slow_total", 1),
        ("shed_total", 2),
    ] {
        back[key] = json!(value);
    }
    let mut spare = backend("cp3.fleet:6443", Some("[fd00::13]:6443"), "drained", "drained by root");
    spare["backup"] = json!(true);
    spare["weight"] = json!(5);
    let mut spare_too = spare.clone();
    spare_too["address"] = json!("[fd00::14]:6443");
    let value = json!({
        "version": "0.1.0", "pid": 812, "uptime_seconds": 11_520,
        "config": { "revision": 7, "reverts_in_seconds": null, "file": "/etc/edged/edged.toml", "file_differs": true, "last_error": null },
        "workers": [
            { "role": "lb", "pid": 813, "state": "running", "uptime_seconds": 11_519, "restarts": 0, "last_end": null },
            { "role": "web", "pid": null, "state": "waiting", "uptime_seconds": 0, "restarts": 3, "last_end": "killed by signal 9" },
        ],
        "lb": {
            "healthz_ok": true, "threads": 2,
            "frontends": [{
                "name": "api", "kind": "api", "balance": "least-connections", "listen": ["[::1]:16443", "127.0.0.1:16443"],
                "sessions": 6, "connections_total": 240, "failed_total": 1, "retries_total": 4, "local_errors_total": 0,
                "refused": { "rate": 30, "denied": 3 },
                "backends": [
                    back,
                    backend("[fd00::12]:6443", Some("[fd00::12]:6443"), "banned", "connection refused (2 of 2 within 10 s)"),
                    spare, spare_too,
                    backend("cp4.fleet:6443", None, "unresolved", "no such name"),
                ],
            }],
        },
        "dns": {
            "listen": ["[fd0d::1]:53", "[::1]:1"], "prefixes": ["64:ff9b::/96"],
            "udp": { "received": 1100, "hits": 900, "misses": 100, "rejected": 5, "slipped": 4, "limited": 3, "denied": 60,
                "ignored": 20, "dropped": 8, "refreshed": 7, "unsent": 1 },
            "tcp": { "open": 2, "accepted": 31, "turned_away": 6, "received": 40, "denied": 9 },
            "cache": { "entries": 812, "octets": 1_048_576, "limit": 33_554_432, "inserted": 1000, "evicted": 10, "stale": 11 },
            "resolved": [["synthesised", 70], ["zone", 12]],
            "updates": [["done", 14], ["refused", 2]],
            "upstreams": [
                {
                    "domain": "", "outstanding": 3, "asked": 120, "joined": 13, "busy": 1, "failed": 2,
                    "servers": [
                        { "url": "udp://192.0.2.53", "state": "up", "latency_ms": 12.5, "connections": 0, "last_error": null,
                            "counts": [["queries", 110], ["good", 100], ["silent", 0], ["floods", 2]],
                            "mismatches": [["id", 400], ["question", 1]] },
                        { "url": "tls://192.0.2.54#dns.example.org", "state": "down", "latency_ms": null, "connections": 1,
                            "last_error": "connection refused", "counts": [["queries", 10], ["good", 0], ["silent", 9]],
                            "mismatches": [] },
                    ],
                },
                { "domain": "cluster.local.", "servers": [
                    { "url": "udp://[fd00:10:96::a]", "state": "up", "latency_ms": 0.25 },
                ] },
            ],
            "zones": [{
                "names": ["fleet.", "0.0.0.0.0.0.0.0.0.0.0.0.d.0.d.f.ip6.arpa."], "serial": 41, "nodes": 3,
                "left_out": [["n9.fleet.", "fd0e::9 lies in no prefix of the zone"]],
            }],
            "keys": 4,
        },
    });
    serde_json::from_value(value).expect("a status")
}
