//! `edgectl nat64`: the translator's device, what went through it, and what did not.

use std::{collections::BTreeMap, net::Ipv6Addr};

use dns64::nat64::status::{Answer, Request, SessionStatus, Side, Status};
use serde_json::json;

use super::{
    Fail,
    out::{Cell, Ink, Out, Table, bytes, clean, count},
    status::typed,
};
use crate::{
    api::{self, SCHEMA_VERSION},
    client::Client,
    worker::Role,
};

/// Sessions that one request asks for.
const AT_ONCE: u32 = 10_000;

/// What of the status is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Everything.
    All,
    /// What did not go on.
    Drops,
    /// Ports.
    Pool,
}

/// The translator at a glance, or a part of that.
pub(super) async fn status(client: &Client, out: Out, part: Part) -> Result<u8, Fail> {
    let all: api::Status = typed(&client.get("/v1/status").await?)?;
    let Some(status) = &all.nat64 else {
        let runs = all.workers.iter().any(|worker| worker.role == Role::Nat64.name());
        return Err(if runs {
            Fail::could_not(
                "the translator does not answer: its worker is being started again; try again, or see edgectl status",
            )
        } else {
            Fail::bad_input(
                "there is no translator: the configuration has no [nat64] section; see docs/configuration.md for one",
            )
        });
    };
    if out.json {
        out.print_json(&match part {
            Part::Drops => json!({ "schema_version": SCHEMA_VERSION, "dropped": status.dropped }),
            Part::Pool => json!({ "schema_version": SCHEMA_VERSION, "pool": status.pool }),
            Part::All => json!({ "schema_version": SCHEMA_VERSION, "nat64": status }),
        });
        return Ok(0);
    }
    out.print(&match part {
        Part::Drops => dropped(status, out),
        Part::Pool => pool(status, out),
        Part::All => render(status, out),
    });
    Ok(0)
}

/// Sessions, all or those of a host.
pub(super) async fn sessions(client: &Client, out: Out, host: Option<Ipv6Addr>) -> Result<u8, Fail> {
    let sessions = all_sessions(client, host).await?;
    if out.json {
        out.print_json(&json!({ "schema_version": SCHEMA_VERSION, "sessions": sessions }));
        return Ok(0);
    }
    if sessions.is_empty() {
        out.print("no sessions\n");
        return Ok(0);
    }
    let mut table = Table::new(&["PROTOCOL", "HOST", "SEEN AS", "REMOTE", "STATE", "ENDS IN"]);
    for session in sessions {
        table.row([
            Cell::new(clean(&session.protocol)),
            Cell::new(session.host.to_string()),
            Cell::new(session.seen_as.to_string()),
            Cell::new(session.remote.to_string()),
            Cell::new(clean(session.state.as_deref().unwrap_or("-"))),
            Cell::new(format!("{} s", session.left)),
        ]);
    }
    out.print(&table.show(out, 0));
    Ok(0)
}

/// Bindings that have sessions, all or those of a host.
pub(super) async fn bindings(client: &Client, out: Out, host: Option<Ipv6Addr>) -> Result<u8, Fail> {
    let mut bindings = BTreeMap::new();
    for session in all_sessions(client, host).await? {
        let binding = (session.host, session.protocol, session.seen_as);
        *bindings.entry(binding).or_insert(0_u64) += 1;
    }
    if out.json {
        let all: Vec<_> = bindings
            .into_iter()
            .map(|((host, protocol, seen_as), sessions)| {
                json!({ "protocol": protocol, "host": host, "seen_as": seen_as, "sessions": sessions })
            })
            .collect();
        out.print_json(&json!({ "schema_version": SCHEMA_VERSION, "bindings": all }));
        return Ok(0);
    }
    if bindings.is_empty() {
        out.print("no bindings\n");
        return Ok(0);
    }
    let mut table = Table::new(&["PROTOCOL", "HOST", "SEEN AS", "SESSIONS"]);
    for ((host, protocol, seen_as), sessions) in bindings {
        table.row([
            Cell::new(clean(&protocol)),
            Cell::new(host.to_string()),
            Cell::new(seen_as.to_string()),
            count(sessions).into(),
        ]);
    }
    out.print(&table.show(out, 0));
    Ok(0)
}

