//! The JSON API on the Unix socket; `adit_api` lists the endpoints and has the types.

mod lists;
mod wait;

use std::sync::Arc;
use std::time::Duration;

use adit_api::{ErrorBody, Goal, NewGoal, NewVm, Task, TaskEvent, TaskState, Vm};
use adit_tasks::wire::TaskId;
use adit_tasks::{VmId, dsse, hex, unhex};
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path, Query, State as Shared};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::broadcast::error::RecvError;

use crate::config::VmConfig;
use crate::queue::page::{self, Filter, PAGE_MAX, Page};
use crate::queue::{self, QueueError};
use crate::registry::{AddError, VmEntry};
use crate::state::State;

/// Most bytes of a request's body: an envelope inside JSON.
pub const BODY_MAX: usize = 2 * dsse::ENVELOPE_MAX + 4096;
/// How long a port process that was told to end may take.
const PORT_END_LIMIT: Duration = Duration::from_secs(5);

/// How long it may take until a new port process serves in place of another.
const RELOAD_LIMIT: Duration = Duration::from_secs(10);
/// How long a port process may take until it has made place.
const RELEASE_LIMIT: Duration = Duration::from_secs(3);

type App = Arc<State>;
type Answer<T> = Result<Json<T>, ApiError>;

/// All endpoints.
pub fn router(state: App) -> Router {
    Router::new()
        .route("/v1/vms", get(list_vms).post(add_vm))
        .route("/v1/vms/{name}", get(show_vm).delete(remove_vm))
        .route("/v1/vms/{name}/reload", post(reload_vm))
        .route("/v1/vms/{name}/wait", get(wait::wait_vm))
        .route("/v1/goals", get(lists::goals).post(add_goal))
        .route("/v1/goals/{id}", get(show_goal))
        .route("/v1/tasks", get(list_tasks))
        .route("/v1/tasks/{id}", get(show_task))
        .route("/v1/tasks/{id}/output", get(task_output))
        .route("/v1/events", get(events))
        .route("/v1/shutdown", post(shutdown))
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .merge(observe(state.clone()))
        .fallback(|| async {
            ApiError::new(
                StatusCode::NOT_FOUND,
                "unknown-path",
                "there is no such path",
            )
        })
        .with_state(state)
}

/// What may also be had over TCP.
pub fn observe(state: App) -> Router<App> {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .with_state(state)
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

    fn unknown_vm(name: &str) -> Self {
        let name: String = name.chars().take(80).collect();
        Self::new(
            StatusCode::NOT_FOUND,
            "unknown-vm",
            format!("no VM is named `{}`", name.escape_debug()),
        )
        .help("`adit vm ls` lists the names")
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.0, Json(self.1)).into_response()
    }
}

impl From<QueueError> for ApiError {
    fn from(e: QueueError) -> Self {
        use StatusCode as S;
        match &e {
            QueueError::GoalTaken { .. } => Self::new(S::CONFLICT, "goal-taken", e),
            QueueError::GoalExpired { .. } => Self::new(S::UNPROCESSABLE_ENTITY, "expired", e)
                .help("sign it again: its time begins when it is signed"),
            QueueError::Full { .. } => Self::new(S::TOO_MANY_REQUESTS, "queue-full", e)
                .help("wait until its tasks are done (`adit task ls --vm …`), or raise [limits] queued_per_vm"),
            QueueError::Unknown => Self::new(S::NOT_FOUND, "unknown-task", e).help("`adit task ls` lists them"),
            QueueError::UnknownGoal => Self::new(S::NOT_FOUND, "unknown-goal", e).help("`adit goal ls` lists them"),
            QueueError::NotLeased => Self::new(S::CONFLICT, "not-leased", e),
            QueueError::Db(db) => {
                tracing::error!(error = %db, "database");
                Self::new(S::INSUFFICIENT_STORAGE, "database", e)
                    .help("nothing was accepted: check the disk of state_dir for space and errors, then try again")
            }
        }
    }
}

// ---- VMs

fn find(state: &State, name: &str) -> Result<Arc<VmEntry>, ApiError> {
    let id: Option<VmId> = name.parse().ok();
    id.and_then(|id| state.registry.get(&id))
        .ok_or_else(|| ApiError::unknown_vm(name))
}

async fn list_vms(Shared(state): Shared<App>) -> Json<Vec<Vm>> {
    Json(state.registry.all().iter().map(|vm| vm.show()).collect())
}

async fn show_vm(Shared(state): Shared<App>, Path(name): Path<String>) -> Answer<Vm> {
    Ok(Json(find(&state, &name)?.show()))
}

