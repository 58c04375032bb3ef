//! The lab: nodes in network namespaces around one bridge, and the order in which all of it goes away again.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex, Once,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rustix::fs::{FlockOperation, flock};

use crate::{
    netns::{self, Netns},
    process::Process,
    wait_until,
};

/// Where every node finds the others: a bridge that hands packets on, in a namespace of its own.
#[derive(Debug)]
pub(crate) struct Hub {
    pub(crate) netns: Netns,
}

/// Nodes around one bridge, unreachable from the machine's own network; removed on drop, also after a panic.
#[derive(Debug)]
pub struct Lab {
    // Dropped in this order: the nodes' namespaces with all processes in them, the hub's, the files, the lock.
    nodes: Mutex<BTreeMap<String, Node>>,
    hub: Arc<Hub>,
    prefix: String,
    dir: Dir,
    _turn: File,
}

/// A machine of the lab: one namespace with one interface, `eth0`. Cheap to clone; gone with its [`Lab`].
#[derive(Clone, Debug)]
pub struct Node(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    number: u16,
    netns: Netns,
    hub: Arc<Hub>,
    dir: PathBuf,
    serial: AtomicU32,
}

/// The lab's directory of logs, captures and configurations.
#[derive(Debug)]
struct Dir(PathBuf);

impl Lab {
    /// A lab that shares the machine with other labs.
    ///
    /// # Errors
    ///
    /// If this is not root or a tool is missing; the message says what to do.
    pub fn new() -> Result<Self> {
        Self::build(FlockOperation::LockShared)
    }

    /// A lab that waits until it is the only one on the machine, and keeps others waiting: for figures that a busy
    /// neighbour would spoil.
    ///
    /// # Errors
    ///
    /// As [`Lab::new`].
    pub fn alone() -> Result<Self> {
        Self::build(FlockOperation::LockExclusive)
    }

    fn build(turn: FlockOperation) -> Result<Self> {
        check_machine()?;
        let lock = lock_file("turn")?;
        flock(&lock, turn).context("waiting for a turn")?;
        sweep();
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("et-{}-{}", std::process::id(), SERIAL.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(&prefix);
        fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        let dir = Dir(dir);
        let netns = make(&format!("{prefix}-hub"))?;
        // Without snooping, neighbour discovery works from the first packet; without IPv6 the bridge itself stays silent.
        netns.ip(
            "link add br0 type bridge forward_delay 0 mcast_snooping 0\nlink set br0 addrgenmode none\nlink set br0 up",
        )?;
        let hub = Arc::new(Hub { netns });
        Ok(Self {
            nodes: Mutex::default(),
            hub,
            prefix,
            dir,
            _turn: lock,
        })
    }

    /// The node `name`, made when first asked for, with the addresses `fd00::NUMBER` (the decimal digits as they are)
    /// and `10.0.0.NUMBER`. A name has at most 12 characters.
    ///
    /// # Errors
    ///
    /// If the namespace or its link cannot be made.
    pub fn node(&self, name: &str, number: u16) -> Result<Node> {
        let mut nodes = self.nodes.lock().expect("no panic while it is held");
        if let Some(node) = nodes.get(name) {
            return Ok(node.clone());
        }
        ensure!((1..=254).contains(&number), "{number} is no node number");
        let netns = make(&format!("{}-{name}", self.prefix))?;
        let inner = Inner {
            name: name.to_owned(),
            number,
            netns,
            hub: Arc::clone(&self.hub),
            dir: self.dir.0.clone(),
            serial: AtomicU32::new(0),
        };
        let hub = &self.hub.netns;
        hub.ip(&format!(
            "link add {name} type veth peer name eth0 netns {}\n\
             link set {name} addrgenmode none\n\
             link set {name} master br0 up",
            inner.netns.name()
        ))?;
        let node = Node(Arc::new(inner));
        node.0.netns.ip(&format!(
            "addr add {}/64 dev eth0 nodad\naddr add {}/24 dev eth0\nlink set eth0 up",
            node.ip(),
            node.ip4()
        ))?;
        // The kernel tells the bridge of the new carrier when it sees fit, which may be a second later.
        wait_until(&format!("{name} is connected"), Duration::from_secs(5), || {
            let shown = netns::run(Command::new("ip").args(["-n", hub.name(), "-d", "link", "show", "dev", name]));
            shown.is_ok_and(|shown| shown.contains("state forwarding"))
        })?;
        nodes.insert(name.to_owned(), node.clone());
        Ok(node)
    }

    /// The lab's directory; gone with the lab.
    pub fn dir(&self) -> &Path {
        &self.dir.0
    }

    /// Makes Ctrl-C and SIGTERM remove every lab of this process before it ends. To be called before the first thread.
    pub fn clean_up_when_interrupted() {
        // SAFETY: plain system calls on a set that lives on this stack frame.
        let set = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGINT);
            libc::sigaddset(&raw mut set, libc::SIGTERM);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            set
        };
        thread::spawn(move || {
            let mut signal = 0;
            // SAFETY: `set` was initialised above; `signal` outlives the call.
            unsafe { libc::sigwait(&raw const set, &raw mut signal) };
            eprintln!("\ninterrupted: removing the namespaces");
            netns::close();
            remove(std::process::id());
            std::process::exit(128 + signal);
        });
    }
}

