//! Shared memory for the ring: words that are loaded once, and bytes that are copied. This is the only file that
//! touches mapped memory.
//!
//! Soundness: the other side may write any byte at any time, so this file never makes a reference to the bytes. Words
//! are accessed as atomics. Bytes are copied with `copy_nonoverlapping` between the mapping and a private buffer, as
//! vm-memory and every VMM do. That copy races with the peer's stores, and Rust's memory model does not describe races
//! with another process. The worst result is arbitrary bytes, and a record may hold arbitrary bytes anyway. Every
//! access is bounds-checked against the mapping, which lives as long as the value.
#![allow(unsafe_code)] // all unsafe access to shared memory is here, so that the other files need none

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering, fence};

/// Memory that both sides map. It has only loads and stores. A peer's mapping may be read-only, and a locked
/// instruction on memory that another partition can unmap is an additional hazard.
///
/// The ring passes its own offsets, which were checked when the ring was made. An implementation may panic on an
/// offset outside the memory.
pub trait RingMem {
    /// Size in bytes.
    fn len(&self) -> usize;
    /// Returns true if the memory has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Loads a word exactly once, with Acquire.
    fn load(&self, at: usize) -> u64;
    /// Stores a word with Release.
    fn store(&self, at: usize, word: u64);
    /// Stores a word that a later Release store will publish.
    fn store_relaxed(&self, at: usize, word: u64);
    /// Orders the stores before the fence against the loads after it (SeqCst). Both sides use it.
    fn fence(&self);
    /// Copies bytes into the memory.
    fn write(&self, at: usize, bytes: &[u8]);
    /// Writes zeroes.
    fn zero(&self, at: usize, len: usize);
    /// Copies bytes out of the memory.
    fn read(&self, at: usize, bytes: &mut [u8]);
}

impl<M: RingMem + ?Sized> RingMem for &M {
    fn len(&self) -> usize {
        (**self).len()
    }
    fn load(&self, at: usize) -> u64 {
        (**self).load(at)
    }
    fn store(&self, at: usize, word: u64) {
        (**self).store(at, word);
    }
    fn store_relaxed(&self, at: usize, word: u64) {
        (**self).store_relaxed(at, word);
    }
    fn fence(&self) {
        (**self).fence();
    }
    fn write(&self, at: usize, bytes: &[u8]) {
        (**self).write(at, bytes);
    }
    fn zero(&self, at: usize, len: usize) {
        (**self).zero(at, len);
    }
    fn read(&self, at: usize, bytes: &mut [u8]) {
        (**self).read(at, bytes);
    }
}

/// A mapping that other code keeps alive. A guest without an operating system has nothing else. Elsewhere use
/// [`Mapped`], which keeps the mapping alive.
#[derive(Clone, Copy, Debug)]
pub struct Raw {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the pointer refers to a mapping, which belongs to no thread. All accesses are atomic, or are copies as
// described at the top of this file.
unsafe impl Send for Raw {}
// SAFETY: as above.
unsafe impl Sync for Raw {}

impl Raw {
    /// Uses the memory at an address.
    ///
    /// # Safety
    /// `base` is the start of a page. The `len` bytes from `base` are mapped readable and writable while this value or
    /// any copy of it is used. No access to them faults. Nothing in this program makes references to them.
    pub const unsafe fn new(base: NonNull<u8>, len: usize) -> Self {
        Self { base, len }
    }

    #[inline]
    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at < self.len & !7);
        // SAFETY: the word is inside the mapping and aligned, because mappings start at a page. Shared words are only
        // accessed as atomics.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(at).cast()) }
    }

    /// Pointer to the bytes from an offset on. The range must be inside the mapping.
    #[inline]
    fn bytes(&self, at: usize, len: usize) -> *mut u8 {
        assert!(at <= self.len && self.len - at >= len);
        // SAFETY: the pointer is inside the mapping, or at its end if `len` is 0.
        unsafe { self.base.as_ptr().add(at) }
    }
}

