//! Copies between two streams both ways until both directions have ended.
//!
//! ```text
//!            ┌── dir 0: buf 64 KiB ──▶
//!   a (host) │                        b (local port)
//!            ◀── dir 1: buf 64 KiB ──┘
//! ```
//! - Each direction ends by itself: an end of file is passed on as a shutdown *after* everything before it was written.
//! - After a read error what was read is still delivered, and then both sides are broken off. So they are after an end of file
//!   of the host's side to which nothing can be written either: that is how a reset, or a host that died, looks on AF_VSOCK and
//!   Unix sockets. Once our own direction has ended, the two cannot be told apart any more.
//! - A stream is broken off by closing it without a shutdown: the host can tell that from an end, and on TCP it is a reset. The
//!   same happens to both if this process is killed.
//! - Where the host's side is in chunks ([`relay_chunks`]), its end and ours are chunks, and bytes that stop without one are broken
//!   off. Otherwise all of this is the same.
//! - A write error stops that direction only; the other one is read to its end first, because a server that refuses a
//!   body has usually sent the reason why.
//! - One thread, no timer: it sleeps in `poll` and asks only for events that it can act on, so that a full buffer, or a hang-up
//!   about which nothing can be done, costs no wake-up.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::AsFd;

use adit_channel::chunk::{Apart, Reader, Stop, Writer};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::conn::Conn;

/// Bytes in flight a direction.
pub const BUF_BYTES: usize = 64 * 1024;

/// What went through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Bytes from `a` to `b`.
    pub a_to_b: u64,
    /// Bytes from `b` to `a`.
    pub b_to_a: u64,
    /// Whether it ended by an error instead of two ends of file.
    pub aborted: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Open,
    Ended,
    Failed,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Sink {
    Open,
    Shut,
    Failed,
}

/// One direction.
struct Dir {
    buf: Vec<u8>,
    start: usize,
    end: usize,
    source: Source,
    sink: Sink,
    readable: bool,
    writable: bool,
    moved: u64,
    /// What is read are chunks.
    reader: Option<Reader>,
    /// What is written are chunks.
    writer: Option<Writer>,
    /// The end is written, or on its way.
    stopping: bool,
}

impl Dir {
    fn new(reader: Option<Reader>, writer: Option<Writer>) -> Self {
        Self {
            reader,
            writer,
            stopping: false,
            buf: vec![0; BUF_BYTES],
            start: 0,
            end: 0,
            source: Source::Open,
            sink: Sink::Open,
            readable: false,
            writable: true,
            moved: 0,
        }
    }

    fn pending(&self) -> bool {
        self.start < self.end
    }

    fn wants_read(&self) -> bool {
        self.source == Source::Open && self.sink == Sink::Open && self.end < self.buf.len()
    }

    fn wants_write(&self) -> bool {
        (self.pending() || self.owes_head()) && self.sink == Sink::Open
    }

    fn owes_head(&self) -> bool {
        self.writer.as_ref().is_some_and(Writer::owes_head)
    }

    /// Reads behind `end`. Returns how many bytes came, of which heads of chunks are none any more.
    fn read(&mut self, mut from: &Conn) -> io::Result<usize> {
        let room = &mut self.buf[self.end..];
        let Some(reader) = &mut self.reader else {
            let n = from.read(room)?;
            self.end += n;
            return Ok(n);
        };
        let mut apart = Apart::default();
        let mut parts = apart.parts(reader, room, false).map(IoSliceMut::new);
        let n = from.read_vectored(&mut parts)?;
        if n == 0 {
            return Ok(0);
        }
        apart.came(n);
        let (payload, outcome) = reader.unwrap_apart(&apart, room);
        self.end += payload;
        match (outcome, reader.stopped()) {
            (Ok(()), None) => {}
            (Ok(()), Some(Stop::End)) => self.source = Source::Ended,
            (Err(_), _) | (Ok(()), Some(Stop::Abort)) => self.source = Source::Failed,
        }
        Ok(n)
    }

    /// Writes some of what is pending. Returns how much of it.
    fn write(&mut self, mut to: &Conn) -> io::Result<usize> {
        let pending = &self.buf[self.start..self.end];
        let Some(writer) = &mut self.writer else {
            return to.write(pending);
        };
        let (head, n) = writer.next(pending.len());
        let n = to.write_vectored(&[IoSlice::new(head), IoSlice::new(&pending[..n])])?;
        Ok(writer.sent(n))
    }

    /// Passes the end on. Returns false if it has to wait.
    fn pass_on_end(&mut self, to: &Conn) -> bool {
        let Some(writer) = &mut self.writer else {
            self.sink = match to.shutdown_write() {
                Ok(()) => Sink::Shut,
                Err(_) => Sink::Failed,
            };
            return true;
        };
        if !std::mem::replace(&mut self.stopping, true) {
            // Nothing is pending, so it is between chunks.
            let _ = writer.stop(Stop::End);
            return true;
        }
        if !writer.owes_head() {
            self.sink = Sink::Shut;
        }
        self.sink == Sink::Shut
    }

