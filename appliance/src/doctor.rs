//! `edgectl doctor`: what is wrong with this appliance or this machine, why it matters, and the next command.
//!
//! What is fine is one line per category; what is not has three. A hint is no problem: it does not change the exit code.

mod dns;
mod nat64;

use std::{
    net::{SocketAddr, TcpListener},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use lb::status::State;
use serde::Serialize;
use serde_json::json;

use crate::{
    api::{SCHEMA_VERSION, Status, WorkerStatus},
    cli::{
        Fail,
        out::{Ink, Out, clean, duration, plural},
    },
    client::{Client, ClientError},
    config::{Config, Faulty, load},
    control::{OPERATE_GROUP, READ_GROUP},
};

/// A restart within this time is worth telling.
const RECENT: u64 = 600;
/// Two descriptors for each session and two more while it is spliced; below this a busy edge runs dry.
const DESCRIPTORS: u64 = 65_536;
/// Connections that the kernel keeps until they are accepted: bursts of kubelets after a reboot.
const BACKLOG: u64 = 4096;
const MEMORY: u64 = 64 << 20;
const DISK: u64 = 64 << 20;

/// What `edgectl doctor` was asked for.
#[derive(Debug)]
pub(crate) struct Options {
    /// Before installation.
    pub(crate) pre: bool,
    /// The configuration file.
    pub(crate) config: PathBuf,
    /// The state directory.
    pub(crate) state: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Level {
    /// Fine.
    Ok,
    /// Works, and could be better.
    Hint,
    /// Cannot be told from here: neither fine nor wrong.
    Unknown,
    /// Wrong.
    Problem,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
struct Finding {
    category: &'static str,
    level: Level,
    /// What is so.
    what: String,
    /// Why it matters; empty if all is fine.
    why: String,
    /// The next command; empty if all is fine.
    fix: String,
}

struct Findings {
    category: &'static str,
    all: Vec<Finding>,
}

impl Findings {
    fn ok(&mut self, what: impl Into<String>) {
        self.add(Level::Ok, what, "", "");
    }

    fn hint(&mut self, what: impl Into<String>, why: &str, fix: impl Into<String>) {
        self.add(Level::Hint, what, why, fix);
    }

    fn unknown(&mut self, what: impl Into<String>, why: &str, fix: impl Into<String>) {
        self.add(Level::Unknown, what, why, fix);
    }

    fn problem(&mut self, what: impl Into<String>, why: &str, fix: impl Into<String>) {
        self.add(Level::Problem, what, why, fix);
    }

    fn add(&mut self, level: Level, what: impl Into<String>, why: &str, fix: impl Into<String>) {
        self.all.push(Finding {
            category: self.category,
            level,
            what: what.into(),
            why: why.to_owned(),
            fix: fix.into(),
        });
    }
}

/// Looks at everything and prints it.
pub(crate) async fn run(client: &Client, out: Out, options: &Options) -> Result<u8, Fail> {
    let mut findings = Findings {
        category: "edged",
        all: Vec::new(),
    };
    let config = read(&options.config);
    if options.pre {
        before(&mut findings, config.as_ref().ok().map(|loaded| &loaded.config));
        file(&mut findings, options, &config, true);
    } else {
        let status = reachable(&mut findings, client).await;
        file(&mut findings, options, &config, false);
        if let Some(status) = &status {
            configuration(&mut findings, status);
            workers(&mut findings, &status.workers);
            balancer(&mut findings, status);
            let config = config.as_ref().ok().map(|loaded| &loaded.config);
            dns::run(&mut findings, client, status, config).await;
            nat64::run(&mut findings, status);
            descriptors(&mut findings, &status.workers);
        }
        state(&mut findings, &options.state);
    }
    machine(&mut findings);
    let problems = findings
        .all
        .iter()
        .filter(|finding| finding.level == Level::Problem)
        .count();
    if out.json {
        out.print_json(&json!({ "schema_version": SCHEMA_VERSION, "good": problems == 0, "findings": findings.all }));
    } else {
        out.print(&render(&findings.all, out));
    }
    Ok(u8::from(problems > 0))
}

fn render(findings: &[Finding], out: Out) -> String {
    let mut text = String::new();
    let mut categories: Vec<&str> = Vec::new();
    for finding in findings {
        if !categories.contains(&finding.category) {
            categories.push(finding.category);
        }
    }
    for category in categories {
        let of = || findings.iter().filter(|finding| finding.category == category);
        let fine: Vec<String> = of()
            .filter(|finding| finding.level == Level::Ok)
            .map(|finding| clean(&finding.what))
            .collect();
        if !fine.is_empty() {
            text.push_str(&format!(
                "{} {category}: {}\n",
                out.ink(Ink::Good, "✔"),
                fine.join(", ")
            ));
        }
        for finding in of().filter(|finding| finding.level != Level::Ok) {
            let (ink, mark) = match finding.level {
                Level::Problem => (Ink::Bad, "✘"),
                Level::Unknown => (Ink::Warn, "?"),
                Level::Hint | Level::Ok => (Ink::Warn, "!"),
            };
            let what = finding.what.lines().map(clean).collect::<Vec<_>>().join("\n  ");
            text.push_str(&format!(
                "{} {category}: {}\n",
                out.ink(ink, mark),
                out.ink(Ink::Bold, &what)
            ));
            for (label, line) in [("why", &finding.why), ("fix", &finding.fix)] {
                if !line.is_empty() {
                    text.push_str(&format!("  {label}: {}\n", clean(line)));
                }
            }
        }
    }
    let number = |level| findings.iter().filter(|finding| finding.level == level).count();
    let (problems, hints, unknown) = (number(Level::Problem), number(Level::Hint), number(Level::Unknown));
    let mut parts = vec![if problems == 0 {
        out.ink(Ink::Good, "no problems")
    } else {
        out.ink(Ink::Bad, &plural(problems, "problem"))
    }];
    if hints > 0 {
        parts.push(plural(hints, "hint"));
    }
    if unknown > 0 {
        parts.push(format!("{unknown} could not be checked"));
    }
    text.push_str(&format!("\n{}\n", parts.join(", ")));
    text
}

async fn reachable(findings: &mut Findings, client: &Client) -> Option<Status> {
    let answer = client.get("/v1/status").await.and_then(|value| {
        serde_json::from_value::<Status>(value).map_err(|error| ClientError::Foreign(error.to_string()))
    });
    let why = "nothing is served, or nobody can see what is";
    match answer {
        Ok(status) => {
            findings.ok(format!(
                "answers, version {}, up {}",
                status.version,
                duration(status.uptime_seconds)
            ));
            if status.version != env!("CARGO_PKG_VERSION") {
                findings.hint(
                    format!("edged is {}, edgectl is {}", status.version, env!("CARGO_PKG_VERSION")),
                    "an upgrade was installed and is not running yet, or the other way round",
                    "systemctl restart edged",
                );
            }
            return Some(status);
        }
        Err(ClientError::Denied { .. }) => {
            findings.unknown(
                "this user may not ask edged",
                "most of what follows cannot be checked",
                format!("sudo edgectl doctor; or join the group: sudo usermod -aG {READ_GROUP} $USER"),
            );
        }
        Err(error) => {
            let text = error.to_string();
            let (what, fix) = text.split_once("; ").unwrap_or((&text, "systemctl status edged"));
            findings.problem(what, why, fix);
        }
    }
    None
}

fn read(path: &Path) -> Result<crate::config::Loaded, (bool, String)> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        let denied = error.kind() == std::io::ErrorKind::PermissionDenied;
        (denied, format!("{} cannot be read: {error}", path.display()))
    })?;
    load(&text, &path.display().to_string()).map_err(|faulty| (false, first(&faulty)))
}

