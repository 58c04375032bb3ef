//! The whole service on loopback: one `run` in a thread, clients and backends on std sockets.
//!
//! ```text
//! client (std) -> 127.0.0.1:P listener -> lb::io::run -> 127.0.0.1:B backends (std threads)
//! ```

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    sync::mpsc as std_mpsc,
    thread,
    time::{Duration, Instant},
};

use lb::{
    Config, What,
    io::{Command, Commit, Drain, Inheritance, Links, Opened, Part},
    status::{Answer, EventKind, Request, State, Status},
};
use tokio::sync::{mpsc, oneshot};

const SOON: Duration = Duration::from_secs(10);
/// A `connect_timeout` that nobody is to wait for, and so long that a machine that holds this process up cannot look like it.
const TIMEOUT: Duration = Duration::from_secs(4);

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
    let begun = Instant::now();
    client.shutdown(Shutdown::Write).expect("half-close");
    let error = client.read_exact(&mut [0]).expect_err("a reset, not an answer");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert!(begun.elapsed() >= Duration::from_millis(900), "{:?}", begun.elapsed());
}

#[test]
fn an_idle_session_is_closed_and_a_busy_one_is_not() {
    // Longer than this process may be held up: the busy one is not to look idle.
    let lb = Balancer::start(&[echo()], "idle_timeout = \"3s\"");
    let mut idle = lb.connect();
    let mut busy = lb.connect();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(4500) {
        busy.write_all(b"x").expect("alive");
        busy.read_exact(&mut [0; 1]).expect("alive");
        thread::sleep(Duration::from_millis(100));
    }
    let end = idle.read_exact(&mut [0]).expect_err("no byte");
    assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof, "closed for idleness");
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
    let error = client.read_exact(&mut [0]).expect_err("the backend's reset");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);

    let mut client = lb.connect();
    client.write_all(b"?").expect("a byte");
    lb.wait("the byte is through", |status| {
        status.frontends[0].backends[0].bytes_up_total == 2
    });
    reset(client);
    assert_eq!(
        resets.recv_timeout(SOON).expect("an end"),
        Err(io::ErrorKind::ConnectionReset)
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
    let lb = Balancer::start(&[closed(), closed()], "connect_timeout = '4s'");
    for _ in 0..5 {
        let begun = Instant::now();
        let error = lb
            .try_connect()
            .and_then(|mut stream| stream.read_exact(&mut [0]))
            .expect_err("a reset");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert!(begun.elapsed() < TIMEOUT, "{:?}", begun.elapsed());
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
        let _ = lb.try_connect().and_then(|mut stream| stream.read_exact(&mut [0]));
        get("/healthz") == "HTTP/1.1 503 Service Unavailable"
    });
}

