//! One split virtqueue (virtio 1.3 §2.7) as a burst uses it: it takes heads from the available ring, writes used
//! elements, and stores the used index **once** per burst.
//!
//! [`QueueConfig`] holds and checks the configuration. `virtio_queue::Queue` is not used for more than that: its
//! `add_used` publishes the index with every chain, and its iterator ends silently at a broken chain. So the code for
//! each packet is here and in `chain.rs`.
//!
//! Rules:
//! - Both of the device's indices are private. The driver's index is read once, checked, and kept (`seen_avail`).
//! - Used elements are plain stores. [`Virtqueue::publish`] stores the index that covers them with `Release`. Only
//!   after a SeqCst fence does [`Virtqueue::must_notify`] check whether the driver wants a notification: SYNC(used)
//!   pairs with the driver's "store used_event, full barrier, load used index".
//! - [`Virtqueue::enable_notify`] stores the position where the device stopped, does a fence, and reads the index
//!   again: SYNC(avail) pairs with the driver's "store avail index, full barrier, load avail_event".

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError};

use super::{ActivateError, QueueConfig};
use crate::carrier::CarrierFault;

/// Largest queue that the device accepts, in descriptors.
pub const QUEUE_MAX: u16 = 1024;

const RING_HEADER: u64 = 4;
const AVAIL_ELEMENT: u64 = 2;
const USED_ELEMENT: u64 = 8;

/// A virtqueue in use.
#[derive(Debug)]
pub(crate) struct Virtqueue {
    size: u16,
    desc: GuestAddress,
    avail: GuestAddress,
    used: GuestAddress,
    event_idx: bool,
    indirect: bool,
    next_avail: Wrapping<u16>,
    /// The driver's available index as last read and checked. Heads before it can be taken.
    seen_avail: Wrapping<u16>,
    next_used: Wrapping<u16>,
    published_used: Wrapping<u16>,
    /// Used index at the last check whether the driver wants a notification. `None` after another process served the
    /// queue: its value is unknown.
    checked_used: Option<Wrapping<u16>>,
    /// The device has asked the driver for no notifications (only used without EVENT_IDX).
    quiet: bool,
}

impl Virtqueue {
    /// Takes over a queue that the bus has configured, at its current position.
    pub(crate) fn new<M: GuestMemory>(
        index: u16,
        queue: &QueueConfig,
        mem: &M,
        event_idx: bool,
        indirect: bool,
    ) -> Result<Self, ActivateError> {
        queue.check(index, mem)?;
        Ok(Self {
            size: queue.size,
            desc: GuestAddress(queue.desc_table),
            avail: GuestAddress(queue.avail_ring),
            used: GuestAddress(queue.used_ring),
            event_idx,
            indirect,
            next_avail: Wrapping(queue.next_avail),
            seen_avail: Wrapping(queue.next_avail),
            next_used: Wrapping(queue.next_used),
            published_used: Wrapping(queue.next_used),
            checked_used: (queue.next_used == 0).then_some(Wrapping(0)),
            quiet: false,
        })
    }

