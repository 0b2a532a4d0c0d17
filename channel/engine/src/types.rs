//! What goes into the engine and comes out of it, except packets: plain values without behaviour.

use core::fmt;

use crate::PacketHeader;

/// Nanoseconds on a monotonic clock, supplied by the caller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tick(pub u64);

/// Names a stream for ever: a stale id is harmless.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StreamId {
    pub(crate) slot: u32,
    pub(crate) generation: u32,
}

impl StreamId {
    /// Returns the index into a dense table of at most `EngineConfig::max_streams` entries.
    pub fn slot(self) -> u32 {
        self.slot
    }

    /// Returns which of the streams that had this slot is meant.
    pub fn generation(self) -> u32 {
        self.generation
    }
}

/// What a peer did that virtio forbids. Carries evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// An operation that virtio does not define.
    UnknownOp {
        /// As sent.
        op: u16,
    },
    /// A socket type that the engine does not speak.
    UnknownKind {
        /// As sent.
        kind: u16,
    },
    /// The header announces more payload than follows it.
    LengthMismatch {
        /// Announced bytes.
        header: u32,
        /// Bytes that follow.
        body: u32,
    },
    /// More payload than our window has room for.
    CreditExceeded {
        /// Payload bytes of the packet.
        len: u32,
        /// Bytes that there was room for.
        window: u32,
    },
    /// The peer says that it took bytes that were never sent, or takes back what it said.
    FwdCntAhead {
        /// As sent.
        fwd_cnt: u32,
        /// Bytes sent on this stream, modulo 2^32.
        tx_cnt: u32,
    },
    /// Flags that mean nothing for this operation.
    BadFlags {
        /// As sent.
        flags: u32,
    },
    /// An operation that this stream (or a session that is not there) cannot take in its state.
    Unexpected {
        /// As sent.
        op: u16,
    },
    /// The reset that the packet asks for was not queued: the set is full or the rate is used up.
    RstOverflow,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::UnknownOp { op } => write!(f, "unknown operation {op}"),
            Self::UnknownKind { kind } => write!(f, "unknown socket type {kind}"),
            Self::LengthMismatch { header, body } => {
                write!(f, "header announces {header} bytes, {body} follow")
            }
            Self::CreditExceeded { len, window } => {
                write!(f, "{len} bytes sent into a window of {window}")
            }
            Self::FwdCntAhead { fwd_cnt, tx_cnt } => {
                write!(f, "fwd_cnt {fwd_cnt} does not fit {tx_cnt} bytes sent")
            }
            Self::BadFlags { flags } => write!(f, "flags {flags:#x} mean nothing here"),
            Self::Unexpected { op } => write!(f, "operation {op} not possible in this state"),
            Self::RstOverflow => f.write_str("too many packets for streams that do not exist"),
        }
    }
}

/// Why a stream ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetReason {
    /// The peer reset it.
    Peer,
    /// The peer reset it, and said why: for a carrier that tells.
    Told(PeerReason),
    /// The request was refused: by the peer, or by `Answer::Refuse`.
    Refused,
    /// A deadline passed: connect, answer or shutdown.
    Timeout,
    /// The peer sent more than it had credit for.
    Credit,
    /// The peer broke another rule.
    Protocol(Violation),
    /// A new session began (reboot, restore, clone): no stream of the old one goes on.
    Epoch,
    /// The carrier is broken.
    CarrierFault,
    /// We reset it.
    Local,
    /// The peer closed both directions at once, without having ended its sending first: its process died, or broke the
    /// stream off. What it sent arrived; whether that was all, nobody said.
    HungUp,
}

impl fmt::Display for ResetReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Peer => "reset by the peer",
            Self::Told(why) => return write!(f, "reset by the peer: {why}"),
            Self::Refused => "refused",
            Self::Timeout => "timed out",
            Self::Credit => "the peer sent without credit",
            Self::Protocol(v) => return write!(f, "the peer broke the protocol: {v}"),
            Self::Epoch => "a new session began",
            Self::CarrierFault => "carrier fault",
            Self::Local => "reset locally",
            Self::HungUp => "the peer hung up without ending its sending first",
        })
    }
}

/// Why the peer reset a stream, as it says itself: a carrier of ours puts a number of these into the flags of a reset. 0,
/// and whatever is not listed, is no reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum PeerReason {
    /// The request was refused.
    Refused = 1,
    /// A deadline passed there.
    Timeout = 2,
    /// We sent more than we had credit for.
    Credit = 3,
    /// We broke another rule.
    Protocol = 4,
    /// Its application, or what it relays to, ended it.
    Local = 5,
}

impl PeerReason {
    /// Parses the flags of a reset.
    pub fn parse(flags: u32) -> Option<Self> {
        Some(match flags {
            1 => Self::Refused,
            2 => Self::Timeout,
            3 => Self::Credit,
            4 => Self::Protocol,
            5 => Self::Local,
            _ => return None,
        })
    }

    /// What a side tells of its own reason; the others are none that a peer can hear of.
    pub fn of(reason: ResetReason) -> Option<Self> {
        Some(match reason {
            ResetReason::Refused => Self::Refused,
            ResetReason::Timeout => Self::Timeout,
            ResetReason::Credit => Self::Credit,
            ResetReason::Protocol(_) => Self::Protocol,
            ResetReason::Local => Self::Local,
            ResetReason::Peer
            | ResetReason::Told(_)
            | ResetReason::Epoch
            | ResetReason::HungUp
            | ResetReason::CarrierFault => return None,
        })
    }
}

