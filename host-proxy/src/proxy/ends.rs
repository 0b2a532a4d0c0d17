//! An end is told apart from a stream that was broken off, on both sides of a relayed request.
//!
//! | towards | an end | broken off |
//! |---|---|---|
//! | the guest ([`GuestIo`]) | end of file, and the port process still takes bytes | end of file, and it takes none (EPIPE): it closed |
//! | the client ([`ClientIo`]) | the last chunk, FIN | RST; no last chunk |
//!
//! A Unix socket has no reset. So whoever ends something in order ends its sending, and closes only after the other side
//! has closed; a process that dies cannot keep to that. And a TCP socket over which an answer is under way is set so that
//! its close is a reset, whoever closes it.
//!
//! A client of CONNECT is shared with a port process while its dial is under way ([`Shared`]), and a guest may control that one.
//! It can make the socket blocking, and have its last close wait; so what aditd still does with it never blocks, whatever the
//! socket's mode, and it is closed on another thread.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use adit_channel::socket_end;
use adit_passed::Closer;
use hyper::body::Body as _;
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, ReadBuf};

use super::bodies::{Watch, Watched};
use super::cut_off::cut_off;
use super::interim::Interim;
use super::problem::Body;
use crate::front::stream::Stream;
use crate::passing::Socket;

/// How long a guest may take to end a stream that we have ended.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Whether an answer is under way on a client's connection.
#[derive(Clone, Default)]
pub(crate) struct UnderWay(Arc<AtomicBool>);

impl UnderWay {
    /// Nothing is due any more: a close is an end.
    pub(crate) fn over(&self) {
        self.0.store(false, Ordering::Release);
    }
}

/// How many bytes have come from a guest over a stream.
#[derive(Clone, Default)]
pub(super) struct Heard(Arc<AtomicU64>);

impl Heard {
    pub(super) fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// A stream to a guest. Where its other side ends in order, as an agent does, an end without that is an error.
pub(super) struct GuestIo {
    inner: Socket,
    in_order: bool,
    heard: Heard,
    /// We have ended our sending, so that nothing can be told any more.
    ended: bool,
}

impl GuestIo {
    pub(super) fn new(inner: Socket, in_order: bool, heard: Heard) -> Self {
        Self {
            inner,
            in_order,
            heard,
            ended: false,
        }
    }

    fn is_broken_off(&self) -> bool {
        self.in_order && !self.ended && socket_end::is_closed(self.inner.stream())
    }

    /// Ends the stream in order, and waits a while for the guest to do so.
    pub(super) async fn end(mut self) {
        let ended = async {
            self.shutdown().await?;
            let mut rest = [0; 4096];
            while self.inner.read(&mut rest).await? > 0 {}
            io::Result::Ok(())
        };
        let _ = tokio::time::timeout(END_LIMIT, ended).await;
    }
}

impl AsyncRead for GuestIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (before, room) = (buf.filled().len(), buf.remaining());
        let read = Pin::new(&mut self.inner).poll_read(cx, buf);
        let bytes = buf.filled().len() - before;
        self.heard.add(bytes);
        if matches!(read, Poll::Ready(Ok(()))) && bytes == 0 && room > 0 && self.is_broken_off() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        read
    }
}

impl AsyncWrite for GuestIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.ended = true;
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// Whether a port process has a duplicate of a client's socket, or has had one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shared(Arc<SharedInner>);

#[derive(Debug, Default)]
struct SharedInner {
    closer: OnceLock<Closer>,
    is_lost: AtomicBool,
}

impl Shared {
    /// It is about to get one. `closer` closes what this port process has had.
    pub(crate) fn with(&self, closer: &Closer) {
        let _ = self.0.closer.set(closer.clone());
    }

    /// Nobody knows whether the client was greeted: its connection is reset, whoever else has the socket.
    pub(crate) fn lose(&self) {
        self.0.is_lost.store(true, Ordering::Relaxed);
    }

    fn is_so(&self) -> bool {
        self.0.closer.get().is_some()
    }
}

/// A client's connection. While an answer is under way, closing it is a reset: also when this process dies.
pub(crate) struct ClientIo {
    inner: Option<Stream>,
    under_way: UnderWay,
    interim: Interim,
    resets: bool,
    shared: Shared,
}

impl ClientIo {
    pub(crate) fn new(inner: Stream, under_way: UnderWay) -> Self {
        Self {
            inner: Some(inner),
            under_way,
            interim: Interim::default(),
            resets: false,
            shared: Shared::default(),
        }
    }

