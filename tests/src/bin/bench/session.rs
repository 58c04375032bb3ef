//! One measurement: a client process, and the CPU time of everybody while it works.
//!
//! A client warms up, says "ready", waits for a line on stdin, works, and prints one JSON object. It then waits for the end
//! of stdin, so that its own CPU time can still be read. [`Client`] is the side of the benchmark; [`ready`], [`wait_for_line`]
//! and [`Errors`] are that of the client.

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File},
    io::{self, BufRead, BufReader, Write},
    net::SocketAddr,
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Pid;
use serde_json::Value;

use crate::{
    procs::{CpuMark, MachineMark},
    sandbox::{self, FOLDER},
    tally::Shares,
};

/// A client process of a benchmark, ready to work; killed when dropped.
pub(crate) struct Client {
    child: Child,
    lines: mpsc::Receiver<String>,
    log: String,
}

/// What one measurement gave.
pub(crate) struct Measured {
    result: Value,
    /// CPU seconds of the server's processes, if there is one.
    pub(crate) server: Option<f64>,
    /// Who used the cores.
    pub(crate) shares: Shares,
}

impl Measured {
    /// A field of the client's result.
    pub(crate) fn number(&self, key: &str) -> Result<f64> {
        self.result[key]
            .as_f64()
            .with_context(|| format!("the client gave no {key}"))
    }
}

impl Client {
    /// Starts `bench COMMAND MODE TARGET NUMBERS...` and waits until it is ready.
    pub(crate) fn start(command: &str, mode: &str, target: SocketAddr, numbers: &[u64]) -> Result<Self> {
        let log = format!("{FOLDER}/client.log");
        let mut program = Command::new(env::current_exe().context("cannot find this program's own file")?);
        program
            .args([command, mode, &target.to_string()])
            .args(numbers.iter().map(u64::to_string));
        program.stdin(Stdio::piped()).stdout(Stdio::piped());
        program.stderr(File::create(&log).with_context(|| format!("cannot write {log}"))?);
        // SAFETY: the closure makes one prctl call: no allocation, no lock.
        unsafe { program.pre_exec(sandbox::die_with_parent) };
        let mut child = program.spawn().context("cannot start a client")?;
        let stdout = child.stdout.take().context("a client has no stdout")?;
        let (sender, lines) = mpsc::channel();
        // Ends with the client's stdout.
        thread::spawn(move || {
            BufReader::new(stdout)
                .lines()
                .map_while(Result::ok)
                .try_for_each(|line| sender.send(line))
        });
        let client = Self { child, lines, log };
        client.ready(Duration::from_secs(15))?;
        Ok(client)
    }

    fn line(&self, within: Duration) -> Result<String> {
        self.lines.recv_timeout(within).map_err(|error| match error {
            mpsc::RecvTimeoutError::Timeout => anyhow::anyhow!("the client was not done within {} s", within.as_secs()),
            mpsc::RecvTimeoutError::Disconnected => {
                let said = fs::read_to_string(&self.log).unwrap_or_default();
                anyhow::anyhow!("{}", said.trim().trim_start_matches("bench: "))
            }
        })
    }

    /// Waits until the client has prepared its next step.
    pub(crate) fn ready(&self, within: Duration) -> Result<()> {
        let line = self.line(within)?;
        ensure!(line == "ready", "the client said \"{line}\" instead of being ready");
        Ok(())
    }

    /// Lets it do its next step.
    pub(crate) fn go(&mut self) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("a client has no stdin")?;
        stdin.write_all(b"\n").context("the client has ended")
    }

    /// Its result; any error it counted is an error here.
    pub(crate) fn result(&self, within: Duration) -> Result<Value> {
        let line = self.line(within)?;
        let result: Value = serde_json::from_str(&line).with_context(|| format!("the client said \"{line}\""))?;
        let errors = result["errors"].as_object().context("the client counted no errors")?;
        if !errors.is_empty() {
            let list: Vec<String> = errors
                .iter()
                .map(|(error, count)| format!("{count} x {error}"))
                .collect();
            bail!("{}", list.join("; "));
        }
        Ok(result)
    }

    /// Lets it work for about `length`, between two looks at everybody's CPU time.
    pub(crate) fn watch(mut self, server: Option<i32>, backend: i32, length: Duration) -> Result<Measured> {
        let client = Pid::from_child(&self.child).as_raw_nonzero().get();
        let mark = || -> Result<_> {
            let server = server.map(CpuMark::of).transpose().context("the server has ended")?;
            Ok((
                server,
                CpuMark::of(client)?,
                CpuMark::of(backend)?,
                MachineMark::now()?,
                Instant::now(),
            ))
        };
        let before = mark()?;
        self.go()?;
        let result = self.result(length + Duration::from_secs(15))?;
        // The client has seen the end; closing the last sessions belongs to them too.
        thread::sleep(Duration::from_millis(10));
        let after = mark()?;

        let seconds = after.4.duration_since(before.4).as_secs_f64();
        let server = match (&before.0, &after.0) {
            (Some(before), Some(after)) => Some(before.until(after)?),
            _ => None,
        };
        let (client, backend) = (before.1.until(&after.1)?, before.2.until(&after.2)?);
        let machine = before.3.until(after.3);
        let ours = server.unwrap_or(0.0) + client + backend;
        let shares = Shares {
            server: server.unwrap_or(0.0) / seconds,
            client: client / seconds,
            backend: backend / seconds,
            idle: machine.idle / seconds,
            stolen: machine.stolen / seconds,
            // Ticks of 10 ms against exact times: a little below zero is zero.
            elsewhere: ((machine.total - machine.idle - machine.stolen - ours) / seconds).max(0.0),
        };
        Ok(Measured { result, server, shares })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// As clients take it.
pub(crate) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The client's side: says that the next step is prepared, and waits for it to be asked for.
pub(crate) fn ready() -> Result<()> {
    println!("ready");
    wait_for_line()
}

/// The client's side: waits for a line, or for the end of stdin.
pub(crate) fn wait_for_line() -> Result<()> {
    io::stdin()
        .lock()
        .read_line(&mut String::new())
        .context("cannot read stdin")?;
    Ok(())
}

/// Failures by what happened.
#[derive(Default)]
pub(crate) struct Errors(pub(crate) BTreeMap<String, u64>);

impl Errors {
    /// Counts one more.
    pub(crate) fn add(&mut self, error: impl ToString) {
        *self.0.entry(error.to_string()).or_default() += 1;
    }

    /// Of all kinds.
    pub(crate) fn count(&self) -> u64 {
        self.0.values().sum()
    }

    /// For people.
    pub(crate) fn list(&self) -> String {
        self.0
            .iter()
            .map(|(error, count)| format!("{count} x {error}"))
            .collect::<Vec<_>>()
            .join("; ")
    }
}
