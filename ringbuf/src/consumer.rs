//! The reading end of a ring.

use core::marker::PhantomData;

use crate::layout::{self, HEADER, Header};
use crate::{
    Armed, Corrupt, Geometry, GeometryError, Plan, Policy, RingMem, Validated, Wake, passes,
};

/// Reads records. Its own position is private. It loads every header once and checks it before it reads any byte of
/// the record.
#[derive(Debug)]
pub struct Consumer<M, P = Validated> {
    mem: M,
    plan: Plan,
    /// Position after the last record that was taken.
    tail: u64,
    /// Position up to which the space was given back to the producer.
    released: u64,
    events: bool,
    corrupt: Option<Corrupt>,
    policy: PhantomData<P>,
}

/// A record whose header was checked. The producer can still change its bytes until they are copied out.
#[derive(Debug)]
pub struct Record<'a, M, P = Validated> {
    consumer: &'a mut Consumer<M, P>,
    len: u64,
}

impl<M: RingMem> Consumer<M> {
    /// Starts a ring in zeroed memory. `events` is true if the producer sleeps when the ring is full and needs a
    /// wake-up.
    ///
    /// # Errors
    /// The geometry does not fit the memory.
    pub fn new(mem: M, geometry: Geometry, events: bool) -> Result<Self, GeometryError> {
        Self::with_policy(mem, geometry, events)
    }
}

impl<M: RingMem, P: Policy> Consumer<M, P> {
    #[doc(hidden)] // used by the bench that measures the cost of the checks
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

    /// Returns the next record without taking it, or `None` if there is none yet.
    ///
    /// # Errors
    /// The producer broke the ring. The ring stays broken.
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

    /// Returns true if a header was written at the next position, without checking it. For a caller that polls.
    #[inline(always)]
    pub fn has_header(&self) -> bool {
        self.mem.load(self.plan.offset(self.tail)) != layout::EMPTY
    }

    /// Position before which a record must end: the end of the ring, and the start of the space that was not given
    /// back yet, because the producer may not have reused that space. The next header is never part of a record.
    #[inline(always)]
    fn edge(&self) -> u64 {
        (self.released + self.plan.size()).min(self.plan.end(self.tail))
    }

    /// Bytes that a record at the current position may use.
    #[inline(always)]
    fn room(&self) -> u64 {
        self.edge() - self.tail
    }

    /// Checks a header as the header of a record. Returns the length of the record.
    #[inline(always)]
    fn data(&self, word: u64) -> Option<u64> {
        let len = word.wrapping_sub(Header::data(0));
        // Any other bit that is set makes this length larger than every allowed record.
        let fits = match P::CHECKED {
            true => len <= self.plan.at.record_max as u64 && self.plan.total(len) <= self.room(),
            false => word >> 32 == 0,
        };
        fits.then_some(len)
    }

    /// Skips a pad. Any other header here breaks the ring.
    #[cold]
    fn no_data(&mut self, word: u64) -> Result<(), Corrupt> {
        let (what, limit) = match Header::parse(word) {
            Header::Pad(len) => {
                let total = len + HEADER as u64;
                if total == self.plan.left_to_end(self.tail) && total <= self.room() {
                    self.tail += total;
                    return Ok(());
                }
                ("length of a pad", self.room())
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

    /// Takes the next record into `buf`; `None` if there is none yet. Bytes that do not fit into `buf` are dropped.
    /// The returned length is the length of the whole record.
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

    /// Takes the records that are there, at most `limit`. Copies each into `buf`, passes it to `take`, and gives the
    /// space of all back with one store. Bytes that do not fit into `buf` are dropped. Returns the number of records.
    ///
    /// # Errors
    /// As [`peek`](Self::peek). The records before the error were taken.
    #[inline]
    pub fn drain(
        &mut self,
        buf: &mut [u8],
        limit: usize,
        mut take: impl FnMut(&[u8]),
    ) -> Result<(usize, Wake), Corrupt> {
        if let Some(corrupt) = self.corrupt {
            return Err(corrupt);
        }
        let mut count = 0;
        // As long as the records end before it, two comparisons check a header.
        let mut edge = self.edge();
        while count < limit {
            let at = self.plan.offset(self.tail);
            // SYNC(header): pairs with the producer's Release store.
            let word = self.mem.load(at);
            let len = word.wrapping_sub(Header::data(0));
            // A length within the limit cannot wrap here, and another one is not used.
            let next = self.tail.wrapping_add(self.plan.total(len));
            let fits = |edge| len <= self.plan.at.record_max as u64 && next <= edge;
            if !fits(edge) {
                if word == layout::EMPTY {
                    break;
                }
                // The record before this one may have ended where the ring does.
                edge = self.edge();
                if !fits(edge) {
                    self.no_data(word)?;
                    edge = self.edge();
                    continue;
                }
            }
            let n = buf.len().min(len as usize);
            self.mem.read(at.wrapping_add(HEADER), &mut buf[..n]);
            self.tail = next;
            count += 1;
            take(&buf[..n]);
        }
        Ok((count, self.release()))
    }

    /// Bytes that were taken but not given back to the producer yet.
    pub fn unreleased(&self) -> usize {
        (self.tail - self.released) as usize
    }

    /// Returns true if at least an eighth of the ring was taken and not given back. A caller that still has records to
    /// read should call [`release`](Self::release) then. A caller that has none left gives everything back anyway.
    #[inline]
    pub fn wants_release(&self) -> bool {
        self.tail - self.released >= self.plan.size() / 8
    }

    /// Gives the space of all taken records back to the producer, with one store.
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
        // SYNC(space): fence between "position stored" and "does the producer sleep?"; pairs with the fence in
        // `arm_space`.
        self.mem.fence();
        let wake_at = self.mem.load(self.plan.at.space_wake_at);
        if passes(old, self.tail, wake_at) {
            Wake::Yes
        } else {
            Wake::No
        }
    }

    /// Gives back the space of all taken records, asks for a wake-up at the next record, and then checks the ring
    /// again.
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
    /// Length of the record in bytes.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Returns true if the record has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Offset of the record's bytes in the memory. They are contiguous and stay until `release`. For a caller that
    /// moves the bytes itself.
    pub fn at(&self) -> usize {
        self.consumer.plan.offset(self.consumer.tail) + HEADER
    }

    /// Copies bytes from offset `at` in the record. Returns how many bytes were copied.
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

    /// Takes the record. The next `release` gives its space back.
    #[inline(always)]
    pub fn take(self) {
        self.consumer.tail += self.consumer.plan.total(self.len);
    }
}
