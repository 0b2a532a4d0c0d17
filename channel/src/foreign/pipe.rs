//! Moves many bytes between two sockets without a copy in this process: `splice` into a pipe and out of it.
//!
//! Rules: whoever takes bytes into a pipe takes all of them out before the next bytes come in, at the latest by
//! [`clear`](Pipe::clear). Only sockets that are nonblocking by themselves are used: for TCP the kernel looks at nothing else. A process
//! that uses it ignores SIGPIPE, as Rust's programs do: `splice` has no flag against it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::libc;
use nix::unistd::{pipe2, read};

/// From so many bytes at a time on it is worth its second system call.
pub(super) const WORTH: usize = 16 << 10;
/// What a pipe should hold, bytes: each part of a packet has a page of it.
const SIZE: libc::c_int = 256 << 10;

#[derive(Debug)]
pub(super) struct Pipe {
    from: OwnedFd,
    to: OwnedFd,
    /// Bytes that are in it.
    holds: usize,
}

impl Pipe {
    pub(super) fn new() -> io::Result<Self> {
        let (from, to) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        // A user who has many pipes is refused a larger one, which costs a call more at times.
        let _ = fcntl(&to, FcntlArg::F_SETPIPE_SZ(SIZE));
        Ok(Self { from, to, holds: 0 })
    }

    /// Bytes that are in it.
    pub(super) fn holds(&self) -> usize {
        self.holds
    }

    /// Takes at most so many bytes of a socket. 0 = end of file.
    pub(super) fn fill(&mut self, socket: BorrowedFd<'_>, most: usize) -> nix::Result<usize> {
        let n = splice(socket, None, &self.to, None, most, flags())?;
        self.holds += n;
        Ok(n)
    }

    /// Gives at most so many of its bytes to a socket.
    pub(super) fn give(&mut self, socket: BorrowedFd<'_>, most: usize) -> nix::Result<usize> {
        let n = splice(
            &self.from,
            None,
            socket,
            None,
            most.min(self.holds),
            flags(),
        )?;
        self.holds -= n;
        Ok(n)
    }

    /// Copies some of its bytes out.
    pub(super) fn read(&mut self, into: &mut [u8]) -> nix::Result<usize> {
        let most = into.len().min(self.holds);
        let n = read(&self.from, &mut into[..most])?;
        self.holds -= n;
        Ok(n)
    }

    /// Drops what is in it.
    pub(super) fn clear(&mut self) {
        let mut bytes = [0; 4096];
        while self.holds > 0 {
            match self.read(&mut bytes) {
                Ok(1..) | Err(Errno::EINTR) => {}
                // It has fewer bytes than were put in: that cannot be.
                Ok(0) | Err(_) => self.holds = 0,
            }
        }
    }
}

fn flags() -> SpliceFFlags {
    SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE
}

/// Returns true if calls on this socket do not wait.
pub(super) fn is_nonblocking(socket: BorrowedFd<'_>) -> bool {
    let flags = fcntl(socket.as_fd(), FcntlArg::F_GETFL);
    flags.is_ok_and(|flags| flags & libc::O_NONBLOCK != 0)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn bytes_go_through_and_what_is_left_is_read_or_dropped() {
        let ((mut a, b), (c, mut d)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        assert!(!is_nonblocking(b.as_fd()));
        for socket in [&b, &c] {
            socket.set_nonblocking(true).unwrap();
            assert!(is_nonblocking(socket.as_fd()));
        }
        let mut pipe = Pipe::new().unwrap();
        assert_eq!(pipe.fill(b.as_fd(), 100), Err(Errno::EAGAIN));
        a.write_all(b"abcdefghij").unwrap();
        assert_eq!(pipe.fill(b.as_fd(), 8), Ok(8));
        assert_eq!(pipe.give(c.as_fd(), 3), Ok(3));
        let mut bytes = [0; 3];
        d.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"abc");
        assert_eq!((pipe.read(&mut bytes), &bytes), (Ok(3), b"def"));
        assert_eq!(pipe.holds(), 2);
        pipe.clear();
        assert_eq!(pipe.holds(), 0);
        assert_eq!(pipe.fill(b.as_fd(), 100), Ok(2));
        pipe.clear();
        drop(a);
        assert_eq!(pipe.fill(b.as_fd(), 100), Ok(0));
    }
}
