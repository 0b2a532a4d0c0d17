//! The epoll set with a `Port`'s descriptors, and the tokens that name them.
//!
//! | bits | field |
//! |---|---|
//! | 52..64 | `Port` (index in its shard) |
//! | 48..52 | kind of descriptor |
//! | 24..48 | generation of the stream, or 0 |
//! | 0..24 | slot of the stream, waker id, key |
//!
//! Rule: a descriptor is removed from the set before it is closed. Other processes may have duplicates (the frontend
//! of a kick, `aditd` of a socket), and then the registration would remain after the close.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use adit_engine::StreamId;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

const SINK_EDGES: EpollFlags = EpollFlags::EPOLLIN
    .union(EpollFlags::EPOLLRDHUP)
    .union(EpollFlags::EPOLLET);
/// Mask of the lowest field of a token.
pub(crate) const LOW: u64 = (1 << 24) - 1;

/// Identifies the descriptor that became ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Token {
    /// The shard's eventfd for commands.
    Commands,
    /// A descriptor of the shard's owner.
    Extra(u32),
    /// A waker of the `Port`'s carrier.
    Waker(u32),
    /// The sink of a stream.
    Sink { slot: u32, generation: u32 },
    /// A sink that outlives its stream until it has accepted its held bytes.
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

/// An epoll set, for the descriptors of one `Port`.
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

    /// Registers a socket, edge-triggered. The caller remembers an edge until the socket returns `WouldBlock`.
    pub(crate) fn add_edge(&self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        self.add(fd, token, SINK_EDGES)
    }

    /// Turns reports of room to write on (the first one comes at once if there is room) or off. Every read at the
    /// other end makes room, so a `Port` that holds no bytes for the socket turns the reports off.
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

    /// Registers a descriptor, level-triggered. Its handler must empty it.
    pub(crate) fn add_level(&self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        self.add(fd, token, EpollFlags::EPOLLIN)
    }

    fn add(&self, fd: BorrowedFd<'_>, token: Token, flags: EpollFlags) -> io::Result<()> {
        let event = EpollEvent::new(flags, token.pack(self.port));
        Ok(self.epoll.add(fd, event)?)
    }

    /// Turns reports of room to write on or off, for a level-triggered descriptor.
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

    /// Removes a descriptor from the set.
    pub(crate) fn remove(&self, fd: BorrowedFd<'_>) {
        // It fails only if the descriptor is not in the set.
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
    fn tokens_keep_all_their_fields() {
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
