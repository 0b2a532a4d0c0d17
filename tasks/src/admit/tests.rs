//! R84, R85, R107 and the rules of `admit`, table by table.

use std::collections::BTreeMap;

use ed25519_dalek::SigningKey;

use super::*;
use crate::key::PublicKey;
use crate::wire::TaskId;

#[derive(Default)]
struct Seen {
    window: Window,
    ended: BTreeMap<TaskId, Outcome>,
}

impl Seen {
    fn with(mut self, task: TaskId, outcome: Outcome) -> Self {
        self.ended.insert(task, outcome);
        self
    }
}

impl History for Seen {
    fn window(&self, _: &KeyId) -> Window {
        self.window.clone()
    }
    fn outcome(&self, task: &TaskId) -> Option<Outcome> {
        self.ended.get(task).copied()
    }
    fn begun(&self, task: &TaskId) -> bool {
        self.ended.contains_key(task)
    }
}

const NOW: i64 = 1_795_219_200_000; // 2026-11-21T00:00:00Z

fn me() -> VmId {
    "web-1".parse().unwrap()
}

fn key() -> SigningKey {
    SigningKey::from_bytes(&[7; 32])
}

fn trust() -> TrustStore {
    let mut t = TrustStore::default();
    t.add(PublicKey::of(&key(), "")).unwrap();
    t
}

fn task(text: &str, step: &str, attempt: u32) -> (Task, [u8; 32]) {
    let envelope = crate::dsse::sign(text.as_bytes(), &key()).into_bytes();
    let digest = Envelope::parse(&envelope).unwrap().digest();
    let task = Task {
        task_id: task_id(&digest, &me(), step, attempt),
        envelope,
        step_id: step.into(),
        attempt,
    };
    (task, digest)
}

fn code(r: Result<Admitted, Denial>) -> &'static str {
    r.map_or_else(|d| d.code, |_| "admitted")
}

const GOOD: &str = crate::goal::tests::GOOD;

#[test]
fn a_signed_task_for_this_vm_is_admitted() {
    let (task, digest) = task(GOOD, "hello", 1);
    let a = admit(&task, &trust(), &me(), NOW, &Seen::default()).unwrap();
    assert_eq!(a.goal, GoalNumber { key_seq: 5, digest });
    assert_eq!(a.step.id, "hello");
}

#[test]
fn r84_wrong_vm_time_or_signer_is_refused() {
    let (good, _) = task(GOOD, "hello", 1);
    let none = Seen::default();
    let other: VmId = "web-2".parse().unwrap();
    assert_eq!(
        code(admit(&good, &trust(), &other, NOW, &none)),
        "wrong-target"
    );
    assert_eq!(
        code(admit(&good, &trust(), &me(), NOW - 86_400_000, &none)),
        "not-yet-valid"
    );
    assert_eq!(
        code(admit(&good, &trust(), &me(), NOW + 86_400_000, &none)),
        "expired"
    );
    assert_eq!(
        code(admit(&good, &TrustStore::default(), &me(), NOW, &none)),
        "no-trust-anchor"
    );
    let mut stranger = TrustStore::default();
    stranger
        .add(PublicKey::of(&SigningKey::from_bytes(&[8; 32]), ""))
        .unwrap();
    assert_eq!(
        code(admit(&good, &stranger, &me(), NOW, &none)),
        "untrusted-key"
    );
    let mut for_cards = TrustStore::default();
    let line = format!("roles=card {}", PublicKey::of(&key(), ""));
    for_cards.add_text(&line).unwrap();
    assert_eq!(
        code(admit(&good, &for_cards, &me(), NOW, &none)),
        "wrong-role"
    );
    let (nonsense, _) = task("[]", "hello", 1);
    assert_eq!(
        code(admit(&nonsense, &trust(), &me(), NOW, &none)),
        "bad-goal"
    );
    let mut cut = good.clone();
    cut.envelope.truncate(100);
    assert_eq!(
        code(admit(&cut, &trust(), &me(), NOW, &none)),
        "bad-envelope"
    );
}

