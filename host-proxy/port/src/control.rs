//! The protocol between `aditd` and a VM's port process: frames over a `SOCK_SEQPACKET` Unix socket, descriptors by SCM_RIGHTS.
//!
//! ```text
//! RUN/vm/NAME/            0700, one directory a VM
//!   vhost.sock            the VMM connects here (vhost-user)
//!   ctl.sock              aditd connects here; a newer connection replaces the older one
//!   ring.sock             a VMM offers a ring here (adit_ringbuf_io::attach)
//!   ivshmem.sock          QEMU's ivshmem-doorbell connects here, and gets a ring
//!
//! aditd                                    port process
//!   connect ───────────────────────────────▶
//!   ◀───────────────────────────────── Features (after connecting, ahead of the first Status; older builds do not)
//!   ◀─────────────────────────── Status (after connecting, and on every change)
//!   Connect{id, to, prefix, greeting} + 1 fd ▶  request, hello
//!   Ask{id} ───────────────────────────────▶  writes to the fd: is the client still there?
//!   Cancel{id} ────────────────────────────▶  gives it up
//!   ◀────────────────── Dialed{id} or DialFailed{id, ..}
//!                                             Dialed: the fd is the tunnel from now on, and outlives aditd
//!
//!   Dial{id, to} ──────────────────────────▶  the same in three frames, for and from builds without Connect
//!   ◀────────────────── Dialed{id} or DialFailed{id, ..}
//!   Attach{id, prefix} + 1 fd ─────────────▶
//!
//!   ConnectAs{connect, tag} + 1 fd ────────▶  as Connect; the tunnel is known by its tag, also to the next aditd
//!   ListTunnels{after} ────────────────────▶
//!   ◀────────────────────────────── Tunnels   a page of those with a tag
//!   EndTunnels{numbers} ───────────────────▶  they are broken off
//!
//!   ConnectLimited{noted, limits} + 1 fd ──▶  as ConnectNoted; so many bytes a second go through, also without aditd
//!   SetLimits{tunnels} ────────────────────▶  other limits, for tunnels with a tag
//!
//!   ConnectNoted{connect, tag, note} + 1 fd ▶  as ConnectAs; when the tunnel ends, its note comes back
//!   ◀──────────────────────────── Ends{seq}   those that have ended since; also those of an aditd before
//!   EndsTaken{seq} ────────────────────────▶  and then the next ones
//!
//!   Key{key} ──────────────────────────────▶  its hellos carry the MAC of this key from now on
//!
//!   Accepted{port, guest_port} + 1 fd ─────▶  the guest dialled, and the host's kernel gave its stream to aditd
//!   BegunAnew{port, guest_port} ───────────▶  streams that are older than this one end
//!   ◀──────────────────────── Incoming{port} + 1 fd     (the guest dialled a port that aditd serves)
//!   ◀─────────────────────────── Ring (after connecting, and on every change)
//!   ◀─────────────────────────── Way (the same, with `--auto`; ahead of what the guest dials by it)
//!
//!   ◀──────────────── Handover{seq, record} + all its descriptors   (after connecting, and whenever the frontend changed them)
//!   Kept{seq} ─────────────────────────────▶  the frontend gets its answer
//!   Release ───────────────────────────────▶  it ends, and leaves the frontend to its successor
//!   ◀──────────────────────────────── Stuck (no successor can serve the VMM that is connected)
//!   ◀───────────────────────────────── Held (after the first Status: this end is the VM's VMM itself)
//!
//! aditd ── Handover, unchanged, on the standard input ──▶ the next port process
//! ```
//! One packet holds one frame: `adit_channel::frame` header (kind, version 1), then postcard. Both sides are adit's, and of the
//! same build or of neighbouring ones: an unknown kind is an error unless the frame has the `IGNORABLE` flag.

pub(crate) mod message;
mod refusal;

use adit_channel::hello::Extensions;
use adit_names::{ServiceName, VmId};
use serde::{Deserialize, Serialize};

pub use message::ControlKind;

