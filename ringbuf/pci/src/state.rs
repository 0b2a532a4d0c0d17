//! The saved state of a function, for a snapshot of its VM.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | magic `ADITPCIF` |
//! | 8 | 4 | version, 1 |
//! | 12 | 2 | command |
//! | 14 | 2 | MSI-X control |
//! | 16 | 8 | bytes of the region |
//! | 24 | 4, 4, 8 | BAR 0, 1, 2, as they read |
//! | 40 | 4, 4 | IntrMask, IntrStatus |
//! | 48 | 1, 1, 1, 5 | cache line, interrupt line, pending vectors, zero |
//! | 56 | 2 × 16 | the MSI-X table |
//!
//! All fields are little-endian. A state is restored with the writes that a guest would make. It is refused if saving
//! the result does not give the same bytes.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::config::{Bar, CACHE_LINE, COMMAND, INTERRUPT_LINE, MSIX_CONTROL};
use crate::function::{Changes, Function, INTERRUPTS, MASK_BITS};
use crate::msix::TABLE_BYTES;

const MAGIC: [u8; 8] = *b"ADITPCIF";
const VERSION: u32 = 1;
/// Bytes of a saved function.
pub const STATE_BYTES: usize = size_of::<Wire>();
const _: () = assert!(STATE_BYTES == 88);

#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Wire {
    magic: [u8; 8],
    version: u32,
    command: u16,
    msix_control: u16,
    region_bytes: u64,
    bars: [u8; 16],
    mask: u32,
    status: u32,
    cache_line: u8,
    interrupt_line: u8,
    pending: u8,
    zero: [u8; 5],
    table: [u8; TABLE_BYTES],
}

/// Why bytes are not a state of this function: the fault of the file.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The length is wrong.
    #[error("the saved state of a ring function has {STATE_BYTES} bytes, but these are {len}")]
    Length {
        /// Actual length in bytes.
        len: usize,
    },
    /// It is something else, or of another version.
    #[error("not a saved ring function of version {VERSION} (found version {version})")]
    Foreign {
        /// The value at the place of the version.
        version: u32,
    },
    /// The region of the saved VM has another size.
    #[error("the saved ring has {saved} bytes, but this one has {here}: configure the same size")]
    Size {
        /// Size in the saved state, in bytes.
        saved: u64,
        /// Size of this function's region, in bytes.
        here: u64,
    },
    /// A register has a value that no guest could write.
    #[error("saved ring function: a register has an impossible value")]
    Register,
}

impl Function {
    fn wire(&self) -> Wire {
        let bytes = self.config_bytes();
        let bar = Bar::Registers.register();
        Wire {
            magic: MAGIC,
            version: VERSION.to_le(),
            command: self.config.u16(COMMAND).to_le(),
            msix_control: self.config.u16(MSIX_CONTROL).to_le(),
            region_bytes: self.region_bytes.to_le(),
            bars: std::array::from_fn(|n| bytes[bar + n]),
            mask: self.mask.to_le(),
            status: self.status.to_le(),
            cache_line: bytes[CACHE_LINE],
            interrupt_line: bytes[INTERRUPT_LINE],
            pending: self.msix.pending,
            zero: [0; 5],
            table: self.msix.table,
        }
    }

    /// Returns the state, for a snapshot.
    pub fn save(&self) -> [u8; STATE_BYTES] {
        zerocopy::transmute!(self.wire())
    }

    /// Takes the state that [`save`](Self::save) returned. Signal the guest's doorbells afterwards: a signal on its
    /// way may have been lost, and an extra one does no harm.
    ///
    /// # Errors
    /// The bytes are not a state of this function. Nothing has changed.
    pub fn restore(&mut self, state: &[u8]) -> Result<Changes, StateError> {
        let len = state.len();
        let wire = Wire::read_from_bytes(state).map_err(|_| StateError::Length { len })?;
        let version = u32::from_le(wire.version);
        if wire.magic != MAGIC || version != VERSION {
            return Err(StateError::Foreign { version });
        }
        let (saved, here) = (u64::from_le(wire.region_bytes), self.region_bytes);
        if saved != here {
            return Err(StateError::Size { saved, here });
        }
        let mut other = self.blank();
        let registers: [(usize, &[u8]); 5] = [
            (COMMAND, wire.command.as_bytes()),
            (MSIX_CONTROL, wire.msix_control.as_bytes()),
            (Bar::Registers.register(), &wire.bars),
            (CACHE_LINE, &[wire.cache_line]),
            (INTERRUPT_LINE, &[wire.interrupt_line]),
        ];
        for (at, bytes) in registers {
            other.config.write(at as u64, bytes);
        }
        other.msix.write(0, &wire.table);
        other.msix.pending = wire.pending & INTERRUPTS as u8;
        other.mask = u32::from_le(wire.mask) & MASK_BITS;
        other.status = u32::from_le(wire.status) & INTERRUPTS;
        if other.wire() != wire {
            return Err(StateError::Register);
        }
        Ok(self.replace_with(other))
    }
}
