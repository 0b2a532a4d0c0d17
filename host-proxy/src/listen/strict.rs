//! One request of a connection, checked before hyper reads it: the API has the parser that the proxy has (I9), and forgives as little.
//!
//! ```text
//!  socket ─► ahead ─► Search: whole? ─► check: allowed? ─► written anew ─► hyper        the head
//!                 └─► Body: where does it end? ──────────────────────────► hyper        its body
//!                 └─► nobody's, or of whoever takes the connection over                 what is behind it
//! ```
//! What is refused reads like the end of the connection, or of the body. Why is kept in [`Refused`], for whoever answers.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::proxy::client::{Body, Search, check};
use crate::proxy::problem::Problem;

/// Bytes that are read at once.
const PIECE: usize = 4096;

/// Why the request was refused, if it was.
#[derive(Clone, Debug, Default)]
pub(super) struct Refused(Arc<OnceLock<Problem>>);

impl Refused {
    pub(super) fn why(&self) -> Option<&Problem> {
        self.0.get()
    }
}

#[derive(Debug)]
enum At {
    Head(Search),
    Body(Body),
    Behind,
}

/// A connection of one request.
pub(super) struct Strict<I> {
    io: I,
    at: At,
    /// A head that hyper has not read yet.
    checked: BytesMut,
    /// What was read, and is not hyper's yet.
    ahead: BytesMut,
    refused: Refused,
}

impl<I: AsyncRead + Unpin> Strict<I> {
    pub(super) fn new(io: I, refused: Refused) -> Self {
        Self {
            io,
            at: At::Head(Search::new()),
            checked: BytesMut::new(),
            ahead: BytesMut::new(),
            refused,
        }
    }

    /// The connection, and what was read of it behind the request.
    pub(super) fn into_parts(self) -> (I, BytesMut) {
        (self.io, self.ahead)
    }

    fn refuse(&mut self, why: Problem) {
        self.at = At::Behind;
        let _ = self.refused.0.set(why);
    }

    /// Reads into `ahead`; false at the end.
    fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let mut piece = [0; PIECE];
        let mut piece = ReadBuf::new(&mut piece);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut piece))?;
        self.ahead.extend_from_slice(piece.filled());
        Poll::Ready(Ok(!piece.filled().is_empty()))
    }

    /// Goes on until the head is `checked`; false: there is none.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        loop {
            let At::Head(search) = &mut self.at else {
                return Poll::Ready(Ok(!self.checked.is_empty()));
            };
            match search.end(&mut self.ahead) {
                Ok(Some(len)) => match check(&self.ahead.split_to(len)) {
                    Ok(head) => {
                        self.checked = head.bytes;
                        self.at = At::Body(head.body);
                    }
                    Err(why) => self.refuse(why),
                },
                Ok(None) => {
                    if !ready!(self.poll_ahead(cx))? {
                        if !self.ahead.is_empty() {
                            let why = "the request ended in the middle of its header";
                            self.refuse(Problem::malformed(why));
                        }
                        return Poll::Ready(Ok(false));
                    }
                }
                Err(why) => self.refuse(why),
            }
        }
    }

    fn poll_body(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.ahead.is_empty() && !ready!(self.poll_ahead(cx))? {
            return Poll::Ready(Ok(()));
        }
        let At::Body(body) = &mut self.at else {
            return Poll::Ready(Ok(()));
        };
        let some = self.ahead.len().min(buf.remaining());
        match body.take(&self.ahead[..some]) {
            Ok(own) => {
                buf.put_slice(&self.ahead[..own]);
                self.ahead.advance(own);
                Poll::Ready(Ok(()))
            }
            Err(why) => {
                self.refuse(why);
                Poll::Ready(Err(io::ErrorKind::InvalidData.into()))
            }
        }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Strict<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if matches!(this.at, At::Head(_)) && !ready!(this.poll_head(cx))? {
            return Poll::Ready(Ok(()));
        }
        if !this.checked.is_empty() {
            let some = this.checked.len().min(buf.remaining());
            buf.put_slice(&this.checked.split_to(some));
            return Poll::Ready(Ok(()));
        }
        match &this.at {
            At::Body(body) if !body.is_over() => this.poll_body(cx, buf),
            // Refused: it ends here for hyper.
            _ if this.refused.why().is_some() => Poll::Ready(Ok(())),
            // hyper waits for the client's end. Whoever says more has not ended.
            _ if !this.ahead.is_empty() => Poll::Pending,
            _ => match ready!(this.poll_ahead(cx))? {
                true => Poll::Pending,
                false => Poll::Ready(Ok(())),
            },
        }
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Strict<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    /// hyper has written all that it has. Whoever says why a request was refused says it after that.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.refused.why().is_some() {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
