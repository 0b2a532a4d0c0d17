//! The guest's random numbers: what the host sends is mixed into them.
//!
//! A guest that is restored from a snapshot goes on with the state of the one that was saved. Some VMMs tell its kernel so (a generation
//! id, Linux 5.18 and later); here it is so with every VMM and kernel, from the moment at which the agent is connected again.

use std::fs::OpenOptions;
use std::io::{self, Write};

use crate::sys;

/// Mixes these bytes in, and has the next numbers depend on them. Whoever knows them knows no more of the numbers than before.
///
/// # Errors
/// The agent may not, or the kernel has not enough of its own yet.
pub fn mix(bytes: &[u8]) -> io::Result<()> {
    let mut random = OpenOptions::new().write(true).open("/dev/urandom")?;
    random.write_all(bytes)?;
    sys::reseed(&random)
}
