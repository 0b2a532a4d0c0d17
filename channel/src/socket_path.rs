//! Paths of Unix sockets. A path is used if it is free, or if it has a socket that a killed process left. Nothing but
//! a socket is ever deleted.
//!
//! | at the path | result |
//! |---|---|
//! | nothing | free |
//! | a socket without a listener | removed: a killed process left it |
//! | a socket with a listener | [`SocketPathError::InUse`] |
//! | anything else, including a link | [`SocketPathError::NotASocket`], and it stays |
//!
//! A refused `connect` is not enough to recognise a stale socket: Linux also refuses it for a regular file.

use std::fs::FileType;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

/// Maximum length of a socket's path in bytes (`sun_path` without the NUL).
pub const PATH_MAX: usize = 107;

/// Why a socket cannot be made at a path. The caller's fault.
#[derive(Debug, thiserror::Error)]
pub enum SocketPathError {
    /// The object there would have to be deleted, but it is not a socket.
    #[error("{} is {what} and not a socket: move it away, or choose another path", .path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
        /// The kind of object at the path.
        what: &'static str,
    },
    /// A process listens there.
    #[error("a process listens on {} already: end it if it is an old one, or choose another path", .0.display())]
    InUse(PathBuf),
    /// The path is longer than a socket's may be.
    #[error("path of {len} bytes is too long for a socket (at most {PATH_MAX}): {}; choose a shorter one", .path.display())]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// The file system returned an error.
    #[error("cannot {what} {}", .path.display())]
    Io {
        /// The failed operation.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl From<SocketPathError> for io::Error {
    fn from(e: SocketPathError) -> Self {
        let kind = match &e {
            SocketPathError::NotASocket { .. } => io::ErrorKind::AlreadyExists,
            SocketPathError::InUse(_) => io::ErrorKind::AddrInUse,
            SocketPathError::TooLong { .. } => io::ErrorKind::InvalidFilename,
            SocketPathError::Io { source, .. } => source.kind(),
        };
        Self::new(kind, e)
    }
}

/// Listens at a path. A socket without a listener is removed first.
///
/// # Errors
/// There is an object that must stay, or the socket cannot be made.
pub fn listen(path: &Path) -> Result<UnixListener, SocketPathError> {
    if has_stale(path)? {
        remove(path)?;
    }
    UnixListener::bind(path).map_err(failed("listen on", path))
}

/// Returns true if there is a socket that a killed process left, and false if there is nothing.
///
/// # Errors
/// There is an object that must stay, or the path cannot be a socket's.
pub fn has_stale(path: &Path) -> Result<bool, SocketPathError> {
    check_len(path)?;
    if !is_socket(path)? {
        return Ok(false);
    }
    match connect_now(path) {
        // The socket is not bound, or nothing listens on it any more.
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        // The socket has another type (`EPROTOTYPE`) or a full backlog (`EAGAIN`), so it is in use.
        Ok(_) => Err(SocketPathError::InUse(path.to_owned())),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
            Err(SocketPathError::InUse(path.to_owned()))
        }
        Err(e) if e.raw_os_error() == Some(Errno::EPROTOTYPE as i32) => {
            Err(SocketPathError::InUse(path.to_owned()))
        }
        Err(e) => Err(failed("connect to", path)(e)),
    }
}

/// Removes a socket, if there is one. The caller must know that nothing listens on it, for example because it holds a
/// lock, or because the socket was its own.
///
/// # Errors
/// Another object is there, and stays. Or the socket cannot be removed.
pub fn remove(path: &Path) -> Result<(), SocketPathError> {
    if !is_socket(path)? {
        return Ok(());
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(e)),
        _ => Ok(()),
    }
}

/// Connects without waiting. `WouldBlock` means that the listener's backlog is full.
///
/// # Errors
/// Nothing listens there, or the path cannot be a socket's path.
pub fn connect_now(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(fd.into())
}

