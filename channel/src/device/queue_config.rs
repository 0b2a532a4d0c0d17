//! What a bus knows of a virtqueue: plain numbers, so that it does not matter with which crate, or which version of
//! one, the bus keeps its registers.

use vm_memory::GuestMemory;
use vm_memory::Permissions::{Read, Write};

use super::ActivateError;
use super::virtqueue::QUEUE_MAX;

const DESC_BYTES: usize = 16;
const AVAIL_ELEMENT_BYTES: usize = 2;
const USED_ELEMENT_BYTES: usize = 8;
/// Flags, index and event index, which both rings have around their elements.
const RING_FIELDS_BYTES: usize = 6;

/// A split virtqueue as the driver has configured it (virtio 1.3 §2.7). The device checks all of it when it becomes
/// active, so a bus may copy its registers here as they are.
///
/// A new queue has the indices 0. A queue that another process or an earlier device has served continues at its
/// indices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueConfig {
    /// Number of descriptors that the driver chose: a power of two, at most [`QUEUE_MAX`].
    pub size: u16,
    /// The driver has enabled the queue.
    pub ready: bool,
    /// Guest address of the descriptor table.
    pub desc_table: u64,
    /// Guest address of the available ring (the driver area).
    pub avail_ring: u64,
    /// Guest address of the used ring (the device area).
    pub used_ring: u64,
    /// Position in the available ring of the next chain to take.
    pub next_avail: u16,
    /// Position in the used ring of the next chain to return.
    pub next_used: u16,
}

impl QueueConfig {
    /// The three parts of the queue: name, guest address, bytes, alignment (virtio 1.3 §2.7), and how the device uses
    /// it.
    fn parts(&self) -> [(&'static str, u64, usize, u64, vm_memory::Permissions); 3] {
        let n = usize::from(self.size);
        let (avail, used) = (n * AVAIL_ELEMENT_BYTES, n * USED_ELEMENT_BYTES);
        [
            (
                "descriptor table",
                self.desc_table,
                n * DESC_BYTES,
                16,
                Read,
            ),
            (
                "available ring",
                self.avail_ring,
                RING_FIELDS_BYTES + avail,
                2,
                Read,
            ),
            (
                "used ring",
                self.used_ring,
                RING_FIELDS_BYTES + used,
                4,
                Write,
            ),
        ]
    }

    /// Returns true if all three parts of the queue are in `mem`.
    pub(super) fn lies_in<M: GuestMemory>(&self, mem: &M) -> bool {
        let mut parts = self.parts().into_iter();
        parts.all(|(_, addr, len, _, access)| {
            mem.check_range(vm_memory::GuestAddress(addr), len, access)
        })
    }

    /// Checks that the device can use the queue.
    pub(super) fn check<M: GuestMemory>(&self, queue: u16, mem: &M) -> Result<(), ActivateError> {
        let size = self.size;
        if !size.is_power_of_two() || size > QUEUE_MAX {
            return Err(ActivateError::QueueSize {
                queue,
                size,
                max: QUEUE_MAX,
            });
        }
        for (part, addr, _, align, _) in self.parts() {
            if !addr.is_multiple_of(align) {
                return Err(ActivateError::QueueAlign {
                    queue,
                    part,
                    addr,
                    align,
                });
            }
        }
        // An address of 0 was never set.
        let set = self.avail_ring != 0 && self.used_ring != 0;
        if !self.ready || !set || !self.lies_in(mem) {
            return Err(self.not_in_memory(queue));
        }
        Ok(())
    }

    /// The error for a queue that is not in guest memory.
    pub(super) fn not_in_memory(&self, queue: u16) -> ActivateError {
        ActivateError::QueueAddress {
            queue,
            desc: self.desc_table,
            avail: self.avail_ring,
            used: self.used_ring,
        }
    }
}

impl From<&virtio_queue::Queue> for QueueConfig {
    fn from(queue: &virtio_queue::Queue) -> Self {
        use virtio_queue::QueueT;
        Self {
            size: queue.size(),
            ready: queue.ready(),
            desc_table: queue.desc_table(),
            avail_ring: queue.avail_ring(),
            used_ring: queue.used_ring(),
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
        }
    }
}

impl From<virtio_queue::Queue> for QueueConfig {
    fn from(queue: virtio_queue::Queue) -> Self {
        Self::from(&queue)
    }
}
