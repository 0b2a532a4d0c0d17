//! Interim answers of a guest's server (`103 Early Hints`, RFC 9110 §15.2) on their way to the client.
//!
//! hyper's server of HTTP/1.1 cannot send any, so they pass it by: they are written when hyper has nothing to write itself, and
//! the final answer is given to hyper only after them. `100 Continue` is hyper's own ([`Expected`](super::bodies::Expected)).

use std::future::poll_fn;
use std::io::{self, Write as _};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, BytesMut};
use hyper::StatusCode;
use hyper::header::HeaderMap;
use tokio::io::AsyncWrite;

use super::fields::Hop;
use super::http2::answer::Respond;
use crate::front::stream::Stream;

/// Bytes of them that wait for a client at most; what is more is left out.
const BYTES_MAX: usize = 32 << 10;

/// Where they go.
#[derive(Clone)]
pub(super) enum Interims {
    /// To a client of HTTP/1.1.
    Http1(Interim),
    /// Into a stream of HTTP/2.
    Http2(Respond),
}

impl Interims {
    /// Adds an answer.
    pub(super) fn push(&self, status: StatusCode, mut headers: HeaderMap) {
        Hop::take_from(&mut headers);
        match self {
            Self::Http1(interim) => interim.push(status, &headers),
            Self::Http2(respond) => respond.interim(status, headers),
        }
    }

    /// Waits until the final answer may follow.
    pub(super) async fn written(&self) {
        match self {
            Self::Http1(interim) => interim.written().await,
            Self::Http2(_) => {}
        }
    }

    /// There will be another final answer than the one that they announced.
    pub(super) fn forget(&self) {
        match self {
            Self::Http1(interim) => interim.forget(),
            Self::Http2(_) => {}
        }
    }
}

/// Those of one client's connection.
#[derive(Clone, Default)]
pub(super) struct Interim(Arc<Mutex<Queue>>);

#[derive(Default)]
struct Queue {
    bytes: BytesMut,
    /// Some of the bytes are written, so the others must follow.
    begun: bool,
    /// Writes to the client.
    writer: Option<Waker>,
    /// Has the final answer.
    answer: Option<Waker>,
}

impl Interim {
    fn push(&self, status: StatusCode, headers: &HeaderMap) {
        let reason = status.canonical_reason().unwrap_or_default();
        let mut text = Vec::new();
        // Writing to a vector cannot fail.
        let _ = write!(text, "HTTP/1.1 {} {reason}\r\n", status.as_str());
        for (name, value) in headers {
            text.extend(name.as_str().bytes());
            text.extend(b": ");
            text.extend(value.as_bytes());
            text.extend(b"\r\n");
        }
        text.extend(b"\r\n");
        let mut queue = self.queue();
        if queue.bytes.len() + text.len() > BYTES_MAX {
            return;
        }
        queue.bytes.extend_from_slice(&text);
        if let Some(writer) = queue.writer.take() {
            writer.wake();
        }
    }

    /// Waits until all of them are written.
    async fn written(&self) {
        poll_fn(|cx| {
            let mut queue = self.queue();
            if queue.bytes.is_empty() {
                return Poll::Ready(());
            }
            queue.answer = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    fn forget(&self) {
        let mut queue = self.queue();
        if !queue.begun {
            queue.bytes.clear();
        }
    }

    /// Writes all of them: nobody else has anything to write.
    pub(super) fn poll_write(
        &self,
        cx: &mut Context<'_>,
        client: &mut Stream,
    ) -> Poll<io::Result<()>> {
        let mut queue = self.queue();
        while !queue.bytes.is_empty() {
            let n = ready!(Pin::new(&mut *client).poll_write(cx, &queue.bytes))?;
            queue.bytes.advance(n);
            queue.begun = !queue.bytes.is_empty();
        }
        queue.writer = Some(cx.waker().clone());
        if let Some(answer) = queue.answer.take() {
            answer.wake();
        }
        Poll::Ready(Ok(()))
    }

    /// Writes the rest of what has begun: somebody has something else to write.
    pub(super) fn poll_finish(
        &self,
        cx: &mut Context<'_>,
        client: &mut Stream,
    ) -> Poll<io::Result<()>> {
        let begun = self.queue().begun;
        match begun {
            true => self.poll_write(cx, client),
            false => Poll::Ready(Ok(())),
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
