//! The `web` worker: the metrics page, whose content it asks the supervisor for.

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::{Context, bail};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
};
use tokio_util::sync::CancellationToken;

use super::{FromWorker, Start, ToWorker, deal};
use crate::channel::Channel;

/// Questions that wait for the supervisor.
type Waiting = Arc<Mutex<BTreeMap<u64, oneshot::Sender<Result<String, String>>>>>;

/// Serves until the supervisor says stop.
pub(super) async fn run(
    start: Start,
    descriptors: Vec<OwnedFd>,
    channel: Arc<Channel>,
    said: mpsc::Sender<FromWorker>,
) -> anyhow::Result<()> {
    let (_, passed) = deal(&start.service, descriptors, 0)?;
    let mut listeners = Vec::new();
    for descriptor in passed.into_iter().flat_map(|(_, descriptors)| descriptors) {
        listeners.push(TcpListener::from_std(descriptor.into()).context("a passed listener cannot be polled")?);
    }
    let waiting = Waiting::default();
    let shutdown = CancellationToken::new();
    let ask = asker(said.clone(), Arc::clone(&waiting));
    let serving = tokio::spawn(crate::web::run(
        listeners,
        start.token.map(|token| token.0),
        ask,
        shutdown.clone(),
    ));
    said.send(FromWorker::Ready).await.context("nobody listens")?;
    while let Some((message, _)) = channel.receive::<ToWorker>().await? {
        match message {
            ToWorker::Ping { id } => said.send(FromWorker::Pong { id }).await.context("nobody listens")?,
            ToWorker::Metrics { id, result } => {
                let asked = waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                if let Some(asked) = asked {
                    let _ = asked.send(result);
                }
            }
            ToWorker::Stop { .. } => break,
            _ => bail!("the supervisor said what is not for the metrics page"),
        }
    }
    shutdown.cancel();
    serving.await.context("the metrics page ended badly")
}

/// The way from the service to the supervisor: a question with a number, and its answer.
fn asker(said: mpsc::Sender<FromWorker>, waiting: Waiting) -> impl crate::web::Ask {
    let next = Arc::new(AtomicU64::new(0));
    move || {
        let (said, waiting, id) = (said.clone(), Arc::clone(&waiting), next.fetch_add(1, Ordering::Relaxed));
        async move {
            let (reply, replied) = oneshot::channel();
            waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(id, reply);
            said.send(FromWorker::Metrics { id })
                .await
                .map_err(|_| "the supervisor has ended".to_owned())?;
            replied.await.map_err(|_| "the supervisor gave no answer".to_owned())?
        }
    }
}
