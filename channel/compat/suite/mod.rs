//! The same tests for every version of `vm-memory`: a VMM that has built its memory with that version gives it to the
//! device as raw regions. The guest's driver is the harness. It has a mapping of its own of the same memory, so the
//! dirty bitmaps of the VMM show what the device has written, and nothing else.
//!
//! | guest address | what |
//! |---|---|
//! | 0..0x200_0000 | the harness's layout (`adit_testkit::memory`) |
//! | a hole | |
//! | 0x1_0000_0000.. | [`PLUG_BYTES`] that are plugged and unplugged |

mod exchange;
mod linked;
mod vmm;

use std::collections::BTreeSet;
use std::sync::Arc;

use adit_channel::device::raw::RawRegion;
use adit_channel::device::{ActivateError, HEADER_BYTES, RX_QUEUE};
use adit_engine::ResetReason;
use adit_testkit::memory::{self, MEMORY_BYTES};
use adit_testkit::queue::Buffer;

use exchange::{Rig, pattern};
use vmm::PAGE;

const PLUG: u64 = 0x1_0000_0000;
const PLUG_BYTES: usize = 0x10_0000;

/// Guest address of the page with the used ring of a queue.
fn used_page(queue: u16) -> u64 {
    memory::queue_addrs(queue)[2]
}

#[test]
fn every_page_that_the_device_writes_is_dirty_in_the_vmms_bitmap_and_no_other() {
    let mut rig = Rig::new();
    // Taken by copy and by writev, given by copy and by readv; and the indices that ask for kicks.
    rig.post_buffers(2);
    rig.vmm.clean();
    let (from_guest, to_guest) = (pattern(5000, 1), pattern(3000, 2));
    rig.send(&from_guest);
    rig.send(&from_guest);
    let before = rig.image();
    assert_eq!(rig.burst(&to_guest), [from_guest.clone(), from_guest]);
    let after = rig.image();
    let changed: BTreeSet<u64> = (0..after.len() as u64)
        .step_by(PAGE as usize)
        .filter(|&at| {
            let page = at as usize..(at + PAGE) as usize;
            before[page.clone()] != after[page]
        })
        .collect();
    let dirty: BTreeSet<u64> = rig.vmm.dirty_pages().into_iter().collect();
    // Each packet has two descriptors. The headers of both are in one page, and their payloads in one each.
    let payloads = [0, 2].map(memory::rx_page);
    let headers = memory::header(RX_QUEUE, 0);
    let expected = [
        used_page(0),
        used_page(1),
        headers,
        payloads[0],
        payloads[1],
    ];
    let expected = BTreeSet::from(expected);
    assert_eq!(dirty, expected);
    assert_eq!(changed, expected);
    assert_eq!(rig.received(), [to_guest.clone(), to_guest]);
    // What the device only looks at stays clean.
    rig.vmm.clean();
    assert_eq!(rig.idle_burst(), Vec::<Vec<u8>>::new());
    let dirty = rig.vmm.dirty_pages();
    assert!(
        dirty
            .iter()
            .all(|page| [used_page(0), used_page(1)].contains(page))
    );
}

#[test]
fn memory_is_plugged_used_and_unplugged_while_the_device_runs() {
    let mut rig = Rig::new();
    let at = PLUG + 0x1000;
    // A guest that uses memory before it is there: its buffer is returned, and nothing else happens.
    rig.send_from(at, &pattern(600, 1));
    assert_eq!(rig.idle_burst(), Vec::<Vec<u8>>::new());
    assert_eq!(rig.device.counters().malformed_chains, 1);

    let plugged = rig
        .vmm
        .plugged(&rig.file, MEMORY_BYTES as u64, PLUG, PLUG_BYTES);
    rig.device
        .set_memory(plugged.raw())
        .expect("the queues are in it");
    plugged.clean();
    rig.send_from(at, &pattern(600, 1));
    assert_eq!(rig.idle_burst(), [pattern(600, 1)]);
    assert!(plugged.dirty_pages().iter().all(|&page| page < PLUG));
    // To the guest, into the new region.
    rig.post_raw(
        &[Buffer {
            addr: at,
            len: 2048,
        }],
        true,
    );
    assert!(rig.give(&pattern(900, 2)));
    let mut got = vec![0; 900];
    rig.read(at + HEADER_BYTES as u64, &mut got);
    assert_eq!(got, pattern(900, 2));
    assert!(plugged.dirty_pages().contains(&at));

    // The VMM forgets the region; the device has the last reference to the mapping, until it gets other memory.
    let mapping = Arc::downgrade(&plugged.mem);
    drop(plugged);
    assert!(mapping.upgrade().is_some());
    rig.device
        .set_memory(rig.vmm.raw())
        .expect("the queues are in it");
    assert!(mapping.upgrade().is_none(), "the device keeps old memory");
    rig.send_from(at, &pattern(600, 3));
    assert_eq!(rig.idle_burst(), Vec::<Vec<u8>>::new());
    assert_eq!(rig.device.counters().malformed_chains, 2);
    rig.send(&pattern(700, 4));
    assert_eq!(rig.idle_burst(), [pattern(700, 4)]);
}

