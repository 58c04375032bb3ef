//! The socket pair between the supervisor and one worker: typed, length-limited messages that may carry descriptors.
//!
//! ```text
//! message = JSON, at most 16 MiB, with at most 1024 descriptors
//! packet  = 1 byte (0 = last, 1 = more follow) + at most 60 KiB of the JSON, with at most 250 descriptors
//! ```
//! The socket keeps packet boundaries (SOCK_SEQPACKET). Whatever the other side sends is a message or an [`Error`]; an
//! error means that the other side is broken, and the channel is of no use from then on. Descriptors arrive
//! close-on-exec, and those of a refused message are closed.

mod assembly;

use std::{
    ffi::OsString,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{Interest, unix::AsyncFd};

pub use assembly::MAX_MESSAGE;
use assembly::{Assembly, CHUNK, Fault, LAST, MORE, Step};

/// Most descriptors of one message.
pub const MAX_DESCRIPTORS: usize = 1024;
/// Most descriptors in one packet; the kernel's own limit is 253.
const PACKET_DESCRIPTORS: usize = 250;

/// What can be wrong with a channel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket failed.
    #[error("the channel failed")]
    Socket(#[from] io::Error),
    /// A message of more than [`MAX_MESSAGE`] bytes, or a packet of more than it may hold.
    #[error("a message is larger than {MAX_MESSAGE} bytes, or one of its packets larger than {CHUNK}")]
    TooLong,
    /// More descriptors than the message or the receiver allows.
    #[error("a message carries more descriptors than the {0} that are allowed")]
    TooManyDescriptors(usize),
    /// A packet without a header, or with one that means nothing.
    #[error("a packet has no valid header")]
    Header,
    /// The channel ended in the middle of a message.
    #[error("the channel ended in the middle of a message")]
    Cut,
    /// The JSON is not the message that was expected.
    #[error("a message makes no sense")]
    Content(#[from] serde_json::Error),
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::TooLong => Self::TooLong,
            Fault::Header => Self::Header,
            Fault::Cut => Self::Cut,
        }
    }
}

/// One end.
#[derive(Debug)]
pub struct Channel {
    socket: AsyncFd<OwnedFd>,
    most_descriptors: usize,
}

/// Both ends of a new channel, non-blocking and close-on-exec.
///
/// # Errors
///
/// What socketpair(2) reports: no free descriptors.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        flags,
        None,
    )?)
}

/// Gives both ends room for a few messages of the largest size, so that who sends many does not wait for who receives after
/// every packet. As far as the kernel lets this process.
pub fn widen(ends: [&OwnedFd; 2]) {
    const ROOM: usize = 16 << 20;
    for end in ends {
        let forced = rustix::net::sockopt::set_socket_send_buffer_size_force(end, ROOM);
        if forced.is_err() {
            // At most net.core.wmem_max: slower, and as good.
            let _ = rustix::net::sockopt::set_socket_send_buffer_size(end, ROOM);
        }
    }
}

/// Has the runtime watch `descriptor`.
///
/// # Errors
///
/// It is of a kind that cannot be polled.
pub fn pollable(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is the same open descriptor from here until AsyncFd drops it.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, interest) }?)
}

