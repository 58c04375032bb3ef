//! A backend that comes back gets its share again, and gets it gently.
//!
//! ```text
//! client ── hub ── edge: edged [::]:6443 ──┬── cp1 (fd00::11)
//!                             [::]:8443 ──┼── cp2 (fd00::12)
//!                                          └── cp3 (fd00::13)   the one that comes back
//! ```
//! Shares are those of the servers' own logs, and the length of a ban is told by the SYNs on the wire.

use std::{
    ops::RangeInclusive,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::{
    Edge, World,
    backend::{Backend, Script},
    load::{Load, Session},
    ms, wait_for, wait_until,
};

const PATIENCE: Duration = Duration::from_secs(8);
const LONG: Duration = Duration::from_secs(20);
const SLOW_START: Duration = Duration::from_secs(4);
const RATE: u32 = 300;
/// A third, give or take what one moment of a busy machine does to it.
const FULL: RangeInclusive<f64> = 0.25..=0.42;
/// What a busy machine may add to a time that the kernel's clock decides.
const SLACK: Duration = Duration::from_secs(2);

#[test]
fn by_turns_the_share_of_a_backend_that_returns_rises_over_slow_start() -> Result<()> {
    share_rises("round-robin", Duration::ZERO)
}

#[test]
fn by_sessions_the_share_of_a_backend_that_returns_rises_over_slow_start() -> Result<()> {
    // Ten sessions per backend at any time: with none there would be nothing to compare.
    share_rises("least-connections", Duration::from_millis(100))
}

fn share_rises(balance: &str, stay: Duration) -> Result<()> {
    let world = World::alone(3)?;
    let keys = format!(
        "kind = \"api\"\nbalance = \"{balance}\"\n[lb.frontend.health]\nfail_timeout = \"1s\"\nslow_start = \"4s\"\n"
    );
    let edge = Edge::start(&world.edge, &world.config(&keys))?;
    let first_two = [world.backend(0, Script::Echo)?, world.backend(1, Script::Echo)?];
    let target = world.front();
    let load = Load::start(&world.client, target, RATE, PATIENCE, move |stream| {
        let session = Session::on(stream)?;
        thread::sleep(stay);
        Ok(session.server)
    });
    edge.wait_for_state(world.back(2), "banned", PATIENCE)?;
    let back = world.backend(2, Script::Echo)?;
    // The probe that ends the ban.
    let begin = wait_for("cp3 serves", PATIENCE, || Some(back.accepted().first()?.at))?;
    wait_until("six seconds", LONG, || {
        begin.elapsed() >= SLOW_START + Duration::from_secs(2)
    })?;
    let report = load.stop();
    ensure!(report.failures().is_empty(), "{}", report.summary());

    let within = |backend: &Backend, from: u64, until: u64| {
        let (from, until) = (Duration::from_secs(from), Duration::from_secs(until));
        let all = backend.accepted();
        all.iter()
            .filter(|accepted| {
                accepted
                    .at
                    .checked_duration_since(begin)
                    .is_some_and(|at| at >= from && at < until)
            })
            .count() as f64
    };
    // Two seconds at a time: those who were held up in one of them come in the next.
    let shares = [(0, 1), (0, 2), (2, 4), (4, 6)].map(|(from, until)| {
        let others: f64 = first_two.iter().map(|backend| within(backend, from, until)).sum();
        let own = within(&back, from, until);
        own / (own + others)
    });
    println!(
        "{balance}: shares of cp3 in the first, the first two, the third and fourth, and the last two seconds: {shares:.2?}"
    );
    // Its weight grows from 0.1 to 1 of the others': 5 % to 14 % of the whole in the first second, 22 % to 33 % in the third
    // and fourth.
    let [first, begin, middle, end] = shares;
    ensure!((0.01..=0.2).contains(&first), "{shares:?}");
    ensure!((0.2..=0.36).contains(&middle), "{shares:?}");
    ensure!(begin < middle && begin < end, "it does not rise: {shares:?}");
    ensure!(FULL.contains(&end), "a full share is a third: {shares:?}");
    Ok(())
}

#[test]
fn without_slow_start_a_backend_that_returns_has_its_share_at_once() -> Result<()> {
    let world = World::alone(3)?;
    let keys = "kind = \"api\"\nbalance = \"round-robin\"\n[lb.frontend.health]\nfail_timeout = \"1s\"\nslow_start = \"none\"\n";
    let edge = Edge::start(&world.edge, &world.config(keys))?;
    let others = [world.backend(0, Script::Echo)?, world.backend(1, Script::Echo)?];
    let load = Load::of_echoes(&world.client, world.front(), RATE, PATIENCE);
    edge.wait_for_state(world.back(2), "banned", PATIENCE)?;
    let back = world.backend(2, Script::Echo)?;
    // Not from its first connection on, which is the probe: until it is answered, nobody else may come.
    edge.wait_for_state(world.back(2), "healthy", PATIENCE)?;
    let begin = Instant::now();
    wait_until("two seconds", LONG, || begin.elapsed() >= Duration::from_secs(2))?;
    let report = load.stop();
    let since = |backend: &Backend| {
        backend
            .accepted()
            .iter()
            .filter(|accepted| accepted.at >= begin)
            .count() as f64
    };
    let all: f64 = others.iter().map(since).sum::<f64>() + since(&back);
    let share = since(&back) / all;
    ensure!(FULL.contains(&share), "{share} of {all}");
    ensure!(report.failures().is_empty(), "{}", report.summary());
    Ok(())
}

#[test]
fn bans_in_a_row_grow_to_max_ban_and_are_short_again_after_good_behaviour() -> Result<()> {
    let world = World::alone(3)?;
    let keys = "kind = \"api\"\n[lb.frontend.health]\nfail_timeout = \"1s\"\nmax_ban = \"4s\"\nslow_start = \"none\"\n";
    let edge = Edge::start(&world.edge, &world.config(keys))?;
    let _others = [world.backend(1, Script::Echo)?, world.backend(2, Script::Echo)?];
    let mut capture = world.cp[0].capture("tcp port 6443")?;
    let load = Load::of_echoes(&world.client, world.front(), 100, PATIENCE);
    let bans = || reasons(&edge, &world, "ban");
    wait_until("five bans", LONG, || bans().is_ok_and(|bans| bans.len() >= 5))?;
    let told = bans()?;
    for (ban, term) in told.iter().zip([
        "banned for 1 s",
        "banned for 2 s, the 2nd time in a row",
        "banned for 4 s, the 3rd time in a row",
        "banned for 4 s, the 4th time in a row",
        "banned for 4 s, the 5th time in a row",
    ]) {
        ensure!(ban.ends_with(term), "\"{ban}\" does not end with \"{term}\": {told:#?}");
    }
    // What is told is what is done: between two probes nobody knocks. Before the first ban everybody does, so that no gap
    // there is nearly as long as a ban.
    let flows = capture.so_far()?.connects(world.edge.ip(), world.back(0));
    let mut gaps = Vec::new();
    for pair in flows.windows(2) {
        let gap = pair[1].opened.duration_since(pair[0].opened)?;
        if gap >= Duration::from_millis(900) {
            gaps.push(gap);
        }
    }
    let list: Vec<String> = gaps.iter().map(|gap| format!("{:.0} ms", ms(*gap))).collect();
    println!("between two probes: {}", list.join(", "));
    ensure!(gaps.len() >= 4, "{gaps:?}");
    for (gap, term) in gaps.iter().zip([1, 2, 4, 4]) {
        let term = Duration::from_secs(term);
        let within = term.saturating_sub(Duration::from_millis(20))..=term + SLACK;
        ensure!(within.contains(gap), "{gap:?} instead of {term:?}: {gaps:?}");
    }

    let back = world.backend(0, Script::Echo)?;
    edge.wait_for_state(world.back(0), "healthy", PATIENCE)?;
    // Three steps back, one each fail_timeout.
    wait_until("it has behaved well for 4 s", LONG, || {
        edge.backend(world.back(0))
            .is_ok_and(|backend| backend["state"] == "healthy" && backend["since_ms"].as_u64() >= Some(4000))
    })?;
    drop(back);
    edge.wait_for_state(world.back(0), "banned", PATIENCE)?;
    let last = bans()?.last().cloned().context("a ban")?;
    ensure!(last.ends_with("banned for 1 s"), "\"{last}\"");
    let report = load.stop();
    let cut = report.failures().len();
    ensure!(cut <= 20, "only what died with the server: {}", report.summary());
    Ok(())
}

fn reasons(edge: &Edge, world: &World, kind: &str) -> Result<Vec<String>> {
    let events = edge.events(world.back(0))?;
    let reasons = events.iter().filter(|event| event["kind"] == kind);
    Ok(reasons
        .map(|event| event["reason"].as_str().unwrap_or_default().to_owned())
        .collect())
}

#[test]
fn surplus_sessions_move_a_few_a_minute_quiet_ones_first_and_never_on_an_ingress() -> Result<()> {
    /// Quiet since their first answer; quiet for up to three seconds; never quiet.
    const QUIET: usize = 180;
    const PAUSING: usize = 20;
    const BUSY: usize = 40;
    const INGRESS: usize = 60;
    const WATCHED: Duration = Duration::from_secs(40);
    let world = World::alone(3)?;
    let ingress = world.edge.at(8443);
    let backends: Vec<String> = (0..3).map(|index| format!("\"{}\"", world.back(index))).collect();
    let keys = format!(
        "kind = \"api\"\n[lb.frontend.health]\nfail_timeout = \"1s\"\nmax_ban = \"1s\"\nslow_start = \"none\"\n\n\
         [[lb.frontend]]\nname = \"web\"\nkind = \"ingress\"\nlisten = [\"{ingress}\"]\nbackends = [{}]\n\
         [lb.frontend.health]\nfail_timeout = \"1s\"\nmax_ban = \"1s\"\nslow_start = \"none\"\n",
        backends.join(", ")
    );
    let edge = Edge::start(&world.edge, &world.config(&keys))?;
    let loaded = [world.backend(0, Script::Echo)?, world.backend(1, Script::Echo)?];
    let open = |target| Session::open(&world.client, target, PATIENCE).map(Some);
    let many = |count: usize, target| -> Result<Vec<Option<Session>>> {
        Ok((0..count).map(|_| open(target)).collect::<Result<_, _>>()?)
    };
    let web = many(INGRESS, ingress)?;
    let mut quiet = many(QUIET, world.front())?;
    let mut pausing = many(PAUSING, world.front())?;
    let mut busy = many(BUSY, world.front())?;
    let total = QUIET + PAUSING + BUSY;
    ensure!(loaded.iter().all(|backend| backend.live() == (total + INGRESS) / 2));
    // A third of all sessions is above the two backends' shares once the third one is back; a tenth of that a minute.
    let surplus = total / 3;
    let per_minute = surplus as f64 / 10.0;

    let back = world.backend(2, Script::Echo)?;
    for target in [world.front(), ingress] {
        wait_until("cp3 serves again", PATIENCE, || {
            Session::open(&world.client, target, PATIENCE).is_ok_and(|session| session.server == "cp3")
        })?;
    }
    let begin = Instant::now();
    let mut shed: Vec<Duration> = Vec::new();
    let mut next = begin;
    let mut turn: u32 = 0;
    let mut told = None;
    // In the end edgectl tells what clients have seen: one that was moved between these two looks is seen by the next.
    while begin.elapsed() < WATCHED || (told != Some(shed.len() as u64) && begin.elapsed() < WATCHED + PATIENCE) {
        for session in busy.iter_mut().flatten() {
            session.echo().context("a busy session was cut")?;
        }
        if turn % 6 == 5 {
            for session in pausing.iter_mut().flatten() {
                session
                    .echo()
                    .context("one that was quiet for 3 s was cut before one that was for longer")?;
            }
        }
        for place in &mut quiet {
            let Some(session) = place else { continue };
            if !session.quiet() {
                let (_, reset) = session.cut(PATIENCE)?;
                ensure!(!reset, "moved by a reset instead of an end");
                shed.push(begin.elapsed());
                // Its client comes back and goes where there is room.
                let again = Session::open(&world.client, world.front(), PATIENCE)?;
                ensure!(again.server == "cp3", "it went to {}", again.server);
                *place = None;
                busy.push(Some(again));
            }
        }
        if begin.elapsed() >= WATCHED {
            let of = |index| -> Result<Option<u64>> { Ok(edge.backend(world.back(index))?["shed_total"].as_u64()) };
            told = of(0)?.zip(of(1)?).map(|(one, other)| one + other);
        }
        turn += 1;
        next += Duration::from_millis(500);
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    let times: Vec<String> = shed.iter().map(|at| format!("{:.1}", at.as_secs_f64())).collect();
    println!(
        "{} of a surplus of {surplus} moved within {} s, at {} s; cp3 has {} sessions",
        shed.len(),
        WATCHED.as_secs(),
        times.join(", "),
        back.live()
    );
    // One more than the rate: what has added up is given when it makes a whole session.
    for (count, at) in (1..).zip(&shed) {
        let limit = per_minute * at.as_secs_f64() / 60.0 + 1.0;
        ensure!(f64::from(count) <= limit, "{count} within {at:?}, at most {limit:.1}");
    }
    let least = per_minute * WATCHED.as_secs_f64() / 60.0 - 2.5;
    ensure!(
        shed.len() as f64 >= least,
        "{} instead of at least {least:.1}",
        shed.len()
    );
    ensure!(
        told == Some(shed.len() as u64),
        "edgectl tells of {told:?}, clients of {}",
        shed.len()
    );
    ensure!(
        edge.events(world.back(0))?
            .iter()
            .chain(&edge.events(world.back(1))?)
            .any(is_shed),
        "edgectl lb why says nothing of it"
    );
    ensure!(web.iter().flatten().all(Session::quiet), "an ingress moves no session");
    Ok(())
}

fn is_shed(event: &Value) -> bool {
    event["kind"] == "shed"
}