    /// A duplicate of the socket, for a port process. From now on whoever closes the last one resets the connection, until an
    /// answer is given ([`answered`]).
    pub(crate) fn duplicate(&mut self) -> io::Result<(OwnedFd, Shared)> {
        self.under_way.0.store(true, Ordering::Release);
        self.follow();
        let client = self.inner.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let fd = rustix::io::fcntl_dupfd_cloexec(client, 0)?;
        Ok((fd, self.shared.clone()))
    }

    /// Whether there are bytes to read.
    pub(super) fn has_unread(&self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let peek = |client: &Stream| rustix::net::recv(client, &mut [0; 1], flags);
        self.inner
            .as_ref()
            .is_some_and(|client| matches!(peek(client), Ok((1.., _))))
    }

    /// What goes to the client ahead of an answer.
    pub(super) fn interim(&self) -> Interim {
        self.interim.clone()
    }

    /// The socket, for whoever serves the client from now on: it is reset unless that one ends it.
    pub(super) fn into_stream(mut self) -> io::Result<Stream> {
        self.set(true);
        self.inner
            .take()
            .ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// The socket, to look at.
    pub(crate) fn stream(&self) -> Option<&Stream> {
        self.inner.as_ref()
    }

    fn set(&mut self, resets: bool) {
        if let Some(tcp) = self.inner.as_ref().filter(|_| resets != self.resets) {
            socket_end::reset_on_close(tcp, resets);
            self.resets = resets;
        }
    }

    fn follow(&mut self) {
        self.set(self.under_way.0.load(Ordering::Acquire));
    }

    /// Before anything else is written: the rest of an interim answer.
    fn poll_writable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.follow();
        match &mut self.inner {
            Some(tcp) => self.interim.poll_finish(cx, tcp),
            None => Poll::Ready(Ok(())),
        }
    }

    fn with<T>(
        &mut self,
        call: impl FnOnce(Pin<&mut Stream>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        match &mut self.inner {
            Some(tcp) => call(Pin::new(tcp)),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}

impl Drop for ClientIo {
    fn drop(&mut self) {
        self.follow();
        if let Some(closer) = self.shared.0.closer.get()
            && let Some(Ok(client)) = self.inner.take().map(Stream::into_fd)
        {
            if self.shared.0.is_lost.load(Ordering::Relaxed) {
                // A close would wait for that of the duplicate. This fails while somebody sleeps in a call on the socket.
                let _ = cut_off(&client).or_else(|_| {
                    Ok(rustix::net::shutdown(&client, Shutdown::Both)?) as io::Result<()>
                });
            }
            closer.close(client);
        }
    }
}

/// Repeats a call that never blocks until it can be done.
fn poll_io<T>(
    cx: &mut Context<'_>,
    client: &Stream,
    interest: Interest,
    mut call: impl FnMut() -> rustix::io::Result<T>,
) -> Poll<io::Result<T>> {
    loop {
        match interest.is_readable() {
            true => ready!(client.poll_read_ready(cx))?,
            false => ready!(client.poll_write_ready(cx))?,
        }
        match client.try_io(interest, || Ok(call()?)) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            done => return Poll::Ready(done),
        }
    }
}

impl AsyncRead for ClientIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.shared.is_so()
            && let Some(tcp) = &self.inner
        {
            let room = buf.initialize_unfilled();
            let recv = || rustix::net::recv(tcp, &mut *room, RecvFlags::DONTWAIT);
            let (n, _) = ready!(poll_io(cx, tcp, Interest::READABLE, recv))?;
            buf.advance(n);
            return Poll::Ready(Ok(()));
        }
        self.with(|tcp| tcp.poll_read(cx, buf))
    }
}

impl AsyncWrite for ClientIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_writable(cx))?;
        if self.shared.is_so()
            && let Some(tcp) = &self.inner
        {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let send = || rustix::net::send(tcp, buf, flags);
            return poll_io(cx, tcp, Interest::WRITABLE, send);
        }
        self.with(|tcp| tcp.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.shared.is_so() {
            let first = bufs.iter().find(|buf| !buf.is_empty());
            return self.poll_write(cx, first.map_or(&[], |buf| buf));
        }
        ready!(self.poll_writable(cx))?;
        self.with(|tcp| tcp.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.follow();
        let this = &mut *self;
        if let Some(tcp) = &mut this.inner {
            ready!(this.interim.poll_write(cx, tcp))?;
        }
        this.with(|tcp| tcp.poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.follow();
        self.with(|tcp| tcp.poll_shutdown(cx))
    }
}

/// An answer is under way until its body has ended in order; to HEAD there comes none.
pub(super) fn answered(body: Body, under_way: UnderWay, head: bool) -> Watched<Body, UnderWay> {
    under_way
        .0
        .store(!head && !body.is_end_stream(), Ordering::Release);
    Watched::new(body, under_way)
}

impl Watch for UnderWay {
    fn ended(&mut self) {
        self.over();
    }
}
