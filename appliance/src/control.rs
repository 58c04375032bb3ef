//! The control socket: HTTP/1.1 with JSON on a unix socket; who may do what comes from the kernel.
//!
//! ```text
//! accept -> SO_PEERCRED, SO_PEERGROUPS -> role -> route -> Op to the supervisor -> JSON
//! ```
//! The role is decided before the first byte of the peer is read: to a stranger this is a canned answer and no parser.

use std::{convert::Infallible, fmt, os::fd::AsRawFd, sync::Arc, time::Duration};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc, oneshot},
    time::timeout,
};

use crate::api::{Answer, Ask, Author, Op, Refusal, SCHEMA_VERSION};

/// Members of this group may look.
pub const READ_GROUP: &str = "edge";
/// Members of this group may also apply configurations, drain backends and make keys for nodes.
pub const OPERATE_GROUP: &str = "edge-admin";
/// Connections served at a time.
pub const MAX_CONNECTIONS: usize = 64;
/// Of these, kept for root: readers must not be able to lock it out.
const RESERVED: usize = 8;
/// Refused peers that are given time to read why.
const MAX_REFUSED: usize = 16;
/// The largest request body: far above any configuration.
pub const MAX_BODY: usize = 1 << 20;
/// For a request's head, and again for its body.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// Shorter than `edgectl` waits, so that it gets a reason instead of silence.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(9);

/// What a peer may do; each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Look: status, configuration, metrics.
    Read,
    /// Change what runs: apply, confirm, roll back, drain, upgrade, keys of nodes.
    Operate,
    /// Everything.
    Admin,
}

/// Who is on the other end, as the kernel says.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Numeric user id.
    pub uid: u32,
    /// Primary group and supplementary groups.
    pub groups: Vec<u32>,
    /// The process.
    pub pid: i32,
}

/// Which ids have which role.
#[derive(Clone, Copy, Debug, Default)]
pub struct Roles {
    /// The daemon's own user, an admin like root.
    pub own_uid: u32,
    /// Id of [`READ_GROUP`], where the system has it.
    pub read: Option<u32>,
    /// Id of [`OPERATE_GROUP`], where the system has it.
    pub operate: Option<u32>,
}

impl Roles {
    /// As this system has them now.
    pub fn of_system() -> Self {
        let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
        Self {
            own_uid: rustix::process::geteuid().as_raw(),
            read: id_of(&groups, READ_GROUP),
            operate: id_of(&groups, OPERATE_GROUP),
        }
    }

    /// The role of `peer`; `None` = a stranger.
    pub fn of(&self, peer: &Peer) -> Option<Role> {
        let in_group = |group: Option<u32>| group.is_some_and(|group| peer.groups.contains(&group));
        if peer.uid == 0 || peer.uid == self.own_uid {
            Some(Role::Admin)
        } else if in_group(self.operate) {
            Some(Role::Operate)
        } else if in_group(self.read) {
            Some(Role::Read)
        } else {
            None
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Operate => "operate",
            Self::Admin => "admin",
        })
    }
}

/// Serves the control socket until the future is dropped or the supervisor no longer takes what is asked.
///
/// Whoever made `listener` set its mode and group. Nothing a peer sends ends this: what is wrong is answered.
pub async fn serve(listener: UnixListener, ops: mpsc::Sender<Op>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let others = Arc::new(Semaphore::new(MAX_CONNECTIONS - RESERVED));
    let refused = Arc::new(Semaphore::new(MAX_REFUSED));
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors: the listener stays readable, so wait instead of spinning.
                    tracing::warn!(%error, "the control socket cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = ops.closed() => return,
        };
        let (peer, role) = match peer(&stream) {
            Ok(peer) => {
                let role = Roles::of_system().of(&peer);
                (peer, role)
            }
            Err(error) => {
                tracing::warn!(%error, "a control connection without credentials was closed");
                continue;
            }
        };
        let Some(role) = role else {
            tracing::warn!(
                uid = peer.uid,
                pid = peer.pid,
                "control connection refused: neither root nor in a group of edged"
            );
            turn_away(&refused, stream, StatusCode::FORBIDDEN, stranger(peer.uid));
            continue;
        };
        let place = if role == Role::Admin {
            Ok(None)
        } else {
            Arc::clone(&others).try_acquire_owned().map(Some)
        };
        let place = place.and_then(|other| Ok((other, Arc::clone(&slots).try_acquire_owned()?)));
        let Ok(place) = place else {
            let message =
                "too many control connections are open already (64 in all); close some, or try again in a few seconds";
            turn_away(&refused, stream, StatusCode::SERVICE_UNAVAILABLE, message.to_owned());
            continue;
        };
        let ops = ops.clone();
        tokio::spawn(async move {
            connection(stream, peer, role, ops).await;
            drop(place);
        });
    }
}

