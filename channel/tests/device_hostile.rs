//! Attacks of a hostile driver through the virtqueues: R18-R23, R28, R29, R34, R42, R44.

mod common;

use std::sync::Arc;

use adit_channel::carrier::{Armed, Carrier, Interest, RxPacket, TxSlot};
use adit_channel::device::{
    ActivateError, DeviceError, FEATURES, HEADER_BYTES, HOST_CID, PAYLOAD_MAX, QUEUE_MAX, RX_QUEUE,
    VirtQueues, WireHeader,
};
use adit_engine::Lane;
use adit_testkit::queue::{Buffer, INDIRECT, NEXT, WRITE};
use adit_testkit::{Driver, DriverConfig, VmMemory, memory};
use common::{CID, Device, Rig, Signals, cid, pattern, rw, wire_bytes};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueState};
use vm_memory::{Bytes, GuestAddress};

const HEADER: u32 = HEADER_BYTES as u32;

/// Posts a raw chain. Asserts that it is returned with used length 0 and counted, and that the channel still works.
fn assert_refused(rig: &mut Rig, what: &str, descriptors: &[(u64, u32, u16, u16)]) {
    let (before, used) = (rig.device.counters(), rig.driver.tx.used_idx());
    rig.post_raw(descriptors);
    let packets = rig
        .receive()
        .expect("a malformed chain is not a fault of the transport");
    assert_eq!(packets, [], "{what}");
    let after = rig.device.counters();
    assert_eq!(
        after.malformed_chains,
        before.malformed_chains + 1,
        "{what}"
    );
    assert_eq!(rig.driver.tx.used_idx(), used.wrapping_add(1), "{what}");
    assert_eq!(rig.driver.tx.pop_used(), Some((0, 0)), "{what}");
    rig.assert_works();
}

#[test]
fn r18_descriptor_loops_stop_at_queue_size() {
    let mut rig = Rig::new();
    let a = memory::tx_payload(0);
    assert_refused(&mut rig, "self-loop", &[(a, 100, NEXT, 0)]);
    // A walk of this chain could only be ended by the descriptor count.
    assert_refused(&mut rig, "empty self-loop", &[(a, 0, NEXT, 0)]);
    assert_refused(&mut rig, "2-loop", &[(a, 100, NEXT, 1), (a, 100, NEXT, 0)]);
    assert_refused(&mut rig, "next outside", &[(a, 100, NEXT, 128)]);
    assert_refused(&mut rig, "next far outside", &[(a, 100, NEXT, u16::MAX)]);
    // All 128 descriptors and then the first again: one more than the table has.
    let mut chain: Vec<_> = (0..128).map(|i| (a, 1, NEXT, i + 1)).collect();
    chain[127].3 = 0;
    assert_refused(&mut rig, "n + 1", &chain);
}

#[test]
fn r18_a_chain_of_all_descriptors_is_accepted() {
    let mut rig = Rig::new();
    let bytes = wire_bytes(&rw(9), &pattern(84, 1));
    let a = memory::tx_payload(0);
    rig.driver.write(a, &bytes);
    let mut chain: Vec<_> = (0..128u16)
        .map(|i| (a + u64::from(i), 1, NEXT, i + 1))
        .collect();
    chain[127].2 = 0;
    rig.post_raw(&chain);
    let packets = rig.receive().expect("no fault");
    assert_eq!(packets, [(rw(9), pattern(84, 1))]);
}

