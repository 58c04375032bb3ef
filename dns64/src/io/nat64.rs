//! The translator as one running service: threads on the queues of a TUN device, and what they are told.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU64},
    time::Duration,
};

use arc_swap::ArcSwap;
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::sync::{mpsc, oneshot};

use super::{
    memory,
    tun::{self, Counts, Device, Threads, Way, milliseconds},
};
use crate::nat64::{
    Config, DropReason, Ends, Exit, Flow, FragmentLimits, Fragments, MapError, Mapper, Mode, Quotation, Refusal,
    Stateless, Translator,
    state::{Probe, Protocol, Stateful, Table, probe},
    status::{Answer, Offloads, PortStatus, Request, SessionStatus, Status},
    vnet,
};

/// Sessions that end before a packet may pass again.
const AT_ONCE: usize = 256;

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
        /// The machine's own IPv4 addresses.
        own: Vec<Ipv4Addr>,
        /// Done, or why not; then nothing was changed.
        done: oneshot::Sender<Result<(), String>>,
    },
    /// The predecessor has ended: what it held is this one's.
    Own,
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
    /// Sessions have nowhere to be.
    #[error("the memory for sessions cannot be used")]
    Memory(#[source] std::io::Error),
    /// No randomness, without which identifications could be guessed.
    #[error("the kernel gives no random numbers")]
    Random(#[source] std::io::Error),
    /// A thread that translates has ended.
    #[error("a thread that translates has ended")]
    Thread,
}

/// Runs the service until it is told to stop, or nobody is left to tell it. If it `waits`, no packet is taken before
/// [`Command::Own`]: a predecessor still works with the same sessions. `own` are the machine's IPv4 addresses.
///
/// # Errors
///
/// [`Error`]: what a restart may cure.
pub async fn run(
    config: Box<Config>,
    device: Device,
    own: Vec<Ipv4Addr>,
    waits: bool,
    mut commands: mpsc::Receiver<Command>,
) -> Result<(), Error> {
    let mut next = Some((config, device, own));
    let mut service = None;
    let mut look = tokio::time::interval(Duration::from_secs(1));
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    if !waits && let Some((config, device, own)) = next.take() {
        service = Some(Service::new(config, device, own)?);
    }
    loop {
        tokio::select! {
            command = commands.recv() => match command {
                Some(Command::Ping(reply)) => drop(reply.send(())),
                Some(Command::Ask { request, reply }) => {
                    if let Some(service) = &service {
                        let _ = reply.send(service.answer(request));
                    }
                }
                Some(Command::Reload { config, device, own, done }) => {
                    let result = match &mut service {
                        Some(service) => service.reload(config, device, own).map_err(|error| error.to_string()),
                        None => Err("it has not taken over from its predecessor yet".into()),
                    };
                    let _ = done.send(result);
                }
                Some(Command::Own) => if let Some((config, device, own)) = next.take() {
                    service = Some(Service::new(config, device, own)?);
                },
                Some(Command::Stop) => {
                    if let Some(service) = service {
                        let _ = service.threads.stop();
                    }
                    return Ok(());
                }
                None => return Ok(()),
            },
            _ = look.tick() => if let Some(service) = &mut service {
                if !service.threads.alive() {
                    return Err(Error::Thread);
                }
                service.expire();
            },
        }
    }
}

/// By what packets are translated, in either mode.
#[derive(Clone, Debug)]
enum Kind {
    Stateless(Stateless),
    Stateful(Stateful),
}

struct Service {
    config: Box<Config>,
    way: Arc<ArcSwap<Way<Kind>>>,
    threads: Threads,
    queues: usize,
    offloads: Offloads,
    /// Counts of threads that have been stopped.
    before: Counts,
    /// Where sessions are, if the device came with memory for them.
    memory: Option<&'static [AtomicU64]>,
    sessions: Option<Arc<Mutex<Table>>>,
    /// One queue more, for packets that are made here.
    queue: Arc<OwnedFd>,
}

impl Service {
    fn new(config: Box<Config>, device: Device, own: Vec<Ipv4Addr>) -> Result<Self, Error> {
        let memory = device.memory.map(memory::words).transpose().map_err(Error::Memory)?;
        let sessions = table(&config, memory, own)?.map(|table| Arc::new(Mutex::new(table)));
        let way = Arc::new(ArcSwap::from_pointee(way(&config, sessions.as_ref())?));
        let (count, offloads) = (device.queues.len(), device.offloads);
        let queues: Vec<Arc<OwnedFd>> = device.queues.into_iter().map(Arc::new).collect();
        let failed = |source| Error::Start {
            name: config.device().to_owned(),
            source,
        };
        let queue = queues
            .first()
            .cloned()
            .ok_or_else(|| failed(std::io::ErrorKind::NotFound.into()))?;
        let threads = tun::start(queues, &way).map_err(failed)?;
        Ok(Self {
            config,
            way,
            threads,
            queues: count,
            offloads,
            before: Counts::default(),
            memory,
            sessions,
            queue,
        })
    }

    /// All of the new configuration, or nothing of it.
    fn reload(&mut self, config: Box<Config>, device: Option<Device>, own: Vec<Ipv4Addr>) -> Result<(), Error> {
        if let Some(device) = device {
            let Self {
                threads: old, before, ..
            } = std::mem::replace(self, Self::new(config, device, own)?);
            self.before = before.plus(old.stop());
            return Ok(());
        }
        match (&self.sessions, config.mode.value) {
            (Some(sessions), Mode::Stateful) => {
                // Made from the same memory while no packet uses it: what goes on being allowed lives on.
                let mut now = lock(sessions);
                if let Some(next) = table(&config, self.memory, own)? {
                    *now = next;
                }
            }
            _ => self.sessions = table(&config, self.memory, own)?.map(|table| Arc::new(Mutex::new(table))),
        }
        self.way.store(Arc::new(way(&config, self.sessions.as_ref())?));
        self.config = config;
        Ok(())
    }

    /// Ends sessions whose time has come, and asks hosts about those that may have been forgotten.
    fn expire(&self) {
        let (Some(sessions), Some(prefix)) = (&self.sessions, self.config.prefix()) else {
            return;
        };
        let now = milliseconds();
        let mut probes = Vec::new();
        while lock(sessions).expire(now, AT_ONCE, |probe| probes.push(probe)) {}
        for asked in probes {
            let mut octets = [0; vnet::LENGTH + probe::LENGTH];
            if let Some(packet) = octets.get_mut(vnet::LENGTH..) {
                packet.copy_from_slice(&Probe::packet(&asked, prefix));
            }
            // If the device does not take it, the session ends four minutes later all the same.
            let _ = rustix::io::write(&*self.queue, &octets);
        }
    }

    fn answer(&self, request: Request) -> Answer {
        match request {
            Request::Status => Answer::Status(Box::new(self.status())),
            Request::Sessions { from, most } => {
                let mut sessions = Vec::new();
                let next = self.sessions.as_ref().and_then(|table| {
                    let most = most.min(10_000);
                    lock(table).sessions(milliseconds(), from, most, |session| {
                        sessions.push(SessionStatus::of(&session))
                    })
                });
                Answer::Sessions { sessions, next }
            }
        }
    }

    fn status(&self) -> Status {
        let counts = self.before.plus(self.threads.counts());
        let table = self.sessions.as_deref().map(lock);
        let state = table.as_ref().map(|table| table.counts());
        let ports = table.iter().flat_map(|table| {
            let all = table
                .addresses()
                .iter()
                .flat_map(|address| Protocol::ALL.map(|protocol| (*address, protocol)));
            all.filter_map(|(address, protocol)| {
                let (free, all) = table.free_ports(address, protocol)?;
                Some(PortStatus {
                    address,
                    protocol: protocol.as_str().into(),
                    free: free as u64,
                    all: all as u64,
                })
            })
        });
        Status {
            mode: self.config.mode.as_str().into(),
            prefix: self.config.prefix().map(|prefix| prefix.to_string()),
            maps: self.config.maps.len() as u64,
            device: self.config.device().to_owned(),
            queues: self.queues as u64,
            offloads: self.offloads,
            ipv4: counts.ipv4,
            ipv6: counts.ipv6,
            super_packets: counts.super_packets,
            unsent: counts.unsent,
            state: state.map(Into::into),
            pool: ports.collect(),
            dropped: DropReason::ALL
                .iter()
                .zip(counts.dropped)
                .map(|(reason, count)| (reason.as_str().to_owned(), count))
                .collect(),
        }
    }
}

/// A panic with the lock held ends the process.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn way(config: &Config, sessions: Option<&Arc<Mutex<Table>>>) -> Result<Way<Kind>, Error> {
    let translator = Translator::new(config.settings(), seed()?);
    Ok(match sessions {
        Some(sessions) => {
            let mapper = Stateful::new(Arc::clone(sessions), milliseconds());
            Way {
                translator,
                mapper: Box::new(move |_| Kind::Stateful(mapper.clone())),
                fragments: Some(Arc::new(Mutex::new(Fragments::new(FragmentLimits::default(), seed()?)))),
            }
        }
        // Address by address: every thread has its own copy, which it only reads.
        None => {
            let mapper = config.stateless()?;
            Way {
                translator,
                mapper: Box::new(move |_| Kind::Stateless(mapper.clone())),
                fragments: None,
            }
        }
    })
}

