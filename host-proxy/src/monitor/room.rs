//! Descriptors that the monitor leaves free of what it keeps for VMs: to start a worker, and for what passes through.
//!
//! The kernel gives the lowest number that is free, so the next one says how many are left.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::resource::{Resource, getrlimit};

/// A worker takes ten, and each answer that is under way up to three.
const SPARE: u64 = 24;

/// Whether there is room for what is kept as long as a VM.
///
/// # Errors
/// There is none.
pub fn for_a_vm() -> io::Result<()> {
    let (most, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let next = io::stderr().as_fd().try_clone_to_owned()?;
    let next = u64::try_from(next.as_raw_fd()).unwrap_or(0);
    match next + SPARE < most {
        true => Ok(()),
        false => Err(io::Error::from_raw_os_error(libc::EMFILE)),
    }
}
