//! `edgectl dns`: what the resolver answers and why, zones, keys of nodes, its cache.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    net::{IpAddr, SocketAddr},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use dns64::{
    status::{Answer, Group, KeyStatus, RecordText, Request, Resolved, Server, Status, Udp, ZoneRecords},
    zone::Algorithm,
};
use serde_json::{Value, json};

use super::{
    Fail,
    out::{Cell, Ink, Out, Table, bytes, clean, count, duration, plural},
    status::typed,
};
use crate::{
    client::{Client, ClientError},
    config::nearest,
    control::versioned,
};

/// Where the help says that a node keeps its key.
const KEY_FILE: &str = "/etc/edged-dns.key";

pub(super) async fn query(
    client: &Client,
    out: Out,
    name: String,
    kind: Option<String>,
    trace: bool,
) -> Result<u8, Fail> {
    let kind = kind_for(&name, kind)?;
    let request = Request::Query { name, kind, trace };
    match ask(client, request).await? {
        (value, Answer::Query(resolved)) => {
            if out.json {
                out.print_json(&value)
            } else {
                out.print(&explain(&resolved, trace, out))
            }
            Ok(u8::from(failed(&resolved)))
        }
        (_, other) => Err(unexpected(other)),
    }
}

/// An address has no other record than its name.
fn kind_for(name: &str, kind: Option<String>) -> Result<String, Fail> {
    match (name.parse::<IpAddr>(), kind) {
        (Ok(_), Some(kind)) if !kind.eq_ignore_ascii_case("PTR") => Err(Fail::bad_input(format!(
            "{name} is an address, and an address is asked for its name; leave \"{}\" out",
            clean(&kind)
        ))),
        (Ok(_), _) => Ok("PTR".into()),
        (Err(_), kind) => Ok(kind.map_or_else(|| "AAAA".into(), |kind| kind.to_ascii_uppercase())),
    }
}

/// "No such name" is an answer; these are none.
fn failed(resolved: &Resolved) -> bool {
    resolved.source == "failure" || matches!(resolved.code.as_str(), "SERVFAIL" | "REFUSED")
}

pub(super) async fn zones(client: &Client, out: Out, name: Option<String>) -> Result<u8, Fail> {
    match ask(client, Request::Zones { name: name.clone() }).await? {
        (value, Answer::Zones { zones }) => {
            if out.json {
                out.print_json(&value)
            } else {
                out.print(&render_zones(&zones, out))
            }
            Ok(0)
        }
        (
            _,
            Answer::Refused {
                message,
                bad_request: false,
            },
        ) => {
            let (Some(name), Ok((_, Answer::Zones { zones }))) =
                (name, ask(client, Request::Zones { name: None }).await)
            else {
                return Err(Fail::could_not(message));
            };
            let names = zones.into_iter().map(|zone| zone.name).collect();
            Err(unknown("no zone is called", &name, names, message))
        }
        (_, other) => Err(unexpected(other)),
    }
}

