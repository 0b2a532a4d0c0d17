//! After `101 Switching Protocols`: bytes both ways between a client and a guest's server, as a WebSocket has them.
//!
//! aditd stays in the way, for the guest's stream has its other end already. Each side's end is passed on as its end; if
//! either side breaks off, or aditd is told to stop, the other side's connection is broken off too ([`ends`](super::ends)).

use std::io;

use adit_channel::socket_end;
use adit_tasks::VmId;
use hyper::upgrade::{OnUpgrade, Parts};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::ends::ClientIo;
use super::guest::Left;
use crate::listen::Share;

/// Carries both directions to their ends. `share`: the VM's, of the requests that are under way.
pub(super) async fn carry(
    stop: CancellationToken,
    client: OnUpgrade,
    guest: oneshot::Receiver<Left>,
    share: Share<VmId>,
) {
    tokio::select! {
        ended = both_ways(client, guest) => {
            if let Err(e) = ended {
                tracing::debug!(error = %e, "an upgraded connection broke off");
            }
        }
        () = stop.cancelled() => {}
    }
    drop(share);
}

async fn both_ways(client: OnUpgrade, guest: oneshot::Receiver<Left>) -> io::Result<()> {
    let guest = guest.await.map_err(io::Error::other)?;
    let upgraded = client.await.map_err(io::Error::other)?;
    let Parts { io, read_buf, .. } = upgraded
        .downcast::<TokioIo<ClientIo>>()
        .map_err(|_| io::Error::other("not a TCP client"))?;
    // From here on closing it is a reset.
    let mut client = io.into_inner().into_tcp()?;
    {
        let (from_client, to_client) = client.split();
        let (from_guest, to_guest) = tokio::io::split(guest.io.into_inner());
        tokio::try_join!(
            one_way(read_buf.chain(from_client), to_guest),
            one_way(guest.read_buf.chain(from_guest), to_client),
        )?;
    }
    socket_end::reset_on_close(&client, false);
    Ok(())
}

/// Until the end, and the end.
async fn one_way(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    tokio::io::copy(&mut from, &mut to).await?;
    to.shutdown().await
}
