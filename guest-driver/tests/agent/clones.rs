//! Copies of disks: each enrols anew before it does anything, and the original notices nothing.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use adit_tasks::PublicKey;
use adit_tasks::dsse::{Type, sign_as};
use adit_tasks::wire::{self, HostGiven, Outcome};
use ed25519_dalek::SigningKey;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::commands::agent;
use crate::host::{Host, Said, counting, goal, lines, task};
use crate::own::until;

fn enrol() -> SigningKey {
    SigningKey::from_bytes(&[9; 32])
}

fn card(vm: &str, generation: u64) -> String {
    let card = json!({
        "vm_id": vm, "generation": generation, "labels": {}, "not_after": "2099-01-01T00:00:00Z"
    });
    sign_as(Type::Card, card.to_string().as_bytes(), &enrol())
}

/// An image whose guests are who their cards say.
fn image() -> Host {
    let mut host = Host::new();
    let anchor = format!("roles=card {}", PublicKey::of(&enrol(), ""));
    fs::write(host.path("trust/enrol.pub"), anchor).unwrap();
    let path = host.path("adit-guest.toml");
    let config = fs::read_to_string(&path).unwrap();
    let config = config.replacen("vm_id = \"web-1\"\n", "", 1);
    let file = host.path("card");
    fs::write(path, format!("card = \"{}\"\n{config}", file.display())).unwrap();
    host.features = wire::IDENTITY;
    host
}

fn given(host: u8, guest: u8) -> HostGiven {
    HostGiven {
        host: [host; 16],
        guest: [guest; 16],
    }
}

/// A copy of a guest's disk: its state, and its keys.
fn copied(of: &Host) -> Host {
    let copy = image();
    let state = copy.path("state");
    fs::create_dir(&state).unwrap();
    fs::set_permissions(&state, fs::Permissions::from_mode(0o700)).unwrap();
    for entry in fs::read_dir(of.path("state")).into_iter().flatten() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), state.join(entry.file_name())).unwrap();
    }
    if of.path("card").exists() {
        fs::copy(of.path("card"), copy.path("card")).unwrap();
    }
    copy
}