/// The first fault; `config check` shows them all.
fn first(faulty: &Faulty) -> String {
    let told = faulty.faults.first().map(ToString::to_string).unwrap_or_default();
    match faulty.faults.len() {
        0 | 1 => told,
        all => format!("{told}\n(and {} more)", all - 1),
    }
}

fn file(findings: &mut Findings, options: &Options, config: &Result<crate::config::Loaded, (bool, String)>, pre: bool) {
    findings.category = "configuration";
    let path = options.config.display();
    match config {
        Ok(loaded) => match loaded.check_files() {
            Ok(_) => findings.ok("the file is good"),
            Err(faulty) => findings.problem(
                first(&faulty),
                "edged cannot load this file",
                format!("edgectl config check {path}"),
            ),
        },
        Err((true, _)) => findings.unknown(
            format!("{path} cannot be read by this user"),
            "whether it is good cannot be told",
            "sudo edgectl doctor",
        ),
        Err((false, error)) if pre && !options.config.exists() => {
            findings.hint(
                format!("there is no configuration yet: {error}"),
                "edged starts with what it says",
                format!("write it, then: edgectl config check {path}"),
            );
        }
        Err((false, error)) => findings.problem(
            error.clone(),
            "edged cannot load this file: it goes on with, or starts with, the last confirmed one",
            format!("edgectl config check {path}"),
        ),
    }
}