#[test]
fn a_task_that_is_only_too_early_says_so_and_both_ends_of_time_tell_the_guests_clock() {
    let (good, _) = task(GOOD, "hello", 1);
    let none = Seen::default();
    let at = |task: &Task, now| admit(task, &trust(), &me(), now, &none).unwrap_err();
    let early = at(&good, NOW - 86_400_000);
    assert_eq!(early.code, "not-yet-valid");
    assert_eq!(early.not_before_ms, Some(NOW - 2 * 3_600_000));
    assert!(early.text.contains("2026-11-20T00:00:00Z"), "{early}");
    let late = at(&good, NOW + 86_400_000);
    assert_eq!((late.code, late.not_before_ms), ("expired", None));
    assert!(late.text.contains("2026-11-22T00:00:00Z"), "{late}");
    // What no time can mend is not kept: another id, another step's turn.
    let other_id = Task {
        task_id: [9; 16],
        ..good
    };
    assert_eq!(at(&other_id, NOW - 86_400_000).code, "task-id-mismatch");
    let (second, _) = task(GOOD, "motd", 1);
    assert_eq!(at(&second, NOW - 86_400_000).code, "out-of-order");
}

#[test]
fn r84_the_host_can_change_neither_step_nor_id() {
    let (good, _) = task(GOOD, "hello", 1);
    let none = Seen::default();
    let other_step = Task {
        step_id: "motd".into(),
        ..good.clone()
    };
    assert_eq!(
        code(admit(&other_step, &trust(), &me(), NOW, &none)),
        "task-id-mismatch"
    );
    let no_step = Task {
        step_id: "none".into(),
        ..good.clone()
    };
    assert_eq!(
        code(admit(&no_step, &trust(), &me(), NOW, &none)),
        "unknown-step"
    );
    let other_id = Task {
        task_id: [9; 16],
        ..good
    };
    assert_eq!(
        code(admit(&other_id, &trust(), &me(), NOW, &none)),
        "task-id-mismatch"
    );
}

#[test]
fn r85_a_number_that_was_forgotten_or_is_another_goals_is_a_replay() {
    let (good, digest) = task(GOOD, "hello", 1);
    let try_one = |window| {
        let seen = Seen {
            window,
            ..Seen::default()
        };
        code(admit(&good, &trust(), &me(), NOW, &seen))
    };
    assert_eq!(try_one(Window::of_last(6, [0; 32])), "replay");
    assert_eq!(try_one(Window::of_last(5, [0; 32])), "replay");
    assert_eq!(try_one(Window::of_last(5, digest)), "admitted");
    assert_eq!(try_one(Window::of_last(4, [0; 32])), "admitted");
    // A higher number that was admitted before is no reason.
    let mut window = Window::default();
    window.admit(6, [0; 32]);
    assert_eq!(try_one(window.clone()), "admitted");
    window.forget(6);
    assert_eq!(try_one(window), "replay");
}

#[test]
fn r85_the_host_cannot_order_a_second_attempt() {
    let (second, digest) = task(GOOD, "motd", 2);
    let hello_done = || Seen::default().with(task_id(&digest, &me(), "hello", 1), Outcome::Done);
    assert_eq!(
        code(admit(&second, &trust(), &me(), NOW, &hello_done())),
        "attempt"
    );
    let seen = hello_done().with(task_id(&digest, &me(), "motd", 1), Outcome::Interrupted);
    assert_eq!(
        code(admit(&second, &trust(), &me(), NOW, &seen)),
        "admitted"
    );
    let (not_idempotent, digest) = task(GOOD, "hello", 2);
    let seen = Seen::default().with(task_id(&digest, &me(), "hello", 1), Outcome::Interrupted);
    assert_eq!(
        code(admit(&not_idempotent, &trust(), &me(), NOW, &seen)),
        "attempt"
    );
    let (zero, _) = task(GOOD, "hello", 0);
    assert_eq!(
        code(admit(&zero, &trust(), &me(), NOW, &Seen::default())),
        "attempt"
    );
}

/// Three steps; the second may fail, and be run again after it was cut off.
const THREE: &str = r#"{
 "goal_id": "01937b5e-0000-7000-8000-000000000002", "key_seq": 5, "audience": {"vms": ["web-1"]},
 "not_before": "2026-11-20T22:00:00Z", "not_after": "2026-11-21T22:00:00Z", "min_planner": 1,
 "steps": [{"id": "one", "script": {"interpreter": "/bin/sh", "script": "x"}},
           {"id": "two", "idempotent": true, "continue_on_error": true, "script": {"interpreter": "/bin/sh", "script": "x"}},
           {"id": "three", "idempotent": true, "script": {"interpreter": "/bin/sh", "script": "x"}}]}"#;