/// Makes a key; its file goes to `file`, which must not exist, or to stdout.
pub(super) async fn key_add(
    client: &Client,
    out: Out,
    node: String,
    algorithm: Algorithm,
    file: Option<&Path>,
) -> Result<u8, Fail> {
    // Opened first: the secret is told only once, and a key that nobody has would only be in the way.
    let opened = file.map(|path| create(path).map(|file| (path, file))).transpose()?;
    let asked = client.post("/v1/dns", &Request::AddKey { node, algorithm }).await;
    let answered = asked.map_err(uncertain).and_then(|value| {
        let answer = typed(&value)?;
        Ok((value, answer))
    });
    let (mut value, key, text) = match answered {
        Ok((value, Answer::Key { key, file })) => (value, key, file),
        other => {
            if let Some((path, _)) = &opened {
                let _ = fs::remove_file(path);
            }
            return Err(other.map_or_else(|fail| fail, |(_, other)| unexpected(other)));
        }
    };
    let lost = |path: &str, error: &str| {
        Fail::could_not(format!(
            "the key \"{name}\" is in force, but {path} cannot be written: {error}; nobody has its secret, so take it back: \
             edgectl dns key rm '{name}'",
            name = clean(&key.name)
        ))
    };
    if let Some((path, mut kept)) = opened {
        if let Err(error) = kept.write_all(text.as_bytes()).and_then(|()| kept.sync_all()) {
            let _ = fs::remove_file(path);
            return Err(lost(&path.display().to_string(), &error.to_string()));
        }
        if let Value::Object(fields) = &mut value {
            // Whoever asks for a file does not want the secret in a log of this output.
            fields.remove("file");
            fields.insert("path".into(), json!(path));
        }
    }
    if out.json {
        let text = serde_json::to_string_pretty(&value).unwrap_or_default();
        return if out.write(&text) {
            Ok(0)
        } else {
            Err(lost("stdout", "it was closed"))
        };
    }
    match file {
        Some(path) => out.print(&format!("{} written: {}", path.display(), summary(&key))),
        None if !out.write(&text) => return Err(lost("stdout", "it was closed")),
        None => {}
    }
    eprintln!("{}", how_to_use(client, &key, file).await);
    Ok(0)
}

/// A file that was not there before, for the user alone.
fn create(path: &Path) -> Result<File, Fail> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.map_err(|error| {
        let shown = path.display();
        if error.kind() == io::ErrorKind::AlreadyExists {
            Fail::bad_input(format!(
                "{shown} exists already, so no key was made; name another file, or remove it if nobody needs it"
            ))
        } else {
            Fail::could_not(format!("{shown} cannot be made, so no key was made: {error}"))
        }
    })
}

/// A change that got no answer, or one from edged instead of the resolver, may have been made all the same.
fn uncertain(error: ClientError) -> Fail {
    let open = match &error {
        ClientError::Slow | ClientError::Broken(_) | ClientError::Foreign(_) => true,
        ClientError::Refused(refusal) => !refusal.bad_request,
        _ => false,
    };
    let fail = Fail::from(error);
    if open {
        let message = format!(
            "{}\nwhether there is a key whose secret nobody has: edgectl dns key list",
            fail.message
        );
        return Fail { message, ..fail };
    }
    fail
}

fn summary(key: &KeyStatus) -> String {
    format!(
        "key \"{}\" ({}), which may change {} and nothing else",
        clean(&key.name),
        clean(&key.algorithm),
        clean(&key.node)
    )
}

/// What the operator does next, with the names and addresses of this edge as far as it tells them.
async fn how_to_use(client: &Client, key: &KeyStatus, file: Option<&Path>) -> String {
    let status = match ask(client, Request::Status).await {
        Ok((_, Answer::Status(status))) => *status,
        _ => Status::default(),
    };
    let others = match ask(client, Request::Keys).await {
        Ok((_, Answer::Keys { keys })) => keys,
        _ => Vec::new(),
    };
    let node = clean(&key.node);
    let mut text = if file.is_some() {
        String::new()
    } else {
        format!(
            "{}. The secret is shown this once; --out FILE writes it to a file.\n",
            summary(key)
        )
    };
    text.push_str(&format!(
        "On the node, with the key in {KEY_FILE} (mode 0600) and its own address for ADDRESS:\n\n  \
         nsupdate -k {KEY_FILE} <<'END'\n  server {}\n  zone {}\n  update delete {node} AAAA\n  \
         update add {node} 1800 AAAA ADDRESS\n  send\n  END\n",
        server(&status.listen),
        zone_of(&status, &key.node),
    ));
    let others = others
        .iter()
        .filter(|other| other.node == key.node && other.name != key.name);
    for other in others {
        text.push_str(&format!(
            "\nThe node has another key, which stays good; once the node uses this one: edgectl dns key rm '{}'\n",
            clean(&other.name)
        ));
    }
    text.trim_end().to_owned()
}

