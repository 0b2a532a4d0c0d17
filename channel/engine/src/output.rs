//! `poll_*`: events, packets, the next deadline; and which stream sends next.
//!
//! Order of packets: first the control packets that streams owe (answers, credit, shutdown, reset), then resets for
//! pairs that have no stream, then data. The first two are bounded by the number of open streams, so data always gets
//! its turn.
//!
//! Data: deficit round robin in each lane, one packet per turn. While other streams wait, a turn is worth `quantum`
//! bytes. If a small slot uses less, the rest is kept for the next turn, up to one quantum. A stream that is alone
//! fills its slots. Lane control goes first, but after [`CONTROL_RUN_MAX`] of its packets in a row a waiting bulk
//! packet goes.

use crate::stream::{BOTH, Phase, event, owe};
use crate::table::ListId;
use crate::{
    Engine, Event, How, Kind, Lane, Op, PacketHeader, PeerReason, SHUTDOWN_SEND, StreamId, Tick,
    Transmit,
};

/// Number of data packets of lane control that may go in a row while bulk waits.
pub(crate) const CONTROL_RUN_MAX: u32 = 16;

impl Engine {
    /// Returns the next event.
    #[must_use]
    #[inline] // Most bursts have none.
    pub fn poll_event(&mut self) -> Option<Event> {
        let slot = self.table.first(ListId::Events)?;
        Some(self.take_event(slot))
    }

    /// Takes the next event of a stream that has some.
    fn take_event(&mut self, slot: u32) -> Event {
        let stream = self.table.id(slot);
        let s = &mut self.table[slot];
        let shut = s.events & (event::PEER_RCV | event::PEER_SEND);
        let (delivered, event) = if s.events & event::INCOMING != 0 {
            let (local_port, peer_port) = (s.local_port, s.peer_port);
            s.announced = true;
            self.known += 1;
            (
                event::INCOMING,
                Event::Incoming {
                    stream,
                    local_port,
                    peer_port,
                },
            )
        } else if s.events & event::CONNECTED != 0 {
            (event::CONNECTED, Event::Connected { stream })
        } else if s.events & event::WRITABLE != 0 {
            (event::WRITABLE, Event::Writable { stream })
        } else if shut != 0 {
            let how = match shut {
                event::PEER_RCV => How::Receive,
                event::PEER_SEND => How::Send,
                _ => How::Both,
            };
            (shut, Event::PeerShutdown { stream, how })
        } else if s.events & event::HUNG_UP != 0 {
            (event::HUNG_UP, Event::HungUp { stream })
        } else {
            let reason = match s.phase {
                Phase::Ended(reason) => reason,
                _ => None,
            };
            self.known = self.known.saturating_sub(1);
            self.table.retire_id(slot);
            (event::CLOSED, Event::Closed { stream, reason })
        };
        let s = &mut self.table[slot];
        s.events &= !delivered;
        if s.events == 0 {
            self.table.set(ListId::Events, slot, false);
            self.free_if_done(slot);
        }
        event
    }

    /// Returns true if `poll_transmit` would return a packet for a large enough slot.
    #[must_use]
    pub fn wants_transmit(&self) -> bool {
        [Lane::Control, Lane::Bulk].map(|lane| self.wants_transmit_on(lane)) != [false; 2]
    }

    /// As [`wants_transmit`](Self::wants_transmit), for one lane.
    #[must_use]
    pub fn wants_transmit_on(&self, lane: Lane) -> bool {
        let lists = [ListId::owed(lane), ListId::data(lane)];
        let listed = || lists.iter().any(|&l| !self.table.is_empty(l));
        self.attached && (listed() || !self.rst.is_empty(Some(lane)))
    }

    /// Returns the next packet for a slot with room for `capacity` payload bytes. A packet without a body counts as
    /// sent. A packet with a body is not sent until `commit_body`.
    #[must_use]
    pub fn poll_transmit(&mut self, now: Tick, capacity: u32) -> Option<Transmit> {
        self.poll_transmit_on(now, None, capacity)
    }

    /// As [`poll_transmit`](Self::poll_transmit), for a slot of one lane. `None` means that the carrier has one queue
    /// for both lanes.
    #[must_use]
    pub fn poll_transmit_on(
        &mut self,
        now: Tick,
        lane: Option<Lane>,
        capacity: u32,
    ) -> Option<Transmit> {
        self.advance_to(now);
        if !self.attached {
            return None;
        }
        let lanes = match lane {
            Some(lane) => [lane; 2],
            None => [Lane::Control, Lane::Bulk],
        };
        let owed = |lane| self.table.first(ListId::owed(lane));
        if let Some(slot) = owed(lanes[0]).or_else(|| owed(lanes[1])) {
            return Some(self.pay(slot));
        }
        if let Some(rst) = self.rst.pop(lane) {
            let flags = match self.cfg.tells_reason {
                true => PeerReason::Refused as u32,
                false => 0,
            };
            let header = PacketHeader {
                src_port: rst.local_port,
                dst_port: rst.peer_port,
                kind: rst.kind,
                op: Op::Rst as u16,
                flags,
                ..PacketHeader::default()
            };
            return Some(Transmit {
                header,
                lane: rst.lane,
                body: None,
            });
        }
        let lane = lane.unwrap_or_else(|| self.next_lane());
        let slot = self.table.first(ListId::data(lane))?;
        let s = &self.table[slot];
        let len =
            s.tx.budget(self.cfg.packet_overhead)
                .min(s.offered)
                .min(capacity)
                .min(self.turn(slot));
        if len == 0 {
            return None;
        }
        let header = Self::header(s, Op::Rw, len, 0);
        Some(Transmit {
            header,
            lane,
            body: Some((self.table.id(slot), len)),
        })
    }

