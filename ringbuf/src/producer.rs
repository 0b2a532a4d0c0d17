//! The writing end of a ring.

use core::fmt;
use core::marker::PhantomData;
use core::mem::ManuallyDrop;

use crate::layout::{HEADER, Header};
use crate::{
    Armed, Corrupt, Geometry, GeometryError, Plan, Policy, RingMem, Validated, Wake, passes,
};

// Everything is inlined so that a grant stays in registers. A grant that is written to the stack in halves and read
// back whole would wait for every earlier store, also to a cache line that the consumer still holds.

/// Bytes that are zeroed in advance after the last record. The processor then asks for many cache lines at once, and
/// has them when the records are written. Between cores without a common cache, one line takes hundreds of ns.
const ZEROED_AHEAD: u64 = 2048;
/// If fewer zeroed bytes than this are left, more are zeroed.
const ZEROED_LEAST: u64 = 1024;
/// A record that uses at most this many bytes is small.
const SMALL: u64 = 256;

/// Why a record was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PushError {
    /// There is no room now: wait for space.
    Full,
    /// The record is longer than the ring allows.
    TooLong {
        /// Length of the record in bytes.
        len: usize,
        /// Longest allowed record in bytes.
        max: usize,
    },
    /// The consumer broke the ring.
    Corrupt(Corrupt),
}

impl fmt::Display for PushError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => f.write_str("ring is full"),
            Self::TooLong { len, max } => write!(f, "record of {len} bytes, at most {max} fit"),
            Self::Corrupt(corrupt) => corrupt.fmt(f),
        }
    }
}

impl core::error::Error for PushError {}

impl From<Corrupt> for PushError {
    fn from(corrupt: Corrupt) -> Self {
        Self::Corrupt(corrupt)
    }
}

/// Writes records. Its own position is private. The position that the consumer reports is checked.
#[derive(Debug)]
pub struct Producer<M, P = Validated> {
    mem: M,
    plan: Plan,
    /// Position after the last committed record.
    head: u64,
    /// Position after the last published record.
    shown: u64,
    /// All bytes from `head` to this position are zero.
    zeroed: u64,
    /// A record that ends before this position needs no further check: there is room for it and for the header after
    /// it, the ring does not end within it, and the batch does not get too long.
    edge: u64,
    /// Header of the first record that is not published yet.
    withheld: u64,
    /// The consumer's position as last loaded and checked.
    cons: u64,
    events: bool,
    corrupt: Option<Corrupt>,
    policy: PhantomData<P>,
}

/// Room for one record, to be filled in place. If it is dropped without `commit`, no record is written.
#[derive(Debug)]
pub struct Grant<'a, M, P = Validated> {
    producer: &'a mut Producer<M, P>,
    /// Bytes at the end of the ring that the record skips because it does not fit there.
    pad: u64,
    /// Length of the record, and the bytes that it uses with header and padding.
    len: u64,
    total: u64,
}

impl<M: RingMem> Producer<M> {
    /// Starts a ring in zeroed memory. `events` is true if the consumer sleeps and needs a wake-up. If it is false the
    /// consumer polls, and the producer saves a fence.
    ///
    /// # Errors
    /// The geometry does not fit the memory.
    pub fn new(mem: M, geometry: Geometry, events: bool) -> Result<Self, GeometryError> {
        Self::with_policy(mem, geometry, events)
    }
}

impl<M: RingMem, P: Policy> Producer<M, P> {
    #[doc(hidden)] // used by the bench that measures the cost of the checks
    pub fn with_policy(mem: M, geometry: Geometry, events: bool) -> Result<Self, GeometryError> {
        let plan = geometry.check(&mem)?;
        Ok(Self {
            mem,
            plan,
            head: 0,
            shown: 0,
            zeroed: HEADER as u64,
            edge: 0,
            withheld: 0,
            cons: 0,
            events,
            corrupt: None,
            policy: PhantomData,
        })
    }