async fn add_vm(Shared(state): Shared<App>, body: Bytes) -> Answer<Vm> {
    let new: NewVm = parse(&body)?;
    let bad = |key: &str, why: String| {
        ApiError::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "bad-vm",
            format!("`{key}`: {why}"),
        )
    };
    let name: VmId = new
        .name
        .parse()
        .map_err(|e: adit_tasks::VmIdError| bad("name", e.to_string()))?;
    let config = VmConfig {
        name,
        cid: new.cid,
        allow: new.allow,
        allow_vsock: new.allow_vsock,
        busy_poll_us: 0,
        ivshmem_mib: crate::config::default_ivshmem_mib(),
        allow_any_memory: false,
    };
    config
        .check()
        .and_then(|()| state.config.check_paths(&config.name))
        .map_err(|(key, why)| bad(key, why))?;
    let vm = crate::add_vm(&state, config.clone(), true).await?;
    Ok(Json(vm.show()))
}

impl From<AddError> for ApiError {
    fn from(e: AddError) -> Self {
        let help = match e {
            AddError::Full => "",
            _ => "`adit vm ls` shows which names and CIDs are taken",
        };
        Self::new(StatusCode::CONFLICT, "taken", e).help(help)
    }
}

/// What an operator must not do to a VM by mistake while its VMM holds it.
fn held(vm: &VmEntry, what: &str, help: &str) -> Result<(), ApiError> {
    let Some(pid) = vm.held_by() else {
        return Ok(());
    };
    let message = format!(
        "`{}` runs in process {pid}, its VMM, which has its device: {what}",
        vm.config.name
    );
    Err(ApiError::new(StatusCode::CONFLICT, "held", message).help(help))
}

#[derive(Deserialize)]
struct RemoveQuery {
    #[serde(default)]
    force: bool,
}

async fn remove_vm(
    Shared(state): Shared<App>,
    Path(name): Path<String>,
    Query(q): Query<RemoveQuery>,
) -> Result<StatusCode, ApiError> {
    let vm = find(&state, &name)?;
    if state.config.vm.iter().any(|v| v.name == vm.config.name) {
        return Err(ApiError::new(
            StatusCode::CONFLICT,
            "configured",
            format!("`{name}` stands in aditd.toml"),
        )
        .help("take it out there and restart aditd"));
    }
    if !q.force {
        held(
            &vm,
            "removed, it would run on without a channel",
            "end the VM, which takes it off the map; `adit vm rm --force` removes it all the same",
        )?;
    }
    vm.removed.cancel();
    port_gone(&vm).await;
    let (key, now) = (vm.config.name.to_string(), state.now_ms());
    let ended = state
        .db
        .run::<_, QueueError, _>(move |c| {
            c.execute("DELETE FROM vms WHERE name = ?1", [&key])?;
            queue::remove_vm(c, &key, now)
        })
        .await?;
    state.count_ended(&ended);
    state.publish(ended);
    // Only now is the name free: whoever takes it gets a port process of its own.
    state.registry.remove(&vm.config.name);
    Ok(StatusCode::NO_CONTENT)
}

/// Waits until a removed VM's supervisor has told its port process to end and that has gone.
async fn port_gone(vm: &VmEntry) {
    let mut changes = vm.watch();
    let gone = async { while !vm.unsupervised() && changes.changed().await.is_ok() {} };
    if tokio::time::timeout(PORT_END_LIMIT, gone).await.is_err() {
        tracing::warn!(vm = %vm.config.name, "its port process does not end");
    }
}

