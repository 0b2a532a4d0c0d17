#![allow(unsafe_code)] // the tests are the VMM that promises where its memory is

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

use super::*;
use crate::device::Signal;

const PAGE: usize = PAGE_BYTES;

/// Pages of this process, mapped by another type.
fn pages(count: usize) -> (Arc<GuestMemoryMmap>, *mut u8) {
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), count * PAGE)]).unwrap();
    let host = mem.get_host_address(GuestAddress(0)).unwrap();
    (Arc::new(mem), host)
}

fn region(guest_addr: u64, len: usize, host: *mut u8) -> RawRegion {
    RawRegion {
        guest_addr,
        len,
        host,
        dirty: None,
    }
}

/// The pages of `pages` at these guest addresses; `at` is the first page and their number.
fn mapped(parts: &[(u64, usize, usize)]) -> Arc<RawMemory> {
    let (owner, host) = pages(16);
    let part = |&(addr, at, n)| region(addr, n * PAGE, host.wrapping_add(at * PAGE));
    let regions = parts.iter().map(part).collect();
    // SAFETY: the pages are mapped until `owner` is dropped, and nothing else points to them.
    unsafe { RawMemory::new(regions, owner) }.unwrap()
}

#[track_caller]
fn refused(regions: Vec<RawRegion>) -> RawMemoryError {
    // SAFETY: refused, so nothing is ever accessed.
    unsafe { RawMemory::new(regions, ()) }.unwrap_err()
}

#[test]
fn a_list_that_cannot_be_meant_is_refused() {
    let (_owner, host) = pages(16);
    let good = |addr: u64| region(addr, PAGE, host);
    assert_eq!(refused(Vec::new()), RawMemoryError::Empty);
    let many = (0..=REGIONS_MAX).map(|i| good((i * PAGE) as u64)).collect();
    let count = REGIONS_MAX + 1;
    assert_eq!(refused(many), RawMemoryError::TooMany { count });
    let (index, guest_addr) = (1, 0x10_0000);
    let with = |bad| refused(vec![good(0), bad]);
    assert_eq!(
        with(region(guest_addr, 0, host)),
        RawMemoryError::NoBytes { index, guest_addr }
    );
    assert_eq!(
        with(region(guest_addr, PAGE, std::ptr::null_mut())),
        RawMemoryError::Null { index, guest_addr }
    );
}

#[test]
fn misaligned_pointers_and_addresses_are_refused() {
    let (_owner, host) = pages(16);
    for (addr, shift) in [
        (0, 1),
        (0, 2),
        (0, 8),
        (0, 2048),
        (1, 0),
        (0x800, 0),
        (4, 4),
    ] {
        let bad = region(addr, PAGE, host.wrapping_add(shift));
        let expected = RawMemoryError::Misaligned {
            index: 0,
            guest_addr: addr,
            host: host.addr() + shift,
        };
        assert_eq!(refused(vec![bad]), expected);
    }
}

#[test]
fn a_region_whose_end_wraps_is_refused() {
    let (_owner, host) = pages(16);
    let last = u64::MAX - (PAGE as u64 - 1);
    let high = std::ptr::without_provenance_mut(usize::MAX - (PAGE - 1));
    for (addr, len, host) in [
        (last, 2 * PAGE, host),
        // Its last byte is the last there is; one after it has no address.
        (last, PAGE, host),
        (0, PAGE, high),
        (0, 2 * PAGE, high),
        (0, usize::MAX, host),
        (0, isize::MAX as usize + 1, host),
    ] {
        let expected = RawMemoryError::Wraps {
            index: 0,
            guest_addr: addr,
            host: host.addr(),
            len,
        };
        assert_eq!(refused(vec![region(addr, len, host)]), expected);
    }
}

#[test]
fn overlaps_are_refused_in_any_order() {
    let (_owner, host) = pages(16);
    let (low, high) = (0x10_0000, 0x10_2000);
    for (addr, n, at) in [
        (low, 4, low),                // the same
        (low + 0x3000, 1, 0x10_3000), // the last page
        (high, 1, high),              // inside
        (low - 0x1000, 8, low),       // around
        (low - 0x1000, 2, low),       // the first page
    ] {
        let ours = region(low, 4 * PAGE, host);
        let other = region(addr, n * PAGE, host);
        for ours_first in [true, false] {
            let (list, ours_at, other_at) = match ours_first {
                true => (vec![ours.clone(), other.clone()], 0, 1),
                false => (vec![other.clone(), ours.clone()], 1, 0),
            };
            // Of two that begin at the same address, the first of the list is the first.
            let other_is_lower = addr < low || addr == low && !ours_first;
            let (first, second) = match other_is_lower {
                true => (other_at, ours_at),
                false => (ours_at, other_at),
            };
            let expected = RawMemoryError::Overlap { first, second, at };
            assert_eq!(refused(list), expected);
        }
    }
}

