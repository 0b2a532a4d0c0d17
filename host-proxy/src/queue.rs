//! The durable queue: goals, and one row a task. Functions over the connection; `db` commits them.
//!
//! ```text
//! queued ─► leased ─► started ─► done | failed | timed_out | interrupted | refused
//!    │         └──────────┴─────► lost_contact (silent for so long that it cannot be running, or its VM was removed)
//!    └─► expired (not_after passed, or its VM was removed)   └─► an earlier step did not succeed: skipped
//! ```
//! - The tasks of a VM are handed out one by one, in order of `key_seq`, step and attempt.
//! - A goal whose `not_before` is to come is held, and so are the later ones of its key: the guest runs a key's goals in
//!   the order of their sequence, and refuses one that was overtaken.
//! - A lease does not end: a task that is not terminal is handed out again when the agent pulls again, and the guest's
//!   journal answers for it.
//! - The first terminal state stands. What has ended is kept for a while ([`retention`]).

pub mod goals;
pub mod page;
pub mod retention;
pub mod schema;

use adit_api::{Task, TaskState};
use adit_names::VmId;
use adit_tasks::wire::{Captured, Outcome, Report, TaskId};
use adit_tasks::{Goal, hex, plan, task_id};
use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::db::DbError;

/// Most attempts of an idempotent step.
pub const ATTEMPTS_MAX: u32 = 3;
/// Most bytes of a reason that are kept.
const REASON_MAX: usize = 1024;
/// How long after its goal's `not_after` a task that was handed out may still be running: as long as any step may.
const SILENCE_MAX_MS: i64 = adit_tasks::goal::TIMEOUT_MAX_S as i64 * 1000;
/// Bytes of stdout in lists.
const PREVIEW_BYTES: usize = 200;

const OPEN: &str = "('queued', 'leased', 'started')";
const TASK_COLUMNS: &str = "t.task_id, g.goal_id, t.vm, t.step, t.attempt, t.state, t.exit, t.reason, t.queued_ms, \
     t.started_ms, t.ended_ms, t.out_total, t.err_total, coalesce(substr(t.out_head, 1, 200), x'')";

/// Why a request to the queue fails.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The same id with other content.
    #[error("goal {goal_id} is known with other content")]
    GoalTaken {
        /// Its id.
        goal_id: String,
    },
    /// Its time is over: no task of it would ever be handed out.
    #[error("goal {goal_id} was valid until {until}")]
    GoalExpired {
        /// Its id.
        goal_id: String,
        /// Its `not_after`.
        until: Timestamp,
    },
    /// Too many tasks wait already.
    #[error("{vm} has {queued} tasks waiting, at most {max} are allowed")]
    Full {
        /// The VM.
        vm: VmId,
        /// How many wait.
        queued: u32,
        /// How many may.
        max: u32,
    },
    /// No such task.
    #[error("no such task")]
    Unknown,
    /// No such goal.
    #[error("no such goal")]
    UnknownGoal,
    /// A report for a task that was never handed to this VM.
    #[error("the task was not handed to this VM")]
    NotLeased,
    /// The database failed.
    #[error(transparent)]
    Db(#[from] DbError),
}

impl From<rusqlite::Error> for QueueError {
    fn from(e: rusqlite::Error) -> Self {
        Self::Db(e.into())
    }
}

/// A goal as `add_goal` takes it.
pub struct NewGoal {
    /// Parsed, not verified: the guest verifies.
    pub goal: Goal,
    /// sha256 of its payload.
    pub digest: [u8; 32],
    /// Exactly as signed.
    pub envelope: Vec<u8>,
    /// Who claims to have signed it.
    pub signer: String,
    /// VMs to queue it for.
    pub vms: Vec<VmId>,
    /// Unix time.
    pub now_ms: i64,
    /// Tasks that may wait for one VM.
    pub max_queued: u32,
}

