//! What a goal may say, and that nothing else is accepted.

use super::*;
use crate::action::{FileStep, Script};

pub(crate) const GOOD: &str = r#"{
 "goal_id": "01937b5e-0000-7000-8000-000000000001", "key_seq": 5,
 "audience": {"vms": ["web-1"]},
 "not_before": "2026-11-20T22:00:00Z", "not_after": "2026-11-21T22:00:00Z", "min_planner": 1,
 "steps": [{"id": "hello", "script": {"interpreter": "/bin/sh", "script": "echo hi\n", "env": {"A": "1"}}},
       {"id": "motd", "idempotent": true, "file": {"path": "/etc/motd", "content": "hi\n"}}]}"#;

pub(crate) fn script(step: &Step) -> &Script {
    match &step.action {
        Action::Script(script) => script,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn file(step: &Step) -> &FileStep {
    match &step.action {
        Action::File(file) => file,
        other => panic!("{other:?}"),
    }
}

fn parse(text: &str) -> Result<Goal, GoalError> {
    Goal::parse_unverified(text.as_bytes())
}

#[test]
fn defaults_are_filled_in_and_the_goal_round_trips() {
    let goal = parse(GOOD).unwrap();
    let script = self::script(&goal.steps[0]);
    assert_eq!((script.timeout_s, script.run_as.as_str()), (60, "root"));
    assert_eq!(file(&goal.steps[1]).mode_bits(), Some(0o644));
    assert_eq!(parse(&serde_json::to_string(&goal).unwrap()).unwrap(), goal);
}

#[test]
fn r87_unknown_and_duplicate_keys_are_refused_at_every_level() {
    for (from, to) in [
        ("\"key_seq\": 5", "\"key_seq\": 5, \"key_seq\": 6"),
        ("\"key_seq\": 5", "\"key_seq\": 5, \"keyseq\": 6"),
        (
            "{\"vms\": [\"web-1\"]}",
            "{\"vms\": [\"web-1\"], \"vms\": [\"web-2\"]}",
        ),
        (
            "{\"vms\": [\"web-1\"]}",
            "{\"vms\": [\"web-1\"], \"labels\": []}",
        ),
        ("\"id\": \"hello\"", "\"id\": \"hello\", \"id\": \"x\""),
        ("\"id\": \"hello\"", "\"id\": \"hello\", \"when\": 1"),
        ("{\"A\": \"1\"}", "{\"A\": \"1\", \"A\": \"2\"}"),
        (
            "\"path\": \"/etc/motd\"",
            "\"path\": \"/etc/motd\", \"path\": \"/etc/shadow\"",
        ),
        (
            "\"path\": \"/etc/motd\"",
            "\"path\": \"/etc/motd\", \"modes\": \"0\"",
        ),
        ("{\"vms\": [\"web-1\"]}", "[[\"web-1\"]]"),
        (
            "{\"path\": \"/etc/motd\", \"content\": \"hi\\n\"}",
            "[\"/etc/motd\", \"hi\"]",
        ),
        ("\"idempotent\": true", "\"script\": null"),
        ("]}", "]} {}"),
    ] {
        assert!(GOOD.contains(from));
        let e = parse(&GOOD.replacen(from, to, 1));
        let Err(GoalError::Json(e)) = e else {
            panic!("{to}: {e:?}")
        };
        assert!(e.line() > 0 && e.column() > 0, "{to}: {e}");
    }
}

#[test]
fn values_that_cannot_be_used_name_their_key() {
    for (from, to, key) in [
        ("[\"web-1\"]", "[]", "audience.vms"),
        ("[\"web-1\"]", "[\"web-1\", \"web-1\"]", "audience.vms"),
        ("/etc/motd", "/etc/", "steps[1].file.path"),
        (
            "\"content\": \"hi\\n\"",
            "\"content_base64\": \"!\"",
            "steps[1].file.content_base64",
        ),
        (
            "\"env\": {",
            "\"success_codes\": [], \"env\": {",
            "steps[0].script.success_codes",
        ),
        ("2026-11-21", "2026-11-19", "not_after"),
        ("/bin/sh", "sh", "steps[0].script.interpreter"),
        ("\"id\": \"motd\"", "\"id\": \"hello\"", "steps[1].id"),
        ("\"id\": \"motd\"", "\"id\": \"Motd\"", "steps[1].id"),
        ("/etc/motd", "/etc/../motd", "steps[1].file.path"),
        ("/etc/motd", "etc/motd", "steps[1].file.path"),
        ("/etc/motd", "/etc/motd\\u0000", "steps[1].file.path"),
        (
            "\"content\": \"hi\\n\"",
            "\"mode\": \"0644\"",
            "steps[1].file.content",
        ),
        (
            "\"content\"",
            "\"mode\": \"9\", \"content\"",
            "steps[1].file.mode",
        ),
        (
            "\"env\": {\"A\"",
            "\"env\": {\"A=B\"",
            "steps[0].script.env",
        ),
    ] {
        let e = parse(&GOOD.replacen(from, to, 1));
        assert!(
            matches!(&e, Err(GoalError::Value { key: k, .. }) if k == key),
            "{to}: {e:?}"
        );
    }
}

#[test]
fn a_step_has_exactly_one_kind_and_is_written_as_it_was_read() {
    let two = GOOD.replacen(
        "\"idempotent\"",
        "\"script\": {\"interpreter\": \"/a\", \"script\": \"\"}, \"idempotent\"",
        1,
    );
    let none = GOOD.replacen(
        ", \"file\": {\"path\": \"/etc/motd\", \"content\": \"hi\\n\"}",
        "",
        1,
    );
    for text in [two, none] {
        let Err(GoalError::Value { key, why }) = parse(&text) else {
            panic!("{text}")
        };
        assert_eq!(key, "steps[1]");
        assert_eq!(why, "must have exactly one of `script` and `file`");
    }
    let steps = parse(GOOD).unwrap().steps;
    let kinds: Vec<_> = steps.iter().map(|s| s.action.kind().name()).collect();
    assert_eq!(kinds, ["script", "file"]);
    let want = r#"{"id":"motd","file":{"path":"/etc/motd","content":"hi\n","mode":"0644","owner":"root","group":"root"},"idempotent":true}"#;
    assert_eq!(serde_json::to_string(&steps[1]).unwrap(), want);
}

#[test]
fn r72_an_error_carries_no_terminal_sequence_and_no_flood() {
    let key = format!("\\u001b[2J{}", "A".repeat(200_000));
    let e = parse(&GOOD.replacen("key_seq", &key, 1))
        .unwrap_err()
        .to_string();
    assert!(
        e.len() < 1024 && !e.chars().any(char::is_control),
        "{e:.80}"
    );
}

#[test]
fn a_mode_is_octal_with_a_leading_zero_or_without() {
    for (text, bits) in [
        ("644", Some(0o644)),
        ("0644", Some(0o644)),
        ("2775", Some(0o2775)),
        ("02775", Some(0o2775)),
        ("0o2775", Some(0o2775)),
        ("07777", Some(0o7777)),
        ("000", Some(0)),
        ("0o644", Some(0o644)),
        ("10000", None),
        ("010000", None),
        ("0o10000", None),
        ("0888", None),
        ("+644", None),
        ("-644", None),
        ("0x1ff", None),
        ("0o", None),
        ("64", None),
        ("0 644", None),
        ("", None),
    ] {
        let mode = |text: &str| format!("\"mode\": \"{text}\", \"content\"");
        let parsed = parse(&GOOD.replacen("\"content\"", &mode(text), 1));
        let got = parsed.ok().map(|g| file(&g.steps[1]).mode_bits());
        assert_eq!(got, bits.map(Some), "{text}");
    }
}

#[test]
fn a_newer_goal_says_so() {
    let e = parse(&GOOD.replacen("\"min_planner\": 1", "\"min_planner\": 2", 1));
    assert!(matches!(e, Err(GoalError::Planner { needs: 2 })));
}