/// Longest control packet, bytes.
pub const PACKET_MAX: usize = 64 << 10;
/// Most bytes that `Connect` and `Attach` may carry for the guest: they go ahead of those of the descriptor.
pub const PREFIX_MAX: usize = 32 << 10;
/// Most bytes that `Connect` and `Ask` may carry for the client.
pub const GREETING_MAX: usize = 1024;
/// Bit of [`Features`]: the port process knows `Connect` and `Ask`.
pub const FEATURE_CONNECT: u64 = 1;
/// Bit of [`Features`]: the port process knows `ConnectAs`, `ListTunnels` and `EndTunnels`.
pub const FEATURE_TUNNELS: u64 = 2;
/// Bit of [`Features`]: the port process knows `ConnectNoted` and `EndsTaken`, and says `Ends`.
pub const FEATURE_ENDS: u64 = 4;
/// Bit of [`Features`]: the port process knows `ConnectLimited` and `SetLimits`.
pub const FEATURE_LIMITS: u64 = 8;
/// Most limits of a tunnel.
pub const LIMITS_MAX: usize = 4;
/// Most tunnels of a `SetLimits`: with as many limits as they may have, it fits a packet.
pub const LIMITED_MAX: usize = 512;
/// Bit of [`Features`]: the port process knows `Key`.
pub const FEATURE_KEY: u64 = 16;
/// Bit of [`Features`]: the host's kernel carries the VM's streams, and the port process takes [`Accepted`] and [`BegunAnew`].
pub const FEATURE_ACCEPTED: u64 = 32;
/// Most bytes of a tunnel's note.
pub const NOTE_MAX: usize = 1024;
/// Most tunnels of an [`Ends`].
pub const ENDS_MAX: usize = 256;
/// Most bytes of the notes of an [`Ends`].
pub const NOTES_MAX: usize = 32 << 10;
/// Most bytes of a tunnel's tag.
pub const TAG_MAX: usize = 1024;
/// Most tunnels of an `EndTunnels`, and of a page.
pub const TUNNELS_MAX: usize = 1024;
/// Most bytes of the tags of a page.
pub const TAGS_MAX: usize = 32 << 10;
/// Most dials of one port process that are in flight or not attached yet. Each may hold a descriptor.
pub const DIALS_MAX: usize = 1024;
/// Most descriptors of one `Handover`: the live table, and those of
/// `adit_channel::vhost_user::Handover`.
pub const HANDOVER_FDS_MAX: usize = 44;
/// Descriptors of a ring in a `Handover`, after all others: QEMU's connection, the memory, the doorbells (data and space
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
/// Name of a VMM's own socket in the VM's directory, where the port process looks for one by itself (`--auto`). What the guest dials
/// arrives beside it.
pub const HYBRID_SOCKET: &str = "v.sock";
/// Where that is.
pub const HYBRID_HOST_SOCKET: &str = "v.sock_741";
/// Name of the lock in the VM's directory: whoever serves the VM holds it.
pub const LOCK: &str = "lock";
/// Name of the note in the VM's directory that says which VMM is connected.
pub const VMM_NOTE: &str = "vmm";
/// `peer_port` of an [`Incoming`] that arrived over a ring. It needs no check: only root in the guest can use the ring's device.
pub const RING_PEER_PORT: u32 = 0;

/// The destination of a dial inside the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// A service of the agent: hello on the agent's port.
    Service(ServiceName),
    /// A plain AF_VSOCK listener. The guest may have no agent, so there is no hello.
    VsockPort(u32),
}

/// Opens a stream to the guest. Answered by exactly one `Dialed` or `DialFailed`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dial {
    /// Chosen by aditd, unique on this connection.
    pub id: u64,
    /// The destination.
    pub to: Target,
    /// Limit for request, response and hello together.
    pub deadline_ms: u32,
}

/// Opens a stream to the guest for the descriptor in this packet (a stream socket), which is the stream's other end once it is
/// open. Answered by exactly one `Dialed` or `DialFailed`, if it is not cancelled.
///
/// `aditd` keeps a duplicate until it has the answer. With `Dialed` the descriptor belongs to the tunnel. With `DialFailed`, or
/// if the connection ends before either, nothing was written to it except what `Ask` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connect {
    /// Chosen by aditd, unique on this connection.
    pub id: u64,
    /// The destination.
    pub to: Target,
    /// Limit for request, response and hello together.
    pub deadline_ms: u32,
    /// What the hello of a service says beside its name.
    pub extensions: Extensions,
    /// Bytes for the guest that aditd had already read from the client; at most [`PREFIX_MAX`].
    pub prefix: Vec<u8>,
    /// Bytes for the client ahead of the guest's; at most [`GREETING_MAX`].
    pub greeting: Vec<u8>,
}

/// As [`Connect`], for a tunnel that is to be found again. What the tag says is `aditd`'s own matter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectAs {
    /// The question.
    pub connect: Connect,
    /// At most [`TAG_MAX`] bytes.
    pub tag: Vec<u8>,
}

/// Asks for the tunnels with a tag: those with higher numbers than this one, in their order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListTunnels {
    /// 0 for the first page.
    pub after: u64,
}

