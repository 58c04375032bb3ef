//! A scripted web server as a process of its own, for what only a process can suffer: being stopped.
//!
//! `backend NAME ADDRESS CERT KEY` answers `GET /readyz` with 200 and anything else with its name, until it is killed.

use anyhow::{Context, Result, bail};
use tests::{
    backend::{Backend, Readyz, Script},
    tls::Files,
};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, address, cert, key] = &arguments[..] else {
        bail!("usage: backend NAME ADDRESS CERT KEY");
    };
    let files = Files {
        cert: cert.into(),
        key: key.into(),
    };
    let address = address
        .parse()
        .with_context(|| format!("\"{address}\" is no address"))?;
    let _serving = Backend::start_here(name, address, Script::Https(files.server()?, Readyz::new(200)))?;
    loop {
        std::thread::park();
    }
}
