//! Guest memory: made, given to KVM.

#![allow(unsafe_code)] // memory is mapped on large pages, and KVM is told raw addresses of what lives as long as the VM

use anyhow::{Context, ensure};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use libc::{MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vm_memory::{GuestRegionMmap, MmapRegion};

use crate::layout::{GAP_END, GAP_START};

/// Less than this boots no distribution's kernel.
pub const MIN_BYTES: u64 = 64 << 20;
const MAX_BYTES: u64 = 1 << 40;
const HUGE: usize = 2 << 20;
/// KVM's memory slots: RAM has those below.
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

/// Looks whether a guest can have so many bytes.
///
/// # Errors
/// It cannot.
pub fn check(bytes: u64) -> anyhow::Result<()> {
    let (least, most) = (MIN_BYTES >> 20, MAX_BYTES >> 20);
    let fits = (MIN_BYTES..=MAX_BYTES).contains(&bytes) && bytes.is_multiple_of(4096);
    ensure!(fits, "--memory is {least} to {most} MiB in whole pages");
    Ok(())
}

/// Makes guest memory; no page of it is there before the guest touches it.
pub fn allocate(bytes: u64) -> anyhow::Result<GuestMemoryMmap> {
    check(bytes)?;
    let regions: anyhow::Result<_> = ranges(bytes).into_iter().map(region).collect();
    let regions = regions.context("there is no room for so much memory: give it less (--memory)");
    Ok(GuestMemoryMmap::from_regions(regions?)?)
}

/// Pages of 2 MiB of the guest are pages of this process, so that KVM maps them whole: a boot has 15,000 faults less.
fn region((start, len): (GuestAddress, usize)) -> anyhow::Result<GuestRegionMmap> {
    let (may, how) = (
        PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
    );
    // SAFETY: a new mapping, wherever there is room.
    let room = unsafe { libc::mmap(std::ptr::null_mut(), len + HUGE, may, how, -1, 0) };
    ensure!(room != MAP_FAILED, std::io::Error::last_os_error());
    let at = room.wrapping_byte_add(room.cast::<u8>().align_offset(HUGE));
    // SAFETY: `len` bytes of that mapping, which stays for as long as the process.
    let mapping = unsafe { MmapRegion::build_raw(at.cast(), len, may, how) }?;
    GuestRegionMmap::new(mapping, start).context("memory ends behind the last address")
}

/// Tells KVM where the guest's memory lies in this process.
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

/// Shows a page of registers to the guest: it reads them there, and what it writes is an exit. `n`: which window.
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
    // SAFETY: address and length are those of one whole mapping, which the callers' callers keep for as long as the VM
    // exists; mappings do not overlap, and slots are numbered apart.
    unsafe { vm.set_user_memory_region(region) }.context("KVM does not take the guest's memory")
}
