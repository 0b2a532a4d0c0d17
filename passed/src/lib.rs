//! Descriptors that another process passed (`SCM_RIGHTS`), until it is known what they are.
//!
//! Any file may be on a file system in user space (FUSE), whose server answers when it likes, or never. Whoever asks for the
//! size of such a file waits, and so does whoever closes its descriptor, since a close asks the file system too; no signal
//! ends that. A TCP socket with `SO_LINGER` and unsent data waits in its last close. So nothing is asked here that the
//! kernel does not answer by itself, and a closer's own thread closes what was passed:
//!
//! | what is wanted | how it is known | |
//! |---|---|---|
//! | memory | it has seals, which only memory has (`F_GET_SEALS`) | [`Passed::memory`] |
//! | a doorbell | it has no type of file, by what is known without asking (`AT_STATX_DONT_SYNC`), and takes eight bytes of zero | [`Passed::eventfd`] |
//! | a Unix stream | it is a socket, of that family and type (`getsockopt`) | [`Passed::unix_stream`] |
//! | a regular file | its type, by what is known without asking | [`Passed::regular_file`] |
//!
//! (`/proc/self/fd` would name an eventfd without the write. A sandboxed process cannot read it; and of what has no type, the
//! write changes only an eventfd, by nothing.)
//!
//! - [`receive`] is the one place that takes descriptors out of a socket. Each is owned before anything else is looked at,
//!   also where the kernel could install only some of them because the table was full.
//! - A [`Closer`] is one owner's queue: whatever one VM passes never keeps another VM's descriptors open. While
//!   [`PENDING_MAX`] of its descriptors (or fewer) wait to be closed, its owner listens to nobody ([`Closer::is_full`]).
//! - A Unix socket on which descriptors can wait is closed by a closer, too ([`Apart`]): the kernel closes those
//!   within the socket's own close. For the same reason such a socket is never read without room for descriptors.
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

/// A descriptor of which nothing is known. Dropped, it is closed by its closer.
#[derive(Debug)]
pub struct Passed(Apart<OwnedFd>);

impl From<OwnedFd> for Passed {
    /// Of this process' own closer.
    fn from(fd: OwnedFd) -> Self {
        Self::new(fd, &Closer::shared())
    }
}

impl Passed {
    /// Takes a descriptor that is closed by `closer`.
    pub fn new(fd: OwnedFd, closer: &Closer) -> Self {
        Self(Apart::new(fd, closer))
    }

    /// Another one of the same file.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self::new(self.0.try_clone()?, self.0.closer()))
    }

    /// Takes it for memory: the seals that it has are still to be looked at.
    ///
    /// # Errors
    /// It is something else.
    pub fn memory(self) -> io::Result<OwnedFd> {
        let is = |fd: &OwnedFd| fcntl_get_seals(fd).is_ok();
        self.take_if(is, "not memory that can be sealed (memfd)")
    }

    /// Takes it for an eventfd, which it makes nonblocking.
    ///
    /// # Errors
    /// It is something else.
    pub fn eventfd(self) -> io::Result<OwnedFd> {
        self.take_if(is_eventfd, "not an eventfd")
    }

    /// Takes it for a stream socket of the Unix family. What waits in it may be anything: see [`Apart`].
    ///
    /// # Errors
    /// It is something else.
    pub fn unix_stream(self) -> io::Result<Apart<UnixStream>> {
        let closer = self.0.closer().clone();
        let is = |fd: &OwnedFd| {
            socket_domain(fd) == Ok(AddressFamily::UNIX)
                && socket_type(fd) == Ok(SocketType::STREAM)
        };
        let fd = self.take_if(is, "not a Unix stream socket")?;
        Ok(Apart::new(fd.into(), &closer))
    }

    /// Takes it for a regular file. Its file system may be anybody's: it is asked as soon as the file is used.
    ///
    /// # Errors
    /// It is something else.
    pub fn regular_file(self) -> io::Result<OwnedFd> {
        let is = |fd: &OwnedFd| {
            kind(fd.as_fd()) == Some(FileType::RegularFile)
                && fcntl_getfl(fd).is_ok_and(|flags| !flags.contains(OFlags::PATH))
        };
        self.take_if(is, "not a regular file")
    }

    /// Takes it, whatever it is: what comes from a process that is trusted.
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

/// What the kernel knows of its type by itself.
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
