//! Whoever forges an upstream's answers and does not know id, port, question and letters all at once gets nothing in.
//!
//! ```text
//! client ── hub ── edge: edged [fd00::10]:53 ── cp1: the upstream [fd00::11]:53, and its liar
//! ```
//! The liar is the upstream itself: it sees id, port and question of every query, answers from the right address and port
//! before the honest answer sets out, and gets wrong only what the case says. That is more than any neighbour can do.

use std::{
    collections::BTreeSet,
    net::{IpAddr, UdpSocket},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use tests::{
    Edge, World,
    edge::find,
    nameserver::{self, A, AAAA, Data, Deed, Nameserver, Query},
};

const PATIENCE: Duration = Duration::from_secs(8);
const DNS: u16 = 53;
/// Wrong answers to one query after which it is asked by TCP: more than 100.
const FEW: u16 = 95;

#[test]
fn of_all_other_65_535_ids_from_the_right_address_and_port_none_is_accepted() -> Result<()> {
    let rig = Rig::start()?;
    // Each query hears other wrong ids, so few that it goes on listening: together all there are.
    let rounds = usize::from(u16::MAX).div_ceil(FEW.into());
    rig.upstream.turn(move |query| {
        // By its number, so that a query that is sent again hears the same once more.
        let number = query.name.strip_prefix("ids").and_then(|rest| rest.split('.').next());
        let Some(round) = number
            .and_then(|number| number.parse::<usize>().ok())
            .filter(|_| !query.tcp)
        else {
            return vec![honest(query).into()];
        };
        let first = 1 + round * usize::from(FEW);
        let mut deeds: Vec<Deed> = (first..first + usize::from(FEW))
            .filter_map(|other| u16::try_from(other).ok())
            .map(|other| with_id(lie(query), query.id ^ other).into())
            .collect();
        deeds.push(honest(query).into());
        deeds
    });
    for round in 0..rounds {
        rig.asks(&format!("ids{round}.example.org"), A)?;
    }
    let [heard, ..] = rig.mismatches()?;
    println!("wrong ids while somebody listened: {heard} in {rounds} queries, none accepted");
    // More than all if a query was sent again, never fewer.
    ensure!(heard >= u64::from(u16::MAX), "{heard} wrong ids were heard");
    ensure!(rig.upstream.tcp() == 0, "the honest answers came by datagram");

    // All of them at one query: it goes on by TCP, where the liar would have to guess sequence numbers as well. They are sent
    // once, and beside what else is asked, so that a liar who is slow does not pass for a server that is dead.
    let before = rig.upstream.tcp();
    let met = Mutex::new(BTreeSet::new());
    rig.upstream.turn(move |query| {
        if query.tcp || !query.name.starts_with("flood") {
            return vec![honest(query).into()];
        }
        let question = (query.name.clone(), query.kind);
        if !met.lock().expect("no panic while it is held").insert(question) {
            return Vec::new();
        }
        let wrong = (1..=u16::MAX).map(|other| with_id(lie(query), query.id ^ other));
        let deed = |bytes: Vec<u8>| Deed {
            after: Duration::from_millis(1),
            ..bytes.into()
        };
        wrong.chain([honest(query)]).map(deed).collect()
    });
    rig.asks("flood.example.org", A)?;
    rig.asks("flood-synthesised.example.org", AAAA)?;
    ensure!(rig.upstream.tcp() > before, "a flooded question goes on by TCP");
    ensure!(rig.counts("floods")? >= 2, "{:#}", rig.status()?);
    Ok(())
}

#[test]
fn the_right_id_from_another_port_or_with_another_question_or_other_letters_is_never_accepted() -> Result<()> {
    let rig = Rig::start()?;
    // (what, the lie, whether the honest answer may come by TCP only)
    type Forge = fn(&Query) -> Vec<u8>;
    let cases: [(&str, Forge); 5] = [
        ("another name", |query| {
            changed(query, |question| {
                question[1] = if question[1] == b'q' { b'r' } else { b'q' }
            })
        }),
        ("another type", |query| {
            changed(query, |question| {
                let at = question.len() - 3;
                question[at] = if question[at] == 1 { 28 } else { 1 };
            })
        }),
        ("another class", |query| {
            changed(query, |question| {
                let at = question.len() - 1;
                question[at] = 3;
            })
        }),
        ("no question", |query| {
            let bytes = lie(query);
            let mut bare = bytes[..12].to_vec();
            bare[4..6].copy_from_slice(&[0, 0]);
            // The record's owner in full, since there is no question to point to.
            bare.extend_from_slice(&query.question()[..query.question().len() - 4]);
            bare.extend_from_slice(&bytes[12 + query.question().len() + 2..]);
            bare
        }),
        ("two questions", |query| {
            let bytes = lie(query);
            let at = 12 + query.question().len();
            let mut twice = bytes[..at].to_vec();
            twice[4..6].copy_from_slice(&[0, 2]);
            twice.extend_from_slice(query.question());
            twice.extend_from_slice(&bytes[at..]);
            twice
        }),
    ];
    for (what, forge) in cases {
        let before = rig.mismatches()?;
        rig.upstream
            .turn(move |query| vec![forge(query).into(), forge(query).into(), honest(query).into()]);
        for (index, kind) in [A, AAAA].into_iter().enumerate() {
            let name = format!("{}{index}.example.org", what.replace(' ', "-"));
            rig.asks(&name, kind).with_context(|| what)?;
        }
        let after = rig.mismatches()?;
        println!("{what}: {} heard, none accepted", after[1] - before[1]);
        // AAAA asks for A, too: three queries, each with two lies.
        ensure!(after[1] >= before[1] + 6, "{what}: {before:?} {after:?}");
    }
    ensure!(rig.upstream.tcp() == 0, "all of that by datagram");

    rig.upstream.turn(|query| {
        let elsewhere = Deed {
            elsewhere: true,
            ..lie(query).into()
        };
        vec![elsewhere.clone(), elsewhere, honest(query).into()]
    });
    let before = rig.mismatches()?;
    rig.asks("port.example.org", A)?;
    rig.asks("port-synthesised.example.org", AAAA)?;
    ensure!(rig.mismatches()? == before, "the kernel keeps those away");
    ensure!(rig.upstream.tcp() == 0, "all of that by datagram");

    // All right but the letters' case: it may be a liar that guessed the rest, so the answer is fetched by TCP.
    rig.upstream.turn(|query| {
        if query.tcp {
            return vec![honest(query).into()];
        }
        let other = changed(query, |question| {
            let end = question.len() - 4;
            for octet in &mut question[..end] {
                *octet = if octet.is_ascii_lowercase() {
                    octet.to_ascii_uppercase()
                } else {
                    octet.to_ascii_lowercase()
                };
            }
        });
        vec![other.into()]
    });
    rig.asks("letters.example.org", A)?;
    rig.asks("letters-synthesised.example.org", AAAA)?;
    let [.., case] = rig.mismatches()?;
    println!(
        "other letters: {case} heard, none accepted; {} asked by TCP",
        rig.upstream.tcp()
    );
    ensure!(case >= 3 && rig.upstream.tcp() >= 3, "{:#}", rig.status()?);
    Ok(())
}

/// Queries whose ids and ports are looked at.
const QUERIES: usize = 10_000;
/// Askers at a time.
const ASKERS: usize = 8;
/// Classes that ids and ports are counted in; chi-square then has 63 degrees of freedom, is 63 on average, and above
/// 130 once in a million runs.
const CLASSES: usize = 64;
const CHI_SQUARE: f64 = 130.0;

/// Id, port and question of a query.
type Seen = (u16, u16, Vec<u8>);

#[test]
fn ids_ports_and_letters_of_10_000_queries_are_spread_as_chance_spreads_them() -> Result<()> {
    let rig = Rig::start()?;
    let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
    let book = Arc::clone(&seen);
    rig.upstream.turn(move |query| {
        let one = (query.id, query.from.port(), query.question().to_vec());
        book.lock().expect("no panic while it is held").push(one);
        vec![honest(query).into()]
    });
    let begin = Instant::now();
    thread::scope(|scope| {
        let askers: Vec<_> = (0..ASKERS)
            .map(|asker| {
                let rig = &rig;
                scope.spawn(move || -> Result<()> {
                    let socket = nameserver::socket(&rig.world.client, None, rig.front())?;
                    for number in 0..QUERIES / ASKERS {
                        asks(&socket, &format!("spread-of-{asker}-and-{number}.example.org"), A)?;
                    }
                    Ok(())
                })
            })
            .collect();
        askers.into_iter().try_for_each(|asker| asker.join().expect("no panic"))
    })?;
    let took = begin.elapsed();
    let mut seen = std::mem::take(&mut *seen.lock().expect("no panic while it is held"));
    // A query whose answer did not come soon is sent again as it is, letters and all: that is no other.
    let mut known = BTreeSet::new();
    seen.retain(|one| known.insert(one.clone()));
    ensure!(seen.len() >= QUERIES, "{} queries", seen.len());
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    let mut range = range.split_whitespace().filter_map(|end| end.parse::<u32>().ok());
    let (low, high) = (
        range.next().context("a lowest port")?,
        range.next().context("a highest port")?,
    );
    let mut table = format!("{} queries in {:.1} s\n", seen.len(), took.as_secs_f64());
    for (what, values, low, high) in [
        ("id", seen.iter().map(|one| one.0).collect::<Vec<_>>(), 0, 65_535),
        ("port", seen.iter().map(|one| one.1).collect(), low, high),
    ] {
        let (balls, bins) = (values.len() as f64, f64::from(high - low + 1));
        let load = balls / bins;
        let distinct = values.iter().collect::<BTreeSet<_>>().len() as f64;
        // Balls in bins: how many bins have one, and how much that varies.
        let (expected, empty) = (bins * (1.0 - (-load).exp()), (-load).exp());
        let deviation = (bins * (empty - (1.0 + load) * empty * empty)).sqrt();
        let mut classes = [0.0; CLASSES];
        for value in &values {
            ensure!(
                (low..=high).contains(&u32::from(*value)),
                "{what} {value} lies outside of {low}..={high}"
            );
            classes[(f64::from(u32::from(*value) - low) / bins * CLASSES as f64) as usize] += 1.0;
        }
        let fair = balls / CLASSES as f64;
        let chi_square: f64 = classes.iter().map(|count| (count - fair).powi(2) / fair).sum();
        // The next one known from the one before: as far as chance brings any two together.
        let near = values.windows(2).filter(|pair| pair[0].abs_diff(pair[1]) <= 16).count() as f64;
        let chance = balls * 33.0 / bins;
        table += &format!(
            "{what:>5}: {distinct} of {bins} different (chance: {expected:.0} ± {deviation:.0}), chi-square {chi_square:.0} \
             (chance: 63 ± 11), next within 16: {near} (chance: {chance:.0})\n"
        );
        ensure!((distinct - expected).abs() <= 6.0 * deviation, "{table}");
        ensure!(chi_square <= CHI_SQUARE, "{table}");
        ensure!(near <= chance + 6.0 * chance.sqrt() + 3.0, "{table}");
    }
    // Together: no pair twice but as chance has it.
    let pairs = seen.iter().map(|one| (one.0, one.1)).collect::<BTreeSet<_>>().len();
    let letters = seen
        .iter()
        .flat_map(|one| &one.2[..one.2.len() - 4])
        .filter(|octet| octet.is_ascii_alphabetic());
    let upper = letters.clone().filter(|octet| octet.is_ascii_uppercase()).count() as f64;
    let letters = letters.count() as f64;
    table += &format!(
        "pairs of both: {pairs} of {} different; letters: {:.2} % in upper case of {letters}",
        seen.len(),
        100.0 * upper / letters
    );
    println!("{table}");
    ensure!(seen.len() - pairs <= 2, "{table}");
    ensure!((upper - letters / 2.0).abs() <= 6.0 * (letters / 4.0).sqrt(), "{table}");
    Ok(())
}

struct Rig {
    socket: UdpSocket,
    edge: Edge,
    upstream: Nameserver,
    world: World,
}

impl Rig {
    fn start() -> Result<Self> {
        let world = World::new(1)?;
        let upstream = Nameserver::start(&world.cp[0], DNS, |query| vec![honest(query).into()])?;
        let config = format!(
            "version = 1\n[dns64]\nlisten = [\"{}\"]\nprefixes = [\"2001:db8:64::/96\"]\nallow = [\"fd00::/64\"]\n\
             upstreams = [\"udp://{}\"]\n",
            world.edge.at(DNS),
            upstream.address
        );
        let edge = Edge::start(&world.edge, &config)?;
        let socket = nameserver::socket(&world.client, None, world.edge.at(DNS))?;
        let rig = Self {
            socket,
            edge,
            upstream,
            world,
        };
        rig.asks("first.example.org", A)?;
        Ok(rig)
    }

    fn front(&self) -> std::net::SocketAddr {
        self.world.edge.at(DNS)
    }

    /// Asks, and makes sure that the honest answer comes; then once more, for what has been kept.
    fn asks(&self, name: &str, kind: u16) -> Result<()> {
        asks(&self.socket, name, kind)?;
        asks(&self.socket, name, kind)
    }

    fn status(&self) -> Result<serde_json::Value> {
        let status = self.edge.json(&["dns", "status"])?;
        find(&status, "upstreams")
            .and_then(|groups| groups.get(0)?["servers"].get(0).cloned())
            .with_context(|| format!("no upstream in {status}"))
    }

    /// Datagrams that were no replies: by their ids, questions and letters.
    fn mismatches(&self) -> Result<[u64; 3]> {
        let server = self.status()?;
        Ok(["id", "question", "case"].map(|name| count(&server["mismatches"], name)))
    }

    fn counts(&self, name: &str) -> Result<u64> {
        Ok(count(&self.status()?["counts"], name))
    }
}

/// A count in a list of names with counts.
fn count(list: &serde_json::Value, name: &str) -> u64 {
    let mut pairs = list.as_array().into_iter().flatten();
    pairs
        .find(|pair| pair[0] == name)
        .and_then(|pair| pair[1].as_u64())
        .unwrap_or(0)
}

fn asks(socket: &UdpSocket, name: &str, kind: u16) -> Result<()> {
    static SERIAL: AtomicUsize = AtomicUsize::new(0);
    let id = SERIAL.fetch_add(1, Ordering::Relaxed) as u16;
    let (reply, _) =
        nameserver::ask(socket, &nameserver::query(id, name, kind), PATIENCE).with_context(|| name.to_owned())?;
    let wanted: IpAddr = if kind == A { HONEST } else { "2001:db8:64::c000:201" }.parse()?;
    ensure!(reply.code == 0 && reply.addresses == [wanted], "{name}: {reply:?}");
    Ok(())
}

const HONEST: &str = "192.0.2.1";
const LIE: &str = "203.0.113.66";
const LIE_6: &str = "2001:db8:bad::1";

/// A is there, AAAA is not.
fn honest(query: &Query) -> Vec<u8> {
    match query.kind {
        A => query.answer(&[Data::Ip(HONEST.parse().expect("an address"))], 3600),
        _ => query.answer(&[], 3600),
    }
}

/// An answer that would be taken, and kept for long.
fn lie(query: &Query) -> Vec<u8> {
    let address = if query.kind == AAAA { LIE_6 } else { LIE };
    query.answer(&[Data::Ip(address.parse().expect("an address"))], 86_400)
}

fn with_id(mut message: Vec<u8>, id: u16) -> Vec<u8> {
    message[..2].copy_from_slice(&id.to_be_bytes());
    message
}

/// The lie with another question; the record points to it.
fn changed(query: &Query, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut message = lie(query);
    change(&mut message[12..12 + query.question().len()]);
    message
}
