//! `edged`: the supervisor; or, by an internal first argument, one of its workers, or a supervisor that goes on where another
//! program was.

use std::{path::PathBuf, process::ExitCode};

use appliance::{config, log, node, notify, supervisor, worker};
use clap::Parser;

/// The edge appliance's daemon. It is operated with edgectl.
#[derive(Debug, Parser)]
#[command(name = "edged", version)]
struct Arguments {
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = config::DEFAULT_FILE)]
    config: PathBuf,
    /// Where confirmed configurations and drains are kept [default: $STATE_DIRECTORY, or /var/lib/edged]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Check the configuration file and end: 0 = good, 2 = at fault
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    node: node::Options,
}

fn main() -> ExitCode {
    // First of all, while nothing is open but what was inherited.
    let environment = notify::environment();
    let mut arguments = std::env::args_os().skip(1);
    let (first, second) = (arguments.next(), arguments.next());
    let second = second.as_deref().and_then(|second| second.to_str());
    match first.as_deref().and_then(|first| first.to_str()) {
        Some(worker::ARGUMENT) => return worker::main(second),
        Some(supervisor::ARGUMENT) => return supervisor::take_over(second, environment),
        Some(supervisor::PROBE) => return supervisor::answer_probe(),
        _ => {}
    }
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::from(error.use_stderr()) * 2);
        }
    };
    if arguments.node.node {
        log::start("edged", &config::Log::default());
        return node::main(arguments.node, environment);
    }
    let state = arguments
        .state
        .or_else(state_directory)
        .unwrap_or_else(|| "/var/lib/edged".into());
    let options = supervisor::Options {
        config: arguments.config,
        state,
    };
    if arguments.check {
        return supervisor::check(&options);
    }
    log::start("edged", &config::Log::default());
    supervisor::main(options, environment)
}

/// The first of what a unit's StateDirectory= made.
fn state_directory() -> Option<PathBuf> {
    let directories = std::env::var("STATE_DIRECTORY").ok()?;
    directories
        .split(':')
        .next()
        .filter(|directory| !directory.is_empty())
        .map(PathBuf::from)
}