#[test]
fn r19_bad_indirect_tables_are_returned_unused() {
    let mut rig = Rig::new();
    let (table, a) = (memory::indirect_table(0), memory::tx_payload(0));
    rig.driver.write(a, &wire_bytes(&rw(1), b"x"));
    let entry = |rig: &Rig, i: u64, d: Descriptor| {
        let at = GuestAddress(table + 16 * i);
        rig.driver.memory().write_obj(d, at).expect("table");
    };
    for (what, len, flags) in [
        ("with NEXT", 16, INDIRECT | NEXT),
        ("size 0", 0, INDIRECT),
        ("size 8", 8, INDIRECT),
        ("size 17", 17, INDIRECT),
        (
            "more than the limit",
            16 * (u32::from(QUEUE_MAX) + 1),
            INDIRECT,
        ),
        ("size 2^32 - 16", u32::MAX - 15, INDIRECT),
    ] {
        // The first entry is a valid packet; only the description of the table is wrong.
        rig.driver.write(a, &wire_bytes(&rw(1), b"x"));
        entry(&rig, 0, Descriptor::new(a, HEADER + 1, 0, 0));
        assert_refused(&mut rig, what, &[(table, len, flags, 1), (a, 1, 0, 0)]);
    }
    assert_refused(&mut rig, "table in a hole", &[(1 << 40, 16, INDIRECT, 0)]);
    assert_refused(&mut rig, "table wraps", &[(u64::MAX - 7, 32, INDIRECT, 0)]);
    for (what, first, len) in [
        ("nested", Descriptor::new(table, 16, INDIRECT, 0), 16),
        ("loop", Descriptor::new(a, 44, NEXT, 0), 32),
        ("next outside", Descriptor::new(a, 44, NEXT, 2), 32),
    ] {
        entry(&rig, 0, first);
        assert_refused(&mut rig, what, &[(table, len, INDIRECT, 0)]);
    }
    // The same with a valid table, after a direct descriptor (virtio 1.3 §2.7.5.3.2).
    rig.driver.write(a, &wire_bytes(&rw(1), b"x"));
    entry(&rig, 0, Descriptor::new(a + u64::from(HEADER), 1, 0, 0));
    rig.post_raw(&[(a, HEADER, NEXT, 1), (table, 16, INDIRECT, 0)]);
    assert_eq!(rig.receive().expect("no fault"), [(rw(1), b"x".to_vec())]);
}

#[test]
fn r19_indirect_needs_its_feature() {
    let config = DriverConfig {
        indirect: false,
        ..DriverConfig::LINUX_6_1
    };
    let features = FEATURES & !(1 << VIRTIO_RING_F_INDIRECT_DESC);
    let mut rig = Rig::on(Driver::new(memory::anonymous(), cid(), config), features);
    let table = memory::indirect_table(0);
    let desc = Descriptor::new(memory::tx_payload(0), HEADER, 0, 0);
    let at = GuestAddress(table);
    rig.driver.memory().write_obj(desc, at).expect("table");
    assert_refused(&mut rig, "not negotiated", &[(table, 16, INDIRECT, 0)]);
}

#[test]
fn r20_nothing_changes_while_active() {
    let mut rig = Rig::new();
    assert_eq!(rig.device.ack_features(FEATURES), Err(DeviceError::Active));
    let (mem, queues) = (rig.driver.memory().clone(), rig.driver.queues());
    let signals = Arc::new(Signals::default());
    assert_eq!(
        rig.device.activate(mem, queues, signals),
        Err(ActivateError::Active)
    );
    rig.device.write_config(0, &[0xff; 8]);
    let mut config = [0; 8];
    rig.device.read_config(0, &mut config);
    assert_eq!(u64::from_le_bytes(config), CID);
    assert_eq!(rig.device.counters().ignored_config_writes, 1);
    rig.assert_works();
}

#[test]
fn r20_config_reads_stay_inside() {
    let device = Device::new(cid(), 1).expect("a descriptor");
    for offset in [4, 7, 8, 9, u64::MAX] {
        let mut bytes = [0xaa; 16];
        device.read_config(offset, &mut bytes);
        assert_eq!(bytes, [0; 16], "offset {offset}");
    }
}

#[test]
fn r20_features_that_were_not_offered_are_refused() {
    let mut device = Device::new(cid(), 1).expect("a descriptor");
    for bit in [1, 2, 26, 33, 34, 63] {
        let acked = FEATURES | 1 << bit;
        let unknown = 1 << bit;
        assert_eq!(
            device.ack_features(acked),
            Err(DeviceError::FeatureNotOffered { acked, unknown })
        );
    }
    let driver = Driver::new(memory::anonymous(), cid(), DriverConfig::LINUX_6_1);
    let result = device.activate(
        driver.memory().clone(),
        driver.queues(),
        Arc::new(Signals::default()),
    );
    assert_eq!(result, Err(ActivateError::Legacy { acked: 0 }));
}

