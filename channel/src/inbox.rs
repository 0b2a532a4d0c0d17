//! Commands of other threads to a shard: a queue and an eventfd that wakes it.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use adit_engine::{ResetReason, StreamId, Tick};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::backlog::Backlog;
use crate::dial::DialRequest;
use crate::sink::{LocalEnd, Sink};

/// A command to a shard, for the `Port` with this index.
pub(crate) enum Command {
    Dial(u16, DialRequest, LocalEnd),
    Listen(u16, u32, Arc<Backlog>),
    Accept(u16, StreamId, LocalEnd),
    Refuse(u16, StreamId),
    Changed(u16, StreamId),
    Reset(u16, StreamId, ResetReason),
    Attach(u16, StreamId, Sink),
    Stop,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Command")
    }
}

/// The command queue of a shard.
#[derive(Debug)]
pub(crate) struct Inbox {
    /// `None` after the shard has ended.
    commands: Mutex<Option<Vec<Command>>>,
    event: EventFd,
    start: Instant,
}

impl Inbox {
    /// Makes the queue. The shard's clock starts now.
    ///
    /// # Errors
    /// This process has no free descriptors.
    pub(crate) fn new() -> std::io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self {
            commands: Mutex::new(Some(Vec::new())),
            event,
            start: Instant::now(),
        })
    }

    /// Returns false if the shard has ended. The command is dropped then.
    pub(crate) fn send(&self, command: Command) -> bool {
        let mut commands = self.lock();
        let Some(queue) = commands.as_mut() else {
            return false;
        };
        queue.push(command);
        let first = queue.len() == 1;
        drop(commands);
        if first {
            // The write fails only when the counter is full, and then the eventfd is readable anyway.
            let _ = self.event.write(1);
        }
        true
    }

    /// Takes what was sent since the last call.
    pub(crate) fn take(&self) -> Vec<Command> {
        let _ = self.event.read();
        self.lock().as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Ends the queue, and returns what is in it. Nothing can be sent any more.
    pub(crate) fn close(&self) -> Vec<Command> {
        self.lock().take().unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<Command>>> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The shard's clock.
    pub(crate) fn tick(&self, at: Instant) -> Tick {
        let ns = at.saturating_duration_since(self.start).as_nanos();
        Tick(u64::try_from(ns).unwrap_or(u64::MAX))
    }
}

impl AsFd for Inbox {
    /// Readable when there are commands.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// Sends commands to one `Port` of a shard, from any thread.
#[derive(Clone, Debug)]
pub struct Handle {
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) port: u16,
}
