//! Commands: what the shell asks for. A stale [`StreamId`] is ignored.

use crate::stream::{BOTH, Phase, Stream, flags_of, owe};
use crate::timers::NEVER;
use crate::{
    Answer, ConnectError, Engine, How, Kind, LISTEN_MAX, Lane, ListenError, ResetReason,
    SHUTDOWN_RCV, StreamId, Tick,
};

impl Engine {
    /// Lets the peer open streams to a port, in this session and all later ones. Listening on a port twice is not an
    /// error.
    ///
    /// # Errors
    /// The engine already listens on [`LISTEN_MAX`] ports.
    pub fn listen(&mut self, port: u32, kind: Kind) -> Result<(), ListenError> {
        let Kind::Stream = kind;
        if let Err(at) = self.listening.binary_search(&port) {
            if self.listening.len() >= LISTEN_MAX as usize {
                return Err(ListenError::TableFull { max: LISTEN_MAX });
            }
            self.listening.insert(at, port);
        }
        Ok(())
    }

    /// Lets the peer open streams to any port. For a host that looks for a service only when the peer asks for its
    /// port.
    pub fn listen_to_all(&mut self) {
        self.listening_to_all = true;
    }

    /// Opens a stream to a port of the peer. `Connected` or `Closed` follows within `connect_timeout`.
    ///
    /// # Errors
    /// There is no session, or a limit is reached.
    pub fn connect(
        &mut self,
        now: Tick,
        peer_port: u32,
        kind: Kind,
        lane: Lane,
    ) -> Result<StreamId, ConnectError> {
        let Kind::Stream = kind;
        self.advance_to(now);
        if !self.attached {
            return Err(ConnectError::NoSession);
        }
        if self.table.left() == 0 {
            return Err(ConnectError::TableFull {
                max: self.cfg.max_streams,
            });
        }
        let (table, listening) = (&self.table, &self.listening);
        let used = |port| table.contains(port, peer_port) || listening.binary_search(&port).is_ok();
        // Each stream and each listener uses at most one port, so one try more always finds a free one.
        let tries = table.used() + listening.len() as u32 + 1;
        let local_port = self
            .ephemeral
            .allocate(tries, used)
            .ok_or(ConnectError::NoPort)?;
        let stream = Stream {
            phase: Phase::Requested,
            lane,
            local_port,
            peer_port,
            announced: true,
            owed: owe::REQUEST,
            ..Stream::FREE
        };
        let slot = self.open(stream).ok_or(ConnectError::NoCredit)?;
        self.known += 1;
        // The pair belongs to a new stream now. A reset still owed to an earlier stream of the pair would end the new
        // one.
        self.rst.cancel(local_port, peer_port);
        Ok(self.table.id(slot))
    }

    /// Answers `Incoming`. A refused stream becomes `Closed` with `Refused`.
    pub fn answer(&mut self, now: Tick, s: StreamId, a: Answer) {
        self.advance_to(now);
        let Some(slot) = self.table.get(s) else {
            return;
        };
        if self.table[slot].phase != Phase::Offered {
            return;
        }
        match a {
            Answer::Refuse => self.end(slot, Some(ResetReason::Refused), true),
            Answer::Accept => {
                let shutdown_at = self.after(self.cfg.shutdown_timeout);
                let s = &mut self.table[slot];
                s.phase = Phase::Open;
                s.owed |= owe::RESPONSE;
                s.deadline = if s.local_shut == BOTH {
                    shutdown_at
                } else {
                    NEVER
                };
                self.settle(slot);
            }
        }
    }

    /// The sink has this many bytes to send (`u32::MAX`: some, but the number is unknown; 0: none). The latest call
    /// replaces earlier ones.
    pub fn offer(&mut self, s: StreamId, readable: u32) {
        let Some(slot) = self.table.get(s) else {
            return;
        };
        let s = &mut self.table[slot];
        if s.offered != readable && s.may_send() {
            s.offered = readable;
            self.settle(slot);
        }
    }

    /// The sink took `n` delivered bytes. This advances fwd_cnt, and may grow the window and send a credit update.
    pub fn consumed(&mut self, now: Tick, s: StreamId, n: u32) {
        self.advance_to(now);
        let Some(slot) = self.table.get(s) else {
            return;
        };
        let s = &mut self.table[slot];
        match s.phase {
            Phase::Open => {
                s.rx.take(n);
                if let Some(by) = s.rx.growth(self.cfg.max_window) {
                    if self.pool.grow(by, self.table.left()) {
                        self.table[slot].rx.grow(by);
                    } else {
                        self.table[slot].rx.postpone_growth();
                    }
                }
                self.owe_credit(slot);
            }
            Phase::Draining(reason) => {
                s.rx.take(n);
                if s.rx.held() == 0 {
                    let rst = s.owed & owe::RST != 0;
                    self.end(slot, reason, rst);
                }
            }
            _ => {}
        }
    }

    /// Ends one direction or both. Send: once everything offered is sent, the peer sees the end. Receive: bytes that
    /// were delivered and not consumed, and bytes that still arrive, are dropped. Both: `shutdown_timeout` starts now.
    /// If the peer had not seen the end of our sending before, it sees that we hung up.
    pub fn shutdown(&mut self, now: Tick, s: StreamId, how: How) {
        self.advance_to(now);
        let Some(slot) = self.table.get(s) else {
            return;
        };
        let shutdown_at = self.after(self.cfg.shutdown_timeout);
        let flags = flags_of(how);
        let s = &mut self.table[slot];
        if flags & SHUTDOWN_RCV != 0 {
            s.discard = true;
            s.rx.take(u32::MAX);
        }
        match s.phase {
            Phase::Requested | Phase::Offered | Phase::Open => {
                let before = s.local_shut;
                s.orderly |= how == How::Send;
                s.local_shut |= flags;
                if s.phase == Phase::Open && before != BOTH && s.local_shut == BOTH {
                    s.deadline = shutdown_at;
                }
                self.settle(slot);
            }
            Phase::Draining(reason) if s.discard => {
                let rst = s.owed & owe::RST != 0;
                self.end(slot, reason, rst);
            }
            Phase::Draining(_) | Phase::Ended(_) | Phase::Free => {}
        }
    }

    /// Ends a stream at once. The peer gets a reset, and the caller gets `Closed` with this reason.
    pub fn reset(&mut self, now: Tick, s: StreamId, why: ResetReason) {
        self.advance_to(now);
        let Some(slot) = self.table.get(s) else {
            return;
        };
        let rst = match self.table[slot].phase {
            Phase::Draining(_) => self.table[slot].owed & owe::RST != 0,
            _ => true,
        };
        self.end(slot, Some(why), rst);
    }
}
