//! Opens what a configuration needs, before any worker hears of it: what cannot be had is refused here, with its line.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::OpenOptions,
    io::{self, Read},
    net::{Ipv4Addr, SocketAddr},
    ops::Range,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use settings::{Need, What};
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    memory, netlink,
    tun::{self, Tun, Tuns},
};
use crate::{
    config::{self, Loaded},
    endpoint::{Endpoint, Transport},
    notify,
    worker::{
        Role,
        message::{self, Bytes, Service},
    },
};

/// Largest file a configuration may name: a CA bundle has 200 KiB.
const MOST: u64 = 1 << 20;

/// Bound sockets by place. Each is shared by whoever needs it and closed when the last one drops it.
pub(super) type Sockets = BTreeMap<Endpoint, Vec<Arc<OwnedFd>>>;

/// All that a worker is started with.
#[derive(Clone, Default, PartialEq)]
pub(super) struct Spec {
    /// The configuration's text.
    pub(super) text: Arc<str>,
    /// Data threads.
    pub(super) threads: u16,
    /// What it listens on.
    pub(super) sockets: SameSockets,
    /// The device that it reads packets from, by name.
    pub(super) tun: Option<(String, Tun)>,
    /// IPv4 addresses of this machine, for who must know them.
    pub(super) addresses: Vec<Ipv4Addr>,
    /// Content of the files that the configuration names.
    pub(super) files: BTreeMap<PathBuf, Bytes>,
    /// Content of /etc/resolv.conf.
    pub(super) resolv_conf: Bytes,
    /// Content of /etc/hosts.
    pub(super) hosts: Bytes,
    /// The bearer token of the metrics page.
    pub(super) token: Option<Bytes>,
}

/// [`Sockets`] that are equal if they are the same sockets.
#[derive(Clone, Default)]
pub(super) struct SameSockets(pub(super) Sockets);

impl PartialEq for SameSockets {
    fn eq(&self, other: &Self) -> bool {
        let same = |a: &Vec<Arc<OwnedFd>>, b: &Vec<Arc<OwnedFd>>| {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Arc::ptr_eq(a, b))
        };
        self.0.len() == other.0.len() && self.0.iter().zip(&other.0).all(|(a, b)| a.0 == b.0 && same(a.1, b.1))
    }
}

/// What one configuration needs, opened.
#[derive(PartialEq)]
pub(super) struct Opened {
    /// For the balancer.
    pub(super) lb: Spec,
    /// For the resolver, if there is one.
    pub(super) dns64: Option<Spec>,
    /// For the translator, if there is one.
    pub(super) nat64: Option<Spec>,
    /// For the metrics page, if there is one.
    pub(super) web: Option<Spec>,
}

impl Opened {
    /// For `role`, if it is to run.
    pub(super) fn spec(&self, role: Role) -> Option<&Spec> {
        match role {
            Role::Lb => Some(&self.lb),
            Role::Dns64 => self.dns64.as_ref(),
            Role::Nat64 => self.nat64.as_ref(),
            Role::Web => self.web.as_ref(),
        }
    }

    /// Every socket.
    pub(super) fn sockets(&self) -> Sockets {
        let specs = Role::ALL.into_iter().filter_map(|role| self.spec(role));
        specs.flat_map(|spec| spec.sockets.0.clone()).collect()
    }

    /// Every TUN device.
    pub(super) fn tuns(&self) -> Tuns {
        let specs = Role::ALL.into_iter().filter_map(|role| self.spec(role));
        specs.filter_map(|spec| spec.tun.clone()).collect()
    }
}