/// The table of sessions over `memory`, if there are to be any.
fn table(config: &Config, memory: Option<&'static [AtomicU64]>, own: Vec<Ipv4Addr>) -> Result<Option<Table>, Error> {
    let Some(policy) = config.policy(own) else {
        return Ok(None);
    };
    let missing = || Error::Memory(std::io::ErrorKind::NotFound.into());
    let memory = memory.ok_or_else(missing)?;
    // Each session may have a binding of its own.
    let most = Table::fits(memory.len());
    let table = Table::new(policy, memory, most, most, seed()?, milliseconds());
    Ok(Some(table.ok_or_else(missing)?))
}

impl Mapper for Kind {
    fn tick(&mut self, now: u64) {
        match self {
            Self::Stateless(mapper) => mapper.tick(now),
            Self::Stateful(mapper) => mapper.tick(now),
        }
    }

    fn knows_v4(&self, flow: &Flow<Ipv4Addr>) -> bool {
        match self {
            Self::Stateless(mapper) => mapper.knows_v4(flow),
            Self::Stateful(mapper) => mapper.knows_v4(flow),
        }
    }

    fn knows_v6(&self, flow: &Flow<Ipv6Addr>) -> bool {
        match self {
            Self::Stateless(mapper) => mapper.knows_v6(flow),
            Self::Stateful(mapper) => mapper.knows_v6(flow),
        }
    }

