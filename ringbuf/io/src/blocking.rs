//! Ends that wait: they look on for a while, then sleep until the doorbell rings.

use std::io;
use std::time::{Duration, Instant};

use adit_ringbuf::{Armed, Consumer, Corrupt, Pace, Producer, PushError, RingMem, Wake};
use vmm_sys_util::eventfd::EventFd;

use crate::Spin;
use crate::doorbell::{Doorbell, Waiter, sleep};

/// Nothing more goes through this end, or not now.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The time was over: the other side does not read, or does not write.
    #[error("the other side did nothing in time")]
    TimedOut,
    /// It would never fit.
    #[error("record of {len} bytes, at most {max} fit")]
    TooLong {
        /// Its length.
        len: usize,
        /// The longest.
        max: usize,
    },
    /// The other side broke the ring: it stays broken.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// The doorbell is broken.
    #[error("doorbell")]
    Doorbell(#[from] io::Error),
}

/// The writing end of a lane, with a doorbell towards the reader ("data") and one from it ("space").
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

    /// How often it rang the doorbell.
    pub fn rings(&self) -> u64 {
        self.rings
    }

    /// Sends one record, and waits for room as long as it takes.
    ///
    /// # Errors
    /// The record never fits, or the ring or its doorbell is broken.
    pub fn send(&mut self, record: &[u8]) -> Result<(), Error> {
        self.put(record, None)?;
        self.flush()
    }

    /// Sends one record, and waits for room until the time is over.
    ///
    /// # Errors
    /// As [`send`](Self::send); or the reader did not make room in time, and nothing was written.
    pub fn send_within(&mut self, record: &[u8], limit: Duration) -> Result<(), Error> {
        self.put(record, Some(limit))?;
        self.flush()
    }

    /// Writes one record without showing it yet: a batch is shown by [`flush`](Self::flush), or when it has grown to a
    /// quarter of the ring.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn queue(&mut self, record: &[u8]) -> Result<(), Error> {
        self.put(record, None)
    }

    /// Shows what was queued.
    ///
    /// # Errors
    /// The doorbell is broken.
    pub fn flush(&mut self) -> Result<(), Error> {
        let wake = self.producer.publish();
        self.ring(wake)
    }

    fn ring(&mut self, wake: Wake) -> Result<(), Error> {
        if wake == Wake::Yes {
            self.rings += 1;
            self.data.ring()?;
        }
        Ok(())
    }

    fn put(&mut self, record: &[u8], limit: Option<Duration>) -> Result<(), Error> {
        match try_put(&mut self.producer, record)? {
            Some(wake) => self.ring(wake),
            None => self.wait(record, limit),
        }
    }

    #[cold]
    fn wait(&mut self, record: &[u8], limit: Option<Duration>) -> Result<(), Error> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        self.flush()?;
        loop {
            let producer = &mut self.producer;
            if let Some(wake) = self.spin.look_on(|| try_put(producer, record))? {
                return self.ring(wake);
            }
            let (armed, wake) = self.producer.arm_space(record.len())?;
            self.ring(wake)?;
            if armed == Armed::Sleep {
                sleep(&self.space, rest(deadline)?)?;
            }
            if let Some(wake) = try_put(&mut self.producer, record)? {
                return self.ring(wake);
            }
        }
    }
}

/// Writes a record if there is room.
fn try_put<M: RingMem>(producer: &mut Producer<M>, record: &[u8]) -> Result<Option<Wake>, Error> {
    match producer.reserve(record.len()) {
        Ok(mut grant) => {
            grant.write(0, record);
            Ok(Some(grant.commit()))
        }
        Err(PushError::Full) => Ok(None),
        Err(PushError::TooLong { len, max }) => Err(Error::TooLong { len, max }),
        Err(PushError::Corrupt(corrupt)) => Err(corrupt.into()),
    }
}

/// What is left until then.
fn rest(deadline: Option<Instant>) -> Result<Option<Duration>, Error> {
    let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
    match left {
        Some(Duration::ZERO) => Err(Error::TimedOut),
        left => Ok(left),
    }
}

/// The reading end of a lane, with a doorbell towards the writer ("space") and one from it ("data").
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

    /// How often it rang the doorbell.
    pub fn rings(&self) -> u64 {
        self.rings
    }

    /// Receives one record into `buf`, and waits for it as long as it takes. Returns its length; what `buf` has no room
    /// for is dropped.
    ///
    /// # Errors
    /// The ring or its doorbell is broken.
    pub fn recv(&mut self, buf: &mut [u8]) -> Result<usize, Error> {
        self.take(buf, None)
    }

    /// Receives one record, and waits for it until the time is over.
    ///
    /// # Errors
    /// As [`recv`](Self::recv); or none came in time.
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

    fn release(&mut self) -> Result<(), Error> {
        let wake = self.consumer.release();
        self.ring(wake)
    }

    fn ring(&mut self, wake: Wake) -> Result<(), Error> {
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
            if let Some(len) = self.spin.look_on(|| consumer.pop(buf))? {
                self.pace.came(len);
                return Ok(len);
            }
            let (armed, wake) = self.consumer.arm_data()?;
            self.ring(wake)?;
            if armed == Armed::Sleep {
                sleep(&self.data, rest(deadline)?)?;
            }
            if let Some(len) = self.try_recv(buf)? {
                return Ok(len);
            }
        }
    }
}
