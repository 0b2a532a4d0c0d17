//! The ring as a carrier: each packet is a record in a region that two partitions share. Both sides use this carrier.
//!
//! ```text
//!  Waiting ── both sides are at RUN ──► Running ── fault here, or the peer ends it ──► Waiting, after a delay
//!     ▲                                  │
//!     └──────── a new epoch ─────────────┘     the attach protocol repeats (adit_ringbuf::session)
//! ```
//! - Lane 0 carries [`Lane::Control`], lane 1 [`Lane::Bulk`]; a region with one lane carries both on it. A stream
//!   stays on the lane on which it was requested, so its packets keep their order.
//! - A packet is a record: its header ([`PACKET_HEADER_BYTES`]), then its payload. The header is copied out once and
//!   parsed from the copy. The payload goes from the ring to a descriptor with one `sendmsg`, or is copied out once.
//!   If the peer changes the payload meanwhile, it only changes what it sent.
//! - A slot is as much of the ring as is free, with at most 64 KiB of payload. `recvmsg` fills it in place, and it is
//!   committed with the length that was filled.
//! - Space is given back in bursts. A burst publishes once and signals at most two doorbells, and only if the peer
//!   sleeps.
//! - Whatever a peer does to the ring ends only its session ([`Carrier::tear`](crate::carrier::Carrier::tear)). Its
//!   streams end with `CarrierFault`. The next session begins after 10 ms, or after up to half a second if faults
//!   repeat.

pub mod bell;
mod bells;
mod burst;
mod dock;
mod retry_delay;

use std::io;
use std::time::{Duration, Instant};

use adit_engine::{Lane, PACKET_HEADER_BYTES, ResetReason, SessionChange};
use adit_ringbuf::region::{self, Features, RegionError, Spec};
use adit_ringbuf::session::{Ends, Event, Guest, Host, Lost, Turn};
use adit_ringbuf::{Corrupt, Mapped, Pace, PushError, RingMem, Wake};
use nix::sys::eventfd::{EfdFlags, EventFd};

pub use bells::{BoxedDoorbell, BoxedWaiter, RingBells};
pub use burst::{RingPacket, RingSlot};
pub use dock::Dock;
use retry_delay::RetryDelay;

use crate::carrier::CarrierFault;
use crate::device::aside::Aside;

/// A side without doorbells polls this often while nothing arrives. Its shard may poll more often.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// If a peer changes its state more often than this in one poll, the rest waits for the next burst.
const TURNS_MAX: u32 = 4;
/// Maximum number of lanes that are used.
const LANES: usize = 2;

/// Why memory cannot be used as a region.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// This process has no free descriptors.
    #[error("no descriptor for the ring")]
    Io(#[from] io::Error),
    /// The memory is not a region that this side can use, or cannot become one.
    #[error(transparent)]
    Region(#[from] RegionError),
}

/// The state of a carrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingState {
    /// The other side has not attached yet, or has left.
    Waiting,
    /// Both sides use the ring.
    Running {
        /// Number of this attachment.
        epoch: u64,
    },
    /// The session broke; the next one begins after a delay.
    Held,
}

/// What happened on a carrier since it was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RingCounters {
    /// Number of records taken.
    pub records_in: u64,
    /// Number of records written.
    pub records_out: u64,
    /// Payload bytes that this process or the kernel copied from or to the ring.
    pub bytes_copied: u64,
    /// Number of doorbells signalled: first for data and session, then for space.
    pub rung: [u64; 2],
    /// Number of doorbell signals received.
    pub heard: u64,
    /// Sessions that began.
    pub sessions: u64,
    /// Number of sessions that ended because a side broke the ring.
    pub faults: u64,
}

#[derive(Debug)]
enum Role {
    Host(Host<Mapped>),
    Guest(Guest<Mapped>),
}

/// Size of a small record in bytes.
const SMALL: usize = PACKET_HEADER_BYTES + 256;

/// A small record in private memory.
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

impl LaneState {
    /// Puts the staged packet into the ring. It was staged only because there was room, and the room cannot have
    /// shrunk.
    #[inline]
    fn unstage(&mut self) -> Result<Wake, CarrierFault> {
        match std::mem::take(&mut self.staged.len) {
            0 => Ok(Wake::No),
            len => self.put_staged(len),
        }
    }

    fn put_staged(&mut self, len: usize) -> Result<Wake, CarrierFault> {
        match self.ends.producer.append(&self.staged.bytes[..len]) {
            Ok(wake) => Ok(wake),
            Err(PushError::Corrupt(corrupt)) => Err(corrupt.into()),
            Err(PushError::Full | PushError::TooLong { .. }) => Err(CarrierFault {
                what: "the ring has less room than before; bytes of a record",
                value: len as u64,
                limit: SMALL as u64,
            }),
        }
    }
}

