//! One stream of a foreign carrier: its socket, and what the guest's kernel would know of it.
//!
//! ```text
//! Dialing ── socket ──► Asked ── OK ──► Open ◄── RESPONSE of the engine ── Offered ◄── the guest has dialled
//!    ├── socket that is open already ──►┘
//!    └── failed ─► broken ◄── anything else     └── RST of the engine ─► gone
//! ```

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use adit_engine::{Op, PacketHeader, SHUTDOWN_RCV, SHUTDOWN_SEND};
use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{MsgFlags, Shutdown, UnixAddr, recv, send, sendmsg, shutdown};
use nix::sys::uio::readv;

use super::connect::{Answer, LINE_MAX, Step};
use super::pipe::{Pipe, WORTH};
use super::wire::Wire;
use super::{BOTH, PAYLOAD_MAX, WINDOW, header, is_pause};
use crate::chunk::{Apart, ChunkError, Stop};
use crate::socket_end;

/// An empty queue that is larger than this gives its memory back.
const KEEP_MAX: usize = 4 << 10;

#[derive(Debug)]
pub(super) enum Phase {
    /// The door dials, with this ticket.
    Dialing(u32),
    /// `CONNECT` was sent.
    Asked(Box<Answer>),
    /// The engine must be told that the guest has accepted.
    Accepted,
    /// The guest has dialled; whether the engine was told.
    Offered { said: bool },
    /// Both sides know of it.
    Open,
}

#[derive(Debug)]
pub(super) struct Link {
    host_port: u32,
    guest_port: u32,
    pub(super) socket: Option<OwnedFd>,
    pub(super) phase: Phase,
    /// Counts links in the order in which they came.
    pub(super) born: u64,
    /// What its socket is watched for.
    pub(super) watched: EpollFlags,
    /// It is in the queue of those that may have a packet.
    pub(super) queued: bool,
    /// The engine gets a reset, and the link ends.
    pub(super) broken: bool,
    /// Bytes of the guest that came right behind the VMM's answer.
    early: Vec<u8>,
    /// Bytes for the guest that the socket has not accepted yet.
    waiting: VecDeque<u8>,
    /// The engine's credit for us: its buffer, what it has taken, and what was sent to it. They wrap.
    buf_alloc: u32,
    fwd_cnt: u32,
    sent: u32,
    /// Bytes that the socket has accepted, and what the engine was told of them. They wrap.
    accepted: u32,
    told: u32,
    pub(super) owes_credit: bool,
    /// The socket may have bytes.
    readable: bool,
    /// The socket may accept bytes.
    writable: bool,
    /// End of file was read.
    ended: bool,
    /// The other end of the socket is closed both ways.
    hung_up: bool,
    /// SHUTDOWN flags that the engine was told, and that it has told.
    our_shut: u32,
    pub(super) engine_shut: u32,
    /// What of the engine's ends the socket was told.
    passed_on: u32,
    /// The engine has ended both directions at once: the stream is broken off, not finished.
    cut: bool,
    /// See [`Options`](super::Options).
    half_closes: bool,
    /// The other end was closed when its end was found, without an end of ours before: whoever ends in order has not done that.
    closed_at_once: bool,
    wire: Wire,
    /// Many bytes came at once, so the next are moved by a pipe.
    streams: bool,
}

impl Link {
    pub(super) fn new(
        (host_port, guest_port): (u32, u32),
        phase: Phase,
        wire: Wire,
        half_closes: bool,
    ) -> Self {
        Self {
            host_port,
            guest_port,
            socket: None,
            phase,
            born: 0,
            watched: EpollFlags::empty(),
            queued: false,
            broken: false,
            early: Vec::new(),
            waiting: VecDeque::new(),
            buf_alloc: 0,
            fwd_cnt: 0,
            sent: 0,
            accepted: 0,
            told: 0,
            owes_credit: false,
            readable: false,
            writable: true,
            ended: false,
            hung_up: false,
            our_shut: 0,
            engine_shut: 0,
            passed_on: 0,
            cut: false,
            half_closes,
            closed_at_once: false,
            wire,
            streams: false,
        }
    }

    /// The host's port and the guest's.
    pub(super) fn pair(&self) -> (u32, u32) {
        (self.host_port, self.guest_port)
    }

