//! `edgectl nat64`: the translator's device, what went through it, and what did not.

use dns64::nat64::status::{Side, Status};
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

/// Everything, or with `drops` only what did not go on.
pub(super) async fn status(client: &Client, out: Out, drops: bool) -> Result<u8, Fail> {
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
        out.print_json(&match drops {
            true => json!({ "schema_version": SCHEMA_VERSION, "dropped": status.dropped }),
            false => json!({ "schema_version": SCHEMA_VERSION, "nat64": status }),
        });
    } else if drops {
        out.print(&dropped(status, out));
    } else {
        out.print(&render(status, out));
    }
    Ok(0)
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
    text.push_str(&dropped(status, out));
    text
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
