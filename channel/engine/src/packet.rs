//! The header of one packet in the engine: virtio 1.3 §5.10.6 without the CIDs.
//!
//! The channel on which a packet arrives tells whose it is. So the carrier checks and counts CIDs, and the engine
//! knows only ports. `kind`, `op` and `flags` have the values that the peer wrote; [`Op::parse`] and [`Kind::parse`]
//! return the checked types.

/// Packet header without payload. Fields are in host byte order; `src_port` is the sender's port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketHeader {
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Payload bytes that follow the header.
    pub len: u32,
    /// Socket type as written by the sender (1 stream, 2 seqpacket).
    pub kind: u16,
    /// Operation as written by the sender.
    pub op: u16,
    /// Flags of the operation (SHUTDOWN: bit 0 sender receives no more, bit 1 sender sends no more).
    pub flags: u32,
    /// Size of the sender's receive buffer for this stream, in bytes.
    pub buf_alloc: u32,
    /// Free-running count of the bytes that the sender's application has taken.
    pub fwd_cnt: u32,
}

/// Socket type (virtio 1.3 §5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Kind {
    /// Byte stream.
    Stream = 1,
}

impl Kind {
    /// Parses a socket type; `None` for a type that the engine does not support.
    pub fn parse(raw: u16) -> Option<Self> {
        (raw == 1).then_some(Self::Stream)
    }
}

/// Operation (virtio 1.3 §5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Accepts a connection.
    Response = 2,
    /// Ends a connection at once, or refuses one.
    Rst = 3,
    /// Ends one or both directions.
    Shutdown = 4,
    /// Carries payload.
    Rw = 5,
    /// Announces `buf_alloc` and `fwd_cnt`.
    CreditUpdate = 6,
    /// Asks for a `CreditUpdate`.
    CreditRequest = 7,
}

impl Op {
    /// Parses an operation; `None` for a number that virtio does not define.
    pub fn parse(raw: u16) -> Option<Self> {
        Some(match raw {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Rst,
            4 => Self::Shutdown,
            5 => Self::Rw,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// SHUTDOWN flag: the sender will receive no more.
pub const SHUTDOWN_RCV: u32 = 1;
/// SHUTDOWN flag: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
