//! Streams of a VMM that keeps the guest's virtqueues to itself, and has a socket for each stream: a *foreign carrier*.
//!
//! ```text
//!  engine ── packets ── Foreign ── one socket a stream ── the VMM (Firecracker, Cloud Hypervisor) ── virtqueues ── guest
//!                          │
//!                          └── Door: dials the VMM's socket, and accepts what the guest dials
//! ```
//! [`Foreign`] is a [`Carrier`], which plays the guest's kernel: a REQUEST of the engine becomes a dial, the VMM's `OK` a
//! RESPONSE, bytes of a socket RW packets, an end of file a SHUTDOWN. So dials, hellos, tunnels, credit, deadlines and ends are
//! those of any other carrier. Its price is a copy: payload goes through a buffer of this process, as long as it comes in small
//! pieces. Large ones go from socket to socket by way of a pipe (`pipe.rs`).
//!
//! | of the guest's kernel | here |
//! |---|---|
//! | the window that a stream announces | [`WINDOW`]: bytes that the VMM's socket has not accepted yet wait here |
//! | `fwd_cnt` | bytes that the socket has accepted |
//! | credit of the engine | how much is read of a socket; the rest stays in it, and the VMM stops reading the guest |
//! | SHUTDOWN of sending, from the guest | end of file |
//! | SHUTDOWN of both, from the guest | end of file, and the socket accepts no bytes, before we have ended our sending; only with [`Options::half_closes`] |
//! | SHUTDOWN of sending, to the guest | `shutdown(SHUT_WR)`, if [`Options::half_closes`]; otherwise see there |
//! | the same, behind a hello with [`CHUNKS`](hello::CHUNKS) | an end among the [chunks](crate::chunk), in both directions (`wire.rs`) |
//!
//! Rules:
//! - Where the host's kernel carries the streams (`vhost_vsock`) a stream is open when its socket is connected, and the guest's port is
//!   known; the rest is the same.
//! - Every socket is nonblocking, so nothing here blocks. A socket that accepts nothing keeps at most [`WINDOW`] bytes.
//! - The VMM is as hostile as its guest: it can end its own streams, and nothing else.
//! - A session lasts while the VMM's socket is there. One that goes away takes no stream along that is still open: only its
//!   sockets know whether they have ended.

pub mod connect;
mod link;
mod packet;
mod pipe;
#[cfg(test)]
mod tests;
mod wire;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use adit_engine::{
    Kind, Lane, Op, PacketHeader, ResetReason, SHUTDOWN_RCV, SHUTDOWN_SEND, SessionChange,
};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::carrier::{Armed, Carrier, CarrierCaps, CarrierFault, Interest, Woken};
use crate::hello;
use link::{Link, Phase};
use packet::Body;
pub use packet::{ForeignPacket, ForeignSlot};
use pipe::Pipe;
use wire::Wire;

/// Bytes of a stream that wait for the VMM at most.
pub const WINDOW: u32 = 128 << 10;
/// Most streams, including those that are being dialled or that the guest has dialled and nobody has answered.
pub const LINKS_MAX: usize = 1024;
/// Largest payload of one packet, bytes.
const PAYLOAD_MAX: usize = 64 << 10;
/// Events that are taken of the kernel at a time.
const EVENTS: usize = 64;
/// The first port of the guest that is made up for a stream that it has dialled. Its own is not known.
const GUEST_PORTS: u32 = 1 << 30;

const WAKER_DOOR: u32 = 0;
const WAKER_STREAMS: u32 = 1;
const WAKER_OVER: u32 = 2;

const BOTH: u32 = SHUTDOWN_RCV | SHUTDOWN_SEND;

