//! Which descriptors are the tunnels', and how many streams that makes.
//!
//! Descriptors are divided by number, since the kernel always uses the lowest that is free: those below [`Shares::ceiling`] are
//! for tunnels, those above for the agent's own stream, its journal and its tasks.

use std::fmt::Display;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use adit_channel::refusal::Refusal;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

/// Most streams at a time; more are refused as busy. There are fewer where the limit of descriptors is too low for so many.
pub const CONNS_MAX: usize = 512;
/// Descriptors that are no tunnel's: a task needs some 16, the agent and its ring as many.
const RESERVED: u64 = 64;
/// Descriptors of a tunnel: the host's stream, the local one.
const TUNNEL: u64 = 2;

/// The tunnels' share of this process's descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// Most streams at a time.
    pub streams: usize,
    /// The first descriptor that is no tunnel's.
    ceiling: RawFd,
}

impl Shares {
    /// The share of so many descriptors. Where there are very few, tunnels have half of them.
    fn of(limit: u64) -> Self {
        let ceiling = limit - RESERVED.min(limit / 2);
        Self {
            streams: usize::try_from(ceiling / TUNNEL).map_or(CONNS_MAX, |n| n.min(CONNS_MAX)),
            ceiling: RawFd::try_from(ceiling).unwrap_or(RawFd::MAX),
        }
    }

    /// The share of what this process may have now.
    pub fn now() -> Self {
        let limit = getrlimit(Resource::RLIMIT_NOFILE);
        Self::of(limit.map_or(RLIM_INFINITY, |(soft, _)| soft))
    }

    /// Whether a descriptor is beyond it.
    pub fn exceeded_by(&self, fd: impl AsFd) -> bool {
        fd.as_fd().as_raw_fd() >= self.ceiling
    }
}

/// What a stream beyond the share is told.
pub fn busy(why: impl Display) -> Refusal {
    Refusal::busy(format!("the guest is busy: {why}"))
}

/// A descriptor that is closed when one is needed.
pub fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}
