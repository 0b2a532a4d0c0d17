//! The attach socket: how a VMM hands a region and its doorbells to the process that serves the channel.
//!
//! `SOCK_SEQPACKET`, one message per packet: a head of 32 bytes, then the body in postcard. Descriptors are attached.
//!
//! ```text
//! VMM                         server
//! HELLO {software}    ───►
//!                     ◄───    HELLO {software}, or REFUSE
//! OFFER {vm, bytes, lanes}
//!  + memfd, 4 eventfds ───►   checks: the memory is sealed and long enough, the doorbells are eventfds
//!                     ◄───    ACCEPT, or REFUSE {code, text}
//!        DETACH {text}  ◄──►  either side, later; or the socket closes
//! ```
//! | offset | field of the head |
//! |---|---|
//! | 0 | 8 bytes `ADITATT1` |
//! | 8 | u16 version = 1, u16 type (1 hello, 2 offer, 3 accept, 4 refuse, 5 detach), u16 attached descriptors, u16 zero |
//! | 16 | u64 epoch: in an offer, the VMM's count of its VM's starts and restores; in an accept, the region's epoch |
//! | 24 | u64 zero |
//!
//! All fields are little-endian. A packet with more than 4 KiB, with more than 8 descriptors, or with anything not
//! specified here ends the conversation. All its descriptors are closed ([`adit_passed`] explains on which thread).

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use adit_passed::{Closer, Passed, receive};
use adit_ringbuf::{Mapped, MemfdError};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, accept_with, bind, connect, listen, sendmsg, socket_with, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::doorbell::{self, borrow};
use crate::passed;

const MAGIC: [u8; 8] = *b"ADITATT1";
/// Version of the protocol.
pub const VERSION: u16 = 1;
/// Maximum size of a packet in bytes.
pub const PACKET_MAX: usize = 4096;
/// Maximum number of descriptors attached to a packet.
pub const FDS_MAX: usize = 8;
const HEAD: usize = 32;
/// Number of descriptors of an offer: the memory and four doorbells.
const OFFER_FDS: usize = 5;
/// Maximum bytes of a text, and of a VM's name.
const TEXT_MAX: usize = 512;
const NAME_MAX: usize = 64;

/// Why the conversation cannot continue.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The socket failed, or the other side did not answer in time.
    #[error("attach socket")]
    Io(#[from] io::Error),
    /// The other side closed the socket.
    #[error("the other side closed the attach socket")]
    Gone,
    /// The other side uses another version of the protocol.
    #[error("the other side speaks version {found} of the attach socket, this one {VERSION}")]
    Version {
        /// Its version.
        found: u16,
    },
    /// The packet is malformed, or not expected at this point.
    #[error("attach packet: {0}")]
    Malformed(&'static str),
    /// Descriptors that were passed earlier still cannot be closed, because their file system does not answer. The
    /// fault of the process that passed them.
    #[error(
        "too many passed descriptors cannot be closed, because their file system does not answer"
    )]
    Overfull,
    /// Some descriptors were not received, because all descriptors of this process are in use. Not the peer's fault;
    /// it may try again.
    #[error("this process has no free descriptors for the passed ones")]
    NoDescriptors,
    /// The memory in the offer cannot serve as a ring region.
    #[error("region")]
    Memory(#[from] MemfdError),
    /// One of the doorbells is not an eventfd.
    #[error("doorbell {which}")]
    Doorbell {
        /// Index of the doorbell, from zero.
        which: usize,
        /// Why it was refused.
        source: io::Error,
    },
    /// The other side refused.
    #[error("refused ({code:?}): {text}")]
    Refused {
        /// Reason for programs.
        code: Code,
        /// Reason for people.
        text: String,
    },
    /// The other side ended the attachment.
    #[error("detached: {0}")]
    Detached(String),
}

impl From<rustix::io::Errno> for AttachError {
    fn from(e: rustix::io::Errno) -> Self {
        Self::Io(e.into())
    }
}

/// Why an offer is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum Code {
    /// The other side uses another version.
    Version = 0,
    /// There is no such VM.
    UnknownVm = 1,
    /// The VM already has a ring.
    Busy = 2,
    /// Memory or doorbells cannot be used.
    Memory = 3,
    /// The packet is malformed.
    Malformed = 4,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
enum What {
    Hello = 1,
    Offer = 2,
    Accept = 3,
    Refuse = 4,
    Detach = 5,
}

#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    software: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Refuse {
    code: Code,
    text: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Detach {
    text: String,
}

