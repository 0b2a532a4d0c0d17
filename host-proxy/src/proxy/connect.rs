//! CONNECT: the client's socket goes to the port process with the dial, and aditd forgets it with the answer.
//!
//! ```text
//! client ─ CONNECT VM:PORT ─► head checked ─► destination, admitted ───► Connect + the socket ─► port process
//!        ◄─ 200 ── the port process, when the stream is open ◄──────────────────────── Dialed ──┘
//!        ◄─ 4xx, 5xx ── aditd, over its duplicate ◄──────────────────────────────── DialFailed ─┘
//! ```
//!
//! hyper writes the refusals, and nothing else: once the port process has greeted the client, the connection is dropped with
//! everything in it. A client whose socket was passed is never served again by aditd, whatever the answer (a refused CONNECT
//! ends its connection anyway): the port process may have kept its duplicate, and would read along.

use std::sync::Arc;

use adit_channel::refusal::{Code, Refusal};
use adit_names::VmId;
use adit_port::control::PREFIX_MAX;
use hyper::Request;
use hyper::body::Incoming;
use hyper::header::HeaderValue;

use super::authority;
use super::client::{Notes, Tunnel};
use super::own;
use super::problem::{self, Problem};
use crate::access::Caller;
use crate::peers::Carried;
use crate::reach::{self, ClientSocket, NotOpened, Over};
use crate::state::State;
use crate::visit::Visit;

/// Whose a client is that aditd is done with.
#[derive(Debug)]
pub(super) enum Handed {
    /// The port process's.
    Over,
    /// This process's, as bytes.
    Carried(Carried),
    /// Nobody knows: its connection is reset.
    Lost,
}

/// Opens the tunnel that a CONNECT asks for.
pub(super) async fn open(
    state: &Arc<State>,
    caller: &Caller,
    notes: &Notes,
    request: &Request<Incoming>,
    visit: &Visit,
) -> Result<Handed, Problem> {
    let named = request.uri().authority();
    let named = named.ok_or_else(|| Problem::malformed("CONNECT names VM:PORT"))?;
    let to = authority::parse(&state.config.names.suffix, named.as_str(), None)?;
    let admitted = reach::admit(state, caller, &to, visit).await?;
    let tunnel = notes.take_tunnel();
    let tunnel = tunnel.ok_or_else(|| internal("no client: its socket is another request's"))?;
    let Tunnel {
        fd,
        ahead,
        shared,
        asks,
    } = tunnel.map_err(|e| few(&e))?;
    if !state.room.spares(&fd) {
        state.pool.clear();
        return Err(few(&"they are for the operator").into());
    }
    if ahead.len() > PREFIX_MAX {
        return Err(internal("too much was sent ahead").into());
    }
    if let Some(closer) = admitted.closer() {
        shared.with(closer);
    }
    let client = ClientSocket {
        fd,
        ahead,
        greeting: greeting(admitted.host(), state.host()),
        asks,
    };
    match admitted.hand_over(state, &to, client).await {
        Ok(Over::Away) => Ok(Handed::Over),
        Ok(Over::Here(carried)) => Ok(Handed::Carried(carried)),
        Err(NotOpened::Refused(refusal)) => {
            Err(Problem::from(refusal).of(admitted.host(), state.host()))
        }
        Err(NotOpened::Unknown(why)) => {
            shared.lose();
            tracing::info!(vm = %to.vm, error = %why, "tunnel lost");
            Ok(Handed::Lost)
        }
    }
}

fn few(why: &dyn std::fmt::Display) -> Refusal {
    tracing::debug!(%why, "no descriptor for a tunnel");
    Refusal::busy("aditd has few descriptors left")
}

fn internal(what: &str) -> Refusal {
    Refusal::new(Code::Internal, what)
}

/// The answer to a CONNECT.
fn greeting(there: Option<&VmId>, here: Option<&VmId>) -> Vec<u8> {
    let mut text = String::from("HTTP/1.1 200 OK\r\n");
    if let Some(date) = own::date() {
        text.push_str(&format!("Date: {date}\r\n"));
    }
    if let Some(Ok(status)) = problem::both(there, here).as_ref().map(HeaderValue::to_str) {
        text.push_str(&format!("Proxy-Status: {status}\r\n"));
    }
    text.push_str("\r\n");
    text.into_bytes()
}
