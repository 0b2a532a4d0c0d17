//! Dials a guest from any thread.

use std::time::{Duration, Instant};

use adit_engine::Lane;

use super::Stream;
use crate::dial::{DialError, DialRequest};
use crate::hello::Open;
use crate::inbox::{Command, Handle};

/// The target of a dial.
#[derive(Clone, Debug)]
pub struct Target {
    /// vsock port inside the guest.
    pub port: u32,
    /// The hello to send first; `None` for a listener without hellos.
    pub hello: Option<Open>,
}

/// Dials a guest from any thread.
#[derive(Clone, Debug)]
pub struct Dialer {
    handle: Handle,
}

impl Handle {
    /// Returns a dialler for this `Port`.
    pub fn dialer(&self) -> Dialer {
        Dialer {
            handle: self.clone(),
        }
    }
}

impl Dialer {
    /// Dials, and waits for the answer of the guest (and with a hello, of its agent).
    ///
    /// # Errors
    /// See [`DialError`].
    pub fn dial(&self, target: &Target, timeout: Duration) -> Result<Stream, DialError> {
        let stream = self.start(target, timeout);
        let mut state = stream.local().lock();
        // The shard checks the deadline.
        while !state.settled() {
            state = stream.local().wait(state, None).0;
        }
        let failure = state.failure.clone();
        drop(state);
        failure.map_or(Ok(stream), Err)
    }

    /// As [`dial`](Self::dial), for an async task. Dropping the future gives the dial up.
    ///
    /// # Errors
    /// See [`DialError`].
    #[cfg(feature = "tokio")]
    pub async fn dial_async(
        &self,
        target: &Target,
        timeout: Duration,
    ) -> Result<Stream, DialError> {
        let stream = self.start(target, timeout);
        let failure = std::future::poll_fn(|cx| {
            let mut state = stream.local().lock();
            if state.settled() {
                return std::task::Poll::Ready(state.failure.clone());
            }
            state.read_waker = Some(cx.waker().clone());
            std::task::Poll::Pending
        })
        .await;
        failure.map_or(Ok(stream), Err)
    }

    fn start(&self, target: &Target, timeout: Duration) -> Stream {
        let inbox = &self.handle.inbox;
        let stream = Stream::new(self.handle.clone());
        let request = DialRequest {
            port: target.port,
            hello: target.hello.clone(),
            deadline: Some(inbox.tick(Instant::now() + timeout)),
            lane: Lane::Bulk,
        };
        let command = Command::Dial(self.handle.port, request, stream.end.clone());
        if !inbox.send(command) {
            stream.end.fail(DialError::Cancelled);
        }
        stream
    }
}
