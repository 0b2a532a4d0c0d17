//! Golden bytes of a trust document, what is none, and what is made of those that are taken.

use ed25519_dalek::SigningKey;
use serde_json::{Value, json};

use super::*;
use crate::anchor::{ANCHORS_MAX, Role, TrustStore};
use crate::dsse::{Envelope, TRUST_MAX, Type, id_of, sign_as};
use crate::key::PublicKey;

const NOW: i64 = 1_795_219_200_000;

fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

fn id(seed: u8) -> KeyId {
    id_of(&key(seed))
}

fn line(roles: &str, seed: u8) -> String {
    format!("roles={roles} {}", PublicKey::of(&key(seed), ""))
}

fn keys(lines: &[String]) -> TrustStore {
    let mut trust = TrustStore::default();
    trust.add_text(&lines.join("\n")).unwrap();
    trust
}

fn good() -> Value {
    json!({
        "version": 1, "sequence": 3, "vm_id": "web-1", "anchors": [line("card", 8)],
        "revoked": [id(9).to_string()], "not_after": "2027-11-21T22:00:00Z"
    })
}

fn signed(by: u8, payload: &Value) -> String {
    sign_as(Type::Trust, payload.to_string().as_bytes(), &key(by))
}

fn web_1() -> VmId {
    "web-1".parse().unwrap()
}

/// A guest: the keys of its image, and what it has taken.
#[derive(Clone)]
struct Guest {
    image: TrustStore,
    held: Held,
    now_ms: i64,
}

impl Guest {
    fn new(lines: &[String]) -> Self {
        Self {
            image: keys(lines),
            held: Held::default(),
            now_ms: NOW,
        }
    }

    fn trust(&self) -> TrustStore {
        self.held.applied_to(&self.image, Some(&web_1()))
    }

    fn take_text(&mut self, text: &str) -> Result<bool, TrustError> {
        let me = web_1();
        let here = Here {
            vm_id: Some(&me),
            now_ms: self.now_ms,
        };
        let proved = check(text.as_bytes(), &self.trust(), here)?;
        let before = self.held.clone();
        let taken = self.held.take(proved, &self.image, Some(&me));
        assert!(taken.as_ref().is_ok_and(|changed| *changed) || self.held == before);
        // What is on disk says all of it.
        assert_eq!(Held::parse(&self.held.text()), Ok(self.held.clone()));
        taken
    }

    /// The code of the refusal, or whether it changed anything.
    fn take(&mut self, by: u8, sequence: u64, more: Value) -> String {
        let mut document =
            json!({"version": 1, "sequence": sequence, "not_after": "2099-01-01T00:00:00Z"});
        for (key, value) in more.as_object().unwrap() {
            document[key] = value.clone();
        }
        match self.take_text(&signed(by, &document)) {
            Ok(changed) => if changed { "taken" } else { "known" }.into(),
            Err(e) => e.code().to_owned(),
        }
    }

    /// The roles of a key; empty: it has none.
    fn roles(&self, seed: u8) -> String {
        let trust = self.trust();
        let anchor = trust.get(&id(seed)).map(|anchor| anchor.roles);
        anchor.map(|roles| roles.to_string()).unwrap_or_default()
    }
}

/// Trusts key 1 for cards and goals, key 2 for cards, key 3 for goals.
fn guest() -> Guest {
    Guest::new(&[line("card,goal", 1), line("card", 2), line("goal", 3)])
}

fn revokes(seeds: &[u8]) -> Value {
    let ids: Vec<_> = seeds.iter().map(|seed| id(*seed).to_string()).collect();
    json!({ "revoked": ids })
}

fn brings(lines: &[String], revoked: &[u8]) -> Value {
    let mut document = revokes(revoked);
    document["anchors"] = json!(lines);
    document
}

#[test]
fn a_trust_document_has_golden_bytes() {
    let document = Document::parse(good().to_string().as_bytes()).unwrap();
    let payload = String::from_utf8(document.payload()).unwrap();
    assert_eq!(
        payload,
        format!(
            "{{\"version\":1,\"sequence\":3,\"vm_id\":\"web-1\",\"anchors\":[\"{}\"],\"revoked\":[\"{}\"],\
             \"not_after\":\"2027-11-21T22:00:00Z\"}}",
            line("card", 8),
            id(9)
        )
    );
    assert_eq!(Document::parse(payload.as_bytes()).unwrap(), document);
    let small = r#"{"version":1,"sequence":1,"leaves_no_card_key":true,"not_after":"2027-01-01T00:00:00Z"}"#;
    let document = Document::parse(small.as_bytes()).unwrap();
    assert_eq!(document.payload(), small.as_bytes());
    // Made by the build that first had trust documents.
    assert_eq!(sign_as(Type::Trust, small.as_bytes(), &key(7)), GOLDEN);
    let here = Here {
        vm_id: None,
        now_ms: NOW,
    };
    let proved = check(GOLDEN.as_bytes(), &keys(&[line("card", 7)]), here).unwrap();
    assert_eq!((proved.document, proved.key), (document, id(7)));
}

