//! The queue over a real database file.

mod lists;

use super::page::{Filter, page};
use super::retention::{Keep, retire, trim};
use super::schema::MIGRATIONS;
use super::*;
use crate::db::Db;

const GOAL: &str = r#"{"goal_id": "01937b5e-0000-7000-8000-00000000000N", "key_seq": SEQ, "audience": {"vms": ["web-1"]},
 "not_before": "2026-11-20T22:00:00Z", "not_after": "2026-11-21T22:00:00Z", "min_planner": 1, "steps": [
 {"id": "a", "script": {"interpreter": "/bin/sh", "script": "x"}},
 {"id": "b", "idempotent": true, "script": {"interpreter": "/bin/sh", "script": "x"}}]}"#;
const BEFORE: i64 = 1_795_219_200_000; // 2026-11-21T00:00:00Z
const AFTER: i64 = BEFORE + 86_400_000;

fn goal(n: u8, seq: u64) -> NewGoal {
    let text = GOAL
        .replace('N', &n.to_string())
        .replace("SEQ", &seq.to_string());
    NewGoal {
        goal: Goal::parse_unverified(text.as_bytes()).unwrap(),
        digest: [n; 32],
        envelope: text.into_bytes(),
        signer: "k".into(),
        vms: vec!["web-1".parse().unwrap()],
        now_ms: BEFORE,
        max_queued: 8,
    }
}

fn open() -> Connection {
    let c = Connection::open_in_memory().unwrap();
    for migrate in MIGRATIONS {
        migrate(&c).unwrap();
    }
    c
}

fn tasks(c: &Connection, filter: &Filter) -> Result<Vec<Task>, QueueError> {
    Ok(page(c, filter, 0, usize::MAX)?.0)
}

fn report(id: TaskId, outcome: Outcome) -> Report {
    Report {
        task_id: id,
        outcome,
        exit: Some(0),
        reason: String::new(),
        started_ms: 1,
        ended_ms: 2,
        stdout: Captured {
            head: b"hi\n".to_vec(),
            tail: Vec::new(),
            total: 3,
        },
        stderr: Captured::default(),
        boot_nonce: [0; 16],
    }
}

fn states(c: &Connection) -> Vec<(String, u32, TaskState)> {
    tasks(c, &Filter::default())
        .unwrap()
        .into_iter()
        .map(|t| (t.step, t.attempt, t.state))
        .collect()
}

#[test]
fn tasks_are_handed_out_in_order_of_sequence_and_step_until_they_end() {
    let c = open();
    add_goal(&c, &goal(2, 9)).unwrap();
    add_goal(&c, &goal(1, 5)).unwrap();
    let mut order = Vec::new();
    while let Some(h) = lease(&c, "web-1", BEFORE).unwrap() {
        // A lost connection: the same task again.
        assert_eq!(
            lease(&c, "web-1", BEFORE).unwrap().unwrap().task_id,
            h.task_id
        );
        order.push((h.envelope == goal(1, 5).envelope, h.step));
        finish(&c, "web-1", &report(h.task_id, Outcome::Done), 0).unwrap();
    }
    let want = [(true, "a"), (true, "b"), (false, "a"), (false, "b")];
    assert_eq!(order, want.map(|(first, step)| (first, step.to_owned())));
}

#[test]
fn a_failed_step_skips_the_later_ones() {
    let c = open();
    add_goal(&c, &goal(1, 5)).unwrap();
    let first = lease(&c, "web-1", BEFORE).unwrap().unwrap();
    let changed = finish(&c, "web-1", &report(first.task_id, Outcome::Failed), 0).unwrap();
    assert_eq!(changed.len(), 2);
    assert_eq!(
        states(&c),
        [
            ("a".into(), 1, TaskState::Failed),
            ("b".into(), 1, TaskState::Skipped)
        ]
    );
    assert!(lease(&c, "web-1", BEFORE).unwrap().is_none());
}

#[test]
fn an_interrupted_idempotent_step_gets_another_attempt_at_most_three_in_all() {
    let c = open();
    add_goal(&c, &goal(1, 5)).unwrap();
    let first = lease(&c, "web-1", BEFORE).unwrap().unwrap();
    finish(&c, "web-1", &report(first.task_id, Outcome::Done), 0).unwrap();
    for attempt in 1..=ATTEMPTS_MAX {
        let h = lease(&c, "web-1", BEFORE).unwrap().unwrap();
        assert_eq!((h.step.as_str(), h.attempt), ("b", attempt));
        finish(&c, "web-1", &report(h.task_id, Outcome::Interrupted), 0).unwrap();
    }
    assert!(lease(&c, "web-1", BEFORE).unwrap().is_none());
    assert!(
        states(&c)[1..]
            .iter()
            .all(|(_, _, s)| *s == TaskState::Interrupted)
    );
}

