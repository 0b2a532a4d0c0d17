//! The check of a task against what the image trusts and what the journal remembers.

use std::cell::{Cell, RefCell};

use adit_names::VmId;
use adit_tasks::admit::History;
use adit_tasks::window::Window;
use adit_tasks::wire::{Outcome, Report, Task, TaskId};
use adit_tasks::{Admitted, KeyId, TrustStore, admit};

use crate::journal::{Journal, JournalError, Phase};

/// Why a task may not run here and now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denied {
    /// It never may; begins with a stable code.
    Refused(String),
    /// It may later.
    NotYet {
        /// From this time on, unix ms.
        not_before_ms: u64,
        /// Begins with a stable code.
        text: String,
    },
}

impl From<String> for Denied {
    fn from(why: String) -> Self {
        Self::Refused(why)
    }
}

/// Decides whether a task may run here, at this time in unix ms. `unsaved`: a result that the journal could not take.
///
/// # Errors
/// Why not.
pub fn verify(
    task: &Task,
    trusted: &TrustStore,
    me: &VmId,
    now_ms: i64,
    journal: &mut Journal,
    unsaved: Option<&Report>,
) -> Result<Admitted, Denied> {
    let history = JournalHistory {
        journal: RefCell::new(journal),
        unsaved,
        failed: Cell::new(None),
    };
    let admitted = admit(task, trusted, me, now_ms, &history);
    match history.failed.take() {
        // What could not be read might have forbidden it.
        Some(e) => Err(e.to_string().into()),
        None => admitted.map_err(|denial| match denial.not_before_ms {
            Some(ms) => Denied::NotYet {
                not_before_ms: u64::try_from(ms).unwrap_or(0),
                text: denial.to_string(),
            },
            None => denial.to_string().into(),
        }),
    }
}

/// The journal as `admit` asks it.
struct JournalHistory<'j> {
    journal: RefCell<&'j mut Journal>,
    unsaved: Option<&'j Report>,
    failed: Cell<Option<JournalError>>,
}

impl JournalHistory<'_> {
    fn ask<T>(&self, answer: Result<Option<T>, JournalError>) -> Option<T> {
        answer.unwrap_or_else(|e| {
            self.failed.set(Some(e));
            None
        })
    }
}

impl History for JournalHistory<'_> {
    fn window(&self, key: &KeyId) -> Window {
        let window = self.journal.borrow_mut().window(&key.0);
        self.ask(window.map(Some)).unwrap_or_default()
    }

    /// As the agent reports it when it is asked again.
    fn outcome(&self, task: &TaskId) -> Option<Outcome> {
        if let Some(report) = self.unsaved.filter(|r| r.task_id == *task) {
            return Some(report.outcome);
        }
        let phase = self.journal.borrow_mut().phase(task);
        match self.ask(phase)? {
            Phase::Result(report) => Some(report.outcome),
            Phase::Acked(outcome) => Some(outcome),
            // One task runs at a time: this one has ended, and its result could not be stored.
            Phase::Started { .. } => Some(Outcome::Interrupted),
            Phase::Received => None,
        }
    }

    fn begun(&self, task: &TaskId) -> bool {
        self.outcome(task).is_some()
    }
}