/// The only function that copies bytes in or out. It uses the C library's copy, which stores whole cache lines at once
/// on processors that can do so. A loop compiled for every processor cannot. Across cores this gains more than the
/// call costs.
///
/// # Safety
/// `from` and `to` are valid for `len` bytes and do not overlap.
#[inline]
unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller guarantees it.
    unsafe { core::ptr::copy_nonoverlapping(from, to, len) };
}

impl RingMem for Raw {
    fn len(&self) -> usize {
        self.len
    }
    #[inline]
    fn load(&self, at: usize) -> u64 {
        u64::from_le(self.word(at).load(Ordering::Acquire))
    }
    #[inline]
    fn store(&self, at: usize, word: u64) {
        self.word(at).store(word.to_le(), Ordering::Release);
    }
    #[inline]
    fn store_relaxed(&self, at: usize, word: u64) {
        self.word(at).store(word.to_le(), Ordering::Relaxed);
    }
    #[inline]
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
    #[inline]
    fn write(&self, at: usize, bytes: &[u8]) {
        let to = self.bytes(at, bytes.len());
        // SAFETY: both ends have that many bytes, and a private buffer never overlaps a shared mapping.
        unsafe { copy(bytes.as_ptr(), to, bytes.len()) };
    }
    #[inline]
    fn zero(&self, at: usize, len: usize) {
        let to = self.bytes(at, len);
        // SAFETY: the mapping has that many bytes from this offset on.
        unsafe { core::ptr::write_bytes(to, 0, len) };
    }
    #[inline]
    fn read(&self, at: usize, bytes: &mut [u8]) {
        let from = self.bytes(at, bytes.len());
        // SAFETY: as in `write`.
        unsafe { copy(from, bytes.as_mut_ptr(), bytes.len()) };
    }
}

#[cfg(feature = "std")]
pub use mapped::{Mapped, MemfdError};

#[cfg(feature = "std")]
mod mapped {
    use std::any::Any;
    use std::fmt;
    use std::fs::File;
    use std::num::NonZeroUsize;
    use std::os::fd::{AsFd, OwnedFd};
    use std::ptr::NonNull;
    use std::sync::Arc;

    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
    use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
    use vm_memory::bitmap::Bitmap;
    use vm_memory::guest_memory::GuestMemorySliceIterator;
    use vm_memory::{
        FileOffset, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap,
        GuestMemoryRegion, MemoryRegionAddress, MmapRegion, Permissions, VolatileSlice,
    };

    use super::{Raw, RingMem};
    use crate::layout::PAGE;

    /// A mapping: private to this process, or of a memfd that another process also maps, or of guest memory, or of any
    /// other owner.
    #[derive(Clone)]
    pub struct Mapped {
        raw: Raw,
        /// Keeps the mapping alive.
        _owner: Arc<dyn Any + Send + Sync>,
    }

