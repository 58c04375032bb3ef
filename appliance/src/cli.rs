//! `edgectl`: its commands and what they print.
//!
//! ```text
//! arguments -> Client (control socket) or config::load (a file) -> text for people | JSON for machines -> exit code
//! ```
//! Every command prints one JSON object with `schema_version` under `--output json`, its errors included.

mod config;
pub(crate) mod dns;
mod lb;
mod nat64;
pub(crate) mod out;
pub(crate) mod status;
mod upgrade;

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use serde_json::json;

use self::out::{Ink, Out};
use crate::{
    api::SCHEMA_VERSION,
    client::{Client, ClientError},
    config::{DEFAULT_FILE, DEFAULT_SOCKET},
    doctor,
};

const AFTER: &str = "\
Exit codes:
  0  done, or nothing wrong
  1  could not: edged is away, refused, or something is wrong with it
  2  bad input: a faulty file, an unknown backend or zone, a wrong argument
  config diff: 0 the same, 2 different, 1 could not tell

Examples:
  edgectl status --watch
  edgectl lb why '[fd00::11]:6443'
  edgectl dns trace example.org
  edgectl config check edged.toml && sudo edgectl config apply edged.toml --confirm 60s
  edgectl doctor

Environment:
  EDGECTL_SOCKET  the control socket, unless --socket names one
  NO_COLOR        no colours, even on a terminal";

/// Looks after edged, the edge appliance: status, configuration, load balancer, DNS, NAT64, diagnosis
#[derive(Debug, Parser)]
#[command(name = "edgectl", version, after_long_help = AFTER, after_help = "Exit codes: 0 done, 1 could not, 2 bad input. More, with examples: edgectl --help", max_term_width = 100)]
struct Edgectl {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Global {
    /// Control socket of edged [env: EDGECTL_SOCKET] [default: /run/edged/edged.sock]
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Text for people or one JSON object for machines
    #[arg(long, short, global = true, value_enum, default_value_t = Output::Text, value_name = "FORMAT")]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    Text,
    /// For machines; has schema_version
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The appliance at a glance: configuration, workers, frontends
    #[command(
        after_help = "Examples:\n  edgectl status\n  edgectl status --watch\n  edgectl status -o json | jq .config.revision"
    )]
    Status {
        /// Show it again every second until interrupted
        #[arg(long, short)]
        watch: bool,
    },
    /// The load balancer: backends, why one is out, drains
    #[command(subcommand)]
    Lb(Lb),
    /// The resolver: what it answers and why, zones, keys of nodes, its cache
    #[command(subcommand)]
    Dns(Dns),
    /// NAT64: the device, what went through it, what did not and why
    #[command(subcommand)]
    Nat64(Nat64),
    /// The configuration: check, compare, apply, go back
    #[command(subcommand)]
    Config(Config),
    /// Finds what is wrong and says what to do; quiet about what is fine
    #[command(
        after_help = "Exit codes: 0 nothing wrong (hints may be shown), 1 problems.\n\nExamples:\n  edgectl doctor\n  sudo edgectl doctor --pre      before installation: kernel, ports, users\n  edgectl doctor -o json | jq '.findings[] | select(.level == \"problem\")'"
    )]
    Doctor {
        /// Check a machine on which edged is not installed or not started yet
        #[arg(long)]
        pre: bool,
        /// The configuration file
        #[arg(long, value_name = "FILE", default_value = DEFAULT_FILE)]
        config: PathBuf,
        /// The state directory
        #[arg(long, value_name = "DIR", default_value = "/var/lib/edged")]
        state: PathBuf,
    },
    /// Goes on with another edged program: no session is cut, nobody is refused
    #[command(
        after_help = "The supervisor becomes the new program under its process id, then each worker hands over to a new one. Whatever\nfails on the way leaves the old one serving; the message says what goes on. Install the program first, so that the\nnext start of the unit uses it too.\n\nExit codes: 0 everything runs the new program, 1 not everything does, 2 the program was refused.\n\nExamples:\n  sudo edgectl upgrade /usr/bin/edged\n  sudo edgectl upgrade --dry-run /opt/edged-next/edged      only find out whether it could"
    )]
    Upgrade {
        /// The program edged, as edged itself sees it
        #[arg(value_name = "BINARY")]
        binary: PathBuf,
        /// Only find out whether it could take over
        #[arg(long)]
        dry_run: bool,
    },
    /// A completion script for a shell, on stdout
    #[command(
        after_help = "Example:\n  edgectl completions bash | sudo tee /etc/bash_completion.d/edgectl > /dev/null"
    )]
    Completions {
        /// The shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// The manual: a page for every command into DIR, or the main page on stdout
    #[command(after_help = "Examples:\n  edgectl man | man -l -\n  sudo edgectl man /usr/local/share/man/man1")]
    Man {
        /// An existing directory
        dir: Option<PathBuf>,
    },
    /// Versions of edgectl and of the running edged
    Version,
}

