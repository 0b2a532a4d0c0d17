//! What may become of a task, and which one a guest gets next. Pure: no database, no clock; time is a parameter.
//!
//! ```text
//! queued ─► leased ─► started ─► done | failed | timed_out | interrupted | refused
//!    │         └──────────┴─────► lost_contact (silent for so long that it cannot be running, or its VM was removed)
//!    └─► expired (not_after passed, or its VM was removed)   └─► an earlier step did not succeed: skipped
//! ```
//! | asked | by |
//! |---|---|
//! | [`step`]: what an event makes of a task | every change |
//! | [`after`]: what the end of a task means for the rest of its goal | a report |
//! | [`Choice`]: which of a VM's open tasks is handed out | a pull |
//! | [`due`]: when time ends a task | the clock |
//!
//! - A task that is not terminal is handed out again whenever the agent pulls: a lease does not end, and the guest's journal
//!   answers for what it has begun.
//! - The first terminal state stays.
//! - A VM that is locked gets what it was handed before, and nothing new.

use std::collections::HashMap;

use adit_api::TaskState;
use adit_tasks::goal::TIMEOUT_MAX_S;
use adit_tasks::wire::Outcome;

/// Most attempts of an idempotent step.
pub const ATTEMPTS_MAX: u32 = 3;
/// How long after its goal's `not_after` a task that was handed out may still be running: as long as any step may.
pub const SILENCE_MAX_MS: i64 = TIMEOUT_MAX_S as i64 * 1000;

/// What happens to a task. Times are Unix time in ms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is sent to the guest.
    HandedOut,
    /// The guest says that it has begun.
    Begun,
    /// The guest reports how it ended.
    Reported(Outcome),
    /// An earlier step of its goal ended so that no later one may run ([`After::SkipRest`]).
    EarlierFailed,
    /// It is now this late.
    Time {
        /// Now.
        now_ms: i64,
        /// The end of its goal's validity.
        not_after_ms: i64,
    },
    /// Its VM is removed.
    VmRemoved,
}

/// What an event makes of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It goes to this state.
    To(TaskState),
    /// It stays as it is.
    Stays,
    /// The guest speaks of a task that it never got.
    NotHandedOut,
}

/// What an event makes of a task in this state.
pub fn step(state: TaskState, event: Event) -> Step {
    use TaskState as S;
    let is_over = |not_after_ms, now_ms| due(state, not_after_ms).is_some_and(|at| at < now_ms);
    match state {
        S::Queued => match event {
            Event::HandedOut => Step::To(S::Leased),
            Event::Begun | Event::Reported(_) => Step::NotHandedOut,
            Event::EarlierFailed => Step::To(S::Skipped),
            Event::Time {
                now_ms,
                not_after_ms,
            } if is_over(not_after_ms, now_ms) => Step::To(S::Expired),
            Event::Time { .. } => Step::Stays,
            Event::VmRemoved => Step::To(S::Expired),
        },
        S::Leased | S::Started => match event {
            Event::Begun if state == S::Leased => Step::To(S::Started),
            Event::HandedOut | Event::Begun | Event::EarlierFailed => Step::Stays,
            Event::Reported(outcome) => Step::To(outcome.into()),
            Event::Time {
                now_ms,
                not_after_ms,
            } if is_over(not_after_ms, now_ms) => Step::To(S::LostContact),
            Event::Time { .. } => Step::Stays,
            Event::VmRemoved => Step::To(S::LostContact),
        },
        S::Done
        | S::Failed
        | S::TimedOut
        | S::Interrupted
        | S::Refused
        | S::Skipped
        | S::Expired
        | S::LostContact => Step::Stays,
    }
}

/// When time ends a task in this state: in the first millisecond after this.
pub fn due(state: TaskState, not_after_ms: i64) -> Option<i64> {
    match state {
        TaskState::Queued => Some(not_after_ms),
        TaskState::Leased | TaskState::Started => Some(not_after_ms.saturating_add(SILENCE_MAX_MS)),
        TaskState::Done
        | TaskState::Failed
        | TaskState::TimedOut
        | TaskState::Interrupted
        | TaskState::Refused
        | TaskState::Skipped
        | TaskState::Expired
        | TaskState::LostContact => None,
    }
}

