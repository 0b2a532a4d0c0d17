//! Lists of tasks, in pages: a host that has worked for months has more of them than an answer should hold.
//!
//! The order is that in which they were queued. A page's cursor is the place of its last row, so a list goes on where it
//! was although rows came and went meanwhile.

use std::sync::Arc;

use adit_api::Task;
use adit_tasks::unhex;
use adit_tasks::wire::TaskId;
use rusqlite::{Connection, ToSql};

use super::{STATE, TASKS, row_to_task, task_columns};

/// Most tasks of a page.
pub const PAGE_MAX: usize = 500;

/// Which tasks to list.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Of this VM.
    pub vm: Option<String>,
    /// Of these VMs only.
    pub of: Option<Names>,
    /// Of this goal.
    pub goal: Option<String>,
    /// In this state.
    pub state: Option<String>,
    /// Whose id is in this range, both ends included.
    pub id: Option<(TaskId, TaskId)>,
    /// Not terminal.
    pub open: bool,
}

/// Names of VMs, as the database takes them: an array of JSON. A copy is cheap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names(Arc<str>);

impl Names {
    /// Of these.
    pub fn new(names: &[String]) -> Self {
        // Texts always serialise.
        Self(serde_json::to_string(names).unwrap_or_default().into())
    }

    /// The array.
    pub fn json(&self) -> &str {
        &self.0
    }
}

/// Some tasks, and where the next ones are if there are more.
pub type Page = (Vec<Task>, Option<i64>);

/// Lists at most `limit` tasks (and at most [`PAGE_MAX`]) behind a cursor; 0 is the start.
///
/// # Errors
/// The database says no.
pub fn page(c: &Connection, filter: &Filter, after: i64, limit: usize) -> rusqlite::Result<Page> {
    select(
        c,
        filter,
        "t.rowid > ?1 {filter} ORDER BY t.rowid",
        after,
        limit,
    )
}

/// Lists the newest tasks before a cursor, at most `limit` (and at most [`PAGE_MAX`]), in the same order; `i64::MAX` is the
/// end. The cursor of the answer is that of the tasks before these.
///
/// # Errors
/// The database says no.
pub fn newest(
    c: &Connection,
    filter: &Filter,
    before: i64,
    limit: usize,
) -> rusqlite::Result<Page> {
    let order = "t.rowid < ?1 {filter} ORDER BY t.rowid DESC";
    let (mut tasks, earlier) = select(c, filter, order, before, limit)?;
    tasks.reverse();
    Ok((tasks, earlier))
}

fn select(
    c: &Connection,
    filter: &Filter,
    order: &str,
    from: i64,
    limit: usize,
) -> rusqlite::Result<Page> {
    let limit = limit.clamp(1, PAGE_MAX);
    let open = match filter.open {
        true => " AND t.closed_ms IS NULL",
        false => "",
    };
    let id = match filter.id {
        Some(_) => " AND t.task_id BETWEEN ?5 AND ?6",
        None => "",
    };
    let of = match filter.of {
        Some(_) => " AND t.vm IN (SELECT value FROM json_each(?8))",
        None => "",
    };
    let (low, high) = filter.id.unzip();
    let filters = format!(
        "AND (?2 IS NULL OR t.vm = ?2) AND (?3 IS NULL OR g.goal_id = ?3) AND (?4 IS NULL OR {STATE} = ?4){id}{open}{of}"
    );
    let sql = format!(
        "SELECT {}, t.rowid FROM {TASKS} WHERE {} LIMIT ?7",
        task_columns(),
        order.replace("{filter}", &filters)
    );
    let mut statement = c.prepare_cached(&sql)?;
    let more = i64::try_from(limit + 1).unwrap_or(i64::MAX);
    let names = filter.of.as_ref().map(Names::json);
    let (vm, goal, state) = (&filter.vm, &filter.goal, &filter.state);
    let mut given: Vec<&dyn ToSql> = vec![&from, vm, goal, state, &low, &high, &more];
    given.extend(names.as_ref().map(|names| names as &dyn ToSql));
    let rows = statement.query_map(&given[..], |r| {
        Ok((row_to_task(r)?, r.get::<_, i64>("rowid")?))
    })?;
    let mut rows: Vec<(Task, i64)> = rows.collect::<Result<_, _>>()?;
    // One more was asked for, to know whether it is there.
    let more = rows.len() > limit;
    rows.truncate(limit);
    let next = rows.last().map(|(_, at)| *at).filter(|_| more);
    Ok((rows.into_iter().map(|(task, _)| task).collect(), next))
}

/// Whether a VM has tasks here, though it may have been removed.
///
/// # Errors
/// The database says no.
pub fn has_tasks(c: &Connection, vm: &str) -> rusqlite::Result<bool> {
    let sql = "SELECT EXISTS (SELECT 1 FROM tasks WHERE vm = ?1)";
    c.prepare_cached(sql)?.query_row([vm], |r| r.get(0))
}

/// Names of all VMs that have tasks here, also of those that were removed: a look into the index for each.
///
/// # Errors
/// The database says no.
pub fn vms(c: &Connection) -> rusqlite::Result<Vec<String>> {
    let sql = "WITH RECURSIVE of (vm) AS (SELECT min(vm) FROM tasks UNION ALL \
               SELECT (SELECT min(vm) FROM tasks WHERE vm > of.vm) FROM of WHERE of.vm IS NOT NULL) \
               SELECT vm FROM of WHERE vm IS NOT NULL";
    let mut statement = c.prepare_cached(sql)?;
    let rows = statement.query_map([], |r| r.get(0))?;
    rows.collect()
}

/// The ids that begin with some hex digits; none: they are no such digits.
pub fn id_range(digits: &str) -> Option<(TaskId, TaskId)> {
    if digits.len() > 32 {
        return None;
    }
    let end = |with: &str| unhex(&format!("{digits}{}", with.repeat(32 - digits.len())));
    Some((end("0")?, end("f")?))
}
