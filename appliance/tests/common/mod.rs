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
    });
    serde_json::from_value(value).expect("a status")
}
