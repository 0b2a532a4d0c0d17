//! The JSON API on the Unix socket and on management listeners; `adit_api` lists the endpoints and has the types.
//!
//! `openapi` has the document that describes all of it, `access` has what is asked of grants, `discovery` targets for Prometheus, `host_events` what happens here, `vms` what is asked of VMs (`wait`: when they are ready; `lock`: whether anything new goes there; `exec`: commands in them; `files`: their files; `handed`: connections that become a stream), `blobs` files for them, `tasks` of goals and tasks (`elsewhere`: of those of other hosts; `lists`: the newest of them, and
//! filters that name nothing); `asks` knows who makes a request, and `rules` what that takes; here is the rest, and how a request fails.

mod access;
mod all_hosts;
mod asks;
mod blobs;
mod discovery;
mod elsewhere;
mod exec;
mod files;
mod freeze;
mod handed;
mod host_events;
mod lists;
mod lock;
mod openapi;
mod resolve;
mod rules;
mod tasks;
mod trust;
mod vms;
mod wait;

use std::sync::Arc;
use std::time::Duration;

use adit_api::{ConfigStatus, ErrorBody};
use adit_blob::BlobError;
use adit_channel::refusal::{Code, Refusal};
use adit_names::VmId;
use adit_tasks::dsse;
use axum::extract::{DefaultBodyLimit, Query, Request, State as Shared};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Deserialize;
use tokio::sync::OwnedSemaphorePermit;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::desk::DeskError;
use crate::registry::AddError;
use crate::remedy;
use crate::state::State;
use crate::vm::VmEntry;
use crate::vms::{NotAdded, port_gone};

/// Most bytes of a request's body: an envelope inside JSON.
pub const BODY_MAX: usize = 2 * dsse::ENVELOPE_MAX + 4096;

/// How long it may take until a configuration that is read again is applied: VMs that are removed have some seconds to end.
const RELOAD_LIMIT: Duration = Duration::from_secs(30);

pub use elsewhere::of_other_host;

pub use asks::{Asks, Owner, no_browser, no_proxy, not_logged_in};

type App = Arc<State>;
type Answer<T> = Result<Json<T>, ApiError>;

/// All endpoints, for requests that say who makes them ([`Asks`]).
pub fn router(state: App) -> Router {
    let (router, document) = own().split_for_parts();
    let document = openapi::document(document, observed().into_openapi());
    router
        .route("/v1/openapi.json", get(async move || document))
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .layer(middleware::from_fn(in_our_shape))
        .layer(middleware::from_fn(to_its_end))
        .merge(observe(state.clone()))
        .layer(middleware::from_fn_with_state(
            state.clone(),
            rules::allowed,
        ))
        .fallback(no_such_path)
        .with_state(state)
}

async fn no_such_path() -> ApiError {
    ApiError::new(
        StatusCode::NOT_FOUND,
        "unknown-path",
        "there is no such path",
    )
}

/// The document of all endpoints.
#[cfg(test)]
fn described() -> utoipa::openapi::OpenApi {
    own().into_openapi().merge_from(observed().into_openapi())
}

fn own() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(resolve::one))
        .routes(routes!(resolve::all))
        .routes(routes!(resolve::hosts))
        .routes(routes!(all_hosts::goals))
        .routes(routes!(all_hosts::tasks))
        .routes(routes!(vms::list, vms::add))
        .routes(routes!(vms::show, vms::change, vms::remove))
        .routes(routes!(vms::reload))
        .routes(routes!(lock::lock, lock::unlock))
        .routes(routes!(freeze::freeze, freeze::thaw, freeze::show))
        .routes(routes!(wait::wait_vm))
        .routes(routes!(lists::goals, tasks::add_goal))
        .routes(routes!(tasks::show_goal))
        .routes(routes!(tasks::list))
        .routes(routes!(tasks::show))
        .routes(routes!(tasks::output))
        .routes(routes!(trust::list, trust::apply))
        .routes(routes!(trust::forget))
        .routes(routes!(tasks::events))
        .routes(routes!(host_events::follow))
        .routes(routes!(blobs::show, blobs::put))
        .routes(routes!(blobs::send))
        .routes(routes!(blobs::order))
        .routes(routes!(exec::exec))
        .routes(routes!(files::files))
        .routes(routes!(access::check))
        .routes(routes!(access::grants))
        .routes(routes!(config))
        .routes(routes!(reload))
        .routes(routes!(shutdown))
}

