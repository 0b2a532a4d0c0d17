//! The state of a process with its frontend, as bytes and descriptors. Another process can continue with the frontend
//! from it. This is needed because QEMU does not connect to a vsock backend a second time.
//!
//! ```text
//! bytes        u16 version (little-endian), then `Record` of that version in postcard
//! descriptors  the frontend's socket · one per memory region · vring 0: kick, call · vring 1: kick, call (if present)
//! ```
//! A build reads its own version and the previous one. Version 1 is the first. A change of [`Record`] is a new
//! version, and the golden bytes below stay. The process that keeps a handover passes it on unchanged. Nothing in it
//! is trusted: memory is checked and mapped, and vrings are checked, as if the frontend had just sent them.

use std::io;
use std::os::fd::OwnedFd;

use adit_passed::Passed;
use serde::{Deserialize, Serialize};
use vhost::vhost_user::message::VhostUserMemoryRegion;

use crate::live::COUNT_END;

/// Version that this build writes.
pub const VERSION: u16 = 1;
/// Maximum number of memory regions: the limit of crate `vhost`.
pub const REGIONS_MAX: usize = 32;
/// Maximum number of descriptors of a handover.
pub const DESCRIPTORS_MAX: usize = 1 + REGIONS_MAX + 4;
/// Maximum size of a handover's record in bytes.
pub const RECORD_MAX: usize = 4096;

/// The state of a frontend's connection, as one process passes it to another.
#[derive(Debug)]
pub struct Handover {
    /// Version and record.
    pub bytes: Vec<u8>,
    /// The descriptors, in the order above.
    pub fds: Vec<OwnedFd>,
}

/// Why a handover cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// This process has no free descriptors.
    #[error("cannot duplicate descriptors")]
    Io(#[from] io::Error),
    /// It was made by a newer build, or by one that is older than the previous version.
    #[error("the handover has version {found}, but this build reads only version {VERSION}")]
    Version {
        /// Its version.
        found: u16,
    },
    /// The bytes are not a record of this version.
    #[error("the handover record of {len} bytes is malformed")]
    Malformed {
        /// Length of the record in bytes.
        len: usize,
    },
    /// The record lists more or fewer descriptors than the handover has.
    #[error("the handover has {found} descriptors, but its record lists {expected}")]
    Descriptors {
        /// Number of descriptors in the handover.
        found: usize,
        /// Number of descriptors in the record.
        expected: usize,
    },
}

/// A memory region as the frontend described it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Region {
    pub(super) gpa: u64,
    /// Size in bytes.
    pub(super) size: u64,
    /// Address in the frontend's address space.
    pub(super) user: u64,
    /// Offset in its file, in bytes.
    pub(super) offset: u64,
}

impl Region {
    pub(super) fn as_message(&self) -> VhostUserMemoryRegion {
        VhostUserMemoryRegion::new(self.gpa, self.size, self.user, self.offset)
    }
}

/// A vring as the frontend described it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct VringRecord {
    pub(super) size: u16,
    /// Position in the available ring. While the vring runs, guest memory has the current value.
    pub(super) base: u16,
    /// How far the position was ahead of the used index when the vring was started.
    pub(super) lag: u16,
    /// Guest addresses of descriptor table, available ring and used ring.
    pub(super) addrs: Option<[u64; 3]>,
    pub(super) kick: bool,
    pub(super) call: bool,
    pub(super) enabled: bool,
}

/// Version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Number of changes that the frontend had made when the record was written.
    pub(super) changes: u64,
    pub(super) features: Option<u64>,
    pub(super) protocol_features: Option<u64>,
    pub(super) regions: Vec<Region>,
    pub(super) vrings: [VringRecord; 2],
    /// A session is running.
    pub(super) running: bool,
}

/// The descriptors of a vring.
#[derive(Debug, Default)]
pub(super) struct VringFds {
    pub(super) kick: Option<Passed>,
    pub(super) call: Option<Passed>,
}

/// A parsed handover. Its descriptors are not examined yet.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) record: Record,
    pub(super) frontend: Passed,
    pub(super) memory: Vec<Passed>,
    pub(super) vrings: [VringFds; 2],
}

impl Record {
    fn descriptors(&self) -> usize {
        let of_vring = |r: &VringRecord| usize::from(r.kick) + usize::from(r.call);
        1 + self.regions.len() + self.vrings.iter().map(of_vring).sum::<usize>()
    }
}

impl Handover {
    pub(super) fn new(record: &Record, fds: Vec<OwnedFd>) -> Result<Self, HandoverError> {
        let bytes = postcard::to_extend(record, VERSION.to_le_bytes().to_vec());
        let bytes = bytes.map_err(|_| HandoverError::Malformed { len: 0 })?;
        Ok(Self { bytes, fds })
    }

