//! The socket between monitor and worker, in a runtime.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use adit_passed::Closer;
use tokio::io::Interest;

use super::wire::{self, Message, Packet, WireError};
use crate::passing;

/// One end. Whatever descriptors wait in it are closed by its closer.
#[derive(Debug)]
pub struct Packets {
    socket: passing::Socket,
    closer: Closer,
}

impl Packets {
    /// Takes a connected socket.
    ///
    /// # Errors
    /// It cannot be watched.
    pub fn new(socket: OwnedFd, closer: Closer) -> io::Result<Self> {
        let socket = passing::Socket::new(socket.into(), &closer)?;
        Ok(Self { socket, closer })
    }

    /// Of the descriptors that the other side passes.
    pub fn closer(&self) -> &Closer {
        &self.closer
    }

    /// Sends a packet, and waits for room.
    ///
    /// # Errors
    /// The other side has gone, or the packet is too long.
    pub async fn send(
        &self,
        id: u32,
        message: &Message,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), WireError> {
        let send = || wire::send(self.socket.stream(), id, message, fds);
        self.when_ready(Interest::WRITABLE, send).await
    }

    /// Receives the next packet. `None`: the other side has gone.
    ///
    /// # Errors
    /// The socket failed, or the packet is none of [`wire`].
    pub async fn receive(&self) -> Result<Option<Packet>, WireError> {
        let receive = || wire::receive(self.socket.stream(), &self.closer);
        self.when_ready(Interest::READABLE, receive).await
    }

    async fn when_ready<T>(
        &self,
        interest: Interest,
        mut call: impl FnMut() -> Result<T, WireError>,
    ) -> Result<T, WireError> {
        let socket = self.socket.stream();
        loop {
            socket.ready(interest).await?;
            let tried = socket.try_io(interest, || match call() {
                Err(WireError::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => Err(e),
                done => Ok(done),
            });
            match tried {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                done => return done?,
            }
        }
    }
}

impl AsFd for Packets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.stream().as_fd()
    }
}
