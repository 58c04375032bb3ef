//! A faulty configuration is refused with the place, the fault and the remedy, before anything is started.
//!
//! ```text
//! edge: edged, which must not start; and edged that runs, which must not change
//! ```

use std::{fs, net::TcpListener, os::unix::fs::PermissionsExt, path::PathBuf};

use anyhow::{Context, Result, ensure};
use tests::{
    Edge, World,
    edge::{Said, refused_start},
};

/// A configuration with a fault, and what has to be said about it.
struct Case {
    name: &'static str,
    /// What of the good configuration is replaced ...
    good: String,
    /// ... by what.
    bad: String,
    /// What the caret has to point at: its first occurrence in the faulty file.
    place: String,
    /// What the message has to contain: fault and remedy.
    says: Vec<&'static str>,
    /// The text is good and this machine is at fault (a port, a file): a later start may succeed, so `edged` ends with
    /// 1, after which systemd tries again, and not with 2.
    curable: bool,
}

#[test]
fn a_faulty_file_is_refused_with_its_place_and_a_remedy() -> Result<()> {
    let world = World::new(2)?;
    let secrets = Secrets::write(&world)?;
    let _taken = world.edge.enter(|| TcpListener::bind(world.edge.at(7000)))?;
    let good = world.config("kind = \"api\"");
    for case in cases(&world, &secrets) {
        let config = faulty(&good, &case)?;
        let said = refused_start(&world.edge, &config)?;
        let code = if case.curable { 1 } else { 2 };
        complains(&case, code, &config, &said).with_context(|| format!("{} at start: {said}\n{config}", case.name))?;
    }
    Ok(())
}

#[test]
fn a_faulty_file_that_is_applied_is_refused_in_the_same_words_and_nothing_changes() -> Result<()> {
    let world = World::new(2)?;
    let secrets = Secrets::write(&world)?;
    let _taken = world.edge.enter(|| TcpListener::bind(world.edge.at(7000)))?;
    let good = world.config("kind = \"api\"");
    let edge = Edge::start(&world.edge, &good)?;
    let _backends = world.echoes()?;
    let before = edge.json(&["config", "show"])?;
    for case in cases(&world, &secrets) {
        let config = faulty(&good, &case)?;
        let said = edge.apply(&config)?;
        complains(&case, 2, &config, &said).with_context(|| format!("{} applied: {said}\n{config}", case.name))?;
        assert_eq!(
            edge.json(&["config", "show"])?,
            before,
            "{} changed something",
            case.name
        );
        tests::load::Session::open(&world.client, world.front(), std::time::Duration::from_secs(2))?;
    }
    Ok(())
}

#[test]
fn a_file_that_is_not_there_is_named_with_what_to_do() -> Result<()> {
    let world = World::new(1)?;
    let missing = world.edge.file("missing.toml");
    let mut command = world.edge.command(tests::edge::program("edged")?);
    command
        .arg("--config")
        .arg(&missing)
        .arg("--state")
        .arg(world.edge.file("state"));
    let said = tests::edge::say(&mut command, std::time::Duration::from_secs(10))?;
    assert_eq!(said.code, Some(2), "{said}");
    assert!(said.err.contains(&missing.display().to_string()), "{said}");
    Ok(())
}