/// Replaces the port process under a running VM.
async fn reload_vm(Shared(state): Shared<App>, Path(name): Path<String>) -> Answer<Vm> {
    let vm = find(&state, &name)?;
    held(
        &vm,
        "there is no port process that another could replace",
        "a new build of it serves once the VM is ended and started again, or restored from a snapshot",
    )?;
    let running = vm
        .link()
        .and_then(|l| Some((l.status()?, vm.process()?, l)));
    let Some((status, process, link)) = running else {
        let message = format!("`{name}` has no port process now: one is being started");
        return Err(ApiError::new(StatusCode::CONFLICT, "down", message)
            .help("`adit vm show` says why, if it does not come"));
    };
    let pid = process.pid();
    if status.session && !vm.keeper.has_frontend() {
        let message = format!(
            "port process {pid} of `{name}` has handed nothing over that a new one could go on with"
        );
        return Err(ApiError::new(StatusCode::CONFLICT, "not-kept", message)
            .help("power-cycle the VM after you have ended that process: the new build is started then"));
    }
    let mut changes = vm.watch();
    let replaced = async {
        // One that does not hear it is ended all the same: what the next one needs is here.
        let _ = tokio::time::timeout(RELEASE_LIMIT, link.release()).await;
        process.end_within(RELEASE_LIMIT).await;
        loop {
            let now = vm.link().and_then(|l| l.status());
            let another = vm.port_pid().is_some_and(|now| now != pid);
            if now.is_some_and(|now| another && now.session >= status.session)
                || vm.stuck().is_some()
                || changes.changed().await.is_err()
            {
                return;
            }
        }
    };
    if tokio::time::timeout(RELOAD_LIMIT, replaced).await.is_err() {
        let message = format!("`{name}`: no new port process serves after {RELOAD_LIMIT:?}");
        return Err(
            ApiError::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message)
                .help("`adit vm show` and RUN/vm/NAME/port.log say why"),
        );
    }
    Ok(Json(vm.show()))
}

/// Those who wait are not all who may ask: the operator gets through.
fn patient(state: &State) -> Result<OwnedSemaphorePermit, ApiError> {
    state.patient.clone().try_acquire_owned().map_err(|_| {
        let message = "too many requests wait for something to happen already";
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "busy", message)
            .help("end some of `adit wait` and `adit task watch`, or raise the limit of open files of aditd")
    })
}

// ---- goals and tasks

async fn add_goal(Shared(state): Shared<App>, body: Bytes) -> Answer<Goal> {
    let new: NewGoal = parse(&body)?;
    let bad = |e: &dyn std::fmt::Display| {
        ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "bad-goal", e.to_string())
    };
    let envelope = dsse::Envelope::parse(new.envelope.as_bytes()).map_err(|e| bad(&e))?;
    let goal =
        adit_tasks::Goal::parse_unverified(envelope.unverified_payload()).map_err(|e| bad(&e))?;
    let vms = targets(&state, &new, &goal)?;
    let (goal_id, digest) = (goal.goal_id.to_string(), envelope.digest());
    let new = queue::NewGoal {
        goal,
        digest,
        signer: queue::schema::signer(&envelope),
        envelope: new.envelope.into_bytes(),
        vms: vms.iter().map(|vm| vm.config.name.clone()).collect(),
        now_ms: state.now_ms(),
        max_queued: state.config.limits.queued_per_vm,
    };
    let (tasks, accepted_ms) = state
        .db
        .run::<_, QueueError, _>(move |c| {
            let tasks = queue::add_goal(c, &new)?;
            Ok((tasks, queue::goal(c, &new.goal.goal_id.to_string())?.1))
        })
        .await?;
    state.publish(tasks.clone());
    state.expiry.notify_one();
    for vm in vms {
        state.refresh_open_tasks(&vm).await;
        vm.queued.notify_waiters();
    }
    Ok(Json(Goal {
        goal_id,
        digest: hex(&digest),
        accepted_at: queue::rfc3339(accepted_ms),
        tasks,
    }))
}

/// The VMs that a goal is queued for: of its audience, unless the caller insists.
fn targets(
    state: &State,
    new: &NewGoal,
    goal: &adit_tasks::Goal,
) -> Result<Vec<Arc<VmEntry>>, ApiError> {
    let mut vms = Vec::new();
    if new.to.is_empty() {
        for id in &goal.audience.vms {
            vms.push(find(state, id.as_str())?);
        }
        return Ok(vms);
    }
    for name in &new.to {
        let vm = find(state, name)?;
        if !goal.audience.vms.contains(&vm.config.name) && !new.relay_unchecked {
            let message =
                format!("the goal is not for `{name}`: its signed audience does not name it");
            return Err(ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "wrong-audience", message)
                .help("sign it again with that VM in --to; --relay-unchecked queues it anyway, and the guest refuses it"));
        }
        vms.push(vm);
    }
    Ok(vms)
}

async fn show_goal(Shared(state): Shared<App>, Path(id): Path<String>) -> Answer<Goal> {
    let goal_id = id.clone();
    let ((digest, accepted_ms), tasks) = state
        .db
        .run::<_, QueueError, _>(move |c| Ok((queue::goal(c, &id)?, queue::of_goal(c, &id)?)))
        .await?;
    Ok(Json(Goal {
        goal_id,
        digest: hex(&digest),
        accepted_at: queue::rfc3339(accepted_ms),
        tasks,
    }))
}

