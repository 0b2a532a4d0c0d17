//! A ring of records in memory that two partitions share: one producer, one consumer, no locks, no read-modify-write,
//! and no trust. Everything that the other side can write is fetched once, checked, and then either used or the end of
//! the ring ([`Corrupt`]).
//!
//! # Layout of one direction
//!
//! Offsets are the caller's ([`Geometry`]); each word has one writer.
//!
//! | word | size | writer | reader | ordering | valid |
//! |---|---|---|---|---|---|
//! | record header | 8, at every record | producer | consumer | stored Release, loaded Acquire | [`layout`] |
//! | `cons` | 8 | consumer | producer | stored Release, loaded Acquire | from the last value seen to what was produced |
//! | `data_wake_at` | 8 | consumer | producer | relaxed, around SeqCst fences | any: a wrong one costs its writer its wake-up |
//! | `space_wake_at` | 8 | producer | consumer | likewise | likewise |
//!
//! Positions are bytes since the ring began, and never wrap in practice (u64). A record is a header, its bytes, and
//! padding to the alignment (8 or 64 bytes); it never wraps: a pad record fills the end of the ring.
//!
//! ```text
//! produce   zero the header behind the record │ bytes │ header of the record, Release
//!           (a batch: every header but the first one as it comes, the first one last: one Release store shows all)
//! consume   header, Acquire: 0 = nothing yet │ check │ copy out │ `cons`, Release
//! ```
//! The committed header in band is the only thing a consumer waits for, so a record that fits a cache line with its
//! header costs one line transfer.
//!
//! # Why this layout
//!
//! The other one that a ring of records could have publishes the producer's position in a line of its own. `cargo xtask
//! bench ring` measures both (its `published index` is unchecked, at its best). Two processes on two cores of an Intel Xeon,
//! medians of 15 rounds, in band against published: 64 bytes one by one 2.9x, in batches of 32 0.6x, round trip of 64
//! bytes 0.45x of the time. One line a record decides what a channel is used for most, an answer; and a batch is still ahead
//! of every other ring there.
//!
//! # Sleeping
//!
//! Who wants to sleep stores the position at which it wants to be woken, fences, and looks again; who moves a position
//! over it fences, loads it, and returns [`Wake::Yes`]. Neither ever sleeps over something that is there (R9, loom).
//!
//! # What the ring does not promise
//!
//! Fairness, and that a peer reads. A peer that stops fills the ring: `Full`. A peer that lies ends it: `Corrupt`. The
//! bytes of a record are what the peer wrote at the time of copying; they are copied out before anybody looks at them.
#![cfg_attr(not(feature = "std"), no_std)]

use core::fmt;

mod consumer;
pub mod layout;
mod mem;
mod pace;
mod producer;
pub mod region;
pub mod session;

pub use consumer::{Consumer, Record};
#[cfg(feature = "std")]
pub use mem::{Mapped, MemfdError};
pub use mem::{Raw, RingMem};
pub use pace::Pace;
pub use producer::{Grant, Producer, PushError};

mod policy {
    /// Whether the peer's words are held against the ring. Nobody but a bench may say no.
    pub trait Policy: Send + Sync + 'static {
        #[doc(hidden)]
        const CHECKED: bool;
    }
}

pub use policy::Policy;

/// The peer is hostile: what it writes is checked.
#[derive(Debug)]
pub enum Validated {}

#[doc(hidden)] // what the checks cost is measured against it
#[derive(Debug)]
pub enum Unchecked {}

impl Policy for Validated {
    const CHECKED: bool = true;
}

impl Policy for Unchecked {
    const CHECKED: bool = false;
}

/// Whether the other side must be woken: ring its doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a sleeping peer is woken by its doorbell only"]
pub enum Wake {
    /// It is awake, or polls.
    No,
    /// It asked to be woken for this.
    Yes,
}

impl Wake {
    /// Either of two.
    pub fn or(self, other: Self) -> Self {
        if self == Self::Yes { self } else { other }
    }
}

/// Whether it is safe to sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Armed {
    /// Nothing is there: the doorbell will ring.
    Sleep,
    /// It came in between: look again.
    Ready,
}

/// The other side broke the ring: its fault. Nothing more is read or written; only a new epoch helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Corrupt {
    /// Which field or rule.
    pub what: &'static str,
    /// What the peer wrote.
    pub value: u64,
    /// What it may be at most.
    pub limit: u64,
}

/// The memory is too small or misaligned for a ring: the caller's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeometryError {
    /// Which field.
    pub what: &'static str,
    /// Its value.
    pub value: u64,
    /// What it may be.
    pub limit: u64,
}

