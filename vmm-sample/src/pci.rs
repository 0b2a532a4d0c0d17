//! The PCI bus, which is there for one function: the VM's ring. What the function is, and how KVM is told, is the library's
//! (`adit_ring_pci`); here is where it lies, and whose it is.

use std::sync::Arc;

use adit_channel::ring::{self, RingBells};
use adit_port::rings::RingSender;
use adit_ring_pci::kvm::{Place, Plugged};
use adit_ringbuf::Mapped;
use anyhow::Context;
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use crate::layout;

/// KVM's memory slots behind those of any number of windows.
const FIRST_SLOT: u32 = 64;
/// Bytes of a region at most, and the multiple at which the window for it begins.
pub const REGION_MAX: u64 = 1 << 30;

/// The bus.
pub struct Pci {
    /// All that is on it.
    pub function: Plugged,
    region: Mapped,
    pub place: Place,
}

impl Pci {
    /// A bus with a ring of so many bytes on it, for a VM with this RAM and interrupt chips.
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

    /// Offers the ring to the guest. `to`: who has the host's end of it.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn attach(&self, to: &RingSender) -> anyhow::Result<()> {
        let (rings, heard) = self.function.bells()?;
        let bells = RingBells::new(rings, heard);
        to.attach_with(self.region.clone(), bells, "PCI function", "VMM's own")?;
        Ok(())
    }
}
