//! What the project depends on is what `deny.toml` allows: licences, banned crates, sources.
//!
//! Judged is what is built here (`cargo tree`), features and platform applied. What this does not do is ask the advisory
//! database; `cargo deny check advisories` does.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use toml::{Table, Value};

#[test]
fn licences_crates_and_sources_are_those_that_deny_toml_allows() -> Result<()> {
    let rules = Rules::read()?;
    let mut crates = crates(&["--workspace", "--offline"])?;
    ensure!(crates.len() > 50, "cargo tree told of {} crates only", crates.len());
    // The fuzz targets have a lock file of their own, and crates that nothing else needed to fetch.
    crates.extend(crates_of_the_fuzz_targets()?);
    let faults: Vec<String> = crates.iter().flat_map(|dependency| rules.faults(dependency)).collect();
    assert!(
        faults.is_empty(),
        "{}\nChoose another crate, or argue for a change of deny.toml.",
        faults.join("\n")
    );
    Ok(())
}

#[test]
fn a_licence_expression_is_read_as_spdx_means_it() {
    let allowed = |expression: &str| permitted(expression, &["MIT", "ISC", "Apache-2.0 WITH LLVM-exception"]);
    for expression in [
        "MIT",
        "GPL-3.0 OR MIT",
        "GPL-3.0/MIT",
        "MIT AND ISC",
        "(GPL-3.0 OR MIT) AND ISC",
        "Apache-2.0 WITH LLVM-exception",
    ] {
        assert!(allowed(expression), "{expression}");
    }
    for expression in [
        "",
        "GPL-3.0",
        "MIT AND GPL-3.0",
        "ISC AND (GPL-3.0 OR Apache-2.0)",
        "Apache-2.0",
        "MIT WITH LLVM-exception",
    ] {
        assert!(!allowed(expression), "{expression}");
    }
}

#[test]
fn a_banned_crate_or_version_and_a_foreign_source_are_told() {
    let rules = Rules {
        licences: vec!["MIT".into()],
        exceptions: vec![("engine".into(), vec!["NCSA".into()])],
        bans: vec![
            ("ring".into(), "one provider".into()),
            ("hickory-proto@<0.26".into(), "poison".into()),
        ],
    };
    let fault = |name: &str, version: &str, licence: &str, foreign: bool| {
        rules.faults(&Dependency {
            name: name.into(),
            version: version.into(),
            licence: licence.into(),
            foreign,
        })
    };
    assert_eq!(fault("serde", "1.0.0", "MIT", false), Vec::<String>::new());
    assert_eq!(
        fault("ring", "0.17.14", "MIT", false),
        ["ring 0.17.14 is banned: one provider"]
    );
    assert_eq!(
        fault("hickory-proto", "0.25.2", "MIT", false),
        ["hickory-proto 0.25.2 is banned: poison"]
    );
    assert_eq!(fault("hickory-proto", "0.26.3", "MIT", false), Vec::<String>::new());
    assert_eq!(
        fault("odd", "1.0.0", "GPL-3.0", false),
        ["odd 1.0.0 has the licence \"GPL-3.0\""]
    );
    assert_eq!(fault("engine", "1.0.0", "MIT AND NCSA", false), Vec::<String>::new());
    assert_eq!(
        fault("odd", "1.0.0", "MIT AND NCSA", false),
        ["odd 1.0.0 has the licence \"MIT AND NCSA\""]
    );
    assert_eq!(
        fault("odd", "1.0.0", "MIT", true),
        ["odd 1.0.0 comes from elsewhere than the registry"]
    );
}

struct Rules {
    licences: Vec<String>,
    /// A crate, and the licences that are allowed to it besides.
    exceptions: Vec<(String, Vec<String>)>,
    /// As in the file, `NAME` or `NAME@<VERSION`, and the reason.
    bans: Vec<(String, String)>,
}

struct Dependency {
    name: String,
    version: String,
    licence: String,
    foreign: bool,
}

impl Rules {
    fn read() -> Result<Self> {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deny.toml");
        let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let table: Table = text.parse()?;
        let list = |section: &str, key: &str| {
            let list = table
                .get(section)
                .and_then(|section| section.get(key))
                .and_then(Value::as_array);
            list.cloned()
                .with_context(|| format!("deny.toml has no {section}.{key}"))
        };
        let text = |value: &Value| value.as_str().map(str::to_owned).context("not a string");
        let ban = |value: &Value| {
            let field = |key| {
                value
                    .get(key)
                    .map(text)
                    .with_context(|| format!("a ban without {key}"))?
            };
            Ok((field("crate")?, field("reason")?))
        };
        let exception = |value: &Value| {
            let licences = value
                .get("allow")
                .and_then(Value::as_array)
                .context("an exception without allow")?;
            let name = text(value.get("crate").context("an exception without crate")?)?;
            Ok((name, licences.iter().map(text).collect::<Result<_>>()?))
        };
        Ok(Self {
            licences: list("licenses", "allow")?.iter().map(text).collect::<Result<_>>()?,
            exceptions: list("licenses", "exceptions")?
                .iter()
                .map(exception)
                .collect::<Result<_>>()?,
            bans: list("bans", "deny")?.iter().map(ban).collect::<Result<_>>()?,
        })
    }

