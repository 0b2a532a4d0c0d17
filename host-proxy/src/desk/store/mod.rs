//! The tables of goals and tasks: only SQL. What may be written is asked of [`rules`](super::rules) by
//! [`change`](super::change); [`db`] commits it.
//!
//! | table | a row is |
//! |---|---|
//! | `goals` | a goal, with its envelope exactly as signed |
//! | `tasks` | an attempt of a step for a VM |
//! | `vms` | the settings of a VM that was added through the API |
//! | `enrolments` | a VM's highest generation, and its guest's key |
//! | `identities` | the id of a guest |
//! | `locks` | a VM to which nothing new goes |
//! | `trust` | a trust document for a VM, or for all |
//! | `temp.begun` | a leased task that the guest has begun, in memory until the VM's next transaction |
//!
//! `started` is not worth a commit of its own: the guest has it in its journal, and says it again whenever it connects. So
//! it waits in a table in memory, which every query of a task's state joins: a task that is `leased` in its row and has one
//! in `begun` is `started`. A connection that is given up after a failed commit takes the notes along, as a kill does.

pub mod db;
pub mod enrolments;
pub mod goals;
pub mod identities;
pub mod locks;
pub mod migrations;
pub mod page;
pub mod report;
pub mod retention;
pub mod trust;
pub mod vms;

use std::collections::HashSet;

use adit_api::{Task, TaskState};
use adit_tasks::hex;
use adit_tasks::wire::{TaskId, refusal_code};
use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::rules::Candidate;
use db::Schema;

/// aditd's database.
pub const SCHEMA: Schema = Schema {
    migrations: migrations::MIGRATIONS,
    session: "CREATE TEMP TABLE begun (task_id BLOB PRIMARY KEY, vm TEXT NOT NULL, at_ms INTEGER NOT NULL) STRICT, WITHOUT ROWID",
};

/// Bytes of stdout in lists.
const PREVIEW_BYTES: usize = 200;

/// The state as it is now.
const STATE: &str =
    "CASE WHEN t.state = 'leased' AND b.at_ms IS NOT NULL THEN 'started' ELSE t.state END";
/// Why it is in that state: a task that waits for a VM that is locked waits for that.
const REASON: &str = "CASE WHEN t.state = 'queued' AND l.vm IS NOT NULL \
     THEN 'its VM is locked' || CASE l.reason WHEN '' THEN '' ELSE ': ' || l.reason END ELSE t.reason END";
const TASKS: &str = "tasks t JOIN goals g USING (digest) LEFT JOIN temp.begun b ON b.task_id = t.task_id \
     LEFT JOIN locks l ON l.vm = t.vm";

// What is open is what has not been closed. Its index has nothing else, which SQLite does not know.
const COUNT_OPEN: &str =
    "SELECT count(*) FROM tasks INDEXED BY tasks_waiting WHERE vm = ?1 AND closed_ms IS NULL";
const COUNT_LEASED: &str = "SELECT count(*) FROM tasks INDEXED BY tasks_waiting \
     WHERE vm = ?1 AND closed_ms IS NULL AND state <> 'queued'";
const OPEN_IN_ORDER: &str = "SELECT t.task_id, g.digest, t.step, t.attempt, t.state, g.signer, g.key_seq, \
     g.not_before_ms, g.not_after_ms FROM tasks t INDEXED BY tasks_waiting JOIN goals g USING (digest) \
     WHERE t.vm = ?1 AND t.closed_ms IS NULL ORDER BY g.key_seq, t.digest, t.step_no, t.attempt";
const OPEN_OF_VM: &str = "SELECT t.task_id, t.state, g.not_after_ms \
     FROM tasks t INDEXED BY tasks_waiting JOIN goals g USING (digest) \
     WHERE t.vm = ?1 AND t.closed_ms IS NULL ORDER BY t.rowid";
const OPEN_AFTER: &str = "SELECT t.task_id, t.state, g.not_after_ms FROM tasks t JOIN goals g USING (digest) \
     WHERE t.digest = ?1 AND t.vm = ?2 AND t.step_no > ?3 AND t.closed_ms IS NULL ORDER BY t.step_no";
const OPEN_OF_PAST_GOALS: &str = "SELECT t.task_id, t.state, g.not_after_ms \
     FROM tasks t INDEXED BY tasks_waiting CROSS JOIN goals g USING (digest) \
     WHERE t.closed_ms IS NULL AND g.not_after_ms < ?1 ORDER BY t.rowid";