/// As `nsupdate` takes it: a listener that other machines reach, IPv6 first.
fn server(listen: &[SocketAddr]) -> String {
    let reached = |address: &&SocketAddr| !address.ip().is_loopback() && !address.ip().is_unspecified();
    let best = listen.iter().filter(reached).min_by_key(|address| address.is_ipv4());
    match best {
        Some(address) if address.port() == 53 => address.ip().to_string(),
        Some(address) => format!("{} {}", address.ip(), address.port()),
        None => "ADDRESS-OF-THE-EDGE".into(),
    }
}

/// The most specific zone that has `node`.
fn zone_of(status: &Status, node: &str) -> String {
    let names = status.zones.iter().filter_map(|zone| zone.names.first());
    let zones = names.filter(|zone| node.strip_suffix(zone.as_str()).is_some_and(|rest| rest.ends_with('.')));
    zones
        .max_by_key(|zone| zone.len())
        .map_or_else(|| "ZONE".into(), |zone| clean(zone))
}

pub(super) async fn key_list(client: &Client, out: Out) -> Result<u8, Fail> {
    match ask(client, Request::Keys).await? {
        (value, Answer::Keys { keys }) => {
            if out.json {
                out.print_json(&value)
            } else {
                out.print(&render_keys(&keys, out))
            }
            Ok(0)
        }
        (_, other) => Err(unexpected(other)),
    }
}

pub(super) async fn key_rm(client: &Client, out: Out, name: String) -> Result<u8, Fail> {
    match ask(client, Request::RemoveKey { name: name.clone() }).await? {
        (
            value,
            Answer::Removed {
                name: key,
                node,
                records,
            },
        ) => {
            if out.json {
                out.print_json(&value);
                return Ok(0);
            }
            let gone = if records {
                format!("; it was the last one of {}, so its records are gone too", clean(&node))
            } else {
                String::new()
            };
            out.print(&format!(
                "key \"{}\" taken back: what it signs from now on is refused{gone}",
                clean(&key)
            ));
            Ok(0)
        }
        (
            _,
            Answer::Refused {
                message,
                bad_request: false,
            },
        ) => {
            let Ok((_, Answer::Keys { keys })) = ask(client, Request::Keys).await else {
                return Err(Fail::could_not(message));
            };
            let names = keys.into_iter().map(|key| key.name).collect();
            Err(unknown("no key is called", &name, names, message))
        }
        (_, other) => Err(unexpected(other)),
    }
}

pub(super) async fn flush(client: &Client, out: Out, name: Option<String>, below: bool) -> Result<u8, Fail> {
    let about = match &name {
        None => String::new(),
        Some(name) if below => format!(" about {} and all below it", clean(name)),
        Some(name) => format!(" about {}", clean(name)),
    };
    match ask(client, Request::Flush { name, below }).await? {
        (value, Answer::Flushed { answers }) => {
            if out.json {
                out.print_json(&value);
            } else {
                let answers = match answers {
                    0 => "nothing was known".into(),
                    1 => "1 answer forgotten".into(),
                    many => format!("{} answers forgotten", count(many)),
                };
                out.print(&format!("{answers}{about}"));
            }
            Ok(0)
        }
        (_, other) => Err(unexpected(other)),
    }
}

pub(super) async fn status(client: &Client, out: Out) -> Result<u8, Fail> {
    match ask(client, Request::Status).await? {
        (value, Answer::Status(status)) => {
            if out.json {
                out.print_json(&value)
            } else {
                out.print(&render(&status, out))
            }
            Ok(0)
        }
        (_, other) => Err(unexpected(other)),
    }
}

async fn ask(client: &Client, request: Request) -> Result<(Value, Answer), Fail> {
    let value = client.post("/v1/dns", &request).await?;
    let answer = typed(&value)?;
    Ok((value, answer))
}