    pub(super) fn parse(self) -> Result<Parts, HandoverError> {
        // Convert first: whatever is refused below, its close cannot block this thread.
        let mut fds = self.fds.into_iter().map(Passed::from).collect::<Vec<_>>();
        let len = self.bytes.len();
        let malformed = HandoverError::Malformed { len };
        let Some((version, body)) = self.bytes.split_first_chunk::<2>() else {
            return Err(malformed);
        };
        let record: Record = match u16::from_le_bytes(*version) {
            1 if len <= RECORD_MAX => match postcard::take_from_bytes(body) {
                Ok((record, [])) => record,
                _ => return Err(malformed),
            },
            1 => return Err(malformed),
            found => return Err(HandoverError::Version { found }),
        };
        if record.regions.len() > REGIONS_MAX || record.changes >= COUNT_END {
            return Err(malformed);
        }
        let (found, expected) = (fds.len(), record.descriptors());
        let wrong = HandoverError::Descriptors { found, expected };
        if found != expected {
            return Err(wrong);
        }
        let mut fds = fds.drain(..);
        let Some(frontend) = fds.next() else {
            return Err(wrong);
        };
        let memory = fds.by_ref().take(record.regions.len()).collect();
        let mut vring = |r: &VringRecord| VringFds {
            kick: r.kick.then(|| fds.next()).flatten(),
            call: r.call.then(|| fds.next()).flatten(),
        };
        let [first, second] = &record.vrings;
        let vrings = [vring(first), vring(second)];
        Ok(Parts {
            record,
            frontend,
            memory,
            vrings,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn sample() -> Record {
        let vring = VringRecord {
            size: 128,
            base: 7,
            lag: 0,
            addrs: Some([0x1000, 0x2000, 0x3000]),
            kick: true,
            call: true,
            enabled: true,
        };
        Record {
            changes: 9,
            features: Some(1 << 32),
            protocol_features: None,
            regions: vec![Region {
                gpa: 0,
                size: 0x10000,
                user: 0x7000,
                offset: 0,
            }],
            vrings: [
                vring,
                VringRecord {
                    call: false,
                    ..vring
                },
            ],
            running: true,
        }
    }

    fn fds(n: usize) -> Vec<OwnedFd> {
        let open = || OwnedFd::from(File::open("/dev/null").unwrap());
        (0..n).map(|_| open()).collect()
    }

    #[test]
    fn version_1_has_golden_bytes() {
        let bytes = Handover::new(&sample(), fds(5)).unwrap().bytes;
        let vring = |call| {
            [
                &[128, 1, 7, 0, 1][..],
                &[128, 32, 128, 64, 128, 96],
                &[1, call, 1],
            ]
            .concat()
        };
        let want = [
            &[1, 0, 9, 1, 128, 128, 128, 128, 16, 0][..],
            &[1, 0, 128, 128, 4, 128, 224, 1, 0],
            &vring(1),
            &vring(0),
            &[1],
        ]
        .concat();
        assert_eq!(bytes, want);
        let parts = Handover {
            bytes: want,
            fds: fds(5),
        }
        .parse()
        .unwrap();
        assert_eq!(parts.record, sample());
        assert!(parts.vrings[0].call.is_some() && parts.vrings[1].call.is_none());
    }

    #[test]
    fn r35_cut_long_newer_and_miscounted_handovers_are_refused() {
        let good = Handover::new(&sample(), vec![]).unwrap().bytes;
        let parse = |bytes: &[u8], n| {
            let bytes = bytes.to_vec();
            Handover { bytes, fds: fds(n) }.parse()
        };
        for cut in 0..good.len() {
            assert!(parse(&good[..cut], 5).is_err(), "{cut}");
        }
        assert!(matches!(
            parse(&[&good[..], &[0]].concat(), 5),
            Err(HandoverError::Malformed { .. })
        ));
        let mut newer = good.clone();
        newer[0] = 2;
        assert!(matches!(
            parse(&newer, 5),
            Err(HandoverError::Version { found: 2 })
        ));
        for n in [0, 4, 6] {
            assert!(matches!(
                parse(&good, n),
                Err(HandoverError::Descriptors { expected: 5, .. })
            ));
        }
        let regions = vec![sample().regions[0]; REGIONS_MAX + 1];
        let many = Record {
            regions,
            ..sample()
        };
        let bytes = Handover::new(&many, vec![]).unwrap().bytes;
        assert!(matches!(
            parse(&bytes, many.descriptors()),
            Err(HandoverError::Malformed { .. })
        ));
        for changes in [COUNT_END, u64::MAX] {
            let counted = Record {
                changes,
                ..sample()
            };
            let bytes = Handover::new(&counted, vec![]).unwrap().bytes;
            assert!(matches!(
                parse(&bytes, 5),
                Err(HandoverError::Malformed { .. })
            ));
        }
    }
}
