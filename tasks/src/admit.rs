//! What a guest checks before it does anything with a task, in this order: a trust anchor, the envelope's form, the
//! signature, the goal's form, audience, `not_after`, sequence, step, attempt, task id, order, `not_before`. Pure: journal and
//! clock are parameters. `not_before` comes last, so that a task that is only too early can be held until its time comes.
//!
//! Order rule: a step runs when every earlier step of its goal is done here, or has ended otherwise and has
//! `continue_on_error`; and only while no later step has started. The guest's own journal decides that, not the host. A
//! refusal leaves no trace, so that the same step can still run in its turn.
//!
//! Number rule: the goals of one key run in any order of `key_seq`, and none runs twice. The [`Window`] of the key says which
//! goals were admitted, and from which number on nothing was forgotten.

use adit_names::VmId;
use jiff::Timestamp;

use crate::TrustStore;
use crate::dsse::{Envelope, VerifyError};
use crate::key::KeyId;
use crate::plan::task_id;
use crate::window::{Place, Window};
use crate::wire::{Outcome, Task, TaskId};
use crate::{Goal, Step};

/// One goal of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GoalNumber {
    /// Its `key_seq`.
    pub key_seq: u64,
    /// Its digest.
    pub digest: [u8; 32],
}

/// What the guest's journal knows.
pub trait History {
    /// The goals admitted from a key.
    fn window(&self, key: &KeyId) -> Window;
    /// How a task ended here, if it did.
    fn outcome(&self, task: &TaskId) -> Option<Outcome>;
    /// Whether a task has started here, ended or not.
    fn begun(&self, task: &TaskId) -> bool;
}

/// A task that may run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// Who ordered it.
    pub key: KeyId,
    /// To be recorded in the key's window, before anything runs.
    pub goal: GoalNumber,
    /// What there is to do.
    pub step: Step,
}

/// Why a task is refused. Nothing was done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {text}")]
pub struct Denial {
    /// Stable word.
    pub code: &'static str,
    /// For people.
    pub text: String,
    /// From when it may run, unix ms, if it is only too early (`not-yet-valid`).
    pub not_before_ms: Option<i64>,
}

fn deny<T>(code: &'static str, text: impl Into<String>) -> Result<T, Denial> {
    Err(Denial {
        code,
        text: text.into(),
        not_before_ms: None,
    })
}

/// Decides whether a task may run here and now.
///
/// # Errors
/// A [`Denial`] with one of the codes `no-trust-anchor`, `bad-envelope`, `untrusted-key`, `revoked-key`, `wrong-role`,
/// `bad-signature`, `bad-goal`, `wrong-target`, `not-yet-valid`, `expired`, `replay`, `unknown-step`, `attempt`, `task-id-mismatch`,
/// `out-of-order`.
pub fn admit(
    task: &Task,
    trust: &TrustStore,
    me: &VmId,
    now_unix_ms: i64,
    history: &dyn History,
) -> Result<Admitted, Denial> {
    if trust.knows_nobody() {
        return deny("no-trust-anchor", VerifyError::NoAnchor.to_string());
    }
    let envelope =
        Envelope::parse(&task.envelope).or_else(|e| deny("bad-envelope", e.to_string()))?;
    let verified = envelope.verify(trust).or_else(|e| {
        let code = match e {
            VerifyError::NoAnchor => "no-trust-anchor",
            VerifyError::UntrustedKey { .. } => "untrusted-key",
            VerifyError::Revoked { .. } => "revoked-key",
            VerifyError::WrongRole { .. } => "wrong-role",
            VerifyError::BadSignature { .. } => "bad-signature",
        };
        deny(code, e.to_string())
    })?;
    let goal = Goal::from_verified(&verified).or_else(|e| deny("bad-goal", e.to_string()))?;
    if !goal.audience.vms.contains(me) {
        let vms: Vec<&str> = goal.audience.vms.iter().take(4).map(VmId::as_str).collect();
        return deny(
            "wrong-target",
            format!("the goal is for {}, this guest is {me}", vms.join(", ")),
        );
    }
    if now_unix_ms > goal.not_after.as_millisecond() {
        let text = format!("was valid until {}, {}", goal.not_after, clock(now_unix_ms));
        return deny("expired", text);
    }
    let (key, digest) = (verified.key(), verified.digest());
    check_number(&history.window(&key), &key, goal.key_seq, &digest)?;
    let Some(step) = goal.step(&task.step_id) else {
        return deny(
            "unknown-step",
            format!(
                "the goal has no step `{}`",
                adit_names::escape(&task.step_id)
            ),
        );
    };
    check_attempt(task, step, &digest, me, history)?;
    if task.task_id != task_id(&digest, me, &step.id, task.attempt) {
        return deny(
            "task-id-mismatch",
            "the id does not match goal, VM, step and attempt",
        );
    }
    check_order(&goal, step, &digest, me, history)?;
    let not_before_ms = goal.not_before.as_millisecond();
    if now_unix_ms < not_before_ms {
        return Err(Denial {
            code: "not-yet-valid",
            text: format!("valid from {}, {}", goal.not_before, clock(now_unix_ms)),
            not_before_ms: Some(not_before_ms),
        });
    }
    Ok(Admitted {
        key,
        goal: GoalNumber {
            key_seq: goal.key_seq,
            digest,
        },
        step: step.clone(),
    })
}

