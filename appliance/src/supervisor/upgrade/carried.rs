//! What a supervisor leaves to the program that takes its place: descriptors, and what they are, as JSON in a sealed memfd.
//!
//! Secrets and files' contents are not in it: the next one reads them again. Times are milliseconds since boot
//! (`CLOCK_BOOTTIME`), which go on whatever runs.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{Read, Seek, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    path::PathBuf,
    time::{Duration, Instant},
};

use dns64::nat64::status::Offloads;
use ipnet::IpNet;
use rustix::{
    fs::{MemfdFlags, SealFlags},
    io::FdFlags,
};
use serde::{Deserialize, Serialize};

use crate::{api, build::Build, endpoint::Endpoint, worker::Role};

/// Of this state; another one is not understood. A field that is added without raising it has a default, and one that is
/// left out was never needed.
pub(super) const FORMAT: u32 = 1;
/// Most bytes: a thousand times a usual one.
const MOST: u64 = 16 << 20;

/// Everything that is carried over.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Carried {
    /// [`FORMAT`].
    pub(super) format: u32,
    /// The configuration file.
    pub(super) config_file: PathBuf,
    /// The state directory.
    pub(super) state_directory: PathBuf,
    /// When the daemon started.
    pub(super) started_ms: u64,
    /// Data threads of the balancer.
    pub(super) threads: u16,
    /// The lock on the state directory.
    pub(super) lock: RawFd,
    /// The control socket's listener.
    pub(super) control: RawFd,
    /// Where that is.
    pub(super) control_path: PathBuf,
    /// Whether the store could be opened.
    pub(super) store: bool,
    /// The balancer's state memory.
    pub(super) memory: Option<RawFd>,
    /// Every bound socket.
    pub(super) listeners: Vec<(Endpoint, Vec<RawFd>)>,
    /// Every TUN device.
    #[serde(default)]
    pub(super) tuns: Vec<Tun>,
    /// Every worker that runs.
    pub(super) workers: Vec<Worker>,
    /// The configuration in effect.
    pub(super) config: Config,
    /// The upgrade that this is.
    pub(super) upgrade: api::Upgrade,
    /// When it began.
    pub(super) began_ms: u64,
}

/// A TUN device.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Tun {
    pub(super) name: String,
    pub(super) queues: Vec<RawFd>,
    pub(super) offloads: Offloads,
    pub(super) routes: BTreeSet<IpNet>,
    pub(super) memory: RawFd,
}

/// A worker that runs.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Worker {
    pub(super) role: Role,
    pub(super) pid: u32,
    pub(super) channel: RawFd,
    pub(super) build: Build,
    pub(super) pings: u64,
    pub(super) next: u64,
    pub(super) since_ms: u64,
    pub(super) restarts: u64,
    pub(super) last_end: Option<String>,
    /// Answers to what it wanted to be durable, by number.
    #[serde(default)]
    pub(super) owed: Vec<(u64, Result<(), String>)>,
}

/// The configuration in effect, and the one to go back to.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Config {
    pub(super) text: String,
    pub(super) origin: String,
    pub(super) revision: u64,
    pub(super) confirmed: String,
    pub(super) reverts_ms: Option<u64>,
    pub(super) generation: u64,
    pub(super) last_error: Option<String>,
}

#[derive(Deserialize)]
struct Head {
    format: u32,
}

