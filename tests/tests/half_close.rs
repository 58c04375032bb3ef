//! A client that is done talking may still listen.
//!
//! ```text
//! client ── hub ── edge: edged [::]:6443 ── cp1 (fd00::11)
//! ```

use std::{
    io::Write,
    net::{Shutdown, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use tests::{
    Edge, World,
    backend::Script,
    load::{Session, send_and_finish},
    tls::read_some,
    wait_until,
};

const PATIENCE: Duration = Duration::from_secs(5);

#[test]
fn an_answer_after_the_clients_end_arrives_whole() -> Result<()> {
    let world = World::new(1)?;
    let _edge = Edge::start(&world.edge, &world.config("kind = \"tcp\""))?;
    let backend = world.backend(0, Script::AnswerAtEnd)?;
    // One byte, a segment, a buffer, and more than the kernel holds, so that the relay has to wait for both sides.
    for length in [0, 1, 1448, 65_536, 20_000_003] {
        let bytes: Vec<u8> = (0..length as u32)
            .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect();
        let mut stream = connect(&world)?;
        let answer = send_and_finish(&mut stream, &bytes)?;
        ensure!(
            answer == bytes,
            "{} bytes came back of {length}, or others",
            answer.len()
        );
    }
    wait_until("every session has ended", PATIENCE, || backend.live() == 0)?;
    Ok(())
}

#[test]
fn a_server_that_is_done_first_is_heard_to_the_end() -> Result<()> {
    let world = World::new(1)?;
    let _edge = Edge::start(&world.edge, &world.config("kind = \"tcp\""))?;
    let _backend = world.backend(0, Script::Echo)?;
    let mut session = Session::open(&world.client, world.front(), PATIENCE)?;
    session.echo()?;
    session.stream().shutdown(Shutdown::Write)?;
    // The echo ends when its client does.
    let (_, reset) = session.cut(PATIENCE)?;
    assert!(!reset, "both sides were done: an end, not a reset");
    Ok(())
}

#[test]
fn a_half_closed_session_that_stays_silent_is_cut_after_half_close_timeout() -> Result<()> {
    let world = World::new(1)?;
    let _edge = Edge::start(
        &world.edge,
        &world.config("kind = \"tcp\"\nhalf_close_timeout = \"2s\""),
    )?;
    let backend = world.backend(0, Script::Mute)?;
    let mut stream = connect(&world)?;
    stream.write_all(b"anybody there?")?;
    // Quiet but open both ways: the half-close timer must not run yet.
    stream.set_read_timeout(Some(Duration::from_millis(2500)))?;
    let silence = read_some(&mut stream, &mut [0; 1]).expect_err("the backend is mute");
    ensure!(silence.kind() == std::io::ErrorKind::WouldBlock, "{silence}");
    stream.set_read_timeout(Some(2 * PATIENCE))?;
    stream.shutdown(Shutdown::Write)?;
    let begin = Instant::now();
    let cut = read_some(&mut stream, &mut [0; 1]);
    let took = begin.elapsed();
    ensure!(matches!(cut, Ok(0) | Err(_)), "{cut:?}");
    ensure!(
        (Duration::from_millis(1900)..Duration::from_secs(8)).contains(&took),
        "cut after {took:?}"
    );
    wait_until("the backend's session ends", PATIENCE, || backend.live() == 0)?;
    Ok(())
}

#[test]
fn a_slow_reader_gets_every_byte_after_the_server_has_closed() -> Result<()> {
    let world = World::new(1)?;
    let _edge = Edge::start(
        &world.edge,
        &world.config("kind = \"tcp\"\nhalf_close_timeout = \"4s\""),
    )?;
    let _backend = world.backend(0, Script::AnswerAtEnd)?;
    let bytes = vec![7; 30_000_000];
    let mut stream = connect(&world)?;
    let mut writer = stream.try_clone()?;
    let expected = bytes.len();
    let sender = thread::spawn(move || writer.write_all(&bytes).and_then(|()| writer.shutdown(Shutdown::Write)));
    sender.join().expect("no panic")?;
    // Slower than the timeout in all, never silent for as long as it.
    let begin = Instant::now();
    let mut buffer = vec![0; 1_000_000];
    let mut got = 0;
    loop {
        match read_some(&mut stream, &mut buffer)? {
            0 => break,
            count => got += count,
        }
        thread::sleep(Duration::from_millis(200));
    }
    ensure!(got == expected, "{got} of {expected} bytes");
    ensure!(
        begin.elapsed() > Duration::from_secs(4),
        "read too soon to show anything"
    );
    Ok(())
}

fn connect(world: &World) -> Result<TcpStream> {
    let stream = world
        .client
        .enter(|| TcpStream::connect_timeout(&world.front(), PATIENCE))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.set_write_timeout(Some(Duration::from_secs(20)))?;
    Ok(stream)
}
