//! `adit access`: what is asked of aditd, and what is said of its answer.

use serde_json::{Value, json};

use crate::fake::{Fake, Say};
use crate::text;

fn decision(allowed: bool, hidden: bool) -> Say {
    Say::Json(json!({
        "allowed": allowed, "caller": ["user:deploy", "anyone"], "by": null, "reason": "not-granted",
        "text": "no grant lets user:deploy do it", "hidden": hidden,
    }))
}

#[test]
fn a_check_asks_for_caller_verb_vm_and_target_and_a_denial_fails() {
    for (args, query) in [
        (
            &["reach", "web-1:22"][..],
            "as=user%3Ade%26ploy&verb=reach&vm=web-1%3A22",
        ),
        (
            &["reach", "vsock-5000.web-1"],
            "as=user%3Ade%26ploy&verb=reach&vm=vsock-5000.web-1",
        ),
        (&["goal", "web-1"], "as=user%3Ade%26ploy&verb=goal&vm=web-1"),
        (
            &["exec", "root@web-1"],
            "as=user%3Ade%26ploy&verb=exec&vm=web-1&target=root",
        ),
    ] {
        for (allowed, code) in [(true, 0), (false, 1)] {
            let path = format!("/v1/access?{query}");
            let fake = Fake::start(move |asked| {
                assert_eq!(asked.path, path);
                decision(allowed, true)
            });
            let out = fake.adit(&[&["access", "check", "--as", "user:de&ploy"], args].concat());
            assert_eq!(out.status.code(), Some(code), "{}", text(&out.stderr));
            let said = if allowed { &out.stdout } else { &out.stderr };
            assert!(text(said).contains("no grant lets"), "{}", text(said));
            assert_eq!(text(&out.stderr).contains("no such VM"), !allowed);
        }
    }
}

#[test]
fn grants_are_listed_with_their_place_and_what_is_over() {
    let fake = Fake::start(|asked| {
        assert_eq!(asked.path, "/v1/grants?vm=web-1");
        Say::Json(json!([{
            "place": "/etc/adit/aditd.toml:9", "to": ["user:a", "group:b"], "vms": ["web-*"], "may": ["reach:80", "see"],
            "until": "2026-01-01T00:00:00Z", "expired": true,
        }]))
    });
    let out = fake.adit(&["access", "ls", "--vm", "web-1"]);
    let said = text(&out.stdout);
    for word in [
        "user:a group:b",
        "reach:80 see",
        "web-*",
        "(over)",
        "aditd.toml:9",
    ] {
        assert!(said.contains(word), "{said}");
    }
}

#[test]
fn a_new_token_is_on_standard_output_alone_and_its_section_has_its_digest_only() {
    let fake = Fake::start(|asked| panic!("{}", asked.path));
    let out = fake.adit(&["access", "token", "ci"]);
    let (token, section) = (text(&out.stdout), text(&out.stderr));
    let token = token.trim();
    assert!(token.starts_with("adit_") && token.len() > 40, "{token}");
    assert!(
        section.contains("[[token]]") && section.contains("name = \"ci\""),
        "{section}"
    );
    assert!(!section.contains(token), "{section}");
    let json = fake.adit(&["access", "token", "ci", "-o", "json"]);
    let value: Value = serde_json::from_slice(&json.stdout).unwrap();
    let digest = adit_api::token::sha256(value["token"].as_str().unwrap().as_bytes());
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(value["sha256"], hex);
    assert_ne!(value["token"], token, "each is another one");
    assert_eq!(
        fake.adit(&["access", "token", "a b"]).status.code(),
        Some(2)
    );
}
