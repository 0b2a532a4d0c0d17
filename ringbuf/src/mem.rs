//! Shared memory, as the ring needs it: words that are fetched once, and bytes that are copied. The only file that
//! touches mapped memory.
//!
//! Soundness: the other side may write any byte at any time, so no reference to the bytes is ever made. Words are
//! accessed as atomics; bytes are copied by `copy_nonoverlapping` between the mapping and a private buffer, as vm-memory
//! and every VMM does. That copy races with the peer's stores, which Rust's memory model does not describe for another
//! process; what it can bring is any bytes at all, and a record's bytes are that by nature. Every access is
//! bounds-checked against the mapping, which lives as long as the value.
#![allow(unsafe_code)] // this file is what the others need none for

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering, fence};

/// Memory that both sides have. Loads and stores only: a peer's mapping may be read-only, and a locked instruction on
/// memory that another partition can unmap is a hazard of its own.
///
/// Offsets are the ring's own, checked when it was made; an implementation may panic on one that is outside.
pub trait RingMem {
    /// Bytes.
    fn len(&self) -> usize;
    /// Tells whether there is nothing.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Loads a word, exactly once, with Acquire.
    fn load(&self, at: usize) -> u64;
    /// Stores a word with Release.
    fn store(&self, at: usize, word: u64);
    /// Stores a word that a later Release store will show.
    fn store_relaxed(&self, at: usize, word: u64);
    /// Orders a store before it against a load behind it, on both sides (SeqCst).
    fn fence(&self);
    /// Copies in.
    fn write(&self, at: usize, bytes: &[u8]);
    /// Writes zeroes.
    fn zero(&self, at: usize, len: usize);
    /// Copies out.
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

/// A mapping that somebody keeps: all that a guest without an operating system has. Elsewhere [`Mapped`] keeps it.
#[derive(Clone, Copy, Debug)]
pub struct Raw {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the pointer is to a mapping, which belongs to no thread; accesses are atomic, or copies as the head of this
// file says.
unsafe impl Send for Raw {}
// SAFETY: as above.
unsafe impl Sync for Raw {}

impl Raw {
    /// Memory at an address.
    ///
    /// # Safety
    /// `len` bytes from `base` on, which is the beginning of a page, are mapped readable and writable for as long as this
    /// value and its copies are used, no touch of them is a fault, and nobody in this program makes references to them.
    pub const unsafe fn new(base: NonNull<u8>, len: usize) -> Self {
        Self { base, len }
    }

    #[inline]
    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at < self.len & !7);
        // SAFETY: inside of the mapping and aligned, for mappings begin at a page; shared words are accessed as
        // atomics only.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(at).cast()) }
    }

    /// The bytes from an offset on, which must be inside.
    #[inline]
    fn bytes(&self, at: usize, len: usize) -> *mut u8 {
        assert!(at <= self.len && self.len - at >= len);
        // SAFETY: inside of the mapping, or at its end for no bytes.
        unsafe { self.base.as_ptr().add(at) }
    }
}

