//! A connection to the proxy.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::{RecvFlags, SendFlags};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};

use super::Address;

/// How soon a Unix socket is tried again whose listener has as many clients waiting as it may: it refuses at once.
const AGAIN: Duration = Duration::from_millis(20);

/// TCP or Unix.
#[derive(Debug)]
pub enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    pub async fn connect(to: &Address) -> io::Result<Self> {
        let path = match to {
            Address::Tcp(address) => {
                let stream = TcpStream::connect(address.as_str()).await?;
                // Small writes of an interactive session go out at once, as every program that asks for a tunnel wants it.
                stream.set_nodelay(true)?;
                return Ok(Self::Tcp(stream));
            }
            Address::Unix(path) => path,
        };
        loop {
            match UnixStream::connect(path).await {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => tokio::time::sleep(AGAIN).await,
                done => return done.map(Self::Unix),
            }
        }
    }

    /// Receives some bytes; with [`RecvFlags::PEEK`] they stay in the socket. 0: the end.
    pub async fn receive(&self, bytes: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
        let receive = |fd: BorrowedFd<'_>, bytes: &mut [u8]| {
            let (got, _) = rustix::net::recv(fd, bytes, flags)?;
            Ok(got)
        };
        loop {
            self.ready(Interest::READABLE).await?;
            match self.attempt(Interest::READABLE, |fd| receive(fd, bytes)) {
                Err(e) if is_passing(&e) => {}
                done => return done,
            }
        }
    }

    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        let send = |fd: BorrowedFd<'_>, bytes: &[u8]| {
            Ok(rustix::net::send(fd, bytes, SendFlags::NOSIGNAL)?)
        };
        while !bytes.is_empty() {
            self.ready(Interest::WRITABLE).await?;
            match self.attempt(Interest::WRITABLE, |fd| send(fd, bytes)) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(e) if is_passing(&e) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Gives the descriptor away. It still does not block.
    pub fn into_fd(self) -> io::Result<OwnedFd> {
        match self {
            Self::Tcp(stream) => Ok(stream.into_std()?.into()),
            Self::Unix(stream) => Ok(stream.into_std()?.into()),
        }
    }

    async fn ready(&self, interest: Interest) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.ready(interest).await.map(drop),
            Self::Unix(stream) => stream.ready(interest).await.map(drop),
        }
    }

    fn attempt<T>(
        &self,
        interest: Interest,
        call: impl FnOnce(BorrowedFd<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        match self {
            Self::Tcp(stream) => stream.try_io(interest, || call(stream.as_fd())),
            Self::Unix(stream) => stream.try_io(interest, || call(stream.as_fd())),
        }
    }
}

fn is_passing(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
