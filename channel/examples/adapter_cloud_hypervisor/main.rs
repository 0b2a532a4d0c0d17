//! The device in a VMM whose device traits are Cloud Hypervisor's. `cargo run -p adit-channel --example
//! adapter_cloud_hypervisor` drives the adapter once: the driver's negotiation, streams of both sides, a DIMM, pause and
//! resume, a snapshot that another VMM continues, a reset.
//!
//! - `adapter.rs` is what such a tree adds.
//! - `stand_in.rs` has that tree's traits, and a VM without processors. The guest is the test harness's driver.

mod adapter;
mod stand_in;

use adit_channel::device::{EVENT_QUEUE, RX_QUEUE, TX_QUEUE};
use adit_testkit::queue::Buffer;
use adit_testkit::{Guest, memory};

use adapter::Vsock;
use stand_in::{AnyError, PLUG, Pausable, Snapshottable, VIRTIO_TYPE_VSOCK, VirtioDevice, Vm};

fn main() -> Result<(), AnyError> {
    let dir = tempfile::tempdir()?;
    let (uds, second) = (dir.path().join("v"), dir.path().join("w"));
    let vm = Vm::new()?;
    let mut device = Vsock::new("_vsock0", 3, &uds, None)?;
    assert_eq!(device.device_type(), VIRTIO_TYPE_VSOCK);
    assert_eq!(device.queue_max_sizes().len(), 3);
    let (driver, mut events) = vm.driver(&mut device);
    vm.activate(&mut device, [&driver.rx, &driver.tx, &events])?;
    let mut guest = Guest::new(driver, |queue| vm.kick(queue));
    guest.talk(&uds);
    let dirty = vm.dirty_pages();
    println!("streams of both sides; {dirty} dirty pages");
    assert!(dirty > 2 && vm.interrupts(RX_QUEUE) > 0 && vm.interrupts(TX_QUEUE) > 0);

    vm.plug(&mut device)?;
    guest.dial_host(&uds, Some(PLUG.0));
    println!("a stream from memory that was plugged");

    device.pause()?;
    device.resume()?;
    guest.talk(&uds);
    println!("paused and resumed: {}", device.id());

    // A snapshot, with which another VMM continues. This one stays paused.
    let (addr, len) = (memory::EVENTS, 4);
    events.add(&[Buffer { addr, len }], true);
    events.publish();
    device.pause()?;
    let snapshot = device.snapshot()?;
    let mut restored = Vsock::new("_vsock0", 3, &second, Some(&snapshot))?;
    vm.activate(&mut restored, [&guest.driver.rx, &guest.driver.tx, &events])?;
    assert!(events.pop_used().is_some() && vm.interrupts(EVENT_QUEUE) > 0);
    guest.talk(&second);
    println!("continued from a snapshot; the guest knows that its old streams are gone");

    restored.reset();
    restored.shutdown();
    Ok(())
}
