//! TCP sockets as the balancer wants them: what is set on listeners, on the backend leg, and what the kernel knows
//! about a peer.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::OnceLock,
    time::Duration,
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};

use crate::pool::Failure;

/// Pending connections per listener socket; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// How a dead peer is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence before the first probe.
    pub idle: Duration,
    /// Time between probes.
    pub interval: Duration,
    /// Unanswered probes that end the connection.
    pub count: u32,
    /// Unacknowledged data (or probes) for this long end the connection (TCP_USER_TIMEOUT, RFC 5482).
    pub user_timeout: Duration,
}

/// 10 s, 3 s, 3 probes, 15 s: a dead peer is cut within 20 s even if nothing is sent.
const KEEPALIVE: Keepalive = Keepalive {
    idle: Duration::from_secs(10),
    interval: Duration::from_secs(3),
    count: 3,
    user_timeout: Duration::from_secs(15),
};

/// The keepalive of both legs. `EDGED_TEST_KEEPALIVE=IDLE,INTERVAL,COUNT` (seconds) scales it for tests that watch a
/// real connection die; the user timeout keeps its ratio to the idle time.
pub fn keepalive() -> Keepalive {
    static SETTING: OnceLock<Keepalive> = OnceLock::new();
    *SETTING.get_or_init(|| {
        let scaled = || {
            let text = std::env::var("EDGED_TEST_KEEPALIVE").ok()?;
            let mut numbers = text
                .split(',')
                .map(|part| part.trim().parse::<u32>().ok().filter(|n| (1..3600).contains(n)));
            let (idle, interval, count) = (numbers.next()??, numbers.next()??, numbers.next()??);
            let seconds = |n: u32| Duration::from_secs(n.into());
            Some(Keepalive {
                idle: seconds(idle),
                interval: seconds(interval),
                count,
                user_timeout: seconds(idle) * 3 / 2,
            })
        };
        scaled().unwrap_or(KEEPALIVE)
    })
}

