//! Closes descriptors on a thread of its own, which may wait for as long as a close takes.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Descriptors of one closer that wait to be closed at most, but for those that came in one packet with the last of them.
pub const PENDING_MAX: usize = 256;
/// How long those who come next wait for descriptors that are closed in order, only many at once.
const PATIENCE: Duration = Duration::from_millis(200);
const STACK_BYTES: usize = 64 << 10;

static SHARED: OnceLock<Closer> = OnceLock::new();

/// One owner's queue of descriptors to be closed. Its thread is there while there is something to close.
#[derive(Clone, Debug)]
pub struct Closer(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    max: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<OwnedFd>,
    /// In the queue, or being closed.
    pending: usize,
    running: bool,
    /// The thread stays when there is nothing to close.
    stays: bool,
    /// There must be no thread yet.
    held: bool,
}

impl Default for Closer {
    fn default() -> Self {
        Self::new(PENDING_MAX)
    }
}

impl Closer {
    /// A closer of so many descriptors at a time, [`PENDING_MAX`] at most: whoever has several owners leaves room for all.
    pub fn new(max: usize) -> Self {
        Self(Arc::new(Inner {
            max: max.clamp(1, PENDING_MAX),
            state: Mutex::default(),
            changed: Condvar::new(),
        }))
    }

    /// The closer of this process: for whoever serves one VM only.
    pub fn shared() -> Self {
        SHARED.get_or_init(Self::default).clone()
    }

    /// Starts no thread before [`prepare`](Self::prepare): for a process that is about to take rights from its one thread.
    pub fn hold(&self) {
        self.lock().held = true;
    }

    /// Starts the thread, which stays. A process that is about to give up making threads calls this before.
    pub fn prepare(&self) {
        let mut state = self.lock();
        (state.stays, state.held) = (true, false);
        self.start(&mut state);
    }

    /// Closes a descriptor, at some time. Never waits.
    pub fn close(&self, fd: impl Into<OwnedFd>) {
        let mut state = self.lock();
        state.queue.push_back(fd.into());
        state.pending += 1;
        // Without a thread it waits for the next descriptor, which tries again.
        self.start(&mut state);
        self.0.changed.notify_all();
    }

    /// Whether so many wait to be closed that nothing more must be taken for this owner.
    pub fn is_full(&self) -> bool {
        self.lock().pending >= self.0.max
    }

    /// The same, for a thread that can wait a moment for those that are closed in order.
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

    /// Descriptors that wait to be closed.
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
                state.running = false;
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