#[test]
fn r104_first_terminal_state_wins_and_foreign_reports_are_dropped() {
    let c = open();
    add_goal(&c, &goal(1, 5)).unwrap();
    let id = task_id(&[1; 32], &"web-1".parse().unwrap(), "a", 1);
    let e = finish(&c, "web-1", &report(id, Outcome::Done), 0);
    assert!(matches!(e, Err(QueueError::NotLeased)), "{e:?}");
    lease(&c, "web-1", BEFORE).unwrap();
    let e = finish(&c, "web-2", &report(id, Outcome::Done), 0);
    assert!(matches!(e, Err(QueueError::Unknown)), "{e:?}");
    finish(&c, "web-1", &report(id, Outcome::Done), 0).unwrap();
    assert!(
        finish(&c, "web-1", &report(id, Outcome::Failed), 0)
            .unwrap()
            .is_empty()
    );
    assert_eq!(task(&c, &id).unwrap().state, TaskState::Done);
    assert_eq!(output(&c, &id, false).unwrap().head, b"hi\n");
}

#[test]
fn a_goal_is_queued_once_and_its_id_names_one_content() {
    let c = open();
    let first = add_goal(&c, &goal(1, 5)).unwrap();
    assert_eq!(add_goal(&c, &goal(1, 5)).unwrap(), first);
    let mut other = goal(1, 5);
    other.digest = [9; 32];
    assert!(matches!(
        add_goal(&c, &other),
        Err(QueueError::GoalTaken { .. })
    ));
}

#[test]
fn r75_a_full_queue_refuses_and_names_its_limit() {
    let c = open();
    for n in 1..=4 {
        add_goal(&c, &goal(n, n.into())).unwrap();
    }
    assert!(matches!(
        add_goal(&c, &goal(5, 5)),
        Err(QueueError::Full {
            queued: 8,
            max: 8,
            ..
        })
    ));
}

#[test]
fn what_waits_too_long_expires_and_what_was_handed_out_does_not() {
    let c = open();
    add_goal(&c, &goal(1, 5)).unwrap();
    lease(&c, "web-1", BEFORE).unwrap();
    let (none, next) = expire(&c, BEFORE).unwrap();
    assert!(none.is_empty() && next == Some(AFTER - 7_200_000));
    // What was handed out is handed out again; had it waited, it would not be.
    assert!(lease(&c, "web-1", AFTER).unwrap().is_some());
    add_goal(&c, &goal(2, 4)).unwrap();
    let next = lease(&c, "web-1", AFTER).unwrap().unwrap();
    assert_eq!(next.envelope, goal(1, 5).envelope);
    let (ended, next) = expire(&c, AFTER).unwrap();
    let silent = AFTER - 7_200_000 + SILENCE_MAX_MS;
    assert_eq!((ended.len(), next), (3, Some(silent)));
    assert_eq!(
        states(&c)
            .into_iter()
            .map(|(_, _, s)| s)
            .collect::<Vec<_>>(),
        [
            TaskState::Leased,
            TaskState::Expired,
            TaskState::Expired,
            TaskState::Expired
        ]
    );
}

#[test]
fn what_was_handed_out_and_stays_silent_ends_and_a_late_report_changes_nothing() {
    let c = open();
    add_goal(&c, &goal(1, 5)).unwrap();
    let id = lease(&c, "web-1", BEFORE).unwrap().unwrap().task_id;
    started(&c, "web-1", &id, BEFORE).unwrap();
    let due = AFTER - 7_200_000 + SILENCE_MAX_MS;
    let (ended, _) = expire(&c, due).unwrap();
    assert_eq!(ended.len(), 1, "the step that waited: {ended:?}");
    let (ended, next) = expire(&c, due + 1).unwrap();
    assert_eq!((ended[0].state, next), (TaskState::LostContact, None));
    assert!(
        finish(&c, "web-1", &report(id, Outcome::Done), due + 2)
            .unwrap()
            .is_empty()
    );
    assert_eq!(task(&c, &id).unwrap().state, TaskState::LostContact);
}

