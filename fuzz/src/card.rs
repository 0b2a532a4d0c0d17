//! Target `card`: bytes in place of a card's envelope, of a signed payload, or of a place that a card is carried in. A card that is
//! believed is in its limits, is the same when it is written again, and says what a reader of plain JSON finds there.
//!
//! Input: a byte that says which of them, and the rest.

use std::sync::LazyLock;

use adit_tasks::anchor::TrustStore;
use adit_tasks::card::{self, Card, Here, LABELS_MAX, TEXT_MAX};
use adit_tasks::dsse::{self, CARD_MAX, Type};
use adit_tasks::key::PublicKey;
use ed25519_dalek::SigningKey;

static KEY: LazyLock<SigningKey> = LazyLock::new(|| SigningKey::from_bytes(&[7; 32]));

static TRUST: LazyLock<TrustStore> = LazyLock::new(|| {
    let mut trust = TrustStore::default();
    let line = format!("roles=card {}", PublicKey::of(&KEY, ""));
    trust.add_text(&line).expect("an anchor");
    trust
});

pub fn run(data: &[u8]) {
    let Some((which, rest)) = data.split_first() else {
        return;
    };
    match which % 5 {
        0 => {
            // Only what was signed is believed: the seeds have such a card.
            if let Some(card) = believed(rest) {
                let text = dsse::sign_as(Type::Card, &card.payload(), &KEY);
                assert_eq!(believed(text.as_bytes()), Some(card));
            }
        }
        1 => signed(rest),
        2 => carried(card::from_text(rest).ok()),
        3 => carried(
            card::from_smbios(Type::Card, rest, "io.adit.card=")
                .ok()
                .flatten(),
        ),
        _ => carried(
            card::from_fields(Type::Card, rest, "adit.card=")
                .ok()
                .flatten(),
        ),
    }
}

fn believed(envelope: &[u8]) -> Option<Card> {
    let here = Here {
        vm_id: None,
        now_ms: 0,
    };
    match card::check(envelope, &TRUST, here).and_then(|proved| proved.not_before(2)) {
        Ok(proved) => {
            assert!(envelope.len() <= CARD_MAX && proved.card.generation >= 2);
            Some(proved.card)
        }
        Err(e) => {
            // It is shown on a console: one line.
            let said = format!("{e} {}", e.remedy());
            assert!(said.len() < 2000 && !said.contains(|c: char| c.is_control()));
            None
        }
    }
}

fn signed(payload: &[u8]) {
    let text = dsse::sign_as(Type::Card, payload, &KEY);
    let Some(card) = believed(text.as_bytes()) else {
        return;
    };
    let plain: serde_json::Value = serde_json::from_slice(payload).expect("JSON");
    let fields = plain.as_object().expect("an object");
    assert!(fields.len() >= 4 && fields.len() <= 6);
    assert_eq!(fields["vm_id"], card.vm_id.as_str());
    assert_eq!(fields["generation"], card.generation);
    assert_eq!(fields["labels"], serde_json::json!(card.labels));
    assert!(card.labels.as_map().len() <= LABELS_MAX);
    let narrow = |a: &adit_tasks::Anchor| a.roles.to_string() == "card";
    assert!(card.anchors.iter().all(narrow));
    assert_eq!(Card::parse(&card.payload()).expect("a card"), card);
}

fn carried(found: Option<Vec<u8>>) {
    if let Some(envelope) = found {
        assert!(envelope.len() <= TEXT_MAX);
        believed(&envelope);
    }
}
