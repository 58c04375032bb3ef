//! What the command lines of all benchmarks have in common.

use anyhow::{Context, Result, bail};

/// Options that every benchmark takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Common {
    /// The tables show medians of so many.
    pub(crate) rounds: usize,
    /// Does everything work? Its figures are not for quoting.
    pub(crate) quick: bool,
    /// Instead of Markdown.
    pub(crate) json: bool,
}

/// Reads `args`. Those that are not common go to `other` with their values; it says whether it knows them.
pub(crate) fn parse(args: &[String], mut other: impl FnMut(&str, &str) -> Result<bool>) -> Result<Common> {
    let mut common = Common {
        rounds: 5,
        quick: false,
        json: false,
    };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let (key, value) = arg
            .split_once('=')
            .map_or((arg.as_str(), None), |(key, value)| (key, Some(value)));
        let mut value = || {
            value
                .or_else(|| args.next().map(String::as_str))
                .with_context(|| format!("{key} needs a value; see bench help"))
        };
        match key {
            "--quick" => (common.quick, common.rounds) = (true, 1),
            "--rounds" => {
                common.rounds = value()?
                    .parse()
                    .ok()
                    .filter(|n| (1..=100).contains(n))
                    .context("--rounds takes 1 to 100")?;
            }
            "--output" => match value()? {
                "json" => common.json = true,
                "markdown" => common.json = false,
                other => bail!("--output takes markdown or json, not \"{other}\""),
            },
            _ if key.starts_with("--") && other(key, value()?)? => {}
            _ => bail!("\"{arg}\" is no option of this benchmark; see bench help"),
        }
    }
    Ok(common)
}
