//! The VM's directory: private, locked by the process that serves the VM, and with its sockets.
//!
//! Only the lock keeps two processes apart. A socket file that exists while nobody has the lock is stale.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{Backlog, UnixAddr, bind, listen};
use nix::sys::stat::{Mode, umask};

use adit_channel::socket_path::{self, SocketPathError};
use adit_ringbuf_io::attach;

use crate::born::Born;
use crate::control::{CONTROL_SOCKET, IVSHMEM_SOCKET, LOCK, RING_SOCKET, VHOST_SOCKET};
use crate::control_io;

/// Why the directory cannot be used. The caller's fault, or the machine's.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// Another process serves the VM.
    #[error("already running: another port process serves {}", .0.display())]
    AlreadyRunning(PathBuf),
    /// The path is unsuitable for a socket, or the file there is not a socket and is left alone.
    #[error(transparent)]
    Socket(#[from] SocketPathError),
    /// The file system refuses.
    #[error("cannot {what} {}", .path.display())]
    Io {
        /// The operation.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The error.
        #[source]
        source: io::Error,
    },
}

/// The VM's directory. It is locked until this is dropped.
#[derive(Debug)]
pub struct Place {
    /// The VMM connects here.
    pub vhost: UnixListener,
    /// `aditd` connects here. Nonblocking.
    pub control: OwnedFd,
    /// A VMM offers a ring here.
    pub ring: attach::Listener,
    /// A stock QEMU gets a ring here.
    pub ivshmem: UnixListener,
    /// Held until this is dropped.
    pub lock: Flock<File>,
}

impl Place {
    /// Makes and locks the directory, binds the sockets, and listens.
    ///
    /// # Errors
    /// As [`PlaceError`] says.
    pub fn take(dir: &Path) -> Result<Self, PlaceError> {
        let place = Self::prepare(dir)?;
        place.listen().map_err(|source| PlaceError::Io {
            what: "listen on",
            path: dir.join(CONTROL_SOCKET),
            source,
        })?;
        Ok(place)
    }

    /// The same, but `aditd` cannot connect before [`listen`](Self::listen).
    ///
    /// # Errors
    /// As [`PlaceError`] says.
    pub fn prepare(dir: &Path) -> Result<Self, PlaceError> {
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| PlaceError::Io { what, path, source }
        };
        // Sockets must be as private as their directory.
        umask(Mode::from_bits_truncate(0o077));
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(failed("create", dir))?;
        std::fs::set_permissions(dir, Permissions::from_mode(0o700))
            .map_err(failed("make private", dir))?;
        let path = dir.join(LOCK);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed("create", &path))?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK)) => {
                return Err(PlaceError::AlreadyRunning(dir.to_owned()));
            }
            Err((_, e)) => return Err(failed("lock", &path)(e.into())),
        };
        Born::note(dir).map_err(failed("note the process in", dir))?;
        let path = free_path(dir, VHOST_SOCKET)?;
        let vhost = UnixListener::bind(&path).map_err(failed("bind", &path))?;
        let path = free_path(dir, RING_SOCKET)?;
        let ring = attach::Listener::bind(&path).map_err(failed("bind", &path))?;
        let path = free_path(dir, IVSHMEM_SOCKET)?;
        let ivshmem = UnixListener::bind(&path).map_err(failed("bind", &path))?;
        // Bound last: who can reach it can reach the others.
        let path = free_path(dir, CONTROL_SOCKET)?;
        let control = bind_control(&path).map_err(failed("bind", &path))?;
        Ok(Self {
            vhost,
            control,
            ring,
            ivshmem,
            lock,
        })
    }

    /// Removes the sockets of VMMs that speak vhost-user or offer a ring: this VM's does neither. Their listeners stay, and nobody
    /// finds them.
    ///
    /// # Errors
    /// As [`PlaceError`] says.
    pub fn withdraw(&self, dir: &Path) -> Result<(), PlaceError> {
        for socket in [VHOST_SOCKET, RING_SOCKET, IVSHMEM_SOCKET] {
            socket_path::remove(&dir.join(socket))?;
        }
        Ok(())
    }

    /// Lets `aditd` connect. From SO_PEERCRED it learns the user of the moment of this call.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn listen(&self) -> io::Result<()> {
        Ok(listen(&self.control, Backlog::new(8)?)?)
    }
}

/// Removes a stale socket. Does not try to connect to it first: a process that ends may close its sockets after its lock.
fn free_path(dir: &Path, name: &str) -> Result<PathBuf, PlaceError> {
    let path = dir.join(name);
    socket_path::check_len(&path)?;
    socket_path::remove(&path)?;
    Ok(path)
}

fn bind_control(path: &Path) -> io::Result<OwnedFd> {
    let sock = control_io::seqpacket()?;
    bind(sock.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(sock)
}

/// Connects to the control socket in a VM's directory; the connection is blocking.
///
/// # Errors
/// As [`control_io::connect`].
pub fn connect_control(dir: &Path) -> io::Result<OwnedFd> {
    let sock = control_io::connect(&dir.join(CONTROL_SOCKET))?;
    let sock = UnixStream::from(sock);
    sock.set_nonblocking(false)?;
    Ok(sock.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_sockets_are_replaced_and_a_live_place_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("web-1");
        let first = Place::take(&at).unwrap();
        assert_eq!(
            std::fs::metadata(&at).unwrap().permissions().mode() & 0o777,
            0o700
        );
        assert!(matches!(
            Place::take(&at),
            Err(PlaceError::AlreadyRunning(_))
        ));
        connect_control(&at).unwrap();
        drop(first); // the socket files stay, as after a kill
        assert_eq!(
            connect_control(&at).unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused
        );
        let _second = Place::take(&at).unwrap();
        connect_control(&at).unwrap();
    }

    #[test]
    fn what_is_no_socket_is_no_stale_socket() {
        for name in [CONTROL_SOCKET, VHOST_SOCKET, RING_SOCKET, IVSHMEM_SOCKET] {
            let dir = tempfile::tempdir().unwrap();
            let at = dir.path().join(name);
            std::fs::write(&at, "precious").unwrap();
            let refused = Place::take(dir.path()).unwrap_err();
            let why = matches!(
                refused,
                PlaceError::Socket(SocketPathError::NotASocket { .. })
            );
            assert!(why, "{refused}");
            assert_eq!(std::fs::read(&at).unwrap(), b"precious");
        }
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_said_so() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("x".repeat(100));
        assert!(matches!(
            Place::take(&at),
            Err(PlaceError::Socket(SocketPathError::TooLong { .. }))
        ));
    }
}
