//! Connections to upstreams: TCP, and TLS with the server's name verified. Many questions share one.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{
            AtomicU64, AtomicUsize,
            Ordering::{AcqRel, Acquire, Relaxed},
        },
    },
    time::Duration,
};

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    sync::{
        mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
        oneshot,
    },
    time::{Instant, sleep_until, timeout},
};
use tokio_rustls::TlsConnector;

use super::lock;
use crate::upstream::{
    inquiry::Outcome,
    pending::{Mismatches, Pipeline},
    wire::{Mismatch, Sent},
};

/// Questions on a connection beyond which another one is opened.
pub(super) const BUSY: usize = 64;
/// Questions on a connection beyond which there is no room.
pub(super) const FULL: usize = 1024;
/// How long the handshakes may take.
const CONNECT: Duration = Duration::from_secs(3);
/// Octets that are read at once.
const CHUNK: usize = 4096;

/// Where connections lead.
#[derive(Debug)]
pub(super) struct Target {
    address: SocketAddr,
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
    idle: Duration,
    mismatches: [AtomicU64; 4],
    last_error: Mutex<Option<String>>,
}

/// One connection, as whoever asks sees it. It is closed when this is dropped and nobody waits.
#[derive(Debug)]
pub(super) struct Connection {
    jobs: UnboundedSender<Job>,
    load: Arc<AtomicUsize>,
}

/// One query on its way to a connection.
#[derive(Debug)]
struct Job {
    sent: Sent,
    back: Back,
}

/// Whoever waits, counted until it has its answer.
#[derive(Debug)]
struct Back {
    to: oneshot::Sender<Outcome>,
    load: Load,
}

#[derive(Debug)]
struct Load(Arc<AtomicUsize>);

impl Drop for Load {
    fn drop(&mut self) {
        self.0.fetch_sub(1, AcqRel);
    }
}

impl Back {
    fn send(self, outcome: Outcome) {
        drop(self.load);
        // Whoever asked may have its answer from somewhere else.
        let _ = self.to.send(outcome);
    }
}

impl Target {
    pub(super) fn new(
        address: SocketAddr,
        tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
        idle: Duration,
    ) -> Self {
        Self {
            address,
            tls,
            idle,
            mismatches: Default::default(),
            last_error: Mutex::default(),
        }
    }

    /// Adds what came from there and was no reply.
    pub(super) fn book(&self, mismatches: Mismatches) {
        for (count, mismatch) in self.mismatches.iter().zip(Mismatch::ALL) {
            count.fetch_add(mismatches.of(mismatch).into(), Relaxed);
        }
    }

    pub(super) fn mismatched(&self, mismatch: Mismatch) -> u64 {
        self.mismatches
            .get(mismatch as usize)
            .map_or(0, |count| count.load(Relaxed))
    }

    pub(super) fn last_error(&self) -> Option<String> {
        lock(&self.last_error).clone()
    }

    fn failed(&self, error: &io::Error) {
        tracing::debug!(upstream = %self.address, %error, "a connection to the upstream failed");
        *lock(&self.last_error) = Some(error.to_string());
    }
}

impl Connection {
    /// Begins to connect; queries may be handed over at once.
    pub(super) fn open(target: Arc<Target>, encrypted: bool) -> Self {
        let (jobs, queue) = unbounded_channel();
        tokio::spawn(run(target, encrypted, queue));
        Self {
            jobs,
            load: Arc::default(),
        }
    }

    /// Whether it still takes queries.
    pub(super) fn is_open(&self) -> bool {
        !self.jobs.is_closed()
    }

    /// How many wait on it.
    pub(super) fn load(&self) -> usize {
        self.load.load(Acquire)
    }

    /// Hands a query over; `Err` if the connection is over.
    pub(super) fn ask(&self, sent: Sent, to: oneshot::Sender<Outcome>) -> Result<(), ()> {
        self.load.fetch_add(1, AcqRel);
        let load = Load(self.load.clone());
        let back = Back { to, load };
        self.jobs.send(Job { sent, back }).map_err(|_| ())
    }
}