#[derive(Debug, Subcommand)]
enum Lb {
    /// Every frontend and backend: state, reason, sessions, traffic
    #[command(
        after_help = "Examples:\n  edgectl lb show\n  edgectl lb show -o json | jq '.frontends[].backends[] | select(.state != \"healthy\")'"
    )]
    Show,
    /// What happened to a backend, and on which facts its state rests
    #[command(after_help = "Examples:\n  edgectl lb why '[fd00::11]:6443'\n  edgectl lb why api/cp1.fleet:6443")]
    Why {
        /// HOST:PORT as configured, or FRONTEND/HOST:PORT
        backend: String,
    },
    /// No new connections for a backend; running ones stay. Outlives restarts
    #[command(
        after_help = "Examples:\n  edgectl lb drain '[fd00::11]:6443'       in every frontend that has it\n  edgectl lb drain api/[fd00::11]:6443     in one frontend"
    )]
    Drain {
        /// HOST:PORT as configured, or FRONTEND/HOST:PORT
        backend: String,
    },
    /// Takes a drain back
    #[command(after_help = "Example:\n  edgectl lb undrain '[fd00::11]:6443'")]
    Undrain {
        /// HOST:PORT as configured, or FRONTEND/HOST:PORT
        backend: String,
    },
}

#[derive(Debug, Subcommand)]
enum Dns {
    /// What a client gets for a name, from the cache if it is known
    #[command(
        after_help = "Exit codes: 0 there is an answer, be it that there is no such name; 1 there is none (SERVFAIL, REFUSED); 2 bad input.\n\nExamples:\n  edgectl dns query example.org\n  edgectl dns query example.org TXT\n  edgectl dns query 64:ff9b::c633:640a      whose address it is\n  edgectl dns query example.org -o json | jq -r '.answers[].data'"
    )]
    Query {
        /// A name, or an address to ask for its name
        #[arg(value_parser = domain_or_address)]
        name: String,
        /// A record type [default: AAAA]
        #[arg(value_parser = record_type, value_name = "TYPE")]
        kind: Option<String>,
    },
    /// Why a name has the answer it has: each step from scratch, then the answer
    #[command(
        after_help = "The cache is neither asked nor filled.\n\nExit codes: 0 there is an answer, be it that there is no such name; 1 there is none; 2 bad input.\n\nExamples:\n  edgectl dns trace example.org\n  edgectl dns trace fd0d::11"
    )]
    Trace {
        /// A name, or an address to ask for its name
        #[arg(value_parser = domain_or_address)]
        name: String,
        /// A record type [default: AAAA]
        #[arg(value_parser = record_type, value_name = "TYPE")]
        kind: Option<String>,
    },
    /// The zones that edged serves itself
    #[command(subcommand)]
    Zone(DnsZone),
    /// The keys that nodes sign their updates with
    #[command(subcommand)]
    Key(DnsKey),
    /// What the resolver knows from others
    #[command(subcommand)]
    Cache(DnsCache),
    /// Listeners, counters, cache, upstreams, zones
    #[command(
        after_help = "Examples:\n  edgectl dns status\n  edgectl dns status -o json | jq '.upstreams[].servers[] | select(.state != \"up\")'"
    )]
    Status,
}

#[derive(Debug, Subcommand)]
enum DnsZone {
    /// Every record, and which of them nodes registered
    #[command(
        after_help = "Examples:\n  edgectl dns zone show\n  edgectl dns zone show fleet\n  edgectl dns zone show -o json | jq '.zones[].records[] | select(.dynamic)'"
    )]
    Show {
        /// A zone, reverse zones included; without it all of them
        #[arg(value_parser = domain)]
        zone: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
enum DnsKey {
    /// Makes a key for a node: it may change that node's name and no other
    #[command(
        after_help = "The key is good at once and outlives restarts. Its file is the one that nsupdate -k takes; the secret is told only here.\nA node has two keys at most, so that it can change from one to the other.\n\nExamples:\n  sudo edgectl dns key add n1 --out n1.key\n  sudo edgectl dns key add n1.fleet --algorithm hmac-sha512 | ssh n1 'umask 077; cat > /etc/edged-dns.key'"
    )]
    Add {
        /// The node's name, in full or below the first zone
        #[arg(value_parser = domain)]
        node: String,
        /// How the node signs
        #[arg(long, value_enum, default_value_t = Signing::HmacSha256, value_name = "ALGORITHM")]
        algorithm: Signing,
        /// Write the key to this file, which must not exist, instead of stdout
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Every key, without its secret
    #[command(after_help = "Example:\n  edgectl dns key list")]
    List,
    /// Takes a key back; with a node's last one its records go
    #[command(after_help = "Examples:\n  sudo edgectl dns key rm n1.fleet\n  sudo edgectl dns key rm key2.n1.fleet")]
    Rm {
        /// The key's name, in full or below the first zone
        #[arg(value_parser = domain)]
        name: String,
    },
}