/// Where streams come from.
pub trait Door {
    /// Readable when [`receive`](Self::receive) has something.
    fn as_fd(&self) -> BorrowedFd<'_>;
    /// Dials a port of the guest. The answer has the same ticket.
    ///
    /// # Errors
    /// It takes no more dials now.
    fn dial(&mut self, ticket: u32, port: u32) -> io::Result<()>;
    /// Takes the next news.
    fn receive(&mut self) -> Option<DoorNews>;
}

/// What a [`Door`] has to say.
#[derive(Debug)]
pub enum DoorNews {
    /// The VMM's socket is there, or why it cannot be used.
    State(Result<(), String>),
    /// A socket to the VMM, nonblocking, on which `CONNECT` was sent.
    Dialed {
        /// As the dial has it.
        ticket: u32,
        /// The socket.
        socket: OwnedFd,
    },
    /// The VMM cannot be dialled.
    Failed {
        /// As the dial has it.
        ticket: u32,
    },
    /// The guest has dialled a port of the host.
    Offered {
        /// The port.
        port: u32,
        /// The socket, nonblocking.
        socket: OwnedFd,
    },
    /// A stream to the guest that is open: the guest has accepted.
    Opened {
        /// As the dial has it.
        ticket: u32,
        /// The socket, nonblocking.
        socket: OwnedFd,
    },
    /// There is no VM: its [`State`](Self::State) says why.
    Gone {
        /// As the dial has it.
        ticket: u32,
    },
    /// The guest has dialled a port of the host, from a port that is known.
    OfferedBy {
        /// The host's port.
        port: u32,
        /// The guest's.
        guest_port: u32,
        /// The socket, nonblocking.
        socket: OwnedFd,
    },
    /// The guest has begun anew with this stream, which it has dialled: what came before is of a guest that is no more (R128).
    BegunAnew {
        /// The host's port.
        port: u32,
        /// The guest's.
        guest_port: u32,
    },
}

/// What is known of a VMM.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// The VMM passes a half-close on. One that does not (Firecracker; Cloud Hypervisor before its 2026 releases) takes the end of
    /// our sending for the end of the stream, and answers that are under way are lost. With such a VMM hellos offer
    /// [`CHUNKS`](hello::CHUNKS), which carry the ends; on streams without them the end of our sending is not passed on before
    /// the guest has ended its own.
    pub half_closes: bool,
}

/// A foreign carrier.
pub struct Foreign<D> {
    door: D,
    options: Options,
    epoll: Epoll,
    links: Vec<Option<Link>>,
    /// Slots of `links` that are free.
    free: Vec<usize>,
    /// (host's port, guest's port) of every stream.
    pairs: HashMap<(u32, u32), usize>,
    /// Links that may have a packet for the engine; each at most once.
    ready: VecDeque<usize>,
    /// Resets for pairs that have no link.
    resets: VecDeque<PacketHeader>,
    next_guest_port: u32,
    /// Counts links.
    births: u64,
    /// Counts dials, so that a late answer finds no later link of the same slot.
    dials: u32,
    state: Result<(), String>,
    /// Rung when the last stream of a VMM that is gone has ended: only a waker can end a session.
    over: EventFd,
    attached: bool,
    epoch: u64,
    from_guest: Vec<u8>,
    to_guest: Vec<u8>,
    /// The same for large pieces; none: this process has no descriptors for them.
    pipes: Option<Pipes>,
    /// Many bytes were read for the guest at once, so the next are moved by a pipe.
    streams: bool,
}

/// Empty between two packets.
struct Pipes {
    from_guest: Pipe,
    to_guest: Pipe,
}

impl Pipes {
    fn new() -> io::Result<Self> {
        Ok(Self {
            from_guest: Pipe::new()?,
            to_guest: Pipe::new()?,
        })
    }
}

