//! Commands in a VM: the client's connection becomes a stream of the guest's service `exec`.
//!
//! ```text
//! client ─ POST /v1/vms/VM/exec?user=…&run=… (or shell=true), Upgrade: adit-exec ─► may they? ─► 101, and the connection is taken
//!        ─ frames of `adit_exec` ══════════════════════════════════► Connect + the socket ─► port process ─► agent
//!        ◄ Refused ── aditd, over its duplicate, if there is no stream ◄── DialFailed
//! ```
//! As whom, and which program, goes to the guest in the hello: what was decided here is what it runs. From `Dialed` on the client is the
//! port process's, and goes on when aditd ends. The client of the operator's own socket is handed over as it is: it is trusted with more
//! than what it could do to a port process; others' are TCP, or a pair that aditd pumps.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use adit_api::ErrorBody;
use adit_channel::hello::{Extensions, Opaque};
use adit_channel::refusal::{Code, Refusal};
use adit_exec::{Asked, Refused, SERVICE, TEXT_MAX, ToClient, What, refusal};
use adit_names::VmId;
use adit_port::control::Target;
use axum::extract::{Path, Query, State as Shared};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, Shutdown, sockopt};
use serde::Deserialize;
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};
use utoipa::IntoParams;

use super::{ApiError, App, Asks, find};
use crate::access::tag::Tag;
use crate::access::{Users, Verb};
use crate::front::stream::Stream;
use crate::link::{Asks as Greets, ClientEnd, ClientSocket, Link, Question, Unopened};
use crate::listen::Share;
use crate::reach::{self, Destination};
use crate::state::State;
use crate::taken::Taken;

/// What the connection becomes.
const PROTOCOL: &str = "adit-exec";
/// How long a client may take to read why there is no stream.
const SAY_LIMIT: Duration = Duration::from_secs(5);

/// What is asked: one of `run`, `shell`, `attach`, `end` and `ticket`, or none of them for the list.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Ask {
    /// As which user of the guest; without one, of whichever user a session is.
    #[serde(default)]
    user: Option<String>,
    /// Run this program: the first element of the command, as the guest is to find it.
    #[serde(default)]
    run: Option<String>,
    /// Run the user's login shell.
    #[serde(default)]
    shell: bool,
    /// Attach to the session of this id.
    #[serde(default)]
    attach: Option<String>,
    /// End the session of this id, or send it a signal.
    #[serde(default)]
    end: Option<String>,
    /// Number of that signal.
    #[serde(default)]
    signal: Option<u8>,
    /// What a ticket says that comes on a sealed stream, for the audit: the guest goes by the ticket alone.
    #[serde(default)]
    ticket: Option<String>,
}

impl Ask {
    fn asked(self) -> Option<Asked> {
        let Self {
            user,
            run,
            shell,
            attach,
            end,
            signal,
            ticket,
        } = self;
        let what = match (run, shell, attach, end, signal, ticket) {
            (Some(program), false, None, None, None, None) => What::Run(program),
            (None, true, None, None, None, None) => What::Shell,
            (None, false, Some(id), None, None, None) => What::Attach(id),
            (None, false, None, Some(id), signal, None) => What::End {
                id,
                signal: signal.unwrap_or(0),
            },
            (None, false, None, None, None, Some(of)) => What::Ticket(of),
            (None, false, None, None, None, None) => What::List,
            _ => return None,
        };
        let fits = user.as_deref().is_none_or(Users::could_be);
        let user = user.filter(|_| fits);
        let asked = Asked { user, what };
        (fits && asked.encode().is_some()).then_some(asked)
    }
}

fn shown(what: &What) -> String {
    let text = match what {
        What::Run(program) => program.clone(),
        What::Shell => "login shell".into(),
        What::Attach(id) => format!("attach {id}"),
        What::List => "list".into(),
        What::End { id, signal: 0 } => format!("end {id}"),
        What::End { id, signal } => format!("signal {signal} {id}"),
        What::Ticket(of) => format!("by a ticket: {of}"),
    };
    adit_names::escape(&text).at_most(120).to_string()
}

