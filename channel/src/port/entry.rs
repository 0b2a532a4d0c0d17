//! One stream as the shell sees it: its sink, what is held for it, and how bytes move.
//!
//! ```text
//! from the guest:  RxPacket ──writev──► sink       what the sink does not take: `held`, inside the stream's window
//! to the guest:    `out`, then the sink ──readv──► TxSlot
//! ```
//! Rule: whatever `held` has is credit that was really lent; it is given back (`consumed`) when the sink took it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use adit_engine::StreamId;
use nix::sys::socket::{MsgFlags, Shutdown, getsockopt, send, shutdown, sockopt};

use crate::carrier::{CarrierFault, RxPacket, TxSlot};
use crate::dial::Dial;
use crate::sink::{ServiceEvent, Sink, Straight, StreamIo};
use crate::socket_end;

/// Payload is copied through a buffer of this many bytes where it goes to no descriptor.
const CHUNK: usize = 4096;
/// Small packets of inline services go through one of so many: clearing a large one costs more than the packet.
const SMALL: usize = 256;
/// A buffer that drained keeps at most this capacity, bytes.
const KEEP_MAX: usize = 4096;

/// Where a stream is in its life.
pub(super) enum Phase {
    /// Asked for, not answered.
    Requesting(Box<Dial>),
    /// Connected; the hello is under way.
    Hello(Box<Dial>),
    /// The guest asks; the owner has not answered.
    Asked,
    /// Open. Without a sink it holds what comes.
    Open,
}

/// A stream.
pub(super) struct Entry {
    pub(super) id: StreamId,
    pub(super) phase: Phase,
    pub(super) sink: Option<Sink>,
    /// From the guest, not yet taken by the sink.
    pub(super) held: VecDeque<u8>,
    /// For the guest, ahead of what the sink has.
    pub(super) out: VecDeque<u8>,
    /// The sink may have bytes to read.
    pub(super) readable: bool,
    /// The other end of the sink is shut: a short read is not the end of what it has.
    pub(super) hung_up: bool,
    /// The port is told when the sink has room.
    pub(super) room_watched: bool,
    /// The other side is an agent, or a port process: it ends its sending before it closes, so a stream that is closed
    /// without was broken off. Of others that is not known: most programs just close.
    pub(super) ends_in_order: bool,
    /// The sink sends no more, and the engine knows.
    pub(super) sink_done: bool,
    /// The peer sends no more.
    pub(super) peer_done: bool,
    /// The sink was told so.
    pub(super) told_done: bool,
    /// The application's side of a local sink is to be woken at the end of the burst.
    pub(super) wake: bool,
    /// An inline service has more to write than is queued.
    pub(super) service_more: bool,
    /// An inline service asked for the end.
    pub(super) service_done: bool,
    pub(super) service_reset: bool,
}

/// What a fill brought.
pub(super) enum Fill {
    /// That many bytes are in the slot, at least 1.
    Bytes(u32),
    /// The sink has nothing now.
    Empty,
    /// The sink sends no more.
    End,
    /// The sink is broken.
    Broken(io::Error),
}

/// Why a delivery failed.
pub(super) enum Undelivered {
    /// The sink is broken: the stream ends.
    Sink(io::Error),
    /// The carrier is broken.
    Carrier(CarrierFault),
}

impl From<CarrierFault> for Undelivered {
    fn from(fault: CarrierFault) -> Self {
        Self::Carrier(fault)
    }
}

/// Bytes that went through memory of ours.
pub(super) type Copied<'a> = &'a mut u64;

