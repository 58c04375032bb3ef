//! `edgectl lb`: backends, why one is out, drains.

use lb::status::{Answer, BackendStatus, FrontendStatus, Histogram, Request, State, Status, Why};
use serde_json::Value;

use super::{
    Fail,
    out::{Cell, Ink, Out, Table, bytes, clean, count, ink_of, millis},
    status::{health, typed},
};
use crate::{client::Client, config::nearest, control::versioned};

pub(super) async fn show(client: &Client, out: Out) -> Result<u8, Fail> {
    let (value, answer) = ask(client, Request::Status).await?;
    match answer {
        Answer::Status(status) => {
            if out.json {
                out.print_json(&value)
            } else {
                out.print(&render(&status, out))
            }
            Ok(0)
        }
        other => Err(unexpected(other)),
    }
}

pub(super) async fn why(client: &Client, out: Out, backend: String) -> Result<u8, Fail> {
    let (value, answer) = ask(
        client,
        Request::Why {
            backend: backend.clone(),
        },
    )
    .await?;
    match answer {
        Answer::Why { backends } if !backends.is_empty() => {
            if out.json {
                out.print_json(&value)
            } else {
                out.print(
                    &backends
                        .iter()
                        .map(|why| explain(why, out))
                        .collect::<Vec<_>>()
                        .join("\n"),
                )
            }
            Ok(0)
        }
        Answer::Why { .. } => Err(unknown(client, &backend, "edged knows no such backend").await),
        Answer::Refused { message } => Err(unknown(client, &backend, &message).await),
        other => Err(unexpected(other)),
    }
}

pub(super) async fn drain(client: &Client, out: Out, backend: String, set: bool) -> Result<u8, Fail> {
    let request = if set {
        Request::Drain {
            backend: backend.clone(),
        }
    } else {
        Request::Undrain {
            backend: backend.clone(),
        }
    };
    let (value, answer) = ask(client, request).await?;
    match answer {
        Answer::Done { changed } => {
            if out.json {
                out.print_json(&value);
            } else if changed.is_empty() {
                out.print(&format!(
                    "{} {}: nothing was changed",
                    clean(&backend),
                    if set { "is drained already" } else { "was not drained" }
                ));
            } else {
                let tell = |name: String| {
                    if set {
                        format!(
                            "{name} drained: no new connections, running ones stay; to take it back: edgectl lb undrain '{name}'"
                        )
                    } else {
                        format!("{name} in use again as soon as it is healthy")
                    }
                };
                let lines: Vec<String> = changed.iter().map(|name| tell(clean(name))).collect();
                out.print(&lines.join("\n"));
            }
            Ok(0)
        }
        Answer::Refused { message } => Err(unknown(client, &backend, &message).await),
        other => Err(unexpected(other)),
    }
}

async fn ask(client: &Client, request: Request) -> Result<(Value, Answer), Fail> {
    let value = client.post("/v1/lb", &request).await?;
    let answer = typed(&value)?;
    Ok((value, answer))
}

fn unexpected(answer: Answer) -> Fail {
    match answer {
        Answer::Refused { message } => Fail::could_not(message),
        other => Fail::could_not(format!(
            "edged answered another question ({}); are edgectl and edged of the same release? edgectl version",
            versioned(&other)
                .ok()
                .and_then(|value| Some(value.get("answer")?.to_string()))
                .unwrap_or_default()
        )),
    }
}

/// The reason of a refusal: bad input with the nearest name, if there is no such backend.
async fn unknown(client: &Client, backend: &str, message: &str) -> Fail {
    let Ok((_, Answer::Status(status))) = ask(client, Request::Status).await else {
        return Fail::could_not(message);
    };
    let pairs = || {
        status.frontends.iter().flat_map(|frontend| {
            frontend
                .backends
                .iter()
                .map(move |backend| (&frontend.name, &backend.backend))
        })
    };
    let mut names: Vec<String> = pairs().map(|(_, backend)| backend.clone()).collect();
    names.sort();
    names.dedup();
    let full: Vec<String> = pairs()
        .map(|(frontend, backend)| format!("{frontend}/{backend}"))
        .collect();
    if names.iter().chain(&full).any(|name| name == backend) {
        return Fail::could_not(message);
    }
    let near = if backend.contains('/') {
        nearest(backend, &full)
    } else {
        nearest(backend, &names)
    };
    let help = match near {
        Some(near) => format!("did you mean \"{near}\"?"),
        None if names.is_empty() => "none is configured".to_owned(),
        None => format!("there are: {}", names.join(", ")),
    };
    Fail::bad_input(format!("no frontend has a backend \"{}\"; {help}", clean(backend)))
}

fn render(status: &Status, out: Out) -> String {
    if status.frontends.is_empty() {
        return "no frontends are configured: [[lb.frontend]] in the configuration adds one\n".into();
    }
    status
        .frontends
        .iter()
        .map(|frontend| render_frontend(frontend, out))
        .collect::<Vec<_>>()
        .join("\n")
}