/// Checks the path of a VMM's socket, beside which there are others: `PATH_741` for what the guest dials at port 741.
///
/// # Errors
/// Why it cannot be used, for people.
pub fn check_hybrid(path: &Path) -> Result<(), String> {
    /// Bytes of the longest `_PORT`.
    const SUFFIX_LEN: usize = 11;
    const MOST: usize = PATH_MAX - SUFFIX_LEN;
    let bytes = path.as_os_str().as_encoded_bytes();
    if !path.is_absolute() || path.file_name().is_none() || bytes.contains(&0) {
        return Err(format!(
            "{} is not the absolute path of a socket",
            path.display()
        ));
    }
    // Another spelling would be another VM's for whoever compares.
    if path
        .components()
        .any(|c| matches!(c, std::path::Component::ParentDir))
    {
        return Err(format!("{} has `..` in it", path.display()));
    }
    match bytes.len() > MOST {
        true => Err(format!(
            "a path of {} bytes is too long: at most {MOST}, because `_PORT` comes behind it",
            bytes.len()
        )),
        false => Ok(()),
    }
}

/// Checks the length of a path.
///
/// # Errors
/// It is too long for a socket.
pub fn check_len(path: &Path) -> Result<(), SocketPathError> {
    let len = path.as_os_str().len();
    match len <= PATH_MAX {
        true => Ok(()),
        false => Err(SocketPathError::TooLong {
            path: path.to_owned(),
            len,
        }),
    }
}

/// Returns true if there is a socket, and false if there is nothing.
fn is_socket(path: &Path) -> Result<bool, SocketPathError> {
    match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => Ok(true),
        Ok(meta) => Err(SocketPathError::NotASocket {
            path: path.to_owned(),
            what: name(meta.file_type()),
        }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(failed("look at", path)(e)),
    }
}

fn name(kind: FileType) -> &'static str {
    match () {
        () if kind.is_file() => "a regular file",
        () if kind.is_dir() => "a directory",
        () if kind.is_symlink() => "a symbolic link",
        () if kind.is_fifo() => "a pipe",
        () => "a device",
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SocketPathError {
    let path = path.to_owned();
    move |source| SocketPathError::Io { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::symlink;

    use nix::sys::socket::{Backlog, bind, listen as listen_on};

    fn seqpacket(path: &Path) -> OwnedFd {
        let flags = SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        bind(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        listen_on(&fd, Backlog::new(1).unwrap()).unwrap();
        fd
    }

    #[test]
    fn a_stale_socket_of_any_type_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        drop(listen(&path).unwrap());
        drop(listen(&path).unwrap());
        remove(&path).unwrap();
        drop(seqpacket(&path));
        drop(listen(&path).unwrap());
        remove(&path).unwrap();
        assert!(!path.exists());
        remove(&path).unwrap();
    }

    #[test]
    fn an_object_that_is_not_a_socket_is_not_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("file"), "precious").unwrap();
        std::fs::create_dir(at("dir")).unwrap();
        drop(UnixListener::bind(at("dead")).unwrap());
        symlink(at("dead"), at("link")).unwrap();
        symlink(at("nowhere"), at("dangling")).unwrap();
        for name in ["file", "dir", "link", "dangling"] {
            for result in [listen(&at(name)).map(drop), remove(&at(name))] {
                let error = result.unwrap_err();
                assert!(
                    matches!(error, SocketPathError::NotASocket { .. }),
                    "{error}"
                );
            }
        }
        assert_eq!(std::fs::read(at("file")).unwrap(), b"precious");
        assert!(at("dead").exists() && at("link").is_symlink() && at("dangling").is_symlink());
    }

    #[test]
    fn a_socket_in_use_is_not_deleted_even_with_a_full_backlog_or_another_type() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let theirs = listen(&path).unwrap();
        let in_use = || matches!(listen(&path), Err(SocketPathError::InUse(_)));
        assert!(in_use());
        let mut waiting = Vec::new();
        while let Ok(client) = connect_now(&path) {
            waiting.push(client);
        }
        assert!(in_use(), "with {} connections waiting", waiting.len());
        drop((theirs, waiting));
        remove(&path).unwrap();
        let _packets = seqpacket(&path);
        assert!(in_use());
    }

    #[test]
    fn a_path_that_is_too_long_gives_its_own_error() {
        let path = Path::new("/tmp").join("x".repeat(PATH_MAX));
        let error = listen(&path).unwrap_err();
        assert!(
            matches!(error, SocketPathError::TooLong { len, .. } if len > PATH_MAX),
            "{error}"
        );
    }
}
