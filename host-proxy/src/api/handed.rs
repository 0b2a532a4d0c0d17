//! Connections that become a stream of a guest's service: commands and files.
//!
//! ```text
//! client ─ POST …, Upgrade: PROTOCOL ─► may they? ─► 101, and the connection is taken
//!        ─ the service's frames ══════► Connect + the socket ─► port process ─► agent
//!        ◄ Refused ── aditd, over its duplicate, if there is no stream ◄── DialFailed
//! ```
//! From `Dialed` on the client is the port process's, and goes on when aditd ends. The client of the operator's own socket is handed over as
//! it is: it is trusted with more than what it could do to a port process; others' are TCP, or a pair that aditd pumps.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use adit_channel::hello::{Extensions, Opaque};
use adit_channel::refusal::{Code, Refusal};
use adit_names::VmId;
use adit_port::control::Target;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, Shutdown, sockopt};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};

use super::{ApiError, App, Asks};
use crate::access::Verb;
use crate::access::tag::Tag;
use crate::front::stream::Stream;
use crate::link::{Asks as Greets, ClientEnd, ClientSocket, Link, Question, Unopened};
use crate::listen::Share;
use crate::reach::{self, Destination};
use crate::state::State;
use crate::taken::Taken;
use crate::vm::VmEntry;

/// How long a client may take to read why there is no stream.
const SAY_LIMIT: Duration = Duration::from_secs(5);

/// A stream that was asked for, and may be had.
pub(super) struct Handing<'a> {
    /// Name of the guest's service.
    pub(super) service: &'static str,
    /// What the connection becomes.
    pub(super) protocol: &'static str,
    /// Arguments of the hello.
    pub(super) arguments: Vec<u8>,
    /// What is done over it: by that it is judged again.
    pub(super) verb: Verb<'a>,
    /// Why there is no stream, as the service's clients hear it.
    pub(super) refused: fn(&Refusal) -> Vec<u8>,
}

/// The answer to a request whose connection is not to become that; `help`: what to do.
pub(super) fn not_upgraded(
    head: &HeaderMap,
    protocol: &'static str,
    help: &str,
) -> Option<Response> {
    let said = head
        .get(header::UPGRADE)
        .and_then(|value| value.to_str().ok());
    if said.is_some_and(|said| said.eq_ignore_ascii_case(protocol)) {
        return None;
    }
    let text = format!("this is for connections that become a stream: `Upgrade: {protocol}`");
    let refused = ApiError::new(StatusCode::UPGRADE_REQUIRED, "upgrade-required", text).help(help);
    Some(([(header::UPGRADE, protocol)], refused).into_response())
}

/// Has the connection become a stream of the VM.
pub(super) async fn hand(
    state: &App,
    asks: &Asks,
    vm: &Arc<VmEntry>,
    handing: Handing<'_>,
) -> Result<Response, ApiError> {
    let (state, caller) = (state.clone(), asks.caller());
    let rated = match state.has_rate(vm) {
        true => state.rated(caller, handing.verb, vm)?,
        false => None,
    };
    let limits = rated.map(|(_, limits)| limits).unwrap_or_default();
    let link = vm.channel.link().ok_or_else(|| {
        let text = format!("VM `{}`: its port process does not run", vm.name);
        Refusal::new(Code::NoPortProcess, text)
    })?;
    let share = reach::share(&state, &vm.name, vm.weight())?;
    let outlives = state.config.limits.tunnels_outlive_grants;
    let service = handing.service.parse();
    let service = service.map_err(|_| Refusal::new(Code::Internal, "no name"))?;
    let question = Question {
        to: Target::Service(service),
        extensions: Extensions {
            arguments: opaque(handing.arguments),
            caller: opaque(asks.who(&state).await.into_bytes()),
            ..Extensions::default()
        },
        deadline: reach::DIAL_LIMIT,
        tag: Tag::of(caller, handing.verb).filter(|_| !outlives),
        note: None,
        limits,
    };
    let to = Destination {
        vm: vm.name.clone(),
        host: None,
        target: question.to.clone(),
    };
    let grants = state.grants();
    let refused = handing.refused;
    let taken = Taken::by(move |fd, ahead| async move {
        give(&state, &link, (&to, question), (fd, ahead), refused, share).await;
        if !Arc::ptr_eq(&grants, &state.grants()) {
            state.access_changed.notify_one();
        }
    });
    let protocol = handing.protocol;
    let head = [(header::CONNECTION, "upgrade"), (header::UPGRADE, protocol)];
    let mut response = (StatusCode::SWITCHING_PROTOCOLS, head).into_response();
    response.extensions_mut().insert(taken);
    Ok(response)
}

