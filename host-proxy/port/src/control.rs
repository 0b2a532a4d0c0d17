//! How `aditd` and a VM's port process speak: frames over a `SOCK_SEQPACKET` Unix socket, descriptors by SCM_RIGHTS.
//!
//! ```text
//! RUN/vm/NAME/            0700, one directory a VM
//!   vhost.sock            the VMM connects here (vhost-user)
//!   ctl.sock              aditd connects here; a newer connection replaces the older one
//!   ring.sock             a VMM hands a ring over here (adit_ringbuf_io::attach)
//!   ivshmem.sock          QEMU's ivshmem-doorbell connects here, and is given a ring
//!
//! aditd                                    port process
//!   connect ───────────────────────────────▶
//!   ◀─────────────────────────── Status (at once, and whenever it changes)
//!   Dial{id, to} ──────────────────────────▶  request, hello
//!   ◀────────────────── Dialed{id} or DialFailed{id, ..}
//!   Attach{id, prefix} + 1 fd ─────────────▶  the fd is the tunnel from now on, and outlives aditd
//!   ◀──────────────────────── Incoming{port} + 1 fd     (guest dialled a port that aditd serves)
//!   ◀─────────────────────────── Ring (at once, and whenever it changes)
//!
//!   ◀──────────────── Handover{seq, record} + all its descriptors   (at once, and whenever the frontend changed them)
//!   Kept{seq} ─────────────────────────────▶  the frontend gets its answer
//!   Release ───────────────────────────────▶  it ends, and leaves the frontend to the next one
//!   ◀──────────────────────────────── Stuck (no successor can go on with the VMM)
//!   ◀───────────────────────────────── Held (behind the first Status: this end is the VM's VMM itself)
//!
//! aditd ── Handover, as it was, on the standard input ──▶ the next port process
//! ```
//! One packet holds one frame: `adit_channel::frame` header (kind, version 1), then postcard. Both sides are ours and
//! of one build or the next: unknown kinds are errors except with the frame's `IGNORABLE` flag.

use adit_channel::name::ServiceName;
use serde::{Deserialize, Serialize};

/// Most bytes of one control packet.
pub const PACKET_MAX: usize = 64 << 10;
/// Most bytes that `Attach` may carry ahead of the tunnel's own.
pub const PREFIX_MAX: usize = 32 << 10;
/// Dials that one port process has in flight or unattached at a time.
pub const DIALS_MAX: usize = 1024;
/// Descriptors that come with one `Handover` at most: the live table, and those of
/// `adit_channel::vhost_user::Handover`.
pub const HANDOVER_FDS_MAX: usize = 44;
/// Descriptors of a ring in a `Handover`, behind all others: QEMU's connection, the memory, the doorbells (data and space
/// of the guest, data and space of the host).
pub const RING_FDS: usize = 6;
/// Name of the control socket in the VM's directory.
pub const CONTROL_SOCKET: &str = "ctl.sock";
/// Name of the vhost-user socket in the VM's directory.
pub const VHOST_SOCKET: &str = "vhost.sock";
/// Name of the attach socket in the VM's directory.
pub const RING_SOCKET: &str = "ring.sock";
/// Name of the ivshmem socket in the VM's directory.
pub const IVSHMEM_SOCKET: &str = "ivshmem.sock";
/// Name of the lock in the VM's directory: whoever serves the VM holds it.
pub const LOCK: &str = "lock";
/// Name of the note in the VM's directory that says which VMM is connected.
pub const VMM_NOTE: &str = "vmm";
/// `peer_port` of an [`Incoming`] that came over a ring: whoever is at its other end owns the device, which takes root.
pub const RING_PEER_PORT: u32 = 0;

/// Frame kinds. The number is wire format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
#[allow(missing_docs)]
pub enum ControlKind {
    Dial = 1,
    Attach = 2,
    Cancel = 3,
    Quit = 4,
    Kept = 5,
    Release = 6,
    Status = 16,
    Dialed = 17,
    DialFailed = 18,
    Incoming = 19,
    Handover = 20,
    Stuck = 21,
    Ring = 22,
    Held = 23,
}

/// Where a dial goes inside the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// A service of the agent: hello on the well-known port.
    Service(ServiceName),
    /// A plain AF_VSOCK listener of a guest that may have no agent: no hello.
    VsockPort(u32),
}

/// Opens a stream to the guest. Answered by exactly one `Dialed` or `DialFailed`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dial {
    /// Chosen by aditd, unique on this connection.
    pub id: u64,
    /// Where to.
    pub to: Target,
    /// For request, response and hello together.
    pub deadline_ms: u32,
}

