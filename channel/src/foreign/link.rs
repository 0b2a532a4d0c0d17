//! One stream of a foreign carrier: its socket, and what the guest's kernel would know of it.
//!
//! ```text
//! Dialing ── socket ──► Asked ── OK ──► Open ◄── RESPONSE of the engine ── Offered ◄── the guest has dialled
//!    └── failed ─► broken ◄── anything else     └── RST of the engine ─► gone
//! ```

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};

use adit_engine::{Op, PacketHeader, SHUTDOWN_RCV, SHUTDOWN_SEND};
use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{MsgFlags, Shutdown, recv, send, shutdown};

use super::connect::{Answer, LINE_MAX, Step};
use super::{BOTH, PAYLOAD_MAX, WINDOW, header, is_pause};
use crate::socket_end;

/// An empty queue that is larger than this gives its memory back.
const KEEP_MAX: usize = 4 << 10;

#[derive(Debug)]
pub(super) enum Phase {
    /// The door dials, with this ticket.
    Dialing(u32),
    /// `CONNECT` was sent.
    Asked(Answer),
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
    /// What its socket is watched for.
    pub(super) watched: EpollFlags,
    /// It is in the queue of those that may have a packet.
    pub(super) queued: bool,
    /// The engine gets a reset, and the link ends.
    pub(super) broken: bool,
    /// Bytes of the guest that came right behind the VMM's answer.
    early: VecDeque<u8>,
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
}

impl Link {
    pub(super) fn new(host_port: u32, guest_port: u32, phase: Phase) -> Self {
        Self {
            host_port,
            guest_port,
            socket: None,
            phase,
            watched: EpollFlags::empty(),
            queued: false,
            broken: false,
            early: VecDeque::new(),
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
        if !self.waiting.is_empty() {
            flags |= EpollFlags::EPOLLOUT;
        }
        flags
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

    /// Sends what waits.
    pub(super) fn flush(&mut self) {
        let mut waiting = std::mem::take(&mut self.waiting);
        while self.writable && !waiting.is_empty() {
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

    /// Writes to the socket. Returns how many bytes it accepted.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let Some(socket) = &self.socket else {
            return 0;
        };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let mut done = 0;
        while done < bytes.len() {
            match send(socket.as_raw_fd(), &bytes[done..], flags) {
                Ok(n) => done += n,
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
    pub(super) fn pass_on_ends(&mut self, half_closes: bool) {
        let Some(socket) = &self.socket else { return };
        let mut due = self.engine_shut & !self.passed_on;
        if !self.waiting.is_empty() {
            // Bytes come first.
            due &= !SHUTDOWN_SEND;
        }
        // The host reads no more either, or the guest sends no more: then nothing is lost when the VMM takes it for a full close.
        if !half_closes && self.engine_shut & SHUTDOWN_RCV == 0 && !self.ended {
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

    /// Whether [`packet`](Self::packet) may have one.
    pub(super) fn has_packet(&self) -> bool {
        self.broken
            || self.owes_credit
            || self.credit_due()
            || self.is_over()
            || self.readable && self.room() > 0
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
        all && self.waiting.is_empty()
    }

    /// The next packet for the engine, and how many bytes of `body` are its payload.
    pub(super) fn packet(&mut self, body: &mut [u8]) -> Option<(PacketHeader, usize)> {
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
        if let Some(n) = self.read(body) {
            self.sent = self.sent.wrapping_add(n as u32);
            let mut header = self.header(Op::Rw);
            header.len = n as u32;
            return Some((header, n));
        }
        if self.broken {
            return Some((self.header(Op::Rst), 0));
        }
        let shut = match (self.ended, self.hung_up) {
            // One after the other: both at once would mean that the guest has broken the stream off. Where the VMM shows an end
            // of sending only as a close, the two cannot be told apart, and most streams are finished.
            (true, true) if self.our_shut & SHUTDOWN_SEND != 0 => BOTH,
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
    fn read(&mut self, body: &mut [u8]) -> Option<usize> {
        if self.engine_shut & SHUTDOWN_RCV != 0 || self.our_shut & SHUTDOWN_SEND != 0 {
            // Nobody reads them, or there are none.
            self.early.clear();
            return None;
        }
        let most = self.room().min(body.len()).min(PAYLOAD_MAX);
        if most == 0 {
            return None;
        }
        if !self.early.is_empty() {
            let n = most.min(self.early.len());
            for (to, byte) in body.iter_mut().zip(self.early.drain(..n)) {
                *to = byte;
            }
            return Some(n);
        }
        while self.readable && !self.ended {
            let Some(socket) = &self.socket else {
                return None;
            };
            match recv(
                socket.as_raw_fd(),
                &mut body[..most],
                MsgFlags::MSG_DONTWAIT,
            ) {
                Ok(0) => {
                    self.ended = true;
                    self.hung_up |= socket_end::is_closed(socket);
                }
                Ok(n) => return Some(n),
                Err(Errno::EAGAIN) => self.readable = false,
                Err(Errno::EINTR) => {}
                // The VMM has closed it with bytes of ours unread: the guest has broken the stream off.
                Err(_) => {
                    self.broken = true;
                    return None;
                }
            }
        }
        None
    }
}
