//! What a balancer without code of its own costs: tokio's `copy_bidirectional`, a current-thread runtime and a
//! listener per core, backends in turn. No health, no timeouts, no limits.

use std::{net::SocketAddr, thread};

use anyhow::{Context, Result, anyhow, ensure};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    runtime,
    task::LocalSet,
};

use super::backend::listen;

/// `bench lb-peer-tokio LISTEN BACKEND...`
pub(crate) fn main(args: &[String]) -> Result<()> {
    let addresses: Vec<SocketAddr> = args
        .iter()
        .map(|arg| arg.parse().with_context(|| format!("\"{arg}\" is no address")))
        .collect::<Result<_>>()?;
    let (address, backends) = addresses
        .split_first()
        .context("lb-peer-tokio needs an address to listen on")?;
    ensure!(!backends.is_empty(), "lb-peer-tokio needs backends");
    let threads = thread::available_parallelism()?.get();
    let threads: Vec<_> = (0..threads)
        .map(|_| {
            let (listener, backends) = (listen(*address)?, backends.to_vec());
            Ok(thread::spawn(move || serve(listener.into(), &backends)))
        })
        .collect::<Result<_>>()?;
    threads
        .into_iter()
        .try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)
}

fn serve(listener: std::net::TcpListener, backends: &[SocketAddr]) -> Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async {
        let listener = TcpListener::from_std(listener)?;
        for backend in backends.iter().copied().cycle() {
            let (client, _) = listener.accept().await?;
            // A session that fails shows in the client, which counts what it misses.
            tokio::task::spawn_local(relay(client, backend));
        }
        Ok(())
    })
}

async fn relay(mut client: TcpStream, backend: SocketAddr) -> Result<()> {
    let mut server = TcpStream::connect(backend).await?;
    server.set_nodelay(true)?;
    copy_bidirectional(&mut client, &mut server).await?;
    Ok(())
}
