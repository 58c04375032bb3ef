//! The few words of rtnetlink(7) that a TUN device takes: up, its MTU, and what is sent into it.
//!
//! Each request is one message with an acknowledgement; nothing is listened to.

use std::{
    collections::BTreeSet,
    ffi::CString,
    io,
    net::Ipv4Addr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use ipnet::IpNet;

/// Octets of an answer: an error quotes the request, which is short.
const ANSWER: usize = 4096;
/// In IFLA_AF_SPEC of AF_INET6: how addresses are made, and that none are (linux/if_link.h).
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// A way to the kernel's routing tables.
pub(super) struct Netlink {
    socket: OwnedFd,
}

/// A network interface's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Interface(u32);

impl Interface {
    /// Of the interface called `name`.
    pub(super) fn named(name: &str) -> io::Result<Self> {
        let name = CString::new(name)?;
        // SAFETY: a string that ends with a zero and outlives the call.
        match unsafe { libc::if_nametoindex(name.as_ptr()) } {
            0 => Err(io::Error::last_os_error()),
            index => Ok(Self(index)),
        }
    }
}

/// IPv4 addresses of this machine's interfaces, in order; none if the kernel does not say.
pub(super) fn own_addresses() -> Vec<Ipv4Addr> {
    let mut first: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: the kernel's answer is put where the pointer says, or nothing is.
    if unsafe { libc::getifaddrs(&raw mut first) } != 0 {
        return Vec::new();
    }
    let mut addresses = BTreeSet::new();
    let mut next = first;
    // SAFETY: a list that ends with a null pointer, and is whole until it is freed below.
    while let Some(entry) = unsafe { next.as_ref() } {
        // SAFETY: null, or a socket address whose family says how long it is.
        if let Some(address) = unsafe { entry.ifa_addr.as_ref() }
            && libc::c_int::from(address.sa_family) == libc::AF_INET
        {
            // SAFETY: of this family all are of this shape.
            let address = unsafe { entry.ifa_addr.cast::<libc::sockaddr_in>().read_unaligned() };
            addresses.insert(Ipv4Addr::from_bits(u32::from_be(address.sin_addr.s_addr)));
        }
        next = entry.ifa_next;
    }
    // SAFETY: what getifaddrs gave, once.
    unsafe { libc::freeifaddrs(first) };
    addresses.into_iter().collect()
}

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        // SAFETY: no memory is passed.
        let raw = unsafe {
            libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                libc::NETLINK_ROUTE,
            )
        };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just opened, and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(raw) };
        Ok(Self { socket })
    }

    /// Takes `interface` up with an MTU, and without the addresses that IPv6 would give it by itself.
    pub(super) fn up(&self, interface: Interface, mtu: u32) -> io::Result<()> {
        let mode = attribute(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
        let family = attribute(libc::AF_INET6 as u16, &mode);
        let mut link = link(interface, 0);
        link.extend(attribute(libc::IFLA_MTU, &mtu.to_ne_bytes()));
        link.extend(attribute(libc::IFLA_AF_SPEC, &family));
        self.ask(libc::RTM_NEWLINK, 0, &link)?;
        self.ask(
            libc::RTM_NEWLINK,
            0,
            &self::link(interface, libc::IFF_UP.unsigned_abs()),
        )
    }

    /// Has packets to `network` sent into `interface`. With `replace` also if they go elsewhere already.
    ///
    /// # Errors
    ///
    /// `AlreadyExists` without `replace`, if they do.
    pub(super) fn add_route(&self, interface: Interface, network: IpNet, replace: bool) -> io::Result<()> {
        let exists = if replace { libc::NLM_F_REPLACE } else { libc::NLM_F_EXCL };
        self.ask(
            libc::RTM_NEWROUTE,
            libc::NLM_F_CREATE | exists,
            &route(interface, network, true),
        )
    }

    /// Has packets to `network` no longer sent into `interface`.
    pub(super) fn remove_route(&self, interface: Interface, network: IpNet) -> io::Result<()> {
        self.ask(libc::RTM_DELROUTE, 0, &route(interface, network, false))
    }

    /// One request, and what the kernel says to it.
    fn ask(&self, kind: u16, flags: libc::c_int, body: &[u8]) -> io::Result<()> {
        let flags = flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK;
        let length = u32::try_from(16 + body.len()).map_err(io::Error::other)?;
        let mut request = Vec::with_capacity(16 + body.len());
        request.extend(length.to_ne_bytes());
        request.extend(kind.to_ne_bytes());
        request.extend((flags as u16).to_ne_bytes());
        // Number and sender: there is one request at a time.
        request.extend([0; 8]);
        request.extend(body);
        // SAFETY: the kernel reads as many octets as there are.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut answer = [0_u8; ANSWER];
        // SAFETY: the kernel writes at most as many octets as there is room for.
        let length = unsafe { libc::recv(self.socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0) };
        let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
        let answer = answer.get(..length).unwrap_or_default();
        let is_error = answer.get(4..6) == Some(&(libc::NLMSG_ERROR as u16).to_ne_bytes());
        match answer.get(16..20).and_then(|word| word.first_chunk()) {
            Some(code) if is_error => match i32::from_ne_bytes(*code) {
                0 => Ok(()),
                code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
            },
            _ => Err(io::Error::other("the kernel's answer makes no sense")),
        }
    }
}

/// An attribute, padded to a multiple of 4.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut octets = Vec::with_capacity(value.len() + 8);
    octets.extend(length.to_ne_bytes());
    octets.extend(kind.to_ne_bytes());
    octets.extend(value);
    octets.resize(octets.len().next_multiple_of(4), 0);
    octets
}

/// struct ifinfomsg: which interface, and flags to be set.
fn link(interface: Interface, flags: u32) -> Vec<u8> {
    let words = [0, interface.0, flags, flags];
    words.into_iter().flat_map(u32::to_ne_bytes).collect()
}

/// struct rtmsg in the main table, and where to.
fn route(interface: Interface, network: IpNet, new: bool) -> Vec<u8> {
    let (family, address) = match network {
        IpNet::V4(net) => (libc::AF_INET, net.network().octets().to_vec()),
        IpNet::V6(net) => (libc::AF_INET6, net.network().octets().to_vec()),
    };
    let scope = match network {
        // Whatever it is.
        _ if !new => libc::RT_SCOPE_NOWHERE,
        IpNet::V4(_) => libc::RT_SCOPE_LINK,
        IpNet::V6(_) => libc::RT_SCOPE_UNIVERSE,
    };
    let protocol = if new { libc::RTPROT_STATIC } else { libc::RTPROT_UNSPEC };
    let mut octets = vec![
        family as u8,
        network.prefix_len(),
        0,
        0,
        libc::RT_TABLE_MAIN,
        protocol,
        scope,
        libc::RTN_UNICAST,
        0,
        0,
        0,
        0,
    ];
    octets.extend(attribute(libc::RTA_DST, &address));
    octets.extend(attribute(libc::RTA_OIF, &interface.0.to_ne_bytes()));
    octets
}
