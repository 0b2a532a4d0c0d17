//! After `101 Switching Protocols`: bytes both ways between a client and a guest's server, as a WebSocket has them.
//!
//! aditd stays in the way, for the guest's stream has its other end already. Each side's end is passed on as its end; if
//! either side breaks off, or aditd is told to stop, the other side's connection is broken off too ([`ends`](super::ends)).

use std::io;

use adit_channel::socket_end;
use adit_names::VmId;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::client::Client;
use super::guest::{Guest, Left};
use crate::listen::Share;

/// A guest's server that changed, and waits for its client.
pub(super) struct Upgraded {
    guest: oneshot::Receiver<Left>,
    /// The VM's, of the proxy: the request is still under way.
    _share: Share<VmId>,
}

impl Upgraded {
    pub(super) fn new(guest: Guest, share: Share<VmId>) -> Self {
        Self {
            guest: guest.switched(),
            _share: share,
        }
    }

    /// Carries both directions to their ends.
    pub(super) async fn carry(self, client: Client, stop: &CancellationToken) {
        tokio::select! {
            ended = both_ways(client, self.guest) => {
                if let Err(e) = ended {
                    tracing::debug!(error = %e, "an upgraded connection broke off");
                }
            }
            () = stop.cancelled() => {}
        }
    }
}

async fn both_ways(client: Client, guest: oneshot::Receiver<Left>) -> io::Result<()> {
    let (client, ahead) = client.into_tunnel();
    // From here on closing it is a reset.
    let mut client = client.into_stream()?;
    let guest = guest.await.map_err(io::Error::other)?;
    {
        let (from_client, to_client) = tokio::io::split(&mut client);
        let (from_guest, to_guest) = tokio::io::split(guest.io.into_inner());
        tokio::try_join!(
            one_way((&ahead[..]).chain(from_client), to_guest),
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