async fn all_sessions(client: &Client, host: Option<Ipv6Addr>) -> Result<Vec<SessionStatus>, Fail> {
    let mut all = Vec::new();
    let mut from = 0;
    loop {
        let request = Request::Sessions { from, most: AT_ONCE };
        let answer: Answer = typed(&client.post("/v1/nat64", &request).await?)?;
        let Answer::Sessions { sessions, next } = answer else {
            return Err(Fail::could_not(
                "edged answered another question; are edgectl and edged of the same release? edgectl version",
            ));
        };
        let wanted = |session: &SessionStatus| host.is_none_or(|host| *session.host.ip() == host);
        all.extend(sessions.into_iter().filter(wanted));
        match next {
            Some(next) if next > from => from = next,
            _ => break,
        }
    }
    all.sort_by_key(|session| (session.host, session.protocol.clone(), session.remote));
    Ok(all)
}

fn render(status: &Status, out: Out) -> String {
    let offloads: Vec<&str> = status
        .offloads
        .by_name()
        .into_iter()
        .filter_map(|(name, is)| is.then_some(name))
        .collect();
    let offloads = match offloads.is_empty() {
        true => out.ink(Ink::Warn, "none: every packet is cut and summed up by the kernel"),
        false => offloads.join(", "),
    };
    let mut text = format!(
        "{} {}, prefix {}, {} maps\ndevice    {}, {} queues\noffloads  {offloads}\n\n",
        out.ink(Ink::Bold, "nat64"),
        clean(&status.mode),
        clean(status.prefix.as_deref().unwrap_or("none")),
        count(status.maps),
        clean(&status.device),
        count(status.queues),
    );
    let mut sides = Table::new(&["", "RECEIVED", "OCTETS", "SENT", "OCTETS", "ERRORS SENT", "NOT SENT"]);
    for (name, side) in [("IPv4", &status.ipv4), ("IPv6", &status.ipv6)] {
        let Side {
            received,
            received_octets,
            sent,
            sent_octets,
            errors,
            errors_limited,
        } = *side;
        sides.row([
            Cell::new(name),
            count(received).into(),
            bytes(received_octets).into(),
            count(sent).into(),
            bytes(sent_octets).into(),
            count(errors).into(),
            Cell::inked(count(errors_limited), bad_if(errors_limited)),
        ]);
    }
    text.push_str(&sides.show(out, 0));
    text.push_str(&format!(
        "\nsuper-packets {}, not taken by the device {}\n\n",
        count(status.super_packets),
        out.ink(bad_if(status.unsent), &count(status.unsent))
    ));
    if let Some(state) = &status.state {
        text.push_str(&format!(
            "sessions {} ({} since the start), bindings {} ({}), hosts {}\n",
            count(state.sessions),
            count(state.sessions_made),
            count(state.bindings),
            count(state.bindings_made),
            count(state.hosts)
        ));
        text.push_str(&pool(status, out));
        text.push('\n');
    }
    text.push_str(&dropped(status, out));
    text
}

fn pool(status: &Status, out: Out) -> String {
    if status.pool.is_empty() {
        return "no pool: mode = \"stateless\"\n".into();
    }
    let mut table = Table::new(&["POOL", "PROTOCOL", "FREE", "PORTS"]);
    for ports in &status.pool {
        let ink = if ports.free == 0 { Ink::Warn } else { Ink::Plain };
        table.row([
            Cell::new(ports.address.to_string()),
            Cell::new(clean(&ports.protocol)),
            Cell::inked(count(ports.free), ink),
            count(ports.all).into(),
        ]);
    }
    table.show(out, 0)
}

/// Reasons that happened.
fn dropped(status: &Status, out: Out) -> String {
    let mut table = Table::new(&["DROPPED", "PACKETS"]);
    let happened = status.dropped.iter().filter(|(_, count)| **count > 0);
    let mut rows: Vec<(&String, &u64)> = happened.collect();
    if rows.is_empty() {
        return "no packet was dropped\n".into();
    }
    rows.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    for (reason, packets) in rows {
        table.row([Cell::new(reason), count(*packets).into()]);
    }
    table.show(out, 0)
}

const fn bad_if(count: u64) -> Ink {
    if count > 0 { Ink::Warn } else { Ink::Plain }
}
