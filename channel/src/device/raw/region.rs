//! One region of raw guest memory, and its dirty log.
#![allow(unsafe_code)] // makes volatile slices from a VMM's pointers; every block has a SAFETY comment

use std::fmt;
use std::sync::Arc;

use vm_memory::bitmap::{BS, Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::{
    GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes, GuestUsize,
    MemoryRegionAddress, VolatileSlice,
};

/// Guest addresses and host pointers of regions are multiples of this.
pub const PAGE_BYTES: usize = 4096;

/// Reports that the device has written `len` bytes from `offset` on, both in bytes, `offset` from the beginning of the
/// region. It is called on the device's thread for every write, so it must be short, and it must not call the device.
pub type DirtyFn = dyn Fn(usize, usize) + Send + Sync;

/// A region of guest memory, described by the VMM that has mapped it.
#[derive(Clone)]
pub struct RawRegion {
    /// Where the guest sees it: a multiple of [`PAGE_BYTES`].
    pub guest_addr: u64,
    /// Length in bytes.
    pub len: usize,
    /// Where this process has mapped it: a multiple of [`PAGE_BYTES`].
    pub host: *mut u8,
    /// The region's dirty log, if there is one.
    pub dirty: Option<Arc<DirtyFn>>,
}

impl fmt::Debug for RawRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawRegion")
            .field("guest_addr", &format_args!("{:#x}", self.guest_addr))
            .field("len", &format_args!("{:#x}", self.len))
            .field("host", &self.host)
            .field("dirty", &self.dirty.is_some())
            .finish()
    }
}

/// A region that was checked. Only `RawMemory::new` makes it.
pub struct Region {
    start: u64,
    len: usize,
    host: *mut u8,
    dirty: DirtyLog,
}

// SAFETY: `host` is used for volatile and atomic accesses only, which any thread may make, and the caller of
// `RawMemory::new` promises that the memory may be accessed from every thread. `DirtyFn` is Send and Sync.
unsafe impl Send for Region {}
// SAFETY: as above; no method changes the value.
unsafe impl Sync for Region {}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self.start + self.len as u64;
        write!(f, "{:#x}..{end:#x} at {:?}", self.start, self.host)
    }
}

impl Region {
    /// # Safety
    /// `raw` was checked (neither address plus length wraps), and the contract of `RawMemory::new` holds for it.
    pub(super) unsafe fn new(raw: RawRegion) -> Self {
        Self {
            start: raw.guest_addr,
            len: raw.len,
            host: raw.host,
            dirty: DirtyLog(raw.dirty),
        }
    }

    /// First guest address.
    pub(super) fn start(&self) -> u64 {
        self.start
    }

    /// Offset of a guest address, if it is in this region.
    #[inline]
    pub(super) fn offset(&self, addr: GuestAddress) -> Option<usize> {
        let offset = usize::try_from(addr.0.checked_sub(self.start)?).ok()?;
        (offset < self.len).then_some(offset)
    }
}

impl GuestMemoryRegion for Region {
    type B = DirtyLog;

    fn len(&self) -> GuestUsize {
        self.len as u64
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.start)
    }

    fn bitmap(&self) -> DirtySlice<'_> {
        self.dirty.slice_at(0)
    }

    #[inline]
    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, DirtyLog>>, GuestMemoryError> {
        let outside = GuestMemoryError::InvalidBackendAddress;
        let Ok(offset) = usize::try_from(offset.0) else {
            return Err(outside);
        };
        if offset.checked_add(count).is_none_or(|end| end > self.len) {
            return Err(outside);
        }
        // SAFETY: the caller of `RawMemory::new` promises that `host` has `len` mapped bytes, of which `offset + count`
        // are used here, as long as the `RawMemory` lives that this slice borrows. No Rust reference points there.
        Ok(unsafe {
            VolatileSlice::with_bitmap(
                self.host.add(offset),
                count,
                self.dirty.slice_at(offset),
                None,
            )
        })
    }
}

impl GuestMemoryRegionBytes for Region {}

/// The dirty log of a region, as `vm-memory` calls it.
#[derive(Clone)]
pub struct DirtyLog(Option<Arc<DirtyFn>>);

/// A part of a dirty log. It is made for each access, so it borrows and counts nothing.
#[derive(Clone, Copy)]
pub struct DirtySlice<'a> {
    log: Option<&'a DirtyFn>,
    offset: usize,
}

impl fmt::Debug for DirtySlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dirty log from {:#x} on", self.offset)
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyLog {
    type S = DirtySlice<'a>;
}

impl WithBitmapSlice<'_> for DirtySlice<'_> {
    type S = Self;
}

impl BitmapSlice for DirtySlice<'_> {}

impl Bitmap for DirtyLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.slice_at(0).mark_dirty(offset, len);
    }

    /// Always false: the log is the VMM's, and the device only writes to it.
    fn dirty_at(&self, _: usize) -> bool {
        false
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> DirtySlice<'_> {
        let log = self.0.as_deref();
        DirtySlice { log, offset }
    }
}

impl Bitmap for DirtySlice<'_> {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(log) = self.log
            && len > 0
        {
            // Offsets of a slice are within its region, so the sum is too.
            log(self.offset + offset, len);
        }
    }

    /// Always false: see [`DirtyLog`].
    fn dirty_at(&self, _: usize) -> bool {
        false
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> Self {
        let offset = self.offset + offset;
        Self { offset, ..*self }
    }
}
