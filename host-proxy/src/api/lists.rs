//! Lists of what is newest, and what is said where a list would be empty because its filter names nothing that is here.

use adit_api::{GoalSummary, TaskState};
use axum::Json;
use axum::extract::{Query, State as Shared};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

use super::{ApiError, App, Asks, elsewhere, find};
use crate::access::Verb;
use crate::desk::DeskError;
use crate::desk::store::page::{Filter, PAGE_MAX};
use crate::state::State;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct GoalQuery {
    newest: Option<usize>,
    before: Option<i64>,
    id: Option<String>,
}

/// Lists goals.
#[utoipa::path(
    get,
    path = "/v1/goals",
    params(GoalQuery),
    responses((status = 200, body = Vec<GoalSummary>, description = "The newest, in the order in which they were accepted", headers(("adit-earlier" = String, description = "Cursor of those before, if there are any"))))
)]
pub(super) async fn goals(
    Shared(state): Shared<App>,
    asks: Asks,
    Query(q): Query<GoalQuery>,
) -> Result<Response, ApiError> {
    let (before, limit) = (q.before.unwrap_or(i64::MAX), q.newest.unwrap_or(PAGE_MAX));
    let of = asks.of_tasks(&state).await?;
    let ends_with = q.id.clone().filter(|_| q.before.is_none());
    let (mut goals, earlier) = state.desk.newest_goals(q.id, of, before, limit).await?;
    if let Some(ends_with) = ends_with {
        elsewhere::goals_with_id(&state, &asks, &ends_with, limit.min(PAGE_MAX), &mut goals)
            .await?;
    }
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

/// A page of a list that is in memory.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct PageQuery {
    /// At most so many, and at most 500; not given: all.
    limit: Option<usize>,
    /// Cursor of the page.
    after: Option<String>,
}

impl PageQuery {
    pub(super) fn new(limit: Option<usize>, after: Option<String>) -> Self {
        Self { limit, after }
    }

    /// The page of what is in the order of its cursors, and the next page's cursor. What has gone meanwhile moves nothing.
    pub(super) fn of<'a, T>(
        &self,
        all: &'a [T],
        cursor: impl Fn(&T) -> String,
    ) -> (&'a [T], Option<String>) {
        let from = match &self.after {
            Some(after) => all.partition_point(|one| cursor(one) <= *after),
            None => 0,
        };
        let all = &all[from..];
        let Some(limit) = self.limit else {
            return (all, None);
        };
        let page = &all[..limit.clamp(1, PAGE_MAX).min(all.len())];
        let next = page.last().filter(|_| page.len() < all.len()).map(cursor);
        (page, next)
    }
}

/// A page, and the cursor of the next one.
pub(super) fn page<T: Serialize + ?Sized>(list: &T, next: Option<String>) -> Response {
    let mut response = Json(list).into_response();
    if let Some(next) = next.and_then(|next| next.parse().ok()) {
        response.headers_mut().insert(adit_api::NEXT, next);
    }
    response
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

/// Refuses a filter with a VM whose tasks the caller may not see, as one with a VM that is not there.
pub(super) fn check_vm(state: &State, asks: &Asks, filter: &Filter) -> Result<(), ApiError> {
    match &filter.vm {
        Some(vm) => asks.may(state, Verb::Task, vm),
        None => Ok(()),
    }
}

/// Refuses a filter with a goal or a VM that is not known: nothing was found, but not because there is nothing to do.
pub(super) async fn check_names(state: &State, filter: &Filter) -> Result<(), ApiError> {
    if let Some(goal) = filter.goal.clone() {
        state.desk.knows_goal(goal.clone()).await?;
        // One that has nothing for the caller is not there for it.
        let of = filter.of.clone();
        let any = Filter {
            goal: Some(goal),
            of,
            ..Filter::default()
        };
        if any.of.is_some() && state.desk.tasks(&any, 0, 1).await?.0.is_empty() {
            return Err(DeskError::UnknownGoal.into());
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_have_everything_once_also_where_the_last_one_of_a_page_has_gone() {
        let all: Vec<String> = (0..7).map(|n| format!("vm-{n}")).collect();
        let query = |limit, after: Option<String>| PageQuery { limit, after };
        assert_eq!(query(None, None).of(&all, String::clone), (&all[..], None));
        let (mut seen, mut after) = (Vec::new(), None);
        loop {
            let (page, next) = query(Some(3), after).of(&all, String::clone);
            seen.extend_from_slice(page);
            match next {
                Some(next) => after = Some(next),
                None => break,
            }
        }
        assert_eq!(seen, all);
        let gone = Some("vm-2a".to_owned());
        assert_eq!(query(Some(2), gone).of(&all, String::clone).0, &all[3..5]);
        // Nothing would never end.
        assert_eq!(query(Some(0), None).of(&all, String::clone).0.len(), 1);
        let last = Some("vm-6".to_owned());
        assert_eq!(
            query(Some(1), last).of(&all, String::clone),
            (&all[7..], None)
        );
    }
}
