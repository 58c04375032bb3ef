//! A Debian with systemd as PID 1 on a node of the lab, and the appliance installed in it as on a real machine.
//!
//! `tests/lab/lab.sh` boots it; everything done in it goes over SSH.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::{
    Node,
    edge::{Said, program, say},
    netns::run,
    wait_for,
};

/// Debian's code names, the newest first, of the releases that programs built on this machine run on: a C library does
/// not serve what was built for a later one.
pub fn suites() -> Result<Vec<&'static str>> {
    let here = fs::read_to_string("/etc/os-release")?;
    let here = here
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .unwrap_or_default();
    Ok(if here == "bookworm" {
        vec!["trixie", "bookworm"]
    } else {
        vec!["trixie"]
    })
}

/// A booted Debian; powered off and removed on drop.
#[derive(Debug)]
pub struct SystemdNode {
    node: Node,
}

impl SystemdNode {
    /// Boots a Debian `suite` in `node`'s namespace and waits until its boot is over. It sees this checkout as /opt/edge
    /// and the programs of this build in /opt/bin. The first call for a suite builds
    /// its root filesystem, which takes a minute or two and is kept.
    ///
    /// # Errors
    ///
    /// What `lab.sh` says.
    pub fn boot(node: &Node, suite: &str) -> Result<Self> {
        let name = node.netns().name();
        let repository = repository().canonicalize()?;
        let programs = program("edged")?;
        let programs = programs.parent().context("edged lies in a folder")?;
        let binds = format!("{}:/opt/edge {}:/opt/bin", repository.display(), programs.display());
        // Made first, so that whatever is there of a node that did not come up is removed.
        let booted = Self { node: node.clone() };
        let mut boot = lab("boot");
        run(boot.args([name, name]).env("LAB_SUITE", suite).env("LAB_BIND", binds)).context("booting Debian")?;
        Ok(booted)
    }

    /// Runs `command` in a shell in it as root.
    ///
    /// # Errors
    ///
    /// If it does not end within a minute.
    pub fn run(&self, command: &str) -> Result<Said> {
        say(lab("ssh").args([self.name(), command]), Duration::from_secs(60))
    }

    /// As [`SystemdNode::run`], for what must succeed; returns its output.
    ///
    /// # Errors
    ///
    /// If it fails: what it said.
    pub fn sh(&self, command: &str) -> Result<String> {
        let said = self.run(command)?;
        ensure!(said.code == Some(0), "{command}: {said}");
        Ok(said.out.trim_end().to_owned())
    }

    /// Runs `packaging/install.sh` of this checkout in it, with the programs of this build.
    ///
    /// # Errors
    ///
    /// If that fails.
    pub fn install(&self) -> Result<String> {
        self.sh("/opt/edge/packaging/install.sh --from /opt/bin")
    }

    /// Replaces the configuration file.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn configure(&self, config: &str) -> Result<()> {
        Ok(fs::write(self.root().join("etc/edged/edged.toml"), config)?)
    }

    /// A property of the unit as systemd knows it: `MainPID`, `NRestarts`, ...
    ///
    /// # Errors
    ///
    /// If systemd does not answer.
    pub fn property(&self, name: &str) -> Result<String> {
        self.sh(&format!("systemctl show --value --property {name} edged"))
    }

    /// Kills the supervisor (signal 9) and waits until systemd has started another one that is ready.
    ///
    /// # Errors
    ///
    /// If none comes within half a minute; the message has the log.
    pub fn kill_supervisor(&self) -> Result<()> {
        let before = self.property("MainPID")?;
        self.sh(&format!("kill -KILL {before}"))?;
        wait_for("systemd starts edged again", Duration::from_secs(30), || {
            let now = self.sh("systemctl show --property ActiveState,MainPID edged").ok()?;
            let is = |line: &str| now.lines().any(|other| other == line);
            (is("ActiveState=active") && !is(&format!("MainPID={before}"))).then_some(())
        })
        .with_context(|| self.log())
    }

    /// What the unit has logged.
    pub fn log(&self) -> String {
        self.run("journalctl --no-pager --output cat --unit edged | tail -n 40")
            .map(|said| said.out)
            .unwrap_or_default()
    }

    /// Its root folder on this machine.
    pub fn root(&self) -> PathBuf {
        let said = run(lab("root").arg(self.name())).expect("lab.sh prints a path");
        said.trim_end().into()
    }

    fn name(&self) -> &str {
        self.node.netns().name()
    }
}

impl Drop for SystemdNode {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- edged in {}, its last words:\n{}", self.name(), self.log());
        }
        if let Err(error) = run(lab("halt").arg(self.name())) {
            eprintln!("{error:#}");
        }
    }
}

fn lab(command: &str) -> Command {
    let mut lab = Command::new(repository().join("tests/lab/lab.sh"));
    lab.arg(command);
    lab
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}
