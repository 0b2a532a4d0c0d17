//! What the agent refuses, and that a refusal does nothing.

use std::fs;
use std::os::unix::fs::symlink;

use adit_tasks::wire::{Outcome, Task};
use ed25519_dalek::SigningKey;
use serde_json::{Value, json};

use crate::host::*;

#[test]
fn without_an_anchor_it_says_so_and_runs_nothing() {
    let mut host = Host::without_anchor();
    let file = host.path("count");
    let task = task(host.goal(1, json!([counting(&file, "")])), "count", 1);
    host.start(None);
    let (mut session, facts) = host.accept();
    assert_eq!((facts.anchors, facts.vm_id.as_str()), (0, "web-1"));
    refused(&session.run(&task), "no-trust-anchor");
    assert_eq!(lines(&file), 0);
    assert!(
        host.log()
            .contains("adit-guest: ready vm=web-1 anchors=0\n")
    );
}

#[test]
fn an_anchor_that_others_may_write_is_none() {
    use std::os::unix::fs::PermissionsExt;
    let mut host = Host::new();
    fs::set_permissions(
        host.path("trust/manager.pub"),
        fs::Permissions::from_mode(0o666),
    )
    .unwrap();
    host.start(None);
    assert_eq!(host.accept().1.anchors, 0);
}

#[test]
fn r113_a_trust_dir_or_configuration_that_others_may_write_or_own_makes_no_anchor() {
    use std::os::unix::fs::PermissionsExt;
    let foreign = nix::unistd::geteuid().is_root();
    for (what, mode, owner) in [
        ("trust", 0o777, None),
        ("trust", 0o770, None),
        ("trust", 0o755, Some(65534)),
        ("trust/manager.pub", 0o644, Some(65534)),
        ("trust/manager.pub", 0o620, None),
        ("adit-guest.toml", 0o666, None),
        ("adit-guest.toml", 0o644, Some(65534)),
    ] {
        if owner.is_some() && !foreign {
            eprintln!("skipped: only root can give {what} away");
            continue;
        }
        let mut host = Host::new();
        let path = host.path(what);
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        std::os::unix::fs::chown(&path, owner, owner).unwrap();
        let file = host.path("count");
        let task = task(host.goal(1, json!([counting(&file, "")])), "count", 1);
        host.start(None);
        let (mut session, facts) = host.accept();
        assert_eq!(facts.anchors, 0, "{what} {mode:o} {owner:?}");
        let report = session.run(&task);
        refused(&report, "no-trust-anchor");
        // The report names what is wrong where that is not one key of several.
        let named = report.reason.contains(path.to_str().unwrap());
        assert!(named || what.ends_with(".pub"), "{}", report.reason);
        assert_eq!(lines(&file), 0);
    }
    let mut host = Host::new();
    fs::set_permissions(host.path("trust"), fs::Permissions::from_mode(0o755)).unwrap();
    host.start(None);
    assert_eq!(host.accept().1.anchors, 1);
}

#[test]
fn r83_a_missing_or_damaged_signature_is_refused_and_nothing_runs() {
    let mut host = Host::new();
    let file = host.path("count");
    let good = task(host.goal(1, json!([counting(&file, "")])), "count", 1);
    host.start(None);
    let (mut session, _) = host.accept();
    let mut try_one = |envelope: Vec<u8>, what: &str| {
        let report = session.run(&Task {
            envelope,
            ..good.clone()
        });
        assert_eq!(
            report.outcome,
            Outcome::Refused,
            "{what}: {}",
            report.reason
        );
        let code = report.reason.split(':').next().unwrap();
        assert!(
            [
                "bad-envelope",
                "untrusted-key",
                "bad-signature",
                "task-id-mismatch"
            ]
            .contains(&code),
            "{what}: {}",
            report.reason
        );
    };
    let text: Value = serde_json::from_slice(&good.envelope).unwrap();
    let sig = text["signatures"][0].clone();
    for signatures in [
        json!(null),
        json!([]),
        json!("none"),
        json!({}),
        json!([null]),
        json!([{}]),
        json!([{"keyid": sig["keyid"], "sig": ""}]),
        json!([{"keyid": sig["keyid"], "sig": null}]),
        json!([{"keyid": sig["keyid"], "sig": 7}]),
        json!([{"keyid": sig["keyid"], "sig": "AAAA"}]),
        json!([{"keyid": "", "sig": sig["sig"]}]),
        json!([{"keyid": sig["keyid"], "sig": sig["sig"], "alg": "none"}]),
    ] {
        let mut bad = text.clone();
        bad["signatures"] = signatures.clone();
        try_one(serde_json::to_vec(&bad).unwrap(), &signatures.to_string());
    }
    let mut without = text.clone();
    without.as_object_mut().unwrap().remove("signatures");
    try_one(serde_json::to_vec(&without).unwrap(), "no signatures");
    for cut in [0, 1, good.envelope.len() / 2, good.envelope.len() - 1] {
        try_one(good.envelope[..cut].to_vec(), "cut");
    }
    for at in 0..good.envelope.len() {
        let mut bad = good.envelope.clone();
        bad[at] ^= 1;
        try_one(bad, &format!("byte {at} flipped"));
    }
    assert_eq!(lines(&file), 0);
    assert_eq!(session.run(&good).outcome, Outcome::Done);
}

