//! A local socket that clients connect to.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::Mode;
use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream, UnixListener};

use super::spec::Listen;
use crate::error::Failure;

/// When a TCP client is asked whether it is still there, and how often then. One that was killed after it had ended its half
/// would else hold its connection for as long as the guest says nothing.
const KEEP_ALIVE: Duration = Duration::from_secs(60);

/// A socket that listens.
pub enum Listener {
    Tcp(TcpListener),
    Unix {
        listener: UnixListener,
        _file: SocketFile,
    },
}

impl Listener {
    /// Listens. Returns where, too: the port may be any.
    pub async fn bind(listen: &Listen) -> Result<(Self, String), Failure> {
        let failed = |at: &str, e: &io::Error| {
            Failure::io(&format!("cannot listen on {at}"), e).help(match e.kind() {
                io::ErrorKind::AddrInUse => {
                    "something listens there already: take another, or port 0 for any"
                }
                io::ErrorKind::PermissionDenied => {
                    "ports below 1024 are root's, and a socket needs a directory that you may write"
                }
                _ => "",
            })
        };
        match listen {
            Listen::Tcp(address) => {
                let bound = TcpListener::bind(address).await;
                let bound = bound.and_then(|listener| Ok((listener.local_addr()?, listener)));
                let (at, listener) = bound.map_err(|e| failed(&address.to_string(), &e))?;
                Ok((Self::Tcp(listener), at.to_string()))
            }
            Listen::Unix(path) => {
                let at = format!("unix:{}", path.display());
                let (listener, _file) = bind_unix(path).map_err(|e| failed(&at, &e))?;
                Ok((Self::Unix { listener, _file }, at))
            }
        }
    }

    pub async fn accept(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Tcp(listener) => {
                let (client, _) = listener.accept().await?;
                prepare(&client)?;
                Ok(client.into_std()?.into())
            }
            Self::Unix { listener, .. } => Ok(listener.accept().await?.0.into_std()?.into()),
        }
    }

    /// Whether others than this host's users can connect.
    pub fn is_open_to_others(&self) -> bool {
        match self {
            Self::Tcp(listener) => listener
                .local_addr()
                .is_ok_and(|at| !at.ip().to_canonical().is_loopback()),
            Self::Unix { .. } => false,
        }
    }
}

fn prepare(client: &TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    sockopt::set_tcp_keepidle(client, KEEP_ALIVE)?;
    sockopt::set_tcp_keepintvl(client, KEEP_ALIVE)?;
    Ok(sockopt::set_socket_keepalive(client, true)?)
}

/// The file of a Unix socket. Drop removes it, if it is still the one that was made.
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    made: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: std::path::absolute(path)?,
            made: identity(path)?,
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|there| there == self.made) {
            // Nobody is left to be told.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let there = std::fs::symlink_metadata(path)?;
    Ok((there.dev(), there.ino()))
}

/// Makes a socket that only this user can connect to.
fn bind_unix(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    let bind = || {
        // No thread runs that could make another file meanwhile.
        let before = rustix::process::umask(Mode::from_raw_mode(0o177));
        let bound = UnixListener::bind(path);
        rustix::process::umask(before);
        bound
    };
    let listener = match bind() {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse && is_left_over(path) => {
            std::fs::remove_file(path)?;
            bind()?
        }
        bound => bound?,
    };
    Ok((listener, SocketFile::of(path)?))
}

/// Whether a path is a socket on which nobody listens any more.
fn is_left_over(path: &Path) -> bool {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    is_socket
        && std::os::unix::net::UnixStream::connect(path)
            .is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
}
