//! The door to a VMM that has a socket for each stream (Firecracker, Cloud Hypervisor): a second process, the *doorkeeper*.
//!
//! ```text
//!  adit-port web-1 (its own user, no file, no new socket)            adit-port door (the user that aditd has)
//!    DoorLink ──── dial 7, port 741 ─────────────────────────────────►  looks at v.sock, connects, sends "CONNECT 741\n"
//!             ◄─── dialed 7 + the socket, or failed 7 ────────────────
//!             ◄─── offered 741 + a socket ────────────────────────────  v.sock_741: the guest has dialled
//!             ◄─── state: v.sock is there, or why it is not ──────────  inotify
//! ```
//! For a VM whose streams the host's kernel carries (`vhost_vsock`) it makes the AF_VSOCK sockets (`kernel.rs`); what such a guest dials
//! arrives at `aditd`, and from there over the control socket ([`Offers`]).
//!
//! The port process may be taken over by its guest, so it opens no sockets of its own, and cannot say which one it means: the
//! doorkeeper knows one path, and gets numbers. It sees none of the streams' bytes. It ends when the port process ends; a port
//! process whose doorkeeper has ended ends, too, and `aditd` starts both again.
//!
//! Messages are packets of a `SOCK_SEQPACKET` pair. Both ends are of one build: the doorkeeper is the same program.

mod again;
mod confine;
pub mod keeper;
mod kernel;
mod offers;
mod wire;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use adit_channel::foreign::{Door, DoorNews};
use adit_passed::{Closer, receive};
pub use offers::{Offers, WithOffers};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};
use rustix::net::RecvFlags;

/// Longest text about the state of the VMM's socket, bytes.
const TEXT_MAX: usize = 500;
/// Longest message, bytes.
const MESSAGE_MAX: usize = 1 + TEXT_MAX;

const STATE_GOOD: u8 = 1;
const STATE_BAD: u8 = 2;
const DIALED: u8 = 3;
const FAILED: u8 = 4;
const OFFERED: u8 = 5;
const OPENED: u8 = 6;
const GONE: u8 = 7;

/// What the doorkeeper reaches.
#[derive(Clone, Copy, Debug)]
pub enum Behind<'a> {
    /// A VMM that has a socket for each stream.
    Socket {
        /// Its socket.
        path: &'a Path,
        /// The directory is the VM's own, and stays.
        stays: bool,
    },
    /// A VM, through the host's kernel.
    Kernel {
        /// Its CID.
        cid: u32,
        /// It counts as there only where that can be seen: otherwise another way is taken.
        only_seen: bool,
    },
}

/// A dial, as the doorkeeper gets it: ticket, port.
fn dial_bytes(ticket: u32, port: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&ticket.to_le_bytes());
    bytes[4..].copy_from_slice(&port.to_le_bytes());
    bytes
}

fn dial_of(bytes: [u8; 8]) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = bytes;
    (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    )
}

/// The port process' end of its door.
#[derive(Debug)]
pub struct DoorLink {
    socket: OwnedFd,
    closer: Closer,
    /// Reaped by init, because the port process ends with it. None: a thread of a test.
    _child: Option<Child>,
}

impl DoorLink {
    /// Starts a doorkeeper. Call it before the process gives up the right to start another.
    ///
    /// # Errors
    /// There are no descriptors, or the program cannot be started.
    pub fn start(behind: Behind<'_>, ports: &[u32], closer: Closer) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        let mut command = Command::new("/proc/self/exe");
        command.arg(keeper::COMMAND);
        match behind {
            Behind::Socket { path, stays } => {
                command.arg("--socket").arg(path);
                command.args(stays.then_some("--stays"))
            }
            Behind::Kernel { cid, only_seen } => {
                command.arg("--cid").arg(cid.to_string());
                command.args(only_seen.then_some("--only-seen"))
            }
        };
        for port in ports {
            command.arg("--serve-port").arg(port.to_string());
        }
        let child = command.stdin(Stdio::from(theirs)).spawn()?;
        Ok(Self {
            socket: ours,
            closer,
            _child: Some(child),
        })
    }

    /// Speaks to a doorkeeper that is there.
    #[cfg(test)]
    fn over(socket: OwnedFd, closer: Closer) -> Self {
        Self {
            socket,
            closer,
            _child: None,
        }
    }

    /// The next packet. `Ok(None)`: there is none now.
    fn next(&self) -> io::Result<Option<DoorNews>> {
        let mut bytes = [0; MESSAGE_MAX];
        let got = match receive(&self.socket, &mut bytes, RecvFlags::DONTWAIT, &self.closer) {
            Ok(got) => got,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(e),
        };
        // It is this program, and not a peer.
        let mut socket = got
            .fds
            .into_iter()
            .next()
            .and_then(adit_passed::Passed::trust);
        let bytes = &bytes[..got.bytes];
        let number = |at: usize| {
            let bytes = bytes.get(at..at + 4)?.try_into().ok()?;
            Some(u32::from_le_bytes(bytes))
        };
        let news = match bytes.first() {
            Some(&STATE_GOOD) => Some(DoorNews::State(Ok(()))),
            Some(&STATE_BAD) => {
                let text = String::from_utf8_lossy(&bytes[1..]).into_owned();
                Some(DoorNews::State(Err(text)))
            }
            Some(&DIALED) => number(1).map(|ticket| match socket.take() {
                Some(socket) => DoorNews::Dialed { ticket, socket },
                // This process has no descriptor left.
                None => DoorNews::Failed { ticket },
            }),
            Some(&OPENED) => number(1).map(|ticket| match socket.take() {
                Some(socket) => DoorNews::Opened { ticket, socket },
                None => DoorNews::Failed { ticket },
            }),
            Some(&FAILED) => number(1).map(|ticket| DoorNews::Failed { ticket }),
            Some(&GONE) => number(1).map(|ticket| DoorNews::Gone { ticket }),
            // Without its descriptor there is nothing to serve, and the guest sees the end of it.
            Some(&OFFERED) => match (number(1), socket.take()) {
                (Some(port), Some(socket)) => Some(DoorNews::Offered { port, socket }),
                _ => return self.next(),
            },
            _ => None,
        };
        news.map(Some).ok_or(io::ErrorKind::UnexpectedEof.into())
    }
}

impl Door for DoorLink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn dial(&mut self, ticket: u32, port: u32) -> io::Result<()> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        send(self.socket.as_raw_fd(), &dial_bytes(ticket, port), flags)?;
        Ok(())
    }

    fn receive(&mut self) -> Option<DoorNews> {
        loop {
            match self.next() {
                Ok(news) => return news,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    // Its dials would wait for ever. aditd starts both again.
                    tracing::error!(error = %e, "the doorkeeper has ended");
                    std::process::exit(1);
                }
            }
        }
    }
}

/// Returns true if a descriptor cannot be sent or accepted now.
fn is_pause(e: Errno) -> bool {
    matches!(e, Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dial_has_the_same_bytes_at_both_ends() {
        let bytes = dial_bytes(7, 741);
        assert_eq!(bytes, [7, 0, 0, 0, 0xe5, 2, 0, 0]);
        assert_eq!(dial_of(bytes), (7, 741));
    }
}
