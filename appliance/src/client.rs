//! The other end of the control socket: what `edgectl` asks `edged`, and errors that say what to do.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, StatusCode,
    body::Bytes,
    client::conn::http1,
    header::{CONTENT_TYPE, HOST},
};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::{net::UnixStream, time::timeout};

use crate::{
    api::Refusal,
    control::{OPERATE_GROUP, READ_GROUP},
};

/// For one request, from connect to the last byte of the answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Waits before a question whose answer broke off is asked again: a daemon that is being upgraded takes it up at once.
const AGAIN: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(250)];

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing listens on the socket.
    #[error("edged is not running on this machine, or listens elsewhere than {socket}; systemctl status edged; edgectl --socket PATH", socket = socket.display())]
    Away {
        /// The socket that was tried.
        socket: PathBuf,
    },
    /// The socket's mode keeps this user out.
    #[error(
        "this user may not open {socket}; use sudo, or join a group and log in again: \
         \"{READ_GROUP}\" to look, \"{OPERATE_GROUP}\" to operate: sudo usermod -aG {READ_GROUP} $USER",
        socket = socket.display()
    )]
    Denied {
        /// The socket that was tried.
        socket: PathBuf,
    },
    /// No answer in time.
    #[error(
        "edged did not answer within 10 s; whether it hangs is shown by: systemctl status edged; journalctl -u edged"
    )]
    Slow,
    /// The connection broke.
    #[error("the connection to edged broke off: {0}; if it is being restarted, try again: systemctl status edged")]
    Broken(String),
    /// The answer is not of this release.
    #[error(
        "edged answered what this edgectl does not understand ({0}); are they of the same release? edgectl version"
    )]
    Foreign(String),
    /// edged said no.
    #[error("{}", .0.message)]
    Refused(Refusal),
    /// The user may not ask that; nothing was done.
    #[error("{}", .0.message)]
    Forbidden(Refusal),
}

/// A control socket to ask.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

#[derive(Deserialize)]
struct ErrorBody {
    error: Refusal,
}

impl Client {
    /// Will ask `socket`; nothing is opened yet.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// The socket that is asked.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The JSON that `path` answers.
    ///
    /// # Errors
    ///
    /// [`ClientError`]
    pub async fn get(&self, path: &str) -> Result<Value, ClientError> {
        let body = self.read(path).await?;
        serde_json::from_slice(&body).map_err(|error| ClientError::Foreign(error.to_string()))
    }

    /// The text that `path` answers.
    ///
    /// # Errors
    ///
    /// [`ClientError`]
    pub async fn get_text(&self, path: &str) -> Result<String, ClientError> {
        let body = self.read(path).await?;
        String::from_utf8(body.into()).map_err(|error| ClientError::Foreign(error.to_string()))
    }

    /// The JSON that `path` answers to `body`.
    ///
    /// # Errors
    ///
    /// [`ClientError`]
    pub async fn post(&self, path: &str, body: &impl Serialize) -> Result<Value, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| ClientError::Foreign(error.to_string()))?;
        let body = self.request(Method::POST, path, body.into()).await?;
        serde_json::from_slice(&body).map_err(|error| ClientError::Foreign(error.to_string()))
    }

    /// A question may be asked twice, unlike a change.
    async fn read(&self, path: &str) -> Result<Bytes, ClientError> {
        for wait in AGAIN {
            match self.request(Method::GET, path, Bytes::new()).await {
                Err(ClientError::Broken(_)) => tokio::time::sleep(wait).await,
                answer => return answer,
            }
        }
        self.request(Method::GET, path, Bytes::new()).await
    }

    async fn request(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes, ClientError> {
        timeout(TIMEOUT, self.exchange(method, path, body))
            .await
            .map_err(|_| ClientError::Slow)?
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes, ClientError> {
        let socket = || self.socket.clone();
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|error| match error.kind() {
                // A socket file that nobody listens on is left by a daemon that was killed.
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ClientError::Away { socket: socket() },
                io::ErrorKind::PermissionDenied => ClientError::Denied { socket: socket() },
                _ => ClientError::Broken(error.to_string()),
            })?;
        let broken = |error: hyper::Error| ClientError::Broken(error.to_string());
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "edged")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| ClientError::Broken(error.to_string()))?;
        let answer = async {
            let response = sender.send_request(request).await.map_err(broken)?;
            let status = response.status();
            let body = response.into_body().collect().await.map_err(broken)?.to_bytes();
            Ok::<_, ClientError>((status, body))
        };
        let mut connection = std::pin::pin!(connection);
        let mut answer = std::pin::pin!(answer);
        // hyper moves bytes only while the connection is polled; once it has ended, what it delivered is still there.
        let answer = tokio::select! {
            answer = answer.as_mut() => answer,
            _ = connection.as_mut() => answer.await,
        };
        let (status, body) = answer?;
        if status == StatusCode::OK {
            return Ok(body);
        }
        match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(ErrorBody { error }) if status == StatusCode::FORBIDDEN => Err(ClientError::Forbidden(error)),
            Ok(ErrorBody { error }) => Err(ClientError::Refused(error)),
            Err(_) => Err(ClientError::Foreign(format!("HTTP {status}"))),
        }
    }
}
