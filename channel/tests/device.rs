//! The device with a correct driver: shapes of chains (R30), bursts, descriptors, dirty pages.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use adit_channel::carrier::{Armed, Carrier, Interest, RxPacket, SetAside, TxSlot};
use adit_channel::device::{FEATURES, HEADER_BYTES, HOST_CID, PAYLOAD_MAX, RX_QUEUE, VsockDevice};
use adit_engine::{Lane, ResetReason, SessionChange};
use adit_testkit::queue::{NEXT, WRITE};
use adit_testkit::{Driver, DriverConfig, RxShape, memory};
use common::{CID, Rig, Signals, cid, pattern, rw, scatter, wire_bytes};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use proptest::prelude::*;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Posts `bytes` (header and payload) as buffers of the given lengths.
fn post(rig: &mut Rig, bytes: &[u8], lengths: &[usize], indirect: bool) {
    let head = rig.driver.tx.next_head().expect("room");
    let buffers = scatter(memory::tx_payload(head), bytes.len(), lengths);
    let mut at = 0;
    for b in &buffers {
        let len = b.len as usize;
        rig.driver.write(b.addr, &bytes[at..at + len]);
        at += len;
    }
    let tx = &mut rig.driver.tx;
    let added = if indirect {
        tx.add_indirect(&buffers, false)
    } else {
        tx.add(&buffers, false)
    };
    added.expect("room");
    tx.publish();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn r30_any_shape_from_the_guest_gives_the_same_bytes(
        len in 0usize..40_000,
        lengths in prop::collection::vec(1usize..3000, 0..60),
        indirect: bool,
        to_fd: bool,
    ) {
        let mut rig = Rig::new();
        let payload = pattern(len, 7);
        post(&mut rig, &wire_bytes(&rw(1), &payload), &lengths, indirect);
        let got = if to_fd {
            take_through_fd(&mut rig)
        } else {
            rig.receive().expect("no fault").remove(0).1
        };
        prop_assert_eq!(got, payload);
        prop_assert_eq!(rig.driver.reap_tx(), 1);
    }

    #[test]
    fn r30_any_shape_towards_the_guest_gives_the_same_bytes(
        len in 0usize..20_000,
        lengths in prop::collection::vec(1usize..3000, 0..60),
        step in 1usize..5000,
        from_fd: bool,
    ) {
        let driver = Driver::empty(memory::anonymous(), cid(), DriverConfig::LINUX_6_1);
        let mut rig = Rig::on(driver, FEATURES);
        let total = HEADER_BYTES + len;
        let buffers = scatter(memory::rx_page(0), total, &lengths);
        rig.driver.rx.add(&buffers, true).expect("room");
        rig.driver.rx.publish();
        let payload = pattern(len, 9);
        let (mut near, far) = UnixStream::pair().expect("socketpair");
        if from_fd {
            near.write_all(&payload).expect("fits the socket's buffer");
        }
        rig.device.begin();
        let mut slot = rig.device.tx(Lane::Bulk, 1).expect("no fault").expect("a slot");
        prop_assert_eq!(slot.capacity() as usize, len);
        let mut done = 0;
        while done < len {
            done += if from_fd {
                slot.read_from(far.as_fd(), step as u32).expect("readable")
            } else {
                slot.write(&payload[done..len.min(done + step)]).expect("fits")
            };
        }
        slot.commit(&rw(1));
        rig.device.flush();
        prop_assert_eq!(rig.driver.rx.pop_used(), Some((0, total as u32)));
        let mut bytes = Vec::new();
        for b in &buffers {
            let mut piece = vec![0; b.len as usize];
            rig.driver.memory().read_slice(&mut piece, GuestAddress(b.addr)).expect("memory");
            bytes.extend(piece);
        }
        let mut header = rw(1);
        header.len = len as u32;
        let wire = adit_channel::device::WireHeader::new(HOST_CID, CID, &header);
        prop_assert_eq!(&bytes[..HEADER_BYTES], &wire.to_bytes()[..]);
        prop_assert_eq!(&bytes[HEADER_BYTES..], &payload[..]);
    }
}