#[test]
fn r133_fifty_copies_of_a_sealed_disk_have_fifty_identities() {
    let mut original = image();
    fs::write(original.path("card"), card("web-1", 1)).unwrap();
    original.gives = Some(given(1, 1));
    let file = original.path("count");
    let first = task(original.goal(1, json!([counting(&file, "")])), "count", 1);
    original.start(None);
    let (mut session, _) = original.accept();
    assert_eq!(session.run(&first).outcome, Outcome::Done);
    original.kill();
    drop(session);
    let config = original.path("adit-guest.toml").display().to_string();
    let sealed = agent(&["seal", "--config", &config]).output().unwrap();
    assert!(sealed.status.success());
    let left: Vec<_> = fs::read_dir(original.path("state")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");

    let mut clones: Vec<Host> = (0..50).map(|_| copied(&original)).collect();
    for (n, clone) in clones.iter_mut().enumerate() {
        fs::write(clone.path("card"), card(&format!("clone-{n}"), 1)).unwrap();
        clone.gives = Some(given(1, 100 + n as u8));
        clone.start(None);
    }
    let (mut keys, mut ids, mut journals) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for (n, clone) in clones.iter_mut().enumerate() {
        let (mut session, facts) = clone.accept();
        let name = format!("clone-{n}");
        assert_eq!(
            (facts.vm_id.as_str(), session.identity),
            (name.as_str(), None)
        );
        keys.insert(session.enrolment.guest_pk.unwrap());
        // What ran in the original was not for it, and what is for it runs once.
        let file = clone.path("count");
        let own = clone.sign(&goal(1, &name, json!([counting(&file, "")])));
        let digest = adit_tasks::dsse::Envelope::parse(&own).unwrap().digest();
        let id = adit_tasks::task_id(&digest, &name.parse().unwrap(), "count", 1);
        let own = adit_tasks::wire::Task {
            task_id: id,
            ..task(own, "count", 1)
        };
        assert_eq!(session.run(&own).outcome, Outcome::Done);
        assert_eq!(lines(&file), 1);
        clone.kill();
        let kept = fs::read_to_string(clone.path("state/enrolment.json")).unwrap();
        let kept: serde_json::Value = serde_json::from_str(&kept).unwrap();
        ids.insert(kept["id"].to_string());
        journals.insert(fs::read(clone.path("state/journal.redb")).unwrap());
    }
    assert_eq!((keys.len(), ids.len(), journals.len()), (50, 50, 50));
}

#[test]
fn r133_a_copy_that_only_its_host_can_tell_enrols_anew_before_it_runs_anything() {
    let mut original = image();
    fs::write(original.path("card"), card("web-1", 1)).unwrap();
    original.gives = Some(given(1, 1));
    let file = original.path("count");
    let first = task(original.goal(1, json!([counting(&file, "")])), "count", 1);
    original.start(None);
    let (mut session, _) = original.accept();
    assert_eq!(session.identity, None);
    assert_eq!(session.run(&first).outcome, Outcome::Done);
    let own = session.enrolment.guest_pk;
    original.kill();
    drop(session);

    // The same card, the same machine: another channel.
    let mut copy = copied(&original);
    copy.gives = Some(given(1, 2));
    copy.start(None);
    let (mut session, _) = copy.accept();
    assert_eq!(session.identity, Some(given(1, 1)));
    let key = session.enrolment.guest_pk;
    assert!(key.is_some() && key != own);
    assert!(
        copy.log()
            .contains("enrolled-anew why=\"the host has its id from VM `web-9`\""),
        "{}",
        copy.log()
    );
    // What ran in the original does not run again.
    assert_eq!(session.run(&first).outcome, Outcome::Done);
    assert_eq!(lines(&file), 1);
    // The original's key is set aside, and not lost.
    let aside = fs::read(copy.path("state/guest.key.before")).unwrap();
    assert_eq!(aside, fs::read(original.path("state/guest.key")).unwrap());
    copy.kill();
    drop(session);
    copy.gives = None;
    copy.start(None);
    let (session, _) = copy.accept();
    assert_eq!(
        (session.identity, session.enrolment.guest_pk),
        (Some(given(1, 2)), key)
    );
    drop(session);

    // The original is unaffected, after as many boots as there may be; also by a host of before, which gives no ids.
    for gives in [Some(given(1, 1)), None] {
        original.features = if gives.is_some() { wire::IDENTITY } else { 0 };
        original.gives = gives;
        original.start(None);
        let (session, _) = original.accept();
        assert_eq!(session.enrolment.guest_pk, own);
        original.kill();
    }
}

#[test]
fn r133_a_copy_that_cannot_keep_its_id_is_asked_again_on_the_next_stream() {
    let mut original = image();
    fs::write(original.path("card"), card("web-1", 1)).unwrap();
    original.gives = Some(given(1, 1));
    original.start(None);
    drop(original.accept());
    original.kill();
    let mut copy = copied(&original);
    // Nothing can be put in the place of a directory.
    let file = copy.path("state/enrolment.copy.json");
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    copy.gives = Some(given(1, 2));
    copy.start(None);
    let (session, _) = copy.accept();
    assert_eq!(session.identity, Some(given(1, 1)));
    let (key, faults) = (session.enrolment.guest_pk, &session.enrolment.faults);
    assert!(
        faults.len() == 1 && faults[0].starts_with("enrolment-not-kept: "),
        "{faults:?}"
    );
    drop(session);
    let (session, _) = copy.accept();
    assert_eq!(
        (session.identity, session.enrolment.guest_pk),
        (Some(given(1, 2)), key)
    );
    assert_eq!(session.enrolment.faults.len(), 1);
}

#[test]
fn r133_a_host_that_lies_about_ids_makes_no_guest_forget_what_has_run() {
    let mut guest = image();
    fs::write(guest.path("card"), card("web-1", 1)).unwrap();
    let file = guest.path("count");
    let first = task(guest.goal(1, json!([counting(&file, "")])), "count", 1);
    for n in 1..=10 {
        guest.gives = Some(given(n, n));
        guest.start(None);
        let (mut session, _) = guest.accept();
        assert_eq!(session.run(&first).outcome, Outcome::Done);
        guest.kill();
    }
    assert_eq!(lines(&file), 1);
    // And of keys there are so many, however often.
    let files = fs::read_dir(guest.path("state")).unwrap();
    let names: Vec<_> = files
        .map(|f| f.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(
        names.iter().filter(|n| n.contains("key")).count(),
        9,
        "{names:?}"
    );
}

#[test]
fn a_new_card_counts_at_sighup_and_what_runs_goes_on() {
    let mut guest = image();
    guest.features = 0;
    fs::write(guest.path("card"), card("web-1", 1)).unwrap();
    let file = guest.path("count");
    let step = counting(&file, "sleep 2; echo x >>\"$1\"");
    let runs = task(guest.goal(1, json!([step])), "count", 1);
    guest.start(None);
    let (mut session, _) = guest.accept();
    let pull = loop {
        if let Said::Pull(id) = session.next().unwrap().unwrap() {
            break id;
        }
    };
    session.task(pull, &runs);
    until("the task runs", || lines(&file) == 1);
    let newer = card("web-1", 2);
    fs::write(guest.path("card"), &newer).unwrap();
    kill(Pid::from_raw(guest.pid()), Signal::SIGHUP).unwrap();
    // The agent says so on its next stream, which begins at once.
    let (mut session, _) = guest.accept();
    assert_eq!(session.enrolment.card, newer.as_bytes());
    let report = loop {
        if let Said::Report(id, report) = session.next().unwrap().unwrap() {
            session.ack(id, &report);
            break report;
        }
    };
    assert_eq!((report.outcome, lines(&file)), (Outcome::Done, 2));
    // Where nothing has changed, the stream goes on.
    kill(Pid::from_raw(guest.pid()), Signal::SIGHUP).unwrap();
    until("the agent reloads again", || {
        guest.log().matches("adit-guest: reloaded ").count() == 2
    });
    let second = task(guest.goal(2, json!([counting(&file, "")])), "count", 1);
    assert_eq!(session.run(&second).outcome, Outcome::Done);
}

#[test]
fn a_damaged_record_of_cards_forgets_no_generation() {
    let mut guest = image();
    fs::write(guest.path("card"), card("web-1", 5)).unwrap();
    guest.gives = Some(given(1, 1));
    guest.start(None);
    assert_eq!(guest.accept().1.vm_id, "web-1");
    guest.kill();
    fs::write(guest.path("state/enrolment.json"), "").unwrap();
    fs::write(guest.path("card"), card("web-1", 4)).unwrap();
    guest.start(None);
    let (session, facts) = guest.accept();
    assert_eq!(facts.vm_id, "");
    let faults = &session.enrolment.faults;
    assert!(
        faults.len() == 1 && faults[0].starts_with("card-old: "),
        "{faults:?}"
    );
    guest.kill();
    // Both: that is said, until it is mended.
    for file in ["enrolment.json", "enrolment.copy.json"] {
        fs::write(guest.path("state").join(file), "{").unwrap();
    }
    guest.start(None);
    let (session, _) = guest.accept();
    let faults = &session.enrolment.faults;
    assert!(
        faults[0].starts_with("enrolment-unreadable: "),
        "{faults:?}"
    );
}
