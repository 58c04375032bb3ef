//! Everything that a balancer hands to its successor when the binary is replaced: the pools, and every connection with
//! both its sockets, so that neither side of it notices.
//!
//! ```text
//! part   = 4 bytes length of the JSON, big-endian | JSON | bytes that were read and not yet written
//! first  = { format, frontends }            pools, bans, counters, journals
//! then   = { sessions: [...] }              descriptors of each: client, backend, pipes of each direction; at most 1,000
//! last   = { end: true }
//! ```
//! The old side stands still from the first part to the verdict. Connects in flight and what waits for a header are
//! not established: of these only the client's socket travels, and the successor begins anew.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{Arc, mpsc as std_mpsc},
    time::Duration,
};

use rustix::event::epoll;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::{
    Part, clock,
    frontend::{Frontend, Memory},
    reactor::{READ, READ_WRITE, Reactor, Whose},
    relay::{Direction, Record},
    session::{Leg, Phase, Session, Told},
    slab::{Content, Key},
};
use crate::{config::Address, moment::Moment};

/// Of what a part holds. Another number is refused.
const FORMAT: u32 = 1;
/// Descriptors in one part, two to six for each session. Few parts make a short pause: each waits for its receipt.
const DESCRIPTORS: usize = 1000;
/// Most of one session: two sockets, and a pipe for each direction.
const OF_A_SESSION: usize = 6;
/// Bytes on their way in one part, after which it is closed.
const BYTES: usize = 256 * 1024;
/// A frozen thread shows that often that it lives.
const PULSE: Duration = Duration::from_millis(500);

/// What a data thread is given with the order to stand still.
pub(crate) struct Freeze {
    pub(crate) to: mpsc::Sender<FromThread>,
    pub(crate) words: std_mpsc::Receiver<Word>,
}

/// From a frozen thread.
pub(crate) enum FromThread {
    /// It stands still, and its connects in flight are given up: the pools may be written down.
    Frozen,
    /// Some of its sessions.
    Part(Part),
    /// That was all.
    Finished,
}

/// To a frozen thread.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Word {
    /// Hand over.
    Send,
    /// The successor has them: end without touching any.
    Gone,
}

/// A session on its way to the thread that will serve it.
pub(crate) struct Moved {
    frontend: Arc<Frontend>,
    record: SessionRecord,
    rest: [Vec<u8>; 2],
    descriptors: Vec<OwnedFd>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Body {
    /// In the first part.
    format: Option<u32>,
    frontends: Option<BTreeMap<String, Memory>>,
    sessions: Vec<SessionRecord>,
    /// In the last part.
    end: bool,
}

#[derive(Serialize, Deserialize)]
struct SessionRecord {
    frontend: String,
    phase: Phase,
    source: SocketAddr,
    header: Option<Told>,
    admitted: bool,
    accepted: Moment,
    last_byte: Moment,
    client_nodelay: bool,
    reset_at: Option<Moment>,
    /// When it is looked at why nothing more is taken: hand-overs that follow each other must not put it off for ever.
    #[serde(default)]
    stall_at: Option<Moment>,
    /// The kernel has been told to wait for it.
    #[serde(default)]
    patient: [bool; 2],
    /// Only of an established session.
    backend: Option<BackendRecord>,
    up: Record,
    down: Record,
}

#[derive(Serialize, Deserialize)]
struct BackendRecord {
    /// As configured, `HOST:PORT`.
    backend: String,
    address: SocketAddr,
    nodelay: bool,
    tuned: bool,
}

impl SessionRecord {
    fn descriptors(&self) -> usize {
        let pipe = |record: &Record| if record.piped > 0 { 2 } else { 0 };
        1 + usize::from(self.backend.is_some()) + pipe(&self.up) + pipe(&self.down)
    }
}

/// The first part: how the pools are.
pub(crate) fn first(frontends: BTreeMap<String, Memory>) -> Result<Part, String> {
    let body = Body {
        format: Some(FORMAT),
        frontends: Some(frontends),
        ..Body::default()
    };
    part(&body, &[], Vec::new())
}

/// The last part.
pub(crate) fn last() -> Result<Part, String> {
    let body = Body {
        end: true,
        ..Body::default()
    };
    part(&body, &[], Vec::new())
}

fn part(body: &Body, bytes: &[u8], descriptors: Vec<OwnedFd>) -> Result<Part, String> {
    let json = serde_json::to_vec(body).map_err(|error| format!("the sessions cannot be written down: {error}"))?;
    let length = u32::try_from(json.len()).map_err(|_| "too many sessions for one part".to_owned())?;
    let body = [&length.to_be_bytes()[..], &json, bytes].concat();
    Ok(Part { body, descriptors })
}

/// What one part says.
pub(crate) enum Said {
    Frontends(BTreeMap<String, Memory>),
    Sessions(Vec<Arrived>),
    End,
}

/// A session as it came out of a part, before its frontend is known.
pub(crate) struct Arrived {
    record: SessionRecord,
    rest: [Vec<u8>; 2],
    descriptors: Vec<OwnedFd>,
}

impl Arrived {
    pub(crate) fn frontend(&self) -> &str {
        &self.record.frontend
    }

