//! A ring region as a PCI function, to link into a VMM. A stock guest finds it by itself and drives it from user
//! space.
//!
//! The function is ivshmem-doorbell (QEMU's `docs/specs/ivshmem-spec.txt`: ids, registers, MSI-X). So one guest driver
//! works with QEMU and with a VMM that uses this crate. It also has the interrupt pin of ivshmem's first revision.
//! With the pin and the interrupt disable and status bits of PCI 2.3, a guest without an IOMMU gets interrupts through
//! `uio_pci_generic`. A guest with an IOMMU uses MSI-X through vfio.
//!
//! | BAR | what | bytes |
//! |---|---|---|
//! | 0 | registers: 0 IntrMask, 4 IntrStatus (a read clears it), 8 IVPosition, 12 Doorbell (peer << 16, vector), 16 Features | 4096 |
//! | 1 | MSI-X: table at 0, pending bits at 0x800 | 4096 |
//! | 2 | the region: 64 bits wide, prefetchable, memory of the VMM | a power of two |
//!
//! ```text
//! vCPU: configuration space, BAR 0 and 1 ──► Function ──► Changes: what the VMM must do
//! host's interrupt ─────────────────────────────┘
//! ```
//! - [`Function`] is a state machine without an operating system: bytes in, bytes out, and what the VMM must do. It
//!   allocates nothing. It handles accesses of any width at any offset: unknown locations read as zero or all ones,
//!   and writes to them have no effect.
//! - `kvm::Plugged` (feature `kvm`) connects it to a KVM virtual machine: memory slots for the region, with the pages
//!   that only the host writes read-only for the guest; ioeventfds for its doorbells; irqfds for its interrupts. The
//!   guest reads configuration space without an exit.
//! - A guest may choose the addresses of the BARs inside the windows that the VMM sets. A BAR outside them is not
//!   decoded.
//! - A [saved](Function::save) state is checked as strictly as the guest's writes. The region is not saved: a restored
//!   VM gets a new region, and so a new epoch.

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