impl Entry {
    pub(super) fn new(id: StreamId, phase: Phase) -> Self {
        Self {
            id,
            phase,
            sink: None,
            held: VecDeque::new(),
            out: VecDeque::new(),
            readable: false,
            hung_up: false,
            room_watched: false,
            ends_in_order: false,
            sink_done: false,
            peer_done: false,
            told_done: false,
            wake: false,
            service_more: false,
            service_done: false,
            service_reset: false,
        }
    }

    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.sink {
            Some(Sink::Fd(fd)) => Some(fd.as_fd()),
            _ => None,
        }
    }

    fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Open)
    }

    /// Tells whether what comes from the guest may go to the sink together with what comes next.
    pub(super) fn gathers(&self) -> bool {
        self.is_open() && self.held.is_empty() && self.fd().is_some()
    }

    /// Moves `len` bytes of a packet to the sink; the rest is held. Returns what the sink took.
    pub(super) fn deliver<P: RxPacket>(
        &mut self,
        packet: &mut P,
        len: u32,
        copied: Copied<'_>,
    ) -> Result<u32, Undelivered> {
        if !self.is_open() || !self.held.is_empty() {
            self.hold(packet, len, copied)?;
            return self.flush(copied).map_err(Undelivered::Sink);
        }
        let taken = match &mut self.sink {
            Some(Sink::Fd(fd)) => match packet.write_to(fd.as_fd(), len) {
                Ok(n) => n as u32,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
                Err(e) => return Err(Undelivered::Sink(e)),
            },
            Some(Sink::Local(end)) => {
                let mut state = end.0.lock();
                let n = state.room().min(len as usize) as u32;
                state.starved |= n < len;
                read_chunks(n, |dst| packet.read(dst), |bytes| state.push(bytes))?;
                *copied += u64::from(n);
                self.wake = true;
                n
            }
            Some(Sink::Inline(_)) if len as usize <= SMALL => {
                return self.serve(packet, len, &mut [0; SMALL], copied);
            }
            Some(Sink::Inline(_)) => return self.serve(packet, len, &mut [0; CHUNK], copied),
            None => {
                self.hold(packet, len, copied)?;
                return self.flush(copied).map_err(Undelivered::Sink);
            }
        };
        self.hold(packet, len - taken, copied)?;
        Ok(taken)
    }

    /// Shows an inline service a packet piece by piece, as long as it takes all of each; the rest is held.
    fn serve<P: RxPacket>(
        &mut self,
        packet: &mut P,
        mut len: u32,
        buf: &mut [u8],
        copied: Copied<'_>,
    ) -> Result<u32, Undelivered> {
        let mut taken = 0;
        while len > 0 {
            let want = buf.len().min(len as usize);
            let n = read_some(&mut |dst| packet.read(dst), &mut buf[..want], len)?;
            *copied += n as u64;
            len -= n as u32;
            let took = self.service_event(ServiceEvent::Data(&buf[..n])).min(n);
            // Windows are far below 4 GiB.
            taken += took as u32;
            if took < n {
                self.held.extend(&buf[took..n]);
                self.hold(packet, len, copied)?;
                if len > 0 {
                    // There is more behind what it left.
                    taken += self.flush(copied).map_err(Undelivered::Sink)?;
                }
                break;
            }
        }
        Ok(taken)
    }

    fn hold<P: RxPacket>(
        &mut self,
        packet: &mut P,
        len: u32,
        copied: Copied<'_>,
    ) -> Result<(), CarrierFault> {
        *copied += u64::from(len);
        self.hold_from(len, |dst| packet.read(dst))
    }

    /// Holds `len` bytes that `read` copies out.
    pub(super) fn hold_from(
        &mut self,
        len: u32,
        read: impl FnMut(&mut [u8]) -> Result<usize, CarrierFault>,
    ) -> Result<(), CarrierFault> {
        read_chunks(len, read, |bytes| self.held.extend(bytes))
    }

    /// Gives the sink what is held, as far as it takes it. Returns how much that was.
    pub(super) fn flush(&mut self, copied: Copied<'_>) -> io::Result<u32> {
        let mut taken = 0;
        if !self.is_open() {
            return Ok(0);
        }
        match &mut self.sink {
            Some(Sink::Fd(fd)) => taken = write_held(fd.as_fd(), &mut self.held)?,
            Some(Sink::Local(end)) if !self.held.is_empty() => {
                let mut state = end.0.lock();
                let n = state.room().min(self.held.len());
                state.starved = n < self.held.len();
                for bytes in self.held.drain(..n).collect::<Vec<_>>().chunks(CHUNK) {
                    state.push(bytes);
                }
                *copied += n as u64;
                self.wake |= n > 0;
                taken = n;
            }
            Some(Sink::Inline(service)) if !self.held.is_empty() => {
                let held = self.held.make_contiguous();
                let mut io = StreamIo::new(&mut self.out);
                service.on_event(ServiceEvent::Data(held), &mut io);
                let (more, done, reset) = (io.more, io.done, io.reset);
                taken = io.taken.min(self.held.len());
                self.held.drain(..taken);
                self.service_more |= more;
                self.service_done |= done;
                self.service_reset |= reset;
            }
            _ => {}
        }
        shrink(&mut self.held);
        // Windows are far below 4 GiB.
        Ok(taken as u32)
    }

    /// Tells the sink, once, that the peer sends no more, when all of it was delivered.
    pub(super) fn tell_done(&mut self) {
        if !self.peer_done || self.told_done || !self.held.is_empty() || !self.is_open() {
            return;
        }
        match &mut self.sink {
            // It may be gone already, which its own events tell.
            Some(Sink::Fd(fd)) => drop(shutdown(fd.as_raw_fd(), Shutdown::Write)),
            Some(Sink::Local(end)) => {
                end.0.lock().peer_done = true;
                self.wake = true;
            }
            Some(Sink::Inline(_)) => {
                self.told_done = true;
                self.service_event(ServiceEvent::PeerDone);
                return;
            }
            None => return,
        }
        self.told_done = true;
    }

    /// Tells the sink that the peer takes no more, as far as its kind can tell: whoever writes to a Unix socket gets EPIPE.
    pub(super) fn tell_deaf(&mut self) {
        match &self.sink {
            // To whom order matters, a socket that is shut both ways is one that was broken off.
            Some(Sink::Fd(fd)) if !self.ends_in_order => {
                // It may be gone already, which its own events tell.
                let _ = shutdown(fd.as_raw_fd(), Shutdown::Read);
            }
            Some(Sink::Local(end)) => {
                let mut state = end.0.lock();
                state.peer_deaf = true;
                state.to_guest.clear();
                self.wake = true;
            }
            Some(Sink::Fd(_) | Sink::Inline(_)) | None => {}
        }
    }

    /// Tells, at the end of what a sink had, whether whoever has its other end closed it altogether. A TCP socket cannot
    /// tell; one that was told the peer's end may close when it likes.
    pub(super) fn is_sink_gone(&self) -> bool {
        !self.told_done && self.fd().is_some_and(socket_end::is_closed)
    }

    /// Shows an inline service something; returns the bytes that it took.
    pub(super) fn service_event(&mut self, event: ServiceEvent<'_>) -> usize {
        let Some(Sink::Inline(service)) = &mut self.sink else {
            return 0;
        };
        let mut io = StreamIo::new(&mut self.out);
        service.on_event(event, &mut io);
        let (taken, more, done, reset) = (io.taken, io.more, io.done, io.reset);
        self.service_more |= more;
        self.service_done |= done;
        self.service_reset |= reset;
        taken
    }

    /// What the engine is to know that there is to send: bytes, or `u32::MAX` = some.
    pub(super) fn offered(&self) -> u32 {
        if self.sink_done {
            return 0;
        }
        let out = u32::try_from(self.out.len()).unwrap_or(u32::MAX);
        if !self.is_open() {
            return out; // our hello
        }
        match &self.sink {
            Some(Sink::Fd(_)) if self.readable => u32::MAX,
            Some(Sink::Inline(_)) if self.service_more => u32::MAX,
            Some(Sink::Local(end)) => {
                let waiting = end.0.lock().to_guest.len();
                out.saturating_add(u32::try_from(waiting).unwrap_or(u32::MAX))
            }
            _ => out,
        }
    }

    /// Tells whether the sink said that it sends no more, and all that it sent is gone.
    pub(super) fn at_end(&self) -> bool {
        if self.sink_done || !self.out.is_empty() || !self.is_open() {
            return false;
        }
        match &self.sink {
            Some(Sink::Local(end)) => {
                let state = end.0.lock();
                state.send_done && state.to_guest.is_empty()
            }
            Some(Sink::Inline(_)) => self.service_done,
            Some(Sink::Fd(_)) | None => false,
        }
    }

    /// Puts at most `len` bytes into a slot.
    pub(super) fn fill<S: TxSlot>(
        &mut self,
        slot: &mut S,
        len: u32,
        copied: Copied<'_>,
    ) -> Result<Fill, CarrierFault> {
        if !self.out.is_empty() {
            let n = write_queue(slot, &mut self.out, len)?;
            *copied += u64::from(n);
            if self.out.is_empty() {
                self.service_event(ServiceEvent::Writable);
            }
            return Ok(if n == 0 { Fill::Empty } else { Fill::Bytes(n) });
        }
        if !self.is_open() {
            return Ok(Fill::Empty);
        }
        match &mut self.sink {
            Some(Sink::Fd(fd)) => Ok(match slot.read_from(fd.as_fd(), len) {
                Ok(0) => Fill::End,
                Ok(n) => {
                    // Fewer than asked for: it is empty, and more raises a new edge; but the end may be there already.
                    self.readable = n as u64 == u64::from(len) || self.hung_up;
                    Fill::Bytes(n as u32)
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    Fill::Empty
                }
                Err(e) => Fill::Broken(e),
            }),
            Some(Sink::Local(end)) => {
                let n = write_queue(slot, &mut end.0.lock().to_guest, len)?;
                *copied += u64::from(n);
                self.wake |= n > 0;
                Ok(if n == 0 { Fill::Empty } else { Fill::Bytes(n) })
            }
            Some(Sink::Inline(service)) if std::mem::take(&mut self.service_more) => {
                let (mut filled, mut fault) = (0, None);
                let mut put = |bytes: &[u8]| match slot.write(bytes) {
                    Ok(n) => {
                        // At most `len` in all.
                        filled += n as u32;
                        n
                    }
                    Err(e) => {
                        fault = Some(e);
                        0
                    }
                };
                let mut io = StreamIo::new(&mut self.out);
                io.straight = Some(Straight {
                    put: &mut put,
                    room: len as usize,
                });
                service.on_event(ServiceEvent::Writable, &mut io);
                let (more, done, reset) = (io.more, io.done, io.reset);
                self.service_more = more;
                self.service_done |= done;
                self.service_reset |= reset;
                *copied += u64::from(filled);
                match fault {
                    Some(fault) => Err(fault),
                    None if filled == 0 => Ok(Fill::Empty),
                    None => Ok(Fill::Bytes(filled)),
                }
            }
            Some(Sink::Inline(_)) | None => Ok(Fill::Empty),
        }
    }
}

