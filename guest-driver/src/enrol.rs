//! Enrolment: who this guest is. Its image says so (`vm_id` of the configuration), or a card does, or both, and then they agree.
//!
//! ```text
//! places, in this order (places) ─► a card's text ─► check: trusted? its own? in time? not older? ─► believed, or a fault
//! ```
//! All places are read at each start. Of the cards that are believed the one of the highest generation counts, and of two of the
//! same generation the one whose place comes first. Two that name different VMs cancel each other: which one is meant is not
//! known here. A place in which there are two is not used at all. Whatever is not used is a [`Fault`], one line with its remedy:
//! in the log, in `adit-guest status`, and in `adit vm show` on the host.
//!
//! A card that was believed is checked again whenever it is used: its time may be over, or its signer not trusted any more.
//!
//! Trust documents are looked for in the same places, and taken (`documents`) before and after the card is
//! found: one may bring the key that has signed the card, and one may be signed by a key that the card brings.

pub mod anew;
pub mod kept;
pub mod key;
pub mod places;
pub mod seal;

use std::{fmt, fs, io};

use adit_names::VmId;
use adit_tasks::TrustStore;
use adit_tasks::card::{self, CardError, CarriedError, Here, Proved};
use adit_tasks::dsse::Type;
use adit_tasks::wire;

use self::kept::Kept;
use self::key::GuestKey;
use self::places::{Place, Places, System};
use crate::config::Config;
use crate::trust::Anchors;
use crate::{clock, documents, log, owned};

/// Why something that was found is not used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Stable word.
    pub code: &'static str,
    /// Where it was found.
    pub place: &'static str,
    /// What is wrong.
    pub why: String,
    /// What to do.
    pub remedy: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            code,
            place,
            why,
            remedy,
        } = self;
        match *place {
            "" => write!(f, "{code}: {why}; {remedy}"),
            place => write!(f, "{code}: {why} ({place}); {remedy}"),
        }
    }
}

/// A card that was found, and believed at the start.
#[derive(Clone, Debug)]
pub struct Found {
    /// Where.
    pub place: Place,
    /// Its envelope.
    pub envelope: Vec<u8>,
    /// Whose it is.
    pub vm_id: VmId,
    /// Which.
    pub generation: u64,
}

/// What was found at the start, or at SIGHUP.
#[derive(Clone, Debug, Default)]
pub struct Enrolment {
    /// The card that counts.
    pub card: Option<Found>,
    /// What is not used, and why.
    pub faults: Vec<Fault>,
    /// The guest's own key.
    pub key: Option<GuestKey>,
    /// What is to be on disk of it; none: nothing can be kept.
    pub kept: Option<Kept>,
}

/// What is known before any card is read.
struct Before {
    trust: TrustStore,
    kept: Option<Kept>,
    key: Option<GuestKey>,
    faults: Vec<Fault>,
    /// Nobody else can have put anything into the state directory.
    is_ours: bool,
}

impl Before {
    /// `make`: the key, if there is none.
    fn read(config: &Config, make: bool) -> Self {
        let mut faults = Vec::new();
        let mut fault = |code, e: &io::Error, remedy: &str| {
            faults.push(of_state_dir(config, code, e, remedy));
        };
        let anchors = Anchors::read(config);
        if let Some(e) = anchors.documents_error() {
            let remedy = "remove it, and apply the newest trust documents again: until then every task is refused";
            fault("trust-unreadable", &io::Error::other(e.to_string()), remedy);
        }
        let trust = anchors.keys;
        let meta = fs::metadata(&config.state_dir);
        if let Some(Err(e)) = meta.ok().map(|meta| owned::check(&meta)) {
            let remedy =
                "let nobody else write it: until then there is no key, and every task is refused";
            fault("state-dir-writable", &io::Error::other(e), remedy);
            return Self {
                trust,
                kept: None,
                key: None,
                faults,
                is_ours: false,
            };
        }
        let kept = kept::read(&config.state_dir).unwrap_or_else(|e| {
            let remedy = "a card of any generation is believed; remove enrolment.json and enrolment.copy.json there";
            fault("enrolment-unreadable", &e, remedy);
            None
        });
        let key = match GuestKey::read(&config.state_dir) {
            Ok(None) if make => GuestKey::make(&config.state_dir).map(Some),
            key => key,
        };
        let key = key.unwrap_or_else(|e| {
            let remedy = "make it writable, and remove guest.key there if it is damaged";
            fault("no-guest-key", &e, remedy);
            None
        });
        Self {
            trust,
            kept,
            key,
            faults,
            is_ours: true,
        }
    }

    fn find(self, config: &Config) -> (Enrolment, Option<Kept>) {
        let known = Known {
            vm_id: config.vm_id.as_ref(),
            trust: &self.trust,
            key: self.key.as_ref(),
            kept: self.kept.as_ref(),
            now_ms: clock::unix_ms(),
        };
        let card = &config.card;
        let mut found = find(&System { card }, known);
        found.faults.splice(0..0, self.faults);
        found.key = self.key;
        found.kept.clone_from(&self.kept);
        (found, self.kept)
    }
}

