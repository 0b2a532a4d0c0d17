//! The state machine: its parts, its getters, and the functions in which every input ends (`settle`, `end`, `drain`).
//!
//! ```text
//!  connect ──► Requested ── RESPONSE ──────────┐        RST, timeout, violation, reset(), session change
//!                                              ▼        lead from every state to Ended(reason)
//!  REQUEST ──► Offered ─── answer(Accept) ──► Open
//!                                              │ each side may end its sending at any time (SHUTDOWN)
//!                                              ▼
//!                 peer shut both, or RST when finished, or 8 s after we shut both
//!                                              │
//!                      bytes delivered, not yet consumed? ── yes ──► Draining ── consumed ──┐
//!                                              │ no                                         │
//!                                              ▼                                            ▼
//!                                            Ended ─ Closed delivered, RST sent ─► Free ◄─ Ended
//! ```
//!
//! A stream ends in order as in Linux: a SHUTDOWN with both flags is answered with RST. When both sides have ended
//! their sending, the side that notices it sends the SHUTDOWN with both flags. An RST after the peer ended its sending
//! loses nothing: all bytes were delivered, and the stream drains (R57). An RST at any other time ends the stream at
//! once.

use alloc::vec::Vec;

use crate::credit::Pool;
use crate::ephemeral::{EPHEMERAL_MAX, EPHEMERAL_MIN, PortAllocator};
use crate::rst::{Rst, RstSet};
use crate::stream::{PROBE_FIRST_NS, Phase, Stream, event, owe};
use crate::table::{ListId, Table};
use crate::timers::{NEVER, Timers};
use crate::{
    EngineConfig, Kind, Lane, Op, PacketHeader, PairChange, ResetReason, StreamId, Tick, Violation,
};

/// Largest number of streams that a configuration can ask for.
pub const STREAMS_MAX: u32 = 1 << 16;
/// Largest number of ports that the engine can listen on.
pub const LISTEN_MAX: u32 = 1024;

/// Connection engine of one peer: streams between ports, with credit, half-close and reset.
///
/// It holds no payload, reads no clock, does no IO, and never panics on what a peer sends. Its memory is bounded by
/// `max_streams` (a few hundred bytes each), [`LISTEN_MAX`] and [`RST_MAX`](crate::RST_MAX). The bytes that the shell
/// has to hold for it are bounded by `pool_bytes`.
///
/// Four families of methods:
/// - *getters*: `streams`, `ports`, `lent`;
/// - *inputs* `handle_packet`, `handle_timeout`, `handle_session`: something happened outside. They take the time as a
///   parameter;
/// - *commands* `listen`, `connect`, `answer`, `offer`, `consumed`, `shutdown`, `reset`: the shell asks for something.
///   A stale [`StreamId`] is ignored;
/// - *outputs*: after any of these, poll in this order: `poll_event` until `None`, `poll_transmit` until `None` or
///   until there is no slot, then `poll_timeout`.
///
/// Between a `poll_transmit` that asks for a body and its `commit_body` the shell may only call `offer`. If it has
/// nothing to commit, it calls `offer(s, 0)` and polls again.
pub struct Engine {
    pub(crate) cfg: EngineConfig,
    pub(crate) attached: bool,
    /// The peer does not know yet that the streams of its earlier session are gone: see
    /// [`crate::SessionChange::Restored`].
    pub(crate) restored: bool,
    /// Latest time that the caller passed.
    pub(crate) now: Tick,
    pub(crate) table: Table,
    pub(crate) pool: Pool,
    pub(crate) timers: Timers,
    pub(crate) rst: RstSet,
    pub(crate) ephemeral: PortAllocator,
    /// Ports that the engine listens on, sorted.
    pub(crate) listening: Vec<u32>,
    /// The engine listens on every other port too.
    pub(crate) listening_to_all: bool,
    /// Number of streams that the caller knows and has not got `Closed` for.
    pub(crate) known: usize,
    /// Number of data packets of lane control since the last one of lane bulk.
    pub(crate) control_run: u32,
}

