//! One direction of a session: bytes from one socket to the other, by copying through the thread's scratch buffer
//! until the direction proves bulky, then by splice through a pipe.
//!
//! Sockets are watched edge-triggered. `readable` and `writable` say what the kernel last reported; a call that finds
//! otherwise clears them. An idle direction holds neither buffer nor pipe.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags, Shutdown},
    pipe::{PipeFlags, SpliceFlags},
};
use serde::{Deserialize, Serialize};

use super::ingress::{HEAD, Head};

/// The scratch buffer's size, and with it the read that proves a direction bulky.
pub(crate) const SCRATCH: usize = 64 * 1024;
/// Bytes that pipes are asked to hold, and up to how many in all: the larger the bite, the fewer wake-ups of both sides (a
/// pipe of 1 MiB takes a third less CPU per byte than one of 256 KiB). Linux lets one user have 64 MiB of pipes by default
/// (fs.pipe-user-pages-soft) and gives further ones two pages; so the first streams get the large ones, and room is left.
const SIZES: [(usize, usize); 2] = [(1 << 20, 32 << 20), (256 << 10, 48 << 20)];
/// A pipe smaller than this is not worth its system calls.
const LEAST: usize = 32 << 10;
/// Pipes a thread keeps for reuse.
const POOLED: usize = 64;
/// A splice that moves less than this ends the bulky phase: small messages are cheaper to copy.
const SMALL: usize = 8 * 1024;
/// Rounds one direction may take, and bytes, before the other sessions have their turn.
const BUDGET: (u32, usize) = (8, 2 << 20);

/// Bytes that all pipes of this process may hold.
static PIPED: AtomicUsize = AtomicUsize::new(0);

/// A kernel pipe; empty whenever it is in the pool.
#[derive(Debug)]
pub(crate) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    /// Bytes inside.
    filled: usize,
    /// Bytes it may hold.
    size: usize,
}

impl Pipe {
    /// The largest one that may be had; `None` without descriptors or quota.
    fn open() -> Option<Self> {
        let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
        let piped = PIPED.load(Relaxed);
        for (size, most) in SIZES {
            // Beyond the quota the kernel refuses; the size it came with works too, only slower.
            if piped + size <= most && rustix::pipe::fcntl_setpipe_size(&write, size).is_ok() {
                break;
            }
        }
        Some(Self::of(read, write, 0)).filter(|pipe| pipe.size >= LEAST)
    }

    fn of(read: OwnedFd, write: OwnedFd, filled: usize) -> Self {
        let size = rustix::pipe::fcntl_getpipe_size(&write).unwrap_or(LEAST);
        PIPED.fetch_add(size, Relaxed);
        Self {
            read,
            write,
            filled,
            size,
        }
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        PIPED.fetch_sub(self.size, Relaxed);
    }
}

/// What the directions of one thread share.
pub(crate) struct Scratch {
    buffer: Box<[u8; SCRATCH]>,
    pipes: Vec<Pipe>,
    /// A PROXY header on its way.
    head: Vec<u8>,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        Self {
            buffer: Box::new([0; SCRATCH]),
            pipes: Vec::new(),
            head: Vec::new(),
        }
    }

    /// Room to read into, overwritten by whoever reads next.
    pub(crate) fn buffer(&mut self) -> &mut [u8; SCRATCH] {
        &mut self.buffer
    }

    fn take_pipe(&mut self) -> Option<Pipe> {
        self.pipes.pop().or_else(Pipe::open)
    }

    fn give_back(&mut self, pipe: Pipe) {
        if pipe.filled == 0 && self.pipes.len() < POOLED {
            self.pipes.push(pipe);
        }
    }
}

/// One direction: from the socket that is its source to the one that is its sink.
#[derive(Debug, Default)]
pub(crate) struct Direction {
    /// The source has something, as far as we know.
    pub(crate) readable: bool,
    /// The sink takes something, as far as we know.
    pub(crate) writable: bool,
    /// The source's FIN has arrived, maybe behind data not yet read.
    pub(crate) fin: bool,
    /// Urgent data or an error has been seen: a short read then does not mean an empty socket.
    pub(crate) wary: bool,
    /// The source has been read to its end.
    pub(crate) ended: bool,
    /// The sink has been told.
    pub(crate) told: bool,
    bulky: bool,
    /// Bytes read and not yet written: only while the sink does not take them.
    rest: Option<Box<Rest>>,
    pipe: Option<Box<Pipe>>,
    /// Something has been written: what follows wants TCP_NODELAY.
    written: bool,
    /// What the sink gets before the first byte from the source, in the same write if that is there.
    pub(crate) head: Option<Box<Head>>,
    /// The head has waited long enough for a first byte to travel with.
    pub(crate) head_due: bool,
}

/// A direction at rest, written down for a successor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) ended: bool,
    pub(crate) told: bool,
    pub(crate) written: bool,
    pub(crate) wary: bool,
    pub(crate) bulky: bool,
    /// Bytes read and not yet written.
    pub(crate) rest: usize,
    /// Bytes in the pipe that travels along.
    pub(crate) piped: usize,
}

