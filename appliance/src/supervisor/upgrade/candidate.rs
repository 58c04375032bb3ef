//! The program that is to take over: found good, or refused with the reason, before anything is touched.
//!
//! The file is opened once. What was checked, what was probed and what runs in the end is the same file, whatever becomes
//! of its name meanwhile.

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{
            fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, Signal},
};
use serde::{Deserialize, Serialize};

use super::carried;
use crate::{
    build::{self, Build},
    config, handover,
    worker::message,
};

/// The internal first argument with which a program tells whether it could take over.
pub const PROBE: &str = "--upgrade-probe";
/// What it calls itself.
const PROGRAM: &str = "edged";
/// For the answer to the probe.
const PATIENCE: Duration = Duration::from_secs(5);
/// For a file that is still being written to be ready to run.
const BUSY: Duration = Duration::from_secs(1);
/// From the end of its outputs to its own.
const ENDING: Duration = Duration::from_millis(500);
/// Most bytes of an answer, and of what the program complains of.
const MOST: usize = 64 << 10;

/// What a program says about itself: each format in every version from which it can take over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Probe {
    program: String,
    version: String,
    build: String,
    /// Talks with workers that are there already: [`message::FORMAT`].
    channel: Vec<u32>,
    /// What workers hand over: [`handover::FORMAT`].
    handover: Vec<u32>,
    /// What a supervisor leaves to the next: [`carried::FORMAT`].
    state: Vec<u32>,
    /// What is wrong with the configuration on its standard input.
    config_error: Option<String>,
}

/// A program that can take over.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) path: PathBuf,
    pub(super) file: OwnedFd,
    pub(super) build: Build,
}

/// Answers a probe: one JSON object on stdout. The configuration to check comes on stdin, unless that is a terminal.
pub fn answer_probe() -> std::process::ExitCode {
    let own = build::own();
    let mut text = String::new();
    let config_error = if io::IsTerminal::is_terminal(&io::stdin()) {
        None
    } else {
        match io::stdin().lock().take(16 << 20).read_to_string(&mut text) {
            Ok(0) => None,
            Ok(_) => config::load(&text, "the running configuration")
                .err()
                .map(|faulty| faulty.to_string()),
            Err(error) => Some(format!("the running configuration cannot be read: {error}")),
        }
    };
    let probe = Probe {
        program: PROGRAM.into(),
        version: own.version,
        build: own.build,
        channel: vec![message::FORMAT],
        handover: vec![handover::FORMAT],
        state: vec![carried::FORMAT],
        config_error,
    };
    match serde_json::to_string(&probe) {
        Ok(json) => {
            println!("{json}");
            std::process::ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            std::process::ExitCode::FAILURE
        }
    }
}

impl Candidate {
    /// Finds out whether the program at `path` can take over and would run `config`. Blocks for at most some seconds.
    ///
    /// # Errors
    ///
    /// Cause, effect, next command.
    pub(super) fn check(path: &Path, config: &str) -> Result<Self, String> {
        let refuse = |why: String| format!("{} {why}; nothing was changed", path.display());
        let file = open(path).map_err(refuse)?;
        let said = ask(&file, config).map_err(refuse)?;
        let probe = understand(&said).map_err(refuse)?;
        let build = probe.judge().map_err(refuse)?;
        Ok(Self {
            path: path.to_owned(),
            file: file.into(),
            build,
        })
    }
}

impl Probe {
    /// Whether it can take over from this program.
    fn judge(&self) -> Result<Build, String> {
        let build = Build {
            version: short(&self.version),
            build: short(&self.build),
        };
        if self.program != PROGRAM {
            return Err(format!("is {}, not edged", short(&self.program)));
        }
        for (what, known, wanted) in [
            ("workers' messages", &self.channel, message::FORMAT),
            ("hand-overs", &self.handover, handover::FORMAT),
            ("supervisors' states", &self.state, carried::FORMAT),
        ] {
            if !known.contains(&wanted) {
                return Err(format!(
                    "is edged {build}, which does not understand the {what} of this one (format {wanted}, it knows {known:?}): \
                     it can only be started anew, which cuts sessions: install it, then systemctl restart edged"
                ));
            }
        }
        match &self.config_error {
            Some(error) => Err(format!(
                "is edged {build}, which cannot load the running configuration, so it would not serve:\n{error}\n\
                 apply one that both understand: edgectl config apply"
            )),
            None => Ok(build),
        }
    }
}