    impl fmt::Debug for Mapped {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "Mapped({} bytes)", self.raw.len)
        }
    }

    /// A descriptor cannot serve as memory for a ring: the fault of the process that passed it.
    #[derive(Debug, thiserror::Error)]
    pub enum MemfdError {
        /// The memory cannot be examined, created or mapped.
        #[error("memory cannot be used")]
        Io(#[from] std::io::Error),
        /// The memory could shrink while it is mapped; an access would then raise SIGBUS.
        #[error("memory is not a memfd sealed against shrinking and growing")]
        NotSealed,
        /// The memory has huge pages, and a part of a huge page cannot be unmapped.
        #[error(
            "memory has huge pages of {page} bytes, and {wanted} bytes are not a whole number of them"
        )]
        HugePages {
            /// Page size in bytes.
            page: u64,
            /// The size that was asked for, in bytes.
            wanted: u64,
        },
        /// The memory is shorter than announced.
        #[error("memory has {bytes} bytes, but {wanted} were announced")]
        Short {
            /// Actual size in bytes.
            bytes: u64,
            /// Announced size in bytes.
            wanted: u64,
        },
        /// Guest memory does not have the range in one piece.
        #[error(
            "guest memory does not have {bytes} bytes at {at:#x} in one region, starting at a page"
        )]
        NotMapped {
            /// Guest-physical address of the range.
            at: u64,
            /// Size of the range in bytes.
            bytes: usize,
        },
    }

    const SEALS: SealFlag = SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW);

    fn failed(e: impl std::error::Error + Send + Sync + 'static) -> MemfdError {
        MemfdError::Io(std::io::Error::other(e))
    }

    impl Mapped {
        /// Maps zeroed memory that is private to this process.
        ///
        /// # Errors
        /// The system has no memory left.
        pub fn anonymous(bytes: usize) -> Result<Self, MemfdError> {
            Ok(MmapRegion::<()>::new(bytes).map_err(failed)?.into())
        }

        /// Creates zeroed memory that can be passed to another process: a memfd, sealed to its size.
        ///
        /// # Errors
        /// The system has no memory or no descriptors left.
        pub fn memfd(bytes: usize) -> Result<(Self, OwnedFd), MemfdError> {
            let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
            let io = |e: nix::errno::Errno| MemfdError::Io(e.into());
            let file = File::from(memfd_create(c"adit-ring", flags).map_err(io)?);
            file.set_len(bytes as u64)?;
            fcntl(&file, FcntlArg::F_ADD_SEALS(SEALS | SealFlag::F_SEAL_SEAL)).map_err(io)?;
            let fd = OwnedFd::from(file.try_clone()?);
            Ok((Self::map(file, bytes)?, fd))
        }

        /// Maps a memfd that another process passed.
        ///
        /// # Errors
        /// It is not sealed, is too short, or cannot be mapped.
        pub fn from_memfd(fd: OwnedFd, bytes: usize) -> Result<Self, MemfdError> {
            Self::map(sealed(fd, bytes)?, bytes)
        }

        fn map(file: File, bytes: usize) -> Result<Self, MemfdError> {
            // Without MAP_NORESERVE the kernel reserves huge pages now. If there are too few, this call fails;
            // otherwise a later access would raise SIGBUS.
            let prot = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE).bits();
            let flags = MapFlags::MAP_SHARED.bits();
            let file = Some(FileOffset::new(file, 0));
            let region = MmapRegion::<()>::build(file, bytes, prot, flags);
            Ok(region.map_err(failed)?.into())
        }

        /// Maps a memfd with each of its `rings` twice in a row, so that a record can continue across the end of its
        /// ring ([`crate::Geometry::wraps`]). `rings` are (offset, size) in order, and each starts where the one
        /// before it ends. The bytes before the first ring are mapped once.
        ///
        /// # Errors
        /// The memfd is not sealed or too short, a ring is not a whole number of pages, or there is no room for the
        /// mappings.
        pub fn mirrored(
            fd: OwnedFd,
            bytes: usize,
            rings: impl IntoIterator<Item = (usize, usize)>,
        ) -> Result<Self, MemfdError> {
            let file = sealed(fd, bytes)?;
            let rings: Vec<_> = rings.into_iter().collect();
            let head = rings.first().map_or(bytes, |&(at, _)| at);
            let total = head + rings.iter().map(|&(_, size)| 2 * size).sum::<usize>();
            let reservation = Reservation::new(total)?;
            reservation.map(0, &file, 0, head)?;
            let mut to = head;
            for (at, size) in rings {
                if at.checked_add(size).is_none_or(|end| end > bytes) {
                    return Err(MemfdError::Short {
                        bytes: bytes as u64,
                        wanted: at.saturating_add(size) as u64,
                    });
                }
                for _ in 0..2 {
                    reservation.map(to, &file, at, size)?;
                    to += size;
                }
            }
            let base = reservation.base.cast();
            // SAFETY: the reservation stays mapped while it lives, over its whole length, readable and writable.
            Ok(unsafe { Self::from_raw(base, total, Arc::new(reservation)) })
        }

        /// Start address in this process. A VMM passes it to KVM.
        pub fn address(&self) -> usize {
            self.raw.base.as_ptr().expose_provenance()
        }

        /// Uses a part of guest memory; for a VMM. The ring's writes are not marked in a dirty bitmap. Therefore a
        /// region that is shared with the host is never migrated: it is created again after a migration.
        ///
        /// # Errors
        /// No single region of guest memory contains the range, or the range does not start at a page.
        pub fn guest_range<B: Bitmap + Send + Sync + 'static>(
            memory: &GuestMemoryMmap<B>,
            at: GuestAddress,
            bytes: usize,
        ) -> Result<Self, MemfdError> {
            let none = || MemfdError::NotMapped { at: at.0, bytes };
            let region = memory.find_region(at).ok_or_else(none)?;
            let offset = region.to_region_addr(at).ok_or_else(none)?;
            let rest = region.len() - offset.0;
            if rest < bytes as u64 || !at.0.is_multiple_of(PAGE as u64) {
                return Err(none());
            }
            let host = region.get_host_address(MemoryRegionAddress(offset.0));
            let base = NonNull::new(host.map_err(failed)?).ok_or_else(none)?;
            // SAFETY: the region maps `rest` bytes from there on, and the clone keeps the region alive.
            Ok(unsafe { Self::from_raw(base, bytes, Arc::new(memory.clone())) })
        }

        /// Uses any mapping that `owner` keeps alive.
        ///
        /// # Safety
        /// `base` is the start of a page. The `len` bytes from `base` are mapped readable and writable while `owner`
        /// lives. No access to them raises SIGBUS. Nothing in this program makes references to them.
        pub unsafe fn from_raw(
            base: NonNull<u8>,
            len: usize,
            owner: Arc<dyn Any + Send + Sync>,
        ) -> Self {
            // SAFETY: the caller guarantees it while `owner` lives, and `owner` is kept next to it.
            let raw = unsafe { Raw::new(base, len) };
            Self { raw, _owner: owner }
        }
    }

    /// Checks that a memfd cannot shrink and has at least `bytes` bytes.
    fn sealed(fd: OwnedFd, bytes: usize) -> Result<File, MemfdError> {
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS).map_err(|_| MemfdError::NotSealed)?;
        if !SealFlag::from_bits_truncate(seals).contains(SEALS) {
            return Err(MemfdError::NotSealed);
        }
        // Only memory has seals, so from here on no call can block on a file system.
        let pages = fstatfs(&fd).map_err(std::io::Error::from)?;
        let (page, wanted) = (pages.block_size(), bytes as u64);
        let page = u64::try_from(page).unwrap_or(u64::MAX).max(1);
        if pages.filesystem_type() == HUGETLBFS_MAGIC && !wanted.is_multiple_of(page) {
            return Err(MemfdError::HugePages { page, wanted });
        }
        let file = File::from(fd);
        let there = file.metadata()?.len();
        if there < wanted {
            return Err(MemfdError::Short {
                bytes: there,
                wanted,
            });
        }
        Ok(file)
    }

    /// An address range that is reserved for this value, so that files can be mapped over it.
    struct Reservation {
        base: NonNull<std::ffi::c_void>,
        len: usize,
    }

    // SAFETY: an address range belongs to no thread.
    unsafe impl Send for Reservation {}
    // SAFETY: as above. `map` is the only method that changes anything, and it is called before the value is shared.
    unsafe impl Sync for Reservation {}

    impl Reservation {
        fn new(len: usize) -> Result<Self, MemfdError> {
            let bytes = NonZeroUsize::new(len).ok_or_else(|| failed(nix::errno::Errno::EINVAL))?;
            let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
            // SAFETY: a new mapping at an address that the kernel chooses replaces no other mapping.
            let base = unsafe { mmap_anonymous(None, bytes, ProtFlags::PROT_NONE, flags) };
            let base = base.map_err(failed)?;
            Ok(Self { base, len })
        }

        /// Maps bytes of a file over a part of the reservation.
        fn map(&self, to: usize, file: &File, at: usize, len: usize) -> Result<(), MemfdError> {
            let Some(bytes) = NonZeroUsize::new(len) else {
                return Ok(());
            };
            let aligned = [to, at, len].iter().all(|n| n.is_multiple_of(PAGE));
            let inside = to.checked_add(len).is_some_and(|end| end <= self.len);
            if !aligned || !inside {
                return Err(failed(nix::errno::Errno::EINVAL));
            }
            let address = self.base.addr().checked_add(to);
            let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
            let offset = i64::try_from(at).map_err(failed)?;
            // SAFETY: this replaces a part of this reservation, which nothing uses yet.
            let mapped = unsafe { mmap(address, bytes, prot, flags, file.as_fd(), offset) };
            mapped.map(drop).map_err(failed)
        }
    }

    impl Drop for Reservation {
        fn drop(&mut self) {
            // SAFETY: this value owns the mapping, and every user of it is gone.
            let unmapped = unsafe { munmap(self.base, self.len) };
            debug_assert!(unmapped.is_ok(), "the range was mapped by us");
        }
    }

    impl<B: Bitmap + Send + Sync + 'static> From<MmapRegion<B>> for Mapped {
        fn from(region: MmapRegion<B>) -> Self {
            let len = region.size();
            let base = NonNull::new(region.as_ptr()).unwrap_or(NonNull::dangling());
            // SAFETY: the region maps `len` bytes while it lives, and it has no other owner.
            unsafe { Self::from_raw(base, len, Arc::new(region)) }
        }
    }

    /// An iterator over one slice or none.
    struct Piece<'a>(Option<VolatileSlice<'a>>);

    impl<'a> Iterator for Piece<'a> {
        type Item = Result<VolatileSlice<'a>, vm_memory::GuestMemoryError>;
        fn next(&mut self) -> Option<Self::Item> {
            self.0.take().map(Ok)
        }
    }

    impl std::iter::FusedIterator for Piece<'_> {}
    impl<'a> GuestMemorySliceIterator<'a, ()> for Piece<'a> {}

    /// Guest addresses are offsets into the mapping. So code that moves payload between guest memory and descriptors
    /// works with this memory too.
    impl GuestMemory for Mapped {
        type PhysicalMemory = GuestMemoryMmap;
        type Bitmap = ();

        fn check_range(&self, addr: GuestAddress, count: usize, _access: Permissions) -> bool {
            let end = addr.0.checked_add(count as u64);
            end.is_some_and(|end| end <= self.raw.len as u64)
        }

        fn get_slices<'a>(
            &'a self,
            addr: GuestAddress,
            count: usize,
            access: Permissions,
        ) -> Result<impl GuestMemorySliceIterator<'a, ()>, vm_memory::GuestMemoryError> {
            if !self.check_range(addr, count, access) {
                return Err(vm_memory::GuestMemoryError::InvalidGuestAddress(addr));
            }
            let base = self.raw.bytes(addr.0 as usize, count);
            // SAFETY: the mapping has that many bytes from there on and lives as long as `self`. All its users are
            // atomics and copies.
            let slice = unsafe { VolatileSlice::new(base, count) };
            Ok(Piece((count > 0).then_some(slice)))
        }
    }

    impl RingMem for Mapped {
        fn len(&self) -> usize {
            self.raw.len
        }
        #[inline]
        fn load(&self, at: usize) -> u64 {
            self.raw.load(at)
        }
        #[inline]
        fn store(&self, at: usize, word: u64) {
            self.raw.store(at, word);
        }
        #[inline]
        fn store_relaxed(&self, at: usize, word: u64) {
            self.raw.store_relaxed(at, word);
        }
        #[inline]
        fn fence(&self) {
            self.raw.fence();
        }
        #[inline]
        fn write(&self, at: usize, bytes: &[u8]) {
            self.raw.write(at, bytes);
        }
        #[inline]
        fn zero(&self, at: usize, len: usize) {
            self.raw.zero(at, len);
        }
        #[inline]
        fn read(&self, at: usize, bytes: &mut [u8]) {
            self.raw.read(at, bytes);
        }
    }
}
