//! The device on a thread of its own, as a VMM links it: only numbers, pointers, eventfds and functions go in.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use adit_channel::device::raw::{EventFdSignal, Kicks};
use adit_channel::device::{EVENT_QUEUE, FEATURES, VsockDevice};
use adit_channel::hybrid::Host;
use adit_channel::linked::{Linked, link};
use adit_testkit::memory::{self, MEMORY_BYTES};
use adit_testkit::queue::DriverQueue;
use adit_testkit::{Driver, DriverConfig, Guest};

use super::exchange::{CID, cid, queue};
use super::vmm::Vmm;

#[test]
fn a_linked_device_negotiates_and_carries_streams_of_both_sides() {
    let (mem, file) = memory::memfd_of(&[(0, MEMORY_BYTES)]);
    let vmm = Vmm::new(&file, 0, 0, MEMORY_BYTES);
    let dir = tempfile::tempdir().expect("a folder");
    let uds = dir.path().join("v");
    let kicks = Kicks::new().expect("descriptors");
    let device = VsockDevice::new(cid(), 1).expect("a descriptor");
    assert_eq!(device.features(), FEATURES);
    let mut config = [0; 8];
    device.read_config(0, &mut config);
    assert_eq!(u64::from_le_bytes(config), CID);
    let (linked, remote) = link(device, kicks.ends().expect("descriptors")).expect("descriptors");
    let host = Host::new(linked, Some(&uds), 7).expect("a socket");
    // This thread ends with the process.
    std::thread::spawn(move || host.run());

    let driver = Driver::new(mem.clone(), cid(), DriverConfig::LINUX_6_12);
    let event = DriverQueue::new(mem, EVENT_QUEUE, 8, true);
    let queues = [&driver.rx, &driver.tx, &event].map(queue);
    // DRIVER_OK: the features first, which the device may refuse.
    let irqs = Kicks::new().expect("descriptors");
    let ends = irqs.ends().expect("descriptors");
    let signal = Arc::new(EventFdSignal::per_queue(ends));
    for (features, fits) in [(FEATURES | 1 << 63, false), (FEATURES, true)] {
        let (raw, signal) = (vmm.raw(), signal.clone());
        let done = remote.ask(move |linked| linked.activate(features, raw, queues, signal));
        assert_eq!(done.expect("the thread runs").is_ok(), fits);
    }
    vmm.clean();
    Guest::new(driver, |queue| kicks.kick(queue)).talk(&uds);

    // Both interrupts came, and the VMM's bitmap has what was written.
    for fd in &irqs.ends().expect("descriptors")[..2] {
        let mut count = File::from(fd.try_clone().expect("a descriptor"));
        count.read_exact(&mut [0; 8]).expect("an interrupt");
    }
    let dirty = vmm.dirty_pages();
    for queue in [0, 1] {
        assert!(dirty.contains(&memory::queue_addrs(queue)[2]));
    }
    assert!(dirty.contains(&memory::rx_page(0)));
    assert!(dirty.iter().all(|&page| page < memory::tx_payload(0)));

    // Other memory, while the thread runs; and none after the driver's reset.
    let held = Arc::strong_count(&vmm.mem);
    let raw = vmm.raw();
    let set = remote.ask(move |linked| linked.set_memory(raw));
    set.expect("the thread runs").expect("the queues are in it");
    assert_eq!(Arc::strong_count(&vmm.mem), held);
    remote.ask(Linked::reset).expect("the thread runs");
    assert_eq!(Arc::strong_count(&vmm.mem), 1);
}