impl Carried {
    /// Writes it down, for good.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub(super) fn write(&self) -> std::io::Result<OwnedFd> {
        memory("edged-state", &serde_json::to_vec(self)?)
    }

    /// Reads what [`Carried::write`] wrote, in this process or in the one that ran before in its place.
    ///
    /// # Errors
    ///
    /// What is wrong with it, for people.
    pub(super) fn read(state: BorrowedFd<'_>) -> Result<Self, String> {
        let json = contents(state, MOST)?;
        let head: Head = serde_json::from_slice(&json).map_err(|error| format!("the state makes no sense: {error}"))?;
        if head.format != FORMAT {
            return Err(format!(
                "the state has format {}, this program reads {FORMAT}",
                head.format
            ));
        }
        let carried: Self =
            serde_json::from_slice(&json).map_err(|error| format!("the state makes no sense: {error}"))?;
        let mut seen = BTreeSet::new();
        for raw in carried.descriptors() {
            if !is_open(raw) || !seen.insert(raw) {
                return Err(format!("the state names the descriptor {raw}, which was not passed"));
            }
        }
        Ok(carried)
    }

    /// Every descriptor it names.
    pub(super) fn descriptors(&self) -> Vec<RawFd> {
        let listeners = self.listeners.iter().flat_map(|(_, copies)| copies.iter().copied());
        let queues = self
            .tuns
            .iter()
            .flat_map(|tun| tun.queues.iter().copied().chain([tun.memory]));
        let workers = self.workers.iter().map(|worker| worker.channel);
        [self.lock, self.control]
            .into_iter()
            .chain(self.memory)
            .chain(listeners)
            .chain(queues)
            .chain(workers)
            .collect()
    }

    /// A descriptor of its own for what `raw`, one of [`Carried::descriptors`], refers to: the one that was passed stays
    /// open, so that the way back stays open too.
    ///
    /// # Errors
    ///
    /// The limit of open files is reached.
    pub(super) fn copy(&self, raw: RawFd) -> Result<OwnedFd, String> {
        // SAFETY: `read` has found it open, and nobody closes it before `close`.
        let passed = unsafe { BorrowedFd::borrow_raw(raw) };
        let copy = passed.try_clone_to_owned();
        copy.map_err(|error| format!("the descriptor {raw} cannot be taken over: {error}"))
    }

    /// Closes what was passed: there is no way back any more.
    pub(super) fn close(self) {
        for raw in self.descriptors() {
            // SAFETY: it was passed to this process, everything here works on copies, and `self` ends with it.
            drop(unsafe { OwnedFd::from_raw_fd(raw) });
        }
    }
}

/// Memory that holds `bytes` and never anything else.
pub(super) fn memory(name: &str, bytes: &[u8]) -> std::io::Result<OwnedFd> {
    let memory = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(memory);
    file.write_all(bytes)?;
    rustix::fs::fcntl_add_seals(&file, seals())?;
    Ok(file.into())
}

/// What [`memory`] was made of.
pub(super) fn contents(memory: BorrowedFd<'_>, most: u64) -> Result<Vec<u8>, String> {
    if rustix::fs::fcntl_get_seals(memory) != Ok(seals()) {
        return Err("no state was passed; only edged itself starts edged so".into());
    }
    let read = || {
        let mut file = File::from(memory.try_clone_to_owned()?);
        file.rewind()?;
        let mut bytes = Vec::new();
        file.take(most).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().map_err(|error: std::io::Error| format!("the state cannot be read: {error}"))
}

fn seals() -> SealFlags {
    SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL
}

/// Whether `raw` is open and none of the standard three.
pub(super) fn is_open(raw: RawFd) -> bool {
    // SAFETY: only looked at; to fcntl(2) a number that is not open is an error and nothing worse.
    raw > 2 && rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(raw) }).is_ok()
}

/// Whether `descriptor` outlives an execve.
pub(super) fn keep(descriptor: BorrowedFd<'_>, keep: bool) -> std::io::Result<()> {
    let flags = if keep { FdFlags::empty() } else { FdFlags::CLOEXEC };
    Ok(rustix::io::fcntl_setfd(descriptor, flags)?)
}

/// Milliseconds since boot.
pub(super) fn now_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000
}

/// A moment of this process's clock, past or to come, as milliseconds since boot.
pub(super) fn ms_of(at: Instant) -> u64 {
    let (now, now_ms) = (Instant::now(), now_ms());
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    match at.checked_duration_since(now) {
        Some(ahead) => now_ms.saturating_add(ms(ahead)),
        None => now_ms.saturating_sub(ms(now.saturating_duration_since(at))),
    }
}

/// As a moment of this process's clock.
pub(super) fn instant_of(ms: u64) -> Instant {
    let (now, now_ms) = (Instant::now(), now_ms());
    let shifted = match ms.checked_sub(now_ms) {
        Some(ahead) => now.checked_add(Duration::from_millis(ahead)),
        None => now.checked_sub(Duration::from_millis(now_ms - ms)),
    };
    shifted.unwrap_or(now)
}

