//! `-o json`: every command has it.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::fake::{Fake, GOAL, Say, event, goal, task, vm};
use crate::text;

/// The id of some key.
const KEY: &str = "00112233445566778899aabbccddeeff";

/// They need an agent to hand over, a proxy, or a server: `agents.rs`, `connecting.rs`, `forwarding.rs` and `tests/tests/ways_hosts.rs` have
/// their tests, and so have `tests/tests/exec.rs`, `tests/tests/tickets.rs` and `tests/tests/files.rs`. What `adit connect` and `adit exec` print is the guest's.
const ELSEWHERE: [&str; 14] = [
    "agent-upgrade",
    "attach",
    "connect",
    "cp",
    "exec",
    "forward",
    "kill",
    "ls",
    "proxy",
    "ps",
    "rm",
    "shell",
    "stat",
    "ticket-run",
];

/// Each command, and how it is called. Files that one makes, others read.
const CALLS: &[(&str, &[&str])] = &[
    ("vm-ls", &["vm", "ls"]),
    ("vm-show", &["vm", "show", "web-1"]),
    ("vm-add", &["vm", "add", "web-1", "--cid", "3"]),
    ("vm-set", &["vm", "set", "web-1", "--allow", "80"]),
    ("vm-reload", &["vm", "reload", "web-1"]),
    ("vm-lock", &["vm", "lock", "web-1"]),
    ("vm-freeze", &["vm", "freeze", "web-1"]),
    ("vm-thaw", &["vm", "thaw", "web-1"]),
    ("vm-unlock", &["vm", "unlock", "web-1"]),
    ("vm-rm", &["vm", "rm", "web-1"]),
    ("wait", &["wait", "web-1"]),
    ("task-ls", &["task", "ls"]),
    ("task-show", &["task", "show", "3"]),
    ("task-watch", &["task", "watch"]),
    ("task-output", &["task", "output", "3"]),
    ("key-new", &["key", "new", "k", "--role", "card,goal"]),
    ("key-show", &["key", "show", "k"]),
    ("card-new", &["card", "new", "web-1", "--sign", "k"]),
    (
        "card-new",
        &["card", "new", "web-1", "--sign", "k", "--word"],
    ),
    ("card-show", &["card", "show", "card"]),
    ("key-new", &["key", "new", "x", "--role", "exec"]),
    // What is behind the dashes is the guest's.
    (
        "ticket-new",
        &[
            "-o",
            "json",
            "ticket",
            "new",
            "web-1",
            "--sign",
            "x",
            "--",
            "/bin/true",
        ],
    ),
    ("ticket-show", &["ticket", "show", "ticket"]),
    (
        "trust-change",
        &["trust", "change", "t.trust", "--sign", "k"],
    ),
    ("trust-show", &["trust", "show", "t.trust"]),
    ("trust-apply", &["trust", "apply", "t.trust"]),
    ("trust-ls", &["trust", "ls"]),
    ("trust-rm", &["trust", "rm", KEY]),
    ("goal-ls", &["goal", "ls"]),
    ("goal-show", &["goal", "show", GOAL]),
    (
        "goal-apply",
        &["goal", "apply", "g.yaml", "--sign", "k", "--to", "web-1"],
    ),
    (
        "goal-apply",
        &[
            "goal", "apply", "g.yaml", "--sign", "k", "--to", "web-1", "--watch",
        ],
    ),
    (
        "goal-apply",
        &[
            "goal",
            "apply",
            "g.yaml",
            "--sign",
            "k",
            "--to",
            "web-1",
            "--dry-run",
        ],
    ),
    (
        "image-inject",
        &[
            "image",
            "inject",
            "root",
            "--init",
            "none",
            "--agent",
            "/bin/true",
        ],
    ),
    (
        "image-cloud-init",
        &["image", "cloud-init", "--agent", "/bin/true"],
    ),
    (
        "access-check",
        &["access", "check", "--as", "user:a", "reach", "web-1:22"],
    ),
    ("access-ls", &["access", "ls", "--vm", "web-1"]),
    ("access-token", &["access", "token", "ci"]),
    ("doctor", &["doctor", "web-1"]),
    ("config", &["config"]),
    ("events", &["events"]),
    ("resolve", &["resolve", "web-1"]),
    ("reload", &["reload"]),
    ("completion", &["completion", "bash"]),
    ("version", &["version"]),
];