impl Spec {
    /// As a message, and the descriptors that go with it: of the listeners and the device that `before` does not have.
    pub(super) fn service(&self, before: Option<&Self>) -> (Service, Vec<Arc<OwnedFd>>) {
        let is_new = |place: &Endpoint| before.is_none_or(|before| !before.sockets.0.contains_key(place));
        let fresh: Vec<_> = self.sockets.0.iter().filter(|(place, _)| is_new(place)).collect();
        let had = before.and_then(|before| before.tun.as_ref());
        let tun = self.tun.as_ref().map(|(_, tun)| tun);
        let tun = tun.filter(|tun| had.is_none_or(|(_, had)| !had.is(tun)));
        let service = Service {
            text: self.text.to_string(),
            listeners: fresh
                .iter()
                .map(|(place, copies)| (**place, u16::try_from(copies.len()).unwrap_or(u16::MAX)))
                .collect(),
            files: self.files.clone(),
            resolv_conf: self.resolv_conf.clone(),
            hosts: self.hosts.clone(),
            tun: tun.map(|tun| message::Tun {
                queues: u16::try_from(tun.queues.len()).unwrap_or(u16::MAX),
                offloads: tun.offloads,
            }),
            addresses: self.addresses.clone(),
        };
        let memory = |tun: &Tun| Arc::clone(&tun.memory);
        let queues = tun
            .into_iter()
            .flat_map(|tun| tun.queues.iter().cloned().chain([memory(tun)]));
        let sockets = fresh.into_iter().flat_map(|(_, copies)| copies.clone());
        (service, sockets.chain(queues).collect())
    }
}

/// Opens everything `loaded` needs; sockets in `held` and devices in `tuns` are used again. `threads` is the number of data threads, which
/// stays as it was when the daemon started.
///
/// # Errors
///
/// Every need that cannot be met, with its place and its remedy. What was opened is closed again.
pub(super) fn open(loaded: &Loaded, threads: u16, held: &Sockets, tuns: &Tuns) -> Result<Opened, String> {
    let mut lb = loaded.config.lb.clone();
    lb.threads = None;
    let mut faults = Vec::new();
    let mut opening = Opening {
        loaded,
        held,
        tuns,
        opened: Sockets::new(),
        opened_tuns: Tuns::new(),
        faults: &mut faults,
    };
    let mut spec = Spec {
        text: loaded.text.as_str().into(),
        threads,
        ..Spec::default()
    };
    for need in lb::needs(&lb, threads) {
        opening.need(&need, &mut spec);
    }
    let dns64 = loaded.config.dns64.as_ref().map(|config| {
        let mut spec = Spec {
            text: loaded.text.as_str().into(),
            threads,
            ..Spec::default()
        };
        for need in dns64::needs(config, threads) {
            opening.need(&need, &mut spec);
        }
        spec
    });
    let nat64 = loaded.config.nat64.as_ref().map(|config| {
        let mut spec = Spec {
            text: loaded.text.as_str().into(),
            threads,
            ..Spec::default()
        };
        for need in config.needs(threads) {
            opening.need(&need, &mut spec);
        }
        spec.addresses = netlink::own_addresses();
        if config.mode.value == dns64::nat64::Mode::Stateful {
            opening.check_pool(config, &spec.addresses);
        }
        spec
    });
    spec.resolv_conf = Bytes(system_file("/etc/resolv.conf"));
    spec.hosts = Bytes(system_file("/etc/hosts"));
    let web = (!loaded.config.control.metrics.is_empty()).then(|| {
        let mut spec = Spec {
            text: loaded.text.as_str().into(),
            threads: 1,
            ..Spec::default()
        };
        for at in &loaded.config.control.metrics {
            let what = What::Listener {
                address: at.value,
                copies: 1,
            };
            opening.need(
                &Need {
                    what,
                    key: "control.metrics".into(),
                    span: at.span.clone(),
                },
                &mut spec,
            );
        }
        spec
    });
    let opened_tuns = opening.opened_tuns;
    let mut opened = Opened {
        lb: spec,
        dns64,
        nat64,
        web,
    };
    match loaded.secrets() {
        Ok(secrets) => {
            if let Some(web) = &mut opened.web {
                web.token = secrets.metrics_token.map(Bytes);
            }
        }
        Err(faulty) => faults.push(faulty.to_string()),
    }
    if faults.is_empty() {
        Ok(opened)
    } else {
        tun::settle(&opened_tuns, tuns);
        Err(faults.join("\n\n"))
    }
}