    pub(crate) fn of(self, frontend: Arc<Frontend>) -> Moved {
        Moved {
            frontend,
            record: self.record,
            rest: self.rest,
            descriptors: self.descriptors,
        }
    }
}

/// Reads a part that [`part`] wrote, maybe in another build.
pub(crate) fn read(part: Part) -> Result<Said, String> {
    let Part { body, descriptors } = part;
    let (length, rest) = body.split_first_chunk::<4>().ok_or("a part is too short")?;
    let length = usize::try_from(u32::from_be_bytes(*length)).map_err(|_| "a part is too long")?;
    let (json, mut bytes) = rest.split_at_checked(length).ok_or("a part is cut short")?;
    let body: Body = serde_json::from_slice(json).map_err(|error| format!("a part makes no sense: {error}"))?;
    if body.end {
        return Ok(Said::End);
    }
    if let Some(frontends) = body.frontends {
        return match body.format {
            Some(FORMAT) => Ok(Said::Frontends(frontends)),
            other => Err(format!(
                "the predecessor writes format {}, this build reads {FORMAT}",
                other.unwrap_or(0)
            )),
        };
    }
    let mut descriptors = descriptors.into_iter();
    let mut arrived = Vec::with_capacity(body.sessions.len());
    for record in body.sessions {
        let mut take = |length: usize| {
            let (mine, others) = bytes
                .split_at_checked(length)
                .ok_or("a part lacks bytes on their way")?;
            bytes = others;
            Ok::<_, String>(mine.to_vec())
        };
        let rest = [take(record.up.rest)?, take(record.down.rest)?];
        let wanted = record.descriptors();
        let own: Vec<OwnedFd> = descriptors.by_ref().take(wanted).collect();
        if own.len() < wanted {
            return Err("a part lacks descriptors".into());
        }
        arrived.push(Arrived {
            record,
            rest,
            descriptors: own,
        });
    }
    if descriptors.next().is_some() || !bytes.is_empty() {
        return Err("a part has more than its sessions account for".into());
    }
    Ok(Said::Sessions(arrived))
}

impl Reactor {
    /// Stands still, hands every session over, and ends or goes on, as it is told.
    pub(super) fn freeze(&mut self, freeze: Freeze) {
        let Freeze { to, words } = freeze;
        self.give_up_connects();
        // A PROXY header names the connection in this process's terms, so it goes out from here.
        for key in self.slab.sessions_where(|session| session.up.head.is_some()) {
            if let Some(session) = self.slab.session(key) {
                session.up.head_due = true;
            }
            self.turn(key);
        }
        // Whoever does not listen any more has given up.
        let sent = to.blocking_send(FromThread::Frozen).is_ok()
            && self.wait(&words) == Some(Word::Send)
            && self.send_sessions(&to).is_ok();
        drop(to);
        if sent && self.wait(&words) == Some(Word::Gone) {
            self.handed_over = true;
            return;
        }
        self.now = clock::now();
        for key in self.slab.sessions_where(|session| session.phase == Phase::Dialling) {
            self.dial(key);
        }
    }

