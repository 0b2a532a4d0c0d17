//! Who waits for which child.
//!
//! The agent is the reaper of its tasks' orphans: a process whose parent has died becomes the agent's child, and stays a
//! zombie until the agent waits for it. So each end of a child wakes a thread, which waits for whatever has ended, at
//! once. A child whose status somebody needs is *claimed*, and left to whoever claimed it; the lock is held from before
//! its fork until it is claimed, so that nobody else reaps it in between.
//!
//! The same thread takes the agent's own signals: SIGTERM and SIGINT end it, SIGHUP reloads its configuration.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use super::{proc, script};
use crate::{log, sys};

/// Stack of the reaping thread; the process table is on the heap.
const STACK_BYTES: usize = 128 * 1024;

/// How long a start that is under way may keep the agent from ending.
const START_LIMIT: Duration = Duration::from_secs(3);

/// How often one that takes too long is killed again: it may not have been there yet.
const AGAIN: Duration = Duration::from_millis(100);

/// The children that somebody waits for.
struct Children {
    /// Their pids.
    claimed: BTreeSet<i32>,
    /// No child starts any more.
    closed: bool,
}

static CHILDREN: Mutex<Children> = Mutex::new(Children {
    claimed: BTreeSet::new(),
    closed: false,
});

/// Children that are being started.
static STARTING: AtomicUsize = AtomicUsize::new(0);

/// Somebody wants to have looked for children that have ended.
static LOOK: AtomicBool = AtomicBool::new(false);

fn children() -> MutexGuard<'static, Children> {
    CHILDREN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A child whose owner waits for it. When dropped, the reaper may wait for it.
#[derive(Debug)]
pub struct Claim(i32);

impl Drop for Claim {
    fn drop(&mut self) {
        children().claimed.remove(&self.0);
        // SIGCHLD for it came while it was claimed, and does not come again.
        orphans();
    }
}

/// Starts a child and claims it.
///
/// # Errors
/// It does not start, or the agent is ending. Nothing is claimed then.
pub fn spawn(start: impl FnOnce() -> io::Result<Child>) -> io::Result<(Child, Claim)> {
    STARTING.fetch_add(1, Ordering::SeqCst);
    let started = {
        let mut children = children();
        if children.closed {
            Err(io::Error::other("the agent is ending"))
        } else {
            // A start that fails waits for its child in here, which would panic if there were none.
            start().map(|child| {
                let pid = child.id() as i32;
                children.claimed.insert(pid);
                (child, Claim(pid))
            })
        }
    };
    STARTING.fetch_sub(1, Ordering::SeqCst);
    orphans();
    started
}

/// The same for a start that may take no longer than this, and ends with its child's death then: what is between a fork and a program
/// may be a working directory that does not answer.
///
/// # Errors
/// As [`spawn`].
pub fn spawn_within(
    limit: Duration,
    start: impl FnOnce() -> io::Result<Child>,
) -> io::Result<(Child, Claim)> {
    let (done, is_done) = channel::<()>();
    thread::scope(|scope| {
        let watch = thread::Builder::new().name("start".into());
        watch.stack_size(STACK_BYTES).spawn_scoped(scope, move || {
            let mut limit = limit;
            while is_done.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                kill_starting();
                limit = AGAIN;
            }
        })?;
        let started = spawn(start);
        drop(done);
        started
    })
}

/// No child starts while this lives.
#[derive(Debug)]
pub struct Closed(());

impl Drop for Closed {
    fn drop(&mut self) {
        children().closed = false;
        orphans();
    }
}

/// Lets no child start from now on. One that is being started is waited for, so that it can be found afterwards by what its
/// program has (its environment); but not for long: its working directory may not answer.
pub fn close() -> Closed {
    let until = Instant::now() + START_LIMIT;
    loop {
        match CHILDREN.try_lock() {
            Ok(mut children) => children.closed = true,
            Err(TryLockError::Poisoned(e)) => e.into_inner().closed = true,
            Err(TryLockError::WouldBlock) if Instant::now() < until => {
                thread::sleep(Duration::from_millis(5));
                continue;
            }
            Err(TryLockError::WouldBlock) => kill_starting(),
        }
        orphans();
        return Closed(());
    }
}

/// Kills the children that are on their way to their program ([`sys::spawn`]).
fn kill_starting() {
    let me = std::process::id() as i32;
    let is_starting = |pid: i32| {
        let comm = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
        comm.strip_suffix(b"\n") == Some(sys::STARTING.to_bytes())
    };
    let table = proc::table();
    let mine = table.values().filter(|p| p.parent == me && !p.zombie);
    mine.filter(|p| is_starting(p.id.pid))
        .for_each(|p| drop(proc::kill(p.id)));
}

