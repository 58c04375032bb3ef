//! What speaks DNS beside the edge: dig and nsupdate as users have them, unbound and named as servers, and a load of queries.

use std::{
    fs,
    io::{self, ErrorKind},
    net::{Ipv6Addr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    Node, Process,
    edge::{Edge, Said, say},
    lab::need_tool,
    tls, wait_for, wait_until,
};

/// The port of DNS.
pub const PORT: u16 = 53;
/// The port of DNS over TLS.
pub const TLS_PORT: u16 = 853;
/// How long a server may take to start, and a tool to end.
const PATIENCE: Duration = Duration::from_secs(10);
/// Threads of a load; each has one query under way.
const ASKERS: usize = 16;
/// How long a client waits before it asks for the second and last time, as glibc does: only what is lost is asked twice, and
/// not what a machine holds up that is busy with others.
const CLIENT_PATIENCE: Duration = Duration::from_secs(5);

/// One message as dig shows it.
#[derive(Clone, Debug)]
pub struct Reply {
    /// `NOERROR`, `NXDOMAIN`, ...
    pub status: String,
    /// `qr`, `aa`, `ad`, ...
    pub flags: Vec<String>,
    /// Answer section.
    pub answers: Vec<Record>,
    /// Authority section.
    pub authorities: Vec<Record>,
    /// All that dig wrote.
    pub text: String,
}

/// One record as dig shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Owner, with a final dot.
    pub name: String,
    /// Seconds.
    pub ttl: u32,
    /// `AAAA`, `PTR`, ...
    pub kind: String,
    /// As in a zone file.
    pub data: String,
}

/// Asks `server` with dig from `node`: two tries of five seconds, unless `arguments` say otherwise.
///
/// # Errors
///
/// If there is no answer, or more than one message in it.
pub fn dig(node: &Node, server: SocketAddr, arguments: &[&str]) -> Result<Reply> {
    let said = dig_says(node, server, arguments)?;
    ensure!(said.code == Some(0), "dig {arguments:?}: {said}");
    Reply::parse(&said.out).with_context(|| format!("dig {arguments:?}: {said}"))
}

/// As [`dig`], for those who expect silence or want the words.
///
/// # Errors
///
/// If dig cannot be run.
pub fn dig_says(node: &Node, server: SocketAddr, arguments: &[&str]) -> Result<Said> {
    let mut command = node.command(need_tool("dig", "bind9-dnsutils")?);
    // A file of the machine's user must not change what is asked.
    command.args(["-r", &format!("@{}", server.ip()), "-p", &server.port().to_string()]);
    command.args(["+time=5", "+tries=2"]).args(arguments);
    say(&mut command, Duration::from_secs(30))
}

impl Reply {
    fn parse(text: &str) -> Result<Self> {
        let header = field(text, ";; ->>HEADER<<- ").context("no header")?;
        let status = field(header, "status: ").and_then(|rest| rest.split(',').next());
        let flags = field(text, ";; flags: ").and_then(|rest| rest.split(';').next());
        Ok(Self {
            status: status.context("no status")?.to_owned(),
            flags: flags
                .context("no flags")?
                .split_whitespace()
                .map(str::to_owned)
                .collect(),
            answers: section(text, ";; ANSWER SECTION:"),
            authorities: section(text, ";; AUTHORITY SECTION:"),
            text: text.to_owned(),
        })
    }

    /// Whether a flag is set.
    pub fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|set| set == flag)
    }

    /// The data of the answers of one type, sorted.
    pub fn data(&self, kind: &str) -> Vec<&str> {
        let records = self.answers.iter().filter(|record| record.kind == kind);
        let mut data: Vec<&str> = records.map(|record| record.data.as_str()).collect();
        data.sort_unstable();
        data
    }

    /// The serial of a zone's SOA in the answer.
    pub fn serial(&self) -> Option<u32> {
        self.data("SOA").first()?.split(' ').nth(2)?.parse().ok()
    }
}

/// The rest of the line behind the first `key`.
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(key)?;
    rest.lines().next()
}

