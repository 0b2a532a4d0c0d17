//! What each endpoint takes of whoever is not the owner. What is not in this table is the owner's.
//!
//! An endpoint that is about what a body or a filter names is asked for by its handler: it takes [`Asks`](super::Asks), and shows or
//! does only what that allows.

use axum::extract::rejection::RawPathParamsRejection;
use axum::extract::{MatchedPath, RawPathParams, Request, State as Shared};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::asks::{self, Asks};
use super::{ApiError, App, find};
use crate::access::Verb;

/// What it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Takes {
    /// Nothing.
    Nothing,
    /// A name: somebody of whom nothing is known gets nothing, unless everybody is granted something.
    Name,
    /// The verb on the VM of the path.
    Vm(Verb<'static>),
    /// The verb on `*`: it concerns all VMs, those to come too.
    Host(Verb<'static>),
    /// A name, and what the handler finds.
    Handler,
}

use Takes::{Handler, Host, Name, Nothing, Vm};
use Verb::{Manage, See};

/// The table.
pub(super) const RULES: [(&str, &str, Takes); 43] = [
    ("GET", "/healthz", Nothing),
    ("GET", "/v1/openapi.json", Name),
    // `see`
    ("GET", "/v1/vms", Handler),
    ("GET", "/v1/vms/{name}", Vm(See)),
    ("GET", "/v1/vms/{name}/wait", Vm(See)),
    ("GET", "/sd/prometheus", Handler),
    ("GET", "/metrics", Host(See)),
    ("GET", "/readyz", Host(See)),
    ("GET", "/v1/config", Host(See)),
    ("GET", "/v1/host-events", Host(See)),
    ("GET", "/v1/hosts", Host(See)),
    ("GET", "/v1/resolve", Host(See)),
    ("GET", "/v1/resolve/{name}", Host(See)),
    // `task`
    ("GET", "/v1/all-hosts/goals", Handler),
    ("GET", "/v1/all-hosts/tasks", Handler),
    ("GET", "/v1/goals", Handler),
    ("GET", "/v1/goals/{id}", Handler),
    ("GET", "/v1/tasks", Handler),
    ("GET", "/v1/tasks/{id}", Handler),
    ("GET", "/v1/tasks/{id}/output", Handler),
    ("GET", "/v1/events", Handler),
    // `goal`, for each VM of the audience
    ("POST", "/v1/goals", Handler),
    // `exec`, as a user
    ("POST", "/v1/vms/{name}/exec", Handler),
    // `files`, as a user and at a path
    ("POST", "/v1/vms/{name}/files", Handler),
    // `manage`; of a VM that is not there yet by its name
    ("POST", "/v1/vms", Handler),
    ("PATCH", "/v1/vms/{name}", Vm(Manage)),
    ("DELETE", "/v1/vms/{name}", Vm(Manage)),
    ("POST", "/v1/vms/{name}/reload", Vm(Manage)),
    ("POST", "/v1/vms/{name}/lock", Vm(Manage)),
    ("DELETE", "/v1/vms/{name}/lock", Vm(Manage)),
    ("POST", "/v1/vms/{name}/freeze", Vm(Manage)),
    ("DELETE", "/v1/vms/{name}/freeze", Vm(Manage)),
    ("GET", "/v1/vms/{name}/freeze", Vm(See)),
    ("POST", "/v1/vms/{name}/blobs/{digest}", Vm(Manage)),
    ("POST", "/v1/vms/{name}/agent", Vm(Manage)),
    ("GET", "/v1/blobs/{digest}", Host(Manage)),
    ("PUT", "/v1/blobs/{digest}", Host(Manage)),
    ("GET", "/v1/trust", Host(Manage)),
    ("POST", "/v1/trust", Host(Manage)),
    ("DELETE", "/v1/trust/{signer}", Host(Manage)),
    ("POST", "/v1/reload", Host(Manage)),
    // They show what all others may, also with VMs that whoever asks may not see.
    ("GET", "/v1/access", Host(Manage)),
    ("GET", "/v1/grants", Host(Manage)),
];

/// What an endpoint takes; none: the owner.
fn of(method: &Method, path: &str) -> Option<Takes> {
    // A HEAD is a GET without the body.
    let method = match method.as_str() {
        "HEAD" => "GET",
        method => method,
    };
    let is = |(of, at, _): &&(&str, &str, Takes)| *of == method && *at == path;
    RULES.iter().find(is).map(|(_, _, takes)| *takes)
}

/// Lets a request through to its handler if whoever makes it may make it.
pub(super) async fn allowed(
    Shared(state): Shared<App>,
    path: MatchedPath,
    params: Result<RawPathParams, RawPathParamsRejection>,
    request: Request,
    next: Next,
) -> Response {
    let checked = asks::of_request(&request).and_then(|asks| {
        if asks.is_owner() {
            return Ok(());
        }
        checked(&state, &asks, (request.method(), path.as_str()), params)
    });
    match checked {
        Ok(()) => next.run(request).await,
        Err(refused) => refused.into_response(),
    }
}

fn checked(
    state: &App,
    asks: &Asks,
    (method, path): (&Method, &str),
    params: Result<RawPathParams, RawPathParamsRejection>,
) -> Result<(), ApiError> {
    match of(method, path) {
        Some(Nothing) => Ok(()),
        Some(Name | Handler) => asks.must_be_somebody(state),
        Some(Host(verb)) => asks.may_of_host(state, verb),
        Some(Vm(verb)) => {
            let params = params.ok();
            let name = params.iter().flatten().find(|(key, _)| *key == "name");
            // What is no text names no VM.
            let name = name.map_or("", |(_, name)| name);
            asks.may(state, verb, name)?;
            find(state, name).map(drop)
        }
        None => asks.must_be_owner(state, path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_in_the_table_is_the_owners() {
        for (method, path) in [
            ("POST", "/v1/shutdown"),
            ("DELETE", "/v1/vms"),
            ("OPTIONS", "/v1/vms"),
            ("GET", "/v1/what-is-to-come"),
        ] {
            assert_eq!(of(&method.parse().unwrap(), path), None, "{method} {path}");
        }
        assert_eq!(of(&Method::HEAD, "/v1/vms/{name}"), Some(Vm(See)));
        let all: std::collections::BTreeSet<_> = RULES.iter().map(|(m, p, _)| (m, p)).collect();
        assert_eq!(all.len(), RULES.len());
    }

    #[test]
    fn every_rule_is_of_an_endpoint_that_there_is() {
        let document = super::super::described();
        for (method, path, _) in RULES {
            if path == "/v1/openapi.json" {
                continue;
            }
            let item = document.paths.paths.get(path);
            let item = item.unwrap_or_else(|| panic!("{path}"));
            let there = match method {
                "GET" => &item.get,
                "PUT" => &item.put,
                "POST" => &item.post,
                "PATCH" => &item.patch,
                "DELETE" => &item.delete,
                other => panic!("{other}"),
            };
            assert!(there.is_some(), "{method} {path}");
        }
    }
}
