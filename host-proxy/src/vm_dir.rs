//! Removes the directory of a VM that is no more: what adit puts there, and nothing else.
//!
//! Names are looked up below descriptors of directories and no symbolic link is followed, so that whatever a port process or
//! an operator has put in a file's place, nothing outside of the directory is removed.

use std::io;
use std::path::Path;
use std::time::Duration;

use adit_names::VmId;
use adit_port::control::{
    CONTROL_SOCKET, HYBRID_HOST_SOCKET, HYBRID_SOCKET, IVSHMEM_SOCKET, LOCK, RING_SOCKET,
    VHOST_SOCKET, VMM_NOTE,
};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, FlockOperation, Mode, OFlags, flock, openat, statat, unlinkat,
};
use rustix::io::Errno;

use crate::monitor::port_log::{LOG, LOG_PAST};

/// How long whoever served the VM may take to let the directory go, once its socket is closed.
const LOCK_LIMIT: Duration = Duration::from_secs(1);
/// How often it is tried.
const LOCK_LOOK: Duration = Duration::from_millis(10);
/// Names of what stays that are said.
const NAMED_MAX: usize = 8;

/// What adit puts there, besides the lock, and the socket that a VMM makes where adit says (`carrier = "auto"`).
const FILES: &[&str] = &[
    CONTROL_SOCKET,
    VHOST_SOCKET,
    RING_SOCKET,
    IVSHMEM_SOCKET,
    HYBRID_SOCKET,
    HYBRID_HOST_SOCKET,
    LOG,
    LOG_PAST,
    adit_port::born::NOTE,
    adit_port::born::NEW_NOTE,
    VMM_NOTE,
];

/// Why a directory is still there.
#[derive(Debug, thiserror::Error)]
pub enum LeftError {
    /// Some process has its lock.
    #[error("a process still serves it")]
    Served,
    /// It has files that are not adit's.
    #[error("it holds what adit did not put there: {}", .0.join(", "))]
    Others(Vec<String>),
    /// It is a link, or no directory.
    #[error("it is not a directory")]
    NotADirectory,
    /// The file system refuses.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Removes the directory of a VM. One that is not there is no error.
///
/// # Errors
/// It stays, or some of it.
pub async fn remove(run_dir: &Path, vm: &VmId) -> Result<(), LeftError> {
    let begin = tokio::time::Instant::now();
    loop {
        match try_remove(run_dir, vm) {
            // It has closed its socket, and is about to end.
            Err(LeftError::Served) if begin.elapsed() < LOCK_LIMIT => {
                tokio::time::sleep(LOCK_LOOK).await;
            }
            done => return done,
        }
    }
}

fn try_remove(run_dir: &Path, vm: &VmId) -> Result<(), LeftError> {
    let failed = |e: Errno| LeftError::Io(e.into());
    let directory = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
    let parent = match openat(CWD, run_dir.join("vm"), directory, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        parent => parent.map_err(failed)?,
    };
    let dir = match openat(&parent, vm.as_str(), directory, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTDIR | Errno::LOOP) => return Err(LeftError::NotADirectory),
        dir => dir.map_err(failed)?,
    };
    // Nonblocking: it might be a pipe.
    let how = OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::RDONLY;
    let lock = match openat(&dir, LOCK, how, Mode::empty()) {
        Ok(lock) => Some(lock),
        Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => None,
        Err(e) => return Err(failed(e)),
    };
    if let Some(lock) = &lock {
        match flock(lock, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Err(LeftError::Served),
            locked => locked.map_err(failed)?,
        }
    }
    for name in FILES.iter().copied().chain([LOCK]) {
        match statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {}
            Err(e) => return Err(failed(e)),
            Ok(stat) => match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile | FileType::Socket => {
                    unlinkat(&dir, name, AtFlags::empty()).map_err(failed)?;
                }
                _ => {}
            },
        }
    }
    match unlinkat(&parent, vm.as_str(), AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::NOTEMPTY | Errno::EXIST) => {
            let names = Dir::read_from(&dir).map_err(failed)?.flatten();
            let names =
                names.map(|e| adit_names::escape(&e.file_name().to_string_lossy()).to_string());
            let others = names.filter(|name| name != "." && name != "..");
            Err(LeftError::Others(others.take(NAMED_MAX).collect()))
        }
        Err(e) => Err(failed(e)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    fn vm() -> VmId {
        "web-1".parse().unwrap()
    }

    #[test]
    fn what_adit_put_there_goes_with_the_directory() {
        let run = tempfile::tempdir().unwrap();
        let dir = run.path().join("vm/web-1");
        fs::create_dir_all(&dir).unwrap();
        drop(UnixListener::bind(dir.join(CONTROL_SOCKET)).unwrap());
        for file in [LOG, LOCK, VMM_NOTE] {
            fs::write(dir.join(file), "x").unwrap();
        }
        try_remove(run.path(), &vm()).unwrap();
        assert!(!dir.exists());
        // Nothing there is nothing to do.
        try_remove(run.path(), &vm()).unwrap();
    }

    #[test]
    fn what_adit_did_not_put_there_stays_and_is_named_and_no_link_is_followed() {
        let run = tempfile::tempdir().unwrap();
        let dir = run.path().join("vm/web-1");
        fs::create_dir_all(dir.join("port.log.1")).unwrap();
        let outside = run.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join(LOG), "precious").unwrap();
        fs::write(dir.join("notes"), "precious").unwrap();
        symlink(outside.join(LOG), dir.join(LOG)).unwrap();
        symlink(outside.join(LOG), dir.join(LOCK)).unwrap();
        let Err(LeftError::Others(mut others)) = try_remove(run.path(), &vm()) else {
            panic!()
        };
        others.sort();
        assert_eq!(others, ["lock", "notes", "port.log", "port.log.1"]);
        assert_eq!(fs::read(dir.join("notes")).unwrap(), b"precious");
        // The directory itself may be a link, too.
        fs::rename(&dir, run.path().join("moved")).unwrap();
        symlink(&outside, &dir).unwrap();
        let refused = try_remove(run.path(), &vm());
        assert!(
            matches!(refused, Err(LeftError::NotADirectory)),
            "{refused:?}"
        );
        assert_eq!(fs::read(outside.join(LOG)).unwrap(), b"precious");
    }

    #[test]
    fn a_directory_whose_lock_is_held_stays() {
        let run = tempfile::tempdir().unwrap();
        let dir = run.path().join("vm/web-1");
        fs::create_dir_all(&dir).unwrap();
        let file = fs::File::create(dir.join(LOCK)).unwrap();
        flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
        let refused = try_remove(run.path(), &vm());
        assert!(matches!(refused, Err(LeftError::Served)), "{refused:?}");
        assert!(dir.exists());
    }
}
