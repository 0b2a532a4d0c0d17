//! A `Port`: one engine, one carrier and the sinks of their streams. It moves every payload byte once.
//!
//! ```text
//!            carrier.begin
//!  rx ─ handle_packet ─ Deliver ──► sink (writev) ─ consumed      bounded by `Budget`, never by a missing TX slot
//!            events ──► sinks, notices
//!  tx slot ─ poll_transmit ─ body ◄── sink (readv) ─ commit_body
//!            carrier.flush, arm ──► Again | Idle{deadline}
//! ```
//!
//! Rules:
//! - RX always drains. The credit of its stream limits a sink that is not read; packets are never left in the queue
//!   for it. So one stopped reader does not stop other streams.
//! - A sink is watched edge-triggered: after `WouldBlock` it is not tried again before the next edge.
//! - A sink whose limit lets nothing through is neither read nor written to until its time; the engine is told that it has
//!   nothing. Without limits no timer runs.
//! - The engine's stream table, its credit pool and the `*_MAX` here bound everything that can grow.
//!
//! A [`Shard`](crate::shard::Shard) drives a `Port`. The shard owns the epoll set with the `Port`'s descriptors.

mod burst;
mod entry;
mod lifecycle;
mod succession;
#[cfg(test)]
mod tests;
mod wakers;
mod wakeup_limit;
pub(crate) mod watch;

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use adit_engine::{
    Answer, Engine, EngineConfig, How, Kind, ListenError, ResetReason, SessionChange, StreamId,
    Tick,
};
use nix::sys::epoll::EpollFlags;

use crate::carrier::{Carrier, CarrierFault};
use crate::dial::{Dial, DialError, DialRequest};
use crate::hello::Accept;
use crate::live::LiveTable;
use crate::rate::Way;
use crate::sink::{Local, ServiceEvent, Sink};
use crate::socket_end;
use entry::{Entry, Phase};
use wakers::Wakers;
use watch::{Token, Watch};

/// Maximum number of sinks that outlive their streams with held bytes.
pub const LINGER_MAX: usize = 256;
/// Maximum number of sinks that have accepted everything and are kept until their other end is closed: as many as a VM
/// has streams.
pub const KEPT_MAX: usize = 1024;
/// Maximum number of bytes held for all sinks that outlive their streams.
pub const LINGER_BYTES_MAX: usize = 1 << 20;

/// How much one `poll` may do before other `Port`s get their turn.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Maximum number of packets in each direction.
    pub packets: u32,
    /// Maximum number of payload bytes in each direction.
    pub bytes: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            packets: 256,
            bytes: 1 << 20,
        }
    }
}

/// What remains to do after a `poll`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Turn {
    /// There is more to do.
    Again,
    /// There is nothing to do until a descriptor is ready, or until the deadline.
    Idle {
        /// Poll at this time at the latest.
        deadline: Option<Tick>,
    },
}

/// An event for the owner of a `Port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The guest dials a vsock port on which the `Port` listens. Call [`Port::accept`] or [`Port::refuse`].
    Incoming {
        /// The new stream.
        stream: StreamId,
        /// The dialled port of the host.
        local_port: u32,
        /// The guest's own port.
        peer_port: u32,
    },
    /// A dial without a sink is complete. Call [`Port::attach`] to give it one; bytes from the guest are held until
    /// then.
    Dialed {
        /// The stream that `dial` returned.
        stream: StreamId,
        /// The agent's answer; `None` without a hello.
        accept: Option<Accept>,
    },
    /// A dial without a sink failed.
    DialFailed {
        /// The stream that `dial` returned; its id is stale now.
        stream: StreamId,
        /// The reason.
        error: DialError,
    },
    /// A stream is gone that was open or was offered by the guest.
    Closed {
        /// The stream; its id is stale now.
        stream: StreamId,
        /// The reason, if it did not end in order.
        reason: Option<ResetReason>,
        /// What it came to.
        totals: Totals,
    },
    /// What is in the way of a session has changed: see [`Carrier::obstacle`].
    Obstacle,
    /// The session began or ended.
    Session {
        /// The epoch of the session that began; `None` if the session ended.
        epoch: Option<u64>,
    },
}