fn take_through_fd(rig: &mut Rig) -> Vec<u8> {
    let (near, mut far) = UnixStream::pair().expect("socketpair");
    rig.device.begin();
    let mut packet = rig.device.rx().expect("no fault").expect("a packet");
    let want = packet.remaining() as usize;
    let mut got = Vec::new();
    while packet.remaining() > 0 {
        packet.write_to(near.as_fd(), 7777).expect("room");
        let mut chunk = vec![0; 7777];
        let n = far.read(&mut chunk).expect("bytes");
        got.extend_from_slice(&chunk[..n]);
    }
    while got.len() < want {
        let mut chunk = vec![0; 7777];
        let n = far.read(&mut chunk).expect("bytes");
        got.extend_from_slice(&chunk[..n]);
    }
    drop(packet);
    rig.device.flush();
    got
}

#[test]
fn r30_payload_in_1_to_17_pieces_and_in_single_bytes() {
    let mut rig = Rig::new();
    for pieces in 1..=17usize {
        let payload = pattern(PAYLOAD_MAX as usize, pieces as u8);
        let piece = payload.len().div_ceil(pieces);
        assert!(rig.driver.send(&rw(1), &payload, piece));
        rig.driver.tx.publish();
        let packets = rig.receive().expect("no fault");
        assert_eq!(packets[0].1, payload, "{pieces} pieces");
        rig.driver.reap_tx();
    }
    // 44 + 84 descriptors of one byte each: all descriptors of the queue.
    let payload = pattern(84, 5);
    post(&mut rig, &wire_bytes(&rw(1), &payload), &[1; 128], false);
    assert_eq!(rig.receive().expect("no fault")[0].1, payload);
}

#[test]
fn both_kernels_receive_what_the_host_sends() {
    for (rx, capacity) in [(RxShape::HeaderAndPage, 4096), (RxShape::OnePage, 4052)] {
        let mut rig = Rig::with(DriverConfig {
            rx,
            ..DriverConfig::LINUX_6_1
        });
        rig.device.begin();
        let slot = rig.device.tx(Lane::Bulk, 65536).expect("ok");
        assert_eq!(slot.map(|s| s.capacity()), Some(capacity));
        let mut payload = Vec::new();
        // More packets than the queue has buffers.
        for i in 0..300usize {
            let sent = pattern(i * 13 % (capacity as usize + 1), i as u8);
            assert!(rig.send(&rw(i as u32), &sent).expect("no fault"));
            let wire = rig.driver.receive(&mut payload).expect("a packet");
            assert_eq!((wire.src_cid(), wire.dst_cid()), (HOST_CID, CID));
            assert_eq!(wire.header().src_port, i as u32);
            assert_eq!(wire.header().len as usize, sent.len());
            assert_eq!(payload, sent);
            rig.driver.rx.publish();
        }
    }
}

#[test]
fn an_uncommitted_slot_is_offered_again() {
    let mut rig = Rig::new();
    rig.device.begin();
    for _ in 0..3 {
        let mut slot = rig.device.tx(Lane::Bulk, 10).expect("ok").expect("a slot");
        slot.write(b"never seen").expect("fits");
    }
    rig.device.flush();
    assert_eq!(rig.driver.rx.used_idx(), 0);
    assert!(rig.send(&rw(1), b"seen").expect("no fault"));
    let mut payload = Vec::new();
    rig.driver.receive(&mut payload).expect("a packet");
    assert_eq!(payload, b"seen");
}

#[test]
fn tx_is_taken_while_rx_is_full() {
    let mut rig = Rig::new();
    while rig.send(&rw(1), b"fill").expect("no fault") {}
    for _ in 0..1000 {
        rig.assert_works();
    }
    assert!(!rig.send(&rw(1), b"still full").expect("no fault"));
}

#[test]
fn indices_wrap() {
    let mut rig = Rig::new();
    for round in 0..70_000u32 {
        assert!(rig.driver.send(&rw(round), b"", 1));
        rig.driver.tx.publish();
        rig.device.begin();
        let packet = rig.device.rx().expect("no fault").expect("a packet");
        assert_eq!(packet.header().src_port, round);
        drop(packet);
        assert_eq!(
            rig.device.arm(Interest {
                rx: true,
                tx: false
            }),
            Armed::Sleep
        );
        assert_eq!(rig.driver.reap_tx(), 1);
    }
}

