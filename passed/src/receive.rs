//! Takes bytes and descriptors out of a Unix socket.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

use crate::{Closer, Passed};

/// What the kernel attaches to one message at most (SCM_MAX_FD): there is always room for all.
pub const SCM_FDS_MAX: usize = 253;

/// What came with one call.
#[derive(Debug)]
pub struct Received {
    /// Bytes; 0 without descriptors: the other side is gone.
    pub bytes: usize,
    /// Descriptors, close-on-exec.
    pub fds: Vec<Passed>,
    /// A packet was longer than the room for it.
    pub cut: bool,
    /// More descriptors were passed than are here: this process' table is full.
    pub table_full: bool,
}

/// Receives from a Unix socket, as its flags and those of the socket say. `closer` closes what nobody takes.
///
/// # Errors
/// As the socket says: `WouldBlock` and `Interrupted` are among them.
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
    // Owned before anything is looked at. What the kernel installed is listed, also when it could not install all (R109).
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
        // There was room for all that can be attached.
        table_full: got.flags.contains(ReturnFlags::CTRUNC),
    })
}