#[test]
fn r84_another_vm_key_or_time_is_refused() {
    let mut host = Host::new();
    let file = host.path("count");
    let steps = json!([counting(&file, "")]);
    let stranger = SigningKey::from_bytes(&[8; 32]);
    let payload = serde_json::to_vec(&goal(1, "web-1", steps.clone())).unwrap();
    let foreign = adit_tasks::dsse::sign(&payload, &stranger).into_bytes();
    let mut late = goal(1, "web-1", steps.clone());
    late["not_after"] = json!("2021-01-01T00:00:00Z");
    let cases = [
        (host.sign(&goal(1, "web-2", steps)), "wrong-target"),
        (foreign, "untrusted-key"),
        (host.sign(&late), "expired"),
    ];
    host.start(None);
    let (mut session, _) = host.accept();
    for (envelope, code) in cases {
        refused(&session.run(&task(envelope, "count", 1)), code);
    }
    assert_eq!(lines(&file), 0);
}

#[test]
fn a_goal_is_refused_whose_key_has_another_role_and_runs_once_its_anchor_has_this_one() {
    let mut host = Host::new();
    let file = host.path("count");
    let anchor = host.path("trust/manager.pub");
    let line = fs::read_to_string(&anchor).unwrap();
    fs::write(&anchor, format!("roles=card,exec {line}")).unwrap();
    let first = task(host.goal(1, json!([counting(&file, "")])), "count", 1);
    host.start(None);
    let (mut session, facts) = host.accept();
    // None of its anchors may order anything.
    assert_eq!(facts.anchors, 0);
    refused(&session.run(&first), "wrong-role");
    assert_eq!(lines(&file), 0);
    fs::write(&anchor, format!("roles=card,goal {line}")).unwrap();
    assert_eq!(session.run(&first).outcome, Outcome::Done);
}

#[test]
fn r85_replays_are_refused_across_restarts_and_a_known_id_is_never_run_again() {
    let mut host = Host::new();
    let (first, second) = (host.path("first"), host.path("second"));
    let five = task(host.goal(5, json!([counting(&first, "")])), "count", 1);
    let five_other = task(host.goal(5, json!([counting(&second, "")])), "count", 1);
    assert_eq!(host.run(&five).outcome, Outcome::Done);
    refused(&host.run(&five_other), "replay");
    // The same id again, and the same id with another body.
    assert_eq!(host.run(&five).outcome, Outcome::Done);
    assert_eq!(
        host.run(&Task {
            envelope: five_other.envelope,
            ..five
        })
        .outcome,
        Outcome::Done
    );
    assert_eq!((lines(&first), lines(&second)), (1, 0));
}

#[test]
fn r85_goals_of_one_key_run_in_the_reverse_order_of_their_numbers_and_none_twice() {
    let mut host = Host::new();
    let file = host.path("count");
    let goals: Vec<Task> = [u64::MAX, 9, 5, 1]
        .map(|seq| {
            let said = format!("echo {seq}");
            task(host.goal(seq, json!([counting(&file, &said)])), "count", 1)
        })
        .into();
    for (ran, goal) in (1..).zip(&goals) {
        assert_eq!(host.run(goal).outcome, Outcome::Done);
        assert_eq!(lines(&file), ran);
    }
    for goal in &goals {
        assert_eq!(host.run(goal).outcome, Outcome::Done);
    }
    assert_eq!(lines(&file), goals.len());
}

