//! What the service manager is told and what it keeps: the protocol of sd_notify(3) and sd_pid_notify_with_fds(3).
//!
//! Without a manager (`NOTIFY_SOCKET` is not set) every call does nothing. A manager that does not read is waited for
//! at most a second per message, and told in the log.

use std::{
    ffi::OsString,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    time::Duration,
};

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    sockopt::Timeout,
};

use crate::{channel, endpoint::Endpoint};

/// Most descriptors of one message (SCM_MAX_FD).
const MOST: usize = 253;
const PATIENCE: Duration = Duration::from_secs(1);

/// The name of the balancer's state memory in the descriptor store.
pub const STATE: &str = "lb-state";

/// The way to the service manager.
#[derive(Debug, Default)]
pub struct Notify {
    manager: Option<(OwnedFd, SocketAddrUnix)>,
    watchdog: Option<Duration>,
}

/// What the manager passed at start.
#[derive(Debug, Default)]
pub struct Environment {
    socket: Option<OsString>,
    watchdog_usec: Option<OsString>,
    watchdog_pid: Option<OsString>,
    /// Descriptors of the store or of socket units, with their names.
    pub descriptors: Vec<(String, OwnedFd)>,
}

/// Takes everything the manager passed out of the environment. To be called first of all in the process.
pub fn environment() -> Environment {
    let names = [
        "LISTEN_PID",
        "LISTEN_FDS",
        "LISTEN_FDNAMES",
        "LISTEN_PIDFDID",
        "NOTIFY_SOCKET",
        "WATCHDOG_USEC",
        "WATCHDOG_PID",
    ];
    let [pid, count, names, _, socket, watchdog_usec, watchdog_pid] = channel::take_variables(names);
    let number = |value: Option<OsString>| value.and_then(|value| value.into_string().ok()?.parse::<u32>().ok());
    let mut descriptors = Vec::new();
    // Of another process: inherited by mistake, and the numbers mean nothing here.
    if let Some(count) = number(count).filter(|_| number(pid) == Some(std::process::id())) {
        let names = names
            .map(|names| names.to_string_lossy().into_owned())
            .unwrap_or_default();
        let mut names = names.split(':');
        for descriptor in channel::inherited(u16::try_from(count).unwrap_or(u16::MAX)) {
            descriptors.push((names.next().unwrap_or_default().to_owned(), descriptor));
        }
    }
    channel::keep_from_children();
    Environment {
        socket,
        watchdog_usec,
        watchdog_pid,
        descriptors,
    }
}

impl Environment {
    /// The variables that another program in this process's place has to find again.
    pub fn variables(&self) -> Vec<(&'static str, OsString)> {
        let variables = [
            ("NOTIFY_SOCKET", &self.socket),
            ("WATCHDOG_USEC", &self.watchdog_usec),
            ("WATCHDOG_PID", &self.watchdog_pid),
        ];
        let set = variables
            .into_iter()
            .filter_map(|(name, value)| Some((name, value.clone()?)));
        set.collect()
    }
}

impl Notify {
    /// The way to the manager that `environment` names.
    pub fn new(environment: &Environment) -> Self {
        let text = |value: &Option<OsString>| value.as_ref().and_then(|value| value.to_str()).map(str::to_owned);
        let own = |pid: String| pid == std::process::id().to_string();
        let watchdog = text(&environment.watchdog_usec)
            .filter(|_| text(&environment.watchdog_pid).is_none_or(own))
            .and_then(|usec| usec.parse().ok())
            .filter(|usec| *usec > 0)
            .map(Duration::from_micros);
        let manager = environment.socket.as_ref().and_then(|path| match connect(path) {
            Ok(manager) => Some(manager),
            Err(error) => {
                tracing::warn!(%error, socket = ?path, "the service manager cannot be told anything; it may consider edged hung");
                None
            }
        });
        Self { manager, watchdog }
    }

    /// How long the manager waits for a sign of life; `None` = it does not.
    pub const fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// Everything runs.
    pub fn ready(&self) {
        self.send("READY=1", &[]);
    }

    /// A reload begins; [`Notify::ready`] ends it.
    pub fn reloading(&self) {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let usec = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1_000;
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={usec}"), &[]);
    }

    /// The end begins.
    pub fn stopping(&self) {
        self.send("STOPPING=1", &[]);
    }

    /// A sign of life.
    pub fn alive(&self) {
        self.send("WATCHDOG=1", &[]);
    }

    /// One line for `systemctl status`.
    pub fn status(&self, status: &str) {
        let line: String = status.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        self.send(&format!("STATUS={line}"), &[]);
    }

