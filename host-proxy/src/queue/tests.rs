//! The queue over a real database file.

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
        vms: vec!["web-1".parse().unwrap()],
        now_ms: BEFORE,
        max_queued: 8,
    }
}

fn open() -> Connection {
    let c = Connection::open_in_memory().unwrap();
    c.execute_batch(SCHEMA).unwrap();
    c
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
            TaskState::Expired,
            TaskState::Expired,
            TaskState::Leased,
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
    assert!(remove_vm(&c, "web-2").unwrap().is_empty());
    let ended = remove_vm(&c, "web-1").unwrap();
    let states: Vec<_> = ended.iter().map(|t| t.state).collect();
    assert_eq!(states, [TaskState::LostContact, TaskState::Expired]);
    assert!(remove_vm(&c, "web-1").unwrap().is_empty());
}

#[tokio::test]
async fn an_answer_means_on_disk_and_a_failed_job_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aditd.db");
    let db = Db::open(&path, SCHEMA, VERSION).unwrap();
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
    let db = Db::open(&path, SCHEMA, VERSION).unwrap();
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
    let db = Db::open(&path, SCHEMA, VERSION).unwrap();
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
    drop(Db::open(&path, SCHEMA, VERSION).unwrap());
    let c = Connection::open(&path).unwrap();
    c.pragma_update(None, "user_version", VERSION + 1).unwrap();
    drop(c);
    assert!(matches!(
        Db::open(&path, SCHEMA, VERSION),
        Err(DbError::Newer { .. })
    ));
}
