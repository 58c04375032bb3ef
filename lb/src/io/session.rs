//! One proxied connection, as plain data: what a data thread keeps in its slab and what a hand-over writes down.

use std::{
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    frontend::{Frontend, Traffic},
    relay::{Direction, Scratch},
    socket,
};
use crate::{moment::Moment, pool::BackendId, wheel::TICK};

/// When a session gets the keepalive of its backend leg.
pub(crate) const GROWN_UP: Duration = Duration::from_secs(1);

/// How long a PROXY header waits for the client's first bytes, to travel in one segment with them and to name the server
/// that a TLS client asks for. Where the server speaks first, nothing comes, and the header goes alone.
pub(crate) const HEAD_WAIT: Duration = Duration::from_millis(30);

/// How far a session has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Phase {
    /// Its PROXY header is awaited; nothing has been read yet.
    Header,
    /// A backend is being connected.
    Dialling,
    /// Bytes go both ways.
    Relaying,
}

/// One proxied connection.
pub(crate) struct Session {
    pub(crate) frontend: Arc<Frontend>,
    pub(crate) client: OwnedFd,
    /// The client: the peer of the connection, or whom a trusted PROXY header names.
    pub(crate) source: SocketAddr,
    /// What a PROXY header said of this connection.
    pub(crate) header: Option<Box<Told>>,
    /// It counts towards the limits of its source.
    pub(crate) admitted: bool,
    pub(crate) phase: Phase,
    /// The backend being connected or in use.
    pub(crate) backend: Option<Leg>,
    /// Earlier connects that may still win.
    pub(crate) attempts: u8,
    /// Backends that are not to be chosen (again): they failed, or they are being tried.
    pub(crate) tried: Vec<BackendId>,
    pub(crate) accepted: Moment,
    /// When the next backend is dialled as well, if none has answered by then.
    pub(crate) hedge_at: Option<Moment>,
    pub(crate) last_byte: Moment,
    /// Client to backend.
    pub(crate) up: Direction,
    /// Backend to client.
    pub(crate) down: Direction,
    pub(crate) client_nodelay: bool,
    /// The client socket is watched for writability (only once a write came up short).
    pub(crate) client_watched: bool,
    /// When to look at a side that does not take what it is sent.
    pub(crate) stall_at: Option<Moment>,
    /// Client and backend: it lives and does not read, so the kernel is told to wait.
    pub(crate) patient: [bool; 2],
    pub(crate) reset_at: Option<Moment>,
    /// The tick the earliest timer entry is set for.
    pub(crate) armed: u64,
}

/// What a PROXY header told about the connection behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Told {
    /// The sender speaks for itself (LOCAL, UNKNOWN): the connection's own addresses are true.
    Nothing,
    /// The client connected to this address.
    Destination(SocketAddr),
}

/// The way to one backend.
pub(crate) struct Leg {
    pub(crate) id: BackendId,
    pub(crate) socket: OwnedFd,
    pub(crate) traffic: Arc<Traffic>,
    /// When the connect began.
    pub(crate) dialled: Moment,
    pub(crate) nodelay: bool,
    pub(crate) tuned: bool,
}

/// A connect that took so long that the next backend was dialled as well.
pub(crate) struct Attempt {
    pub(crate) frontend: Arc<Frontend>,
    pub(crate) leg: Leg,
    /// The session that takes it if it is the first to answer.
    pub(crate) session: super::slab::Key,
}

/// How a session ends.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Both sides have said all: plain close.
    Done,
    /// Something broke: the other side is told by a reset.
    Reset,
}

impl Session {
    /// A connection that was just accepted.
    pub(crate) fn new(frontend: Arc<Frontend>, client: OwnedFd, source: SocketAddr, phase: Phase, now: Moment) -> Self {
        Self {
            frontend,
            client,
            source,
            header: None,
            admitted: false,
            phase,
            backend: None,
            attempts: 0,
            tried: Vec::new(),
            accepted: now,
            hedge_at: None,
            last_byte: now,
            up: Direction::default(),
            // A fresh socket takes a first answer; what does not fit shows in the write.
            down: Direction::into_fresh_socket(),
            // Inherited from the listener.
            client_nodelay: true,
            client_watched: false,
            stall_at: None,
            patient: [false; 2],
            reset_at: None,
            armed: u64::MAX,
        }
    }

