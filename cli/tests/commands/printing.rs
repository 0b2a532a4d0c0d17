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
