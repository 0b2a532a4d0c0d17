//! The process that freezes, and thaws by itself; and the one before it, which thaws if it cannot.
//!
//! ```text
//! fork server ─► guard ─ fork ─► freezer: writes down what it is about to freeze, freezes, waits for its time, thaws
//!                  └ waits for the freezer's end, then thaws what is written down, the last first
//! ```
//! So a freezer that is killed leaves nothing standing, and neither does one that gives up while the kernel is still busy with a file system:
//! its last thread ends when that is frozen, and the guard hears of it then.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use adit_tasks::freeze::{Answer, Asked, NAMED_MAX};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::hooks::Hooks;
use super::mounts::{Mount, to_freeze};
use super::{HOOKS, MESSAGE_MAX, nothing, standing_of, thaw_standing};
use crate::session::take_stdout;
use crate::{clock, log, sys};

/// How long all file systems together may take to be frozen: those that are wait for the others.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);

/// Most bytes of what it is told at its start.
const TOLD_MAX: u64 = 16 << 10;

/// One that stands still.
struct Frozen {
    mount: Mount,
    root: File,
}

/// What stands still, and for how long.
struct Still {
    all: Vec<Frozen>,
    hooks: Hooks,
    until: Instant,
    /// Where it is written down.
    standing: PathBuf,
}

/// Most bytes of a path that is shown.
const SHOWN_MAX: usize = 256;

/// Serves its agent, which is standard output, until nothing is asked any more and nothing stands still.
///
/// # Errors
/// It cannot begin.
pub fn run() -> io::Result<()> {
    let mut told = Vec::new();
    io::stdin().lock().take(TOLD_MAX).read_to_end(&mut told)?;
    let run_dir: PathBuf = postcard::from_bytes(&told).map_err(io::Error::other)?;
    // The fork server waits for none of its own; this one for its hooks.
    sys::default_signal(Signal::SIGCHLD);
    let line = take_stdout()?;
    // Whoever ends all processes in turn ends the agent, too. Hooks have no signals held.
    let hold = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];
    SigSet::from_iter(hold).thread_block()?;
    if let Some(freezer) = sys::fork(&sys::Alone::now()?)? {
        drop(line);
        guard(freezer, &run_dir);
        return Ok(());
    }
    // What is not in memory now may be on a disk that stands still. Where this is not allowed, it is used before.
    let _ = mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE);
    let mut still: Option<Still> = None;
    let mut bytes = vec![0; MESSAGE_MAX];
    let why = loop {
        let left = still.as_ref().map(Still::left);
        match heard(&line, left, &mut bytes) {
            Heard::Nothing => break "its time is over",
            Heard::End => break "its agent has ended",
            Heard::Asked(Asked::Thaw) => {
                let thawed = still.take().map(Still::thaw);
                let said = thawed.as_ref().map(Thawed::answer);
                answer(&line, &said.unwrap_or_else(|| nothing(Asked::Thaw)));
                if let Some(thawed) = thawed {
                    thawed.finish("it was asked to");
                }
                return Ok(());
            }
            Heard::Asked(Asked::Show) => {}
            Heard::Asked(Asked::Freeze(ms)) => {
                let lease = Duration::from_millis(ms.into());
                match &mut still {
                    Some(still) => still.until = Instant::now() + lease,
                    None => match Still::begin(lease, &run_dir) {
                        Ok(begun) => still = Some(begun),
                        Err(why) => {
                            answer(&line, &Answer::Refused(why.clone()));
                            log::event("freeze-refused", &[("why", &why)]);
                            // What the kernel is busy with still the guard thaws.
                            return Ok(());
                        }
                    },
                }
            }
        }
        answer(&line, &still.as_ref().map_or(Answer::NOTHING, Still::shown));
    };
    if let Some(still) = still {
        still.thaw().finish(why);
    }
    Ok(())
}

/// Waits for the freezer's end, whichever, and thaws what it has left.
fn guard(freezer: i32, run_dir: &Path) {
    let _ = nix::sys::prctl::set_name(c"adit-thaw");
    is_needed(true);
    let _ = mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE);
    while waitpid(Pid::from_raw(freezer), None) == Err(nix::errno::Errno::EINTR) {}
    thaw_standing(
        &standing_of(run_dir, freezer),
        "the process that froze it has ended",
    );
}