#[test]
fn established_sessions_go_on_in_the_successor_byte_for_byte() {
    let flood = backend(|mut stream| {
        let mut size = [0; 4];
        if stream.read_exact(&mut size).is_ok() {
            let size = usize::try_from(u32::from_be_bytes(size)).expect("small");
            let _ = stream.write_all(&pattern(size));
            let mut all = Vec::new();
            let _ = stream.read_to_end(&mut all);
            let _ = stream.write_all(&u32::try_from(all.len()).expect("small").to_be_bytes());
        }
    });
    let mut old = Balancer::start(&[flood], "");
    let ask = |lb: &Balancer, size: u32| {
        let mut stream = lb.connect();
        stream.write_all(&size.to_be_bytes()).expect("alive");
        stream
    };
    // A stalled reader, whose bytes are on their way in buffers and pipes; one that has had its answer; one that has
    // said all and waits; one whose header is there and no more.
    let stalled = ask(&old, 9_000_000);
    let mut quiet = ask(&old, 3);
    let mut three = [0; 3];
    quiet.read_exact(&mut three).expect("an answer");
    let half = ask(&old, 6_000_000);
    half.shutdown(Shutdown::Write).expect("half-close");
    let begun = old.connect();
    let mut busy = ask(&old, 4_000_000);
    let (go_on, rest) = std_mpsc::channel();
    let reader = thread::spawn(move || {
        let mut got = vec![0; 4_000_000];
        for (index, chunk) in got.chunks_mut(50_000).enumerate() {
            if index == 40 {
                // Its second half is for the successor, however long that takes to come.
                let _ = rest.recv();
            }
            busy.read_exact(chunk).expect("alive");
            thread::sleep(Duration::from_millis(1));
        }
        busy.write_all(&pattern(700_000)).expect("alive");
        busy.shutdown(Shutdown::Write).expect("half-close");
        let mut count = [0; 4];
        busy.read_exact(&mut count).expect("the receipt");
        (got, u32::from_be_bytes(count))
    });
    old.wait("five sessions", |status| status.frontends[0].sessions == 5);
    old.wait("the bulk is under way", |status| {
        status.frontends[0].backends[0].bytes_down_total > 500_000
    });
    let before = old.status();

    let new = old.successor(usize::MAX).expect("it takes over");
    let after = new.status();
    assert_eq!(
        after.frontends[0].sessions, 5,
        "they are there from the first answer on"
    );
    assert_eq!(after.frontends[0].backends[0].sessions, 5);
    assert!(after.frontends[0].connections_total >= before.frontends[0].connections_total);
    assert!(after.frontends[0].backends[0].bytes_down_total >= before.frontends[0].backends[0].bytes_down_total);
    go_on.send(()).expect("it reads on");

    let mut size = begun;
    size.write_all(&7u32.to_be_bytes()).expect("alive");
    let mut seven = [0; 7];
    size.read_exact(&mut seven).expect("an answer");
    assert!(read_all(half) == [&pattern(6_000_000)[..], &0u32.to_be_bytes()].concat());
    quiet.write_all(b"more").expect("alive");
    quiet.shutdown(Shutdown::Write).expect("half-close");
    assert_eq!(read_all(quiet), 4u32.to_be_bytes());
    stalled.shutdown(Shutdown::Write).expect("half-close");
    let got = read_all(stalled);
    assert!(
        got == [&pattern(9_000_000)[..], &0u32.to_be_bytes()].concat(),
        "{}",
        got.len()
    );
    let (got, count) = reader.join().expect("it ends");
    assert!(got == pattern(4_000_000));
    assert_eq!(count, 700_000);
    drop(size);
    new.wait("sessions end", |status| status.frontends[0].sessions == 0);
    new.wait("and are counted down at their backend", |status| {
        status.frontends[0].backends[0].sessions == 0
    });
    talk_to(&new);
}

#[test]
fn a_successor_that_fails_at_any_part_leaves_everything_where_it_was() {
    let mut old = Balancer::start(&[echo()], "");
    let mut byte = [0; 1];
    // One after the other: the backend's queue is short.
    let mut streams: Vec<TcpStream> = (0..200)
        .map(|_| {
            let mut stream = old.connect();
            stream.write_all(b"a").expect("alive");
            stream.read_exact(&mut byte).expect("alive");
            stream
        })
        .collect();
    // Pools, the sessions of two threads, the end.
    for round in 0..4 {
        for stream in &mut streams {
            stream.write_all(&[round]).expect("alive");
            stream.read_exact(&mut byte).expect("alive");
            assert_eq!(byte, [round]);
        }
        let cut = usize::from(round);
        assert!(old.successor(cut).is_none(), "cut after {cut} parts");
        talk(old.connect());
    }
    old.wait("nothing is lost or doubled", |status| {
        status.frontends[0].sessions == 200
    });
    let new = old.successor(usize::MAX).expect("it takes over");
    for stream in &mut streams {
        stream.write_all(b"z").expect("alive");
        stream.read_exact(&mut byte).expect("alive");
        assert_eq!(&byte, b"z");
    }
    drop(streams);
    new.wait("sessions end", |status| status.frontends[0].sessions == 0);
}