/// What a stream carried since it was opened: payload, without the hello.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Bytes to the guest.
    pub to_guest: u64,
    /// Bytes from the guest.
    pub from_guest: u64,
    /// When the first byte came from the guest.
    pub first: Option<Tick>,
}

impl Totals {
    fn add_from_guest(&mut self, now: Tick, bytes: u64) {
        if bytes > 0 {
            self.from_guest += bytes;
            self.first.get_or_insert(now);
        }
    }
}

/// What a `Port` did since it was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PortCounters {
    /// Number of packets from the guest.
    pub packets_from_guest: u64,
    /// Number of packets to the guest.
    pub packets_to_guest: u64,
    /// Payload bytes from the guest.
    pub bytes_from_guest: u64,
    /// Payload bytes to the guest.
    pub bytes_to_guest: u64,
    /// Payload bytes that were copied through this process's memory (zero for a tunnel whose sockets keep up).
    pub bytes_copied: u64,
    /// Packets that broke the protocol and were dropped.
    pub violations: u64,
    /// Number of sinks that failed.
    pub sink_failures: u64,
    /// Transport faults: how often the session was torn down.
    pub faults: u64,
    /// Number of calls of `poll`.
    pub polls: u64,
    /// Number of polls that a doorbell of the carrier caused, and that found no work.
    pub fruitless_polls: u64,
    /// How often the carrier's doorbells were not watched for a while, because too many signals were without work.
    pub mutes: u64,
}

/// One VM's channel.
pub struct Port<C: Carrier> {
    engine: Engine,
    carrier: C,
    watch: Watch,
    wakers: Wakers,
    /// The last burst had something to send, and no slot for it.
    starved: bool,
    entries: Vec<Option<Entry>>,
    /// Deadlines of dials with their slots, soonest first: an index of what the [`Dial`]s of the entries say.
    deadlines: BTreeSet<(Tick, u32)>,
    /// When the limits of streams let something through again, with their slots: an index of what the [`Limit`](crate::rate)s
    /// of the entries say. Empty while nothing waits for that.
    limited: BTreeSet<(Tick, u32, Way)>,
    lingering: Vec<Option<Linger>>,
    notices: VecDeque<Notice>,
    /// Local ends to wake at the end of the burst.
    wakes: Vec<Arc<Local>>,
    epoch: Option<u64>,
    last_fault: String,
    counters: PortCounters,
    /// The pairs in use, for a successor process.
    live: Option<LiveTable>,
    /// Pairs of a predecessor whose streams the guest still has. Each is reset before anything else is sent.
    inherited: Vec<(u32, u32)>,
}

/// A sink whose stream ended in order, before the sink accepted everything or before its other end was closed.
struct Linger {
    fd: OwnedFd,
    held: VecDeque<u8>,
    /// Keep the sink until the other end is closed.
    keep: bool,
}

impl<C: Carrier> Port<C> {
    /// Makes a `Port` in an epoll set.
    pub(crate) fn new(
        carrier: C,
        config: EngineConfig,
        seed: u64,
        watch: Watch,
    ) -> io::Result<Self> {
        let caps = carrier.caps();
        let config = EngineConfig {
            packet_overhead: caps.packet_overhead,
            tells_reason: caps.tells_reason,
            ..config
        };
        let mut port = Self {
            engine: Engine::new(config, seed),
            carrier,
            watch,
            wakers: Wakers::default(),
            starved: false,
            entries: Vec::new(),
            deadlines: BTreeSet::new(),
            limited: BTreeSet::new(),
            lingering: Vec::new(),
            notices: VecDeque::new(),
            wakes: Vec::new(),
            epoch: None,
            last_fault: String::new(),
            counters: PortCounters::default(),
            live: None,
            inherited: Vec::new(),
        };
        port.wakers.renew(&port.carrier, &port.watch)?;
        Ok(port)
    }

    /// Returns the carrier.
    pub fn carrier(&self) -> &C {
        &self.carrier
    }

    /// Returns the carrier, for the code that controls it. For example a VMM's bus activates and resets its device
    /// here.
    pub fn carrier_mut(&mut self) -> &mut C {
        &mut self.carrier
    }