/// A bound and listening socket at `address`: non-blocking, SO_REUSEPORT (so that each data thread and each successor
/// has its own queue), IPv6 only where IPv6, free to bind an address that does not exist yet (IP_FREEBIND), and with
/// the keepalive and TCP_NODELAY that accepted sockets inherit.
///
/// # Errors
///
/// What bind(2) and listen(2) say.
pub fn listener(address: SocketAddr) -> io::Result<OwnedFd> {
    let (family, v6) = match address {
        SocketAddr::V4(_) => (AddressFamily::INET, false),
        SocketAddr::V6(_) => (AddressFamily::INET6, true),
    };
    let socket = socket_with(
        family,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_socket_reuseport(&socket, true)?;
    if v6 {
        sockopt::set_ipv6_v6only(&socket, true)?;
        sockopt::set_ipv6_freebind(&socket, true)?;
    } else {
        sockopt::set_ip_freebind(&socket, true)?;
    }
    tune(socket.as_fd())?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    bind(&socket, &address)?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Makes room for descriptors with numbers below `number`, as far as the limit reaches.
///
/// The kernel grows a process's table of descriptors when it is full, and in a process with threads every growth waits for
/// all processors (an RCU grace period): 20 to 40 ms that must not fall into the moment in which sessions stand still.
pub(crate) fn make_room(number: u32) {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let number = limit.map_or(number, |limit| number.min(u32::try_from(limit).unwrap_or(u32::MAX)));
    let Ok(number) = RawFd::try_from(number.saturating_sub(1)) else {
        return;
    };
    // Any descriptor will do; the copy is closed at once, and the room stays.
    if let Ok(any) = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC) {
        let _ = rustix::io::fcntl_dupfd_cloexec(&any, number);
    }
}

/// Sets keepalive and user timeout. Five system calls: inherited from the listener on the client leg, done on the
/// backend leg once a session has lived for a second (a shorter one cannot profit from them).
pub(crate) fn tune(socket: BorrowedFd<'_>) -> io::Result<()> {
    let keepalive = keepalive();
    sockopt::set_tcp_keepidle(socket, keepalive.idle)?;
    sockopt::set_tcp_keepintvl(socket, keepalive.interval)?;
    sockopt::set_tcp_keepcnt(socket, keepalive.count)?;
    sockopt::set_tcp_user_timeout(
        socket,
        u32::try_from(keepalive.user_timeout.as_millis()).unwrap_or(u32::MAX),
    )?;
    sockopt::set_socket_keepalive(socket, true)?;
    Ok(())
}

/// A non-blocking connect to `address`; the answer comes as an event.
pub(crate) fn connect(address: SocketAddr) -> Result<OwnedFd, rustix::io::Errno> {
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let socket = socket_with(
        family,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

/// What a failed connect says about the backend: only the network's answers count against it.
pub(crate) fn failure_of(error: rustix::io::Errno) -> Failure {
    use rustix::io::Errno;
    match error {
        Errno::CONNREFUSED => Failure::Refused,
        Errno::CONNRESET | Errno::PIPE => Failure::Reset,
        Errno::TIMEDOUT => Failure::Timeout,
        Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::HOSTDOWN | Errno::NOPROTOOPT | Errno::PROTO => {
            Failure::Unreachable
        }
        _ => Failure::Local,
    }
}

/// Ends a connection with a reset instead of a FIN.
pub(crate) fn reset(socket: OwnedFd) {
    // Failing to set it leaves an ordinary close, which is the best that is left.
    let _ = sockopt::set_socket_linger(&socket, Some(Duration::ZERO));
}

/// What the kernel knows of a peer's readiness to take more.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    /// The peer has said that it takes nothing now.
    pub(crate) shut: bool,
    /// Window probes that it has not answered.
    probes: u8,
    last_ack: Duration,
}

impl Window {
    /// Several probes and the time of the usual user timeout have passed without an answer.
    pub(crate) fn unanswered(self) -> bool {
        self.probes >= 4 && self.last_ack >= keepalive().user_timeout
    }
}

/// The window of the peer of `socket` (TCP_INFO), or `None` if this kernel does not tell (before Linux 5.4).
pub(crate) fn window(socket: RawFd) -> Option<Window> {
    // Places in the kernel's struct tcp_info, which only grows: tcpi_probes, tcpi_last_ack_recv, tcpi_snd_wnd.
    const PROBES: usize = 3;
    const LAST_ACK: usize = 56;
    const SND_WND: usize = 228;
    let mut info = [0u8; SND_WND + 4];
    let mut length = libc::socklen_t::try_from(info.len()).ok()?;
    // SAFETY: the kernel writes at most `length` bytes into `info`, which is that large.
    let result = unsafe {
        libc::getsockopt(
            socket,
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 || usize::try_from(length).ok()? < info.len() {
        return None;
    }
    let number = |at: usize| Some(u32::from_ne_bytes(*info.get(at..)?.first_chunk()?));
    Some(Window {
        shut: number(SND_WND)? == 0,
        probes: info[PROBES],
        last_ack: Duration::from_millis(number(LAST_ACK)?.into()),
    })
}

/// Takes the user timeout off, or sets it again.
pub(crate) fn set_patience(socket: BorrowedFd<'_>, patient: bool) {
    let timeout = if patient {
        Duration::ZERO
    } else {
        keepalive().user_timeout
    };
    // Failing, the kernel goes on as it was told before.
    let _ = sockopt::set_tcp_user_timeout(socket, u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX));
}

/// Time since the peer last acknowledged anything on `socket` (TCP_INFO), or `None` if the kernel does not say.
///
/// The caller guarantees that the descriptor is not closed meanwhile; if it were, the answer would be about another
/// socket or none, never undefined behaviour.
pub(crate) fn last_ack(socket: RawFd) -> Option<Duration> {
    // SAFETY: tcp_info is plain old data for which all zeroes are valid.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).ok()?;
    // SAFETY: the kernel writes at most `length` bytes into `info`, which is that large.
    let result = unsafe {
        libc::getsockopt(
            socket,
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    (result == 0).then(|| Duration::from_millis(info.tcpi_last_ack_recv.into()))
}

/// The descriptor's number, for [`last_ack`].
pub(crate) fn number(socket: &OwnedFd) -> RawFd {
    socket.as_raw_fd()
}

/// The source of an accepted connection; an IPv4-mapped address as the IPv4 address it is.
pub(crate) fn source(address: Option<rustix::net::SocketAddrAny>) -> SocketAddr {
    address
        .and_then(|any| SocketAddr::try_from(any).ok())
        .map_or(SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), 0), |address| {
            SocketAddr::new(address.ip().to_canonical(), address.port())
        })
}
