//! Ends for tokio: they never look on, for their thread has other work; a task that waits is woken by the doorbell.

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

async fn rung(bell: &AsyncFd<Bell>) -> io::Result<()> {
    let mut ready = bell.readable().await?;
    ready.clear_ready();
    ready.get_inner().0.clear()
}

fn ring(bell: &EventFd, wake: Wake) -> io::Result<()> {
    match wake {
        Wake::Yes => bell.ring(),
        Wake::No => Ok(()),
    }
}

impl<M: RingMem> Sender<M> {
    /// Takes a producer that was made with events; `data` rings the reader, `space` is rung by it.
    ///
    /// # Errors
    /// There is no runtime, or it cannot watch the doorbell.
    pub fn new(producer: Producer<M>, data: EventFd, space: EventFd) -> io::Result<Self> {
        Ok(Self {
            producer,
            data,
            space: Bell::watch(space)?,
        })
    }

    /// Sends one record, and waits for room. Cancelled, it sent nothing.
    ///
    /// # Errors
    /// The record never fits, or the ring or its doorbell is broken.
    pub async fn send(&mut self, record: &[u8]) -> Result<(), Error> {
        loop {
            match self.producer.try_push(record) {
                Ok(wake) => return Ok(ring(&self.data, wake)?),
                Err(PushError::Full) => {}
                Err(PushError::TooLong { len, max }) => return Err(Error::TooLong { len, max }),
                Err(PushError::Corrupt(corrupt)) => return Err(corrupt.into()),
            }
            let (armed, wake) = self.producer.arm_space(record.len())?;
            ring(&self.data, wake)?;
            if armed == Armed::Sleep {
                rung(&self.space).await?;
            }
        }
    }
}

impl<M: RingMem> Receiver<M> {
    /// Takes a consumer that was made with events; `space` rings the writer, `data` is rung by it.
    ///
    /// # Errors
    /// There is no runtime, or it cannot watch the doorbell.
    pub fn new(consumer: Consumer<M>, space: EventFd, data: EventFd) -> io::Result<Self> {
        Ok(Self {
            consumer,
            space,
            data: Bell::watch(data)?,
        })
    }

    /// Receives one record if there is one: a burst is drained with it, and woken for once.
    ///
    /// # Errors
    /// The ring or its doorbell is broken.
    pub fn try_recv(&mut self, buf: &mut [u8]) -> Result<Option<usize>, Error> {
        let found = self.consumer.pop(buf)?;
        if found.is_none() || self.consumer.wants_release() {
            ring(&self.space, self.consumer.release())?;
        }
        Ok(found)
    }

    /// Receives one record into `buf`, and waits for it. Returns its length; what `buf` has no room for is dropped.
    /// Cancelled, it took nothing.
    ///
    /// # Errors
    /// The ring or its doorbell is broken.
    pub async fn recv(&mut self, buf: &mut [u8]) -> Result<usize, Error> {
        loop {
            if let Some(len) = self.try_recv(buf)? {
                return Ok(len);
            }
            let (armed, wake) = self.consumer.arm_data()?;
            ring(&self.space, wake)?;
            if armed == Armed::Sleep {
                rung(&self.data).await?;
            }
        }
    }
}
