//! A walk of a chain by the specification, over a copy of memory. The device's walk is compared with it.

use adit_channel::device::PAYLOAD_MAX;
use vm_memory::{Bytes, GuestAddress};

use super::{DESC, HEADER, Memory, REGIONS, TABLE};
use crate::input::Input;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A descriptor.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Desc {
    pub(super) fn take(input: &mut Input<'_>) -> Self {
        let kind = input.u8();
        let small = u64::from(input.u16());
        let addr = match kind % 16 {
            0..=3 => HEADER + 44,
            4 | 5 => HEADER,
            6 => 0x1000 + small % 0x3000,
            7 => 0x4000 + small % 0x2000,
            8 => 0x8000 + small % 0x1000,
            9 => 0x4000 - small % 64,
            10 => 0x6000 - small % 64,
            11 => 0x9000 - small % 64,
            12 => u64::MAX - small % 0x2000,
            13 => 0x1000 - small % 64,
            14 => TABLE + small % 0x100,
            _ => input.u64(),
        };
        let len = match kind >> 5 {
            0 => 44,
            1 => 0,
            2..=4 => u32::from(input.u8()),
            5 => 16 * u32::from(input.u8()),
            6 => u32::from(input.u16()),
            _ => input.edge32(),
        };
        let bits = input.u8();
        // Mostly one of the flags that exist; sometimes all sixteen bits.
        let flags = if bits & 0xc0 == 0xc0 {
            input.u16()
        } else {
            u16::from(bits & 7)
        };
        let next = u16::from(bits >> 3 & 7)
            + if bits & 0xc0 == 0x80 {
                u16::from(input.u8())
            } else {
                0
            };
        Self {
            addr,
            len,
            flags,
            next,
        }
    }

    pub(super) fn bytes(&self) -> [u8; 16] {
        let mut b = [0; 16];
        b[..8].copy_from_slice(&self.addr.to_le_bytes());
        b[8..12].copy_from_slice(&self.len.to_le_bytes());
        b[12..14].copy_from_slice(&self.flags.to_le_bytes());
        b[14..].copy_from_slice(&self.next.to_le_bytes());
        b
    }
}

/// Guest memory as bytes, for the model.
#[derive(Clone)]
pub(super) struct Image(pub(super) Vec<u8>);

impl Image {
    pub(super) fn of(mem: &Memory) -> Self {
        let mut bytes = vec![0; 0x9000];
        for (at, len) in REGIONS {
            let piece = &mut bytes[at as usize..(at + len) as usize];
            mem.read_slice(piece, GuestAddress(at)).expect("memory");
        }
        Self(bytes)
    }

    /// The bytes at an address. `None` if some are not memory.
    pub(super) fn get(&self, addr: u64, len: u64) -> Option<&[u8]> {
        let end = addr.checked_add(len)?;
        let inside = (0x1000..=0x6000).contains(&addr) && end <= 0x6000
            || (0x8000..=0x9000).contains(&addr) && end <= 0x9000;
        inside.then(|| &self.0[addr as usize..end as usize])
    }

    fn desc(&self, table: u64, index: u16) -> Option<Desc> {
        let b = self.get(table.checked_add(16 * u64::from(index))?, 16)?;
        let word = |at: usize| u16::from_le_bytes([b[at], b[at + 1]]);
        Some(Desc {
            addr: u64::from_le_bytes(*b.first_chunk()?),
            len: u32::from(word(8)) | u32::from(word(10)) << 16,
            flags: word(12),
            next: word(14),
        })
    }
}

/// The specification's walk of a chain, over a copy of memory.
pub(super) struct Model<'a> {
    pub(super) image: &'a Image,
    pub(super) size: u16,
    pub(super) indirect: bool,
    pub(super) writable: bool,
    /// Indirect tables that the walk read.
    pub(super) tables: Vec<(u64, u64)>,
}

impl Model<'_> {
    /// The buffers of a chain; `None` if a driver must not post it.
    pub(super) fn walk(&mut self, head: u16) -> Option<Vec<(u64, u64)>> {
        let limit: u64 = if self.writable {
            u64::from(u32::MAX)
        } else {
            44 + u64::from(PAYLOAD_MAX)
        };
        let mut buffers = Vec::new();
        let (mut table, mut entries, mut nested) = (DESC, self.size, false);
        let (mut index, mut seen) = (head, vec![false; usize::from(self.size)]);
        loop {
            let been = seen.get_mut(usize::from(index))?;
            if std::mem::replace(been, true) {
                return None;
            }
            let desc = self.image.desc(table, index)?;
            if desc.flags & INDIRECT != 0 {
                let good = !nested
                    && self.indirect
                    && desc.flags & NEXT == 0
                    && desc.len > 0
                    && desc.len % 16 == 0
                    && desc.len <= 16 * 1024;
                if !good {
                    return None;
                }
                entries = (desc.len / 16) as u16;
                self.tables.push((desc.addr, u64::from(desc.len)));
                (table, index, nested) = (desc.addr, 0, true);
                seen = vec![false; usize::from(entries)];
                continue;
            }
            if (desc.flags & WRITE != 0) != self.writable {
                return None;
            }
            if desc.len > 0 {
                self.image.get(desc.addr, u64::from(desc.len))?;
                buffers.push((desc.addr, u64::from(desc.len)));
                if buffers.iter().map(|b| b.1).sum::<u64>() > limit {
                    return None;
                }
            }
            if desc.flags & NEXT == 0 {
                break;
            }
            index = desc.next;
            if index >= entries {
                return None;
            }
        }
        (buffers.iter().map(|b| b.1).sum::<u64>() >= 44).then_some(buffers)
    }

    pub(super) fn bytes(&self, buffers: &[(u64, u64)]) -> Vec<u8> {
        let pieces = buffers
            .iter()
            .map(|&(at, len)| self.image.get(at, len).expect("checked"));
        pieces.flatten().copied().collect()
    }
}
