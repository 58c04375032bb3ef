//! Processes of a lab: started with their output in a file, ended by their own pid.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    net::{IpAddr, SocketAddr},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::wait_for;

/// A running process; killed on drop.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with standard output and error in `log`.
    ///
    /// # Errors
    ///
    /// If the program cannot be started or the log not be written.
    pub fn start(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let out = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| log.display().to_string())?;
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command
            .spawn()
            .with_context(|| format!("starting {program} as {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
        })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Whether it still runs.
    pub fn running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal.
    ///
    /// # Errors
    ///
    /// If it has ended.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        // Asked first: once it has been waited for, its id may be another's.
        if !self.running() {
            bail!("{} has ended\n{}", self.name, tail(&self.log(), 20));
        }
        Ok(kill_process(raw(self.child.id()), signal)?)
    }

    /// Kills it (signal 9) and waits for its end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// If it still runs after `within`.
    pub fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        wait_for(&format!("{} ends", self.name), within, || {
            self.child.try_wait().ok().flatten()
        })
        .with_context(|| tail(&self.log(), 20))
    }

    /// Asks it to end (SIGTERM) and waits; kills it if it does not.
    ///
    /// # Errors
    ///
    /// If it had to be killed.
    pub fn stop(&mut self, within: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        let ended = self.wait(within);
        if ended.is_err() {
            self.kill();
        }
        ended
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            eprintln!(
                "--- {} ({}), its last words:\n{}",
                self.name,
                self.log.display(),
                tail(&self.log(), 25)
            );
        }
    }
}

/// Sends a signal to a process that one of ours started, such as a worker.
///
/// # Errors
///
/// If there is no such process.
pub fn signal(pid: u32, signal: Signal) -> Result<()> {
    kill_process(raw(pid), signal).with_context(|| format!("signal to {pid}"))
}

/// The TCP connections of a process, each as its own end and the other.
///
/// # Errors
///
/// If there is no such process.
pub fn connections(pid: u32) -> Result<Vec<(SocketAddr, SocketAddr)>> {
    let mut inodes = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).with_context(|| format!("process {pid}"))? {
        // A descriptor that was closed meanwhile has no link any more.
        let Ok(link) = fs::read_link(entry?.path()) else {
            continue;
        };
        inodes.extend(
            link.to_str()
                .and_then(|link| Some(link.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())),
        );
    }
    let mut found = Vec::new();
    for table in ["tcp", "tcp6"] {
        // The table of the namespace that the process is in.
        for line in fs::read_to_string(format!("/proc/{pid}/net/{table}"))?.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [_, local, remote, state, ..] = fields[..] else {
                continue;
            };
            if state == "01"
                && fields.get(9).is_some_and(|inode| inodes.contains(*inode))
                && let (Some(local), Some(remote)) = (socket_address(local), socket_address(remote))
            {
                found.push((local, remote));
            }
        }
    }
    Ok(found)
}

/// Where anybody listens for TCP in the network namespace of a process.
///
/// # Errors
///
/// If there is no such process.
pub fn listeners(pid: u32) -> Result<Vec<SocketAddr>> {
    let mut found = Vec::new();
    for table in ["tcp", "tcp6"] {
        let table = fs::read_to_string(format!("/proc/{pid}/net/{table}")).with_context(|| format!("process {pid}"))?;
        for line in table.lines().skip(1) {
            let mut fields = line.split_whitespace().skip(1);
            let (local, state) = (fields.next().and_then(socket_address), fields.nth(1));
            found.extend(local.filter(|_| state == Some("0A")));
        }
    }
    Ok(found)
}

/// How many descriptors a process has open.
///
/// # Errors
///
/// If there is no such process.
pub fn descriptors(pid: u32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))
        .with_context(|| format!("process {pid}"))?
        .count())
}

/// The processor time that a process has used, in its own code and in the kernel.
///
/// # Errors
///
/// If there is no such process.
pub fn processor_time(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid}"))?;
    // Behind the name, which is in brackets and may hold anything: proc(5), fields 3 and on.
    let (_, rest) = stat.rsplit_once(") ").context("a process has a name")?;
    let ticks = rest
        .split(' ')
        .skip(11)
        .take(2)
        .map(str::parse::<u64>)
        .sum::<Result<u64, _>>()?;
    Ok(Duration::from_secs(ticks) / u32::try_from(rustix::param::clock_ticks_per_second())?)
}

/// Memory of a process in KiB, each shared page divided among those who share it.
///
/// # Errors
///
/// If there is no such process.
pub fn pss_kib(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).with_context(|| format!("process {pid}"))?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Pss:"))
        .context("no Pss")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse()?)
}

/// An address as `/proc/net/tcp` writes it: words of the machine's byte order, in hexadecimal.
fn socket_address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let mut bytes = Vec::new();
    for word in address.as_bytes().chunks(8) {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let ip = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
        _ => return None,
    };
    Some((ip, u16::from_str_radix(port, 16).ok()?).into())
}

/// How a process ended, in words.
pub fn ending(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown".into(),
    }
}

fn raw(pid: u32) -> Pid {
    i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .expect("a process id is positive")
}

/// The last `lines` lines of `text`.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_connection_of_this_process_is_found_over_both_families() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let wanted = (stream.local_addr().unwrap(), stream.peer_addr().unwrap());
            let listening = listeners(std::process::id()).unwrap();
            assert!(
                listening.contains(&wanted.1) && !listening.contains(&wanted.0),
                "{listening:?}"
            );
            assert!(connections(std::process::id()).unwrap().contains(&wanted), "{wanted:?}");
        }
    }
}
