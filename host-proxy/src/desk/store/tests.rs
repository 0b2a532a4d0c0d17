//! The database: what is on disk, full disks, damaged files, earlier versions.

use super::db::{Db, DbError, would_take};
use super::page::Filter;
use super::*;
use crate::desk::DeskError;
use crate::desk::tests::{AFTER, BEFORE, add_goal, goal, lease, tasks};

/// Another connection to the same file.
fn also(path: &std::path::Path) -> Connection {
    let c = Connection::open(path).unwrap();
    c.execute_batch(SCHEMA.session).unwrap();
    c
}

#[tokio::test]
async fn an_answer_means_on_disk_and_a_failed_job_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aditd.db");
    let db = Db::open(&path, &SCHEMA).unwrap();
    let added = db.run(|c| add_goal(c, &goal(1, 5)));
    let failed = db.run::<(), DeskError, _>(|c| {
        add_goal(c, &goal(2, 6))?;
        Err(DeskError::Unknown)
    });
    let (added, failed) = tokio::join!(added, failed);
    assert!(added.is_ok() && failed.is_err());
    let other = also(&path);
    assert_eq!(tasks(&other, &Filter::default()).unwrap().len(), 2);
}

#[tokio::test]
async fn r76_a_full_disk_refuses_new_work_whole_and_keeps_the_old() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aditd.db");
    let db = Db::open(&path, &SCHEMA).unwrap();
    db.run(|c| add_goal(c, &goal(1, 5))).await.unwrap();
    // As many pages as there are now, and no more.
    db.run::<_, DeskError, _>(|c| {
        let pages: i64 = c.query_row("PRAGMA page_count", [], |r| r.get(0))?;
        Ok(c.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(()))?)
    })
    .await
    .unwrap();
    // Together, so that they share transactions: what does not fit must not take along what was said yes to.
    let mut large = goal(2, 6);
    large.envelope = vec![b'x'; 256 << 10];
    let (refused, small, refused_too) = tokio::join!(
        db.run(move |c| add_goal(c, &large)),
        db.run(|c| Ok::<_, DeskError>(lease(c, "web-1", BEFORE)?.map(|h| h.task_id))),
        db.run(|c| {
            let mut large = goal(3, 7);
            large.envelope = vec![b'x'; 256 << 10];
            add_goal(c, &large)
        }),
    );
    assert!(refused.is_err() && refused_too.is_err());
    let other = also(&path);
    let all = tasks(&other, &Filter::default()).unwrap();
    assert_eq!(all.len(), 2);
    let leased = all.iter().any(|t| t.state == TaskState::Leased);
    assert_eq!(leased, small.is_ok());
    // Space is there again: so is the queue.
    db.run::<_, DeskError, _>(|c| {
        Ok(c.query_row("PRAGMA max_page_count = 1000000", [], |_| Ok(()))?)
    })
    .await
    .unwrap();
    db.run(|c| add_goal(c, &goal(4, 8))).await.unwrap();
}

#[tokio::test]
async fn a_transaction_that_is_gone_takes_all_its_jobs_along() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aditd.db");
    let db = Db::open(&path, &SCHEMA).unwrap();
    // After some errors SQLite ends the transaction by itself.
    let (before, ends, after) = tokio::join!(
        db.run(|c| add_goal(c, &goal(1, 5))),
        db.run::<(), DeskError, _>(|c| Ok(c.execute_batch("ROLLBACK")?)),
        db.run(|c| add_goal(c, &goal(2, 6))),
    );
    assert!(ends.is_err());
    let known = tasks(&also(&path), &Filter::default()).unwrap();
    let acked = 2 * [before.is_ok(), after.is_ok()]
        .iter()
        .filter(|ok| **ok)
        .count();
    assert_eq!(known.len(), acked);
}

#[test]
fn a_database_of_a_newer_aditd_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aditd.db");
    drop(Db::open(&path, &SCHEMA).unwrap());
    let c = also(&path);
    c.pragma_update(None, "user_version", SCHEMA.migrations.len() as i64 + 1)
        .unwrap();
    drop(c);
    assert!(matches!(
        Db::open(&path, &SCHEMA),
        Err(DbError::Newer { .. })
    ));
}

#[test]
fn whether_a_database_would_be_taken_is_asked_without_changing_anything() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("a%20b?c#d");
    let path = dir.join("aditd.db");
    let taken = || would_take(&path, &SCHEMA);
    taken().unwrap();
    std::fs::create_dir(&dir).unwrap();
    taken().unwrap();
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
    // One that runs on it has written a newer schema, which is in its log yet.
    let db = Db::open(&path, &SCHEMA).unwrap();
    taken().unwrap();
    let c = also(&path);
    let set = |version: usize| {
        c.pragma_update(None, "user_version", version as i64)
            .unwrap()
    };
    set(SCHEMA.migrations.len() + 1);
    assert!(matches!(taken(), Err(DbError::Newer { .. })));
    set(SCHEMA.migrations.len());
    taken().unwrap();
    drop((c, db));
    // The thread of the database has closed it when its files are gone.
    let files = || std::fs::read_dir(&dir).unwrap().count();
    while files() > 1 {
        std::thread::yield_now();
    }
    taken().unwrap();
    assert_eq!(files(), 1);
    let c = also(&path);
    c.pragma_update(None, "user_version", SCHEMA.migrations.len() as i64 + 1)
        .unwrap();
    drop(c);
    assert!(matches!(taken(), Err(DbError::Newer { .. })));
    assert_eq!(files(), 1);
}

