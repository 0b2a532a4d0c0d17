//! Why raw regions are not guest memory: the fault of the VMM that describes them.

use super::memory::REGIONS_MAX;
use super::region::PAGE_BYTES;

/// Why regions were refused. `index` is the region's place in the list that was passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RawMemoryError {
    /// The list is empty.
    #[error("guest memory has no regions; pass at least the one that holds the queues")]
    Empty,
    /// The list is too long.
    #[error(
        "guest memory has {count} regions, at most {REGIONS_MAX} are supported; join adjacent ones"
    )]
    TooMany {
        /// Number of regions in the list.
        count: usize,
    },
    /// A region has no bytes.
    #[error("region {index} at guest address {guest_addr:#x} has no bytes; leave it out")]
    NoBytes {
        /// Place in the list.
        index: usize,
        /// Where the region begins in the guest.
        guest_addr: u64,
    },
    /// A host pointer is null.
    #[error(
        "region {index} at guest address {guest_addr:#x} has a null host pointer; map it first"
    )]
    Null {
        /// Place in the list.
        index: usize,
        /// Where the region begins in the guest.
        guest_addr: u64,
    },
    /// A guest address or a host pointer is not at the beginning of a page. The rings' indices are then not aligned
    /// for atomic accesses.
    #[error(
        "region {index}: guest address {guest_addr:#x} or host pointer {host:#x} is not a multiple of {PAGE_BYTES}; pass whole pages"
    )]
    Misaligned {
        /// Place in the list.
        index: usize,
        /// Where the region begins in the guest.
        guest_addr: u64,
        /// Where the region begins in this process.
        host: usize,
    },
    /// A region's end is beyond the last address of the guest or of this process.
    #[error(
        "region {index}: {len:#x} bytes do not fit at guest address {guest_addr:#x} and host pointer {host:#x}: an address wraps"
    )]
    Wraps {
        /// Place in the list.
        index: usize,
        /// Where the region begins in the guest.
        guest_addr: u64,
        /// Where the region begins in this process.
        host: usize,
        /// Length in bytes.
        len: usize,
    },
    /// Two regions have the same guest addresses.
    #[error(
        "regions {first} and {second} overlap at guest address {at:#x}; a guest address has one place"
    )]
    Overlap {
        /// Place in the list of the region with the lower guest address.
        first: usize,
        /// Place in the list of the other.
        second: usize,
        /// The first guest address that both have.
        at: u64,
    },
}