/// Nobody is to be ended for memory's sake who has to thaw. What hooks start is.
fn is_needed(is: bool) {
    let _ = fs::write("/proc/self/oom_score_adj", if is { "-1000" } else { "0" });
}

enum Heard {
    Asked(Asked),
    /// Not in time.
    Nothing,
    /// There is nobody.
    End,
}

fn heard(line: &OwnedFd, left: Option<Duration>, bytes: &mut [u8]) -> Heard {
    let until = left.map(|left| Instant::now() + left);
    loop {
        let limit = match until.map(|until| until.saturating_duration_since(Instant::now())) {
            None => PollTimeout::NONE,
            Some(left) if left.is_zero() => return Heard::Nothing,
            Some(left) => clock::poll_limit(left),
        };
        let mut fds = [PollFd::new(line.as_fd(), PollFlags::POLLIN)];
        if !poll(&mut fds, limit).is_ok_and(|n| n > 0) {
            continue;
        }
        return match recv(line, &mut *bytes, RecvFlags::empty()) {
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => continue,
            Ok((_, n)) if n > 0 => match postcard::from_bytes(&bytes[..n]) {
                Ok(asked) => Heard::Asked(asked),
                Err(_) => Heard::End,
            },
            _ => Heard::End,
        };
    }
}

fn answer(line: &OwnedFd, answer: &Answer) {
    if let Ok(bytes) = postcard::to_stdvec(answer) {
        let _ = send(line, &bytes, SendFlags::NOSIGNAL);
    }
}

/// What a thread freezes, one after the other; whoever waits for it may give up.
#[derive(Default)]
struct Work {
    done: Mutex<Vec<Frozen>>,
    is_given_up: AtomicBool,
}

impl Work {
    fn done(&self) -> MutexGuard<'_, Vec<Frozen>> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Freezes them. One whose kernel says that it cannot be frozen at all is left as it is.
    fn freeze(&self, all: Vec<Frozen>) -> Result<(), String> {
        for one in all {
            match sys::freeze(&one.root) {
                Ok(()) => {}
                Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => continue,
                Err(e) => {
                    let at = one.mount.at.display();
                    return Err(match e.raw_os_error() {
                        Some(libc::EBUSY) => format!("{at} is frozen already, by somebody else"),
                        _ => format!("cannot freeze {at}: {e}"),
                    });
                }
            }
            let mut done = self.done();
            if self.is_given_up.load(Ordering::SeqCst) {
                // Nobody else knows of this one.
                let _ = sys::thaw(&one.root);
                return Ok(());
            }
            done.push(one);
        }
        Ok(())
    }

    /// Takes what is frozen; from now on nothing is.
    fn give_up(&self) -> Vec<Frozen> {
        let mut done = self.done();
        self.is_given_up.store(true, Ordering::SeqCst);
        std::mem::take(&mut *done)
    }
}

impl Still {
    fn begin(lease: Duration, run_dir: &Path) -> Result<Self, String> {
        let hooks = Hooks::freeze(hooks_dir())?;
        is_needed(true);
        let standing = standing_of(run_dir, std::process::id().cast_signed());
        let begun = open_all().and_then(|all| {
            let paths = all.iter().map(|one| one.mount.at.as_os_str().as_bytes());
            let written = fs::write(&standing, paths.collect::<Vec<_>>().join(&0));
            written.map_err(|e| format!("cannot write {}: {e}", standing.display()))?;
            freeze_all(all)
        });
        match begun {
            Ok(all) => Ok(Self {
                all,
                hooks,
                until: Instant::now() + lease,
                standing,
            }),
            Err(why) => {
                is_needed(false);
                hooks.thaw();
                Err(why)
            }
        }
    }

    fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    fn shown(&self) -> Answer {
        let at = |one: &Frozen| {
            let mut at = one.mount.at.display().to_string();
            at.truncate(at.floor_char_boundary(SHOWN_MAX));
            at
        };
        Answer::State {
            frozen: self.all.iter().take(NAMED_MAX).map(at).collect(),
            count: u32::try_from(self.all.len()).unwrap_or(u32::MAX),
            left_ms: u32::try_from(self.left().as_millis()).unwrap_or(u32::MAX),
        }
    }