fn section(text: &str, head: &str) -> Vec<Record> {
    let lines = text.lines().skip_while(|line| *line != head).skip(1);
    let lines = lines.take_while(|line| !line.is_empty());
    let record = |line: &str| {
        let mut fields = line.split_whitespace();
        let (name, ttl, _, kind) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        Some(Record {
            name: name.to_owned(),
            ttl: ttl.parse().ok()?,
            kind: kind.to_owned(),
            data: fields.collect::<Vec<_>>().join(" "),
        })
    };
    lines.filter_map(record).collect()
}

/// A key of a node, as `edgectl dns key add` makes it.
#[derive(Clone, Debug)]
pub struct Key(PathBuf);

impl Key {
    /// Makes a key for `node` with `algorithm`.
    ///
    /// # Errors
    ///
    /// What `edgectl` says.
    pub fn add(edge: &Edge, node: &str, algorithm: &str) -> Result<Self> {
        let file = edge.node().fresh_file(&format!("{node}.key"));
        let path = file.display().to_string();
        let said = edge.ctl(&["dns", "key", "add", node, "--algorithm", algorithm, "--out", &path])?;
        ensure!(said.code == Some(0), "{said}");
        Ok(Self(file))
    }

    /// A key in a file.
    pub fn at(file: &Path) -> Self {
        Self(file.to_owned())
    }

    /// Its file.
    pub fn file(&self) -> &Path {
        &self.0
    }
}

/// Runs nsupdate on `node` with `lines` and `send` after them; `options` such as `-v` for TCP.
///
/// # Errors
///
/// If it cannot be run.
pub fn nsupdate(node: &Node, server: SocketAddr, key: Option<&Key>, options: &[&str], lines: &str) -> Result<Said> {
    let script = node.fresh_file("nsupdate");
    let head = format!("server {} {}", server.ip(), server.port());
    fs::write(&script, format!("{head}\n{lines}\nsend\n"))?;
    let mut command = node.command(need_tool("nsupdate", "bind9-dnsutils")?);
    if let Some(key) = key {
        command.arg("-k").arg(key.file());
    }
    command.args(options).arg(&script);
    say(&mut command, Duration::from_secs(20))
}

/// As [`nsupdate`], and again as long as it is told BADTIME: after a start of its worker `edged` takes what a key signs
/// within the second of its last update for a replay, and so it does with the ninth update of a key in one second.
///
/// # Errors
///
/// If it cannot be run, or is told so for long.
pub fn nsupdate_patient(node: &Node, server: SocketAddr, key: &Key, options: &[&str], lines: &str) -> Result<Said> {
    wait_for("an update that is no replay", PATIENCE, || {
        match nsupdate(node, server, Some(key), options, lines) {
            Ok(said) if said.err.contains("BADTIME") => None,
            said => Some(said),
        }
    })?
}

/// unbound, which knows what its configuration says and asks nobody.
#[derive(Debug)]
pub struct Unbound {
    process: Process,
}

impl Unbound {
    /// Starts it on port 53 of `node`, and with `identity` on port 853; `data` are lines of its section `server`.
    ///
    /// # Errors
    ///
    /// If it does not come to answer; the message has its last words.
    pub fn start(node: &Node, data: &str, identity: Option<&tls::Files>) -> Result<Self> {
        let program = need_tool("unbound", "unbound")?;
        let mut config = format!(
            "server:\n  directory: \"/\"\n  chroot: \"\"\n  username: \"\"\n  pidfile: \"\"\n  use-syslog: no\n  \
             do-daemonize: no\n  verbosity: 1\n  num-threads: 1\n  module-config: \"iterator\"\n  interface: {}@{PORT}\n  \
             access-control: ::/0 allow\n  access-control: 0.0.0.0/0 allow\n  unblock-lan-zones: yes\n{data}\n",
            node.ip()
        );
        if let Some(files) = identity {
            config += &format!(
                "  interface: {}@{TLS_PORT}\n  tls-service-pem: \"{}\"\n  tls-service-key: \"{}\"\n",
                node.ip(),
                files.cert.display(),
                files.key.display()
            );
        }
        config += "remote-control:\n  control-enable: no\n";
        let file = node.file("unbound.conf");
        fs::write(&file, config)?;
        let mut command = node.command(program);
        command.args(["-d", "-p", "-c"]).arg(&file);
        let process = node.spawn("unbound", command)?;
        let mut unbound = Self { process };
        serves(node, &mut unbound.process, "version.server CH TXT")?;
        Ok(unbound)
    }

    /// Kills it (signal 9).
    pub fn kill(&mut self) {
        self.process.kill();
    }
}

