//! `edgectl status` and `edgectl version`.

use std::time::Duration;

use lb::status::{FrontendStatus, State};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{
    Fail,
    out::{Cell, Ink, Out, Table, clean, count, duration, plural},
};
use crate::{
    api::{SCHEMA_VERSION, Status},
    client::{Client, ClientError},
};

const WATCH: Duration = Duration::from_secs(1);
/// The resolver's worker.
pub(crate) const DNS_ROLE: &str = crate::worker::Role::Dns64.name();

pub(super) async fn show(client: &Client, out: Out, watch: bool) -> Result<u8, Fail> {
    loop {
        let answer = client.get("/v1/status").await;
        if !watch {
            let value = answer?;
            let status: Status = typed(&value)?;
            if out.json {
                out.print_json(&value)
            } else {
                out.print(&render(&status, out))
            }
            return Ok(0);
        }
        // While watching, edged may come and go; what cannot be asked now may be there in a second.
        let text = match answer
            .map_err(Fail::from)
            .and_then(|value| typed::<Status>(&value).map(|status| (value, status)))
        {
            Ok((value, _)) if out.json => value.to_string(),
            Ok((_, status)) => render(&status, out),
            Err(fail) if out.json => {
                json!({ "schema_version": SCHEMA_VERSION, "error": { "message": fail.message } }).to_string()
            }
            Err(fail) => fail.message,
        };
        // Home, then erase what is left: without the flicker of a cleared screen.
        let text = if out.colour {
            format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n"))
        } else {
            text
        };
        if !out.write(&text) {
            return Ok(0);
        }
        tokio::time::sleep(WATCH).await;
    }
}

pub(super) async fn version(client: &Client, out: Out) -> Result<u8, Fail> {
    let own = env!("CARGO_PKG_VERSION");
    let running = client
        .get("/v1/status")
        .await
        .map_err(Fail::from)
        .and_then(|value| typed::<Status>(&value));
    if out.json {
        let running = running.ok();
        let build = running.as_ref().map(|status| status.build.clone());
        let edged = running.map(|status| status.version);
        out.print_json(
            &json!({ "schema_version": SCHEMA_VERSION, "edgectl": own, "edged": edged, "edged_build": build }),
        );
    } else {
        let edged = running.map_or_else(
            |_| "not reachable".to_owned(),
            |status| program(Some(&status.version), Some(&status.build)),
        );
        out.print(&format!("edgectl {own}\nedged   {edged}"));
    }
    Ok(0)
}

/// `value` as the type that its route answers with.
pub(super) fn typed<T: DeserializeOwned>(value: &Value) -> Result<T, Fail> {
    T::deserialize(value).map_err(|error| ClientError::Foreign(error.to_string()).into())
}

/// `0.1.0 (build 0a1b2c3d4e5f)`; a release that does not tell its build is its version.
fn program(version: Option<&str>, build: Option<&str>) -> String {
    let version = clean(version.unwrap_or("-"));
    match build {
        Some(build) if !build.is_empty() => format!("{version} (build {})", clean(build)),
        _ => version,
    }
}

/// What is wrong with a frontend in a few words, and how bad it is.
pub(crate) fn health(frontend: &FrontendStatus) -> (Ink, String) {
    let all = frontend.backends.len();
    let healthy = frontend
        .backends
        .iter()
        .filter(|backend| backend.state == State::Healthy)
        .count();
    let drained = frontend
        .backends
        .iter()
        .filter(|backend| backend.state == State::Drained)
        .count();
    let drained_too = if drained > 0 {
        format!(", {drained} drained")
    } else {
        String::new()
    };
    let ink = match healthy {
        0 => Ink::Bad,
        n if n + drained < all => Ink::Warn,
        _ => Ink::Good,
    };
    (ink, format!("{healthy}/{all} healthy{drained_too}"))
}

fn render(status: &Status, out: Out) -> String {
    let mut text = format!(
        "{} {}, up {}, pid {}\n\n",
        out.ink(Ink::Bold, "edged"),
        program(Some(&status.version), Some(&status.build)),
        duration(status.uptime_seconds),
        status.pid
    );
    text.push_str(&badges(status, out));
    text.push_str(&dns(status, out));
    if let Some(upgrade) = &status.upgrade {
        text.push_str(&format!("upgrade  {}\n", super::upgrade::line(upgrade, out)));
    }
    let mut workers = Table::new(&["WORKER", "STATE", "PID", "UP", "RESTARTS", "LAST END", ""]);
    let own = program(Some(&status.version), Some(&status.build));
    for worker in &status.workers {
        // Whoever was not handed over runs what the others no longer do.
        let runs = worker.build.as_deref();
        let runs = runs.map(|build| program(worker.version.as_deref(), Some(build)));
        let other = runs.filter(|runs| *runs != own);
        let ink = if worker.state == "running" { Ink::Good } else { Ink::Bad };
        workers.row([
            Cell::new(&worker.role),
            Cell::inked(&worker.state, ink),
            worker.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()).into(),
            duration(worker.uptime_seconds).into(),
            worker.restarts.to_string().into(),
            worker.last_end.as_deref().unwrap_or("").into(),
            other.map_or(Cell::new(""), |other| Cell::inked(other, Ink::Warn)),
        ]);
    }
    text.push('\n');
    text.push_str(&workers.show(out, 0));
    let Some(lb) = &status.lb else { return text };
    text.push('\n');
    if lb.frontends.is_empty() {
        text.push_str("no frontends are configured: [[lb.frontend]] in the configuration adds one\n");
        return text;
    }
    let mut frontends = Table::new(&["FRONTEND", "BACKENDS", "SESSIONS", "CONNECTIONS", "FAILED", "LISTEN"]);
    for frontend in &lb.frontends {
        let (ink, health) = health(frontend);
        let listen: Vec<String> = frontend.listen.iter().map(ToString::to_string).collect();
        frontends.row([
            Cell::new(&frontend.name),
            Cell::inked(health, ink),
            count(frontend.sessions).into(),
            count(frontend.connections_total).into(),
            Cell::inked(
                count(frontend.failed_total),
                if frontend.failed_total > 0 {
                    Ink::Warn
                } else {
                    Ink::Plain
                },
            ),
            listen.join(" ").into(),
        ]);
    }
    text.push_str(&frontends.show(out, 0));
    text
}