impl Node {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its IPv6 address.
    pub fn ip(&self) -> IpAddr {
        let text = format!("fd00::{}", self.0.number);
        text.parse::<Ipv6Addr>()
            .expect("decimal digits are hexadecimal digits")
            .into()
    }

    /// Its IPv4 address.
    pub fn ip4(&self) -> IpAddr {
        Ipv4Addr::from_bits(0x0a00_0000 + u32::from(self.0.number)).into()
    }

    /// `port` on its IPv6 address.
    pub fn at(&self, port: u16) -> SocketAddr {
        (self.ip(), port).into()
    }

    /// `port` on its IPv4 address.
    pub fn at4(&self, port: u16) -> SocketAddr {
        (self.ip4(), port).into()
    }

    /// Its namespace.
    pub fn netns(&self) -> &Netns {
        &self.0.netns
    }

    /// The hub's namespace, where this node's port carries the node's name.
    pub(crate) fn hub(&self) -> &Arc<Hub> {
        &self.0.hub
    }

    /// A command that will run on this node.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        self.0.netns.command(program)
    }

    /// Starts a command made by [`Node::command`]; its output goes to a file in the lab's directory.
    ///
    /// # Errors
    ///
    /// If the program cannot be started.
    pub fn spawn(&self, name: &str, command: Command) -> Result<Process> {
        Process::start(
            &format!("{name} on {}", self.0.name),
            command,
            &self.file(&format!("{name}.log")),
        )
    }

    /// Runs `work` on a thread of its own on this node; threads and sockets made there belong to the node.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.0.netns.enter(work)
    }

    /// A file of this node in the lab's directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.dir.join(format!("{}-{name}", self.0.name))
    }

    /// A file of this node that nobody else gets.
    pub fn fresh_file(&self, name: &str) -> PathBuf {
        self.file(&format!("{}-{name}", self.0.serial.fetch_add(1, Ordering::Relaxed)))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Clones of a node may still be about (a thread that panicked); the namespaces go nevertheless.
        let nodes = self
            .nodes
            .lock()
            .map(|mut nodes| std::mem::take(&mut *nodes))
            .unwrap_or_default();
        for node in nodes.values() {
            netns::delete(node.0.netns.name());
        }
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        if std::env::var_os("EDGE_LAB_KEEP").is_some() {
            eprintln!("kept: {}", self.0.display());
        } else {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

/// A namespace, made while no other process of ours makes one: the first `ip netns add` of a machine mounts
/// `/run/netns`, and two at once would mount it twice.
fn make(name: &str) -> Result<Netns> {
    let lock = lock_file("make")?;
    flock(&lock, FlockOperation::LockExclusive)?;
    Netns::create(name)
}

fn lock_file(name: &str) -> Result<File> {
    let path = std::env::temp_dir().join(format!("edge-tests.{name}.lock"));
    File::options()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| path.display().to_string())
}

/// Removes what earlier runs left that died without a chance to clean up.
fn sweep() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mut names = netns::list("et-");
        names.extend(labs_in_temp("et-"));
        let owners: BTreeSet<u32> = names.iter().filter_map(|name| owner(name)).collect();
        for pid in owners {
            // Nothing of this process exists yet, so its own number on a namespace is a predecessor's.
            if pid == std::process::id() || !lives(pid) {
                remove(pid);
            }
        }
    });
}

/// Whether a process still does something; one that has ended may wait long for a parent that does not ask.
fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state stands behind the name, which is in brackets and may hold anything.
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// The process that made the namespace `et-PID-SERIAL-NODE` or the directory `et-PID-SERIAL`.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix("et-")?.split('-').next()?.parse().ok()
}

/// Removes every lab of process `pid`: processes, namespaces, files.
fn remove(pid: u32) {
    let prefix = format!("et-{pid}-");
    for name in netns::list(&prefix) {
        netns::delete(&name);
    }
    for name in labs_in_temp(&prefix) {
        let _ = fs::remove_dir_all(std::env::temp_dir().join(name));
    }
}

/// The directories of labs whose names start with `prefix`.
fn labs_in_temp(prefix: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect()
}

/// Says what to do on a machine that cannot hold a lab.
fn check_machine() -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "these tests make network namespaces, which takes root; run as root: sudo scripts/test.sh"
    );
    for (tool, package) in [("ip", "iproute2"), ("nft", "nftables"), ("tcpdump", "tcpdump")] {
        need_tool(tool, package)?;
    }
    Ok(())
}

/// Fails with the package to install if `tool` is not on the PATH.
///
/// # Errors
///
/// If it is not.
pub fn need_tool(tool: &str, package: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Root's PATH in a container may lack the sbin folders, where nft and tcpdump live.
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    let found = folders.map(|folder| folder.join(tool)).find(|file| file.is_file());
    found.with_context(|| format!("{tool} is missing; as root: apt-get install {package}"))
}
