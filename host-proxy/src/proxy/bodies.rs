//! Bodies that are watched, or held, while they are carried.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::body::{Body, Bytes, Frame, SizeHint};
use tokio_util::sync::CancellationToken;

/// How long a server may leave `Expect: 100-continue` unanswered until its client is asked for the body all the same: not
/// every server knows the field. curl waits as long.
const EXPECT_LIMIT: Duration = Duration::from_secs(1);

/// Who watches a body; dropped with it.
pub(super) trait Watch {
    /// It moved by so many bytes, or failed.
    fn moved(&mut self, _bytes: usize) {}
    /// It has ended in order.
    fn ended(&mut self) {}
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
    B: Body<Data = Bytes> + Unpin,
    W: Watch + Unpin,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        if let Poll::Ready(frame) = &polled {
            let data = frame
                .as_ref()
                .and_then(|frame| frame.as_ref().ok()?.data_ref());
            self.watch.moved(data.map_or(0, Bytes::len));
        }
        let ended = match &polled {
            Poll::Ready(None) => true,
            // Nobody asks for what comes after trailers.
            Poll::Ready(Some(Ok(frame))) => frame.is_trailers() || self.inner.is_end_stream(),
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

/// A body that its client sends only when it is asked to (`100 Continue`): it is asked when the server wants the body, or has
/// said nothing for a while. A client whose request is refused meanwhile sends none.
pub(super) struct Expected<B> {
    inner: B,
    wanted: Option<Pin<Box<dyn Future<Output = ()> + Send + Sync>>>,
}

impl<B> Expected<B> {
    /// Waits until the token is cancelled.
    pub(super) fn new(inner: B, wanted: CancellationToken) -> Self {
        let wait = async move {
            let _ = tokio::time::timeout(EXPECT_LIMIT, wanted.cancelled()).await;
        };
        Self {
            inner,
            wanted: Some(Box::pin(wait)),
        }
    }
}

impl<B> Body for Expected<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if let Some(wanted) = &mut self.wanted {
            ready!(wanted.as_mut().poll(cx));
            self.wanted = None;
        }
        Pin::new(&mut self.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