impl Channel {
    /// Wraps one end of [`pair`]. `most_descriptors` is how many the other side may send with one message: 0 for what
    /// comes from a worker, [`MAX_DESCRIPTORS`] for what comes from the supervisor.
    ///
    /// # Errors
    ///
    /// The descriptor cannot be polled, or there is no runtime.
    pub fn new(socket: OwnedFd, most_descriptors: usize) -> io::Result<Self> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        Ok(Self {
            socket: pollable(socket, interest)?,
            most_descriptors,
        })
    }

    /// Sends one message. Two sends must not run at the same time: their packets would mix.
    ///
    /// Not cancel-safe: a send that was dropped half way leaves half a message behind.
    ///
    /// # Errors
    ///
    /// The message is too long, or the other side is gone.
    pub async fn send<M: Serialize>(&self, message: &M, descriptors: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let json = serde_json::to_vec(message)?;
        if json.len() > MAX_MESSAGE {
            return Err(Error::TooLong);
        }
        if descriptors.len() > MAX_DESCRIPTORS {
            return Err(Error::TooManyDescriptors(MAX_DESCRIPTORS));
        }
        let mut chunks = json.chunks(CHUNK).peekable();
        let mut groups = descriptors.chunks(PACKET_DESCRIPTORS).peekable();
        loop {
            let chunk = chunks.next().unwrap_or_default();
            let group = groups.next().unwrap_or_default();
            let header = if chunks.peek().is_none() && groups.peek().is_none() {
                LAST
            } else {
                MORE
            };
            self.socket
                .async_io(Interest::WRITABLE, |socket| send_packet(socket, header, chunk, group))
                .await?;
            if header == LAST {
                return Ok(());
            }
        }
    }

    /// The socket, for whoever goes on with it between two messages.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The next message and its descriptors in the order they were sent; `None` when the other side has ended.
    ///
    /// Not cancel-safe: give it a task of its own.
    ///
    /// # Errors
    ///
    /// [`Error`]; the channel must not be used any more.
    pub async fn receive<M: DeserializeOwned>(&self) -> Result<Option<(M, Vec<OwnedFd>)>, Error> {
        let received = self.receive_unless(std::future::pending()).await?;
        Ok(received.flatten())
    }

    /// As [`Channel::receive`]; `None` if `stop` came before the next message. A message that has begun is received whole,
    /// so that whoever goes on with the socket finds the beginning of one.
    ///
    /// # Errors
    ///
    /// As [`Channel::receive`].
    #[allow(clippy::type_complexity, reason = "an end is not a stop")]
    pub async fn receive_unless<M: DeserializeOwned>(
        &self,
        stop: impl Future<Output = ()>,
    ) -> Result<Option<Option<(M, Vec<OwnedFd>)>>, Error> {
        let mut stop = std::pin::pin!(stop);
        let mut assembly = Assembly::default();
        let mut first = true;
        let mut descriptors = Vec::new();
        let mut buffer = vec![0; CHUNK + 1];
        loop {
            let before = descriptors.len();
            let packet =
                |socket: &OwnedFd| receive_packet(socket, &mut buffer, self.most_descriptors, &mut descriptors);
            let received = self.socket.async_io(Interest::READABLE, packet);
            let bytes = if first {
                tokio::select! {
                    biased;
                    () = stop.as_mut() => return Ok(None),
                    // Takes the packet in the moment it is ready, or nothing.
                    bytes = received => bytes??,
                }
            } else {
                received.await??
            };
            first = false;
            let packet = buffer.get(..bytes).unwrap_or_default();
            match assembly.push(packet, descriptors.len() > before)? {
                Step::More => {}
                Step::Message(json) => return Ok(Some(Some((serde_json::from_slice(&json)?, descriptors)))),
                Step::End => return Ok(Some(None)),
            }
        }
    }
}

/// One packet out; the kernel takes all of it or none.
fn send_packet(socket: &OwnedFd, header: u8, chunk: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PACKET_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("the descriptors of one packet do not fit its buffer"));
    }
    let header = [header];
    let parts = [IoSlice::new(&header), IoSlice::new(chunk)];
    rustix::net::sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
    Ok(())
}

/// One packet into `buffer`, its descriptors onto `descriptors`; returns its length, 0 at the end.
///
/// The outer error is for the poller, which waits at `WouldBlock`; the inner one is the other side's fault.
fn receive_packet(
    socket: &OwnedFd,
    buffer: &mut [u8],
    most: usize,
    descriptors: &mut Vec<OwnedFd>,
) -> io::Result<Result<usize, Error>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PACKET_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let before = descriptors.len();
    let received = match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags) {
        Ok(received) => received,
        // A peer that died with unread packets of ours: the same as an end.
        Err(rustix::io::Errno::CONNRESET) => return Ok(Ok(0)),
        Err(error) => return Err(error.into()),
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Ok(Err(Error::TooLong));
    }
    let many = descriptors.len() - before > PACKET_DESCRIPTORS || descriptors.len() > most;
    if many || received.flags.contains(ReturnFlags::CTRUNC) {
        return Ok(Err(Error::TooManyDescriptors(most)));
    }
    Ok(Ok(received.bytes))
}

