//! A client's connection, as hyper is given it: every request is checked before hyper reads it.
//!
//! hyper forgives what must not be forgiven by a proxy (a bare LF, two `Host` fields, `Content-Length` beside
//! `Transfer-Encoding`), and what it does refuse it refuses without a word. It cannot be made strict, and wrapping its service
//! is too late. So this stands between the socket and hyper:
//!
//! ```text
//!  socket ─► ahead ─► Search: whole? ─► check: allowed? ─► written anew ─► hyper        a head
//!  socket ──────────────────────► Body: where does it end? ──────────────► hyper        its body
//!         ─► ahead, until hyper asks for the next request                               what is behind it
//! ```
//!
//! - hyper gets a head when it is whole and allowed, as it was understood here and in one spelling ([`head`]); so there are no
//!   two readers of one header.
//! - A body's bytes are hyper's as they come; they are followed to know where the body ends ([`body`]). hyper has no byte of a
//!   request before it has written the answer to the one ahead: with `half_close` it reads only what it needs.
//! - What is refused reads like the end of the connection. Why is kept in [`Notes`], and said when hyper has ended
//!   ([`Client::end`]): after the answers that are due, and before the connection closes.
//! - hyper gets the head of a CONNECT when it has written all answers before it: the next one is written by somebody else.
//! - What follows the head of a CONNECT is nobody's here: it stays in the socket for the port process that gets a duplicate of
//!   it ([`Notes::take_tunnel`]). aditd only looks whether the client is still there.
//! - Between two requests a client may be silent for [`IDLE_LIMIT`], and makes room for others meanwhile; a head that has begun
//!   has [`HEADER_LIMIT`].
//! - While a request is under way, hyper flushes whenever it is woken: then the client is looked at ([`half_closed`]).

mod body;
pub(crate) mod half_closed;
mod head;
mod lines;
#[cfg(test)]
mod tests;
mod tunnel;

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use adit_port::control::PREFIX_MAX;
use bytes::{Buf, BytesMut};
use hyper::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use super::ends::ClientIo;
use super::linger;
use super::problem::Problem;
use crate::link::Asks;
use crate::listen::{HEADER_LIMIT, Place};
pub(crate) use body::Body;
use half_closed::HalfClosed;
use head::PREFACE;
pub(crate) use head::{Search, check};
pub(super) use head::{may_name, shown};
pub(super) use tunnel::Tunnel;

/// Most bytes of a header. No more is read ahead, so what came with the head of a CONNECT fits into the port process's frame.
pub(super) const HEADER_MAX: usize = PREFIX_MAX;
/// Most header fields of a request.
pub(super) const FIELDS_MAX: usize = 100;
/// How long a connection may be idle between two requests.
pub const IDLE_LIMIT: Duration = Duration::from_secs(75);
/// How long a client may take nothing of its answer.
pub(super) const TAKE_LIMIT: Duration = Duration::from_secs(300);
/// Bytes that are read at once while a head comes.
const PIECE: usize = 4096;

/// The first head in these bytes as hyper gets it.
pub(super) fn checked_head(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = BytesMut::from(bytes);
    let len = Search::new().end(&mut bytes).ok()??;
    let head = check(&bytes[..len]).ok()?;
    Some(head.bytes.to_vec())
}

/// What is known of a client's requests and hyper does not tell.
#[derive(Clone, Debug, Default)]
pub(super) struct Notes(Arc<NotesInner>);

#[derive(Debug, Default)]
struct NotesInner {
    refused: OnceLock<Problem>,
    no_path: AtomicBool,
    tunnel: Mutex<Option<io::Result<Tunnel>>>,
}

impl Notes {
    /// What was refused, if anything was: the connection ends with it.
    pub(super) fn refused(&self) -> Option<&Problem> {
        self.0.refused.get()
    }

    /// Whether the request that is under way has a target without path and query: in hyper's it is `/`.
    pub(super) fn has_no_path(&self) -> bool {
        self.0.no_path.load(Ordering::Relaxed)
    }

    fn refuse(&self, why: Problem) {
        // The first is the one that the client hears.
        let _ = self.0.refused.set(why);
    }
}

/// What hyper will ask for next.
#[derive(Debug)]
enum At {
    /// The next request, which is not whole yet.
    Head(Search),
    /// A request that is on its way to hyper, or under way.
    Request(Body),
    /// The same, if it is CONNECT: no request comes any more.
    Tunnel {
        /// Bytes of the client came with it.
        ahead: bool,
    },
    /// Nothing: no request comes any more.
    Over,
    /// The same: the client speaks HTTP/2.
    Http2,
}

