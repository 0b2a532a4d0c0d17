//! CONNECT in a stream (RFC 9113 §8.5): its bytes go to and come from one end of a pair, whose other end the port process has.
//!
//! | seen of the client | the VM sees | seen of the VM | the client sees |
//! |---|---|---|---|
//! | END_STREAM | end of sending | end of sending | END_STREAM |
//! | RST_STREAM, the connection's end | broken off | broken off | RST_STREAM with CONNECT_ERROR |
//!
//! A window of the stream is under way towards the VM, one piece and h2's buffer towards the client. Nothing is kept while
//! nothing moves.

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use adit_channel::socket_end;
use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};

use super::answer::give;
use super::meter::Meter;
use crate::front::pump;
use crate::passing::Socket;
use crate::visit::Visit;

/// Bytes that are read of a VM at once.
const PIECE: usize = 16 << 10;

/// Carries both directions until both have ended, or one broke off.
pub(super) async fn carry(
    from: RecvStream,
    mut to: SendStream<Bytes>,
    pair: Socket,
    meter: Arc<Meter>,
    visit: &Visit,
) {
    let ended = AtomicBool::new(false);
    let carried = {
        let mut forth = pin!(forth(from, &pair, &ended, (&meter, visit)));
        let mut back = pin!(back(&pair, &mut to, &ended, (&meter, visit)));
        tokio::select! {
            carried = &mut forth => match carried {
                Ok(_stream) => back.await,
                broken => broken.map(drop),
            },
            carried = &mut back => match carried {
                Ok(()) => tokio::select! {
                    carried = &mut forth => carried.map(drop),
                    () = pump::closed(&pair) => Ok(()),
                },
                broken => broken,
            },
        }
    };
    match carried {
        Ok(()) => visit.ended(),
        Err(e) => {
            tracing::debug!(error = %e, "a tunnel in a stream broke off");
            to.send_reset(Reason::CONNECT_ERROR);
        }
    }
}

/// Returns the stream, whose end would be the client's business.
async fn forth(
    mut from: RecvStream,
    pair: &Socket,
    ended: &AtomicBool,
    (meter, visit): (&Meter, &Visit),
) -> io::Result<RecvStream> {
    while let Some(data) = poll_fn(|cx| from.poll_data(cx)).await {
        let data = data.map_err(io::Error::other)?;
        meter.wanted(data.len());
        if pair.send(&data).await.is_err() {
            // Nobody reads it. What the client is still to hear, `back` brings.
            return Ok(from);
        }
        visit.add_to_vm(data.len());
        // A stream that is over has no window.
        let _ = from.flow_control().release_capacity(data.len());
    }
    ended.store(true, Ordering::Relaxed);
    pair.end()?;
    Ok(from)
}

async fn back(
    pair: &Socket,
    to: &mut SendStream<Bytes>,
    ended: &AtomicBool,
    (meter, visit): (&Meter, &Visit),
) -> io::Result<()> {
    loop {
        tokio::select! {
            readable = pair.stream().readable() => readable?,
            reset = poll_fn(|cx| to.poll_reset(cx)) => {
                let reset = reset.map(|reason| io::Error::other(reason.description()));
                return Err(reset.unwrap_or_else(io::Error::other));
            }
        }
        let mut piece = vec![0; PIECE];
        let n = pair.receive(&mut piece).await?;
        if n == 0 {
            // After the end of our own sending it cannot be told.
            if !ended.load(Ordering::Relaxed) && socket_end::is_closed(pair.stream()) {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            return to.send_data(Bytes::new(), true).map_err(io::Error::other);
        }
        meter.wanted(n);
        visit.add_from_vm(n);
        piece.truncate(n);
        if n < PIECE / 4 {
            piece.shrink_to_fit();
        }
        // As long as there is somebody at the other end, the client may take its time.
        let gives_up = || socket_end::is_closed(pair.stream());
        let given = give(to, piece.into(), false, gives_up).await;
        given.map_err(io::Error::other)?;
    }
}
