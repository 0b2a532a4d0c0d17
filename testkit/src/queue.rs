//! The driver's side of one split virtqueue (virtio 1.3 §2.7), with EVENT_IDX as Linux's `virtio_ring.c` uses it.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::Bytes;

use crate::memory::{self, VmMemory};

/// Descriptor flag: another descriptor follows.
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// Descriptor flag: the buffer is a table of descriptors.
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// A buffer to post.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest address.
    pub addr: u64,
    /// Length, bytes.
    pub len: u32,
}

/// The driver's side of a virtqueue.
#[derive(Debug)]
pub struct DriverQueue {
    mem: Arc<VmMemory>,
    size: u16,
    addrs: [u64; 3],
    event_idx: bool,
    free: Vec<u16>,
    /// Descriptors of the chain that starts at each head.
    chains: Vec<Vec<u16>>,
    avail: u16,
    published: u16,
    last_used: u16,
}

impl DriverQueue {
    /// Sets up queue `index` of `size` descriptors in `mem`.
    pub fn new(mem: Arc<VmMemory>, index: u16, size: u16, event_idx: bool) -> Self {
        assert!(size.is_power_of_two() && size <= memory::QUEUE_MAX);
        Self {
            mem,
            size,
            addrs: memory::queue_addrs(index),
            event_idx,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            avail: 0,
            published: 0,
            last_used: 0,
        }
    }

    /// Returns the queue as a transport would hand it to the device.
    pub fn queue(&self) -> Queue {
        let mut queue = Queue::new(1024).expect("a power of two");
        let [desc, avail, used] = self.addrs.map(|a| (Some(a as u32), Some((a >> 32) as u32)));
        queue.set_size(self.size);
        queue.set_desc_table_address(desc.0, desc.1);
        queue.set_avail_ring_address(avail.0, avail.1);
        queue.set_used_ring_address(used.0, used.1);
        queue.set_event_idx(self.event_idx);
        queue.set_ready(true);
        queue
    }

    /// Guest addresses of descriptors, available ring and used ring.
    pub fn addrs(&self) -> [u64; 3] {
        self.addrs
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Descriptors that are in no chain.
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// Next free descriptor, which `add` will use as head.
    pub fn next_head(&self) -> Option<u16> {
        self.free.last().copied()
    }

    /// Posts a chain of direct descriptors, but does not publish it. `None`: no descriptors are left.
    pub fn add(&mut self, buffers: &[Buffer], write: bool) -> Option<u16> {
        if self.free.len() < buffers.len() {
            return None;
        }
        let at = self.free.len() - buffers.len();
        let mut chain = self.free.split_off(at);
        chain.reverse();
        let direction = if write { WRITE } else { 0 };
        for (i, buffer) in buffers.iter().enumerate() {
            let next = chain.get(i + 1).copied();
            let flags = direction | if next.is_some() { NEXT } else { 0 };
            self.write_desc(chain[i], buffer.addr, buffer.len, flags, next.unwrap_or(0));
        }
        let head = chain[0];
        self.chains[usize::from(head)] = chain;
        self.push(head);
        Some(head)
    }

    /// Posts a chain through an indirect table, but does not publish it.
    pub fn add_indirect(&mut self, buffers: &[Buffer], write: bool) -> Option<u16> {
        assert!(buffers.len() <= memory::INDIRECT_MAX);
        let head = self.free.pop()?;
        let table = memory::indirect_table(head);
        let direction = if write { WRITE } else { 0 };
        for (i, buffer) in buffers.iter().enumerate() {
            let more = i + 1 < buffers.len();
            let flags = direction | if more { NEXT } else { 0 };
            let next = if more { i as u16 + 1 } else { 0 };
            let desc = Descriptor::new(buffer.addr, buffer.len, flags, next);
            let addr = table as usize + 16 * i;
            memory::first(&self.mem)
                .write_obj(desc, addr)
                .expect("indirect table");
        }
        self.write_desc(head, table, 16 * buffers.len() as u32, INDIRECT, 0);
        self.chains[usize::from(head)].push(head);
        self.push(head);
        Some(head)
    }

    /// Publishes what was added. Returns true if the device wants a kick.
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.avail);
        self.store(self.addrs[1] + 2, new, Ordering::Release);
        self.published = new;
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.load(
                self.addrs[2] + 4 + 8 * u64::from(self.size),
                Ordering::Relaxed,
            );
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            old != new && self.load(self.addrs[2], Ordering::Relaxed) & 1 == 0
        }
    }

    /// Takes a chain that the device has used: head and bytes written. Its descriptors are free again.
    pub fn pop_used(&mut self) -> Option<(u16, u32)> {
        let used_idx = self.load(self.addrs[2] + 2, Ordering::Acquire);
        if used_idx == self.last_used {
            return None;
        }
        let slot = u64::from(self.last_used % self.size);
        let addr = (self.addrs[2] + 4 + 8 * slot) as usize;
        let element = memory::first(&self.mem).read_obj(addr).expect("used ring");
        let element = u64::from_le(element);
        self.last_used = self.last_used.wrapping_add(1);
        let (head, len) = (element as u32 as u16, (element >> 32) as u32);
        self.free.append(&mut self.chains[usize::from(head)]);
        Some((head, len))
    }

    /// Asks for an interrupt with the next used chain. Returns true if a used chain is there already.
    pub fn enable_callback(&mut self) -> bool {
        self.set_used_event(self.last_used);
        self.store(self.addrs[1], 0, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.load(self.addrs[2] + 2, Ordering::Relaxed) != self.last_used
    }

    /// Says that interrupts are not needed (without EVENT_IDX).
    pub fn disable_callback(&mut self) {
        if !self.event_idx {
            self.store(self.addrs[1], 1, Ordering::Relaxed);
        }
    }

    // ---- raw access, for hostile drivers

    /// Writes a descriptor without checks.
    pub fn write_desc(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = (self.addrs[0] + 16 * u64::from(index)) as usize;
        memory::first(&self.mem)
            .write_obj(Descriptor::new(addr, len, flags, next), at)
            .expect("descriptor table");
    }

    /// Puts `head` into the available ring, but does not publish it.
    pub fn push(&mut self, head: u16) {
        let slot = u64::from(self.avail % self.size);
        self.store(self.addrs[1] + 4 + 2 * slot, head, Ordering::Relaxed);
        self.avail = self.avail.wrapping_add(1);
    }

    /// Writes the available index without checks.
    pub fn set_avail_idx(&mut self, idx: u16) {
        self.avail = idx;
        self.published = idx;
        self.store(self.addrs[1] + 2, idx, Ordering::Release);
    }

    /// Returns the available index that the device sees.
    pub fn avail_idx(&self) -> u16 {
        self.published
    }

    /// Returns the used index from memory.
    pub fn used_idx(&self) -> u16 {
        self.load(self.addrs[2] + 2, Ordering::Acquire)
    }

    /// Writes the index at which the driver wants an interrupt.
    pub fn set_used_event(&self, idx: u16) {
        let addr = self.addrs[1] + 4 + 2 * u64::from(self.size);
        self.store(addr, idx, Ordering::Relaxed);
    }

    fn load(&self, addr: u64, order: Ordering) -> u16 {
        let value: u16 = memory::first(&self.mem)
            .load(addr as usize, order)
            .expect("ring");
        u16::from_le(value)
    }

    fn store(&self, addr: u64, value: u16, order: Ordering) {
        memory::first(&self.mem)
            .store(value.to_le(), addr as usize, order)
            .expect("ring");
    }
}
