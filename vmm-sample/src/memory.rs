//! Guest memory: mapped in this process, and registered with KVM.

#![allow(unsafe_code)] // maps memory on large pages, and gives KVM raw addresses of mappings that live as long as the VM

use anyhow::{Context, ensure};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use libc::{MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vm_memory::{GuestRegionMmap, MmapRegion};

use crate::layout::{GAP_END, GAP_START};

/// No distribution's kernel boots with less.
pub const MIN_BYTES: u64 = 64 << 20;
const MAX_BYTES: u64 = 1 << 40;
const HUGE: usize = 2 << 20;
/// The first memory slot of KVM for a register window. The slots below are RAM.
const FIRST_WINDOW: u32 = 2;

/// Guest addresses and lengths of `bytes` of RAM.
pub fn ranges(bytes: u64) -> Vec<(GuestAddress, usize)> {
    let low = bytes.min(GAP_START);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if bytes > low {
        ranges.push((GuestAddress(GAP_END), (bytes - low) as usize));
    }
    ranges
}

/// Checks that a guest can have so many bytes.
///
/// # Errors
/// It cannot.
pub fn check(bytes: u64) -> anyhow::Result<()> {
    let (least, most) = (MIN_BYTES >> 20, MAX_BYTES >> 20);
    let fits = (MIN_BYTES..=MAX_BYTES).contains(&bytes) && bytes.is_multiple_of(4096);
    ensure!(fits, "--memory is {least} to {most} MiB in whole pages");
    Ok(())
}

/// Maps guest memory. The host allocates a page when the guest first touches it.
pub fn allocate(bytes: u64) -> anyhow::Result<GuestMemoryMmap> {
    check(bytes)?;
    let regions: anyhow::Result<_> = ranges(bytes).into_iter().map(region).collect();
    let regions = regions.context("not enough memory on this host: give the guest less (--memory)");
    Ok(GuestMemoryMmap::from_regions(regions?)?)
}

/// Maps a region on a boundary of 2 MiB, so that KVM can map large pages: that saves 15,000 page faults in a boot.
fn region((start, len): (GuestAddress, usize)) -> anyhow::Result<GuestRegionMmap> {
    let (may, how) = (
        PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
    );
    // SAFETY: a new mapping at an address that the kernel chooses.
    let room = unsafe { libc::mmap(std::ptr::null_mut(), len + HUGE, may, how, -1, 0) };
    ensure!(room != MAP_FAILED, std::io::Error::last_os_error());
    let at = room.wrapping_byte_add(room.cast::<u8>().align_offset(HUGE));
    // SAFETY: these `len` bytes are inside that mapping, which stays until the process ends.
    let mapping = unsafe { MmapRegion::build_raw(at.cast(), len, may, how) }?;
    GuestRegionMmap::new(mapping, start).context("the memory exceeds the address space")
}

/// Tells KVM where the guest's memory is in this process.
///
/// `memory` must live as long as `vm`: `Machine` holds both, in that order.
pub fn register(vm: &VmFd, memory: &GuestMemoryMmap) -> anyhow::Result<()> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let (start, len) = (region.start_addr(), region.len());
        let host = memory.get_host_address(start)?;
        give(vm, slot, start.0, (host as u64, len), 0)?;
    }
    Ok(())
}

/// Maps a page of registers into the guest, read-only: a read costs no exit, a write exits. `n` is the number of the window.
///
/// `page` must live as long as `vm`.
pub fn register_window(vm: &VmFd, n: u32, at: u64, page: &MmapRegion) -> anyhow::Result<()> {
    let host = (page.as_ptr() as u64, page.size() as u64);
    give(vm, FIRST_WINDOW + n, at, host, KVM_MEM_READONLY)
}

/// `host`: address and length of a mapping that lives as long as `vm`.
fn give(vm: &VmFd, slot: u32, at: u64, host: (u64, u64), flags: u32) -> anyhow::Result<()> {
    let region = kvm_userspace_memory_region {
        slot,
        guest_phys_addr: at,
        userspace_addr: host.0,
        memory_size: host.1,
        flags,
    };
    // SAFETY: address and length are those of one whole mapping, which the callers of our callers keep for as long as the VM
    // exists. Mappings do not overlap, and every slot has its own number.
    unsafe { vm.set_user_memory_region(region) }.context("KVM does not accept the guest's memory")
}
