//! The device as the carrier of a shard, with one waker more: what the bus wants of it.
//!
//! A VMM that holds its device behind a lock needs none of this (`channel/examples/link_the_device.rs`); here the device
//! may belong to an owner that knows nothing of buses, such as aditd's `Process`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use adit_channel::carrier::{Armed, Carrier, CarrierCaps, CarrierFault, Interest, Woken};
use adit_channel::device::{DeviceState, GuestCid, Signal, VirtQueue, VirtQueues, VsockDevice};
use adit_engine::{Lane, ResetReason};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::super::{Activation, Interrupt, Memory};
use crate::eventfd::{clear, duplicate};

/// What a vCPU's thread wants done.
pub type Task = Box<dyn FnOnce(&mut Linked) + Send>;

/// Behind the wakers of the device.
const WAKER_TASKS: u32 = 64;
const WAKER_EVENT_KICK: u32 = 65;

/// The device and its mailbox.
pub struct Linked {
    device: VsockDevice<Memory>,
    tasks: Receiver<Task>,
    bell: OwnedFd,
    kicks: [OwnedFd; 3],
    /// The guest has not been told that its connections are gone.
    owes_reset: bool,
}

struct Irq(Arc<Interrupt>);

impl Signal for Irq {
    fn signal(&self, _queue: u16) {
        self.0.used();
    }
}

impl Linked {
    pub fn new(
        cid: GuestCid,
        first_epoch: u64,
        tasks: Receiver<Task>,
        bell: &EventFd,
        kicks: &[EventFd; 3],
    ) -> io::Result<Self> {
        let [rx, tx, event] = kicks;
        Ok(Self {
            device: VsockDevice::new(cid, first_epoch)?,
            tasks,
            bell: duplicate(bell)?,
            kicks: [duplicate(rx)?, duplicate(tx)?, duplicate(event)?],
            owes_reset: false,
        })
    }

    /// DRIVER_OK: a session begins.
    pub fn activate(&mut self, with: Activation) -> anyhow::Result<()> {
        let [rx, tx, event] = <[Queue; 3]>::try_from(with.queues)
            .map_err(|_| anyhow::anyhow!("a vsock device has three queues"))?;
        let [rx_kick, tx_kick, _] = &self.kicks;
        let queues = VirtQueues {
            rx: VirtQueue {
                queue: rx,
                kick: Some(rx_kick.try_clone()?),
            },
            tx: VirtQueue {
                queue: tx,
                kick: Some(tx_kick.try_clone()?),
            },
            event: Some(event),
        };
        self.device.ack_features(with.features)?;
        let signal = Arc::new(Irq(with.interrupt));
        Ok(self.device.activate(with.memory, queues, signal)?)
    }

    /// What the device is, between two bursts.
    pub fn save(&self) -> Vec<u8> {
        self.device.save().to_bytes().into()
    }

    /// Goes on with the queues of a saved device: a new session, of which the guest is told.
    pub fn restore(&mut self, state: &DeviceState, with: Activation) -> anyhow::Result<()> {
        let [rx, tx, _] = &self.kicks;
        let kicks = [Some(rx.try_clone()?), Some(tx.try_clone()?)];
        let signal = Arc::new(Irq(with.interrupt));
        self.device.restore(state, with.memory, kicks, signal)?;
        self.owes_reset = true;
        self.tell();
        Ok(())
    }

    fn tell(&mut self) {
        if !self.owes_reset {
            return;
        }
        match self.device.tell_transport_reset() {
            Ok(told) => self.owes_reset = !told,
            Err(fault) => {
                eprintln!("adit-vmm: vsock: {fault}");
                self.owes_reset = false;
                self.device.tear();
            }
        }
    }

    /// The driver reset the device: every stream ends.
    pub fn reset(&mut self) {
        // A driver that starts anew has no old connections.
        self.owes_reset = false;
        self.device.reset(ResetReason::Epoch);
    }
}

impl Carrier for Linked {
    type Rx<'a> = <VsockDevice<Memory> as Carrier>::Rx<'a>;
    type Tx<'a> = <VsockDevice<Memory> as Carrier>::Tx<'a>;

    fn caps(&self) -> CarrierCaps {
        self.device.caps()
    }

    fn begin(&mut self) {
        self.device.begin();
    }

    fn rx(&mut self) -> Result<Option<Self::Rx<'_>>, CarrierFault> {
        self.device.rx()
    }

    fn tx(&mut self, lane: Lane, want: u32) -> Result<Option<Self::Tx<'_>>, CarrierFault> {
        self.device.tx(lane, want)
    }

    fn write_aside(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        self.device.write_aside(fd)
    }

    fn read_aside(&mut self, dst: &mut [u8]) -> Result<usize, CarrierFault> {
        self.device.read_aside(dst)
    }

    fn release_aside(&mut self) {
        self.device.release_aside();
    }

    fn flush(&mut self) {
        self.device.flush();
    }

    fn arm(&mut self, interest: Interest) -> Armed {
        self.device.arm(interest)
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
            WAKER_TASKS => {}
            WAKER_EVENT_KICK => {
                clear(&self.kicks[2]);
                self.tell();
                return Woken::default();
            }
            id => return self.device.woken(id),
        }
        clear(&self.bell);
        while let Ok(task) = self.tasks.try_recv() {
            task(self);
        }
        Woken::default()
    }
}
