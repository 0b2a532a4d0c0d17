//! Inputs and outputs of the engine, except packets: plain values without behaviour.

use core::fmt;

use crate::PacketHeader;

/// Nanoseconds on a monotonic clock, supplied by the caller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tick(pub u64);

/// Identifies a stream. Ids are not reused, so a stale id is harmless.
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

    /// Returns which of the streams that used this slot is meant.
    pub fn generation(self) -> u32 {
        self.generation
    }
}

/// A violation of the virtio protocol by a peer, with evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// An operation that virtio does not define.
    UnknownOp {
        /// The number in the packet.
        op: u16,
    },
    /// A socket type that the engine does not support.
    UnknownKind {
        /// The number in the packet.
        kind: u16,
    },
    /// The header announces more payload than the packet has.
    LengthMismatch {
        /// Announced bytes.
        header: u32,
        /// Bytes that follow the header.
        body: u32,
    },
    /// More payload than our window has room for.
    CreditExceeded {
        /// Payload bytes of the packet.
        len: u32,
        /// Bytes that the window had room for.
        window: u32,
    },
    /// The peer confirms bytes that were never sent, or takes back an earlier confirmation.
    FwdCntAhead {
        /// The value in the packet.
        fwd_cnt: u32,
        /// Bytes sent on this stream, modulo 2^32.
        tx_cnt: u32,
    },
    /// Flags that this operation does not have.
    BadFlags {
        /// The flags in the packet.
        flags: u32,
    },
    /// An operation that is not allowed in this state of the stream, or without a session.
    Unexpected {
        /// The operation in the packet.
        op: u16,
    },
    /// The reset that answers the packet was not queued: the set is full, or the rate limit is reached.
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
                write!(f, "the peer sent {len} bytes into a window of {window}")
            }
            Self::FwdCntAhead { fwd_cnt, tx_cnt } => {
                write!(
                    f,
                    "fwd_cnt {fwd_cnt} is impossible after {tx_cnt} sent bytes"
                )
            }
            Self::BadFlags { flags } => {
                write!(f, "flags {flags:#x} are not valid for this operation")
            }
            Self::Unexpected { op } => write!(f, "operation {op} is not allowed in this state"),
            Self::RstOverflow => f.write_str("too many packets for streams that do not exist"),
        }
    }
}

/// Why a stream ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetReason {
    /// The peer reset it.
    Peer,
    /// The peer reset it and sent a reason. Only on a carrier with reset reasons.
    Told(PeerReason),
    /// The request was refused: by the peer, or by `Answer::Refuse`.
    Refused,
    /// A deadline passed: connect, answer or shutdown.
    Timeout,
    /// The peer sent more than it had credit for.
    Credit,
    /// The peer broke another rule.
    Protocol(Violation),
    /// A new session began (reboot, restore, clone). No stream of the old one continues.
    Epoch,
    /// The carrier is broken.
    CarrierFault,
    /// Our side reset it.
    Local,
    /// The peer closed both directions at once, without ending its sending first: its process died, or it broke the
    /// stream off. All bytes that it sent have arrived, but whether they are complete is unknown.
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
            Self::HungUp => "the peer closed the stream without ending its sending first",
        })
    }
}

/// The peer's reason for a reset. On the ring carrier the flags of a reset hold one of these numbers. 0 and unknown
/// numbers mean "no reason".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum PeerReason {
    /// The peer refused the request.
    Refused = 1,
    /// A deadline passed at the peer.
    Timeout = 2,
    /// We sent more than the peer gave us credit for.
    Credit = 3,
    /// We broke another rule.
    Protocol = 4,
    /// The peer's application, or the connection that it relays, ended it.
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

    /// The reason that a side sends for its own `ResetReason`. The remaining reasons are never sent.
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
            Self::Timeout => "timed out at the peer",
            Self::Credit => "we sent without credit",
            Self::Protocol => "we broke the protocol",
            Self::Local => "ended there",
        })
    }
}

/// The queue of the carrier that a packet uses, and its priority among streams with data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Goes before bulk, but bulk still gets its share.
    Control,
    /// Everything else.
    Bulk,
}

/// Directions of a stream, seen from the side that shuts them down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Receive no more.
    Receive,
    /// Send no more.
    Send,
    /// Both directions.
    Both,
}

