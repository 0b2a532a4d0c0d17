//! The device of a VMM that runs it in the VMM's own process, on a separate thread.
//!
//! ```text
//!  vCPU threads                        the thread that moves packets
//!  status, queues ─► Remote ── task ──► Linked ◄─► VsockDevice
//!                       ◄── answer ───────┘            ▲
//!  kicks: ioeventfd ───────────────────────────────────┤ epoll
//!  interrupt: irqfd ◄──────────────────────────────────┘
//! ```
//! The device belongs to its thread. A register access becomes a task that this thread runs between two bursts, so the
//! data path has no lock. `Linked` is the carrier for a shard. `Remote` is for the bus. A VMM that prefers to keep the
//! device behind a lock needs none of this: see `channel/examples/link_the_device.rs`.
//!
//! This file also serves the event queue: a restored guest is informed that its streams are gone. If the guest has no
//! event buffer at that time, it is informed when it kicks the queue.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use adit_engine::ResetReason;
use nix::sys::eventfd::{EfdFlags, EventFd};
use vm_memory::GuestAddressSpace;

use crate::carrier::{Carrier, Woken};
use crate::device::{
    ActivateError, DeviceError, DeviceState, QueueConfig, RestoreError, Signal, VirtQueue,
    VirtQueues, VsockDevice, WAKERS, drain,
};

type Task<M> = Box<dyn FnOnce(&mut Linked<M>) + Send>;

const WAKER_TASKS: u32 = WAKERS;
const WAKER_EVENT_KICK: u32 = WAKERS + 1;

/// A device and its task queue, as a carrier.
pub struct Linked<M: GuestAddressSpace> {
    device: VsockDevice<M>,
    tasks: Receiver<Task<M>>,
    bell: Arc<EventFd>,
    /// Kicks of the RX, TX and event queue.
    kicks: [OwnedFd; 3],
    /// The guest must still be informed that its streams are gone.
    owes_reset: bool,
}

/// The bus's side: it runs tasks on the device's thread.
pub struct Remote<M: GuestAddressSpace> {
    tasks: Sender<Task<M>>,
    /// Wakes the thread.
    bell: Arc<EventFd>,
}

/// The device's thread is stopped while this value lives.
#[derive(Debug)]
pub struct Held {
    _go_on: Sender<()>,
}

/// The device's thread has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the vsock device has ended")]
pub struct Gone;

/// Why a device does not accept a setup: the fault of the driver or of the snapshot, except for the last variant.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The features are wrong.
    #[error(transparent)]
    Features(#[from] DeviceError),
    /// The queues cannot be used.
    #[error(transparent)]
    Queues(#[from] ActivateError),
    /// The saved state cannot be used.
    #[error(transparent)]
    State(#[from] RestoreError),
    /// This process has no free descriptors.
    #[error(transparent)]
    Descriptor(#[from] io::Error),
}

/// Connects a device with a task queue. `kicks` are nonblocking eventfds for the driver's kicks of the RX, TX and
/// event queue.
///
/// # Errors
/// This process has no free descriptors.
pub fn link<M: GuestAddressSpace>(
    device: VsockDevice<M>,
    kicks: [OwnedFd; 3],
) -> io::Result<(Linked<M>, Remote<M>)> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let bell = Arc::new(EventFd::from_flags(flags)?);
    let (sender, tasks) = mpsc::channel();
    let linked = Linked {
        device,
        tasks,
        bell: bell.clone(),
        kicks,
        owes_reset: false,
    };
    let remote = Remote {
        tasks: sender,
        bell,
    };
    Ok((linked, remote))
}

impl<M: GuestAddressSpace + 'static> Remote<M> {
    fn post(&self, task: Task<M>) -> Result<(), Gone> {
        self.tasks.send(task).map_err(|_| Gone)?;
        // The write fails only when the counter is full, and then the thread wakes anyway.
        let _ = self.bell.write(1);
        Ok(())
    }

    /// Runs a function with the device on its thread, between two bursts, and waits for the result.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn ask<T: Send + 'static>(
        &self,
        what: impl FnOnce(&mut Linked<M>) -> T + Send + 'static,
    ) -> Result<T, Gone> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.post(Box::new(move |linked| {
            // The calling thread waits for this result below.
            let _ = reply.send(what(linked));
        }))?;
        answer.recv().map_err(|_| Gone)
    }

    /// Stops the thread between two bursts, when no descriptor is in use. Returns the state of the device at that
    /// point.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn hold(&self) -> Result<(DeviceState, Held), Gone> {
        let (reply, answer) = mpsc::sync_channel(1);
        let (sender, go_on) = mpsc::channel();
        self.post(Box::new(move |linked| {
            let _ = reply.send(linked.device.save());
            // Blocks until the other end is dropped.
            let _ = go_on.recv();
        }))?;
        let state = answer.recv().map_err(|_| Gone)?;
        Ok((state, Held { _go_on: sender }))
    }
}

