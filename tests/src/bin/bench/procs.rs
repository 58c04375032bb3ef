//! What a process and its descendants cost: CPU time, memory, system calls; and what the machine did meanwhile.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::sandbox::{self, FOLDER};

/// `root` and all its descendants that have not ended.
pub(crate) fn tree(root: i32) -> Result<Vec<i32>> {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    let mut alive = BTreeSet::new();
    for entry in fs::read_dir("/proc").context("cannot read /proc")? {
        let Some(pid) = entry
            .ok()
            .and_then(|e| e.file_name().to_str().and_then(|name| name.parse().ok()))
        else {
            continue;
        };
        // Gone between the two reads: it costs nothing any more.
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
            continue;
        };
        // "pid (name) state ppid ..."; the name may hold anything, so count from its last parenthesis.
        let mut fields = stat
            .rsplit_once(')')
            .map_or("", |(_, rest)| rest)
            .split_ascii_whitespace();
        let (Some(state), Some(parent)) = (fields.next(), fields.next().and_then(|ppid| ppid.parse().ok())) else {
            continue;
        };
        if !matches!(state, "Z" | "X") {
            alive.insert(pid);
            children.entry(parent).or_default().push(pid);
        }
    }
    ensure!(alive.contains(&root), "process {root} has ended");
    let mut tree = vec![root];
    let mut next = 0;
    while let Some(pid) = tree.get(next) {
        tree.extend(children.get(pid).into_iter().flatten());
        next += 1;
    }
    Ok(tree)
}

/// CPU time that processes had used at one moment.
pub(crate) struct CpuMark(BTreeMap<i32, u64>);

impl CpuMark {
    /// Of `root` and all its descendants.
    pub(crate) fn of(root: i32) -> Result<Self> {
        let pids = tree(root)?;
        Ok(Self(
            pids.into_iter()
                .filter_map(|pid| Some((pid, cpu_nanos(pid)?)))
                .collect(),
        ))
    }

    /// Seconds used from here to `later`, by processes started meanwhile too.
    ///
    /// # Errors
    ///
    /// If a process has ended meanwhile: its time is lost, and a figure without it would flatter.
    pub(crate) fn until(&self, later: &Self) -> Result<f64> {
        if let Some(pid) = self.0.keys().find(|pid| !later.0.contains_key(pid)) {
            bail!("its process {pid} ended during the measurement");
        }
        let nanos: u64 = later
            .0
            .iter()
            .map(|(pid, after)| after.saturating_sub(self.0.get(pid).copied().unwrap_or(0)))
            .sum();
        Ok(nanos as f64 / 1e9)
    }
}

