//! One stream in the shell: its sink, the bytes that are held for it, and how bytes move.
//!
//! ```text
//! from the guest:  RxPacket ──writev──► sink     bytes that it does not accept: `held`, within the stream's window
//! to the guest:    `out`, then the sink ──readv──► TxSlot
//! to the sink only: the greeting, ahead of everything from the guest: the first bytes of `held`
//! ```
//! Rule: the bytes in `held` use credit that was really lent. The credit is returned (`consumed`) when the sink
//! accepts them.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use adit_engine::{StreamId, Tick};
use nix::sys::socket::{MsgFlags, Shutdown, getsockopt, send, shutdown, sockopt};

use super::Totals;
use crate::carrier::{CarrierFault, RxPacket, TxSlot};
use crate::dial::Dial;
use crate::rate::{Limit, Way};
use crate::sink::{DirectWrite, ServiceEvent, Sink, StreamIo};
use crate::socket_end;

/// Size of the buffer through which payload is copied if the sink is not a descriptor.
const CHUNK: usize = 4096;
/// Size of the buffer for small packets to inline services. Clearing a large buffer costs more than handling the
/// packet.
const SMALL: usize = 256;
/// A buffer that has drained keeps at most this capacity, in bytes.
const KEEP_MAX: usize = 4096;

/// The phase of a stream in the shell.
pub(super) enum Phase {
    /// The host dials: the guest has not answered, or the hello is not complete.
    Dialing(Box<Dial>),
    /// The guest dials, and the owner has not answered.
    Asked,
    /// Open. Without a sink it holds the bytes that arrive.
    Open,
}

/// A stream.
pub(super) struct Entry {
    pub(super) id: StreamId,
    pub(super) phase: Phase,
    /// What it has carried.
    pub(super) totals: Totals,
    pub(super) sink: Option<Sink>,
    /// How many bytes a second a socket takes and gives; none: any number.
    pub(super) limit: Option<Box<Limit>>,
    /// Bytes that the sink has not accepted yet: the rest of the greeting, then bytes from the guest.
    pub(super) held: VecDeque<u8>,
    /// Number of bytes of the greeting that are still in `held`. No credit was lent for them.
    pub(super) greeting: usize,
    /// Bytes for the guest that go before the sink's bytes.
    pub(super) out: VecDeque<u8>,
    /// The sink may have bytes to read.
    pub(super) readable: bool,
    /// The other end of the sink is shut down. A short read then does not mean that the sink is empty.
    pub(super) hung_up: bool,
    /// The epoll set reports when the sink has room.
    pub(super) room_watched: bool,
    /// The program in the guest is an agent or a port process. It ends its sending before it closes, so a stream that
    /// closes without that was broken off. Other programs usually just close, so for them this is unknown.
    pub(super) ends_in_order: bool,
    /// The sink sends no more, and the engine knows it.
    pub(super) sink_done: bool,
    /// The peer sends no more.
    pub(super) peer_done: bool,
    /// The sink was informed of that.
    pub(super) end_passed_on: bool,
    /// Wake the application of a local sink at the end of the burst.
    pub(super) wake: bool,
    /// An inline service has more to write than is queued.
    pub(super) service_more: bool,
    /// An inline service asked to end the stream.
    pub(super) service_done: bool,
    pub(super) service_reset: bool,
}

/// The result of filling a slot.
pub(super) enum Fill {
    /// This many bytes are in the slot, at least 1.
    Bytes(u32),
    /// The sink has no bytes now.
    Empty,
    /// The sink sends no more.
    End,
    /// The sink is broken.
    Broken(io::Error),
}

impl Fill {
    /// Number of bytes in the slot.
    pub(super) fn bytes(&self) -> u32 {
        match self {
            Self::Bytes(n) => *n,
            Self::Empty | Self::End | Self::Broken(_) => 0,
        }
    }
}

/// Why a delivery failed.
pub(super) enum DeliveryError {
    /// The sink is broken: the stream ends.
    Sink(io::Error),
    /// The carrier is broken.
    Carrier(CarrierFault),
}

impl From<CarrierFault> for DeliveryError {
    fn from(fault: CarrierFault) -> Self {
        Self::Carrier(fault)
    }
}

/// Counter of bytes that were copied through this process's memory.
pub(super) type Copied<'a> = &'a mut u64;

