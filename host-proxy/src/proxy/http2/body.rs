//! The body of a request, as it comes in a stream.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::RecvStream;
use hyper::StatusCode;
use hyper::body::{Body, Frame, SizeHint};
use hyper::header::HeaderMap;

use super::answer::Respond;
use super::meter::Meter;

/// The body. What is taken of it is room for more: so much as the window is under way, and no more.
pub(super) struct Received {
    stream: RecvStream,
    /// What is still to come, if that was said; h2 holds the client to it.
    length: Option<u64>,
    /// The client sends it when it is asked to.
    expected: Option<Respond>,
    no_more_data: bool,
    meter: Arc<Meter>,
}

impl Received {
    pub(super) fn new(
        stream: RecvStream,
        length: Option<u64>,
        expected: Option<Respond>,
        meter: Arc<Meter>,
    ) -> Self {
        Self {
            stream,
            length,
            expected,
            no_more_data: false,
            meter,
        }
    }
}

impl Body for Received {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        let this = &mut *self;
        if let Some(respond) = this.expected.take() {
            respond.interim(StatusCode::CONTINUE, HeaderMap::new());
        }
        while !this.no_more_data {
            match ready!(this.stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    // A stream that is over has no window.
                    let _ = this.stream.flow_control().release_capacity(data.len());
                    if data.is_empty() {
                        continue;
                    }
                    this.meter.wanted(data.len());
                    let left = |length: u64| length.saturating_sub(data.len() as u64);
                    this.length = this.length.map(left);
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(e)) => return Poll::Ready(Some(Err(e))),
                None => this.no_more_data = true,
            }
        }
        let trailers = ready!(this.stream.poll_trailers(cx));
        Poll::Ready(match trailers {
            Ok(trailers) => trailers.map(Frame::trailers).map(Ok),
            Err(e) => Some(Err(e)),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.length.map(SizeHint::with_exact).unwrap_or_default()
    }
}
