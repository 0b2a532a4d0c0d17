//! The agent in a VM: its streams, and what it says of itself, which is shown and never trusted.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use adit_names::VmId;
use adit_tasks::KeyId;
use adit_tasks::trust::DOCUMENTS_MAX;
use adit_tasks::wire::{self, Facts, Held, Program, Stood, TrustHeld};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::Changes;
use crate::enrolment::{Believed, Enrolment};
use crate::fault::{Fault, FaultKind, Logged};

/// Streams to the tasks service that one guest may hold open: its agent's, and a few that replace each other.
pub const AGENT_STREAMS_MAX: usize = 4;
/// Streams from unprivileged ports of one guest that may wait for their refusal.
pub const OTHER_STREAMS_MAX: usize = 2;

/// Streams of one guest that may wait until it is known whose they are, where the guest's port does not tell.
pub const UNKNOWN_STREAMS_MAX: usize = 32;

/// Enrolments of one guest that are judged in four seconds: each costs a check of a signature. Those that come faster
/// wait, and so does whoever sends them.
pub const ENROLMENTS_MAX: u32 = 16;
const ENROLMENTS_PERIOD: Duration = Duration::from_secs(4);

/// What its configuration says of its VMM is wrong.
const HALF_CLOSES_LOST: &str = "the VMM does not pass half-closes on, though `half_closes = true` says so: answers behind the end of a client's \
     sending are lost; take that out of the VM's carrier, and restart its port process (`adit vm reload`)";

/// A VM's agent.
#[derive(Debug)]
pub struct Agent {
    /// [`AGENT_STREAMS_MAX`].
    pub streams: Arc<Semaphore>,
    /// [`OTHER_STREAMS_MAX`].
    pub other_streams: Arc<Semaphore>,
    /// `UNKNOWN_STREAMS_MAX`.
    pub unknown_streams: Arc<Semaphore>,
    vm: VmId,
    /// What it has said of its enrolment last; whoever judges it has it.
    pub enrolled_last: tokio::sync::Mutex<Option<wire::Enrolment>>,
    /// Since when, and how many.
    enrolments: Mutex<(Option<Instant>, u32)>,
    said: Mutex<Said>,
    logged: Logged,
    changes: Changes,
}

/// What it said, and when.
#[derive(Clone, Debug, Default)]
pub(super) struct Said {
    /// Also of a connection before: what was known of it last is shown.
    pub(super) facts: Option<Facts>,
    /// The facts were said on this connection.
    has_facts: bool,
    /// Whether it knows chunks, which carry the ends of streams where a VMM does not; none: it has not said.
    pub(super) chunks: Option<bool>,
    /// Whether its VMM passes half-closes on, as was tried; none: it was not.
    pub(super) half_closes: Option<bool>,
    /// How far its clock is ahead, ms.
    pub(super) clock_ahead_ms: Option<i64>,
    /// That its time stood still, and when it said so.
    pub(super) stood: Option<(Stood, i64)>,
    pub(super) held: Option<Held>,
    pub(super) enrolment: Enrolment,
    /// The id that this host has given it; none: its agent is of the version before.
    pub(super) id: Option<String>,
    /// Whose copy its disk is, and the boot in which that was seen.
    copy_of: Option<(String, Option<[u8; 16]>)>,
    /// What it has taken of trust documents; none: its agent is of the version before.
    pub(super) trust: Option<TrustOf>,
    /// The enrolment was said on this connection.
    is_fresh: bool,
    /// Said before the facts, as the enrolment is.
    said_program: Option<Program>,
    pub(super) program: Option<Program>,
    pub(super) seen: Option<Instant>,
    connected: Option<CancellationToken>,
}

/// What a guest has taken of trust documents, and what not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustOf {
    /// What it says that it has.
    pub held: TrustHeld,
    /// Signer and sequence of each that it did not take, and why.
    pub refused: Vec<([u8; 16], u64, String)>,
}

impl Said {
    pub(super) fn is_connected(&self) -> bool {
        self.connected.as_ref().is_some_and(|t| !t.is_cancelled())
    }

