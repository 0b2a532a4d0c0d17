//! `adit trust`.

use std::fs;
use std::path::Path;

use adit_tasks::anchor::TrustStore;
use adit_tasks::trust::{self, Document, Held, Here};
use serde_json::Value;

use crate::{adit, text};

fn ok(dir: &Path, args: &[&str]) -> String {
    let out = adit(dir, args);
    assert!(out.status.success(), "{args:?}: {}", text(&out.stderr));
    text(&out.stdout).to_owned()
}

fn keys(dir: &Path, names: &[(&str, &str)]) {
    for (name, role) in names {
        ok(dir, &["key", "new", name, "--role", role]);
    }
}

/// A guest whose image trusts these files takes what is in this one.
fn taken(dir: &Path, file: &str, image: &[&str], held: &mut Held) -> Result<Document, String> {
    let mut trust = TrustStore::default();
    for name in image {
        trust
            .add_text(&fs::read_to_string(dir.join(name)).unwrap())
            .unwrap();
    }
    let envelope = fs::read_to_string(dir.join(file)).unwrap();
    let here = Here {
        vm_id: None,
        now_ms: 0,
    };
    let now = held.applied_to(&trust, None);
    let proved = trust::check(envelope.trim().as_bytes(), &now, here).map_err(|e| e.to_string())?;
    let document = proved.document.clone();
    held.take(proved, &trust, None).map_err(|e| e.to_string())?;
    Ok(document)
}

#[test]
fn a_document_goes_on_from_change_to_change_and_guests_take_each() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    keys(
        dir,
        &[
            ("enrol.key", "card,goal"),
            ("one.key", "goal"),
            ("two.key", "goal"),
        ],
    );
    let image = ["enrol.key.pub", "one.key.pub"];
    let mut held = Held::default();
    let change = |more: &[&str]| {
        let begin = ["trust", "change", "enrol.trust", "--sign", "enrol.key"];
        ok(dir, &[&begin, more].concat())
    };
    let said = change(&["--add", "two.key.pub"]);
    assert!(
        said.contains("adds         adit-ed25519") && said.contains(" two"),
        "{said}"
    );
    let first = taken(dir, "enrol.trust", &image, &mut held).unwrap();
    // The signer, and the key that was named.
    assert_eq!((first.anchors.len(), first.revoked.len()), (2, 0));
    change(&["--revoke", "one.key.pub"]);
    let second = taken(dir, "enrol.trust", &image, &mut held).unwrap();
    assert!(second.sequence > first.sequence);
    assert_eq!((second.anchors.len(), second.revoked.len()), (2, 1));
    // By its id, and with nothing: only the time is another then.
    let two = first
        .anchors
        .iter()
        .find(|a| a.roles.to_string() == "goal")
        .unwrap();
    change(&["--revoke", &two.key.id().to_string()]);
    change(&["--not-after", "2199-01-01T00:00:00Z"]);
    let last = taken(dir, "enrol.trust", &image, &mut held).unwrap();
    assert_eq!((last.anchors.len(), last.revoked.len()), (1, 2));
    let shown = [
        "-o",
        "json",
        "trust",
        "show",
        "enrol.trust",
        "--trust",
        "enrol.key.pub",
    ];
    let shown: Value = serde_json::from_str(&ok(dir, &shown)).unwrap();
    assert_eq!(shown["proved"], true);
    assert_eq!(shown["revoked"].as_array().unwrap().len(), 2);
    assert_eq!(shown["not_after"], "2199-01-01T00:00:00Z");
    assert!(ok(dir, &["trust", "show", "enrol.trust"]).contains("not checked without --trust"));
}