#[test]
fn a_full_or_closed_descriptor_is_an_error_and_keeps_the_rest() {
    let mut rig = Rig::new();
    let (near, far) = UnixStream::pair().expect("socketpair");
    let payload = pattern(PAYLOAD_MAX as usize, 1);
    let mut written = 0;
    let mut full = false;
    // The socket is in blocking mode. Even then the device must not block on it.
    while !full {
        rig.driver.send(&rw(1), &payload, 4096);
        rig.driver.tx.publish();
        rig.device.begin();
        let mut packet = rig.device.rx().expect("no fault").expect("a packet");
        while packet.remaining() > 0 {
            let before = packet.remaining();
            match packet.write_to(near.as_fd(), u32::MAX) {
                Ok(n) => {
                    written += n;
                    assert_eq!(packet.remaining() as usize, before as usize - n);
                }
                Err(e) => {
                    assert_eq!(e.kind(), ErrorKind::WouldBlock);
                    assert_eq!(packet.remaining(), before);
                    full = true;
                    break;
                }
            }
        }
        drop(packet);
        rig.device.flush();
        rig.driver.reap_tx();
    }
    assert_eq!(rig.device.counters().bytes_copied, written as u64);
    drop(far);
    rig.driver.send(&rw(1), b"nobody reads", 100);
    rig.driver.tx.publish();
    rig.device.begin();
    let mut packet = rig.device.rx().expect("no fault").expect("a packet");
    let error = packet.write_to(near.as_fd(), u32::MAX).expect_err("closed");
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
}

#[test]
fn packets_set_aside_are_written_together_and_returned_in_order() {
    let mut rig = Rig::new();
    let (near, mut far) = UnixStream::pair().expect("socketpair");
    let payloads: Vec<Vec<u8>> = (1..=6u8).map(|i| pattern(40 * usize::from(i), i)).collect();
    for payload in &payloads {
        assert!(rig.driver.send(&rw(1), payload, 33));
    }
    rig.driver.tx.publish();
    rig.device.begin();
    // The third packet is read at once, but its chain is returned after those before it.
    let mut expected = Vec::new();
    for (i, payload) in payloads.iter().enumerate() {
        let mut packet = rig.device.rx().expect("no fault").expect("a packet");
        let len = packet.remaining();
        if i != 2 {
            assert_eq!(packet.set_aside(len), SetAside::Kept);
            assert_eq!(packet.remaining(), 0);
            expected.extend_from_slice(payload);
        }
    }
    rig.device.flush();
    assert_eq!(
        rig.driver.tx.used_idx(),
        0,
        "no chain is returned before its payload was written"
    );
    assert_eq!(
        rig.device.write_aside(near.as_fd()).expect("room"),
        expected.len()
    );
    let mut got = vec![0; expected.len()];
    far.read_exact(&mut got).expect("bytes");
    assert_eq!(got, expected);
    assert_eq!(rig.device.read_aside(&mut [0; 8]).expect("memory"), 0);
    rig.device.release_aside();
    rig.device.flush();
    assert_eq!(rig.driver.tx.used_idx(), 6);
    let heads: Vec<u16> = std::iter::from_fn(|| rig.driver.tx.pop_used())
        .map(|(head, _)| head)
        .collect();
    assert_eq!(heads, (0..6).collect::<Vec<u16>>());
}

#[test]
fn packets_beyond_the_set_aside_limit_stay_readable() {
    let mut rig = Rig::new();
    let (near, far) = UnixStream::pair().expect("socketpair");
    let mut n = 0;
    for _ in 0..100 {
        assert!(rig.driver.send(&rw(1), &[7; 64], 64));
    }
    rig.driver.tx.publish();
    rig.device.begin();
    loop {
        let mut packet = rig.device.rx().expect("no fault").expect("a packet");
        n += 1;
        match packet.set_aside(64) {
            SetAside::Full => break,
            kept => assert_eq!(kept, SetAside::Kept),
        }
    }
    assert_eq!(n, 64);
    drop(far);
    let error = rig.device.write_aside(near.as_fd()).expect_err("closed");
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    let mut rest = vec![0; 64 * 64 + 1];
    assert_eq!(rig.device.read_aside(&mut rest).expect("memory"), 64 * 64);
    rig.device.release_aside();
    rig.device.flush();
    assert_eq!(rig.driver.reap_tx(), 64);
}