/// Connects, serves, and tells everybody who is left how it ended.
async fn run(target: Arc<Target>, encrypted: bool, mut jobs: UnboundedReceiver<Job>) {
    let mut pipeline = Pipeline::new();
    let mut ended = Outcome::Broken;
    match timeout(CONNECT, TcpStream::connect(target.address)).await {
        Ok(Ok(stream)) if !encrypted => {
            ended = Outcome::Closed;
            let _ = stream.set_nodelay(true);
            if let Err(error) = serve(stream, &mut jobs, &mut pipeline, target.idle).await {
                target.failed(&error);
            }
        }
        Ok(Ok(stream)) => {
            let _ = stream.set_nodelay(true);
            match timeout(CONNECT, handshake(&target, stream)).await {
                Ok(Ok(stream)) => {
                    ended = Outcome::Closed;
                    if let Err(error) = serve(stream, &mut jobs, &mut pipeline, target.idle).await {
                        target.failed(&error);
                    }
                }
                Ok(Err(error)) => target.failed(&error),
                Err(_) => target.failed(&io::ErrorKind::TimedOut.into()),
            }
        }
        Ok(Err(error)) => target.failed(&error),
        Err(_) => target.failed(&io::ErrorKind::TimedOut.into()),
    }
    jobs.close();
    target.book(pipeline.mismatches());
    for (back, outcome) in pipeline.close() {
        Back::send(back, outcome);
    }
    while let Ok(job) = jobs.try_recv() {
        job.back.send(ended.clone());
    }
}

async fn handshake(target: &Target, stream: TcpStream) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let Some((config, name)) = &target.tls else {
        return Err(io::ErrorKind::Unsupported.into());
    };
    TlsConnector::from(config.clone()).connect(name.clone(), stream).await
}

/// Writes queries and reads replies until the connection is idle or over.
async fn serve<S: AsyncRead + AsyncWrite>(
    stream: S,
    jobs: &mut UnboundedReceiver<Job>,
    pipeline: &mut Pipeline<Back>,
    idle: Duration,
) -> io::Result<()> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (mut out, mut read) = (Vec::new(), Vec::with_capacity(CHUNK));
    let began = Instant::now();
    let mut unflushed = false;
    let mut quiet_since = began;
    loop {
        let over = pipeline.dead_at().map_or(quiet_since + idle, |dead| began + dead);
        tokio::select! {
            job = jobs.recv() => {
                // Nobody can ask any more, and nobody waits longer than for a moment.
                let Some(Job { sent, back }) = job else { return Ok(()) };
                if let Err(back) = pipeline.ask(sent, back, &mut out, began.elapsed()) {
                    back.send(Outcome::Busy);
                }
            }
            count = reader.read_buf(&mut read) => {
                if count? == 0 {
                    return Ok(());
                }
                while let Some(message) = pipeline.next_message(&mut read) {
                    if let Some((back, outcome)) = pipeline.hear(&message, began.elapsed()) {
                        back.send(outcome);
                    }
                }
                if pipeline.is_flooded() {
                    return Err(io::Error::other("it sends what nobody asked for"));
                }
                read.reserve(CHUNK);
                quiet_since = Instant::now();
            }
            written = push(&mut writer, &out), if unflushed || !out.is_empty() => {
                // What was written may still be in a buffer of TLS.
                let count = written?;
                unflushed = count > 0;
                out.drain(..count);
            }
            () = sleep_until(over) => {
                if pipeline.is_empty() {
                    // The other side learns that it is meant (RFC 7766 §6.2.3).
                    let _ = timeout(Duration::from_millis(100), writer.shutdown()).await;
                    return Ok(());
                }
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }
}

/// Writes the front of `out`, or flushes if there is nothing to write. How much was written; nothing is lost if this is
/// dropped.
async fn push(writer: &mut (impl AsyncWrite + Unpin), out: &[u8]) -> io::Result<usize> {
    if out.is_empty() {
        return writer.flush().await.map(|()| 0);
    }
    match writer.write(out).await? {
        0 => Err(io::ErrorKind::WriteZero.into()),
        count => Ok(count),
    }
}

/// The authorities that `pem` holds.
///
/// # Errors
///
/// Why there is none, without the file's name.
pub fn roots(pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    let mut refused = None;
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|error| format!("is not a PEM file: {error}"))?;
        // A system's bundle may hold one that is too old to be understood.
        if let Err(error) = roots.add(certificate) {
            refused = Some(error);
        }
    }
    match refused {
        _ if !roots.is_empty() => Ok(roots),
        Some(error) => Err(format!("holds a certificate that cannot be a CA: {error}")),
        None => Err("holds no certificate (-----BEGIN CERTIFICATE-----)".into()),
    }
}

/// A client that trusts only `roots`. Sessions are resumed; nothing is ever sent before the handshake is over.
pub(super) fn tls(roots: RootCertStore) -> Result<Arc<ClientConfig>, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}
