//! Which card counts, in every place and with every fault.

use std::collections::BTreeMap;
use std::io;

use adit_tasks::card::as_text;
use adit_tasks::dsse::{Type, sign_as};
use adit_tasks::key::PublicKey;
use ed25519_dalek::SigningKey;
use serde_json::json;

use super::kept::Anew;
use super::places::Places;
use super::*;

const NOW: i64 = 1_795_219_200_000;

/// What each place holds; none: it cannot be read.
#[derive(Default)]
struct Machine(BTreeMap<Place, Option<Vec<u8>>>);

impl Machine {
    fn with(mut self, place: Place, bytes: impl AsRef<[u8]>) -> Self {
        self.0.insert(place, Some(bytes.as_ref().to_vec()));
        self
    }

    fn find(&self, vm_id: Option<&str>, kept: Option<&Kept>) -> Enrolment {
        let (vm_id, trust) = (vm_id.map(|id| id.parse().unwrap()), trust());
        let known = Known {
            vm_id: vm_id.as_ref(),
            trust: &trust,
            key: None,
            kept,
            now_ms: NOW,
        };
        find(self, known)
    }
}

impl Places for Machine {
    fn read(&self, of: Type, place: Place) -> io::Result<Option<Vec<u8>>> {
        assert_eq!(of, Type::Card);
        match self.0.get(&place) {
            None => Ok(None),
            Some(Some(bytes)) => Ok(Some(bytes.clone())),
            Some(None) => Err(io::Error::other("broken disk")),
        }
    }
}

fn key() -> SigningKey {
    SigningKey::from_bytes(&[7; 32])
}

fn trust() -> TrustStore {
    let mut trust = TrustStore::default();
    let line = format!("roles=card {}", PublicKey::of(&key(), ""));
    trust.add_text(&line).unwrap();
    trust
}

fn by(key: &SigningKey, vm: &str, generation: u64, not_after: &str) -> String {
    let card = json!({
        "vm_id": vm, "generation": generation, "labels": {"env": "prod"}, "not_after": not_after
    });
    sign_as(Type::Card, card.to_string().as_bytes(), key)
}

fn card(vm: &str, generation: u64) -> String {
    by(&key(), vm, generation, "2027-01-01T00:00:00Z")
}

/// A place's bytes with a card in it.
fn at(place: Place, card: &str) -> Vec<u8> {
    let word = as_text(card.as_bytes());
    match place {
        Place::File | Place::FwCfg => card.as_bytes().to_vec(),
        Place::Credential => format!("{word}\n").into_bytes(),
        Place::Smbios => [
            b"\x0b\x05\x00\x0b\x01io.adit.card=",
            word.as_bytes(),
            b"\0\0",
        ]
        .concat(),
        Place::CommandLine => format!("quiet adit.card={word}\n").into_bytes(),
    }
}

fn codes(found: &Enrolment) -> Vec<(&str, &str)> {
    let faults = found.faults.iter();
    faults.map(|f| (f.code, f.place)).collect()
}

fn counts(found: &Enrolment) -> Option<(Place, &str, u64)> {
    let card = found.card.as_ref()?;
    Some((card.place, card.vm_id.as_str(), card.generation))
}

#[test]
fn a_card_is_found_in_each_place() {
    for place in Place::ALL {
        let machine = Machine::default().with(place, at(place, &card("web-1", 3)));
        for vm_id in [None, Some("web-1")] {
            let found = machine.find(vm_id, None);
            assert_eq!(counts(&found), Some((place, "web-1", 3)));
            assert!(codes(&found).is_empty());
        }
    }
    let nothing = Machine::default()
        .with(Place::CommandLine, "quiet")
        .with(Place::Smbios, b"\x0b\x05\x00\x0b\x01other=1\0\0");
    assert_eq!(counts(&nothing.find(None, None)), None);
    assert!(nothing.find(None, None).faults.is_empty());
}

#[test]
fn the_highest_generation_counts_and_then_the_first_place() {
    let machine = |file, smbios, fw_cfg| {
        Machine::default()
            .with(Place::File, at(Place::File, &card("web-1", file)))
            .with(Place::Smbios, at(Place::Smbios, &card("web-1", smbios)))
            .with(Place::FwCfg, at(Place::FwCfg, &card("web-1", fw_cfg)))
    };
    let best = |file, smbios, fw_cfg| {
        let found = machine(file, smbios, fw_cfg).find(None, None);
        counts(&found).map(|(place, _, n)| (place, n))
    };
    assert_eq!(best(3, 3, 3), Some((Place::File, 3)));
    assert_eq!(best(3, 4, 3), Some((Place::Smbios, 4)));
    assert_eq!(best(3, 4, 4), Some((Place::Smbios, 4)));
    assert_eq!(best(1, 2, 3), Some((Place::FwCfg, 3)));
}