/// The file, if it is a program that nobody else could have written.
fn open(path: &Path) -> Result<File, String> {
    if !path.is_absolute() {
        return Err("is not a path from the root, and edged does not know your directory".into());
    }
    let file = OpenOptions::new()
        .read(true)
        // A pipe must not stop the daemon.
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => format!(
                "cannot be opened by edged: {error}; its unit hides /home, /root and /tmp from it: \
                 install the program where edged sees it, such as /usr/bin/edged or /opt"
            ),
            _ => format!("cannot be opened by edged: {error}; look at: ls -l {}", path.display()),
        })?;
    let meta = file
        .metadata()
        .map_err(|error| format!("cannot be looked at: {error}"))?;
    let own = rustix::process::geteuid().as_raw();
    let mode = meta.permissions().mode();
    let shown = path.display();
    if !meta.is_file() {
        return Err("is no regular file; name the program edged".into());
    }
    if mode & 0o111 == 0 {
        return Err(format!("is not executable; chmod 755 {shown}"));
    }
    if meta.uid() != 0 && meta.uid() != own {
        return Err(format!(
            "belongs to user id {}, who could change it at any time; chown root {shown}, or install it as root",
            meta.uid()
        ));
    }
    // Group 0 is root's own.
    if mode & 0o002 != 0 || mode & 0o020 != 0 && meta.gid() != 0 {
        return Err(format!("can be written by others than root; chmod 755 {shown}"));
    }
    if !build::is_program(&file) {
        return Err("is no program for this machine; name the program edged".into());
    }
    Ok(file)
}

/// What the program said and how it ended.
struct Said {
    status: ExitStatus,
    out: Vec<u8>,
    err: Vec<u8>,
}

/// Runs it with [`PROBE`] and the configuration on its standard input.
fn ask(file: &File, config: &str) -> Result<Said, String> {
    let cannot = |error: io::Error| format!("cannot be run: {error}");
    let input = rustix::fs::memfd_create("edged-probe", rustix::fs::MemfdFlags::CLOEXEC)
        .map(File::from)
        .map_err(|error| cannot(error.into()))?;
    std::os::unix::fs::FileExt::write_all_at(&input, config.as_bytes(), 0).map_err(cannot)?;
    let mut program = OsString::from("/proc/self/fd/");
    program.push(file.as_raw_fd().to_string());
    let mut command = Command::new(program);
    command
        .arg0("edged")
        .arg(PROBE)
        .stdin(Stdio::from(input))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let begun = Instant::now();
    let mut child = loop {
        match command.spawn() {
            // Whoever wrote it may have it open for a moment longer.
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && begun.elapsed() < BUSY => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => {
                return Err(format!(
                    "{}; is it built for this machine, and its file system not mounted noexec?",
                    cannot(error)
                ));
            }
            Ok(child) => break child,
        }
    };
    let answer = listen(&mut child, begun + PATIENCE);
    // Its outputs close a moment before it ends.
    let ending = Instant::now() + ENDING;
    while answer.is_ok() && Instant::now() < ending && matches!(child.try_wait(), Ok(None)) {
        std::thread::sleep(Duration::from_millis(2));
    }
    // With whatever it started itself. Its number stays taken as long as it is not waited for, or anything of its group
    // runs.
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
    }
    let status = child.wait().map_err(cannot)?;
    let (out, err) = answer?;
    Ok(Said { status, out, err })
}

/// Reads both outputs until they end.
fn listen(child: &mut Child, until: Instant) -> Result<(Vec<u8>, Vec<u8>), String> {
    let (Some(mut out), Some(mut err)) = (child.stdout.take(), child.stderr.take()) else {
        return Err("cannot be listened to".into());
    };
    let (mut said, mut complained) = (Vec::new(), Vec::new());
    let (mut out_open, mut err_open) = (true, true);
    let mut buffer = [0; 4096];
    while out_open || err_open {
        let left = until.saturating_duration_since(Instant::now());
        let Some(left) = Timespec::try_from(left).ok().filter(|_| !left.is_zero()) else {
            return Err(format!(
                "did not answer within {} s when it was asked whether it is edged",
                PATIENCE.as_secs()
            ));
        };
        let mut polled = Vec::new();
        for (descriptor, open) in [(out.as_fd(), out_open), (err.as_fd(), err_open)] {
            if open {
                polled.push(PollFd::from_borrowed_fd(descriptor, PollFlags::IN));
            }
        }
        match poll(&mut polled, Some(&left)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(format!("cannot be listened to: {error}")),
        }
        let ready: Vec<bool> = polled
            .iter()
            .map(|descriptor| !descriptor.revents().is_empty())
            .collect();
        let mut ready = ready.into_iter();
        let out_ready = out_open && ready.next() == Some(true);
        let err_ready = err_open && ready.next() == Some(true);
        let mut take = |from: &mut dyn Read, into: &mut Vec<u8>| -> Result<bool, String> {
            let length = from
                .read(&mut buffer)
                .map_err(|error| format!("cannot be listened to: {error}"))?;
            into.extend_from_slice(buffer.get(..length).unwrap_or_default());
            if into.len() > MOST {
                return Err("said more than edged would when it was asked whether it is edged".into());
            }
            Ok(length > 0)
        };
        if out_ready {
            out_open = take(&mut out, &mut said)?;
        }
        if err_ready {
            err_open = take(&mut err, &mut complained)?;
        }
    }
    Ok((said, complained))
}

