//! Lists of what is newest, and what is said where a list would be empty because its filter names nothing that is here.

use adit_api::{GoalSummary, TaskState};
use axum::Json;
use axum::extract::{Query, State as Shared};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::{ApiError, App, find};
use crate::desk::store::page::{Filter, PAGE_MAX};
use crate::state::State;

#[derive(Deserialize)]
pub(super) struct GoalQuery {
    newest: Option<usize>,
    before: Option<i64>,
    id: Option<String>,
}

pub(super) async fn goals(
    Shared(state): Shared<App>,
    Query(q): Query<GoalQuery>,
) -> Result<Response, ApiError> {
    let (before, limit) = (q.before.unwrap_or(i64::MAX), q.newest.unwrap_or(PAGE_MAX));
    let (goals, earlier) = state.desk.newest_goals(q.id, before, limit).await?;
    Ok(answer::<GoalSummary>(&goals, earlier))
}

pub(super) async fn newest_tasks(
    state: &State,
    filter: Filter,
    before: Option<i64>,
    limit: usize,
) -> Result<Response, ApiError> {
    let before = before.unwrap_or(i64::MAX);
    let (tasks, earlier) = state.desk.newest_tasks(&filter, before, limit).await?;
    if tasks.is_empty() {
        check_names(state, &filter).await?;
    }
    Ok(answer(&tasks, earlier))
}

/// A list, and the cursor of what is before it.
fn answer<T: Serialize>(list: &[T], earlier: Option<i64>) -> Response {
    let mut response = Json(list).into_response();
    if let Some(earlier) = earlier {
        let head = response.headers_mut();
        head.insert(adit_api::EARLIER, earlier.into());
    }
    response
}

/// Refuses a state that is none.
pub(super) fn check_state(filter: &Filter) -> Result<(), ApiError> {
    let Some(state) = &filter.state else {
        return Ok(());
    };
    if TaskState::from_name(state).is_some() {
        return Ok(());
    }
    let shown = adit_names::escape(state).at_most(40);
    let names = TaskState::ALL.map(TaskState::name).join(", ");
    let message = format!("`{shown}` is no state of a task: they are {names}");
    Err(ApiError::new(StatusCode::BAD_REQUEST, "usage", message))
}

/// Refuses a filter with a goal or a VM that is not known: nothing was found, but not because there is nothing to do.
pub(super) async fn check_names(state: &State, filter: &Filter) -> Result<(), ApiError> {
    if let Some(goal) = filter.goal.clone() {
        state.desk.knows_goal(goal).await?;
    }
    if let Some(vm) = filter.vm.clone()
        && let Err(unknown) = find(state, &vm)
    {
        // One that was removed has tasks for as long as they are kept.
        if !state.desk.has_tasks(vm).await? {
            return Err(unknown);
        }
    }
    Ok(())
}
