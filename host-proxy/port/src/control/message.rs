//! Every kind of control frame in one table: its number, who reads it, how many descriptors it has, and what happens to it in a
//! process of another build that does not know it. [`Message`], its encoding and its decoding are made from the table.
//!
//! A new kind is a line of the table, a type in [`control`](super), and a case in the test of the socket ([`control_io`](crate::control_io)). All kinds have
//! version 1; only a handover with a ring has version 2.

use std::io;

use adit_channel::frame::{self, FrameError, HEADER_LEN, Header, IGNORABLE};

use super::{
    Accepted, Ask, Attach, BegunAnew, Cancel, Connect, ConnectAs, ConnectLimited, ConnectNoted,
    Dial, DialFailed, Dialed, EndTunnels, Ends, EndsTaken, Features, HANDOVER_FDS_MAX, Handover,
    HandoverV1, Held, Incoming, Kept, Key, ListTunnels, PACKET_MAX, Quit, Release, Ring, SetLimits,
    Status, Stuck, Tunnels, Way,
};

/// Version of every control kind.
const VERSION: u16 = 1;
/// Version of a handover with a ring.
const HANDOVER_VERSION: u16 = 2;
/// Flags of a kind that a process of an older build must know.
const NEEDED: u32 = 0;

adit_channel::message_table! {
    version VERSION;
    /// Frame kinds. The numbers are part of the wire format.
    kinds ControlKind;
    /// One control frame, in either direction.
    messages Message;
    /// To the port process.
    Dial = 1, 0..=0, NEEDED;
    /// To the port process, with one descriptor.
    Attach = 2, 1..=1, NEEDED;
    /// To the port process.
    Cancel = 3, 0..=0, NEEDED;
    /// To the port process.
    Quit = 4, 0..=0, NEEDED;
    /// To the port process.
    Kept = 5, 0..=0, NEEDED;
    /// To the port process.
    Release = 6, 0..=0, NEEDED;
    /// To the port process, with one descriptor, if it has [`FEATURE_CONNECT`](super::FEATURE_CONNECT).
    Connect = 7, 1..=1, NEEDED;
    /// To the port process, if it has [`FEATURE_CONNECT`](super::FEATURE_CONNECT).
    Ask = 8, 0..=0, NEEDED;
    /// To the port process, with one descriptor, if it has [`FEATURE_TUNNELS`](super::FEATURE_TUNNELS).
    ConnectAs = 9, 1..=1, NEEDED;
    /// To the port process, if it has [`FEATURE_TUNNELS`](super::FEATURE_TUNNELS).
    ListTunnels = 10, 0..=0, NEEDED;
    /// To the port process, if it has [`FEATURE_TUNNELS`](super::FEATURE_TUNNELS).
    EndTunnels = 11, 0..=0, NEEDED;
    /// To the port process, with one descriptor, if it has [`FEATURE_ENDS`](super::FEATURE_ENDS).
    ConnectNoted = 12, 1..=1, NEEDED;
    /// To the port process, if it has [`FEATURE_ENDS`](super::FEATURE_ENDS).
    EndsTaken = 13, 0..=0, NEEDED;
    /// To the port process, with one descriptor, if it has [`FEATURE_LIMITS`](super::FEATURE_LIMITS).
    ConnectLimited = 14, 1..=1, NEEDED;
    /// To the port process, if it has [`FEATURE_LIMITS`](super::FEATURE_LIMITS).
    SetLimits = 15, 0..=0, NEEDED;
    /// To the port process, if it has [`FEATURE_KEY`](super::FEATURE_KEY).
    Key = 32, 0..=0, NEEDED;
    /// To the port process, with one descriptor, if it has [`FEATURE_ACCEPTED`](super::FEATURE_ACCEPTED).
    Accepted = 33, 1..=1, NEEDED;
    /// To the port process, if it has [`FEATURE_ACCEPTED`](super::FEATURE_ACCEPTED).
    BegunAnew = 34, 0..=0, NEEDED;
    /// To `aditd`.
    Status = 16, 0..=0, NEEDED;
    /// To `aditd`.
    Dialed = 17, 0..=0, NEEDED;
    /// To `aditd`.
    DialFailed = 18, 0..=0, NEEDED;
    /// To `aditd`, with one descriptor.
    Incoming = 19, 1..=1, NEEDED;
    /// To `aditd`, and from it to the next port process, with up to [`HANDOVER_FDS_MAX`] descriptors.
    Handover = 20, 1..=HANDOVER_FDS_MAX, IGNORABLE;
    /// To `aditd`.
    Stuck = 21, 0..=0, IGNORABLE;
    /// To `aditd`.
    Ring = 22, 0..=0, IGNORABLE;
    /// To `aditd`.
    Held = 23, 0..=0, IGNORABLE;
    /// To `aditd`.
    Features = 24, 0..=0, IGNORABLE;
    /// To `aditd`, if it asked.
    Tunnels = 25, 0..=0, NEEDED;
    /// To `aditd`.
    Ends = 26, 0..=0, IGNORABLE;
    /// To `aditd`, from a port process that chooses the way to its guest.
    Way = 27, 0..=0, IGNORABLE;
}

