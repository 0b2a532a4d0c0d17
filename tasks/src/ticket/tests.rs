use ed25519_dalek::SigningKey;
use proptest::prelude::*;

use super::*;
use crate::anchor::TrustStore;
use crate::dsse::{self, Type};
use crate::key::PublicKey;

const GOOD: &str = r#"{"vm_id":"web-1","user":"deploy","verb":{"run":{"argv":["/usr/bin/uptime","-p"],"env":[["LANG","C"]],"cwd":"/srv","stdin":{"bytes":{"sha256":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","size":5}},"timeout_ms":500,"detach":true}},"not_before":"2027-11-21T22:00:00Z","not_after":"2027-11-21T22:02:00Z","nonce":"000102030405060708090a0b0c0d0e0f"}"#;
/// 2027-11-21T22:00:00Z.
const T: i64 = 1_826_834_400_000;

fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

fn trust(roles: &str) -> TrustStore {
    let mut trust = TrustStore::default();
    let line = format!("roles={roles} {}", PublicKey::of(&key(7), ""));
    trust.add_text(&line).unwrap();
    trust
}

fn good() -> Ticket {
    Ticket::parse(GOOD.as_bytes()).unwrap()
}

fn sign(payload: &[u8]) -> String {
    dsse::sign_as(Type::Ticket, payload, &key(7))
}

fn checked(payload: &[u8], now_ms: i64, channel: Option<&[u8; 32]>) -> Result<Proved, TicketError> {
    let vm_id = "web-1".parse().unwrap();
    let here = Here {
        vm_id: &vm_id,
        now_ms,
        channel,
    };
    check(sign(payload).as_bytes(), &trust("exec"), here)
}