#[test]
fn an_access_may_cross_adjacent_regions_but_no_hole() {
    // In the guest: pages 0..2, 2..3 (mapped before the first), a hole, page 4.
    let mem = mapped(&[(0x4000, 9, 1), (0, 1, 2), (0x2000, 0, 1)]);
    assert_eq!(mem.num_regions(), 3);
    let addr = |at: u64| GuestAddress(at);
    mem.write_slice(&[7; 0x1000], addr(0x1800)).unwrap();
    let mut got = [0; 0x1000];
    mem.read_slice(&mut got, addr(0x1800)).unwrap();
    assert_eq!(got, [7; 0x1000]);
    for (at, len) in [
        (0x2fff, 2),
        (0x3000, 1),
        (0x3fff, 2),
        (0x4000, 0x1001),
        (u64::MAX, 1),
    ] {
        let result = mem.write_slice(&vec![1; len], addr(at));
        assert!(result.is_err(), "{at:#x}+{len:#x}");
        assert!(!GuestMemoryBackend::check_range(&*mem, addr(at), len));
    }
    assert!(matches!(
        mem.load::<u16>(addr(0x3000), Ordering::Relaxed),
        Err(GuestMemoryError::InvalidGuestAddress(_))
    ));
    // An index that is not aligned in the guest is not aligned here either.
    assert!(mem.load::<u16>(addr(0x4001), Ordering::Relaxed).is_err());
    let first = mem.find_region(addr(0)).unwrap();
    assert!(
        first
            .get_slice(vm_memory::MemoryRegionAddress(0x1fff), 2)
            .is_err()
    );
    let far = vm_memory::MemoryRegionAddress(u64::MAX);
    assert!(first.get_slice(far, 1).is_err());
}

/// What an access gets: host pointers and lengths up to an error, and whether there was one.
fn slices<M: GuestMemoryBackend>(mem: &M, addr: u64, len: usize) -> (Vec<(*mut u8, usize)>, bool) {
    let (mut found, mut failed) = (Vec::new(), false);
    for slice in GuestMemoryBackend::get_slices(mem, GuestAddress(addr), len) {
        match slice {
            Ok(slice) => found.push((slice.ptr_guard_mut().as_ptr(), slice.len())),
            Err(_) => failed = true,
        }
    }
    (found, failed)
}

proptest::proptest! {
    /// The oracle is `vm-memory`'s own collection of regions, over the same pages.
    #[test]
    fn an_access_finds_what_vm_memorys_own_regions_find(
        parts in proptest::collection::vec((0u64..4, 1usize..4), 1..6),
        accesses in proptest::collection::vec((0u64..0x2_2000, 0usize..0x6000), 1..20),
        high in 0u64..3,
    ) {
        // Gaps of 0 to 3 pages between regions, near 0 or near the end of all addresses.
        let base = [0, 0x1000, 0u64.wrapping_sub(0x2_0000)][high as usize];
        let (mut at, mut ranges) = (base, Vec::new());
        for (gap, pages) in parts {
            at += gap * PAGE as u64;
            ranges.push((GuestAddress(at), pages * PAGE));
            at += (pages * PAGE) as u64;
        }
        let oracle: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        let describe = |r: &GuestRegionMmap| region(r.start_addr().0, r.len() as usize, r.as_ptr());
        let mut regions: Vec<_> = oracle.iter().map(describe).collect();
        regions.reverse();
        // SAFETY: nothing is accessed, and `oracle` outlives the test.
        let mem = unsafe { RawMemory::new(regions, ()) }.unwrap();
        for (offset, len) in accesses {
            let addr = base.wrapping_add(offset);
            proptest::prop_assert_eq!(slices(&*mem, addr, len), slices(&oracle, addr, len));
        }
    }
}