struct Opening<'a> {
    loaded: &'a Loaded,
    held: &'a Sockets,
    tuns: &'a Tuns,
    opened: Sockets,
    opened_tuns: Tuns,
    faults: &'a mut Vec<String>,
}

impl Opening<'_> {
    /// A packet to an address of this machine goes nowhere else.
    fn check_pool(&mut self, config: &dns64::nat64::Config, own: &[Ipv4Addr]) {
        for at in config.pool.iter().filter(|at| own.contains(&at.address)) {
            let message = format!(
                "{} is an address of this machine itself, so its packets never reach the translator",
                at.address
            );
            let help =
                "write an address that is routed to this machine and is on none of its interfaces; see: ip -4 address";
            self.fault(at.span.clone(), &message, help);
        }
    }

    fn need(&mut self, need: &Need, spec: &mut Spec) {
        match &need.what {
            What::Listener { address, copies } => self.socket(need, Endpoint::tcp(*address), *copies, spec),
            What::Datagrams { address, copies } => self.socket(need, Endpoint::udp(*address), *copies, spec),
            What::Tun {
                name,
                queues,
                routes,
                memory,
            } => match tun::open(name, *queues, routes, *memory, self.tuns) {
                Ok(tun) => {
                    self.opened_tuns.insert(name.clone(), tun.clone());
                    spec.tun = Some((name.clone(), tun));
                }
                Err((message, help)) => self.fault(need.span.clone(), &message, &help),
            },
            What::File(path) => match read_file(path) {
                Ok(content) => {
                    if let Err(error) = lb::io::check_file(&content) {
                        let message = format!("{} {error}", path.display());
                        self.fault(
                            need.span.clone(),
                            &message,
                            &format!("{} names the CA to use", need.key),
                        );
                    }
                    spec.files.insert(path.clone(), Bytes(content));
                }
                Err(error) => {
                    let message = format!("{} cannot be read: {error}", path.display());
                    let help = format!("edged reads it as its own user; look at: ls -l {}", path.display());
                    self.fault(need.span.clone(), &message, &help);
                }
            },
        }
    }

    fn socket(&mut self, need: &Need, place: Endpoint, copies: u16, spec: &mut Spec) {
        match self.bound(place, usize::from(copies)) {
            Ok(sockets) => {
                self.opened.insert(place, sockets.clone());
                spec.sockets.0.insert(place, sockets);
            }
            Err(error) => {
                let (message, help) = cannot_listen(place, &error);
                self.fault(need.span.clone(), &message, &help);
            }
        }
    }

    fn fault(&mut self, span: Range<usize>, message: &str, help: &str) {
        self.faults.push(config::render(
            &self.loaded.text,
            &self.loaded.origin,
            span,
            message,
            help,
        ));
    }

    fn bound(&self, place: Endpoint, copies: usize) -> io::Result<Vec<Arc<OwnedFd>>> {
        let mut sockets: Vec<_> = self.held.get(&place).cloned().unwrap_or_default();
        // A socket that nobody reads from would swallow its share of what comes.
        sockets.truncate(copies);
        // SO_REUSEPORT would let us in beside another process of our user, so first without it; unless the other one
        // is us.
        let ours = self
            .held
            .keys()
            .chain(self.opened.keys())
            .any(|other| overlap(*other, place));
        if sockets.len() < copies && !ours {
            probe(place)?;
        }
        while sockets.len() < copies {
            let socket = match place.transport {
                Transport::Tcp => lb::io::socket::listener(place.address)?,
                Transport::Udp => dns64::io::udp::bound(place.address)?,
            };
            sockets.push(Arc::new(socket));
        }
        Ok(sockets)
    }
}