const GOLDEN: &str = r#"{"payload":"eyJ2ZXJzaW9uIjoxLCJzZXF1ZW5jZSI6MSwibGVhdmVzX25vX2NhcmRfa2V5Ijp0cnVlLCJub3RfYWZ0ZXIiOiIyMDI3LTAxLTAxVDAwOjAwOjAwWiJ9","payloadType":"application/vnd.adit.trust.v1+json","signatures":[{"keyid":"fe812c12f3ab4ce6ac5db69ac352f906","sig":"CtnrmQyt+PdvrovomU93F6lm1cYIHGUrYe37MgsHQlppsSBBJDtmF5Ivw9bE5qe/1uj3fqL4x1AJM9gGlnfjDA=="}]}"#;

#[test]
fn what_is_no_trust_document_is_refused_whoever_signed_it() {
    let with = |change: &dyn Fn(&mut Value)| {
        let mut document = good();
        change(&mut document);
        document.to_string()
    };
    let many: Vec<_> = (0..17).map(|seed| line("card", seed + 20)).collect();
    let ids: Vec<_> = (0..129).map(|n| format!("{n:032x}")).collect();
    let text = good().to_string();
    for bad in [
        with(&|d| d["surprise"] = json!(1)),
        with(&|d| drop(d.as_object_mut().unwrap().remove("version"))),
        with(&|d| drop(d.as_object_mut().unwrap().remove("sequence"))),
        with(&|d| drop(d.as_object_mut().unwrap().remove("not_after"))),
        with(&|d| d["version"] = json!(2)),
        with(&|d| d["sequence"] = json!(0)),
        with(&|d| d["sequence"] = json!(-1)),
        with(&|d| d["sequence"] = json!(1e3)),
        with(&|d| d["sequence"] = json!(u64::MAX)),
        with(&|d| d["vm_id"] = json!(null)),
        with(&|d| d["vm_id"] = json!("../x")),
        with(&|d| d["vm_id"] = json!(["web-1"])),
        with(&|d| d["anchors"] = json!(null)),
        with(&|d| d["anchors"] = json!(many)),
        with(&|d| d["anchors"] = json!(["roles=root adit-ed25519 AAAA"])),
        with(&|d| d["anchors"] = json!([line("card", 8), line("goal", 8)])),
        with(&|d| d["anchors"] = json!([line("card", 9)])),
        with(&|d| d["revoked"] = json!([id(9).to_string(), id(9).to_string()])),
        with(&|d| d["revoked"] = json!(["abc"])),
        with(&|d| d["revoked"] = json!(["A".repeat(32)])),
        with(&|d| d["revoked"] = json!(ids)),
        with(&|d| d["leaves_no_card_key"] = json!(null)),
        with(&|d| d["not_after"] = json!(17)),
        with(&|d| *d = json!([1, 3, "web-1", [], [], false, d["not_after"]])),
        text.replacen("\"sequence\"", "\"sequence\":4,\"sequence\"", 1),
        text.clone() + " {}",
        String::new(),
    ] {
        assert!(Document::parse(bad.as_bytes()).is_err(), "{bad}");
        let envelope = sign_as(Type::Trust, bad.as_bytes(), &key(1));
        let e = guest().take_text(&envelope).unwrap_err();
        assert!(matches!(e, TrustError::Form(_)), "{bad}: {e}");
        let said = format!("{e} {}", e.remedy());
        assert!(!said.contains(|c: char| c.is_control()), "{said}");
    }
    assert!(Document::parse(&vec![b'['; 100_000]).is_err());
}

#[test]
fn r83_each_flipped_bit_and_each_cut_is_refused() {
    let good = signed(1, &good()).into_bytes();
    let (trust, me) = (guest().image, web_1());
    let here = Here {
        vm_id: Some(&me),
        now_ms: NOW,
    };
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << bit;
            assert!(check(&bytes, &trust, here).is_err(), "byte {at} bit {bit}");
        }
        assert!(check(&good[..at], &trust, here).is_err(), "cut at {at}");
    }
    assert!(check(&good, &trust, here).is_ok());
    let long = [&b" ".repeat(TRUST_MAX)[..], &good].concat();
    let e = check(&long, &trust, here).unwrap_err();
    assert_eq!(e.code(), "trust-damaged");
}