#[test]
fn r21_unusable_queues_refuse_activation() {
    let driver = Driver::new(memory::anonymous(), cid(), DriverConfig::LINUX_6_1);
    let good = driver.rx.queue().state();
    // Sizes that a `Queue` cannot even store.
    for size in [0, 3, 127, 2048] {
        assert!(Queue::try_from(QueueState { size, ..good }).is_err());
    }
    let too_large = QueueState {
        size: 2048,
        max_size: 2048,
        ..good
    };
    let cases = [
        ("too large", too_large),
        (
            "not ready",
            QueueState {
                ready: false,
                ..good
            },
        ),
        (
            "available ring never set",
            QueueState {
                avail_ring: 0,
                ..good
            },
        ),
        (
            "used ring never set",
            QueueState {
                used_ring: 0,
                ..good
            },
        ),
        (
            "descriptors in a hole",
            QueueState {
                desc_table: 1 << 40,
                ..good
            },
        ),
        (
            "available ring at the end",
            QueueState {
                avail_ring: memory::MEMORY_BYTES as u64 - 4,
                ..good
            },
        ),
        (
            "used ring wraps",
            QueueState {
                used_ring: u64::MAX - 3,
                ..good
            },
        ),
    ];
    for (what, state) in cases {
        for bad_rx in [true, false] {
            let bad = Queue::try_from(state).expect("a queue");
            let (rx, tx) = if bad_rx {
                (bad, driver.tx.queue())
            } else {
                (driver.rx.queue(), bad)
            };
            let queues = VirtQueues {
                rx: rx.into(),
                tx: tx.into(),
                event: None,
            };
            let mut device = Device::new(cid(), 1).expect("a descriptor");
            device.ack_features(FEATURES).expect("offered");
            let signals = Arc::new(Signals::default());
            let result = device.activate(driver.memory().clone(), queues, signals);
            assert!(result.is_err(), "{what}");
            assert!(!device.is_active(), "{what}");
        }
    }
}

#[test]
fn r22_a_jump_of_the_available_index_is_one_fault_without_replay() {
    for jump in [129, 32768, u16::MAX] {
        let mut rig = Rig::new();
        rig.assert_works();
        let idx = rig.driver.tx.avail_idx();
        rig.driver.tx.set_avail_idx(idx.wrapping_add(jump));
        let fault = rig.receive().expect_err("a jump is a fault");
        assert_eq!((fault.value, fault.limit), (u64::from(jump), 128));
        rig.device.tear();
        // The session is torn: nothing is taken and no kick is asked for, even when the index is valid again.
        rig.driver.tx.set_avail_idx(idx.wrapping_add(1));
        assert_eq!(rig.receive().expect("no second error"), []);
        let all = Interest { rx: true, tx: true };
        assert_eq!(rig.device.arm(all), Armed::Sleep);
        assert_eq!(rig.device.counters().packets_from_guest, 1);
        assert_eq!(rig.device.counters().faults, 1);
    }
}

#[test]
fn r22_jump_of_the_rx_queue_and_heads_outside_are_faults() {
    let mut rig = Rig::new();
    let idx = rig.driver.rx.avail_idx();
    rig.driver.rx.set_avail_idx(idx.wrapping_add(200));
    rig.device.begin();
    assert!(rig.device.tx(Lane::Control, 0).is_err());

    for head in [128, u16::MAX] {
        let mut rig = Rig::new();
        rig.driver.tx.push(head);
        rig.driver.tx.publish();
        let fault = rig.receive().expect_err("no such head");
        assert_eq!(fault.value, u64::from(head));
    }
}

/// Two regions that are adjacent inside the payload of head 0, then a gap, then another region.
fn memory_with_seam_and_hole() -> Arc<VmMemory> {
    let ranges = [
        (GuestAddress(0), SEAM as usize),
        (GuestAddress(SEAM), (HOLE - SEAM) as usize),
        (
            GuestAddress(HOLE_END),
            memory::MEMORY_BYTES - HOLE_END as usize,
        ),
    ];
    Arc::new(VmMemory::from_ranges(&ranges).expect("guest memory"))
}
const SEAM: u64 = 0x100_8000;
const HOLE: u64 = 0x180_0000;
const HOLE_END: u64 = 0x190_0000;

