//! A connection, as h2 is given it: counted, and read in turns. A client's, and one to another host.
//!
//! h2 reads as long as there is something, and answers much of it by itself. All connections have one thread together, so no
//! more than [`TURN_MAX`] is read of one before the others have had their turn.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::calm::Seen;
use crate::proxy::ends::ClientIo;

/// Bytes that are read of a connection in one turn.
const TURN_MAX: usize = 64 << 10;

/// What is counted of a connection ([`Seen`]).
#[derive(Debug, Default)]
pub(crate) struct Meter {
    read: AtomicU64,
    wanted: AtomicU64,
    requests: AtomicU64,
    given_up: AtomicU64,
    /// Bytes that were read in this turn.
    turn: AtomicUsize,
}

impl Meter {
    /// Bytes of somebody's body or field were carried, in either direction.
    pub(crate) fn wanted(&self, bytes: usize) {
        add(&self.wanted, bytes);
    }

    /// A request came.
    pub(crate) fn request(&self) {
        add(&self.requests, 1);
    }

    /// Its client gave it up.
    pub(super) fn given_up(&self) {
        add(&self.given_up, 1);
    }

    /// Others had their turn.
    pub(crate) fn new_turn(&self) {
        self.turn.store(0, Ordering::Relaxed);
    }

    /// All of it.
    pub(crate) fn seen(&self) -> Seen {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Seen {
            read: of(&self.read),
            wanted: of(&self.wanted),
            requests: of(&self.requests),
            given_up: of(&self.given_up),
        }
    }
}

fn add(counter: &AtomicU64, n: usize) {
    let n = u64::try_from(n).unwrap_or(u64::MAX);
    counter.fetch_add(n, Ordering::Relaxed);
}

/// The connection.
pub(crate) struct Metered<I> {
    io: I,
    /// What was read of it already.
    ahead: BytesMut,
    meter: Arc<Meter>,
}

impl<I> Metered<I> {
    pub(crate) fn new(io: I, ahead: BytesMut, meter: Arc<Meter>) -> Self {
        Self { io, ahead, meter }
    }
}

/// A client's connection, which is somebody else's again when h2 is done with it.
pub(super) struct Lent(pub(super) Arc<Mutex<ClientIo>>);

impl Lent {
    fn io(&self) -> MutexGuard<'_, ClientIo> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Metered<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.meter.turn.load(Ordering::Relaxed) >= TURN_MAX {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let read = if self.ahead.is_empty() {
            Pin::new(&mut self.io).poll_read(cx, buf)
        } else {
            let some = self.ahead.len().min(buf.remaining());
            buf.put_slice(&self.ahead[..some]);
            self.ahead.advance(some);
            Poll::Ready(Ok(()))
        };
        let new = buf.filled().len() - before;
        self.meter.turn.fetch_add(new, Ordering::Relaxed);
        add(&self.meter.read, new);
        read
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Metered<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

impl AsyncRead for Lent {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.io()).poll_read(cx, buf)
    }
}

impl AsyncWrite for Lent {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.io()).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.io()).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io().is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.io()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.io()).poll_shutdown(cx)
    }
}