#[test]
fn the_dirty_log_gets_every_write_with_its_offset_in_the_region() {
    let (owner, host) = pages(4);
    let log = Arc::new(Mutex::new(Vec::new()));
    let dirty: Arc<DirtyFn> = {
        let log = log.clone();
        Arc::new(move |offset, len| log.lock().unwrap().push((offset, len)))
    };
    let mut regions = vec![
        region(0x1000, PAGE, host),
        region(0x2000, PAGE, host.wrapping_add(PAGE)),
    ];
    regions[1].dirty = Some(dirty);
    // SAFETY: the pages are mapped until `owner` is dropped, and nothing else points to them.
    let mem = unsafe { RawMemory::new(regions, owner) }.unwrap();
    mem.write_slice(&[1; 20], GuestAddress(0x1ff6)).unwrap();
    mem.store(5u16, GuestAddress(0x2ffe), Ordering::Release)
        .unwrap();
    mem.write_obj(9u64, GuestAddress(0x2100)).unwrap();
    let mut buf = [0; 64];
    mem.read_slice(&mut buf, GuestAddress(0x2000)).unwrap();
    mem.write_slice(&[], GuestAddress(0x2200)).unwrap();
    let slice = mem.get_slice(GuestAddress(0x2300), 0x100).unwrap();
    slice
        .subslice(0x10, 0x20)
        .unwrap()
        .bitmap()
        .mark_dirty(4, 8);
    let expected = [(0, 10), (0xffe, 2), (0x100, 8), (0x314, 8)];
    assert_eq!(*log.lock().unwrap(), expected);
}

/// Notes when it is dropped.
struct Owner(Arc<AtomicBool>, #[allow(dead_code)] Arc<GuestMemoryMmap>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn the_owner_is_dropped_with_the_last_reference_and_after_a_refusal() {
    let (pages, host) = pages(1);
    let dropped = Arc::new(AtomicBool::new(false));
    let owner = || Owner(dropped.clone(), pages.clone());
    // SAFETY: the page is mapped until `owner` is dropped, and nothing else points to it.
    let mem = unsafe { RawMemory::new(vec![region(0, PAGE, host)], owner()) }.unwrap();
    let second = mem.clone();
    drop(mem);
    assert!(!dropped.load(Ordering::SeqCst));
    drop(second);
    assert!(dropped.swap(false, Ordering::SeqCst));
    // SAFETY: refused, so nothing is ever accessed.
    assert!(unsafe { RawMemory::new(Vec::new(), owner()) }.is_err());
    assert!(dropped.load(Ordering::SeqCst));
}

/// Takes the counts of the three eventfds.
fn counts(kicks: &Kicks) -> [u64; 3] {
    kicks.ends().unwrap().map(|end| {
        let mut count = [0; 8];
        match nix::unistd::read(&end, &mut count) {
            Ok(_) => u64::from_ne_bytes(count),
            Err(_) => 0,
        }
    })
}

#[test]
fn eventfds_interrupt_for_one_queue_or_for_all() {
    let kicks = Kicks::new().unwrap();
    let ends = kicks.ends().unwrap();
    let signal = EventFdSignal::per_queue(ends);
    assert!(!signal.is_shared());
    for queue in [0, 1, 1, 2, 3, u16::MAX] {
        signal.signal(queue);
    }
    assert_eq!(counts(&kicks), [1, 2, 1]);
    let [first, ..] = kicks.ends().unwrap();
    let shared = EventFdSignal::shared(first);
    assert!(shared.is_shared());
    shared.signal(0);
    shared.signal(2);
    assert_eq!(counts(&kicks), [2, 0, 0]);
}

#[test]
fn functions_interrupt_and_kicks_wake_the_end_of_their_queue() {
    let heard = Mutex::new(Vec::new());
    let call = |queue| heard.lock().unwrap().push(queue);
    let signal = FnSignal::per_queue(&call);
    signal.signal(1);
    let shared = FnSignal::shared(&call);
    shared.signal(0);
    assert_eq!((signal.is_shared(), shared.is_shared()), (false, true));
    assert_eq!(*heard.lock().unwrap(), [1, 0]);
    let kicks = Kicks::new().unwrap();
    for queue in [0, 2, 2, 3, u16::MAX] {
        kicks.kick(queue);
    }
    assert_eq!(counts(&kicks), [1, 0, 2]);
}