/// Whether one of two sockets would keep the other from binding.
fn overlap(a: Endpoint, b: Endpoint) -> bool {
    if a.transport != b.transport {
        return false;
    }
    let (a, b) = (a.address, b.address);
    a.port() == b.port()
        && a.is_ipv4() == b.is_ipv4()
        && (a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified())
}

/// Finds out whether another process has `place`.
fn probe(place: Endpoint) -> io::Result<()> {
    let (kind, protocol) = match place.transport {
        Transport::Tcp => (Type::STREAM, Protocol::TCP),
        Transport::Udp => (Type::DGRAM, Protocol::UDP),
    };
    let socket = Socket::new(Domain::for_address(place.address), kind, Some(protocol))?;
    if place.address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if place.transport == Transport::Tcp {
        // For connections of an earlier run that have not quite ended; it does not help against a listener.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&place.address.into())
}

/// Cause and remedy of a listener that cannot be had.
fn cannot_listen(place: Endpoint, error: &io::Error) -> (String, String) {
    let address = place.address;
    let port = address.port();
    let flags = match place.transport {
        Transport::Tcp => "-Htlnp",
        Transport::Udp => "-Hulnp",
    };
    match error.kind() {
        io::ErrorKind::AddrInUse => (
            format!("{address} is in use by another process, so edged cannot listen there"),
            format!("see which one: ss {flags} 'sport = :{port}'; then stop it, or write another address or port"),
        ),
        io::ErrorKind::AddrNotAvailable => (
            format!(
                "{} is no address of this machine, so edged cannot listen there",
                address.ip()
            ),
            "see its addresses: ip -brief address; write one of them, or [::] and 0.0.0.0 for all".into(),
        ),
        io::ErrorKind::PermissionDenied => (
            format!("port {port} takes the capability CAP_NET_BIND_SERVICE, which edged does not have"),
            "start it as its unit does: systemctl start edged; or as root; or write a port from 1024 up".into(),
        ),
        _ => (
            format!("edged cannot listen on {address}: {error}"),
            "see the limits of the unit: systemctl show edged -p LimitNOFILE,IPAddressDeny".into(),
        ),
    }
}

/// The configuration file.
///
/// # Errors
///
/// Cause, effect, next command.
pub(super) fn read_config(path: &Path) -> Result<String, String> {
    let text = read_file(path)
        .and_then(|content| String::from_utf8(content).map_err(|_| io::Error::other("it is not UTF-8 text")));
    text.map_err(|error| {
        let path = path.display();
        if error.kind() == io::ErrorKind::NotFound {
            return format!(
                "there is no configuration: {path} does not exist, so there is nothing to serve\n\
                 write one, check it with: edgectl config check {path}; then: systemctl restart edged"
            );
        }
        format!("the configuration {path} cannot be read: {error}; look at: ls -l {path}")
    })
}

/// A regular file of at most [`MOST`] bytes. A pipe that nobody writes to must not stop the daemon.
fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut content = Vec::new();
    file.take(MOST + 1).read_to_end(&mut content)?;
    if content.len() as u64 > MOST {
        return Err(io::Error::other("it is larger than 1 MiB"));
    }
    Ok(content)
}

/// Empty if there is none: names are then not resolved.
fn system_file(path: &str) -> Vec<u8> {
    read_file(Path::new(path)).unwrap_or_default()
}

/// What a service manager kept for this process, by what it really is.
#[derive(Default)]
pub(super) struct Adopted {
    /// Sockets by the place they have.
    pub(super) sockets: Sockets,
    /// The state memory, known by its seals.
    pub(super) state: Option<OwnedFd>,
    /// How many came under each name.
    names: BTreeMap<String, usize>,
    /// Names under which something came that does not belong there.
    wrong: BTreeSet<String>,
}