/// named, which is the authority of some zones and asks nobody else.
#[derive(Debug)]
pub struct Named {
    process: Process,
    folder: PathBuf,
}

impl Named {
    /// Starts it on port 53 of `node` with zones: a name, further lines of the zone's statement, and its records.
    ///
    /// # Errors
    ///
    /// If it does not come to answer; the message has its last words.
    pub fn start(node: &Node, zones: &[(&str, &str, &str)]) -> Result<Self> {
        let program = need_tool("named", "bind9")?;
        let folder = node.file("named");
        fs::create_dir_all(&folder)?;
        let mut config = format!(
            "options {{ directory \"{}\"; pid-file none; session-keyfile none; listen-on {{ none; }}; listen-on-v6 {{ {}; }};\n\
             recursion yes; allow-query {{ any; }}; allow-recursion {{ any; }}; dnssec-validation no; empty-zones-enable no;\n\
             minimal-responses yes; }};\ncontrols {{ }};\n",
            folder.display(),
            node.ip()
        );
        for (name, lines, records) in zones {
            let file = folder.join(format!("{name}.zone"));
            fs::write(
                &file,
                format!(
                    "$TTL 300\n@ SOA ns.invalid. admin.invalid. 1 3600 600 86400 60\n@ NS ns.invalid.\n{records}\n"
                ),
            )?;
            config += &format!(
                "zone \"{name}\" {{ type primary; file \"{}\"; {lines} }};\n",
                file.display()
            );
        }
        let file = folder.join("named.conf");
        fs::write(&file, config)?;
        let mut command = node.command(program);
        // In the foreground, with its log on standard error.
        command.args(["-g", "-n", "1", "-c"]).arg(&file);
        let process = node.spawn("named", command)?;
        let mut named = Self { process, folder };
        serves(node, &mut named.process, "version.bind CH TXT")?;
        Ok(named)
    }

    /// A file of its folder, in which it keeps its keys.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Kills it (signal 9).
    pub fn kill(&mut self) {
        self.process.kill();
    }
}

fn serves(node: &Node, process: &mut Process, question: &str) -> Result<()> {
    let question: Vec<&str> = question.split(' ').chain(["+time=1", "+tries=1"]).collect();
    let begin = Instant::now();
    wait_until("the name server answers", PATIENCE, || {
        !process.running() || dig_says(node, node.at(PORT), &question).is_ok_and(|said| said.code == Some(0))
    })
    .with_context(|| crate::process::tail(&process.log(), 20))?;
    if !process.running() {
        bail!(
            "the name server ended after {:?}:\n{}",
            begin.elapsed(),
            crate::process::tail(&process.log(), 20)
        );
    }
    Ok(())
}

/// Queries for AAAA at a steady rate, each from a socket of its own and repeated once after [`CLIENT_PATIENCE`], as the
/// resolver of a C library does it.
#[derive(Debug)]
pub struct Queries {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    server: SocketAddr,
    names: Vec<String>,
    expected: Vec<Ipv6Addr>,
    begin: Instant,
    every: Duration,
    next: AtomicUsize,
    stop: AtomicBool,
    seen: Mutex<Vec<Asked>>,
}

/// One query and what came of it.
#[derive(Clone, Debug)]
pub struct Asked {
    /// When it was first sent.
    pub at: Instant,
    /// From then to its answer, or to the end of patience.
    pub took: Duration,
    /// How often it was sent.
    pub sent: u8,
    /// Which of the expected addresses was in the answer; or why there was none.
    pub outcome: Result<usize, String>,
}

impl Queries {
    /// Starts to ask `server` from `node` for `names` in turn, so many times a second; a good answer has one of `expected`.
    pub fn start(node: &Node, server: SocketAddr, per_second: u32, names: &[&str], expected: &[Ipv6Addr]) -> Self {
        let shared = Arc::new(Shared {
            server,
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            expected: expected.to_vec(),
            begin: Instant::now(),
            every: Duration::from_secs(1) / per_second,
            next: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            seen: Mutex::default(),
        });
        let threads = (0..ASKERS).map(|_| {
            let shared = Arc::clone(&shared);
            // A thread belongs to the namespace that it was started in.
            node.enter(move || thread::spawn(move || shared.ask()))
        });
        let threads = threads.collect();
        Self { shared, threads }
    }