#[test]
fn r133_each_card_that_is_not_used_is_one_line_with_its_remedy() {
    let good = card("web-1", 3);
    let stranger = by(
        &SigningKey::from_bytes(&[8; 32]),
        "web-1",
        3,
        "2027-01-01T00:00:00Z",
    );
    let late = by(&key(), "web-1", 3, "2026-01-01T00:00:00Z");
    let doubled = format!("adit.card={0} adit.card={0}", as_text(good.as_bytes()));
    for (place, bytes, code, says) in [
        (
            Place::File,
            good[..90].to_owned(),
            "card-damaged",
            "adit card new",
        ),
        (Place::File, "\0\0".into(), "card-damaged", "whole"),
        (Place::FwCfg, "%%".into(), "card-damaged", "whole"),
        (
            Place::Credential,
            card("web-2", 3),
            "card-foreign",
            "adit card new web-1",
        ),
        (Place::File, late, "card-expired", "adit card new"),
        (Place::File, stranger, "card-untrusted", "role `card`"),
        (Place::CommandLine, doubled, "card-doubled", "leave one"),
    ] {
        let found = Machine::default()
            .with(place, bytes)
            .find(Some("web-1"), None);
        assert_eq!(
            (counts(&found), codes(&found)),
            (None, vec![(code, place.name())])
        );
        let said = found.faults[0].to_string();
        assert!(said.contains(says) && !said.contains('\n'), "{said}");
    }
    let mut broken = Machine::default();
    broken.0.insert(Place::File, None);
    assert_eq!(
        codes(&broken.find(None, None)),
        [("card-unreadable", "file")]
    );
    // One that cannot be used does not keep another from counting.
    let both = Machine::default()
        .with(Place::File, "{")
        .with(Place::FwCfg, good);
    let found = both.find(None, None);
    assert_eq!(counts(&found), Some((Place::FwCfg, "web-1", 3)));
    assert_eq!(codes(&found), [("card-damaged", "file")]);
}

#[test]
fn r133_cards_of_two_vms_cancel_each_other_unless_the_image_says_which() {
    let both = Machine::default()
        .with(Place::File, card("web-1", 9))
        .with(Place::FwCfg, card("web-2", 3));
    let found = both.find(None, None);
    assert_eq!(
        (counts(&found), codes(&found)),
        (None, vec![("card-doubled", "fw_cfg")])
    );
    let found = both.find(Some("web-2"), None);
    assert_eq!(counts(&found), Some((Place::FwCfg, "web-2", 3)));
    assert_eq!(codes(&found), [("card-foreign", "file")]);
}

#[test]
fn a_generation_never_goes_back_and_another_vms_does_not_count() {
    let kept = |vm: &str, generation| Kept::next(None, &vm.parse().unwrap(), generation, None).0;
    let machine = Machine::default().with(Place::File, card("web-1", 3));
    let with = |kept: Kept| {
        let found = machine.find(None, Some(&kept));
        (counts(&found).is_some(), codes(&found).len())
    };
    assert_eq!(with(kept("web-1", 3)), (true, 0));
    assert_eq!(with(kept("web-1", 4)), (false, 1));
    assert_eq!(with(kept("web-2", 4)), (true, 0));
    // Another VM's card in between does not make a guest forget.
    let was = kept("web-1", 4);
    let (was, _) = Kept::next(Some(&was), &"web-2".parse().unwrap(), 9, None);
    assert_eq!(with(was), (false, 1));
}

#[test]
fn what_is_kept_and_the_key_are_the_agents_alone_and_outlive_it() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    assert!(kept::read(&state).unwrap().is_none() && GuestKey::read(&state).unwrap().is_none());
    let (of, _) = Kept::next(None, &"web-1".parse().unwrap(), 7, Some("u".into()));
    kept::write(&state, &of).unwrap();
    let id = GuestKey::make(&state).unwrap().public().id();
    assert_eq!(kept::read(&state).unwrap(), Some(of.clone()));
    assert_eq!(GuestKey::read(&state).unwrap().unwrap().public().id(), id);
    for file in std::fs::read_dir(&state).unwrap() {
        let mode = file.unwrap().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    // Where one of the two is damaged, the other has the same.
    std::fs::write(state.join("enrolment.json"), "{\"vm_id\":\"web-1\"}").unwrap();
    assert_eq!(kept::read(&state).unwrap(), Some(of));
    std::fs::write(state.join("enrolment.copy.json"), "").unwrap();
    assert!(kept::read(&state).is_err());
    std::fs::write(state.join("guest.key"), "").unwrap();
    assert!(GuestKey::read(&state).is_err());
}

#[test]
fn r133_a_copy_of_a_disk_is_noticed_by_its_name_or_its_machine() {
    let (web_1, web_2) = ("web-1".parse().unwrap(), "web-2".parse().unwrap());
    let on = |uuid: &str| Some(uuid.to_owned());
    let (first, anew) = Kept::next(None, &web_1, 3, on("u"));
    assert_eq!(anew, None);
    let next = |vm: &VmId, machine| Kept::next(Some(&first), vm, 0, machine);
    assert_eq!(next(&web_1, on("u")), (first.clone(), None));
    // A kernel that cannot tell is no other machine, and what was known stays.
    assert_eq!(next(&web_1, None), (first.clone(), None));
    let was = || "web-1".parse().unwrap();
    assert_eq!(next(&web_2, on("u")).1, Some(Anew::Vm { was: was() }));
    assert_eq!(
        next(&web_1, on("v")).1,
        Some(Anew::Machine { was: "u".into() })
    );
    let mut kept = first;
    for n in 0..200 {
        kept = Kept::next(Some(&kept), &format!("vm-{n}").parse().unwrap(), 1, None).0;
    }
    assert!(kept.generations.len() <= 64 && kept.vm_id.as_str() == "vm-199");
}

#[test]
fn r133_no_key_that_was_there_first_is_lost_however_often_a_guest_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(key::FILE);
    GuestKey::make(dir.path()).unwrap();
    let mut had = Vec::new();
    for _ in 0..20 {
        had.push(std::fs::read(&file).unwrap());
        GuestKey::anew(dir.path()).unwrap();
    }
    let aside: Vec<_> = key::set_aside(dir.path())
        .map(|file| std::fs::read(file).unwrap())
        .collect();
    assert_eq!((aside.len(), &aside[..]), (8, &had[..8]));
    let files = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!((files, file.exists()), (9, true));
}
