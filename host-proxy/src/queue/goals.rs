//! Lists of goals: the newest, and how far each is. Each step on each VM counts once, by its last attempt.

use adit_api::GoalSummary;
use adit_tasks::hex;
use rusqlite::{Connection, Row, params};

use super::page::PAGE_MAX;
use super::{OPEN, QueueError, rfc3339};

/// Lists the newest goals before a cursor, at most `limit` (and at most [`PAGE_MAX`]), in the order in which they were
/// accepted; and the cursor of those before them, if there are any. `ends_with`: the last characters of their ids.
///
/// # Errors
/// The database says no.
pub fn newest(
    c: &Connection,
    ends_with: Option<&str>,
    before: i64,
    limit: usize,
) -> Result<(Vec<GoalSummary>, Option<i64>), QueueError> {
    let limit = limit.clamp(1, PAGE_MAX);
    let more = i64::try_from(limit + 1).unwrap_or(i64::MAX);
    let sql = "SELECT rowid, digest, goal_id, signer, key_seq, accepted_ms, not_before_ms, not_after_ms FROM goals \
               WHERE rowid < ?1 AND (?2 IS NULL OR substr(goal_id, -length(?2)) = ?2) ORDER BY rowid DESC LIMIT ?3";
    let mut statement = c.prepare_cached(sql)?;
    let rows = statement.query_map(params![before, ends_with, more], |r| {
        Ok((r.get(0)?, r.get(1)?, summary(r)?))
    })?;
    let mut rows: Vec<(i64, [u8; 32], GoalSummary)> = rows.collect::<Result<_, _>>()?;
    // One more was asked for, to know whether it is there.
    let more = rows.len() > limit;
    rows.truncate(limit);
    let earlier = rows.last().map(|(at, ..)| *at).filter(|_| more);
    let counted = rows.into_iter().rev();
    let counted = counted.map(|(_, digest, goal)| count(c, &digest, goal));
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
    })
}

fn count(c: &Connection, digest: &[u8; 32], goal: GoalSummary) -> Result<GoalSummary, QueueError> {
    // With max(), SQLite takes the other columns from the row that has the maximum.
    let sql = format!(
        "SELECT count(DISTINCT vm), count(DISTINCT step_no), coalesce(sum(state IN {OPEN}), 0), \
         coalesce(sum(state = 'done'), 0), count(*) FROM \
         (SELECT vm, step_no, state, max(attempt) FROM tasks WHERE digest = ?1 GROUP BY vm, step_no)"
    );
    Ok(c.prepare_cached(&sql)?.query_row([digest], |r| {
        let (open, done, all): (u32, u32, u32) = (r.get(2)?, r.get(3)?, r.get(4)?);
        Ok(GoalSummary {
            vms: r.get(0)?,
            steps: r.get(1)?,
            open,
            done,
            failed: all.saturating_sub(open).saturating_sub(done),
            ..goal
        })
    })?)
}