#[derive(Debug, Subcommand)]
enum DnsCache {
    /// Forgets answers, so that they are asked for again
    #[command(
        after_help = "Examples:\n  sudo edgectl dns cache flush                        everything\n  sudo edgectl dns cache flush www.example.org        one name\n  sudo edgectl dns cache flush example.org --below    and all below it"
    )]
    Flush {
        /// The name; without it everything is forgotten
        #[arg(value_parser = domain)]
        name: Option<String>,
        /// And all names below it
        #[arg(long, requires = "name")]
        below: bool,
    },
}

#[derive(Debug, Subcommand)]
enum Nat64 {
    /// Device, offloads, packets each way, drops
    #[command(
        after_help = "A super-packet counts as one. Counters begin at zero when the worker starts.\n\nExamples:\n  edgectl nat64 status\n  edgectl nat64 status -o json | jq .nat64.offloads"
    )]
    Status,
    /// Packets that did not go on, by reason
    #[command(after_help = "Examples:\n  edgectl nat64 drops\n  edgectl nat64 drops -o json | jq .dropped.not_mapped")]
    Drops,
    /// Who speaks with whom, seen as what, and for how long yet
    #[command(
        after_help = "A port of icmp is an identifier.\n\nExamples:\n  edgectl nat64 sessions\n  edgectl nat64 sessions --host 2001:db8:1::10\n  edgectl nat64 sessions -o json | jq '.sessions | group_by(.host) | map(length)'"
    )]
    Sessions {
        /// Only those of this host
        #[arg(long, value_name = "ADDRESS")]
        host: Option<std::net::Ipv6Addr>,
    },
    /// Which port of the pool is whose (the bindings of RFC 6146)
    #[command(after_help = "Examples:\n  edgectl nat64 bib\n  edgectl nat64 bib -o json | jq '.bindings | length'")]
    Bib {
        /// Only those of this host
        #[arg(long, value_name = "ADDRESS")]
        host: Option<std::net::Ipv6Addr>,
    },
    /// Ports of the pool, and how many hosts can still get
    #[command(
        after_help = "Examples:\n  edgectl nat64 pool\n  edgectl nat64 pool -o json | jq '.pool[] | select(.free == 0)'"
    )]
    Pool,
}

/// As in BIND's key files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Signing {
    /// The one that every implementation has
    #[value(name = "hmac-sha256")]
    HmacSha256,
    /// HMAC with SHA-384
    #[value(name = "hmac-sha384")]
    HmacSha384,
    /// HMAC with SHA-512
    #[value(name = "hmac-sha512")]
    HmacSha512,
}

impl From<Signing> for dns64::zone::Algorithm {
    fn from(signing: Signing) -> Self {
        match signing {
            Signing::HmacSha256 => Self::HmacSha256,
            Signing::HmacSha384 => Self::HmacSha384,
            Signing::HmacSha512 => Self::HmacSha512,
        }
    }
}