#[test]
fn a_removed_vm_leaves_no_open_task() {
    let c = open();
    add_goal(&c, &goal(1, 5)).unwrap();
    lease(&c, "web-1", BEFORE).unwrap().unwrap();
    assert!(remove_vm(&c, "web-2", BEFORE).unwrap().is_empty());
    let ended = remove_vm(&c, "web-1", BEFORE).unwrap();
    let states: Vec<_> = ended.iter().map(|t| t.state).collect();
    assert_eq!(states, [TaskState::LostContact, TaskState::Expired]);
    assert!(remove_vm(&c, "web-1", BEFORE).unwrap().is_empty());
}

#[tokio::test]
async fn an_answer_means_on_disk_and_a_failed_job_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aditd.db");
    let db = Db::open(&path, MIGRATIONS).unwrap();
    let added = db.run(|c| add_goal(c, &goal(1, 5)));
    let failed = db.run::<(), QueueError, _>(|c| {
        add_goal(c, &goal(2, 6))?;
        Err(QueueError::Unknown)
    });
    let (added, failed) = tokio::join!(added, failed);
    assert!(added.is_ok() && failed.is_err());
    let other = Connection::open(&path).unwrap();
    assert_eq!(tasks(&other, &Filter::default()).unwrap().len(), 2);
}

#[tokio::test]
async fn r76_a_full_disk_refuses_new_work_whole_and_keeps_the_old() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aditd.db");
    let db = Db::open(&path, MIGRATIONS).unwrap();
    db.run(|c| add_goal(c, &goal(1, 5))).await.unwrap();
    // As many pages as there are now, and no more.
    db.run::<_, QueueError, _>(|c| {
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
        db.run(|c| Ok::<_, QueueError>(lease(c, "web-1", BEFORE)?.map(|h| h.task_id))),
        db.run(|c| {
            let mut large = goal(3, 7);
            large.envelope = vec![b'x'; 256 << 10];
            add_goal(c, &large)
        }),
    );
    assert!(refused.is_err() && refused_too.is_err());
    let other = Connection::open(&path).unwrap();
    let all = tasks(&other, &Filter::default()).unwrap();
    assert_eq!(all.len(), 2);
    let leased = all.iter().any(|t| t.state == TaskState::Leased);
    assert_eq!(leased, small.is_ok());
    // Space is there again: so is the queue.
    db.run::<_, QueueError, _>(|c| {
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
    let db = Db::open(&path, MIGRATIONS).unwrap();
    // After some errors SQLite ends the transaction by itself.
    let (before, ends, after) = tokio::join!(
        db.run(|c| add_goal(c, &goal(1, 5))),
        db.run::<(), QueueError, _>(|c| Ok(c.execute_batch("ROLLBACK")?)),
        db.run(|c| add_goal(c, &goal(2, 6))),
    );
    assert!(ends.is_err());
    let known = tasks(&Connection::open(&path).unwrap(), &Filter::default()).unwrap();
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
    drop(Db::open(&path, MIGRATIONS).unwrap());
    let c = Connection::open(&path).unwrap();
    c.pragma_update(None, "user_version", MIGRATIONS.len() as i64 + 1)
        .unwrap();
    drop(c);
    assert!(matches!(
        Db::open(&path, MIGRATIONS),
        Err(DbError::Newer { .. })
    ));
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
    let c = Connection::open(&path).unwrap();
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
    let db = Db::open(&path, MIGRATIONS).unwrap();
    let leased = db.run(|c| lease(c, "web-1", BEFORE)).await.unwrap();
    assert_eq!(leased.unwrap().task_id, id);
    let other = Connection::open(&path).unwrap();
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
    drop(Db::open(&path, MIGRATIONS).unwrap());
    let c = Connection::open(&path).unwrap();
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
        match Db::open(&path, MIGRATIONS) {
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
            let c = Connection::open(dir.path().join("copy.db")).unwrap();
            let now = tasks(&c, &Filter::default());
            assert!(
                now.is_err() || now.unwrap().len() == before.len(),
                "byte {at}"
            );
        }
    }
    let path = dir.path().join("other.db");
    let c = Connection::open(&path).unwrap();
    c.execute_batch("CREATE TABLE songs (name TEXT)").unwrap();
    drop(c);
    assert!(matches!(
        Db::open(&path, MIGRATIONS),
        Err(DbError::Foreign { .. })
    ));
}

#[tokio::test]
async fn r77_after_a_commit_that_failed_the_database_is_opened_and_checked_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aditd.db");
    let db = Db::open(&path, MIGRATIONS).unwrap();
    db.run(|c| add_goal(c, &goal(1, 5))).await.unwrap();
    // What the connection has to itself is how another one is told from it.
    db.run::<_, QueueError, _>(|c| Ok(c.execute_batch("CREATE TEMP TABLE mark (n)")?))
        .await
        .unwrap();
    let marked = || {
        db.run::<i64, QueueError, _>(|c| {
            let sql = "SELECT count(*) FROM sqlite_temp_schema WHERE name = 'mark'";
            Ok(c.query_row(sql, [], |r| r.get(0))?)
        })
    };
    assert_eq!(marked().await.unwrap(), 1);
    // The statement is well, and the commit is not: what it names is not there at its end.
    let failed = db.run::<(), QueueError, _>(|c| {
        c.execute_batch("PRAGMA defer_foreign_keys = ON; UPDATE tasks SET digest = x'00'")?;
        Ok(())
    });
    assert!(matches!(
        failed.await,
        Err(QueueError::Db(DbError::Commit(_)))
    ));
    assert_eq!(marked().await.unwrap(), 0, "the same connection goes on");
    db.run(|c| add_goal(c, &goal(2, 6))).await.unwrap();
    let other = Connection::open(&path).unwrap();
    assert_eq!(tasks(&other, &Filter::default()).unwrap().len(), 4);
}

