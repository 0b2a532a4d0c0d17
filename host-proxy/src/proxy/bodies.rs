//! A body that somebody watches while it is carried.

use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::body::{Body, Bytes, Frame, SizeHint};

/// Who watches a body; dropped with it.
pub(super) trait Watch {
    /// It moved, or failed.
    fn moved(&self) {}
    /// It has ended in order.
    fn ended(&self) {}
}

/// A watched body.
pub(super) struct Watched<B, W> {
    inner: B,
    watch: W,
}

impl<B, W> Watched<B, W> {
    pub(super) fn new(inner: B, watch: W) -> Self {
        Self { inner, watch }
    }
}

impl<B, W> Body for Watched<B, W>
where
    B: Body<Data = Bytes, Error = hyper::Error> + Unpin,
    W: Watch + Unpin,
{
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        if polled.is_ready() {
            self.watch.moved();
        }
        let ended = match &polled {
            Poll::Ready(None) => true,
            Poll::Ready(Some(Ok(_))) => self.inner.is_end_stream(),
            Poll::Ready(Some(Err(_))) | Poll::Pending => false,
        };
        if ended {
            self.watch.ended();
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