/// Copies bytes in or out: the one place. The C library's copy stores whole lines at once where the processor can,
/// which no loop that is compiled for every processor does; across cores that is worth more than its call.
///
/// # Safety
/// Both ends hold `len` bytes, and do not overlap.
#[inline]
unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: as the caller says.
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
        // SAFETY: both ends hold that many bytes; a private buffer never overlaps a shared mapping.
        unsafe { copy(bytes.as_ptr(), to, bytes.len()) };
    }
    #[inline]
    fn zero(&self, at: usize, len: usize) {
        let to = self.bytes(at, len);
        // SAFETY: the mapping holds that many bytes from there on.
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

    /// A mapping: of this process alone, of a memfd that another process maps too, of guest memory, or anybody's.
    #[derive(Clone)]
    pub struct Mapped {
        raw: Raw,
        /// Keeps the mapping.
        _owner: Arc<dyn Any + Send + Sync>,
    }

    impl fmt::Debug for Mapped {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "Mapped({} bytes)", self.raw.len)
        }
    }

    /// A descriptor is no memory for a ring: the fault of whoever passed it.
    #[derive(Debug, thiserror::Error)]
    pub enum MemfdError {
        /// It cannot be examined, made or mapped.
        #[error("memory cannot be used")]
        Io(#[from] std::io::Error),
        /// It could shrink under us: a touch would be SIGBUS.
        #[error("memory is not a memfd sealed against shrinking and growing")]
        NotSealed,
        /// It has huge pages, of which a part cannot be unmapped.
        #[error(
            "memory has huge pages of {page} bytes, and {wanted} bytes are no whole number of them"
        )]
        HugePages {
            /// Bytes of a page.
            page: u64,
            /// What was said.
            wanted: u64,
        },
        /// It is shorter than was said.
        #[error("memory has {bytes} bytes, {wanted} were said")]
        Short {
            /// What there is.
            bytes: u64,
            /// What there should be.
            wanted: u64,
        },
        /// Guest memory does not have it in one piece.
        #[error("guest memory at {at:#x} has no {bytes} bytes in one region, from a page on")]
        NotMapped {
            /// Guest-physical address.
            at: u64,
            /// How much was wanted.
            bytes: usize,
        },
    }

    const SEALS: SealFlag = SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW);

    fn failed(e: impl std::error::Error + Send + Sync + 'static) -> MemfdError {
        MemfdError::Io(std::io::Error::other(e))
    }

    impl Mapped {
        /// Zeroed memory of this process.
        ///
        /// # Errors
        /// There is none to be had.
        pub fn anonymous(bytes: usize) -> Result<Self, MemfdError> {
            Ok(MmapRegion::<()>::new(bytes).map_err(failed)?.into())
        }

        /// Zeroed memory that can be passed on: a memfd, sealed to its size.
        ///
        /// # Errors
        /// There is none to be had.
        pub fn memfd(bytes: usize) -> Result<(Self, OwnedFd), MemfdError> {
            let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
            let io = |e: nix::errno::Errno| MemfdError::Io(e.into());
            let file = File::from(memfd_create(c"adit-ring", flags).map_err(io)?);
            file.set_len(bytes as u64)?;
            fcntl(&file, FcntlArg::F_ADD_SEALS(SEALS | SealFlag::F_SEAL_SEAL)).map_err(io)?;
            let fd = OwnedFd::from(file.try_clone()?);
            Ok((Self::map(file, bytes)?, fd))
        }

        /// Maps what another process passed.
        ///
        /// # Errors
        /// It is not sealed, too short, or cannot be mapped.
        pub fn from_memfd(fd: OwnedFd, bytes: usize) -> Result<Self, MemfdError> {
            Self::map(sealed(fd, bytes)?, bytes)
        }

        fn map(file: File, bytes: usize) -> Result<Self, MemfdError> {
            // Reserved (no MAP_NORESERVE): huge pages that are not to be had are said so here, and not by a SIGBUS.
            let prot = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE).bits();
            let flags = MapFlags::MAP_SHARED.bits();
            let file = Some(FileOffset::new(file, 0));
            let region = MmapRegion::<()>::build(file, bytes, prot, flags);
            Ok(region.map_err(failed)?.into())
        }

        /// Maps what another process passed, or this one keeps, with each of its `rings` (offset, size; in order, each
        /// begins where the one before ends) twice in a row, so that a record can go on over the end of its ring
        /// ([`crate::Geometry::wraps`]). What is before the first ring is mapped once.
        ///
        /// # Errors
        /// It is not sealed or too short, a ring is no whole number of pages, or there is no room for the mappings.
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
            // SAFETY: the reservation is mapped for as long as it lives, all of it, readable and writable.
            Ok(unsafe { Self::from_raw(base, total, Arc::new(reservation)) })
        }

        /// Where it begins in this process: for a VMM, which tells its kernel.
        pub fn address(&self) -> usize {
            self.raw.base.as_ptr().expose_provenance()
        }

        /// A part of guest memory, for a VMM. What the ring writes there is not marked in a dirty bitmap: a region that
        /// is shared with the host is made anew after a migration, and never moved.
        ///
        /// # Errors
        /// No single region of guest memory has it all, or it does not begin at a page.
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
            // SAFETY: the region maps `rest` bytes from there on, and the clone keeps it.
            Ok(unsafe { Self::from_raw(base, bytes, Arc::new(memory.clone())) })
        }

        /// Any mapping of anybody's.
        ///
        /// # Safety
        /// `len` bytes from `base` on, which is the beginning of a page, are mapped readable and writable for as long
        /// as `owner` lives, no touch of them is SIGBUS, and nobody in this process makes references to them.
        pub unsafe fn from_raw(
            base: NonNull<u8>,
            len: usize,
            owner: Arc<dyn Any + Send + Sync>,
        ) -> Self {
            // SAFETY: as the caller says, for as long as `owner` is kept beside it.
            let raw = unsafe { Raw::new(base, len) };
            Self { raw, _owner: owner }
        }
    }

    /// A memfd that cannot shrink, of at least so many bytes.
    fn sealed(fd: OwnedFd, bytes: usize) -> Result<File, MemfdError> {
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS).map_err(|_| MemfdError::NotSealed)?;
        if !SealFlag::from_bits_truncate(seals).contains(SEALS) {
            return Err(MemfdError::NotSealed);
        }
        // Only memory has seals, so that none of what is asked here waits for anybody's file system.
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

    /// Addresses that nobody else uses, to map files over.
    struct Reservation {
        base: NonNull<std::ffi::c_void>,
        len: usize,
    }

    // SAFETY: addresses belong to no thread.
    unsafe impl Send for Reservation {}
    // SAFETY: as above; it has no methods that change anything but `map`, which is called before it is shared.
    unsafe impl Sync for Reservation {}

    impl Reservation {
        fn new(len: usize) -> Result<Self, MemfdError> {
            let bytes = NonZeroUsize::new(len).ok_or_else(|| failed(nix::errno::Errno::EINVAL))?;
            let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
            // SAFETY: a new mapping at an address of the kernel's choice touches nothing that is there.
            let base = unsafe { mmap_anonymous(None, bytes, ProtFlags::PROT_NONE, flags) };
            let base = base.map_err(failed)?;
            Ok(Self { base, len })
        }

        /// Maps bytes of a file over some of it.
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
            // SAFETY: what it replaces is a part of this reservation, which nobody uses yet.
            let mapped = unsafe { mmap(address, bytes, prot, flags, file.as_fd(), offset) };
            mapped.map(drop).map_err(failed)
        }
    }

    impl Drop for Reservation {
        fn drop(&mut self) {
            // SAFETY: the mapping is this value's own, and whatever used it is gone.
            let unmapped = unsafe { munmap(self.base, self.len) };
            debug_assert!(unmapped.is_ok(), "the range was mapped by us");
        }
    }

    impl<B: Bitmap + Send + Sync + 'static> From<MmapRegion<B>> for Mapped {
        fn from(region: MmapRegion<B>) -> Self {
            let len = region.size();
            let base = NonNull::new(region.as_ptr()).unwrap_or(NonNull::dangling());
            // SAFETY: the region maps as much for as long as it lives; it has no other owner.
            unsafe { Self::from_raw(base, len, Arc::new(region)) }
        }
    }

    /// One slice, or none.
    struct Piece<'a>(Option<VolatileSlice<'a>>);

    impl<'a> Iterator for Piece<'a> {
        type Item = Result<VolatileSlice<'a>, vm_memory::GuestMemoryError>;
        fn next(&mut self) -> Option<Self::Item> {
            self.0.take().map(Ok)
        }
    }

    impl std::iter::FusedIterator for Piece<'_> {}
    impl<'a> GuestMemorySliceIterator<'a, ()> for Piece<'a> {}

    /// Addresses are offsets: so whatever moves payload between guest memory and descriptors moves it here as well.
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
            // SAFETY: the mapping holds that many bytes from there on, lives as long as `self`, and has no other users
            // than atomics and copies.
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
