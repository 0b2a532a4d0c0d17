//! A TCP connection under TLS, which reads more at once than rustls asks for: that takes a quarter of a record at a time, and each is a
//! call to the kernel.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Bytes that are read at once.
const AHEAD: usize = 64 << 10;

/// The connection. While nothing comes, nothing is kept.
#[derive(Debug)]
pub struct ReadAhead {
    tcp: TcpStream,
    ahead: Vec<u8>,
    /// Of these, so many were taken.
    taken: usize,
}

impl ReadAhead {
    /// Of a connection of which nothing was read.
    pub fn new(tcp: TcpStream) -> Self {
        Self {
            tcp,
            ahead: Vec::new(),
            taken: 0,
        }
    }

    /// The connection itself. Not to be read from.
    pub fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// The connection, without what was read of it.
    pub fn into_tcp(self) -> TcpStream {
        self.tcp
    }
}

impl AsyncRead for ReadAhead {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.ahead.is_empty() {
            loop {
                ready!(this.tcp.poll_read_ready(cx))?;
                this.ahead.reserve_exact(AHEAD);
                match this.tcp.try_read_buf(&mut this.ahead) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => this.ahead = Vec::new(),
                    Err(e) => return Poll::Ready(Err(e)),
                    Ok(_) => break,
                }
            }
        }
        let rest = &this.ahead[this.taken..];
        let some = &rest[..rest.len().min(buf.remaining())];
        buf.put_slice(some);
        this.taken += some.len();
        if this.taken == this.ahead.len() {
            (this.ahead, this.taken) = (Vec::new(), 0);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ReadAhead {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}
