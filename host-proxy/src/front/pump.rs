//! Carries bytes between a client that cannot be handed to a port process and one end of a pair, whose other end can.
//!
//! ```text
//!  client ═══ pump ═══ pair ─ the other end: read as HTTP here, then handed to the port process like a TCP socket
//! ```
//! It is one who speaks TLS, or who uses a Unix socket. Whoever does the latter can pass descriptors over it, which a port process
//! would close, and a close may take long; so aditd receives them, and closes them elsewhere. The port process has the pair's other
//! end, and may pass some as well. Such a client's tunnels end when aditd's worker ends.
//!
//! A client that goes while what it sent waits for the pair is found out too, and some of that must be taken within `TAKE_LIMIT`.
//!
//! | over | the other direction goes on until |
//! |---|---|
//! | the client's sending | the pair ends; or the client has gone, and what it sent had `GONE_LIMIT` to arrive |
//! | the pair's | the client ends its sending; or the pair is closed whole, so that nobody reads it |
//!
//! Each side's end of sending is passed on as such. Where the pair is closed whole without it, the port process has broken off:
//! then so does this. After the client's own end of sending these two look alike.

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use adit_channel::socket_end;
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::{sleep, timeout};
use tokio_util::io::poll_read_buf;

use crate::passing::Socket;

/// Bytes of a direction that are under way here.
const PIECE: usize = 64 << 10;
/// How often it is looked whether a side is there at all.
const LOOK: Duration = Duration::from_secs(1);
/// How long what a client has sent may take to arrive after it has gone.
const GONE_LIMIT: Duration = Duration::from_secs(10);
/// How long a side may take nothing of what is left, once nobody is at the other end.
const TAKE_LIMIT: Duration = Duration::from_secs(300);

/// How long a connection is silent before TCP asks, and how often it asks then.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// Has TCP find out whether the other end, which has ended its sending, is there.
pub fn keep_asking(client: impl AsFd) {
    // Other sockets know of themselves. Without it, what is sent finds out.
    let _ = sockopt::set_tcp_keepidle(&client, KEEP_ALIVE)
        .and_then(|()| sockopt::set_tcp_keepintvl(&client, KEEP_ALIVE))
        .and_then(|()| sockopt::set_socket_keepalive(&client, true));
}

/// Carries both directions until both have ended, or one broke off: then what is left of `client` is to be dropped. `socket` is a
/// duplicate of the client's, if that shows whether the client has gone; whoever calls closes it. Returns whether the client was
/// told the orderly end of what is for it.
pub async fn pump(
    client: impl AsyncRead + AsyncWrite,
    pair: Socket,
    socket: Option<&OwnedFd>,
) -> bool {
    let (from_client, to_client) = tokio::io::split(client);
    let (ended, said) = (AtomicBool::new(false), AtomicBool::new(false));
    let mut forth = pin!(forth(from_client, &pair, &ended, socket));
    let mut back = pin!(back(&pair, to_client, &ended, &said));
    let carried = tokio::select! {
        carried = &mut forth => match carried {
            Ok(()) => tokio::select! {
                carried = &mut back => carried,
                () = gone_if_shown(socket, GONE_LIMIT) => Err(io::ErrorKind::ConnectionReset.into()),
            },
            broken => broken,
        },
        carried = &mut back => match carried {
            Ok(()) => tokio::select! {
                carried = &mut forth => carried,
                () = closed(&pair) => Ok(()),
            },
            broken => broken,
        },
    };
    if let Err(e) = carried {
        tracing::debug!(error = %e, "a client's connection broke off");
    }
    said.load(Ordering::Relaxed)
}

async fn forth(
    mut from: impl AsyncRead + Unpin,
    pair: &Socket,
    ended: &AtomicBool,
    socket: Option<&OwnedFd>,
) -> io::Result<()> {
    loop {
        let (piece, broken) = some(&mut from).await?;
        if piece.is_empty() {
            break;
        }
        let sent = tokio::select! {
            // It is looked whether the client is there only while nobody takes what it sends.
            biased;
            sent = pair.send(&piece) => sent,
            () = gone_if_shown(socket, TAKE_LIMIT) => return Err(io::ErrorKind::ConnectionReset.into()),
        };
        if sent.is_err() {
            // Nobody reads it. What the client is still to hear, `back` brings.
            return Ok(());
        }
        if let Some(e) = broken {
            return Err(e);
        }
    }
    ended.store(true, Ordering::Relaxed);
    pair.end()
}

/// Reads what is there, and with it the error behind it, which would not be told again. Nothing at all: the end. TLS has one
/// record at a time, and the pair is to have as much as possible at once. Nothing is kept while there is nothing.
async fn some(from: &mut (impl AsyncRead + Unpin)) -> io::Result<(Vec<u8>, Option<io::Error>)> {
    poll_fn(|cx| {
        let mut piece = Vec::with_capacity(PIECE);
        while piece.len() < PIECE {
            let read = poll_read_buf(Pin::new(&mut *from), cx, &mut piece);
            match read {
                Poll::Pending if piece.is_empty() => return Poll::Pending,
                Poll::Ready(Err(e)) if piece.is_empty() => return Poll::Ready(Err(e)),
                Poll::Ready(Err(e)) => return Poll::Ready(Ok((piece, Some(e)))),
                Poll::Ready(Ok(0)) | Poll::Pending => break,
                Poll::Ready(Ok(_)) => {}
            }
        }
        Poll::Ready(Ok((piece, None)))
    })
    .await
}

async fn back(
    pair: &Socket,
    mut to: impl AsyncWrite + Unpin,
    ended: &AtomicBool,
    said: &AtomicBool,
) -> io::Result<()> {
    loop {
        pair.stream().readable().await?;
        let mut piece = vec![0; PIECE];
        let n = pair.receive(&mut piece).await?;
        if n > 0 {
            let mut taken = pin!(async {
                to.write_all(&piece[..n]).await?;
                // TLS keeps what the socket had no room for, and more may never come.
                to.flush().await
            });
            loop {
                match timeout(TAKE_LIMIT, &mut taken).await {
                    Ok(taken) => break taken?,
                    Err(_) if socket_end::is_closed(pair.stream()) => {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    Err(_) => {}
                }
            }
            continue;
        }
        // After the end of our own sending it cannot be told.
        if !ended.load(Ordering::Relaxed) && socket_end::is_closed(pair.stream()) {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        to.shutdown().await?;
        said.store(true, Ordering::Relaxed);
        return Ok(());
    }
}

async fn gone_if_shown(socket: Option<&OwnedFd>, limit: Duration) {
    match socket {
        Some(socket) => gone_for(socket, limit).await,
        None => std::future::pending().await,
    }
}

/// Ready once a client that has ended its sending is not there any more.
pub(crate) async fn gone(socket: impl AsFd) {
    gone_for(socket, GONE_LIMIT).await;
}

/// Ready once a client from which nothing is read has not been there for so long.
async fn gone_for(socket: impl AsFd, limit: Duration) {
    keep_asking(&socket);
    while !socket_end::is_closed(&socket) {
        sleep(LOOK).await;
    }
    sleep(limit).await;
}

/// Ready once nobody reads the other end of a pair that has ended its sending.
pub async fn closed(pair: &Socket) {
    while !socket_end::is_closed(pair.stream()) {
        sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests;