    fn to_v4(&mut self, flow: &Flow<Ipv6Addr>) -> Result<Exit<Ends<Ipv4Addr>, Ends<Ipv6Addr>>, Refusal> {
        match self {
            Self::Stateless(mapper) => mapper.to_v4(flow),
            Self::Stateful(mapper) => mapper.to_v4(flow),
        }
    }

    fn to_v6(&mut self, flow: &Flow<Ipv4Addr>) -> Result<Ends<Ipv6Addr>, Refusal> {
        match self {
            Self::Stateless(mapper) => mapper.to_v6(flow),
            Self::Stateful(mapper) => mapper.to_v6(flow),
        }
    }

    fn error_to_v4(
        &mut self,
        source: Ipv6Addr,
        destination: Ipv6Addr,
        flow: &Flow<Ipv6Addr>,
    ) -> Result<Exit<Quotation<Ipv4Addr>, Quotation<Ipv6Addr>>, Refusal> {
        match self {
            Self::Stateless(mapper) => mapper.error_to_v4(source, destination, flow),
            Self::Stateful(mapper) => mapper.error_to_v4(source, destination, flow),
        }
    }

    fn error_to_v6(
        &mut self,
        source: Ipv4Addr,
        destination: Ipv4Addr,
        flow: &Flow<Ipv4Addr>,
    ) -> Result<Quotation<Ipv6Addr>, Refusal> {
        match self {
            Self::Stateless(mapper) => mapper.error_to_v6(source, destination, flow),
            Self::Stateful(mapper) => mapper.error_to_v6(source, destination, flow),
        }
    }
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
