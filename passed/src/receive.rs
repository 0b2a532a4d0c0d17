//! Receives bytes and descriptors from a Unix socket.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

use crate::{Closer, Passed};

/// Maximum number of descriptors that the kernel attaches to one message (SCM_MAX_FD). The buffer always has room for
/// all.
pub const SCM_FDS_MAX: usize = 253;

/// The result of one receive call.
#[derive(Debug)]
pub struct Received {
    /// Number of bytes. 0 bytes and no descriptors mean that the other side closed the socket.
    pub bytes: usize,
    /// The received descriptors, close-on-exec.
    pub fds: Vec<Passed>,
    /// The packet was longer than the buffer; the rest is lost.
    pub cut: bool,
    /// Some of the passed descriptors are missing, because this process's descriptor table was full.
    pub table_full: bool,
}

/// Receives from a Unix socket. `flags` and the socket decide whether it blocks. `closer` closes the descriptors that
/// the caller drops.
///
/// # Errors
/// Errors of the socket, including `WouldBlock` and `Interrupted`.
pub fn receive(
    socket: impl AsFd,
    bytes: &mut [u8],
    flags: RecvFlags,
    closer: &Closer,
) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SCM_FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, flags)?;
    // Own the descriptors before anything is checked. When the kernel could not install all of them, the message still
    // lists those that it did install (R109).
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights.map(|fd| Passed::new(fd, closer)));
        }
    }
    Ok(Received {
        bytes: got.bytes,
        fds,
        cut: got.flags.contains(ReturnFlags::TRUNC),
        // The buffer has room for SCM_MAX_FD descriptors, so CTRUNC can only mean a full descriptor table.
        table_full: got.flags.contains(ReturnFlags::CTRUNC),
    })
}