/// Queues a goal's tasks. Again with the same bytes it changes nothing but adds VMs that were not named before.
pub fn add_goal(c: &Connection, new: &NewGoal) -> Result<Vec<Task>, QueueError> {
    let goal_id = new.goal.goal_id.to_string();
    let known: Option<Vec<u8>> = c
        .query_row(
            "SELECT digest FROM goals WHERE goal_id = ?1",
            [&goal_id],
            |r| r.get(0),
        )
        .optional()?;
    let expired = new.goal.not_after.as_millisecond() < new.now_ms;
    let too_late = || QueueError::GoalExpired {
        goal_id: new.goal.goal_id.to_string(),
        until: new.goal.not_after,
    };
    match known {
        Some(digest) if digest != new.digest => {
            return Err(QueueError::GoalTaken { goal_id });
        }
        Some(_) => {}
        None if expired => return Err(too_late()),
        None => {
            c.execute(
                "INSERT INTO goals (digest, goal_id, key_seq, not_after_ms, envelope, accepted_ms, not_before_ms, signer) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
                params![
                    new.digest,
                    goal_id,
                    // Order is kept: both are compared as signed, and a sequence beyond 2^63 is of no manager's.
                    i64::try_from(new.goal.key_seq).unwrap_or(i64::MAX),
                    new.goal.not_after.as_millisecond(),
                    new.envelope,
                    new.now_ms,
                    new.goal.not_before.as_millisecond(),
                    new.signer,
                ],
            )?;
        }
    }
    let held = new.goal.not_before.as_millisecond() > new.now_ms;
    let reason = match held {
        true => format!("held until {}", new.goal.not_before),
        false => String::new(),
    };
    for vm in &new.vms {
        // All steps of a goal are queued together: handed over again, nothing is added, so nothing can be too much.
        let sql = "SELECT EXISTS (SELECT 1 FROM tasks WHERE digest = ?1 AND vm = ?2)";
        if c.query_row(sql, params![new.digest, vm.as_str()], |r| r.get(0))? {
            continue;
        }
        if expired {
            return Err(too_late());
        }
        let queued = queued(c, vm.as_str())?;
        let tasks = plan(&new.goal, &new.digest, vm);
        if queued as usize + tasks.len() > new.max_queued as usize {
            return Err(QueueError::Full {
                vm: vm.clone(),
                queued,
                max: new.max_queued,
            });
        }
        for (step_no, t) in tasks.iter().enumerate() {
            c.execute(
                "INSERT OR IGNORE INTO tasks (task_id, digest, vm, step, step_no, attempt, idempotent, continue_on_error, \
                 state, queued_ms, output_cap, reason) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, 'queued', ?9, ?10, ?11)",
                params![
                    t.task_id,
                    new.digest,
                    vm.as_str(),
                    t.step_id,
                    i64::try_from(step_no).unwrap_or(i64::MAX),
                    t.attempt,
                    t.idempotent,
                    t.continue_on_error,
                    new.now_ms,
                    schema::output_cap(&new.goal, &t.step_id),
                    reason,
                ],
            )?;
        }
    }
    of_goal(c, &goal_id)
}

/// Number of a VM's tasks that are not terminal.
pub fn queued(c: &Connection, vm: &str) -> Result<u32, QueueError> {
    let sql = format!("SELECT count(*) FROM tasks WHERE vm = ?1 AND state IN {OPEN}");
    Ok(c.query_row(&sql, [vm], |r| r.get(0))?)
}

/// What a guest is handed.
pub struct Handout {
    /// Derived id.
    pub task_id: TaskId,
    /// Exactly as signed.
    pub envelope: Vec<u8>,
    /// Step of the goal.
    pub step: String,
    /// 1 for the first.
    pub attempt: u32,
    /// The task, if its state changed.
    pub task: Option<Task>,
}

