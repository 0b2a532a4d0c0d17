//! What systemd does for a service with `FileDescriptorStoreMax=`: it takes descriptors by name over `NOTIFY_SOCKET`, and
//! hands them to the next process of the service from 3 on (sd_notify(3), sd_listen_fds(3)).

use std::ffi::OsString;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::process::bound;

type Held = Arc<Mutex<Vec<(String, OwnedFd)>>>;

/// Descriptors are passed on from numbers above all that the shell's redirections touch.
const NUMBERS_FROM: i32 = 200;

/// The manager of one service.
#[derive(Debug)]
pub struct Manager {
    socket: PathBuf,
    held: Held,
    /// Those that the process being started inherits.
    passed: Vec<OwnedFd>,
}

impl Manager {
    /// Starts to listen in a directory.
    ///
    /// # Errors
    /// There is no socket to be had.
    pub fn start(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join("notify");
        let socket = UnixDatagram::bind(&path)?;
        let held = Held::default();
        let ours = held.clone();
        // Ends with the process: the service may speak at any time.
        std::thread::spawn(move || while take(&socket, &ours).is_ok() {});
        Ok(Self {
            socket: path,
            held,
            passed: Vec::new(),
        })
    }

    /// Names of what is held.
    pub fn names(&self) -> Vec<String> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.iter().map(|(name, _)| name.clone()).collect()
    }

    /// A command that starts the service with what is held; [`started`](Self::started) must follow.
    ///
    /// # Errors
    /// There are no descriptors to be had.
    pub fn command(&mut self, program: &Path) -> anyhow::Result<Command> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut script, mut names) = (String::new(), Vec::new());
        self.passed.clear();
        for (at, (name, fd)) in (3..).zip(held.iter()) {
            let inherited = fcntl_dupfd_cloexec(fd, NUMBERS_FROM)?;
            fcntl_setfd(&inherited, FdFlags::empty())?;
            let number = inherited.as_raw_fd();
            script += &format!("exec {at}<&{number} {number}<&-\n");
            names.push(name.clone());
            self.passed.push(inherited);
        }
        let count = names.len();
        drop(held);
        script += &format!("export LISTEN_PID=$$ LISTEN_FDS={count}\nexec \"$@\"\n");
        let mut command = bound("bash");
        let args: [OsString; 4] = ["-c".into(), script.into(), "bash".into(), program.into()];
        command
            .args(args)
            .env("NOTIFY_SOCKET", &self.socket)
            .env("LISTEN_FDNAMES", names.join(":"));
        Ok(command)
    }

    /// The process has its descriptors: nobody else inherits them.
    pub fn started(&mut self) {
        self.passed.clear();
    }
}

/// Takes one notification.
fn take(socket: &UnixDatagram, held: &Held) -> std::io::Result<()> {
    let mut text = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut iov = [IoSliceMut::new(&mut text)];
    let received = recvmsg(socket, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    let text = String::from_utf8_lossy(&text[..received.bytes]).into_owned();
    let name = text.lines().find_map(|l| l.strip_prefix("FDNAME="));
    let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(name) = name {
        if text.lines().any(|l| l == "FDSTOREREMOVE=1") {
            held.retain(|(held, _)| held != name);
        } else if text.lines().any(|l| l == "FDSTORE=1") {
            held.extend(fds.into_iter().map(|fd| (name.to_owned(), fd)));
        }
    }
    Ok(())
}
