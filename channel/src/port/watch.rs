//! The epoll set that a port's descriptors are registered in, and the tokens that name them.
//!
//! | bits | field |
//! |---|---|
//! | 52..64 | port (index in its shard) |
//! | 48..52 | what kind of descriptor |
//! | 24..48 | generation of the stream, or 0 |
//! | 0..24 | slot of the stream, waker id, key |
//!
//! Rule: a descriptor is taken out of the set before it is closed. Others may hold duplicates (the frontend of a kick,
//! `aditd` of a socket), and then a close alone leaves the registration behind.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use adit_engine::StreamId;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

const SINK_EDGES: EpollFlags = EpollFlags::EPOLLIN
    .union(EpollFlags::EPOLLRDHUP)
    .union(EpollFlags::EPOLLET);
/// What the fields of a token hold.
pub(crate) const LOW: u64 = (1 << 24) - 1;

/// Which descriptor became ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Token {
    /// The shard's command eventfd.
    Commands,
    /// A descriptor of the shard's owner.
    Extra(u32),
    /// A waker of the port's carrier.
    Waker(u32),
    /// The sink of a stream.
    Sink { slot: u32, generation: u32 },
    /// A sink that outlives its stream until it took all that is held for it.
    Linger(u32),
}

impl Token {
    pub(crate) fn pack(self, port: u16) -> u64 {
        let (kind, generation, low) = match self {
            Self::Commands => (0, 0, 0),
            Self::Extra(key) => (1, 0, key),
            Self::Waker(id) => (2, 0, id),
            Self::Sink { slot, generation } => (3, generation, slot),
            Self::Linger(index) => (4, 0, index),
        };
        u64::from(port) << 52
            | kind << 48
            | (u64::from(generation) & LOW) << 24
            | u64::from(low) & LOW
    }

    pub(crate) fn unpack(raw: u64) -> (u16, Self) {
        let low = (raw & LOW) as u32;
        let token = match raw >> 48 & 0xf {
            0 => Self::Commands,
            1 => Self::Extra(low),
            2 => Self::Waker(low),
            3 => Self::Sink {
                slot: low,
                generation: (raw >> 24 & LOW) as u32,
            },
            _ => Self::Linger(low),
        };
        ((raw >> 52) as u16, token)
    }

    /// The token of a stream's sink.
    pub(crate) fn sink(id: StreamId) -> Self {
        Self::Sink {
            slot: id.slot(),
            generation: id.generation() & LOW as u32,
        }
    }
}

/// An epoll set, as one port sees it.
#[derive(Clone, Debug)]
pub(crate) struct Watch {
    epoll: Arc<Epoll>,
    port: u16,
}

impl Watch {
    pub(crate) fn new() -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        Ok(Self { epoll, port: 0 })
    }

    pub(crate) fn of_port(&self, port: u16) -> Self {
        Self {
            epoll: self.epoll.clone(),
            port,
        }
    }

    pub(crate) fn epoll(&self) -> &Epoll {
        &self.epoll
    }

    /// Registers a socket, edge-triggered: an edge is remembered until the socket said `WouldBlock`.
    pub(crate) fn add_edge(&self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        self.add(fd, token, SINK_EDGES)
    }

    /// Also tells when there is room to write (at once, if there is), or no longer. A reader makes room with every read:
    /// whoever holds nothing for it need not wake up for that.
    pub(crate) fn edge_on_room(
        &self,
        fd: BorrowedFd<'_>,
        token: Token,
        on: bool,
    ) -> io::Result<()> {
        let mut flags = SINK_EDGES;
        flags.set(EpollFlags::EPOLLOUT, on);
        let mut event = EpollEvent::new(flags, token.pack(self.port));
        Ok(self.epoll.modify(fd, &mut event)?)
    }

    /// Registers a descriptor that whoever handles it empties.
    pub(crate) fn add_level(&self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        self.add(fd, token, EpollFlags::EPOLLIN)
    }

    fn add(&self, fd: BorrowedFd<'_>, token: Token, flags: EpollFlags) -> io::Result<()> {
        let event = EpollEvent::new(flags, token.pack(self.port));
        Ok(self.epoll.add(fd, event)?)
    }

    /// Turns waiting for room to write on or off for a level-triggered descriptor.
    pub(crate) fn set_writable(
        &self,
        fd: BorrowedFd<'_>,
        token: Token,
        on: bool,
    ) -> io::Result<()> {
        let mut flags = EpollFlags::EPOLLIN;
        flags.set(EpollFlags::EPOLLOUT, on);
        let mut event = EpollEvent::new(flags, token.pack(self.port));
        Ok(self.epoll.modify(fd, &mut event)?)
    }

    /// Takes a descriptor out of the set.
    pub(crate) fn remove(&self, fd: BorrowedFd<'_>) {
        // It fails only for one that is not in it.
        let _ = self.epoll.delete(fd);
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_keep_what_they_name() {
        let max = LOW as u32;
        for token in [
            Token::Commands,
            Token::Extra(7),
            Token::Waker(2),
            Token::Sink {
                slot: 1023,
                generation: max,
            },
            Token::Linger(max),
        ] {
            for port in [0, 1, 4095] {
                assert_eq!(Token::unpack(token.pack(port)), (port, token));
            }
        }
    }
}