/// A client's connection.
pub(super) struct Client {
    io: ClientIo,
    at: At,
    /// A head that hyper has not read yet.
    checked: BytesMut,
    /// What was read of the next request, or of a tunnel.
    ahead: BytesMut,
    /// A request has come.
    begun: bool,
    /// The client has ended its sending.
    ended: bool,
    half_closed: Option<HalfClosed>,
    asks: Arc<Asks>,
    /// The request is of HTTP/1.1.
    http_11: bool,
    /// Something was written since the request was handed over.
    answered: bool,
    /// hyper has nothing left to write.
    flushed: bool,
    /// Until when the client must take something, where it takes nothing.
    stalled: Option<Pin<Box<Sleep>>>,
    /// Until when the next head, or its first byte, must have come.
    due: Pin<Box<Sleep>>,
    idle: bool,
    place: Arc<Place>,
    notes: Notes,
}

impl Client {
    /// A connection that has said nothing yet.
    pub(super) fn new(io: ClientIo, place: Arc<Place>, notes: Notes) -> Self {
        Self {
            io,
            at: At::Head(Search::new()),
            checked: BytesMut::new(),
            ahead: BytesMut::new(),
            begun: false,
            ended: false,
            half_closed: None,
            asks: Asks::new(half_closed::INTERIM),
            http_11: false,
            answered: false,
            flushed: true,
            stalled: None,
            due: Box::pin(sleep(HEADER_LIMIT)),
            idle: false,
            place,
            notes,
        }
    }

    /// The socket, and what was read of it that is no request's: the beginning of a tunnel.
    pub(super) fn into_tunnel(self) -> (ClientIo, BytesMut) {
        (self.io, self.ahead)
    }

    /// The socket, and what was read of it, if the client speaks HTTP/2; else itself.
    pub(super) fn into_http2(self) -> Result<(ClientIo, BytesMut), Box<Self>> {
        match self.at {
            At::Http2 => Ok((self.io, self.ahead)),
            _ => Err(Box::new(self)),
        }
    }

    /// What was refused of a request that hyper has not seen. A refused body has its answer by way of hyper.
    pub(super) fn unanswered(&self) -> Option<&Problem> {
        self.notes.refused().filter(|_| matches!(self.at, At::Over))
    }

    /// Ends the connection after its last answer, or says why there is none; what the client still sends is read for a while,
    /// as what was said is lost if a socket closes with bytes unread.
    pub(super) async fn end(mut self) -> io::Result<()> {
        if !self.flushed {
            return Err(io::ErrorKind::WriteZero.into());
        }
        let why = self.unanswered().cloned();
        let rest = match &self.at {
            At::Over | At::Http2 => why.is_some(),
            At::Head(_) => !self.ahead.is_empty(),
            At::Request(body) => !body.is_over() || !self.ahead.is_empty(),
            At::Tunnel { ahead } => *ahead || self.io.has_unread(),
        };
        self.place.idle();
        linger::end(&mut self.io, why.as_ref(), rest && !self.ended).await
    }

    fn refuse(&mut self, why: Problem) {
        self.notes.refuse(why);
        self.at = At::Over;
    }

