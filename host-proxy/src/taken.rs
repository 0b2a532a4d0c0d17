//! A client of the API whose connection is no longer for HTTP once its answer, a 101, is written: somebody takes it.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::future::BoxFuture;

type Take = Box<dyn FnOnce(OwnedFd, Bytes) -> BoxFuture<'static, ()> + Send>;

/// Who takes it: an extension of the answer. A copy is the same one.
#[derive(Clone)]
pub struct Taken(Arc<Mutex<Option<Take>>>);

impl Taken {
    /// Called with the only descriptor of the connection, and with what was read of it ahead.
    pub fn by<F>(take: impl FnOnce(OwnedFd, Bytes) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let take: Take = Box::new(move |fd, ahead| Box::pin(take(fd, ahead)));
        Self(Arc::new(Mutex::new(Some(take))))
    }

    /// Gives it away.
    pub async fn take(self, fd: OwnedFd, ahead: Bytes) {
        let take = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(take) = take {
            take(fd, ahead).await;
        }
    }
}