#[tokio::test]
async fn r77_a_database_that_is_damaged_meanwhile_takes_no_work() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aditd.db");
    let db = Db::open(&path, MIGRATIONS).unwrap();
    db.run(|c| add_goal(c, &goal(1, 5))).await.unwrap();
    let other = Connection::open(&path).unwrap();
    other
        .execute_batch("PRAGMA foreign_keys = OFF; DELETE FROM goals")
        .unwrap();
    let fails = || {
        db.run::<(), QueueError, _>(|c| {
            c.execute_batch("PRAGMA defer_foreign_keys = ON; UPDATE tasks SET digest = x'00'")?;
            Ok(())
        })
    };
    assert!(fails().await.is_err());
    let refused = db.run(|c| queued(c, "web-1")).await;
    assert!(
        matches!(refused, Err(QueueError::Db(DbError::Commit(_)))),
        "{refused:?}"
    );
    // It is mended, and taken up without a restart.
    other.execute_batch("DELETE FROM tasks").unwrap();
    assert_eq!(db.run(|c| queued(c, "web-1")).await.unwrap(), 0);
}

fn scheduled(n: u8, seq: u64, not_before: &str, signer: &str) -> NewGoal {
    let mut new = goal(n, seq);
    new.goal.not_before = not_before.parse().unwrap();
    new.signer = signer.into();
    new
}

#[test]
fn a_goal_whose_time_is_to_come_is_held_and_so_are_later_ones_of_its_key() {
    const AT: &str = "2026-11-21T06:00:00Z";
    let at = AT.parse::<Timestamp>().unwrap().as_millisecond();
    let c = open();
    let queued = add_goal(&c, &scheduled(1, 5, AT, "k")).unwrap();
    assert!(queued[0].reason.contains(AT), "{}", queued[0].reason);
    assert!(lease(&c, "web-1", BEFORE).unwrap().is_none());
    // The guest would refuse the first one, once a later one of its key was admitted.
    add_goal(&c, &goal(2, 6)).unwrap();
    assert!(lease(&c, "web-1", BEFORE).unwrap().is_none());
    // One of another key is not in its way.
    add_goal(&c, &scheduled(3, 7, "2026-11-20T22:00:00Z", "other")).unwrap();
    let other = lease(&c, "web-1", BEFORE).unwrap().unwrap();
    assert_eq!(other.envelope, goal(3, 7).envelope);
    finish(&c, "web-1", &report(other.task_id, Outcome::Failed), 0).unwrap();
    let (_, next) = expire(&c, BEFORE).unwrap();
    assert_eq!(next, Some(at));
    assert!(released(&c, BEFORE, at - 1).unwrap().is_empty());
    assert_eq!(released(&c, at - 1, at).unwrap(), ["web-1"]);
    let first = lease(&c, "web-1", at).unwrap().unwrap();
    assert_eq!(
        (first.envelope, first.step.as_str()),
        (goal(1, 5).envelope, "a")
    );
    assert_eq!(first.task.unwrap().reason, "");
    // A clock that is set back does not take away what was handed out.
    assert!(lease(&c, "web-1", BEFORE).unwrap().is_some());
}