    fn wait(&self, words: &std_mpsc::Receiver<Word>) -> Option<Word> {
        loop {
            match words.recv_timeout(PULSE) {
                Ok(word) => return Some(word),
                Err(std_mpsc::RecvTimeoutError::Timeout) => self.threads.beat(self.index, clock::now()),
                Err(std_mpsc::RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    /// Connects in flight belong to this process alone.
    fn give_up_connects(&mut self) {
        let now = self.now;
        for key in self.slab.keys(|content| matches!(content, Content::Attempt(_))) {
            if let Content::Attempt(attempt) = self.slab.take(key) {
                attempt.frontend.abandoned(attempt.leg.id, now);
            }
        }
        for key in self.slab.sessions_where(|session| session.phase == Phase::Dialling) {
            let Some(session) = self.slab.session(key) else {
                continue;
            };
            session.attempts = 0;
            session.hedge_at = None;
            session.tried = Vec::new();
            if let Some(leg) = session.backend.take() {
                session.frontend.abandoned(leg.id, now);
            }
        }
    }

    fn send_sessions(&mut self, to: &mpsc::Sender<FromThread>) -> Result<(), ()> {
        let keys = self.slab.sessions_where(|_| true);
        let mut keys = keys.into_iter().peekable();
        while keys.peek().is_some() {
            let mut body = Body::default();
            let (mut bytes, mut descriptors) = (Vec::new(), Vec::new());
            while descriptors.len() + OF_A_SESSION <= DESCRIPTORS && bytes.len() < BYTES {
                let Some(key) = keys.next() else { break };
                let Some(session) = self.slab.session(key) else {
                    continue;
                };
                match write_down(session, &mut bytes, &mut descriptors) {
                    Ok(record) => body.sessions.push(record),
                    Err(error) => {
                        tracing::error!(%error, "a session cannot be handed over; all stay here");
                        return Err(());
                    }
                }
            }
            let part = part(&body, &bytes, descriptors).map_err(|error| tracing::error!("{error}"))?;
            to.blocking_send(FromThread::Part(part)).map_err(drop)?;
            self.threads.beat(self.index, clock::now());
        }
        to.blocking_send(FromThread::Finished).map_err(drop)
    }

    /// Takes a session over from a predecessor; `false` if it cannot. Until the word has come the connection is not ours:
    /// letting go of it leaves it to the predecessor as it was.
    pub(super) fn adopt(&mut self, moved: Moved) -> bool {
        let now = self.now;
        let Moved {
            frontend,
            record,
            rest: [up_rest, down_rest],
            descriptors,
        } = moved;
        let mut descriptors = descriptors.into_iter();
        let pipe = |record: &Record, descriptors: &mut std::vec::IntoIter<OwnedFd>| {
            if record.piped == 0 {
                return None;
            }
            Some([descriptors.next()?, descriptors.next()?])
        };
        let Some(client) = descriptors.next() else { return false };
        let leg = record.backend.as_ref().zip(if record.backend.is_some() {
            descriptors.next()
        } else {
            None
        });
        let mut session = Session::new(frontend.clone(), client, record.source, record.phase, record.accepted);
        session.header = record.header.map(Box::new);
        session.last_byte = record.last_byte;
        session.reset_at = record.reset_at;
        session.stall_at = record.stall_at;
        session.patient = record.patient;
        session.client_nodelay = record.client_nodelay;
        session.up = Direction::restored(&record.up, &up_rest, pipe(&record.up, &mut descriptors));
        session.down = Direction::restored(&record.down, &down_rest, pipe(&record.down, &mut descriptors));
        session.down.writable = true;
        session.client_watched = session.down.is_blocked();
        if record.admitted {
            session.admitted = frontend.readmit(record.source.ip());
        }
        frontend.sessions.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if let Some((backend, socket)) = leg {
            let address: Address = backend.backend.parse().unwrap_or(Address::Ip(backend.address));
            let (id, traffic) = frontend.adopt(&address, backend.address, socket.as_raw_fd(), now);
            session.backend = Some(Leg {
                id,
                socket,
                traffic,
                dialled: record.accepted,
                nodelay: backend.nodelay,
                tuned: backend.tuned,
            });
        } else if session.phase == Phase::Relaying {
            // Half a connection: another backend would get the rest of a conversation.
            return false;
        }
        let key = self.slab.put(Content::Session(Box::new(session)));
        self.watch_adopted(key)
    }

    /// The sockets report at once what they are ready for.
    fn watch_adopted(&mut self, key: Key) -> bool {
        let Self { epoll, slab, .. } = self;
        let Some(session) = slab.session(key) else { return false };
        let flags = if session.client_watched { READ_WRITE } else { READ };
        let mut watched = epoll::add(&*epoll, &session.client, Whose::Client(key).pack(), flags);
        if let Some(leg) = &session.backend {
            watched = watched.and(epoll::add(epoll, &leg.socket, Whose::Backend(key).pack(), READ_WRITE));
        }
        let phase = session.phase;
        if watched.is_err() {
            return false;
        }
        // Whoever has no backend yet gets one once this side serves.
        if phase != Phase::Dialling {
            self.arm(key);
        }
        true
    }
}

/// Writes one session down; its descriptors are duplicates, so that this process can go on with its own.
fn write_down(
    session: &Session,
    bytes: &mut Vec<u8>,
    descriptors: &mut Vec<OwnedFd>,
) -> Result<SessionRecord, std::io::Error> {
    let mut pass = |descriptor: BorrowedFd<'_>| {
        descriptors.push(descriptor.try_clone_to_owned()?);
        Ok::<_, std::io::Error>(())
    };
    pass(session.client.as_fd())?;
    let mut backend = None;
    if let Some(leg) = session.backend.as_ref().filter(|_| session.relaying()) {
        let Some((address, at)) = session.frontend.place_of(leg.id) else {
            return Err(std::io::Error::other("its backend is not known any more"));
        };
        pass(leg.socket.as_fd())?;
        backend = Some(BackendRecord {
            backend: address.to_string(),
            address: at,
            nodelay: leg.nodelay,
            tuned: leg.tuned,
        });
    }
    let mut records = [Record::default(); 2];
    for (direction, into) in [&session.up, &session.down].into_iter().zip(&mut records) {
        let (record, rest, pipe) = direction.record();
        bytes.extend_from_slice(rest);
        for end in pipe.into_iter().flatten() {
            pass(end)?;
        }
        *into = record;
    }
    let [up, down] = records;
    Ok(SessionRecord {
        frontend: session.frontend.name.clone(),
        phase: session.phase,
        source: session.source,
        header: session.header.as_deref().copied(),
        admitted: session.admitted,
        accepted: session.accepted,
        last_byte: session.last_byte,
        client_nodelay: session.client_nodelay,
        reset_at: session.reset_at,
        stall_at: session.stall_at,
        patient: session.patient,
        backend,
        up,
        down,
    })
}
