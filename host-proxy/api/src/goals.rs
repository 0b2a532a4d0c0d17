//! Goals and their tasks, of this host and of all.

use serde::{Deserialize, Serialize};

use crate::hosts::Silent;
use crate::state::TaskState;

/// Hands a signed goal over.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewGoal {
    /// The DSSE envelope, exactly as signed: JSON text.
    pub envelope: String,
    /// VMs to queue it for; empty: its audience.
    #[serde(default)]
    pub to: Vec<String>,
    /// Queue it even for a VM that its audience does not name; the guest decides (it will refuse).
    #[serde(default)]
    pub relay_unchecked: bool,
}

/// A goal as the host knows it.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Goal {
    /// From its payload.
    pub goal_id: String,
    /// sha256 of the payload, hex.
    pub digest: String,
    /// RFC 3339.
    pub accepted_at: String,
    /// Its tasks, in order of VM and step; those of other hosts with them.
    pub tasks: Vec<Task>,
    /// Hosts that did not say what they have of it, and why: there may be more tasks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub silent: Vec<Silent>,
}

/// A goal in a list: how far it is. Each step on each VM counts once, by its last attempt.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GoalSummary {
    /// From its payload.
    pub goal_id: String,
    /// sha256 of the payload, hex.
    pub digest: String,
    /// Id of the key that signed it, as the goal itself says: 32 hex digits, or empty where that is not known.
    pub signer: String,
    /// Counts the goals of its key.
    pub key_seq: u64,
    /// RFC 3339; when this host accepted it.
    pub accepted_at: String,
    /// RFC 3339; from when it is valid.
    pub not_before: String,
    /// RFC 3339; until when it is valid.
    pub not_after: String,
    /// VMs for which this host has tasks of it.
    pub vms: u32,
    /// Steps of which this host has tasks.
    pub steps: u32,
    /// Steps on VMs that have not ended.
    pub open: u32,
    /// Steps on VMs that succeeded.
    pub done: u32,
    /// Steps on VMs that ended otherwise.
    pub failed: u32,
    /// The hosts whose tasks are counted, where several were asked; empty: this one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
}

/// Goals of all hosts.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllGoals {
    /// The newest, by the time at which they were accepted first.
    pub goals: Vec<GoalSummary>,
    /// There are older ones.
    pub earlier: bool,
    /// Hosts that did not say what they have, and why.
    pub silent: Vec<Silent>,
}

/// Tasks of all hosts.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllTasks {
    /// The newest, by the time at which they were queued.
    pub tasks: Vec<Task>,
    /// There are older ones.
    pub earlier: bool,
    /// Hosts that did not say what they have, and why.
    pub silent: Vec<Silent>,
}

/// One task: one attempt of one step for one VM.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// 32 hex digits.
    pub task_id: String,
    /// Goal that ordered it.
    pub goal_id: String,
    /// VM that runs it.
    pub vm: String,
    /// The host that has it, where several were asked; none: this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Step of the goal.
    pub step: String,
    /// 1 for the first.
    pub attempt: u32,
    /// Where it stands.
    pub state: TaskState,
    /// Exit status of what ran.
    pub exit: Option<i32>,
    /// Why it ended so.
    pub reason: String,
    /// Of a refused one, the stable word for why: `policy`, `untrusted-key`, `wrong-target`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<String>,
    /// RFC 3339; when it was queued.
    pub queued_at: String,
    /// RFC 3339 by the guest's clock.
    pub started_at: Option<String>,
    /// RFC 3339 by the guest's clock.
    pub ended_at: Option<String>,
    /// Bytes written to stdout and stderr.
    pub output_bytes: (u64, u64),
    /// The first bytes of stdout as text, at most 200, for lists.
    pub output_preview: String,
}

/// A change of a task.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskEvent {
    /// Counts changes on this host; 0 where `adit task watch -o json` has asked for the task after a stream ended.
    pub seq: u64,
    /// The task as it is now.
    pub task: Task,
}
