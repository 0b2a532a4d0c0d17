//! The fork server: one process with one thread that becomes a session process by a fork alone.
//!
//! ```text
//! agent ── SEQPACKET: a byte, with the stream and a pipe ──► fork server ── fork ──► session process
//!       ◄─ pid, or the error's number ─────────────────────┘
//! ```
//! Starting this program anew, and moving it into the sessions' cgroup, takes longer than most commands: for the move the kernel waits
//! until all processors have been somewhere else. The fork server has done both once. It is started with the first session; it ends when
//! its agent has ended, and the sessions go on.

use std::ffi::CString;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, send, sendmsg,
    socketpair,
};

use crate::exec::{cgroup, reap, sessions};
use crate::{protect, sys};

/// Name of the hidden command.
pub const COMMAND: &str = "exec-sessions";

/// The agent's end.
#[derive(Debug)]
pub struct ForkServer {
    /// This program.
    program: PathBuf,
    line: Mutex<Option<OwnedFd>>,
}

impl ForkServer {
    /// One that is started when it is needed.
    pub fn of(program: &Path) -> Self {
        Self {
            program: program.to_owned(),
            line: Mutex::default(),
        }
    }

    /// Starts a session process, which has this stream, and is told this. `cgroups`: where a cgroup can be made, if anywhere.
    ///
    /// # Errors
    /// There is none then, or it has ended.
    pub fn start(
        &self,
        stream: BorrowedFd<'_>,
        told: &[u8],
        cgroups: Option<&Path>,
    ) -> io::Result<()> {
        let (theirs, mut ours) = io::pipe()?;
        {
            let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
            let sent = match &*line {
                Some(line) => ask(line, stream, theirs.as_fd()).is_ok(),
                None => false,
            };
            if !sent {
                // There was none, or it has been killed: whatever it was not sent did not begin.
                let new = self.launch(cgroups)?;
                ask(line.insert(new), stream, theirs.as_fd())?;
            }
            let answered = line.as_ref().map_or_else(
                || Err(io::ErrorKind::NotConnected.into()),
                |line| answer(line),
            );
            if answered.is_err() {
                *line = None;
            }
            sessions::started(answered??);
        }
        drop(theirs);
        // One that does not take it has ended, and says why.
        let _ = ours.write_all(told);
        Ok(())
    }

    fn launch(&self, cgroups: Option<&Path>) -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let setup = sys::ChildSetup {
            cgroup: cgroups.and_then(cgroup::of_sessions),
            user: None,
            cwd: CString::new("/").map_err(io::Error::other)?,
            inherited: protect::inherited(),
            tty: false,
            dies_with_parent: false,
        };
        let mut command = Command::new(&self.program);
        command.arg(COMMAND).stdin(theirs).stdout(Stdio::null());
        // Daemons that sessions left may have ended meanwhile.
        cgroups.into_iter().for_each(cgroup::sweep);
        let (_, claim) = reap::spawn(|| {
            let child = sys::spawn(&mut command, setup)?;
            sessions::started(child.id().cast_signed());
            Ok(child)
        })?;
        // Whoever reaps orphans waits for it.
        drop(claim);
        Ok(ours)
    }
}

fn ask(line: &OwnedFd, stream: BorrowedFd<'_>, pipe: BorrowedFd<'_>) -> io::Result<()> {
    let fds = [stream, pipe];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(
        line,
        &[IoSlice::new(&[1])],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// The pid of the new process, or why there is none.
fn answer(line: &OwnedFd) -> io::Result<io::Result<i32>> {
    let mut bytes = [0; 4];
    loop {
        return match recv(line, &mut bytes, RecvFlags::empty()) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(e) => Err(e.into()),
            Ok((4, _)) => Ok(match i32::from_le_bytes(bytes) {
                pid @ 1.. => Ok(pid),
                e => Err(io::Error::from_raw_os_error(e.saturating_neg())),
            }),
            Ok(_) => Err(io::Error::other(
                "the process that starts sessions has ended",
            )),
        };
    }
}

/// Serves the agent at standard input until it has ended. Returns in each session process, too: when its session is over.
///
/// # Errors
/// It cannot serve.
pub fn serve() -> io::Result<()> {
    let alone = sys::Alone::now()?;
    cgroup::know_shares();
    let line = io::stdin().as_fd().try_clone_to_owned()?;
    // The kernel waits for sessions that have ended.
    sys::ignore_signal(nix::sys::signal::Signal::SIGCHLD);
    while let Some([stream, pipe]) = receive(&line)? {
        let started = sys::fork(&alone);
        if let Ok(None) = started {
            drop(line);
            nix::unistd::setsid()?;
            rustix::stdio::dup2_stdin(&pipe)?;
            rustix::stdio::dup2_stdout(&stream)?;
            drop((stream, pipe));
            return super::run();
        }
        let said = match started {
            Ok(pid) => pid.unwrap_or(0),
            Err(e) => -e.raw_os_error().unwrap_or(1),
        };
        send(&line, &said.to_le_bytes(), SendFlags::NOSIGNAL)?;
    }
    Ok(())
}

/// The next session's stream, and the pipe by which it is told; none: the agent has ended.
fn receive(line: &OwnedFd) -> io::Result<Option<[OwnedFd; 2]>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        let mut parts = [IoSliceMut::new(&mut byte)];
        match recvmsg(line, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            got => break got?,
        }
    };
    if got.bytes == 0 {
        return Ok(None);
    }
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fds: Vec<OwnedFd> = fds.flatten().collect();
    let fds = fds.try_into();
    fds.map(Some)
        .map_err(|_| io::Error::other("a session has a stream and a pipe"))
}