    /// Whether it is connected and has said who it is.
    pub(super) fn is_known(&self) -> bool {
        self.has_facts && self.is_connected()
    }
}

impl Agent {
    pub(super) fn new(vm: &VmId, changes: Changes) -> Self {
        Self {
            streams: Arc::new(Semaphore::new(AGENT_STREAMS_MAX)),
            other_streams: Arc::new(Semaphore::new(OTHER_STREAMS_MAX)),
            unknown_streams: Arc::new(Semaphore::new(UNKNOWN_STREAMS_MAX)),
            vm: vm.clone(),
            enrolled_last: tokio::sync::Mutex::default(),
            enrolments: Mutex::default(),
            said: Mutex::default(),
            logged: Logged::default(),
            changes,
        }
    }

    /// How many streams the guest has open that it has dialled.
    pub fn dialled(&self) -> usize {
        let all = [
            (AGENT_STREAMS_MAX, &self.streams),
            (OTHER_STREAMS_MAX, &self.other_streams),
            (UNKNOWN_STREAMS_MAX, &self.unknown_streams),
        ];
        let taken =
            |(max, of): (usize, &Arc<Semaphore>)| max.saturating_sub(of.available_permits());
        all.into_iter().map(taken).sum()
    }

    /// A connection begins: the older one is told to end. Returns also whether there was one that had not ended.
    pub fn connected(&self) -> (CancellationToken, bool) {
        let token = CancellationToken::new();
        let mut said = self.lock();
        (said.is_fresh, said.has_facts) = (false, false);
        (said.id, said.trust, said.half_closes) = (None, None, None);
        said.said_program = None;
        let older = said.connected.replace(token.clone());
        drop(said);
        let has_older = older.as_ref().is_some_and(|older| !older.is_cancelled());
        if let Some(older) = older {
            older.cancel();
        }
        (token, has_older)
    }

    /// Whether it knows chunks.
    pub fn knows_chunks(&self, knows: bool) {
        self.lock().chunks = Some(knows);
    }

    /// Whether its VMM passes half-closes on was tried.
    pub fn half_closes_tried(&self, kept: bool) {
        self.lock().half_closes = Some(kept);
        self.logged.update(self.vm.as_str(), self.faults());
        self.changes.note();
    }

    /// A connection has ended.
    pub fn gone(&self, token: &CancellationToken) {
        token.cancel();
        self.changes.note();
    }

    /// It has spoken.
    pub fn seen(&self, facts: Option<Facts>) {
        let mut said = self.lock();
        said.seen = Some(Instant::now());
        let is_new = facts.is_some();
        if is_new {
            let boot = facts.as_ref().map(|facts| facts.boot_nonce);
            match &mut said.copy_of {
                // Seen on this connection, before it said which boot it is.
                Some((_, seen @ None)) => *seen = boot,
                Some((_, seen)) if *seen != boot => said.copy_of = None,
                _ => {}
            }
            (said.facts, said.has_facts) = (facts, true);
            // An agent of the version before says nothing of it.
            if !said.is_fresh {
                said.enrolment = Enrolment::default();
            }
            said.program = said.said_program.clone();
        }
        drop(said);
        if is_new {
            self.logged.update(self.vm.as_str(), self.faults());
        }
        self.changes.note();
    }

    /// It has said who it is by its card, and that was judged.
    pub fn enrolled(&self, enrolment: Enrolment) {
        let mut said = self.lock();
        (said.enrolment, said.is_fresh) = (enrolment, true);
        drop(said);
        self.logged.update(self.vm.as_str(), self.faults());
        self.changes.note();
    }

    /// What it has said of who it is was judged again.
    pub fn enrolled_again(&self, enrolment: Enrolment) {
        let mut said = self.lock();
        // Unless that was forgotten, for an agent of the version before came after it.
        if said.enrolment.card.is_some() {
            said.enrolment = enrolment;
        }
        drop(said);
        self.logged.update(self.vm.as_str(), self.faults());
        self.changes.note();
    }

