//! One measurement: a client process, and the CPU time of everybody while it works.

use std::{
    env,
    fs::{self, File},
    io::{BufRead, BufReader, Write},
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

use super::report::{Shares, Way};
use crate::{
    procs::{CpuMark, MachineMark},
    sandbox::{self, FOLDER},
};

/// A `bench lb-client`, ready to work; killed when dropped.
pub(crate) struct Client {
    child: Child,
    lines: mpsc::Receiver<String>,
    log: String,
}

/// What one measurement gave.
pub(crate) struct Measured {
    result: Value,
    /// CPU seconds of the balancer's processes, if there is one.
    pub(crate) balancer: Option<f64>,
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
    /// New connections until `time` is over or `count` were made.
    pub(crate) fn exchange(target: SocketAddr, in_flight: u64, time: Duration, count: u64) -> Result<Self> {
        Self::start("exchange", target, &[in_flight, millis(time), count])
    }

    /// Bulk data until together `bytes` have gone or `time` is over.
    pub(crate) fn bulk(target: SocketAddr, way: Way, bytes: u64, time: Duration) -> Result<Self> {
        Self::start(
            if way.up { "up" } else { "down" },
            target,
            &[way.streams, bytes, millis(time)],
        )
    }

    /// Idle sessions: ready, go, ready once all are open, go, result.
    pub(crate) fn hold(target: SocketAddr, sessions: u64) -> Result<Self> {
        Self::start("hold", target, &[sessions])
    }

    fn start(mode: &str, target: SocketAddr, numbers: &[u64]) -> Result<Self> {
        let log = format!("{FOLDER}/client.log");
        let mut command = Command::new(env::current_exe().context("cannot find this program's own file")?);
        command
            .args(["lb-client", mode, &target.to_string()])
            .args(numbers.iter().map(u64::to_string));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(File::create(&log).with_context(|| format!("cannot write {log}"))?);
        // SAFETY: the closure makes one prctl call: no allocation, no lock.
        unsafe { command.pre_exec(sandbox::die_with_parent) };
        let mut child = command.spawn().context("cannot start a client")?;
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
    pub(crate) fn watch(mut self, balancer: Option<i32>, backend: i32, length: Duration) -> Result<Measured> {
        let client = Pid::from_child(&self.child).as_raw_nonzero().get();
        let mark = || -> Result<_> {
            let balancer = balancer
                .map(CpuMark::of)
                .transpose()
                .context("the balancer has ended")?;
            Ok((
                balancer,
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
        let balancer = match (&before.0, &after.0) {
            (Some(before), Some(after)) => Some(before.until(after)?),
            _ => None,
        };
        let (client, backend) = (before.1.until(&after.1)?, before.2.until(&after.2)?);
        let machine = before.3.until(after.3);
        let ours = balancer.unwrap_or(0.0) + client + backend;
        let shares = Shares {
            balancer: balancer.unwrap_or(0.0) / seconds,
            client: client / seconds,
            backend: backend / seconds,
            idle: machine.idle / seconds,
            stolen: machine.stolen / seconds,
            // Ticks of 10 ms against exact times: a little below zero is zero.
            elsewhere: ((machine.total - machine.idle - machine.stolen - ours) / seconds).max(0.0),
        };
        Ok(Measured {
            result,
            balancer,
            shares,
        })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