#[test]
fn r23_buffers_over_regions_are_split_and_holes_refused() {
    let mem = memory_with_seam_and_hole();
    let driver = Driver::new(mem, cid(), DriverConfig::LINUX_6_1);
    let mut rig = Rig::on(driver, FEATURES);
    // First the header and then the payload crosses the boundary.
    for start in [SEAM - 20, SEAM - 44, SEAM - 300] {
        let payload = pattern(1000, start as u8);
        let bytes = wire_bytes(&rw(5), &payload);
        rig.driver.write(start, &bytes);
        rig.post_raw(&[(start, bytes.len() as u32, 0, 0)]);
        assert_eq!(rig.receive().expect("no fault"), [(rw(5), payload)]);
        rig.driver.tx.pop_used();
    }
    let end = memory::MEMORY_BYTES as u64;
    let header = memory::header(1, 0);
    for (what, addr, len) in [
        ("last byte in a hole", HOLE - 99, 100),
        ("begins in a hole", HOLE_END - 1, 100),
        ("over the hole", HOLE - 1, (HOLE_END - HOLE) as u32 + 2),
        ("end of memory", end - 10, 11),
        ("outside", 1 << 45, 1),
        ("wraps", u64::MAX - 3, 100),
        ("wraps to 0", u64::MAX, 1),
    ] {
        rig.driver.write(header, &wire_bytes(&rw(5), b""));
        let chain = [(header, HEADER, NEXT, 1), (addr, len, 0, 0)];
        assert_refused(&mut rig, what, &chain);
    }
}

#[test]
fn r23_rx_buffers_over_regions_are_split_and_holes_refused() {
    let config = DriverConfig::LINUX_6_1;
    let driver = Driver::empty(memory_with_seam_and_hole(), cid(), config);
    let mut rig = Rig::on(driver, FEATURES);
    let bad = Buffer {
        addr: HOLE - 50,
        len: 100,
    };
    let good = Buffer {
        addr: SEAM - 50,
        len: 200,
    };
    rig.driver.rx.add(&[bad], true).expect("room");
    rig.driver.rx.add(&[good], true).expect("room");
    rig.driver.rx.publish();
    // The bytes right before and after the valid buffer must not change.
    rig.driver.write(SEAM - 60, &[0xee; 10]);
    rig.driver.write(SEAM + 150, &[0xee; 10]);
    let payload = pattern(156, 3);
    assert!(rig.send(&rw(5), &payload).expect("no fault"));
    assert_eq!(rig.driver.rx.pop_used(), Some((0, 0)));
    assert_eq!(rig.driver.rx.pop_used().map(|u| u.1), Some(200));
    let mut bytes = [0; 220];
    let at = GuestAddress(SEAM - 60);
    rig.driver
        .memory()
        .read_slice(&mut bytes, at)
        .expect("memory");
    assert_eq!(
        (&bytes[..10], &bytes[210..]),
        (&[0xee; 10][..], &[0xee; 10][..])
    );
    assert_eq!(bytes[54..210], payload[..]);
    assert_eq!(rig.device.counters().malformed_chains, 1);
}

#[test]
fn r28_packets_shorter_than_a_header_are_refused() {
    let mut rig = Rig::new();
    let a = memory::tx_payload(0);
    rig.driver.write(a, &wire_bytes(&rw(2), b"abc"));
    for (what, len) in [("0", 0), ("1", 1), ("43", 43), ("2^32 - 1", u32::MAX)] {
        assert_refused(&mut rig, what, &[(a, len, 0, 0)]);
        rig.driver.write(a, &wire_bytes(&rw(2), b"abc"));
    }
    for (len, payload) in [(44, &b""[..]), (45, b"a"), (47, b"abc")] {
        rig.post_raw(&[(a, len, 0, 0)]);
        assert_eq!(rig.receive().expect("ok"), [(rw(2), payload.to_vec())]);
        rig.driver.tx.pop_used();
    }
    // Empty descriptors between the others are skipped.
    rig.post_raw(&[
        (a, 0, NEXT, 1),
        (a, 44, NEXT, 2),
        (a, 0, NEXT, 3),
        (a + 44, 3, 0, 0),
    ]);
    assert_eq!(rig.receive().expect("ok"), [(rw(2), b"abc".to_vec())]);
}