    /// Returns the counters.
    pub fn counters(&self) -> PortCounters {
        self.counters
    }

    /// Number of open streams in both directions, including unanswered ones.
    pub fn streams(&self) -> usize {
        self.engine.streams()
    }

    /// Epoch of the current session.
    pub fn epoch(&self) -> Option<u64> {
        self.epoch
    }

    /// Returns true if the guest is paused: its session and streams are kept.
    pub fn is_paused(&self) -> bool {
        self.carrier.is_paused()
    }

    /// The last transport fault as text; empty if there was none.
    pub fn last_fault(&self) -> &str {
        &self.last_fault
    }

    /// Returns true if there is a notice.
    pub(crate) fn has_notice(&self) -> bool {
        !self.notices.is_empty()
    }

    /// Takes the next notice.
    #[must_use]
    pub fn poll_notice(&mut self) -> Option<Notice> {
        self.notices.pop_front()
    }

    /// Listens on a vsock port for the guest.
    ///
    /// # Errors
    /// The `Port` listens on too many vsock ports.
    pub fn listen(&mut self, port: u32) -> Result<(), ListenError> {
        self.engine.listen(port, Kind::Stream)
    }

    /// Listens on every vsock port for the guest.
    pub fn listen_to_all(&mut self) {
        self.engine.listen_to_all();
    }

    /// Dials a vsock port of the guest. With a sink the caller gets no notice of the result; without a sink it gets a
    /// [`Notice`].
    ///
    /// # Errors
    /// There is no session, or a limit is reached. The sink is dropped.
    pub fn dial(
        &mut self,
        now: Tick,
        request: DialRequest,
        sink: Option<Sink>,
    ) -> Result<StreamId, DialError> {
        // The engine may assign a slot whose last stream has an end that is not handled yet. Handle it first.
        self.handle_events(now);
        let stream = self
            .engine
            .connect(now, request.port, Kind::Stream, request.lane)?;
        if let Some(deadline) = request.deadline {
            self.deadlines.insert((deadline, stream.slot()));
        }
        let mut entry = Entry::new(stream, Phase::Dialing(Box::new(Dial::new(request))));
        entry.sink = sink;
        self.insert(entry);
        Ok(stream)
    }

    /// Accepts a stream that the guest opens. Without a sink its bytes are held until [`attach`](Self::attach).
    pub fn accept(&mut self, now: Tick, stream: StreamId, sink: Option<Sink>) {
        let Some(entry) = self.entry(stream) else {
            return;
        };
        if !matches!(entry.phase, Phase::Asked) {
            return;
        }
        entry.phase = Phase::Open;
        self.engine.answer(now, stream, Answer::Accept);
        if let Some(sink) = sink {
            self.attach(now, stream, sink, &[]);
        }
    }

    /// Refuses a stream that the guest opens.
    pub fn refuse(&mut self, now: Tick, stream: StreamId) {
        if self
            .entry(stream)
            .is_some_and(|e| matches!(e.phase, Phase::Asked))
        {
            self.engine.answer(now, stream, Answer::Refuse);
        }
    }

    /// Gives an open stream its sink, which replaces the present one. `prefix` goes to the guest before the sink's
    /// bytes. Returns false (and drops the sink) if the stream is gone or not open.
    pub fn attach(&mut self, now: Tick, stream: StreamId, sink: Sink, prefix: &[u8]) -> bool {
        self.attach_greeted(now, stream, sink, prefix, &[])
    }

