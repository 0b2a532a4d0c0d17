//! Converts passed descriptors to the memory of a ring ([`doorbell`](crate::doorbell) has the other half). [`adit_passed`] explains how they are
//! recognised, and how everything else is closed.

use adit_passed::{Closer, Passed};
use adit_ringbuf::{Mapped, MemfdError};

pub use adit_passed::PENDING_MAX;

/// Starts the thread that closes descriptors whose close may block. A process that will not be able to create threads
/// later calls this first. In other processes the first such descriptor starts the thread.
pub fn prepare() {
    Closer::shared().prepare();
}

/// Converts a passed descriptor to the memory of a region.
pub(crate) fn memory(fd: Passed, bytes: usize) -> Result<Mapped, MemfdError> {
    let fd = fd.memory().map_err(|_| MemfdError::NotSealed)?;
    Mapped::from_memfd(fd, bytes)
}
