//! Configuration space: a type 0 header (PCI Local Bus 3.0 §6.1) and one capability, MSI-X (§6.8.2).
//!
//! It consists of the bytes, and for each byte the bits that a driver can change. That is enough to size a BAR: when
//! the driver writes all ones, only the bits above the BAR's size are stored.

use adit_ringbuf_io::ivshmem::VECTORS;

/// Bytes of a function's configuration space. The extended space of PCI Express after it reads as zero: no capability.
pub const CONFIG_BYTES: usize = 256;
/// Size of BAR 0 and of BAR 1 in bytes: a page each, because user space maps whole pages.
pub const REGISTERS_BYTES: u64 = 4096;
/// Number of BARs.
pub const BARS: usize = 3;

/// A BAR of the function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bar {
    /// Registers, including the doorbell.
    Registers = 0,
    /// MSI-X: the table and the pending bits.
    Msix = 1,
    /// The region.
    Region = 2,
}

impl Bar {
    /// All BARs.
    pub const ALL: [Self; BARS] = [Self::Registers, Self::Msix, Self::Region];

    /// Offset of the BAR's register in configuration space.
    pub(crate) const fn register(self) -> usize {
        // BAR 2 is 64 bits wide and uses two registers.
        0x10 + 4 * self as usize
    }
}

pub(crate) const COMMAND: usize = 0x04;
pub(crate) const CACHE_LINE: usize = 0x0c;
pub(crate) const INTERRUPT_LINE: usize = 0x3c;
const STATUS: usize = 0x06;
const MSIX: usize = 0x40;
pub(crate) const MSIX_CONTROL: usize = MSIX + 2;
/// Offset of the pending bits in BAR 1.
pub(crate) const PENDING_AT: usize = 0x800;

/// Command: memory decoding is on.
pub(crate) const MEMORY: u16 = 1 << 1;
/// Command: the function may write on the bus. An MSI is such a write.
pub(crate) const MASTER: u16 = 1 << 2;
/// Command: the pin is disabled (PCI 2.3).
pub(crate) const INTX_DISABLE: u16 = 1 << 10;
/// Status, low byte: an interrupt is pending at the pin, even if the pin is disabled.
const INTX_STATUS: u8 = 1 << 3;
/// Status, low byte: there is a capability list.
const CAPABILITIES: u8 = 1 << 4;
/// MSI-X control: MSI-X is on; all vectors are masked.
pub(crate) const MSIX_ENABLE: u16 = 1 << 15;
pub(crate) const MSIX_MASK_ALL: u16 = 1 << 14;

/// Read-only registers of configuration space: offset and bytes.
const FIXED: [(usize, &[u8]); 9] = [
    (0x00, &[0xf4, 0x1a, 0x10, 0x11]), // Red Hat, ivshmem
    (STATUS, &[CAPABILITIES]),
    // Revision 1: with MSI-X. Class: memory, RAM.
    (0x08, &[0x01, 0x00, 0x00, 0x05]),
    // 64 bits wide, prefetchable.
    (Bar::Region.register(), &[0x0c]),
    // Subsystem: Red Hat, QEMU.
    (0x2c, &[0xf4, 0x1a, 0x00, 0x11]),
    (0x34, &[MSIX as u8]),
    (INTERRUPT_LINE + 1, &[1]), // pin A
    // The last capability; vectors - 1.
    (MSIX, &[0x11, 0, VECTORS as u8 - 1, 0]),
    // Table at 0 of BAR 1, pending bits behind it.
    (
        MSIX + 4,
        &[1, 0, 0, 0, PENDING_AT as u8 | 1, (PENDING_AT >> 8) as u8],
    ),
];

/// The configuration space of one function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
}

impl Config {
    /// Configuration space after a reset. `region_bytes` is the size of BAR 2, a power of two of at least a page.
    pub(crate) fn new(region_bytes: u64) -> Self {
        let mut config = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
        };
        for (at, bytes) in FIXED {
            config.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        }
        let registers = !(REGISTERS_BYTES as u32 - 1);
        let region = !(region_bytes - 1);
        let writable: [(usize, &[u8]); 7] = [
            (COMMAND, &(MEMORY | MASTER | INTX_DISABLE).to_le_bytes()),
            (CACHE_LINE, &[0xff]),
            (Bar::Registers.register(), &registers.to_le_bytes()),
            (Bar::Msix.register(), &registers.to_le_bytes()),
            (Bar::Region.register(), &region.to_le_bytes()),
            (INTERRUPT_LINE, &[0xff]),
            (MSIX_CONTROL, &(MSIX_ENABLE | MSIX_MASK_ALL).to_le_bytes()),
        ];
        for (at, bits) in writable {
            config.writable[at..at + bits.len()].copy_from_slice(bits);
        }
        config
    }

    /// All bytes.
    pub(crate) fn bytes(&self) -> &[u8; CONFIG_BYTES] {
        &self.bytes
    }

    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        copy_out(&self.bytes, offset, data);
    }

    /// Writes the bits that a driver can change.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        let there = self.bytes.iter_mut().zip(&self.writable).skip(offset);
        for ((byte, writable), new) in there.zip(data) {
            *byte = *byte & !writable | new & writable;
        }
    }

    pub(crate) fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    /// The address in a BAR's registers, whether it is decoded or not.
    pub(crate) fn address(&self, bar: Bar) -> u64 {
        let at = bar.register();
        let mut bytes = [0; 8];
        let len = if let Bar::Region = bar { 8 } else { 4 };
        bytes[..len].copy_from_slice(&self.bytes[at..at + len]);
        // The flags are in bits below the size of any BAR.
        u64::from_le_bytes(bytes) & !0xf
    }

    /// Sets the status bit that shows a pending interrupt at the pin.
    pub(crate) fn set_pending(&mut self, pending: bool) {
        let others = self.bytes[STATUS] & !INTX_STATUS;
        self.bytes[STATUS] = others | if pending { INTX_STATUS } else { 0 };
    }
}

/// Copies from `from` at an offset; bytes after its end read as zero.
pub(crate) fn copy_out(from: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let there = usize::try_from(offset).ok().and_then(|at| from.get(at..));
    for (byte, from) in data.iter_mut().zip(there.unwrap_or_default()) {
        *byte = *from;
    }
}
