//! Active checks: TCP connects and HTTPS requests made by the balancer itself.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use http_body_util::Empty;
use hyper::{Request, body::Bytes, header};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    time::{Instant, timeout_at},
};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use super::{clock, frontend::Frontend};
use crate::{
    config::{Active, Address, CheckKind, ProxyVersion},
    pool::{BackendId, CheckOutcome},
    proxy,
};

/// The roots that `pem` holds.
///
/// # Errors
///
/// Why there is none, without the file's name.
pub(crate) fn roots(pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|error| format!("is not a PEM file: {error}"))?;
        roots
            .add(certificate)
            .map_err(|error| format!("holds a certificate that cannot be a CA: {error}"))?;
    }
    if roots.is_empty() {
        return Err("holds no certificate (-----BEGIN CERTIFICATE-----)".into());
    }
    Ok(roots)
}

/// A TLS client that trusts only `roots`. Tickets are kept, so that a check every two seconds is cheap for the server.
fn client(roots: RootCertStore) -> Result<Arc<ClientConfig>, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Checks every target of `frontend` until `stop`; `files` holds the CA.
pub(crate) async fn run(frontend: Arc<Frontend>, files: Arc<BTreeMap<PathBuf, Vec<u8>>>, stop: CancellationToken) {
    let (Some(active), _) = frontend.targets() else { return };
    let tls = match tls_of(&active, &files) {
        Ok(tls) => tls,
        Err(error) => {
            // The supervisor has read the same file through the same function, so this is a file that changed meanwhile.
            tracing::error!(frontend = frontend.name, "no active checks: ca_file {error}");
            return;
        }
    };
    let active = Arc::new(active);
    let mut running: BTreeMap<BackendId, CancellationToken> = BTreeMap::new();
    let mut tick = tokio::time::interval(Duration::from_millis(250));
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        let (_, targets) = frontend.targets();
        running.retain(|id, token| {
            let wanted = targets.iter().any(|(target, ..)| target == id);
            if !wanted {
                token.cancel();
            }
            wanted
        });
        for (place, (id, backend, address)) in targets.iter().enumerate() {
            if running.contains_key(id) {
                continue;
            }
            let token = stop.child_token();
            running.insert(*id, token.clone());
            let probe = Probe {
                frontend: frontend.clone(),
                active: active.clone(),
                tls: tls.clone(),
                id: *id,
                backend: backend.clone(),
                address: *address,
            };
            // Staggered: the backends of a pool are not all asked in the same moment.
            let first = active
                .interval()
                .mul_f64(0.1 + 0.8 * place as f64 / targets.len() as f64)
                .min(Duration::from_secs(2));
            tokio::spawn(async move { probe.run(first, token).await });
        }
    }
}

fn tls_of(active: &Active, files: &BTreeMap<PathBuf, Vec<u8>>) -> Result<Option<Arc<ClientConfig>>, String> {
    match (active.kind, &active.ca_file) {
        (CheckKind::Https, Some(at)) => {
            let pem = files.get(&at.value).ok_or("was not passed")?;
            Ok(Some(client(roots(pem)?)?))
        }
        _ => Ok(None),
    }
}

/// The checks of one backend.
struct Probe {
    frontend: Arc<Frontend>,
    active: Arc<Active>,
    tls: Option<Arc<ClientConfig>>,
    id: BackendId,
    backend: Address,
    address: SocketAddr,
}

