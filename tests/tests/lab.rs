//! The lab keeps its own promises; nothing of the appliance is in this file.
//!
//! ```text
//! client (fd00::2) ── hub ── server (fd00::11)
//! ```

use std::{
    io::{ErrorKind, Write},
    net::TcpStream,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Result, ensure};
use tests::{
    Lab,
    backend::{Backend, Script},
    etcd::Etcd,
    http,
    ingress::{HTTP, HTTPS, Ingress, Kind},
    load::{Load, Session},
    tls::Ca,
    wait_until,
};

const PORT: u16 = 6443;
const PATIENCE: Duration = Duration::from_secs(5);
/// How long nothing has to come.
const SILENCE: Duration = Duration::from_millis(500);

#[test]
fn a_black_hole_swallows_both_ways_and_only_for_its_node() -> Result<()> {
    let lab = Lab::new()?;
    let (client, other, server) = (lab.node("client", 2)?, lab.node("other", 3)?, lab.node("server", 11)?);
    let backend = Backend::start(&server, PORT, Script::Echo)?;
    let mut session = Session::open(&client, backend.address(), PATIENCE)?;
    let hole = client.blackhole(&[server.ip()])?;
    let begin = Instant::now();
    let error = Session::open(&client, backend.address(), SILENCE).expect_err("nothing comes through");
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(begin.elapsed() >= SILENCE);
    session.stream().set_read_timeout(Some(SILENCE))?;
    assert_eq!(
        session.echo().expect_err("nothing comes through").kind(),
        ErrorKind::WouldBlock
    );
    Session::open(&other, backend.address(), PATIENCE)?;
    hole.heal();
    Session::open(&client, backend.address(), PATIENCE)?;
    Ok(())
}

#[test]
fn loss_is_near_what_was_asked_for_each_way() -> Result<()> {
    let lab = Lab::new()?;
    let (client, server) = (lab.node("client", 2)?, lab.node("server", 11)?);
    let backend = Backend::start(&server, PORT, Script::Echo)?;
    let (mut sent, mut received) = (client.capture("tcp")?, server.capture("tcp")?);
    let _loss = client.lose(30, &[server.ip()])?;
    let load = Load::of_echoes(&client, backend.address(), 200, Duration::from_millis(800));
    wait_until("300 clients began", Duration::from_secs(10), || {
        backend.accepted().len() > 300
    })?;
    load.stop();
    let (sent, received) = (sent.so_far()?, received.so_far()?);
    for (from, to) in [(client.ip(), server.ip()), (server.ip(), client.ip())] {
        let count =
            |trace: &tests::capture::Trace| trace.filter(|packet| packet.from.ip() == from).packets.len() as f64;
        let lost = if to == server.ip() {
            1.0 - count(&received) / count(&sent)
        } else {
            1.0 - count(&sent) / count(&received)
        };
        assert!((0.2..0.4).contains(&lost), "{from} to {to}: {lost:.2} lost");
    }
    Ok(())
}

