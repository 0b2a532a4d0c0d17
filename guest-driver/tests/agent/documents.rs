//! Trust documents: which keys count from then on, and which never again.

use std::fs;

use adit_tasks::dsse::{Type, id_of, sign_as};
use adit_tasks::wire::{self, Outcome, Task};
use adit_tasks::{KeyId, PublicKey};
use ed25519_dalek::SigningKey;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::commands::agent;
use crate::host::{Host, Said, Session, counting, lines, refused, task};
use crate::own::until;

fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

fn id(seed: u8) -> KeyId {
    id_of(&key(seed))
}

fn line(roles: &str, seed: u8) -> String {
    format!("roles={roles} {}", PublicKey::of(&key(seed), ""))
}

fn document(by: u8, sequence: u64, more: Value) -> String {
    let mut document =
        json!({"version": 1, "sequence": sequence, "not_after": "2099-01-01T00:00:00Z"});
    for (key, value) in more.as_object().unwrap() {
        document[key] = value.clone();
    }
    sign_as(Type::Trust, document.to_string().as_bytes(), &key(by))
}

fn revokes(seeds: &[u8]) -> Value {
    let ids: Vec<_> = seeds.iter().map(|seed| id(*seed).to_string()).collect();
    json!({ "revoked": ids })
}

/// An image that trusts key 7 for goals, as every test's, key 1 for cards and goals, and key 2 for cards.
fn image() -> Host {
    let mut host = Host::new();
    for (seed, roles) in [(1, "card,goal"), (2, "card")] {
        fs::write(host.path(&format!("trust/{seed}.pub")), line(roles, seed)).unwrap();
    }
    let path = host.path("adit-guest.toml");
    let config = fs::read_to_string(&path).unwrap();
    let card = host.path("etc/card");
    fs::create_dir(host.path("etc")).unwrap();
    fs::write(path, format!("card = \"{}\"\n{config}", card.display())).unwrap();
    host.features = wire::TRUST;
    host
}

fn ran(host: &Host, seq: u64) -> Task {
    let file = host.path("count");
    task(host.goal(seq, json!([counting(&file, "")])), "count", 1)
}

fn code(session: &mut Session, envelope: &str) -> String {
    let held = session.trust(envelope);
    held.refused.split(':').next().unwrap().to_owned()
}

#[test]
fn r85_what_a_host_passes_on_is_taken_once_in_its_order_and_survives_a_restart() {
    let mut host = image();
    host.start(None);
    let (mut session, facts) = host.accept();
    assert_eq!(facts.anchors, 2);
    assert_eq!(session.trust, Some(wire::TrustHeld::default()));
    assert_eq!(session.run(&ran(&host, 1)).outcome, Outcome::Done);

    let fifth = document(1, 5, revokes(&[7]));
    let held = session.trust(&fifth);
    let of = |sequence| wire::HeldDocument {
        signer: id(1).0,
        own: false,
        sequence,
    };
    assert_eq!(
        (held.documents, held.revoked, held.refused),
        (vec![of(5)], 1, String::new())
    );
    // The file of the key is still there.
    assert!(host.path("trust/manager.pub").exists());
    let report = session.run(&ran(&host, 2));
    refused(&report, "revoked-key");
    assert!(
        report.reason.contains(&id(7).to_string()),
        "{}",
        report.reason
    );

    for (envelope, want) in [
        (fifth.clone(), ""),
        (document(1, 5, json!({})), "trust-changed"),
        (document(1, 4, json!({})), "trust-old"),
        (document(1, 9, json!({"vm_id": "web-2"})), "trust-foreign"),
        (
            document(1, 9, json!({"not_after": "2020-01-01T00:00:00Z"})),
            "trust-expired",
        ),
        (
            document(2, 9, json!({"anchors": [line("goal", 8)]})),
            "trust-too-wide",
        ),
        (document(8, 9, json!({})), "trust-untrusted"),
        (document(7, 9, json!({})), "trust-untrusted"),
        (document(2, 9, revokes(&[1, 2])), "trust-no-card-key"),
        (fifth[..fifth.len() - 1].to_owned(), "trust-damaged"),
        (document(1, 9, json!({"surprise": 1})), "trust-bad"),
        (" ".repeat(100_000), "trust-damaged"),
    ] {
        assert_eq!(code(&mut session, &envelope), want);
    }
    host.kill();
    drop(session);
    host.start(None);
    let (mut session, facts) = host.accept();
    assert_eq!(session.trust.take().unwrap().documents, [of(5)]);
    assert_eq!(facts.anchors, 1);
    refused(&session.run(&ran(&host, 3)), "revoked-key");
    assert_eq!(code(&mut session, &document(1, 4, json!({}))), "trust-old");
    // A newer one that says nothing of it does not bring it back.
    assert_eq!(code(&mut session, &document(1, 6, json!({}))), "");
    refused(&session.run(&ran(&host, 4)), "revoked-key");
    assert_eq!(lines(&host.path("count")), 1);
    let config = host.path("adit-guest.toml").display().to_string();
    let said = agent(&["status", "--config", &config]).output().unwrap();
    let said = String::from_utf8(said.stdout).unwrap();
    for part in [
        format!("revoked key     {}", id(7)),
        format!("of {}, sequence 6, for all", id(1)),
    ] {
        assert!(said.contains(&part), "{part}: {said}");
    }
}