/// Takes the descriptors 3 and up that a service manager passed (`LISTEN_FDS`), close-on-exec from here on.
///
/// To be called before anything else is opened, and only with a `LISTEN_PID` that names this process: then they are
/// ours alone. There is nothing to take a second time.
pub fn inherited(count: u16) -> Vec<OwnedFd> {
    use std::os::fd::{FromRawFd, RawFd};
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Vec::new();
    }
    (3..3 + RawFd::from(count))
        .filter_map(|raw| {
            // SAFETY: only looked at; to fcntl(2) a number that is not open is an error and nothing worse.
            let borrowed = unsafe { BorrowedFd::borrow_raw(raw) };
            rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC).ok()?;
            // SAFETY: it is open, the manager gave it to this process, and it is taken only once.
            Some(unsafe { OwnedFd::from_raw_fd(raw) })
        })
        .collect()
}

/// Makes sure that no worker inherits a descriptor that whoever started this process left open.
pub fn keep_from_children() {
    // SAFETY: sets a flag on open descriptors and touches no memory. Kernels before 5.11 refuse, and nothing is lost
    // but this precaution.
    unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
}

/// Takes `names` out of the environment, so that nothing that is started later sees them. While other threads run, or
/// nobody knows whether they do, they are only read.
pub fn take_variables<const N: usize>(names: [&str; N]) -> [Option<OsString>; N] {
    let alone = std::fs::read_dir("/proc/self/task").is_ok_and(|threads| threads.count() == 1);
    names.map(|name| {
        let value = std::env::var_os(name);
        if alone {
            // SAFETY: this is the only thread, so nobody reads the environment meanwhile.
            unsafe { std::env::remove_var(name) };
        }
        value
    })
}

