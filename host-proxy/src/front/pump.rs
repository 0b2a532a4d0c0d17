//! Carries bytes between a client that cannot be handed to a port process and one end of a pair, whose other end can.
//!
//! ```text
//!  client ═══ pump ═══ pair ─ the other end: read as HTTP here, then handed to the port process like a TCP socket
//! ```
//! It is one who speaks TLS, or who uses a Unix socket. Whoever does the latter can pass descriptors over it, which a port process
//! would close, and a close may take long; so aditd receives them, and closes them elsewhere. Such a client's tunnels end when
//! aditd's worker ends.
//!
//! Each side's end of sending is passed on as such. Where the pair is closed whole without it, the port process has broken off:
//! then so does this.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use adit_channel::socket_end;
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// Bytes of a direction that are under way here.
const PIECE: usize = 16 << 10;
/// How often it is looked whether somebody who has ended its sending is there at all.
const LOOK: Duration = Duration::from_secs(1);
/// How long what a client has sent may take to arrive after it has gone.
const GONE_LIMIT: Duration = Duration::from_secs(10);
/// How long a connection is silent before TCP asks, and how often it asks then.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// Has TCP find out whether the other end, which has ended its sending, is there.
pub fn keep_asking(client: impl AsFd) {
    // Other sockets know of themselves. Without it, what is sent finds out.
    let _ = sockopt::set_tcp_keepidle(&client, KEEP_ALIVE)
        .and_then(|()| sockopt::set_tcp_keepintvl(&client, KEEP_ALIVE))
        .and_then(|()| sockopt::set_socket_keepalive(&client, true));
}

/// Carries both directions until both have ended, or one broke off: then what is left of `client` is to be dropped. `socket` is
/// a duplicate of the client's. Returns whether the client was told the orderly end of what is for it.
pub async fn pump(client: impl AsyncRead + AsyncWrite, pair: UnixStream, socket: OwnedFd) -> bool {
    let (from_client, to_client) = tokio::io::split(client);
    let (from_pair, to_pair) = pair.into_split();
    let (ended, said) = (CancellationToken::new(), AtomicBool::new(false));
    let carried = async {
        tokio::try_join!(
            forth(from_client, to_pair, &ended),
            back(from_pair, to_client, &ended, &said),
        )
    };
    let carried = tokio::select! {
        carried = carried => carried.map(drop),
        () = gone(&socket, &ended) => Err(io::ErrorKind::ConnectionReset.into()),
    };
    if let Err(e) = carried {
        tracing::debug!(error = %e, "a client's connection broke off");
    }
    said.into_inner()
}

async fn forth(
    mut from: impl AsyncRead + Unpin,
    mut to: OwnedWriteHalf,
    ended: &CancellationToken,
) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        let n = from.read(&mut piece).await?;
        if n == 0 {
            break;
        }
        if to.write_all(&piece[..n]).await.is_err() {
            // Nobody reads it. What the client is still to hear, `back` brings.
            return Ok(());
        }
    }
    ended.cancel();
    to.shutdown().await
}

async fn back(
    mut from: OwnedReadHalf,
    mut to: impl AsyncWrite + Unpin,
    ended: &CancellationToken,
    said: &AtomicBool,
) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        let n = from.read(&mut piece).await?;
        if n == 0 {
            break;
        }
        to.write_all(&piece[..n]).await?;
        // TLS keeps what the socket had no room for, and more may never come.
        to.flush().await?;
    }
    // After the end of our own sending it cannot be told.
    if !ended.is_cancelled() && socket_end::is_closed(from.as_ref()) {
        return Err(io::ErrorKind::ConnectionReset.into());
    }
    drop(piece);
    to.shutdown().await?;
    said.store(true, Ordering::Relaxed);
    // Whoever served the client may close the pair whole now, and the client leave its own end open for ever.
    loop {
        tokio::select! {
            () = ended.cancelled() => return Ok(()),
            () = sleep(LOOK) => {}
        }
        if !ended.is_cancelled() && socket_end::is_closed(from.as_ref()) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
    }
}

/// Ready once a client that has ended its sending is not there any more.
async fn gone(socket: &OwnedFd, ended: &CancellationToken) {
    ended.cancelled().await;
    keep_asking(socket);
    while !socket_end::is_closed(socket) {
        sleep(LOOK).await;
    }
    sleep(GONE_LIMIT).await;
}