impl fmt::Display for Corrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, value, limit } = self;
        write!(f, "ring is corrupt: {what} {value:#x} (limit {limit:#x})")
    }
}

impl fmt::Display for GeometryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, value, limit } = self;
        write!(f, "no ring fits: {what} is {value:#x} (limit {limit:#x})")
    }
}

impl core::error::Error for Corrupt {}
impl core::error::Error for GeometryError {}

/// Where one direction lies in its memory, bytes from the beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Records: a multiple of `align`.
    pub data: usize,
    /// Bytes of records: a power of two.
    pub size: usize,
    /// Alignment of records: 8, or 64 to give each its own cache lines.
    pub align: usize,
    /// The consumer's position, in memory that only the consumer writes.
    pub cons: usize,
    /// Where the consumer wants to be woken, likewise.
    pub data_wake_at: usize,
    /// Where the producer wants to be woken, in memory that only the producer writes.
    pub space_wake_at: usize,
    /// Longest record, bytes: at most [`record_limit`](Self::record_limit).
    pub record_max: usize,
    /// Records go on over the end of the ring, for the memory maps it twice in a row ([`Mapped::mirrored`]); without it
    /// a pad fills the end.
    pub wraps: bool,
}

/// A checked geometry, and how to find things in it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) at: Geometry,
    mask: u64,
}

impl Geometry {
    /// One direction in a region of its own: a page of words for each side, then `size` bytes of records.
    pub fn alone(size: usize, align: usize) -> Self {
        Self {
            data: 2 * layout::PAGE,
            size,
            align,
            cons: 0,
            data_wake_at: 128,
            space_wake_at: layout::PAGE,
            record_max: Self::record_limit(size, align),
            wraps: false,
        }
    }

    /// Bytes of memory that this needs.
    pub fn bytes(&self) -> usize {
        let mapped = if self.wraps { 2 } else { 1 };
        self.data.saturating_add(self.size.saturating_mul(mapped))
    }

    /// Longest record that a ring of `size` bytes may have: two of them and a pad always fit.
    pub const fn record_limit(size: usize, align: usize) -> usize {
        (size / 2).saturating_sub(layout::HEADER + align)
    }

    pub(crate) fn check<M: RingMem>(self, mem: &M) -> Result<Plan, GeometryError> {
        let bad = |what, value: usize, limit: usize| GeometryError {
            what,
            value: value as u64,
            limit: limit as u64,
        };
        if self.align != 8 && self.align != 64 {
            return Err(bad("alignment", self.align, 64));
        }
        let sizes = 4 * self.align..=layout::SIZE_MAX;
        if !self.size.is_power_of_two() || !sizes.contains(&self.size) {
            return Err(bad("size", self.size, layout::SIZE_MAX));
        }
        if !self.data.is_multiple_of(self.align) || mem.len() < self.bytes() {
            return Err(bad("end of the records", self.bytes(), mem.len()));
        }
        let limit = Self::record_limit(self.size, self.align);
        if self.record_max > limit {
            return Err(bad("longest record", self.record_max, limit));
        }
        for word in [self.cons, self.data_wake_at, self.space_wake_at] {
            let end = word.saturating_add(8);
            let apart = end <= self.data || word >= self.bytes();
            if !word.is_multiple_of(8) || end > mem.len() || !apart {
                return Err(bad("offset of a word", word, mem.len()));
            }
        }
        Ok(Plan {
            at: self,
            mask: self.size as u64 - 1,
        })
    }
}

impl Plan {
    #[inline]
    pub(crate) fn size(&self) -> u64 {
        self.at.size as u64
    }

    /// Offset of a position in the memory.
    #[inline]
    pub(crate) fn offset(&self, position: u64) -> usize {
        self.at.data + (position & self.mask) as usize
    }

    /// Bytes from a position to the end of the ring; of one that is mapped twice in a row, there is no end.
    #[inline]
    pub(crate) fn left_to_end(&self, position: u64) -> u64 {
        if self.at.wraps {
            return u64::MAX;
        }
        self.size() - (position & self.mask)
    }

    /// Bytes that a record of `len` takes.
    #[inline]
    pub(crate) fn total(&self, len: u64) -> u64 {
        let padding = self.at.align as u64 - 1; // a power of two: no division on the path
        (layout::HEADER as u64 + len + padding) & !padding
    }
}

/// Tells whether going from `old` to `new` passes the position at which the other side wants to be woken.
#[inline]
pub(crate) fn passes(old: u64, new: u64, wake_at: u64) -> bool {
    wake_at.wrapping_sub(old).wrapping_sub(1) < new.wrapping_sub(old)
}