#[test]
fn bans_and_drains_and_the_journal_are_known_to_the_successor() {
    let (up, down) = (echo(), closed());
    let mut old = Balancer::start(&[down, up], "balance = 'round-robin'");
    old.wait("banned", |status| {
        talk(old.connect());
        status.frontends[0].backends[0].state == State::Banned
    });
    let new = old.successor(usize::MAX).expect("it takes over");
    let status = new.status();
    assert_eq!(status.frontends[0].backends[0].state, State::Banned);
    let backend = down.to_string();
    match new.ask(Request::Why { backend }) {
        Answer::Why { backends } => {
            assert!(backends[0].events.iter().any(|event| event.kind == EventKind::Ban));
        }
        other => panic!("no answer: {other:?}"),
    }
}

#[test]
fn a_silent_backend_costs_a_client_the_hedge_and_no_more() {
    // Its queue is full, so the kernel drops what comes, as a black hole does.
    let (hole, _held) = full_listener();
    let lb = Balancer::start(&[hole, echo()], "balance = 'round-robin'\nconnect_timeout = '4s'");
    let mut longest = Duration::ZERO;
    for _ in 0..4 {
        let begun = Instant::now();
        talk(lb.connect());
        longest = longest.max(begun.elapsed());
    }
    assert!(longest >= Duration::from_millis(200), "none met the hole: {longest:?}");
    assert!(longest < TIMEOUT, "{longest:?}");
    lb.wait("the connect that never came is a failure all the same", |status| {
        status.frontends[0].backends[0].connect_failures_total >= 2
    });
    lb.wait("sessions end", |status| {
        status.frontends[0].backends.iter().all(|b| b.sessions == 0)
    });
}

#[test]
fn a_backend_gets_the_header_and_the_first_bytes_in_one_go_and_answers_come_back() {
    for (version, check) in [
        ("v1", b"PROXY TCP4 127.0.0.1 127.0.0.1 ".to_vec()),
        ("v2", b"\r\n\r\n\0\r\nQUIT\n\x21\x11".to_vec()),
    ] {
        let (sender, seen) = std_mpsc::channel();
        let server = backend(move |mut stream| {
            let mut buffer = [0; 2000];
            let read = stream.read(&mut buffer).expect("something");
            let _ = sender.send(buffer[..read].to_vec());
            let _ = stream.write_all(b"hello");
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        });
        let lb = Balancer::start(&[server], &format!("proxy_protocol = '{version}'"));
        let together = || {
            let mut client = lb.connect();
            // The backend has accepted long before; the header waits a moment for what it can travel with.
            thread::sleep(Duration::from_millis(10));
            client.write_all(b"GET /").expect("alive");
            let mut answer = [0; 5];
            client.read_exact(&mut answer).expect("an answer");
            assert_eq!(&answer, b"hello");
            let first = seen.recv_timeout(SOON).expect("it was served");
            assert!(first.starts_with(&check), "{version}: {first:?}");
            first.ends_with(b"GET /")
        };
        // A header rightly goes alone once that moment is over, which a client that is held up lets pass.
        let tries = (1..=10).find(|_| together()).expect("a header with its first bytes");
        let status = lb.status();
        assert_eq!(
            status.frontends[0].backends[0].bytes_up_total,
            5 * tries,
            "payload alone is counted"
        );
        // A client that waits for the server to speak first is announced all the same.
        let silent = lb.connect();
        let first = seen.recv_timeout(SOON).expect("it was served");
        assert!(first.starts_with(&check), "{version}: {first:?}");
        drop(silent);
    }
}

