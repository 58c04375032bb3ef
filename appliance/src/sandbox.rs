//! What a worker gives up before it reads its first byte from the network.
//!
//! | gone | by |
//! |---|---|
//! | cores, memory without end, outliving the supervisor | RLIMIT_CORE, RLIMIT_DATA, PR_SET_DUMPABLE, PR_SET_PDEATHSIG |
//! | root's files and processes | a user id per role, where the supervisor may change it (CAP_SETUID, CAP_SETGID, CAP_KILL) |
//! | every capability, now and by any later execve | capset, bounding and ambient set, PR_SET_NO_NEW_PRIVS |
//! | the filesystem, TCP listeners, signals to others, abstract sockets | Landlock, as far as the kernel has it |
//! | system calls that the role does not need | seccomp, see [`filter`] |
//!
//! The user ids are 64810 (`lb`), 64811 (`web`), 64812 (`dns64`) and 64813 (`nat64`), their group ids the same. They need no entry in
//! /etc/passwd and must not be given to anyone else.
//!
//! [`enter`] then reads back what the kernel says and refuses to go on if it is not so.

mod filter;

use std::{fs::File, io};

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetStatus, Scope};
use rustix::{
    process::{DumpableBehavior, Pid, Resource, Rlimit, Signal},
    thread::{CapabilitySet, CapabilitySets, Gid, Uid},
};

use crate::worker::Role;

/// What of the sandbox depends on the machine; the rest is always there, or [`enter`] fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entered {
    /// The user id the process has now.
    pub uid: u32,
    /// What the kernel has of Landlock.
    pub landlock: Landlock,
}

/// How much of the Landlock rules is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landlock {
    /// All of them.
    Full,
    /// Those the kernel knows: no TCP rules before Linux 6.7, no scopes before 6.12.
    Partial,
    /// The kernel has no Landlock; seccomp alone keeps the worker from opening files.
    Missing,
}

/// Why the sandbox could not be entered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A step was refused.
    #[error(
        "{step} was refused, so the worker does not start; if a unit's SystemCallFilter= is in the way, see `systemctl cat edged`"
    )]
    Refused {
        /// What was tried.
        step: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The supervisor ended meanwhile.
    #[error("the supervisor has ended, and its worker with it")]
    Orphan,
    /// Landlock failed in a way that is not just an older kernel.
    #[error("Landlock could not be set up, so the worker does not start")]
    Landlock(#[from] landlock::RulesetError),
    /// seccomp failed.
    #[error("seccomp could not be set up, so the worker does not start; the kernel needs CONFIG_SECCOMP_FILTER")]
    Seccomp(#[from] seccompiler::Error),
    /// The kernel does not confirm what was asked for.
    #[error("the kernel says {found}, so the worker does not start")]
    NotConfirmed {
        /// Lines of /proc/self/status.
        found: String,
    },
}

/// Bytes of private memory a role may have.
const fn memory(role: Role) -> u64 {
    match role {
        Role::Lb | Role::Dns64 => 2 << 30,
        // A table of two million sessions and 256 addresses, twice: a reload makes one beside the other.
        Role::Nat64 => 3 << 30,
        Role::Web => 256 << 20,
    }
}

/// The user and group id of a role.
pub const fn id(role: Role) -> u32 {
    match role {
        Role::Lb => 64810,
        Role::Web => 64811,
        Role::Dns64 => 64812,
        Role::Nat64 => 64813,
    }
}

/// Gives up everything the role does not need, for good, and checks that it is gone.
///
/// To be called while the process has one thread: the kernel restricts threads, and later ones inherit it.
/// `supervisor` is the process that must still be the parent.
///
/// # Errors
///
/// [`Error`]; the process must end then, it is in no defined state.
pub fn enter(role: Role, supervisor: Pid) -> Result<Entered, Error> {
    // Opened now because there is no filesystem afterwards; its content is made when it is read.
    let status = File::open("/proc/thread-self/status").map_err(|source| Error::Refused {
        step: "opening /proc/thread-self/status",
        source,
    })?;
    limit(Resource::Core, 0, "setting RLIMIT_CORE")?;
    limit(Resource::Data, memory(role), "setting RLIMIT_DATA")?;
    drop_capabilities(role)?;
    // After the change of user id, which resets both.
    step(
        "PR_SET_DUMPABLE",
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable),
    )?;
    step(
        "PR_SET_PDEATHSIG",
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL)),
    )?;
    if rustix::process::getppid() != Some(supervisor) {
        return Err(Error::Orphan);
    }
    step("PR_SET_NO_NEW_PRIVS", rustix::thread::set_no_new_privs(true))?;
    let landlock = restrict_paths(role)?;
    filter::apply(role)?;
    confirm(&status)?;
    Ok(Entered {
        uid: rustix::process::geteuid().as_raw(),
        landlock,
    })
}

