//! A carrier of whichever way to the guest there is (`carrier = "auto"`).
//!
//! ```text
//!                 ┌─ VhostUserCarrier ── vhost.sock
//!  engine ─ Auto ─┼─ Foreign ── doorkeeper of the CID in the host's kernel
//!   one at a time └─ Foreign ── doorkeeper of v.sock
//! ```
//! [`ways`](crate::ways) decides, whenever a VMM has come or gone and when the last stream of a way that was kept has ended. The shell sees one carrier, and one
//! session after the other. What a guest dials over a way that is not taken is closed, and the guest dials again.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use adit_channel::carrier::{Armed, Carrier, CarrierCaps, CarrierFault, Interest, Woken};
use adit_channel::either::Either;
use adit_channel::foreign::{Door, Foreign, ForeignPacket, ForeignSlot};
use adit_channel::vhost_user::VhostUserCarrier;
use adit_engine::{Lane, ResetReason, SessionChange};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::ways::{Choice, Found, There, Way, choose};

/// Waker ids of each part are below this.
const IDS: u32 = 1 << 8;
const WAKER_CHANGED: u32 = 0;

/// The carrier of a device that a VMM connects to.
pub trait Device: Carrier {
    /// Whether one is connected.
    fn has_vmm(&self) -> bool;
}

impl Device for VhostUserCarrier {
    fn has_vmm(&self) -> bool {
        self.has_frontend()
    }
}

/// What [`Auto`] has found and taken, for whoever tells people.
#[derive(Clone, Debug, Default)]
pub struct Ways(Arc<Mutex<Said>>);

#[derive(Debug, Default)]
struct Said {
    found: Found,
    busy: Option<Way>,
}

impl Ways {
    /// What is taken, and why. `ring`: both sides use one.
    pub fn choice(&self, ring: bool) -> (Choice, String) {
        let said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = Found {
            ring,
            ..said.found.clone()
        };
        let choice = choose(found.there(), said.busy);
        (choice, found.why(choice))
    }

    fn set(&self, found: Found, busy: Option<Way>) {
        let said = Said { found, busy };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = said;
    }
}

/// One of several carriers.
pub struct Auto<V, D> {
    device: V,
    kernel: Option<Foreign<D>>,
    hybrid: Option<Foreign<D>>,
    way: Option<Way>,
    /// The shell knows of a session over [`way`](Self::way).
    attached: bool,
    /// A session of the device that the shell was not told of.
    waits: Option<SessionChange>,
    /// Only its streams keep the present way.
    kept: bool,
    epoch: u64,
    /// Rung when a session is to begin right behind the end of another, or when the last stream of a way that was kept has ended: only
    /// a waker can tell the shell.
    changed: EventFd,
    ways: Ways,
}

impl<V: Device, D: Door> Auto<V, D> {
    /// Makes the carrier. Its sessions are numbered from `first_epoch` on.
    ///
    /// # Errors
    /// This process has no free descriptors.
    pub fn new(
        device: V,
        kernel: Option<Foreign<D>>,
        hybrid: Option<Foreign<D>>,
        first_epoch: u64,
    ) -> io::Result<Self> {
        let auto = Self {
            device,
            kernel,
            hybrid,
            way: None,
            attached: false,
            waits: None,
            kept: false,
            epoch: first_epoch,
            changed: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            ways: Ways::default(),
        };
        auto.note();
        Ok(auto)
    }

    /// What it has found and taken.
    pub fn ways(&self) -> Ways {
        self.ways.clone()
    }

    fn foreign(&mut self, way: Way) -> Option<&mut Foreign<D>> {
        match way {
            Way::VhostUser => None,
            Way::Kernel => self.kernel.as_mut(),
            Way::Hybrid => self.hybrid.as_mut(),
        }
    }

    fn there(&self) -> There {
        let is_there = |of: &Option<Foreign<D>>| of.as_ref().is_some_and(Foreign::is_there);
        There {
            ring: false,
            // Its session is told to have ended a moment after it has gone.
            vhost_user: self.device.has_vmm()
                || self.waits.is_some()
                || self.attached && self.way == Some(Way::VhostUser),
            kernel: is_there(&self.kernel),
            hybrid: is_there(&self.hybrid),
        }
    }

    /// The present way, if it has open streams. Those of a device end with its VMM, and nothing comes before it.
    fn busy(&mut self) -> Option<Way> {
        let way = self.way?;
        let foreign = self.foreign(way)?;
        (foreign.streams() > 0).then_some(way)
    }

