//! Mappings of a PCI function's memory: its shared BAR, and a register that is written.
//!
//! `unsafe` is allowed here because a device's memory is known by an address only. Nothing else of `ring` touches it.
#![allow(unsafe_code)]

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use adit_ringbuf::Mapped;
use adit_ringbuf_io::doorbell::Doorbell;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use vfio_ioctls::VfioDevice;

/// A mapping of a device's memory; unmapped when dropped.
#[derive(Debug)]
struct Mapping {
    base: NonNull<std::ffi::c_void>,
    len: usize,
}

// SAFETY: addresses belong to no thread; nothing is accessed through the value itself.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Self> {
        let bytes = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let base = unsafe { mmap(None, bytes, prot, MapFlags::MAP_SHARED, fd, offset)? };
        Ok(Self { base, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and whatever used it held it.
        let unmapped = unsafe { munmap(self.base, self.len) };
        debug_assert!(unmapped.is_ok(), "it was mapped by us");
    }
}

/// Maps a BAR's memory, as a ring's.
///
/// # Errors
/// The kernel refuses: under lockdown, `PermissionDenied`.
pub fn memory(fd: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Mapped> {
    let mapping = Mapping::new(fd, offset, len)?;
    let base = mapping.base.cast();
    // SAFETY: `len` bytes are mapped from the page `base` on for as long as the mapping lives, a BAR does not shrink under
    // its function, and nobody makes references to it.
    Ok(unsafe { Mapped::from_raw(base, len, Arc::new(mapping)) })
}

/// A BAR of registers.
#[derive(Clone, Debug)]
pub struct Registers(Arc<Mapping>);

impl Registers {
    /// Maps one.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn map(fd: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Self> {
        Ok(Self(Arc::new(Mapping::new(fd, offset, len)?)))
    }

    /// A register of 32 bits.
    ///
    /// # Errors
    /// The BAR has no such register.
    pub fn word(&self, at: usize) -> io::Result<Word> {
        let inside = at.checked_add(4).is_some_and(|end| end <= self.0.len);
        if !at.is_multiple_of(4) || !inside {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Word {
            mapping: self.0.clone(),
            at,
        })
    }

    /// A register by which the host's doorbells are rung: one for each of `values`.
    ///
    /// # Errors
    /// The BAR has no such register.
    pub fn doorbells<const N: usize>(
        &self,
        at: usize,
        values: [u32; N],
    ) -> io::Result<[Register; N]> {
        let word = self.word(at)?;
        Ok(values.map(|value| Register {
            word: word.clone(),
            value,
        }))
    }
}

/// A register of 32 bits.
#[derive(Clone, Debug)]
pub struct Word {
    mapping: Arc<Mapping>,
    at: usize,
}

impl Word {
    fn bits(&self) -> &AtomicU32 {
        // SAFETY: the register is in the mapping and aligned, as was checked when this was made; an aligned access of 32
        // bits is one access of the bus.
        unsafe { AtomicU32::from_ptr(self.mapping.base.as_ptr().cast::<u8>().add(self.at).cast()) }
    }

    /// Reads it.
    pub fn load(&self) -> u32 {
        self.bits().load(Ordering::Relaxed)
    }

    /// Writes it.
    pub fn store(&self, value: u32) {
        self.bits().store(value, Ordering::Relaxed);
    }
}

/// A register of 32 bits that rings a doorbell of the host when this value is stored.
#[derive(Clone, Debug)]
pub struct Register {
    word: Word,
    value: u32,
}

impl Doorbell for Register {
    fn ring(&self) -> io::Result<()> {
        // What was stored to the ring before is visible to whoever gets the interrupt.
        fence(Ordering::SeqCst);
        self.word.store(self.value);
        Ok(())
    }
}

/// The descriptor of a vfio device.
pub fn descriptor(device: &VfioDevice) -> BorrowedFd<'_> {
    // SAFETY: the device keeps its descriptor open for as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) }
}
