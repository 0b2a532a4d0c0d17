//! What waits for a listener: streams that the guest opened, and that the application has yet to accept.

use std::collections::VecDeque;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use adit_engine::StreamId;

/// Maximum number of streams that wait in a listener. Further ones are refused.
pub const BACKLOG_MAX: usize = 128;

/// Why this process cannot listen on a host port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListenError {
    /// Another listener of this process has the port. The caller's fault.
    #[error("port {port} already has a listener: drop that one first, or choose another port")]
    Taken {
        /// The port.
        port: u32,
    },
    /// Too many ports have listeners. The caller's fault.
    #[error("{0}: drop another listener's shard, or serve more than one service on a port")]
    TableFull(adit_engine::ListenError),
    /// The shard has ended.
    #[error("the shard has ended")]
    Gone,
}

impl From<adit_engine::ListenError> for ListenError {
    fn from(e: adit_engine::ListenError) -> Self {
        Self::TableFull(e)
    }
}

impl From<ListenError> for io::Error {
    fn from(e: ListenError) -> Self {
        let kind = match e {
            ListenError::Taken { .. } => io::ErrorKind::AddrInUse,
            ListenError::TableFull(_) => io::ErrorKind::Other,
            ListenError::Gone => io::ErrorKind::NotConnected,
        };
        Self::new(kind, e)
    }
}

/// A stream that the guest opens, as the shard knows it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offered {
    pub(crate) stream: StreamId,
    pub(crate) local_port: u32,
    pub(crate) peer_port: u32,
}

/// A listener's queue, shared between the shard and the listener.
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    listening: Option<Result<(), ListenError>>,
    waiting: VecDeque<Offered>,
    closed: bool,
}

impl Backlog {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// For the shard: says whether the port is listened on.
    pub(crate) fn listening(&self, result: Result<(), ListenError>) {
        self.lock().listening = Some(result);
        self.changed.notify_all();
    }

    /// Waits until the shard has said whether the port is listened on.
    pub(crate) fn listened(&self) -> Result<(), ListenError> {
        let mut state = self.lock();
        while state.listening.is_none() && !state.closed {
            state = self.wait(state);
        }
        state.listening.ok_or(ListenError::Gone)?
    }

    /// Returns true if the listener still exists.
    pub(crate) fn is_open(&self) -> bool {
        !self.lock().closed
    }

    /// Adds a stream to the queue. Returns false if no one will accept it.
    pub(crate) fn offer(&self, offered: Offered) -> bool {
        let mut state = self.lock();
        if state.closed || state.waiting.len() >= BACKLOG_MAX {
            return false;
        }
        state.waiting.push_back(offered);
        self.changed.notify_one();
        true
    }

    /// Waits for the next stream. `None`: the queue was closed.
    pub(crate) fn next(&self) -> Option<Offered> {
        let mut state = self.lock();
        loop {
            if let Some(offered) = state.waiting.pop_front() {
                return Some(offered);
            }
            if state.closed {
                return None;
            }
            state = self.wait(state);
        }
    }

    /// Closes the queue, and returns the streams in it: they are yet to be refused.
    pub(crate) fn close(&self) -> VecDeque<Offered> {
        let mut state = self.lock();
        state.closed = true;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        self.changed.notify_all();
        waiting
    }
}
