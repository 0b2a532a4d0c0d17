//! The fork server: one process with one thread, of which a session process, the process of a copy, or the one that freezes, is made by a fork alone.
//!
//! ```text
//! agent ── SEQPACKET: which, with the stream and a pipe ──► fork server ── fork ──► session::run, or copy::run
//!       ◄─ pid, or the error's number ──────────────────────┘
//! ```
//! Starting this program anew, and moving it into the sessions' cgroup, takes longer than most commands: for the move the kernel waits
//! until all processors have been somewhere else. The fork server has done both once. It is started when it is needed first; it ends when
//! its agent has ended, and what it has started goes on.

use std::ffi::CString;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, send, sendmsg,
    socketpair, sockopt,
};

use crate::exec::{cgroup, reap, sessions};
use crate::{copy, freeze, protect, session, sys};

/// Name of the hidden command.
pub const COMMAND: &str = "fork-server";
/// How long it may take to make a process.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// What a process becomes. The number is what the fork server is told: the same program, so there are no versions of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Becomes {
    /// The process of a command.
    Session = 1,
    /// That of a copy, a list or a removal.
    Copy = 2,
    /// The one that freezes file systems.
    Freezer = 3,
}

/// The agent's end.
#[derive(Debug)]
pub struct ForkServer {
    /// This program.
    program: PathBuf,
    line: Mutex<Option<OwnedFd>>,
    cgroups: Mutex<Option<PathBuf>>,
}

impl ForkServer {
    /// One that is started when it is needed.
    pub fn of(program: &Path) -> Self {
        Self {
            program: program.to_owned(),
            line: Mutex::default(),
            cgroups: Mutex::default(),
        }
    }

    /// Where cgroups can be made, if anywhere: to look for it takes longer than to see that it is still there.
    pub fn cgroups(&self) -> Option<PathBuf> {
        let mut known = self.cgroups.lock().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref().is_none_or(|base| !base.is_dir()) {
            *known = cgroup::base();
        }
        known.clone()
    }

    /// Starts a process, which has this stream, and is told this. Returns its number.
    ///
    /// # Errors
    /// There is none then, or it has ended.
    pub fn start(&self, becomes: Becomes, stream: BorrowedFd<'_>, told: &[u8]) -> io::Result<i32> {
        let (theirs, mut ours) = io::pipe()?;
        let pid = {
            let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
            let sent = match &*line {
                Some(line) => ask(line, becomes, [stream, theirs.as_fd()]).is_ok(),
                None => false,
            };
            if !sent {
                // There was none, or it has been killed: whatever it was not sent did not begin.
                let new = self.launch()?;
                ask(line.insert(new), becomes, [stream, theirs.as_fd()])?;
            }
            let answered = line
                .as_ref()
                .map_or_else(|| Err(io::ErrorKind::NotConnected.into()), answer);
            if answered.is_err() {
                *line = None;
            }
            let pid = answered??;
            sessions::started(pid);
            pid
        };
        drop(theirs);
        // One that does not take it has ended, and says why.
        let _ = ours.write_all(told);
        Ok(pid)
    }

    fn launch(&self) -> io::Result<OwnedFd> {
        let cgroups = self.cgroups();
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let setup = sys::ChildSetup {
            cgroup: cgroups.as_deref().and_then(cgroup::of_sessions),
            user: None,
            cwd: CString::new("/").map_err(io::Error::other)?,
            inherited: protect::inherited(),
            tty: false,
            dies_with: None,
        };
        // One that was stopped must not hold whoever comes next.
        sockopt::set_socket_timeout(&ours, sockopt::Timeout::Recv, Some(ANSWER_LIMIT))?;
        let mut command = Command::new(&self.program);
        command.arg(COMMAND).stdin(theirs).stdout(Stdio::null());
        // Daemons that sessions left may have ended meanwhile.
        cgroups.iter().for_each(|base| cgroup::sweep(base));
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

fn ask(line: &OwnedFd, becomes: Becomes, fds: [BorrowedFd<'_>; 2]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(
        line,
        &[IoSlice::new(&[becomes as u8])],
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

/// Serves the agent at standard input until it has ended. Returns in each process that it makes, too: when that is done.
///
/// # Errors
/// It cannot serve.
pub fn serve() -> io::Result<()> {
    let alone = sys::Alone::now()?;
    cgroup::know_shares();
    let line = io::stdin().as_fd().try_clone_to_owned()?;
    // The kernel waits for those that have ended.
    sys::ignore_signal(nix::sys::signal::Signal::SIGCHLD);
    while let Some((becomes, [stream, pipe])) = receive(&line)? {
        let started = sys::fork(&alone);
        if let Ok(None) = started {
            drop(line);
            nix::unistd::setsid()?;
            rustix::stdio::dup2_stdin(&pipe)?;
            rustix::stdio::dup2_stdout(&stream)?;
            drop((stream, pipe));
            let (name, run): (_, fn() -> io::Result<()>) = match becomes {
                Becomes::Session => (c"adit-session", session::run),
                Becomes::Copy => (c"adit-copy", copy::run),
                Becomes::Freezer => (c"adit-freezer", freeze::run),
            };
            // For people who look at processes.
            let _ = nix::sys::prctl::set_name(name);
            return run();
        }
        let said = match started {
            Ok(pid) => pid.unwrap_or(0),
            Err(e) => -e.raw_os_error().unwrap_or(1),
        };
        send(&line, &said.to_le_bytes(), SendFlags::NOSIGNAL)?;
    }
    Ok(())
}

/// What is wanted next, its stream, and the pipe by which it is told; none: the agent has ended.
fn receive(line: &OwnedFd) -> io::Result<Option<(Becomes, [OwnedFd; 2])>> {
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
    let becomes = [Becomes::Session, Becomes::Copy, Becomes::Freezer];
    let becomes = becomes.into_iter().find(|one| *one as u8 == byte[0]);
    match (becomes, fds.try_into()) {
        (Some(becomes), Ok(fds)) => Ok(Some((becomes, fds))),
        _ => Err(io::Error::other(
            "the agent says what, and gives a stream and a pipe",
        )),
    }
}
