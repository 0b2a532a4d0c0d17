//! Closes descriptors on a separate thread, which may block for as long as a close takes.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Maximum number of descriptors that wait in one closer. The last packet may exceed it by the descriptors that came
/// with it.
pub const PENDING_MAX: usize = 256;
/// How long [`Closer::stays_full`] waits for the queue to shrink, when the closes work and are only many.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long the thread of one that [lingers](Closer::lingering) waits for more.
const LINGER: Duration = Duration::from_secs(1);
const STACK_BYTES: usize = 64 << 10;

static SHARED: OnceLock<Closer> = OnceLock::new();

/// One owner's queue of descriptors to close. Its thread runs only while the queue has entries, or for a second more,
/// unless it was prepared.
#[derive(Clone, Debug)]
pub struct Closer(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    max: usize,
    /// How long the thread stays when the queue is empty.
    linger: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<OwnedFd>,
    /// Descriptors in the queue or being closed.
    pending: usize,
    running: bool,
    /// The thread keeps running when the queue is empty.
    stays: bool,
    /// No thread may be started yet.
    held: bool,
}

impl Default for Closer {
    fn default() -> Self {
        Self::new(PENDING_MAX)
    }
}

impl Closer {
    /// Makes a closer for at most `max` descriptors at a time, and never more than [`PENDING_MAX`]. A process with
    /// several owners gives each a part, so that all fit in the descriptor table.
    pub fn new(max: usize) -> Self {
        Self::with(max, Duration::ZERO)
    }

    /// The same for an owner that closes again and again: its thread stays for a second, since to start one for each
    /// descriptor costs more than the close.
    pub fn lingering(max: usize) -> Self {
        Self::with(max, LINGER)
    }

    fn with(max: usize, linger: Duration) -> Self {
        Self(Arc::new(Inner {
            max: max.clamp(1, PENDING_MAX),
            linger,
            state: Mutex::default(),
            changed: Condvar::new(),
        }))
    }

    /// The closer that this whole process shares. For a process that serves only one VM.
    pub fn shared() -> Self {
        SHARED.get_or_init(Self::default).clone()
    }

    /// Forbids the thread until [`prepare`](Self::prepare) is called. For a process that is about to drop privileges,
    /// which it must do while it has only one thread.
    pub fn hold(&self) {
        self.lock().held = true;
    }

    /// Starts the thread and keeps it. A process calls this before it gives up the right to create threads.
    pub fn prepare(&self) {
        let mut state = self.lock();
        (state.stays, state.held) = (true, false);
        self.start(&mut state);
    }

    /// Queues a descriptor for closing. Never blocks.
    pub fn close(&self, fd: impl Into<OwnedFd>) {
        let mut state = self.lock();
        state.queue.push_back(fd.into());
        state.pending += 1;
        // If no thread can be started, the descriptor waits in the queue; the next call tries again.
        self.start(&mut state);
        self.0.changed.notify_all();
    }

    /// Returns true if so many descriptors wait that this owner must not receive any more.
    pub fn is_full(&self) -> bool {
        self.lock().pending >= self.0.max
    }

    /// As [`is_full`](Self::is_full), but waits up to 200 ms for the queue to shrink first. For a thread that may wait
    /// that long.
    pub fn stays_full(&self) -> bool {
        let end = Instant::now() + PATIENCE;
        let mut state = self.lock();
        while state.pending >= self.0.max {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            let waited = self.0.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        false
    }

    /// Number of descriptors that wait to be closed.
    pub fn pending(&self) -> usize {
        self.lock().pending
    }

    fn start(&self, state: &mut State) {
        if state.running || state.held {
            return;
        }
        let closer = self.clone();
        let thread = std::thread::Builder::new().name("closer".into());
        let started = thread.stack_size(STACK_BYTES).spawn(move || closer.run());
        state.running = started.is_ok();
    }

    fn run(self) {
        let mut state = self.lock();
        loop {
            if let Some(fd) = state.queue.pop_front() {
                drop(state);
                drop(fd);
                state = self.lock();
                state.pending -= 1;
                self.0.changed.notify_all();
            } else if state.stays {
                let waited = self.0.changed.wait(state);
                state = waited.unwrap_or_else(PoisonError::into_inner);
            } else {
                let waited = self
                    .0
                    .changed
                    .wait_timeout_while(state, self.0.linger, |state| {
                        state.queue.is_empty() && !state.stays
                    });
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
                if state.queue.is_empty() && !state.stays {
                    state.running = false;
                    return;
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
