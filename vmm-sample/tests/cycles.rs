//! R12: a device that is started and stopped again and again keeps nothing. This test counts its process's descriptors and
//! mappings, so it has a file, and with it a process, of its own.

mod common;

use adit_engine::Op;
use adit_testkit::DriverConfig;
use common::{Noise, Vm, until};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS;

const CYCLES: u32 = 10_000;
/// Mappings that the allocator may add meanwhile.
const ARENAS: usize = 8;

fn count(of: &str) -> usize {
    match of {
        "fd" => std::fs::read_dir("/proc/self/fd").unwrap().count(),
        _ => std::fs::read_to_string("/proc/self/maps")
            .unwrap()
            .lines()
            .count(),
    }
}

#[test]
fn r12_ten_thousand_interrupted_sessions_leave_no_descriptor_and_no_mapping() {
    let mut vm = Vm::new();
    let mut noise = Noise(12);
    vm.honest();
    vm.put(VIRTIO_MMIO_STATUS, 0);
    // The sockets of the last streams are closed once the device's thread has seen that the streams ended.
    vm.settle();
    let before = ["fd", "maps"].map(count);
    for cycle in 0..CYCLES {
        vm.config = [DriverConfig::LINUX_6_1, DriverConfig::LINUX_6_12][cycle as usize % 2];
        vm.boot();
        if cycle % 16 == 0 {
            let mut stream = vm.open();
            vm.exchange(&mut stream, 1000);
            // Bytes in both directions that nobody will read.
            let header = stream.guest.payload(1000);
            vm.driver.send(&header, &[7; 1000], 400);
            vm.driver.tx.publish();
            vm.kick(1);
        } else {
            // A connection request. The device may have seen it or not when the session ends.
            let mut guest = adit_testkit::stream::GuestStream::new(900, 7999);
            let request = guest.header(Op::Request);
            vm.driver.send(&request, &[], 1);
            vm.driver.tx.publish();
            vm.kick(1);
            (0..noise.below(400)).for_each(|_| std::hint::spin_loop());
        }
        vm.put(VIRTIO_MMIO_STATUS, 0);
    }
    // The sockets of the last streams are closed once the device's thread has seen that the streams ended.
    vm.settle();
    until("the descriptors of before", || count("fd") <= before[0]);
    let maps = count("maps");
    assert!(
        maps <= before[1] + ARENAS,
        "{} mappings, then {maps}",
        before[1]
    );
    vm.honest();
}