#[derive(Debug, Subcommand)]
enum Config {
    /// Checks a file and the files it refers to, with the code that edged runs
    #[command(
        after_help = "Exit codes: 0 good (warnings are shown), 2 faulty.\n\nExamples:\n  edgectl config check\n  edgectl config check edged.toml\n  edgectl config check - < edged.toml"
    )]
    Check {
        /// The file; - for stdin
        #[arg(default_value = DEFAULT_FILE)]
        file: PathBuf,
    },
    /// The JSON Schema of the file (draft 2020-12), for editors
    #[command(after_help = "Example:\n  edgectl config schema > edged.schema.json")]
    Schema,
    /// How a file differs from what runs: line by line and by meaning
    #[command(
        after_help = "Exit codes: 0 the same, 2 different, 1 could not tell.\n\nExample:\n  edgectl config diff edged.toml"
    )]
    Diff {
        /// The file; - for stdin
        #[arg(default_value = DEFAULT_FILE)]
        file: PathBuf,
    },
    /// Puts a file into effect; a faulty one changes nothing
    #[command(
        after_help = "With --confirm the change is taken back by itself unless `edgectl config confirm` comes in time.\nSo a mistake that locks you out undoes itself.\n\nExamples:\n  sudo edgectl config apply\n  sudo edgectl config apply edged.toml --confirm 60s && sudo edgectl config confirm"
    )]
    Apply {
        /// The file; - for stdin
        #[arg(default_value = DEFAULT_FILE)]
        file: PathBuf,
        /// Take the change back after this time unless it is confirmed
        #[arg(long, value_name = "TIME", value_parser = whole_seconds)]
        confirm: Option<u64>,
    },
    /// Keeps what was applied with --confirm
    Confirm,
    /// Confirmed configurations, newest first
    History,
    /// Applies an earlier configuration of the history
    #[command(
        after_help = "Examples:\n  sudo edgectl config rollback        the one before the running one\n  sudo edgectl config rollback 7"
    )]
    Rollback {
        /// Its revision
        revision: Option<u64>,
    },
    /// The running configuration
    #[command(after_help = "Example:\n  edgectl config show > edged.toml")]
    Show,
}

/// Why a command ended without its result.
#[derive(Debug)]
pub(crate) struct Fail {
    code: u8,
    message: String,
}

impl Fail {
    /// Exit 1: could not.
    pub(crate) fn could_not(message: impl Into<String>) -> Self {
        Self {
            code: 1,
            message: message.into(),
        }
    }

    /// Exit 2: bad input.
    pub(crate) fn bad_input(message: impl Into<String>) -> Self {
        Self {
            code: 2,
            message: message.into(),
        }
    }
}

impl From<ClientError> for Fail {
    fn from(error: ClientError) -> Self {
        let bad_input = matches!(&error, ClientError::Refused(refusal) if refusal.bad_request);
        if bad_input {
            Self::bad_input(error.to_string())
        } else {
            Self::could_not(error.to_string())
        }
    }
}

/// Runs `edgectl` with the process's arguments.
pub fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let parsed = match Edgectl::try_parse_from(&arguments) {
        Ok(parsed) => parsed,
        Err(error) if error.use_stderr() && wants_json(&arguments) => {
            let out = Out::new(true);
            return fail(out, &Fail::bad_input(error.to_string().trim_end()));
        }
        Err(error) => error.exit(),
    };
    let out = Out::new(parsed.global.output == Output::Json);
    // One thread: it starts faster, and there is nothing to do at the same time.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(out, &Fail::could_not(format!("no event loop: {error}"))),
    };
    let socket = parsed.global.socket.or_else(|| {
        std::env::var_os("EDGECTL_SOCKET")
            .filter(|path| !path.is_empty())
            .map(PathBuf::from)
    });
    let client = Client::new(socket.unwrap_or_else(|| DEFAULT_SOCKET.into()));
    match runtime.block_on(run(parsed.command, &client, out)) {
        Ok(code) => ExitCode::from(code),
        Err(error) => fail(out, &error),
    }
}

