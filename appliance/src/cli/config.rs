//! `edgectl config`: check, compare, apply, go back. No command here ever writes a configuration file.

use std::{io::Read, path::Path};

use serde_json::{Value, json};

use super::{
    Fail,
    out::{Cell, Ink, Out, Table, clean, duration, plural},
    status::typed,
};
use crate::{
    api::{Applied, ConfigText, Revision, SCHEMA_VERSION},
    client::Client,
    config::{Change, ChangeKind, Faulty, Report, changes, load, unified},
    control::{Apply, MAX_BODY, Rollback},
};

pub(super) fn check(out: Out, file: &Path) -> Result<u8, Fail> {
    let (text, origin) = read(file)?;
    let checked = load(&text, &origin).and_then(|loaded| {
        let more = loaded.check_files().map_err(|faulty| Faulty {
            warnings: [loaded.reports.clone(), faulty.warnings].concat(),
            ..faulty
        })?;
        Ok([loaded.reports, more].concat())
    });
    let (good, faults, warnings) = match checked {
        Ok(warnings) => (true, Vec::new(), warnings),
        Err(Faulty { faults, warnings }) => (false, faults, warnings),
    };
    if out.json {
        out.print_json(&json!({ "schema_version": SCHEMA_VERSION, "good": good, "file": origin, "faults": faults, "warnings": warnings }));
    } else {
        let mut shown: Vec<String> = faults
            .iter()
            .chain(&warnings)
            .map(|report| out.report(&report.to_string()))
            .collect();
        shown.push(verdict(&origin, &faults, &warnings, out));
        out.print(&shown.join("\n\n"));
    }
    Ok(if good { 0 } else { 2 })
}

fn verdict(origin: &str, faults: &[Report], warnings: &[Report], out: Out) -> String {
    let warned = if warnings.is_empty() {
        String::new()
    } else {
        format!(", {}", plural(warnings.len(), "warning"))
    };
    if faults.is_empty() {
        format!("{} is {}{warned}", clean(origin), out.ink(Ink::Good, "good"))
    } else {
        format!(
            "{} {}: {}{warned}",
            clean(origin),
            out.ink(Ink::Bad, "cannot be used"),
            plural(faults.len(), "fault")
        )
    }
}

pub(super) async fn diff(client: &Client, out: Out, file: &Path) -> Result<u8, Fail> {
    // Here 2 says "different", so whatever prevents a comparison is 1.
    let could_not = |fail: Fail| Fail::could_not(fail.message);
    let (text, origin) = read(file).map_err(could_not)?;
    load(&text, &origin).map_err(|faulty| Fail::could_not(faulty.to_string()))?;
    let running: ConfigText =
        typed(&client.get("/v1/config").await.map_err(Fail::from).map_err(could_not)?).map_err(could_not)?;
    let name = format!("running (revision {})", running.revision);
    let lines = unified(&running.text, &text, &name, &origin);
    let changes = changes(&running.text, &text);
    let same = running.text == text;
    if out.json {
        out.print_json(&json!({
            "schema_version": SCHEMA_VERSION, "same": same, "revision": running.revision, "file": origin, "changes": changes, "unified": lines,
        }));
    } else if same {
        out.print(&format!(
            "{} is what runs (revision {})",
            clean(&origin),
            running.revision
        ));
    } else {
        out.print(&format!("{}\n{}", coloured(&lines, out), list(&changes, out)));
    }
    Ok(if same { 0 } else { 2 })
}

fn coloured(lines: &str, out: Out) -> String {
    let mut text = String::new();
    for line in lines.lines() {
        let ink = match line.as_bytes() {
            [b'-', b'-', b'-', ..] | [b'+', b'+', b'+', ..] => Ink::Bold,
            [b'-', ..] => Ink::Bad,
            [b'+', ..] => Ink::Good,
            [b'@', ..] => Ink::Dim,
            _ => Ink::Plain,
        };
        text.push_str(&out.ink(ink, &line.replace(|c: char| c.is_control() && c != '\t', "\u{fffd}")));
        text.push('\n');
    }
    text
}

fn list(changes: &[Change], out: Out) -> String {
    if changes.is_empty() {
        return "by meaning nothing differs: only comments, order or spelling\n".into();
    }
    let mut table = Table::new(&["CHANGE", "WHAT", "", "TAKES EFFECT"]);
    for change in changes {
        let (ink, kind) = match change.kind {
            ChangeKind::Added => (Ink::Good, "added"),
            ChangeKind::Removed => (Ink::Bad, "removed"),
            ChangeKind::Changed => (Ink::Warn, "changed"),
        };
        let value = |value: &Option<String>| value.clone().unwrap_or_else(|| "(default)".into());
        let values = if change.before.is_none() && change.after.is_none() {
            String::new()
        } else {
            format!("{} -> {}", value(&change.before), value(&change.after))
        };
        let effect = if change.live {
            "live"
        } else {
            "at the next start: systemctl restart edged"
        };
        table.row([
            Cell::inked(kind, ink),
            Cell::new(&change.what),
            Cell::new(values),
            Cell::inked(effect, if change.live { Ink::Plain } else { Ink::Warn }),
        ]);
    }
    table.show(out, 0)
}

