//! A task that runs on a thread of its own, so that the stream it came on can end, and the next one begin, while it does.
//!
//! ```text
//! client's thread            task's thread
//!   begin ───────────────────► Runner::handle: verified, on disk as begun
//!   next: Began ◄── one byte ──┤  the effect
//!   next: Ended ◄── the end ───┘  its terminal state is on disk
//! ```
//! What the client waits with is a descriptor, so that it hears of its stream's end at the same time.

use std::io::{self, PipeReader, Read, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use adit_tasks::wire::{Started, Task, TaskId};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::conn::Conn;
use crate::runner::{Handled, Runner};

/// Stack of a task's thread: touched as deep as a goal is nested, which its parser bounds.
const STACK_BYTES: usize = 2 * 1024 * 1024;

/// Who runs tasks: held by a task's thread from its first line to its last, and free in between.
#[derive(Clone)]
pub struct Hand(Arc<Mutex<Runner>>);

impl Hand {
    /// Lends out this runner.
    pub fn new(runner: Runner) -> Self {
        Self(Arc::new(Mutex::new(runner)))
    }

    /// The runner; waits for the end of a task that runs.
    pub fn free(&self) -> MutexGuard<'_, Runner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a task.
    ///
    /// # Errors
    /// There are no descriptors or threads to be had. The task was not looked at then, and may be handed out again.
    pub fn begin(&self, task: Task) -> io::Result<Running> {
        let (news, mut tell) = io::pipe()?;
        let (hand, task_id) = (self.clone(), task.task_id);
        let thread = thread::Builder::new()
            .name("task".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                // Nobody reads it any more only when the agent ends.
                let began = |_: &Started| drop(tell.write_all(b"b"));
                let handled = hand.free().handle(&task, began);
                // The end of the news, now that the runner is free.
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
    /// It is on disk that it begins.
    began: bool,
    news: PipeReader,
    thread: JoinHandle<Handled>,
}

/// What there is to be done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// It begins.
    Began,
    /// It has its terminal state, or its time has not come.
    Ended,
    /// The stream has bytes, or has ended; nothing is new with the task.
    Stream,
}

impl Running {
    /// What the host is told once the task has begun, on every stream.
    pub fn started(&self) -> Option<Started> {
        let task_id = self.task_id;
        self.began.then_some(Started { task_id })
    }

    /// Waits for whatever comes next, with the task or with the stream.
    ///
    /// # Errors
    /// The kernel refuses to wait.
    pub fn next(&mut self, conn: &Conn) -> io::Result<News> {
        let mut fds =
            [self.news.as_fd(), conn.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        while let Err(e) = poll(&mut fds, PollTimeout::NONE) {
            if e != Errno::EINTR {
                return Err(e.into());
            }
        }
        // The task first: its report goes to whichever stream is there.
        if !fds[0].any().unwrap_or(true) {
            return Ok(News::Stream);
        }
        let began = self.news.read(&mut [0])? > 0;
        self.began |= began;
        Ok(if began { News::Began } else { News::Ended })
    }

    /// What came of it, at its end.
    pub fn handled(self) -> Handled {
        match self.thread.join() {
            Ok(handled) => handled,
            // As if it had not had a thread: the agent ends, and its successor reports the task as interrupted.
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}
