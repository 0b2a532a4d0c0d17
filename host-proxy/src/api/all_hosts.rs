//! Lists of the goals and tasks of all hosts: each is asked for its newest ones at the same time, and of these the newest are shown.
//!
//! A goal that several hosts have is one, and counts the tasks of all of them. A host that does not answer is named in the answer,
//! because what it has is missing there; one that refuses the caller has nothing for it.

use adit_api::{AllGoals, AllTasks, EARLIER, GoalSummary, Silent, Task};
use axum::Json;
use axum::extract::{Query, State as Shared};
use serde::Deserialize;
use utoipa::IntoParams;

use super::elsewhere::{ask_all, claimed, is_id, says_none, silent};
use super::{ApiError, App, Asks, lists};
use crate::desk::store::page::{Filter, PAGE_MAX};
use crate::peers::work::{Answer, NotDone};

/// As many as are listed where nobody says how many.
const LISTED: usize = 100;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct GoalQuery {
    /// At most so many, and at most 500; not given: 100.
    newest: Option<usize>,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct TaskQuery {
    /// At most so many, and at most 500; not given: 100.
    newest: Option<usize>,
    /// Only those of this goal.
    goal: Option<String>,
    /// Only those in this state.
    state: Option<String>,
}

fn limit(newest: Option<usize>) -> usize {
    newest.unwrap_or(LISTED).clamp(1, PAGE_MAX)
}

/// Lists the goals of all hosts.
#[utoipa::path(
    get,
    path = "/v1/all-hosts/goals",
    params(GoalQuery),
    responses((status = 200, body = AllGoals, description = "Every host was asked"))
)]
pub(super) async fn goals(
    Shared(state): Shared<App>,
    asks: Asks,
    Query(q): Query<GoalQuery>,
) -> Result<Json<AllGoals>, ApiError> {
    let limit = limit(q.newest);
    let of = asks.of_tasks(&state).await?;
    let (own, earlier) = state.desk.newest_goals(None, of, i64::MAX, limit).await?;
    let mut found = Found {
        earlier: earlier.is_some(),
        ..Found::default()
    };
    let name = state.host().map(ToString::to_string);
    let mut goals: Vec<GoalSummary> = own
        .into_iter()
        .map(|goal| GoalSummary {
            hosts: name.iter().cloned().collect(),
            ..goal
        })
        .collect();
    for (host, answer) in ask_all(&state, &asks, &format!("/v1/goals?newest={limit}")).await {
        let name = &host.config.name;
        for goal in found.hear::<GoalSummary>(name.as_str(), answer, limit) {
            let goal = GoalSummary {
                hosts: vec![name.to_string()],
                ..goal
            };
            let is = |known: &&mut GoalSummary| {
                known.goal_id == goal.goal_id && known.digest == goal.digest
            };
            match goals.iter_mut().find(is) {
                Some(known) => add(known, goal),
                None => goals.push(goal),
            }
        }
    }
    goals.sort_by(|a, b| a.accepted_at.cmp(&b.accepted_at));
    found.keep_newest(&mut goals, limit);
    Ok(Json(AllGoals {
        goals,
        earlier: found.earlier,
        silent: found.silent,
    }))
}

/// Counts what another host has of a goal.
fn add(known: &mut GoalSummary, other: GoalSummary) {
    known.accepted_at = other
        .accepted_at
        .min(std::mem::take(&mut known.accepted_at));
    known.steps = known.steps.max(other.steps);
    for (sum, more) in [
        (&mut known.vms, other.vms),
        (&mut known.open, other.open),
        (&mut known.done, other.done),
        (&mut known.failed, other.failed),
    ] {
        *sum = sum.saturating_add(more);
    }
    known.hosts.extend(other.hosts);
}

