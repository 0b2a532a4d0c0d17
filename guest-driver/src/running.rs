//! A task that runs on a thread of its own, so that the stream it came on can end, and the next one begin, while it does.
//!
//! ```text
//! client's thread            task's thread
//!   begin ─────────────────────► Runner::handle: verified, on disk as started
//!   next: Started ◄── one byte ──┤  the effect
//!   next: Ended ◄──── the end ───┘  its terminal state is on disk
//! ```
//! The events come through a pipe, so that the client can wait for them and for its stream's end at the same time.

use std::io::{self, PipeReader, Read, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::{self, JoinHandle};

use adit_tasks::wire::{Started, Task, TaskId};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::conn::Conn;
use crate::runner::{Handled, Runner};

/// Stack of a task's thread: used as deep as a goal is nested, which its parser bounds.
const STACK_BYTES: usize = 2 * 1024 * 1024;

/// The runner; a task's thread has it locked for as long as the task runs.
#[derive(Clone)]
pub struct SharedRunner(Arc<Mutex<Runner>>);

impl SharedRunner {
    /// Shares this runner.
    pub fn new(runner: Runner) -> Self {
        Self(Arc::new(Mutex::new(runner)))
    }

    /// The runner; waits until a running task has ended.
    pub fn lock(&self) -> MutexGuard<'_, Runner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The runner; none while a task runs.
    pub fn if_idle(&self) -> Option<MutexGuard<'_, Runner>> {
        match self.0.try_lock() {
            Ok(runner) => Some(runner),
            Err(TryLockError::Poisoned(runner)) => Some(runner.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Whether a task runs.
    pub fn is_busy(&self) -> bool {
        self.if_idle().is_none()
    }

    /// Begins a task.
    ///
    /// # Errors
    /// There are no descriptors or threads left. Nothing was done with the task then, and it may be handed out again.
    pub fn begin(&self, task: Task) -> io::Result<Running> {
        let (news, mut tell) = io::pipe()?;
        let (runner, task_id) = (self.clone(), task.task_id);
        let thread = thread::Builder::new()
            .name("task".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                // It fails only when the agent is ending.
                let began = |_: &Started| drop(tell.write_all(b"b"));
                let handled = runner.lock().handle(&task, began);
                // The end of the events, now that the runner is unlocked.
                drop(tell);
                handled
            })?;
        Ok(Running {
            task_id,
            began: false,
            news,
            thread,
        })
    }
}

/// A task from its frame to its report.
pub struct Running {
    task_id: TaskId,
    /// It is on disk as started.
    began: bool,
    news: PipeReader,
    thread: JoinHandle<Handled>,
}

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The task has started.
    Started,
    /// The task has its terminal state, or its time has not come.
    Ended,
    /// The stream has bytes, or has ended.
    Stream,
}

impl Running {
    /// The message that says so, if the task has started: for every stream.
    pub fn started(&self) -> Option<Started> {
        let task_id = self.task_id;
        self.began.then_some(Started { task_id })
    }

    /// Waits for the next event of the task or of the stream.
    ///
    /// # Errors
    /// The kernel refuses to wait.
    pub fn next(&mut self, conn: &Conn) -> io::Result<Event> {
        let mut fds =
            [self.news.as_fd(), conn.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        while let Err(e) = poll(&mut fds, PollTimeout::NONE) {
            if e != Errno::EINTR {
                return Err(e.into());
            }
        }
        // The task first: its report goes to whatever stream is there.
        if !fds[0].any().unwrap_or(true) {
            return Ok(Event::Stream);
        }
        let began = self.news.read(&mut [0])? > 0;
        self.began |= began;
        Ok(if began { Event::Started } else { Event::Ended })
    }

    /// The result, once it has ended.
    pub fn handled(self) -> Handled {
        match self.thread.join() {
            Ok(handled) => handled,
            // As without a thread of its own: the agent ends, and the next one reports the task as interrupted.
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}
