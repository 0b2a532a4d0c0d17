//! When the driver is notified that its TX packets were taken.
//!
//! The driver does not wait for this notification, it only wants its buffers back at some time. If each queue has its
//! own interrupt, the driver is notified after each burst. An emulated guest that is still handling that interrupt
//! when an answer arrives has not gone to sleep (measured with TCG: 220 us round trip; 305 us with one notification
//! for many packets).
//!
//! If the queues share one interrupt ([`Signal::is_shared`](super::Signal::is_shared), virtio-mmio), the driver checks
//! all its queues whenever a packet arrives, and each interrupt costs it two exits or more. So it gets one
//! notification for many packets: when the returned buffers may be half of its descriptors, or after a sleep of
//! [`REST`] in which nothing else happened, or after [`SLEEPS_MAX`] sleeps. It gets none for buffers that it has found
//! by itself before that, as its `used_event` shows.

use std::time::Duration;

/// Longest sleep of the device while a notification is outstanding. It is longer than an answer takes, even on an
/// emulated machine.
pub(crate) const REST: Duration = Duration::from_millis(10);
/// After this many sleeps the driver is notified in any case.
const SLEEPS_MAX: u32 = 64;

/// What has happened since the last notification.
#[derive(Debug, Default)]
pub(crate) struct Notice {
    /// Number of buffers of the taken chains. At least the number of their descriptors, because an indirect table uses
    /// one descriptor for several buffers.
    buffers: usize,
    sleeps: u32,
    /// A buffer was returned, on either queue, since the last sleep.
    moved: bool,
}

impl Notice {
    /// Records that a chain of this many buffers was taken.
    pub(crate) fn took(&mut self, buffers: usize) {
        self.buffers += buffers.max(1);
    }

    /// Records that used buffers were published.
    pub(crate) fn moved(&mut self) {
        self.moved = true;
    }

    /// Returns true if so many buffers were taken that the driver may need them, on a queue of `size` descriptors.
    pub(crate) fn is_much(&self, size: u16) -> bool {
        self.buffers >= usize::from(size.div_ceil(2))
    }

    /// Call before the device sleeps. Returns true if the driver must be notified first.
    pub(crate) fn sleep(&mut self) -> bool {
        self.sleeps += 1;
        let idle = !std::mem::take(&mut self.moved);
        idle || self.sleeps >= SLEEPS_MAX
    }

    /// Records that the driver was notified, or did not ask for it.
    pub(crate) fn notified(&mut self) {
        (self.buffers, self.sleeps) = (0, 0);
    }
}
