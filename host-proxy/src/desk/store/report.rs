//! A report in its task's row, and the output that it brought.

use adit_api::TaskState;
use adit_tasks::wire::{Captured, Report, TaskId};
use rusqlite::{Connection, OptionalExtension, params};

/// Most bytes of a reason that are kept.
const REASON_MAX: usize = 1024;

/// Writes a report down. What it says of the guest's own is cut to what its goal allowed (R112).
pub fn write(
    c: &Connection,
    report: &Report,
    state: TaskState,
    cap: u32,
    now_ms: i64,
) -> rusqlite::Result<()> {
    let mut reason = report.reason.clone();
    let mut end = reason.len().min(REASON_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    reason.truncate(end);
    let (out, err) = (
        cut(&report.stdout, cap as usize),
        cut(&report.stderr, cap as usize),
    );
    let kept = [&out.head, &out.tail, &err.head, &err.tail].map(Vec::len);
    let total = |o: &Captured| i64::try_from(o.total).unwrap_or(i64::MAX);
    let time = |ms: u64| i64::try_from(ms).ok().filter(|&ms| ms > 0);
    let sql = "UPDATE tasks SET state = ?2, exit = ?3, reason = ?4, started_ms = ?5, ended_ms = ?6, out_head = ?7, \
               out_tail = ?8, out_total = ?9, err_head = ?10, err_tail = ?11, err_total = ?12, closed_ms = ?13, \
               kept_bytes = ?14 WHERE task_id = ?1";
    c.prepare_cached(sql)?.execute(params![
        report.task_id,
        state.name(),
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
    ])?;
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

/// What a task wrote: head, tail, and how many bytes in all; none: it is not known.
pub fn output(c: &Connection, id: &TaskId, stderr: bool) -> rusqlite::Result<Option<Captured>> {
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
    row.optional()
}
