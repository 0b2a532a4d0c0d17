//! The record of one stream: a few hundred bytes, whatever the peer does. It has no queue. Control packets and events
//! that are owed are bits, so a peer that asks a thousand times gets one answer.

use crate::credit::{RxWindow, TxCredit};
use crate::timers::NEVER;
use crate::{How, Lane, ResetReason, SHUTDOWN_RCV, SHUTDOWN_SEND};

/// The phase of a stream (diagram: `engine`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The slot is free.
    Free,
    /// We sent a request (or owe it), and the peer has not answered.
    Requested,
    /// The peer sent a request, and our caller has not answered.
    Offered,
    /// Open, perhaps in one direction only.
    Open,
    /// Closed on the wire, but the sink still has bytes to take. Then it ends with this reason.
    Draining(Option<ResetReason>),
    /// Ended. `Closed` with this reason may be owed to the caller, and a reset to the peer. After both the slot is
    /// free.
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

/// Events owed to the caller, as bits, in the order in which `poll_event` returns them.
pub(crate) mod event {
    pub(crate) const INCOMING: u8 = 1;
    pub(crate) const CONNECTED: u8 = 2;
    pub(crate) const WRITABLE: u8 = 4;
    pub(crate) const PEER_RCV: u8 = 8;
    pub(crate) const PEER_SEND: u8 = 16;
    pub(crate) const HUNG_UP: u8 = 32;
    pub(crate) const CLOSED: u8 = 64;
}

/// Time in ns that a stream is blocked before it asks the peer for credit. Peers usually send credit updates by
/// themselves, but an older Linux sends none for small packets. The time doubles up to `PROBE_MAX_NS`; any new credit
/// resets it.
pub(crate) const PROBE_FIRST_NS: u64 = 5_000_000;
/// Longest time between two such requests.
pub(crate) const PROBE_MAX_NS: u64 = 1_000_000_000;

/// One stream. The default is a free slot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stream {
    pub(crate) generation: u32,
    pub(crate) phase: Phase,
    pub(crate) lane: Lane,
    pub(crate) local_port: u32,
    pub(crate) peer_port: u32,
    /// The map leads from the port pair to this slot.
    pub(crate) mapped: bool,
    /// The caller knows the stream: `connect` or an event returned its id.
    pub(crate) announced: bool,
    pub(crate) tx: TxCredit,
    pub(crate) rx: RxWindow,
    /// Bytes that the sink has to send (`u32::MAX`: some).
    pub(crate) offered: u32,
    /// Bytes that are left from its last turn.
    pub(crate) deficit: u32,
    /// SHUTDOWN flags: what we want to shut, what we sent to the peer, what the peer sent to us.
    pub(crate) local_shut: u32,
    pub(crate) sent_shut: u32,
    pub(crate) peer_shut: u32,
    /// The caller ended its sending before the other direction, or alone. The peer must get this end in a SHUTDOWN of
    /// its own, because both flags at once look like a process that died.
    pub(crate) orderly: bool,
    /// The caller wants no more bytes: bytes that arrive are taken and dropped.
    pub(crate) discard: bool,
    /// `owe` bits.
    pub(crate) owed: u8,
    /// `event` bits.
    pub(crate) events: u8,
    /// It has bytes to send, but no credit.
    pub(crate) blocked: bool,
    /// Time at which a connect, answer or shutdown ends with `Timeout`.
    pub(crate) deadline: u64,
    /// Time at which a blocked stream asks for credit, and the delay from then to the next request.
    pub(crate) probe_at: u64,
    pub(crate) probe_after: u64,
}

// A stream with its links and timers needs less than 512 bytes, idle or not.
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
        sent_shut: 0,
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

    /// Returns true if the stream is open on the wire, so that packets may change it.
    pub(crate) fn live(&self) -> bool {
        matches!(self.phase, Phase::Requested | Phase::Offered | Phase::Open)
    }

    /// Returns true if bytes may be sent, now or later.
    pub(crate) fn may_send(&self) -> bool {
        self.live() && self.peer_shut & SHUTDOWN_RCV == 0 && self.sent_shut & SHUTDOWN_SEND == 0
    }

    /// Returns the SHUTDOWN flags to send to the peer; 0 if there is nothing new. The end of our sending waits until
    /// everything that was offered is sent (R57). The peer combines the flags of all packets. Both flags in the first
    /// packet mean that the stream did not end in order.
    pub(crate) fn shut_due(&self) -> u32 {
        // Most streams, at most times: nobody has ended anything.
        if self.local_shut | self.peer_shut == 0 || self.phase != Phase::Open {
            return 0;
        }
        let mut want = self.local_shut;
        if self.offered > 0 && self.may_send() {
            want &= !SHUTDOWN_SEND;
        }
        // Both sides have ended their sending, so nothing will be received any more. Send both flags: the peer answers
        // them with the RST that ends the stream.
        if (want | self.sent_shut) & self.peer_shut & SHUTDOWN_SEND != 0 {
            want |= SHUTDOWN_RCV;
        }
        match want & !self.sent_shut {
            0 => 0,
            news if self.orderly && news & SHUTDOWN_SEND != 0 => SHUTDOWN_SEND,
            _ => want | self.sent_shut,
        }
    }

    /// Returns true if both sides have ended: the stream may end in order.
    pub(crate) fn finished(&self) -> bool {
        self.sent_shut == BOTH || (self.sent_shut & self.peer_shut & SHUTDOWN_SEND != 0)
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
