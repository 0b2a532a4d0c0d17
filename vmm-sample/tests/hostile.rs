//! A guest that does what no kernel does, against the VMM's own devices: R24, R25, R34, R51, R60.

mod common;

use std::io::Write;
use std::sync::Arc;

use adit_channel::device::{HEADER_BYTES, HOST_CID, RX_QUEUE, WireHeader};
use adit_engine::{Kind, Op, PacketHeader};
use adit_testkit::queue::Buffer;
use adit_testkit::{DriverConfig, VmMemory, memory};
use adit_vmm_sample::memory::ranges;
use common::{DISK, DISK_RING, Noise, VSOCK, Vm, until, until_kick_is_read};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS;
use vm_memory::{Bytes, GuestAddress};

const READ: u32 = 0;
const WRITE: u32 = 1;
const OK: u8 = 0;
/// A disk request's header.
const HEADER: u64 = 0x9_0000;

/// A packet that gets no answer: a reset of a stream that never existed.
fn reset_of_nothing(port: u32) -> PacketHeader {
    PacketHeader {
        src_port: port,
        dst_port: 7999,
        len: 0,
        kind: Kind::Stream as u16,
        op: Op::Rst as u16,
        flags: 0,
        buf_alloc: 0,
        fwd_cnt: 0,
    }
}

/// Memory like that of a guest with more than 3 GiB: two regions with a hole between them. A page exists once it is touched.
fn two_regions() -> Arc<VmMemory> {
    Arc::new(VmMemory::from_ranges(&ranges((3 << 30) + (64 << 20))).unwrap())
}

/// The driver stores its index while the vsock thread loads it, again and again with stores that change both bytes. If a load
/// could see half of a store, the index would jump or go back, and that ends the session.
#[test]
fn r24_an_index_that_changes_while_it_is_read_is_whole() {
    let mut vm = Vm::new();
    for head in 0..vm.driver.tx.size() {
        let addr = memory::tx_payload(head);
        let wire = WireHeader::new(3, HOST_CID, &reset_of_nothing(head.into()));
        vm.driver.write(addr, &wire.to_bytes());
        vm.driver
            .tx
            .write_desc(head, addr, HEADER_BYTES as u32, 0, 0);
    }
    let (mut sent, mut borders) = (0u32, 0);
    while sent < 100_000 {
        // Stop just below a multiple of 256, or go over it.
        let at = sent as u16 % 256;
        let batch = if at >= 0xfc { 8 } else { (0xfc - at).min(64) };
        borders += u32::from(at >= 0xfc);
        let size = vm.driver.tx.size();
        until("room", || {
            (sent as u16).wrapping_sub(vm.driver.tx.used_idx()) <= size - batch
        });
        for n in 0..batch {
            vm.driver.tx.push((sent as u16).wrapping_add(n) % size);
        }
        vm.driver.tx.set_used_event(sent as u16);
        vm.driver.tx.publish();
        vm.kick(1);
        sent += u32::from(batch);
    }
    assert!(borders > 300);
    vm.until_tx_is_returned();
    vm.honest();
}