#[test]
fn pipes_work_and_end_of_file_is_zero() {
    let mut rig = Rig::new();
    let (reader, writer) = nix::unistd::pipe().expect("pipe");
    rig.driver.send(&rw(1), b"through a pipe", 3);
    rig.driver.tx.publish();
    rig.device.begin();
    let mut packet = rig.device.rx().expect("no fault").expect("a packet");
    assert_eq!(packet.write_to(writer.as_fd(), 7).expect("room"), 7);
    assert_eq!(packet.write_to(writer.as_fd(), 100).expect("room"), 7);
    drop(packet);
    drop(writer);
    let mut slot = rig.device.tx(Lane::Bulk, 100).expect("ok").expect("a slot");
    assert_eq!(slot.read_from(reader.as_fd(), 100).expect("bytes"), 14);
    assert_eq!(slot.read_from(reader.as_fd(), 100).expect("the end"), 0);
    slot.commit(&rw(2));
    rig.device.flush();
    let mut payload = Vec::new();
    rig.driver.receive(&mut payload).expect("a packet");
    assert_eq!(payload, b"through a pipe");
}

#[test]
fn every_write_to_guest_memory_is_marked_dirty() {
    type Tracked = GuestMemoryMmap<AtomicBitmap>;
    let ranges = [(GuestAddress(0), memory::MEMORY_BYTES)];
    let tracked = Arc::new(Tracked::from_ranges(&ranges).expect("memory"));
    let shared = memory::anonymous();
    // Header and payload are on different pages: this process copies one, and the kernel the other.
    let driver = Driver::new(shared.clone(), cid(), DriverConfig::LINUX_6_1);
    // Copy the driver's queues into memory that tracks writes, then clear the record of these writes.
    let mut image = vec![0; memory::MEMORY_BYTES];
    shared
        .read_slice(&mut image, GuestAddress(0))
        .expect("memory");
    tracked
        .write_slice(&image, GuestAddress(0))
        .expect("memory");
    let region = tracked.iter().next().expect("a region");
    region.get_mmap().bitmap().reset();

    let mut device = VsockDevice::<Arc<Tracked>>::new(cid(), 1).expect("a descriptor");
    device.ack_features(FEATURES).expect("offered");
    let signals = Arc::new(Signals::default());
    device
        .activate(tracked.clone(), driver.queues(), signals)
        .expect("usable");
    assert!(device.take_session_change().is_some());
    let (mut near, far) = UnixStream::pair().expect("socketpair");
    near.write_all(&[7; 3000]).expect("room");
    device.begin();
    let mut slot = device.tx(Lane::Bulk, 3000).expect("ok").expect("a slot");
    let n = slot.read_from(far.as_fd(), 3000).expect("bytes");
    slot.commit(&rw(1));
    device.flush();
    let dirty = |addr: u64| region.bitmap().dirty_at(addr as usize);
    let (header, page) = (memory::header(RX_QUEUE, 0), memory::rx_page(0));
    assert!(dirty(header), "header");
    assert!(dirty(page) && dirty(page + n as u64 - 1), "payload");
    let [desc, avail, used] = memory::queue_addrs(RX_QUEUE);
    assert!(dirty(used + 2) && dirty(used + 4));
    assert!(!dirty(desc) && !dirty(avail) && !dirty(page + 4096));
}

