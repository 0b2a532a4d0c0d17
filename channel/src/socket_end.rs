//! How to distinguish the orderly end of a socket from a broken stream (R117), for code that produces or detects
//! either.
//!
//! | how to break a stream off | how to detect it |
//! |---|---|
//! | close without a shutdown; for TCP, where that means "end", set it to send a reset | at end of file: writing fails too |

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{MsgFlags, send, setsockopt, sockopt};

/// Makes the close of a socket a reset for its other end, or an end again, if the socket's kind can show the
/// difference (TCP). It also applies when a killed process closes the socket.
pub fn reset_on_close(fd: impl AsFd, on: bool) {
    let linger = libc::linger {
        l_onoff: on.into(),
        l_linger: 0,
    };
    // Other kinds of sockets ignore it. It only fails for a descriptor that is not a socket.
    let _ = setsockopt(&fd, sockopt::Linger, &linger);
}

/// Returns true if the other end of a socket is closed completely. Call it at end of file. AF_VSOCK and Unix sockets
/// report end of file also when only the sending has ended, but after a close they accept no bytes either. After our
/// own shutdown this cannot be detected. A TCP socket reports a reset by itself, and otherwise only an end.
pub fn is_closed(fd: impl AsFd) -> bool {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    // Sends nothing, and fails as the send of a byte would.
    send(fd.as_fd().as_raw_fd(), &[], flags) == Err(Errno::EPIPE)
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn r117_a_closed_unix_socket_differs_from_an_ended_one() {
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
    fn r117_the_last_setting_decides_whether_a_tcp_socket_is_reset_or_ended() {
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
