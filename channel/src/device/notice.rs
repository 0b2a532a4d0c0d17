//! When the driver is told that its packets were taken.
//!
//! It does not wait for that: it wants its buffers back some time. Where each queue has an interrupt of its own, it is told
//! after each burst: an emulated guest that is still busy with that when an answer comes has not gone to sleep over it
//! (measured with TCG: 220 us there and back, and 305 when it is told of many at once).
//!
//! Where they share one ([`Signal::is_shared`](super::Signal::is_shared), virtio-mmio), it looks at all its queues whenever
//! a packet of ours comes, and each interrupt costs it two exits or more. So it is told of many at once: when what it was
//! given back may be half of its descriptors, or when a sleep of [`REST`] brought nothing else to do, or after
//! [`SLEEPS_MAX`] sleeps. What it has found by itself until then it is not told: its `used_event` says so.

use std::time::Duration;

/// How long the device sleeps at most while there is something that the driver was not told: longer than an answer takes, on
/// an emulated machine as well.
pub(crate) const REST: Duration = Duration::from_millis(10);
/// Sleeps after which the driver is told in any case.
const SLEEPS_MAX: u32 = 64;

/// What has happened since the driver was told.
#[derive(Debug, Default)]
pub(crate) struct Notice {
    /// Buffers of the chains that were taken: no fewer than descriptors, but for a table of them that takes one.
    buffers: usize,
    sleeps: u32,
    /// Something was given back, on either queue, since the last sleep.
    moved: bool,
}

impl Notice {
    /// A chain of so many buffers was taken.
    pub(crate) fn took(&mut self, buffers: usize) {
        self.buffers += buffers.max(1);
    }

    /// The driver was shown something.
    pub(crate) fn moved(&mut self) {
        self.moved = true;
    }

    /// Whether so much was taken that the driver may want it back, on a queue of `size` descriptors.
    pub(crate) fn is_much(&self, size: u16) -> bool {
        self.buffers >= usize::from(size.div_ceil(2))
    }

    /// The device is about to sleep. Returns whether the driver is to be told before.
    pub(crate) fn sleep(&mut self) -> bool {
        self.sleeps += 1;
        let idle = !std::mem::take(&mut self.moved);
        idle || self.sleeps >= SLEEPS_MAX
    }

    /// The driver was told, or did not want to hear of it.
    pub(crate) fn told(&mut self) {
        (self.buffers, self.sleeps) = (0, 0);
    }
}
