//! Golden bytes of a card, and what is none.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ed25519_dalek::SigningKey;
use serde_json::{Value, json};

use super::*;
use crate::anchor::TrustStore;
use crate::dsse::{CARD_MAX, Envelope, Type, sign, sign_as};

const NOW: i64 = 1_795_219_200_000;

fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

fn line(seed: u8) -> String {
    PublicKey::of(&key(seed), "").to_string()
}

/// Trusts key 7 for these roles.
fn trust(roles: &str) -> TrustStore {
    let mut trust = TrustStore::default();
    trust
        .add_text(&format!("roles={roles} {}", line(7)))
        .unwrap();
    trust
}

fn good() -> Value {
    json!({
        "vm_id": "web-1", "generation": 3, "labels": {"env": "prod", "tier": "web"},
        "guest_pk": line(9), "anchors": [format!("roles=card {}", line(8))],
        "not_after": "2027-11-21T22:00:00Z"
    })
}

fn signed(payload: &Value) -> String {
    sign_as(Type::Card, payload.to_string().as_bytes(), &key(7))
}

const HERE: Here<'static> = Here {
    vm_id: None,
    now_ms: NOW,
};

#[test]
fn a_card_has_golden_bytes() {
    let card = Card::parse(good().to_string().as_bytes()).unwrap();
    let payload = String::from_utf8(card.payload()).unwrap();
    let (pk, next) = (line(9), line(8));
    assert_eq!(
        payload,
        format!(
            "{{\"vm_id\":\"web-1\",\"generation\":3,\"labels\":{{\"env\":\"prod\",\"tier\":\"web\"}},\
             \"guest_pk\":\"{pk}\",\"anchors\":[\"roles=card {next}\"],\"not_after\":\"2027-11-21T22:00:00Z\"}}"
        )
    );
    assert_eq!(Card::parse(payload.as_bytes()).unwrap(), card);
    let small = r#"{"vm_id":"a","generation":1,"labels":{},"not_after":"2027-01-01T00:00:00Z"}"#;
    let card = Card::parse(small.as_bytes()).unwrap();
    assert_eq!(card.payload(), small.as_bytes());
    // Made by the build that first had cards.
    let envelope = sign_as(Type::Card, small.as_bytes(), &key(7));
    assert_eq!(envelope, GOLDEN);
    let proved = check(GOLDEN.as_bytes(), &trust("card"), HERE).unwrap();
    assert_eq!(proved.card, card);
    assert_eq!(proved.key, crate::dsse::id_of(&key(7)));
}

const GOLDEN: &str = r#"{"payload":"eyJ2bV9pZCI6ImEiLCJnZW5lcmF0aW9uIjoxLCJsYWJlbHMiOnt9LCJub3RfYWZ0ZXIiOiIyMDI3LTAxLTAxVDAwOjAwOjAwWiJ9","payloadType":"application/vnd.adit.card.v1+json","signatures":[{"keyid":"fe812c12f3ab4ce6ac5db69ac352f906","sig":"ruCdcoTslemS+iBKAQt210Wlt5L7pLpWhfhABF37AIp7cwVKm6lRckc5xD5eygZMpHO4pq/0cBVESl+wz3uYCw=="}]}"#;

#[test]
fn what_is_no_card_is_refused_whoever_signed_it() {
    let with = |change: &dyn Fn(&mut Value)| {
        let mut card = good();
        change(&mut card);
        card.to_string()
    };
    let text = good().to_string();
    let many: serde_json::Map<_, _> = (0..17).map(|n| (format!("l{n}"), json!("x"))).collect();
    for bad in [
        with(&|c| c["surprise"] = json!(1)),
        with(&|c| drop(c.as_object_mut().unwrap().remove("labels"))),
        with(&|c| drop(c.as_object_mut().unwrap().remove("vm_id"))),
        with(&|c| drop(c.as_object_mut().unwrap().remove("not_after"))),
        with(&|c| c["vm_id"] = json!("Web-1")),
        with(&|c| c["vm_id"] = json!("../x")),
        with(&|c| c["generation"] = json!(0)),
        with(&|c| c["generation"] = json!(-1)),
        with(&|c| c["generation"] = json!(1.5)),
        with(&|c| c["generation"] = json!(u64::MAX)),
        with(&|c| c["labels"] = json!([])),
        with(&|c| c["labels"] = json!({"env": 1})),
        with(&|c| c["labels"] = json!({"Env": "x"})),
        with(&|c| c["labels"] = json!({"": "x"})),
        with(&|c| c["labels"] = json!({"env": ""})),
        with(&|c| c["labels"] = json!({"env": "a b"})),
        with(&|c| c["labels"] = json!({"env": "\u{1b}[2J"})),
        with(&|c| c["labels"] = json!({"env": "x".repeat(64)})),
        with(&|c| c["labels"] = Value::Object(many.clone())),
        with(&|c| c["guest_pk"] = json!(null)),
        with(&|c| c["guest_pk"] = json!("adit-ed25519 AAAA")),
        with(&|c| c["anchors"] = json!(null)),
        with(&|c| c["anchors"] = json!([line(8), line(9), line(10), line(11), line(12)])),
        with(&|c| c["anchors"] = json!(["roles=root adit-ed25519 AAAA"])),
        with(&|c| c["not_after"] = json!(17)),
        with(&|c| *c = json!([c["vm_id"], c["generation"], c["labels"], c["not_after"]])),
        text.replacen("\"vm_id\"", "\"vm_id\":\"web-2\",\"vm_id\"", 1),
        text.replacen("\"env\"", "\"env\":\"test\",\"env\"", 1),
        text.clone() + " {}",
        String::new(),
    ] {
        assert!(Card::parse(bad.as_bytes()).is_err(), "{bad}");
        let envelope = sign_as(Type::Card, bad.as_bytes(), &key(7));
        let e = check(envelope.as_bytes(), &trust("card,goal"), HERE).unwrap_err();
        assert!(
            matches!(e, CardError::Form(_) | CardError::Envelope(_)),
            "{bad}: {e}"
        );
    }
}

