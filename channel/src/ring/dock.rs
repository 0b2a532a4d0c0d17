//! A carrier that has a ring or none: VMMs come with one and go while its port stays in its shard.
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

/// Waker of the dock itself; the ring's come behind it.
const WAKER_DOCK: u32 = 0;

/// A ring, or none.
#[derive(Debug)]
pub struct Dock {
    ring: Option<RingCarrier>,
    /// Another one is in it than the shell was told, and it had a session or might have.
    swapped: bool,
    changed: EventFd,
}

impl Dock {
    /// An empty one.
    ///
    /// # Errors
    /// There is no descriptor to be had.
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Self {
            ring: None,
            swapped: false,
            changed: EventFd::from_flags(flags)?,
        })
    }

    /// Puts a ring in, in place of the one that is there.
    pub fn dock(&mut self, ring: RingCarrier) {
        self.swap(Some(ring));
    }

    /// Takes the ring out: its streams end with `CarrierFault`.
    pub fn undock(&mut self) {
        self.swap(None);
    }

    fn swap(&mut self, ring: Option<RingCarrier>) {
        if self.ring.is_none() && ring.is_none() {
            return;
        }
        self.ring = ring;
        self.swapped = true;
        // Fails only when 2^64 - 2 changes are pending: it is readable.
        let _ = self.changed.write(1);
    }

    /// The ring that is in it.
    pub fn ring(&self) -> Option<&RingCarrier> {
        self.ring.as_ref()
    }

    /// Whether both sides use it.
    pub fn running(&self) -> bool {
        let state = self.ring.as_ref().map(RingCarrier::state);
        !self.swapped && matches!(state, Some(RingState::Running { .. }))
    }

    /// The ring that the shell knows of.
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

    fn arm(&mut self, interest: Interest) -> Armed {
        // A swap wakes by itself.
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
            // One that is not there any more may have rung before it went.
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
        }
    }
}
