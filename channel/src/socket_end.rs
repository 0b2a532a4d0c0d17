//! How an end of a socket is told apart from one that was broken off (R117), for everybody who has either to say or to see it.
//!
//! | to say that a stream was broken off | to see it |
//! |---|---|
//! | close without a shutdown; of TCP, which would say "end", make it a reset | at end of file: nothing can be written either |

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{MsgFlags, send, setsockopt, sockopt};

/// Makes closing a socket a reset to its other end, or an end again, as far as its kind can tell the two apart (TCP). It holds
/// for whoever closes it: a process that is killed, too.
pub fn reset_on_close(fd: impl AsFd, on: bool) {
    let linger = libc::linger {
        l_onoff: on.into(),
        l_linger: 0,
    };
    // Other kinds ignore it; it fails for nothing that is a socket.
    let _ = setsockopt(&fd, sockopt::Linger, &linger);
}

/// Tells, at the end of what a socket's other end sent, whether that end was closed altogether: on AF_VSOCK and Unix sockets it
/// reads like an end of sending, but takes nothing any more. Once our own sending has ended nothing can be told. A TCP socket
/// shows a reset by itself, and an end only.
pub fn is_closed(fd: impl AsFd) -> bool {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    // Sends nothing, and fails like a byte would.
    send(fd.as_fd().as_raw_fd(), &[], flags) == Err(Errno::EPIPE)
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn r117_a_closed_unix_socket_is_no_ended_one() {
        let (near, far) = UnixStream::pair().unwrap();
        assert!(!is_closed(&near));
        far.shutdown(Shutdown::Write).unwrap();
        assert_eq!((&near).read(&mut [0]).unwrap(), 0);
        assert!(!is_closed(&near));
        drop(far);
        assert_eq!((&near).read(&mut [0]).unwrap(), 0);
        assert!(is_closed(&near));
    }

    #[test]
    fn r117_a_tcp_socket_is_reset_or_ended_as_was_said_last() {
        for resets in [true, false] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut far, _) = listener.accept().unwrap();
            reset_on_close(&near, true);
            reset_on_close(&near, resets);
            drop(near);
            let end = far.read(&mut [0]).map_err(|e| e.kind());
            let expected = if resets {
                Err(ErrorKind::ConnectionReset)
            } else {
                Ok(0)
            };
            assert_eq!(end, expected);
        }
    }
}
