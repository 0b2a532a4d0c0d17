//! What has ended is kept for a while, and not for ever: by age for all, by number and bytes for each VM (I3).
//!
//! A goal is forgotten with its last task. While one of its tasks on a VM is open, none of them there is forgotten. Nothing
//! runs twice by this: handed over again, the goal's tasks are queued again, and the guest's own journal answers for them.

use std::collections::BTreeSet;

use rusqlite::{Connection, Params, params};

/// Rows that one step deletes at most: others wait for the same database.
pub const STEP_MAX: i64 = 1000;
/// How soon age is looked at again while something old cannot go yet.
const AGAIN_MS: i64 = 3_600_000;

/// How much is kept of what has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// How long.
    pub age_ms: i64,
    /// Tasks of one VM.
    pub tasks: u32,
    /// Bytes of output of one VM's tasks.
    pub bytes: u64,
}

/// Forgets the oldest tasks of a VM that has more than it may; its newest one stays. Returns how many went.
///
/// # Errors
/// The database says no.
pub fn trim(c: &Connection, vm: &str, keep: &Keep) -> rusqlite::Result<usize> {
    let sql = "SELECT count(*), coalesce(sum(kept_bytes), 0) FROM tasks WHERE vm = ?1 AND closed_ms IS NOT NULL";
    let (count, bytes): (u32, i64) = c
        .prepare_cached(sql)?
        .query_row([vm], |r| Ok((r.get(0)?, r.get(1)?)))?;
    let max = i64::try_from(keep.bytes).unwrap_or(i64::MAX);
    if count <= keep.tasks && bytes <= max {
        return Ok(0);
    }
    forget(
        c,
        "SELECT rowid, digest, vm, row_number() OVER newest AS n, sum(kept_bytes) OVER newest AS bytes FROM tasks \
         WHERE vm = ?2 AND closed_ms IS NOT NULL WINDOW newest AS (ORDER BY closed_ms DESC, rowid DESC)",
        "k.n > 1 AND (k.n > ?3 OR k.bytes > ?4)",
        params![STEP_MAX, vm, keep.tasks, max],
    )
}

/// Forgets what is older than it may be. Returns how many went, and when to look again.
///
/// # Errors
/// The database says no.
pub fn retire(c: &Connection, keep: &Keep, now_ms: i64) -> rusqlite::Result<(usize, Option<i64>)> {
    let gone = forget(
        c,
        "SELECT rowid, digest, vm FROM tasks WHERE closed_ms < ?2 ORDER BY closed_ms",
        "TRUE",
        params![STEP_MAX, now_ms.saturating_sub(keep.age_ms)],
    )?;
    let sql = "SELECT min(closed_ms) FROM tasks WHERE closed_ms IS NOT NULL";
    let oldest: Option<i64> = c.query_row(sql, [], |r| r.get(0))?;
    let more = usize::try_from(STEP_MAX).is_ok_and(|step| gone >= step);
    let soonest = if more { now_ms } else { now_ms + AGAIN_MS };
    let next = oldest.map(|at| at.saturating_add(keep.age_ms).max(soonest));
    Ok((gone, next))
}

/// Deletes those of `of` (as `k`) for which `whether` holds, ?1 at most, and goals that have no task any more.
fn forget(
    c: &Connection,
    of: &str,
    whether: &str,
    parameters: impl Params,
) -> rusqlite::Result<usize> {
    let sql = format!(
        "DELETE FROM tasks WHERE rowid IN (SELECT k.rowid FROM ({of}) k WHERE {whether} AND NOT EXISTS \
         (SELECT 1 FROM tasks o WHERE o.digest = k.digest AND o.vm = k.vm AND o.closed_ms IS NULL) LIMIT ?1) \
         RETURNING digest"
    );
    let mut statement = c.prepare_cached(&sql)?;
    let digests: Vec<[u8; 32]> = statement
        .query_map(parameters, |r| r.get(0))?
        .collect::<Result<_, _>>()?;
    let sql = "DELETE FROM goals WHERE digest = ?1 AND NOT EXISTS (SELECT 1 FROM tasks WHERE digest = ?1)";
    for digest in BTreeSet::from_iter(&digests) {
        c.prepare_cached(sql)?.execute([digest])?;
    }
    Ok(digests.len())
}