/// A VMM's offer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Name of the VM, `[a-z0-9-]`, at most 64 bytes.
    pub vm: String,
    /// Bytes of the region.
    pub bytes: u64,
    /// Number of lanes that the region shall have: 1 to 4.
    pub lanes: u8,
}

/// The doorbells of both sides. A VMM connects them to its guest as irqfds and ioeventfds.
#[derive(Debug)]
pub struct Bells {
    /// Signalled by the host: there is data for the guest.
    pub guest_data: EventFd,
    /// Signalled by the host: there is space for the guest.
    pub guest_space: EventFd,
    /// Signalled by the guest: there is data for the host.
    pub host_data: EventFd,
    /// Signalled by the guest: there is space for the host.
    pub host_space: EventFd,
}

impl Bells {
    /// Makes four new doorbells.
    ///
    /// # Errors
    /// This process has no free descriptors.
    pub fn new() -> io::Result<Self> {
        use crate::doorbell::event_fd;
        Ok(Self {
            guest_data: event_fd()?,
            guest_space: event_fd()?,
            host_data: event_fd()?,
            host_space: event_fd()?,
        })
    }

    /// Duplicates the doorbells, for another owner.
    ///
    /// # Errors
    /// This process has no free descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            guest_data: self.guest_data.try_clone()?,
            guest_space: self.guest_space.try_clone()?,
            host_data: self.host_data.try_clone()?,
            host_space: self.host_space.try_clone()?,
        })
    }
}

/// One end of the conversation. Closing it also closes the descriptors that wait in it, so it is closed as
/// [`adit_passed`] describes.
#[derive(Debug)]
pub struct Socket(Passed);

/// Listens for VMMs.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl Listener {
    /// Listens at a path that does not exist yet.
    ///
    /// # Errors
    /// The path exists or is too long, or this process may not create it.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let fd = seqpacket()?;
        bind(&fd, &SocketAddrUnix::new(path)?)?;
        listen(&fd, 64)?;
        Ok(Self(fd))
    }

    /// Waits for the next VMM.
    ///
    /// # Errors
    /// This process has no free descriptors.
    pub fn accept(&self) -> io::Result<Socket> {
        Ok(accept_with(&self.0, SocketFlags::CLOEXEC)?.into())
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Socket {
    fn from(fd: OwnedFd) -> Self {
        Self(fd.into())
    }
}

fn seqpacket() -> io::Result<OwnedFd> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    Ok(socket_with(family, kind, SocketFlags::CLOEXEC, None)?)
}

/// A packet that was received.
struct Packet {
    what: u16,
    epoch: u64,
    body: Vec<u8>,
    fds: Vec<Passed>,
}

