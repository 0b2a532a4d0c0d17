//! The guest half of a ring: attach, and echo.

use core::fmt;

use adit_ringbuf::region::{Features, GUEST_WORD, RegionError};
use adit_ringbuf::session::{Event, Guest};
use adit_ringbuf::{Corrupt, GeometryError, Pace, PushError, RingMem};

/// Longest record that it echoes, bytes.
pub const RECORD_MAX: usize = 4096;
/// Looks in vain between two looks at the host's state.
pub(crate) const LOOKS: u32 = 4096;

/// The host, or its region, broke a rule.
#[derive(Debug)]
pub enum EchoError {
    /// The region is none.
    Region(RegionError),
    /// The memory does not hold what its head says.
    Geometry(GeometryError),
    /// A word of the host's that nobody may write.
    Corrupt(Corrupt),
    /// A record that is longer than this side takes, or an answer that fits no ring.
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

/// Looks for the region and waits until the host and this side use it; returns the epoch, too.
///
/// # Errors
/// There is no region that this side can use.
pub fn attach<M: RingMem + Clone>(mem: M) -> Result<(Guest<M>, u64), EchoError> {
    let mut guest = find(mem)?;
    let _ = guest.attach();
    loop {
        match guest.poll()?.event {
            Some(Event::Attached { epoch, .. }) => return Ok((guest, epoch)),
            // Whoever was here before left something that the host took for a lie.
            Some(Event::Lost(_)) => {
                let _ = guest.attach();
            }
            None => core::hint::spin_loop(),
        }
    }
}

/// Looks for the region, and counts on from the requests of whoever was here before.
///
/// # Errors
/// There is no region that this side can use.
pub fn find<M: RingMem + Clone>(mem: M) -> Result<Guest<M>, RegionError> {
    let before = mem.load(GUEST_WORD) >> 8;
    Guest::find(mem, (before + 1) << 8, Features::NONE)
}

/// Sends every record of lane 0 back, looking on all the time, until the host ends the session. Returns how many there
/// were.
///
/// # Errors
/// The host broke a rule; it was told so.
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
            if missed % LOOKS == 0
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
