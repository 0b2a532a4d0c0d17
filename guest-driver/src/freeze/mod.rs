//! File systems that stand still for a while: the agent's end of it, and the process that does it.
//!
//! ```text
//! host ── hello {freeze} ─► serve/freeze.rs ─► Freezer ── a line of its own ──► the freezer's process: hooks, FIFREEZE, lease, FITHAW, hooks
//! ```
//! A process of its own, which has all its memory and writes nothing while anything stands still: whoever logs may wait for a disk that does.
//! It thaws when its lease is over, when it is asked to, and when its agent has ended, whichever is first; so a host that is gone, or has
//! saved the guest in the middle, leaves nothing standing. What answers `thaw` in the agent touches no disk and no log either.
//! What it freezes it writes down before, in `run_dir`: if it is killed its guard thaws (`process.rs`), and if both are the next agent.
//!
//! | file | what |
//! |---|---|
//! | `process.rs` | the process: one loop, and its time; its guard |
//! | `mounts.rs` | which file systems there are to freeze |
//! | `hooks.rs` | the guest's own programs, before and after |

mod hooks;
mod mounts;
mod process;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use adit_tasks::freeze::{Answer, Asked, BODY_MAX};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair, sockopt,
};

pub use self::process::run;
use crate::fork_server::{Becomes, ForkServer};
use crate::{log, sys};

/// Where the guest's owner puts programs that are run before and after.
pub const HOOKS: &str = "/etc/adit-guest/freeze.d";
/// How the names begin of what freezers write down in `run_dir`; their numbers follow.
const STANDING: &str = "frozen.";
/// Why a thaw is refused.
const NOTHING_STOOD: &str = "nothing stood still: its time was over before, or it was never frozen";
/// Most bytes of a message between agent and process.
const MESSAGE_MAX: usize = BODY_MAX as usize;
/// How long the process may take: hooks, and all file systems.
const ANSWER_LIMIT: Duration = Duration::from_secs(100);

/// The agent's end.
pub struct Freezer {
    forks: Arc<ForkServer>,
    run_dir: PathBuf,
    line: Mutex<Option<OwnedFd>>,
}

impl Freezer {
    /// One whose process is made when it is needed first.
    pub fn new(forks: Arc<ForkServer>, run_dir: &Path) -> Self {
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
                return Ok(nothing(asked));
            };
            *line = Some(self.launch()?);
        }
        let mut answer = match &*line {
            Some(line) => exchange(line, asked),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        // It was just ending: its time was over.
        let has_gone = |e: &io::Error| e.kind() == io::ErrorKind::UnexpectedEof;
        if is_there && answer.as_ref().is_err_and(has_gone) {
            *line = None;
            answer = match asked {
                Asked::Freeze(_) => {
                    let new = line.insert(self.launch()?);
                    exchange(new, asked)
                }
                Asked::Thaw | Asked::Show => Ok(nothing(asked)),
            };
        }
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
        self.forks.start(Becomes::Freezer, theirs.as_fd(), &told)?;
        Ok(ours)
    }
}

/// Where a freezer writes down what it freezes: paths with a NUL between.
fn standing_of(run_dir: &Path, freezer: i32) -> PathBuf {
    run_dir.join(format!("{STANDING}{freezer}"))
}

/// Thaws what was written down as standing still, if anything is, the last that was frozen first: before it nothing that is on a file of it
/// can write.
fn thaw_standing(at: &Path, why: &str) {
    let Ok(standing) = fs::read(at) else {
        return;
    };
    let paths: Vec<&[u8]> = standing.split(|b| *b == 0).collect();
    let thaw = |path: &&&[u8]| {
        let root = File::open(OsStr::from_bytes(path));
        root.and_then(|root| sys::thaw(&root)).is_ok()
    };
    let thawed = paths.iter().rev().filter(thaw).count();
    let _ = fs::remove_file(at);
    log::event("thawed", &[("file_systems", &thawed), ("why", &why)]);
}

/// Thaws what freezers and guards that are gone have left in the agent's `run_dir`. One that is there thaws by itself, for its agent has ended.
pub fn thaw_left(run_dir: &Path) {
    for entry in fs::read_dir(run_dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let freezer = name.to_str().and_then(|name| name.strip_prefix(STANDING));
        let Some(freezer) = freezer.and_then(|pid| pid.parse::<u32>().ok()) else {
            continue;
        };
        let comm = fs::read_to_string(format!("/proc/{freezer}/comm"));
        if comm.is_ok_and(|comm| comm.trim_end() == "adit-freezer") {
            continue;
        }
        thaw_standing(&entry.path(), "whoever froze it is gone");
    }
}

/// What whoever asks hears where nothing stands still. To thaw that is to have come too late: what was saved meanwhile was written to.
fn nothing(asked: Asked) -> Answer {
    match asked {
        Asked::Thaw => Answer::Refused(NOTHING_STOOD.into()),
        Asked::Freeze(_) | Asked::Show => Answer::NOTHING,
    }
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
