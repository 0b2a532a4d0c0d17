//! Guest memory: made, given to KVM.

#![allow(unsafe_code)] // KVM is told raw addresses; the VM keeps the mapping for as long as KVM may use it

use anyhow::{Context, bail};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion};

use crate::layout::{GAP_END, GAP_START};

/// Less than this boots no distribution's kernel.
pub const MIN_BYTES: u64 = 64 << 20;
const MAX_BYTES: u64 = 1 << 40;
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
    if !(MIN_BYTES..=MAX_BYTES).contains(&bytes) || !bytes.is_multiple_of(4096) {
        bail!(
            "--memory is {} to {} MiB in whole pages",
            MIN_BYTES >> 20,
            MAX_BYTES >> 20
        );
    }
    Ok(())
}

/// Makes guest memory; no page of it is there before the guest touches it.
pub fn allocate(bytes: u64) -> anyhow::Result<GuestMemoryMmap> {
    check(bytes)?;
    GuestMemoryMmap::from_ranges(&ranges(bytes))
        .with_context(|| format!("no {} MiB for the guest", bytes >> 20))
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
