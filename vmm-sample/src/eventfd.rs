//! KVM's crates have an eventfd type of their own that lends nobody its descriptor; the channel wants descriptors.

#![allow(unsafe_code)] // a descriptor number is borrowed

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use vmm_sys_util::eventfd::EventFd;

/// Another descriptor of the same eventfd.
///
/// # Errors
/// There is no descriptor to be had.
pub fn duplicate(event: &EventFd) -> io::Result<OwnedFd> {
    // SAFETY: `event` owns this descriptor and is borrowed for longer than the number is used.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    fd.try_clone_to_owned()
}
