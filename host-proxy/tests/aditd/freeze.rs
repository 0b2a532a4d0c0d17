//! File systems of a guest that the test plays: frozen, thawed, and what a guest may not have shown.

use std::io::Write;
use std::thread;

use adit_channel::frame;
use adit_tasks::freeze::{ANSWER, Answer as Said, Asked, SERVICE};
use serde_json::{Value, json};

use crate::blobs::Guest;
use crate::host::{Answer, Control, Host};

/// Asks while the guest answers with these bytes.
fn asked(host: &Host, control: &Control, method: &str, what: Asked, bytes: &[u8]) -> Answer {
    let body = match what {
        Asked::Freeze(lease_ms) => json!({ "lease_ms": lease_ms }).to_string(),
        Asked::Thaw | Asked::Show => String::new(),
    };
    thread::scope(|s| {
        let asked = s.spawn(|| host.api(method, "/v1/vms/a/freeze", &body));
        let mut guest = Guest::dialled_as(control, SERVICE, &what.encode());
        let _ = guest.0.write_all(bytes);
        drop(guest);
        asked.join().unwrap()
    })
}

fn said(kind: u16, answer: &Said) -> Vec<u8> {
    frame::encode(kind, 1, 1, 0, answer).unwrap()
}

fn is_refused(answer: &Answer, status: u16, code: &str) {
    let said: Value = serde_json::from_str(&answer.body).unwrap();
    let got = (answer.status, said["code"].as_str());
    assert_eq!(got, (status, Some(code)), "{}", answer.body);
    let is_plain = |c: char| !c.is_control() || c == '\n';
    assert!(answer.body.chars().all(is_plain) && answer.body.len() < 2000);
}

#[test]
fn file_systems_are_frozen_and_thawed_and_a_guests_words_are_bounded() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let state = |frozen: Vec<String>, count, left_ms| {
        let state = Said::State {
            frozen,
            count,
            left_ms,
        };
        said(ANSWER, &state)
    };
    let freeze = Asked::Freeze(30_000);
    let bytes = state(vec!["/".into(), "/srv".into()], 2, 29_990);
    let answer = asked(&host, &control, "POST", freeze, &bytes);
    let shown: Value = serde_json::from_str(&answer.body).unwrap();
    let want = json!({"file_systems": ["/", "/srv"], "count": 2, "left_ms": 29_990});
    assert_eq!((answer.status, shown), (200, want));
    let none = state(vec![], 0, 0);
    for (method, what) in [("DELETE", Asked::Thaw), ("GET", Asked::Show)] {
        let answer = asked(&host, &control, method, what, &none);
        let shown: Value = serde_json::from_str(&answer.body).unwrap();
        assert_eq!((answer.status, &shown["count"]), (200, &json!(0)));
    }
    // What it says is shown, and can be no more than that.
    let long = state(vec!["\x1b[2J".repeat(200); 60], 60, u32::MAX);
    let answer = asked(&host, &control, "POST", freeze, &long);
    assert!(
        answer.status >= 500 || !answer.body.contains('\x1b'),
        "{}",
        answer.body
    );
    let no = said(ANSWER, &Said::Refused("10-db freeze: \x1b[2Jno".repeat(90)));
    let answer = asked(&host, &control, "POST", freeze, &no);
    is_refused(&answer, 409, "not-frozen");
    for bytes in [
        said(ANSWER + 1, &Said::NOTHING),
        frame::encode(ANSWER, 2, 1, 0, &Said::NOTHING).unwrap(),
        no[..no.len() / 2].to_vec(),
        b"no frame at all, and then some more".to_vec(),
        Vec::new(),
    ] {
        let answer = asked(&host, &control, "POST", freeze, &bytes);
        is_refused(&answer, 502, "reset");
    }
    // What cannot be.
    for (method, what, bytes) in [
        ("POST", freeze, state(vec![], 0, 0)),
        ("POST", freeze, state(vec!["/".into(); 5], 0, 9)),
        ("GET", Asked::Show, state(vec!["/".into(); 5], 4, 9)),
    ] {
        let answer = asked(&host, &control, method, what, &bytes);
        assert!(answer.status >= 500, "{}", answer.body);
    }
    for lease_ms in [0, 999, 300_001] {
        let body = json!({ "lease_ms": lease_ms }).to_string();
        let answer = host.api("POST", "/v1/vms/a/freeze", &body);
        is_refused(&answer, 422, "usage");
    }
    assert_eq!(host.api("POST", "/v1/vms/a/freeze", "{}").status, 400);
}
