//! An ivshmem server of one VM: how a stock QEMU (`-device ivshmem-doorbell`) gets a region and its doorbells.
//!
//! One socket, one client at a time, and two peers: whoever serves is peer 0, the VM is peer 1. Vector 0 says data, vector
//! 1 says space. The protocol is QEMU's (`docs/specs/ivshmem-spec.txt`, version 0): little-endian i64, one a message, at
//! most one descriptor beside it; the server speaks, the client never does.
//!
//! ```text
//! server                       QEMU
//! 0                    ───►            version
//! 1                    ───►            who you are
//! -1 + memfd           ───►            BAR2
//! 0 + host_data        ───►            peer 0, vector 0: written when the guest stores (0 << 16 | 0) to BAR0 + 12
//! 0 + host_space       ───►            peer 0, vector 1
//! 1 + guest_data       ───►            its own vectors: MSI-X
//! 1 + guest_space      ───►
//!                      ◄───  end       the VM is gone
//! ```
//! Every client gets memory and doorbells of its own, which nobody had before: two clients of a socket, one after the
//! other, share nothing, even if the first keeps what it was given. A second one beside the first is turned away. All
//! sending is to a fresh socket, without waiting: a client that does not read has its seven messages in the kernel.
//!
//! QEMU makes the doorbells that it gets nonblocking, which is a property of the open file and so holds here too:
//! [`crate::doorbell`]'s are that from the beginning.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use adit_passed::{Apart, Closer};
use adit_ringbuf::{Mapped, MemfdError};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};

use crate::attach::Bells;
use crate::doorbell::borrow;

/// Of the protocol.
pub const VERSION: i64 = 0;
/// This side, as the guest's doorbell register knows it.
pub const HOST_PEER: u16 = 0;
/// The VM.
pub const GUEST_PEER: u16 = 1;
/// Vectors of a peer: what QEMU's `vectors=` must say.
pub const VECTORS: u16 = 2;
/// Vector that says data.
pub const VECTOR_DATA: u16 = 0;
/// Vector that says space.
pub const VECTOR_SPACE: u16 = 1;
/// Bytes of a region at least.
pub const BYTES_MIN: usize = 64 << 10;
/// Bytes of a region at most.
pub const BYTES_MAX: usize = 1 << 30;
/// "Shared memory", in place of a peer.
const MEMORY: i64 = -1;

/// The conversation with a VMM cannot begin or go on; the next VMM is served.
#[derive(Debug, thiserror::Error)]
pub enum IvshmemError {
    /// The size of a PCI BAR is a power of two. The caller's fault.
    #[error(
        "{bytes} bytes cannot be a region: it takes a power of two from {BYTES_MIN} to {BYTES_MAX}"
    )]
    Size {
        /// What was asked for.
        bytes: usize,
    },
    /// No memory for the region.
    #[error("no memory for the region")]
    Memory(#[from] MemfdError),
    /// The socket failed, or there are no descriptors.
    #[error("ivshmem socket")]
    Io(#[from] io::Error),
    /// A VMM has the region already, and only one can.
    #[error("a second VMM connected while the first is there: it was turned away")]
    Busy,
    /// An ivshmem client has nothing to say, and this one did.
    #[error("the client spoke, which an ivshmem client does not")]
    Spoke,
}

/// A VMM that was given a region.
#[derive(Debug)]
pub struct Given {
    /// The region, zeroed; nobody but that VMM has it.
    pub memory: Mapped,
    /// The same as a descriptor, for a successor.
    pub memory_fd: OwnedFd,
    /// The doorbells.
    pub bells: Bells,
}

/// Serves one VM's ivshmem socket. It never waits: ask when [`listener`](Self::listener) or [`client`](Self::client) is
/// readable.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    bytes: usize,
    client: Option<Apart<UnixStream>>,
}

