//! Ends that wait: they poll for a while, then sleep until the doorbell is signalled.

use std::io;
use std::time::{Duration, Instant};

use adit_ringbuf::{Armed, Consumer, Corrupt, Pace, Producer, PushError, RingMem, Wake};
use vmm_sys_util::eventfd::EventFd;

use crate::Spin;
use crate::doorbell::{Doorbell, Waiter, sleep};

/// Why an end cannot send or receive, at all or now.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The time limit passed: the other side did not read or write.
    #[error("the other side did nothing in time")]
    TimedOut,
    /// The record is longer than the ring allows.
    #[error("a record of {len} bytes is too long; at most {max} bytes fit")]
    TooLong {
        /// Length of the record in bytes.
        len: usize,
        /// Longest allowed record in bytes.
        max: usize,
    },
    /// The other side broke the ring. The ring stays broken.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// The doorbell is broken.
    #[error("doorbell")]
    Doorbell(#[from] io::Error),
}

/// The writing end of a lane. It signals the doorbell `data` to the reader, and waits on the doorbell `space`.
#[derive(Debug)]
pub struct Sender<M, D = EventFd, W = EventFd> {
    producer: Producer<M>,
    data: D,
    space: W,
    spin: Spin,
    rings: u64,
}

impl<M: RingMem, D: Doorbell, W: Waiter> Sender<M, D, W> {
    /// Takes a producer that was made with events.
    pub fn new(producer: Producer<M>, data: D, space: W, spin: Spin) -> Self {
        Self {
            producer,
            data,
            space,
            spin,
            rings: 0,
        }
    }

    /// How often it signalled the doorbell.
    pub fn rings(&self) -> u64 {
        self.rings
    }

    /// Sends one record. Waits for room as long as it takes.
    ///
    /// # Errors
    /// The record never fits, or the ring or its doorbell is broken.
    pub fn send(&mut self, record: &[u8]) -> Result<(), Error> {
        self.put(record, None)?;
        self.flush()
    }

    /// Sends one record. Waits for room until the time limit.
    ///
    /// # Errors
    /// As [`send`](Self::send). If the reader did not make room in time, nothing was written.
    pub fn send_within(&mut self, record: &[u8], limit: Duration) -> Result<(), Error> {
        self.put(record, Some(limit))?;
        self.flush()
    }

    /// Writes one record without publishing it. [`flush`](Self::flush) publishes the batch; a batch of a quarter of
    /// the ring is published at once.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn queue(&mut self, record: &[u8]) -> Result<(), Error> {
        self.put(record, None)
    }

    /// Publishes the queued records.
    ///
    /// # Errors
    /// The doorbell is broken.
    pub fn flush(&mut self) -> Result<(), Error> {
        let wake = self.producer.publish();
        self.signal(wake)
    }

    fn signal(&mut self, wake: Wake) -> Result<(), Error> {
        if wake == Wake::Yes {
            self.rings += 1;
            self.data.ring()?;
        }
        Ok(())
    }

    fn put(&mut self, record: &[u8], limit: Option<Duration>) -> Result<(), Error> {
        match try_put(&mut self.producer, record)? {
            Some(wake) => self.signal(wake),
            None => self.wait(record, limit),
        }
    }

    #[cold]
    fn wait(&mut self, record: &[u8], limit: Option<Duration>) -> Result<(), Error> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        self.flush()?;
        loop {
            let producer = &mut self.producer;
            if let Some(wake) = self.spin.poll(|| try_put(producer, record))? {
                return self.signal(wake);
            }
            let (armed, wake) = self.producer.arm_space(record.len())?;
            self.signal(wake)?;
            if armed == Armed::Sleep {
                sleep(&self.space, rest(deadline)?)?;
            }
            if let Some(wake) = try_put(&mut self.producer, record)? {
                return self.signal(wake);
            }
        }
    }
}

/// Writes a record if there is room.
fn try_put<M: RingMem>(producer: &mut Producer<M>, record: &[u8]) -> Result<Option<Wake>, Error> {
    match producer.append(record) {
        Ok(wake) => Ok(Some(wake)),
        Err(PushError::Full) => Ok(None),
        Err(PushError::TooLong { len, max }) => Err(Error::TooLong { len, max }),
        Err(PushError::Corrupt(corrupt)) => Err(corrupt.into()),
    }
}

/// Time left until the deadline.
fn rest(deadline: Option<Instant>) -> Result<Option<Duration>, Error> {
    let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
    match left {
        Some(Duration::ZERO) => Err(Error::TimedOut),
        left => Ok(left),
    }
}

