//! The side that reads records.

use core::marker::PhantomData;

use crate::layout::{self, HEADER, Header};
use crate::{
    Armed, Corrupt, Geometry, GeometryError, Plan, Policy, RingMem, Validated, Wake, passes,
};

/// Reads records. Its own position is private; every header is fetched once and checked before a byte is touched.
#[derive(Debug)]
pub struct Consumer<M, P = Validated> {
    mem: M,
    plan: Plan,
    /// Behind the last record that was taken.
    tail: u64,
    /// Behind the last record whose room was given back.
    released: u64,
    events: bool,
    corrupt: Option<Corrupt>,
    policy: PhantomData<P>,
}

/// A record that was checked. Its bytes are the producer's until they are copied.
#[derive(Debug)]
pub struct Record<'a, M, P = Validated> {
    consumer: &'a mut Consumer<M, P>,
    len: u64,
}

impl<M: RingMem> Consumer<M> {
    /// Begins a ring in zeroed memory. `events`: the producer sleeps when the ring is full and wants to be woken.
    ///
    /// # Errors
    /// The geometry does not fit the memory.
    pub fn new(mem: M, geometry: Geometry, events: bool) -> Result<Self, GeometryError> {
        Self::with_policy(mem, geometry, events)
    }
}

impl<M: RingMem, P: Policy> Consumer<M, P> {
    #[doc(hidden)] // for the bench that measures what the checks cost
    pub fn with_policy(mem: M, geometry: Geometry, events: bool) -> Result<Self, GeometryError> {
        let plan = geometry.check(&mem)?;
        Ok(Self {
            mem,
            plan,
            tail: 0,
            released: 0,
            events,
            corrupt: None,
            policy: PhantomData,
        })
    }

