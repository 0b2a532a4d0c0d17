//! What a function is while its VM is held.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | magic `ADITPCIF` |
//! | 8 | 4 | version, 1 |
//! | 12 | 2 | command |
//! | 14 | 2 | MSI-X control |
//! | 16 | 8 | bytes of the region |
//! | 24 | 4, 4, 8 | BAR 0, 1, 2, as they are read |
//! | 40 | 4, 4 | IntrMask, IntrStatus |
//! | 48 | 1, 1, 1, 5 | cache line, interrupt line, pending vectors, zero |
//! | 56 | 2 × 16 | the MSI-X table |
//!
//! All little endian. It is put together by what a guest would write, and refused if that does not make the same again.

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

/// Why bytes are no state of this function: the file's fault.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Another length.
    #[error("a saved ring function has {STATE_BYTES} bytes, and these are {len}")]
    Length {
        /// How many there are.
        len: usize,
    },
    /// Something else, or of another version.
    #[error("no saved ring function of version {VERSION} (version {version})")]
    Foreign {
        /// What stands where the version would.
        version: u32,
    },
    /// The saved VM's region has another size than this one's.
    #[error("the saved ring has {saved} bytes, and this one {here}: give it the same")]
    Size {
        /// The saved one's, bytes.
        saved: u64,
        /// This one's, bytes.
        here: u64,
    },
    /// A register has a value that no guest can have written.
    #[error("saved ring function: a register has a value that it cannot have")]
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

    /// What it is, to be kept.
    pub fn save(&self) -> [u8; STATE_BYTES] {
        zerocopy::transmute!(self.wire())
    }

    /// Becomes what [`save`](Self::save) returned. The guest's doorbells are to be rung afterwards: what was on its way may
    /// be lost, and one too many does no harm.
    ///
    /// # Errors
    /// It is no such function; nothing has changed.
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
        Ok(self.become_this(other))
    }
}
