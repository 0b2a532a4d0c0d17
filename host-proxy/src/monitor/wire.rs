//! What the worker and the monitor say to each other: packets of a `SOCK_SEQPACKET` socket, one frame each, with descriptors.
//!
//! ```text
//! worker ── Slot, Reach, Ended, End, Shorten, Gone, Leave, RemoveDir, ForgetOthers, WhoIs, Peer, Discover, Guests (each with an id) ──► monitor
//!        ◄── HasSlot, Reached, NotReached, HasEnded, Is, HasPeer, HasFound, HasGuests, Done, Refused (with the id of what they answer) ──
//!        ── Serving, Status, StopAll, Reread; to the monitor that found it: Listeners, SlotOf (id 0, no answer) ──►
//!        ◄── Welcome or Hello first; then Config, Stop (id 0) ──
//! ```
//! Both are of one build: a worker of another build is replaced when the monitor finds it ([`BUILD`](Serving::build)). The monitor
//! takes every packet as a stranger's, for a client of the proxy may have taken the worker over: a name is a checked [`VmId`], a
//! number is checked before it is used, and no packet has a path.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;

use adit_channel::frame::{FrameError, HEADER_LEN, Header};
use adit_names::VmId;
use adit_passed::{Closer, Passed};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use rustix::net::RecvFlags;
use serde::{Deserialize, Serialize};

/// Longest packet, bytes: a command line or the end of a log, and some.
pub const PACKET_MAX: usize = 32 << 10;
const VERSION: u16 = 1;
const NONE: u32 = 0;
/// Operator's socket, proxy, metrics, and the others, of which one for DNS has two.
const LISTENERS_MAX: usize = 3 + 2 * crate::config::LISTENS_MAX;

/// Asks for the VM's place in the descriptor store: both ends of a socket pair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// The VM.
    pub vm: VmId,
}

/// Asks to forget what is kept for VMs that nobody has asked for since this worker began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForgetOthers {}

/// What a port process is started with, besides its VM's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// As [`VmConfig::cid`](crate::config::VmConfig::cid), and so on.
    pub cid: u64,
    /// Microseconds.
    pub busy_poll_us: u32,
    /// MiB.
    pub ivshmem_mib: u32,
    /// Guest memory may be any file.
    pub allow_any_memory: bool,
    /// The sockets of a VMM that has one for each stream.
    pub hybrid: Option<StartHybrid>,
    /// The host's kernel carries the streams.
    pub kernel: bool,
    /// Whichever of these there is, and vhost-user.
    pub auto: bool,
}

/// As [`Hybrid`](crate::config::Hybrid).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartHybrid {
    /// The VMM's socket.
    pub path: PathBuf,
    /// It passes half-closes on.
    pub half_closes: bool,
}

/// Asks for a connection to the VM's port process: to the one that is there, or else to a new one. The descriptor, if there is
/// one, is the new one's standard input, in which what its predecessor left waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reach {
    /// The VM.
    pub vm: VmId,
    /// For a new one.
    pub start: Start,
}

/// Asks how the port process that was started last has ended, and waits for that a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// The VM.
    pub vm: VmId,
}

/// Asks to end the VM's port process, if it is process `pid` and does not end by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// The VM.
    pub vm: VmId,
    /// The process that is meant: another one may have taken its place.
    pub pid: u32,
    /// How long it may take.
    pub within_ms: u32,
}

/// Asks to cut the log of the VM's port process if it is too long.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shorten {
    /// The VM.
    pub vm: VmId,
}

/// Says that the VM's port process has gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gone {
    /// The VM.
    pub vm: VmId,
}

/// Says that the VM was removed: whoever still listens in its directory is told to end, and nothing is kept any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leave {
    /// The VM.
    pub vm: VmId,
}

/// Asks to remove the directory of a VM that was removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveDir {
    /// The VM.
    pub vm: VmId,
}

