//! How the agent reaches its host, and how the host reaches it.
//!
//! In a guest both are AF_VSOCK on port [`PORT`]:
//! - only CID 2, the host, is served; a process of this guest that dials by loopback is turned away;
//! - the agent dials from a *privileged* source port, which a process without `CAP_NET_BIND_SERVICE` cannot bind, so
//!   the host can tell the agent from an unprivileged process of the same guest. The same right is needed to listen.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use adit_channel::hello::PORT;
use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, VsockAddr};

use crate::conn::Conn;
use crate::sys;

/// The host's CID.
const HOST_CID: u32 = libc::VMADDR_CID_HOST;
/// Source ports of the agent: below 1024, and not the listener's own.
const SOURCE_PORTS: std::ops::RangeInclusive<u32> = 742..=1023;

/// The two directions of opening a stream.
pub trait Transport: Send + Sync {
    /// Binds and listens.
    ///
    /// # Errors
    /// No such carrier in this kernel, or the port is taken.
    fn listen(&self) -> io::Result<OwnedFd>;

    /// Whether an accepted stream comes from the host.
    fn is_host(&self, conn: &Conn) -> bool;

    /// Dials the host's well-known port.
    ///
    /// # Errors
    /// Nobody listens there, or there is no host.
    fn dial_host(&self) -> io::Result<Conn>;
}

/// Waits for one stream.
///
/// # Errors
/// A resource is short (`EMFILE`, `ENOMEM`) or the listener is gone.
pub fn accept(listener: &impl AsFd) -> io::Result<Conn> {
    loop {
        match sys::accept(listener.as_fd()) {
            Ok(fd) => return Ok(fd.into()),
            Err(Errno::EINTR | Errno::ECONNABORTED) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// AF_VSOCK.
#[derive(Clone, Copy, Debug, Default)]
pub struct Vsock;

impl Vsock {
    fn socket() -> nix::Result<OwnedFd> {
        socket::socket(
            AddressFamily::Vsock,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
    }
}

impl Transport for Vsock {
    fn listen(&self) -> io::Result<OwnedFd> {
        let fd = Self::socket()?;
        socket::bind(fd.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, PORT))?;
        socket::listen(&fd, Backlog::MAXCONN)?;
        Ok(fd)
    }

    fn is_host(&self, conn: &Conn) -> bool {
        socket::getpeername::<VsockAddr>(conn.as_fd().as_raw_fd())
            .is_ok_and(|peer| peer.cid() == HOST_CID)
    }

    fn dial_host(&self) -> io::Result<Conn> {
        let fd = Self::socket()?;
        // A random start: the peer may still hold the last port in its closing state.
        let span = SOURCE_PORTS.end() - SOURCE_PORTS.start() + 1;
        let first = getrandom::u32().unwrap_or(0) % span;
        let bound = (0..span)
            .map(|i| SOURCE_PORTS.start() + (first + i) % span)
            .find_map(|port| {
                match socket::bind(fd.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port)) {
                    Err(Errno::EADDRINUSE) => None,
                    other => Some(other),
                }
            });
        bound.unwrap_or(Err(Errno::EADDRINUSE))?;
        socket::connect(fd.as_raw_fd(), &VsockAddr::new(HOST_CID, PORT))?;
        Ok(fd.into())
    }
}

/// Unix sockets in one directory: `guest.sock` is ours, `host.sock` the host's. For tests on machines without vsock.
#[cfg(any(test, feature = "test-util"))]
#[derive(Clone, Debug)]
pub struct UnixDir(pub std::path::PathBuf);

#[cfg(any(test, feature = "test-util"))]
impl Transport for UnixDir {
    fn listen(&self) -> io::Result<OwnedFd> {
        let path = self.0.join("guest.sock");
        let _ = std::fs::remove_file(&path);
        Ok(std::os::unix::net::UnixListener::bind(path)?.into())
    }

    fn is_host(&self, _: &Conn) -> bool {
        true
    }

    fn dial_host(&self) -> io::Result<Conn> {
        Ok(OwnedFd::from(std::os::unix::net::UnixStream::connect(
            self.0.join("host.sock"),
        )?)
        .into())
    }
}