fn unexpected(answer: Answer) -> Fail {
    match answer {
        Answer::Refused {
            message,
            bad_request: true,
        } => Fail::bad_input(message),
        Answer::Refused { message, .. } => Fail::could_not(message),
        other => Fail::could_not(format!(
            "edged answered another question ({}); are edgectl and edged of the same release? edgectl version",
            versioned(&other)
                .ok()
                .and_then(|value| Some(value.get("answer")?.to_string()))
                .unwrap_or_default()
        )),
    }
}

/// The reason of a refusal: bad input with the nearest name, if `names` lack this one.
fn unknown(what: &str, name: &str, names: Vec<String>, message: String) -> Fail {
    let wanted = absolute(name);
    // A name below the first zone may be written without it.
    if names.iter().any(|known| *known == wanted || known.starts_with(&wanted)) {
        return Fail::could_not(message);
    }
    let names: Vec<String> = names.iter().map(|known| clean(known.trim_end_matches('.'))).collect();
    let help = match nearest(name.trim_end_matches('.'), &names) {
        Some(near) => format!("did you mean \"{near}\"?"),
        None if names.is_empty() => "there is none".to_owned(),
        None => format!("there are: {}", names.join(", ")),
    };
    Fail::bad_input(format!("{what} \"{}\"; {help}", clean(name)))
}

fn absolute(name: &str) -> String {
    format!("{}.", name.trim_end_matches('.').to_ascii_lowercase())
}

fn explain(resolved: &Resolved, trace: bool, out: Out) -> String {
    let mut text = String::new();
    if trace {
        let mut steps = Table::default();
        for step in &resolved.steps {
            steps.row([
                Cell::inked(format!("{:>8}", milliseconds(step.at_ms)), Ink::Dim),
                Cell::new(&step.text),
            ]);
        }
        text.push_str(&steps.show(out, 0));
        text.push('\n');
    }
    let ink = match resolved.code.as_str() {
        _ if failed(resolved) => Ink::Bad,
        _ if resolved.answers.is_empty() => Ink::Warn,
        _ => Ink::Good,
    };
    let kept = match resolved.ttl {
        0 => "not to be kept".to_owned(),
        ttl => format!("good for {}", duration(ttl.into())),
    };
    text.push_str(&format!(
        "{} {}  {}  from {}, {kept}, took {}\n",
        out.ink(Ink::Bold, &clean(&resolved.name)),
        clean(&resolved.kind),
        out.ink(ink, &clean(&resolved.code)),
        clean(&resolved.source),
        milliseconds(resolved.took_ms)
    ));
    if resolved.answers.is_empty() {
        text.push_str("no records\n");
    }
    text.push_str(&records(&resolved.answers).show(out, 0));
    // Beside an answer it tells nothing more.
    if resolved.answers.is_empty() && !resolved.authorities.is_empty() {
        text.push_str("\nauthority\n");
        text.push_str(&records(&resolved.authorities).show(out, 0));
    }
    text
}

/// As in a zone file; `;` begins a comment there.
fn records(records: &[RecordText]) -> Table {
    let mut table = Table::default();
    for record in records {
        table.row([
            Cell::new(&record.name),
            record.ttl.to_string().into(),
            "IN".into(),
            Cell::new(&record.kind),
            Cell::new(&record.data),
            Cell::inked(if record.dynamic { "; dynamic" } else { "" }, Ink::Dim),
        ]);
    }
    table
}

fn render_zones(zones: &[ZoneRecords], out: Out) -> String {
    if zones.is_empty() {
        return "no zones are configured: [[dns64.zone]] in the configuration adds one\n".into();
    }
    let render = |zone: &ZoneRecords| {
        let dynamic = zone.records.iter().filter(|record| record.dynamic).count();
        let head = format!(
            "; {}  {}, {dynamic} of them registered by nodes",
            clean(&zone.name),
            plural(zone.records.len(), "record")
        );
        format!("{}\n{}", out.ink(Ink::Bold, &head), records(&zone.records).show(out, 0))
    };
    zones.iter().map(render).collect::<Vec<_>>().join("\n")
}