    /// Returns the next record without taking it; `None`: there is none yet.
    ///
    /// # Errors
    /// The producer broke the ring: it stays broken.
    #[inline(always)]
    pub fn peek(&mut self) -> Result<Option<Record<'_, M, P>>, Corrupt> {
        loop {
            if let Some(corrupt) = self.corrupt {
                return Err(corrupt);
            }
            // SYNC(header): pairs with the producer's Release store.
            let word = self.mem.load(self.plan.offset(self.tail));
            if word == layout::EMPTY {
                return Ok(None);
            }
            if let Some(len) = self.data(word) {
                return Ok(Some(Record {
                    consumer: self,
                    len,
                }));
            }
            self.no_data(word)?;
        }
    }

    /// Tells whether something was written where the next record begins, without a look at what it is: for one who looks on.
    #[inline(always)]
    pub fn stirs(&self) -> bool {
        self.mem.load(self.plan.offset(self.tail)) != layout::EMPTY
    }

    /// Bytes that a record may take here: up to the end of the ring, and of what was not given back, the producer may have
    /// reused nothing; the next header is never part of it.
    #[inline(always)]
    fn room(&self) -> u64 {
        let room = self.plan.size() - (self.tail - self.released);
        room.min(self.plan.left_to_end(self.tail))
    }

    /// Holds a header against the ring, as that of a record; returns the record's length.
    #[inline(always)]
    fn data(&self, word: u64) -> Option<u64> {
        let len = word.wrapping_sub(Header::data(0));
        // Whatever else is set makes it longer than any record.
        let fits = match P::CHECKED {
            true => len <= self.plan.at.record_max as u64 && self.plan.total(len) <= self.room(),
            false => word >> 32 == 0,
        };
        fits.then_some(len)
    }

    /// Goes on behind a pad; whatever else it is, it is the end of the ring.
    #[cold]
    fn no_data(&mut self, word: u64) -> Result<(), Corrupt> {
        let (what, limit) = match Header::parse(word) {
            Header::Pad(len) => {
                let total = len + HEADER as u64;
                if total == self.plan.left_to_end(self.tail) && total <= self.room() {
                    self.tail += total;
                    return Ok(());
                }
                ("end of a pad", self.room())
            }
            Header::Data(len) if len > self.plan.at.record_max as u64 => {
                ("length of a record", self.plan.at.record_max as u64)
            }
            Header::Data(_) => ("end of a record", self.room()),
            Header::Empty | Header::Bad => ("record header", 0),
        };
        let value = word;
        let corrupt = Corrupt { what, value, limit };
        self.corrupt = Some(corrupt);
        Err(corrupt)
    }

    /// Takes the next record into `buf`; `None`: there is none yet. What `buf` has no room for is dropped; the length
    /// is the record's.
    ///
    /// # Errors
    /// As [`peek`](Self::peek).
    #[inline(always)]
    pub fn pop(&mut self, buf: &mut [u8]) -> Result<Option<usize>, Corrupt> {
        let Some(record) = self.peek()? else {
            return Ok(None);
        };
        let len = record.len();
        record.copy_out(0, buf);
        record.take();
        Ok(Some(len))
    }

    /// Takes records, at most `limit`, each into `buf` and on to `take`, and gives their room back with one store. Returns
    /// how many there were.
    ///
    /// # Errors
    /// As [`peek`](Self::peek); those before it were taken.
    pub fn drain(
        &mut self,
        buf: &mut [u8],
        limit: usize,
        mut take: impl FnMut(&[u8]),
    ) -> Result<(usize, Wake), Corrupt> {
        let mut count = 0;
        while count < limit
            && let Some(len) = self.pop(buf)?
        {
            take(&buf[..len.min(buf.len())]);
            count += 1;
        }
        Ok((count, self.release()))
    }

    /// Bytes that were taken and not given back yet.
    pub fn unreleased(&self) -> usize {
        (self.tail - self.released) as usize
    }

    /// Tells whether an eighth of the ring was taken and not given back: time to, while there is more to read. When there
    /// is not, everything is given back.
    #[inline]
    pub fn wants_release(&self) -> bool {
        self.tail - self.released >= self.plan.size() / 8
    }

    /// Gives the room of everything taken back to the producer, with one store.
    #[inline]
    pub fn release(&mut self) -> Wake {
        if self.tail == self.released {
            return Wake::No;
        }
        self.mem.store(self.plan.at.cons, self.tail);
        let old = core::mem::replace(&mut self.released, self.tail);
        if !self.events {
            return Wake::No;
        }
        // SYNC(space): between "position stored" and "does it sleep?"; pairs with the fence in `arm_space`.
        self.mem.fence();
        let wake_at = self.mem.load(self.plan.at.space_wake_at);
        if passes(old, self.tail, wake_at) {
            Wake::Yes
        } else {
            Wake::No
        }
    }

    /// Asks to be woken by the next record, then looks again. What was taken is given back first.
    ///
    /// # Errors
    /// As [`peek`](Self::peek).
    pub fn arm_data(&mut self) -> Result<(Armed, Wake), Corrupt> {
        let wake = self.release();
        let at = self.plan.at.data_wake_at;
        self.mem.store_relaxed(at, self.tail + 1);
        // SYNC(data): pairs with the fence in `publish`.
        self.mem.fence();
        let armed = match self.peek()? {
            None => Armed::Sleep,
            Some(_) => Armed::Ready,
        };
        Ok((armed, wake))
    }
}

impl<M: RingMem, P: Policy> Record<'_, M, P> {
    /// Bytes of the record.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Tells whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where its bytes lie in the memory, in one piece, until `release`: for what moves bytes by itself.
    pub fn at(&self) -> usize {
        self.consumer.plan.offset(self.consumer.tail) + HEADER
    }

    /// Copies from an offset in the record. Returns how many bytes there were.
    #[inline(always)]
    pub fn copy_out(&self, at: usize, buf: &mut [u8]) -> usize {
        let n = (self.len as usize).saturating_sub(at).min(buf.len());
        let c = &self.consumer;
        if n > 0 {
            let begin = c.plan.offset(c.tail) + HEADER + at;
            c.mem.read(begin, &mut buf[..n]);
        }
        n
    }

    /// Goes on behind it. Its room is given back with the next `release`.
    #[inline(always)]
    pub fn take(self) {
        self.consumer.tail += self.consumer.plan.total(self.len);
    }
}