impl Engine {
    /// Creates an engine without a session. The seed selects the first ephemeral port.
    pub fn new(cfg: EngineConfig, seed: u64) -> Self {
        let cfg = cfg.sane();
        Self {
            attached: false,
            restored: false,
            now: Tick(0),
            table: Table::new(cfg.max_streams),
            pool: Pool::new(cfg.pool_bytes, cfg.initial_window, cfg.max_window),
            timers: Timers::default(),
            rst: RstSet::new(),
            ephemeral: PortAllocator::new(EPHEMERAL_MIN, EPHEMERAL_MAX, seed),
            listening: Vec::new(),
            listening_to_all: false,
            known: 0,
            control_run: 0,
            cfg,
        }
    }

    /// Returns the number of streams that the caller knows and has not got `Closed` for.
    pub fn streams(&self) -> usize {
        self.known
    }

    /// Returns (local port, peer port) of a stream; `None` if the id is stale.
    pub fn ports(&self, s: StreamId) -> Option<(u32, u32)> {
        let s = &self.table[self.table.get(s)?];
        Some((s.local_port, s.peer_port))
    }

    /// Returns the bytes of window that are lent to streams: at most `pool_bytes`.
    pub fn lent(&self) -> u64 {
        self.pool.lent()
    }

    /// Starts recording changes of port pairs. From now on call [`drain_pairs`](Self::drain_pairs) after every round
    /// of outputs, because the record grows with every stream that opens or closes.
    pub fn track_pairs(&mut self) {
        self.table.changes.get_or_insert_default();
    }

