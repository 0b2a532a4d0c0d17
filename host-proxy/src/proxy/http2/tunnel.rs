//! A tunnel in a stream (RFC 9113 §8.5): its bytes go to and come from a socket. Of a client's stream that is one end of a pair,
//! whose other end the port process has; of a stream to another host it is the client's.
//!
//! | seen of the stream | the socket's other side sees | seen of the socket | the stream's other side sees |
//! |---|---|---|---|
//! | END_STREAM | end of sending | end of sending | END_STREAM |
//! | RST_STREAM, the connection's end | broken off | broken off | RST_STREAM with CONNECT_ERROR |
//!
//! A window of the stream is under way towards the socket, one piece and h2's buffer towards the stream. Nothing is kept while
//! nothing moves.

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use adit_channel::socket_end;
use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use rustix::net::{RecvFlags, Shutdown};
use tokio::io::Interest;

use super::answer::give;
use crate::front::pump;
use crate::front::stream::Stream;
use crate::passing::Socket;

/// Bytes that are read of a socket at once.
const READ: usize = 64 << 10;
/// Bytes that are put together of a stream.
const PIECE: usize = 16 << 10;

/// Where bytes went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Went {
    /// From the stream to the socket.
    FromStream,
    /// From the socket into the stream.
    IntoStream,
}

/// A socket that one may read while another writes.
pub(crate) trait End: Sync {
    /// There is something to read, or an end of it.
    fn readable(&self) -> impl Future<Output = io::Result<()>> + Send;
    /// Reads what is there.
    fn receive(&self, into: &mut [u8]) -> impl Future<Output = io::Result<usize>> + Send;
    /// Writes all of it.
    fn send(&self, bytes: &[u8]) -> impl Future<Output = io::Result<()>> + Send;
    /// Ends sending.
    fn end(&self) -> io::Result<()>;
    /// Whether the other end is closed whole.
    fn is_closed(&self) -> bool;
    /// Ready once nobody has the other end, which has ended its sending.
    fn gone(&self) -> impl Future<Output = ()> + Send;
}

impl End for Socket {
    async fn readable(&self) -> io::Result<()> {
        self.stream().readable().await
    }

    async fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        self.receive(into).await
    }

    async fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.send(bytes).await
    }

    fn end(&self) -> io::Result<()> {
        self.end()
    }

    fn is_closed(&self) -> bool {
        socket_end::is_closed(self.stream())
    }

    async fn gone(&self) {
        pump::closed(self).await;
    }
}

impl End for Stream {
    async fn readable(&self) -> io::Result<()> {
        self.ready(Interest::READABLE).await.map(drop)
    }