    pub(crate) fn relaying(&self) -> bool {
        self.phase == Phase::Relaying
    }

    pub(crate) fn half_closed(&self) -> bool {
        self.up.told != self.down.told
    }

    /// Nothing is under way, and nothing has been for `quiet`: a good moment to send the client elsewhere.
    pub(crate) fn quiet_for(&self, quiet: Duration, now: Moment) -> bool {
        self.relaying()
            && self.reset_at.is_none()
            && now - self.last_byte >= quiet
            && !self.up.readable
            && !self.down.readable
            && self.up.is_clear()
            && self.down.is_clear()
    }

    /// The earliest moment at which something has to be looked at.
    pub(crate) fn deadline(&self) -> Option<Moment> {
        let rules = self.frontend.rules.load();
        let mut earliest = self.reset_at;
        let mut consider = |moment: Moment| earliest = Some(earliest.map_or(moment, |at: Moment| at.min(moment)));
        match self.phase {
            Phase::Header => consider(self.accepted + rules.header_timeout()),
            Phase::Dialling => {
                if let Some(leg) = &self.backend {
                    consider(leg.dialled + rules.connect_timeout);
                }
                if let Some(at) = self.hedge_at {
                    consider(at);
                }
            }
            Phase::Relaying => {
                if self.backend.as_ref().is_some_and(|leg| !leg.tuned) {
                    consider(self.accepted + GROWN_UP);
                }
                if self.up.head.is_some() {
                    consider(self.last_byte + HEAD_WAIT);
                }
                if let Some(at) = self.stall_at {
                    consider(at);
                }
                if self.half_closed() {
                    consider(self.last_byte + rules.half_close_timeout);
                }
                if let Some(idle) = rules.idle_timeout {
                    consider(self.last_byte + idle);
                }
            }
        }
        earliest
    }

    /// Looks at the sides that do not take what they are sent; `false` if one of them is gone.
    ///
    /// TCP_USER_TIMEOUT also ends a connection whose peer lives, answers every probe and just does not read: `kubectl logs`
    /// behind a pager. So it is taken off while the peer's window is shut, and set again once it opens. A peer that went
    /// away while its window was shut answers no probe.
    pub(crate) fn look_at_stalled(&mut self) -> bool {
        let Some(leg) = &self.backend else { return true };
        let sides = [
            (&self.client, self.down.is_blocked()),
            (&leg.socket, self.up.is_blocked()),
        ];
        for ((socket, blocked), patient) in sides.into_iter().zip(&mut self.patient) {
            let window = if blocked {
                socket::window(socket::number(socket))
            } else {
                None
            };
            let shut = window.is_some_and(|window| window.shut);
            if shut && window.is_some_and(|window| window.unanswered()) {
                return false;
            }
            if *patient != shut {
                *patient = shut;
                socket::set_patience(socket.as_fd(), shut);
            }
        }
        true
    }

    /// Gives everything back that the session holds, in the books and in the kernel.
    pub(crate) fn close(mut self, end: End, scratch: &mut Scratch, now: Moment) {
        use std::os::fd::AsRawFd;
        self.frontend.sessions.fetch_sub(1, Relaxed);
        if self.admitted {
            self.frontend.left(self.source.ip());
        }
        self.up.close(scratch);
        self.down.close(scratch);
        if let Some(leg) = self.backend {
            if self.phase == Phase::Relaying {
                self.frontend.closed(leg.id, leg.socket.as_raw_fd(), now);
            } else {
                self.frontend.abandoned(leg.id, now);
            }
            close(leg.socket, end);
        }
        close(self.client, end);
    }
}

/// When to dial the next backend as well: a tick early, because a timer fires up to a tick late.
pub(crate) fn hedge_at(dialled: Moment, hedge: Option<Duration>) -> Option<Moment> {
    hedge.map(|after| dialled + after.saturating_sub(TICK))
}

pub(crate) fn close(socket: OwnedFd, end: End) {
    match end {
        End::Done => drop(socket),
        End::Reset => socket::reset(socket),
    }
}
