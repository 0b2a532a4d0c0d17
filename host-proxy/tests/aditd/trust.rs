//! Trust documents: kept for guests, given to those that are connected and to those that come, and what they say to it.

use adit_tasks::PublicKey;
use adit_tasks::dsse::{Type, id_of, sign_as};
use adit_tasks::wire::{self, HeldDocument, Trust, TrustHeld, WireKind};
use ed25519_dalek::SigningKey;
use serde_json::{Value, json};

use crate::host::{Agent, Answer, Control, Host};

fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

fn id(seed: u8) -> String {
    id_of(&key(seed)).to_string()
}

fn document(by: u8, sequence: u64, more: Value) -> String {
    let mut document =
        json!({"version": 1, "sequence": sequence, "not_after": "2099-01-01T00:00:00Z"});
    for (key, value) in more.as_object().unwrap() {
        document[key] = value.clone();
    }
    sign_as(Type::Trust, document.to_string().as_bytes(), &key(by))
}

fn apply(host: &Host, envelope: &str, to: &[&str]) -> Answer {
    let body = json!({"envelope": envelope, "to": to});
    host.api("POST", "/v1/trust", &body.to_string())
}

fn applied(host: &Host, envelope: &str, to: &[&str]) {
    let answer = apply(host, envelope, to);
    assert_eq!(answer.status, 200, "{}", answer.body);
}

fn refused(answer: &Answer, status: u16, code: &str) {
    assert_eq!(answer.status, status, "{}", answer.body);
    let said: Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(said["code"], code, "{}", answer.body);
}

/// An agent that has said what it has taken.
fn agent(control: &Control, vm: &str, held: &[(u8, u64)]) -> Agent {
    let mut agent = control.silent_agent(wire::TRUST);
    says(&mut agent, held, "");
    agent.facts(vm, 1);
    agent
}

fn says(agent: &mut Agent, held: &[(u8, u64)], refused: &str) {
    let documents = held.iter().map(|(signer, sequence)| HeldDocument {
        signer: id_of(&key(*signer)).0,
        own: false,
        sequence: *sequence,
    });
    let held = TrustHeld {
        documents: documents.collect(),
        revoked: 2,
        refused: refused.into(),
    };
    agent.say(WireKind::TrustHeld, 0, &held);
}

fn hears(agent: &mut Agent) -> String {
    let (header, body) = agent.hear_kind(WireKind::Trust);
    let trust: Trust = header.decode(&body).unwrap();
    String::from_utf8(trust.envelope).unwrap()
}

#[test]
fn a_document_reaches_whoever_is_connected_at_once_and_others_when_they_come() {
    let (mut host, ports) = Host::serving(&[("a", 3), ("b", 4)], "");
    let (a, b) = (ports[0].connected(), ports[1].connected());
    let mut at_a = agent(&a, "a", &[]);
    at_a.heard();
    let first = document(1, 5, json!({}));
    applied(&host, &first, &[]);
    assert_eq!(hears(&mut at_a), first);
    says(&mut at_a, &[(1, 5)], "");
    at_a.heard();
    let vm = host.get("/v1/vms/a");
    let taken = json!([{"signer": id(1), "own": false, "sequence": 5}]);
    assert_eq!(vm["trust"]["documents"], taken);
    assert_eq!(vm["trust"]["revoked"], 2);
    assert!(vm["fault"].is_null(), "{vm}");
    // The next aditd has it, too; one who has it is not sent it again.
    host.kill();
    host.start();
    let (a, b) = (ports[0].connected(), {
        drop(b);
        ports[1].connected()
    });
    let mut at_a = agent(&a, "a", &[(1, 5)]);
    let mut at_b = agent(&b, "b", &[(1, 4), (2, 9)]);
    assert_eq!(hears(&mut at_b), first);
    at_a.heard();
    // For one VM only.
    let second = document(1, 6, json!({}));
    applied(&host, &second, &["b"]);
    assert_eq!(hears(&mut at_b), second);
    let own = document(1, 1, json!({"vm_id": "a"}));
    applied(&host, &own, &[]);
    assert_eq!(hears(&mut at_a), own);
    at_b.heard();
    let kept = host.get("/v1/trust");
    let rows = kept.as_array().unwrap().iter();
    let rows: Vec<_> = rows
        .map(|k| (k["vms"].clone(), k["own"].clone(), k["sequence"].clone()))
        .collect();
    assert_eq!(
        rows,
        [
            (json!([]), json!(false), json!(5)),
            (json!(["a"]), json!(true), json!(1)),
            (json!(["b"]), json!(false), json!(6)),
        ]
    );
    // An agent of before is sent none, and says none.
    let mut before = a.agent();
    before.heard();
    assert!(host.get("/v1/vms/a")["trust"].is_null());
}

