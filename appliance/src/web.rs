//! The `web` worker's service: `GET /metrics` on TCP, for Prometheus. It holds no key and decides nothing.

use std::{convert::Infallible, future::Future, sync::Arc, time::Duration};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Mutex, OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::metrics;

/// Connections served at a time, over all listeners; further ones wait in the backlog.
pub const MAX_CONNECTIONS: usize = 32;
/// For a request's head; an idle connection is closed after it too.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection may live no longer than this, however slowly its peer reads.
const MOST: Duration = Duration::from_secs(300);
/// How long one answer of the supervisor serves all who ask.
const FRESH: Duration = Duration::from_secs(1);
const ASK_TIMEOUT: Duration = Duration::from_secs(5);

/// The way to the supervisor; every `async fn() -> Result<String, String>` closure is one.
pub trait Ask: Send + Sync + 'static {
    /// The page for `GET /metrics`, or why there is none.
    fn metrics(&self) -> impl Future<Output = Result<String, String>> + Send;
}

impl<F, Fut> Ask for F
where
    F: Fn() -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<String, String>> + Send,
{
    fn metrics(&self) -> impl Future<Output = Result<String, String>> + Send {
        self()
    }
}

struct Shared<A> {
    ask: A,
    /// The whole expected value of the Authorization header.
    expected: Option<Vec<u8>>,
    /// Held while asking, so that many scrapers make one question.
    page: Mutex<Option<(Instant, Bytes)>>,
}

/// Serves on `listeners` until `shutdown` is cancelled, then lets running answers end for at most a second.
///
/// With a `token`, `GET /metrics` must carry `Authorization: Bearer TOKEN`.
pub async fn run<A: Ask>(listeners: Vec<TcpListener>, token: Option<Vec<u8>>, ask: A, shutdown: CancellationToken) {
    let expected = token.map(|token| [b"Bearer ".as_slice(), &token].concat());
    let shared = Arc::new(Shared {
        ask,
        expected,
        page: Mutex::new(None),
    });
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut acceptors = JoinSet::new();
    for listener in listeners {
        acceptors.spawn(accept(
            listener,
            Arc::clone(&slots),
            Arc::clone(&shared),
            shutdown.clone(),
        ));
    }
    shutdown.cancelled().await;
    acceptors.shutdown().await;
    let all = u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX);
    let _ = timeout(Duration::from_secs(1), slots.acquire_many(all)).await;
}

async fn accept<A: Ask>(
    listener: TcpListener,
    slots: Arc<Semaphore>,
    shared: Arc<Shared<A>>,
    shutdown: CancellationToken,
) {
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::spawn(connection(
                stream,
                slot,
                Arc::clone(&shared),
                shutdown.clone(),
            ))),
            Err(error) => {
                tracing::warn!(%error, "the metrics listener cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection<A: Ask>(
    stream: TcpStream,
    slot: OwnedSemaphorePermit,
    shared: Arc<Shared<A>>,
    shutdown: CancellationToken,
) {
    let service = service_fn(|request: Request<Incoming>| {
        let shared = Arc::clone(&shared);
        async move { Ok::<_, Infallible>(shared.answer(&request).await) }
    });
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(READ_TIMEOUT)
        .max_buf_size(16 * 1024);
    let serving = builder.serve_connection(TokioIo::new(stream), service);
    let mut serving = std::pin::pin!(serving);
    let ended = async {
        tokio::select! {
            ended = serving.as_mut() => ended,
            () = shutdown.cancelled() => {
                serving.as_mut().graceful_shutdown();
                serving.as_mut().await
            }
        }
    };
    if let Ok(Err(error)) = timeout(MOST, ended).await {
        tracing::debug!(%error, "a metrics connection ended early");
    }
    drop(slot);
}

impl<A: Ask> Shared<A> {
    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let text =
            |status, text: &'static str| page(status, "text/plain; charset=utf-8", Bytes::from_static(text.as_bytes()));
        match (request.method(), request.uri().path()) {
            (&Method::GET | &Method::HEAD, "/metrics") => {
                if !self.may_read(request) {
                    let mut response = text(
                        StatusCode::UNAUTHORIZED,
                        "the metrics need the bearer token of [control] metrics_token_file\n",
                    );
                    response
                        .headers_mut()
                        .insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
                    return response;
                }
                match self.page().await {
                    Ok(bytes) => page(StatusCode::OK, metrics::CONTENT_TYPE, bytes),
                    Err(error) => {
                        tracing::warn!(error, "no metrics");
                        text(
                            StatusCode::SERVICE_UNAVAILABLE,
                            "edged gave no metrics; its log says why: journalctl -u edged\n",
                        )
                    }
                }
            }
            (&Method::GET | &Method::HEAD, "/") => text(
                StatusCode::OK,
                "edged, the edge appliance\nPrometheus metrics: /metrics\n",
            ),
            (_, "/" | "/metrics") => text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n"),
            _ => text(StatusCode::NOT_FOUND, "not found; there is /metrics\n"),
        }
    }

    fn may_read(&self, request: &Request<Incoming>) -> bool {
        let Some(expected) = &self.expected else { return true };
        request
            .headers()
            .get(AUTHORIZATION)
            .is_some_and(|given| same(given.as_bytes(), expected))
    }

    async fn page(&self) -> Result<Bytes, String> {
        let mut page = self.page.lock().await;
        if let Some((at, bytes)) = &*page
            && at.elapsed() < FRESH
        {
            return Ok(bytes.clone());
        }
        let text = timeout(ASK_TIMEOUT, self.ask.metrics())
            .await
            .map_err(|_| "no answer within 5 s".to_owned())??;
        let bytes = Bytes::from(text);
        *page = Some((Instant::now(), bytes.clone()));
        Ok(bytes)
    }
}

fn page(status: StatusCode, kind: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// Compares in a time that depends on the lengths only: an attacker must not learn a token byte by byte.
fn same(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let different = a
        .iter()
        .zip(b)
        .fold(0_u8, |all, (a, b)| std::hint::black_box(all | (a ^ b)));
    std::hint::black_box(different) == 0
}