/// Closes a socket so that its other end sees a reset rather than an end, as far as its kind can tell the two apart: of a
/// Unix socket the other end sees that nothing can be written to it either.
pub(super) fn abort(fd: OwnedFd) {
    socket_end::reset_on_close(fd, true);
}

/// Ends a socket in order; duplicates that others hold do not keep its other end waiting. It can be closed then.
pub(super) fn finish(fd: BorrowedFd<'_>) {
    socket_end::reset_on_close(fd, false);
    // It may be gone already.
    let _ = shutdown(fd.as_raw_fd(), Shutdown::Write);
}

/// Tells whether a socket's other end sees, at its end, whether it was closed, too.
pub(super) fn shows_close(fd: BorrowedFd<'_>) -> bool {
    // Of a Unix socket the kernel knows whose its other end is; of any other it says that nobody's is.
    let peer = getsockopt(&fd, sockopt::PeerCredentials);
    peer.is_ok_and(|peer| peer.uid() != libc::uid_t::MAX)
}

/// Writes held bytes to a socket until it takes no more.
pub(super) fn write_held(fd: BorrowedFd<'_>, held: &mut VecDeque<u8>) -> io::Result<usize> {
    let mut taken = 0;
    while !held.is_empty() {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(fd.as_raw_fd(), held.as_slices().0, flags) {
            Ok(n) => {
                held.drain(..n);
                taken += n;
            }
            Err(nix::errno::Errno::EINTR) => {}
            Err(nix::errno::Errno::EAGAIN) => break,
            Err(e) => return Err(e.into()),
        }
    }
    Ok(taken)
}

