//! A device that is already active when its port first polls it.

use std::sync::Arc;

use adit_channel::device::{FEATURES, GuestCid, Signal, VsockDevice};

use crate::driver::Driver;
use crate::memory::VmMemory;

/// The device of the harness.
pub type Device = VsockDevice<Arc<VmMemory>>;

/// Discards the interrupts: the harness polls.
struct Quiet;

impl Signal for Quiet {
    fn signal(&self, _queue: u16) {}
}

/// Makes a device with this driver attached.
///
/// # Panics
/// The device refuses the driver that the harness made.
pub fn active_device(driver: &Driver, cid: GuestCid) -> Device {
    let mut device = Device::new(cid, 1).expect("a descriptor");
    device.ack_features(FEATURES).expect("offered features");
    device
        .activate(driver.memory().clone(), driver.queues(), Arc::new(Quiet))
        .expect("a usable device");
    device
}
