//! Another binary takes over while streams run, and neither side of any stream notices.
//!
//! ```text
//! client ── hub ── edge: edged ── worker lb, replaced again and again ──┬── cp1 (fd00::11)   echo, [::]:6443
//!   400 streams, 500 connections/s                                      ├── cp2 (fd00::12)   answer at end, [::]:7443
//!                                                                       └── cp3 (fd00::13)
//! ```
//! Among the streams: one with bulk data each way (spliced, every byte checked), one whose client has closed its sending
//! side and still reads, one whose client does not read at all; the others ask and are answered. The pause is what the
//! clients measure: a group of them asks every few milliseconds.

use std::{
    fs,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::{
    Edge, World,
    backend::{Backend, Script},
    edge::{Said, other_build, program},
    load::{Load, Session},
    ms,
    stall::Witness,
    wait_until,
};

const PATIENCE: Duration = Duration::from_secs(8);
const UPGRADES: usize = 20;
const STREAMS: usize = 400;
const RATE: u32 = 500;
/// Streams that ask every [`PERIOD`]: enough for both data threads, few enough to leave the cores to the others.
const FAST: usize = 24;
const PERIOD: Duration = Duration::from_millis(5);
const PAUSE: Duration = Duration::from_millis(50);
/// What no pause exceeds on any machine: a step of a hand-over has as long.
const LONGEST: Duration = Duration::from_secs(2);
/// The old worker has a second for its farewell.
const GONE: Duration = Duration::from_secs(5);
/// Of bulk data, each way, a second: enough to be spliced, not enough to fill the cores.
const BULK: usize = 24 << 20;
const CHUNK: usize = 512 << 10;
/// What the client that is done sending gets back, 256 KiB a second: it is not done before the last upgrade.
const HALF_CLOSED: usize = 48 << 20;
/// More than the edge can send to a client that does not read, so that some of it waits in the edge itself; less than what
/// fills the way to the server too, which would stand still in turn.
const STALLED: usize = 8 << 20;
const ANSWERS: u16 = 7443;

#[test]
fn twenty_upgrades_under_400_streams_and_500_connections_a_second_are_not_noticed() -> Result<()> {
    let world = World::alone(3)?;
    let edge = Edge::start(&world.edge, &config(&world))?;
    let _backends = backends(&world)?;
    let first = program("edged")?;
    let binaries = [other_build(&first, &world.edge.file("edged-other"))?, first];

    let bulk = Bulk::start(&world)?;
    let half_closed = HalfClosed::start(&world)?;
    let stalled = Stalled::start(&world)?;
    let fast = Pings::start(&world, FAST, 1, PERIOD)?;
    let slow = Pings::start(&world, STREAMS - 3 - FAST, 4, Duration::from_millis(500))?;
    let load = Load::of_echoes(&world.client, world.front(), RATE, PATIENCE);
    wait_until("1000 were served", PATIENCE, || load.so_far().served() >= 1000)?;

    // Every path has been taken once on each binary before memory is compared.
    for binary in &binaries {
        upgrade(&edge, binary)?;
    }
    let witness = Witness::start()?;
    let quiet = Instant::now();
    wait_until("two seconds without an upgrade", PATIENCE, || {
        quiet.elapsed() >= Duration::from_secs(2)
    })?;
    let usual = fast.pauses(quiet, Instant::now(), &witness);
    let (memory, processes) = (edge.pss_kib()?, edge.processes().len());
    let supervisor_files = files(edge.pid())?;
    let (moved, supervisor) = (bulk.moved(), edge.pid());
    let mut rounds = Vec::new();
    let mut pauses: Vec<Duration> = Vec::new();
    for round in 0..UPGRADES {
        let binary = &binaries[round % 2];
        let before = edge.worker("lb")?;
        let begin = Instant::now();
        upgrade(&edge, binary).with_context(|| format!("upgrade {round}"))?;
        let took = begin.elapsed();
        let gone = wait_until("the old worker is gone", GONE, || {
            !Path::new(&format!("/proc/{before}")).exists()
        })
        .with_context(|| format!("upgrade {round}: {:?}", edge.workers()))?;
        ensure!(
            edge.pid() == supervisor && runs(supervisor, binary)?,
            "another supervisor, or the old binary"
        );
        ensure!(runs(edge.worker("lb")?, binary)?, "the worker runs the old binary");
        // Somebody is served by the new worker before it has to hand over in turn.
        let served = load.so_far().served();
        wait_until("100 more were served", PATIENCE, || {
            load.so_far().served() >= served + 100
        })?;
        pauses.extend(fast.pauses(begin, begin + took + Duration::from_millis(200), &witness));
        rounds.push((took, gone));
    }
    let (memory_after, processes_after) = (edge.pss_kib()?, edge.processes().len());
    let moved = bulk.moved() - moved;
    let report = load.stop();
    pauses.sort_unstable();
    let mut took: Vec<Duration> = rounds.iter().map(|(took, _)| *took).collect();
    took.sort_unstable();
    println!("{}", report.summary());
    println!(
        "{UPGRADES} upgrades, each {:.0} ms (median), {:.0} ms (slowest); old worker gone after at most {:.0} ms more",
        ms(took[UPGRADES / 2]),
        ms(took[UPGRADES - 1]),
        ms(rounds.iter().map(|(_, gone)| *gone).max().unwrap_or_default())
    );
    println!(
        "longest round trip of each of {FAST} streams: {}; without an upgrade: {}",
        quantiles(&pauses),
        quantiles(&usual)
    );
    let mut stills = freezes(&edge.log(), &witness);
    println!("of it both sides stood still for {}", quantiles(&stills));
    println!(
        "{} MiB of bulk each way meanwhile; {memory} KiB before, {memory_after} KiB after; {processes} processes",
        moved >> 20
    );
    let pings = [fast.stop()?, slow.stop()?];
    bulk.stop()?;
    half_closed.finish()?;
    stalled.finish()?;
    println!(
        "{} questions answered on {} streams",
        pings.iter().sum::<u64>(),
        STREAMS - 3
    );

    ensure!(report.failures().is_empty(), "{}", report.summary());
    // What edged is answerable for is the time in which neither side serves. What a client sees is that and its turn on a
    // machine with two cores for everything here: as much more as it also waits without an upgrade. Of twenty upgrades three
    // may meet something else as well, and what holds up an upgrade holds up all its streams.
    stills.sort_unstable();
    ensure!(stills.len() >= UPGRADES, "the log tells of {} hand-overs", stills.len());
    let noise = usual.iter().max().copied().unwrap_or_default();
    for (times, most) in [(&stills, PAUSE), (&pauses, PAUSE + 3 * noise)] {
        let (nearly_all, longest) = (times[times.len() * 85 / 100], times[times.len() - 1]);
        ensure!(
            nearly_all <= most && longest <= LONGEST,
            "{nearly_all:?} instead of {most:?}: {}; without an upgrade: {}",
            quantiles(times),
            quantiles(&usual)
        );
    }
    ensure!(moved >= BULK * UPGRADES / 20, "the bulk stream stood still");
    ensure!(
        processes_after == processes,
        "{processes} processes before, {processes_after} after"
    );
    ensure!(
        memory_after <= memory + 4 * 1024,
        "{memory} KiB before, {memory_after} KiB after"
    );
    let leaked = files(edge.pid())?.saturating_sub(supervisor_files);
    ensure!(leaked <= 2, "{leaked} more descriptors in the supervisor");
    Ok(())
}

#[test]
fn a_new_side_that_dies_at_any_message_of_the_hand_over_loses_nothing() -> Result<()> {
    let world = World::alone(3)?;
    let fault = world.lab.dir().join("die");
    fs::write(&fault, "")?;
    let variable = [("EDGED_TEST_HANDOVER_DIE", fault.to_str().context("a path in UTF-8")?)];
    let edge = Edge::start_with(&world.edge, &config(&world), &variable)?;
    let _backends = backends(&world)?;
    let bulk = Bulk::start(&world)?;
    let half_closed = HalfClosed::start(&world)?;
    let pings = Pings::start(&world, 100, 2, Duration::from_millis(50))?;
    let load = Load::of_echoes(&world.client, world.front(), 200, PATIENCE);
    wait_until("200 were served", PATIENCE, || load.so_far().served() >= 200)?;
    let (supervisor, mut binary) = (edge.pid(), program("edged")?);
    for message in ["welcome", "part", "end", "ready", "commit"] {
        binary = other_build(&binary, &world.edge.file(&format!("edged-{message}")))?;
        let before = edge.worker("lb")?;
        fs::write(&fault, message)?;
        let said = edge.ctl(&["upgrade", &binary.display().to_string()])?;
        println!("died at {message}, after {:.0} ms: {said}", ms(said.took));
        ensure!(said.code == Some(1), "{message}: {said}");
        ensure!(edge.worker("lb")? == before, "{message}: the old worker goes on");
        ensure!(edge.pid() == supervisor, "{message}: another supervisor");
        let served = load.so_far().served();
        wait_until("100 more were served", PATIENCE, || {
            load.so_far().served() >= served + 100
        })?;
        let failed = load.so_far().failures().len();
        ensure!(failed == 0, "{message}: {}", load.so_far().summary());

        fs::write(&fault, "")?;
        binary = other_build(&binary, &world.edge.file(&format!("edged-after-{message}")))?;
        let said = upgrade(&edge, &binary).with_context(|| format!("the one after {message}"))?;
        ensure!(
            edge.worker("lb")? != before && runs(edge.worker("lb")?, &binary)?,
            "{message}: {said}"
        );
        let served = load.so_far().served();
        wait_until("100 more were served", PATIENCE, || {
            load.so_far().served() >= served + 100
        })?;
    }
    let report = load.stop();
    println!("{}", report.summary());
    ensure!(report.failures().is_empty(), "{}", report.summary());
    pings.stop()?;
    bulk.stop()?;
    half_closed.finish()
}

/// Upgrades and looks whether everything that was asked for was done.
fn upgrade(edge: &Edge, binary: &Path) -> Result<Said> {
    let said = edge.upgraded(binary)?;
    let status = edge.status()?;
    let upgrade = tests::edge::find(&status, "upgrade").context("the status tells of the upgrade")?;
    ensure!(upgrade["state"] == "done", "{upgrade:#}");
    let build = &status["build"];
    let workers = edge.workers()?;
    ensure!(
        build != &Value::Null && workers.iter().all(|worker| worker["build"] == *build),
        "every process runs {build}: {workers:?}"
    );
    Ok(said)
}

/// How long each hand-over took by the two workers' own word, without what the machine added: nobody is served meanwhile.
fn freezes(log: &str, witness: &Witness) -> Vec<Duration> {
    const DAY: u64 = 24 * 3600 * 1000;
    let (now, clock) = (Instant::now(), SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default());
    // 2026-11-21T15:59:13.386Z ...
    let at = |line: &str| -> Option<Instant> {
        let mut parts = line.get(11..23)?.split([':', '.']).map(str::parse::<u64>);
        let mut next = || parts.next()?.ok();
        let (hours, minutes, seconds, millis) = (next()?, next()?, next()?, next()?);
        let at = ((hours * 60 + minutes) * 60 + seconds) * 1000 + millis;
        let ago = (clock.as_millis() as u64 + DAY - at) % DAY;
        Some(now - Duration::from_millis(ago))
    };
    let (mut freezes, mut begun) = (Vec::new(), None);
    for line in log.lines() {
        if line.contains("handing over to a successor") {
            begun = at(line);
        } else if line.contains("taken over sessions=") {
            freezes.extend(
                begun
                    .take()
                    .zip(at(line))
                    .map(|(from, until)| (until - from).saturating_sub(witness.held_up(from, until))),
            );
        }
    }
    freezes
}

/// Whether a process runs this very file.
fn runs(pid: u32, binary: &Path) -> Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let (own, wanted) = (fs::metadata(format!("/proc/{pid}/exe"))?, fs::metadata(binary)?);
    Ok((own.dev(), own.ino()) == (wanted.dev(), wanted.ino()))
}