fn configuration(findings: &mut Findings, status: &Status) {
    let config = &status.config;
    if config.file_differs == Some(true) {
        findings.problem(
            format!("{} is not what runs (revision {})", config.file, config.revision),
            "a start uses the last confirmed configuration, not this file",
            "edgectl config diff; then apply it or change it back: sudo edgectl config apply",
        );
    } else if config.file_differs.is_none() {
        findings.unknown(
            format!("edged cannot read {}", config.file),
            "whether it is what runs cannot be told",
            format!("ls -l {}", config.file),
        );
    } else {
        findings.ok(format!("revision {} runs", config.revision));
    }
    if let Some(seconds) = config.reverts_in_seconds {
        findings.problem(
            format!("revision {} is not confirmed", config.revision),
            &format!("it is taken back in {}", duration(seconds)),
            "sudo edgectl config confirm",
        );
    }
    if let Some(error) = &config.last_error {
        findings.problem(
            format!("the last attempt to load one failed:\n{error}"),
            "what runs is older than what was wanted",
            "edgectl config check",
        );
    }
}

fn workers(findings: &mut Findings, workers: &[WorkerStatus]) {
    findings.category = "workers";
    for worker in workers {
        let role = &worker.role;
        let end = worker.last_end.as_deref().unwrap_or("for an unknown reason");
        if worker.state != "running" {
            findings.problem(
                format!("{role} is {}; it ended last: {end}", worker.state),
                "what it serves is not served",
                "journalctl -u edged -n 100",
            );
        } else if worker.restarts > 0 && worker.uptime_seconds < RECENT {
            findings.problem(
                format!(
                    "{role} was started again {} ago ({} in all); it ended last: {end}",
                    duration(worker.uptime_seconds),
                    plural_times(worker.restarts)
                ),
                "each end costs the connections it carried",
                "journalctl -u edged -n 100",
            );
        } else {
            findings.ok(format!("{role} runs"));
        }
    }
}

fn plural_times(number: u64) -> String {
    if number == 1 {
        "once".into()
    } else {
        format!("{number} times")
    }
}

