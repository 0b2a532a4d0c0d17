//! A tunnel to a VM of another host, whose client is here: bytes both ways, on the thread of other hosts. An end is passed on as an end, and
//! a break as a break.

use std::io;
use std::os::fd::OwnedFd;

use adit_channel::socket_end;
use rustix::net::{AddressFamily, sockopt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::line::Open;
use crate::front::pump;
use crate::front::stream::Stream;
use crate::link::ClientSocket;

/// Bytes of a direction that are under way here.
const PIECE: usize = 64 << 10;

/// A tunnel that is open. Until it is carried, its client has heard nothing; dropped, the client is reset.
#[derive(Debug)]
pub struct Carried {
    open: Open,
    client: ClientSocket,
    thread: Handle,
}

impl Carried {
    pub(super) fn new(open: Open, client: ClientSocket, thread: Handle) -> Self {
        Self {
            open,
            client,
            thread,
        }
    }

    /// Carries both directions to their ends.
    pub async fn carry(self, stop: &CancellationToken) {
        let Self {
            open,
            client,
            thread,
        } = self;
        let mut carrying = thread.spawn(both_ways(open, client));
        tokio::select! {
            ended = &mut carrying => {
                if let Ok(Err(e)) = ended {
                    tracing::debug!(error = %e, "a tunnel to another host broke off");
                }
            }
            () = stop.cancelled() => carrying.abort(),
        }
    }
}

async fn both_ways(open: Open, client: ClientSocket) -> io::Result<()> {
    let ClientSocket {
        fd,
        ahead,
        greeting,
        ..
    } = client;
    // Whatever breaks off is broken off there too.
    socket_end::reset_on_close(&fd, true);
    let watched = fd.try_clone()?;
    let mut client = stream(fd)?;
    client.write_all(&greeting).await?;
    let (from_client, to_client) = tokio::io::split(&mut client);
    let (from_peer, to_peer) = tokio::io::split(open.into_io());
    let forth = one_way((&ahead[..]).chain(from_client), to_peer);
    let back = one_way(from_peer, to_client);
    tokio::pin!(forth, back);
    tokio::select! {
        carried = &mut forth => {
            carried?;
            tokio::select! {
                carried = &mut back => carried?,
                () = pump::gone(Some(&watched)) => return Err(io::ErrorKind::ConnectionReset.into()),
            }
        }
        carried = &mut back => {
            carried?;
            forth.await?;
        }
    }
    socket_end::reset_on_close(&watched, false);
    Ok(())
}

/// Until the end, and the end.
async fn one_way(from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> io::Result<()> {
    let mut from = BufReader::with_capacity(PIECE, from);
    tokio::io::copy_buf(&mut from, &mut to).await?;
    to.shutdown().await
}

fn stream(fd: OwnedFd) -> io::Result<Stream> {
    // It shares with its duplicate that nobody blocks on it.
    Ok(match sockopt::socket_domain(&fd)? {
        AddressFamily::UNIX => Stream::Pair(UnixStream::from_std(fd.into())?),
        _ => Stream::Tcp(TcpStream::from_std(fd.into())?),
    })
}
