//! A client whose own bytes are the tunnel's: it is given to the port process as soon as it is known where it goes.
//!
//! The port process may have, and keep, a duplicate of the socket once the dial has begun. From then on nothing here blocks on
//! it, and it is closed on another thread ([`ends`](crate::proxy) has the rules). Nothing is read of it; a client that is gone
//! before the dial is answered has it given up.

use std::sync::Arc;

use adit_channel::refusal::Refusal;
use adit_channel::socket_end;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::stream::Stream;
use crate::access::Caller;
use crate::link::Asks;
use crate::listen::{HEADER_LIMIT, Place};
use crate::proxy::client::half_closed;
use crate::proxy::ends::{ClientIo, UnderWay};
use crate::proxy::linger;
use crate::proxy::problem::Problem;
use crate::reach::{self, ClientSocket, Destination, NotOpened, Over};
use crate::state::State;
use crate::visit::Visit;

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
    state: &Arc<State>,
    caller: &Caller,
    to: &Destination,
    client: Stream,
    ahead: Vec<u8>,
    words: Words<impl FnOnce(&Refusal) -> Vec<u8>>,
    place: Place,
) {
    place.spoke();
    let now_ms = state.now_ms();
    let visit = state
        .visits
        .begin(place.listener(), words.speaks, None, now_ms);
    let admitted = match reach::admit(state, caller, to, &visit).await {
        Ok(admitted) => admitted,
        Err(refusal) => {
            note(state, words.speaks, &refusal, &visit);
            return refuse(state, client, &(words.refusal)(&refusal), &place).await;
        }
    };
    let under_way = UnderWay::default();
    let mut client = ClientIo::new(client, under_way.clone());
    // Whoever closes it last resets it, unless its end was said.
    let (fd, shared) = match client.duplicate() {
        Ok((fd, shared)) if state.room.spares(&fd) => (fd, shared),
        _ => {
            state.pool.clear();
            let refusal = Refusal::busy("aditd has few descriptors left");
            note(state, words.speaks, &refusal, &visit);
            under_way.over();
            return say(state, &mut client, &(words.refusal)(&refusal), &place).await;
        }
    };
    if let Some(closer) = admitted.closer() {
        shared.with(closer);
    }
    let passed = ClientSocket {
        fd,
        ahead,
        greeting: words.greeting,
        // Nothing may be said to it before it is answered.
        asks: Asks::new(&[]),
    };
    let gone = async {
        match client.stream() {
            Some(client) => half_closed::gone(client).await,
            None => std::future::pending().await,
        }
    };
    let handed = tokio::select! {
        handed = admitted.hand_over(state, to, passed) => handed,
        () = gone => {
            shared.lose();
            tracing::debug!(vm = %to.vm, "the client has gone before its dial was answered");
            return;
        }
    };
    match handed {
        Ok(Over::Away) => state.metrics.tunnel(words.speaks, 200),
        Ok(Over::Here(carried)) => {
            state.metrics.tunnel(words.speaks, 200);
            drop(client);
            drop(admitted);
            carried.carry(&state.stop).await;
        }
        Err(NotOpened::Refused(refusal)) => {
            note(state, words.speaks, &refusal, &visit);
            let said = (words.refusal)(&refusal);
            if said.is_empty() {
                shared.lose();
            } else {
                under_way.over();
                say(state, &mut client, &said, &place).await;
            }
        }
        Err(NotOpened::Unknown(why)) => {
            shared.lose();
            tracing::info!(vm = %to.vm, error = %why, "tunnel lost");
        }
    }
}

/// Says why there is no tunnel to a client whose socket nobody else has.
pub async fn refuse(state: &State, mut client: Stream, said: &[u8], place: &Place) {
    if said.is_empty() {
        socket_end::reset_on_close(&client, true);
    } else {
        say(state, &mut client, said, place).await;
    }
}

/// Says it, and has it heard, while nobody else needs the place.
async fn say(
    state: &State,
    client: &mut (impl AsyncRead + AsyncWrite + Unpin),
    said: &[u8],
    place: &Place,
) {
    place.idle();
    let heard = async {
        if let Ok(Ok(())) = timeout(HEADER_LIMIT, client.write_all(said)).await {
            let _ = linger::end(client, None, true).await;
        }
    };
    tokio::select! {
        () = heard => {}
        () = place.evicted.cancelled() => {}
        () = state.stop.cancelled() => {}
    }
}

fn note(state: &State, speaks: &'static str, refusal: &Refusal, visit: &Visit) {
    let problem = Problem::from(refusal.clone());
    let status = problem.status.as_u16();
    state.metrics.tunnel(speaks, status);
    visit.answered(status, problem.error);
    let (detail, trace_id) = (adit_names::escape(refusal.text()), visit.trace().id());
    tracing::info!(vm = visit.vm(), code = %refusal.code(), %detail, trace_id, "connection refused");
}