fn stranger(uid: u32) -> String {
    let user = user_name(uid).unwrap_or_else(|| format!("uid {uid}"));
    format!(
        "{user} may not talk to edged: only root and members of the groups \"{READ_GROUP}\" (look) and \"{OPERATE_GROUP}\" (operate) may; \
         sudo usermod -aG {READ_GROUP} {user}, then log in again"
    )
}

/// Answers without reading a byte; with too many of these at a time, closes without an answer.
fn turn_away(places: &Arc<Semaphore>, mut stream: UnixStream, status: StatusCode, message: String) {
    let Ok(place) = Arc::clone(places).try_acquire_owned() else {
        return;
    };
    let error = Refusal {
        message,
        bad_request: false,
    };
    let body = json!({ "schema_version": SCHEMA_VERSION, "error": error }).to_string();
    let answer = format!(
        "HTTP/1.1 {} {}\r\ncontent-type: {JSON}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        status.as_u16(),
        status.canonical_reason().unwrap_or(""),
        body.len()
    );
    tokio::spawn(async move {
        let write = async {
            // An answer that comes before the question is an error to an HTTP client; what waits is left unread.
            let asked = || match rustix::io::ioctl_fionread(&stream)? {
                0 => Err(std::io::ErrorKind::WouldBlock.into()),
                _ => Ok(()),
            };
            stream.async_io(Interest::READABLE, asked).await?;
            stream.write_all(answer.as_bytes()).await?;
            stream.shutdown().await
        };
        // Closing at once would make the peer's own write fail, and it would report that instead of the reason.
        if timeout(Duration::from_secs(1), write)
            .await
            .is_ok_and(|written| written.is_ok())
        {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        drop(place);
    });
}

async fn connection(stream: UnixStream, peer: Peer, role: Role, ops: mpsc::Sender<Op>) {
    let author = Author {
        uid: peer.uid,
        user: user_name(peer.uid),
        pid: peer.pid,
    };
    let service = service_fn(|request| {
        let (author, ops) = (author.clone(), ops.clone());
        async move { Ok::<_, Infallible>(answer(request, role, author, ops).await) }
    });
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(READ_TIMEOUT)
        .max_buf_size(64 * 1024);
    if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(%error, uid = peer.uid, pid = peer.pid, "a control connection ended early");
    }
}

/// What goes wrong with a request, with its HTTP status.
struct Failure(StatusCode, Refusal);

impl Failure {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self(
            status,
            Refusal {
                message: message.into(),
                bad_request: status.is_client_error() && status != StatusCode::FORBIDDEN,
            },
        )
    }
}

async fn answer(
    request: Request<Incoming>,
    role: Role,
    author: Author,
    ops: mpsc::Sender<Op>,
) -> Response<Full<Bytes>> {
    let asked = async {
        let ask = parse(request).await?;
        allowed(&ask, role, &author)?;
        let (reply, answered) = oneshot::channel();
        let gone = || {
            Failure::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "edged is stopping and takes no requests; systemctl status edged",
            )
        };
        let slow = |_| {
            Failure::new(
                StatusCode::GATEWAY_TIMEOUT,
                "edged did not answer within 9 s; whether the request took effect is shown by: edgectl status",
            )
        };
        let ask = async {
            ops.send(Op { ask, author, reply }).await.map_err(|_| gone())?;
            answered.await.map_err(|_| gone())?.map_err(|refusal| {
                let status = if refusal.bad_request {
                    StatusCode::UNPROCESSABLE_ENTITY
                } else {
                    StatusCode::INTERNAL_SERVER_ERROR
                };
                Failure(status, refusal)
            })
        };
        timeout(ANSWER_TIMEOUT, ask).await.map_err(slow)?
    };
    match asked.await.and_then(body) {
        Ok((kind, body)) => response(StatusCode::OK, kind, body),
        Err(Failure(status, refusal)) => {
            let body = json!({ "schema_version": SCHEMA_VERSION, "error": refusal }).to_string();
            let mut response = response(status, JSON, body);
            if status == StatusCode::METHOD_NOT_ALLOWED {
                response
                    .headers_mut()
                    .insert(ALLOW, hyper::header::HeaderValue::from_static("GET, POST"));
            }
            response
        }
    }
}

