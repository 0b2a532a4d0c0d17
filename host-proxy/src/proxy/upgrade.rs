//! After `101 Switching Protocols`: bytes both ways between a client and a guest's server, as a WebSocket has them.
//!
//! aditd stays in the way, for the guest's stream has its other end already. Each side's end is passed on as its end; if
//! either side breaks off, or aditd is told to stop, the other side's connection is broken off too ([`ends`](super::ends)).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use adit_channel::socket_end;
use adit_names::VmId;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::client::Client;
use super::guest::{Guest, Left};
use crate::listen::Share;
use crate::visit::Visit;

/// A guest's server that changed, and waits for its client.
pub(super) struct Upgraded {
    guest: oneshot::Receiver<Left>,
    /// The VM's, of the proxy: the request is still under way.
    _share: Share<VmId>,
    visit: Visit,
}

impl Upgraded {
    pub(super) fn new(guest: Guest, share: Share<VmId>, visit: Visit) -> Self {
        Self {
            guest: guest.switched(),
            _share: share,
            visit,
        }
    }

    /// Carries both directions to their ends.
    pub(super) async fn carry(self, client: Client, stop: &CancellationToken) {
        tokio::select! {
            ended = both_ways(client, self.guest, &self.visit) => match ended {
                Ok(()) => self.visit.ended(),
                Err(e) => tracing::debug!(error = %e, "an upgraded connection broke off"),
            },
            () = stop.cancelled() => {}
        }
    }
}

async fn both_ways(
    client: Client,
    guest: oneshot::Receiver<Left>,
    visit: &Visit,
) -> io::Result<()> {
    let (client, ahead) = client.into_tunnel();
    // From here on closing it is a reset.
    let mut client = client.into_stream()?;
    let guest = guest.await.map_err(io::Error::other)?;
    {
        let (from_client, to_client) = tokio::io::split(&mut client);
        let (from_guest, to_guest) = tokio::io::split(guest.io.into_inner());
        tokio::try_join!(
            one_way((&ahead[..]).chain(from_client), to_guest, |n| visit
                .add_to_vm(n)),
            one_way(guest.read_buf.chain(from_guest), to_client, |n| visit
                .add_from_vm(n)),
        )?;
    }
    socket_end::reset_on_close(&client, false);
    Ok(())
}

/// Until the end, and the end.
async fn one_way(
    from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    moved: impl FnMut(usize) + Unpin,
) -> io::Result<()> {
    tokio::io::copy(&mut Counted { from, moved }, &mut to).await?;
    to.shutdown().await
}

/// A side whose bytes are counted as they are read.
struct Counted<R, F> {
    from: R,
    moved: F,
}

impl<R: AsyncRead + Unpin, F: FnMut(usize) + Unpin> AsyncRead for Counted<R, F> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.from).poll_read(cx, buf);
        (self.moved)(buf.filled().len() - before);
        polled
    }
}