/// Buffers that are only partly in guest memory: they end in the hole, behind the last byte, or wrap around the address space.
/// The device uses the bytes that exist, and no others.
#[test]
fn r25_buffers_partly_outside_memory_are_returned() {
    let mut vm = Vm::on(two_regions(), DriverConfig::LINUX_6_12);
    vm.boot();
    let (hole, end) = (3u64 << 30, (4u64 << 30) + (64 << 20));
    let wire = WireHeader::new(3, HOST_CID, &reset_of_nothing(9)).to_bytes();
    vm.driver.write(0xa_0000, &wire);
    let lies = [
        (hole - 8, 64),
        (hole - 64, 4096),
        (hole, 64),
        (end - 20, 44),
        (end - 1, u32::MAX),
        (u64::MAX - 20, 44),
    ];
    for (addr, len) in lies {
        let len_bytes = Buffer { addr, len };
        let header = Buffer {
            addr: 0xa_0000,
            len: HEADER_BYTES as u32,
        };
        assert!(vm.driver.send_buffers(&[len_bytes]));
        assert!(vm.driver.send_buffers(&[header, len_bytes]));
        vm.driver.tx.publish();
        vm.until_tx_is_returned();
        vm.driver.reap_tx();
    }
    let mut stream = vm.open();
    vm.exchange(&mut stream, 10_000);
    // The same in the other direction: first the bad buffers, then good ones.
    vm.boot();
    let mut stream = vm.open();
    while vm.driver.rx.pop_used().is_some() {}
    for (n, (addr, len)) in (0..).zip(lies) {
        let head = memory::QUEUE_MAX / 4 + n;
        vm.driver.rx.write_desc(head, addr, len, 2, 0);
        vm.driver.rx.push(head);
    }
    vm.driver.rx.publish();
    vm.kick(usize::from(RX_QUEUE));
    stream.client.write_all(&[1; 64]).unwrap();
    vm.settle();
    // The disk: into memory that exists in part, and to an address that ends in the hole.
    let mut ring = vm.boot_disk(DISK_RING);
    for (addr, len) in lies {
        for kind in [READ, WRITE] {
            let before = ring.used(&vm);
            ring.request(&vm, kind, HEADER, (addr, len));
            let status = ring.answer(&vm, HEADER);
            assert_ne!(status, OK, "{addr:#x} {len}");
            assert_eq!(ring.used(&vm), before.wrapping_add(1));
        }
    }
    // Queues and buffers in the second region work like those in the first.
    let mut ring = vm.boot_disk(4 << 30);
    ring.request(&vm, READ, (4 << 30) + 0x8000, (end - 4096, 4096));
    assert_eq!(ring.answer(&vm, (4 << 30) + 0x8000), OK);
    let last: u8 = vm.memory.read_obj(GuestAddress(end - 1)).unwrap();
    assert_eq!(last, 0xd1);
    vm.honest();
}

/// After a reset, the device writes no more to the buffers that the driver had posted.
#[test]
fn r34_nothing_is_completed_to_a_queue_that_was_reset() {
    let mut vm = Vm::new();
    let mut noise = Noise(34);
    let rings = |vm: &Vm| -> Vec<u8> {
        let mut bytes = vec![0; 0x5_0000];
        vm.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        let mut pages = vec![0; 128 << 12];
        let at = GuestAddress(memory::rx_page(0));
        vm.memory.read_slice(&mut pages, at).unwrap();
        bytes.append(&mut pages);
        bytes
    };
    let mut under_way = 0;
    for round in 0..300 {
        let mut stream = vm.open();
        // The host sends, the guest sends, and the guest resets at some moment of that, or while the device's thread is idle.
        stream.client.write_all(&[9; 50_000]).unwrap();
        let stands = round % 4 == 0;
        if stands {
            vm.transport().pause().unwrap();
        }
        for _ in 0..8 {
            let header = stream.guest.payload(4000);
            vm.driver.send(&header, &[3; 4000], 1000);
        }
        vm.driver.tx.publish();
        if stands {
            vm.transport().resume();
        } else {
            vm.kick(1);
            (0..1 << noise.below(12)).for_each(|_| std::hint::spin_loop());
        }
        vm.put(VIRTIO_MMIO_STATUS, 0);
        under_way += u32::from(vm.driver.tx.used_idx() != vm.driver.tx.avail_idx());
        let after = rings(&vm);
        let _ = stream.client.write(&[9; 1000]);
        (0..3).for_each(|queue| vm.kick(queue));
        vm.settle();
        assert!(rings(&vm) == after, "a queue changed after its reset");
        vm.boot();
    }
    assert!(
        under_way > 30,
        "{under_way} of 300 resets came before all was taken"
    );
    // The disk: reading 4 MiB takes a while.
    let into = memory::tx_payload(0);
    for _ in 0..100 {
        let mut ring = vm.boot_disk(DISK_RING);
        vm.memory.write_obj(0u8, GuestAddress(into)).unwrap();
        ring.request(&vm, READ, HEADER, (into, 4 << 20));
        (0..noise.below(100_000)).for_each(|_| std::hint::spin_loop());
        vm.put_at(DISK, VIRTIO_MMIO_STATUS, 0);
        let look = |vm: &Vm| {
            (
                ring.used(vm),
                vm.memory.read_obj::<u8>(GuestAddress(into)).unwrap(),
            )
        };
        let after = look(&vm);
        vm.disk_kick.write(1).unwrap();
        until_kick_is_read(&vm.disk_kick);
        assert_eq!(look(&vm), after);
    }
    vm.honest();
}

