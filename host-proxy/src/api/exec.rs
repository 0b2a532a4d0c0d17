//! Commands in a VM: the client's connection becomes a stream of the guest's service `exec`.
//!
//! ```text
//! client ─ POST /v1/vms/VM/exec?user=…&run=… (or shell=true), Upgrade: adit-exec ─► may they? ─► 101, and the connection is taken
//!        ─ frames of `adit_exec` ══════════════════════════════════► Connect + the socket ─► port process ─► agent
//!        ◄ Refused ── aditd, over its duplicate, if there is no stream ◄── DialFailed
//! ```
//! As whom, and which program, goes to the guest in the hello: what was decided here is what it runs. `handed` has the connection's way.

use adit_api::ErrorBody;
use adit_channel::refusal::{Code, Refusal};
use adit_exec::{Asked, Refused, SERVICE, TEXT_MAX, ToClient, What, refusal};
use axum::extract::{Path, Query, State as Shared};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde::Deserialize;
use utoipa::IntoParams;

use super::handed::{self, Handing};
use super::{ApiError, App, Asks, find};
use crate::access::{Users, Verb};

/// What the connection becomes.
const PROTOCOL: &str = "adit-exec";
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
    if let Some(refused) = handed::not_upgraded(&head, PROTOCOL, "use `adit exec`") {
        return Ok(refused);
    }
    let verb = Verb::Exec(user);
    let target = format!("{}:{what}", user.unwrap_or("*"));
    asks.may_do(&state, verb, (&name, &target))?;
    let vm = find(&state, &name)?;
    if vm.lock.is_on() && matches!(asked.what, What::Run(_) | What::Shell) {
        let text = format!("VM `{}` is locked", vm.name);
        return Err(Refusal::new(Code::Locked, text).into());
    }
    let handing = Handing {
        service: SERVICE,
        protocol: PROTOCOL,
        arguments: asked.encode().unwrap_or_default(),
        verb,
        refused,
    };
    handed::hand(&state, &asks, &vm, handing).await
}

/// Why there is no stream, as its client hears it.
fn refused(why: &Refusal) -> Vec<u8> {
    let reason = match why.code() {
        Code::Denied | Code::NotAllowed => refusal::DENIED,
        Code::Busy => refusal::BUSY,
        _ => refusal::UNREACHABLE,
    };
    let mut text = why.text().to_owned();
    text.truncate(text.floor_char_boundary(TEXT_MAX));
    ToClient::Refused(Refused { reason, text }).encode()
}