fn render_keys(keys: &[KeyStatus], out: Out) -> String {
    if keys.is_empty() {
        return "no node has a key: edgectl dns key add NODE makes one\n".into();
    }
    let mut table = Table::new(&["KEY", "NODE", "ALGORITHM", "LAST USED (UTC)"]);
    for key in keys {
        let used = key.last_used.as_deref();
        let used = used.map(|at| at.replacen('T', " ", 1).trim_end_matches('Z').to_owned());
        table.row([
            Cell::new(&key.name),
            Cell::new(&key.node),
            Cell::new(&key.algorithm),
            used.map_or_else(|| Cell::inked("never", Ink::Dim), Cell::new),
        ]);
    }
    table.show(out, 0)
}

fn render(status: &Status, out: Out) -> String {
    let mut facts = Table::default();
    let mut fact = |name: &str, words: String| facts.row([Cell::inked(name, Ink::Dim), Cell::new(words)]);
    let listen: Vec<String> = status.listen.iter().map(ToString::to_string).collect();
    fact("listen", listen.join(" "));
    let prefixes = if status.prefixes.is_empty() {
        "none: nothing is synthesised".into()
    } else {
        status.prefixes.join(" ")
    };
    fact("prefixes", prefixes);
    fact("udp", told(udp(&status.udp)));
    let tcp = &status.tcp;
    fact(
        "tcp",
        format!(
            "{} open, {}",
            count(tcp.open),
            told([
                ("connections", tcp.accepted),
                ("turned away", tcp.turned_away),
                ("messages", tcp.received),
                ("denied", tcp.denied),
            ])
        ),
    );
    let cache = &status.cache;
    fact(
        "cache",
        format!(
            "{} answers in {} of {}, {}",
            count(cache.entries),
            bytes(cache.octets),
            bytes(cache.limit),
            told([
                ("inserted", cache.inserted),
                ("evicted", cache.evicted),
                ("served stale", cache.stale),
            ])
        ),
    );
    let named = |counts: &[(String, u64)]| told(counts.iter().map(|(name, count)| (name.as_str(), *count)));
    fact("resolved", named(&status.resolved));
    fact("updates", named(&status.updates));
    fact("keys", status.keys.to_string());
    let mut text = facts.show(out, 0);
    if !status.upstreams.is_empty() {
        text.push('\n');
        text.push_str(&upstreams(&status.upstreams).show(out, 0));
        text.push_str(&lines(&status.upstreams));
    }
    if !status.zones.is_empty() {
        let mut zones = Table::new(&["ZONE", "SERIAL", "NODES", "REVERSE ZONES"]);
        for zone in &status.zones {
            let (name, reverse) = zone
                .names
                .split_first()
                .map_or(("-", &[][..]), |(name, rest)| (name, rest));
            zones.row([
                Cell::new(name),
                zone.serial.to_string().into(),
                zone.nodes.to_string().into(),
                reverse.join(" ").into(),
            ]);
        }
        text.push('\n');
        text.push_str(&zones.show(out, 0));
        for (node, why) in status.zones.iter().flat_map(|zone| &zone.left_out) {
            text.push_str(&format!("{} is not served: {}\n", clean(node), clean(why)));
        }
    }
    text
}

/// Those that always matter, and the others if they happened.
fn told<'a>(counts: impl IntoIterator<Item = (&'a str, u64)>) -> String {
    let happened = counts.into_iter().filter(|(_, times)| *times > 0);
    let told: Vec<String> = happened
        .map(|(what, times)| format!("{} {what}", count(times)))
        .collect();
    if told.is_empty() {
        "none yet".into()
    } else {
        told.join(", ")
    }
}

