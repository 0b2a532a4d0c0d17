//! What another process passed, as a ring needs it: memory, and doorbells ([`adit_passed`] says how they are told apart, and
//! who closes what is neither).

use std::io;

use adit_passed::{Closer, Passed};
use adit_ringbuf::{Mapped, MemfdError};
use vmm_sys_util::eventfd::EventFd;

use crate::doorbell;

pub use adit_passed::PENDING_MAX;

/// Starts the thread that closes what may keep it waiting. A process that is going to have no more threads calls this
/// before; elsewhere the first such descriptor does.
pub fn prepare() {
    Closer::shared().prepare();
}

/// Takes it for a region's memory.
pub(crate) fn memory(fd: Passed, bytes: usize) -> Result<Mapped, MemfdError> {
    let fd = fd.memory().map_err(|_| MemfdError::NotSealed)?;
    Mapped::from_memfd(fd, bytes)
}

/// Takes it for a doorbell.
pub(crate) fn doorbell(fd: Passed) -> io::Result<EventFd> {
    Ok(doorbell::of_eventfd(fd.eventfd()?))
}
