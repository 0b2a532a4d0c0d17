//! Target `package`: bytes in place of an agent's package, of the payload that is signed, and of what host and guest say while a file
//! is carried and an order is given. A package that is taken is in its limits, is the same when it is written again, and says
//! what a reader of plain JSON finds there.
//!
//! Input: a byte that says which of them, and the rest.

use std::sync::LazyLock;

use adit_blob::wire::{self as blob, Want};
use adit_channel::frame;
use adit_tasks::anchor::TrustStore;
use adit_tasks::dsse::{AGENT_MAX, Type, sign_as};
use adit_tasks::key::PublicKey;
use adit_tasks::order;
use adit_tasks::package::{Package, SIZE_MAX, check_new};
use ed25519_dalek::SigningKey;

static KEY: LazyLock<SigningKey> = LazyLock::new(|| SigningKey::from_bytes(&[7; 32]));

static TRUST: LazyLock<TrustStore> = LazyLock::new(|| {
    let mut trust = TrustStore::default();
    let line = format!("roles=agent {}", PublicKey::of(&KEY, ""));
    trust.add_text(&line).expect("an anchor");
    trust
});

pub fn run(data: &[u8]) {
    let Some((which, rest)) = data.split_first() else {
        return;
    };
    match which % 4 {
        0 => drop(taken(rest)),
        1 => signed(rest),
        2 => {
            if let Some(want) = Want::parse(rest) {
                assert_eq!(want.encode(), rest);
            }
        }
        _ => said(rest),
    }
}

fn taken(envelope: &[u8]) -> Option<Package> {
    match check_new(envelope, &TRUST, "x86_64", 0) {
        Ok((package, key)) => {
            assert!(envelope.len() <= AGENT_MAX && key == PublicKey::of(&KEY, "").id());
            assert!((1..=SIZE_MAX).contains(&package.size));
            assert!(package.oldest_fallback <= package.version);
            Some(package)
        }
        Err(e) => {
            // It is shown on a console: one line.
            let said = format!("{} {e} {}", e.code(), e.remedy());
            assert!(said.len() < 2000 && !said.contains(|c: char| c.is_control()));
            None
        }
    }
}

fn signed(payload: &[u8]) {
    let text = sign_as(Type::Agent, payload, &KEY);
    let Some(package) = taken(text.as_bytes()) else {
        return;
    };
    let plain: serde_json::Value = serde_json::from_slice(payload).expect("JSON");
    assert_eq!(plain.as_object().expect("an object").len(), 6);
    assert_eq!(plain["version"], package.version.to_string());
    assert_eq!(plain["size"], package.size);
    assert_eq!(plain["sha256"], adit_tasks::hex(&package.digest));
    assert_eq!(
        Package::parse(&package.payload()).expect("a package"),
        package
    );
}

/// A frame of either service: what is understood is bounded, and is the same when it is sent again.
fn said(bytes: &[u8]) {
    fn again<T: serde::Serialize + serde::de::DeserializeOwned + PartialEq>(
        header: &frame::Header,
        body: &[u8],
    ) {
        if let Ok(message) = header.decode::<T>(body) {
            let sent = frame::encode(header.kind, header.version, header.id, 0, &message);
            let sent = sent.expect("what was read");
            let read = frame::read(&mut &sent[..], frame::LEN_MAX);
            let (header, body) = read.expect("a frame").expect("a frame");
            assert!(header.decode::<T>(&body).expect("the same") == message);
        }
    }
    let Ok(Some((header, body))) = frame::read(&mut &bytes[..], order::BODY_MAX) else {
        return;
    };
    assert!(body.len() <= order::BODY_MAX as usize);
    again::<blob::Have>(&header, &body);
    again::<blob::Ended>(&header, &body);
    again::<order::Order>(&header, &body);
    again::<order::Answer>(&header, &body);
}