#[test]
fn a_ticket_has_golden_bytes() {
    let ticket = good();
    assert_eq!(ticket.payload(), GOOD.as_bytes());
    assert_eq!(ticket.not_before.as_millisecond(), T);
    let Verb::Run(run) = &ticket.verb else {
        panic!("{ticket:?}");
    };
    assert_eq!(run.argv, ["/usr/bin/uptime", "-p"]);
    assert_eq!((run.tty, run.timeout_ms, run.detach), (None, 500, true));
    for (verb, text) in [
        (
            Verb::Run(Run {
                argv: vec!["sh".into()],
                tty: Some((24, 80)),
                stdin: Input::Live,
                ..Run::default()
            }),
            r#"{"run":{"argv":["sh"],"tty":[24,80],"stdin":"live"}}"#,
        ),
        (
            Verb::Attach(Attach {
                session: "3fa9".into(),
            }),
            r#"{"attach":{"session":"3fa9"}}"#,
        ),
        (
            Verb::End(End {
                session: "3fa9".into(),
                signal: 15,
            }),
            r#"{"end":{"session":"3fa9","signal":15}}"#,
        ),
        (Verb::List(List {}), r#"{"list":{}}"#),
        (
            Verb::Put(Put {
                path: "/srv/a".into(),
                mode: 0o644,
                content: Content {
                    sha256: [0xaa; 32],
                    size: 5,
                },
            }),
            r#"{"put":{"path":"/srv/a","mode":420,"content":{"sha256":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","size":5}}}"#,
        ),
        (
            Verb::Get(Get {
                path: "/srv/a".into(),
            }),
            r#"{"get":{"path":"/srv/a"}}"#,
        ),
    ] {
        assert_eq!(serde_json::to_string(&verb).unwrap(), text);
        let with = Ticket {
            verb,
            channel: Some([0xcc; 32]),
            ..good()
        };
        assert_eq!(Ticket::parse(&with.payload()).unwrap(), with);
    }
}

#[test]
fn r120_a_ticket_is_for_one_guest_one_time_one_stream_and_by_a_key_of_its_role() {
    assert_eq!(checked(GOOD.as_bytes(), T, None).unwrap().ticket, good());
    // To the ms, with the tolerance before and none after.
    for (now, good) in [
        (T - 60_001, false),
        (T - 60_000, true),
        (T + 120_000, true),
        (T + 120_001, false),
        (i64::MIN, false),
        (i64::MAX, false),
    ] {
        let checked = checked(GOOD.as_bytes(), now, None);
        assert_eq!(checked.is_ok(), good, "{now}: {checked:?}");
    }
    let other = GOOD.replace("web-1", "web-2");
    let e = checked(other.as_bytes(), T, None).unwrap_err();
    assert!(matches!(e, TicketError::Foreign { .. }), "{e}");
    // Its stream: none, this one, another one.
    let sealed = Ticket {
        channel: Some([1; 32]),
        ..good()
    };
    let plain = good();
    for (ticket, channel, good) in [
        (&plain, None, true),
        (&plain, Some([1; 32]), false),
        (&sealed, None, false),
        (&sealed, Some([2; 32]), false),
        (&sealed, Some([1; 32]), true),
    ] {
        let checked = checked(&ticket.payload(), T, channel.as_ref());
        assert_eq!(checked.is_ok(), good, "{checked:?}");
        if let Err(e) = checked {
            assert!(matches!(e, TicketError::OtherStream), "{e}");
        }
    }
    let vm_id = "web-1".parse().unwrap();
    let here = Here {
        vm_id: &vm_id,
        now_ms: T,
        channel: None,
    };
    let text = sign(GOOD.as_bytes());
    for roles in ["goal", "card", "agent", "card,goal,agent"] {
        let e = check(text.as_bytes(), &trust(roles), here).unwrap_err();
        let is_role = matches!(e, TicketError::Verify(dsse::VerifyError::WrongRole { .. }));
        assert!(is_role, "{e}");
    }
    let mut revoked = trust("exec");
    revoked.revoke(PublicKey::of(&key(7), "").id());
    assert!(check(text.as_bytes(), &revoked, here).is_err());
    // sigstore/sigstore#2326, Rul1an/assay#1710: what is signed as another type is nothing as a ticket.
    for of in [Type::Goal, Type::Card, Type::Trust, Type::Agent] {
        let all = trust("card,goal,exec,agent");
        let text = dsse::sign_as(of, GOOD.as_bytes(), &key(7));
        let e = check(text.as_bytes(), &all, here).unwrap_err();
        assert!(matches!(e, TicketError::Envelope(_)), "{e}");
        let renamed = text.replace(of.name(), Type::Ticket.name());
        let e = check(renamed.as_bytes(), &all, here).unwrap_err();
        assert!(matches!(e, TicketError::Verify(_)), "{e}");
    }
}

#[test]
fn what_leaves_something_open_needs_a_sealed_stream() {
    let run = |tty, stdin| {
        Verb::Run(Run {
            argv: vec!["sh".into()],
            tty,
            stdin,
            ..Run::default()
        })
    };
    let session = || "3fa9".to_owned();
    for verb in [
        run(Some((24, 80)), Input::None),
        run(None, Input::Live),
        Verb::Attach(Attach { session: session() }),
        Verb::End(End {
            session: session(),
            signal: 0,
        }),
        Verb::List(List {}),
        Verb::Get(Get { path: "/a".into() }),
    ] {
        let ticket = Ticket { verb, ..good() };
        let e = checked(&ticket.payload(), T, None).unwrap_err();
        assert!(matches!(e, TicketError::NeedsSeal { .. }), "{e}");
        let ticket = Ticket {
            channel: Some([1; 32]),
            ..ticket
        };
        assert!(checked(&ticket.payload(), T, Some(&[1; 32])).is_ok());
    }
}

#[test]
fn r87_a_ticket_has_one_reading() {
    for (from, to) in [
        (
            "\"user\":\"deploy\"",
            "\"user\":\"deploy\",\"user\":\"root\"",
        ),
        ("\"user\":\"deploy\"", "\"user\":\"deploy\",\"uid\":0"),
        ("\"user\":\"deploy\",", ""),
        ("\"cwd\":\"/srv\"", "\"cwd\":\"/srv\",\"cwd\":\"/\""),
        ("\"cwd\":\"/srv\"", "\"cwd\":\"/srv\",\"shell\":true"),
        ("\"cwd\":\"/srv\"", "\"cwd\":null"),
        ("\"detach\":true", "\"detach\":true,\"tty\":null"),
        ("\"size\":5", "\"size\":5,\"size\":6"),
        ("\"size\":5", "\"size\":-5"),
        ("\"size\":5", "\"size\":16777217"),
        ("{\"run\":", "{\"list\":{},\"run\":"),
        ("\"run\":", "\"Run\":"),
        ("\"nonce\":\"00", "\"nonce\":\""),
        ("\"nonce\":\"00", "\"nonce\":\"0g"),
        ("e0f\"}", "e0f\",\"channel\":null}"),
        ("e0f\"}", "e0f\",\"channel\":\"00\"}"),
        ("e0f\"}", "e0f\"} "),
        ("T22:02:00Z", "T22:10:01Z"),
        ("T22:02:00Z", "T22:00:00Z"),
        ("T22:02:00Z", "T21:00:00Z"),
        ("2027-11-21T22:00:00Z", "1969-11-21T22:00:00Z"),
        ("\"deploy\"", "\"\""),
        ("[\"/usr/bin/uptime\",\"-p\"]", "[]"),
        ("[\"/usr/bin/uptime\",\"-p\"]", "[\"\"]"),
        ("[\"/usr/bin/uptime\",\"-p\"]", "\"/usr/bin/uptime -p\""),
    ] {
        let text = GOOD.replacen(from, to, 1);
        assert_ne!(text, GOOD, "{from}");
        let is_spaced = text.ends_with(' ');
        assert_eq!(
            Ticket::parse(text.as_bytes()).is_err(),
            !is_spaced,
            "{text}"
        );
    }
    // A list of values in which no key says what one is.
    let listed = GOOD.replace(
        r#"{"sha256":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","size":5}"#,
        r#"["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",5]"#,
    );
    assert_ne!(listed, GOOD);
    assert!(Ticket::parse(listed.as_bytes()).is_err());
    assert!(Ticket::parse(br#"["web-1"]"#).is_err());
}

/// Each byte of an envelope.
#[test]
fn r83_a_changed_envelope_is_none() {
    let text = sign(GOOD.as_bytes());
    let vm_id = "web-1".parse().unwrap();
    let here = Here {
        vm_id: &vm_id,
        now_ms: T,
        channel: None,
    };
    for at in 0..text.len() {
        let mut changed = text.clone().into_bytes();
        changed[at] ^= 1;
        let proved = check(&changed, &trust("exec"), here);
        assert!(proved.is_err(), "{at}: {proved:?}");
    }
}

fn times(nonce: u8, not_before: i64, not_after: i64) -> Ticket {
    let at = |ms| Timestamp::from_millisecond(ms).unwrap();
    Ticket {
        nonce: [nonce; NONCE_LEN],
        not_before: at(not_before),
        not_after: at(not_after),
        ..good()
    }
}

#[test]
fn r120_a_ticket_is_spent_once() {
    let mut ledger = Ledger::default();
    let one = times(1, T, T + 1000);
    let change = ledger.spend(&one, T).unwrap();
    assert_eq!(change.spent.nonce, one.nonce);
    assert_eq!(ledger.spend(&one, T), Err(SpentError::Again));
    // With another time: the nonce counts.
    let other = times(1, T, T + 2000);
    assert_eq!(ledger.spend(&other, T), Err(SpentError::Again));
}

/// coproduct-opensource/nucleus#2375: one that is pushed out by others while it is valid could be used again.
#[test]
fn nucleus_a_full_ledger_refuses_and_forgets_none_that_is_valid() {
    let spent = |n: usize, not_after_ms| {
        let mut nonce = [0; NONCE_LEN];
        nonce[..8].copy_from_slice(&n.to_le_bytes());
        Spent {
            not_after_ms,
            not_before_ms: T,
            nonce,
        }
    };
    let all = (0..SPENT_MAX).map(|n| spent(n, T + 1000));
    let mut ledger = Ledger::new(Floor::default(), all);
    let before = ledger.clone();
    let next = times(0xff, T, T + 2000);
    assert_eq!(ledger.spend(&next, T + 1000), Err(SpentError::Full));
    assert_eq!(ledger, before);
    // Their time is over: all go, and what was forgotten stays forbidden.
    let change = ledger.spend(&next, T + 1001).unwrap();
    assert_eq!(change.forgotten.len(), SPENT_MAX);
    let floor = Floor {
        not_after_ms: T + 1000,
        not_before_ms: T,
    };
    assert_eq!(change.floor, Some(floor));
}

/// microsoft/agent-governance-toolkit#3782 and others: with the clock set back, what was forgotten would be new.
#[test]
fn a_clock_that_goes_back_makes_nothing_new() {
    let all = (0..300).map(|n: u16| {
        let mut nonce = [0; NONCE_LEN];
        nonce[..2].copy_from_slice(&n.to_le_bytes());
        Spent {
            not_after_ms: T + 1000,
            not_before_ms: T,
            nonce,
        }
    });
    let old = times(0, T, T + 1000);
    let mut ledger = Ledger::new(Floor::default(), all);
    assert_eq!(ledger.spend(&old, T), Err(SpentError::Again));
    ledger
        .spend(&times(0xee, T + 500_000, T + 600_000), T + 500_000)
        .unwrap();
    assert_eq!(ledger.spend(&old, T), Err(SpentError::Forgotten));
    // It is at least as late as the latest that was signed, but for what clocks may be apart.
    assert_eq!(ledger.now_ms(0), T + 440_000);
    assert_eq!(ledger.now_ms(T + 450_000), T + 450_000);
    let floor = Floor {
        not_after_ms: 0,
        not_before_ms: T + 9_000_000,
    };
    assert_eq!(Ledger::new(floor, []).now_ms(T), T + 8_940_000);
}

proptest! {
    /// Tickets come in any order, also again, while the clock goes anywhere: none is used twice.
    #[test]
    fn r120_no_ticket_is_used_twice_whatever_the_clock_does(
        steps in proptest::collection::vec((0..40_u8, 0..2_000_i64), 1..600),
        many in any::<bool>(),
    ) {
        // With many others before, so that it forgets.
        let others = (0..if many { 260_u16 } else { 0 }).map(|n| {
            let mut nonce = [9; NONCE_LEN];
            nonce[..2].copy_from_slice(&n.to_le_bytes());
            Spent { not_after_ms: T + i64::from(n), not_before_ms: T, nonce }
        });
        let mut ledger = Ledger::new(Floor::default(), others);
        let mut used = std::collections::BTreeSet::new();
        for (nonce, clock) in steps {
            let now = ledger.now_ms(T + clock);
            let begins = T + i64::from(nonce) * 10;
            let ticket = times(nonce, begins, begins + 300);
            if now > begins + 300 {
                continue;
            }
            let before = ledger.clone();
            match ledger.spend(&ticket, now) {
                Ok(_) => prop_assert!(used.insert(nonce), "{nonce} twice"),
                Err(_) => prop_assert_eq!(&before, &ledger),
            }
        }
    }
}