#[test]
fn r51_a_thousand_pauses_under_traffic_lose_nothing() {
    for event_idx in [true, false] {
        let config = DriverConfig {
            event_idx,
            ..DriverConfig::LINUX_6_12
        };
        let mut vm = Vm::on(memory::anonymous(), config);
        vm.boot();
        let mut stream = vm.open();
        for n in 0..1000 {
            // Bytes are in flight in both directions when the device is paused.
            stream.client.write_all(&[5; 3000]).unwrap();
            let header = stream.guest.payload(3000);
            assert!(vm.driver.send(&header, &[5; 3000], 4096));
            vm.driver.tx.publish();
            vm.kick(1);
            let held = vm.transport().pause().unwrap();
            let used = [vm.driver.rx.used_idx(), vm.driver.tx.used_idx()];
            if n % 100 == 0 {
                std::thread::yield_now();
                let still = [vm.driver.rx.used_idx(), vm.driver.tx.used_idx()];
                assert_eq!(used, still, "a paused device used a buffer");
            }
            drop(held);
            vm.transport().resume();
            let (mut here, mut there) = (0, 0);
            until("the bytes in flight arrive", || {
                let mut got = Vec::new();
                vm.turn(&mut [&mut stream], &mut got);
                here += got.iter().map(|(_, bytes)| bytes.len()).sum::<usize>();
                let mut some = [0; 4096];
                there += std::io::Read::read(&mut stream.client, &mut some).unwrap_or(0);
                (here, there) == (3000, 3000)
            });
        }
        assert!(vm.resets.is_empty());
    }
}

/// A restored guest that has no buffer for the TRANSPORT_RESET event gets the event as soon as it posts one, and only once.
#[test]
fn r60_a_restored_guest_gets_its_event_once_it_has_a_buffer() {
    let mut origin = Vm::new();
    let mut stream = origin.open();
    origin.exchange(&mut stream, 5000);
    let held = origin.transport().pause().unwrap();
    let mut vm = Vm::on(origin.memory.clone(), origin.config);
    vm.transport().restore(&held).unwrap();
    // The guest's driver continues; it does not know of the restore yet.
    std::mem::swap(&mut vm.driver, &mut origin.driver);
    std::mem::swap(&mut vm.event, &mut origin.event);
    assert_eq!(vm.event.used_idx(), 0);
    // Packets on its old stream get no answer. A reset would look to a reader like a regular end of the stream.
    let header = stream.guest.payload(10);
    vm.driver.send(&header, &[0; 10], 10);
    let taken = vm.driver.tx.used_idx().wrapping_add(1);
    until("the packet is consumed", || {
        vm.turn(&mut [], &mut Vec::new());
        vm.driver.tx.used_idx() == taken
    });
    vm.turn(&mut [], &mut Vec::new());
    assert!(vm.resets.is_empty());
    let page = 0xb_0000;
    for n in 0..3u64 {
        let addr = page + 8 * n;
        vm.memory.write_obj(u32::MAX, GuestAddress(addr)).unwrap();
        let head = vm.event.add(&[Buffer { addr, len: 4 }], true);
        assert!(head.is_some());
        let wanted = vm.event.publish();
        assert!(wanted || n > 0, "the device waits for a buffer");
        vm.kick(2);
        until_kick_is_read(&vm.kicks[2]);
        vm.settle();
        until("the event", || vm.event.used_idx() == 1);
    }
    assert_eq!(vm.event.pop_used(), Some((0, 4)));
    let told = [0, 1].map(|n| {
        vm.memory
            .read_obj::<u32>(GuestAddress(page + 8 * n))
            .unwrap()
    });
    assert_eq!(told, [0, u32::MAX], "TRANSPORT_RESET, once");
    let mut stream = vm.open();
    vm.exchange(&mut stream, 5000);
    vm.put(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(vm.get_at(VSOCK, VIRTIO_MMIO_STATUS), 0);
    vm.honest();
}