/// Asks what the user database says of a user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WhoIs {
    /// By number.
    Uid(u32),
    /// By name.
    Name(String),
}

/// Answers [`WhoIs`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Is {
    /// Number, name and names of groups; none: there is no such user.
    pub user: Option<(u32, String, Vec<String>)>,
}

/// Asks for a connection to another host of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its name there.
    pub host: VmId,
}

/// Answers [`Peer`]: the connection is in the descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HasPeer {}

/// Asks what is found in a directory of the configuration, once that is something else than it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Discover {
    /// Which: its [`key`](crate::config::DiscoverConfig::key).
    pub key: u64,
    /// The version that is known; 0: none.
    pub seen: u64,
}

/// Answers [`Discover`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HasFound {
    /// Counts what this monitor has found there.
    pub version: u64,
    /// Names that are there, and whether there is a socket that may be used.
    pub vms: Vec<(VmId, bool)>,
    /// That is all there is. Otherwise nothing is known of names that are not among them.
    pub is_whole: bool,
    /// What is there and not used, and why: a line each.
    pub refused: Vec<String>,
}

impl HasFound {
    /// Whether it says the same, whichever version it is.
    pub fn says_as(&self, other: &Self) -> bool {
        let of = |found: &Self| (found.vms.clone(), found.is_whole, found.refused.clone());
        of(self) == of(other)
    }
}

/// Asks for the listener that guests reach through the host's kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guests {}

/// Answers [`Guests`]: the listener is in the descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HasGuests {}

/// The worker serves, or goes on to do so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serving {
    /// Of the settings that take a restart; see [`digest`](crate::config::Config::digest).
    pub settings: u64,
    /// Which program it is.
    pub build: u64,
}

/// How things are, for `systemctl status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// For people.
    pub text: String,
}

/// The API was told to stop aditd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopAll {}

/// The API was told to have the configuration read again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reread {}

/// The listeners of a worker that a new monitor has found, in the order of [`all`](crate::place::Listeners::all).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listeners {}

/// A VM's place in the descriptor store, of a worker that a new monitor has found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotOf {
    /// The VM.
    pub vm: VmId,
}

/// First packet to a new worker, with these descriptors: where monitors find it, the state directory, the configuration with
/// which the first worker began, the configuration as it is now, and those of [`Listeners`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The user that it becomes.
    pub uid: u32,
    /// And the group.
    pub gid: u32,
}

/// First packet to a worker that this monitor has found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {}

/// The configuration was read again, and is in the descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Why it could not be read; then there is no descriptor.
    pub error: String,
}

/// End in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stop {}

/// It is done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {}

/// It is not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Why.
    pub text: String,
}

/// The two ends of the VM's place: where packets go in, and where they come out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HasSlot {}

/// The connection is in the descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    /// Process id; 0 if it has none in this PID namespace.
    pub pid: u32,
    /// Whether aditd started it, and it is no VMM.
    pub ours: bool,
    /// The command line of one that was there; `None`: it was started now.
    pub found: Option<Vec<u8>>,
}

/// How a port process ended, as the system and its log have it. Its log may have a guest's words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastWords {
    /// As wait(2) has it.
    pub status: i32,
    /// The end of what it wrote.
    pub log: Vec<u8>,
    /// The disk of the log is full.
    pub disk_full: bool,
}

/// There is no connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotReached {
    /// Why; empty where `ended` says it.
    pub text: String,
    /// It ended at its start.
    pub ended: Option<LastWords>,
}

/// Answers [`Ended`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HasEnded {
    /// `None`: it has not, or there was none.
    pub words: Option<LastWords>,
}

