//! A device that is active when its port first looks: what a VMM's transport layer does when the driver sets
//! DRIVER_OK, done by an eventfd.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use adit_channel::carrier::{
    Armed, Carrier, CarrierCaps, CarrierFault, Interest, RxPacket, TxSlot, Woken,
};
use adit_channel::device::{FEATURES, GuestCid, Signal, VsockDevice};
use adit_engine::{Lane, SessionChange};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::driver::Driver;
use crate::memory::VmMemory;

/// The device of the harness.
pub type Device = VsockDevice<Arc<VmMemory>>;

/// Id of the waker that begins the session; the device's own count from 0.
const SESSION: u32 = 100;

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
    let mut device = Device::new(cid);
    device.ack_features(FEATURES).expect("offered features");
    device
        .activate(driver.memory().clone(), driver.queues(), Arc::new(Quiet))
        .expect("a usable device");
    device
}

/// A device and the sign that its session begins.
pub struct Attached {
    device: Device,
    begin: EventFd,
}

impl Attached {
    /// Wraps an active device.
    ///
    /// # Errors
    /// There is no eventfd to be had.
    pub fn new(device: Device) -> std::io::Result<Self> {
        let begin = EventFd::from_value_and_flags(1, EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { device, begin })
    }

    /// The device, for its counters.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

impl Carrier for Attached {
    type Rx<'a>
        = <Device as Carrier>::Rx<'a>
    where
        Self: 'a,
        <Device as Carrier>::Rx<'a>: RxPacket;
    type Tx<'a>
        = <Device as Carrier>::Tx<'a>
    where
        Self: 'a,
        <Device as Carrier>::Tx<'a>: TxSlot;

    fn caps(&self) -> CarrierCaps {
        self.device.caps()
    }
    fn begin(&mut self) {
        self.device.begin();
    }
    fn rx(&mut self) -> Result<Option<Self::Rx<'_>>, CarrierFault> {
        self.device.rx()
    }
    fn tx(&mut self, lane: Lane, want: u32) -> Result<Option<Self::Tx<'_>>, CarrierFault> {
        self.device.tx(lane, want)
    }
    fn flush(&mut self) {
        self.device.flush();
    }
    fn arm(&mut self, interest: Interest) -> Armed {
        self.device.arm(interest)
    }
    fn tear(&mut self) {
        self.device.tear();
    }
    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>, u32)) {
        visit(self.begin.as_fd(), SESSION);
        self.device.wakers(visit);
    }
    fn woken(&mut self, id: u32) -> Woken {
        if id != SESSION {
            return self.device.woken(id);
        }
        // It fails only when it was read already.
        let _ = self.begin.read();
        Woken {
            session: Some(SessionChange::Attached { epoch: 1 }),
            wakers_changed: false,
        }
    }
}