/// Sorts what a service manager kept. What is of no use is closed.
pub(super) fn adopt(descriptors: Vec<(String, OwnedFd)>) -> Adopted {
    let mut adopted = Adopted::default();
    for (name, descriptor) in descriptors {
        let belongs = if let Some(place) = bound_to(&descriptor) {
            adopted.sockets.entry(place).or_default().push(Arc::new(descriptor));
            Some(notify::name_of(place))
        } else if adopted.state.is_none() && memory::is_ours(&descriptor) {
            adopted.state = Some(descriptor);
            Some(notify::STATE.to_owned())
        } else {
            tracing::warn!(
                name,
                "a descriptor the service manager passed is of no use here and closed"
            );
            None
        };
        if belongs.as_ref() != Some(&name) {
            adopted.wrong.insert(name.clone());
        }
        *adopted.names.entry(name).or_default() += 1;
    }
    adopted
}

impl Adopted {
    /// Names whose content in the store is not what `sockets` has: to be removed there, and stored again. Only those:
    /// a supervisor that dies in between loses what it has just removed.
    pub(super) fn stale(&self, sockets: &Sockets) -> Vec<String> {
        let kept = |name: &str| match sockets.iter().find(|(place, _)| notify::name_of(**place) == name) {
            Some((_, copies)) => copies.len(),
            None => usize::from(name == notify::STATE),
        };
        let stale = self
            .names
            .iter()
            .filter(|(name, count)| self.wrong.contains(*name) || kept(name) < **count);
        stale.map(|(name, _)| name.clone()).collect()
    }
}

