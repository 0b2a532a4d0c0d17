//! File systems that stand still for a while: the agent's end of it, and the process that does it.
//!
//! ```text
//! host ── hello {freeze} ─► serve/freeze.rs ─► Freezer ── a line of its own ──► the freezer's process: hooks, FIFREEZE, lease, FITHAW, hooks
//! ```
//! A process of its own, which has all its memory and writes nothing while anything stands still: whoever logs may wait for a disk that does.
//! It thaws when its lease is over, when it is asked to, and when its agent has ended, whichever is first; so a host that is gone, or has
//! saved the guest in the middle, leaves nothing standing. What answers `thaw` in the agent touches no disk and no log either.
//! What it freezes it writes down before, in `run_dir`, which is in memory: if it is killed the agent thaws, and if both are the next agent.
//!
//! | file | what |
//! |---|---|
//! | `process.rs` | the process: one loop, and its time |
//! | `mounts.rs` | which file systems there are to freeze |
//! | `hooks.rs` | the guest's own programs, before and after |

mod hooks;
mod mounts;
mod process;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use adit_tasks::freeze::{Answer, Asked};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair, sockopt,
};

pub use self::process::run;
use crate::fork_server::{Becomes, ForkServer};
use crate::{log, sys};

/// Where the guest's owner puts programs that are run before and after.
pub const HOOKS: &str = "/etc/adit-guest/freeze.d";
/// In `run_dir`: what stands still, a path a line.
const STANDING: &str = "frozen";
/// Stack of the thread that watches the process.
const STACK_BYTES: usize = 128 * 1024;
/// Most bytes of a message between agent and process.
const MESSAGE_MAX: usize = 16 << 10;
/// How long the process may take: hooks, and all file systems.
const ANSWER_LIMIT: Duration = Duration::from_secs(100);

/// The agent's end.
pub struct Freezer {
    forks: Arc<ForkServer>,
    run_dir: PathBuf,
    line: Mutex<Option<OwnedFd>>,
}

impl Freezer {
    /// One whose process is made when it is needed first. What an agent before this one has left standing goes on.
    pub fn new(forks: Arc<ForkServer>, run_dir: &Path) -> Self {
        thaw_standing(run_dir, "the agent before has ended");
        Self {
            forks,
            run_dir: run_dir.to_owned(),
            line: Mutex::default(),
        }
    }

    /// Does what is asked for. Whoever comes meanwhile waits.
    ///
    /// # Errors
    /// The process cannot be made, or has ended: then nothing stands still.
    pub fn ask(&self, asked: Asked) -> io::Result<Answer> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        let is_there = line.as_ref().is_some_and(|line| !has_ended(line));
        if !is_there {
            *line = None;
            let Asked::Freeze(_) = asked else {
                return Ok(Answer::NOTHING);
            };
            *line = Some(self.launch()?);
        }
        let answer = match &*line {
            Some(line) => exchange(line, asked),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        // Closed, it thaws.
        if !matches!(&answer, Ok(Answer::State { count: 1.., .. })) {
            *line = None;
        }
        answer
    }

    fn launch(&self) -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        sockopt::set_socket_timeout(&ours, sockopt::Timeout::Recv, Some(ANSWER_LIMIT))?;
        let told = postcard::to_stdvec(&self.run_dir).map_err(io::Error::other)?;
        // The watch is there before anything stands still.
        let (watched, run_dir) = (ours.try_clone()?, self.run_dir.clone());
        let watch = thread::Builder::new().name("freezer".into());
        watch.stack_size(STACK_BYTES).spawn(move || {
            let ended = |fds: &[PollFd<'_>]| {
                let said = fds.first().and_then(PollFd::revents);
                said.is_some_and(|said| said.contains(PollFlags::POLLHUP))
            };
            loop {
                let mut fds = [PollFd::new(watched.as_fd(), PollFlags::empty())];
                if poll(&mut fds, PollTimeout::NONE).is_ok() && ended(&fds) {
                    return thaw_standing(&run_dir, "the process that froze it has ended");
                }
            }
        })?;
        self.forks.start(Becomes::Freezer, theirs.as_fd(), &told)?;
        Ok(ours)
    }
}

/// Thaws what was written down as standing still, if anything is.
fn thaw_standing(run_dir: &Path, why: &str) {
    let at = run_dir.join(STANDING);
    let Ok(standing) = fs::read_to_string(&at) else {
        return;
    };
    let thaw = |path: &&str| File::open(path).and_then(|root| sys::thaw(&root)).is_ok();
    let thawed = standing.lines().filter(thaw).count();
    let _ = fs::remove_file(&at);
    log::event("thawed", &[("file_systems", &thawed), ("why", &why)]);
}

/// Whether the process has closed its end: its lease is over.
fn has_ended(line: &OwnedFd) -> bool {
    let mut byte = [0];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    !matches!(
        recv(line, &mut byte, flags),
        Err(rustix::io::Errno::AGAIN) | Ok((_, 1))
    )
}

fn exchange(line: &OwnedFd, asked: Asked) -> io::Result<Answer> {
    let bytes = postcard::to_stdvec(&asked).map_err(io::Error::other)?;
    send(line, &bytes, SendFlags::NOSIGNAL)?;
    let mut bytes = vec![0; MESSAGE_MAX];
    let (_, n) = loop {
        match recv(line, &mut bytes, RecvFlags::empty()) {
            Err(rustix::io::Errno::INTR) => {}
            got => break got?,
        }
    };
    match n {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        n => postcard::from_bytes(&bytes[..n]).map_err(io::Error::other),
    }
}