impl Server {
    /// Serves regions of so many bytes at a socket that is bound.
    ///
    /// # Errors
    /// The size is out of range, or the socket cannot be made nonblocking.
    pub fn new(listener: UnixListener, bytes: usize) -> Result<Self, IvshmemError> {
        if !bytes.is_power_of_two() || !(BYTES_MIN..=BYTES_MAX).contains(&bytes) {
            return Err(IvshmemError::Size { bytes });
        }
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            bytes,
            client: None,
        })
    }

    /// Goes on with a client that a predecessor accepted.
    pub fn resume(&mut self, client: Apart<UnixStream>) {
        self.client = Some(client);
    }

    /// Readable when a VMM knocks.
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Readable when the VMM that is served goes.
    pub fn client(&self) -> Option<BorrowedFd<'_>> {
        self.client.as_ref().map(AsFd::as_fd)
    }

    /// Lets a VMM in; `None`: nobody knocks.
    ///
    /// # Errors
    /// It was not let in. Call again until there is nobody.
    pub fn accept(&mut self) -> Result<Option<Given>, IvshmemError> {
        let socket = match self.listener.accept() {
            Ok((socket, _)) => Apart::new(socket, &Closer::shared()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        // One that went may not have been seen going.
        if self.client.is_some() && matches!(self.look(), Ok(Alive::Yes)) {
            return Err(IvshmemError::Busy);
        }
        socket.set_nonblocking(true)?;
        let (memory, memory_fd) = Mapped::memfd(self.bytes)?;
        let bells = Bells::new()?;
        introduce(socket.as_fd(), memory_fd.as_fd(), &bells)?;
        self.client = Some(socket);
        Ok(Some(Given {
            memory,
            memory_fd,
            bells,
        }))
    }

    /// Looks whether the VMM is still there.
    ///
    /// # Errors
    /// It broke the protocol, and is not served any more.
    pub fn look(&mut self) -> Result<Alive, IvshmemError> {
        let Some(client) = &self.client else {
            return Ok(Alive::No);
        };
        // Only looked at: descriptors that came with it would be closed by whoever took it, and here nobody may wait.
        let said = recv(client, &mut [0u8; 8], RecvFlags::DONTWAIT | RecvFlags::PEEK);
        match said {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(Alive::Yes),
            _ => self.client = None,
        }
        match said {
            Ok((0, _)) | Err(rustix::io::Errno::CONNRESET) => Ok(Alive::No),
            Ok(_) => Err(IvshmemError::Spoke),
            Err(e) => Err(IvshmemError::Io(e.into())),
        }
    }
}

/// Whether a VMM is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alive {
    /// It is.
    Yes,
    /// There is none, or it has gone.
    No,
}

fn introduce(
    to: BorrowedFd<'_>,
    memory: BorrowedFd<'_>,
    bells: &Bells,
) -> Result<(), IvshmemError> {
    let (host, guest) = (i64::from(HOST_PEER), i64::from(GUEST_PEER));
    say(to, VERSION, None)?;
    say(to, guest, None)?;
    say(to, MEMORY, Some(memory))?;
    // In the order of their vectors.
    say(to, host, Some(borrow(&bells.host_data)))?;
    say(to, host, Some(borrow(&bells.host_space)))?;
    say(to, guest, Some(borrow(&bells.guest_data)))?;
    say(to, guest, Some(borrow(&bells.guest_space)))
}

fn say(to: BorrowedFd<'_>, what: i64, fd: Option<BorrowedFd<'_>>) -> Result<(), IvshmemError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.as_slice();
    if !fds.is_empty() {
        // There is room for one.
        let _ = control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let bytes = what.to_le_bytes();
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    match sendmsg(to, &[IoSlice::new(&bytes)], &mut control, flags) {
        Ok(8) => Ok(()),
        Ok(_) => Err(IvshmemError::Io(io::ErrorKind::WriteZero.into())),
        Err(e) => Err(IvshmemError::Io(e.into())),
    }
}