/// Leases the next task of a VM. What waited beyond its goal's `not_after` is left to `expire`, and what is held waits.
pub fn lease(c: &Connection, vm: &str, now_ms: i64) -> Result<Option<Handout>, QueueError> {
    let sql = format!(
        "SELECT t.task_id, g.envelope, t.step, t.attempt FROM tasks t JOIN goals g USING (digest) \
         WHERE t.vm = ?1 AND t.state IN {OPEN} AND NOT (t.state = 'queued' AND g.not_after_ms < ?2) \
         AND (t.state != 'queued' OR NOT EXISTS (SELECT 1 FROM tasks h JOIN goals hg USING (digest) WHERE h.vm = ?1 AND h.state = 'queued' \
         AND hg.not_before_ms > ?2 AND hg.signer = g.signer AND (hg.key_seq < g.key_seq OR h.digest = t.digest))) ORDER BY g.key_seq, t.digest, t.step_no, t.attempt LIMIT 1"
    );
    let row = c
        .query_row(&sql, params![vm, now_ms], |r| {
            Ok((r.get::<_, TaskId>(0)?, r.get(1)?, r.get(2)?, r.get(3)?))
        })
        .optional()?;
    let Some((id, envelope, step, attempt)) = row else {
        return Ok(None);
    };
    let changed = c.execute(
        "UPDATE tasks SET state = 'leased', reason = '' WHERE task_id = ?1 AND state = 'queued'",
        [id],
    )?;
    Ok(Some(Handout {
        task_id: id,
        envelope,
        step,
        attempt,
        task: (changed > 0).then(|| task(c, &id)).transpose()?,
    }))
}

/// The guest has begun a task.
pub fn started(
    c: &Connection,
    vm: &str,
    id: &TaskId,
    now_ms: i64,
) -> Result<Option<Task>, QueueError> {
    let changed = c.execute(
        "UPDATE tasks SET state = 'started', started_ms = ?3 WHERE task_id = ?1 AND vm = ?2 AND state = 'leased'",
        params![id, vm, now_ms],
    )?;
    Ok(if changed == 0 {
        None
    } else {
        Some(task(c, id)?)
    })
}

/// Takes a report. Returns the tasks that changed; none if the task was terminal already.
pub fn finish(
    c: &Connection,
    vm: &str,
    report: &Report,
    now_ms: i64,
) -> Result<Vec<Task>, QueueError> {
    let row = c
        .query_row(
            "SELECT state, digest, step, step_no, attempt, idempotent, continue_on_error, output_cap FROM tasks \
             WHERE task_id = ?1 AND vm = ?2",
            params![report.task_id, vm],
            |r| {
                let state: String = r.get(0)?;
                Ok((state, r.get::<_, [u8; 32]>(1)?, r.get::<_, String>(2)?, r.get::<_, i64>(3)?,
                    r.get::<_, u32>(4)?, r.get::<_, bool>(5)?, r.get::<_, bool>(6)?,
                    r.get::<_, u32>(7)?))
            },
        )
        .optional()?;
    let (state, digest, step, step_no, attempt, idempotent, continue_on_error, output_cap) =
        row.ok_or(QueueError::Unknown)?;
    match state.as_str() {
        "leased" | "started" => {}
        "queued" => return Err(QueueError::NotLeased),
        _ => return Ok(Vec::new()),
    }
    store(c, report, output_cap as usize, now_ms)?;
    let mut changed = vec![report.task_id];
    let again = report.outcome == Outcome::Interrupted && idempotent && attempt < ATTEMPTS_MAX;
    if again {
        let vm_id: VmId = vm.parse().map_err(|_| QueueError::Unknown)?;
        let next = task_id(&digest, &vm_id, &step, attempt + 1);
        c.execute(
            "INSERT OR IGNORE INTO tasks (task_id, digest, vm, step, step_no, attempt, idempotent, continue_on_error, \
             state, queued_ms, output_cap) VALUES (?1, ?2, ?3, ?4, ?5, ?6, 1, ?7, 'queued', ?8, ?9)",
            params![next, digest, vm, step, step_no, attempt + 1, continue_on_error, now_ms, output_cap],
        )?;
        // Ahead of the one that ended: at no time is nothing open for whoever watches the goal.
        changed.insert(0, next);
    } else if report.outcome != Outcome::Done && !continue_on_error {
        changed.extend(skip_after(c, &digest, vm, step_no, &step, now_ms)?);
    }
    changed.iter().map(|id| task(c, id)).collect()
}

