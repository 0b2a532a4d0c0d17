//! Virtio devices: what a transport needs of one, and the ones that there are.

pub mod block;
pub mod mmio;
pub mod vsock;

use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, VmFd};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_QUEUE_NOTIFY};
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::acpi::Window;
use crate::memory;
use mmio::{Transport, USED_BUFFER};

pub use mmio::Interrupt;

/// Guest memory as devices hold it.
pub type Memory = Arc<GuestMemoryMmap>;

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
    /// Its configuration space, which never changes.
    fn config(&self) -> Vec<u8>;
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

/// Makes a device's window known to KVM. QueueNotify and the acknowledgement of used buffers are KVM's to hear.
pub(crate) fn plug(
    vm: &VmFd,
    (n, window): (u32, Window),
    device: Box<dyn Device>,
    memory: Memory,
) -> anyhow::Result<Transport> {
    let at = |register: u32| IoEventAddress::Mmio(window.base + u64::from(register));
    for (queue, kick) in (0u32..).zip(device.kicks()) {
        vm.register_ioevent(kick, &at(VIRTIO_MMIO_QUEUE_NOTIFY), queue)?;
    }
    // Nobody listens.
    let heard = EventFd::new(EFD_NONBLOCK)?;
    vm.register_ioevent(&heard, &at(VIRTIO_MMIO_INTERRUPT_ACK), USED_BUFFER)?;
    let irq = EventFd::new(EFD_NONBLOCK)?;
    vm.register_irqfd(&irq, window.gsi)?;
    let transport = Transport::new(device, memory, irq)?;
    memory::register_window(vm, n, window.base, transport.page().mapping())?;
    Ok(transport)
}
