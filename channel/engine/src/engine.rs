//! The machine: its parts, its getters, and what every input ends in (`settle`, `end`, `drain`).
//!
//! ```text
//!  connect ──► Requested ── RESPONSE ──────────┐        RST, timeout, violation, reset(), session change
//!                                              ▼        lead from every state to Ended(reason)
//!  REQUEST ──► Offered ─── answer(Accept) ──► Open
//!                                              │ each side ends its sending when it likes (SHUTDOWN)
//!                                              ▼
//!                 peer shut both, or RST when finished, or 8 s after we shut both
//!                                              │
//!                      bytes delivered, not yet consumed? ── yes ──► Draining ── consumed ──┐
//!                                              │ no                                         │
//!                                              ▼                                            ▼
//!                                            Ended ── Closed told and RST sent ──► Free ◄─ Ended
//! ```
//!
//! Ending in order, as Linux does it: a SHUTDOWN with both flags is answered with RST. When both sides have ended their
//! sending, whoever notices says the full SHUTDOWN. An RST after the peer ended its sending loses nothing: what it
//! sent was delivered, and the stream drains (R57). An RST at any other time ends the stream at once.

use alloc::vec::Vec;

use crate::credit::Pool;
use crate::ports::{EPHEMERAL_MAX, EPHEMERAL_MIN, PortAllocator};
use crate::rst::{Rst, RstSet};
use crate::stream::{PROBE_FIRST_NS, Phase, Stream, owe, tell};
use crate::table::{ListId, Table};
use crate::timers::{NEVER, Timers};
use crate::{
    EngineConfig, Kind, Lane, Op, PacketHeader, PairChange, ResetReason, StreamId, Tick, Violation,
};

/// Most streams that a configuration can ask for.
pub const STREAMS_MAX: u32 = 1 << 16;
/// Most ports that can be listened on.
pub const LISTEN_MAX: u32 = 1024;

/// Connection engine of one peer: streams between ports, with credit, half-close and reset.
///
/// It holds no payload, reads no clock, does no IO, and never panics on what a peer sends. Memory is bounded by
/// `max_streams` (a few hundred bytes each), [`LISTEN_MAX`] and [`RST_MAX`](crate::RST_MAX); what the shell has to hold
/// for it, by `pool_bytes`.
///
/// Four families of methods:
/// - *getters*: `streams`, `ports`, `lent`;
/// - *inputs* `handle_packet`, `handle_timeout`, `handle_session`: the world did something. Time goes in here;
/// - *commands* `listen`, `connect`, `answer`, `offer`, `consumed`, `shutdown`, `reset`: the shell wants something. A stale
///   [`StreamId`] is ignored;
/// - *outputs*: after any of these poll, in this order, `poll_event` until `None`, `poll_transmit` until `None` or until
///   there is no slot, then `poll_timeout`.
///
/// Between a `poll_transmit` that asks for a body and its `commit_body` only `offer` may be called; with nothing to commit
/// the shell says `offer(s, 0)` and polls again.
pub struct Engine {
    pub(crate) cfg: EngineConfig,
    pub(crate) attached: bool,
    /// The peer does not know yet that its streams of a former session are gone: see [`crate::SessionChange::Restored`].
    pub(crate) restored: bool,
    /// Latest time seen.
    pub(crate) now: Tick,
    pub(crate) table: Table,
    pub(crate) pool: Pool,
    pub(crate) timers: Timers,
    pub(crate) rst: RstSet,
    pub(crate) ephemeral: PortAllocator,
    /// Ports listened on, sorted.
    pub(crate) listening: Vec<u32>,
    /// Every other port may be asked for, too.
    pub(crate) listening_to_all: bool,
    /// Streams that the caller knows and was not told `Closed` of.
    pub(crate) known: usize,
    /// Data packets of lane control sent since the last one of lane bulk.
    pub(crate) control_run: u32,
}

