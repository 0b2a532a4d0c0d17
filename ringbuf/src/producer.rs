//! The side that writes records.

use core::fmt;
use core::marker::PhantomData;
use core::mem::ManuallyDrop;

use crate::layout::{HEADER, Header};
use crate::{
    Armed, Corrupt, Geometry, GeometryError, Plan, Policy, RingMem, Validated, Wake, passes,
};

// Inlined throughout, the path keeps a grant in registers: written to the stack in halves and read back whole, it would
// wait behind every store to a line that the consumer still has.

/// What is zeroed ahead of the last record at a time, bytes: sixteen lines, so that small records seldom wait for it.
const ZEROED_AHEAD: u64 = 1024;
/// Less than this left of it: time for more.
const ZEROED_LEAST: u64 = 768;
/// What takes no more than this is small.
const SMALL: u64 = 256;

/// Why a record is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PushError {
    /// No room: wait for space.
    Full,
    /// It would never fit.
    TooLong {
        /// Its length.
        len: usize,
        /// The longest.
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

/// Writes records. Its own position is private; what the consumer says of its position is checked.
#[derive(Debug)]
pub struct Producer<M, P = Validated> {
    mem: M,
    plan: Plan,
    /// Behind the last record that was written.
    head: u64,
    /// Behind the last record that was shown.
    shown: u64,
    /// From `head` to here there is nothing but zeroes.
    zeroed: u64,
    /// Header of the first record that is not shown yet.
    withheld: u64,
    /// The consumer's position as last seen and checked.
    cons: u64,
    events: bool,
    corrupt: Option<Corrupt>,
    policy: PhantomData<P>,
}

/// Room for one record, to be filled in place. Dropped without `commit`: there is no record.
#[derive(Debug)]
pub struct Grant<'a, M, P = Validated> {
    producer: &'a mut Producer<M, P>,
    /// What is left at the end of the ring, where the record would not fit.
    pad: u64,
    /// Bytes of the record, and all that it takes.
    len: u64,
    total: u64,
}

impl<M: RingMem> Producer<M> {
    /// Begins a ring in zeroed memory. `events`: the consumer sleeps and wants to be woken; without it, it polls, and
    /// no fence is spent on asking.
    ///
    /// # Errors
    /// The geometry does not fit the memory.
    pub fn new(mem: M, geometry: Geometry, events: bool) -> Result<Self, GeometryError> {
        Self::with_policy(mem, geometry, events)
    }
}

impl<M: RingMem, P: Policy> Producer<M, P> {
    #[doc(hidden)] // for the bench that measures what the checks cost
    pub fn with_policy(mem: M, geometry: Geometry, events: bool) -> Result<Self, GeometryError> {
        let plan = geometry.check(&mem)?;
        Ok(Self {
            mem,
            plan,
            head: 0,
            shown: 0,
            zeroed: HEADER as u64,
            withheld: 0,
            cons: 0,
            events,
            corrupt: None,
            policy: PhantomData,
        })
    }

    /// Longest record, bytes.
    pub fn record_max(&self) -> usize {
        self.plan.at.record_max
    }

    /// Writes one record and shows it.
    ///
    /// # Errors
    /// There is no room, it is too long, or the ring is corrupt: nothing was written.
    #[inline(always)]
    pub fn try_push(&mut self, bytes: &[u8]) -> Result<Wake, PushError> {
        let mut grant = self.reserve(bytes.len())?;
        grant.write(0, bytes);
        let wake = grant.commit();
        Ok(wake.or(self.publish()))
    }

    /// Finds room for a record of `len` bytes, behind those that were committed.
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
            self.look_at_consumer()?;
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