#[test]
fn an_ingress_of_either_kind_logs_what_a_header_says_and_complains_where_there_is_none() -> Result<()> {
    let lab = Lab::new()?;
    let (client, server, other) = (lab.node("client", 2)?, lab.node("server", 11)?, lab.node("other", 12)?);
    let files = Ca::new("lab")?
        .issue("lab", None, &[], &["lab.example.org"])?
        .write(&lab.dir().join("lab"))?;
    for (node, kind) in [(&server, Kind::Nginx), (&other, Kind::Haproxy)] {
        let ingress = Ingress::start(node, kind, &files, client.ip())?;
        for (path, header, told) in [
            (
                "/four",
                "PROXY TCP4 192.0.2.7 192.0.2.80 4711 80\r\n",
                ["192.0.2.7:4711", "192.0.2.80:80"],
            ),
            (
                "/six",
                "PROXY TCP6 2001:db8::7 2001:db8::80 4711 80\r\n",
                ["[2001:db8::7]:4711", "[2001:db8::80]:80"],
            ),
        ] {
            let mut stream = client.enter(|| TcpStream::connect_timeout(&node.at(HTTP), PATIENCE))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(header.as_bytes())?;
            let mut answer = http::request(stream, "GET", path, "lab.example.org", "")?;
            assert_eq!((answer.status, answer.text()?.as_str()), (200, node.name()));
            let seen = ingress.seen(path)?;
            assert_eq!(
                [seen.source, seen.destination].map(|end| end.to_string()),
                told,
                "{kind:?}"
            );
            assert_eq!(seen.client, seen.source.ip(), "{kind:?}");
        }
        assert!(ingress.complaints().is_empty(), "{kind:?}: {:?}", ingress.complaints());
        for port in [HTTP, HTTPS] {
            let mut stream = client.enter(|| TcpStream::connect_timeout(&node.at(port), PATIENCE))?;
            stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")?;
            wait_until("it complains", PATIENCE, || {
                ingress.complaints().len() == if port == HTTP { 1 } else { 2 }
            })?;
        }
    }
    Ok(())
}

#[test]
fn a_capture_tells_refused_accepted_and_reset_apart() -> Result<()> {
    let lab = Lab::new()?;
    let (client, server) = (lab.node("client", 2)?, lab.node("server", 11)?);
    let capture = client.capture(&format!("tcp port {PORT}"))?;
    let before = SystemTime::now();
    let refused = client
        .enter(|| TcpStream::connect(server.at(PORT)))
        .expect_err("nobody listens");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    let backend = Backend::start(&server, PORT, Script::Echo)?;
    let mut session = Session::open(&client, backend.address(), PATIENCE)?;
    let open = SystemTime::now();
    let local = session.local()?;
    drop(backend);
    let (_, reset) = session.cut(PATIENCE)?;
    assert!(reset, "a killed server's clients are reset");
    let flows = capture.stop()?.flows();
    assert_eq!(flows.len(), 2);
    assert!(flows[0].refused() && flows[0].opened >= before);
    assert!(!flows[1].refused() && flows[1].client == local && flows[1].open_at(open));
    let end = flows[1].ended.as_ref().expect("it was reset");
    assert!(end.reset && end.by == server.at(PORT));
    Ok(())
}

#[test]
fn nothing_of_a_lab_remains_after_a_panic() -> Result<()> {
    let mut seen = None;
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let lab = Lab::new().expect("root");
        let node = lab.node("node", 5).expect("a node");
        let mut sleep = node.command("sleep");
        sleep.arg("1000");
        let process = node.spawn("sleep", sleep).expect("sleep is everywhere");
        seen = Some((node.netns().name().to_owned(), lab.dir().to_owned(), process.pid()));
        // Not even the process's own drop is needed.
        std::mem::forget(process);
        panic!("as a failed assertion does");
    }));
    assert!(panicked.is_err());
    let (netns, dir, pid) = seen.expect("the lab was there");
    assert!(!Path::new("/run/netns").join(netns).exists());
    assert!(!dir.exists());
    // Forgotten, it is a zombie until this test ends; it runs no more.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    assert!(stat.is_empty() || stat.contains(") Z "), "{stat}");
    Ok(())
}

#[test]
fn three_etcd_members_serve_and_one_may_die() -> Result<()> {
    let lab = Lab::new()?;
    let mut etcd = Etcd::start(&lab, &[])?;
    let client = lab.node("client", 2)?;
    let leader = etcd.leader()?;
    let victim = (leader + 1) % 3;
    etcd.members[victim].kill();
    let target = etcd.members[leader].node.at(tests::etcd::CLIENT_PORT);
    let put = tests::edge::say(
        etcd.etcdctl(&client, target).args(["put", "a", "1"]),
        Duration::from_secs(10),
    )?;
    ensure!(put.code == Some(0), "{put}");
    etcd.members[victim].start()?;
    etcd.wait_until_serving(victim)
}
