//! `handle_*`: packets, time, session changes. A packet is parsed, looked up and checked before it changes anything.

use crate::stream::{BOTH, PROBE_FIRST_NS, PROBE_MAX_NS, Phase, Stream, event, owe};
use crate::{
    Disposition, Engine, Kind, Lane, Op, PacketHeader, PeerReason, ResetReason, SHUTDOWN_RCV,
    SHUTDOWN_SEND, SessionChange, Tick, Violation,
};

impl Engine {
    /// Handles a packet from the peer. `body_len` is the number of bytes that actually follow its header. For a
    /// carrier with one lane.
    pub fn handle_packet(&mut self, now: Tick, h: &PacketHeader, body_len: u32) -> Disposition {
        self.handle_packet_on(now, Lane::Bulk, h, body_len)
    }

    /// Handles a packet that arrived on a lane. If it opens a stream, that stream uses this lane.
    pub fn handle_packet_on(
        &mut self,
        now: Tick,
        lane: Lane,
        h: &PacketHeader,
        body_len: u32,
    ) -> Disposition {
        self.advance_to(now);
        let unexpected = Violation::Unexpected { op: h.op };
        if !self.attached {
            return Disposition::Ignore(unexpected);
        }
        let found = self.table.find(h.dst_port, h.src_port);
        let op = match check(h) {
            Ok(op) => op,
            Err(v) => return self.on_malformed(found, h, v, lane),
        };
        match (op, found) {
            (Op::Rst, None) => Disposition::Consume,
            (Op::Rst, Some(slot)) => self.on_rst(slot, h),
            (Op::Request, found) => {
                self.restored = false;
                self.on_request(found, h, lane)
            }
            // The guest will soon be informed that this stream is gone.
            (_, None) if self.restored => Disposition::Consume,
            (_, None) => self.refuse(h, lane),
            (_, Some(slot)) if !self.table[slot].live() => Disposition::Consume,
            (op, Some(slot)) => self.on_stream(slot, op, h, body_len),
        }
    }

    /// Handles an unknown operation, type or flags: resets the pair and ends its stream, except when the packet is a
    /// reset.
    fn on_malformed(
        &mut self,
        found: Option<u32>,
        h: &PacketHeader,
        v: Violation,
        lane: Lane,
    ) -> Disposition {
        if h.op == Op::Rst as u16 {
            return Disposition::Ignore(v);
        }
        match found {
            Some(slot) if self.table[slot].live() => self.fault(slot, v),
            Some(_) => Disposition::Ignore(v),
            None => match self.refuse(h, lane) {
                Disposition::Consume => Disposition::Ignore(v),
                overflow => overflow,
            },
        }
    }

    fn on_rst(&mut self, slot: u32, h: &PacketHeader) -> Disposition {
        let peer = self.peer_reason(h);
        let s = &self.table[slot];
        // The packet confirms bytes that this stream never sent: it is late, and from an earlier stream of the pair
        // (R45).
        if s.live()
            && let Err(v) = s.tx.plausible(h.fwd_cnt)
        {
            return Disposition::Ignore(v);
        }
        match s.phase {
            // Our request is not sent yet, so the reset is for an earlier stream.
            Phase::Requested if s.owed & owe::REQUEST != 0 => {}
            Phase::Requested => {
                let reason = match peer {
                    ResetReason::Told(why) if why != PeerReason::Refused => peer,
                    _ => ResetReason::Refused,
                };
                self.end(slot, Some(reason), false);
            }
            Phase::Open if s.finished() => self.drain(slot, None, false),
            Phase::Open if s.peer_shut & SHUTDOWN_SEND != 0 => self.drain(slot, Some(peer), false),
            Phase::Offered | Phase::Open => self.end(slot, Some(peer), false),
            // Both sides reset at the same time: our reset is not needed any more.
            Phase::Draining(_) | Phase::Ended(_) => self.withdraw_rst(slot),
            Phase::Free => {}
        }
        Disposition::Consume
    }

    /// Returns why the peer resets, if it says so.
    fn peer_reason(&self, h: &PacketHeader) -> ResetReason {
        let reason = PeerReason::parse(h.flags).filter(|_| self.cfg.tells_reason);
        reason.map_or(ResetReason::Peer, ResetReason::Told)
    }

    /// Frees the pair of a stream that has ended and only still owes an RST.
    fn withdraw_rst(&mut self, slot: u32) {
        self.table[slot].owed = 0;
        self.table.unmap(slot);
        self.settle(slot);
        self.free_if_done(slot);
    }

