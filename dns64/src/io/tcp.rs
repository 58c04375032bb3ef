//! Queries over TCP: many on one connection, answered as soon as each is known (RFC 7766), within bounds (RFC 9210).

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::udp;
use crate::{
    front::{Front, Transport, Verdict},
    query::{MOST_TCP, Terms},
    status::Tcp as Counts,
};

/// Connections at a time, of one address, and of all together who may not ask.
const MOST: usize = 512;
const OF_A_SOURCE: usize = 32;
const OF_STRANGERS: usize = 64;
/// A connection without a message is closed after this time; at once, when few places are left (RFC 7766 §6.2.3).
const IDLE: Duration = Duration::from_secs(15);
const FEW: usize = MOST / 4;
/// How often that is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// For a message that has begun, and for a client to take its answers.
const STEP: Duration = Duration::from_secs(5);
/// Questions of one connection under way.
const UNDER_WAY: usize = 64;

/// A message by TCP that somebody waits to have answered.
pub(super) struct Ask {
    pub(super) message: Vec<u8>,
    pub(super) client: SocketAddr,
    pub(super) terms: Terms,
    answers: mpsc::Sender<Reply>,
    place: OwnedSemaphorePermit,
}

/// A whole message, and the place among those under way that it gives back when it is written.
type Reply = (Vec<u8>, OwnedSemaphorePermit);

impl Ask {
    /// Sends a whole message; an empty one is none.
    pub(super) async fn reply(self, octets: Vec<u8>) {
        if !octets.is_empty() {
            // Who asked may have gone.
            let _ = self.answers.send((octets, self.place)).await;
        }
    }
}

/// What the listeners share.
pub(super) struct Shared {
    front: Arc<ArcSwap<Front>>,
    work: mpsc::Sender<Ask>,
    places: Arc<Semaphore>,
    sources: Mutex<HashMap<IpAddr, usize>>,
    accepted: AtomicU64,
    turned_away: AtomicU64,
    received: AtomicU64,
    denied: AtomicU64,
}

impl Shared {
    pub(super) fn new(front: Arc<ArcSwap<Front>>, work: mpsc::Sender<Ask>) -> Arc<Self> {
        Arc::new(Self {
            front,
            work,
            places: Arc::new(Semaphore::new(MOST)),
            sources: Mutex::default(),
            accepted: AtomicU64::new(0),
            turned_away: AtomicU64::new(0),
            received: AtomicU64::new(0),
            denied: AtomicU64::new(0),
        })
    }

    pub(super) fn counts(&self) -> Counts {
        let open: usize = self
            .sources
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .sum();
        Counts {
            open: open as u64,
            accepted: self.accepted.load(Relaxed),
            turned_away: self.turned_away.load(Relaxed),
            received: self.received.load(Relaxed),
            denied: self.denied.load(Relaxed),
        }
    }

    /// A place for one more connection; dropping it gives it back.
    fn place(self: &Arc<Self>, client: IpAddr) -> Option<Place> {
        let (source, most) = if self.front.load().access.allows(client) {
            // Not those of a network: all nodes are in one.
            (client.to_canonical(), OF_A_SOURCE)
        } else {
            // However many addresses strangers have, they leave places to others.
            (Ipv6Addr::UNSPECIFIED.into(), OF_STRANGERS)
        };
        let among_all = Arc::clone(&self.places).try_acquire_owned().ok()?;
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let count = sources.entry(source).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Place {
            shared: Arc::clone(self),
            source,
            _among_all: among_all,
        })
    }

    /// Waits until every connection has ended, and so has written its answers. They end when their listeners are stopped.
    pub(super) async fn written(&self) {
        // It fails only if it is closed, which it never is.
        let _ = self.places.acquire_many(MOST as u32).await;
    }
}

struct Place {
    shared: Arc<Shared>,
    source: IpAddr,
    _among_all: OwnedSemaphorePermit,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut sources = self.shared.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = sources.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                sources.remove(&self.source);
            }
        }
    }
}

