//! Packets whose payload stays in guest memory until one system call writes it to one descriptor.
//!
//! From the first such packet on, chains are kept and returned together, in their order. A successor process that
//! continues at the used index therefore finds no gap. Everything here ends with the burst.

use crate::carrier::SetAside;

use super::chain::{Cursor, Seg};

/// Maximum number of packets that are set aside: as many small ones as one system call can write.
const ASIDE_MAX: usize = 64;

/// The payload and the chains that are set aside.
#[derive(Debug, Default)]
pub(crate) struct Aside {
    pub(crate) segs: Vec<Seg>,
    pub(crate) cursor: Cursor,
    heads: Vec<u16>,
    packets: usize,
}

impl Aside {
    /// Adds the next `len` bytes of the current chain. The caller empties this when it is full, so there is always
    /// room.
    pub(crate) fn add(&mut self, segs: &[Seg], cursor: &mut Cursor, len: u32) -> SetAside {
        self.packets += 1;
        let mut left = len as usize;
        while let Some((addr, n)) = cursor.piece(segs, left)
            && left > 0
        {
            // `n` is at most `len`, so it fits into 32 bits.
            let len = n as u32;
            self.segs.push(Seg { addr, len });
            cursor.advance(segs, n);
            left -= n;
        }
        // One chain may have a whole table of pieces, and the next chain would add to them.
        match self.packets.max(self.segs.len()) < ASIDE_MAX {
            true => SetAside::Kept,
            false => SetAside::Full,
        }
    }

    /// Number of payload bytes that were set aside, including those that were written already.
    pub(crate) fn bytes(&self) -> usize {
        self.segs.iter().map(|seg| seg.len as usize).sum()
    }

    /// Keeps a chain until `release`, if an earlier chain is kept. Returns false if the chain must be returned at
    /// once.
    pub(crate) fn hold_back(&mut self, head: u16) -> bool {
        let kept = self.packets > 0;
        if kept {
            // The packet budget of a burst bounds this list.
            self.heads.push(head);
        }
        kept
    }

    /// Empties this and returns the chains that must be returned to the guest.
    pub(crate) fn release(&mut self) -> std::vec::Drain<'_, u16> {
        self.segs.clear();
        self.cursor = Cursor::default();
        self.packets = 0;
        self.heads.drain(..)
    }
}
