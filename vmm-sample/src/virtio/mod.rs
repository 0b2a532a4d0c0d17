//! Virtio devices: what a transport needs of a device, and the devices themselves.

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

/// Guest memory as devices share it.
pub type Memory = Arc<GuestMemoryMmap>;

/// What a driver and a transport agreed on.
pub struct Activation {
    /// The guest's memory.
    pub memory: Memory,
    /// Features that both support.
    pub features: u64,
    /// Ready and checked, one for each size in [`Device::queue_sizes`].
    pub queues: Vec<Queue>,
    /// Interrupts the driver.
    pub interrupt: Arc<Interrupt>,
}

/// A device behind a transport; called from vCPU threads.
pub trait Device: Send {
    /// Its number (virtio 1.3 §5).
    fn id(&self) -> u32;
    /// The features that it offers.
    fn features(&self) -> u64;
    /// Largest size of each queue, in entries.
    fn queue_sizes(&self) -> &'static [u16];
    /// Nonblocking eventfds by which the driver notifies its queues, in the same order.
    fn kicks(&self) -> Vec<&EventFd>;
    /// Its configuration space, which never changes.
    fn config(&self) -> Vec<u8>;
    /// DRIVER_OK: the device may use the queues from now on.
    ///
    /// # Errors
    /// The queues cannot be used.
    fn activate(&mut self, with: Activation) -> anyhow::Result<()>;
    /// Stops using the guest's memory until [`resume`](Self::resume). Returns the device's state.
    ///
    /// # Errors
    /// The device cannot be paused.
    fn pause(&mut self) -> anyhow::Result<Vec<u8>>;
    /// Continues after [`pause`](Self::pause).
    fn resume(&mut self);
    /// Loads a state that [`pause`](Self::pause) returned. `with` is given if the device was activated.
    ///
    /// # Errors
    /// The state is not of such a device, or the queues cannot be used.
    fn restore(&mut self, state: &[u8], with: Option<Activation>) -> anyhow::Result<()>;
    /// The driver resets the device. After this returns, the device does not use its queues any more.
    fn reset(&mut self);
}

/// Registers a device's window with KVM. KVM handles QueueNotify and the acknowledgement of used buffers without an exit here.
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
    // Nobody reads it: the acknowledgement has no effect.
    let ignored = EventFd::new(EFD_NONBLOCK)?;
    vm.register_ioevent(&ignored, &at(VIRTIO_MMIO_INTERRUPT_ACK), USED_BUFFER)?;
    let irq = EventFd::new(EFD_NONBLOCK)?;
    vm.register_irqfd(&irq, window.gsi)?;
    let transport = Transport::new(device, memory, irq)?;
    memory::register_window(vm, n, window.base, transport.page().mapping())?;
    Ok(transport)
}