impl Entry {
    pub(super) fn new(id: StreamId, phase: Phase) -> Self {
        Self {
            id,
            phase,
            totals: Totals::default(),
            sink: None,
            limit: None,
            held: VecDeque::new(),
            greeting: 0,
            out: VecDeque::new(),
            readable: false,
            hung_up: false,
            room_watched: false,
            ends_in_order: false,
            sink_done: false,
            peer_done: false,
            end_passed_on: false,
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

    /// Returns true if bytes from the guest may be written to the sink together with those of later packets.
    pub(super) fn gathers(&self) -> bool {
        self.is_open() && self.held.is_empty() && self.fd().is_some() && self.limit.is_none()
    }

    /// Moves `len` bytes of a packet to the sink, and holds the rest. Returns the number of bytes that the sink
    /// accepted.
    pub(super) fn deliver<P: RxPacket>(
        &mut self,
        now: Tick,
        packet: &mut P,
        len: u32,
        copied: Copied<'_>,
    ) -> Result<u32, DeliveryError> {
        if !self.is_open() || !self.held.is_empty() || !self.lets_through(now, len) {
            self.hold(packet, len, copied)?;
            return self.flush(now, copied).map_err(DeliveryError::Sink);
        }
        let taken = match &mut self.sink {
            Some(Sink::Fd(fd)) => match packet.write_to(fd.as_fd(), len) {
                Ok(n) => n as u32,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
                Err(e) => return Err(DeliveryError::Sink(e)),
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
                return self.serve(now, packet, len, &mut [0; SMALL], copied);
            }
            Some(Sink::Inline(_)) => return self.serve(now, packet, len, &mut [0; CHUNK], copied),
            None => {
                self.hold(packet, len, copied)?;
                return self.flush(now, copied).map_err(DeliveryError::Sink);
            }
        };
        if let Some(limit) = &self.limit {
            limit.unused(Way::Out, len - taken);
        }
        self.hold(packet, len - taken, copied)?;
        Ok(taken)
    }

    /// Takes a whole packet's bytes of the limit. Returns false, and takes none, if it has not as many now.
    fn lets_through(&mut self, now: Tick, len: u32) -> bool {
        let Some(limit) = &mut self.limit else {
            return true;
        };
        let may = limit.may(now, Way::Out, len);
        if may < len {
            limit.unused(Way::Out, may);
        }
        may == len
    }

    /// Passes a packet to an inline service in pieces, as long as it takes each piece completely. The rest is held.
    fn serve<P: RxPacket>(
        &mut self,
        now: Tick,
        packet: &mut P,
        mut len: u32,
        buf: &mut [u8],
        copied: Copied<'_>,
    ) -> Result<u32, DeliveryError> {
        let mut taken = 0;
        while len > 0 {
            let want = buf.len().min(len as usize);
            let n = read_some(&mut |dst| packet.read(dst), &mut buf[..want], len)?;
            *copied += n as u64;
            len -= n as u32;
            let took = self.service_event(ServiceEvent::Data(&buf[..n])).min(n);
            // Windows are far below 4 GiB, so the sum fits.
            taken += took as u32;
            if took < n {
                self.held.extend(&buf[took..n]);
                self.hold(packet, len, copied)?;
                if len > 0 {
                    // Show the bytes that it left again, with more bytes after them.
                    taken += self.flush(now, copied).map_err(DeliveryError::Sink)?;
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

    /// Holds `len` bytes, which `read` copies out.
    pub(super) fn hold_from(
        &mut self,
        len: u32,
        read: impl FnMut(&mut [u8]) -> Result<usize, CarrierFault>,
    ) -> Result<(), CarrierFault> {
        read_chunks(len, read, |bytes| self.held.extend(bytes))
    }

    /// Passes held bytes to the sink, as many as it accepts and as its limit lets through. Returns how many of them were the
    /// guest's.
    pub(super) fn flush(&mut self, now: Tick, copied: Copied<'_>) -> io::Result<u32> {
        let mut taken = 0;
        if !self.is_open() {
            return Ok(0);
        }
        match &mut self.sink {
            Some(Sink::Fd(fd)) => {
                loop {
                    let of_guest = self.held.len() - self.greeting;
                    let may = match &mut self.limit {
                        None => of_guest,
                        // Windows are far below 4 GiB, so it fits.
                        Some(limit) => limit.may(now, Way::Out, of_guest as u32) as usize,
                    };
                    let most = self.greeting + may;
                    let written = write_held(fd.as_fd(), &mut self.held, most)?;
                    let greeting = written.min(self.greeting);
                    self.greeting -= greeting;
                    taken += written - greeting;
                    let Some(limit) = &mut self.limit else {
                        break;
                    };
                    limit.unused(Way::Out, (may + greeting - written) as u32);
                    if written < most || may == 0 {
                        break;
                    }
                }
            }
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
        // Windows are far below 4 GiB, so the sum fits.
        Ok(taken as u32)
    }

    /// Informs the sink, once, that the peer sends no more, after all bytes were delivered.
    pub(super) fn pass_on_end(&mut self) {
        if !self.peer_done || self.end_passed_on || !self.held.is_empty() || !self.is_open() {
            return;
        }
        match &mut self.sink {
            // The socket may be closed already; its own events report that.
            Some(Sink::Fd(fd)) => drop(shutdown(fd.as_raw_fd(), Shutdown::Write)),
            Some(Sink::Local(end)) => {
                end.0.lock().peer_done = true;
                self.wake = true;
            }
            Some(Sink::Inline(_)) => {
                self.end_passed_on = true;
                self.service_event(ServiceEvent::PeerDone);
                return;
            }
            None => return,
        }
        self.end_passed_on = true;
    }

    /// Informs the sink that the peer receives no more, if its kind allows it: a writer to a Unix socket then gets
    /// EPIPE.
    pub(super) fn stop_sink_writes(&mut self) {
        match &self.sink {
            // For a stream that ends in order, a socket that is shut down both ways would mean that the stream was
            // broken off.
            Some(Sink::Fd(fd)) if !self.ends_in_order => {
                // The socket may be closed already; its own events report that.
                let _ = shutdown(fd.as_raw_fd(), Shutdown::Read);
            }
            Some(Sink::Local(end)) => {
                let mut state = end.0.lock();
                state.peer_recv_done = true;
                state.to_guest.clear();
                self.wake = true;
            }
            Some(Sink::Fd(_) | Sink::Inline(_)) | None => {}
        }
    }

    /// Returns true if the other end of the sink is closed completely. Call it at the end of the sink's bytes. It
    /// cannot detect this for a TCP socket, nor after the sink was informed of the peer's end, because its program may
    /// then close at any time.
    pub(super) fn is_sink_closed(&self) -> bool {
        !self.end_passed_on && self.fd().is_some_and(socket_end::is_closed)
    }

    /// Passes an event to an inline service. Returns the number of bytes that it took.
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

    /// Until when its limit lets nothing through.
    pub(super) fn waits(&self, way: Way) -> Option<Tick> {
        self.limit.as_ref()?.until(way)
    }

    /// The number of bytes to report to the engine as ready to send; `u32::MAX` = some.
    pub(super) fn offered(&self) -> u32 {
        if self.sink_done || self.waits(Way::In).is_some() {
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

    /// Returns true if the sink has ended its sending, and all its bytes were sent.
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
                    // Fewer bytes than requested: the socket is empty, and new bytes cause a new edge. But the end of
                    // file may already be there.
                    let is_empty = (n as u64) < u64::from(len) && !slot.may_have_left_some();
                    self.readable = !is_empty || self.hung_up;
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
                        // The sum is at most `len`.
                        filled += n as u32;
                        n
                    }
                    Err(e) => {
                        fault = Some(e);
                        0
                    }
                };
                let mut io = StreamIo::new(&mut self.out);
                io.straight = Some(DirectWrite {
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

/// Closes a socket so that its other end sees a reset and not an end, if its kind can show the difference. The other
/// end of a Unix socket sees that it cannot write to it either.
pub(super) fn abort(fd: OwnedFd) {
    socket_end::reset_on_close(fd, true);
}

/// Ends a socket in order. The shutdown also works while other processes hold duplicates. The caller can close it
/// afterwards.
pub(super) fn finish(fd: BorrowedFd<'_>) {
    socket_end::reset_on_close(fd, false);
    // The socket may be closed already.
    let _ = shutdown(fd.as_raw_fd(), Shutdown::Write);
}

/// Returns true if the other end of this socket can tell an end from a close.
pub(super) fn shows_close(fd: BorrowedFd<'_>) -> bool {
    // The kernel reports the owner of a Unix socket's other end. For other sockets it reports no owner.
    let peer = getsockopt(&fd, sockopt::PeerCredentials);
    peer.is_ok_and(|peer| peer.uid() != libc::uid_t::MAX)
}

/// Writes at most `most` held bytes to a socket, until it accepts no more.
pub(super) fn write_held(
    fd: BorrowedFd<'_>,
    held: &mut VecDeque<u8>,
    most: usize,
) -> io::Result<usize> {
    let mut taken = 0;
    while !held.is_empty() && taken < most {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let front = held.as_slices().0;
        let front = &front[..front.len().min(most - taken)];
        match send(fd.as_raw_fd(), front, flags) {
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

/// Reads at least one of the `len` bytes that are available.
fn read_some(
    read: &mut impl FnMut(&mut [u8]) -> Result<usize, CarrierFault>,
    dst: &mut [u8],
    len: u32,
) -> Result<usize, CarrierFault> {
    match read(dst)? {
        // The engine was given this length, so the bytes must exist.
        0 => Err(CarrierFault {
            what: "packet is shorter than announced",
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
    fn only_a_unix_socket_can_tell_a_close_from_an_end() {
        let (a, b) = UnixStream::pair().unwrap();
        assert!(shows_close(a.as_fd()) && shows_close(b.as_fd()));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(!shows_close(tcp.as_fd()));
    }
}