/// Every counter of datagrams, with the word for it.
fn udp(udp: &Udp) -> [(&'static str, u64); 11] {
    [
        ("received", udp.received),
        ("known", udp.hits),
        ("looked up", udp.misses),
        ("rejected", udp.rejected),
        ("slipped", udp.slipped),
        ("limited", udp.limited),
        ("denied", udp.denied),
        ("ignored", udp.ignored),
        ("dropped", udp.dropped),
        ("refreshed", udp.refreshed),
        ("unsent", udp.unsent),
    ]
}

fn upstreams(groups: &[Group]) -> Table {
    let mut table = Table::new(&[
        "DOMAIN",
        "UPSTREAM",
        "STATE",
        "LATENCY",
        "QUERIES",
        "GOOD",
        "SILENT",
        "OTHERWISE",
        "LAST ERROR",
    ]);
    for group in groups {
        for server in &group.servers {
            let times = |name: &str| {
                let found = server.counts.iter().find(|(known, _)| known == name);
                found.map_or(0, |(_, times)| *times)
            };
            let usual = ["queries", "good", "silent"];
            let other = server.counts.iter().filter(|(name, _)| !usual.contains(&name.as_str()));
            let other: Vec<(String, u64)> = other
                .cloned()
                .chain(
                    server
                        .mismatches
                        .iter()
                        .map(|(what, times)| (format!("wrong {what}"), *times)),
                )
                .filter(|(_, times)| *times > 0)
                .collect();
            let otherwise = if other.is_empty() {
                "-".to_owned()
            } else {
                told(other.iter().map(|(name, times)| (name.as_str(), *times)))
            };
            table.row([
                Cell::new(domain(group)),
                Cell::new(&server.url),
                Cell::inked(&server.state, ink_of(server)),
                server.latency_ms.map_or_else(|| "-".into(), milliseconds).into(),
                count(times("queries")).into(),
                count(times("good")).into(),
                count(times("silent")).into(),
                Cell::new(otherwise),
                Cell::new(server.last_error.as_deref().unwrap_or("")),
            ]);
        }
    }
    table
}

/// A line for each group that was asked, since its counts are not those of one server.
fn lines(groups: &[Group]) -> String {
    let asked = groups.iter().filter(|group| group.asked > 0);
    let line = |group: &Group| {
        format!(
            "{}: {}\n",
            clean(domain(group)),
            told([
                ("questions", group.asked),
                ("of them joined another", group.joined),
                ("under way", group.outstanding),
                ("turned away", group.busy),
                ("failed", group.failed),
            ])
        )
    };
    asked.map(line).collect()
}

/// The general group stands for the root.
pub(crate) fn domain(group: &Group) -> &str {
    if group.domain.is_empty() { "." } else { &group.domain }
}

pub(crate) fn ink_of(server: &Server) -> Ink {
    match server.state.as_str() {
        "up" => Ink::Good,
        "down" => Ink::Bad,
        _ => Ink::Warn,
    }
}

/// How well the resolver does, in one word and its reasons: upstreams that are out, and nodes that are left out.
pub(super) fn health(status: &Status) -> (Ink, String) {
    let servers = || status.upstreams.iter().flat_map(|group| &group.servers);
    let down: Vec<String> = servers()
        .filter(|server| server.state == "down")
        .map(|server| clean(&server.url))
        .collect();
    let dark = status
        .upstreams
        .iter()
        .find(|group| !group.servers.is_empty() && group.servers.iter().all(|server| server.state == "down"));
    let left_out: usize = status.zones.iter().map(|zone| zone.left_out.len()).sum();
    if let Some(group) = dark {
        let word = format!("no upstream for {} answers: {}", clean(domain(group)), down.join(", "));
        (Ink::Bad, word)
    } else if !down.is_empty() {
        (Ink::Warn, format!("upstreams are down: {}", down.join(", ")))
    } else if left_out > 0 {
        (Ink::Warn, format!("{} not served", plural(left_out, "node")))
    } else {
        (Ink::Good, String::new())
    }
}

/// `12 ms` where it is slow, `0.4 ms` where that matters.
fn milliseconds(ms: f64) -> String {
    match ms {
        ms if ms < 10.0 => format!("{ms:.1} ms"),
        ms if ms < 10_000.0 => format!("{ms:.0} ms"),
        ms => format!("{:.1} s", ms / 1e3),
    }
}