#[derive(Debug)]
struct Rest {
    bytes: Vec<u8>,
    sent: usize,
}

/// How a turn of a direction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Waits for an event.
    Wait,
    /// Has more to do; let others have their turn first.
    More,
    /// The source has ended and everything is delivered; the sink may be told.
    Ended,
    /// A socket failed: the session is over.
    Broken,
}

impl Direction {
    /// A direction whose sink was just accepted and therefore takes something.
    pub(crate) fn into_fresh_socket() -> Self {
        Self {
            writable: true,
            ..Self::default()
        }
    }

    /// Moves what can be moved. `nodelay` = the sink has TCP_NODELAY.
    pub(crate) fn turn(
        &mut self,
        source: BorrowedFd<'_>,
        sink: BorrowedFd<'_>,
        nodelay: &mut bool,
        scratch: &mut Scratch,
        moved: &mut usize,
    ) -> Turn {
        let (rounds, bytes) = BUDGET;
        let before = *moved;
        for _ in 0..rounds {
            if *moved - before >= bytes {
                break;
            }
            match self.flush(sink, nodelay, scratch) {
                Ok(true) => {}
                Ok(false) => return Turn::Wait,
                Err(_) => return Turn::Broken,
            }
            if self.ended {
                return Turn::Ended;
            }
            let head_goes_alone = self.head_due && self.head.is_some();
            if !self.readable && !head_goes_alone {
                return Turn::Wait;
            }
            let result = if self.bulky {
                self.splice(source, scratch, moved)
            } else {
                self.copy(source, sink, nodelay, scratch, moved)
            };
            if result.is_err() {
                return Turn::Broken;
            }
        }
        Turn::More
    }

    /// Writes what is held back; `true` when nothing is left.
    fn flush(&mut self, sink: BorrowedFd<'_>, nodelay: &mut bool, scratch: &mut Scratch) -> Result<bool, Errno> {
        if let Some(rest) = &mut self.rest {
            if !self.writable {
                return Ok(false);
            }
            while rest.sent < rest.bytes.len() {
                set_nodelay(sink, nodelay);
                match rustix::net::send(sink, &rest.bytes[rest.sent..], SendFlags::NOSIGNAL) {
                    Ok(sent) => rest.sent += sent,
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => {
                        self.writable = false;
                        return Ok(false);
                    }
                    Err(error) => return Err(error),
                }
            }
            self.rest = None;
        }
        if let Some(pipe) = &mut self.pipe {
            while pipe.filled > 0 {
                if !self.writable {
                    return Ok(false);
                }
                let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
                match rustix::pipe::splice(&pipe.read, None, sink, None, pipe.filled, flags) {
                    Ok(0) => return Err(Errno::PIPE),
                    Ok(sent) => pipe.filled = pipe.filled.saturating_sub(sent),
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => {
                        self.writable = false;
                        return Ok(false);
                    }
                    Err(error) => return Err(error),
                }
            }
            // Kept while the source goes on: the next round fills it again.
            if (!self.readable || self.ended || !self.bulky)
                && let Some(pipe) = self.pipe.take()
            {
                scratch.give_back(*pipe);
            }
        }
        Ok(true)
    }

    /// Reads once and writes what was read, behind the head if that is still to go.
    fn copy(
        &mut self,
        source: BorrowedFd<'_>,
        sink: BorrowedFd<'_>,
        nodelay: &mut bool,
        scratch: &mut Scratch,
        moved: &mut usize,
    ) -> Result<(), Errno> {
        let Scratch { buffer, head, .. } = scratch;
        // The head is as long as what follows makes it, so room is left in front.
        let begin = if self.head.is_some() { HEAD } else { 0 };
        let room = SCRATCH - begin;
        let read = if self.readable {
            match rustix::net::recv(source, &mut buffer[begin..], RecvFlags::empty()) {
                Ok((_, read)) => Some(read.min(room)),
                Err(Errno::INTR) => return Ok(()),
                Err(Errno::AGAIN) => None,
                Err(error) => return Err(error),
            }
        } else {
            None
        };
        self.readable &= read.is_some();
        let read = match read {
            Some(0) => {
                self.ended = true;
                0
            }
            Some(read) => {
                *moved += read;
                if read < room && !self.wary {
                    // A short read emptied the socket (epoll(7)): no need to ask again, and behind a FIN nothing can follow.
                    self.readable = false;
                    self.ended = self.fin;
                }
                self.bulky = read == room;
                read
            }
            None => 0,
        };
        let front = match self.head.take() {
            Some(ours) => {
                ours.write(&buffer[begin..begin + read], head);
                let front = begin.saturating_sub(head.len());
                buffer[front..begin].copy_from_slice(&head[..begin - front]);
                front
            }
            None => begin,
        };
        self.write(sink, nodelay, &buffer[front..begin + read])
    }