/// Carries on with a request that changes something where whoever made it has gone: the server drops a handler together
/// with its connection, and half of a change would stay.
async fn to_its_end(request: Request, next: Next) -> Response {
    if request.method().is_safe() {
        return next.run(request).await;
    }
    match tokio::spawn(next.run(request)).await {
        Ok(response) => response,
        Err(e) => ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", e).into_response(),
    }
}

/// Gives a refusal of the framework (a query that makes no sense, a method that there is not) the shape of all others.
async fn in_our_shape(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let status = response.status();
    let kind = response.headers().get(header::CONTENT_TYPE);
    if status.as_u16() < 400 || kind.is_some_and(|kind| kind == "application/json") {
        return response;
    }
    let (mut head, body) = response.into_parts();
    let body = axum::body::to_bytes(body, BODY_MAX).await;
    let said = body.map(|said| String::from_utf8_lossy(&said).into_owned());
    let message = match said {
        Ok(said) if !said.is_empty() => adit_tasks::plain(&said),
        _ => status.canonical_reason().unwrap_or_default().to_owned(),
    };
    // Such as `allow`, but not what was said of the body.
    head.headers.remove(header::CONTENT_TYPE);
    head.headers.remove(header::CONTENT_LENGTH);
    (head.headers, ApiError::new(status, "usage", message)).into_response()
}

/// What may also be had over TCP.
pub fn observe(state: App) -> Router<App> {
    let (router, _) = observed().split_for_parts();
    router.fallback(no_such_path).with_state(state)
}

fn observed() -> OpenApiRouter<App> {
    // The others refuse nothing by themselves.
    let discovery = OpenApiRouter::new()
        .routes(routes!(discovery::targets))
        .layer(middleware::from_fn(in_our_shape));
    OpenApiRouter::new()
        .routes(routes!(metrics))
        .routes(routes!(healthz))
        .routes(routes!(readyz))
        .merge(discovery)
}

/// A failed request.
pub struct ApiError(StatusCode, ErrorBody);

impl ApiError {
    fn new(status: StatusCode, code: &str, message: impl ToString) -> Self {
        Self(
            status,
            ErrorBody {
                code: code.into(),
                message: message.to_string(),
                help: String::new(),
            },
        )
    }

    fn help(mut self, help: &str) -> Self {
        self.1.help = help.into();
        self
    }

    /// Whether it is of this kind.
    fn is(&self, code: &str) -> bool {
        self.1.code == code
    }

    fn unknown_vm(name: &str) -> Self {
        let name = adit_names::escape(name).at_most(80);
        Self::new(
            StatusCode::NOT_FOUND,
            "unknown-vm",
            format!("no VM is named `{name}`"),
        )
        .help("`adit vm ls` lists the names")
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.0, Json(self.1)).into_response();
        if self.0 == StatusCode::UNAUTHORIZED {
            let (name, value) = asks::CHALLENGE;
            response.headers_mut().insert(name, value);
        }
        response
    }
}

impl From<DeskError> for ApiError {
    fn from(e: DeskError) -> Self {
        use StatusCode as S;
        match &e {
            DeskError::GoalTaken { .. } => Self::new(S::CONFLICT, "goal-taken", e),
            DeskError::GoalExpired { .. } => Self::new(S::UNPROCESSABLE_ENTITY, "expired", e)
                .help("sign it again: its time begins when it is signed"),
            DeskError::Full { .. } => Self::new(S::TOO_MANY_REQUESTS, "queue-full", e)
                .help("wait until its tasks are done (`adit task ls --vm …`), or raise [limits] queued_per_vm"),
            DeskError::Unknown => Self::new(S::NOT_FOUND, "unknown-task", e).help("`adit task ls` lists them"),
            DeskError::UnknownGoal => Self::new(S::NOT_FOUND, "unknown-goal", e).help("`adit goal ls` lists them"),
            DeskError::TrustOld { .. } | DeskError::TrustTaken { .. } => Self::new(S::CONFLICT, "trust-old", e)
                .help("sign the next one with `adit trust change`; `adit trust ls` shows what is kept, `adit trust rm` forgets it here"),
            DeskError::TrustFull => Self::new(S::TOO_MANY_REQUESTS, "trust-full", e)
                .help("forget those of signers that are no longer used: `adit trust rm`"),
            DeskError::UnknownTrust => Self::new(S::NOT_FOUND, "unknown-trust", e).help("`adit trust ls` lists them"),
            DeskError::NotLeased => Self::new(S::CONFLICT, "not-leased", e),
            DeskError::Db(db) => {
                tracing::error!(error = %db, "the database refused a request");
                Self::new(S::INSUFFICIENT_STORAGE, "database", e)
                    .help("nothing was accepted: check the disk of state_dir for space and errors, then try again")
            }
        }
    }
}

