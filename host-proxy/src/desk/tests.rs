//! Every change of a task over a real database.

mod clock;
mod lists;
mod order;
mod retention;
mod settled;

use adit_tasks::wire::{Captured, Outcome};
use adit_tasks::{Goal, task_id};

use super::rules::{ATTEMPTS_MAX, SILENCE_MAX_MS};
use super::store::page::{self, Filter, page};
use super::store::report::output;
use super::store::retention::{Keep, retire, trim};
use super::store::{SCHEMA, goals, released};
use super::*;

pub(super) const GOAL: &str = r#"{"goal_id": "01937b5e-0000-7000-8000-00000000000N", "key_seq": SEQ, "audience": {"vms": ["web-1"]},
 "not_before": "2026-11-20T22:00:00Z", "not_after": "2026-11-21T22:00:00Z", "min_planner": 1, "steps": [
 {"id": "a", "script": {"interpreter": "/bin/sh", "script": "x"}},
 {"id": "b", "idempotent": true, "script": {"interpreter": "/bin/sh", "script": "x"}}]}"#;
pub(super) const BEFORE: i64 = 1_795_219_200_000; // 2026-11-21T00:00:00Z
pub(super) const AFTER: i64 = BEFORE + 86_400_000;

pub(super) fn goal(n: u8, seq: u64) -> NewGoal {
    let text = GOAL
        .replace('N', &n.to_string())
        .replace("SEQ", &seq.to_string());
    NewGoal {
        goal: Goal::parse_unverified(text.as_bytes()).unwrap(),
        digest: [n; 32],
        envelope: text.into_bytes(),
        signer: "k".into(),
        vms: vec!["web-1".parse().unwrap()],
    }
}

pub(super) fn open() -> Connection {
    store::db::prepare(":memory:".as_ref(), ":memory:".as_ref(), &SCHEMA).unwrap()
}

pub(super) fn tasks(c: &Connection, filter: &Filter) -> rusqlite::Result<Vec<Task>> {
    Ok(page(c, filter, 0, usize::MAX)?.0)
}

/// Returns all tasks of the goal.
pub(super) fn add_goal(c: &Connection, new: &NewGoal) -> Result<Vec<Task>, DeskError> {
    change::add_goal(c, new, BEFORE, 8)?;
    Ok(store::of_goal(c, &new.goal.goal_id.to_string())?)
}

/// As for a guest that runs a key's goals in the order of their numbers.
pub(super) fn lease(c: &Connection, vm: &str, now_ms: i64) -> Result<Option<Handout>, DeskError> {
    Ok(change::hand_out(c, vm, now_ms, &Wanted::default())?.0)
}

pub(super) fn finish(
    c: &Connection,
    vm: &str,
    report: &Report,
    now_ms: i64,
) -> Result<Vec<Task>, DeskError> {
    change::report(c, vm, report, now_ms)
}