#[test]
fn r28_payload_over_64_kib_is_refused() {
    let mut rig = Rig::new();
    let a = memory::tx_payload(0);
    let chain = |n: u32| [(a, HEADER, NEXT, 1), (a, n, 0, 0)];
    assert_refused(&mut rig, "64 KiB + 1", &chain(PAYLOAD_MAX + 1));
    assert_eq!(rig.device.counters().oversized_packets, 1);
    rig.driver.write(a, &wire_bytes(&rw(2), b""));
    rig.post_raw(&chain(PAYLOAD_MAX));
    let packets = rig.receive().expect("ok");
    assert_eq!(packets[0].1.len(), PAYLOAD_MAX as usize);
}

#[test]
fn r28_rx_buffers_too_small_for_a_header_are_returned_unused() {
    let driver = Driver::empty(memory::anonymous(), cid(), DriverConfig::LINUX_6_1);
    let mut rig = Rig::on(driver, FEATURES);
    let a = memory::rx_page(0);
    for len in [1, 43, 44, 45] {
        rig.driver
            .rx
            .add(&[Buffer { addr: a, len }], true)
            .expect("room");
    }
    rig.driver.rx.publish();
    rig.device.begin();
    let slot = rig
        .device
        .tx(Lane::Control, 10)
        .expect("no fault")
        .expect("44");
    assert_eq!(slot.capacity(), 0);
    slot.commit(&rw(1));
    let mut slot = rig
        .device
        .tx(Lane::Control, 10)
        .expect("no fault")
        .expect("45");
    assert_eq!(slot.capacity(), 1);
    assert_eq!(slot.write(b"abc").expect("fits"), 1);
    slot.commit(&rw(1));
    rig.device.flush();
    let lens: Vec<_> = std::iter::from_fn(|| rig.driver.rx.pop_used())
        .map(|u| u.1)
        .collect();
    assert_eq!(lens, [0, 0, 44, 45]);
}

#[test]
fn r28_rx_buffers_larger_than_a_packet_are_filled_to_64_kib() {
    let driver = Driver::empty(memory::anonymous(), cid(), DriverConfig::LINUX_6_1);
    let mut rig = Rig::on(driver, FEATURES);
    let (addr, len) = (memory::tx_payload(0), 3 * PAYLOAD_MAX);
    rig.driver
        .rx
        .add(&[Buffer { addr, len }], true)
        .expect("room");
    rig.driver.rx.publish();
    rig.device.begin();
    let mut slot = rig
        .device
        .tx(Lane::Bulk, 0)
        .expect("no fault")
        .expect("room");
    assert_eq!(slot.capacity(), PAYLOAD_MAX);
    let sent = slot
        .write(&pattern(PAYLOAD_MAX as usize + 1, 1))
        .expect("fits");
    assert_eq!(sent, PAYLOAD_MAX as usize);
    assert_eq!(slot.write(b"more").expect("full"), 0);
    slot.commit(&rw(1));
    rig.device.flush();
    assert_eq!(rig.driver.rx.pop_used(), Some((0, HEADER + PAYLOAD_MAX)));
}

#[test]
fn r29_malformed_chains_do_not_leak_heads() {
    let mut rig = Rig::new();
    let a = memory::tx_payload(0);
    let bad = [
        (a, 10, 0, 0),            // too short
        (a, 100, WRITE, 0),       // wrong direction
        (1 << 40, 100, 0, 0),     // in a gap
        (a, 100, NEXT, u16::MAX), // outside the table
    ];
    for i in 0..2 * 128 {
        rig.driver.tx.pop_used();
        rig.post_raw(&[bad[i % bad.len()]]);
        assert_eq!(rig.receive().expect("no fault"), []);
    }
    assert_eq!(rig.device.counters().malformed_chains, 256);
    assert_eq!(rig.driver.tx.used_idx(), 256);
    rig.driver.tx.pop_used();
    rig.assert_works();
}

