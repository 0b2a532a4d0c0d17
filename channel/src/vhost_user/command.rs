//! What the frontend's thread asks of the shard, and the call descriptors that the shard rings.

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
    /// Whose rings they are.
    pub(super) driver: Driver,
}

/// Who is behind the rings of a session that begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Driver {
    /// The one of the session that was paused: nothing is different, so its streams go on.
    Same,
    /// One that has used these rings before: it may have streams, of which the device knows nothing any more.
    LivesOn,
    /// One that has just begun.
    New,
}

/// Where rings were stopped.
#[derive(Clone, Copy, Debug)]
pub(super) struct Paused {
    /// Positions of both queues.
    pub(super) bases: [u16; 2],
    /// There is a session to go on with.
    pub(super) held: bool,
}

/// A change of the device, applied between bursts.
pub(super) enum Command {
    Start(Box<Start>, Answer<Result<(), ActivateError>>),
    /// The rings stop, and the session's streams are held. Nothing is completed after the answer.
    Pause(Answer<Paused>),
    /// The session is over, paused or not.
    End(ResetReason, Answer<()>),
    Memory(VmMemoryRef, Answer<Result<(), ActivateError>>),
    Call(u16, Option<OwnedFd>),
    Kick(u16, OwnedFd),
}

/// Where an answer goes.
pub(super) struct Answer<T>(SyncSender<T>);

impl<T> Answer<T> {
    pub(super) fn give(self, value: T) {
        // Nobody waits any more: the thread has ended, and with it the question.
        let _ = self.0.try_send(value);
    }
}

/// The shard is gone.
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
    /// Posts a command. Blocks while the shard has a full queue of them.
    pub(super) fn post(&self, command: Command) -> Result<(), ShardGone> {
        self.commands.send(command).map_err(|_| ShardGone)?;
        // Fails only when 2^64 - 2 wake-ups are pending: it is awake.
        let _ = self.waker.write(1);
        Ok(())
    }

    /// Posts a command and waits for its answer.
    pub(super) fn ask<T>(&self, make: impl FnOnce(Answer<T>) -> Command) -> Result<T, ShardGone> {
        let (sender, receiver): (_, Receiver<T>) = mpsc::sync_channel(1);
        self.post(make(Answer(sender)))?;
        receiver.recv().map_err(|_| ShardGone)
    }
}

/// The call descriptors of both queues. Only the shard touches them, so the locks are never contended.
#[derive(Default)]
pub(super) struct Calls([Mutex<Option<OwnedFd>>; 2]);

impl Calls {
    /// Replaces a descriptor and rings the new one: a notification may have gone to the old one while the frontend
    /// was already looking at the new (QEMU does this when the guest masks a vector). One too many is harmless.
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
            // Nonblocking: full means that the driver has not looked yet and will.
            if let Err(e) = nix::unistd::write(fd, &1u64.to_ne_bytes()) {
                tracing::trace!(queue, error = %e, "call descriptor");
            }
        }
    }
}
