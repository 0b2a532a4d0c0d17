//! What the API is asked of goals and tasks.

use std::sync::Arc;

use adit_api::{Goal, NewGoal, Task, TaskEvent, TaskState};
use adit_tasks::wire::TaskId;
use adit_tasks::{dsse, hex, unhex};
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State as Shared};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use tokio::sync::broadcast::error::RecvError;
use utoipa::IntoParams;

use super::{Answer, ApiError, App, Asks, elsewhere, lists, parse, patient};
use crate::access::Verb;
use crate::desk::store::page::{self, Filter, PAGE_MAX};
use crate::desk::{self, DeskError, rfc3339};
use crate::state::State;

/// Takes a signed goal.
#[utoipa::path(
    post,
    path = "/v1/goals",
    request_body = NewGoal,
    responses((status = 200, body = Goal, description = "It is on disk"))
)]
pub(super) async fn add_goal(Shared(state): Shared<App>, asks: Asks, body: Bytes) -> Answer<Goal> {
    let new: NewGoal = parse(&body)?;
    let bad = |e: &dyn std::fmt::Display| {
        ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "bad-goal", e.to_string())
    };
    let envelope = dsse::Envelope::parse(new.envelope.as_bytes()).map_err(|e| bad(&e))?;
    let goal =
        adit_tasks::Goal::parse_unverified(envelope.unverified_payload()).map_err(|e| bad(&e))?;
    let places = elsewhere::places(&state, &asks, &new, &goal).await?;
    let (goal_id, digest) = (goal.goal_id.to_string(), envelope.digest());
    let taken = elsewhere::give(&state, &asks, &places, &new, (&goal_id, &digest)).await?;
    let own = match places.is_elsewhere() {
        true => None,
        false => {
            let new = desk::NewGoal {
                goal,
                digest,
                signer: desk::store::migrations::signer(&envelope),
                envelope: new.envelope.into_bytes(),
                vms: places.here.iter().map(|vm| vm.name.clone()).collect(),
            };
            let accepted = state.desk.add_goal(new).await;
            let mut accepted = accepted.map_err(|e| taken.and_then(e.into()))?;
            // To apply goals is not to see tasks: it may be here already, and have run.
            accepted
                .tasks
                .retain(|task| asks.sees(&state, Verb::Task, &task.vm));
            Some(show_accepted(goal_id, &digest, accepted))
        }
    };
    let merged = elsewhere::merged(&state, own, taken.goals, vec![]);
    // It is queued somewhere, or was refused.
    merged
        .map(Json)
        .ok_or_else(|| DeskError::UnknownGoal.into())
}

fn show_accepted(goal_id: String, digest: &[u8; 32], accepted: desk::Accepted) -> Goal {
    Goal {
        goal_id,
        digest: hex(digest),
        accepted_at: rfc3339(accepted.accepted_ms),
        tasks: accepted.tasks,
        silent: vec![],
    }
}

/// Shows a goal.
#[utoipa::path(
    get,
    path = "/v1/goals/{id}",
    params(("id" = String, Path, description = "Id of the goal")),
    responses((status = 200, body = Goal, description = "As it is now"))
)]
pub(super) async fn show_goal(
    Shared(state): Shared<App>,
    asks: Asks,
    Path(id): Path<String>,
) -> Answer<Goal> {
    let own = match own_goal(&state, &asks, &id).await {
        Ok(own) => Some(own),
        Err(DeskError::UnknownGoal) => None,
        Err(e) => return Err(e.into()),
    };
    let digest = own.as_ref().map(|(digest, _)| digest);
    let (others, silent) = elsewhere::goal(&state, &asks, &id, digest).await;
    if own.is_none() && others.is_empty() {
        let unknown = DeskError::UnknownGoal.into();
        return Err(elsewhere::unknown_goal(&state, unknown, &silent));
    }
    let own = own.map(|(digest, accepted)| show_accepted(id, &digest, accepted));
    let merged = elsewhere::merged(&state, own, others, silent);
    merged
        .map(Json)
        .ok_or_else(|| DeskError::UnknownGoal.into())
}

