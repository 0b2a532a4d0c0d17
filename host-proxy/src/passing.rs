//! A Unix socket whose other end may be in a guest's hands, by way of its port process.
//!
//! Whoever has the other end can pass descriptors on it, also where nobody expects any. A plain read lets the kernel close
//! those at once, in the reader's thread, and a plain close those that were never read; either may take as long as a TCP
//! socket lingers. aditd has one thread for everybody. So here they are received, and closed, like any other that was passed.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use adit_passed::Closer;
use rustix::net::{RecvFlags, Shutdown};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;
use tokio::time::Sleep;

/// The socket. Dropped, it is shut down, and closed by its closer.
#[derive(Debug)]
pub struct Socket {
    // `None` only while it is dropped.
    stream: Option<UnixStream>,
    closer: Closer,
    /// When to look again whether it is full.
    look: Option<Pin<Box<Sleep>>>,
}

/// How long until a closer that is full is looked at again.
const CLOSE_LOOK: Duration = Duration::from_millis(10);

impl Socket {
    /// Takes a socket over.
    ///
    /// # Errors
    /// It cannot be watched.
    pub fn new(stream: std::os::unix::net::UnixStream, closer: &Closer) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream: Some(UnixStream::from_std(stream)?),
            closer: closer.clone(),
            look: None,
        })
    }

    /// Has it closed by another closer, with what is passed from now on.
    pub fn close_by(&mut self, closer: &Closer) {
        self.closer = closer.clone();
    }

    /// What it is to tokio. Not to be read from.
    pub fn stream(&self) -> &UnixStream {
        let Some(stream) = &self.stream else {
            unreachable!("it is taken only when the whole is dropped")
        };
        stream
    }

    /// Reads what is there, while somebody else may write.
    ///
    /// # Errors
    /// As of a socket.
    pub async fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        let stream = self.stream();
        loop {
            stream.readable().await?;
            if self.closer.is_full() {
                tokio::time::sleep(CLOSE_LOOK).await;
                continue;
            }
            let got = stream.try_io(Interest::READABLE, || {
                adit_passed::receive(stream, into, RecvFlags::DONTWAIT, &self.closer)
            });
            match got {
                Ok(got) => return Ok(got.bytes),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Writes all of it, while somebody else may read.
    ///
    /// # Errors
    /// As of a socket.
    pub async fn send(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.stream().writable().await?;
            match self.stream().try_write(bytes) {
                Ok(n) => bytes = &bytes[n..],
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Ends sending.
    ///
    /// # Errors
    /// As of a socket.
    pub fn end(&self) -> io::Result<()> {
        Ok(rustix::net::shutdown(self.stream(), Shutdown::Write)?)
    }

    fn writer(self: Pin<&mut Self>) -> Pin<&mut UnixStream> {
        let Some(stream) = &mut self.get_mut().stream else {
            unreachable!("it is taken only when the whole is dropped")
        };
        Pin::new(stream)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Some(Ok(stream)) = self.stream.take().map(UnixStream::into_std) {
            // Its end is told now.
            let _ = stream.shutdown(std::net::Shutdown::Both);
            self.closer.close(stream);
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            ready!(this.stream().poll_read_ready(cx))?;
            if this.closer.is_full() {
                // Until what was passed is closed, or the stream is given up for other reasons.
                let later = || Box::pin(tokio::time::sleep(CLOSE_LOOK));
                let look = this.look.get_or_insert_with(later);
                ready!(look.as_mut().poll(cx));
                this.look = None;
                continue;
            }
            let stream = this.stream();
            let room = buf.initialize_unfilled();
            let got = stream.try_io(Interest::READABLE, || {
                adit_passed::receive(stream, room, RecvFlags::DONTWAIT, &this.closer)
            });
            match got {
                Ok(got) => {
                    buf.advance(got.bytes);
                    return Poll::Ready(Ok(()));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.writer().poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.writer().poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream().is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.writer().poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.writer().poll_shutdown(cx)
    }
}
