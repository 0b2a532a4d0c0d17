//! Target `trust`: bytes in place of a trust document's envelope, of a signed payload, of a place that one is carried in, or of what a
//! guest has on disk of them. A document that is taken is in its limits, is the same when it is written again, brings nothing wider
//! than its signer, and leaves a guest with no key that it has revoked.
//!
//! Input: a byte that says which of them, and the rest.

use std::sync::LazyLock;

use adit_tasks::anchor::{ANCHORS_MAX, Role, TrustStore};
use adit_tasks::card::from_text_as;
use adit_tasks::dsse::{self, TRUST_MAX, Type};
use adit_tasks::key::PublicKey;
use adit_tasks::trust::{self, DOCUMENTS_MAX, Document, Held, Here, REVOKED_MAX};
use ed25519_dalek::SigningKey;

static KEY: LazyLock<SigningKey> = LazyLock::new(|| SigningKey::from_bytes(&[7; 32]));

/// Signs cards; another one is there, so that this one may be revoked.
static TRUST: LazyLock<TrustStore> = LazyLock::new(|| {
    let mut trust = TrustStore::default();
    for (seed, role) in [(7, "card"), (8, "card"), (9, "goal")] {
        let key = PublicKey::of(&SigningKey::from_bytes(&[seed; 32]), "");
        trust
            .add_text(&format!("roles={role} {key}"))
            .expect("an anchor");
    }
    trust
});

pub fn run(data: &[u8]) {
    let Some((which, rest)) = data.split_first() else {
        return;
    };
    match which % 4 {
        0 => {
            if let Some(document) = taken(rest) {
                let text = dsse::sign_as(Type::Trust, &document.payload(), &KEY);
                assert_eq!(taken(text.as_bytes()), Some(document));
            }
        }
        1 => signed(rest),
        2 => {
            if let Ok(envelope) = from_text_as(Type::Trust, rest) {
                taken(&envelope);
            }
        }
        _ => on_disk(rest),
    }
}

fn taken(envelope: &[u8]) -> Option<Document> {
    let me = "web-1".parse().expect("a name");
    let here = Here {
        vm_id: Some(&me),
        now_ms: 0,
    };
    let mut held = Held::default();
    let proved = trust::check(envelope, &TRUST, here);
    let proved =
        proved.and_then(|proved| held.take(proved.clone(), &TRUST, Some(&me)).map(|_| proved));
    let document = match proved {
        Ok(proved) => proved.document,
        Err(e) => {
            // It is shown on a console: one line.
            let said = format!("{e} {}", e.remedy());
            assert!(said.len() < 2000 && !said.contains(|c: char| c.is_control()));
            assert_eq!(held, Held::default());
            return None;
        }
    };
    assert!(envelope.len() <= TRUST_MAX);
    assert_eq!(Held::parse(&held.text()).as_ref(), Ok(&held));
    let now = held.applied_to(&TRUST, Some(&me));
    assert!(now.len() <= ANCHORS_MAX);
    assert!(now.count(Role::Card) > 0 || document.leaves_no_card_key);
    for id in &document.revoked {
        assert!(now.get(id).is_none() && now.is_revoked(id));
    }
    // Its signer may sign cards only.
    assert!(
        document
            .anchors
            .iter()
            .all(|a| a.roles.to_string() == "card")
    );
    Some(document)
}

fn signed(payload: &[u8]) {
    let text = dsse::sign_as(Type::Trust, payload, &KEY);
    let Some(document) = taken(text.as_bytes()) else {
        return;
    };
    let plain: serde_json::Value = serde_json::from_slice(payload).expect("JSON");
    let fields = plain.as_object().expect("an object");
    assert!(fields.len() >= 3 && fields.len() <= 7);
    assert_eq!(fields["version"], 1);
    assert_eq!(fields["sequence"], document.sequence);
    let count = |name: &str| {
        fields
            .get(name)
            .map_or(0, |list| list.as_array().map_or(0, Vec::len))
    };
    assert_eq!(count("anchors"), document.anchors.len());
    assert_eq!(count("revoked"), document.revoked.len());
    assert_eq!(
        Document::parse(&document.payload()).expect("a document"),
        document
    );
}

fn on_disk(text: &[u8]) {
    let Ok(held) = Held::parse(text) else {
        return;
    };
    assert!(held.documents().len() <= DOCUMENTS_MAX && held.revoked().count() <= REVOKED_MAX);
    assert_eq!(Held::parse(&held.text()).as_ref(), Ok(&held));
    let now = held.applied_to(&TRUST, None);
    assert!(now.len() <= ANCHORS_MAX);
    assert!(held.revoked().all(|(id, _)| now.get(id).is_none()));
}