pub(super) fn report(id: TaskId, outcome: Outcome) -> Report {
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
        order.push((h.envelope == Some(goal(1, 5).envelope), h.step));
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
    assert!(matches!(e, Err(DeskError::NotLeased)), "{e:?}");
    lease(&c, "web-1", BEFORE).unwrap();
    let e = finish(&c, "web-2", &report(id, Outcome::Done), 0);
    assert!(matches!(e, Err(DeskError::Unknown)), "{e:?}");
    finish(&c, "web-1", &report(id, Outcome::Done), 0).unwrap();
    assert!(
        finish(&c, "web-1", &report(id, Outcome::Failed), 0)
            .unwrap()
            .is_empty()
    );
    assert_eq!(
        store::task(&c, &id).unwrap().unwrap().state,
        TaskState::Done
    );
    assert_eq!(output(&c, &id, false).unwrap().unwrap().head, b"hi\n");
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
        Err(DeskError::GoalTaken { .. })
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
        Err(DeskError::Full {
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
    let (next, none) = change::expire(&c, BEFORE).unwrap();
    assert!(none.is_empty() && next == Some(AFTER - 7_200_000));
    // What was handed out is handed out again; had it waited, it would not be.
    assert!(lease(&c, "web-1", AFTER).unwrap().is_some());
    add_goal(&c, &goal(2, 4)).unwrap();
    let next = lease(&c, "web-1", AFTER).unwrap().unwrap();
    assert_eq!(next.envelope, Some(goal(1, 5).envelope));
    let (next, ended) = change::expire(&c, AFTER).unwrap();
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
    change::begun(&c, "web-1", &id, BEFORE).unwrap();
    let due = AFTER - 7_200_000 + SILENCE_MAX_MS;
    let (_, ended) = change::expire(&c, due).unwrap();
    assert_eq!(ended.len(), 1, "the step that waited: {ended:?}");
    let (next, ended) = change::expire(&c, due + 1).unwrap();
    assert_eq!((ended[0].state, next), (TaskState::LostContact, None));
    assert!(
        finish(&c, "web-1", &report(id, Outcome::Done), due + 2)
            .unwrap()
            .is_empty()
    );
    assert_eq!(
        store::task(&c, &id).unwrap().unwrap().state,
        TaskState::LostContact
    );
}

#[test]
fn a_removed_vm_leaves_no_open_task() {
    let c = open();
    add_goal(&c, &goal(1, 5)).unwrap();
    lease(&c, "web-1", BEFORE).unwrap().unwrap();
    assert!(change::remove_vm(&c, "web-2", BEFORE).unwrap().is_empty());
    let ended = change::remove_vm(&c, "web-1", BEFORE).unwrap();
    let states: Vec<_> = ended.iter().map(|t| t.state).collect();
    assert_eq!(states, [TaskState::LostContact, TaskState::Expired]);
    assert!(change::remove_vm(&c, "web-1", BEFORE).unwrap().is_empty());
}

#[test]
fn a_refusal_is_shown_with_its_code_and_nothing_else_has_one() {
    let c = open();
    let why = "policy: /etc/adit-guest/policy.toml:4: no";
    for (n, outcome, code) in [
        (1, Outcome::Refused, Some("policy")),
        (2, Outcome::Failed, None),
    ] {
        add_goal(&c, &goal(n, n.into())).unwrap();
        let task = lease(&c, "web-1", BEFORE).unwrap().unwrap();
        let said = Report {
            reason: why.into(),
            ..report(task.task_id, outcome)
        };
        finish(&c, "web-1", &said, 0).unwrap();
        let shown = store::task(&c, &task.task_id).unwrap().unwrap();
        assert_eq!(
            (shown.reason.as_str(), shown.refusal.as_deref()),
            (why, code)
        );
    }
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
    let at = AT.parse::<jiff::Timestamp>().unwrap().as_millisecond();
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
    assert_eq!(other.envelope, Some(goal(3, 7).envelope));
    finish(&c, "web-1", &report(other.task_id, Outcome::Failed), 0).unwrap();
    let (next, _) = change::expire(&c, BEFORE).unwrap();
    assert_eq!(next, Some(at));
    assert!(released(&c, BEFORE, at - 1).unwrap().is_empty());
    assert_eq!(released(&c, at - 1, at).unwrap(), ["web-1"]);
    let first = lease(&c, "web-1", at).unwrap().unwrap();
    assert_eq!(
        (first.envelope, first.step.as_str()),
        (Some(goal(1, 5).envelope), "a")
    );
    let task = store::task(&c, &first.task_id).unwrap().unwrap();
    assert_eq!(
        (task.state, task.reason),
        (TaskState::Leased, String::new())
    );
    // A clock that is set back does not take away what was handed out.
    assert!(lease(&c, "web-1", BEFORE).unwrap().is_some());
}

#[test]
fn r112_output_beyond_the_signed_cap_is_cut_here_too() {
    let c = open();
    let mut new = goal(1, 5);
    let adit_tasks::Action::Script(script) = &mut new.goal.steps[0].action else {
        panic!("its first step is a script")
    };
    script.output_cap = 10;
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
        output(&c, &id, false).unwrap().unwrap(),
        output(&c, &id, true).unwrap().unwrap(),
    );
    for kept in [&out, &err] {
        assert_eq!(
            (&kept.head[..], &kept.tail[..]),
            (&bytes[..5], &bytes[195..])
        );
    }
    assert_eq!((out.total, err.total), (200, 1000));
}

#[test]
fn a_guest_that_takes_any_order_gets_past_a_goal_that_is_held_and_no_envelope_twice() {
    let c = open();
    let mut early = goal(1, 5);
    early.goal.not_before = jiff::Timestamp::from_millisecond(AFTER - 1).unwrap();
    add_goal(&c, &early).unwrap();
    add_goal(&c, &goal(2, 6)).unwrap();
    assert!(lease(&c, "web-1", BEFORE).unwrap().is_none());
    let mut wanted = Wanted {
        overtake: true,
        ..Wanted::default()
    };
    let next = |wanted: &Wanted| change::hand_out(&c, "web-1", BEFORE, wanted).unwrap().0;
    let first = next(&wanted).unwrap();
    assert_eq!(first.digest, goal(2, 6).digest);
    assert_eq!(first.envelope, Some(goal(2, 6).envelope));
    wanted.sent = vec![first.digest];
    let again = next(&wanted).unwrap();
    assert_eq!((again.task_id, again.envelope), (first.task_id, None));
    // Leased or not, a goal that the guest gave back is not handed out.
    wanted.held = [first.digest].into();
    assert!(next(&wanted).is_none());
}
