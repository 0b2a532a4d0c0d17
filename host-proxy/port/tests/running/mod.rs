//! Runs the real binary, with the test on the other end of its control socket.
#![allow(dead_code)] // each test file uses only a part of it

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use adit_port::control::{Attach, Dial, Status, Target, VHOST_SOCKET};
use adit_port::control_io::{Message, receive, send};
use adit_port::place::connect_control;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::guest::Guest;

pub const CID: u64 = 5;

/// A running port process. Drop kills it by its pid.
pub struct Running {
    pub child: Child,
    _run: tempfile::TempDir,
    pub dir: PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn command(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_adit-port"));
    command.args([
        "--name",
        "web-1",
        "--cid",
        "5",
        "--log-level",
        "debug",
        "--dir",
    ]);
    command.arg(dir);
    command
}

impl Running {
    pub fn start() -> Self {
        Self::start_with(|_| {})
    }

    /// Starts it with a changed command.
    pub fn start_with(change: impl FnOnce(&mut Command)) -> Self {
        let run = tempfile::tempdir().unwrap();
        let dir = run.path().join("web-1");
        let mut command = command(&dir);
        change(&mut command);
        let child = command.spawn().unwrap();
        Self {
            child,
            _run: run,
            dir,
        }
    }

    pub fn connect(&mut self) -> Aditd {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            if let Ok(sock) = connect_control(&self.dir) {
                let sock = UnixStream::from(sock);
                // A read that gets nothing fails the test after a while.
                sock.set_read_timeout(Some(Duration::from_secs(60)))
                    .unwrap();
                return Aditd(sock.into());
            }
            assert!(self.child.try_wait().unwrap().is_none(), "it ended");
            assert!(Instant::now() < end, "it does not listen");
            std::thread::yield_now();
        }
    }

    pub fn status(&self, key: &str) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let text = std::fs::read_to_string(path).unwrap();
        let line = text.lines().find_map(|l| l.strip_prefix(key)).unwrap();
        let digits = line.trim_start_matches(':').split_whitespace().next();
        digits.unwrap().parse().unwrap()
    }

    /// What each open descriptor is.
    pub fn descriptors(&self) -> Vec<PathBuf> {
        let dir = format!("/proc/{}/fd", self.child.id());
        let links = std::fs::read_dir(dir).unwrap();
        links
            .filter_map(|link| std::fs::read_link(link.unwrap().path()).ok())
            .collect()
    }

    /// The number of descriptors, and of mappings.
    pub fn counts(&self) -> [usize; 2] {
        let maps = format!("/proc/{}/maps", self.child.id());
        let maps = std::fs::read_to_string(maps).unwrap();
        [self.descriptors().len(), maps.lines().count()]
    }

    /// Waits until there are at most so many. A frame may announce an end before the descriptor is closed, and refused
    /// descriptors are closed in the background, because a close may take any time.
    #[track_caller]
    pub fn shrinks_to(&self, most: [usize; 2]) {
        let end = Instant::now() + Duration::from_secs(20);
        while std::iter::zip(self.counts(), most).any(|(is, most)| is > most) {
            assert!(
                Instant::now() < end,
                "{:?} descriptors and mappings, at most {most:?}: {:#?}",
                self.counts(),
                self.descriptors()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn ended(&mut self) -> std::process::ExitStatus {
        self.child.wait().unwrap()
    }

    pub fn boot(&self, listen: &[u32]) -> Guest {
        Guest::boot(&self.dir.join(VHOST_SOCKET), CID, listen)
    }
}

/// A connection to the control socket.
pub struct Aditd(pub OwnedFd);

impl Aditd {
    pub fn say(&self, message: Message, fd: Option<&UnixStream>) {
        send(&self.0, &message, fd.map(AsFd::as_fd)).unwrap();
    }

    pub fn ready(&self) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() > 0
    }

    /// Receives the next frame that is not a status. `None`: there is none now.
    pub fn heard(&self) -> Option<(Message, Option<OwnedFd>)> {
        while self.ready() {
            match receive(&self.0).unwrap().expect("connection") {
                (
                    Message::Status(_)
                    | Message::Features(_)
                    | Message::Handover(_)
                    | Message::Ring(_),
                    _,
                ) => {}
                other => return Some(other),
            }
        }
        None
    }

    pub fn wait_status(&self, want: impl Fn(&Status) -> bool) -> Status {
        loop {
            if let (Message::Status(status), _) = receive(&self.0).unwrap().expect("connection")
                && want(&status)
            {
                return status;
            }
        }
    }

    pub fn dial(&self, id: u64, to: Target) {
        let deadline_ms = 5000;
        let dial = Dial {
            id,
            to,
            deadline_ms,
        };
        self.say(Message::Dial(dial), None);
    }

    pub fn attach(&self, id: u64, prefix: &[u8]) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let prefix = prefix.to_vec();
        self.say(Message::Attach(Attach { id, prefix }), Some(&theirs));
        ours.set_nonblocking(true).unwrap();
        ours
    }
}
