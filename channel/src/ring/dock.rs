//! A carrier that has a ring or none. VMMs bring and remove a ring while the `Port` stays in its shard.
//!
//! ```text
//! empty ── dock ──► the ring's own sessions ── undock, or dock of another ──► its session ends
//! ```

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use adit_engine::{Lane, ResetReason, SessionChange};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::burst::{CAPS, RingPacket, RingSlot};
use super::{RingCarrier, RingState};
use crate::carrier::{Armed, Carrier, CarrierCaps, CarrierFault, Interest, Woken};
use crate::device::drain;

/// Waker id of the dock itself. The ring's waker ids follow it.
const WAKER_DOCK: u32 = 0;

/// A ring, or none.
#[derive(Debug)]
pub struct Dock {
    ring: Option<RingCarrier>,
    /// The ring was replaced, and the shell does not know it yet. The old ring had a session, or may have had one.
    swapped: bool,
    changed: EventFd,
}

impl Dock {
    /// Makes an empty dock.
    ///
    /// # Errors
    /// This process has no free descriptors.
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Self {
            ring: None,
            swapped: false,
            changed: EventFd::from_flags(flags)?,
        })
    }

    /// Sets a ring, which replaces the present one.
    pub fn dock(&mut self, ring: RingCarrier) {
        self.swap(Some(ring));
    }

    /// Removes the ring. Its streams end with `CarrierFault`.
    pub fn undock(&mut self) {
        self.swap(None);
    }

    fn swap(&mut self, ring: Option<RingCarrier>) {
        if self.ring.is_none() && ring.is_none() {
            return;
        }
        self.ring = ring;
        self.swapped = true;
        // The write fails only when the counter is full, and then the eventfd is readable anyway.
        let _ = self.changed.write(1);
    }

    /// The present ring.
    pub fn ring(&self) -> Option<&RingCarrier> {
        self.ring.as_ref()
    }

    /// Returns true if both sides use the ring.
    pub fn running(&self) -> bool {
        let state = self.ring.as_ref().map(RingCarrier::state);
        !self.swapped && matches!(state, Some(RingState::Running { .. }))
    }

    /// The ring, if the shell knows it.
    fn known(&mut self) -> Option<&mut RingCarrier> {
        self.ring.as_mut().filter(|_| !self.swapped)
    }
}

impl Carrier for Dock {
    type Rx<'a> = RingPacket<'a>;
    type Tx<'a> = RingSlot<'a>;

    fn caps(&self) -> CarrierCaps {
        CAPS
    }

    fn begin(&mut self) {
        if let Some(ring) = self.known() {
            ring.begin();
        }
    }

    fn rx(&mut self) -> Result<Option<RingPacket<'_>>, CarrierFault> {
        self.known().map_or(Ok(None), RingCarrier::rx)
    }

    fn tx(&mut self, lane: Lane, want: u32) -> Result<Option<RingSlot<'_>>, CarrierFault> {
        self.known().map_or(Ok(None), |ring| ring.tx(lane, want))
    }

    fn write_aside(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        self.known().map_or(Ok(0), |ring| ring.write_aside(fd))
    }

    fn read_aside(&mut self, dst: &mut [u8]) -> Result<usize, CarrierFault> {
        self.known().map_or(Ok(0), |ring| ring.read_aside(dst))
    }

    fn release_aside(&mut self) {
        if let Some(ring) = self.known() {
            ring.release_aside();
        }
    }

    fn flush(&mut self) {
        if let Some(ring) = self.known() {
            ring.flush();
        }
    }

    fn insist(&mut self) {
        if let Some(ring) = self.known() {
            ring.insist();
        }
    }

    fn arm(&mut self, interest: Interest) -> Armed {
        // A replaced ring wakes the shell by the dock's own waker.
        self.known().map_or(Armed::Sleep, |ring| ring.arm(interest))
    }

    fn rest(&self) -> Option<Duration> {
        self.ring.as_ref().and_then(RingCarrier::rest)
    }

    fn glance(&mut self) -> Option<bool> {
        self.known().map_or(Some(false), RingCarrier::glance)
    }

    fn tear(&mut self) {
        if let Some(ring) = self.known() {
            ring.tear();
        }
    }

    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>, u32)) {
        visit(self.changed.as_fd(), WAKER_DOCK);
        if let Some(ring) = &self.ring {
            ring.wakers(&mut |fd, id| visit(fd, WAKER_DOCK + 1 + id));
        }
    }

    fn woken(&mut self, id: u32) -> Woken {
        if id != WAKER_DOCK {
            // The waker may belong to a ring that was removed after it became readable.
            return match self.known() {
                Some(ring) => ring.woken(id - WAKER_DOCK - 1),
                None => Woken::default(),
            };
        }
        drain(self.changed.as_fd());
        let swapped = std::mem::take(&mut self.swapped);
        Woken {
            session: swapped.then_some(SessionChange::Lost(ResetReason::CarrierFault)),
            wakers_changed: swapped,
            ..Woken::default()
        }
    }
}