fn step(step: &'static str, result: rustix::io::Result<()>) -> Result<(), Error> {
    result.map_err(|errno| Error::Refused {
        step,
        source: errno.into(),
    })
}

fn limit(resource: Resource, most: u64, name: &'static str) -> Result<(), Error> {
    // A lower limit that is there already stays: raising it may be refused, and was not wanted.
    let most = rustix::process::getrlimit(resource)
        .maximum
        .map_or(most, |maximum| maximum.min(most));
    step(
        name,
        rustix::process::setrlimit(
            resource,
            Rlimit {
                current: Some(most),
                maximum: Some(most),
            },
        ),
    )
}

/// Leaves root's user id where that is possible, and every capability in any case.
fn drop_capabilities(role: Role) -> Result<(), Error> {
    let has = rustix::thread::capabilities(None)
        .map_err(|errno| Error::Refused {
            step: "capget",
            source: errno.into(),
        })?
        .effective;
    if has.contains(CapabilitySet::SETPCAP) {
        for number in 0..64 {
            match rustix::thread::remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
                // The first number that this kernel does not know.
                Err(rustix::io::Errno::INVAL) => break,
                other => step("PR_CAPBSET_DROP", other)?,
            }
        }
    }
    match rustix::thread::clear_ambient_capability_set() {
        // Before Linux 4.3 there is none.
        Err(rustix::io::Errno::INVAL) => {}
        other => step("PR_CAP_AMBIENT_CLEAR_ALL", other)?,
    }
    // Without CAP_KILL the supervisor could not end a worker of another user.
    if has.contains(CapabilitySet::SETUID | CapabilitySet::SETGID | CapabilitySet::KILL) {
        step("setgroups", rustix::thread::set_thread_groups(&[]))?;
        let (uid, gid) = (Uid::from_raw(id(role)), Gid::from_raw(id(role)));
        match rustix::thread::set_thread_res_gid(gid, gid, gid) {
            // A user namespace without this id: the worker keeps the user it has, and loses the rest.
            Err(rustix::io::Errno::INVAL) => {}
            other => {
                step("setresgid", other)?;
                step("setresuid", rustix::thread::set_thread_res_uid(uid, uid, uid))?;
            }
        }
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    step("capset", rustix::thread::set_capabilities(None, none))
}

/// No path at all, no TCP listener, no signal and no abstract socket beyond this process.
fn restrict_paths(role: Role) -> Result<Landlock, Error> {
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI::V7))?
        .handle_access(AccessNet::BindTcp)?;
    let ruleset = match role {
        Role::Lb | Role::Dns64 => ruleset,
        Role::Nat64 | Role::Web => ruleset.handle_access(AccessNet::ConnectTcp)?,
    };
    let status = ruleset.scope(Scope::from_all(ABI::V7))?.create()?.restrict_self()?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => Landlock::Full,
        RulesetStatus::PartiallyEnforced => Landlock::Partial,
        RulesetStatus::NotEnforced => Landlock::Missing,
    })
}

/// Reads back what the kernel made of it.
fn confirm(status: &File) -> Result<(), Error> {
    let mut text = vec![0; 16 << 10];
    let length = rustix::io::pread(status, &mut text, 0).map_err(|errno| Error::Refused {
        step: "reading /proc/self/status",
        source: errno.into(),
    })?;
    let text = String::from_utf8_lossy(text.get(..length).unwrap_or_default());
    let wrong: Vec<String> = [
        ("CapInh", "0"),
        ("CapPrm", "0"),
        ("CapEff", "0"),
        ("CapAmb", "0"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
    ]
    .into_iter()
    .filter_map(|(name, wanted)| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let found = line.map(|value| value.trim().trim_start_matches('0'));
        let wanted = wanted.trim_start_matches('0');
        (found != Some(wanted)).then(|| format!("{name}:{}", line.unwrap_or(" missing")))
    })
    .collect();
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(Error::NotConfirmed {
            found: wrong.join(", "),
        })
    }
}
