//! Trust documents that guests are given: of each signer the newest, for all VMs (`vm` is empty) or for one. A row may be wrong: who
//! has signed it, and whether, is the guest's to check.

use rusqlite::{Connection, OptionalExtension, params};

/// One that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Id of the key that has signed it, as it says.
    pub signer: [u8; 16],
    /// It is for its VM only.
    pub own: bool,
    /// Which.
    pub sequence: u64,
    /// Exactly as signed.
    pub envelope: Vec<u8>,
}

/// Where one is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The VM; empty: all.
    pub vm: String,
    /// Id of the key.
    pub signer: [u8; 16],
    /// It is for its VM only.
    pub own: bool,
    /// Which.
    pub sequence: u64,
    /// Since when, Unix ms.
    pub given_ms: i64,
}

fn number(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}

/// The sequence and the bytes of the one that is kept in this place.
pub fn get(
    c: &Connection,
    vm: &str,
    signer: [u8; 16],
    own: bool,
) -> rusqlite::Result<Option<(u64, Vec<u8>)>> {
    let sql = "SELECT sequence, envelope FROM trust WHERE vm = ?1 AND signer = ?2 AND own = ?3";
    c.query_row(sql, params![vm, signer, own], |r| {
        Ok((number(r.get(0)?), r.get(1)?))
    })
    .optional()
}

/// How many are kept for a VM, or for all.
pub fn count(c: &Connection, vm: &str) -> rusqlite::Result<usize> {
    let sql = "SELECT count(*) FROM trust WHERE vm = ?1";
    let n: i64 = c.query_row(sql, [vm], |r| r.get(0))?;
    Ok(usize::try_from(n).unwrap_or(usize::MAX))
}

/// Writes it.
pub fn put(c: &Connection, vm: &str, document: &Document, now_ms: i64) -> rusqlite::Result<()> {
    let sequence = i64::try_from(document.sequence).unwrap_or(i64::MAX);
    let sql = "INSERT OR REPLACE INTO trust (vm, signer, own, sequence, envelope, given_ms) \
               VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
    let (signer, own, envelope) = (document.signer, document.own, &document.envelope);
    c.execute(sql, params![vm, signer, own, sequence, envelope, now_ms])
        .map(drop)
}

/// What a VM is to be given: of each signer the newest.
pub fn of_vm(c: &Connection, vm: &str) -> rusqlite::Result<Vec<Document>> {
    let sql = "SELECT signer, own, sequence, envelope FROM trust WHERE vm = '' OR vm = ?1 \
               ORDER BY signer, own, sequence DESC";
    let mut statement = c.prepare(sql)?;
    let rows = statement.query_map([vm], |r| {
        Ok(Document {
            signer: r.get(0)?,
            own: r.get(1)?,
            sequence: number(r.get(2)?),
            envelope: r.get(3)?,
        })
    })?;
    let mut documents = rows.collect::<rusqlite::Result<Vec<_>>>()?;
    documents.dedup_by_key(|d| (d.signer, d.own));
    Ok(documents)
}

/// All of them, without their bytes.
pub fn all(c: &Connection) -> rusqlite::Result<Vec<Row>> {
    let sql = "SELECT vm, signer, own, sequence, given_ms FROM trust ORDER BY vm, signer, own";
    let mut statement = c.prepare(sql)?;
    let rows = statement.query_map([], |r| {
        Ok(Row {
            vm: r.get(0)?,
            signer: r.get(1)?,
            own: r.get(2)?,
            sequence: number(r.get(3)?),
            given_ms: r.get(4)?,
        })
    })?;
    rows.collect()
}

/// Forgets what a signer has said, everywhere or for one VM. Returns how many.
pub fn forget(c: &Connection, signer: [u8; 16], vm: Option<&str>) -> rusqlite::Result<usize> {
    match vm {
        Some(vm) => {
            let sql = "DELETE FROM trust WHERE signer = ?1 AND vm = ?2";
            c.execute(sql, params![signer, vm])
        }
        None => c.execute("DELETE FROM trust WHERE signer = ?1", [signer]),
    }
}

/// Forgets what is kept for a VM.
pub fn delete(c: &Connection, vm: &str) -> rusqlite::Result<()> {
    c.execute("DELETE FROM trust WHERE vm = ?1 AND vm != ''", [vm])
        .map(drop)
}
