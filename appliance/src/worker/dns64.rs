//! The `dns64` worker: the supervisor's messages to the resolver's commands and back.

use std::{cell::Cell, collections::BTreeMap, os::fd::OwnedFd, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use dns64::io::service::{self, Command, Commit, Links, Opened};
use tokio::sync::{mpsc, oneshot};

use super::{
    FromWorker, Service, Sockets, Start, ToWorker, ask, deal, hear, load,
    message::{Bytes, Durable, Question, Reply},
};
use crate::{channel::Channel, endpoint::Transport, log};

/// Runs the resolver until the supervisor says stop.
pub(super) async fn run(
    start: Start,
    config: dns64::Config,
    descriptors: Vec<OwnedFd>,
    channel: Arc<Channel>,
    said: mpsc::Sender<FromWorker>,
) -> anyhow::Result<()> {
    let (_, sockets) = deal(&start.service, descriptors, 0)?;
    let opened = opened(start.service, sockets);
    let (commands, to_service) = mpsc::channel(64);
    let (commits, from_service) = mpsc::channel(64);
    let links = Links {
        commands: to_service,
        commits,
        successor: start.successor,
    };
    let serving = service::run(Box::new(config), opened, start.dns64, links);
    let mut serving = std::pin::pin!(serving);
    let told_to_stop = Cell::new(false);
    let conversation = converse(channel, said, commands, from_service, &told_to_stop);
    let mut conversation = std::pin::pin!(conversation);
    // Both on this task: the resolver's end is the worker's, and a channel that fails is too.
    tokio::select! {
        ended = serving.as_mut() => {
            ended.context("the resolver ended")?;
            if !told_to_stop.get() {
                bail!("the resolver ended without being told to");
            }
            Ok(())
        }
        // Nobody is left to serve for.
        result = conversation.as_mut() => result,
    }
}

/// Talks until the supervisor is gone: also after it has said stop, since what is on its way to the disk then wants its answer.
async fn converse(
    channel: Arc<Channel>,
    said: mpsc::Sender<FromWorker>,
    commands: mpsc::Sender<Command>,
    mut commits: mpsc::Receiver<Commit>,
    told_to_stop: &Cell<bool>,
) -> anyhow::Result<()> {
    let mut hears = hear(channel);
    let mut waiting: BTreeMap<u64, oneshot::Sender<Result<(), String>>> = BTreeMap::new();
    let mut next = 0;
    ask(&commands, Command::Ping, said.clone(), |()| FromWorker::Ready).await;
    loop {
        tokio::select! {
            received = hears.recv() => {
                let Some((message, descriptors)) = received.transpose()?.flatten() else { return Ok(()) };
                match message {
                    ToWorker::Ping { id } => ask(&commands, Command::Ping, said.clone(), move |()| FromWorker::Pong { id }).await,
                    ToWorker::Ask { id, question: Question::Dns64(request) } => {
                        let command = |reply| Command::Ask { request, reply };
                        let answer = move |answer| FromWorker::Answer { id, reply: Reply::Dns64(Box::new(answer)) };
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
                    ToWorker::Learn { durable } => match *durable {
                        Durable::Dns64(durable) => drop(commands.send(Command::Learn(durable)).await),
                        Durable::Drain { .. } => bail!("the supervisor said what is not for the resolver"),
                    },
                    ToWorker::Own => drop(commands.send(Command::Own).await),
                    ToWorker::Stop { grace_ms } => {
                        told_to_stop.set(true);
                        let _ = commands.send(Command::Stop { grace: Duration::from_millis(grace_ms) }).await;
                    }
                    ToWorker::Start(_) | ToWorker::Metrics { .. } | ToWorker::HandOver { .. } | ToWorker::Ask { .. } => {
                        bail!("the supervisor said what is not for the resolver")
                    }
                }
            }
            Some(Commit { durable, done }) = commits.recv() => {
                next += 1;
                waiting.insert(next, done);
                let durable = Box::new(Durable::Dns64(Box::new(durable)));
                let _ = said.send(FromWorker::Commit { id: next, durable }).await;
            }
        }
    }
}

fn reload(service: Service, descriptors: Vec<OwnedFd>) -> anyhow::Result<(Box<dns64::Config>, Opened)> {
    let loaded = load(&service.text)?;
    log::change(&loaded.config.log);
    let (_, sockets) = deal(&service, descriptors, 0)?;
    let config = loaded
        .config
        .dns64
        .context("the configuration has no [dns64] section")?;
    Ok((Box::new(config), opened(service, sockets)))
}

fn opened(service: Service, sockets: Sockets) -> Opened {
    let (udp, tcp): (Sockets, Sockets) = sockets
        .into_iter()
        .partition(|(endpoint, _)| endpoint.transport == Transport::Udp);
    let by_address = |sockets: Sockets| {
        let sockets = sockets.into_iter();
        sockets.map(|(endpoint, copies)| (endpoint.address, copies)).collect()
    };
    Opened {
        datagrams: by_address(udp),
        listeners: by_address(tcp),
        files: service
            .files
            .into_iter()
            .map(|(path, Bytes(content))| (path, content))
            .collect(),
    }
}