#[test]
fn each_flipped_bit_and_each_cut_is_refused() {
    let good = signed(&good()).into_bytes();
    let trust = trust("card");
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << bit;
            assert!(check(&bytes, &trust, HERE).is_err(), "byte {at} bit {bit}");
        }
        assert!(check(&good[..at], &trust, HERE).is_err(), "cut at {at}");
    }
    assert!(check(&good, &trust, HERE).is_ok());
}

#[test]
fn a_card_is_believed_only_from_whom_for_whom_when_and_while_it_may_be() {
    let (web_1, web_2) = ("web-1".parse().unwrap(), "web-2".parse().unwrap());
    let at = |roles: &str, here: Here<'_>| {
        let checked = check(signed(&good()).as_bytes(), &trust(roles), here);
        checked.map_or_else(|e| e.code(), |_| "believed")
    };
    let me = |vm_id| Here {
        vm_id: Some(vm_id),
        ..HERE
    };
    let late = Here {
        now_ms: 1_900_000_000_000,
        ..HERE
    };
    assert_eq!(at("card", HERE), "believed");
    assert_eq!(at("card", me(&web_1)), "believed");
    assert_eq!(at("card", me(&web_2)), "card-foreign");
    assert_eq!(at("goal", HERE), "card-untrusted");
    assert_eq!(at("card", late), "card-expired");
    // A clock that was never set is no reason to distrust it.
    assert_eq!(at("card", Here { now_ms: 0, ..HERE }), "believed");
    let after = |seen| {
        let proved = check(signed(&good()).as_bytes(), &trust("card"), HERE).unwrap();
        proved
            .not_before(seen)
            .map_or_else(|e| e.code(), |_| "believed")
    };
    assert_eq!((after(3), after(4)), ("believed", "card-old"));
    let nobody = check(signed(&good()).as_bytes(), &TrustStore::default(), HERE);
    assert_eq!(nobody.unwrap_err().code(), "card-untrusted");
    let as_goal = sign(good().to_string().as_bytes(), &key(7));
    let as_goal = check(as_goal.as_bytes(), &trust("card,goal"), HERE);
    assert_eq!(as_goal.unwrap_err().code(), "card-damaged");
}

#[test]
fn a_strangers_or_a_broken_signature_beside_a_good_one_changes_nothing() {
    let signatures = |text: &str| -> Value {
        let envelope: Value = serde_json::from_str(text).unwrap();
        envelope["signatures"][0].clone()
    };
    let payload = serde_json::json!({
        "vm_id": "a", "generation": 1, "labels": {}, "not_after": "2027-11-21T22:00:00Z"
    });
    let good = signed(&payload);
    let stranger = sign_as(Type::Card, payload.to_string().as_bytes(), &key(8));
    let mut broken = signatures(&good);
    broken["sig"] = BASE64.encode([1; 64]).into();
    for more in [signatures(&stranger), broken] {
        let mut envelope: Value = serde_json::from_str(&good).unwrap();
        envelope["signatures"] = json!([more.clone(), signatures(&good)]);
        let text = envelope.to_string();
        assert!(
            check(text.as_bytes(), &trust("card"), HERE).is_ok(),
            "{text}"
        );
        envelope["signatures"] = json!([more.clone(), more]);
        assert!(check(envelope.to_string().as_bytes(), &trust("card"), HERE).is_err());
    }
}

