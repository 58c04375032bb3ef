//! Active checks: what a backend answers decides what it gets.
//!
//! ```text
//! client ── hub ── edge: edged [::]:6443 ──┬── cp1 (fd00::11)   TLS server whose /readyz follows a script
//!                       checks every 100 ms└── cp2 (fd00::12)   TLS server that is always ready
//! ```

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustls::ClientConfig;
use tests::{
    Edge, World,
    backend::{Backend, Readyz, Script, is_reset},
    http,
    tls::{self, Ca, TlsStream},
    wait_until,
};

const PATIENCE: Duration = Duration::from_secs(15);

#[test]
fn answers_of_200_and_401_are_healthy_and_500_keeps_sessions_but_gets_none() -> Result<()> {
    let cluster = Cluster::start()?;
    let first = cluster.world.back(0);
    let mut session = cluster.session_on("cp1")?;
    for (status, state) in [
        (401, "healthy"),
        (500, "not-ready"),
        (200, "healthy"),
        (503, "not-ready"),
        (403, "healthy"),
    ] {
        cluster.readyz.set(status);
        cluster.edge.wait_for_state(first, state, PATIENCE)?;
        // Two more checks must not change it.
        let checks = cluster.backends[0].accepted().len();
        wait_until("two more checks", PATIENCE, || {
            cluster.backends[0].accepted().len() >= checks + 2
        })?;
        ensure!(cluster.edge.state(first)? == state, "{status} does not stay {state}");
        session = ask(session)
            .with_context(|| format!("a session on a backend that answers {status}"))?
            .0;
        let servers = cluster.servers(8)?;
        ensure!(
            servers.iter().any(|server| server == "cp1") == (state == "healthy"),
            "{status}: {servers:?}"
        );
    }
    Ok(())
}

#[test]
fn a_backend_that_hangs_is_down_and_its_sessions_are_reset() -> Result<()> {
    for hang in [Readyz::HANG, Readyz::HANG_AFTER_HANDSHAKE] {
        let cluster = Cluster::start()?;
        let mut session = cluster.session_on("cp1")?;
        cluster.readyz.set(hang);
        let took = cluster.edge.wait_for_state(cluster.world.back(0), "down", PATIENCE)?;
        println!("down after {took:?}");
        let begin = Instant::now();
        let error = io::copy(&mut session, &mut io::sink()).expect_err("the session is reset");
        ensure!(is_reset(&error), "{error}");
        ensure!(begin.elapsed() < Duration::from_secs(3), "after {:?}", begin.elapsed());
        assert_eq!(cluster.servers(6)?, ["cp2"; 6]);
        cluster.readyz.set(200);
        cluster
            .edge
            .wait_for_state(cluster.world.back(0), "healthy", PATIENCE)?;
    }
    Ok(())
}

#[test]
fn a_backend_with_a_certificate_of_another_authority_is_down() -> Result<()> {
    let mut cluster = Cluster::start()?;
    let first = cluster.world.back(0);
    let stranger = Ca::new("stranger")?;
    let identity = stranger.issue("cp1", None, &[cluster.world.cp[0].ip()], &[])?;
    cluster.backends.remove(0);
    let _impostor = cluster
        .world
        .backend(0, Script::Https(identity.server()?, Readyz::new(200)))?;
    cluster.edge.wait_for_state(first, "down", PATIENCE)?;
    let reason = cluster.edge.backend(first)?["reason"]
        .as_str()
        .unwrap_or_default()
        .to_lowercase();
    ensure!(
        reason.contains("certificate"),
        "the reason says what is wrong: {reason}"
    );
    assert_eq!(cluster.servers(6)?, ["cp2"; 6]);
    Ok(())
}

#[test]
fn a_tcp_check_finds_out_without_a_client() -> Result<()> {
    let world = World::new(2)?;
    let mut backends = world.echoes()?;
    let check = "kind = \"api\"\n[lb.frontend.health]\nactive = { kind = \"tcp\", interval = \"100ms\", timeout = \"1s\", rise = 2, fall = 3 }";
    let edge = Edge::start(&world.edge, &world.config(check))?;
    wait_until("five checks were accepted", PATIENCE, || {
        backends[0].accepted().len() >= 5
    })?;
    assert_eq!(edge.state(world.back(0))?, "healthy");
    drop(backends.remove(0));
    let down = edge.wait_for_state(world.back(0), "down", PATIENCE)?;
    assert_eq!(edge.state(world.back(1))?, "healthy");
    let _back = world.backend(0, Script::Echo)?;
    let up = edge.wait_for_state(world.back(0), "healthy", PATIENCE)?;
    println!("down after {down:?}, up after {up:?}");
    // Three checks 100 ms apart, spread by 20 %, two to come up; 2 s apart, as they are by themselves, it would be longer.
    let most = Duration::from_secs(3);
    assert!(down < most && up < most, "down {down:?}, up {up:?}");
    Ok(())
}

/// Two TLS servers behind an edge that checks them.
struct Cluster {
    backends: Vec<Backend>,
    readyz: Readyz,
    edge: Edge,
    client: Arc<ClientConfig>,
    world: World,
}

impl Cluster {
    fn start() -> Result<Self> {
        let world = World::new(2)?;
        let ca = Ca::new("cluster")?;
        let ca_file = world.lab.dir().join("ca.crt");
        ca.write(&ca_file)?;
        let readyz = Readyz::new(200);
        let mut backends = Vec::new();
        for (index, script) in [readyz.clone(), Readyz::new(200)].into_iter().enumerate() {
            let node = &world.cp[index];
            // Valid for the edge too: its clients see this certificate through it.
            let identity = ca.issue(node.name(), None, &[node.ip(), world.edge.ip()], &[])?;
            backends.push(world.backend(index, Script::Https(identity.server()?, script))?);
        }
        let keys = format!(
            "kind = \"api\"\n[lb.frontend.health]\nactive = {{ kind = \"https\", interval = \"100ms\", timeout = \"1s\", rise = 2, fall = 3, ca_file = \"{}\" }}",
            ca_file.display()
        );
        let edge = Edge::start(&world.edge, &world.config(&keys))?;
        let cluster = Self {
            backends,
            readyz,
            edge,
            client: ca.client(None)?,
            world,
        };
        for backend in &cluster.backends {
            let checked = || backend.accepted().len() >= 3;
            wait_until("three checks were made", PATIENCE, checked)?;
            cluster.edge.wait_for_state(backend.address(), "healthy", PATIENCE)?;
        }
        Ok(cluster)
    }

    /// A session served by `server` that has been quiet since its only answer.
    fn session_on(&self, server: &str) -> Result<TlsStream> {
        let mut others = Vec::new();
        loop {
            let (stream, name) = ask(self.connect()?)?;
            if name == server {
                return Ok(stream);
            }
            others.push(stream);
            ensure!(others.len() < 20, "{server} serves nobody");
        }
    }

    /// Who serves `count` new sessions that stay open together.
    fn servers(&self, count: usize) -> Result<Vec<String>> {
        let mut sessions = Vec::new();
        for _ in 0..count {
            sessions.push(ask(self.connect()?)?);
        }
        Ok(sessions.into_iter().map(|(_, name)| name).collect())
    }

    fn connect(&self) -> io::Result<TlsStream> {
        self.world
            .client
            .enter(|| tls::connect(self.world.front(), &self.client, PATIENCE))
    }
}

/// Asks who serves a session.
fn ask(stream: TlsStream) -> io::Result<(TlsStream, String)> {
    let mut response = http::request(stream, "GET", "/", "api", "")?;
    let name = response.text()?;
    Ok((response.into_stream(), name))
}
