//! `adit agent upgrade`: what is signed, what is asked of aditd, and what becomes of it.

use std::path::PathBuf;
use std::process::Output;

use adit_blob::Digest;
use adit_tasks::Package;
use adit_tasks::dsse::{Envelope, Type};
use serde_json::{Value, json};

use crate::fake::{Asked, Fake, Say, vm};
use crate::text;

/// The agent that is built beside the command; the tests of one crate alone do not build it.
fn agent() -> Option<PathBuf> {
    let agent = PathBuf::from(env!("CARGO_BIN_EXE_adit")).with_file_name("adit-guest");
    if !agent.exists() {
        println!("skipped: {} is not built", agent.display());
        return None;
    }
    Some(agent)
}

fn upgrade(fake: &Fake, file: &str, more: &[&str]) -> Output {
    let new = fake.adit(&["key", "new", "agents.key", "--role", "agent", "--force"]);
    assert!(new.status.success());
    let given = ["agent", "upgrade", "--to", "web-1", "--package", file];
    let all = [&given[..], &["--sign", "agents.key"], more].concat();
    fake.adit(&all)
}

/// An aditd that has the file, whose VM answers the order so, and shows this afterwards.
fn aditd(digest: String, ordered: fn() -> Say, after: Value) -> Fake {
    let mut was_ordered = false;
    Fake::start(move |asked: &Asked| {
        let blob = format!("/v1/blobs/{digest}");
        match (&*asked.method, &*asked.path) {
            ("GET", path) if path == blob => {
                Say::Json(json!({"sha256": digest, "bytes": 9, "size": 9, "whole": true}))
            }
            ("POST", "/v1/vms/web-1/agent") => {
                was_ordered = true;
                ordered()
            }
            ("POST", _) => Say::Json(json!({"sha256": digest, "sent": 9, "size": 9, "kept": true})),
            _ if was_ordered => Say::Json(after.clone()),
            _ => {
                let mut before = vm("web-1");
                before["agent"] = json!("0.0.9");
                Say::Json(before)
            }
        }
    })
}

fn followed() -> Say {
    Say::Json(json!({"already": false, "waits": true}))
}

fn shows(program: Value, fault: Value) -> Value {
    let mut shown = vm("web-1");
    (shown["program"], shown["fault"]) = (program, fault);
    shown
}

#[test]
fn what_is_signed_is_the_program_with_its_version_and_the_oldest_that_runs() {
    let Some(agent) = agent() else { return };
    let content = std::fs::read(&agent).unwrap();
    let digest = Digest::of(&content).to_string();
    let runs = json!({"sha256": digest, "floor": "0.0.9", "taken_back": null});
    let fake = aditd(digest.clone(), followed, shows(runs, Value::Null));
    let out = upgrade(&fake, agent.to_str().unwrap(), &[]);
    let said = (text(&out.stdout), text(&out.stderr));
    assert_eq!(out.status.code(), Some(0), "{said:?}");
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(said.0, format!("web-1 runs agent {version}\n"));
    assert!(said.1.contains("waits for the end of the task"), "{said:?}");
    let asked = fake.asked();
    let order = asked.iter().find(|a| a.path == "/v1/vms/web-1/agent");
    let order: Value = serde_json::from_str(&order.unwrap().body).unwrap();
    let envelope = order["envelope"].as_str().unwrap();
    let envelope = Envelope::parse_as(Type::Agent, envelope.as_bytes()).unwrap();
    let package = Package::parse(envelope.unverified_payload()).unwrap();
    assert_eq!(package.version.to_string(), version);
    assert_eq!(package.oldest_fallback.to_string(), "0.0.9");
    assert_eq!(
        (package.size, package.digest),
        (content.len() as u64, Digest::of(&content).0)
    );
    // The same in JSON, and nothing else.
    let runs = json!({"sha256": digest, "floor": "0.0.9", "taken_back": null});
    let fake = aditd(digest.clone(), followed, shows(runs, Value::Null));
    let out = upgrade(&fake, agent.to_str().unwrap(), &["-o", "json"]);
    let line: Value = serde_json::from_str(&text(&out.stdout)).unwrap();
    let wanted = json!({"vm": "web-1", "version": version, "sha256": digest, "state": "runs"});
    assert_eq!((line, text(&out.stderr)), (wanted, String::new()));
}

#[test]
fn a_vm_that_runs_it_is_sent_no_file_and_is_told_what_it_may_not_go_back_to() {
    let Some(agent) = agent() else { return };
    let digest = Digest::of(&std::fs::read(&agent).unwrap()).to_string();
    let runs = json!({"sha256": digest, "floor": "0.0.9", "taken_back": null});
    let shown = shows(runs, Value::Null);
    let fake = Fake::start(move |asked: &Asked| match (&*asked.method, &*asked.path) {
        ("POST", "/v1/vms/web-1/agent") => Say::Json(json!({"already": true, "waits": false})),
        ("GET", "/v1/vms/web-1") => Say::Json(shown.clone()),
        ("GET", _) => Say::Json(json!({"sha256": digest, "bytes": 9, "size": 9, "whole": true})),
        _ => Say::Error(500, "sent"),
    });
    let out = upgrade(&fake, agent.to_str().unwrap(), &["-o", "json"]);
    let line: Value = serde_json::from_str(&text(&out.stdout)).unwrap();
    assert_eq!(line["state"], "already", "{}", text(&out.stderr));
    let asked = fake.asked();
    assert!(asked.iter().any(|a| a.path == "/v1/vms/web-1/agent"));
}

#[test]
fn an_agent_that_is_refused_taken_back_or_late_has_its_exit_status() {
    let Some(agent) = agent() else { return };
    let digest = Digest::of(&std::fs::read(&agent).unwrap()).to_string();
    let back = json!({"sha256": null, "floor": null, "taken_back": digest});
    let back = shows(back, json!("agent-taken-back: why"));
    let silent = shows(Value::Null, Value::Null);
    let refuses = || Say::Error(422, "agent-below-floor");
    for (ordered, after, more, status, says) in [
        (
            followed as fn() -> Say,
            back,
            &[][..],
            1,
            "error[taken-back]",
        ),
        (
            followed,
            silent.clone(),
            &["--timeout", "10ms"],
            124,
            "error[timeout]",
        ),
        (refuses, silent, &[], 1, "error[agent-below-floor]"),
    ] {
        let fake = aditd(digest.clone(), ordered, after);
        let out = upgrade(&fake, agent.to_str().unwrap(), more);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(status), "{says}: {said}");
        assert!(said.contains(says), "{says}: {said}");
    }
}

#[test]
fn what_is_no_agent_is_not_signed_and_no_vm_is_asked() {
    let fake = Fake::start(|_| Say::Error(500, "asked"));
    std::fs::write(
        fake.dir().join("script"),
        "#!/bin/sh\necho adit-guest 9.9.9\n",
    )
    .unwrap();
    for file in ["script", "agents.key", "/bin/true", "nothing"] {
        let out = upgrade(&fake, file, &[]);
        assert_eq!(out.status.code(), Some(1), "{file}: {}", text(&out.stderr));
    }
    assert_eq!(fake.asked().len(), 0);
}
