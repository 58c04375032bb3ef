//! Programs under test: found, started with a log, stopped with all their descendants.

use std::{
    env, fs,
    fs::File,
    io::Read,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    procs,
    sandbox::{self, FOLDER},
};

/// Puts a configuration where its program finds it; returns the path.
pub(crate) fn file(name: &str, text: &str) -> Result<String> {
    let path = format!("{FOLDER}/{name}");
    fs::write(&path, text).with_context(|| format!("cannot write {path}"))?;
    Ok(path)
}

/// The `edged` under test: beside this program, or where EDGED_BIN_DIR says.
pub(crate) fn edged() -> Result<PathBuf> {
    let folder = match env::var_os("EDGED_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => env::current_exe()?
            .parent()
            .context("this program has no folder")?
            .to_owned(),
    };
    let edged = folder.join("edged");
    ensure!(
        edged.is_file(),
        "there is no {}; build it with cargo build --release --workspace, or set EDGED_BIN_DIR to its folder",
        edged.display()
    );
    Ok(edged)
}

/// What a program says first, of its version.
pub(crate) fn first_line(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    // nginx says it on stderr.
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().next().unwrap_or("version unknown");
    Ok(line
        .trim_start_matches("nginx version: ")
        .split(" - https")
        .next()
        .unwrap_or(line)
        .trim()
        .to_owned())
}

/// A process with a log, started by this benchmark; stopped with all its descendants when dropped.
pub(crate) struct Running {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Running {
    /// Starts it; its output goes to `NAME.log`.
    pub(crate) fn start(name: &str, mut command: Command) -> Result<Self> {
        let log = Path::new(FOLDER).join(format!("{name}.log"));
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        // SAFETY: the closure makes one prctl call: no allocation, no lock.
        unsafe { command.pre_exec(sandbox::die_with_parent) };
        let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
        })
    }

    /// The process whose descendants are all of it.
    pub(crate) fn pid(&self) -> i32 {
        Pid::from_child(&self.child).as_raw_nonzero().get()
    }

    /// Waits until `serves` says so, for at most 10 s and only while it lives.
    pub(crate) fn wait_until(&mut self, serves: impl Fn() -> bool) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !serves() {
            self.check_alive()?;
            ensure!(
                Instant::now() < deadline,
                "{} serves nothing after 10 s\n{}",
                self.name,
                self.log()
            );
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn check_alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait().context("cannot wait for a child")? {
            bail!("{} ended ({status}) instead of serving\n{}", self.name, self.log());
        }
        Ok(())
    }

    /// The end of what it said.
    pub(crate) fn log(&self) -> String {
        let mut text = String::new();
        match File::open(&self.log).and_then(|mut file| file.read_to_string(&mut text)) {
            Err(error) => format!("(its log cannot be read: {error})"),
            Ok(0) => "(it said nothing)".into(),
            Ok(_) => {
                let lines: Vec<&str> = text.lines().collect();
                lines[lines.len().saturating_sub(20)..].join("\n")
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Listed before the end: afterwards nothing tells whose descendants they were.
        let pids = procs::tree(self.pid()).unwrap_or_default();
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let deadline = Instant::now() + Duration::from_secs(3);
        while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
            sleep(Duration::from_millis(10));
        }
        for pid in pids {
            // In a process namespace of its own and with a dozen processes, a number is not used again within 3 s.
            if let Some(pid) = Pid::from_raw(pid) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        let _ = self.child.wait();
    }
}