    /// It has said which program it is. Shown with the facts, which follow.
    pub fn runs(&self, program: Program) {
        self.lock().said_program = Some(program);
    }

    /// It was ordered to be another program: what was wrong with the last one is over.
    pub fn ordered(&self) {
        let mut said = self.lock();
        if let Some(program) = &mut said.program {
            program.taken_back = None;
            program.faults.clear();
        }
        drop(said);
        self.logged.update(self.vm.as_str(), self.faults());
        self.changes.note();
    }

    /// Calls `look` with the labels of the card that is believed, while its time is not over.
    pub fn with_labels<T>(&self, look: impl FnOnce(Option<&BTreeMap<String, String>>) -> T) -> T {
        let said = self.said();
        let believed = said
            .enrolment
            .card
            .as_ref()
            .and_then(|card| card.as_ref().ok());
        look(believed.and_then(Believed::labels))
    }

    /// Generation of the card that is believed, while its time is not over.
    pub fn generation(&self) -> Option<u64> {
        let said = self.lock();
        let believed = said.enrolment.card.as_ref()?.as_ref().ok()?;
        believed.labels().map(|_| believed.card.generation)
    }

    /// Waits until another enrolment may be judged.
    pub async fn enrolment_turn(&self) {
        let wait = {
            let mut enrolments = self
                .enrolments
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let left = enrolments.0.map_or(Duration::ZERO, |since| {
                ENROLMENTS_PERIOD.saturating_sub(now.saturating_duration_since(since))
            });
            if left.is_zero() {
                *enrolments = (Some(now), 0);
            }
            enrolments.1 = enrolments.1.saturating_add(1);
            if enrolments.1 > ENROLMENTS_MAX {
                left
            } else {
                Duration::ZERO
            }
        };
        tokio::time::sleep(wait).await;
    }

    /// It was told which id it has. `copy_of`: whose copy its disk is; empty: nobody's.
    pub fn identified(&self, id: String, copy_of: &str) {
        let mut said = self.lock();
        said.id = Some(id);
        if !copy_of.is_empty() {
            said.copy_of = Some((copy_of.to_owned(), None));
        }
        drop(said);
        self.logged.update(self.vm.as_str(), self.faults());
        self.changes.note();
    }

    /// It has said what it has taken of trust documents.
    pub fn trusts(&self, mut trust: TrustOf) {
        trust.held.documents.truncate(DOCUMENTS_MAX);
        trust.held.refused.clear();
        self.lock().trust = Some(trust);
        self.logged.update(self.vm.as_str(), self.faults());
        self.changes.note();
    }

    /// It has said what its clock shows.
    pub fn clock(&self, guest_ms: u64, now_ms: i64) {
        let guest_ms = i64::try_from(guest_ms).unwrap_or(i64::MAX);
        self.lock().clock_ahead_ms = Some(guest_ms.saturating_sub(now_ms));
        // Meanwhile the time of its card may be over.
        self.logged.update(self.vm.as_str(), self.faults());
        self.changes.note();
    }

    /// It has said that its time stood still.
    pub fn stood(&self, stood: Stood, now_ms: i64) {
        self.lock().stood = Some((stood, now_ms));
        self.changes.note();
    }

    /// It holds a task that is not yet valid by its clock, or goes on.
    pub fn holds(&self, held: Option<Held>) {
        let before = std::mem::replace(&mut self.lock().held, held);
        if before != held {
            self.changes.note();
        }
    }

    /// Whether it is connected and has said who it is.
    pub(super) fn is_known(&self) -> bool {
        self.lock().is_known()
    }

    /// The id that the guest's image is enrolled with, if it is another VM's.
    pub(super) fn enrolled_as(&self) -> Option<String> {
        let id = self.lock().facts.as_ref().map(|f| f.vm_id.clone());
        id.filter(|id| id != self.vm.as_str() && !id.is_empty())
    }