    /// Takes room for a record of at most `most` bytes, and at least `least`, as much as there is now; what is not used of
    /// it is given back by [`Grant::commit_first`].
    ///
    /// # Errors
    /// As [`reserve`](Self::reserve); there is no room for `least`.
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
            self.look_at_consumer()?;
        }
        let to_end = self.plan.left_to_end(self.head);
        let short = self.plan.total(least as u64);
        let pad = self.pad(short);
        if pad + short + HEADER as u64 > self.free() {
            return Err(PushError::Full);
        }
        // What is not at the end of the ring begins behind a pad; both are whole alignments.
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

    /// What is left at the end of the ring, if a record that takes `total` does not fit there.
    #[inline(always)]
    fn pad(&self, total: u64) -> u64 {
        let to_end = self.plan.left_to_end(self.head);
        if total > to_end { to_end } else { 0 }
    }

    #[inline(always)]
    fn free(&self) -> u64 {
        self.plan.size() - (self.head - self.cons)
    }

    /// Fetches the consumer's position, once.
    #[cold]
    fn look_at_consumer(&mut self) -> Result<(), Corrupt> {
        if let Some(corrupt) = self.corrupt {
            return Err(corrupt);
        }
        let cons = self.mem.load(self.plan.at.cons);
        // Neither backwards nor beyond what it was shown.
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

    /// Writes a header, and zeroes the next one: the first of a batch is withheld until [`publish`](Self::publish).
    #[inline(always)]
    fn put(&mut self, header: u64, total: u64) {
        let next = self.head + total;
        if self.zeroed < next + HEADER as u64 {
            self.mem.store_relaxed(self.plan.offset(next), 0);
            self.zeroed = next + HEADER as u64;
        }
        if self.head == self.shown {
            self.withheld = header;
        } else {
            let at = self.plan.offset(self.head);
            self.mem.store_relaxed(at, header);
        }
        self.head = next;
    }

    /// Zeroes a little of what comes next, while the consumer is busy with what it was shown: the header behind the
    /// next record, and its lines are here when they are needed. Large records have no use for it.
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
        while self.zeroed < end {
            let n = (end - self.zeroed).min(self.plan.left_to_end(self.zeroed));
            self.mem.zero(self.plan.offset(self.zeroed), n as usize);
            self.zeroed += n;
        }
    }

    /// Bytes that are committed and not shown yet.
    pub fn unpublished(&self) -> usize {
        (self.head - self.shown) as usize
    }

    /// Shows every committed record with one store.
    #[inline]
    pub fn publish(&mut self) -> Wake {
        if self.head == self.shown {
            return Wake::No;
        }
        // SYNC(header): pairs with the consumer's load of it.
        self.mem.store(self.plan.offset(self.shown), self.withheld);
        let old = core::mem::replace(&mut self.shown, self.head);
        if !self.events {
            self.zero_ahead(self.head - old);
            return Wake::No;
        }
        // SYNC(data): between "header stored" and "does it sleep?"; pairs with the fence in `arm_data`.
        self.mem.fence();
        let wake_at = self.mem.load(self.plan.at.data_wake_at);
        self.zero_ahead(self.head - old);
        if passes(old, self.head, wake_at) {
            Wake::Yes
        } else {
            Wake::No
        }
    }

    /// Asks to be woken when a record of `len` bytes fits and a quarter of the ring is free, then looks again whether the
    /// record fits. What is committed is shown first.
    ///
    /// # Errors
    /// The consumer broke the ring.
    pub fn arm_space(&mut self, len: usize) -> Result<(Armed, Wake), Corrupt> {
        let wake = self.publish();
        let total = self.plan.total(len.min(self.record_max()) as u64);
        // The next header is zeroed before a record is shown.
        let need = self.pad(total) + total + HEADER as u64;
        // Woken for each record, it would sleep as often.
        let want = need.max(self.plan.size() / 4);
        let wake_at = (self.head + want).saturating_sub(self.plan.size());
        self.mem.store_relaxed(self.plan.at.space_wake_at, wake_at);
        // SYNC(space): pairs with the fence in `release`.
        self.mem.fence();
        self.look_at_consumer()?;
        let armed = if need > self.free() {
            Armed::Sleep
        } else {
            Armed::Ready
        };
        Ok((armed, wake))
    }
}

impl<M: RingMem, P: Policy> Grant<'_, M, P> {
    /// Bytes of the record.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Tells whether the record has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where its bytes lie in the memory, in one piece: for what moves bytes by itself.
    pub fn at(&self) -> usize {
        self.producer.plan.offset(self.producer.head + self.pad) + HEADER
    }

    /// Gives it back: nothing was written into it. (Dropped, it is taken for written.)
    #[inline]
    pub fn unused(self) {
        let _ = ManuallyDrop::new(self);
    }

    /// As [`commit`](Self::commit), of its first `len` bytes. `spoilt`: something was written behind them, where headers
    /// will come to stand.
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

    /// Copies bytes to an offset in the record. What would lie behind its end is left out.
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

    /// Makes it a record. It is seen with the next [`publish`](Producer::publish); a batch of a quarter of the ring is
    /// shown now, so that the consumer is not kept idle.
    #[inline(always)]
    pub fn commit(self) -> Wake {
        let (pad, len, total) = (self.pad, self.len, self.total);
        let mut grant = ManuallyDrop::new(self);
        let producer = &mut *grant.producer;
        if pad > 0 {
            producer.put(Header::pad(pad - HEADER as u64), pad);
        }
        producer.put(Header::data(len), total);
        if producer.head - producer.shown > total {
            producer.zero_ahead(total);
        }
        if producer.head - producer.shown >= producer.plan.size() / 4 {
            producer.publish()
        } else {
            Wake::No
        }
    }
}

impl<M, P> Drop for Grant<'_, M, P> {
    /// What was written where a header may come to stand is not zero any more.
    fn drop(&mut self) {
        let written = self.producer.head + self.pad + HEADER as u64;
        self.producer.zeroed = self.producer.zeroed.min(written);
    }
}
