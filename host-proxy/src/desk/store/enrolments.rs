//! Of each VM the highest generation of a card that was believed, and the key that its guest said first. It outlives the agent's
//! connection, aditd, and the VM's place in aditd.toml: a card of before must not be believed again.

use rusqlite::{Connection, OptionalExtension, params};

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

/// Forgets it.
pub fn delete(c: &Connection, vm: &str) -> rusqlite::Result<()> {
    c.execute("DELETE FROM enrolments WHERE vm = ?1", [vm])
        .map(drop)
}
