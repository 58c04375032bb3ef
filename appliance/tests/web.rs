//! The metrics listener over real sockets.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use appliance::web;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

struct Server {
    address: std::net::SocketAddr,
    asked: Arc<AtomicU32>,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

async fn serve(token: Option<&str>, page: Result<&'static str, &'static str>) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let address = listener.local_addr().expect("an address");
    let asked = Arc::new(AtomicU32::new(0));
    let stop = CancellationToken::new();
    let counter = Arc::clone(&asked);
    let ask = move || {
        counter.fetch_add(1, Ordering::Relaxed);
        async move { page.map(str::to_owned).map_err(str::to_owned) }
    };
    let running = tokio::spawn(web::run(
        vec![listener],
        token.map(|token| token.as_bytes().to_vec()),
        ask,
        stop.clone(),
    ));
    Server {
        address,
        asked,
        stop,
        running,
    }
}

async fn send(server: &Server, request: &str) -> String {
    let mut stream = TcpStream::connect(server.address).await.expect("connected");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    timeout(Duration::from_secs(30), stream.read_to_string(&mut answer))
        .await
        .expect("in time")
        .expect("text");
    answer
}

async fn get(server: &Server, path: &str, more: &str) -> String {
    send(
        server,
        &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{more}\r\n"),
    )
    .await
}

#[tokio::test]
async fn metrics_are_served_and_asked_for_once_a_second_at_most() {
    let server = serve(None, Ok("edge_up 1\n")).await;
    let started = Instant::now();
    let answer = get(&server, "/metrics", "").await;
    assert!(
        answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nedge_up 1\n"),
        "{answer}"
    );
    assert!(answer.contains("content-type: text/plain; version=0.0.4"), "{answer}");
    for _ in 0..20 {
        get(&server, "/metrics", "").await;
    }
    let asked = server.asked.load(Ordering::Relaxed);
    assert!(u64::from(asked) <= 2 + started.elapsed().as_secs(), "{asked}");
    assert_eq!(
        get(&server, "/", "")
            .await
            .rsplit("\r\n\r\n")
            .next()
            .map(|body| body.lines().count()),
        Some(2)
    );
    assert!(get(&server, "/nothing", "").await.starts_with("HTTP/1.1 404 "));
    assert!(
        send(
            &server,
            "POST /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        )
        .await
        .starts_with("HTTP/1.1 405 ")
    );
    server.stop.cancel();
    timeout(Duration::from_secs(10), server.running)
        .await
        .expect("it ends")
        .expect("without a panic");
    assert!(
        TcpStream::connect(server.address).await.is_err(),
        "nobody listens any more"
    );
}

#[tokio::test]
async fn with_a_token_only_its_bearer_reads_metrics() {
    let server = serve(Some("s3cret"), Ok("edge_up 1\n")).await;
    for wrong in [
        "",
        "authorization: Bearer s3creT\r\n",
        "authorization: Bearer s3cret2\r\n",
        "authorization: s3cret\r\n",
        "authorization: Basic czNjcmV0\r\n",
    ] {
        let answer = get(&server, "/metrics", wrong).await;
        assert!(
            answer.starts_with("HTTP/1.1 401 ")
                && answer.contains("www-authenticate: Bearer")
                && !answer.contains("edge_up"),
            "{wrong}: {answer}"
        );
    }
    assert!(
        get(&server, "/metrics", "authorization: Bearer s3cret\r\n")
            .await
            .contains("edge_up 1")
    );
}

#[tokio::test]
async fn a_supervisor_without_an_answer_is_503_and_the_reason_stays_inside() {
    let server = serve(None, Err("internal detail")).await;
    let answer = get(&server, "/metrics", "").await;
    assert!(
        answer.starts_with("HTTP/1.1 503 ") && !answer.contains("internal detail"),
        "{answer}"
    );
}

#[tokio::test]
async fn a_peer_that_says_nothing_or_nonsense_is_closed_and_harms_nobody() {
    let server = serve(None, Ok("edge_up 1\n")).await;
    for nonsense in [
        "\0\0\0\0\r\n\r\n",
        "GET\r\n\r\n",
        "\u{16}\u{3}\u{1}\u{2}\0",
        &format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(100_000)),
    ] {
        let mut stream = TcpStream::connect(server.address).await.expect("connected");
        let _ = stream.write_all(nonsense.as_bytes()).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = timeout(Duration::from_secs(20), stream.read_to_end(&mut answer))
            .await
            .expect("closed in time");
        assert!(!answer.starts_with(b"HTTP/1.1 200"));
    }
    let started = Instant::now();
    let mut slow: Vec<TcpStream> = Vec::new();
    for _ in 0..web::MAX_CONNECTIONS {
        let mut stream = TcpStream::connect(server.address).await.expect("connected");
        stream.write_all(b"GET /metrics HT").await.expect("sent");
        slow.push(stream);
    }
    // Every place is taken by a slow peer; after the time for a head they are free again.
    assert!(get(&server, "/metrics", "").await.contains("edge_up 1"));
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}