fn fake() -> Fake {
    Fake::start(|asked| {
        let done = || task('3', "a", 1, "done");
        match (asked.method.as_str(), asked.path.as_str()) {
            (_, "/v1/config" | "/v1/reload") => {
                Say::Json(json!({"reads": 1, "error": null, "restart": []}))
            }
            (_, path) if path.starts_with("/v1/access?") => Say::Json(json!({
                "allowed": true, "caller": ["user:a", "anyone"], "by": "aditd.toml:3", "reason": null, "text": "yes",
                "hidden": false,
            })),
            (_, path) if path.starts_with("/v1/grants") => Say::Json(json!([])),
            (_, "/v1/vms/web-1/freeze") => Say::Json(json!({
                "file_systems": ["/"], "count": 1, "left_ms": 30_000,
            })),
            ("GET", "/v1/trust") => Say::Json(json!([])),
            (_, path) if path.starts_with("/v1/trust") => Say::Json(json!({
                "signer": KEY, "own": false, "sequence": 1, "vms": [], "given_at": "2026-11-20T22:00:00Z",
            })),
            ("GET", "/v1/vms") => Say::Json(json!([vm("web-1")])),
            (_, path) if path.starts_with("/v1/vms") => Say::Json(vm("web-1")),
            (_, path) if path.starts_with("/v1/host-events") => Say::Lines(vec![json!({
                "cursor": "0123456789abcdef.1", "at": "2026-11-20T22:00:00Z", "kind": "started",
            })]),
            (_, path) if path.starts_with("/v1/resolve") => Say::Json(json!({
                "vm": "web-1", "host": "alpha", "here": true, "claims": [],
            })),
            (_, path) if path.starts_with("/v1/events") => {
                let states = ["queued", "done"];
                Say::Lines(states.map(|s| event(task('3', "a", 1, s))).to_vec())
            }
            ("GET", path) if path.starts_with("/v1/goals?") => Say::Json(json!([])),
            (_, path) if path.starts_with("/v1/goals") => Say::Json(goal(&[done()])),
            (_, path) if path.contains("/output") => Say::With("x", "y".into(), b"text".into()),
            (_, path) if path.starts_with("/v1/tasks?") => Say::Json(json!([done()])),
            _ => Say::Json(done()),
        }
    })
}

/// The commands that have no further ones below them, as their manual pages are named.
fn commands(fake: &Fake) -> BTreeSet<String> {
    let dir = fake.dir().join("man");
    std::fs::create_dir(&dir).unwrap();
    let out = fake.adit(&["--man-pages", dir.to_str().unwrap()]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let names = std::fs::read_dir(&dir).unwrap().map(|page| {
        let name = page.unwrap().file_name().into_string().unwrap();
        name.trim_end_matches(".1")
            .trim_start_matches("adit")
            .trim_start_matches('-')
            .to_owned()
    });
    let all: BTreeSet<String> = names.collect();
    let has_more = |name: &str| {
        all.iter()
            .any(|n| n.strip_prefix(name).is_some_and(|r| r.starts_with('-')))
    };
    let leaves = all
        .iter()
        .filter(|name| !name.is_empty() && !has_more(name));
    leaves.cloned().collect()
}

#[test]
fn every_command_prints_json_and_nothing_else_if_asked() {
    let fake = fake();
    std::fs::create_dir(fake.dir().join("root")).unwrap();
    let yaml = "steps: [{id: a, script: {interpreter: /bin/sh, script: x}}]";
    std::fs::write(fake.dir().join("g.yaml"), yaml).unwrap();
    let mut called: BTreeSet<String> = CALLS.iter().map(|(name, _)| (*name).to_owned()).collect();
    called.extend(ELSEWHERE.map(str::to_owned));
    assert_eq!(called, commands(&fake), "each has a call above");
    for (name, args) in CALLS {
        let out = fake.adit(&[args, &["-o", "json"][..]].concat());
        assert!(out.status.success(), "{args:?}: {}", text(&out.stderr));
        let said = text(&out.stdout);
        assert!(!said.is_empty(), "{args:?}");
        // One value, or one a line where there are many over time.
        for line in said.lines() {
            let value: Result<Value, _> = serde_json::from_str(line);
            assert!(value.is_ok(), "{args:?}: {line}");
        }
        if let Some(file) = name.strip_suffix("-new")
            && matches!(file, "card" | "ticket")
            && said.starts_with('{')
        {
            std::fs::write(fake.dir().join(file), &out.stdout).unwrap();
        }
    }
}

#[test]
fn a_command_line_that_is_wrong_is_an_error_in_json_too() {
    let dir = tempfile::tempdir().unwrap();
    for args in [
        &["vm", "ls", "--bogus", "-o", "json"][..],
        &["-o", "json", "vm", "show"],
        &["--output=json", "wait", "web-1", "--timeout", "x"],
        &["-ojson"],
    ] {
        let out = crate::adit(dir.path(), args);
        let said: Value = serde_json::from_slice(&out.stderr).unwrap();
        assert_eq!(
            (out.status.code(), said["error"]["code"].as_str()),
            (Some(2), Some("usage")),
            "{said}"
        );
        assert!(out.stdout.is_empty());
    }
    // Help is no error.
    let out = crate::adit(dir.path(), &["vm", "--help", "-o", "json"]);
    assert!(out.status.success() && text(&out.stdout).contains("Usage"));
}