    /// Notes what was found and taken.
    fn note(&self) {
        let missing = |of: &Option<Foreign<D>>| match of {
            None => Some(String::new()),
            Some(foreign) => foreign.obstacle(),
        };
        let found = Found {
            ring: false,
            vhost_user: self.there().vhost_user,
            kernel: missing(&self.kernel),
            hybrid: missing(&self.hybrid),
        };
        self.ways.set(found, self.way.filter(|_| self.attached));
    }

    /// Has the part of this number handle its waker.
    fn part_woken(&mut self, part: u32, id: u32) -> Woken {
        let (way, woken) = match part {
            1 => (Way::VhostUser, self.device.woken(id)),
            2 => (Way::Kernel, woken(&mut self.kernel, id)),
            _ => (Way::Hybrid, woken(&mut self.hybrid, id)),
        };
        if self.way == Some(way) {
            if let Some(change) = woken.session {
                self.attached = !matches!(change, SessionChange::Lost(_));
                if way == Way::VhostUser {
                    // It is newer than one that waits.
                    self.waits = None;
                }
            }
            return woken;
        }
        match self.foreign(way) {
            // What its guest has dialled is closed.
            Some(foreign) => foreign.tear(),
            None => match woken.session {
                Some(SessionChange::Lost(_)) => self.waits = None,
                Some(change) => self.waits = Some(change),
                None => {}
            },
        }
        Woken {
            session: None,
            ..woken
        }
    }

    /// Takes the way that is due. Returns true if it is another one.
    fn decide(&mut self, was_attached: bool, session: &mut Option<SessionChange>) -> bool {
        let (there, busy) = (self.there(), self.busy());
        let way = choose(there, busy).way;
        self.kept = choose(there, None).way != way;
        let changes = way != self.way;
        if changes {
            tracing::info!(from = ?self.way, to = ?way, "another way to the guest");
            if let Some(foreign) = self.way.and_then(|old| self.foreign(old)) {
                foreign.tear();
            }
            *session = match *session {
                Some(SessionChange::Lost(reason)) => Some(SessionChange::Lost(reason)),
                // One that began with this waker was not told, and is not.
                _ => Some(SessionChange::Lost(ResetReason::Epoch)),
            };
            *session = session.filter(|_| was_attached);
            (self.way, self.attached) = (way, false);
        }
        if !self.attached && session.is_none() {
            *session = self.begin();
        } else if changes {
            // Behind the end that is told now. It fails only when it is rung already.
            let _ = self.changed.write(1);
        }
        changes
    }

    /// Begins the session of the present way, if it has one.
    fn begin(&mut self) -> Option<SessionChange> {
        let session = match self.way? {
            Way::VhostUser => self.waits.take(),
            way => self.foreign(way)?.session(),
        };
        self.attached = session.is_some_and(|s| !matches!(s, SessionChange::Lost(_)));
        session
    }

    /// The same change with a number of this carrier's own.
    fn numbered(&mut self, change: SessionChange) -> SessionChange {
        let epoch = self.epoch;
        let change = match change {
            SessionChange::Attached { .. } => SessionChange::Attached { epoch },
            SessionChange::Continued { .. } => SessionChange::Continued { epoch },
            SessionChange::Restored { .. } => SessionChange::Restored { epoch },
            SessionChange::Lost(reason) => return SessionChange::Lost(reason),
        };
        self.epoch += 1;
        change
    }

    /// The way of a session that the shell knows of.
    fn now(&self) -> Option<Way> {
        self.way.filter(|_| self.attached)
    }
}

fn woken<D: Door>(of: &mut Option<Foreign<D>>, id: u32) -> Woken {
    of.as_mut().map(|f| f.woken(id)).unwrap_or_default()
}

/// Calls the same method of the present way's carrier.
macro_rules! present {
    ($auto:expr, $inner:ident => $do:expr, $none:expr) => {
        match $auto.now() {
            None => $none,
            Some(Way::VhostUser) => {
                let $inner = &mut $auto.device;
                $do
            }
            Some(way) => match $auto.foreign(way) {
                Some($inner) => $do,
                None => $none,
            },
        }
    };
}

impl<V: Device, D: Door> Carrier for Auto<V, D> {
    type Rx<'a>
        = Either<V::Rx<'a>, ForeignPacket<'a>>
    where
        Self: 'a;
    type Tx<'a>
        = Either<V::Tx<'a>, ForeignSlot<'a, D>>
    where
        Self: 'a;