const JSON: &str = "application/json";

fn response(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
        .headers_mut()
        .insert(CACHE_CONTROL, hyper::header::HeaderValue::from_static("no-store"));
    response
}

/// The type each route answers with, `schema_version` beside its fields.
fn body(answer: Answer) -> Result<(&'static str, String), Failure> {
    let value = match answer {
        Answer::Status(status) => versioned(&status),
        Answer::Lb(answer) => versioned(&answer),
        Answer::Dns(answer) => versioned(&answer),
        Answer::Nat64(answer) => versioned(&answer),
        Answer::Config(config) => versioned(&config),
        Answer::Applied(applied) => versioned(&applied),
        Answer::Upgrade(upgrade) => versioned(&upgrade),
        Answer::History { revisions } => versioned(&json!({ "revisions": revisions })),
        Answer::Metrics { text } => return Ok((crate::metrics::CONTENT_TYPE, text)),
    };
    value
        .map(|value| (JSON, value.to_string()))
        .map_err(|error| Failure::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

/// `value` as a JSON object with `schema_version` in front.
pub fn versioned<T: Serialize>(value: &T) -> Result<Value, serde_json::Error> {
    let mut object = serde_json::Map::from_iter([("schema_version".to_owned(), json!(SCHEMA_VERSION))]);
    match serde_json::to_value(value)? {
        Value::Object(fields) => object.extend(fields),
        other => drop(object.insert("value".into(), other)),
    }
    Ok(Value::Object(object))
}

/// Body of `POST /v1/config/apply`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Apply {
    /// The TOML text.
    pub text: String,
    /// Where it came from.
    pub origin: String,
    /// Go back by itself unless confirmed within this many seconds.
    #[serde(default)]
    pub confirm_seconds: Option<u64>,
}

/// Body of `POST /v1/config/rollback`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rollback {
    /// `None` = the one before the running one.
    #[serde(default)]
    pub revision: Option<u64>,
}

/// Body of `POST /v1/upgrade`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upgrade {
    /// The program, from the root.
    pub binary: std::path::PathBuf,
    /// Only find out whether it could take over.
    #[serde(default)]
    pub dry_run: bool,
}

async fn parse(request: Request<Incoming>) -> Result<Ask, Failure> {
    let (head, body) = request.into_parts();
    let get = head.method == Method::GET;
    let post = head.method == Method::POST;
    Ok(match head.uri.path() {
        "/v1/status" if get => Ask::Status,
        "/v1/config" if get => Ask::ConfigShow,
        "/v1/config/history" if get => Ask::ConfigHistory,
        "/metrics" if get => Ask::Metrics,
        "/v1/lb" if post => Ask::Lb {
            request: json_body(body).await?,
        },
        "/v1/dns" if post => Ask::Dns {
            request: json_body(body).await?,
        },
        "/v1/nat64" if post => Ask::Nat64 {
            request: json_body(body).await?,
        },
        "/v1/config/apply" if post => {
            let Apply {
                text,
                origin,
                confirm_seconds,
            } = json_body(body).await?;
            Ask::ConfigApply {
                text,
                origin,
                confirm_seconds,
            }
        }
        "/v1/config/confirm" if post => Ask::ConfigConfirm,
        "/v1/config/rollback" if post => Ask::ConfigRollback {
            revision: json_body::<Rollback>(body).await?.revision,
        },
        "/v1/upgrade" if post => {
            let Upgrade { binary, dry_run } = json_body(body).await?;
            Ask::Upgrade { binary, dry_run }
        }
        "/v1/status" | "/v1/config" | "/v1/config/history" | "/metrics" => {
            return Err(Failure::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "this path is read with GET",
            ));
        }
        "/v1/lb"
        | "/v1/dns"
        | "/v1/nat64"
        | "/v1/config/apply"
        | "/v1/config/confirm"
        | "/v1/config/rollback"
        | "/v1/upgrade" => {
            return Err(Failure::new(StatusCode::METHOD_NOT_ALLOWED, "this path takes POST"));
        }
        _ => {
            return Err(Failure::new(
                StatusCode::NOT_FOUND,
                "edged has no such path; edgectl and edged may be of different releases: edgectl version",
            ));
        }
    })
}

