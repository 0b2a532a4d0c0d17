//! A Unix listener whose clients can pass no descriptors, where the kernel knows how to forbid that (Linux 6.16). Elsewhere what
//! they pass is received, and closed on a thread that nobody waits for ([`passing`](crate::passing)).
#![allow(unsafe_code)] // no library has the option

use std::os::fd::{AsFd, AsRawFd};

/// `SO_PASSRIGHTS` (`asm-generic/socket.h`).
const SO_PASSRIGHTS: libc::c_int = 83;

/// Has the kernel refuse descriptors at the sender's. Those whom a listener accepts have it from the listener. Returns false if
/// the kernel does not know that.
pub fn forbid(socket: impl AsFd) -> bool {
    let no: libc::c_int = 0;
    let len = size_of_val(&no) as libc::socklen_t;
    let socket = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel reads `len` bytes of `no`, which is alive, and keeps nothing of them.
    let done = unsafe {
        libc::setsockopt(
            socket,
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            (&raw const no).cast(),
            len,
        )
    };
    done == 0
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Read};
    use std::os::unix::net::{UnixListener, UnixStream};

    use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

    use super::*;

    #[test]
    fn r105_a_client_of_such_a_listener_passes_bytes_and_no_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        if !forbid(&listener) {
            println!("skipped: the kernel is older than Linux 6.16");
            return;
        }
        let client = UnixStream::connect(&path).unwrap();
        let fds = [client.as_raw_fd()];
        let send = |rights: &[ControlMessage<'_>]| {
            let (to, bytes) = (client.as_raw_fd(), [IoSlice::new(b"x")]);
            sendmsg::<UnixAddr>(to, &bytes, rights, MsgFlags::empty(), None)
        };
        let refused = send(&[ControlMessage::ScmRights(&fds)]);
        assert_eq!(refused, Err(nix::errno::Errno::EPERM));
        send(&[]).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        assert_eq!(server.read(&mut [0; 2]).unwrap(), 1);
    }
}
