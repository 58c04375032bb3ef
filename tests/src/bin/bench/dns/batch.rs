//! Many datagrams per system call: recvmmsg and sendmmsg.

use std::{
    io,
    mem::{MaybeUninit, zeroed},
    os::fd::{AsRawFd, BorrowedFd},
    ptr,
};

use super::wire::SIZE;

/// Datagrams per call.
pub(crate) const MOST: usize = 64;

/// Where a datagram came from.
pub(crate) type Address = libc::sockaddr_in6;

/// Room for the control message of a time stamp.
const CONTROL: usize = 8;

/// Received datagrams.
pub(crate) struct Received {
    buffers: Box<[[u8; SIZE]; MOST]>,
    addresses: Box<[Address; MOST]>,
    controls: Box<[[u64; CONTROL]; MOST]>,
    headers: Box<[libc::mmsghdr; MOST]>,
    iovecs: Box<[libc::iovec; MOST]>,
}

/// A structure of the system's, of numbers and pointers alone: valid when all its bytes are zero.
trait Plain {}
impl Plain for Address {}
impl Plain for libc::mmsghdr {}
impl Plain for libc::iovec {}

fn blank<T: Plain>() -> T {
    // SAFETY: see Plain.
    unsafe { zeroed() }
}

impl Received {
    pub(crate) fn new() -> Self {
        Self {
            buffers: Box::new([[0; SIZE]; MOST]),
            addresses: Box::new([(); MOST].map(|()| blank())),
            controls: Box::new([[0; CONTROL]; MOST]),
            headers: Box::new([(); MOST].map(|()| blank())),
            iovecs: Box::new([(); MOST].map(|()| blank())),
        }
    }

    /// Takes what is there; waits for the first datagram if the socket blocks. Returns their number.
    pub(crate) fn receive(&mut self, socket: BorrowedFd) -> io::Result<usize> {
        for i in 0..MOST {
            self.iovecs[i] = libc::iovec {
                iov_base: self.buffers[i].as_mut_ptr().cast(),
                iov_len: SIZE,
            };
            let header = &mut self.headers[i].msg_hdr;
            header.msg_name = (&raw mut self.addresses[i]).cast();
            header.msg_namelen = size_of::<Address>() as libc::socklen_t;
            header.msg_iov = &raw mut self.iovecs[i];
            header.msg_iovlen = 1;
            header.msg_control = self.controls[i].as_mut_ptr().cast();
            header.msg_controllen = size_of_val(&self.controls[i]);
        }
        // SAFETY: MOST headers are there, and each points to a buffer, an address and a control buffer of the lengths beside
        // them, which live in self.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                MOST as libc::c_uint,
                libc::MSG_WAITFORONE,
                ptr::null_mut(),
            )
        };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// The bytes of the `i`-th of the last call.
    pub(crate) fn datagram(&self, i: usize) -> &[u8] {
        &self.buffers[i][..(self.headers[i].msg_len as usize).min(SIZE)]
    }

    /// Where it came from.
    pub(crate) fn address(&self, i: usize) -> Address {
        self.addresses[i]
    }

    /// When it arrived, in ns since 1970, if the socket stamps what arrives (SO_TIMESTAMPNS).
    pub(crate) fn stamp(&self, i: usize) -> Option<u64> {
        let header = &self.headers[i].msg_hdr;
        // SAFETY: the kernel has written msg_controllen bytes of control messages to the buffer that the header points to.
        let control = unsafe { libc::CMSG_FIRSTHDR(header).as_ref() }?;
        if (control.cmsg_level, control.cmsg_type) != (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS) {
            return None;
        }
        let mut time = MaybeUninit::<libc::timespec>::uninit();
        // SAFETY: the data of such a message is a timespec, maybe not aligned as one.
        let time = unsafe {
            ptr::copy_nonoverlapping(
                libc::CMSG_DATA(control),
                time.as_mut_ptr().cast(),
                size_of::<libc::timespec>(),
            );
            time.assume_init()
        };
        Some(nanos(time))
    }
}

/// Datagrams to send.
pub(crate) struct Outgoing {
    buffers: Box<[[u8; SIZE]; MOST]>,
    lengths: [usize; MOST],
    addresses: Box<[Address; MOST]>,
    headers: Box<[libc::mmsghdr; MOST]>,
    iovecs: Box<[libc::iovec; MOST]>,
    count: usize,
}

impl Outgoing {
    pub(crate) fn new() -> Self {
        Self {
            buffers: Box::new([[0; SIZE]; MOST]),
            lengths: [0; MOST],
            addresses: Box::new([(); MOST].map(|()| blank())),
            headers: Box::new([(); MOST].map(|()| blank())),
            iovecs: Box::new([(); MOST].map(|()| blank())),
            count: 0,
        }
    }

    /// Takes one more, at most [`MOST`] between two calls of [`Outgoing::send`]. `write` makes it and returns its length;
    /// without an address it goes to where the socket is connected.
    pub(crate) fn push(&mut self, to: Option<Address>, write: impl FnOnce(&mut [u8; SIZE]) -> usize) {
        let i = self.count;
        self.lengths[i] = write(&mut self.buffers[i]);
        let header = &mut self.headers[i].msg_hdr;
        *header = blank::<libc::mmsghdr>().msg_hdr;
        if let Some(to) = to {
            self.addresses[i] = to;
            header.msg_name = (&raw mut self.addresses[i]).cast();
            header.msg_namelen = size_of::<Address>() as libc::socklen_t;
        }
        self.count += 1;
    }

    /// Sends all that were pushed.
    pub(crate) fn send(&mut self, socket: BorrowedFd) -> io::Result<()> {
        let count = std::mem::take(&mut self.count);
        for i in 0..count {
            self.iovecs[i] = libc::iovec {
                iov_base: self.buffers[i].as_mut_ptr().cast(),
                iov_len: self.lengths[i],
            };
            self.headers[i].msg_hdr.msg_iov = &raw mut self.iovecs[i];
            self.headers[i].msg_hdr.msg_iovlen = 1;
        }
        let mut done = 0;
        while done < count {
            // SAFETY: the headers from `done` to `count` are there, and each points to a buffer and maybe an address of the
            // lengths beside them, which live in self.
            let sent = unsafe {
                libc::sendmmsg(
                    socket.as_raw_fd(),
                    self.headers[done..].as_mut_ptr(),
                    (count - done) as libc::c_uint,
                    0,
                )
            };
            done += usize::try_from(sent).map_err(|_| io::Error::last_os_error())?;
        }
        Ok(())
    }
}

/// Since 1970, or since whatever its clock began at.
pub(crate) fn nanos(time: libc::timespec) -> u64 {
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}
