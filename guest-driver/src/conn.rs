//! A connected stream socket of any family (AF_VSOCK, TCP, Unix), so that relay and hello know nothing of families.
//!
//! `MSG_NOSIGNAL` throughout: a peer that went away is an error value, never a signal.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use adit_channel::socket_end;
use nix::sys::socket::{self, MsgFlags, Shutdown, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

/// One connected stream.
#[derive(Debug)]
pub struct Conn(OwnedFd);

impl Conn {
    /// Ends our direction; the peer's goes on.
    ///
    /// # Errors
    /// The stream is gone already.
    pub fn shutdown_write(&self) -> io::Result<()> {
        Ok(socket::shutdown(self.0.as_raw_fd(), Shutdown::Write)?)
    }

    /// Limits how long a blocking read or write may take; `None`: no limit.
    ///
    /// # Errors
    /// The kernel refuses the option.
    pub fn set_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        let value = TimeVal::milliseconds(
            i64::try_from(limit.unwrap_or_default().as_millis()).unwrap_or(i64::MAX),
        );
        socket::setsockopt(&self.0, sockopt::ReceiveTimeout, &value)?;
        Ok(socket::setsockopt(&self.0, sockopt::SendTimeout, &value)?)
    }

    /// Makes reads and writes return `WouldBlock` instead of waiting.
    ///
    /// # Errors
    /// The kernel refuses the flag.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        let flags = OFlag::from_bits_truncate(fcntl(&self.0, FcntlArg::F_GETFL)?);
        fcntl(&self.0, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(())
    }

    /// Tells whether the peer has closed the stream, rather than ended its sending: both read as end of file, and after a close
    /// nothing can be written any more. To be asked at end of file, and while our own direction is open.
    pub fn is_broken_off(&self) -> bool {
        socket_end::is_closed(&self.0)
    }

    /// Makes a close a reset instead of an end, or not, where the family can (TCP). It also holds when the process is killed.
    pub fn reset_on_close(&self, on: bool) {
        socket_end::reset_on_close(&self.0, on);
    }
}

impl From<OwnedFd> for Conn {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<Conn> for OwnedFd {
    fn from(conn: Conn) -> Self {
        conn.0
    }
}

impl AsFd for Conn {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Read for &Conn {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(socket::recv(self.0.as_raw_fd(), buf, MsgFlags::empty())?)
    }
    fn read_vectored(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        Ok(nix::sys::uio::readv(&self.0, bufs)?)
    }
}

impl Write for &Conn {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(socket::send(
            self.0.as_raw_fd(),
            buf,
            MsgFlags::MSG_NOSIGNAL,
        )?)
    }
    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let (fd, flags) = (self.0.as_raw_fd(), MsgFlags::MSG_NOSIGNAL);
        Ok(socket::sendmsg::<()>(fd, bufs, &[], flags, None)?)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