    /// As [`attach`](Self::attach), and `greeting` goes to the sink before any byte of the guest. Only a socket is greeted. If
    /// this returns false, no byte of it was written.
    pub fn attach_greeted(
        &mut self,
        now: Tick,
        stream: StreamId,
        sink: Sink,
        prefix: &[u8],
        greeting: &[u8],
    ) -> bool {
        let Some(entry) = self.entry(stream) else {
            return false;
        };
        if !matches!(entry.phase, Phase::Open) {
            return false;
        }
        let old = entry.sink.take();
        // What is left of a greeting was for the old sink.
        entry.held.drain(..std::mem::take(&mut entry.greeting));
        if let Some(Sink::Local(end)) = &old {
            // No byte may be lost in either direction. Bytes that the application has not read go before the held
            // bytes.
            let mut state = end.0.lock();
            let mut held = std::mem::take(&mut state.to_app);
            held.append(&mut entry.held);
            entry.held = held;
            entry.out.append(&mut state.to_guest);
            entry.end_passed_on = false;
        }
        entry.out.extend(prefix);
        if matches!(sink, Sink::Fd(_)) && !greeting.is_empty() {
            let mut held = VecDeque::from(greeting.to_vec());
            held.append(&mut entry.held);
            entry.held = held;
            entry.greeting = greeting.len();
        }
        if matches!(old, Some(Sink::Fd(_))) {
            self.unwatch_sink(&old);
        }
        self.set_sink(now, stream, sink)
    }

    /// Returns true if the stream is there and open: [`attach`](Self::attach) finds it.
    pub fn is_open(&self, stream: StreamId) -> bool {
        let entry = self.entries.get(stream.slot() as usize);
        let entry = entry.and_then(Option::as_ref);
        entry.is_some_and(|e| e.id == stream && matches!(e.phase, Phase::Open))
    }

    /// Declares that the other side of a stream ends its sending before it closes. If it closes without that, the
    /// stream was broken off. Every stream that was dialled with a hello already has this property.
    pub fn expect_order(&mut self, stream: StreamId) {
        if let Some(entry) = self.entry(stream) {
            entry.ends_in_order = true;
        }
    }

    /// Shuts down one or both directions of a stream.
    pub fn shutdown(&mut self, now: Tick, stream: StreamId, how: How) {
        self.engine.shutdown(now, stream, how);
    }

    /// Ends a stream at once.
    pub fn reset(&mut self, now: Tick, stream: StreamId, why: ResetReason) {
        self.engine.reset(now, stream, why);
    }

    /// The application changed its side of a local sink.
    pub(crate) fn local_changed(&mut self, now: Tick, stream: StreamId) {
        let Some(entry) = self.entry(stream) else {
            return;
        };
        let mut sink_gone = false;
        if let Some(Sink::Local(end)) = &entry.sink {
            let mut state = end.0.lock();
            state.kicked = false;
            sink_gone = state.recv_done;
        }
        self.drain_held(now, stream.slot());
        if sink_gone {
            self.engine.shutdown(now, stream, How::Receive);
        }
        self.settle(now, stream.slot());
    }

    /// A descriptor of this `Port` became ready.
    pub(crate) fn ready(&mut self, now: Tick, token: Token, flags: EpollFlags) {
        match token {
            Token::Waker(id) => self.woken(now, id),
            Token::Sink { slot, generation } => self.sink_ready(now, slot, generation, flags),
            Token::Linger(index) => self.linger_ready(index as usize, flags),
            Token::Commands | Token::Extra(_) => {}
        }
    }

    fn woken(&mut self, now: Tick, id: u32) {
        let woken = self.carrier.woken(id);
        if woken.wakers_changed
            && let Err(e) = self.wakers.renew(&self.carrier, &self.watch)
        {
            self.wakers_failed(now, &e);
        }
        let change = woken.session.is_some() || woken.wakers_changed || woken.obstacle_changed;
        self.wakers.woke(change);
        if let Some(change) = woken.session {
            self.session(now, change);
        }
        if woken.obstacle_changed {
            self.notices.push_back(Notice::Obstacle);
        }
    }

    /// Without wakers the channel would hang silently.
    fn wakers_failed(&mut self, now: Tick, e: &io::Error) {
        self.fault(now, &format!("cannot watch the carrier's descriptors: {e}"));
    }

    fn session(&mut self, now: Tick, change: SessionChange) {
        self.epoch = match change {
            SessionChange::Attached { epoch }
            | SessionChange::Continued { epoch }
            | SessionChange::Restored { epoch } => Some(epoch),
            SessionChange::Lost(_) => None,
        };
        self.session_changed(change);
        self.engine.handle_session(now, change);
        self.notices
            .push_back(Notice::Session { epoch: self.epoch });
    }