fn balancer(findings: &mut Findings, status: &Status) {
    findings.category = "balancer";
    let Some(lb) = &status.lb else {
        return findings.problem(
            "the balancer does not answer",
            "its state is unknown",
            "journalctl -u edged -n 100",
        );
    };
    for frontend in &lb.frontends {
        let out: Vec<_> = frontend
            .backends
            .iter()
            .filter(|backend| !matches!(backend.state, State::Healthy | State::Drained))
            .collect();
        let healthy = frontend
            .backends
            .iter()
            .filter(|backend| backend.state == State::Healthy)
            .count();
        let all = frontend.backends.len();
        let name = &frontend.name;
        for backend in &out {
            let reason = if backend.reason.is_empty() {
                String::new()
            } else {
                format!(": {}", backend.reason)
            };
            let why = if healthy == 0 {
                "no backend of this frontend is healthy: clients are not served".to_owned()
            } else {
                format!("{healthy} of {all} carry the load alone")
            };
            findings.problem(
                format!("{name}/{} is {}{reason}", backend.backend, backend.state.name()),
                &why,
                format!("edgectl lb why '{name}/{}'", backend.backend),
            );
        }
        for backend in frontend
            .backends
            .iter()
            .filter(|backend| backend.state == State::Drained)
        {
            let why = "a drain outlives restarts, and is easily forgotten";
            findings.hint(
                format!("{name}/{} is drained", backend.backend),
                why,
                format!("edgectl lb undrain '{name}/{}'", backend.backend),
            );
        }
        if healthy == 0 && out.is_empty() {
            findings.problem(
                format!("{name} has no backend in use"),
                "clients are not served",
                "edgectl lb show",
            );
        } else if out.is_empty() {
            findings.ok(format!("{name} {healthy}/{all} healthy"));
        }
        if frontend.local_errors_total > 0 {
            findings.hint(
                format!("{name} met {} local errors", frontend.local_errors_total),
                "connections failed for want of descriptors, ports or memory of this machine",
                "journalctl -u edged -n 100; ss -s",
            );
        }
    }
}

/// What the balancer's own process may open, which is what counts.
fn descriptors(findings: &mut Findings, workers: &[WorkerStatus]) {
    findings.category = "machine";
    let Some(pid) = workers
        .iter()
        .find(|worker| worker.role == "lb")
        .and_then(|worker| worker.pid)
    else {
        return;
    };
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    let soft = limits.lines().find_map(|line| {
        line.strip_prefix("Max open files")?
            .split_whitespace()
            .next()
            .map(str::to_owned)
    });
    match soft.as_deref() {
        Some("unlimited") => findings.ok("no descriptor limit"),
        Some(text) => match text.parse::<u64>() {
            Ok(limit) if limit >= DESCRIPTORS => findings.ok(format!("{limit} descriptors")),
            Ok(limit) => findings.problem(
                format!("the balancer may open {limit} descriptors"),
                &format!(
                    "a session takes two to four: past about {} sessions new ones fail",
                    limit / 4
                ),
                "set LimitNOFILE=1048576 for the unit: systemctl edit edged; systemctl restart edged",
            ),
            Err(_) => {}
        },
        None => findings.unknown(
            "the descriptor limit cannot be read",
            "whether it is enough cannot be told",
            "sudo edgectl doctor",
        ),
    }
}

fn state(findings: &mut Findings, dir: &Path) {
    findings.category = "state";
    let shown = dir.display();
    let metadata = match std::fs::metadata(dir) {
        Ok(metadata) if metadata.is_dir() => metadata,
        Ok(_) => {
            return findings.problem(
                format!("{shown} is no directory"),
                "nothing can be kept across a restart",
                format!("mv {shown} {shown}.old; systemctl restart edged"),
            );
        }
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            return findings.unknown(
                format!("{shown} cannot be looked at by this user"),
                "whether it is in order cannot be told",
                "sudo edgectl doctor",
            );
        }
        Err(error) => {
            return findings.problem(
                format!("{shown}: {error}"),
                "nothing can be kept across a restart",
                "systemctl restart edged, which makes it",
            );
        }
    };
    if metadata.permissions().mode() & 0o077 != 0 {
        findings.problem(
            format!("{shown} can be entered by others"),
            "it holds configurations and, with later services, keys",
            format!("chmod 700 {shown}"),
        );
    }
    match rustix::fs::statvfs(dir) {
        Ok(disk) if disk.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) => {
            findings.problem(
                format!("{shown} is mounted read-only"),
                "no configuration can be confirmed, no drain kept",
                "dmesg | tail; findmnt -T /var/lib/edged",
            );
        }
        Ok(disk) if disk.f_bavail.saturating_mul(disk.f_frsize) < DISK => {
            findings.problem(
                format!("less than 64 MiB are free at {shown}"),
                "soon no configuration can be confirmed, no drain kept",
                format!("df -h {shown}"),
            );
        }
        Ok(_) => findings.ok("directory writable, space enough"),
        Err(error) => findings.unknown(
            format!("{shown}: {error}"),
            "its free space cannot be told",
            format!("df {shown}"),
        ),
    }
}

