//! Descriptor chains of any shape: walked and checked whole, then read or written through a cursor.
//!
//! A chain is a list of buffers in guest memory; where the header ends and the payload begins need not be where a
//! buffer ends (virtio 1.3 §2.7.4: "the device MUST NOT make assumptions about the particular arrangement of
//! descriptors"). Linux 6.1 sends 1 or 2 buffers, 6.12 sends a header and up to 17 fragments.
//!
//! Rules:
//! - Each descriptor is fetched once; what is wrong with a chain is found before a byte of it is used, so that a
//!   refused chain has had no effect and its head can be given back.
//! - Every buffer lies in guest memory when `walk` returns; it may span regions that touch, never a hole.
//! - A chain has at most as many descriptors as its table.

use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};

use super::ahead;
use super::ring::{QUEUE_MAX, Ring};

/// Most descriptors of one indirect table.
pub const INDIRECT_MAX: u32 = QUEUE_MAX as u32;

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seg {
    pub(crate) addr: GuestAddress,
    pub(crate) len: u32,
}

/// Why a chain was given back unread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("descriptor index {index} is outside a table of {entries}")]
    Index { index: u16, entries: u16 },
    #[error("chain is longer than its table of {entries} or loops")]
    TooLong { entries: u16 },
    #[error("descriptor table at {addr:#x} is not in guest memory")]
    Table { addr: u64 },
    #[error("indirect descriptor inside an indirect table")]
    NestedIndirect,
    #[error("indirect descriptor with NEXT")]
    IndirectNext,
    #[error("indirect descriptor, but the feature was not negotiated")]
    IndirectFeature,
    #[error("indirect table of {len} bytes (16 .. {max}, by 16)")]
    IndirectSize { len: u32, max: u32 },
    #[error("buffer is {0} for the device on a queue of the other direction")]
    Direction(&'static str),
    #[error("buffer {addr:#x}+{len:#x} is not in guest memory")]
    Buffer { addr: u64, len: u32 },
    #[error("chain holds more than {limit} bytes")]
    TooLarge { limit: u64 },
    #[error("chain holds {len} bytes, a header needs 44")]
    TooSmall { len: u64 },
}

/// Collects the buffers of the chain at `head` into `segs`. Returns their length in all, at most `limit`.
pub(crate) fn walk<M: GuestMemory>(
    mem: &M,
    ring: &Ring,
    head: u16,
    access: Permissions,
    limit: u64,
    segs: &mut Vec<Seg>,
) -> Result<u64, Malformed> {
    let desc = fetch(mem, ring.desc_table(), head)?;
    walk_from(mem, ring, (head, desc), access, limit, segs)
}

/// As `walk`, of a chain whose first descriptor was fetched.
pub(crate) fn walk_from<M: GuestMemory>(
    mem: &M,
    ring: &Ring,
    (head, first): (u16, Descriptor),
    access: Permissions,
    limit: u64,
    segs: &mut Vec<Seg>,
) -> Result<u64, Malformed> {
    segs.clear();
    let writable = access.has_write();
    let (mut table, mut entries) = (ring.desc_table(), ring.size());
    let (mut index, mut left, mut nested) = (head, entries, false);
    let (mut total, mut first) = (0u64, Some(first));
    loop {
        if index >= entries {
            return Err(Malformed::Index { index, entries });
        }
        left = left.checked_sub(1).ok_or(Malformed::TooLong { entries })?;
        let desc = match first.take() {
            Some(desc) => desc,
            None => fetch(mem, table, index)?,
        };
        let flags = u32::from(desc.flags());
        if flags & VRING_DESC_F_INDIRECT != 0 {
            if nested {
                return Err(Malformed::NestedIndirect);
            }
            entries = indirect_entries(ring, &desc, flags)?;
            (table, index, left, nested) = (desc.addr(), 0, entries, true);
            continue;
        }
        if (flags & VRING_DESC_F_WRITE != 0) != writable {
            return Err(Malformed::Direction(if writable {
                "readable"
            } else {
                "writable"
            }));
        }
        let (addr, len) = (desc.addr(), desc.len());
        if len != 0 {
            total += u64::from(len);
            if total > limit {
                return Err(Malformed::TooLarge { limit });
            }
            if addr.0.checked_add(u64::from(len)).is_none()
                || !lies_in(mem, addr, len as usize, access)
            {
                return Err(Malformed::Buffer { addr: addr.0, len });
            }
            segs.push(Seg { addr, len });
        }
        if flags & VRING_DESC_F_NEXT == 0 {
            return Ok(total);
        }
        index = desc.next();
    }
}