/// The reading end of a lane. It signals the doorbell `space` to the writer, and waits on the doorbell `data`.
#[derive(Debug)]
pub struct Receiver<M, D = EventFd, W = EventFd> {
    consumer: Consumer<M>,
    space: D,
    data: W,
    spin: Spin,
    pace: Pace,
    rings: u64,
}

impl<M: RingMem, D: Doorbell, W: Waiter> Receiver<M, D, W> {
    /// Takes a consumer that was made with events.
    pub fn new(consumer: Consumer<M>, space: D, data: W, spin: Spin) -> Self {
        Self {
            consumer,
            space,
            data,
            spin,
            pace: Pace::default(),
            rings: 0,
        }
    }

    /// How often it signalled the doorbell.
    pub fn rings(&self) -> u64 {
        self.rings
    }

    /// Receives one record into `buf`. Waits as long as it takes. Returns the length of the record; bytes that do not
    /// fit into `buf` are dropped.
    ///
    /// # Errors
    /// The ring or its doorbell is broken.
    pub fn recv(&mut self, buf: &mut [u8]) -> Result<usize, Error> {
        self.take(buf, None)
    }

    /// Receives one record. Waits until the time limit.
    ///
    /// # Errors
    /// As [`recv`](Self::recv), or no record arrived in time.
    pub fn recv_within(&mut self, buf: &mut [u8], limit: Duration) -> Result<usize, Error> {
        self.take(buf, Some(limit))
    }

    /// Receives one record if there is one.
    ///
    /// # Errors
    /// The ring or its doorbell is broken.
    pub fn try_recv(&mut self, buf: &mut [u8]) -> Result<Option<usize>, Error> {
        let Some(len) = self.consumer.pop(buf)? else {
            self.release()?;
            return Ok(None);
        };
        self.pace.came(len);
        if self.consumer.wants_release() {
            self.release()?;
        }
        Ok(Some(len))
    }

    /// Receives the records that are there, at most `limit`, and waits for the first one as long as it takes. Copies
    /// each into `buf`, where bytes that do not fit are dropped, and passes it to `take`. Returns the number of
    /// records, which is 0 only if `limit` is. For a stream of small records this is faster than one call for each.
    ///
    /// # Errors
    /// The ring or its doorbell is broken. The records before the error were taken.
    pub fn drain(
        &mut self,
        buf: &mut [u8],
        limit: usize,
        mut take: impl FnMut(&[u8]),
    ) -> Result<usize, Error> {
        if limit == 0 {
            return Ok(0);
        }
        match self.try_drain(buf, limit, &mut take)? {
            0 => {
                let len = self.wait(buf, None)?;
                take(&buf[..len.min(buf.len())]);
                Ok(1 + self.try_drain(buf, limit - 1, take)?)
            }
            count => Ok(count),
        }
    }

    /// As [`drain`](Self::drain), without waiting: 0 if there is no record.
    ///
    /// # Errors
    /// As `drain`.
    pub fn try_drain(
        &mut self,
        buf: &mut [u8],
        limit: usize,
        mut take: impl FnMut(&[u8]),
    ) -> Result<usize, Error> {
        let mut bytes = 0;
        let (count, wake) = self.consumer.drain(buf, limit, |record| {
            bytes += record.len();
            take(record);
        })?;
        self.pace.came_many(count, bytes);
        self.signal(wake)?;
        Ok(count)
    }

    fn release(&mut self) -> Result<(), Error> {
        let wake = self.consumer.release();
        self.signal(wake)
    }

    fn signal(&mut self, wake: Wake) -> Result<(), Error> {
        if wake == Wake::Yes {
            self.rings += 1;
            self.space.ring()?;
        }
        Ok(())
    }

    fn take(&mut self, buf: &mut [u8], limit: Option<Duration>) -> Result<usize, Error> {
        match self.try_recv(buf)? {
            Some(len) => Ok(len),
            None => self.wait(buf, limit),
        }
    }

    fn wait(&mut self, buf: &mut [u8], limit: Option<Duration>) -> Result<usize, Error> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        loop {
            self.pace.missed();
            let consumer = &mut self.consumer;
            if let Some(len) = self.spin.poll(|| consumer.pop(buf))? {
                self.pace.came(len);
                return Ok(len);
            }
            let (armed, wake) = self.consumer.arm_data()?;
            self.signal(wake)?;
            if armed == Armed::Sleep {
                sleep(&self.data, rest(deadline)?)?;
            }
            if let Some(len) = self.try_recv(buf)? {
                return Ok(len);
            }
        }
    }
}
