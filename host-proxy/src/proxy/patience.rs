//! How long a VM is waited for, and how much of the proxy it may have meanwhile (R110).

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use adit_tasks::VmId;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use tokio::time::Instant;

use crate::listen::Share;

/// When a request's body moved last: a VM that still takes it in is not silent.
#[derive(Debug)]
pub(super) struct Moved(Mutex<Instant>);

impl Moved {
    pub(super) fn now() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Instant::now())))
    }

    fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn last(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client's body that notes when it moves.
pub(super) struct Noted {
    inner: Incoming,
    moved: Arc<Moved>,
}

impl Noted {
    pub(super) fn new(inner: Incoming, moved: Arc<Moved>) -> Self {
        Self { inner, moved }
    }
}

impl Body for Noted {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        if polled.is_ready() {
            self.moved.note();
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

/// Waits for an answer until nothing has moved for so long; none: it is given up.
pub(super) async fn in_time<T>(
    answer: impl Future<Output = T>,
    moved: &Moved,
    limit: Duration,
) -> Option<T> {
    tokio::pin!(answer);
    loop {
        let due = moved.last() + limit;
        tokio::select! {
            biased;
            answer = &mut answer => return Some(answer),
            () = tokio::time::sleep_until(due) => {
                if moved.last() + limit <= Instant::now() {
                    return None;
                }
            }
        }
    }
}

/// A VM's body, with its share of the proxy until it ends.
pub(super) struct Shared {
    inner: Incoming,
    _share: Share<VmId>,
}

impl Shared {
    pub(super) fn new(inner: Incoming, share: Share<VmId>) -> Self {
        Self {
            inner,
            _share: share,
        }
    }
}

impl Body for Shared {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
