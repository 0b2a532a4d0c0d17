//! The ids that guests were given, each with the VM on whose channel that was: a guest that comes with one on another channel is a
//! copy. Of each VM the newest few are kept, so that a guest that comes back, from a backup for instance, is still known.

use rusqlite::{Connection, OptionalExtension, params};

/// Ids that are kept of a VM.
pub const IDENTITIES_MAX: u32 = 8;

/// The VM that an id was given to.
pub fn owner(c: &Connection, id: [u8; 16]) -> rusqlite::Result<Option<String>> {
    let sql = "SELECT vm FROM identities WHERE id = ?1";
    c.query_row(sql, [id], |r| r.get(0)).optional()
}

/// Notes that a VM has an id; forgets its oldest, by the order in which they were noted: the clock may have gone back.
pub fn put(c: &Connection, vm: &str, id: [u8; 16], now_ms: i64) -> rusqlite::Result<()> {
    let sql = "INSERT OR REPLACE INTO identities (id, vm, given_ms) VALUES (?1, ?2, ?3)";
    c.execute(sql, params![id, vm, now_ms])?;
    let sql = "DELETE FROM identities WHERE vm = ?1 AND id NOT IN \
               (SELECT id FROM identities WHERE vm = ?1 ORDER BY rowid DESC LIMIT ?2)";
    c.execute(sql, params![vm, IDENTITIES_MAX]).map(drop)
}

/// Forgets those of a VM.
pub fn delete(c: &Connection, vm: &str) -> rusqlite::Result<()> {
    c.execute("DELETE FROM identities WHERE vm = ?1", [vm])
        .map(drop)
}
