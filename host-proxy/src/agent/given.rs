//! What an agent was given on its stream. Of use where both ends know `wire::WINDOW`: an envelope crosses once, and a goal that
//! the guest gave back waits for the guest's clock.

use std::collections::HashMap;

use adit_tasks::recent::{self, Recent};
use adit_tasks::wire::{self, HELD_MAX, Held, TaskId};

use crate::desk::{Handout, Wanted};

/// A goal's digest: of its payload, as the desk names it.
type Goal = [u8; 32];

/// What came to one agent on one stream.
#[derive(Default)]
pub struct Given {
    window: bool,
    /// Envelopes that the guest has, with the goal of each.
    goals: Recent<Goal>,
    /// The task that was handed out last.
    last: Option<(TaskId, Goal)>,
    /// Goals that were given back, and when each is valid by the guest's clock.
    held: HashMap<Goal, Held>,
}

/// A task in the frames that it is sent in.
pub enum Frames {
    /// One that has its goal in it.
    Whole(wire::Task),
    /// The goal, if the guest does not have it, and the task by digest.
    ByDigest(Option<wire::Goal>, wire::TaskOf),
}

impl Given {
    /// Nothing yet. `features`: those that both ends know.
    pub fn new(features: u64) -> Self {
        Self {
            window: features & wire::WINDOW != 0,
            ..Self::default()
        }
    }

    /// What is to be handed out next.
    pub fn wanted(&self) -> Wanted {
        Wanted {
            overtake: self.window,
            held: self.held.keys().copied().collect(),
            sent: self.goals.kept().copied().collect(),
        }
    }

    /// The frames of a task.
    pub fn frames(&mut self, handout: Handout) -> Frames {
        let Handout {
            task_id,
            digest: goal,
            envelope,
            step: step_id,
            attempt,
            ..
        } = handout;
        self.last = Some((task_id, goal));
        let sent = self.goals.find(|kept| *kept == goal);
        let (digest, first) = match (sent, envelope) {
            (None, envelope) | (Some(_), envelope @ Some(_)) => {
                let envelope = envelope.unwrap_or_default();
                if !self.window {
                    return Frames::Whole(wire::Task {
                        task_id,
                        envelope,
                        step_id,
                        attempt,
                    });
                }
                let digest = recent::digest(&envelope);
                self.goals.add(digest, envelope.len(), goal);
                (digest, Some(wire::Goal { envelope }))
            }
            (Some(digest), None) => (digest, None),
        };
        // As the guest does when it reads the frame.
        self.goals.get(&digest);
        let of = wire::TaskOf {
            task_id,
            digest,
            step_id,
            attempt,
        };
        Frames::ByDigest(first, of)
    }

    /// The guest does not have an envelope.
    pub fn lacks(&mut self, digest: &[u8; 32]) {
        self.goals.remove(digest);
    }

    /// The guest gave a task back, if it is the one that it was handed out last.
    pub fn gave_back(&mut self, held: Held) {
        let last = self.last.filter(|(id, _)| *id == held.task_id);
        if let Some((_, goal)) = last
            && self.window
            && self.held.len() < HELD_MAX
        {
            self.held.insert(goal, held);
        }
    }

    /// The guest's clock shows this time. Returns whether something need not wait any more.
    pub fn clock(&mut self, guest_ms: u64) -> bool {
        let before = self.held.len();
        self.held.retain(|_, held| held.not_before_ms > guest_ms);
        self.held.len() < before
    }

    /// Of what the guest gave back, the one that is valid first.
    pub fn next_held(&self) -> Option<Held> {
        self.held.values().min_by_key(|h| h.not_before_ms).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handout(n: u16) -> Handout {
        let mut digest = [0; 32];
        digest[..2].copy_from_slice(&n.to_le_bytes());
        Handout {
            task_id: [n as u8; 16],
            digest,
            envelope: Some(n.to_le_bytes().to_vec()),
            step: "s".into(),
            attempt: 1,
            state: adit_api::TaskState::Leased,
        }
    }

    fn held(n: u16, not_before_ms: u64) -> Held {
        Held {
            task_id: [n as u8; 16],
            not_before_ms,
            now_ms: 0,
        }
    }

    #[test]
    fn a_guest_gives_back_only_what_it_was_handed_last_and_so_many_goals() {
        let mut given = Given::new(wire::WINDOW);
        given.gave_back(held(1, 5));
        for n in 0..HELD_MAX as u16 + 10 {
            given.frames(handout(n));
            given.gave_back(held(n + 1, 5));
            given.gave_back(held(n, 5 + u64::from(n)));
        }
        assert_eq!(given.wanted().held.len(), HELD_MAX);
        assert_eq!(given.next_held().map(|h| h.not_before_ms), Some(5));
        assert!(given.clock(6) && !given.clock(6));
        assert_eq!(given.wanted().held.len(), HELD_MAX - 2);
        assert_eq!(given.wanted().sent.len(), recent::COUNT_MAX);
    }

    #[test]
    fn an_agent_of_before_gets_whole_tasks_and_keeps_what_it_holds() {
        let mut given = Given::new(0);
        for _ in 0..2 {
            assert!(matches!(given.frames(handout(1)), Frames::Whole(_)));
        }
        given.gave_back(held(1, 5));
        let wanted = given.wanted();
        assert!(wanted.held.is_empty() && wanted.sent.is_empty() && !wanted.overtake);
    }
}
