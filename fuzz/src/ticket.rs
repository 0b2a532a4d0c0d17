//! Target `ticket`: bytes in place of a ticket's envelope, of a signed payload, of a sealed stream, or of what a guest keeps. What is
//! believed is in its limits, is the same when it is written again, says what a reader of plain JSON finds there, and is used once.
//!
//! Input: a byte that says which of them, and the rest.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use adit_exec::seal::{self, Asking, Sealed};
use adit_tasks::anchor::TrustStore;
use adit_tasks::dsse::{self, TICKET_MAX, Type};
use adit_tasks::key::PublicKey;
use adit_tasks::ticket::{
    self, Floor, Here, INPUT_MAX, Input, LIFE_MAX, Ledger, NONCE_LEN, Run, SPENT_MAX, Spent, Verb,
};
use adit_tasks::{Ticket, hex};
use ed25519_dalek::SigningKey;

static KEY: LazyLock<SigningKey> = LazyLock::new(|| SigningKey::from_bytes(&[7; 32]));

static TRUST: LazyLock<TrustStore> = LazyLock::new(|| {
    let mut trust = TrustStore::default();
    let line = format!("roles=exec {}", PublicKey::of(&KEY, ""));
    trust.add_text(&line).expect("an anchor");
    trust
});

pub fn run(data: &[u8]) {
    let Some((which, rest)) = data.split_first() else {
        return;
    };
    match which % 4 {
        0 => {
            // Only what was signed is believed: the seeds have such a ticket.
            if let Some(ticket) = believed(rest) {
                let text = dsse::sign_as(Type::Ticket, &ticket.payload(), &KEY);
                assert_eq!(believed(text.as_bytes()), Some(ticket));
            }
        }
        1 => signed(rest),
        2 => sealed(rest),
        _ => spent(rest),
    }
}

fn believed(envelope: &[u8]) -> Option<Ticket> {
    let open = dsse::Envelope::parse_as(Type::Ticket, envelope).ok();
    let said = open.and_then(|open| Ticket::parse(open.unverified_payload()).ok());
    let vm_id = "web-1".parse().expect("a name");
    let here = Here {
        vm_id: &vm_id,
        now_ms: said.as_ref().map_or(0, |t| t.not_before.as_millisecond()),
        channel: said.as_ref().and_then(|t| t.channel.as_ref()),
    };
    match ticket::check(envelope, &TRUST, here) {
        Ok(proved) => {
            assert!(envelope.len() <= TICKET_MAX);
            Some(proved.ticket)
        }
        Err(e) => {
            let said = format!("{e} {}", e.remedy());
            assert!(said.len() < 2000 && !said.contains(|c: char| c.is_control()));
            None
        }
    }
}

fn signed(payload: &[u8]) {
    let text = dsse::sign_as(Type::Ticket, payload, &KEY);
    let Some(ticket) = believed(text.as_bytes()) else {
        return;
    };
    let plain: serde_json::Value = serde_json::from_slice(payload).expect("JSON");
    let fields = plain.as_object().expect("an object");
    assert!(fields.len() == 6 || fields.len() == 7);
    assert_eq!(fields["vm_id"], "web-1");
    assert_eq!(fields["user"], ticket.user);
    assert_eq!(
        fields["nonce"].as_str().map(str::to_lowercase),
        Some(hex(&ticket.nonce))
    );
    assert!(
        fields["verb"]
            .as_object()
            .is_some_and(|verb| verb.len() == 1)
    );
    assert!(ticket.not_before.duration_until(ticket.not_after) <= LIFE_MAX);
    if ticket.channel.is_none() {
        assert_eq!(ticket.verb.unbound(), None);
    }
    if let Verb::Run(Run { argv, stdin, .. }) = &ticket.verb {
        assert_eq!(fields["verb"]["run"]["argv"], serde_json::json!(argv));
        if let Input::Bytes(content) = stdin {
            assert!(content.size <= INPUT_MAX);
        }
    }
    assert_eq!(Ticket::parse(&ticket.payload()).expect("a ticket"), ticket);
}

/// Bytes behind a handshake, or in place of it: nothing comes out that was not sealed.
fn sealed(bytes: &[u8]) {
    let (_, first) = Asking::new(&PublicKey::of(&KEY, "").exchange()).expect("a handshake");
    let own = KEY.to_scalar_bytes();
    assert!(seal::answer(&own, bytes).is_err() || bytes.len() == first.len());
    let (_, keys, _) = seal::answer(&own, &first).expect("an answer");
    let (mut stream, mut out) = (Sealed::new(keys), Vec::new());
    for piece in bytes.chunks(7) {
        stream.push(piece);
        if stream.open(&mut out).is_err() {
            break;
        }
    }
    assert!(out.is_empty() && stream.finish().is_err());
}

/// Tickets in any order, with a clock that goes anywhere.
fn spent(bytes: &[u8]) {
    const T: i64 = 1_826_834_400_000;
    let before = (0..usize::from(bytes.first().copied().unwrap_or(0)) * 20).map(|n| {
        let mut nonce = [0xff; NONCE_LEN];
        nonce[..8].copy_from_slice(&n.to_le_bytes());
        let not_after_ms = T + (n % 500) as i64;
        Spent {
            not_after_ms,
            not_before_ms: T,
            nonce,
        }
    });
    let mut ledger = Ledger::new(Floor::default(), before.take(SPENT_MAX));
    let mut used = BTreeSet::new();
    for step in bytes.chunks_exact(4) {
        let [nonce, begins, lasts, clock] = [0, 1, 2, 3].map(|nth| step[nth]);
        let begins = T + i64::from(begins) * 1000;
        let at = |ms| jiff::Timestamp::from_millisecond(ms).expect("a time");
        let ticket = Ticket {
            vm_id: "web-1".parse().expect("a name"),
            user: String::new(),
            verb: Verb::List(ticket::List {}),
            not_before: at(begins),
            not_after: at(begins + 1 + i64::from(lasts) * 1000),
            nonce: [nonce; NONCE_LEN],
            channel: None,
        };
        let now = ledger.now_ms(T + i64::from(clock) * 2000);
        if now > ticket.not_after.as_millisecond() {
            continue;
        }
        let kept = ledger.clone();
        match ledger.spend(&ticket, now) {
            Ok(_) => assert!(used.insert(ticket.payload())),
            Err(_) => assert_eq!(kept, ledger),
        }
    }
}
