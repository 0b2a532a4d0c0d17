//! A client that has ended its sending while its request is under way: it waits for its answer, or it is gone.
//!
//! `printf 'GET …' | nc -N` ends its sending and reads on. A client that is killed ends its sending too, as its kernel has it,
//! and TCP shows the same FIN for both: only who sends to the client finds out, as a kernel without the socket answers with a
//! reset. So the client is taken to be there, and this is how its end is found:
//!
//! | | what finds it |
//! |---|---|
//! | its answer has not begun | after [`ASK_AFTER`], an interim answer (`100 Continue`, RFC 9110 §15.2), which a client that is there skips; in CONNECT the port process writes it, which alone knows whether it has answered |
//! | its answer is under way | the next bytes of it |
//! | neither, also in HTTP/1.0, which has no interim answers | keep-alive of TCP: a reset as soon as the client's kernel has forgotten the socket (a minute, on Linux) |
//!
//! The limits of a dial and of an answer hold besides. A client whose kernel sends a reset at once, as it does where bytes of the
//! answer were not read, is gone without any of this.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use adit_channel::socket_end;
use futures_util::FutureExt;
use tokio::io::Interest;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::front::pump;
use crate::front::stream::Stream;

/// How long an answer may take before a client that ended its sending is asked whether it is there.
const ASK_AFTER: Duration = Duration::from_secs(3);
/// How often it is looked at: after an end of file, epoll says nothing of a reset that tokio would pass on.
const LOOK: Duration = Duration::from_secs(1);
/// Any client of HTTP/1.1 skips it.
pub(super) const INTERIM: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Looks at a client of which nothing is to be read: `ended` once it has ended its sending, an error if it is gone.
pub(super) fn poll_ended(
    client: &Stream,
    cx: &mut Context<'_>,
    ended: &mut bool,
) -> io::Result<()> {
    while !*ended && client.poll_read_ready(cx)?.is_ready() {
        if let Some(e) = client.take_error()? {
            return Err(e);
        }
        let ready = client
            .ready(Interest::READABLE)
            .now_or_never()
            .transpose()?;
        *ended = ready.is_some_and(|ready| ready.is_read_closed());
        // The bytes stay where they are, so only the next event says anything new.
        let nothing = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
        let _ = client.try_io(Interest::READABLE, nothing);
    }
    Ok(())
}

/// Ready once a client is gone of which nothing is to be read, and to which nothing may be said meanwhile.
pub(crate) async fn gone(client: &Stream) {
    let (mut ended, mut half_closed) = (false, None);
    poll_fn(|cx| match poll_ended(client, cx, &mut ended) {
        Err(_) => Poll::Ready(()),
        Ok(()) if ended => half_closed
            .get_or_insert_with(|| HalfClosed::new(client))
            .poll_gone(cx, client, None),
        Ok(()) => Poll::Pending,
    })
    .await;
}

/// Since when it is so.
#[derive(Debug)]
pub(super) struct HalfClosed {
    since: Instant,
    look: Pin<Box<Sleep>>,
    asked: bool,
}

impl HalfClosed {
    /// From now on.
    pub(super) fn new(client: &Stream) -> Self {
        pump::keep_asking(client);
        let since = Instant::now();
        Self {
            since,
            look: Box::pin(sleep_until(since + LOOK)),
            asked: false,
        }
    }

    /// Ready once the client is gone. `ask` writes [`INTERIM`] to it or has it written; none: it cannot be asked.
    pub(super) fn poll_gone(
        &mut self,
        cx: &mut Context<'_>,
        client: &Stream,
        ask: Option<&dyn Fn()>,
    ) -> Poll<()> {
        while self.look.as_mut().poll(cx).is_ready() {
            if socket_end::is_closed(client) {
                return Poll::Ready(());
            }
            if let Some(ask) = ask
                && !self.asked
                && self.since.elapsed() >= ASK_AFTER
            {
                self.asked = true;
                ask();
            }
            let next = Instant::now() + LOOK;
            self.look.as_mut().reset(next);
        }
        Poll::Pending
    }
}