impl Engine {
    /// Creates an engine without a session. The seed decides which ephemeral port comes first.
    pub fn new(cfg: EngineConfig, seed: u64) -> Self {
        let cfg = cfg.sane();
        Self {
            attached: false,
            restored: false,
            now: Tick(0),
            table: Table::new(cfg.max_streams),
            pool: Pool::new(cfg.pool_bytes, cfg.initial_window),
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

    // ---- getters

    /// Returns how many streams the caller knows of and was not told `Closed` of.
    pub fn streams(&self) -> usize {
        self.known
    }

    /// Returns a stream's (local port, peer port); `None` if the id is stale.
    pub fn ports(&self, s: StreamId) -> Option<(u32, u32)> {
        let s = &self.table[self.table.get(s)?];
        Some((s.local_port, s.peer_port))
    }

    /// Returns the bytes of window lent to streams: at most `pool_bytes`.
    pub fn lent(&self) -> u64 {
        self.pool.lent()
    }

    // ---- for whoever keeps a list of the streams outside

    /// Keeps account of port pairs from now on: [`drain_pairs`](Self::drain_pairs) must be called after every round of
    /// outputs, since the account grows with every stream that comes or goes.
    pub fn track_pairs(&mut self) {
        self.table.changes.get_or_insert_default();
    }

    /// Takes the pairs that came and went, in order. A pair is there from before its first packet until the peer was sent
    /// its reset or needs none.
    pub fn drain_pairs(&mut self) -> impl Iterator<Item = PairChange> + '_ {
        self.table.changes.iter_mut().flat_map(|c| c.drain(..))
    }

    // ---- what inputs and commands have in common

    pub(crate) fn see(&mut self, now: Tick) {
        self.now = self.now.max(now);
    }

    pub(crate) fn after(&self, ns: u64) -> u64 {
        // One less than "never", however long.
        self.now.0.saturating_add(ns).min(NEVER - 1)
    }

    /// Takes slot, pair and window for a new stream. None if there is no slot or no credit.
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

    /// Brings lists and timers in line with a stream that changed. Every input and command that changes what is read here
    /// ends here; O(1), or O(log n) if a deadline changed.
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
            s.events |= if sendable { tell::WRITABLE } else { 0 };
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

    /// Ends a stream now. With `rst` the peer is told, and the pair stays taken until that is sent.
    pub(crate) fn end(&mut self, slot: u32, reason: Option<ResetReason>, rst: bool) {
        let s = &mut self.table[slot];
        if matches!(s.phase, Phase::Free | Phase::Ended(_)) {
            return;
        }
        // The peer does not know of a request that was never sent.
        let rst = rst && s.owed & owe::REQUEST == 0;
        s.phase = Phase::Ended(reason);
        s.owed = if rst { owe::RST } else { 0 };
        s.offered = 0;
        (s.deadline, s.probe_at, s.blocked) = (NEVER, NEVER, false);
        s.events = if s.announced {
            s.events & !tell::WRITABLE | tell::CLOSED
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

    /// Ends a stream on the wire, and for the caller once its sink has taken what was delivered.
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

    /// Frees the slot of an ended stream of which nobody waits to hear any more.
    pub(crate) fn free_if_done(&mut self, slot: u32) {
        let s = &self.table[slot];
        if matches!(s.phase, Phase::Ended(_)) && s.owed == 0 && s.events == 0 {
            self.table.free(slot);
        }
    }

    /// The peer broke a rule on a stream: ends it and tells the peer.
    pub(crate) fn fault(&mut self, slot: u32, v: Violation) -> crate::Disposition {
        let reason = match v {
            Violation::CreditExceeded { .. } => ResetReason::Credit,
            v => ResetReason::Protocol(v),
        };
        self.end(slot, Some(reason), true);
        crate::Disposition::Ignore(v)
    }

    /// Owes a reset to a pair that is no stream.
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

    /// Makes the header of a packet of a stream, with its present credit.
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
