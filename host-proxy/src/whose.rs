//! Which process is at the other end of a VM's control socket: what the kernel says of it, never what it says of itself.
//!
//! | the listener's user | it is |
//! |---|---|
//! | the VM's own | its port process, if it is the one that was just started, or the one that noted itself in the VM's directory |
//! | root, or aditd's | a VMM that serves its VM itself, or a port process of an aditd that had no users to give |
//! | another | not to be trusted: refused |
//!
//! A pidfd is kept for as long as the process is followed: its number may be reused, and the process that has it then must
//! not be shown or killed instead.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use adit_port::born::Born;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Uid;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::uids;

/// How often to check whether a process that was told to end has ended.
const END_LOOK: Duration = Duration::from_millis(10);

/// A process, identified by its pidfd.
#[derive(Debug)]
pub struct PortProcess {
    pid: i32,
    /// `None`: it is in another PID namespace.
    fd: Option<OwnedFd>,
    ours: bool,
}

/// What the worker knows of a process that serves a VM.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    pid: u32,
    ours: bool,
}

impl Peer {
    /// As the monitor says.
    pub fn new(pid: u32, ours: bool) -> Self {
        Self { pid, ours }
    }

    /// Its process id; 0 if it has none in this PID namespace.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether aditd started it, this one or an earlier one, and it is no VMM.
    pub fn is_ours(&self) -> bool {
        self.ours
    }
}

impl PortProcess {
    /// A child that was not waited for yet, and another pidfd of it to wait with.
    ///
    /// # Errors
    /// No descriptor can be had.
    pub fn started(pid: u32) -> io::Result<(Self, OwnedFd)> {
        let pid = pid.cast_signed();
        let fd = open(pid)?;
        let another = fd.try_clone()?;
        let process = Self {
            pid,
            fd: Some(fd),
            ours: true,
        };
        Ok((process, another))
    }

    /// The one that listens where `socket` is connected to. `dir`: the VM's directory; `own`: the VM's own user; `started`:
    /// the port process that was just started for it. `None`: it has ended.
    ///
    /// # Errors
    /// aditd must not trust it; the error says what to do.
    pub fn behind(
        socket: BorrowedFd<'_>,
        dir: &Path,
        own: Option<u32>,
        started: Option<&Self>,
    ) -> io::Result<Option<Self>> {
        let peer = getsockopt(&socket, PeerCredentials)?;
        let (pid, uid) = (peer.pid(), peer.uid());
        if let Some(child) = started
            && child.pid == pid
            && own.is_none_or(|own| own == uid)
        {
            let fd = child.fd.as_ref().map(OwnedFd::try_clone).transpose()?;
            let ours = true;
            return Ok(Some(Self { pid, fd, ours }));
        }
        let us = Uid::effective().as_raw();
        let is_own = own == Some(uid);
        if !is_own && uid != 0 && uid != us {
            return Err(stranger(pid, uid, dir, "is not the VM's port process"));
        }
        let fd = match (pid, open(pid)) {
            // Of another PID namespace: a VMM that is trusted by its user.
            (0, _) if !is_own => None,
            (_, Ok(fd)) => Some(fd),
            (_, Err(e)) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            (_, Err(e)) => return Err(e),
        };
        let process = Self {
            pid,
            fd,
            ours: is_own,
        };
        // Looked up first: it is this process's if that still runs now.
        let born = Born::of(pid);
        if process.has_ended() {
            return Ok(None);
        }
        if is_own && (born.is_none() || born != Born::noted(dir)) {
            return Err(stranger(pid, uid, dir, "did not take that directory"));
        }
        Ok(Some(process))
    }

    /// The one that noted itself in a VM's directory, if it still runs, and as the VM's own user.
    ///
    /// # Errors
    /// No descriptor can be had.
    pub fn noted(dir: &Path, own: u32) -> io::Result<Option<Self>> {
        let Some(born) = Born::noted(dir) else {
            return Ok(None);
        };
        let fd = match open(born.pid) {
            Ok(fd) => Some(fd),
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(e) => return Err(e),
        };
        let process = Self {
            pid: born.pid,
            fd,
            ours: true,
        };
        let users = uids::of_process(&Path::new("/proc").join(born.pid.to_string()));
        let is_own = users.iter().all(|uid| *uid == own) && !users.is_empty();
        let is_it = is_own && Born::of(born.pid) == Some(born) && !process.has_ended();
        Ok(is_it.then_some(process))
    }

