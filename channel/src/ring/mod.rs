//! The ring as a carrier: packets as records in a region that two partitions share, for either side of it.
//!
//! ```text
//!  Waiting ── both sides said RUN ──► Running ── fault here, or the peer ends it ──► Waiting, a while later
//!     ▲                                  │
//!     └──────── a new epoch ─────────────┘     attach says how, again and again (adit_ringbuf::session)
//! ```
//! - Lane 0 carries [`Lane::Control`], lane 1 [`Lane::Bulk`]; a region with one lane has both on it. A stream keeps to the
//!   lane that it was asked for on, so its packets keep their order.
//! - A packet is a record: its frame ([`PACKET_HEADER_BYTES`]), then its payload. The frame is copied out once and parsed from the copy; the payload
//!   goes from the ring to a descriptor with one `sendmsg`, or is copied out once. Whatever the peer writes into it
//!   meanwhile is what it sent.
//! - A slot is as much of the ring as is free, at most 64 KiB of payload, filled in place by `recvmsg`, and committed as
//!   long as it was filled.
//! - Room is given back in bursts; a burst publishes once and rings at most two doorbells, and only who sleeps.
//! - Whatever a peer does to the ring ends the session ([`Carrier::tear`](crate::carrier::Carrier::tear)) and no other; the
//!   streams end with `CarrierFault`. The next session begins after 10 ms, after repeated faults up to half a second later.

pub mod bell;
mod bells;
mod burst;
mod dock;
mod hold;

use std::io;
use std::time::{Duration, Instant};

use adit_engine::{Lane, PACKET_HEADER_BYTES, ResetReason, SessionChange};
use adit_ringbuf::region::{self, Features, RegionError, Spec};
use adit_ringbuf::session::{Ends, Event, Guest, Host, Lost, Turn};
use adit_ringbuf::{Corrupt, Mapped, Pace, PushError, RingMem, Wake};
use nix::sys::eventfd::{EfdFlags, EventFd};

pub use bells::{Hear, Ring, RingBells};
pub use burst::{RingPacket, RingSlot};
pub use dock::Dock;
use hold::Hold;

use crate::carrier::CarrierFault;
use crate::device::aside::Aside;

/// A side that hears no doorbell looks so often while nothing comes; its shard may look on in between.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// A peer that changes its mind faster than this is looked at again in the next burst.
const TURNS_MAX: u32 = 4;
/// Lanes that are used.
const LANES: usize = 2;

/// A region of this memory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// There is no descriptor to be had.
    #[error("no descriptor for the ring")]
    Io(#[from] io::Error),
    /// It is no region that this side can use, or cannot become one.
    #[error(transparent)]
    Region(#[from] RegionError),
}

/// How a carrier is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingState {
    /// The other side is not there yet, or not any more.
    Waiting,
    /// Both sides use it.
    Running {
        /// Which attachment this is.
        epoch: u64,
    },
    /// It broke; the next session begins soon.
    Held,
}

/// What happened on a carrier since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RingCounters {
    /// Records taken.
    pub records_in: u64,
    /// Records written.
    pub records_out: u64,
    /// Payload bytes copied from or to the ring, by us or by the kernel.
    pub bytes_copied: u64,
    /// Doorbells rung: data and session, space.
    pub rung: [u64; 2],
    /// Doorbells heard.
    pub heard: u64,
    /// Sessions that began.
    pub sessions: u64,
    /// Sessions that ended because a side broke the ring.
    pub faults: u64,
}

#[derive(Debug)]
enum Role {
    Host(Host<Mapped>),
    Guest(Guest<Mapped>),
}

/// Bytes of a small record.
const SMALL: usize = PACKET_HEADER_BYTES + 256;

/// A small record of this process's own.
#[derive(Debug)]
struct Staged {
    len: usize,
    bytes: [u8; SMALL],
}

impl Staged {
    const EMPTY: Self = Self {
        len: 0,
        bytes: [0; SMALL],
    };
}

impl Way {
    /// Puts the staged packet into the ring: it was staged because there was room, and there is no less of it.
    #[inline]
    fn unstage(&mut self) -> Result<Wake, CarrierFault> {
        match std::mem::take(&mut self.staged.len) {
            0 => Ok(Wake::No),
            len => self.put_staged(len),
        }
    }

    fn put_staged(&mut self, len: usize) -> Result<Wake, CarrierFault> {
        match self.ends.producer.reserve(len) {
            Ok(mut grant) => {
                grant.write(0, &self.staged.bytes[..len]);
                Ok(grant.commit())
            }
            Err(PushError::Corrupt(corrupt)) => Err(corrupt.into()),
            Err(PushError::Full | PushError::TooLong { .. }) => Err(CarrierFault {
                what: "ring has less room than it had; bytes of a record",
                value: len as u64,
                limit: SMALL as u64,
            }),
        }
    }
}

/// One lane of a session.
#[derive(Debug)]
struct Way {
    ends: Ends<Mapped>,
    /// There was no slot.
    starved: bool,
    /// The last small packet of the burst, not in the ring yet: it goes there when it is shown, for whoever polls the lines
    /// of a record that is written piece by piece takes each of them away from its writer in between.
    staged: Staged,
}