#[derive(Deserialize)]
struct TaskQuery {
    vm: Option<String>,
    goal: Option<String>,
    state: Option<String>,
    id: Option<String>,
    limit: Option<usize>,
    #[serde(default)]
    after: i64,
    newest: Option<usize>,
    before: Option<i64>,
}

async fn list_tasks(
    Shared(state): Shared<App>,
    Query(q): Query<TaskQuery>,
) -> Result<Response, ApiError> {
    let id = match q.id {
        Some(digits) => Some(page::id_range(&digits).ok_or_else(bad_id)?),
        None => None,
    };
    let filter = Filter {
        vm: q.vm,
        goal: q.goal,
        state: q.state,
        id,
        open: false,
    };
    lists::check_state(&filter)?;
    if let Some(limit) = q.newest {
        return lists::newest_tasks(&state, filter, q.before, limit).await;
    }
    let (tasks, next) = page_of(&state, &filter, q.after, q.limit.unwrap_or(PAGE_MAX)).await?;
    if tasks.is_empty() {
        lists::check_names(&state, &filter).await?;
    }
    if q.limit.is_some() || next.is_none() {
        let mut response = Json(tasks).into_response();
        if let Some(next) = next {
            response.headers_mut().insert(adit_api::NEXT, next.into());
        }
        return Ok(response);
    }
    // All of them: as they are read, so that a long list is never in memory as a whole.
    let first = Some((tasks, next, true));
    let pages = futures_util::stream::unfold((state, filter, first), |(state, filter, at)| async {
        let (tasks, next, is_first) = at?;
        let text = array_part(&tasks, is_first, next.is_none());
        let at = match next {
            None => Ok(None),
            Some(after) => page_of(&state, &filter, after, PAGE_MAX)
                .await
                .map(|(tasks, next)| Some((tasks, next, false)))
                // The answer is cut off: whoever reads it finds no end of the array.
                .map_err(|_| std::io::Error::other("the database says no")),
        };
        match at {
            Ok(at) => Some((Ok(text), (state, filter, at))),
            Err(e) => Some((Err(e), (state, filter, None))),
        }
    });
    let body = Body::from_stream(pages);
    Ok(([("content-type", "application/json")], body).into_response())
}

async fn page_of(
    state: &State,
    filter: &Filter,
    after: i64,
    limit: usize,
) -> Result<Page, QueueError> {
    let filter = filter.clone();
    state
        .db
        .run(move |c| page::page(c, &filter, after, limit))
        .await
}

/// Some elements of a JSON array.
fn array_part(tasks: &[Task], first: bool, last: bool) -> Bytes {
    let mut text = Vec::from(if first { &b"["[..] } else { b"" });
    for (at, task) in tasks.iter().enumerate() {
        // A page may be empty: what was on it has changed meanwhile.
        if at > 0 || !first {
            text.push(b',');
        }
        // Strings and numbers always serialise.
        text.extend(serde_json::to_vec(task).unwrap_or_default());
    }
    if last {
        text.push(b']');
    }
    text.into()
}

fn bad_id() -> ApiError {
    ApiError::new(
        StatusCode::NOT_FOUND,
        "unknown-task",
        "a task id is 32 hex digits",
    )
}

fn task_id(text: &str) -> Result<TaskId, ApiError> {
    unhex(text).ok_or_else(bad_id)
}

async fn show_task(Shared(state): Shared<App>, Path(id): Path<String>) -> Answer<Task> {
    let id = task_id(&id)?;
    Ok(Json(state.db.run(move |c| queue::task(c, &id)).await?))
}

#[derive(Deserialize)]
struct OutputQuery {
    #[serde(default)]
    stream: Option<String>,
}

async fn task_output(
    Shared(state): Shared<App>,
    Path(id): Path<String>,
    Query(q): Query<OutputQuery>,
) -> Result<Response, ApiError> {
    let id = task_id(&id)?;
    let stderr = match q.stream.as_deref() {
        None | Some("stdout") => false,
        Some("stderr") => true,
        Some(_) => {
            return Err(ApiError::new(
                StatusCode::BAD_REQUEST,
                "usage",
                "`stream` is `stdout` or `stderr`",
            ));
        }
    };
    let out = state.db.run(move |c| queue::output(c, &id, stderr)).await?;
    let kept = (out.head.len() + out.tail.len()) as u64;
    let missing = out.total.saturating_sub(kept);
    let mut head = HeaderMap::new();
    let mut bytes = out.head;
    if missing > 0 {
        if let Ok(value) = format!("{} {missing}", bytes.len()).parse() {
            head.insert(adit_api::LEFT_OUT, value);
        }
        bytes.extend_from_slice(adit_api::left_out(missing).as_bytes());
    }
    bytes.extend_from_slice(&out.tail);
    Ok((head, bytes).into_response())
}

