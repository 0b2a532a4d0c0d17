//! The tables, and how those of an earlier aditd become today's: one step a version, none is ever changed again.

use adit_tasks::goal::OUTPUT_CAP_MAX;
use adit_tasks::{Goal, dsse};
use rusqlite::{Connection, params};

use super::db::Migration;

/// All steps, the first from nothing.
pub const MIGRATIONS: &[Migration] = &[first, limits, specs, waiting, enrolments, trust, locks];

/// Bytes of each output stream that a goal lets a step keep.
pub fn output_cap(goal: &Goal, step: &str) -> u32 {
    let step = goal.step(step);
    step.map_or(OUTPUT_CAP_MAX, |s| s.action.output_cap())
}

/// Version 1.
fn first(c: &Connection) -> rusqlite::Result<()> {
    c.execute_batch(
        "
CREATE TABLE vms (
    name TEXT PRIMARY KEY, cid INTEGER NOT NULL UNIQUE, allow TEXT NOT NULL, allow_vsock TEXT NOT NULL
) STRICT;
CREATE TABLE goals (
    digest BLOB PRIMARY KEY, goal_id TEXT NOT NULL UNIQUE, key_seq INTEGER NOT NULL, not_after_ms INTEGER NOT NULL,
    envelope BLOB NOT NULL, accepted_ms INTEGER NOT NULL
) STRICT;
CREATE TABLE tasks (
    task_id BLOB PRIMARY KEY, digest BLOB NOT NULL REFERENCES goals, vm TEXT NOT NULL, step TEXT NOT NULL,
    step_no INTEGER NOT NULL, attempt INTEGER NOT NULL, idempotent INTEGER NOT NULL, continue_on_error INTEGER NOT NULL,
    state TEXT NOT NULL, exit INTEGER, reason TEXT NOT NULL DEFAULT '', queued_ms INTEGER NOT NULL,
    started_ms INTEGER, ended_ms INTEGER,
    out_head BLOB NOT NULL DEFAULT x'', out_tail BLOB NOT NULL DEFAULT x'', out_total INTEGER NOT NULL DEFAULT 0,
    err_head BLOB NOT NULL DEFAULT x'', err_tail BLOB NOT NULL DEFAULT x'', err_total INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX tasks_open ON tasks (vm, state);
CREATE INDEX tasks_of_goal ON tasks (digest);
",
    )
}

/// Version 2: what a goal allows is known without its envelope; when a task ended by this host's clock, and how much of
/// it is kept.
fn limits(c: &Connection) -> rusqlite::Result<()> {
    c.execute_batch(
        "
ALTER TABLE goals ADD COLUMN not_before_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE goals ADD COLUMN signer TEXT NOT NULL DEFAULT '';
ALTER TABLE tasks ADD COLUMN output_cap INTEGER NOT NULL DEFAULT 262144;
ALTER TABLE tasks ADD COLUMN closed_ms INTEGER;
ALTER TABLE tasks ADD COLUMN kept_bytes INTEGER NOT NULL DEFAULT 0;
UPDATE tasks SET closed_ms = queued_ms,
    kept_bytes = length(out_head) + length(out_tail) + length(err_head) + length(err_tail)
    WHERE state NOT IN ('queued', 'leased', 'started');
CREATE INDEX tasks_closed ON tasks (vm, closed_ms, kept_bytes) WHERE closed_ms IS NOT NULL;
CREATE INDEX tasks_by_age ON tasks (closed_ms) WHERE closed_ms IS NOT NULL;
CREATE INDEX tasks_of_vm ON tasks (vm);
",
    )?;
    let digests: Vec<[u8; 32]> = c
        .prepare("SELECT DISTINCT digest FROM tasks WHERE closed_ms IS NULL")?
        .query_map([], |r| r.get(0))?
        .collect::<Result<_, _>>()?;
    for digest in digests {
        let sql = "SELECT envelope FROM goals WHERE digest = ?1";
        let envelope: Vec<u8> = c.query_row(sql, [digest], |r| r.get(0))?;
        // One that is not understood is handed out as ever; the guest refuses it.
        let Ok(envelope) = dsse::Envelope::parse(&envelope) else {
            continue;
        };
        let Ok(goal) = Goal::parse_unverified(envelope.unverified_payload()) else {
            continue;
        };
        c.execute(
            "UPDATE goals SET not_before_ms = ?2, signer = ?3 WHERE digest = ?1",
            params![digest, goal.not_before.as_millisecond(), signer(&envelope)],
        )?;
        for step in &goal.steps {
            c.execute(
                "UPDATE tasks SET output_cap = ?3 WHERE digest = ?1 AND step = ?2",
                params![digest, step.id, output_cap(&goal, &step.id)],
            )?;
        }
    }
    Ok(())
}

/// Version 3: all settings of a VM are one JSON value.
fn specs(c: &Connection) -> rusqlite::Result<()> {
    c.execute_batch(
        "
ALTER TABLE vms ADD COLUMN spec TEXT NOT NULL DEFAULT '';
UPDATE vms SET
    spec = json_object('name', name, 'cid', cid, 'allow', json(allow), 'allow_vsock', json(allow_vsock));
ALTER TABLE vms DROP COLUMN allow;
ALTER TABLE vms DROP COLUMN allow_vsock;
",
    )
}

/// Version 4: what is open is found without reading what has ended, of which there is much more.
fn waiting(c: &Connection) -> rusqlite::Result<()> {
    c.execute_batch(
        "
DROP INDEX tasks_open;
CREATE INDEX tasks_waiting ON tasks (vm, state, digest) WHERE closed_ms IS NULL;
",
    )
}

/// Version 5: which cards were believed, and whose keys were heard.
fn enrolments(c: &Connection) -> rusqlite::Result<()> {
    c.execute_batch(
        "
CREATE TABLE enrolments (vm TEXT PRIMARY KEY, generation INTEGER NOT NULL, guest_pk BLOB) STRICT;
",
    )
}

/// Version 6: trust documents for guests, and the ids that guests were given.
fn trust(c: &Connection) -> rusqlite::Result<()> {
    c.execute_batch(
        "
CREATE TABLE trust (
    vm TEXT NOT NULL, signer BLOB NOT NULL, own INTEGER NOT NULL, sequence INTEGER NOT NULL, envelope BLOB NOT NULL,
    given_ms INTEGER NOT NULL, PRIMARY KEY (vm, signer, own)
) STRICT;
CREATE TABLE identities (id BLOB PRIMARY KEY, vm TEXT NOT NULL, given_ms INTEGER NOT NULL) STRICT;
CREATE INDEX identities_of_vm ON identities (vm, given_ms);
",
    )
}

/// Version 7: which VMs are locked.
fn locks(c: &Connection) -> rusqlite::Result<()> {
    c.execute_batch(
        "
CREATE TABLE locks (vm TEXT PRIMARY KEY, reason TEXT NOT NULL, by TEXT NOT NULL, since_ms INTEGER NOT NULL) STRICT;
",
    )
}

/// Who claims to have signed it.
pub fn signer(envelope: &dsse::Envelope) -> String {
    envelope
        .unverified_signer()
        .map_or_else(String::new, |id| id.to_string())
}