    /// Longest record in bytes.
    pub fn record_max(&self) -> usize {
        self.plan.at.record_max
    }

    /// Writes one record and publishes it.
    ///
    /// # Errors
    /// There is no room, the record is too long, or the ring is corrupt. Nothing was written.
    #[inline(always)]
    pub fn try_push(&mut self, bytes: &[u8]) -> Result<Wake, PushError> {
        let wake = self.append(bytes)?;
        Ok(wake.or(self.publish()))
    }

    /// Writes one record without publishing it: the same as [`reserve`](Self::reserve), [`Grant::write`] and
    /// [`Grant::commit`], and faster.
    ///
    /// # Errors
    /// As [`try_push`](Self::try_push).
    #[inline(always)]
    pub fn append(&mut self, bytes: &[u8]) -> Result<Wake, PushError> {
        let len = bytes.len() as u64;
        if len <= self.plan.at.record_max as u64 {
            let total = self.plan.total(len);
            // A position counts bytes and never comes near the largest u64.
            if self.head.wrapping_add(total) < self.edge {
                let at = self.plan.offset(self.head);
                self.mem.write(at.wrapping_add(HEADER), bytes);
                self.put_record(len, total);
                return Ok(Wake::No);
            }
        }
        self.append_checked(bytes)
    }

    /// As `append`, with every check, one by one.
    #[inline(never)]
    fn append_checked(&mut self, bytes: &[u8]) -> Result<Wake, PushError> {
        let mut grant = self.reserve(bytes.len())?;
        grant.write(0, bytes);
        let wake = grant.commit();
        self.set_edge();
        Ok(wake)
    }

    /// Computes the edge again, at the first record that does not end before it.
    fn set_edge(&mut self) {
        let room = self.cons + self.plan.size() - HEADER as u64;
        let batch = self.shown + self.plan.size() / 4;
        self.edge = room.min(batch).min(self.plan.end(self.head));
    }