#[test]
fn r83_what_was_signed_as_a_card_is_no_trust_document() {
    let card = sign_as(Type::Card, good().to_string().as_bytes(), &key(1));
    assert_eq!(
        guest().take_text(&card).unwrap_err().code(),
        "trust-damaged"
    );
    let renamed = card.replace(Type::Card.name(), Type::Trust.name());
    let e = guest().take_text(&renamed).unwrap_err();
    assert_eq!(e.code(), "trust-untrusted");
    let document = signed(1, &good());
    assert!(Envelope::parse_as(Type::Card, document.as_bytes()).is_err());
}

#[test]
fn the_largest_document_fits() {
    let anchors: Vec<_> = (0..16)
        .map(|n| {
            let comment = "x".repeat(64);
            let public = PublicKey::of(&key(n + 20), &comment);
            format!("roles=card,goal,exec,agent {public}")
        })
        .collect();
    let ids: Vec<_> = (0..128).map(|n| format!("{n:032x}")).collect();
    let long = "a".repeat(63);
    let document = json!({
        "version": 1, "sequence": SEQUENCE_MAX, "vm_id": long, "anchors": anchors, "revoked": ids,
        "leaves_no_card_key": true, "not_after": "2027-11-21T22:00:00Z"
    });
    let payload = Document::parse(document.to_string().as_bytes())
        .unwrap()
        .payload();
    assert!(sign_as(Type::Trust, &payload, &key(1)).len() <= TRUST_MAX);
}

#[test]
fn a_document_is_taken_only_from_whom_for_whom_when_and_while_it_may_be() {
    let all = |more| guest().take(1, 5, more);
    assert_eq!(all(json!({})), "taken");
    assert_eq!(all(json!({"vm_id": "web-1"})), "taken");
    assert_eq!(all(json!({"vm_id": "web-2"})), "trust-foreign");
    assert_eq!(
        all(json!({"not_after": "2020-01-01T00:00:00Z"})),
        "trust-expired"
    );
    assert_eq!(guest().take(3, 5, json!({})), "trust-untrusted");
    assert_eq!(guest().take(4, 5, json!({})), "trust-untrusted");
    let wide = |by, roles: &str| guest().take(by, 5, brings(&[line(roles, 8)], &[]));
    assert_eq!(wide(2, "card"), "taken");
    assert_eq!(wide(2, "goal"), "trust-too-wide");
    assert_eq!(wide(1, "card,goal"), "taken");
    assert_eq!(wide(1, "card,exec"), "trust-too-wide");
    // A clock that was never set is no reason to refuse it.
    let mut unset = guest();
    unset.now_ms = 0;
    assert_eq!(unset.take(1, 5, json!({})), "taken");
    // Nobody is no VM.
    let document = signed(1, &good());
    let here = Here {
        vm_id: None,
        now_ms: NOW,
    };
    let e = check(document.as_bytes(), &guest().image, here).unwrap_err();
    assert!(matches!(e, TrustError::Foreign { here: None, .. }));
}

#[test]
fn r85_a_sequence_never_goes_back_and_what_it_replaces_is_gone() {
    let mut guest = guest();
    let eight = || brings(&[line("card", 8)], &[]);
    assert_eq!(guest.take(1, 5, eight()), "taken");
    assert_eq!(guest.roles(8), "card");
    assert_eq!(guest.take(1, 5, eight()), "known");
    assert_eq!(guest.take(1, 5, json!({})), "trust-changed");
    assert_eq!(guest.take(1, 4, json!({})), "trust-old");
    // The host may skip one: the next says all that its signer says.
    assert_eq!(guest.take(1, 9, brings(&[line("goal", 10)], &[])), "taken");
    assert_eq!(
        (guest.roles(8), guest.roles(10)),
        (String::new(), "goal".into())
    );
    assert_eq!(guest.take(1, 5, eight()), "trust-old");
    // Those of another signer, and those for this VM, count apart.
    assert_eq!(guest.take(2, 1, json!({})), "taken");
    assert_eq!(guest.take(1, 1, json!({"vm_id": "web-1"})), "taken");
    assert_eq!(guest.held.documents().len(), 3);
}

