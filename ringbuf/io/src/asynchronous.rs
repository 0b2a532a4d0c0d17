//! Ends for tokio. They never poll, because their thread has other work. The doorbell wakes a task that waits.

use std::io;

use adit_ringbuf::{Armed, Consumer, Producer, PushError, RingMem, Wake};
use tokio::io::unix::AsyncFd;
use vmm_sys_util::eventfd::EventFd;

use crate::blocking::Error;
use crate::doorbell::{Bell, Doorbell, Waiter};

/// The writing end of a lane.
#[derive(Debug)]
pub struct Sender<M> {
    producer: Producer<M>,
    data: EventFd,
    space: AsyncFd<Bell>,
}

/// The reading end of a lane.
#[derive(Debug)]
pub struct Receiver<M> {
    consumer: Consumer<M>,
    space: EventFd,
    data: AsyncFd<Bell>,
}

async fn wait_for(bell: &AsyncFd<Bell>) -> io::Result<()> {
    let mut ready = bell.readable().await?;
    ready.clear_ready();
    ready.get_inner().0.clear()
}

fn signal(bell: &EventFd, wake: Wake) -> io::Result<()> {
    match wake {
        Wake::Yes => bell.ring(),
        Wake::No => Ok(()),
    }
}

impl<M: RingMem> Sender<M> {
    /// Takes a producer that was made with events. It signals `data` to wake the reader, and waits on `space`.
    ///
    /// # Errors
    /// There is no tokio runtime, or it cannot watch the doorbell.
    pub fn new(producer: Producer<M>, data: EventFd, space: EventFd) -> io::Result<Self> {
        Ok(Self {
            producer,
            data,
            space: Bell::watch(space)?,
        })
    }

    /// Sends one record. Waits for room. If the future is dropped before it completes, nothing was sent.
    ///
    /// # Errors
    /// The record never fits, or the ring or its doorbell is broken.
    pub async fn send(&mut self, record: &[u8]) -> Result<(), Error> {
        loop {
            match self.producer.try_push(record) {
                Ok(wake) => return Ok(signal(&self.data, wake)?),
                Err(PushError::Full) => {}
                Err(PushError::TooLong { len, max }) => return Err(Error::TooLong { len, max }),
                Err(PushError::Corrupt(corrupt)) => return Err(corrupt.into()),
            }
            let (armed, wake) = self.producer.arm_space(record.len())?;
            signal(&self.data, wake)?;
            if armed == Armed::Sleep {
                wait_for(&self.space).await?;
            }
        }
    }
}

impl<M: RingMem> Receiver<M> {
    /// Takes a consumer that was made with events. It signals `space` to wake the writer, and waits on `data`.
    ///
    /// # Errors
    /// There is no tokio runtime, or it cannot watch the doorbell.
    pub fn new(consumer: Consumer<M>, space: EventFd, data: EventFd) -> io::Result<Self> {
        Ok(Self {
            consumer,
            space,
            data: Bell::watch(data)?,
        })
    }

    /// Receives one record if there is one. Use it to drain a burst after one wake-up.
    ///
    /// # Errors
    /// The ring or its doorbell is broken.
    pub fn try_recv(&mut self, buf: &mut [u8]) -> Result<Option<usize>, Error> {
        let found = self.consumer.pop(buf)?;
        if found.is_none() || self.consumer.wants_release() {
            signal(&self.space, self.consumer.release())?;
        }
        Ok(found)
    }

    /// Receives the records that are there, at most `limit`, and waits for the first one. Copies each into `buf`, where
    /// bytes that do not fit are dropped, and passes it to `take`. Returns the number of records, which is 0 only if
    /// `limit` is. If the future is dropped before it completes, no record was taken.
    ///
    /// # Errors
    /// The ring or its doorbell is broken. The records before the error were taken.
    pub async fn drain(
        &mut self,
        buf: &mut [u8],
        limit: usize,
        mut take: impl FnMut(&[u8]),
    ) -> Result<usize, Error> {
        loop {
            let (count, wake) = self.consumer.drain(buf, limit, &mut take)?;
            signal(&self.space, wake)?;
            if count > 0 || limit == 0 {
                return Ok(count);
            }
            let (armed, wake) = self.consumer.arm_data()?;
            signal(&self.space, wake)?;
            if armed == Armed::Sleep {
                wait_for(&self.data).await?;
            }
        }
    }

    /// Receives one record into `buf`. Waits for it. Returns the length of the record; bytes that do not fit into
    /// `buf` are dropped. If the future is dropped before it completes, no record was taken.
    ///
    /// # Errors
    /// The ring or its doorbell is broken.
    pub async fn recv(&mut self, buf: &mut [u8]) -> Result<usize, Error> {
        loop {
            if let Some(len) = self.try_recv(buf)? {
                return Ok(len);
            }
            let (armed, wake) = self.consumer.arm_data()?;
            signal(&self.space, wake)?;
            if armed == Armed::Sleep {
                wait_for(&self.data).await?;
            }
        }
    }
}
