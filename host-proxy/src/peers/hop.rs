//! Who asks, as one host writes it for the next, and as that one reads it. Pure.
//!
//! ```text
//! Adit-Caller: client:5f0c2a91d3b87e64, user:deploy, group:ops
//! ```
//! `client` tells that host's clients apart, by a digest of whatever each of them is known by there, so that one of them cannot use
//! up what all of them have here. It proves nothing, and touches no other host's share: that host may say what it likes.
//!
//! It is a claim. It counts only over a connection whose certificate is a `[[host]]`'s, and of it only what that one `vouches` for
//! here. A user's number is another user on each host, and is never claimed. Tokens and certificates are nobody's word: the token goes along in
//! `Proxy-Authorization`, and a certificate proves its holder to whom it is shown only.

use adit_api::token::sha256;

use crate::access::audit::counted_as;
use crate::access::{Caller, Subject};
use crate::config::HostConfig;
use crate::config::hosts::is_number;

/// The field.
pub const CALLER: &str = "adit-caller";
/// Longest value: of more groups the last are left out.
pub const CLAIMS_MAX: usize = 4096;

/// What is before the name of a client.
const CLIENT: &str = "client:";
/// Bytes of its digest.
const CLIENT_BYTES: usize = 8;

/// What this host says of a caller.
pub fn claims(caller: &Caller) -> String {
    let of = counted_as(&caller.to_string(), caller.from());
    let digest = sha256(of.as_bytes());
    let mut text = format!("{CLIENT}{}", adit_names::hex(&digest[..CLIENT_BYTES]));
    for subject in caller
        .subjects()
        .iter()
        .filter(|subject| is_claimed(subject))
    {
        let one = subject.to_string();
        if text.len() + one.len() + 2 > CLAIMS_MAX {
            break;
        }
        text.push_str(", ");
        text.push_str(&one);
    }
    text
}

/// Which of its clients another host means; empty: it does not say.
pub fn client(claims: &[u8]) -> String {
    let text = std::str::from_utf8(claims).unwrap_or_default();
    let mut clients = text
        .split(',')
        .filter_map(|one| one.trim().strip_prefix(CLIENT));
    let client = clients.next().unwrap_or_default();
    client.chars().take(2 * CLIENT_BYTES).collect()
}

/// What of another host's claims counts here.
pub fn vouched(claims: &[u8], host: &HostConfig) -> Vec<Subject> {
    if claims.len() > CLAIMS_MAX {
        return vec![];
    }
    let text = std::str::from_utf8(claims).unwrap_or_default();
    let claimed = text.split(',').filter_map(|one| one.trim().parse().ok());
    let counts = |subject: &Subject| is_claimed(subject) && host.vouches_for(subject);
    let mut counted: Vec<Subject> = claimed.filter(counts).collect();
    counted.sort();
    counted.dedup();
    counted
}

fn is_claimed(subject: &Subject) -> bool {
    match subject {
        Subject::User(name) | Subject::Group(name) => !is_number(name),
        Subject::Token(_) | Subject::Cert(_) | Subject::Network(_) | Subject::Anyone => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::caller::Person;

    fn host(vouches: &[&str]) -> HostConfig {
        HostConfig {
            name: "beta".parse().unwrap(),
            address: "192.0.2.1:1".parse().unwrap(),
            pin: "sha256/47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="
                .parse()
                .unwrap(),
            names: vec!["*".into()],
            vouches: vouches.iter().map(|text| (*text).to_owned()).collect(),
        }
    }

    #[test]
    fn r126_a_claim_is_of_users_and_groups_by_name_and_counts_where_its_host_vouches_for_it() {
        let person = Person {
            uid: 1000,
            name: Some("deploy".into()),
            groups: vec!["ops".into(), "4711".into()],
        };
        let cert = "cert:ci.example".parse().unwrap();
        let caller = Caller::anonymous("x")
            .with_person(&person)
            .with_token("ci")
            .with([cert]);
        let said = claims(&caller);
        let (client_is, rest) = said.split_once(", ").unwrap();
        assert_eq!(rest, "user:deploy, group:ops");
        assert_eq!(format!("client:{}", client(said.as_bytes())), client_is);
        let of = |claims: &str, vouches: &[&str]| {
            let counted = vouched(claims.as_bytes(), &host(vouches));
            counted.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(of(&said, &[]), [""; 0]);
        assert_eq!(of(&said, &["group:ops"]), ["group:ops"]);
        assert_eq!(
            of(&said, &["group:ops", "user:deploy", "user:root"]),
            ["user:deploy", "group:ops"]
        );
        let all = [
            "token:ci",
            "cert:ci.example",
            "anyone",
            "user:1000",
            "user:deploy",
        ];
        assert_eq!(of(&all.join(","), &all), ["user:deploy"]);
        for odd in [
            "",
            ",,",
            "deploy",
            "user:",
            "USER:deploy",
            "user:deploy\u{0}",
            "user:de ploy",
        ] {
            assert_eq!(of(odd, &["user:deploy"]), [""; 0], "{odd:?}");
        }
        let long = format!("user:deploy,{}", "x".repeat(CLAIMS_MAX));
        assert_eq!(of(&long, &["user:deploy"]), [""; 0]);
        assert_eq!(vouched(b"user:deploy\xff", &host(&["user:deploy"])), []);
    }

    #[test]
    fn r126_clients_of_another_host_are_told_apart_and_may_be_called_anything() {
        let at = |from: &str| client(claims(&Caller::anonymous(from)).as_bytes());
        assert_eq!(at("192.0.2.1:1"), at("192.0.2.1:2"));
        assert_ne!(at("192.0.2.1:1"), at("192.0.2.2:1"));
        let token = Caller::anonymous("192.0.2.1:1").with_token("ci");
        assert_ne!(client(claims(&token).as_bytes()), at("192.0.2.1:1"));
        // A host of the version before does not say.
        assert_eq!(client(b"user:deploy"), "");
        let long = format!("client:{}", "é".repeat(1000));
        assert_eq!(client(long.as_bytes()).chars().count(), 2 * CLIENT_BYTES);
        assert_eq!(client(b"\xff"), "");
    }

    #[test]
    fn claims_are_bounded_and_the_user_comes_first() {
        let person = Person {
            uid: 1,
            name: Some("deploy".into()),
            groups: (0..1000).map(|n| format!("group-{n}")).collect(),
        };
        let said = claims(&Caller::anonymous("x").with_person(&person));
        assert!(said.len() <= CLAIMS_MAX && said.contains(", user:deploy, group:group-0"));
    }
}