#[test]
fn r112_output_beyond_the_signed_cap_is_cut_here_too() {
    let c = open();
    let mut new = goal(1, 5);
    new.goal.steps[0].script.as_mut().unwrap().output_cap = 10;
    add_goal(&c, &new).unwrap();
    let id = lease(&c, "web-1", BEFORE).unwrap().unwrap().task_id;
    let mut report = report(id, Outcome::Done);
    let bytes: Vec<u8> = (0..200).collect();
    report.stdout = Captured {
        head: bytes.clone(),
        tail: Vec::new(),
        total: 3,
    };
    report.stderr = Captured {
        head: bytes.clone(),
        tail: bytes.clone(),
        total: 1000,
    };
    finish(&c, "web-1", &report, 0).unwrap();
    let (out, err) = (
        output(&c, &id, false).unwrap(),
        output(&c, &id, true).unwrap(),
    );
    for kept in [&out, &err] {
        assert_eq!(
            (&kept.head[..], &kept.tail[..]),
            (&bytes[..5], &bytes[195..])
        );
    }
    assert_eq!((out.total, err.total), (200, 1000));
}

/// Lets a VM's goals end, each with so many bytes of output.
fn ended(c: &Connection, n: std::ops::Range<u8>, bytes: usize) {
    for n in n {
        let mut new = goal(n, n.into());
        new.max_queued = 1000;
        add_goal(c, &new).unwrap();
        for _ in 0..2 {
            let id = lease(c, "web-1", BEFORE).unwrap().unwrap().task_id;
            let mut report = report(id, Outcome::Done);
            report.stdout.head = vec![b'x'; bytes];
            finish(c, "web-1", &report, BEFORE + i64::from(n)).unwrap();
        }
    }
}

fn count(c: &Connection, table: &str) -> u32 {
    c.query_row(&format!("SELECT count(*) FROM {table}"), [], |r| r.get(0))
        .unwrap()
}

#[test]
fn r112_a_vm_keeps_its_newest_tasks_within_its_quota_of_number_and_bytes() {
    let keep = Keep {
        age_ms: 1000,
        tasks: 10,
        bytes: 5000,
    };
    let c = open();
    ended(&c, 1..9, 1);
    let (gone, of_another) = (
        trim(&c, "web-1", &keep).unwrap(),
        trim(&c, "web-2", &keep).unwrap(),
    );
    assert_eq!((gone, of_another), (6, 0));
    // A goal is gone with its last task.
    assert_eq!((count(&c, "tasks"), count(&c, "goals")), (10, 5));
    let c = open();
    ended(&c, 1..4, 1000);
    assert_eq!(trim(&c, "web-1", &keep).unwrap(), 1);
    // The newest one stays, however much it is.
    let little = Keep { bytes: 1, ..keep };
    assert_eq!(
        (trim(&c, "web-1", &little).unwrap(), count(&c, "tasks")),
        (4, 1)
    );
}

#[test]
fn r112_what_ended_long_ago_is_forgotten_and_what_is_open_never() {
    let keep = Keep {
        age_ms: 1000,
        tasks: 1,
        bytes: 0,
    };
    let c = open();
    ended(&c, 1..3, 1);
    // The first step of the third has ended, and its second is open.
    add_goal(&c, &goal(3, 3)).unwrap();
    let id = lease(&c, "web-1", BEFORE).unwrap().unwrap().task_id;
    finish(&c, "web-1", &report(id, Outcome::Done), BEFORE).unwrap();
    let (gone, next) = retire(&c, &keep, BEFORE + 1000).unwrap();
    assert_eq!((gone, next.is_some()), (0, true));
    let (gone, _) = retire(&c, &keep, BEFORE + 1_000_000).unwrap();
    assert_eq!((gone, count(&c, "goals")), (4, 1));
    assert_eq!(trim(&c, "web-1", &keep).unwrap(), 0);
    assert_eq!(states(&c).len(), 2);
}

#[test]
fn r112_a_list_comes_in_pages_and_each_task_once() {
    let c = open();
    ended(&c, 1..9, 1);
    let all = tasks(&c, &Filter::default()).unwrap();
    let (mut got, mut after) = (Vec::new(), Some(0));
    while let Some(at) = after {
        let (some, next) = page(&c, &Filter::default(), at, 5).unwrap();
        assert!(some.len() <= 5 && !some.is_empty());
        got.extend(some);
        after = next;
    }
    assert_eq!(got, all);
    let id = all[3].task_id.clone();
    let by_id = |digits: &str| {
        let filter = Filter {
            id: page::id_range(digits),
            ..Filter::default()
        };
        tasks(&c, &filter).unwrap()
    };
    assert_eq!(by_id(&id)[0], all[3]);
    assert!(by_id(&id[..7]).contains(&all[3]));
    for wrong in ["x", "0g", &format!("{id}0")] {
        assert!(page::id_range(wrong).is_none(), "{wrong}");
    }
}
