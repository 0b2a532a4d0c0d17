//! The device of a VMM that has it in its own process, on a thread of its own.
//!
//! ```text
//!  vCPU threads                        the thread that moves packets
//!  status, queues ─► Remote ── task ──► Linked ◄─► VsockDevice
//!                       ◄── answer ───────┘            ▲
//!  kicks: ioeventfd ───────────────────────────────────┤ epoll
//!  interrupt: irqfd ◄──────────────────────────────────┘
//! ```
//! The device belongs to its thread; what a register asks for is a task that this thread carries out between two bursts, so
//! the data path has no lock. `Linked` is the carrier to give to a shard, or to whoever has one; `Remote` is the bus's.
//! A VMM that would rather hold the device behind a lock needs none of this: `channel/examples/link_the_device.rs`.
//!
//! The event queue is looked after here: a guest that was restored is told that its streams are gone, now or, if it has no
//! buffer for that, when it kicks the queue.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use adit_engine::ResetReason;
use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;

use crate::carrier::{Carrier, Woken};
use crate::device::{
    ActivateError, DeviceError, DeviceState, RestoreError, Signal, VirtQueue, VirtQueues,
    VsockDevice, WAKERS, drain,
};

type Task<M> = Box<dyn FnOnce(&mut Linked<M>) + Send>;

const WAKER_TASKS: u32 = WAKERS;
const WAKER_EVENT_KICK: u32 = WAKERS + 1;

/// A device and its mailbox, as a carrier.
pub struct Linked<M: GuestAddressSpace> {
    device: VsockDevice<M>,
    tasks: Receiver<Task<M>>,
    bell: Arc<EventFd>,
    /// Of RX, TX and events.
    kicks: [OwnedFd; 3],
    /// The guest has not been told that its streams are gone.
    owes_reset: bool,
}

/// The bus's side: has the device's thread do things.
pub struct Remote<M: GuestAddressSpace> {
    tasks: Sender<Task<M>>,
    /// Wakes the thread.
    bell: Arc<EventFd>,
}

/// The device's thread stands still for as long as this lives.
#[derive(Debug)]
pub struct Held {
    _go_on: Sender<()>,
}

/// The thread that had the device has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the vsock device has ended")]
pub struct Gone;

/// A device did not take what the driver set up, or a snapshot says: their fault, but for the last one.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The features.
    #[error(transparent)]
    Features(#[from] DeviceError),
    /// The queues.
    #[error(transparent)]
    Queues(#[from] ActivateError),
    /// The saved state.
    #[error(transparent)]
    State(#[from] RestoreError),
    /// There is no descriptor to be had.
    #[error(transparent)]
    Descriptor(#[from] io::Error),
}

/// Gives a device a mailbox. `kicks`: nonblocking eventfds that the driver's kicks of RX, TX and event queue become.
///
/// # Errors
/// There is no descriptor to be had.
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
    fn give(&self, task: Task<M>) -> Result<(), Gone> {
        self.tasks.send(task).map_err(|_| Gone)?;
        // It fails only when the thread is woken already.
        let _ = self.bell.write(1);
        Ok(())
    }

    /// Has the thread do something with the device between two bursts, and waits for the outcome.
    ///
    /// # Errors
    /// There is no thread.
    pub fn ask<T: Send + 'static>(
        &self,
        what: impl FnOnce(&mut Linked<M>) -> T + Send + 'static,
    ) -> Result<T, Gone> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.give(Box::new(move |linked| {
            // Who asked is waiting below.
            let _ = reply.send(what(linked));
        }))?;
        answer.recv().map_err(|_| Gone)
    }

    /// Stops the thread between two bursts, where no descriptor is in anybody's hand; returns what the device is there.
    ///
    /// # Errors
    /// There is no thread.
    pub fn hold(&self) -> Result<(DeviceState, Held), Gone> {
        let (reply, answer) = mpsc::sync_channel(1);
        let (sender, go_on) = mpsc::channel();
        self.give(Box::new(move |linked| {
            let _ = reply.send(linked.device.save());
            // Until the other end is dropped.
            let _ = go_on.recv();
        }))?;
        let state = answer.recv().map_err(|_| Gone)?;
        Ok((state, Held { _go_on: sender }))
    }
}

impl<M: GuestAddressSpace> Linked<M> {
    /// DRIVER_OK: a session begins with these queues: RX, TX, events. The shell hears of it by itself.
    ///
    /// # Errors
    /// The driver set up what cannot be used, or there is no descriptor to be had.
    pub fn activate(
        &mut self,
        features: u64,
        mem: M,
        queues: [Queue; 3],
        signal: Arc<dyn Signal>,
    ) -> Result<(), SetupError> {
        let [rx_kick, tx_kick] = self.data_kicks()?;
        let [rx, tx, event] = queues;
        let with = |queue, kick| VirtQueue { queue, kick };
        let queues = VirtQueues {
            rx: with(rx, rx_kick),
            tx: with(tx, tx_kick),
            event: Some(event),
        };
        self.device.ack_features(features)?;
        Ok(self.device.activate(mem, queues, signal)?)
    }

    /// The device's own descriptors of them: it closes what it has when a session ends.
    fn data_kicks(&self) -> io::Result<[Option<OwnedFd>; 2]> {
        let [rx, tx, _] = &self.kicks;
        Ok([Some(rx.try_clone()?), Some(tx.try_clone()?)])
    }

    /// Goes on with the queues of a saved device, in a new session, of which the guest is told.
    ///
    /// # Errors
    /// The state does not fit the memory or this device, or there is no descriptor to be had: nothing changes.
    pub fn restore(
        &mut self,
        state: &DeviceState,
        mem: M,
        signal: Arc<dyn Signal>,
    ) -> Result<(), SetupError> {
        let kicks = self.data_kicks()?;
        self.device.restore(state, mem, kicks, signal)?;
        self.owes_reset = true;
        self.tell();
        Ok(())
    }

    /// The driver reset the device: every stream ends, and nothing of its queues is touched any more.
    pub fn reset(&mut self) {
        // A driver that starts anew has no old streams.
        self.owes_reset = false;
        self.device.reset(ResetReason::Epoch);
    }

    fn tell(&mut self) {
        if self.owes_reset {
            match self.device.tell_transport_reset() {
                Ok(told) => self.owes_reset = !told,
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
                self.tell();
            }
            id => return self.device.woken(id),
        }
        Woken::default()
    }
}