adit_channel::message_table! {
    version VERSION;
    /// Kinds of frames between worker and monitor.
    kinds Kind;
    /// One frame, in either direction.
    messages Message;
    /// To the monitor.
    Slot = 1, 0..=0, NONE;
    /// To the monitor.
    ForgetOthers = 2, 0..=0, NONE;
    /// To the monitor.
    Reach = 3, 0..=1, NONE;
    /// To the monitor.
    Ended = 4, 0..=0, NONE;
    /// To the monitor.
    End = 5, 0..=0, NONE;
    /// To the monitor.
    Shorten = 6, 0..=0, NONE;
    /// To the monitor.
    Gone = 7, 0..=0, NONE;
    /// To the monitor.
    Leave = 8, 0..=0, NONE;
    /// To the monitor.
    RemoveDir = 9, 0..=0, NONE;
    /// To the monitor.
    Serving = 10, 0..=0, NONE;
    /// To the monitor.
    Status = 11, 0..=0, NONE;
    /// To the monitor.
    StopAll = 12, 0..=0, NONE;
    /// To the monitor.
    Listeners = 13, 2..=LISTENERS_MAX, NONE;
    /// To the monitor.
    SlotOf = 14, 2..=2, NONE;
    /// To the monitor.
    WhoIs = 15, 0..=0, NONE;
    /// To the monitor.
    Reread = 16, 0..=0, NONE;
    /// To the monitor.
    Peer = 17, 0..=0, NONE;
    /// To the monitor.
    Discover = 18, 0..=0, NONE;
    /// To the monitor.
    Guests = 19, 0..=0, NONE;
    /// To the worker.
    Welcome = 32, 6..=4 + LISTENERS_MAX, NONE;
    /// To the worker.
    Hello = 33, 0..=0, NONE;
    /// To the worker.
    Config = 34, 0..=1, NONE;
    /// To the worker.
    Stop = 35, 0..=0, NONE;
    /// To the worker.
    Done = 36, 0..=0, NONE;
    /// To the worker.
    Refused = 37, 0..=0, NONE;
    /// To the worker.
    HasSlot = 38, 2..=2, NONE;
    /// To the worker.
    Reached = 39, 1..=1, NONE;
    /// To the worker.
    NotReached = 40, 0..=0, NONE;
    /// To the worker.
    HasEnded = 41, 0..=0, NONE;
    /// To the worker.
    Is = 42, 0..=0, NONE;
    /// To the worker.
    HasPeer = 43, 1..=1, NONE;
    /// To the worker.
    HasFound = 44, 0..=0, NONE;
    /// To the worker.
    HasGuests = 45, 1..=1, NONE;
}