#[test]
fn r29_a_full_queue_of_malformed_chains_is_returned_in_one_burst() {
    let mut rig = Rig::new();
    rig.driver.tx.write_desc(0, 1 << 40, 100, 0, 0);
    for _ in 0..128 {
        rig.driver.tx.push(0);
    }
    rig.driver.tx.publish();
    assert_eq!(rig.receive().expect("no fault"), []);
    assert_eq!(rig.driver.tx.used_idx(), 128);
    // One notification for all of them.
    assert_eq!(rig.signals.count(1), 1);
}

#[test]
fn r34_reset_completes_nothing() {
    let mut rig = Rig::new();
    assert!(rig.driver.send(&rw(1), b"abc", 3));
    rig.driver.tx.publish();
    rig.device.begin();
    drop(rig.device.rx().expect("no fault").expect("a packet"));
    let stopped = rig.device.reset(adit_engine::ResetReason::Epoch);
    assert_eq!(stopped.bases, [0, 1]);
    rig.device.flush();
    assert_eq!(rig.driver.tx.used_idx(), 0);
    assert!(rig.device.rx().expect("no fault").is_none());
    assert!(!rig.device.is_active());
}

#[test]
fn r42_length_field_and_descriptor_bytes_are_kept_apart() {
    let mut rig = Rig::new();
    let a = memory::tx_payload(0);
    for len in [0, 4, 5, 6, 4096, PAYLOAD_MAX, PAYLOAD_MAX + 1, u32::MAX] {
        let mut header = rw(3);
        header.len = len;
        rig.driver.write(a, &wire_bytes(&header, b"12345"));
        // The bytes after the packet must never be read.
        rig.driver.write(a + 49, &[0xee; 64]);
        rig.post_raw(&[(a, 49, 0, 0)]);
        rig.device.begin();
        let mut packet = rig.device.rx().expect("no fault").expect("a packet");
        assert_eq!((packet.header().len, packet.remaining()), (len, 5));
        let mut payload = [0; 64];
        assert_eq!(packet.read(&mut payload).expect("readable"), 5);
        assert_eq!(payload[..6], *b"12345\0");
        assert_eq!(packet.read(&mut payload).expect("nothing left"), 0);
        drop(packet);
        rig.device.flush();
        rig.driver.tx.pop_used();
    }
}

#[test]
fn r44_foreign_cids_are_dropped_and_counted() {
    let mut rig = Rig::new();
    let mut dropped = 0;
    let foreign = [
        0,
        1,
        4,
        0xffff_ffff,
        1 << 32 | CID,
        1 << 32 | HOST_CID,
        u64::MAX,
    ];
    let pairs = foreign
        .iter()
        .flat_map(|&c| [(c, HOST_CID), (CID, c)])
        .chain([(HOST_CID, CID), (HOST_CID, HOST_CID), (CID, CID)]);
    for (src, dst) in pairs {
        let wire = WireHeader::new(src, dst, &rw(1));
        assert!(rig.driver.send_wire(&wire, 10, 10));
        rig.driver.tx.publish();
        assert_eq!(rig.receive().expect("no fault"), [], "{src:#x} -> {dst:#x}");
        dropped += 1;
        assert_eq!(rig.device.counters().dropped_cid, dropped);
        assert_eq!(rig.driver.reap_tx(), 1);
    }
    rig.assert_works();
}

#[test]
fn rx_buffers_of_the_wrong_direction_are_returned_unused() {
    let driver = Driver::empty(memory::anonymous(), cid(), DriverConfig::LINUX_6_1);
    let mut rig = Rig::on(driver, FEATURES);
    let buffer = Buffer {
        addr: memory::rx_page(0),
        len: 100,
    };
    rig.driver.rx.add(&[buffer], false).expect("room");
    rig.driver.rx.publish();
    assert!(!rig.send(&rw(1), b"abc").expect("no fault"));
    assert_eq!(rig.driver.rx.pop_used(), Some((0, 0)));
    assert_eq!(rig.signals.count(RX_QUEUE), 1);
}