/// Reads at least a byte of the `len` that are there.
fn read_some(
    read: &mut impl FnMut(&mut [u8]) -> Result<usize, CarrierFault>,
    dst: &mut [u8],
    len: u32,
) -> Result<usize, CarrierFault> {
    match read(dst)? {
        // The engine was told how much there is.
        0 => Err(CarrierFault {
            what: "packet is shorter than it was",
            value: 0,
            limit: u64::from(len),
        }),
        n => Ok(n),
    }
}

fn read_chunks(
    mut len: u32,
    mut read: impl FnMut(&mut [u8]) -> Result<usize, CarrierFault>,
    mut give: impl FnMut(&[u8]),
) -> Result<(), CarrierFault> {
    let mut chunk = [0; CHUNK];
    while len > 0 {
        let want = chunk.len().min(len as usize);
        let n = read_some(&mut read, &mut chunk[..want], len)?;
        give(&chunk[..n]);
        len -= n as u32;
    }
    Ok(())
}

fn write_queue<S: TxSlot>(
    slot: &mut S,
    queue: &mut VecDeque<u8>,
    len: u32,
) -> Result<u32, CarrierFault> {
    let (mut done, len) = (0, len as usize);
    while done < len && !queue.is_empty() {
        let front = queue.as_slices().0;
        let n = slot.write(&front[..front.len().min(len - done)])?;
        if n == 0 {
            break;
        }
        queue.drain(..n);
        done += n;
    }
    shrink(queue);
    Ok(done as u32)
}

fn shrink(queue: &mut VecDeque<u8>) {
    if queue.is_empty() && queue.capacity() > KEEP_MAX {
        *queue = VecDeque::new();
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn only_a_unix_socket_shows_that_it_was_closed() {
        let (a, b) = UnixStream::pair().unwrap();
        assert!(shows_close(a.as_fd()) && shows_close(b.as_fd()));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(!shows_close(tcp.as_fd()));
    }
}