/// Why a packet cannot be sent, or is none of these. The sender's fault, except `Io`.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The socket failed.
    #[error("the socket between monitor and worker failed")]
    Io(#[from] io::Error),
    /// Header or body is malformed, or the kind is unknown.
    #[error("a packet between monitor and worker is malformed")]
    Frame(#[from] FrameError),
    /// The packet is not as long as its frame, or too long.
    #[error("a packet of {len} bytes between monitor and worker is not one whole frame")]
    Length {
        /// Bytes received.
        len: usize,
    },
    /// It came with descriptors that its kind does not have, or without some.
    #[error("a packet of kind {kind} between monitor and worker came with {found} descriptors")]
    Descriptors {
        /// The frame's kind.
        kind: u16,
        /// How many.
        found: usize,
    },
}

/// A packet: the id that pairs question and answer, what it says, its descriptors.
pub type Packet = (u32, Message, Vec<Passed>);

/// Encodes a packet.
///
/// # Errors
/// It would be longer than [`PACKET_MAX`].
pub fn encode(id: u32, message: &Message) -> Result<Vec<u8>, WireError> {
    let bytes = message.encode_body(id)?;
    match bytes.len() > PACKET_MAX {
        true => Err(WireError::Length { len: bytes.len() }),
        false => Ok(bytes),
    }
}

/// Decodes a packet that came with so many descriptors.
///
/// # Errors
/// As [`WireError`] says.
pub fn decode(packet: &[u8], descriptors: usize) -> Result<(u32, Message), WireError> {
    let len = packet.len();
    let (head, body) = packet
        .split_first_chunk::<HEADER_LEN>()
        .ok_or(WireError::Length { len })?;
    let header = Header::parse(head, (PACKET_MAX - HEADER_LEN) as u32)?;
    if body.len() != header.len as usize {
        return Err(WireError::Length { len });
    }
    let (kind, version) = (header.kind, header.version);
    let unknown = || FrameError::Unknown { kind, version };
    if version != VERSION {
        return Err(unknown().into());
    }
    let message = Message::decode_body(&header, body)?.ok_or_else(unknown)?;
    if !message.descriptors().contains(&descriptors) {
        let found = descriptors;
        return Err(WireError::Descriptors { kind, found });
    }
    Ok((header.id, message))
}

/// Sends a packet, whole or not at all. The caller's descriptors stay open.
///
/// # Errors
/// The socket fails or is full (`WouldBlock`), or the packet is too long.
pub fn send(
    socket: impl AsFd,
    id: u32,
    message: &Message,
    fds: &[BorrowedFd<'_>],
) -> Result<(), WireError> {
    let bytes = encode(id, message)?;
    let raw: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = (!raw.is_empty()).then(|| ControlMessage::ScmRights(&raw));
    let socket = socket.as_fd().as_raw_fd();
    let (flags, at) = (MsgFlags::MSG_NOSIGNAL, [IoSlice::new(&bytes)]);
    loop {
        match sendmsg::<UnixAddr>(socket, &at, rights.as_slice(), flags, None) {
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(io::Error::from(e).into()),
        }
    }
}

/// Receives a packet. `None`: the other side has closed the socket.
///
/// # Errors
/// The socket fails or is empty (`WouldBlock`), or the packet is none of these: then the connection is of no more use.
pub fn receive(socket: impl AsFd, closer: &Closer) -> Result<Option<Packet>, WireError> {
    let mut packet = vec![0; PACKET_MAX];
    let got = loop {
        match adit_passed::receive(&socket, &mut packet, RecvFlags::empty(), closer) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            received => break received?,
        }
    };
    if got.bytes == 0 && got.fds.is_empty() && !got.table_full {
        return Ok(None);
    }
    if got.cut {
        return Err(WireError::Length {
            len: PACKET_MAX + 1,
        });
    }
    let (id, message) = decode(&packet[..got.bytes], got.fds.len())?;
    Ok(Some((id, message, got.fds)))
}

#[cfg(test)]
mod tests {
    use super::super::discover::{FOUND_MAX, REFUSED_MAX, WITHOUT_MAX};
    use super::*;
    use adit_channel::frame;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::os::fd::OwnedFd;

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap()
    }

    fn vm() -> VmId {
        "web-1".parse().unwrap()
    }

    #[test]
    fn every_kind_crosses_the_socket_with_its_descriptors() {
        let (vm, text) = (vm(), "x".to_owned());
        let start = Start {
            cid: 3,
            busy_poll_us: 50,
            ivshmem_mib: 4,
            allow_any_memory: true,
            hybrid: None,
            kernel: true,
            auto: true,
        };
        let words = LastWords {
            status: 256,
            log: vec![0xff; 4096],
            disk_full: false,
        };
        let (uid, gid) = (78_191, 78_192);
        let of = |vm: &VmId| vm.clone();
        let all = [
            Message::Slot(Slot { vm: of(&vm) }),
            Message::ForgetOthers(ForgetOthers {}),
            Message::Reach(Reach { vm: of(&vm), start }),
            Message::Ended(Ended { vm: of(&vm) }),
            Message::End(End {
                vm: of(&vm),
                pid: 7,
                within_ms: 2000,
            }),
            Message::Shorten(Shorten { vm: of(&vm) }),
            Message::Gone(Gone { vm: of(&vm) }),
            Message::Leave(Leave { vm: of(&vm) }),
            Message::RemoveDir(RemoveDir { vm: of(&vm) }),
            Message::Serving(Serving {
                settings: u64::MAX,
                build: 1,
            }),
            Message::Status(Status { text: text.clone() }),
            Message::StopAll(StopAll {}),
            Message::Listeners(Listeners {}),
            Message::Peer(Peer { host: of(&vm) }),
            Message::SlotOf(SlotOf { vm }),
            Message::Reread(Reread {}),
            Message::HasPeer(HasPeer {}),
            Message::Discover(Discover { key: 7, seen: 0 }),
            // As long as it can be.
            Message::HasFound(HasFound {
                version: u64::MAX,
                is_whole: true,
                vms: vec![("a".repeat(63).parse().unwrap(), true); FOUND_MAX + WITHOUT_MAX],
                refused: vec!["x".repeat(200); REFUSED_MAX + 1],
            }),
            Message::Guests(Guests {}),
            Message::HasGuests(HasGuests {}),
            Message::WhoIs(WhoIs::Uid(1000)),
            Message::WhoIs(WhoIs::Name(text.clone())),
            Message::Is(Is {
                user: Some((1000, text.clone(), vec![text.clone()])),
            }),
            Message::Welcome(Welcome { uid, gid }),
            Message::Hello(Hello {}),
            Message::Config(Config {
                error: text.clone(),
            }),
            Message::Stop(Stop {}),
            Message::Done(Done {}),
            Message::Refused(Refused { text: text.clone() }),
            Message::HasSlot(HasSlot {}),
            Message::Reached(Reached {
                pid: 7,
                ours: true,
                found: Some(vec![0; 16 << 10]),
            }),
            Message::NotReached(NotReached {
                text,
                ended: Some(words.clone()),
            }),
            Message::HasEnded(HasEnded { words: Some(words) }),
        ];
        let (a, b) = pair();
        let closer = Closer::default();
        for message in all {
            for n in message.descriptors() {
                send(&a, 9, &message, &vec![a.as_fd(); n]).unwrap();
                let (id, got, fds) = receive(&b, &closer).unwrap().unwrap();
                assert_eq!((id, got, fds.len()), (9, message.clone(), n));
            }
        }
        drop(a);
        // The closer may have copies of it for a moment.
        let end = loop {
            match receive(&b, &closer) {
                Err(WireError::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => {
                    std::thread::yield_now();
                }
                end => break end,
            }
        };
        assert!(end.unwrap().is_none());
    }

    #[test]
    fn a_packet_that_is_cut_flipped_longer_or_of_another_kind_is_an_error_and_no_panic() {
        let good = encode(1, &Message::Slot(Slot { vm: vm() })).unwrap();
        decode(&good, 0).unwrap();
        for cut in 0..good.len() {
            decode(&good[..cut], 0).unwrap_err();
        }
        decode(&[&good[..], &[0]].concat(), 0).unwrap_err();
        for descriptors in [1, 253] {
            let refused = decode(&good, descriptors);
            assert!(matches!(refused, Err(WireError::Descriptors { .. })));
        }
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut flipped = good.clone();
                flipped[at] ^= 1 << bit;
                // Another id or name may be as good.
                let _ = decode(&flipped, 0);
            }
        }
        let unknown = frame::encode(99, VERSION, 1, 0, &1u8).unwrap();
        let refused = decode(&unknown, 0);
        assert!(matches!(
            refused,
            Err(WireError::Frame(FrameError::Unknown { kind: 99, .. }))
        ));
    }

    #[test]
    fn a_name_that_is_a_path_is_no_name() {
        for name in ["../../etc", "a/b", "", ".", "-a", "A"] {
            let bytes = frame::encode(Kind::RemoveDir as u16, VERSION, 1, 0, &name).unwrap();
            let refused = decode(&bytes, 0);
            assert!(
                matches!(refused, Err(WireError::Frame(FrameError::Body { .. }))),
                "{name}"
            );
        }
    }
}