/// The carrier's session began or ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionChange {
    /// A session began. Every open stream ends with `ResetReason::Epoch`.
    Attached {
        /// Number of the session, for the caller's records. The engine treats every attach as new.
        epoch: u64,
    },
    /// Like `Attached`, but the driver still has streams of an earlier session. Each of them that this engine knew
    /// gets a reset, before anything else is sent.
    Continued {
        /// Number of the session.
        epoch: u64,
    },
    /// Like `Attached`, on the queues of a restored device. Its carrier informs the guest that its streams are gone
    /// (ECONNRESET). Until the guest opens a new stream, packets of old streams get no reset. If a reset came before
    /// that information, a reader in a Linux guest would treat its stream as complete.
    Restored {
        /// Number of the session.
        epoch: u64,
    },
    /// The session ended: every open stream ends with this reason. The resets for the peer are kept, in case its
    /// driver is still the same later: see `Continued`.
    Lost(ResetReason),
}

/// What to do with the body of the packet that was just handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Disposition {
    /// Nothing to deliver: drop the packet.
    Consume,
    /// Move `len` bytes to the stream's sink, or hold them: they are within its window. Bytes after `len` are padding.
    Deliver {
        /// The stream of the bytes.
        stream: StreamId,
        /// Number of bytes, at least 1.
        len: u32,
    },
    /// Drop the packet and count it; the channel continues.
    Ignore(Violation),
    /// End the whole channel. A violation on one stream ends only that stream, so the engine never returns this. A
    /// shell uses it for faults of the carrier.
    Tear(Violation),
}

/// Something that happened to a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The peer requests `local_port`, on which the engine listens. Call `answer`.
    Incoming {
        /// The new stream.
        stream: StreamId,
        /// The requested port.
        local_port: u32,
        /// The peer's own port.
        peer_port: u32,
    },
    /// The peer accepted the request of `connect`.
    Connected {
        /// The stream that `connect` returned.
        stream: StreamId,
    },
    /// A stream that had offered bytes without credit has credit again (advisory).
    Writable {
        /// The stream.
        stream: StreamId,
    },
    /// The peer will send no more (Send), receive no more (Receive), or both. With Receive, offered bytes that were
    /// not sent yet are never sent.
    PeerShutdown {
        /// The stream.
        stream: StreamId,
        /// The directions that are newly shut.
        how: How,
    },
    /// The peer closed both directions at once, without ending its sending first. A program that simply closes its
    /// socket causes this, and so does a program that was killed. `Closed` with `HungUp` follows when the delivered
    /// bytes are consumed.
    HungUp {
        /// The stream.
        stream: StreamId,
    },
    /// The stream is gone; its id is stale from now on. `None`: both directions ended in order, and every delivered
    /// byte has been `consumed`.
    Closed {
        /// The stream.
        stream: StreamId,
        /// The reason, if it did not end in order.
        reason: Option<ResetReason>,
    },
}

/// Answer to `Event::Incoming`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The stream is open from now on.
    Accept,
    /// The peer gets a reset, and the caller gets `Closed` with `Refused`.
    Refuse,
}

/// A packet to send. With `body`, read up to `len` bytes from the stream's sink into the slot, then call `commit_body`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// The header. It is final if there is no body; otherwise `commit_body` returns the final one.
    pub header: PacketHeader,
    /// Lane of the carrier.
    pub lane: Lane,
    /// The stream whose bytes go into the slot, and their maximum number.
    pub body: Option<(StreamId, u32)>,
}

/// Why `listen` failed. The caller's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenError {
    /// The engine listens on too many ports.
    TableFull {
        /// The maximum number.
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

/// Why `connect` failed: a resource or the peer is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectError {
    /// There are too many streams.
    TableFull {
        /// The maximum number.
        max: u32,
    },
    /// The credit pool cannot lend even the smallest window.
    NoCredit,
    /// No ephemeral port is free.
    NoPort,
    /// No session: the peer is not attached.
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

/// A change of a port pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PairChange {
    /// A stream uses the pair from now on.
    Opened {
        /// Our port.
        local_port: u32,
        /// The peer's port.
        peer_port: u32,
    },
    /// No stream uses the pair any more, and no reset is owed to it.
    Closed {
        /// Our port.
        local_port: u32,
        /// The peer's port.
        peer_port: u32,
    },
}
