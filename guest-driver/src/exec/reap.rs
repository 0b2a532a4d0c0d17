//! Who waits for which child.
//!
//! The agent is the reaper of its tasks' orphans: a process whose parent has died becomes the agent's child, and stays a
//! zombie until the agent waits for it. So each end of a child wakes a thread, which waits for whatever has ended, at
//! once. A child whose status somebody needs is *claimed*, and left to whoever claimed it; the lock is held from before
//! its fork until it is claimed, so that it cannot be taken in between.

use std::collections::BTreeSet;
use std::io;
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use super::{proc, script};
use crate::{log, sys};

/// Stack of the reaping thread; the process table is on the heap.
const STACK_BYTES: usize = 128 * 1024;

/// Pids of children that somebody waits for.
static CLAIMED: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

/// Children that are being started.
static STARTING: AtomicUsize = AtomicUsize::new(0);

fn claimed() -> MutexGuard<'static, BTreeSet<i32>> {
    CLAIMED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A child that its owner waits for; from the drop on it is anybody's.
#[derive(Debug)]
pub struct Claim(i32);

impl Drop for Claim {
    fn drop(&mut self) {
        claimed().remove(&self.0);
        // Its end was told while it was claimed, and is not told again.
        orphans();
    }
}

/// Starts a child and claims it.
///
/// # Errors
/// It does not start. Nothing is claimed then.
pub fn spawn(start: impl FnOnce() -> io::Result<Child>) -> io::Result<(Child, Claim)> {
    STARTING.fetch_add(1, Ordering::SeqCst);
    let started = {
        let mut claimed = claimed();
        // A start that fails waits for its child in here, which would panic if there were none.
        start().map(|child| {
            let pid = child.id() as i32;
            claimed.insert(pid);
            (child, Claim(pid))
        })
    };
    STARTING.fetch_sub(1, Ordering::SeqCst);
    orphans();
    started
}

/// Runs a command to its end.
///
/// # Errors
/// It does not start.
pub fn status(command: &mut Command) -> io::Result<ExitStatus> {
    let (mut child, _claim) = spawn(|| command.spawn())?;
    child.wait()
}

/// Waits for every child that has ended and is nobody's.
///
/// Not while a child is being started, which may take long (a working directory that does not answer): whoever starts it
/// looks afterwards.
pub fn orphans() {
    if STARTING.load(Ordering::SeqCst) > 0 {
        return;
    }
    let claimed = claimed();
    let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    loop {
        match waitid(Id::All, look).map(|status| status.pid()) {
            Ok(None) | Err(Errno::ECHILD) => return,
            Ok(Some(pid)) if !claimed.contains(&pid.as_raw()) => reap(pid),
            Err(Errno::EINTR) => {}
            // The first is claimed, or ended by a signal that has no name: the others are behind it.
            Ok(Some(_)) | Err(_) => break,
        }
    }
    let me = std::process::id() as i32;
    proc::table()
        .values()
        .filter(|p| p.zombie && p.parent == me && !claimed.contains(&p.id.pid))
        .for_each(|p| reap(Pid::from_raw(p.id.pid)));
}

fn reap(pid: Pid) {
    let _ = waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG);
}

/// What the reaping thread takes: a child's end, and the order to stop.
fn signals() -> SigSet {
    SigSet::from_iter([Signal::SIGCHLD, Signal::SIGTERM])
}

/// Keeps these signals from every thread that begins later; a reaper takes them instead. For the first thread, before there
/// are others.
///
/// # Errors
/// The kernel refuses.
pub fn hold_signals() -> io::Result<()> {
    // Whoever started us may have it ignored, and then no child can be waited for.
    sys::default_signal(Signal::SIGCHLD);
    Ok(signals().thread_block()?)
}

/// Starts the reaping thread, for as long as the process lives.
///
/// # Errors
/// There is no descriptor or thread to be had.
pub fn start() -> io::Result<()> {
    let arrived = SignalFd::with_flags(&signals(), SfdFlags::SFD_CLOEXEC)?;
    let reaper = thread::Builder::new().name("reaper".into());
    reaper.stack_size(STACK_BYTES).spawn(move || {
        loop {
            orphans();
            match arrived.read_signal() {
                Ok(Some(signal)) if signal.ssi_signo == Signal::SIGTERM as u32 => script::stop(),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return log::event("reaper-failed", &[("error", &e)]),
            }
        }
    })?;
    Ok(())
}