/// Tells whether a buffer is in guest memory, and asks for what it begins with: it is read or written soon.
fn lies_in<M: GuestMemory>(mem: &M, addr: GuestAddress, len: usize, access: Permissions) -> bool {
    let Ok(mut slices) = mem.get_slices(addr, len, access) else {
        return false;
    };
    match slices.next() {
        Some(Ok(slice)) => {
            ahead::soon(&slice);
            slice.len() == len || mem.check_range(addr, len, access)
        }
        _ => false,
    }
}

/// Fetches a descriptor.
pub(crate) fn fetch<M: GuestMemory>(
    mem: &M,
    table: GuestAddress,
    index: u16,
) -> Result<Descriptor, Malformed> {
    let bad = Malformed::Table { addr: table.0 };
    let addr = table.0.checked_add(16 * u64::from(index)).ok_or(bad)?;
    let mut desc = Descriptor::default();
    read(mem, GuestAddress(addr), desc.as_mut_slice()).map_err(|_| bad)?;
    Ok(desc)
}

/// As `read_slice`, in half the time: most of what a chain is made of is small and lies in one region.
fn read<M: GuestMemory>(
    mem: &M,
    addr: GuestAddress,
    dst: &mut [u8],
) -> Result<(), GuestMemoryError> {
    let (expected, mut completed) = (dst.len(), 0);
    for slice in mem.get_slices(addr, expected, Permissions::Read)? {
        completed += slice?.copy_to(&mut dst[completed..]);
    }
    if completed != expected {
        return Err(GuestMemoryError::PartialBuffer {
            expected,
            completed,
        });
    }
    Ok(())
}

/// Checks an indirect descriptor (virtio 1.3 §2.7.5.3). Its WRITE flag means nothing.
fn indirect_entries(ring: &Ring, desc: &Descriptor, flags: u32) -> Result<u16, Malformed> {
    if !ring.indirect() {
        return Err(Malformed::IndirectFeature);
    }
    if flags & VRING_DESC_F_NEXT != 0 {
        return Err(Malformed::IndirectNext);
    }
    let (len, max) = (desc.len(), INDIRECT_MAX * 16);
    if len == 0 || len % 16 != 0 || len > max {
        return Err(Malformed::IndirectSize { len, max });
    }
    // At most INDIRECT_MAX, which fits.
    Ok((len / 16) as u16)
}

/// A place in a chain's bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cursor {
    seg: usize,
    offset: u32,
}

impl Cursor {
    /// The piece at the cursor, at most `max` bytes of it.
    pub(crate) fn piece(&self, segs: &[Seg], max: usize) -> Option<(GuestAddress, usize)> {
        let seg = segs.get(self.seg)?;
        let len = ((seg.len - self.offset) as usize).min(max);
        // `walk` checked that addr + len does not wrap.
        Some((GuestAddress(seg.addr.0 + u64::from(self.offset)), len))
    }

    /// Moves on by `n` bytes, which the chain holds.
    pub(crate) fn advance(&mut self, segs: &[Seg], mut n: usize) {
        while let Some(seg) = segs.get(self.seg) {
            let left = (seg.len - self.offset) as usize;
            if n < left {
                self.offset += n as u32;
                return;
            }
            n -= left;
            self.seg += 1;
            self.offset = 0;
            if n == 0 {
                return;
            }
        }
    }

    /// Copies bytes out of guest memory until `dst` is full or the chain ends.
    pub(crate) fn copy_out<M: GuestMemory>(
        &mut self,
        mem: &M,
        segs: &[Seg],
        dst: &mut [u8],
    ) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        while done < dst.len() {
            let Some((addr, len)) = self.piece(segs, dst.len() - done) else {
                break;
            };
            read(mem, addr, &mut dst[done..done + len])?;
            self.advance(segs, len);
            done += len;
        }
        Ok(done)
    }

    /// Copies bytes into guest memory until `src` is empty or the chain ends.
    pub(crate) fn copy_in<M: GuestMemory>(
        &mut self,
        mem: &M,
        segs: &[Seg],
        src: &[u8],
    ) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        while done < src.len() {
            let Some((addr, len)) = self.piece(segs, src.len() - done) else {
                break;
            };
            mem.write_slice(&src[done..done + len], addr)?;
            self.advance(segs, len);
            done += len;
        }
        Ok(done)
    }
}
