//! The `nat64` worker: the supervisor's messages to the translator's commands and back.

use std::{cell::Cell, os::fd::OwnedFd, sync::Arc};

use anyhow::{Context, bail};
use dns64::{
    io::{
        nat64::{self, Command},
        tun::Device,
    },
    nat64::Config,
};
use tokio::sync::mpsc;

use super::{
    FromWorker, Service, Start, ToWorker, ask, deal, hear, load,
    message::{Question, Reply},
};
use crate::{channel::Channel, log};

/// Runs the translator until the supervisor says stop.
pub(super) async fn run(
    start: Start,
    config: Config,
    descriptors: Vec<OwnedFd>,
    channel: Arc<Channel>,
    said: mpsc::Sender<FromWorker>,
) -> anyhow::Result<()> {
    let device = device(&start.service, descriptors)?.context("the supervisor passed no TUN device")?;
    let (own, waits) = (start.service.addresses, start.successor);
    let (commands, to_service) = mpsc::channel(64);
    let serving = nat64::run(Box::new(config), device, own, waits, to_service);
    let mut serving = std::pin::pin!(serving);
    let told_to_stop = Cell::new(false);
    let conversation = converse(channel, said, commands, &told_to_stop);
    let mut conversation = std::pin::pin!(conversation);
    // Both on this task: the translator's end is the worker's, and a channel that fails is too.
    tokio::select! {
        ended = serving.as_mut() => {
            ended.context("the translator ended")?;
            if !told_to_stop.get() {
                bail!("the translator ended without being told to");
            }
            Ok(())
        }
        // Nobody is left to serve for.
        result = conversation.as_mut() => result,
    }
}

async fn converse(
    channel: Arc<Channel>,
    said: mpsc::Sender<FromWorker>,
    commands: mpsc::Sender<Command>,
    told_to_stop: &Cell<bool>,
) -> anyhow::Result<()> {
    let mut hears = hear(channel);
    ask(&commands, Command::Ping, said.clone(), |()| FromWorker::Ready).await;
    loop {
        let Some((message, descriptors)) = hears.recv().await.transpose()?.flatten() else {
            return Ok(());
        };
        match message {
            ToWorker::Ping { id } => {
                ask(&commands, Command::Ping, said.clone(), move |()| FromWorker::Pong {
                    id,
                })
                .await;
            }
            ToWorker::Ask {
                id,
                question: Question::Nat64(request),
            } => {
                let command = |reply| Command::Ask { request, reply };
                let answer = move |answer| FromWorker::Answer {
                    id,
                    reply: Reply::Nat64(Box::new(answer)),
                };
                ask(&commands, command, said.clone(), answer).await;
            }
            ToWorker::Reload { id, service } => {
                let loaded = load(&service.text)?;
                log::change(&loaded.config.log);
                let config = loaded
                    .config
                    .nat64
                    .context("the configuration has no [nat64] section")?;
                let device = device(&service, descriptors)?;
                let command = |done| Command::Reload {
                    config: Box::new(config),
                    device,
                    own: service.addresses,
                    done,
                };
                let answer = move |result| FromWorker::Reloaded { id, result };
                ask(&commands, command, said.clone(), answer).await;
            }
            ToWorker::Own => drop(commands.send(Command::Own).await),
            // Packets on their way are not waited for.
            ToWorker::Stop { .. } => {
                told_to_stop.set(true);
                let _ = commands.send(Command::Stop).await;
            }
            _ => bail!("the supervisor said what is not for the translator"),
        }
    }
}

/// The device, if one was passed.
fn device(service: &Service, descriptors: Vec<OwnedFd>) -> anyhow::Result<Option<Device>> {
    // Its memory is the last.
    let count = service.tun.map_or(0, |tun| usize::from(tun.queues) + 1);
    let (mut queues, _) = deal(service, descriptors, count)?;
    let memory = queues.pop();
    Ok(service.tun.map(|tun| Device {
        queues,
        offloads: tun.offloads,
        memory,
    }))
}