async fn json_body<T: for<'de> Deserialize<'de>>(body: Incoming) -> Result<T, Failure> {
    let collected = timeout(READ_TIMEOUT, Limited::new(body, MAX_BODY).collect()).await;
    let bytes = match collected {
        Err(_) => {
            return Err(Failure::new(
                StatusCode::REQUEST_TIMEOUT,
                "the request did not arrive within 10 s",
            ));
        }
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            return Err(Failure::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "the request is larger than 1 MiB",
            ));
        }
        Ok(Err(error)) => {
            return Err(Failure::new(
                StatusCode::BAD_REQUEST,
                format!("the request broke off: {error}"),
            ));
        }
        Ok(Ok(collected)) => collected.to_bytes(),
    };
    let bytes = if bytes.is_empty() {
        Bytes::from_static(b"{}")
    } else {
        bytes
    };
    serde_json::from_slice(&bytes).map_err(|error| {
        Failure::new(
            StatusCode::BAD_REQUEST,
            format!("the request is no JSON this release understands: {error}"),
        )
    })
}

fn allowed(ask: &Ask, role: Role, author: &Author) -> Result<(), Failure> {
    use dns64::status::Request as Dns;
    use lb::status::Request as Lb;
    let needed = match ask {
        Ask::Status
        | Ask::ConfigShow
        | Ask::ConfigHistory
        | Ask::Metrics
        | Ask::Nat64 { .. }
        | Ask::Lb {
            request: Lb::Status | Lb::Why { .. },
        }
        | Ask::Dns {
            request: Dns::Status | Dns::Query { .. } | Dns::Zones { .. } | Dns::Keys,
        } => Role::Read,
        Ask::Lb {
            request: Lb::Drain { .. } | Lb::Undrain { .. },
        }
        | Ask::Dns {
            request: Dns::Flush { .. } | Dns::AddKey { .. } | Dns::RemoveKey { .. },
        }
        | Ask::ConfigApply { .. }
        | Ask::ConfigConfirm
        | Ask::ConfigRollback { .. }
        | Ask::Upgrade { .. } => Role::Operate,
    };
    if role >= needed {
        return Ok(());
    }
    let user = author.user.clone().unwrap_or_else(|| format!("uid {}", author.uid));
    tracing::warn!(uid = author.uid, pid = author.pid, %role, "a change was refused: the peer may only read");
    Err(Failure::new(
        StatusCode::FORBIDDEN,
        format!(
            "{user} may only look (group \"{READ_GROUP}\"), so nothing was changed; use sudo, or join: sudo usermod -aG {OPERATE_GROUP} {user}"
        ),
    ))
}

/// Asks the kernel who connected.
fn peer(stream: &UnixStream) -> std::io::Result<Peer> {
    let credentials = stream.peer_cred()?;
    let mut groups = peer_groups(stream)?;
    groups.push(credentials.gid());
    Ok(Peer {
        uid: credentials.uid(),
        groups,
        pid: credentials.pid().unwrap_or(0),
    })
}

/// SO_PEERGROUPS (socket(7)): the supplementary groups the peer had when it connected.
fn peer_groups(stream: &UnixStream) -> std::io::Result<Vec<u32>> {
    // NGROUPS_MAX is 65536; a peer with more than fits is asked for again with the size the kernel names.
    let mut groups = vec![0_u32; 64];
    loop {
        let mut size =
            libc::socklen_t::try_from(std::mem::size_of_val(groups.as_slice())).unwrap_or(libc::socklen_t::MAX);
        // SAFETY: `groups` is writable for `size` bytes, `size` is a valid in-out length, and the kernel writes at
        // most `size` bytes of whole gid_t values, every pattern of which is a valid u32.
        let result = unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut size,
            )
        };
        let count = usize::try_from(size).unwrap_or(0) / size_of::<u32>();
        if result == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = std::io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::ERANGE) if count > groups.len() && count <= 65_536 => groups.resize(count, 0),
            // The peer's credentials carry no groups (a kernel thread, an old kernel): the primary group decides.
            Some(libc::ENODATA | libc::ENOPROTOOPT) => return Ok(Vec::new()),
            _ => return Err(error),
        }
    }
}

/// The id of `name` in the text of /etc/group or /etc/passwd.
fn id_of(text: &str, name: &str) -> Option<u32> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?
    })
}

/// The name of a user id, from /etc/passwd.
pub fn user_name(uid: u32) -> Option<String> {
    let users = std::fs::read_to_string("/etc/passwd").ok()?;
    users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    })
}