fn of_state_dir(config: &Config, code: &'static str, e: &io::Error, remedy: &str) -> Fault {
    Fault {
        code,
        place: "state_dir",
        why: format!("{}: {e}", config.state_dir.display()),
        remedy: remedy.into(),
    }
}

/// Finds out who this guest is, and changes nothing: for `adit-guest status`.
pub fn look(config: &Config) -> Enrolment {
    Before::read(config, false).find(config).0
}

/// Finds out who this guest is when the agent starts, or is to look again: makes its key, takes trust documents, keeps the card's
/// generation, and logs what is not used. A guest that was another one, or on another machine, is a copy of that one's disk: it
/// gets a key of its own. The journal stays: what is in it names its VM, and without it goals could run again.
pub fn at_start(config: &Config) -> Enrolment {
    // Of these faults those that stay are found again below.
    let _ = take_documents(config, &Enrolment::default());
    let before = Before::read(config, true);
    let is_ours = before.is_ours;
    let (mut found, before) = before.find(config);
    if is_ours {
        let faults = take_documents(config, &found);
        found.faults.extend(faults);
        if let Err(fault) = found.keep(config, before.as_ref(), kept::machine()) {
            found.faults.push(fault);
        }
    }
    for fault in &found.faults {
        let Fault {
            code,
            place,
            why,
            remedy,
        } = fault;
        log::event(code, &[("place", place), ("why", why), ("do", remedy)]);
    }
    if let Some(card) = &found.card {
        let fields: [(&str, &dyn fmt::Display); 3] = [
            ("vm", &card.vm_id),
            ("generation", &card.generation),
            ("place", &card.place.name()),
        ];
        log::event("card", &fields);
    }
    found
}

/// Takes the trust documents that are in the places. Returns what is not taken.
fn take_documents(config: &Config, found: &Enrolment) -> Vec<Fault> {
    let (card, mut faults) = (&config.card, Vec::new());
    for place in Place::ALL {
        let taken = match (System { card }).look(Type::Trust, place) {
            Ok(None) => continue,
            Ok(Some(envelope)) => documents::take_again(config, found, &envelope),
            Err(e) => Err(unusable("trust", place, &e)),
        };
        faults.extend(taken.err().map(|fault| Fault {
            place: place.name(),
            ..fault
        }));
    }
    faults
}

/// What a card is compared with.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// The `vm_id` of the configuration.
    pub vm_id: Option<&'a VmId>,
    /// Keys of the image.
    pub trust: &'a TrustStore,
    /// The guest's own key.
    pub key: Option<&'a GuestKey>,
    /// What was believed before.
    pub kept: Option<&'a Kept>,
    /// Unix ms.
    pub now_ms: i64,
}

/// Reads all places and decides which card counts.
pub fn find(places: &dyn Places, known: Known<'_>) -> Enrolment {
    let mut found: Vec<Found> = Vec::new();
    let mut faults = Vec::new();
    for place in Place::ALL {
        let envelope = match places.look(Type::Card, place) {
            Ok(None) => continue,
            Ok(Some(envelope)) => envelope,
            Err(e) => {
                faults.push(unusable("card", place, &e));
                continue;
            }
        };
        match believe(&envelope, known) {
            Ok(Proved { card, .. }) => found.push(Found {
                place,
                envelope,
                vm_id: card.vm_id,
                generation: card.generation,
            }),
            Err(fault) => faults.push(Fault {
                place: place.name(),
                ..fault
            }),
        }
    }
    if let Some(fault) = contradiction(&found) {
        faults.push(fault);
        found.clear();
    }
    // The first of the highest: `max_by_key` would return the last.
    found.reverse();
    Enrolment {
        card: found.into_iter().max_by_key(|f| f.generation),
        faults,
        key: None,
        kept: None,
    }
}

/// Checks a card against all that is known here.
fn believe(envelope: &[u8], known: Known<'_>) -> Result<Proved, Fault> {
    let fault = |e: &CardError| Fault {
        code: e.code(),
        place: "",
        why: e.to_string(),
        remedy: e.remedy(),
    };
    let here = Here {
        vm_id: known.vm_id,
        now_ms: known.now_ms,
    };
    let proved = card::check(envelope, known.trust, here).map_err(|e| fault(&e))?;
    let seen = known
        .kept
        .and_then(|k| k.generations.get(&proved.card.vm_id));
    let proved = proved
        .not_before(seen.copied().unwrap_or(0))
        .map_err(|e| fault(&e))?;
    let Some(pinned) = &proved.card.guest_pk else {
        return Ok(proved);
    };
    let own = known.key.map(GuestKey::public);
    if own.is_some_and(|own| own.id() == pinned.id()) {
        return Ok(proved);
    }
    let (has, or_with) = match own {
        Some(own) => {
            let key = own.clone().without_comment();
            (own.id().to_string(), format!(", or with \"{key}\""))
        }
        // A copy, for instance, that could not make one.
        None => ("none".into(), ", or make state_dir writable".into()),
    };
    Err(Fault {
        code: "card-other-key",
        place: "",
        why: format!(
            "the card is for the guest with the key {}, and this one has {has}",
            pinned.id()
        ),
        remedy: format!("sign one without --guest-pk{or_with}"),
    })
}

