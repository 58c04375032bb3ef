//! The translator as one running service: threads on the queues of a TUN device, and what they are told.

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::sync::{mpsc, oneshot};

use super::tun::{self, Counts, Device, Threads, Way};
use crate::nat64::{
    Config, DropReason, MapError, Stateless, Translator,
    status::{Answer, Offloads, Request, Status},
};

/// What the service is told.
#[derive(Debug)]
pub enum Command {
    /// Answered if all is well.
    Ping(oneshot::Sender<()>),
    /// A question from the control socket.
    Ask {
        /// What is asked.
        request: Request,
        /// Where the answer goes.
        reply: oneshot::Sender<Answer>,
    },
    /// Another configuration.
    Reload {
        /// What is to run.
        config: Box<Config>,
        /// Another device, if it is to be one.
        device: Option<Device>,
        /// Done, or why not; then nothing was changed.
        done: oneshot::Sender<Result<(), String>>,
    },
    /// End.
    Stop,
}

/// Why the service cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A thread or a descriptor that the kernel does not give.
    #[error("no thread for the device \"{name}\" can be started")]
    Start {
        /// The device.
        name: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The configuration passed every check and still makes no translator.
    #[error(transparent)]
    Config(#[from] MapError),
    /// No randomness, without which identifications could be guessed.
    #[error("the kernel gives no random numbers")]
    Random(#[source] std::io::Error),
    /// A thread that translates has ended.
    #[error("a thread that translates has ended")]
    Thread,
}

/// Runs the service until it is told to stop, or nobody is left to tell it.
///
/// # Errors
///
/// [`Error`]: what a restart may cure.
pub async fn run(config: Box<Config>, device: Device, mut commands: mpsc::Receiver<Command>) -> Result<(), Error> {
    let mut service = Service::new(config, device)?;
    let mut look = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            command = commands.recv() => match command {
                Some(Command::Ping(reply)) => drop(reply.send(())),
                Some(Command::Ask { request: Request::Status, reply }) => {
                    let _ = reply.send(Answer::Status(Box::new(service.status())));
                }
                Some(Command::Reload { config, device, done }) => {
                    let _ = done.send(service.reload(config, device).map_err(|error| error.to_string()));
                }
                Some(Command::Stop) => {
                    let _ = service.threads.stop();
                    return Ok(());
                }
                None => return Ok(()),
            },
            _ = look.tick() => if !service.threads.alive() { return Err(Error::Thread) },
        }
    }
}

struct Service {
    config: Box<Config>,
    way: Arc<ArcSwap<Way<Stateless>>>,
    threads: Threads,
    queues: usize,
    offloads: Offloads,
    /// Counts of threads that have been stopped.
    before: Counts,
}

impl Service {
    fn new(config: Box<Config>, device: Device) -> Result<Self, Error> {
        let way = Arc::new(ArcSwap::from_pointee(stateless(&config)?));
        let (queues, offloads) = (device.queues.len(), device.offloads);
        let threads = start(&config, device.queues, &way)?;
        Ok(Self {
            config,
            way,
            threads,
            queues,
            offloads,
            before: Counts::default(),
        })
    }

    /// All of the new configuration, or nothing of it.
    fn reload(&mut self, config: Box<Config>, device: Option<Device>) -> Result<(), Error> {
        let Some(device) = device else {
            self.way.store(Arc::new(stateless(&config)?));
            self.config = config;
            return Ok(());
        };
        let Self {
            threads: old, before, ..
        } = std::mem::replace(self, Self::new(config, device)?);
        self.before = before.plus(old.stop());
        Ok(())
    }

    fn status(&self) -> Status {
        let counts = self.before.plus(self.threads.counts());
        Status {
            mode: "stateless".into(),
            prefix: self.config.prefix().map(|prefix| prefix.to_string()),
            maps: self.config.maps.len() as u64,
            device: self.config.device().to_owned(),
            queues: self.queues as u64,
            offloads: self.offloads,
            ipv4: counts.ipv4,
            ipv6: counts.ipv6,
            super_packets: counts.super_packets,
            unsent: counts.unsent,
            dropped: DropReason::ALL
                .iter()
                .zip(counts.dropped)
                .map(|(reason, count)| (reason.as_str().to_owned(), count))
                .collect(),
        }
    }
}

fn start(config: &Config, queues: Vec<OwnedFd>, way: &Arc<ArcSwap<Way<Stateless>>>) -> Result<Threads, Error> {
    tun::start(queues.into_iter().map(Arc::new).collect(), way).map_err(|source| Error::Start {
        name: config.device().to_owned(),
        source,
    })
}

/// Address by address: every thread has its own copy, which it only reads.
fn stateless(config: &Config) -> Result<Way<Stateless>, Error> {
    let mapper = config.stateless()?;
    Ok(Way {
        translator: Translator::new(config.settings(), seed()?),
        mapper: Box::new(move |_| mapper.clone()),
    })
}

fn seed() -> Result<[u64; 2], Error> {
    let mut octets = [0; 16];
    let filled = getrandom(&mut octets, GetRandomFlags::empty()).map_err(|errno| Error::Random(errno.into()))?;
    if filled != octets.len() {
        return Err(Error::Random(std::io::ErrorKind::UnexpectedEof.into()));
    }
    let (words, _) = octets.as_chunks::<8>();
    Ok(std::array::from_fn(|at| {
        words.get(at).map_or(0, |word| u64::from_ne_bytes(*word))
    }))
}