    /// What it waits for: ends always, bytes while somebody takes them, room while bytes wait. Edges, because what is there
    /// may have to stay there.
    pub(super) fn interest(&self) -> EpollFlags {
        let mut flags = EpollFlags::EPOLLET | EpollFlags::EPOLLRDHUP;
        if self.room() > 0 || matches!(self.phase, Phase::Asked(_)) {
            flags |= EpollFlags::EPOLLIN;
        }
        if self.is_unsent() {
            flags |= EpollFlags::EPOLLOUT;
        }
        flags
    }

    /// Something waits for room in the socket.
    fn is_unsent(&self) -> bool {
        !self.waiting.is_empty() || self.wire.owes_head()
    }

    /// Bytes that wait for the VMM.
    #[cfg(test)]
    pub(super) fn waits(&self) -> usize {
        self.waiting.len()
    }

    /// The kernel has events of its socket.
    pub(super) fn ready(&mut self, events: EpollFlags) {
        let ends = EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
        self.readable |= events.intersects(EpollFlags::EPOLLIN | ends);
        self.writable |= events.contains(EpollFlags::EPOLLOUT);
        self.hung_up |= events.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR);
    }

    /// The engine has ended directions.
    pub(super) fn shut(&mut self, flags: u32) {
        self.cut |= flags == BOTH && self.engine_shut & SHUTDOWN_SEND == 0;
        self.engine_shut |= flags;
    }

    /// Notes the engine's credit.
    pub(super) fn credit(&mut self, h: &PacketHeader) {
        (self.buf_alloc, self.fwd_cnt) = (h.buf_alloc, h.fwd_cnt);
    }

    /// Bytes that the engine takes now.
    fn room(&self) -> usize {
        let in_flight = self.sent.wrapping_sub(self.fwd_cnt);
        self.buf_alloc.saturating_sub(in_flight) as usize
    }

    /// The engine has accepted what the guest dialled.
    pub(super) fn accepted(&mut self) {
        if matches!(self.phase, Phase::Offered { .. }) {
            self.phase = Phase::Open;
        }
    }

    /// Sends bytes of the engine to the guest. What the socket does not accept waits.
    pub(super) fn send(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        if self.waiting.is_empty() && self.writable {
            let n = self.write(rest);
            rest = &rest[n..];
        }
        // The engine keeps to the window, so there are at most `WINDOW`.
        self.waiting.extend(rest);
    }

    /// Sends what is in a pipe. What the socket does not accept waits, by way of `buf`.
    pub(super) fn send_piped(&mut self, pipe: &mut Pipe, buf: &mut [u8]) {
        while self.waiting.is_empty() && self.writable && pipe.holds() > 0 {
            let Some(socket) = &self.socket else { break };
            let (head, len) = match self.wire.writer() {
                Some(writer) => writer.next(pipe.holds()),
                None => (&[][..], pipe.holds()),
            };
            let sent = match head.is_empty() {
                true => pipe.give(socket.as_fd(), len),
                false => {
                    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                    send(socket.as_raw_fd(), head, flags)
                }
            };
            match sent {
                Ok(n) => {
                    let payload = match self.wire.writer() {
                        Some(writer) => writer.sent(n),
                        None => n,
                    };
                    // At most a window.
                    self.accepted = self.accepted.wrapping_add(payload as u32);
                    self.writable = n > 0;
                }
                Err(Errno::EINTR) => {}
                Err(e) => {
                    self.writable = false;
                    if e != Errno::EAGAIN {
                        // The guest reads no more. What it has sent before is still in the socket.
                        (self.hung_up, self.readable) = (true, true);
                        self.accepted = self.accepted.wrapping_add(pipe.holds() as u32);
                        pipe.clear();
                    }
                }
            }
        }
        while pipe.holds() > 0 {
            match pipe.read(buf) {
                Ok(n @ 1..) => self.waiting.extend(&buf[..n]),
                Ok(0) | Err(_) => pipe.clear(),
            }
        }
    }

    /// Sends what waits.
    pub(super) fn flush(&mut self) {
        let mut waiting = std::mem::take(&mut self.waiting);
        while self.writable && (!waiting.is_empty() || self.wire.owes_head()) {
            let n = self.write(waiting.as_slices().0);
            waiting.drain(..n);
            // Now, and not when half of the window is free: a signal of the socket that brings no packet counts as
            // fruitless.
            self.owes_credit |= n > 0;
        }
        self.waiting = waiting;
        if self.waiting.is_empty() && self.waiting.capacity() > KEEP_MAX {
            self.waiting = VecDeque::new();
        }
    }

    /// Writes payload to the socket, in the form that the stream has. Returns how many bytes of it were accepted.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let Some(socket) = &self.socket else {
            return 0;
        };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let mut done = 0;
        while done < bytes.len() || self.wire.owes_head() {
            let rest = &bytes[done..];
            let (head, len) = match self.wire.writer() {
                Some(writer) => writer.next(rest.len()),
                None => (&[][..], rest.len()),
            };
            let iov = [IoSlice::new(head), IoSlice::new(&rest[..len])];
            // An empty head is no part of it.
            let iov = &iov[usize::from(head.is_empty())..];
            match sendmsg::<UnixAddr>(socket.as_raw_fd(), iov, &[], flags, None) {
                Ok(n) => {
                    done += match self.wire.writer() {
                        Some(writer) => writer.sent(n),
                        None => n,
                    };
                }
                Err(Errno::EINTR) => {}
                Err(e) => {
                    self.writable = false;
                    if e != Errno::EAGAIN {
                        // The guest reads no more. What it has sent before is still in the socket.
                        (self.hung_up, self.readable) = (true, true);
                        done = bytes.len();
                    }
                    break;
                }
            }
        }
        // At most a window.
        self.accepted = self.accepted.wrapping_add(done as u32);
        done
    }

    /// Passes the ends that the engine has told on to the socket.
    pub(super) fn pass_on_ends(&mut self) {
        if self.wire.writer().is_some() {
            return self.pass_on_stops();
        }
        let Some(socket) = &self.socket else { return };
        let mut due = self.engine_shut & !self.passed_on;
        if !self.waiting.is_empty() {
            // Bytes come first.
            due &= !SHUTDOWN_SEND;
        }
        // The host reads no more either, or the guest sends no more: then nothing is lost when the VMM takes it for a full close.
        if !self.half_closes && self.engine_shut & SHUTDOWN_RCV == 0 && !self.ended {
            due &= !SHUTDOWN_SEND;
        }
        let how = match due {
            0 => return,
            BOTH => Shutdown::Both,
            SHUTDOWN_SEND => Shutdown::Write,
            _ => Shutdown::Read,
        };
        self.passed_on |= due;
        // The socket may be closed already; its own events report that.
        let _ = shutdown(socket.as_raw_fd(), how);
    }

    /// The same where chunks carry the ends: the socket is shut down only when both directions are over, or nobody reads.
    fn pass_on_stops(&mut self) {
        if !self.waiting.is_empty() {
            // Bytes come first.
            return;
        }
        if self.is_due(SHUTDOWN_SEND) {
            let stop = match self.cut {
                true => Stop::Abort,
                false => Stop::End,
            };
            if !self.wire.writer().is_some_and(|writer| writer.stop(stop)) {
                return;
            }
            self.passed_on |= SHUTDOWN_SEND;
            self.write(&[]);
        }
        if self.is_due(SHUTDOWN_RCV) && (!self.is_unsent() || self.hung_up) {
            let how = match self.passed_on & SHUTDOWN_SEND {
                0 => Shutdown::Read,
                _ => Shutdown::Both,
            };
            self.passed_on |= SHUTDOWN_RCV;
            if let Some(socket) = &self.socket {
                // The socket may be closed already; its own events report that.
                let _ = shutdown(socket.as_raw_fd(), how);
            }
        }
    }

    /// The engine has ended a direction, and the socket was not told yet.
    fn is_due(&self, flag: u32) -> bool {
        self.engine_shut & flag & !self.passed_on != 0
    }

    /// Whether [`packet`](Self::packet) may have one.
    pub(super) fn has_packet(&self) -> bool {
        self.broken
            || self.owes_credit
            || self.credit_due()
            || self.is_over()
            || self.readable && (self.room() > 0 || self.ended)
            || !self.early.is_empty() && self.room() > 0
            || self.ended
    }

    fn credit_due(&self) -> bool {
        self.accepted.wrapping_sub(self.told) >= WINDOW / 2
    }

    /// Both sides have ended, and everything was passed on.
    fn is_over(&self) -> bool {
        let all = self.passed_on == BOTH
            || self.passed_on & SHUTDOWN_SEND != 0 && self.our_shut & SHUTDOWN_SEND != 0;
        all && (!self.is_unsent() || self.hung_up)
    }

    /// The next packet for the engine, and how many bytes of `body` are its payload.
    /// Where they went into the pipe, this has as many.
    pub(super) fn packet(
        &mut self,
        body: &mut [u8],
        pipe: Option<&mut Pipe>,
    ) -> Option<(PacketHeader, usize)> {
        if let Phase::Asked(_) = self.phase {
            self.read_answer();
        }
        if self.broken {
            return Some((self.header(Op::Rst), 0));
        }
        match self.phase {
            Phase::Dialing(_) | Phase::Asked(_) | Phase::Offered { said: true } => return None,
            Phase::Accepted => {
                self.phase = Phase::Open;
                return Some((self.header(Op::Response), 0));
            }
            Phase::Offered { said: false } => {
                self.phase = Phase::Offered { said: true };
                return Some((self.header(Op::Request), 0));
            }
            Phase::Open => {}
        }
        if self.is_over() {
            return Some((self.header(Op::Rst), 0));
        }
        if let Some(n) = self.read(body, pipe) {
            self.sent = self.sent.wrapping_add(n as u32);
            let mut header = self.header(Op::Rw);
            header.len = n as u32;
            return Some((header, n));
        }
        if self.broken {
            return Some((self.header(Op::Rst), 0));
        }
        let shut = match (self.ended, self.hung_up) {
            // Both at once mean that the guest has broken the stream off. Otherwise one comes after the other. Where the VMM shows an
            // end of sending only as a close, the two cannot be told apart, and most streams are finished.
            (true, true) if self.closed_at_once || self.our_shut & SHUTDOWN_SEND != 0 => BOTH,
            (true, _) => SHUTDOWN_SEND,
            (false, _) => 0,
        };
        if shut & !self.our_shut != 0 {
            self.our_shut |= shut;
            let mut header = self.header(Op::Shutdown);
            header.flags = shut;
            return Some((header, 0));
        }
        if self.owes_credit || self.credit_due() {
            return Some((self.header(Op::CreditUpdate), 0));
        }
        None
    }

    /// A packet to the engine. Every packet tells the credit.
    fn header(&mut self, op: Op) -> PacketHeader {
        self.owes_credit = false;
        self.told = self.accepted;
        PacketHeader {
            buf_alloc: WINDOW,
            fwd_cnt: self.accepted,
            ..header(self.guest_port, self.host_port, op)
        }
    }

    /// Reads the VMM's answer.
    fn read_answer(&mut self) {
        while self.readable {
            let Phase::Asked(answer) = &mut self.phase else {
                return;
            };
            let Some(socket) = &self.socket else { return };
            let mut bytes = [0; LINE_MAX];
            let n = match recv(socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
                Ok(n) => n,
                Err(Errno::EAGAIN) => {
                    self.readable = false;
                    return;
                }
                Err(e) if is_pause(e) => continue,
                Err(_) => 0,
            };
            let step = match n {
                0 => Err(answer.end()),
                n => answer.push(&bytes[..n]),
            };
            match step {
                Ok(Step::More) => {}
                Ok(Step::Open { taken }) => {
                    self.early.extend(&bytes[taken..n]);
                    self.phase = Phase::Accepted;
                }
                Err(e) => {
                    tracing::debug!(port = self.guest_port, error = %e, "dial failed");
                    self.broken = true;
                    return;
                }
            }
        }
    }

    /// Reads bytes of the guest, as many as the engine takes.
    fn read(&mut self, body: &mut [u8], mut pipe: Option<&mut Pipe>) -> Option<usize> {
        if self.engine_shut & SHUTDOWN_RCV != 0 || self.our_shut & SHUTDOWN_SEND != 0 {
            // Nobody reads them, or there are none.
            self.early.clear();
            self.look_behind_the_end();
            return None;
        }
        let most = self.room().min(body.len()).min(PAYLOAD_MAX);
        if most == 0 {
            return None;
        }
        while !self.broken && !self.ended && (self.readable || !self.early.is_empty()) {
            let piped = pipe.as_deref_mut().and_then(|pipe| self.pipe(pipe, most));
            let mut apart = Apart::default();
            let got = match piped {
                Some(got) => got,
                None => self.receive(&mut body[..most], &mut apart),
            };
            let n = match got {
                Ok(0) => {
                    self.stopped();
                    return None;
                }
                Ok(n) => n,
                Err(Errno::EAGAIN) => {
                    self.readable = false;
                    return None;
                }
                Err(Errno::EINTR) => continue,
                // The VMM has closed it with bytes of ours unread: the guest has broken the stream off.
                Err(_) => {
                    self.broken = true;
                    return None;
                }
            };
            if piped.is_some() {
                return Some(n);
            }
            let payload = self.unwrap(n, &apart, &mut body[..most]);
            if payload > 0 {
                return Some(payload);
            }
        }
        None
    }

    /// Leaves nothing but payload of so many bytes that were received. Returns its length.
    fn unwrap(&mut self, n: usize, apart: &Apart, body: &mut [u8]) -> usize {
        let (payload, outcome) = match apart.is_any() {
            true => self.wire.received_apart(apart, body),
            false => self.wire.received(&mut body[..n]),
        };
        self.judge(outcome);
        let left = self.wire.reader().map_or(0, |reader| reader.left());
        if payload == 0 && (1..WORTH).contains(&left) {
            // Its head came alone, for a pipe, and it is not worth one.
            self.streams = false;
        }
        payload
    }

    /// Takes the next bytes into a pipe. `None`: they are few, or may be more than payload.
    fn pipe(&mut self, pipe: &mut Pipe, most: usize) -> Option<Result<usize, Errno>> {
        let payload = match &mut self.wire {
            Wire::Plain => most,
            Wire::Hello(_) => 0,
            Wire::Chunks(both) => most.min(both.1.left()),
        };
        if !self.streams || payload < WORTH || !self.early.is_empty() {
            return None;
        }
        let got = pipe.fill(self.socket.as_ref()?.as_fd(), payload);
        if let Ok(n) = got {
            self.streams = n >= WORTH;
            if let Some(reader) = self.wire.reader() {
                reader.passed(n);
            }
        }
        Some(got)
    }

    /// The next bytes as they come. Where they are chunks the next head is read apart, so that nothing has to be moved, and alone where the
    /// chunk behind it is to go through a pipe.
    fn receive(&mut self, body: &mut [u8], apart: &mut Apart) -> Result<usize, Errno> {
        if !self.early.is_empty() {
            let n = body.len().min(self.early.len());
            for (to, byte) in body.iter_mut().zip(self.early.drain(..n)) {
                *to = byte;
            }
            return Ok(n);
        }
        let Some(socket) = &self.socket else {
            return Err(Errno::EAGAIN);
        };
        let (n, asked) = match self.wire.reader() {
            None => {
                let n = recv(socket.as_raw_fd(), body, MsgFlags::MSG_DONTWAIT)?;
                (n, body.len())
            }
            Some(reader) => {
                let parts = apart.parts(reader, body, self.streams);
                let asked = parts.iter().map(|part| part.len()).sum();
                let n = readv(socket, &mut parts.map(IoSliceMut::new))?;
                apart.came(n);
                (n, asked)
            }
        };
        // Few bytes say that the socket is empty, unless no more were asked for.
        if n >= WORTH || n < asked {
            self.streams = n >= WORTH;
        }
        Ok(n)
    }

    /// Takes note of how the guest's direction has stopped, if it has.
    fn judge(&mut self, outcome: Result<(), ChunkError>) {
        if let Err(e) = outcome {
            tracing::debug!(port = self.guest_port, error = %e, "a stream is broken off");
        }
        self.ended |= self.wire.stopped() == Some(Stop::End);
        self.broken |= outcome.is_err() || self.wire.stopped() == Some(Stop::Abort);
    }

    /// The socket has no more bytes.
    fn stopped(&mut self) {
        match self.wire.reader() {
            Some(reader) => {
                let outcome = reader.end();
                self.hung_up = true;
                self.judge(outcome);
            }
            None => {
                self.ended = true;
                self.hung_up |= self.socket.as_ref().is_some_and(socket_end::is_closed);
                // An agent that has finished closes only behind an end of ours.
                let has_ended = self.passed_on & SHUTDOWN_SEND != 0;
                self.closed_at_once = self.half_closes && self.hung_up && !has_ended;
            }
        }
    }

    /// Behind an end that a chunk has told there is an abort, or the end of the socket's bytes.
    fn look_behind_the_end(&mut self) {
        while self.ended && self.readable && !self.broken && self.wire.reader().is_some() {
            let mut apart = Apart::default();
            match self.receive(&mut [], &mut apart) {
                Ok(0) => {
                    self.readable = false;
                    self.stopped();
                }
                Ok(n) => drop(self.unwrap(n, &apart, &mut [])),
                Err(Errno::EAGAIN) => self.readable = false,
                Err(Errno::EINTR) => {}
                Err(_) => self.broken = true,
            }
        }
    }
}
