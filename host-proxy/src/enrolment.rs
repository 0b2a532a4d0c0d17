//! What a guest says of its enrolment, and what of that this host believes. A card is believed if a key of `[trust]` has signed it
//! for the VM whose channel it came over, its time is not over, and it is not older than one that was believed before, which
//! the database knows. A guest's key is never proved by the guest's word: the card pins it, or else it is what the guest said
//! first, and shown as unproved.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_tasks::card::{self, CardError, Here, Proved};
use adit_tasks::dsse::{CARD_MAX, Envelope, Type};
use adit_tasks::key::PublicKey;
use adit_tasks::{Card, wire};

use crate::desk::DeskError;
use crate::state::State;
use crate::vm::VmEntry;

/// Characters of what a guest says of a place, and of a fault.
const SAID_MAX: usize = 300;

/// What a guest said, and what is believed of it.
#[derive(Clone, Debug, Default)]
pub struct Enrolment {
    /// None: the guest has no card that it goes by.
    pub card: Option<Result<Believed, Unproved>>,
    /// Where the guest says that it found it.
    pub place: String,
    /// The guest's own key.
    pub key: Option<Key>,
    /// What the guest does not use, in its words.
    pub faults: Vec<String>,
}

/// A card that is believed.
#[derive(Clone, Debug)]
pub struct Believed {
    /// What it says.
    pub card: Card,
    /// Who signed it.
    pub signer: String,
    /// When its time is over, by a clock that nobody sets.
    until: Option<Instant>,
}

impl Believed {
    /// Its labels, while its time is not over.
    pub fn labels(&self) -> Option<&BTreeMap<String, String>> {
        let is_over = self.until.is_some_and(|until| Instant::now() >= until);
        (!is_over).then(|| self.card.labels.as_map())
    }

    /// When its time is over.
    pub fn until(&self) -> Option<Instant> {
        self.until
    }
}

/// Why a card is not believed.
#[derive(Clone, Debug)]
pub struct Unproved {
    /// What is wrong, and what to do.
    pub why: String,
    /// This host is to believe cards: then one that it does not believe is a fault.
    pub is_fault: bool,
}

/// A guest's own key.
#[derive(Clone, Debug)]
pub struct Key {
    /// As the guest says.
    pub public: PublicKey,
    /// Why this may be anybody's; none: the card that is believed names it.
    pub unproved: Option<String>,
}

/// Hears what a guest says.
///
/// # Errors
/// The database fails.
pub async fn hear(
    state: &State,
    vm: &Arc<VmEntry>,
    mut said: wire::Enrolment,
) -> Result<(), DeskError> {
    let mut last = vm.agent.enrolled_last.lock().await;
    // One that is longer is no card, and is kept as such.
    said.card.truncate(CARD_MAX + 1);
    said.faults.truncate(wire::FAULTS_MAX);
    for text in said.faults.iter_mut().chain([&mut said.place]) {
        *text = text.chars().take(SAID_MAX).collect();
    }
    let enrolment = judged(state, vm, last.insert(said)).await?;
    vm.agent.enrolled(enrolment);
    // Its labels may be others now.
    state.access_changed.notify_one();
    Ok(())
}

/// Judges again what the guest has said last: others are believed now. Where the database fails nobody is.
pub async fn judge_again(state: &State, vm: &Arc<VmEntry>) {
    let last = vm.agent.enrolled_last.lock().await;
    let Some(said) = last.as_ref() else { return };
    let enrolment = judged(state, vm, said).await.unwrap_or_else(|e| {
        let why = format!("it could not be judged again: {e}");
        let is_fault = true;
        Enrolment {
            card: Some(Err(Unproved { why, is_fault })),
            ..Enrolment::default()
        }
    });
    vm.agent.enrolled_again(enrolment);
}

/// Judges what a guest has said, and keeps what the next card is compared with.
async fn judged(
    state: &State,
    vm: &Arc<VmEntry>,
    said: &wire::Enrolment,
) -> Result<Enrolment, DeskError> {
    let cut = |text: &str| adit_names::escape(text).at_most(SAID_MAX).to_string();
    let now_ms = state.now_ms();
    let checked = (!said.card.is_empty()).then(|| {
        let here = Here {
            vm_id: Some(&vm.name),
            now_ms,
        };
        card::check(&said.card, &state.trust(), here)
    });
    let generation = match &checked {
        Some(Ok(proved)) => proved.card.generation,
        _ => 0,
    };
    let public = said.guest_pk.and_then(|b| PublicKey::from_bytes(&b).ok());
    let bytes = public.as_ref().map(PublicKey::to_bytes);
    let known = state.desk.enrol(&vm.name, generation, bytes).await?;
    let current = |checked: Result<Proved, CardError>| checked?.not_before(known.generation);
    let card = checked.map(|checked| match current(checked) {
        Ok(Proved { card, key }) => {
            let left = card.not_after.as_millisecond().saturating_sub(now_ms);
            let left = Duration::from_millis(u64::try_from(left).unwrap_or(0));
            Ok(Believed {
                card,
                signer: key.to_string(),
                until: Instant::now().checked_add(left),
            })
        }
        Err(e) => Err(unproved(state, &said.card, &e)),
    });
    let pinned = match &card {
        Some(Ok(believed)) => believed.card.guest_pk.as_ref(),
        _ => None,
    };
    Ok(Enrolment {
        key: public.map(|public| Key {
            unproved: doubt(&public, pinned, known.guest_pk),
            public,
        }),
        card,
        place: cut(&said.place),
        faults: said.faults.iter().map(|fault| cut(fault)).collect(),
    })
}

/// Why a guest's key may be anybody's. `first`: the one that was said first.
fn doubt(key: &PublicKey, pinned: Option<&PublicKey>, first: Option<[u8; 32]>) -> Option<String> {
    match (pinned, first) {
        (Some(pinned), _) if pinned.id() == key.id() => None,
        (Some(pinned), _) => Some(format!("the card names {} instead", pinned.id())),
        (None, Some(first)) if first != key.to_bytes() => {
            let first = PublicKey::from_bytes(&first).map(|k| k.id().to_string());
            let first = first.unwrap_or_default();
            Some(format!(
                "this VM had the key {first} before: it is a new guest, or a clone"
            ))
        }
        (None, _) => Some("no card names it: learnt from the guest".into()),
    }
}

fn unproved(state: &State, envelope: &[u8], e: &CardError) -> Unproved {
    if state.trust().is_empty() {
        return Unproved {
            why: "aditd.toml has no key in [trust] to check it with".into(),
            is_fault: false,
        };
    }
    // Who claims to have signed it helps to find the mistake.
    let signer = Envelope::parse_as(Type::Card, envelope).ok();
    let signer = signer.and_then(|open| open.unverified_signer());
    let remedy = match e {
        CardError::Wider { brings, .. } => format!(
            "give its signer in [trust] of aditd.toml these roles as well: \"roles=card,{brings} adit-ed25519 …\", as it has in \
             the guest; or leave the anchor out"
        ),
        CardError::Verify(_) => {
            "add its signer's public key, with the role card, to `card` in [trust] of aditd.toml"
                .into()
        }
        e => e.remedy(),
    };
    let why = match signer {
        Some(id) => format!("{e} (signer {id}); {remedy}"),
        None => format!("{e}; {remedy}"),
    };
    Unproved {
        why,
        is_fault: true,
    }
}