#[test]
fn a_trusted_header_names_the_client_and_anything_else_is_refused() {
    let (sender, seen) = std_mpsc::channel();
    let server = backend(move |mut stream| {
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all);
        let _ = sender.send(all);
    });
    let accept = "accept_proxy = { from = ['127.0.0.0/8'], timeout = '4s' }\nproxy_protocol = 'v1'";
    let mut lb = Balancer::start(&[server], accept);
    let send = |pieces: &[&[u8]]| {
        let mut stream = lb.try_connect()?;
        stream.set_nodelay(true).expect("nodelay");
        for piece in pieces {
            // Who is refused may be cut at any byte.
            if stream.write_all(piece).is_err() {
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
        let _ = stream.shutdown(Shutdown::Write);
        let mut all = Vec::new();
        stream.read_to_end(&mut all).map(|_| all)
    };
    let line: &[u8] = b"PROXY TCP6 2001:db8::7 2001:db8::1 4000 443\r\n";
    assert!(send(&[line, b"payload"]).is_ok());
    assert_eq!(seen.recv_timeout(SOON).expect("served"), [line, b"payload"].concat());
    let single: Vec<&[u8]> = line.chunks(1).collect();
    assert!(send(&single).is_ok());
    assert_eq!(seen.recv_timeout(SOON).expect("served"), line);
    // LOCAL: the connection speaks for itself.
    assert!(send(&[b"\r\n\r\n\0\r\nQUIT\n\x20\x00\0\0x"]).is_ok());
    assert!(
        seen.recv_timeout(SOON)
            .expect("served")
            .starts_with(b"PROXY TCP4 127.0.0.1 127.0.0.1 ")
    );
    for bad in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"PROXY TCP4 1.2.3.4 2001:db8::1 1 2\r\n",
        b"\r\n\r\n\0\r\nQUIT\n\x31\x11\0\0",
    ] {
        let _ = send(&[bad]);
    }
    let _ = send(&[b"PROXY TCP4 192.0.2"]);
    let begun = Instant::now();
    let mut slow = lb.connect();
    slow.write_all(b"PROXY").expect("alive");
    let end = slow.read_exact(&mut [0]).expect_err("no byte").kind();
    assert!(
        matches!(end, io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset),
        "cut at the deadline: {end}"
    );
    assert!(begun.elapsed() >= Duration::from_millis(3900), "{:?}", begun.elapsed());
    assert!(
        seen.recv_timeout(Duration::from_millis(200)).is_err(),
        "none of them reached the backend"
    );
    let text = format!(
        "[[frontend]]\nname='f'\nlisten=['{}']\nbackends=['{server}']\naccept_proxy = {{ from = ['192.0.2.0/24'] }}",
        lb.address
    );
    lb.reload(&text).expect("good");
    let _ = send(&[line]);
    assert!(
        seen.recv_timeout(Duration::from_millis(200)).is_err(),
        "an untrusted source"
    );
    lb.wait("sessions end", |status| status.frontends[0].sessions == 0);
    let refused = lb.status().frontends[0].refused;
    assert!(refused.proxy_header >= 3 && refused.proxy_untrusted == 1, "{refused:?}");
    let new = lb.successor(usize::MAX).expect("it takes over");
    assert_eq!(new.status().frontends[0].refused, refused);
}

/// One answer through the balancer from the backend of the hand-over's test.
fn talk_to(lb: &Balancer) {
    let mut stream = lb.connect();
    stream.write_all(&2u32.to_be_bytes()).expect("alive");
    stream.shutdown(Shutdown::Write).expect("half-close");
    assert_eq!(read_all(stream), [&pattern(2)[..], &0u32.to_be_bytes()].concat());
}

/// A listener that takes no more connections; they keep it that way.
fn full_listener() -> (SocketAddr, Vec<TcpStream>) {
    let (socket, address) = bound();
    socket.listen(0).expect("listening");
    std::mem::forget(socket);
    let (mut held, mut silent) = (Vec::new(), 0);
    // Who is held up finds a connection late that was there in time: once proves nothing.
    while silent < 3 {
        match TcpStream::connect_timeout(&address, Duration::from_millis(100)) {
            Ok(stream) => held.push(stream),
            Err(_) => silent += 1,
        }
    }
    (address, held)
}

