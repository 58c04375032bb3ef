//! The server behind the resolvers: one and the same for all, a process of its own, one thread, every answer computed from
//! its question.

use std::{
    net::{SocketAddr, UdpSocket},
    os::fd::AsFd,
    time::Duration,
};

use anyhow::{Context, Result};

use super::{
    batch::{Outgoing, Received},
    wire,
};

/// What it is asked for the number of queries it has had: no DNS message is as short.
const COUNT: &[u8] = b"count";

/// `bench dns-upstream ADDRESS`: answers until it is killed.
pub(crate) fn main(args: &[String]) -> Result<()> {
    let address: SocketAddr = args.first().context("dns-upstream needs an address")?.parse()?;
    let socket = UdpSocket::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    // A stall of ours would be a loss that is no resolver's.
    super::set_option(&socket, libc::SO_RCVBUFFORCE, 4 << 20)?;
    let (mut received, mut outgoing) = (Received::new(), Outgoing::new());
    let mut queries: u64 = 0;
    loop {
        for i in 0..received.receive(socket.as_fd()).context("receiving")? {
            let (query, from) = (received.datagram(i), received.address(i));
            if query == COUNT {
                outgoing.push(Some(from), |out| {
                    out[..8].copy_from_slice(&queries.to_be_bytes());
                    8
                });
                continue;
            }
            queries += 1;
            let mut answer = [0; wire::SIZE];
            if let Some(length) = wire::answer(query, &mut answer) {
                outgoing.push(Some(from), |out| {
                    *out = answer;
                    length
                });
            }
        }
        // Whoever asked may be gone.
        let _ = outgoing.send(socket.as_fd());
    }
}

/// The number of queries that the upstream at `address` has had.
pub(crate) fn queries(address: SocketAddr) -> Result<u64> {
    let socket = UdpSocket::bind("[::1]:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut count = [0; 8];
    socket.send_to(COUNT, address)?;
    socket.recv(&mut count).context("the upstream does not answer")?;
    Ok(u64::from_be_bytes(count))
}
