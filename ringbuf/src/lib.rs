//! A ring of records in memory that two partitions share: one producer, one consumer, no locks, no read-modify-write
//! operations, and no trust. Every value that the other side can write is loaded once and checked. A bad value ends
//! the ring ([`Corrupt`]).
//!
//! # Layout of one direction
//!
//! The caller chooses the offsets ([`Geometry`]). Each word has exactly one writer.
//!
//! | word | size | writer | reader | ordering | valid values |
//! |---|---|---|---|---|---|
//! | record header | 8, before every record | producer | consumer | stored Release, loaded Acquire | [`layout`] |
//! | `cons` | 8 | consumer | producer | stored Release, loaded Acquire | from the last value seen up to the published position |
//! | `data_wake_at` | 8 | consumer | producer | relaxed, with SeqCst fences around it | any: a wrong value only loses its own writer's wake-up |
//! | `space_wake_at` | 8 | producer | consumer | likewise | likewise |
//!
//! Positions count bytes since the ring started. They are u64 and do not wrap in practice. A record is a header, its
//! bytes, and padding to the alignment (8 or 64 bytes). A record never wraps: a pad record fills the end of the ring.
//!
//! ```text
//! produce   zero the header after the record │ bytes │ header of the record, Release
//!           (a batch: only the header after its last record is zeroed, and the first header is written last, so one
//!           Release store shows all records)
//! consume   header, Acquire: 0 = nothing yet │ check │ copy out │ `cons`, Release
//! ```
//! The consumer waits only for the committed header, which is next to the data. A record that shares a cache line with
//! its header therefore costs one cache line transfer.
//!
//! # Why this layout
//!
//! The alternative is to publish the producer's position in a cache line of its own. `cargo xtask bench ring` measures
//! both (its `published index` does no checks, which favours it). Measured between two processes on two cores of an
//! AMD EPYC (family 25, model 1), 64 bytes, this layout against the published index:
//!
//! | | cores with a common cache | cores without one |
//! |---|---|---|
//! | each record published alone | 0.9x | 2.2x |
//! | batches of 32, drained | 1.2x | 1.9x |
//!
//! A channel mostly carries single answers, and those need one cache line per record here and two there. The further
//! apart the cores are, the more that matters.
//!
//! A batch costs no more instructions in this layout than in the other one: inside a batch no header has to be zeroed
//! first, so a record of a batch is its bytes and one store. The producer still zeroes some bytes ahead of a stream of
//! small records, because that asks for many cache lines at once: cores without a common cache move such a stream
//! 1.5 times as fast with it, and cores with one 4 % slower. (A prefetch for writing in its place gained nothing.)
//!
//! # Sleeping
//!
//! A side that wants to sleep stores the position at which it wants to be woken, does a fence, and checks again. The
//! side that moves its position past that value does a fence, loads the value, and returns [`Wake::Yes`]. So no side
//! sleeps while there is something for it (R9, checked by loom).
//!
//! # What the ring does not guarantee
//!
//! It does not guarantee fairness, or that the peer reads. A peer that stops reading fills the ring: `Full`. A peer
//! that writes invalid values ends it: `Corrupt`. The bytes of a record are whatever the peer had written at the time
//! of the copy; they are always copied out before they are used.
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
    /// Whether values from the peer are checked. Only a bench may switch the checks off.
    pub trait Policy: Send + Sync + 'static {
        #[doc(hidden)]
        const CHECKED: bool;
    }
}

pub use policy::Policy;

/// Checks everything the peer writes: the peer is hostile.
#[derive(Debug)]
pub enum Validated {}

#[doc(hidden)] // baseline for the cost of the checks
#[derive(Debug)]
pub enum Unchecked {}

impl Policy for Validated {
    const CHECKED: bool = true;
}

impl Policy for Unchecked {
    const CHECKED: bool = false;
}

/// Whether the caller must wake the other side through its doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a sleeping peer is woken by its doorbell only"]
pub enum Wake {
    /// The other side is awake, or polls.
    No,
    /// The other side sleeps and asked for this wake-up.
    Yes,
}

impl Wake {
    /// `Yes` if either of the two is `Yes`.
    pub fn or(self, other: Self) -> Self {
        if self == Self::Yes { self } else { other }
    }
}

