//! What is printed where it cannot be, and in the format that was asked for.

use std::fs::OpenOptions;
use std::process::{Output, Stdio};

use serde_json::{Value, json};

use crate::fake::{Fake, Say, task, vm};
use crate::text;

fn fake() -> Fake {
    Fake::start(|asked| match asked.path.as_str() {
        "/v1/vms" => Say::Json(json!([vm("web-1")])),
        path if path.starts_with("/v1/tasks?") => Say::Json(json!([task('3', "a", 1, "done")])),
        path if path.contains("/output") => {
            Say::With("x", "y".into(), b"\xff much\n".repeat(99_999))
        }
        path if path.starts_with("/v1/tasks/") => Say::Json(task('3', "a", 1, "done")),
        _ => Say::Error(404, "unknown-path"),
    })
}

const PRINTING: &[&[&str]] = &[
    &["vm", "ls"],
    &["vm", "ls", "-o", "json"],
    &["task", "ls"],
    &["task", "show", "3"],
    &["task", "output", "3"],
    &["completion", "bash"],
    &["version"],
    &["--version"],
    &["--help"],
    &["goal", "apply", "--help"],
];

fn into(fake: &Fake, args: &[&str], stdout: impl Into<Stdio>) -> Output {
    let mut command = fake.command(args);
    command.stdout(stdout).stderr(Stdio::piped());
    command.spawn().unwrap().wait_with_output().unwrap()
}

#[test]
fn a_closed_pipe_ends_every_command_without_a_word() {
    let fake = fake();
    for args in PRINTING {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let out = into(&fake, args, writer);
        let said = text(&out.stderr);
        assert_eq!(
            (out.status.code(), said.as_str()),
            (Some(141), ""),
            "{args:?}"
        );
    }
}

#[test]
fn an_output_that_cannot_be_written_is_an_error_that_says_so() {
    let fake = fake();
    for args in PRINTING {
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let out = into(&fake, args, full);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{args:?}: {said}");
        assert!(said.contains("standard output"), "{args:?}: {said}");
    }
}

#[test]
fn an_error_that_cannot_be_told_keeps_its_status() {
    let dir = Fake::absent();
    for (args, code) in [(&["vm", "ls"][..], 3), (&["frobnicate"], 2)] {
        let mut command = crate::fake::command(dir.path(), args);
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let status = command.stderr(full).status().unwrap();
        assert_eq!(status.code(), Some(code), "{args:?}");
    }
}

#[test]
fn json_is_json_for_version_and_output() {
    let fake = Fake::start(|asked| match asked.path.as_str() {
        path if path.contains("output?stream=stdout") => {
            let text = format!("ab{}cd", adit_api::left_out(70));
            Say::With(adit_api::LEFT_OUT, "2 70".into(), text.into_bytes())
        }
        path if path.contains("output?stream=stderr") => Say::With("x", "y".into(), vec![0xff, 0]),
        path if path.starts_with("/v1/tasks?") => {
            let mut task = task('3', "a", 1, "done");
            task["output_bytes"] = json!([74, 2]);
            Say::Json(json!([task]))
        }
        _ => Say::Error(404, "unknown-path"),
    });
    let json = |args: &[&str]| -> Value {
        let out = fake.adit(&[args, &["-o", "json"]].concat());
        assert!(out.status.success(), "{}", text(&out.stderr));
        serde_json::from_slice(&out.stdout).unwrap()
    };
    assert_eq!(json(&["version"])["name"], "adit");
    let out = json(&["task", "output", "3"]);
    assert_eq!((&out["head"], &out["tail"]), (&json!("ab"), &json!("cd")));
    assert_eq!(out["encoding"], "utf-8");
    assert_eq!(
        (&out["total_bytes"], &out["left_out_bytes"]),
        (&json!(74), &json!(70))
    );
    let err = json(&["task", "output", "3", "--stream", "stderr"]);
    assert_eq!(
        (&err["encoding"], &err["head"]),
        (&json!("base64"), &json!("/wA="))
    );
}

/// What a terminal would act on: ESC, and U+009B, which JSON need not escape.
const HOSTILE: &str = "x\u{9b}31m\u{1b}]0;owned\u{7}\u{7f}\u{202e}y";

/// A goal in a list.
fn summary() -> Value {
    json!({
        "goal_id": HOSTILE, "digest": HOSTILE, "signer": HOSTILE, "key_seq": 1, "accepted_at": HOSTILE,
        "not_before": HOSTILE, "not_after": HOSTILE, "vms": 1, "steps": 1, "open": 1, "done": 0,
        "failed": 0, "hosts": [HOSTILE],
    })
}