#[test]
fn what_is_open_is_found_without_reading_what_has_ended() {
    let c = crate::desk::tests::open();
    for sql in [
        COUNT_OPEN,
        OPEN_IN_ORDER,
        OPEN_OF_VM,
        OPEN_OF_PAST_GOALS,
        FIRST_NOT_AFTER,
        FIRST_NOT_BEFORE,
        RELEASED,
    ] {
        let mut plan = c.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
        // Its parameters stay unbound: it is not run.
        let mut rows = plan.raw_query();
        let mut steps = Vec::new();
        while let Some(row) = rows.next().unwrap() {
            steps.push(row.get::<_, String>("detail").unwrap());
        }
        assert!(steps[0].contains("tasks_waiting"), "{sql}: {steps:?}");
        assert!(
            steps[1..].iter().all(|s| !s.starts_with("SCAN")),
            "{sql}: {steps:?}"
        );
    }
}

/// The text of version 1's tables, as they are on disks.
const VERSION_1: &str = "
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
PRAGMA user_version = 1;
";

#[tokio::test]
async fn r79_a_database_of_version_1_opens_with_all_that_is_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aditd.db");
    let payload = goal(1, 5).envelope;
    let payload = String::from_utf8(payload).unwrap().replace(
        r#""script": "x"}},"#,
        r#""script": "x", "output_cap": 100}},"#,
    );
    let key = ed25519_dalek::SigningKey::from_bytes(&[7; 32]);
    let envelope = adit_tasks::dsse::sign(payload.as_bytes(), &key);
    let c = also(&path);
    c.execute_batch(VERSION_1).unwrap();
    let vm = "INSERT INTO vms VALUES ('web-1', 3, '[80,22]', '[5000]')";
    c.execute(vm, []).unwrap();
    let (id, ended) = ([4u8; 16], [5u8; 16]);
    c.execute(
        "INSERT INTO goals VALUES (?1, 'g', 5, ?2, ?3, 1)",
        params![[1u8; 32], AFTER, envelope.into_bytes()],
    )
    .unwrap();
    let sql = "INSERT INTO tasks (task_id, digest, vm, step, step_no, attempt, idempotent, continue_on_error, state, \
               queued_ms, out_head) VALUES (?1, ?2, 'web-1', 'a', 0, 1, 0, 0, ?3, 17, x'313233')";
    c.execute(sql, params![ended, [1u8; 32], "done"]).unwrap();
    c.execute(sql, params![id, [1u8; 32], "leased"]).unwrap();
    drop(c);
    let db = Db::open(&path, &SCHEMA).unwrap();
    let leased = db.run(|c| lease(c, "web-1", BEFORE)).await.unwrap();
    assert_eq!(leased.unwrap().task_id, id);
    let other = also(&path);
    let columns = "SELECT g.not_before_ms, g.signer != '', t.output_cap, t.closed_ms, t.kept_bytes FROM tasks t \
                   JOIN goals g USING (digest) WHERE task_id = ?1";
    let row = |id| {
        other
            .query_row(columns, [id], |r| {
                Ok((
                    r.get::<_, i64>(0)?,
                    r.get::<_, bool>(1)?,
                    r.get::<_, u32>(2)?,
                    r.get::<_, Option<i64>>(3)?,
                    r.get::<_, u32>(4)?,
                ))
            })
            .unwrap()
    };
    let not_before = BEFORE - 7_200_000;
    assert_eq!(row(id), (not_before, true, 100, None, 0));
    assert_eq!(row(ended), (not_before, true, 100, Some(17), 3));
    let spec = other.query_row(
        "SELECT spec FROM vms WHERE name = 'web-1' AND cid = 3",
        [],
        |r| r.get::<_, String>(0),
    );
    let spec: crate::config::VmConfig = serde_json::from_str(&spec.unwrap()).unwrap();
    let mut want = crate::config::VmConfig::new("web-1".parse().unwrap(), 3);
    (want.allow, want.allow_vsock) = (vec![80, 22], vec![5000]);
    assert_eq!(spec, want);
}

