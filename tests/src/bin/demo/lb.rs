//! Part `lb`: three servers behind `edged`, clients of every kind before it, and one fault after the other.
//!
//! ```text
//!                                                                        ┌─ cp1 etcd [fd00::11]:2379
//! client (fd00::2) ── hub ── edge (fd00::10): edged [fd00::10]:6443 ─────┼─ cp2 etcd [fd00::12]:2379
//!  new connections, puts, watches      tcpdump on both legs              └─ cp3 etcd [fd00::13]:2379
//! ```
//! etcd stands where API servers stand: TLS passed through, client certificates, long watches, short calls. With
//! `KUBE_BIN_DIR`, real API servers stand there, each beside its etcd.

use std::{
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use anyhow::{Context, Result};
use rustix::process::Signal;
use tests::{
    Edge, Lab, Node,
    capture::Capture,
    edge::{other_build, program},
    load::{End, Load},
    process, tls, wait_for, wait_until,
    world::PORT,
};

use crate::{
    Mark, Story,
    clients::{Idle, Life, Watch, Way, Writer},
    human,
    servers::Servers,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// What a busy machine may add to a connection that waits for nothing.
const SLACK: Duration = Duration::from_millis(400);
/// Connections per second of the prober.
const PROBES: u32 = 40;
const IDLES: usize = 9;
const PATIENCE: Duration = Duration::from_secs(25);

pub(crate) fn run(story: &mut Story) -> Result<()> {
    let mut stage = Stage::build(story)?;
    stage.kill_a_server(story)?;
    stage.bring_it_back(story)?;
    stage.blackhole_a_server(story)?;
    stage.reload(story)?;
    stage.upgrade(story)?;
    stage.kill_the_worker(story)?;
    stage.judge_the_watch(story)?;
    stage.why(story)
}

/// The world, its clients, and what has been done to it.
struct Stage {
    // Dropped first: clients that would report the end of the world as a fault.
    prober: Load,
    writer: Writer,
    watch: Watch,
    idles: Vec<Idle>,
    capture: Capture,
    edge: Edge,
    servers: Arc<Mutex<Servers>>,
    way: Way,
    config: Configuration,
    /// The server that was killed.
    killed: usize,
    node: Node,
    _lab: Lab,
}

impl Stage {
    fn build(story: &mut Story) -> Result<Self> {
        let lab = Lab::alone()?;
        let (client, node) = (lab.node("client", 2)?, lab.node("edge", 10)?);
        story.event("three servers start, each in a namespace of its own");
        let servers = Servers::start(&lab, &node)?;
        story.note(servers.describe()?);
        let (speech, way) = (servers.speech(), servers.way(client, node.at(PORT)));
        story.event(format!("edged starts in front of them and listens on {}", way.front));
        let capture = node.capture(&format!("tcp port {PORT} or tcp port {}", speech.port()))?;
        let config = Configuration::of(&node, &servers);
        let edge = Edge::start(&node, &config.with("1s", ""))?;
        let servers = Arc::new(Mutex::new(servers));
        story.event(format!(
            "clients come: {PROBES} new TLS connections and 10 writes a second, {}, {IDLES} idle watches",
            speech.watcher()
        ));
        let inner = way.clone();
        let prober = Load::start(&way.node, way.front, PROBES, PATIENCE, move |stream| {
            Ok(inner.server_of(&tls::handshake(stream, inner.front, &inner.tls)?))
        });
        let writer = Writer::start(&way, Duration::from_millis(100));
        let watch = Watch::start(&way, &servers);
        let idles: Vec<Idle> = (0..IDLES).map(|_| Idle::start(&way)).collect();
        let stage = Self {
            prober,
            writer,
            watch,
            idles,
            capture,
            edge,
            servers,
            way,
            config,
            killed: 0,
            node,
            _lab: lab,
        };
        stage.settle()?;
        story.note(stage.spread());
        Ok(stage)
    }

    /// Waits until every client is served, and for some dozens of connections more.
    fn settle(&self) -> Result<()> {
        self.settle_idles()?;
        let newest = self.writer.newest();
        wait_until("the watch sees a newer write", PATIENCE, || {
            self.watch.seen().last().is_some_and(|seen| seen.number > newest)
        })?;
        self.more(PROBES as usize)
    }

    fn settle_idles(&self) -> Result<()> {
        wait_until("every idle watch is served", PATIENCE, || {
            self.idles.iter().all(|idle| idle.member().is_some())
        })?;
        Ok(())
    }

    /// Waits for `count` more connections of the prober.
    fn more(&self, count: usize) -> Result<()> {
        let before = self.prober.so_far().attempts.len();
        wait_until("more connections", PATIENCE, || {
            self.prober.so_far().attempts.len() >= before + count
        })?;
        Ok(())
    }

    /// Idle watches per server.
    fn spread(&self) -> String {
        let count = |name: &str| {
            self.idles
                .iter()
                .filter(|idle| idle.member().as_deref() == Some(name))
                .count()
        };
        let counts: Vec<String> = (1..=3)
            .map(|n| format!("{} on cp{n}", count(&format!("cp{n}"))))
            .collect();
        format!("idle watches: {}", counts.join(", "))
    }

    fn servers(&self) -> MutexGuard<'_, Servers> {
        self.servers.lock().expect("no panic while it is held")
    }

    /// The server that tells the watch its events, where it says so.
    fn watched(&self) -> Option<usize> {
        let last = self.watch.seen().last().copied()?;
        self.servers().teller(last)
    }

    fn kill_a_server(&mut self, story: &mut Story) -> Result<()> {
        let speech = self.way.speech;
        let spared = [self.watched(), self.servers().leader()?];
        // One that leads nobody, so that writes go on, and not the one the watch is on: its turn comes later.
        self.killed = (0..3)
            .find(|index| !spared.contains(&Some(*index)))
            .context("three servers")?;
        let name = name_of(self.killed);
        let mark = story.event(format!("(a) kill -9 {} on {name}", speech.server()));
        self.servers().kill(self.killed);
        let dead = Mark::now();
        let cut = self.wait_for_moved(mark, &name)?;
        self.more(3 * PROBES as usize)?;
        let end = Mark::now();
        let report = self.prober.so_far().between(dead.at, end.at);
        story.claim(
            report.failures().is_empty(),
            format!("every new connection succeeded: {}", report.summary()),
        );
        story.claim(
            report.slowest() < SLACK,
            format!(
                "none of them waited for the dead server: the slowest took {}",
                human(report.slowest())
            ),
        );
        self.claim_cut(story, &cut, mark, &name, Duration::from_secs(1));
        self.claim_writes(story, mark, end, CONNECT_TIMEOUT);
        story.note(self.spread());
        Ok(())
    }

    fn bring_it_back(&mut self, story: &mut Story) -> Result<()> {
        let name = name_of(self.killed);
        let begin = story.event(format!("(b) {} on {name} starts again", self.way.speech.server()));
        self.servers().bring_back(self.killed)?;
        let back = Mark::now();
        let served = wait_for(&format!("{name} serves a new connection"), PATIENCE, || {
            self.served_by(&name, back)
        });
        let took = served.as_ref().map_or(PATIENCE, |at| *at - back.at);
        let limit = Duration::from_secs(6);
        story.claim(
            took < limit,
            format!("{name} serves new connections {} after it was ready", human(took)),
        );
        self.more(PROBES as usize)?;
        let report = self.prober.so_far().between(begin.at, Mark::now().at);
        story.claim(
            report.failures().is_empty(),
            format!("its return hurt nobody: {}", report.summary()),
        );
        // By the fewest sessions all new connections would go to this server alone, and the next fault not be met.
        let before = self.idles.len();
        while self.idles.len() < before + IDLES && !self.even() {
            self.idles.push(Idle::start(&self.way));
            self.settle_idles()?;
        }
        story.note(format!(
            "{} more idle watches come: {}",
            self.idles.len() - before,
            self.spread()
        ));
        Ok(())
    }

    /// Watches per server, the long one included where it is known.
    fn counts(&self) -> [usize; 3] {
        let mut counts = [0; 3];
        if let Some(watched) = self.watched() {
            counts[watched] += 1;
        }
        for name in self.idles.iter().filter_map(Idle::member) {
            counts
                .iter_mut()
                .zip(0..)
                .filter(|(_, index)| name_of(*index) == name)
                .for_each(|(count, _)| *count += 1);
        }
        counts
    }

    /// Whether every server has as many watches as the others, as far as is known.
    fn even(&self) -> bool {
        let counts = self.counts();
        let most = counts.iter().max().copied().unwrap_or_default();
        let unknown = usize::from(self.watched().is_none());
        counts.iter().all(|count| count + unknown >= most)
    }

    fn blackhole_a_server(&mut self, story: &mut Story) -> Result<()> {
        self.settle()?;
        // The one the watch is on, so that the watch is cut too; else the one that gets the next connections.
        let counts = self.counts();
        let fewest = (0..3).min_by_key(|index| counts[*index]).context("three servers")?;
        let watched = self.watched();
        let index = watched.unwrap_or(fewest);
        let name = name_of(index);
        let before = self.watch.socket(self.way.front);
        let address = self.node_of(index).ip();
        let mark = story.event(format!(
            "(c) {name} vanishes from the edge's sight: nft drops every packet between them"
        ));
        let hole = self.node.blackhole(&[address])?;
        let dark = Mark::now();
        let cut = self.wait_for_moved(mark, &name)?;
        if watched.is_some() {
            wait_until("the watch is on another socket", PATIENCE, || {
                self.watch.socket(self.way.front).is_some_and(|now| Some(now) != before)
            })?;
        }
        self.more(3 * PROBES as usize)?;
        let end = Mark::now();
        let report = self.prober.so_far().between(dark.at, end.at);
        let late = report.attempts.iter().filter(|attempt| attempt.took > SLACK).count();
        story.claim(
            report.failures().is_empty(),
            format!("every new connection succeeded: {}", report.summary()),
        );
        story.claim(
            report.slowest() < CONNECT_TIMEOUT + SLACK,
            format!(
                "{late} of them met it and waited once for the connect timeout of 1 s; the slowest took {}",
                human(report.slowest())
            ),
        );
        let after: Vec<_> = cut
            .iter()
            .filter_map(|(_, next)| next.as_ref())
            .map(|next| next.from)
            .collect();
        if let Some(last) = after.into_iter().max() {
            let calm = self.prober.so_far().between(last, end.at);
            story.claim(
                calm.slowest() < SLACK,
                format!("once it was found out nobody waited: {}", calm.summary()),
            );
        }
        // Usually two connect timeouts of a second, one after the other. A server with the most sessions is not chosen, so
        // that nobody meets it: then keepalive finds it.
        self.claim_cut(story, &cut, mark, &name, Duration::from_secs(20));
        self.claim_writes(story, mark, end, 4 * CONNECT_TIMEOUT);
        let healed = story.event(format!("    {name} is in sight again"));
        hole.heal();
        let served = wait_for(&format!("{name} serves a new connection"), PATIENCE, || {
            self.served_by(&name, healed)
        });
        let took = served.as_ref().map_or(PATIENCE, |at| *at - healed.at);
        story.claim(
            took < Duration::from_secs(6),
            format!("{name} serves new connections {} later", human(took)),
        );
        self.settle()
    }

    fn reload(&mut self, story: &mut Story) -> Result<()> {
        let front = self.way.front;
        let watcher = self.way.speech.watcher();
        let socket = self.watch.socket(front).context("the watch is connected")?;
        let begin = story.event(format!("(e) five reloads while {watcher} lives on {socket}"));
        let ended = self.ended();
        self.edge
            .reload(&self.config.with("1s", &self.config.second(self.node.at(7443))))?;
        let second = self.node.at(7443);
        let open = || self.way.node.enter(|| std::net::TcpStream::connect(second)).is_ok();
        let took = wait_until("the second listener is open", PATIENCE, open);
        let words = took
            .as_ref()
            .map_or_else(ToString::to_string, |took| format!("in effect after {}", human(*took)));
        story.claim(took.is_ok(), format!("SIGHUP, a file with a second listener: {words}"));
        let said = self.edge.apply(&self.config.with("900ms", ""))?;
        story.claim(
            said.code == Some(0),
            format!(
                "edgectl config apply, without it: exit status {:?}",
                said.code.unwrap_or(-1)
            ),
        );
        let closed = wait_until("the second listener is closed", PATIENCE, || !open());
        story.claim(closed.is_ok(), "and it refuses connections again");
        let good = self.config.with("900ms", "");
        let taken = self.node.enter(|| TcpListener::bind(self.node.at(7000)))?;
        let faulty = [
            ("does not parse", good.replace("name = \"api\"", "name = \"api")),
            ("does not make sense", good.replace("900ms", "0ms")),
            (
                "wants a port that another process holds",
                good.replace(
                    &format!("[\"{front}\"]"),
                    &format!("[\"{front}\", \"{}\"]", self.node.at(7000)),
                ),
            ),
        ];
        for (fault, text) in faulty {
            let said = self.edge.apply(&text)?;
            let words = format!("{}{}", said.out, said.err);
            story.claim(
                said.code == Some(2) && !words.trim().is_empty(),
                format!("a file that {fault}: exit status {:?}", said.code.unwrap_or(-1)),
            );
            story.note(
                process::tail(&words, 8)
                    .lines()
                    .map(|line| format!("  │ {line}\n"))
                    .collect::<String>(),
            );
        }
        drop(taken);
        self.more(PROBES as usize)?;
        let seen = self.watch.seen().len();
        wait_until("the watch sees more", PATIENCE, || self.watch.seen().len() > seen + 3)?;
        self.claim_unnoticed(story, begin, socket, ended, "")
    }

    fn upgrade(&mut self, story: &mut Story) -> Result<()> {
        let front = self.way.front;
        let watcher = self.way.speech.watcher();
        let socket = self.watch.socket(front).context("the watch is connected")?;
        let new = other_build(&program("edged")?, &self.node.file("edged-other"))?;
        let (supervisor, worker) = (self.edge.pid(), self.edge.worker("lb")?);
        let begin = story.event(format!(
            "(g) edgectl upgrade, to another build, while {watcher} lives on {socket}"
        ));
        let ended = self.ended();
        let said = self.edge.upgrade(&new)?;
        let now = self.edge.worker("lb")?;
        let builds = self.edge.builds()?;
        let one = builds.first().map(|(_, build)| build.clone()).unwrap_or_default();
        story.claim(
            said.code == Some(0) && now != worker && self.edge.pid() == supervisor && builds.iter().all(|(_, b)| *b == one),
            format!(
                "build {one} runs in every process, {supervisor} is still {supervisor}, and {now} serves for {worker}: it took {}",
                human(said.took)
            ),
        );
        self.settle()?;
        let seen = self.watch.seen().len();
        wait_until("the watch sees more", PATIENCE, || self.watch.seen().len() > seen + 3)?;
        self.claim_unnoticed(story, begin, socket, ended, ", in another process")?;
        self.claim_writes(story, begin, Mark::now(), CONNECT_TIMEOUT);
        Ok(())
    }

    /// Since `begin`, the watch has lived on `socket`, no idle watch beyond the `ended` ones was cut, and new connections
    /// were served as always.
    fn claim_unnoticed(
        &mut self,
        story: &mut Story,
        begin: Mark,
        socket: std::net::SocketAddr,
        ended: usize,
        whereabouts: &str,
    ) -> Result<()> {
        let (front, watcher, end) = (self.way.front, self.way.speech.watcher(), Mark::now());
        let now = self.watch.socket(front);
        let wire = self
            .capture
            .so_far()?
            .between(begin.wall, end.wall)
            .socket(socket, front);
        let broken = wire.filter(|packet| packet.syn() || packet.syn_ack() || packet.fin() || packet.rst());
        let payload: usize = wire.packets.iter().map(|packet| packet.payload).sum();
        story.claim(
            now == Some(socket) && broken.packets.is_empty() && payload > 0,
            format!(
                "{watcher} is still on {}{whereabouts}: {} packets with {payload} bytes on the wire, {} of them SYN, FIN or RST",
                now.map_or_else(|| "no socket".to_owned(), |now| now.to_string()),
                wire.packets.len(),
                broken.packets.len()
            ),
        );
        let ended = self.ended() - ended;
        story.claim(
            ended == 0,
            format!("{ended} of {} idle watches were cut", self.idles.len()),
        );
        let report = self.prober.so_far().between(begin.at, end.at);
        story.claim(
            report.failures().is_empty() && report.slowest() < SLACK,
            format!("new connections noticed nothing: {}", report.summary()),
        );
        Ok(())
    }

    /// Idle watches that have ended so far.
    fn ended(&self) -> usize {
        let lives = self.idles.iter().flat_map(Idle::lives);
        lives.filter(|life| life.until.is_some()).count()
    }

    fn kill_the_worker(&mut self, story: &mut Story) -> Result<()> {
        let pid = self.edge.worker("lb")?;
        let mark = story.event(format!(
            "(d) kill -9 {pid}, the process of edged that holds every connection"
        ));
        process::signal(pid, Signal::KILL)?;
        let next = self.edge.wait_for_new_worker("lb", pid, PATIENCE)?;
        self.settle()?;
        let end = Mark::now();
        let report = self.prober.so_far().between(mark.at - CONNECT_TIMEOUT, end.at);
        let refused = self.capture.so_far()?.between(mark.wall, end.wall).flows();
        let refused = refused
            .iter()
            .filter(|flow| flow.server == self.way.front && flow.refused())
            .count();
        story.claim(
            report.count(&End::Refused) == 0 && refused == 0,
            format!(
                "none of {} new connections was refused, by their own word and on the wire",
                report.attempts.len()
            ),
        );
        // One that was in flight in the dead process is reset; it takes milliseconds, so these are few.
        let cut = report.failures().len();
        story.claim(
            cut <= 5 && report.failures().iter().all(|attempt| attempt.at < mark.at + SLACK),
            format!("{cut} were in flight in it and were cut: {}", report.summary()),
        );
        story.note(format!("process {next} serves in its place"));
        let cut: Vec<_> = self.cut_after(mark, None);
        let slowest = cut
            .iter()
            .filter_map(|(_, next)| Some(next.as_ref()?.from - mark.at))
            .max()
            .unwrap_or(PATIENCE);
        story.claim(
            cut.len() == self.idles.len() && slowest < Duration::from_secs(2),
            format!(
                "{} idle watches were cut with it, and all were served again within {}",
                cut.len(),
                human(slowest)
            ),
        );
        self.claim_writes(story, mark, end, CONNECT_TIMEOUT);
        Ok(())
    }

    fn judge_the_watch(&mut self, story: &mut Story) -> Result<()> {
        let watcher = self.way.speech.watcher();
        story.event(format!("(f) what has {watcher} seen?"));
        self.writer.stop();
        let newest = self.writer.newest();
        let complete = wait_until("the watch sees the newest write", PATIENCE, || {
            self.watch.seen().last().is_some_and(|seen| seen.number >= newest)
        });
        self.watch.stop();
        let revisions: Vec<u64> = self.watch.seen().iter().map(|seen| seen.number).collect();
        let gaps = revisions.windows(2).filter(|pair| pair[1] != pair[0] + 1).count();
        let (first, last) = (
            revisions.first().copied().unwrap_or(0),
            revisions.last().copied().unwrap_or(0),
        );
        let puts = self.writer.log();
        let acknowledged: Vec<u64> = puts
            .iter()
            .filter_map(|put| put.result.as_ref().ok().copied())
            .collect();
        let missed = acknowledged
            .iter()
            .filter(|revision| !revisions.contains(revision))
            .count();
        story.claim(
            complete.is_ok() && gaps == 0 && missed == 0 && first == self.way.speech.first(),
            format!(
                "every {} from {first} to {last}, {gaps} gaps; {missed} of {} acknowledged writes missed",
                self.way.speech.unit(),
                acknowledged.len()
            ),
        );
        let flows = self.capture.so_far()?.flows();
        let front: Vec<_> = flows.iter().filter(|flow| flow.server == self.way.front).collect();
        story.note(format!(
            "{watcher} was started {} time(s); {} of {} writes needed a second attempt",
            self.watch.starts(),
            puts.iter().filter(|put| put.result.is_err()).count(),
            acknowledged.len()
        ));
        let refused = front.iter().filter(|flow| flow.refused()).count();
        story.claim(
            refused == 0,
            format!(
                "{refused} of {} connections of the whole story were refused on the wire",
                front.len()
            ),
        );
        Ok(())
    }

    fn why(&self, story: &mut Story) -> Result<()> {
        let address = self.node_of(self.killed).at(self.way.speech.port());
        story.event(format!("edgectl lb why {address}"));
        let said = self.edge.ctl(&["lb", "why", &address.to_string()])?;
        story.note(said.out.trim_end());
        story.claim(
            said.code == Some(0) && said.out.contains("refused"),
            format!("edgectl knows why: exit status {:?}", said.code.unwrap_or(-1)),
        );
        Ok(())
    }

    fn node_of(&self, index: usize) -> Node {
        self.servers().node(index)
    }

    /// When `name` has served a connection that began after `from`.
    fn served_by(&self, name: &str, from: Mark) -> Option<std::time::Instant> {
        let report = self.prober.so_far();
        let mut good = report
            .attempts
            .iter()
            .filter(|a| a.at >= from.at && a.end == End::Served(name.to_owned()));
        good.next().map(|attempt| attempt.at + attempt.took)
    }

    /// The lives of idle watches that were on `member` (or on any) at `mark`, each with the life that followed.
    fn cut_after(&self, mark: Mark, member: Option<&str>) -> Vec<(Life, Option<Life>)> {
        let mut cut = Vec::new();
        for idle in &self.idles {
            let lives = idle.lives();
            let at = lives.iter().position(|life| {
                life.from <= mark.at
                    && life.until.as_ref().is_none_or(|(until, _)| *until > mark.at)
                    && member.is_none_or(|member| life.member == member)
            });
            if let Some(at) = at {
                cut.push((lives[at].clone(), lives.get(at + 1).cloned()));
            }
        }
        cut
    }

    /// Waits until every idle watch that was on `name` at `mark` is served by another.
    fn wait_for_moved(&self, mark: Mark, name: &str) -> Result<Vec<(Life, Option<Life>)>> {
        wait_for(
            &format!("the idle watches on {name} are served by others"),
            PATIENCE,
            || {
                let cut = self.cut_after(mark, Some(name));
                cut.iter().all(|(_, next)| next.is_some()).then_some(cut)
            },
        )
    }

    fn claim_cut(&self, story: &mut Story, cut: &[(Life, Option<Life>)], mark: Mark, name: &str, limit: Duration) {
        let ended = cut
            .iter()
            .filter_map(|(life, _)| Some(life.until.as_ref()?.0 - mark.at))
            .max()
            .unwrap_or_default();
        let again = cut
            .iter()
            .filter_map(|(_, next)| Some(next.as_ref()?.from - next.as_ref()?.dialled))
            .max();
        let again = again.unwrap_or_default();
        story.claim(
            !cut.is_empty() && ended < limit,
            format!("{} idle watches on {name} were cut within {}", cut.len(), human(ended)),
        );
        let failures: Vec<String> = self.idles.iter().flat_map(|idle| idle.failures(mark.at)).collect();
        story.claim(
            failures.is_empty() && again < CONNECT_TIMEOUT + SLACK,
            format!(
                "their next attempt succeeded, {} failed; it took {} at most",
                failures.len(),
                human(again)
            ),
        );
        story.note(failures.join("\n"));
    }

    fn claim_writes(&self, story: &mut Story, from: Mark, until: Mark, limit: Duration) {
        let puts: Vec<_> = self
            .writer
            .log()
            .into_iter()
            .filter(|put| put.at >= from.at && put.at < until.at)
            .collect();
        let again = puts.iter().filter(|put| put.result.is_err()).count();
        let keys: std::collections::BTreeSet<u64> = puts.iter().map(|put| put.key).collect();
        let slowest = puts.iter().map(|put| put.took).max().unwrap_or_default();
        story.claim(
            !puts.is_empty() && again <= 2 && slowest < limit + SLACK,
            format!(
                "{} writes, {again} tried again, the slowest took {}",
                keys.len(),
                human(slowest)
            ),
        );
        for put in puts.iter().filter(|put| put.result.is_err()) {
            let error = put.result.as_ref().err().map_or("", String::as_str);
            story.note(format!("  write {} after {}: {error}", put.key, human(put.took)));
        }
    }
}

fn name_of(index: usize) -> String {
    format!("cp{}", index + 1)
}

/// The configurations of the story.
struct Configuration {
    front: SocketAddr,
    backends: String,
    check: String,
}

impl Configuration {
    fn of(node: &Node, servers: &Servers) -> Self {
        let backends: Vec<String> = servers.addresses().iter().map(ToString::to_string).collect();
        Self {
            front: node.at(PORT),
            backends: format!("{backends:?}"),
            check: servers.check(),
        }
    }

    /// Passive detection does the work; the active check, slow on purpose, ends a ban early.
    fn with(&self, connect_timeout: &str, more: &str) -> String {
        let Self { front, backends, check } = self;
        format!(
            r#"version = 1

[[lb.frontend]]
name = "api"
kind = "api"
listen = ["{front}"]
balance = "least-connections"
connect_timeout = "{connect_timeout}"
backends = {backends}
[lb.frontend.health]
max_fails = 2
fail_timeout = "5s"
active = {{ {check}, interval = "2s", rise = 2, fall = 3 }}

{more}"#
        )
    }

    /// A second frontend at `listen`, for [`Configuration::with`].
    fn second(&self, listen: SocketAddr) -> String {
        let backends = &self.backends;
        format!("[[lb.frontend]]\nname = \"second\"\nlisten = [\"{listen}\"]\nbackends = {backends}\n")
    }
}
