//! A client whose own bytes are the tunnel's: it is given to the port process as soon as it is known where it goes.
//!
//! The port process may have, and keep, a duplicate of the socket once the dial has begun. From then on nothing here blocks on
//! it, and it is closed on another thread ([`ends`](crate::proxy) has the same rules).

use std::io;

use adit_channel::refusal::Refusal;
use adit_channel::socket_end;
use rustix::net::{SendFlags, Shutdown};
use tokio::io::AsyncWriteExt;

use super::stream::Stream;
use crate::access::Caller;
use crate::link::Asks;
use crate::listen::Place;
use crate::proxy::cut_off::cut_off;
use crate::proxy::linger;
use crate::proxy::problem::Problem;
use crate::reach::{self, ClientSocket, Destination, NotOpened};
use crate::state::State;

/// What a client is told.
pub struct Words<F> {
    /// What it speaks, for metrics.
    pub speaks: &'static str,
    /// Bytes ahead of the guest's.
    pub greeting: Vec<u8>,
    /// Bytes that say why there is no tunnel; none: the connection is reset.
    pub refusal: F,
}

/// Dials for a client, and gives it away. `ahead` was read of it already.
pub async fn hand(
    state: &State,
    caller: &Caller,
    to: &Destination,
    mut client: Stream,
    ahead: Vec<u8>,
    words: Words<impl FnOnce(&Refusal) -> Vec<u8>>,
    place: Place,
) {
    place.spoke();
    let admitted = match reach::admit(state, caller, to) {
        Ok(admitted) => admitted,
        Err(refusal) => {
            note(state, words.speaks, to, &refusal);
            return refuse(&mut client, &(words.refusal)(&refusal)).await;
        }
    };
    // Whoever closes it last resets it, unless its end was said.
    socket_end::reset_on_close(&client, true);
    let fd = match rustix::io::fcntl_dupfd_cloexec(&client, 0) {
        Ok(fd) if state.room.spares(&fd) => fd,
        _ => {
            state.pool.clear();
            let refusal = Refusal::busy("aditd has few descriptors left");
            return refuse(&mut client, &(words.refusal)(&refusal)).await;
        }
    };
    let passed = ClientSocket {
        fd,
        ahead,
        greeting: words.greeting,
        // Nothing may be said to it before it is answered.
        asks: Asks::new(&[]),
    };
    let handed = admitted.hand_over(state, to, passed).await;
    let Ok(client) = client.into_fd() else { return };
    match handed {
        Ok(()) => state.metrics.tunnel(words.speaks, 200),
        Err(NotOpened::Refused(refusal)) => {
            note(state, words.speaks, to, &refusal);
            let said = (words.refusal)(&refusal);
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            if !said.is_empty() && rustix::net::send(&client, &said, flags).is_ok() {
                socket_end::reset_on_close(&client, false);
                let _ = rustix::net::shutdown(&client, Shutdown::Write);
            } else {
                lose(&client);
            }
        }
        Err(NotOpened::Unknown(why)) => {
            lose(&client);
            tracing::info!(vm = %to.vm, error = %why, "tunnel lost");
        }
    }
    admitted.closer().close(client);
}

/// Ends a connection, whoever has a duplicate of the socket.
fn lose(client: &impl std::os::fd::AsFd) {
    let _ = cut_off(client)
        .or_else(|_| Ok(rustix::net::shutdown(client, Shutdown::Both)?) as io::Result<()>);
}

/// Says why there is no tunnel to a client whose socket nobody else has.
pub async fn refuse(client: &mut Stream, said: &[u8]) {
    if said.is_empty() {
        socket_end::reset_on_close(&*client, true);
        return;
    }
    if client.write_all(said).await.is_ok() {
        let _ = linger::end(client, None, true).await;
    }
}

fn note(state: &State, speaks: &'static str, to: &Destination, refusal: &Refusal) {
    let status = Problem::from(refusal.clone()).status;
    state.metrics.tunnel(speaks, status.as_u16());
    let detail = adit_names::escape(refusal.text());
    tracing::info!(vm = %to.vm, code = %refusal.code(), %detail, "connection refused");
}