#[test]
fn r79_a_damaged_truncated_or_foreign_file_is_refused_by_name_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aditd.db");
    drop(Db::open(&path, &SCHEMA).unwrap());
    let c = also(&path);
    for n in 1..=9 {
        add_goal(&c, &goal(n, n.into())).unwrap_or_default();
    }
    c.execute_batch("PRAGMA wal_checkpoint(TRUNCATE); PRAGMA journal_mode = DELETE")
        .unwrap();
    let before = tasks(&c, &Filter::default()).unwrap();
    drop(c);
    let whole = std::fs::read(&path).unwrap();
    let opened = |bytes: &[u8], what: &str| {
        let path = dir.path().join("copy.db");
        for more in ["copy.db-wal", "copy.db-shm"] {
            let _ = std::fs::remove_file(dir.path().join(more));
        }
        std::fs::write(&path, bytes).unwrap();
        match Db::open(&path, &SCHEMA) {
            Ok(_) => true,
            Err(e) => {
                let by_name = matches!(
                    e,
                    DbError::Damaged { .. } | DbError::Foreign { .. } | DbError::Newer { .. }
                ) || matches!(&e, DbError::Sqlite(e) if e.sqlite_error_code() == Some(rusqlite::ErrorCode::NotADatabase));
                assert!(by_name && !e.remedy(&path).is_empty(), "{what}: {e:?}");
                assert_eq!(std::fs::read(&path).unwrap(), bytes, "{what}: written to");
                false
            }
        }
    };
    for cut in (512..whole.len()).step_by(512) {
        assert!(!opened(&whole[..cut], "cut"), "cut at {cut}: taken");
    }
    // One bit of every 97th byte: refused, or what aditd acts by is what it was.
    for at in (0..whole.len()).step_by(97) {
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << (at % 8);
        if opened(&flipped, &format!("bit of byte {at}")) {
            let c = also(&dir.path().join("copy.db"));
            let now = tasks(&c, &Filter::default());
            assert!(
                now.is_err() || now.unwrap().len() == before.len(),
                "byte {at}"
            );
        }
    }
    let path = dir.path().join("other.db");
    let c = also(&path);
    c.execute_batch("CREATE TABLE songs (name TEXT)").unwrap();
    drop(c);
    assert!(matches!(
        Db::open(&path, &SCHEMA),
        Err(DbError::Foreign { .. })
    ));
}

#[tokio::test]
async fn r77_after_a_commit_that_failed_the_database_is_opened_and_checked_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aditd.db");
    let db = Db::open(&path, &SCHEMA).unwrap();
    db.run(|c| add_goal(c, &goal(1, 5))).await.unwrap();
    // What the connection has to itself is how another one is told from it.
    db.run::<_, DeskError, _>(|c| Ok(c.execute_batch("CREATE TEMP TABLE mark (n)")?))
        .await
        .unwrap();
    let marked = || {
        db.run::<i64, DeskError, _>(|c| {
            let sql = "SELECT count(*) FROM sqlite_temp_schema WHERE name = 'mark'";
            Ok(c.query_row(sql, [], |r| r.get(0))?)
        })
    };
    assert_eq!(marked().await.unwrap(), 1);
    // The statement is well, and the commit is not: what it names is not there at its end.
    let failed = db.run::<(), DeskError, _>(|c| {
        c.execute_batch("PRAGMA defer_foreign_keys = ON; UPDATE tasks SET digest = x'00'")?;
        Ok(())
    });
    assert!(matches!(
        failed.await,
        Err(DeskError::Db(DbError::Commit(_)))
    ));
    assert_eq!(marked().await.unwrap(), 0, "the same connection goes on");
    db.run(|c| add_goal(c, &goal(2, 6))).await.unwrap();
    let other = also(&path);
    assert_eq!(tasks(&other, &Filter::default()).unwrap().len(), 4);
}

#[tokio::test]
async fn r77_a_database_that_is_damaged_meanwhile_takes_no_work() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aditd.db");
    let db = Db::open(&path, &SCHEMA).unwrap();
    db.run(|c| add_goal(c, &goal(1, 5))).await.unwrap();
    let other = also(&path);
    other
        .execute_batch("PRAGMA foreign_keys = OFF; DELETE FROM goals")
        .unwrap();
    let fails = || {
        db.run::<(), DeskError, _>(|c| {
            c.execute_batch("PRAGMA defer_foreign_keys = ON; UPDATE tasks SET digest = x'00'")?;
            Ok(())
        })
    };
    assert!(fails().await.is_err());
    let refused = db
        .run(|c| Ok::<_, DeskError>(count_open(c, "web-1")?))
        .await;
    assert!(
        matches!(refused, Err(DeskError::Db(DbError::Commit(_)))),
        "{refused:?}"
    );
    // It is mended, and taken up without a restart.
    other.execute_batch("DELETE FROM tasks").unwrap();
    assert_eq!(
        db.run(|c| Ok::<_, DeskError>(count_open(c, "web-1")?))
            .await
            .unwrap(),
        0
    );
}
