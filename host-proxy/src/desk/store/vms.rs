//! VMs that were added through the API, each with all its settings as one JSON value.

use rusqlite::{Connection, params};

/// Writes a VM's settings.
pub fn put(c: &Connection, name: &str, cid: i64, spec: &str) -> rusqlite::Result<()> {
    let sql = "INSERT OR REPLACE INTO vms (name, cid, spec) VALUES (?1, ?2, ?3)";
    c.execute(sql, params![name, cid, spec]).map(drop)
}

/// Removes a VM's settings.
pub fn delete(c: &Connection, name: &str) -> rusqlite::Result<()> {
    c.execute("DELETE FROM vms WHERE name = ?1", [name])
        .map(drop)
}

/// Names and settings of all of them, by name.
pub fn all(c: &Connection) -> rusqlite::Result<Vec<(String, String)>> {
    let mut statement = c.prepare("SELECT name, spec FROM vms ORDER BY name")?;
    let rows = statement.query_map([], |r| Ok((r.get(0)?, r.get(1)?)))?;
    rows.collect()
}
