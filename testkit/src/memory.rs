//! The harness's guest memory and its layout.
//!
//! | guest address | what |
//! |---|---|
//! | 0x1_0000 + q * 0x1_0000 | queue q: descriptors +0, available ring +0x8000, used ring +0xa000 |
//! | 0x10_0000 | indirect tables, 1 KiB (64 descriptors) for each head of the TX queue |
//! | 0x20_0000 | packet headers, 64 bytes for each head, RX then TX |
//! | 0x30_0000 | a page for events |
//! | 0x40_0000 | RX pages, 4 KiB for each head |
//! | 0x100_0000 | TX payload, 64 KiB for each head |

use std::fs::File;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice,
};

/// Guest memory of the type that `channel` needs.
pub type VmMemory = GuestMemoryMmap<()>;

/// Largest queue for which the layout has room.
pub const QUEUE_MAX: u16 = 256;
/// Bytes that the layout needs.
pub const MEMORY_BYTES: usize = 0x200_0000;
/// Most payload bytes of one TX packet.
pub const PAYLOAD_MAX: usize = 64 * 1024;
/// Bytes of the pages that RX buffers consist of.
pub const PAGE_BYTES: usize = 4096;
/// Most descriptors of one indirect table.
pub const INDIRECT_MAX: usize = 64;

/// Address of the page for buffers of the event queue.
pub const EVENTS: u64 = 0x30_0000;

/// Makes zeroed guest memory of this process.
///
/// # Panics
/// There is no memory.
pub fn anonymous() -> Arc<VmMemory> {
    let ranges = [(GuestAddress(0), MEMORY_BYTES)];
    Arc::new(VmMemory::from_ranges(&ranges).expect("guest memory"))
}

/// Makes guest memory in a memfd that cannot shrink, as QEMU does. The file is for a vhost-user backend.
///
/// # Panics
/// There is no memory.
pub fn memfd() -> (Arc<VmMemory>, File) {
    memfd_of(&[(0, MEMORY_BYTES)])
}

/// As [`memfd`], with these regions (guest address, bytes), which follow each other in the file.
///
/// # Panics
/// There is no memory.
pub fn memfd_of(regions: &[(u64, usize)]) -> (Arc<VmMemory>, File) {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(c"guest", flags).expect("memfd"));
    let mut size = 0;
    let ranges: Vec<_> = regions
        .iter()
        .map(|&(addr, len)| {
            let offset = FileOffset::new(file.try_clone().expect("descriptor"), size);
            size += len as u64;
            (GuestAddress(addr), len, Some(offset))
        })
        .collect();
    file.set_len(size).expect("memfd size");
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).expect("seals");
    let mem = VmMemory::from_ranges_with_files(ranges).expect("guest memory");
    (Arc::new(mem), file)
}

/// The region at guest address 0, where the queues are. A driver that searched for it at each access would spend more time on
/// the search than on the access.
///
/// # Panics
/// There is no memory.
pub fn first(mem: &VmMemory) -> VolatileSlice<'_> {
    let region = mem.iter().next().expect("a region");
    region.as_volatile_slice().expect("a mapping")
}

/// Addresses of the three parts of queue `index`: descriptors, available ring, used ring.
pub fn queue_addrs(index: u16) -> [u64; 3] {
    let base = 0x1_0000 * (1 + u64::from(index));
    [base, base + 0x8000, base + 0xa000]
}

/// Address of the indirect table of TX head `head`.
pub fn indirect_table(head: u16) -> u64 {
    0x10_0000 + 16 * INDIRECT_MAX as u64 * u64::from(head)
}

/// Address of the header of head `head` of queue `index`.
pub fn header(index: u16, head: u16) -> u64 {
    0x20_0000 + 64 * (u64::from(index) * u64::from(QUEUE_MAX) + u64::from(head))
}

/// Address of the RX page of head `head`.
pub fn rx_page(head: u16) -> u64 {
    0x40_0000 + PAGE_BYTES as u64 * u64::from(head)
}

/// Address of the TX payload of head `head`.
pub fn tx_payload(head: u16) -> u64 {
    0x100_0000 + PAYLOAD_MAX as u64 * u64::from(head)
}

const _: () = assert!(0x100_0000 + PAYLOAD_MAX * QUEUE_MAX as usize <= MEMORY_BYTES);