    fn faults(&self, dependency: &Dependency) -> Vec<String> {
        let Dependency {
            name,
            version,
            licence,
            foreign,
        } = dependency;
        let mut faults = Vec::new();
        let besides = self.exceptions.iter().filter(|(allowed, _)| allowed == name);
        let besides = besides.flat_map(|(_, licences)| licences);
        let allowed: Vec<&str> = self.licences.iter().chain(besides).map(String::as_str).collect();
        if !permitted(licence, &allowed) {
            faults.push(format!("{name} {version} has the licence \"{licence}\""));
        }
        for (_, reason) in self.bans.iter().filter(|(banned, _)| matches(banned, name, version)) {
            faults.push(format!("{name} {version} is banned: {reason}"));
        }
        if *foreign {
            faults.push(format!("{name} {version} comes from elsewhere than the registry"));
        }
        faults
    }
}

fn crates_of_the_fuzz_targets() -> Result<Vec<Dependency>> {
    let crates = crates(&["--manifest-path", "tests/fuzz/Cargo.toml"])?;
    ensure!(
        crates.iter().any(|dependency| dependency.name == "libfuzzer-sys"),
        "cargo tree did not tell of the engine"
    );
    Ok(crates)
}

/// Every crate that is built, once; `which` is what cargo tree is to look at.
fn crates(which: &[&str]) -> Result<Vec<Dependency>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .args(["tree", "--locked", "--edges", "normal,build,dev", "--no-dedupe"])
        .args(which)
        .args(["--prefix", "none", "--format", "{p}|{l}"])
        .output()?;
    ensure!(
        output.status.success(),
        "cargo tree: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout)?;
    let mut lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    lines.sort_unstable();
    lines.dedup();
    lines.into_iter().map(dependency).collect()
}

/// Reads `NAME vVERSION [(proc-macro)] [(SOURCE)]|LICENCE`.
fn dependency(line: &str) -> Result<Dependency> {
    let (package, licence) = line.split_once('|').with_context(|| line.to_owned())?;
    let mut words = package.split(' ');
    let (name, version) = (
        words.next().unwrap_or_default(),
        words.next().and_then(|word| word.strip_prefix('v')),
    );
    let version = version.with_context(|| format!("no version in {line}"))?;
    // A crate of this workspace has its folder here, one from the registry nothing.
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize()?;
    let foreign = words
        .map(|word| word.trim_matches(['(', ')']))
        .any(|word| word != "proc-macro" && !Path::new(word).starts_with(&top));
    Ok(Dependency {
        name: name.into(),
        version: version.into(),
        licence: licence.into(),
        foreign,
    })
}

/// Whether the rule `NAME` or `NAME@<VERSION` applies.
fn matches(rule: &str, name: &str, version: &str) -> bool {
    let numbers = |version: &str| {
        version
            .split('.')
            .map(|part| part.parse::<u64>().unwrap_or(0))
            .collect::<Vec<_>>()
    };
    match rule.split_once('@') {
        None => rule == name,
        Some((banned, below)) => {
            let below = below
                .strip_prefix('<')
                .expect("deny.toml bans a crate or all its versions below one");
            banned == name && numbers(version) < numbers(below)
        }
    }
}

/// Whether the SPDX expression can be satisfied with `allowed` alone.
fn permitted(expression: &str, allowed: &[&str]) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = words.as_slice();
    !words.is_empty() && any(&mut rest, allowed) && rest.is_empty()
}

fn any(words: &mut &[&str], allowed: &[&str]) -> bool {
    let mut one = all(words, allowed);
    while let ["OR", rest @ ..] = *words {
        *words = rest;
        one |= all(words, allowed);
    }
    one
}

fn all(words: &mut &[&str], allowed: &[&str]) -> bool {
    let mut every = single(words, allowed);
    while let ["AND", rest @ ..] = *words {
        *words = rest;
        every &= single(words, allowed);
    }
    every
}

fn single(words: &mut &[&str], allowed: &[&str]) -> bool {
    match *words {
        ["(", rest @ ..] => {
            *words = rest;
            let inner = any(words, allowed);
            *words = words.strip_prefix(&[")"]).unwrap_or_default();
            inner
        }
        [licence, "WITH", exception, rest @ ..] => {
            *words = rest;
            allowed.contains(&format!("{licence} WITH {exception}").as_str())
        }
        [licence, rest @ ..] => {
            *words = rest;
            allowed.contains(licence)
        }
        [] => false,
    }
}
