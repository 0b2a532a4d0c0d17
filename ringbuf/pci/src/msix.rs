//! MSI-X (PCI Local Bus 3.0 §6.8.2): a table of messages, each with a mask bit, and the pending bits of masked
//! vectors.

use adit_ringbuf_io::ivshmem;

use crate::config::{PENDING_AT, copy_out};

/// Number of vectors, and of the host's doorbells: one for data, one for space.
pub const VECTORS: usize = ivshmem::VECTORS as usize;
const ENTRY: usize = 16;
pub(crate) const TABLE_BYTES: usize = ENTRY * VECTORS;
/// Writable bits of an entry: the address, aligned to four bytes, the data, and of the control word only the mask bit.
const WRITABLE: [u8; ENTRY] = [
    0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0,
];
const CONTROL: usize = 12;

/// A message-signalled interrupt: one write on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Address that is written to.
    pub address: u64,
    /// Value that is written.
    pub data: u32,
}

/// Table and pending bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Msix {
    pub(crate) table: [u8; TABLE_BYTES],
    /// Pending bits, one for each vector.
    pub(crate) pending: u8,
}

impl Msix {
    /// The table after a reset: every vector is masked.
    pub(crate) fn new() -> Self {
        let mut table = [0; TABLE_BYTES];
        for vector in 0..VECTORS {
            table[ENTRY * vector + CONTROL] = 1;
        }
        Self { table, pending: 0 }
    }

    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        let mut page = [0; PENDING_AT + 1];
        page[..TABLE_BYTES].copy_from_slice(&self.table);
        page[PENDING_AT] = self.pending;
        copy_out(&page, offset, data);
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        let there = self.table.iter_mut().zip(WRITABLE.iter().cycle());
        for ((byte, writable), new) in there.skip(offset).zip(data) {
            *byte = *byte & !writable | new & writable;
        }
    }

    /// The message of a vector; `None` if it is masked.
    pub(crate) fn message(&self, vector: usize) -> Option<Message> {
        let entry = self.table.get(ENTRY * vector..)?.get(..ENTRY)?;
        let word = |at: usize| {
            let bytes: [u8; 4] = std::array::from_fn(|n| entry[at + n]);
            u32::from_le_bytes(bytes)
        };
        (word(CONTROL) & 1 == 0).then(|| Message {
            address: u64::from(word(0)) | u64::from(word(4)) << 32,
            data: word(8),
        })
    }
}