fn understand(said: &Said) -> Result<Probe, String> {
    serde_json::from_slice(&said.out).map_err(|_| {
        let complaint = String::from_utf8_lossy(&said.err);
        let complaint = complaint.lines().next().map(short).filter(|line| !line.is_empty());
        format!(
            "does not answer as edged does ({}{}); name a program edged of a release that can take over while running",
            said.status,
            complaint.map(|line| format!("; it says: {line}")).unwrap_or_default()
        )
    })
}

/// Words of another program, for people.
fn short(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;

    use super::*;

    fn probe() -> Probe {
        Probe {
            program: "edged".into(),
            version: "9.9.9".into(),
            build: "0123456789ab".into(),
            channel: vec![message::FORMAT, message::FORMAT + 1],
            handover: vec![handover::FORMAT],
            state: vec![carried::FORMAT],
            config_error: None,
        }
    }

    #[test]
    fn a_program_that_knows_every_format_can_take_over() {
        let build = probe().judge().expect("good");
        assert_eq!(build.to_string(), "9.9.9 (build 0123456789ab)");
    }

    #[test]
    fn a_program_that_misses_one_format_is_refused_by_its_name() {
        let refused = [
            (
                Probe {
                    channel: vec![message::FORMAT + 1],
                    ..probe()
                },
                "workers' messages",
            ),
            (
                Probe {
                    handover: Vec::new(),
                    ..probe()
                },
                "hand-overs",
            ),
            (
                Probe {
                    state: vec![0],
                    ..probe()
                },
                "supervisors' states",
            ),
            (
                Probe {
                    program: "haproxy".into(),
                    ..probe()
                },
                "is haproxy, not edged",
            ),
            (
                Probe {
                    config_error: Some("edged.toml:3:1: no".into()),
                    ..probe()
                },
                "edged.toml:3:1: no",
            ),
        ];
        for (probe, words) in refused {
            let why = probe.judge().expect_err("refused");
            assert!(why.contains(words), "{why}");
        }
    }

    #[test]
    fn what_is_no_program_of_ours_is_refused_with_the_reason_and_a_remedy() {
        let directory = std::env::temp_dir().join(format!("edged-candidate-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("made");
        let file = |name: &str, content: &[u8], mode: u32| {
            let path = directory.join(name);
            std::fs::write(&path, content).expect("written");
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).expect("set");
            path
        };
        let elf = b"\x7fELF\x02\x01\x01";
        let long = std::fs::read("/proc/self/exe").expect("this program");
        let cases = [
            (PathBuf::from("relative"), "not a path from the root"),
            (directory.join("missing"), "cannot be opened by edged"),
            (directory.clone(), "is no regular file"),
            (file("plain", b"text", 0o644), "is not executable; chmod 755"),
            (file("open", elf, 0o777), "can be written by others"),
            (
                file("script", b"#!/bin/sh\necho {}", 0o755),
                "is no program for this machine",
            ),
            (file("cut", &long[..4096], 0o755), ""),
            (PathBuf::from("/bin/true"), "does not answer as edged does"),
            (
                PathBuf::from("/bin/false"),
                "does not answer as edged does (exit status: 1",
            ),
        ];
        for (path, words) in cases {
            let why = Candidate::check(&path, "version = 1\n").expect_err("refused");
            assert!(why.starts_with(&path.display().to_string()), "{why}");
            assert!(why.contains(words) && why.contains("nothing was changed"), "{why}");
        }
        let _ = std::fs::remove_dir_all(directory);
    }

    #[test]
    fn a_program_that_floods_or_hangs_is_ended() {
        // `yes` takes the argument for an option and complains; both read what the descriptor says.
        let flood = Said {
            status: ExitStatus::default(),
            out: vec![b'y'; 100],
            err: b"no\nmore".to_vec(),
        };
        let why = understand(&flood).expect_err("no JSON");
        assert!(why.contains("it says: no)"), "{why}");
        let mut child = Command::new("/bin/sh")
            .args(["-c", "while :; do echo yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy; done"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("sh");
        let why = listen(&mut child, Instant::now() + PATIENCE).expect_err("a flood");
        assert!(why.contains("said more"), "{why}");
        let _ = child.kill();
        let _ = child.wait();
        let mut child = Command::new("/bin/sleep")
            .arg("60")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("sleep");
        let why = listen(&mut child, Instant::now() + Duration::from_millis(50)).expect_err("silence");
        assert!(why.contains("did not answer"), "{why}");
        let _ = child.kill();
        let _ = child.wait();
    }
}