/// Answers [`ListTunnels`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tunnels {
    /// As it was asked.
    pub after: u64,
    /// Number and tag of each. A port process never uses a number twice.
    pub tunnels: Vec<(u64, Vec<u8>)>,
    /// There are no more.
    pub last: bool,
}

/// Breaks tunnels off. Those that have ended meanwhile are left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndTunnels {
    /// Their numbers; at most [`TUNNELS_MAX`].
    pub numbers: Vec<u64>,
}

/// As [`Connect`], for a tunnel whose end is to be told, by whichever `aditd` is there then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectNoted {
    /// The question.
    pub connect: Connect,
    /// As that of [`ConnectAs`], if it has one.
    pub tag: Option<Vec<u8>>,
    /// At most [`NOTE_MAX`] bytes, which are `aditd`'s own matter.
    pub note: Vec<u8>,
}

/// Name of a rate that tunnels of one VM share. What it says is `aditd`'s own matter.
pub type LimitKey = [u8; 16];

/// How many bytes a second may go through, in each direction: of all tunnels with this key together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Which tunnels.
    pub key: LimitKey,
    /// Bytes a second; the one that is said last counts for all of them.
    pub bytes_per_s: u64,
}

/// As [`ConnectNoted`], for a tunnel that is limited.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectLimited {
    /// The question.
    pub connect: Connect,
    /// As that of [`ConnectAs`], if it has one.
    pub tag: Option<Vec<u8>>,
    /// As that of [`ConnectNoted`], if it has one.
    pub note: Option<Vec<u8>>,
    /// At most [`LIMITS_MAX`]. All of them hold.
    pub limits: Vec<Limit>,
}

/// Replaces the limits of tunnels. Those that have ended meanwhile are left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetLimits {
    /// Their numbers, and the limits of each: at most [`LIMITED_MAX`] tunnels with at most [`LIMITS_MAX`] limits each.
    pub tunnels: Vec<(u64, Vec<Limit>)>,
}

/// The guest has dialled a port of the host whose kernel carries its streams: the descriptor in this packet (an AF_VSOCK socket,
/// nonblocking). It comes back as an [`Incoming`], as what guests dial elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// The host's port.
    pub port: u32,
    /// The guest's, as the guest's kernel says.
    pub guest_port: u32,
}

/// With this stream, which came as an [`Accepted`], the guest has begun anew: it was reset, or restored from a snapshot, and its kernel
/// told nobody. The port process ends all streams that are older.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BegunAnew {
    /// The host's port.
    pub port: u32,
    /// The guest's.
    pub guest_port: u32,
}

/// The key of hellos from now on: each carries its MAC (`adit_channel::hello::HostKey`). None: they carry none.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// For the guest that has dialled last.
    pub key: Option<[u8; 32]>,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key")
    }
}

/// Tunnels with a note that have ended: at most [`ENDS_MAX`], and [`NOTES_MAX`] bytes of notes. The next ones come when these are
/// taken. The connection may end before that is heard, and then the next one has them again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ends {
    /// Of this frame; a port process never uses one twice for other tunnels.
    pub seq: u64,
    /// In the order in which they ended.
    pub ends: Vec<TunnelEnd>,
    /// So many more have ended for which there was no room.
    pub lost: u64,
}

/// A tunnel that has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelEnd {
    /// As it came.
    pub note: Vec<u8>,
    /// Bytes to the guest.
    pub to_guest: u64,
    /// Bytes from the guest.
    pub from_guest: u64,
    /// From the question to its end.
    pub lasted_us: u64,
    /// From the question until the stream was open.
    pub dial_us: Option<u64>,
    /// From the question until the guest's first byte; none: there was none.
    pub first_byte_us: Option<u64>,
    /// It did not end in order.
    pub broken_off: bool,
}

/// What this [`Ends`] said is noted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndsTaken {
    /// Its number.
    pub seq: u64,
}

/// Has these bytes written to the client of a `Connect` that is not answered. A client that is there skips them; the kernel of
/// one that is gone answers with a reset. Only the port process knows that it has not greeted the client yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// The dial.
    pub id: u64,
    /// The bytes; at most [`GREETING_MAX`].
    pub text: Vec<u8>,
}

/// What this port process knows beyond the frames that every build knows. It comes ahead of the first `Status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    /// `FEATURE_*`. Unknown bits mean nothing.
    pub bits: u64,
}

/// Makes the descriptor in this packet (a stream socket) the other end of a dialled stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// A dial that was answered by `Dialed`.
    pub id: u64,
    /// Bytes for the guest that aditd had already read from the client; at most [`PREFIX_MAX`].
    pub prefix: Vec<u8>,
}

/// Abandons a dial, answered or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cancel {
    /// The dial.
    pub id: u64,
}