    fn on_request(&mut self, found: Option<u32>, h: &PacketHeader, lane: Lane) -> Disposition {
        let unexpected = Violation::Unexpected { op: h.op };
        match found.map(|slot| (slot, self.table[slot].phase)) {
            // A repeated request: the first one counts.
            Some((_, Phase::Offered)) => return Disposition::Ignore(unexpected),
            Some((slot, Phase::Requested | Phase::Open)) => return self.fault(slot, unexpected),
            // The peer has finished the earlier stream of the pair. Our reset would end the new one (R45).
            Some((slot, _)) => self.withdraw_rst(slot),
            None => self.rst.cancel(h.dst_port, h.src_port),
        }
        if !self.listening_to_all && self.listening.binary_search(&h.dst_port).is_err() {
            return self.refuse(h, lane);
        }
        if self.table.left() <= self.cfg.max_streams / 8 {
            return self.refuse(h, lane);
        }
        let mut tx = Stream::FREE.tx;
        if let Err(v) = tx.update(h.buf_alloc, h.fwd_cnt) {
            return self.on_malformed(None, h, v, lane);
        }
        let stream = Stream {
            phase: Phase::Offered,
            lane,
            local_port: h.dst_port,
            peer_port: h.src_port,
            tx,
            events: event::INCOMING,
            ..Stream::FREE
        };
        match self.open(stream) {
            Some(_) => Disposition::Consume,
            None => self.refuse(h, lane),
        }
    }

    fn on_stream(&mut self, slot: u32, op: Op, h: &PacketHeader, body_len: u32) -> Disposition {
        let probe_at = self.after(PROBE_FIRST_NS);
        let s = &mut self.table[slot];
        let news = match s.tx.update(h.buf_alloc, h.fwd_cnt) {
            Ok(news) => news,
            Err(v) => return self.fault(slot, v),
        };
        if news && s.blocked {
            (s.probe_at, s.probe_after) = (probe_at, PROBE_FIRST_NS);
        }
        let disposition = match (op, s.phase) {
            (Op::Response, Phase::Requested) if s.owed & owe::REQUEST == 0 => {
                self.on_response(slot);
                Disposition::Consume
            }
            (Op::Rw, Phase::Open) if s.peer_shut & SHUTDOWN_SEND == 0 => {
                // New credit only matters to a stream that has something to send.
                if news && s.offered > 0 {
                    self.settle(slot);
                }
                return self.on_data(slot, h.len, body_len);
            }
            (Op::Shutdown, Phase::Open | Phase::Offered) => {
                self.on_shutdown(slot, h.flags);
                Disposition::Consume
            }
            // Linux announces a changed buffer size in any state.
            (Op::CreditUpdate, _) => {
                self.owe_credit(slot);
                Disposition::Consume
            }
            (Op::CreditRequest, phase) => {
                if phase == Phase::Open {
                    s.owed |= owe::CREDIT_UPDATE;
                }
                Disposition::Consume
            }
            _ => return self.fault(slot, Violation::Unexpected { op: h.op }),
        };
        self.settle(slot);
        disposition
    }

    fn on_response(&mut self, slot: u32) {
        let shutdown_at = self.after(self.cfg.shutdown_timeout);
        let s = &mut self.table[slot];
        s.phase = Phase::Open;
        s.events |= event::CONNECTED;
        s.deadline = if s.local_shut == BOTH {
            shutdown_at
        } else {
            crate::timers::NEVER
        };
    }

    fn on_data(&mut self, slot: u32, len: u32, body_len: u32) -> Disposition {
        if len > body_len {
            return self.fault(
                slot,
                Violation::LengthMismatch {
                    header: len,
                    body: body_len,
                },
            );
        }
        let s = &mut self.table[slot];
        if let Err(v) = s.rx.receive(len) {
            return self.fault(slot, v);
        }
        let discard = s.discard;
        if discard {
            s.rx.take(len);
            self.owe_credit(slot);
        }
        if discard || len == 0 {
            return Disposition::Consume;
        }
        Disposition::Deliver {
            stream: self.table.id(slot),
            len,
        }
    }

    /// Queues a credit update if the peer should get one. This is the only effect of receiving and taking on what
    /// `settle` maintains.
    pub(crate) fn owe_credit(&mut self, slot: u32) {
        let is_engine = self.cfg.tells_reason;
        let s = &mut self.table[slot];
        // Linux since January 2026 ("vsock/virtio: cap TX credit to local buffer size", also in its stable versions) has no
        // more in flight than its own buffer has room for, however long our window is, and never asks for credit. An update
        // that is due by the whole window would never be due: both sides would wait for ever.
        let usable = match is_engine {
            true => u32::MAX,
            false => s.tx.peer_buffer(),
        };
        // After its SHUTDOWN the peer sends nothing that needs credit.
        let owes = s.owed & owe::CREDIT_UPDATE != 0;
        let hears = s.phase == Phase::Open && s.peer_shut & SHUTDOWN_SEND == 0;
        if hears && !owes && s.rx.update_due(usable) {
            s.owed |= owe::CREDIT_UPDATE;
            self.settle(slot);
        }
    }