/// The number of a descriptor that is to be named in a state.
pub(super) fn raw(descriptor: &impl AsFd) -> RawFd {
    descriptor.as_fd().as_raw_fd()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn null() -> OwnedFd {
        File::open("/dev/null").expect("/dev/null").into()
    }

    fn carried(descriptors: &[OwnedFd]) -> Carried {
        let number = |index: usize| descriptors[index].as_raw_fd();
        Carried {
            format: FORMAT,
            config_file: "/etc/edged/edged.toml".into(),
            state_directory: "/var/lib/edged".into(),
            started_ms: 1,
            threads: 2,
            lock: number(0),
            control: number(1),
            control_path: "/run/edged/edged.sock".into(),
            store: true,
            memory: Some(number(2)),
            listeners: vec![("[::1]:6443".parse().expect("an address"), vec![number(3), number(4)])],
            tuns: vec![Tun {
                name: "nat64".into(),
                queues: vec![number(5)],
                offloads: Offloads::default(),
                routes: ["64:ff9b::/96".parse().expect("a network")].into(),
                memory: number(6),
            }],
            workers: vec![Worker {
                role: Role::Lb,
                pid: 813,
                channel: number(7),
                build: Build::default(),
                pings: 7,
                next: 8,
                since_ms: 9,
                restarts: 1,
                last_end: Some("killed by signal 9".into()),
                owed: vec![(3, Ok(()))],
            }],
            config: Config {
                text: "version = 1\n".into(),
                origin: "/etc/edged/edged.toml".into(),
                revision: 7,
                confirmed: "version = 1\n".into(),
                reverts_ms: Some(10),
                generation: 3,
                last_error: None,
            },
            upgrade: api::Upgrade {
                number: 1,
                state: api::UpgradeState::Running,
                at: "2026-01-01T00:00:00Z".into(),
                author: "root".into(),
                binary: "/usr/bin/edged".into(),
                from: Build::default(),
                to: Build::default(),
                step: "taking over".into(),
                message: None,
                took_ms: 0,
            },
            began_ms: 5,
        }
    }

    #[test]
    fn what_is_written_is_read_again_with_every_descriptor() {
        let descriptors: Vec<_> = (0..8).map(|_| null()).collect();
        let state = carried(&descriptors).write().expect("written");
        let read = Carried::read(state.as_fd()).expect("read");
        let numbers: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        assert_eq!(read.descriptors(), numbers);
        assert_eq!(
            serde_json::to_value(&read).expect("json"),
            serde_json::to_value(carried(&descriptors)).expect("json")
        );
        let copy = read.copy(read.lock).expect("copied");
        assert_ne!(copy.as_raw_fd(), read.lock);
        // Twice, because the way back reads it again.
        Carried::read(state.as_fd()).expect("read");
    }

    #[test]
    fn a_state_that_is_not_ours_is_refused_and_never_a_panic() {
        let descriptors: Vec<_> = (0..8).map(|_| null()).collect();
        assert!(
            Carried::read(null().as_fd())
                .expect_err("no memory")
                .contains("no state was passed")
        );
        let json = serde_json::to_vec(&carried(&descriptors)).expect("json");
        for length in 0..json.len() {
            let state = memory("test", &json[..length]).expect("memory");
            assert!(Carried::read(state.as_fd()).is_err(), "{length}");
        }
        let mut later = carried(&descriptors);
        later.format = FORMAT + 1;
        let why = Carried::read(later.write().expect("written").as_fd()).expect_err("a later one");
        assert!(why.contains("format"), "{why}");
        // Descriptors that are not open, twice the same, or standard output.
        let wrong: [fn(&mut Carried); 3] = [
            |carried| carried.lock = 1,
            |carried| carried.control = carried.lock,
            |carried| carried.workers[0].channel = i32::MAX,
        ];
        for change in wrong {
            let mut carried = carried(&descriptors);
            change(&mut carried);
            let why = Carried::read(carried.write().expect("written").as_fd()).expect_err("refused");
            assert!(why.contains("which was not passed"), "{why}");
        }
    }

    #[test]
    fn moments_go_on_in_another_process() {
        let now = Instant::now();
        for at in [now + Duration::from_secs(60), now] {
            let back = instant_of(ms_of(at));
            let off = back.max(at) - back.min(at);
            assert!(off < Duration::from_millis(50), "{off:?}");
        }
    }
}