#[derive(Deserialize)]
struct EventQuery {
    goal: Option<String>,
}

/// Present state first, then changes, until nothing that was asked for can change any more. A stream that ends for another
/// reason is cut off, so that nobody takes its end for the end of the tasks.
async fn events(
    Shared(state): Shared<App>,
    Query(q): Query<EventQuery>,
) -> Result<Response, ApiError> {
    let patient = patient(&state)?;
    // Before the query, so that no change falls in between.
    let mut changes = state.subscribe();
    let goal = q.goal;
    let filter = Filter {
        open: goal.is_none(),
        goal: goal.clone(),
        ..Filter::default()
    };
    let mut present = page_of(&state, &filter, 0, PAGE_MAX).await?;
    if present.0.is_empty() {
        lists::check_names(&state, &filter).await?;
    }
    let (to, from) = tokio::sync::mpsc::channel::<std::io::Result<Bytes>>(64);
    let cut_off = |why: &str| Err(std::io::Error::other(why.to_owned()));
    tokio::spawn(async move {
        let _patient = patient;
        let mut open = std::collections::HashMap::new();
        loop {
            let (tasks, next) = present;
            for task in tasks {
                track(&mut open, &task);
                if to.send(Ok(line(&state.event(task)))).await.is_err() {
                    return;
                }
            }
            let Some(after) = next else { break };
            present = match page_of(&state, &filter, after, PAGE_MAX).await {
                Ok(page) => page,
                Err(_) => {
                    let _ = to.send(cut_off("the database says no")).await;
                    return;
                }
            };
        }
        while !open.is_empty() {
            let event = tokio::select! {
                event = changes.recv() => event,
                () = to.closed() => return,
                () = state.stop.cancelled() => {
                    let _ = to.send(cut_off("aditd ends")).await;
                    return;
                }
            };
            match event {
                Ok(event) if goal.as_ref().is_none_or(|g| *g == event.task.goal_id) => {
                    track(&mut open, &event.task);
                    if to.send(Ok(line(&event))).await.is_err() {
                        return;
                    }
                }
                Ok(_) => {}
                // It read too slowly, and must ask again.
                Err(RecvError::Lagged(_) | RecvError::Closed) => {
                    let _ = to.send(cut_off("too far behind")).await;
                    return;
                }
            }
        }
    });
    let body = Body::from_stream(futures_util::stream::unfold(from, |mut from| async {
        from.recv().await.map(|item| (item, from))
    }));
    Ok(([("content-type", "application/x-ndjson")], body).into_response())
}

fn track(open: &mut std::collections::HashMap<String, TaskState>, task: &Task) {
    if task.state.is_terminal() {
        open.remove(&task.task_id);
    } else {
        open.insert(task.task_id.clone(), task.state);
    }
}

fn line(event: &TaskEvent) -> Bytes {
    let mut text = serde_json::to_vec(event).unwrap_or_default();
    text.push(b'\n');
    text.into()
}

// ---- the process

#[derive(Deserialize)]
struct ShutdownQuery {
    #[serde(default)]
    ports: bool,
}

async fn shutdown(Shared(state): Shared<App>, Query(q): Query<ShutdownQuery>) -> StatusCode {
    if q.ports {
        let mut vms = state.registry.all();
        // A VMM goes on with its VM, and serves the next aditd.
        vms.retain(|vm| vm.held_by().is_none());
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

async fn metrics(Shared(state): Shared<App>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    (
        [("content-type", kind)],
        state.metrics.render(&state.registry),
    )
        .into_response()
}

async fn readyz(Shared(state): Shared<App>) -> Response {
    let down: Vec<String> = state
        .registry
        .all()
        .iter()
        .filter(|vm| vm.link().is_none())
        .map(|vm| vm.config.name.to_string())
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

fn parse<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|e| ApiError::new(StatusCode::BAD_REQUEST, "bad-json", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_in_parts_is_one_array_also_where_a_page_is_empty() {
        let parts = [
            array_part(&[], true, false),
            array_part(&[], false, false),
            array_part(&[], false, true),
        ];
        let value: serde_json::Value = serde_json::from_slice(&parts.concat()).unwrap();
        assert_eq!(value, serde_json::json!([]));
    }
}
