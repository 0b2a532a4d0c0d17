//! The ring: streams over a region of shared memory.
//!
//! ```text
//! what the host dials:  region ══ shard's thread: port, engine ══ Stream: hello ─► the local socket itself
//! what the agent dials: region ══ shard's thread: port, engine ══ socketpair ── Conn ── client
//! ```
//! A thread of its own moves the bytes, asleep until the host's doorbell or a socket wakes it; the rest of the agent sees
//! ordinary streams. When a session ends and another begins, the listener stays and old streams end. After a reset the near
//! socket reads end of file and accepts no more bytes; after an end it still accepts them.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use adit_channel::dial::DialError;
use adit_channel::hello::PORT;
use adit_channel::ring::{RingBells, RingCarrier, RingError};
use adit_channel::shard::{Handle, Shard, ShardThread};
use adit_channel::stream::{Listener, Stream, Target};
use adit_engine::{EngineConfig, How};
use adit_ringbuf::Mapped;
use adit_ringbuf::region::Features;

use super::{HostStream, ReadWrite};
use crate::conn::Conn;

/// How long the host may take to answer a request.
const DIAL_LIMIT: Duration = Duration::from_secs(2);
/// How long a shard without a doorbell polls after the last work: nothing would wake it.
const DEAF_LOOK: Duration = Duration::from_micros(200);

/// This guest's end of a ring, on a thread.
pub struct RingEnd {
    handle: Handle,
    _thread: ShardThread,
}

/// Finds the region that the host made of this memory, and asks for a session.
///
/// # Errors
/// There is no region, or one of an unknown version; or there are no descriptors left.
pub fn carrier(memory: Mapped, bells: RingBells) -> Result<RingCarrier, RingError> {
    let start = getrandom::u64().map_err(io::Error::other)?;
    RingCarrier::guest(memory, start, Features::NONE, bells)
}

impl RingEnd {
    /// Runs a carrier on a thread.
    ///
    /// # Errors
    /// There are no descriptors or threads left.
    pub fn start(carrier: RingCarrier) -> io::Result<Self> {
        let mut shard = Shard::new()?;
        if carrier.is_deaf() {
            shard.busy_poll(DEAF_LOOK);
        }
        let seed = getrandom::u64().map_err(io::Error::other)?;
        let port = shard.add(carrier, EngineConfig::default(), seed)?;
        let handle = shard.handle(port);
        let thread = shard.spawn("ring")?;
        Ok(Self {
            handle,
            _thread: thread,
        })
    }
}

impl RingEnd {
    /// Accepts the streams that the host dials.
    ///
    /// # Errors
    /// There are too many listeners, or the end is gone.
    pub fn listen(&self) -> io::Result<Listener> {
        Ok(self.handle.listen(PORT)?)
    }
}

/// The shard itself moves the bytes between the ring and a local socket, so that a tunnel needs no thread.
impl HostStream for Stream {
    fn set_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_deadline(limit.map(|limit| Instant::now() + limit));
        Ok(())
    }

    fn io(&self) -> Box<dyn ReadWrite + '_> {
        Box::new(self)
    }

    fn end_sending(&self) -> io::Result<()> {
        self.shutdown(How::Send)
    }

    fn is_hosts(&self) -> bool {
        true
    }

    fn into_socket(self: Box<Self>) -> Result<OwnedFd, Box<dyn HostStream>> {
        Err(self)
    }

    fn relay_to(self: Box<Self>, local: Conn) -> io::Result<()> {
        local.set_nonblocking()?;
        self.splice(local.into());
        Ok(())
    }
}

/// A stream as a socket: the shard has the other end of it.
fn conn(stream: Stream) -> io::Result<Conn> {
    let (near, far) = UnixStream::pair()?;
    far.set_nonblocking(true)?;
    stream.splice(OwnedFd::from(far));
    Ok(OwnedFd::from(near).into())
}

impl RingEnd {
    /// Dials the host's well-known port.
    ///
    /// # Errors
    /// There is no session, or the host does not take the stream.
    pub fn dial_host(&self) -> io::Result<Conn> {
        let target = Target {
            port: PORT,
            hello: None,
        };
        let dialled = self.handle.dialer().dial(&target, DIAL_LIMIT);
        conn(dialled.map_err(|e| {
            let kind = match e {
                DialError::NoSession => io::ErrorKind::NotConnected,
                DialError::Refused => io::ErrorKind::ConnectionRefused,
                DialError::Timeout => io::ErrorKind::TimedOut,
                _ => io::ErrorKind::ConnectionReset,
            };
            io::Error::new(kind, e)
        })?)
    }
}