impl Probe {
    async fn run(self, first: Duration, stop: CancellationToken) {
        let mut wait = first;
        let mut round: u32 = 0;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
            let outcome = self.check().await;
            self.frontend.checked(self.id, outcome, clock::now());
            // Spread by 20 %, differently for each backend and round, so that many nodes do not beat in time.
            round = round.wrapping_add(1);
            let spread = (self
                .id
                .0
                .wrapping_mul(2_654_435_761)
                .wrapping_add(round.wrapping_mul(40_503))
                % 401) as f64
                / 1000.0;
            wait = self.active.interval().mul_f64(0.8 + spread);
        }
    }

    async fn check(&self) -> CheckOutcome {
        let within = self.active.timeout();
        let deadline = Instant::now() + within;
        let late = |what: &str| CheckOutcome::Bad {
            reason: format!("{what} took longer than {}", humantime::format_duration(within)),
            timeout: true,
        };
        let stream = match timeout_at(deadline, TcpStream::connect(self.address)).await {
            Err(_) => return late("the connect"),
            Ok(Err(error)) => {
                return CheckOutcome::Bad {
                    reason: format!("connect: {error}"),
                    timeout: false,
                };
            }
            Ok(Ok(stream)) => stream,
        };
        let stream = match timeout_at(deadline, self.introduce(stream)).await {
            Err(_) => return late("the PROXY header"),
            Ok(Err(error)) => {
                return CheckOutcome::Bad {
                    reason: format!("PROXY header: {error}"),
                    timeout: false,
                };
            }
            Ok(Ok(stream)) => stream,
        };
        let Some(tls) = &self.tls else {
            return CheckOutcome::Good;
        };
        let host = self
            .active
            .server_name
            .as_ref()
            .map_or_else(|| self.backend.host(), |at| at.value.clone());
        let Ok(name) = ServerName::try_from(host.clone()) else {
            return CheckOutcome::Bad {
                reason: format!("\"{host}\" cannot stand in a certificate"),
                timeout: false,
            };
        };
        let stream = match timeout_at(deadline, TlsConnector::from(tls.clone()).connect(name, stream)).await {
            Err(_) => return late("the TLS handshake"),
            Ok(Err(error)) => {
                return CheckOutcome::Bad {
                    reason: format!("TLS: {error}"),
                    timeout: false,
                };
            }
            Ok(Ok(stream)) => stream,
        };
        match timeout_at(deadline, self.ask(stream, &host)).await {
            Err(_) => late("the answer"),
            Ok(outcome) => outcome,
        }
    }

    /// A backend that wants a PROXY header gets one that speaks for nobody else: without it, it would log a broken header
    /// with every check.
    async fn introduce(&self, mut stream: TcpStream) -> std::io::Result<TcpStream> {
        let Some(version) = self.frontend.rules.load().proxy else {
            return Ok(stream);
        };
        let mut header = Vec::new();
        match version {
            // UNKNOWN is refused by some receivers; the ends of this very connection are as true.
            ProxyVersion::V1 => proxy::encode_v1(stream.local_addr()?, stream.peer_addr()?, &mut header),
            ProxyVersion::V2 => proxy::encode_local(proxy::Version::V2, &mut header),
        }
        stream.write_all(&header).await?;
        Ok(stream)
    }

    async fn ask(&self, stream: tokio_rustls::client::TlsStream<TcpStream>, host: &str) -> CheckOutcome {
        let path = self.active.path();
        let bad = |error: &dyn std::fmt::Display| CheckOutcome::Bad {
            reason: format!("GET {path}: {error}"),
            timeout: false,
        };
        let host = if host.contains(':') {
            format!("[{host}]")
        } else {
            host.to_owned()
        };
        let request = Request::get(path)
            .header(header::HOST, format!("{host}:{}", self.backend.port()))
            .header(header::USER_AGENT, "edged")
            .header(header::CONNECTION, "close")
            .body(Empty::<Bytes>::new());
        let request = match request {
            Ok(request) => request,
            Err(error) => return bad(&error),
        };
        let (mut sender, connection) = match hyper::client::conn::http1::handshake(TokioIo::new(stream)).await {
            Ok(pair) => pair,
            Err(error) => return bad(&error),
        };
        // The connection often ends with the answer in hand, so whether it has ended says nothing.
        let driver = AbortOnDrop(tokio::spawn(connection));
        let response = sender.send_request(request).await;
        drop(driver);
        match response {
            Err(error) => bad(&error),
            Ok(response) => outcome_of(response.status().as_u16(), path),
        }
    }
}

/// Ends a task that is of no use any more, also when its owner ran out of time.
struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What an answer says of the server: 401 and 403 come from an API server whose anonymous access is off, which is
/// alive; 5xx from one that is alive and asks for no new work (kube-apiserver's /readyz while it shuts down).
fn outcome_of(status: u16, path: &str) -> CheckOutcome {
    match status {
        200..=299 | 401 | 403 => CheckOutcome::Good,
        500..=599 => CheckOutcome::NotReady(format!("GET {path} answers {status}")),
        _ => CheckOutcome::Bad {
            reason: format!("GET {path} answers {status}"),
            timeout: false,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_tell_alive_from_draining_from_wrong() {
        for status in [200, 204, 401, 403] {
            assert!(matches!(outcome_of(status, "/readyz"), CheckOutcome::Good), "{status}");
        }
        assert!(matches!(outcome_of(500, "/readyz"), CheckOutcome::NotReady(_)));
        assert!(matches!(outcome_of(503, "/readyz"), CheckOutcome::NotReady(_)));
        for status in [302, 404, 429] {
            assert!(
                matches!(outcome_of(status, "/readyz"), CheckOutcome::Bad { timeout: false, .. }),
                "{status}"
            );
        }
    }

    #[test]
    fn a_ca_file_without_a_certificate_is_refused_with_the_reason() {
        assert!(roots(b"").expect_err("empty").contains("no certificate"));
        assert!(roots(b"-----BEGIN CERTIFICATE-----\nAAAA\n").is_err());
    }
}