fn files(pid: u32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

fn config(world: &World) -> String {
    let answers = world.edge.at(ANSWERS);
    world.config(&format!(
        "kind = \"api\"\n\n[[lb.frontend]]\nname = \"answers\"\nkind = \"tcp\"\nlisten = [\"{answers}\"]\nbackends = [\"{}\"]\n",
        world.cp[1].at(ANSWERS)
    ))
}

fn backends(world: &World) -> Result<Vec<Backend>> {
    let mut backends = world.echoes()?;
    backends.push(Backend::start(&world.cp[1], ANSWERS, Script::AnswerAtEnd)?);
    Ok(backends)
}

fn quantiles(sorted: &[Duration]) -> String {
    let mut sorted = sorted.to_vec();
    sorted.sort_unstable();
    let at = |percent: usize| {
        ms(sorted
            .get(sorted.len().saturating_sub(1) * percent / 100)
            .copied()
            .unwrap_or_default())
    };
    format!(
        "median {:.1} ms, p99 {:.1} ms, longest {:.1} ms",
        at(50),
        at(99),
        at(100)
    )
}

fn connect(world: &World, target: SocketAddr) -> Result<TcpStream> {
    let stream = world.client.enter(|| TcpStream::connect_timeout(&target, PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// The `n`th eight bytes of a stream: nothing repeats, so that what is lost, doubled or swapped shows.
fn noise(n: u64) -> [u8; 8] {
    let mut x = n
        .wrapping_add(0x9e37_79b9_7f4a_7c15)
        .wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^= x >> 29;
    x.wrapping_mul(0x94d0_49bb_1331_11eb).to_le_bytes()
}

/// `length` bytes of noise from byte `from` on; both multiples of eight.
fn noises(from: usize, length: usize) -> Vec<u8> {
    (from / 8..(from + length) / 8).flat_map(|n| noise(n as u64)).collect()
}

/// Compares what arrives with the noise that was sent.
#[derive(Default)]
struct Check {
    got: usize,
}

impl Check {
    fn feed(&mut self, bytes: &[u8]) -> io::Result<()> {
        for byte in bytes {
            if noise((self.got / 8) as u64)[self.got % 8] != *byte {
                return Err(io::Error::other(format!("byte {} is not what was sent", self.got)));
            }
            self.got += 1;
        }
        Ok(())
    }
}

/// Streams that ask and are answered, word for word, until stopped.
struct Pings {
    stop: Arc<AtomicBool>,
    /// Of each round trip: its stream, when it began and how long it took.
    trips: Arc<Mutex<Vec<(usize, Instant, Duration)>>>,
    threads: Vec<thread::JoinHandle<io::Result<u64>>>,
    streams: usize,
}

impl Pings {
    /// `streams` of them, each asking once a `period`; `share` = 1: each on a thread of its own, else on that many
    /// threads together.
    fn start(world: &World, streams: usize, share: usize, period: Duration) -> Result<Self> {
        let (stop, trips) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let mut groups: Vec<Vec<(usize, Session)>> = Vec::new();
        groups.resize_with(if share == 1 { streams } else { share }, Vec::new);
        let count = groups.len();
        for stream in 0..streams {
            let session = Session::open(&world.client, world.front(), PATIENCE)?;
            groups[stream % count].push((stream, session));
        }
        let run = |mut group: Vec<(usize, Session)>| {
            let (stop, trips) = (Arc::clone(&stop), Arc::clone(&trips));
            move || -> io::Result<u64> {
                let (mut asked, mut next) = (0, Instant::now());
                while !stop.load(Ordering::Relaxed) {
                    for (stream, session) in &mut group {
                        let begin = Instant::now();
                        session.echo()?;
                        let took = begin.elapsed();
                        asked += 1;
                        trips
                            .lock()
                            .expect("no panic while it is held")
                            .push((*stream, begin, took));
                    }
                    // What was late is not made up for: it would be a burst.
                    next = (next + period).max(Instant::now());
                    thread::sleep(next.saturating_duration_since(Instant::now()));
                }
                Ok(asked)
            }
        };
        let threads = groups.into_iter().map(|group| thread::spawn(run(group))).collect();
        Ok(Self {
            stop,
            trips,
            threads,
            streams,
        })
    }

    /// The longest round trip of each stream of those that were under way between `from` and `until`, without what the
    /// machine added.
    fn pauses(&self, from: Instant, until: Instant, witness: &Witness) -> Vec<Duration> {
        let mut longest = vec![Duration::ZERO; self.streams];
        for (stream, begin, took) in self.trips.lock().expect("no panic while it is held").iter() {
            if *begin <= until && *begin + *took >= from {
                let own = took.saturating_sub(witness.held_up(*begin, *begin + *took));
                longest[*stream] = longest[*stream].max(own);
            }
        }
        longest
    }

    /// Ends them all; how often they asked.
    fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.threads
            .into_iter()
            .map(|thread| {
                let asked = thread.join().expect("no panic");
                asked.context("a stream that asks was broken")
            })
            .sum()
    }
}

/// Noise to an echo and back, at a steady rate.
struct Bulk {
    stop: Arc<AtomicBool>,
    back: Arc<AtomicU64>,
    sender: thread::JoinHandle<io::Result<usize>>,
    receiver: thread::JoinHandle<io::Result<usize>>,
}

impl Bulk {
    fn start(world: &World) -> Result<Self> {
        let mut reads = connect(world, world.front())?;
        let mut name = [0; 4];
        reads.read_exact(&mut name)?;
        let mut writes = reads.try_clone()?;
        let (stop, back) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (ends, counts) = (Arc::clone(&stop), Arc::clone(&back));
        let sender = thread::spawn(move || {
            let (mut sent, mut next) = (0, Instant::now());
            while !ends.load(Ordering::Relaxed) {
                writes.write_all(&noises(sent, CHUNK))?;
                sent += CHUNK;
                next = (next + Duration::from_secs(1) * CHUNK as u32 / BULK as u32).max(Instant::now());
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
            writes.shutdown(Shutdown::Write)?;
            Ok(sent)
        });
        let receiver = thread::spawn(move || {
            let (mut check, mut buffer) = (Check::default(), vec![0; CHUNK]);
            loop {
                match tests::tls::read_some(&mut reads, &mut buffer)? {
                    0 => return Ok(check.got),
                    count => check.feed(&buffer[..count])?,
                }
                counts.store(check.got as u64, Ordering::Relaxed);
            }
        });
        Ok(Self {
            stop,
            back,
            sender,
            receiver,
        })
    }

    /// Bytes that have come back.
    fn moved(&self) -> usize {
        self.back.load(Ordering::Relaxed) as usize
    }

    fn stop(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().expect("no panic").context("sending bulk data")?;
        let got = self.receiver.join().expect("no panic").context("receiving bulk data")?;
        ensure!(sent == got, "{sent} bytes sent, {got} came back");
        Ok(())
    }
}

/// A client that has said everything and reads the answer slowly.
struct HalfClosed {
    stop: Arc<AtomicBool>,
    reader: thread::JoinHandle<io::Result<usize>>,
}

impl HalfClosed {
    fn start(world: &World) -> Result<Self> {
        let mut stream = connect(world, world.edge.at(ANSWERS))?;
        stream.write_all(&noises(0, HALF_CLOSED))?;
        stream.shutdown(Shutdown::Write)?;
        let stop = Arc::new(AtomicBool::new(false));
        let hurry = Arc::clone(&stop);
        let reader = thread::spawn(move || {
            let (mut check, mut buffer) = (Check::default(), vec![0; 32 << 10]);
            loop {
                match tests::tls::read_some(&mut stream, &mut buffer)? {
                    0 => return Ok(check.got),
                    count => check.feed(&buffer[..count])?,
                }
                if !hurry.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(125));
                }
            }
        });
        Ok(Self { stop, reader })
    }

    fn finish(self) -> Result<()> {
        ensure!(
            !self.reader.is_finished(),
            "the half-closed stream ended before the last upgrade"
        );
        self.stop.store(true, Ordering::Relaxed);
        let got = self
            .reader
            .join()
            .expect("no panic")
            .context("the half-closed stream")?;
        ensure!(got == HALF_CLOSED, "{got} of {HALF_CLOSED} bytes");
        Ok(())
    }
}

/// A client that as good as never reads what an echo sends it, until the end.
struct Stalled {
    stop: Arc<AtomicBool>,
    writer: thread::JoinHandle<io::Result<TcpStream>>,
    reader: thread::JoinHandle<io::Result<usize>>,
}

impl Stalled {
    fn start(world: &World) -> Result<Self> {
        let mut reads = connect(world, world.front())?;
        socket2::SockRef::from(&reads).set_recv_buffer_size(64 << 10)?;
        reads.read_exact(&mut [0; 4])?;
        let mut writes = reads.try_clone()?;
        let writer = thread::spawn(move || {
            writes.write_all(&noises(0, STALLED))?;
            Ok(writes)
        });
        let stop = Arc::new(AtomicBool::new(false));
        let go_on = Arc::clone(&stop);
        let reader = thread::spawn(move || {
            let (mut check, mut buffer) = (Check::default(), vec![0; CHUNK]);
            while !go_on.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(50));
            }
            loop {
                match tests::tls::read_some(&mut reads, &mut buffer)? {
                    0 => return Ok(check.got),
                    count => check.feed(&buffer[..count])?,
                }
            }
        });
        Ok(Self { stop, writer, reader })
    }

    fn finish(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.writer.join().expect("no panic");
        sent.and_then(|writes| writes.shutdown(Shutdown::Write))
            .context("the stalled stream's sender")?;
        let got = self.reader.join().expect("no panic").context("the stalled stream")?;
        ensure!(got == STALLED, "{got} of {STALLED} bytes");
        Ok(())
    }
}