#[test]
fn memory_without_the_queues_is_refused_and_the_old_is_kept() {
    let mut rig = Rig::new();
    let plugged = rig
        .vmm
        .plugged(&rig.file, MEMORY_BYTES as u64, PLUG, PLUG_BYTES);
    let elsewhere = plugged.unplugged(0, MEMORY_BYTES);
    let refused = rig.device.set_memory(elsewhere.raw());
    assert!(matches!(
        refused,
        Err(ActivateError::QueueAddress { queue: 0, .. })
    ));
    assert_eq!(Arc::strong_count(&elsewhere.mem), 1);
    rig.send(&pattern(700, 4));
    assert_eq!(rig.idle_burst(), [pattern(700, 4)]);
}

#[test]
fn a_reset_device_has_no_memory() {
    let mut rig = Rig::new();
    rig.send(&pattern(700, 4));
    assert_eq!(rig.idle_burst().len(), 1);
    let mapping = Arc::downgrade(&rig.vmm.mem);
    rig.device.reset(ResetReason::Epoch);
    let Rig { vmm, device, .. } = rig;
    drop(vmm);
    assert!(mapping.upgrade().is_none());
    drop(device);
}

#[test]
fn regions_that_cannot_be_meant_are_refused() {
    let rig = Rig::new();
    let before = Arc::strong_count(&rig.vmm.mem);
    let regions = || rig.vmm.regions();
    let with = |change: &dyn Fn(&mut RawRegion)| {
        let mut all = regions();
        change(&mut all[0]);
        rig.vmm.refused(all)
    };
    let twice = [regions(), regions()].concat();
    for (expected, error) in [
        ("Overlap", rig.vmm.refused(twice)),
        ("Empty", rig.vmm.refused(Vec::new())),
        ("Null", with(&|r| r.host = std::ptr::null_mut())),
        ("Misaligned", with(&|r| r.host = r.host.wrapping_add(1))),
        ("Misaligned", with(&|r| r.guest_addr = 2)),
        ("NoBytes", with(&|r| r.len = 0)),
        ("Wraps", with(&|r| r.len = usize::MAX)),
        ("Wraps", with(&|r| r.guest_addr = u64::MAX - 4095)),
    ] {
        assert!(error.starts_with(expected), "{expected}: {error}");
    }
    assert_eq!(
        Arc::strong_count(&rig.vmm.mem),
        before,
        "a refusal keeps nothing"
    );
}

#[test]
fn a_guests_buffers_in_holes_across_ends_and_around_zero_are_refused() {
    let mut rig = Rig::new();
    let plugged = rig
        .vmm
        .plugged(&rig.file, MEMORY_BYTES as u64, PLUG, PLUG_BYTES);
    rig.device
        .set_memory(plugged.raw())
        .expect("the queues are in it");
    let (end, plug_end) = (MEMORY_BYTES as u64, PLUG + PLUG_BYTES as u64);
    let mut refused = 0;
    for (addr, len) in [
        (end, 100),
        (end - 50, 100),
        (PLUG - 50, 100),
        (PLUG - 1, 1),
        (plug_end - 50, 100),
        (plug_end, 1),
        (end - 50, u32::MAX),
        (u64::MAX - 49, 100),
        (u64::MAX, 1),
        (u64::MAX - 49, 50),
        (1 << 63, 100),
    ] {
        for write in [false, true] {
            plugged.clean();
            let buffer = Buffer { addr, len };
            rig.post_raw(&[buffer], write);
            if write {
                assert!(!rig.give(b"to nowhere"));
            } else {
                assert_eq!(rig.idle_burst(), Vec::<Vec<u8>>::new());
            }
            refused += 1;
            let malformed = rig.device.counters().malformed_chains;
            assert_eq!(malformed, refused, "{addr:#x}+{len:#x}");
            let mut pages = plugged.dirty_pages().into_iter();
            assert!(pages.all(|page| [used_page(0), used_page(1)].contains(&page)));
        }
    }
    rig.send(&pattern(700, 4));
    assert_eq!(rig.idle_burst(), [pattern(700, 4)]);
}
