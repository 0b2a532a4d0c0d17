//! Who the guest is: by its configuration, as before, or by its card.

use std::fs;

use adit_tasks::PublicKey;
use adit_tasks::card::{self, Here};
use adit_tasks::dsse::{Type, sign_as};
use adit_tasks::wire::Outcome;
use ed25519_dalek::SigningKey;
use serde_json::{Value, json};

use crate::commands::agent;
use crate::host::{Host, counting, lines, refused, task};

fn enrol() -> SigningKey {
    SigningKey::from_bytes(&[9; 32])
}

fn card(vm: &str, generation: u64, more: Value) -> String {
    let mut card = json!({
        "vm_id": vm, "generation": generation, "labels": {"env": "prod"},
        "not_after": "2099-01-01T00:00:00Z"
    });
    for (key, value) in more.as_object().unwrap() {
        card[key] = value.clone();
    }
    sign_as(Type::Card, card.to_string().as_bytes(), &enrol())
}

/// An agent whose image trusts a key for cards; `vm_id`: in its configuration.
fn image(vm_id: bool) -> Host {
    let host = Host::new();
    let anchor = format!("roles=card {}", PublicKey::of(&enrol(), ""));
    fs::write(host.path("trust/enrol.pub"), anchor).unwrap();
    let path = host.path("adit-guest.toml");
    let mut config = fs::read_to_string(&path).unwrap();
    if !vm_id {
        config = config.replacen("vm_id = \"web-1\"\n", "", 1);
    }
    let file = host.path("card");
    fs::write(path, format!("card = \"{}\"\n{config}", file.display())).unwrap();
    host
}

