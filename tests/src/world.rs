//! The small world of most scenarios: a client, an edge, and control planes behind it.

use std::net::SocketAddr;

use anyhow::Result;

use crate::{
    Lab, Node,
    backend::{Backend, Script},
};

/// The port of frontends and backends alike.
pub const PORT: u16 = 6443;

/// A client (fd00::2), an edge (fd00::10) and control planes cp1, cp2, ... (fd00::11, fd00::12, ...).
#[derive(Debug)]
pub struct World {
    /// Where clients are.
    pub client: Node,
    /// Where `edged` is to run.
    pub edge: Node,
    /// Where backends are to run.
    pub cp: Vec<Node>,
    /// All of it.
    pub lab: Lab,
}

impl World {
    /// A world with this many control planes, beside other labs.
    ///
    /// # Errors
    ///
    /// As [`Lab::new`].
    pub fn new(control_planes: u16) -> Result<Self> {
        Self::of(Lab::new()?, control_planes)
    }

    /// A world that has the machine for itself.
    ///
    /// # Errors
    ///
    /// As [`Lab::alone`].
    pub fn alone(control_planes: u16) -> Result<Self> {
        Self::of(Lab::alone()?, control_planes)
    }

    fn of(lab: Lab, control_planes: u16) -> Result<Self> {
        Ok(Self {
            client: lab.node("client", 2)?,
            edge: lab.node("edge", 10)?,
            cp: (1..=control_planes)
                .map(|n| lab.node(&format!("cp{n}"), 10 + n))
                .collect::<Result<_>>()?,
            lab,
        })
    }

    /// Where clients connect to: the edge's IPv6 address.
    pub fn front(&self) -> SocketAddr {
        self.edge.at(PORT)
    }

    /// Where the backend on control plane `index` (from 0) listens.
    pub fn back(&self, index: usize) -> SocketAddr {
        self.cp[index].at(PORT)
    }

    /// Starts a backend with `script` on control plane `index` (from 0).
    ///
    /// # Errors
    ///
    /// If its port is taken.
    pub fn backend(&self, index: usize, script: Script) -> Result<Backend> {
        Backend::start(&self.cp[index], PORT, script)
    }

    /// Starts an echo on every control plane.
    ///
    /// # Errors
    ///
    /// If a port is taken.
    pub fn echoes(&self) -> Result<Vec<Backend>> {
        (0..self.cp.len())
            .map(|index| self.backend(index, Script::Echo))
            .collect()
    }

    /// A configuration with one frontend, `api`, for all control planes; `keys` are further lines of the frontend, and
    /// may go on with tables below it.
    pub fn config(&self, keys: &str) -> String {
        let backends: Vec<String> = (0..self.cp.len())
            .map(|index| format!("\"{}\"", self.back(index)))
            .collect();
        format!(
            "version = 1\n\n[[lb.frontend]]\nname = \"api\"\nlisten = [\"{}\", \"{}\"]\nbackends = [{}]\n{keys}\n",
            self.front(),
            self.edge.at4(PORT),
            backends.join(", ")
        )
    }
}