fn render_frontend(frontend: &FrontendStatus, out: Out) -> String {
    let listen: Vec<String> = frontend.listen.iter().map(ToString::to_string).collect();
    let (ink, health) = health(frontend);
    let mut facts = vec![
        format!("{} sessions", count(frontend.sessions)),
        format!("{} connections", count(frontend.connections_total)),
        format!("{} failed", count(frontend.failed_total)),
        format!("{} retries", count(frontend.retries_total)),
    ];
    // Told only if it happened: most frontends have no limits and no slow backends.
    let refused = frontend.refused.by_reason().into_iter().filter(|(_, count)| *count > 0);
    let refused: Vec<String> = refused
        .map(|(reason, times)| format!("{} {reason}", count(times)))
        .collect();
    if !refused.is_empty() {
        let total = count(frontend.refused.total());
        facts.push(format!("{total} refused ({})", refused.join(", ")));
    }
    let sum = |of: fn(&BackendStatus) -> u64| frontend.backends.iter().map(of).sum::<u64>();
    for (total, what) in [(sum(|b| b.hedges_total), "hedged"), (sum(|b| b.shed_total), "shed")] {
        if total > 0 {
            facts.push(format!("{} {what}", count(total)));
        }
    }
    if frontend.local_errors_total > 0 {
        facts.push(format!(
            "{} local errors: edgectl doctor",
            count(frontend.local_errors_total)
        ));
    }
    let mut text = format!(
        "{}  {}  on {}\n  {}\n",
        out.ink(Ink::Bold, &clean(&frontend.name)),
        out.ink(ink, &health),
        listen.join(" "),
        facts.join(", ")
    );
    let mut table = Table::new(&[
        "BACKEND", "STATE", "SINCE", "SESSIONS", "TOTAL", "UP", "DOWN", "FAILURES", "CONNECT", "REASON",
    ]);
    for backend in &frontend.backends {
        let failed = backend.connect_failures_total;
        table.row([
            Cell::new(name(backend)),
            Cell::inked(backend.state.name(), ink_of(backend.state)),
            millis(backend.since_ms).into(),
            count(backend.sessions).into(),
            count(backend.connections_total).into(),
            bytes(backend.bytes_up_total).into(),
            bytes(backend.bytes_down_total).into(),
            Cell::inked(count(failed), if failed > 0 { Ink::Warn } else { Ink::Plain }),
            median(&backend.connect_latency).into(),
            Cell::inked(
                &backend.reason,
                if backend.state == State::Healthy {
                    Ink::Dim
                } else {
                    Ink::Plain
                },
            ),
        ]);
    }
    text.push_str(&table.show(out, 2));
    text
}

/// As configured, with what an operator has to know to read the row.
fn name(backend: &BackendStatus) -> String {
    let mut name = backend.backend.clone();
    if let Some(address) = backend
        .address
        .map(|address| address.to_string())
        .filter(|address| *address != backend.backend)
    {
        name.push_str(&format!(" ({address})"));
    }
    if backend.weight != 1 {
        name.push_str(&format!(" weight {}", backend.weight));
    }
    if backend.backup {
        name.push_str(" backup");
    }
    name
}

/// The bucket in which half of the connects are reached.
fn median(histogram: &Histogram) -> String {
    let count = histogram.count();
    let mut below = 0;
    for (bucket, bound) in histogram.buckets.iter().zip(Histogram::BOUNDS_MS) {
        below += bucket;
        if count > 0 && below * 2 >= count {
            return format!("< {bound} ms");
        }
    }
    if count == 0 { "-".into() } else { "> 1 s".into() }
}

fn explain(why: &Why, out: Out) -> String {
    let now = &why.now;
    let reason = if now.reason.is_empty() {
        String::new()
    } else {
        format!(": {}", clean(&now.reason))
    };
    let mut text = format!(
        "{}/{} is {} for {}{reason}\n",
        clean(&why.frontend),
        clean(&name(now)),
        out.ink(ink_of(now.state), now.state.name()),
        millis(now.since_ms)
    );
    if why.events.is_empty() {
        text.push_str("  nothing happened to it since it was configured\n");
        return text;
    }
    let mut table = Table::new(&["TIME (UTC)", "EVENT", "REASON"]);
    for event in &why.events {
        let kind = serde_json::to_value(event.kind)
            .ok()
            .and_then(|kind| kind.as_str().map(str::to_owned))
            .unwrap_or_default();
        use lb::status::EventKind as Kind;
        let ink = match event.kind {
            Kind::Ban | Kind::Down | Kind::Reset => Ink::Bad,
            Kind::Up | Kind::Undrain => Ink::Good,
            Kind::Failure | Kind::Drain | Kind::FailOpen | Kind::Veto | Kind::Slow => Ink::Warn,
            Kind::Probe | Kind::Check | Kind::Resolve | Kind::Shed => Ink::Plain,
        };
        table.row([
            event.at.replacen('T', " ", 1).trim_end_matches('Z').into(),
            Cell::inked(kind, ink),
            Cell::new(&event.reason),
        ]);
    }
    text.push_str(&table.show(out, 2));
    text
}