/// `what`: `card` or `trust`.
fn unusable(what: &str, place: Place, e: &PlaceError) -> Fault {
    let ([card, trust], remedy) = match e {
        PlaceError::Carried(CarriedError::Doubled { .. }) => {
            (["card-doubled", "trust-doubled"], "leave one of them")
        }
        PlaceError::Carried(_) => (
            ["card-damaged", "trust-damaged"],
            "put it there again, whole",
        ),
        PlaceError::Read(_) => (
            ["card-unreadable", "trust-unreadable"],
            "see the cause, and reload the agent",
        ),
    };
    Fault {
        code: if what == "card" { card } else { trust },
        place: place.name(),
        why: e.to_string(),
        remedy: remedy.into(),
    }
}

/// Cards that are all believed, and do not name one VM.
fn contradiction(found: &[Found]) -> Option<Fault> {
    let (one, rest) = found.split_first()?;
    let other = rest.iter().find(|f| f.vm_id != one.vm_id)?;
    Some(Fault {
        code: "card-doubled",
        place: other.place.name(),
        why: format!(
            "this card is for {}, and the one in {} for {}: neither is used",
            other.vm_id,
            one.place.name(),
            one.vm_id
        ),
        remedy: "leave the one that is meant".into(),
    })
}

/// Why a place could not be used.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// It is there, and cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
    /// What is in it is no card.
    #[error(transparent)]
    Carried(#[from] CarriedError),
}

impl Enrolment {
    /// Keeps what the next start is compared with.
    fn keep(
        &mut self,
        config: &Config,
        before: Option<&Kept>,
        machine: Option<String>,
    ) -> Result<(), Fault> {
        let by_card = self.card.as_ref();
        let Some(vm_id) = config.vm_id.as_ref().or(by_card.map(|c| &c.vm_id)) else {
            return Ok(());
        };
        let generation = by_card.map_or(0, |c| c.generation);
        let (kept, anew) = Kept::next(before, vm_id, generation, machine);
        if let Some(why) = anew {
            self.begin_anew(config, &why)?;
        }
        match before == Some(&kept) {
            true => Ok(()),
            false => self.write(config, kept),
        }
    }

    /// What is to be said of the card at this moment; none: there is none that was believed at the start.
    pub fn card_now(
        &self,
        config: &Config,
        trust: &TrustStore,
        now_ms: i64,
    ) -> Option<Result<Proved, Fault>> {
        let found = self.card.as_ref()?;
        let known = Known {
            vm_id: config.vm_id.as_ref(),
            trust,
            key: self.key.as_ref(),
            kept: None,
            now_ms,
        };
        let place = found.place.name();
        Some(believe(&found.envelope, known).map_err(|fault| Fault { place, ..fault }))
    }

    /// What the host is told. It is shown there, and a card is checked there again.
    pub fn told(&self, card: Option<&Result<Proved, Fault>>) -> wire::Enrolment {
        let lapsed = card.and_then(|card| card.as_ref().err());
        let faults = self.faults.iter().chain(lapsed);
        let believed = card.is_some_and(Result::is_ok);
        wire::Enrolment {
            card: match &self.card {
                Some(found) if believed => found.envelope.clone(),
                _ => Vec::new(),
            },
            place: self.card.as_ref().map_or("", |c| c.place.name()).into(),
            guest_pk: self.key.as_ref().map(|key| key.public().to_bytes()),
            faults: faults
                .take(wire::FAULTS_MAX)
                .map(|fault| fault.to_string())
                .collect(),
        }
    }
}

/// Who this guest is, by its configuration or else by its card.
///
/// # Errors
/// Nothing says so that is believed; begins with a stable code.
pub fn me(config: &Config, card: Option<&Result<Proved, Fault>>) -> Result<VmId, String> {
    match (&config.vm_id, card) {
        (Some(id), _) => Ok(id.clone()),
        (None, Some(Ok(proved))) => Ok(proved.card.vm_id.clone()),
        (None, Some(Err(fault))) => Err(format!("not-enrolled: {fault}")),
        (None, None) => Err(
            "not-enrolled: this image has no vm_id, and no card that it believes; `adit-guest status` in the guest says why"
                .into(),
        ),
    }
}

#[cfg(test)]
mod tests;