#[test]
fn what_a_guest_does_not_take_is_a_fault_that_says_why_and_is_not_sent_again() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    applied(&host, &document(1, 5, json!({})), &[]);
    applied(&host, &document(2, 1, json!({})), &[]);
    let mut agent = agent(&control, "a", &[]);
    for _ in 0..2 {
        hears(&mut agent);
    }
    // They come in the order of their signers' ids.
    let order = if id(1) < id(2) { [1, 2] } else { [2, 1] };
    let why = "trust-untrusted: signed by nobody\nwho is known\u{1b}[2J";
    for seed in order {
        says(&mut agent, &[], if seed == 1 { why } else { "" });
    }
    agent.heard();
    let vm = host.get("/v1/vms/a");
    let fault = vm["fault"].as_str().unwrap();
    let part = format!(
        "does not take the trust document 5 of {}: trust-untrusted",
        id(1)
    );
    assert!(fault.contains(&part), "{fault}");
    assert!(!fault.contains(|c: char| c.is_control()), "{fault}");
    assert_eq!(vm["trust"]["refused"][0]["sequence"], 5);
    let metrics = host.api("GET", "/metrics", "").body;
    assert!(
        metrics.contains("adit_vm_fault{vm=\"a\",kind=\"trust\"} 1"),
        "{metrics}"
    );
    for _ in 0..100 {
        says(&mut agent, &[], "trust-old: x");
    }
    agent.heard();
    // The next one of its signer is sent, and ends the fault.
    let next = document(1, 6, json!({}));
    applied(&host, &next, &[]);
    assert_eq!(hears(&mut agent), next);
    says(&mut agent, &[(1, 6)], "");
    agent.heard();
    assert!(host.get("/v1/vms/a")["fault"].is_null());
}

#[test]
fn what_is_no_document_or_an_older_one_is_not_kept() {
    let (host, _ports) = Host::serving(&[("a", 3), ("b", 4)], "");
    let good = document(1, 5, json!({}));
    applied(&host, &good, &[]);
    applied(&host, &good, &[]);
    refused(
        &apply(&host, &document(1, 4, json!({})), &[]),
        409,
        "trust-old",
    );
    let other = document(1, 5, json!({"leaves_no_card_key": true}));
    refused(&apply(&host, &other, &[]), 409, "trust-old");
    refused(&apply(&host, "{}", &[]), 422, "bad-trust");
    refused(
        &apply(&host, &document(1, 6, json!({"x": 1})), &[]),
        422,
        "bad-trust",
    );
    let over = document(1, 6, json!({"not_after": "2020-01-01T00:00:00Z"}));
    refused(&apply(&host, &over, &[]), 422, "expired");
    let card = sign_as(Type::Card, b"{}", &key(1));
    refused(&apply(&host, &card, &[]), 422, "bad-trust");
    refused(
        &apply(&host, &document(1, 6, json!({})), &["c"]),
        404,
        "unknown-vm",
    );
    let own = document(1, 6, json!({"vm_id": "a"}));
    refused(&apply(&host, &own, &["b"]), 422, "wrong-audience");
    let long = format!("{}{}", " ".repeat(20_000), document(1, 6, json!({})));
    refused(&apply(&host, &long, &[]), 422, "bad-trust");
    // None of them has changed anything.
    let kept = host.get("/v1/trust");
    assert_eq!(kept.as_array().unwrap().len(), 1);
    assert_eq!(kept[0]["sequence"], 5);
    let forget = |path: &str| host.api("DELETE", path, "");
    refused(
        &forget(&format!("/v1/trust/{}", id(2))),
        404,
        "unknown-trust",
    );
    refused(&forget("/v1/trust/x"), 422, "bad-trust");
    assert_eq!(forget(&format!("/v1/trust/{}", id(1))).status, 204);
    assert_eq!(host.get("/v1/trust"), json!([]));
    // Then an older one may be given again: guests that have the newer refuse it.
    applied(&host, &document(1, 4, json!({})), &[]);
}

#[test]
fn documents_of_so_many_signers_are_kept_and_those_of_a_removed_vm_are_gone() {
    let (host, _ports) = Host::serving(&[], "");
    for (name, cid) in [("x", 9), ("y", 10)] {
        let new = json!({"name": name, "cid": cid}).to_string();
        assert_eq!(host.api("POST", "/v1/vms", &new).status, 200);
    }
    for seed in 0..32 {
        applied(&host, &document(seed, 1, json!({})), &[]);
        applied(&host, &document(seed, 1, json!({})), &["x"]);
    }
    refused(
        &apply(&host, &document(32, 1, json!({})), &[]),
        429,
        "trust-full",
    );
    refused(
        &apply(&host, &document(32, 1, json!({})), &["x"]),
        429,
        "trust-full",
    );
    applied(&host, &document(32, 1, json!({})), &["y"]);
    applied(&host, &document(31, 2, json!({})), &[]);
    assert_eq!(host.api("DELETE", "/v1/vms/x", "").status, 204);
    assert_eq!(host.get("/v1/trust").as_array().unwrap().len(), 33);
    // A document is as large as its envelope may be, and no larger.
    let anchors: Vec<_> = (0..16)
        .map(|n| {
            format!(
                "roles=goal {}",
                PublicKey::of(&key(n + 100), &"x".repeat(64))
            )
        })
        .collect();
    let ids: Vec<_> = (0..128).map(|n| format!("{n:032x}")).collect();
    let large = document(31, 3, json!({"anchors": anchors, "revoked": ids}));
    applied(&host, &large, &[]);
}
