//! Plans: a pure function of the goal and the VM, the same on the host (which queues by it) and in the guest (which
//! acts by it). A task is one attempt of one step for one VM; its id is derived, so nobody can hand out another content
//! under the same id.

use adit_names::VmId;
use sha2::{Digest, Sha256};

use crate::Goal;
use crate::wire::TaskId;

/// One task of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedTask {
    /// See [`task_id`].
    pub task_id: TaskId,
    /// Step of the goal.
    pub step_id: String,
    /// 1 for the first.
    pub attempt: u32,
    /// May be run again after it was cut off.
    pub idempotent: bool,
    /// Later steps run even if this one does not succeed.
    pub continue_on_error: bool,
}

/// Plans a goal for one VM: its steps in order, first attempts.
pub fn plan(goal: &Goal, goal_digest: &[u8; 32], vm: &VmId) -> Vec<PlannedTask> {
    goal.steps
        .iter()
        .map(|step| PlannedTask {
            task_id: task_id(goal_digest, vm, &step.id, 1),
            step_id: step.id.clone(),
            attempt: 1,
            idempotent: step.idempotent,
            continue_on_error: step.continue_on_error,
        })
        .collect()
}

/// First 16 bytes of sha256("adit-task-v1" ‖ goal digest ‖ len(vm) ‖ vm ‖ len(step) ‖ step ‖ attempt); lengths are one
/// byte, the attempt is u32 little-endian.
pub fn task_id(goal_digest: &[u8; 32], vm: &VmId, step_id: &str, attempt: u32) -> TaskId {
    let mut hash = Sha256::new();
    hash.update(b"adit-task-v1");
    hash.update(goal_digest);
    for part in [vm.as_str(), step_id] {
        // Both are at most 64 bytes. No goal has a longer step id; even that gets an id of its own.
        hash.update([u8::try_from(part.len()).unwrap_or(u8::MAX)]);
        hash.update(part);
    }
    hash.update(attempt.to_le_bytes());
    let digest: [u8; 32] = hash.finalize().into();
    let mut id = [0; 16];
    id.copy_from_slice(&digest[..16]);
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn task_id_has_golden_bytes_and_depends_on_every_part() {
        let vm = |s: &str| s.parse::<VmId>().unwrap();
        let id = task_id(&[1; 32], &vm("web-1"), "hello", 1);
        assert_eq!(crate::hex(&id), "3415f7e2e9c62b9662db25411c8d32d1");
        for other in [
            task_id(&[2; 32], &vm("web-1"), "hello", 1),
            task_id(&[1; 32], &vm("web-2"), "hello", 1),
            task_id(&[1; 32], &vm("web-1h"), "ello", 1),
            task_id(&[1; 32], &vm("web-1"), "hello", 2),
        ] {
            assert_ne!(id, other);
        }
    }

    #[test]
    fn a_plan_has_the_steps_in_order() {
        let goal = Goal::parse_unverified(crate::goal::tests::GOOD.as_bytes()).unwrap();
        let tasks = plan(&goal, &[0; 32], &"web-1".parse().unwrap());
        let steps: Vec<_> = tasks
            .iter()
            .map(|t| (t.step_id.as_str(), t.attempt, t.idempotent))
            .collect();
        assert_eq!(steps, [("hello", 1, false), ("motd", 1, true)]);
    }
}
