//! What a worker finds in the state memory of its predecessor, which may have died at any moment or been another version:
//! the file is read or it is not, and a pool lives with whatever it says.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::fs::FileExt,
    time::Duration,
};

use lb::{
    moment::Moment,
    pool::{CheckOutcome, Failure, Pool, Settings, Snapshot},
};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use serde::Deserialize;

use crate::io::memory::MemoryFile;

const SIZE: usize = 4096;

/// Addresses and names, weights, a backup, active checks: what the seeds speak of.
const CONFIG: &str = r#"
[[frontend]]
name = "api"
listen = ["[::1]:6443"]
backends = [
    "192.0.2.11:6443",
    { address = "[2001:db8::12]:6443", weight = 5 },
    { address = "192.0.2.13:6443", backup = true },
    "cp.example.org:6443",
]
health.active = { kind = "https", interval = "1s" }
"#;

/// JSON of a pool, or the content of the memory.
pub fn run(bytes: &[u8]) {
    if bytes.first() == Some(&b'{') {
        if let Ok(snapshot) = serde_json::from_slice(bytes) {
            life(&snapshot);
        }
    } else {
        memory(bytes);
    }
}

fn memory(bytes: &[u8]) {
    let file = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a memfd");
    let bytes = &bytes[..bytes.len().min(SIZE)];
    ftruncate(&file, SIZE as u64).expect("its size");
    let raw = std::fs::File::from(file.try_clone().expect("a second descriptor"));
    // The seeds hold the beginnings of both slots, which lie apart in the file.
    let (one, two) = bytes.split_at(bytes.len() / 2);
    raw.write_all_at(one, 0).expect("written");
    raw.write_all_at(two, SIZE as u64 / 2).expect("written");
    let mut memory = MemoryFile::new(file).expect("a file");
    if let Some(snapshot) = memory.read() {
        assert!(snapshot.len() < SIZE / 2);
    }
    let snapshot = &one[..one.len().min(SIZE / 4)];
    memory.write(snapshot);
    assert_eq!(
        memory.read().as_deref(),
        Some(snapshot),
        "what was written is not what is read"
    );
    memory.write(b"{}");
    assert_eq!(memory.read().as_deref(), Some(b"{}".as_slice()));
}

#[derive(Deserialize)]
struct File {
    frontend: Vec<lb::config::Frontend>,
}

/// Restores, lives for an hour, writes down, and restores that.
fn life(snapshot: &Snapshot) {
    let file: File = toml::from_str(CONFIG).expect("a configuration");
    let frontend = file.frontend.first().expect("one frontend");
    let backends: Vec<_> = frontend
        .backends
        .value
        .iter()
        .map(|backend| backend.value.clone())
        .collect();
    let t0 = Moment::new(Duration::from_secs(100_000));
    let mut pool = Pool::new(Settings::of(frontend, 1), &backends, t0);
    pool.restore(snapshot, t0);
    let client = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let mut now = t0;
    for step in 0..40_u32 {
        let (pick, _) = pool.pick(client, &[], now);
        if let Some(pick) = pick {
            match step % 4 {
                0 => drop(pool.connected(pick.id, Duration::from_millis(3), now)),
                1 => drop(pool.failed(pick.id, Failure::Refused, || None, now)),
                2 => drop(pool.failed(pick.id, Failure::Timeout, || None, now)),
                _ => pool.abandoned(pick.id, now),
            }
            if step % 8 == 0 {
                pool.closed(pick.id, now);
            }
        }
        for (id, _, _) in pool.targets() {
            let outcome = if step % 3 == 0 {
                CheckOutcome::Good
            } else {
                CheckOutcome::NotReady("503".into())
            };
            pool.checked(id, outcome, || None, now);
        }
        if step == 20 {
            for name in pool.names() {
                let addresses = [SocketAddr::from(([192, 0, 2, 99], 6443))];
                pool.set_addresses(&name, &addresses, now);
            }
        }
        assert!(pool.status(now).len() >= backends.len());
        let _ = pool.healthy(now);
        now = now + Duration::from_secs(u64::from(step * step % 200));
    }
    let written = serde_json::to_string(&pool.snapshot(now)).expect("a snapshot can be written");
    let read = serde_json::from_str(&written).expect("and read");
    let mut successor = Pool::new(Settings::of(frontend, 2), &backends, now);
    successor.restore(&read, now);
}