/// What this host has of a goal, as far as the caller may see it.
async fn own_goal(
    state: &State,
    asks: &Asks,
    id: &str,
) -> Result<([u8; 32], desk::Accepted), DeskError> {
    let (digest, mut accepted) = state.desk.goal(id.to_owned()).await?;
    if !asks.is_owner() {
        let tasks = &mut accepted.tasks;
        tasks.retain(|task| asks.sees(state, Verb::Task, &task.vm));
        if tasks.is_empty() {
            return Err(DeskError::UnknownGoal);
        }
    }
    Ok((digest, accepted))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct TaskQuery {
    vm: Option<String>,
    goal: Option<String>,
    #[param(inline, value_type = Option<TaskState>)]
    state: Option<String>,
    /// First digits of the task's id.
    #[param(pattern = "^[0-9a-f]{0,32}$")]
    id: Option<String>,
    /// At most so many, and at most 500.
    limit: Option<usize>,
    /// Cursor of the page.
    #[serde(default)]
    after: i64,
    /// So many of the newest, in place of `limit`.
    newest: Option<usize>,
    /// Cursor of the earlier ones.
    before: Option<i64>,
}

impl TaskQuery {
    /// All but the VM.
    fn others(&self) -> [(&'static str, Option<String>); 7] {
        let number = |n: Option<usize>| n.map(|n| n.to_string());
        [
            ("goal", self.goal.clone()),
            ("state", self.state.clone()),
            ("id", self.id.clone()),
            ("limit", number(self.limit)),
            ("after", Some(self.after.to_string())),
            ("newest", number(self.newest)),
            ("before", self.before.map(|at| at.to_string())),
        ]
    }
}

/// Lists tasks.
#[utoipa::path(
    get,
    path = "/v1/tasks",
    params(TaskQuery),
    responses((status = 200, body = Vec<Task>, description = "In the order in which they were queued", headers(("adit-next" = String, description = "Cursor of the next page, if there is one"), ("adit-earlier" = String, description = "Cursor of those before, where the newest were asked for"))))
)]
pub(super) async fn list(
    Shared(state): Shared<App>,
    asks: Asks,
    Query(q): Query<TaskQuery>,
) -> Result<Response, ApiError> {
    let mut q = q;
    if let Some(vm) = &q.vm {
        let (host, vm) = elsewhere::of_vm(&state, &asks, vm).await?;
        if let Some(host) = host {
            let query = q.others();
            return elsewhere::tasks_of(&state, &asks, &host, &vm, &query).await;
        }
        q.vm = Some(vm);
    }
    let id = match &q.id {
        Some(digits) => Some(page::id_range(digits).ok_or_else(bad_id)?),
        None => None,
    };
    let filter = Filter {
        vm: q.vm,
        of: asks.of_tasks(&state).await?,
        goal: q.goal,
        state: q.state,
        id,
        open: false,
    };
    lists::check_state(&filter)?;
    lists::check_vm(&state, &asks, &filter)?;
    if let Some(limit) = q.newest {
        return lists::newest_tasks(&state, filter, q.before, limit).await;
    }
    let (mut tasks, next) = state
        .desk
        .tasks(&filter, q.after, q.limit.unwrap_or(PAGE_MAX))
        .await?;
    if tasks.is_empty() {
        lists::check_names(&state, &filter).await?;
    }
    if let Some(digits) = q.id.filter(|_| q.after == 0 && filter.vm.is_none()) {
        elsewhere::tasks_with_id(&state, &asks, &digits, &mut tasks).await?;
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
            Some(after) => state
                .desk
                .tasks(&filter, after, PAGE_MAX)
                .await
                .map(|(tasks, next)| Some((tasks, next, false)))
                // The answer is cut off: whoever reads it finds no end of the array.
                .map_err(|_| std::io::Error::other("the database failed")),
        };
        match at {
            Ok(at) => Some((Ok(text), (state, filter, at))),
            Err(e) => Some((Err(e), (state, filter, None))),
        }
    });
    let body = Body::from_stream(pages);
    Ok(([("content-type", "application/json")], body).into_response())
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

/// Shows a task.
#[utoipa::path(
    get,
    path = "/v1/tasks/{id}",
    params(("id" = String, Path, description = "Id of the task, 32 hex digits")),
    responses((status = 200, body = Task, description = "As it is now"))
)]
pub(super) async fn show(
    Shared(state): Shared<App>,
    asks: Asks,
    Path(id): Path<String>,
) -> Answer<Task> {
    let unknown = match shown(&state, &asks, task_id(&id)?).await {
        Ok(task) => return Ok(Json(task)),
        Err(e) if e.is("unknown-task") => e,
        Err(e) => return Err(e),
    };
    let there = elsewhere::task(&state, &asks, &id).await?;
    there.map(Json).ok_or(unknown)
}