    /// Reads into `ahead`; false at the end.
    fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let mut piece = [0; PIECE];
        let mut piece = ReadBuf::new(&mut piece);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut piece))?;
        self.ahead.extend_from_slice(piece.filled());
        self.ended |= piece.filled().is_empty();
        Poll::Ready(Ok(!self.ended))
    }

    /// hyper wants the next request: goes on until its head is `checked`, or there is none.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let At::Head(search) = &mut self.at else {
                return Poll::Ready(Ok(()));
            };
            let checked = match search.end(&mut self.ahead) {
                Ok(Some(_)) if !self.begun && self.ahead.starts_with(PREFACE) => {
                    self.at = At::Http2;
                    continue;
                }
                Ok(Some(len)) => Some(check(&self.ahead.split_to(len))),
                Ok(None) => None,
                Err(why) => Some(Err(why)),
            };
            match checked {
                Some(Ok(head)) => {
                    self.place.spoke();
                    self.begun = true;
                    self.checked = head.bytes;
                    self.at = At::Request(head.body);
                    (self.http_11, self.answered) = (head.http_11, false);
                    self.notes.0.no_path.store(head.no_path, Ordering::Relaxed);
                    if head.connect {
                        self.offer_tunnel();
                    }
                    continue;
                }
                Some(Err(why)) => {
                    self.refuse(why);
                    continue;
                }
                None => {}
            }
            if self.idle && !self.ahead.is_empty() {
                self.idle = false;
                self.due.as_mut().reset(Instant::now() + HEADER_LIMIT);
            }
            if self.ended {
                self.gone("the request ended in the middle of its header");
                continue;
            }
            match self.poll_ahead(cx)? {
                Poll::Ready(_) => {}
                Poll::Pending => {
                    ready!(self.due.as_mut().poll(cx));
                    let why = format!("the request's header did not come within {HEADER_LIMIT:?}");
                    self.gone(&why);
                }
            }
        }
    }

    /// No request comes any more. Whoever has not begun one is told nothing.
    fn gone(&mut self, why: &str) {
        if self.ahead.is_empty() {
            self.at = At::Over;
        } else {
            let status = if self.ended {
                StatusCode::BAD_REQUEST
            } else {
                StatusCode::REQUEST_TIMEOUT
            };
            let problem = Problem::malformed(why);
            self.refuse(Problem { status, ..problem });
        }
    }

    /// Hands over what is there of the body.
    fn poll_body(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let At::Request(body) = &mut self.at else {
            return Poll::Ready(Ok(()));
        };
        let before = buf.filled().len();
        let own = if self.ahead.is_empty() {
            ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
            let new = &buf.filled()[before..];
            if new.is_empty() {
                self.ended = true;
                let why = "the request ended in the middle of its body";
                self.notes.refuse(Problem::malformed(why));
                return Poll::Ready(Ok(()));
            }
            let own = body.take(new);
            if let Ok(own) = own {
                self.ahead.extend_from_slice(&new[own..]);
                buf.set_filled(before + own);
            }
            own
        } else {
            let some = self.ahead.len().min(buf.remaining());
            let own = body.take(&self.ahead[..some]);
            if let Ok(own) = own {
                buf.put_slice(&self.ahead[..own]);
                self.ahead.advance(own);
            }
            own
        };
        if let Err(why) = own {
            buf.set_filled(before);
            self.notes.refuse(why);
            return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
        }
        Poll::Ready(Ok(()))
    }

    /// What a write came to; an error if it waits for a client that takes nothing.
    fn taken(
        &mut self,
        cx: &mut Context<'_>,
        wrote: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        (self.answered, self.flushed) = (true, false);
        if wrote.is_ready() {
            self.stalled = None;
            return wrote;
        }
        let due = self
            .stalled
            .get_or_insert_with(|| Box::pin(sleep(TAKE_LIMIT)));
        ready!(due.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    /// While a request is under way: what the client sends meanwhile is kept, and one that is gone is an error.
    fn poll_there(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        while !self.ended && self.ahead.len() < HEADER_MAX - PIECE {
            match self.poll_ahead(cx)? {
                Poll::Ready(_) => {}
                Poll::Pending => return Ok(()),
            }
        }
        self.poll_half_closed(cx)
    }

    /// An error if the client has ended its sending and is gone.
    fn poll_half_closed(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let Some(client) = self.io.stream().filter(|_| self.ended) else {
            return Ok(());
        };
        let by_port = matches!(self.at, At::Tunnel { .. });
        let asks = &self.asks;
        let ask = || match by_port {
            true => asks.ask(),
            // A new connection's buffer takes it whole; an error is seen by the next look.
            false => drop(client.try_write(half_closed::INTERIM)),
        };
        let may_ask = self.http_11 && !self.answered;
        let ask: Option<&dyn Fn()> = may_ask.then_some(&ask);
        let half_closed = self
            .half_closed
            .get_or_insert_with(|| HalfClosed::new(client));
        match half_closed.poll_gone(cx, client, ask) {
            Poll::Ready(()) => Err(io::ErrorKind::ConnectionReset.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Client {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.checked.is_empty() {
            match &this.at {
                At::Request(body) if !body.is_over() => return this.poll_body(cx, buf),
                At::Request(_) => {
                    // The one before is answered.
                    this.at = At::Head(Search::new());
                    this.idle = true;
                    this.due.as_mut().reset(Instant::now() + IDLE_LIMIT);
                    this.place.idle();
                }
                At::Head(_) | At::Tunnel { .. } | At::Over | At::Http2 => {}
            }
            ready!(this.poll_head(cx))?;
        }
        if matches!(this.at, At::Tunnel { .. }) && !this.flushed {
            // What hyper still has of the answer before would come after the greeting. The flush wakes.
            return Poll::Pending;
        }
        let some = this.checked.len().min(buf.remaining());
        buf.put_slice(&this.checked.split_to(some));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Client {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.io).poll_write(cx, buf);
        self.taken(cx, wrote)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.taken(cx, wrote)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    /// hyper does this when it has written all that it has.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let flushed = std::mem::replace(&mut this.flushed, true);
        if !flushed && !this.checked.is_empty() {
            // A CONNECT may have waited for this.
            cx.waker().wake_by_ref();
        }
        if this.checked.is_empty() {
            match &this.at {
                At::Request(body) if body.is_over() => this.poll_there(cx)?,
                At::Tunnel { .. } => this.poll_caller(cx)?,
                _ => {}
            }
        }
        Pin::new(&mut this.io).poll_flush(cx)
    }

    /// Of hyper: it has written all. The connection ends in [`Client::end`].
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