#[test]
fn a_key_that_a_document_brings_orders_from_then_on() {
    let mut host = image();
    fs::remove_file(host.path("trust/manager.pub")).unwrap();
    host.start(None);
    let (mut session, _) = host.accept();
    refused(&session.run(&ran(&host, 1)), "untrusted-key");
    assert_eq!(
        code(
            &mut session,
            &document(1, 1, json!({"anchors": [line("goal", 7)]}))
        ),
        ""
    );
    assert_eq!(session.run(&ran(&host, 1)).outcome, Outcome::Done);
    // Its bringer goes, and it with it.
    assert_eq!(code(&mut session, &document(2, 1, revokes(&[1]))), "");
    refused(&session.run(&ran(&host, 2)), "untrusted-key");
    assert_eq!(lines(&host.path("count")), 1);
}

#[test]
fn a_running_task_of_a_key_that_is_revoked_ends_and_says_why() {
    let mut host = image();
    let file = host.path("count");
    let step = counting(
        &file,
        "trap '' TERM; (setsid sleep 1000 &); sleep 1000; echo x >>\"$1\"",
    );
    let runs = task(host.goal(1, json!([step])), "count", 1);
    host.start(None);
    let (mut session, _) = host.accept();
    let pull = loop {
        if let Said::Pull(id) = session.next().unwrap().unwrap() {
            break id;
        }
    };
    session.task(pull, &runs);
    until("the task runs", || lines(&file) == 1);
    // One that changes nothing of it is answered while it runs, and keeps the next from nothing.
    let held = session.trust(&document(1, 1, json!({})));
    assert_eq!(held.refused, "");
    let held = session.trust(&document(1, 2, revokes(&[7])));
    assert_eq!(held.refused, "");
    let report = loop {
        if let Said::Report(id, report) = session.next().unwrap().unwrap() {
            session.ack(id, &report);
            break report;
        }
    };
    assert_eq!(report.outcome, Outcome::Failed);
    assert!(
        report.reason.starts_with("revoked-key: "),
        "{}",
        report.reason
    );
    assert_eq!(lines(&file), 1);
    refused(&session.run(&ran(&host, 2)), "revoked-key");
    // What another key has ordered goes on.
    let by_1 = adit_tasks::dsse::sign(
        &serde_json::to_vec(&crate::host::goal(1, "web-1", json!([counting(&file, "")]))).unwrap(),
        &key(1),
    );
    let by_1 = task(by_1.into_bytes(), "count", 1);
    assert_eq!(session.run(&by_1).outcome, Outcome::Done);
}

#[test]
fn r101_ten_thousand_documents_change_nothing_and_are_all_answered() {
    let mut host = image();
    host.start(None);
    let (mut session, _) = host.accept();
    assert_eq!(code(&mut session, &document(1, 100, json!({}))), "");
    let on_disk = fs::read(host.path("state/trust.json")).unwrap();
    let old = document(1, 99, revokes(&[7]));
    let mut codes = std::collections::BTreeMap::new();
    for _ in 0..10_000 {
        *codes.entry(code(&mut session, &old)).or_insert(0) += 1;
    }
    let codes: Vec<_> = codes.into_iter().collect();
    assert_eq!(
        codes,
        [("trust-old".into(), 255), ("trust-too-many".into(), 9745)]
    );
    assert_eq!(fs::read(host.path("state/trust.json")).unwrap(), on_disk);
    // One line a second, however fast they come.
    let log = host.log();
    assert!(log.matches("trust-refused").count() < 60, "{log}");
    assert_eq!(session.run(&ran(&host, 1)).outcome, Outcome::Done);
}