/// What matters before and after installation alike.
fn machine(findings: &mut Findings) {
    findings.category = "machine";
    memory(findings);
    match synchronised() {
        Some(true) => findings.ok("clock synchronised"),
        Some(false) => findings.hint(
            "the clock is not synchronised",
            "certificates, logs and the history of configurations go by it",
            "timedatectl set-ntp true; timedatectl status",
        ),
        None => findings.unknown(
            "the kernel does not say whether the clock is synchronised",
            "certificates, logs and the history of configurations go by it",
            "timedatectl status",
        ),
    }
    match number("/proc/sys/net/core/somaxconn") {
        Some(backlog) if backlog < BACKLOG => findings.hint(
            format!("net.core.somaxconn is {backlog}"),
            "a burst of connections, as after a reboot of all nodes, overflows the accept queue",
            format!(
                "echo 'net.core.somaxconn = {BACKLOG}' | sudo tee /etc/sysctl.d/60-edged.conf; sudo sysctl --system"
            ),
        ),
        Some(backlog) => findings.ok(format!("accept queue {backlog}")),
        None => {}
    }
    match number("/proc/sys/net/ipv4/tcp_migrate_req") {
        Some(0) => findings.hint(
            "net.ipv4.tcp_migrate_req is 0",
            "when a listener closes, connections waiting in its queue are reset instead of going to its siblings",
            "echo 'net.ipv4.tcp_migrate_req = 1' | sudo tee /etc/sysctl.d/60-edged-migrate.conf; sudo sysctl --system",
        ),
        Some(_) => findings.ok("queued connections migrate"),
        None => {}
    }
}

fn number(path: &str) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn memory(findings: &mut Findings) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        Some(line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? << 10)
    };
    let (Some(total), Some(available)) = (field("MemTotal"), field("MemAvailable")) else {
        return;
    };
    if available < MEMORY.max(total / 20) {
        findings.problem(
            format!("{} MiB of {} MiB memory are available", available >> 20, total >> 20),
            "the kernel ends processes when it runs out, and each session needs buffers",
            "ps aux --sort=-rss | head",
        );
    } else {
        findings.ok(format!("{} MiB memory available", available >> 20));
    }
}

/// Whether the kernel's clock is disciplined (adjtimex(2)); `None` if it may not be asked.
fn synchronised() -> Option<bool> {
    // SAFETY: timex is plain integers, for which all zeroes is a value.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `timex` is valid for reads and writes; `modes` is 0, so nothing is set and no right is needed.
    let state = unsafe { libc::adjtimex(&raw mut timex) };
    if state < 0 {
        return None;
    }
    Some(state != libc::TIME_ERROR && timex.status & libc::STA_UNSYNC == 0)
}

