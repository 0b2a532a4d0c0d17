//! What services share that give their stream to a process of its own: `exec` and `files`.

use std::ffi::CString;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use adit_names::escape;
use nix::unistd::User;

use crate::exec::{cgroup, reap, sessions};
use crate::transport::HostStream;
use crate::{protect, sys};

/// How long a client may take to read the last that is said to it.
const LIMIT: Duration = Duration::from_secs(10);

/// The rest of a stream whose bytes this process carries.
pub(super) struct Carried(Box<dyn HostStream>, OwnedFd);

impl Carried {
    /// Carries them until it ends.
    pub(super) fn carry(self) -> io::Result<()> {
        self.0.relay_to(self.1.into())
    }
}

/// The stream as a socket, for another process; and what is to be carried to it, where it is none.
pub(super) fn split(stream: Box<dyn HostStream>) -> io::Result<(OwnedFd, Option<Carried>)> {
    match stream.into_socket() {
        Ok(socket) => Ok((socket, None)),
        Err(stream) => {
            let (ours, theirs) = UnixStream::pair()?;
            Ok((theirs.into(), Some(Carried(stream, ours.into()))))
        }
    }
}

/// Starts this program's hidden command in a cgroup of sessions. It gets the stream as standard output, and what it is to do as standard
/// input. Returns its process's number.
pub(super) fn spawn(
    program: &Path,
    hidden: &str,
    spec: &[u8],
    (stream, cgroups): (&OwnedFd, Option<&Path>),
) -> io::Result<i32> {
    let setup = sys::ChildSetup {
        cgroup: cgroups.and_then(cgroup::of_sessions),
        user: None,
        cwd: CString::new("/").map_err(io::Error::other)?,
        inherited: protect::inherited(),
        tty: false,
        dies_with_parent: false,
    };
    let stream = stream.as_fd().try_clone_to_owned()?;
    let mut command = Command::new(program);
    command.arg(hidden).stdin(Stdio::piped()).stdout(stream);
    let (mut child, claim) = reap::spawn(|| {
        let child = sys::spawn(&mut command, setup)?;
        sessions::started(child.id().cast_signed());
        Ok(child)
    })?;
    // The stream is in it.
    drop(command);
    // A process that does not take it has ended, and says why.
    let told = child.stdin.take().map(|mut pipe| pipe.write_all(spec));
    // Whoever reaps orphans waits for it.
    drop(claim);
    told.unwrap_or(Ok(())).map(|()| child.id().cast_signed())
}

/// Says the last thing on a stream, and has it read: some carriers forget what was said when a stream is closed on bytes that nobody has
/// read.
pub(super) fn say(stream: &dyn HostStream, frame: &[u8]) -> io::Result<()> {
    stream.io().write_all(frame)?;
    stream.end_sending()?;
    let _ = stream.set_timeout(Some(LIMIT));
    let mut rest = [0; 1024];
    while stream.io().read(&mut rest).is_ok_and(|n| n > 0) {}
    Ok(())
}

/// A user by name or number; or that there is none, for people.
pub(super) fn user_of(name: &str) -> Result<User, String> {
    let found = match name.parse::<u32>() {
        Ok(number) => User::from_uid(number.into()),
        Err(_) => User::from_name(name),
    };
    let none = || format!("this guest has no user `{}`", escape(name).at_most(64));
    found.ok().flatten().ok_or_else(none)
}
