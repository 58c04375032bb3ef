//! The health endpoint: `GET /healthz` says whether an API backend is healthy.

use std::{net::IpAddr, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use http_body_util::Full;
use hyper::{Method, Request, Response, StatusCode, body::Bytes, header, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;

use super::{clock, frontend::Frontend};
use crate::config::{Address, Cidr, Kind};

/// Requests served at once; more wait in the listener's queue.
const MOST: usize = 64;
/// Time a client has for its request and for taking the answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the endpoint answers from; replaced by a reload.
#[derive(Default)]
pub(crate) struct View {
    pub(crate) frontends: Vec<Arc<Frontend>>,
    pub(crate) allow: Vec<Cidr>,
    /// The one that decides alone.
    pub(crate) backend: Option<Address>,
}

impl View {
    /// The backend that decides is healthy, or else any API backend; without an API frontend, any backend.
    pub(crate) fn healthy(&self) -> bool {
        let now = clock::now();
        if let Some(backend) = &self.backend {
            return self.frontends.iter().any(|frontend| frontend.healthy_one(backend, now));
        }
        let api = self.frontends.iter().any(|frontend| frontend.kind() == Kind::Api);
        self.frontends
            .iter()
            .any(|frontend| (!api || frontend.kind() == Kind::Api) && frontend.healthy(now))
    }

    fn allows(&self, source: IpAddr) -> bool {
        self.allow.is_empty() || self.allow.iter().any(|cidr| cidr.contains(source))
    }
}

/// Answers on `listener` until `stop`.
pub(crate) async fn run(listener: TcpListener, view: Arc<ArcSwap<View>>, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(MOST));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, source)) = accepted else {
            // Out of descriptors, or the client left: neither is cured by asking again at once.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let view = view.clone();
        tokio::spawn(async move {
            let service = service_fn(|request: Request<hyper::body::Incoming>| {
                let response = answer(&view.load(), request.method(), request.uri().path(), source.ip());
                async move { Ok::<_, std::convert::Infallible>(response) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .keep_alive(false)
                .max_buf_size(16 * 1024)
                .serve_connection(TokioIo::new(stream), service);
            // What a client breaks off is its own affair.
            let _ = tokio::time::timeout(PATIENCE * 2, connection).await;
            drop(place);
        });
    }
}

fn answer(view: &View, method: &Method, path: &str, source: IpAddr) -> Response<Full<Bytes>> {
    let (status, text) = if !view.allows(source) {
        (StatusCode::FORBIDDEN, "this source is not in health_allow\n")
    } else if path != "/healthz" {
        (StatusCode::NOT_FOUND, "ask for /healthz\n")
    } else if method != Method::GET && method != Method::HEAD {
        (StatusCode::METHOD_NOT_ALLOWED, "ask with GET\n")
    } else if view.healthy() {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "no healthy API backend\n")
    };
    let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-store"));
    response
}
