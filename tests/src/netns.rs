//! One network namespace: made with `ip netns`, so that a person can look into it, entered by thread or by process.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::process::CommandExt},
    panic,
    path::PathBuf,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::{
    process::{Pid, Signal, kill_process},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

/// A network namespace that this process made; deleted on drop, together with the processes in it.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: File,
}

impl Netns {
    /// Makes the namespace `name`, with its loopback up and IPv6 addresses usable at once.
    ///
    /// # Errors
    ///
    /// If `ip netns add` fails.
    pub fn create(name: &str) -> Result<Self> {
        run(Command::new("ip").args(["netns", "add", name]))?;
        let file = File::open(path(name)).with_context(|| format!("namespace {name}"))?;
        let netns = Self {
            name: name.to_owned(),
            file,
        };
        netns.enter(|| -> Result<()> {
            // Duplicate address detection would leave an address unusable for its first second.
            for (key, value) in [
                ("conf/all/accept_dad", "0"),
                ("conf/default/accept_dad", "0"),
                ("conf/default/accept_ra", "0"),
            ] {
                let file = format!("/proc/sys/net/ipv6/{key}");
                fs::write(&file, value).with_context(|| file)?;
            }
            Ok(())
        })?;
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// Its name under `/run/netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs lines of `ip` commands in the namespace.
    ///
    /// # Errors
    ///
    /// The first line that fails, in `ip`'s words.
    pub fn ip(&self, lines: &str) -> Result<()> {
        feed(Command::new("ip").args(["-n", &self.name, "-batch", "-"]), lines)
    }

    /// Loads an nft ruleset in the namespace.
    ///
    /// # Errors
    ///
    /// What `nft` says.
    pub fn nft(&self, rules: &str) -> Result<()> {
        feed(self.command("nft").args(["-f", "-"]), rules)
    }

    /// A command that will run in the namespace.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        self.move_command(&mut command);
        command
    }

    /// Makes `command` run in the namespace.
    pub fn move_command(&self, command: &mut Command) {
        let file = self.file.try_clone().expect("a descriptor can be duplicated");
        let enter = move || {
            if CLOSED.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            // The demo keeps SIGTERM for its own cleaning up; what it starts is to hear one.
            unblock(libc::SIGTERM);
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).map_err(io::Error::from)
        };
        // SAFETY: between fork and exec, `enter` reads an atomic and makes two system calls, one on a set of its own
        // (sigprocmask) and one on a descriptor it owns (setns); it touches neither the heap nor a lock.
        unsafe { command.pre_exec(enter) };
    }

    /// Runs `work` on a thread of its own inside the namespace; threads and sockets made there belong to the namespace.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("root may enter a namespace");
                work()
            });
            inside.join().unwrap_or_else(|panicked| panic::resume_unwind(panicked))
        })
    }
}

/// Lets a signal come to the calling thread.
fn unblock(signal: libc::c_int) {
    // SAFETY: plain system calls on a set that lives on this stack frame.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
    }
}

/// From now on no process can be started in any namespace of ours.
static CLOSED: AtomicBool = AtomicBool::new(false);

/// Lets no process start in a namespace any more: with whoever starts again what has ended there would be no end.
pub(crate) fn close() {
    CLOSED.store(true, Ordering::Relaxed);
}

impl Drop for Netns {
    fn drop(&mut self) {
        delete(&self.name);
    }
}

/// Ends the processes in the namespace `name` and deletes it. Only processes that we started can be in it.
pub(crate) fn delete(name: &str) {
    // A process that is being killed may have just forked: look again until none is left.
    for _ in 0..50 {
        let pids = processes(name);
        if pids.is_empty() {
            break;
        }
        for pid in pids {
            let _ = kill_process(pid, Signal::KILL);
        }
        thread::sleep(std::time::Duration::from_millis(2));
    }
    let _ = Command::new("ip")
        .args(["netns", "del", name])
        .stderr(Stdio::null())
        .status();
}

/// Names of the namespaces under `/run/netns` that start with `prefix`.
pub(crate) fn list(prefix: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir("/run/netns") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect()
}

/// The processes whose main thread is in the namespace `name`, zombies excepted.
fn processes(name: &str) -> Vec<Pid> {
    use std::os::unix::fs::MetadataExt;
    let Ok(wanted) = fs::metadata(path(name)) else {
        return Vec::new();
    };
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        // A zombie has no namespace any more, so its link cannot be followed.
        .filter(|pid| fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|net| net.ino() == wanted.ino()))
        .filter_map(Pid::from_raw)
        .collect()
}

fn path(name: &str) -> PathBuf {
    PathBuf::from("/run/netns").join(name)
}

/// Runs `command` to its end.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs `command` to its end with `input` on its standard input.
fn feed(command: &mut Command, input: &str) -> Result<()> {
    use io::Write;
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{command:?}"))?;
    child.stdin.take().expect("piped above").write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "{command:?}: {}\n{input}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