    fn fault(&mut self, now: Tick, what: &str) {
        self.counters.faults += 1;
        what.clone_into(&mut self.last_fault);
        tracing::warn!(fault = %adit_names::escape(what), faults = self.counters.faults, "transport torn down");
        self.carrier.tear();
        self.session(now, SessionChange::Lost(ResetReason::CarrierFault));
    }

    fn carrier_fault(&mut self, now: Tick, fault: &CarrierFault) {
        self.fault(now, &fault.to_string());
    }

    fn sink_ready(&mut self, now: Tick, slot: u32, generation: u32, flags: EpollFlags) {
        let Some(entry) = self.entries.get_mut(slot as usize).and_then(Option::as_mut) else {
            return;
        };
        let id = entry.id;
        if Token::sink(id) != (Token::Sink { slot, generation }) {
            return; // an event for an earlier stream of this slot
        }
        if flags.contains(EpollFlags::EPOLLERR) {
            self.counters.sink_failures += 1;
            self.engine.reset(now, id, ResetReason::Local);
            return;
        }
        if flags.intersects(EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLHUP) {
            entry.hung_up = true;
        }
        if flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLHUP) {
            entry.readable = true;
        }
        // The sink has ended before, and now nothing accepts the peer's bytes any more.
        let sink_gone =
            flags.contains(EpollFlags::EPOLLHUP) && entry.sink_done && !entry.end_passed_on;
        if flags.intersects(EpollFlags::EPOLLOUT | EpollFlags::EPOLLHUP) {
            self.room(now, slot);
        }
        if sink_gone {
            self.engine.shutdown(now, id, How::Receive);
        }
        self.settle(now, slot);
    }

    fn entry(&mut self, stream: StreamId) -> Option<&mut Entry> {
        self.entries
            .get_mut(stream.slot() as usize)?
            .as_mut()
            .filter(|e| e.id == stream)
    }

    fn insert(&mut self, entry: Entry) {
        // The engine's table bounds the slot.
        let slot = entry.id.slot() as usize;
        if self.entries.len() <= slot {
            self.entries.resize_with(slot + 1, || None);
        }
        self.entries[slot] = Some(entry);
    }

    /// Sets a sink and passes the held bytes to it.
    fn set_sink(&mut self, now: Tick, stream: StreamId, sink: Sink) -> bool {
        if let Sink::Fd(fd) = &sink
            && let Err(e) = self.watch.add_edge(fd.as_fd(), Token::sink(stream))
        {
            tracing::warn!(error = %e, "cannot watch a sink");
            self.counters.sink_failures += 1;
            self.engine.reset(now, stream, ResetReason::Local);
            return false;
        }
        let Some(entry) = self.entry(stream) else {
            return false;
        };
        match &sink {
            // If this process is killed, the other end must see a reset and not a complete stream.
            Sink::Fd(fd) => socket_end::reset_on_close(fd, true),
            Sink::Local(end) => {
                end.0.lock().open = true;
                entry.wake = true;
            }
            Sink::Inline(_) => {}
        }
        entry.sink = Some(sink);
        entry.room_watched = false;
        // The first edge would report this too. Trying at once saves a round for a client that has already sent.
        entry.readable = true;
        entry.service_event(ServiceEvent::Opened);
        self.drain_held(now, stream.slot());
        self.settle(now, stream.slot());
        true
    }

    fn unwatch_sink(&self, sink: &Option<Sink>) {
        if let Some(Sink::Fd(fd)) = sink {
            self.watch.remove(fd.as_fd());
        }
    }
}

impl<C: Carrier> Drop for Port<C> {
    fn drop(&mut self) {
        self.wakers.unregister(&self.watch);
        let entries = self.entries.drain(..).flatten();
        for sink in entries.filter_map(|entry| entry.sink) {
            match sink {
                Sink::Local(end) => {
                    end.fail(DialError::Cancelled);
                }
                Sink::Fd(fd) => {
                    self.watch.remove(fd.as_fd());
                    entry::abort(fd);
                }
                Sink::Inline(_) => {}
            }
        }
    }
}
