//! The device in a VMM whose device trait is Firecracker's. `cargo run -p adit-channel --example adapter_firecracker`
//! drives the adapter once: the driver's negotiation, streams of both sides, memory that is plugged and unplugged, a
//! snapshot after which the VM goes on, one that another VMM continues, a reset.
//!
//! - `adapter.rs` is what such a tree adds.
//! - `stand_in.rs` has that tree's trait, and a VM without processors. The guest is the test harness's driver.

mod adapter;
mod stand_in;

use std::sync::atomic::Ordering;

use adit_channel::device::{EVENT_QUEUE, RX_QUEUE};
use adit_testkit::queue::Buffer;
use adit_testkit::{Guest, memory};
use vmm_sys_util::eventfd::EventFd;

use adapter::Vsock;
use stand_in::{AnyError, HOTPLUG, VirtioDevice, VirtioDeviceType, Vm};

fn main() -> Result<(), AnyError> {
    let dir = tempfile::tempdir()?;
    let (uds, second) = (dir.path().join("v"), dir.path().join("w"));
    let vm = Vm::new()?;
    let mut device = Vsock::new(3, &uds, None)?;
    assert_eq!(device.device_type(), VirtioDeviceType::Vsock);
    let (driver, mut events) = vm.driver(&mut device);
    vm.activate(&mut device, [&driver.rx, &driver.tx, &events])?;
    let mut guest = Guest::new(driver, notify(&device)?);
    guest.talk(&uds);
    let dirty = vm.dirty_pages();
    println!("streams of both sides; {dirty} dirty pages");
    assert!(dirty > 2 && vm.interrupts(RX_QUEUE) > 0);
    assert_eq!(device.interrupt_status().load(Ordering::SeqCst), 1);

    vm.plug(true);
    device.memory_changed(&vm.mem)?;
    guest.dial_host(&uds, Some(HOTPLUG));
    vm.plug(false);
    device.memory_changed(&vm.mem)?;
    println!("a stream from memory that was plugged");

    // A snapshot, after which the VM goes on.
    device.prepare_save();
    assert!(device.saved.is_some());
    device.kick();
    guest.talk(&uds);
    println!("paused and resumed: {}", device.id());

    // A snapshot, with which another VMM continues. This one stays paused.
    let (addr, len) = (memory::EVENTS, 4);
    events.add(&[Buffer { addr, len }], true);
    events.publish();
    device.prepare_save();
    let (state, _) = device.saved.as_ref().ok_or("the device does not stop")?;
    let saved = state.to_bytes();
    let mut restored = Vsock::new(3, &second, Some(&saved))?;
    restored.set_acked_features(device.acked_features());
    let driver = guest.driver;
    vm.activate(&mut restored, [&driver.rx, &driver.tx, &events])?;
    restored.kick();
    assert!(events.pop_used().is_some() && vm.interrupts(EVENT_QUEUE) > 0);
    let mut guest = Guest::new(driver, notify(&restored)?);
    guest.talk(&second);
    println!("continued from a snapshot; the guest knows that its old streams are gone");

    assert!(restored.reset() && !restored.is_activated());
    Ok(())
}

/// The guest writes QueueNotify: an ioeventfd.
fn notify(device: &Vsock) -> Result<impl Fn(u16) + use<>, AnyError> {
    let events = device.queue_events().iter().map(EventFd::try_clone);
    let events: Vec<EventFd> = events.collect::<Result<_, _>>()?;
    Ok(move |queue| {
        // The write fails only when the counter is full.
        let _ = events[usize::from(queue)].write(1);
    })
}