    /// The engine's configuration is made of the device's, which has more rules.
    fn caps(&self) -> CarrierCaps {
        let foreign = match self.now() {
            None | Some(Way::VhostUser) => None,
            Some(Way::Kernel) => self.kernel.as_ref(),
            Some(Way::Hybrid) => self.hybrid.as_ref(),
        };
        foreign.map_or_else(|| self.device.caps(), Carrier::caps)
    }

    fn hello_features(&self) -> u64 {
        match self.now() {
            None => 0,
            Some(Way::VhostUser) => self.device.hello_features(),
            Some(Way::Kernel) => self.kernel.as_ref().map_or(0, Carrier::hello_features),
            Some(Way::Hybrid) => self.hybrid.as_ref().map_or(0, Carrier::hello_features),
        }
    }

    fn begin(&mut self) {
        present!(self, carrier => carrier.begin(), {});
    }

    fn rx(&mut self) -> Result<Option<Self::Rx<'_>>, CarrierFault> {
        Ok(match self.now() {
            None => None,
            Some(Way::VhostUser) => self.device.rx()?.map(Either::Left),
            Some(way) => match self.foreign(way) {
                Some(foreign) => foreign.rx()?.map(Either::Right),
                None => None,
            },
        })
    }

    fn tx(&mut self, lane: Lane, want: u32) -> Result<Option<Self::Tx<'_>>, CarrierFault> {
        Ok(match self.now() {
            None => None,
            Some(Way::VhostUser) => self.device.tx(lane, want)?.map(Either::Left),
            Some(way) => match self.foreign(way) {
                Some(foreign) => foreign.tx(lane, want)?.map(Either::Right),
                None => None,
            },
        })
    }

    fn write_aside(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        present!(self, carrier => carrier.write_aside(fd), Ok(0))
    }

    fn read_aside(&mut self, dst: &mut [u8]) -> Result<usize, CarrierFault> {
        present!(self, carrier => carrier.read_aside(dst), Ok(0))
    }

    fn release_aside(&mut self) {
        present!(self, carrier => carrier.release_aside(), {});
    }

    fn flush(&mut self) {
        present!(self, carrier => carrier.flush(), {});
    }

    fn insist(&mut self) {
        present!(self, carrier => carrier.insist(), {});
    }

    fn arm(&mut self, interest: Interest) -> Armed {
        if self.kept && self.busy().is_none() {
            self.kept = false;
            // It fails only when it is rung already.
            let _ = self.changed.write(1);
        }
        present!(self, carrier => carrier.arm(interest), Armed::Sleep)
    }

    fn rest(&self) -> Option<Duration> {
        match self.now() {
            Some(Way::VhostUser) => self.device.rest(),
            _ => None,
        }
    }

    fn is_paused(&self) -> bool {
        self.now() == Some(Way::VhostUser) && self.device.is_paused()
    }

    /// Without any way there is nothing that fails: [`Ways`] says what is looked for.
    fn obstacle(&self) -> Option<String> {
        match self.way? {
            Way::VhostUser => self.device.obstacle(),
            Way::Kernel => self.kernel.as_ref()?.obstacle(),
            Way::Hybrid => self.hybrid.as_ref()?.obstacle(),
        }
    }

    fn glance(&mut self) -> Option<bool> {
        present!(self, carrier => carrier.glance(), None)
    }

    fn tear(&mut self) {
        present!(self, carrier => carrier.tear(), {});
        self.attached = false;
    }

    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>, u32)) {
        visit(self.changed.as_fd(), WAKER_CHANGED);
        self.device.wakers(&mut |fd, id| visit(fd, IDS + id));
        for (n, foreign) in [(2, &self.kernel), (3, &self.hybrid)] {
            if let Some(foreign) = foreign {
                foreign.wakers(&mut |fd, id| visit(fd, n * IDS + id));
            }
        }
    }

    fn woken(&mut self, id: u32) -> Woken {
        let was_attached = self.attached;
        let mut woken = match id {
            WAKER_CHANGED => {
                // It fails only when it is not rung.
                let _ = self.changed.read();
                Woken::default()
            }
            id => self.part_woken(id / IDS, id % IDS),
        };
        let mut session = woken.session.take();
        woken.obstacle_changed |= self.decide(was_attached, &mut session);
        woken.session = session.map(|change| self.numbered(change));
        if woken.session.is_some() || woken.obstacle_changed {
            self.note();
        }
        woken
    }
}

#[cfg(test)]
mod tests;