impl<M: GuestAddressSpace> Linked<M> {
    /// DRIVER_OK: begins a session with these queues: RX, TX, events. The shell is informed through the device's
    /// waker.
    ///
    /// # Errors
    /// The driver's setup cannot be used, or this process has no free descriptors.
    pub fn activate(
        &mut self,
        features: u64,
        mem: M,
        queues: [impl Into<QueueConfig>; 3],
        signal: Arc<dyn Signal>,
    ) -> Result<(), SetupError> {
        let [rx_kick, tx_kick] = self.data_kicks()?;
        let [rx, tx, event] = queues.map(Into::into);
        let with = |queue, kick| VirtQueue { queue, kick };
        let queues = VirtQueues {
            rx: with(rx, rx_kick),
            tx: with(tx, tx_kick),
            event: Some(event),
        };
        self.device.ack_features(features)?;
        Ok(self.device.activate(mem, queues, signal)?)
    }

    /// Replaces the kicks that `link` got, for a bus that learns them only from the driver. Call it before
    /// [`activate`](Self::activate) or [`restore`](Self::restore): a session that has begun keeps its RX and TX kicks.
    pub fn set_kicks(&mut self, kicks: [OwnedFd; 3]) {
        self.kicks = kicks;
    }

    /// Duplicates the RX and TX kicks, because the device closes its own when a session ends.
    fn data_kicks(&self) -> io::Result<[Option<OwnedFd>; 2]> {
        let [rx, tx, _] = &self.kicks;
        Ok([Some(rx.try_clone()?), Some(tx.try_clone()?)])
    }

    /// Continues with the queues of a saved device, in a new session. The guest is informed of it.
    ///
    /// # Errors
    /// The state does not fit the memory or this device, or this process has no free descriptors. Nothing changes.
    pub fn restore(
        &mut self,
        state: &DeviceState,
        mem: M,
        signal: Arc<dyn Signal>,
    ) -> Result<(), SetupError> {
        let kicks = self.data_kicks()?;
        self.device.restore(state, mem, kicks, signal)?;
        self.owes_reset = true;
        self.inform_guest();
        Ok(())
    }

    /// The VM got or lost memory (hot-plug). When this returns, the device has no reference to the old memory.
    ///
    /// # Errors
    /// A queue is not in the new memory. The device keeps the old memory, which must remain mapped.
    pub fn set_memory(&mut self, mem: M) -> Result<(), ActivateError> {
        self.device.set_memory(mem)
    }

    /// The driver reset the device: every stream ends, and the device no longer accesses its queues.
    pub fn reset(&mut self) {
        // A driver that starts again has no old streams.
        self.owes_reset = false;
        self.device.reset(ResetReason::Epoch);
    }

    fn inform_guest(&mut self) {
        if self.owes_reset {
            match self.device.tell_transport_reset() {
                Ok(informed) => self.owes_reset = !informed,
                // The guest broke its event queue.
                Err(_) => {
                    self.owes_reset = false;
                    self.device.tear();
                }
            }
        }
    }
}

impl<M: GuestAddressSpace> Carrier for Linked<M> {
    crate::carrier::carried_by!(device: VsockDevice<M>);

    fn begin(&mut self) {
        self.device.begin();
    }

    fn tear(&mut self) {
        self.device.tear();
    }

    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>, u32)) {
        visit(self.bell.as_fd(), WAKER_TASKS);
        visit(self.kicks[2].as_fd(), WAKER_EVENT_KICK);
        self.device.wakers(visit);
    }

    fn woken(&mut self, id: u32) -> Woken {
        match id {
            WAKER_TASKS => {
                drain(self.bell.as_fd());
                while let Ok(task) = self.tasks.try_recv() {
                    task(self);
                }
            }
            WAKER_EVENT_KICK => {
                drain(self.kicks[2].as_fd());
                self.inform_guest();
            }
            id => return self.device.woken(id),
        }
        Woken::default()
    }
}
