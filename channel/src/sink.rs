//! The host's end of a stream's bytes: a socket, the application's end in this process, or an inline service.
//!
//! | sink | thread | copies in user space | used for |
//! |---|---|---|---|
//! | `Fd` | shard | 0 (the kernel copies between guest memory and socket) | tunnels |
//! | `Local` | the application's | 1 in each direction | `Stream` |
//! | `Inline` | shard | 1 in each direction | services that need low latency |

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Instant;

use adit_engine::{ResetReason, StreamId};

use crate::dial::DialError;
use crate::hello::Accept;

/// Maximum number of bytes that a local end holds in each direction.
pub const LOCAL_MAX: usize = 64 << 10;
/// Maximum number of bytes of an inline service that may wait for the guest.
pub const INLINE_MAX: usize = 256 << 10;

/// The host's end of a stream.
pub enum Sink {
    /// A stream socket. It need not be nonblocking.
    Fd(OwnedFd),
    /// The application's end in this process.
    Local(LocalEnd),
    /// A service that runs on the shard's thread.
    Inline(Box<dyn Service>),
}

impl std::fmt::Debug for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fd(fd) => f.debug_tuple("Fd").field(fd).finish(),
            Self::Local(_) => f.write_str("Local"),
            Self::Inline(_) => f.write_str("Inline"),
        }
    }
}

/// An event on the stream of a service.
#[derive(Debug)]
pub enum ServiceEvent<'a> {
    /// The stream is open.
    Opened,
    /// Bytes from the guest. Bytes that are not taken ([`StreamIo::take`]) are shown again, with later bytes after
    /// them.
    Data(&'a [u8]),
    /// All queued output was sent.
    Writable,
    /// The guest sends no more.
    PeerDone,
}

/// A service that runs on the shard's thread: it must not block.
pub trait Service: Send {
    /// Handles one event.
    fn on_event(&mut self, event: ServiceEvent<'_>, io: &mut StreamIo<'_>);
}

/// What a service may do with its stream.
pub struct StreamIo<'a> {
    pub(crate) out: &'a mut VecDeque<u8>,
    pub(crate) straight: Option<DirectWrite<'a>>,
    pub(crate) taken: usize,
    pub(crate) more: bool,
    pub(crate) done: bool,
    pub(crate) reset: bool,
}

/// The packet that is sent next. Bytes that fit are written into it without being queued.
pub(crate) struct DirectWrite<'a> {
    pub(crate) put: &'a mut dyn FnMut(&[u8]) -> usize,
    pub(crate) room: usize,
}

impl<'a> StreamIo<'a> {
    pub(crate) fn new(out: &'a mut VecDeque<u8>) -> Self {
        Self {
            out,
            straight: None,
            taken: 0,
            more: false,
            done: false,
            reset: false,
        }
    }

    /// Number of bytes that `write` accepts now.
    pub fn room(&self) -> usize {
        INLINE_MAX.saturating_sub(self.out.len()) + self.straight()
    }

    /// How many of these bytes go directly into the packet that is sent next, and so are copied only once. It can be
    /// above zero when [`ServiceEvent::Writable`] follows [`ask`](Self::ask).
    pub fn straight(&self) -> usize {
        let straight = self.straight.as_ref().filter(|_| self.out.is_empty());
        straight.map_or(0, |s| s.room)
    }

    /// Sends bytes to the guest or queues them. Returns how many were accepted.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        let mut n = bytes.len().min(self.straight());
        if n > 0
            && let Some(straight) = &mut self.straight
        {
            n = (straight.put)(&bytes[..n]);
            straight.room -= n;
        }
        if n < bytes.len() {
            // Later bytes must not overtake the queued ones.
            self.straight = None;
        }
        let rest = &bytes[n..];
        let queued = rest.len().min(INLINE_MAX.saturating_sub(self.out.len()));
        self.out.extend(&rest[..queued]);
        n + queued
    }

    /// Announces that there is more to write. [`ServiceEvent::Writable`] follows when nothing is queued and the guest
    /// has room.
    pub fn ask(&mut self) {
        self.more = true;
    }

    /// Takes `n` bytes of the data that was shown.
    pub fn take(&mut self, n: usize) {
        self.taken += n;
    }

    /// Ends the sending after the bytes that were written.
    pub fn finish(&mut self) {
        self.done = true;
    }

    /// Ends the stream at once.
    pub fn reset(&mut self) {
        self.reset = true;
    }
}