/// Accepts until `stop`; connections that are open then read no more, and end with their last answer.
pub(super) async fn serve(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        let (stream, client) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors: the listener stays readable, so wait instead of spinning.
                tracing::warn!(%error, "a DNS connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(place) = shared.place(client.ip()) else {
            shared.turned_away.fetch_add(1, Relaxed);
            continue;
        };
        shared.accepted.fetch_add(1, Relaxed);
        let (shared, stop) = (Arc::clone(&shared), stop.clone());
        tokio::spawn(async move {
            // How it ends is the client's business.
            let _ = connection(stream, client, shared, stop).await;
            drop(place);
        });
    }
}

/// One connection to its end: whichever side ends it, what was asked is answered first.
async fn connection(
    stream: TcpStream,
    client: SocketAddr,
    shared: Arc<Shared>,
    stop: CancellationToken,
) -> std::io::Result<()> {
    // Answers are whole messages: none waits for another.
    stream.set_nodelay(true)?;
    let (from, to) = stream.into_split();
    let (answers, ready) = mpsc::channel::<Reply>(UNDER_WAY);
    let writing = tokio::spawn(write(to, ready));
    let result = tokio::select! {
        result = read(from, client, &shared, answers) => result,
        () = stop.cancelled() => Ok(()),
    };
    // It ends when nobody is left who could answer, or the client does not take what it asked for.
    let _ = writing.await;
    result
}

async fn write(mut to: OwnedWriteHalf, mut ready: mpsc::Receiver<Reply>) {
    while let Some((answer, _place)) = ready.recv().await {
        let length = u16::try_from(answer.len()).unwrap_or(u16::MAX);
        // One write, so that the length does not travel alone.
        let mut octets = Vec::with_capacity(answer.len() + 2);
        octets.extend(length.to_be_bytes());
        octets.extend(answer);
        let written = timeout(STEP, to.write_all(&octets)).await;
        if !matches!(written, Ok(Ok(()))) {
            return;
        }
    }
}

/// Reads queries until there are no more.
async fn read(
    mut from: OwnedReadHalf,
    client: SocketAddr,
    shared: &Shared,
    answers: mpsc::Sender<Reply>,
) -> std::io::Result<()> {
    let under_way = Arc::new(Semaphore::new(UNDER_WAY));
    let mut out = vec![0; MOST_TCP];
    loop {
        let length = length(&mut from, shared).await?;
        let mut message = vec![0; usize::from(length)];
        timeout(STEP, from.read_exact(&mut message)).await??;
        shared.received.fetch_add(1, Relaxed);
        let Ok(place) = Arc::clone(&under_way).acquire_owned().await else {
            return Ok(());
        };
        let front = shared.front.load_full();
        let turn = front.turn(udp::now(), udp::wall());
        let allowed = front.access.allows(client.ip());
        match front.look(&turn, Transport::Tcp, &message, client.ip(), &mut out) {
            Verdict::Reply { length, .. } => {
                let octets = out.get(..length).unwrap_or_default().to_vec();
                if answers.send((octets, place)).await.is_err() {
                    return Ok(());
                }
            }
            Verdict::Ask(terms) => {
                let ask = Ask {
                    message,
                    client,
                    terms,
                    answers: answers.clone(),
                    place,
                };
                if shared.work.send(ask).await.is_err() {
                    return Ok(());
                }
            }
            // A stranger, or one that talks something else: it has no business here.
            Verdict::Silence(_) => return Ok(()),
        }
        if !allowed {
            shared.denied.fetch_add(1, Relaxed);
            return Ok(());
        }
    }
}

/// The length of the next message.
///
/// # Errors
///
/// There is none, or it does not come in time.
async fn length(from: &mut OwnedReadHalf, shared: &Shared) -> io::Result<u16> {
    let (mut octets, mut got) = ([0; 2], 0);
    let mut waited = Duration::ZERO;
    while let Some(rest) = octets.get_mut(got..).filter(|rest| !rest.is_empty()) {
        if timeout(LOOK, from.readable()).await.is_err() {
            waited += LOOK;
            if waited >= IDLE || shared.places.available_permits() < FEW {
                return Err(io::ErrorKind::TimedOut.into());
            }
            continue;
        }
        match from.try_read(rest) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => got += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(u16::from_be_bytes(octets))
}
