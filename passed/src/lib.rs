//! Descriptors that another process passed (`SCM_RIGHTS`), before this process knows what they are.
//!
//! A descriptor may be a file on a user-space file system (FUSE), whose server may answer late or never. A thread that
//! asks for the size of such a file blocks. A thread that closes its descriptor blocks too, because a close also asks
//! the file system. No signal interrupts either. A TCP socket with `SO_LINGER` and unsent data blocks in its last
//! close. Therefore this crate only asks what the kernel answers by itself, and passed descriptors are closed on a
//! separate thread:
//!
//! | wanted | how it is recognised | |
//! |---|---|---|
//! | memory | it has seals, which only memory has (`F_GET_SEALS`) | [`Passed::memory`] |
//! | a doorbell | it has no file type, according to cached attributes (`AT_STATX_DONT_SYNC`), and accepts a write of an eight-byte zero | [`Passed::eventfd`] |
//! | a Unix stream socket | it is a socket of that family and type (`getsockopt`) | [`Passed::unix_stream`] |
//! | a Unix socket of packets | the same | [`Passed::unix_packets`] |
//! | a regular file | its file type, according to cached attributes | [`Passed::regular_file`] |
//!
//! (`/proc/self/fd` would identify an eventfd without the write, but a sandboxed process cannot read it. Among files
//! without a type only an eventfd takes the write, and adding zero does not change it.)
//!
//! - [`receive()`] is the only function that takes descriptors out of a socket. It owns each of them before it looks at
//!   anything else. This also holds when the descriptor table was full and the kernel could install only some of them.
//! - A [`Closer`] is the queue of one owner, so a slow close for one VM never delays the descriptors of another VM.
//!   While [`PENDING_MAX`] (or the closer's smaller limit) of them wait, the owner receives nothing more
//!   ([`Closer::is_full`]).
//! - A Unix socket in which descriptors can wait is closed by a closer too ([`Apart`]), because the kernel closes the
//!   waiting descriptors inside the socket's own close. For the same reason every read of such a socket has room for
//!   descriptors: the kernel would close those that do not fit.
#![forbid(unsafe_code)]

mod apart;
mod closer;
mod receive;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::{
    AtFlags, FileType, OFlags, StatxFlags, fcntl_get_seals, fcntl_getfl, fcntl_setfl, statx,
};
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};

pub use apart::Apart;
pub use closer::{Closer, PENDING_MAX};
pub use receive::{Received, SCM_FDS_MAX, receive};

/// A passed descriptor of unknown kind. When it is dropped, its closer closes it.
#[derive(Debug)]
pub struct Passed(Apart<OwnedFd>);

impl From<OwnedFd> for Passed {
    /// Uses the closer that the whole process shares.
    fn from(fd: OwnedFd) -> Self {
        Self::new(fd, &Closer::shared())
    }
}

impl Passed {
    /// Takes a descriptor that `closer` will close.
    pub fn new(fd: OwnedFd, closer: &Closer) -> Self {
        Self(Apart::new(fd, closer))
    }

    /// Duplicates the descriptor.
    ///
    /// # Errors
    /// This process has no free descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self::new(self.0.try_clone()?, self.0.closer()))
    }

    /// Converts it to memory that can be sealed. The caller still has to check which seals are set.
    ///
    /// # Errors
    /// It is not such memory.
    pub fn memory(self) -> io::Result<OwnedFd> {
        let is = |fd: &OwnedFd| fcntl_get_seals(fd).is_ok();
        self.take_if(is, "not memory that can be sealed (memfd)")
    }

    /// Converts it to an eventfd and makes it nonblocking.
    ///
    /// # Errors
    /// It is not an eventfd.
    pub fn eventfd(self) -> io::Result<OwnedFd> {
        self.take_if(is_eventfd, "not an eventfd")
    }

    /// Converts it to a Unix stream socket. Descriptors of any kind may wait in it: see [`Apart`].
    ///
    /// # Errors
    /// It is not a Unix stream socket.
    pub fn unix_stream(self) -> io::Result<Apart<UnixStream>> {
        let closer = self.0.closer().clone();
        let is = |fd: &OwnedFd| {
            socket_domain(fd) == Ok(AddressFamily::UNIX)
                && socket_type(fd) == Ok(SocketType::STREAM)
        };
        let fd = self.take_if(is, "not a Unix stream socket")?;
        Ok(Apart::new(fd.into(), &closer))
    }

    /// Converts it to a Unix socket of packets (`SOCK_SEQPACKET`). Descriptors of any kind may wait in it: see [`Apart`].
    ///
    /// # Errors
    /// It is not such a socket.
    pub fn unix_packets(self) -> io::Result<Apart<OwnedFd>> {
        let closer = self.0.closer().clone();
        let is = |fd: &OwnedFd| {
            socket_domain(fd) == Ok(AddressFamily::UNIX)
                && socket_type(fd) == Ok(SocketType::SEQPACKET)
        };
        let fd = self.take_if(is, "not a Unix socket of packets")?;
        Ok(Apart::new(fd, &closer))
    }

    /// Converts it to a regular file. The file system may be FUSE, so any later use of the file may block.
    ///
    /// # Errors
    /// It is not a regular file.
    pub fn regular_file(self) -> io::Result<OwnedFd> {
        let is = |fd: &OwnedFd| {
            kind(fd.as_fd()) == Some(FileType::RegularFile)
                && fcntl_getfl(fd).is_ok_and(|flags| !flags.contains(OFlags::PATH))
        };
        self.take_if(is, "not a regular file")
    }

    /// Converts it without any check. Only for descriptors from a trusted process.
    pub fn trust(self) -> Option<OwnedFd> {
        self.0.take_if(|_| true)
    }

    fn take_if(self, is: impl FnOnce(&OwnedFd) -> bool, not: &'static str) -> io::Result<OwnedFd> {
        let other = || io::Error::new(io::ErrorKind::InvalidInput, not);
        self.0.take_if(is).ok_or_else(other)
    }
}

impl AsFd for Passed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The file type, from what the kernel knows without asking the file system.
fn kind(fd: BorrowedFd<'_>) -> Option<FileType> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = statx(fd, c"", flags, StatxFlags::TYPE).ok()?;
    Some(FileType::from_raw_mode(found.stx_mode.into()))
}

fn is_eventfd(fd: &OwnedFd) -> bool {
    kind(fd.as_fd()) == Some(FileType::Unknown)
        && fcntl_setfl(fd, OFlags::NONBLOCK).is_ok()
        && rustix::io::write(fd, &0u64.to_ne_bytes()) == Ok(8)
}
