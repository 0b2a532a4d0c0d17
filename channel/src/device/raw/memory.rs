//! Guest memory as a set of raw regions, checked, and how `vm-memory` finds its way in it.
#![allow(unsafe_code)] // the constructor that a VMM's pointers come through

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend, MemoryRegionAddress};

use super::error::RawMemoryError;
use super::region::{PAGE_BYTES, RawRegion, Region};

/// Maximum number of regions. KVM itself has a few hundred to some thousand memory slots.
pub const REGIONS_MAX: usize = 4096;

/// Guest memory that a VMM has mapped and described.
///
/// | rule | why |
/// |---|---|
/// | 1 to [`REGIONS_MAX`] regions, none empty | a list that is not meant is refused before the guest runs on it |
/// | no null pointer; guest address and host pointer at the beginning of a page | indices are read atomically |
/// | neither address plus length wraps | offsets are then computed without a check |
/// | no guest address in two regions | a buffer would have two contents |
///
/// Holes between regions are usual (the 32-bit hole of a PC). An access into one is refused, and so is a buffer that
/// reaches from a region into a hole. A buffer may span adjacent regions, wherever they are mapped. Two regions may
/// have the same host pages.
pub struct RawMemory {
    /// Sorted by guest address.
    regions: Vec<Region>,
    /// Dropped after the regions.
    _owner: Box<dyn Any + Send + Sync>,
}

impl RawMemory {
    /// Takes guest memory. `owner` is dropped when the memory is not used any more: the VMM's own reference to its
    /// mapping, or `()` if the mapping remains for as long as the process. The order of the regions does not matter.
    ///
    /// # Errors
    /// A rule of the [list](Self) is broken. `owner` is dropped.
    ///
    /// # Safety
    /// For every region, until `owner` is dropped:
    /// - `host` points to `len` bytes that are mapped in this process, readable and writable, and not protected (a slot
    ///   that is not plugged yet is no region). If a file is behind it, the file is not shortened.
    /// - Threads may access these bytes at any time, so no Rust reference points to any of them: the guest and the
    ///   device write there without a lock. Other code uses raw pointers or volatile slices.
    pub unsafe fn new(
        regions: Vec<RawRegion>,
        owner: impl Send + Sync + 'static,
    ) -> Result<Arc<Self>, RawMemoryError> {
        let regions = check(regions)?.into_iter().map(|raw| {
            // SAFETY: `check` has refused what wraps; the rest is this function's own contract.
            unsafe { Region::new(raw) }
        });
        Ok(Arc::new(Self {
            regions: regions.collect(),
            _owner: Box::new(owner),
        }))
    }

    /// Index of the first region after `addr`.
    #[inline]
    fn after(&self, addr: GuestAddress) -> usize {
        self.regions.partition_point(|r| r.start() <= addr.0)
    }
}

/// Checks the rules of the list and sorts it.
fn check(regions: Vec<RawRegion>) -> Result<Vec<RawRegion>, RawMemoryError> {
    if regions.is_empty() {
        return Err(RawMemoryError::Empty);
    }
    let count = regions.len();
    if count > REGIONS_MAX {
        return Err(RawMemoryError::TooMany { count });
    }
    for (index, region) in regions.iter().enumerate() {
        check_region(index, region)?;
    }
    let mut sorted: Vec<_> = regions.into_iter().enumerate().collect();
    sorted.sort_by_key(|(_, region)| region.guest_addr);
    for pair in sorted.windows(2) {
        let [(first, lower), (second, upper)] = pair else {
            continue;
        };
        // `check_region` has refused a sum that wraps.
        if lower.guest_addr + lower.len as u64 > upper.guest_addr {
            return Err(RawMemoryError::Overlap {
                first: *first,
                second: *second,
                at: upper.guest_addr,
            });
        }
    }
    Ok(sorted.into_iter().map(|(_, region)| region).collect())
}

fn check_region(index: usize, region: &RawRegion) -> Result<(), RawMemoryError> {
    let &RawRegion {
        guest_addr, len, ..
    } = region;
    let host = region.host.addr();
    if len == 0 {
        return Err(RawMemoryError::NoBytes { index, guest_addr });
    }
    if region.host.is_null() {
        return Err(RawMemoryError::Null { index, guest_addr });
    }
    if !guest_addr.is_multiple_of(PAGE_BYTES as u64) || !host.is_multiple_of(PAGE_BYTES) {
        return Err(RawMemoryError::Misaligned {
            index,
            guest_addr,
            host,
        });
    }
    // No mapping is larger than isize::MAX, and pointer arithmetic relies on that.
    let fits = isize::try_from(len).is_ok()
        && host.checked_add(len).is_some()
        && guest_addr.checked_add(len as u64).is_some();
    if !fits {
        return Err(RawMemoryError::Wraps {
            index,
            guest_addr,
            host,
            len,
        });
    }
    Ok(())
}

impl GuestMemoryBackend for RawMemory {
    type R = Region;

    fn num_regions(&self) -> usize {
        self.regions.len()
    }

    #[inline]
    fn find_region(&self, addr: GuestAddress) -> Option<&Region> {
        self.to_region_addr(addr).map(|(region, _)| region)
    }

    #[inline]
    fn to_region_addr(&self, addr: GuestAddress) -> Option<(&Region, MemoryRegionAddress)> {
        let region = self.regions.get(self.after(addr).checked_sub(1)?)?;
        let offset = region.offset(addr)?;
        Some((region, MemoryRegionAddress(offset as u64)))
    }

    fn iter(&self) -> impl Iterator<Item = &Region> {
        self.regions.iter()
    }
}

impl fmt::Debug for RawMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RawMemory").field(&self.regions).finish()
    }
}