#[test]
fn r27_empty_descriptors_are_skipped_and_no_page_beyond_is_marked_dirty() {
    type Tracked = GuestMemoryMmap<AtomicBitmap>;
    let ranges = [(GuestAddress(0), memory::MEMORY_BYTES)];
    let tracked = Arc::new(Tracked::from_ranges(&ranges).expect("memory"));
    let shared = memory::anonymous();
    let mut driver = Driver::empty(shared.clone(), cid(), DriverConfig::LINUX_6_1);
    let pages = [0, 1, 2, 3, 4].map(memory::rx_page);
    // Lengths of 0 before, between and after the others. Their addresses may be anything, even outside memory.
    let chain = [
        (u64::MAX, 0),
        (pages[1], HEADER_BYTES as u32 + 10),
        (1 << 40, 0),
        (pages[3], 100),
        (pages[4], 0),
    ];
    for (i, (addr, len)) in (0u16..).zip(chain) {
        let next = if i == 4 { 0 } else { NEXT };
        driver.rx.write_desc(i, addr, len, WRITE | next, i + 1);
    }
    driver.rx.push(0);
    driver.rx.publish();
    let mut image = vec![0; memory::MEMORY_BYTES];
    let zero = GuestAddress(0);
    shared.read_slice(&mut image, zero).expect("memory");
    tracked.write_slice(&image, zero).expect("memory");
    let region = tracked.iter().next().expect("a region");
    region.get_mmap().bitmap().reset();
    let mut device = VsockDevice::<Arc<Tracked>>::new(cid(), 1).expect("a descriptor");
    device.ack_features(FEATURES).expect("offered");
    let signals = Arc::new(Signals::default());
    device
        .activate(tracked.clone(), driver.queues(), signals)
        .expect("usable");
    assert!(device.take_session_change().is_some());
    device.begin();
    let mut slot = device.tx(Lane::Bulk, 200).expect("ok").expect("a slot");
    assert_eq!(slot.capacity(), 110);
    let (mut near, far) = UnixStream::pair().expect("socketpair");
    near.write_all(&[7; 200]).expect("room");
    assert_eq!(slot.read_from(far.as_fd(), 200).expect("bytes"), 110);
    slot.commit(&rw(1));
    device.flush();
    let marked = pages.map(|page| region.bitmap().dirty_at(page as usize));
    assert_eq!(marked, [false, true, false, true, false]);
}

#[test]
fn memory_is_replaced_between_bursts() {
    let mut rig = Rig::new();
    rig.assert_works();
    let copy = memory::anonymous();
    let mut image = vec![0; memory::MEMORY_BYTES];
    let old = rig.driver.memory().clone();
    old.read_slice(&mut image, GuestAddress(0)).expect("memory");
    copy.write_slice(&image, GuestAddress(0)).expect("memory");
    rig.device.set_memory(copy).expect("the queues are in it");
    drop(old);
    let held = Arc::strong_count(rig.driver.memory());
    assert_eq!(held, 3, "the driver and its two queues only");
    let small = Arc::new(
        adit_testkit::VmMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("memory"),
    );
    assert!(rig.device.set_memory(small).is_err());
}

#[test]
fn no_packet_of_a_session_arrives_before_the_shell_knows_the_session() {
    let mut rig = Rig::new();
    let stopped = rig.device.reset(ResetReason::Epoch);
    assert_eq!(stopped.bases, [0, 0]);
    rig.device.ack_features(FEATURES).expect("offered");
    rig.device
        .activate(
            rig.driver.memory().clone(),
            rig.driver.queues(),
            rig.signals.clone(),
        )
        .expect("usable");
    assert!(rig.driver.send(&rw(1), b"abc", 3));
    rig.driver.tx.publish();
    // The `Port` still has streams of session 1, and the new driver's packets do not belong to them.
    assert!(rig.receive().expect("no fault").is_empty());
    assert_eq!(
        rig.device.arm(Interest {
            rx: true,
            tx: false
        }),
        Armed::Sleep
    );
    let mut told = None;
    let mut ids = Vec::new();
    rig.device.wakers(&mut |fd, id| {
        let mut poll = [PollFd::new(fd, PollFlags::POLLIN)];
        if nix::poll::poll(&mut poll, PollTimeout::ZERO) == Ok(1) {
            ids.push(id);
        }
    });
    for id in ids {
        told = told.or(rig.device.woken(id).session);
    }
    // Two changes since the shell took the last one: the later one is enough.
    assert_eq!(told, Some(SessionChange::Attached { epoch: 2 }));
    assert_eq!(rig.receive().expect("no fault").len(), 1);
}