/// Two lines about the resolver, if there is one.
fn dns(status: &Status, out: Out) -> String {
    let Some(dns) = &status.dns else {
        let runs = status.workers.iter().any(|worker| worker.role == DNS_ROLE);
        let unknown = out.ink(Ink::Bad, "unknown");
        return if runs {
            format!("dns      {unknown}  the resolver's worker does not answer: edgectl doctor\n")
        } else {
            String::new()
        };
    };
    let line = match super::dns::health(dns) {
        (Ink::Bad, why) => format!("{}  {why}; edgectl dns status", out.ink(Ink::Bad, "down")),
        (Ink::Warn, why) => format!("{}  {why}; edgectl dns status", out.ink(Ink::Warn, "degraded")),
        _ => out.ink(Ink::Good, "ok"),
    };
    let asked = dns.udp.hits.saturating_add(dns.udp.misses);
    let known = dns.udp.hits.saturating_mul(100).checked_div(asked);
    let mut facts = vec![match known {
        Some(percent) if asked == 1 => format!("1 question, {percent} % known"),
        Some(percent) => format!("{} questions, {percent} % known", count(asked)),
        None => "no questions yet".into(),
    }];
    for zone in &dns.zones {
        let name = zone.names.first().map_or("-", String::as_str);
        let nodes = usize::try_from(zone.nodes).unwrap_or(usize::MAX);
        facts.push(format!("{} in {}", plural(nodes, "node"), clean(name)));
    }
    let listen: Vec<String> = dns.listen.iter().map(ToString::to_string).collect();
    format!(
        "dns      {line}\n         {}, on {}\n",
        facts.join(", "),
        listen.join(" ")
    )
}

/// One line each for configuration and health: a good configuration says nothing about live backends.
fn badges(status: &Status, out: Out) -> String {
    let config = &status.config;
    let mut text = String::new();
    let revision = format!("revision {}", config.revision);
    match config.reverts_in_seconds {
        Some(seconds) => {
            let until = format!(
                "taken back in {} unless confirmed: edgectl config confirm",
                duration(seconds)
            );
            text.push_str(&format!(
                "config   {}  {revision}, {until}\n",
                out.ink(Ink::Warn, "unconfirmed")
            ));
        }
        None => text.push_str(&format!(
            "config   {}  {revision}, confirmed\n",
            out.ink(Ink::Good, "ok")
        )),
    }
    let file = clean(&config.file);
    match config.file_differs {
        Some(true) => text.push_str(&format!(
            "         {}  {file} is not what runs: edgectl config diff\n",
            out.ink(Ink::Warn, "differs")
        )),
        Some(false) => {}
        None => text.push_str(&format!(
            "         {}  whether {file} is what runs: it cannot be read\n",
            out.ink(Ink::Warn, "unknown")
        )),
    }
    if let Some(error) = &config.last_error {
        let error = error.lines().map(clean).collect::<Vec<_>>().join("\n         ");
        text.push_str(&format!(
            "         {}  the last attempt to load one:\n         {error}\n",
            out.ink(Ink::Bad, "failed")
        ));
    }
    let Some(lb) = &status.lb else {
        text.push_str(&format!(
            "health   {}  the balancer's worker does not answer: edgectl doctor\n",
            out.ink(Ink::Bad, "unknown")
        ));
        return text;
    };
    let of = |wanted: Ink| {
        lb.frontends
            .iter()
            .filter(|frontend| health(frontend).0 == wanted)
            .map(|frontend| clean(&frontend.name))
            .collect::<Vec<_>>()
    };
    let (down, degraded) = (of(Ink::Bad), of(Ink::Warn));
    let line = if !down.is_empty() {
        format!(
            "{}  no healthy backend: {}; edgectl lb show",
            out.ink(Ink::Bad, "down"),
            down.join(", ")
        )
    } else if !degraded.is_empty() {
        format!(
            "{}  backends are out: {}; edgectl lb show",
            out.ink(Ink::Warn, "degraded"),
            degraded.join(", ")
        )
    } else {
        out.ink(Ink::Good, "ok")
    };
    text.push_str(&format!("health   {line}\n"));
    text
}
