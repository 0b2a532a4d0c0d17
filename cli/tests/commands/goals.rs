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
    assert!(
        said.contains("expired") && said.contains("2021-01-01"),
        "{said}"
    );
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

#[test]
fn a_goal_of_several_hosts_shows_each_vm_with_its_host_and_a_host_that_is_silent_is_a_failure() {
    let fake = Fake::start(|_| {
        let (mut here, mut there) = (task('a', "a", 1, "done"), task('b', "a", 1, "queued"));
        (here["host"], there["host"]) = (json!("alpha"), json!("beta"));
        let mut goal = goal(&[here, there]);
        goal["silent"] = json!([{"host": "gamma", "why": "it did not answer in time"}]);
        Say::Json(goal)
    });
    let out = fake.adit(&["goal", "show", crate::fake::GOAL]);
    let (shown, said) = (text(&out.stdout), text(&out.stderr));
    assert!(
        shown.contains("web-1.alpha") && shown.contains("web-1.beta"),
        "{shown}"
    );
    assert_eq!(out.status.code(), Some(3), "{said}");
    assert!(
        said.contains("silent-host") && said.contains("`gamma`"),
        "{said}"
    );
}

#[test]
fn what_is_signed_for_a_vm_of_a_host_names_the_vm_and_the_host_goes_along() {
    let fake = Fake::start(|_| Say::Json(goal(&[])));
    fs::write(
        fake.dir().join("g.yaml"),
        "steps: [{id: a, script: {interpreter: /bin/sh, script: x}}]",
    )
    .unwrap();
    assert!(fake.adit(&["key", "new", "k"]).status.success());
    let out = fake.adit(&[
        "goal",
        "apply",
        "g.yaml",
        "--sign",
        "k",
        "--to",
        "web-9.beta",
    ]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let asked = fake.asked();
    let body: serde_json::Value = serde_json::from_str(&asked[0].body).unwrap();
    assert_eq!(body["to"], json!(["web-9.beta"]));
    let envelope = dsse::Envelope::parse(body["envelope"].as_str().unwrap().as_bytes()).unwrap();
    let signed: serde_json::Value = serde_json::from_slice(envelope.unverified_payload()).unwrap();
    assert_eq!(signed["audience"]["vms"], json!(["web-9"]));
}

fn dry_run(yaml: &str) -> Output {
    let fake = Fake::start(|_| Say::HangUp);
    fs::write(fake.dir().join("g.yaml"), yaml).unwrap();
    assert!(fake.adit(&["key", "new", "k"]).status.success());
    let args = [
        "goal",
        "apply",
        "g.yaml",
        "--sign",
        "k",
        "--to",
        "web-1",
        "--dry-run",
    ];
    fake.adit(&args)
}

#[test]
fn a_mode_may_have_a_leading_zero_before_four_digits() {
    for mode in ["02775", "0644", "755"] {
        let out = dry_run(&format!(
            "steps: [{{id: a, file: {{path: /x, content: y, mode: \"{mode}\"}}}}]"
        ));
        assert!(out.status.success(), "{mode}: {}", text(&out.stderr));
        let want = format!("\"mode\":\"{mode}\"");
        assert!(text(&out.stdout).contains(&want), "{}", text(&out.stdout));
    }
}

#[test]
fn mistakes_in_a_goal_are_told_in_its_own_words() {
    for (yaml, words) in [
        (
            "steps: [{id: a, id: b, file: {path: /x}}]",
            "`id` is given twice",
        ),
        ("valid_for: 1h", "`steps` is missing"),
        ("steps: [{id: a, scrpt: {}}]", "unknown key `scrpt`"),
        ("steps: 7", "`steps`: must be a list"),
        ("steps: [7]", "`steps[0]`: must be"),
        ("steps: [{id: a, script: 7}]", "`steps[0].script`: must be"),
        ("7", "must be"),
        ("steps: [{id: null, file: {path: /x}}]", "must be text"),
        ("steps: [{id: a", "g.yaml:1:"),
        ("", "g.yaml:1:1: "),
        ("a: &a [*a]", "unknown key `a`"),
    ] {
        let out = dry_run(yaml);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{yaml}: {said}");
        assert!(said.contains(words), "{yaml}: {said}");
        for foreign in [
            "Policy",
            "Options",
            "Option<",
            "struct",
            "u32",
            "i64",
            "u64",
            "deserialize",
            "variant",
            "serde",
            "enum",
        ] {
            assert!(!said.contains(foreign), "{yaml}: {said}");
        }
    }
}
