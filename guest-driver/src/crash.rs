//! Fault points: where a test ends the agent as a power cut or the OOM killer would, or fills its disk.
//!
//! With the feature `test-util`, `ADIT_TEST_CRASH_AT=NAME` makes the process send itself SIGKILL at that point, and
//! `ADIT_TEST_DISK_FULL_AT=NAME` makes the journal's write that leads to that point fail for want of space. Without the
//! feature, which no image has, this file is empty calls.

use std::io;

/// The points, in the order in which a task passes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// A task frame was decoded and its signature accepted.
    Received,
    /// The journal has it as received.
    Stored,
    /// The journal has it as started; nothing runs yet.
    Started,
    /// The child runs.
    Spawned,
    /// The child has ended; its result is only in memory.
    ChildDone,
    /// The journal has the result.
    ResultStored,
    /// The report is with the host.
    Sent,
    /// The host's acknowledgement was read and not yet journaled.
    Acked,
}

impl Point {
    /// The name by which a test asks for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Received => "received",
            Self::Stored => "stored",
            Self::Started => "started",
            Self::Spawned => "spawned",
            Self::ChildDone => "child-done",
            Self::ResultStored => "result-stored",
            Self::Sent => "sent",
            Self::Acked => "acked",
        }
    }
}

/// Kills this process here if a test asked for it.
#[cfg(feature = "test-util")]
pub fn at(point: Point) {
    if std::env::var_os("ADIT_TEST_CRASH_AT").is_some_and(|want| want == point.name()) {
        let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
    }
}

/// Fails as a full disk does if a test asked for it.
#[cfg(feature = "test-util")]
pub fn disk_full(point: Point) -> io::Result<()> {
    match std::env::var_os("ADIT_TEST_DISK_FULL_AT").is_some_and(|want| want == point.name()) {
        true => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        false => Ok(()),
    }
}

/// Does nothing in a build that goes into an image.
#[cfg(not(feature = "test-util"))]
#[inline(always)]
pub fn at(_: Point) {}

/// Does nothing in a build that goes into an image.
#[cfg(not(feature = "test-util"))]
#[inline(always)]
pub fn disk_full(_: Point) -> io::Result<()> {
    Ok(())
}
