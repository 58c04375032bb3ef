//! The whole service on loopback: one `run` in a thread, clients and backends on std sockets.
//!
//! ```text
//! client (std) -> 127.0.0.1:P listener -> lb::io::run -> 127.0.0.1:B backends (std threads)
//! ```

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    sync::mpsc as std_mpsc,
    thread,
    time::{Duration, Instant},
};

use lb::{
    Config, What,
    io::{Command, Commit, Drain, Links, Opened},
    status::{Answer, EventKind, Request, State, Status},
};
use tokio::sync::{mpsc, oneshot};

const SOON: Duration = Duration::from_secs(10);

#[test]
fn bytes_arrive_whole_in_both_directions_small_and_bulky() {
    let echo = backend(|mut stream| {
        let mut buffer = vec![0; 100_000];
        while let Ok(n @ 1..) = stream.read(&mut buffer) {
            if stream.write_all(&buffer[..n]).is_err() {
                return;
            }
        }
    });
    let lb = Balancer::start(&[echo], "");
    for size in [1, 1000, 65_535, 65_536, 65_537, 300_000, 20_000_000] {
        let client = lb.connect();
        let sent = pattern(size);
        let mut writer = client.try_clone().expect("a second handle");
        let bytes = sent.clone();
        let feeder = thread::spawn(move || {
            writer.write_all(&bytes).expect("the balancer takes it");
            writer.shutdown(Shutdown::Write).expect("half-close");
        });
        let got = read_all(client);
        feeder.join().expect("the writer ends");
        assert!(got == sent, "{size} bytes: {} came back", got.len());
    }
    let status = lb.status();
    assert!(status.frontends[0].backends[0].bytes_up_total > 20_000_000);
    lb.wait("sessions end", |status| status.frontends[0].sessions == 0);
}

#[test]
fn a_slow_reader_gets_everything_and_holds_nobody_up() {
    let source = backend(|mut stream| {
        let _ = stream.write_all(&pattern(8_000_000));
    });
    let lb = Balancer::start(&[source], "");
    let mut slow = lb.connect();
    let mut first = [0; 1000];
    slow.read_exact(&mut first).expect("the first bytes");
    // While the slow one's buffers are full, another gets its bytes.
    assert_eq!(read_all(lb.connect()).len(), 8_000_000);
    let mut rest = first.to_vec();
    slow.read_to_end(&mut rest).expect("the rest");
    assert!(rest == pattern(8_000_000));
}

#[test]
fn a_client_that_closed_its_sending_half_still_gets_the_answer() {
    let late = backend(|mut stream| {
        let mut request = Vec::new();
        stream.read_to_end(&mut request).expect("the request to its end");
        let _ = stream.write_all(format!("{} bytes", request.len()).as_bytes());
    });
    let lb = Balancer::start(&[late], "");
    let mut client = lb.connect();
    client.write_all(&[7; 5000]).expect("the request");
    client.shutdown(Shutdown::Write).expect("half-close");
    assert_eq!(read_all(client), b"5000 bytes");
}

#[test]
fn a_half_closed_session_that_stays_silent_is_reset() {
    let silent = backend(|mut stream| {
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all);
        thread::sleep(SOON);
    });
    let lb = Balancer::start(&[silent], "half_close_timeout = \"1s\"");
    let mut client = lb.connect();
    client.shutdown(Shutdown::Write).expect("half-close");
    let begun = Instant::now();
    assert!(client.read(&mut [0; 1]).is_err(), "a reset, not an answer");
    assert!(
        (900..3000).contains(&begun.elapsed().as_millis()),
        "{:?}",
        begun.elapsed()
    );
}

#[test]
fn an_idle_session_is_closed_and_a_busy_one_is_not() {
    let lb = Balancer::start(&[echo()], "idle_timeout = \"1s\"");
    let mut idle = lb.connect();
    let mut busy = lb.connect();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(2500) {
        busy.write_all(b"x").expect("alive");
        busy.read_exact(&mut [0; 1]).expect("alive");
        thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(idle.read(&mut [0; 1]).ok(), Some(0), "closed for idleness");
}

#[test]
fn a_reset_on_one_side_is_a_reset_on_the_other() {
    let (sender, resets) = std_mpsc::channel();
    let watch = backend(move |mut stream| {
        let mut byte = [0; 1];
        let _ = stream.read(&mut byte);
        if byte == *b"!" {
            reset(stream);
            return;
        }
        let _ = sender.send(stream.read(&mut byte).map_err(|error| error.kind()));
    });
    let lb = Balancer::start(&[watch], "");
    let mut client = lb.connect();
    client.write_all(b"!").expect("a byte");
    let error = client.read(&mut [0; 1]).expect_err("the backend's reset");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);

    let mut client = lb.connect();
    client.write_all(b"?").expect("a byte");
    lb.wait("the byte is through", |status| {
        status.frontends[0].backends[0].bytes_up_total == 2
    });
    reset(client);
    assert_eq!(
        resets.recv_timeout(SOON).expect("an end"),
        Err(std::io::ErrorKind::ConnectionReset)
    );
    lb.wait("sessions end", |status| status.frontends[0].sessions == 0);
}