/// Why a packet is not a control frame. The sender's fault, except `Io` and `NoDescriptors`.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket failed. `WouldBlock` counts as a failure here.
    #[error("control socket failed")]
    Io(#[from] io::Error),
    /// The packet is longer than a control packet may be.
    #[error("control packet is longer than {PACKET_MAX} bytes")]
    TooLong,
    /// The packet is shorter than its frame says, or than a header.
    #[error("control packet of {len} bytes is cut off")]
    Cut {
        /// Bytes received.
        len: usize,
    },
    /// Header or body is malformed, or the kind is unknown.
    #[error("control frame is malformed")]
    Frame(#[from] FrameError),
    /// This process had no free descriptor for those in the packet. Not the sender's fault.
    #[error("no descriptors left for those that came with a control packet")]
    NoDescriptors {
        /// The packet's message.
        message: Box<Message>,
    },
    /// Descriptors that the other side passed earlier cannot be closed. Its fault.
    #[error("too many descriptors that the other side passed cannot be closed")]
    Overfull,
    /// The frame came with a number of descriptors that its kind does not have.
    #[error(
        "control frame of kind {kind} came with {found} descriptors, which this kind does not have"
    )]
    Descriptors {
        /// The frame's kind.
        kind: u16,
        /// Number of descriptors.
        found: usize,
    },
}

impl ControlError {
    /// Tells whether there was nothing to receive, or no room to send.
    pub fn would_block(&self) -> bool {
        matches!(self, Self::Io(e) if e.kind() == io::ErrorKind::WouldBlock)
    }
}

impl Message {
    pub(crate) fn check_descriptors(&self, found: usize) -> Result<(), ControlError> {
        if self.descriptors().contains(&found) {
            return Ok(());
        }
        Err(ControlError::Descriptors {
            kind: self.kind() as u16,
            found,
        })
    }

    /// Encodes frame header and body.
    ///
    /// # Errors
    /// The packet would be longer than [`PACKET_MAX`].
    pub fn encode(&self) -> Result<Vec<u8>, ControlError> {
        let kind = self.kind() as u16;
        let bytes = match self {
            // As version 1, which an older aditd understands.
            Self::Handover(m) if m.ring == 0 => {
                let (seq, record) = (m.seq, m.record.clone());
                frame::encode(kind, VERSION, 0, IGNORABLE, &HandoverV1 { seq, record })
            }
            Self::Handover(m) => frame::encode(kind, HANDOVER_VERSION, 0, IGNORABLE, m),
            _ => self.encode_body(0),
        }?;
        if bytes.len() > PACKET_MAX {
            return Err(ControlError::TooLong);
        }
        Ok(bytes)
    }

    /// Decodes one packet. Returns `None` for an unknown kind with `IGNORABLE`.
    ///
    /// # Errors
    /// As [`ControlError`] says.
    pub fn decode(packet: &[u8]) -> Result<Option<Self>, ControlError> {
        let len = packet.len();
        let (head, body) = packet
            .split_first_chunk::<HEADER_LEN>()
            .ok_or(ControlError::Cut { len })?;
        let header = Header::parse(head, (PACKET_MAX - HEADER_LEN) as u32)?;
        let want = header.len as usize;
        if body.len() < want {
            return Err(ControlError::Cut { len });
        }
        if body.len() > want {
            let (kind, extra) = (header.kind, body.len() - want);
            return Err(FrameError::Trailing { kind, extra }.into());
        }
        let is_handover = header.kind == ControlKind::Handover as u16;
        let message = match header.version {
            VERSION if is_handover => {
                let HandoverV1 { seq, record } = header.decode(body)?;
                let ring = 0;
                Some(Self::Handover(Handover { seq, record, ring }))
            }
            HANDOVER_VERSION if is_handover => Some(Self::Handover(header.decode(body)?)),
            VERSION => Self::decode_body(&header, body)?,
            _ => None,
        };
        match message {
            None if header.flags & IGNORABLE == 0 => {
                let (kind, version) = (header.kind, header.version);
                Err(FrameError::Unknown { kind, version }.into())
            }
            message => Ok(message),
        }
    }
}