    /// Reserves room for a record of `len` bytes, after the committed records.
    ///
    /// # Errors
    /// As [`try_push`](Self::try_push).
    #[inline(always)]
    pub fn reserve(&mut self, len: usize) -> Result<Grant<'_, M, P>, PushError> {
        let max = self.record_max();
        if len > max {
            return Err(PushError::TooLong { len, max });
        }
        let len = len as u64;
        let total = self.plan.total(len);
        let pad = self.pad(total);
        let need = pad + total + HEADER as u64;
        if need > self.free() {
            self.load_consumer()?;
            if need > self.free() {
                return Err(PushError::Full);
            }
        }
        Ok(Grant {
            producer: self,
            pad,
            len,
            total,
        })
    }

    /// Reserves room for a record of at least `least` and at most `most` bytes, as much as there is now. The part that
    /// is not used is given back by [`Grant::commit_first`].
    ///
    /// # Errors
    /// As [`reserve`](Self::reserve), also if there is no room for `least`.
    #[inline]
    pub fn reserve_some(
        &mut self,
        least: usize,
        most: usize,
    ) -> Result<Grant<'_, M, P>, PushError> {
        let max = self.record_max();
        if least > max {
            return Err(PushError::TooLong { len: least, max });
        }
        let most = most.clamp(least, max) as u64;
        let whole = self.plan.total(most) + HEADER as u64;
        if whole > self.free() {
            self.load_consumer()?;
        }
        let to_end = self.plan.left_to_end(self.head);
        let short = self.plan.total(least as u64);
        let pad = self.pad(short);
        if pad + short + HEADER as u64 > self.free() {
            return Err(PushError::Full);
        }
        // A record that does not fit at the end of the ring starts after a pad. Both sizes are multiples of the
        // alignment.
        let room = (self.free() - pad - HEADER as u64) & !(self.plan.at.align as u64 - 1);
        let room = if pad > 0 { room } else { room.min(to_end) };
        let len = most.min(room - HEADER as u64);
        let total = self.plan.total(len);
        Ok(Grant {
            producer: self,
            pad,
            len,
            total,
        })
    }

    /// Size of the pad that is needed at the end of the ring, if a record that uses `total` bytes does not fit there.
    #[inline(always)]
    fn pad(&self, total: u64) -> u64 {
        let to_end = self.plan.left_to_end(self.head);
        if total > to_end { to_end } else { 0 }
    }

    #[inline(always)]
    fn free(&self) -> u64 {
        self.plan.size() - (self.head - self.cons)
    }

    /// Loads the consumer's position, once.
    #[cold]
    fn load_consumer(&mut self) -> Result<(), Corrupt> {
        if let Some(corrupt) = self.corrupt {
            return Err(corrupt);
        }
        let cons = self.mem.load(self.plan.at.cons);
        // The position must not go backwards, and must not pass the published position.
        if P::CHECKED && cons.wrapping_sub(self.cons) > self.shown - self.cons {
            let corrupt = Corrupt {
                what: "consumer's position",
                value: cons,
                limit: self.shown,
            };
            self.corrupt = Some(corrupt);
            return Err(corrupt);
        }
        self.cons = cons;
        Ok(())
    }

    /// Writes the header of a record that ends at `next`. The first header of a batch is kept back until
    /// [`publish`](Self::publish). The consumer reads no other header of the batch before that one, so none of them
    /// has to be zero before.
    #[inline(always)]
    fn put(&mut self, header: u64, next: u64) {
        if self.head == self.shown {
            self.withheld = header;
        } else {
            let at = self.plan.offset(self.head);
            self.mem.store_relaxed(at, header);
        }
        self.head = next;
    }

    /// Writes the header of a record whose bytes are written, and zeroes some bytes ahead in a batch. (`publish` does
    /// that for a record alone.)
    #[inline(always)]
    fn put_record(&mut self, len: u64, total: u64) {
        let first = self.head == self.shown;
        self.put(Header::data(len), self.head.wrapping_add(total));
        if !first {
            self.zero_ahead(total);
        }
    }

    /// Zeroes some bytes ahead. This covers the header after the next records, and brings their cache lines here before
    /// they are needed. Large records do not benefit from it.
    #[inline(always)]
    fn zero_ahead(&mut self, total: u64) {
        if total <= SMALL && self.zeroed < self.head + ZEROED_LEAST {
            self.zero_more();
        }
    }

    #[cold]
    fn zero_more(&mut self) {
        let free = self.cons + self.plan.size();
        let end = (self.head + ZEROED_AHEAD).min(free);
        self.zeroed = self.zeroed.max(self.head); // records of a batch may have been written after `zeroed`
        while self.zeroed < end {
            let n = (end - self.zeroed).min(self.plan.left_to_end(self.zeroed));
            self.mem.zero(self.plan.offset(self.zeroed), n as usize);
            self.zeroed += n;
        }
    }

    /// Bytes that are committed and not published yet.
    pub fn unpublished(&self) -> usize {
        (self.head - self.shown) as usize
    }

    /// Publishes every committed record with one store.
    #[inline]
    pub fn publish(&mut self) -> Wake {
        if self.head == self.shown {
            return Wake::No;
        }
        let after = self.head + HEADER as u64;
        if self.zeroed < after {
            self.mem.store_relaxed(self.plan.offset(self.head), 0);
            self.zeroed = after;
        }
        // SYNC(header): pairs with the consumer's Acquire load of the header.
        self.mem.store(self.plan.offset(self.shown), self.withheld);
        let old = core::mem::replace(&mut self.shown, self.head);
        if !self.events {
            self.zero_ahead(self.head - old);
            return Wake::No;
        }
        // SYNC(data): fence between "header stored" and "does the consumer sleep?"; pairs with the fence in
        // `arm_data`.
        self.mem.fence();
        let wake_at = self.mem.load(self.plan.at.data_wake_at);
        self.zero_ahead(self.head - old);
        if passes(old, self.head, wake_at) {
            Wake::Yes
        } else {
            Wake::No
        }
    }

    /// Publishes the committed records. Asks for a wake-up when a record of `len` bytes fits and a quarter of the ring
    /// is free. Then checks again whether the record fits.
    ///
    /// # Errors
    /// The consumer broke the ring.
    pub fn arm_space(&mut self, len: usize) -> Result<(Armed, Wake), Corrupt> {
        let wake = self.publish();
        let total = self.plan.total(len.min(self.record_max()) as u64);
        // The header after the record must be free too, because it is zeroed before the record is published.
        let need = self.pad(total) + total + HEADER as u64;
        // A producer that is woken for each freed record would also sleep again for each record.
        let want = need.max(self.plan.size() / 4);
        let wake_at = (self.head + want).saturating_sub(self.plan.size());
        self.mem.store_relaxed(self.plan.at.space_wake_at, wake_at);
        // SYNC(space): pairs with the fence in `release`.
        self.mem.fence();
        self.load_consumer()?;
        let armed = if need > self.free() {
            Armed::Sleep
        } else {
            Armed::Ready
        };
        Ok((armed, wake))
    }
}