#[test]
fn a_document_in_a_place_of_cards_is_taken_at_the_start_and_at_sighup() {
    let mut host = image();
    let file = host.path("etc/trust.json");
    fs::write(&file, document(1, 5, revokes(&[7]))).unwrap();
    host.start(None);
    let (mut session, _) = host.accept();
    assert_eq!(session.trust.take().unwrap().documents[0].sequence, 5);
    assert!(
        session.enrolment.faults.is_empty(),
        "{:?}",
        session.enrolment.faults
    );
    refused(&session.run(&ran(&host, 1)), "revoked-key");
    // What the host brings is newer, and the file no fault.
    assert_eq!(code(&mut session, &document(1, 6, json!({}))), "");
    host.kill();
    drop(session);
    host.start(None);
    let (session, _) = host.accept();
    assert!(
        session.enrolment.faults.is_empty(),
        "{:?}",
        session.enrolment.faults
    );

    // At SIGHUP it is read again; what is wrong with it is told on the next stream.
    fs::write(&file, document(8, 7, json!({}))).unwrap();
    kill(Pid::from_raw(host.pid()), Signal::SIGHUP).unwrap();
    let (session, _) = host.accept();
    let faults = &session.enrolment.faults;
    assert!(
        faults.len() == 1 && faults[0].starts_with("trust-untrusted: "),
        "{faults:?}"
    );
    drop(session);
}

#[test]
fn adit_guest_trust_add_takes_a_document_and_sighup_ends_what_runs_by_its_key() {
    let mut host = image();
    let file = host.path("count");
    let runs = task(
        host.goal(1, json!([counting(&file, "sleep 1000")])),
        "count",
        1,
    );
    host.start(None);
    let (mut session, _) = host.accept();
    let pull = loop {
        if let Said::Pull(id) = session.next().unwrap().unwrap() {
            break id;
        }
    };
    session.task(pull, &runs);
    until("the task runs", || lines(&file) == 1);
    let config = host.path("adit-guest.toml").display().to_string();
    let path = host.path("document");
    let take = |text: &str| {
        fs::write(&path, text).unwrap();
        let args = ["trust", "add", path.to_str().unwrap(), "--config", &config];
        let out = agent(&args).output().unwrap();
        let said = [out.stdout, out.stderr].concat();
        (out.status.code(), String::from_utf8(said).unwrap())
    };
    let good = document(1, 1, revokes(&[7]));
    assert_eq!(take(&good), (Some(0), "taken\n".into()));
    assert_eq!(take(&good), (Some(0), "it was taken before\n".into()));
    let (status, said) = take(&document(9, 1, json!({})));
    assert!(
        status == Some(1) && said.contains("trust-untrusted"),
        "{said}"
    );
    let (status, said) = take("no document");
    assert!(
        status == Some(1) && said.contains("neither JSON nor base64"),
        "{said}"
    );
    kill(Pid::from_raw(host.pid()), Signal::SIGHUP).unwrap();
    // The host hears of it on the next stream, which begins at once.
    let (mut session, _) = host.accept();
    let held = session.trust.take().unwrap();
    assert_eq!((held.documents.len(), held.revoked), (1, 1));
    let report = loop {
        if let Said::Report(id, report) = session.next().unwrap().unwrap() {
            session.ack(id, &report);
            break report;
        }
    };
    assert!(
        report.reason.starts_with("revoked-key: "),
        "{}",
        report.reason
    );
    // What it knows already ends no stream.
    assert_eq!(code(&mut session, &document(1, 2, revokes(&[7]))), "");
    kill(Pid::from_raw(host.pid()), Signal::SIGHUP).unwrap();
    until("the agent reloads again", || {
        host.log().matches("adit-guest: reloaded ").count() == 2
    });
    refused(&session.run(&ran(&host, 2)), "revoked-key");
    // One that waits for work, with nothing to say otherwise.
    assert_eq!(take(&document(1, 3, revokes(&[7]))).0, Some(0));
    kill(Pid::from_raw(host.pid()), Signal::SIGHUP).unwrap();
    let (mut last, _) = host.accept();
    let told = last.trust.take().unwrap();
    assert_eq!(told.documents[0].sequence, 3);
}