const FIRST_NOT_AFTER: &str = "SELECT min(g.not_after_ms) \
     FROM tasks t INDEXED BY tasks_waiting CROSS JOIN goals g USING (digest) \
     WHERE t.closed_ms IS NULL AND t.state = ?1";
const FIRST_NOT_BEFORE: &str = "SELECT min(g.not_before_ms) \
     FROM tasks t INDEXED BY tasks_waiting CROSS JOIN goals g USING (digest) \
     WHERE t.closed_ms IS NULL AND t.state = 'queued' AND g.not_before_ms > ?1";
const RELEASED: &str = "SELECT DISTINCT t.vm FROM tasks t INDEXED BY tasks_waiting CROSS JOIN goals g USING (digest) \
     WHERE t.closed_ms IS NULL AND t.state = 'queued' AND g.not_before_ms > ?1 AND g.not_before_ms <= ?2";

/// Columns for [`row_to_task`].
fn task_columns() -> String {
    format!(
        "t.task_id, g.goal_id, t.vm, t.step, t.attempt, {STATE}, t.exit, {REASON}, t.queued_ms, \
         coalesce(t.started_ms, b.at_ms), t.ended_ms, t.out_total, t.err_total, coalesce(substr(t.out_head, 1, 200), x'')"
    )
}

/// A task that is to be queued.
pub struct NewTask<'a> {
    /// Derived id.
    pub task_id: TaskId,
    /// Its goal.
    pub digest: [u8; 32],
    /// Its VM.
    pub vm: &'a str,
    /// Step of the goal.
    pub step: &'a str,
    /// Which one, from 0.
    pub step_no: i64,
    /// 1 for the first.
    pub attempt: u32,
    /// It may run again.
    pub idempotent: bool,
    /// Later steps run although it fails.
    pub continue_on_error: bool,
    /// Bytes of each output stream that are kept.
    pub output_cap: u32,
    /// Why it waits, for people.
    pub reason: &'a str,
}

/// Queues a task, if it is not known.
pub fn insert_task(c: &Connection, task: &NewTask<'_>, now_ms: i64) -> rusqlite::Result<()> {
    let sql = "INSERT OR IGNORE INTO tasks (task_id, digest, vm, step, step_no, attempt, idempotent, continue_on_error, \
               state, queued_ms, output_cap, reason) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, 'queued', ?9, ?10, ?11)";
    c.prepare_cached(sql)?.execute(params![
        task.task_id,
        task.digest,
        task.vm,
        task.step,
        task.step_no,
        task.attempt,
        task.idempotent,
        task.continue_on_error,
        now_ms,
        task.output_cap,
        task.reason,
    ])?;
    Ok(())
}

/// Number of a VM's tasks that were handed out and have not ended.
pub fn count_leased(c: &Connection, vm: &str) -> rusqlite::Result<u32> {
    c.prepare_cached(COUNT_LEASED)?
        .query_row([vm], |r| r.get(0))
}

/// Number of a VM's tasks that are not terminal.
pub fn count_open(c: &Connection, vm: &str) -> rusqlite::Result<u32> {
    c.prepare_cached(COUNT_OPEN)?.query_row([vm], |r| r.get(0))
}

/// What a guest is to be handed.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// It takes the goals of a key in any order.
    pub overtake: bool,
    /// Goals of which it takes no task now.
    pub held: HashSet<[u8; 32]>,
    /// Goals whose envelope it has.
    pub sent: Vec<[u8; 32]>,
}

/// What a guest is handed.
pub struct Handout {
    /// Derived id.
    pub task_id: TaskId,
    /// Its goal.
    pub digest: [u8; 32],
    /// Exactly as signed; none if the guest has it.
    pub envelope: Option<Vec<u8>>,
    /// Step of the goal.
    pub step: String,
    /// 1 for the first.
    pub attempt: u32,
    /// Where it was before.
    pub state: TaskState,
}

/// Offers a VM's open tasks in order of `key_seq`, goal, step and attempt. Returns the first one that is taken.
/// `sent`: goals whose envelope is not needed.
pub fn first_open(
    c: &Connection,
    vm: &str,
    sent: &[[u8; 32]],
    mut takes: impl FnMut(&Candidate) -> bool,
) -> rusqlite::Result<Option<Handout>> {
    let mut statement = c.prepare_cached(OPEN_IN_ORDER)?;
    let mut rows = statement.query([vm])?;
    while let Some(r) = rows.next()? {
        let candidate = Candidate {
            digest: r.get(1)?,
            state: state(r, 4)?,
            signer: r.get(5)?,
            key_seq: r.get(6)?,
            not_before_ms: r.get(7)?,
            not_after_ms: r.get(8)?,
        };
        if takes(&candidate) {
            return Ok(Some(Handout {
                task_id: r.get(0)?,
                digest: candidate.digest,
                // Read for this one only, and only if it is needed: it may be large.
                envelope: match sent.contains(&candidate.digest) {
                    true => None,
                    false => Some(goals::envelope(c, &candidate.digest)?),
                },
                step: r.get(2)?,
                attempt: r.get(3)?,
                state: candidate.state,
            }));
        }
    }
    Ok(None)
}

