//! The attach socket: how a VMM hands a region and its doorbells to whoever serves the channel.
//!
//! `SOCK_SEQPACKET`, one packet a message: a head of 32 bytes, then the body in postcard, descriptors beside it.
//!
//! ```text
//! VMM                         server
//! HELLO {software}    ───►
//!                     ◄───    HELLO {software}, or REFUSE
//! OFFER {vm, bytes, lanes}
//!  + memfd, 4 eventfds ───►   the memory is sealed, long enough, the doorbells are eventfds
//!                     ◄───    ACCEPT, or REFUSE {code, text}
//!        DETACH {text}  ◄──►  either side, later; or the socket ends
//! ```
//! | offset | field of the head |
//! |---|---|
//! | 0 | 8 bytes `ADITATT1` |
//! | 8 | u16 version = 1, u16 what it is (1 hello, 2 offer, 3 accept, 4 refuse, 5 detach), u16 descriptors beside it, u16 zero |
//! | 16 | u64 epoch: of an offer, the VMM's count of its VM's starts and restores; of an accept, the region's |
//! | 24 | u64 zero |
//!
//! Little-endian. A packet of more than 4 KiB or 8 descriptors, or with anything that is not said here, ends the
//! conversation; every descriptor that came with it is closed ([`adit_passed`] says by whom).

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

use crate::doorbell::borrow;
use crate::passed;

const MAGIC: [u8; 8] = *b"ADITATT1";
/// Of the conversation.
pub const VERSION: u16 = 1;
/// Bytes of a packet at most.
pub const PACKET_MAX: usize = 4096;
/// Descriptors beside a packet at most.
pub const FDS_MAX: usize = 8;
const HEAD: usize = 32;
/// Descriptors of an offer: the memory and four doorbells.
const OFFER_FDS: usize = 5;
/// Bytes of a text at most; of a VM's name.
const TEXT_MAX: usize = 512;
const NAME_MAX: usize = 64;

/// The conversation cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The socket failed, or the other side said nothing in time.
    #[error("attach socket")]
    Io(#[from] io::Error),
    /// The other side is gone.
    #[error("the other side closed the attach socket")]
    Gone,
    /// The other side speaks another version.
    #[error("the other side speaks version {found} of the attach socket, this one {VERSION}")]
    Version {
        /// Its version.
        found: u16,
    },
    /// What came is not what belongs here.
    #[error("attach packet: {0}")]
    Malformed(&'static str),
    /// What came before cannot be closed: its file system does not answer. The fault of whoever passed it.
    #[error(
        "too many descriptors that were passed cannot be closed, for their file system does not answer"
    )]
    Overfull,
    /// What came could not be taken in: this process' descriptors are all in use. Nobody's fault; it may be tried again.
    #[error("this process has no descriptors left for what was passed")]
    NoDescriptors,
    /// The memory that came is no memory for a ring.
    #[error("region")]
    Memory(#[from] MemfdError),
    /// One of the doorbells is none.
    #[error("doorbell {which}")]
    Doorbell {
        /// Which, from zero.
        which: usize,
        /// Why.
        source: io::Error,
    },
    /// The other side does not want it.
    #[error("refused ({code:?}): {text}")]
    Refused {
        /// Why, for programs.
        code: Code,
        /// Why, for people.
        text: String,
    },
    /// The other side is done.
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
    /// It speaks another version.
    Version = 0,
    /// There is no such VM.
    UnknownVm = 1,
    /// The VM has a channel already.
    Busy = 2,
    /// Memory or doorbells are not fit.
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

/// What a VMM offers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Name of the VM, `[a-z0-9-]`, at most 64 bytes.
    pub vm: String,
    /// Bytes of the region.
    pub bytes: u64,
    /// How many lanes it shall have: 1 to 4.
    pub lanes: u8,
}

/// Both sides' doorbells, by what they say. A VMM connects them to its guest: irqfds and ioeventfds.
#[derive(Debug)]
pub struct Bells {
    /// Rung by the host: there is data for the guest.
    pub guest_data: EventFd,
    /// Rung by the host: there is space for the guest.
    pub guest_space: EventFd,
    /// Rung by the guest: there is data for the host.
    pub host_data: EventFd,
    /// Rung by the guest: there is space for the host.
    pub host_space: EventFd,
}

impl Bells {
    /// Four new ones.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn new() -> io::Result<Self> {
        use crate::doorbell::event_fd;
        Ok(Self {
            guest_data: event_fd()?,
            guest_space: event_fd()?,
            host_data: event_fd()?,
            host_space: event_fd()?,
        })
    }

    /// The same doorbells, for another owner.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            guest_data: self.guest_data.try_clone()?,
            guest_space: self.guest_space.try_clone()?,
            host_data: self.host_data.try_clone()?,
            host_space: self.host_space.try_clone()?,
        })
    }
}

/// One end of the conversation. What waits in it is closed with it, so it is as [`adit_passed`] has it.
#[derive(Debug)]
pub struct Socket(Passed);