#[test]
fn r113_where_it_is_not_known_what_was_revoked_nothing_is_trusted() {
    use std::os::unix::fs::PermissionsExt;
    let mut host = image();
    host.start(None);
    let (mut session, _) = host.accept();
    assert_eq!(code(&mut session, &document(1, 1, revokes(&[7]))), "");
    let file = host.path("state/trust.json");
    let good = fs::read(&file).unwrap();
    // Cut off, empty as after a crash of a file system, of a later version.
    let later = String::from_utf8(good.clone())
        .unwrap()
        .replace("\"version\":1", "\"version\":2");
    for bad in [&good[..good.len() - 2], &[], later.as_bytes()] {
        fs::write(&file, bad).unwrap();
        let report = session.run(&ran(&host, 1));
        refused(&report, "no-trust-anchor");
        assert!(report.reason.contains("trust.json"), "{}", report.reason);
        // Nor is it written over.
        assert_eq!(
            code(&mut session, &document(1, 2, json!({}))),
            "trust-untrusted"
        );
        assert_eq!(fs::read(&file).unwrap(), bad);
    }
    host.kill();
    drop(session);
    host.start(None);
    let (mut session, facts) = host.accept();
    assert_eq!(facts.anchors, 0);
    let faults = &session.enrolment.faults;
    assert!(faults[0].starts_with("trust-unreadable: "), "{faults:?}");
    fs::write(&file, &good).unwrap();
    refused(&session.run(&ran(&host, 2)), "revoked-key");
    // Whoever may write the directory could have removed it.
    let state = host.path("state");
    fs::set_permissions(&state, fs::Permissions::from_mode(0o777)).unwrap();
    refused(&session.run(&ran(&host, 3)), "no-trust-anchor");
    assert_eq!(lines(&host.path("count")), 0);
}

#[test]
fn the_card_of_a_revoked_key_is_not_believed_and_one_of_the_next_key_is() {
    let mut host = image();
    let path = host.path("adit-guest.toml");
    let config = fs::read_to_string(&path).unwrap();
    fs::write(&path, config.replace("vm_id = \"web-1\"\n", "")).unwrap();
    let card = |by: u8, generation: u64| {
        let card = json!({
            "vm_id": "web-1", "generation": generation, "labels": {}, "not_after": "2099-01-01T00:00:00Z"
        });
        sign_as(Type::Card, card.to_string().as_bytes(), &key(by))
    };
    fs::write(host.path("etc/card"), card(1, 1)).unwrap();
    host.start(None);
    let (mut session, facts) = host.accept();
    assert_eq!(facts.vm_id, "web-1");
    // A document for a VM counts where the card says that it is this one.
    let next = json!({"vm_id": "web-1", "anchors": [line("card", 8)]});
    assert_eq!(code(&mut session, &document(1, 1, next)), "");
    let next = json!({"anchors": [line("card", 9)]});
    assert_eq!(code(&mut session, &document(1, 1, next)), "");
    // The next key names itself, for it takes out the one that brought it.
    let mut last = revokes(&[1]);
    last["anchors"] = json!([line("card", 9)]);
    assert_eq!(code(&mut session, &document(9, 1, last)), "");
    refused(&session.run(&ran(&host, 1)), "not-enrolled");
    // The host is told at once that this guest is nobody now, and why.
    assert_eq!(session.facts.take().unwrap().vm_id, "");
    let faults = &session.enrolment.faults;
    assert!(
        faults.len() == 1 && faults[0].starts_with("card-untrusted: "),
        "{faults:?}"
    );
    fs::write(host.path("etc/card"), card(9, 2)).unwrap();
    kill(Pid::from_raw(host.pid()), Signal::SIGHUP).unwrap();
    let (mut session, facts) = host.accept();
    assert_eq!(facts.vm_id, "web-1");
    assert_eq!(session.run(&ran(&host, 2)).outcome, Outcome::Done);
}
