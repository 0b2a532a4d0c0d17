//! Memory for a device: one huge page with its virtqueues and buffers. Source: Linux
//! Documentation/admin-guide/mm/pagemap.rst.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use anyhow::{Context, ensure};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{AtomicAccess, Bytes, MmapRegion, VolatileMemory};

/// Size of a huge page, bytes.
pub const PAGE: usize = 2 << 20;

/// Memory with a known physical address.
pub struct Dma {
    region: MmapRegion,
    phys: u64,
}

impl Dma {
    /// One huge page: contiguous, and never moved.
    pub fn new() -> anyhow::Result<Self> {
        fs::write("/proc/sys/vm/nr_hugepages", "4").context("no huge pages")?;
        let flags =
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_POPULATE;
        let region = MmapRegionBuilder::new(PAGE)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags)
            .build()?;
        let page = region.as_ptr() as u64 / 4096;
        let mut entry = [0; 8];
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, page * 8)?;
        let frame = u64::from_le_bytes(entry) & ((1 << 55) - 1);
        ensure!(frame != 0, "page frame numbers are hidden");
        Ok(Self {
            region,
            phys: frame * 4096,
        })
    }

    /// The guest physical address of an offset.
    pub fn addr(&self, at: usize) -> u64 {
        self.phys + at as u64
    }

    /// Stores one aligned number.
    pub fn put<T: AtomicAccess>(&self, at: usize, value: T) {
        store(&self.region, at, value);
    }

    /// Loads one aligned number.
    pub fn get<T: AtomicAccess>(&self, at: usize) -> T {
        load(&self.region, at)
    }

    /// Copies bytes in.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        let done = self.region.as_volatile_slice().write_slice(bytes, at);
        done.expect("inside of the page");
    }

    /// Copies bytes out.
    pub fn read(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let done = self.region.as_volatile_slice().read_slice(&mut bytes, at);
        done.expect("inside of the page");
        bytes
    }
}

/// Stores one aligned number of a mapping.
pub fn store<T: AtomicAccess>(region: &MmapRegion, at: usize, value: T) {
    let done = region
        .as_volatile_slice()
        .store(value, at, Ordering::SeqCst);
    done.expect("aligned, and inside");
}

/// Loads one aligned number of a mapping.
pub fn load<T: AtomicAccess>(region: &MmapRegion, at: usize) -> T {
    let value = region.as_volatile_slice().load(at, Ordering::SeqCst);
    value.expect("aligned, and inside")
}
