//! Shared memory, as the ring needs it: words that are fetched once, and bytes that are copied. The only file that
//! touches mapped memory.
//!
//! Soundness: the other side may write any byte at any time, so no reference to the bytes is ever made. Words are
//! accessed as atomics; bytes are copied by `copy_nonoverlapping` between the mapping and a private buffer, as vm-memory
//! and every VMM does. That copy races with the peer's stores, which Rust's memory model does not describe for another
//! process; what it can bring is any bytes at all, and a record's bytes are that by nature. Every access is
//! bounds-checked against the mapping, which lives as long as the value.
// Only mapped memory needs it: without `std` there is none.
#![cfg_attr(feature = "std", allow(unsafe_code))]

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

#[cfg(feature = "std")]
pub use mapped::{Mapped, MemfdError};

#[cfg(feature = "std")]
mod mapped {
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering, fence};

    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use vm_memory::{FileOffset, MmapRegion};

    use super::RingMem;

    /// A mapping: of this process alone, of a memfd that another process maps too, or of guest memory.
    #[derive(Clone, Debug)]
    pub struct Mapped {
        base: *mut u8,
        len: usize,
        /// Keeps the mapping.
        _region: Arc<MmapRegion>,
    }

    // SAFETY: the pointer is to the mapping that `_region` keeps, which belongs to no thread; accesses are atomic, or
    // copies as the head of this file says.
    unsafe impl Send for Mapped {}
    // SAFETY: as above.
    unsafe impl Sync for Mapped {}

    /// A descriptor is no memory for a ring: the fault of whoever passed it.
    #[derive(Debug, thiserror::Error)]
    pub enum MemfdError {
        /// It cannot be examined, made or mapped.
        #[error("memory cannot be used")]
        Io(#[from] std::io::Error),
        /// It could shrink under us: a touch would be SIGBUS.
        #[error("memory is not a memfd sealed against shrinking and growing")]
        NotSealed,
        /// It is shorter than was said.
        #[error("memory has {bytes} bytes, {wanted} were said")]
        Short {
            /// What there is.
            bytes: u64,
            /// What there should be.
            wanted: u64,
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
            Ok(Arc::new(MmapRegion::new(bytes).map_err(failed)?).into())
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
            let seals = fcntl(&fd, FcntlArg::F_GET_SEALS).map_err(|_| MemfdError::NotSealed)?;
            if !SealFlag::from_bits_truncate(seals).contains(SEALS) {
                return Err(MemfdError::NotSealed);
            }
            let file = File::from(fd);
            let (there, wanted) = (file.metadata()?.len(), bytes as u64);
            if there < wanted {
                return Err(MemfdError::Short {
                    bytes: there,
                    wanted,
                });
            }
            Self::map(file, bytes)
        }

        fn map(file: File, bytes: usize) -> Result<Self, MemfdError> {
            let region = MmapRegion::from_file(FileOffset::new(file, 0), bytes).map_err(failed)?;
            Ok(Arc::new(region).into())
        }
    }

    impl From<Arc<MmapRegion>> for Mapped {
        /// A region of guest memory.
        fn from(region: Arc<MmapRegion>) -> Self {
            Self {
                base: region.as_ptr(),
                len: region.size(),
                _region: region,
            }
        }
    }

    impl Mapped {
        #[inline]
        fn word(&self, at: usize) -> &AtomicU64 {
            assert!(at.is_multiple_of(8) && at < self.len && self.len - at >= 8);
            // SAFETY: inside of the mapping and aligned, for mappings begin at a page; shared words are accessed as
            // atomics only.
            unsafe { AtomicU64::from_ptr(self.base.add(at).cast()) }
        }

        /// The bytes from an offset on, which must be inside.
        #[inline]
        fn bytes(&self, at: usize, len: usize) -> *mut u8 {
            assert!(at <= self.len && self.len - at >= len);
            // SAFETY: inside of the mapping, or at its end for no bytes.
            unsafe { self.base.add(at) }
        }
    }

    impl RingMem for Mapped {
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
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        }
        #[inline]
        fn zero(&self, at: usize, len: usize) {
            let to = self.bytes(at, len);
            // SAFETY: the mapping holds that many bytes from there on.
            unsafe { std::ptr::write_bytes(to, 0, len) };
        }
        #[inline]
        fn read(&self, at: usize, bytes: &mut [u8]) {
            let from = self.bytes(at, bytes.len());
            // SAFETY: as in `write`.
            unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
        }
    }
}
