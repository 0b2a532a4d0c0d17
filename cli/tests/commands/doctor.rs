//! `adit doctor`: what it prints, and with which status it ends.

use serde_json::{Value, json};

use crate::fake::{Fake, Say, command, vm};
use crate::text;

fn config(error: Option<&str>) -> Value {
    json!({"reads": 1, "error": error, "restart": [], "version": "0.1.0"})
}

/// An aditd with a VM that is well, and one whose policy file is not.
fn with_two() -> Fake {
    Fake::start(|asked| {
        let mut ill = vm("web-2");
        ill["faults"] = json!([{"kind": "policy", "text": "policy-bad: line 3\u{1b}[2J"}]);
        Say::Json(match asked.path.as_str() {
            "/v1/config" => config(None),
            "/v1/vms" => json!([vm("web-1"), ill]),
            "/v1/vms/web-1" => vm("web-1"),
            "/v1/vms/web-2" => ill,
            _ => return Say::Error(404, "unknown-vm"),
        })
    })
}

#[test]
fn a_vm_that_is_well_ends_with_0_and_each_check_is_named() {
    let out = with_two().adit(&["doctor", "web-1"]);
    let said = text(&out.stdout);
    assert_eq!(out.status.code(), Some(0), "{said}{}", text(&out.stderr));
    for check in [
        "host",
        "port process",
        "VMM",
        "session",
        "policy",
        "last dial",
    ] {
        let is_named = |l: &str| {
            l.split_once(' ')
                .is_some_and(|(_, l)| l.trim_start().starts_with(&format!("{check}: ")))
        };
        assert!(said.lines().any(is_named), "{check}: {said}");
    }
    assert!(!said.contains("failed"), "{said}");
}

#[test]
fn what_has_failed_ends_with_6_and_has_its_remedy_safe_on_a_terminal() {
    let fake = with_two();
    for args in [&["doctor", "web-2"][..], &["doctor"]] {
        let out = fake.adit(args);
        let said = text(&out.stdout);
        assert_eq!(out.status.code(), Some(6), "{said}{}", text(&out.stderr));
        assert_eq!(said.matches("failed").count(), 1, "{said}");
        assert!(said.contains("do: ") && !said.contains('\u{1b}'), "{said}");
    }
    let out = fake.adit(&["doctor", "-o", "json"]);
    assert_eq!(out.status.code(), Some(6));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["ok"], false);
    let ok: Vec<_> = report["vms"]
        .as_array()
        .unwrap()
        .iter()
        .map(|vm| &vm["ok"])
        .collect();
    assert_eq!(ok, [true, false]);
}

#[test]
fn an_aditd_that_does_not_answer_is_not_called_a_vm_that_is_ill() {
    let dir = Fake::absent();
    let out = command(dir.path(), &["doctor", "web-1", "-o", "json"])
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(3));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["host"][0]["health"], "failed");
    assert_ne!(report["host"][0]["remedy"], "");
    let out = with_two().adit(&["doctor", "web-9"]);
    assert_eq!(out.status.code(), Some(4), "{}", text(&out.stderr));
}