/// Lists the tasks of all hosts.
#[utoipa::path(
    get,
    path = "/v1/all-hosts/tasks",
    params(TaskQuery),
    responses((status = 200, body = AllTasks, description = "Every host was asked"))
)]
pub(super) async fn tasks(
    Shared(state): Shared<App>,
    asks: Asks,
    Query(q): Query<TaskQuery>,
) -> Result<Json<AllTasks>, ApiError> {
    let limit = limit(q.newest);
    let filter = Filter {
        of: asks.of_tasks(&state).await?,
        goal: q.goal,
        state: q.state,
        ..Filter::default()
    };
    lists::check_state(&filter)?;
    let mut path = format!("/v1/tasks?newest={limit}");
    // It becomes part of a path.
    if let Some(goal) = filter.goal.as_ref().filter(|goal| is_id(goal)) {
        path.push_str(&format!("&goal={goal}"));
    }
    if let Some(state) = &filter.state {
        path.push_str(&format!("&state={state}"));
    }
    let (mut tasks, earlier) = state.desk.newest_tasks(&filter, i64::MAX, limit).await?;
    let mut found = Found {
        earlier: earlier.is_some(),
        ..Found::default()
    };
    for task in &mut tasks {
        task.host = state.host().map(ToString::to_string);
    }
    let others = match &filter.goal {
        Some(goal) if !is_id(goal) => vec![],
        _ => ask_all(&state, &asks, &path).await,
    };
    for (host, answer) in others {
        let mut more: Vec<Task> = found.hear(host.config.name.as_str(), answer, limit);
        more.retain_mut(|task| claimed(&host, task));
        tasks.extend(more);
    }
    tasks.sort_by(|a, b| a.queued_at.cmp(&b.queued_at));
    found.keep_newest(&mut tasks, limit);
    Ok(Json(AllTasks {
        tasks,
        earlier: found.earlier,
        silent: found.silent,
    }))
}

/// What is known of a list besides its rows.
#[derive(Default)]
struct Found {
    earlier: bool,
    silent: Vec<Silent>,
}

impl Found {
    /// Takes a host's list: as much of it as it was asked for.
    fn hear<T: serde::de::DeserializeOwned>(
        &mut self,
        host: &str,
        answer: Result<Answer, NotDone>,
        limit: usize,
    ) -> Vec<T> {
        let rows = answer.and_then(|answer| {
            let is_not_all = answer.head.contains_key(EARLIER);
            Ok((answer.json::<Vec<T>>()?, is_not_all))
        });
        match rows {
            Ok((mut rows, is_not_all)) => {
                self.earlier |= is_not_all || rows.len() > limit;
                rows.drain(..rows.len().saturating_sub(limit));
                rows
            }
            Err(e) if says_none(&e) => vec![],
            Err(e) => {
                self.silent.push(silent(host, &e));
                vec![]
            }
        }
    }

    /// Of rows in the order of their time.
    fn keep_newest<T>(&mut self, rows: &mut Vec<T>, limit: usize) {
        let surplus = rows.len().saturating_sub(limit);
        self.earlier |= surplus > 0;
        rows.drain(..surplus);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn goal(host: &str, accepted_at: &str, counts: [u32; 5]) -> GoalSummary {
        let [vms, steps, open, done, failed] = counts;
        GoalSummary {
            goal_id: "g".into(),
            digest: "d".into(),
            signer: String::new(),
            key_seq: 1,
            accepted_at: accepted_at.into(),
            not_before: String::new(),
            not_after: String::new(),
            vms,
            steps,
            open,
            done,
            failed,
            hosts: vec![host.into()],
        }
    }

    #[test]
    fn a_goal_of_two_hosts_counts_the_tasks_of_both_and_is_as_old_as_the_older_one() {
        let mut known = goal("alpha", "2026-01-02T00:00:00Z", [1, 2, 2, 0, 0]);
        add(
            &mut known,
            goal("beta", "2026-01-01T00:00:00Z", [2, 2, 0, 3, 1]),
        );
        let both = GoalSummary {
            hosts: vec!["alpha".into(), "beta".into()],
            ..goal("", "2026-01-01T00:00:00Z", [3, 2, 2, 3, 1])
        };
        assert_eq!(known, both);
        let huge = goal("gamma", "2026-01-03T00:00:00Z", [u32::MAX; 5]);
        add(&mut known, huge);
        assert_eq!((known.vms, known.failed), (u32::MAX, u32::MAX));
    }
}