fn status(host: &Host) -> String {
    let config = host.path("adit-guest.toml").display().to_string();
    let out = agent(&["status", "--config", &config]).output().unwrap();
    assert!(out.status.success());
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn an_image_without_an_id_is_who_its_card_says_and_nobody_before() {
    let mut host = image(false);
    let file = host.path("count");
    let first = task(host.goal(1, json!([counting(&file, "")])), "count", 1);
    host.start(None);
    let (mut session, facts) = host.accept();
    assert_eq!(facts.vm_id, "");
    assert!(session.enrolment.card.is_empty() && session.enrolment.faults.is_empty());
    refused(&session.run(&first), "not-enrolled");
    assert!(
        host.log().contains("not-enrolled effect="),
        "{}",
        host.log()
    );
    assert!(status(&host).contains("nobody: not-enrolled"));
    host.kill();
    drop(session);

    fs::write(host.path("card"), card("web-1", 3, json!({}))).unwrap();
    host.start(None);
    let (mut session, facts) = host.accept();
    assert_eq!(facts.vm_id, "web-1");
    assert_eq!(session.enrolment.place, "file");
    assert!(session.enrolment.guest_pk.is_some());
    let mut trust = adit_tasks::TrustStore::default();
    trust
        .add_text(&format!("roles=card {}", PublicKey::of(&enrol(), "")))
        .unwrap();
    let here = Here {
        vm_id: None,
        now_ms: 0,
    };
    let proved = card::check(&session.enrolment.card, &trust, here).unwrap();
    assert_eq!(proved.card.labels.to_string(), "env=prod");
    assert_eq!(session.run(&first).outcome, Outcome::Done);
    let said = status(&host);
    for part in ["web-1, by its card", "generation 3, from file", "env=prod"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    host.kill();
    drop(session);

    // One of a lower generation is not believed, also after a restart.
    fs::write(host.path("card"), card("web-1", 2, json!({}))).unwrap();
    host.start(None);
    let (session, facts) = host.accept();
    assert_eq!(facts.vm_id, "");
    let faults = &session.enrolment.faults;
    assert!(
        faults.len() == 1 && faults[0].starts_with("card-old: "),
        "{faults:?}"
    );
    assert_eq!(lines(&file), 1);
}

#[test]
fn an_image_with_an_id_goes_on_as_before_whatever_card_there_is() {
    let mut host = image(true);
    let file = host.path("count");
    let first = task(host.goal(1, json!([counting(&file, "")])), "count", 1);
    fs::write(host.path("card"), card("web-2", 3, json!({}))).unwrap();
    host.start(None);
    let (mut session, facts) = host.accept();
    assert_eq!(facts.vm_id, "web-1");
    let faults = session.enrolment.faults.clone();
    assert!(
        faults.len() == 1 && faults[0].starts_with("card-foreign: "),
        "{faults:?}"
    );
    let log = host.log();
    assert_eq!(log.matches("card-foreign").count(), 1, "{log}");
    assert!(status(&host).contains("card-foreign"));
    assert_eq!(session.run(&first).outcome, Outcome::Done);
}

#[test]
fn the_keys_that_a_card_brings_are_trusted_while_its_signer_is() {
    let mut host = image(false);
    fs::remove_file(host.path("trust/manager.pub")).unwrap();
    let file = host.path("count");
    let first = task(host.goal(1, json!([counting(&file, "")])), "count", 1);
    let manager = PublicKey::of(&host.key, "").to_string();
    let bringing = card("web-1", 3, json!({"anchors": [manager]}));
    fs::write(host.path("card"), &bringing).unwrap();
    host.start(None);
    // Its signer may say who a guest is, and not who may order.
    let (session, facts) = host.accept();
    assert_eq!((facts.vm_id.as_str(), facts.anchors), ("", 0));
    assert!(session.enrolment.faults[0].starts_with("card-too-wide: "));
    host.kill();
    drop(session);

    let wide = format!("roles=card,goal {}", PublicKey::of(&enrol(), ""));
    fs::write(host.path("trust/enrol.pub"), wide).unwrap();
    host.start(None);
    let (mut session, facts) = host.accept();
    // The card's signer, and the key that it brings.
    assert_eq!((facts.vm_id.as_str(), facts.anchors), ("web-1", 2));
    assert_eq!(session.run(&first).outcome, Outcome::Done);
    let second = task(host.goal(2, json!([counting(&file, "")])), "count", 1);
    fs::remove_file(host.path("trust/enrol.pub")).unwrap();
    refused(&session.run(&second), "no-trust-anchor");
    assert_eq!(lines(&file), 1);
}

#[test]
fn r133_a_card_that_pins_another_guests_key_is_not_believed() {
    let mut host = image(false);
    let own = SigningKey::from_bytes(&[5; 32]);
    let pin = |key: &SigningKey| json!({"guest_pk": PublicKey::of(key, "").to_string()});
    fs::write(host.path("card"), card("web-1", 1, pin(&own))).unwrap();
    host.start(None);
    let (session, facts) = host.accept();
    assert_eq!(facts.vm_id, "");
    assert!(session.enrolment.faults[0].starts_with("card-other-key: "));
    host.kill();
    drop(session);
    let private = adit_tasks::key::format_private(&own);
    fs::write(host.path("state/guest.key"), private).unwrap();
    host.start(None);
    let (session, facts) = host.accept();
    assert_eq!(facts.vm_id, "web-1");
    let bytes = PublicKey::of(&own, "").to_bytes();
    assert_eq!(session.enrolment.guest_pk, Some(bytes));
}

/// Runs a command of the agent on the host's configuration; exit status and what it printed.
fn command(host: &Host, args: &[&str]) -> (Option<i32>, String) {
    let config = host.path("adit-guest.toml").display().to_string();
    let all = [args, &["--config", &config]].concat();
    let out = agent(&all).output().unwrap();
    let said = [out.stdout, out.stderr].concat();
    (out.status.code(), String::from_utf8(said).unwrap())
}

#[test]
fn r133_a_sealed_image_has_no_identity_and_each_copy_gets_its_own() {
    let mut host = image(false);
    fs::write(host.path("card"), card("web-1", 3, json!({}))).unwrap();
    host.start(None);
    let (session, _) = host.accept();
    let first = session.enrolment.guest_pk;
    let (status, said) = command(&host, &["seal"]);
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("stop it first"), "{said}");
    host.kill();
    drop(session);
    assert!(
        command(&host, &["self-test"])
            .1
            .contains("this disk has an identity")
    );
    let (status, said) = command(&host, &["seal"]);
    assert_eq!(status, Some(0), "{said}");
    for file in ["guest.key", "enrolment.json", "journal.redb"] {
        assert!(
            said.contains(file) && !host.path("state").join(file).exists(),
            "{said}"
        );
    }
    assert!(!host.path("card").exists() && host.path("trust/enrol.pub").exists());
    assert!(command(&host, &["seal"]).1.contains("no identity"));
    let (status, said) = command(&host, &["self-test"]);
    assert_eq!(status, Some(1), "{said}");
    assert!(
        said.contains("sealed:") && said.contains("FAILS  not-enrolled"),
        "{said}"
    );

    // A copy with a card of its own, of a lower generation.
    fs::write(host.path("card"), card("web-2", 1, json!({}))).unwrap();
    host.start(None);
    let (session, facts) = host.accept();
    assert_eq!(facts.vm_id, "web-2");
    let second = session.enrolment.guest_pk;
    assert!(first.is_some() && second.is_some() && first != second);
    host.kill();
    drop(session);

    // A copy of this one that was not sealed is noticed by its card, and the journal stays.
    let journal = host.path("state/journal.redb");
    assert!(journal.exists());
    fs::write(host.path("card"), card("web-3", 1, json!({}))).unwrap();
    host.start(None);
    let (session, facts) = host.accept();
    assert_eq!(facts.vm_id, "web-3");
    let third = session.enrolment.guest_pk;
    assert!(third.is_some() && third != second);
    assert!(
        host.log()
            .contains("enrolled-anew why=\"this guest was web-2\"")
    );
    host.kill();
    drop(session);
    host.start(None);
    assert_eq!(host.accept().0.enrolment.guest_pk, third);
}

#[test]
fn an_image_with_an_id_is_sealed_only_if_that_is_meant() {
    let host = image(true);
    let (status, said) = command(&host, &["seal"]);
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("--keep-vm-id"), "{said}");
    assert_eq!(command(&host, &["seal", "--keep-vm-id"]).0, Some(0));
}

