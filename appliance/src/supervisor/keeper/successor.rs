//! A second process of a role that takes the place of the first.
//!
//! ```text
//! balancer      start the new one and join both by a socket pair -> the old one hands over -> the new one is ready
//! resolver      start the new one on the same sockets, tell it what the old one has kept -> it is ready and answers, but takes
//!               no update -> the old one finishes its own and ends -> the zones are the new one's
//! translator    start the new one on the same queues and memory -> it is ready -> the old one ends -> the sessions are the new one's
//! metrics page  start the new one on the same listeners -> it is ready -> stop the old one
//! ```
//! Until the new one is ready the old one is the worker, and whatever goes wrong ends the new one only. What both ends of a
//! hand-over take for its outcome is the same ([`crate::handover`]): the old one says it, and a new one that is ready serves.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout},
};

use super::{
    Actor, Life,
    process::{Heard, Process},
};
use crate::{
    build, channel, handover,
    worker::{
        Role,
        message::{FromWorker, ToWorker},
    },
};

/// For the whole of it; a hand-over ends earlier by its own limits.
const LIMIT: Duration = Duration::from_secs(handover::START.as_secs() + handover::TOTAL.as_secs() + 2);
/// For the other side's word, when one of them has ended or has said that it handed over.
const LAST_WORD: Duration = Duration::from_secs(3);
/// Milliseconds for an old one to answer what it has taken.
const LAST_ANSWERS: u64 = 500;
/// For an old one to end by itself.
const FAREWELL: Duration = Duration::from_secs(1);

/// A process that is to take over.
pub(super) struct Successor {
    process: Process,
    heard: mpsc::Receiver<Heard>,
    reply: oneshot::Sender<Result<(), String>>,
    /// The number of the order to hand over; `None` if there is nothing to be handed over.
    order: Option<u64>,
    /// The old one has said that it has handed over.
    committed: bool,
    /// It answers, and waits for the old one's end.
    waits: bool,
    /// It has ended, and how.
    ended: Option<String>,
    /// When there must be an outcome.
    pub(super) until: Instant,
}

/// What the successor says; never, if there is none or it has ended.
pub(super) async fn says(successor: &mut Option<Successor>) -> Heard {
    match successor {
        Some(successor) if successor.ended.is_none() => successor.heard.recv().await.unwrap_or(Ok(None)),
        _ => std::future::pending().await,
    }
}

impl Successor {
    /// Tells it what became durable since it was started.
    pub(super) fn learn(&self, message: ToWorker) {
        self.process.say(message, Vec::new());
    }

    /// Ends it, and says why nothing was taken over.
    pub(super) fn fail(self, why: String) {
        let _ = self.reply.send(Err(why));
        tokio::spawn(self.process.end());
    }
}

impl Actor {
    /// Starts a successor beside `process`.
    pub(super) fn succeed(&mut self, reply: oneshot::Sender<Result<(), String>>, process: &Process, life: &mut Life) {
        if !life.ready || life.wanted || life.reload.is_some() || life.successor.is_some() || life.heir {
            let _ = reply.send(Err("it is being started, changed or stopped already".into()));
            return;
        }
        let hands_over = self.role == Role::Lb;
        let started = channel::pair().and_then(|ends| Ok((ends, Process::start(self.role)?)));
        let ((old, new), (fresh, heard)) = match started {
            Ok(started) => started,
            Err(error) => {
                let _ = reply.send(Err(format!("the new one could not be started: {error}")));
                return;
            }
        };
        channel::widen([&old, &new]);
        let (start, descriptors) = self.start_message(hands_over.then_some(new), true);
        fresh.say(start, descriptors);
        tracing::info!(role = %self.role, pid = process.pid(), successor = fresh.pid(), "worker is being replaced");
        let order = hands_over.then(|| {
            life.next += 1;
            process.say(ToWorker::HandOver { id: life.next }, vec![Arc::new(old)]);
            life.next
        });
        life.successor = Some(Successor {
            process: fresh,
            heard,
            reply,
            order,
            committed: false,
            waits: false,
            ended: None,
            until: Instant::now() + LIMIT,
        });
    }

    /// The old one's word on the hand-over.
    pub(super) fn handed_over(id: u64, result: Result<(), String>, life: &mut Life) -> Result<(), String> {
        match (&mut life.successor, result) {
            (Some(successor), Ok(())) if successor.order == Some(id) => {
                successor.committed = true;
                successor.until = Instant::now() + LAST_WORD;
                Ok(())
            }
            (Some(successor), Err(why)) if successor.order == Some(id) && !successor.committed => {
                let how = successor.ended.as_ref().map(|how| format!("; the new one {how}"));
                if let Some(successor) = life.successor.take() {
                    successor.fail(format!("{why}{}", how.unwrap_or_default()));
                }
                Ok(())
            }
            // An answer that comes after the order was given up.
            (_, Err(_)) => Ok(()),
            (_, Ok(())) => Err("handed over to nobody".into()),
        }
    }

