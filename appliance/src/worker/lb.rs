//! The `lb` worker: the supervisor's messages to the balancer's commands and back.

use std::{collections::BTreeMap, os::fd::OwnedFd, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use lb::io::{Command, Commit, Links, Opened};
use tokio::sync::{mpsc, oneshot};

use super::{FromWorker, Listeners, Service, Start, ToWorker, deal, load, message::Bytes};
use crate::{channel::Channel, log};

/// Runs the balancer until the supervisor says stop.
pub(super) async fn run(
    start: Start,
    config: lb::Config,
    descriptors: Vec<OwnedFd>,
    channel: Arc<Channel>,
    said: mpsc::Sender<FromWorker>,
) -> anyhow::Result<()> {
    let (mut state, listeners) = deal(&start.service, descriptors, usize::from(start.state))?;
    let opened = opened(start.service, listeners);
    let (commands, to_balancer) = mpsc::channel(64);
    let (commits, from_balancer) = mpsc::channel(64);
    let links = Links {
        commands: to_balancer,
        commits,
    };
    let serving = lb::io::run(config, opened, start.drains, state.pop(), start.threads, links, None);
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
        Stopped::Told => serving.await.context("the balancer ended while it was being stopped"),
        // Nobody is left to serve for; the kernel ends this process too.
        Stopped::Orphaned => Ok(()),
    }
}

enum Stopped {
    Told,
    Orphaned,
}

async fn converse(
    channel: Arc<Channel>,
    said: mpsc::Sender<FromWorker>,
    commands: mpsc::Sender<Command>,
    mut commits: mpsc::Receiver<Commit>,
) -> anyhow::Result<Stopped> {
    let (heard, mut hears) = mpsc::channel(16);
    // A task of its own, because a receive must not be cancelled half way.
    tokio::spawn(async move {
        loop {
            let received = channel.receive::<ToWorker>().await;
            let last = !matches!(received, Ok(Some(_)));
            if heard.send(received).await.is_err() || last {
                return;
            }
        }
    });
    let mut waiting: BTreeMap<u64, oneshot::Sender<Result<(), String>>> = BTreeMap::new();
    let mut next = 0;
    ask(&commands, Command::Ping, said.clone(), |()| FromWorker::Ready).await;
    loop {
        tokio::select! {
            received = hears.recv() => {
                let Some((message, descriptors)) = received.transpose()?.flatten() else { return Ok(Stopped::Orphaned) };
                match message {
                    ToWorker::Ping { id } => ask(&commands, Command::Ping, said.clone(), move |()| FromWorker::Pong { id }).await,
                    ToWorker::Ask { id, request } => {
                        let command = |reply| Command::Ask { request, reply };
                        ask(&commands, command, said.clone(), move |answer| FromWorker::Answer { id, answer: Box::new(answer) }).await;
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
                    ToWorker::Stop { grace_ms } => {
                        let _ = commands.send(Command::Stop { grace: Duration::from_millis(grace_ms) }).await;
                        return Ok(Stopped::Told);
                    }
                    ToWorker::Start(_) | ToWorker::Metrics { .. } => bail!("the supervisor said what is not for the balancer"),
                }
            }
            Some(Commit { drain, set, done }) = commits.recv() => {
                next += 1;
                waiting.insert(next, done);
                let _ = said.send(FromWorker::Commit { id: next, drain, set }).await;
            }
        }
    }
}

/// Gives the balancer a command and, when it answers, the supervisor the answer. Without an answer none is given: the
/// supervisor draws its own conclusions from silence.
async fn ask<T: Send + 'static>(
    commands: &mpsc::Sender<Command>,
    command: impl FnOnce(oneshot::Sender<T>) -> Command,
    said: mpsc::Sender<FromWorker>,
    answer: impl FnOnce(T) -> FromWorker + Send + 'static,
) {
    let (reply, replied) = oneshot::channel();
    let _ = commands.send(command(reply)).await;
    tokio::spawn(async move {
        if let Ok(value) = replied.await {
            let _ = said.send(answer(value)).await;
        }
    });
}

fn reload(service: Service, descriptors: Vec<OwnedFd>) -> anyhow::Result<(Box<lb::Config>, Opened)> {
    let loaded = load(&service.text)?;
    log::change(&loaded.config.log);
    let (_, listeners) = deal(&service, descriptors, 0)?;
    Ok((Box::new(loaded.config.lb), opened(service, listeners)))
}

fn opened(service: Service, listeners: Listeners) -> Opened {
    Opened {
        listeners,
        files: service
            .files
            .into_iter()
            .map(|(path, Bytes(content))| (path, content))
            .collect(),
        resolv_conf: service.resolv_conf.0,
        hosts: service.hosts.0,
    }
}