    /// Has the manager keep `descriptors` under `name` beyond the end of this process.
    pub fn store(&self, name: &str, descriptors: &[BorrowedFd<'_>]) {
        for some in descriptors.chunks(MOST) {
            // FDPOLL=0: a listener whose socket errs once must not vanish from the store.
            self.send(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), some);
        }
    }

    /// Has the manager close what it keeps under `name`.
    pub fn remove(&self, name: &str) {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[]);
    }

    fn send(&self, text: &str, descriptors: &[BorrowedFd<'_>]) {
        let Some((socket, address)) = &self.manager else { return };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            // Never more than MOST, for which there is room.
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let parts = [IoSlice::new(text.as_bytes())];
        if let Err(error) = rustix::net::sendmsg_addr(socket, address, &parts, &mut control, SendFlags::NOSIGNAL) {
            tracing::warn!(%error, message = text.lines().next(), "the service manager was not told");
        }
    }
}

/// The name of a socket in the descriptor store, where a colon would end it.
pub fn name_of(endpoint: Endpoint) -> String {
    let Endpoint { transport, address } = endpoint;
    format!("{}-{}", transport.name(), address.to_string().replace(':', "_"))
}

fn connect(path: &OsString) -> io::Result<(OwnedFd, SocketAddrUnix)> {
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name)?,
        path => SocketAddrUnix::new(path)?,
    };
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    rustix::net::sockopt::set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE))?;
    Ok((socket, address))
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::{fd::AsFd, unix::net::UnixDatagram},
    };

    use super::*;

    fn manager() -> (UnixDatagram, Environment, std::path::PathBuf) {
        let path = std::env::temp_dir().join(format!(
            "edged-notify-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        let _ = std::fs::remove_file(&path);
        let socket = UnixDatagram::bind(&path).expect("bound");
        let environment = Environment {
            socket: Some(path.clone().into()),
            watchdog_usec: Some("3000000".into()),
            watchdog_pid: Some(std::process::id().to_string().into()),
            descriptors: Vec::new(),
        };
        (socket, environment, path)
    }

    #[test]
    fn the_manager_reads_what_systemd_would_read() {
        let (socket, environment, path) = manager();
        let notify = Notify::new(&environment);
        assert_eq!(notify.watchdog(), Some(Duration::from_secs(3)));
        let read = || {
            let mut buffer = [0; 512];
            let length = socket.recv(&mut buffer).expect("a message");
            String::from_utf8_lossy(&buffer[..length]).into_owned()
        };
        notify.ready();
        assert_eq!(read(), "READY=1");
        notify.status("two\nlines");
        assert_eq!(read(), "STATUS=two lines");
        notify.reloading();
        let text = read();
        let usec = text.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").expect("both lines");
        assert!(usec.parse::<u64>().expect("a number") > 0);
        notify.remove("tcp-x");
        assert_eq!(read(), "FDSTOREREMOVE=1\nFDNAME=tcp-x");
        let _ = std::fs::remove_file(path);
    }

    #[test]
    fn stored_descriptors_travel_with_their_name() {
        let (socket, environment, path) = manager();
        let null = File::open("/dev/null").expect("/dev/null");
        Notify::new(&environment).store("tcp-[__1]_80", &[null.as_fd(), null.as_fd()]);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
        let mut buffer = [0; 512];
        let mut parts = [io::IoSliceMut::new(&mut buffer)];
        let received = rustix::net::recvmsg(&socket, &mut parts, &mut control, rustix::net::RecvFlags::empty())
            .expect("a message");
        let count: usize = control
            .drain()
            .map(|message| match message {
                rustix::net::RecvAncillaryMessage::ScmRights(rights) => rights.count(),
                _ => 0,
            })
            .sum();
        assert_eq!(count, 2);
        assert_eq!(&buffer[..received.bytes], b"FDSTORE=1\nFDPOLL=0\nFDNAME=tcp-[__1]_80");
        let _ = std::fs::remove_file(path);
    }

    #[test]
    fn names_hold_no_colon_and_stay_apart() {
        let names: Vec<_> = ["[::1]:80", "[::]:180", "127.0.0.1:80", "0.0.0.0:80", "udp:[::1]:80"]
            .iter()
            .map(|address| name_of(address.parse().expect("an address")))
            .collect();
        assert!(names.iter().all(|name| !name.contains(':')), "{names:?}");
        assert_eq!(names.iter().collect::<std::collections::BTreeSet<_>>().len(), 5);
    }

    #[test]
    fn without_a_manager_nothing_happens() {
        let notify = Notify::new(&Environment::default());
        notify.ready();
        assert_eq!(notify.watchdog(), None);
    }
}
