//! How the agent reaches its host, and how the host reaches it.
//!
//! In a guest both are AF_VSOCK on port [`PORT`]:
//! - only CID 2, the host, is served; a process of this guest that dials by loopback is refused;
//! - the agent dials from a *privileged* source port, which a process without `CAP_NET_BIND_SERVICE` cannot bind, so
//!   the host can tell the agent from an unprivileged process of the same guest. The same right is needed to listen.

mod chunked;
pub mod ring;

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use adit_channel::hello::{CHUNKS, PORT};
use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType};
use vsock::{VsockAddr, VsockListener};

use self::chunked::Chunked;
use crate::conn::Conn;
use crate::exec::reap;
use crate::relay;

/// The host's CID.
const HOST_CID: u32 = vsock::VMADDR_CID_HOST;
/// The kernel's driver of a VM's vsock device.
const DRIVER: &str = "vmw_vsock_virtio_transport";
/// Source ports of the agent: below 1024, and not the listener's own.
const SOURCE_PORTS: std::ops::RangeInclusive<u32> = 742..=1023;

/// The two directions of opening a stream.
pub trait Transport: Send + Sync {
    /// Binds and listens.
    ///
    /// # Errors
    /// No such carrier in this kernel, or the port is in use.
    fn listen(&self) -> io::Result<Box<dyn Listen>>;

    /// Dials the host's well-known port.
    ///
    /// # Errors
    /// Nobody listens there, or there is no host.
    fn dial_host(&self) -> io::Result<Conn>;
}

/// Where the host's streams arrive.
pub trait Listen: Send {
    /// Waits for one stream; `None`: it came from another peer than the host, and is closed.
    ///
    /// # Errors
    /// A resource is short (`EMFILE`, `ENOMEM`) or the listener is gone.
    fn accept(&self) -> io::Result<Option<Conn>>;
}

/// A stream that the host opened.
pub trait HostStream: Send + 'static {
    /// Limits how long a read or a write may take from now on.
    ///
    /// # Errors
    /// The kernel refuses.
    fn set_timeout(&self, limit: Option<Duration>) -> io::Result<()>;

    /// To read and write.
    fn io(&self) -> Box<dyn ReadWrite + '_>;

    /// Ends our direction.
    ///
    /// # Errors
    /// The stream is gone.
    fn end_sending(&self) -> io::Result<()>;

    /// Features of hellos that it has.
    fn features(&self) -> u64 {
        0
    }

    /// It as it is behind a hello with these of its features.
    fn speaking(self, _features: u64) -> Box<dyn HostStream>
    where
        Self: Sized,
    {
        Box::new(self)
    }

    /// Whether nobody but the host can have dialled it, whatever its hello says.
    fn is_hosts(&self) -> bool {
        false
    }

    /// The socket that it is, for another process; itself, if its bytes are not those of a socket.
    ///
    /// # Errors
    /// It is none.
    fn into_socket(self: Box<Self>) -> Result<OwnedFd, Box<dyn HostStream>>;

    /// Relays to a local socket and back, without a time limit; may return before the streams have ended.
    ///
    /// # Errors
    /// The bytes cannot be moved.
    fn relay_to(self: Box<Self>, local: Conn) -> io::Result<()>;
}

/// Both.
pub trait ReadWrite: Read + Write {}

impl<T: Read + Write> ReadWrite for T {}

impl HostStream for Conn {
    fn set_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_timeout(limit)
    }

    fn io(&self) -> Box<dyn ReadWrite + '_> {
        Box::new(self)
    }

    fn end_sending(&self) -> io::Result<()> {
        self.shutdown_write()
    }

    fn features(&self) -> u64 {
        CHUNKS
    }

    fn speaking(self, features: u64) -> Box<dyn HostStream> {
        match features & CHUNKS {
            0 => Box::new(self),
            _ => Box::new(Chunked::new(self)),
        }
    }

    fn into_socket(self: Box<Self>) -> Result<OwnedFd, Box<dyn HostStream>> {
        Ok((*self).into())
    }

    fn relay_to(self: Box<Self>, local: Self) -> io::Result<()> {
        relay::relay(&self, &local).map(drop)
    }
}