/// Has a command run in a VM, or asks for those that run there. The connection becomes a stream of frames.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/exec",
    params(("name" = String, Path, description = "Name of the VM"), Ask),
    responses(
        (status = 101, description = "The connection is the command's from here on"),
        (status = 426, body = ErrorBody, description = "The request has no `Upgrade: adit-exec`")
    )
)]
pub(super) async fn exec(
    Shared(state): Shared<App>,
    asks: Asks,
    Path(name): Path<String>,
    Query(ask): Query<Ask>,
    head: HeaderMap,
) -> Result<Response, ApiError> {
    let asked = ask.asked().ok_or_else(|| {
        let text = "it takes a user and one of `run`, `shell`, `attach`, `end` and `ticket`; a list and an end may be without a user";
        ApiError::new(StatusCode::BAD_REQUEST, "usage", text)
    })?;
    let user = asked.user.as_deref();
    let what = shown(&asked.what);
    let is = |field: header::HeaderName, word: &str| {
        let said = head.get(field).and_then(|value| value.to_str().ok());
        said.is_some_and(|said| said.eq_ignore_ascii_case(word))
    };
    if !is(header::UPGRADE, PROTOCOL) {
        let text = "this is for connections that become a stream: `Upgrade: adit-exec`";
        let refused = ApiError::new(StatusCode::UPGRADE_REQUIRED, "upgrade-required", text)
            .help("use `adit exec`");
        return Ok(([(header::UPGRADE, PROTOCOL)], refused).into_response());
    }
    asks.may_exec(&state, user, (&name, &what))?;
    let vm = find(&state, &name)?;
    let caller = asks.caller();
    let rated = match state.has_rate(&vm) {
        true => state.rated(caller, Verb::Exec(user), &vm)?,
        false => None,
    };
    let limits = rated.map(|(_, limits)| limits).unwrap_or_default();
    if vm.lock.is_on() && matches!(asked.what, What::Run(_) | What::Shell) {
        let text = format!("VM `{}` is locked", vm.name);
        return Err(Refusal::new(Code::Locked, text).into());
    }
    let link = vm.channel.link().ok_or_else(|| {
        let text = format!("VM `{}`: its port process does not run", vm.name);
        Refusal::new(Code::NoPortProcess, text)
    })?;
    let share = reach::share(&state, &vm.name, vm.weight())?;
    let arguments = asked.encode().unwrap_or_default();
    let outlives = state.config.limits.tunnels_outlive_grants;
    let service = SERVICE
        .parse()
        .map_err(|_| Refusal::new(Code::Internal, "no name"))?;
    let question = Question {
        to: Target::Service(service),
        extensions: Extensions {
            arguments: opaque(arguments),
            caller: opaque(asks.who(&state).await.into_bytes()),
            ..Extensions::default()
        },
        deadline: reach::DIAL_LIMIT,
        tag: Tag::of(caller, Verb::Exec(user)).filter(|_| !outlives),
        note: None,
        limits,
    };
    let to = Destination {
        vm: vm.name.clone(),
        host: None,
        target: question.to.clone(),
    };
    let grants = state.grants();
    let taken = Taken::by(move |fd, ahead| async move {
        hand(&state, &link, (&to, question), (fd, ahead), share).await;
        if !Arc::ptr_eq(&grants, &state.grants()) {
            state.access_changed.notify_one();
        }
    });
    let head = [(header::CONNECTION, "upgrade"), (header::UPGRADE, PROTOCOL)];
    let mut response = (StatusCode::SWITCHING_PROTOCOLS, head).into_response();
    response.extensions_mut().insert(taken);
    Ok(response)
}

/// What fits, whole; it is checked before.
fn opaque<const MAX: usize>(bytes: Vec<u8>) -> Opaque<MAX> {
    bytes.try_into().unwrap_or_default()
}

/// Gives a client to the VM's port process, or says why not.
async fn hand(
    state: &State,
    link: &Arc<Link>,
    (to, question): (&Destination, Question),
    (fd, ahead): (OwnedFd, Bytes),
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
    let refused = match link.open(question, ClientEnd::Socket(client)).await {
        Ok(()) => None,
        Err(Unopened::Failed(failed)) => Some(reach::refusal(to, &failed)),
        Err(Unopened::Unknown(failed)) => {
            tracing::info!(vm = %to.vm, error = %failed.text, "a command's stream is lost");
            let _ = rustix::net::shutdown(&spare, Shutdown::Both);
            None
        }
    };
    let spare = match refused {
        Some(refused) => {
            tracing::info!(vm = %to.vm, code = %refused.code(), detail = %adit_names::escape(refused.text()), "command refused");
            match refuse(spare, &refused).await {
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
async fn refuse(client: OwnedFd, why: &Refusal) -> Option<OwnedFd> {
    let reason = match why.code() {
        Code::Denied | Code::NotAllowed => refusal::DENIED,
        Code::Busy => refusal::BUSY,
        _ => refusal::UNREACHABLE,
    };
    let mut text = why.text().to_owned();
    text.truncate(text.floor_char_boundary(TEXT_MAX));
    let frame = ToClient::Refused(Refused { reason, text }).encode();
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let _ = rustix::net::send(&client, &frame, flags);
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
