//! What a client's connection is while its CONNECT is under way: nothing of it is read, and somebody else may have it next.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::task::Context;

use super::super::ends::Shared;
use super::{At, Client, Notes, half_closed};
use crate::link::Asks;

#[cfg(test)]
mod tests;

/// The client's side of a tunnel, while its CONNECT is under way.
#[derive(Debug)]
pub(in crate::proxy) struct Tunnel {
    /// A duplicate of the client's socket.
    pub(in crate::proxy) fd: OwnedFd,
    /// What came with the head of the request.
    pub(in crate::proxy) ahead: Vec<u8>,
    /// To be told who gets the duplicate.
    pub(in crate::proxy) shared: Shared,
    pub(in crate::proxy) asks: Arc<Asks>,
}

impl Notes {
    /// The tunnel that the CONNECT under way asks for. None: there is none.
    pub(in crate::proxy) fn take_tunnel(&self) -> Option<io::Result<Tunnel>> {
        self.tunnel().take()
    }

    fn tunnel(&self) -> MutexGuard<'_, Option<io::Result<Tunnel>>> {
        let tunnel = &self.0.tunnel;
        tunnel.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Client {
    /// The head of a CONNECT is checked: the rest is for the tunnel.
    pub(super) fn offer_tunnel(&mut self) {
        let ahead = std::mem::take(&mut self.ahead);
        self.at = At::Tunnel {
            ahead: !ahead.is_empty(),
        };
        let asks = self.asks.clone();
        let tunnel = self.io.duplicate().map(|(fd, shared)| Tunnel {
            fd,
            ahead: ahead.into(),
            shared,
            asks,
        });
        *self.notes.tunnel() = Some(tunnel);
    }

    /// While a CONNECT is under way: nothing is read, and a client that is gone is an error.
    pub(super) fn poll_caller(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if let Some(client) = self.io.stream() {
            half_closed::poll_ended(client, cx, &mut self.ended)?;
        }
        self.poll_half_closed(cx)
    }
}