/// Tries again after a signal, or if the stream ended before it was accepted.
fn accepted<T>(mut accept: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match accept() {
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                ) => {}
            other => return other,
        }
    }
}

/// AF_VSOCK.
#[derive(Clone, Copy, Debug, Default)]
pub struct Vsock;

impl Transport for Vsock {
    fn listen(&self) -> io::Result<Box<dyn Listen>> {
        load_driver();
        let listener = VsockListener::bind_with_cid_port(vsock::VMADDR_CID_ANY, PORT)?;
        // The library asks for 128, which is also musl's SOMAXCONN. A burst of dials overflows that, and they are reset.
        socket::listen(&listener, Backlog::MAXALLOWABLE)?;
        Ok(Box::new(listener))
    }

    fn dial_host(&self) -> io::Result<Conn> {
        self.dial_host_at(PORT)
    }
}

/// Has the kernel load the driver of the VM's vsock device where udev has not done so: without it a dial of the host ends in this
/// guest itself, if its kernel has `vsock_loopback`. Nearly always the driver is there, and no start has to wait for `modprobe`.
fn load_driver() {
    if Path::new("/sys/module").join(DRIVER).exists() {
        return;
    }
    let mut modprobe = Command::new("modprobe");
    modprobe.args(["-q", DRIVER]);
    let quiet = modprobe.stdin(Stdio::null()).stdout(Stdio::null());
    // It may be built in, or not be there: then listening says so.
    drop(reap::status(quiet.stderr(Stdio::null())));
}

impl Vsock {
    /// Dials a port of the host.
    ///
    /// # Errors
    /// Nobody listens there, or there is no host.
    pub fn dial_host_at(self, port: u32) -> io::Result<Conn> {
        // `VsockStream::connect` cannot bind the source port.
        let fd = socket::socket(
            AddressFamily::Vsock,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        // A random start: the peer may still hold the last port in its closing state.
        let span = SOURCE_PORTS.end() - SOURCE_PORTS.start() + 1;
        let first = getrandom::u32().unwrap_or(0) % span;
        let bound = (0..span)
            .map(|i| SOURCE_PORTS.start() + (first + i) % span)
            .find_map(|port| {
                let source = VsockAddr::new(vsock::VMADDR_CID_ANY, port);
                match socket::bind(fd.as_raw_fd(), &source) {
                    Err(Errno::EADDRINUSE) => None,
                    other => Some(other),
                }
            });
        bound.unwrap_or(Err(Errno::EADDRINUSE))?;
        socket::connect(fd.as_raw_fd(), &VsockAddr::new(HOST_CID, port))?;
        Ok(fd.into())
    }
}

impl Listen for VsockListener {
    fn accept(&self) -> io::Result<Option<Conn>> {
        let (stream, peer) = accepted(|| Self::accept(self))?;
        Ok((peer.cid() == HOST_CID).then(|| OwnedFd::from(stream).into()))
    }
}

/// Unix sockets in one directory: `guest.sock` is ours, `host.sock` the host's. For tests on machines without vsock.
#[cfg(any(test, feature = "test-util"))]
#[derive(Clone, Debug)]
pub struct UnixDir(pub std::path::PathBuf);

#[cfg(any(test, feature = "test-util"))]
impl Transport for UnixDir {
    fn listen(&self) -> io::Result<Box<dyn Listen>> {
        let path = self.0.join("guest.sock");
        adit_channel::socket_path::remove(&path)?;
        Ok(Box::new(std::os::unix::net::UnixListener::bind(path)?))
    }

    fn dial_host(&self) -> io::Result<Conn> {
        #[cfg(feature = "test-util")]
        if crate::upgrade::program::test::behaves("mute") {
            return Err(io::Error::other("mute"));
        }
        Ok(OwnedFd::from(std::os::unix::net::UnixStream::connect(
            self.0.join("host.sock"),
        )?)
        .into())
    }
}

#[cfg(any(test, feature = "test-util"))]
impl Listen for std::os::unix::net::UnixListener {
    fn accept(&self) -> io::Result<Option<Conn>> {
        let (stream, _) = accepted(|| Self::accept(self))?;
        Ok(Some(OwnedFd::from(stream).into()))
    }
}
