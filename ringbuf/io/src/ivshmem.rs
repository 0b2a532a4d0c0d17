//! An ivshmem server for one VM: how an unmodified QEMU (`-device ivshmem-doorbell`) gets a region and its doorbells.
//!
//! One socket, one client at a time, and two peers: this server is peer 0, the VM is peer 1. Vector 0 means data,
//! vector 1 means space. The protocol is QEMU's (`docs/specs/ivshmem-spec.txt`, version 0): each message is one
//! little-endian i64 with at most one descriptor. Only the server sends; the client never does.
//!
//! ```text
//! server                       QEMU
//! 0                    ───►            version
//! 1                    ───►            the client's own peer number
//! -1 + memfd           ───►            BAR2
//! 0 + host_data        ───►            peer 0, vector 0: written when the guest stores (0 << 16 | 0) to BAR0 + 12
//! 0 + host_space       ───►            peer 0, vector 1
//! 1 + guest_data       ───►            its own vectors: MSI-X
//! 1 + guest_space      ───►
//!                      ◄───  close     the VM is gone
//! ```
//! Every client gets new memory and new doorbells, which no one had before. So two clients of a socket, one after the
//! other, share nothing, even if the first keeps what it got. A second client at the same time is disconnected. All
//! messages go into an empty socket buffer without blocking: if the client does not read, its seven messages stay in
//! the kernel.
//!
//! QEMU makes its doorbells nonblocking. That is a property of the open file, so it changes this side's doorbells too;
//! those of [`crate::doorbell`] are nonblocking from the start.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use adit_passed::{Apart, Closer};
use adit_ringbuf::{Mapped, MemfdError};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};

use crate::attach::Bells;
use crate::doorbell::borrow;

/// Version of the protocol.
pub const VERSION: i64 = 0;
/// Peer number of this side in the guest's doorbell register.
pub const HOST_PEER: u16 = 0;
/// Peer number of the VM.
pub const GUEST_PEER: u16 = 1;
/// Number of vectors of a peer: the value for QEMU's `vectors=`.
pub const VECTORS: u16 = 2;
/// Vector that means data.
pub const VECTOR_DATA: u16 = 0;
/// Vector that means space.
pub const VECTOR_SPACE: u16 = 1;
/// Smallest region in bytes.
pub const BYTES_MIN: usize = 64 << 10;
/// Largest region in bytes.
pub const BYTES_MAX: usize = 1 << 30;
/// "Shared memory", in the place of a peer number.
const MEMORY: i64 = -1;

/// Why a VMM was not served, or is not served any more. The server can serve the next VMM.
#[derive(Debug, thiserror::Error)]
pub enum IvshmemError {
    /// The size is not a power of two in the allowed range, so it cannot be a PCI BAR. The caller's fault.
    #[error(
        "{bytes} bytes cannot be the size of a region: it must be a power of two from {BYTES_MIN} to {BYTES_MAX}"
    )]
    Size {
        /// The size that was asked for.
        bytes: usize,
    },
    /// There is no memory for the region.
    #[error("no memory for the region")]
    Memory(#[from] MemfdError),
    /// The socket failed, or this process has no free descriptors.
    #[error("ivshmem socket")]
    Io(#[from] io::Error),
    /// Another VMM has the region already, and only one can have it.
    #[error(
        "a second VMM connected while the first is still connected: the second was disconnected"
    )]
    Busy,
    /// The client sent something. An ivshmem client never sends.
    #[error("the client sent data, which an ivshmem client never does")]
    Spoke,
}

/// What a newly connected VMM got.
#[derive(Debug)]
pub struct Given {
    /// The region, zeroed. Only that VMM has it too.
    pub memory: Mapped,
    /// The same memory as a descriptor, for a successor process.
    pub memory_fd: OwnedFd,
    /// The doorbells.
    pub bells: Bells,
}

/// Serves one VM's ivshmem socket. It never blocks: call it when [`listener`](Self::listener) or
/// [`client`](Self::client) is readable.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    bytes: usize,
    client: Option<Apart<UnixStream>>,
}

impl Server {
    /// Serves regions of `bytes` bytes at a socket that is already bound.
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

    /// Continues with a client that a predecessor process accepted.
    pub fn resume(&mut self, client: Apart<UnixStream>) {
        self.client = Some(client);
    }

    /// Readable when a VMM connects.
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Readable when the current VMM closes its socket.
    pub fn client(&self) -> Option<BorrowedFd<'_>> {
        self.client.as_ref().map(AsFd::as_fd)
    }

    /// Accepts a VMM. Returns `None` if no VMM waits.
    ///
    /// # Errors
    /// The VMM was not served. Call again until the result is `None`.
    pub fn accept(&mut self) -> Result<Option<Given>, IvshmemError> {
        let socket = match self.listener.accept() {
            Ok((socket, _)) => Apart::new(socket, &Closer::shared()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        // The earlier client may have closed its socket without this server having noticed.
        if self.client.is_some() && matches!(self.look(), Ok(Alive::Yes)) {
            return Err(IvshmemError::Busy);
        }
        socket.set_nonblocking(true)?;
        let (memory, memory_fd) = Mapped::memfd(self.bytes)?;
        let bells = Bells::new()?;
        send_setup(socket.as_fd(), memory_fd.as_fd(), &bells)?;
        self.client = Some(socket);
        Ok(Some(Given {
            memory,
            memory_fd,
            bells,
        }))
    }

    /// Checks whether the VMM is still connected.
    ///
    /// # Errors
    /// It broke the protocol, and is not served any more.
    pub fn look(&mut self) -> Result<Alive, IvshmemError> {
        let Some(client) = &self.client else {
            return Ok(Alive::No);
        };
        // Peek only: taking a message would close its descriptors on this thread, which must not block.
        let peeked = recv(client, &mut [0u8; 8], RecvFlags::DONTWAIT | RecvFlags::PEEK);
        match peeked {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(Alive::Yes),
            _ => self.client = None,
        }
        match peeked {
            Ok((0, _)) | Err(rustix::io::Errno::CONNRESET) => Ok(Alive::No),
            Ok(_) => Err(IvshmemError::Spoke),
            Err(e) => Err(IvshmemError::Io(e.into())),
        }
    }
}

/// Whether a VMM is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alive {
    /// A VMM is connected.
    Yes,
    /// There is none, or it has disconnected.
    No,
}

fn send_setup(
    to: BorrowedFd<'_>,
    memory: BorrowedFd<'_>,
    bells: &Bells,
) -> Result<(), IvshmemError> {
    let (host, guest) = (i64::from(HOST_PEER), i64::from(GUEST_PEER));
    send_message(to, VERSION, None)?;
    send_message(to, guest, None)?;
    send_message(to, MEMORY, Some(memory))?;
    // In the order of the vectors.
    send_message(to, host, Some(borrow(&bells.host_data)))?;
    send_message(to, host, Some(borrow(&bells.host_space)))?;
    send_message(to, guest, Some(borrow(&bells.guest_data)))?;
    send_message(to, guest, Some(borrow(&bells.guest_space)))
}

fn send_message(
    to: BorrowedFd<'_>,
    what: i64,
    fd: Option<BorrowedFd<'_>>,
) -> Result<(), IvshmemError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.as_slice();
    if !fds.is_empty() {
        // The buffer has room for one descriptor.
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