/// Packets over a region of shared memory.
#[derive(Debug)]
pub struct RingCarrier {
    mem: Mapped,
    role: Role,
    bells: RingBells,
    /// Of the running session: both lanes, or one for both.
    ways: Vec<Way>,
    epoch: Option<u64>,
    /// When there may be no session.
    hold: Hold,
    /// What the shell was not told yet; a later change makes an earlier one void.
    change: Option<SessionChange>,
    /// Readable while there is a change to tell.
    changed: EventFd,
    /// Doorbells owed to the other side.
    data: Wake,
    space: Wake,
    /// Packets whose payload goes out together.
    aside: Aside,
    /// The record in hand, if it is small: copied whole, its lines come together.
    small: [u8; SMALL],
    /// Keeps out of a writer's way while a stream flows.
    pace: Pace,
    /// Records of lane control taken in a row.
    control_run: u32,
    fault: Option<CarrierFault>,
    last_fault: String,
    counters: RingCounters,
}

/// Bytes of a region at least.
pub const BYTES_MIN: usize = 3 * 4096 + 4 * 4096;

/// What a region of so many bytes is best divided into: a quarter for lane control, the rest for lane bulk, records at whole
/// lines. `None`: it is too small.
pub fn spec(bytes: usize) -> Option<Spec> {
    let lane = |size| region::Lane {
        to_guest: size,
        to_host: size,
    };
    // A record of 64 KiB needs a ring of 256 KiB; what is above 4 MiB falls out of every cache.
    let sizes = (12..=22).rev().map(|log| 1usize << log);
    sizes
        .map(|bulk| {
            let mut spec = Spec::new(&[lane((bulk / 4).max(4096)), lane(bulk)]);
            // Nobody polls a line that the other side is writing the next record to.
            spec.align = 64;
            spec
        })
        .find(|spec| spec.bytes() <= bytes)
}

impl RingCarrier {
    /// Makes memory a region, and offers it to the guest that has it. `epoch`: above every one that this memory had; the
    /// time will do.
    ///
    /// # Errors
    /// The memory is too small, or there are no descriptors left.
    pub fn host(mem: Mapped, spec: Spec, epoch: u64, bells: RingBells) -> Result<Self, RingError> {
        let host = Host::offer(mem.clone(), spec, epoch)?;
        let mut carrier = Self::new(mem, Role::Host(host), bells)?;
        // A guest that waits since before we came, or still uses what a predecessor of ours offered.
        carrier.data = Wake::Yes;
        carrier.ring();
        Ok(carrier)
    }

    /// Finds the region that a host made of this memory, and asks for a session. `start`: random, so that what a
    /// predecessor asked is not taken for it. `can`: [`Features::WRAP`] if the memory maps each ring twice in a row.
    ///
    /// # Errors
    /// There is no region, or none that this side knows; there are no descriptors left.
    pub fn guest(
        mem: Mapped,
        start: u64,
        can: Features,
        bells: RingBells,
    ) -> Result<Self, RingError> {
        let mut guest = Guest::find(mem.clone(), start, can)?;
        let data = guest.attach();
        let mut carrier = Self::new(mem, Role::Guest(guest), bells)?;
        carrier.data = data;
        carrier.ring();
        Ok(carrier)
    }