impl<D: Door> Foreign<D> {
    /// Makes the carrier. Its sessions are numbered from `first_epoch` on.
    ///
    /// # Errors
    /// This process has no free descriptors.
    pub fn new(door: D, options: Options, first_epoch: u64) -> io::Result<Self> {
        Ok(Self {
            door,
            options,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            links: Vec::new(),
            free: Vec::new(),
            pairs: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_guest_port: GUEST_PORTS,
            births: 0,
            dials: 0,
            over: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            state: Err("the VMM's socket was not looked at yet".into()),
            attached: false,
            epoch: first_epoch,
            from_guest: vec![0; PAYLOAD_MAX],
            to_guest: vec![0; PAYLOAD_MAX],
            pipes: Pipes::new().ok(),
            streams: false,
        })
    }

    /// Number of streams, in whatever state.
    pub fn streams(&self) -> usize {
        self.links.len() - self.free.len()
    }

    fn add(&mut self, mut link: Link) -> Option<usize> {
        link.born = self.births;
        self.births += 1;
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.links.len() < LINKS_MAX => {
                self.links.push(None);
                self.links.len() - 1
            }
            None => return None,
        };
        self.pairs.insert(link.pair(), index);
        self.links[index] = Some(link);
        Some(index)
    }

    fn remove(&mut self, index: usize) {
        if let Some(link) = self.links.get_mut(index).and_then(Option::take) {
            self.pairs.remove(&link.pair());
            if let Some(socket) = &link.socket {
                // Closing it would remove it, too, unless a duplicate is left somewhere.
                let _ = self.epoll.delete(socket);
            }
            self.free.push(index);
        }
        if self.attached && self.state.is_err() && self.streams() == 0 {
            // It fails only when it is rung already.
            let _ = self.over.write(1);
        }
    }

    fn queue(&mut self, index: usize) {
        if let Some(Some(link)) = self.links.get_mut(index)
            && !std::mem::replace(&mut link.queued, true)
        {
            self.ready.push_back(index);
        }
    }

    /// Gives a link its socket. Returns false if it cannot be watched.
    fn connect(&mut self, index: usize, socket: OwnedFd) -> bool {
        let Some(Some(link)) = self.links.get_mut(index) else {
            return false;
        };
        link.watched = link.interest();
        let event = EpollEvent::new(link.watched, index as u64);
        if let Err(e) = self.epoll.add(&socket, event) {
            tracing::warn!(error = %e, "cannot watch a stream of the VMM");
            return false;
        }
        link.socket = Some(socket);
        true
    }

    /// Watches a link for what it waits for, and for nothing else: a signal without work counts against the carrier.
    fn watch(&mut self, index: usize) {
        if let Some(Some(link)) = self.links.get_mut(index)
            && let Some(socket) = &link.socket
            && link.interest() != link.watched
        {
            link.watched = link.interest();
            let mut event = EpollEvent::new(link.watched, index as u64);
            // It is in the set, so only a lack of kernel memory can fail.
            if let Err(e) = self.epoll.modify(socket, &mut event) {
                tracing::warn!(error = %e, "cannot watch a stream of the VMM");
                self.give_up(index);
            }
        }
    }

    /// Takes what the kernel has of the streams' sockets. Returns true if there was something.
    fn gather(&mut self) -> bool {
        let mut found = false;
        loop {
            let mut events = [EpollEvent::empty(); EVENTS];
            // It fails only for a signal, and then the next burst looks again.
            let n = self
                .epoll
                .wait(&mut events, EpollTimeout::ZERO)
                .unwrap_or(0);
            for event in &events[..n] {
                let index = event.data() as usize;
                if let Some(Some(link)) = self.links.get_mut(index) {
                    link.ready(event.events());
                    self.queue(index);
                    found = true;
                }
            }
            if n < EVENTS {
                return found;
            }
        }
    }

    /// Takes what the door has to say. Returns true if its state has changed.
    fn door_ready(&mut self) -> bool {
        let mut changed = false;
        while let Some(news) = self.door.receive() {
            match news {
                DoorNews::State(state) => {
                    changed |= state != self.state;
                    self.state = state;
                }
                DoorNews::Dialed { ticket, socket } => {
                    if let Some(index) = self.dialed(ticket) {
                        if let Some(Some(link)) = self.links.get_mut(index) {
                            link.phase = Phase::Asked(Box::default());
                        }
                        if !self.connect(index, socket) {
                            self.give_up(index);
                        }
                    }
                }
                DoorNews::Failed { ticket } => {
                    if let Some(index) = self.dialed(ticket) {
                        self.give_up(index);
                    }
                }
                DoorNews::Offered { port, socket } => self.offered(port, socket),
                DoorNews::Opened { ticket, socket } => {
                    if let Some(index) = self.dialed(ticket) {
                        match self.connect(index, socket) {
                            true => self.opened(index),
                            false => self.give_up(index),
                        }
                    }
                }
                DoorNews::Gone { ticket } => {
                    if let Some(index) = self.dialed(ticket) {
                        self.gone(index);
                    }
                }
                DoorNews::OfferedBy {
                    port,
                    guest_port,
                    socket,
                } => self.offered_by(port, guest_port, socket),
                DoorNews::BegunAnew { port, guest_port } => self.begun_anew((port, guest_port)),
            }
        }
        changed
    }

    /// The guest has accepted.
    fn opened(&mut self, index: usize) {
        if let Some(Some(link)) = self.links.get_mut(index) {
            link.phase = Phase::Accepted;
        }
        self.queue(index);
    }

    /// There is no VM. If nothing of it is left, the session ends, and the dial with it; otherwise the dial fails by itself.
    fn gone(&mut self, index: usize) {
        let is_bare = |l: &Link| matches!(l.phase, Phase::Dialing(_));
        match self.state.is_err() && self.links.iter().flatten().all(is_bare) {
            true => (0..self.links.len()).for_each(|index| self.remove(index)),
            false => self.give_up(index),
        }
    }

    /// The link that waits for this ticket.
    fn dialed(&self, ticket: u32) -> Option<usize> {
        let mut links = self.links.iter();
        links.position(|l| {
            l.as_ref()
                .is_some_and(|l| matches!(l.phase, Phase::Dialing(t) if t == ticket))
        })
    }

    /// The guest has dialled from this port.
    fn offered_by(&mut self, port: u32, guest_port: u32, socket: OwnedFd) {
        if let Some(&older) = self.pairs.get(&(port, guest_port)) {
            // The kernel knows no two streams of one pair, so the older one has ended. The guest tries again.
            return self.queue(older);
        }
        self.add_offered(port, guest_port, socket);
    }

    /// Ends all streams that are older than this one.
    fn begun_anew(&mut self, pair: (u32, u32)) {
        let found = self.pairs.get(&pair).and_then(|&at| self.links.get(at));
        let Some(born) = found.and_then(Option::as_ref).map(|l| l.born) else {
            // It has ended meanwhile, and the guest dials again.
            return;
        };
        for index in 0..self.links.len() {
            if self.links[index].as_ref().is_some_and(|l| l.born < born) {
                self.give_up(index);
            }
        }
    }

    /// The guest has dialled.
    fn offered(&mut self, port: u32, socket: OwnedFd) {
        let mut guest_port = self.next_guest_port;
        while self.pairs.contains_key(&(port, guest_port)) {
            guest_port = guest_port.wrapping_add(1).max(GUEST_PORTS);
        }
        self.next_guest_port = guest_port.wrapping_add(1).max(GUEST_PORTS);
        self.add_offered(port, guest_port, socket);
    }

    fn add_offered(&mut self, port: u32, guest_port: u32, socket: OwnedFd) {
        let phase = Phase::Offered { said: false };
        let half_closes = self.options.half_closes;
        let link = Link::new((port, guest_port), phase, Wire::Plain, half_closes);
        // Dropped, it tells the guest that it is refused.
        let Some(index) = self.add(link) else { return };
        match self.connect(index, socket) {
            true => self.queue(index),
            false => self.remove(index),
        }
    }

    /// Ends a stream, with a reset for the engine.
    fn give_up(&mut self, index: usize) {
        if let Some(Some(link)) = self.links.get_mut(index) {
            link.broken = true;
        }
        self.queue(index);
    }

    /// Handles a packet of the engine. Its body is in the pipe, or the first bytes of `to_guest`.
    fn take_packet(&mut self, h: &PacketHeader, len: usize) {
        let pair = (h.src_port, h.dst_port);
        let found = self.pairs.get(&pair).copied();
        let op = Op::parse(h.op);
        if op == Some(Op::Request) {
            return self.request(h, found);
        }
        let Some(index) = found else {
            // The engine speaks of a stream that has ended here: its reset is on its way.
            return;
        };
        let Some(Some(link)) = self.links.get_mut(index) else {
            return;
        };
        link.credit(h);
        match op {
            Some(Op::Rst) => return self.remove(index),
            Some(Op::Response) => link.accepted(),
            Some(Op::Rw) => match self.pipes.as_mut().map(|pipes| &mut pipes.to_guest) {
                Some(pipe) if pipe.holds() > 0 => link.send_piped(pipe, &mut self.to_guest),
                _ => link.send(&self.to_guest[..len]),
            },
            Some(Op::Shutdown) => link.shut(h.flags & BOTH),
            Some(Op::CreditRequest) => link.owes_credit = true,
            Some(Op::CreditUpdate | Op::Request) | None => {}
        }
        link.pass_on_ends();
        let has_packet = link.has_packet();
        self.watch(index);
        if has_packet {
            self.queue(index);
        }
    }

    fn request(&mut self, h: &PacketHeader, found: Option<usize>) {
        if let Some(index) = found {
            // The engine has ended the earlier stream of the pair.
            self.remove(index);
        }
        self.dials = self.dials.wrapping_add(1);
        let ticket = self.dials;
        let wire = match h.dst_port == hello::PORT && !self.options.half_closes {
            true => Wire::offering(),
            false => Wire::Plain,
        };
        let (pair, phase) = ((h.src_port, h.dst_port), Phase::Dialing(ticket));
        let mut link = Link::new(pair, phase, wire, self.options.half_closes);
        link.credit(h);
        let Some(index) = self.add(link) else {
            // At most one for each stream of the engine.
            return self
                .resets
                .push_back(header(h.dst_port, h.src_port, Op::Rst));
        };
        if let Err(e) = self.door.dial(ticket, h.dst_port) {
            tracing::debug!(error = %e, "the VMM was not dialled");
            self.give_up(index);
        }
    }

    /// Whether the VMM's socket is there, or the host's kernel has the VM.
    pub fn is_there(&self) -> bool {
        self.state.is_ok()
    }

    /// The change of the session that follows from what is known now, if it was not told yet. For whoever has torn it down, and takes it
    /// up again.
    pub fn session(&mut self) -> Option<SessionChange> {
        match (self.attached, &self.state) {
            // What the guest dials shows that its VMM is there, whatever was said of its socket.
            (false, state) if state.is_ok() || self.streams() > 0 => {
                self.attached = true;
                let epoch = self.epoch;
                self.epoch += 1;
                Some(SessionChange::Attached { epoch })
            }
            (true, Err(_)) if self.streams() == 0 => {
                self.attached = false;
                self.resets.clear();
                Some(SessionChange::Lost(ResetReason::Epoch))
            }
            _ => None,
        }
    }
}

