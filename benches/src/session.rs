//! A device that is active when its port first looks.

use std::sync::Arc;

use adit_channel::device::{FEATURES, GuestCid, Signal, VsockDevice};

use crate::driver::Driver;
use crate::memory::VmMemory;

/// The device of the harness.
pub type Device = VsockDevice<Arc<VmMemory>>;

/// Nobody to notify: the harness looks by itself.
struct Quiet;

impl Signal for Quiet {
    fn signal(&self, _queue: u16) {}
}

/// Makes a device that a driver is attached to.
///
/// # Panics
/// The harness made a driver that the device does not take.
pub fn active_device(driver: &Driver, cid: GuestCid) -> Device {
    let mut device = Device::new(cid, 1).expect("a descriptor");
    device.ack_features(FEATURES).expect("offered features");
    device
        .activate(driver.memory().clone(), driver.queues(), Arc::new(Quiet))
        .expect("a usable device");
    device
}