impl Socket {
    /// Connects to a path.
    ///
    /// # Errors
    /// Nothing listens there.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let fd = seqpacket()?;
        connect(&fd, &SocketAddrUnix::new(path)?)?;
        Ok(fd.into())
    }

    /// Makes a connected pair, for both ends.
    ///
    /// # Errors
    /// This process has no free descriptors.
    pub fn pair() -> io::Result<(Self, Self)> {
        let kind = SocketType::SEQPACKET;
        let (a, b) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        Ok((a.into(), b.into()))
    }

    /// Limits how long a receive call waits. Without this call it waits forever.
    ///
    /// # Errors
    /// The descriptor is not a socket.
    pub fn answer_within(&self, limit: Duration) -> io::Result<()> {
        Ok(set_socket_timeout(&self.0, Timeout::Recv, Some(limit))?)
    }

    fn send(
        &self,
        what: What,
        epoch: u64,
        body: &impl Serialize,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), AttachError> {
        let too_long = |_| AttachError::Malformed("longer than the maximum packet");
        let mut packet = [0; PACKET_MAX];
        packet[..8].copy_from_slice(&MAGIC);
        packet[8..10].copy_from_slice(&VERSION.to_le_bytes());
        packet[10..12].copy_from_slice(&(what as u16).to_le_bytes());
        packet[12..14].copy_from_slice(&(fds.len() as u16).to_le_bytes());
        packet[16..24].copy_from_slice(&epoch.to_le_bytes());
        let len = postcard::to_slice(body, &mut packet[HEAD..])
            .map_err(too_long)?
            .len();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(AttachError::Malformed(
                "more than the maximum number of descriptors",
            ));
        }
        let parts = [IoSlice::new(&packet[..HEAD + len])];
        sendmsg(&self.0, &parts, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    fn recv(&self) -> Result<Packet, AttachError> {
        let bad = |what| Err(AttachError::Malformed(what));
        let closer = Closer::shared();
        if closer.stays_full() {
            return Err(AttachError::Overfull);
        }
        let mut packet = [0; PACKET_MAX];
        let got = loop {
            // A process that is stopped and continued gets EINTR in a call that has a timeout (signal(7)).
            match receive(&self.0, &mut packet, RecvFlags::empty(), &closer) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                received => break received?,
            }
        };
        let fds = got.fds;
        if got.table_full {
            return Err(AttachError::NoDescriptors);
        }
        if got.bytes == 0 && fds.is_empty() {
            return Err(AttachError::Gone);
        }
        if got.cut {
            return bad("longer than the maximum packet");
        }
        if got.bytes < HEAD {
            return bad("shorter than its head");
        }
        let word = |at: usize| u16::from_le_bytes([packet[at], packet[at + 1]]);
        let long = |at: usize| {
            let bytes: [u8; 8] = std::array::from_fn(|n| packet[at + n]);
            u64::from_le_bytes(bytes)
        };
        if packet[..8] != MAGIC {
            return bad("wrong magic bytes");
        }
        if word(8) != VERSION {
            return Err(AttachError::Version { found: word(8) });
        }
        if usize::from(word(12)) != fds.len() || fds.len() > FDS_MAX {
            return bad("number of descriptors differs from the head");
        }
        if word(14) != 0 || long(24) != 0 {
            return bad("reserved bytes are not zero");
        }
        Ok(Packet {
            what: word(10),
            epoch: long(16),
            body: packet[HEAD..got.bytes].to_vec(),
            fds,
        })
    }

    /// Receives the packet that is expected here, with that number of descriptors. Any other packet is an error.
    fn expect<T: DeserializeOwned>(
        &self,
        what: What,
        fds: usize,
    ) -> Result<(T, u64, Vec<Passed>), AttachError> {
        let packet = self.recv()?;
        if packet.what == What::Refuse as u16 {
            let Refuse { code, text } = body(&packet.body)?;
            let text = sanitized(&text);
            return Err(AttachError::Refused { code, text });
        }
        if packet.what == What::Detach as u16 {
            let Detach { text } = body(&packet.body)?;
            return Err(AttachError::Detached(sanitized(&text)));
        }
        if packet.what != what as u16 {
            return Err(AttachError::Malformed("unexpected type of packet"));
        }
        if packet.fds.len() != fds {
            return Err(AttachError::Malformed("wrong number of descriptors"));
        }
        Ok((body(&packet.body)?, packet.epoch, packet.fds))
    }

    /// The VMM's half: offers a region, and returns the epoch at which the server accepted it. `epoch` counts the
    /// starts and restores of the VM. The VMM keeps the memory as well.
    ///
    /// # Errors
    /// The offer was refused, or the other side closed the socket.
    pub fn offer(
        &self,
        offer: &Offer,
        epoch: u64,
        memory: BorrowedFd<'_>,
        bells: &Bells,
    ) -> Result<u64, AttachError> {
        self.hello()?;
        let (Hello { .. }, _, _) = self.expect(What::Hello, 0)?;
        let bells = [
            &bells.guest_data,
            &bells.guest_space,
            &bells.host_data,
            &bells.host_space,
        ];
        let fds: Vec<_> = std::iter::once(memory).chain(bells.map(borrow)).collect();
        self.send(What::Offer, epoch, offer, &fds)?;
        let ((), taken, _) = self.expect(What::Accept, 0)?;
        Ok(taken)
    }

    fn hello(&self) -> Result<(), AttachError> {
        let software = concat!("adit ", env!("CARGO_PKG_VERSION")).to_owned();
        self.send(What::Hello, 0, &Hello { software }, &[])
    }

    /// The server's half: waits for an offer and checks it. A failed check is also reported to the VMM.
    ///
    /// # Errors
    /// There was no valid offer.
    pub fn offered(self) -> Result<Offered, AttachError> {
        self.receive_offer().map_err(|(socket, e)| {
            let code = match &e {
                AttachError::Version { .. } => Code::Version,
                AttachError::Memory(_) | AttachError::Doorbell { .. } => Code::Memory,
                AttachError::Overfull | AttachError::NoDescriptors => Code::Busy,
                _ => Code::Malformed,
            };
            // The VMM may be gone already.
            let _ = socket.refuse(code, &with_causes(&e));
            e
        })
    }

    fn receive_offer(self) -> Result<Offered, (Self, AttachError)> {
        let received = || -> Result<_, AttachError> {
            let (Hello { .. }, _, _) = self.expect(What::Hello, 0)?;
            self.hello()?;
            let (offer, epoch, fds) = self.expect::<Offer>(What::Offer, OFFER_FDS)?;
            let named = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
            if offer.vm.is_empty() || offer.vm.len() > NAME_MAX || !offer.vm.bytes().all(named) {
                return Err(AttachError::Malformed("name of the VM"));
            }
            if !(1..=4).contains(&offer.lanes) {
                return Err(AttachError::Malformed("number of lanes"));
            }
            let bytes = usize::try_from(offer.bytes).ok().filter(|&n| n <= 1 << 31);
            let bytes = bytes.ok_or(AttachError::Malformed("bytes of the region"))?;
            let mut fds = fds.into_iter();
            let memory = fds.next().ok_or(AttachError::Malformed("no memory"))?;
            let memory = passed::memory(memory, bytes)?;
            let mut which = 0;
            let mut bell = || {
                let fd = fds.next().ok_or(AttachError::Malformed("no doorbell"))?;
                let bell = doorbell::from_passed(fd);
                which += 1;
                bell.map_err(|source| AttachError::Doorbell {
                    which: which - 1,
                    source,
                })
            };
            let bells = Bells {
                guest_data: bell()?,
                guest_space: bell()?,
                host_data: bell()?,
                host_space: bell()?,
            };
            Ok((offer, epoch, memory, bells))
        };
        match received() {
            Ok((offer, epoch, memory, bells)) => Ok(Offered {
                socket: self,
                offer,
                epoch,
                memory,
                bells,
            }),
            Err(e) => Err((self, e)),
        }
    }

    /// Refuses and closes the conversation.
    ///
    /// # Errors
    /// The other side closed the socket.
    pub fn refuse(self, code: Code, text: &str) -> Result<(), AttachError> {
        let text = sanitized(text);
        self.send(What::Refuse, 0, &Refuse { code, text }, &[])
    }

    /// Ends the attachment and tells the other side why.
    ///
    /// # Errors
    /// The other side closed the socket.
    pub fn detach(self, text: &str) -> Result<(), AttachError> {
        let text = sanitized(text);
        self.send(What::Detach, 0, &Detach { text }, &[])
    }

    /// Waits until the other side ends the attachment, and returns why it did.
    pub fn wait(&self) -> AttachError {
        match self.expect::<()>(What::Detach, 0) {
            Ok(_) => AttachError::Malformed("unexpected type of packet"),
            Err(e) => e,
        }
    }
}