    /// Its process id; 0 if it has none in this PID namespace.
    pub fn pid(&self) -> u32 {
        self.pid.cast_unsigned()
    }

    /// Whether aditd started it, this one or an earlier one, and it is no VMM.
    pub fn is_ours(&self) -> bool {
        self.ours
    }

    fn has_ended(&self) -> bool {
        let Some(fd) = &self.fd else { return false };
        let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
    }

    /// Waits until it has ended; once `limit` is over, ends it. One that is not ours is only waited for.
    pub async fn end_within(&self, limit: Duration) {
        let ended = async {
            while !self.has_ended() {
                tokio::time::sleep(END_LOOK).await;
            }
        };
        let ended = tokio::time::timeout(limit, ended).await;
        if let (Err(_), true, Some(fd)) = (ended, self.ours, &self.fd) {
            tracing::warn!(
                pid = self.pid,
                "the port process does not end when told to: killed"
            );
            // It may just have done so.
            let _ = pidfd_send_signal(fd, Signal::KILL);
        }
    }
}

fn open(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

fn stranger(pid: i32, uid: u32, dir: &Path, why: &str) -> io::Error {
    let dir = dir.display();
    io::Error::other(format!(
        "process {pid} of user {uid} listens on ctl.sock in {dir} and {why}: end it, and the VM's port process is started"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use adit_port::control::CONTROL_SOCKET;
    use std::os::unix::net::{UnixListener, UnixStream};

    fn listening() -> (tempfile::TempDir, UnixListener, UnixStream) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(CONTROL_SOCKET);
        let listener = UnixListener::bind(&path).unwrap();
        let socket = UnixStream::connect(&path).unwrap();
        (dir, listener, socket)
    }

    #[test]
    fn r115_a_process_of_the_vms_own_user_is_the_one_that_took_the_directory_or_nobody() {
        let (dir, _listener, socket) = listening();
        let own = Some(Uid::effective().as_raw());
        let behind = |own| PortProcess::behind(socket.as_fd(), dir.path(), own, None);
        // Nobody noted itself: its user alone is not enough.
        let refused = behind(own).unwrap_err().to_string();
        assert!(refused.contains("did not take"), "{refused}");
        Born::note(dir.path()).unwrap();
        let found = behind(own).unwrap().unwrap();
        assert!(found.is_ours() && found.pid() == std::process::id());
        // The same number, of a process that began at another time.
        let note = format!("{} 1\n", std::process::id());
        std::fs::write(dir.path().join(adit_port::born::NOTE), note).unwrap();
        behind(own).unwrap_err();
        // A process of root's or aditd's own is served, and never taken for one that may be ended.
        assert!(!behind(Some(70_001)).unwrap().unwrap().is_ours());
        assert!(!behind(None).unwrap().unwrap().is_ours());
    }

    #[test]
    fn r115_only_the_process_that_took_the_directory_and_is_the_vms_user_is_known_by_its_note() {
        let dir = tempfile::tempdir().unwrap();
        let own = Uid::effective().as_raw();
        let noted = |own| PortProcess::noted(dir.path(), own).unwrap();
        assert!(noted(own).is_none());
        Born::note(dir.path()).unwrap();
        assert_eq!(noted(own).unwrap().pid(), std::process::id());
        assert!(noted(own + 1).is_none());
        let note = dir.path().join(adit_port::born::NOTE);
        for other in [format!("{} 1\n", std::process::id()), "1 1\n".into()] {
            std::fs::write(&note, other).unwrap();
            assert!(noted(own).is_none());
        }
    }

    #[test]
    fn r115_one_that_does_not_end_when_told_is_ended_by_its_descriptor() {
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let (process, _) = PortProcess::started(child.id()).unwrap();
        assert!(!process.has_ended());
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_all().build().unwrap();
        runtime.block_on(process.end_within(Duration::from_millis(1)));
        assert!(!child.wait().unwrap().success());
        assert!(process.has_ended());
    }
}