/// What the page on rotation does, twice: a key that may both, and keys for goals besides.
#[test]
fn a_key_that_brings_keys_for_goals_still_can_after_it_has_replaced_its_bringer() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    keys(
        dir,
        &[
            ("a.key", "card,goal"),
            ("b.key", "card,goal"),
            ("f.key", "goal"),
            ("g.key", "goal"),
        ],
    );
    let image = ["a.key.pub"];
    let mut held = Held::default();
    let mut change = |by: &str, what: &[&str]| {
        let (file, key) = (format!("{by}.trust"), format!("{by}.key"));
        let sign = ["trust", "change", &file, "--sign", &key];
        ok(dir, &[&sign[..], what].concat());
        taken(dir, &file, &image, &mut held)
    };
    change("a", &["--add", "b.key.pub"]).unwrap();
    change("b", &["--revoke", "a.key.pub", "--add", "f.key.pub"]).unwrap();
    change("b", &["--add", "g.key.pub"]).unwrap();
    change("b", &["--revoke", "f.key.pub"]).unwrap();
    // One that is signed by a key that ends with it brings nothing.
    let sign = ["trust", "change", "b.trust", "--sign", "b.key"];
    let both = ["--revoke", "b.key.pub", "--add", "g.key.pub"];
    let out = adit(dir, &[&sign[..], &both].concat());
    let said = text(&out.stderr);
    assert!(said.contains("revokes its own signer"), "{said}");
}

#[test]
fn the_key_for_cards_itself_is_rotated() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    keys(dir, &[("a.key", "card"), ("b.key", "card")]);
    let image = ["a.key.pub"];
    let mut held = Held::default();
    ok(
        dir,
        &[
            "trust",
            "change",
            "a.trust",
            "--sign",
            "a.key",
            "--add",
            "b.key.pub",
        ],
    );
    taken(dir, "a.trust", &image, &mut held).unwrap();
    ok(
        dir,
        &[
            "trust",
            "change",
            "b.trust",
            "--sign",
            "b.key",
            "--revoke",
            "a.key.pub",
        ],
    );
    taken(dir, "b.trust", &image, &mut held).unwrap();
    // It goes on alone; and the last one goes only if that is said.
    ok(dir, &["trust", "change", "b.trust", "--sign", "b.key"]);
    taken(dir, "b.trust", &image, &mut held).unwrap();
    ok(
        dir,
        &[
            "trust",
            "change",
            "b.trust",
            "--sign",
            "b.key",
            "--revoke",
            "b.key.pub",
        ],
    );
    let e = taken(dir, "b.trust", &image, &mut held).unwrap_err();
    assert!(e.contains("leaves no key"), "{e}");
    let last = [
        "trust",
        "change",
        "b.trust",
        "--sign",
        "b.key",
        "--leave-no-card-key",
    ];
    ok(dir, &last);
    taken(dir, "b.trust", &image, &mut held).unwrap();
}

#[test]
fn what_no_guest_would_take_is_not_signed_and_the_file_stays() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    keys(
        dir,
        &[
            ("enrol.key", "card"),
            ("other.key", "card"),
            ("old.key", "goal"),
        ],
    );
    let change = ["trust", "change", "f", "--sign", "enrol.key"];
    ok(
        dir,
        &[&change[..], &["--revoke", "old.key.pub", "--for", "web-1"]].concat(),
    );
    let before = fs::read(dir.join("f")).unwrap();
    for (args, why) in [
        (&["--add", "old.key.pub"][..], "was revoked"),
        (&["--revoke", "nothing"], "nothing"),
        (&["--not-after", "2020-01-01T00:00:00Z"], "over already"),
        (&["--for", "web-2"], "is for web-1"),
        (&["--sign", "other.key"], "cannot be used"),
    ] {
        let mut all = [&change[..], args].concat();
        if args[0] == "--sign" {
            all = vec!["trust", "change", "f", "--sign", "other.key"];
        }
        let out = adit(dir, &all);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{all:?}: {said}");
        let other = said.contains("goes on with the key that has begun it");
        assert!(said.contains(why) || other, "{all:?}: {said}");
        assert_eq!(fs::read(dir.join("f")).unwrap(), before);
    }
    fs::write(dir.join("bad"), "x").unwrap();
    let out = adit(dir, &["trust", "change", "bad", "--sign", "enrol.key"]);
    assert_eq!(out.status.code(), Some(1));
    assert_eq!(fs::read(dir.join("bad")).unwrap(), b"x");
}
