//! Goals: what a manager signs. JSON only, parsed strictly: an unknown or duplicate key anywhere is an error with line
//! and column, because two readers that skip different things would see two goals (R87).
//!
//! ```json
//! {"goal_id": "0198…", "key_seq": 1763675000000000, "audience": {"vms": ["web-1"]},
//!  "not_before": "2026-11-20T22:00:00Z", "not_after": "2026-11-21T22:00:00Z", "min_planner": 1,
//!  "steps": [{"id": "hello", "script": {"interpreter": "/bin/sh", "script": "echo hi\n"}},
//!            {"id": "motd", "file": {"path": "/etc/motd", "content": "hi\n"}}]}
//! ```
//! `key_seq` grows with every goal of a key. Goals may reach a guest in another order; it refuses one that is so low that the guest
//! cannot know any more whether it has run (see `window`).

use std::collections::BTreeSet;

use adit_names::VmId;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::action::{Action, Written};
use crate::dsse::{Type, Verified};
use crate::object::{self, Object};

/// The planner that this build has.
pub const PLANNER: u16 = 1;
/// Most steps of a goal.
pub const STEPS_MAX: usize = 64;
/// Most VMs that a goal names.
pub const AUDIENCE_MAX: usize = 4096;
/// Longest that any step may run, seconds.
pub const TIMEOUT_MAX_S: u32 = 86_400;
/// Most bytes kept of each output stream of any step.
pub const OUTPUT_CAP_MAX: u32 = 256 << 10;

/// Why text is no goal: the fault of whoever wrote it.
#[derive(Debug, thiserror::Error)]
pub enum GoalError {
    /// Not the JSON that it should be; says line, column and key.
    #[error("{}", object::shown_plain(.0))]
    Json(#[source] serde_json::Error),
    /// A value that has the right type and cannot be used.
    #[error("`{key}`: {why}")]
    Value {
        /// Path of the key, for example `steps[2].file.path`.
        key: String,
        /// What is wrong with it.
        why: String,
    },
    /// Made for a newer planner.
    #[error("the goal needs planner {needs}, and this one is {PLANNER}: update adit")]
    Planner {
        /// What it needs.
        needs: u16,
    },
}

/// A goal. With steps as they are [`Written`] it was read, and not checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "a goal: a mapping with the key `steps`",
    bound(deserialize = "S: Deserialize<'de>")
)]
pub struct Goal<S = Step> {
    /// Names it.
    pub goal_id: Uuid,
    /// Counts the goals of its key.
    pub key_seq: u64,
    /// The VMs that it is for.
    #[serde(deserialize_with = "object::one")]
    pub audience: Audience,
    /// Not to be started before.
    pub not_before: Timestamp,
    /// Not to be started after.
    pub not_after: Timestamp,
    /// Lowest planner that understands it.
    pub min_planner: u16,
    /// What is to be done, in order.
    #[serde(deserialize_with = "object::list")]
    pub steps: Vec<S>,
}

/// The VMs that a goal is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "an audience: a mapping with the key `vms`"
)]
pub struct Audience {
    /// Ids of VMs.
    pub vms: Vec<VmId>,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(into = "Written")]
pub struct Step {
    /// Names it within its goal: `[a-z0-9_-]`, 1 to 64 bytes.
    pub id: String,
    /// What it does.
    pub action: Action,
    /// May be run again after it was cut off.
    pub idempotent: bool,
    /// Later steps run even if this one does not succeed.
    pub continue_on_error: bool,
}

impl Goal {
    /// Parses the payload that a trusted key has signed.
    ///
    /// # Errors
    /// It is no goal, or was signed as something else.
    pub fn from_verified(v: &Verified) -> Result<Self, GoalError> {
        if v.of() != Type::Goal {
            return bad("payloadType", "is not that of a goal");
        }
        Self::parse_unverified(v.payload())
    }

    /// Parses a payload that is not verified: to plan from on the host, never to act on.
    ///
    /// # Errors
    /// It is no goal.
    pub fn parse_unverified(payload: &[u8]) -> Result<Self, GoalError> {
        let Object(goal): Object<Goal<Written>> =
            serde_json::from_slice(payload).map_err(GoalError::Json)?;
        if goal.min_planner > PLANNER {
            return Err(GoalError::Planner {
                needs: goal.min_planner,
            });
        }
        goal.checked()
    }

    /// The step of this id.
    pub fn step(&self, id: &str) -> Option<&Step> {
        self.steps.iter().find(|s| s.id == id)
    }
}

impl Goal<Written> {
    /// Checks what types cannot express.
    fn checked(self) -> Result<Goal, GoalError> {
        let vms = &self.audience.vms;
        if vms.is_empty() || vms.len() > AUDIENCE_MAX {
            return bad(
                "audience.vms",
                format!("has {} VMs, 1 to {AUDIENCE_MAX} are allowed", vms.len()),
            );
        }
        let mut named = BTreeSet::new();
        if let Some(twice) = vms.iter().find(|vm| !named.insert(*vm)) {
            return bad("audience.vms", format!("`{twice}` is named twice"));
        }
        if self.not_after <= self.not_before {
            return bad("not_after", "must be later than not_before");
        }
        Ok(Goal {
            steps: checked_steps(self.steps)?,
            goal_id: self.goal_id,
            key_seq: self.key_seq,
            audience: self.audience,
            not_before: self.not_before,
            not_after: self.not_after,
            min_planner: self.min_planner,
        })
    }
}

/// Makes what is written steps, in the same order.
pub(crate) fn checked_steps(written: Vec<Written>) -> Result<Vec<Step>, GoalError> {
    if written.is_empty() || written.len() > STEPS_MAX {
        return bad(
            "steps",
            format!("has {} steps, 1 to {STEPS_MAX} are allowed", written.len()),
        );
    }
    let mut ids = BTreeSet::new();
    let mut steps = Vec::with_capacity(written.len());
    for (i, step) in written.into_iter().enumerate() {
        let at = format!("steps[{i}]");
        let id_ok = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-');
        if step.id.is_empty() || step.id.len() > 64 || !step.id.bytes().all(id_ok) {
            return bad(&format!("{at}.id"), "must be 1 to 64 of a-z, 0-9, _ and -");
        }
        if !ids.insert(step.id.clone()) {
            return bad(
                &format!("{at}.id"),
                format!("`{}` is the id of an earlier step, too", step.id),
            );
        }
        steps.push(step.checked(&at)?);
    }
    Ok(steps)
}

fn bad<T>(key: &str, why: impl Into<String>) -> Result<T, GoalError> {
    Err(GoalError::Value {
        key: key.into(),
        why: why.into(),
    })
}

#[cfg(test)]
pub(crate) mod tests;