    pub(super) fn faults(&self) -> Vec<Fault> {
        let said = self.said();
        let mut faults: Vec<_> = self.enrolment_fault(&said).into_iter().collect();
        if let Some((of, _)) = &said.copy_of {
            let text = format!(
                "the guest's disk is a copy of that of {of}: it has enrolled anew, with a key of its own; seal images before they \
                 are copied (`adit-guest seal`)"
            );
            faults.push(Fault::new(FaultKind::Clone, &text));
        }
        let of = |kind: FaultKind| {
            let texts = said
                .enrolment
                .faults
                .iter()
                .filter(move |t| kind_of(t) == kind);
            texts.cloned().collect::<Vec<_>>()
        };
        let mut texts = of(FaultKind::Card);
        match &said.enrolment.card {
            Some(Err(unproved)) if unproved.is_fault => texts.push(format!(
                "this host does not believe its card: {}",
                unproved.why
            )),
            Some(Ok(believed)) if believed.labels().is_none() => texts.push(format!(
                "this host does not believe its card any more: its time was over at {}; sign a new one with `adit card new`",
                believed.card.not_after
            )),
            _ => {}
        }
        if !texts.is_empty() {
            faults.push(Fault::new(FaultKind::Card, &texts.join("; ")));
        }
        let mut trust = of(FaultKind::Trust);
        let refused = said.trust.iter().flat_map(|trust| &trust.refused);
        trust.extend(refused.map(|(signer, n, why)| {
            let signer = KeyId(*signer);
            format!("the guest does not take the trust document {n} of {signer}: {why}")
        }));
        let program = said.program.map(|program| program.faults);
        let lost = said.half_closes == Some(false);
        let lost = lost.then(|| HALF_CLOSES_LOST.to_owned());
        let more = [
            (FaultKind::Carrier, lost.into_iter().collect()),
            (FaultKind::Trust, trust),
            (FaultKind::Agent, program.unwrap_or_default()),
            (FaultKind::Policy, of(FaultKind::Policy)),
            (FaultKind::Journal, of(FaultKind::Journal)),
        ];
        for (kind, texts) in more {
            if !texts.is_empty() {
                faults.push(Fault::new(kind, &texts.join("; ")));
            }
        }
        faults
    }

    fn enrolment_fault(&self, said: &Said) -> Option<Fault> {
        if said.facts.as_ref().is_some_and(|f| f.vm_id.is_empty()) {
            let text = format!(
                "the guest has no vm_id and no card that it believes, and runs no task: give it one that \
                 `adit card new {}` makes, and restart its agent",
                self.vm
            );
            return Some(Fault::new(FaultKind::Enrolment, &text));
        }
        let id = self.enrolled_as()?;
        let text = format!(
            "the guest's image is enrolled as `{id}`: it was copied from that VM, and refuses every goal for this one; \
             install the agent anew with `adit-guest install --vm-id {}`",
            self.vm
        );
        Some(Fault::new(FaultKind::Enrolment, &text))
    }

    /// Whether this process has heard from it who it is, by its card or without one.
    pub fn was_heard(&self) -> bool {
        let said = self.lock();
        said.facts.is_some() || said.is_fresh
    }

    /// When the time of the card is over that this host believes, by a clock that nobody sets.
    pub fn card_until(&self) -> Option<Instant> {
        let said = self.lock();
        said.enrolment.card.as_ref()?.as_ref().ok()?.until()
    }

    /// When the card ends that this host believes.
    pub fn card_ends(&self) -> Option<jiff::Timestamp> {
        let said = self.lock();
        let card = said.enrolment.card.as_ref()?.as_ref().ok()?;
        Some(card.card.not_after)
    }

    pub(super) fn said(&self) -> Said {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a fault of the guest is about. The words are the guest's: each begins with its code.
fn kind_of(text: &str) -> FaultKind {
    match text {
        _ if text.starts_with("policy-") => FaultKind::Policy,
        _ if text.starts_with("trust-") => FaultKind::Trust,
        _ if text.starts_with("journal-") || text.starts_with("no-space:") => FaultKind::Journal,
        _ => FaultKind::Card,
    }
}
