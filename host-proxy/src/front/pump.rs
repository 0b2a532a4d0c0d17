//! Carries bytes between a client that cannot be handed to a port process and one end of a pair, whose other end can.
//!
//! ```text
//!  client ═══ pump ═══ pair ─ the other end: read as HTTP here, then handed to the port process like a TCP socket
//! ```
//! Whoever uses a Unix socket can pass descriptors over it, which a port process would close, and a close may take long; so
//! aditd receives them, and closes them elsewhere. Such a client's tunnels end when aditd's worker ends.
//!
//! Each side's end of sending is passed on as such. Where the pair is closed whole without it, the port process has broken off:
//! then so does this.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use adit_channel::socket_end;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::sleep;

/// Bytes of a direction that are under way here.
const PIECE: usize = 16 << 10;
/// How often it is looked whether a client that has ended its sending is there at all.
const LOOK: Duration = Duration::from_secs(1);
/// How long what a client has sent may take to arrive after it has gone.
const GONE_LIMIT: Duration = Duration::from_secs(10);

/// Carries both directions until both have ended, or one broke off: then what is left of `client` is dropped. `socket` is a
/// duplicate of the client's, if that shows whether the client has gone.
pub async fn pump(client: impl AsyncRead + AsyncWrite, pair: UnixStream, socket: Option<OwnedFd>) {
    let (from_client, to_client) = tokio::io::split(client);
    let (from_pair, to_pair) = pair.into_split();
    let ended = AtomicBool::new(false);
    let carried = async {
        tokio::try_join!(
            forth(from_client, to_pair, &ended, socket),
            back(from_pair, to_client, &ended),
        )
    };
    if let Err(e) = carried.await {
        tracing::debug!(error = %e, "a client's connection broke off");
    }
}

async fn forth(
    mut from: impl AsyncRead + Unpin,
    mut to: OwnedWriteHalf,
    ended: &AtomicBool,
    socket: Option<OwnedFd>,
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
    drop(piece);
    ended.store(true, Ordering::Relaxed);
    to.shutdown().await?;
    let Some(socket) = socket else { return Ok(()) };
    while !socket_end::is_closed(&socket) {
        sleep(LOOK).await;
    }
    sleep(GONE_LIMIT).await;
    Err(io::ErrorKind::ConnectionReset.into())
}

async fn back(
    mut from: OwnedReadHalf,
    mut to: impl AsyncWrite + Unpin,
    ended: &AtomicBool,
) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        let n = from.read(&mut piece).await?;
        if n > 0 {
            to.write_all(&piece[..n]).await?;
            continue;
        }
        // After the end of our own sending it cannot be told.
        if !ended.load(Ordering::Relaxed) && socket_end::is_closed(from.as_ref()) {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        return to.shutdown().await;
    }
}
