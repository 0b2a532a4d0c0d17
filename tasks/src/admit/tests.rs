//! R84, R85 and the rules of `admit`, table by table.

use ed25519_dalek::SigningKey;

use super::*;
use crate::key::PublicKey;
use crate::wire::TaskId;

#[derive(Default)]
struct Seen {
    last: Option<LastGoal>,
    interrupted: Option<TaskId>,
}

impl History for Seen {
    fn last_goal(&self, _: &KeyId) -> Option<LastGoal> {
        self.last
    }
    fn outcome(&self, task: &TaskId) -> Option<Outcome> {
        (self.interrupted.as_ref() == Some(task)).then_some(Outcome::Interrupted)
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
    assert_eq!(a.last, LastGoal { key_seq: 5, digest });
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
fn r85_lower_sequence_and_same_sequence_with_another_body_are_replays() {
    let (good, digest) = task(GOOD, "hello", 1);
    let seen = |key_seq, digest| Seen {
        last: Some(LastGoal { key_seq, digest }),
        ..Seen::default()
    };
    assert_eq!(
        code(admit(&good, &trust(), &me(), NOW, &seen(6, [0; 32]))),
        "replay"
    );
    assert_eq!(
        code(admit(&good, &trust(), &me(), NOW, &seen(5, [0; 32]))),
        "replay"
    );
    assert_eq!(
        code(admit(&good, &trust(), &me(), NOW, &seen(5, digest))),
        "admitted"
    );
    assert_eq!(
        code(admit(&good, &trust(), &me(), NOW, &seen(4, [0; 32]))),
        "admitted"
    );
}

#[test]
fn r85_the_host_cannot_order_a_second_attempt() {
    let (second, digest) = task(GOOD, "motd", 2);
    assert_eq!(
        code(admit(&second, &trust(), &me(), NOW, &Seen::default())),
        "attempt"
    );
    let seen = Seen {
        interrupted: Some(task_id(&digest, &me(), "motd", 1)),
        ..Seen::default()
    };
    assert_eq!(
        code(admit(&second, &trust(), &me(), NOW, &seen)),
        "admitted"
    );
    let (not_idempotent, digest) = task(GOOD, "hello", 2);
    let seen = Seen {
        interrupted: Some(task_id(&digest, &me(), "hello", 1)),
        ..Seen::default()
    };
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
