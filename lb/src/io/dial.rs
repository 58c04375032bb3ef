//! Finding a backend for a client: one after the other as they fail, and one beside the other as they hesitate.
//!
//! ```text
//! t = 0        dial A
//! 250 ms       no answer: A becomes an attempt of its own, dial B      (hedge)
//!              whoever answers first gets the client; the other one's answer is noted and closed
//! 1 s          A still has not answered: a failed connect
//! ```

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use rustix::{event::epoll, io::Errno};

use super::{
    frontend::{Frontend, Traffic},
    ingress,
    reactor::{READ_WRITE, Reactor, Whose},
    session::{self, Attempt, End, Leg, Phase},
    slab::{Content, Key},
    socket,
};
use crate::pool::{Failure, Pick};

/// All backends together may take this long to accept, or the connect timeout if that is longer.
const PATIENCE: Duration = Duration::from_secs(3);

impl Reactor {
    /// Connects to the next backend; without one the client is reset.
    pub(super) fn dial(&mut self, key: Key) {
        let now = self.now;
        loop {
            let Some(session) = self.slab.session(key) else { return };
            let frontend = session.frontend.clone();
            let patience = PATIENCE.max(frontend.rules.load().connect_timeout);
            let picked = if now - session.accepted > patience {
                None
            } else {
                frontend.pick(session.source.ip(), &session.tried, now)
            };
            let Some((pick, traffic)) = picked else {
                if session.attempts > 0 {
                    // One that hesitates may still answer.
                    return;
                }
                frontend.failed.fetch_add(1, Relaxed);
                self.end(key, End::Reset);
                return;
            };
            if !session.tried.is_empty() {
                frontend.retries.fetch_add(1, Relaxed);
            }
            match self.begin(key, &frontend, pick, traffic) {
                Ok(()) => return,
                Err(error) if is_shortage(error) => {
                    // No other backend can help this machine's own shortage.
                    frontend.failed.fetch_add(1, Relaxed);
                    self.end(key, End::Reset);
                    return;
                }
                Err(_) => {}
            }
        }
    }

    /// Begins a connect on behalf of the session, which has none. A failure is already booked.
    fn begin(&mut self, key: Key, frontend: &Frontend, pick: Pick, traffic: Arc<Traffic>) -> Result<(), Errno> {
        let now = self.now;
        let Self { epoll, slab, spare, .. } = self;
        let Some(session) = slab.session(key) else {
            return Ok(());
        };
        let mut begun = socket::connect(pick.address);
        if matches!(begun, Err(Errno::MFILE | Errno::NFILE)) && spare.take().is_some() {
            // The client took the last descriptor; it shall not have come in vain. Others wait in the queue until there is
            // a spare one again.
            begun = socket::connect(pick.address);
        }
        let begun = begun.map_err(|error| (socket::failure_of(error), error));
        let watched = begun.and_then(|socket| {
            epoll::add(epoll, &socket, Whose::Backend(key).pack(), READ_WRITE)
                .map(|()| socket)
                .map_err(|error| (Failure::Local, error))
        });
        let socket = match watched {
            Ok(socket) => socket,
            Err((failure, error)) => {
                frontend.connect_failed(pick.id, failure, now);
                session.tried.push(pick.id);
                return Err(error);
            }
        };
        session.backend = Some(Leg {
            id: pick.id,
            socket,
            traffic,
            dialled: now,
            nodelay: false,
            tuned: false,
        });
        session.hedge_at = session::hedge_at(now, frontend.rules.load().hedge);
        self.arm(key);
        Ok(())
    }

    /// The connect in flight has an answer.
    pub(super) fn dialled(&mut self, key: Key, flags: epoll::EventFlags) {
        let Some(session) = self.slab.session(key) else { return };
        let Some(leg) = &session.backend else { return };
        match answer(leg, flags) {
            None => {}
            Some(Ok(())) => self.established(key, flags),
            Some(Err(failure)) => self.next_backend(key, failure),
        }
    }

    /// The session's backend has accepted.
    fn established(&mut self, key: Key, flags: epoll::EventFlags) {
        use epoll::EventFlags as F;
        let now = self.now;
        let Some(session) = self.slab.session(key) else { return };
        let Some(leg) = &session.backend else { return };
        session.phase = Phase::Relaying;
        session.hedge_at = None;
        // Those that are still on their way find the session taken.
        session.attempts = 0;
        session.tried = Vec::new();
        session.last_byte = now;
        session.up.writable = true;
        session.down.readable |= flags.intersects(F::IN | F::RDHUP);
        session.down.fin |= flags.contains(F::RDHUP);
        session.down.wary |= flags.contains(F::PRI);
        session
            .frontend
            .connected(leg.id, socket::number(&leg.socket), now - leg.dialled, now);
        let due = session.up.readable || session.down.readable;
        session.up.head = ingress::head(session);
        // The connect's timer serves as the session's first one where it is early enough.
        self.arm(key);
        if due {
            self.turn(key);
        }
    }

    /// The backend being dialled did not answer: the same client goes on to the next one.
    fn next_backend(&mut self, key: Key, failure: Failure) {
        let now = self.now;
        let Some(session) = self.slab.session(key) else { return };
        session.hedge_at = None;
        if let Some(leg) = session.backend.take() {
            session.tried.push(leg.id);
            session.frontend.connect_failed(leg.id, failure, now);
        }
        self.dial(key);
    }