#[test]
fn r89_a_signed_path_outside_of_the_guests_roots_is_denied() {
    let mut host = Host::new();
    let root = host.path("root");
    symlink(host.dir.path(), root.join("link")).unwrap();
    let root = root.to_str().unwrap();
    let paths = [
        "/etc/adit-r89".to_owned(),
        format!("{root}/link/escaped"),
        host.path("trust/new.pub").to_str().unwrap().into(),
    ];
    let file = |id: usize, path: &str| json!({"id": format!("f{id}"), "continue_on_error": true, "file": {"path": path, "content": "x", "owner": "0", "group": "0"}});
    let mut steps: Vec<Value> = paths.iter().enumerate().map(|(i, p)| file(i, p)).collect();
    steps.push(file(9, &format!("{root}/fine")));
    let envelope = host.goal(1, json!(steps));
    host.start(None);
    let (mut session, _) = host.accept();
    for i in 0..paths.len() {
        refused(
            &session.run(&task(envelope.clone(), &format!("f{i}"), 1)),
            "path-denied",
        );
    }
    if nix::unistd::geteuid().is_root() {
        assert_eq!(session.run(&task(envelope, "f9", 1)).outcome, Outcome::Done);
        assert_eq!(fs::read_to_string(format!("{root}/fine")).unwrap(), "x");
    }
    assert!(!host.path("escaped").exists() && !host.path("trust/new.pub").exists());
}

/// A step that says in a file that it was begun.
fn saying(id: &str, file: &std::path::Path, then: &str) -> Value {
    json!({"id": id, "script": {"interpreter": "/bin/sh", "script": format!("echo {id} >>\"$1\"\n{then}"), "args": [file]}})
}

#[test]
fn r107_a_step_whose_turn_it_is_not_is_refused_and_runs_when_it_is() {
    let mut host = Host::new();
    let file = host.path("order");
    let began = || fs::read_to_string(&file).unwrap_or_default();
    let mut two = saying("two", &file, "exit 3");
    two["continue_on_error"] = json!(true);
    let steps = json!([saying("one", &file, ""), two, saying("three", &file, "")]);
    let envelope = host.goal(1, steps);
    let step = |id: &str| task(envelope.clone(), id, 1);
    host.start(None);
    let (mut session, _) = host.accept();
    for id in ["three", "two"] {
        refused(&session.run(&step(id)), "out-of-order");
    }
    assert_eq!(began(), "");
    assert_eq!(session.run(&step("one")).outcome, Outcome::Done);
    refused(&session.run(&step("three")), "out-of-order");
    // What was acknowledged before a restart counts.
    host.kill();
    host.start(None);
    let (mut session, _) = host.accept();
    assert_eq!(session.run(&step("two")).outcome, Outcome::Failed);
    assert_eq!(session.run(&step("three")).outcome, Outcome::Done);
    assert_eq!(began(), "one\ntwo\nthree\n");
}

#[test]
fn r107_after_a_failed_step_the_host_cannot_order_the_rest() {
    let mut host = Host::new();
    let file = host.path("order");
    let steps = json!([saying("one", &file, "exit 3"), saying("two", &file, "")]);
    let envelope = host.goal(1, steps);
    host.start(None);
    let (mut session, _) = host.accept();
    let one = session.run(&task(envelope.clone(), "one", 1));
    assert_eq!(one.outcome, Outcome::Failed);
    refused(&session.run(&task(envelope, "two", 1)), "out-of-order");
    assert_eq!(lines(&file), 1);
}

#[test]
fn a_step_that_this_guests_policy_refuses_is_an_end_that_a_goal_may_allow() {
    let mut host = Host::new();
    let config = fs::read_to_string(host.path("adit-guest.toml")).unwrap();
    let config = format!("{config}enabled = false\n");
    fs::write(host.path("adit-guest.toml"), config).unwrap();
    let file = host.path("order");
    let motd = host.path("root/motd");
    let step =
        json!({"id": "motd", "continue_on_error": true, "file": {"path": motd, "content": "x"}});
    let envelope = host.goal(1, json!([step, saying("after", &file, "")]));
    host.start(None);
    let (mut session, _) = host.accept();
    refused(&session.run(&task(envelope.clone(), "motd", 1)), "policy");
    let after = session.run(&task(envelope, "after", 1));
    assert_eq!(after.outcome, Outcome::Done, "{}", after.reason);
    assert!(!motd.exists());
}

#[test]
fn a_kind_of_step_that_this_guest_does_not_know_is_refused_with_its_whole_goal() {
    let mut host = Host::new();
    let file = host.path("count");
    let later = json!({"id": "later", "reboot": {}});
    let envelope = host.goal(1, json!([counting(&file, ""), later]));
    host.start(None);
    let (mut session, _) = host.accept();
    for step in ["count", "later"] {
        let report = session.run(&task(envelope.clone(), step, 1));
        refused(&report, "bad-goal");
        assert!(report.reason.contains("`reboot`"), "{}", report.reason);
    }
    assert_eq!(lines(&file), 0);
}