impl From<BlobError> for ApiError {
    fn from(e: BlobError) -> Self {
        use StatusCode as S;
        let (status, code, help) = match &e {
            BlobError::TooLarge { .. } => (S::PAYLOAD_TOO_LARGE, "too-large", ""),
            BlobError::NoSpace { .. } => (
                S::INSUFFICIENT_STORAGE,
                "no-space",
                "make room on the disk of aditd's state_dir, then try again: what came is kept where it can be",
            ),
            BlobError::Busy => (S::CONFLICT, "busy", "try again when that one has ended"),
            BlobError::Mismatch(_) => (
                S::UNPROCESSABLE_ENTITY,
                "mismatch",
                "the file has changed meanwhile: begin anew",
            ),
            BlobError::Unknown(_) => (S::NOT_FOUND, "unknown-blob", "PUT it there first"),
            BlobError::Io(_) => (
                S::INSUFFICIENT_STORAGE,
                "disk",
                "check the disk of aditd's state_dir",
            ),
        };
        Self::new(status, code, e).help(help)
    }
}

/// A guest that was reached for an operator, and what it says.
impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        use StatusCode as S;
        let code = refusal.code();
        let help = remedy::of(code);
        let status = match code {
            Code::NotAllowed | Code::Denied => S::FORBIDDEN,
            Code::UnknownService => {
                return Self::new(S::FORBIDDEN, "old-agent", refusal.text()).help(help);
            }
            Code::Locked
            | Code::NoPortProcess
            | Code::NoSession
            | Code::NoAgent
            | Code::SilentHost
            | Code::Busy => S::SERVICE_UNAVAILABLE,
            Code::TooLarge => S::PAYLOAD_TOO_LARGE,
            Code::NoSpace => S::INSUFFICIENT_STORAGE,
            _ => S::BAD_GATEWAY,
        };
        Self::new(status, &code.to_string(), refusal.text()).help(help)
    }
}

impl From<AddError> for ApiError {
    fn from(e: AddError) -> Self {
        let help = match e {
            AddError::Full => "remove one that is no longer needed: `adit vm rm`",
            AddError::HostHasIt(_) => {
                "give it another name, or the host: `[names] host` and `[[host]] name` in aditd.toml"
            }
            AddError::SocketTaken { .. } => {
                "each VM has its own VMM, and that its own socket: `adit vm show` says which one a VM has"
            }
            _ => "`adit vm ls` shows which names and CIDs are taken",
        };
        Self::new(StatusCode::CONFLICT, "taken", e).help(help)
    }
}

impl From<NotAdded> for ApiError {
    fn from(e: NotAdded) -> Self {
        match e {
            NotAdded::Refused(e) => e.into(),
            NotAdded::NotKept(e) => e.into(),
        }
    }
}

fn find(state: &State, name: &str) -> Result<Arc<VmEntry>, ApiError> {
    let id: Option<VmId> = name.parse().ok();
    id.and_then(|id| state.registry.get(&id))
        .ok_or_else(|| ApiError::unknown_vm(name))
}

/// A permit to wait for something. There are fewer than connections, so that waiters do not keep the operator out.
fn patient(state: &State, asks: &Asks) -> Result<OwnedSemaphorePermit, ApiError> {
    let patient = match asks.is_owner() {
        true => &state.patient,
        false if asks.is_by_way_of_host() => &state.peers.watches,
        false => &state.patient_others,
    };
    patient.clone().try_acquire_owned().map_err(|_| {
        let message = "too many requests are waiting already";
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "busy", message).help(
            "end some of `adit wait` and `adit task watch`, or raise aditd's limit of open files",
        )
    })
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct ShutdownQuery {
    #[serde(default)]
    ports: bool,
}

