//! Files of a VM: the client's connection becomes a stream of the guest's service `files`.
//!
//! As whom, what, where, and beneath which directory goes to the guest in the hello: the directory is that of the grant, and the guest holds
//! to it. `handed` has the connection's way.

use adit_api::ErrorBody;
use adit_channel::refusal::{Code, Refusal};
use adit_files::{Asked, Message, Refused, SERVICE, What, refusal};
use axum::extract::{Path, Query, State as Shared};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};

use super::handed::{self, Handing};
use super::{ApiError, App, Asks, find};
use crate::access::decide::Where;
use crate::access::{Users, Verb};

/// What the connection becomes.
const PROTOCOL: &str = "adit-files";

/// What is asked.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Ask {
    /// As which user of the guest.
    user: String,
    /// What is done.
    #[param(inline)]
    r#do: Do,
    /// Where in the guest: absolute, without `.`, `..`, `//` or a slash at its end; or the same below the user's home, and empty for that.
    #[serde(default)]
    path: String,
}

/// What is done with files.
#[derive(Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Do {
    /// A file or a tree comes from the guest.
    Read,
    /// One goes there.
    Write,
    /// What is in a directory is shown.
    List,
    /// What is known of one file is shown.
    Stat,
    /// A file is removed.
    Remove,
    /// A file, or a directory with all that is below, is removed.
    RemoveAll,
    /// It is shown when something is there.
    Wait,
}

impl Ask {
    fn asked(self) -> Option<Asked> {
        let what = match self.r#do {
            Do::Read => What::Read,
            Do::Write => What::Write,
            Do::List => What::List,
            Do::Stat => What::Stat,
            Do::Remove => What::Remove { all: false },
            Do::RemoveAll => What::Remove { all: true },
            Do::Wait => What::Wait,
        };
        let asked = Asked {
            user: self.user,
            what,
            path: self.path,
            under: 0,
        };
        (Users::could_be(&asked.user) && asked.encode().is_some()).then_some(asked)
    }
}

fn shown(asked: &Asked) -> String {
    let what = match asked.what {
        What::Read => "read",
        What::Write => "write",
        What::List => "list",
        What::Stat => "stat",
        What::Remove { .. } => "remove",
        What::Wait => "wait",
    };
    let text = format!("{what} {}", asked.path);
    adit_names::escape(&text).at_most(160).to_string()
}

/// Has files of a VM read, written, listed or removed. The connection becomes a stream of frames.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/files",
    params(("name" = String, Path, description = "Name of the VM"), Ask),
    responses(
        (status = 101, description = "The connection is the copy's from here on"),
        (status = 426, body = ErrorBody, description = "The request has no `Upgrade: adit-files`")
    )
)]
pub(super) async fn files(
    Shared(state): Shared<App>,
    asks: Asks,
    Path(name): Path<String>,
    Query(ask): Query<Ask>,
    head: HeaderMap,
) -> Result<Response, ApiError> {
    let mut asked = ask.asked().ok_or_else(|| {
        let text = "it takes a user, what to do, and a plain path of at most 400 bytes: absolute, or below the user's home";
        ApiError::new(StatusCode::BAD_REQUEST, "usage", text)
    })?;
    if let Some(refused) = handed::not_upgraded(&head, PROTOCOL, "use `adit cp`") {
        return Ok(refused);
    }
    let (user, path) = (asked.user.clone(), asked.path.clone());
    let verb = Verb::Files(Where {
        user: &user,
        path: &path,
    });
    asks.may_do(&state, verb, (&name, &format!("{user}:{}", shown(&asked))))?;
    let vm = find(&state, &name)?;
    if vm.lock.is_on() && asked.what.is_write() {
        let text = format!("VM `{}` is locked", vm.name);
        return Err(Refusal::new(Code::Locked, text).into());
    }
    let Some(under) = state.files_root(asks.caller(), verb, &vm) else {
        // The grant has gone just now.
        return Err(ApiError::unknown_vm(&name));
    };
    asked.under = under;
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
    Message::Refused(Refused::new(reason, why.text())).encode()
}
