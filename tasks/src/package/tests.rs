//! What is a package, and which one is taken.

use ed25519_dalek::SigningKey;
use serde_json::{Value, json};

use super::*;
use crate::dsse::{AGENT_MAX, sign_as};
use crate::key::PublicKey;

const GOOD: &str = r#"{"version":"0.2.0","architecture":"x86_64","size":5,"sha256":"2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824","oldest_fallback":"0.1.0","not_after":"2027-11-21T22:00:00Z"}"#;
const NOW: i64 = 1_795_219_200_000;

fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

fn trust(roles: &str) -> TrustStore {
    let mut trust = TrustStore::default();
    let line = format!("roles={roles} {}", PublicKey::of(&key(7), ""));
    trust.add_text(&line).unwrap();
    trust
}

fn with(key: &str, value: Value) -> Vec<u8> {
    let mut package: Value = serde_json::from_str(GOOD).unwrap();
    package[key] = value;
    package.to_string().into_bytes()
}

fn taken(payload: &[u8], roles: &str) -> Result<Package, PackageError> {
    let envelope = sign_as(Type::Agent, payload, &key(7));
    check_new(envelope.as_bytes(), &trust(roles), "x86_64", NOW).map(|(package, _)| package)
}

fn code(taken: Result<Package, PackageError>) -> &'static str {
    let e = taken.unwrap_err();
    assert!(!e.to_string().contains('\n') && !e.remedy().is_empty());
    e.code()
}

#[test]
fn a_package_has_golden_bytes() {
    let package = taken(GOOD.as_bytes(), "agent").unwrap();
    assert_eq!(package.payload(), GOOD.as_bytes());
    assert_eq!(package.version.to_string(), "0.2.0");
    assert_eq!((package.size, package.digest[0]), (5, 0x2c));
    let envelope = sign_as(Type::Agent, GOOD.as_bytes(), &key(7));
    assert!(envelope.contains("\"application/vnd.adit.agent.v1+json\""));
    assert!(envelope.len() <= AGENT_MAX);
}

#[test]
fn r83_a_key_for_anything_else_signs_no_agent() {
    for roles in ["goal", "card", "exec", "goal,card,exec"] {
        assert_eq!(
            code(taken(GOOD.as_bytes(), roles)),
            "agent-untrusted",
            "{roles}"
        );
    }
    // Nor is what was signed as something else an agent.
    for of in [Type::Goal, Type::Card] {
        let envelope = sign_as(of, GOOD.as_bytes(), &key(7));
        let all = trust("goal,card,exec,agent");
        let e = check(envelope.as_bytes(), &all, "x86_64").unwrap_err();
        assert_eq!(e.code(), "agent-damaged");
    }
    let by_other = sign_as(Type::Agent, GOOD.as_bytes(), &key(8));
    let e = check(by_other.as_bytes(), &trust("agent"), "x86_64").unwrap_err();
    assert_eq!(e.code(), "agent-untrusted");
}

#[test]
fn r87_unknown_duplicate_and_missing_keys_are_refused() {
    assert_eq!(code(taken(&with("more", json!(1)), "agent")), "agent-bad");
    let twice = GOOD.replacen('{', "{\"size\":5,", 1);
    assert_eq!(code(taken(twice.as_bytes(), "agent")), "agent-bad");
    for key in serde_json::from_str::<Value>(GOOD)
        .unwrap()
        .as_object()
        .unwrap()
        .keys()
    {
        let mut package: Value = serde_json::from_str(GOOD).unwrap();
        package.as_object_mut().unwrap().remove(key);
        let without = taken(package.to_string().as_bytes(), "agent");
        assert_eq!(code(without), "agent-bad", "{key}");
        assert_eq!(code(taken(&with(key, Value::Null), "agent")), "agent-bad");
    }
    let list = br#"["0.2.0","x86_64",5,"00","0.1.0","2027-11-21T22:00:00Z"]"#;
    assert_eq!(code(taken(list, "agent")), "agent-bad");
    let long = "9".repeat(VERSION_MAX + 1);
    for (key, value) in [
        ("version", json!("1")),
        ("version", json!("01.2.3")),
        ("version", json!("1.2.3+build")),
        ("version", json!(format!("1.2.{long}"))),
        ("version", json!("1.2.3\u{1b}[2J")),
        ("architecture", json!("")),
        ("architecture", json!("../x")),
        ("size", json!(0)),
        ("size", json!(SIZE_MAX + 1)),
        ("size", json!(-1)),
        ("sha256", json!("00")),
        ("sha256", json!("A".repeat(64))),
        ("oldest_fallback", json!("0.2.1")),
        ("not_after", json!("tomorrow")),
    ] {
        assert_eq!(
            code(taken(&with(key, value), "agent")),
            "agent-bad",
            "{key}"
        );
    }
    assert!(taken(&with("oldest_fallback", json!("0.2.0")), "agent").is_ok());
    assert!(taken(&with("version", json!("0.2.0-rc.1")), "agent").is_ok());
}

#[test]
fn one_for_another_machine_or_another_time_is_refused() {
    let foreign = with("architecture", json!("aarch64"));
    assert_eq!(code(taken(&foreign, "agent")), "agent-foreign");
    let over = with("not_after", json!("2020-01-01T00:00:00Z"));
    assert_eq!(code(taken(&over, "agent")), "agent-expired");
    // One that was taken runs on.
    let envelope = sign_as(Type::Agent, &over, &key(7));
    assert!(check(envelope.as_bytes(), &trust("agent"), "x86_64").is_ok());
}

#[test]
fn r84_an_envelope_is_so_long_and_no_longer() {
    let mut envelope = sign_as(Type::Agent, GOOD.as_bytes(), &key(7)).into_bytes();
    let room = AGENT_MAX - envelope.len();
    envelope.splice(1..1, vec![b' '; room]);
    assert!(check(&envelope, &trust("agent"), "x86_64").is_ok());
    envelope.insert(1, b' ');
    let e = check(&envelope, &trust("agent"), "x86_64").unwrap_err();
    assert_eq!(e.code(), "agent-damaged");
}

#[test]
fn versions_have_an_order() {
    let mut texts = ["0.10.0", "0.2.0-rc.1", "0.2.0", "1.0.0", "0.2.0-rc.2"];
    texts.sort_by_key(|text| version(text).unwrap());
    let sorted = ["0.2.0-rc.1", "0.2.0-rc.2", "0.2.0", "0.10.0", "1.0.0"];
    assert_eq!(texts, sorted);
}
