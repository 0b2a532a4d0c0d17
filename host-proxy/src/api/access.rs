//! What the API is asked of grants: the proxy's own decision, without its effects.

use adit_api::{AccessDecision, GrantShown};
use adit_names::ServiceName;
use adit_port::control::Target;
use axum::Json;
use axum::extract::{Query, State as Shared};
use axum::http::StatusCode;
use axum::response::Response;
use jiff::Timestamp;
use serde::Deserialize;
use utoipa::IntoParams;

use super::lists::{self, PageQuery};
use super::{Answer, ApiError, App, find};
use crate::access::decide::Where;
use crate::access::{Access, Caller, Grant, Subject, Verb};
use crate::proxy::authority;
use crate::reach::find::Found;
use crate::reach::{self, Destination};

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Check {
    /// Who asks: `user:NAME`, `group:NAME`, `token:NAME`, `cert:NAME`, `network:NAME`, `anyone` or `owner`.
    r#as: String,
    /// `reach` with a target; `forward`, the same by a listener that leads there; `exec` with a user of the guest for its target; `files` with a user and a path, as deploy@/srv; `see`, `task`, `goal`, `manage` without one.
    verb: String,
    /// The VM. Of `reach` and `forward` without a target, also where in it, as a client of the proxy writes it: `web-1:80`,
    /// `vsock-5000.web-1`, `docker.web-1.svc`.
    vm: String,
    /// `tcp:80`, `vsock:5000`, or the name of a service; of `exec` a user, without one any of them; of `files` USER@/PATH.
    #[serde(default)]
    target: Option<String>,
}

/// Decides as for that caller.
#[utoipa::path(
    get,
    path = "/v1/access",
    params(Check),
    responses((status = 200, body = AccessDecision, description = "What the proxy would decide"))
)]
pub(super) async fn check(
    Shared(state): Shared<App>,
    Query(ask): Query<Check>,
) -> Answer<AccessDecision> {
    let caller = caller(&state, &ask.r#as).await?;
    let (is_exec, is_files) = (ask.verb == "exec", ask.verb == "files");
    let user = ask.target.as_deref().filter(|_| is_exec);
    let files = ask.target.as_deref().filter(|_| is_files);
    let files = files.and_then(|at| at.split_once('@'));
    let target = ask.target.as_deref().filter(|_| !is_exec && !is_files);
    let target = target.map(self::target).transpose()?;
    let (to, target) = destination(&state, &ask, target)?;
    let caller = match &*ask.verb {
        "forward" => caller.led(),
        _ => caller,
    };
    let verb = match (&*ask.verb, &target) {
        ("reach" | "forward", Some(target)) => Verb::Reach(target),
        ("see", None) => Verb::See,
        ("task", None) => Verb::Task,
        ("goal", None) => Verb::Goal,
        ("manage", None) => Verb::Manage,
        ("exec", None) => Verb::Exec(user),
        ("files", None) if files.is_some() => {
            let (user, path) = files.unwrap_or_default();
            Verb::Files(Where { user, path })
        }
        _ => {
            return Err(usage(
                "a verb is `reach` or `forward` with a target, `exec` with or without a user, `files` with USER@/PATH, or `see`, `task`, `goal`, `manage` without one",
            ));
        }
    };
    let names = caller.subjects().iter().map(ToString::to_string).collect();
    let denied = |reason: &str, text: String, hidden| {
        Json(AccessDecision {
            allowed: false,
            caller: caller.subjects().iter().map(ToString::to_string).collect(),
            by: None,
            reason: Some(reason.to_owned()),
            text,
            hidden,
        })
    };
    let vm = match reach::find::find(&state, &Caller::owner(), &to).await {
        Found::Here(vm) => vm,
        Found::There(host) => {
            let host = &host.config.name;
            let text = format!(
                "VM `{}` is on host `{host}`, which decides: ask there",
                to.name()
            );
            return Ok(denied("another-host", text, false));
        }
        Found::Nowhere(_) | Found::Several(_) => {
            let text = format!(
                "no VM is named `{}` on this host: `adit vm ls` lists them",
                to.name()
            );
            return Ok(denied("unknown-vm", text, true));
        }
    };
    let grants = state.grants();
    let decision = vm.viewed(
        |view| match grants.decide(&caller, verb, view, state.now_ms()) {
            Access::Allow(by) => AccessDecision {
                allowed: true,
                caller: names,
                by: by.map(|grant| grant.place.clone()),
                reason: None,
                text: match by {
                    Some(grant) => format!(
                        "the grant at {} lets {caller} {verb} VM `{}`",
                        grant.place, vm.name
                    ),
                    None => format!("{caller} may {verb} VM `{}`", vm.name),
                },
                hidden: false,
            },
            Access::Deny(denial) => AccessDecision {
                allowed: false,
                caller: names,
                by: None,
                reason: Some(denial.reason.word().into()),
                text: denial.reason.text(verb, &vm.name, &caller),
                hidden: denial.is_hidden,
            },
        },
    );
    Ok(Json(decision))
}

async fn caller(state: &App, text: &str) -> Result<Caller, ApiError> {
    if text == "owner" {
        return Ok(Caller::owner());
    }
    let subject: Subject = text.parse().map_err(|e| usage(&format!("`as`: {e}")))?;
    let nobody = Caller::anonymous("adit access check");
    Ok(match subject {
        Subject::Anyone => nobody,
        Subject::User(name) => {
            let person = match name.parse() {
                Ok(uid) => Some((*state.callers.person(uid).await).clone()),
                Err(_) => state.callers.named(&name).await,
            };
            let unknown = || {
                let message = format!("this host has no user `{name}`");
                ApiError::new(StatusCode::NOT_FOUND, "unknown-user", message)
            };
            nobody.with_person(&person.ok_or_else(unknown)?)
        }
        other => nobody.with([other]),
    })
}

/// What is asked about, by the rules of the proxy.
fn destination(
    state: &App,
    ask: &Check,
    target: Option<Target>,
) -> Result<(Destination, Option<Target>), ApiError> {
    let suffix = &state.config.names.suffix;
    let is_place = target.is_none() && ["reach", "forward"].contains(&&*ask.verb);
    let parsed = match is_place {
        true => authority::parse(suffix, &ask.vm, None),
        // The port is of no account.
        false => Destination::named(suffix, &ask.vm, Some(1)),
    };
    let to = parsed.map_err(|e| usage(&e.to_string()))?;
    let target = target.or_else(|| is_place.then(|| to.target.clone()));
    Ok((to, target))
}

/// `tcp:80`, `vsock:5000`, or the name of a service.
fn target(text: &str) -> Result<Target, ApiError> {
    if let Some(port) = text.strip_prefix("vsock:") {
        let port = port.parse().map_err(|_| usage("`vsock:` takes a number"))?;
        return Ok(Target::VsockPort(port));
    }
    let service = text.parse::<ServiceName>();
    Ok(Target::Service(
        service.map_err(|e| usage(&format!("`target`: {e}")))?,
    ))
}

fn usage(why: &str) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, "usage", why)
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Of {
    #[serde(default)]
    vm: Option<String>,
    /// At most so many, and at most 500; not given: all.
    limit: Option<usize>,
    /// Cursor of the page.
    after: Option<String>,
}