    /// The flags of all SHUTDOWN packets of a stream are combined.
    fn on_shutdown(&mut self, slot: u32, flags: u32) {
        let s = &mut self.table[slot];
        let news = flags & !s.peer_shut;
        // The previous version of the engine sends both flags when it ends after us. On the ring carrier nothing else
        // does.
        let adds_up = self.cfg.tells_reason && s.sent_shut & SHUTDOWN_SEND != 0;
        let at_once = flags == BOTH && news & SHUTDOWN_SEND != 0 && !adds_up;
        s.peer_shut |= flags;
        if at_once && s.phase == Phase::Open {
            s.offered = 0;
            s.events |= event::HUNG_UP;
            return self.drain(slot, Some(ResetReason::HungUp), true);
        }
        if news & SHUTDOWN_RCV != 0 {
            s.offered = 0;
            s.events |= event::PEER_RCV;
        }
        if news & SHUTDOWN_SEND != 0 {
            s.events |= event::PEER_SEND;
        }
        if s.peer_shut != BOTH {
            return;
        }
        match s.phase {
            // The peer hung up before the caller answered.
            Phase::Offered => self.end(slot, Some(ResetReason::Peer), true),
            _ => self.drain(slot, None, true),
        }
    }

    /// Handles every deadline up to `now`.
    pub fn handle_timeout(&mut self, now: Tick) {
        self.advance_to(now);
        while let Some((at, slot)) = self.timers.first() {
            if at > self.now.0 {
                return;
            }
            self.on_deadline(slot);
        }
    }

    fn on_deadline(&mut self, slot: u32) {
        let now = self.now.0;
        let s = &mut self.table[slot];
        if s.deadline <= now {
            return match s.phase {
                // Both sides have ended their sending, and only the peer's RST is missing.
                Phase::Open if s.finished() && s.peer_shut & SHUTDOWN_SEND != 0 => {
                    self.drain(slot, None, true)
                }
                _ => self.end(slot, Some(ResetReason::Timeout), true),
            };
        }
        s.owed |= owe::CREDIT_REQUEST;
        s.probe_after = s.probe_after.saturating_mul(2).min(PROBE_MAX_NS);
        s.probe_at = now.saturating_add(s.probe_after);
        self.settle(slot);
    }

    /// A session began or ended. Every stream of the old session ends. Resets for the peer are kept until it is known
    /// whether its driver is still the same.
    pub fn handle_session(&mut self, now: Tick, change: SessionChange) {
        self.advance_to(now);
        // `keeps`: the peer still has, or may still have, the streams of the earlier session.
        let (reason, keeps) = match change {
            SessionChange::Attached { .. } | SessionChange::Restored { .. } => {
                (ResetReason::Epoch, false)
            }
            SessionChange::Continued { .. } => (ResetReason::Epoch, true),
            SessionChange::Lost(reason) => (reason, true),
        };
        self.attached = !matches!(change, SessionChange::Lost(_));
        self.restored = matches!(change, SessionChange::Restored { .. });
        if !keeps {
            self.rst.clear();
        }
        for slot in 0..self.table.len() {
            match self.table[slot].phase {
                Phase::Free => {}
                Phase::Ended(_) if keeps => {}
                Phase::Ended(_) => self.withdraw_rst(slot),
                // The peer has closed already, and got its answer.
                Phase::Draining(_) if self.table[slot].owed & owe::RST == 0 => {
                    self.end(slot, Some(reason), false);
                }
                _ => self.end(slot, Some(reason), keeps),
            }
        }
    }
}

/// Checks everything that does not depend on the stream.
fn check(h: &PacketHeader) -> Result<Op, Violation> {
    if Kind::parse(h.kind).is_none() {
        return Err(Violation::UnknownKind { kind: h.kind });
    }
    let op = Op::parse(h.op).ok_or(Violation::UnknownOp { op: h.op })?;
    let known = match op {
        Op::Shutdown => BOTH,
        // On the ring carrier the flags of a reset may hold a reason.
        Op::Rst => u32::MAX,
        _ => 0,
    };
    if h.flags & !known != 0 {
        return Err(Violation::BadFlags { flags: h.flags });
    }
    Ok(op)
}
