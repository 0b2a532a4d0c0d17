//! `adit card`.

use adit_tasks::TrustStore;
use adit_tasks::card::{self, Here};

use crate::{adit, text};

#[test]
fn a_card_is_signed_shown_and_believed_by_whoever_trusts_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let run = |args: &[&str]| adit(dir.path(), args);
    for key in ["fleet.key", "other.key", "guest.key"] {
        assert!(run(&["key", "new", key, "--role", "card"]).status.success());
    }
    let new = [
        "card",
        "new",
        "web-1",
        "--labels",
        "env=prod,tier=web",
        "--sign",
        "fleet.key",
        "--generation",
        "7",
        "--guest-pk",
        "guest.key.pub",
    ];
    // The file of a guest's key has no roles.
    let shown = run(&["key", "show", "guest.key"]);
    std::fs::write(dir.path().join("guest.key.pub"), shown.stdout).unwrap();
    let json = run(&new);
    assert!(json.status.success(), "{}", text(&json.stderr));
    let word = run(&[&new[..], &["--word", "--not-after", "2099-01-01T00:00:00Z"]].concat());
    assert!(!text(&word.stdout).contains([',', '"', '{']));
    let mut trust = TrustStore::default();
    let public = std::fs::read_to_string(dir.path().join("fleet.key.pub")).unwrap();
    trust.add_text(&public).unwrap();
    for out in [&json.stdout, &word.stdout] {
        let envelope = card::from_text(out).unwrap();
        let here = Here {
            vm_id: None,
            now_ms: 0,
        };
        let proved = card::check(&envelope, &trust, here).unwrap();
        let proved = proved.not_before(7).unwrap();
        assert_eq!(proved.card.labels.to_string(), "env=prod, tier=web");
        assert!(proved.card.guest_pk.is_some());
    }
    std::fs::write(dir.path().join("web-1.card"), &word.stdout).unwrap();
    let out = run(&["card", "show", "web-1.card"]);
    let said = text(&out.stdout);
    for part in [
        "web-1",
        "env=prod, tier=web",
        "2099-01-01T00:00:00Z",
        "not checked",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let good = run(&[
        "-o",
        "json",
        "card",
        "show",
        "web-1.card",
        "--trust",
        "fleet.key.pub",
    ]);
    let shown: serde_json::Value = serde_json::from_slice(&good.stdout).unwrap();
    assert_eq!(shown["proved"], true, "{shown}");
    assert_eq!(shown["labels"]["tier"], "web");
    let bad = run(&["card", "show", "web-1.card", "--trust", "other.key.pub"]);
    assert_eq!(bad.status.code(), Some(1));
    assert!(
        text(&bad.stderr).contains("not trusted"),
        "{}",
        text(&bad.stderr)
    );
}

#[test]
fn what_no_guest_would_take_is_not_signed() {
    let dir = tempfile::tempdir().unwrap();
    adit(dir.path(), &["key", "new", "k"]);
    let long: Vec<String> = (0..12)
        .map(|n| format!("label-{n}={}", "x".repeat(60)))
        .collect();
    let long = long.join(",");
    for (args, why) in [
        (["Web-1", "--labels", "a=b"], "names no VM"),
        (["web-1", "--labels", "a"], "is no label"),
        (["web-1", "--labels", "a=b,a=c"], "given twice"),
        (["web-1", "--labels", "A=b"], "no name of a label"),
        (["web-1", "--labels", &long], "at most 1024"),
        (["web-1", "--generation", "0"], "generation"),
        (
            ["web-1", "--not-after", "2020-01-01T00:00:00Z"],
            "over already",
        ),
        (["web-1", "--guest-pk", "k"], "adit key"),
    ] {
        let args = [&["card", "new"][..], &args, &["--sign", "k"]].concat();
        let out = adit(dir.path(), &args);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{args:?}: {said}");
        assert!(
            said.contains(why) && out.stdout.is_empty(),
            "{args:?}: {said}"
        );
    }
}
