//! Whole packets into an interface and out of it, past the machine's own routing (packet(7)).

use std::{
    ffi::CString,
    io, mem,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use crate::Node;

/// The longest packet.
const LONGEST: usize = 65_600;

/// A packet socket on one interface of a node.
#[derive(Debug)]
pub struct PacketSocket {
    socket: OwnedFd,
    interface: libc::c_int,
}

impl PacketSocket {
    /// On the interface `name` of `node`, which must be there.
    ///
    /// # Errors
    ///
    /// If it is not.
    pub fn open(node: &Node, name: &str) -> Result<Self> {
        node.enter(|| Self::here(name))
            .with_context(|| format!("a packet socket on {name} of {}", node.name()))
    }

    fn here(name: &str) -> io::Result<Self> {
        let all = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: no memory is passed.
        let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, all.into()) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just opened, and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(raw) };
        let name = CString::new(name)?;
        // SAFETY: a string that ends with a zero.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        let interface = libc::c_int::try_from(index).map_err(io::Error::other)?;
        if interface == 0 {
            return Err(io::Error::last_os_error());
        }
        let address = address(interface, all);
        // SAFETY: the address is as long as it says.
        let bound = unsafe { libc::bind(raw, (&raw const address).cast(), LENGTH) };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { socket, interface })
    }

    /// Sends `packet`, IPv4 or IPv6 header first, out of the interface.
    ///
    /// # Errors
    ///
    /// What sendto(2) says.
    pub fn send(&self, packet: &[u8]) -> Result<()> {
        let protocol = match packet.first().map(|first| first >> 4) {
            Some(4) => libc::ETH_P_IP,
            _ => libc::ETH_P_IPV6,
        };
        let address = address(self.interface, (protocol as u16).to_be());
        // SAFETY: packet and address are as long as they say.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                0,
                (&raw const address).cast(),
                LENGTH,
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error()).context("a packet could not be sent");
        }
        Ok(())
    }

    /// The next packet that came in on the interface, if there is one `until` then.
    ///
    /// # Errors
    ///
    /// What recvfrom(2) says.
    pub fn receive(&self, until: Instant) -> Result<Option<Vec<u8>>> {
        let mut packet = vec![0; LONGEST];
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let mut wanted = libc::pollfd {
                fd: self.socket.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            let patience = libc::c_int::try_from(left.as_millis()).unwrap_or(libc::c_int::MAX);
            // SAFETY: one entry.
            if unsafe { libc::poll(&raw mut wanted, 1, patience) } == 0 {
                return Ok(None);
            }
            let mut from = address(0, 0);
            let mut length = LENGTH;
            // SAFETY: packet and address have the room that is said.
            let received = unsafe {
                libc::recvfrom(
                    self.socket.as_raw_fd(),
                    packet.as_mut_ptr().cast(),
                    packet.len(),
                    libc::MSG_DONTWAIT,
                    (&raw mut from).cast(),
                    &raw mut length,
                )
            };
            match usize::try_from(received) {
                // What went out passes here, too.
                Ok(_) if from.sll_pkttype == libc::PACKET_OUTGOING => {}
                Ok(received) => {
                    packet.truncate(received);
                    return Ok(Some(packet));
                }
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::WouldBlock => {}
                    error => return Err(error).context("no packet could be received"),
                },
            }
        }
    }

    /// Forgets what has come.
    ///
    /// # Errors
    ///
    /// As [`PacketSocket::receive`].
    pub fn drain(&self) -> Result<()> {
        while self.receive(Instant::now())?.is_some() {}
        Ok(())
    }

    /// The packets that come within `patience` and that `wanted` wants, until there are `count`.
    ///
    /// # Errors
    ///
    /// As [`PacketSocket::receive`].
    pub fn collect(&self, count: usize, patience: Duration, wanted: impl Fn(&[u8]) -> bool) -> Result<Vec<Vec<u8>>> {
        let until = Instant::now() + patience;
        let mut found = Vec::new();
        while found.len() < count {
            match self.receive(until)? {
                Some(packet) if wanted(&packet) => found.push(packet),
                Some(_) => {}
                None => break,
            }
        }
        Ok(found)
    }
}

const LENGTH: libc::socklen_t = mem::size_of::<libc::sockaddr_ll>() as libc::socklen_t;

fn address(interface: libc::c_int, protocol: u16) -> libc::sockaddr_ll {
    // SAFETY: plain old data, for which zeros are valid.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = interface;
    address
}