/// All grants, or those about a VM.
#[utoipa::path(
    get,
    path = "/v1/grants",
    params(Of),
    responses((status = 200, body = Vec<GrantShown>, description = "In the order of the configuration", headers(("adit-next" = String, description = "Cursor of the next page, if there is one"))))
)]
pub(super) async fn grants(
    Shared(state): Shared<App>,
    Query(of): Query<Of>,
) -> Result<Response, ApiError> {
    let (grants, now_ms) = (state.grants(), state.now_ms());
    let shown = |grant: &Grant| GrantShown {
        place: grant.place.clone(),
        to: texts(&grant.to),
        vms: texts(&grant.vms),
        may: texts(&grant.may),
        until: grant
            .until_ms
            .and_then(|ms| Timestamp::from_millisecond(ms).ok())
            .map(|at| at.to_string()),
        expired: grant.until_ms.is_some_and(|until| now_ms >= until),
        connections_per_s: grant.connections_per_s,
        bytes_per_s: grant.bytes_per_s,
        weight: Some(grant.weight),
    };
    let all: Vec<GrantShown> = match of.vm {
        None => grants.all().iter().map(shown).collect(),
        Some(name) => {
            let vm = find(&state, &name)?;
            vm.viewed(|view| grants.about(view).map(shown).collect())
        }
    };
    let page = PageQuery::new(of.limit, of.after);
    // They have no names; their order is that of the configuration, which a reload may change.
    let numbered: Vec<_> = all.into_iter().enumerate().collect();
    let (page, next) = page.of(&numbered, |(nth, _)| format!("{nth:08}"));
    let page: Vec<_> = page.iter().map(|(_, grant)| grant).collect();
    Ok(lists::page(&page, next))
}

fn texts<T: ToString>(all: &[T]) -> Vec<String> {
    all.iter().map(ToString::to_string).collect()
}