/// Ends the port process: the VM is removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quit {}

/// The port process, and the state of its VM's channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The VM's name as given at start.
    pub vm: VmId,
    /// The VM's CID as given at start.
    pub cid: u64,
    /// Process id.
    pub pid: u32,
    /// A VMM is connected and the guest's driver runs. False while the VM is paused; its streams are then held.
    pub session: bool,
    /// Counts sessions: it changes whenever all streams ended.
    pub epoch: u64,
    /// Open streams.
    pub streams: u32,
    /// Payload bytes since start: to the guest, from the guest.
    pub bytes: (u64, u64),
    /// Transport faults (`TEAR`) since start.
    pub faults: u64,
    /// The last fault, for people; empty if none.
    pub last_fault: String,
}

/// The dial reached a listener that accepted (and, for a service, said accept). After `Dial`, attach a descriptor to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dialed {
    /// The dial.
    pub id: u64,
    /// The agent's boot nonce; zeros for a plain port.
    pub boot_nonce: [u8; 16],
}

/// Why a dial failed. Each becomes one HTTP status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DialError {
    /// No VMM connected, or the guest's driver is not up: 503.
    NoSession,
    /// No listener on that vsock port. For a service the agent does not run: 503; for a plain port: 502.
    Refused,
    /// No answer in time: 504.
    Timeout,
    /// The stream ended before the answer: 502.
    Reset,
    /// The answer is not adit's: 502.
    Foreign,
    /// The agent's hello refused: status and errno are in `DialFailed`.
    HelloRefused,
    /// The port process has reached a limit: 503.
    Busy,
}

/// The dial failed; its id is free again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DialFailed {
    /// The dial.
    pub id: u64,
    /// The kind of failure.
    pub error: DialError,
    /// `adit_channel::hello::Status` of a refused hello, else 0.
    pub status: u16,
    /// errno of the guest's own dial, else 0.
    pub errno: u16,
    /// For people.
    pub text: String,
}

/// The guest dialled a port that aditd serves. The descriptor in this packet is the stream (a Unix stream socket that keeps
/// half-close). The hello has not been read from it yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incoming {
    /// The host port that was dialled.
    pub port: u32,
    /// The guest's own port; [`RING_PEER_PORT`] over a ring.
    pub peer_port: u32,
}

/// Everything that another process needs to serve the frontend in place of this one. `aditd` keeps the latest one with its
/// descriptors, and does not interpret it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// Counts from 1 in each process.
    pub seq: u64,
    /// As `adit_channel::vhost_user::Handover`. Empty: no frontend is connected, and the live table is the only descriptor.
    pub record: Vec<u8>,
    /// Descriptors of a ring after the others: none, or [`RING_FDS`]. Frames of version 1 lack this field and have none.
    pub ring: u8,
}

/// A `Handover` of version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HandoverV1 {
    pub(crate) seq: u64,
    pub(crate) record: Vec<u8>,
}

/// `aditd` keeps the state with this number, and no older one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The number.
    pub seq: u64,
}

/// Ends the port process but not the VM's channel: its frontend goes to a successor, and the streams end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {}

/// A VMM is still connected to a process that has ended, and no successor can serve it. The VM has no channel until the VMM
/// connects again, which QEMU does when the VM is power-cycled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stuck {
    /// The reason, for people. Empty: this state is over.
    pub reason: String,
}

/// The process at this end is the VM's VMM. It runs the VM, and removes the VM's entry when the VM ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {}

/// Which carrier new streams to services use, and the state of the VM's ring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ring {
    /// New dials of services use the ring; otherwise they use vsock.
    pub running: bool,
    /// The reason, for people.
    pub why: String,
    /// The kind of memory and how the ring arrived, for people. Empty: there is no ring.
    pub memory: String,
    /// Bytes of the region.
    pub bytes: u64,
    /// Time to read one cache line of the memory on the host, ns, measured when the ring arrived.
    pub line_ns: u32,
    /// How the guest is woken, as `adit_channel::ring::bell::Hears`; 0: it has not said.
    pub hears: u8,
    /// Round trip of 64 bytes to the agent on an open stream, over the ring and over vsock, ns; 0: not measured.
    pub rtt_ns: (u64, u64),
    /// Open streams over the ring.
    pub streams: u32,
}

/// Which way to the guest a port process has chosen (`--auto`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Way {
    /// 0 none yet, 1 a VMM that connects by vhost-user, 2 the host's kernel, 3 the socket of a VMM that has one for each stream. Others mean
    /// none.
    pub way: u8,
    /// The reason, for people.
    pub why: String,
}
