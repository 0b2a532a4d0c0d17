//! What the host has given on a stream: goals, each once; and tasks that were given back until their time comes.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use adit_tasks::recent::{self, Recent};
use adit_tasks::wire::{Goal, HELD_MAX, Task, TaskOf};

/// What came on one stream.
#[derive(Default)]
pub struct Given {
    window: bool,
    goals: Recent<Vec<u8>>,
    /// When each goal that was given back becomes valid, unix ms. The host counts them as well.
    held: BinaryHeap<Reverse<u64>>,
}

impl Given {
    /// Nothing yet; `window`: both ends know `wire::WINDOW`.
    pub fn new(window: bool) -> Self {
        Self {
            window,
            ..Self::default()
        }
    }

    /// Takes a goal for later.
    pub fn goal(&mut self, goal: Goal) {
        let Goal { envelope } = goal;
        // Whatever the host calls it: its name is computed here.
        let digest = recent::digest(&envelope);
        self.goals.add(digest, envelope.len(), envelope);
    }

    /// The whole of a task; none if its goal is not there.
    pub fn task(&mut self, of: TaskOf) -> Option<Task> {
        let envelope = self.goals.get(&of.digest)?.clone();
        Some(Task {
            task_id: of.task_id,
            envelope,
            step_id: of.step_id,
            attempt: of.attempt,
        })
    }

    /// Whether a task of a goal that is valid from this time on is given back. Its time is waited for then.
    pub fn gives_back(&mut self, not_before_ms: u64) -> bool {
        let may = self.window && self.held.len() < HELD_MAX;
        if may {
            self.held.push(Reverse(not_before_ms));
        }
        may
    }

    /// The next time that is waited for.
    pub fn next_held(&self) -> Option<u64> {
        self.held.peek().map(|ms| ms.0)
    }

    /// Forgets the times that have come.
    pub fn come(&mut self, now_ms: u64) {
        self.held.retain(|ms| ms.0 > now_ms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(digest: [u8; 32]) -> TaskOf {
        TaskOf {
            task_id: [1; 16],
            digest,
            step_id: "s".into(),
            attempt: 1,
        }
    }

    #[test]
    fn r85_an_envelope_has_the_name_of_its_own_bytes_only() {
        let mut given = Given::default();
        let envelope = b"old".to_vec();
        given.goal(Goal { envelope });
        assert!(given.task(of(recent::digest(b"new"))).is_none());
        let task = given.task(of(recent::digest(b"old"))).unwrap();
        assert_eq!(task.envelope, b"old");
    }

    #[test]
    fn so_many_goals_are_given_back_and_the_stream_waits_for_the_rest() {
        let mut given = Given::default();
        assert!(!given.gives_back(1), "the host does not know of it");
        let mut given = Given::new(true);
        for ms in 1..=HELD_MAX as u64 {
            assert!(given.gives_back(ms));
        }
        // Also one of a time that is waited for: the host would hand it out again at once.
        assert!(!given.gives_back(5) && !given.gives_back(9999));
        given.come(7);
        assert_eq!(given.next_held(), Some(8));
        assert!(given.gives_back(9999));
    }
}
