//! The guest's physical address space.
//!
//! | from | to | what |
//! |---|---|---|
//! | 0x500 | 0x528 | GDT |
//! | 0x6000 | 0x7000 | PVH start info, its module list and memory map |
//! | 0x7000 | 0x8000 | zero page (Linux's `boot_params`) |
//! | 0x9000 | 0xc000 | page tables of the 64-bit entry: the first GiB, one to one |
//! | 0x20000 | 0x21000 | command line |
//! | 0x9fc00 | 0x100000 | not RAM for the kernel: generation id at 0xdf000, ACPI tables from 0xe0000, reset vector |
//! | 0x100000 | 3 GiB | RAM: kernel, initramfs at the end |
//! | 3 GiB | 4 GiB | no RAM: virtio-mmio windows at 0xd0000000, PCI from 0xe0000000, IOAPIC, LAPIC, KVM's own pages |
//! | 4 GiB | | more RAM; the ring is behind it, from the next GiB on |

use std::ops::Range;

use vm_memory::GuestAddress;

pub const GDT: u64 = 0x500;
pub const PVH_INFO: GuestAddress = GuestAddress(0x6000);
pub const PVH_MODULES: GuestAddress = GuestAddress(0x6100);
pub const PVH_MEMORY_MAP: GuestAddress = GuestAddress(0x6800);
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
pub const STACK_TOP: u64 = 0x8ff0;
pub const PML4: u64 = 0x9000;
pub const PDPT: u64 = 0xa000;
pub const PAGE_DIRECTORY: u64 = 0xb000;
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
pub const CMDLINE_MAX: usize = 0x1000;
/// First byte below 1 MiB that the kernel must not use.
pub const LOW_END: u64 = 0x9_fc00;
/// 16 bytes that change whenever the machine is restored.
pub const GENERATION: GuestAddress = GuestAddress(0xd_f000);
pub const RSDP: GuestAddress = GuestAddress(0xe_0000);
pub const ACPI_TABLES: u64 = 0xe_0040;
/// Where a processor in real mode starts the BIOS.
pub const RESET_VECTOR: u64 = 0xf_fff0;
pub const HIGH_START: u64 = 0x10_0000;

/// RAM ends here and continues at [`GAP_END`].
pub const GAP_START: u64 = 3 << 30;
pub const GAP_END: u64 = 4 << 30;
pub const MMIO_BASE: u64 = 0xd000_0000;
/// Bytes of one virtio-mmio window.
pub const MMIO_LEN: u64 = 0x1000;
/// Configuration space of the PCI bus's second device, and the window for its 32-bit BARs.
pub const RING_CONFIG: u64 = 0xe000_0000 + (1 << 15);
pub const PCI_WINDOW: Range<u64> = 0xe010_0000..0xe020_0000;
pub const IOAPIC: u32 = 0xfec0_0000;
pub const LAPIC: u32 = 0xfee0_0000;
/// Three pages for KVM's task state segment (Intel without unrestricted guest), and one for its page table.
pub const KVM_TSS: usize = 0xfffb_d000;
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

pub const SERIAL_PORT: u16 = 0x3f8;
pub const SERIAL_GSI: u32 = 4;
/// Interrupt that tells the guest that its generation id changed.
pub const EVENT_GSI: u32 = 5;
/// Interrupts of virtio devices; the IOAPIC has 24 inputs.
pub const FIRST_GSI: u32 = 6;
pub const LAST_GSI: u32 = 22;
/// Interrupt of the ring function's pin. Those of its messages follow, beyond the IOAPIC's inputs.
pub const RING_GSI: u32 = 23;
/// ACPI sleep control and status registers.
pub const SLEEP_CONTROL: u16 = 0x600;
pub const SLEEP_STATUS: u16 = 0x601;
/// i8042 data and command ports. The command port is also the reset register of ACPI.
pub const I8042_DATA: u16 = 0x60;
pub const I8042_COMMAND: u16 = 0x64;