/// A task, as far as what becomes of it depends on it.
pub struct TaskRow {
    /// As its row says; a task that has begun may be `leased` there.
    pub state: TaskState,
    /// Its goal.
    pub digest: [u8; 32],
    /// Step of the goal.
    pub step: String,
    /// Which one, from 0.
    pub step_no: i64,
    /// 1 for the first.
    pub attempt: u32,
    /// It may run again.
    pub idempotent: bool,
    /// Later steps run although it fails.
    pub continue_on_error: bool,
    /// Bytes of each output stream that are kept.
    pub output_cap: u32,
}

/// A task of a VM; none: it is not known, or another VM's.
pub fn row(c: &Connection, vm: &str, id: &TaskId) -> rusqlite::Result<Option<TaskRow>> {
    let sql = "SELECT state, digest, step, step_no, attempt, idempotent, continue_on_error, output_cap FROM tasks \
               WHERE task_id = ?1 AND vm = ?2";
    let row = |r: &Row<'_>| {
        Ok(TaskRow {
            state: state(r, 0)?,
            digest: r.get(1)?,
            step: r.get(2)?,
            step_no: r.get(3)?,
            attempt: r.get(4)?,
            idempotent: r.get(5)?,
            continue_on_error: r.get(6)?,
            output_cap: r.get(7)?,
        })
    };
    let mut statement = c.prepare_cached(sql)?;
    statement.query_row(params![id, vm], row).optional()
}

/// Open tasks with their states and the end of their goals' validity.
pub type Open = Vec<(TaskId, TaskState, i64)>;

/// Open tasks of a VM.
pub fn open_of_vm(c: &Connection, vm: &str) -> rusqlite::Result<Open> {
    open(c, OPEN_OF_VM, [vm])
}

/// Open tasks of a goal on a VM that come after a step.
pub fn open_after(
    c: &Connection,
    digest: &[u8; 32],
    vm: &str,
    step_no: i64,
) -> rusqlite::Result<Open> {
    open(c, OPEN_AFTER, params![digest, vm, step_no])
}

/// Open tasks of goals whose time is over.
pub fn open_of_past_goals(c: &Connection, now_ms: i64) -> rusqlite::Result<Open> {
    open(c, OPEN_OF_PAST_GOALS, [now_ms])
}

fn open(c: &Connection, sql: &str, of: impl rusqlite::Params) -> rusqlite::Result<Open> {
    let mut statement = c.prepare_cached(sql)?;
    let rows = statement.query_map(of, |r| Ok((r.get(0)?, state(r, 1)?, r.get(2)?)))?;
    rows.collect()
}

/// The earliest end of validity among the goals that have a task in this state.
pub fn first_not_after(c: &Connection, state: TaskState) -> rusqlite::Result<Option<i64>> {
    c.prepare_cached(FIRST_NOT_AFTER)?
        .query_row([state.name()], |r| r.get(0))
}

/// The earliest begin of validity, after a time, among the goals that have a queued task.
pub fn first_not_before(c: &Connection, after_ms: i64) -> rusqlite::Result<Option<i64>> {
    c.prepare_cached(FIRST_NOT_BEFORE)?
        .query_row([after_ms], |r| r.get(0))
}

/// VMs for which something that was held may begin: its `not_before` is in (since, now].
pub fn released(c: &Connection, since_ms: i64, now_ms: i64) -> rusqlite::Result<Vec<String>> {
    let mut statement = c.prepare_cached(RELEASED)?;
    let vms = statement.query_map([since_ms, now_ms], |r| r.get(0))?;
    vms.collect()
}

/// Writes that a task was handed out.
pub fn set_leased(c: &Connection, id: &TaskId) -> rusqlite::Result<()> {
    let sql = "UPDATE tasks SET state = 'leased', reason = '' WHERE task_id = ?1";
    c.prepare_cached(sql)?.execute([id]).map(drop)
}

