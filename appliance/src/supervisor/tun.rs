//! TUN devices: made, taken up, and sent into by routes; kept while a worker comes and goes.
//!
//! A device is there as long as somebody holds one of its queues, and its routes with it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::OwnedFd,
    sync::Arc,
};

use dns64::nat64::status::Offloads;
use ipnet::IpNet;

use super::{
    memory,
    netlink::{Interface, Netlink},
};

/// The largest that the kernel lets a TUN device have: the translator, which knows the networks behind it, tells senders
/// what is too long for them.
const MTU: u32 = 65_535;

/// Devices by name.
pub(super) type Tuns = BTreeMap<String, Tun>;

/// A device, and what the machine sends into it.
#[derive(Clone)]
pub(super) struct Tun {
    /// One for each thread.
    pub(super) queues: Vec<Arc<OwnedFd>>,
    /// What it leaves undone.
    pub(super) offloads: Offloads,
    /// Networks.
    pub(super) routes: BTreeSet<IpNet>,
    /// What a worker that reads from it remembers, and the next one goes on with.
    pub(super) memory: Arc<OwnedFd>,
}

impl Tun {
    /// Whether it is the same device, with whatever routes.
    pub(super) fn is(&self, other: &Self) -> bool {
        let pairs = self.queues.iter().zip(&other.queues);
        self.queues.len() == other.queues.len() && pairs.into_iter().all(|(a, b)| Arc::ptr_eq(a, b))
    }
}

impl PartialEq for Tun {
    fn eq(&self, other: &Self) -> bool {
        self.is(other) && self.routes == other.routes
    }
}

/// Makes the device `name` with so many octets of memory, or takes the one in `held`, and has `routes` sent into it. Those that `held` has and `routes` has
/// not are left for [`settle`].
///
/// # Errors
///
/// Cause and remedy; nothing is left behind.
pub(super) fn open(
    name: &str,
    queues: u16,
    routes: &BTreeSet<IpNet>,
    octets: u64,
    held: &Tuns,
) -> Result<Tun, (String, String)> {
    let (queues, offloads, memory) = match held.get(name) {
        Some(tun) => (tun.queues.clone(), tun.offloads, Arc::clone(&tun.memory)),
        None => {
            let (queues, offloads) = make(name, queues).map_err(|error| no_device(name, &error))?;
            let memory = memory::sealed("edged-nat64", octets).map_err(|error| no_device(name, &error))?;
            (queues, offloads, Arc::new(memory))
        }
    };
    let netlink = Netlink::open().map_err(|error| no_device(name, &error))?;
    let interface = Interface::named(name).map_err(|error| no_device(name, &error))?;
    let mut tun = Tun {
        queues,
        offloads,
        routes: BTreeSet::new(),
        memory,
    };
    for route in routes {
        let ours = held.values().any(|tun| tun.routes.contains(route));
        if let Err(error) = netlink.add_route(interface, *route, ours) {
            settle(&Tuns::from([(name.to_owned(), tun)]), held);
            return Err(no_route(name, *route, &error));
        }
        tun.routes.insert(*route);
    }
    Ok(tun)
}

/// Sends the networks of `to` into its devices, and those that only `from` has nowhere. What fails is told in the log.
pub(super) fn settle(from: &Tuns, to: &Tuns) {
    let (was, wanted) = (by_network(from), by_network(to));
    if was == wanted {
        return;
    }
    let netlink = match Netlink::open() {
        Ok(netlink) => netlink,
        Err(error) => return tracing::error!(%error, "routes cannot be changed"),
    };
    let route = |name: &str, network: IpNet, add: bool| {
        let done = Interface::named(name).and_then(|interface| match add {
            true => netlink.add_route(interface, network, true),
            false => netlink.remove_route(interface, network),
        });
        if let Err(error) = done
            && (add || error.kind() != io::ErrorKind::NotFound)
        {
            tracing::warn!(device = name, %network, add, %error, "a route was not changed");
        }
    };
    for (network, name) in &was {
        if !wanted.contains_key(network) {
            route(name, *network, false);
        }
    }
    for (network, name) in &wanted {
        if was.get(network) != Some(name) {
            route(name, *network, true);
        }
    }
}

fn by_network(tuns: &Tuns) -> BTreeMap<IpNet, &str> {
    let mut all = BTreeMap::new();
    for (name, tun) in tuns {
        all.extend(tun.routes.iter().map(|network| (*network, name.as_str())));
    }
    all
}

fn make(name: &str, queues: u16) -> io::Result<(Vec<Arc<OwnedFd>>, Offloads)> {
    // TUNSETIFF says of an interface that is no TUN device only that something is wrong.
    if Interface::named(name).is_ok() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    let device = dns64::io::tun::open(name, queues)?;
    Netlink::open()?.up(Interface::named(name)?, MTU)?;
    tracing::info!(device = name, queues = device.queues.len(), offloads = ?device.offloads, "TUN device made");
    tell_forwarding();
    Ok((device.queues.into_iter().map(Arc::new).collect(), device.offloads))
}

/// A translator between two networks is of no use on a machine that hands no packets on.
fn tell_forwarding() {
    for (file, key) in [
        ("/proc/sys/net/ipv4/ip_forward", "net.ipv4.ip_forward"),
        ("/proc/sys/net/ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding"),
    ] {
        // Where it cannot be read, the unit keeps it from this process.
        if std::fs::read_to_string(file).is_ok_and(|value| value.trim() == "0") {
            tracing::warn!("this machine hands no packets on, so NAT64 serves itself only; sysctl -w {key}=1");
        }
    }
}

fn no_device(name: &str, error: &io::Error) -> (String, String) {
    match error.raw_os_error() {
        _ if error.kind() == io::ErrorKind::AlreadyExists => exists(name),
        Some(libc::EBUSY) => exists(name),
        Some(libc::EPERM | libc::EACCES) => (
            format!(
                "the TUN device \"{name}\" takes the capability CAP_NET_ADMIN and /dev/net/tun, which edged does not have"
            ),
            "start it as its unit does: systemctl start edged; or as root; see: ls -l /dev/net/tun".into(),
        ),
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => (
            format!("this machine has no TUN devices ({error}), so there is no \"{name}\""),
            "load their module: modprobe tun; see: ls -l /dev/net/tun".into(),
        ),
        _ => (
            format!("the TUN device \"{name}\" cannot be made: {error}"),
            format!("see what there is: ip -d link show {name}; ls -l /dev/net/tun"),
        ),
    }
}

fn exists(name: &str) -> (String, String) {
    (
        format!("there is a network interface \"{name}\" already, which is not edged's"),
        format!("see it: ip -d link show {name}; then remove it, or write another name as device"),
    )
}

fn no_route(name: &str, route: IpNet, error: &io::Error) -> (String, String) {
    if error.kind() == io::ErrorKind::AlreadyExists {
        let version = if matches!(route, IpNet::V4(_)) { "-4" } else { "-6" };
        return (
            format!("packets to {route} go elsewhere already, so none would reach the translator"),
            format!("see where: ip {version} route show {route}; then remove that route, or write another network"),
        );
    }
    (
        format!("packets to {route} cannot be sent into \"{name}\": {error}"),
        format!("see its state: ip -d link show {name}; ip route show dev {name}"),
    )
}