/// Runs a command to its end.
///
/// # Errors
/// It does not start.
pub fn status(command: &mut Command) -> io::Result<ExitStatus> {
    let (mut child, _claim) = spawn(|| command.spawn())?;
    child.wait()
}

/// Waits for every child that has ended and is not claimed.
///
/// Never waits: while a child is being started, which may take long (a working directory that does not answer), whoever starts it calls
/// this afterwards; and whoever looks already looks once more.
pub fn orphans() {
    LOOK.store(true, Ordering::SeqCst);
    while STARTING.load(Ordering::SeqCst) == 0 && LOOK.load(Ordering::SeqCst) {
        let children = match CHILDREN.try_lock() {
            Ok(children) => children,
            Err(TryLockError::Poisoned(e)) => e.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        LOOK.store(false, Ordering::SeqCst);
        look(&children.claimed);
    }
}

/// Waits for those that have ended and are not claimed.
fn look(claimed: &BTreeSet<i32>) {
    let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    loop {
        match waitid(Id::All, look).map(|status| status.pid()) {
            Ok(None) | Err(Errno::ECHILD) => return,
            Ok(Some(pid)) if !claimed.contains(&pid.as_raw()) => reap(pid),
            Err(Errno::EINTR) => {}
            // The first is claimed, or was ended by a signal without a name: others may have ended after it.
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

/// What the reaping thread takes: a child's end, the orders to stop, the order to reload.
fn signals() -> SigSet {
    SigSet::from_iter([
        Signal::SIGCHLD,
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
    ])
}

/// Blocks these signals in every thread that begins later; the reaper takes them instead. To be called by the first thread,
/// before there are others.
///
/// # Errors
/// The kernel refuses.
pub fn hold_signals() -> io::Result<()> {
    // It may be inherited as ignored, and then no child can be waited for.
    sys::default_signal(Signal::SIGCHLD);
    Ok(signals().thread_block()?)
}

/// Starts the reaping thread, for as long as the process lives. `reload` is called at each SIGHUP.
///
/// # Errors
/// There are no descriptors or threads left.
pub fn start(reload: impl Fn() + Send + 'static) -> io::Result<()> {
    let arrived = SignalFd::with_flags(&signals(), SfdFlags::SFD_CLOEXEC)?;
    let reaper = thread::Builder::new().name("reaper".into());
    reaper.stack_size(STACK_BYTES).spawn(move || {
        loop {
            orphans();
            match arrived.read_signal() {
                Ok(Some(signal)) => match Signal::try_from(signal.ssi_signo as i32) {
                    Ok(Signal::SIGTERM | Signal::SIGINT) => script::stop(),
                    Ok(Signal::SIGHUP) => reload(),
                    _ => {}
                },
                Ok(None) | Err(Errno::EINTR) => {}
                Err(e) => return log::event("reaper-failed", &[("error", &e)]),
            }
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::alone;

    #[test]
    fn no_child_starts_once_the_agent_is_ending() {
        let _alone = alone();
        let closed = close();
        let mut forked = false;
        let started = spawn(|| {
            forked = true;
            Command::new("true").spawn()
        });
        assert!(started.is_err() && !forked);
        drop(closed);
        assert!(status(&mut Command::new("true")).unwrap().success());
    }

    #[test]
    fn whoever_looks_for_ended_children_waits_for_no_start() {
        let _alone = alone();
        let before = children();
        // As a start that begins just after it was seen that there is none.
        let (looked, has_looked) = channel();
        thread::spawn(move || {
            orphans();
            looked.send(()).unwrap();
        });
        has_looked.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!(LOOK.load(Ordering::SeqCst));
        drop(before);
        orphans();
        assert!(!LOOK.load(Ordering::SeqCst));
    }

    #[test]
    fn a_start_under_way_is_waited_for_before_the_agent_looks_for_what_runs() {
        let _alone = alone();
        let (inside, is_inside) = channel();
        let (go, may_go) = channel::<()>();
        let order = &Mutex::new(Vec::new());
        thread::scope(|s| {
            s.spawn(move || {
                let (mut child, _claim) = spawn(|| {
                    inside.send(()).unwrap();
                    may_go.recv().unwrap();
                    let child = Command::new("true").spawn();
                    order.lock().unwrap().push("started");
                    child
                })
                .unwrap();
                child.wait().unwrap();
            });
            is_inside.recv().unwrap();
            s.spawn(|| {
                let closed = close();
                order.lock().unwrap().push("closed");
                drop(closed);
            });
            go.send(()).unwrap();
        });
        assert_eq!(*order.lock().unwrap(), ["started", "closed"]);
    }
}