#[test]
fn a_revoked_key_stays_revoked_whoever_names_it() {
    let mut guest = guest();
    assert_eq!(guest.take(1, 1, revokes(&[3])), "taken");
    assert_eq!(guest.roles(3), "");
    // Its file is there again; a card brings it; a later document does not name it, another brings it.
    let mut image = guest.image.clone();
    image.add_text(&line("card,goal", 3)).unwrap();
    guest.image = image;
    assert_eq!(guest.take(1, 2, json!({})), "taken");
    assert_eq!(guest.take(2, 1, brings(&[line("card", 3)], &[])), "taken");
    assert_eq!(guest.roles(3), "");
    let goal = crate::dsse::sign(b"{}", &key(3));
    let e = Envelope::parse(goal.as_bytes())
        .unwrap()
        .verify(&guest.trust());
    assert!(matches!(e, Err(crate::dsse::VerifyError::Revoked { .. })));
    // A revoked signer says nothing any more.
    assert_eq!(guest.take(2, 2, revokes(&[1])), "taken");
    assert_eq!(guest.take(1, 99, json!({})), "trust-untrusted");
}

#[test]
fn what_a_revoked_key_brought_goes_with_it() {
    let mut guest = guest();
    // A stolen key 1 brings 8, which brings 9, and both name themselves.
    let own = |seed| line("card", seed);
    assert_eq!(guest.take(1, 1, brings(&[own(1), own(8)], &[])), "taken");
    assert_eq!(guest.take(8, 1, brings(&[own(8), own(9)], &[])), "taken");
    assert_eq!(
        (guest.roles(8), guest.roles(9)),
        ("card".into(), "card".into())
    );
    assert_eq!(guest.take(2, 1, revokes(&[1])), "taken");
    assert_eq!(
        (guest.roles(8), guest.roles(9)),
        (String::new(), String::new())
    );
    // Also where the thief has counted as far as it goes: another key is not held up by that.
    let mut guest = self::guest();
    assert_eq!(guest.take(1, SEQUENCE_MAX, json!({})), "taken");
    assert_eq!(guest.take(2, 1, revokes(&[1])), "taken");
}

#[test]
fn a_key_that_revokes_the_one_that_brought_it_carries_on_by_what_it_says_of_itself() {
    let mut guest = Guest::new(&[line("card,goal", 1)]);
    let next = || line("card,goal", 8);
    assert_eq!(guest.take(1, 1, brings(&[next()], &[])), "taken");
    // It does not name itself: nobody would be left.
    assert_eq!(guest.take(8, 1, revokes(&[1])), "trust-no-card-key");
    assert_eq!(guest.take(8, 1, brings(&[next()], &[1])), "taken");
    assert_eq!(
        (guest.roles(1), guest.roles(8)),
        (String::new(), "card,goal".into())
    );
    // And goes on to the next.
    let both = brings(&[next(), line("card", 9)], &[1]);
    assert_eq!(guest.take(8, 2, both), "taken");
    assert_eq!(guest.take(9, 1, brings(&[line("card", 9)], &[8])), "taken");
    assert_eq!(
        (guest.roles(8), guest.roles(9)),
        (String::new(), "card".into())
    );
    assert_eq!(guest.held.documents().len(), 1);
}

#[test]
fn no_document_leaves_a_guest_without_a_key_for_cards_unless_it_says_so() {
    let mut guest = guest();
    assert_eq!(guest.take(1, 1, revokes(&[2])), "taken");
    assert_eq!(guest.take(1, 2, revokes(&[1])), "trust-no-card-key");
    assert_eq!(guest.roles(1), "card,goal");
    let mut meant = revokes(&[1]);
    meant["leaves_no_card_key"] = json!(true);
    assert_eq!(guest.take(1, 2, meant), "taken");
    assert_eq!(
        (guest.roles(1), guest.roles(3)),
        (String::new(), "goal".into())
    );
    assert_eq!(guest.trust().count(Role::Card), 0);
}