    fn thaw(self) -> Thawed {
        let of = self.all.len();
        let thawed = thaw_all(self.all);
        let _ = fs::remove_file(&self.standing);
        let hooks = self.hooks;
        Thawed { of, thawed, hooks }
    }
}

/// What goes on again; the hooks have not heard of it.
struct Thawed {
    of: usize,
    /// How many stood still until now.
    thawed: usize,
    hooks: Hooks,
}

impl Thawed {
    fn answer(&self) -> Answer {
        match self.thawed == self.of {
            true => Answer::NOTHING,
            false => {
                let (thawed, of) = (self.thawed, self.of);
                Answer::Refused(format!(
                    "only {thawed} of {of} file systems stood still until now: somebody else has thawed the others"
                ))
            }
        }
    }

    fn finish(self, why: &str) {
        is_needed(false);
        // Only now: a log may be on one of them.
        let failed = self.hooks.thaw().join("; ");
        log::event(
            "thawed",
            &[
                ("file_systems", &self.thawed),
                ("why", &why),
                ("hooks", &failed),
            ],
        );
    }
}

/// Opens all first: to open something that stands still may be to wait.
fn open_all() -> Result<Vec<Frozen>, String> {
    let info = fs::read("/proc/self/mountinfo");
    let info = info.map_err(|e| format!("cannot read /proc/self/mountinfo: {e}"))?;
    let mounts = to_freeze(&info).into_iter().filter(may_be_frozen);
    let opened = mounts.map(|mount| {
        let failed = |e: io::Error| format!("cannot open {}: {e}", mount.at.display());
        let root = File::open(&mount.at).map_err(failed)?;
        let is = root.metadata().map_err(failed)?.dev();
        let is_hidden = mount
            .device
            .is_some_and(|(major, minor)| is != libc::makedev(major, minor));
        // Another one is mounted over it there.
        Ok((!is_hidden).then_some(Frozen { mount, root }))
    });
    opened.filter_map(Result::transpose).collect()
}

fn freeze_all(all: Vec<Frozen>) -> Result<Vec<Frozen>, String> {
    if all.is_empty() {
        return Err("there is no file system that could be frozen".into());
    }
    let work = Arc::new(Work::default());
    let (tell, told) = channel();
    let its = work.clone();
    let thread = thread::Builder::new().name("freeze".into());
    thread
        .spawn(move || tell.send(its.freeze(all)))
        .map_err(|e| format!("no thread: {e}"))?;
    let why = match told.recv_timeout(FREEZE_LIMIT) {
        Ok(Ok(())) => {
            let done = std::mem::take(&mut *work.done());
            match done.is_empty() {
                true => "no file system of this guest can be frozen".into(),
                false => return Ok(done),
            }
        }
        Ok(Err(why)) => why,
        Err(RecvTimeoutError::Timeout) => {
            format!("not all file systems were frozen within {FREEZE_LIMIT:?}")
        }
        Err(RecvTimeoutError::Disconnected) => "the thread that freezes has ended".into(),
    };
    thaw_all(work.give_up());
    Err(why)
}

/// The last first. Returns how many stood still.
fn thaw_all(all: Vec<Frozen>) -> usize {
    let all = all.iter().rev();
    all.filter(|one| sys::thaw(&one.root).is_ok()).count()
}

#[cfg(not(feature = "test-util"))]
fn may_be_frozen(_: &Mount) -> bool {
    true
}

#[cfg(not(feature = "test-util"))]
fn hooks_dir() -> &'static Path {
    Path::new(HOOKS)
}

/// A build for tests runs on machines that are to go on: it freezes what it is told, and else nothing.
#[cfg(feature = "test-util")]
fn may_be_frozen(mount: &Mount) -> bool {
    let only = std::env::var_os("ADIT_TEST_FREEZE");
    only.is_some_and(|only| mount.at == Path::new(&only))
}

#[cfg(feature = "test-util")]
fn hooks_dir() -> &'static Path {
    match std::env::var_os("ADIT_TEST_FREEZE_HOOKS") {
        Some(dir) => Box::leak(Path::new(&dir).to_owned().into_boxed_path()),
        None => Path::new(HOOKS),
    }
}
