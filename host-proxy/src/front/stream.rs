//! A client's connection: TCP, or one end of a pair whose other end [`pump`](super::pump) serves.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, Ready};
use tokio::net::{TcpStream, UnixStream};

/// The connection. Nobody passes descriptors over it: of a pair, aditd has both ends.
#[derive(Debug)]
pub enum Stream {
    /// TCP.
    Tcp(TcpStream),
    /// An end of a pair.
    Pair(UnixStream),
}

macro_rules! with {
    ($self:expr, $stream:pat => $call:expr) => {
        match $self {
            Stream::Tcp($stream) => $call,
            Stream::Pair($stream) => $call,
        }
    };
}

impl Stream {
    /// As of a [`TcpStream`].
    ///
    /// # Errors
    /// As of a [`TcpStream`].
    pub fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        with!(self, stream => stream.poll_read_ready(cx))
    }

    /// As of a [`TcpStream`].
    ///
    /// # Errors
    /// As of a [`TcpStream`].
    pub fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        with!(self, stream => stream.poll_write_ready(cx))
    }

    /// As of a [`TcpStream`].
    ///
    /// # Errors
    /// As of a [`TcpStream`].
    pub async fn ready(&self, interest: Interest) -> io::Result<Ready> {
        with!(self, stream => stream.ready(interest).await)
    }

    /// As of a [`TcpStream`].
    ///
    /// # Errors
    /// As of a [`TcpStream`].
    pub fn try_io<R>(
        &self,
        interest: Interest,
        call: impl FnOnce() -> io::Result<R>,
    ) -> io::Result<R> {
        with!(self, stream => stream.try_io(interest, call))
    }

    /// As of a [`TcpStream`].
    ///
    /// # Errors
    /// As of a [`TcpStream`].
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        with!(self, stream => stream.try_write(bytes))
    }

    /// As of a [`TcpStream`].
    ///
    /// # Errors
    /// As of a [`TcpStream`].
    pub fn take_error(&self) -> io::Result<Option<io::Error>> {
        with!(self, stream => stream.take_error())
    }

    /// The socket, which tokio knows no more.
    ///
    /// # Errors
    /// As of a [`TcpStream`].
    pub fn into_fd(self) -> io::Result<OwnedFd> {
        match self {
            Self::Tcp(tcp) => tcp.into_std().map(OwnedFd::from),
            Self::Pair(end) => end.into_std().map(OwnedFd::from),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        with!(self, stream => stream.as_fd())
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        with!(self, stream => stream.as_raw_fd())
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        with!(self.get_mut(), stream => Pin::new(stream).poll_read(cx, buf))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        with!(self.get_mut(), stream => Pin::new(stream).poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        with!(self.get_mut(), stream => Pin::new(stream).poll_write_vectored(cx, bytes))
    }

    fn is_write_vectored(&self) -> bool {
        with!(self, stream => stream.is_write_vectored())
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        with!(self.get_mut(), stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        with!(self.get_mut(), stream => Pin::new(stream).poll_shutdown(cx))
    }
}