#[test]
fn a_refused_backend_costs_the_client_nothing_but_a_detour() {
    let lb = Balancer::start(&[closed(), closed(), echo()], "balance = \"round-robin\"");
    for _ in 0..20 {
        talk(lb.connect());
    }
    let status = lb.status();
    assert!(status.frontends[0].retries_total >= 2);
    assert_eq!(status.frontends[0].failed_total, 0);
    assert_eq!(status.frontends[0].backends[0].state, State::Banned);
    let Answer::Why { backends } = lb.ask(Request::Why {
        backend: status.frontends[0].backends[0].backend.clone(),
    }) else {
        panic!("an account of the backend")
    };
    assert!(
        backends[0].events.iter().any(|event| event.kind == EventKind::Ban),
        "{:?}",
        backends[0].events
    );
}

#[test]
fn without_any_backend_the_client_is_reset_at_once() {
    let lb = Balancer::start(&[closed(), closed()], "");
    for _ in 0..5 {
        let begun = Instant::now();
        let error = lb.connect().read(&mut [0; 1]).expect_err("a reset");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        assert!(begun.elapsed() < Duration::from_secs(1));
    }
    assert_eq!(lb.status().frontends[0].failed_total, 5);
}

#[test]
fn a_reload_takes_listeners_and_backends_in_and_out_and_touches_no_session() {
    let (first, second) = (marked(b'1'), marked(b'2'));
    let lb = Balancer::start(&[first], "");
    let mut old = lb.connect();
    assert_eq!(ask_mark(&mut old), b'1');
    let listener = free();
    let text = format!(
        "[[frontend]]\nname='f'\nlisten=['{}','{listener}']\nbackends=['{second}']\n[[frontend]]\nname='g'\nlisten=['{}']\nbackends=['{first}']",
        lb.address,
        free()
    );
    lb.reload(&text).expect("a good configuration");
    assert_eq!(ask_mark(&mut old), b'1', "the session stays where it is");
    assert_eq!(ask_mark(&mut lb.connect()), b'2', "the address serves the changed pool");
    assert_eq!(
        ask_mark(&mut TcpStream::connect(listener).expect("the added listener")),
        b'2'
    );
    lb.reload(&format!(
        "[[frontend]]\nname='h'\nlisten=['{}']\nbackends=['{second}']",
        lb.address
    ))
    .expect("good");
    assert_eq!(ask_mark(&mut lb.connect()), b'2', "the address changed hands");
    wait("the removed listener refuses", || TcpStream::connect(listener).is_err());
    assert_eq!(ask_mark(&mut old), b'1', "even now");
}

#[test]
fn a_drained_backend_keeps_its_sessions_and_gets_none_and_the_drain_is_durable_first() {
    let (first, second) = (marked(b'1'), marked(b'2'));
    let lb = Balancer::start(&[first, second], "[frontend.health]\nslow_start='none'");
    let mut sessions: Vec<TcpStream> = (0..4).map(|_| lb.connect()).collect();
    let marks: Vec<u8> = sessions.iter_mut().map(ask_mark).collect();
    assert!(marks.contains(&b'1') && marks.contains(&b'2'), "{marks:?}");
    let Answer::Done { changed } = lb.ask(Request::Drain {
        backend: first.to_string(),
    }) else {
        panic!("it is drained")
    };
    assert_eq!(changed, [format!("f/{first}")]);
    assert_eq!(
        lb.commits(),
        [(
            Drain {
                frontend: "f".into(),
                backend: first.to_string()
            },
            true
        )]
    );
    for _ in 0..6 {
        assert_eq!(ask_mark(&mut lb.connect()), b'2');
    }
    let after: Vec<u8> = sessions.iter_mut().map(ask_mark).collect();
    assert_eq!(after, marks);
    assert!(matches!(
        lb.ask(Request::Undrain {
            backend: format!("f/{first}")
        }),
        Answer::Done { .. }
    ));
    wait("it is used again", || ask_mark(&mut lb.connect()) == b'1');
    assert!(matches!(
        lb.ask(Request::Drain {
            backend: "192.0.2.1:1".into()
        }),
        Answer::Refused { .. }
    ));
}

