//! The `lb` worker: the supervisor's messages to the balancer's commands and back.

use std::{collections::BTreeMap, os::fd::OwnedFd, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use lb::io::{Command, Commit, Inheritance, Links, Opened};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::{
    FromWorker, Role, Service, Sockets, Start, ToWorker, ask, deal, hear, load,
    message::{Bytes, Durable, Question, Reply},
};
use crate::{
    channel::Channel,
    handover::{self, Giver, Part, Taker},
    log,
};

/// After the commit: the successor serves, and what this process still holds is in nobody's way.
const FAREWELL: Duration = Duration::from_millis(500);

/// Runs the balancer until the supervisor says stop.
pub(super) async fn run(
    start: Start,
    config: lb::Config,
    descriptors: Vec<OwnedFd>,
    channel: Arc<Channel>,
    said: mpsc::Sender<FromWorker>,
) -> anyhow::Result<()> {
    let before = usize::from(start.state) + usize::from(start.inherit);
    let (mut first, listeners) = deal(&start.service, descriptors, before)?;
    let predecessor = if start.inherit { first.pop() } else { None };
    let state = first.pop();
    let opened = opened(start.service, listeners);
    let (commands, to_balancer) = mpsc::channel(64);
    let (commits, from_balancer) = mpsc::channel(64);
    let links = Links {
        commands: to_balancer,
        commits,
    };
    let inheritance = predecessor.map(inherit);
    let serving = lb::io::run(config, opened, start.drains, state, start.threads, links, inheritance);
    let mut serving = std::pin::pin!(serving);
    let conversation = converse(channel, said, commands, from_balancer);
    let mut conversation = std::pin::pin!(conversation);
    // Both on this task: the balancer's end is the worker's, and a channel that fails is too.
    let stopped = tokio::select! {
        ended = serving.as_mut() => {
            ended.context("the balancer ended")?;
            bail!("the balancer ended without being told to");
        }
        result = conversation.as_mut() => result?,
    };
    match stopped {
        Stopped::HandedOver => {
            if timeout(FAREWELL, serving).await.is_err() {
                tracing::warn!("the balancer did not end after it had handed over; its process ends");
            }
            Ok(())
        }
        Stopped::Told => serving.await.context("the balancer ended while it was being stopped"),
        // Nobody is left to serve for; the kernel ends this process too.
        Stopped::Orphaned => Ok(()),
    }
}

enum Stopped {
    Told,
    HandedOver,
    Orphaned,
}

async fn converse(
    channel: Arc<Channel>,
    said: mpsc::Sender<FromWorker>,
    commands: mpsc::Sender<Command>,
    mut commits: mpsc::Receiver<Commit>,
) -> anyhow::Result<Stopped> {
    let mut hears = hear(channel);
    let mut waiting: BTreeMap<u64, oneshot::Sender<Result<(), String>>> = BTreeMap::new();
    let mut next = 0;
    let (gave, mut given) = mpsc::channel(1);
    ask(&commands, Command::Ping, said.clone(), |()| FromWorker::Ready).await;
    loop {
        tokio::select! {
            received = hears.recv() => {
                let Some((message, descriptors)) = received.transpose()?.flatten() else { return Ok(Stopped::Orphaned) };
                match message {
                    ToWorker::Ping { id } => ask(&commands, Command::Ping, said.clone(), move |()| FromWorker::Pong { id }).await,
                    ToWorker::Ask { id, question: Question::Lb(request) } => {
                        let command = |reply| Command::Ask { request, reply };
                        let answer = move |answer| FromWorker::Answer { id, reply: Reply::Lb(Box::new(answer)) };
                        ask(&commands, command, said.clone(), answer).await;
                    }
                    ToWorker::Reload { id, service } => {
                        let (config, opened) = reload(*service, descriptors)?;
                        let command = |done| Command::Reload { config, opened, done };
                        ask(&commands, command, said.clone(), move |result| FromWorker::Reloaded { id, result }).await;
                    }
                    ToWorker::Committed { id, result } => {
                        if let Some(done) = waiting.remove(&id) {
                            let _ = done.send(result);
                        }
                    }
                    ToWorker::HandOver { id } => {
                        let (commands, gave) = (commands.clone(), gave.clone());
                        tokio::spawn(async move {
                            let result = give(descriptors, commands).await;
                            let _ = gave.send((id, result)).await;
                        });
                    }
                    ToWorker::Stop { grace_ms } => {
                        let _ = commands.send(Command::Stop { grace: Duration::from_millis(grace_ms) }).await;
                        return Ok(Stopped::Told);
                    }
                    ToWorker::Start(_) | ToWorker::Metrics { .. } | ToWorker::Ask { .. } | ToWorker::Learn { .. } | ToWorker::Own => {
                        bail!("the supervisor said what is not for the balancer")
                    }
                }
            }
            Some((id, result)) = given.recv() => {
                let (result, commit) = match result {
                    Ok(commit) => (Ok(()), Some(commit)),
                    Err(error) => (Err(error.to_string()), None),
                };
                let _ = said.send(FromWorker::HandedOver { id, result }).await;
                if let Some(commit) = commit {
                    let _ = commit.send(());
                    return Ok(Stopped::HandedOver);
                }
            }
            Some(Commit { drain, set, done }) = commits.recv() => {
                next += 1;
                waiting.insert(next, done);
                let durable = Box::new(Durable::Drain { drain, set });
                let _ = said.send(FromWorker::Commit { id: next, durable }).await;
            }
        }
    }
}

/// Hands the balancer over to whoever holds the other end of the socket. With `Ok` the successor serves; what is returned
/// tells the balancer to end. Otherwise, by dropping that, it goes on.
async fn give(
    descriptors: Vec<OwnedFd>,
    commands: mpsc::Sender<Command>,
) -> Result<oneshot::Sender<()>, handover::Error> {
    let Ok([socket]) = <[OwnedFd; 1]>::try_from(descriptors) else {
        return Err(handover::Error::Service("was given no way to its successor"));
    };
    let mut giver = Giver::begin(socket, Role::Lb.name()).await?;
    tracing::info!(build = giver.successor, "handing over to a successor");
    let (sender, mut parts) = mpsc::channel::<lb::io::Part>(1);
    let (commit, committed) = oneshot::channel();
    let silent = |_| handover::Error::Service("did not hand over in time");
    let order = commands.send(Command::HandOver {
        parts: sender,
        commit: committed,
    });
    timeout(handover::STEP, order)
        .await
        .map_err(silent)?
        .map_err(|_| handover::Error::Service("has ended"))?;
    while let Some(part) = timeout(handover::STEP, parts.recv()).await.map_err(silent)? {
        let part = Part {
            body: part.body,
            descriptors: part.descriptors,
        };
        giver.part(part).await?;
    }
    if commit.is_closed() {
        return Err(handover::Error::Service("broke the hand-over off"));
    }
    giver.end().await?;
    // It may have thawed meanwhile; between here and its answer it waits for nothing else.
    if commit.is_closed() {
        return Err(handover::Error::Service("broke the hand-over off"));
    }
    giver.commit().await?;
    Ok(commit)
}

/// What the balancer gets from its predecessor at the other end of `socket`. Whatever goes wrong ends the parts, and so the
/// balancer and this process.
fn inherit(socket: OwnedFd) -> Inheritance {
    let (sender, parts) = mpsc::channel(1);
    let (ready, is_ready) = oneshot::channel();
    let (commit, committed) = oneshot::channel();
    tokio::spawn(async move {
        if let Err(error) = take(socket, sender, is_ready, commit).await {
            tracing::error!(%error, "nothing was taken over from the predecessor, which goes on");
        }
    });
    Inheritance {
        parts,
        ready,
        committed,
    }
}

async fn take(
    socket: OwnedFd,
    parts: mpsc::Sender<lb::io::Part>,
    is_ready: oneshot::Receiver<()>,
    commit: oneshot::Sender<()>,
) -> Result<(), handover::Error> {
    let mut taker = Taker::begin(socket, Role::Lb.name()).await?;
    tracing::info!(build = taker.predecessor, "taking over from a predecessor");
    while let Some(Part { body, descriptors }) = taker.part().await? {
        let part = lb::io::Part { body, descriptors };
        if !matches!(timeout(handover::STEP, parts.send(part)).await, Ok(Ok(()))) {
            let why = "of the new one does not take the parts";
            taker.refuse(why).await;
            return Err(handover::Error::Service(why));
        }
    }
    drop(parts);
    if !matches!(timeout(handover::STEP, is_ready).await, Ok(Ok(()))) {
        let why = "of the new one cannot make sense of the parts";
        taker.refuse(why).await;
        return Err(handover::Error::Service(why));
    }
    taker.commit().await?;
    let _ = commit.send(());
    Ok(())
}

fn reload(service: Service, descriptors: Vec<OwnedFd>) -> anyhow::Result<(Box<lb::Config>, Opened)> {
    let loaded = load(&service.text)?;
    log::change(&loaded.config.log);
    let (_, listeners) = deal(&service, descriptors, 0)?;
    Ok((Box::new(loaded.config.lb), opened(service, listeners)))
}

fn opened(service: Service, sockets: Sockets) -> Opened {
    Opened {
        listeners: sockets
            .into_iter()
            .map(|(endpoint, copies)| (endpoint.address, copies))
            .collect(),
        files: service
            .files
            .into_iter()
            .map(|(path, Bytes(content))| (path, content))
            .collect(),
        resolv_conf: service.resolv_conf.0,
        hosts: service.hosts.0,
    }
}