/// Delivers steps in this order; each that is admitted ends as `ends` says. Returns those that ran.
fn deliver(order: &[&'static str], ends: impl Fn(&str) -> Outcome) -> Vec<&'static str> {
    let (mut seen, mut ran) = (Seen::default(), Vec::new());
    for &step in order {
        let (task, _) = task(THREE, step, 1);
        match admit(&task, &trust(), &me(), NOW, &seen) {
            Ok(_) => {
                seen = seen.with(task.task_id, ends(step));
                ran.push(step);
            }
            Err(denial) => assert_eq!(denial.code, "out-of-order", "{order:?}: {denial}"),
        }
    }
    ran
}

#[test]
fn r107_in_every_order_of_three_steps_only_those_run_whose_turn_it_is() {
    let done = |_: &str| Outcome::Done;
    for (order, ran) in [
        (["one", "two", "three"], &["one", "two", "three"][..]),
        (["one", "three", "two"], &["one", "two"]),
        (["two", "one", "three"], &["one"]),
        (["two", "three", "one"], &["one"]),
        (["three", "one", "two"], &["one", "two"]),
        (["three", "two", "one"], &["one"]),
    ] {
        assert_eq!(deliver(&order, done), ran, "{order:?}");
        // What was refused runs when it comes again in its turn: a refusal leaves no trace.
        let mut again = order.to_vec();
        again.extend(["one", "two", "three"].iter().filter(|s| !ran.contains(s)));
        assert_eq!(deliver(&again, done), ["one", "two", "three"], "{order:?}");
    }
}

#[test]
fn r107_a_failed_step_lets_later_ones_run_only_if_the_goal_says_so_and_a_missing_one_never() {
    use Outcome::{Done, Failed, Interrupted, Refused, TimedOut};
    for bad in [Failed, TimedOut, Interrupted, Refused] {
        let ends = |at: &'static str| move |step: &str| if step == at { bad } else { Done };
        let all = ["one", "two", "three"];
        assert_eq!(deliver(&all, ends("one")), ["one"], "{bad:?}");
        assert_eq!(deliver(&all, ends("two")), all, "{bad:?}");
    }
    let done = |_: &str| Done;
    assert_eq!(deliver(&["two", "three"], done), [""; 0]);
    assert_eq!(deliver(&["one", "three"], done), ["one"]);
    assert_eq!(deliver(&["three"], done), [""; 0]);
}

#[test]
fn r107_of_a_step_that_was_cut_off_the_last_attempt_counts_and_none_comes_after_a_later_step() {
    let id = |step: &str, attempt| {
        let (_, digest) = task(THREE, step, 1);
        task_id(&digest, &me(), step, attempt)
    };
    let try_one = |step: &str, attempt, seen: &Seen| {
        let (task, _) = task(THREE, step, attempt);
        code(admit(&task, &trust(), &me(), NOW, seen))
    };
    let seen = Seen::default()
        .with(id("one", 1), Outcome::Done)
        .with(id("two", 1), Outcome::Interrupted);
    assert_eq!(try_one("two", 2, &seen), "admitted");
    assert_eq!(try_one("three", 1, &seen), "admitted", "two may fail");
    let seen = seen.with(id("three", 1), Outcome::Interrupted);
    assert_eq!(try_one("two", 2, &seen), "out-of-order");
    assert_eq!(try_one("three", 2, &seen), "admitted");
    // The first attempt of the first step was cut off, the second is done.
    let text = THREE.replacen(r#""id": "one","#, r#""id": "one", "idempotent": true,"#, 1);
    let (two, digest) = task(&text, "two", 1);
    let one = |attempt| task_id(&digest, &me(), "one", attempt);
    let seen = Seen::default().with(one(1), Outcome::Interrupted);
    let try_two = |seen: &Seen| code(admit(&two, &trust(), &me(), NOW, seen));
    assert_eq!(try_two(&seen), "out-of-order");
    assert_eq!(try_two(&seen.with(one(2), Outcome::Done)), "admitted");
}
