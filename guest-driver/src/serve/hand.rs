//! What services share that give their stream to a process of its own: `exec` and `files`.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use adit_names::escape;
use nix::unistd::User;

use crate::transport::HostStream;

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