    /// The configuration of the queue, at its current position. No descriptor is held, so every buffer that was taken
    /// is returned.
    pub(crate) fn config(&self) -> QueueConfig {
        QueueConfig {
            size: self.size,
            ready: true,
            desc_table: self.desc.0,
            avail_ring: self.avail.0,
            used_ring: self.used.0,
            next_avail: self.next_avail.0,
            next_used: self.next_used.0,
        }
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    pub(crate) fn desc_table(&self) -> GuestAddress {
        self.desc
    }

    pub(crate) fn indirect(&self) -> bool {
        self.indirect
    }

    /// Position in the available ring; vhost-user frontends call it the base.
    pub(crate) fn base(&self) -> u16 {
        self.next_avail.0
    }

    /// Returns the head of the next chain without taking it.
    pub(crate) fn peek<M: GuestMemory>(&mut self, mem: &M) -> Result<Option<u16>, CarrierFault> {
        if self.next_avail == self.seen_avail {
            // SYNC(avail): pairs with the driver's release store of the index.
            let idx = Wrapping(self.load(mem, self.avail, 2, Ordering::Acquire)?);
            let pending = (idx - self.next_avail).0;
            if pending > self.size {
                return Err(CarrierFault {
                    what: "available index is ahead of the queue size",
                    value: u64::from(pending),
                    limit: u64::from(self.size),
                });
            }
            self.seen_avail = idx;
            if pending == 0 {
                return Ok(None);
            }
        }
        let slot = u64::from(self.next_avail.0 % self.size);
        let head = self.load(
            mem,
            self.avail,
            RING_HEADER + slot * AVAIL_ELEMENT,
            Ordering::Relaxed,
        )?;
        if head >= self.size {
            // The chain cannot be returned, because it has no valid id.
            return Err(CarrierFault {
                what: "head of a chain is outside the descriptor table",
                value: u64::from(head),
                limit: u64::from(self.size) - 1,
            });
        }
        Ok(Some(head))
    }

    /// Head of the n-th chain after the next one, if the driver is known to have posted it and the head is valid.
    pub(crate) fn ahead<M: GuestMemory>(&self, mem: &M, n: u16) -> Option<u16> {
        let at = self.next_avail + Wrapping(n);
        if (self.seen_avail - at).0.wrapping_sub(1) >= self.size {
            return None;
        }
        let slot = u64::from(at.0 % self.size);
        let offset = RING_HEADER + slot * AVAIL_ELEMENT;
        let head = self.load(mem, self.avail, offset, Ordering::Relaxed).ok()?;
        (head < self.size).then_some(head)
    }

    /// Takes the chain that `peek` returned.
    pub(crate) fn advance(&mut self) {
        self.next_avail += 1;
    }

    /// Writes a used element. The driver sees it after `publish`.
    pub(crate) fn push_used<M: GuestMemory>(
        &mut self,
        mem: &M,
        head: u16,
        len: u32,
    ) -> Result<(), CarrierFault> {
        let slot = u64::from(self.next_used.0 % self.size);
        let addr = at(self.used, RING_HEADER + slot * USED_ELEMENT)?;
        // struct virtq_used_elem { le32 id; le32 len; }
        let element = u64::from(len) << 32 | u64::from(head);
        mem.write_obj(element.to_le(), addr)
            .map_err(|e| memory_fault("used vq", addr, &e))?;
        self.next_used += 1;
        Ok(())
    }

    /// Number of used elements that the driver does not see yet.
    pub(crate) fn unpublished(&self) -> u16 {
        (self.next_used - self.published_used).0
    }

    /// Publishes all used elements since the last call. Returns true if there were any.
    pub(crate) fn publish<M: GuestMemory>(&mut self, mem: &M) -> Result<bool, CarrierFault> {
        if self.published_used == self.next_used {
            return Ok(false);
        }
        self.store(mem, self.used, 2, self.next_used.0, Ordering::Release)?;
        self.published_used = self.next_used;
        Ok(true)
    }

    /// Returns true if the driver must be notified of the elements that were published since the last call.
    pub(crate) fn must_notify<M: GuestMemory>(&mut self, mem: &M) -> Result<bool, CarrierFault> {
        let (old, new) = (self.checked_used, self.published_used);
        if old == Some(new) {
            return Ok(false);
        }
        self.checked_used = Some(new);
        let Some(old) = old else { return Ok(true) };
        // SYNC(used): the used index must be visible before the driver's used_event is read.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let offset = RING_HEADER + u64::from(self.size) * AVAIL_ELEMENT;
            let event = Wrapping(self.load(mem, self.avail, offset, Ordering::Relaxed)?);
            // virtio 1.3 §2.7.7: the driver is notified when the index passes used_event.
            Ok(new - event - Wrapping(1) < new - old)
        } else {
            let flags = self.load(mem, self.avail, 0, Ordering::Relaxed)?;
            Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
        }
    }

    /// Returns true if elements were published, by this or an earlier device, since the last `must_notify`.
    pub(crate) fn is_notification_due(&self) -> bool {
        self.checked_used != Some(self.published_used)
    }

    /// Asks for a kick with the next chain. Returns true if a chain is already there.
    pub(crate) fn enable_notify<M: GuestMemory>(&mut self, mem: &M) -> Result<bool, CarrierFault> {
        if self.event_idx {
            let offset = RING_HEADER + u64::from(self.size) * USED_ELEMENT;
            self.store(mem, self.used, offset, self.next_avail.0, Ordering::Relaxed)?;
        } else {
            self.store(mem, self.used, 0, 0, Ordering::Relaxed)?;
            self.quiet = false;
        }
        // SYNC(avail): avail_event must be visible before the index is read again.
        fence(Ordering::SeqCst);
        let idx = self.load(mem, self.avail, 2, Ordering::Relaxed)?;
        Ok(idx != self.next_avail.0)
    }

    /// Asks the driver for no kicks. With EVENT_IDX the driver kicks only once after each `enable_notify`, so nothing
    /// is needed.
    pub(crate) fn disable_notify<M: GuestMemory>(&mut self, mem: &M) -> Result<(), CarrierFault> {
        if !self.event_idx && !self.quiet {
            let flag = VRING_USED_F_NO_NOTIFY as u16;
            self.store(mem, self.used, 0, flag, Ordering::Relaxed)?;
            self.quiet = true;
        }
        Ok(())
    }

    fn load<M: GuestMemory>(
        &self,
        mem: &M,
        base: GuestAddress,
        offset: u64,
        order: Ordering,
    ) -> Result<u16, CarrierFault> {
        let addr = at(base, offset)?;
        mem.load(addr, order)
            .map(u16::from_le)
            .map_err(|e| memory_fault("available vq", addr, &e))
    }

    fn store<M: GuestMemory>(
        &self,
        mem: &M,
        base: GuestAddress,
        offset: u64,
        value: u16,
        order: Ordering,
    ) -> Result<(), CarrierFault> {
        let addr = at(base, offset)?;
        mem.store(value.to_le(), addr, order)
            .map_err(|e| memory_fault("used vq", addr, &e))
    }
}

fn at(base: GuestAddress, offset: u64) -> Result<GuestAddress, CarrierFault> {
    base.0
        .checked_add(offset)
        .map(GuestAddress)
        .ok_or(CarrierFault {
            what: "queue address wraps",
            value: base.0,
            limit: u64::MAX - offset,
        })
}

/// A part of the queue that was in guest memory at setup no longer is.
fn memory_fault(what: &'static str, addr: GuestAddress, e: &GuestMemoryError) -> CarrierFault {
    tracing::debug!(addr = addr.0, error = %e, "{what} is not accessible");
    CarrierFault {
        what,
        value: addr.0,
        limit: 0,
    }
}