/// The shard's end of a stream in this process. The application has a [`Stream`](crate::stream::Stream).
#[derive(Clone, Default)]
pub struct LocalEnd(pub(crate) Arc<Local>);

impl LocalEnd {
    /// Informs the application that its stream is gone, or could not be opened.
    pub(crate) fn close(&self, reason: Option<ResetReason>, error: DialError) {
        {
            let mut state = self.0.lock();
            state.closed = true;
            state.reason = reason;
            if !state.open {
                state.failure.get_or_insert(error);
            }
        }
        self.0.notify();
    }

    /// Informs the application that its stream could not be opened.
    pub(crate) fn fail(&self, error: DialError) {
        self.close(Some(ResetReason::Local), error);
    }
}

/// The state of one stream that the shard and the application share.
#[derive(Default)]
pub(crate) struct Local {
    state: Mutex<LocalState>,
    changed: Condvar,
}

#[derive(Default)]
pub(crate) struct LocalState {
    /// The stream of the `Port`, if there is one already.
    pub(crate) stream: Option<StreamId>,
    /// The application gave up before there was a stream.
    pub(crate) abandoned: bool,
    /// The stream is open: dialled or accepted.
    pub(crate) open: bool,
    pub(crate) accept: Option<Accept>,
    /// The dial failed.
    pub(crate) failure: Option<DialError>,
    /// The stream is gone.
    pub(crate) closed: bool,
    pub(crate) reason: Option<ResetReason>,
    pub(crate) to_app: VecDeque<u8>,
    pub(crate) to_guest: VecDeque<u8>,
    /// The guest sends no more (after the bytes in `to_app`).
    pub(crate) peer_done: bool,
    /// The guest receives no more.
    pub(crate) peer_recv_done: bool,
    /// The application sends no more (after the bytes in `to_guest`).
    pub(crate) send_done: bool,
    /// The application reads no more.
    pub(crate) recv_done: bool,
    /// Bytes are held for the application because `to_app` had no room for them.
    pub(crate) starved: bool,
    /// The shard was informed of the last change and has not handled it yet.
    pub(crate) kicked: bool,
    pub(crate) read_waker: Option<Waker>,
    pub(crate) write_waker: Option<Waker>,
}

impl Local {
    pub(crate) fn lock(&self) -> MutexGuard<'_, LocalState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a change, at most until `deadline`. Returns false if the deadline passed.
    pub(crate) fn wait<'a>(
        &'a self,
        guard: MutexGuard<'a, LocalState>,
        deadline: Option<Instant>,
    ) -> (MutexGuard<'a, LocalState>, bool) {
        let Some(deadline) = deadline else {
            return (
                self.changed
                    .wait(guard)
                    .unwrap_or_else(PoisonError::into_inner),
                true,
            );
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return (guard, false);
        }
        let (guard, _) = self
            .changed
            .wait_timeout(guard, left)
            .unwrap_or_else(PoisonError::into_inner);
        (guard, true)
    }

    /// Informs the application of changes, once per burst.
    pub(crate) fn notify(&self) {
        let (read, write) = {
            let mut state = self.lock();
            (state.read_waker.take(), state.write_waker.take())
        };
        self.changed.notify_all();
        for waker in [read, write].into_iter().flatten() {
            waker.wake();
        }
    }
}

impl LocalState {
    /// Number of bytes that the application's side accepts now.
    pub(crate) fn room(&self) -> usize {
        if self.recv_done {
            usize::MAX // they are dropped
        } else {
            LOCAL_MAX.saturating_sub(self.to_app.len())
        }
    }

    /// Passes bytes to the application. The caller has checked `room`.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        if !self.recv_done {
            self.to_app.extend(bytes);
        }
    }
}
