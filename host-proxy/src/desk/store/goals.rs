//! Goals: their rows, and lists of the newest with how far each is. Each step on each VM counts once there, by its last
//! attempt.

use adit_api::GoalSummary;
use adit_tasks::{Goal, hex};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::page::{Names, PAGE_MAX};
use super::rfc3339;

/// Writes a goal: its envelope exactly as signed, and who claims to have signed it.
pub fn insert(
    c: &Connection,
    goal: &Goal,
    digest: &[u8; 32],
    envelope: &[u8],
    signer: &str,
    now_ms: i64,
) -> rusqlite::Result<()> {
    let sql = "INSERT INTO goals (digest, goal_id, key_seq, not_after_ms, envelope, accepted_ms, not_before_ms, signer) \
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
    c.prepare_cached(sql)?.execute(params![
        digest,
        goal.goal_id.to_string(),
        // Order is kept: both are compared as signed, and a sequence beyond 2^63 is of no manager's.
        i64::try_from(goal.key_seq).unwrap_or(i64::MAX),
        goal.not_after.as_millisecond(),
        envelope,
        now_ms,
        goal.not_before.as_millisecond(),
        signer,
    ])?;
    Ok(())
}

/// Digest and time of acceptance of a goal; none: it is not known.
pub fn goal(c: &Connection, goal_id: &str) -> rusqlite::Result<Option<([u8; 32], i64)>> {
    let sql = "SELECT digest, accepted_ms FROM goals WHERE goal_id = ?1";
    c.query_row(sql, [goal_id], |r| Ok((r.get(0)?, r.get(1)?)))
        .optional()
}

/// A goal exactly as signed.
pub fn envelope(c: &Connection, digest: &[u8; 32]) -> rusqlite::Result<Vec<u8>> {
    let sql = "SELECT envelope FROM goals WHERE digest = ?1";
    c.prepare_cached(sql)?.query_row([digest], |r| r.get(0))
}

/// Whether a goal has tasks for a VM.
pub fn is_for(c: &Connection, digest: &[u8; 32], vm: &str) -> rusqlite::Result<bool> {
    let sql = "SELECT EXISTS (SELECT 1 FROM tasks WHERE digest = ?1 AND vm = ?2)";
    c.prepare_cached(sql)?
        .query_row(params![digest, vm], |r| r.get(0))
}

/// Lists the newest goals before a cursor, at most `limit` (and at most [`PAGE_MAX`]), in the order in which they were
/// accepted; and the cursor of those before them, if there are any. `ends_with`: the last characters of their ids; `of`: only goals
/// with tasks for these VMs, and only these tasks are counted.
///
/// # Errors
/// The database says no.
pub fn newest(
    c: &Connection,
    ends_with: Option<&str>,
    of: Option<&Names>,
    before: i64,
    limit: usize,
) -> rusqlite::Result<(Vec<GoalSummary>, Option<i64>)> {
    let limit = limit.clamp(1, PAGE_MAX);
    let more = i64::try_from(limit + 1).unwrap_or(i64::MAX);
    let sql = "SELECT rowid, digest, goal_id, signer, key_seq, accepted_ms, not_before_ms, not_after_ms FROM goals \
               WHERE rowid < ?1 AND (?2 IS NULL OR substr(goal_id, -length(?2)) = ?2) \
               AND (?4 IS NULL OR EXISTS (SELECT 1 FROM tasks t WHERE t.digest = goals.digest \
               AND t.vm IN (SELECT value FROM json_each(?4)))) ORDER BY rowid DESC LIMIT ?3";
    let of = of.map(Names::json);
    let mut statement = c.prepare_cached(sql)?;
    let rows = statement.query_map(params![before, ends_with, more, of], |r| {
        Ok((r.get(0)?, r.get(1)?, summary(r)?))
    })?;
    let mut rows: Vec<(i64, [u8; 32], GoalSummary)> = rows.collect::<Result<_, _>>()?;
    // One more was asked for, to know whether it is there.
    let more = rows.len() > limit;
    rows.truncate(limit);
    let earlier = rows.last().map(|(at, ..)| *at).filter(|_| more);
    let counted = rows.into_iter().rev();
    let counted = counted.map(|(_, digest, goal)| count(c, &digest, of, goal));
    Ok((counted.collect::<Result<_, _>>()?, earlier))
}

fn summary(r: &Row<'_>) -> rusqlite::Result<GoalSummary> {
    let key_seq: i64 = r.get(4)?;
    Ok(GoalSummary {
        goal_id: r.get(2)?,
        digest: hex(&r.get::<_, [u8; 32]>(1)?),
        signer: r.get(3)?,
        key_seq: u64::try_from(key_seq).unwrap_or(0),
        accepted_at: rfc3339(r.get(5)?),
        not_before: rfc3339(r.get(6)?),
        not_after: rfc3339(r.get(7)?),
        vms: 0,
        steps: 0,
        open: 0,
        done: 0,
        failed: 0,
        hosts: vec![],
    })
}

fn count(
    c: &Connection,
    digest: &[u8; 32],
    of: Option<&str>,
    goal: GoalSummary,
) -> rusqlite::Result<GoalSummary> {
    // With max(), SQLite takes the other columns from the row that has the maximum.
    let sql = "SELECT count(DISTINCT vm), count(DISTINCT step_no), coalesce(sum(closed_ms IS NULL), 0), \
               coalesce(sum(state = 'done'), 0), count(*) FROM \
               (SELECT vm, step_no, state, closed_ms, max(attempt) FROM tasks WHERE digest = ?1 \
               AND (?2 IS NULL OR vm IN (SELECT value FROM json_each(?2))) GROUP BY vm, step_no)";
    c.prepare_cached(sql)?.query_row(params![digest, of], |r| {
        let (open, done, all): (u32, u32, u32) = (r.get(2)?, r.get(3)?, r.get(4)?);
        Ok(GoalSummary {
            vms: r.get(0)?,
            steps: r.get(1)?,
            open,
            done,
            failed: all.saturating_sub(open).saturating_sub(done),
            ..goal
        })
    })
}