    fn next_lane(&self) -> Lane {
        let empty = |lane| self.table.is_empty(ListId::data(lane));
        if empty(Lane::Control) || (self.control_run >= CONTROL_RUN_MAX && !empty(Lane::Bulk)) {
            Lane::Bulk
        } else {
            Lane::Control
        }
    }

    /// Returns the bytes that a stream may send in its turn.
    fn turn(&self, slot: u32) -> u32 {
        let s = &self.table[slot];
        if self.table.has_several(ListId::data(s.lane)) {
            s.deficit.saturating_add(self.cfg.quantum)
        } else {
            u32::MAX
        }
    }

    /// Sends one of the control packets that a stream owes. An RST comes before all others.
    fn pay(&mut self, slot: u32) -> Transmit {
        let shutdown_at = self.after(self.cfg.shutdown_timeout);
        let s = &mut self.table[slot];
        let mut flags = 0;
        let (paid, op) = match s.owed {
            owed if owed & owe::RST != 0 => {
                if self.cfg.tells_reason
                    && let Phase::Ended(Some(why)) | Phase::Draining(Some(why)) = s.phase
                {
                    flags = PeerReason::of(why).map_or(0, |why| why as u32);
                }
                (u8::MAX, Op::Rst)
            }
            owed if owed & owe::REQUEST != 0 => (owe::REQUEST, Op::Request),
            // A response also carries the credit.
            owed if owed & owe::RESPONSE != 0 => (owe::RESPONSE | owe::CREDIT_UPDATE, Op::Response),
            owed if owed & owe::CREDIT_UPDATE != 0 => (owe::CREDIT_UPDATE, Op::CreditUpdate),
            owed if owed & owe::CREDIT_REQUEST != 0 => (owe::CREDIT_REQUEST, Op::CreditRequest),
            _ => {
                flags = s.shut_due();
                s.local_shut |= flags;
                s.sent_shut |= flags;
                if s.sent_shut == BOTH && s.deadline == crate::timers::NEVER {
                    s.deadline = shutdown_at;
                }
                (owe::SHUTDOWN, Op::Shutdown)
            }
        };
        s.owed &= !paid;
        let header = Self::header(s, op, 0, flags);
        s.rx.announce();
        let lane = s.lane;
        if op == Op::Rst {
            self.table.unmap(slot);
        }
        self.settle(slot);
        if self.table.first(ListId::owed(lane)) == Some(slot) {
            self.table.rotate(ListId::owed(lane));
        }
        self.free_if_done(slot);
        Transmit {
            header,
            lane,
            body: None,
        }
    }

    /// Accounts for `n` (1..=len) bytes that were put into the slot, and returns the final header. If `n` would be 0
    /// (the sink has no bytes after all), call `offer(s, 0)` instead and return the slot unused.
    ///
    /// If the stream cannot send any more (the caller did more than `offer` in between), the header is an RST from
    /// port 0 to port 0, which no peer answers.
    pub fn commit_body(&mut self, now: Tick, s: StreamId, n: u32) -> PacketHeader {
        self.advance_to(now);
        let slot = self.table.get(s).filter(|&slot| {
            let s = &self.table[slot];
            s.phase == Phase::Open && s.sent_shut & SHUTDOWN_SEND == 0
        });
        let Some(slot) = slot else {
            return PacketHeader {
                kind: Kind::Stream as u16,
                op: Op::Rst as u16,
                ..PacketHeader::default()
            };
        };
        let turn = self.turn(slot);
        let (quantum, overhead) = (self.cfg.quantum, self.cfg.packet_overhead);
        let s = &mut self.table[slot];
        let header = Self::header(s, Op::Rw, n, 0);
        s.rx.announce();
        s.tx.send(n, overhead);
        if s.offered != u32::MAX {
            s.offered = s.offered.saturating_sub(n);
        }
        s.deficit = if turn == u32::MAX {
            0
        } else {
            turn.saturating_sub(n).min(quantum)
        };
        s.owed &= !owe::CREDIT_UPDATE;
        let lane = s.lane;
        self.control_run = match lane {
            Lane::Control => self.control_run.saturating_add(1),
            Lane::Bulk => 0,
        };
        self.settle(slot);
        if self.table.first(ListId::data(lane)) == Some(slot) {
            self.table.rotate(ListId::data(lane));
        }
        header
    }

    /// Returns the time at which `handle_timeout` must be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Tick> {
        self.timers.first().map(|(at, _)| Tick(at))
    }
}
