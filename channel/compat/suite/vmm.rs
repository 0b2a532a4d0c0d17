//! The VMM: guest memory of its own version of `vm-memory`, with dirty bitmaps, and the raw regions that describe it.
//! Only `crate::Regions` differs between the versions.
#![allow(unsafe_code)] // promises to the device where guest memory is

use std::fs::File;
use std::sync::Arc;

use adit_channel::device::raw::{RawMemory, RawRegion};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use crate::Regions;

type Memory = vm_memory::GuestMemoryMmap<AtomicBitmap>;
type Region = GuestRegionMmap<AtomicBitmap>;

pub const PAGE: u64 = 4096;

/// The VMM's memory at one time. Plugging makes another value, as it does in VMMs.
pub struct Vmm {
    pub mem: Arc<Memory>,
}

fn region(file: &File, offset: u64, addr: u64, len: usize) -> Arc<Region> {
    let file = file.try_clone().expect("a descriptor");
    let offset = Some(FileOffset::new(file, offset));
    Arc::new(Region::from_range(GuestAddress(addr), len, offset).expect("a mapping"))
}

impl Vmm {
    /// Maps `len` bytes of `file` from `offset` on at guest address `addr`.
    pub fn new(file: &File, offset: u64, addr: u64, len: usize) -> Self {
        let regions = vec![region(file, offset, addr, len)];
        let mem = Arc::new(Memory::from_arc_regions(regions).expect("memory"));
        Self { mem }
    }

    /// This memory and another region.
    pub fn plugged(&self, file: &File, offset: u64, addr: u64, len: usize) -> Self {
        let region = region(file, offset, addr, len);
        let mem = Arc::new(self.mem.insert_region(region).expect("a free place"));
        Self { mem }
    }

    /// This memory without the region at `addr`.
    pub fn unplugged(&self, addr: u64, len: usize) -> Self {
        let left = self.mem.remove_region(GuestAddress(addr), len as u64);
        let (mem, _) = left.expect("a region");
        Self { mem: Arc::new(mem) }
    }

    /// Describes the regions. Each marks its dirty bytes in the bitmap of this version.
    pub fn regions(&self) -> Vec<RawRegion> {
        let describe = |region: &Region| {
            let (mem, start) = (self.mem.clone(), region.start_addr());
            let mark = move |offset, len| {
                let region = mem.find_region(start).expect("the region");
                MmapRegion::bitmap(region).mark_dirty(offset, len);
            };
            RawRegion {
                guest_addr: start.0,
                len: region.len() as usize,
                host: region.as_ptr(),
                dirty: Some(Arc::new(mark)),
            }
        };
        self.mem.iter().map(describe).collect()
    }

    /// The memory for the device.
    pub fn raw(&self) -> Arc<RawMemory> {
        // SAFETY: `mem`, which is the owner, keeps the regions mapped. The tests have no reference into them.
        unsafe { RawMemory::new(self.regions(), self.mem.clone()) }.expect("good regions")
    }

    /// As `raw`, with other regions than this memory has, which must be refused.
    pub fn refused(&self, regions: Vec<RawRegion>) -> String {
        // SAFETY: nothing is accessed through memory that was refused.
        match unsafe { RawMemory::new(regions, self.mem.clone()) } {
            Ok(mem) => panic!("not refused: {mem:?}"),
            Err(e) => format!("{e:?}"),
        }
    }

    /// Guest addresses of the dirty pages.
    pub fn dirty_pages(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        for region in self.mem.iter() {
            let bitmap = MmapRegion::bitmap(region);
            let offsets = (0..region.len()).step_by(PAGE as usize);
            let dirty = offsets.filter(|&offset| bitmap.is_addr_set(offset as usize));
            pages.extend(dirty.map(|offset| region.start_addr().0 + offset));
        }
        pages
    }

    /// Forgets which pages were dirty.
    pub fn clean(&self) {
        for region in self.mem.iter() {
            MmapRegion::bitmap(region).reset();
        }
    }
}