/// One lane of a session.
#[derive(Debug)]
struct LaneState {
    ends: Ends<Mapped>,
    /// There was no slot.
    starved: bool,
    /// The last small packet of the burst, which is not in the ring yet. It is copied there when it is published. If
    /// it were written piece by piece, a peer that polls the record's cache lines would take each line away between
    /// two writes.
    staged: Staged,
}

/// Packets over a region of shared memory.
#[derive(Debug)]
pub struct RingCarrier {
    mem: Mapped,
    role: Role,
    bells: RingBells,
    /// The lanes of the running session: one for each `Lane`, or one for both.
    lanes: Vec<LaneState>,
    epoch: Option<u64>,
    /// Decides when a session may begin.
    retry_delay: RetryDelay,
    /// The session change that the shell has not taken yet. A later change replaces an earlier one.
    change: Option<SessionChange>,
    /// Readable while there is a session change.
    changed: EventFd,
    /// Whether the other side must be woken, for data and for space.
    data: Wake,
    space: Wake,
    /// Packets whose payload is written together.
    aside: Aside,
    /// A copy of the current record, if it is small. One copy fetches all its cache lines together.
    small: [u8; SMALL],
    /// Avoids slowing down a writer while a stream flows.
    pace: Pace,
    /// Number of records of lane control taken in a row.
    control_run: u32,
    fault: Option<CarrierFault>,
    last_fault: String,
    counters: RingCounters,
}

/// Smallest region in bytes.
pub const BYTES_MIN: usize = 3 * 4096 + 4 * 4096;

/// The best division of a region of this size: a quarter for lane control, the rest for lane bulk, and records aligned
/// to cache lines. `None` if it is too small.
pub fn spec(bytes: usize) -> Option<Spec> {
    let lane = |size| region::Lane {
        to_guest: size,
        to_host: size,
    };
    // A record of 64 KiB needs a ring of 256 KiB. A ring above 4 MiB fits into no cache.
    let sizes = (12..=22).rev().map(|log| 1usize << log);
    sizes
        .map(|bulk| {
            let mut spec = Spec::new(&[lane((bulk / 4).max(4096)), lane(bulk)]);
            // So no side polls a cache line into which the other side is writing the next record.
            spec.align = 64;
            spec
        })
        .find(|spec| spec.bytes() <= bytes)
}

impl RingCarrier {
    /// Makes a region in the memory and offers it to the guest. `epoch` must be higher than every epoch that this
    /// memory had before; the time is good enough.
    ///
    /// # Errors
    /// The memory is too small, or this process has no free descriptors.
    pub fn host(mem: Mapped, spec: Spec, epoch: u64, bells: RingBells) -> Result<Self, RingError> {
        let host = Host::offer(mem.clone(), spec, epoch)?;
        let mut carrier = Self::new(mem, Role::Host(host), bells)?;
        // Wake a guest that was waiting already, or that still uses the region that a predecessor offered.
        carrier.data = Wake::Yes;
        carrier.signal_doorbells();
        Ok(carrier)
    }

