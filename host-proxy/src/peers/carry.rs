//! A tunnel to a VM of another host, whose client is here: bytes both ways, on the thread of other hosts. An end is passed on as an end, and
//! a break as a break.

use std::io;
use std::os::fd::OwnedFd;

use adit_channel::socket_end;
use rustix::net::{AddressFamily, sockopt};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::line::Open;
use crate::front::stream::Stream;
use crate::link::ClientSocket;
use crate::proxy::http2::tunnel::{End as _, Went};
use crate::visit::Visit;

/// A tunnel that is open. Until it is carried, its client has heard nothing; dropped, the client is reset.
#[derive(Debug)]
pub struct Carried {
    open: Open,
    client: ClientSocket,
    visit: Visit,
    thread: Handle,
}

impl Carried {
    pub(super) fn new(open: Open, client: ClientSocket, visit: Visit, thread: Handle) -> Self {
        Self {
            open,
            client,
            visit,
            thread,
        }
    }

    /// Carries both directions to their ends.
    pub async fn carry(self, stop: &CancellationToken) {
        let Self {
            open,
            client,
            visit,
            thread,
        } = self;
        let mut carrying = thread.spawn(async move {
            let carried = of_client(open, client, &visit).await;
            if let Err(e) = carried {
                tracing::debug!(error = %e, "a tunnel to another host broke off");
            }
        });
        tokio::select! {
            _ = &mut carrying => {}
            () = stop.cancelled() => carrying.abort(),
        }
    }
}

async fn of_client(open: Open, client: ClientSocket, visit: &Visit) -> io::Result<()> {
    let ClientSocket {
        fd,
        ahead,
        greeting,
        ..
    } = client;
    // Whatever breaks off is broken off there too.
    socket_end::reset_on_close(&fd, true);
    let client = stream(fd)?;
    client.send(&greeting).await?;
    let count = |went, bytes| match went {
        Went::FromStream => visit.add_from_vm(bytes),
        Went::IntoStream => visit.add_to_vm(bytes),
    };
    open.carry(ahead.into(), &client, &count).await?;
    visit.ended();
    socket_end::reset_on_close(&client, false);
    Ok(())
}

fn stream(fd: OwnedFd) -> io::Result<Stream> {
    // It shares with its duplicate that nobody blocks on it.
    Ok(match sockopt::socket_domain(&fd)? {
        AddressFamily::UNIX => Stream::Pair(UnixStream::from_std(fd.into())?),
        _ => Stream::Tcp(TcpStream::from_std(fd.into())?),
    })
}
