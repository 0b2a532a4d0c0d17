//! One stream's record: a few hundred bytes, whatever the peer does. No queue hangs on it: control packets and events
//! that are owed are bits, so a peer that asks a thousand times is answered once.

use crate::credit::{RxWindow, TxCredit};
use crate::timers::NEVER;
use crate::{How, Lane, ResetReason, SHUTDOWN_RCV, SHUTDOWN_SEND};

/// Where a stream is in its life (diagram: `engine`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The slot is free.
    Free,
    /// We asked; the peer has not answered.
    Requested,
    /// The peer asked; our caller has not answered.
    Offered,
    /// Open, perhaps in one direction only.
    Open,
    /// Over on the wire; the sink has bytes left to take. Then it ends with this reason.
    Draining(Option<ResetReason>),
    /// Over. `Closed` with this reason may be owed to the caller, a reset to the peer; then the slot is free.
    Ended(Option<ResetReason>),
}

/// Both directions.
pub(crate) const BOTH: u32 = SHUTDOWN_RCV | SHUTDOWN_SEND;

/// Control packets owed to the peer, as bits.
pub(crate) mod owe {
    pub(crate) const REQUEST: u8 = 1;
    pub(crate) const RESPONSE: u8 = 2;
    pub(crate) const CREDIT_UPDATE: u8 = 4;
    pub(crate) const CREDIT_REQUEST: u8 = 8;
    pub(crate) const SHUTDOWN: u8 = 16;
    pub(crate) const RST: u8 = 32;
}

/// Events owed to the caller, as bits, in the order in which they are told.
pub(crate) mod tell {
    pub(crate) const INCOMING: u8 = 1;
    pub(crate) const CONNECTED: u8 = 2;
    pub(crate) const WRITABLE: u8 = 4;
    pub(crate) const PEER_RCV: u8 = 8;
    pub(crate) const PEER_SEND: u8 = 16;
    pub(crate) const HUNG_UP: u8 = 32;
    pub(crate) const CLOSED: u8 = 64;
}

/// ns that a stream is blocked before it asks the peer for its credit: peers tell by themselves, but an older Linux keeps
/// quiet about small packets it has taken. Doubles up to `PROBE_MAX_NS`; any news starts it over.
pub(crate) const PROBE_FIRST_NS: u64 = 5_000_000;
/// Longest time between two such questions.
pub(crate) const PROBE_MAX_NS: u64 = 1_000_000_000;

/// One stream. The default is a free slot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stream {
    pub(crate) generation: u32,
    pub(crate) phase: Phase,
    pub(crate) lane: Lane,
    pub(crate) local_port: u32,
    pub(crate) peer_port: u32,
    /// The port pair leads to this slot.
    pub(crate) mapped: bool,
    /// The caller knows of it: its id was returned or told.
    pub(crate) announced: bool,
    pub(crate) tx: TxCredit,
    pub(crate) rx: RxWindow,
    /// Bytes that the sink has to send (`u32::MAX`: some).
    pub(crate) offered: u32,
    /// Bytes left over from its last turn.
    pub(crate) deficit: u32,
    /// SHUTDOWN flags: what we want shut, what we told the peer, what the peer told us.
    pub(crate) local_shut: u32,
    pub(crate) told_shut: u32,
    pub(crate) peer_shut: u32,
    /// The caller ended its sending by itself, before or without the other direction: the peer is told so in a packet of
    /// its own, since both at once is how a process that died looks.
    pub(crate) orderly: bool,
    /// The caller wants no more bytes: what comes is taken and dropped.
    pub(crate) discard: bool,
    /// `owe` bits.
    pub(crate) owed: u8,
    /// `tell` bits.
    pub(crate) events: u8,
    /// It has bytes to send and no credit.
    pub(crate) blocked: bool,
    /// When a connect, answer or shutdown ends in `Timeout`.
    pub(crate) deadline: u64,
    /// When a blocked stream asks for credit, and the time after that until it asks again.
    pub(crate) probe_at: u64,
    pub(crate) probe_after: u64,
}

// Fewer than 512 bytes a stream with its links and timers, idle or not.
const _: () = assert!(size_of::<Stream>() <= 320);

impl Stream {
    pub(crate) const FREE: Self = Self {
        generation: 0,
        phase: Phase::Free,
        lane: Lane::Bulk,
        local_port: 0,
        peer_port: 0,
        mapped: false,
        announced: false,
        tx: TxCredit::new(),
        rx: RxWindow::new(0),
        offered: 0,
        deficit: 0,
        local_shut: 0,
        told_shut: 0,
        peer_shut: 0,
        orderly: false,
        discard: false,
        owed: 0,
        events: 0,
        blocked: false,
        deadline: NEVER,
        probe_at: NEVER,
        probe_after: 0,
    };

    /// Returns true if the stream is on the wire: packets may change it.
    pub(crate) fn live(&self) -> bool {
        matches!(self.phase, Phase::Requested | Phase::Offered | Phase::Open)
    }

    /// Returns true if bytes may be sent, now or later.
    pub(crate) fn may_send(&self) -> bool {
        self.live() && self.peer_shut & SHUTDOWN_RCV == 0 && self.told_shut & SHUTDOWN_SEND == 0
    }

    /// Returns the SHUTDOWN flags to tell the peer, 0 if there is no news. "No more is sent" waits until everything that
    /// was offered is sent (R57). Flags of packets add up; both at once say that nothing was ended in order.
    pub(crate) fn shut_due(&self) -> u32 {
        if self.phase != Phase::Open {
            return 0;
        }
        let mut want = self.local_shut;
        if self.offered > 0 && self.may_send() {
            want &= !SHUTDOWN_SEND;
        }
        // Both sides have ended their sending: nothing will be received any more, so say it, for the peer answers the
        // full SHUTDOWN with the RST that ends the stream.
        if (want | self.told_shut) & self.peer_shut & SHUTDOWN_SEND != 0 {
            want |= SHUTDOWN_RCV;
        }
        match want & !self.told_shut {
            0 => 0,
            news if self.orderly && news & SHUTDOWN_SEND != 0 => SHUTDOWN_SEND,
            _ => want | self.told_shut,
        }
    }

    /// Returns true once nothing is owed in either direction: the stream may end in order.
    pub(crate) fn finished(&self) -> bool {
        self.told_shut == BOTH || (self.told_shut & self.peer_shut & SHUTDOWN_SEND != 0)
    }
}

/// Translates directions to SHUTDOWN flags.
pub(crate) fn flags_of(how: How) -> u32 {
    match how {
        How::Receive => SHUTDOWN_RCV,
        How::Send => SHUTDOWN_SEND,
        How::Both => BOTH,
    }
}
