//! The guest's side of a ring: attaches, and echoes records.

use core::fmt;

use adit_ringbuf::region::{Features, GUEST_WORD, RegionError};
use adit_ringbuf::session::{Event, Guest};
use adit_ringbuf::{Corrupt, GeometryError, Pace, PushError, RingMem};

/// Longest record that [`echo`] accepts, bytes.
pub const RECORD_MAX: usize = 4096;
/// Polls without a record before the host's state is checked.
pub(crate) const POLLS_PER_CHECK: u32 = 4096;

/// The host, or its region, broke a rule.
#[derive(Debug)]
pub enum EchoError {
    /// The region is invalid.
    Region(RegionError),
    /// The memory is smaller than the region's head says.
    Geometry(GeometryError),
    /// The host wrote an invalid word.
    Corrupt(Corrupt),
    /// A record is longer than this side accepts, or an answer does not fit the ring.
    Record(PushError),
}

impl fmt::Display for EchoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Region(e) => e.fmt(f),
            Self::Geometry(e) => e.fmt(f),
            Self::Corrupt(e) => e.fmt(f),
            Self::Record(e) => e.fmt(f),
        }
    }
}

impl From<RegionError> for EchoError {
    fn from(e: RegionError) -> Self {
        Self::Region(e)
    }
}
impl From<GeometryError> for EchoError {
    fn from(e: GeometryError) -> Self {
        Self::Geometry(e)
    }
}
impl From<Corrupt> for EchoError {
    fn from(e: Corrupt) -> Self {
        Self::Corrupt(e)
    }
}

/// Finds the region and waits until a session begins. Returns the session's epoch as well.
///
/// # Errors
/// This side cannot use the region.
pub fn attach<M: RingMem + Clone>(mem: M) -> Result<(Guest<M>, u64), EchoError> {
    let mut guest = find(mem)?;
    let _ = guest.attach();
    loop {
        match guest.poll()?.event {
            Some(Event::Attached { epoch, .. }) => return Ok((guest, epoch)),
            // The guest before this one left words that the host rejected: ask again.
            Some(Event::Lost(_)) => {
                let _ = guest.attach();
            }
            None => core::hint::spin_loop(),
        }
    }
}

/// Finds the region. The new guest's requests count on from those of the guest before it.
///
/// # Errors
/// This side cannot use the region.
pub fn find<M: RingMem + Clone>(mem: M) -> Result<Guest<M>, RegionError> {
    let before = mem.load(GUEST_WORD) >> 8;
    Guest::find(mem, (before + 1) << 8, Features::NONE)
}

/// Echoes every record of lane 0 until the host ends the session. Never sleeps: it polls. Returns the number of records.
///
/// # Errors
/// The host broke a rule. This side has reported that to the host.
pub fn echo<M: RingMem + Clone>(mem: M) -> Result<u64, EchoError> {
    let (mut guest, _) = attach(mem)?;
    let Some(mut ends) = guest.ends(0, false)? else {
        return Ok(0);
    };
    let (mut record, mut pace, mut count) = ([0; RECORD_MAX], Pace::default(), 0);
    loop {
        let mut missed = 0;
        let len = loop {
            if let Some(len) = ends.consumer.pop(&mut record)? {
                break len;
            }
            let _ = ends.consumer.release();
            pace.missed();
            missed += 1;
            if missed % POLLS_PER_CHECK == 0
                && let Some(Event::Lost(_)) = guest.poll()?.event
            {
                return Ok(count);
            }
        };
        pace.came(len);
        if ends.consumer.wants_release() {
            let _ = ends.consumer.release();
        }
        loop {
            match ends.producer.try_push(&record[..len]) {
                Ok(_) => break,
                Err(PushError::Full) => core::hint::spin_loop(),
                Err(e) => return Err(EchoError::Record(e)),
            }
        }
        let _ = ends.producer.publish();
        count += 1;
    }
}
