//! Which VMs are locked. A VM of `aditd.toml` has a row here, too.

use rusqlite::{Connection, OptionalExtension, params};

use crate::vm::Locked;

/// Locks a VM, or writes another reason.
pub fn put(c: &Connection, vm: &str, locked: &Locked) -> rusqlite::Result<()> {
    let Locked {
        reason,
        by,
        since_ms,
    } = locked;
    let sql = "INSERT OR REPLACE INTO locks (vm, reason, by, since_ms) VALUES (?1, ?2, ?3, ?4)";
    c.execute(sql, params![vm, reason, by, since_ms]).map(drop)
}

/// Opens a VM. Returns whether it was locked.
pub fn delete(c: &Connection, vm: &str) -> rusqlite::Result<bool> {
    let gone = c.execute("DELETE FROM locks WHERE vm = ?1", [vm])?;
    Ok(gone > 0)
}

/// The lock of a VM; none: it is open.
pub fn of(c: &Connection, vm: &str) -> rusqlite::Result<Option<Locked>> {
    let sql = "SELECT reason, by, since_ms FROM locks WHERE vm = ?1";
    let row = c.prepare_cached(sql)?.query_row([vm], |r| {
        Ok(Locked {
            reason: r.get(0)?,
            by: r.get(1)?,
            since_ms: r.get(2)?,
        })
    });
    row.optional()
}