/// The process at the other end when the pair was made.
///
/// # Errors
///
/// `socket` is no unix socket.
pub fn maker(socket: impl AsFd) -> io::Result<rustix::process::Pid> {
    Ok(rustix::net::sockopt::socket_peercred(socket)?.pid)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    type Received = Result<Option<(Vec<String>, Vec<OwnedFd>)>, Error>;

    fn channels(most: usize) -> (Channel, Channel) {
        let (a, b) = pair().expect("a socket pair");
        (
            Channel::new(a, most).expect("a channel"),
            Channel::new(b, most).expect("a channel"),
        )
    }

    fn null() -> OwnedFd {
        File::open("/dev/null").expect("/dev/null").into()
    }

    fn raw(channel: &Channel, packet: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let (header, chunk) = packet.split_first().expect("a header");
        send_packet(channel.socket.get_ref(), *header, chunk, descriptors).expect("sent");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_message_arrives_whole_with_its_descriptors_in_order() {
        let (a, b) = channels(MAX_DESCRIPTORS);
        let sent = vec!["x".repeat(200_000), "\u{0}\"é".into()];
        let owned: Vec<OwnedFd> = (0..150)
            .map(|number| {
                let memory = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).expect("memory");
                rustix::fs::ftruncate(&memory, number).expect("sized");
                memory
            })
            .collect();
        let borrowed: Vec<_> = owned.iter().map(AsFd::as_fd).collect();
        let (done, received) = tokio::join!(a.send(&sent, &borrowed), b.receive());
        done.expect("sent");
        let (message, descriptors): (Vec<String>, _) = received.expect("good").expect("a message");
        assert_eq!(message, sent);
        let sizes: Vec<_> = descriptors
            .iter()
            .map(|fd| rustix::fs::fstat(fd).expect("open").st_size)
            .collect();
        assert_eq!(sizes, (0..150).collect::<Vec<_>>());
        for descriptor in &descriptors {
            let flags = rustix::io::fcntl_getfd(descriptor).expect("open");
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn the_end_of_the_other_side_is_the_end_and_no_error() {
        let (a, b) = channels(0);
        a.send(&vec!["last words"], &[]).await.expect("sent");
        drop(a);
        let first: Received = b.receive().await;
        assert_eq!(first.expect("good").expect("a message").0, ["last words"]);
        let end: Received = b.receive().await;
        assert!(end.expect("good").is_none());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_reader_that_is_stopped_takes_nothing_and_leaves_no_message_half_read() {
        let (a, b) = channels(0);
        a.send(&vec!["for the next reader"], &[]).await.expect("sent");
        let stopped = b.receive_unless::<Vec<String>>(std::future::ready(())).await;
        assert!(stopped.expect("good").is_none());
        let next: Received = b.receive().await;
        assert_eq!(next.expect("good").expect("a message").0, ["for the next reader"]);
        // The first packet is here, the second one comes after the stop.
        raw(&a, b"\x01[\"begun", &[]);
        let (stop, stops) = tokio::sync::oneshot::channel::<()>();
        let reading = b.receive_unless::<Vec<String>>(async { drop(stops.await) });
        let sending = async {
            tokio::task::yield_now().await;
            stop.send(()).expect("it reads");
            tokio::task::yield_now().await;
            raw(&a, b"\x00 and ended\"]", &[]);
        };
        let (read, ()) = tokio::join!(reading, sending);
        assert_eq!(
            read.expect("good").expect("not stopped").expect("a message").0,
            ["begun and ended"]
        );
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_message_cut_short_is_an_error() {
        let (a, b) = channels(0);
        raw(&a, b"\x01[\"half", &[]);
        drop(a);
        let received: Received = b.receive().await;
        assert!(matches!(received, Err(Error::Cut)), "{received:?}");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn junk_is_an_error_and_never_a_panic() {
        for packet in [
            &b"\x00"[..],
            b"\x00{}",
            b"\x00[1]",
            b"\x00\xff\xfe",
            b"\x00[\"a\"",
            b"\x02[]",
            b"\x01",
            b"\xff",
        ] {
            let (a, b) = channels(0);
            raw(&a, packet, &[]);
            drop(a);
            let received: Received = b.receive().await;
            assert!(
                matches!(received, Err(Error::Content(_) | Error::Header)),
                "{packet:?}: {received:?}"
            );
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_message_above_the_limit_is_refused_by_both_sides() {
        let (a, b) = channels(0);
        let refused = a.send(&"x".repeat(MAX_MESSAGE), &[]).await;
        assert!(matches!(refused, Err(Error::TooLong)), "{refused:?}");
        let flood = async {
            let packet = [[MORE].as_slice(), &[b' '; CHUNK]].concat();
            for _ in 0..=MAX_MESSAGE / CHUNK {
                let send = |socket: &OwnedFd| send_packet(socket, MORE, &packet[1..], &[]);
                if a.socket.async_io(Interest::WRITABLE, send).await.is_err() {
                    return;
                }
            }
        };
        let ((), received): ((), Received) = tokio::join!(flood, b.receive());
        assert!(matches!(received, Err(Error::TooLong)), "{received:?}");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_packet_above_the_limit_is_refused() {
        let (a, b) = channels(0);
        raw(&a, &[[LAST].as_slice(), &[b' '; CHUNK + 1]].concat(), &[]);
        let received: Received = b.receive().await;
        assert!(matches!(received, Err(Error::TooLong)), "{received:?}");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn descriptors_beyond_the_limit_are_refused_and_closed() {
        for (most, count) in [(0, 1), (3, 4), (MAX_DESCRIPTORS, PACKET_DESCRIPTORS + 1)] {
            let (a, b) = channels(most);
            let end = null();
            let descriptors = vec![end.as_fd(); count];
            // Built by hand: `send_packet` has no room for more than one packet may carry.
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PACKET_DESCRIPTORS + 1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
            let packet = [IoSlice::new(b"\x00[]")];
            rustix::net::sendmsg(a.socket.get_ref(), &packet, &mut control, SendFlags::empty()).expect("sent");
            let received: Received = b.receive().await;
            assert!(
                matches!(received, Err(Error::TooManyDescriptors(limit)) if limit == most),
                "{received:?}"
            );
        }
        let (a, _b) = channels(0);
        let end = null();
        let refused = a.send(&(), &vec![end.as_fd(); MAX_DESCRIPTORS + 1]).await;
        assert!(matches!(refused, Err(Error::TooManyDescriptors(_))), "{refused:?}");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn every_prefix_of_a_message_is_an_error() {
        let json = serde_json::to_vec(&vec!["one", "two"]).expect("json");
        for length in 0..json.len() {
            let (a, b) = channels(0);
            raw(&a, &[[LAST].as_slice(), &json[..length]].concat(), &[]);
            let received: Received = b.receive().await;
            assert!(matches!(received, Err(Error::Content(_))), "{length}: {received:?}");
        }
    }
}