/// Which clock is wrong cannot be known here, so the refusal says what this one shows.
fn clock(now_unix_ms: i64) -> String {
    match Timestamp::from_millisecond(now_unix_ms) {
        Ok(now) => format!("and this guest's clock says {now}"),
        Err(_) => format!("and this guest's clock is {now_unix_ms} ms off 1970"),
    }
}

/// If the host decided what is new, it could run a goal as often as it likes.
fn check_number(
    window: &Window,
    key: &KeyId,
    key_seq: u64,
    digest: &[u8; 32],
) -> Result<(), Denial> {
    match window.place(key_seq, digest) {
        Place::Known | Place::New => Ok(()),
        Place::Other => deny(
            "replay",
            format!("number {key_seq} of key {key} was another goal"),
        ),
        Place::Forgotten { floor } => deny(
            "replay",
            format!(
                "the goal has number {key_seq} of key {key}, and of the numbers up to {floor} it is not known here any more \
                 which have run"
            ),
        ),
    }
}

/// The guest itself decides whether there may be another attempt: if the host did, it could run a step as often as it likes.
fn check_attempt(
    task: &Task,
    step: &Step,
    digest: &[u8; 32],
    me: &VmId,
    history: &dyn History,
) -> Result<(), Denial> {
    let Some(before) = task.attempt.checked_sub(1) else {
        return deny("attempt", "attempts count from 1");
    };
    if before == 0 {
        return Ok(());
    }
    if !step.idempotent {
        return deny("attempt", format!("step `{}` is not idempotent", step.id));
    }
    match history.outcome(&task_id(digest, me, &step.id, before)) {
        Some(Outcome::Interrupted) => Ok(()),
        _ => deny(
            "attempt",
            format!("attempt {before} was not interrupted here"),
        ),
    }
}

/// If the host decided the order, it could run a step whose preparation failed or never came.
fn check_order(
    goal: &Goal,
    step: &Step,
    digest: &[u8; 32],
    me: &VmId,
    history: &dyn History,
) -> Result<(), Denial> {
    let at = |s: &Step, attempt| task_id(digest, me, &s.id, attempt);
    let earlier = || goal.steps.iter().take_while(|s| s.id != step.id);
    for before in earlier() {
        let mut attempt = 1;
        // Only an attempt that was interrupted has one after it.
        while history.begun(&at(before, attempt + 1)) {
            attempt += 1;
        }
        let ended = match history.outcome(&at(before, attempt)) {
            Some(Outcome::Done) => continue,
            Some(_) if before.continue_on_error => continue,
            Some(outcome) => format!("ended here as {outcome:?}"),
            None => "has not ended here".into(),
        };
        return deny(
            "out-of-order",
            format!(
                "step `{}` comes after `{}`, which {ended}",
                step.id, before.id
            ),
        );
    }
    let later = goal.steps.iter().skip(earlier().count() + 1);
    match later.into_iter().find(|s| history.begun(&at(s, 1))) {
        Some(after) => deny(
            "out-of-order",
            format!(
                "step `{}` comes before `{}`, which has started here",
                step.id, after.id
            ),
        ),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