    async fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            self.readable().await?;
            let got = self.try_io(Interest::READABLE, || {
                let (_, got) = rustix::net::recv(self, &mut *into, RecvFlags::DONTWAIT)?;
                Ok(got)
            });
            match got {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                got => return got,
            }
        }
    }

    async fn send(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.ready(Interest::WRITABLE).await?;
            match self.try_write(bytes) {
                Ok(n) => bytes = &bytes[n..],
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn end(&self) -> io::Result<()> {
        Ok(rustix::net::shutdown(self, Shutdown::Write)?)
    }

    fn is_closed(&self) -> bool {
        socket_end::is_closed(self)
    }

    async fn gone(&self) {
        pump::gone(self).await;
    }
}

/// Carries both directions until both have ended, or one broke off, which is an error. `ahead` goes into the stream first.
pub(crate) async fn carry(
    (from, mut to): (RecvStream, SendStream<Bytes>),
    ahead: Bytes,
    socket: &impl End,
    count: &(impl Fn(Went, usize) + Sync),
) -> io::Result<()> {
    let carried = both(from, ahead, &mut to, socket, count).await;
    if carried.is_err() {
        to.send_reset(Reason::CONNECT_ERROR);
    }
    carried
}

async fn both(
    from: RecvStream,
    ahead: Bytes,
    to: &mut SendStream<Bytes>,
    socket: &impl End,
    count: &(impl Fn(Went, usize) + Sync),
) -> io::Result<()> {
    let ended = AtomicBool::new(false);
    let mut forth = pin!(forth(from, socket, &ended, count));
    {
        let mut back = pin!(back(socket, ahead, to, &ended, count));
        tokio::select! {
            carried = &mut forth => {
                // Its end would be the other side's business.
                let _stream = carried?;
                return back.await;
            }
            carried = &mut back => carried?,
        }
    }
    // The stream is not read while the socket takes nothing, and only its other half tells then that its other side has given it
    // up. Until that is seen, what was sent in it counts in the window of the connection.
    tokio::select! {
        carried = &mut forth => carried.map(drop),
        () = socket.gone() => Ok(()),
        reset = reset(to) => Err(reset),
    }
}

/// Ready once the other side has given the stream up.
async fn reset(stream: &mut SendStream<Bytes>) -> io::Error {
    let reset = poll_fn(|cx| stream.poll_reset(cx)).await;
    let reset = reset.map(|reason| io::Error::other(reason.description()));
    reset.unwrap_or_else(io::Error::other)
}

/// Returns the stream, whose end would be the other side's business.
async fn forth(
    mut from: RecvStream,
    socket: &impl End,
    ended: &AtomicBool,
    count: &impl Fn(Went, usize),
) -> io::Result<RecvStream> {
    while let Some(data) = some(&mut from).await {
        let data = data.map_err(io::Error::other)?;
        if socket.send(&data).await.is_err() {
            // Nobody reads it. What the stream's other side is still to hear, `back` brings.
            return Ok(from);
        }
        count(Went::FromStream, data.len());
        // A stream that is over has no window.
        let _ = from.flow_control().release_capacity(data.len());
    }
    ended.store(true, Ordering::Relaxed);
    socket.end()?;
    Ok(from)
}

/// What has come of a stream, at least something; none: its end. Frames that came together go on together: one at a time they
/// would come faster than they go, and of small ones h2 keeps only so many until it takes the connection for a flood.
async fn some(from: &mut RecvStream) -> Option<Result<Bytes, h2::Error>> {
    let mut all = BytesMut::new();
    poll_fn(|cx| {
        while all.len() < PIECE {
            match from.poll_data(cx) {
                Poll::Ready(Some(Ok(data))) if all.is_empty() && data.len() >= PIECE => {
                    return Poll::Ready(Some(Ok(data)));
                }
                Poll::Ready(Some(Ok(data))) => all.extend_from_slice(&data),
                // What else there is comes again the next time.
                _ if !all.is_empty() => break,
                Poll::Ready(over) => return Poll::Ready(over),
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(Some(Ok(all.split().freeze())))
    })
    .await
}

async fn back(
    socket: &impl End,
    ahead: Bytes,
    to: &mut SendStream<Bytes>,
    ended: &AtomicBool,
    count: &impl Fn(Went, usize),
) -> io::Result<()> {
    // As long as there is somebody at the other end, the stream's other side may take its time.
    let gives_up = || socket.is_closed();
    count(Went::IntoStream, ahead.len());
    let given = give(to, ahead, false, gives_up).await;
    given.map_err(io::Error::other)?;
    loop {
        tokio::select! {
            readable = socket.readable() => readable?,
            reset = reset(to) => return Err(reset),
        }
        let mut piece = vec![0; READ];
        let n = socket.receive(&mut piece).await?;
        if n == 0 {
            // After the end of our own sending it cannot be told.
            if !ended.load(Ordering::Relaxed) && socket.is_closed() {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            return to.send_data(Bytes::new(), true).map_err(io::Error::other);
        }
        count(Went::IntoStream, n);
        piece.truncate(n);
        if n < READ / 4 {
            piece.shrink_to_fit();
        }
        let given = give(to, piece.into(), false, gives_up).await;
        given.map_err(io::Error::other)?;
    }
}