    /// What the successor says.
    pub(super) fn hear_successor(
        &mut self,
        said: Heard,
        process: &mut Process,
        heard: &mut mpsc::Receiver<Heard>,
        life: &mut Life,
    ) {
        let Some(mut successor) = life.successor.take() else {
            return;
        };
        let how = match said {
            Ok(Some(FromWorker::Ready)) if matches!(self.role, Role::Dns64 | Role::Nat64) => {
                // Its updates are on their way to the disk, and must be known there before the next one is looked at; and two
                // must not write to one table of sessions.
                process.say(ToWorker::Stop { grace_ms: LAST_ANSWERS }, Vec::new());
                successor.waits = true;
                successor.until = Instant::now() + Duration::from_millis(LAST_ANSWERS) + FAREWELL;
                life.successor = Some(successor);
                return;
            }
            Ok(Some(FromWorker::Ready)) => return self.crown(successor, process, heard, life),
            Ok(Some(_)) => "said what is not for it to say",
            Ok(None) => "ended",
            Err(_) => "said what makes no sense",
        };
        if successor.order.is_none() {
            return successor.fail(format!(
                "the new one {how} before it took over; see its lines in the log"
            ));
        }
        // The old one notices too, and knows what became of the hand-over.
        successor.ended = Some(how.into());
        successor.until = Instant::now() + LAST_WORD;
        life.successor = Some(successor);
    }

    /// The old one has ended; whether its successor goes on in its place.
    pub(super) async fn outlived(
        &mut self,
        process: &mut Process,
        heard: &mut mpsc::Receiver<Heard>,
        life: &mut Life,
    ) -> bool {
        // What it said last may not have been heard yet.
        while let Ok(Ok(Some(message))) = heard.try_recv() {
            let _ = self.hear(message, process, life);
        }
        if life.wanted {
            return false;
        }
        if let Some(successor) = life.successor.take_if(|successor| successor.waits) {
            self.crown(successor, process, heard, life);
            return true;
        }
        let hands_over = life
            .successor
            .as_ref()
            .is_some_and(|successor| successor.order.is_some() && successor.ended.is_none());
        if !hands_over {
            return false;
        }
        // It serves only if all was handed over; without that it ends by itself.
        match timeout(LAST_WORD, says(&mut life.successor)).await {
            Ok(said @ Ok(Some(FromWorker::Ready))) => {
                self.hear_successor(said, process, heard, life);
                true
            }
            _ => false,
        }
    }

    /// There is no outcome.
    pub(super) fn too_late(
        &mut self,
        process: &mut Process,
        heard: &mut mpsc::Receiver<Heard>,
        life: &mut Life,
    ) -> Result<(), String> {
        let Some(successor) = life.successor.take() else {
            return Ok(());
        };
        if successor.waits {
            // The old one has had its time; what it did not answer is asked again.
            self.crown(successor, process, heard, life);
            return Ok(());
        }
        if successor.committed {
            let how = successor
                .ended
                .clone()
                .unwrap_or_else(|| format!("did not serve within {} s", LAST_WORD.as_secs()));
            successor.fail(format!("the new one {how} after it had taken over"));
            return Err("handed over to one that did not serve".into());
        }
        let how = successor
            .ended
            .clone()
            .unwrap_or_else(|| "did not get ready in time".into());
        successor.fail(format!("the new one {how}"));
        Ok(())
    }

    /// The successor serves: it is the worker from here on.
    fn crown(
        &mut self,
        successor: Successor,
        process: &mut Process,
        heard: &mut mpsc::Receiver<Heard>,
        life: &mut Life,
    ) {
        let old = std::mem::replace(process, successor.process);
        *heard = successor.heard;
        let asked = std::mem::take(&mut life.asked);
        *life = Life {
            ready: true,
            heir: successor.waits,
            ..Life::default()
        };
        self.incarnation += 1;
        self.pages = 0;
        {
            let mut seen = super::lock(&self.seen);
            (seen.since, seen.build) = (std::time::Instant::now(), Some(build::own()));
        }
        self.look("running", Some(process.pid()));
        tracing::info!(role = %self.role, pid = process.pid(), predecessor = old.pid(), "worker replaced");
        for (_, (question, reply)) in asked {
            // Perhaps it was done, and only its answer is lost: whoever asked is told that nobody knows.
            if question.is_once() {
                continue;
            }
            let _ = self.told(super::Message::Ask { question, reply }, process, life);
        }
        self.give(process, life);
        let role = self.role;
        tokio::spawn(async move {
            if successor.order.is_none() && !successor.waits {
                old.say(ToWorker::Stop { grace_ms: LAST_ANSWERS }, Vec::new());
            }
            if timeout(FAREWELL, old.ended()).await.is_err() {
                tracing::warn!(%role, pid = old.pid(), "the replaced worker did not end by itself and is killed");
            }
            old.end().await;
        });
        let _ = successor.reply.send(Ok(()));
    }
}