/// Whether the caller may sleep now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Armed {
    /// There is nothing to do: the doorbell will wake the caller.
    Sleep,
    /// Something arrived in the meantime: check again instead of sleeping.
    Ready,
}

/// The other side broke the ring: the peer's fault. This end reads and writes nothing more; only a new epoch helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Corrupt {
    /// The field or rule that was broken.
    pub what: &'static str,
    /// The value that the peer wrote.
    pub value: u64,
    /// The largest allowed value.
    pub limit: u64,
}

/// The memory is too small or misaligned for the ring: the caller's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeometryError {
    /// The bad field.
    pub what: &'static str,
    /// Its value.
    pub value: u64,
    /// The limit for the field.
    pub limit: u64,
}

impl fmt::Display for Corrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, value, limit } = self;
        write!(
            f,
            "ring is corrupt: {what} is {value:#x} (limit {limit:#x})"
        )
    }
}

impl fmt::Display for GeometryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, value, limit } = self;
        write!(
            f,
            "the ring does not fit its memory: {what} is {value:#x} (limit {limit:#x})"
        )
    }
}

impl core::error::Error for Corrupt {}
impl core::error::Error for GeometryError {}

/// Where one direction lies in its memory, in bytes from the start of the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Offset of the records: a multiple of `align`.
    pub data: usize,
    /// Size of the record area in bytes: a power of two.
    pub size: usize,
    /// Alignment of records: 8, or 64 to give each record its own cache lines.
    pub align: usize,
    /// Offset of the consumer's position, in memory that only the consumer writes.
    pub cons: usize,
    /// Offset of the position at which the consumer wants to be woken, in memory that only the consumer writes.
    pub data_wake_at: usize,
    /// Offset of the position at which the producer wants to be woken, in memory that only the producer writes.
    pub space_wake_at: usize,
    /// Longest record in bytes: at most [`record_limit`](Self::record_limit).
    pub record_max: usize,
    /// Records continue across the end of the ring, because the memory maps the ring twice in a row
    /// ([`Mapped::mirrored`]). If false, a pad fills the end.
    pub wraps: bool,
}

/// A checked geometry, and the arithmetic on it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) at: Geometry,
    mask: u64,
    /// Most bytes of padding: one less than the alignment, which is a power of two.
    padding: u64,
    /// Bytes of a header and of the most padding.
    extra: u64,
}

impl Geometry {
    /// A geometry for one direction in memory of its own: a page of words for each side, then `size` bytes of records.
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

    /// Number of bytes of memory that this geometry needs.
    pub fn bytes(&self) -> usize {
        let mapped = if self.wraps { 2 } else { 1 };
        self.data.saturating_add(self.size.saturating_mul(mapped))
    }

    /// Longest record that a ring of `size` bytes can have. Two such records and a pad always fit.
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
            padding: self.align as u64 - 1,
            extra: (layout::HEADER + self.align) as u64 - 1,
        })
    }
}

impl Plan {
    #[inline]
    pub(crate) fn size(&self) -> u64 {
        self.at.size as u64
    }

    /// Offset in the memory for a position.
    #[inline]
    pub(crate) fn offset(&self, position: u64) -> usize {
        // It cannot wrap: `check` found that the memory has all these bytes.
        self.at.data.wrapping_add((position & self.mask) as usize)
    }

    /// Bytes from a position to the end of the ring. A ring that is mapped twice in a row has no end.
    #[inline]
    pub(crate) fn left_to_end(&self, position: u64) -> u64 {
        if self.at.wraps {
            return u64::MAX;
        }
        self.size() - (position & self.mask)
    }

    /// Position at which the ring ends for a record that starts at `position`.
    #[inline]
    pub(crate) fn end(&self, position: u64) -> u64 {
        position.saturating_add(self.left_to_end(position))
    }

    /// Bytes that a record of `len` bytes uses, with header and padding. `len` is at most the longest record.
    #[inline]
    pub(crate) fn total(&self, len: u64) -> u64 {
        len.wrapping_add(self.extra) & !self.padding
    }
}

/// Returns true if the step from `old` to `new` passes the position at which the other side wants to be woken.
#[inline]
pub(crate) fn passes(old: u64, new: u64, wake_at: u64) -> bool {
    wake_at.wrapping_sub(old).wrapping_sub(1) < new.wrapping_sub(old)
}
