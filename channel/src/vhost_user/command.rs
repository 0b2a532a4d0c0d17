//! Commands of the frontend's thread to the shard, and the call descriptors that the shard writes to.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};

use adit_engine::ResetReason;
use nix::sys::eventfd::EventFd;

use super::VmMemoryRef;
use crate::device::{ActivateError, Signal, VirtQueues};

/// Everything that a session needs.
pub(super) struct Start {
    pub(super) mem: VmMemoryRef,
    pub(super) features: u64,
    pub(super) queues: VirtQueues,
    pub(super) calls: [Option<OwnedFd>; 2],
    /// The driver of these virtqueues.
    pub(super) driver: Driver,
}

/// The driver behind the virtqueues of a session that begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Driver {
    /// The driver of the paused session. Nothing has changed, so its streams continue.
    Same,
    /// A driver that has used these virtqueues before. It may have streams that the device no longer knows.
    Continued,
    /// A driver that has just started.
    New,
}

/// The state in which the virtqueues were stopped.
#[derive(Clone, Copy, Debug)]
pub(super) struct Paused {
    /// Positions of both virtqueues.
    pub(super) bases: [u16; 2],
    /// There is a session that can continue.
    pub(super) held: bool,
}

/// A change of the device, applied between bursts.
pub(super) enum Command {
    Start(Box<Start>, Answer<Result<(), ActivateError>>),
    /// Stop the virtqueues and keep the session's streams. No buffer is completed after the answer.
    Pause(Answer<Paused>),
    /// End the session, paused or not.
    End(ResetReason, Answer<()>),
    Memory(VmMemoryRef, Answer<Result<(), ActivateError>>),
    Call(u16, Option<OwnedFd>),
    Kick(u16, OwnedFd),
}

/// The way back for an answer.
pub(super) struct Answer<T>(SyncSender<T>);

impl<T> Answer<T> {
    pub(super) fn send(self, value: T) {
        // An error means that the asking thread has ended.
        let _ = self.0.try_send(value);
    }
}

/// The shard has ended.
#[derive(Debug, thiserror::Error)]
#[error("the device's shard has ended")]
pub(super) struct ShardGone;

/// The thread's end of the command channel.
#[derive(Clone)]
pub(super) struct Link {
    pub(super) commands: SyncSender<Command>,
    pub(super) waker: Arc<EventFd>,
}

impl Link {
    /// Sends a command. Blocks while the shard's command queue is full.
    pub(super) fn post(&self, command: Command) -> Result<(), ShardGone> {
        self.commands.send(command).map_err(|_| ShardGone)?;
        self.wake();
        Ok(())
    }

    /// Wakes the shard.
    pub(super) fn wake(&self) {
        // The write fails only when the counter is full, and then the shard wakes anyway.
        let _ = self.waker.write(1);
    }

    /// Sends a command and waits for its answer.
    pub(super) fn ask<T>(&self, make: impl FnOnce(Answer<T>) -> Command) -> Result<T, ShardGone> {
        let (sender, receiver): (_, Receiver<T>) = mpsc::sync_channel(1);
        self.post(make(Answer(sender)))?;
        receiver.recv().map_err(|_| ShardGone)
    }
}

/// The call descriptors of both virtqueues. Only the shard uses them, so the locks are never contended.
#[derive(Default)]
pub(super) struct Calls([Mutex<Option<OwnedFd>>; 2]);

impl Calls {
    /// Replaces a descriptor and signals the new one. A notification may have gone to the old one when the frontend
    /// was already watching the new one (QEMU does this when the guest masks a vector). An extra notification is
    /// harmless.
    pub(super) fn replace(&self, queue: u16, call: Option<OwnedFd>) {
        if let Some(slot) = self.0.get(usize::from(queue)) {
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = call;
            self.signal(queue);
        }
    }

    pub(super) fn clear(&self) {
        for slot in &self.0 {
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }
}

impl Signal for Calls {
    fn signal(&self, queue: u16) {
        let Some(slot) = self.0.get(usize::from(queue)) else {
            return;
        };
        if let Some(fd) = &*slot.lock().unwrap_or_else(PoisonError::into_inner) {
            // The descriptor is nonblocking. A full counter means that the driver has not looked yet, and will.
            if let Err(e) = nix::unistd::write(fd, &1u64.to_ne_bytes()) {
                tracing::trace!(queue, error = %e, "call descriptor");
            }
        }
    }
}