impl<M: RingMem, P: Policy> Grant<'_, M, P> {
    /// Length of the record in bytes.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Tells whether the record has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Offset of the record's bytes in the memory; they are contiguous. For a caller that fills them itself.
    pub fn at(&self) -> usize {
        self.producer.plan.offset(self.producer.head + self.pad) + HEADER
    }

    /// Gives the room back. The caller states that nothing was written into it. (A dropped grant counts as written
    /// into.)
    #[inline]
    pub fn unused(self) {
        let _ = ManuallyDrop::new(self);
    }

    /// As [`commit`](Self::commit), for only the first `len` bytes. `spoilt` is true if bytes were written after them,
    /// where later headers will be.
    #[inline]
    pub fn commit_first(mut self, len: usize, spoilt: bool) -> Wake {
        let len = len as u64;
        if len < self.len {
            (self.len, self.total) = (len, self.producer.plan.total(len));
            if spoilt {
                let written = self.producer.head + self.pad + HEADER as u64;
                self.producer.zeroed = self.producer.zeroed.min(written);
            }
        }
        self.commit()
    }

    /// Copies bytes to offset `at` in the record. Bytes past the end of the record are left out.
    #[inline(always)]
    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        let room = (self.len as usize).saturating_sub(at);
        let bytes = &bytes[..bytes.len().min(room)];
        let p = &self.producer;
        let begin = p.plan.offset(p.head + self.pad) + HEADER + at;
        if !bytes.is_empty() {
            p.mem.write(begin, bytes);
        }
    }

    /// Makes it a record. The next [`publish`](Producer::publish) shows it to the consumer. A batch of a quarter of
    /// the ring is published at once, so that the consumer is not left idle.
    #[inline(always)]
    pub fn commit(self) -> Wake {
        let (pad, len, total) = (self.pad, self.len, self.total);
        let mut grant = ManuallyDrop::new(self);
        let producer = &mut *grant.producer;
        if pad > 0 {
            let next = producer.head + pad;
            producer.put(Header::pad(pad - HEADER as u64), next);
        }
        producer.put_record(len, total);
        if producer.head - producer.shown >= producer.plan.size() / 4 {
            producer.publish()
        } else {
            Wake::No
        }
    }
}

impl<M, P> Drop for Grant<'_, M, P> {
    /// The grant may have been written into, so bytes where a header may be later are no longer known to be zero.
    fn drop(&mut self) {
        let written = self.producer.head + self.pad + HEADER as u64;
        self.producer.zeroed = self.producer.zeroed.min(written);
    }
}