/// Why time has ended a task in this state, for people.
pub fn why(ended: TaskState) -> &'static str {
    match ended {
        TaskState::Expired => "not_after passed before it was handed out",
        TaskState::LostContact => "no report came: look at the VM before you order it again",
        TaskState::Queued
        | TaskState::Leased
        | TaskState::Started
        | TaskState::Done
        | TaskState::Failed
        | TaskState::TimedOut
        | TaskState::Interrupted
        | TaskState::Refused
        | TaskState::Skipped => "",
    }
}

/// What the end of a task means for the rest of its goal on this VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// The same step runs again, as this attempt.
    Again(u32),
    /// Later steps do not run.
    SkipRest,
    /// Later steps run in their turn.
    GoOn,
}

/// What follows the end of this attempt of a step.
pub fn after(outcome: Outcome, attempt: u32, idempotent: bool, continue_on_error: bool) -> After {
    match outcome {
        Outcome::Interrupted if idempotent && attempt < ATTEMPTS_MAX => After::Again(attempt + 1),
        Outcome::Done => After::GoOn,
        Outcome::Failed | Outcome::TimedOut | Outcome::Interrupted | Outcome::Refused => {
            match continue_on_error {
                true => After::GoOn,
                false => After::SkipRest,
            }
        }
    }
}

/// Whether a goal's time is over: no task of it would ever be handed out.
pub fn is_over(not_after_ms: i64, now_ms: i64) -> bool {
    not_after_ms < now_ms
}

/// Whether a goal is held because its time has not begun.
pub fn is_held(not_before_ms: i64, now_ms: i64) -> bool {
    not_before_ms > now_ms
}

/// Whether so many more tasks may wait for a VM.
pub fn has_room(open: u32, more: usize, max: u32) -> bool {
    (open as usize).saturating_add(more) <= max as usize
}

/// An open task, as far as it matters for whose turn it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its goal.
    pub digest: [u8; 32],
    /// Who claims to have signed the goal.
    pub signer: String,
    /// The goal's number among those of its key.
    pub key_seq: i64,
    /// Where it is now.
    pub state: TaskState,
    /// Begin of its goal's validity.
    pub not_before_ms: i64,
    /// End of its goal's validity.
    pub not_after_ms: i64,
}

/// Chooses the task that a guest gets next. It is offered the open tasks of the VM in order of `key_seq`, goal, step and
/// attempt, and the first one that it takes is handed out.
///
/// A goal that is held, or whose time is over, is passed over with all its steps. A guest that runs a key's goals strictly
/// in the order of their numbers refuses one that was overtaken, so for such a guest a held goal also holds the later ones of
/// its key.
#[derive(Debug)]
pub struct Choice {
    now_ms: i64,
    overtake: bool,
    is_locked: bool,
    /// The goal whose task was passed over last: its later steps wait too.
    passed: Option<[u8; 32]>,
    /// The lowest number of a held goal, by key.
    held: HashMap<String, i64>,
}

impl Choice {
    /// Begins to choose. `overtake`: the guest takes a key's goals in another order than that of their numbers; `is_locked`: nothing
    /// new goes to it.
    pub fn new(now_ms: i64, overtake: bool, is_locked: bool) -> Self {
        Self {
            now_ms,
            overtake,
            is_locked,
            passed: None,
            held: HashMap::new(),
        }
    }

    /// Whether this one is handed out.
    pub fn takes(&mut self, task: &Candidate) -> bool {
        let may_go = match task.state {
            // Held or not by now: the guest has it already.
            TaskState::Leased | TaskState::Started => true,
            TaskState::Queued => self.may_begin(task),
            TaskState::Done
            | TaskState::Failed
            | TaskState::TimedOut
            | TaskState::Interrupted
            | TaskState::Refused
            | TaskState::Skipped
            | TaskState::Expired
            | TaskState::LostContact => false,
        };
        if !may_go {
            self.passed = Some(task.digest);
        }
        may_go
    }

    fn may_begin(&mut self, task: &Candidate) -> bool {
        if self.is_locked
            || self.passed == Some(task.digest)
            || is_over(task.not_after_ms, self.now_ms)
        {
            return false;
        }
        let is_held = is_held(task.not_before_ms, self.now_ms);
        if is_held && !self.overtake {
            self.held.entry(task.signer.clone()).or_insert(task.key_seq);
        }
        let holder = self.held.get(&task.signer);
        !is_held && holder.is_none_or(|&held| held >= task.key_seq)
    }
}

#[cfg(test)]
pub(in crate::desk) mod tests;