#[test]
fn so_many_keys_and_revocations_are_kept_and_no_more() {
    let mut guest = guest();
    let lines = |from: u8| -> Vec<_> { (from..from + 15).map(|n| line("card", n)).collect() };
    // 3 of the image, and 4 times 15.
    assert_eq!(guest.take(1, 1, brings(&lines(20), &[])), "taken");
    assert_eq!(guest.take(2, 1, brings(&lines(40), &[])), "taken");
    assert_eq!(guest.take(20, 1, brings(&lines(60), &[])), "taken");
    assert_eq!(guest.take(21, 1, brings(&lines(80), &[])), "taken");
    assert_eq!(guest.trust().len(), 63);
    assert_eq!(guest.take(22, 1, brings(&lines(100), &[])), "trust-full");
    assert_eq!(guest.take(22, 1, brings(&lines(100)[..1], &[])), "taken");
    assert_eq!(guest.trust().len(), ANCHORS_MAX);
    let mut guest = self::guest();
    for round in 0..4 {
        let ids: Vec<_> = (0..128)
            .map(|n| format!("{:032x}", round * 128 + n))
            .collect();
        assert_eq!(guest.take(1, round + 1, json!({ "revoked": ids })), "taken");
    }
    assert_eq!(guest.held.revoked().count(), REVOKED_MAX);
    assert_eq!(guest.take(1, 9, revokes(&[3])), "trust-full");
    let mut guest = self::guest();
    let vms = |n: usize| json!({"vm_id": format!("vm-{n}")});
    let mut take = |n: usize| {
        let mut document = vms(n);
        let me: VmId = document["vm_id"].as_str().unwrap().parse().unwrap();
        for (key, value) in [
            ("version", json!(1)),
            ("sequence", json!(1)),
            ("not_after", json!("2099-01-01T00:00:00Z")),
        ] {
            document[key] = value;
        }
        let here = Here {
            vm_id: Some(&me),
            now_ms: NOW,
        };
        let proved = check(signed(1, &document).as_bytes(), &guest.image, here).unwrap();
        guest
            .held
            .take(proved, &guest.image, Some(&me))
            .map_err(|e| e.code())
    };
    for n in 0..DOCUMENTS_MAX {
        assert_eq!(take(n), Ok(true));
    }
    assert_eq!(take(DOCUMENTS_MAX), Err("trust-full"));
}

/// The documents of an early signer come before those of later ones.
#[test]
fn r85_a_newer_document_takes_no_place_from_the_keys_of_another_signer() {
    let mut guest = guest();
    let lines = |from: u8, n: u8| -> Vec<_> { (from..from + n).map(|n| line("card", n)).collect() };
    assert_eq!(guest.take(1, 1, brings(&lines(20, 1), &[])), "taken");
    for (by, from) in [(2, 40), (40, 60), (41, 80), (42, 100)] {
        assert_eq!(guest.take(by, 1, brings(&lines(from, 15), &[])), "taken");
    }
    assert_eq!(guest.trust().len(), ANCHORS_MAX);
    assert_eq!(guest.take(1, 2, brings(&lines(20, 2), &[])), "trust-full");
    assert_eq!(guest.roles(114), "card");
    assert_eq!(guest.take(1, 2, brings(&lines(21, 1), &[])), "taken");
    // An image that has more keys than before leaves some out, and that is no reason to refuse a revocation.
    guest.image.add_text(&line("goal", 130)).unwrap();
    assert_eq!(guest.roles(114), "");
    assert_eq!(guest.take(1, 3, brings(&lines(21, 1), &[131])), "taken");
    assert_eq!(guest.roles(114), "");
    assert_eq!(guest.take(1, 4, brings(&lines(21, 1), &[43])), "taken");
    assert_eq!(guest.roles(114), "card");
}

#[test]
fn what_is_for_this_vm_does_not_count_when_the_guest_is_another() {
    let mut guest = guest();
    let mut document = brings(&[line("goal", 8)], &[3]);
    document["vm_id"] = json!("web-1");
    assert_eq!(guest.take(1, 1, document), "taken");
    assert_eq!(guest.roles(8), "goal");
    let other: VmId = "web-2".parse().unwrap();
    let trust = guest.held.applied_to(&guest.image, Some(&other));
    // But whom it revoked stays out.
    assert!(trust.get(&id(8)).is_none() && trust.is_revoked(&id(3)));
}

#[test]
fn what_is_on_disk_and_damaged_is_refused_whole() {
    let mut guest = guest();
    assert_eq!(guest.take(1, 1, brings(&[line("card", 8)], &[3])), "taken");
    let text = String::from_utf8(guest.held.text()).unwrap();
    for bad in [
        String::new(),
        "{}".into(),
        text[..text.len() / 2].into(),
        text.replace("\"version\":1", "\"version\":2"),
        text.replace("roles=card", "roles=root"),
        text.replacen("\"signer\"", "\"signet\"", 1),
    ] {
        assert!(Held::parse(bad.as_bytes()).is_err(), "{bad}");
    }
}