#[test]
fn bans_and_their_story_outlive_the_worker() {
    let memory = rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&memory, 4 << 20).expect("its size");
    let (bad, good) = (closed(), echo());
    let again = memory.try_clone().expect("a second descriptor");
    let mut lb = Balancer::start_with(&[bad, good], "", Some(memory));
    for _ in 0..6 {
        talk(lb.connect());
    }
    assert_eq!(lb.status().frontends[0].backends[0].state, State::Banned);
    let before = lb.status().frontends[0].connections_total;
    lb.stop();
    let lb = Balancer::start_with(&[bad, good], "", Some(again));
    let status = lb.status();
    assert_eq!(status.frontends[0].backends[0].state, State::Banned);
    assert_eq!(status.frontends[0].connections_total, before);
    let Answer::Why { backends } = lb.ask(Request::Why {
        backend: bad.to_string(),
    }) else {
        panic!("an account")
    };
    assert!(backends[0].events.iter().any(|event| event.kind == EventKind::Ban));
}

#[test]
fn names_are_resolved_and_an_unresolvable_one_is_a_down_backend_not_a_failed_start() {
    let echo = echo();
    let text = |listen: SocketAddr| {
        format!(
            "[[frontend]]\nname='f'\nlisten=['{listen}']\nbackends=['cp1.test:{}', 'nowhere.test:6443']",
            echo.port()
        )
    };
    let address = free();
    let lb = Balancer::start_text(&text(address), address, None, b"127.0.0.1 cp1.test\n");
    lb.wait("the name resolves", |status| {
        status.frontends[0].backends.iter().any(|b| b.state == State::Healthy)
    });
    talk(lb.connect());
    assert!(
        lb.status().frontends[0]
            .backends
            .iter()
            .any(|b| b.state == State::Unresolved)
    );
}

#[test]
fn healthz_follows_the_api_backends() {
    let backend = echo();
    let (listen, health) = (free(), free());
    let text = |backend: SocketAddr| {
        format!(
            "health=['{health}']\n[[frontend]]\nname='api'\nkind='api'\nlisten=['{listen}']\nbackends=['{backend}', '{}']",
            closed()
        )
    };
    let lb = Balancer::start_text(&text(backend), listen, None, b"");
    let get = |path: &str| {
        let mut stream = TcpStream::connect(health).expect("the health endpoint");
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").expect("a request");
        String::from_utf8_lossy(&read_all(stream))
            .lines()
            .next()
            .unwrap_or_default()
            .to_owned()
    };
    assert_eq!(get("/healthz"), "HTTP/1.1 200 OK");
    assert_eq!(get("/else"), "HTTP/1.1 404 Not Found");
    lb.reload(&text(closed())).expect("good");
    wait("both are banned", || {
        let _ = lb.connect().read(&mut [0; 1]);
        get("/healthz") == "HTTP/1.1 503 Service Unavailable"
    });
}

/// A running balancer; stopped on drop.
struct Balancer {
    commands: mpsc::Sender<Command>,
    address: SocketAddr,
    thread: Option<thread::JoinHandle<()>>,
    commits: std::sync::Arc<std::sync::Mutex<Vec<(Drain, bool)>>>,
    hosts: Vec<u8>,
}

impl Balancer {
    fn start(backends: &[SocketAddr], more: &str) -> Self {
        Self::start_with(backends, more, None)
    }

    fn start_with(backends: &[SocketAddr], more: &str, state: Option<OwnedFd>) -> Self {
        let address = free();
        let backends: Vec<String> = backends.iter().map(|backend| format!("'{backend}'")).collect();
        let text = format!(
            "[[frontend]]\nname='f'\nlisten=['{address}']\nbackends=[{}]\n{more}",
            backends.join(",")
        );
        Self::start_text(&text, address, state, b"")
    }

