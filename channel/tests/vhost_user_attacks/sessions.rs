//! Events that end sessions and change memory during them: R51, R58, memory slots.

use std::io::{ErrorKind, Read};
use std::os::fd::AsRawFd;

use adit_channel::device::{FEATURES, HEADER_BYTES, HOST_CID, WireHeader};
use adit_engine::{Op, ResetReason};
use adit_testkit::queue::Buffer;
use adit_testkit::{DriverConfig, memory};
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use crate::common::{CID, pattern};
use crate::world::{World, reboot};

#[test]
fn r51_a_stream_survives_a_thousand_pauses_under_traffic() {
    for event_idx in [true, false] {
        let mut world = World::new();
        if !event_idx {
            reboot(
                &mut world,
                DriverConfig {
                    event_idx,
                    ..DriverConfig::LINUX_6_1
                },
            );
        }
        // One stream all the time: neither of its ends may notice a pause.
        let at = world.open();
        let epoch = world.shard.port(world.port).epoch();
        let (mut sent, mut got) = (0, Vec::new());
        let bytes = pattern(500 * 3000, 9);
        for i in 0..500 {
            world.exchange(at, 100 + i);
            let until = (i + 1) * 3000;
            sent += world.guest_writes(at, &bytes[sent..until]);
            world.vm.driver.tx.publish();
            let bases = world.stop();
            let port = world.shard.port(world.port);
            assert_eq!((port.streams(), port.is_paused()), (1, true));
            world.resume(bases);
            world.until(|w| {
                sent += w.guest_writes(at, &bytes[sent..until]);
                w.client_reads(at, &mut got);
                got.len() == until
            });
        }
        assert!(got == bytes);
        assert_eq!(world.shard.port(world.port).epoch(), epoch);
        world.assert_works();
    }
}

#[test]
fn r58_closes_resets_and_driver_resets_in_any_order_leak_and_lose_nothing() {
    let mut world = World::new();
    let mut seed = 58u64;
    let mut random = move |n: u64| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % n
    };
    let bytes = pattern(8000, 4);
    let mut resets = 0;
    for round in 0..400u64 {
        let at = world.open();
        let (mut sent, mut got) = (0, Vec::new());
        for _ in 0..random(20) {
            sent += world.guest_writes(at, &bytes[sent..]);
            world.turns(random(3) as u32);
            world.client_reads(at, &mut got);
        }
        let mut client = world.streams[at].client.try_clone().expect("a descriptor");
        match random(5) {
            0 => {
                let (id, now) = (world.streams[at].id, world.shard.now());
                world
                    .shard
                    .port_mut(world.port)
                    .reset(now, id, ResetReason::Local);
            }
            1 => world.send_op(at, Op::Rst, 0),
            2 => world.send_op(at, Op::Shutdown, 3),
            3 => {
                // Paused, and reset right after the pause.
                let bases = world.stop();
                world.resume(bases);
                world.send_op(at, Op::Rst, 0);
            }
            _ => {
                resets += 1;
                reboot(
                    &mut world,
                    [DriverConfig::LINUX_6_1, DriverConfig::LINUX_6_12][round as usize % 2],
                );
            }
        }
        // The client has a prefix of the sent bytes, and then its stream ends.
        world.until(|_| {
            loop {
                let mut buf = [0; 4096];
                match client.read(&mut buf) {
                    Ok(n @ 1..) => got.extend_from_slice(&buf[..n]),
                    Err(e) if e.kind() == ErrorKind::WouldBlock => break false,
                    _ => break true,
                }
            }
        });
        assert!(
            got.len() <= sent && got == bytes[..got.len()],
            "round {round}"
        );
    }
    world.until(|w| w.shard.port(w.port).streams() == 0);
    assert!(resets > 20);
    world.assert_works();
}

/// The driver stays the same, but the device's setup changes. Each of its streams must end; none may hang.
#[test]
fn r58_each_stream_of_a_continued_driver_gets_a_reset() {
    let mut world = World::new();
    let indirect = false;
    let config = DriverConfig::LINUX_6_1;
    world.assert_works();
    reboot(&mut world, DriverConfig { indirect, ..config });
    for _ in 0..20 {
        let at = world.open();
        world.exchange(at, 1000);
    }
    let bases = world.stop();
    let frontend = world.vm.frontend.clone();
    // Without indirect descriptors, which this driver does not use.
    let features = (FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()) & !(1 << 28);
    frontend.set_features(features).expect("offered");
    world.resume(bases);
    world.until(|w| w.streams.iter().all(|s| s.reset));
    assert_eq!(world.shard.port(world.port).streams(), 0);
    assert_eq!(world.shard.port(world.port).epoch(), Some(3));
    assert!(world.strays.is_empty());
    world.streams.clear();
    world.assert_works();
}

/// Guest address of the second memory slot.
const SLOT: u64 = 0x1_0000_0000;

#[test]
fn memory_added_while_running_is_used_and_memory_replaced_is_not() {
    let mut world = World::new();
    let at = world.open();
    world.exchange(at, 1000);
    let info = |gpa: u64, user: u64, file: &std::fs::File| VhostUserMemoryRegionInfo {
        guest_phys_addr: gpa,
        memory_size: memory::MEMORY_BYTES as u64,
        userspace_addr: user,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    let main = info(0, world.vm.host_address(0), &world.vm.file);
    for i in 0..20u8 {
        // A new file each time. A host address that was kept from before would access an old file.
        let (_, added) = memory::memfd();
        let user = 0x6000_0000_0000;
        let table = [main, info(SLOT, user, &added)];
        world.vm.frontend.set_mem_table(&table).expect("a table");
        let offset = FileOffset::new(added.try_clone().expect("a descriptor"), 0);
        let ranges = [(GuestAddress(SLOT), memory::MEMORY_BYTES, Some(offset))];
        let slot = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).expect("memory");
        // GET_FEATURES is answered after the table, so from now on the guest may use the slot.
        let frontend = world.vm.frontend.clone();
        let asked = std::thread::spawn(move || frontend.get_features().expect("features"));
        world.until(|_| asked.is_finished());
        asked.join().expect("answered");
        let bytes = pattern(3000, i);
        world.until(|w| w.streams[at].guest.credit() >= 3000);
        let h = world.streams[at].guest.payload(3000);
        let mut whole = WireHeader::new(CID, HOST_CID, &h).to_bytes().to_vec();
        whole.extend(&bytes);
        slot.write_slice(&whole, GuestAddress(SLOT + 0x1000))
            .expect("memory");
        let buffers = [
            Buffer {
                addr: SLOT + 0x1000,
                len: HEADER_BYTES as u32 + 7,
            },
            Buffer {
                addr: SLOT + 0x1000 + HEADER_BYTES as u64 + 7,
                len: 2993,
            },
        ];
        assert!(world.vm.driver.send_buffers(&buffers));
        let mut got = Vec::new();
        world.until(|w| {
            w.client_reads(at, &mut got);
            got.len() >= 3000
        });
        assert!(got == bytes, "table {i}");
        world.exchange(at, 2000);
    }
}