pub(super) async fn apply(client: &Client, out: Out, file: &Path, confirm_seconds: Option<u64>) -> Result<u8, Fail> {
    let (text, name) = read(file)?;
    // edged and the history do not know this directory.
    let origin = if file == Path::new("-") {
        name
    } else {
        std::path::absolute(file)
            .unwrap_or_else(|_| file.to_owned())
            .display()
            .to_string()
    };
    let value = client
        .post(
            "/v1/config/apply",
            &Apply {
                text,
                origin,
                confirm_seconds,
            },
        )
        .await?;
    applied(&value, out)
}

pub(super) async fn confirm(client: &Client, out: Out) -> Result<u8, Fail> {
    let value = client.post("/v1/config/confirm", &json!({})).await?;
    applied(&value, out)
}

pub(super) async fn rollback(client: &Client, out: Out, revision: Option<u64>) -> Result<u8, Fail> {
    let value = client.post("/v1/config/rollback", &Rollback { revision }).await?;
    applied(&value, out)
}

fn applied(value: &Value, out: Out) -> Result<u8, Fail> {
    let applied: Applied = typed(value)?;
    if out.json {
        out.print_json(value);
        return Ok(0);
    }
    let mut shown: Vec<String> = applied
        .warnings
        .iter()
        .map(|warning| out.report(&warning.lines().map(clean).collect::<Vec<_>>().join("\n")))
        .collect();
    let revision = applied.revision;
    shown.push(match applied.reverts_in_seconds {
        Some(seconds) => format!(
            "revision {revision} is in effect for {}; to keep it: edgectl config confirm",
            duration(seconds)
        ),
        None if applied.unchanged => format!("revision {revision} stays in effect: nothing differs"),
        None => format!("revision {revision} is in effect and confirmed"),
    });
    out.print(&shown.join("\n\n"));
    Ok(0)
}

pub(super) async fn history(client: &Client, out: Out) -> Result<u8, Fail> {
    let value = client.get("/v1/config/history").await?;
    if out.json {
        out.print_json(&value);
        return Ok(0);
    }
    let revisions: Vec<Revision> = typed(value.get("revisions").unwrap_or(&Value::Null))?;
    if revisions.is_empty() {
        out.print("no configuration was confirmed yet: edgectl config apply");
        return Ok(0);
    }
    let mut table = Table::new(&["REVISION", "", "CONFIRMED (UTC)", "BY", "FROM"]);
    for revision in &revisions {
        table.row([
            Cell::new(revision.revision.to_string()),
            Cell::inked(if revision.running { "running" } else { "" }, Ink::Good),
            revision.at.replacen('T', " ", 1).trim_end_matches('Z').into(),
            Cell::new(&revision.author),
            Cell::new(&revision.origin),
        ]);
    }
    out.print(&table.show(out, 0));
    Ok(0)
}

pub(super) async fn show(client: &Client, out: Out) -> Result<u8, Fail> {
    let value = client.get("/v1/config").await?;
    let config: ConfigText = typed(&value)?;
    // The text as it is, so that it can be written to a file.
    if out.json {
        out.print_json(&value)
    } else {
        out.print(&config.text)
    }
    Ok(0)
}

/// The text of a file, and how messages and the history name it.
fn read(file: &Path) -> Result<(String, String), Fail> {
    let stdin = file == Path::new("-");
    let name = if stdin {
        "stdin".to_owned()
    } else {
        file.display().to_string()
    };
    let unreadable = |error: std::io::Error| {
        let help = match error.kind() {
            std::io::ErrorKind::NotFound => "name the file: edgectl config ... FILE",
            std::io::ErrorKind::PermissionDenied => "use sudo, or join the group that may read it",
            _ => "name a TOML file",
        };
        Fail::bad_input(format!("{name} cannot be read: {error}; {help}"))
    };
    let mut bytes = Vec::new();
    let most = MAX_BODY as u64 / 2;
    if stdin {
        std::io::stdin()
            .lock()
            .take(most + 1)
            .read_to_end(&mut bytes)
            .map_err(unreadable)?;
    } else {
        std::fs::File::open(file)
            .map_err(unreadable)?
            .take(most + 1)
            .read_to_end(&mut bytes)
            .map_err(unreadable)?;
    }
    if bytes.len() as u64 > most {
        return Err(Fail::bad_input(format!(
            "{name} is larger than 512 KiB, so it is no configuration; name a TOML file"
        )));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let line = error.as_bytes()[..error.utf8_error().valid_up_to()]
            .iter()
            .filter(|byte| **byte == b'\n')
            .count()
            + 1;
        Fail::bad_input(format!(
            "{name}:{line}: not UTF-8 text; a configuration is written in UTF-8"
        ))
    })?;
    Ok((text, name))
}