/// Stops aditd.
#[utoipa::path(
    post,
    path = "/v1/shutdown",
    params(ShutdownQuery),
    responses((status = 202, description = "It ends"))
)]
async fn shutdown(Shared(state): Shared<App>, Query(q): Query<ShutdownQuery>) -> StatusCode {
    if q.ports {
        let mut vms = state.registry.all();
        // A VMM goes on with its VM, and serves the next aditd.
        vms.retain(|vm| vm.channel.held_by().is_none());
        for vm in &vms {
            vm.removed.cancel();
        }
        // Each supervisor passes the word on, all at the same time.
        for vm in &vms {
            port_gone(vm).await;
        }
    }
    state.stop.cancel();
    StatusCode::ACCEPTED
}

/// What became of the configuration file.
#[utoipa::path(
    get,
    path = "/v1/config",
    responses((status = 200, body = ConfigStatus, description = "Of the last time that it was read"))
)]
async fn config(Shared(state): Shared<App>) -> Json<ConfigStatus> {
    Json(status(&state, state.reloads.show()))
}

/// With what else a host may lack.
fn status(state: &State, shown: ConfigStatus) -> ConfigStatus {
    let users_unknown = state.callers.unknown_users().map(str::to_owned);
    let discover = state.found.show(state);
    ConfigStatus {
        users_unknown,
        discover,
        ..shown
    }
}

/// Has the configuration read again, and waits for what becomes of it.
#[utoipa::path(
    post,
    path = "/v1/reload",
    responses(
        (status = 200, body = ConfigStatus, description = "It is applied, or refused"),
        (status = 503, body = ErrorBody, description = "There is no monitor"),
        (status = 504, body = ErrorBody, description = "It takes longer")
    )
)]
async fn reload(Shared(state): Shared<App>) -> Answer<ConfigStatus> {
    let before = state.reloads.show();
    let told = state.monitor.reread().await;
    told.map_err(|e| {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "no-monitor", e)
            .help("`systemctl start aditd` starts it again; what is there goes on")
    })?;
    let read = state.reloads.read_after(&before);
    match tokio::time::timeout(RELOAD_LIMIT, read).await {
        Ok(shown) => Ok(Json(status(&state, shown))),
        Err(_) => {
            let message =
                format!("the configuration was not read and applied within {RELOAD_LIMIT:?}");
            let late = ApiError::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message);
            Err(late.help("it goes on: `adit config` says when it is done"))
        }
    }
}

/// Metrics, in the OpenMetrics text format.
#[utoipa::path(
    get,
    path = "/metrics",
    responses((status = 200, body = String, content_type = "application/openmetrics-text", description = "All of them"))
)]
async fn metrics(Shared(state): Shared<App>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([("content-type", kind)], state.metrics.render(&state)).into_response()
}

/// Whether aditd runs.
#[utoipa::path(
    get,
    path = "/healthz",
    responses((status = 200, body = String, content_type = "text/plain", description = "It does"))
)]
async fn healthz() -> &'static str {
    "ok\n"
}

/// Whether every VM has a port process.
#[utoipa::path(
    get,
    path = "/readyz",
    responses((status = 200, body = String, content_type = "text/plain", description = "Every VM has a port process"), (status = 503, body = String, content_type = "text/plain", description = "Those that have none"))
)]
async fn readyz(Shared(state): Shared<App>) -> Response {
    let down: Vec<String> = state
        .registry
        .all()
        .iter()
        .filter(|vm| vm.channel.link().is_none())
        .map(|vm| vm.name.to_string())
        .collect();
    if down.is_empty() {
        return "ready\n".into_response();
    }
    (
        StatusCode::SERVICE_UNAVAILABLE,
        format!("no port process: {}\n", down.join(", ")),
    )
        .into_response()
}

/// Reads a body, which is an object: serde would take an array of the values, too.
fn parse<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let bad = |message: &str| ApiError::new(StatusCode::BAD_REQUEST, "bad-json", message);
    if !body.trim_ascii_start().starts_with(b"{") {
        return Err(bad("the body is no object of JSON"));
    }
    serde_json::from_slice(body).map_err(|e| bad(&adit_tasks::plain(&e.to_string())))
}