#[test]
fn a_card_brings_no_key_that_may_more_than_its_signer() {
    let bringing = |roles: &str, signer: &str| {
        let mut card = good();
        card["anchors"] = json!([format!("roles={roles} {}", line(8))]);
        let checked = check(signed(&card).as_bytes(), &trust(signer), HERE);
        checked.map_or_else(|e| e.code(), |_| "believed")
    };
    assert_eq!(bringing("card", "card"), "believed");
    assert_eq!(bringing("goal", "card,goal"), "believed");
    assert_eq!(bringing("goal", "card"), "card-too-wide");
    assert_eq!(bringing("card,exec", "card,goal"), "card-too-wide");
    // Its own key is no exception.
    let mut card = good();
    card["anchors"] = json!([line(7)]);
    let e = check(signed(&card).as_bytes(), &trust("card"), HERE).unwrap_err();
    assert!(matches!(e, CardError::Wider { .. }));
}

#[test]
fn the_longest_card_is_read_and_a_longer_one_is_not() {
    let pad = |n: usize| signed(&good()).replacen('{', &format!("{{{}", " ".repeat(n)), 1);
    let room = CARD_MAX - pad(0).len();
    assert!(check(pad(room).as_bytes(), &trust("card"), HERE).is_ok());
    let e = check(pad(room + 1).as_bytes(), &trust("card"), HERE).unwrap_err();
    assert_eq!(e.code(), "card-damaged");
    assert!(Envelope::parse_as(Type::Goal, pad(room).as_bytes()).is_err());
}

/// A structure of SMBIOS, with its head, four bytes of its own and its strings.
fn structure(kind: u8, strings: &[&str]) -> Vec<u8> {
    let mut bytes = vec![kind, 8, 0, 0x0b, 1, 2, 3, 4];
    for string in strings {
        bytes.extend(string.as_bytes());
        bytes.push(0);
    }
    bytes.resize(bytes.len() + if strings.is_empty() { 2 } else { 1 }, 0);
    bytes
}

#[test]
fn a_card_is_found_in_each_way_that_it_is_carried_on() {
    let json = signed(&good());
    let word = as_text(json.as_bytes());
    let bytes = json.as_bytes().to_vec();
    for text in [
        &json,
        &word,
        &format!(" {word}\n"),
        &format!("{json}\n\0\0"),
    ] {
        assert_eq!(from_text(text.as_bytes()), Ok(bytes.clone()));
    }
    let key = "io.adit.card=";
    let (one, other) = (format!("{key}{word}"), format!("{key}{json}"));
    let table = |cards: &[&str]| {
        let mut table = structure(1, &["QEMU", "io.adit.card=not here"]);
        table.extend(structure(2, &[]));
        table.extend(structure(11, cards));
        table.extend(structure(127, &[]));
        // What comes after the end is not read.
        table.extend(structure(11, &[&one]));
        table
    };
    assert_eq!(
        from_smbios(Type::Card, &table(&["a=b", &one, "z"]), key),
        Ok(Some(bytes.clone()))
    );
    assert_eq!(
        from_smbios(Type::Card, &table(&[&other]), key),
        Ok(Some(bytes.clone()))
    );
    assert_eq!(from_smbios(Type::Card, &table(&["a=b"]), key), Ok(None));
    let doubled = from_smbios(Type::Card, &table(&[&one, &one]), key);
    assert_eq!(doubled, Err(CarriedError::Doubled { count: 2 }));
    let words = format!("root=/dev/vda adit.card={word} quiet\n");
    assert_eq!(
        from_fields(Type::Card, words.as_bytes(), "adit.card="),
        Ok(Some(bytes))
    );
    assert_eq!(
        from_fields(Type::Card, b"root=/dev/vda quiet", "adit.card="),
        Ok(None)
    );
    let doubled = from_fields(
        Type::Card,
        b"adit.card=a adit.card=b adit.card=c",
        "adit.card=",
    );
    assert_eq!(doubled, Err(CarriedError::Doubled { count: 3 }));
}

#[test]
fn a_damaged_place_is_said_to_be_damaged() {
    assert_eq!(from_text(b" \n\0"), Err(CarriedError::Empty));
    assert_eq!(from_text(b"not base64!"), Err(CarriedError::Encoding));
    let long = BASE64.encode([b'x'; CARD_MAX + 3]);
    let len = long.len();
    assert_eq!(
        from_text(long.as_bytes()),
        Err(CarriedError::TooLong { len, max: TEXT_MAX })
    );
    // Structures that end where they should not, or say that they are longer than the table.
    let whole = structure(11, &["io.adit.card=e30="]);
    for cut in 0..whole.len() {
        let _ = from_smbios(Type::Card, &whole[..cut], "io.adit.card=");
        let mut bytes = whole.clone();
        bytes[1] = cut as u8;
        let _ = from_smbios(Type::Card, &bytes, "io.adit.card=");
    }
}
