//! `edgectl upgrade`: asks for it, and follows it to its end across the daemon's own change of program.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{
    Fail,
    out::{Ink, Out, clean, millis},
    status::typed,
};
use crate::{
    api::{SCHEMA_VERSION, Status, Upgrade, UpgradeState},
    client::{Client, ClientError},
    control,
};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);
/// For the whole of it: far above the sum of its own limits.
const LIMIT: Duration = Duration::from_secs(60);

pub(super) async fn run(client: &Client, out: Out, binary: &Path, dry_run: bool) -> Result<u8, Fail> {
    // edged does not know this directory.
    let binary = std::path::absolute(binary).map_err(|error| {
        Fail::bad_input(format!(
            "{} cannot be made a path from the root: {error}",
            binary.display()
        ))
    })?;
    let before = status(client).await?;
    let known = before.upgrade.as_ref().map_or(0, |upgrade| upgrade.number);
    let order = control::Upgrade { binary, dry_run };
    let ordered = match client.post("/v1/upgrade", &order).await {
        Ok(value) => Some(typed::<Upgrade>(&value)?),
        // It went faster than its answer.
        Err(ClientError::Broken(_)) if !dry_run => None,
        Err(error) => return Err(error.into()),
    };
    if dry_run {
        if let Some(upgrade) = &ordered {
            told(
                upgrade,
                out,
                &format!(
                    "{} can take over from {}: nothing was changed",
                    upgrade.to, upgrade.from
                ),
            );
        }
        return Ok(0);
    }
    let ended = follow(client, out, before.pid, known).await?;
    match ended.state {
        UpgradeState::Done => {
            let note = ended.message.as_deref().map(|note| format!("\n{}", clean(note)));
            let text = format!(
                "{}  edged {} runs, process {} as before; took {}{}",
                out.ink(Ink::Good, "done"),
                ended.to,
                before.pid,
                millis(ended.took_ms),
                note.unwrap_or_default()
            );
            told(&ended, out, &text);
            Ok(0)
        }
        _ => {
            let message = ended
                .message
                .clone()
                .unwrap_or_else(|| "it failed, nobody knows why".into());
            if !out.json {
                return Err(Fail::could_not(message));
            }
            let error = json!({ "message": message, "bad_request": false });
            out.print_json(&json!({ "schema_version": SCHEMA_VERSION, "upgrade": ended, "error": error }));
            Ok(1)
        }
    }
}

fn told(upgrade: &Upgrade, out: Out, text: &str) {
    if out.json {
        out.print_json(&json!({ "schema_version": SCHEMA_VERSION, "upgrade": upgrade }));
    } else {
        out.print(text);
    }
}

/// Looks at the status until the upgrade after number `known` has ended.
async fn follow(client: &Client, out: Out, pid: u32, known: u64) -> Result<Upgrade, Fail> {
    let begun = Instant::now();
    let mut step = String::new();
    loop {
        match status(client).await {
            Ok(status) => {
                if status.pid != pid {
                    return Err(Fail::could_not(format!(
                        "edged ended and was started again as process {}, so sessions were cut; what it runs now is {}; see why: journalctl -u edged",
                        status.pid,
                        clean(&status.version)
                    )));
                }
                if let Some(upgrade) = status.upgrade.filter(|upgrade| upgrade.number > known) {
                    if upgrade.state != UpgradeState::Running {
                        return Ok(upgrade);
                    }
                    if upgrade.step != step && !out.json {
                        step.clone_from(&upgrade.step);
                        out.print(&format!("{}  edged {}", out.ink(Ink::Dim, &clean(&step)), upgrade.to));
                    }
                }
            }
            // While it changes its program it may be away for a moment.
            Err(_) if begun.elapsed() < LIMIT => {}
            Err(fail) => return Err(fail),
        }
        if begun.elapsed() > LIMIT {
            return Err(Fail::could_not(format!(
                "no outcome within {} s; see how far it is: edgectl status; journalctl -u edged",
                LIMIT.as_secs()
            )));
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn status(client: &Client) -> Result<Status, Fail> {
    let value: Value = client.get("/v1/status").await?;
    typed(&value)
}

/// The last upgrade, for `edgectl status`.
pub(super) fn line(upgrade: &Upgrade, out: Out) -> String {
    let (version, build) = (clean(&upgrade.to.version), clean(&upgrade.to.build));
    let to = format!("edged {version} (build {build})");
    let by = clean(&upgrade.author);
    match upgrade.state {
        UpgradeState::Checked => to,
        UpgradeState::Running => format!(
            "{}  {to}, by {by}: {}",
            out.ink(Ink::Warn, "running"),
            clean(&upgrade.step)
        ),
        UpgradeState::Done => format!(
            "{}  {to}, by {by}, at {}, took {}",
            out.ink(Ink::Good, "done"),
            clean(&upgrade.at),
            millis(upgrade.took_ms)
        ),
        UpgradeState::Failed => {
            let message = upgrade.message.as_deref().unwrap_or_default();
            let message = message.lines().map(clean).collect::<Vec<_>>().join("\n         ");
            format!(
                "{}  {to}, by {by}, at {}:\n         {message}",
                out.ink(Ink::Bad, "failed"),
                clean(&upgrade.at)
            )
        }
    }
}