#[test]
fn r123_nothing_that_is_printed_drives_a_terminal_and_json_says_the_same() {
    let fake = Fake::start(|asked| {
        let hostile = |mut value: Value, keys: &[&str]| {
            for key in keys {
                value[*key] = json!(HOSTILE);
            }
            value
        };
        let keys = [
            "task_id",
            "goal_id",
            "vm",
            "step",
            "reason",
            "output_preview",
        ];
        let task = hostile(task('3', "a", 1, "done"), &keys);
        match asked.path.as_str() {
            "/v1/vms/web-1" | "/v1/vms/web-1/reload" => {
                let keys = [
                    "name",
                    "agent",
                    "kernel",
                    "enrolled_as",
                    "fault",
                    "vhost_socket",
                ];
                Say::Json(hostile(crate::fake::vm("web-1"), &keys))
            }
            path if path.starts_with("/v1/vms/web-1/wait") => {
                Say::Json(hostile(crate::fake::vm("web-1"), &["name", "agent"]))
            }
            "/v1/vms" => Say::Json(json!([hostile(
                crate::fake::vm("web-1"),
                &["name", "agent"]
            )])),
            path if path.starts_with("/v1/tasks?id=") => {
                Say::Json(json!([self::task('3', "a", 1, "done")]))
            }
            path if path.starts_with("/v1/tasks?") => Say::Json(json!([task])),
            path if path.starts_with("/v1/events") => Say::Lines(vec![crate::fake::event(task)]),
            path if path.starts_with("/v1/goals/") => {
                let goal = crate::fake::goal(&[task]);
                Say::Json(hostile(goal, &["goal_id", "digest"]))
            }
            // What other hosts say of their VMs and goals.
            "/v1/resolve/here" => Say::Json(json!({
                "vm": HOSTILE, "host": HOSTILE, "here": true, "claims": [],
            })),
            "/v1/resolve/unnamed" => {
                Say::Json(json!({"vm": HOSTILE, "host": null, "here": true, "claims": []}))
            }
            "/v1/resolve/twin" => Say::Json(json!({
                "vm": HOSTILE, "host": null, "here": false,
                "claims": [{"name": HOSTILE, "host": HOSTILE, "live": true}],
            })),
            "/v1/resolve" => Say::Json(json!({
                "vms": [{"name": HOSTILE, "host": HOSTILE, "live": true, "by_map_of": HOSTILE}],
                "silent": [{"host": HOSTILE, "why": HOSTILE}, {"host": HOSTILE, "why": HOSTILE}],
            })),
            path if path.starts_with("/v1/goals?") => Say::Json(json!([summary()])),
            path if path.starts_with("/v1/all-hosts/goals") => Say::Json(json!({
                "goals": [summary()], "earlier": true, "silent": [{"host": HOSTILE, "why": HOSTILE}],
            })),
            path if path.starts_with("/v1/all-hosts/tasks") => Say::Json(json!({
                "tasks": [task], "earlier": true, "silent": [{"host": HOSTILE, "why": HOSTILE}],
            })),
            path if path.starts_with("/v1/access?") => Say::Json(json!({
                "allowed": path.contains("verb=see"), "caller": [HOSTILE], "by": HOSTILE,
                "reason": HOSTILE, "text": HOSTILE, "hidden": false,
            })),
            path if path.starts_with("/v1/grants") => Say::Json(json!([{
                "place": HOSTILE, "to": [HOSTILE], "vms": [HOSTILE], "may": [HOSTILE],
                "until": HOSTILE, "expired": true,
            }])),
            "/v1/trust" => Say::Json(json!([{
                "signer": HOSTILE, "own": true, "sequence": 1, "vms": [HOSTILE], "given_at": HOSTILE,
            }])),
            "/v1/config" => Say::Json(json!({"reads": 1, "error": null, "restart": [HOSTILE]})),
            _ => Say::Error(500, "x\u{9b}31m"),
        }
    });
    let goal = crate::fake::GOAL;
    for args in [
        &["vm", "ls"][..],
        &["vm", "show", "web-1"],
        &["vm", "reload", "web-1"],
        &["vm", "show", "web-2"],
        &["wait", "web-1"],
        &["task", "ls"],
        &["task", "show", "3"],
        &["task", "watch", "--goal", goal],
        &["goal", "show", goal],
        &["config"],
        &["resolve", "here"],
        &["resolve", "unnamed"],
        &["resolve", "twin"],
        &["vm", "ls", "--all-hosts"],
        &["goal", "ls"],
        &["goal", "ls", "--all-hosts"],
        &["task", "ls", "--all-hosts"],
        &["access", "check", "--as", "anyone", "see", "web-1"],
        &["access", "check", "--as", "anyone", "goal", "web-1"],
        &["access", "ls"],
        &["trust", "ls"],
    ] {
        for format in ["table", "json"] {
            let out = fake.adit(&[args, &["-o", format]].concat());
            for said in [&out.stdout, &out.stderr] {
                let said = str::from_utf8(said).unwrap();
                let bad = |c: char| c != '\n' && c.is_control() || c == '\u{202e}';
                assert!(!said.contains(bad), "{args:?} {format}: {said:?}");
            }
            // It is what was said that is escaped, and not something else that is printed.
            let all = [&out.stdout[..], &out.stderr].concat();
            let all = String::from_utf8(all).unwrap();
            let is_list = matches!(args, ["resolve" | "access", ..] | [_, "ls", ..]);
            let shows = all.contains("\\u{9b}31m") || all.contains("\\u009b31m");
            assert!(shows || !is_list, "{args:?} {format}: {all}");
            if format == "json" && args == ["task", "ls"] {
                let list: Value = serde_json::from_slice(&out.stdout).unwrap();
                assert_eq!(list[0]["reason"], HOSTILE);
            }
        }
    }
}