    /// Says that all is broken off, if there is room for that: the close behind it says the same.
    fn say_abort(&mut self, to: &Conn) {
        if self.sink == Sink::Open && self.writer.as_mut().is_some_and(|w| w.stop(Stop::Abort)) {
            (self.start, self.end) = (0, 0);
            let _ = self.write(to);
        }
    }

    fn finished(&self) -> bool {
        self.sink != Sink::Open
    }

    /// Moves what can be moved now; true if anything changed.
    fn pump(&mut self, from: &Conn, to: &Conn, broken_off: impl Fn() -> bool) -> bool {
        let mut progress = false;
        if self.wants_read() && self.readable {
            match self.read(from) {
                Ok(0) if self.reader.is_some() || broken_off() => {
                    (self.source, progress) = (Source::Failed, true);
                }
                Ok(0) => (self.source, progress) = (Source::Ended, true),
                Ok(_) => progress = true,
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.readable = false,
                Err(e) if e.kind() == ErrorKind::Interrupted => progress = true,
                Err(_) => (self.source, progress) = (Source::Failed, true),
            }
        }
        if self.wants_write() && self.writable {
            match self.write(to) {
                Ok(n) => {
                    self.start += n;
                    self.moved += n as u64;
                    progress = true;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(e) if e.kind() == ErrorKind::Interrupted => progress = true,
                Err(_) => (self.sink, progress) = (Sink::Failed, true),
            }
            if !self.pending() {
                (self.start, self.end) = (0, 0);
            }
        }
        if self.source == Source::Ended && !self.pending() && self.sink == Sink::Open {
            progress |= self.pass_on_end(to);
        }
        progress
    }
}

/// Relays between a host and a local port until both directions have ended; closes nothing (the caller drops the streams).
///
/// # Errors
/// Only if the streams cannot be polled at all.
pub fn relay(a: &Conn, b: &Conn) -> io::Result<Moved> {
    relay_dirs(a, b, [Dir::new(None, None), Dir::new(None, None)])
}

/// As [`relay`], where the host's side is in chunks.
///
/// # Errors
/// As above.
pub fn relay_chunks(a: &Conn, b: &Conn, reader: Reader, writer: Writer) -> io::Result<Moved> {
    let to_local = Dir::new(Some(reader), None);
    relay_dirs(a, b, [to_local, Dir::new(None, Some(writer))])
}

fn relay_dirs(a: &Conn, b: &Conn, mut dirs: [Dir; 2]) -> io::Result<Moved> {
    a.set_nonblocking()?;
    b.set_nonblocking()?;
    b.reset_on_close(true);
    loop {
        let [ab, ba] = &mut dirs;
        let answering = ba.sink != Sink::Shut;
        let progress = ab.pump(a, b, || answering && a.is_broken_off()) | ba.pump(b, a, || false);
        let failed = dirs
            .iter()
            .any(|d| d.source == Source::Failed && (!d.pending() || d.finished()));
        if failed || dirs.iter().all(Dir::finished) {
            let aborted = failed || dirs.iter().any(|d| d.sink == Sink::Failed);
            b.reset_on_close(aborted);
            if failed {
                dirs[1].say_abort(a);
            }
            return Ok(Moved {
                a_to_b: dirs[0].moved,
                b_to_a: dirs[1].moved,
                aborted,
            });
        }
        if !progress {
            wait(a, b, &mut dirs)?;
        }
    }
}

/// Sleeps until one of the streams can go on.
fn wait(a: &Conn, b: &Conn, dirs: &mut [Dir; 2]) -> io::Result<()> {
    let interest = |read: &Dir, write: &Dir| {
        let mut want = PollFlags::empty();
        want.set(PollFlags::POLLIN, read.wants_read());
        want.set(PollFlags::POLLOUT, write.wants_write());
        // Of a stream that has ended its direction only a hang-up matters, and only while something may still have to be
        // written to it.
        let watch = !want.is_empty() || (read.source == Source::Ended && !write.finished());
        watch.then_some(want)
    };
    let wants = [interest(&dirs[0], &dirs[1]), interest(&dirs[1], &dirs[0])];
    let mut fds = Vec::with_capacity(2);
    let mut who = Vec::with_capacity(2);
    for (i, (conn, want)) in [a, b].into_iter().zip(wants).enumerate() {
        if let Some(want) = want {
            fds.push(PollFd::new(conn.as_fd(), want));
            who.push((i, want));
        }
    }
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(e) => return Err(e.into()),
    }
    let gone = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
    for (fd, (i, want)) in fds.iter().zip(who) {
        let got = fd.revents().unwrap_or(PollFlags::POLLNVAL);
        if got.intersects(PollFlags::POLLIN | gone) {
            dirs[i].readable = true;
        }
        if got.intersects(PollFlags::POLLOUT | gone) {
            dirs[1 - i].writable = true;
        }
        if want.is_empty() && got.intersects(gone) {
            // Nobody is left to write to; the other direction of this stream has ended already.
            dirs[1 - i].sink = Sink::Failed;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
