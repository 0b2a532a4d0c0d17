//! The real `adit` binary, as a person calls it.
#![allow(missing_docs)]

mod access;
mod agents;
mod cards;
mod completing;
mod connecting;
mod doctor;
mod elsewhere;
mod events;
mod fake;
mod formats;
mod forwarding;
mod goals;
mod image;
mod lists;
mod mistakes;
mod printing;
mod proxy;
mod ssh;
mod trust;
mod vms;
mod waiting;
mod watching;

use std::path::Path;
use std::process::{Command, Output};

pub fn adit(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_adit"))
        .args(args)
        .current_dir(dir)
        .env("ADIT_SOCKET", dir.join("none.sock"))
        .output()
        .expect("adit starts")
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_key_is_private_and_not_overwritten() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let out = adit(dir.path(), &["key", "new", "fleet.key"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let mode = std::fs::metadata(dir.path().join("fleet.key"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let public = std::fs::read_to_string(dir.path().join("fleet.key.pub")).unwrap();
    assert_eq!(text(&out.stdout), public);
    let private = std::fs::read(dir.path().join("fleet.key")).unwrap();
    assert_eq!(
        adit(dir.path(), &["key", "new", "fleet.key"]).status.code(),
        Some(1)
    );
    assert_eq!(
        std::fs::read(dir.path().join("fleet.key")).unwrap(),
        private
    );
    assert_eq!(
        text(&adit(dir.path(), &["key", "show", "fleet.key"]).stdout),
        public
    );
}

#[test]
fn a_goal_is_signed_and_saved_and_every_signature_holds() {
    let dir = tempfile::tempdir().unwrap();
    adit(dir.path(), &["key", "new", "k"]);
    std::fs::write(
        dir.path().join("g.yaml"),
        "steps:\n  - id: a\n    script: {interpreter: /bin/sh, script: \"true\"}\n",
    )
    .unwrap();
    let args = [
        "goal",
        "apply",
        "g.yaml",
        "--sign",
        "k",
        "--to",
        "web-1,web-2",
        "--save",
        "s.json",
        "--dry-run",
    ];
    let out = adit(dir.path(), &args);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(text(&out.stdout).contains(r#""audience":{"vms":["web-1","web-2"]}"#));
    let mut trust = adit_tasks::TrustStore::default();
    trust
        .add_text(&std::fs::read_to_string(dir.path().join("k.pub")).unwrap())
        .unwrap();
    let envelope = std::fs::read(dir.path().join("s.json")).unwrap();
    let verified = adit_tasks::dsse::Envelope::parse(&envelope)
        .unwrap()
        .verify(&trust)
        .unwrap();
    assert_eq!(text(verified.payload()).trim(), text(&out.stdout).trim());
}

#[test]
fn a_public_key_says_what_it_is_trusted_for() {
    let dir = tempfile::tempdir().unwrap();
    let out = adit(dir.path(), &["key", "new", "k", "--role", "goal,card"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let public = std::fs::read_to_string(dir.path().join("k.pub")).unwrap();
    assert!(
        public.starts_with("roles=card,goal adit-ed25519 "),
        "{public}"
    );
    let shown = adit(dir.path(), &["key", "show", "k", "--role", "goal,card"]);
    assert_eq!(text(&shown.stdout), public);
    let out = adit(dir.path(), &["key", "new", "l", "--role", "goals"]);
    assert_eq!(out.status.code(), Some(2), "{}", text(&out.stderr));
    assert!(!dir.path().join("l").exists());
}

#[test]
fn a_malformed_goal_names_file_line_and_key() {
    let dir = tempfile::tempdir().unwrap();
    adit(dir.path(), &["key", "new", "k"]);
    std::fs::write(
        dir.path().join("g.yaml"),
        "steps:\n  - id: a\n    scrpt: {}\n",
    )
    .unwrap();
    let out = adit(
        dir.path(),
        &["goal", "apply", "g.yaml", "--sign", "k", "--to", "web-1"],
    );
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1));
    assert!(
        said.contains("g.yaml:3") && said.contains("scrpt") && said.contains("help:"),
        "{said}"
    );
}

#[test]
fn without_aditd_it_says_what_to_start() {
    let dir = tempfile::tempdir().unwrap();
    let out = adit(dir.path(), &["vm", "ls"]);
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(3), "{said}");
    assert!(
        said.contains("none.sock") && said.contains("aditd run"),
        "{said}"
    );
    let out = adit(dir.path(), &["vm", "show", "Web-1", "-o", "json"]);
    assert_eq!(out.status.code(), Some(4));
    assert!(text(&out.stderr).starts_with("{\"error\":{\"code\":\"unknown-vm\""));
}

#[test]
fn an_aditd_that_does_not_answer_is_not_waited_for_without_end() {
    let dir = tempfile::tempdir().unwrap();
    // The kernel takes the connection; nobody else does.
    let _mute = std::os::unix::net::UnixListener::bind(dir.path().join("none.sock")).unwrap();
    for args in [
        &["vm", "ls"][..],
        &["wait", "web-1", "--for", "agent", "--timeout", "10ms"],
        &["task", "watch"],
    ] {
        let out = adit(
            dir.path(),
            &[args, &["--request-timeout", "100ms"]].concat(),
        );
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(3), "{args:?}: {said}");
        assert!(
            said.contains("has not answered") && said.contains("systemctl status"),
            "{said}"
        );
    }
}

#[test]
fn help_teaches_and_completions_exist() {
    let dir = tempfile::tempdir().unwrap();
    let help = text(&adit(dir.path(), &["--help"]).stdout);
    for word in ["Examples:", "Exit status:", "adit task watch"] {
        assert!(help.contains(word), "{help}");
    }
    assert!(text(&adit(dir.path(), &["completion", "bash"]).stdout).contains("complete"));
    assert_eq!(adit(dir.path(), &["frobnicate"]).status.code(), Some(2));
}

#[test]
fn a_wrong_command_line_is_status_2_and_names_no_option_that_nobody_gave() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("g.yaml"), "steps: []").unwrap();
    for args in [
        &["vm", "show"][..],
        &["vm", "add", "x", "--half-closes"],
        &["goal", "apply", "g.yaml", "--sign", "k"],
        &["wait", "web-1", "--timeout", "soon"],
    ] {
        let out = adit(dir.path(), args);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{args:?}: {said}");
        assert!(!said.contains("--socket"), "{args:?}: {said}");
    }
    let help = text(&adit(dir.path(), &["--help"]).stdout);
    for status in ["0", "1", "2", "3", "4", "5", "124", "130", "141"] {
        let told = help
            .lines()
            .any(|l| l.trim_start().starts_with(&format!("{status}  ")));
        assert!(told, "{status}: {help}");
    }
}