/// What fits, whole; it is checked before.
fn opaque<const MAX: usize>(bytes: Vec<u8>) -> Opaque<MAX> {
    bytes.try_into().unwrap_or_default()
}

/// Gives a client to the VM's port process, or says why not.
async fn give(
    state: &State,
    link: &Arc<Link>,
    (to, question): (&Destination, Question),
    (fd, ahead): (OwnedFd, Bytes),
    refused: fn(&Refusal) -> Vec<u8>,
    _share: Share<VmId>,
) {
    let spare = match fd.try_clone() {
        Ok(spare) if state.room.spares(&spare) => spare,
        _ => return tracing::debug!("no descriptor for a client that is given away"),
    };
    let client = ClientSocket {
        fd,
        ahead: ahead.to_vec(),
        greeting: Vec::new(),
        // Nothing may be said to it before it is answered.
        asks: Greets::new(&[]),
    };
    let failed = match link.open(question, ClientEnd::Socket(client)).await {
        Ok(()) => None,
        Err(Unopened::Failed(failed)) => Some(reach::refusal(to, &failed)),
        Err(Unopened::Unknown(failed)) => {
            tracing::info!(vm = %to.vm, error = %failed.text, "a client's stream is lost");
            let _ = rustix::net::shutdown(&spare, Shutdown::Both);
            None
        }
    };
    let spare = match failed {
        Some(why) => {
            tracing::info!(vm = %to.vm, code = %why.code(), detail = %adit_names::escape(why.text()), "stream refused");
            match refuse(spare, &refused(&why)).await {
                Some(spare) => spare,
                None => return,
            }
        }
        None => spare,
    };
    // The port process may have made its last close one that waits.
    link.closer().close(spare);
}

/// Says why there is no stream, without ever waiting in a call: the port process may have made the socket one that does.
async fn refuse(client: OwnedFd, frame: &[u8]) -> Option<OwnedFd> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let _ = rustix::net::send(&client, frame, flags);
    let _ = rustix::net::shutdown(&client, Shutdown::Write);
    let client = watched(client).ok()?;
    let heard = async {
        let mut rest = [0; 1024];
        while client.ready(Interest::READABLE).await.is_ok() {
            let read = client.try_io(Interest::READABLE, || {
                Ok(rustix::net::recv(
                    &client,
                    &mut rest[..],
                    RecvFlags::DONTWAIT,
                )?)
            });
            match read {
                Ok((0, _)) => return,
                Err(e) if e.kind() != ErrorKind::WouldBlock => return,
                Ok(_) | Err(_) => {}
            }
        }
    };
    // A close on bytes that nobody has read would be a reset, which overtakes what was said.
    let _ = tokio::time::timeout(SAY_LIMIT, heard).await;
    client.into_fd().ok()
}

/// A connection that tokio looks at.
fn watched(client: OwnedFd) -> io::Result<Stream> {
    rustix::io::ioctl_fionbio(&client, true)?;
    Ok(match sockopt::socket_domain(&client)? {
        AddressFamily::UNIX => Stream::Pair(UnixStream::from_std(client.into())?),
        _ => Stream::Tcp(TcpStream::from_std(client.into())?),
    })
}