#[test]
fn r99_no_key_is_made_or_read_where_others_could_have_put_one() {
    use std::os::unix::fs::PermissionsExt;
    let mut host = image(true);
    let state = host.path("state");
    fs::create_dir(&state).unwrap();
    fs::set_permissions(&state, fs::Permissions::from_mode(0o777)).unwrap();
    let planted = adit_tasks::key::format_private(&SigningKey::from_bytes(&[5; 32]));
    fs::write(state.join("guest.key"), planted).unwrap();
    host.start(None);
    let (session, _) = host.accept();
    assert_eq!(session.enrolment.guest_pk, None);
    let faults = &session.enrolment.faults;
    for code in ["state-dir-writable: ", "journal-unavailable: "] {
        assert!(faults.iter().any(|f| f.starts_with(code)), "{faults:?}");
    }
    assert!(!state.join("enrolment.json").exists());
}

#[test]
fn r100_without_a_place_for_its_key_the_guest_serves_on_and_says_so() {
    let mut host = image(false);
    // As on a read-only root: nothing can be made there.
    fs::write(host.path("state"), "").unwrap();
    fs::write(host.path("card"), card("web-1", 3, json!({}))).unwrap();
    host.start(None);
    let (session, facts) = host.accept();
    assert_eq!(
        (facts.vm_id.as_str(), session.enrolment.guest_pk),
        ("web-1", None)
    );
    let faults = session.enrolment.faults.join("\n");
    assert!(faults.contains("no-guest-key: "), "{faults}");
    assert!(faults.contains("enrolment-not-kept: "), "{faults}");
}
