//! A place of its own for a benchmark: network, process and mount namespaces.
//!
//! Nothing else is on its loopback, the machine's /run is not touched, and whichever way the benchmark ends, every
//! process it started ends with it, those that daemonized included.

use std::{
    fs, io,
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::{
    process::{Resource, Rlimit, Signal, getrlimit, set_parent_process_death_signal, setrlimit},
    thread::{UnshareFlags, unshare_unsafe},
};

/// Where a benchmark keeps its files: on the sandbox's own /run, gone when it ends.
pub(crate) const FOLDER: &str = "/run/bench";

/// Descriptors every process may have: what the peers' configurations are dimensioned for, and the same for all.
const DESCRIPTORS: u64 = 20_000;

/// Runs `bench COMMAND ARGS` as the first process of new namespaces and returns its exit code.
pub(crate) fn enter(command: &str, args: &[String]) -> Result<ExitCode> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "a network namespace and strace need root; run it with sudo"
    );
    let bench = std::env::current_exe().context("cannot find this program's own file")?;
    // SAFETY: UnshareFlags::FILES is not among the flags, and no other thread exists yet.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWPID | UnshareFlags::NEWNS) }
        .context("this machine allows no new network, process and mount namespaces; run it outside of the container")?;
    let mut first = Command::new(bench);
    first.arg(command).args(args);
    // SAFETY: the closure makes one prctl call: no allocation, no lock.
    unsafe { first.pre_exec(die_with_parent) };
    let status = first.status().context("cannot start bench in its sandbox")?;
    Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)))
}

/// For `Command::pre_exec`: the child is killed when its parent ends.
pub(crate) fn die_with_parent() -> io::Result<()> {
    Ok(set_parent_process_death_signal(Some(Signal::KILL))?)
}

/// Sets up the sandbox from inside: /proc, /run, loopback, ports, limits.
pub(crate) fn furnish() -> Result<()> {
    run("mount", &["--make-rprivate", "/"])?;
    run("mount", &["-t", "proc", "proc", "/proc"])?;
    run("mount", &["-t", "tmpfs", "-o", "mode=0755", "tmpfs", "/run"])?;
    // /run/edged is there where a user has it: systemd makes it (RuntimeDirectory=).
    for folder in [FOLDER, "/run/edged"] {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {folder}"))?;
    }
    run("ip", &["link", "set", "lo", "up"])?;
    // 55,000 ports per source address; the peers listen below. A port that waits out its 60 s may be taken again:
    // on one machine no stray segment can come late.
    for (name, value) in [
        ("ip_local_port_range", "10240 65535"),
        ("tcp_tw_reuse", "1"),
        ("tcp_max_syn_backlog", "8192"),
    ] {
        let path = Path::new("/proc/sys/net/ipv4").join(name);
        fs::write(&path, value).with_context(|| format!("cannot set {} to {value}", path.display()))?;
    }
    limit_descriptors()
}

fn limit_descriptors() -> Result<()> {
    let now = getrlimit(Resource::Nofile);
    let hard = now.maximum.unwrap_or(u64::MAX).max(DESCRIPTORS);
    setrlimit(Resource::Nofile, Rlimit { current: Some(DESCRIPTORS), maximum: Some(hard) }).with_context(|| {
        format!("{DESCRIPTORS} descriptors per process are needed and the limit cannot be raised; raise it (ulimit -Hn {DESCRIPTORS})")
    })
}

fn run(program: &str, args: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(args)
        .output()
        .with_context(|| format!("cannot run {program}; install it (Debian: apt-get install mount iproute2)"))?;
    if !output.status.success() {
        bail!(
            "{program} {} failed: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
