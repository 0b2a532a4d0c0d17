//! A ring's region as a PCI function, for a VMM to link: what a stock guest finds by itself, and drives from user space.
//!
//! It is ivshmem-doorbell (QEMU's `docs/specs/ivshmem-spec.txt`: ids, registers, MSI-X), so that there is one guest driver
//! for QEMU and for a VMM with this crate, and it has the interrupt pin that ivshmem's first revision had. With the pin and
//! PCI 2.3's interrupt disable and status bits, `uio_pci_generic` gives a guest without an IOMMU interrupts; one with an
//! IOMMU has MSI-X through vfio.
//!
//! | BAR | what | bytes |
//! |---|---|---|
//! | 0 | registers: 0 IntrMask, 4 IntrStatus (a read clears it), 8 IVPosition, 12 Doorbell (peer << 16, vector), 16 Features | 4096 |
//! | 1 | MSI-X: table at 0, pending bits at 0x800 | 4096 |
//! | 2 | the region: 64 bits wide, prefetchable, memory of the VMM's | a power of two |
//!
//! ```text
//! vCPU: configuration space, BAR 0 and 1 ──► Function ──► Changes: what the VMM is to do
//! host's bell ──────────────────────────────────┘
//! ```
//! - [`Function`] is the function without a system: bytes in, bytes out, and what the VMM is to do. It allocates nothing,
//!   and takes any access of any width at any offset: what it does not know reads as zero or all ones, and is not written.
//! - `kvm::Plugged` (feature `kvm`) does it in a VM of KVM's: slots for the region, whose pages that only the host writes
//!   the guest cannot; ioeventfds for its doorbells; irqfds for its interrupts; its configuration space is read in place.
//! - What a guest may choose is where its BARs lie, inside of the windows that the VMM names. One that lies elsewhere
//!   is nowhere.
//! - What a [saved](Function::save) function is, is checked like what a guest writes. The region is not saved: a restored VM
//!   gets a new one, and with it a new epoch.

#[cfg(feature = "kvm")]
mod acpi;
mod config;
mod function;
#[cfg(feature = "kvm")]
pub mod kvm;
mod msix;
mod state;

pub use config::{BARS, Bar, CONFIG_BYTES, REGISTERS_BYTES};
pub use function::{Changes, Function, VECTORS, Windows, Wiring};
pub use msix::Message;
pub use state::{STATE_BYTES, StateError};