/// Run time of all threads of `pid` in ns, of those that have ended too: the sum of /proc/PID/task/*/schedstat, but
/// exact at this moment where that file lags by up to a tick. `None` once it has ended.
fn cpu_nanos(pid: i32) -> Option<u64> {
    let mut clock = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both pointers are to live locals of the types the calls write.
    let good = unsafe { libc::clock_getcpuclockid(pid, &mut clock) == 0 && libc::clock_gettime(clock, &mut time) == 0 };
    good.then(|| u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// Proportional set size of `root` and all its descendants, in KiB.
pub(crate) fn pss_kib(root: i32) -> Result<u64> {
    let mut sum = 0;
    for pid in tree(root)? {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        sum += text
            .lines()
            .find_map(|line| {
                line.strip_prefix("Pss:")?
                    .trim()
                    .strip_suffix(" kB")?
                    .trim()
                    .parse::<u64>()
                    .ok()
            })
            .with_context(|| format!("{path} has no Pss"))?;
    }
    Ok(sum)
}

/// What all processors together have done since boot, in seconds.
#[derive(Clone, Copy)]
pub(crate) struct MachineMark {
    idle: f64,
    stolen: f64,
    total: f64,
}

/// What all processors together did in a stretch of time, in seconds.
pub(crate) struct MachineTime {
    /// Had nothing to do.
    pub(crate) idle: f64,
    /// Taken by the hypervisor for others.
    pub(crate) stolen: f64,
    /// All of it: time times cores.
    pub(crate) total: f64,
}

impl MachineMark {
    /// Now.
    pub(crate) fn now() -> Result<Self> {
        let stat = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        let ticks: Vec<f64> = stat
            .lines()
            .next()
            .and_then(|line| line.strip_prefix("cpu "))
            .context("/proc/stat has no line of all processors")?
            .split_ascii_whitespace()
            .filter_map(|field| field.parse::<f64>().ok().map(|ticks| ticks / 100.0))
            .collect();
        // user nice system idle iowait irq softirq steal; what follows is contained in user and nice.
        let [_, _, _, idle, iowait, _, _, stolen, ..] = ticks[..] else {
            bail!("/proc/stat has too few columns")
        };
        Ok(Self {
            idle: idle + iowait,
            stolen,
            total: ticks.iter().take(8).sum(),
        })
    }

    /// From here until `later`.
    pub(crate) fn until(self, later: Self) -> MachineTime {
        MachineTime {
            idle: later.idle - self.idle,
            stolen: later.stolen - self.stolen,
            total: later.total - self.total,
        }
    }
}

/// System calls of a process tree, counted by strace from its making until [`Strace::finish`].
pub(crate) struct Strace {
    child: std::process::Child,
    summary: String,
}

impl Strace {
    /// Attaches to every thread of `root` and its descendants, and follows those they start.
    pub(crate) fn attach(root: i32) -> Result<Self> {
        let pids = tree(root)?;
        let summary = format!("{FOLDER}/strace-{root}");
        let mut command = Command::new("strace");
        command
            .args(["-f", "-c", "-o", &summary])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        for pid in &pids {
            command.args(["-p", &pid.to_string()]);
        }
        // SAFETY: the closure makes one prctl call: no allocation, no lock.
        unsafe { command.pre_exec(sandbox::die_with_parent) };
        let child = command
            .spawn()
            .context("cannot run strace; install it (Debian: apt-get install strace)")?;
        let mut strace = Self { child, summary };
        let deadline = Instant::now() + Duration::from_secs(10);
        while !pids.iter().all(|pid| traced(*pid)) {
            if let Some(status) = strace.child.try_wait().context("cannot wait for strace")? {
                bail!("strace could not attach ({status}); the kernel or the container forbids ptrace");
            }
            ensure!(
                Instant::now() < deadline,
                "strace did not attach to every thread within 10 s"
            );
            sleep(Duration::from_millis(10));
        }
        Ok(strace)
    }

    /// Detaches and returns the number of calls by name.
    pub(crate) fn finish(mut self) -> Result<BTreeMap<String, u64>> {
        kill_process(Pid::from_child(&self.child), Signal::INT).context("cannot stop strace")?;
        self.child.wait().context("cannot wait for strace")?;
        let text = fs::read_to_string(&self.summary).with_context(|| format!("strace left no {}", self.summary))?;
        let calls = parse_summary(&text);
        ensure!(!calls.is_empty(), "strace counted nothing:\n{text}");
        Ok(calls)
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        // Already over unless an error came between; strace detaches on INT and leaves the traced running.
        if let Ok(None) = self.child.try_wait() {
            let _ = kill_process(Pid::from_child(&self.child), Signal::INT);
            let _ = self.child.wait();
        }
    }
}

fn traced(pid: i32) -> bool {
    let Ok(tasks) = fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task")) else {
        return false;
    };
    tasks.flatten().all(|task| {
        fs::read_to_string(task.path().join("status")).is_ok_and(|status| {
            status
                .lines()
                .any(|line| line.strip_prefix("TracerPid:").is_some_and(|id| id.trim() != "0"))
        })
    })
}

/// Calls by name from `strace -c`: columns "% time, seconds, usecs/call, calls, [errors,] syscall".
fn parse_summary(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let columns: Vec<&str> = line.split_ascii_whitespace().collect();
            let name = columns.last().filter(|_| columns.len() >= 5)?;
            let calls = columns.get(3)?.parse().ok()?;
            (*name != "total").then(|| ((*name).to_owned(), calls))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strace_summary_is_read_with_and_without_errors_column() {
        let text = "\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 30.13    0.100000          12      8000       100 accept4
 10.00    0.050000           2      2000           close
------ ----------- ----------- --------- --------- ----------------
100.00    0.150000          15     10000       100 total
";
        assert_eq!(
            parse_summary(text),
            BTreeMap::from([("accept4".to_owned(), 8000), ("close".to_owned(), 2000)])
        );
    }

    #[test]
    fn a_tree_has_its_root_and_its_own_cpu_time() {
        let own = i32::try_from(std::process::id()).expect("a pid");
        let before = CpuMark::of(own).expect("alive");
        let mut x = 1u64;
        while before.until(&CpuMark::of(own).expect("alive")).expect("still alive") < 0.01 {
            x = std::hint::black_box(x.wrapping_mul(3));
        }
        assert!(pss_kib(own).expect("readable") > 0);
    }
}
