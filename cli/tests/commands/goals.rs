//! `adit goal apply`: what is refused before anything is handed over, and in whose words.

use std::fs;
use std::process::Output;

use adit_tasks::dsse;
use ed25519_dalek::SigningKey;
use serde_json::json;

use crate::fake::{Fake, Say, event, goal, task};
use crate::text;

/// Writes a signed goal that is valid until then.
fn signed(fake: &Fake, until: &str) {
    let payload = json!({
        "goal_id": crate::fake::GOAL, "key_seq": 1, "audience": {"vms": ["web-1"]},
        "not_before": "2020-01-01T00:00:00Z", "not_after": until, "min_planner": 1,
        "steps": [{"id": "a", "script": {"interpreter": "/bin/sh", "script": "x"}}],
    });
    let key = SigningKey::from_bytes(&[7; 32]);
    let envelope = dsse::sign(payload.to_string().as_bytes(), &key);
    fs::write(fake.dir().join("s.json"), envelope).unwrap();
}

#[test]
fn a_signed_goal_whose_time_is_over_is_not_handed_over() {
    let fake = Fake::start(|_| Say::Json(goal(&[])));
    signed(&fake, "2021-01-01T00:00:00Z");
    let out = fake.adit(&["goal", "apply", "s.json"]);
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("expired") && said.contains("2021-01-01"), "{said}");
    assert!(fake.asked().is_empty());
    signed(&fake, "2100-01-01T00:00:00Z");
    let out = fake.adit(&["goal", "apply", "s.json"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
}

#[test]
fn a_goal_that_is_watched_has_the_status_of_its_steps() {
    for (state, code) in [("done", 0), ("failed", 5)] {
        let fake = Fake::start(move |asked| {
            let tasks = [task('a', "a", 1, state)];
            match asked.path.starts_with("/v1/events") {
                true => Say::Lines(tasks.map(event).to_vec()),
                false => Say::Json(goal(&tasks)),
            }
        });
        signed(&fake, "2100-01-01T00:00:00Z");
        let out = fake.adit(&["goal", "apply", "s.json", "--watch"]);
        assert_eq!(out.status.code(), Some(code), "{}", text(&out.stderr));
    }
}

fn dry_run(yaml: &str) -> Output {
    let fake = Fake::start(|_| Say::HangUp);
    fs::write(fake.dir().join("g.yaml"), yaml).unwrap();
    assert!(fake.adit(&["key", "new", "k"]).status.success());
    let args = [
        "goal", "apply", "g.yaml", "--sign", "k", "--to", "web-1", "--dry-run",
    ];
    fake.adit(&args)
}

#[test]
fn a_mode_may_have_a_leading_zero_before_four_digits() {
    for (mode, signed) in [("02775", "2775"), ("0644", "0644"), ("755", "755")] {
        let out = dry_run(&format!(
            "steps: [{{id: a, file: {{path: /x, content: y, mode: \"{mode}\"}}}}]"
        ));
        assert!(out.status.success(), "{mode}: {}", text(&out.stderr));
        let want = format!("\"mode\":\"{signed}\"");
        assert!(text(&out.stdout).contains(&want), "{}", text(&out.stdout));
    }
}

#[test]
fn mistakes_in_a_goal_are_told_in_its_own_words() {
    for (yaml, words) in [
        ("steps: [{id: a, id: b, file: {path: /x}}]", "`id` is there twice"),
        ("valid_for: 1h", "`steps` is missing"),
        ("steps: [{id: a, scrpt: {}}]", "there is no key `scrpt` here"),
        ("steps: 7", "expected a list"),
        ("steps: [7]", "expected keys with values"),
        ("steps: [{id: a, script: 7}]", "expected keys with values"),
        ("7", "expected keys with values"),
        ("steps: [{id: null, file: {path: /x}}]", "g.yaml:1:"),
        ("steps: [{id: a, script: {interpreter: /bin/sh, script: x, timeout_s: soon}}]", "expected a whole number"),
        ("steps: [{id: a, script: {interpreter: /bin/sh, script: x, timeout_s: -1}}]", "expected a whole number"),
        ("steps: [{id: a", "g.yaml:1:"),
        ("", "g.yaml"),
        ("a: &a [*a]", "g.yaml"),
        ("steps: []\n---\nsteps: []", "g.yaml"),
    ] {
        let out = dry_run(yaml);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{yaml}: {said}");
        assert!(said.contains(words), "{yaml}: {said}");
        for foreign in [
            "Policy", "Options", "Option<", "struct", "u32", "i64", "u64", "deserialize", "mapping", "variant", "serde",
            "enum",
        ] {
            assert!(!said.contains(foreign), "{yaml}: {said}");
        }
        println!("{said}");
    }
}