    /// Writes `bytes`; what the sink does not take waits.
    fn write(&mut self, sink: BorrowedFd<'_>, nodelay: &mut bool, bytes: &[u8]) -> Result<(), Errno> {
        // The last bytes wait for the FIN that follows in this very turn: one segment, one wake-up of the sink.
        let flags = if self.ended {
            SendFlags::NOSIGNAL | SendFlags::MORE
        } else {
            SendFlags::NOSIGNAL
        };
        let mut sent = 0;
        while sent < bytes.len() && self.writable {
            if self.written {
                set_nodelay(sink, nodelay);
            }
            match rustix::net::send(sink, &bytes[sent..], flags) {
                Ok(n) => {
                    sent += n;
                    self.written = true;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.writable = false,
                Err(error) => return Err(error),
            }
        }
        if sent < bytes.len() {
            // The sink is slower than the source: that is what bulk looks like.
            self.bulky = true;
            self.rest = Some(Box::new(Rest {
                bytes: bytes[sent..].to_vec(),
                sent: 0,
            }));
        }
        Ok(())
    }

    /// Fills the pipe, which is empty here: so EAGAIN can only mean a dry socket.
    fn splice(&mut self, source: BorrowedFd<'_>, scratch: &mut Scratch, moved: &mut usize) -> Result<(), Errno> {
        if self.pipe.is_none() {
            let Some(pipe) = scratch.take_pipe() else {
                // Out of descriptors or quota: copying always works.
                self.bulky = false;
                return Ok(());
            };
            self.pipe = Some(Box::new(pipe));
        }
        let Some(pipe) = &mut self.pipe else { return Ok(()) };
        // Never SPLICE_F_MORE: it acts as a cork and delays the last bytes by 200 ms.
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        match rustix::pipe::splice(source, None, pipe.write.as_fd(), None, pipe.size, flags) {
            Ok(0) => self.ended = true,
            Ok(read) => {
                pipe.filled = read;
                *moved += read;
                self.bulky = read >= SMALL;
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => self.readable = false,
            // What cannot be spliced (urgent data among it) can be copied.
            Err(Errno::INVAL) => self.bulky = false,
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Nothing of it is under way in this process.
    pub(crate) fn is_clear(&self) -> bool {
        self.rest.is_none() && self.pipe.is_none() && self.head.is_none()
    }

    /// What a successor needs to go on: flags, the bytes that were read and not yet written, and the pipe with those
    /// that are inside it.
    pub(crate) fn record(&self) -> (Record, &[u8], Option<[BorrowedFd<'_>; 2]>) {
        let rest = self.rest.as_ref().map_or(&[][..], |rest| &rest.bytes[rest.sent..]);
        let piped = self.pipe.as_ref().filter(|pipe| pipe.filled > 0);
        let record = Record {
            ended: self.ended,
            told: self.told,
            written: self.written,
            wary: self.wary,
            bulky: self.bulky,
            rest: rest.len(),
            piped: piped.map_or(0, |pipe| pipe.filled),
        };
        (record, rest, piped.map(|pipe| [pipe.read.as_fd(), pipe.write.as_fd()]))
    }

    /// The direction that a predecessor recorded. What the sockets are ready for, the first events tell.
    pub(crate) fn restored(record: &Record, rest: &[u8], pipe: Option<[OwnedFd; 2]>) -> Self {
        Self {
            wary: record.wary,
            ended: record.ended,
            told: record.told,
            bulky: record.bulky,
            written: record.written,
            rest: (!rest.is_empty()).then(|| {
                Box::new(Rest {
                    bytes: rest.to_vec(),
                    sent: 0,
                })
            }),
            pipe: pipe.map(|[read, write]| Box::new(Pipe::of(read, write, record.piped))),
            ..Self::default()
        }
    }

    /// The sink is what a write was refused by.
    pub(crate) fn is_blocked(&self) -> bool {
        self.rest.is_some() || self.pipe.as_ref().is_some_and(|pipe| pipe.filled > 0)
    }

    /// Gives the pipe back for another session, if it is empty; one with bytes in it is closed.
    pub(crate) fn close(&mut self, scratch: &mut Scratch) {
        if let Some(pipe) = self.pipe.take() {
            scratch.give_back(*pipe);
        }
        self.rest = None;
    }
}

/// Nagle's algorithm delays a small write only behind unacknowledged ones, so the first write goes without this call.
fn set_nodelay(socket: BorrowedFd<'_>, done: &mut bool) {
    if !*done {
        *done = true;
        // Failing, it costs latency, not correctness.
        let _ = rustix::net::sockopt::set_tcp_nodelay(socket, true);
    }
}

/// Tells the sink that nothing more will come.
pub(crate) fn finish(sink: BorrowedFd<'_>) {
    // It fails only on a socket that is already gone, which the next event reports.
    let _ = rustix::net::shutdown(sink, Shutdown::Write);
}