/// Makes a text safe to show: limits its length and removes control characters, which a terminal would act on.
fn sanitized(text: &str) -> String {
    let fit = text.chars().scan(0, |bytes, c| {
        *bytes += c.len_utf8();
        (*bytes <= TEXT_MAX).then_some(c)
    });
    fit.filter(|c| !c.is_control()).collect()
}

/// An error and its causes, in one line.
fn with_causes(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut source = e.source();
    while let Some(e) = source {
        text += &format!(": {e}");
        source = e.source();
    }
    text
}

fn body<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, AttachError> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        Ok(_) => Err(AttachError::Malformed("bytes after the end of the body")),
        Err(_) => Err(AttachError::Malformed("body")),
    }
}

/// An offer that passed all checks.
#[derive(Debug)]
pub struct Offered {
    socket: Socket,
    /// What the VMM offers.
    pub offer: Offer,
    /// The VMM's count of its VM's starts and restores.
    pub epoch: u64,
    /// The region's memory.
    pub memory: Mapped,
    /// The doorbells.
    pub bells: Bells,
}

impl Offered {
    /// Accepts the offer. `epoch` is the region's epoch. The caller keeps the socket, to learn when the VMM ends.
    ///
    /// # Errors
    /// The VMM closed the socket.
    pub fn accept(self, epoch: u64) -> Result<(Socket, Mapped, Bells), AttachError> {
        self.socket.send(What::Accept, epoch, &(), &[])?;
        Ok((self.socket, self.memory, self.bells))
    }

    /// Refuses the offer.
    ///
    /// # Errors
    /// The VMM closed the socket.
    pub fn refuse(self, code: Code, text: &str) -> Result<(), AttachError> {
        self.socket.refuse(code, text)
    }
}