async fn run(command: Command, client: &Client, out: Out) -> Result<u8, Fail> {
    match command {
        Command::Status { watch } => status::show(client, out, watch).await,
        Command::Lb(command) => match command {
            Lb::Show => lb::show(client, out).await,
            Lb::Why { backend } => lb::why(client, out, backend).await,
            Lb::Drain { backend } => lb::drain(client, out, backend, true).await,
            Lb::Undrain { backend } => lb::drain(client, out, backend, false).await,
        },
        Command::Dns(command) => match command {
            Dns::Query { name, kind } => dns::query(client, out, name, kind, false).await,
            Dns::Trace { name, kind } => dns::query(client, out, name, kind, true).await,
            Dns::Zone(DnsZone::Show { zone }) => dns::zones(client, out, zone).await,
            Dns::Key(DnsKey::Add {
                node,
                algorithm,
                out: file,
            }) => dns::key_add(client, out, node, algorithm.into(), file.as_deref()).await,
            Dns::Key(DnsKey::List) => dns::key_list(client, out).await,
            Dns::Key(DnsKey::Rm { name }) => dns::key_rm(client, out, name).await,
            Dns::Cache(DnsCache::Flush { name, below }) => dns::flush(client, out, name, below).await,
            Dns::Status => dns::status(client, out).await,
        },
        Command::Nat64(command) => match command {
            Nat64::Status => nat64::status(client, out, nat64::Part::All).await,
            Nat64::Drops => nat64::status(client, out, nat64::Part::Drops).await,
            Nat64::Pool => nat64::status(client, out, nat64::Part::Pool).await,
            Nat64::Sessions { host } => nat64::sessions(client, out, host).await,
            Nat64::Bib { host } => nat64::bindings(client, out, host).await,
        },
        Command::Config(command) => match command {
            Config::Check { file } => config::check(out, &file),
            Config::Schema => {
                // The schema is a document of its own standard: no schema_version of ours in it.
                out.print_json(&crate::config::schema());
                Ok(0)
            }
            Config::Diff { file } => config::diff(client, out, &file).await,
            Config::Apply { file, confirm } => config::apply(client, out, &file, confirm).await,
            Config::Confirm => config::confirm(client, out).await,
            Config::History => config::history(client, out).await,
            Config::Rollback { revision } => config::rollback(client, out, revision).await,
            Config::Show => config::show(client, out).await,
        },
        Command::Doctor { pre, config, state } => {
            doctor::run(client, out, &doctor::Options { pre, config, state }).await
        }
        Command::Upgrade { binary, dry_run } => upgrade::run(client, out, &binary, dry_run).await,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Edgectl::command(), "edgectl", &mut script);
            out.print(&String::from_utf8_lossy(&script));
            Ok(0)
        }
        Command::Man { dir } => man(out, dir),
        Command::Version => status::version(client, out).await,
    }
}

fn man(out: Out, dir: Option<PathBuf>) -> Result<u8, Fail> {
    let Some(dir) = dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(Edgectl::command())
            .render(&mut page)
            .map_err(|error| Fail::could_not(error.to_string()))?;
        out.print(&String::from_utf8_lossy(&page));
        return Ok(0);
    };
    if !dir.is_dir() {
        return Err(Fail::bad_input(format!(
            "{} is no directory, so no page was written; mkdir -p {0}",
            dir.display()
        )));
    }
    clap_mangen::generate_to(Edgectl::command(), &dir)
        .map_err(|error| Fail::could_not(format!("the pages cannot be written to {}: {error}", dir.display())))?;
    Ok(0)
}

fn fail(out: Out, fail: &Fail) -> ExitCode {
    if out.json {
        out.print_json(&json!({ "schema_version": SCHEMA_VERSION, "error": { "message": fail.message, "bad_request": fail.code == 2 } }));
    } else {
        let colour = out.colour && std::io::IsTerminal::is_terminal(&std::io::stderr());
        let out = Out { colour, ..out };
        eprintln!("{} {}", out.ink(Ink::Bad, "edgectl:"), out.report(&fail.message));
    }
    ExitCode::from(fail.code)
}

/// For errors in the arguments themselves, which leave nothing parsed.
fn wants_json(arguments: &[OsString]) -> bool {
    let text: Vec<_> = arguments.iter().map(|argument| argument.to_string_lossy()).collect();
    text.iter()
        .any(|argument| matches!(argument.as_ref(), "--output=json" | "-ojson" | "-o=json"))
        || text
            .windows(2)
            .any(|pair| matches!(pair[0].as_ref(), "-o" | "--output") && pair[1] == "json")
}

/// What can be a domain name; edged reads it with the same code.
fn domain(text: &str) -> Result<String, String> {
    text.parse::<dns64::config::Domain>().map(|_| text.to_owned())
}

fn domain_or_address(text: &str) -> Result<String, String> {
    if text.parse::<std::net::IpAddr>().is_ok() {
        return Ok(text.to_owned());
    }
    domain(text)
}

fn record_type(text: &str) -> Result<String, String> {
    let dns64::config::Domain(root) = ".".parse()?;
    let question = text
        .to_ascii_uppercase()
        .parse()
        .map(|kind| dns64::Question::new(&root, kind));
    question
        .map(|_| text.to_owned())
        .map_err(|_| "write a record type such as AAAA, A, PTR or TXT".into())
}

/// A time of whole seconds: `60s`, `5m`.
fn whole_seconds(text: &str) -> Result<u64, String> {
    match humantime::parse_duration(text) {
        Ok(duration) if (5..=86_400).contains(&duration.as_secs()) => Ok(duration.as_secs()),
        Ok(_) => Err("write 5s to 24h".into()),
        Err(_) => Err("write a number and a unit, such as 60s or 5m".into()),
    }
}
