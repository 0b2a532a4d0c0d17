//! The agent in a VM: its streams, and what it says of itself, which is shown and never trusted.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use adit_names::VmId;
use adit_tasks::wire::{Facts, Held};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::Changes;
use crate::enrolment::Enrolment;
use crate::fault::{Fault, FaultKind, Logged};

/// Streams to the tasks service that one guest may hold open: its agent's, and a few that replace each other.
pub const AGENT_STREAMS_MAX: usize = 4;
/// Streams from unprivileged ports of one guest that may wait for their refusal.
pub const OTHER_STREAMS_MAX: usize = 2;

/// A VM's agent.
#[derive(Debug)]
pub struct Agent {
    /// [`AGENT_STREAMS_MAX`].
    pub streams: Arc<Semaphore>,
    /// [`OTHER_STREAMS_MAX`].
    pub other_streams: Arc<Semaphore>,
    vm: VmId,
    said: Mutex<Said>,
    logged: Logged,
    changes: Changes,
}

/// What it said, and when.
#[derive(Clone, Debug, Default)]
pub(super) struct Said {
    pub(super) facts: Option<Facts>,
    /// How far its clock is ahead, ms.
    pub(super) clock_ahead_ms: Option<i64>,
    pub(super) held: Option<Held>,
    pub(super) enrolment: Enrolment,
    /// It was said on this connection.
    is_fresh: bool,
    pub(super) seen: Option<Instant>,
    connected: Option<CancellationToken>,
}

impl Said {
    pub(super) fn is_connected(&self) -> bool {
        self.connected.as_ref().is_some_and(|t| !t.is_cancelled())
    }
}

impl Agent {
    pub(super) fn new(vm: &VmId, changes: Changes) -> Self {
        Self {
            streams: Arc::new(Semaphore::new(AGENT_STREAMS_MAX)),
            other_streams: Arc::new(Semaphore::new(OTHER_STREAMS_MAX)),
            vm: vm.clone(),
            said: Mutex::default(),
            logged: Logged::default(),
            changes,
        }
    }

    /// A connection begins: the older one is told to end.
    pub fn connected(&self) -> CancellationToken {
        let token = CancellationToken::new();
        let mut said = self.lock();
        said.is_fresh = false;
        let older = said.connected.replace(token.clone());
        drop(said);
        if let Some(older) = older {
            older.cancel();
        }
        token
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
            said.facts = facts;
            // An agent of the version before says nothing of it.
            if !said.is_fresh {
                said.enrolment = Enrolment::default();
            }
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

    /// It has said what its clock shows.
    pub fn clock(&self, guest_ms: u64, now_ms: i64) {
        let guest_ms = i64::try_from(guest_ms).unwrap_or(i64::MAX);
        self.lock().clock_ahead_ms = Some(guest_ms.saturating_sub(now_ms));
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
        let said = self.lock();
        said.facts.is_some() && said.is_connected()
    }

    /// The id that the guest's image is enrolled with, if it is another VM's.
    pub(super) fn enrolled_as(&self) -> Option<String> {
        let id = self.lock().facts.as_ref().map(|f| f.vm_id.clone());
        id.filter(|id| id != self.vm.as_str() && !id.is_empty())
    }

    pub(super) fn faults(&self) -> Vec<Fault> {
        let said = self.said();
        let mut faults: Vec<_> = self.enrolment_fault(&said).into_iter().collect();
        // The guest's words: each fault begins with its code.
        let of_policy = |text: &String| text.starts_with("policy-");
        let (policy, mut texts): (Vec<_>, Vec<_>) =
            said.enrolment.faults.into_iter().partition(of_policy);
        if let Some(Err(unproved)) = said.enrolment.card
            && unproved.is_fault
        {
            texts.push(format!(
                "this host does not believe its card: {}",
                unproved.why
            ));
        }
        if !texts.is_empty() {
            faults.push(Fault::new(FaultKind::Card, &texts.join("; ")));
        }
        if !policy.is_empty() {
            faults.push(Fault::new(FaultKind::Policy, &policy.join("; ")));
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

    pub(super) fn said(&self) -> Said {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