    fn start_text(text: &str, address: SocketAddr, state: Option<OwnedFd>, hosts: &[u8]) -> Self {
        let (config, opened) = open(text, &[], hosts);
        let (commands, receiver) = mpsc::channel(8);
        let (commit_sender, mut commit_receiver) = mpsc::channel::<Commit>(8);
        let commits = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
        let log = commits.clone();
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async move {
                tokio::spawn(async move {
                    while let Some(commit) = commit_receiver.recv().await {
                        log.lock().expect("no panic").push((commit.drain, commit.set));
                        let _ = commit.done.send(Ok(()));
                    }
                });
                let links = Links {
                    commands: receiver,
                    commits: commit_sender,
                };
                lb::io::run(config, opened, Vec::new(), state, 2, links)
                    .await
                    .expect("it runs");
            });
        });
        Self {
            commands,
            address,
            thread: Some(thread),
            commits,
            hosts: hosts.to_vec(),
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("the listener");
        stream.set_read_timeout(Some(SOON)).expect("a timeout");
        stream
    }

    fn ask(&self, request: Request) -> Answer {
        let (reply, answer) = oneshot::channel();
        self.commands
            .blocking_send(Command::Ask { request, reply })
            .expect("it listens");
        answer.blocking_recv().expect("an answer")
    }

    fn status(&self) -> Status {
        match self.ask(Request::Status) {
            Answer::Status(status) => status,
            other => panic!("no status: {other:?}"),
        }
    }

    fn reload(&self, text: &str) -> Result<(), String> {
        let listening: Vec<SocketAddr> = self.status().frontends.iter().flat_map(|f| f.listen.clone()).collect();
        let (config, opened) = open(text, &listening, &self.hosts);
        let (done, answer) = oneshot::channel();
        self.commands
            .blocking_send(Command::Reload {
                config: Box::new(config),
                opened,
                done,
            })
            .expect("it listens");
        answer.blocking_recv().expect("an answer")
    }

    fn wait(&self, what: &str, mut condition: impl FnMut(&Status) -> bool) {
        wait(what, || condition(&self.status()));
    }

    fn commits(&self) -> Vec<(Drain, bool)> {
        self.commits.lock().expect("no panic").clone()
    }

    fn stop(&mut self) {
        let _ = self.commands.blocking_send(Command::Stop { grace: Duration::ZERO });
        if let Some(thread) = self.thread.take() {
            thread.join().expect("a clean end");
        }
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Parses, checks and opens as the supervisor does, but for the listeners it holds already.
fn open(text: &str, held: &[SocketAddr], hosts: &[u8]) -> (Config, Opened) {
    let config: Config = toml::from_str(text).expect("it parses");
    assert_eq!(config.check(), []);
    let mut opened = Opened {
        hosts: hosts.to_vec(),
        files: BTreeMap::new(),
        ..Opened::default()
    };
    for need in lb::needs(&config, 2) {
        if let What::Listener { address, copies } = need.what
            && !held.contains(&address)
        {
            let sockets = (0..copies)
                .map(|_| lb::io::socket::listener(address).expect("a free port"))
                .collect();
            opened.listeners.push((address, sockets));
        }
    }
    (config, opened)
}

/// A backend that serves each connection on a thread of its own until the test ends.
fn backend(serve: impl Fn(TcpStream) + Send + Clone + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address");
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let serve = serve.clone();
            thread::spawn(move || serve(stream));
        }
    });
    address
}

fn echo() -> SocketAddr {
    backend(|mut stream| {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = stream.read(&mut buffer) {
            let _ = stream.write_all(&buffer[..n]);
        }
    })
}

/// A backend that answers every byte with its mark.
fn marked(mark: u8) -> SocketAddr {
    backend(move |mut stream| {
        while let Ok(1..) = stream.read(&mut [0; 1]) {
            let _ = stream.write_all(&[mark]);
        }
    })
}

fn ask_mark(stream: &mut TcpStream) -> u8 {
    let mut mark = [0; 1];
    stream.set_read_timeout(Some(SOON)).expect("a timeout");
    stream.write_all(b"?").expect("alive");
    stream.read_exact(&mut mark).expect("an answer");
    mark[0]
}

fn talk(mut stream: TcpStream) {
    let mut answer = [0; 5];
    stream.write_all(b"hello").expect("alive");
    stream.read_exact(&mut answer).expect("an answer");
    assert_eq!(&answer, b"hello");
}

/// An address where nobody listens; a socket keeps it from being given to others for the rest of the test run.
fn closed() -> SocketAddr {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    socket
        .bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())
        .expect("a port");
    let address = socket
        .local_addr()
        .expect("its address")
        .as_socket()
        .expect("an IP address");
    std::mem::forget(socket);
    address
}

/// An address that is free at this moment, below the range the kernel hands out by itself.
fn free() -> SocketAddr {
    use std::sync::atomic::{AtomicU16, Ordering};
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = 20_000 + u16::try_from(std::process::id() % 50).expect("small") * 200;
    loop {
        let address = SocketAddr::from(([127, 0, 0, 1], start + NEXT.fetch_add(1, Ordering::Relaxed) % 200));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

fn reset(stream: TcpStream) {
    socket2::SockRef::from(&stream)
        .set_linger(Some(Duration::ZERO))
        .expect("linger");
}

fn read_all(mut stream: TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).expect("the bytes to their end");
    all
}

fn pattern(size: usize) -> Vec<u8> {
    (0..size)
        .map(|at| u8::try_from((at ^ (at >> 8) ^ (at >> 16)) & 0xff).expect("a byte"))
        .collect()
}

fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}