impl<D: Door> Carrier for Foreign<D> {
    type Rx<'a>
        = ForeignPacket<'a>
    where
        Self: 'a;
    type Tx<'a>
        = ForeignSlot<'a, D>
    where
        Self: 'a;

    fn caps(&self) -> CarrierCaps {
        CarrierCaps {
            max_payload: PAYLOAD_MAX as u32,
            packet_overhead: 0,
            lanes: false,
            tells_reason: false,
            run_bytes: PAYLOAD_MAX as u32,
        }
    }

    fn hello_features(&self) -> u64 {
        match self.options.half_closes {
            true => 0,
            false => hello::CHUNKS,
        }
    }

    fn begin(&mut self) {
        self.gather();
    }

    fn rx(&mut self) -> Result<Option<ForeignPacket<'_>>, CarrierFault> {
        if !self.attached {
            return Ok(None);
        }
        if let Some(reset) = self.resets.pop_front() {
            return Ok(Some(ForeignPacket::new(reset, Body::Bytes(&[]))));
        }
        if let Some(pipes) = &mut self.pipes {
            // Nobody wanted the rest of the packet before.
            pipes.from_guest.clear();
        }
        while let Some(index) = self.ready.pop_front() {
            let Some(Some(link)) = self.links.get_mut(index) else {
                continue;
            };
            link.queued = false;
            link.flush();
            link.pass_on_ends();
            let pipe = self.pipes.as_mut().map(|pipes| &mut pipes.from_guest);
            let packet = link.packet(&mut self.from_guest, pipe);
            self.watch(index);
            let Some((header, len)) = packet else {
                continue;
            };
            if header.op == Op::Rst as u16 {
                self.remove(index);
            } else {
                // It takes its turn behind the others.
                self.queue(index);
            }
            let body = match self.pipes.as_mut().map(|pipes| &mut pipes.from_guest) {
                Some(pipe) if pipe.holds() > 0 => Body::Piped(pipe, &mut self.from_guest),
                _ => Body::Bytes(&self.from_guest[..len]),
            };
            return Ok(Some(ForeignPacket::new(header, body)));
        }
        Ok(None)
    }

    fn tx(&mut self, _: Lane, _: u32) -> Result<Option<ForeignSlot<'_, D>>, CarrierFault> {
        if let Some(pipes) = &mut self.pipes {
            // The slot before was returned unused.
            pipes.to_guest.clear();
        }
        // Credit limits what the engine sends, so there is always room.
        Ok(self.attached.then(|| ForeignSlot::new(self)))
    }

    fn flush(&mut self) {}

    fn arm(&mut self, _: Interest) -> Armed {
        match self.gather() || self.attached && !(self.ready.is_empty() && self.resets.is_empty()) {
            true => Armed::WorkAppeared,
            false => Armed::Sleep,
        }
    }

    fn obstacle(&self) -> Option<String> {
        self.state.as_ref().err().cloned()
    }

    fn tear(&mut self) {
        for index in 0..self.links.len() {
            self.remove(index);
        }
        self.ready.clear();
        self.resets.clear();
        self.attached = false;
    }

    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>, u32)) {
        visit(self.door.as_fd(), WAKER_DOOR);
        visit(self.epoll.0.as_fd(), WAKER_STREAMS);
        visit(self.over.as_fd(), WAKER_OVER);
    }

    fn woken(&mut self, id: u32) -> Woken {
        let mut obstacle_changed = false;
        match id {
            WAKER_DOOR => obstacle_changed = self.door_ready(),
            // Reads it empty.
            WAKER_OVER => drop(self.over.read()),
            _ => {
                self.gather();
            }
        }
        Woken {
            session: self.session(),
            wakers_changed: false,
            obstacle_changed,
        }
    }
}

/// A packet from the guest to the host.
fn header(guest_port: u32, host_port: u32, op: Op) -> PacketHeader {
    PacketHeader {
        src_port: guest_port,
        dst_port: host_port,
        kind: Kind::Stream as u16,
        op: op as u16,
        ..PacketHeader::default()
    }
}

/// Returns true if an error means that the socket accepts or has nothing now.
fn is_pause(e: Errno) -> bool {
    matches!(e, Errno::EAGAIN | Errno::EINTR)
}