    /// A deadline of a session that is being connected.
    pub(super) fn dial_timer(&mut self, key: Key) {
        let now = self.now;
        let Some(session) = self.slab.session(key) else { return };
        let timeout = session.frontend.rules.load().connect_timeout;
        if session.backend.as_ref().is_some_and(|leg| leg.dialled + timeout <= now) {
            self.next_backend(key, Failure::Timeout);
        } else {
            if session.hedge_at.is_some_and(|at| at <= now) {
                self.hedge(key);
            }
            self.arm(key);
        }
    }

    /// The backend hesitates: another one is dialled as well. The first to answer gets the client.
    fn hedge(&mut self, key: Key) {
        let now = self.now;
        let Some(session) = self.slab.session(key) else { return };
        session.hedge_at = None;
        let frontend = session.frontend.clone();
        let Some(leg) = session.backend.take() else { return };
        session.tried.push(leg.id);
        let Some((pick, traffic)) = frontend.hedge(session.source.ip(), &session.tried, now) else {
            // Nobody healthy is left to ask.
            session.tried.pop();
            session.backend = Some(leg);
            return;
        };
        session.attempts = session.attempts.saturating_add(1);
        self.set_aside(key, leg, frontend.clone());
        // A failure to begin is booked; the attempt goes on.
        if let Err(error) = self.begin(key, &frontend, pick, traffic) {
            tracing::debug!(frontend = frontend.name, %error, "a second backend could not be dialled");
        }
    }

    /// Makes a connect in flight an attempt of its own that the session takes if it is the first to answer.
    fn set_aside(&mut self, session: Key, leg: Leg, frontend: Arc<Frontend>) {
        let deadline = leg.dialled + frontend.rules.load().connect_timeout;
        let attempt = Attempt { frontend, leg, session };
        let key = self.slab.put(Content::Attempt(Box::new(attempt)));
        let Self { epoll, slab, .. } = self;
        if let Some(attempt) = slab.attempt(key) {
            // Watched since its connect began. Without a new key its answer would be lost and the timer finds it.
            let _ = epoll::modify(epoll, &attempt.leg.socket, Whose::Backend(key).pack(), READ_WRITE);
        }
        self.arm_attempt(key, deadline);
    }

    /// An attempt has an answer.
    pub(super) fn attempt_answered(&mut self, key: Key, flags: epoll::EventFlags) {
        let Some(attempt) = self.slab.attempt(key) else { return };
        match answer(&attempt.leg, flags) {
            None => {}
            Some(Ok(())) => self.attempt_connected(key, flags),
            Some(Err(failure)) => self.attempt_failed(key, failure),
        }
    }

    fn attempt_connected(&mut self, key: Key, flags: epoll::EventFlags) {
        let now = self.now;
        let Content::Attempt(attempt) = self.slab.take(key) else {
            return;
        };
        let Attempt {
            frontend,
            leg,
            session: owner,
        } = *attempt;
        let Some(session) = self
            .slab
            .session(owner)
            .filter(|session| session.phase == Phase::Dialling)
        else {
            // Another one was faster, or the client has left: it is slow, not failed.
            frontend.slow(leg.id, now - leg.dialled, now);
            return;
        };
        session.attempts = session.attempts.saturating_sub(1);
        let second = session.backend.replace(leg);
        if let Some(leg) = &session.backend {
            let moved = epoll::modify(&self.epoll, &leg.socket, Whose::Backend(owner).pack(), READ_WRITE);
            if moved.is_err() {
                self.end(owner, End::Reset);
                return;
            }
        }
        self.established(owner, flags);
        if let Some(second) = second {
            self.set_aside(owner, second, frontend);
        }
    }

    /// An attempt that has had its time.
    pub(super) fn attempt_timer(&mut self, key: Key) {
        if self.slab.attempt(key).is_some() {
            self.attempt_failed(key, Failure::Timeout);
        }
    }

    fn attempt_failed(&mut self, key: Key, failure: Failure) {
        let now = self.now;
        let Content::Attempt(attempt) = self.slab.take(key) else {
            return;
        };
        attempt.frontend.connect_failed(attempt.leg.id, failure, now);
        let owner = attempt.session;
        drop(attempt);
        let Some(session) = self
            .slab
            .session(owner)
            .filter(|session| session.phase == Phase::Dialling)
        else {
            return;
        };
        session.attempts = session.attempts.saturating_sub(1);
        if session.backend.is_none() {
            self.dial(owner);
        }
    }
}

/// What an event says of a connect: nothing yet, or how it ended.
fn answer(leg: &Leg, flags: epoll::EventFlags) -> Option<Result<(), Failure>> {
    use epoll::EventFlags as F;
    if flags.intersects(F::ERR | F::HUP) {
        let error = match rustix::net::sockopt::socket_error(&leg.socket) {
            Ok(Err(error)) | Err(error) => error,
            // Closed right after the handshake, before we looked.
            Ok(Ok(())) => Errno::CONNRESET,
        };
        return Some(Err(socket::failure_of(error)));
    }
    flags.contains(F::OUT).then_some(Ok(()))
}

/// This machine has run out of something.
const fn is_shortage(error: Errno) -> bool {
    matches!(error, Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)
}