/// Where `descriptor` is bound, if it is a TCP listener or a UDP socket that can be shared with further ones.
fn bound_to(descriptor: &OwnedFd) -> Option<Endpoint> {
    use rustix::net::{SocketType, sockopt};
    let socket = descriptor.as_fd();
    if !sockopt::socket_reuseport(socket).ok()? {
        return None;
    }
    let address = SocketAddr::try_from(rustix::net::getsockname(socket).ok()?).ok()?;
    match sockopt::socket_type(socket).ok()? {
        SocketType::STREAM if sockopt::socket_acceptconn(socket).ok()? => {
            rustix::io::ioctl_fionbio(socket, true).ok()?;
            Some(Endpoint::tcp(address))
        }
        // Left as it is: a worker's thread may be reading from it.
        SocketType::DGRAM if address.port() != 0 => Some(Endpoint::udp(address)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn loaded(text: &str) -> Loaded {
        config::load(text, "/etc/edged/edged.toml").expect("the example is good")
    }

    fn free() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0")
            .expect("bound")
            .local_addr()
            .expect("an address")
    }

    fn text(listen: SocketAddr) -> String {
        format!(
            "version = 1\n[control]\nmetrics = []\n[[lb.frontend]]\nname = \"api\"\nlisten = [\"{listen}\"]\nbackends = [\"192.0.2.1:6443\"]\n"
        )
    }

    #[test]
    fn a_listener_has_a_socket_per_thread_and_keeps_them() {
        let address = free();
        let first = open(&loaded(&text(address)), 3, &Sockets::new(), &Tuns::new()).expect("opened");
        assert_eq!(first.lb.sockets.0[&Endpoint::tcp(address)].len(), 3);
        let again = open(&loaded(&text(address)), 3, &first.sockets(), &Tuns::new()).expect("opened");
        assert!(again.lb == first.lb);
    }

    #[test]
    fn an_address_in_use_is_refused_with_its_line() {
        let other = TcpListener::bind("127.0.0.1:0").expect("bound");
        let address = other.local_addr().expect("an address");
        let message = open(&loaded(&text(address)), 1, &Sockets::new(), &Tuns::new())
            .err()
            .expect("refused");
        assert!(message.starts_with("/etc/edged/edged.toml:6:11: "), "{message}");
        assert!(
            message.contains("in use by another process") && message.contains("^^^^"),
            "{message}"
        );
        assert!(message.contains(&format!("sport = :{}", address.port())), "{message}");
    }

    #[test]
    fn another_process_that_shares_its_port_is_still_another() {
        let address = free();
        let _theirs = lb::io::socket::listener(address).expect("bound");
        assert!(open(&loaded(&text(address)), 1, &Sockets::new(), &Tuns::new()).is_err());
    }

    #[test]
    fn an_address_of_another_machine_is_refused_with_its_line() {
        let message = open(
            &loaded(&text("192.0.2.7:6443".parse().expect("an address"))),
            1,
            &Sockets::new(),
            &Tuns::new(),
        )
        .err()
        .expect("refused");
        assert!(
            message.contains("edged.toml:6:11: 192.0.2.7 is no address of this machine"),
            "{message}"
        );
    }

    #[test]
    fn every_fault_is_told_at_once() {
        let text = text("192.0.2.7:6443".parse().expect("an address"))
            + "[lb.frontend.health]\nactive = { kind = \"https\", ca_file = \"/nonexistent/ca.crt\" }\n";
        let message = open(&loaded(&text), 1, &Sockets::new(), &Tuns::new())
            .err()
            .expect("refused");
        assert!(message.contains("no address of this machine"), "{message}");
        assert!(
            message.contains("edged.toml:9:38: /nonexistent/ca.crt cannot be read"),
            "{message}"
        );
    }

    #[test]
    fn a_pipe_is_no_file() {
        let path = std::env::temp_dir().join(format!("edged-fifo-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .expect("a pipe");
        assert!(read_file(&path).expect_err("refused").to_string().contains("regular"));
        let _ = std::fs::remove_file(&path);
    }

    #[test]
    fn only_listeners_and_the_state_memory_are_adopted() {
        let address = free();
        let listener = lb::io::socket::listener(address).expect("bound");
        let unshared = TcpListener::bind("127.0.0.1:0").expect("bound");
        let memory = memory::create().expect("memory");
        let null = std::fs::File::open("/dev/null").expect("/dev/null");
        let adopted = adopt(vec![
            ("lb-state".into(), null.into()),
            ("wrong name".into(), listener),
            ("unshared".into(), unshared.into()),
            ("x".into(), memory),
        ]);
        assert_eq!(
            adopted.sockets.keys().copied().collect::<Vec<_>>(),
            [Endpoint::tcp(address)]
        );
        assert!(adopted.state.is_some());
        assert_eq!(
            adopted.stale(&adopted.sockets),
            ["lb-state", "unshared", "wrong name", "x"]
        );
    }

    #[test]
    fn what_is_kept_as_it_should_be_is_not_touched_in_the_store() {
        let (address, other) = (free(), free());
        let name = notify::name_of(Endpoint::tcp(address));
        let passed = |copies: usize| {
            let mut passed: Vec<_> = (0..copies)
                .map(|_| (name.clone(), lb::io::socket::listener(address).expect("bound")))
                .collect();
            passed.push((notify::STATE.into(), memory::create().expect("memory")));
            passed.push((
                notify::name_of(Endpoint::tcp(other)),
                lb::io::socket::listener(other).expect("bound"),
            ));
            adopt(passed)
        };
        let adopted = passed(2);
        assert_eq!(adopted.stale(&adopted.sockets), Vec::<String>::new());
        let opened = open(&loaded(&text(address)), 2, &adopted.sockets, &Tuns::new()).expect("opened");
        assert_eq!(
            adopted.stale(&opened.sockets()),
            [notify::name_of(Endpoint::tcp(other))]
        );
        let fewer = open(&loaded(&text(address)), 1, &adopted.sockets, &Tuns::new()).expect("opened");
        let mut stale = vec![name, notify::name_of(Endpoint::tcp(other))];
        stale.sort();
        assert_eq!(adopted.stale(&fewer.sockets()), stale);
    }
}
