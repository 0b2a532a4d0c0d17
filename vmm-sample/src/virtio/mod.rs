//! Virtio devices: what a transport needs of one, and the ones that there are.

pub mod block;
pub mod mmio;
pub mod vsock;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// Guest memory as devices hold it.
pub type Memory = Arc<GuestMemoryMmap>;

/// InterruptStatus: a queue has used buffers; the configuration changed.
const USED_BUFFER: u32 = 1 << 0;
const CONFIG_CHANGED: u32 = 1 << 1;

/// A device's interrupt: an irqfd, and the register in which the driver reads why.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    irq: EventFd,
}

impl Interrupt {
    /// An interrupt that has no reason yet.
    pub fn new(irq: EventFd) -> Self {
        Self {
            status: AtomicU32::new(0),
            irq,
        }
    }

    fn raise(&self, why: u32) {
        // The driver reads the reason after the interrupt came, so it stands there before.
        self.status.fetch_or(why, Ordering::SeqCst);
        // It fails only when it is full: an interrupt is on its way.
        let _ = self.irq.write(1);
    }

    /// A queue has used buffers.
    pub fn used(&self) {
        self.raise(USED_BUFFER);
    }

    /// The configuration changed, or the device wants to be reset.
    pub fn config(&self) {
        self.raise(CONFIG_CHANGED);
    }

    fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    fn restore(&self, status: u32) {
        self.status.fetch_or(status, Ordering::SeqCst);
    }

    fn clear(&self) {
        self.status.store(0, Ordering::SeqCst);
    }
}

/// What a driver and a transport agreed upon.
pub struct Activation {
    /// The guest's.
    pub memory: Memory,
    /// What both have.
    pub features: u64,
    /// Ready and checked, one for each size in [`Device::queue_sizes`].
    pub queues: Vec<Queue>,
    /// How to tell the driver.
    pub interrupt: Arc<Interrupt>,
}

/// A device behind a transport; called from vCPU threads.
pub trait Device: Send {
    /// Its number in virtio 1.3 §5.
    fn id(&self) -> u32;
    /// Features on offer.
    fn features(&self) -> u64;
    /// Entries of each queue at most.
    fn queue_sizes(&self) -> &'static [u16];
    /// Nonblocking eventfds on which the driver kicks its queues, in the same order.
    fn kicks(&self) -> Vec<&EventFd>;
    /// Fills `data` from the configuration space; zero behind its end.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// The driver writes the configuration space, in whatever state it is.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// DRIVER_OK: the queues are the device's.
    ///
    /// # Errors
    /// They cannot be used.
    fn activate(&mut self, with: Activation) -> anyhow::Result<()>;
    /// Touches nothing of the guest's from now on until it is [resumed](Self::resume). Returns what the device is.
    ///
    /// # Errors
    /// It cannot be held.
    fn pause(&mut self) -> anyhow::Result<Vec<u8>>;
    /// Goes on.
    fn resume(&mut self);
    /// Becomes what [`pause`](Self::pause) returned; `with`: of a device that was activated.
    ///
    /// # Errors
    /// The state is no such device's, or the queues cannot be used.
    fn restore(&mut self, state: &[u8], with: Option<Activation>) -> anyhow::Result<()>;
    /// The driver reset the device: no queue is touched any more when this returns.
    fn reset(&mut self);
}
