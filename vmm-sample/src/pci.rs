//! The PCI bus, with one function on it: the VM's ring. The library `adit_ring_pci` is the function and its connection to KVM;
//! this file chooses its addresses and interrupts, and who uses it.

use std::sync::Arc;

use adit_channel::ring::{self, RingBells};
use adit_port::rings::RingSender;
use adit_ring_pci::kvm::{Place, Plugged};
use adit_ringbuf::Mapped;
use anyhow::Context;
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use crate::layout;

/// The first memory slot of KVM for the ring. The slots below belong to RAM and register windows.
const FIRST_SLOT: u32 = 64;
/// Longest region, bytes. The window for it starts at a multiple of this.
pub const REGION_MAX: u64 = 1 << 30;

/// The bus.
pub struct Pci {
    /// The only function on the bus.
    pub function: Plugged,
    region: Mapped,
    pub place: Place,
}

impl Pci {
    /// Makes a bus with a ring of so many bytes. `ram` is the VM's memory.
    ///
    /// # Errors
    /// There is no memory for the ring, or KVM refuses.
    pub fn new(vm: &Arc<VmFd>, ram: &GuestMemoryMmap, bytes: usize) -> anyhow::Result<Self> {
        let above = ram.last_addr().0.max(layout::GAP_END);
        let above = above.next_multiple_of(REGION_MAX);
        let place = Place {
            config_at: layout::RING_CONFIG,
            windows: [layout::PCI_WINDOW, above..above + REGION_MAX],
            slot: FIRST_SLOT,
            line: layout::RING_GSI,
            messages: layout::RING_GSI + 1,
        };
        let region = Mapped::anonymous(bytes)?;
        let spec = ring::spec(bytes).context("the ring is too small")?;
        let function = Plugged::new(vm.clone(), region.clone(), &spec, place.clone())?;
        Ok(Self {
            function,
            region,
            place,
        })
    }

    /// Offers the ring to the guest. `to` leads to whoever uses the host's end.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn attach(&self, to: &RingSender) -> anyhow::Result<()> {
        let (rings, heard) = self.function.bells()?;
        let bells = RingBells::new(rings, heard);
        to.attach_with(self.region.clone(), bells, "PCI function", "VMM's own")?;
        Ok(())
    }
}