/// Writes a report down. What it says of the guest's own is cut to what its goal allowed (R112).
fn store(c: &Connection, report: &Report, cap: usize, now_ms: i64) -> Result<(), QueueError> {
    let mut reason = report.reason.clone();
    let mut end = reason.len().min(REASON_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    reason.truncate(end);
    let (out, err) = (cut(&report.stdout, cap), cut(&report.stderr, cap));
    let kept = [&out.head, &out.tail, &err.head, &err.tail].map(Vec::len);
    let total = |o: &Captured| i64::try_from(o.total).unwrap_or(i64::MAX);
    let time = |ms: u64| i64::try_from(ms).ok().filter(|&ms| ms > 0);
    c.execute(
        "UPDATE tasks SET state = ?2, exit = ?3, reason = ?4, started_ms = ?5, ended_ms = ?6, out_head = ?7, out_tail = ?8, \
         out_total = ?9, err_head = ?10, err_tail = ?11, err_total = ?12, closed_ms = ?13, kept_bytes = ?14 WHERE task_id = ?1",
        params![
            report.task_id,
            TaskState::from(report.outcome).name(),
            report.exit,
            reason,
            time(report.started_ms),
            time(report.ended_ms),
            out.head,
            out.tail,
            total(&out),
            err.head,
            err.tail,
            total(&err),
            now_ms,
            i64::try_from(kept.iter().sum::<usize>()).unwrap_or(i64::MAX),
        ],
    )?;
    Ok(())
}

/// The first half and the last half of `cap` bytes, as an honest guest cuts them itself.
fn cut(said: &Captured, cap: usize) -> Captured {
    let sent = said.head.len() + said.tail.len();
    // There was at least that much, whatever it says.
    let total = said.total.max(sent as u64);
    let (mut head, mut tail) = (said.head.clone(), said.tail.clone());
    if sent > cap {
        if tail.is_empty() {
            tail = head.split_off(head.len() / 2);
        }
        head.truncate(cap / 2);
        tail.drain(..tail.len().saturating_sub(cap / 2));
    }
    Captured { head, tail, total }
}

/// Later steps of the goal on this VM will not run.
fn skip_after(
    c: &Connection,
    digest: &[u8; 32],
    vm: &str,
    step_no: i64,
    step: &str,
    now_ms: i64,
) -> Result<Vec<TaskId>, QueueError> {
    let sql = "UPDATE tasks SET state = 'skipped', reason = ?4, closed_ms = ?5 \
               WHERE digest = ?1 AND vm = ?2 AND step_no > ?3 AND state = 'queued' RETURNING task_id";
    let mut statement = c.prepare_cached(sql)?;
    let reason = format!("step `{step}` did not succeed");
    let ids = statement
        .query_map(params![digest, vm, step_no, reason, now_ms], |r| r.get(0))?
        .collect::<Result<_, _>>()?;
    Ok(ids)
}

/// Ends tasks that still wait after their goal's `not_after`, and those of which nothing was heard long after it.
/// Returns them, and when there is next something to do: one is due, or one that was held may begin.
pub fn expire(c: &Connection, now_ms: i64) -> Result<(Vec<Task>, Option<i64>), QueueError> {
    let of_goals = "digest IN (SELECT digest FROM goals WHERE not_after_ms < ?1)";
    let mut ended = end(
        c,
        &format!(
            "state = 'expired', reason = 'not_after passed before it was handed out' \
             WHERE state = 'queued' AND {of_goals}"
        ),
        now_ms,
        now_ms,
    )?;
    ended.extend(end(
        c,
        &format!(
            "state = 'lost_contact', reason = 'no report came: look at the VM before you order it again' \
             WHERE state IN ('leased', 'started') AND {of_goals}"
        ),
        now_ms - SILENCE_MAX_MS,
        now_ms,
    )?);
    let sql = format!(
        "SELECT min(g.not_after_ms + CASE t.state WHEN 'queued' THEN 0 ELSE {SILENCE_MAX_MS} END) \
         FROM tasks t JOIN goals g USING (digest) WHERE t.state IN {OPEN}"
    );
    let due: Option<i64> = c.query_row(&sql, [], |r| r.get(0))?;
    let sql = "SELECT min(g.not_before_ms) FROM tasks t JOIN goals g USING (digest) \
               WHERE t.state = 'queued' AND g.not_before_ms > ?1";
    let held: Option<i64> = c.query_row(sql, [now_ms], |r| r.get(0))?;
    Ok((ended, due.into_iter().chain(held).min()))
}

/// Ends every task of a VM that is removed. Returns those that were open.
pub fn remove_vm(c: &Connection, vm: &str, now_ms: i64) -> Result<Vec<Task>, QueueError> {
    end(
        c,
        "state = CASE state WHEN 'queued' THEN 'expired' ELSE 'lost_contact' END, reason = 'the VM was removed' \
         WHERE state IN ('queued', 'leased', 'started') AND vm = ?1",
        vm,
        now_ms,
    )
}

/// VMs for which something that was held may begin: its `not_before` is in (since, now].
pub fn released(c: &Connection, since_ms: i64, now_ms: i64) -> Result<Vec<String>, QueueError> {
    let sql = "SELECT DISTINCT t.vm FROM tasks t JOIN goals g USING (digest) \
               WHERE t.state = 'queued' AND g.not_before_ms > ?1 AND g.not_before_ms <= ?2";
    let mut statement = c.prepare_cached(sql)?;
    let vms = statement.query_map([since_ms, now_ms], |r| r.get(0))?;
    Ok(vms.collect::<Result<_, _>>()?)
}

/// Ends the tasks that `set` names, with one parameter.
fn end(
    c: &Connection,
    set: &str,
    of: impl rusqlite::ToSql,
    now_ms: i64,
) -> Result<Vec<Task>, QueueError> {
    let ids: Vec<TaskId> = c
        .prepare_cached(&format!(
            "UPDATE tasks SET closed_ms = ?2, {set} RETURNING task_id"
        ))?
        .query_map(params![of, now_ms], |r| r.get(0))?
        .collect::<Result<_, _>>()?;
    ids.iter().map(|id| task(c, id)).collect()
}

/// A goal's tasks, in order of VM, step and attempt.
pub fn of_goal(c: &Connection, goal_id: &str) -> Result<Vec<Task>, QueueError> {
    let sql = format!(
        "SELECT {TASK_COLUMNS} FROM tasks t JOIN goals g USING (digest) WHERE g.goal_id = ?1 \
         ORDER BY t.vm, t.step_no, t.attempt"
    );
    let mut statement = c.prepare_cached(&sql)?;
    let rows = statement.query_map([goal_id], row_to_task)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// One task.
pub fn task(c: &Connection, id: &TaskId) -> Result<Task, QueueError> {
    let sql = format!(
        "SELECT {TASK_COLUMNS} FROM tasks t JOIN goals g USING (digest) WHERE t.task_id = ?1"
    );
    c.prepare_cached(&sql)?
        .query_row([id], row_to_task)
        .optional()?
        .ok_or(QueueError::Unknown)
}

/// Digest and time of acceptance of a goal.
pub fn goal(c: &Connection, goal_id: &str) -> Result<([u8; 32], i64), QueueError> {
    let sql = "SELECT digest, accepted_ms FROM goals WHERE goal_id = ?1";
    c.query_row(sql, [goal_id], |r| Ok((r.get(0)?, r.get(1)?)))
        .optional()?
        .ok_or(QueueError::UnknownGoal)
}

/// What a task wrote: head, tail, and how many bytes in all.
pub fn output(c: &Connection, id: &TaskId, stderr: bool) -> Result<Captured, QueueError> {
    let columns = if stderr {
        "err_head, err_tail, err_total"
    } else {
        "out_head, out_tail, out_total"
    };
    let sql = format!("SELECT {columns} FROM tasks WHERE task_id = ?1");
    let row = c.query_row(&sql, [id], |r| {
        let total: i64 = r.get(2)?;
        Ok(Captured {
            head: r.get(0)?,
            tail: r.get(1)?,
            total: u64::try_from(total).unwrap_or(0),
        })
    });
    row.optional()?.ok_or(QueueError::Unknown)
}

fn row_to_task(r: &Row<'_>) -> rusqlite::Result<Task> {
    let state: String = r.get(5)?;
    let count = |n: i64| u64::try_from(n).unwrap_or(0);
    let preview: Vec<u8> = r.get(13)?;
    let preview = &preview[..preview.len().min(PREVIEW_BYTES)];
    Ok(Task {
        task_id: hex(&r.get::<_, TaskId>(0)?),
        goal_id: r.get(1)?,
        vm: r.get(2)?,
        step: r.get(3)?,
        attempt: r.get(4)?,
        state: TaskState::from_name(&state).ok_or(rusqlite::Error::InvalidQuery)?,
        exit: r.get(6)?,
        reason: r.get(7)?,
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