/// Where VMMs knock.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl Listener {
    /// Listens at a path that does not exist yet.
    ///
    /// # Errors
    /// The path is taken, too long, or not ours to write.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let fd = seqpacket()?;
        bind(&fd, &SocketAddrUnix::new(path)?)?;
        listen(&fd, 64)?;
        Ok(Self(fd))
    }

    /// Waits for the next VMM.
    ///
    /// # Errors
    /// There are no descriptors left.
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
    /// Knocks at a path.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let fd = seqpacket()?;
        connect(&fd, &SocketAddrUnix::new(path)?)?;
        Ok(fd.into())
    }

    /// Both ends.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn pair() -> io::Result<(Self, Self)> {
        let kind = SocketType::SEQPACKET;
        let (a, b) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        Ok((a.into(), b.into()))
    }

    /// How long to wait for the other side's answer; before, for ever.
    ///
    /// # Errors
    /// The descriptor is no socket.
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
        let too_long = |_| AttachError::Malformed("longer than a packet may be");
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
                "more descriptors than a packet may have",
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
            // A process that is stopped and goes on is interrupted in a call that has a time limit (signal(7)).
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
            return bad("longer than a packet may be");
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
            return bad("not of this socket");
        }
        if word(8) != VERSION {
            return Err(AttachError::Version { found: word(8) });
        }
        if usize::from(word(12)) != fds.len() || fds.len() > FDS_MAX {
            return bad("other descriptors beside it than it says");
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

    /// Receives what is expected, with as many descriptors; what the other side says instead is an error.
    fn expect<T: DeserializeOwned>(
        &self,
        what: What,
        fds: usize,
    ) -> Result<(T, u64, Vec<Passed>), AttachError> {
        let packet = self.recv()?;
        if packet.what == What::Refuse as u16 {
            let Refuse { code, text } = body(&packet.body)?;
            let text = shown(&text);
            return Err(AttachError::Refused { code, text });
        }
        if packet.what == What::Detach as u16 {
            let Detach { text } = body(&packet.body)?;
            return Err(AttachError::Detached(shown(&text)));
        }
        if packet.what != what as u16 {
            return Err(AttachError::Malformed("not what belongs here"));
        }
        if packet.fds.len() != fds {
            return Err(AttachError::Malformed("another number of descriptors"));
        }
        Ok((body(&packet.body)?, packet.epoch, packet.fds))
    }

    /// A VMM's half: offers a region, and returns the epoch at which it was taken. `epoch`: how often the VM was started
    /// or restored. The memory stays the VMM's too.
    ///
    /// # Errors
    /// The offer was refused, or the other side is gone.
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

    /// A server's half: waits for an offer, and checks it. What is wrong with it is told to the VMM as well.
    ///
    /// # Errors
    /// There is no offer that could be taken.
    pub fn offered(self) -> Result<Offered, AttachError> {
        self.receive_offer().map_err(|(socket, e)| {
            let code = match &e {
                AttachError::Version { .. } => Code::Version,
                AttachError::Memory(_) | AttachError::Doorbell { .. } => Code::Memory,
                AttachError::Overfull | AttachError::NoDescriptors => Code::Busy,
                _ => Code::Malformed,
            };
            // It may be gone already.
            let _ = socket.refuse(code, &chain(&e));
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
                let bell = passed::doorbell(fd);
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

    /// Refuses, and is done.
    ///
    /// # Errors
    /// The other side is gone.
    pub fn refuse(self, code: Code, text: &str) -> Result<(), AttachError> {
        let text = shown(text);
        self.send(What::Refuse, 0, &Refuse { code, text }, &[])
    }

    /// Says that this side is done, and why.
    ///
    /// # Errors
    /// The other side is gone.
    pub fn detach(self, text: &str) -> Result<(), AttachError> {
        let text = shown(text);
        self.send(What::Detach, 0, &Detach { text }, &[])
    }

    /// Waits until the other side is done, and returns why.
    pub fn wait(&self) -> AttachError {
        match self.expect::<()>(What::Detach, 0) {
            Ok(_) => AttachError::Malformed("not what belongs here"),
            Err(e) => e,
        }
    }
}

/// A text as it may be shown: bounded, and without what a terminal would act on.
fn shown(text: &str) -> String {
    let fit = text.chars().scan(0, |bytes, c| {
        *bytes += c.len_utf8();
        (*bytes <= TEXT_MAX).then_some(c)
    });
    fit.filter(|c| !c.is_control()).collect()
}

/// An error and its causes in one line.
fn chain(e: &dyn std::error::Error) -> String {
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
        Ok(_) => Err(AttachError::Malformed("bytes behind its end")),
        Err(_) => Err(AttachError::Malformed("body")),
    }
}

/// An offer that could be taken.
#[derive(Debug)]
pub struct Offered {
    socket: Socket,
    /// What it says.
    pub offer: Offer,
    /// The VMM's count of its VM's starts and restores.
    pub epoch: u64,
    /// The region's memory.
    pub memory: Mapped,
    /// The doorbells.
    pub bells: Bells,
}

impl Offered {
    /// Takes it; the region is at `epoch`. The socket stays, for the end.
    ///
    /// # Errors
    /// The VMM is gone.
    pub fn accept(self, epoch: u64) -> Result<(Socket, Mapped, Bells), AttachError> {
        self.socket.send(What::Accept, epoch, &(), &[])?;
        Ok((self.socket, self.memory, self.bells))
    }

    /// Refuses it.
    ///
    /// # Errors
    /// The VMM is gone.
    pub fn refuse(self, code: Code, text: &str) -> Result<(), AttachError> {
        self.socket.refuse(code, text)
    }
}
