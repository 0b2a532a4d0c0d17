//! Holds threads: processors and event loops wait at a gate between two pieces of work while it is closed.
//!
//! ```text
//! open ── close ──► closed: every thread waits at the gate, nothing in the VM moves ── open ──► open
//!   └──────────────────────────────── end ────────────────────────────────────────► ended: threads return
//! ```

use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::bus::lock;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// A signal that arrives before the thread enters the kernel has no effect, so it is sent again until the thread has reacted.
const AGAIN: Duration = Duration::from_millis(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    Closed,
    Ended,
}

#[derive(Debug)]
struct Inner {
    state: State,
    waiting: usize,
}

/// See the diagram above.
#[derive(Debug)]
pub struct Gate {
    inner: Mutex<Inner>,
    changed: Condvar,
}

extern "C" fn heard(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Gate {
    /// Makes a closed gate. From now on `SIGRTMIN` interrupts a thread's system call.
    ///
    /// # Errors
    /// The signal cannot be handled.
    pub fn closed() -> anyhow::Result<Self> {
        register_signal_handler(SIGRTMIN(), heard)?;
        let (state, waiting) = (State::Closed, 0);
        let (inner, changed) = (Mutex::new(Inner { state, waiting }), Condvar::new());
        Ok(Self { inner, changed })
    }

    /// Called by the threads between two pieces of work. Waits while the gate is closed; `settle` finishes what is half done
    /// before that. Returns false if the thread must end.
    pub fn pass(&self, settle: impl FnOnce()) -> bool {
        let mut inner = lock(&self.inner);
        if inner.state == State::Closed {
            drop(inner);
            settle();
            inner = lock(&self.inner);
            // The gate was opened during `settle`.
            if inner.state != State::Closed {
                return inner.state != State::Ended;
            }
            inner.waiting += 1;
            self.changed.notify_all();
            inner = self
                .changed
                .wait_while(inner, |i| i.state == State::Closed)
                .unwrap_or_else(PoisonError::into_inner);
            inner.waiting -= 1;
        }
        inner.state != State::Ended
    }

    /// Closes the gate and waits until all threads are waiting at it. `threads` must be all threads that call `pass`.
    pub fn close(&self, threads: &[JoinHandle<()>]) {
        let mut inner = lock(&self.inner);
        inner.state = State::Closed;
        while inner.waiting < threads.iter().filter(|t| !t.is_finished()).count() {
            interrupt(threads);
            inner = self
                .changed
                .wait_timeout(inner, AGAIN)
                .map_or_else(|e| e.into_inner().0, |(inner, _)| inner);
        }
    }

    /// Lets the threads continue.
    pub fn open(&self) {
        lock(&self.inner).state = State::Open;
        self.changed.notify_all();
    }

    /// Ends the threads and waits for them.
    pub fn end(&self, threads: Vec<JoinHandle<()>>) {
        lock(&self.inner).state = State::Ended;
        self.changed.notify_all();
        while threads.iter().any(|t| !t.is_finished()) {
            interrupt(&threads);
            std::thread::sleep(AGAIN);
        }
        for thread in threads {
            // An error is a panic. Its message was printed, and the VM is ending.
            let _ = thread.join();
        }
    }
}

fn interrupt(threads: &[JoinHandle<()>]) {
    for thread in threads.iter().filter(|t| !t.is_finished()) {
        // An error means that the thread has ended.
        let _ = thread.kill(SIGRTMIN());
    }
}