/// A task that the caller may see; any other one is not there.
async fn shown(state: &State, asks: &Asks, id: TaskId) -> Result<Task, ApiError> {
    let task = state.desk.task(id).await?;
    let may = asks.may(state, Verb::Task, &task.vm);
    may.map_err(|_| DeskError::Unknown)?;
    Ok(task)
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct OutputQuery {
    /// `stdout` or `stderr`.
    #[param(pattern = "^(stdout|stderr)$")]
    stream: Option<String>,
}

/// What a task wrote.
#[utoipa::path(
    get,
    path = "/v1/tasks/{id}/output",
    params(("id" = String, Path, description = "Id of the task, 32 hex digits"), OutputQuery),
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream", description = "Its bytes", headers(("adit-left-out" = String, description = "Where bytes are missing, and how many"))))
)]
pub(super) async fn output(
    Shared(state): Shared<App>,
    asks: Asks,
    Path(id): Path<String>,
    Query(q): Query<OutputQuery>,
) -> Result<Response, ApiError> {
    let (text, id) = (id.clone(), task_id(&id)?);
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
    if let Err(e) = shown(&state, &asks, id).await {
        if !e.is("unknown-task") {
            return Err(e);
        }
        let stream = if stderr { "stderr" } else { "stdout" };
        let path = format!("/v1/tasks/{text}/output?stream={stream}");
        let there = elsewhere::first(&state, &asks, &path).await?;
        let (_, answer) = there.ok_or(e)?;
        let mut head = HeaderMap::new();
        if let Some(left_out) = answer.head.get(adit_api::LEFT_OUT) {
            head.insert(adit_api::LEFT_OUT, left_out.clone());
        }
        return Ok((head, answer.body).into_response());
    }
    let out = state.desk.output(id, stderr).await?;
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

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct EventQuery {
    goal: Option<String>,
}

/// Present state first, then changes, until nothing that was asked for can change any more. A stream that ends for another
/// reason is cut off, so that nobody takes its end for the end of the tasks.
#[utoipa::path(
    get,
    path = "/v1/events",
    params(EventQuery),
    responses((status = 200, body = TaskEvent, content_type = "application/x-ndjson", description = "One a line"))
)]
pub(super) async fn events(
    Shared(state): Shared<App>,
    asks: Asks,
    Query(q): Query<EventQuery>,
) -> Result<Response, ApiError> {
    let patient = Arc::new(patient(&state, &asks)?);
    // Before the query, so that no change falls in between.
    let mut changes = state.desk.subscribe();
    let goal = q.goal;
    let filter = Filter {
        open: goal.is_none(),
        goal: goal.clone(),
        of: asks.of_tasks(&state).await?,
        ..Filter::default()
    };
    let mut present = state.desk.tasks(&filter, 0, PAGE_MAX).await?;
    let others = match &goal {
        Some(goal) => elsewhere::changes(&state, &asks, goal).await,
        None => vec![],
    };
    if present.0.is_empty() && others.is_empty() {
        lists::check_names(&state, &filter).await?;
    }
    let (to, from) = tokio::sync::mpsc::channel::<std::io::Result<Bytes>>(64);
    let cut_off = |why: &str| Err(std::io::Error::other(why.to_owned()));
    for other in others {
        let (state, asks, to) = (state.clone(), asks.clone(), to.clone());
        let (goal, patient) = (goal.clone().unwrap_or_default(), patient.clone());
        tokio::spawn(elsewhere::pass_on(state, asks, goal, other, to, patient));
    }
    tokio::spawn(async move {
        let _patient = patient;
        let mut open = std::collections::HashMap::new();
        loop {
            let (tasks, next) = present;
            for task in tasks {
                track(&mut open, &task);
                if to.send(Ok(line(&state.desk.event(task)))).await.is_err() {
                    return;
                }
            }
            let Some(after) = next else { break };
            present = match state.desk.tasks(&filter, after, PAGE_MAX).await {
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
                    if !asks.is_owner() {
                        let now = asks.again(&state).await;
                        if !now.sees(&state, Verb::Task, &event.task.vm) {
                            // What was shown and is no more, would be waited for in vain.
                            if open.contains_key(&event.task.task_id) {
                                let _ = to.send(cut_off("no grant shows it any more")).await;
                                return;
                            }
                            continue;
                        }
                    }
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

pub(super) fn line(event: &TaskEvent) -> Bytes {
    let mut text = serde_json::to_vec(event).unwrap_or_default();
    text.push(b'\n');
    text.into()
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