    /// Takes the recorded changes, in order. A pair is open from before its first packet until its reset was sent to
    /// the peer, or none is needed.
    pub fn drain_pairs(&mut self) -> impl Iterator<Item = PairChange> + '_ {
        self.table.changes.iter_mut().flat_map(|c| c.drain(..))
    }

    pub(crate) fn advance_to(&mut self, now: Tick) {
        self.now = self.now.max(now);
    }

    pub(crate) fn after(&self, ns: u64) -> u64 {
        // Always earlier than `NEVER`, however long the time is.
        self.now.0.saturating_add(ns).min(NEVER - 1)
    }

    /// Reserves slot, pair and window for a new stream. Returns `None` if there is no slot or no credit.
    pub(crate) fn open(&mut self, stream: Stream) -> Option<u32> {
        let slots_left = self.table.left().checked_sub(1)?;
        let window = self.pool.open(slots_left)?;
        let rx = crate::credit::RxWindow::new(window);
        let deadline = self.after(self.cfg.connect_timeout);
        let Some(slot) = self.table.insert(Stream {
            rx,
            deadline,
            ..stream
        }) else {
            self.pool.close(window);
            return None;
        };
        if slot as usize >= self.timers.len() {
            self.timers.grow();
        }
        self.settle(slot);
        Some(slot)
    }

    /// Updates lists and timers for a stream that changed. Every input and command that changes a field read here must
    /// call it. Costs O(1), or O(log n) if a deadline changed.
    pub(crate) fn settle(&mut self, slot: u32) {
        let probe_at = self.after(PROBE_FIRST_NS);
        let overhead = self.cfg.packet_overhead;
        let s = &mut self.table[slot];
        let wants = s.phase == Phase::Open && s.offered > 0 && s.may_send();
        let sendable = wants && s.tx.budget(overhead) > 0;
        if wants && !sendable {
            if !s.blocked {
                (s.blocked, s.probe_at, s.probe_after) = (true, probe_at, PROBE_FIRST_NS);
            }
        } else if s.blocked {
            (s.blocked, s.probe_at) = (false, NEVER);
            s.owed &= !owe::CREDIT_REQUEST;
            s.events |= if sendable { event::WRITABLE } else { 0 };
        }
        if s.live() {
            let due = s.shut_due() != 0;
            s.owed = s.owed & !owe::SHUTDOWN | if due { owe::SHUTDOWN } else { 0 };
        }
        if !wants {
            s.deficit = 0;
        }
        let (lane, owed, events) = (s.lane, s.owed != 0, s.events != 0);
        let at = s.deadline.min(s.probe_at);
        self.table.set(ListId::data(lane), slot, sendable);
        self.table.set(ListId::owed(lane), slot, owed);
        self.table.set(ListId::Events, slot, events);
        self.timers.set(slot, at);
    }

    /// Ends a stream now. If `rst` is true the peer gets a reset, and the pair stays in use until the reset is sent.
    pub(crate) fn end(&mut self, slot: u32, reason: Option<ResetReason>, rst: bool) {
        let s = &mut self.table[slot];
        if matches!(s.phase, Phase::Free | Phase::Ended(_)) {
            return;
        }
        // The peer does not know the stream if its request was never sent.
        let rst = rst && s.owed & owe::REQUEST == 0;
        s.phase = Phase::Ended(reason);
        s.owed = if rst { owe::RST } else { 0 };
        s.offered = 0;
        (s.deadline, s.probe_at, s.blocked) = (NEVER, NEVER, false);
        s.events = if s.announced {
            s.events & !event::WRITABLE | event::CLOSED
        } else {
            0
        };
        let window = s.rx.window();
        let known = s.announced;
        self.pool.close(window);
        if !known {
            self.table.retire_id(slot);
        }
        if !rst {
            self.table.unmap(slot);
        }
        self.settle(slot);
        self.free_if_done(slot);
    }

    /// Ends a stream on the wire. For the caller it ends when its sink has taken all delivered bytes.
    pub(crate) fn drain(&mut self, slot: u32, reason: Option<ResetReason>, rst: bool) {
        let s = &mut self.table[slot];
        if s.rx.held() == 0 || !s.announced {
            return self.end(slot, reason, rst);
        }
        s.phase = Phase::Draining(reason);
        s.owed = if rst { owe::RST } else { 0 };
        s.offered = 0;
        s.deadline = NEVER;
        if !rst {
            self.table.unmap(slot);
        }
        self.settle(slot);
    }

    /// Frees the slot of an ended stream if neither the peer nor the caller has to be informed any more.
    pub(crate) fn free_if_done(&mut self, slot: u32) {
        let s = &self.table[slot];
        if matches!(s.phase, Phase::Ended(_)) && s.owed == 0 && s.events == 0 {
            self.table.free(slot);
        }
    }

    /// The peer broke a rule on a stream: ends the stream and resets it at the peer.
    pub(crate) fn fault(&mut self, slot: u32, v: Violation) -> crate::Disposition {
        let reason = match v {
            Violation::CreditExceeded { .. } => ResetReason::Credit,
            v => ResetReason::Protocol(v),
        };
        self.end(slot, Some(reason), true);
        crate::Disposition::Ignore(v)
    }

    /// Queues a reset for a pair that has no stream.
    pub(crate) fn refuse(&mut self, h: &PacketHeader, lane: Lane) -> crate::Disposition {
        let rst = Rst {
            lane,
            local_port: h.dst_port,
            peer_port: h.src_port,
            kind: h.kind,
        };
        if self.rst.insert(self.now, rst) {
            crate::Disposition::Consume
        } else {
            crate::Disposition::Ignore(Violation::RstOverflow)
        }
    }

    /// Makes the header of a packet of a stream, with the current credit.
    pub(crate) fn header(s: &Stream, op: Op, len: u32, flags: u32) -> PacketHeader {
        let (buf_alloc, fwd_cnt) = s.rx.peek();
        PacketHeader {
            src_port: s.local_port,
            dst_port: s.peer_port,
            len,
            kind: Kind::Stream as u16,
            op: op as u16,
            flags,
            buf_alloc,
            fwd_cnt,
        }
    }
}