impl fmt::Display for PeerReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Refused => "refused",
            Self::Timeout => "timed out there",
            Self::Credit => "we sent without credit",
            Self::Protocol => "we broke the protocol",
            Self::Local => "ended there",
        })
    }
}

/// Which queue of the carrier a packet takes, and who goes first among streams with data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Ahead of bulk, but never so that bulk starves.
    Control,
    /// Everything else.
    Bulk,
}

/// Directions of a stream, from the side of whoever shuts them down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// No more is received.
    Receive,
    /// No more is sent.
    Send,
    /// Neither.
    Both,
}

/// The carrier's session began or ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionChange {
    /// A session began: whatever was open ends with `ResetReason::Epoch`.
    Attached {
        /// Number of the session, for the caller's records; the engine treats every attach as new.
        epoch: u64,
    },
    /// Like `Attached`, but with a driver that still has streams of a session before: each of them that this engine knew
    /// gets a reset, ahead of everything else.
    Continued {
        /// Number of the session.
        epoch: u64,
    },
    /// Like `Attached`, on the queues of a saved device, whose carrier tells the guest that its streams are gone. Until the
    /// guest asks for a new stream, packets of the old ones get no reset: a reset that came before that news would let a
    /// reader in the guest take its stream for complete (Linux), where the news is ECONNRESET.
    Restored {
        /// Number of the session.
        epoch: u64,
    },
    /// The session ended: whatever was open ends with this reason. The resets that the peer would get are kept, in case its
    /// driver lives on: see `Continued`.
    Lost(ResetReason),
}

/// What to do with the body of the packet just handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Disposition {
    /// Nothing to deliver: drop the packet.
    Consume,
    /// Move `len` bytes to the stream's sink (or hold them: they are inside its window). Bytes behind `len` are padding.
    Deliver {
        /// Whose bytes.
        stream: StreamId,
        /// How many, at least 1.
        len: u32,
    },
    /// Dropped, count it; the channel goes on.
    Ignore(Violation),
    /// The whole channel must be torn down. What a peer does wrong on one stream ends that stream only, so the engine
    /// itself never asks for this; it is the word that a shell uses for the carrier's faults.
    Tear(Violation),
}

/// What happened to a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The peer asks for `local_port` (one that `listen` named); `answer` it.
    Incoming {
        /// The new stream.
        stream: StreamId,
        /// The port asked for.
        local_port: u32,
        /// The port that the peer asks from.
        peer_port: u32,
    },
    /// The peer accepted what `connect` asked for.
    Connected {
        /// The stream that `connect` returned.
        stream: StreamId,
    },
    /// Credit came back to a stream that had offered bytes and none to send them with (advisory).
    Writable {
        /// Which stream.
        stream: StreamId,
    },
    /// The peer will send no more (Send), receive no more (Receive), or both. With Receive, bytes that were offered and
    /// not yet sent are never sent.
    PeerShutdown {
        /// Which stream.
        stream: StreamId,
        /// What is newly shut.
        how: How,
    },
    /// The peer closed both directions at once, without having ended its sending first. A program that closes its socket
    /// when it is done does so, and so does the system of one that was killed. `Closed` with `HungUp` follows once what was
    /// delivered is consumed.
    HungUp {
        /// Which stream.
        stream: StreamId,
    },
    /// The stream is gone; its id is stale from now on. `None`: both directions ended in order, and every byte that was
    /// delivered has been `consumed`.
    Closed {
        /// Which stream.
        stream: StreamId,
        /// Why, if not in order.
        reason: Option<ResetReason>,
    },
}

/// Answer to `Event::Incoming`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The stream is open from now on.
    Accept,
    /// The peer gets a reset, the caller a `Closed` with `Refused`.
    Refuse,
}

/// A packet to send. With `body`, read up to `len` bytes from the stream's sink into the slot, then call `commit_body`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// Final, unless there is a body: then `commit_body` returns the final one.
    pub header: PacketHeader,
    /// Lane of the carrier.
    pub lane: Lane,
    /// Whose bytes go into the slot, and at most how many.
    pub body: Option<(StreamId, u32)>,
}

/// Why `listen` failed. The caller's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenError {
    /// Too many ports.
    TableFull {
        /// How many there may be.
        max: u32,
    },
}

impl fmt::Display for ListenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::TableFull { max } = self;
        write!(f, "already listening on {max} ports")
    }
}

impl core::error::Error for ListenError {}

/// Why `connect` failed. A lack of resources, or of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectError {
    /// Too many streams.
    TableFull {
        /// How many there may be.
        max: u32,
    },
    /// The credit pool cannot lend even the smallest window.
    NoCredit,
    /// No ephemeral port is free.
    NoPort,
    /// Nobody is attached.
    NoSession,
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TableFull { max } => write!(f, "already {max} streams"),
            Self::NoCredit => f.write_str("the credit pool is used up"),
            Self::NoPort => f.write_str("no ephemeral port is free"),
            Self::NoSession => f.write_str("no session: the peer is not attached"),
        }
    }
}

impl core::error::Error for ConnectError {}

/// A port pair began or ceased to be a stream's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PairChange {
    /// A stream has it.
    Opened {
        /// Our port.
        local_port: u32,
        /// The peer's port.
        peer_port: u32,
    },
    /// No stream has it any more, and no reset is owed to it.
    Closed {
        /// Our port.
        local_port: u32,
        /// The peer's port.
        peer_port: u32,
    },
}
