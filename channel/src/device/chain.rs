//! Descriptor chains of any shape: a chain is first walked and checked as a whole, then read or written through a
//! cursor.
//!
//! A chain is a list of buffers in guest memory. The header may end and the payload may start anywhere, not only at a
//! buffer boundary (virtio 1.3 §2.7.4: "the device MUST NOT make assumptions about the particular arrangement of
//! descriptors"). Linux 6.1 sends 1 or 2 buffers; 6.12 sends a header and up to 17 fragments.
//!
//! Rules:
//! - Each descriptor is read once. All errors in a chain are found before any of its bytes is used, so a refused chain
//!   has had no effect and its head can be returned.
//! - After `walk` every buffer is known to be in guest memory. A buffer may span adjacent regions, but never a gap.
//! - A chain has at most as many descriptors as its table.

use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};

use super::prefetch;
use super::virtqueue::{QUEUE_MAX, Virtqueue};

/// Maximum number of descriptors in one indirect table.
pub const INDIRECT_MAX: u32 = QUEUE_MAX as u32;

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seg {
    pub(crate) addr: GuestAddress,
    pub(crate) len: u32,
}

/// Why a chain was returned without being used.
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
    #[error("indirect table has {len} bytes (must be 16 to {max}, and a multiple of 16)")]
    IndirectSize { len: u32, max: u32 },
    #[error("buffer is {0} for the device on a queue of the other direction")]
    Direction(&'static str),
    #[error("buffer {addr:#x}+{len:#x} is not in guest memory")]
    Buffer { addr: u64, len: u32 },
    #[error("chain holds more than {limit} bytes")]
    TooLarge { limit: u64 },
    #[error("chain has {len} bytes, but a header needs 44")]
    TooSmall { len: u64 },
}

/// Collects the buffers of the chain at `head` in `segs`. Returns their total length, which is at most `limit`.
pub(crate) fn walk<M: GuestMemory>(
    mem: &M,
    vq: &Virtqueue,
    head: u16,
    access: Permissions,
    limit: u64,
    segs: &mut Vec<Seg>,
) -> Result<u64, Malformed> {
    let desc = fetch(mem, vq.desc_table(), head)?;
    walk_from(mem, vq, (head, desc), access, limit, segs)
}

/// As `walk`, for a chain whose first descriptor was read already.
pub(crate) fn walk_from<M: GuestMemory>(
    mem: &M,
    vq: &Virtqueue,
    (head, first): (u16, Descriptor),
    access: Permissions,
    limit: u64,
    segs: &mut Vec<Seg>,
) -> Result<u64, Malformed> {
    segs.clear();
    let writable = access.has_write();
    let (mut table, mut entries) = (vq.desc_table(), vq.size());
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
            entries = indirect_entries(vq, &desc, flags)?;
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

/// Returns true if a buffer is in guest memory. Also prefetches its start, because it will be used soon.
fn lies_in<M: GuestMemory>(mem: &M, addr: GuestAddress, len: usize, access: Permissions) -> bool {
    let Ok(mut slices) = mem.get_slices(addr, len, access) else {
        return false;
    };
    match slices.next() {
        Some(Ok(slice)) => {
            prefetch::first_line(&slice);
            slice.len() == len || mem.check_range(addr, len, access)
        }
        _ => false,
    }
}

/// Reads a descriptor.
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

/// As `read_slice`, but twice as fast: most parts of a chain are small and in one region.
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

/// Checks an indirect descriptor (virtio 1.3 §2.7.5.3). Its WRITE flag has no meaning.
fn indirect_entries(vq: &Virtqueue, desc: &Descriptor, flags: u32) -> Result<u16, Malformed> {
    if !vq.indirect() {
        return Err(Malformed::IndirectFeature);
    }
    if flags & VRING_DESC_F_NEXT != 0 {
        return Err(Malformed::IndirectNext);
    }
    let (len, max) = (desc.len(), INDIRECT_MAX * 16);
    if len == 0 || len % 16 != 0 || len > max {
        return Err(Malformed::IndirectSize { len, max });
    }
    // At most INDIRECT_MAX, so it fits.
    Ok((len / 16) as u16)
}

/// A position in the bytes of a chain.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cursor {
    seg: usize,
    offset: u32,
}

impl Cursor {
    /// Returns the contiguous piece at the cursor, at most `max` bytes.
    pub(crate) fn piece(&self, segs: &[Seg], max: usize) -> Option<(GuestAddress, usize)> {
        let seg = segs.get(self.seg)?;
        let len = ((seg.len - self.offset) as usize).min(max);
        // `walk` checked that addr + len does not wrap.
        Some((GuestAddress(seg.addr.0 + u64::from(self.offset)), len))
    }

    /// Moves forward by `n` bytes, which must be in the chain.
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