    /// What has come of the queries so far.
    pub fn so_far(&self) -> Vec<Asked> {
        self.shared.seen.lock().expect("no panic while it is held").clone()
    }

    /// Waits for `count` more answers.
    ///
    /// # Errors
    ///
    /// If they do not come.
    pub fn more(&self, count: usize) -> Result<()> {
        let answered = || self.so_far().iter().filter(|asked| asked.outcome.is_ok()).count();
        let before = answered();
        wait_until(&format!("{count} more answers"), PATIENCE, || {
            answered() >= before + count
        })?;
        Ok(())
    }

    /// Stops, waits for those under way, and reports.
    pub fn stop(mut self) -> Vec<Asked> {
        self.end();
        self.so_far()
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Queries {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn ask(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let due = self.begin + self.every * u32::try_from(number).unwrap_or(u32::MAX);
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let at = Instant::now();
            let (sent, outcome) = self.one(number);
            let asked = Asked {
                at,
                took: at.elapsed(),
                sent,
                outcome,
            };
            self.seen.lock().expect("no panic while it is held").push(asked);
        }
    }

    fn one(&self, number: usize) -> (u8, Result<usize, String>) {
        let mut last = String::new();
        for sent in 1..=2 {
            match self.attempt(number) {
                Ok(address) => return (sent, Ok(address)),
                Err(error) => last = error,
            }
        }
        (2, Err(last))
    }

    fn attempt(&self, number: usize) -> Result<usize, String> {
        let words = |error: io::Error| match error.kind() {
            ErrorKind::WouldBlock => "no answer".to_owned(),
            _ => error.to_string(),
        };
        let id = u16::try_from(number & 0xffff).unwrap_or_default();
        let socket = UdpSocket::bind("[::]:0").map_err(words)?;
        socket.set_read_timeout(Some(CLIENT_PATIENCE)).map_err(words)?;
        socket.connect(self.server).map_err(words)?;
        let query = query(id, &self.names[number % self.names.len()]);
        socket.send(&query).map_err(words)?;
        let mut buffer = [0; 1500];
        let length = loop {
            match socket.recv(&mut buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                received => break received.map_err(words)?,
            }
        };
        let answer = &buffer[..length];
        if length < 12 || answer[..2] != query[..2] {
            return Err("an answer to another question".into());
        }
        let has = |address: &Ipv6Addr| answer.windows(16).any(|octets| octets == address.octets());
        let found = self.expected.iter().position(has);
        found.ok_or_else(|| format!("an answer without the address, code {}", answer[3] & 15))
    }
}

/// A query for the AAAA records of `name`, with recursion desired and without EDNS.
fn query(id: u16, name: &str) -> Vec<u8> {
    let mut query = id.to_be_bytes().to_vec();
    query.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.trim_end_matches('.').split('.') {
        query.push(u8::try_from(label.len()).expect("a label has at most 63 octets"));
        query.extend(label.as_bytes());
    }
    query.extend([0, 0, 28, 0, 1]);
    query
}

/// How many were answered, how many only at the second try, and the longest wait.
pub fn summary(asked: &[Asked]) -> String {
    let good = asked.iter().filter(|asked| asked.outcome.is_ok());
    let again = asked.iter().filter(|asked| asked.sent > 1).count();
    let slowest = asked.iter().map(|asked| asked.took).max().unwrap_or_default();
    let failed = asked.iter().find_map(|asked| asked.outcome.as_ref().err());
    format!(
        "{} of {} queries answered, {again} of them asked twice, the slowest in {slowest:.1?}{}",
        good.count(),
        asked.len(),
        failed.map(|error| format!("; one had {error}")).unwrap_or_default()
    )
}

/// A command that finds `server` in `/etc/resolv.conf`, in a mount namespace of its own.
///
/// # Errors
///
/// If the file cannot be written.
pub fn with_resolver(node: &Node, server: SocketAddr, program: &[&str]) -> Result<Command> {
    let file = node.fresh_file("resolv.conf");
    fs::write(&file, format!("nameserver {}\n", server.ip()))?;
    let mut command = node.command(need_tool("unshare", "util-linux")?);
    command.args([
        "--mount",
        "sh",
        "-c",
        "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"",
    ]);
    command.arg(file).args(program);
    Ok(command)
}