/// Writes a terminal state that no report brought.
pub fn close(
    c: &Connection,
    id: &TaskId,
    state: TaskState,
    reason: &str,
    now_ms: i64,
) -> rusqlite::Result<()> {
    let sql = "UPDATE tasks SET state = ?2, reason = ?3, closed_ms = ?4, started_ms = coalesce(started_ms, \
               (SELECT at_ms FROM temp.begun b WHERE b.task_id = tasks.task_id)) WHERE task_id = ?1";
    c.prepare_cached(sql)?
        .execute(params![id, state.name(), reason, now_ms])?;
    forget_begun(c, id)
}

/// Notes in memory that a task has begun. Returns whether that is new.
pub fn note_begun(c: &Connection, vm: &str, id: &TaskId, now_ms: i64) -> rusqlite::Result<bool> {
    let sql = "INSERT OR IGNORE INTO temp.begun (task_id, vm, at_ms) VALUES (?1, ?2, ?3)";
    let noted = c.prepare_cached(sql)?.execute(params![id, vm, now_ms])?;
    Ok(noted > 0)
}

/// Has no note of a task any more.
pub fn forget_begun(c: &Connection, id: &TaskId) -> rusqlite::Result<()> {
    let sql = "DELETE FROM temp.begun WHERE task_id = ?1";
    c.prepare_cached(sql)?.execute([id]).map(drop)
}

/// Writes which tasks have begun, of one VM or of all.
pub fn write_begun(c: &Connection, vm: Option<&str>) -> rusqlite::Result<()> {
    let of = "(?1 IS NULL OR vm = ?1)";
    let sql = format!(
        "UPDATE tasks SET state = 'started', started_ms = (SELECT at_ms FROM temp.begun b WHERE b.task_id = tasks.task_id) \
         WHERE task_id IN (SELECT task_id FROM temp.begun WHERE {of}) AND state = 'leased'"
    );
    c.prepare_cached(&sql)?.execute([vm])?;
    let sql = format!("DELETE FROM temp.begun WHERE {of}");
    c.prepare_cached(&sql)?.execute([vm]).map(drop)
}

/// One task; none: it is not known.
pub fn task(c: &Connection, id: &TaskId) -> rusqlite::Result<Option<Task>> {
    let sql = format!(
        "SELECT {} FROM {TASKS} WHERE t.task_id = ?1",
        task_columns()
    );
    c.prepare_cached(&sql)?
        .query_row([id], row_to_task)
        .optional()
}

/// A goal's tasks, in order of VM, step and attempt.
pub fn of_goal(c: &Connection, goal_id: &str) -> rusqlite::Result<Vec<Task>> {
    let sql = format!(
        "SELECT {} FROM {TASKS} WHERE g.goal_id = ?1 ORDER BY t.vm, t.step_no, t.attempt",
        task_columns()
    );
    let mut statement = c.prepare_cached(&sql)?;
    statement.query_map([goal_id], row_to_task)?.collect()
}

fn state(r: &Row<'_>, column: usize) -> rusqlite::Result<TaskState> {
    let name: String = r.get(column)?;
    TaskState::from_name(&name).ok_or(rusqlite::Error::InvalidQuery)
}

fn row_to_task(r: &Row<'_>) -> rusqlite::Result<Task> {
    let count = |n: i64| u64::try_from(n).unwrap_or(0);
    let preview: Vec<u8> = r.get(13)?;
    let preview = &preview[..preview.len().min(PREVIEW_BYTES)];
    let (state, reason): (_, String) = (state(r, 5)?, r.get(7)?);
    let refusal = match state {
        TaskState::Refused => refusal_code(&reason).map(str::to_owned),
        _ => None,
    };
    Ok(Task {
        task_id: hex(&r.get::<_, TaskId>(0)?),
        goal_id: r.get(1)?,
        vm: r.get(2)?,
        host: None,
        step: r.get(3)?,
        attempt: r.get(4)?,
        state,
        exit: r.get(6)?,
        reason,
        refusal,
        queued_at: rfc3339(r.get(8)?),
        started_at: r.get::<_, Option<i64>>(9)?.map(rfc3339),
        ended_at: r.get::<_, Option<i64>>(10)?.map(rfc3339),
        output_bytes: (count(r.get(11)?), count(r.get(12)?)),
        output_preview: String::from_utf8_lossy(preview).into_owned(),
    })
}

/// Unix milliseconds as text.
pub fn rfc3339(ms: i64) -> String {
    Timestamp::from_millisecond(ms).map_or_else(|_| ms.to_string(), |t| t.to_string())
}

#[cfg(test)]
mod tests;
