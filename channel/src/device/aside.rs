//! Packets whose payload waits in guest memory until it goes to one descriptor with one system call.
//!
//! From the first of them on, chains are held back and given back together, in the order in which they came: whoever goes
//! on from the used index finds no gap. All of it ends with the burst.

use crate::carrier::SetAside;

use super::chain::{Cursor, Seg};

/// Packets that wait at a time at most: what one system call takes of small ones.
const ASIDE_MAX: usize = 64;

/// What waits.
#[derive(Debug, Default)]
pub(crate) struct Aside {
    pub(crate) segs: Vec<Seg>,
    pub(crate) cursor: Cursor,
    heads: Vec<u16>,
    packets: usize,
}

impl Aside {
    /// Adds the next `len` bytes of the chain in hand. The caller empties it when it is full, so there is room.
    pub(crate) fn add(&mut self, segs: &[Seg], cursor: &mut Cursor, len: u32) -> SetAside {
        self.packets += 1;
        let mut left = len as usize;
        while let Some((addr, n)) = cursor.piece(segs, left)
            && left > 0
        {
            // At most `len`, which fits.
            let len = n as u32;
            self.segs.push(Seg { addr, len });
            cursor.advance(segs, n);
            left -= n;
        }
        // One chain may bring a table full of pieces; the next would come on top of these.
        match self.packets.max(self.segs.len()) < ASIDE_MAX {
            true => SetAside::Kept,
            false => SetAside::Full,
        }
    }

    /// Payload bytes that wait, those that were written already among them.
    pub(crate) fn bytes(&self) -> usize {
        self.segs.iter().map(|seg| seg.len as usize).sum()
    }

    /// Keeps a chain until `release`, if one before it is kept. False: it goes back at once.
    pub(crate) fn hold_back(&mut self, head: u16) -> bool {
        let kept = self.packets > 0;
        if kept {
            // At most a burst's budget of packets.
            self.heads.push(head);
        }
        kept
    }

    /// Empties it; returns the chains to give back.
    pub(crate) fn release(&mut self) -> std::vec::Drain<'_, u16> {
        self.segs.clear();
        self.cursor = Cursor::default();
        self.packets = 0;
        self.heads.drain(..)
    }
}
