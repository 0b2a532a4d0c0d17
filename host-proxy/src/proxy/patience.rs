//! How long a VM is waited for, and how much of the proxy it may have meanwhile (R110).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// When a request's body moved last: a VM that still takes it in is not silent.
#[derive(Debug)]
pub(super) struct Moved(Mutex<Instant>);

impl Moved {
    pub(super) fn now() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Instant::now())))
    }

    pub(super) fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn last(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