fn cases(world: &World, secrets: &Secrets) -> Vec<Case> {
    let listen = format!("\"{}\", \"{}\"", world.edge.at(6443), world.edge.at4(6443));
    let backends = format!("backends = [\"{}\", \"{}\"]", world.back(0), world.back(1));
    let case = |name, good: &str, bad: &str, place: &str, says: &[&'static str]| Case {
        name,
        good: good.to_owned(),
        bad: bad.to_owned(),
        place: place.to_owned(),
        says: says.to_vec(),
        curable: name.starts_with("a port") || name.starts_with("a CA") || name.starts_with("a secret"),
    };
    let api = "kind = \"api\"";
    let check = |file: &PathBuf| {
        format!(
            "{api}\n[lb.frontend.health]\nactive = {{ kind = \"https\", ca_file = \"{}\" }}",
            file.display()
        )
    };
    let token = |file: &PathBuf| format!("{api}\n[control]\nmetrics_token_file = \"{}\"", file.display());
    let quoted = |file: &PathBuf| format!("\"{}\"", file.display());
    vec![
        case("a syntax error", "name = \"api\"", "name = \"api", "name = \"api", &[]),
        case("an unknown key", "name = ", "naem = ", "naem", &["naem", "name"]),
        case("an unknown kind", api, "kind = \"apu\"", "\"apu\"", &["apu", "api"]),
        case(
            "a bad address",
            &listen,
            "\"fd00::10:6443x\"",
            "\"fd00::10:6443x\"",
            &["fd00::10:6443x"],
        ),
        case(
            "a port in use",
            &listen,
            "\"[fd00::10]:7000\"",
            "\"[fd00::10]:7000\"",
            &["[fd00::10]:7000", "in use"],
        ),
        case(
            "a listener twice",
            &listen,
            "\"[fd00::10]:6443\", \"[fd00::10]:6443\"",
            "\"[fd00::10]:6443\"",
            &["[fd00::10]:6443", "already"],
        ),
        case(
            "no backends",
            &backends,
            "backends = []",
            "[]",
            &["no backends", "add backends"],
        ),
        case(
            "a backend without a port",
            &backends,
            "backends = [\"fd00::11\"]",
            "\"fd00::11\"",
            &["no port", "[fd00::11]:6443"],
        ),
        case(
            "a CA that is not there",
            api,
            &check(&secrets.missing),
            &quoted(&secrets.missing),
            &["No such file"],
        ),
        case(
            "a CA that is none",
            api,
            &check(&secrets.garbage),
            &quoted(&secrets.garbage),
            &["holds no certificate", "names the CA"],
        ),
        case(
            "a secret that all can read",
            api,
            &token(&secrets.open),
            &quoted(&secrets.open),
            &["0644", "chmod 600"],
        ),
        case(
            "a secret that is not there",
            api,
            &token(&secrets.missing),
            &quoted(&secrets.missing),
            &["No such file"],
        ),
    ]
}

struct Secrets {
    missing: PathBuf,
    garbage: PathBuf,
    open: PathBuf,
}

impl Secrets {
    fn write(world: &World) -> Result<Self> {
        let secrets = Self {
            missing: world.lab.dir().join("missing"),
            garbage: world.lab.dir().join("garbage.crt"),
            open: world.lab.dir().join("open-token"),
        };
        fs::write(&secrets.garbage, "no certificate")?;
        fs::write(&secrets.open, "0123456789abcdef0123456789abcdef")?;
        fs::set_permissions(&secrets.open, fs::Permissions::from_mode(0o644))?;
        Ok(secrets)
    }
}

fn faulty(good: &str, case: &Case) -> Result<String> {
    ensure!(good.contains(&case.good), "{} is not in {good}", case.good);
    Ok(good.replacen(&case.good, &case.bad, 1))
}

/// Whether a refusal has exit code `code`, `FILE:LINE:COLUMN` of the fault, the line itself, and what is to be said.
fn complains(case: &Case, code: i32, config: &str, said: &Said) -> Result<()> {
    ensure!(said.code == Some(code), "exit code {:?} instead of {code}", said.code);
    let text = format!("{}{}", said.out, said.err);
    // A fault that two places make may be shown at either.
    let places: Vec<String> = config
        .match_indices(&case.place)
        .map(|(at, _)| {
            let before = &config[..at];
            let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
            format!(
                ".toml:{}:{}",
                before.matches('\n').count() + 1,
                before[line_start..].chars().count() + 1
            )
        })
        .collect();
    let points = places.iter().any(|place| text.contains(place));
    // A syntax error is noticed where the text stops making sense, which is behind where it began.
    let line_only = places
        .iter()
        .any(|place| text.contains(&place[..=place.rfind(':').unwrap_or(0)]));
    ensure!(
        points || (case.says.is_empty() && line_only),
        "none of {places:?} is named"
    );
    for word in &case.says {
        ensure!(text.contains(word), "\"{word}\" is not said");
    }
    Ok(())
}