    fn new(mem: Mapped, role: Role, bells: RingBells) -> io::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Self {
            mem,
            role,
            bells,
            ways: Vec::new(),
            epoch: None,
            hold: Hold::default(),
            change: None,
            changed: EventFd::from_flags(flags)?,
            data: Wake::No,
            space: Wake::No,
            aside: Aside::default(),
            small: [0; SMALL],
            pace: Pace::default(),
            control_run: 0,
            fault: None,
            last_fault: String::new(),
            counters: RingCounters::default(),
        })
    }

    /// How it is.
    pub fn state(&self) -> RingState {
        match (self.epoch, self.hold.is_on()) {
            (Some(epoch), _) => RingState::Running { epoch },
            (None, true) => RingState::Held,
            (None, false) => RingState::Waiting,
        }
    }

    /// Tells whether it hears no doorbell, and so looks by itself.
    pub fn is_deaf(&self) -> bool {
        self.bells.deaf()
    }

    /// What broke last, for people; empty if nothing did.
    pub fn last_fault(&self) -> &str {
        &self.last_fault
    }

    /// Returns the counters.
    pub fn counters(&self) -> RingCounters {
        self.counters
    }

    /// Index of a lane's ring.
    fn way(&self, lane: Lane) -> usize {
        match lane {
            Lane::Control => 0,
            Lane::Bulk => self.ways.len().saturating_sub(1),
        }
    }

    /// Looks at the other side's state, and goes along.
    fn look(&mut self) {
        if self.hold.is_on() {
            if !self.hold.ends(Instant::now()) {
                return;
            }
            if let Role::Guest(guest) = &mut self.role {
                self.data = guest.attach();
            }
        }
        for _ in 0..TURNS_MAX {
            let turn = match &mut self.role {
                Role::Host(host) => host.poll(),
                Role::Guest(guest) => match guest.poll() {
                    Ok(turn) => turn,
                    Err(e) => {
                        // It was told; another host may come.
                        self.failed(&e.to_string());
                        Turn {
                            event: None,
                            wake: Wake::Yes,
                        }
                    }
                },
            };
            self.data = self.data.or(turn.wake);
            match turn.event {
                Some(Event::Attached { epoch, .. }) => self.attached(epoch),
                Some(Event::Lost(lost)) => self.lost(lost),
                None => {}
            }
            if turn.wake == Wake::No || self.hold.is_on() {
                break;
            }
        }
        self.ring();
    }

    fn attached(&mut self, epoch: u64) {
        let lanes = match &self.role {
            Role::Host(host) => host.region().spec().lanes().len(),
            Role::Guest(guest) => guest.region().map_or(0, |r| r.spec().lanes().len()),
        };
        self.forget();
        for lane in 0..lanes.min(LANES) {
            let ends = match &self.role {
                Role::Host(host) => host.ends(lane, true).map(Some),
                Role::Guest(guest) => guest.ends(lane, true),
            };
            match ends {
                Ok(Some(ends)) => self.ways.push(Way {
                    ends,
                    starved: false,
                    staged: Staged::EMPTY,
                }),
                Ok(None) => {}
                // Geometry was checked against this very memory when the region was read.
                Err(e) => return self.failed(&e.to_string()),
            }
        }
        self.epoch = Some(epoch);
        self.hold.began(Instant::now());
        self.counters.sessions += 1;
        self.tell(SessionChange::Attached { epoch });
    }

    fn lost(&mut self, lost: Lost) {
        let reason = match lost {
            Lost::Restarted | Lost::Closed => ResetReason::Epoch,
            Lost::Poisoned => {
                self.failed("the other side says that this one broke the ring");
                ResetReason::CarrierFault
            }
            Lost::Corrupt(corrupt) => {
                self.failed(&corrupt.to_string());
                ResetReason::CarrierFault
            }
        };
        if self.epoch.take().is_some() {
            self.tell(SessionChange::Lost(reason));
        }
        self.forget();
        if !self.hold.is_on()
            && let Role::Guest(guest) = &mut self.role
        {
            self.data = guest.attach();
        }
    }

    /// Ends what the session had; its memory is another session's from here on.
    fn forget(&mut self) {
        self.ways.clear();
        drop(self.aside.release());
        self.fault = None;
        self.control_run = 0;
    }

    /// The session broke: there is none for a while.
    fn failed(&mut self, why: &str) {
        why.clone_into(&mut self.last_fault);
        self.counters.faults += 1;
        self.hold.fault(Instant::now());
    }

    fn tell(&mut self, change: SessionChange) {
        self.change = Some(change);
        // Fails only when 2^64 - 2 changes are pending: it is readable.
        let _ = self.changed.write(1);
    }

    /// Rings what is owed.
    fn ring(&mut self) {
        let owed = [&mut self.data, &mut self.space].map(|w| std::mem::replace(w, Wake::No));
        let bells = [&self.bells.data, &self.bells.space];
        for ((owed, bell), rung) in owed.into_iter().zip(bells).zip(&mut self.counters.rung) {
            if owed == Wake::No {
                continue;
            }
            *rung += 1;
            if let Err(e) = bell.ring() {
                // Whoever it should wake sleeps on: no session can go on like this.
                self.fault.get_or_insert(CarrierFault {
                    what: "doorbell cannot be rung; errno",
                    value: e.raw_os_error().unwrap_or(0) as u64,
                    limit: 0,
                });
            }
        }
    }
}

/// Bytes of a cache line.
const LINE: usize = 64;
/// Lines that are read to see how far away memory is: fewer than any cache has.
const LINES: usize = 256;

/// Measures how long a read of a line of this memory takes once it was read before, ns: a few where it is cached, hundreds
/// where it is a device's.
pub fn line_ns(mem: &Mapped) -> u32 {
    let lines = LINES.min(RingMem::len(mem) / LINE);
    let read = || {
        let begin = Instant::now();
        for n in 0..lines {
            std::hint::black_box(mem.load(n * LINE));
        }
        begin.elapsed()
    };
    // The first finds pages that were never touched.
    let best = (0..4).map(|_| read()).min().unwrap_or_default();
    let ns = best.as_nanos() / lines.max(1) as u128;
    u32::try_from(ns).unwrap_or(u32::MAX)
}

impl From<Corrupt> for CarrierFault {
    fn from(Corrupt { what, value, limit }: Corrupt) -> Self {
        Self { what, value, limit }
    }
}

impl Drop for RingCarrier {
    /// The other side need not find out by itself.
    fn drop(&mut self) {
        self.data = match &mut self.role {
            Role::Host(host) => host.close(),
            Role::Guest(guest) => guest.close(),
        };
        self.ring();
    }
}
