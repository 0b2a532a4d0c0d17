//! Drafts: what a person writes, in YAML or JSON. The VMs, the times and the number are filled in at signing.
//!
//! ```yaml
//! valid_for: 24h
//! steps:
//!   - id: hello
//!     script: {interpreter: /bin/sh, script: "echo hello from $(hostname)\n"}
//!   - id: motd
//!     idempotent: true
//!     file: {path: /etc/motd, content: "managed\n", mode: "0644"}
//! ```

mod place;

use adit_names::VmId;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::action::Written;
use crate::goal::{Audience, Goal, GoalError, PLANNER, Step, checked_steps};
use crate::object::shown;

/// Why a file is not a draft. Names file, line, column and key.
#[derive(Debug, thiserror::Error)]
pub enum DraftError {
    /// Not YAML, an unknown or duplicate key, or a value of the wrong type.
    #[error("{file}:{line}:{column}: {message}")]
    Parse {
        /// The file.
        file: String,
        /// From 1; 0 if the parser does not say.
        line: u64,
        /// From 1; 0 if the parser does not say.
        column: u64,
        /// What the parser says.
        message: String,
    },
    /// A value that has the right type and cannot be used.
    #[error("{file}:{line}:{column}: {source}")]
    Value {
        /// The file.
        file: String,
        /// From 1.
        line: u64,
        /// From 1.
        column: u64,
        /// What is wrong.
        #[source]
        source: GoalError,
    },
}

/// A draft. With steps as they are [`Written`] it was read, and not checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "a draft: a mapping with the key `steps`"
)]
pub struct Draft<S = Step> {
    /// How long after signing it may be started: `30m`, `24h`, `7d`.
    #[serde(default = "day")]
    pub valid_for: String,
    /// What is to be done, in order.
    pub steps: Vec<S>,
}

fn day() -> String {
    "24h".into()
}

/// What is filled in at signing.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// A new UUID, version 7.
    pub goal_id: Uuid,
    /// Higher than that of every goal signed with this key before.
    pub key_seq: u64,
    /// The VMs that it is for.
    pub vms: Vec<VmId>,
    /// When it is signed.
    pub now: Timestamp,
}

/// Guests whose clock is a little slow still accept a goal that was signed just now.
const CLOCK_SKEW_S: i64 = 300;

impl Draft {
    /// Parses a draft; `file` is for messages.
    ///
    /// # Errors
    /// It is not a draft; says where and why.
    pub fn parse(text: &str, file: &str) -> Result<Self, DraftError> {
        let options = serde_saphyr::options! { duplicate_keys: serde_saphyr::options::DuplicateKeyPolicy::Error };
        let place =
            || serde_saphyr::from_str_with_options::<place::Place>(text, options.clone()).ok();
        let parse = |e: serde_saphyr::Error| {
            let e = e.without_snippet();
            let at = e.location();
            let (line, column) = at.map_or((0, 0), |l| (l.line(), l.column()));
            let message = e.to_string();
            // The parser repeats the place at its end.
            let message = message
                .strip_suffix(&format!(" at line {line}, column {column}"))
                .unwrap_or(&message);
            let message = crate::plain(message);
            // A message about a value begins with a verb; one about a key names it.
            let key = match message.starts_with("must ") || message.starts_with("has ") {
                true => place().and_then(|p| p.at((line, column))),
                false => None,
            };
            let key = key.filter(|key| !key.is_empty());
            let message = key.map_or(message.clone(), |key| format!("`{key}`: {message}"));
            DraftError::Parse {
                file: file.into(),
                line,
                column,
                message: shown(&message),
            }
        };
        let written: Draft<Written> =
            serde_saphyr::from_str_with_options(text, options.clone()).map_err(parse)?;
        let value = |source: GoalError| {
            let (line, column) = match (&source, place()) {
                (GoalError::Value { key, .. }, Some(place)) => place.find(key),
                _ => (1, 1),
            };
            DraftError::Value {
                file: file.into(),
                line,
                column,
                source,
            }
        };
        let valid_for = written.valid_for;
        let steps = checked_steps(written.steps).map_err(value)?;
        let draft = Self { valid_for, steps };
        draft.no_bare_octal(text, place()).map_err(value)?;
        draft.seconds().map_err(value)?;
        Ok(draft)
    }

    /// Makes the payload to sign.
    ///
    /// # Errors
    /// The result is no goal: no or too many VMs, a time out of range.
    pub fn into_payload(self, inputs: Inputs) -> Result<Vec<u8>, GoalError> {
        let range = |_: jiff::Error| GoalError::Value {
            key: "valid_for".into(),
            why: format!(
                "`{}` is too long: it ends after the year 9999",
                self.valid_for
            ),
        };
        let shift = |s: i64| {
            inputs
                .now
                .checked_add(jiff::SignedDuration::from_secs(s))
                .map_err(range)
        };
        let goal = Goal {
            goal_id: inputs.goal_id,
            key_seq: inputs.key_seq,
            audience: Audience { vms: inputs.vms },
            not_before: shift(-CLOCK_SKEW_S)?,
            not_after: shift(self.seconds()?)?,
            min_planner: PLANNER,
            steps: self.steps,
        };
        let payload = serde_json::to_vec(&goal).map_err(GoalError::Json)?;
        // What is signed is what every reader will accept.
        Goal::parse_unverified(&payload)?;
        Ok(payload)
    }

    /// Refuses an octal number without quotes and without a zero before it: a tool may have written it in decimal, where 416 is
    /// 0640, and its digits mean another number.
    fn no_bare_octal(&self, text: &str, place: Option<place::Place>) -> Result<(), GoalError> {
        let first = |(line, column): (u64, u64)| {
            let line = text
                .lines()
                .nth(usize::try_from(line).ok()?.checked_sub(1)?)?;
            line.chars()
                .nth(usize::try_from(column).ok()?.checked_sub(1)?)
        };
        for (n, step) in self.steps.iter().enumerate() {
            let kind = step.action.kind();
            for (key, form) in kind.octal() {
                let key = format!("steps[{n}].{}.{key}", kind.name());
                let at = place.as_ref().map(|place| place.find(&key));
                if matches!(at.and_then(first), Some('1'..='9')) {
                    let why = (*form).into();
                    return Err(GoalError::Value { key, why });
                }
            }
        }
        Ok(())
    }

    fn seconds(&self) -> Result<i64, GoalError> {
        let bad = || GoalError::Value {
            key: "valid_for".into(),
            why: format!(
                "`{}` is not a duration: write 30m, 24h or 7d",
                adit_names::escape(&self.valid_for)
            ),
        };
        let (number, unit) = self
            .valid_for
            .split_at_checked(self.valid_for.len().saturating_sub(1))
            .ok_or_else(bad)?;
        if !number.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        let n: i64 = number.parse().ok().filter(|&n| n > 0).ok_or_else(bad)?;
        let factor = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 86_400,
            _ => return Err(bad()),
        };
        n.checked_mul(factor).ok_or_else(bad)
    }
}

#[cfg(test)]
mod tests;
