//! The side that reads records.

use crate::layout::{HEADER, Header};
use crate::{Armed, Corrupt, Geometry, GeometryError, Plan, RingMem, Wake, passes};

/// Reads records. Its own position is private; every header is fetched once and checked before a byte is touched.
#[derive(Debug)]
pub struct Consumer<M> {
    mem: M,
    plan: Plan,
    /// Behind the last record that was taken.
    tail: u64,
    /// Behind the last record whose room was given back.
    released: u64,
    events: bool,
    corrupt: Option<Corrupt>,
}

/// A record that was checked. Its bytes are the producer's until they are copied.
#[derive(Debug)]
pub struct Record<'a, M> {
    consumer: &'a mut Consumer<M>,
    len: u64,
}

impl<M: RingMem> Consumer<M> {
    /// Begins a ring in zeroed memory. `events`: the producer sleeps when the ring is full and wants to be woken.
    ///
    /// # Errors
    /// The geometry does not fit the memory.
    pub fn new(mem: M, geometry: Geometry, events: bool) -> Result<Self, GeometryError> {
        let plan = geometry.check(&mem)?;
        Ok(Self {
            mem,
            plan,
            tail: 0,
            released: 0,
            events,
            corrupt: None,
        })
    }

    /// Returns the next record without taking it; `None`: there is none yet.
    ///
    /// # Errors
    /// The producer broke the ring: it stays broken.
    pub fn peek(&mut self) -> Result<Option<Record<'_, M>>, Corrupt> {
        if let Some(corrupt) = self.corrupt {
            return Err(corrupt);
        }
        loop {
            // SYNC(header): pairs with the producer's Release store.
            let word = self.mem.load(self.plan.offset(self.tail));
            match self.check(word) {
                Ok(None) => return Ok(None),
                Ok(Some(Found::Pad(total))) => self.tail += total,
                Ok(Some(Found::Data(len))) => {
                    return Ok(Some(Record {
                        consumer: self,
                        len,
                    }));
                }
                Err(corrupt) => {
                    self.corrupt = Some(corrupt);
                    return Err(corrupt);
                }
            }
        }
    }

    /// Holds a header against the ring.
    fn check(&self, word: u64) -> Result<Option<Found>, Corrupt> {
        let bad = |what, limit| {
            Err(Corrupt {
                what,
                value: word,
                limit,
            })
        };
        // Of what was not given back, the producer may have reused nothing; the next header is never part of it.
        let room = self.plan.size() - (self.tail - self.released);
        let to_end = self.plan.left_to_end(self.tail);
        match Header::parse(word) {
            Header::Empty => Ok(None),
            Header::Bad => bad("record header", 0),
            Header::Data(len) => {
                let (max, total) = (self.plan.at.record_max as u64, self.plan.total(len));
                if len > max {
                    return bad("length of a record", max);
                }
                if total > to_end || total > room {
                    return bad("end of a record", to_end.min(room));
                }
                Ok(Some(Found::Data(len)))
            }
            Header::Pad(len) => {
                let total = len + HEADER as u64;
                if total != to_end || total > room {
                    return bad("end of a pad", to_end.min(room));
                }
                Ok(Some(Found::Pad(total)))
            }
        }
    }

    /// Takes the next record into `buf`; `None`: there is none yet. What `buf` has no room for is dropped; the length
    /// is the record's.
    ///
    /// # Errors
    /// As [`peek`](Self::peek).
    pub fn pop(&mut self, buf: &mut [u8]) -> Result<Option<usize>, Corrupt> {
        let Some(record) = self.peek()? else {
            return Ok(None);
        };
        let len = record.len();
        record.copy_out(0, buf);
        record.take();
        Ok(Some(len))
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

enum Found {
    Data(u64),
    Pad(u64),
}

impl<M: RingMem> Record<'_, M> {
    /// Bytes of the record.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Tells whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies from an offset in the record. Returns how many bytes there were.
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
    pub fn take(self) {
        self.consumer.tail += self.consumer.plan.total(self.len);
    }
}