    /// Finds the region that a host made in this memory, and asks for a session. `start` must be random, so that a
    /// request of a predecessor is not mistaken for this one's. `can` is [`Features::WRAP`] if the memory maps each
    /// ring twice in a row.
    ///
    /// # Errors
    /// There is no region, or none that this side knows, or this process has no free descriptors.
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
        carrier.signal_doorbells();
        Ok(carrier)
    }

    fn new(mem: Mapped, role: Role, bells: RingBells) -> io::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Self {
            mem,
            role,
            bells,
            lanes: Vec::new(),
            epoch: None,
            retry_delay: RetryDelay::default(),
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

    /// The state of the carrier.
    pub fn state(&self) -> RingState {
        match (self.epoch, self.retry_delay.is_waiting()) {
            (Some(epoch), _) => RingState::Running { epoch },
            (None, true) => RingState::Held,
            (None, false) => RingState::Waiting,
        }
    }

    /// Returns true if this side waits on no doorbell, and so polls.
    pub fn is_deaf(&self) -> bool {
        self.bells.must_poll()
    }

    /// The last fault as text; empty if there was none.
    pub fn last_fault(&self) -> &str {
        &self.last_fault
    }

    /// Returns the counters.
    pub fn counters(&self) -> RingCounters {
        self.counters
    }

    /// Index of a lane in the session.
    fn lane_index(&self, lane: Lane) -> usize {
        match lane {
            Lane::Control => 0,
            Lane::Bulk => self.lanes.len().saturating_sub(1),
        }
    }

    /// Polls the other side's state and reacts to it.
    fn poll_session(&mut self) {
        if self.retry_delay.is_waiting() {
            if !self.retry_delay.end_if_over(Instant::now()) {
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
                        // The host was informed. Another host may come.
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
            if turn.wake == Wake::No || self.retry_delay.is_waiting() {
                break;
            }
        }
        self.signal_doorbells();
    }

    fn attached(&mut self, epoch: u64) {
        let lanes = match &self.role {
            Role::Host(host) => host.region().spec().lanes().len(),
            Role::Guest(guest) => guest.region().map_or(0, |r| r.spec().lanes().len()),
        };
        self.clear_session();
        for lane in 0..lanes.min(LANES) {
            let ends = match &self.role {
                Role::Host(host) => host.ends(lane, true).map(Some),
                Role::Guest(guest) => guest.ends(lane, true),
            };
            match ends {
                Ok(Some(ends)) => self.lanes.push(LaneState {
                    ends,
                    starved: false,
                    staged: Staged::EMPTY,
                }),
                Ok(None) => {}
                // The geometry was checked against this memory when the region was read.
                Err(e) => return self.failed(&e.to_string()),
            }
        }
        self.epoch = Some(epoch);
        self.retry_delay.began(Instant::now());
        self.counters.sessions += 1;
        self.set_change(SessionChange::Attached { epoch });
    }

    fn lost(&mut self, lost: Lost) {
        let reason = match lost {
            Lost::Restarted | Lost::Closed => ResetReason::Epoch,
            Lost::Poisoned => {
                self.failed("the other side reports that this side broke the ring");
                ResetReason::CarrierFault
            }
            Lost::Corrupt(corrupt) => {
                self.failed(&corrupt.to_string());
                ResetReason::CarrierFault
            }
        };
        if self.epoch.take().is_some() {
            self.set_change(SessionChange::Lost(reason));
        }
        self.clear_session();
        if !self.retry_delay.is_waiting()
            && let Role::Guest(guest) = &mut self.role
        {
            self.data = guest.attach();
        }
    }

    /// Drops everything of the session. From here on the memory may belong to another session.
    fn clear_session(&mut self) {
        self.lanes.clear();
        drop(self.aside.release());
        self.fault = None;
        self.control_run = 0;
    }

    /// The session broke. The next one begins after a delay.
    fn failed(&mut self, why: &str) {
        why.clone_into(&mut self.last_fault);
        self.counters.faults += 1;
        self.retry_delay.fault(Instant::now());
    }

    fn set_change(&mut self, change: SessionChange) {
        self.change = Some(change);
        // The write fails only when the counter is full, and then the eventfd is readable anyway.
        let _ = self.changed.write(1);
    }

    /// Signals the doorbells for which a wake-up is due.
    fn signal_doorbells(&mut self) {
        let owed = [&mut self.data, &mut self.space].map(|w| std::mem::replace(w, Wake::No));
        let bells = [&self.bells.data, &self.bells.space];
        for ((owed, bell), rung) in owed.into_iter().zip(bells).zip(&mut self.counters.rung) {
            if owed == Wake::No {
                continue;
            }
            *rung += 1;
            if let Err(e) = bell.ring() {
                // The peer would sleep on, so the session cannot continue.
                self.fault.get_or_insert(CarrierFault {
                    what: "cannot signal the doorbell; errno",
                    value: e.raw_os_error().unwrap_or(0) as u64,
                    limit: 0,
                });
            }
        }
    }
}

/// Size of a cache line in bytes.
const LINE: usize = 64;
/// Number of cache lines that are read to measure the memory: fewer than any cache has.
const LINES: usize = 256;

/// Measures how long it takes to read a cache line of this memory that was read before, in ns. The result is a few ns
/// for cached memory, and hundreds for uncached device memory.
pub fn line_ns(mem: &Mapped) -> u32 {
    let lines = LINES.min(RingMem::len(mem) / LINE);
    let read = || {
        let begin = Instant::now();
        for n in 0..lines {
            std::hint::black_box(mem.load(n * LINE));
        }
        begin.elapsed()
    };
    // The first round also faults in pages that were never accessed.
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
    /// Ends the session, so that the other side learns of it at once.
    fn drop(&mut self) {
        self.data = match &mut self.role {
            Role::Host(host) => host.close(),
            Role::Guest(guest) => guest.close(),
        };
        self.signal_doorbells();
    }
}
