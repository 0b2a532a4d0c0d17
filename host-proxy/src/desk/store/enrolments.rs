//! Of each VM the highest generation of a card that was believed, and the key that its guest said first. It outlives the agent's
//! connection, aditd, and the VM itself: a card of before must not be believed again, also where the VM was removed and added
//! again under its name. Whose key it was is forgotten with the VM.

use rusqlite::{Connection, OptionalExtension, params};

/// Removed VMs whose generations are remembered.
pub const REMOVED_MAX: u32 = 4096;

/// What is known of a VM's enrolments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// The highest generation; 0: no card was believed.
    pub generation: u64,
    /// The key that the guest said first, since the card of this generation.
    pub guest_pk: Option<[u8; 32]>,
}

/// Reads it.
pub fn seen(c: &Connection, vm: &str) -> rusqlite::Result<Seen> {
    let sql = "SELECT generation, guest_pk FROM enrolments WHERE vm = ?1";
    let row = c.query_row(sql, [vm], |r| {
        Ok(Seen {
            generation: u64::try_from(r.get::<_, i64>(0)?).unwrap_or(0),
            guest_pk: r.get(1)?,
        })
    });
    Ok(row.optional()?.unwrap_or_default())
}

/// Writes it.
pub fn put(c: &Connection, vm: &str, seen: &Seen) -> rusqlite::Result<()> {
    let generation = i64::try_from(seen.generation).unwrap_or(i64::MAX);
    let sql = "INSERT OR REPLACE INTO enrolments (vm, generation, guest_pk) VALUES (?1, ?2, ?3)";
    c.execute(sql, params![vm, generation, seen.guest_pk])
        .map(drop)
}

/// Forgets a removed VM's key, and not its generation. Of the VMs that have no key any more, so many are remembered.
pub fn forget_guest(c: &Connection, vm: &str) -> rusqlite::Result<()> {
    // As a new row, so that it is the newest.
    let before = seen(c, vm)?;
    c.execute("DELETE FROM enrolments WHERE vm = ?1", [vm])?;
    if before.generation > 0 {
        let guest_pk = None;
        put(c, vm, &Seen { guest_pk, ..before })?;
    }
    let sql = "DELETE FROM enrolments WHERE guest_pk IS NULL AND rowid NOT IN \
               (SELECT rowid FROM enrolments WHERE guest_pk IS NULL ORDER BY rowid DESC LIMIT ?1)";
    c.execute(sql, [REMOVED_MAX]).map(drop)
}