/// A running balancer; stopped on drop.
struct Balancer {
    commands: mpsc::Sender<Command>,
    address: SocketAddr,
    thread: Option<thread::JoinHandle<()>>,
    commits: std::sync::Arc<std::sync::Mutex<Vec<(Drain, bool)>>>,
    hosts: Vec<u8>,
    text: String,
    /// As the supervisor keeps them.
    listeners: Vec<(SocketAddr, Vec<OwnedFd>)>,
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
        let mut lb = Self::run(config, opened, address, state, None);
        lb.text = text.to_owned();
        lb.hosts = hosts.to_vec();
        lb
    }

    /// Hands everything to a successor. The parts stop after `cut` of them; `None` = then nothing has been taken over.
    fn successor(&mut self, cut: usize) -> Option<Self> {
        let config: Config = toml::from_str(&self.text).expect("it parses");
        let opened = Opened {
            listeners: copies(&self.listeners),
            ..Opened::default()
        };
        let (to, mut from_old) = mpsc::channel::<Part>(1);
        let (to_new, parts) = mpsc::channel(1);
        let (commit, commits) = oneshot::channel();
        let (ready, is_ready) = oneshot::channel();
        let (go, committed) = oneshot::channel();
        let inheritance = Inheritance {
            parts,
            ready,
            committed,
        };
        let mut new = Self::run(config, opened, self.address, None, Some(inheritance));
        new.text.clone_from(&self.text);
        self.commands
            .blocking_send(Command::HandOver {
                parts: to,
                commit: commits,
            })
            .expect("it listens");
        let mut count = 0;
        while let Some(part) = from_old.blocking_recv() {
            if count == cut || to_new.blocking_send(part).is_err() {
                break;
            }
            count += 1;
        }
        drop((from_old, to_new));
        if is_ready.blocking_recv().is_err() {
            drop((commit, go));
            return None;
        }
        commit.send(()).expect("the old one waits");
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the old one ends");
        }
        go.send(()).expect("the new one waits");
        Some(new)
    }

    fn run(
        config: Config,
        opened: Opened,
        address: SocketAddr,
        state: Option<OwnedFd>,
        inheritance: Option<Inheritance>,
    ) -> Self {
        let listeners = copies(&opened.listeners);
        let inherits = inheritance.is_some();
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
                let ended = lb::io::run(config, opened, Vec::new(), state, 2, links, inheritance).await;
                // Who inherits may be let down.
                assert!(ended.is_ok() || inherits, "it runs: {ended:?}");
            });
        });
        Self {
            commands,
            address,
            thread: Some(thread),
            commits,
            hosts: Vec::new(),
            text: String::new(),
            listeners,
        }
    }

    fn connect(&self) -> TcpStream {
        self.try_connect().expect("the listener")
    }

    /// As [`Self::connect`], for sessions that end at once: such a reset may come before connecting returns. A signal ends
    /// reads with a time limit, which none but `read_exact` and `read_to_end` begin again (signal(7)).
    fn try_connect(&self) -> io::Result<TcpStream> {
        let stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(SOON)).expect("a timeout");
        Ok(stream)
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

fn copies(listeners: &[(SocketAddr, Vec<OwnedFd>)]) -> Vec<(SocketAddr, Vec<OwnedFd>)> {
    let copy = |socket: &OwnedFd| socket.try_clone().expect("a descriptor");
    listeners
        .iter()
        .map(|(address, sockets)| (*address, sockets.iter().map(copy).collect()))
        .collect()
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
    let (socket, address) = bound();
    std::mem::forget(socket);
    address
}

/// A socket that has a port and does not listen.
fn bound() -> (socket2::Socket, SocketAddr) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    socket
        .bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())
        .expect("a port");
    let address = socket.local_addr().expect("its address");
    (socket, address.as_socket().expect("an IP address"))
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
    let begun = Instant::now();
    loop {
        // Taken before the look: who was held up since the last one looks once more.
        let late = begun.elapsed() > SOON;
        if condition() {
            return;
        }
        assert!(!late, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}