/// Makes the descriptor that comes with it (a stream socket) the other end of a dialled stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// A dial that was answered by `Dialed`.
    pub id: u64,
    /// Bytes for the guest that aditd had read from the client already; at most [`PREFIX_MAX`].
    pub prefix: Vec<u8>,
}

/// Gives up a dial, answered or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cancel {
    /// Which.
    pub id: u64,
}

/// Ends the port process: the VM is removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quit {}

/// What the port process is and how its VM's channel stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The VM's name as given at start.
    pub vm: String,
    /// The VM's CID as given at start.
    pub cid: u64,
    /// Process id.
    pub pid: u32,
    /// A VMM is connected and the guest's driver runs. Not while the VM is paused, whose streams are held.
    pub session: bool,
    /// Counts sessions: changes whenever every stream ended.
    pub epoch: u64,
    /// Streams open now.
    pub streams: u32,
    /// Payload bytes since start: to the guest, from the guest.
    pub bytes: (u64, u64),
    /// Transport faults (`TEAR`) since start.
    pub faults: u64,
    /// The last fault, for people; empty if none.
    pub last_fault: String,
}

/// The dial reached a listener that accepted (and, for a service, said accept). Attach a descriptor to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dialed {
    /// Which dial.
    pub id: u64,
    /// The agent's boot nonce; zeros for a plain port.
    pub boot_nonce: [u8; 16],
}

/// Why a dial failed. Each becomes one HTTP status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DialError {
    /// No VMM connected, or the guest's driver is not up: 503.
    NoSession,
    /// Nobody listens on that vsock port: for a service, the agent does not run: 503; for a plain port 502.
    Refused,
    /// No answer in time: 504.
    Timeout,
    /// The stream ended before the answer: 502.
    Reset,
    /// Something else than adit answered: 502.
    Foreign,
    /// The agent's hello said no: status and errno are in `DialFailed`.
    HelloRefused,
    /// A limit of the port process is reached: 503.
    Busy,
}

/// The dial failed; its id is free again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DialFailed {
    /// Which dial.
    pub id: u64,
    /// The class.
    pub error: DialError,
    /// `adit_channel::hello::Status` of a refused hello, else 0.
    pub status: u16,
    /// errno of the guest's own dial, else 0.
    pub errno: u16,
    /// For people.
    pub text: String,
}

/// The guest dialled a port that aditd serves; the descriptor that comes with it is the stream (a Unix stream socket,
/// half-close kept). The hello is still to be read from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incoming {
    /// The host port that was dialled.
    pub port: u32,
    /// The guest's own port; [`RING_PEER_PORT`] over a ring.
    pub peer_port: u32,
}

/// Everything that another process needs to go on with the frontend in place of this one. `aditd` keeps the last one, with
/// its descriptors, and understands none of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// Counts from 1 in each process.
    pub seq: u64,
    /// As `adit_channel::vhost_user::Handover`; empty: no frontend is connected, and the live table comes alone.
    pub record: Vec<u8>,
    /// A ring's descriptors behind the others: none, or [`RING_FDS`]. Frames of version 1 lack this field and have none.
    pub ring: u8,
}

/// A `Handover` of version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HandoverV1 {
    pub(crate) seq: u64,
    pub(crate) record: Vec<u8>,
}

/// `aditd` has it, and the one before no more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Which.
    pub seq: u64,
}

/// Ends the port process, and leaves its frontend to a successor: streams end, the VM's channel does not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {}

/// A VMM is connected to a process that is no more, and nobody can go on in its place: it has no channel until it connects
/// anew, which QEMU does when the VM is power-cycled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stuck {
    /// Why, for people; empty: no longer.
    pub reason: String,
}

/// The process at this end is the VM's VMM: it runs the VM, and takes it off the map when the VM ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {}

/// Which carrier a service's dials take, and how the VM's ring stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ring {
    /// New dials of services take the ring; else they take vsock.
    pub running: bool,
    /// Why, for people.
    pub why: String,
    /// What its memory is and how it came, for people; empty: there is no ring.
    pub memory: String,
    /// Bytes of the region.
    pub bytes: u64,
    /// What a read of a line of the memory takes on the host, ns, as measured when it came.
    pub line_ns: u32,
    /// How the guest hears us, as `adit_channel::ring::bell::Hears`; 0: it has not said.
    pub hears: u8,
    /// 64 bytes to the agent and back on an open stream, over the ring and over vsock, ns; 0: not measured.
    pub rtt_ns: (u64, u64),
    /// Streams open over it now.
    pub streams: u32,
}
