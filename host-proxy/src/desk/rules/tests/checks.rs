//! What must hold in a world, at any time and at its end.

use adit_api::TaskState;

use super::model::{Books, Said};
use super::world::{HOUR_MS, World};
use crate::desk::NewGoal;
use crate::desk::rules::{ATTEMPTS_MAX, SILENCE_MAX_MS};

impl<B: Books> World<B> {
    /// Nothing was handed out: everything open waits for its time, or behind what does.
    pub(super) fn nothing_could_go(&self, vm: usize) {
        let waits = |goal: &NewGoal| {
            let (from, until) = (goal.goal.not_before, goal.goal.not_after);
            from.as_millisecond() > self.now || until.as_millisecond() < self.now
        };
        let open: Vec<_> = self
            .told
            .iter()
            .filter(|(_, state)| !state.is_terminal())
            .filter_map(|(id, state)| Some((self.which(vm, id)?, *state)))
            .map(|(which, state)| (&self.goals[which.goal], state))
            .collect();
        for (goal, state) in &open {
            let behind = open.iter().any(|(held, _)| {
                held.goal.not_before.as_millisecond() > self.now
                    && held.signer == goal.signer
                    && held.goal.key_seq < goal.goal.key_seq
            });
            let waits = waits(goal) || behind && !self.overtake;
            assert!(
                waits && *state == TaskState::Queued,
                "seed {}: stuck",
                self.seed
            );
        }
    }

    /// A watcher is told what happens, and never the same twice or anything of a task that has ended.
    pub(super) fn hear(&mut self, said: Said) {
        for (id, state) in said {
            let before = self.told.insert(id, state);
            let forward = match before {
                None => state == TaskState::Queued,
                Some(before) => !before.is_terminal() && before != state,
            };
            assert!(forward, "seed {}: {before:?} to {state:?}", self.seed);
        }
    }

    /// Whoever lists the tasks sees what the watcher was told.
    pub(super) fn watcher_agrees(&mut self) {
        assert_eq!(self.books.states(), self.told, "seed {}", self.seed);
    }

    /// Time goes on until nothing is left to do, each time to the moment that was named.
    pub(super) fn drain(&mut self) {
        for _ in 0..200 {
            let (next, said) = self.books.expire(self.now);
            self.hear(said);
            let Some(at) = next else { break };
            if at > self.now {
                let (_, early) = self.books.expire(at);
                assert!(early.is_empty(), "seed {}: ended too early", self.seed);
            }
            self.now = self.now.max(at + 1);
        }
        let far = self.now + SILENCE_MAX_MS + 100 * HOUR_MS as i64;
        assert!(self.books.expire(far).1.is_empty(), "seed {}", self.seed);
        self.watcher_agrees();
        for vm in 0..2 {
            for goal in 0..self.goals.len() {
                for step in 0..self.goals[goal].goal.steps.len() {
                    self.attempts_are_in_order(vm, goal, step);
                }
            }
        }
    }

    fn attempts_are_in_order(&self, vm: usize, goal: usize, step: usize) {
        let state = |attempt| self.told.get(&self.id(vm, goal, step, attempt));
        let idempotent = self.goals[goal].goal.steps[step].idempotent;
        for attempt in 1..=ATTEMPTS_MAX + 1 {
            let Some(state) = state(attempt) else {
                break;
            };
            assert!(
                state.is_terminal() && attempt <= ATTEMPTS_MAX,
                "seed {}",
                self.seed
            );
        }
        for attempt in 1..ATTEMPTS_MAX {
            let again = state(attempt + 1).is_some();
            let cut = state(attempt) == Some(&TaskState::Interrupted);
            assert_eq!(again, cut && idempotent, "seed {}", self.seed);
        }
    }
}
