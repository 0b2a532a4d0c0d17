//! The doorkeeper's end of its socket to the port process.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, recv, sendmsg};

use super::{STATE_BAD, STATE_GOOD, TEXT_MAX, dial_of};

/// What the port process has to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// A dial: ticket and port.
    Dial(u32, u32),
    /// Nothing now.
    Nothing,
    /// It has ended.
    Over,
}

/// The socket.
#[derive(Debug)]
pub(super) struct Wire {
    socket: OwnedFd,
    said: Option<Result<(), String>>,
}

impl Wire {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket, said: None }
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Takes the next dial.
    pub(super) fn next(&self) -> io::Result<Asked> {
        loop {
            let mut bytes = [0; 8];
            return match recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
                Ok(8) => {
                    let (ticket, port) = dial_of(bytes);
                    Ok(Asked::Dial(ticket, port))
                }
                Ok(_) | Err(Errno::ECONNRESET) => Ok(Asked::Over),
                Err(Errno::EAGAIN) => Ok(Asked::Nothing),
                Err(Errno::EINTR) => continue,
                Err(e) => Err(e.into()),
            };
        }
    }

    /// Says whether the VMM is there, or why it is not used, if that is news.
    pub(super) fn say_state(&mut self, state: Result<(), String>) -> io::Result<()> {
        if self.said.as_ref() == Some(&state) {
            return Ok(());
        }
        let mut bytes = vec![match &state {
            Ok(()) => STATE_GOOD,
            Err(_) => STATE_BAD,
        }];
        match &state {
            Ok(()) => tracing::info!("the VMM is there"),
            Err(why) => tracing::info!(why, "there is no VMM"),
        }
        if let Err(why) = &state {
            let text: String = why.chars().take(TEXT_MAX / 4).collect();
            bytes.extend(text.as_bytes());
        }
        self.said = Some(state);
        self.send(&bytes, None)
    }

    pub(super) fn say(&self, kind: u8, number: u32, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut bytes = [kind; 5];
        bytes[1..].copy_from_slice(&number.to_le_bytes());
        self.send(&bytes, fd)
    }

    /// Waits for room: then the port process has enough to do.
    fn send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let fds = fd.map(|fd| [fd.as_raw_fd()]);
        let rights = fds.as_ref().map(|fds| [ControlMessage::ScmRights(fds)]);
        let rights = rights.as_ref().map_or(&[][..], |r| &r[..]);
        loop {
            let iov = [IoSlice::new(bytes)];
            let to = self.socket.as_raw_fd();
            match sendmsg::<UnixAddr>(to, &iov, rights, MsgFlags::MSG_NOSIGNAL, None) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}