/// What a machine must have before edged is installed.
fn before(findings: &mut Findings, config: Option<&Config>) {
    findings.category = "kernel";
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    findings.ok(format!("Linux {release}"));
    match landlock_abi() {
        Some(abi) if abi > 0 => findings.ok(format!("Landlock ABI {abi}")),
        Some(_) => findings.hint(
            "Landlock is not enabled",
            "workers are confined by user, capabilities and seccomp, but not from files",
            "boot with lsm=landlock,... on the kernel's command line",
        ),
        None => findings.unknown(
            "Landlock cannot be tried",
            "workers may not be kept from files",
            "cat /sys/kernel/security/lsm",
        ),
    }
    match std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail") {
        Ok(actions) if actions.contains("kill_process") => findings.ok("seccomp"),
        _ => findings.problem(
            "the kernel has no seccomp filters",
            "workers could make any system call",
            "use a kernel with CONFIG_SECCOMP_FILTER=y",
        ),
    }
    let off =
        std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6").map_or(true, |text| text.trim() != "0");
    if off {
        findings.problem(
            "IPv6 is off",
            "listeners and backends with IPv6 addresses cannot work",
            "sudo sysctl net.ipv6.conf.all.disable_ipv6=0",
        );
    } else {
        findings.ok("IPv6");
    }
    findings.category = "users";
    let has = |file: &str, name: &str| {
        std::fs::read_to_string(file)
            .unwrap_or_default()
            .lines()
            .any(|line| line.split(':').next() == Some(name))
    };
    if has("/etc/passwd", "edged") {
        findings.ok("edged");
    } else {
        findings.problem(
            "there is no user \"edged\"",
            "workers run under it, without a right of their own",
            "sudo useradd --system --no-create-home --shell /usr/sbin/nologin edged",
        );
    }
    for (group, may) in [
        (READ_GROUP, "look without sudo"),
        (OPERATE_GROUP, "operate without sudo"),
    ] {
        if has("/etc/group", group) {
            findings.ok(group);
        } else {
            findings.hint(
                format!("there is no group \"{group}\""),
                &format!("its members may {may}; without it only root may"),
                format!("sudo groupadd --system {group}"),
            );
        }
    }
    findings.category = "ports";
    let Some(config) = config else {
        return findings.unknown(
            "no ports are known: there is no good configuration yet",
            "whether they are free cannot be told",
            "edgectl config check",
        );
    };
    let frontends = config.lb.frontend.iter().flat_map(|frontend| frontend.listen.iter());
    for at in config.control.metrics.iter().chain(&config.lb.health).chain(frontends) {
        port(findings, at.value);
    }
    let listen = config.dns64.iter().flat_map(|dns64| &dns64.listen);
    dns::ports(findings, listen.map(|at| at.value));
}

fn port(findings: &mut Findings, address: SocketAddr) {
    let Err(error) = TcpListener::bind(address) else {
        return findings.ok(format!("{address} is free"));
    };
    match error.kind() {
        std::io::ErrorKind::AddrInUse => findings.problem(
            format!("{address} is in use"),
            "edged cannot listen there",
            format!("see by whom: sudo ss -tlnp 'sport = :{}'", address.port()),
        ),
        std::io::ErrorKind::PermissionDenied => findings.unknown(
            format!("{address} cannot be tried by this user"),
            "ports below 1024 need root",
            "sudo edgectl doctor --pre",
        ),
        std::io::ErrorKind::AddrNotAvailable => findings.hint(
            format!("no interface has the address {}", address.ip()),
            "nobody reaches a listener there until one has it",
            "ip address show",
        ),
        _ => findings.problem(
            format!("{address}: {error}"),
            "edged cannot listen there",
            "ip address show",
        ),
    }
}

/// The Landlock ABI in use; 0 = none. A thread of its own is restricted to find out, since the kernel's answer to a
/// real attempt is the one that counts.
fn landlock_abi() -> Option<i32> {
    use landlock::{Access, AccessFs, LandlockStatus, Ruleset, RulesetAttr};
    let attempt = || {
        let ruleset = Ruleset::default()
            .handle_access(AccessFs::from_all(landlock::ABI::V1))
            .ok()?
            .create()
            .ok()?;
        match ruleset.restrict_self().ok()?.landlock {
            LandlockStatus::Available {
                effective_abi,
                kernel_abi,
            } => Some(kernel_abi.unwrap_or(effective_abi as i32)),
            LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => Some(0),
        }
    };
    std::thread::spawn(attempt).join().ok().flatten()
}
